"""The class of transformers that the last lines name (`Load:`, `Try:`) loads the model, with its head.

All of transformers' own mappings are asked, for each type and architecture with a config as `save_pretrained` writes it.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import functools
import inspect
import json
import re

import pytest
import torch
import transformers
from checkpoints import PROJECTION, save_model
from conftest import quantize
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import quantize_int4 as q

# The classes that load a whole model, by its type and architecture.
CLASSES: dict[tuple[str, str], set[str]] = {}
for auto, mapping in re.findall(
    r"class (\w+)\(_BaseAuto\w+\):\s*\n\s*_model_mapping = (\w+)", inspect.getsource(modeling_auto)
):
    for model_type, named in getattr(modeling_auto, f"{mapping}_NAMES", {}).items():
        for architecture in [named] if isinstance(named, str) else named:
            CLASSES.setdefault((model_type, architecture), set()).add(auto)


AUTO = "AutoModelForCausalLM"


@functools.cache
def default_config(model_type: str) -> dict:
    """What a config of this type holds; nothing, if it cannot be made without arguments."""
    try:
        return json.loads(CONFIG_MAPPING[model_type]().to_json_string())
    except Exception:  # huggingface_hub has its own for some
        return {}


def saved_config(model_type: str, architecture: str) -> dict:
    """What a model's config.json holds."""
    return default_config(model_type) | {"model_type": model_type, "architectures": [architecture]}


# What transformers maps and does not export.
NOT_EXPORTED = {"VoxtralRealtimeTextModel"}


def test_the_class_named_loads_every_type_and_architecture_that_transformers_maps():
    assert len(CLASSES) > 1000
    wrong = []
    for (model_type, architecture), right in CLASSES.items():
        named = q.loading_class(saved_config(model_type, architecture))
        is_itself = named == architecture and hasattr(transformers, named)
        if not is_itself and named not in right and architecture not in NOT_EXPORTED:
            wrong.append(f"{model_type} {architecture}: {named}, not {sorted(right)}")
    assert not wrong, "\n".join(wrong)


def test_the_class_for_all_language_models_is_named_for_those_alone_that_it_loads():
    """Whatever the type: that of a part, as mllama_text_model, need not be mapped itself."""
    unmapped = {"emu3_text_model", "mllama_text_model", "musicgen_decoder"}
    unmapped.add("musicgen_melody_decoder")
    types = {model_type for model_type, _ in CLASSES}
    assert unmapped.isdisjoint(types)
    causal = {name for name in dir(transformers) if name.endswith("ForCausalLM")} - {
        "AutoModelForCausalLM"
    }
    loaded = {architecture for (_, architecture), right in CLASSES.items() if AUTO in right}
    of_parts = {"Emu3ForCausalLM", "MllamaForCausalLM"}
    of_parts |= {"MusicgenForCausalLM", "MusicgenMelodyForCausalLM"}
    assert {*q.NOT_AUTO_CAUSAL.split()} == causal - loaded | of_parts


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "AutoModelForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "BertModel"),
        (
            {"architectures": ["MllamaForCausalLM"], "model_type": "mllama_text_model"},
            "MllamaForCausalLM",
        ),
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({}, "AutoModelForCausalLM"),
        ({"is_encoder_decoder": True}, "AutoModelForSeq2SeqLM"),
        ({"vision_config": {}}, "AutoModelForImageTextToText"),
        ({"audio_config": {}}, "AutoModelForMultimodalLM"),
        ({"architectures": ["my model"]}, "AutoModelForCausalLM"),
        ({"architectures": 5, "model_type": ["x"], "auto_map": 5}, "AutoModelForCausalLM"),
        (
            {"architectures": ["OcrForCausalLM"], "auto_map": {"AutoModel": "modeling.OcrForCausalLM"}},
            "AutoModel",
        ),
        (
            {
                "architectures": ["ChatForConditionalGeneration"],
                "auto_map": {
                    "AutoConfig": "configuration.ChatConfig",
                    "AutoModel": "modeling.ChatForConditionalGeneration",
                    "AutoModelForCausalLM": "modeling.ChatForConditionalGeneration",
                    "AutoModelForSeq2SeqLM": "modeling.ChatForConditionalGeneration",
                },
            },
            "AutoModelForCausalLM",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_class_follows_from_the_config(config, expected):
    assert q.loading_class(config) == expected


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0}


@pytest.mark.parametrize(
    "head", ["ForCausalLM", "ForSequenceClassification", "ForTokenClassification"]
)
def test_the_line_as_printed_loads_the_head(tmp_path, monkeypatch, head):
    model = getattr(transformers, f"Llama{head}")(transformers.LlamaConfig(**TINY)).bfloat16()
    model.save_pretrained(tmp_path / "in")
    options = ["--format", "compressed-tensors", "--group_size", 64]
    printed = quantize(tmp_path / "in", tmp_path / "a folder's", *options).stdout
    line = re.search(r"  Load: +(.*)", printed)[1]
    monkeypatch.chdir(tmp_path)
    loaded = eval(line, {"transformers": transformers})
    assert type(loaded).__name__ == f"Llama{head}"
    kept = "lm_head" if head == "ForCausalLM" else "score"
    assert torch.equal(getattr(loaded, kept).weight, getattr(model, kept).weight)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_a_restored_folder_is_tried_with_the_same_class(tmp_path, form):
    entries = {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}
    source = save_model(tmp_path / "in", PROJECTION, **entries)
    named = "transformers.LlamaForSequenceClassification.from_pretrained("
    assert f"Load:    {named}'out'" in quantize(source, tmp_path / "out", "--format", form).stdout
    printed = quantize(tmp_path / "out", tmp_path / "back", "--restore").stdout
    assert f"Try:     {named}'back'" in printed
