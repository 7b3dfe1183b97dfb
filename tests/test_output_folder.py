"""What the output folder holds: tensors, shards, index, copied files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import threading
import time

import pytest
import torch
from checkpoints import write_sparse_checkpoint
from conftest import assert_refused, command, folder_bytes, quantize, read_tensors, refuse, run_cli, save_model
from safetensors import safe_open
from safetensors.torch import save_file

import quantize_int4 as q


def read_json(path):
    return json.loads(path.read_text())


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
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "nan": torch.tensor([float("nan"), 1])}
    quantize(save_model(tmp_path / "in", tensors | {"m.weight": torch.ones(8, 128)}), tmp_path / "out")
    output = read_tensors(tmp_path / "out")
    assert output.keys() == tensors.keys() | {"m.qweight", "m.scales"}
    for name, tensor in tensors.items():
        assert output[name].shape == tensor.shape
        assert output[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_names_shapes_and_dtypes_are_those_of_the_layout(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    output = read_tensors(tmp_path / "out")
    down = "backbone.layers.1.mixer.experts.0.down_proj"  # 256 x 192, padded to 256 columns
    assert (output[f"{down}.qweight"].dtype, output[f"{down}.qweight"].shape) == (torch.int32, (256, 32))
    assert (output[f"{down}.scales"].dtype, output[f"{down}.scales"].shape) == (torch.float16, (256, 2))
    assert f"{down}.weight" not in output
    up = "backbone.layers.1.mixer.experts.0.up_proj"
    assert (output[f"{up}.qweight"].shape, output[f"{up}.scales"].shape) == ((192, 32), (192, 2))


def test_quantize_config_describes_the_layout_and_lists_padded_weights_with_their_true_shape(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    config = read_json(tmp_path / "out" / "quantize_config.json")
    assert (config["format"], config["bits"], config["group_size"], config["symmetric"]) == ("int4", 4, 128, True)
    assert "gptq" not in json.dumps(config).lower()
    padded = {f"backbone.layers.{i}.mixer.experts.{j}.down_proj.weight": [256, 192] for i in (1, 3) for j in range(4)}
    assert config["padded_weights"] == padded
    assert config["quantized_weights"] == 29
    kept = read_tensors(tmp_path / "out").keys() & read_tensors(tiny).keys()
    assert sorted(config["kept_weights"]) == sorted(kept)


@pytest.mark.parametrize("shard_size", [150_000, 300_000, 1_000_000])
def test_shards_stay_under_the_limit_unless_one_tensor_is_larger(tiny, tmp_path, shard_size):
    quantize(tiny, tmp_path / "out", "--shard_size_gb", shard_size / 1e9)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [path.name for path in shards] == [f"model-{i + 1:05}.safetensors" for i in range(len(shards))]
    assert len(shards) > 1
    for path in shards:
        with safe_open(path, framework="pt") as file:
            assert path.stat().st_size <= shard_size or len(file.keys()) == 1


def test_many_small_tensors_do_not_push_a_shard_over_its_limit(tmp_path):
    tensors = {f"a.rather.long.name.of.a.tensor.{i}.bias": torch.ones(2) for i in range(500)}
    tensors["m.weight"] = torch.ones(8, 128)
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out", "--shard_size_gb", 20_000 / 1e9)
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
    tensors = {"odd.bias": torch.ones(3).bfloat16(), "m.weight": torch.ones(3, 128), "i.steps": torch.ones(1).long()}
    quantize(save_model(tmp_path / "in", tensors), tmp_path / "out")
    for info in q.read_tensor_infos(tmp_path / "out" / "model-00001.safetensors").values():
        assert info.offset % (q.DTYPE_BITS[info.dtype] // 8) == 0, info


def test_a_shard_is_synced_while_it_is_still_being_written(tiny, tmp_path, monkeypatch):
    """So that little is left to wait for at its end. Run in this process: the disk's work leaves no other trace."""
    count, fsync, early = q.Conversion._count, os.fsync, threading.Event()

    def count_and_wait(conversion, job):
        count(conversion, job)
        assert early.wait(60)

    def note(fd):
        fsync(fd)
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".unfinished"):
            early.set()

    monkeypatch.setattr(q.Conversion, "_count", count_and_wait)  # the first job waits for the sync
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(q, "SYNC_BYTES", 1)
    monkeypatch.setattr(q, "stop_on_signals", lambda: None)
    assert q.main(command(tiny, tmp_path / "out", "--threads", 1)[2:]) == 0
    quantize(tiny, tmp_path / "out", "--verify")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(tiny, tmp_path, umask, mode):
    os.chmod(tiny / "config.json", 0o600)  # of the source, which does not count
    result = run_cli(tiny, tmp_path / "out", umask=umask)
    assert result.returncode == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {mode}, modes


def test_output_is_the_same_whatever_the_number_of_threads(tiny, tmp_path):
    small_tiles = {"TILE_WEIGHTS": 4096, "JOB_WEIGHTS": 8192}
    quantize(tiny, tmp_path / "one", "--threads", 1)
    quantize(tiny, tmp_path / "five", "--threads", 5, constants=small_tiles)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "five")


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
        assert written == (folder / name).read_bytes() or name == "config.json"  # which says what int4 is
    own = {"model-00001.safetensors", "model.safetensors.index.json", "quantize_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == own | set(MODEL_FILES)
    left_out = next(line for line in result.stdout.splitlines() if line.startswith("Left out:"))
    for name in [*OTHER_FILES, "global_step10/"]:
        assert name in left_out


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """0.8 GB of zeros: long enough a run to send signals to."""
    folder = tmp_path_factory.mktemp("large")
    write_sparse_checkpoint(folder, {f"m.{i}.weight": (torch.bfloat16, (4096, 4096)) for i in range(24)}, shards=3)
    return folder


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


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path):
    write_sparse_checkpoint(
        tmp_path / "in", {"m.weight": (torch.float32, (8, 128)), "m.bias": (torch.float32, (10**12,))}, shards=1
    )
    refuse(tmp_path / "in", tmp_path / "out", "4.00 TB to write", "free")


def test_a_second_run_into_the_same_folder_at_the_same_time_is_refused(large, tmp_path):
    with subprocess.Popen(command(large, tmp_path / "out"), stdout=subprocess.DEVNULL) as first:
        wait_for_unfinished(tmp_path / "out")
        first.send_signal(signal.SIGSTOP)
        assert_refused(run_cli(large, tmp_path / "out"), "another run is writing")
        first.send_signal(signal.SIGCONT)
    assert first.returncode == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def wait_for_unfinished(folder):
    deadline = time.monotonic() + 30
    while not list(folder.glob("*.unfinished")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
