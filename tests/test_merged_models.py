"""Only a whole merged model is converted; what is missing is said; what engines compute with is what is stored."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import assert_refused, quantize, read_tensors, run_cli
from reference import pack_words, reference_quantize
from safetensors.torch import save_file
from small_models import FORMATS, LAYER, PROJECTION, assert_same_tensors, random, read_config, save, save_pickle

# --- what is no merged model ----------------------------------------------------------------------------------------

UNMERGED = {
    f"{LAYER}.lora_A.weight": "merge",
    f"{LAYER}.lora_A.default.weight": "merge",
    f"{LAYER}.lora_B.weight": "merge",
    f"{LAYER}.lora_magnitude_vector.default.weight": "merge",
    f"{LAYER}.lora_magnitude_vector": "merge",
    "model.embed_tokens.lora_embedding_A": "merge",
    f"{LAYER}.base_layer.weight": "merge",
    "lm_head.modules_to_save.default.weight": "merge",
    "lm_head.original_module.weight": "merge",
    "base_model.model.model.norm.weight": "merge",
    f"{LAYER}.hada_w1_a": "merge",
    f"{LAYER}.oft_R.default.weight": "merge",
    f"{LAYER}.lora.down.weight": "merge",
    f"{LAYER}.loraA.weight": "merge",
    f"{LAYER}.lora_a.weight": "merge",
    f"{LAYER}_lora.A.weight": "merge",
    f"{LAYER}.adapter_A.weight": "merge",
    f"{LAYER}.vblora_logits_A.default": "merge",
    "model.layers.0.output.adapters.task.adapter_down.0.weight": "merge",
    "prompt_encoder.default.embedding.weight": "merge",
    f"{LAYER}.weight_orig": "prune.remove",
    f"{LAYER}.weight_mask": "prune.remove",
    f"{LAYER}.parametrizations.weight.original": "remove_parametrizations",
    "_fsdp_wrapped_module._flat_param": "FULL_STATE_DICT",
    "model.layers.0._fsdp_wrapped_module._flat_param": "FULL_STATE_DICT",
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", UNMERGED)
def test_what_is_not_merged_is_refused_by_name_with_what_to_do(tmp_path, name, form):
    tensors = {f"{LAYER}.weight": random(64, 128), name: random(8, 128)}
    result = run_cli(save(tmp_path / "in", tensors), tmp_path / "out", "--format", form)
    assert_refused(result, f"'{name}'", UNMERGED[name])
    assert not (tmp_path / "out").exists()


def test_a_low_rank_update_is_refused_whatever_it_is_called(tmp_path):
    update = {f"{LAYER}.first.weight": random(4, 128), f"{LAYER}.second.weight": random(64, 4)}
    source = save(tmp_path / "in", {f"{LAYER}.weight": random(64, 128)} | update)
    assert_refused(run_cli(source, tmp_path / "out"), f"'{LAYER}.first.weight'", "merge")


OWN = [
    "prompt_encoder.point_embed.weight",
    "model.layers.0.att.w_lora_a.weight",
    "model.layers.0.att.w_lora.lora.0.weight",
    "model.layers.0.mlp.base_layer.w.weight",
    "model.layers.0.self_attn.vera_gate.weight",
]


@pytest.mark.parametrize("name", OWN)
def test_a_module_of_the_model_that_is_called_like_an_adapter_is_none(tmp_path, name):
    quantize(save(tmp_path / "in", PROJECTION | {name: random(64, 128)}), tmp_path / "out")


def test_a_parametrized_convolution_is_a_models_own(tmp_path):
    tensors = PROJECTION | {"encoder.pos_conv.parametrizations.weight.original1": random(16, 8, 16)}
    quantize(save(tmp_path / "in", tensors), tmp_path / "out", "--format", "compressed-tensors")


@pytest.mark.parametrize("name", [f"{LAYER}.weight", "model.norm.weight", "model.layers.0.mlp.experts.up_proj"])
def test_weights_of_no_elements_are_refused(tmp_path, name):
    tensors = {"model.layers.0.mlp.up_proj.weight": random(64, 128), name: torch.empty(0)}
    assert_refused(run_cli(save(tmp_path / "in", tensors), tmp_path / "out"), f"'{name}'", "no elements", "ZeRO-3")


WRAPPED = [
    "_orig_mod.",
    "module.",
    "module._orig_mod.",
    "_forward_module.",
    "module.module.",
    "policy.",
    "model.",
    "a.b.",
]


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrapper_of_training_before_every_name_is_dropped_with_a_note(tmp_path, wrapper):
    tensors = {f"{LAYER}.weight": random(64, 128), "model.norm.weight": random(128), "lm_head.weight": random(96, 128)}
    wrapped = {wrapper + name: tensor for name, tensor in tensors.items()}
    for saved, folder in ((save, "a"), (save_pickle, "b")):
        plan = quantize(saved(tmp_path / folder, wrapped), tmp_path / f"{folder}_out", "--verify").stdout
        dropped = next(line for line in plan.splitlines() if "training wrapped around the model" in line)
        assert all(f"{part}." in dropped for part in wrapper.rstrip(".").split("."))
        quantize(save(tmp_path / f"{folder}_plain", tensors), tmp_path / f"{folder}_expected")
        assert_same_tensors(tmp_path / f"{folder}_out", tmp_path / f"{folder}_expected")


@pytest.mark.parametrize("nested", [{"thinker_config": {}}, {"text_config": {}, "vision_config": {}}], ids=str)
def test_a_prefix_is_the_models_own_where_config_json_has_configs_for_its_parts(tmp_path, nested):
    tensors = {f"thinker.{LAYER}.weight": random(64, 128), "thinker.lm_head.weight": random(96, 128)}
    quantize(save(tmp_path / "in", tensors, **nested), tmp_path / "out")
    assert f"thinker.{LAYER}.qweight" in read_tensors(tmp_path / "out")


def test_a_prefix_is_the_models_own_where_more_than_a_language_model_is_behind_it(tmp_path):
    names = (f"thinker.{LAYER}", "thinker.lm_head", "thinker.visual.blocks.0.attn.proj")
    quantize(save(tmp_path / "in", {f"{name}.weight": random(96, 128) for name in names}), tmp_path / "out")
    assert f"thinker.{LAYER}.qweight" in read_tensors(tmp_path / "out")


def test_an_averaged_model_loses_its_wrapper_and_its_counter_with_a_note(tmp_path):
    tensors = {f"module.{LAYER}.weight": random(64, 128), "n_averaged": torch.tensor(7)}
    assert "left out 'n_averaged'" in quantize(save(tmp_path / "in", tensors), tmp_path / "out").stdout
    assert read_tensors(tmp_path / "out").keys() == {f"{LAYER}.qweight", f"{LAYER}.scales"}


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module"])
def test_a_state_dict_inside_a_trainers_checkpoint_is_read(tmp_path, key):
    tensors = {f"{LAYER}.weight": random(64, 128)}
    save_pickle(tmp_path / "in", {key: tensors, "epoch": 3})
    assert f"only '{key}' is read; beside it are 'epoch'" in quantize(tmp_path / "in", tmp_path / "out").stdout


def test_a_checkpoint_of_another_ending_is_named_with_what_to_do(tmp_path):
    source = save_pickle(tmp_path / "in", {f"{LAYER}.weight": random(64, 128)})
    (source / "model.pth").rename(source / "last.ckpt")
    assert_refused(run_cli(source, tmp_path / "out"), "'last.ckpt'", "name it model.pth")


def test_wrappers_of_single_layers_are_dropped_too(tmp_path):
    tensors = {"model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight": random(64, 128)}
    quantize(save(tmp_path / "in", tensors), tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == {f"{LAYER}.qweight", f"{LAYER}.scales"}


def test_two_copies_that_differ_in_the_wrapper_are_refused(tmp_path):
    tensors = {f"{LAYER}.weight": random(64, 128), f"_orig_mod.{LAYER}.weight": random(64, 128)}
    assert_refused(run_cli(save(tmp_path / "in", tensors), tmp_path / "out"), f"'_orig_mod.{LAYER}.weight'", "copies")


def test_a_prefix_of_some_names_only_is_part_of_the_model(tmp_path):
    tensors = {"module.up.weight": random(64, 128), "other.up.weight": random(64, 128)}
    quantize(save(tmp_path / "in", tensors), tmp_path / "out")
    assert "module.up.qweight" in read_tensors(tmp_path / "out")


@pytest.mark.parametrize("options", [["--exclude", "."], ["--group_size", 256]], ids=str)
def test_a_run_that_would_quantize_nothing_is_refused(tmp_path, options):
    source = save(tmp_path / "in", {f"{LAYER}.weight": random(64, 128)})
    assert_refused(run_cli(source, tmp_path / "out", *options), "no weight", "would be quantized", LAYER)


# --- what is missing ------------------------------------------------------------------------------------------------


def layers(*numbers):
    return {f"model.layers.{number}.self_attn.q_proj.weight": random(64, 128) for number in numbers}


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


def write_index(folder, names, file):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


@pytest.mark.parametrize("saved", [save, save_pickle], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("complete", [True, False])
def test_an_index_of_missing_shards_beside_whole_weights_may_be_stale(tmp_path, complete, saved):
    source = saved(tmp_path / "in", layers(0, 1))
    names = list(layers(0, 1) if complete else layers(0, 1, 2))
    write_index(source, names, "model-00001-of-00002.safetensors")
    result = run_cli(source, tmp_path / "out")
    assert_refused(result, "model-00001-of-00002.safetensors", "missing")
    assert ("may be stale" in result.stderr) == complete
    if complete:  # follow the advice
        (source / "model.safetensors.index.json").unlink()
        quantize(source, tmp_path / "out")


def test_consolidated_weights_beside_shards_are_left_out_by_name(tmp_path):
    source = save(tmp_path / "in", layers(0, 1))
    save_file({"layers.0.attention.wq.weight": random(64, 128)}, source / "consolidated-00001-of-00001.safetensors")
    plan = quantize(source, tmp_path / "out").stdout
    assert re.search(r"^Left out: .*consolidated-00001-of-00001.safetensors", plan, re.MULTILINE)
    assert not any("wq" in name for name in read_tensors(tmp_path / "out"))


def test_consolidated_weights_alone_are_the_model(tmp_path):
    source = save(tmp_path / "in", layers(0))
    (source / "model.safetensors").rename(source / "consolidated.safetensors")
    quantize(source, tmp_path / "out")


@pytest.mark.parametrize("other", ["model-00001-of-00001.safetensors", "ema.safetensors"])
def test_two_sets_of_weights_without_an_index_are_refused(tmp_path, other):
    source = save(tmp_path / "in", layers(0))
    save_file(layers(1), source / other)
    assert_refused(run_cli(source, tmp_path / "out"), "model.safetensors", other.replace("00001-", "*-"), "two sets")


# --- Conv1D, scales, the mark of int4 -------------------------------------------------------------------------------

GPT2 = {
    "h.0.attn.c_attn.weight": random(128, 384),
    "h.0.mlp.c_fc.weight": random(128, 512),
    "wte.weight": random(96, 128),
}


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {}], ids=["by type", "by shape"])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_conv1d_is_refused_for_engines(tmp_path, form, config):
    result = run_cli(save(tmp_path / "in", GPT2, **config), tmp_path / "out", "--format", form)
    assert_refused(result, "2 weights are GPT-2's Conv1D", "'h.0.attn.c_attn.weight'")


def test_int4_says_along_which_axis_the_groups_of_conv1d_run(tmp_path):
    plan = quantize(save(tmp_path / "in", GPT2, model_type="gpt2"), tmp_path / "out").stdout
    assert "2 weights are GPT-2's Conv1D and lie as (in, out): their groups run along the outputs" in plan


def test_a_c_attn_that_lies_as_out_in_is_no_conv1d(tmp_path):
    tensors = {"h.0.attn.c_attn.weight": random(384, 128)}
    quantize(save(tmp_path / "in", tensors, model_type="qwen"), tmp_path / "out", "--format", "compressed-tensors")


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({}, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_scales_are_rounded_to_what_engines_compute_in_before_the_codes_are_made(tmp_path, config, stored, scale):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(11))
    source = save(tmp_path / "in", {f"{LAYER}.weight": weight}, **config)
    quantize(
        source, tmp_path / "out", "--format", "compressed-tensors", "--group_size", 64, "--scale", scale, "--verify"
    )
    output = read_tensors(tmp_path / "out")
    assert output[f"{LAYER}.weight_scale"].dtype == stored
    if scale == "absmax":
        codes, scales = reference_quantize(weight, 64, stored)
        assert output[f"{LAYER}.weight_scale"].tolist() == scales
        words = torch.tensor([pack_words([code + 8 for code in row]) for row in codes], dtype=torch.int32)
        assert torch.equal(output[f"{LAYER}.weight_packed"], words)


def test_transformers_stops_at_an_int4_folder(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    quantize(tiny, tmp_path / "out")
    mark = read_config(tmp_path / "out")["quantization_config"]
    assert "no engine loads" in mark["about"]
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_int4_folder_is_no_source_for_another_run(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    assert_refused(run_cli(tmp_path / "out", tmp_path / "again"), "already quantized")


def test_int4_without_a_config_json_writes_none(tmp_path):
    source = save(tmp_path / "in", PROJECTION)
    (source / "config.json").unlink()
    quantize(source, tmp_path / "out", "--verify")
    assert not (tmp_path / "out" / "config.json").exists()
