"""Plan: what is quantized or kept, refused before the run, or missing (README: "What gets quantized")."""

from __future__ import annotations

import re

import pytest
import torch
from checkpoints import (
    BESIDE,
    LAYER,
    WEIGHT,
    gated,
    layers,
    random,
    save_model,
    write_sparse_checkpoint,
)
from conftest import ENGINE_FORMATS, ROOT, assert_refused, quantize, refuse, run_cli
from folders import read_json, read_tensors
from tiny_nemotron import lightning_tensors, write_lightning_config

# --- what is kept -----------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path):
    result = quantize(tiny, tmp_path / "out", "--dry_run")
    for words in (
        "quantized to 4 bits",
        "embeddings",
        "vectors and scalars",
        "3-D",
        "free",
        "at the peak",
        "Dry run",
    ):
        assert words in result.stdout
    assert not (tmp_path / "out").exists()


def test_list_prints_each_tensor_and_its_fate_separated_by_tabs_and_nothing_else(tiny, tmp_path):
    result = quantize(
        tiny, tmp_path / "out", "--dry_run", "--list", "--group_size", 64, "--exclude", "o_proj"
    )
    rows = {row[0]: row[1:] for row in (line.split("\t") for line in result.stdout.splitlines())}
    assert len(rows) == 43
    assert rows["lm_head.weight"] == ["BF16", "512x256", "4 bits, groups of 64", "head"]
    assert rows["backbone.layers.2.mixer.o_proj.weight"] == [
        "BF16",
        "256x256",
        "kept",
        "--exclude o_proj",
    ]
    assert not (tmp_path / "out").exists()
    assert_refused(run_cli(tiny, tmp_path / "out", "--list"), "--list needs --dry_run", exit_code=2)


def test_what_is_quantized_is_listed_by_kind_and_delicate_layers_are_noted_with_what_keeps_them(
    tiny, tmp_path
):
    plan = quantize(tiny, tmp_path / "out", "--dry_run").stdout
    for kind, count in {
        "experts": 16,
        "shared experts": 4,
        "attention": 4,
        "Mamba": 2,
        "head": 1,
        "routers": 2,
    }.items():
        assert re.search(rf"^  {kind} +{count} ", plan, re.MULTILINE), kind
    pattern = re.search(r"head and routers in 4 bits.* --exclude '(.*)' keeps them", plan)[1]
    plan = quantize(tiny, tmp_path / "out", "--dry_run", "--exclude", pattern).stdout
    assert not re.search(r"^  (head|routers) ", plan, re.MULTILINE)
    assert "quantized to 4 bits                        26 " in plan


def plan_counts(stdout: str) -> tuple[int, int, int]:
    """Tensors in, quantized and kept, from the printed plan."""
    rows = {line[:35].strip(): line[35:].split() for line in stdout.splitlines()}
    return tuple(
        int(rows[row][0].replace(",", ""))
        for row in ("input", "quantized to 4 bits", "kept as they are")
    )


def test_the_full_nemotron_inventory_plans_as_6028_quantized(inventory, tmp_path):
    result = quantize(inventory, tmp_path / "out", "--dry_run")
    assert plan_counts(result.stdout) == (6243, 6028, 215)
    assert "63.2 GB" in result.stdout
    assert "2,944" in result.stdout  # padded
    assert not (tmp_path / "out").exists()
    result = quantize(inventory, tmp_path / "out", "--dry_run", "--quantize_embeddings")
    assert plan_counts(result.stdout) == (6243, 6029, 214)


@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_the_full_nemotron_inventory_plans_as_6004_quantized(inventory, tmp_path, form):
    plan = quantize(
        inventory, tmp_path / "out", "--dry_run", "--format", form, "--group_size", 64
    ).stdout
    assert re.search(r"^quantized to 4 bits +6,004 ", plan, re.MULTILINE)
    assert re.search(r"^ *routers .* 23 ", plan, re.MULTILINE)
    assert ("use --format compressed-tensors" in plan) == (form == "gptq")


@pytest.fixture(scope="module")
def lightning(tmp_path_factory):
    """Nemotron-3.5-Lightning-30B with its MTP layer: all of its headers, and none of its weights."""
    folder = tmp_path_factory.mktemp("lightning")
    write_sparse_checkpoint(folder, lightning_tensors(), shards=13)
    write_lightning_config(folder)
    return folder


def test_lightnings_layers_are_quantized_as_nanos_and_its_experts_of_mtp_too(
    lightning, inventory, tmp_path
):
    def fates_of(source):
        options = ["--dry_run", "--list", "--format", "compressed-tensors"]
        lines = quantize(source, tmp_path / "out", *options).stdout.splitlines()
        rows = [line.split("\t") for line in lines]
        return {name.replace("backbone.", "model."): fate for name, *fate in rows}

    fates = fates_of(lightning)
    mtp = {name: fates.pop(name)[2] for name in list(fates) if name.startswith("mtp.")}
    assert fates == fates_of(inventory)
    assert sum(fate[2] == "4 bits, groups of 64" for fate in fates.values()) == 6004

    projections = [name for name in mtp if re.search(r"mixer\..*_proj\.weight$", name)]
    assert len(projections) == 4 + 2 * 128 + 2
    assert {mtp[name] for name in projections} == {"4 bits, groups of 64"}
    assert mtp["mtp.layers.1.mixer.gate.weight"] == "kept"


@pytest.mark.parametrize("form", ["int4", *ENGINE_FORMATS])
def test_nothing_of_lightning_is_missed_and_its_mtp_layer_is_promised_and_there(
    lightning, tmp_path, form
):
    plan = quantize(lightning, tmp_path / "out", "--dry_run", "--format", form).stdout
    assert "65.8 GB" in plan
    assert "WARNING" not in plan
    assert "promises layers" not in plan


@pytest.mark.parametrize(
    ("options", "size", "token"),
    [
        ([], "18.6 GB", "2.25 GB"),
        (["--int8", "lm_head"], "18.2 GB", "1.90 GB"),
        (["--int8", r"^(?!.*\.experts\.)"], "19.0 GB", "2.62 GB"),
        (["--exclude", "mtp"], "20.5 GB", "2.25 GB"),
    ],
)
def test_lightnings_sizes_are_those_of_the_readme(lightning, tmp_path, options, size, token):
    options = ["--format", "compressed-tensors", "--dry_run", *options]
    plan = quantize(lightning, tmp_path / "out", *options).stdout
    assert re.search(rf"^output +[\d,]+ +{size} ", plan, re.MULTILINE)
    assert f"A token:   reads {token} of weights" in plan
    assert size in (ROOT / "README.md").read_text()


def test_tens_of_thousands_of_tensors_are_planned(tmp_path):
    write_sparse_checkpoint(
        tmp_path / "in", {f"m.{i}.weight": (torch.bfloat16, (8, 128)) for i in range(30_000)}, 4
    )
    assert "30,000" in quantize(tmp_path / "in", tmp_path / "out", "--dry_run").stdout


def test_exclude_keeps_what_any_of_its_patterns_finds(tiny, tmp_path):
    result = quantize(
        tiny, tmp_path / "out", "--exclude", r"shared_experts", "--exclude", r"^lm_head"
    )
    output = read_tensors(tmp_path / "out")
    assert "lm_head.weight" in output
    assert "backbone.layers.3.mixer.shared_experts.up_proj.weight" in output
    assert "backbone.layers.3.mixer.experts.0.up_proj.weight" not in output
    assert "--exclude shared_experts" in result.stdout


def test_embeddings_are_kept_unless_asked_for(tiny, tmp_path):
    quantize(tiny, tmp_path / "default")
    quantize(tiny, tmp_path / "asked", "--quantize_embeddings")
    assert "backbone.embeddings.weight" in read_tensors(tmp_path / "default")
    assert "backbone.embeddings.qweight" in read_tensors(tmp_path / "asked")


ROUTERS_AND_HEADS = [
    "m.gate",
    "m.router",
    "m.shared_expert_gate",
    "m.router.layer",
    "m.gate.wg",
    "lm_head",
    "score",
]
LINEAR = ["m.gate_proj", "m.up_proj", "m.attention.output.dense", "m.gate_up_proj", "m.c_proj"]


@pytest.mark.parametrize("form", ["int4", *ENGINE_FORMATS])
def test_engine_formats_keep_heads_and_routers_and_int4_does_not(tmp_path, form):
    tensors = {f"{module}.weight": torch.ones(8, 128) for module in [*ROUTERS_AND_HEADS, *LINEAR]}
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out", "--format", form)
    kept = {
        name.removesuffix(".weight")
        for name in read_tensors(tmp_path / "out")
        if name.endswith(".weight")
    }
    assert kept == (set() if form == "int4" else set(ROUTERS_AND_HEADS))


def test_3d_weights_that_stay_are_pointed_out_with_their_size(tmp_path):
    folder = save_model(tmp_path / "in", {"attention.heads": torch.ones(4, 64, 128), **WEIGHT})
    assert (
        "only 2-D weights are quantized; 1 3-D one (131 kB) kept, e.g. attention.heads"
        in quantize(folder, tmp_path / "out").stdout
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("q_prj", "did you mean q_proj?"),
        ("lm_haed", "did you mean lm_head?"),
        ("q_proj,k_proj", "give the option once for each pattern, or join them: 'q_proj|k_proj'"),
        ("q_proj k_proj", "give the option once for each pattern, or join them: 'q_proj|k_proj'"),
        (r"lm\.heda", r"--exclude 'lm\.heda' matches none"),
        ("zzzz", "correct or drop it"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_was_meant(tiny, tmp_path, pattern, hint):
    assert_refused(
        run_cli(tiny, tmp_path / "out", "--exclude", pattern),
        "matches none of the 43 tensors",
        hint,
    )


@pytest.mark.parametrize("options", [["--exclude", "."], ["--group_size", 256]], ids=str)
def test_a_run_that_would_quantize_nothing_is_refused(tmp_path, options):
    source = save_model(tmp_path / "in", {f"{LAYER}.weight": random(64, 128)})
    assert_refused(
        run_cli(source, tmp_path / "out", *options), "no weight", "would be quantized", LAYER
    )


def test_an_output_name_that_the_checkpoint_has_already_is_refused(tmp_path):
    folder = save_model(
        tmp_path / "in", {"m.weight": torch.ones(4, 128), "m.scales": torch.ones(4)}
    )
    refuse(folder, tmp_path / "out", "'m.scales'")


# --- what engines fuse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "whole"),
    [("layers.2.mixer.k_proj", "q_proj,k_proj,v_proj"), (r"experts\.0\.up_proj", "all experts of")],
)
@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_an_exclude_that_splits_what_engines_fuse_is_refused(tiny, tmp_path, form, pattern, whole):
    refuse(
        tiny,
        tmp_path / "out",
        whole,
        "all of them or none",
        options=["--format", form, "--group_size=64", "--exclude", pattern],
    )


def test_an_exclude_that_splits_gate_and_up_is_refused(tmp_path):
    tensors = {
        f"model.layers.0.mlp.{part}_proj.weight": torch.ones(8, 128)
        for part in ("gate", "up", "down")
    }
    folder = save_model(tmp_path / "in", tensors)
    refuse(
        folder,
        tmp_path / "out",
        "{gate_proj,up_proj}",
        options=["--format", "gptq", "--exclude", "up_proj"],
    )
    quantize(folder, tmp_path / "out", "--format", "gptq", "--exclude", "gate_proj|up_proj")


@pytest.mark.parametrize("kept", ["in_proj_a", "in_proj_z"])
def test_a_split_of_what_vllm_fuses_in_linear_attention_is_refused(tmp_path, kept):
    tensors = {
        f"model.layers.0.linear_attn.in_proj_{p}.weight": random(64, 128)
        for p in ("qkv", "z", "a", "b")
    }
    options = ["--format", "compressed-tensors", "--group_size", 64, "--exclude", kept]
    assert_refused(
        run_cli(save_model(tmp_path / "in", tensors), tmp_path / "out", *options),
        "engines fuse",
        kept,
    )


@pytest.mark.parametrize("pattern", ["down_proj", r"experts\.2\."])
def test_an_exclude_that_splits_a_layers_stacks_is_refused_for_engines(tmp_path, pattern):
    source = save_model(tmp_path / "in", BESIDE | gated()[0], model_type="qwen3_moe")
    options = ["--format", "compressed-tensors", "--group_size", 64, "--exclude", pattern]
    assert_refused(
        run_cli(source, tmp_path / "out", *options), "all experts of", "all of them or none"
    )


# --- what is missing --------------------------------------------------------------------------------------------------


def warnings_of(tmp_path, tensors, **config):
    source = save_model(tmp_path / "in", tensors, **config)
    return [
        line
        for line in quantize(source, tmp_path / "out").stdout.splitlines()
        if line.startswith("WARNING:")
    ]


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [((0, 2), "'model.layers.1'"), ((0, 1), "'model.layers.2'"), ((0, 1, 2, 3), None)],
)
@pytest.mark.parametrize("nested", [False, True])
def test_missing_layers_are_warned_of(tmp_path, numbers, missing, nested):
    config = {"num_hidden_layers": 3}
    tower = {f"visual.blocks.{number}.proj.weight": random(64, 128) for number in range(5)}
    source = save_model(
        tmp_path / "in", layers(*numbers) | tower, **({"text_config": config} if nested else config)
    )
    warnings = [
        line
        for line in quantize(source, tmp_path / "out").stdout.splitlines()
        if line.startswith("WARNING:")
    ]
    assert len(warnings) == bool(missing)
    assert not missing or missing in warnings[0]


def stacked_layers(container, count):
    return {f"{container}.{number}.fc1.weight": random(64, 128) for number in range(count)}


UNEVEN = {
    "bart": ("model.encoder.layers", "model.decoder.layers", {"encoder_layers": 4}),
    "t5": ("encoder.block", "decoder.block", {"num_layers": 4}),
}


@pytest.mark.parametrize("family", UNEVEN)
@pytest.mark.parametrize("counts", [(4, 2), (3, 2), (4, 1)])
def test_the_layers_of_an_encoder_and_of_a_decoder_are_counted_apart(tmp_path, family, counts):
    encoder, decoder, config = UNEVEN[family]
    config |= {"decoder_layers": 2} if family == "bart" else {"num_decoder_layers": 2}
    tensors = stacked_layers(encoder, counts[0]) | stacked_layers(decoder, counts[1])
    warnings = warnings_of(tmp_path, tensors, **config)
    assert len(warnings) == (counts != (4, 2))
    assert not warnings or (f"'{encoder}.3'" if counts[0] == 3 else f"'{decoder}.1'") in warnings[0]


@pytest.mark.parametrize("key", ["num_layers", "n_layers", "n_layer"])
def test_layers_are_counted_whatever_the_config_calls_them(tmp_path, key):
    assert "'h.2'" in warnings_of(tmp_path, stacked_layers("h", 2), **{key: 3})[0]


def test_of_a_model_that_counts_two_blocks_a_layer_half_as_many_layers_are_due(tmp_path):
    def plan_of(name, *numbers):
        config = {"model_type": "dory", "num_hidden_layers": 8}
        return quantize(
            save_model(tmp_path / name, layers(*numbers), **config), tmp_path / "out", "--dry_run"
        ).stdout

    assert "LAYERS ARE MISSING" not in plan_of("whole", 0, 1, 2, 3)
    assert "LAYERS ARE MISSING: 1 of 4" in plan_of("lost", 0, 1, 3)


def test_nothing_is_said_of_an_encoder_that_a_decoder_does_without(tmp_path):
    assert not warnings_of(tmp_path, stacked_layers("model.decoder.layers", 2), num_hidden_layers=2)


def test_nothing_is_said_of_layers_that_a_model_shares(tmp_path):
    tensors = stacked_layers("encoder.albert_layer_groups", 1)
    assert not warnings_of(tmp_path, tensors, num_hidden_layers=12, num_hidden_groups=1)


def whole_model():
    tensors = {
        f"model.layers.{n}.self_attn.{p}_proj.weight": random(64, 128)
        for n in range(4)
        for p in "qkvo"
    }
    return tensors | {
        f"model.layers.{n}.mlp.experts.{e}.{p}_proj.weight": random(64, 128)
        for n in range(1, 4)
        for e in range(4)
        for p in ("up", "down")
    }


LOST = {
    "model.layers.2.self_attn.k_proj.weight": "'model.layers.2.self_attn.k_proj'",
    "model.layers.3.mlp.experts.1.up_proj.weight": "'model.layers.3.mlp.experts.1.up_proj'",
    "model.layers.1.mlp.experts.2.": "'model.layers.1.mlp.experts.2'",
    "model.layers.1.mlp.experts.3.": "'model.layers.1.mlp.experts.3'",
}


@pytest.mark.parametrize("lost", LOST)
def test_single_weights_and_experts_that_are_missing_are_warned_of(tmp_path, lost):
    tensors = {name: tensor for name, tensor in whole_model().items() if not name.startswith(lost)}
    warnings = warnings_of(tmp_path, tensors, num_experts=4)
    assert len(warnings) == 1
    assert (
        f"WEIGHTS ARE MISSING: 1 that the others of their kind have are not in the checkpoint: {LOST[lost]}."
        in (warnings[0])
    )


@pytest.mark.parametrize("count", [2, 4])
def test_nothing_is_said_of_layers_of_several_kinds(tmp_path, count):
    tensors = {
        name: tensor for name, tensor in whole_model().items() if int(name.split(".")[2]) < count
    }
    tensors |= {"model.layers.0.self_attn.relative_attention_bias.weight": random(32, 4)}
    assert not warnings_of(tmp_path, tensors, num_experts=4)


UNTIED = {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}


def pre_norm_model(count=3, bias=True):
    """A model of as many layers, each with two norms and a bias, and with a norm after the last."""
    tensors = {"model.embed_tokens.weight": random(512, 128), "lm_head.weight": random(512, 128)}
    tensors["model.norm.weight"] = random(128)
    for number in range(count):
        layer = f"model.layers.{number}"
        tensors[f"{layer}.self_attn.k_proj.weight"] = random(64, 128)
        tensors[f"{layer}.input_layernorm.weight"] = random(128)
        tensors[f"{layer}.post_attention_layernorm.weight"] = random(128)
        if bias:
            tensors[f"{layer}.self_attn.k_proj.bias"] = random(64)
    return tensors


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("count", [2, 3, 30])
@pytest.mark.parametrize("lost", ["input_layernorm.weight", "self_attn.k_proj.bias"])
def test_a_norm_or_bias_that_one_layer_lacks_is_warned_of(tmp_path, count, lost):
    tensors = pre_norm_model(count)
    name = f"model.layers.{count - 1}.{lost}"
    del tensors[name]
    (warning,) = warnings_of(tmp_path, tensors, **LLAMA)
    assert "NORMS OR BIASES ARE MISSING: 1 that" in warning
    assert repr(name) in warning


def test_a_missing_final_norm_is_warned_of(tmp_path):
    tensors = pre_norm_model()
    del tensors["model.norm.weight"]
    tensors["vision_tower.post_layernorm.weight"] = random(128)
    (warning,) = warnings_of(tmp_path, tensors, **LLAMA)
    assert "THE FINAL NORM IS MISSING: the layers of 'model.layers' have norms" in warning


def several_kinds():
    """Three of six layers have a norm of queries and a bias that the others have not."""
    tensors = pre_norm_model(6, bias=False)
    for number in (0, 2, 4):
        tensors[f"model.layers.{number}.self_attn.q_norm.weight"] = random(64)
        tensors[f"model.layers.{number}.self_attn.k_proj.bias"] = random(64)
    return tensors


def without(tensors, pattern):
    return {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}


WHOLE = {
    "whole": (pre_norm_model(), LLAMA),
    "several kinds of layers": (several_kinds(), LLAMA),
    "no biases": (pre_norm_model(bias=False), LLAMA),
    "norms without weights": (without(pre_norm_model(), "norm"), LLAMA),
    "an encoder": (without(pre_norm_model(), r"model\.norm"), {"architectures": ["SomeModel"]}),
    "norms after": (
        {
            name.replace("input_layernorm", "ffn_layernorm"): tensor
            for name, tensor in pre_norm_model().items()
            if name != "model.norm.weight"
        },
        LLAMA,
    ),
    "ModernBERT": (
        {
            name.replace("input_layernorm", "attn_norm"): tensor
            for name, tensor in pre_norm_model().items()
            if name != "model.layers.0.input_layernorm.weight"
        },
        {"architectures": ["ModernBertForMaskedLM"]},
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_nothing_is_said_of_norms_and_biases_that_a_model_does_without(tmp_path, case):
    tensors, config = WHOLE[case]
    assert not warnings_of(tmp_path, tensors, **config)


def names_of_layers(container, count, inside):
    return {
        f"{container}.{n}.{name}.weight": random(64, 128) for n in range(count) for name in inside
    }


NOT_MISSING = {
    "parts of a sequence beside the layers": (
        names_of_layers("encoder.layer", 4, ["attention.query"])
        | {f"classifier.{n}.weight": random(64, 128) for n in (0, 3)}
        | {f"pool.layers.{n}.conv.weight": random(64, 8, 3) for n in range(0, 9, 2)},
        {"num_hidden_layers": 4},
    ),
    "stacks that are run through several times": (
        names_of_layers("model.H_module.layers", 2, ["mlp.fc1"])
        | names_of_layers("model.L_module.layers", 2, ["mlp.fc1"]),
        {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    ),
    "a head of another name": (
        layers(0, 1)
        | {"model.embed_tokens.weight": random(320, 128)}
        | {"model.decoder.output_projection.weight": random(320, 96)},
        {**LLAMA, "vocab_size": 320, "tie_word_embeddings": False},
    ),
}


@pytest.mark.parametrize("case", NOT_MISSING)
def test_nothing_is_called_missing_of_a_whole_model(tmp_path, case):
    tensors, config = NOT_MISSING[case]
    assert not warnings_of(tmp_path, tensors, **config)


PROMISES = ["num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_num_layers"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", PROMISES)
def test_layers_of_further_tokens_that_are_promised_and_not_there_are_noted(tmp_path, key, nested):
    def notes(name, tensors, count):
        config = {"num_hidden_layers": 2, key: count}
        config = {"text_config": config} if nested else config
        source = save_model(tmp_path / name, tensors, **config)
        return quantize(source, tmp_path / "out", "--dry_run").stdout

    said = f"promises layers that predict further tokens ({key})"
    assert said in notes("none", layers(0, 1), 1)
    assert said not in notes("not promised", layers(0, 1), 0)
    assert said not in notes("by number", layers(0, 1, 2), 1)
    mtp = {"mtp.layers.0.self_attn.q_proj.weight": random(64, 128)}
    assert said not in notes("by name", layers(0, 1) | mtp, 1)


MEGATRON = {
    "decoder.layers.0.self_attention.linear_qkv.weight": random(384, 128),
    "decoder.layers.0.mlp.linear_fc1.weight": random(512, 128),
    "decoder.final_layernorm.weight": random(128),
}
META = {
    "tok_embeddings.weight": random(512, 128),
    "layers.0.attention.wo.weight": random(128, 128),
    "layers.0.feed_forward.w1.weight": random(256, 128),
}
TRAINERS = {"Megatron-Core": (MEGATRON, "Megatron-Bridge"), "Meta": (META, "convert_llama_weights")}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_names_of_a_trainers_own_format_are_warned_of_for_engines(tmp_path, trainer):
    tensors, remedy = TRAINERS[trainer]
    source = save_model(tmp_path / "in", tensors, model_type="llama")
    options = ["--format", "compressed-tensors", "--dry_run"]
    plan = quantize(source, tmp_path / "out", *options).stdout
    (warning,) = [line for line in plan.splitlines() if line.startswith("WARNING:")]
    assert f"3 tensors are named as in {trainer}'s own format" in warning
    assert "no loader of model_type 'llama' knows them" in warning
    assert remedy in warning
    assert "NAMES OF A TRAINER" not in quantize(source, tmp_path / "out", "--dry_run").stdout


OWN_NAMES = {
    "internlm2": META,
    "qwen3_vl": {"model.visual.blocks.0.mlp.linear_fc1.weight": random(256, 128)},
}


@pytest.mark.parametrize("model_type", OWN_NAMES)
def test_nothing_is_said_of_such_names_where_the_model_has_them(tmp_path, model_type):
    source = save_model(tmp_path / "in", OWN_NAMES[model_type], model_type=model_type)
    options = ["--format", "compressed-tensors", "--dry_run"]
    assert "NAMES OF A TRAINER" not in quantize(source, tmp_path / "out", *options).stdout


def test_a_missing_head_is_refused_for_engines_and_warned_of_in_int4(tmp_path):
    source = save_model(tmp_path / "in", layers(0), **UNTIED)
    result = run_cli(source, tmp_path / "out", "--format", "compressed-tensors")
    assert_refused(result, "tie_word_embeddings false", "no head")
    assert (
        "MISSING: config.json has tie_word_embeddings false"
        in quantize(source, tmp_path / "out").stdout
    )


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"lm_head.weight": random(96, 128)}, UNTIED),
        ({}, UNTIED | {"tie_word_embeddings": True}),
        ({}, UNTIED | {"architectures": ["LlamaModel"]}),
        (
            {"output.weight": random(96, 128), "model.tok_embeddings.weight": random(96, 128)},
            UNTIED | {"vocab_size": 96},
        ),
        ({}, UNTIED | {"text_config": {"tie_word_embeddings": True}}),
    ],
    ids=[
        "head",
        "tied",
        "no head in this architecture",
        "head of another name",
        "tied in text_config",
    ],
)
def test_nothing_is_said_of_a_head_that_is_there_or_not_due(tmp_path, tensors, config):
    source = save_model(tmp_path / "in", layers(0) | tensors, **config)
    assert (
        "WARNING" not in quantize(source, tmp_path / "out", "--format", "compressed-tensors").stdout
    )


def test_a_missing_embedding_is_refused_for_engines_and_warned_of_in_int4(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 96}
    source = save_model(tmp_path / "in", layers(0) | {"lm_head.weight": random(96, 128)}, **config)
    result = run_cli(source, tmp_path / "out", "--format", "compressed-tensors")
    assert_refused(result, "no embedding")
    assert "HEAD OR EMBEDDING IS MISSING" in quantize(source, tmp_path / "out").stdout


def multimodal(folder, tower_rows=64, **config):
    """A language model of two layers, and a tower of one."""
    tensors = {
        "model.embed_tokens.weight": random(320, 128),
        "visual.blocks.0.attn.proj.weight": random(tower_rows, 128),
        "visual.merger.mlp.0.weight": random(64, 72),
    }
    for number in range(2):
        tensors[f"model.layers.{number}.mlp.up_proj.weight"] = random(64, 128)
    settings = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2}
    return save_model(folder, tensors, vision_config={"depth": 1}, **settings, **config)


def test_the_plan_has_a_row_for_what_is_kept_beside_the_language_model(tmp_path):
    source = multimodal(tmp_path / "in")
    result = quantize(source, tmp_path / "out", "--format", "compressed-tensors", "--dry_run")
    row = r"vision and audio \(whole for engines\) +1 +16\.4 kB"
    assert re.search(row, result.stdout)
    assert "groups of 128" in result.stdout  # though the tower has 72 columns


def test_int4_packs_towers_and_names_the_exclude_that_keeps_them(tmp_path):
    source = multimodal(tmp_path / "in")
    result = quantize(source, tmp_path / "out", "--group_size", 64)
    assert "visual.merger.mlp.0.qweight" in read_tensors(tmp_path / "out")
    pattern = re.search(r"--exclude '(.*?visual.*?)'", result.stdout)[1]
    quantize(source, tmp_path / "kept", "--group_size", 64, "--exclude", pattern)
    kept = read_tensors(tmp_path / "kept")
    assert {"visual.merger.mlp.0.weight", "visual.blocks.0.attn.proj.weight"} <= kept.keys()
    assert "model.layers.0.mlp.up_proj.qweight" in kept


def test_a_weight_beside_the_language_model_may_stand_in_wrappers_alone(tmp_path):
    source = multimodal(tmp_path / "in")
    tensors = read_tensors(source) | {"thinker.weight": random(64, 128)}
    settings = read_json(source / "config.json")
    result = quantize(save_model(tmp_path / "more", tensors, **settings), tmp_path / "out")
    assert r"--exclude '(^|\.)(thinker|visual)\.'" in result.stdout


def test_int8_packs_the_towers_that_it_names_with_a_warning(tmp_path):
    source = multimodal(tmp_path / "in")
    options = ["--format", "compressed-tensors", "--int8", r"visual\.blocks"]
    result = quantize(source, tmp_path / "out", *options)
    tensors = read_tensors(tmp_path / "out")
    assert "visual.blocks.0.attn.proj.weight_packed" in tensors
    assert "visual.merger.mlp.0.weight" in tensors
    assert "WARNING:   --int8 packs 1 layer of vision and audio" in result.stdout


@pytest.mark.parametrize(("rows", "warned"), [(64, False), (256, True)])
def test_a_tower_that_outweighs_the_language_model_is_a_warning(tmp_path, rows, warned):
    source = multimodal(tmp_path / "in", tower_rows=rows)
    result = quantize(source, tmp_path / "out", "--format", "compressed-tensors", "--dry_run")
    assert ("is more than what is quantized" in result.stdout) == warned


@pytest.mark.parametrize(
    ("form", "model_type", "warned"),
    [("gptq", "gemma3", True), ("gptq", "qwen3", False), ("compressed-tensors", "gemma3", False)],
)
def test_gptq_is_warned_of_where_vllm_does_not_compute_in_float16(
    tmp_path, form, model_type, warned
):
    source = multimodal(tmp_path / "in", model_type=model_type)
    result = quantize(source, tmp_path / "out", "--format", form)
    assert ("does not compute gemma3 in float16" in result.stdout) == warned
    assert ("--dtype float16" in result.stdout) == (form == "gptq" and not warned)
    assert ("--dtype bfloat16" in result.stdout) == warned


def test_whisper_is_refused_as_gptq(tmp_path):
    layers = {f"model.decoder.layers.{n}.fc1.weight": random(64, 128) for n in range(2)}
    source = save_model(tmp_path / "in", layers, model_type="whisper")
    refuse(source, tmp_path / "out", "whisper from gptq", options=["--format", "gptq"])
    quantize(source, tmp_path / "out", "--format", "compressed-tensors")


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "noted"),
    [(None, True), ("tokenizer.json", False), ("tokenizer.model", False), ("vocab.json", False)],
)
def test_a_model_without_a_tokenizer_is_noted_for_engines(tmp_path, name, noted):
    tensors = {"model.layers.0.self_attn.q_proj.weight": random(64, 128)}
    tensors |= {"model.embed_tokens.weight": random(96, 128), "lm_head.weight": random(96, 128)}
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 128}
    source = save_model(tmp_path / "in", tensors, **config)
    if name:
        (source / name).write_text("{}")
    result = run_cli(source, tmp_path / "out", "--format", "compressed-tensors", "--dry_run")
    assert ("no tokenizer is in" in result.stdout) == noted
    assert "no tokenizer" not in run_cli(source, tmp_path / "out", "--dry_run").stdout
