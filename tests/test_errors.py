"""Errors and signals: one line that says what to do, and a stop that leaves nothing torn (README: "Exit codes")."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from arithmetic import quantize_groups
from checkpoints import WEIGHT, random, save_model, write_sparse_checkpoint
from conftest import (
    SCRIPT,
    assert_refused,
    command,
    pause,
    quantize,
    refuse,
    run_cli,
    run_in_terminal,
    start_cli,
    wait_until,
)
from folders import folder_bytes, read_header, read_tensors
from launcher import Run

import quantize_int4 as q


def test_debug_shows_the_traceback(tmp_path):
    result = run_cli(tmp_path / "nowhere", tmp_path / "out", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: folder")


def test_missing_packages_are_named_each_with_the_command_that_installs_them():
    result = subprocess.run(
        [sys.executable, "-I", "-S", SCRIPT, "in", "out"], capture_output=True, text=True
    )
    assert result.stderr.startswith(
        "error: missing: torch, safetensors, psutil: pip install torch safetensors psutil; "
    )
    assert len(result.stderr.splitlines()) == 1
    assert result.returncode == 1


# --- signals ----------------------------------------------------------------------------------------------------------


def test_the_tests_of_signals_pass_in_a_job_that_ignores_them(tmp_path):
    """As `pytest &` in a script, or under nohup; of these tests the fastest stands for all."""
    test = f"{__file__}::{test_an_interrupt_during_the_imports_shows_no_traceback.__name__}"
    pytest_command = [sys.executable, "-m", "pytest", "-n", "0", "--basetemp", tmp_path / "t", test]
    ignoring = ["sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh", *pytest_command]
    result = subprocess.run(ignoring, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_an_interrupt_during_the_imports_shows_no_traceback():
    with subprocess.Popen(
        [sys.executable, SCRIPT, "in", "out"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as run:
        while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
            time.sleep(0.005)
        run.send_signal(signal.SIGINT)
        assert run.stderr.read() == b""
    assert run.returncode == -signal.SIGINT


def test_an_interrupt_before_torch_is_imported_shows_no_traceback_either(model, tmp_path):
    """The script is held in one of its first imports, by a module that stands before Python's own."""
    held = tmp_path / "modules"
    held.mkdir()
    (held / "statistics.py").write_text("import os, time; os.close(1); time.sleep(60)")
    with subprocess.Popen(
        command(model, tmp_path / "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(held)},
    ) as run:
        assert run.stdout.read() == b""
        run.send_signal(signal.SIGINT)
        assert run.stderr.read() == b""
    assert run.returncode == -signal.SIGINT


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """So many tensors that planning takes a second or more."""
    folder = tmp_path_factory.mktemp("many")
    shapes = {f"m.{i}.weight": (torch.bfloat16, (64, 128)) for i in range(6000)}
    write_sparse_checkpoint(folder, shapes, shards=2)
    return folder


def has_read_headers(run: Run, folder: Path) -> bool:
    """Tell whether a run has read as many bytes as there are in its input's headers. (proc(5), rchar)"""
    sizes = [read_header(path)[1] for path in folder.glob("*.safetensors")]
    counts = Path(f"/proc/{run.pid}/io").read_text()
    return int(re.search(r"rchar: (\d+)", counts)[1]) >= sum(sizes)


def finished_folder(folder: Path) -> tuple[Path, dict[str, bytes]]:
    """A finished folder of another model, and its bytes."""
    quantize(save_model(folder / "other", WEIGHT), folder / "out")
    return folder / "out", folder_bytes(folder / "out")


def pause_while_planning(
    many: Path, parent: Path, *options: str
) -> tuple[Run, Path, dict[str, bytes]]:
    """Start a run over a finished folder, paused after the headers and before the plan.

    On a busy machine a run may be over before it is looked at. Then another one is started, over
    another folder, since the first run may have replaced its own."""
    for attempt in range(10):
        folder, before = finished_folder(parent / str(attempt))
        run = start_cli(many, folder, *options)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            wait_until(lambda run=run: has_read_headers(run, many))
            pause(run.pid)
            if not run.has_printed():
                return run, folder, before
            os.kill(run.pid, signal.SIGCONT)
        run.wait()
    raise AssertionError("every run was over before it could be paused")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("options", [["--dry_run"], ["--dry_run", "--list"], ["--overwrite"]])
def test_a_signal_stops_planning_at_once(many, tmp_path, options, signum):
    run, folder, before = pause_while_planning(many, tmp_path, *options)
    os.kill(run.pid, signum)
    os.kill(run.pid, signal.SIGCONT)
    result = run.wait()
    assert_refused(result, exit_code=128 + signum)
    assert result.stderr == f"error: stopped by {signum.name}\n"
    assert result.stdout == ""  # no plan
    assert folder_bytes(folder) == before


def test_a_signal_at_any_moment_before_the_first_write_leaves_a_finished_folder_as_it_was(
    many, tmp_path
):
    run, folder, before = pause_while_planning(many, tmp_path, "--overwrite")
    delay = 0.0
    while not run.has_printed():
        os.kill(run.pid, signal.SIGINT)
        os.kill(run.pid, signal.SIGCONT)
        assert_refused(run.wait(), "stopped by SIGINT", exit_code=130)
        assert folder_bytes(folder) == before

        run = start_cli(many, folder, "--overwrite")
        delay += 0.1
        # A run that is over has printed something.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            wait_until(lambda run=run: has_read_headers(run, many))
            time.sleep(delay)
            pause(run.pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(run.pid, signal.SIGKILL)
    run.wait()


def test_an_error_before_the_first_write_leaves_a_finished_folder_as_it_was(tmp_path):
    folder, _ = finished_folder(tmp_path)
    weights = {"m.weight": torch.full((4, 128), torch.nan).bfloat16()}
    source = save_model(tmp_path / "in", weights)
    refuse(source, folder, "nan is not finite", options=["--overwrite"])


def test_a_stopped_run_with_overwrite_continues_without_it(large, tmp_path):
    shard_size = ["--shard_size_gb", 0.05]
    folder, _ = finished_folder(tmp_path)
    run = start_cli(large, folder, "--overwrite", *shard_size)
    wait_until(lambda: list(folder.glob("*.unfinished")) and list(folder.glob("model-00001.*rs")))
    os.kill(run.pid, signal.SIGINT)
    assert_refused(run.wait(), "the same command without --overwrite continues", exit_code=130)
    assert "Resuming:" in quantize(large, folder, *shard_size).stdout


@pytest.mark.parametrize("planned", [False, True], ids=["while torch is loaded", "later"])
def test_a_signal_ends_the_compiler_and_what_it_started_and_leaves_no_files(
    model, tmp_path, planned
):
    compiler, temporary = tmp_path / "a compiler", tmp_path / "temporary"
    compiler.write_text(f"#!/bin/sh\nsleep 100 &\necho $! > '{tmp_path}/pid'\nwait\n")
    compiler.chmod(0o755)
    temporary.mkdir()
    environment = os.environ | {"CC": str(compiler), "TMPDIR": str(temporary)}
    printed = tmp_path / "printed"
    with (
        open(printed, "w") as stdout,
        subprocess.Popen(
            command(model, tmp_path / "out"),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        ) as run,
    ):
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        assert list(temporary.iterdir())
        wait_until(lambda: printed.stat().st_size or not planned)
        run.send_signal(signal.SIGTERM)
        assert run.stderr.read() == ("error: stopped by SIGTERM\n" if planned else "")
    assert run.returncode == (143 if planned else -signal.SIGTERM)
    assert not list(temporary.iterdir())
    sleeper = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    wait_until(lambda: not sleeper.exists() or ") Z " in sleeper.read_text())


def test_error_feedback_with_torch_which_takes_minutes_heeds_signals(monkeypatch):
    factor = torch.ones(64, 8)
    feedback = q.feedback_of(torch.full((64,), 9.0), factor, None)
    monkeypatch.setattr(q, "SIGNALS_RECEIVED", [signal.SIGINT])
    with pytest.raises(q.Stopped, match="stopped by SIGINT"):
        quantize_groups(torch.ones(4, 32), importance=torch.ones(2, 32), feedback=feedback)
    with pytest.raises(q.Stopped, match="stopped by SIGINT"):
        q.feedback_of(torch.full((64,), 9.0), factor, None)


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_cleanly(large, tmp_path, signum, exit_code):
    arguments = command(large, tmp_path / "out", "--shard_size_gb", 0.05)
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list((tmp_path / "out").glob("*.unfinished")))
    run.send_signal(signum)
    _, errors = run.communicate(timeout=20)
    assert run.returncode == exit_code
    count = len(list((tmp_path / "out").iterdir()))
    assert (
        errors
        == f"error: stopped by {signum.name}; {count} of 5 shards {'is' if count == 1 else 'are'} finished and kept,"
        " the same command continues\n"
    )
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert all(
        re.fullmatch(r"model-\d{5}\.safetensors", name) for name in left
    )  # whole shards, no index
    assert all(len(tensor) for tensor in read_tensors(tmp_path / "out").values())
    quantize(large, tmp_path / "out", "--shard_size_gb", 0.05)
    assert len(read_tensors(tmp_path / "out")) == 48


@pytest.mark.parametrize("count", [0, 1, 2])
def test_one_finished_shard_is_kept_and_two_are(tmp_path, monkeypatch, count):
    source = save_model(tmp_path / "in", {f"m.{i}.weight": random(8, 128) for i in range(3)})

    class Stopped(q.Conversion):
        def run(self, threads, progress):
            super().run(threads, progress)
            for shard in self.shards.files[count:]:
                shard.finished = False
            raise q.QuantizeError("stopped by SIGINT", 130)

    monkeypatch.setattr(q, "Conversion", Stopped)
    args = q.parse_args([str(source), str(tmp_path / "out"), "--min_free_gb", "0"])
    args.shard_size_gb = 0.000002
    with pytest.raises(q.QuantizeError) as stop:
        q.run(args)
    verb = "is" if count == 1 else "are"
    assert f"; {count} of 3 shards {verb} finished and kept, the same" in str(stop.value)


def test_ctrl_c_leaves_no_torn_line_and_says_what_is_kept(large, tmp_path):
    arguments = command(
        large, tmp_path / "out", "--scale", "mse", "--shard_size_gb", 0.05, "--threads", 1
    )
    text, code = run_in_terminal(arguments, 80, interrupt_at="quantizing")
    assert code == 130
    last = text.rstrip("\n").rpartition("\r\033[K")[2]  # what is on the screen's last line
    assert re.fullmatch(
        r"error: stopped by SIGINT; \d+ of \d+ shards (is|are) finished and kept, the same command continues",
        last,
    )


def test_a_stop_in_verification_says_nothing_of_continuing(large, tmp_path):
    quantize(large, tmp_path / "out")
    text, code = run_in_terminal(
        command(large, tmp_path / "out", "--verify"), 80, interrupt_at="verifying"
    )
    assert code == 130
    assert text.rstrip("\n").endswith("error: stopped by SIGINT")


def test_a_terminal_that_closes_does_not_end_a_run_under_nohup(large, tmp_path):
    master, slave = pty.openpty()
    ignoring = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *command(large, tmp_path / "out")]
    with subprocess.Popen(ignoring, stdout=slave, stderr=slave) as run:
        os.close(slave)
        os.read(master, 1)
        os.close(master)  # from here on, every print fails
    assert run.returncode == 0
    assert "complete already" in quantize(large, tmp_path / "out").stdout
