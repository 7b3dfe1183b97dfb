"""The arithmetic and the bits: scales, codes, packing, and the way back."""

from __future__ import annotations

import math
import tempfile
from collections import Counter

import pytest
import torch
from conftest import folder_bytes, quantize, read_tensors, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pack_words, reference_quantize

import quantize_int4 as q

SEEDED = torch.Generator().manual_seed(1)


@pytest.fixture(scope="module", params=["torch", "compiled"])
def kernel(request) -> q.Kernel | None:
    """What quantizes weights of 16 bits."""
    return compiled() if request.param == "compiled" else None


def compiled() -> q.Kernel:
    try:
        return q.compile_kernel(True)
    except q.NoKernel as reason:
        pytest.skip(str(reason))


def quantize_weight(weight: torch.Tensor, group_size: int, scale_dtype=torch.float16, kernel=None):
    """Codes (rows, columns) and scales (rows, groups) of a weight that needs no padding."""
    groups = weight.clone().view(-1, group_size)
    words, scales = q.quantize_groups(groups, scale_dtype, q.Workspace(), q.Rounding(kernel=kernel))
    return q.unpack_int4(words).view(weight.shape), scales.view(len(weight), -1).clone()


def test_golden_bits_by_hand(kernel):
    # max is 7, so the scale is 1.0 = 0x3C00; halves round to even: 3.5 -> 4, 2.5 -> 2, -2.5 -> -2
    weight = torch.tensor([[7, -7, 1, -1, 0, 3.5, 2.5, -2.5]], dtype=torch.bfloat16)
    for with_offset, expected in ((False, 0xE_2_4_0_F_1_9_7), (True, 0x6_A_C_8_7_9_1_F)):
        words, scales = q.quantize_groups(weight, torch.float16, q.Workspace(), q.Rounding(with_offset, kernel=kernel))
        assert scales.view(torch.int16).tolist() == [0x3C00]
        assert words.item() & 0xFFFFFFFF == expected  # nibbles, element 0 lowest: -2 2 4 0 -1 1 -7 7


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


SIGNIFICANDS = {torch.bfloat16: 1 + torch.arange(2**7) / 2**7, torch.float16: 1 + torch.arange(2**10) / 2**10}


@pytest.mark.parametrize("dtype", SIGNIFICANDS, ids=str)
@pytest.mark.parametrize("scale_dtype", SIGNIFICANDS, ids=str)
def test_the_kernel_has_the_codes_of_the_division_at_every_significand(dtype, scale_dtype):
    significands = SIGNIFICANDS[dtype]
    weights = torch.cat([significands * 2.0**power for power in range(-4, 1)])
    weights = torch.cat([weights, -weights]).to(dtype).view(-1, 32)
    half_way = 0
    for largest in significands * 2:  # one binade: all others are alike
        groups = torch.cat([weights, torch.full((len(weights), 8), largest, dtype=dtype)], 1)
        words, scales = q.quantize_groups(groups, scale_dtype, q.Workspace(), q.Rounding(kernel=compiled()))
        quotients = groups.double() / scales[:, None].double()
        assert torch.equal(q.unpack_int4(words), quotients.round().clamp(-8, 7).to(torch.int8))
        half_way += int((quotients.abs() % 1 == 0.5).sum())
    assert half_way > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_knows_every_weight_of_16_bits_also_with_subnormal_scales_and_what_is_not_finite(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    groups = every.view(-1, 8)  # by magnitude, so that the scales are all there are
    for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
        results = []
        for kernel in (compiled(), None):
            try:
                outputs = q.quantize_groups(groups, scale_dtype, q.Workspace(), q.Rounding(kernel=kernel))
                outputs = [tensor.clone() for tensor in outputs]
            except q.NotQuantizable as error:
                outputs = [error.scales.clone()]
            finite = torch.isfinite(outputs[-1])
            finite_groups = groups[finite].clone()
            words, scales = q.quantize_groups(finite_groups, scale_dtype, q.Workspace(), q.Rounding(kernel=kernel))
            results.append((finite, words, scales))
        assert all(map(torch.equal, *results))
        assert 0 < finite.sum() < len(groups)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("+ 192.0f + (12582912.0f - 192.0f)", "+ 12582912.0f"),  # off by the reciprocal's error
        ("reciprocal +", "(reciprocal * 1.001f) +"),
        ("/ divisor + 12582912.0f;\n}", "* (1.001f / divisor) + 12582912.0f;\n}"),
        ("rounded.bits, 0x4B400007", "rounded.bits, 0x4B400006"),
        ("(bits, 0x4B3FFFF8)", "(bits, 0x4B3FFFF9)"),
        (
            "int16_t magnitude = ((const int16_t *)weights)[i] & 0x7FFF",
            "int16_t magnitude = ((const int16_t *)weights)[i]",
        ),
        ("0x1p112f", "0x1p111f"),
        ("(wide.bits & 0x80000000) | (uint32_t)", "(uint32_t)"),
        ("(uint32_t)(weight & 0x7FFF)", "(uint32_t)(weight & 0x7FFE)"),
        ("[2 * pair + odd]", "[2 * pair + (odd && pair < 128)]"),
        (">> 16 * odd", ">> 16 * (pair < 128 ? odd : 1 - odd)"),
        ("= ((code(sums", "= i >= 128 ? 0 : ((code(sums"),  # where the longest vectors end
        *(
            ("= ((code(sums", f"= {where} ? 0 : ((code(sums")  # in each loop that the compiler may make
            for where in (
                "count >= 128 && i < count / 128 * 64",
                "count % 128 >= 64 && i >= count / 128 * 64 && i < count / 64 * 32",
                "count % 64 >= 32 && i >= count / 64 * 32 && i < count / 32 * 16",
                "count % 32 >= 16 && i >= count / 32 * 16",
            )
        ),
        *(
            (loop, loop.replace("size / 2", f"size / {width} * {width // 2}"))  # without its rest
            for width in (64, 32, 16)
            for loop in (
                "0x1p-126f)  /* else the reciprocal may be infinite */\n        for (long i = 0; i < size / 2",
                "else\n        for (long i = 0; i < size / 2; i++)\n            for (long odd = 0; odd < 2; odd++)\n"
                "                sums",
            )
        ),
        ("* reciprocal", "* (i < 128 ? reciprocal : 1)"),
        ("<< 4) ^ offset", "<< 3) ^ offset"),
        ("(code(sums[i]) & 15)", "code(sums[i])"),
        ("<< 4) ^ offset", "<< 4)"),
        ("most_of_16 = MAX", "most_of_16 = i >= 256 ? most_of_16 : MAX"),
        ("        most = MAX", "        most = i >= 256 ? most : MAX"),
        ("[i] & 0x7FFFFFFF", "[i]"),
        ("long column = group % all->in_row * size", "long column = 0"),
        ("positive ? most : -most", "most"),
        ("positive |= ", "positive |= i < 256 && "),
        ("1 / largest * -16384", "1 / largest * -16383.9f"),
        ("(parts[i] * share[i] + 8192)", "(parts[i] * share[i])"),
        ("(code + 256)", "(code + 255)"),
        ("products += weighed", "products += i >= 256 ? 0 : weighed"),
        ("squares += (int16_t)", "squares += i < 256 && (int16_t)"),
        ("all->importance + column;", "all->importance;"),
        ("gain > best_gain ? scale", "gain > 0 ? scale"),
        ("weights[i] / divisor", "weights[i] * (1.02f / divisor)"),
        ("* divisor - weights[i];", "* divisor * 1.0000001f - weights[i];"),
        ("terms[i] = error * error", "terms[i] = i >= 256 ? 0 : error * error"),
        ("size, terms[k])", "size, k >= 8 ? terms[k] : 0)"),
        ("(1 << (dropped - 1)) - 1 +", "(1 << (dropped - 1)) +"),
        ("(1 << (dropped - 1)) - 1 +", "(1 << (dropped - 1)) - (dropped == 16) +"),  # of float16 alone
        ("scale + 0.75f - 0.75f", "scale"),
        ("float magnitude = MAX(scale, -scale);", "float magnitude = scale;"),
        ("largest / 7", "largest / 8"),
        ("found && found_error <", "found && found_error >"),
        ("= k == i", "= 1"),
        ("inverse[k][i] * direction[k]", "inverse[start][i] * direction[k]"),
        ("rest[column] + SUM", "SUM"),
        ("inverse[k][i] -=", "inverse[k][i] +="),
        ("MIN(most[row], ", "MIN(9 * most[row], "),
        ("MAX(-most[row], ", "MAX(-9 * most[row], "),
        ("row < rows ?", "row < 7 ?"),
        ("floats changed = block[i] + ", "floats changed = block[i] + 0 * "),
        ("(block[i] + change) / divisors", "block[i] / divisors"),
        ("block[i] - codes * scales", "block[i] - codes * scales * 1.001f"),
        ("carried[k] += error", "carried[k] -= error"),
        ("i % 2 * MAX_GROUP + i / 2", "i / 2 + (i + 1) % 2 * MAX_GROUP"),
        ("MIN(rows - row, 8)", "(rows - row < 8 ? 3 : 8)"),
        ("carried[64] = {0}, scales", "carried[64] = {1}, scales"),
    ],
)
def test_a_kernel_that_calculates_otherwise_is_found_out(monkeypatch, right, wrong):
    compiled()
    torch.set_num_threads(1)  # as `main` does
    assert q.KERNEL_SOURCE.count(right) == 1
    monkeypatch.setattr(q, "KERNEL_SOURCE", q.KERNEL_SOURCE.replace(right, wrong))
    with pytest.raises(q.NoKernel, match="rounds otherwise"):
        q.compile_kernel.__wrapped__(True)


class CountingKernel:
    """The compiled kernel, counting what it is asked for."""

    def __init__(self):
        self.calls, self._kernel = Counter(), compiled()

    def __getattr__(self, name: str):
        self.calls[name] += 1
        return getattr(self._kernel, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, q.MAX_GROUP, q.MAX_GROUP + 8])
@pytest.mark.parametrize("search", [False, True], ids=["absmax", "mse"])
def test_the_kernel_has_the_bytes_of_torch_and_works_in_groups_of_up_to_a_thousand_columns(
    dtype, scale_dtype, group_size, search
):
    groups = torch.randn(300, group_size, generator=SEEDED).to(dtype)
    kernel, results, importance = CountingKernel(), [], torch.ones(1, group_size) if search else None
    for some in (kernel, None):
        outputs = q.quantize_groups(groups, scale_dtype, q.Workspace(), q.Rounding(False, importance, kernel=some))
        results.append([tensor.clone() for tensor in outputs])
    assert all(map(torch.equal, *results))
    assert kernel.calls["quantize"] == (group_size <= q.MAX_GROUP)


def test_a_conversion_compiles_and_uses_the_kernel_if_it_has_work_for_it(tmp_path, monkeypatch):
    kernel = CountingKernel()
    monkeypatch.setattr(q, "compile_kernel", lambda search: kernel)
    monkeypatch.setattr(q, "stop_on_signals", lambda: None)  # they are pytest's here
    folder = save_model(tmp_path / "in", {"m.weight": torch.randn(72, 256, generator=SEEDED).bfloat16()})
    arguments = ["--input_dir", str(folder), "--min_free_gb", "0", "--output_dir"]
    assert q.main([*arguments, str(tmp_path / "out")]) == 0
    assert kernel.calls == {"quantize": 1}
    monkeypatch.setattr(q, "compile_kernel", lambda search: pytest.fail("compiled without need"))
    eights = ["--format", "compressed-tensors", "--int8", "m"]
    assert q.main([*arguments, str(tmp_path / "eights"), *eights]) == 0


@pytest.mark.parametrize(
    ("script", "reason"),
    [("sleep 30", "took more than 0.2 s"), ('cc "$@" -fvisibility=hidden', "undefined symbol")],
)
def test_a_compiler_that_hangs_or_hides_the_functions_is_a_note_and_leaves_no_files(
    tmp_path, monkeypatch, script, reason
):
    compiled()
    compiler, temporary = tmp_path / "compiler", tmp_path / "temporary"
    compiler.write_text(f"#!/bin/sh\nexec {script}\n")
    compiler.chmod(0o755)
    temporary.mkdir()
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(q, "COMPILER_TIMEOUT_S", 0.2 if script == "sleep 30" else 60)
    with pytest.raises(q.NoKernel, match=reason):
        q.compile_kernel.__wrapped__(True)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("scale", ["absmax", "mse"])
@pytest.mark.parametrize("format_name", q.FORMATS)
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-cc -O2", "there is no C compiler 'no-such-cc'"),
        ("false", "'false' failed: exit code 1"),
        ("true", "kernel.so"),
    ],
)
def test_without_a_compiler_the_output_is_the_same_and_the_user_is_told(tmp_path, format_name, compiler, reason, scale):
    compiled()
    folder = save_model(tmp_path / "in", {"m.weight": torch.randn(72, 256, generator=SEEDED).bfloat16()})
    options = ["--format", format_name, "--scale", scale]
    told = [
        quantize(folder, tmp_path / name, *options, environment={"CC": cc}).stdout
        for name, cc in (("without", compiler), ("with", "cc"))
    ]
    assert folder_bytes(tmp_path / "without") == folder_bytes(tmp_path / "with")
    assert [text.count("rounding with torch, which takes twice the processor's time or more") for text in told] == [
        1,
        0,
    ]
    assert reason in told[0]


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
    tensors = {f"m.{i}.weight": torch.randn(shape, generator=SEEDED).to(dtype) for i, shape in enumerate(SHAPES)}
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


def test_tiles_and_jobs_cut_a_weight_without_a_seam(tmp_path):
    """Rows longer than a tile, ragged ends and several jobs a weight give the bytes of a single tile."""
    tensors = {
        "wide.weight": torch.randn(3, 1000, generator=SEEDED).bfloat16(),
        "tall.weight": torch.randn(257, 72, generator=SEEDED).bfloat16(),
        "kept.bias": torch.randn(12345, generator=SEEDED).bfloat16(),
    }
    folder = save_model(tmp_path / "in", tensors)
    quantize(folder, tmp_path / "whole", "--group_size", 64)
    constants = {"TILE_WEIGHTS": 256, "JOB_WEIGHTS": 1024, "COPY_BYTES": 100}
    quantize(folder, tmp_path / "cut", "--group_size", 64, constants=constants)
    whole, cut = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@given(st.lists(st.integers(-8, 7), min_size=8, max_size=64).filter(lambda codes: len(codes) % 8 == 0))
def test_packing_equals_the_reference_and_unpacks_to_the_same_codes(codes):
    words = q.pack_int4(torch.tensor([codes], dtype=torch.int16) + 0x4340, q.Workspace())  # only low bits count
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
    return (unpacked.float().reshape(-1, group_size) * scales.float().reshape(-1, 1)).reshape(rows, columns)


@pytest.mark.parametrize("columns", [256, 300])
def test_dequantize_int4_equals_the_seeds_recipe_and_drops_the_padding(tmp_path, columns):
    weight = torch.randn(9, columns, generator=SEEDED).bfloat16()
    quantize(save_model(tmp_path / "in", {"m.weight": weight}), tmp_path / "out")
    output = read_tensors(tmp_path / "out")
    recipe = seed_recipe(output["m.qweight"], output["m.scales"], 128)
    assert torch.equal(q.dequantize_int4(output["m.qweight"], output["m.scales"], 128), recipe)
    assert torch.equal(q.dequantize_int4(output["m.qweight"], output["m.scales"], 128, columns), recipe[:, :columns])
    assert not recipe[:, columns:].any()


def test_dequantize_int4_says_when_the_group_size_is_wrong():
    with pytest.raises(ValueError, match="group_size is not 64"):
        q.dequantize_int4(torch.zeros(2, 16, dtype=torch.int32), torch.ones(2, 1).half(), 64)


def test_every_weight_comes_back_within_half_a_scale(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    source, output = read_tensors(tiny), read_tensors(tmp_path / "out")
    checked = 0
    for name, weight in source.items():
        module = name.removesuffix(".weight")
        if module + ".qweight" not in output:
            continue
        scales = output[module + ".scales"].float()
        back = seed_recipe(output[module + ".qweight"], output[module + ".scales"], 128)[:, : weight.shape[1]]
        bound = scales.repeat_interleave(128, 1)[:, : weight.shape[1]] * (0.5 + 7 * 2**-11)
        assert ((back - weight.float()).abs() <= bound).all(), name
        checked += 1
    assert checked == 29


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_no_bad_value_passes(value, dtype):
    groups = torch.randn(4, 128).to(dtype)
    groups[2, 77] = value
    for kernel in (compiled(), None):
        for importance in (None, torch.ones(1, 128)):
            with pytest.raises(q.NotQuantizable) as error:
                q.quantize_groups(groups, torch.float16, q.Workspace(), q.Rounding(False, importance, kernel=kernel))
            assert torch.isfinite(error.value.scales).tolist() == [True, True, False, True]


def test_a_group_larger_than_a_tile_is_quantized_as_a_whole(tmp_path):
    weight = torch.randn(3, 10_000, generator=SEEDED).bfloat16()
    folder = save_model(tmp_path / "in", {"m.weight": weight})
    quantize(folder, tmp_path / "out", "--group_size", 4096, constants={"TILE_WEIGHTS": 1024})
    output = read_tensors(tmp_path / "out")
    assert output["m.scales"].shape == (3, 3)
    codes, scales = reference_quantize(torch.nn.functional.pad(weight, (0, 2288)).float(), 4096)
    assert output["m.scales"].float().tolist() == scales
    assert q.unpack_int4(output["m.qweight"]).tolist() == codes


def test_decoding_stays_on_the_device_of_the_words():
    words, scales = torch.empty(4, 32, dtype=torch.int32, device="meta"), torch.empty(4, 2, device="meta").half()
    weight = q.dequantize_int4(words, scales, 128, columns=200)
    assert (weight.device.type, weight.shape) == ("meta", (4, 200))


def test_weights_too_small_for_any_scale_become_codes_of_zero():
    # Their scale rounds to 0. What a quotient by 0 becomes as an integer differs between processors.
    weights = torch.tensor([[1e-9, -1e-9, 0.0, 2e-8], [1.0, -1.0, 0.5, 0.0]])
    for scale in (0.5, -0.5):
        divisors = q.divisors_of(torch.tensor([0.0, scale]).half())
        codes = q.round_to_codes(weights, divisors, torch.empty_like(weights))
        assert (codes * scale).tolist() == [[0, 0, 0, 0], [1, -1, 0.5, 0]]


def test_a_buffer_that_memory_does_not_hold_is_an_error_that_says_what_to_do():
    with pytest.raises(q.QuantizeError, match=r"no memory for a buffer of .* TB: .* fewer --threads"):
        q.Workspace().tensor("raw", torch.uint8, 1 << 60)


def test_the_bytes_of_a_tensor_are_only_given_for_the_buffer_it_lies_in():
    workspace = q.Workspace()
    words = workspace.tensor("words", torch.int32, 2, 3).fill_(0x01020304)
    assert bytes(workspace.bytes_of("words", words)) == b"\x04\x03\x02\x01" * 6
    workspace.tensor("scales", torch.float16, 6)
    for role, tensor in (("scales", words), ("words", words[1:]), ("words", words.T)):
        with pytest.raises(AssertionError):
            workspace.bytes_of(role, tensor)


def test_tensors_of_a_workspace_are_the_same_bytes_after_it_has_grown():
    workspace = q.Workspace()
    workspace.tensor("codes", torch.int8, 2, 4).fill_(1)
    workspace.tensor("codes", torch.int8, 200).fill_(7)
    assert workspace.tensor("codes", torch.int8, 2, 4).tolist() == [[7] * 4] * 2
