"""Errors and signals: one line that says what to do, and a stop that leaves nothing torn (README: "Exit codes")."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import random, save_model
from conftest import SCRIPT, command, plain, quantize, run_cli, run_in_terminal, wait_until
from folders import read_tensors

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
            for shard in self.shards[count:]:
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
        plain(last),
    )


def test_a_stop_in_verification_says_nothing_of_continuing(large, tmp_path):
    quantize(large, tmp_path / "out")
    text, code = run_in_terminal(
        command(large, tmp_path / "out", "--verify"), 80, interrupt_at="verifying"
    )
    assert code == 130
    assert plain(text).rstrip("\n").endswith("error: stopped by SIGINT")


def test_a_terminal_that_closes_does_not_end_a_run_under_nohup(large, tmp_path):
    master, slave = pty.openpty()
    ignoring = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *command(large, tmp_path / "out")]
    with subprocess.Popen(ignoring, stdout=slave, stderr=slave) as run:
        os.close(slave)
        os.read(master, 1)
        os.close(master)  # from here on, every print fails
    assert run.returncode == 0
    assert "complete already" in quantize(large, tmp_path / "out").stdout
