"""What the tests read of a folder, and how they change one.

Packed weights are decoded here from the formats' definitions, without a look at the program's own unpacking, so that a
mistake there is not repeated here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

# --- tensors ----------------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> Tensors:
    """Read every tensor of a folder with the safetensors library alone."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors


def assert_same_tensors(folder: Path, expected: Path) -> None:
    output, wanted = read_tensors(folder), read_tensors(expected)
    assert output.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert output[name].dtype == tensor.dtype, name
        assert torch.equal(output[name], tensor), name


def changed_tensors(folder: Path, other: Path) -> set[str]:
    """Name the tensors of a folder that differ in another one."""
    tensors, others = read_tensors(folder), read_tensors(other)
    return {name for name in tensors if not torch.equal(tensors[name], others[name])}


def edit_shard(shard: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a shard, and nothing in its metadata; their places, too, only if shapes change."""
    with safe_open(shard, framework="pt") as file:
        names = file.keys()
        tensors, metadata = {name: file.get_tensor(name).clone() for name in names}, file.metadata()
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    change(tensors)
    if {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} != layout:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            shard,
            metadata=metadata,
        )
        return
    for name, tensor in tensors.items():
        overwrite_weights(
            shard, name, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )


def edit_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a folder of one shard."""
    (shard,) = folder.glob("*.safetensors")
    edit_shard(shard, change)


def read_header(shard: Path) -> tuple[dict, int]:
    """Read the entries of a safetensors header by name, and from where their offsets count."""
    with open(shard, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def edit_metadata(folder: Path, change: Callable[[dict], object], name: str = "*") -> None:
    """Change the metadata in the header of a folder's shards, or of those of this name, and nothing
    else."""
    for shard in folder.glob(f"{name}.safetensors"):
        header, start = read_header(shard)
        change(header["__metadata__"])
        text, tensors = json.dumps(header).encode(), shard.read_bytes()[start:]
        shard.write_bytes(len(text).to_bytes(8, "little") + text + tensors)


def edit_facts(folder: Path, change: Callable[[dict], object], name: str = "*") -> None:
    """Change what a folder's shards say of how they were made."""

    def change_facts(metadata: dict) -> None:
        facts = json.loads(metadata["quantize_int4_facts"])
        change(facts)
        metadata["quantize_int4_facts"] = json.dumps(facts)

    edit_metadata(folder, change_facts, name)


def overwrite_weights(shard: Path, name: str, data: bytes) -> None:
    """Overwrite a tensor's first bytes in place."""
    header, start = read_header(shard)
    with open(shard, "r+b") as file:
        file.seek(start + header[name]["data_offsets"][0])
        file.write(data)


# --- files ------------------------------------------------------------------------------------------------------------


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = read_json(path)
    change(content)
    path.write_text(json.dumps(content))


def read_config(folder: Path) -> dict:
    return read_json(folder / "config.json")


def edit_quantization_config(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the quantization_config in a folder's config.json."""
    edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))


def patterns(folder: Path) -> list[str]:
    """List the entries for kept layers of a folder in either format for engines."""
    config = read_config(folder)["quantization_config"]
    return config["ignore"] if "ignore" in config else list(config["dynamic"])


def assert_entries_fit(folder: Path) -> None:
    """Read config.json as an engine does: its entries keep every 2-D layer that is kept and no packed one, and a packed
    layer's group has the width and the group size of its tensors."""
    infos = {
        name: info
        for shard in folder.glob("*.safetensors")
        for name, info in read_header(shard)[0].items()
    }
    groups = read_config(folder)["quantization_config"].get("config_groups", {}).values()
    for name, info in infos.items():
        module, _, last = name.rpartition(".")
        if (
            last == "weight" and len(info["shape"]) == 2 and module != "lm_head"
        ):  # which engines know
            assert is_kept(folder, module), module
        if last not in READERS:
            continue
        experts = re.match(
            r"((?:.*\.)?experts)\.\d+\.", name
        )  # an engine asks for these as one module, too
        for asked in [module, *([experts[1]] if experts else [])]:
            assert not is_kept(folder, asked), asked
        named = [
            g
            for g in groups
            if any(t[:3] == "re:" and re.match(t[3:], module) for t in g["targets"])
        ]
        for stated in [g["weights"] for g in [*named, *groups][:1]]:
            columns = info["shape"][1] * 32 // stated["num_bits"]
            assert columns == infos[f"{module}.weight_scale"]["shape"][1] * stated["group_size"], (
                module
            )


def is_kept(folder: Path, name: str) -> bool:
    """Tell whether an engine that asks for the module `name` is told that it is kept."""
    entries = patterns(folder)
    expressions = [
        re.sub("^(re|-):", "", entry) for entry in entries if entry.startswith(("re:", "-:"))
    ]
    return name in entries or any(re.match(expression, name) for expression in expressions)


# --- decoding ---------------------------------------------------------------------------------------------------------


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """Unpack int32 (rows, n) to codes (rows, 8 n) of 0 to 15, through the bytes, which hold the lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(1)


def dequantize_compressed_tensors(
    packed: torch.Tensor, scales: torch.Tensor, shape: torch.Tensor
) -> torch.Tensor:
    """Decode one weight, in the dtype of its scales: the product is rounded to it once."""
    eight_bits = packed.shape[1] * 4 == shape[1]
    octets = packed.contiguous().view(torch.uint8)  # a code in each, or two
    codes = octets.float() - 128 if eight_bits else unpack_words(packed).float() - 8
    assert list(codes.shape) == shape.tolist()
    group_size = codes.shape[1] // scales.shape[1]
    return (codes * scales.float().repeat_interleave(group_size, dim=1)).to(scales.dtype)


def dequantize_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor
) -> torch.Tensor:
    """Decode one GPTQ v1 weight, in float32: (code - zero - 1) * scale, the zero point and scale chosen by g_idx."""
    codes = unpack_words(qweight.T)  # (rows, columns)
    zeros = unpack_words(qzeros).float() + 1  # (groups, rows)
    group_of_column = g_idx.long()
    return ((codes - zeros[group_of_column].T) * scales.float()[group_of_column].T).contiguous()


READERS = {
    "weight_packed": (
        dequantize_compressed_tensors,
        ["weight_packed", "weight_scale", "weight_shape"],
    ),
    "qweight": (dequantize_gptq, ["qweight", "qzeros", "scales", "g_idx"]),
}


def read_dequantized(folder: Path) -> tuple[Tensors, set[str]]:
    """Decode a quantized folder: its tensors under the names of its dense source, and the names of the packed ones."""
    tensors = read_tensors(folder)
    packed = [name.rpartition(".") for name in tensors if name.rpartition(".")[2] in READERS]
    quantized = set()
    for layer, _, suffix in packed:
        dequantize, parts = READERS[suffix]
        tensors[f"{layer}.weight"] = dequantize(*(tensors.pop(f"{layer}.{part}") for part in parts))
        quantized.add(f"{layer}.weight")
    return tensors, quantized


def write_dense_twin(
    quantized_folder: Path, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the dense checkpoint that holds the dequantized weights."""
    tensors, quantized = read_dequantized(quantized_folder)
    for name in quantized:
        tensors[name] = tensors[name].to(dtype)
    config = read_config(quantized_folder)
    del config["quantization_config"]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for code in quantized_folder.glob("*.py"):
        shutil.copy(code, folder)


def check_weights_resemble_source(
    dequantized: Tensors, quantized: set[str], source: Tensors
) -> None:
    """Check that every row of every weight is its own source's to INT4's precision, and what is kept is equal.

    Rounding to 15 levels leaves about 0.1 of a row; any other row leaves 1.4.
    """
    assert dequantized.keys() == source.keys()
    for name, tensor in source.items():
        if name not in quantized:
            assert torch.equal(dequantized[name], tensor), f"{name} was to be kept"
            continue
        error = (dequantized[name].float() - tensor.float()).norm(dim=1) / tensor.float().norm(
            dim=1
        )
        assert error.max() < 0.2, f"{name}: row {error.argmax()} is off by {error.max():.2f}"
