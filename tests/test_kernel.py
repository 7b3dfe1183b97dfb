"""Kernel: the bytes of torch, or it is done without (README: "The search and the rounding are done by a kernel")."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter

import pytest
import torch
from arithmetic import EXTREME_WEIGHTS, compiled_kernel, quantize_groups, quantize_or_refuse
from checkpoints import SEEDED, random, save_model
from conftest import quantize
from folders import folder_bytes

import quantize_int4 as q

GAUSSIAN = torch.randn(1 << 22, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def kernel() -> q.Kernel:
    return compiled_kernel()


def test_the_compiler_is_told_that_floats_are_read_as_integers():
    assert "-fno-strict-aliasing" in q.KERNEL_FLAGS


# --- the same bytes as torch ------------------------------------------------------------------------------------------

SIGNIFICANDS = {
    torch.bfloat16: 1 + torch.arange(2**7) / 2**7,
    torch.float16: 1 + torch.arange(2**10) / 2**10,
}


@pytest.mark.parametrize("dtype", SIGNIFICANDS, ids=str)
@pytest.mark.parametrize("scale_dtype", SIGNIFICANDS, ids=str)
def test_the_kernel_has_the_codes_of_the_division_at_every_significand(kernel, dtype, scale_dtype):
    significands = SIGNIFICANDS[dtype]
    weights = torch.cat([significands * 2.0**power for power in range(-4, 1)])
    weights = torch.cat([weights, -weights]).to(dtype).view(-1, 32)
    half_way = 0
    for largest in significands * 2:  # one binade: all others are alike
        groups = torch.cat([weights, torch.full((len(weights), 8), largest, dtype=dtype)], 1)
        words, scales = quantize_groups(groups, scale_dtype, kernel=kernel)
        quotients = groups.double() / scales[:, None].double()
        assert torch.equal(q.unpack_int4(words), quotients.round().clamp(-8, 7).to(torch.int8))
        half_way += int((quotients.abs() % 1 == 0.5).sum())
    assert half_way > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_knows_every_weight_of_16_bits_also_with_subnormal_scales_and_what_is_not_finite(
    kernel, dtype
):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    groups = every.view(-1, 8)  # by magnitude, so that the scales are all there are
    for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
        results = []
        for some in (kernel, None):
            quantizable, _ = quantize_or_refuse(groups, scale_dtype, kernel=some)
            results.append(
                (quantizable, *quantize_groups(groups[quantizable], scale_dtype, kernel=some))
            )
        assert all(map(torch.equal, *results))
        assert 0 < quantizable.sum() < len(groups)


class CountingKernel:
    """The compiled kernel, counting what it is asked for."""

    def __init__(self):
        self.calls, self._kernel = Counter(), compiled_kernel()

    def __getattr__(self, name: str):
        self.calls[name] += 1
        return getattr(self._kernel, name)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, q.MAX_GROUP, q.MAX_GROUP + 8])
@pytest.mark.parametrize("search", [False, True], ids=["absmax", "mse"])
def test_the_kernel_has_the_bytes_of_torch_and_works_in_groups_of_up_to_a_thousand_columns(
    dtype, scale_dtype, group_size, search
):
    groups = torch.randn(300, group_size, generator=SEEDED).to(dtype)
    kernel, results, importance = (
        CountingKernel(),
        [],
        torch.ones(1, group_size) if search else None,
    )
    for some in (kernel, None):
        results.append(quantize_groups(groups, scale_dtype, importance=importance, kernel=some))
    assert all(map(torch.equal, *results))
    assert kernel.calls["quantize"] == (group_size <= q.MAX_GROUP)


IMPORTANCE = {
    "none": lambda noise: torch.ones(1, noise.shape[1]),
    "smooth": lambda noise: noise.square(),
    "steep": lambda noise: noise.mul(9).exp() * torch.tensor([[1], [0], [1e-20], [1e20]]),
    "padded": lambda noise: (
        noise.square() * (torch.arange(noise.numel()).view_as(noise) < noise.numel() - 5)
    ),
}


@pytest.mark.parametrize("group_size", [8, 24, 32, 64, 128, 264, q.MAX_GROUP, q.MAX_GROUP + 8])
@pytest.mark.parametrize("kind", EXTREME_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_and_torch_find_the_same_scales_and_codes_bit_for_bit(
    kernel, dtype, kind, group_size
):
    noise = GAUSSIAN[: 400 * group_size].view(400, group_size)
    weights = EXTREME_WEIGHTS[kind](noise).to(dtype)
    weights[5] = 0
    for name, make in IMPORTANCE.items():
        importance = make(noise[100:104])
        for scale_dtype in (torch.float16, torch.bfloat16):
            results = [
                quantize_or_refuse(weights, scale_dtype, importance=importance, kernel=some)
                for some in (kernel, None)
            ]
            assert all(map(torch.equal, *results)), (name, scale_dtype)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("group_size", [32, 264])
def test_the_search_in_integers_is_as_close_as_one_in_float64(kernel, group_size, weighed):
    groups = GAUSSIAN[: 2000 * group_size].view(-1, group_size).bfloat16()
    importance = (
        GAUSSIAN[: 2 * group_size].view(2, -1).square() if weighed else torch.ones(2, group_size)
    )
    _, scales = quantize_groups(groups, importance=importance, kernel=kernel)
    weights, counts = groups.double(), importance.double().repeat(1000, 1)
    largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))

    steps = torch.tensor(q.SEARCH_STEPS).double()[:, None, None]
    codes = torch.round(weights * -steps / largest).clamp(-8, 7)
    sums = (weights * codes * counts).sum(2)
    candidates = sums / (codes * codes * counts).sum(2)  # (steps, groups)
    best = candidates.gather(0, (sums * candidates).argmax(0, keepdim=True))[0]

    def error(scales):
        scales = scales.double()[:, None]
        return (
            ((weights / scales).round().clamp(-8, 7) * scales - weights).square() * counts
        ).sum()

    assert error(scales) < 1.0005 * error(best)
    assert error(scales) < 0.9 * error(weights.abs().amax(1) / 7)


# --- its compilation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("weight / divisor", "weight * (1 / divisor)"),  # off by the reciprocal's error
        ("rounded.bits, 0x4B400007", "rounded.bits, 0x4B400006"),
        ("(bits, 0x4B3FFFF8)", "(bits, 0x4B3FFFF9)"),
        (
            "int16_t magnitude = ((const int16_t *)weights)[i] & 0x7FFF",
            "int16_t magnitude = ((const int16_t *)weights)[i]",
        ),
        ("0x1p112f", "0x1p111f"),
        ("(wide.bits & 0x80000000) | (uint32_t)", "(uint32_t)"),
        ("(uint32_t)(weight & 0x7FFF)", "(uint32_t)(weight & 0x7FFE)"),
        ("[2 * i + odd]", "[2 * i + (odd && i < 128)]"),
        (">> 16 * odd", ">> 16 * (i < 128 ? odd : 1 - odd)"),
        ("(const float *)weights)[i]", "(const float *)weights)[i < 256 ? i : 0]"),
        ("(const uint16_t *)weights)[i]", "(const uint16_t *)weights)[i < 256 ? i : 0]"),
        ("= ((code(sums", "= i >= 128 ? 0 : ((code(sums"),  # where the longest vectors end
        *(
            (
                "= ((code(sums",
                f"= {where} ? 0 : ((code(sums",
            )  # in each loop that the compiler may make
            for where in (
                "count >= 128 && i < count / 128 * 64",
                "count % 128 >= 64 && i >= count / 128 * 64 && i < count / 64 * 32",
                "count % 64 >= 32 && i >= count / 64 * 32 && i < count / 32 * 16",
                "count % 32 >= 16 && i >= count / 32 * 16",
            )
        ),
        *(
            (f"{loop} / 2", f"{loop} / {width} * {width // 2}")  # without its rest
            for loop in ("divisor = scale ? scale : 1;\n    for (long i = 0; i < size",)
            for width in (64, 32, 16)
        ),
        ("weight / divisor +", "weight / (i < 128 ? divisor : 1) +"),
        ("<< 4) ^ offset", "<< 3) ^ offset"),
        ("(code(sums[i]) & 15)", "code(sums[i])"),
        ("<< 4) ^ offset", "<< 4)"),
        ("most_of_16 = MAX", "most_of_16 = i >= 256 ? most_of_16 : MAX"),
        ("        most = MAX", "        most = i >= 256 ? most : MAX"),
        ("[i] & 0x7FFFFFFF", "[i]"),
        ("column = group % all->in_row * size", "column = 0"),
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
        (
            "(1 << (dropped - 1)) - 1 +",
            "(1 << (dropped - 1)) - (dropped == 16) +",
        ),  # of float16 alone
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
        ("carried[MAX_RANK] = {0}, scales", "carried[MAX_RANK] = {1}, scales"),
    ],
)
def test_a_kernel_that_calculates_otherwise_is_found_out(monkeypatch, right, wrong):
    compiled_kernel()
    torch.set_num_threads(1)  # as `main` does
    assert q.KERNEL_SOURCE.count(right) == 1
    monkeypatch.setattr(q, "KERNEL_SOURCE", q.KERNEL_SOURCE.replace(right, wrong))
    with pytest.raises(q.QuantizeError, match="rounds otherwise"):
        q.compile_kernel.__wrapped__(True)


def test_a_conversion_compiles_and_uses_the_kernel_if_it_has_work_for_it(tmp_path, monkeypatch):
    kernel = CountingKernel()
    monkeypatch.setattr(q, "compile_kernel", lambda search: kernel)
    monkeypatch.setattr(q, "stop_on_signals", contextlib.nullcontext)  # they are pytest's here
    folder = save_model(tmp_path / "in", {"m.weight": random(72, 256)})
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
    compiled_kernel()
    compiler, temporary = tmp_path / "a-compiler", tmp_path / "temporary"
    compiler.write_text(f"#!/bin/sh\nexec {script}\n")
    compiler.chmod(0o755)
    temporary.mkdir()
    # Found by its name, since the folder's may have a space and CC is split there.
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CC", compiler.name)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(q, "COMPILER_TIMEOUT_S", 0.2 if script == "sleep 30" else 60)
    with pytest.raises(q.QuantizeError, match=reason):
        q.compile_kernel.__wrapped__(True)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("compiler", "reason", "format_name"),
    [
        ("no-such-cc -O2", "there is no C compiler 'no-such-cc'", "int4"),
        ("false", "'false' failed: exit code 1", "compressed-tensors"),
        ("true", "kernel.so", "gptq"),
    ],
)
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_without_a_compiler_the_output_is_the_same_and_the_user_is_told(
    tmp_path, format_name, compiler, reason, scale
):
    compiled_kernel()
    folder = save_model(tmp_path / "in", {"m.weight": random(72, 256)})
    options = ["--format", format_name, "--scale", scale]
    told = [
        quantize(folder, tmp_path / name, *options, environment={"CC": cc}).stdout
        for name, cc in (("without", compiler), ("with", "cc"))
    ]
    assert folder_bytes(tmp_path / "without") == folder_bytes(tmp_path / "with")
    assert [
        text.count("rounding with torch, which takes twice the processor's time or more")
        for text in told
    ] == [
        1,
        0,
    ]
    assert reason in told[0]
