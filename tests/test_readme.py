"""README: its snippets run as they are printed, and its options are those of the command."""

import os
import re
import shlex

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import families
import pytest
import torch
import transformers
from conftest import ROOT, quantize
from folders import read_tensors
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional

import quantize_int4 as q

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def block_with(text):
    """The one snippet of Python that has this in it."""
    (block,) = [block for language, block in BLOCKS if language == "python" and text in block]
    return block


def test_the_reader_of_int4_decodes_a_weight(tiny, tmp_path, monkeypatch):
    quantize(tiny, tmp_path / "tiny_own_format")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block_with("dequantize_int4"), names)
    source = read_tensors(tiny)[f"{names['name']}.weight"].float()
    # Half a scale, which is a seventh of the largest weight of a group, and what float16 rounds off.
    assert (names["weight"] - source).abs().max() <= 0.51 * source.abs().max() / 7


def test_the_evaluation_prints_perplexities_and_the_divergence(tmp_path, monkeypatch, capsys):
    words = 8 * 512 + 100
    text = torch.randint(300, (words,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in text))
    vocabulary = {f"w{number}": number for number in range(300)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folders = [tmp_path / "nemotron_merged", tmp_path / "nemotron_restored"]
    model = families.build("llama").float()
    for folder in folders:
        model.save_pretrained(folder)
        model.lm_head.weight.data /= 2
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folders[0])
    monkeypatch.chdir(tmp_path)
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def load(folder, device_map, **options):
        """As from_pretrained, but for the device, for whose choice it wants accelerate."""
        assert device_map == "auto"
        return from_pretrained(folder, **options)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    exec(block_with("nll_loss"), {})

    windows = torch.tensor(text[: 8 * 512]).view(8, 512)
    loaded = [from_pretrained(folder) for folder in folders]
    with torch.no_grad():
        results = [model(windows, labels=windows) for model in loaded]
    losses = [result.loss for result in results]
    before, after = (result.logits[:, :-1].log_softmax(-1).flatten(0, 1) for result in results)
    divergence = functional.kl_div(after, before, reduction="batchmean", log_target=True)
    assert divergence > 0.01
    assert capsys.readouterr().out.splitlines() == [
        f"perplexity, original: {losses[0].exp():.2f}",
        f"perplexity, quantized: {losses[1].exp():.2f}",
        f"divergence: {divergence:.3f} nat a token",
        "same likeliest token: 100%",
    ]


# The arguments of each call of the script, of which some are redirected to a file.
SHELL = "".join(block for language, block in BLOCKS if language == "bash").replace("\\\n", "")
CALLS = re.findall(r"quantize_int4\.py +(--.*?)(?: > .*)?$", SHELL, re.MULTILINE)


@pytest.mark.parametrize("call", CALLS)
def test_each_command_is_one_that_the_script_takes(call):
    q.parse_args(shlex.split(call))


def test_it_is_short_enough_to_be_read():
    """At most 1,800 words outside of tables and code, and 3,500 in all."""
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^\|.*", "", prose, flags=re.MULTILINE)
    assert len(prose.split()) <= 1800
    assert len(README.split()) <= 3500
