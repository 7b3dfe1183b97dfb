"""Restoration: what a quantized folder decodes to, under the names of the source (README: "**restore** to dense")."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import PROJECTION, random, save_model
from conftest import assert_refused, quantize, run_cli
from folders import folder_bytes, read_config, read_dequantized, read_tensors
from reference import reference_quantize
from safetensors.torch import save_file

MIXED = r"shared_experts|[qkv]_proj"
LAYOUTS = {
    "int4": ["--format", "int4"],
    "int4 with padding": ["--format", "int4", "--group_size", 56],
    "compressed-tensors": ["--format", "compressed-tensors", "--group_size", 64],
    "two widths": ["--format", "compressed-tensors", "--group_size", 64, "--int8", MIXED],
    "mse": ["--format", "compressed-tensors", "--group_size", 32, "--scale", "mse"],
    "gptq": ["--format", "gptq", "--group_size", 64],
}

SMALL = {
    "TILE_WEIGHTS": 3000,
    "JOB_WEIGHTS": 7000,
    "TRANSPOSED_JOB_WEIGHTS": 9000,
    "COPY_BYTES": 500,
}


def restore(folder, target, *options, **setting):
    return quantize(folder, target, "--restore", *options, **setting)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_shapes_dtypes_and_other_files_are_the_sources(tiny, tmp_path, layout):
    quantize(tiny, tmp_path / "out", *LAYOUTS[layout])
    restore(tmp_path / "out", tmp_path / "back")
    expected, restored = read_tensors(tiny), read_tensors(tmp_path / "back")
    assert restored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (restored[name].shape, restored[name].dtype) == (tensor.shape, tensor.dtype), name
    assert read_config(tmp_path / "back") == read_config(tiny)
    others = {
        name: data for name, data in folder_bytes(tmp_path / "back").items() if "model" not in name
    }
    source = folder_bytes(tiny)
    assert others.keys() == {name for name in source if "model" not in name}
    assert all(data == source[name] for name, data in others.items() if name != "config.json")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "int4" not in name])
@pytest.mark.parametrize("constants", [{}, SMALL], ids=["one tile", "many tiles"])
def test_every_weight_is_what_readers_decode(tiny, tmp_path, layout, constants):
    quantize(tiny, tmp_path / "out", *LAYOUTS[layout])
    restore(tmp_path / "out", tmp_path / "back", constants=constants)
    expected, packed = read_dequantized(tmp_path / "out")
    restored = read_tensors(tmp_path / "back")
    assert packed
    for name, tensor in expected.items():
        assert torch.equal(
            restored[name], tensor.to(torch.bfloat16) if name in packed else tensor
        ), name


@pytest.mark.parametrize("columns", [128, 100])
def test_int4_weights_are_their_codes_times_their_scales_without_the_padding(tmp_path, columns):
    name, weight = next(iter(PROJECTION)), random(64, columns)
    quantize(
        save_model(tmp_path / "in", {name: weight}, torch_dtype="float32"),
        tmp_path / "out",
        "--group_size",
        64,
    )
    restore(tmp_path / "out", tmp_path / "back")
    padded = torch.nn.functional.pad(weight, (0, -columns % 64))
    codes, scales = reference_quantize(padded, 64, torch.float16)
    decoded = torch.tensor(codes) * torch.tensor(scales).repeat_interleave(64, 1)
    assert torch.equal(read_tensors(tmp_path / "back")[name].float(), decoded[:, :columns])


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({}, torch.float32),
    ],
    ids=str,
)
def test_weights_are_restored_in_the_models_dtype(tmp_path, config, dtype):
    tensors = {
        name: weight.float()
        for name, weight in (PROJECTION | {"model.norm.weight": random(64)}).items()
    }
    quantize(save_model(tmp_path / "in", tensors, **config), tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back")[next(iter(PROJECTION))].dtype == dtype


def test_a_restored_checkpoint_can_be_quantized_again(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", *LAYOUTS["compressed-tensors"])
    restore(tmp_path / "out", tmp_path / "back")
    quantize(tmp_path / "back", tmp_path / "again", *LAYOUTS["compressed-tensors"], "--verify")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == read_config(
        tmp_path / "out"
    )


def test_a_resumed_restoration_writes_the_bytes_of_an_uninterrupted_one(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", *LAYOUTS["two widths"])
    options = ["--shard_size_gb", 5e-4]
    restore(tmp_path / "out", tmp_path / "whole", *options)
    restore(tmp_path / "out", tmp_path / "back", *options)
    for name in (
        "model.safetensors.index.json",
        "model-00002.safetensors",
        "model-00004.safetensors",
    ):
        (tmp_path / "back" / name).unlink()
    assert (
        "finished by an earlier run"
        in restore(tmp_path / "out", tmp_path / "back", *options).stdout
    )
    assert folder_bytes(tmp_path / "back") == folder_bytes(tmp_path / "whole")


def test_the_plan_counts_what_is_restored_and_a_dry_run_writes_nothing(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", *LAYOUTS["two widths"])
    plan = restore(tmp_path / "out", tmp_path / "back", "--dry_run").stdout
    assert "restored to dense weights" in plan
    assert "restored from 4 bits" in plan
    assert "restored from 8 bits" in plan
    assert not (tmp_path / "back").exists()


def test_a_checkpoint_that_is_not_quantized_is_refused(tiny, tmp_path):
    assert_refused(
        run_cli(tiny, tmp_path / "back", "--restore"), "no shard in it says how it was made"
    )


@pytest.mark.parametrize(
    ("missing", "problem"),
    [("marks", "no shard in it says how it was made"), ("index", "is unfinished")],
)
def test_a_folder_that_another_program_packed_or_that_is_unfinished_is_refused(
    tmp_path, missing, problem
):
    quantize(save_model(tmp_path / "in", PROJECTION), tmp_path / "out")
    if missing == "index":
        (tmp_path / "out" / "model.safetensors.index.json").unlink()
    else:  # codes of another program may mean something else
        save_file(read_tensors(tmp_path / "out"), tmp_path / "out" / "model-00001.safetensors")
    assert_refused(run_cli(tmp_path / "out", tmp_path / "back", "--restore"), problem)


def test_a_weight_beyond_the_dtype_of_the_config_is_refused_and_the_advice_helps(tmp_path):
    name = "m.0.up_proj.weight"
    source = save_model(tmp_path / "in", {name: random(8, 256) * 1e5}, dtype="float16")
    quantize(source, tmp_path / "out")
    refused = run_cli(tmp_path / "out", tmp_path / "back", "--restore")
    assert_refused(refused, name, "beyond F16", "set a wider dtype in")
    config = read_config(tmp_path / "out") | {"dtype": "bfloat16"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    restore(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back")[name].isfinite().all()
