"""Shared by the tests: the script as a module and as a process, and checkpoints to run it on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "quantize_int4.py"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import write_checkpoint, write_sparse_checkpoint  # noqa: E402
from launcher import WIDE, Run, Setting  # noqa: E402
from tiny_nemotron import TINY, random_tensors, write_other_files  # noqa: E402

import quantize_int4 as q  # noqa: E402

WEIGHT = {"m.weight": torch.ones(4, 128).bfloat16()}


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    """What is printed is not wrapped, but where a test is about that."""
    monkeypatch.setenv("COLUMNS", WIDE)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The tiny Nemotron checkpoint; tests must not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(folder, random_tensors(TINY))
    write_other_files(folder, TINY)
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    """A checkpoint of one weight; a test may change it."""
    return save_model(tmp_path / "in", WEIGHT)


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> Path:
    """1.6 GB of zeros: long enough a run to meddle with."""
    folder = tmp_path_factory.mktemp("large")
    write_sparse_checkpoint(folder, {f"m.{i}.weight": (torch.bfloat16, (4096, 4096)) for i in range(48)}, shards=3)
    return folder


def compiled() -> q.Kernel:
    """The kernel, without which a test is skipped."""
    try:
        return q.compile_kernel(True)
    except q.NoKernel as reason:
        pytest.skip(str(reason))


def command(input_dir: Path, output_dir: Path, *options: object) -> list[str]:
    """The command line. The memory guard is off unless a test sets it, so that small machines run the suite, too."""
    base = [sys.executable, str(SCRIPT), "--input_dir", str(input_dir), "--output_dir", str(output_dir)]
    return [*base, "--min_free_gb", "0", *map(str, options)]


def start_cli(input_dir: Path, output_dir: Path, *options: object, **setting) -> Run:
    """Start the command in a process of its own; `setting` as launcher.Setting."""
    return Run(command(input_dir, output_dir, *options)[2:], Setting(**setting))


def run_cli(input_dir: Path, output_dir: Path, *options: object, **setting) -> subprocess.CompletedProcess:
    """Run the command to its end."""
    return start_cli(input_dir, output_dir, *options, **setting).wait()


def quantize(input_dir: Path, output_dir: Path, *options: object, **setting) -> subprocess.CompletedProcess:
    """Run the command, which must succeed and keep standard error empty."""
    result = run_cli(input_dir, output_dir, *options, **setting)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result


def assert_refused(result: subprocess.CompletedProcess, *fragments: str, exit_code: int = 1) -> None:
    """The promise of every refusal: its exit code, one line on standard error, and that line says what matters."""
    assert result.returncode == exit_code, result.stdout + result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]


def refuse(input_dir: Path, output_dir: Path, *fragments: str, options: Sequence = (), exit_code: int = 1) -> None:
    """Run the command, which must refuse with these words and leave the output folder as it was."""
    before = folder_bytes(output_dir) if output_dir.is_dir() else output_dir.exists()
    assert_refused(run_cli(input_dir, output_dir, *options), *fragments, exit_code=exit_code)
    assert before == (folder_bytes(output_dir) if output_dir.is_dir() else output_dir.exists())


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read with the safetensors library alone."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit_shard(shard: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a shard, and nothing in its metadata."""
    with safe_open(shard, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, shard, metadata=metadata)


def save_model(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """One model.safetensors without an index, and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    return folder
