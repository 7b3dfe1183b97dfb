"""The table of unusual types of models against transformers' own mapping, type by type, on models without weights.

A new version of transformers that has a type which the table lacks, or names something otherwise, fails here by name.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import replace
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import meta_models
import pytest
import torch
import transformers
from conftest import assert_refused, quantize, run_cli
from families import ATTENTION, COMMON, LINEAR_ATTENTION, TOKENS, UNTIED
from folders import write_dense_twin
from meta_models import as_tensors
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

import quantize_int4


def stacks_of(built):
    """What the command takes for stacks of experts in a state dict, in a format for engines."""
    checkpoint = SimpleNamespace(config=built.config, tensors=as_tensors(built.in_memory))
    return checkpoint, quantize_int4.find_expert_stacks(checkpoint, for_engines=True)


FOLDERS = sorted({*meta_models.folders_with_experts(), *meta_models.folders_with_conversions()})


@pytest.fixture(scope="module", params=FOLDERS)
def models(request):
    """The models of one of transformers' folders, of all that have experts or are converted as they are loaded."""
    return meta_models.build_models(request.param)


# --- experts ----------------------------------------------------------------------------------------------------------


def test_the_table_has_each_type_with_stacks_of_experts_and_names_them_as_its_loader_does(models):
    for built in models:
        checkpoint, stacks = stacks_of(built)
        if not stacks:
            continue
        row = quantize_int4.oddity_with("tells_experts", built.config)
        assert row.tells_experts, f"{built.model_type} is in no row of ODDITIES"
        refused = any(stack.problem for stack in stacks.values())
        if refused or row.linear_experts:  # the latter are no stacks in a quantized model
            continue
        for part in quantize_int4.separate_experts(checkpoint, stacks):
            targets, operations = built.load(part.name)
            assert targets == [part.name_in_file], f"{built.model_type}: {part.name} is lost"
            merged = "MergeModulelist" in operations
            assert merged == (part.name_in_file in stacks), f"{built.model_type}: {part.name}"


def test_what_the_table_says_is_known_as_a_stack_alone_is_saved_so(models):
    for built in models:
        row = quantize_int4.oddity_with("tells_experts", built.config)
        if not row.problem_of_engines or row.remedy:
            continue
        separate = [name for name in built.in_file if re.search(r"\.experts\.\d+\.", name)]
        assert not separate, f"{built.model_type} has separate experts in its files: {separate[:1]}"


# --- layers -----------------------------------------------------------------------------------------------------------


def test_the_table_has_each_type_whose_layers_are_conv1d():
    found = set()
    for folder in sorted(path.name for path in meta_models.FOLDERS.iterdir()):
        if re.search(r"pytorch_utils import .*\bConv1D\b", meta_models.sources_of(folder)):
            found |= set(meta_models.types_of(folder))
    found -= {"clvp_encoder"}  # whose layers are linear ones
    assert len(found) >= 6
    for model_type in found:
        row = quantize_int4.oddity_with("conv1d", {"model_type": model_type})
        assert row.conv1d, f"{model_type} is in no row of ODDITIES with conv1d"


def rows_of(built):
    """The table's rows about what is renamed in this model as it is loaded."""
    return list(dict.fromkeys(quantize_int4.loadings_of(built.config)))


def linear_weights(built):
    """The 2-D tensors of a model's files, and of its state dict, that become linear layers: one of each kind, with the
    names of the layers' weights and by which operations they come about."""
    seen = set()
    for name, shape in [*built.in_file.items(), *built.in_memory.items()]:
        kind = re.sub(r"\d+", "0", name)
        if len(shape) != 2 or kind in seen:
            continue
        seen.add(kind)
        targets, operations = built.load(name)
        linear = all(target.removesuffix(".weight") in built.linear for target in targets)
        if linear and "MergeModulelist" not in operations:
            yield name, targets, operations


def test_the_table_has_all_names_of_layers_in_memory_or_says_that_it_has_not(models):
    for built in models:
        rows = rows_of(built)
        for name, targets, _ in linear_weights(built):
            known = quantize_int4.names_in_memory(name, rows)
            if known is None:
                continue  # refused where it is kept
            (info,) = as_tensors({name: (64, 64)}).values()
            kept = quantize_int4.TensorPlan(info, "kept", None, (), in_memory=known)
            patterns = quantize_int4.patterns_of_modules([kept], None)
            patterns.append("lm_head$")  # which is always an entry
            for target in targets:
                layer = target.removesuffix(".weight")
                found = any(re.match(pattern, layer) for pattern in patterns)
                assert found, f"{built.model_type}: {name} becomes {target}"


def test_the_table_has_all_weights_that_are_split_or_joined_while_loading(models):
    for built in models:
        rows = rows_of(built)
        for name, _, operations in linear_weights(built):
            head = "Inkling2UnpadVocab" in operations  # which is kept
            if not operations or not name.endswith(".weight") or head:
                continue
            split = len(quantize_int4.names_in_memory(name, rows) or ()) > 1
            patterns = [row.oddity.computed for row in rows if row.oddity.computed]
            said = split or any(re.search(pattern, name) for pattern in patterns)
            assert said, f"{built.model_type}: {name} goes through {operations}"


def unpacking_loader():
    """The part of transformers that changes how tensors are split and joined where layers are packed."""
    loader = CompressedTensorsHfQuantizer.__new__(CompressedTensorsHfQuantizer)
    loader.pre_quantized = True
    loader.use_fp8_kernel = False
    loader.quantization_config = SimpleNamespace(dequantize=False)
    return loader


def what_stops_the_loader(built, tensors):
    """What transformers itself takes for packed in this plan and is kept, or why it stops before it reads any."""
    packed, kept = set(), []
    for tensor in tensors:
        targets, operations = built.load(tensor.source.name)
        if tensor.packing and "MergeModulelist" not in operations:
            packed |= {target.removesuffix(".weight") for target in targets}
        elif not tensor.packing:
            kept.append(tensor.source.name)
    names = [name for name in built.in_memory if name.removesuffix(".weight") not in packed]
    names += [f"{name}.weight_{part}" for name in packed for part in ("packed", "scale", "shape")]
    model = SimpleNamespace(named_parameters=lambda: [(name, None) for name in names])
    try:
        changed = unpacking_loader().update_weight_conversions(built.transforms, model)
    except ValueError as error:
        return [str(error)]
    other = replace(built, converters=changed)
    return [name for name in kept if "CompressedTensorsDequantize" in other.load(name)[1]]


@pytest.mark.parametrize("way", ["in_file", "in_memory"])
def test_the_table_says_where_what_is_split_or_joined_while_loading_must_be_packed(models, way):
    for built in models:
        infos = [replace(info, nbytes=1) for info in as_tensors(getattr(built, way)).values()]
        kinds = quantize_int4.find_kinds(infos, built.config)
        tensors = list(quantize_int4.plan_tensors(infos, kinds, OPTIONS, built.config))
        checkpoint = SimpleNamespace(config=built.config)
        draft = quantize_int4.Draft(checkpoint, OPTIONS, sources=infos, tensors=tensors)
        computed = {info.name for info in quantize_int4.computed_when_loaded(draft)}
        # As planned, and with all that is computed kept.
        for names in ({}, computed):
            plan = [replace(t, packing=None) if t.source.name in names else t for t in tensors]
            said = quantize_int4.lost_beside_packed(replace(draft, tensors=plan))
            if computed and not names:
                continue  # said in other words
            found = what_stops_the_loader(built, plan)
            assert bool(said) == bool(found), f"{built.model_type}, {way}: {said}, {found[:1]}"


OPTIONS = quantize_int4.Options("compressed-tensors", 32, [], False, [], "mse", None, False, 4.0)
REFUSED = {  # their layers are Conv1D, or their experts' rows alternate, so that no such run begins
    "decision_transformer",
    "inkling_mm_model",
}


def test_what_is_packed_is_a_linear_layer_in_memory_or_an_expert(models):
    for built in models:
        if built.model_type in REFUSED:
            continue
        infos = [replace(info, nbytes=1) for info in as_tensors(built.in_file).values()]
        kinds = quantize_int4.find_kinds(infos, built.config)
        for tensor in quantize_int4.plan_tensors(infos, kinds, OPTIONS, built.config):
            name = tensor.source.name
            if not tensor.packing or quantize_int4.EXPERT_PATTERN.match(name):
                continue
            for target in built.load(name)[0]:
                layer = target.removesuffix(".weight")
                assert layer in built.linear, f"{built.model_type}: {name} becomes {target}"


def tied_to_others(built):
    """The tensors of a model that no file holds, since they are those of other names."""
    return getattr(built.model, "all_tied_weights_keys", None) or {}


def layers_without_weights(built, tensors):
    """The model's linear layers that are packed, and those that the loader takes for packed: no entry keeps them."""
    packed = set()
    for tensor in tensors:
        targets, operations = built.load(tensor.source.name)
        if tensor.packing and "MergeModulelist" not in operations:
            packed |= {target.removesuffix(".weight") for target in targets}
    patterns = [*quantize_int4.patterns_of_modules(tensors, None), "lm_head$"]
    tied = {name.removesuffix(".weight") for name in tied_to_others(built)}
    not_kept = {name for name in tied if not any(re.match(p, name) for p in patterns)}
    return packed & built.linear, not_kept & built.linear


@contextlib.contextmanager
def as_if_loaded(model, packed):
    """A model all of whose tensors are loaded, those of packed layers under other names than `weight`."""
    modules = dict(model.named_modules())
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True
    held = {name: modules[name]._parameters.pop("weight") for name in packed}
    for name, weight in held.items():
        modules[name].register_parameter("weight_packed", weight)
    try:
        yield
    finally:
        for name, weight in held.items():
            del modules[name]._parameters["weight_packed"]
            modules[name].register_parameter("weight", weight)
        for module in modules.values():
            vars(module).pop("_is_hf_initialized", None)


def test_the_table_has_each_type_whose_layers_are_asked_for_dense_weights_while_loading(models):
    for built in models:
        tied = tied_to_others(built)
        shapes = {name: shape for name, shape in built.in_file.items() if name not in tied}
        infos = [replace(info, nbytes=1) for info in as_tensors(shapes).values()]
        kinds = quantize_int4.find_kinds(infos, built.config)
        tensors = list(quantize_int4.plan_tensors(infos, kinds, OPTIONS, built.config))
        checkpoint = SimpleNamespace(config=built.config)
        draft = quantize_int4.Draft(checkpoint, OPTIONS, sources=infos, kinds=kinds)
        packed, taken_for_packed = layers_without_weights(built, tensors)
        if quantize_int4.must_be_decoded(draft):
            continue
        assert not taken_for_packed, f"{built.model_type}: {taken_for_packed}"
        with as_if_loaded(built.model, packed), torch.no_grad(), torch.device("meta"):
            try:
                built.model.initialize_weights()
            except AttributeError as error:
                raise AssertionError(f"{built.model_type} is in no row of ODDITIES") from error


def test_no_norm_and_no_bias_of_a_whole_model_is_called_missing(models):
    for built in models:
        config = built.config | {"architectures": [type(built.model).__name__]}
        for shapes in (built.in_file, built.in_memory):
            infos = list(as_tensors(shapes).values())
            checkpoint = SimpleNamespace(config=config)
            draft = quantize_int4.Draft(checkpoint, OPTIONS, sources=infos)
            for check in (quantize_int4.check_norms_and_biases, quantize_int4.check_final_norm):
                assert not list(check(draft)), built.model_type


# --- tiny models that are really loaded -------------------------------------------------------------------------------

SIZES = {**COMMON, **ATTENTION, **UNTIED, "num_hidden_layers": 2, "intermediate_size": 256}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
TINY = {
    "exaone": {key: value for key, value in SIZES.items() if key != "head_dim"},
    "lara_mini": SIZES | MOE | LINEAR_ATTENTION | MIXED,
    "hrm_text": SIZES | {"num_layers_per_stack": 2},
    "mixtral": SIZES | MIXTRAL,
    "olmo_hybrid": SIZES | LINEAR_ATTENTION | MIXED,
    "phimoe": SIZES | MIXTRAL,
    "qwen3_moe": SIZES | MOE,
    "sarvam_moe": SIZES | MOE | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
CLOSED = ["--format", "compressed-tensors", "--group_size", 64]


@torch.no_grad()
def save(name, folder):
    """Save a tiny model, random in every parameter, with `save_pretrained`."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **TINY[name])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for tensor in model.parameters():
        tensor += 0.05 * torch.randn(tensor.shape)
    model.save_pretrained(folder)
    return folder


def load(folder):
    """Load a folder with transformers; what a loader does not find it makes up, and only reports."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, report = load(folder, output_loading_info=True)
    return model.eval(), {what: keys for what, keys in report.items() if keys}


def assert_loads_as_its_twin(folder):
    """Whether transformers makes of a folder the model of its dense twin, and makes nothing up."""
    write_dense_twin(folder, folder.with_name("twin"))
    model, report = load(folder)
    twin, twin_report = load(folder.with_name("twin"))
    assert not report and not twin_report
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, twin(input_ids=TOKENS).logits)
    held, expected = model.state_dict(), twin.state_dict()
    for key, tensor in expected.items():
        assert torch.equal(held[key], tensor), key


KEPT = {
    "exaone": r"h\.1\.attn\.attention\.[qkv]_proj|h\.0\.mlp\.c_fc",
    "lara_mini": r"linear_attn\.in_proj|\.experts\.",
    "phimoe": r"layers\.1\.self_attn\.[qkv]_proj",
    "sarvam_moe": r"query_key_value|layers\.0\.attention\.dense",
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_layers_that_transformers_renames_or_splits_while_loading_are_loaded(tmp_path, name):
    save(name, tmp_path / "source")
    result = quantize(tmp_path / "source", tmp_path / "out", *CLOSED, "--exclude", KEPT[name])
    assert_loads_as_its_twin(tmp_path / "out")
    assert "AutoModelForCausalLM" in result.stdout


T5 = {"d_model": 128, "d_ff": 128, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (transformers.T5Config(vocab_size=320, **T5), "T5ForConditionalGeneration"),
        (transformers.BioGptConfig(**SIZES | {"tie_word_embeddings": True}), "BioGptForCausalLM"),
    ],
)
def test_the_line_that_loads_decodes_where_dense_weights_are_asked_for(tmp_path, config, name):
    model = getattr(transformers, name)(config).bfloat16()
    model.save_pretrained(tmp_path / "in")
    printed = quantize(tmp_path / "in", tmp_path / "out", *CLOSED).stdout
    line = re.search(r"  Load: +(.*)", printed)[1].replace("'out'", repr(str(tmp_path / "out")))
    loaded = eval(line, {"transformers": transformers}).state_dict()
    write_dense_twin(tmp_path / "out", tmp_path / "twin")
    for key, tensor in type(model).from_pretrained(tmp_path / "twin").state_dict().items():
        assert torch.equal(loaded[key], tensor), key
    with pytest.raises(AttributeError, match=r"has no attribute .weight"):
        type(model).from_pretrained(tmp_path / "out")

    two_widths = [*CLOSED, "--int8", "attn|Attention", "--dry_run"]
    plan = quantize(tmp_path / "in", tmp_path / "out2", *two_widths).stdout
    assert "transformers (5.24) asks this model's layers for dense weights" in plan


def test_layers_in_8_bits_that_transformers_renames_while_loading_are_loaded_in_8_bits(tmp_path):
    save("exaone", tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out", *CLOSED, "--int8", r"attn\.attention")
    assert_loads_as_its_twin(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "options"), [("lara_mini", ["--exclude", r"\.experts\."]), ("sarvam_moe", [])]
)
def test_packed_weights_that_transformers_splits_while_loading_are_told_instead_of_how_to_load(
    tmp_path, name, options
):
    save(name, tmp_path / "source")
    result = quantize(tmp_path / "source", tmp_path / "out", *CLOSED, *options)
    assert (
        "Note:      transformers (5.24) stops at this folder: it splits or joins" in result.stdout
    )
    assert "Load:    not with transformers (5.24), which stops" in result.stdout
    assert "AutoModelForCausalLM" not in result.stdout
    with pytest.raises(Exception, match=r"conversion|shape|size"):
        load(tmp_path / "out")


def test_so_is_a_packed_tower_told_whose_layers_are_asked_for_dense_weights(tmp_path):
    text = {"vocab_size": 320, "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 64}
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"intermediate_size": 256, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text | sizes, vision_config=vision | sizes, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config).bfloat16()
    model.save_pretrained(tmp_path / "in")
    ask = "asks this model's layers for dense weights"
    assert ask not in quantize(tmp_path / "in", tmp_path / "plain", *CLOSED).stdout
    packed = quantize(tmp_path / "in", tmp_path / "out", *CLOSED, "--int8", "vision_tower")
    assert ask in packed.stdout
    type(model).from_pretrained(tmp_path / "plain")
    with pytest.raises(AttributeError, match=r"has no attribute .weight"):
        type(model).from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "options", "lost"),
    [
        ("olmo_hybrid", [], "model.layers.0.linear_attn.k_conv1d.weight"),
        ("hrm_text", ["--exclude", "gqkv_proj|gate_up_proj"], "self_attn.gate_proj"),
    ],
)
def test_what_transformers_splits_or_joins_only_where_it_is_packed_is_told(
    tmp_path, name, options, lost
):
    save(name, tmp_path / "source")
    result = quantize(tmp_path / "source", tmp_path / "out", *CLOSED, *options)
    (line,) = [line for line in result.stdout.splitlines() if "  Load:" in line]
    assert "not with transformers (5.24), which stops" in line
    assert f"'{lost}'" in line
    assert "for transformers --restore it" in line
    assert "--exclude" not in line
    with pytest.raises((RuntimeError, ValueError)):
        load(tmp_path / "out")
    quantize(tmp_path / "out", tmp_path / "restored", "--restore")
    _, report = load(tmp_path / "restored")
    assert not report


def test_only_an_exclude_that_helps_is_named(tmp_path):
    save("hrm_text", tmp_path / "hrm_text")
    plan = quantize(tmp_path / "hrm_text", tmp_path / "out", *CLOSED, "--dry_run").stdout
    assert "stops at this folder" in plan
    assert "--exclude" not in plan

    save("lara_mini", tmp_path / "lara_mini")
    options = [*CLOSED, "--exclude", r"\.experts\."]
    plan = quantize(tmp_path / "lara_mini", tmp_path / "out", *options, "--dry_run").stdout
    pattern = re.search(r"stops at this folder: .*, or --exclude '(.*)' keeps them", plan)[1]
    quantize(tmp_path / "lara_mini", tmp_path / "kept", *options, "--exclude", pattern)
    assert_loads_as_its_twin(tmp_path / "kept")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_transformers_stops_at_gated_experts_that_are_kept_and_the_plan_says_so(tmp_path, name):
    save(name, tmp_path / "source")
    result = quantize(tmp_path / "source", tmp_path / "out", *CLOSED, "--exclude", "experts")
    assert "transformers (5.24) stops at experts that are kept" in result.stdout
    assert "Load:    not with transformers" in result.stdout
    with pytest.raises(RuntimeError):
        load(tmp_path / "out")


def test_layers_whose_names_in_memory_are_not_known_are_packed_or_refused(tmp_path):
    config = transformers.ViTConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    config.num_attention_heads = 4
    model = transformers.ViTModel._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    quantize(tmp_path / "source", out, *CLOSED)
    other = run_cli(tmp_path / "source", tmp_path / "b", *CLOSED, "--exclude", "attention.query")
    assert_refused(
        other,
        "2 weights kept or in 8 bits while transformers",
        "attention.query.weight'",
        "--format int4",
    )
    quantize(tmp_path / "source", tmp_path / "int4", "--exclude", "attention.query")
