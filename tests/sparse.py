"""Checkpoints of any size that take up no disk: real headers over files that are one hole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_sparse_checkpoint(folder: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], shards: int) -> None:
    """All-zero tensors of the given dtypes and shapes in `shards` files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(tensors), {}
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
            out.truncate(8 + len(data) + end)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
