"""Output folder: what may be there before, and what is at the end (README: "Every format's folder holds")."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import stat
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from checkpoints import random, save_model, write_sparse_checkpoint
from conftest import (
    AS_NOBODY,
    assert_refused,
    command,
    quantize,
    refuse,
    run_cli,
    start_cli,
    wait_until,
)
from folders import folder_bytes, read_header, read_json, read_tensors
from safetensors import safe_open
from safetensors.torch import save_file

import quantize_int4 as q

# --- what may be there before -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "out", "a/b"])
def test_an_output_folder_that_is_or_lies_in_the_input_folder_is_refused(model, where):
    before = folder_bytes(model)
    assert_refused(run_cli(model, model / where), "input folder")
    assert folder_bytes(model) == before


def test_an_output_folder_reached_through_a_link_into_the_input_is_refused(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    assert_refused(run_cli(model, tmp_path / "link" / "out"), "inside the input folder")


def test_an_output_folder_that_is_not_writable_is_an_error_that_names_it(open_folder):
    (open_folder / "out").mkdir(mode=0o555)
    result = run_cli(open_folder / "in", open_folder / "out", **AS_NOBODY)
    assert_refused(
        result, f"output folder {open_folder / 'out'}: Permission denied", "change its owner"
    )
    assert result.stdout == ""  # before the plan
    assert "unfinished" not in result.stderr
    assert not list((open_folder / "out").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("option", ["--verify", "--overwrite", "--dry_run"])
def test_a_finished_folder_that_another_user_may_not_read_is_not_called_foreign(
    open_folder, option
):
    source, output = open_folder / "in", open_folder / "out"
    quantize(source, output)
    shard = output / "model-00001.safetensors"
    os.chmod(shard, 0o600)
    result = run_cli(source, output, option, **AS_NOBODY)
    assert_refused(result, f"{shard}: Permission denied", f"chmod a+r {shard}")


def read_only_mounts():
    """List folders on mounts that the system has mounted read-only, where there are some."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [
        Path(line[1]) for line in lines if "ro" in line[3].split(",") and Path(line[1]).is_dir()
    ]


@pytest.mark.skipif(not read_only_mounts(), reason="needs a folder that is mounted read-only")
def test_a_read_only_mount_is_named_as_one(model):
    mount = read_only_mounts()[0]
    words = "is on a read-only mount: choose another folder, or mount it writable"
    assert_refused(run_cli(model, mount / "out"), f"output folder {mount / 'out'}", words)
    plan = quantize(model, mount / "out", "--dry_run").stdout
    assert f"WARNING:   the run itself would stop: {mount} {words}" in plan


def test_a_write_that_a_read_only_mount_refuses_is_explained():
    error = OSError(errno.EROFS, "Read-only file system", "/somewhere/out")
    assert q.describe_os_error(error).startswith("/somewhere/out: is on a read-only mount: ")


def test_a_dry_run_says_when_the_run_itself_would_stop(open_folder):
    (open_folder / "out").mkdir(mode=0o555)
    source, output = open_folder / "in", open_folder / "out"
    plan = quantize(source, output, "--dry_run", "--min_free_gb", 10**6, **AS_NOBODY).stdout
    stops = [line for line in plan.splitlines() if "the run itself would stop" in line]
    assert len(stops) == 2
    assert "Permission denied" in stops[0]
    assert "of memory left at the peak, --min_free_gb asks for 1,000 TB" in stops[1]
    assert "Dry run: nothing was written." in plan


def test_a_dry_run_says_when_the_disk_is_too_small(tmp_path):
    tensors = {"m.weight": (torch.float32, (8, 128)), "m.bias": (torch.float32, (10**12,))}
    write_sparse_checkpoint(tmp_path / "in", tensors, shards=1)
    plan = quantize(tmp_path / "in", tmp_path / "out", "--dry_run").stdout
    assert "the run itself would stop: 4.00 TB to write, but the disk of" in plan


def test_a_dry_run_of_what_can_be_done_warns_of_nothing(model, tmp_path):
    assert "would stop" not in quantize(model, tmp_path / "out", "--dry_run").stdout
    quantize(model, tmp_path / "out")
    options = ["--dry_run", "--min_free_gb", 10**6]
    assert "would stop" not in quantize(model, tmp_path / "out", *options).stdout  # it is complete


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_log_that_would_be_copied_is_refused_before_anything_is_written(model, tmp_path, stream):
    log = model / "log.txt"
    with open(log, "w") as file:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: file}
        result = subprocess.run(command(model, tmp_path / "out"), **pipes, text=True)
    assert result.returncode == 1
    problem = f"error: {log} takes what this run prints, and would be copied: remove it"
    assert problem in (result.stderr or log.read_text())
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path):
    write_sparse_checkpoint(
        tmp_path / "in",
        {"m.weight": (torch.float32, (8, 128)), "m.bias": (torch.float32, (10**12,))},
        shards=1,
    )
    refuse(tmp_path / "in", tmp_path / "out", "4.00 TB to write", "free")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize(
    "name", ["notes.txt", "config.json", "model-00001.safetensors", "model-00001-of-2.safetensors"]
)
def test_somebody_elses_files_in_the_output_folder_are_refused_always(
    model, tmp_path, name, overwrite
):
    (tmp_path / "out").mkdir()
    save_file({"other": torch.ones(3)}, tmp_path / "out" / name)
    refuse(model, tmp_path / "out", name, "not written by this program", options=overwrite)


def test_a_second_run_into_the_same_folder_at_the_same_time_is_refused(large, tmp_path):
    first = start_cli(large, tmp_path / "out")
    wait_until(lambda: list((tmp_path / "out").glob("*.unfinished")))
    os.kill(first.pid, signal.SIGSTOP)
    assert_refused(run_cli(large, tmp_path / "out"), "another run is writing")
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait().returncode == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_a_folder_that_changes_between_the_plan_and_the_run_is_refused(tiny, tmp_path):
    """The run is held while it prints the plan, since nobody reads the pipe that it fills."""
    shutil.copytree(tiny, tmp_path / "in")
    for number in range(100):
        (tmp_path / "in" / f"{number}_{'name of a file' * 10}").touch()
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    arguments = command(tmp_path / "in", tmp_path / "out", "--overwrite")
    with (
        subprocess.Popen(arguments, stdout=write, stderr=subprocess.PIPE, text=True) as run,
        open(read) as plan,
    ):
        os.close(write)
        select.select([plan], [], [])
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.docx").write_text("years of work")
        printed, errors = plan.read(), run.stderr.read()
    assert_refused(subprocess.CompletedProcess([], run.returncode, printed, errors), "thesis.docx")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.docx"]


# --- what an earlier run left, and --overwrite ------------------------------------------------------------------------


def test_the_same_command_again_finds_the_folder_complete(model, tmp_path):
    quantize(model, tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "complete already" in quantize(model, tmp_path / "out").stdout
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_a_finished_run_with_other_options_needs_overwrite(model, tmp_path):
    quantize(model, tmp_path / "out")
    refuse(
        model,
        tmp_path / "out",
        "--overwrite",
        "--group_size was 128, is 64",
        options=["--group_size", 64],
    )
    quantize(model, tmp_path / "out", "--group_size", 64, "--overwrite")
    quantize(model, tmp_path / "expected", "--group_size", 64)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")


def test_another_model_into_a_finished_folder_is_told_by_its_input_and_not_by_what_follows(
    tmp_path,
):
    options = ["--format", "compressed-tensors"]
    entries = {"model_type": "llama"}
    first = save_model(tmp_path / "first", {"m.0.up_proj.weight": random(8, 256)}, **entries)
    second = save_model(tmp_path / "second", {"m.0.up_proj.weight": random(8, 192)}, **entries)
    quantize(first, tmp_path / "out", *options)
    result = run_cli(second, tmp_path / "out", *options)
    assert_refused(result, "the input was another, 'model.safetensors' had other names or sizes")
    assert "group_size" not in result.stderr
    result = run_cli(second, tmp_path / "out", *options, "--scale", "absmax")
    assert_refused(result, "the input was another", "--scale was mse, is absmax")
    quantize(second, tmp_path / "out", *options, "--overwrite")


def test_what_was_asked_otherwise_is_said_as_it_is_given(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    patterns, embeddings = ["--exclude", "q_proj", "--exclude", "k_proj"], "--quantize_embeddings"
    refused = run_cli(tiny, tmp_path / "out", *patterns, embeddings)
    changed = "--exclude was not given, is q_proj --exclude k_proj, --quantize_embeddings was not given, is given:"
    assert_refused(refused, changed)
    quantize(tiny, tmp_path / "out", *patterns, embeddings, "--overwrite")
    changed = "--exclude was q_proj --exclude k_proj, is not given, --quantize_embeddings was given, is not given:"
    assert_refused(run_cli(tiny, tmp_path / "out"), changed)


def test_another_format_in_the_same_folder_needs_overwrite_and_leaves_nothing_of_the_first(
    tiny, tmp_path
):
    quantize(tiny, tmp_path / "out", "--format", "gptq", "--group_size", 64)
    options = ["--format", "compressed-tensors", "--group_size", 64]
    assert_refused(run_cli(tiny, tmp_path / "out", *options), "--overwrite")
    quantize(tiny, tmp_path / "out", *options, "--overwrite")
    quantize(tiny, tmp_path / "expected", *options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")


def test_overwrite_starts_afresh_even_with_the_same_options(model, tmp_path):
    quantize(model, tmp_path / "out")
    shard = tmp_path / "out" / "model-00001.safetensors"
    inode = shard.stat().st_ino
    quantize(model, tmp_path / "out", "--overwrite")
    assert shard.stat().st_ino != inode or shard.stat().st_ctime > (tmp_path / "in").stat().st_ctime


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


# --- shards and index -------------------------------------------------------------------------------------------------


def test_kept_tensors_are_bit_for_bit_the_same_in_their_own_dtype(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    source, output = read_tensors(tiny), read_tensors(tmp_path / "out")
    kept = source.keys() & output.keys()
    assert len(kept) == 14
    for name in kept:
        assert output[name].dtype == source[name].dtype
        assert torch.equal(output[name].view(torch.uint8), source[name].view(torch.uint8)), name
    assert source["backbone.layers.1.mixer.gate.e_score_correction_bias"].dtype == torch.float32


def test_every_dtype_of_the_format_can_be_kept(tmp_path):
    floats = {"f64": torch.float64, "f16": torch.float16, "c64": torch.complex64}
    integers = {"i64": torch.int64, "u8": torch.uint8, "bool": torch.bool, "u16": torch.uint16}
    tensors = {name: torch.arange(5).to(dtype) for name, dtype in (floats | integers).items()}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "nan": torch.tensor([float("nan"), 1]),
    }
    quantize(
        save_model(tmp_path / "in", tensors | {"m.weight": torch.ones(8, 128)}), tmp_path / "out"
    )
    output = read_tensors(tmp_path / "out")
    assert output.keys() == tensors.keys() | {"m.qweight", "m.scales"}
    for name, tensor in tensors.items():
        assert output[name].shape == tensor.shape
        assert output[name].numpy().tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("shard_size", [150_000, 300_000, 1_000_000])
def test_shards_stay_under_the_limit_unless_one_tensor_is_larger(tiny, tmp_path, shard_size):
    quantize(tiny, tmp_path / "out", "--shard_size_gb", shard_size / 1e9)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i + 1:05}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 1
    for path in shards:
        with safe_open(path, framework="pt") as file:
            assert path.stat().st_size <= shard_size or len(file.keys()) == 1


def test_many_small_tensors_do_not_push_a_shard_over_its_limit(tmp_path):
    tensors = {f"a.rather.long.name.of.a.tensor.{i}.bias": torch.ones(2) for i in range(500)}
    tensors["m.weight"] = torch.ones(8, 128)
    quantize(
        save_model(tmp_path / "in", tensors), tmp_path / "out", "--shard_size_gb", 20_000 / 1e9
    )
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert max(sizes) <= 20_000
    assert len(sizes) < 6


def test_words_and_scales_of_a_weight_share_a_shard(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", "--shard_size_gb", 3e-4)
    weight_map = read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert len(set(weight_map.values())) > 2
    for name, shard in weight_map.items():
        if name.endswith(".qweight"):
            assert weight_map[name.replace(".qweight", ".scales")] == shard


def test_the_index_names_every_tensor_with_its_shard_and_the_total_size(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", "--shard_size_gb", 3e-4)
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    found, total = {}, 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            found |= dict.fromkeys(file.keys(), path.name)
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == total


def test_every_tensor_is_aligned_to_its_element_size(tmp_path):
    tensors = {
        "odd.bias": torch.ones(3).bfloat16(),
        "m.weight": torch.ones(3, 128),
        "i.steps": torch.ones(1).long(),
    }
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out")
    header, start = read_header(tmp_path / "out" / "model-00001.safetensors")
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert (start + header[name]["data_offsets"][0]) % tensor.itemsize == 0, name


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_mount_that_syncs_no_folders_is_no_error_and_a_failing_disk_is(
    tmp_path, monkeypatch, number
):
    def fail(_fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=tmp_path.name) if number == errno.EIO else nullcontext():
        q.sync_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EIO, errno.ENOSPC])
def test_an_error_that_only_the_sync_of_a_part_of_a_file_reports_is_one(
    tmp_path, monkeypatch, number
):
    def fail(*_) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(q, "SYNC_FILE_RANGE", fail)
    expected = nullcontext()
    if number != errno.ENOSYS:
        expected = pytest.raises(OSError, match=os.strerror(number))
    with open(tmp_path / "file", "wb") as file, expected:
        file.write(b"1")
        file.flush()
        q.sync_file(file.fileno())


# --- other files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth"])
def test_training_state_is_called_so(model, tmp_path, name):
    (model / name).write_text("x")
    assert f"{name} (training state)" in quantize(model, tmp_path / "out").stdout


def test_the_config_of_an_adapter_is_not_copied_which_a_note_says(model, tmp_path):
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    printed = quantize(model, tmp_path / "out", "--verify").stdout
    assert (
        "Note:      adapter_config.json is not copied: loaders would take the folder for" in printed
    )
    assert "adapter_config.json (of an adapter)" in printed
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(tiny, tmp_path, umask, mode):
    os.chmod(tiny / "config.json", 0o600)  # of the source, which does not count
    result = run_cli(tiny, tmp_path / "out", umask=umask)
    assert result.returncode == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {mode}, modes


MODEL_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "modeling_nemotron_h.py", "configuration_nemotron_h.py", "preprocessor_config.json", "README.md", "LICENSE",
]  # fmt: skip

OTHER_FILES = [
    "pytorch_model.bin", "consolidated.00.pth", "model.pt", "model-Q4.gguf", "model.onnx", "tf_model.h5",
    "flax_model.msgpack", "pytorch_model.bin.index.json", "optimizer.bin", "optimizer.pt", "scheduler.pt",
    "rng_state_0.pth", "training_args.bin", "trainer_state.json", ".gitattributes", "adapter_model.safetensors",
]  # fmt: skip


def test_the_models_files_are_copied_and_the_rest_is_named_in_the_plan(tmp_path):
    folder = save_model(tmp_path / "in", {"m.weight": torch.ones(2, 128)})
    for name in MODEL_FILES + OTHER_FILES:
        (folder / name).write_text(json.dumps({"file": name}))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "global_step10").mkdir()
    result = quantize(folder, tmp_path / "out")
    for name in MODEL_FILES:
        written = (tmp_path / "out" / name).read_bytes()
        assert (
            written == (folder / name).read_bytes() or name == "config.json"
        )  # which says what int4 is
    own = {"model-00001.safetensors", "model.safetensors.index.json", "quantize_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == own | set(MODEL_FILES)
    left_out = next(line for line in result.stdout.splitlines() if line.startswith("Left out:"))
    for name in [*OTHER_FILES, "global_step10/"]:
        assert name in left_out
