#!/usr/bin/env python3
"""Measure the conversion beside what else could be done with the same data; prints a table of medians.

    python tests/tools/benchmark.py [--gb 2] [--rounds 5] [--threads 2] [--only NAME ...] [--dir SCRATCH_FOLDER]

Contenders, each a process of its own, in turn, several rounds, on the same bf16 weights in the page cache:

    floor      read the input, write as many bytes as our output has, with the same threads
    ours       quantize_int4.py, int4
    mse        quantize_int4.py --scale mse
    feedback   quantize_int4.py --scale mse --importance FILE, with factors of rank 32
    verify     quantize_int4.py --verify of what `ours` makes
    restore    quantize_int4.py --restore of the same
    cat        cat of the input, from the disk: the caches are dropped before, which takes root
    cold       quantize_int4.py, int4, likewise
    llama      llama.cpp's llama_model_quantize, Q4_0 (groups of 32), on a GGUF of the same weights
    llmc       llm-compressor's model_free_ptq, W4A16
    obvious    load all, round(w / s), eight shifts into int32, save_file

The last line says how many nanoseconds a weight the kernels take alone, in one thread, on weights that lie in its
cache; `--only kernels` measures nothing else.

Groups of 64 but for Q4_0. The peers take part if they are installed: `pip install llmcompressor`, and
`CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python gguf`. `--only` also takes
tile17 to tile21: ours, with tiles of 2^17 to 2^21 weights.

Seconds run from opening the input until the last byte is on the disk, for all, without the start of Python and the
imports. Memory is the most anonymous memory (RssAnon) of the process at any time, cached how much more the page cache
holds after it.

What was found, on 2 cores of an AMD EPYC virtual machine (AVX-512) with 24 GB, whose disk takes about 1 GB/s, with 2
threads and torch's CPU build: 998 million weights, medians of 3 rounds, all in one run.

                  seconds   million weights/s   own memory   more in the page cache   times the floor
    floor         0.27      3,693               0.18 GB      0.54 GB                  1
    ours          0.42      2,392               0.20 GB      0                        1.5
    mse           1.08      921                 0.21 GB      0                        4.0
    feedback      3.73      268                 0.22 GB      0.01 GB                  13.8
    verify        0.52      1,904               0.20 GB      0                        1.9
    restore       2.54      394                 0.22 GB      0                        9.4
    cat           0.81      1,227                            2.00 GB                  3.0
    cold          1.04      958                 0.25 GB      0.08 GB                  3.9

In an earlier run on such a machine, whose floor was 0.36 s, with llama-cpp-python 0.3.36, which was built there, and
llm-compressor 0.14.0.1:

    llama         1.61      622                 0.18 GB      0.59 GB                  4.5
    obvious       6.80      147                 4.44 GB      0.54 GB                  19.0
    llmc          11.25     89                  2.30 GB      0.82 GB                  31.4

The kernels alone, in nanoseconds a bf16 weight: absmax 0.092, mse 1.45, error feedback 5.5, --verify 0.24, and 1.5 with
the errors of outputs. The C compiler takes a tenth of a second, with error feedback two, and works while torch is
imported; to compare the kernels' results with torch's takes 0.02 s each, with error feedback 0.06. Without a compiler,
with an earlier version, 2.2 billion weights took 2.1 s, with --scale mse 17 s, and with error feedback thirty times as
long as with one.

On 2 cores of another such machine, which has AVX2 and no AVX-512, all but the floor took twice the time. There the full
inventory of Nemotron-3-Nano-30B (63.16 GB, as files of zeros that are no more than holes on the disk) took 0.29 GB of
the process's own memory at the peak, and 23 s to write 17.07 GB as int4, 75 s to write 17.82 GB as compressed-tensors.
A build of torch for CUDA holds more as soon as it is imported: a run over 4.4 GB took 0.27 GB with torch 2.13.0 for
CPUs, 0.38 GB with 2.8.0 for CUDA 12.8, and 0.41 GB with 2.14.1 for CUDA 13.0.

The page cache: what is not cached (of files of another user, to 256 kB) is read around the cache, and what a run alone
brought there it drops again. The run over 4.4 GB from a cold cache left 72 MB more (torch's own libraries; without this
it was 5.6 GB) and took 2.1 to 2.6 s; `cat` of its input took 7.7 s.

A DGX Spark, on paper: half a minute to a minute and a half for the 63 GB with --scale mse, one to two minutes with
error feedback, and for --verify as long again. Calculated from 31.6 billion weights, the figures above, and two
assumptions that were not tried: that its 20 cores do half to all of what one of these does, and that its SSD reads 2 to
6 GB/s and writes half as much. The cores then take 8 to 16 s (error feedback 22 to 44 s), the disk 16 to 50 s; and
workers hold Python's lock for 0.7 ns a weight (py-spy, 400 samples a second; absmax 0.4, error feedback 1.0, --verify
as long as the conversion), which is 23 s (12, 32) however many cores there are. --verify takes 1.3 times the
processor's time of the conversion with the same options, and reads what was written instead of writing it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import paths  # isort: skip
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHAPES = {"up_proj": (1856, 2688), "down_proj": (2688, 1856)}  # Nemotron-3-Nano's routed experts
GROUP_SIZE = 64  # divides both
PACKED_RATIO = (4 + 16 / GROUP_SIZE) / 16  # bytes of output a byte of input
GGUF_NAME = "model.gguf"
STATISTICS_NAME, RANK = "statistics.safetensors", 32
FINISHED_NAME = "finished"  # a folder that `ours` made
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def write_input(folder: Path, gigabytes: float) -> int:
    """Shards of about 1 GB of expert weights; returns the number of weights."""
    folder.mkdir()
    noise = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    layers = max(
        1, round(gigabytes * 1e9 / sum(rows * columns * 2 for rows, columns in SHAPES.values()))
    )
    weight_map, per_shard = {}, 50
    for first in range(0, layers, per_shard):
        tensors = {}
        for layer in range(first, min(first + per_shard, layers)):
            for name, (rows, columns) in SHAPES.items():
                start = layer * 7919 % (len(noise) - rows * columns)
                tensors[f"model.layers.{layer}.mlp.{name}.weight"] = (
                    noise[start : start + rows * columns].view(rows, columns).clone()
                )
        file = f"model-{first // per_shard + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    return layers * sum(rows * columns for rows, columns in SHAPES.values())


def write_gguf(source: Path, path: Path) -> None:
    """The same weights as llama.cpp names and stores them."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    layers = 0
    for file in sorted(source.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            layer, projection = re.fullmatch(
                r"model\.layers\.(\d+)\.mlp\.(up|down)_proj\.weight", name
            ).groups()
            layers = max(layers, int(layer) + 1)
            data = weight.view(torch.uint8).numpy()
            writer.add_tensor(
                f"blk.{layer}.ffn_{projection}.weight",
                data,
                raw_dtype=gguf.GGMLQuantizationType.BF16,
            )
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(2688)
    writer.add_feed_forward_length(1856)
    writer.add_head_count(21)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_statistics(source: Path) -> None:
    """What --importance takes, for each weight: random numbers, since the time does not depend on them."""
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no dict
                module, columns = (
                    name.removesuffix(".weight"),
                    weights.get_slice(name).get_shape()[1],
                )
                factor = torch.randn(
                    columns, RANK, generator=torch.Generator().manual_seed(len(tensors))
                )
                tensors |= {module: factor.square().sum(1) * 1.5, f"{module}.factor": factor.half()}
    save_file(tensors, source.parent / STATISTICS_NAME)


def run_ours(source: Path, target: Path, threads: int, *more: str, tile: int | None = None) -> None:
    import quantize_int4

    quantize_int4.TILE_WEIGHTS = tile or quantize_int4.TILE_WEIGHTS
    options = [f"--group_size={GROUP_SIZE}", "--min_free_gb=0", f"--threads={threads}", *more]
    code = quantize_int4.main([f"--input_dir={source}", f"--output_dir={target}", *options])
    assert code == 0, code


def run_feedback(source: Path, target: Path, threads: int) -> None:
    run_ours(
        source, target, threads, "--scale=mse", f"--importance={source.parent / STATISTICS_NAME}"
    )


def run_mse(source: Path, target: Path, threads: int) -> None:
    run_ours(source, target, threads, "--scale=mse")


def run_verify(source: Path, target: Path, threads: int) -> None:
    run_ours(source, source.parent / FINISHED_NAME, threads, "--verify")


def run_restore(source: Path, target: Path, threads: int) -> None:
    import quantize_int4

    options = ["--restore", "--min_free_gb=0", f"--threads={threads}"]
    assert quantize_int4.main([str(source.parent / FINISHED_NAME), str(target), *options]) == 0


def run_cat(source: Path, target: Path, threads: int) -> None:
    subprocess.run(["cat", *sorted(source.iterdir())], stdout=subprocess.DEVNULL, check=True)


def run_floor(source: Path, target: Path, threads: int) -> None:
    """Read every byte into a small buffer; write (4 + 16 / group size) bits a weight from another."""
    target.mkdir()
    files = sorted(source.glob("*.safetensors"))
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, 1 << 20)]

    def work(part: list) -> None:
        buffer, zeros = bytearray(1 << 20), memoryview(bytes(1 << 20))
        for file, start in part:
            count = os.preadv(inputs[file], [buffer], start)
            os.pwrite(outputs[file], zeros[: int(count * PACKED_RATIO)], int(start * PACKED_RATIO))

    inputs = {file: os.open(file, os.O_RDONLY) for file in files}
    outputs = {file: os.open(target / file.name, os.O_WRONLY | os.O_CREAT) for file in files}
    workers = [
        threading.Thread(target=work, args=(pieces[number::threads],)) for number in range(threads)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd in outputs.values():
        os.close(fd)


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
        codes = (
            torch.clamp(torch.round(groups / scales.unsqueeze(-1)), -8, 7)
            .to(torch.int32)
            .view(rows, columns)
        )
        packed = torch.zeros(rows, columns // 8, dtype=torch.int32)
        for i in range(8):
            packed |= (codes[:, i::8] & 0xF) << (4 * i)
        output[name.replace(".weight", ".qweight")] = packed
        output[name.replace(".weight", ".scales")] = scales.half()
    save_file(output, target / "model.safetensors")


def run_llama(source: Path, target: Path, threads: int) -> None:
    import llama_cpp

    target.mkdir()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    code = llama_cpp.llama_model_quantize(
        str(source.parent / GGUF_NAME).encode(), str(target / GGUF_NAME).encode(), parameters
    )
    assert code == 0, code


def run_llm_compressor(source: Path, target: Path, threads: int) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import model_free_ptq

    torch.set_num_threads(threads)
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model_free_ptq(source, target, scheme=scheme, device="cpu", max_workers=1)


@dataclass(frozen=True)
class Contender:
    run: Callable[[Path, Path, int], None]
    modules: tuple[str, ...] = ("quantize_int4",)  # imported before the clock starts
    cold: bool = False  # the page cache is empty at the start

    @property
    def missing(self) -> str:
        """What it takes and is not there."""
        if self.cold and not os.access(DROP_CACHES, os.W_OK):
            return "root, to drop the caches"
        return ", ".join(module for module in self.modules if not importlib.util.find_spec(module))


CONTENDERS = {
    "floor": Contender(run_floor),
    "ours": Contender(run_ours),
    "mse": Contender(run_mse),
    "feedback": Contender(run_feedback),
    "verify": Contender(run_verify),
    "restore": Contender(run_restore),
    "cat": Contender(run_cat, cold=True),
    "cold": Contender(run_ours, cold=True),
    "llama": Contender(run_llama, ("llama_cpp", "gguf")),
    "llmc": Contender(run_llm_compressor, ("llmcompressor",)),
    "obvious": Contender(run_obvious),
}
KERNELS = "kernels"
TILES = {f"tile{bits}": Contender(partial(run_ours, tile=1 << bits)) for bits in range(17, 22)}


@dataclass(frozen=True)
class Result:
    seconds: float
    peak: int  # bytes of anonymous memory
    cached: int  # bytes by which the page cache grew


def measure(name: str, source: Path, target: Path, threads: int) -> Result:
    """Run one contender in a process of its own."""
    arguments = [
        sys.executable,
        __file__,
        "--run",
        name,
        str(source),
        str(target),
        "--threads",
        str(threads),
    ]
    os.sync()  # the disk is done with what the contender before left to it
    if (CONTENDERS | TILES)[name].cold:
        DROP_CACHES.write_text("3")
        subprocess.run(
            [sys.executable, "-c", "import quantize_int4"], cwd=paths.ROOT, check=True
        )  # torch is in the cache
    else:
        subprocess.run(
            ["cat", *(path for path in source.parent.rglob("*") if path.is_file())],
            stdout=subprocess.DEVNULL,
        )
    peak, cached = 0, psutil.virtual_memory().cached
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT) as process:
            while process.poll() is None:
                with open(f"/proc/{process.pid}/status") as status:
                    peak = max(
                        [
                            peak,
                            *(
                                int(kb) * 1024
                                for kb in re.findall(r"RssAnon:\s+(\d+)", status.read())
                            ),
                        ]
                    )
                time.sleep(0.02)
        log.seek(0)
        text = log.read()
    seconds = re.search(r"^seconds (\S+)$", text, re.MULTILINE)
    if process.returncode or not seconds:
        sys.exit(f"{name} failed:\n{text}")
    cached = psutil.virtual_memory().cached - cached
    shutil.rmtree(target, ignore_errors=True)  # --verify makes none
    return Result(float(seconds[1]), peak, cached)


def print_table(results: dict[str, list[Result]], weights: int) -> None:
    medians = {
        name: statistics.median(run.seconds for run in runs) for name, runs in results.items()
    }
    titles = f"{'memory GB':>11}{'cached GB':>11}{'x floor':>9}{'x ours':>9}"
    print(f"{'':<10}{'seconds':>9}{'GB/s':>8}{'Mweights/s':>12}{titles}")
    for name, seconds in medians.items():
        peak, cached = (
            statistics.median(getattr(run, kind) for run in results[name])
            for kind in ("peak", "cached")
        )
        ratios = [
            f"{seconds / medians[other]:9.2f}" if other in medians else f"{'':>9}"
            for other in ("floor", "ours")
        ]
        print(
            f"{name:<10}{seconds:9.2f}{weights * 2 / seconds / 1e9:8.2f}{weights / seconds / 1e6:12.0f}",
            end="",
        )
        print(f"{peak / 1e9:11.2f}{cached / 1e9:11.2f}{''.join(ratios)}".rstrip())


def time_call(call: Callable[[], object], weights: int) -> float:
    """The median nanoseconds a weight, of the processor, so that other programs disturb it less."""
    seconds = []
    for _ in range(30):
        started = time.thread_time()
        call()
        seconds.append(time.thread_time() - started)
    return statistics.median(seconds) / weights * 1e9


def time_kernels() -> dict[str, float]:
    """Nanoseconds a weight of each kernel, for bf16 weights and float16 scales in groups of GROUP_SIZE."""
    import quantize_int4 as q

    torch.set_num_threads(1)
    rows, columns = 256, 2688
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    groups = weights.view(-1, GROUP_SIZE)
    importance = torch.rand(columns)
    factor = torch.randn(columns, RANK) * 0.1
    mean_squares = importance + factor.square().sum(1)
    packing = q.Packing(4, GROUP_SIZE)
    workspace = q.Workspace()
    words, scales = q.make_results(workspace, len(groups), torch.float16, packing)
    nanoseconds = {}
    for variant, name in (("ABSMAX", "absmax"), ("SEARCH", "mse"), ("FEEDBACK", "feedback")):
        kernel = q.compile_kernel(q.KernelKind("quantize", "BF16", variant))
        rounding = q.Rounding(kernel=kernel)
        if variant != "ABSMAX":
            rounding = replace(rounding, importance=importance.view(-1, GROUP_SIZE))
        if variant == "FEEDBACK":
            feedback = q.feedback_of(mean_squares, factor.clone(), kernel)
            rounding = replace(rounding, feedback=feedback)
        call = partial(q.quantize_into, words, scales, groups, workspace, rounding)
        nanoseconds[name] = time_call(call, weights.numel())
    energy = q.OutputEnergy.of(mean_squares, factor)
    rows_of = words.view(rows, -1), scales.view(rows, -1)
    for variant, name in (("ERRORS", "verify"), ("OUTPUTS", "verify, of outputs too")):
        kernel = q.compile_kernel(q.KernelKind("measure", "BF16", variant))
        given = energy if variant == "OUTPUTS" else None
        measuring = q.Measuring(packing, False, True, given, kernel)
        call = partial(q.measure, weights, *rows_of, measuring, workspace)
        nanoseconds[name] = time_call(call, weights.numel())
    return nanoseconds


def print_kernels() -> None:
    parts = [f"{name} {number:.3f}" for name, number in time_kernels().items()]
    print(f"kernels alone, nanoseconds a bf16 weight: {'; '.join(parts)}")


def run_contender(name: str, source: Path, target: Path, threads: int) -> None:
    contender = (CONTENDERS | TILES)[name]
    for module in contender.modules:
        importlib.import_module(module)
    started = time.perf_counter()
    contender.run(source, target, threads)
    for path in target.rglob("*"):  # not all contenders do it themselves
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    print(f"\nseconds {time.perf_counter() - started:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=[*CONTENDERS, *TILES, KERNELS])
    parser.add_argument("--dir", type=Path)
    parser.add_argument(
        "--run", nargs=3, metavar=("NAME", "SOURCE", "TARGET"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.run:
        name, source, target = args.run
        run_contender(name, Path(source), Path(target), args.threads)
        return
    missing = {
        name: contender.missing for name, contender in CONTENDERS.items() if contender.missing
    }
    if args.only == [KERNELS]:
        print_kernels()
        return
    names = [name for name in args.only or () if name != KERNELS] or [
        name for name in CONTENDERS if name not in missing
    ]
    for name, what in missing.items() if not args.only else ():
        print(f"not run: {name}, which needs {what}")
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        source, target = Path(scratch) / "in", Path(scratch) / "out"
        weights = write_input(source, args.gb)
        if "feedback" in names:
            write_statistics(source)
        if "llama" in names:
            write_gguf(source, Path(scratch) / GGUF_NAME)
        if {"verify", "restore"} & {*names}:
            folders = [str(source), str(source.parent / FINISHED_NAME)]
            options = [f"--group_size={GROUP_SIZE}", "--min_free_gb=0"]
            subprocess.run(
                [sys.executable, paths.ROOT / "quantize_int4.py", *folders, *options],
                stdout=subprocess.DEVNULL,
            )
        results = {name: [] for name in names}
        for round_number in range(args.rounds + 1):
            for name in names:
                run = measure(name, source, target, args.threads)
                if round_number:  # the first round warms the caches
                    results[name].append(run)
        print(
            f"{weights / 1e6:.0f} million bf16 weights, {args.threads} threads, median of {args.rounds} rounds"
        )
        print_table(results, weights)
    print_kernels()


if __name__ == "__main__":
    main()
