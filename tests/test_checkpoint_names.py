"""Checkpoint, names: what is not merged, and wrappers of training (README: "It refuses what would come out wrong")."""

from __future__ import annotations

import pytest
import torch
from checkpoints import LAYER, PROJECTION, random, save_model, save_pickle
from conftest import FORMATS, assert_refused, quantize, run_cli
from folders import assert_same_tensors, read_tensors

# --- what is no merged model ------------------------------------------------------------------------------------------

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
    result = run_cli(save_model(tmp_path / "in", tensors), tmp_path / "out", "--format", form)
    assert_refused(result, f"'{name}'", UNMERGED[name])
    assert not (tmp_path / "out").exists()


def test_a_low_rank_update_is_refused_whatever_it_is_called(tmp_path):
    update = {f"{LAYER}.first.weight": random(4, 128), f"{LAYER}.second.weight": random(64, 4)}
    source = save_model(tmp_path / "in", {f"{LAYER}.weight": random(64, 128)} | update)
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
    quantize(save_model(tmp_path / "in", PROJECTION | {name: random(64, 128)}), tmp_path / "out")


def test_a_parametrized_convolution_is_a_models_own(tmp_path):
    tensors = PROJECTION | {"encoder.pos_conv.parametrizations.weight.original1": random(16, 8, 16)}
    quantize(
        save_model(tmp_path / "in", tensors), tmp_path / "out", "--format", "compressed-tensors"
    )


@pytest.mark.parametrize(
    "name", [f"{LAYER}.weight", "model.norm.weight", "model.layers.0.mlp.experts.up_proj"]
)
def test_weights_of_no_elements_are_refused(tmp_path, name):
    tensors = {"model.layers.0.mlp.up_proj.weight": random(64, 128), name: torch.empty(0)}
    assert_refused(
        run_cli(save_model(tmp_path / "in", tensors), tmp_path / "out"),
        f"'{name}'",
        "no elements",
        "ZeRO-3",
    )


# --- wrappers ---------------------------------------------------------------------------------------------------------

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
    tensors = {
        f"{LAYER}.weight": random(64, 128),
        "model.norm.weight": random(128),
        "lm_head.weight": random(96, 128),
    }
    wrapped = {wrapper + name: tensor for name, tensor in tensors.items()}
    for saved, folder in ((save_model, "a"), (save_pickle, "b")):
        plan = quantize(
            saved(tmp_path / folder, wrapped), tmp_path / f"{folder}_out", "--verify"
        ).stdout
        dropped = next(
            line for line in plan.splitlines() if "training wrapped around the model" in line
        )
        assert all(f"{part}." in dropped for part in wrapper.rstrip(".").split("."))
        quantize(save_model(tmp_path / f"{folder}_plain", tensors), tmp_path / f"{folder}_expected")
        assert_same_tensors(tmp_path / f"{folder}_out", tmp_path / f"{folder}_expected")


def test_wrappers_of_single_layers_are_dropped_too(tmp_path):
    tensors = {"model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight": random(64, 128)}
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == {f"{LAYER}.qweight", f"{LAYER}.scales"}


def test_an_averaged_model_loses_its_wrapper_and_its_counter_with_a_note(tmp_path):
    tensors = {f"module.{LAYER}.weight": random(64, 128), "n_averaged": torch.tensor(7)}
    assert (
        "left out 'n_averaged'"
        in quantize(save_model(tmp_path / "in", tensors), tmp_path / "out").stdout
    )
    assert read_tensors(tmp_path / "out").keys() == {f"{LAYER}.qweight", f"{LAYER}.scales"}


def test_two_copies_that_differ_in_the_wrapper_are_refused(tmp_path):
    tensors = {f"{LAYER}.weight": random(64, 128), f"_orig_mod.{LAYER}.weight": random(64, 128)}
    assert_refused(
        run_cli(save_model(tmp_path / "in", tensors), tmp_path / "out"),
        f"'_orig_mod.{LAYER}.weight'",
        "copies",
    )


def test_a_prefix_of_some_names_only_is_part_of_the_model(tmp_path):
    tensors = {"module.up.weight": random(64, 128), "other.up.weight": random(64, 128)}
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out")
    assert "module.up.qweight" in read_tensors(tmp_path / "out")


@pytest.mark.parametrize(
    "nested", [{"thinker_config": {}}, {"text_config": {}, "vision_config": {}}], ids=str
)
def test_a_prefix_is_the_models_own_where_config_json_has_configs_for_its_parts(tmp_path, nested):
    tensors = {
        f"thinker.{LAYER}.weight": random(64, 128),
        "thinker.lm_head.weight": random(96, 128),
    }
    quantize(save_model(tmp_path / "in", tensors, **nested), tmp_path / "out")
    assert f"thinker.{LAYER}.qweight" in read_tensors(tmp_path / "out")


def test_a_prefix_is_the_models_own_where_more_than_a_language_model_is_behind_it(tmp_path):
    names = (f"thinker.{LAYER}", "thinker.lm_head", "thinker.visual.blocks.0.attn.proj")
    quantize(
        save_model(tmp_path / "in", {f"{name}.weight": random(96, 128) for name in names}),
        tmp_path / "out",
    )
    assert f"thinker.{LAYER}.qweight" in read_tensors(tmp_path / "out")
