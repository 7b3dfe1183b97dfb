"""Conversion: the same bytes however it is cut, faults that are made to happen (README: "It continues")."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import save_model, write_checkpoint, write_sparse_checkpoint
from conftest import GB, assert_refused, pause, quantize, run_cli, start_cli, wait_until
from folders import assert_same_tensors, folder_bytes, overwrite_weights, read_tensors
from safetensors.torch import save_file

SMALL_TILES = {
    "TILE_WEIGHTS": 2048,
    "JOB_WEIGHTS": 16384,
}  # makes a run of a small checkpoint take a while
SHARDS = ["--shard_size_gb", 0.0006, "--threads", 2]
FINAL = re.compile(r"model-\d{5}\.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """20 MB of random weights, which become about ten shards."""
    folder = tmp_path_factory.mktemp("model") / "in"
    generator = torch.Generator().manual_seed(4)
    tensors = {
        f"m.{i}.weight": torch.randn(512, 500, generator=generator).bfloat16() for i in range(40)
    }
    write_checkpoint(folder, tensors)
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    (folder / "tokenizer.json").write_text("{}" * 100_000)
    return folder


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """What an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("expected") / "out"
    quantize(model, folder, *SHARDS)
    return folder_bytes(folder)


def start(model, folder, *options, **setting):
    return start_cli(model, folder, *SHARDS, *options, constants=SMALL_TILES, **setting)


def finished_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Final shards by name, with what tells a rewritten file from an untouched one."""
    paths = [path for path in folder.glob("*") if FINAL.fullmatch(path.name)]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def assert_nothing_wrong_is_final(folder: Path, expected: dict[str, bytes]) -> None:
    """Whatever carries a final name is whole, and without everything else there is no index."""
    left = {
        name: data
        for name, data in folder_bytes(folder).items()
        if not name.endswith(".unfinished")
    }
    assert left.items() <= expected.items()
    assert "model.safetensors.index.json" not in left or left == expected


# --- threads and tiles ------------------------------------------------------------------------------------------------


def test_output_is_the_same_whatever_the_number_of_threads(tiny, tmp_path):
    small_tiles = {"TILE_WEIGHTS": 4096, "JOB_WEIGHTS": 8192}
    quantize(tiny, tmp_path / "one", "--threads", 1)
    quantize(tiny, tmp_path / "five", "--threads", 5, constants=small_tiles)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "five")


def test_tiles_and_jobs_cut_a_weight_without_a_seam(tmp_path):
    """Rows longer than a tile, ragged ends and several jobs a weight give the bytes of a single tile."""
    tensors = {
        "wide.weight": torch.randn(3, 1000).bfloat16(),
        "tall.weight": torch.randn(257, 72).bfloat16(),
        "kept.bias": torch.randn(12345).bfloat16(),
    }
    folder = save_model(tmp_path / "in", tensors)
    quantize(folder, tmp_path / "whole", "--group_size", 64)
    constants = {"TILE_WEIGHTS": 256, "JOB_WEIGHTS": 1024, "COPY_BYTES": 100}
    quantize(folder, tmp_path / "cut", "--group_size", 64, constants=constants)
    assert_same_tensors(tmp_path / "cut", tmp_path / "whole")


# --- killed runs ------------------------------------------------------------------------------------------------------


def test_a_run_killed_ten_times_is_byte_identical_and_rewrites_no_finished_shard(
    model, expected, tmp_path
):
    folder, shards = tmp_path / "out", sum(bool(FINAL.fullmatch(name)) for name in expected)
    assert shards >= 8
    kept_by_the_last_run = {}
    for kill in range(10):
        run = start(model, folder)
        if kill % 2:  # between shards; else in the middle of one
            count = max(shards * kill // 10, len(finished_shards(folder)))
            wait_until(lambda count=count: len(finished_shards(folder)) >= count)
        else:
            wait_until(
                lambda: (
                    list(folder.glob("model-*.unfinished"))
                    or len(finished_shards(folder)) == shards
                )
            )
            time.sleep(0.003 * kill)
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait().returncode in (-signal.SIGKILL, 0)
        assert_nothing_wrong_is_final(folder, expected)
        assert kept_by_the_last_run.items() <= finished_shards(folder).items()
        kept_by_the_last_run = finished_shards(folder)
    assert kept_by_the_last_run
    result = quantize(model, folder, *SHARDS)
    if "complete already" not in result.stdout:
        assert (
            f"Resuming:  {len(kept_by_the_last_run)} of {shards} shards finished" in result.stdout
        )
    assert folder_bytes(folder) == expected
    assert kept_by_the_last_run.items() <= finished_shards(folder).items()


def test_a_resumed_run_reads_only_what_is_missing(model, expected, tmp_path):
    quantize(model, tmp_path / "out", *SHARDS)
    (tmp_path / "out" / "model-00002.safetensors").unlink()
    result = quantize(model, tmp_path / "out", *SHARDS)
    total = sum(FINAL.fullmatch(name) is not None for name in expected)
    assert f"Resuming:  {total - 1} of {total} shards finished" in result.stdout
    assert folder_bytes(tmp_path / "out") == expected


def test_a_finished_shard_that_was_cut_is_written_again(model, expected, tmp_path):
    quantize(model, tmp_path / "out", *SHARDS)
    shard = tmp_path / "out" / "model-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    quantize(model, tmp_path / "out", *SHARDS)
    assert folder_bytes(tmp_path / "out") == expected


# --- leftovers of another run -----------------------------------------------------------------------------------------


def leftovers(model, folder):
    """The folder of a killed run."""
    run = start(model, folder)
    # Shards are not always finished in their order, and tests change what the first one comes from.
    first = folder / "model-00001.safetensors"
    wait_until(lambda: first.exists() and list(folder.glob("*.unfinished")))
    os.kill(run.pid, signal.SIGKILL)
    run.wait()


@pytest.mark.parametrize(
    "options",
    [
        ["--group_size", 64],
        ["--exclude", r"m\.1\."],
        ["--shard_size_gb", 0.0007],
        ["--format", "gptq"],
    ],
)
def test_leftovers_of_other_options_are_foreign(model, tmp_path, options):
    source = tmp_path / "in"
    tensors = {f"m.{i}.weight": torch.randn(512, 512).bfloat16() for i in range(12)}
    write_checkpoint(source, tensors)
    (source / "config.json").write_text("{}")
    leftovers(source, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    assert_refused(
        run_cli(source, tmp_path / "out", *SHARDS, *options),
        f"of another run: {options[0]} was ",
        "--overwrite starts afresh",
    )
    assert folder_bytes(tmp_path / "out") == before
    quantize(source, tmp_path / "out", *SHARDS, *options, "--overwrite")
    quantize(source, tmp_path / "expected", *SHARDS, *options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ("times", "the times of source files changed"),
        ("size", "'model-00002-of-00002.safetensors' had other names or sizes"),
        (
            "name",
            "'model-00002-of-00002.safetensors', 'renamed.safetensors' had other names or sizes",
        ),
        ("config", "config.json or another file that is copied changed"),
    ],
)
def test_leftovers_of_a_source_that_changed_since_are_foreign(model, tmp_path, change, differs):
    source = tmp_path / "in"
    shutil.copytree(model, source)
    leftovers(source, tmp_path / "out")
    if change == "times":
        os.utime(source / "model-00001-of-00002.safetensors")
    elif change == "size":
        tensors = {"other.bias": torch.ones(3)}
        save_file(tensors, source / "model-00002-of-00002.safetensors")
        (source / "model.safetensors.index.json").unlink()
    elif change == "name":
        index = source / "model.safetensors.index.json"
        (source / "model-00002-of-00002.safetensors").rename(source / "renamed.safetensors")
        index.write_text(index.read_text().replace("model-00002-of-00002", "renamed"))
    else:
        (source / "config.json").write_text('{"model_type": "other"}')
    assert_refused(run_cli(source, tmp_path / "out", *SHARDS), differs, "--overwrite starts afresh")


def test_leftovers_of_another_format_version_are_foreign(model, tmp_path):
    leftovers(model, tmp_path / "out")
    result = run_cli(model, tmp_path / "out", *SHARDS, constants={"FORMAT_VERSION": 1})
    assert_refused(result, "(format 9), this is", "(format 1): --overwrite starts afresh")


def test_another_version_of_the_program_with_the_same_format_continues(model, expected, tmp_path):
    quantize(model, tmp_path / "out", *SHARDS)
    (tmp_path / "out" / "model-00002.safetensors").unlink()
    result = quantize(model, tmp_path / "out", *SHARDS, constants={"__version__": "9.9.9"})
    assert "finished by an earlier run" in result.stdout
    assert folder_bytes(tmp_path / "out") == expected


def test_a_finished_folder_of_a_source_of_another_time_is_left_as_it_is_and_can_be_verified(
    model, tmp_path
):
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(model, source)
    quantize(source, out, *SHARDS)
    before = folder_bytes(out)
    os.utime(source / "model-00001-of-00002.safetensors")
    assert_refused(
        run_cli(source, out, *SHARDS),
        "the times of source files changed (--verify tells whether",
        "--overwrite starts afresh, or choose another folder",
    )
    assert "no problems found" in quantize(source, out, *SHARDS, "--verify").stdout
    overwrite_weights(source / "model-00001-of-00002.safetensors", "m.0.weight", b"\x12\x34" * 4096)
    assert_refused(run_cli(source, out, *SHARDS, "--verify"), "found 1 problem")
    assert folder_bytes(out) == before
    quantize(source, out, *SHARDS, "--overwrite", "--verify")


def test_every_shard_is_finished_however_often_it_was_synced_before(model, expected, tmp_path):
    quantize(model, tmp_path / "out", *SHARDS, constants={**SMALL_TILES, "SYNC_BYTES": 1})
    assert folder_bytes(tmp_path / "out") == expected


# --- disk -------------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_stops_the_run_and_the_same_command_continues(model, expected, tmp_path):
    result = run_cli(model, tmp_path / "out", *SHARDS, largest_file=400_000)
    assert_refused(
        result, ".unfinished: File too large", "make room, then the same command continues"
    )
    assert not list((tmp_path / "out").glob("*.unfinished"))
    assert_nothing_wrong_is_final(tmp_path / "out", expected)
    quantize(model, tmp_path / "out", *SHARDS)
    assert folder_bytes(tmp_path / "out") == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True
    )
    if mount.returncode:
        pytest.skip(
            "needs to mount a tmpfs; the test before this one fills no disk but fails at the same place"
        )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_meanwhile_stops_the_run_and_the_same_command_continues(
    model, expected, small_disk
):
    folder, filler = small_disk / "out", small_disk / "filler"
    run = start(model, folder)
    wait_until(lambda: finished_shards(folder))
    pause(run.pid)
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(1 << 16))
    os.kill(run.pid, signal.SIGCONT)
    assert_refused(
        run.wait(),
        str(folder),
        "No space left on device",
        "make room, then the same command continues",
    )
    assert not list(folder.glob("*.unfinished"))
    assert_nothing_wrong_is_final(folder, expected)
    filler.unlink()
    assert "Resuming:" in quantize(model, folder, *SHARDS).stdout
    assert folder_bytes(folder) == expected


def test_an_unfinished_shard_that_somebody_removes_is_an_error_and_no_shard_of_zeros(
    model, expected, tmp_path
):
    folder = tmp_path / "out"
    run = start(model, folder)
    wait_until(lambda: list(folder.glob("model-*.unfinished")))
    pause(run.pid)
    removed = list(folder.glob("model-*.unfinished"))
    for path in removed:
        path.unlink()
    os.kill(run.pid, signal.SIGCONT)
    assert_refused(run.wait(), "model-", "No such file or directory")
    assert_nothing_wrong_is_final(folder, expected)
    quantize(model, folder, *SHARDS)
    assert folder_bytes(folder) == expected


def test_more_shards_than_descriptors_do_not_use_up_the_descriptors(tmp_path):
    tensors = {f"m.{i}.weight": torch.ones(8, 128).bfloat16() for i in range(60)}
    source = save_model(tmp_path / "in", tensors)
    quantize(source, tmp_path / "out", "--shard_size_gb", 1e-6, open_files=60)
    assert len(finished_shards(tmp_path / "out")) > 100


def test_more_files_than_descriptors_are_converted_verified_and_restored(tmp_path):
    tensors = {f"m.{i}.weight": torch.randn(8, 128).bfloat16() for i in range(100)}
    write_checkpoint(tmp_path / "in", tensors, shards=100)
    small = ["--shard_size_gb", 1e-6]
    setting = {"open_files": 60}
    quantize(tmp_path / "in", tmp_path / "out", *small, **setting)
    assert len(finished_shards(tmp_path / "out")) > 100
    quantize(tmp_path / "in", tmp_path / "out", "--verify", **setting)
    quantize(tmp_path / "out", tmp_path / "back", "--restore", *small, **setting)
    assert read_tensors(tmp_path / "back").keys() == tensors.keys()


def test_more_threads_than_shards_may_wait_do_not_wait_for_one_another(tmp_path):
    source = save_model(
        tmp_path / "in", {f"m.{i}.weight": torch.ones(8, 128).bfloat16() for i in range(60)}
    )
    constants = {"MAX_WAITING_SHARDS": 8}
    quantize(
        source, tmp_path / "out", "--threads", 20, "--shard_size_gb", 1e-6, constants=constants
    )
    assert len(finished_shards(tmp_path / "out")) > 100


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_guard_trips_half_way_when_the_machine_really_runs_short(model, expected, tmp_path):
    available, hog = psutil.virtual_memory().available, 2 * GB
    if available < 4 * GB:
        pytest.skip("needs 4 GB of available memory to take away")
    run = start(model, tmp_path / "out", "--min_free_gb", (available - hog / 2) / GB)
    wait_until(lambda: finished_shards(tmp_path / "out"))
    pause(run.pid)
    held = bytearray(hog)
    held[::4096] = b"x" * len(held[::4096])  # touch every page
    os.kill(run.pid, signal.SIGCONT)
    result = run.wait()
    del held
    assert_refused(
        result,
        "of memory available, --min_free_gb asks for",
        "the same command continues",
        exit_code=3,
    )
    assert not list((tmp_path / "out").glob("*.unfinished"))
    assert_nothing_wrong_is_final(tmp_path / "out", expected)
    assert "Resuming:" in quantize(model, tmp_path / "out", *SHARDS).stdout
    assert folder_bytes(tmp_path / "out") == expected


# --- sources that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["overwritten", "replaced", "truncated"])
def test_a_source_that_changes_while_it_is_read_is_an_error(model, tmp_path, change):
    source, folder = tmp_path / "in", tmp_path / "out"
    shutil.copytree(model, source)
    run = start(source, folder)
    wait_until(lambda: finished_shards(folder))
    pause(run.pid)
    before = set(finished_shards(folder))
    shard = source / "model-00002-of-00002.safetensors"
    if change == "overwritten":
        with open(shard, "r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(b"\x12\x34" * 250)
    elif change == "replaced":
        shutil.copy(shard, source / "copy")
        os.replace(source / "copy", shard)
    else:
        os.truncate(shard, 5000)
    os.kill(run.pid, signal.SIGCONT)
    assert_refused(
        run.wait(), shard.name, "changed while it was read", "give the same command again"
    )
    assert not (folder / "model.safetensors.index.json").exists()
    assert len(set(finished_shards(folder)) - before) <= 1  # one may have been past its check
    again = run_cli(source, folder, *SHARDS)
    if change == "truncated":
        assert_refused(again, shard.name)
    else:
        assert_refused(again, "the times of source files changed", "--overwrite starts afresh")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_a_file_that_changes_before_it_is_copied_is_an_error(model, expected, tmp_path, overwrite):
    source, folder = tmp_path / "in", tmp_path / "out"
    shutil.copytree(model, source)
    run = start(source, folder, *overwrite)
    wait_until(lambda: list(folder.glob("model-*")))
    (source / "tokenizer.json").write_text("{}" * 100_001)
    advice = "the same command starts afresh" if overwrite else "put it back as it was"
    assert_refused(run.wait(), f"{source / 'tokenizer.json'} changed since the plan", advice)
    assert not (folder / "tokenizer.json").exists()
    assert not (folder / "model.safetensors.index.json").exists()
    if not overwrite:
        shutil.copy(model / "tokenizer.json", source)
    result = quantize(source, folder, *SHARDS, *overwrite)
    if not overwrite:
        assert "Resuming:" in result.stdout
        assert folder_bytes(folder) == expected


def add_a_file(folder):
    (folder / "added.json").write_text("{}")
    return "added.json was added", "remove it"


def remove_the_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json was removed", "put it back"


def remove_the_config(folder):
    (folder / "config.json").unlink()
    return "config.json was removed", "put it back"


def edit_the_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"added": 1, ', 1))
    return "config.json changed", "put it back as it was"


@pytest.mark.parametrize(
    "change", [add_a_file, remove_the_tokenizer, edit_the_config, remove_the_config]
)
def test_a_folder_whose_files_change_meanwhile_is_not_finished_as_another_than_the_next_run_plans(
    model, expected, tmp_path, change
):
    source, folder = tmp_path / "in", tmp_path / "out"
    shutil.copytree(model, source)
    run = start(source, folder)
    wait_until(lambda: list(folder.glob("model-*")))
    problem, undo = change(source)
    advice = f"since the plan was made: {undo}, or give --overwrite to start afresh"
    assert_refused(run.wait(), f"{source}/{problem} {advice}")
    assert not (folder / "model.safetensors.index.json").exists()
    (source / "added.json").unlink(missing_ok=True)
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(model / name, source)
    assert "Resuming:" in quantize(source, folder, *SHARDS).stdout
    assert folder_bytes(folder) == expected


def test_weights_that_appear_before_a_run_is_done_are_an_error(tmp_path):
    shapes = {f"m.{i}.weight": (torch.bfloat16, (4096, 4096)) for i in range(4)}
    write_sparse_checkpoint(tmp_path / "in", shapes, shards=1)
    (tmp_path / "in" / "model.safetensors.index.json").unlink()
    weights = next((tmp_path / "in").glob("*.safetensors")).rename(
        tmp_path / "in" / "a.safetensors"
    )
    run = start(tmp_path / "in", tmp_path / "out")
    wait_until(lambda: list((tmp_path / "out").glob("model-*")))
    write_checkpoint(tmp_path / "more", {"n.weight": torch.ones(8, 128)}, shards=1)
    next((tmp_path / "more").glob("*.safetensors")).rename(weights.with_name("b.safetensors"))
    assert_refused(run.wait(), "b.safetensors was added since the plan was made: remove it")


def test_a_pickle_that_is_truncated_while_it_is_read_is_an_error(model, tmp_path):
    source, folder = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    torch.save(read_tensors(model), source / "pytorch_model.bin")
    run = start(source, folder)
    wait_until(lambda: finished_shards(folder))
    os.truncate(source / "pytorch_model.bin", 5000)
    assert_refused(
        run.wait(), "pytorch_model.bin changed while it was read", "give the same command again"
    )
    assert not (folder / "model.safetensors.index.json").exists()
