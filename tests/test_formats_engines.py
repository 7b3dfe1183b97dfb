"""Formats: what the plan says of engines that need not load every folder (README: "Engines and versions")."""

from __future__ import annotations

import re

import pytest
from checkpoints import random, save_model
from conftest import ENGINE_FORMATS, assert_refused, quantize, run_cli
from folders import read_config

LAYER = "model.layers.0"

# --- TensorRT Edge-LLM ------------------------------------------------------------------------------------------------

EDGE_LLM = "TensorRT Edge-LLM (0.11) "


def dense(columns):
    """A layer's attention and an MLP whose second projection has so many columns."""
    return {
        f"{LAYER}.self_attn.q_proj.weight": random(256, 256),
        f"{LAYER}.self_attn.o_proj.weight": random(256, 256),
        f"{LAYER}.mlp.gate_proj.weight": random(columns, 256),
        f"{LAYER}.mlp.up_proj.weight": random(columns, 256),
        f"{LAYER}.mlp.down_proj.weight": random(64, columns),
    }


def experts(count=4):
    projections = ("gate_proj", "up_proj", "down_proj")
    return {
        f"{LAYER}.mlp.experts.{number}.{name}.weight": random(128, 128)
        for number in range(count)
        for name in projections
    }


def edge_llm_notes(tmp_path, tensors, *options, template="{{ messages }}", **config):
    """What the plan for gptq says of TensorRT Edge-LLM."""
    source = save_model(tmp_path / "in", tensors, **config)
    if template:
        (source / "chat_template.jinja").write_text(template)
    plan = quantize(source, tmp_path / "out", "--dry_run", "--format", "gptq", *options).stdout
    return re.findall(rf"^Note: +{re.escape(EDGE_LLM)}(.*)", plan, re.MULTILINE)


def test_nothing_is_said_of_edge_llm_where_it_serves_the_folder(tmp_path):
    assert not edge_llm_notes(tmp_path, dense(384), model_type="llama")


def test_groups_that_edge_llm_computes_wrongly_are_noted_with_what_makes_others_possible(tmp_path):
    notes = edge_llm_notes(tmp_path, dense(320), model_type="llama")
    assert notes == [
        "cannot serve groups of 64: it has 128 alone, loads others without a warning and computes"
        r" wrongly; with --group_size 128, --exclude '\b(mlp\.down_proj)(\.weight)?$' keeps what 128"
        " does not divide (1 weight, 41.0 kB)"
    ]
    pattern = re.search("--exclude '(.*)' keeps", notes[0])[1]
    assert not edge_llm_notes(tmp_path, dense(320), "--exclude", pattern, model_type="llama")


def test_a_size_that_was_asked_for_though_128_divides_all_is_noted_so(tmp_path):
    (note,) = edge_llm_notes(tmp_path, dense(384), "--group_size", 64, model_type="llama")
    assert note.endswith("computes wrongly; --group_size 128 divides all columns")


def test_no_exclude_is_named_that_keeps_most_of_the_model(tmp_path):
    tensors = {f"{LAYER}.mlp.{name}_proj.weight": random(64, 192) for name in ("gate", "up")}
    (note,) = edge_llm_notes(tmp_path, tensors, model_type="llama")
    assert note.endswith("computes wrongly")


@pytest.mark.parametrize(
    ("form", "model_type", "is_lost"),
    [("gptq", "llama", True), ("gptq", "gemma3", False), ("compressed-tensors", "llama", False)],
)
def test_the_refusal_of_128_says_what_a_smaller_size_loses(tmp_path, form, model_type, is_lost):
    source = save_model(tmp_path / "in", dense(320), model_type=model_type)
    result = run_cli(source, tmp_path / "out", "--format", form, "--group_size", 128)
    assert_refused(result, "--group_size 64 divides all")
    lost = (
        "divides all, but TensorRT Edge-LLM (0.11) cannot serve it: --exclude"
        r" '\b(mlp\.down_proj)(\.weight)?$' keeps what 128 does not divide"
    )
    assert (lost in result.stderr) == is_lost


def test_experts_that_are_kept_are_noted_for_edge_llm(tmp_path):
    config = {"model_type": "qwen3_moe", "num_experts": 4}
    tensors = dense(384) | experts()
    assert not edge_llm_notes(tmp_path, tensors, **config)
    (note,) = edge_llm_notes(tmp_path, tensors, "--exclude", r"\.experts\.", **config)
    assert note.startswith("cannot serve experts that are kept") and "were -1" in note


def test_rows_that_edge_llm_cannot_hold_are_noted_with_what_keeps_them(tmp_path):
    narrow = {f"{LAYER}.linear_attn.in_proj_{part}.weight": random(16, 256) for part in "ab"}
    (note,) = edge_llm_notes(tmp_path, dense(384) | narrow, model_type="qwen3_5_text")
    assert note.startswith("cannot serve 2 weights with rows that are no multiple of 64: --exclude")
    pattern = re.search("--exclude '(.*)' keeps them", note)[1]
    tensors = dense(384) | narrow
    assert not edge_llm_notes(tmp_path, tensors, "--exclude", pattern, model_type="qwen3_5_text")


@pytest.mark.parametrize(
    "model_type", ["gemma2", "gemma3_text", "olmo2", "mixtral", "smollm3", "granite", "phi3"]
)
def test_types_that_edge_llm_takes_for_others_are_noted_and_nothing_else_of_them(
    tmp_path, model_type
):
    (note,) = edge_llm_notes(tmp_path, dense(320), template="", model_type=model_type)
    assert note.startswith(f"does not know models of type {model_type}: it takes them for Llama")


def test_experts_that_edge_llm_holds_in_other_formats_alone_are_noted(tiny, tmp_path):
    plan = quantize(tiny, tmp_path / "out", "--dry_run", "--format", "gptq").stdout
    notes = re.findall(rf"{re.escape(EDGE_LLM)}(.*)", plan)
    assert notes == ["does not hold experts of type nemotron_h from gptq: use vLLM"]


def test_a_chat_template_that_edge_llm_needs_is_missed(tmp_path):
    (note,) = edge_llm_notes(tmp_path, dense(384), template="", model_type="llama")
    assert note.startswith("needs a chat template")
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert not edge_llm_notes(tmp_path, dense(384), template="", model_type="llama")
    (tmp_path / "in" / "tokenizer_config.json").unlink()
    assert not edge_llm_notes(tmp_path, dense(384), template="", model_type="qwen3_asr")


@pytest.mark.parametrize("form", ["int4", *ENGINE_FORMATS])
def test_the_count_of_layers_that_edge_llm_reads_is_written_where_only_their_list_is_there(
    tmp_path, form
):
    config = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp", "attention"]}
    source = save_model(
        tmp_path / "in", {f"{LAYER}.mixer.up_proj.weight": random(64, 128)}, **config
    )
    quantize(source, tmp_path / "out", "--format", form)
    written = read_config(tmp_path / "out")
    assert written.get("num_hidden_layers") == (3 if form == "gptq" else None)

    quantize(tmp_path / "out", tmp_path / "back", "--restore")
    assert ("num_hidden_layers" in read_config(tmp_path / "back")) == (form == "gptq")
