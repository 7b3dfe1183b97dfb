"""The table of unusual types of models against transformers' own mapping, type by type, on models without weights.

A new version of transformers that has a type which the table lacks, or names something otherwise, fails here by name.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import meta_models
import pytest
from meta_models import as_tensors

import quantize_int4


def stacks_of(built):
    """What the command takes for stacks of experts in a state dict, in a format for engines."""
    checkpoint = SimpleNamespace(config=built.config, tensors=as_tensors(built.in_memory))
    return checkpoint, quantize_int4.find_expert_stacks(checkpoint, for_engines=True)


# --- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", meta_models.folders_with_experts())
def test_the_table_has_each_type_with_stacks_of_experts_and_names_them_as_its_loader_does(folder):
    for built in meta_models.build_models(folder):
        checkpoint, stacks = stacks_of(built)
        if not stacks:
            continue
        row = quantize_int4.oddity_with("tells_experts", built.config)
        assert row.tells_experts, f"{built.model_type} is in no row of ODDITIES"
        refused = any(stack.problem for stack in stacks.values())
        if refused or row.linear_experts:  # the latter are no stacks in a quantized model
            continue
        for part in quantize_int4.separate_experts(checkpoint, stacks):
            targets, operations = built.load(part.name)
            assert targets == [part.name_in_file], f"{built.model_type}: {part.name} is lost"
            merged = "MergeModulelist" in operations
            assert merged == (part.name_in_file in stacks), f"{built.model_type}: {part.name}"


@pytest.mark.parametrize("folder", meta_models.folders_with_experts())
def test_what_the_table_says_is_known_as_a_stack_alone_is_saved_so(folder):
    for built in meta_models.build_models(folder):
        row = quantize_int4.oddity_with("tells_experts", built.config)
        if not row.problem_of_engines or row.remedy:
            continue
        separate = [name for name in built.in_file if re.search(r"\.experts\.\d+\.", name)]
        assert not separate, f"{built.model_type} has separate experts in its files: {separate[:1]}"


# --- layers -----------------------------------------------------------------------------------------------------------


def test_the_table_has_each_type_whose_layers_are_conv1d():
    found = set()
    for folder in sorted(path.name for path in meta_models.FOLDERS.iterdir()):
        if re.search(r"pytorch_utils import .*\bConv1D\b", meta_models.sources_of(folder)):
            found |= set(meta_models.types_of(folder))
    found -= {"clvp_encoder"}  # whose layers are linear ones
    assert len(found) >= 6
    for model_type in found:
        row = quantize_int4.oddity_with("conv1d", {"model_type": model_type})
        assert row.conv1d, f"{model_type} is in no row of ODDITIES with conv1d"
