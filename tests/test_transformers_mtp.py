"""Whatever becomes of a model's MTP, which transformers does not load, it computes what it does of the dense twin."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
import transformers
from mtp_families import FATES, MTP_FAMILIES, convert_with_mtp

# It loads none of MTP, so that nothing there may hinder it.
CASES = [(name, fate) for name in MTP_FAMILIES for fate in FATES]


@pytest.mark.parametrize(("name", "fate"), CASES)
def test_transformers_computes_what_it_does_of_the_twin(name, fate, tmp_path):
    """In the class for text alone, which renames the language model of one that sees."""
    convert_with_mtp(name, fate, tmp_path)
    outputs = []
    for folder in ("out", "twin"):
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(tmp_path / folder, dtype="auto")
        with torch.no_grad():
            outputs.append(model(torch.arange(1, 40)[None]).logits)
    assert torch.equal(*outputs)
