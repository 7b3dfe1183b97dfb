"""Small random models with layers that predict further tokens (MTP), in the names of the hub's checkpoints.

transformers makes the models and writes none of these layers, so that they are made here of the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from conftest import quantize
from folders import edit_json, read_tensors, write_dense_twin
from safetensors.torch import save_file

H = 256
COMMON = {"vocab_size": 320, "hidden_size": H, "max_position_embeddings": 512}
COMMON |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
UNTIED = {"tie_word_embeddings": False}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
LATENT_ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
EXPERTS = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 384,
    "moe_intermediate_size": 192,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
LINEAR_ATTENTION = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "moe_intermediate_size": 192,
    "shared_expert_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
VISION = {
    "depth": 1,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": H,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
TOKENS = {"image_token_id": 250, "video_token_id": 251}
TOKENS |= {"vision_start_token_id": 252, "vision_end_token_id": 253}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
    "mamba_num_heads": 64,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 192,
    "moe_shared_expert_intermediate_size": 384,
    "intermediate_size": 192,
    "moe_latent_size": 128,
    "n_group": 1,
    "topk_group": 1,
}


@dataclass(frozen=True)
class MtpFamily:
    """One kind of model with MTP."""

    model_class: str
    config: Callable[[], transformers.PretrainedConfig]
    # The layers of MTP, and those of the model that they are made like, by the ends of their paths.
    layers: dict[str, str]
    # The projection that they begin with, and their norms.
    entry: str
    norms: tuple[str, ...]
    # A pattern that means all of MTP.
    pattern: str
    # What config.json says beside what transformers writes; None for what is left out.
    promises: dict = field(default_factory=lambda: {"num_nextn_predict_layers": 1})


QWEN_NORMS = ("mtp.norm", "mtp.pre_fc_norm_hidden", "mtp.pre_fc_norm_embedding")
NUMBERED = {
    "layers": {"model.layers.2.": "layers.1."},
    "entry": "model.layers.2.eh_proj",
    "norms": tuple(f"model.layers.2.{name}" for name in ("enorm", "hnorm", "shared_head.norm")),
    "pattern": r"layers\.2\.",
}
MTP_FAMILIES = {
    "nemotron_h": MtpFamily(
        "NemotronHForCausalLM",
        lambda: transformers.NemotronHConfig(**COMMON, **ATTENTION, **NEMOTRON),
        {"mtp.layers.0.": "layers.3.", "mtp.layers.1.": "layers.4."},
        "mtp.layers.0.eh_proj",
        ("mtp.layers.0.enorm", "mtp.layers.0.hnorm", "mtp.layers.1.final_layernorm"),
        "mtp",
        {
            "num_nextn_predict_layers": 1,
            "hybrid_override_pattern": "MEM*E",
            "mtp_hybrid_override_pattern": "*E",
            "layers_block_type": None,
            "mtp_layers_block_type": None,
            "layer_types": None,
        },
    ),
    "qwen3_next": MtpFamily(
        "Qwen3NextForCausalLM",
        lambda: transformers.Qwen3NextConfig(
            **COMMON, **ATTENTION, **UNTIED, **LINEAR_ATTENTION, intermediate_size=384
        ),
        {"mtp.layers.0.": "layers.1."},
        "mtp.fc",
        QWEN_NORMS,
        "mtp",
    ),
    # Its MTP has stacks of experts, as Qwen3.6's on the hub.
    "qwen3_5_moe": MtpFamily(
        "Qwen3_5MoeForConditionalGeneration",
        lambda: transformers.Qwen3_5MoeConfig(
            text_config={**COMMON, **ATTENTION, **LINEAR_ATTENTION, "mtp_num_hidden_layers": 1},
            vision_config=VISION,
            **TOKENS,
            **UNTIED,
        ),
        {"mtp.layers.0.": "language_model.layers.1."},
        "mtp.fc",
        QWEN_NORMS,
        "mtp",
        {},
    ),
    "glm4_moe": MtpFamily(
        "Glm4MoeForCausalLM",
        lambda: transformers.Glm4MoeConfig(
            **COMMON, **ATTENTION, **UNTIED, **EXPERTS, n_group=1, topk_group=1, use_qk_norm=True
        ),
        **NUMBERED,
    ),
    "deepseek_v3": MtpFamily(
        "DeepseekV3ForCausalLM",
        lambda: transformers.DeepseekV3Config(
            **COMMON, **LATENT_ATTENTION, **UNTIED, **EXPERTS, n_group=2, topk_group=1
        ),
        **NUMBERED,
        promises={"num_nextn_predict_layers": 1, "topk_method": "noaux_tc"},
    ),
}

# What to do with MTP, whose pattern is {}.
FATES = {
    "quantized": [],
    "kept": ["--exclude", "{}"],
    "experts and one projection kept": ["--exclude", r"{}.*(experts|o_proj)(\.|$)"],
    "in 8 bits": ["--int8", r"{}(?!.*experts\.\d)"],
    "experts in 8 bits": ["--int8", r"{}.*experts\.\d"],
}


def convert_with_mtp(name: str, fate: str, folder: Path) -> None:
    """Write a family's model, quantized as `FATES` says, and the dense twin: `out` and `twin`."""
    save_with_mtp(name, folder / "source")
    options = [option.replace("{}", MTP_FAMILIES[name].pattern) for option in FATES[fate]]
    fixed = ["--format", "compressed-tensors", "--group_size", 64, "--scale", "absmax"]
    quantize(folder / "source", folder / "out", *fixed, *options)
    write_dense_twin(folder / "out", folder / "twin")


def save_with_mtp(name: str, folder: Path) -> None:
    """Write a family's model with its layers that predict further tokens."""
    family = MTP_FAMILIES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, family.model_class)
    model = model_class._from_config(family.config(), dtype=torch.bfloat16)
    with torch.no_grad():
        for tensor in {*model.parameters(), *model.buffers()}:
            if tensor.is_floating_point():
                tensor += 0.05 * torch.randn(tensor.shape)
    model.save_pretrained(folder)
    tensors = read_tensors(folder)
    tensors |= further_layers(family, tensors)
    if family.pattern != "mtp":
        tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", lambda config: promise(config, family.promises))


def further_layers(family: MtpFamily, tensors: dict) -> dict[str, torch.Tensor]:
    """Make the layers of MTP: of the shapes of the model's, with weights of their own."""
    made = {f"{family.entry}.weight": 0.05 * torch.randn(H, 2 * H)}
    made |= {f"{norm}.weight": 1 + 0.05 * torch.randn(H) for norm in family.norms}
    made = {name: tensor.bfloat16() for name, tensor in made.items()}
    for target, like in family.layers.items():
        for name, tensor in tensors.items():
            inside = re.match(rf"(?!.*visual).*\b{re.escape(like)}(.*)", name)
            if inside:
                other = tensor + 0.05 * torch.randn(tensor.shape)
                made[target + inside[1]] = other.to(tensor.dtype)
    return made


def promise(config: dict, values: dict) -> None:
    """Write what config.json on the hub says of MTP."""
    for key, value in values.items():
        config[key] = value
        if value is None:
            del config[key]
