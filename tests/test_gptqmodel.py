"""Folders written as GPTQ v1 decode to the source by the format's definition, and load in GPTQModel's own CPU kernel.

GPTQModel is an optional extra, since it takes more than a minute to install; its tests skip without it. Its loader and
that of transformers (which goes through optimum) are different programs, so both are asked.
"""

import re
from importlib.util import find_spec

import families
import pytest
import torch
from conftest import quantize
from folders import (
    check_weights_resemble_source,
    edit_quantization_config,
    edit_tensors,
    read_dequantized,
    read_tensors,
    write_dense_twin,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

needs_gptqmodel = pytest.mark.skipif(
    not (find_spec("gptqmodel") and find_spec("optimum")),
    reason="gptqmodel and optimum are not installed: see tests/tools/requirements-gptq.txt",
)

EXCLUDE = r"self_attn\.[qkv]_proj\.|layers\.1\.mlp\.down_proj\."
MODELS = ["llama", "llama_tied"]


@pytest.fixture(autouse=True)
def uncompiled():
    """Run GPTQModel's decoding as it is written; compiling it would take half a minute for the same numbers."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folder of each tiny dense model, by name."""
    folders = {name: tmp_path_factory.mktemp("source") / name for name in MODELS}
    for name, folder in folders.items():
        families.save(name, "pretrained", folder)
    return folders


def convert(source, folder, group_size=64, exclude=None, scale="absmax"):
    """Quantize one source folder as GPTQ and give it the tokenizer without which GPTQModel loads nothing."""
    options = ["--format", "gptq", "--group_size", group_size, "--scale", scale]
    quantize(source, folder, *options, *(["--exclude", exclude] if exclude else []))
    assert (
        scale == "absmax" or (read_tensors(folder)["model.layers.0.mlp.up_proj.scales"] < 0).any()
    )
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return folder


def load_twin(folder):
    """Load the dense twin in float16, the dtype of the scales, in which GPTQModel decodes without a second rounding."""
    twin_folder = folder.with_name(folder.name + "-twin")
    write_dense_twin(folder, twin_folder, torch.float16)
    twin, _ = families.load("llama", twin_folder, dtype=torch.float16)
    return twin


def load_with_gptqmodel(folder):
    """Load a folder with GPTQModel's plain CPU kernel."""
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(
        str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16
    )
    return loaded.model.eval()


def check_kernel_weights(model, twin, quantized):
    """Each layer's kernel decodes to the twin's weight; layers that are not quantized are plain and equal."""
    for name, module in twin.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        layer = model.get_submodule(name)
        is_quantized = f"{name}.weight" in quantized
        assert (type(layer) is not nn.Linear) == is_quantized, name
        weight = layer.dequantize_weight().T if is_quantized else layer.weight
        assert torch.equal(weight, module.weight), name


def check_logits(model, twin, tolerance):
    """The outputs differ from the twin's by no more than the kernel's own rounding, a share of the largest."""
    expected = families.logits_of(twin)
    assert (families.logits_of(model) - expected).abs().max() < tolerance * expected.abs().max()


def check_load(folder, model):
    """Everything that must hold for a model that GPTQModel made of a folder."""
    twin = load_twin(folder)
    _, quantized = read_dequantized(folder)
    check_kernel_weights(model, twin, quantized)
    check_logits(model, twin, tolerance=0.005)


# --- without GPTQModel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [None, EXCLUDE], ids=["all", "exclude"])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("model", MODELS)
def test_weights_decoded_by_the_v1_definition_resemble_the_source(
    model, group_size, exclude, sources, tmp_path
):
    folder = convert(sources[model], tmp_path / "out", group_size, exclude)
    dequantized, quantized = read_dequantized(folder)
    source = read_tensors(sources[model])
    check_weights_resemble_source(dequantized, quantized, source)
    kept = {name for name in source if exclude and re.search(exclude, name)}
    assert bool(kept) == bool(exclude)
    assert quantized == {name for name in source if name.endswith("_proj.weight")} - kept


# --- with GPTQModel ---------------------------------------------------------------------------------------------------


@needs_gptqmodel
@pytest.mark.parametrize("exclude", [None, EXCLUDE], ids=["all", "exclude"])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("model", MODELS)
def test_gptqmodels_kernel_decodes_every_weight_exactly(
    model, group_size, exclude, sources, tmp_path
):
    folder = convert(sources[model], tmp_path / "out", group_size, exclude)
    check_load(folder, load_with_gptqmodel(folder))


@needs_gptqmodel
def test_negative_scales_of_mse_survive_in_gptqmodel(sources, tmp_path):
    folder = convert(sources["llama"], tmp_path / "out", scale="mse")
    check_load(folder, load_with_gptqmodel(folder))


@needs_gptqmodel
@pytest.mark.parametrize("scale", ["absmax", "mse"])
@pytest.mark.parametrize("model", MODELS)
def test_transformers_loads_gptq_through_optimum(model, scale, sources, tmp_path):
    folder = convert(sources[model], tmp_path / "out", scale=scale)
    loaded, report = families.load("llama", folder, dtype=torch.float16)
    assert not {what: keys for what, keys in report.items() if keys}
    # The kernel chosen here, ATen's int4pack, computes in bfloat16.
    check_logits(loaded, load_twin(folder), tolerance=0.025)


@needs_gptqmodel
def test_optimum_does_not_read_which_layers_were_kept(sources, tmp_path):
    """A limit of optimum 2.3, which users who exclude layers must know; when this fails, it is gone."""
    folder = convert(sources["llama"], tmp_path / "out", exclude=EXCLUDE)
    _, report = families.load("llama", folder, dtype=torch.float16)
    assert "model.layers.0.self_attn.q_proj.weight" in report["unexpected_keys"]
    assert "model.layers.0.self_attn.q_proj.qweight" in report["missing_keys"]


# --- the checks notice faults -----------------------------------------------------------------------------------------


def store_zeros_as_v2(tensors):
    """Store the zero point itself, 8, where v1 wants it less one."""
    for name in tensors:
        if name.endswith(".qzeros"):
            tensors[name] = torch.full_like(tensors[name], -0x77777778)  # 0x88888888


def swap_layers(tensors):
    """Give two layers each other's codes."""
    one, other = (f"model.layers.{index}.mlp.up_proj.qweight" for index in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_scales(tensors):
    """Exchange the first two groups' scales."""
    for name, scales in tensors.items():
        if name.endswith(".scales"):
            tensors[name] = scales[[1, 0, *range(2, len(scales))]]


@pytest.mark.parametrize("fault", [store_zeros_as_v2, swap_layers, swap_scales])
def test_wrong_weights_in_the_file_are_noticed(fault, sources, tmp_path):
    folder = convert(sources["llama"], tmp_path / "out")
    edit_tensors(folder, fault)
    dequantized, quantized = read_dequantized(folder)
    with pytest.raises(AssertionError, match="is off by"):
        check_weights_resemble_source(dequantized, quantized, read_tensors(sources["llama"]))


@needs_gptqmodel
def test_kept_layer_missing_from_dynamic_is_noticed(sources, tmp_path):
    folder = convert(sources["llama"], tmp_path / "out", exclude=EXCLUDE)
    edit_quantization_config(folder, lambda config: config.pop("dynamic"))
    (folder / "quantize_config.json").unlink()
    with pytest.raises(ValueError, match=r"Missing required quantized weights.*q_proj"):
        load_with_gptqmodel(folder)


@needs_gptqmodel
def test_weights_decoded_differently_by_the_kernel_are_noticed(sources, tmp_path):
    folder = convert(sources["llama"], tmp_path / "out")
    model = load_with_gptqmodel(folder)
    model.model.layers[1].mlp.up_proj.qweight[0, 5] += 1
    with pytest.raises(AssertionError, match=r"layers\.1\.mlp\.up_proj"):
        check_load(folder, model)
