"""Formats, --int8: what is packed in 8 bits, alone or beside 4 (README: "Eight bits where they count")."""

from __future__ import annotations

import re

import pytest
import torch
from checkpoints import BESIDE, MOE, SEPARATE, E, gated, random, save_model
from conftest import ROOT, assert_refused, quantize, refuse, run_cli
from folders import (
    assert_same_tensors,
    changed_tensors,
    edit_shard,
    folder_bytes,
    is_kept,
    read_config,
    read_tensors,
)

ATTENTION = "model.layers.0.self_attn"
MODEL = {f"{ATTENTION}.{p}_proj.weight": random(64, 256) for p in "qkvo"} | {
    "model.layers.0.mlp.up_proj.weight": random(64, 192),
    "model.layers.0.mlp.gate_proj.weight": random(64, 192),
}
ENGINE = ["--format", "compressed-tensors", "--group_size", 64, "--scale", "absmax"]


def reference_int8(weight, group_size, dtype):
    """Codes and scales, one value at a time: scale = max|w| / 127 as its dtype holds it, half to even."""
    groups = weight.double().unflatten(1, (-1, group_size))
    scales = (groups.abs().amax(2).float() / 127).to(dtype)
    codes = (groups.float() / scales.float().unsqueeze(2)).round().clamp(-128, 127)
    return codes.flatten(1).to(torch.int64), scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "constants", [{}, {"TILE_WEIGHTS": 500, "JOB_WEIGHTS": 1500}], ids=["one tile", "many tiles"]
)
def test_four_codes_plus_128_lie_in_a_word_the_first_in_the_lowest_byte(tmp_path, dtype, constants):
    tensors = {name: weight.to(dtype) for name, weight in MODEL.items()}
    source = save_model(tmp_path / "in", tensors)
    quantize(
        source, tmp_path / "out", *ENGINE, "--int8", "self_attn", "--verify", constants=constants
    )
    output = read_tensors(tmp_path / "out")
    for name in (name for name in MODEL if "self_attn" in name):
        module = name.removesuffix(".weight")
        codes, scales = reference_int8(tensors[name], 128, dtype)
        words = (codes + 128).unflatten(1, (-1, 4)) * torch.tensor([1, 1 << 8, 1 << 16, 1 << 24])
        stored = output[f"{module}.weight_packed"].to(torch.int64) % (1 << 32)
        assert torch.equal(stored, words.sum(2))
        assert torch.equal(output[f"{module}.weight_scale"], scales)
        assert output[f"{module}.weight_shape"].tolist() == list(tensors[name].shape)


def test_zeros_are_zeros_and_a_group_of_subnormals_too(tmp_path):
    weight = random(64, 256)
    weight[0], weight[1] = 0, 1e-40
    source = save_model(
        tmp_path / "in", {f"{ATTENTION}.o_proj.weight": weight} | {"m.weight": random(64, 64)}
    )
    quantize(source, tmp_path / "out", *ENGINE, "--int8", "o_proj", "--verify")
    assert (
        read_tensors(tmp_path / "out")[f"{ATTENTION}.o_proj.weight_packed"][0] == -0x7F7F7F80
    ).all()


@pytest.mark.parametrize(("columns", "group_size"), [(256, 128), (192, 64)])
def test_groups_have_128_columns_where_that_fits_and_else_what_was_asked_for(
    tmp_path, columns, group_size
):
    tensors = MODEL | {f"{ATTENTION}.o_proj.weight": random(64, columns)}
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out", *ENGINE, "--int8", "o_proj")
    scales = read_tensors(tmp_path / "out")[f"{ATTENTION}.o_proj.weight_scale"]
    assert scales.shape == (64, columns // group_size)


def test_all_of_a_layers_experts_have_groups_of_one_size(tmp_path):
    experts = {f"{MOE}.experts.{e}.up_proj.weight": random(64, 256) for e in range(E)}
    experts |= {f"{MOE}.experts.{e}.down_proj.weight": random(256, 64) for e in range(E)}
    quantize(
        save_model(tmp_path / "in", BESIDE | experts),
        tmp_path / "out",
        *ENGINE,
        "--int8",
        r"\.experts\.",
        "--verify",
    )
    scales = {
        name: tensor
        for name, tensor in read_tensors(tmp_path / "out").items()
        if name.endswith("weight_scale")
    }
    assert scales[f"{MOE}.experts.0.up_proj.weight_scale"].shape == (64, 4)


def groups_of(folder):
    """Targets, bits and group size of config.json's groups, in their order."""
    groups = read_config(folder)["quantization_config"]["config_groups"].values()
    return [(g["targets"], g["weights"]["num_bits"], g["weights"]["group_size"]) for g in groups]


def test_config_json_has_the_4_bit_group_first_and_names_what_has_8(tmp_path):
    quantize(
        save_model(tmp_path / "in", BESIDE | SEPARATE | MODEL),
        tmp_path / "out",
        *ENGINE,
        "--int8",
        "self_attn",
    )
    four, eight = groups_of(tmp_path / "out")
    assert four == (["Linear", r"re:(.*\.)?experts\.\d+\..*$"], 4, 64)
    assert eight[1:] == (8, 128)
    for wrapper in ("model.", "model.language_model.", "language_model.model."):
        for projection in "qkvo":
            name = f"{wrapper}layers.0.self_attn.{projection}_proj"
            assert any(re.match(target[3:], name) for target in eight[0])
        assert not any(
            re.match(target[3:], f"{wrapper}layers.0.mlp.up_proj") for target in eight[0]
        )


def test_a_folder_of_8_bits_alone_has_one_group(tmp_path):
    source = save_model(
        tmp_path / "in", {name: weight for name, weight in MODEL.items() if "self_attn" in name}
    )
    quantize(source, tmp_path / "out", *ENGINE, "--int8", ".", "--verify")
    assert groups_of(tmp_path / "out") == [(["Linear"], 8, 128)]


def test_stacked_experts_are_named_as_in_the_file_or_one_by_one(tmp_path):
    source = save_model(tmp_path / "in", BESIDE | gated()[0], model_type="qwen3_moe")
    for pattern, folder in ((r"experts\.(gate_up|down)_proj", "a"), (r"experts\.\d+\.", "b")):
        plan = quantize(source, tmp_path / folder, *ENGINE, "--int8", pattern, "--verify").stdout
        assert re.search(rf"quantized to 8 bits, by 128 +{3 * E} ", plan)
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_searched_scales_are_for_4_bits_and_8_bits_keep_their_largest(tmp_path):
    source = save_model(tmp_path / "in", MODEL)
    quantize(source, tmp_path / "out", *ENGINE, "--int8", "self_attn", "--scale", "mse", "--verify")
    quantize(source, tmp_path / "plain", *ENGINE, "--int8", "self_attn")
    changed = changed_tensors(tmp_path / "out", tmp_path / "plain")
    assert changed
    assert all("mlp" in name for name in changed)


def test_the_plan_and_verification_list_8_bit_weights_apart(tmp_path):
    result = quantize(
        save_model(tmp_path / "in", MODEL),
        tmp_path / "out",
        *ENGINE,
        "--int8",
        "self_attn",
        "--verify",
    )
    assert re.search(
        r"quantized to 4 bits +2 (.*\n)+quantized to 8 bits, by 128 +4 .*become", result.stdout
    )
    assert "Note:      two widths: " in result.stdout
    assert re.search(r"attention, 8 bits +4 +0\.00", result.stdout)
    assert re.search(r"MLP +2 +0\.1", result.stdout)


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "nothing": (["--int8", "zzz"], "--int8 zzz matches none"),
    "only kept": (
        ["--int8", "embed_tokens"],
        "--int8 embed_tokens matches only tensors that are kept",
    ),
    "excluded": (["--int8", "o_proj", "--exclude", "o_proj"], "matches only tensors that are kept"),
    "half of q, k, v": (["--int8", "q_proj"], "engines fuse"),
    "8 bits and kept": (["--int8", "q_proj|k_proj", "--exclude", "v_proj"], "engines fuse"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pattern_that_cannot_be_followed_is_refused(tmp_path, case):
    options, words = REFUSED[case]
    source = save_model(tmp_path / "in", MODEL | {"model.embed_tokens.weight": random(96, 256)})
    assert_refused(run_cli(source, tmp_path / "out", *ENGINE, *options), words)


def test_half_of_a_layers_experts_is_refused(tmp_path):
    source = save_model(tmp_path / "in", BESIDE | SEPARATE)
    result = run_cli(source, tmp_path / "out", *ENGINE, "--int8", r"experts\.\d+\.down_proj")
    assert_refused(result, "all experts of", "gets 8 bits", "gets 4 bits")


@pytest.mark.parametrize("form", ["int4", "gptq"])
def test_formats_without_a_second_width_refuse_it(tmp_path, form):
    result = run_cli(
        save_model(tmp_path / "in", MODEL), tmp_path / "out", "--format", form, "--int8", "o_proj"
    )
    assert_refused(result, "--int8 is not for ", form, "--format compressed-tensors")


def test_a_value_that_is_not_finite_is_refused_by_its_place(tmp_path):
    weight = random(64, 256)
    weight[3, 200] = float("inf")
    source = save_model(tmp_path / "in", MODEL | {f"{ATTENTION}.o_proj.weight": weight})
    assert_refused(
        run_cli(source, tmp_path / "out", *ENGINE, "--int8", "o_proj"),
        "o_proj",
        "row 3, column 200",
    )


# --- resume, verify ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_writes_the_same_bytes_and_another_pattern_is_another_run(tmp_path):
    source = save_model(tmp_path / "in", MODEL)
    options = [*ENGINE, "--int8", "self_attn", "--shard_size_gb", 4e-5]
    quantize(source, tmp_path / "whole", *options)
    quantize(source, tmp_path / "out", *options)
    for name in ("model.safetensors.index.json", "model-00002.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert_refused(run_cli(source, tmp_path / "out", *ENGINE, "--int8", "o_proj"), "--overwrite")
    quantize(source, tmp_path / "out", *options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def change_code(tensors):
    tensors[f"{ATTENTION}.o_proj.weight_packed"][5, 7] ^= 0x400000


def change_scale(tensors):
    tensors[f"{ATTENTION}.o_proj.weight_scale"][5, 1] *= 2


CHANGES = {
    change_code: "o_proj.weight': row 5, column 30",
    change_scale: "o_proj.weight': row 5, column ",
}


@pytest.mark.parametrize("scale", ["absmax", "mse"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_verify_finds_what_is_wrong_with_8_bit_weights(tmp_path, change, scale):
    source = save_model(tmp_path / "in", MODEL)
    quantize(source, tmp_path / "out", *ENGINE, "--int8", "self_attn", "--scale", scale)
    edit_shard(tmp_path / "out" / "model-00001.safetensors", change)
    result = run_cli(source, tmp_path / "out", "--verify")
    assert result.returncode == 1
    assert CHANGES[change] in result.stdout


# --- README's recipes -------------------------------------------------------------------------------------------------

# Those for the flagship, which has no tower.
RECIPES = re.findall(r"--int8 '((?!visual).*?)'", (ROOT / "README.md").read_text())
EXPECTED = [
    ("6,004", "1", "18,253", "17.5 GB"),
    ("5,888", "117", "18,253", "18.2 GB"),
    ("5,968", "36", "18,251", "18.0 GB"),
]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    list(zip(RECIPES, EXPECTED, strict=True)),
    ids=["head", "not experts", "attention"],
)
def test_a_recipe_of_the_readme_gives_the_size_it_names(inventory, tmp_path, recipe, expected):
    options = ["--format", "compressed-tensors", "--int8", recipe, "--dry_run"]
    plan = quantize(inventory, tmp_path / "out", *options).stdout
    four, eight, tensors, size = expected
    assert re.search(
        rf"quantized to 4 bits +{four} (.*\n)+quantized to 8 bits, by 128 +{eight} ", plan
    )
    assert re.search(rf"^output +{tensors} +{size} ", plan, re.MULTILINE)
    assert size in (ROOT / "README.md").read_text()


def test_8_bits_for_the_experts_of_one_layer_alone_are_refused(tiny, tmp_path):
    options = ["--format", "compressed-tensors", "--int8", r"layers\.1\.mixer\.experts"]
    result = run_cli(tiny, tmp_path / "out", *options)
    assert_refused(
        result, "gets 8 bits while 'backbone.layers.3.mixer.experts", "--int8 all of them or none"
    )
    quantize(
        tiny,
        tmp_path / "out",
        "--format",
        "compressed-tensors",
        "--int8",
        r"mixer\.experts",
        "--verify",
    )


# --- the head ---------------------------------------------------------------------------------------------------------

HEAD = {
    "model.embed_tokens.weight": random(320, 256),
    "model.layers.0.mlp.up_proj.weight": random(64, 256),
    "lm_head.weight": random(320, 256),
}


def description_of(folder):
    return read_config(folder)["quantization_config"]


@pytest.mark.parametrize("pattern", ["lm_head", "."])
def test_a_head_in_8_bits_is_named_in_its_group_and_not_kept(tmp_path, pattern):
    """`Linear` alone is not enough for vLLM, and an entry that kept it leaves it random in transformers."""
    source = save_model(tmp_path / "in", HEAD, vocab_size=320, hidden_size=256)
    result = quantize(source, tmp_path / "out", *ENGINE, "--int8", pattern, "--verify")
    assert "a head in 8 bits needs vLLM 0.20, for NemotronH 0.23" in result.stdout
    assert "lm_head.weight_packed" in read_tensors(tmp_path / "out")
    description = description_of(tmp_path / "out")
    (group,) = (g for g in description["config_groups"].values() if g["weights"]["num_bits"] == 8)
    assert r"re:(.*\.)?lm_head$" in group["targets"]
    assert not is_kept(tmp_path / "out", "lm_head")
    assert is_kept(tmp_path / "out", "model.embed_tokens")


def test_a_head_is_never_packed_in_4_bits_for_engines(tmp_path):
    source = save_model(tmp_path / "in", HEAD, vocab_size=320, hidden_size=256)
    quantize(source, tmp_path / "out", *ENGINE, "--int8", "up_proj")
    assert "lm_head.weight" in read_tensors(tmp_path / "out")
    assert is_kept(tmp_path / "out", "lm_head")


def test_a_head_of_another_name_is_kept(tmp_path):
    model = {name.replace("lm_head", "output_layer"): tensor for name, tensor in HEAD.items()}
    source = save_model(tmp_path / "in", model, vocab_size=320, hidden_size=256)
    quantize(source, tmp_path / "out", *ENGINE, "--int8", ".")
    assert "output_layer.weight" in read_tensors(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"tie_word_embeddings": True}, "ties the head to the embedding"),
        ({"model_type": "qwen3_next"}, "qwen3_next in full precision alone"),
    ],
)
def test_a_packed_head_that_no_engine_would_read_is_refused(tmp_path, config, reason):
    source = save_model(tmp_path / "in", HEAD, vocab_size=320, hidden_size=256, **config)
    refuse(source, tmp_path / "out", "lm_head.weight", reason, options=[*ENGINE, "--int8", "."])
    quantize(source, tmp_path / "out", *ENGINE, "--int8", "up_proj")


def test_a_tied_head_has_no_weight_to_pack(tmp_path):
    model = {name: tensor for name, tensor in HEAD.items() if name != "lm_head.weight"}
    source = save_model(tmp_path / "in", model, tie_word_embeddings=True)
    refuse(
        source, tmp_path / "out", "ties to the embedding", options=[*ENGINE, "--int8", "lm_head"]
    )


# --- bytes a token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "total", "head"),
    [
        ([], "2.25 GB", "705 MB"),
        (["--int8", "lm_head"], "1.90 GB", "358 MB"),
        (["--int8", r"^(?!.*\.experts\.)"], "2.62 GB", "358 MB"),
    ],
)
def test_the_plan_says_what_a_token_reads_of_the_flagship(
    inventory, tmp_path, options, total, head
):
    options = ["--format", "compressed-tensors", *options, "--dry_run"]
    plan = quantize(inventory, tmp_path / "out", *options).stdout
    assert f"A token:   reads {total} of weights, {head} of it the head" in plan
    assert total in (ROOT / "README.md").read_text()


def test_a_tied_head_is_the_embedding_and_another_embedding_is_not_read(tmp_path):
    model = HEAD | {"model.embed_positions.weight": random(512, 256)}
    del model["lm_head.weight"]
    config = {"vocab_size": 320, "hidden_size": 256, "tie_word_embeddings": True}
    source = save_model(tmp_path / "in", model, architectures=["XForCausalLM"], **config)
    plan = quantize(source, tmp_path / "out", *ENGINE, "--dry_run").stdout
    # The embedding of 320 words in bf16; and 64 rows of 256 codes and 4 scales, and their shape.
    assert f"reads {(320 * 512 + 64 * (128 + 8) + 16) / 1000:.0f} kB of weights, 164 kB" in plan


def test_a_scalar_beside_a_tied_head_has_no_columns_to_ask_for(tmp_path):
    model = HEAD | {"encoder.norm.num_batches_tracked": torch.tensor(3)}
    del model["lm_head.weight"]
    config = {"vocab_size": 320, "hidden_size": 256, "tie_word_embeddings": True}
    source = save_model(tmp_path / "in", model, **config)
    assert "A token:" in quantize(source, tmp_path / "out", *ENGINE, "--dry_run").stdout


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("model.layers.0.mlp.experts.0.up_proj.weight", {"num_experts": 4}),
        ("model.decoder.layers.0.fc1.weight", {"is_encoder_decoder": True}),
    ],
)
def test_nothing_is_said_of_a_token_where_config_does_not_tell(tmp_path, name, config):
    model = HEAD | {name: random(64, 256)}
    source = save_model(tmp_path / "in", model, vocab_size=320, hidden_size=256, **config)
    plan = quantize(source, tmp_path / "out", "--dry_run").stdout
    assert "A token:" not in plan
