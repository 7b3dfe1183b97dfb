"""Proof by family: vLLM's own loader makes of a quantized folder, parameter for parameter, what it makes of its twin.

The twin is the dense checkpoint of the dequantized weights. No name of any tensor is known here: whatever vLLM fuses,
stacks or renames, it does to both, so the decoded parameters of a module must equal those of the same module of the
twin. Before loading every parameter is filled with what no checkpoint holds, and nothing of that may be left.

What the README's table leaves out. Families are tried with and without layers kept by --exclude or in 8 bits, saved by
save_pretrained and as model.state_dict(). Llama 4, Gemma 3 without images and the like are the text models; Qwen3.5 and
Qwen3.5-MoE have their vision towers; InternVL is of both conventions, its class of the hub's own code was not tried.
gptq is equal, too, but for Gemma 3 with images, which vLLM does not compute in float16, and Whisper, which is refused.
Nemotron-Nano-Omni was not run: it wants the hub's config and a tokenizer. Granite 4 hybrid, experts kept: from a state
dict vLLM has no name for the experts and stops. Qwen3-VL-MoE, experts kept: equal from the hub's stacks; at transformers
5's own, which are not transposed, it stops. vLLM does not have T5, dense or quantized. MTP: test_vllm_mtp.py.

How vLLM is asked without a GPU, and what it needs to be installed: see test_vllm_loader.py.
"""

import os
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import transformers

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_TARGET_DEVICE"] = "cpu"
pytest.importorskip("vllm", reason="vLLM is not installed: see tests/tools/requirements-vllm.txt")

import families
import test_vllm_loader as loader
from conftest import quantize
from families import FAMILIES
from folders import write_dense_twin
from test_vllm_loader import vllm_process  # noqa: F401 - a fixture
from vllm.model_executor.layers.attention import mla_attention
from vllm.model_executor.models import registry

# Modules of vLLM that import it.
WITH_TORCHVISION = [
    "gemma3_mm",
    "interns1",
    "internvl",
    "llava_onevision",
    "mistral3",
    "qwen3_5",
    "qwen3_vl_moe",
]
# What vLLM loads neither from a quantized folder nor from a dense one, and what it says: see the test at the end.
NOT_LOADED = {
    ("t5", "pretrained"): "T5",  # 0.29: not supported; 0.33: no position_ids in T5Stack
    (
        "granite",
        "state_dict",
    ): "block_sparse_moe.experts.down_proj",  # it knows the hub's input_linear, output_linear
    (
        "qwen3_vl_moe",
        "pretrained",
    ): "must match the size",  # it knows the hub's stacks, which are transposed
    # It knows the hub's names of these towers.
    ("gemma3_vl", "pretrained"): "named 'vision_tower.embeddings'",
    ("llava", "pretrained"): "named 'vision_tower.embeddings'",
    ("llava_onevision", "pretrained"): "named 'vision_tower.embeddings'",
    # It knows the hub's config.json, which has another type, and wants a tokenizer.
    ("nemotron_h_omni", "pretrained"): "no attribute 'patch_size'",
}
# transformers 5.20, which vLLM 0.33 needs, saves one wrapper too many.
if transformers.__version__.startswith("5.20."):
    NOT_LOADED["qwen2_audio", "pretrained"] = "no module or parameter named 'model'"


# What vLLM does not load from gptq, in float16, and what it says.
NOT_LOADED_FROM_GPTQ = {
    "gemma3_vl": "does not support float16",
}
# The program itself refuses these for gptq (test_plan.py).
REFUSED_FOR_GPTQ = {"whisper"}


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch, without_torchvision):
    """Replace what wants a GPU's kernels, or wants the platform to be a CPU in earnest, while a model is made."""
    monkeypatch.setattr(
        mla_attention, "get_mla_prefill_backend", lambda config: lambda **sizes: None
    )
    monkeypatch.setattr(loader.OrinPlatform, "check_and_update_config", lambda *_: None)
    # The tokenizer, which is not loaded, says whether an InternVL takes videos.
    internvl = import_module("vllm.model_executor.models.internvl")
    limits = internvl.BaseInternVLProcessingInfo.get_supported_mm_limits
    monkeypatch.setattr(internvl.InternVLProcessingInfo, "get_supported_mm_limits", limits)


@pytest.fixture(scope="module", autouse=True)
def without_torchvision():
    """Let vLLM import models with vision towers, for whose images it wants torchvision, where that is not installed."""
    if find_spec("torchvision"):
        yield
        return
    names = [
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, ModuleType(name))
        for name in names[1:]:
            parent, _, last = name.rpartition(".")
            setattr(sys.modules[parent], last, sys.modules[name])
        for name in WITH_TORCHVISION:
            import_module(f"vllm.model_executor.models.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            registry, "_run_in_subprocess", lambda function: function()
        )  # here they are imported
        yield


def dense_parameters(model):
    """Every parameter of vLLM's model, decoded where it is packed, by its module's path and name."""
    return {
        f"{path}.{name}": weight
        for path, parameters in loader.parameters_by_module(model).items()
        for name, weight in loader.decode_parameters(model.get_submodule(path), parameters).items()
    }


def is_filled(tensor):
    """Whether no element is what parameters are filled with before they are loaded."""
    return not (tensor.isnan() if tensor.is_floating_point() else tensor == -1).any()


def convert(name, saved, layers, folder, output_format="compressed-tensors"):
    """A family's model, saved in one way, quantized without what one exclude keeps, and the dense twin of that."""
    families.save(name, saved, folder / "source")
    options = ["--format", output_format, *families.group_size(name)]
    quantize(folder / "source", folder / "out", *options, *families.options(name, layers))
    write_dense_twin(folder / "out", folder / "twin", loader.DENSE_CASES[output_format])
    return folder / "out", folder / "twin"


def check_load(folder, twin, dtype=torch.bfloat16):
    """vLLM fills every parameter of both folders, and with the same weights."""
    expected = dense_parameters(loader.load_into_vllm(twin, dtype))
    assert not [key for key, tensor in expected.items() if not is_filled(tensor)]
    model = loader.load_into_vllm(folder, dtype)
    assert any(key.endswith(("_packed", ".qweight")) for key, _ in model.named_parameters())
    held = dense_parameters(model)
    assert held.keys() == expected.keys(), sorted(held.keys() ^ expected.keys())
    for key, tensor in expected.items():
        assert held[key].dtype == tensor.dtype, key
        assert torch.equal(held[key], tensor), key


@pytest.mark.parametrize(("name", "saved", "layers"), families.cases(NOT_LOADED))
def test_vllm_holds_what_it_holds_of_the_dequantized_twin(name, saved, layers, tmp_path):
    check_load(*convert(name, saved, layers, tmp_path))


@pytest.mark.parametrize(("name", "saved"), families.cases_of_limits(NOT_LOADED))
def test_vllm_holds_what_is_chosen_within_a_limit_as_the_twin(name, saved, tmp_path):
    source, options = families.limited(name, saved, tmp_path)
    quantize(source, tmp_path / "out", *options)
    write_dense_twin(tmp_path / "out", tmp_path / "twin", loader.DENSE_CASES["compressed-tensors"])
    check_load(tmp_path / "out", tmp_path / "twin")


@pytest.mark.parametrize(
    ("name", "saved", "layers"),
    [
        case
        for case in families.cases({*NOT_LOADED, *NOT_LOADED_FROM_GPTQ, *REFUSED_FOR_GPTQ})
        if case[0] in families.MULTIMODAL
    ],
)
def test_vllm_holds_the_same_of_gptq(name, saved, layers, tmp_path):
    check_load(*convert(name, saved, layers, tmp_path, "gptq"), torch.float16)


@pytest.mark.parametrize("name", NOT_LOADED_FROM_GPTQ)
def test_what_vllm_does_not_load_from_gptq(name, tmp_path):
    """And what it says; when this fails, the case is one for the test above."""
    folder, _ = convert(name, FAMILIES[name].saved[0], "", tmp_path, "gptq")
    with pytest.raises((ValueError, AttributeError), match=re.escape(NOT_LOADED_FROM_GPTQ[name])):
        loader.load_into_vllm(folder, torch.float16)


@pytest.mark.parametrize(("name", "saved"), NOT_LOADED)
def test_what_vllm_does_not_load_it_does_not_load_dense_either(name, saved, tmp_path):
    """And it says so; when this fails, the case is one for the test above."""
    for folder in convert(name, saved, next(iter(FAMILIES[name].excludes)), tmp_path):
        with pytest.raises(
            (ValueError, KeyError, RuntimeError, AttributeError),
            match=re.escape(NOT_LOADED[name, saved]),
        ):
            loader.load_into_vllm(folder)
