"""Families of models, in tiny, and the ways in which a trained model of each is saved: what the proofs by family share.

Each model is built by transformers and random in every parameter, no two alike. Sizes are such that vLLM's Marlin
classes take them as they are: 256 columns, rows in multiples of 64.
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from conftest import least_size, run_cli
from folders import read_config, read_tensors
from safetensors.torch import save_file

torch.set_num_threads(
    1
)  # the models are so small that threads would do nothing but wait for each other

VOCABULARY = 320  # not as wide as any layer
TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(2)).bfloat16()

# --- configurations ---------------------------------------------------------------------------------------------------

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 256, "max_position_embeddings": 512, **SPECIAL}
UNTIED = {"tie_word_embeddings": False}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
MIXED_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
VISION = {
    "depth": 1,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": 256,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
VISION_TOKENS = {
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}


def llama():
    return transformers.LlamaConfig(
        **COMMON, **ATTENTION, **UNTIED, num_hidden_layers=2, intermediate_size=384
    )


def llama_tied():
    return transformers.LlamaConfig(
        **COMMON, **ATTENTION, tie_word_embeddings=True, num_hidden_layers=2, intermediate_size=384
    )


def gemma3():
    layers = {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    }
    return transformers.Gemma3TextConfig(**COMMON, **ATTENTION, **layers, intermediate_size=384)


def t5():
    return transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=256,
        d_kv=64,
        d_ff=384,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )


def nemotron_h():
    """Every kind of layer NemotronH has; the experts' width is no multiple of 128, as in Nemotron-3."""
    return transformers.NemotronHConfig(
        **COMMON,
        **ATTENTION,
        layers_block_type=["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
        mamba_num_heads=64,
        mamba_head_dim=8,
        ssm_state_size=16,
        n_groups=2,
        conv_kernel=4,
        chunk_size=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        moe_intermediate_size=192,
        moe_shared_expert_intermediate_size=384,
        intermediate_size=192,
        n_group=1,
        topk_group=1,
    )


def qwen3_moe():
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "norm_topk_prob": True,
    }
    return transformers.Qwen3MoeConfig(
        **COMMON,
        **ATTENTION,
        **UNTIED,
        **experts,
        num_hidden_layers=2,
        intermediate_size=384,
        mlp_only_layers=[0],
    )


def mixtral():
    return transformers.MixtralConfig(
        **COMMON,
        **ATTENTION,
        **UNTIED,
        num_hidden_layers=2,
        intermediate_size=192,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def deepseek_v3():
    return transformers.DeepseekV3Config(
        **COMMON,
        **UNTIED,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        intermediate_size=384,
        moe_intermediate_size=192,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        topk_method="noaux_tc",  # only vLLM reads it, as it stands in the hub's config.json
    )


def glm4_moe():
    return transformers.Glm4MoeConfig(
        **COMMON,
        **ATTENTION,
        **UNTIED,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        intermediate_size=384,
        moe_intermediate_size=192,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        use_qk_norm=True,
    )


def granite_moe_hybrid():
    return transformers.GraniteMoeHybridConfig(
        **COMMON,
        **UNTIED,
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        shared_intermediate_size=256,
        num_local_experts=4,
        num_experts_per_tok=2,
        mamba_n_heads=16,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_expand=2,
    )


def llama4():
    text = {
        "num_hidden_layers": 2,
        "intermediate_size": 192,
        "intermediate_size_mlp": 384,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 64,
    }
    return transformers.Llama4TextConfig(**COMMON, **ATTENTION, **UNTIED, **text)


def qwen3_vl_moe():
    text = {
        "num_hidden_layers": 2,
        "intermediate_size": 384,
        "moe_intermediate_size": 192,
        "num_experts": 4,
    }
    rope = {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [12, 10, 10],
        }
    }
    return transformers.Qwen3VLMoeConfig(
        text_config={
            **COMMON,
            **ATTENTION,
            **text,
            **rope,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        vision_config={**VISION, "deepstack_visual_indexes": [0]},
        **VISION_TOKENS,
        **UNTIED,
    )


def qwen3_5():
    """A dense language model with a vision tower. in_proj_a and in_proj_b have 48 rows, as 27B's: Marlin takes 64."""
    heads = {"linear_num_key_heads": 16, "linear_num_value_heads": 48}
    text = {
        **COMMON,
        **ATTENTION,
        **MIXED_LAYERS,
        **heads,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    text["intermediate_size"] = 512
    return transformers.Qwen3_5Config(
        text_config=text, vision_config=VISION, **VISION_TOKENS, **UNTIED
    )


def qwen3_5_moe():
    experts = {
        "moe_intermediate_size": 192,
        "shared_expert_intermediate_size": 128,
        "num_experts": 4,
    }
    text = {
        **COMMON,
        **ATTENTION,
        **MIXED_LAYERS,
        **LINEAR_ATTENTION,
        **experts,
        "num_experts_per_tok": 2,
    }
    return transformers.Qwen3_5MoeConfig(
        text_config=text, vision_config=VISION, **VISION_TOKENS, **UNTIED
    )


# --- configurations of models that see or hear ------------------------------------------------------------------------

# Widths of towers are as odd as the real ones: 3,420 and 4,304 are no multiples of 32.
TEXT = {**COMMON, **ATTENTION, "num_hidden_layers": 2, "intermediate_size": 384}
SIZES_OF_TOWER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 56, "patch_size": 14}
SIGLIP = {**SIZES_OF_TOWER, **IMAGES, "intermediate_size": 272}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]}
QWEN2_5_VISION = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 340,
    "num_heads": 2,
    "out_hidden_size": 256,
    "fullatt_block_indexes": [1],
    "patch_size": 14,
    "window_size": 56,
}
AUDIO = {
    "d_model": 128,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 272,
    "num_mel_bins": 16,
    "max_source_positions": 50,
}


def text_of(config_class, **settings):
    """The configuration of a language model, a Llama's or Qwen2's."""
    return getattr(transformers, config_class)(**{**TEXT, **UNTIED, **settings})


def qwen2_5_vl():
    return transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config=QWEN2_5_VISION,
        **VISION_TOKENS,
        **UNTIED,
    )


def qwen3_vl():
    rope = {"rope_parameters": {**MROPE, "mrope_interleaved": True}}
    vision = {"intermediate_size": 272, "depth": 2, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(
        text_config={**TEXT, **rope}, vision_config={**VISION, **vision}, **VISION_TOKENS, **UNTIED
    )


def gemma3_vl():
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    tower = {"model_type": "siglip_vision_model", "vision_use_head": False}
    return transformers.Gemma3Config(
        text_config={**TEXT, **layers, "query_pre_attn_scalar": 64},
        vision_config={**SIGLIP, **tower},
        mm_tokens_per_image=4,
        image_token_index=250,
        boi_token_index=251,
        eoi_token_index=252,
    )


def llava():
    vision = transformers.CLIPVisionConfig(**{**SIGLIP, "num_hidden_layers": 3}, projection_dim=128)
    text = text_of("LlamaConfig")
    return transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=250, **UNTIED
    )


def llava_onevision():
    """Its head is tied, as 0.5B's."""
    return transformers.LlavaOnevisionConfig(
        text_config=text_of("Qwen2Config", tie_word_embeddings=True),
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=250,
        video_token_index=251,
        image_grid_pinpoints=[[56, 56], [56, 112]],
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def internvl():
    vision = {"image_size": [56, 56], "patch_size": [14, 14], "attention_bias": True}
    return transformers.InternVLConfig(
        text_config=text_of("Qwen2Config"),
        vision_config={**SIGLIP, **vision},
        image_token_id=250,
        image_seq_length=4,
        **UNTIED,
    )


def smolvlm():
    return transformers.SmolVLMConfig(
        text_config=text_of("LlamaConfig", pad_token_id=2),
        vision_config=SIGLIP,
        image_token_id=250,
        scale_factor=2,
        pad_token_id=2,
        **UNTIED,
    )


def mistral3():
    return transformers.Mistral3Config(
        text_config=text_of("MistralConfig", sliding_window=None),
        vision_config={**SIGLIP, "model_type": "pixtral", "head_dim": 64},
        image_token_index=250,
        spatial_merge_size=2,
        **UNTIED,
    )


def qwen2_audio():
    return transformers.Qwen2AudioConfig(
        text_config=text_of("Qwen2Config"),
        audio_config={**AUDIO, "model_type": "qwen2_audio_encoder"},
        audio_token_index=250,
        **UNTIED,
    )


def nemotron_h_omni():
    """NemotronH, which sees with RADIO and hears with Parakeet."""
    vision = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "max_img_size": 128,
        "video_temporal_patch_size": 2,
    }
    audio = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "subsampling_conv_channels": 32,
        "num_mel_bins": 16,
        "projection_hidden_size": 256,
        "projection_bias": False,
    }
    return transformers.NemotronH_Omni_Reasoning_V3_Config(
        text_config=nemotron_h(),
        vision_config=vision,
        audio_config=audio,
        vision_hidden_size=128,
        projector_hidden_size=256,
        image_token_id=250,
        video_token_id=251,
        audio_token_id=252,
    )


def whisper():
    """Its encoder hears, and is as much of the language model as its decoder."""
    return transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=256,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=448,
        decoder_start_token_id=1,
        **SPECIAL,
    )


def qwen2_5_omni():
    """What thinks, what talks, and what makes waves of that."""
    mrope = {"rope_parameters": {**MROPE, "mrope_section": [8, 12, 12]}}
    thinker = {
        "text_config": {**TEXT, **mrope},
        "vision_config": QWEN2_5_VISION,
        "audio_config": {**AUDIO, "n_window": 10, "output_dim": 256},
        "audio_token_index": 252,
        "image_token_index": 250,
        "video_token_index": 251,
    }
    talker = {
        "vocab_size": 300,
        "embedding_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        **mrope,
    }
    diffusion = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "emb_dim": 64,
        "head_dim": 64,
        "enc_emb_dim": 64,
        "num_embeds": 100,
        "mel_dim": 16,
        "block_size": 8,
        "look_ahead_layers": [0],
        "look_backward_layers": [0],
        "enc_dim": 32,
        "enc_channels": [32, 32, 32, 32, 96],
        "enc_attention_channels": 16,
        "enc_res2net_scale": 2,
        "enc_se_channels": 16,
    }
    vocoder = {
        "mel_dim": 16,
        "upsample_initial_channel": 64,
        "upsample_rates": [4, 2],
        "upsample_kernel_sizes": [8, 4],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
    }
    return transformers.Qwen2_5OmniConfig(
        thinker_config=thinker,
        talker_config=talker,
        token2wav_config={"dit_config": diffusion, "bigvgan_config": vocoder},
        enable_audio_output=True,
    )


# --- ways to save -----------------------------------------------------------------------------------------------------


def save_pretrained(model, folder):
    """As transformers saves it: in the hub's names, which are older than transformers' own."""
    model.save_pretrained(folder)


def save_config(model, folder):
    """Only the config.json, as save_pretrained writes it."""
    model.save_pretrained(folder)
    for path in Path(folder).glob("*.safetensors*"):
        path.unlink()


def save_state_dict(model, folder):
    """As model.state_dict() names it, which holds stacks of experts."""
    save_config(model, folder)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})


def save_pth(model, folder):
    """The same in a pickle."""
    save_config(model, folder)
    torch.save(model.state_dict(), Path(folder) / "model.pth")


def stack_experts(tensors, transposed=False):
    """Tensors with one weight an expert as those with the stacks gate_up_proj and down_proj of a layer's experts."""
    tensors, layers = dict(tensors), defaultdict(lambda: defaultdict(dict))
    for name in [name for name in tensors if re.search(r"\.experts\.\d+\.", name)]:
        place, expert, projection, _ = name.rsplit(".", 3)
        layers[place][projection][int(expert)] = tensors.pop(name)
    for place, projections in layers.items():
        gate, up, down = (
            torch.stack([weights[expert] for expert in range(len(weights))])
            for weights in (projections[name] for name in ("gate_proj", "up_proj", "down_proj"))
        )
        stacks = {f"{place}.gate_up_proj": torch.cat([gate, up], dim=1), f"{place}.down_proj": down}
        tensors |= {
            name: stack.mT.contiguous() if transposed else stack for name, stack in stacks.items()
        }
    return tensors


def transpose_and_stack(tensors):
    """The same in place, with transposed stacks."""
    stacked = stack_experts(tensors, transposed=True)
    tensors.clear()
    tensors.update(stacked)


def save_stacked(model, folder):
    """In the hub's names, but gated experts as the stacks gate_up_proj and down_proj."""
    save_pretrained(model, folder)
    tensors = stack_experts(read_tensors(folder))
    shutil.rmtree(folder)
    save_config(model, folder)
    save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})


def save_transposed(model, folder):
    """In the hub's names, and with the stacks of experts transposed, (experts, in, out), as Qwen3-VL's are there."""
    save_pretrained(model, folder)
    tensors = {
        name: tensor.mT.contiguous() if ".experts." in name and tensor.dim() == 3 else tensor
        for name, tensor in read_tensors(folder).items()
    }
    shutil.rmtree(folder)
    save_config(model, folder)
    save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})


def rename_tensors(folder, names):
    """Give a folder's tensors other names: patterns with what replaces them, one after the other."""
    renamed = {}
    for name, tensor in read_tensors(folder).items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    write_tensors(folder, renamed)


def write_tensors(folder, tensors):
    """Write all of a folder's tensors anew."""
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        Path(folder) / "model.safetensors",
        {"format": "pt"},
    )


def save_with_vision_model(model, folder):
    """In the hub's names of CLIP's and SigLIP's towers, of which transformers 5 dropped a part."""
    save_pretrained(model, folder)
    rename_tensors(folder, {r"^vision_tower\.": "vision_tower.vision_model."})


INTERNVL_CHAT_NAMES = {
    r"^multi_modal_projector\.layer_norm": "mlp1.0",
    r"^multi_modal_projector\.linear_1": "mlp1.1",
    r"^multi_modal_projector\.linear_2": "mlp1.3",
    r"^vision_tower\.encoder\.layer\.": "vision_model.encoder.layers.",
    r"^vision_tower\.": "vision_model.",
    r"\.cls_token$": ".class_embedding",
    r"\.position_embeddings$": ".position_embedding",
    r"\.patch_embeddings\.projection\.": ".patch_embedding.",
    r"\.lambda_": ".ls",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.projection_layer\.": ".attn.proj.",
}
INTERNVL_CHAT_CODE = """
from transformers import PretrainedConfig, Qwen2Config


class VisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    has_no_defaults_at_init = True

    def __init__(self, vision_config=None, llm_config=None, **settings):
        super().__init__(**settings)
        self.vision_config = VisionConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
"""


def save_internvl_chat(model, folder):
    """In the names and with the config.json of InternVL's own code on the hub, which vLLM reads."""
    save_pretrained(model, folder)
    rename_tensors(folder, INTERNVL_CHAT_NAMES)
    tensors = read_tensors(folder)
    for name in [name for name in tensors if ".attention.q_proj." in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        tensors[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    write_tensors(folder, tensors)

    config = read_config(folder)
    vision = {
        **{key: config["vision_config"][key] for key in SIGLIP},
        **IMAGES,
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "num_channels": 3,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "initializer_factor": 0.1,
        "hidden_act": "gelu",
        "attention_dropout": 0.0,
    }
    chat = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "llm_config": {**config["text_config"], "architectures": ["Qwen2ForCausalLM"]},
        "vision_config": vision,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "torch_dtype": "bfloat16",
        **UNTIED,
    }
    (Path(folder) / "config.json").write_text(json.dumps(chat))
    (Path(folder) / "configuration_internvl_chat.py").write_text(INTERNVL_CHAT_CODE)


SAVERS = {
    "pretrained": save_pretrained,
    "state_dict": save_state_dict,
    "pth": save_pth,
    "stacked": save_stacked,
    "transposed": save_transposed,
    "with_vision_model": save_with_vision_model,
    "internvl_chat": save_internvl_chat,
}

# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One kind of model: how to build it, what to exclude, and how it may have been saved."""

    config: Callable
    model_class: str
    excludes: dict[str, str] = field(
        default_factory=dict
    )  # by what they keep; "experts" where they must be kept
    wide: dict[str, str] = field(default_factory=dict)  # patterns of --int8, by what they mean
    saved: tuple[str, ...] = ("pretrained",)
    decoded_at_once: bool = (
        False  # with transformers, which else asks its layers for weights that are packed
    )
    refused: str = ""  # what the refusal names, without the exclude of the experts
    # Whether transformers holds the routers in float32, and so saves them, whatever the model's dtype: from 5.24.
    float32_routers: bool = False
    group_size: int | None = 64  # None: what the command chooses


QKV = r"layers\.1\.self_attn\.[qkv]_proj"
LLM_QKV = r"language_model\.(model\.)*layers\.1\.self_attn\.[qkv]_proj"
TOWER = r"visual\."
WIDE_HEAD = {"head in 8 bits": r"lm_head"}
WIDE_ATTENTION = {"attention in 8 bits": r"self_attn"}
WIDE_EXPERTS = {"experts in 8 bits": r"\.experts\."} | WIDE_ATTENTION


def multimodal(
    config,
    model_class,
    exclude=QKV,
    saved=("pretrained",),
    decoded_at_once=False,
    float32_routers=False,
):
    """A family of models that see or hear: no option is needed but the format."""
    excludes = {"attention": exclude}
    return Family(
        config,
        model_class,
        excludes,
        saved=saved,
        decoded_at_once=decoded_at_once,
        group_size=None,
        float32_routers=float32_routers,
    )


FAMILIES = {
    "llama": Family(
        llama,
        "LlamaForCausalLM",
        {"attention": QKV},
        WIDE_ATTENTION | WIDE_HEAD,
        ("pretrained", "state_dict", "pth"),
    ),
    "llama_tied": Family(llama_tied, "LlamaForCausalLM", {"attention": QKV}),
    "gemma3": Family(
        gemma3, "Gemma3ForCausalLM", {"attention": QKV}, {}, ("pretrained", "state_dict")
    ),
    "t5": Family(
        t5,
        "T5ForConditionalGeneration",
        {"attention": r"SelfAttention\.[qkv]\."},
        decoded_at_once=True,
    ),
    "nemotron_h": Family(
        nemotron_h,
        "NemotronHForCausalLM",
        {
            "layers": r"mixer\.[qkv]_proj\.|layers\.0\.mixer\.in_proj\.|layers\.1\.mixer\.shared_experts\."
        },
        {
            "all but experts in 8 bits": r"mixer\.(\w+_proj|shared_experts\.\w+)\.",
            "experts in 8 bits": r"\.experts\.",
            **WIDE_HEAD,
        },
        ("pretrained", "state_dict", "pth"),
        float32_routers=True,
    ),
    "qwen3_moe": Family(
        qwen3_moe,
        "Qwen3MoeForCausalLM",
        {"attention": QKV},
        WIDE_EXPERTS,
        ("pretrained", "state_dict"),
    ),
    "mixtral": Family(
        mixtral,
        "MixtralForCausalLM",
        {"attention": QKV},
        WIDE_EXPERTS,
        ("pretrained", "state_dict"),
    ),
    "deepseek_v3": Family(
        deepseek_v3,
        "DeepseekV3ForCausalLM",
        {"attention": r"layers\.1\.self_attn\.", "shared": r"shared_experts"},
        {"shared experts in 8 bits": "shared_experts"},
        ("pretrained", "state_dict"),
        float32_routers=True,
    ),
    "glm4_moe": Family(
        glm4_moe,
        "Glm4MoeForCausalLM",
        {"attention": QKV},
        WIDE_HEAD,
        ("pretrained", "state_dict"),
        float32_routers=True,
    ),
    "granite": Family(
        granite_moe_hybrid,
        "GraniteMoeHybridForCausalLM",
        {"experts": "block_sparse_moe"},
        {},
        ("pretrained", "state_dict"),
        refused="block_sparse_moe.",
    ),
    "llama4": Family(
        llama4,
        "Llama4ForCausalLM",
        {"attention": QKV, "experts": r"\.experts\."},
        WIDE_EXPERTS,
        ("pretrained", "state_dict"),
    ),
    "qwen3_vl_moe": Family(
        qwen3_vl_moe,
        "Qwen3VLMoeForConditionalGeneration",
        {"experts": r"\.experts\."},
        {},
        ("pretrained", "transposed"),
        refused="experts.down_proj",
    ),
    "qwen3_5": Family(
        qwen3_5,
        "Qwen3_5ForConditionalGeneration",
        {"linear_attn": "linear_attn", "attention": LLM_QKV},
        {
            "linear_attn and tower in 8 bits": r"linear_attn|visual\.",
            "one layer in 8 bits": r"language.*layers\.1\.",
        },
    ),
    "qwen3_5_moe": Family(
        qwen3_5_moe,
        "Qwen3_5MoeForConditionalGeneration",
        {"linear_attn": "linear_attn", "attention": LLM_QKV},
        WIDE_EXPERTS | WIDE_HEAD | {"tower in 8 bits": TOWER},
        ("pretrained", "stacked", "state_dict"),
    ),
    "qwen2_5_vl": multimodal(qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": multimodal(qwen3_vl, "Qwen3VLForConditionalGeneration", exclude=LLM_QKV),
    "gemma3_vl": multimodal(
        gemma3_vl,
        "Gemma3ForConditionalGeneration",
        exclude=LLM_QKV,
        saved=("with_vision_model", "pretrained"),
    ),
    "llava": multimodal(
        llava,
        "LlavaForConditionalGeneration",
        exclude=LLM_QKV,
        saved=("with_vision_model", "pretrained"),
    ),
    "llava_onevision": multimodal(
        llava_onevision,
        "LlavaOnevisionForConditionalGeneration",
        exclude=LLM_QKV,
        saved=("with_vision_model", "pretrained"),
    ),
    "internvl": multimodal(
        internvl,
        "InternVLForConditionalGeneration",
        exclude=LLM_QKV,
        saved=("internvl_chat", "pretrained"),
    ),
    "smolvlm": multimodal(smolvlm, "SmolVLMForConditionalGeneration", exclude="text_model." + QKV),
    "mistral3": multimodal(mistral3, "Mistral3ForConditionalGeneration", exclude=LLM_QKV),
    "qwen2_audio": multimodal(qwen2_audio, "Qwen2AudioForConditionalGeneration", exclude=LLM_QKV),
    "nemotron_h_omni": multimodal(
        nemotron_h_omni,
        "NemotronH_Omni_Reasoning_V3",
        exclude=r"mixer\.[qkv]_proj\.|layers\.0\.mixer\.in_proj\.",
        float32_routers=True,
    ),
    "whisper": multimodal(
        whisper,
        "WhisperForConditionalGeneration",
        exclude=r"decoder\.layers\.1\.(self_attn\.[qkv]_proj|fc1)",
        decoded_at_once=True,
    ),
    "qwen2_5_omni": multimodal(
        qwen2_5_omni,
        "Qwen2_5OmniForConditionalGeneration",
        exclude=r"thinker\.model\.layers\.1\.self_attn\.[qkv]_proj",
        decoded_at_once=True,
    ),
}


MULTIMODAL = [name for name, family in FAMILIES.items() if not family.group_size]


def options(name, layers):
    """The options that say of some layers of a family that they are kept, or packed in 8 bits."""
    family = FAMILIES[name]
    if layers in family.wide:
        return ["--int8", family.wide[layers]]
    return ["--exclude", family.excludes[layers]] if layers else []


def limited(name, saved, folder):
    """Save a family's model in the folder in one way; it, and options that give 8 bits to its head and some layers, by costs from
    a seed."""
    source = folder / "source"
    save(name, saved, source)
    generator = torch.Generator().manual_seed(0)
    statistics = {}
    for key, tensor in read_tensors(source).items():
        if tensor.dim() == 2 and key.endswith(".weight"):
            module = key.removesuffix(".weight")
            statistics[module] = torch.ones(tensor.shape[1])
            statistics[f"{module}.cost"] = 10 ** (2 * torch.rand((), generator=generator))
    save_file(statistics, folder / "statistics.safetensors")
    options = ["--format", "compressed-tensors", "--importance", folder / "statistics.safetensors"]
    options += group_size(name)
    refused = run_cli(source, folder / "least", *options, "--max_size_gb", 1e-9)
    return source, [*options, "--max_size_gb", 1.1 * float(least_size(refused))]


def group_size(name):
    """The option that says how wide a family's groups are, where that is not left to the command."""
    size = FAMILIES[name].group_size
    return ["--group_size", size] if size else []


def cases(without=()):
    """Each family, way to save it and what `options` says of some layers, or "" for nothing; less families, or ways."""
    return [
        (name, saved, excluded)
        for name, family in FAMILIES.items()
        for saved in family.saved
        for excluded in (
            *([] if family.refused else [""]),
            *family.excludes,
            *(family.wide if saved == "pretrained" else []),
        )
        if name not in without and (name, saved) not in without
    ]


def cases_of_limits(without):
    """Each family and the first way to save it that is not left out."""
    first = {}
    for name, saved, layers in cases(without):
        if not layers:
            first.setdefault(name, saved)
    return list(first.items())


@torch.no_grad()
def build(name):
    """A random model in which no two tensors are alike and some groups are all zero."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, family.model_class)._from_config(
        family.config(), dtype=torch.bfloat16
    )
    if family.float32_routers:
        for key, parameter in model.named_parameters():
            if key.endswith(".gate.weight"):
                parameter.data = parameter.data.float()
    for tensor in {
        id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]
    }.values():
        if tensor.is_floating_point():
            tensor += 0.05 * torch.randn(tensor.shape)
        if tensor.dim() > 1 and tensor.shape[-1] > 64:
            tensor[..., 0, :64] = 0
    return model


@lru_cache(maxsize=1)
def built(name):
    """The same, built once for all that only read it."""
    return build(name)


def save(name, saved, folder):
    """Write a family's model in one of the ways to save it."""
    SAVERS[saved](built(name), folder)


def load(name, folder, **options):
    """A family's model from a folder, with transformers, and what its loader reports."""
    model_class = getattr(transformers, FAMILIES[name].model_class)
    if FAMILIES[name].decoded_at_once and "quantization_config" in read_config(folder):
        options["quantization_config"] = transformers.CompressedTensorsConfig(run_compressed=False)
    # Not Qwen2.5-Omni's own, which in 5.24 fails where a report is asked for.
    from_pretrained = transformers.PreTrainedModel.from_pretrained.__func__
    model, report = from_pretrained(model_class, folder, output_loading_info=True, **options)
    return model.eval(), report


@torch.no_grad()
def logits_of(model):
    """The logits for a fixed prompt of text, and for Whisper of noise."""
    if model.config.model_type == "qwen2_5_omni":
        model = model.thinker
    if model.main_input_name == "input_features":
        return model(input_features=NOISE, decoder_input_ids=TOKENS).logits
    decoder = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return model(input_ids=TOKENS, **decoder).logits
