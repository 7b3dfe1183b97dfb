"""Proof by family: whatever way a model was saved, transformers makes of the quantized folder the dequantized model.

What a loader does not find it fills with random numbers, and what it does not know it skips. So every parameter, buffer
and logit is compared with those of a dense twin, the checkpoint of the dequantized weights, and the twin with the model
that was saved, which no name in any file connects with it.
"""

import os
import re
from dataclasses import dataclass
from functools import cached_property

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import families
import loader_helpers as helpers
import pytest
import torch
import transformers
from conftest import assert_refused, quantize, read_tensors, run_cli
from families import FAMILIES
from torch import nn

OPTIONS = ["--format", "compressed-tensors", "--group_size", 64]
# What a reader adds to the dense model's state: it keeps the scales and shapes beside the weights it decoded.
LEFTOVERS = re.compile(r"\.weight_(scale|shape)$")


def convert(name, saved, layers, folder):
    """A family's model, saved in one way, quantized without what one exclude keeps."""
    families.save(name, saved, folder / "source")
    quantize(folder / "source", folder / "out", *OPTIONS, *families.options(name, layers))
    return folder / "out"


@dataclass(frozen=True)
class Loaded:
    """A family's model as it was saved, what transformers made of the quantized folder, and the dense twin of that."""

    original: nn.Module
    model: nn.Module
    report: dict
    twin: nn.Module
    twin_report: dict

    @cached_property
    def logits(self):
        """The loaded model's output."""
        return logits_of(self.model)

    @cached_property
    def state(self):
        """The loaded model's tensors, once compressed-tensors has decoded them, which it does in the first forward."""
        assert self.logits is not None
        state = {name: tensor for name, tensor in self.model.state_dict().items() if not LEFTOVERS.search(name)}
        return families.stack_experts(state, transposed=True)  # of Llama-4, which has them apart once it is quantized


@torch.no_grad()
def logits_of(model):
    """The logits for a fixed prompt of text."""
    decoder = {"decoder_input_ids": families.TOKENS} if model.config.is_encoder_decoder else {}
    return model(input_ids=families.TOKENS, **decoder).logits


@pytest.fixture(scope="module", params=families.cases(), ids="-".join)
def loaded(request, tmp_path_factory):
    """One family, saved in one way, quantized with one exclude or none, and loaded."""
    name, saved, layers = request.param
    folder = convert(name, saved, layers, tmp_path_factory.mktemp("family"))
    helpers.write_dense_twin(folder, folder.with_name("twin"))
    if name == "llama4":  # dense, transformers has stacks for its experts, and quantized an nn.Linear for each
        helpers.edit_tensors(folder.with_name("twin"), families.transpose_and_stack)
    twin = families.load(name, folder.with_name("twin"))
    return Loaded(families.build(name), *families.load(name, folder), *twin)


def test_no_key_is_missing_and_none_is_unknown(loaded):
    assert loaded.report.keys() >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
    for report in (loaded.report, loaded.twin_report):
        assert not {what: keys for what, keys in report.items() if keys}


def test_every_parameter_and_buffer_equals_the_twins_in_the_same_dtype(loaded):
    expected = loaded.twin.state_dict() | dict(loaded.twin.named_buffers())
    held = loaded.state | dict(loaded.model.named_buffers())
    assert {name for name in held if not LEFTOVERS.search(name)} == expected.keys()
    for name, tensor in expected.items():
        assert held[name].dtype == tensor.dtype, name
        assert torch.equal(held[name], tensor), name


def test_logits_equal_the_twins_and_are_numbers(loaded):
    expected = logits_of(loaded.twin)
    # Llama-4's twin multiplies its experts as a batch, and so rounds otherwise.
    tolerance = 0.02 * expected.abs().max() if loaded.twin.config.model_type == "llama4_text" else 0
    assert loaded.logits.isfinite().all()
    assert (loaded.logits - expected).abs().max() <= tolerance


def test_the_twin_resembles_the_model_that_was_saved(loaded):
    """Every row is the same row of the same expert of the same layer, to INT4's precision: see loader_helpers."""
    expected, held = loaded.original.state_dict(), loaded.twin.state_dict()
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.dim() < 2:
            assert torch.equal(held[name], tensor), name
            continue
        error = (held[name].float() - tensor.float()).norm(dim=-1) / tensor.float().norm(dim=-1)
        assert error.max() < 0.2, f"{name}: {error.max():.2f}"


SAME_NAME = {"nemotron_h": (r"^model\.", "backbone.")}
REFUSED = [(name, saved) for name, family in FAMILIES.items() if family.refused for saved in family.saved]
RESAVED = [(name, saved) for name, family in FAMILIES.items() for saved in family.saved if saved != "pretrained"]


@pytest.mark.parametrize(("name", "saved"), [case for case in RESAVED if not FAMILIES[case[0]].refused])
def test_a_model_saved_as_a_state_dict_gives_the_tensors_of_one_saved_by_save_pretrained(name, saved, tmp_path):
    expected = read_tensors(convert(name, "pretrained", "", tmp_path / "pretrained"))
    written = read_tensors(convert(name, saved, "", tmp_path / saved))
    for pattern, replacement in [SAME_NAME[name]] if name in SAME_NAME else []:
        written = {re.sub(pattern, replacement, key): tensor for key, tensor in written.items()}
    if "lm_head.weight" not in expected:  # tied: a state dict holds it twice
        assert torch.equal(written.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert written.keys() == expected.keys()
    for key, tensor in expected.items():
        assert written[key].dtype == tensor.dtype, key
        assert torch.equal(written[key], tensor), key


@pytest.mark.parametrize(("name", "saved"), REFUSED)
def test_stacks_that_no_engine_loads_as_weights_are_refused_by_name(name, saved, tmp_path):
    families.save(name, saved, tmp_path / "source")
    assert_refused(run_cli(tmp_path / "source", tmp_path / "out", *OPTIONS), FAMILIES[name].refused, "--exclude")


@pytest.mark.parametrize(("name", "saved"), REFUSED)
def test_stacks_that_are_kept_are_those_of_the_source(name, saved, tmp_path):
    folder = convert(name, saved, "experts", tmp_path)
    source, written = read_tensors(tmp_path / "source"), read_tensors(folder)
    stacks = [key for key, tensor in source.items() if re.search(FAMILIES[name].excludes["experts"], key)]
    assert any(source[key].dim() == 3 for key in stacks)
    for key in stacks:
        assert torch.equal(written[key], source[key]), key


def test_transformers_cannot_load_a_quantized_t5_unless_it_is_decoded_at_once(tmp_path):
    """It initializes what no file can hold, and asks every layer for the dense weight to do so."""
    folder = convert("t5", "pretrained", "", tmp_path)
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        transformers.T5ForConditionalGeneration.from_pretrained(folder)
