"""Checkpoint, config.json: what is stale or odd in it (README: "It reads what you have")."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch
from checkpoints import BESIDE, PROJECTION, gated, save_model
from conftest import quantize, refuse, run_cli
from folders import folder_bytes, read_config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import quantize_int4 as q

# --- what says that the model is quantized ----------------------------------------------------------------------------

BITSANDBYTES = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
STALE = {  # entries of config.json, and what the note says of them
    "a merged QLoRA's": ({"quantization_config": BITSANDBYTES}, "(bitsandbytes)"),
    "without a method": ({"quantization_config": {"load_in_8bit": True}}, "(bitsandbytes)"),
    "empty": ({"quantization_config": {}}, "quantization_config (no method)"),
    "null": ({"quantization_config": None}, ""),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "(fp8)"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "(mxfp4)"),
    "no object": ({"quantization_config": ["awq"]}, "(no method)"),
    "a string": ({"quantization_config": "awq"}, "(awq)"),
    "older": ({"compression_config": {"config_groups": {}}}, "(compressed-tensors)"),
    "nested": (
        {"text_config": {"vocab_size": 9, "quantization_config": {"bits": 4}}},
        "text_config.quantization_config (4 bits) of config.json",
    ),
    "nested null": ({"text_config": {"vocab_size": 9, "quantization_config": None}}, ""),
    "in a list": ({"parts": [{"quantization_config": {}}]}, "parts.0.quantization_config"),
}


@pytest.mark.parametrize("form", ["int4", "compressed-tensors", "gptq"])
@pytest.mark.parametrize("case", STALE)
def test_a_stale_quantization_config_is_left_out_with_a_note_that_names_its_method(
    tmp_path, case, form
):
    entries, named = STALE[case]
    source = save_model(tmp_path / "in", PROJECTION, model_type="llama", **entries)
    plain = {key: value for key, value in entries.items() if "_config" not in key}
    if "nested" in case:
        plain["text_config"] = {"vocab_size": 9}
    if case == "in a list":
        plain["parts"] = [{}]
    twin = save_model(tmp_path / "twin", PROJECTION, model_type="llama", **plain)
    result = quantize(source, tmp_path / "out", "--format", form, "--verify")
    quantize(twin, tmp_path / "expected", "--format", form)
    assert folder_bytes(tmp_path / "out").keys() == folder_bytes(tmp_path / "expected").keys()
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        tmp_path / "expected" / "config.json"
    ).read_bytes()
    assert ("left out as stale, since no tensor is packed" in result.stdout) == bool(named)
    assert named in result.stdout


@pytest.mark.parametrize(
    ("name", "content", "method"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "(FP8)"),
        ("quantize_config.json", {"quant_method": "gptq", "bits": 4}, "(gptq)"),
        ("quant_config.json", {"w_bit": 4}, "(no method)"),
    ],
)
@pytest.mark.parametrize("form", ["int4", "compressed-tensors", "gptq"])
def test_a_stale_file_about_quantization_is_not_copied(tmp_path, form, name, content, method):
    source = save_model(tmp_path / "in", PROJECTION, model_type="llama")
    (source / name).write_text(json.dumps(content))
    result = quantize(source, tmp_path / "out", "--format", form, "--verify")
    assert f"left out as stale, since no tensor is packed: {name} {method}" in result.stdout
    written = tmp_path / "out" / name
    assert not written.exists() or json.loads(written.read_text()) != content


def test_what_a_file_about_quantization_holds_does_not_matter_where_it_is_stale(model, tmp_path):
    (model / "hf_quant_config.json").write_text("[")
    assert "hf_quant_config.json (not readable)" in quantize(model, tmp_path / "out").stdout


PACKED = {
    "bitsandbytes": {"m.weight": torch.ones(64, 1, dtype=torch.uint8)},
    "bitsandbytes, 8 bits": {"m.SCB": torch.ones(4)},
    "absmax": {"m.weight.absmax": torch.ones(4)},
    "mxfp4": {"m.experts.down_proj_blocks": torch.ones(2, 4, 2, 16, dtype=torch.uint8)},
    "mxfp4 scales": {"m.experts.down_proj_scales": torch.ones(2, 4, 2, dtype=torch.uint8)},
    "fp8": {"m.0.weight": torch.ones(4, 128).to(torch.float8_e4m3fn)},
    "scales of fp8": {"m.0.weight_scale_inv": torch.ones(1, 1)},
    "a static activation scale": {"m.0.input_scale": torch.ones(1)},
    "awq": {"m.0.qweight": torch.ones(4, 16, dtype=torch.int32)},
    "hqq": {"m.0.W_q": torch.ones(4, 16, dtype=torch.uint8)},
    "aqlm": {"m.0.codebooks": torch.ones(1, 16, 1, 8)},
    "torchao": {"m.0.weight:qdata": torch.ones(4, 16, dtype=torch.int8)},
    "spqr": {"m.0.dense_weights": torch.ones(64, dtype=torch.int64)},
    "spqr outliers": {"m.0.col_vals": torch.ones(4, dtype=torch.int32)},
    "quip": {"m.0.Qidxs": torch.ones(4, 16, dtype=torch.int64)},
}


@pytest.mark.parametrize("case", PACKED)
def test_one_packed_tensor_is_named_where_the_config_says_that_the_model_is_quantized(
    tmp_path, case
):
    tensors = PROJECTION | PACKED[case]
    source = save_model(tmp_path / "in", tensors, quantization_config={"quant_method": "xyz"})
    fragments = [f"tensor {next(iter(PACKED[case]))!r}", "quantization_config (xyz)", "already"]
    refuse(source, tmp_path / "out", *fragments)


WITHOUT_ENTRY = {
    "hqq": {"m.0.W_q": torch.ones(4, 16, dtype=torch.uint8)},
    "quanto": {"m.0.weight._data": torch.ones(4, 16, dtype=torch.int8)},
    "torchao": {"m.0._weight_qdata": torch.ones(4, 16, dtype=torch.int8)},
    "exl2": {"m.0.q_weight": torch.ones(4, 16, dtype=torch.int32)},
    "exl3": {"m.0.trellis": torch.ones(2, 4, 16, dtype=torch.int16)},
    "quip": {"m.0.Qidxs": torch.ones(4, 16, dtype=torch.int64)},
}


@pytest.mark.parametrize("case", WITHOUT_ENTRY)
def test_packed_weights_are_refused_by_name_where_no_entry_says_that_they_are(tmp_path, case):
    source = save_model(tmp_path / "in", PROJECTION | WITHOUT_ENTRY[case])
    name = next(iter(WITHOUT_ENTRY[case]))
    refuse(source, tmp_path / "out", f"tensor {name!r}", "already quantized")


def test_buffers_of_whole_numbers_do_not_make_a_model_quantized(tmp_path):
    buffers = {
        "m.position_ids": torch.arange(8).view(1, 8),
        "m.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "m.steps": torch.zeros((), dtype=torch.int32),
        "m.logit_scale": torch.ones(()),
        "m.layer_scale": torch.ones(4),
    }
    source = save_model(tmp_path / "in", PROJECTION | buffers, quantization_config={})
    assert "left out as stale" in quantize(source, tmp_path / "out").stdout


# --- odd values -------------------------------------------------------------------------------------------------------

ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["12", "1e3", "-1", " 4 ", "\ud800", 10**12, 2**63, 12.5, math.nan, [], {}]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)
KEYS = [key for keys in q.CONFIG_KEYS.values() for key in keys]
NESTS = ["text_config", "llm_config", "thinker_config", "vision_config", "quantization_config"]
OTHERS = ["auto_map", "quantization_config", "compression_config", "vision_config", *NESTS]
MODELS = {
    "experts": gated()[0] | BESIDE | {"lm_head.weight": BESIDE[next(iter(BESIDE))].clone()},
    "layers": PROJECTION | {"model.embed_tokens.weight": torch.ones(64, 256).bfloat16()},
}


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    model=st.sampled_from(sorted(MODELS)),
    form=st.sampled_from(sorted(q.FORMATS)),
    config=st.dictionaries(st.sampled_from([*KEYS, *OTHERS]), ODD, max_size=6),
    nested=st.dictionaries(st.sampled_from(NESTS), st.dictionaries(st.sampled_from(KEYS), ODD)),
)
# What Python's str.strip takes for a blank, and int does not.
@example(model="experts", form="int4", config={"vocab_size": "0\x1f"}, nested={})
def test_odd_values_in_config_json_are_a_plan_or_a_plain_refusal(
    tmp_path, model, form, config, nested
):
    folder = tmp_path / model
    if not folder.exists():
        save_model(folder, MODELS[model])
    (folder / "config.json").write_text(json.dumps(config | nested))
    args = q.parse_args([str(folder), str(tmp_path / "out"), "--format", form])
    try:
        with contextlib.closing(q.Checkpoint(folder)) as checkpoint:
            plan = q.plan_as_asked(args, checkpoint, False)
            q.print_next_steps(plan, args.output_dir, False)
    except q.QuantizeError as error:
        assert "\n" not in str(error)
    else:
        assert "config.json" in plan.other_files


@pytest.mark.parametrize("form", q.FORMATS)
@pytest.mark.parametrize("value", [5, "5", [5], 5.5, math.nan, None, True, {"a": 5}, [[5]], "five"])
def test_one_odd_value_under_every_key_is_no_unexpected_error(tmp_path, form, value):
    source = save_model(tmp_path / "in", MODELS["experts"], **dict.fromkeys(KEYS, value))
    result = run_cli(source, tmp_path / "out", "--format", form)
    assert "unexpected" not in result.stderr
    assert result.returncode in (0, 1)


def test_every_key_that_is_read_is_one_of_those_that_are_checked(tmp_path, monkeypatch):
    read, config_values = set(), q.config_values

    def note(config, *keys):
        read.update(keys)
        return config_values(config, *keys)

    monkeypatch.setattr(q, "config_values", note)
    monkeypatch.setattr(q, "odd_config_values", lambda config: [])
    for model, form in (("experts", "int4"), ("layers", "gptq"), ("layers", "compressed-tensors")):
        entries = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
        folder = save_model(tmp_path / model, MODELS[model], **entries)
        args = q.parse_args([str(folder), str(tmp_path / "out"), "--format", form])
        with contextlib.closing(q.Checkpoint(folder)) as checkpoint:
            plan = q.plan_as_asked(args, checkpoint, False)
            q.print_next_steps(plan, args.output_dir, False)
    assert {"vocab_size", "num_hidden_layers", "num_experts", "architectures"} <= read
    assert read <= set(KEYS)


@pytest.mark.parametrize("value", [4, "4", " 4 ", 4.0, [4], [4, 4]])
def test_numbers_count_however_they_are_written(tmp_path, value):
    source = save_model(tmp_path / "in", PROJECTION, num_hidden_layers=value)
    plan = quantize(source, tmp_path / "out", "--dry_run").stdout
    assert "LAYERS ARE MISSING: 3 of 4" in plan
    assert "not of the kind" not in plan


@pytest.mark.parametrize("value", ["four", "4.0", "4e0", -4, 4.5, 10**12, {"a": 4}, True, "\u0664"])
def test_a_value_that_is_not_understood_is_named_in_a_note(tmp_path, value):
    source = save_model(tmp_path / "in", PROJECTION, num_hidden_layers=value)
    plan = quantize(source, tmp_path / "out").stdout
    assert f"are not used: num_hidden_layers {json.dumps(value)}" in plan
    assert "LAYERS ARE MISSING" not in plan
    assert read_config(tmp_path / "out")["num_hidden_layers"] == value


def test_a_class_that_is_a_string_counts_as_a_list_of_one(tmp_path):
    entries = {"architectures": "LlamaForCausalLM", "tie_word_embeddings": False}
    source = save_model(tmp_path / "in", PROJECTION, **entries)
    refuse(source, tmp_path / "out", "no head", options=["--format", "gptq"])


def test_half_of_a_surrogate_pair_is_written_as_it_was(tmp_path):
    source = save_model(tmp_path / "in", PROJECTION, note="a\ud800b")
    quantize(source, tmp_path / "out", "--verify")
    assert read_config(tmp_path / "out")["note"] == "a\ud800b"


@pytest.mark.parametrize("depth", [200, 100_000])
def test_a_config_that_is_nested_too_deep_is_refused(model, tmp_path, depth):
    (model / "config.json").write_text('{"a":' + "[" * depth + "]" * depth + "}")
    refuse(model, tmp_path / "out", "config.json: objects and lists nested more than 100 deep")
