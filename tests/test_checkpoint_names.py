"""Only a whole merged model is converted; what is missing is said; what engines compute with is what is stored."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_refused, quantize, read_tensors, run_cli
from reference import pack_words, reference_quantize
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
