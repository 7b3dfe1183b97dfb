"""Quantization: scales, codes, packing, and the way back (README: "Columns that share a scale")."""

from __future__ import annotations

import math

import pytest
import torch
from arithmetic import Kernels, quantize_groups, quantize_or_refuse
from checkpoints import SEEDED, random, save_model
from conftest import assert_refused, quantize, run_cli
from folders import assert_same_tensors, read_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pack_words, reference_quantize

import quantize_int4 as q


@pytest.fixture(scope="module", params=["torch", "compiled"])
def kernel(request) -> Kernels | None:
    """What quantizes weights."""
    return Kernels() if request.param == "compiled" else None


def quantize_weight(weight: torch.Tensor, group_size: int, scale_dtype=torch.float16, kernel=None):
    """Codes (rows, columns) and scales (rows, groups) of a weight that needs no padding."""
    groups = weight.clone().view(-1, group_size)
    words, scales = quantize_groups(groups, scale_dtype, kernel=kernel)
    return q.unpack_int4(words).view(weight.shape), scales.view(len(weight), -1)


# --- codes of absmax scales -------------------------------------------------------------------------------------------


def test_golden_bits_by_hand(kernel):
    # max is 7, so the scale is 1.0 = 0x3C00; halves round to even: 3.5 -> 4, 2.5 -> 2, -2.5 -> -2
    weight = torch.tensor([[7, -7, 1, -1, 0, 3.5, 2.5, -2.5]], dtype=torch.bfloat16)
    for with_offset, expected in ((False, 0xE_2_4_0_F_1_9_7), (True, 0x6_A_C_8_7_9_1_F)):
        words, scales = quantize_groups(weight, kernel=kernel, with_offset=with_offset)
        assert scales.view(torch.int16).tolist() == [0x3C00]
        assert (
            words.item() & 0xFFFFFFFF == expected
        )  # nibbles, element 0 lowest: -2 2 4 0 -1 1 -7 7


def test_golden_bits_of_a_scale_that_rounds():
    # 1/7 = 0.142857 is 0x3092 in float16 (0.142822); 1.0 / 0.142822 = 7.0017 -> 7, 0.0714 / 0.142822 = 0.49994 -> 0
    codes, scales = quantize_weight(torch.tensor([[1.0, 0.0714, -0.0715, -1.0, 0, 0, 0, 0]]), 8)
    assert scales.view(torch.int16).tolist() == [[0x3092]]
    assert codes.tolist() == [[7, 0, -1, -7, 0, 0, 0, 0]]


def test_division_is_true_division_not_by_a_reciprocal():
    # w / scale is 2.5 - half an ulp or so; w * (1 / scale) rounds up to 2.5 or beyond for some of these
    scales = torch.linspace(0.9, 1.1, 4001).half().float()
    weights = torch.stack([scales * 7, scales * 2.5, scales * 1.5, scales * 0.5] * 2, 1)
    codes, stored = quantize_weight(weights, 8)
    expected = reference_quantize(weights, 8)
    assert codes.tolist() == expected[0]
    assert stored.float().tolist() == expected[1]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([8, 24, 32, 64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    exponent=st.integers(-30, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_and_scales_equal_the_slow_reference(
    kernel, rows, groups, group_size, dtype, scale_dtype, exponent, seed
):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, groups * group_size, generator=generator) * 2.0**exponent).to(dtype)
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    weight[-1, -group_size:] = 0
    codes, scales = quantize_weight(weight, group_size, scale_dtype, kernel)
    expected_codes, expected_scales = reference_quantize(weight, group_size, scale_dtype)
    assert codes.tolist() == expected_codes
    assert scales.float().tolist() == expected_scales
    assert scales[-1, -1] == 0  # an all-zero group
    assert not codes[-1, -group_size:].any()


SHAPES = [(1, 8), (1, 128), (3, 136), (7, 200), (2, 1856), (5, 129), (300, 128), (1, 5000)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [8, 128])
def test_output_equals_the_slow_reference_over_odd_shapes(tmp_path, dtype, group_size):
    tensors = {
        f"m.{i}.weight": torch.randn(shape, generator=SEEDED).to(dtype)
        for i, shape in enumerate(SHAPES)
    }
    tensors["zeros.weight"] = torch.zeros(3, 256, dtype=dtype)
    tensors["denormal.weight"] = (torch.randn(3, 256, generator=SEEDED) * 2e-6).to(dtype)
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out", "--group_size", group_size)
    output = read_tensors(tmp_path / "out")
    quantized = {name for name, weight in tensors.items() if weight.shape[1] >= group_size}
    for name in quantized:
        codes, scales = reference_quantize(tensors[name], group_size)
        module = name.removesuffix(".weight")
        assert output[module + ".qweight"].tolist() == [pack_words(row) for row in codes], name
        assert output[module + ".scales"].tolist() == scales, name
        assert name not in output
    assert len(output) == 2 * len(quantized) + (len(tensors) - len(quantized))


def test_a_group_larger_than_a_tile_is_quantized_as_a_whole(tmp_path):
    weight = random(3, 10_000)
    folder = save_model(tmp_path / "in", {"m.weight": weight})
    quantize(folder, tmp_path / "out", "--group_size", 4096, constants={"TILE_WEIGHTS": 1024})
    output = read_tensors(tmp_path / "out")
    assert output["m.scales"].shape == (3, 3)
    codes, scales = reference_quantize(torch.nn.functional.pad(weight, (0, 2288)).float(), 4096)
    assert output["m.scales"].float().tolist() == scales
    assert q.unpack_int4(output["m.qweight"]).tolist() == codes


def test_weights_too_small_for_any_scale_become_codes_of_zero():
    # Their scale rounds to 0. What a quotient by 0 becomes as an integer differs between processors.
    weights = torch.tensor([[1e-9, -1e-9, 0.0, 2e-8], [1.0, -1.0, 0.5, 0.0]])
    for scale in (0.5, -0.5):
        codes = torch.empty_like(weights)
        q.round_to_codes(weights, torch.tensor([0.0, scale]).half(), codes)
        assert (codes * scale).tolist() == [[0, 0, 0, 0], [1, -1, 0.5, 0]]


# --- scales of least squared error ------------------------------------------------------------------------------------

GAUSSIAN = torch.randn(1 << 22, generator=torch.Generator().manual_seed(5))
TARGETS = {
    128: (0.1174, 0.0967),
    64: (0.1077, 0.0899),
    32: (0.0971, 0.0811),
}  # relative RMS error: absmax, mse


def errors(weights, group_size, search, scale_dtype=torch.float16, importance=None):
    """Squared error of each group and the scales, by tiles as the program does it."""
    result, all_scales = [], []
    weighing = torch.ones(1, group_size) if search and importance is None else importance
    for tile in weights.view(-1, group_size).split(1 << 13):
        words, scales = quantize_groups(tile.clone(), scale_dtype, importance=weighing)
        squares = (q.unpack_int4(words) * scales.float()[:, None] - tile.float()).square()
        if importance is not None:
            squares = squares.view(-1, *importance.shape) * importance
        result.append(squares.reshape(-1, group_size).sum(1))
        all_scales.append(scales)
    return torch.cat(result), torch.cat(all_scales)


@pytest.mark.parametrize("group_size", TARGETS)
def test_mse_reaches_its_error_on_gaussian_weights_and_absmax_its_own(group_size):
    norm = GAUSSIAN.double().square().sum()
    absmax, mse = (
        math.sqrt(errors(GAUSSIAN, group_size, search)[0].double().sum() / norm)
        for search in (False, True)
    )
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
    return (
        ((back - groups).square().view(-1, *importance.shape) * importance).reshape(-1, 64).sum(1)
    )


def test_columns_without_data_in_a_group_fall_back_to_absmax():
    importance = torch.zeros(2, 64)
    importance[0] = 1
    weights = GAUSSIAN[: 1 << 12]
    _, scales = errors(weights, 64, search=True, importance=importance)
    _, absmax = errors(weights, 64, search=False)
    assert torch.equal(scales[1::2], absmax[1::2])


def test_a_dead_column_with_the_largest_weight_does_not_zero_its_group(kernel):
    weights = (GAUSSIAN[: 1 << 12] * 0.7).view(-1, 64).bfloat16()
    weights[:, 7] = 200
    importance = torch.ones(1, 64)
    importance[0, 7] = 0
    _, scales = quantize_groups(weights, torch.bfloat16, importance=importance, kernel=kernel)
    assert (scales != 0).all()


@pytest.mark.parametrize("form", ["int4", "compressed-tensors", "gptq"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_every_format_verifies_with_mse_and_is_closer(tiny, tmp_path, form, group_size):
    options = ["--format", form, "--group_size", group_size, "--verify"]
    worst = {}
    for scale in ("absmax", "mse"):
        stdout = quantize(tiny, tmp_path / scale, *options, "--scale", scale).stdout
        worst[scale] = max(
            float(line.split()[1]) for line in stdout.splitlines() if line.startswith("  worst:")
        )
    assert worst["mse"] < 0.9 * worst["absmax"]


def test_padding_and_tiles_do_not_change_what_mse_chooses(tmp_path):
    weight = GAUSSIAN[: 300 * 200].view(300, 200).bfloat16()
    folder = save_model(tmp_path / "in", {"m.weight": weight})
    quantize(folder, tmp_path / "whole", "--scale", "mse", "--group_size", 64)
    quantize(
        folder,
        tmp_path / "cut",
        "--scale",
        "mse",
        "--group_size",
        64,
        constants={"TILE_WEIGHTS": 3000},
    )
    assert_same_tensors(tmp_path / "cut", tmp_path / "whole")


# --- bad values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_no_bad_value_passes(kernel, value, dtype):
    groups = torch.randn(4, 128).to(dtype)
    groups[2, 77] = value
    for importance in (None, torch.ones(1, 128)):
        quantizable, _ = quantize_or_refuse(
            groups, torch.float16, importance=importance, kernel=kernel
        )
        assert quantizable.tolist() == [True, True, False, True]


BAD_VALUES = [
    (float("nan"), "nan is not finite"),
    (float("inf"), "inf is not finite"),
    (float("-inf"), "-inf is not finite"),
    (-1e6, "needs a scale beyond float16"),
]


@pytest.mark.parametrize(("value", "problem"), BAD_VALUES)
@pytest.mark.parametrize("columns", [256, 300])
def test_a_bad_weight_is_an_error_that_names_tensor_row_and_column(
    tmp_path, value, problem, columns
):
    weight = torch.randn(3000, columns).bfloat16()
    weight[2345, 217] = value
    folder = save_model(tmp_path / "in", {"good.weight": torch.ones(4, 128), "bad.weight": weight})
    assert_refused(
        run_cli(folder, tmp_path / "out"), "'bad.weight'", "row 2345, column 217", problem
    )
    assert not list((tmp_path / "out").iterdir())


def test_a_bad_value_in_a_kept_tensor_is_kept(tmp_path):
    tensors = {"m.bias": torch.tensor([float("nan")]), "m.weight": torch.ones(4, 128)}
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out")
    assert read_tensors(tmp_path / "out")["m.bias"].isnan().all()


# --- packing, and the way back ----------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-8, 7), min_size=8, max_size=64).filter(lambda codes: len(codes) % 8 == 0)
)
def test_packing_equals_the_reference_and_unpacks_to_the_same_codes(codes):
    # Only low bits count.
    words = torch.zeros(1, len(codes) // 8, dtype=torch.int32)
    q.pack_int4(torch.tensor([codes], dtype=torch.int16) + 0x4340, words)
    assert words.tolist() == [pack_words(codes)]
    assert q.unpack_int4(words).tolist() == [codes]


def seed_recipe(qweight: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """The dequantization that the project's users were promised, line by line."""
    rows, packed_columns = qweight.shape
    columns = packed_columns * 8
    unpacked = torch.zeros(rows, columns, dtype=torch.int8)
    for i in range(8):
        unpacked[:, i::8] = ((qweight >> (i * 4)) & 0xF).to(torch.int8)
    unpacked = torch.where(unpacked > 7, unpacked - 16, unpacked)
    return (unpacked.float().reshape(-1, group_size) * scales.float().reshape(-1, 1)).reshape(
        rows, columns
    )


@pytest.mark.parametrize("columns", [256, 300])
def test_dequantize_int4_equals_the_seeds_recipe_and_drops_the_padding(tmp_path, columns):
    weight = random(9, columns)
    quantize(save_model(tmp_path / "in", {"m.weight": weight}), tmp_path / "out")
    output = read_tensors(tmp_path / "out")
    recipe = seed_recipe(output["m.qweight"], output["m.scales"], 128)
    assert torch.equal(q.dequantize_int4(output["m.qweight"], output["m.scales"], 128), recipe)
    assert torch.equal(
        q.dequantize_int4(output["m.qweight"], output["m.scales"], 128, columns),
        recipe[:, :columns],
    )
    assert not recipe[:, columns:].any()


def test_dequantize_int4_says_when_the_group_size_is_wrong():
    with pytest.raises(ValueError, match="group_size is not 64"):
        q.dequantize_int4(torch.zeros(2, 16, dtype=torch.int32), torch.ones(2, 1).half(), 64)


def test_decoding_stays_on_the_device_of_the_words():
    words, scales = (
        torch.empty(4, 32, dtype=torch.int32, device="meta"),
        torch.empty(4, 2, device="meta").half(),
    )
    weight = q.dequantize_int4(words, scales, 128, columns=200)
    assert (weight.device.type, weight.shape) == ("meta", (4, 200))


def test_every_weight_comes_back_within_half_a_scale(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    source, output = read_tensors(tiny), read_tensors(tmp_path / "out")
    checked = 0
    for name, weight in source.items():
        module = name.removesuffix(".weight")
        if module + ".qweight" not in output:
            continue
        scales = output[module + ".scales"].float()
        back = seed_recipe(output[module + ".qweight"], output[module + ".scales"], 128)[
            :, : weight.shape[1]
        ]
        bound = scales.repeat_interleave(128, 1)[:, : weight.shape[1]] * (0.5 + 7 * 2**-11)
        assert ((back - weight.float()).abs() <= bound).all(), name
        checked += 1
    assert checked == 29


# --- buffers ----------------------------------------------------------------------------------------------------------


def test_a_buffer_that_memory_does_not_hold_is_an_error_that_says_what_to_do():
    with pytest.raises(
        q.QuantizeError, match=r"no memory for a buffer of .* TB: .* fewer --threads"
    ):
        q.Workspace().tensor("raw", torch.uint8, 1 << 60)


def test_tensors_of_a_workspace_are_the_same_bytes_after_it_has_grown():
    workspace = q.Workspace()
    workspace.tensor("codes", torch.int8, 2, 4).fill_(1)
    workspace.tensor("codes", torch.int8, 200).fill_(7)
    assert workspace.tensor("codes", torch.int8, 2, 4).tolist() == [[7] * 4] * 2
