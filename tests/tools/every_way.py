"""What tests/tools/arm.sh compares: the tiny checkpoint, converted in every format, by every kind of scale, with a compiler
and without.

    python tests/tools/every_way.py --sources FOLDER    writes the checkpoint and statistics for --importance
    python tests/tools/every_way.py FOLDER              converts them into FOLDER/out
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import paths  # isort: skip  # noqa: F401
import torch
from checkpoints import write_checkpoint
from launcher import Run, Setting
from safetensors.torch import save_file
from tiny_nemotron import TINY, nemotron_tensors, random_tensors, write_other_files

FORMATS = ["int4", "compressed-tensors", "gptq"]
STATISTICS = "statistics.safetensors"
RANK = 12  # which is padded to 16


def write_sources(folder: Path) -> None:
    write_checkpoint(folder / "tiny", random_tensors(TINY))
    write_other_files(folder / "tiny", TINY)
    generator, statistics = torch.Generator().manual_seed(0), {}
    for name, (_, shape) in nemotron_tensors(TINY).items():
        if len(shape) == 2:
            factor = torch.randn(shape[1], RANK, generator=generator) * torch.rand(
                shape[1], 1, generator=generator
            )
            module = name.removesuffix(".weight")
            statistics |= {module: factor.square().sum(1) * 1.5, f"{module}.factor": factor.half()}
    save_file(statistics, folder / STATISTICS)


def convert_in_every_way(folder: Path) -> None:
    ways = {"absmax": [], "mse": ["--scale", "mse"]}
    ways["feedback"] = [*ways["mse"], "--importance", str(folder / STATISTICS)]
    for form, (way, options), compiler in itertools.product(FORMATS, ways.items(), ["cc", "none"]):
        out, start = folder / "out" / f"{form}-{way}-{compiler}", time.monotonic()
        arguments = [
            "--input_dir",
            str(folder / "tiny"),
            "--output_dir",
            str(out),
            "--format",
            form,
            *options,
        ]
        run = Run(
            [*arguments, "--min_free_gb", "0", "--verify"], Setting(environment={"CC": compiler})
        )
        result = run.wait(timeout=3600)
        assert result.returncode == 0, result.stderr
        assert ("rounding with torch" in result.stdout) == (compiler == "none"), result.stdout
        print(f"{out.name}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--sources":
        write_sources(Path(sys.argv[2]))
    else:
        convert_in_every_way(Path(sys.argv[1]).resolve())
