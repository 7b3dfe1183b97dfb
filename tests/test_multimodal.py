"""Which weights of a model that sees or hears are its language model's: these are packed for engines, and no others.

`multimodal_names.json` has the names and shapes of real checkpoints, mostly in the conventions of their own code on the
hub, which transformers does not write: what is to be packed, what is kept of the language model in any case, and what
is outside of it. `{24}` stands for the numbers of 24 layers, and a block for the weights of one layer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import save_model, write_sparse_checkpoint
from conftest import ENGINE_FORMATS, quantize
from folders import is_kept, read_tensors

import quantize_int4 as q

NAMES = json.loads(Path(__file__).with_name("multimodal_names.json").read_text())
CASES = NAMES["cases"]
OPTIONS = {
    form: q.Options(form, 32, [], False, [], "mse", None, False, 4.0)
    for form in ("compressed-tensors", "gptq", "int4")
}

Shapes = dict[str, tuple[int, ...]]


def expand(described: dict[str, list]) -> Shapes:
    """Give the shapes of weights, by name."""
    shapes = {}
    for name, shape in described.items():
        for layer in layers_of(name):
            shapes |= weights_of(layer, shape)
    return shapes


def layers_of(name: str) -> list[str]:
    """Write a name out, once for each layer."""
    count = re.search(r"\{(\d+)\}", name)
    if not count:
        return [name]
    return [name.replace(count[0], str(number)) for number in range(int(count[1]))]


def weights_of(name: str, shape: list) -> Shapes:
    """Write a block out: its name, its width and that of its MLP."""
    if not isinstance(shape[0], str):
        is_bare = re.search(r"_weight$|wte\.(new_)?embedding$", name)
        return {name if is_bare else f"{name}.weight": tuple(shape)}
    block, h, i = shape
    sizes = {"h": h, "i": i, "k": h // 4, "q": 3 * h}
    return {
        f"{name}.{layer}.weight": tuple(sizes[size] for size in dimensions.split())
        for layer, dimensions in NAMES["blocks"][block].items()
    }


def infos_of(shapes: Shapes) -> list[q.TensorInfo]:
    """Describe tensors as a checkpoint's headers do."""
    file = Path("model.safetensors")
    return [
        q.TensorInfo(name, "BF16", shape, 2, file=file, location=q.InFile(0), name_in_file=name)
        for name, shape in shapes.items()
    ]


def packed_of(shapes: Shapes, config: dict, form: str = "compressed-tensors") -> set[str]:
    """Name the weights that are quantized."""
    infos = infos_of(shapes)
    kinds = q.find_kinds(infos, config)
    planned = q.plan_tensors(infos, kinds, OPTIONS[form], config)
    return {tensor.source.name for tensor in planned if tensor.packing}


def all_of(case: dict) -> Shapes:
    """Give all weights of a case."""
    return expand(case["packed"] | case["kept"] | case["towers"])


# --- real names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ENGINE_FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_exactly_the_language_models_weights_are_packed(name, form):
    case = CASES[name]
    assert packed_of(all_of(case), case["config"], form) == expand(case["packed"]).keys()


# Molmo's head has the name of a projection; without config.json its shape tells nothing.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"Molmo-7B-D (hub)"}))
def test_the_names_alone_are_enough(name):
    case = CASES[name]
    assert packed_of(all_of(case), {}) == expand(case["packed"]).keys()


@pytest.mark.parametrize("name", CASES)
def test_int4_takes_the_layers_outside_of_the_language_model_too(name):
    case = CASES[name]
    layers = {tower for tower in expand(case["towers"]) if re.search(r"s\.\d+\..*\.weight$", tower)}
    packed = packed_of(all_of(case), case["config"], "int4")
    whole = {tower for tower in layers if len(all_of(case)[tower]) > 2}
    assert layers - whole <= packed


# --- what is a tower, and what is not ---------------------------------------------------------------------------------

H = 256
TEXT = {"embed_tokens": [1000, H], "layers.{2}": ["llama", H, 512]}
TOWER = {"vision_tower.layers.{2}": ["clip", 128, 256], "multi_modal_projector.linear_1": [H, 128]}
SIZES = {"hidden_size": H, "num_hidden_layers": 2, "vocab_size": 1000}
SEES = {"text_config": SIZES, "vision_config": {"hidden_size": 128}}
HEARS = {"text_config": SIZES, "audio_config": {"d_model": 128}}


def under(root: str, described: dict[str, list]) -> dict[str, list]:
    """Put weights into a module."""
    return {f"{root}.{name}": shape for name, shape in described.items()}


def kept_of(described: dict[str, list], config: dict) -> set[str]:
    """Name the weights that are kept."""
    shapes = expand(described)
    return shapes.keys() - packed_of(shapes, config)


TOWERS = set(expand(TOWER))
TEXT_ONLY = {
    "layers": (under("model", TEXT) | {"lm_head": [1000, H]}, SIZES),
    "distilbert": (
        under("distilbert", {"embeddings.word_embeddings": [1000, H], "layer.{2}.lin1": [512, H]})
        | {"vocab_projector": [1000, H], "vocab_transform": [H, H]},
        SIZES,
    ),
    "a config of an encoder": (
        under("model", TEXT) | {"cls.dense": [H, H]},
        SIZES | {"encoder_config": {"d_model": 128}},
    ),
    "an empty config of a tower": (
        under("model", TEXT) | {"cls.dense": [H, H]},
        SIZES | {"vision_config": {}},
    ),
    "t5": (
        {"shared": [1000, H], "encoder.block.{2}.layer.0.q": [H, H]}
        | {"decoder.block.{2}.layer.0.q": [H, H]},
        {"d_model": H, "vocab_size": 1000, "num_layers": 2},
    ),
    "whisper": (
        under("model.encoder", {"layers.{2}.fc1": [512, H]})
        | under("model.decoder", {"embed_tokens": [1000, H], "layers.{2}.fc1": [512, H]}),
        {"d_model": H, "vocab_size": 1000, "encoder_layers": 2, "decoder_layers": 2},
    ),
    "further tokens": (
        under("model", TEXT) | {"mtp.fc": [H, 512]},
        SIZES | {"mtp_config": {"a": 1}},
    ),
}


@pytest.mark.parametrize("name", TEXT_ONLY)
@pytest.mark.parametrize("configured", [True, False])
def test_nothing_of_a_model_of_words_is_a_tower(name, configured):
    described, config = TEXT_ONLY[name]
    infos = infos_of(expand(described))
    assert not q.find_towers(infos, config if configured else {})
    assert q.TOWERS not in q.find_kinds(infos, config).values()


@pytest.mark.parametrize("config", [SEES, HEARS, {}, {"thinker_config": SEES}], ids=str)
@pytest.mark.parametrize(
    "root", ["language_model", "language_model.model", "model.language_model", "llm", "x.y"]
)
def test_the_language_model_is_where_the_words_are(config, root):
    assert kept_of(under(root, TEXT) | TOWER, config) == TOWERS | {f"{root}.embed_tokens.weight"}


@pytest.mark.parametrize("config", [SEES, {"thinker_config": SEES}], ids=["", "nested"])
def test_branches_without_such_a_word_are_told_by_config_json(config):
    other = {"thing.layers.{2}": ["clip", 128, 256], "bridge.linear": [H, 128]}
    kept = kept_of(under("model", TEXT) | other, config)
    assert kept == expand(other).keys() | {"model.embed_tokens.weight"}
    assert not q.find_towers(infos_of(expand(under("model", TEXT) | other)), {})


def test_a_layer_of_the_towers_own_as_wide_as_the_words_is_no_layer_of_the_language_model():
    alike = {"model.visual.blocks.{3}": ["vit", H, 512], "model.resampler.layers.{2}.fc": [H, H]}
    kept = kept_of(under("model.language_model", TEXT) | alike, SEES)
    assert kept == expand(alike).keys() | {"model.language_model.embed_tokens.weight"}


def test_a_table_of_a_tower_with_as_many_rows_as_words_is_no_embedding_of_words():
    table = {"visual.table": [1000, H], "visual.blocks.{2}": ["vit", H, 512]}
    infos = infos_of(expand(under("model", TEXT) | table))
    assert q.find_language_model(infos, SEES) == q.LanguageModel(
        "model.", frozenset({"model.layers"})
    )


def test_layers_of_another_width_are_no_layers_of_the_language_model():
    other = {"model.adapter.{2}.fc": [64, 64]}
    kept = kept_of(under("model", TEXT) | other | TOWER, SEES)
    assert kept == TOWERS | expand(other).keys() | {"model.embed_tokens.weight"}


def test_layers_of_a_tower_may_be_nearer_to_the_words():
    text = {"model.embed_tokens": [1000, H], "layers.{2}": ["llama", H, 512]}
    tower = {"model.visual.blocks.{2}": ["vit", H, 512]}
    kept = kept_of(text | tower, SEES)
    assert kept == expand(tower).keys() | {"model.embed_tokens.weight"}


def test_lists_of_as_many_layers_as_config_json_says_come_first():
    fewer = {"model.adapter.{3}.fc": [H, H]}
    kept = kept_of(under("model", TEXT) | fewer | TOWER, SEES)
    assert kept == TOWERS | expand(fewer).keys() | {"model.embed_tokens.weight"}


def test_a_head_may_be_outside_or_inside_and_is_kept_as_a_head():
    for head in ("lm_head", "language_model.lm_head", "model.language_model.lm_head"):
        shapes = expand(under("model.language_model", TEXT) | TOWER | {head: [1000, H]})
        infos = infos_of(shapes)
        assert q.find_kinds(infos, SEES)[f"{head}.weight"] == "head"
        assert f"{head}.weight" not in packed_of(shapes, SEES)


def test_a_tied_checkpoint_that_saved_only_its_head_has_a_language_model():
    text = under("model", {"layers.{2}": ["llama", H, 512]})
    assert kept_of(text | TOWER | {"lm_head": [1000, H]}, SEES) == TOWERS | {"lm_head.weight"}


def test_both_stacks_of_an_encoder_and_a_decoder_are_the_language_model():
    """Florence-2: `language_model.model.shared`, whose encoder and decoder have 6 layers each."""
    layers = {"layers.{2}.fc1": [512, H], "layers.{2}.self_attn.q_proj": [H, H]}
    model = "language_model.model"
    text = under(f"{model}.encoder", layers) | under(f"{model}.decoder", layers)
    towers = {"vision_tower.blocks.{2}.fc1": [512, 128], "image_proj_norm.fc": [H, 128]}
    config = {"d_model": H, "vocab_size": 1000, "encoder_layers": 2, "decoder_layers": 2}
    for names in (["shared"], ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]):
        words = under(model, {name: [1000, H] for name in names})
        kept = kept_of(
            text | towers | words, {"text_config": config, "vision_config": {"hidden_size": 128}}
        )
        assert kept == expand(towers | words).keys()


@pytest.mark.parametrize("branch", ["mtp", "model.mtp", "language_model.mtp"])
def test_layers_that_predict_further_tokens_belong_to_the_language_model(branch):
    further = under(branch, {"fc": [H, 512], "layers.0": ["llama", H, 512]})
    text = under("model.language_model", TEXT)
    kept = kept_of(text | further | TOWER, SEES)
    assert kept == TOWERS | {f"{branch}.fc.weight", "model.language_model.embed_tokens.weight"}
    kinds = q.find_kinds(infos_of(expand(text | further | TOWER)), SEES)
    assert kinds[f"{branch}.layers.0.mlp.up_proj.weight"] == q.MTP


def test_a_projection_that_all_layers_share_belongs_to_the_language_model():
    shared = {"model.language_model.per_layer_model_projection": [512, H]}
    kept = kept_of(under("model.language_model", TEXT) | shared | TOWER, SEES)
    assert kept == TOWERS | {"model.language_model.embed_tokens.weight"}


def test_without_a_language_model_nothing_is_a_tower():
    assert not q.find_towers(infos_of(expand(TOWER)), SEES)


def test_an_embedding_may_have_more_rows_than_words_but_not_any_number():
    for rows, found in ((1000, True), (2024, True), (2025, False)):
        text = {"m.words": [rows, H], "m.layers.{2}": ["llama", H, 512]}
        assert bool(q.find_towers(infos_of(expand(text | TOWER)), SEES)) == found


# --- real widths ------------------------------------------------------------------------------------------------------


REAL = {
    "Qwen2.5-VL-7B": (
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "vocab_size": 152064,
            "torch_dtype": "bfloat16",
            "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420},
        },
        under("model", {"embed_tokens": [152064, 3584], "layers.{28}": ["llama", 3584, 18944]})
        | {"lm_head": [152064, 3584]},
        {
            "visual.blocks.{32}.attn.qkv": [3840, 1280],
            "visual.blocks.{32}.attn.proj": [1280, 1280],
            "visual.blocks.{32}.mlp.gate_proj": [3420, 1280],
            "visual.blocks.{32}.mlp.up_proj": [3420, 1280],
            "visual.blocks.{32}.mlp.down_proj": [1280, 3420],
            "visual.merger.mlp.0": [5120, 5120],
            "visual.merger.mlp.2": [3584, 5120],
        },
    ),
    "Gemma-3-12B": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": {"hidden_size": 3840, "num_hidden_layers": 48, "vocab_size": 262208},
            "torch_dtype": "bfloat16",
            "vision_config": {"hidden_size": 1152, "intermediate_size": 4304},
        },
        under(
            "language_model.model",
            {"embed_tokens": [262208, 3840], "layers.{48}": ["llama", 3840, 15360]},
        ),
        under("vision_tower.vision_model.encoder", {"layers.{27}": ["clip", 1152, 4304]})
        | {"vision_tower.vision_model.embeddings.position_embedding": [4096, 1152]},
    ),
}


@pytest.mark.parametrize("form", ENGINE_FORMATS)
@pytest.mark.parametrize("name", REAL)
def test_real_widths_need_no_option_but_the_format_and_get_groups_of_128(name, form, tmp_path):
    config, text, towers = REAL[name]
    shapes = {name: (torch.bfloat16, shape) for name, shape in expand(text | towers).items()}
    write_sparse_checkpoint(tmp_path / "in", shapes, shards=2)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    printed = quantize(tmp_path / "in", tmp_path / "out", "--format", form, "--dry_run").stdout
    assert "groups of 128" in printed
    packed = sum(".layers." in name for name in expand(text))
    embeddings = sum("position_embedding" in name for name in expand(towers))
    assert re.search(rf"quantized to 4 bits +{packed} ", printed)
    kept = len(expand(towers)) - embeddings
    assert re.search(rf"vision.* \(whole for engines\) +{kept} ", printed)


def test_a_tower_is_packed_where_int8_names_it(tmp_path):
    shapes = expand(under("model.language_model", TEXT) | under("model", TOWER))
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    options = ["--format", "compressed-tensors", "--int8", "vision_tower"]
    quantize(save_model(tmp_path / "in", tensors, **SEES), tmp_path / "out", *options)
    written = read_tensors(tmp_path / "out")
    assert written["model.vision_tower.layers.1.mlp.fc1.weight_packed"].shape == (256, 32)
    assert written["model.language_model.layers.1.mlp.up_proj.weight_packed"].shape == (512, 32)
    assert "model.multi_modal_projector.linear_1.weight" in written


@pytest.mark.parametrize("form", ENGINE_FORMATS)
def test_a_tower_is_told_by_its_own_name_whatever_its_layers_are_called_in_memory(form, tmp_path):
    layers = {"vision_tower.encoder.layer.{2}.attention.attention.query": [128, 128]}
    shapes = expand(under("language_model.model", TEXT) | layers)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    config = SEES | {"vision_config": {"model_type": "dinov2"}}
    quantize(save_model(tmp_path / "in", tensors, **config), tmp_path / "out", "--format", form)
    assert is_kept(tmp_path / "out", "vision_tower.layers.0.attention.q_proj")


def test_the_voices_of_qwen2_5_omni_are_copied(tmp_path):
    shapes = expand(under("model", TEXT))
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    source = save_model(tmp_path / "in", tensors, **SIZES)
    (source / "spk_dict.pt").write_bytes(b"voices")
    (source / "other_spk_dict.pt").write_bytes(b"weights")
    result = quantize(source, tmp_path / "out", "--format", "compressed-tensors")
    assert (tmp_path / "out" / "spk_dict.pt").read_bytes() == b"voices"
    assert "other_spk_dict.pt (other weights)" in result.stdout


def test_a_kept_tower_is_told_by_every_name_that_engines_give_one(tmp_path):
    """mlp1 is multi_modal_projector in transformers, and vision_model visual in some of vLLM's models."""
    names = {f"{name}.1": [H, 128] for name in ("mlp1", "vision_model", "sound_projection")}
    shapes = expand(under("language_model.model", TEXT) | names)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    source = save_model(tmp_path / "in", tensors, **SEES)
    quantize(source, tmp_path / "out", "--format", "compressed-tensors")
    for branch in ("mlp1", "sound_projection", *q.BRANCHES_IN_ENGINES):
        assert is_kept(tmp_path / "out", f"model.{branch}.linear_1")
    assert not is_kept(tmp_path / "out", "model.language_model.layers.0.mlp.up_proj")


def multimodal_plan(tmp_path, extra, **config):
    """The plan's lines for a language model with a tower and what `extra` adds."""
    shapes = expand(under("model", TEXT) | {"visual.blocks.0.proj": [H, 128]} | extra)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    source = save_model(tmp_path / "in", tensors, **SEES, **config)
    return quantize(
        source, tmp_path / "out", "--format", "compressed-tensors", "--dry_run", "--list"
    ).stdout


@pytest.mark.parametrize("name", ["connector", "adapter", "merger", "resampler", "mlp1", "aligner"])
def test_what_joins_a_tower_to_a_language_model_is_kept_where_it_stands_inside(tmp_path, name):
    plan = multimodal_plan(tmp_path, {f"model.{name}.linear": [H, H]})
    assert re.search(rf"^model\.{name}\.linear.*vision and audio", plan, re.MULTILINE)


@pytest.mark.parametrize("name", ["division", "revision", "supervision"])
def test_a_word_that_ends_as_vision_is_no_tower(tmp_path, name):
    shapes = expand(under("model", TEXT) | {f"model.layers.0.{name}": [H, H]})
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    config = {key: value for key, value in SEES.items() if "vision" not in key}
    source = save_model(tmp_path / "in", tensors, **config)
    plan = quantize(source, tmp_path / "out", "--format", "compressed-tensors", "--dry_run").stdout
    assert "vision and audio" not in plan


def test_a_tower_beside_no_language_model_is_a_warning(tmp_path):
    tensors = {f"encoder.layers.{n}.fc.weight": torch.randn(64, 128).bfloat16() for n in range(2)}
    source = save_model(tmp_path / "in", tensors, vision_config={"depth": 2})
    result = quantize(source, tmp_path / "out", "--format", "compressed-tensors", "--dry_run")
    assert "no layers around an embedding" in " ".join(result.stdout.split())
