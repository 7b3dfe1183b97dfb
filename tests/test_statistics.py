"""--importance FILE: whose vectors weigh which weights, whatever wraps the names and whether experts are stacked."""

import pytest
import torch
from conftest import assert_refused, quantize, read_tensors, run_cli, save_model
from safetensors.torch import save_file
from small_models import BESIDE, MOE, SEPARATE, E, H, assert_same_tensors, gated, random, save


@pytest.fixture
def model(tmp_path):
    weights = {f"layers.{i}.up.weight": torch.randn(8, 200).bfloat16() for i in range(3)}
    return save_model(tmp_path / "in", weights)


def importance_file(tmp_path, vectors):
    save_file(vectors, tmp_path / "importance.safetensors")
    return ["--scale", "mse", "--importance", tmp_path / "importance.safetensors"]


def test_importance_changes_the_weights_it_names_and_the_plan_counts_the_others(model, tmp_path):
    vectors = {"layers.0.up": torch.rand(200) ** 8, "layers.1.up": torch.zeros(200)}  # an expert that saw no data
    result = quantize(model, tmp_path / "out", *importance_file(tmp_path, vectors), "--verify")
    assert "importance weighs 1 weight; 1 are named but without data, and 1 are not named" in result.stdout
    quantize(model, tmp_path / "plain", "--scale", "mse")
    out, plain = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "plain")
    changed = {name for name in out if not torch.equal(out[name], plain[name])}
    assert changed == {"layers.0.up.qweight", "layers.0.up.scales"}


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        ({"layers.0.up": torch.ones(199), "layers.1.up": torch.ones(200)}, "for each of its 200 columns"),
        ({"layers.0.up": torch.ones(200), "layers.1.up": torch.ones(200).double()}, "for each of its 200 columns"),
        ({"layers.0.up": torch.full((200,), float("nan")), "layers.1.up": torch.ones(200)}, "negative or not finite"),
        ({"layers.0.up": -torch.ones(200), "layers.1.up": torch.ones(200)}, "negative or not finite"),
        ({"layers.0.up": torch.ones(200)}, "names 1 of 3 weights that are quantized"),
        ({"layers.0.up.weight": torch.ones(200)}, "its names are 'layers.0.up.weight',"),
    ],
    ids=["length", "dtype", "nan", "negative", "few", "no match"],
)
def test_a_bad_importance_file_is_refused(model, tmp_path, vectors, words):
    result = run_cli(model, tmp_path / "out", *importance_file(tmp_path, vectors))
    assert_refused(result, "importance.safetensors", words)
    assert not (tmp_path / "out").exists()


def test_importance_without_mse_is_a_usage_error(model, tmp_path):
    options = importance_file(tmp_path, {"layers.0.up": torch.ones(200)})[2:]
    assert_refused(run_cli(model, tmp_path / "out", *options), "--importance needs --scale mse", exit_code=2)


@pytest.mark.parametrize("change", ["scale", "importance"])
def test_another_scale_or_importance_makes_leftovers_foreign(model, tmp_path, change):
    options = importance_file(tmp_path, {f"layers.{n}.up": torch.rand(200) for n in range(3)})
    quantize(model, tmp_path / "out", *options)
    vectors = {f"layers.{n}.up": torch.rand(200) for n in range(3)}
    options = [] if change == "scale" else importance_file(tmp_path, vectors)
    assert_refused(run_cli(model, tmp_path / "out", *options), "--overwrite")


# --- names ------------------------------------------------------------------------------------------------------------

LAYERS = {f"layers.{n}.mlp.up_proj": torch.rand(H) for n in range(2)}


@pytest.mark.parametrize("theirs", ["model.", "", "model.language_model.", "language_model.model.", "_orig_mod."])
@pytest.mark.parametrize("ours", ["backbone.", "model.", "language_model."])
def test_names_that_differ_in_their_wrappers_match(tmp_path, theirs, ours):
    source = save(tmp_path / "in", {f"{ours}{name}.weight": random(64, H) for name in LAYERS})
    for wrapper, folder in ((theirs, "out"), (ours, "expected")):
        options = importance_file(tmp_path, {wrapper + name: vector for name, vector in LAYERS.items()})
        assert "importance weighs 2 weights; 0 are named" in quantize(source, tmp_path / folder, *options).stdout
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


def test_a_layers_vector_does_not_weigh_another_layer_that_ends_alike_where_its_own_is_kept(tmp_path):
    names = [f"model.{name}" for name in LAYERS] + [f"mtp.{name}" for name in LAYERS]
    source = save(tmp_path / "in", {f"{name}.weight": random(64, H) for name in names})
    options = importance_file(tmp_path, {f"model.{name}": vector for name, vector in LAYERS.items()})
    result = run_cli(source, tmp_path / "out", *options, "--exclude", r"^model\.layers\.0\.", "--group_size", 64)
    assert_refused(result, "names 1 of 3 weights that are quantized")


def test_a_name_that_ends_as_two_weights_do_matches_neither(tmp_path):
    wrappers = ("language_model.", "audio_tower.")
    source = save(
        tmp_path / "in", {f"{wrapper}{name}.weight": random(64, H) for wrapper in wrappers for name in LAYERS}
    )
    vectors = {f"model.{name}": vector for name, vector in LAYERS.items()}
    result = run_cli(source, tmp_path / "out", *importance_file(tmp_path, vectors))
    assert_refused(result, "names 0 of 4 weights", "'model.layers.0.mlp.up_proj'", "'audio_tower.layers.0")


def test_an_exact_name_comes_before_one_with_other_wrappers(tmp_path):
    source = save(tmp_path / "in", {f"model.{name}.weight": random(64, H) for name in LAYERS})
    vectors = {f"model.{name}": vector for name, vector in LAYERS.items()}
    quantize(source, tmp_path / "expected", *importance_file(tmp_path, vectors))
    vectors |= {f"other.{name}": torch.rand(H) for name in LAYERS}
    quantize(source, tmp_path / "out", *importance_file(tmp_path, vectors))
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


def stacked_vectors(separate, place):
    """Vectors of separate experts as the model holds them: gate and up see the same input."""
    return {
        f"{place}.gate_up_proj": torch.stack([separate[f"{MOE}.experts.{e}.up_proj"] for e in range(E)]),
        f"{place}.down_proj": torch.stack([separate[f"{MOE}.experts.{e}.down_proj"] for e in range(E)]),
    }


@pytest.mark.parametrize("tensors", [gated()[0], SEPARATE], ids=["stacked", "separate"])
@pytest.mark.parametrize("place", [f"{MOE}.experts", f"model.language_{MOE}.experts"])
def test_a_stack_of_vectors_weighs_the_experts_of_a_layer_each_by_its_own(tmp_path, tensors, place):
    source = save(tmp_path / "in", BESIDE | tensors, model_type="qwen3_moe")
    vectors = {name.removesuffix(".weight"): torch.rand(weight.shape[1]) ** 4 for name, weight in SEPARATE.items()}
    vectors |= {
        name.replace("up_proj", "gate_proj"): vector.clone() for name, vector in vectors.items() if "up_proj" in name
    }
    for folder, given in (("out", stacked_vectors(vectors, place)), ("expected", vectors)):
        options = importance_file(tmp_path, given)
        result = quantize(source, tmp_path / folder, "--group_size", 64, *options)
        assert f"importance weighs {3 * E} weights; 0 are named but without data, and 2 are not named" in result.stdout
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


def test_a_stack_of_vectors_finds_experts_that_the_hub_calls_otherwise(tmp_path):
    moe = "model.layers.0.block_sparse_moe"
    names = {"w1": H, "w3": H, "w2": 128}
    tensors = {f"{moe}.experts.{e}.{n}.weight": random(64, columns) for e in range(E) for n, columns in names.items()}
    source = save(tmp_path / "in", BESIDE | tensors, model_type="mixtral")
    vectors = {f"{MOE}.experts.gate_up_proj": torch.rand(E, H), f"{MOE}.experts.down_proj": torch.rand(E, 128)}
    result = quantize(source, tmp_path / "out", "--group_size", 64, *importance_file(tmp_path, vectors))
    assert f"importance weighs {3 * E} weights" in result.stdout
