"""Checkpoints written without the safetensors library, whose torch functions need numpy; also sparse ones."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
DTYPE_NAMES |= {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL"}

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 2) -> None:
    """Save tensors as `shards` files of about as many tensors each, with the index that names them."""
    _write_shards(folder, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, shards, tensors.__getitem__)


def write_sparse_checkpoint(folder: Path, tensors: Shapes, shards: int) -> None:
    """All-zero tensors of the given dtypes and shapes: real headers over files that are one hole."""
    _write_shards(folder, tensors, shards)


def _write_shards(
    folder: Path, tensors: Shapes, shards: int, content: Callable[[str], torch.Tensor] | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map, total_size = list(tensors), {}, 0
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in part:
            dtype, shape = tensors[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        data = json.dumps(header).encode()
        data += b" " * (-len(data) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(data).to_bytes(8, "little") + data)
            for name in part if content else ():
                tensor = content(name).contiguous()
                out.write(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
            out.truncate(8 + len(data) + end)
        weight_map |= dict.fromkeys(part, file)
        total_size += end
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
