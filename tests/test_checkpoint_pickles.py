"""Checkpoint, pickles: what safetensors would give, and ModelOpt's leftovers (README: "Pickles that would run code")."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from checkpoints import LAYER, random, save_model, save_pickle
from conftest import assert_refused, quantize, run_cli
from folders import folder_bytes, read_tensors

import quantize_int4 as q


@pytest.fixture
def state_dict():
    return {
        "m.up.weight": random(24, 256),
        "m.down.weight": random(16, 200),
        "m.norm.weight": torch.randn(16),
    }


def assert_same_as_safetensors(folder, state_dict, tmp_path, *options):
    """The folder's tensors come out as those of a safetensors checkpoint of the same state dict."""
    result = quantize(folder, tmp_path / "out", *options)
    contiguous = {name: tensor.clone().contiguous() for name, tensor in state_dict.items()}
    quantize(save_model(tmp_path / "safetensors", contiguous), tmp_path / "expected", *options)
    output, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "expected")
    assert output.keys() == expected.keys()
    for name in expected:
        assert output[name].dtype == expected[name].dtype
        assert torch.equal(output[name], expected[name]), name
    return result


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pth", "modelopt_model.0.pth", "checkpoint.pt"]
)
def test_a_single_pickle_gives_what_safetensors_give(tmp_path, state_dict, name):
    assert_same_as_safetensors(save_pickle(tmp_path / "in", state_dict, name), state_dict, tmp_path)


def test_pickle_shards_with_an_index_give_what_safetensors_give(tmp_path, state_dict):
    names, weight_map = list(state_dict), {}
    for number, name in enumerate(names):
        file = f"pytorch_model-{number + 1:05}-of-00003.bin"
        save_pickle(tmp_path / "in", {name: state_dict[name]}, file)
        weight_map[name] = file
    index = tmp_path / "in" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_as_safetensors(tmp_path / "in", state_dict, tmp_path)
    index.unlink()
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "safetensors")
    shutil.rmtree(tmp_path / "expected")
    assert_same_as_safetensors(tmp_path / "in", state_dict, tmp_path)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
def test_a_wrapped_state_dict_is_unwrapped_and_what_lay_beside_it_is_named(
    tmp_path, state_dict, wrapper
):
    content = {wrapper: OrderedDict(state_dict), "epoch": 3, "optimizer": {"state": {}}}
    result = assert_same_as_safetensors(save_pickle(tmp_path / "in", content), state_dict, tmp_path)
    assert f"only {wrapper!r} is read; beside it are 'epoch', 'optimizer'" in result.stdout


def test_entries_that_are_no_tensors_are_named(tmp_path, state_dict):
    folder = save_pickle(tmp_path / "in", {**state_dict, "step": 7, "m._extra_state": None})
    result = assert_same_as_safetensors(folder, state_dict, tmp_path)
    assert "left out, since they are no tensors: 'step', 'm._extra_state'" in result.stdout


def test_tied_tensors_and_views_are_written_right(tmp_path):
    base = random(300, 256)
    tensors = {
        "embed_tokens.weight": base,
        "lm_head.weight": base,  # tied
        "transposed.weight": base.T,
        "slice.weight": base[10:20],
        "columns.weight": base[:, 3:203],
        "expanded.weight": base[:1].expand(7, -1),
        "stack": base.view(3, 100, 256).transpose(0, 1),
        "bias": base[:, 1],
        "scalar": base[5, 5],
    }
    constants = {"TILE_WEIGHTS": 1000, "JOB_WEIGHTS": 3000, "COPY_BYTES": 777}
    folder = save_pickle(tmp_path / "in", tensors)
    assert_same_as_safetensors(folder, tensors, tmp_path)
    quantize(folder, tmp_path / "small", constants=constants)
    assert folder_bytes(tmp_path / "small") == folder_bytes(tmp_path / "out")


def test_only_tensors_that_are_not_in_one_piece_are_read_through_the_memory_map(tmp_path):
    whole = random(16, 512)
    state_dict = {
        "plain": whole,
        "transposed": whole.T,
        "rows": whole[4:8],
        "columns": whole[:, :256],
        "empty": whole[:0],
    }
    save_pickle(tmp_path / "in", state_dict)
    with contextlib.closing(q.Checkpoint(tmp_path / "in")) as checkpoint:
        infos = checkpoint.tensors
        data = (tmp_path / "in" / "pytorch_model.bin").read_bytes()
        for name in ("plain", "rows"):
            expected = bytes(state_dict[name].contiguous().view(torch.uint8).flatten().tolist())
            assert data[infos[name].location.offset :][: infos[name].nbytes] == expected
        for name in ("transposed", "columns"):
            assert isinstance(infos[name].location, q.InMap)


def test_a_pickle_of_the_other_byte_order_is_read_right(tmp_path, state_dict):
    folder = save_pickle(tmp_path / "in", state_dict)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    other = {"little": "big", "big": "little"}[sys.byteorder]
    widths = [tensor.dtype.itemsize for tensor in state_dict.values()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if "/data/" in name:
                width = widths[int(name.rpartition("/")[2])]
                data = bytes(data[i ^ (width - 1)] for i in range(len(data)))
            archive.writestr(name, other if name.endswith("/byteorder") else data)
    assert_same_as_safetensors(folder, state_dict, tmp_path)


def test_safetensors_win_over_pickles_and_the_plan_says_so(tmp_path, state_dict):
    folder = save_model(tmp_path / "in", {"m.weight": random(24, 256)})
    save_pickle(folder, state_dict)
    result = quantize(folder, tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == {"m.qweight", "m.scales"}
    assert "pytorch_model.bin (other weights)" in result.stdout


def test_safetensors_win_over_an_index_of_pickles(tmp_path, state_dict):
    folder = save_model(tmp_path / "in", {"m.weight": random(24, 256)})
    save_pickle(folder, state_dict, "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(state_dict, "pytorch_model-00001-of-00001.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    quantize(folder, tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == {"m.qweight", "m.scales"}


# --- refusals ---------------------------------------------------------------------------------------------------------


class RunsCode:
    def __reduce__(self):
        return os.system, ("echo gotcha",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, state_dict):
    folder = save_pickle(tmp_path / "in", {**state_dict, "x": RunsCode()})
    result = run_cli(folder, tmp_path / "out")
    assert_refused(result, "pytorch_model.bin", "would run posix.system when opened")
    assert "gotcha" not in result.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"m": {"weight": torch.ones(2)}}, "'m' is a dict inside"),
        ({"m.weight": torch.ones(4, 128).to_sparse()}, "'m.weight'"),
        (
            {"m.weight": torch.ones(4, 128, device="meta")},
            "'m.weight' (pytorch_model.bin) is torch.float32",
        ),
        (
            {"m.weight": torch._neg_view(torch.ones(4, 128))},
            "'m.weight' (pytorch_model.bin) is torch.float32",
        ),
        ({"m.weight": torch.ones(4, 128, dtype=torch.int8)}, "already quantized"),
    ],
    ids=["list", "nested", "sparse", "meta", "negated view", "integer"],
)
def test_what_is_no_plain_state_dict_is_refused(tmp_path, content, words):
    assert_refused(run_cli(save_pickle(tmp_path / "in", content), tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_the_old_pickle_format_is_refused_with_the_reason(tmp_path, state_dict):
    folder = save_pickle(tmp_path / "in", {})
    torch.save(state_dict, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_refused(
        run_cli(folder, tmp_path / "out"),
        "pytorch_model.bin",
        "_use_new_zipfile_serialization=True",
    )


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_pickle_is_refused(tmp_path, state_dict, part):
    folder = save_pickle(tmp_path / "in", state_dict)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: int(len(data) * part)])
    assert_refused(
        run_cli(folder, tmp_path / "out"), "pytorch_model.bin", "not a whole torch checkpoint"
    )


def test_a_checkpoint_of_another_ending_is_named_with_what_to_do(tmp_path):
    source = save_pickle(tmp_path / "in", {f"{LAYER}.weight": random(64, 128)})
    (source / "pytorch_model.bin").rename(source / "last.ckpt")
    assert_refused(run_cli(source, tmp_path / "out"), "'last.ckpt'", "name it model.pth")


def test_several_rank_files_are_refused(tmp_path, state_dict):
    save_pickle(tmp_path / "in", state_dict, "modelopt_model.0.pth")
    save_pickle(tmp_path / "in", state_dict, "modelopt_model.1.pth")
    assert_refused(
        run_cli(tmp_path / "in", tmp_path / "out"),
        "'modelopt_model.0.pth', 'modelopt_model.1.pth'",
        "ranks",
    )


# --- ModelOpt ---------------------------------------------------------------------------------------------------------

DOWN = "model.layers.0.mlp.down_proj"


def modelopt_state_dict(weight, **quantizer_tensors):
    """As ModelOpt's state dicts name things: quantizers are submodules of the linear layer they belong to."""
    amax = {f"{DOWN}.weight_quantizer._amax": torch.ones(weight.shape[0] * 2, 1)}
    own = {
        f"{DOWN}.{name.replace('__', '._')}": tensor for name, tensor in quantizer_tensors.items()
    }
    return {"model.norm.weight": torch.ones(4), f"{DOWN}.weight": weight, **amax, **own}


def save_modelopt(folder, state_dict):
    return save_pickle(folder, state_dict, "modelopt_model.0.pth")


def test_modelopts_amax_tensors_are_dropped_and_counted(tmp_path):
    weight = random(24, 256)
    folder = save_modelopt(
        tmp_path / "in", modelopt_state_dict(weight, input_quantizer__amax=torch.ones(1))
    )
    result = assert_same_as_safetensors(
        folder, {"model.norm.weight": torch.ones(4), f"{DOWN}.weight": weight}, tmp_path
    )
    assert "ModelOpt's quantizer tensors are dropped: 2" in result.stdout


@pytest.mark.parametrize("options", [[], ["--exclude", "down_proj"]], ids=["quantized", "kept"])
def test_modelopts_pre_quant_scale_is_multiplied_back(tmp_path, options):
    original, scale = random(24, 256), torch.rand(256) + 0.5
    smoothed = (original.float() / scale).bfloat16()
    other = {"model.other.weight": random(24, 256)}
    state_dict = modelopt_state_dict(smoothed, input_quantizer__pre_quant_scale=scale)
    folder = save_modelopt(tmp_path / "in", state_dict | other)
    expected = {
        "model.norm.weight": torch.ones(4),
        f"{DOWN}.weight": (smoothed.float() * scale).bfloat16(),
    } | other
    result = assert_same_as_safetensors(folder, expected, tmp_path, *options)
    assert "pre_quant_scale multiplied back into 1 weights, cancelled in 0" in result.stdout
    assert (expected[f"{DOWN}.weight"] - original).abs().max() <= original.abs().max() * 2**-7


def test_modelopts_two_pre_quant_scales_cancel(tmp_path):
    weight, scale = random(24, 256), torch.rand(256) + 0.5
    scales = {
        "input_quantizer__pre_quant_scale": scale,
        "weight_quantizer__pre_quant_scale": 1 / scale,
    }
    folder = save_modelopt(tmp_path / "in", modelopt_state_dict(weight, **scales))
    result = assert_same_as_safetensors(
        folder, {"model.norm.weight": torch.ones(4), f"{DOWN}.weight": weight}, tmp_path
    )
    assert "into 0 weights, cancelled in 1" in result.stdout


@pytest.mark.parametrize(
    "name",
    [
        "weight_quantizer._scale",
        "weight_quantizer._double_scale",
        "weight_quantizer._scale_zeros",
        "weight_quantizer._svdquant_lora_a",
        "input_quantizer._bias_value",
        "output_quantizer._pre_quant_scale",
        "weight_quantizer._pre_quant_scale",  # without the input's, it would not cancel
        "weight_quantizer.0._scale",
        "k_bmm_quantizer._something_new",
    ],
)
def test_modelopt_tensors_of_unknown_effect_are_refused_by_name(tmp_path, name):
    state_dict = modelopt_state_dict(random(24, 256)) | {f"{DOWN}.{name}": torch.ones(256)}
    result = run_cli(save_modelopt(tmp_path / "in", state_dict), tmp_path / "out")
    assert_refused(result, f"'{DOWN}.{name}'", "from before ModelOpt")


@pytest.mark.parametrize(
    "scale", [torch.ones(255), torch.zeros(256), torch.full((256,), float("nan"))]
)
def test_a_pre_quant_scale_that_cannot_be_undone_is_refused(tmp_path, scale):
    state_dict = modelopt_state_dict(random(24, 256), input_quantizer__pre_quant_scale=scale)
    assert_refused(
        run_cli(save_modelopt(tmp_path / "in", state_dict), tmp_path / "out"), "_pre_quant_scale'"
    )


def test_quantizer_tensors_in_safetensors_are_refused(tmp_path):
    folder = save_model(tmp_path / "in", modelopt_state_dict(random(24, 256)))
    assert_refused(run_cli(folder, tmp_path / "out"), "weight_quantizer._amax'")


def test_a_name_that_no_safetensors_file_can_hold_is_refused(tmp_path, state_dict):
    folder = save_pickle(tmp_path / "in", state_dict | {"__metadata__": torch.ones(3)})
    assert_refused(
        run_cli(folder, tmp_path / "out"), "'__metadata__'", "rename it, or leave it out"
    )
