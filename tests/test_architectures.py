"""Any checkpoint comes out whole and right, or is refused: stacks of experts, roles by shape and place, what is kept by
name in every engine, and what is no merged model."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from conftest import assert_refused, folder_bytes, quantize, read_tensors, run_cli
from reference import pack_words, reference_quantize
from safetensors.torch import save_file

SEEDED = torch.Generator().manual_seed(11)
E, H, INNER = 4, 256, 128  # experts, hidden size, their width
FORMATS = ["int4", "compressed-tensors", "gptq"]
WORDS = {"int4": "qweight", "compressed-tensors": "weight_packed", "gptq": "qweight"}


def random(*shape):
    return torch.randn(shape, generator=SEEDED).bfloat16()


def save(folder, tensors, **config):
    """One model.safetensors and a config.json with these entries."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_pickle(folder, tensors, **config):
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "model.pth")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def patterns(folder):
    """The entries for kept layers of a folder in either engine format."""
    config = read_config(folder)["quantization_config"]
    return config["ignore"] if "ignore" in config else list(config["dynamic"])


def is_kept(folder, name):
    """Whether an engine that asks for `name` is told that it is kept."""
    return any(
        re.match(entry[3:], name) if entry.startswith("re:") else re.match(entry[2:], name)
        for entry in patterns(folder)
        if entry.startswith(("re:", "-:"))
    ) or (name in patterns(folder))


# --- stacks of experts ----------------------------------------------------------------------------------------------

MOE = "model.layers.0.mlp"
BESIDE = {f"{MOE}.gate.weight": random(E, H), "model.layers.0.self_attn.o_proj.weight": random(H, H)}


def gated(module=f"{MOE}.experts", names=("gate_proj", "up_proj", "down_proj")):
    """Stacks of gated experts, and the same as one weight an expert and projection."""
    gate, up, down = random(E, INNER, H), random(E, INNER, H), random(E, H, INNER)
    stacks = {f"{module}.gate_up_proj": torch.cat([gate, up], 1), f"{module}.down_proj": down}
    separate = {
        f"{module}.{expert}.{name}.weight": stack[expert].clone()
        for name, stack in zip(names, (gate, up, down))
        for expert in range(E)
    }
    return stacks, separate


def ungated(module="model.layers.0.mixer.experts"):
    up, down = random(E, INNER, H), random(E, H, INNER)
    stacks = {f"{module}.up_proj": up, f"{module}.down_proj": down}
    return stacks, {
        f"{module}.{expert}.{name}.weight": stack[expert].clone()
        for name, stack in (("up_proj", up), ("down_proj", down))
        for expert in range(E)
    }


def turned(experts):
    """The same experts in stacks of transposed matrices."""

    def transposed():
        stacks, separate = experts()
        return {name: stack.transpose(1, 2).contiguous() for name, stack in stacks.items()}, separate

    return transposed


SIZES = {"hidden_size": H, "moe_intermediate_size": INNER}
FAMILIES = {
    "qwen3_moe": (gated, {"model_type": "qwen3_moe"}),
    "deepseek_v3": (gated, {"model_type": "deepseek_v3", "n_routed_experts": E}),
    "in a text_config": (gated, {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text"}}),
    "nemotron_h": (ungated, {"model_type": "nemotron_h", **SIZES}),
    "nemotron_h without sizes": (ungated, {"model_type": "nemotron_h"}),
    "not gated, sizes in text_config": (ungated, {"model_type": "some", "text_config": SIZES}),
    "transposed": (turned(gated), {"model_type": "llama4_text"}),
    "transposed, not gated": (turned(ungated), {"model_type": "some", **SIZES}),
    "not gated, of a latent size": (
        ungated,
        {"model_type": "nemotron_h", "hidden_size": 2 * H, "moe_latent_size": H, "moe_intermediate_size": INNER},
    ),
}


def assert_same_tensors(folder, expected):
    output, wanted = read_tensors(folder), read_tensors(expected)
    assert output.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(output[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("saved", [save, save_pickle], ids=["safetensors", "pickle"])
def test_stacks_of_experts_give_what_separate_experts_give(tmp_path, family, form, saved):
    experts, config = FAMILIES[family]
    stacks, separate = experts()
    options = ["--format", form, "--group_size", 64, "--verify"]
    plan = quantize(saved(tmp_path / "stacked", BESIDE | stacks, **config), tmp_path / "out", *options).stdout
    quantize(save(tmp_path / "separate", BESIDE | separate, **config), tmp_path / "expected", *options)
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    assert re.search(rf"stacks of experts +2 +read as {len(separate)} weights", plan)


def test_an_experts_weight_is_its_own_slice_of_the_stack_with_gate_rows_first(tmp_path):
    stacks, _ = gated()
    quantize(save(tmp_path / "in", BESIDE | stacks, model_type="qwen3_moe"), tmp_path / "out", "--group_size", 64)
    output = read_tensors(tmp_path / "out")
    for expert in range(E):
        gate_up = stacks[f"{MOE}.experts.gate_up_proj"][expert]
        slices = {"gate_proj": gate_up[:INNER], "up_proj": gate_up[INNER:]}
        for name, weight in (slices | {"down_proj": stacks[f"{MOE}.experts.down_proj"][expert]}).items():
            codes, scales = reference_quantize(weight, 64, torch.float16)
            words = output[f"{MOE}.experts.{expert}.{name}.qweight"]
            assert words.tolist() == torch.tensor([pack_words(row) for row in codes], dtype=torch.int32).tolist()
            assert output[f"{MOE}.experts.{expert}.{name}.scales"].tolist() == scales


@pytest.mark.parametrize("options", [["--scale", "mse"], ["--scale", "mse", "--importance"]], ids=["mse", "importance"])
def test_stacked_experts_are_searched_and_weighed_as_separate_ones(tmp_path, options):
    stacks, separate = gated()
    if options[-1] == "--importance":
        vectors = {name.removesuffix(".weight"): torch.rand(tensor.shape[1]) for name, tensor in separate.items()}
        save_file(vectors, tmp_path / "importance.safetensors")
        options = [*options, tmp_path / "importance.safetensors"]
    for name, tensors in (("stacked", stacks), ("separate", separate)):
        source = save(tmp_path / name, BESIDE | tensors, model_type="qwen3_moe")
        quantize(source, tmp_path / f"{name}_out", "--group_size", 64, *options)
    assert_same_tensors(tmp_path / "stacked_out", tmp_path / "separate_out")


@pytest.mark.parametrize("model_type", ["mixtral", "minimax", "minimax_m2"])
def test_mixtrals_state_dict_gets_the_names_that_vllm_knows(tmp_path, model_type):
    stacks, _ = gated()
    quantize(save(tmp_path / "in", BESIDE | stacks, model_type=model_type), tmp_path / "out", "--format=int4")
    names = {name.rpartition(".")[0] for name in read_tensors(tmp_path / "out")}
    moe = "model.layers.0.block_sparse_moe"
    assert {f"{moe}.experts.{e}.{w}" for e in range(E) for w in ("w1", "w2", "w3")} < names
    assert f"{moe}.gate" in names


def test_phimoes_router_is_renamed_with_its_experts(tmp_path):
    stacks, _ = gated()
    tensors = stacks | {f"{MOE}.router.weight": random(E, H)}
    options = ["--format", "compressed-tensors", "--group_size", 64]
    quantize(save(tmp_path / "in", tensors, model_type="phimoe"), tmp_path / "out", *options)
    assert "model.layers.0.block_sparse_moe.gate.weight" in read_tensors(tmp_path / "out")


def test_a_stack_in_a_pickle_that_is_not_in_one_piece_is_read_right(tmp_path):
    stacks, separate = gated()
    views = {name: stack.transpose(1, 2).contiguous().transpose(1, 2) for name, stack in stacks.items()}
    assert not any(view.is_contiguous() for view in views.values())
    constants = {"TILE_WEIGHTS": 2000, "JOB_WEIGHTS": 5000}
    source = save_pickle(tmp_path / "in", BESIDE | views, model_type="qwen3_moe")
    quantize(source, tmp_path / "out", "--group_size", 64, constants=constants)
    quantize(save(tmp_path / "separate", BESIDE | separate), tmp_path / "expected", "--group_size", 64)
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize("saved", [save, save_pickle], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("options", [[], ["--exclude", r"experts\.\d+\."]], ids=["quantized", "kept"])
def test_transposed_stacks_are_read_right_in_tiles_of_any_size(tmp_path, saved, options):
    stacks, separate = turned(gated)()
    constants = {"TILE_WEIGHTS": 1500, "JOB_WEIGHTS": 5000, "COPY_BYTES": 777, "VERIFY_WEIGHTS": 900}
    source = saved(tmp_path / "in", BESIDE | stacks, model_type="llama4_text")
    options = ["--format", "compressed-tensors", "--group_size", 64, *options]
    quantize(source, tmp_path / "out", *options, "--verify", constants=constants)
    quantize(save(tmp_path / "separate", BESIDE | separate, model_type="llama4_text"), tmp_path / "expected", *options)
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


def test_a_resumed_run_over_stacks_writes_the_bytes_of_an_uninterrupted_one(tmp_path):
    source = save(tmp_path / "in", BESIDE | gated()[0], model_type="qwen3_moe")
    options = ["--format", "compressed-tensors", "--group_size", 64, "--shard_size_gb", 5e-5]
    quantize(source, tmp_path / "whole", *options)
    quantize(source, tmp_path / "out", *options)
    for name in ("model.safetensors.index.json", "model-00002.safetensors", "model-00004.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert "finished by an earlier run" in quantize(source, tmp_path / "out", *options).stdout
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_verify_names_a_wrong_expert_of_a_stack(tmp_path):
    source = save(tmp_path / "in", BESIDE | gated()[0], model_type="qwen3_moe")
    quantize(source, tmp_path / "out", "--group_size", 64)
    tensors = read_tensors(tmp_path / "out")
    one, other = (f"{MOE}.experts.{expert}.up_proj.qweight" for expert in (1, 2))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, tmp_path / "out" / "model-00001.safetensors")
    assert_refused(run_cli(source, tmp_path / "out", "--verify"), f"'{MOE}.experts.1.up_proj.weight'")


# --- stacks that stay, or are refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [r"\.experts\.", r"experts\.\d+\.", "mlp"])
def test_excluded_stacks_stay_whole_where_engines_know_them_so(tmp_path, pattern):
    stacks, _ = gated()
    source = save(tmp_path / "in", BESIDE | stacks, model_type="qwen3_moe")
    options = ["--format", "compressed-tensors", "--group_size", 64, "--exclude", pattern, "--verify"]
    quantize(source, tmp_path / "out", *options)
    output = read_tensors(tmp_path / "out")
    for name, stack in stacks.items():
        assert torch.equal(output[name], stack)
    for prefix in ("model", "model.language_model", "language_model.model"):
        assert is_kept(tmp_path / "out", f"{prefix}.layers.0.mlp.experts")
        assert is_kept(tmp_path / "out", f"{prefix}.layers.0.mlp.experts.0.gate_proj")
        assert not is_kept(tmp_path / "out", f"{prefix}.layers.0.self_attn.o_proj")


def test_excluded_stacks_that_vllm_does_not_know_are_kept_one_weight_an_expert(tmp_path):
    stacks, separate = ungated()
    source = save(tmp_path / "in", BESIDE | stacks, model_type="nemotron_h", **SIZES)
    options = ["--format", "compressed-tensors", "--group_size", 64, "--exclude", r"experts\.(up|down)_proj$"]
    plan = quantize(source, tmp_path / "out", *options, "--verify").stdout
    output = read_tensors(tmp_path / "out")
    assert all(torch.equal(output[name], weight) for name, weight in separate.items())
    assert "transformers (5.23) leaves kept experts" in plan


@pytest.mark.parametrize("pattern", ["down_proj", r"experts\.2\."])
def test_an_exclude_that_splits_a_layers_stacks_is_refused_for_engines(tmp_path, pattern):
    source = save(tmp_path / "in", BESIDE | gated()[0], model_type="qwen3_moe")
    options = ["--format", "compressed-tensors", "--group_size", 64, "--exclude", pattern]
    assert_refused(run_cli(source, tmp_path / "out", *options), "all experts of", "all of them or none")


GATED, UNGATED = gated()[0], ungated()[0]
GRANITE = {
    f"model.layers.0.block_sparse_moe.{name}.weight": stack
    for name, stack in zip(("input_linear", "output_linear"), GATED.values())
}
UNREADABLE = {
    "undecided": (UNGATED, {"model_type": "some"}, "does not tell whether transposed"),
    "interleaved": (turned(gated)()[0], {"model_type": "gpt_oss"}, "alternate"),
    "with biases": (
        GATED | {f"{MOE}.experts.gate_up_proj_bias": random(E, 2 * INNER)},
        {"model_type": "some"},
        "have biases",
    ),
    "w13": ({f"{MOE}.experts.w13_weight": random(E, 2 * INNER, H)}, {"model_type": "some"}, "not known"),
    "beside the module": ({"model.layers.0.experts_gate_up": random(E, H, H)}, {"model_type": "some"}, "not known"),
    "with a quote": ({"model.layers.0.it's_experts.w": random(E, H, H)}, {"model_type": "some"}, "not known"),
    "in two layers": (
        {f"model.layers.{n}.moe_w{n}": random(E, H, H) for n in (1, 12)},
        {"model_type": "a"},
        "not known",
    ),
    "by number": ({f"{MOE}.bank": random(E, INNER, H)}, {"num_local_experts": E}, "not known"),
    "2-D": ({"transformer.blocks.0.ffn.experts.mlp.w1": random(E * INNER, H)}, {"model_type": "dbrx"}, "not known"),
    "alone": ({f"{MOE}.experts.gate_up_proj": random(E, 2 * INNER, H)}, {"model_type": "qwen3_moe"}, "not all"),
    "without a gate": (
        {f"{MOE}.experts.{name}_proj": UNGATED[f"model.layers.0.mixer.experts.{name}_proj"] for name in ("up", "down")},
        {"model_type": "qwen3_moe", **SIZES},
        "not all projections",
    ),
    "of other shapes": (GATED | {f"{MOE}.experts.down_proj": random(E, H, 96)}, {"model_type": "some"}, "gated pair"),
}


def advice_of(result):
    """The options that a refusal names, as a shell reads them."""
    return shlex.split(re.search(r"(--exclude .*) keeps", result.stderr)[1])


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("form", ["int4", "compressed-tensors"])
def test_a_stack_that_nothing_decides_is_refused_by_name_and_the_advice_helps(tmp_path, case, form):
    stacks, config, reason = UNREADABLE[case]
    source = save(tmp_path / "in", BESIDE | stacks, **config)
    options = ["--format", form, "--group_size", 64]
    result = run_cli(source, tmp_path / "out", *options)
    assert_refused(result, next(name for name in stacks if "bias" not in name).rpartition(".")[0], reason)
    quantize(source, tmp_path / "out", *options, *advice_of(result), "--verify")
    output = read_tensors(tmp_path / "out")
    assert all(torch.equal(output[name], stack) for name, stack in stacks.items())


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "gemma4_text", "qwen3_vl_moe"])
def test_stacks_that_loaders_know_only_as_stacks_are_refused_for_engines_unless_they_are_kept(tmp_path, model_type):
    stacks = GRANITE if model_type.startswith("granite") else GATED
    source = save(tmp_path / "in", BESIDE | stacks, model_type=model_type)
    options = ["--format", "compressed-tensors", "--group_size", 64]
    result = run_cli(source, tmp_path / "out", *options)
    assert_refused(result, f"'{min(stacks)}'", model_type)
    quantize(source, tmp_path / "out", *options, *advice_of(result))
    moe = next(iter(stacks)).rpartition(".layers.")[2].split(".")[1]
    assert is_kept(tmp_path / "out", f"model.layers.0.{moe}.experts")
    assert not is_kept(tmp_path / "out", "model.layers.0.self_attn.o_proj")
    quantize(source, tmp_path / "int4", "--group_size", 64)
    assert sum(name.endswith(".qweight") for name in read_tensors(tmp_path / "int4")) == 3 * E + 2


def test_a_state_dict_whose_other_names_loaders_do_not_know_is_refused_for_engines(tmp_path):
    source = save(tmp_path / "in", BESIDE | GATED, model_type="deepseek_v4")
    options = ["--format", "compressed-tensors", "--group_size", 64]
    assert_refused(run_cli(source, tmp_path / "out", *options), "model.state_dict()", "save_pretrained")
    quantize(source, tmp_path / "out", "--group_size", 64)


NO_STACKS = {
    "m.conv1d.weight": random(8, 1, 4),
    "m.audio.conv1.weight": random(8, 80, 3),
    "m.moe_conv.weight": random(8, 80, 9),
    "model.layers.0.relative_table": random(8, 16, 16),
    "model.pos_embed": random(8, 16, 16),
    "model.register": random(8, 16, 16),
}


def test_convolutions_and_tables_are_no_stacks_of_experts(tmp_path):
    plan = quantize(save(tmp_path / "in", NO_STACKS | BESIDE, num_experts=8), tmp_path / "out").stdout
    assert "stacks of experts" not in plan
    assert NO_STACKS.keys() < read_tensors(tmp_path / "out").keys()


def test_a_single_expert_is_no_count_that_tells_a_stack(tmp_path):
    tensors = BESIDE | {"model.layers.0.table_of_one": random(1, 16, 16)}
    quantize(save(tmp_path / "in", tensors, num_experts=1), tmp_path / "out")


SEPARATE = gated()[1]
COPIES = {
    "a stack and separate weights": (GATED | SEPARATE, f"{MOE}.experts.down_proj", f"{MOE}.experts.0.down_proj.weight"),
    "a stack twice": (
        GATED | {f"{MOE}.experts.down_proj.weight": GATED[f"{MOE}.experts.down_proj"].clone()},
        f"{MOE}.experts.down_proj",
        f"{MOE}.experts.down_proj.weight",
    ),
}


@pytest.mark.parametrize("case", COPIES)
def test_experts_that_are_there_twice_are_refused_by_both_names(tmp_path, case):
    tensors, *names = COPIES[case]
    result = run_cli(save(tmp_path / "in", BESIDE | tensors, model_type="qwen3_moe"), tmp_path / "out")
    assert_refused(result, "two copies", "leave one", *(f"'{name}'" for name in names))


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


# --- roles ----------------------------------------------------------------------------------------------------------

WORDS_COUNT = 512
PROJECTION = {"model.layers.0.mlp.up_proj.weight": random(64, H)}


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


# --- what is no merged model ----------------------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn.q_proj"
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
    "bart": ("model.encoder.layers", "model.decoder.layers", {"num_hidden_layers": 4, "encoder_layers": 4}),
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


def test_nothing_is_said_of_layers_of_several_kinds(tmp_path):
    tensors = whole_model() | {"model.layers.0.self_attn.relative_attention_bias.weight": random(32, 4)}
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
    weight = torch.randn(16, 256, generator=SEEDED)
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
