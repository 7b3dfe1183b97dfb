"""What well-known multimodal models become: dry runs of inventories made from their configs, for the README's table.

    python tests/tools/inventories.py [MODEL ...]

An inventory has every tensor's name, dtype and shape, as `save_pretrained` of transformers writes them, and no data: its
files are sparse. The configs are those of the models on the hub. Needs tests/requirements.txt and 1 GB of memory.

What was found, with groups of 128, and on which Orin the result fits, of which the system takes about 2 GB, so that room
for caches is left (calculated):

                     bf16      of it vision   in 4 bits   fits
    Qwen2.5-VL-3B    7.51 GB   1.33 GB        3.39 GB     8 GB
    Qwen2.5-VL-7B    16.6 GB   1.35 GB        6.90 GB     16 GB
    Qwen3-VL-4B      8.88 GB   0.82 GB        3.48 GB     8 GB
    Qwen3-VL-8B      17.5 GB   1.14 GB        7.22 GB     16 GB
    Gemma-3-4B       8.60 GB   0.82 GB        3.84 GB     8 GB
    Gemma-3-12B      24.4 GB   0.82 GB        8.41 GB     16 GB
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import paths
import torch
import transformers
from checkpoints import write_sparse_checkpoint
from meta_models import Built

QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
}
QWEN3_VISION = {
    "patch_size": 16,
    "num_heads": 16,
    "num_position_embeddings": 2304,
}
QWEN3_TEXT = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
GEMMA3_TEXT = {"head_dim": 256, "vocab_size": 262208}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def qwen2_5_vl(tied: bool, **text: int) -> transformers.PreTrainedConfig:
    vision = QWEN2_5_VISION | {"out_hidden_size": text["hidden_size"]}
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied
    )


def qwen3_vl(tied: bool, vision: dict, **text: int) -> transformers.PreTrainedConfig:
    vision = QWEN3_VISION | vision | {"out_hidden_size": text["hidden_size"]}
    return transformers.Qwen3VLConfig(
        text_config=QWEN3_TEXT | text, vision_config=vision, tie_word_embeddings=tied
    )


def gemma3(**text: int) -> transformers.PreTrainedConfig:
    return transformers.Gemma3Config(text_config=GEMMA3_TEXT | text, vision_config=SIGLIP)


CONFIGS = {
    "Qwen2.5-VL-3B": lambda: qwen2_5_vl(
        True,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
    ),
    "Qwen2.5-VL-7B": lambda: qwen2_5_vl(
        False,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
    "Qwen3-VL-4B": lambda: qwen3_vl(
        True,
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        hidden_size=2560,
        intermediate_size=9728,
    ),
    "Qwen3-VL-8B": lambda: qwen3_vl(
        False,
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        hidden_size=4096,
        intermediate_size=12288,
    ),
    "Gemma-3-4B": lambda: gemma3(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "Gemma-3-12B": lambda: gemma3(
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
}
CLASSES = {
    "Qwen2.5-VL": "Qwen2_5_VLForConditionalGeneration",
    "Qwen3-VL": "Qwen3VLForConditionalGeneration",
    "Gemma-3": "Gemma3ForConditionalGeneration",
}


def write_inventory(name: str, folder: Path) -> None:
    """Write a model's inventory: all that a dry run reads."""
    config = CONFIGS[name]()
    model_class = getattr(transformers, CLASSES[name.rpartition("-")[0]])
    with torch.device("meta"):
        built = Built(config.model_type, model_class(config))
    shapes = {
        tensor: (torch.bfloat16, shape)
        for tensor, shape in built.in_file.items()
        if not (config.tie_word_embeddings and tensor.endswith("lm_head.weight"))
    }
    folder.mkdir()
    write_sparse_checkpoint(folder, shapes, shards=2)
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)


def main(names: list[str]) -> None:
    for name in names or CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "source")
            write_inventory(name, source)
            command = [
                sys.executable,
                paths.ROOT / "quantize_int4.py",
                source,
                Path(folder, "out"),
                "--dry_run",
            ]
            result = subprocess.run(
                [*command, "--format", "compressed-tensors"], capture_output=True, text=True
            )
            rows = re.findall(
                r"^(?:How:|input|quantized|  \w.*whole|output).*", result.stdout, re.MULTILINE
            )
            print(name, *rows, result.stderr, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
