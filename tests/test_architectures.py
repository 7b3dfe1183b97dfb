"""Architectures: stacks of experts, and what a tensor is for (README: "Stacks of experts become experts").

A stack whose layout names, shapes and config.json do not decide is refused. Transposed stacks (Llama 4) are read at a
tenth of the speed: columns are gathered.
"""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from checkpoints import (
    BESIDE,
    INNER,
    MOE,
    PROJECTION,
    SEPARATE,
    E,
    H,
    gated,
    random,
    save_model,
    save_pickle,
)
from conftest import FORMATS, assert_refused, quantize, run_cli
from folders import assert_same_tensors, edit_shard, folder_bytes, is_kept, read_tensors
from reference import pack_words, reference_quantize
from safetensors.torch import save_file

# --- stacks of experts ------------------------------------------------------------------------------------------------


def ungated(module="model.layers.0.mixer.experts"):
    up, down = random(E, INNER, H), random(E, H, INNER)
    stacks = {f"{module}.up_proj": up, f"{module}.down_proj": down}
    return stacks, {
        f"{module}.{expert}.{name}.weight": stack[expert].clone()
        for name, stack in (("up_proj", up), ("down_proj", down))
        for expert in range(E)
    }


def turned(experts):
    """The same experts in stacks of transposed matrices."""

    def transposed():
        stacks, separate = experts()
        return {
            name: stack.transpose(1, 2).contiguous() for name, stack in stacks.items()
        }, separate

    return transposed


SIZES = {"hidden_size": H, "moe_intermediate_size": INNER}
FAMILIES = {
    "qwen3_moe": (gated, {"model_type": "qwen3_moe"}),
    "deepseek_v3": (gated, {"model_type": "deepseek_v3", "n_routed_experts": E}),
    "in a text_config": (
        gated,
        {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text"}},
    ),
    "nemotron_h": (ungated, {"model_type": "nemotron_h", **SIZES}),
    "nemotron_h without sizes": (ungated, {"model_type": "nemotron_h"}),
    "not gated, sizes in text_config": (
        ungated,
        {"model_type": "some", "text_config": {"model_type": "nemotron_h", **SIZES}},
    ),
    "transposed": (turned(gated), {"model_type": "llama4_text"}),
    "transposed, not gated": (turned(ungated), {"model_type": "nemotron_h", **SIZES}),
    "not gated, of a latent size": (
        ungated,
        {
            "model_type": "nemotron_h",
            "hidden_size": 2 * H,
            "moe_latent_size": H,
            "moe_intermediate_size": INNER,
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("saved", [save_model, save_pickle], ids=["safetensors", "pickle"])
def test_stacks_of_experts_give_what_separate_experts_give(tmp_path, family, form, saved):
    experts, config = FAMILIES[family]
    stacks, separate = experts()
    options = ["--format", form, "--group_size", 64, "--verify"]
    plan = quantize(
        saved(tmp_path / "stacked", BESIDE | stacks, **config), tmp_path / "out", *options
    ).stdout
    quantize(
        save_model(tmp_path / "separate", BESIDE | separate, **config),
        tmp_path / "expected",
        *options,
    )
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    assert re.search(rf"stacks of experts +2 +read as {len(separate)} weights", plan)


def test_an_experts_weight_is_its_own_slice_of_the_stack_with_gate_rows_first(tmp_path):
    stacks, _ = gated()
    quantize(
        save_model(tmp_path / "in", BESIDE | stacks, model_type="qwen3_moe"),
        tmp_path / "out",
        "--group_size",
        64,
    )
    output = read_tensors(tmp_path / "out")
    for expert in range(E):
        gate_up = stacks[f"{MOE}.experts.gate_up_proj"][expert]
        slices = {"gate_proj": gate_up[:INNER], "up_proj": gate_up[INNER:]}
        for name, weight in (
            slices | {"down_proj": stacks[f"{MOE}.experts.down_proj"][expert]}
        ).items():
            codes, scales = reference_quantize(weight, 64, torch.float16)
            words = output[f"{MOE}.experts.{expert}.{name}.qweight"]
            assert (
                words.tolist()
                == torch.tensor([pack_words(row) for row in codes], dtype=torch.int32).tolist()
            )
            assert output[f"{MOE}.experts.{expert}.{name}.scales"].tolist() == scales


@pytest.mark.parametrize(
    "options", [["--scale", "mse"], ["--scale", "mse", "--importance"]], ids=["mse", "importance"]
)
def test_stacked_experts_are_searched_and_weighed_as_separate_ones(tmp_path, options):
    stacks, separate = gated()
    if options[-1] == "--importance":
        vectors = {
            name.removesuffix(".weight"): torch.rand(tensor.shape[1])
            for name, tensor in separate.items()
        }
        save_file(vectors, tmp_path / "importance.safetensors")
        options = [*options, tmp_path / "importance.safetensors"]
    for name, tensors in (("stacked", stacks), ("separate", separate)):
        source = save_model(tmp_path / name, BESIDE | tensors, model_type="qwen3_moe")
        quantize(source, tmp_path / f"{name}_out", "--group_size", 64, *options)
    assert_same_tensors(tmp_path / "stacked_out", tmp_path / "separate_out")


@pytest.mark.parametrize("model_type", ["mixtral", "minimax", "minimax_m2"])
def test_mixtrals_state_dict_gets_the_names_that_vllm_knows(tmp_path, model_type):
    stacks, _ = gated()
    quantize(
        save_model(tmp_path / "in", BESIDE | stacks, model_type=model_type),
        tmp_path / "out",
        "--format=int4",
    )
    names = {name.rpartition(".")[0] for name in read_tensors(tmp_path / "out")}
    moe = "model.layers.0.block_sparse_moe"
    assert {f"{moe}.experts.{e}.{w}" for e in range(E) for w in ("w1", "w2", "w3")} < names
    assert f"{moe}.gate" in names


def test_phimoes_router_is_renamed_with_its_experts(tmp_path):
    stacks, _ = gated()
    tensors = stacks | {f"{MOE}.router.weight": random(E, H)}
    options = ["--format", "compressed-tensors", "--group_size", 64]
    quantize(save_model(tmp_path / "in", tensors, model_type="phimoe"), tmp_path / "out", *options)
    assert "model.layers.0.block_sparse_moe.gate.weight" in read_tensors(tmp_path / "out")


def test_a_stack_in_a_pickle_that_is_not_in_one_piece_is_read_right(tmp_path):
    stacks, separate = gated()
    views = {
        name: stack.transpose(1, 2).contiguous().transpose(1, 2) for name, stack in stacks.items()
    }
    assert not any(view.is_contiguous() for view in views.values())
    constants = {"TILE_WEIGHTS": 2000, "JOB_WEIGHTS": 5000}
    source = save_pickle(tmp_path / "in", BESIDE | views, model_type="qwen3_moe")
    quantize(source, tmp_path / "out", "--group_size", 64, constants=constants)
    quantize(
        save_model(tmp_path / "separate", BESIDE | separate),
        tmp_path / "expected",
        "--group_size",
        64,
    )
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize("saved", [save_model, save_pickle], ids=["safetensors", "pickle"])
@pytest.mark.parametrize(
    "options", [[], ["--exclude", r"experts\.\d+\."]], ids=["quantized", "kept"]
)
def test_transposed_stacks_are_read_right_in_tiles_of_any_size(tmp_path, saved, options):
    stacks, separate = turned(gated)()
    constants = {
        "TILE_WEIGHTS": 5500,
        "JOB_WEIGHTS": 15000,
        "COPY_BYTES": 7777,
        "VERIFY_WEIGHTS": 4900,
    }
    source = saved(tmp_path / "in", BESIDE | stacks, model_type="llama4_text")
    options = ["--format", "compressed-tensors", "--group_size", 64, *options]
    quantize(source, tmp_path / "out", *options, "--verify", constants=constants)
    quantize(
        save_model(tmp_path / "separate", BESIDE | separate, model_type="llama4_text"),
        tmp_path / "expected",
        *options,
    )
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


def test_a_resumed_run_over_stacks_writes_the_bytes_of_an_uninterrupted_one(tmp_path):
    source = save_model(tmp_path / "in", BESIDE | gated()[0], model_type="qwen3_moe")
    options = ["--format", "compressed-tensors", "--group_size", 64, "--shard_size_gb", 5e-5]
    quantize(source, tmp_path / "whole", *options)
    quantize(source, tmp_path / "out", *options)
    for name in (
        "model.safetensors.index.json",
        "model-00002.safetensors",
        "model-00004.safetensors",
    ):
        (tmp_path / "out" / name).unlink()
    assert "finished by an earlier run" in quantize(source, tmp_path / "out", *options).stdout
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_verify_names_a_wrong_expert_of_a_stack(tmp_path):
    source = save_model(tmp_path / "in", BESIDE | gated()[0], model_type="qwen3_moe")
    quantize(source, tmp_path / "out", "--group_size", 64)
    one, other = (f"{MOE}.experts.{expert}.up_proj.qweight" for expert in (1, 2))
    swap = lambda tensors: tensors.update({one: tensors[other], other: tensors[one]})  # noqa: E731
    edit_shard(tmp_path / "out" / "model-00001.safetensors", swap)
    result = run_cli(source, tmp_path / "out", "--verify")
    assert_refused(result, "2 problems")
    assert f"WRONG:     '{MOE}.experts.1.up_proj.weight'" in result.stdout


# --- stacks that stay, or are refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [r"\.experts\.", r"experts\.\d+\.", "mlp"])
def test_excluded_stacks_stay_whole_where_engines_know_them_so(tmp_path, pattern):
    stacks, _ = gated()
    source = save_model(tmp_path / "in", BESIDE | stacks, model_type="qwen3_moe")
    options = [
        "--format",
        "compressed-tensors",
        "--group_size",
        64,
        "--exclude",
        pattern,
        "--verify",
    ]
    quantize(source, tmp_path / "out", *options)
    output = read_tensors(tmp_path / "out")
    for name, stack in stacks.items():
        assert torch.equal(output[name], stack)
    for prefix in ("model", "model.language_model", "language_model.model"):
        assert is_kept(tmp_path / "out", f"{prefix}.layers.0.mlp.experts")
        assert is_kept(tmp_path / "out", f"{prefix}.layers.0.mlp.experts.0.gate_proj")
        assert not is_kept(tmp_path / "out", f"{prefix}.layers.0.self_attn.o_proj")


def test_excluded_stacks_that_vllm_does_not_know_are_kept_one_weight_an_expert(tmp_path):
    stacks, separate = ungated()
    source = save_model(tmp_path / "in", BESIDE | stacks, model_type="nemotron_h", **SIZES)
    options = [
        "--format",
        "compressed-tensors",
        "--group_size",
        64,
        "--exclude",
        r"experts\.(up|down)_proj$",
    ]
    plan = quantize(source, tmp_path / "out", *options, "--verify").stdout
    output = read_tensors(tmp_path / "out")
    assert all(torch.equal(output[name], weight) for name, weight in separate.items())
    assert "transformers (5.24) leaves experts that are kept random" in plan


GATED, UNGATED = gated()[0], ungated()[0]
GRANITE = {
    f"model.layers.0.block_sparse_moe.{name}.weight": stack
    for name, stack in zip(("input_linear", "output_linear"), GATED.values())
}

UNREADABLE = {
    "undecided": (UNGATED, {"model_type": "some"}, "does not tell whether transposed"),
    "interleaved": (turned(gated)()[0], {"model_type": "gpt_oss"}, "alternate"),
    "with biases": (
        GATED | {f"{MOE}.experts.gate_up_proj_bias": random(E, 2 * INNER)},
        {"model_type": "some"},
        "have biases",
    ),
    "w13": (
        {f"{MOE}.experts.w13_weight": random(E, 2 * INNER, H)},
        {"model_type": "some"},
        "not known",
    ),
    "beside the module": (
        {"model.layers.0.experts_gate_up": random(E, H, H)},
        {"model_type": "some"},
        "not known",
    ),
    "with a quote": (
        {"model.layers.0.it's_experts.w": random(E, H, H)},
        {"model_type": "some"},
        "not known",
    ),
    "in two layers": (
        {f"model.layers.{n}.moe_w{n}": random(E, H, H) for n in (1, 12)},
        {"model_type": "a"},
        "not known",
    ),
    "by number": ({f"{MOE}.bank": random(E, INNER, H)}, {"num_local_experts": E}, "not known"),
    "2-D": (
        {"transformer.blocks.0.ffn.experts.mlp.w1": random(E * INNER, H)},
        {"model_type": "dbrx"},
        "not known",
    ),
    "alone": (
        {f"{MOE}.experts.gate_up_proj": random(E, 2 * INNER, H)},
        {"model_type": "qwen3_moe"},
        "not all",
    ),
    "without a gate": (
        {
            f"{MOE}.experts.{name}_proj": UNGATED[f"model.layers.0.mixer.experts.{name}_proj"]
            for name in ("up", "down")
        },
        {"model_type": "qwen3_moe", **SIZES},
        "not all projections",
    ),
    "of other shapes": (
        GATED | {f"{MOE}.experts.down_proj": random(E, H, 96)},
        {"model_type": "some"},
        "gated pair",
    ),
}


def advice_of(result):
    """The options that a refusal names, as a shell reads them."""
    return shlex.split(re.search(r"(--exclude .*) keeps", result.stderr)[1])


def test_the_advice_for_many_layers_is_one_pattern(tmp_path):
    stacks = {f"model.layers.{n}.moe_w": random(E, H, H) for n in (1, 12)}
    result = run_cli(save_model(tmp_path / "in", BESIDE | stacks), tmp_path / "out")
    assert advice_of(result) == ["--exclude", r"\b(\d+\.moe_w)(\.weight)?$"]


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("form", ["int4", "compressed-tensors"])
def test_a_stack_that_nothing_decides_is_refused_by_name_and_the_advice_helps(tmp_path, case, form):
    stacks, config, reason = UNREADABLE[case]
    source = save_model(tmp_path / "in", BESIDE | stacks, **config)
    options = ["--format", form, "--group_size", 64]
    result = run_cli(source, tmp_path / "out", *options)
    assert_refused(
        result, next(name for name in stacks if "bias" not in name).rpartition(".")[0], reason
    )
    quantize(source, tmp_path / "out", *options, *advice_of(result), "--verify")
    output = read_tensors(tmp_path / "out")
    assert all(torch.equal(output[name], stack) for name, stack in stacks.items())


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "gemma4_text", "qwen3_vl_moe"])
def test_stacks_that_loaders_know_only_as_stacks_are_refused_for_engines_unless_they_are_kept(
    tmp_path, model_type
):
    stacks = GRANITE if model_type.startswith("granite") else GATED
    source = save_model(tmp_path / "in", BESIDE | stacks, model_type=model_type)
    options = ["--format", "compressed-tensors", "--group_size", 64]
    result = run_cli(source, tmp_path / "out", *options)
    assert_refused(result, f"'{min(stacks)}'", model_type)
    quantize(source, tmp_path / "out", *options, *advice_of(result))
    moe = next(iter(stacks)).rpartition(".layers.")[2].split(".")[1]
    assert is_kept(tmp_path / "out", f"model.layers.0.{moe}.experts")
    assert not is_kept(tmp_path / "out", "model.layers.0.self_attn.o_proj")
    quantize(source, tmp_path / "int4", "--group_size", 64)
    assert sum(name.endswith(".qweight") for name in read_tensors(tmp_path / "int4")) == 3 * E + 2


UNKNOWN = {
    "type": ({"model_type": "some"}, "model_type 'some'"),
    "no type": ({"num_experts": E}, "no model_type in config.json"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_stacks_of_a_type_whose_loaders_are_not_known_are_refused_for_engines_with_what_helps(
    tmp_path, case
):
    config, said = UNKNOWN[case]
    stacks, separate = gated()
    source = save_model(tmp_path / "in", BESIDE | stacks, **config)
    options = ["--format", "compressed-tensors", "--group_size", 64]
    result = run_cli(source, tmp_path / "out", *options)
    assert_refused(result, f"'{min(stacks)}'", said, "model.save_pretrained()")
    quantize(source, tmp_path / "out", *options, *advice_of(result))
    saved = save_model(tmp_path / "saved", BESIDE | separate, **config)
    quantize(saved, tmp_path / "separate", *options)
    quantize(source, tmp_path / "int4", "--group_size", 64)
    assert sum(name.endswith(".qweight") for name in read_tensors(tmp_path / "int4")) == 3 * E + 2


def test_the_whole_models_type_says_more_of_experts_than_that_of_its_language_model(tmp_path):
    """Of MiniMax-M3-VL a language model alone has stacks in its files, and the whole model has none."""
    stacks, _ = gated("model.language_model.layers.0.mlp.experts")
    nested = {"text_config": {"model_type": "minimax_m3_vl_text"}}
    options = ["--format", "compressed-tensors", "--group_size", 64]
    source = save_model(tmp_path / "in", BESIDE | stacks, model_type="minimax_m3_vl", **nested)
    assert_refused(
        run_cli(source, tmp_path / "out", *options), "save it with model.save_pretrained"
    )
    alone = save_model(tmp_path / "alone", BESIDE | stacks, model_type="minimax_m3_vl_text")
    assert_refused(
        run_cli(alone, tmp_path / "out", *options), "minimax_m3_vl_text alone", "--exclude"
    )


def test_a_state_dict_whose_other_names_loaders_do_not_know_is_refused_for_engines(tmp_path):
    source = save_model(tmp_path / "in", BESIDE | GATED, model_type="deepseek_v4")
    options = ["--format", "compressed-tensors", "--group_size", 64]
    assert_refused(
        run_cli(source, tmp_path / "out", *options), "model.state_dict()", "save_pretrained"
    )
    quantize(source, tmp_path / "out", "--group_size", 64)


NO_STACKS = {
    "m.conv1d.weight": random(8, 1, 4),
    "m.audio.conv1.weight": random(8, 80, 3),
    "m.moe_conv.weight": random(8, 80, 9),
    "model.layers.0.relative_table": random(8, 16, 16),
    "model.pos_embed": random(8, 16, 16),
    "model.register": random(8, 16, 16),
}


def test_convolutions_and_tables_are_no_stacks_of_experts(tmp_path):
    plan = quantize(
        save_model(tmp_path / "in", NO_STACKS | BESIDE, num_experts=8), tmp_path / "out"
    ).stdout
    assert "stacks of experts" not in plan
    assert NO_STACKS.keys() < read_tensors(tmp_path / "out").keys()


def test_a_single_expert_is_no_count_that_tells_a_stack(tmp_path):
    tensors = BESIDE | {"model.layers.0.one_of_one": random(1, 16, 16)}
    quantize(save_model(tmp_path / "in", tensors, num_experts=1), tmp_path / "out")


COPIES = {
    "a stack and separate weights": (
        GATED | SEPARATE,
        f"{MOE}.experts.down_proj",
        f"{MOE}.experts.0.down_proj.weight",
    ),
    "a stack twice": (
        GATED | {f"{MOE}.experts.down_proj.weight": GATED[f"{MOE}.experts.down_proj"].clone()},
        f"{MOE}.experts.down_proj",
        f"{MOE}.experts.down_proj.weight",
    ),
}


@pytest.mark.parametrize("case", COPIES)
def test_experts_that_are_there_twice_are_refused_by_both_names(tmp_path, case):
    tensors, *names = COPIES[case]
    result = run_cli(
        save_model(tmp_path / "in", BESIDE | tensors, model_type="qwen3_moe"), tmp_path / "out"
    )
    assert_refused(result, "two copies", "leave one", *(f"'{name}'" for name in names))


# --- roles: embeddings, heads, routers --------------------------------------------------------------------------------

WORDS_COUNT = 512


def kept_of(folder, tensors, form, **config):
    """The modules of 2-D weights that are kept."""
    options = ["--format", form, "--group_size", 64]
    quantize(save_model(folder / "in", PROJECTION | tensors, **config), folder / "out", *options)
    return {
        name.removesuffix(".weight")
        for name in read_tensors(folder / "out")
        if name.endswith(".weight")
    }


@pytest.mark.parametrize(
    ("name", "is_embedding"),
    [
        ("model.embed_tokens.weight", True),
        ("backbone.embeddings.weight", True),
        ("transformer.wte.weight", True),
        ("bert.embeddings.word_embeddings.weight", True),
        ("wpe.weight", True),
        ("embed_out.weight", False),  # GPT-NeoX's head
        ("vision.patch_embed.proj.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_embeddings_are_known_by_the_last_part_of_their_modules_name(tmp_path, name, is_embedding):
    assert kept_of(tmp_path, {name: random(64, H)}, "int4") == (
        {name.removesuffix(".weight")} if is_embedding else set()
    )


EMBEDDINGS = [
    "shared",
    "model.shared",
    "encoder.tok",
    "transformer.word_table",
    "model.embed_tokens.0",
]
HEADS = [
    "transformer.output_layer",
    "output",
    "language_model.output",
    "model.layers.9.shared_head.head",
    "lm_heads.0",
]


@pytest.mark.parametrize(
    "config", [{"vocab_size": WORDS_COUNT}, {"text_config": {"vocab_size": WORDS_COUNT}}], ids=str
)
@pytest.mark.parametrize("name", EMBEDDINGS + HEADS)
def test_embeddings_and_heads_are_told_by_their_rows(tmp_path, name, config):
    weight = {f"{name}.weight": random(WORDS_COUNT, H)}
    assert kept_of(tmp_path / "engine", weight, "compressed-tensors", hidden_size=H, **config) == {
        name
    }
    assert kept_of(tmp_path / "int4", weight, "int4", hidden_size=H, **config) == (
        {name} - set(HEADS)
    )


@pytest.mark.parametrize(
    "name", ["decoder.block.0.layer.0.SelfAttention.relative_attention_bias", "input_embeds.1"]
)
@pytest.mark.parametrize("form", FORMATS)
def test_embeddings_of_other_things_than_words_are_kept(tmp_path, form, name):
    assert kept_of(tmp_path, {f"{name}.weight": random(32, H)}, form) == {name}


def test_an_embedding_with_a_few_rows_more_than_there_are_words_is_kept(tmp_path):
    tensors = {"decoder.tok.weight": random(WORDS_COUNT + 2, H)}
    assert kept_of(tmp_path, tensors, "int4", vocab_size=WORDS_COUNT, hidden_size=H) == {
        "decoder.tok"
    }


LINEAR = {
    "time_embed.0": {"time_embed.0.weight": random(64, H), "time_embed.0.bias": random(64)},
    "model.layers.0.mlp.shared": {"model.layers.0.mlp.shared.weight": random(64, H)},
    "model.layers.0.mlp.gate": {"model.layers.0.mlp.gate.weight": random(2 * H, H)},
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_layer_that_is_called_like_something_else_is_quantized(tmp_path, name):
    assert kept_of(tmp_path, LINEAR[name], "compressed-tensors") == set()


def test_a_head_is_told_by_the_rows_of_the_embedding_where_the_config_says_nothing(tmp_path):
    tensors = {
        "model.embed_tokens.weight": random(WORDS_COUNT, H),
        "model.unembedding.weight": random(WORDS_COUNT, H),
    }
    assert kept_of(tmp_path, tensors, "gptq") == {"model.embed_tokens", "model.unembedding"}


COINCIDENCES = [
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.self_attn.q_proj",
    "encoder.block.0.layer.1.DenseReluDense.wi",
    "model.multi_modal_projector.linear_1",
    "model.merger.mlp.0",
]


@pytest.mark.parametrize("name", COINCIDENCES)
def test_a_projection_with_as_many_rows_as_there_are_words_is_quantized(tmp_path, name):
    tensors = {
        f"{name}.weight": random(WORDS_COUNT, H),
        "model.embed_tokens.weight": random(WORDS_COUNT, H),
    }
    kept = kept_of(tmp_path, tensors, "compressed-tensors", vocab_size=WORDS_COUNT, hidden_size=H)
    assert kept == {"model.embed_tokens"}


def test_a_weight_with_as_many_rows_as_there_are_positions_is_quantized(tmp_path):
    tensors = {
        "model.embed_positions.weight": random(WORDS_COUNT, H),
        "model.aligner.weight": random(WORDS_COUNT, H),
    }
    assert kept_of(tmp_path, tensors, "int4") == {"model.embed_positions"}


def test_a_weight_of_another_width_than_the_embedding_is_no_head(tmp_path):
    tensors = {
        "model.aligner.weight": random(WORDS_COUNT, 128),
        "model.embed_tokens.weight": random(WORDS_COUNT, H),
    }
    assert kept_of(tmp_path, tensors, "compressed-tensors", vocab_size=WORDS_COUNT) == {
        "model.embed_tokens"
    }


ROUTERS = [
    "mlp.gate",
    "mlp.router.layer",
    "mlp.wg",
    "mlp.expert_selector",
    "mlp.router_proj",
    "mlp.switch.classifier",
]


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_of_every_spelling_are_kept_for_engines(tmp_path, form, name):
    experts = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": random(64, H) for e in range(8)}
    tensors = experts | {f"model.layers.0.{name}.weight": random(8, H)}
    assert kept_of(tmp_path, tensors, form) == {f"model.layers.0.{name}"}


NO_ROUTERS = [
    "self_attn.k_proj",
    "mlp.shared_experts.down_proj",
    "mlp.shared_expert.up_proj",
    "mlp.fc1_latent_proj",
]


def test_a_square_matrix_beside_as_many_experts_is_no_router(tmp_path):
    experts = {
        f"model.layers.0.mlp.experts.{e}.up_proj.weight": random(64, 128) for e in range(128)
    }
    tensors = experts | {"model.layers.0.mlp.mixer.weight": random(128, 128)}
    assert kept_of(tmp_path, tensors, "compressed-tensors") == set()


@pytest.mark.parametrize("name", NO_ROUTERS)
def test_a_projection_with_as_many_rows_as_there_are_experts_is_quantized(tmp_path, name):
    experts = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": random(64, H) for e in range(8)}
    tensors = experts | {
        f"model.layers.0.{name}.weight": random(8, H),
        "model.layers.0.mlp.gate.weight": random(8, H),
    }
    assert kept_of(tmp_path, tensors, "compressed-tensors") == {"model.layers.0.mlp.gate"}


def test_quantize_embeddings_means_those_told_by_their_rows_too(tmp_path):
    source = save_model(
        tmp_path / "in",
        PROJECTION | {"shared.weight": random(WORDS_COUNT, H)},
        vocab_size=WORDS_COUNT,
    )
    quantize(source, tmp_path / "out", "--quantize_embeddings")
    assert "shared.qweight" in read_tensors(tmp_path / "out")


def test_numbers_that_a_config_gives_in_a_list_are_read_one_by_one(tmp_path):
    names = [
        f"model.layers.0.mlp.experts.{n}.{p}.weight"
        for n in range(4)
        for p in ("gate_proj", "up_proj")
    ]
    more = {
        "moe_num_experts": [4, 4],
        "moe_intermediate_size": [128, 64],
        "hidden_size": 128,
        "vocab_size": [512],
    }
    tensors = {name: random(128, 128) for name in names} | {"model.embed.weight": random(512, 128)}
    plan = quantize(
        save_model(tmp_path / "in", tensors, **more), tmp_path / "out", "--dry_run"
    ).stdout
    assert "embeddings" in plan
    assert "MISSING" not in plan
