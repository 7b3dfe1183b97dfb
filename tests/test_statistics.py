"""Statistics: whose vectors weigh which weights, and error feedback (README: "The best four bits")."""

from __future__ import annotations

import math
import re

import pytest
import torch
from arithmetic import (
    EXTREME_WEIGHTS,
    Kernels,
    compiled_kernel,
    quantize_groups,
    quantize_or_refuse,
)
from checkpoints import BESIDE, MOE, PROJECTION, SEPARATE, E, H, gated, random, save_model
from conftest import FORMATS, assert_refused, quantize, refuse, run_cli
from folders import assert_same_tensors, changed_tensors, edit_shard, folder_bytes, read_tensors
from reference import pack_rows
from safetensors.torch import save_file

import quantize_int4 as q

# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def three_layers(tmp_path):
    weights = {f"layers.{i}.up.weight": torch.randn(8, 200).bfloat16() for i in range(3)}
    return save_model(tmp_path / "in", weights)


def importance_file(tmp_path, tensors, *more):
    """Write the file; the options that give it, and more."""
    save_file(tensors, tmp_path / "importance.safetensors")
    return ["--scale", "mse", "--importance", tmp_path / "importance.safetensors", *more]


def test_importance_changes_the_weights_it_names_and_the_plan_counts_the_others(
    three_layers, tmp_path
):
    vectors = {
        "layers.0.up": torch.rand(200) ** 8,
        "layers.1.up": torch.zeros(200),
    }  # an expert that saw no data
    result = quantize(
        three_layers, tmp_path / "out", *importance_file(tmp_path, vectors), "--verify"
    )
    assert "importance weighs 1 weight; 1 named without data; 1 not named\n" in result.stdout
    quantize(three_layers, tmp_path / "plain", "--scale", "mse")
    assert changed_tensors(tmp_path / "out", tmp_path / "plain") == {
        "layers.0.up.qweight",
        "layers.0.up.scales",
    }


def test_costs_beside_the_statistics_change_nothing(three_layers, tmp_path):
    vectors = {f"layers.{i}.up": torch.rand(200) ** 8 for i in range(3)}
    quantize(three_layers, tmp_path / "plain", *importance_file(tmp_path, vectors))
    costs = {f"{name}.cost": torch.tensor(0.5) for name in vectors}
    result = quantize(three_layers, tmp_path / "out", *importance_file(tmp_path, vectors | costs))
    assert "importance weighs 3 weights\n" in result.stdout
    assert not changed_tensors(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (
            {"layers.0.up": torch.ones(199), "layers.1.up": torch.ones(200)},
            "for each of its 200 columns",
        ),
        (
            {"layers.0.up": torch.ones(200), "layers.1.up": torch.ones(200).double()},
            "for each of its 200 columns",
        ),
        (
            {"layers.0.up": torch.full((200,), float("nan")), "layers.1.up": torch.ones(200)},
            "values not finite",
        ),
        (
            {"layers.0.up": -torch.ones(200), "layers.1.up": torch.ones(200)},
            "negative values",
        ),
        ({"layers.0.up": torch.ones(200)}, "names 1 of 3 weights that are quantized"),
        ({"layers.0.up.weight": torch.ones(200)}, "its names are 'layers.0.up.weight',"),
    ],
    ids=["length", "dtype", "nan", "negative", "few", "no match"],
)
def test_a_bad_importance_file_is_refused(three_layers, tmp_path, vectors, words):
    result = run_cli(three_layers, tmp_path / "out", *importance_file(tmp_path, vectors))
    assert_refused(result, "importance.safetensors", words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["scale", "importance"])
def test_another_scale_or_importance_makes_leftovers_foreign(three_layers, tmp_path, change):
    options = importance_file(tmp_path, {f"layers.{n}.up": torch.rand(200) for n in range(3)})
    quantize(three_layers, tmp_path / "out", *options)
    vectors = {f"layers.{n}.up": torch.rand(200) for n in range(3)}
    options = [] if change == "scale" else importance_file(tmp_path, vectors)
    assert_refused(run_cli(three_layers, tmp_path / "out", *options), "--overwrite")


# --- names ------------------------------------------------------------------------------------------------------------

LAYERS = {f"layers.{n}.mlp.up_proj": torch.rand(H) for n in range(2)}


@pytest.mark.parametrize(
    "theirs", ["model.", "", "model.language_model.", "language_model.model.", "_orig_mod."]
)
@pytest.mark.parametrize("ours", ["backbone.", "model.", "language_model."])
def test_names_that_differ_in_their_wrappers_match(tmp_path, theirs, ours):
    source = save_model(tmp_path / "in", {f"{ours}{name}.weight": random(64, H) for name in LAYERS})
    for wrapper, folder in ((theirs, "out"), (ours, "expected")):
        options = importance_file(
            tmp_path, {wrapper + name: vector for name, vector in LAYERS.items()}
        )
        assert (
            "importance weighs 2 weights\n" in quantize(source, tmp_path / folder, *options).stdout
        )
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


def test_a_layers_vector_does_not_weigh_another_layer_that_ends_alike_where_its_own_is_kept(
    tmp_path,
):
    names = [f"model.{name}" for name in LAYERS] + [f"mtp.{name}" for name in LAYERS]
    source = save_model(tmp_path / "in", {f"{name}.weight": random(64, H) for name in names})
    options = importance_file(
        tmp_path, {f"model.{name}": vector for name, vector in LAYERS.items()}
    )
    result = run_cli(
        source, tmp_path / "out", *options, "--exclude", r"^model\.layers\.0\.", "--group_size", 64
    )
    assert_refused(result, "names 1 of 3 weights that are quantized")


def test_a_name_that_ends_as_two_weights_do_matches_neither(tmp_path):
    wrappers = ("language_model.", "audio_tower.")
    source = save_model(
        tmp_path / "in",
        {f"{wrapper}{name}.weight": random(64, H) for wrapper in wrappers for name in LAYERS},
    )
    vectors = {f"model.{name}": vector for name, vector in LAYERS.items()}
    result = run_cli(source, tmp_path / "out", *importance_file(tmp_path, vectors))
    assert_refused(
        result, "names 0 of 4 weights", "'model.layers.0.mlp.up_proj'", "'audio_tower.layers.0"
    )


def test_an_exact_name_comes_before_one_with_other_wrappers(tmp_path):
    source = save_model(tmp_path / "in", {f"model.{name}.weight": random(64, H) for name in LAYERS})
    vectors = {f"model.{name}": vector for name, vector in LAYERS.items()}
    quantize(source, tmp_path / "expected", *importance_file(tmp_path, vectors))
    vectors |= {f"other.{name}": torch.rand(H) for name in LAYERS}
    quantize(source, tmp_path / "out", *importance_file(tmp_path, vectors))
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


def stacked_vectors(separate, place):
    """Vectors of separate experts as the model holds them: gate and up see the same input."""
    return {
        f"{place}.gate_up_proj": torch.stack(
            [separate[f"{MOE}.experts.{e}.up_proj"] for e in range(E)]
        ),
        f"{place}.down_proj": torch.stack(
            [separate[f"{MOE}.experts.{e}.down_proj"] for e in range(E)]
        ),
    }


@pytest.mark.parametrize("tensors", [gated()[0], SEPARATE], ids=["stacked", "separate"])
@pytest.mark.parametrize("place", [f"{MOE}.experts", f"model.language_{MOE}.experts"])
def test_a_stack_of_vectors_weighs_the_experts_of_a_layer_each_by_its_own(tmp_path, tensors, place):
    source = save_model(tmp_path / "in", BESIDE | tensors, model_type="qwen3_moe")
    vectors = {
        name.removesuffix(".weight"): torch.rand(weight.shape[1]) ** 4
        for name, weight in SEPARATE.items()
    }
    vectors |= {
        name.replace("up_proj", "gate_proj"): vector.clone()
        for name, vector in vectors.items()
        if "up_proj" in name
    }
    for folder, given in (("out", stacked_vectors(vectors, place)), ("expected", vectors)):
        options = importance_file(tmp_path, given)
        result = quantize(source, tmp_path / folder, "--group_size", 64, *options)
        assert f"importance weighs {3 * E} weights; 2 not named\n" in result.stdout
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


def test_a_stack_of_vectors_finds_experts_that_the_hub_calls_otherwise(tmp_path):
    moe = "model.layers.0.block_sparse_moe"
    names = {"w1": H, "w3": H, "w2": 128}
    tensors = {
        f"{moe}.experts.{e}.{n}.weight": random(64, columns)
        for e in range(E)
        for n, columns in names.items()
    }
    source = save_model(tmp_path / "in", BESIDE | tensors, model_type="mixtral")
    vectors = {
        f"{MOE}.experts.gate_up_proj": torch.rand(E, H),
        f"{MOE}.experts.down_proj": torch.rand(E, 128),
    }
    result = quantize(
        source, tmp_path / "out", "--group_size", 64, *importance_file(tmp_path, vectors)
    )
    assert f"importance weighs {3 * E} weights" in result.stdout


# --- factors ----------------------------------------------------------------------------------------------------------

NAME = "layers.0.up"
ROWS, COLUMNS, GROUP_SIZE = 40, 384, 64


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(columns, tokens=400, directions=24, seed=1):
    """Inputs (tokens, columns) that lie mostly in a few directions, as activations do, some columns far larger."""
    inputs = (
        seeded(tokens, directions, seed=seed)
        @ seeded(directions, columns, seed=seed + 1)
        / directions**0.5
    )
    return (inputs + 0.5 * seeded(tokens, columns, seed=seed + 2)) * (
        seeded(columns, seed=seed + 3) / 2
    ).exp()


def statistics_of(inputs, rank):
    """Mean squares (columns,) and the factor (columns, rank) of the largest eigenvalues."""
    moments = inputs.T.double() @ inputs.double() / len(inputs)
    values, vectors = torch.linalg.eigh(moments)
    return moments.diag().float(), (vectors[:, -rank:] * values[-rank:].sqrt()).float().contiguous()


def tensors_of(name, inputs, rank):
    mean_squares, factor = statistics_of(inputs, rank)
    return {name: mean_squares, f"{name}.factor": factor}


def decode(folder, source, tmp_path, name=NAME):
    """A weight of a folder of any format, by --restore."""
    quantize(folder, tmp_path / f"{folder.name}_restored", "--restore")
    return read_tensors(tmp_path / f"{folder.name}_restored")[f"{name}.weight"]


def output_error(inputs, weight, decoded):
    difference = decoded.double() - weight.double()
    return float(
        (inputs.double() @ difference.T).norm() / (inputs.double() @ weight.double().T).norm()
    )


@pytest.fixture
def model(tmp_path):
    weights = {
        f"{NAME}.weight": (seeded(ROWS, COLUMNS) * 0.02).bfloat16(),
        "layers.0.norm.weight": torch.ones(8),
    }
    return save_model(tmp_path / "in", weights)


def test_a_factor_in_float16_does_as_well(model, tmp_path):
    inputs = correlated_inputs(COLUMNS)
    tensors = tensors_of(NAME, inputs, 24)
    tensors[f"{NAME}.factor"] = tensors[f"{NAME}.factor"].half()
    quantize(
        model, tmp_path / "out", *importance_file(tmp_path, tensors, "--group_size", 64), "--verify"
    )
    weight = read_tensors(model)[f"{NAME}.weight"]
    assert output_error(inputs, weight, decode(tmp_path / "out", model, tmp_path)) < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": torch.zeros(COLUMNS - 1, 8)}, "(384, 1 to 64)"),
        ({"factor": torch.zeros(COLUMNS)}, "(384, 1 to 64)"),
        ({"factor": torch.zeros(COLUMNS, 65)}, "(384, 1 to 64)"),
        ({"factor": torch.zeros(COLUMNS, 0)}, "(384, 1 to 64)"),
        ({"factor": torch.zeros(COLUMNS, 8).double()}, "float32 or float16"),
        ({"factor": torch.full((COLUMNS, 8), math.nan)}, "not finite"),
        (
            {"factor": torch.ones(COLUMNS, 8)},
            "column 0 that add up to 8, more than the column's mean square, 1",
        ),
        ({"other.factor": torch.ones(COLUMNS, 8)}, "'other.factor' has no 'other' beside it"),
    ],
    ids=["columns", "no rank", "high rank", "rank 0", "dtype", "nan", "too large", "alone"],
)
def test_a_bad_factor_is_refused_before_anything_is_written(model, tmp_path, change, words):
    tensors = {NAME: torch.ones(COLUMNS)}
    tensors |= {
        name if "." in name else f"{NAME}.{name}": tensor for name, tensor in change.items()
    }
    assert_refused(
        run_cli(model, tmp_path / "out", *importance_file(tmp_path, tensors)),
        "importance.safetensors",
        words,
    )
    assert not (tmp_path / "out").exists()


def test_a_factor_that_would_take_much_memory_is_refused_with_the_rank_that_fits(model, tmp_path):
    options = importance_file(tmp_path, tensors_of(NAME, correlated_inputs(COLUMNS), 24))
    result = run_cli(model, tmp_path / "out", *options, constants={"MAX_FACTOR": 9000})
    assert_refused(result, "holds 9,216 numbers, at most 9,000", "with a rank of 23")


def test_a_layer_without_data_is_neither_weighed_nor_fed_back(tmp_path):
    weights = {f"layers.{n}.up.weight": seeded(ROWS, COLUMNS, seed=n).bfloat16() for n in range(2)}
    model = save_model(tmp_path / "in", weights)
    tensors = tensors_of("layers.0.up", correlated_inputs(COLUMNS), 8)
    tensors |= {"layers.1.up": torch.zeros(COLUMNS), "layers.1.up.factor": torch.zeros(COLUMNS, 8)}
    result = quantize(model, tmp_path / "out", *importance_file(tmp_path, tensors), "--verify")
    assert "weighs 1 weight, with error feedback of rank 8; 1 named without data\n" in result.stdout
    quantize(model, tmp_path / "plain", "--scale", "mse")
    assert changed_tensors(tmp_path / "out", tmp_path / "plain") == {
        "layers.0.up.qweight",
        "layers.0.up.scales",
    }


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "separate"])
def test_a_stack_of_factors_gives_each_expert_its_own(tmp_path, stacked):
    source = save_model(
        tmp_path / "in", BESIDE | (gated()[0] if stacked else SEPARATE), model_type="qwen3_moe"
    )
    place, tensors = f"{MOE}.experts", {}
    for expert in range(E):
        for number, (names, columns) in enumerate(
            ((("gate_proj", "up_proj"), H), (("down_proj",), 128))
        ):
            statistics = tensors_of("x", correlated_inputs(columns, seed=10 * expert + number), 8)
            for name in names:
                tensors |= {
                    f"{place}.{expert}.{name}{key[1:]}": tensor.clone()
                    for key, tensor in statistics.items()
                }
    stacks = {
        f"{place}.{stack}{end}": torch.stack(
            [tensors[f"{place}.{e}.{name}{end}"] for e in range(E)]
        )
        for stack, name in (("gate_up_proj", "up_proj"), ("down_proj", "down_proj"))
        for end in ("", ".factor")
    }
    for folder, given in (("out", stacks), ("expected", tensors)):
        options = importance_file(tmp_path, given, "--group_size", 64)
        result = quantize(source, tmp_path / folder, *options, "--verify")
        assert (
            f"weighs {3 * E} weights, with error feedback of rank 8; 2 not named\n" in result.stdout
        )
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


# --- error feedback: the same codes as GPTQ's -------------------------------------------------------------------------


def dense_gptq(weights, scales, moments, codes):
    """The textbook recursion in float64 on the whole matrix of second moments: how far each code is from the quotient
    that it was rounded from. Errors are passed on as the given codes made them, so that a tie costs one code alone."""
    factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    current, distances = weights.clone(), torch.empty_like(weights)
    for column in range(weights.shape[1]):
        quotients = current[:, column] / scales[:, column]
        distances[:, column] = (quotients.clamp(-8, 7) - codes[:, column]).abs()
        errors = (current[:, column] - codes[:, column] * scales[:, column]) / factor[
            column, column
        ]
        current[:, column:] -= errors[:, None] * factor[column, column:]
    return distances, current


@pytest.mark.parametrize("rank", [1, 8, 24, 64])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
def test_every_code_is_that_of_dense_gptq_but_for_ties(kernel, rank):
    weights = (seeded(ROWS, COLUMNS) * 0.02).bfloat16()
    mean_squares, factor = statistics_of(correlated_inputs(COLUMNS), rank)
    feedback = q.feedback_of(mean_squares, factor.clone(), compiled_kernel() if kernel else None)
    how = {"importance": mean_squares.view(-1, GROUP_SIZE), "feedback": feedback}
    how["kernel"] = Kernels() if kernel else None
    words, scales = quantize_groups(weights.view(-1, GROUP_SIZE), **how)
    codes = q.unpack_int4(words).view(ROWS, COLUMNS).double()
    scales = scales.double().view(ROWS, -1).repeat_interleave(GROUP_SIZE, 1)

    shrunk = factor.double() * math.sqrt(0.8)
    rest = (mean_squares.double() - shrunk.square().sum(1)).clamp_min(
        0
    ) + 0.01 * mean_squares.double().mean()
    distances, _ = dense_gptq(weights.double(), scales, torch.diag(rest) + shrunk @ shrunk.T, codes)
    assert (distances > 0.5 + 1e-3).sum() == 0
    nearest = (weights.double() / scales).round().clamp(-8, 7)
    assert (nearest != codes).float().mean() > 0.01  # feedback did something


def test_changes_are_bounded_by_two_scales():
    mean_squares, factor = torch.full((64,), 0.1), torch.full((64, 8), 0.1 / 8**0.5)
    mean_squares[-9:-1], factor[-9:-1] = 40, (40 / 8) ** 0.5  # strong columns before a weak one
    weights = seeded(400, 64).bfloat16()
    feedback = q.feedback_of(mean_squares, factor.clone(), None)
    words, scales = quantize_groups(weights, importance=mean_squares.view(1, 64), feedback=feedback)
    codes, scales = q.unpack_int4(words), scales.float()[:, None]
    steps = ((weights.float() - codes * scales) / scales).abs()[codes.abs() < 7]
    assert 2 < steps.max() <= 2.5 + 1e-3


@pytest.mark.parametrize("form", FORMATS)
def test_a_factor_of_zeros_has_the_bytes_of_importance_alone(model, tmp_path, form):
    vector = seeded(COLUMNS).square()
    for folder, more in (("plain", {}), ("zeros", {f"{NAME}.factor": torch.zeros(COLUMNS, 5)})):
        quantize(
            model,
            tmp_path / folder,
            "--format",
            form,
            *importance_file(tmp_path, {NAME: vector} | more),
        )
    assert_same_tensors(tmp_path / "plain", tmp_path / "zeros")


# --- every format, and both ways to calculate -------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS - 8], ids=["whole groups", "padded"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_less_output_error_verifies_and_says_so(tmp_path, form, columns):
    if columns != COLUMNS and form != "int4":
        pytest.skip("formats for engines have whole groups")
    weight = (seeded(ROWS, columns) * 0.02).bfloat16()
    model = save_model(tmp_path / "in", {f"{NAME}.weight": weight})
    inputs = correlated_inputs(columns)
    tensors = tensors_of(NAME, inputs, 24)
    errors = {}
    for folder, given in (("plain", {NAME: tensors[NAME]}), ("feedback", tensors)):
        options = importance_file(tmp_path, given, "--format", form, "--group_size", GROUP_SIZE)
        result = quantize(model, tmp_path / folder, *options, "--verify")
        assert "verified, no problems found" in result.stdout
        assert ("with error feedback" in result.stdout) == (folder == "feedback")
        errors[folder] = output_error(inputs, weight, decode(tmp_path / folder, model, tmp_path))
        printed = [
            line.split() for line in result.stdout.splitlines() if line.startswith("  other")
        ][-1]
        assert float(printed[-1]) == pytest.approx(
            errors[folder], rel=0.2
        )  # of diag + low rank instead of all
    assert errors["feedback"] < 0.6 * errors["plain"]
    assert "weighs 1 weight, with error feedback of rank 24\n" in result.stdout


FLOATS = [torch.bfloat16, torch.float16, torch.float32]
CUT = {"TILE_WEIGHTS": 1000, "JOB_WEIGHTS": 3000}


@pytest.mark.parametrize(
    ("form", "dtype", "constants"),
    [  # cut, each format and each dtype once
        *((form, dtype, {}) for form in FORMATS for dtype in FLOATS),
        *((form, dtype, CUT) for form, dtype in zip(FORMATS, FLOATS)),
    ],
)
def test_the_kernel_and_torch_write_the_same_bytes_however_a_weight_is_cut(
    tmp_path, form, dtype, constants
):
    model = save_model(
        tmp_path / "in", {f"{NAME}.weight": (seeded(ROWS, COLUMNS) * 0.02).to(dtype)}
    )
    tensors = tensors_of(NAME, correlated_inputs(COLUMNS), 20)
    options = importance_file(tmp_path, tensors, "--format", form, "--group_size", 32)
    quantize(model, tmp_path / "kernel", *options)
    told = quantize(
        model, tmp_path / "torch", *options, environment={"CC": "false"}, constants=constants
    ).stdout
    assert "rounding with torch, which takes thirty times" in told
    assert folder_bytes(tmp_path / "kernel") == folder_bytes(tmp_path / "torch")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("damaged", [False, True], ids=["sound", "damaged"])
def test_the_kernel_and_torch_find_the_same_in_verification(tmp_path, form, damaged):
    weights = {
        f"{NAME}.weight": (seeded(ROWS, COLUMNS) * 0.02).bfloat16(),
        "other.weight": (seeded(ROWS, 200) ** 5).float(),
    }
    model = save_model(tmp_path / "in", weights)
    tensors = tensors_of(NAME, correlated_inputs(COLUMNS), 20)
    size = 96 if form == "int4" else 32
    options = importance_file(tmp_path, tensors, "--format", form, "--group_size", size)
    options = options if form == "int4" else [*options, "--exclude", "other"]
    quantize(model, tmp_path / "out", *options)
    if damaged:
        shard = tmp_path / "out" / "model-00001.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1000:-900] = bytes(100)
        shard.write_bytes(data)
    found = [
        run_cli(model, tmp_path / "out", *options, "--verify", environment=environment)
        for environment in ({}, {"CC": "false"})
    ]
    lines = [result.stdout.splitlines() for result in found]
    assert "verifying with torch" in found[1].stdout
    assert ("WRONG" in found[0].stdout) == damaged
    starts = ("  other", "  worst", "  clipped", "  kept", "WRONG", "  attention", "  mlp")
    results = [[line for line in part if line.startswith(starts)] for part in lines]
    assert results[0] == results[1]
    assert len(results[0]) >= 2


@pytest.mark.parametrize("group_size", [8, 32, 128, 264])
@pytest.mark.parametrize("kind", EXTREME_WEIGHTS)
def test_the_kernel_and_torch_agree_on_extreme_weights(kind, group_size):
    weights = EXTREME_WEIGHTS[kind](seeded(36, group_size * 3)).bfloat16()
    weights[5] = 0
    mean_squares, factor = statistics_of(correlated_inputs(group_size * 3), 11)
    how = {
        "importance": mean_squares.view(3, -1),
        "feedback": q.feedback_of(mean_squares, factor, None),
    }
    for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
        results = [
            quantize_or_refuse(weights.view(-1, group_size), scale_dtype, kernel=kernel, **how)
            for kernel in (Kernels(), None)
        ]
        assert all(map(torch.equal, *results)), scale_dtype


@pytest.mark.parametrize("rank", [1, 8, 33, 64])
def test_the_kernel_and_torch_find_the_same_spread(rank):
    mean_squares, factor = statistics_of(correlated_inputs(COLUMNS), rank)
    spreads = [
        q.feedback_of(mean_squares, factor.clone(), kernel).spread
        for kernel in (compiled_kernel(), None)
    ]
    assert torch.equal(*spreads)
    assert spreads[0].abs().max() > 0


def test_a_weight_in_8_bits_is_rounded_without_feedback(model, tmp_path):
    options = ["--format", "compressed-tensors", "--int8", "up"]
    quantize(model, tmp_path / "plain", *options)
    quantize(
        model,
        tmp_path / "out",
        *options,
        *importance_file(tmp_path, tensors_of(NAME, correlated_inputs(COLUMNS), 8)),
    )
    assert_same_tensors(tmp_path / "plain", tmp_path / "out")


def test_a_bad_weight_is_named_by_its_place(tmp_path):
    weight = seeded(ROWS, COLUMNS)
    weight[17, 200] = math.nan
    model = save_model(tmp_path / "in", {f"{NAME}.weight": weight.bfloat16()})
    options = importance_file(tmp_path, tensors_of(NAME, correlated_inputs(COLUMNS), 8))
    assert_refused(
        run_cli(model, tmp_path / "out", *options), f"'{NAME}.weight'", "row 17, column 200: nan"
    )


def test_a_weight_that_feedback_moves_beyond_all_scales_is_not_said_to_be_too_large_itself(
    tmp_path,
):
    weight = torch.full((ROWS, COLUMNS), 4.5e5).bfloat16()
    weight[:, :GROUP_SIZE] = (seeded(ROWS, GROUP_SIZE) * 1e5).clamp(-4e5, 4e5).bfloat16()
    model = save_model(tmp_path / "in", {f"{NAME}.weight": weight})
    mean_squares = torch.ones(COLUMNS)
    mean_squares[:GROUP_SIZE] = 1e3
    tensors = {NAME: mean_squares, f"{NAME}.factor": mean_squares.sqrt()[:, None] * 0.99}
    result = run_cli(
        model, tmp_path / "out", *importance_file(tmp_path, tensors, "--group_size", 64)
    )
    assert_refused(result, "needs a scale beyond float16", "since error feedback changes its")


# --- --verify ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(model, tmp_path):
    """A folder that was made with feedback, and its options."""
    options = importance_file(
        tmp_path, tensors_of(NAME, correlated_inputs(COLUMNS), 24), "--group_size", GROUP_SIZE
    )
    quantize(model, tmp_path / "out", *options)
    return tmp_path / "out", options


def move_a_code(folder, by):
    """Move the first code of the middle of the range."""
    moved = []

    def change(tensors):
        codes = q.unpack_int4(tensors[f"{NAME}.qweight"])
        row, column = (int(i) for i in (codes == 0).nonzero()[0])
        codes[row, column] += by
        tensors[f"{NAME}.qweight"] = pack_rows(codes.tolist())
        moved.extend((row, column))

    edit_shard(folder / "model-00001.safetensors", change)
    return moved


@pytest.mark.parametrize("by", [-1, 1])
def test_verify_with_the_statistics_finds_a_code_that_is_one_off(model, finished, by):
    folder, options = finished
    assert "verified, no problems found" in quantize(model, folder, *options, "--verify").stdout
    row, column = move_a_code(folder, by)
    result = run_cli(model, folder, *options, "--verify")
    assert_refused(result, "1 problem")
    assert (
        f"WRONG:     '{NAME}.weight': {NAME}.qweight[{row}, {column // 8}] differs" in result.stdout
    )


def test_verify_without_the_statistics_says_what_it_checks_and_finds_a_code_that_is_far_off(
    model, finished
):
    folder, _ = finished
    result = quantize(model, folder, "--verify")
    assert (
        "a code inside the range must lie within 2.5 scales of its weight, and one at an end of the"
        " range on its weight's side; with the --importance file that they were made with"
        in result.stdout
    )
    row, column = move_a_code(folder, 4)
    result = run_cli(model, folder, "--verify")
    assert_refused(result, "1 problem")
    assert f"WRONG:     '{NAME}.weight': row {row}, column {column} decodes" in result.stdout


EVERY_WAY = [
    pytest.param(form, group_size, rank, id=f"{form}-{group_size}-{rank}")
    for form in FORMATS
    for group_size in (32, 64)
    for rank in (0, 8, 32)
]


def verify_with_and_without(tmp_path, weight, inputs, form, group_size, rank):
    """Convert by statistics of these inputs; what --verify prints with them and without."""
    source = save_model(tmp_path / "in", {f"{NAME}.weight": weight.bfloat16()})
    tensors = tensors_of(NAME, inputs, rank) if rank else {NAME: statistics_of(inputs, 1)[0]}
    options = importance_file(tmp_path, tensors, "--format", form, "--group_size", group_size)
    with_them = quantize(source, tmp_path / "out", *options, "--verify").stdout
    return with_them, quantize(source, tmp_path / "out", "--format", form, "--verify").stdout


@pytest.mark.parametrize(("form", "group_size", "rank"), EVERY_WAY)
def test_a_column_of_massive_activations_ends_in_no_false_alarm(tmp_path, form, group_size, rank):
    # One column is so loud that it alone would choose the scales of its group, and its weights are small.
    inputs = correlated_inputs(COLUMNS) * 0.3
    inputs[:, 10] = seeded(len(inputs), seed=7) * 104
    weight = seeded(ROWS, COLUMNS) * 0.02
    weight[:, 10] /= 20
    for printed in verify_with_and_without(tmp_path, weight, inputs, form, group_size, rank):
        assert "verified, no problems found" in printed


@pytest.mark.parametrize(("form", "group_size", "rank"), EVERY_WAY)
def test_weights_that_are_clipped_are_counted_and_not_called_wrong(
    tmp_path, form, group_size, rank
):
    # One column is so quiet that its weights, the largest, do not count.
    inputs = correlated_inputs(COLUMNS)
    inputs[:, 10] *= 1e-4
    weight = seeded(ROWS, COLUMNS) * 0.02
    weight[:, 10] = 0.3
    for printed in verify_with_and_without(tmp_path, weight, inputs, form, group_size, rank):
        assert "verified, no problems found" in printed
        (line,) = [line for line in printed.splitlines() if "clipped:" in line]
        text = r"  clipped: +(\d+) weights lie more than 3 scales from what is decoded, up to (\S+) in "
        count, reach = re.fullmatch(rf"{text}{NAME}\.weight", line).groups()
        assert 20 <= int(count) <= ROWS
        assert 3 < float(reach) < 100


@pytest.fixture
def moved_to_zero(tmp_path):
    """Tiny weights, alone in their groups, that feedback of the groups before moves to 0 here and there."""
    weight = torch.zeros(1024, 64)
    weight[:, :32] = seeded(1024, 32) * 1e-5
    weight[:, 40] = 4.8e-7 + 4e-7 * seeded(1024, seed=1).abs().clamp(max=1)
    source = save_model(tmp_path / "in", {f"{NAME}.weight": weight}, torch_dtype="float32")
    factor = torch.zeros(64, 1)
    factor[:32] = factor[40] = 0.9
    return source, {NAME: torch.ones(64), f"{NAME}.factor": factor}


@pytest.mark.parametrize("compiler", ["cc", "false"])
@pytest.mark.parametrize("form", ["int4", "gptq"])
def test_weights_whose_scale_feedback_makes_zero_are_not_called_wrong(
    moved_to_zero, tmp_path, form, compiler
):
    source, tensors = moved_to_zero
    options = importance_file(tmp_path, tensors, "--format", form, "--group_size", 32)
    environment = {"CC": compiler}
    quantize(source, tmp_path / "out", *options, "--verify", environment=environment)
    scales = read_tensors(tmp_path / "out")[f"{NAME}.scales"]
    assert (scales.view(-1, 1024) if form == "gptq" else scales.T)[1].eq(0).any()
    quantize(source, tmp_path / "out", "--verify", environment=environment)


@pytest.mark.parametrize("compiler", ["cc", "false"])
def test_words_and_scales_that_a_hole_replaced_are_found_without_the_statistics(
    model, finished, compiler
):
    folder, _ = finished

    def change(tensors):
        for part in ("qweight", "scales"):
            tensors[f"{NAME}.{part}"][7] = 0

    edit_shard(folder / "model-00001.safetensors", change)
    result = run_cli(model, folder, "--verify", environment={"CC": compiler})
    assert_refused(result, "1 problem")
    assert f"WRONG:     '{NAME}.weight': row 7, column 0 decodes to 0" in result.stdout


@pytest.mark.parametrize("largest", [2.0**-149, 1e-42, 3e38], ids=["least", "denormal", "most"])
def test_statistics_of_any_loudness_convert_and_verify(tmp_path, largest):
    # All but a third of the columns are silent.
    mean_squares = torch.zeros(COLUMNS)
    mean_squares[::3] = largest
    factor = mean_squares.double().sqrt()[:, None] * seeded(COLUMNS, 8).double().clamp(-1, 1) / 4
    tensors = {NAME: mean_squares, f"{NAME}.factor": factor.float()}
    weight = seeded(ROWS, COLUMNS).bfloat16() * 1e25
    source = save_model(tmp_path / "in", {f"{NAME}.weight": weight}, dtype="bfloat16")
    options = ["--format", "compressed-tensors", "--group_size", GROUP_SIZE]
    options = importance_file(tmp_path, tensors, *options)
    quantize(source, tmp_path / "out", *options, "--verify")
    quantize(source, tmp_path / "out", "--verify")


def test_a_unit_of_statistics_changes_no_byte(tmp_path, model):
    tensors = tensors_of(NAME, correlated_inputs(COLUMNS), 8)
    louder = {NAME: tensors[NAME] * 2.0**80, f"{NAME}.factor": tensors[f"{NAME}.factor"] * 2.0**40}
    for folder, statistics in (("plain", tensors), ("louder", louder)):
        quantize(model, tmp_path / folder, *importance_file(tmp_path, statistics))
    assert_same_tensors(tmp_path / "plain", tmp_path / "louder")


def test_no_column_is_without_weight_in_the_choice_of_scales():
    importance = torch.full((1, 64), 0.2)
    importance[0, 7] = 10768
    shares = q.shares_of(q.weigh_columns(importance))
    assert shares.min() == 1
    assert shares[0, 7] == 1 << 14
    assert (q.weigh_columns(torch.zeros(1, 64)) == 0).all()


def test_output_errors_are_printed_by_kind_where_statistics_are_given(model, finished):
    folder, options = finished
    lines = quantize(model, folder, *options, "--verify").stdout.splitlines()
    title = next(number for number, line in enumerate(lines) if line.startswith("Verified"))
    assert "of their outputs" in lines[title]
    assert lines[title + 1].split() == ["min", "median", "max", "median", "max"]
    cells = [float(cell) for cell in lines[title + 2].split()[2:]]
    assert len(cells) == 5
    assert 0 < cells[4] < cells[0]
    assert "of their outputs" not in quantize(model, folder, "--verify").stdout


def collected(folder):
    """A file as `collect_statistics` writes it."""
    path = folder / "importance.safetensors"
    vectors = {"model.layers.0.mlp.up_proj": torch.rand(128)}
    save_file(vectors, path, metadata={q.STATISTICS_KEY: q.STATISTICS_VERSION})
    return path


def test_statistics_beside_the_weights_are_none_of_them(tmp_path):
    source = save_model(tmp_path / "in", {"model.layers.0.mlp.up_proj.weight": random(64, 128)})
    options = ["--format", "compressed-tensors", "--importance", collected(source), "--verify"]
    result = quantize(source, tmp_path / "out", *options)
    assert "importance.safetensors (statistics)" in " ".join(result.stdout.split())
    assert "importance weighs 1 weight" in result.stdout
    assert not (tmp_path / "out" / "importance.safetensors").exists()


def test_a_folder_of_statistics_alone_is_said_to_be_that(tmp_path):
    (tmp_path / "in").mkdir()
    collected(tmp_path / "in")
    words = ["importance.safetensors holds statistics, for --importance", "the checkpoint's folder"]
    refuse(tmp_path / "in", tmp_path / "out", *words)


def test_costs_of_zero_are_added_up_to_zero(three_layers, tmp_path):
    vectors = {f"layers.{i}.up": torch.rand(200) ** 8 for i in range(3)}
    costs = {f"{name}.cost": torch.tensor(0.0) for name in vectors}
    options = importance_file(tmp_path, vectors | costs)
    result = quantize(three_layers, tmp_path / "out", *options, "--verify")
    assert re.search(r"Expected divergence +0\.0* nat a token", result.stdout)


def test_statistics_without_names_are_refused(tmp_path):
    source = save_model(tmp_path / "in", PROJECTION)
    save_file({}, tmp_path / "statistics.safetensors")
    options = ["--scale", "mse", "--importance", tmp_path / "statistics.safetensors"]
    refuse(source, tmp_path / "out", "names no layer: collect it from this model", options=options)
