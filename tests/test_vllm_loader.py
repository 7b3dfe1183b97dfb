"""vLLM's own loader fills each of its parameters with exactly what a quantized folder holds, and no other.

vLLM needs no GPU to be asked this: told that it runs on Orin (CUDA, capability 8.7) it picks the Marlin classes, and
allocates and loads them on the CPU. Not run is what needs the GPU: Marlin's repacking of these parameters, its kernels.

"It loaded" proves little. For a quantized model vLLM does not check that every parameter was found in the files, and
what it did not find is whatever memory held before; expert tensors that it does not know are skipped without a word.
So both directions are compared by name: what vLLM holds with what the files say, and what they say with the source.

Needs an environment of its own: see tests/tools/requirements-vllm.txt.
"""
# ruff: noqa: E402 - vLLM is imported only where it is installed, and after the variable that it reads

import json
import os
import re
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

os.environ["VLLM_TARGET_DEVICE"] = (
    "cpu"  # read by the first import: the wheel is CUDA's and would look for a driver
)
vllm = pytest.importorskip(
    "vllm", reason="vLLM is not installed: see tests/tools/requirements-vllm.txt"
)

import families
import test_vllm_contract as contract
from checkpoints import write_checkpoint
from conftest import quantize
from folders import (
    check_weights_resemble_source,
    edit_quantization_config,
    edit_tensors,
    read_dequantized,
    read_tensors,
)
from tiny_nemotron import NemotronConfig, random_tensors, write_other_files
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear import MarlinLinearKernel
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum
from vllm.utils.torch_utils import set_default_torch_dtype

# Nemotron-3-Nano in small: widths that Marlin takes as they are, experts no multiple of 128, every kind of layer.
MARLIN_LEGAL = NemotronConfig(
    hybrid_override_pattern="MEM*E",
    vocab_size=96,
    hidden_size=256,
    mamba_num_heads=64,
    mamba_head_dim=8,
    ssm_state_size=16,
    n_groups=2,
    conv_kernel=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=192,
    moe_shared_expert_intermediate_size=384,
)

# What to exclude, by name of the case. q, k and v are one layer to vLLM, as are the routed experts of a block.
EXCLUDE = {
    "nothing": None,
    "layers": r"mixer\.[qkv]_proj\.|layers\.0\.mixer\.in_proj\.|layers\.1\.mixer\.shared_experts\.",
    "experts": r"layers\.4\.mixer\.experts\.",
}
CASES = [(group_size, excluded) for group_size in (32, 64) for excluded in EXCLUDE]

# What vLLM serves each format in: scales are then held in their own dtype.
DENSE_CASES = {"compressed-tensors": torch.bfloat16, "gptq": torch.float16}


def write_tiny_nemotron(folder):
    """Write a random model, named as on the hub, in which no two tensors are alike and some groups are all zero."""
    tensors = random_tensors(MARLIN_LEGAL)
    for tensor in tensors.values():
        if tensor.dim() == 2:
            tensor[0, :64] = 0
    write_checkpoint(folder, tensors, shards=1)
    write_other_files(folder, MARLIN_LEGAL)


def convert(source, folder, group_size=64, exclude=None, output_format="compressed-tensors"):
    """Quantize the folder `source` into `folder`, which is returned."""
    options = ["--format", output_format, "--group_size", group_size, "--scale", "absmax"]
    quantize(source, folder, *options, *(["--exclude", exclude] if exclude else []))
    return folder


# --- what vLLM makes of a folder --------------------------------------------------------------------------------------


class OrinPlatform(type(current_platform)):
    """The CPU platform, but it says of itself that it is Jetson Orin's GPU."""

    _enum = PlatformEnum.CUDA

    @classmethod
    def get_device_capability(cls, device_id=0):
        """Orin's compute capability."""
        return DeviceCapability(8, 7)


@contextmanager
def pretend_orin():
    """Tell every module of vLLM, all of which hold the same platform object, that it runs on Orin."""
    platform = type(current_platform)
    current_platform.__class__ = OrinPlatform
    try:
        yield
    finally:
        current_platform.__class__ = platform


ACTIVATIONS = (
    "relu_squared",
    "silu_and_mul",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "gelu_new",
    "gelu_fast",
    "gelu_quick",
)
FP8_QUESTION = "cutlass_scaled_mm_supports_fp8"


@pytest.fixture(scope="module", autouse=True)
def vllm_process(tmp_path_factory):
    """What any process that loads a model with vLLM sets up: process groups, here of one process."""
    # An activation looks up its CUDA kernel when it is made. It is never called here, so its name is enough, which
    # lasts as long as this object.
    operators = torch.library.Library("_C", "FRAGMENT")
    for name in ACTIVATIONS:
        if not hasattr(torch.ops._C, name):
            operators.define(f"{name}(Tensor! out, Tensor input) -> ()")
    if not hasattr(torch.ops._C, FP8_QUESTION):  # 0.33 asks it when it is made
        operators.define(f"{FP8_QUESTION}(int capability) -> bool")
        operators.impl(FP8_QUESTION, lambda capability: False, "CompositeExplicitAutograd")
    rendezvous = tmp_path_factory.mktemp("vllm") / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            # Not as_uri, which would escape a space: torch takes the path as it is.
            distributed_init_method=f"file://{rendezvous}",
            backend="gloo",
        )
        initialize_model_parallel()
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


@contextmanager
def engine(folder, dtype=torch.bfloat16):
    """vLLM's configuration for a folder, in force, on Orin."""
    config = EngineArgs(
        model=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        trust_remote_code=True,  # of InternVL, whose own code on the hub is written by families.py
    ).create_engine_config()
    with pretend_orin(), set_current_vllm_config(config), set_default_torch_dtype(dtype):
        yield config


@torch.no_grad()
def load_into_vllm(folder, dtype=torch.bfloat16):
    """Have vLLM make a model of a folder, up to the point where its weights would go to the GPU."""
    with engine(folder, dtype) as config:
        model = initialize_model(config)
        for parameter in model.parameters():
            # The memory may hold the very weights of the model that was loaded before.
            parameter.fill_(float("nan") if parameter.is_floating_point() else -1)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    return model


# Parameters that a layer allocates for other formats, or that vLLM reads (weight_shape, qzeros, g_idx) but never uses.
NOT_WEIGHTS = re.compile(r"g_idx|^qzeros$|weight_shape$|^[qkv]_(scale|zero_point)$")
# The first kind of projection is absent in NemotronH, whose experts are not gated.
EXPERT_PROJECTIONS = {"w13": "up_proj", "w2": "down_proj"}
# What vLLM calls a checkpoint's tensor: NemotronHForCausalLM.hf_to_vllm_mapper. Other models' names stay as they are.
RENAMED = {
    r"^backbone\.": "model.",
    r"^model\.embeddings\b": "model.embed_tokens",
    r"\.A_log$": ".A",
}


def vllm_name(name):
    """What vLLM calls a checkpoint's tensor."""
    for pattern, replacement in RENAMED.items():
        name = re.sub(pattern, replacement, name)
    return name


def parameters_by_module(model):
    """The parameters of each module, by its path and their own names; one that modules share is with the first only."""
    modules = defaultdict(dict)
    for name, parameter in model.named_parameters():
        path, _, own_name = name.rpartition(".")
        modules[path][own_name] = parameter.data
    return modules


def quantization_of(module):
    """What holds a packed module's type of codes."""
    return getattr(module, "scheme", module.quant_method)


def rows_first(module, tensor):
    """A packed parameter as compressed-tensors stores it. GPTQ's have columns first, and so have experts for Marlin."""
    transposed = getattr(quantization_of(module), "is_transposed", False) or hasattr(
        module, "qweight"
    )
    return tensor.mT if transposed else tensor


def dequantize_parameter(module, packed, scales):
    """Decode one of vLLM's packed parameters with vLLM's own unpacking and its own type's bias, rounded once."""
    packed, scales = rows_first(module, packed), rows_first(module, scales)
    quant_type = quantization_of(module).quant_type
    codes = unpack_quantized_values_into_int32(packed, quant_type, packed_dim=packed.dim() - 1)
    group_size = codes.shape[-1] // scales.shape[-1]
    weights = (codes - quant_type.bias) * scales.float().repeat_interleave(group_size, dim=-1)
    return weights.to(scales.dtype)


def decode_parameters(module, parameters):
    """The weights among a module's parameters, by name, those decoded that are packed."""
    weights = {name: tensor for name, tensor in parameters.items() if not NOT_WEIGHTS.search(name)}
    if "qweight" in weights:
        weights["weight"] = dequantize_parameter(
            module, weights.pop("qweight"), weights.pop("scales")
        )
    for packed in [name for name in weights if name.endswith("_packed")]:
        name = packed.removesuffix("_packed")
        weights[name] = dequantize_parameter(
            module, weights.pop(packed), weights.pop(f"{name}_scale")
        )
    return weights


def unfuse(model, path, name, tensor):
    """One tensor of a module, rows first, as the tensors of the checkpoint that it was put together from."""
    module = model.get_submodule(path)
    parent, _, last = path.rpartition(".")
    if isinstance(module, RoutedExperts):
        kind, _, name = name.partition("_")
        return {
            f"{parent}.{expert}.{EXPERT_PROJECTIONS[kind]}.{name}": part
            for expert, part in enumerate(tensor)
        }
    if last in model.packed_modules_mapping:
        parts = tensor.split(module.output_sizes)
        return {
            f"{parent}.{which}.{name}": part
            for which, part in zip(model.packed_modules_mapping[last], parts)
        }
    if isinstance(module, VocabParallelEmbedding):
        tensor = tensor[: module.org_vocab_size]  # vLLM pads the vocabulary to a multiple of 64
    return {f"{path}.{name}": tensor}


def read_vllm_model(model):
    """The weights vLLM holds, decoded, by their names if it had fused none, and the names of those that were packed."""
    tensors, quantized = {}, set()
    for path, parameters in parameters_by_module(model).items():
        for name, weight in decode_parameters(model.get_submodule(path), parameters).items():
            parts = unfuse(model, path, name, weight)
            tensors |= parts
            if name not in parameters:
                quantized |= parts.keys()
    return tensors, quantized


# --- checks, each shown to notice a fault at the end of this file -----------------------------------------------------


def as_vllm_holds(name, tensor, dtype):
    """A checkpoint's tensor in vLLM's form: in its dtype, and Mamba's A instead of the logarithm of -A."""
    return (-tensor.float().exp() if name.endswith(".A") else tensor).to(dtype)


def check_vllm_holds_the_files(model, folder):
    """vLLM's weights are those of the files, neither more nor fewer, in every element."""
    held, held_packed = read_vllm_model(model)
    tensors, packed = read_dequantized(folder)
    written = {vllm_name(name): tensor for name, tensor in tensors.items()}
    assert held.keys() == written.keys(), sorted(held.keys() ^ written.keys())
    assert held_packed == {vllm_name(name) for name in packed}
    for name, tensor in held.items():
        assert torch.equal(tensor, as_vllm_holds(name, written[name], tensor.dtype)), name


def check_folder(folder, source, exclude=None, dtype=torch.bfloat16):
    """vLLM makes of a quantized folder the source's model, with nothing packed that was excluded."""
    check_vllm_holds_the_files(load_into_vllm(folder, dtype), folder)
    written, packed = read_dequantized(folder)
    check_weights_resemble_source(written, packed, read_tensors(source))
    assert not exclude or not any(re.search(exclude, name) for name in packed)


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tiny NemotronH's folder."""
    folder = tmp_path_factory.mktemp("source") / "model"
    write_tiny_nemotron(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A quantized folder to spoil."""
    return convert(source, tmp_path / "quantized")


@pytest.mark.parametrize(("group_size", "excluded"), CASES, ids=str)
def test_vllm_holds_exactly_what_was_written(source, tmp_path, group_size, excluded):
    """Every parameter of vLLM's model is the dequantized weight; nothing in the folder is left over."""
    folder = convert(source, tmp_path / "quantized", group_size, EXCLUDE[excluded])
    check_folder(folder, source, EXCLUDE[excluded])


def test_vllm_holds_scales_of_both_signs(source, tmp_path):
    """A group whose largest weight is a negative code's may have a negative scale."""
    folder = tmp_path / "quantized"
    quantize(source, folder, "--format", "compressed-tensors", "--group_size", 64, "--scale", "mse")
    assert any(
        (tensor < 0).any()
        for name, tensor in read_tensors(folder).items()
        if name.endswith("_scale")
    )
    check_folder(folder, source)


@pytest.mark.parametrize(
    "exclude", [None, r"layers\.1\.(self_attn\.[qkv]|mlp\.down)_proj\."], ids=["all", "exclude"]
)
@pytest.mark.parametrize("output_format", DENSE_CASES)
def test_vllm_holds_exactly_what_was_written_of_a_dense_model(tmp_path, output_format, exclude):
    """The same of a Llama in both engine formats; its gate and up projections are one layer to vLLM, too."""
    source = tmp_path / "source"
    families.save("llama", "pretrained", source)
    folder = convert(source, tmp_path / "quantized", exclude=exclude, output_format=output_format)
    check_folder(folder, source, exclude, DENSE_CASES[output_format])


def test_every_linear_layer_but_head_and_routers_is_quantized(source, folder):
    """What vLLM holds packed is what the design says is quantized."""
    _, quantized = read_vllm_model(load_into_vllm(folder))
    linear = {
        name
        for name, tensor in read_tensors(source).items()
        if tensor.dim() == 2 and name.endswith(".weight")
    }
    kept = {name for name in linear if re.search(r"embeddings|lm_head|\.gate\.", name)}
    assert quantized == {vllm_name(name) for name in linear - kept}


@dataclass(frozen=True)
class Nano:
    """The full Nemotron-3-Nano as vLLM makes it of the config.json that is planned for it; shapes without content."""

    group_size: int
    model: nn.Module


@pytest.fixture(scope="module", params=[32, 64])
def nano(request, inventory, tmp_path_factory):
    """Nemotron-3-Nano at both group sizes that divide its weights."""
    folder = tmp_path_factory.mktemp("nano")
    (folder / "config.json").write_text(
        json.dumps(contract.read_plan(contract.plan(inventory, request.param)).config)
    )
    with engine(folder) as config, torch.device("meta"):
        return Nano(request.param, initialize_model(config))


def test_vllm_allocates_for_nemotron_3_nano_what_the_contract_says(nano):
    """The tables of test_vllm_contract.py, which runs without vLLM, are those of the vLLM that is installed here."""
    assert vllm.__version__ in contract.VLLM_VERSIONS
    expected = {
        vllm_name(name): tensor
        for name, tensor in contract.expected_tensors(nano.group_size).items()
        if not name.endswith(
            ".weight_shape"
        )  # of which vLLM has one for a fused layer, and which it never uses
    }
    differences = sorted(allocated_tensors(nano.model).items() ^ expected.items())
    assert not differences[:6]


def test_vllm_chooses_marlin_for_every_quantized_layer_of_nemotron_3_nano(nano):
    """On Orin's capability, for linear layers and for experts."""
    kernels, experts = chosen_kernels(nano.model)
    assert kernels == {
        MarlinLinearKernel: 2 * 23 + 2 * 6 + 2 * 23
    }  # Mamba; qkv and o; shared experts
    assert experts == {MarlinExperts: 23}


def test_vllm_chooses_marlin_for_every_quantized_layer_that_is_compared_here(folder):
    """So the shapes and the packing that are compared are those of Marlin's classes."""
    kernels, experts = chosen_kernels(load_into_vllm(folder))
    assert kernels == {MarlinLinearKernel: 2 * 2 + 2 * 1 + 2 * 2}
    assert experts == {MarlinExperts: 2}


def chosen_kernels(model):
    """How many layers have which kernel: linear layers and stacks of experts."""
    modules = list(model.modules())
    kernels = Counter(type(module.scheme.kernel) for module in modules if hasattr(module, "scheme"))
    experts = [
        module.quant_method.experts_cls for module in modules if isinstance(module, RoutedExperts)
    ]
    return kernels, Counter(experts)


WHERE_PACKED = {torch.int32: "I32", torch.bfloat16: "BF16"}  # safetensors' names


def allocated_tensors(model):
    """The dtype and shape of each tensor that vLLM has room for, by its name if it had fused none."""
    tensors = {}
    for path, parameters in parameters_by_module(model).items():
        packed = any(name.endswith("_packed") for name in parameters)
        for name, tensor in parameters.items():
            if NOT_WEIGHTS.search(name):
                continue
            stored = rows_first(model.get_submodule(path), tensor) if packed else tensor
            dtype = WHERE_PACKED[tensor.dtype] if packed else contract.FLOAT
            parts = unfuse(model, path, name, stored)
            tensors |= {part: (dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
    return tensors


@pytest.mark.parametrize("row", sorted(contract.sources()))
def test_the_contracts_sources_are_where_it_says(row):
    """Each file of the tables' rows exists and defines what the row names."""
    file, _, symbol = row.partition(" ")
    text = (Path(vllm.__file__).parent / "model_executor" / file).read_text()
    for name in symbol.split("."):
        assert re.search(rf"^\s*((class|def) {name}\b|{name}\b.*=)", text, re.MULTILINE), (
            file,
            name,
        )


# --- the checks notice what is wrong ----------------------------------------------------------------------------------

EXPERT = "backbone.layers.1.mixer.experts.{}.{}.weight_{}"


def zero_an_experts_scales(tensors):
    """Make one projection of one expert vanish."""
    tensors[EXPERT.format(3, "up_proj", "scale")].zero_()


def swap_two_experts(tensors):
    """Exchange two experts in all their tensors."""
    for projection in ("up_proj", "down_proj"):
        for part in ("packed", "scale"):
            one, other = (EXPERT.format(expert, projection, part) for expert in (2, 5))
            tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_two_experts_scales(tensors):
    """Exchange only the scales of two experts."""
    one, other = (EXPERT.format(expert, "down_proj", "scale") for expert in (2, 5))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def reverse_the_codes_of_a_word(tensors):
    """Pack the first of eight codes into the highest bits."""
    for name in tensors:
        if name.endswith(".in_proj.weight_packed"):
            octets = tensors[name].view(torch.uint8)
            reversed_octets = ((octets >> 4) | (octets << 4)).view(-1, 4).flip(1).contiguous()
            tensors[name] = reversed_octets.view(torch.int32).view_as(tensors[name])


def drop_an_expert(tensors):
    """Leave out one projection of one expert."""
    for part in ("packed", "scale", "shape"):
        del tensors[EXPERT.format(3, "up_proj", part)]


def add_an_expert(tensors):
    """Write one expert more than the model has."""
    for part in ("packed", "scale", "shape"):
        one_more = EXPERT.format(MARLIN_LEGAL.n_routed_experts, "up_proj", part)
        tensors[one_more] = tensors[EXPERT.format(0, "up_proj", part)].clone()


def halve_an_experts_rows(tensors):
    """Write half of one expert's rows."""
    for part in ("packed", "scale"):
        name = EXPERT.format(3, "up_proj", part)
        tensors[name] = tensors[name][:96]
    tensors[EXPERT.format(3, "up_proj", "shape")][0] = 96


def write_scales_in_float32(tensors):
    """Store scales with more digits than vLLM keeps."""
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            tensors[name] = 1.001 * tensor.float()


# Each fault with the first weight that is then wrong.
FAULTS = {
    zero_an_experts_scales: r"layers\.1\.mixer\.experts\.3\.up_proj",
    swap_two_experts: r"layers\.1\.mixer\.experts\.2\.",
    swap_two_experts_scales: r"layers\.1\.mixer\.experts\.2\.down_proj",
    reverse_the_codes_of_a_word: r"layers\.0\.mixer\.in_proj",
    drop_an_expert: r"layers\.1\.mixer\.experts\.3\.up_proj",
    add_an_expert: r"layers\.1\.mixer\.experts\.8\.up_proj",
    halve_an_experts_rows: r"layers\.1\.mixer\.experts\.3\.up_proj",
    write_scales_in_float32: r"layers\.0\.mixer\.in_proj",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_that_vllm_loads_without_complaint_is_noticed(source, folder, fault):
    """vLLM loads each of these folders; the comparison names the weight that is wrong."""
    edit_tensors(folder, fault)
    load_into_vllm(folder)
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_folder(folder, source)


def test_one_wrong_bit_in_vllms_memory_is_noticed(folder):
    """The comparison is exact, in the last expert's last code too."""
    model = load_into_vllm(folder)
    check_vllm_holds_the_files(model, folder)
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    experts[-1].w2_weight_packed.data[-1, -1, -1] ^= 1
    with pytest.raises(AssertionError):
        check_vllm_holds_the_files(model, folder)


# --- what vLLM refuses, and why the folder is written as it is --------------------------------------------------------


def edit_ignore(folder, edit):
    """Apply `edit` to the list of patterns of kept layers."""
    edit_quantization_config(folder, lambda quantization: edit(quantization["ignore"]))


def test_vllm_refuses_a_fused_layer_that_is_half_ignored(folder):
    """q, k and v are quantized together or not at all."""
    edit_ignore(folder, lambda ignore: ignore.append(r"re:.*layers\.3\.mixer\.q_proj$"))
    with pytest.raises(ValueError, match="different quantization schemes"):
        load_into_vllm(folder)


def test_vllm_refuses_experts_that_are_ignored_by_their_own_names(folder):
    """It asks for expert 0's gate_proj too, which NemotronH lacks, so only a pattern for the whole stack serves."""
    edit_ignore(
        folder,
        lambda ignore: ignore.append(r"re:.*layers\.4\.mixer\.experts\.\d+\.(up|down)_proj$"),
    )
    with pytest.raises(
        ValueError, match="All MoE projections need to have same quantization scheme"
    ):
        load_into_vllm(folder)


def test_vllm_refuses_a_kept_layer_that_is_not_ignored(source, tmp_path):
    """Without its pattern a layer kept in bfloat16 has no parameter to go to, which vLLM says in its own ways."""
    folder = convert(source, tmp_path / "quantized", exclude=EXCLUDE["layers"])
    edit_ignore(folder, lambda ignore: ignore.clear())
    with pytest.raises((ValueError, AttributeError), match=r"no module or parameter|no attribute"):
        load_into_vllm(folder)
