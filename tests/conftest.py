"""Runs the command for the tests: as a process, in a terminal, refused, or with its memory watched."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import WEIGHT, save_model, write_checkpoint, write_sparse_checkpoint
from folders import assert_entries_fit, folder_bytes
from launcher import WIDE, Run, Setting
from tiny_nemotron import NANO_30B, TINY, nemotron_tensors, random_tensors, write_other_files

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "quantize_int4.py"
GB = 10**9
ENGINE_FORMATS = ["compressed-tensors", "gptq"]
FORMATS = ["int4", *ENGINE_FORMATS]
AS_NOBODY = {"user": 65534 if os.geteuid() == 0 else None}  # permissions do not bind root


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    """What is printed is not wrapped, but where a test is about that."""
    monkeypatch.setenv("COLUMNS", WIDE)


@pytest.fixture(scope="session", autouse=True)
def ignored_signals_that_no_run_inherits() -> None:
    """A job in the background ignores SIGINT, one under nohup SIGHUP, and so would every program that it starts.

    A handler that does nothing keeps the tests as deaf as they were, but the runs that they start have the default.
    """
    for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, lambda *_: None)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The tiny Nemotron checkpoint; tests must not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(folder, random_tensors(TINY))
    write_other_files(folder, TINY)
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    """A checkpoint of one weight, which tests may spoil."""
    return save_model(tmp_path / "in", WEIGHT)


@pytest.fixture(scope="session")
def inventory(tmp_path_factory) -> Path:
    """Nemotron-3-Nano-30B: all of its 6,243 headers, and none of its weights."""
    folder = tmp_path_factory.mktemp("inventory")
    write_sparse_checkpoint(folder, nemotron_tensors(NANO_30B), shards=13)
    write_other_files(folder, NANO_30B)
    return folder


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> Path:
    """0.8 GB of zeros: long enough a run to be stopped."""
    folder = tmp_path_factory.mktemp("large")
    write_sparse_checkpoint(
        folder, {f"m.{i}.weight": (torch.bfloat16, (4096, 4096)) for i in range(24)}, shards=3
    )
    return folder


@pytest.fixture
def open_folder(tiny) -> Iterator[Path]:
    """A folder that any user can reach, with a copy of the tiny checkpoint that any user can read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(tiny, Path(folder) / "in", copy_function=shutil.copyfile)
        os.chmod(Path(folder) / "in", 0o755)
        yield Path(folder)


# --- runs -------------------------------------------------------------------------------------------------------------


def command(input_dir: Path, output_dir: Path, *options: object) -> list[str]:
    """The command line. The memory guard is off unless a test sets it, so that small machines run the suite, too."""
    base = [
        sys.executable,
        str(SCRIPT),
        "--input_dir",
        str(input_dir),
        "--output_dir",
        str(output_dir),
    ]
    return [*base, "--min_free_gb", "0", *map(str, options)]


def start_cli(input_dir: Path, output_dir: Path, *options: object, **setting) -> Run:
    """Start the command in a process of its own; `setting` as launcher.Setting."""
    return Run(command(input_dir, output_dir, *options)[2:], Setting(**setting))


def run_cli(
    input_dir: Path, output_dir: Path, *options: object, **setting
) -> subprocess.CompletedProcess:
    """Run the command to its end."""
    return start_cli(input_dir, output_dir, *options, **setting).wait()


def quantize(
    input_dir: Path, output_dir: Path, *options: object, **setting
) -> subprocess.CompletedProcess:
    """Run the command, which must succeed, keep standard error empty, and leave entries by which engines find all."""
    result = run_cli(input_dir, output_dir, *options, **setting)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    config = output_dir / "config.json"
    if (
        "--restore" not in options
        and config.exists()
        and re.search('"(ignore|dynamic)"', config.read_text())
    ):
        assert_entries_fit(output_dir)
    return result


def assert_refused(
    result: subprocess.CompletedProcess, *fragments: str, exit_code: int = 1
) -> None:
    """The promise of every refusal: its exit code, one line on standard error, and that line says what matters."""
    assert result.returncode == exit_code, result.stdout + result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]


def refuse(
    input_dir: Path,
    output_dir: Path,
    *fragments: str,
    options: list[object] | tuple[()] = (),
    exit_code: int = 1,
) -> None:
    """The run is refused with these words, and the output folder is as it was."""
    before = folder_bytes(output_dir) if output_dir.is_dir() else output_dir.exists()
    assert_refused(run_cli(input_dir, output_dir, *options), *fragments, exit_code=exit_code)
    assert before == (folder_bytes(output_dir) if output_dir.is_dir() else output_dir.exists())


def least_size(refused: subprocess.CompletedProcess) -> str:
    """The number that a refusal of a smaller --max_size_gb gives."""
    return re.search(r"is too little: give (\S+) or more", refused.stderr)[1]


# --- runs that are watched --------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def pause(pid: int) -> None:
    """Stop a process, and wait until each of its threads stands still: one may be in a system call."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    wait_until(lambda: all(is_stopped(task) for task in tasks.iterdir()))


def is_stopped(task: Path) -> bool:
    """Tell whether a thread is stopped, or over. (proc(5), stat: the state follows the name)"""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] in "TZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def run_in_terminal(
    arguments: list[str],
    columns: int,
    interrupt_at: str | None = None,
) -> tuple[str, int]:
    """What a terminal of so many columns is sent, and the exit code; Ctrl-C once it has shown `interrupt_at`."""
    environment = {"COLUMNS": str(columns), "TERM": "xterm"}
    master, slave = pty.openpty()
    run = Run(arguments[2:], Setting(environment=environment), slave)
    os.close(slave)
    text = ""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux's end of file of a terminal
            break
        text += chunk.decode(errors="replace")
        if interrupt_at and interrupt_at in text:
            os.write(master, b"\x03")
            interrupt_at = None
    os.close(master)
    return text.replace("\r\n", "\n"), run.wait().returncode


def peak_anonymous(run: Run | subprocess.Popen) -> int:
    """The most RssAnon that the kernel reports of a run, which must succeed, in bytes."""
    peak = 0
    while run.poll() is None:
        try:
            status = Path(f"/proc/{run.pid}/status").read_text()
        except OSError:
            break
        for kilobytes in re.findall(r"RssAnon:\s+(\d+)", status):
            peak = max(peak, int(kilobytes) * 1024)
        time.sleep(0.01)
    result = run.wait()
    assert run.poll() == 0, result
    return peak
