"""Formats, entries for kept layers: engines find these by them, and no other (README: "What gets quantized")."""

from __future__ import annotations

import re

import pytest
import torch
from checkpoints import BESIDE, INNER, MOE, PROJECTION, SEPARATE, E, H, random, save_model
from conftest import quantize
from folders import is_kept, read_json, read_tensors


def test_ignore_names_exactly_the_linear_layers_that_are_kept(tiny, tmp_path):
    patterns = [
        "--exclude",
        r"layers\.2\.mixer\.[qkv]_proj",
        "--exclude",
        r"layers\.1\.mixer\.shared_experts",
    ]
    quantize(
        tiny, tmp_path / "out", "--format", "compressed-tensors", "--group_size", 64, *patterns
    )
    output = read_tensors(tmp_path / "out")
    linear = {
        name.removesuffix(".weight")
        for name, tensor in read_tensors(tiny).items()
        if tensor.dim() == 2
    }
    kept = {module for module in linear if f"{module}.weight" in output}
    assert len(kept) == 2 + 2 + 3 + 2  # head and embeddings, routers, projections, shared experts
    assert {module for module in linear if is_kept(tmp_path / "out", module)} == kept
    # transformers loads "backbone." as "model."
    renamed = {module.replace("backbone.", "model.") for module in linear}
    assert sum(is_kept(tmp_path / "out", module) for module in renamed) == len(kept)


def test_routers_of_all_layers_are_one_pattern(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", "--format", "gptq", "--group_size", 64)
    description = read_json(tmp_path / "out" / "quantize_config.json")
    assert description["dynamic"] == {
        r"-:(.*\.)?embeddings$": {},
        r"-:(.*\.)?layers\.\d+\.mixer\.gate$": {},
    }


def test_an_ignore_entry_never_matches_a_layer_that_is_quantized(tmp_path):
    """`3.attn` is not to be taken for `13.attn`, nor a short name for the end of a longer one."""
    tensors = {
        f"layers.{i}.attn.{p}_proj.weight": torch.ones(8, 128) for i in range(14) for p in "qkv"
    }
    folder = save_model(tmp_path / "in", tensors | {"model.proj.weight": torch.ones(8, 128)})
    patterns = ["--exclude", r"^layers\.3\.", "--exclude", r"^model\.proj"]
    quantize(folder, tmp_path / "out", "--format", "compressed-tensors", *patterns, "--verify")
    for name in tensors:
        module = name.removesuffix(".weight")
        assert is_kept(tmp_path / "out", module) == module.startswith("layers.3.")
    assert is_kept(tmp_path / "out", "model.proj")


def test_a_layers_kept_experts_are_one_ignore_entry_for_the_whole_stack(tiny, tmp_path):
    options = ["--group_size", 64, "--exclude", r"layers\.3\.mixer\.experts\."]
    result = quantize(tiny, tmp_path / "out", "--format", "compressed-tensors", *options)
    assert "transformers (5.24) leaves experts that are kept random" in result.stdout
    ignore = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]
    assert r"re:(.*\.)?layers\.3\.mixer\.experts(\..*)?$" in ignore
    assert len(ignore) == 4  # and the head, the embeddings, all routers
    # vLLM asks for every projection that experts may have, transformers and GPTQ readers for the stack
    for name in ("experts.0.gate_proj", "experts.3.down_proj", "experts"):
        assert is_kept(tmp_path / "out", f"model.layers.3.mixer.{name}")
    assert not is_kept(tmp_path / "out", "model.layers.1.mixer.experts.0.gate_proj")
    assert not is_kept(tmp_path / "out", "model.layers.3.mixer.shared_experts.up_proj")


LANGUAGE = ["model.language_model.", "language_model.model.", "language_model.", "model."]
TOWER = ["model.vision_tower.", "vision_tower.", "model.visual.", "visual."]
ATTENTION = [f"layers.{layer}.self_attn.{p}_proj" for layer in range(2) for p in "qkvo"]


# What is kept: in which formats, and whether the tower is packed in 8 bits, and not kept with it.
KEPT = {
    "tower": ("compressed-tensors", "", False),
    "tower of gptq": ("gptq", "", False),
    "one layer": ("compressed-tensors", r"layers\.1\.", False),
    "one layer of gptq": ("gptq", r"layers\.1\.", False),
    "one layer but not the tower": ("compressed-tensors", r"layers\.1\.", True),
    "language": ("compressed-tensors", "layers", True),
}


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize("tower", TOWER[1:3])
@pytest.mark.parametrize("kept", KEPT)
def test_an_entry_matches_under_every_wrapper_and_no_packed_layer(tmp_path, language, tower, kept):
    form, excluded, packs_tower = KEPT[kept]
    tensors = {
        f"{prefix}{name}.weight": random(64, 128)
        for prefix in (language, tower)
        for name in ATTENTION
    }
    tensors[f"{language}embed_tokens.weight"] = random(48, 128)
    options = ["--format", form, "--group_size", 64, "--verify"]
    if excluded:
        options += ["--exclude", f"^{re.escape(language)}{excluded}.*_proj"]
    if packs_tower:
        options += ["--int8", f"^{re.escape(tower)}"]
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out", *options)
    for name in ATTENTION:
        expected = bool(excluded and re.match(excluded, name))
        for wrapper in LANGUAGE:
            assert is_kept(tmp_path / "out", wrapper + name) == expected
        for wrapper in (
            tower,
            tower.removeprefix("model."),
            f"model.{tower.removeprefix('model.')}",
        ):
            assert is_kept(tmp_path / "out", wrapper + name) != packs_tower
    for wrapper in LANGUAGE:
        assert is_kept(tmp_path / "out", f"{wrapper}embed_tokens")


def test_kept_weights_with_embed_in_their_names_have_entries_too(tmp_path):
    tensors = {
        "model.embed_vision.embedding_projection.weight": random(64, 128),
        "model.layers.0.mlp.up_proj.weight": random(64, 128),
    }
    quantize(
        save_model(tmp_path / "in", tensors),
        tmp_path / "out",
        "--format",
        "compressed-tensors",
        "--group_size",
        64,
    )
    for wrapper in ("model.", "", "language_model.model."):
        assert is_kept(tmp_path / "out", f"{wrapper}embed_vision.embedding_projection")
        assert not is_kept(tmp_path / "out", f"{wrapper}layers.0.mlp.up_proj")


INSIDE_EXPERTS = {
    "experts.0.up_proj.bias": random(INNER),
    "experts.e_score_correction_bias": random(E),
    "experts.0.norm.weight": random(H),
    "experts.router.weight": random(E, H),
}


@pytest.mark.parametrize("name", INSIDE_EXPERTS)
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_what_lies_inside_experts_and_is_kept_does_not_keep_the_experts(tmp_path, form, name):
    tensors = SEPARATE | BESIDE | {f"{MOE}.{name}": INSIDE_EXPERTS[name]}
    plan = quantize(
        save_model(tmp_path / "in", tensors),
        tmp_path / "out",
        "--format",
        form,
        "--group_size",
        64,
        "--verify",
    )
    assert "experts are kept" not in plan.stdout
    assert not is_kept(tmp_path / "out", f"{MOE}.experts")
    assert not is_kept(tmp_path / "out", f"{MOE}.experts.0.up_proj")
    assert is_kept(tmp_path / "out", f"{MOE}.experts.router") == ("router" in name)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("place", ["model.mm_projector", "model.layers.0.mlp"])
def test_of_linear_layers_in_a_row_the_entry_keeps_the_narrow_one_alone(tmp_path, form, place):
    tensors = {
        f"{place}.0.weight": random(64, 48),
        f"{place}.2.weight": random(64, 128),
    } | PROJECTION
    quantize(
        save_model(tmp_path / "in", tensors),
        tmp_path / "out",
        "--format",
        form,
        "--group_size",
        64,
        "--verify",
    )
    assert is_kept(tmp_path / "out", f"{place}.0")
    assert not is_kept(tmp_path / "out", f"{place}.2")


def test_the_entry_lm_head_stands_for_no_module_inside_it(tmp_path):
    tensors = PROJECTION | {
        "lm_head.dense.weight": random(64, 128),
        "lm_head.weight": random(96, 128),
    }
    options = ["--format", "compressed-tensors", "--group_size", 64, "--verify"]
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out", *options)
    assert "lm_head.dense.weight_packed" in read_tensors(tmp_path / "out")


@pytest.mark.parametrize("kept", [r"expert_\d\.fc1", r"expert_1\.", r"\.experts\."])
def test_experts_with_names_instead_of_numbers_have_entries_of_their_own(tmp_path, kept):
    """As in NLLB: `quantize` looks for an entry of each layer that is kept, and for none of a packed one."""
    tensors = {
        f"model.{side}.layers.0.ffn.experts.expert_{n}.fc{m}.weight": random(64, 128)
        for side in ("encoder", "decoder")
        for n in range(3)
        for m in (1, 2)
    }
    source = save_model(tmp_path / "in", PROJECTION | tensors)
    options = ["--format", "compressed-tensors", "--group_size", 64, "--exclude", kept]
    quantize(source, tmp_path / "out", *options)
