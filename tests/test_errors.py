"""Errors and signals: one line, an exit code, and a folder that the same command continues."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SCRIPT, command, quantize, read_tensors, run_cli


def test_an_interrupt_during_the_imports_shows_no_traceback():
    with subprocess.Popen(
        [sys.executable, SCRIPT, "in", "out"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as run:
        while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
            time.sleep(0.005)
        run.send_signal(signal.SIGINT)
        assert run.stderr.read() == b""
    assert run.returncode == -signal.SIGINT


def test_debug_shows_the_traceback(tmp_path):
    result = run_cli(tmp_path / "nowhere", tmp_path / "out", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: folder")


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
        == f"error: stopped by {signum.name}; {count} of 10 shards are finished and kept, the same command continues\n"
    )
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert all(re.fullmatch(r"model-\d{5}\.safetensors", name) for name in left)  # whole shards, no index
    assert all(len(tensor) for tensor in read_tensors(tmp_path / "out").values())
    quantize(large, tmp_path / "out", "--shard_size_gb", 0.05)
    assert len(read_tensors(tmp_path / "out")) == 96
