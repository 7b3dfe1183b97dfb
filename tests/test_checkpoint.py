"""What is in the input folder: files of tensors, an index, and what is refused about them."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import write_checkpoint, write_sparse_checkpoint
from conftest import (
    WEIGHT,
    assert_refused,
    command,
    folder_bytes,
    quantize,
    read_tensors,
    refuse,
    run_cli,
    save_model,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from small_models import layers, random, save, save_pickle
from test_memory import GB

import quantize_int4 as q


def test_a_missing_input_folder_is_refused(tmp_path):
    refuse(tmp_path / "nowhere", tmp_path / "out", "nowhere", "no such folder")


def test_a_file_as_input_folder_is_refused(model, tmp_path):
    refuse(model / "model.safetensors", tmp_path / "out", "is a file")


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    refuse(tmp_path / "in", tmp_path / "out", "no *.safetensors")


def test_a_lora_adapter_alone_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_file(WEIGHT, tmp_path / "in" / "adapter_model.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text("{}")
    refuse(tmp_path / "in", tmp_path / "out", "LoRA adapter", "merge")


def indexed(tmp_path, weight_map):
    folder = save_model(tmp_path / "in", WEIGHT)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    folder = indexed(tmp_path, {"m.weight": "model-00002-of-00002.safetensors"})
    refuse(folder, tmp_path / "out", "model-00002-of-00002.safetensors", "missing")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"])
def test_a_missing_part_is_refused_without_an_index_too(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    if name.endswith(".bin"):
        torch.save({"m.weight": torch.ones(8, 128)}, folder / "pytorch_model-00002-of-00002.bin")
    else:
        save_file({"m.weight": torch.ones(8, 128)}, folder / "model-00001-of-00002.safetensors")
    refuse(folder, tmp_path / "out", repr(name), "missing", "copy it again")


def test_files_without_a_tensor_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({}, tmp_path / "in" / "model.safetensors")
    refuse(tmp_path / "in", tmp_path / "out", "'model.safetensors' hold no tensors")


def test_a_pipe_among_the_files_does_not_hang_the_run(model, tmp_path):
    os.mkfifo(model / "vocab.json")
    assert "vocab.json (not a regular file)" in quantize(model, tmp_path / "out").stdout
    os.mkfifo(tmp_path / "out" / "pipe")
    assert_refused(run_cli(model, tmp_path / "out"), "'pipe', not written by this program")
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    assert_refused(run_cli(model, tmp_path / "other"), "model.safetensors is not a regular file")


def test_a_tensor_missing_from_its_shard_is_refused(tmp_path):
    folder = indexed(tmp_path, {"m.weight": "model.safetensors", "n.weight": "model.safetensors"})
    refuse(folder, tmp_path / "out", "'n.weight'", "model.safetensors", "does not hold it")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_that_points_outside_the_folder_is_refused(tmp_path, file):
    refuse(indexed(tmp_path, {"m.weight": file}), tmp_path / "out", repr(file), "no file of this folder")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_broken_index_is_refused(model, tmp_path, text):
    (model / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    refuse(model, tmp_path / "out", "model.safetensors.index.json")


def test_a_tensor_in_two_files_without_an_index_is_refused(model, tmp_path):
    (model / "model.safetensors").rename(model / "one.safetensors")
    save_file(WEIGHT, model / "other.safetensors")
    refuse(model, tmp_path / "out", "'m.weight'", "other.safetensors", "one.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 50, 300, -1])
def test_a_truncated_shard_is_refused(model, tmp_path, keep):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:keep])
    refuse(model, tmp_path / "out", "model.safetensors", "not a whole safetensors file")


def test_a_file_that_is_no_safetensors_is_refused(model, tmp_path):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    refuse(model, tmp_path / "out", "not a whole safetensors file")


def test_a_name_given_twice_in_a_header_is_refused(model, tmp_path):
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    refuse(model, tmp_path / "out", "names 'a' twice")


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**65) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "I64", "X"]) | HEADERS,
        "shape": st.lists(st.integers(0, 3), max_size=3) | HEADERS,
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)) | HEADERS,
    }
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=2), ENTRIES, max_size=3) | HEADERS, size=st.integers(0, 20))
def test_headers_are_accepted_or_refused_as_the_safetensors_library_does(tmp_path, header, size):
    path, data = tmp_path / "model.safetensors", json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(size))
    try:
        with safe_open(path, framework="pt") as file:
            expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        with pytest.raises(q.QuantizeError, match="not a whole safetensors file"):
            q.read_tensor_infos(path)
    else:
        assert {name: info.shape for name, info in q.read_tensor_infos(path).items()} == expected


def test_a_single_file_larger_than_the_machines_memory_is_read(tmp_path):
    rows = 2 * psutil.virtual_memory().total // 256
    write_sparse_checkpoint(tmp_path / "in", {"m.weight": (torch.bfloat16, (rows, 128))}, shards=1)
    assert "quantized to 4 bits" in quantize(tmp_path / "in", tmp_path / "out", "--dry_run").stdout


@pytest.mark.parametrize("place", range(20))
def test_a_shard_truncated_anywhere_is_refused(tiny, tmp_path, place):
    source = tmp_path / "in"
    shutil.copytree(tiny, source)
    shard = source / "model-00001-of-00002.safetensors"
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    places = [header * i // 9 for i in range(10)] + [
        header + (shard.stat().st_size - 1 - header) * i // 9 for i in range(10)
    ]
    os.truncate(shard, places[place])
    assert_refused(run_cli(source, tmp_path / "out"), shard.name, "not a whole safetensors file")
    assert not (tmp_path / "out").exists()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_refused_or_changes_nothing(tmp_path, data):
    source = tmp_path / "in"
    if not source.exists():
        write_checkpoint(source, {f"m.{i}.weight": torch.ones(24, 128 + 8 * i).bfloat16() for i in range(4)})
    shard = source / "model-00001-of-00002.safetensors"
    whole = (tmp_path / "whole").read_bytes() if (tmp_path / "whole").exists() else shard.read_bytes()
    (tmp_path / "whole").write_bytes(whole)
    shard.write_bytes(whole)
    infos = q.Checkpoint.open(source).tensors
    header = 8 + int.from_bytes(whole[:8], "little")
    start = data.draw(st.integers(0, header - 1))
    damage = data.draw(st.binary(min_size=1, max_size=min(12, header - start)))
    shard.write_bytes(whole[:start] + damage + whole[start + len(damage) :])
    try:
        assert q.Checkpoint.open(source).tensors == infos
    except q.QuantizeError as error:
        assert shard.name in str(error) or "index" in str(error)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


LIES = {
    "overlap": {"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}},
    "gap": {"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 24]}},
    "out of range": {"a": {**ENTRY, "shape": [2**40], "data_offsets": [0, 2**42]}},
    "backwards": {"a": {**ENTRY, "shape": [0], "data_offsets": [8, 0]}},
    "negative": {"a": {**ENTRY, "shape": [-2, -1]}},
    "absurd shape": {"a": {**ENTRY, "shape": [2**63] * 1000, "data_offsets": [0, 8]}},
    "wrong size": {"a": {**ENTRY, "shape": [3]}},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "unknown dtype": {"a": {**ENTRY, "dtype": "F42"}},
    "floats": {"a": {**ENTRY, "shape": [2.0]}},
    "too few offsets": {"a": {**ENTRY, "data_offsets": [8]}},
    "list": [],
}


def write_header(folder: Path, header: bytes, body: bytes = bytes(24)) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)
    return folder


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    source = write_header(tmp_path / "in", json.dumps(LIES[lie]).encode())
    assert_refused(run_cli(source, tmp_path / "out"), "model.safetensors", "not a whole safetensors file")
    assert not (tmp_path / "out").exists()


ONE_PLACE = b'"%08d":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'


HUGE_HEADERS = {  # of up to 100 MB, the format's limit, and beyond
    "many tensors in one place": lambda: b"{" + b"".join(ONE_PLACE % i for i in range(1_700_000))[:-1] + b"}",
    "nothing but brackets": lambda: b"[" * 99_000_000,
    "one long number": lambda: b'{"a":' + b"9" * 98_000_000 + b"}",
    "one long shape": lambda: b'{"a":{"dtype":"F32","shape":[' + b"1," * 5_000_000 + b'1],"data_offsets":[0,4]}}',
    "one long name": lambda: b'{"' + b"a" * 98_000_000 + b'":{}}',
    "beyond the limit": lambda: b" " * 100_000_001,
}


@pytest.mark.parametrize("kind", HUGE_HEADERS)
def test_a_huge_header_that_lies_is_refused_in_bounded_memory(tmp_path, kind):
    source = write_header(tmp_path / "in", HUGE_HEADERS[kind]())
    peak = 0
    with open(tmp_path / "stdout", "w+") as stdout, open(tmp_path / "stderr", "w+") as stderr:
        arguments = ["timeout", "--foreground", "120", *command(source, tmp_path / "out")]  # lest it hang
        run = subprocess.Popen(arguments, stdout=stdout, stderr=stderr)
        while run.poll() is None:
            peak = max(peak, psutil.Process(run.pid).memory_info().rss)
            time.sleep(0.02)
    texts = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    result = subprocess.CompletedProcess([], run.returncode, *texts)
    assert_refused(result, "not a whole safetensors file")
    assert len(result.stderr) < 3000
    assert peak < 2 * GB, peak


@pytest.mark.parametrize("name", ["../../escape.weight", "/etc/passwd.weight", "a/b.weight", "..", "m\n\x1b.weight"])
def test_a_tensor_name_with_path_characters_is_only_a_name(tmp_path, name):
    source = save_model(tmp_path / "deep" / "in", {name: torch.ones(8, 128), "other.weight": torch.ones(8, 128)})
    result = quantize(source, tmp_path / "deep" / "out", "--exclude", "^(?!other)")
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"in", "out"}
    assert read_tensors(tmp_path / "deep" / "out").keys() == {name, "other.qweight", "other.scales"}
    assert "\x1b" not in result.stdout


def test_tens_of_thousands_of_tensors_are_planned(tmp_path):
    write_sparse_checkpoint(tmp_path / "in", {f"m.{i}.weight": (torch.bfloat16, (8, 128)) for i in range(30_000)}, 4)
    assert "30,000" in quantize(tmp_path / "in", tmp_path / "out", "--dry_run").stdout


def test_a_hub_cache_snapshot_of_links_is_read_and_copied_through(tiny, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in tiny.iterdir():
        (snapshot / path.name).symlink_to(path)
    quantize(snapshot, tmp_path / "out")
    quantize(tiny, tmp_path / "direct")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "direct")


@pytest.mark.parametrize("layout", ["single file", "several files without index", "indexed"])
def test_all_safetensors_layouts_give_the_same_tensors(tiny, tmp_path, layout):
    tensors, folder = read_tensors(tiny), tmp_path / "in"
    if layout == "single file":
        save_model(folder, tensors)
    else:
        write_checkpoint(folder, tensors, shards=3)
        if layout != "indexed":
            (folder / "model.safetensors.index.json").unlink()
    quantize(folder, tmp_path / "out")
    quantize(tiny, tmp_path / "expected")
    output, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "expected")
    assert output.keys() == expected.keys()
    assert all(torch.equal(output[name], expected[name]) for name in expected)


def write_index(folder, names, file):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


@pytest.mark.parametrize("saved", [save, save_pickle], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("complete", [True, False])
def test_an_index_of_missing_shards_beside_whole_weights_may_be_stale(tmp_path, complete, saved):
    source = saved(tmp_path / "in", layers(0, 1))
    names = list(layers(0, 1) if complete else layers(0, 1, 2))
    write_index(source, names, "model-00001-of-00002.safetensors")
    result = run_cli(source, tmp_path / "out")
    assert_refused(result, "model-00001-of-00002.safetensors", "missing")
    assert ("may be stale" in result.stderr) == complete
    if complete:  # follow the advice
        (source / "model.safetensors.index.json").unlink()
        quantize(source, tmp_path / "out")


def test_consolidated_weights_beside_shards_are_left_out_by_name(tmp_path):
    source = save(tmp_path / "in", layers(0, 1))
    save_file({"layers.0.attention.wq.weight": random(64, 128)}, source / "consolidated-00001-of-00001.safetensors")
    plan = quantize(source, tmp_path / "out").stdout
    assert re.search(r"^Left out: .*consolidated-00001-of-00001.safetensors", plan, re.MULTILINE)
    assert not any("wq" in name for name in read_tensors(tmp_path / "out"))


def test_consolidated_weights_alone_are_the_model(tmp_path):
    source = save(tmp_path / "in", layers(0))
    (source / "model.safetensors").rename(source / "consolidated.safetensors")
    quantize(source, tmp_path / "out")


@pytest.mark.parametrize("other", ["model-00001-of-00001.safetensors", "ema.safetensors"])
def test_two_sets_of_weights_without_an_index_are_refused(tmp_path, other):
    source = save(tmp_path / "in", layers(0))
    save_file(layers(1), source / other)
    assert_refused(run_cli(source, tmp_path / "out"), "model.safetensors", other.replace("00001-", "*-"), "two sets")
