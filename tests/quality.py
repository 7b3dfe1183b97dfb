#!/usr/bin/env python3
"""Perplexity of a small model before and after quantization, by how the scales are chosen.

    python tests/quality.py [--minutes 4] [--group_size 128]

Trains a byte-level Llama from scratch on the Python standard library's sources, collects --importance with README.md's
own snippet on a part of the training text, quantizes with each kind of scale, and measures the perplexity of the
dequantized models on modules that the training did not see. Needs tests/requirements.txt.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from quantize_int4 import dequantize_int4  # noqa: E402

CONTEXT, BATCH = 256, 16
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=CONTEXT,
)


def read_sources() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the standard library's top-level modules: nine in ten to train on, one in ten held out."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [[], []]
    for number, path in enumerate(paths):
        parts[number % 10 == 9].append(path.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train, held_out


def batches(text: torch.Tensor, count: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + CONTEXT].long() for start in starts])


def train(text: torch.Tensor, seconds: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    started = time.monotonic()
    for step, batch in enumerate(batches(text, 100_000, seed=0)):
        done = (time.monotonic() - started) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, step / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {step} steps, {step * BATCH * CONTEXT / 1e6:.1f} MB of text", flush=True)
    return model.to(torch.bfloat16).float().eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, text: torch.Tensor) -> float:
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in batches(text, 40, seed=1)]
    return math.exp(sum(losses) / len(losses))


def collect_importance(model: LlamaForCausalLM, text: torch.Tensor, folder: Path) -> Path:
    """Run README.md's snippet as it is printed there."""
    readme = (ROOT / "README.md").read_text()
    snippet = re.search(r"```python\n(import torch\nfrom safetensors.torch import save_file.*?)```", readme, re.DOTALL)[
        1
    ]
    prompts = [{"input_ids": batch} for batch in batches(text, 30, seed=2)]
    snippet = snippet.replace('"importance.safetensors"', repr(str(folder / "importance.safetensors")))
    exec(snippet, {"model": model, "batches": prompts})
    return folder / "importance.safetensors"


def quantized_perplexity(model: LlamaForCausalLM, source: Path, target: Path, text: torch.Tensor, *options) -> float:
    arguments = [sys.executable, ROOT / "quantize_int4.py", "--input_dir", source, "--output_dir", target, *options]
    subprocess.run([str(argument) for argument in [*arguments, "--min_free_gb", 0]], check=True, capture_output=True)
    config = json.loads((target / "quantize_config.json").read_text())
    tensors = load_file(target / "model-00001.safetensors")
    state = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith((".qweight", ".scales"))}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        columns = model.state_dict()[f"{module}.weight"].shape[1]
        packed = (tensors[name], tensors[f"{module}.scales"], config["group_size"])
        state[f"{module}.weight"] = dequantize_int4(*packed, columns=columns)
    quantized = LlamaForCausalLM(CONFIG).eval()
    quantized.load_state_dict(state)
    return perplexity(quantized, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--group_size", type=int, nargs="+", default=[128, 64, 32])
    args = parser.parse_args()
    train_text, held_out = read_sources()
    model = train(train_text, args.minutes * 60)
    base = perplexity(model, held_out)
    print(f"{'':<36}{'perplexity':>11}{'increase':>10}")
    print(f"{'bf16':<36}{base:>11.4f}")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "in"
        model.to(torch.bfloat16).save_pretrained(source)
        model.float()
        importance = collect_importance(model, train_text, Path(scratch))
        kinds = {
            "absmax": [],
            "mse": ["--scale", "mse"],
            "mse with importance": ["--scale", "mse", "--importance", importance],
        }
        for group_size in args.group_size:
            for kind, options in kinds.items():
                target = Path(scratch) / f"{group_size} {kind}"
                value = quantized_perplexity(model, source, target, held_out, "--group_size", group_size, *options)
                print(f"{f'int4, group {group_size}, {kind}':<36}{value:>11.4f}{value / base - 1:>10.2%}", flush=True)


if __name__ == "__main__":
    main()
