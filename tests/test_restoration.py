"""Restoration: what a quantized folder decodes to, under the names of the source (README: "restore** dense weights")."""

from __future__ import annotations

import json
import operator
import shlex

import pytest
import torch
from checkpoints import BESIDE, PROJECTION, gated, random, save_model
from conftest import FORMATS, assert_refused, quantize, run_cli
from folders import (
    edit_json,
    edit_shard,
    folder_bytes,
    read_config,
    read_dequantized,
    read_header,
    read_tensors,
)
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
    name, weight = next(iter(PROJECTION)), random(64, columns).float()
    quantize(
        save_model(tmp_path / "in", {name: weight}),
        tmp_path / "out",
        "--group_size",
        64,
    )
    restore(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back")[name].dtype == torch.float32
    padded = torch.nn.functional.pad(weight, (0, -columns % 64))
    codes, scales = reference_quantize(padded, 64, torch.float16)
    decoded = torch.tensor(codes) * torch.tensor(scales).repeat_interleave(64, 1)
    assert torch.equal(read_tensors(tmp_path / "back")[name], decoded[:, :columns])


MIXED_DTYPES = {
    "model.layers.0.mlp.up_proj.weight": torch.bfloat16,
    "model.layers.1.mlp.up_proj.weight": torch.bfloat16,
    "model.layers.2.mlp.up_proj.weight": torch.float16,
    "model.layers.3.mlp.up_proj.weight": torch.float32,
    "model.layers.4.mlp.up_proj.weight": torch.float64,
    "model.norm.weight": torch.float32,
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("config", [{}, {"dtype": "float16"}, {"dtype": "bfloat16"}], ids=str)
def test_every_weight_is_restored_in_the_dtype_that_it_had_whatever_the_config_names(
    tmp_path, config, form
):
    tensors = {
        name: random(*([64, 256] if "proj" in name else [64])).to(dtype)
        for name, dtype in MIXED_DTYPES.items()
    }
    quantize(save_model(tmp_path / "in", tensors, **config), tmp_path / "out", "--format", form)
    restore(tmp_path / "out", tmp_path / "back")
    restored = read_tensors(tmp_path / "back")
    assert {name: tensor.dtype for name, tensor in restored.items()} == MIXED_DTYPES
    for name, tensor in tensors.items():
        error = (restored[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert error < 0.2, name


def test_the_weights_of_a_stack_of_experts_are_restored_in_its_dtype(tmp_path):
    stacks = {name: stack.half() for name, stack in gated()[0].items()}
    quantize(save_model(tmp_path / "in", stacks | BESIDE), tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back")
    for name, tensor in read_tensors(tmp_path / "back").items():
        assert tensor.dtype == (torch.float16 if ".experts." in name else torch.bfloat16), name


def test_the_facts_name_only_the_weights_whose_dtype_is_not_that_of_most(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    metadata = read_header(tmp_path / "out" / "model-00001.safetensors")[0]["__metadata__"]
    facts = json.loads(metadata["quantize_int4_facts"])
    assert facts["dtypes"] == {"most": "BF16", "others": {}}


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


@pytest.mark.parametrize(
    "padded",
    [None, [], {"m.weight": 5}, {"m.weight": [8]}, {"m.weight": [8, 100]}, {"m.weight": [9, 200]}],
    ids=str,
)
def test_a_damaged_list_of_padded_weights_is_refused(tmp_path, padded):
    quantize(save_model(tmp_path / "in", {"m.weight": random(8, 200)}), tmp_path / "out")
    path = tmp_path / "out" / "quantize_config.json"
    edit_json(path, lambda content: content.update(padded_weights=padded))
    assert_refused(run_cli(tmp_path / "out", tmp_path / "back", "--restore"), str(path), "again")


@pytest.mark.parametrize("layout", ["int4", "compressed-tensors", "gptq"])
def test_a_folder_that_lacks_a_part_of_a_weight_is_refused(tiny, tmp_path, layout):
    quantize(tiny, tmp_path / "out", *LAYOUTS[layout])
    shard = tmp_path / "out" / "model-00001.safetensors"
    lost = next(
        name
        for name in read_header(shard)[0]
        if name.endswith("scale" if layout[0] == "c" else "scales")
    )
    edit_shard(shard, lambda tensors: tensors.pop(lost))
    edit_json(
        tmp_path / "out" / "model.safetensors.index.json",
        lambda index: index["weight_map"].pop(lost),
    )
    result = run_cli(tmp_path / "out", tmp_path / "back", "--restore")
    assert_refused(result, f"tensor {lost!r} is missing")


MATRICES = {
    "int4": ["qweight", "scales"],
    "compressed-tensors": ["weight_packed", "weight_scale"],
    "gptq": ["qweight", "scales", "qzeros"],
}
OTHER_SHAPES = {
    "exchanged": lambda tensor: tensor.T,
    "in a row": lambda tensor: tensor.flatten(),
    "of a stack": lambda tensor: tensor[None],
    "of another dtype": lambda tensor: tensor.to(torch.int64),
}


@pytest.mark.parametrize("change", OTHER_SHAPES)
@pytest.mark.parametrize("layout", MATRICES)
def test_parts_that_no_packed_weight_has_are_refused(tmp_path, layout, change):
    weights = {f"m.{number}.up_proj.weight": random(64, 256) for number in range(3)}
    out = tmp_path / "out"
    quantize(save_model(tmp_path / "in", weights), out, *LAYOUTS[layout])
    shard = out / "model-00001.safetensors"
    whole = shard.read_bytes()
    for ending in MATRICES[layout]:
        name = f"m.1.up_proj.{ending}"
        changed = {name: OTHER_SHAPES[change](read_tensors(out)[name])}
        edit_shard(shard, operator.methodcaller("update", changed))
        refused = run_cli(out, tmp_path / "back", "--restore")
        assert_refused(refused, name, "are not the parts of a weight", "copy the folder again")
        shard.write_bytes(whole)


@pytest.mark.parametrize("stated", [(0, 0), (256, 64), (64, 128), (64, 512), (-64, 256)], ids=str)
def test_a_stated_shape_that_is_not_the_weights_is_refused(tmp_path, stated):
    weights = {"m.0.up_proj.weight": random(64, 256)}
    quantize(save_model(tmp_path / "in", weights), tmp_path / "out", *LAYOUTS["compressed-tensors"])
    name = "m.0.up_proj.weight_shape"
    shard = tmp_path / "out" / "model-00001.safetensors"
    edit_shard(shard, lambda parts: parts.update({name: torch.tensor(stated)}))
    refused = run_cli(tmp_path / "out", tmp_path / "back", "--restore")
    assert_refused(refused, name, "are not the parts of a weight")


def test_a_weight_that_decodes_beyond_its_sources_dtype_is_refused_and_the_advice_helps(tmp_path):
    name = "m.0.up_proj.weight"
    weights = torch.full((8, 256), 65504.0).half()
    tensors = {name: weights, "m.0.down_proj.weight": random(8, 256).half()}
    source = save_model(tmp_path / "in", tensors)
    quantize(source, tmp_path / "out")
    refused = run_cli(tmp_path / "out", tmp_path / "back", "--restore")
    assert_refused(refused, name, "beyond F16", "convert again with --exclude")
    pattern = shlex.split(refused.stderr.partition("--exclude ")[2].rpartition(", which")[0])
    quantize(source, tmp_path / "again", "--exclude", *pattern)
    restore(tmp_path / "again", tmp_path / "back")
    assert torch.equal(read_tensors(tmp_path / "back")[name], weights)
