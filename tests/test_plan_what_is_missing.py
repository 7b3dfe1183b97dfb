"""What is missing by config.json or by the other layers: warned of, or refused where loaders would make it up."""

from __future__ import annotations

import pytest
from conftest import assert_refused, quantize, run_cli
from small_models import layers, random, save


@pytest.mark.parametrize(
    ("numbers", "missing"), [((0, 2), "'model.layers.1'"), ((0, 1), "'model.layers.2'"), ((0, 1, 2, 3), None)]
)
@pytest.mark.parametrize("nested", [False, True])
def test_missing_layers_are_warned_of(tmp_path, numbers, missing, nested):
    config = {"num_hidden_layers": 3}
    tower = {f"visual.blocks.{number}.proj.weight": random(64, 128) for number in range(5)}
    source = save(tmp_path / "in", layers(*numbers) | tower, **({"text_config": config} if nested else config))
    warnings = [line for line in quantize(source, tmp_path / "out").stdout.splitlines() if line.startswith("WARNING:")]
    assert len(warnings) == bool(missing)
    assert not missing or missing in warnings[0]


def warnings_of(tmp_path, tensors, **config):
    source = save(tmp_path / "in", tensors, **config)
    return [line for line in quantize(source, tmp_path / "out").stdout.splitlines() if line.startswith("WARNING:")]


def stacked_layers(container, count):
    return {f"{container}.{number}.fc1.weight": random(64, 128) for number in range(count)}


UNEVEN = {
    "bart": ("model.encoder.layers", "model.decoder.layers", {"encoder_layers": 4}),
    "t5": ("encoder.block", "decoder.block", {"num_layers": 4}),
}


@pytest.mark.parametrize("family", UNEVEN)
@pytest.mark.parametrize("counts", [(4, 2), (3, 2), (4, 1)])
def test_the_layers_of_an_encoder_and_of_a_decoder_are_counted_apart(tmp_path, family, counts):
    encoder, decoder, config = UNEVEN[family]
    config |= {"decoder_layers": 2} if family == "bart" else {"num_decoder_layers": 2}
    tensors = stacked_layers(encoder, counts[0]) | stacked_layers(decoder, counts[1])
    warnings = warnings_of(tmp_path, tensors, **config)
    assert len(warnings) == (counts != (4, 2))
    assert not warnings or (f"'{encoder}.3'" if counts[0] == 3 else f"'{decoder}.1'") in warnings[0]


@pytest.mark.parametrize("key", ["num_layers", "n_layers", "n_layer"])
def test_layers_are_counted_whatever_the_config_calls_them(tmp_path, key):
    assert "'h.2'" in warnings_of(tmp_path, stacked_layers("h", 2), **{key: 3})[0]


def test_nothing_is_said_of_an_encoder_that_a_decoder_does_without(tmp_path):
    assert not warnings_of(tmp_path, stacked_layers("model.decoder.layers", 2), num_hidden_layers=2)


def test_nothing_is_said_of_layers_that_a_model_shares(tmp_path):
    tensors = stacked_layers("encoder.albert_layer_groups", 1)
    assert not warnings_of(tmp_path, tensors, num_hidden_layers=12, num_hidden_groups=1)


def whole_model():
    tensors = {f"model.layers.{n}.self_attn.{p}_proj.weight": random(64, 128) for n in range(4) for p in "qkvo"}
    return tensors | {
        f"model.layers.{n}.mlp.experts.{e}.{p}_proj.weight": random(64, 128)
        for n in range(1, 4)
        for e in range(4)
        for p in ("up", "down")
    }


LOST = {
    "model.layers.2.self_attn.k_proj.weight": "'model.layers.2.self_attn.k_proj'",
    "model.layers.3.mlp.experts.1.up_proj.weight": "'model.layers.3.mlp.experts.1.up_proj'",
    "model.layers.1.mlp.experts.2.": "'model.layers.1.mlp.experts.2'",
    "model.layers.1.mlp.experts.3.": "'model.layers.1.mlp.experts.3'",
}


@pytest.mark.parametrize("lost", LOST)
def test_single_weights_and_experts_that_are_missing_are_warned_of(tmp_path, lost):
    tensors = {name: tensor for name, tensor in whole_model().items() if not name.startswith(lost)}
    warnings = warnings_of(tmp_path, tensors, num_experts=4)
    assert len(warnings) == 1
    assert (
        f"WEIGHTS ARE MISSING: 1 that the others of their kind have are not in the checkpoint: {LOST[lost]}."
        in (warnings[0])
    )


@pytest.mark.parametrize("count", [2, 4])
def test_nothing_is_said_of_layers_of_several_kinds(tmp_path, count):
    tensors = {name: tensor for name, tensor in whole_model().items() if int(name.split(".")[2]) < count}
    tensors |= {"model.layers.0.self_attn.relative_attention_bias.weight": random(32, 4)}
    assert not warnings_of(tmp_path, tensors, num_experts=4)


UNTIED = {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}


def test_a_missing_head_is_refused_for_engines_and_warned_of_in_int4(tmp_path):
    source = save(tmp_path / "in", layers(0), **UNTIED)
    result = run_cli(source, tmp_path / "out", "--format", "compressed-tensors")
    assert_refused(result, "tie_word_embeddings false", "no head")
    assert "THE HEAD IS MISSING" in quantize(source, tmp_path / "out").stdout


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"lm_head.weight": random(96, 128)}, UNTIED),
        ({}, UNTIED | {"tie_word_embeddings": True}),
        ({}, UNTIED | {"architectures": ["LlamaModel"]}),
        (
            {"output.weight": random(96, 128), "model.tok_embeddings.weight": random(96, 128)},
            UNTIED | {"vocab_size": 96},
        ),
        ({}, UNTIED | {"text_config": {"tie_word_embeddings": True}}),
    ],
    ids=["head", "tied", "no head in this architecture", "head of another name", "tied in text_config"],
)
def test_nothing_is_said_of_a_head_that_is_there_or_not_due(tmp_path, tensors, config):
    source = save(tmp_path / "in", layers(0) | tensors, **config)
    assert "WARNING" not in quantize(source, tmp_path / "out", "--format", "compressed-tensors").stdout


def test_a_missing_embedding_is_refused_for_engines_and_warned_of_in_int4(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 96}
    source = save(tmp_path / "in", layers(0) | {"lm_head.weight": random(96, 128)}, **config)
    result = run_cli(source, tmp_path / "out", "--format", "compressed-tensors")
    assert_refused(result, "no embedding")
    assert "THE EMBEDDING IS MISSING" in quantize(source, tmp_path / "out").stdout
