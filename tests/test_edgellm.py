"""What TensorRT Edge-LLM's own loader makes of gptq folders: every code, scale and kept tensor is that of the folder.

It is an optional extra, in an environment of its own (tests/tools/requirements-edgellm.txt), since its wheel has 200 MB;
these tests skip without it. Its loader prepares the weights for its kernels on the CPU. What the kernels compute takes a
GPU and is not run. The README's commands were not run: their flags are those of NVIDIA's wheel, and of llm_build and
cmake those that NVIDIA's instructions for Orin were reported to name.

Groups of 128 are what it computes rightly: at 64 or 32 it loads and builds without a warning, and answers noise. It does
not have Nemotron-3-Nano's experts but in NVFP4, which an Orin does not compute. Its exporter reads compressed-tensors
and int4 as noise without an error, its direct builder stops. The plan says what else stands in the way: Qwen3.5's
in_proj_[ab], experts that are kept, a type of model that it takes for Llama (Gemma 2 and 3, OLMo 2, Mixtral, SmolLM3,
Granite, Phi-3), no chat template. NemotronH's count of layers, which transformers 5 leaves out of config.json and
Edge-LLM needs, is written there.
"""

import functools

import families
import pytest
import torch
import transformers
from conftest import quantize
from edge_llm_layouts import (
    unpack_fragments,
    unpack_interleaved,
    unpack_marlin,
    unpack_marlin_scales,
)
from folders import edit_json, edit_tensors, read_tensors, unpack_words

pytest.importorskip(
    "tensorrt_edgellm._export_api", reason="see tests/tools/requirements-edgellm.txt"
)
from tensorrt_edgellm import AutoModel
from tensorrt_edgellm.models import linear, ops

# By the version of the plugin that computes dense layers.
UNPACK = {1: unpack_interleaved, 2: unpack_fragments}
PARTS = ("qweight", "qzeros", "scales", "g_idx")

DENSE = {**families.COMMON, **families.ATTENTION, **families.UNTIED, "intermediate_size": 384}
TWO_LAYERS = {"num_hidden_layers": 2}
MODELS = {
    # The rows of one head of keys do not fill a block of the second version.
    "llama": lambda: transformers.LlamaConfig(**DENSE | TWO_LAYERS | {"num_key_value_heads": 1}),
    "qwen2": lambda: transformers.Qwen2Config(**DENSE | TWO_LAYERS),
    "qwen3": lambda: transformers.Qwen3Config(**DENSE | TWO_LAYERS),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **DENSE | TWO_LAYERS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        mlp_only_layers=[0],
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **DENSE,
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"],
        mamba_num_heads=64,
        mamba_head_dim=8,
        ssm_state_size=16,
        n_groups=2,
        conv_kernel=4,
        chunk_size=32,
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **DENSE, **families.LINEAR_ATTENTION, **families.MIXED_LAYERS
    ),
    "gemma2": lambda: transformers.Gemma2Config(**DENSE | TWO_LAYERS),
}
IN_PROJ = r"in_proj_[ab]\."
CASES = [
    *[(model, None) for model in ("llama", "qwen2", "qwen3", "qwen3_moe", "nemotron_h")],
    ("llama", r"layers\.1\.self_attn\.[qkv]_proj"),
    ("nemotron_h", r"mixer\.down_proj"),
    ("qwen3_5", IN_PROJ),
]


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """Makes a quantized folder of a model, the same one each time, or another where a name is given."""

    @functools.cache
    def make(model, exclude=None, group_size=128, form="gptq", name=""):
        source = tmp_path_factory.mktemp(model)
        save_random(MODELS[model](), source)
        folder = source.with_name(f"{source.name}-{form}")
        options = ["--format", form, "--group_size", group_size]
        quantize(source, folder, *options, *(["--exclude", exclude] if exclude else []))
        return folder

    return make


@torch.no_grad()
def save_random(config, folder):
    """Save a random model in which no two tensors are alike, biases and norms included."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor += 0.05 * torch.randn(tensor.shape)
    model.save_pretrained(folder)


def load(folder, version=2):
    """The model that Edge-LLM's loader makes of a folder."""
    ops.set_int4_gemm_plugin_version(version)
    return AutoModel.from_pretrained(str(folder))


def codes_of(tensors, module):
    """A packed weight's codes from -8 to 7, (rows, columns), by the format's definition."""
    zeros = unpack_words(tensors[f"{module}.qzeros"]) + 1
    assert (zeros == 8).all()
    return unpack_words(tensors[f"{module}.qweight"].T.contiguous()).to(torch.int8) - 8


def check_dense(model, tensors, unpack):
    """Every dense layer in 4 bits has the folder's codes, scales and order of inputs; returns what was compared."""
    compared = set()
    for name, layer in model.named_modules():
        if isinstance(layer, linear.GPTQLinear):
            codes = codes_of(tensors, name)
            assert torch.equal(unpack(layer.qweight, *codes.shape), codes), name
            assert torch.equal(layer.scales, tensors[f"{name}.scales"]), name
            assert torch.equal(layer.int4_act_perm, torch.arange(codes.shape[1])), name
            compared |= {f"{name}.{part}" for part in PARTS}
    return compared


def check_experts(model, tensors):
    """Every expert has the folder's codes and scales; returns what was compared."""
    compared = set()
    for name, block in model.named_modules():
        if not hasattr(block, "fc_gate_up_qweights"):
            continue
        for number in range(len(block.fc_down_qweights)):
            for buffer, projections in (("gate_up", ["gate", "up"]), ("down", ["down"])):
                modules = [f"{name}.experts.{number}.{part}_proj" for part in projections]
                codes = torch.cat([codes_of(tensors, module) for module in modules])
                words = getattr(block, f"fc_{buffer}_qweights")[number]
                assert torch.equal(unpack_marlin(words, *codes.shape), codes), modules

                scales = torch.cat([tensors[f"{module}.scales"] for module in modules], dim=1)
                ordered = getattr(block, f"fc_{buffer}_scales")[number]
                assert torch.equal(unpack_marlin_scales(ordered, len(codes)), scales), modules
                compared |= {f"{module}.{part}" for module in modules for part in PARTS}
    return compared


def check_kept(model, tensors, names):
    """What is kept has the folder's values, in float16, in which the engine computes."""
    split_fused_attention(model)
    for name in names:
        parent, _, last = name.rpartition(".")
        found = getattr(model.get_submodule(parent), last)
        assert torch.equal(found.float(), tensors[name].to(found.dtype).float()), name


def split_fused_attention(model):
    """Put the projections of attention that are kept, which the loader joins, back in their places."""
    for _, attention in list(model.named_modules()):
        if hasattr(attention, "qkv_proj_fused"):
            heads = [attention.num_heads, *[attention.num_kv_heads] * 2]
            rows = [count * attention.head_dim for count in heads]
            parts = attention.qkv_proj_fused.weight.split(rows)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                attention.add_module(name, torch.nn.Module())
                attention.get_submodule(name).weight = torch.nn.Parameter(part)
            del attention.qkv_proj_fused


# What the loader makes itself of other tensors, or leaves at zero where the model has none.
MADE = r"int4_act_perm", "fc_gate_up", "fc_down", "gate_linear.weight", "linear_attn.conv1d.bias"


def check(folder, version=2):
    """All that must hold for a folder: nothing differs, is lost, or is left as the model was made."""
    model = load(folder, version)
    tensors = read_tensors(folder)
    compared = check_dense(model, tensors, UNPACK[version]) | check_experts(model, tensors)
    kept = tensors.keys() - compared
    assert compared and not any(name.endswith(PARTS) for name in kept)
    check_kept(model, tensors, kept)

    unset = model.state_dict().keys() - tensors.keys()
    assert not [name for name in unset if not any(made in name for made in MADE)]


@pytest.mark.parametrize("version", UNPACK)
@pytest.mark.parametrize(("model", "exclude"), CASES)
def test_edge_llm_holds_what_the_folder_has(model, exclude, version, convert):
    check(convert(model, exclude), version)


# --- what the plan warns of is so -------------------------------------------------------------------------------------


def test_groups_of_64_load_without_an_error(convert):
    """Its kernel computes them wrongly, so the plan must say so."""
    check(convert("llama", group_size=64))


def test_rows_that_are_no_multiple_of_64_stop_it(convert):
    with pytest.raises(ValueError, match=r"N=8, K=256\] is not 64-aligned"):
        load(convert("qwen3_5"))


def test_experts_that_are_kept_become_minus_one(convert):
    block = load(convert("qwen3_moe", r"\.experts\.")).get_submodule("model.layers.1.mlp")
    assert (unpack_marlin(block.fc_down_qweights[0], 256, 256) == -1).all()
    assert (block.fc_down_scales == 1).all()


@pytest.mark.parametrize("form", ["compressed-tensors", "int4"])
def test_other_formats_load_without_an_error_and_without_their_weights(form, convert):
    model = load(convert("llama", form=form))
    assert not any(isinstance(module, linear.GPTQLinear) for module in model.modules())
    assert "model.layers.0.mlp.up_proj.weight" in model.state_dict()


def test_models_of_other_types_load_without_an_error_as_llama(convert):
    model = load(convert("gemma2"))
    assert not hasattr(model.model.layers[0], "pre_feedforward_layernorm")


def test_it_stops_without_the_count_of_layers(convert):
    folder = convert("nemotron_h", name="without the count")
    edit_json(folder / "config.json", lambda config: config.pop("num_hidden_layers"))
    with pytest.raises(KeyError, match="num_hidden_layers"):
        load(folder)


# --- the checks notice faults -----------------------------------------------------------------------------------------


def change_a_code(tensors):
    """Change the lowest code of a word."""
    tensors["model.layers.1.mlp.up_proj.qweight"][0, 5] ^= 1


def change_a_scale(tensors):
    """Make a scale twice as large."""
    tensors["model.layers.1.mlp.up_proj.scales"][1, 5] *= 2


def change_a_norm(tensors):
    """Change what is kept."""
    tensors["model.layers.1.input_layernorm.weight"][7] += 1


@pytest.mark.parametrize("fault", [change_a_code, change_a_scale, change_a_norm])
def test_faults_between_folder_and_model_are_noticed(fault, convert, monkeypatch):
    folder = convert("llama", name=fault.__name__)
    # Clones, since the others are views of the file.
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder).items()}
    edit_tensors(folder, fault)
    model = load(folder)
    monkeypatch.setitem(globals(), "load", lambda *_: model)
    monkeypatch.setitem(globals(), "read_tensors", lambda _: tensors)
    with pytest.raises(AssertionError):
        check(folder)
