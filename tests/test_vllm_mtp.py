"""Proof for drafts: vLLM's draft classes load of a quantized folder what they load of its twin, as its targets do.

What the twin is, and how vLLM is asked without a GPU: see test_vllm_families.py and test_vllm_loader.py.
"""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_TARGET_DEVICE"] = "cpu"
pytest.importorskip(
    "vllm", "0.33", reason="not this vLLM: see tests/tools/requirements-vllm-0.33.txt"
)

import test_vllm_loader as loader
from mtp_families import FATES, MTP_FAMILIES, convert_with_mtp
from test_vllm_families import (  # noqa: F401 - fixtures
    check_load,
    dense_parameters,
    is_filled,
    without_gpu,
    without_torchvision,
)
from test_vllm_loader import vllm_process  # noqa: F401 - a fixture
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype


@torch.no_grad()
def load_draft(folder, dtype=torch.bfloat16):
    """Have vLLM make the draft model of a folder."""
    config = EngineArgs(
        model=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    ).create_engine_config()
    draft = config.speculative_config.draft_model_config
    with loader.pretend_orin(), set_current_vllm_config(config), set_default_torch_dtype(dtype):
        # The target tells the quantization which layers are fused, as in an engine.
        initialize_model(config)
        model = initialize_model(config, model_config=draft)
        for parameter in model.parameters():
            parameter.fill_(float("nan") if parameter.is_floating_point() else -1)
        get_model_loader(config.load_config).load_weights(model, draft)
    return model


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("name", MTP_FAMILIES)
def test_vllm_drafts_with_what_the_twin_drafts_with(name, fate, tmp_path):
    convert_with_mtp(name, fate, tmp_path)
    check_load(tmp_path / "out", tmp_path / "twin")

    expected = dense_parameters(load_draft(tmp_path / "twin"))
    assert not [key for key, tensor in expected.items() if not is_filled(tensor)]
    held = dense_parameters(load_draft(tmp_path / "out"))
    assert held.keys() == expected.keys(), sorted(held.keys() ^ expected.keys())
    for key, tensor in expected.items():
        assert torch.equal(held[key], tensor), key
