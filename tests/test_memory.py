"""Memory: what is taken, and whose limits count (README: "Memory does not depend on the size of the checkpoint")."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from checkpoints import save_pickle, write_sparse_checkpoint
from conftest import GB, assert_refused, command, peak_anonymous, quantize, run_cli, start_cli
from safetensors.torch import save_file

import quantize_int4 as q

# --- what the process takes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_a_gigabyte() -> int:
    """What a run may take: 0.35 GB besides the 0.15 that torch's CPU build holds as soon as it is imported, or what
    another build holds (0.25 to 0.29 with CUDA)."""
    status = "import torch; print(open('/proc/self/status').read())"
    text = subprocess.run(
        [sys.executable, "-c", status], capture_output=True, text=True, check=True
    ).stdout
    return 350_000_000 + int(re.search(r"RssAnon:\s+(\d+)", text)[1]) * 1024


def test_memory_stays_under_half_a_gigabyte_whatever_the_size_of_a_tensor_or_shard(
    tmp_path, half_a_gigabyte
):
    tensors = {
        "embed_tokens.weight": (torch.bfloat16, (100_000, 3072)),  # 0.6 GB, kept
        "lm_head.weight": (torch.bfloat16, (100_000, 3000)),  # 0.6 GB, quantized and padded
    }
    write_sparse_checkpoint(tmp_path / "in", tensors, shards=1)
    arguments = command(tmp_path / "in", tmp_path / "out", "--threads", 2)
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as run:
        assert peak_anonymous(run) < half_a_gigabyte
    assert (tmp_path / "out" / "model-00001.safetensors").stat().st_size > 0.75 * GB


def test_a_row_of_a_hundred_million_columns_is_not_held_either(tmp_path, half_a_gigabyte):
    write_sparse_checkpoint(tmp_path / "in", {"m.weight": (torch.bfloat16, (2, 10**8))}, shards=1)
    run = start_cli(tmp_path / "in", tmp_path / "out", "--threads", 2)
    assert peak_anonymous(run) < half_a_gigabyte


@pytest.mark.parametrize("form", ["int4", "compressed-tensors", "gptq"])
@pytest.mark.parametrize(("threads", "times"), [(2, 1), (20, 4)])
def test_memory_stays_within_its_limit_in_every_format(
    tmp_path, form, threads, times, half_a_gigabyte
):
    shapes = {
        f"m.{i}.up_proj.weight": (torch.bfloat16, (8192, 4096)) for i in range(threads // 2 + 2)
    }
    write_sparse_checkpoint(tmp_path / "in", shapes, shards=1)
    (tmp_path / "in" / "config.json").write_text("{}")
    options = [
        "--format",
        form,
        "--threads",
        threads,
        "--scale",
        "mse" if threads == 2 else "absmax",
    ]
    run = start_cli(tmp_path / "in", tmp_path / "out", *options)
    assert peak_anonymous(run) < times * half_a_gigabyte


def test_memory_stays_within_its_limit_with_the_largest_factor_and_as_the_plan_says(
    tmp_path, half_a_gigabyte
):
    names = [f"m.{number}.up_proj" for number in range(12)]
    write_sparse_checkpoint(
        tmp_path / "in", {f"{n}.weight": (torch.bfloat16, (256, 32768)) for n in names}, shards=1
    )
    vectors = {name: torch.ones(32768) for name in names}
    factors = {f"{name}.factor": torch.full((32768, 64), 0.1) for name in names}  # 0.2 GB in all
    save_file(vectors | factors, tmp_path / "statistics.safetensors")
    options = [
        "--threads",
        2,
        "--scale",
        "mse",
        "--importance",
        tmp_path / "statistics.safetensors",
    ]
    plan = run_cli(tmp_path / "in", tmp_path / "out", *options, "--dry_run").stdout
    planned = float(re.search(r"about (\S+) MB at the peak", plan)[1]) * 1e6
    peak = peak_anonymous(start_cli(tmp_path / "in", tmp_path / "out", *options))
    assert peak < min(planned, half_a_gigabyte)


def test_memory_is_not_more_than_the_plan_says_with_mse(tmp_path):
    shapes = {f"m.{number}.up_proj.weight": (torch.bfloat16, (2048, 4096)) for number in range(12)}
    write_sparse_checkpoint(tmp_path / "in", shapes, shards=1)
    options = ["--scale", "mse", "--threads", 2]
    stdout = quantize(tmp_path / "in", tmp_path / "out", *options).stdout
    planned, measured = map(
        float, re.search(r"about (\S+) MB at the peak;[^$]*Memory: +(\S+) MB at", stdout).groups()
    )
    assert measured <= planned


def test_a_large_file_beside_the_weights_is_not_held(tiny, tmp_path, half_a_gigabyte):
    shutil.copytree(tiny, tmp_path / "in")
    with open(tmp_path / "in" / "corpus.txt", "wb") as file:
        file.truncate(600_000_000)
    run = start_cli(tmp_path / "in", tmp_path / "out", "--threads", 2)
    assert peak_anonymous(run) < half_a_gigabyte
    assert (tmp_path / "out" / "corpus.txt").stat().st_size == 600_000_000


def test_a_pth_takes_no_more_memory_than_safetensors(tmp_path, half_a_gigabyte):
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save(
        {f"m.{i}.weight": torch.zeros(100_000, 1024, dtype=torch.bfloat16) for i in range(3)},
        folder / "model.pth",
    )
    (folder / "config.json").write_text("{}")
    run = start_cli(folder, tmp_path / "out", "--threads", 2)
    assert peak_anonymous(run) < half_a_gigabyte


def record_buffer(role: str, nbytes: int) -> None:
    """Write down a buffer of a worker's, in the file that BUFFERS_FILE names.

    Kernels are tried in the main thread, with buffers of their own."""
    if threading.current_thread() is not threading.main_thread():
        with open(os.environ["BUFFERS_FILE"], "a") as file:
            file.write(f"{role}={nbytes}\n")


class RecordingWorkspace(q.Workspace):
    def buffer(self, role: str, nbytes: int) -> memoryview:
        record_buffer(role, nbytes)
        return super().buffer(role, nbytes)


def allocate_and_record(nbytes: int) -> mmap.mmap:
    memory = ALLOCATE(nbytes)
    record_buffer("allocated", len(memory))
    return memory


ALLOCATE = q.allocate
SMALL = {
    "TILE_WEIGHTS": 30_000,
    "JOB_WEIGHTS": 100_000,
    "TRANSPOSED_JOB_WEIGHTS": 150_000,
    "COPY_BYTES": 20_000,
}
BUFFER_CASES = {
    "int4": ("bfloat16", 700, ["--format", "int4", "--scale", "absmax"]),
    "float64": ("float64", 768, ["--format", "int4", "--scale", "mse"]),
    "long rows": ("bfloat16", 40_000, ["--format", "int4", "--scale", "mse"]),
    "8 bits": ("bfloat16", 768, ["--format", "compressed-tensors", "--int8", "up_proj"]),
    "transposed": ("float16", 768, ["--format", "gptq"]),
    "importance": ("bfloat16", 768, ["--format", "int4", "--scale", "mse"]),
    "feedback": ("float32", 768, ["--format", "int4", "--scale", "mse"]),
}


@pytest.mark.parametrize("compiler", ["false", "cc"])
@pytest.mark.parametrize("case", BUFFER_CASES)
def test_workers_hold_the_buffers_that_the_plan_counts(tmp_path, monkeypatch, case, compiler):
    dtype, columns, options = BUFFER_CASES[case]
    weight = torch.randn(192, columns, generator=torch.Generator().manual_seed(0))
    weight = weight.to(getattr(torch, dtype))
    source = tmp_path / "in"
    source.mkdir()
    tensors = {"m.0.up_proj.weight": weight, "m.0.norm.weight": torch.ones(50_000)}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    statistics = None
    if case in ("importance", "feedback"):
        tensors = {"m.0.up_proj": torch.ones(columns)}
        if case == "feedback":
            tensors["m.0.up_proj.factor"] = torch.full((columns, 8), 0.1)
        save_file(tensors, tmp_path / "statistics.safetensors")
        options = [*options, "--importance", tmp_path / "statistics.safetensors"]
        statistics = q.Importance(tmp_path / "statistics.safetensors")
    record = tmp_path / "buffers"
    quantize(
        source,
        tmp_path / "out",
        *options,
        "--threads",
        1,
        constants={**SMALL, "Workspace": RecordingWorkspace, "allocate": allocate_and_record},
        environment={"CC": compiler, "BUFFERS_FILE": str(record)},
    )

    used: dict[str, int] = {}
    allocated = 0
    for line in record.read_text().splitlines():
        role, nbytes = line.split("=")
        used[role] = max(used.get(role, 0), int(nbytes))
        allocated += int(nbytes) if role == "allocated" else 0
    del used["allocated"]
    for name, value in SMALL.items():
        monkeypatch.setattr(q, name, value)
    given = q.Options(**q.read_facts(tmp_path / "out")["options"])
    with contextlib.closing(q.Checkpoint(source)) as checkpoint:
        plan = q.plan_conversion(checkpoint, given, statistics)
    (tensor,) = (tensor for tensor in plan.tensors if tensor.packing)
    planned = {
        role: nbytes
        for role, nbytes in q.worker_buffers(tensor, given.form).items()
        # That is held only to compare.
        if nbytes and role != "found"
    }
    assert allocated <= q.buffer_bytes(plan, threads=1)
    assert all(used[role] <= planned[role] for role in used)
    # Of a row that is cut, only the last and shorter part may be padded.
    if compiler == "false" and case != "long rows":
        assert used == planned


# --- the guard --------------------------------------------------------------------------------------------------------


def test_the_guard_refuses_to_start_when_too_little_is_available(tiny, tmp_path):
    result = run_cli(tiny, tmp_path / "out", "--min_free_gb", 10**6)
    assert_refused(result, "available", "--min_free_gb", "1,000 TB", exit_code=3)
    assert not (tmp_path / "out").exists()


def write_system(system: Path, membership: str, groups: dict[str, dict[str, object]]) -> Path:
    """Write what a system says of the control groups of a process, each by its folder below /sys/fs/cgroup."""
    (system / "proc/self").mkdir(parents=True)
    (system / "proc/self/cgroup").write_text(membership)
    for group, files in groups.items():
        folder = system / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")
    return system


V2 = {
    "memory.max": 8 * GB,
    "memory.current": 7 * GB,
    "memory.stat": f"anon 1\nactive_file {GB}\ninactive_file {4 * GB}",
}

V1 = {
    "memory.limit_in_bytes": 8 * GB,
    "memory.usage_in_bytes": 7 * GB,
    "memory.stat": f"cache 1\nactive_file 1\ntotal_active_file {GB}\ntotal_inactive_file {4 * GB}",
}
IN_V1 = "12:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n"


@pytest.fixture
def machine(monkeypatch):
    """A machine of 128 GB, of which 100 are available."""
    memory = SimpleNamespace(total=128 * GB, available=100 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return q.MemoryReading(available=100 * GB, used=28 * GB)


@pytest.mark.parametrize(
    ("membership", "groups"),
    [("0::/docker/abc\n", {"docker/abc": V2}), (IN_V1, {"memory/docker/abc": V1})],
    ids=["cgroup v2", "cgroup v1"],
)
def test_reclaimable_page_cache_counts_as_available_in_a_container(
    tmp_path, machine, membership, groups
):
    guard = q.MemoryGuard(0, write_system(tmp_path, membership, groups))
    assert guard.read() == q.MemoryReading(available=6 * GB, used=2 * GB)


@pytest.mark.parametrize(
    ("membership", "groups"),
    [
        ("0::/\n", {"": V2 | {"memory.max": "max"}}),
        (IN_V1, {"memory": V1 | {"memory.limit_in_bytes": 9223372036854771712}}),
        ("0::/\n", {}),
        ("", {}),
    ],
)
def test_a_group_without_a_limit_does_not_count(tmp_path, machine, membership, groups):
    assert q.MemoryGuard(0, write_system(tmp_path, membership, groups)).read() == machine


def test_without_control_groups_the_machine_counts(tmp_path, machine):
    assert q.MemoryGuard(0, tmp_path / "not Linux").read() == machine


def test_the_limits_of_all_groups_above_count_and_the_tightest_wins(tmp_path, machine):
    groups = {
        "docker": V2 | {"memory.max": 3 * GB},
        "docker/abc": V2,
        "docker/other": V2 | {"memory.max": GB},
    }
    assert (
        q.MemoryGuard(0, write_system(tmp_path, "0::/docker/abc\n", groups)).read().available == GB
    )


def test_inside_a_container_the_hosts_path_does_not_exist_and_the_root_is_the_group(
    tmp_path, machine
):
    assert (
        q.MemoryGuard(0, write_system(tmp_path, IN_V1, {"memory": V1})).read().available == 6 * GB
    )


def test_a_container_limit_trips_the_guard(tmp_path, machine):
    guard = q.MemoryGuard(7 * GB, write_system(tmp_path, "0::/\n", {"": V2}))
    with pytest.raises(q.QuantizeError, match=r"6\.00 GB of memory available") as stop:
        guard.check()
    assert stop.value.exit_code == 3


# --- cores and machines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "20000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        (IN_V1, {"cpu.cfs_quota_us": 100000, "cpu.cfs_period_us": 100000}, 1),
        (IN_V1, {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}, None),
        ("0::/\n", {}, None),
    ],
)
def test_threads_default_to_the_cores_that_affinity_and_quota_allow(
    tmp_path, membership, files, cores
):
    free = len(os.sched_getaffinity(0))
    system = write_system(tmp_path, membership, {"cpu" if membership == IN_V1 else "": files})
    assert q.usable_cores(system) == min(cores or free, free)


def test_threads_default_to_the_affinity():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert q.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("file", "text", "shared"),
    [
        (
            "proc/device-tree/compatible",
            "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0",
            True,
        ),  # a Jetson Orin
        ("sys/class/dmi/id/product_name", "NVIDIA_DGX_Spark\n", True),
        ("sys/class/dmi/id/product_name", "PowerEdge R760\n", False),
        ("elsewhere", "", False),
    ],
)
def test_machines_whose_gpu_shares_the_memory_are_told_by_their_names(tmp_path, file, text, shared):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert q.shares_memory_with_gpu(tmp_path) == shared


@pytest.mark.parametrize("shared", [True, False])
def test_there_the_summary_says_how_much_its_programs_see(tiny, tmp_path, shared):
    told = partial(bool, shared)  # instead of asking this machine
    text = quantize(tiny, tmp_path / "out", constants={"shares_memory_with_gpu": told}).stdout
    free = r"\nGPU: .* programs see \d\S* [MG]B free now, the page cache not counted\n"
    assert len(re.findall(free, text.split("Done in")[1])) == shared
    assert text.count("GPU:") == shared


# --- memory that cannot be had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["planning", "converting"])
def test_memory_that_cannot_be_had_is_one_line_and_exit_code_3(tmp_path, where):
    shapes = {f"m.{i}.weight": (torch.float64, (4096, 4096)) for i in range(6)}
    write_sparse_checkpoint(tmp_path / "in", shapes, shards=1)
    (tmp_path / "in" / "config.json").write_text("{}")
    more = 120_000_000  # bytes; a job has 134 MB
    if where == "planning":
        more, size = 150_000_000, 99_000_000  # two copies of a header
        header = size.to_bytes(8, "little") + b'{"a":' + b" " * (size - 6) + b"}"
        (tmp_path / "in" / "model-00001-of-00001.safetensors").write_bytes(header)
    options = ["--format", "gptq", "--threads", 1]
    result = run_cli(tmp_path / "in", tmp_path / "out", *options, more_memory=more)
    assert_refused(result, "memory", "--threads", exit_code=3)
    assert not list(tmp_path.glob("out/*.unfinished"))


def test_a_pickle_that_finds_no_addresses_is_not_called_damaged(tmp_path):
    save_pickle(tmp_path / "in", {"m.weight": torch.zeros(8192, 8192).bfloat16()})
    result = run_cli(tmp_path / "in", tmp_path / "out", more_memory=90_000_000)
    assert_refused(result, "out of memory", exit_code=3)


def test_a_shard_that_finds_no_addresses_is_not_called_wrong(tmp_path):
    # The library maps it twice.
    tensors = {"table": (torch.float32, (5000, 5000)), "m.weight": (torch.bfloat16, (8, 128))}
    write_sparse_checkpoint(tmp_path / "in", tensors, shards=1)
    quantize(tmp_path / "in", tmp_path / "out")
    result = run_cli(tmp_path / "in", tmp_path / "out", "--verify", more_memory=160_000_000)
    assert_refused(result, "out of memory", exit_code=3)
    assert "WRONG" not in result.stdout


def test_what_the_disk_writes_to_memory_is_not_lost_in_a_fork():
    """The kernel's flags of a buffer say that no child gets it. (proc(5), VmFlags)"""
    buffer = q.allocate(1 << 20)
    place = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    maps = re.split(r"^(?=\w+-\w+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    for each in filter(None, maps):
        start, end = (int(number, 16) for number in each.split()[0].split("-"))
        if start <= place < end:
            assert re.search(r"VmFlags:.* dc\b", each)
            break
    else:
        pytest.fail("not found")
