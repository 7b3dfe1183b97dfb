"""Models of every type that transformers has, on the meta device: names and shapes as in memory and in its files."""

from __future__ import annotations

import functools
import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
import transformers
from checkpoints import DTYPE_NAMES
from torch import nn
from transformers import conversion_mapping, core_model_loading
from transformers.initialization import no_init_weights
from transformers.models.auto import configuration_auto, modeling_auto

import quantize_int4

FOLDERS = Path(transformers.__file__).parent / "models"
FEW = {"num_hidden_layers": 5}
SMALL_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
TABLE_OF_WORDS = {
    "ple_layer_ids": [1],
    "eos_token_id": 1,
    "ngram_vocab_size_base": 1000,
    "split_ngram_parts": 4,
}
# Layers and experts, by the names that configs have for their numbers: more of them are alike.
LAYERS = 5
EXPERTS = 8
FEW_OF = {
    "num_hidden_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_num_layers": LAYERS,
    "decoder_num_layers": LAYERS,
    "num_layers": LAYERS,
    "depth": LAYERS,
    "n_routed_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
}
# What a default config lacks, by type: without it there is no model, or none with experts.
SETTINGS = {
    "dbrx": {
        "n_layers": 2,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 4},
        "ffn_config": {"moe_num_experts": 4, "ffn_hidden_size": 64},
    },
    "deepseek_ocr2": {
        "text_config": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]}
    },
    "deepseek_ocr2_text": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {"text_config": SMALL_EXPERTS},
    "diffusion_gemma_text": SMALL_EXPERTS,
    "dots1": FEW
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
    "gemma4": {"text_config": FEW | SMALL_EXPERTS | {"enable_moe_block": True}},
    "gemma4_text": FEW | SMALL_EXPERTS | {"enable_moe_block": True},
    "hunyuan_v1_moe": FEW | {"head_dim": 64, "num_experts": 4},
    "hunyuan_vl": {"text_config": FEW | {"head_dim": 64}},
    "lfm2_moe": FEW | {"layer_types": ["conv", "full_attention", "conv", "conv", "conv"]},
    "hunyuan_vl_text": FEW | {"head_dim": 64},
    "qwen4_exp": {"text_config": FEW | INDEXER | TABLE_OF_WORDS},
    "qwen4_exp_text": FEW | INDEXER | TABLE_OF_WORDS,
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 2}},
    "emu3": {"text_config": FEW, "vocabulary_map": {"<image>": 1}},
    "esm": FEW | {"vocab_size": 64},
    "inkling2": {},  # whose layers differ beyond the fifth
    "switch_transformers": {},  # too few layers have no experts or nothing else
}
BROKEN = {  # what transformers 5.24.0 cannot build from its own config, or not without other packages
    "": "a config without a type",
    "gemma3n": "timm",
    "gemma3n_vision": "timm",
    "qwen3_omni_moe_talker_text": "its config has no shared_expert_intermediate_size",
    "t5gemma2": "its config has no dropout_rate",
    "t5gemma2_decoder": "its config has no dropout_rate",
    "t5gemma2_encoder": "its config has no dropout_rate",
    "t5gemma2_text": "its config has no dropout_rate",
    "timm_wrapper": "timm",
}
AUTO_CLASSES = (  # for types whose classes are those of another folder
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)


@dataclass(frozen=True)
class Built:
    """A model without weights, and how `save_pretrained` and `from_pretrained` name its tensors."""

    model_type: str
    model: nn.Module
    # In place of the conversions that transformers has for a dense model.
    converters: list | None = None

    @functools.cached_property
    def config(self) -> dict:
        """Give config.json's content."""
        return self.model.config.to_dict()

    @functools.cached_property
    def in_memory(self) -> dict[str, tuple[int, ...]]:
        """Give the shapes of the model's tensors by their names in memory."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @functools.cached_property
    def in_file(self) -> dict[str, tuple[int, ...]]:
        """Give the shapes of the tensors that `save_pretrained` writes, by their names there."""
        saved = core_model_loading.revert_weight_conversion(self.model, self.model.state_dict())
        return {name: tuple(tensor.shape) for name, tensor in saved.items()}

    @functools.cached_property
    def linear(self) -> set[str]:
        """Name the layers that compressed-tensors takes for quantized unless an entry keeps them."""
        return {name for name, part in self.model.named_modules() if isinstance(part, nn.Linear)}

    @functools.cached_property
    def transforms(self) -> list:
        """List what is renamed and converted as the model is loaded."""
        if self.converters is not None:
            return self.converters
        return conversion_mapping.get_model_conversion_mapping(self.model, add_legacy=False)

    @functools.cached_property
    def _transforms(self) -> tuple[list, list]:
        kinds = (core_model_loading.WeightRenaming, core_model_loading.WeightConverter)
        renamings, converters = ([t for t in self.transforms if isinstance(t, k)] for k in kinds)
        return renamings, converters

    def load(self, name: str) -> tuple[list[str], list[str]]:
        """Say which of the model's tensors a file's tensor becomes, and by which operations, as the loader does."""
        renamings, converters = self._transforms
        base, here = self.model.base_model_prefix, dict.fromkeys(self.in_memory, True)
        renamed, pattern = core_model_loading.rename_source_key(
            name, renamings, converters, base, here
        )
        if renamed not in here and name in here:
            return [name], []
        if pattern is None:
            return [renamed], []
        converter = next(c for c in converters if pattern in c.source_patterns)
        first, *others = converter.target_patterns
        targets = [renamed, *(renamed.replace(first, other) for other in others)]
        return targets, [type(operation).__name__ for operation in converter.operations]


def as_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, quantize_int4.TensorInfo]:
    """Describe tensors of these shapes as a checkpoint's headers do."""
    file, location = Path("model.safetensors"), quantize_int4.InFile(0)
    return {
        name: quantize_int4.TensorInfo(
            name,
            DTYPE_NAMES[torch.bfloat16],
            shape,
            nbytes=0,
            file=file,
            location=location,
            name_in_file=name,
        )
        for name, shape in shapes.items()
    }


def sources_of(folder: str) -> str:
    """Read the source of a folder's models."""
    path = FOLDERS / folder / f"modeling_{folder}.py"
    return path.read_text() if path.exists() else ""


def types_of(folder: str) -> list[str]:
    """Name the types of models that a folder has configs of."""
    path = FOLDERS / folder / f"configuration_{folder}.py"
    text = path.read_text() if path.exists() else ""
    return re.findall(r"^    model_type = \"(.+?)\"", text, re.MULTILINE)


def folders_with_experts() -> list[str]:
    """Name the folders whose models have experts, or whose models are those of another folder."""
    names = [path.name for path in sorted(FOLDERS.iterdir()) if types_of(path.name)]
    return [name for name in names if "expert" in sources_of(name) or not sources_of(name)]


def folders_with_conversions() -> list[str]:
    """Name the folders of which transformers' mapping names a type or a class."""
    conversion_mapping.get_checkpoint_conversion_mapping("")
    known = conversion_mapping._checkpoint_conversion_mapping_cache.keys()
    found = []
    for path in sorted(FOLDERS.iterdir()):
        classes = re.findall(r"^class (\w+)\(", sources_of(path.name), re.MULTILINE)
        if known & {*types_of(path.name), *classes}:
            found.append(path.name)
    return found


def build_models(folder: str) -> list[Built]:
    """Build one model of each type that a folder has: what generates text, or else the first that can be built."""
    return [
        Built(config_class.model_type, build_one(config_class, candidates))
        for config_class, candidates in find_classes(folder).items()
        if config_class.model_type not in BROKEN
    ]


def find_classes(folder: str) -> dict[type, list[type]]:
    """Find a folder's configs and their classes of models, those that generate text first."""
    classes: dict[type, list[type]] = {}
    if sources_of(folder):
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        for name, found in vars(module).items():
            if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
                continue
            own = found.__module__ == module.__name__ and not name.endswith("PreTrainedModel")
            if own and found.config_class is not None:
                classes.setdefault(found.config_class, []).append(found)
    known = {config_class.model_type for config_class in classes}
    for model_type in types_of(folder):
        named = [getattr(modeling_auto, table).get(model_type) for table in AUTO_CLASSES]
        borrowed = [name if isinstance(name, str) else name[0] for name in named if name]
        if model_type not in known and borrowed:
            config_class = configuration_auto.CONFIG_MAPPING[model_type]
            classes[config_class] = [getattr(transformers, name) for name in borrowed]
    return {config: sorted(found, key=_order) for config, found in classes.items()}


def _order(model_class: type) -> tuple[bool, bool, str]:
    name = model_class.__name__
    whole = "ForConditionalGeneration" in name
    return not whole, "ForCausalLM" not in name, name


def small_settings(config_class: type) -> list[dict]:
    """Give the settings of a small model, if its config can be made from nothing."""
    try:
        default = config_class().to_dict()
    except Exception:  # whatever a config that lacks something gives
        return []
    return [fewer(default)]


def fewer(config: dict) -> dict:
    """Give the entries by which a config, and all configs in it, have few layers and experts."""
    few = {
        name: FEW_OF[name]
        for name, value in config.items()
        if name in FEW_OF and isinstance(value, int) and value > FEW_OF[name]
    }
    for name, part in config.items():
        if isinstance(part, dict) and part.get("model_type"):
            few[name] = {"model_type": part["model_type"]} | fewer(part)
    return few


def build_one(config_class: type, candidates: list[type]) -> nn.Module:
    """Build the first of these classes that a config of few layers, or else the default one, is enough for."""
    problems = []
    settings = [*small_settings(config_class), FEW, {"text_config": FEW}, {}]
    if config_class.model_type in SETTINGS:
        settings = [SETTINGS[config_class.model_type]]
    for model_class in candidates:
        for setting in settings:
            try:
                config = config_class(**setting)
                with torch.device("meta"), no_init_weights():
                    return model_class(config)
            except Exception as problem:  # whatever a config that does not fit gives
                problems.append(f"{model_class.__name__}({setting}): {problem!r}")
    raise AssertionError(f"no model of type {config_class.model_type!r}: {'; '.join(problems)}")
