"""--scale mse and --importance: closer than absmax, on every group, in every format."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import compiled, quantize, read_tensors, save_model

import quantize_int4 as q

GAUSSIAN = torch.randn(1 << 22, generator=torch.Generator().manual_seed(5))
TARGETS = {128: (0.1174, 0.0967), 64: (0.1077, 0.0899), 32: (0.0971, 0.0811)}  # relative RMS error: absmax, mse


def errors(weights, group_size, search, scale_dtype=torch.float16, importance=None):
    """Squared error of each group and the scales, by tiles as the program does it."""
    workspace, result, all_scales = q.Workspace(), [], []
    rounding = q.Rounding(importance=torch.ones(1, group_size) if search and importance is None else importance)
    for tile in weights.view(-1, group_size).split(1 << 13):
        words, scales = q.quantize_groups(tile.clone(), scale_dtype, workspace, rounding)
        squares = (q.unpack_int4(words) * scales.float()[:, None] - tile.float()).square()
        if importance is not None:
            squares = squares.view(-1, *importance.shape) * importance
        result.append(squares.reshape(-1, group_size).sum(1))
        all_scales.append(scales.clone())
    return torch.cat(result), torch.cat(all_scales)


@pytest.mark.parametrize("group_size", TARGETS)
def test_mse_reaches_its_error_on_gaussian_weights_and_absmax_its_own(group_size):
    norm = GAUSSIAN.double().square().sum()
    absmax, mse = (math.sqrt(errors(GAUSSIAN, group_size, search)[0].double().sum() / norm) for search in (False, True))
    assert absmax == pytest.approx(TARGETS[group_size][0], abs=0.0002)
    assert mse <= TARGETS[group_size][1]


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "tiny", "one outlier", "two values"])
def test_mse_is_never_worse_than_absmax_on_any_group(kind, scale_dtype):
    weights = GAUSSIAN[: 1 << 16].clone()
    if kind == "heavy tails":
        weights = weights**5
    elif kind == "tiny":
        weights *= 1e-7
    elif kind == "one outlier":
        weights.view(-1, 64)[:, 7] = 50
    elif kind == "two values":
        weights = weights.sign()
    weights.view(-1, 64)[5] = 0
    absmax, mse = (errors(weights, 64, search, scale_dtype)[0] for search in (False, True))
    assert (mse <= absmax * (1 + 1e-5)).all()
    assert mse[5] == 0


@pytest.fixture
def kernel() -> q.Kernel:
    return compiled()


KINDS = {
    "gaussian": lambda noise: noise,
    "heavy tails": lambda noise: noise**5,
    "of one sign": lambda noise: noise.square(),
    "two values": torch.sign,
    "all magnitudes": lambda noise: noise * 2.0 ** torch.arange(-140, 110).repeat(2)[: len(noise), None],
    "one weight": lambda noise: noise * torch.nn.functional.one_hot(torch.tensor(7), noise.shape[1]),
    "not finite": lambda noise: torch.where(noise > 2, torch.inf, torch.where(noise < -2, torch.nan, noise)),
}
IMPORTANCE = {
    "none": lambda noise: torch.ones(1, noise.shape[1]),
    "smooth": lambda noise: noise.square(),
    "steep": lambda noise: noise.mul(9).exp() * torch.tensor([[1], [0], [1e-20], [1e20]]),
    "padded": lambda noise: noise.square() * (torch.arange(noise.numel()).view_as(noise) < noise.numel() - 5),
}


@pytest.mark.parametrize("group_size", [8, 24, 32, 64, 128, 264, q.MAX_GROUP, q.MAX_GROUP + 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_and_torch_find_the_same_scales_and_codes_bit_for_bit(kernel, dtype, kind, group_size):
    noise = GAUSSIAN[: 400 * group_size].view(400, group_size)
    weights = KINDS[kind](noise).to(dtype)
    weights[5] = 0
    for name, make in IMPORTANCE.items():
        importance = make(noise[100:104])
        for scale_dtype in (torch.float16, torch.bfloat16):
            results = []
            for some in (kernel, None):
                try:
                    rounding = q.Rounding(importance=importance, kernel=some)
                    output = q.quantize_groups(weights, scale_dtype, q.Workspace(), rounding)
                except q.NotQuantizable as error:
                    output = error.scales.nan_to_num(), torch.isfinite(error.scales)
                results.append([tensor.clone() for tensor in output])
            assert all(map(torch.equal, *results)), (name, scale_dtype)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("group_size", [32, 264])
def test_the_search_in_integers_is_as_close_as_one_in_float64(kernel, group_size, weighed):
    groups = GAUSSIAN[: 2000 * group_size].view(-1, group_size).bfloat16()
    importance = GAUSSIAN[: 2 * group_size].view(2, -1).square() if weighed else torch.ones(2, group_size)
    rounding = q.Rounding(importance=importance, kernel=kernel)
    _, scales = q.quantize_groups(groups, torch.float16, q.Workspace(), rounding)
    weights, counts = groups.double(), importance.double().repeat(1000, 1)
    largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))

    steps = torch.tensor(q.SEARCH_STEPS).double()[:, None, None]
    codes = torch.round(weights * -steps / largest).clamp(-8, 7)
    sums = (weights * codes * counts).sum(2)
    candidates = sums / (codes * codes * counts).sum(2)  # (steps, groups)
    best = candidates.gather(0, (sums * candidates).argmax(0, keepdim=True))[0]

    def error(scales):
        scales = scales.double()[:, None]
        return (((weights / scales).round().clamp(-8, 7) * scales - weights).square() * counts).sum()

    assert error(scales) < 1.0005 * error(best)
    assert error(scales) < 0.9 * error(weights.abs().amax(1) / 7)


def test_mse_uses_scales_of_both_signs():
    _, scales = errors(GAUSSIAN[: 1 << 16], 64, search=True)
    assert 0.2 < (scales < 0).float().mean() < 0.8


def test_importance_lowers_the_error_of_the_columns_that_count():
    weights = GAUSSIAN[: 1 << 16]
    importance = torch.rand(4, 64, generator=torch.Generator().manual_seed(6)) ** 8
    plain, _ = errors(weights, 64, search=True)
    weighed, scales = errors(weights, 64, search=True, importance=importance)
    _, plain_scales = errors(weights, 64, search=True)
    unweighed_choice = errors_with(weights, plain_scales, importance)
    assert weighed.sum() < 0.95 * unweighed_choice.sum()
    absmax = errors(weights, 64, search=False, importance=importance)[0]
    assert (weighed <= absmax * (1 + 1e-5)).all()
    assert not torch.equal(scales, plain_scales)
    assert plain.sum() < errors(weights, 64, search=False)[0].sum()


def errors_with(weights, scales, importance):
    groups, scales = weights.view(-1, 64), scales.float()[:, None]
    back = torch.round(groups / scales).clamp(-8, 7) * scales
    return ((back - groups).square().view(-1, *importance.shape) * importance).reshape(-1, 64).sum(1)


def test_columns_without_data_in_a_group_fall_back_to_absmax():
    importance = torch.zeros(2, 64)
    importance[0] = 1
    weights = GAUSSIAN[: 1 << 12]
    _, scales = errors(weights, 64, search=True, importance=importance)
    _, absmax = errors(weights, 64, search=False)
    assert torch.equal(scales[1::2], absmax[1::2])


@pytest.mark.parametrize("form", ["int4", "compressed-tensors", "gptq"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_every_format_verifies_with_mse_and_is_closer(tiny, tmp_path, form, group_size):
    options = ["--format", form, "--group_size", group_size, "--verify"]
    worst = {}
    for scale in ("absmax", "mse"):
        stdout = quantize(tiny, tmp_path / scale, *options, "--scale", scale).stdout
        worst[scale] = max(float(line.split()[1]) for line in stdout.splitlines() if line.startswith("  worst:"))
    assert worst["mse"] < 0.9 * worst["absmax"]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_dead_column_with_the_largest_weight_does_not_zero_its_group(kernel, compiled):
    weights = (GAUSSIAN[: 1 << 12] * 0.7).view(-1, 64).bfloat16()
    weights[:, 7] = 200
    importance = torch.ones(1, 64)
    importance[0, 7] = 0
    rounding = q.Rounding(importance=importance, kernel=kernel if compiled else None)
    _, scales = q.quantize_groups(weights, torch.bfloat16, q.Workspace(), rounding)
    assert (scales != 0).all()


def test_padding_and_tiles_do_not_change_what_mse_chooses(tmp_path):
    weight = GAUSSIAN[: 300 * 200].view(300, 200).bfloat16()
    folder = save_model(tmp_path / "in", {"m.weight": weight})
    quantize(folder, tmp_path / "whole", "--scale", "mse", "--group_size", 64)
    quantize(folder, tmp_path / "cut", "--scale", "mse", "--group_size", 64, constants={"TILE_WEIGHTS": 3000})
    whole, cut = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


# --- the default ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "scale"), [("int4", "absmax"), ("compressed-tensors", "mse"), ("gptq", "mse")])
def test_the_seeds_layout_has_absmax_scales_by_default_and_the_formats_for_engines_closer_ones(tmp_path, form, scale):
    source = save_model(tmp_path / "in", {"layers.0.up.weight": torch.randn(8, 256).bfloat16()})
    assert f"scales {scale}, " in quantize(source, tmp_path / "out", "--format", form).stdout
    quantize(source, tmp_path / "named", "--format", form, "--scale", scale)
    out, named = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "named")
    assert all(torch.equal(out[name], tensor) for name, tensor in named.items())
    assert "holds what it should" in quantize(source, tmp_path / "out", "--verify").stdout
