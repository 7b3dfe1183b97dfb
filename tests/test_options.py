"""Options: every one by its names, its default, and what is a usage error (README: "Options")."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from checkpoints import WEIGHT, save_model
from conftest import SCRIPT, assert_refused, command, quantize, refuse, run_cli
from folders import assert_same_tensors, folder_bytes, read_tensors
from launcher import Run, Setting

import quantize_int4 as q


def test_help_names_the_formats_and_every_option_with_its_default(tmp_path):
    result = subprocess.run(
        [*command(tmp_path, tmp_path), "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    options = "input_dir output_dir group_size shard_size_gb min_free_gb exclude quantize_embeddings threads dry_run"
    for option in [*options.split(), "overwrite", "version"]:
        assert f"--{option}" in result.stdout
    for tensor in (
        "X.qweight",
        "X.scales",
        "X.weight_packed",
        "X.weight_scale",
        "X.weight_shape",
        "X.g_idx",
    ):
        assert tensor in result.stdout
    assert {"128", "4.0", "10"} <= set(re.findall(r"\(default:\s+([\d.]+)", result.stdout))


def test_help_is_short_with_a_line_or_two_for_each_option_and_the_layouts_after_them(tmp_path):
    result = subprocess.run(
        [*command(tmp_path, tmp_path), "--help"],
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    lines = result.stdout.splitlines()
    assert len(lines) <= 85
    assert len(result.stdout.split()) < 600
    assert max(map(len, lines)) <= 80
    (end,) = [number for number, line in enumerate(lines) if line.startswith("The folders may")]
    headings = [line for line in lines[:end] if re.fullmatch(r"[a-z ]+:", line)]
    assert headings == [f"{heading}:" for heading in q.OPTIONS]
    starts = [number for number, line in enumerate(lines[:end]) if line.startswith("  -")]
    assert len(starts) == sum(map(len, q.OPTIONS.values())) + 2  # --version and --help
    for number in starts:
        assert lines[number][23:25] == "  "
    continued = [number for number, line in enumerate(lines[:end]) if line.startswith(" " * 25)]
    assert not any(number + 1 in continued for number in continued)
    assert max(n for n, line in enumerate(lines) if line.startswith("  --")) < end
    assert lines.index("    of your own       X.scales         float16  (rows, padded // g)") > end


def test_help_begins_with_an_example_that_an_engine_loads(tmp_path):
    result = subprocess.run(
        [*command(tmp_path, tmp_path), "--help"], capture_output=True, text=True
    )
    example = result.stdout.split("\n\n")[2]
    assert "quantize_int4.py --input_dir" in example
    assert "--format compressed-tensors --verify" in example


def test_version_is_printed(tmp_path):
    result = subprocess.run(
        [*command(tmp_path, tmp_path), "--version"], capture_output=True, text=True
    )
    assert re.fullmatch(r"quantize_int4.py \d+\.\d+\.\d+\n", result.stdout)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--input_dir", "in", "--output_dir", ""], "--output_dir: '' is not the name of a folder"),
        (["--input_dir", "", "--output_dir", "out"], "--input_dir: '' is not the name of a folder"),
        (["in", ""], "'' is not the name of a folder"),
        (["in", "out", "--config_dir="], "--config_dir: '' is not the name of a folder"),
        (["in", "out", "--importance", ""], "--importance: '' is not the name of a file"),
        (["in", "out", "--format", ""], "--format '' is none of int4, compressed-tensors, gptq"),
    ],
)
def test_an_empty_name_is_a_usage_error_and_not_the_current_folder_or_the_default(
    arguments, problem
):
    result = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert_refused(result, problem, exit_code=2)


@pytest.mark.parametrize("option", ["--help", "--version", "--nonsense"])
def test_help_version_and_usage_errors_do_not_wait_for_torch(tmp_path, option):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, SCRIPT, option], env=environment, capture_output=True, text=True
    )
    assert "torch was imported" not in result.stderr
    assert result.returncode == (2 if option == "--nonsense" else 0)


def test_every_option_may_be_written_with_hyphens(tiny, tmp_path):
    quantize(
        tiny, tmp_path / "a", "--group_size", 64, "--shard_size_gb", 3e-4, "--quantize_embeddings"
    )
    arguments = command(
        tiny, tmp_path / "b", "--group-size=64", "--shard-size-gb", 3e-4, "--quantize-embeddings"
    )
    arguments = [
        argument.replace("put_dir", "put-dir").replace("min_free", "min-free")
        for argument in arguments
    ]
    assert Run(arguments[2:], Setting()).wait().returncode == 0
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_a_hyphenated_value_is_left_alone(tmp_path):
    folder = save_model(tmp_path / "in", {"a-b.weight": torch.ones(1, 128), **WEIGHT})
    quantize(folder, tmp_path / "out", "--exclude=a-b")
    assert "a-b.weight" in read_tensors(tmp_path / "out")


def test_the_folders_may_be_given_without_their_options(tiny, tmp_path):
    arguments = [str(tiny), str(tmp_path / "out"), "--min_free_gb", "0"]
    assert Run(arguments, Setting()).wait().returncode == 0
    assert "verified, no problems found" in quantize(tiny, tmp_path / "out", "--verify").stdout


@pytest.mark.parametrize(
    ("form", "scale"), [("int4", "absmax"), ("compressed-tensors", "mse"), ("gptq", "mse")]
)
def test_the_seeds_layout_has_absmax_scales_by_default_and_the_formats_for_engines_closer_ones(
    tmp_path, form, scale
):
    source = save_model(tmp_path / "in", {"layers.0.up.weight": torch.randn(8, 256).bfloat16()})
    assert f"scales {scale}, " in quantize(source, tmp_path / "out", "--format", form).stdout
    quantize(source, tmp_path / "named", "--format", form, "--scale", scale)
    assert_same_tensors(tmp_path / "out", tmp_path / "named")
    assert "verified, no problems found" in quantize(source, tmp_path / "out", "--verify").stdout


# --- usage errors -----------------------------------------------------------------------------------------------------

USAGE_ERRORS = {
    "--group_size": ["0", "-128", "12", "130", "x", "64.0"],
    "--shard_size_gb": ["0", "-1", "nan", "inf", "1e300", "four"],
    "--min_free_gb": ["-1", "nan", "1e300"],
    "--threads": ["0", "-2", "1025", "two"],
    "--exclude": ["(", "*x", ""],
    "--int8": ["(", ""],
}


@pytest.mark.parametrize(
    ("option", "value"), [(o, v) for o, values in USAGE_ERRORS.items() for v in values]
)
def test_a_bad_value_is_a_usage_error(model, tmp_path, option, value):
    refuse(model, tmp_path / "out", option, repr(value), options=[f"{option}={value}"], exit_code=2)


def test_an_unknown_option_is_a_usage_error(model, tmp_path):
    refuse(model, tmp_path / "out", "--colour", options=["--colour", "4"], exit_code=2)


def test_a_missing_option_is_a_usage_error(model):
    result = subprocess.run(command(model, "x")[:4], capture_output=True, text=True)
    assert_refused(result, "--output_dir", exit_code=2)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--groupsize", "64"], "did you mean --group_size?"),
        (["--group-sise=64"], "did you mean --group_size?"),
        (["--format", "compressed_tensors"], "did you mean compressed-tensors?"),
        (["--exclude", "q_proj", "k_proj"], "give --exclude or --int8 once for each pattern"),
        (["--format", "INT4"], "did you mean int4?"),
        (["--input", "in"], "did you mean --input_dir?"),
        (["--output=out"], "did you mean --output_dir?"),
        (["--group", "64"], "did you mean --group_size?"),
        (["--max_shard_size", "4"], "did you mean --shard_size_gb?"),
        (["--bits", "4"], "--bits: codes have 4 bits, and --int8 REGEX names those of 8"),
        (["--w-bits", "8"], "codes have 4 bits, and --int8 REGEX names those of 8"),
        (["--model", "in"], "--input_dir names the checkpoint's folder"),
        (["--quant", "w4a16"], "--quant: --format names the layout"),
        (["--w4a16"], "--format names the layout"),
        (["--resume"], "the same command continues a run that was stopped"),
        (["--calib_data", "x"], "--importance FILE gives activation statistics"),
        (["--force"], "--overwrite replaces what an earlier run left"),
        (["--ignore", "lm_head"], "--exclude REGEX names what is kept"),
    ],
    ids=" ".join,
)
def test_a_near_miss_is_a_usage_error_that_says_what_was_meant(tiny, tmp_path, options, hint):
    assert_refused(
        run_cli(tiny, tmp_path / "out", *options),
        hint,
        "(see quantize_int4.py --help)",
        exit_code=2,
    )


@pytest.mark.parametrize(
    "option", ["--dtype", "--device", "--seed", "--verbose", "--size", "--colour"]
)
def test_an_option_that_is_near_to_none_gets_no_suggestion(tiny, tmp_path, option):
    result = run_cli(tiny, tmp_path / "out", option)
    assert_refused(result, f"unrecognized arguments: {option} (see", exit_code=2)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (
            "vllm vLLM hf huggingface transformers w4a16",
            "vLLM and transformers load --format compressed-tensors",
        ),
        ("sglang", "SGLang should load --format compressed-tensors of dense models"),
        ("awq autoawq marlin", "no such layout is made here, but --format compressed-tensors"),
        ("edge-llm edge_llm", "TensorRT Edge-LLM loads --format gptq --group_size 128"),
        (
            "trt tensorrt TensorRT-LLM",
            "TensorRT Edge-LLM loads --format gptq --group_size 128; for",
        ),
        ("gguf", "not made here; llama.cpp makes it from the same checkpoint"),
        (
            "nvfp4",
            "floats are not made here; llm-compressor and NVIDIA's Model Optimizer make them",
        ),
        ("int8", "--format compressed-tensors --int8 REGEX"),
    ],
)
def test_what_others_call_a_format_is_answered_with_what_loads_there(tiny, tmp_path, names, hint):
    for name in names.split():
        assert_refused(
            run_cli(tiny, tmp_path / "out", "--format", name),
            f"--format '{name}' is none of int4, compressed-tensors, gptq: {hint}",
            exit_code=2,
        )


def test_importance_without_mse_is_a_usage_error(model, tmp_path):
    refuse(
        model,
        tmp_path / "out",
        "--importance needs --scale mse, which is the default of --format compressed-tensors",
        options=["--importance", "x"],
        exit_code=2,
    )


@pytest.mark.parametrize(
    "options",
    [["--verify"], ["--format", "gptq"], ["--exclude", "x"], ["--group_size", 64]],
    ids=str,
)
def test_options_of_the_layout_are_a_usage_error(tiny, tmp_path, options):
    assert_refused(
        run_cli(tiny, tmp_path / "back", "--restore", *options),
        "--restore takes the layout",
        exit_code=2,
    )
