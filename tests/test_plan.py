"""What is kept: by its entry in every engine, and by its role, told by shape and place."""

from __future__ import annotations

import json
import re

import pytest
import torch
from checkpoints import write_sparse_checkpoint
from conftest import assert_refused, quantize, read_tensors, refuse, run_cli, save_model
from small_models import BESIDE, FORMATS, INNER, MOE, PROJECTION, SEPARATE, E, H, is_kept, random, read_config, save
from tiny_nemotron import NANO_30B, nemotron_tensors

import quantize_int4 as q

# --- entries for what is kept ---------------------------------------------------------------------------------------

LANGUAGE = ["model.language_model.", "language_model.model.", "language_model.", "model."]
TOWER = ["model.vision_tower.", "vision_tower.", "model.visual.", "visual."]
ATTENTION = [f"layers.{layer}.self_attn.{p}_proj" for layer in range(2) for p in "qkvo"]


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize("tower", TOWER[1:3])
@pytest.mark.parametrize("kept", ["language", "one layer", "tower"])
def test_an_entry_matches_under_every_wrapper_and_no_packed_layer(tmp_path, form, language, tower, kept):
    tensors = {f"{prefix}{name}.weight": random(64, 128) for prefix in (language, tower) for name in ATTENTION}
    tensors[f"{language}embed_tokens.weight"] = random(48, 128)
    prefix = {"language": f"{language}layers", "one layer": f"{language}layers.1.", "tower": tower}[kept]
    options = ["--format", form, "--group_size", 64, "--exclude", f"^{re.escape(prefix)}.*_proj", "--verify"]
    quantize(save(tmp_path / "in", tensors), tmp_path / "out", *options)
    for name in ATTENTION:
        expected = kept == "language" or (kept == "one layer" and name.startswith("layers.1."))
        for wrapper in LANGUAGE:
            assert is_kept(tmp_path / "out", wrapper + name) == expected
        for wrapper in (tower, tower.removeprefix("model."), f"model.{tower.removeprefix('model.')}"):
            assert is_kept(tmp_path / "out", wrapper + name) == (kept == "tower")
    for wrapper in LANGUAGE:
        assert is_kept(tmp_path / "out", f"{wrapper}embed_tokens")


def test_kept_weights_with_embed_in_their_names_have_entries_too(tmp_path):
    tensors = {
        "model.embed_vision.embedding_projection.weight": random(64, 128),
        "model.layers.0.mlp.up_proj.weight": random(64, 128),
    }
    quantize(save(tmp_path / "in", tensors), tmp_path / "out", "--format", "compressed-tensors", "--group_size", 64)
    for wrapper in ("model.", "", "language_model.model."):
        assert is_kept(tmp_path / "out", f"{wrapper}embed_vision.embedding_projection")
        assert not is_kept(tmp_path / "out", f"{wrapper}layers.0.mlp.up_proj")


@pytest.mark.parametrize("kept", ["in_proj_a", "in_proj_z"])
def test_a_split_of_what_vllm_fuses_in_linear_attention_is_refused(tmp_path, kept):
    tensors = {f"model.layers.0.linear_attn.in_proj_{p}.weight": random(64, 128) for p in ("qkv", "z", "a", "b")}
    options = ["--format", "compressed-tensors", "--group_size", 64, "--exclude", kept]
    assert_refused(run_cli(save(tmp_path / "in", tensors), tmp_path / "out", *options), "engines fuse", kept)


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
    plan = quantize(save(tmp_path / "in", tensors), tmp_path / "out", "--format", form, "--group_size", 64, "--verify")
    assert "experts are kept" not in plan.stdout
    assert not is_kept(tmp_path / "out", f"{MOE}.experts")
    assert not is_kept(tmp_path / "out", f"{MOE}.experts.0.up_proj")
    assert is_kept(tmp_path / "out", f"{MOE}.experts.router") == ("router" in name)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("place", ["model.mm_projector", "model.layers.0.mlp"])
def test_of_linear_layers_in_a_row_the_entry_keeps_the_narrow_one_alone(tmp_path, form, place):
    tensors = {f"{place}.0.weight": random(64, 48), f"{place}.2.weight": random(64, 128)} | PROJECTION
    quantize(save(tmp_path / "in", tensors), tmp_path / "out", "--format", form, "--group_size", 64, "--verify")
    assert is_kept(tmp_path / "out", f"{place}.0")
    assert not is_kept(tmp_path / "out", f"{place}.2")


def test_the_entry_lm_head_stands_for_no_module_inside_it(tmp_path):
    tensors = PROJECTION | {"lm_head.dense.weight": random(64, 128), "lm_head.weight": random(96, 128)}
    options = ["--format", "compressed-tensors", "--group_size", 64, "--verify"]
    quantize(save(tmp_path / "in", tensors), tmp_path / "out", *options)
    assert "lm_head.dense.weight_packed" in read_tensors(tmp_path / "out")


@pytest.mark.parametrize("entry", ["re:.*experts$", "re:.*experts.*", f"{MOE}.experts.1.up_proj"])
def test_verify_finds_an_entry_that_keeps_packed_experts(tmp_path, entry):
    source = save(tmp_path / "in", BESIDE | SEPARATE)
    quantize(source, tmp_path / "out", "--format", "compressed-tensors", "--group_size", 64)
    config = read_config(tmp_path / "out")
    config["quantization_config"]["ignore"].append(entry)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    result = run_cli(source, tmp_path / "out", "--verify")
    assert_refused(result, "found")
    assert re.search(rf"the entry .* keeps '{re.escape(MOE)}.experts.1.up_proj', which is packed", result.stdout)


WORDS_COUNT = 512

# --- roles ----------------------------------------------------------------------------------------------------------


def kept_of(folder, tensors, form, **config):
    """The modules of 2-D weights that are kept."""
    options = ["--format", form, "--group_size", 64]
    quantize(save(folder / "in", PROJECTION | tensors, **config), folder / "out", *options)
    return {name.removesuffix(".weight") for name in read_tensors(folder / "out") if name.endswith(".weight")}


EMBEDDINGS = ["shared", "model.shared", "encoder.tok", "transformer.word_table", "model.embed_tokens.0"]
HEADS = ["transformer.output_layer", "output", "language_model.output", "model.layers.9.shared_head.head", "lm_heads.0"]


@pytest.mark.parametrize("config", [{"vocab_size": WORDS_COUNT}, {"text_config": {"vocab_size": WORDS_COUNT}}], ids=str)
@pytest.mark.parametrize("name", EMBEDDINGS + HEADS)
def test_embeddings_and_heads_are_told_by_their_rows(tmp_path, name, config):
    weight = {f"{name}.weight": random(WORDS_COUNT, H)}
    assert kept_of(tmp_path / "engine", weight, "compressed-tensors", hidden_size=H, **config) == {name}
    assert kept_of(tmp_path / "int4", weight, "int4", hidden_size=H, **config) == ({name} - set(HEADS))


@pytest.mark.parametrize("name", ["decoder.block.0.layer.0.SelfAttention.relative_attention_bias", "input_embeds.1"])
@pytest.mark.parametrize("form", FORMATS)
def test_embeddings_of_other_things_than_words_are_kept(tmp_path, form, name):
    assert kept_of(tmp_path, {f"{name}.weight": random(32, H)}, form) == {name}


def test_an_embedding_with_a_few_rows_more_than_there_are_words_is_kept(tmp_path):
    tensors = {"decoder.tok.weight": random(WORDS_COUNT + 2, H)}
    assert kept_of(tmp_path, tensors, "int4", vocab_size=WORDS_COUNT, hidden_size=H) == {"decoder.tok"}


LINEAR = {
    "time_embed.0": {"time_embed.0.weight": random(64, H), "time_embed.0.bias": random(64)},
    "model.layers.0.mlp.shared": {"model.layers.0.mlp.shared.weight": random(64, H)},
    "model.layers.0.mlp.gate": {"model.layers.0.mlp.gate.weight": random(2 * H, H)},
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_layer_that_is_called_like_something_else_is_quantized(tmp_path, name):
    assert kept_of(tmp_path, LINEAR[name], "compressed-tensors") == set()


def test_a_head_is_told_by_the_rows_of_the_embedding_where_the_config_says_nothing(tmp_path):
    tensors = {"model.embed_tokens.weight": random(WORDS_COUNT, H), "model.unembedding.weight": random(WORDS_COUNT, H)}
    assert kept_of(tmp_path, tensors, "gptq") == {"model.embed_tokens", "model.unembedding"}


COINCIDENCES = [
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.self_attn.q_proj",
    "encoder.block.0.layer.1.DenseReluDense.wi",
    "model.multi_modal_projector.linear_1",
    "model.visual.merger.mlp.0",
]


@pytest.mark.parametrize("name", COINCIDENCES)
def test_a_projection_with_as_many_rows_as_there_are_words_is_quantized(tmp_path, name):
    tensors = {f"{name}.weight": random(WORDS_COUNT, H), "model.embed_tokens.weight": random(WORDS_COUNT, H)}
    kept = kept_of(tmp_path, tensors, "compressed-tensors", vocab_size=WORDS_COUNT, hidden_size=H)
    assert kept == {"model.embed_tokens"}


def test_a_weight_with_as_many_rows_as_there_are_positions_is_quantized(tmp_path):
    tensors = {"model.embed_positions.weight": random(WORDS_COUNT, H), "model.aligner.weight": random(WORDS_COUNT, H)}
    assert kept_of(tmp_path, tensors, "int4") == {"model.embed_positions"}


def test_a_weight_of_another_width_than_the_embedding_is_no_head(tmp_path):
    tensors = {"model.aligner.weight": random(WORDS_COUNT, 128), "model.embed_tokens.weight": random(WORDS_COUNT, H)}
    assert kept_of(tmp_path, tensors, "compressed-tensors", vocab_size=WORDS_COUNT) == {"model.embed_tokens"}


ROUTERS = ["mlp.gate", "mlp.router.layer", "mlp.wg", "mlp.expert_selector", "mlp.router_proj", "mlp.switch.classifier"]


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_of_every_spelling_are_kept_for_engines(tmp_path, form, name):
    experts = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": random(64, H) for e in range(8)}
    tensors = experts | {f"model.layers.0.{name}.weight": random(8, H)}
    assert kept_of(tmp_path, tensors, form) == {f"model.layers.0.{name}"}


NO_ROUTERS = ["self_attn.k_proj", "mlp.shared_experts.down_proj", "mlp.shared_expert.up_proj", "mlp.fc1_latent_proj"]


def test_a_square_matrix_beside_as_many_experts_is_no_router(tmp_path):
    experts = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": random(64, 128) for e in range(128)}
    tensors = experts | {"model.layers.0.mlp.mixer.weight": random(128, 128)}
    assert kept_of(tmp_path, tensors, "compressed-tensors") == set()


@pytest.mark.parametrize("name", NO_ROUTERS)
def test_a_projection_with_as_many_rows_as_there_are_experts_is_quantized(tmp_path, name):
    experts = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": random(64, H) for e in range(8)}
    tensors = experts | {f"model.layers.0.{name}.weight": random(8, H), "model.layers.0.mlp.gate.weight": random(8, H)}
    assert kept_of(tmp_path, tensors, "compressed-tensors") == {"model.layers.0.mlp.gate"}


def test_quantize_embeddings_means_those_told_by_their_rows_too(tmp_path):
    source = save(tmp_path / "in", PROJECTION | {"shared.weight": random(WORDS_COUNT, H)}, vocab_size=WORDS_COUNT)
    quantize(source, tmp_path / "out", "--quantize_embeddings")
    assert "shared.qweight" in read_tensors(tmp_path / "out")


def test_an_exclude_pattern_that_matches_nothing_is_refused(model, tmp_path):
    for pattern, shown in (("lm_heda", "lm_heda"), (r"lm\.heda", r"'lm\.heda'")):
        refuse(model, tmp_path / "out", f"--exclude {shown} matches none", options=["--exclude", pattern])


def test_a_config_with_a_quantization_config_is_refused(model, tmp_path):
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    refuse(model, tmp_path / "out", "config.json", "already quantized")


@pytest.mark.parametrize(
    "tensors",
    [
        {"m.qweight": torch.ones(4, 16, dtype=torch.int32)},
        {"m.weight": torch.ones(4, 128, dtype=torch.int8)},
        {"m.weight": torch.ones(4, 128).to(torch.float8_e4m3fn)},
        {"m.weight": torch.ones(4, 128), "m.weight_scale_inv": torch.ones(1, 1)},
    ],
    ids=["qweight", "int8", "float8", "weight_scale_inv"],
)
def test_a_checkpoint_of_quantized_tensors_is_refused(tmp_path, tensors):
    refuse(save_model(tmp_path / "in", tensors), tmp_path / "out", "already quantized", "'m.")


def test_our_own_output_as_input_is_refused(model, tmp_path):
    quantize(model, tmp_path / "out")
    refuse(tmp_path / "out", tmp_path / "again", "already quantized")


def test_an_output_name_that_the_checkpoint_has_already_is_refused(tmp_path):
    folder = save_model(tmp_path / "in", {"m.weight": torch.ones(4, 128), "m.scales": torch.ones(4)})
    refuse(folder, tmp_path / "out", "'m.scales'")


def test_exclude_keeps_what_any_of_its_patterns_finds(tiny, tmp_path):
    result = quantize(tiny, tmp_path / "out", "--exclude", r"shared_experts", "--exclude", r"^lm_head")
    output = read_tensors(tmp_path / "out")
    assert "lm_head.weight" in output
    assert "backbone.layers.3.mixer.shared_experts.up_proj.weight" in output
    assert "backbone.layers.3.mixer.experts.0.up_proj.weight" not in output
    assert "--exclude shared_experts" in result.stdout


def test_embeddings_are_kept_unless_asked_for(tiny, tmp_path):
    quantize(tiny, tmp_path / "default")
    quantize(tiny, tmp_path / "asked", "--quantize_embeddings")
    assert "backbone.embeddings.weight" in read_tensors(tmp_path / "default")
    assert "backbone.embeddings.qweight" in read_tensors(tmp_path / "asked")


@pytest.mark.parametrize(
    ("name", "is_embedding"),
    [
        ("model.embed_tokens.weight", True),
        ("backbone.embeddings.weight", True),
        ("transformer.wte.weight", True),
        ("bert.embeddings.word_embeddings.weight", True),
        ("wpe.weight", True),
        ("embed_out.weight", False),  # GPT-NeoX's head
        ("vision.patch_embed.proj.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_embeddings_are_known_by_the_last_part_of_their_modules_name(name, is_embedding):
    assert bool(q.EMBEDDING_PATTERN.search(name)) == is_embedding


def plan_counts(stdout: str) -> tuple[int, int, int]:
    """Tensors in, quantized and kept, from the printed plan."""
    rows = {line[:35].strip(): line[35:].split() for line in stdout.splitlines()}
    return tuple(int(rows[row][0].replace(",", "")) for row in ("input", "quantized to 4 bits", "kept as they are"))


def test_the_full_nemotron_inventory_plans_as_6028_quantized(tmp_path):
    write_sparse_checkpoint(tmp_path / "in", nemotron_tensors(NANO_30B), shards=13)
    result = quantize(tmp_path / "in", tmp_path / "out", "--dry_run")
    assert plan_counts(result.stdout) == (6243, 6028, 215)
    assert "63.2 GB" in result.stdout
    assert "2,944" in result.stdout  # padded
    assert not (tmp_path / "out").exists()
    result = quantize(tmp_path / "in", tmp_path / "out", "--dry_run", "--quantize_embeddings")
    assert plan_counts(result.stdout) == (6243, 6029, 214)
