"""Checkpoint, headers: accepted as the safetensors library does (README: "It refuses what would come out wrong")."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import time
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import write_checkpoint, write_sparse_checkpoint
from conftest import GB, assert_refused, quantize, refuse, run_cli, start_cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

import quantize_int4 as q


def test_a_single_file_larger_than_the_machines_memory_is_read(tmp_path):
    rows = 2 * psutil.virtual_memory().total // 256
    write_sparse_checkpoint(tmp_path / "in", {"m.weight": (torch.bfloat16, (rows, 128))}, shards=1)
    assert "quantized to 4 bits" in quantize(tmp_path / "in", tmp_path / "out", "--dry_run").stdout


def test_a_file_that_is_no_safetensors_is_refused(model, tmp_path):
    (model / "model.safetensors").write_text("<html>not found</html>" * 3)
    refuse(model, tmp_path / "out", "not a whole safetensors file")


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


def test_a_name_given_twice_in_a_header_is_refused(model, tmp_path):
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    refuse(model, tmp_path / "out", "names a tensor twice")


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**65) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)

ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "I64", "X"]) | HEADERS,
        "shape": st.lists(st.integers(0, 3), max_size=3) | HEADERS,
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)) | HEADERS,
    }
)


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.dictionaries(st.text(max_size=2), ENTRIES, max_size=3) | HEADERS,
    size=st.integers(0, 20),
)
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


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_changes_nothing(tmp_path, data):
    source = tmp_path / "in"
    if not source.exists():
        write_checkpoint(
            source, {f"m.{i}.weight": torch.ones(24, 128 + 8 * i).bfloat16() for i in range(4)}
        )
    shard = source / "model-00001-of-00002.safetensors"
    whole = (
        (tmp_path / "whole").read_bytes() if (tmp_path / "whole").exists() else shard.read_bytes()
    )
    (tmp_path / "whole").write_bytes(whole)
    shard.write_bytes(whole)
    with contextlib.closing(q.Checkpoint(source)) as checkpoint:
        infos = checkpoint.tensors
    header = 8 + int.from_bytes(whole[:8], "little")
    start = data.draw(st.integers(0, header - 1))
    damage = data.draw(st.binary(min_size=1, max_size=min(12, header - start)))
    shard.write_bytes(whole[:start] + damage + whole[start + len(damage) :])
    try:
        with contextlib.closing(q.Checkpoint(source)) as checkpoint:
            assert checkpoint.tensors == infos
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
    assert_refused(
        run_cli(source, tmp_path / "out"), "model.safetensors", "not a whole safetensors file"
    )
    assert not (tmp_path / "out").exists()


ONE_PLACE = b'"%08d":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
HUGE_HEADERS = {  # of up to 100 MB, the format's limit, and beyond
    "many tensors in one place": lambda: (
        b"{" + b"".join(ONE_PLACE % i for i in range(1_700_000))[:-1] + b"}"
    ),
    "nothing but brackets": lambda: b"[" * 99_000_000,
    "one long number": lambda: b'{"a":' + b"9" * 98_000_000 + b"}",
    "one long shape": lambda: (
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 5_000_000 + b'1],"data_offsets":[0,4]}}'
    ),
    "one long name": lambda: b'{"' + b"a" * 98_000_000 + b'":{}}',
    "beyond the limit": lambda: b" " * 100_000_001,
}


@pytest.mark.parametrize("kind", HUGE_HEADERS)
def test_a_huge_header_that_lies_is_refused_in_bounded_memory(tmp_path, kind):
    source = write_header(tmp_path / "in", HUGE_HEADERS[kind]())
    peak = 0
    run = start_cli(source, tmp_path / "out")
    deadline = time.monotonic() + 120  # lest it hang
    while run.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, psutil.Process(run.pid).memory_info().rss)
        time.sleep(0.02)
    result = run.wait(0.1)
    assert_refused(result, "not a whole safetensors file")
    assert len(result.stderr) < 3000
    assert peak < 2 * GB, peak
