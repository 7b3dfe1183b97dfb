"""The checkpoints that the tests convert.

`write_checkpoint` and `write_sparse_checkpoint` do without the safetensors library, whose torch functions need numpy.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
DTYPE_NAMES |= {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 2) -> None:
    """Save tensors as `shards` files of about as many tensors each, with the index that names them."""
    _write_shards(
        folder,
        {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()},
        shards,
        tensors.__getitem__,
    )


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
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": shape,
                "data_offsets": [start, end],
            }
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


# --- small ones -------------------------------------------------------------------------------------------------------

SEEDED = torch.Generator().manual_seed(11)
E, H, INNER = 4, 256, 128  # experts, hidden size, their width


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=SEEDED).bfloat16()


def save_model(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """Write one model.safetensors without an index, and a config.json with these entries."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_pickle(
    folder: Path, content: object, name: str = "pytorch_model.bin", **config: object
) -> Path:
    """Write one pickle, of a state dict or whatever else, and a config.json with these entries."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


WEIGHT = {"m.weight": torch.ones(4, 128).bfloat16()}
LAYER = "model.layers.0.self_attn.q_proj"
PROJECTION = {"model.layers.0.mlp.up_proj.weight": random(64, H)}
MOE = "model.layers.0.mlp"
BESIDE = {
    f"{MOE}.gate.weight": random(E, H),
    "model.layers.0.self_attn.o_proj.weight": random(H, H),
}


def layers(*numbers: int) -> dict[str, torch.Tensor]:
    """Make a projection for each of these layers."""
    return {f"model.layers.{number}.self_attn.q_proj.weight": random(64, 128) for number in numbers}


def gated(
    module: str = f"{MOE}.experts",
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Make stacks of gated experts, and the same as one weight an expert and projection."""
    gate, up, down = random(E, INNER, H), random(E, INNER, H), random(E, H, INNER)
    stacks = {f"{module}.gate_up_proj": torch.cat([gate, up], 1), f"{module}.down_proj": down}
    separate = {
        f"{module}.{expert}.{name}.weight": stack[expert].clone()
        for name, stack in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
        for expert in range(E)
    }
    return stacks, separate


SEPARATE = gated()[1]
