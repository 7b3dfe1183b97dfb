"""Formats: tensors, scales, config files, sizes they cannot hold (README: "Layouts")."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from checkpoints import LAYER, PROJECTION, SEEDED, random, save_model
from conftest import ENGINE_FORMATS, assert_refused, quantize, refuse, run_cli
from folders import assert_same_tensors, read_json, read_tensors
from reference import pack_words, reference_quantize, reference_words

import quantize_int4 as q

# --- tensors ----------------------------------------------------------------------------------------------------------


def test_names_shapes_and_dtypes_are_those_of_the_layout(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    output = read_tensors(tmp_path / "out")
    down = "backbone.layers.1.mixer.experts.0.down_proj"  # 256 x 192, padded to 256 columns
    assert (output[f"{down}.qweight"].dtype, output[f"{down}.qweight"].shape) == (
        torch.int32,
        (256, 32),
    )
    assert (output[f"{down}.scales"].dtype, output[f"{down}.scales"].shape) == (
        torch.float16,
        (256, 2),
    )
    assert f"{down}.weight" not in output
    up = "backbone.layers.1.mixer.experts.0.up_proj"
    assert (output[f"{up}.qweight"].shape, output[f"{up}.scales"].shape) == ((192, 32), (192, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [32, 128])
def test_compressed_tensors_bits_equal_the_slow_reference(tmp_path, dtype, group_size):
    weight = torch.randn(5, 384, generator=SEEDED).to(dtype)
    folder = save_model(tmp_path / "in", {"m.x.weight": weight})
    quantize(
        folder,
        tmp_path / "out",
        "--format",
        "compressed-tensors",
        "--scale",
        "absmax",
        "--group_size",
        group_size,
    )
    output = read_tensors(tmp_path / "out")
    words, scales = reference_words(
        weight, group_size, dtype
    )  # the scale's dtype is the checkpoint's
    assert output.keys() == {"m.x.weight_packed", "m.x.weight_scale", "m.x.weight_shape"}
    assert torch.equal(output["m.x.weight_packed"], words)
    assert output["m.x.weight_scale"].dtype == dtype
    assert output["m.x.weight_scale"].tolist() == scales
    assert output["m.x.weight_shape"].dtype == torch.int64
    assert output["m.x.weight_shape"].tolist() == [5, 384]


@pytest.mark.parametrize(
    "constants", [{}, {"TRANSPOSED_JOB_WEIGHTS": 3000, "TILE_WEIGHTS": 500}], ids=["one", "many"]
)
def test_gptq_bits_equal_the_slow_reference_in_one_job_and_in_many(tmp_path, constants):
    weight = random(24, 640)
    folder = save_model(tmp_path / "in", {"m.x.weight": weight})
    quantize(
        folder,
        tmp_path / "out",
        "--format",
        "gptq",
        "--scale",
        "absmax",
        "--group_size",
        64,
        constants=constants,
    )
    output = read_tensors(tmp_path / "out")
    words, scales = reference_words(weight, 64, torch.float16)
    assert torch.equal(output["m.x.qweight"], words.T)
    assert output["m.x.scales"].dtype == torch.float16
    assert output["m.x.scales"].T.tolist() == scales
    assert output["m.x.qzeros"].shape == (10, 3)
    assert (output["m.x.qzeros"] == 0x77777777).all()
    assert output["m.x.qzeros"].dtype == output["m.x.g_idx"].dtype == torch.int32
    assert output["m.x.g_idx"].tolist() == [column // 64 for column in range(640)]


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({}, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_scales_are_rounded_to_what_engines_compute_in_before_the_codes_are_made(
    tmp_path, config, stored, scale
):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(11))
    source = save_model(tmp_path / "in", {f"{LAYER}.weight": weight}, **config)
    quantize(
        source,
        tmp_path / "out",
        "--format",
        "compressed-tensors",
        "--group_size",
        64,
        "--scale",
        scale,
        "--verify",
    )
    output = read_tensors(tmp_path / "out")
    assert output[f"{LAYER}.weight_scale"].dtype == stored
    if scale == "absmax":
        codes, scales = reference_quantize(weight, 64, stored)
        assert output[f"{LAYER}.weight_scale"].tolist() == scales
        words = torch.tensor(
            [pack_words([code + 8 for code in row]) for row in codes], dtype=torch.int32
        )
        assert torch.equal(output[f"{LAYER}.weight_packed"], words)


# --- config files -----------------------------------------------------------------------------------------------------


def test_quantize_config_describes_the_layout_and_lists_padded_weights_with_their_true_shape(
    tiny, tmp_path
):
    quantize(tiny, tmp_path / "out")
    config = read_json(tmp_path / "out" / "quantize_config.json")
    assert (config["format"], config["bits"], config["group_size"], config["symmetric"]) == (
        "int4",
        4,
        128,
        True,
    )
    assert "gptq" not in json.dumps(config).lower()
    padded = {
        f"backbone.layers.{i}.mixer.experts.{j}.down_proj.weight": [256, 192]
        for i in (1, 3)
        for j in range(4)
    }
    assert config["padded_weights"] == padded
    assert config["quantized_weights"] == 29
    kept = read_tensors(tmp_path / "out").keys() & read_tensors(tiny).keys()
    assert sorted(config["kept_weights"]) == sorted(kept)


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


def test_int4_without_a_config_json_writes_none(tmp_path):
    source = save_model(tmp_path / "in", PROJECTION)
    (source / "config.json").unlink()
    quantize(source, tmp_path / "out", "--verify")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_a_missing_config_json_is_refused(tmp_path, form):
    folder = save_model(tmp_path / "in", {"m.x.weight": torch.ones(8, 128)})
    (folder / "config.json").unlink()
    refuse(folder, tmp_path / "out", "config.json is missing", options=["--format", form])


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "expected"), [(256, 128), (192, 64), (224, 32)])
@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_without_a_group_size_the_largest_that_divides_all_is_taken_and_one_that_is_less_named(
    tmp_path, form, columns, expected
):
    weights = {
        "m.x.weight": torch.randn(8, 256).bfloat16(),
        "m.y.weight": torch.randn(8, columns).bfloat16(),
    }
    source = save_model(tmp_path / "in", weights)
    result = quantize(source, tmp_path / "out", "--format", form, "--verify")
    note = f"groups of {expected}: the largest of 128, 64 and 32 that divides all columns"
    assert (note in result.stdout) == (expected < 128)
    assert f"How:       groups of {expected}, " in result.stdout
    quantize(source, tmp_path / "named", "--format", form, "--group_size", expected)
    assert_same_tensors(tmp_path / "out", tmp_path / "named")


def test_narrow_experts_get_the_size_that_fits_them_instead_of_a_refusal(tmp_path):
    experts = {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": torch.randn(shape).bfloat16()
        for e in range(4)
        for name, shape in (
            ("gate_proj", (64, 256)),
            ("up_proj", (64, 256)),
            ("down_proj", (256, 64)),
        )
    }
    result = quantize(
        save_model(tmp_path / "in", experts), tmp_path / "out", "--format", "compressed-tensors"
    )
    assert "groups of 64: the largest" in result.stdout


@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_columns_that_the_group_does_not_divide_are_refused_with_the_size_that_does(
    tiny, tmp_path, form
):
    words = (
        "8 weights",
        "--group_size 128",
        "down_proj.weight' (",
        ", 192)",
        "--group_size 64 divides all",
    )
    refuse(tiny, tmp_path / "out", *words, options=["--format", form, "--group_size", 128])


def test_columns_that_no_size_divides_are_refused_with_exclude(tmp_path):
    folder = save_model(tmp_path / "in", {"m.x.weight": torch.ones(8, 4304 // 8)})
    refuse(
        folder,
        tmp_path / "out",
        "1 weight with columns",
        "none of 128, 64, 32 divides all: --exclude them",
        options=["--format", "compressed-tensors"],
    )


@pytest.mark.parametrize("group_size", [8, 16, 256])
@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_group_sizes_that_marlin_lacks_are_refused(tiny, tmp_path, form, group_size):
    refuse(
        tiny,
        tmp_path / "out",
        "32, 64 and 128",
        options=["--format", form, "--group_size", group_size],
    )


def test_rows_that_gptq_cannot_hold_are_refused(tmp_path):
    folder = save_model(tmp_path / "in", {"m.x.weight": torch.ones(12, 128)})
    refuse(
        folder,
        tmp_path / "out",
        "'m.x.weight' (12, ",
        "multiple of 8",
        options=["--format", "gptq"],
    )
    quantize(folder, tmp_path / "out", "--format", "compressed-tensors", "--scale", "absmax")


@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_packed_embeddings_are_refused(tiny, tmp_path, form):
    refuse(
        tiny,
        tmp_path / "out",
        "--quantize_embeddings",
        options=["--format", form, "--quantize_embeddings", "--group_size=64"],
    )


# --- GPT-2's Conv1D ---------------------------------------------------------------------------------------------------

GPT2 = {
    "h.0.attn.c_attn.weight": random(128, 384),
    "h.0.mlp.c_fc.weight": random(128, 512),
    "wte.weight": random(96, 128),
}


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {}], ids=["by type", "by shape"])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_conv1d_is_refused_for_engines(tmp_path, form, config):
    result = run_cli(
        save_model(tmp_path / "in", GPT2, **config), tmp_path / "out", "--format", form
    )
    assert_refused(result, "2 weights of GPT-2's Conv1D", "'h.0.attn.c_attn.weight'")


def test_int4_says_along_which_axis_the_groups_of_conv1d_run(tmp_path):
    plan = quantize(save_model(tmp_path / "in", GPT2, model_type="gpt2"), tmp_path / "out").stdout
    assert "2 weights of GPT-2's Conv1D, as (in, out): groups run along the outputs" in plan


def test_a_c_attn_that_lies_as_out_in_is_no_conv1d(tmp_path):
    tensors = {"h.0.attn.c_attn.weight": random(384, 128)}
    quantize(
        save_model(tmp_path / "in", tensors, model_type="qwen"),
        tmp_path / "out",
        "--format",
        "compressed-tensors",
    )


# --- engines ----------------------------------------------------------------------------------------------------------


def plan_with_engine(monkeypatch, folder, group_size, **columns):
    """The plan for gptq when one more engine loads it."""
    row = q.Engine(name="Another", version="1.2.0", sources=(), kernels="Its", **columns)
    monkeypatch.setitem(q.ENGINES, row.name, row)
    form = replace(q.GPTQ, loaded_by=(*q.GPTQ.loaded_by, row.name))
    monkeypatch.setitem(q.FORMATS, form.name, form)
    options = q.Options("gptq", group_size, [], False, [], "mse", None, False, 4.0)
    with contextlib.closing(q.Checkpoint(folder)) as checkpoint:
        return q.plan_conversion(checkpoint, options)


def test_groups_that_one_of_the_engines_does_not_have_are_noted(monkeypatch, tmp_path):
    source = save_model(tmp_path / "in", {f"{LAYER}.weight": random(64, 192)})
    columns = {"group_sizes": (128,)}
    notes = plan_with_engine(monkeypatch, source, None, **columns).notes
    assert "Another (1.2) cannot serve groups of 64: it has 128 alone" in notes
    source = save_model(tmp_path / "wide", {f"{LAYER}.weight": random(64, 256)})
    notes = plan_with_engine(monkeypatch, source, None, **columns).notes
    assert not any("Another" in note for note in notes)


def test_groups_that_a_required_engine_does_not_have_are_neither_chosen_nor_allowed(
    monkeypatch, tmp_path
):
    source = save_model(tmp_path / "in", {f"{LAYER}.weight": random(64, 256)})
    columns = {"group_sizes": (32, 64, 256), "required": True}
    plan = plan_with_engine(monkeypatch, source, None, **columns)
    assert plan.options.group_size == 64
    assert "groups of 64: the largest of 64 and 32 that divides all columns" in plan.notes
    with pytest.raises(q.QuantizeError, match=r"kernels \(Marlin and Its\) have 32 and 64"):
        plan_with_engine(monkeypatch, source, 128, **columns)


def test_what_one_more_engine_fuses_is_refused_when_it_is_split(monkeypatch, tmp_path):
    narrow = {"model.layers.0.mlp.one.weight": random(64, 128)}
    source = save_model(tmp_path / "in", narrow | {"model.layers.0.mlp.two.weight": random(64, 8)})
    with pytest.raises(q.QuantizeError, match=r"engines fuse model\.layers\.0\.mlp\.\{one,two\}"):
        plan_with_engine(monkeypatch, source, 64, fused_layers=("one,two",))
