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
    ],
)
def test_an_empty_name_is_a_usage_error_and_not_the_current_folder(arguments, problem):
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
    refuse(model, tmp_path / "out", "--bits", options=["--bits", "4"], exit_code=2)


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
        (["--format", "awq"], "is none of int4, compressed-tensors, gptq"),
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


def test_importance_without_mse_is_a_usage_error(model, tmp_path):
    refuse(
        model,
        tmp_path / "out",
        "--importance needs --scale mse",
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
