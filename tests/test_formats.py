"""The formats for engines: their bits, what they keep, what they say in their config files, what they refuse."""

from __future__ import annotations

import json
import re

import pytest
import torch
from checkpoints import write_sparse_checkpoint
from conftest import assert_refused, folder_bytes, quantize, read_tensors, run_cli, save_model
from reference import pack_words, reference_quantize
from small_models import assert_same_tensors
from tiny_nemotron import NANO_30B, nemotron_tensors

ENGINE_FORMATS = ["compressed-tensors", "gptq"]
SEEDED = torch.Generator().manual_seed(2)


def read_json(path):
    return json.loads(path.read_text())


def reference_words(weight, group_size, scale_dtype):
    """Words that hold code + 8, and scales, both (rows, ...)."""
    codes, scales = reference_quantize(weight, group_size, scale_dtype)
    return torch.tensor([pack_words([code + 8 for code in row]) for row in codes], dtype=torch.int32), scales


def test_golden_word_with_offset_by_hand(tmp_path):
    weight = torch.zeros(8, 32, dtype=torch.bfloat16)
    weight[0, :8] = torch.tensor([7, -7, 1, -1, 0, 3.5, 2.5, -2.5])  # codes 7 -7 1 -1 0 4 2 -2, as in test_quantization
    quantize(
        save_model(tmp_path / "in", {"m.x.weight": weight}),
        tmp_path / "out",
        "--format=gptq",
        "--group_size=32",
        "--scale=absmax",
    )
    output = read_tensors(tmp_path / "out")
    assert output["m.x.qweight"][0, 0].item() & 0xFFFFFFFF == 0x6_A_C_8_7_9_1_F
    assert (output["m.x.qweight"][1:] == 0x88888888 - (1 << 32)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [32, 128])
def test_compressed_tensors_bits_equal_the_slow_reference(tmp_path, dtype, group_size):
    weight = torch.randn(5, 384, generator=SEEDED).to(dtype)
    folder = save_model(tmp_path / "in", {"m.x.weight": weight})
    quantize(
        folder, tmp_path / "out", "--format", "compressed-tensors", "--scale", "absmax", "--group_size", group_size
    )
    output = read_tensors(tmp_path / "out")
    words, scales = reference_words(weight, group_size, dtype)  # the scale's dtype is the checkpoint's
    assert output.keys() == {"m.x.weight_packed", "m.x.weight_scale", "m.x.weight_shape"}
    assert torch.equal(output["m.x.weight_packed"], words)
    assert output["m.x.weight_scale"].dtype == dtype
    assert output["m.x.weight_scale"].tolist() == scales
    assert output["m.x.weight_shape"].dtype == torch.int64
    assert output["m.x.weight_shape"].tolist() == [5, 384]


@pytest.mark.parametrize("constants", [{}, {"TRANSPOSED_JOB_WEIGHTS": 3000, "TILE_WEIGHTS": 500}], ids=["one", "many"])
def test_gptq_bits_equal_the_slow_reference_in_one_job_and_in_many(tmp_path, constants):
    weight = torch.randn(24, 640, generator=SEEDED).bfloat16()
    folder = save_model(tmp_path / "in", {"m.x.weight": weight})
    quantize(folder, tmp_path / "out", "--format", "gptq", "--scale", "absmax", "--group_size", 64, constants=constants)
    output = read_tensors(tmp_path / "out")
    words, scales = reference_words(weight, 64, torch.float16)
    assert torch.equal(output["m.x.qweight"], words.T)
    assert output["m.x.scales"].dtype == torch.float16
    assert output["m.x.scales"].T.tolist() == scales
    assert output["m.x.qzeros"].shape == (10, 3)
    assert (output["m.x.qzeros"] == 0x77777777).all()
    assert output["m.x.g_idx"].tolist() == [column // 64 for column in range(640)]


def test_a_layers_kept_experts_are_one_ignore_entry_for_the_whole_stack(tiny, tmp_path):
    options = ["--group_size", 64, "--exclude", r"layers\.3\.mixer\.experts\."]
    result = quantize(tiny, tmp_path / "out", "--format", "compressed-tensors", *options)
    assert "transformers (5.23) leaves kept experts" in result.stdout
    ignore = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]
    assert r"re:(.*\.)?layers\.3\.mixer\.experts(\..*)?$" in ignore
    assert len(ignore) == 4  # and the head, the embeddings, all routers
    # vLLM asks for every projection that experts may have, transformers and GPTQ readers for the stack
    for name in ("experts.0.gate_proj", "experts.3.down_proj", "experts"):
        assert ignored(tmp_path / "out", f"model.layers.3.mixer.{name}")
    assert not ignored(tmp_path / "out", "model.layers.1.mixer.experts.0.gate_proj")
    assert not ignored(tmp_path / "out", "model.layers.3.mixer.shared_experts.up_proj")


@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_the_full_nemotron_inventory_plans_as_6004_quantized(tmp_path, form):
    write_sparse_checkpoint(tmp_path / "in", nemotron_tensors(NANO_30B), shards=13)
    (tmp_path / "in" / "config.json").write_text("{}")
    plan = quantize(tmp_path / "in", tmp_path / "out", "--dry_run", "--format", form, "--group_size", 64).stdout
    assert re.search(r"^quantized to 4 bits +6,004 ", plan, re.MULTILINE)
    assert re.search(r"^ *routers .* 23 ", plan, re.MULTILINE)
    assert ("use --format compressed-tensors" in plan) == (form == "gptq")


@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_config_json_gains_the_quantization_and_keeps_the_rest_in_order(tiny, tmp_path, form):
    quantize(tiny, tmp_path / "out", "--format", form, "--group_size", 64)
    before, after = read_json(tiny / "config.json"), read_json(tmp_path / "out" / "config.json")
    assert list(after.items())[:-1] == list(before.items())
    assert list(after)[-1] == "quantization_config"
    assert after["quantization_config"]["quant_method"] == form


def test_the_gptq_description_is_the_same_in_both_files(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", "--format", "gptq", "--group_size", 64)
    description = read_json(tmp_path / "out" / "quantize_config.json")
    assert description == read_json(tmp_path / "out" / "config.json")["quantization_config"]
    expected = {"bits": 4, "group_size": 64, "desc_act": False, "sym": True, "lm_head": False}
    assert description | expected == description
    assert description["checkpoint_format"] == "gptq"


def test_compressed_tensors_writes_no_file_of_another_format(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", "--format", "compressed-tensors", "--group_size", 64)
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def ignored(folder, name):
    """Whether the folder's config keeps the module `name`, as compressed-tensors matches names."""
    entries = read_json(folder / "config.json")["quantization_config"]["ignore"]
    return any(re.match(e.removeprefix("re:"), name) if e.startswith("re:") else e == name for e in entries)


def test_ignore_names_exactly_the_linear_layers_that_are_kept(tiny, tmp_path):
    patterns = ["--exclude", r"layers\.2\.mixer\.[qkv]_proj", "--exclude", r"layers\.1\.mixer\.shared_experts"]
    quantize(tiny, tmp_path / "out", "--format", "compressed-tensors", "--group_size", 64, *patterns)
    output = read_tensors(tmp_path / "out")
    linear = {name.removesuffix(".weight") for name, tensor in read_tensors(tiny).items() if tensor.dim() == 2}
    kept = {module for module in linear if f"{module}.weight" in output}
    assert len(kept) == 2 + 2 + 3 + 2  # head and embeddings, routers, projections, shared experts
    assert {module for module in linear if ignored(tmp_path / "out", module)} == kept
    # transformers loads "backbone." as "model."
    renamed = {module.replace("backbone.", "model.") for module in linear}
    assert sum(ignored(tmp_path / "out", module) for module in renamed) == len(kept)


def test_routers_of_all_layers_are_one_pattern(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", "--format", "gptq", "--group_size", 64)
    description = read_json(tmp_path / "out" / "quantize_config.json")
    assert description["dynamic"] == {
        r"-:(.*\.)?embeddings$": {},
        r"-:(.*\.)?layers\.\d+\.mixer\.gate$": {},
    }


def test_an_ignore_entry_never_matches_a_layer_that_is_quantized(tmp_path):
    """`3.attn` is not to be taken for `13.attn`, nor a short name for the end of a longer one."""
    tensors = {f"layers.{i}.attn.{p}_proj.weight": torch.ones(8, 128) for i in range(14) for p in "qkv"}
    folder = save_model(tmp_path / "in", tensors | {"model.proj.weight": torch.ones(8, 128)})
    patterns = ["--exclude", r"^layers\.3\.", "--exclude", r"^model\.proj"]
    quantize(folder, tmp_path / "out", "--format", "compressed-tensors", *patterns, "--verify")
    for name in tensors:
        module = name.removesuffix(".weight")
        assert ignored(tmp_path / "out", module) == module.startswith("layers.3.")
    assert ignored(tmp_path / "out", "model.proj")


def test_stacked_experts_that_stay_are_ignored(tmp_path):
    stack, weight = torch.ones(4, 64, 128), torch.ones(8, 128)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": stack, "model.layers.0.mlp.x_proj.weight": weight}
    folder = save_model(tmp_path / "in", tensors)
    quantize(folder, tmp_path / "out", "--format", "compressed-tensors", "--exclude", "experts")
    assert ignored(tmp_path / "out", "model.layers.0.mlp.experts")
    assert not ignored(tmp_path / "out", "model.layers.0.mlp.x_proj")


ROUTERS_AND_HEADS = ["m.gate", "m.router", "m.shared_expert_gate", "m.router.layer", "m.gate.wg", "lm_head", "score"]
LINEAR = ["m.gate_proj", "m.up_proj", "m.attention.output.dense", "m.gate_up_proj", "m.c_proj"]


@pytest.mark.parametrize("form", ["int4", *ENGINE_FORMATS])
def test_engine_formats_keep_heads_and_routers_and_int4_does_not(tmp_path, form):
    tensors = {f"{module}.weight": torch.ones(8, 128) for module in [*ROUTERS_AND_HEADS, *LINEAR]}
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out", "--format", form)
    kept = {name.removesuffix(".weight") for name in read_tensors(tmp_path / "out") if name.endswith(".weight")}
    assert kept == (set() if form == "int4" else set(ROUTERS_AND_HEADS))


# --- refusals -------------------------------------------------------------------------------------------------------


def refuse(folder, tmp_path, form, *fragments, options=()):
    assert_refused(run_cli(folder, tmp_path / "out", "--format", form, *options), *fragments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_columns_that_the_group_does_not_divide_are_refused_with_the_size_that_does(tiny, tmp_path, form):
    words = ("8 weights", "--group_size 128", "down_proj.weight' (", ", 192)", "--group_size 64 divides all")
    refuse(tiny, tmp_path, form, *words, options=["--group_size", 128])


@pytest.mark.parametrize(("columns", "expected"), [(256, 128), (192, 64), (224, 32)])
@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_without_a_group_size_the_largest_that_divides_all_is_taken_and_named(tmp_path, form, columns, expected):
    weights = {"m.x.weight": torch.randn(8, 256).bfloat16(), "m.y.weight": torch.randn(8, columns).bfloat16()}
    source = save_model(tmp_path / "in", weights)
    result = quantize(source, tmp_path / "out", "--format", form, "--verify")
    assert f"groups of {expected}: the largest of 128, 64 and 32 that divides all columns" in result.stdout
    quantize(source, tmp_path / "named", "--format", form, "--group_size", expected)
    assert_same_tensors(tmp_path / "out", tmp_path / "named")


def test_narrow_experts_get_the_size_that_fits_them_instead_of_a_refusal(tmp_path):
    experts = {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": torch.randn(shape).bfloat16()
        for e in range(4)
        for name, shape in (("gate_proj", (64, 256)), ("up_proj", (64, 256)), ("down_proj", (256, 64)))
    }
    result = quantize(save_model(tmp_path / "in", experts), tmp_path / "out", "--format", "compressed-tensors")
    assert "groups of 64: the largest" in result.stdout


def test_columns_that_no_size_divides_are_refused_with_exclude(tmp_path):
    folder = save_model(tmp_path / "in", {"m.x.weight": torch.ones(8, 4304 // 8)})
    refuse(folder, tmp_path, "compressed-tensors", "1 weights", "none of 128, 64, 32 divides all: --exclude them")


@pytest.mark.parametrize("group_size", [8, 16, 256])
@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_group_sizes_that_marlin_lacks_are_refused(tiny, tmp_path, form, group_size):
    refuse(tiny, tmp_path, form, "32, 64 and 128", options=["--group_size", group_size])


def test_rows_that_gptq_cannot_hold_are_refused(tmp_path):
    folder = save_model(tmp_path / "in", {"m.x.weight": torch.ones(12, 128)})
    refuse(folder, tmp_path, "gptq", "'m.x.weight' (12, ", "multiple of 8")
    quantize(folder, tmp_path / "out", "--format", "compressed-tensors", "--scale", "absmax")


@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_a_missing_config_json_is_refused(tmp_path, form):
    folder = save_model(tmp_path / "in", {"m.x.weight": torch.ones(8, 128)})
    (folder / "config.json").unlink()
    refuse(folder, tmp_path, form, "config.json is missing")


@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_packed_embeddings_are_refused(tiny, tmp_path, form):
    refuse(tiny, tmp_path, form, "--quantize_embeddings", options=["--quantize_embeddings", "--group_size=64"])


@pytest.mark.parametrize(
    ("pattern", "whole"),
    [("layers.2.mixer.k_proj", "q_proj,k_proj,v_proj"), (r"experts\.0\.up_proj", "all experts of")],
)
@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_an_exclude_that_splits_what_engines_fuse_is_refused(tiny, tmp_path, form, pattern, whole):
    refuse(tiny, tmp_path, form, whole, "all of them or none", options=["--group_size=64", "--exclude", pattern])


def test_an_exclude_that_splits_gate_and_up_is_refused(tmp_path):
    tensors = {f"model.layers.0.mlp.{part}_proj.weight": torch.ones(8, 128) for part in ("gate", "up", "down")}
    folder = save_model(tmp_path / "in", tensors)
    refuse(folder, tmp_path, "gptq", "{gate_proj,up_proj}", options=["--exclude", "up_proj"])
    quantize(folder, tmp_path / "out", "--format", "gptq", "--exclude", "gate_proj|up_proj")


def test_another_format_in_the_same_folder_needs_overwrite_and_leaves_nothing_of_the_first(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", "--format", "gptq", "--group_size", 64)
    options = ["--format", "compressed-tensors", "--group_size", 64]
    assert_refused(run_cli(tiny, tmp_path / "out", *options), "--overwrite")
    quantize(tiny, tmp_path / "out", *options, "--overwrite")
    quantize(tiny, tmp_path / "expected", *options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")
