#!/usr/bin/env python3
"""Measure the conversion beside what else could be done with the same data; prints a table of medians.

    python tests/benchmark.py [--gb 2] [--rounds 5] [--threads 2] [--only NAME ...] [--dir SCRATCH_FOLDER]

Contenders, each a process of its own, in turn, several rounds, on the same bf16 weights in the page cache:

    floor      read the input and write as many bytes as our output has, with the same threads
    ours       quantize_int4.py, int4, group size 128
    obvious    load all, round(w / s), eight shifts into int32, save_file

Seconds run from opening the input to the last byte written (floor and ours: and synced to disk), without the start of
Python and the imports. Memory is the most anonymous memory (RssAnon) of the process at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = [(1856, 2688), (2688, 1856)]  # Nemotron-3-Nano's routed experts
GROUP_SIZE = 64  # divides both; every contender can do it


def write_input(folder: Path, gigabytes: float) -> int:
    """Shards of about 1 GB of expert weights; returns the number of weights."""
    folder.mkdir()
    noise = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    layers = max(1, round(gigabytes * 1e9 / sum(rows * columns * 2 for rows, columns in SHAPES)))
    weight_map, per_shard = {}, 50
    for first in range(0, layers, per_shard):
        tensors = {}
        for layer in range(first, min(first + per_shard, layers)):
            for name, (rows, columns) in zip(("up_proj", "down_proj"), SHAPES):
                start = layer * 7919 % (len(noise) - rows * columns)
                tensors[f"model.layers.{layer}.mlp.{name}.weight"] = (
                    noise[start : start + rows * columns].view(rows, columns).clone()
                )
        file = f"model-{first // per_shard + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return layers * sum(rows * columns for rows, columns in SHAPES)


def run_ours(source: Path, target: Path, threads: int) -> None:
    import quantize_int4

    arguments = [f"--input_dir={source}", f"--output_dir={target}", f"--group_size={GROUP_SIZE}", "--min_free_gb=0"]
    code = quantize_int4.main([*arguments, f"--threads={threads}"])
    assert code == 0, code


def run_floor(source: Path, target: Path, threads: int) -> None:
    """Read every byte into a small buffer; write (4 + 16 / group size) bits a weight from another; sync."""
    target.mkdir()
    ratio = (4 + 16 / GROUP_SIZE) / 16
    files = sorted(source.glob("*.safetensors"))
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, 1 << 20)]

    def work(part: list) -> None:
        buffer, zeros = bytearray(1 << 20), bytes(int((1 << 20) * ratio))
        for file, start in part:
            count = os.preadv(inputs[file], [buffer], start)
            os.pwrite(outputs[file], zeros[: int(count * ratio)], int(start * ratio))

    inputs = {file: os.open(file, os.O_RDONLY) for file in files}
    outputs = {file: os.open(target / file.name, os.O_WRONLY | os.O_CREAT) for file in files}
    workers = [threading.Thread(target=work, args=(pieces[number::threads],)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd in outputs.values():
        os.fsync(fd)


def run_obvious(source: Path, target: Path, threads: int) -> None:
    """As one would write it at first."""
    torch.set_num_threads(threads)
    target.mkdir()
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    output = {}
    for name, weight in tensors.items():
        rows, columns = weight.shape
        groups = weight.float().view(rows, -1, GROUP_SIZE)
        scales = groups.abs().amax(-1) / 7
        codes = torch.clamp(torch.round(groups / scales.unsqueeze(-1)), -8, 7).to(torch.int32).view(rows, columns)
        packed = torch.zeros(rows, columns // 8, dtype=torch.int32)
        for i in range(8):
            packed |= (codes[:, i::8] & 0xF) << (4 * i)
        output[name.replace(".weight", ".qweight")] = packed
        output[name.replace(".weight", ".scales")] = scales.half()
    save_file(output, target / "model.safetensors")


CONTENDERS = {"floor": run_floor, "ours": run_ours, "obvious": run_obvious}


def measure(name: str, source: Path, target: Path, threads: int) -> tuple[float, float]:
    """Seconds and peak anonymous bytes of one contender in a process of its own."""
    arguments = [sys.executable, __file__, "--run", name, str(source), str(target), "--threads", str(threads)]
    peak = 0
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            with open(f"/proc/{process.pid}/status") as status:
                peak = max([peak, *(int(kb) * 1024 for kb in re.findall(r"RssAnon:\s+(\d+)", status.read()))])
            time.sleep(0.02)
        seconds = re.search(r"^seconds (\S+)$", process.stdout.read(), re.MULTILINE)
    assert process.returncode == 0 and seconds, name
    shutil.rmtree(target)
    return float(seconds[1]), peak


def print_table(results: dict[str, list[tuple[float, float]]], weights: int) -> None:
    floor = statistics.median(seconds for seconds, _ in results["floor"]) if "floor" in results else None
    print(f"{'':<10}{'seconds':>9}{'GB/s':>8}{'Mweights/s':>12}{'memory GB':>11}{'x floor':>9}")
    for name, runs in results.items():
        seconds = statistics.median(seconds for seconds, _ in runs)
        peak = statistics.median(peak for _, peak in runs)
        ratio = f"{seconds / floor:9.2f}" if floor else ""
        print(f"{name:<10}{seconds:9.2f}{weights * 2 / seconds / 1e9:8.2f}{weights / seconds / 1e6:12.0f}", end="")
        print(f"{peak / 1e9:11.2f}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--run", nargs=3, metavar=("NAME", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        name, source, target = args.run
        started = time.perf_counter()
        CONTENDERS[name](Path(source), Path(target), args.threads)
        print(f"seconds {time.perf_counter() - started:.4f}")
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        source, target = Path(scratch) / "in", Path(scratch) / "out"
        weights = write_input(source, args.gb)
        results = {name: [] for name in args.only}
        for round_number in range(args.rounds + 1):
            for name in args.only:
                run = measure(name, source, target, args.threads)
                if round_number:  # the first round warms the caches
                    results[name].append(run)
        print(f"{weights / 1e6:.0f} million bf16 weights, {args.threads} threads, median of {args.rounds} rounds")
        print_table(results, weights)


if __name__ == "__main__":
    main()
