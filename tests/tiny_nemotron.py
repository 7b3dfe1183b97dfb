#!/usr/bin/env python3
"""Write a small checkpoint with NemotronH's real tensor names and kinds.

    python tests/tiny_nemotron.py OUT_DIR

Two bf16 shards with an index, config.json and tokenizer files; random weights, the same at every run. Needs torch
and safetensors. `nemotron_tensors(NANO_30B)` is the full inventory of Nemotron-3-Nano-30B: 6,243 tensors, 63.2 GB.
`lightning_tensors()` is that of its successor with the layers that predict a further token.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

warnings.filterwarnings(
    "ignore", message="Failed to initialize NumPy"
)  # torch without numpy says so; we need none
import torch  # noqa: E402
from checkpoints import write_checkpoint  # noqa: E402


@dataclass(frozen=True)
class NemotronConfig:
    """The sizes that decide the tensors' shapes, by their names in NemotronH's config.json."""

    hybrid_override_pattern: str  # a letter a layer: M Mamba, * attention, E mixture of experts
    vocab_size: int
    hidden_size: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int


NANO_30B = NemotronConfig(
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    vocab_size=131072,
    hidden_size=2688,
    mamba_num_heads=64,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    conv_kernel=4,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
)

TINY = NemotronConfig(
    hybrid_override_pattern="ME*E",
    vocab_size=512,
    hidden_size=256,
    mamba_num_heads=8,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    conv_kernel=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=192,  # 1.5 groups of 128, as the real 1,856 are 14.5
    moe_shared_expert_intermediate_size=384,
)


def nemotron_tensors(config: NemotronConfig) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor, in the order of the layers."""
    tensors = {"backbone.embeddings.weight": (config.vocab_size, config.hidden_size)}
    layer_kinds = {"M": _mamba_shapes, "*": _attention_shapes, "E": _moe_shapes}
    for number, kind in enumerate(config.hybrid_override_pattern):
        layer = f"backbone.layers.{number}"
        tensors[f"{layer}.norm.weight"] = (config.hidden_size,)
        tensors |= {
            f"{layer}.mixer.{name}": shape for name, shape in layer_kinds[kind](config).items()
        }
    tensors["backbone.norm_f.weight"] = (config.hidden_size,)
    tensors["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    float32 = "e_score_correction_bias"
    return {
        n: (torch.float32 if n.endswith(float32) else torch.bfloat16, shape)
        for n, shape in tensors.items()
    }


LIGHTNING_LAYERS = {"M": "mamba", "*": "attention", "E": "moe"}


def lightning_tensors() -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The inventory of Nemotron-3.5-Lightning-30B: Nano's layers under `model.`, and two more that predict a further
    token (MTP): one of attention, one of experts."""
    tensors = {}
    for name, entry in nemotron_tensors(NANO_30B).items():
        tensors[name.replace("backbone.", "model.")] = entry

    config, hidden = NANO_30B, NANO_30B.hidden_size
    shapes = {
        "0.enorm.weight": (hidden,),
        "0.hnorm.weight": (hidden,),
        "0.eh_proj.weight": (hidden, 2 * hidden),
        "0.norm.weight": (hidden,),
        **{f"0.mixer.{name}": shape for name, shape in _attention_shapes(config).items()},
        "1.norm.weight": (hidden,),
        **{f"1.mixer.{name}": shape for name, shape in _moe_shapes(config).items()},
        "1.final_layernorm.weight": (hidden,),
    }
    for name, shape in shapes.items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        tensors[f"mtp.layers.{name}"] = (dtype, shape)
    return tensors


def write_lightning_config(folder: Path) -> None:
    """config.json as transformers 5 writes it: a list of layers in place of a pattern and a count."""
    sizes = asdict(NANO_30B)
    pattern = sizes.pop("hybrid_override_pattern")
    config = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": "bfloat16",
        "layers_block_type": [LIGHTNING_LAYERS[letter] for letter in pattern],
        "mtp_layers_block_type": ["attention", "moe"],
        "num_nextn_predict_layers": 1,
        "num_experts_per_tok": 6,
        "max_position_embeddings": 1 << 20,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _mamba_shapes(config: NemotronConfig) -> dict[str, tuple[int, ...]]:
    heads, inner = config.mamba_num_heads, config.mamba_num_heads * config.mamba_head_dim
    convolved = inner + 2 * config.n_groups * config.ssm_state_size
    return {
        "A_log": (heads,),
        "D": (heads,),
        "conv1d.bias": (convolved,),
        "conv1d.weight": (convolved, 1, config.conv_kernel),
        "dt_bias": (heads,),
        "in_proj.weight": (inner + convolved + heads, config.hidden_size),
        "norm.weight": (inner,),
        "out_proj.weight": (config.hidden_size, inner),
    }


def _attention_shapes(config: NemotronConfig) -> dict[str, tuple[int, ...]]:
    query, key = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    return {
        "k_proj.weight": (key, config.hidden_size),
        "o_proj.weight": (config.hidden_size, query),
        "q_proj.weight": (query, config.hidden_size),
        "v_proj.weight": (key, config.hidden_size),
    }


def _moe_shapes(config: NemotronConfig) -> dict[str, tuple[int, ...]]:
    hidden, routed, shared = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.moe_shared_expert_intermediate_size,
    )
    shapes = {
        "gate.e_score_correction_bias": (config.n_routed_experts,),
        "gate.weight": (config.n_routed_experts, hidden),
    }
    for number in range(config.n_routed_experts):
        shapes[f"experts.{number}.up_proj.weight"] = (routed, hidden)
        shapes[f"experts.{number}.down_proj.weight"] = (hidden, routed)
    shapes["shared_experts.up_proj.weight"] = (shared, hidden)
    shapes["shared_experts.down_proj.weight"] = (hidden, shared)
    return shapes


def random_tensors(config: NemotronConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        for name, (dtype, shape) in nemotron_tensors(config).items()
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def byte_letters() -> dict[str, int]:
    """The letters that stand for the 256 bytes in a tokenizer: those that can be printed are their own."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(number) for number in range(256, 512))
    return {chr(byte) if byte in printable else next(others): byte for byte in range(256)}


def write_other_files(folder: Path, config: NemotronConfig) -> None:
    """config.json and tokenizer files; the vocabulary is the 256 bytes."""
    layers = len(config.hybrid_override_pattern)
    texts = {
        "config.json": {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "torch_dtype": "bfloat16",
            "num_hidden_layers": layers,
            **asdict(config),
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "special_tokens_map.json": {},
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": BYTES,
            "decoder": BYTES,
            "model": {"type": "BPE", "vocab": byte_letters(), "merges": []},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 4096,
        },
    }
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}{% endfor %}\n"
    )


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/tiny_nemotron.py OUT_DIR")
    folder, tensors = Path(sys.argv[1]), random_tensors(TINY)
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "tiny"
        write_checkpoint(fresh, tensors)
        write_other_files(fresh, TINY)
        if folder.exists():  # files of another time would be another checkpoint
            names = sorted(path.name for path in fresh.iterdir())
            different = filecmp.cmpfiles(fresh, folder, names, shallow=False)[1:]
            if any(different) or names != sorted(path.name for path in folder.iterdir()):
                sys.exit(f"{folder} exists and holds something else: choose another name")
        else:
            shutil.copytree(fresh, folder)
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    print(f"{folder}: {len(tensors)} tensors, {megabytes:.2f} MB of random weights in 2 shards")


if __name__ == "__main__":
    main()
