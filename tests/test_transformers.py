"""Proof by family: whatever way a model was saved, transformers makes of the quantized folder the dequantized model.

"It loaded" proves nothing: what a loader does not find it fills with random numbers, what it does not know it skips. So
every parameter, buffer and logit is compared with those of a dense twin, the checkpoint of the weights as a reader of
its own decodes them, and the twin with the model that was saved, which no name in any file connects with it.

What the README's tables leave out. transformers 5.16 to 5.24 load experts that --exclude kept only as stacks: at one
weight an expert 5.24 stops, or leaves NemotronH's random. It stops, too, where it splits or joins packed weights as it
loads them. Through GPTQModel and optimum (2.3) NemotronH's experts are left random. The plan says all of these. Gemma 3
with images loads as it is, since its tower is kept. CompressedTensorsConfig(run_compressed=False) is not for folders
with --int8, all of whose layers it decodes as if they had one width. MTP: test_transformers_mtp.py.
"""

import os
import re
from dataclasses import dataclass, replace
from functools import cached_property

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import families
import pytest
import torch
import transformers
from conftest import ENGINE_FORMATS, assert_refused, quantize, run_cli
from families import FAMILIES, logits_of
from folders import (
    edit_quantization_config,
    edit_tensors,
    read_config,
    read_dequantized,
    read_tensors,
    unpack_words,
    write_dense_twin,
)
from torch import nn

OPTIONS = ["--format", "compressed-tensors", "--group_size", 64]
# What a reader adds to the dense model's state: it keeps the scales and shapes beside the weights it decoded.
LEFTOVERS = re.compile(r"\.weight_(scale|shape)$")
# What transformers loads only with code from the hub.
ELSEWHERE = {("internvl", "internvl_chat")}
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


def convert(name, saved, layers, folder, options=None):
    """A family's model, saved in one way, quantized without what one exclude keeps."""
    families.save(name, saved, folder / "source")
    options = options or ["--format", "compressed-tensors", *families.group_size(name)]
    quantize(folder / "source", folder / "out", *options, *families.options(name, layers))
    return folder / "out"


@dataclass(frozen=True)
class Loaded:
    """A family's model as it was saved, what transformers made of the quantized folder, and the dense twin of that."""

    original: nn.Module
    model: nn.Module
    report: dict
    twin: nn.Module
    twin_report: dict

    @cached_property
    def logits(self):
        """The loaded model's output."""
        return logits_of(self.model)

    @cached_property
    def state(self):
        """The loaded model's tensors, once compressed-tensors has decoded them, which it does in the first forward."""
        assert self.logits is not None
        state = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if not LEFTOVERS.search(name)
        }
        return families.stack_experts(
            state, transposed=True
        )  # of Llama-4, which has them apart once it is quantized


def load_with_twin(name, folder, **options):
    """What transformers makes of a quantized folder, and of the twin decoded from it, which is written beside it."""
    write_dense_twin(folder, folder.with_name("twin"))
    if (
        name == "llama4"
    ):  # dense, transformers has stacks for its experts, and quantized an nn.Linear for each
        edit_tensors(folder.with_name("twin"), families.transpose_and_stack)
    twin = families.load(name, folder.with_name("twin"))
    return Loaded(families.built(name), *families.load(name, folder, **options), *twin)


@pytest.fixture(scope="module", params=families.cases(ELSEWHERE), ids="-".join)
def loaded(request, tmp_path_factory):
    """One family, saved in one way, quantized with one exclude or none, and loaded."""
    name, saved, layers = request.param
    return load_with_twin(name, convert(name, saved, layers, tmp_path_factory.mktemp("family")))


# --- checks, each shown to notice a fault at the end of this file -----------------------------------------------------


def check_report(loaded):
    """The loader found every key it wanted, and wanted every key it found; the same holds for the twin."""
    assert loaded.report.keys() >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
    for report in (loaded.report, loaded.twin_report):
        assert not {what: keys for what, keys in report.items() if keys}


def check_parameters(loaded):
    """The model's parameters and buffers are those of the twin, in the same dtypes, and nothing else."""
    expected = loaded.twin.state_dict() | dict(loaded.twin.named_buffers())
    held = loaded.state | dict(loaded.model.named_buffers())
    assert {name for name in held if not LEFTOVERS.search(name)} == expected.keys()
    for name, tensor in expected.items():
        assert held[name].dtype == tensor.dtype, name
        assert torch.equal(held[name], tensor), name


def check_logits(loaded):
    """The outputs do not differ at all from the twin's, and are numbers."""
    expected = logits_of(loaded.twin)
    # Llama-4's twin multiplies its experts as a batch, and so rounds otherwise.
    tolerance = 0.02 * expected.abs().max() if loaded.twin.config.model_type == "llama4_text" else 0
    assert loaded.logits.isfinite().all()
    assert (loaded.logits - expected).abs().max() <= tolerance


def check_source(loaded):
    """Every row is the same row of the same expert of the same layer, to INT4's precision: see folders.py."""
    expected, held = loaded.original.state_dict(), loaded.twin.state_dict()
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        if VERSION >= (5, 24) or not name.endswith(".gate.weight"):  # see families.Family
            assert held[name].dtype == tensor.dtype, name
        if tensor.dim() < 2:
            assert torch.equal(held[name], tensor), name
            continue
        error = (held[name].float() - tensor.float()).norm(dim=-1) / tensor.float().norm(dim=-1)
        assert error.max() < 0.2, f"{name}: {error.max():.2f}"


# --- claims -----------------------------------------------------------------------------------------------------------


def test_no_key_is_missing_and_none_is_unknown(loaded):
    check_report(loaded)


def test_every_parameter_and_buffer_equals_the_twins_in_the_same_dtype(loaded):
    check_parameters(loaded)


def test_logits_equal_the_twins_and_are_numbers(loaded):
    check_logits(loaded)


def test_the_twin_resembles_the_model_that_was_saved(loaded):
    check_source(loaded)


DECODED_AT_ONCE = [name for name, family in FAMILIES.items() if family.decoded_at_once]


@pytest.mark.parametrize(
    ("name", "saved"), families.cases_of_limits({*ELSEWHERE, *DECODED_AT_ONCE})
)
def test_what_is_chosen_within_a_limit_is_loaded_as_the_twin(name, saved, tmp_path):
    source, options = families.limited(name, saved, tmp_path)
    quantize(source, tmp_path / "out", *options)
    assert len(read_config(tmp_path / "out")["quantization_config"]["config_groups"]) > 1
    loaded = load_with_twin(name, tmp_path / "out")
    check_report(loaded)
    check_parameters(loaded)
    check_logits(loaded)


@pytest.mark.parametrize("name", ["nemotron_h", "llama"])
def test_groups_of_32_and_negative_scales_of_mse_survive(name, tmp_path):
    options = ["--format", "compressed-tensors", "--group_size", 32, "--scale", "mse"]
    folder = convert(name, "pretrained", "", tmp_path, options)
    assert any(
        (tensor < 0).any()
        for key, tensor in read_tensors(folder).items()
        if key.endswith(".weight_scale")
    )
    result = load_with_twin(name, folder)
    check_report(result)
    check_parameters(result)
    check_logits(result)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("name", "layers"), [("nemotron_h", "layers"), ("llama_tied", "attention")]
)
def test_weights_dequantized_while_loading_equal_the_twins(name, layers, tmp_path):
    folder = convert(name, "pretrained", layers, tmp_path)
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    result = load_with_twin(name, folder, **options)
    check_report(result)
    check_parameters(result)
    check_logits(result)
    assert not any(LEFTOVERS.search(key) for key in result.model.state_dict())


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("nemotron_h", ""),
        ("nemotron_h", "layers"),
        ("llama", ""),
        ("llama", "attention"),
        ("llama_tied", ""),
    ],
)
def test_quantized_layers_are_all_linear_ones_but_head_routers_and_excluded(name, layers, tmp_path):
    _, quantized = read_dequantized(convert(name, "pretrained", layers, tmp_path))
    # transformers' routers are no nn.Linear, and it holds the experts of a layer in one parameter.
    modules = families.built(name).named_modules()
    linear = {
        f"{module_name}.weight" for module_name, module in modules if isinstance(module, nn.Linear)
    }
    linear = {
        key.replace("model.", "backbone.", 1) if name == "nemotron_h" else key for key in linear
    }
    linear |= {key for key in read_tensors(tmp_path / "source") if ".experts." in key}
    kept = {key for key in linear if layers and re.search(FAMILIES[name].excludes[layers], key)}
    assert bool(kept) == bool(layers)
    assert quantized == linear - kept - {"lm_head.weight"}


@pytest.mark.parametrize("name", ["llama", "nemotron_h", "qwen3_moe"])
def test_transformers_computes_with_a_restored_folder_what_it_computes_with_the_quantized_one(
    name, tmp_path
):
    folder = convert(name, "pretrained", next(iter(FAMILIES[name].wide)), tmp_path)
    quantize(folder, tmp_path / "restored", "--restore")
    logits = []
    for path in (folder, tmp_path / "restored"):
        model, report = families.load(name, path)
        assert not any(report.values())
        logits.append(logits_of(model))
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].float32_routers])
@pytest.mark.parametrize("output_format", ENGINE_FORMATS)
def test_routers_in_float32_are_kept_so(name, output_format, tmp_path):
    families.save(name, "pretrained", tmp_path / "source")
    options = ["--format", output_format, "--group_size", 64]
    quantize(tmp_path / "source", tmp_path / "out", *options)
    quantize(tmp_path / "out", tmp_path / "restored", "--restore")
    source = read_tensors(tmp_path / "source")
    routers = [key for key in source if key.endswith(".gate.weight")]
    assert routers
    for folder in ("out", "restored"):
        written = read_tensors(tmp_path / folder)
        for key in routers:
            assert source[key].dtype == written[key].dtype == torch.float32, key
            assert torch.equal(source[key], written[key]), key


# --- ways to save -----------------------------------------------------------------------------------------------------

SAME_NAME = {"nemotron_h": (r"^model\.", "backbone.")}
REFUSED = [
    (name, saved) for name, family in FAMILIES.items() if family.refused for saved in family.saved
]
RESAVED = [
    (name, saved)
    for name, family in FAMILIES.items()
    for saved in family.saved
    if saved != "pretrained" and name not in families.MULTIMODAL
]


@pytest.mark.parametrize(
    ("name", "saved"), [case for case in RESAVED if not FAMILIES[case[0]].refused]
)
def test_a_model_saved_as_a_state_dict_gives_the_tensors_of_one_saved_by_save_pretrained(
    name, saved, tmp_path
):
    expected = read_tensors(convert(name, "pretrained", "", tmp_path / "pretrained"))
    written = read_tensors(convert(name, saved, "", tmp_path / saved))
    for pattern, replacement in [SAME_NAME[name]] if name in SAME_NAME else []:
        written = {re.sub(pattern, replacement, key): tensor for key, tensor in written.items()}
    if "lm_head.weight" not in expected:  # tied: a state dict holds it twice
        assert torch.equal(written.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert written.keys() == expected.keys()
    for key, tensor in expected.items():
        assert written[key].dtype == tensor.dtype, key
        assert torch.equal(written[key], tensor), key


@pytest.mark.parametrize(("name", "saved"), REFUSED)
def test_stacks_that_no_engine_loads_as_weights_are_refused_by_name(name, saved, tmp_path):
    families.save(name, saved, tmp_path / "source")
    assert_refused(
        run_cli(tmp_path / "source", tmp_path / "out", *OPTIONS),
        FAMILIES[name].refused,
        "--exclude",
    )


@pytest.mark.parametrize(("name", "saved"), REFUSED)
def test_stacks_that_are_kept_are_those_of_the_source(name, saved, tmp_path):
    folder = convert(name, saved, "experts", tmp_path)
    source, written = read_tensors(tmp_path / "source"), read_tensors(folder)
    stacks = [
        key for key, tensor in source.items() if re.search(FAMILIES[name].excludes["experts"], key)
    ]
    assert any(source[key].dim() == 3 for key in stacks)
    for key in stacks:
        assert torch.equal(written[key], source[key]), key


# --- limits of transformers 5.24: when one of these fails, it is gone -------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].decoded_at_once])
def test_transformers_cannot_load_these_unless_they_are_decoded_at_once(
    name, tmp_path, monkeypatch
):
    """It, or Qwen2.5-Omni as it runs, asks every layer for the dense weight."""
    folder = convert(name, "pretrained", "", tmp_path)
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], decoded_at_once=False))
    with pytest.raises(AttributeError, match=r"has no attribute .weight."):
        logits_of(families.load(name, folder)[0])


def test_transformers_cannot_load_experts_that_were_kept(tmp_path):
    families.save("nemotron_h", "pretrained", tmp_path / "source")
    quantize(
        tmp_path / "source", tmp_path / "out", *OPTIONS, "--exclude", r"layers\.1\.mixer\.experts\."
    )
    _, report = families.load("nemotron_h", tmp_path / "out")
    experts = "model.layers.1.mixer.experts"
    assert report["missing_keys"] == {f"{experts}.up_proj", f"{experts}.down_proj"}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_dequantizes_layers_of_two_widths_as_if_they_had_one(tmp_path):
    groups_alike = ["--format", "compressed-tensors", "--group_size", 128]
    folder = convert("llama", "pretrained", "attention in 8 bits", tmp_path, groups_alike)
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    result = load_with_twin("llama", folder, **options)
    check_report(result)
    with pytest.raises(AssertionError, match=r"self_attn\.[qkvo]_proj\.weight"):
        check_parameters(result)


def test_transformers_stops_at_an_int4_folder(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    assert "no engine loads" in read_config(tmp_path / "out")["quantization_config"]["about"]
    with pytest.raises(ValueError, match="quant_method"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# --- the checks notice faults -----------------------------------------------------------------------------------------

EXPERTS = "layers.1.mixer.experts"


def swap_experts(tensors):
    """Give two experts of a layer each other's weights."""
    for part in ("weight_packed", "weight_scale"):
        one, other = f"backbone.{EXPERTS}.0.up_proj.{part}", f"backbone.{EXPERTS}.3.up_proj.{part}"
        tensors[one], tensors[other] = tensors[other], tensors[one]


def reverse_nibbles(tensors):
    """Put the first of eight elements into the highest bits."""
    for name, words in tensors.items():
        if name.endswith(".weight_packed"):
            codes = unpack_words(words).unflatten(1, (-1, 8)).flip(2).flatten(1)
            tensors[name] = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int32)


def shift_codes(tensors):
    """Hold the codes in two's complement instead of with an offset of 8."""
    for name, words in tensors.items():
        if name.endswith(".weight_packed"):
            tensors[name] = words ^ -0x77777778  # flips the highest bit of each nibble


def lose_an_expert(tensors):
    """Leave out all of one expert."""
    for name in [name for name in tensors if f"{EXPERTS}.5." in name]:
        del tensors[name]


def pack_a_router(tensors):
    """Quantize what the loader wants dense."""
    name = "backbone.layers.1.mixer.gate"
    rows, columns = tensors.pop(f"{name}.weight").shape
    tensors[f"{name}.weight_packed"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
    tensors[f"{name}.weight_scale"] = torch.zeros(rows, columns // 64, dtype=torch.bfloat16)
    tensors[f"{name}.weight_shape"] = torch.tensor([rows, columns])


def forget_the_head(config):
    """Do not say that the head was kept."""
    config["ignore"] = [entry for entry in config["ignore"] if "lm_head" not in entry]


def forget_a_kept_layer(config):
    """Do not say that an excluded layer was kept."""
    config["ignore"] = [entry for entry in config["ignore"] if "q_proj" not in entry]


def ignore_full_names(config):
    """Name kept layers as the checkpoint does, which transformers reads under other names."""
    config["ignore"] = [
        re.sub(r"^re:\(\.\*\\\.\)\?|\\|\$$", "", entry) for entry in config["ignore"]
    ]
    config["ignore"] = [
        f"backbone.{entry}" if entry.startswith("layers") else entry for entry in config["ignore"]
    ]


def misstate_the_group_size(config):
    """Say 32 where the groups are of 64."""
    config["config_groups"]["group_0"]["weights"]["group_size"] = 32


def failed_checks(loaded):
    """Names of the checks that do not hold."""
    failed = set()
    for check in (check_report, check_parameters, check_logits, check_source):
        try:
            check(loaded)
        except AssertionError:
            failed.add(check.__name__)
    return failed


@pytest.fixture
def nemotron(tmp_path):
    """A quantized NemotronH of which some layers were excluded."""
    return convert("nemotron_h", "pretrained", "layers", tmp_path)


@pytest.mark.parametrize("fault", [swap_experts, reverse_nibbles, shift_codes])
def test_wrong_weights_in_the_file_are_noticed(fault, nemotron):
    edit_tensors(nemotron, fault)
    # The loader and the independent reader agree on what the file says: only the source tells that it is wrong.
    assert failed_checks(load_with_twin("nemotron_h", nemotron)) == {"check_source"}


@pytest.mark.parametrize("fault", [forget_a_kept_layer, ignore_full_names])
def test_wrong_ignore_entries_are_reported(fault, nemotron):
    edit_quantization_config(nemotron, fault)
    _, report = families.load("nemotron_h", nemotron)
    layer = "model.layers.3.mixer.q_proj"
    assert f"{layer}.weight" in report["unexpected_keys"]
    assert f"{layer}.weight_packed" in report["missing_keys"]


def test_head_missing_from_ignore_is_reported(tmp_path):
    folder = convert("llama", "pretrained", "", tmp_path)
    edit_quantization_config(folder, forget_the_head)
    _, report = families.load("llama", folder)
    assert report["unexpected_keys"] == {"lm_head.weight"}


def test_tied_head_missing_from_ignore_makes_the_loader_fail_although_the_file_has_none(tmp_path):
    folder = convert("llama_tied", "pretrained", "", tmp_path)
    edit_quantization_config(folder, forget_the_head)
    with pytest.raises(AttributeError, match="has no attribute `weight`"):
        families.load("llama_tied", folder)


def test_missing_expert_makes_the_loader_fail(nemotron):
    edit_tensors(nemotron, lose_an_expert)
    with pytest.raises(RuntimeError):
        families.load("nemotron_h", nemotron)


def test_wrong_group_size_makes_the_loader_fail(nemotron):
    edit_quantization_config(nemotron, misstate_the_group_size)
    with pytest.raises(RuntimeError):
        families.load("nemotron_h", nemotron)


def test_packed_router_is_reported(nemotron):
    edit_tensors(nemotron, pack_a_router)
    _, report = families.load("nemotron_h", nemotron)
    assert report["missing_keys"] == {"model.layers.1.mixer.gate.weight"}


def test_missing_weight_shape_is_reported(nemotron):
    name = "layers.4.mixer.shared_experts.up_proj.weight_shape"
    edit_tensors(nemotron, lambda tensors: tensors.pop(f"backbone.{name}"))
    _, report = families.load("nemotron_h", nemotron)
    assert report["missing_keys"] == {f"model.{name}"}


def test_experts_in_the_wrong_order_in_the_model_are_noticed(nemotron):
    loaded = load_with_twin("nemotron_h", nemotron)
    assert not failed_checks(loaded)
    stack = loaded.model.get_parameter(f"model.{EXPERTS}.down_proj").data
    stack[[0, 3]] = stack[[3, 0]]
    assert failed_checks(loaded) == {"check_parameters"}
    assert not torch.equal(logits_of(loaded.model), loaded.logits)
