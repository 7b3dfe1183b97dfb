"""Folders written as compressed-tensors hold, in transformers' own loader, exactly the dequantized weights.

"It loaded" proves nothing, since loaders fill what they do not find with random numbers. So every parameter is compared
with that of a dense twin, whose weights were decoded by an independent reader, and the twin with the source model.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import loader_helpers as helpers
import pytest
import torch
from conftest import read_tensors
from torch import nn
from transformers import CompressedTensorsConfig

# What a reader adds to the dense model's state: it keeps the scales and shapes beside the weights it decoded.
LEFTOVERS = re.compile(r"\.weight_(scale|shape)$")

# Engines fuse q, k and v, so they are excluded together. The rest is of one layer only, or occurs in one kind of layer.
EXCLUDE = {
    "nemotron_h": r"mixer\.[qkv]_proj\.|layers\.1\.mixer\.shared_experts\.|in_proj",
    "dense": r"self_attn\.[qkv]_proj\.|layers\.1\.mlp\.down_proj\.",
}
CASES = [
    (model, group_size, excluding)
    for model in helpers.CONFIGS
    for group_size in (32, 64)
    for excluding in (False, True)
]


@dataclass(frozen=True)
class Loaded:
    """A quantized folder, its source, the model a loader made of it, and the dense twin that it must equal."""

    source: Path
    folder: Path
    model: nn.Module
    report: dict
    twin: nn.Module
    twin_report: dict

    @cached_property
    def logits(self):
        """The loaded model's output."""
        return helpers.logits_of(self.model)

    @cached_property
    def state(self):
        """The loaded model's tensors, once compressed-tensors has decoded them, which it does in the first forward."""
        assert self.logits is not None
        return self.model.state_dict()


def exclude_for(model):
    """The pattern to exclude some layers of a model."""
    return EXCLUDE.get(model, EXCLUDE["dense"])


def load_with_twin(source, folder, **options):
    """Load a quantized folder and the twin decoded from it, which is written beside it."""
    twin_folder = folder.with_name(folder.name + "-twin")
    helpers.write_dense_twin(folder, twin_folder)
    model, report = helpers.load_model(folder, **options)
    twin, twin_report = helpers.load_model(twin_folder)
    return Loaded(source, folder, model, report, twin, twin_report)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The folder of each tiny dense model, by name."""
    folders = {name: tmp_path_factory.mktemp("source") / name for name in helpers.CONFIGS}
    for name, folder in folders.items():
        helpers.save_tiny_model(name, folder)
    return folders


def convert(source, folder, model, group_size, excluding=False, scale="absmax"):
    """Quantize one source folder for compressed-tensors."""
    options = {"group_size": group_size, "exclude": exclude_for(model) if excluding else None, "scale": scale}
    helpers.convert(source, folder, output_format="compressed-tensors", **options)
    return folder


def name_case(case):
    """A case as it appears in the tests' names."""
    model, group_size, excluding = case
    return f"{model}-{group_size}{'-exclude' if excluding else ''}"


@pytest.fixture(scope="module", params=CASES, ids=name_case)
def loaded(request, sources, tmp_path_factory):
    """One model, quantized and loaded once for all claims."""
    model, group_size, excluding = request.param
    folder = tmp_path_factory.mktemp("loaded") / "out"
    convert(sources[model], folder, model, group_size, excluding)
    return load_with_twin(sources[model], folder)


# --- checks, each shown to notice a fault at the end of this file -----------------------------------------------------


def check_report(loaded):
    """The loader found every key it wanted, and wanted every key it found; the same holds for the twin."""
    assert loaded.report.keys() >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
    for report in (loaded.report, loaded.twin_report):
        assert not {what: keys for what, keys in report.items() if keys}


def check_parameters(loaded):
    """The model's parameters and buffers are those of the twin, in the same dtypes, and nothing else."""
    expected = loaded.twin.state_dict()
    assert {name for name in loaded.state if not LEFTOVERS.search(name)} == expected.keys()
    for name, tensor in expected.items():
        assert loaded.state[name].dtype == tensor.dtype, name
        assert torch.equal(loaded.state[name], tensor), name


def check_experts(loaded):
    """Each expert in the loader's stack is that expert's own tensor in the folder."""
    dequantized, _ = helpers.read_dequantized(loaded.folder)
    experts = [name for name in dequantized if ".experts." in name]
    assert len(experts) == 2 * 2 * loaded.model.config.n_routed_experts  # two projections in each of two layers
    for name in experts:
        layer, expert, projection = re.fullmatch(r"backbone\.(.*\.experts)\.(\d+)\.(\w+)\.weight", name).groups()
        assert torch.equal(loaded.state[f"model.{layer}.{projection}"][int(expert)], dequantized[name]), name


def check_logits(loaded):
    """The outputs do not differ at all from the twin's, and are numbers."""
    assert loaded.logits.isfinite().all()
    assert torch.equal(loaded.logits, helpers.logits_of(loaded.twin))


def check_source(loaded):
    """What the folder decodes to resembles the source model."""
    dequantized, quantized = helpers.read_dequantized(loaded.folder)
    helpers.check_weights_resemble_source(dequantized, quantized, read_tensors(loaded.source))


# --- claims -----------------------------------------------------------------------------------------------------------


def test_loader_misses_no_key_and_meets_no_unknown_one(loaded):
    check_report(loaded)


def test_every_parameter_equals_the_dequantized_twins(loaded):
    check_parameters(loaded)


@pytest.mark.parametrize("loaded", [case for case in CASES if case[0] == "nemotron_h"], ids=name_case, indirect=True)
def test_every_expert_is_its_own_dequantized_tensor(loaded):
    check_experts(loaded)


def test_logits_equal_the_dequantized_twins(loaded):
    check_logits(loaded)


def test_dequantized_weights_resemble_the_source(loaded):
    check_source(loaded)


@pytest.mark.parametrize("excluding", [False, True], ids=["all", "exclude"])
@pytest.mark.parametrize("model", helpers.CONFIGS)
def test_quantized_layers_are_all_linear_ones_but_head_routers_and_excluded(model, excluding, sources, tmp_path):
    _, quantized = helpers.read_dequantized(convert(sources[model], tmp_path / "out", model, 64, excluding))
    dense, _ = helpers.load_model(sources[model])
    # transformers' routers are no nn.Linear, and it holds the experts of a layer in one parameter.
    linear = {f"{name}.weight" for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    linear = {name.replace("model.", "backbone.", 1) if model == "nemotron_h" else name for name in linear}
    linear |= {name for name in read_tensors(sources[model]) if ".experts." in name}
    kept = {name for name in linear if excluding and re.search(exclude_for(model), name)}
    assert bool(kept) == excluding
    assert quantized == linear - kept - {"lm_head.weight"}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("model", ["nemotron_h", "llama_tied"])
def test_weights_dequantized_while_loading_equal_the_twins(model, sources, tmp_path):
    folder = convert(sources[model], tmp_path / "out", model, 64, excluding=True)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    result = load_with_twin(sources[model], folder, **options)
    check_report(result)
    check_parameters(result)
    check_logits(result)
    assert not any(LEFTOVERS.search(name) for name in result.state)


@pytest.mark.parametrize("model", ["nemotron_h", "llama"])
def test_negative_scales_of_mse_survive(model, sources, tmp_path):
    folder = convert(sources[model], tmp_path / "out", model, 32, scale="mse")
    result = load_with_twin(sources[model], folder)
    assert any((tensor < 0).any() for name, tensor in result.state.items() if name.endswith(".weight_scale"))
    check_report(result)
    check_parameters(result)
    check_logits(result)


def test_transformers_cannot_load_experts_that_were_kept(sources, tmp_path):
    """A limit of transformers 5.23, which users who exclude experts must know; when this fails, it is gone."""
    options = {"output_format": "compressed-tensors", "group_size": 64, "exclude": r"layers\.1\.mixer\.experts\."}
    helpers.convert(sources["nemotron_h"], tmp_path / "out", **options)
    _, report = helpers.load_model(tmp_path / "out")
    experts = "model.layers.1.mixer.experts"
    assert report["missing_keys"] == {f"{experts}.up_proj", f"{experts}.down_proj"}


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
            codes = helpers.unpack_words(words).unflatten(1, (-1, 8)).flip(2).flatten(1)
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
    config["ignore"] = [re.sub(r"^re:\(\.\*\\\.\)\?|\\|\$$", "", entry) for entry in config["ignore"]]
    config["ignore"] = [f"backbone.{entry}" if entry.startswith("layers") else entry for entry in config["ignore"]]


def misstate_the_group_size(config):
    """Say 32 where the groups are of 64."""
    config["config_groups"]["group_0"]["weights"]["group_size"] = 32


def failed_checks(loaded):
    """Names of the checks that do not hold."""
    failed = set()
    for check in (check_report, check_parameters, check_experts, check_logits, check_source):
        try:
            check(loaded)
        except AssertionError:
            failed.add(check.__name__)
    return failed


@pytest.fixture
def excluding_folder(sources, tmp_path):
    """A quantized NemotronH of which some layers were excluded."""
    return convert(sources["nemotron_h"], tmp_path / "out", "nemotron_h", 64, excluding=True)


@pytest.mark.parametrize("fault", [swap_experts, reverse_nibbles, shift_codes])
def test_wrong_weights_in_the_file_are_noticed(fault, sources, excluding_folder):
    helpers.edit_tensors(excluding_folder, fault)
    # The loader and the independent reader agree on what the file says: only the source tells that it is wrong.
    assert failed_checks(load_with_twin(sources["nemotron_h"], excluding_folder)) == {"check_source"}


@pytest.mark.parametrize("fault", [forget_a_kept_layer, ignore_full_names])
def test_wrong_ignore_entries_are_reported(fault, excluding_folder):
    helpers.edit_quantization_config(excluding_folder, fault)
    _, report = helpers.load_model(excluding_folder)
    layer = "model.layers.2.mixer.q_proj"
    assert f"{layer}.weight" in report["unexpected_keys"]
    assert f"{layer}.weight_packed" in report["missing_keys"]


def test_head_missing_from_ignore_is_reported(sources, tmp_path):
    folder = convert(sources["llama"], tmp_path / "out", "llama", 64)
    helpers.edit_quantization_config(folder, forget_the_head)
    _, report = helpers.load_model(folder)
    assert report["unexpected_keys"] == {"lm_head.weight"}


def test_tied_head_missing_from_ignore_makes_the_loader_fail_although_the_file_has_none(sources, tmp_path):
    folder = convert(sources["llama_tied"], tmp_path / "out", "llama_tied", 64)
    helpers.edit_quantization_config(folder, forget_the_head)
    with pytest.raises(AttributeError, match="has no attribute `weight`"):
        helpers.load_model(folder)


def test_missing_expert_makes_the_loader_fail(excluding_folder):
    helpers.edit_tensors(excluding_folder, lose_an_expert)
    with pytest.raises(RuntimeError):
        helpers.load_model(excluding_folder)


def test_wrong_group_size_makes_the_loader_fail(excluding_folder):
    helpers.edit_quantization_config(excluding_folder, misstate_the_group_size)
    with pytest.raises(RuntimeError):
        helpers.load_model(excluding_folder)


def test_packed_router_is_reported(excluding_folder):
    helpers.edit_tensors(excluding_folder, pack_a_router)
    _, report = helpers.load_model(excluding_folder)
    assert report["missing_keys"] == {"model.layers.1.mixer.gate.weight"}


def test_missing_weight_shape_is_reported(excluding_folder):
    name = "layers.3.mixer.up_proj.weight_shape"
    helpers.edit_tensors(excluding_folder, lambda tensors: tensors.pop(f"backbone.{name}"))
    _, report = helpers.load_model(excluding_folder)
    assert report["missing_keys"] == {f"model.{name}"}


def test_experts_in_the_wrong_order_in_the_model_are_noticed(sources, excluding_folder):
    loaded = load_with_twin(sources["nemotron_h"], excluding_folder)
    assert not failed_checks(loaded)
    stack = loaded.model.get_parameter(f"model.{EXPERTS}.down_proj").data
    stack[[0, 3]] = stack[[3, 0]]
    assert failed_checks(loaded) == {"check_parameters", "check_experts"}
    assert not torch.equal(helpers.logits_of(loaded.model), loaded.logits)
