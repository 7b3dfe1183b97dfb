"""What the tests with real loaders share: tiny models, the conversion, and readers of both engine formats.

The readers are written from the formats' definitions, without a look at the program's own unpacking, so that a mistake
there is not repeated here.
"""

import json
from pathlib import Path

import torch
from conftest import quantize, read_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, NemotronHConfig, Qwen3Config

# The models are so small that threads would do nothing but wait for each other, for seconds where a core is busy.
torch.set_num_threads(1)

VOCABULARY = 96
TOKENS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))

# --- the program under test -------------------------------------------------------------------------------------------


def convert(source, target, *, output_format, group_size, exclude=None, scale="absmax"):
    """Quantize the folder `source` into `target`."""
    options = ["--format", output_format, "--group_size", group_size, "--scale", scale]
    quantize(source, target, *options, *(["--exclude", exclude] if exclude else []))


# --- tiny models ------------------------------------------------------------------------------------------------------


def nemotron_h_config():
    """Every kind of layer NemotronH has; widths are multiples of 64 but the experts' not of 128, as in Nemotron-3."""
    return NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        mamba_num_heads=8,
        mamba_head_dim=24,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
        moe_shared_expert_intermediate_size=320,
    )


def dense_config(config_class, tied):
    """A dense transformer of two layers; `tied` heads have no tensor of their own in the checkpoint."""
    return config_class(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )


CONFIGS = {
    "nemotron_h": nemotron_h_config,
    "llama": lambda: dense_config(LlamaConfig, tied=False),
    "llama_tied": lambda: dense_config(LlamaConfig, tied=True),
    "qwen3": lambda: dense_config(Qwen3Config, tied=False),
    "qwen3_tied": lambda: dense_config(Qwen3Config, tied=True),
}


@torch.no_grad()
def save_tiny_model(name, folder, dtype=torch.bfloat16):
    """Write a random model in which no two tensors are alike and some groups are all zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor += 0.05 * torch.randn(tensor.shape)
        if tensor.dim() > 1 and tensor.shape[-1] > 64:
            tensor[..., 0, :64] = 0
    model.save_pretrained(folder)


# --- reading a quantized folder ---------------------------------------------------------------------------------------


def unpack_words(words):
    """Unpack int32 (rows, n) to codes (rows, 8 n) through the bytes, which hold the lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(1)


def dequantize_compressed_tensors(packed, scales, shape):
    """Decode one weight, in the dtype of its scales: the product is rounded to it once."""
    eight_bits = packed.shape[1] * 4 == shape[1]
    octets = packed.contiguous().view(torch.uint8)  # a code in each, or two
    codes = octets.float() - 128 if eight_bits else unpack_words(packed).float() - 8
    assert list(codes.shape) == shape.tolist()
    group_size = codes.shape[1] // scales.shape[1]
    return (codes * scales.float().repeat_interleave(group_size, dim=1)).to(scales.dtype)


def dequantize_gptq(qweight, qzeros, scales, g_idx):
    """Decode one GPTQ v1 weight, in float32: (code - zero - 1) * scale, the zero point and scale chosen by g_idx."""
    codes = unpack_words(qweight.T)  # (rows, columns)
    zeros = unpack_words(qzeros).float() + 1  # (groups, rows)
    group_of_column = g_idx.long()
    return ((codes - zeros[group_of_column].T) * scales.float()[group_of_column].T).contiguous()


READERS = {
    "weight_packed": (dequantize_compressed_tensors, ["weight_packed", "weight_scale", "weight_shape"]),
    "qweight": (dequantize_gptq, ["qweight", "qzeros", "scales", "g_idx"]),
}


def read_dequantized(folder):
    """The tensors of a quantized folder under the names of its dense source, and the names of the packed ones."""
    tensors = read_tensors(folder)
    packed = [name.rpartition(".") for name in tensors if name.rpartition(".")[2] in READERS]
    quantized = set()
    for layer, _, suffix in packed:
        dequantize, parts = READERS[suffix]
        tensors[f"{layer}.weight"] = dequantize(*(tensors.pop(f"{layer}.{part}") for part in parts))
        quantized.add(f"{layer}.weight")
    return tensors, quantized


def write_dense_twin(quantized_folder, folder, dtype=torch.bfloat16):
    """Write the dense checkpoint that holds the dequantized weights."""
    tensors, quantized = read_dequantized(quantized_folder)
    for name in quantized:
        tensors[name] = tensors[name].to(dtype)
    config = read_config(quantized_folder)
    del config["quantization_config"]
    Path(folder).mkdir()
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, config)


def read_config(folder):
    """The parsed config.json of a folder."""
    return json.loads((Path(folder) / "config.json").read_text())


def write_config(folder, config):
    """Write config.json into a folder."""
    (Path(folder) / "config.json").write_text(json.dumps(config))


def load_model(folder, **options):
    """Load a folder with transformers as a user would; return the model and what the loader reports."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    return model.eval(), report


@torch.no_grad()
def logits_of(model):
    """The logits for a fixed prompt."""
    return model(TOKENS).logits


# --- changing and checking a quantized folder -------------------------------------------------------------------------


def edit_tensors(folder, edit):
    """Apply `edit` to the dict of tensors of a one-shard folder and write them back."""
    (shard,) = Path(folder).glob("*.safetensors")
    tensors = load_file(shard)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})


def edit_quantization_config(folder, edit):
    """Apply `edit` to the quantization_config in a folder's config.json."""
    config = read_config(folder)
    edit(config["quantization_config"])
    write_config(folder, config)


def check_weights_resemble_source(dequantized, quantized, source):
    """Every row of every weight is its own source's to INT4's precision; what is kept is equal.

    Rounding to 15 levels leaves about 0.1 of a row; any other row leaves 1.4.
    """
    assert dequantized.keys() == source.keys()
    for name, tensor in source.items():
        if name not in quantized:
            assert torch.equal(dequantized[name], tensor), f"{name} was to be kept"
            continue
        error = (dequantized[name].float() - tensor.float()).norm(dim=1) / tensor.float().norm(dim=1)
        assert error.max() < 0.2, f"{name}: row {error.argmax()} is off by {error.max():.2f}"
