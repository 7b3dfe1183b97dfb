"""Page cache: a run leaves it as it was and reads around it (README: "The page cache is left as it was found")."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint, write_sparse_checkpoint
from conftest import AS_NOBODY, SCRIPT, command, quantize, start_cli
from folders import assert_same_tensors
from safetensors.torch import save_file

import quantize_int4 as q

MB = 10**6
HEADERS = 1 * MB  # what the kernel reads ahead of a file's header, which stays


def cached_bytes(*paths: Path) -> int:
    """Bytes of files that are in the page cache. (util-linux)"""
    found = subprocess.run(
        ["fincore", "-b", "-n", "-r", "-o", "res", *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    return sum(map(int, found.stdout.split()))


def forget(*paths: Path) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Two files of 17 MB, neither of which is in the page cache, where the file system has one that can be left."""
    weights = {f"m.{i}.up_proj.weight": torch.randn(2048, 1024).bfloat16() for i in range(7)}
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        **weights,
        "embed.weight": torch.randn(1024, 1024).bfloat16(),
    }
    write_checkpoint(tmp_path / "in", tensors)
    (tmp_path / "in" / "config.json").write_text('{"model_type": "llama"}\n')
    (tmp_path / "in" / "corpus.txt").write_bytes(bytes(5 * MB))
    forget(*(tmp_path / "in").iterdir())
    try:
        left = cached_bytes(*(tmp_path / "in").iterdir())
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("fincore of util-linux is missing")
    if left:
        pytest.skip("on this file system, files are nowhere but in memory")
    return tmp_path / "in"


def test_nothing_that_a_run_reads_or_writes_stays_cached(checkpoint, tmp_path):
    quantize(checkpoint, tmp_path / "out")
    assert cached_bytes(*checkpoint.iterdir()) < HEADERS
    assert cached_bytes(*(tmp_path / "out").iterdir()) < HEADERS


@pytest.mark.parametrize("direct", [True, False])
def test_nor_what_it_reads_through_the_cache_for_lack_of_another_way(checkpoint, tmp_path, direct):
    quantize(checkpoint, tmp_path / "out", constants={} if direct else {"O_DIRECT": os.O_DIRECTORY})
    assert cached_bytes(*checkpoint.iterdir()) < HEADERS
    quantize(checkpoint, tmp_path / "other", "--threads", 1)
    assert_same_tensors(tmp_path / "out", tmp_path / "other")


def test_nor_a_pickle_whose_weights_are_mapped(checkpoint, tmp_path):
    (tmp_path / "pickled").mkdir()
    weights = {
        f"m.{i}.up_proj.weight": torch.randn(1024, 2048).bfloat16().T for i in range(4)
    }  # not in one piece
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    forget(tmp_path / "pickled" / "pytorch_model.bin")
    quantize(tmp_path / "pickled", tmp_path / "out")
    assert cached_bytes(tmp_path / "pickled" / "pytorch_model.bin") < HEADERS


@pytest.mark.parametrize("option", ["--verify", "--restore"])
def test_nor_what_verification_and_restoration_read_and_write(checkpoint, tmp_path, option):
    quantize(checkpoint, tmp_path / "out")
    if option == "--verify":
        quantize(checkpoint, tmp_path / "out", option)
    else:
        quantize(tmp_path / "out", tmp_path / "back", option)
    for folder in tmp_path.iterdir():
        assert cached_bytes(*folder.iterdir()) < HEADERS, folder


def test_what_others_had_in_the_cache_stays_there(checkpoint, tmp_path):
    first, second = sorted(checkpoint.glob("*.safetensors"))
    first.read_bytes()
    with open(second, "rb") as file:
        file.seek(9 * MB)
        file.read(4 * MB)
    before = cached_bytes(first), cached_bytes(second)
    assert before[0] >= first.stat().st_size
    assert 4 * MB <= before[1] < 6 * MB
    quantize(checkpoint, tmp_path / "out")
    quantize(checkpoint, tmp_path / "out", "--verify")
    for path, was in zip((first, second), before):
        assert (
            abs(cached_bytes(path) - was) < HEADERS
        )  # the system may reclaim some pages meanwhile


def test_what_lies_between_pages_that_others_had_does_not_stay(checkpoint, tmp_path):
    shards = sorted(checkpoint.glob("*.safetensors"))
    for path in shards:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for start in range(0, path.stat().st_size, 15 * 4096):
                os.pread(file.fileno(), 4096, start)
    before = cached_bytes(*shards)
    assert before < 3 * MB
    quantize(checkpoint, tmp_path / "out")
    assert abs(cached_bytes(*shards) - before) < HEADERS


def test_nor_do_the_pages_that_tensors_of_a_file_of_statistics_share(checkpoint, tmp_path):
    path = tmp_path / "statistics.safetensors"
    weights, statistics = {}, {}
    for number in range(100):
        weights[f"m.{number}.weight"] = torch.randn(8, 1024).bfloat16()
        statistics[f"m.{number}"] = torch.full((1024,), 32.0)
        statistics[f"m.{number}.factor"] = torch.ones(1024, 32)
        statistics[f"m.{number}.cost"] = torch.tensor(0.1)
    write_checkpoint(checkpoint, weights)
    save_file(statistics, path)
    forget(path)
    options = ["--format", "compressed-tensors", "--importance", path]
    quantize(checkpoint, tmp_path / "out", *options)
    quantize(checkpoint, tmp_path / "out", *options, "--verify")
    assert cached_bytes(path) < HEADERS


def test_even_at_its_fullest_a_run_adds_little_to_the_cache(tmp_path):
    write_sparse_checkpoint(
        tmp_path / "in", {f"m.{i}.weight": (torch.bfloat16, (8192, 8192)) for i in range(9)}, 3
    )
    (tmp_path / "out").mkdir()
    most = 0
    run = start_cli(tmp_path / "in", tmp_path / "out")
    while run.poll() is None:
        # A file may get its final name meanwhile.
        with contextlib.suppress(subprocess.CalledProcessError):
            files = [*(tmp_path / "in").iterdir(), *(tmp_path / "out").iterdir()]
            most = max(most, cached_bytes(*files))
        time.sleep(0.02)
    assert run.wait().returncode == 0
    assert (
        most < 250 * MB
    )  # of 1.2 GB in and 0.3 out, which is synced and dropped while it is written


@pytest.fixture
def foreign(checkpoint) -> Iterator[Path]:
    """A folder where anyone may write, with that checkpoint, which another user may read and not write. Of such a file
    mincore tells nothing."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        shutil.copytree(checkpoint, Path(folder) / "in")
        forget(*(Path(folder) / "in").iterdir())
        yield Path(folder)


@pytest.mark.parametrize("direct", [True, False])
def test_nothing_stays_cached_of_a_checkpoint_of_another_user(foreign, tmp_path, direct):
    constants = {} if direct else {"O_DIRECT": os.O_DIRECTORY}
    quantize(foreign / "in", foreign / "out", constants=constants, **AS_NOBODY)
    assert cached_bytes(*(foreign / "in").iterdir()) < HEADERS
    assert cached_bytes(*(foreign / "out").iterdir()) < HEADERS
    quantize(foreign / "in", tmp_path / "other")
    assert_same_tensors(foreign / "out", tmp_path / "other")


def test_nor_of_a_folder_of_another_user_that_is_verified_or_restored(foreign):
    quantize(foreign / "in", foreign / "out")
    forget(*(foreign / "in").iterdir(), *(foreign / "out").iterdir())
    quantize(foreign / "in", foreign / "out", "--verify", **AS_NOBODY)
    quantize(foreign / "out", foreign / "back", "--restore", **AS_NOBODY)
    for folder in foreign.iterdir():
        assert cached_bytes(*folder.iterdir()) < HEADERS, folder


@pytest.mark.parametrize("direct", [True, False])
def test_what_others_had_of_another_users_files_in_the_cache_stays_there(foreign, direct):
    first, second = sorted((foreign / "in").glob("*.safetensors"))
    first.read_bytes()
    with open(second, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 4 * MB, 9 * MB)
    before = cached_bytes(first), cached_bytes(second)
    assert before[0] >= first.stat().st_size
    assert 4 * MB <= before[1] < 6 * MB
    constants = {} if direct else {"O_DIRECT": os.O_DIRECTORY}
    quantize(foreign / "in", foreign / "out", constants=constants, **AS_NOBODY)
    for path, was in zip((first, second), before):
        assert abs(cached_bytes(path) - was) < HEADERS


@pytest.fixture
def small_container():
    """A control group with 170 MB of memory beside what the imports take: its bytes, and the file that puts a process
    into it."""
    own = "import psutil, quantize_int4; info = psutil.Process().memory_info(); print(info.rss - info.shared)"
    imports = subprocess.run(
        [sys.executable, "-c", own], cwd=SCRIPT.parent, capture_output=True, text=True, check=True
    )
    size = int(imports.stdout) + 170 * MB
    for root, limit in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        try:
            folder = Path(tempfile.mkdtemp(prefix="quantize_int4.", dir=root))
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(size))
            yield size, folder / "cgroup.procs"
            return
        except OSError:
            continue
        finally:
            folder.rmdir()
    pytest.skip("no control group can be made here, which takes root")


def test_a_container_may_have_less_memory_than_the_output_has_bytes(small_container, tmp_path):
    size, processes = small_container
    weights = 8192**2  # of a tensor, which become 4.125 bits each
    shapes = {
        f"m.{i}.weight": (torch.bfloat16, (8192, 8192))
        for i in range(size * 8 // (4 * weights) + 1)
    }
    write_sparse_checkpoint(tmp_path / "in", shapes, 1)
    enter = ["sh", "-c", f'echo $$ > {processes}; exec "$@"', "sh"]
    options = ["--threads", 2, "--min_free_gb", 0.02]
    result = subprocess.run(
        [*enter, *command(tmp_path / "in", tmp_path / "out", *options)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) > size


# --- the reads around it, from inside: from outside they are a race ---------------------------------------------------


def test_bytes_at_any_offset_are_read_around_the_cache_or_through_it(tmp_path):
    """Tied tensors of a pickle lie in the same bytes; in a safetensors file a tensor may begin anywhere."""
    tied = torch.arange(40_000.0)
    torch.save({"one.weight": tied, "other.weight": tied[1000:2000]}, tmp_path / "model.pth")
    tensors = {
        "odd.mask": torch.ones(4099).bool(),
        "m.weight": tied.bfloat16(),
        "n.weight": tied[:5].half(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    forget(*tmp_path.iterdir())
    files = q.WeightsFile(tmp_path / "model.pth"), q.WeightsFile(tmp_path / "model.safetensors")
    expected = {"one.weight": tied, "other.weight": tied[1000:2000], **tensors}
    for file, (name, info) in itertools.chain(
        *(itertools.product([each], each.infos.items()) for each in files)
    ):
        for start, nbytes in (
            (0, info.nbytes),
            (info.nbytes // 2, info.nbytes - info.nbytes // 2),
            (0, 1),
        ):
            found = file.read(
                info, start, nbytes, memoryview(mmap.mmap(-1, nbytes + q.READ_MARGIN))
            )
            whole = expected[name].view(torch.uint8).numpy().tobytes()
            assert (
                bytes(found)
                == whole[start : start + nbytes]
                == bytes(file.read(info, start, nbytes))
            )


def test_what_the_first_read_brings_into_the_cache_is_not_taken_for_anothers(checkpoint):
    file = q.WeightsFile(sorted(checkpoint.glob("*.safetensors"))[1])
    last = max(
        file.infos.values(), key=lambda info: info.location.offset
    )  # the header's reading reaches the first
    file.read(last, 0, 16)
    assert not file.is_cached(last, 0, 16)


def test_asking_and_dropping_take_no_longer_with_more_ranges_in_the_cache(tmp_path):
    ranges = [(start, start + 4096) for start in range(0, 1 << 31, 8192)]
    around = [(1 << 30, (1 << 30) + 4096), ((1 << 30) + 8192, (1 << 30) + 12288)]
    assert q.within(ranges, 1 << 30, (1 << 30) + 8193) == around
    assert q.within(ranges, (1 << 30) + 4096, (1 << 30) + 8192) == []
    (tmp_path / "file").touch()
    with open(tmp_path / "file", "rb") as file:
        started = time.process_time()
        for start in range(0, 1 << 23, 1 << 13):
            q.within(ranges, start, start + (1 << 13))
            q.drop_pages(file.fileno(), ranges, start, start + (1 << 13))
        assert time.process_time() - started < 5  # a thousand times; all ranges take a minute
