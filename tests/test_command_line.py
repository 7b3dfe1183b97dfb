"""The command as its users meet it: options, the plan, progress, every refusal, signals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import write_sparse_checkpoint
from conftest import SCRIPT, assert_refused, command, folder_bytes, quantize, read_tensors, run_cli, save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import quantize_int4 as q

WEIGHT = {"m.weight": torch.ones(4, 128).bfloat16()}


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "in", WEIGHT)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """0.8 GB of zeros: long enough a run to send signals to."""
    folder = tmp_path_factory.mktemp("large")
    write_sparse_checkpoint(folder, {f"m.{i}.weight": (torch.bfloat16, (4096, 4096)) for i in range(24)}, shards=3)
    return folder


# --- what it prints -------------------------------------------------------------------------------------------------


def test_help_names_the_formats_and_every_option_with_its_default(tmp_path):
    result = subprocess.run([*command(tmp_path, tmp_path), "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    options = "input_dir output_dir group_size shard_size_gb min_free_gb exclude quantize_embeddings threads dry_run"
    for option in [*options.split(), "overwrite", "version"]:
        assert f"--{option}" in result.stdout
    for tensor in ("X.qweight", "X.scales", "X.weight_packed", "X.weight_scale", "X.weight_shape", "X.g_idx"):
        assert tensor in result.stdout
    assert {"128", "4.0", "10"} <= set(re.findall(r"\(default:\s+([\d.]+)", result.stdout))


def test_version_is_printed(tmp_path):
    result = subprocess.run([*command(tmp_path, tmp_path), "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"quantize_int4.py \d+\.\d+\.\d+\n", result.stdout)


def test_every_option_may_be_written_with_hyphens(tiny, tmp_path):
    quantize(tiny, tmp_path / "a", "--group_size", 64, "--shard_size_gb", 3e-4, "--quantize_embeddings")
    arguments = command(tiny, tmp_path / "b", "--group-size=64", "--shard-size-gb", 3e-4, "--quantize-embeddings")
    arguments = [argument.replace("put_dir", "put-dir").replace("min_free", "min-free") for argument in arguments]
    assert subprocess.run(arguments).returncode == 0
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_a_hyphenated_value_is_left_alone(tmp_path):
    folder = save_model(tmp_path / "in", {"a-b.weight": torch.ones(1, 128), **WEIGHT})
    quantize(folder, tmp_path / "out", "--exclude=a-b")
    assert "a-b.weight" in read_tensors(tmp_path / "out")


def test_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path):
    result = quantize(tiny, tmp_path / "out", "--dry_run")
    for words in ("quantized to 4 bits", "embeddings", "vectors and scalars", "3-D", "free", "at the peak", "Dry run"):
        assert words in result.stdout
    assert not (tmp_path / "out").exists()


def test_the_summary_has_time_sizes_counts_memory_and_stages(tiny, tmp_path):
    summary = quantize(tiny, tmp_path / "out").stdout.split("\nDone in")[1]
    for words in (
        "29 tensors quantized, 14 kept",
        "times smaller",
        "at the peak of this process",
        "RAM used",
        "Available",
    ):
        assert words in summary
    stages = ["Baseline", "Headers read", "Mid-quantization", "Written"]
    rows = summary.split("All programs, no page cache")[1].splitlines()[1:5]
    assert [line.split()[0] for line in rows] == [stage.split()[0] for stage in stages]


def test_3d_weights_that_stay_are_pointed_out_with_their_size(tmp_path):
    folder = save_model(tmp_path / "in", {"attention.heads": torch.ones(4, 64, 128), **WEIGHT})
    assert (
        "only 2-D weights are quantized; 1 3-D one (131 kB) kept, e.g. attention.heads"
        in quantize(folder, tmp_path / "out").stdout
    )


PROGRESS = re.compile(
    r"quantizing  \d+%  (about \d+ (s|min) left  )?[\d.]+ \w+ of 805 MB  [\d.]+ \w+/s  \d+/24 tensors"
    r"  RAM .* used, .* available"
)


def test_a_pipe_gets_whole_lines_of_progress(large, tmp_path):
    result = quantize(large, tmp_path / "out", constants={"PROGRESS_INTERVAL_S": {True: 0.1, False: 0.1}})
    assert "\r" not in result.stdout
    assert "\033" not in result.stdout
    assert any(PROGRESS.fullmatch(line) for line in result.stdout.splitlines())


def test_a_terminal_gets_one_line_that_updates(large, tmp_path):
    master, slave = pty.openpty()
    with subprocess.Popen(command(large, tmp_path / "out"), stdout=slave, env={**os.environ, "COLUMNS": "200"}) as run:
        os.close(slave)
        chunks = []
        try:
            while chunk := os.read(master, 4096):
                chunks.append(chunk)
        except OSError:  # Linux's end of file of a terminal
            pass
    assert run.returncode == 0
    text = b"".join(chunks).decode()
    loading, plan, *updates = text.split("\r\033[K")
    assert loading == "loading torch ..."
    assert plan.startswith("From:")
    assert len(updates) >= 2
    assert PROGRESS.match(updates[0])
    assert "\n" not in "".join(updates[:-1])
    assert updates[-1].startswith("\033[32mDone in")


def test_a_reader_that_goes_away_does_not_end_the_run(tiny, tmp_path):
    pipeline = f"{' '.join(command(tiny, tmp_path / 'out'))} | head -1"
    assert subprocess.run(pipeline, shell=True, capture_output=True).returncode == 0
    deadline = time.monotonic() + 20
    while not (tmp_path / "out" / "model.safetensors.index.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_full_log_does_not_end_the_run(tiny, tmp_path):
    with open("/dev/full", "w") as full:
        assert subprocess.run(command(tiny, tmp_path / "out"), stdout=full, stderr=full).returncode == 0
    quantize(tiny, tmp_path / "expected")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")


def test_a_terminal_that_closes_does_not_end_a_run_under_nohup(large, tmp_path):
    master, slave = pty.openpty()
    ignoring = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *command(large, tmp_path / "out")]
    with subprocess.Popen(ignoring, stdout=slave, stderr=slave) as run:
        os.close(slave)
        os.read(master, 1)
        os.close(master)  # from here on, every print fails
    assert run.returncode == 0
    assert "complete already" in quantize(large, tmp_path / "out").stdout


def test_a_closed_standard_output_does_not_end_the_run(tiny, tmp_path):
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command(tiny, tmp_path / "out")]
    assert subprocess.run(closed, capture_output=True).stderr == b""
    assert "complete already" in quantize(tiny, tmp_path / "out").stdout


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_run(model, tmp_path):
    (model / "r\u00e9sum\u00e9.md").write_text("x")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command(model, tmp_path / "out"), env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert r"r\xe9sum\xe9.md" in result.stdout


def test_an_interrupt_during_the_imports_shows_no_traceback():
    with subprocess.Popen(
        [sys.executable, SCRIPT, "in", "out"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as run:
        while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
            time.sleep(0.005)
        run.send_signal(signal.SIGINT)
        assert run.stderr.read() == b""
    assert run.returncode == -signal.SIGINT


def test_the_script_runs_without_numpy(tiny, tmp_path):
    program = "import sys; sys.modules['numpy'] = None; import quantize_int4; sys.exit(quantize_int4.main())"
    arguments = [sys.executable, "-c", program, *command(tiny, tmp_path / "out", "--verify")[2:]]
    result = subprocess.run(arguments, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "holds what it should" in result.stdout


def test_the_script_runs_when_it_alone_is_copied_somewhere(tiny, tmp_path):
    shutil.copy(SCRIPT, tmp_path / "quantize_int4.py")
    arguments = [argument.replace(str(SCRIPT), str(tmp_path / "quantize_int4.py")) for argument in command(tiny, "out")]
    assert subprocess.run(arguments, cwd=tmp_path, env={"PATH": os.environ["PATH"]}).returncode == 0
    assert (tmp_path / "out" / "model-00001.safetensors").exists()


# --- refusals -------------------------------------------------------------------------------------------------------


def refuse(input_dir, output_dir, *fragments, options=(), exit_code=1):
    """The run is refused with these words, and the output folder is as it was."""
    before = folder_bytes(output_dir) if output_dir.is_dir() else output_dir.exists()
    assert_refused(run_cli(input_dir, output_dir, *options), *fragments, exit_code=exit_code)
    assert before == (folder_bytes(output_dir) if output_dir.is_dir() else output_dir.exists())


def test_a_missing_input_folder_is_refused(tmp_path):
    refuse(tmp_path / "nowhere", tmp_path / "out", "nowhere", "no such folder")


def test_a_file_as_input_folder_is_refused(model, tmp_path):
    refuse(model / "model.safetensors", tmp_path / "out", "is a file")


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    refuse(tmp_path / "in", tmp_path / "out", "no *.safetensors")


def test_a_lora_adapter_alone_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_file(WEIGHT, tmp_path / "in" / "adapter_model.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text("{}")
    refuse(tmp_path / "in", tmp_path / "out", "LoRA adapter", "merge")


@pytest.mark.parametrize("where", [".", "out", "a/b"])
def test_an_output_folder_that_is_or_lies_in_the_input_folder_is_refused(model, where):
    before = folder_bytes(model)
    assert_refused(run_cli(model, model / where), "input folder")
    assert folder_bytes(model) == before


def test_an_output_folder_reached_through_a_link_into_the_input_is_refused(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    assert_refused(run_cli(model, tmp_path / "link" / "out"), "inside the input folder")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize(
    "name", ["notes.txt", "config.json", "model-00001.safetensors", "model-00001-of-2.safetensors"]
)
def test_somebody_elses_files_in_the_output_folder_are_refused_always(model, tmp_path, name, overwrite):
    (tmp_path / "out").mkdir()
    save_file({"other": torch.ones(3)}, tmp_path / "out" / name)
    refuse(model, tmp_path / "out", name, "not written by this program", options=overwrite)


def test_a_finished_run_with_other_options_needs_overwrite(model, tmp_path):
    quantize(model, tmp_path / "out")
    refuse(model, tmp_path / "out", "--overwrite", "--group_size was 128, is 64", options=["--group_size", 64])
    quantize(model, tmp_path / "out", "--group_size", 64, "--overwrite")
    quantize(model, tmp_path / "expected", "--group_size", 64)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")


def test_overwrite_never_removes_a_file_that_no_run_wrote(model, tmp_path):
    quantize(model, tmp_path / "out")
    (tmp_path / "out" / "thesis.docx").write_text("years of work")
    refuse(model, tmp_path / "out", "thesis.docx", options=["--overwrite", "--group_size", 64])


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", "quantize_config.json"])
@pytest.mark.parametrize("form", ["int4", "gptq"])
def test_a_file_that_its_owner_edited_is_not_overwritten(tiny, tmp_path, form, name):
    options = ["--format", form, "--group_size", 64]
    quantize(tiny, tmp_path / "out", *options)
    with open(tmp_path / "out" / name, "a") as file:
        file.write(" ")
    for more in ([], ["--overwrite"]):
        refuse(tiny, tmp_path / "out", name, "changed since", options=[*options, *more])


def test_a_copy_of_a_file_that_the_source_no_longer_has_goes_with_overwrite(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "in")
    (tmp_path / "in" / "notes.md").write_text("first version")
    quantize(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "notes.md").unlink()
    refuse(tmp_path / "in", tmp_path / "out", "'notes.md'", "--overwrite")
    quantize(tmp_path / "in", tmp_path / "out", "--overwrite")
    assert not (tmp_path / "out" / "notes.md").exists()


def test_a_folder_that_changes_between_the_plan_and_the_run_is_refused(tiny, tmp_path):
    options = q.Options(q.FORMATS["int4"], 128, 4 * 10**9, (), False)
    with contextlib.closing(q.Checkpoint.open(tiny)) as checkpoint:
        output = q.OutputFolder(tmp_path / "out", q.plan_conversion(checkpoint, options), overwrite=True)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.docx").write_text("years of work")
        with contextlib.closing(output), pytest.raises(q.QuantizeError, match=r"thesis\.docx"):
            output.prepare()


def test_overwrite_starts_afresh_even_with_the_same_options(model, tmp_path):
    quantize(model, tmp_path / "out")
    shard = tmp_path / "out" / "model-00001.safetensors"
    inode = shard.stat().st_ino
    quantize(model, tmp_path / "out", "--overwrite")
    assert shard.stat().st_ino != inode or shard.stat().st_ctime > (tmp_path / "in").stat().st_ctime


def test_the_same_command_again_finds_the_folder_complete(model, tmp_path):
    quantize(model, tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "complete already" in quantize(model, tmp_path / "out").stdout
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


USAGE_ERRORS = {
    "--group_size": ["0", "-128", "12", "130", "x", "64.0"],
    "--shard_size_gb": ["0", "-1", "nan", "inf", "1e300", "four"],
    "--min_free_gb": ["-1", "nan", "1e300"],
    "--threads": ["0", "-2", "1025", "two"],
    "--exclude": ["(", "*x"],
}


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in USAGE_ERRORS.items() for v in values])
def test_a_bad_value_is_a_usage_error(model, tmp_path, option, value):
    refuse(model, tmp_path / "out", option, repr(value), options=[f"{option}={value}"], exit_code=2)


def test_an_unknown_option_is_a_usage_error(model, tmp_path):
    refuse(model, tmp_path / "out", "--bits", options=["--bits", "4"], exit_code=2)


def test_a_missing_option_is_a_usage_error(model):
    result = subprocess.run(command(model, "x")[:4], capture_output=True, text=True)
    assert_refused(result, "--output_dir", exit_code=2)


def test_an_exclude_pattern_that_matches_nothing_is_refused(model, tmp_path):
    for pattern, shown in (("lm_heda", "lm_heda"), (r"lm\.heda", r"'lm\.heda'")):
        refuse(model, tmp_path / "out", f"--exclude {shown} matches none", options=["--exclude", pattern])


def indexed(tmp_path, weight_map):
    folder = save_model(tmp_path / "in", WEIGHT)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    folder = indexed(tmp_path, {"m.weight": "model-00002-of-00002.safetensors"})
    refuse(folder, tmp_path / "out", "model-00002-of-00002.safetensors", "missing")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"])
def test_a_missing_part_is_refused_without_an_index_too(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    if name.endswith(".bin"):
        torch.save({"m.weight": torch.ones(8, 128)}, folder / "pytorch_model-00002-of-00002.bin")
    else:
        save_file({"m.weight": torch.ones(8, 128)}, folder / "model-00001-of-00002.safetensors")
    refuse(folder, tmp_path / "out", repr(name), "missing", "copy it again")


def test_files_without_a_tensor_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({}, tmp_path / "in" / "model.safetensors")
    refuse(tmp_path / "in", tmp_path / "out", "'model.safetensors' hold no tensors")


def test_a_pipe_among_the_files_does_not_hang_the_run(model, tmp_path):
    os.mkfifo(model / "vocab.json")
    assert "vocab.json (not a regular file)" in quantize(model, tmp_path / "out").stdout
    os.mkfifo(tmp_path / "out" / "pipe")
    assert_refused(run_cli(model, tmp_path / "out"), "'pipe', not written by this program")
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    assert_refused(run_cli(model, tmp_path / "other"), "model.safetensors is not a regular file")


def test_a_tensor_missing_from_its_shard_is_refused(tmp_path):
    folder = indexed(tmp_path, {"m.weight": "model.safetensors", "n.weight": "model.safetensors"})
    refuse(folder, tmp_path / "out", "'n.weight'", "model.safetensors", "does not hold it")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_that_points_outside_the_folder_is_refused(tmp_path, file):
    refuse(indexed(tmp_path, {"m.weight": file}), tmp_path / "out", repr(file), "no file of this folder")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_broken_index_is_refused(model, tmp_path, text):
    (model / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    refuse(model, tmp_path / "out", "model.safetensors.index.json")


def test_a_tensor_in_two_files_without_an_index_is_refused(model, tmp_path):
    (model / "model.safetensors").rename(model / "one.safetensors")
    save_file(WEIGHT, model / "other.safetensors")
    refuse(model, tmp_path / "out", "'m.weight'", "other.safetensors", "one.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 50, 300, -1])
def test_a_truncated_shard_is_refused(model, tmp_path, keep):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:keep])
    refuse(model, tmp_path / "out", "model.safetensors", "not a whole safetensors file")


def test_a_file_that_is_no_safetensors_is_refused(model, tmp_path):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    refuse(model, tmp_path / "out", "not a whole safetensors file")


def test_a_name_given_twice_in_a_header_is_refused(model, tmp_path):
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    refuse(model, tmp_path / "out", "names 'a' twice")


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**65) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "I64", "X"]) | HEADERS,
        "shape": st.lists(st.integers(0, 3), max_size=3) | HEADERS,
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)) | HEADERS,
    }
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=2), ENTRIES, max_size=3) | HEADERS, size=st.integers(0, 20))
def test_headers_are_accepted_or_refused_as_the_safetensors_library_does(tmp_path, header, size):
    path, data = tmp_path / "model.safetensors", json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(size))
    try:
        with safe_open(path, framework="pt") as file:
            expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        with pytest.raises(q.QuantizeError, match="not a whole safetensors file"):
            q.read_tensor_infos(path)
    else:
        assert {name: info.shape for name, info in q.read_tensor_infos(path).items()} == expected


def test_a_single_file_larger_than_the_machines_memory_is_read(tmp_path):
    rows = 2 * psutil.virtual_memory().total // 256
    write_sparse_checkpoint(tmp_path / "in", {"m.weight": (torch.bfloat16, (rows, 128))}, shards=1)
    assert "quantized to 4 bits" in quantize(tmp_path / "in", tmp_path / "out", "--dry_run").stdout


def test_a_config_with_a_quantization_config_is_refused(model, tmp_path):
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    refuse(model, tmp_path / "out", "config.json", "already quantized")


@pytest.mark.parametrize(
    "tensors",
    [
        {"m.qweight": torch.ones(4, 16, dtype=torch.int32)},
        {"m.weight": torch.ones(4, 128, dtype=torch.int8)},
        {"m.weight": torch.ones(4, 128).to(torch.float8_e4m3fn)},
        {"m.weight": torch.ones(4, 128), "m.weight_scale_inv": torch.ones(1, 1)},
    ],
    ids=["qweight", "int8", "float8", "weight_scale_inv"],
)
def test_a_checkpoint_of_quantized_tensors_is_refused(tmp_path, tensors):
    refuse(save_model(tmp_path / "in", tensors), tmp_path / "out", "already quantized", "'m.")


def test_our_own_output_as_input_is_refused(model, tmp_path):
    quantize(model, tmp_path / "out")
    refuse(tmp_path / "out", tmp_path / "again", "already quantized")


def test_an_output_name_that_the_checkpoint_has_already_is_refused(tmp_path):
    folder = save_model(tmp_path / "in", {"m.weight": torch.ones(4, 128), "m.scales": torch.ones(4)})
    refuse(folder, tmp_path / "out", "'m.scales'")


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path):
    write_sparse_checkpoint(
        tmp_path / "in", {"m.weight": (torch.float32, (8, 128)), "m.bias": (torch.float32, (10**12,))}, shards=1
    )
    refuse(tmp_path / "in", tmp_path / "out", "4.00 TB to write", "free")


BAD_VALUES = [
    (float("nan"), "nan is not finite"),
    (float("inf"), "inf is not finite"),
    (float("-inf"), "-inf is not finite"),
    (-1e6, "needs a scale beyond float16"),
]


@pytest.mark.parametrize(("value", "problem"), BAD_VALUES)
@pytest.mark.parametrize("columns", [256, 300])
def test_a_bad_weight_is_an_error_that_names_tensor_row_and_column(tmp_path, value, problem, columns):
    weight = torch.randn(3000, columns).bfloat16()
    weight[2345, 217] = value
    folder = save_model(tmp_path / "in", {"good.weight": torch.ones(4, 128), "bad.weight": weight})
    assert_refused(run_cli(folder, tmp_path / "out"), "'bad.weight'", "row 2345, column 217", problem)
    assert not list((tmp_path / "out").iterdir())


def test_a_bad_value_in_a_kept_tensor_is_kept(tmp_path):
    tensors = {"m.bias": torch.tensor([float("nan")]), **WEIGHT}
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out")
    assert read_tensors(tmp_path / "out")["m.bias"].isnan().all()


def test_debug_shows_the_traceback(tmp_path):
    result = run_cli(tmp_path / "nowhere", tmp_path / "out", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: folder")


def test_a_second_run_into_the_same_folder_at_the_same_time_is_refused(large, tmp_path):
    with subprocess.Popen(command(large, tmp_path / "out"), stdout=subprocess.DEVNULL) as first:
        wait_for_unfinished(tmp_path / "out")
        first.send_signal(signal.SIGSTOP)
        assert_refused(run_cli(large, tmp_path / "out"), "another run is writing")
        first.send_signal(signal.SIGCONT)
    assert first.returncode == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


# --- signals --------------------------------------------------------------------------------------------------------


def wait_for_unfinished(folder):
    deadline = time.monotonic() + 30
    while not list(folder.glob("*.unfinished")):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_cleanly(large, tmp_path, signum, exit_code):
    arguments = command(large, tmp_path / "out", "--shard_size_gb", 0.05)
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_unfinished(tmp_path / "out")
    run.send_signal(signum)
    _, errors = run.communicate(timeout=20)
    assert run.returncode == exit_code
    count = len(list((tmp_path / "out").iterdir()))
    assert (
        errors
        == f"error: stopped by {signum.name}; {count} of 5 shards are finished and kept, the same command continues\n"
    )
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert all(re.fullmatch(r"model-\d{5}\.safetensors", name) for name in left)  # whole shards, no index
    assert all(len(tensor) for tensor in read_tensors(tmp_path / "out").values())
    quantize(large, tmp_path / "out", "--shard_size_gb", 0.05)
    assert len(read_tensors(tmp_path / "out")) == 48
