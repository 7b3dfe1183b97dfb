#!/usr/bin/env python3
"""What --max_size_gb chooses for Nemotron-3-Nano-30B: dry runs of its inventory, for the README's table.

    python tests/tools/budget.py [GB ...]

The inventory has every tensor's name, dtype and shape, and no data: its files are sparse. Statistics are random, from a
seed: costs are spread evenly over two powers of ten, so what is chosen shows sizes and time, and no more. Those of
experts, of which a token reaches 6 of 128, are a twentieth of that. Needs tests/requirements.txt.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import paths
import torch
from checkpoints import write_sparse_checkpoint
from safetensors.torch import save_file
from tiny_nemotron import NANO_30B, nemotron_tensors, write_other_files

SIZES = ("17.4", "18.0", "18.3", "18.55")


def random_statistics(shapes: dict) -> dict[str, torch.Tensor]:
    """Mean squares, a factor of rank 8, a cost and a gain for each linear layer."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (_, shape) in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or module == name or "embeddings" in name:
            continue
        factor = torch.randn(shape[1], 8, generator=generator)
        tensors[module] = factor.square().sum(1) * 1.5
        tensors[f"{module}.factor"] = factor.half()
        cost = 10 ** (2 * torch.rand((), generator=generator) - 1)
        tensors[f"{module}.cost"] = cost / 20 if ".experts." in name else cost
        tensors[f"{module}.gain"] = 1 + torch.rand((), generator=generator)
    return tensors


def main(sizes: list[str]) -> None:
    shapes = nemotron_tensors(NANO_30B)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        source.mkdir()
        write_sparse_checkpoint(source, shapes, shards=13)
        write_other_files(source, NANO_30B)
        statistics = Path(folder, "statistics.safetensors")
        save_file(random_statistics(shapes), statistics)
        command = [sys.executable, paths.ROOT / "quantize_int4.py", source, Path(folder, "out")]
        command += ["--format", "compressed-tensors", "--importance", statistics, "--dry_run"]
        for size in ["", *sizes]:
            started = time.monotonic()
            option = ["--max_size_gb", size] if size else []
            result = subprocess.run([*command, *option], capture_output=True, text=True)
            text = re.search(
                r"^output.*?(?=^WARNING|^Note|^Copied)", result.stdout, re.MULTILINE | re.DOTALL
            )
            seconds = time.monotonic() - started
            print(f"--max_size_gb {size}" if size else "without", f"({seconds:.1f} s)")
            print(text[0] if text else "", result.stderr, sep="")


if __name__ == "__main__":
    main(sys.argv[1:] or list(SIZES))
