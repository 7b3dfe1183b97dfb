"""Kernel: the bytes of torch, or it is done without (README: "torch gives the same bytes")."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from arithmetic import (
    EXTREME_WEIGHTS,
    Kernels,
    compiled_kernel,
    quantize_groups,
    quantize_or_refuse,
)
from checkpoints import SEEDED, random, save_model
from conftest import SCRIPT, command, quantize
from folders import folder_bytes

import quantize_int4 as q

GAUSSIAN = torch.randn(1 << 22, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def kernel() -> Kernels:
    return Kernels()


def test_the_compiler_is_told_that_floats_are_read_as_integers():
    assert "-fno-strict-aliasing" in q.KernelKind("quantize", "BF16", "ABSMAX").flags


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
    for largest in (significands * 2).split(32):  # one binade: all others are alike
        beside = largest.to(dtype).repeat_interleave(len(weights))[:, None].expand(-1, 8)
        groups = torch.cat([weights.repeat(len(largest), 1), beside], 1)
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


@pytest.fixture
def calls(monkeypatch) -> list[q.KernelKind]:
    """The kernels that are called, in turn."""
    calls = []
    quantize_with_kernel = q.quantize_with_kernel

    def count(*arguments):
        calls.append(arguments[-1].kernel.kind)
        return quantize_with_kernel(*arguments)

    monkeypatch.setattr(q, "quantize_with_kernel", count)
    return calls


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, q.MAX_GROUP, q.MAX_GROUP + 8])
@pytest.mark.parametrize("search", [False, True], ids=["absmax", "mse"])
def test_the_kernel_has_the_bytes_of_torch_and_works_in_groups_of_up_to_a_thousand_columns(
    kernel, calls, dtype, scale_dtype, group_size, search
):
    groups = torch.randn(300, group_size, generator=SEEDED).to(dtype)
    results = []
    importance = torch.ones(1, group_size) if search else None
    kernel.of(dtype, "SEARCH" if search else "ABSMAX")
    calls.clear()  # those of its trial
    for some in (kernel, None):
        results.append(quantize_groups(groups, scale_dtype, importance=importance, kernel=some))
    assert all(map(torch.equal, *results))
    assert len(calls) == (group_size <= q.MAX_GROUP)


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


def compile_anew(kind: q.KernelKind) -> q.Kernel:
    """Compile a kernel that may have been compiled already."""
    loaded = q.Kernel.loaded.pop(kind, None)
    try:
        return q.compile_kernel(kind)
    finally:
        q.Kernel.loaded.pop(kind, None)
        if loaded:
            q.Kernel.loaded[kind] = loaded


# By kernel, what in its source is replaced, and by what.
MUTANTS = {
    ("quantize", "BF16", "ABSMAX"): [
        ("least = bits_dropped == 13 ? 0x1p-21f", "least = bits_dropped == 13 ? 0"),
        (": 0x1p-126f;", ": 0;"),
        ("weight, reciprocal, 192.0f)", "weight, reciprocal, 192.0f * 1.001f)"),
        ("{.value = weight / divisor + ROUND}", "{.value = weight * (1.001f / divisor) + ROUND}"),
        ("ROUND_BITS + 7)", "ROUND_BITS + 6)"),
        ("ROUND_BITS - 8)", "ROUND_BITS - 7)"),
        ("const int16_t *)weights)[i] & 0x7FFF", "const int16_t *)weights)[i]"),
        ("        largest[group] = widen(most)", "        largest[group] = widen(most & 0x7FFE)"),
        (
            "            most = MAX(most, magnitude);\n        }\n        largest[group] = widen",
            "            most = i % size >= 256 ? most : MAX(most, magnitude);\n        }\n"
            "        largest[group] = widen",
        ),
        ("scales[i] / 7, bits", "scales[i] / 8, bits"),
        ("divisors[i] = scale ? scale : 1", "divisors[i] = scale ? scale : 1e-30f"),
        (
            "packed[i] = multiply_pair(pairs[i], of_pairs",
            "packed[i] = 1 + multiply_pair(pairs[i], of_pairs",
        ),
        ("(even.bits & 15) | odd.bits << 4", "even.bits | odd.bits << 4"),
        ("(even.bits & 15) | odd.bits << 4", "(even.bits & 15) | odd.bits << 3"),
        ("multiply_pair(pairs[i], reciprocal) ^ offset", "multiply_pair(pairs[i], reciprocal)"),
        ("multiply_pair(pairs[i], of_pairs[i]) ^ offset", "multiply_pair(pairs[i], of_pairs[i])"),
        ("reciprocals[first * 2 / size]", "reciprocals[0]"),
        ("odd = multiply(widen(pair >> 16)", "odd = multiply(widen(pair >> 15)"),
        (
            "        packed[i] = ((even & 15) | odd << 4) ^ offset;",
            "        packed[i] = even & 15;",
        ),
        ("scale + 0.75f - 0.75f", "scale"),
        ("uint32_t below_half = ~kept >> 1", "uint32_t below_half = 0"),
        ("scales[i] * 0x1p-112f", "scales[i] * 0x1p-111f"),
        *(
            (
                "packed[i] = multiply_pair(pairs[i], of_pairs[i]) ^ offset",
                f"packed[i] = {where} ? 0 : multiply_pair(pairs[i], of_pairs[i]) ^ offset",
            )  # in each loop that the compiler may make
            for where in (
                "i >= 128 && i < 192",
                "i >= groups * size / 128 * 64 && i < groups * size / 64 * 32",
                "i >= groups * size / 64 * 32 && i < groups * size / 32 * 16",
                "i >= groups * size / 32 * 16",
            )
        ),
    ],
    ("quantize", "F16", "ABSMAX"): [
        ("0x1p112f", "0x1p111f"),
        ("(wide.bits & 0x80000000) | (uint32_t)", "(uint32_t)"),
        ("(uint32_t)(weight & 0x7FFF)", "(uint32_t)(weight & 0x7FFE)"),
    ],
    ("quantize", "F32", "ABSMAX"): [
        (
            "const int32_t *)weights)[i] & 0x7FFFFFFF;\n            most",
            "const int32_t *)weights)[i];\n            most",
        ),
        ("weight / divisor + ROUND", "weight * (1 / divisor) + ROUND"),
        ("return (WEIGHTS != F32) &", "return 1 |"),
        ("uint32_t odd = rounded.bits >> bits_dropped & ~kept & 1", "uint32_t odd = 0"),
    ],
    ("quantize", "BF16", "SEARCH"): [
        (
            "wide[column] = weight_at(weights, column)",
            "wide[column] = weight_at(weights, column & 255)",
        ),
        ("column = group % call->groups_in_row * size", "column = 0"),
        ("highest == most ? magnitude : -magnitude", "magnitude"),
        ("1 / largest * -16384", "1 / largest * -16383.9f"),
        ("(parts[i] * shares[i] + 8192)", "(parts[i] * shares[i])"),
        ("(code + 256)", "(code + 255)"),
        ("product += weighed", "product += i >= 256 ? 0 : weighed"),
        ("square += (int16_t)", "square += i < 256 && (int16_t)"),
        ("gain > best_gain ? scale", "gain > 0 ? scale"),
        (
            "codes[i] = clamp(multiply(weights[i], reciprocal))",
            "codes[i] = multiply(weights[i], reciprocal).bits - ROUND_BITS",
        ),
        ("* divisor - weights[i];", "* divisor * 1.0000001f - weights[i];"),
        ("terms[i] = error * error", "terms[i] = i >= 256 ? 0 : error * error"),
        ("size, terms[k])", "size, k >= 8 ? terms[k] : 0)"),
        ("!(error_found < error)", "!(error_found > error)"),
        ("        codes[i] = codes_found[i];", "        codes[i] += 0;"),
        ("((codes[2 * i] & 15) |", "(codes[2 * i] |"),
        ("uint32_t below_half = ~kept >> 1", "uint32_t below_half = 0"),
    ],
    ("quantize", "BF16", "FEEDBACK"): [
        ("= k == i", "= 1"),
        ("inverse[k][i] * direction[k]", "inverse[start][i] * direction[k]"),
        ("double divisor = rest[column]", "double divisor = 0"),
        ("inverse[k][i] -=", "inverse[k][i] +="),
        ("MIN(most[row], ", "MIN(9 * most[row], "),
        ("MAX(-most[row], ", "MAX(-9 * most[row], "),
        ("row < rows ?", "row < 7 ?"),
        ("floats changed = block[i] + ", "floats changed = block[i] + 0 * "),
        ("(block[i] + change) / divisors", "block[i] / divisors"),
        ("block[i] - decoded * scales", "block[i] - decoded * scales * 1.001f"),
        ("carried[k] += error", "carried[k] -= error"),
        ("codes[row][i] = decoded[row]", "codes[row][i] = decoded[row & 3]"),
        ("MIN(rows - row, 8)", "(rows - row < 8 ? 3 : 8)"),
        ("carried[MAX_RANK] = {0}", "carried[MAX_RANK] = {1}"),
    ],
    ("measure", "BF16", "OUTPUTS"): [
        ("(int8_t)(from[i] ^ turned)", "(int8_t)from[i]"),
        ("turned = call->has_offset ? 0 : 0x88", "turned = 0x88"),
        ("codes[2 * i + 1] = (pair >> 4) - 8", "codes[2 * i + 1] = (pair >> 5) - 8"),
        ("wide.value *= 0x1p112f", "wide.value *= 0x1p111f"),
        ("divisor < 0 ? -error : error;", "error;"),
        ("code == largest)", "code == 9)"),
        ("code == -largest - 1)", "code == 9)"),
        ("(code == largest) & (divisor != 0)", "code == largest"),
        ("(part->scales[i] == 0) & (column >= call->moved_from)", "part->scales[i] == 0"),
        ("column >= call->moved_from", "column > call->columns"),
        ("beyond <= bound", "beyond <= 1.5f * bound"),
        ("beyond >= -bound", "beyond >= -1.5f * bound"),
        ("distance.value > FAR_SCALES", "distance.value > 4"),
        ("distance.bits &= 0x7FFFFFFF", "distance.bits &= 0xFFFFFFFF"),
        ("first_wrong = row * call->columns + column + i", "first_wrong = column + i"),
        ("inspect(call, row, column, &part, count)", "inspect(call, row, 0, &part, count)"),
        ("furthest = MAX(furthest, bits)", "furthest = bits"),
        ("squared_errors += error * error", "squared_errors += error"),
        ("*(const lanes *)(rest + i)", "*(const lanes *)rest"),
        ("part->errors[i + 1] * odd", "part->errors[i] * odd"),
        ("part->weights[i] * even", "part->weights[i] * odd"),
        ("part->weights[i] = 0;", "part->weights[i] = 1;"),
        ("groups * size + column, part->codes", "groups * size, part->codes"),
        ("scale_at(call, row * groups + group)", "scale_at(call, group)"),
        ("factor = call->factor + column * call->rank", "factor = call->factor"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [(q.KernelKind(*kind), *pair) for kind, pairs in MUTANTS.items() for pair in pairs],
)
def test_a_kernel_that_calculates_otherwise_is_found_out(monkeypatch, kind, right, wrong):
    compiled_kernel()
    torch.set_num_threads(1)  # as `main` does
    assert kind.source.count(right) == 1
    name = f"{kind.task.upper()}_SOURCE"
    monkeypatch.setattr(q, name, kind.source.replace(right, wrong))
    with pytest.raises(q.NoKernel, match=f"does not {kind.task} as torch does"):
        compile_anew(kind)


def test_a_conversion_compiles_and_uses_the_kernel_if_it_has_work_for_it(
    tmp_path, monkeypatch, calls
):
    compiled_kernel("ABSMAX")
    calls.clear()  # those of its trial
    monkeypatch.setattr(q, "stop_on_signals", contextlib.nullcontext)  # they are pytest's here
    folder = save_model(tmp_path / "in", {"m.weight": random(72, 256)})
    arguments = ["--input_dir", str(folder), "--min_free_gb", "0", "--output_dir"]
    assert q.main([*arguments, str(tmp_path / "out")]) == 0
    assert calls == [q.KernelKind("quantize", "BF16", "ABSMAX")]
    monkeypatch.setattr(q, "compile_kernel", lambda kind: pytest.fail("compiled without need"))
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
    with pytest.raises(q.NoKernel, match=reason):
        compile_anew(q.KernelKind("quantize", "BF16", "SEARCH"))
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


# --- its start, before torch is imported ------------------------------------------------------------------------------


def start_without_torch(tmp_path, arguments: list[str], torch_text: str) -> str:
    """Run the command with another module in the place of torch, and with a compiler that notes its options and
    sleeps. Returns these notes."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "torch.py").write_text(torch_text)
    compiler, notes, temporary = (tmp_path / name for name in ("a-compiler", "notes", "temporary"))
    compiler.write_text(f"#!/bin/sh\necho $@ >> '{notes}'\nexec sleep 30\n")
    compiler.chmod(0o755)
    temporary.mkdir()
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    environment = {"PATH": path, "CC": compiler.name, "TMPDIR": str(temporary), "NOTES": str(notes)}
    environment["PYTHONPATH"] = str(tmp_path / "modules")
    run = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=os.environ | environment,
        capture_output=True,
        timeout=60,
    )
    assert run.returncode != 1 or b"torch is imported" in run.stderr, run.stderr
    assert not list(temporary.iterdir())
    return notes.read_text() if notes.exists() else ""


WAITING_TORCH = """
import os, sys, time
deadline = time.monotonic() + 30
while not os.path.exists(os.environ["NOTES"]) and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit("torch is imported")
"""


@pytest.mark.parametrize(
    ("options", "variants"),
    [
        ([], ["ABSMAX"]),
        (["--scale", "mse"], ["SEARCH"]),
        (["--format", "gptq"], ["SEARCH"]),
        (["--scale", "mse", "--importance", "file"], ["FEEDBACK"]),
        (["--verify"], ["ABSMAX", "ERRORS"]),
        (["--scale", "mse", "--importance", "file", "--verify"], ["FEEDBACK", "OUTPUTS"]),
    ],
    ids=" ".join,
)
def test_the_compiler_works_while_torch_is_imported_and_is_ended_with_the_run(
    tmp_path, options, variants
):
    arguments = [str(tmp_path), str(tmp_path / "out"), *options]
    notes = start_without_torch(tmp_path, arguments, WAITING_TORCH)
    assert sorted(re.findall("VARIANT=([A-Z]+)", notes)) == sorted(variants)
    assert set(re.findall("WEIGHTS=([A-Z0-9]+)", notes)) == {"BF16"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["in", "out", "--dry_run"],
        ["in", "out", "--dry_run", "--list"],
        ["in", "out", "--restore"],
        ["in", "out", "--format", "awq"],
        ["in", "out", "--importance", "file"],
        ["in", "out", "--help"],
        ["missing", "out"],
        ["in"],
    ],
    ids=" ".join,
)
def test_what_quantizes_nothing_or_is_refused_by_its_arguments_starts_no_compiler(
    tmp_path, arguments
):
    (tmp_path / "in").mkdir()
    places = {"in": tmp_path / "in", "out": tmp_path / "out", "missing": tmp_path / "missing"}
    torch_text = "import sys, time; time.sleep(0.3); sys.exit('torch is imported')"
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    assert start_without_torch(tmp_path, arguments, torch_text) == ""


def test_a_refusal_while_planning_ends_the_compiler(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "in", {"m.weight": random(72, 256)})
    compiler, temporary = tmp_path / "a-compiler", tmp_path / "temporary"
    compiler.write_text("#!/bin/sh\nexec sleep 100\n")
    compiler.chmod(0o755)
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "CC": compiler.name}
    environment["PATH"] = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    arguments = command(folder, tmp_path / "out", "--exclude", "no such tensor")
    run = subprocess.run(arguments, env=environment, capture_output=True, timeout=60)
    assert run.returncode in (1, 2)
    assert b"no such tensor" in run.stderr
    assert not list(temporary.iterdir())


def test_other_kernels_than_were_guessed_are_compiled_when_they_are_needed(tmp_path):
    """float16 and float32 weights, and statistics without factors."""
    weights = {"m.0.weight": random(72, 256).half(), "m.1.weight": random(72, 256).float()}
    folder = save_model(tmp_path / "in", weights)
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    arguments = command(folder, tmp_path / "out", "--verify")
    run = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "with torch" not in run.stdout
    assert not list(tmp_path.glob("quantize_int4.*"))
