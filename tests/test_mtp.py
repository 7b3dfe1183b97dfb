"""Layers that predict further tokens (MTP), with which vLLM drafts: what becomes of them, and what is said of them."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from checkpoints import random, save_model
from conftest import ENGINE_FORMATS, assert_refused, quantize, run_cli
from folders import (
    assert_same_tensors,
    folder_bytes,
    is_kept,
    patterns,
    read_config,
    read_tensors,
)
from safetensors.torch import save_file

import quantize_int4 as q

H = 256
EXPERTS = 4
SIZES = {"hidden_size": H, "num_hidden_layers": 2, "vocab_size": 1000}

Tensors = dict[str, torch.Tensor]


def block(path: str) -> Tensors:
    """Make a layer: attention, experts with their router, and norms."""
    shapes = {f"self_attn.{p}_proj": (H, H) for p in "qkvo"}
    shapes |= {"mlp.gate": (EXPERTS, H)}
    for place in (*(f"experts.{number}" for number in range(EXPERTS)), "shared_expert"):
        shapes |= {f"mlp.{place}.{p}_proj": (128, H) for p in ("gate", "up")}
        shapes[f"mlp.{place}.down_proj"] = (H, 128)
    tensors = {f"{path}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{path}.{norm}.weight"] = random(H)
    return tensors


def language_model(root: str) -> Tensors:
    """Make a model of two layers."""
    words = {f"{root}.embed_tokens.weight": random(1000, H), "lm_head.weight": random(1000, H)}
    norm = {f"{root}.norm.weight": random(H)}
    return block(f"{root}.layers.0") | block(f"{root}.layers.1") | norm | words


def entry(name: str) -> Tensors:
    """Make the projection with which such a layer begins: of a state and an embedding."""
    return {f"{name}.weight": random(H, 2 * H)}


# By family: the language model's root, the tensors of MTP, config.json, and a pattern that means all of MTP.
FAMILIES = {
    "qwen3_next": ("model", block("mtp.layers.0") | entry("mtp.fc"), {}, "mtp"),
    "qwen3_5": (
        "model.language_model",
        block("mtp.layers.0") | entry("mtp.fc"),
        {"model_type": "qwen3_5_moe", "mtp_num_hidden_layers": 1},
        "mtp",
    ),
    "nemotron": (
        "backbone",
        block("mtp.layers.0") | block("mtp.layers.1") | entry("mtp.layers.0.eh_proj"),
        {},
        "mtp",
    ),
    "glm4_moe": (
        "model",
        block("model.layers.2") | entry("model.layers.2.eh_proj"),
        {},
        r"layers\.2\.",
    ),
    "mimo": (
        "model",
        block("model.mtp_layers.0") | entry("model.mtp_layers.0.input_proj"),
        {"model_type": "mimo"},
        "mtp",
    ),
    "ernie": (
        "model",
        block("model.mtp_block.0") | entry("model.mtp_linear_proj.0"),
        {"model_type": "ernie4_5_moe"},
        "mtp",
    ),
}
# What engines call the wrapper of a language model.
ROOTS = ("model", "language_model.model", "model.language_model", "backbone", "")


def convert(family, folder, *options, form="compressed-tensors"):
    """Quantize a family's model; returns what the program printed."""
    root, mtp, config, _ = FAMILIES[family]
    tensors = language_model(root) | mtp
    config = SIZES | {"num_nextn_predict_layers": 1} | config
    source = save_model(folder / "in", tensors, **config)
    fixed = ["--format", form, "--group_size", 64, "--scale", "absmax"]
    return quantize(source, folder / "out", *fixed, *options).stdout


def linear_layers(folder):
    """Give the names of all linear layers of a folder but the head, and whether each is packed."""
    layers = {}
    for name, tensor in read_tensors(folder).items():
        module, _, last = name.rpartition(".")
        if last in ("weight_packed", "qweight"):
            layers[module] = True
        elif last == "weight" and tensor.dim() == 2 and module != "lm_head":
            layers[module] = False
    return layers


def names_in_engines(family, module):
    """List what engines call a module: the model's under every wrapper, that of MTP as vLLM does."""
    root, mtp, _, _ = FAMILIES[family]
    if f"{module}.weight" in mtp:
        return [re.sub(r"\b(mtp_layers|mtp_block)\.0\.", "layers.2.", module)]
    inside = module.removeprefix(f"{root}.")
    return [f"{wrapper}.{inside}".lstrip(".") for wrapper in ROOTS]


PARTS = {
    "all of MTP": "{}",
    "the attention of MTP": "{}.*self_attn",
    "the experts of MTP": r"{}.*\.experts\.",
    "a layer of the model": r"^{root}\.layers\.0\.",
    "the attention of a layer": r"^{root}\.layers\.0\.self_attn",
    "the model's experts": r"^{root}\.layers\.[01]\..*\.experts\.",
}


# What is refused of these: see the end of this file.
CASES = [
    (family, part, form)
    for family in FAMILIES
    for part in PARTS
    for form in ENGINE_FORMATS
    if part == "all of MTP" or (family, form) != ("qwen3_5", "gptq")
]


@pytest.mark.parametrize(("family", "part", "form"), CASES)
def test_entries_tell_mtp_from_the_model_whatever_engines_call_the_model(
    family, part, form, tmp_path
):
    root, _, _, mtp = FAMILIES[family]
    pattern = PARTS[part].format(mtp, root=re.escape(root))
    convert(family, tmp_path, "--exclude", pattern, form=form)
    layers = linear_layers(tmp_path / "out")
    assert {False, True} <= {*layers.values()}
    for module, is_packed in layers.items():
        for name in names_in_engines(family, module):
            assert is_kept(tmp_path / "out", name) != is_packed, name
    for pattern in patterns(tmp_path / "out"):
        assert not re.search(r"\(\?!.*(language_model|backbone|thinker)", pattern)


@pytest.mark.parametrize("family", FAMILIES)
def test_mtp_in_8_bits_is_told_from_the_model_in_4(family, tmp_path):
    _, mtp, _, pattern = FAMILIES[family]
    convert(family, tmp_path, "--int8", rf"{pattern}(?!.*\.experts\.\d)")
    groups = read_config(tmp_path / "out")["quantization_config"]["config_groups"].values()
    wide = [group for group in groups if group["weights"]["num_bits"] == 8]
    targets = [target[3:] for group in wide for target in group["targets"]]
    for module, is_packed in linear_layers(tmp_path / "out").items():
        if not is_packed:
            continue
        is_wide = f"{module}.weight" in mtp and ".experts." not in module
        for name in names_in_engines(family, module):
            assert any(re.match(target, name) for target in targets) == is_wide, name


def test_no_entry_tells_a_branch_by_the_wrapper_of_another(tmp_path):
    """Qwen's Omni models: transformers and vLLM leave `thinker` out."""
    tensors = language_model("thinker.model") | block("talker.model.layers.0")
    tensors |= block("talker.model.layers.1")
    config = {"thinker_config": {"text_config": SIZES}, "talker_config": {"a": 1}}
    source = save_model(tmp_path / "in", tensors, **config)
    options = ["--format", "compressed-tensors", "--group_size", 64, "--scale", "absmax"]
    quantize(source, tmp_path / "out", *options, "--int8", r"talker.*layers\.1\.self_attn")
    for layer in ("self_attn.q_proj", "mlp.shared_expert.up_proj"):
        for wrapper in ("thinker.model", "language_model.model", "model"):
            assert not is_kept(tmp_path / "out", f"{wrapper}.layers.0.{layer}")
        assert is_kept(tmp_path / "out", f"talker.model.layers.0.{layer}")


# --- the entry projection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ENGINE_FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_entry_projection_is_kept_for_engines_and_has_a_reason_of_its_own(
    family, form, tmp_path
):
    """In vLLM it is a plain layer for most families."""
    _, mtp, _, _ = FAMILIES[family]
    printed = convert(family, tmp_path, form=form)
    (name,) = [name for name, tensor in mtp.items() if tensor.shape == (H, 2 * H)]
    module = name.removesuffix(".weight")
    assert linear_layers(tmp_path / "out")[module] is False
    assert torch.equal(read_tensors(tmp_path / "out")[name], mtp[name])
    assert is_kept(tmp_path / "out", module)
    assert re.search(r"entry of MTP \(whole for engines\) +1 ", printed)


def test_int4_packs_the_entry_projection(tmp_path):
    convert("qwen3_next", tmp_path, form="int4")
    assert linear_layers(tmp_path / "out")["mtp.fc"] is True


def test_a_layer_of_such_a_shape_inside_a_block_or_the_model_is_no_entry():
    names = ["mtp.layers.0.mlp.down_proj", "mtp.layers.0.eh_proj", "model.layers.0.eh_proj"]
    names += ["model.layers.2.eh_proj", "model.layers.3.mlp.down_proj", "visual.blocks.5.fc"]
    infos = [q.OutputTensor(f"{name}.weight", "BF16", (H, 2 * H)) for name in names]
    config = SIZES | {"num_nextn_predict_layers": 1}
    kinds = q.find_kinds(infos, config)
    entries = [name for name in names if kinds[f"{name}.weight"] == q.MTP_ENTRY]
    assert entries == ["mtp.layers.0.eh_proj", "model.layers.2.eh_proj"]
    assert kinds["model.layers.3.mlp.down_proj.weight"] == q.MTP
    # Where config.json promises none, a layer beyond its count is not taken for one.
    assert q.find_kinds(infos, SIZES)["model.layers.2.eh_proj.weight"] == "other"


# --- what is said of MTP ----------------------------------------------------------------------------------------------


def words_of(printed):
    """Join the lines that the terminal's width made."""
    return " ".join(printed.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_says_what_mtp_costs_what_keeps_it_and_how_it_is_served(family, tmp_path):
    _, mtp, _, pattern = FAMILIES[family]
    printed = convert(family, tmp_path, "--dry_run")
    packed = sum(tensor.dim() == 2 and min(tensor.shape) > EXPERTS for tensor in mtp.values()) - 1
    assert re.search(rf"quantized to 4 bits[^\n]*(\n  [^\n]*)*\n  MTP +{packed} ", printed)
    said = words_of(printed)
    count = f"{len(mtp)} tensors of layers that predict further tokens (MTP)"
    assert f"{count}, with which vLLM drafts given {q.SERVE_WITH_MTP}: their " in said
    assert f"; --exclude {shlex.quote(pattern)} keeps them" in said
    kept = convert(family, tmp_path, "--exclude", pattern)
    assert " are kept" in words_of(kept) and "keeps them" not in kept
    layers = linear_layers(tmp_path / "out")
    assert not any(layers[name] for name in layers if f"{name}.weight" in mtp)


def test_nothing_is_said_of_mtp_where_there_is_none(tmp_path):
    source = save_model(tmp_path / "in", language_model("model"), **SIZES)
    for form in q.FORMATS:
        printed = quantize(source, tmp_path / "out", "--dry_run", "--format", form).stdout
        assert "MTP" not in printed and "further tokens" not in printed


@pytest.mark.parametrize(
    ("mtp", "others", "pattern"),
    [
        (["mtp.fc"], ["model.x"], "mtp"),
        (["model.layers.46.a", "model.layers.46.b"], ["model.layers.4.a"], r"layers\.46\."),
        (["layers.2.a", "layers.3.a"], ["layers.1.a"], r"layers\.2\.|layers\.3\."),
        (["mtp.fc"], ["model.smtp.x"], r"(^|\.)(mtp)"),
        (["a.layers.2.x"], ["b.layers.2.x"], r"^(a\.layers\.2\.x)$"),
    ],
)
def test_the_pattern_means_all_of_mtp_and_nothing_else(mtp, others, pattern):
    assert q.pattern_of_mtp({*mtp}, [*mtp, *others]) == pattern


# --- promised and missing ---------------------------------------------------------------------------------------------


def promising(family):
    """Give a family's config.json."""
    return SIZES | {"num_nextn_predict_layers": 1} | FAMILIES[family][2]


def save_without_mtp(family, folder):
    """Write what `save_pretrained` leaves of a family's model."""
    return save_model(folder, language_model(FAMILIES[family][0]), **promising(family))


OPTIONS = ["--format", "compressed-tensors", "--group_size", 64, "--scale", "absmax"]


@pytest.mark.parametrize("form", ["compressed-tensors", "int4"])
def test_what_is_promised_and_missing_is_warned_of_with_its_remedy(form, tmp_path):
    source = save_without_mtp("glm4_moe", tmp_path / "in")
    said = words_of(quantize(source, tmp_path / "out", "--dry_run", "--format", form).stdout)
    assert "WARNING: config.json promises layers that predict further tokens" in said
    assert ("vLLM does so with uninitialised memory" in said) == (form != "int4")
    assert "--mtp_from DIR takes those of the base model" in said


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_models_mtp_is_quantized_as_if_it_were_there(family, tmp_path):
    root, mtp, _, _ = FAMILIES[family]
    save_without_mtp(family, tmp_path / "tuned")
    tuned = read_tensors(tmp_path / "tuned")
    base = save_model(tmp_path / "base", language_model(root) | mtp, **promising(family))
    save_model(tmp_path / "whole", tuned | mtp, **promising(family))
    out = tmp_path / "out"
    options = [*OPTIONS, "--mtp_from", base, "--verify"]
    printed = quantize(tmp_path / "tuned", out, *options).stdout
    said = words_of(printed)
    assert f"Note: {len(mtp)} tensors of layers that predict further tokens" in said
    assert "WARNING" not in said and "verified, no problems found" in said
    quantize(tmp_path / "whole", tmp_path / "expected", *OPTIONS)
    assert_same_tensors(out, tmp_path / "expected")
    assert read_config(out) == read_config(tmp_path / "expected")


def test_mtp_of_the_base_is_known_when_a_run_is_continued_verified_and_restored(tmp_path):
    _, mtp, _, _ = FAMILIES["qwen3_next"]
    source = save_without_mtp("qwen3_next", tmp_path / "in")
    base = save_model(tmp_path / "base", mtp, **promising("qwen3_next"))
    out, with_base = tmp_path / "out", [*OPTIONS, "--mtp_from", base]
    quantize(source, out, *with_base)
    finished = folder_bytes(out)
    assert "verified, no problems" in quantize(source, out, "--verify", "--mtp_from", base).stdout
    refused = run_cli(source, out, "--verify")
    assert_refused(refused, "the input was another", "model.safetensors of --mtp_from")

    (out / "model.safetensors.index.json").unlink()
    assert_refused(run_cli(source, out, *OPTIONS), "of --mtp_from")
    quantize(source, out, *with_base)
    assert folder_bytes(out) == finished

    quantize(out, tmp_path / "dense", "--restore")
    assert read_tensors(tmp_path / "dense").keys() >= mtp.keys()
    assert torch.equal(read_tensors(tmp_path / "dense")["mtp.fc.weight"], mtp["mtp.fc.weight"])


def test_of_the_base_no_more_is_needed_than_the_files_with_mtp(tmp_path):
    """A part of a download: the index names files that are not there."""
    root, mtp, _, _ = FAMILIES["glm4_moe"]
    source = save_without_mtp("glm4_moe", tmp_path / "in")
    base = save_model(tmp_path / "base", mtp, **promising("glm4_moe"))
    weight_map = dict.fromkeys(language_model(root), "model-00001.safetensors")
    weight_map |= dict.fromkeys(mtp, "model.safetensors")
    index = {"weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    printed = quantize(source, tmp_path / "out", *OPTIONS, "--mtp_from", base).stdout
    assert f"{len(mtp)} tensors of layers that predict" in words_of(printed)


def test_a_file_with_mtp_that_the_index_does_not_list_is_named_and_can_be_taken(tmp_path):
    _, mtp, _, _ = FAMILIES["qwen3_5"]
    source = save_without_mtp("qwen3_5", tmp_path / "in")
    weight_map = dict.fromkeys(read_tensors(source), "model.safetensors")
    index = {"weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(mtp, source / "extra.safetensors")
    said = words_of(quantize(source, tmp_path / "out", *OPTIONS, "--dry_run").stdout)
    assert (
        f"extra.safetensors, which no index lists, has them: --mtp_from {shlex.quote(str(source))} takes"
        in said
    )
    said = words_of(quantize(source, tmp_path / "out", *OPTIONS, "--mtp_from", source).stdout)
    assert "WARNING" not in said and "extra.safetensors" not in said.partition("Left out:")[2]
    assert torch.equal(read_tensors(tmp_path / "out")["mtp.fc.weight"], mtp["mtp.fc.weight"])


WRONG_SHAPE = {"model.layers.2.eh_proj.weight": random(H, H)}
GLM = FAMILIES["glm4_moe"][1]
UNFIT = {
    "none": ({"model.x.weight": random(8, H)}, {}, "no layers that predict further tokens are in"),
    "width": (GLM, {"hidden_size": 512}, "its hidden_size is 512, and the model's 256"),
    "layers": (GLM, {"num_hidden_layers": 1}, "its num_hidden_layers is 1, and the model's 2"),
    "entry": (GLM | WRONG_SHAPE, {}, "eh_proj.weight' is (256, 256), and would have to be"),
    "shape": (
        GLM | {"model.layers.2.self_attn.k_proj.weight": random(64, H)},
        {},
        "k_proj.weight' is (64, 256), and would have to be (256, 256)",
    ),
    "names": (
        {name.replace("model.", "transformer."): tensor for name, tensor in GLM.items()},
        {},
        "the model's own layers are not called as 'transformer.layers.2.",
    ),
    "quantized": (
        GLM | {"model.layers.2.eh_proj.qweight": torch.ones(8, 8, dtype=torch.int32)},
        {},
        "already quantized",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_mtp_that_does_not_fit_is_refused(case, tmp_path):
    mtp, config, message = UNFIT[case]
    source = save_without_mtp("glm4_moe", tmp_path / "in")
    base = save_model(tmp_path / "base", mtp, **promising("glm4_moe") | config)
    assert_refused(run_cli(source, tmp_path / "out", *OPTIONS, "--mtp_from", base), message)


def test_mtp_that_is_there_or_not_promised_is_not_taken_from_elsewhere(tmp_path):
    root, mtp, _, _ = FAMILIES["qwen3_next"]
    base = save_model(tmp_path / "base", mtp, **promising("qwen3_next"))
    whole = save_model(tmp_path / "whole", language_model(root) | mtp, **SIZES)
    refused = run_cli(whole, tmp_path / "out", *OPTIONS, "--mtp_from", base)
    assert_refused(refused, "has such layers already, e.g. 'mtp.fc.weight'")
    plain = save_model(tmp_path / "plain", language_model(root), **SIZES)
    refused = run_cli(plain, tmp_path / "out", *OPTIONS, "--mtp_from", base)
    assert_refused(refused, "promises no such layers", "num_nextn_predict_layers")
    refused = run_cli(plain, base / "out", *OPTIONS, "--mtp_from", base)
    assert_refused(refused, "is inside the input folder")


# --- what engines make of a part of it --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["nemotron", "glm4_moe", "qwen3_5"])
def test_experts_of_mtp_that_are_kept_hinder_no_engine(family, tmp_path):
    """transformers loads none of MTP."""
    pattern = FAMILIES[family][3]
    printed = convert(family, tmp_path, "--exclude", rf"{pattern}.*experts\.", "--dry_run")
    assert "experts that are kept" not in words_of(printed)
    model = r"^(?!mtp).*layers\.1\..*experts\."
    printed = convert(family, tmp_path, "--exclude", model, "--dry_run")
    assert "experts that are kept" in words_of(printed)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "nemotron", "glm4_moe"])
def test_the_experts_of_mtp_may_have_8_bits_alone(family, tmp_path):
    _, mtp, _, pattern = FAMILIES[family]
    convert(family, tmp_path, "--int8", rf"{pattern}.*\.experts\.")
    groups = read_config(tmp_path / "out")["quantization_config"]["config_groups"].values()
    for name, tensor in read_tensors(tmp_path / "out").items():
        module = name.removesuffix(".weight_packed")
        if module == name or ".experts." not in name:
            continue
        is_wide = f"{module}.weight" in mtp
        columns = 128 if "down_proj" in module else H
        assert tensor.shape[1] == columns // (4 if is_wide else 8)
        for asked in names_in_engines(family, module):
            named = [
                group["weights"]["num_bits"]
                for group in groups
                if any(t[:3] == "re:" and re.match(t[3:], asked) for t in group["targets"])
            ]
            assert named == [8 if is_wide else 4], asked


@pytest.mark.parametrize("part", [part for part in PARTS if part != "all of MTP"])
def test_no_entry_in_gptq_makes_vllm_take_all_of_qwens_mtp_for_unquantized(part, tmp_path):
    root, mtp, _, _ = FAMILIES["qwen3_5"]
    excluded = PARTS[part].format("mtp", root=re.escape(root))
    source = save_model(tmp_path / "in", language_model(root) | mtp, **promising("qwen3_5"))
    gptq = ["--format", "gptq", "--group_size", 64, "--scale", "absmax"]
    refused = run_cli(source, tmp_path / "out", *gptq, "--exclude", excluded)
    assert_refused(refused, "takes all layers of MTP for unquantized from gptq", "--exclude mtp")
    for options in ([], ["--exclude", "mtp"]):
        quantize(source, tmp_path / "out", *gptq, *options, "--overwrite")
        named = [pattern for pattern in patterns(tmp_path / "out") if "mtp" in pattern]
        assert bool(named) == bool(options)
    both = ["--exclude", excluded, "--exclude", "mtp"]
    quantize(source, tmp_path / "out", *gptq, *both, "--overwrite")
