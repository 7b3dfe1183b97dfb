"""Small checkpoints of the tests of experts, kept layers and merged models, and what engines read of a folder."""

from __future__ import annotations

import json
import re

import torch
from conftest import read_tensors
from safetensors.torch import save_file

SEEDED = torch.Generator().manual_seed(11)
E, H, INNER = 4, 256, 128  # experts, hidden size, their width
FORMATS = ["int4", "compressed-tensors", "gptq"]
WORDS = {"int4": "qweight", "compressed-tensors": "weight_packed", "gptq": "qweight"}


def random(*shape):
    return torch.randn(shape, generator=SEEDED).bfloat16()


def layers(*numbers):
    return {f"model.layers.{number}.self_attn.q_proj.weight": random(64, 128) for number in numbers}


def save(folder, tensors, **config):
    """One model.safetensors and a config.json with these entries."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_pickle(folder, tensors, **config):
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "model.pth")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def patterns(folder):
    """The entries for kept layers of a folder in either engine format."""
    config = read_config(folder)["quantization_config"]
    return config["ignore"] if "ignore" in config else list(config["dynamic"])


def is_kept(folder, name):
    """Whether an engine that asks for `name` is told that it is kept."""
    return any(
        re.match(entry[3:], name) if entry.startswith("re:") else re.match(entry[2:], name)
        for entry in patterns(folder)
        if entry.startswith(("re:", "-:"))
    ) or (name in patterns(folder))


def assert_same_tensors(folder, expected):
    output, wanted = read_tensors(folder), read_tensors(expected)
    assert output.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(output[name], tensor), name


MOE = "model.layers.0.mlp"
BESIDE = {f"{MOE}.gate.weight": random(E, H), "model.layers.0.self_attn.o_proj.weight": random(H, H)}


def gated(module=f"{MOE}.experts", names=("gate_proj", "up_proj", "down_proj")):
    """Stacks of gated experts, and the same as one weight an expert and projection."""
    gate, up, down = random(E, INNER, H), random(E, INNER, H), random(E, H, INNER)
    stacks = {f"{module}.gate_up_proj": torch.cat([gate, up], 1), f"{module}.down_proj": down}
    separate = {
        f"{module}.{expert}.{name}.weight": stack[expert].clone()
        for name, stack in zip(names, (gate, up, down))
        for expert in range(E)
    }
    return stacks, separate


SEPARATE = gated()[1]
PROJECTION = {"model.layers.0.mlp.up_proj.weight": random(64, H)}
LAYER = "model.layers.0.self_attn.q_proj"
