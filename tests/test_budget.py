"""Budget: the divergence that is expected of errors, and what --max_size_gb makes of it (README: "The best four bits")."""

from __future__ import annotations

import csv
import io
import math
import re
from contextlib import closing

import pytest
import torch
from checkpoints import E, gated, random, save_model
from conftest import assert_refused, least_size, quantize, refuse, run_cli
from folders import (
    assert_same_tensors,
    edit_shard,
    folder_bytes,
    read_config,
    read_tensors,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import quantize_int4 as q

# --- a model and its costs --------------------------------------------------------------------------------------------

H = 128
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MODULES = {
    **{f"self_attn.{name}_proj": (64, H) for name in "qkv"},
    "self_attn.o_proj": (H, 64),
    "mlp.gate_proj": (192, H),
    "mlp.up_proj": (192, H),
    "mlp.down_proj": (H, 192),
}
LAYERS = [f"model.layers.{number}" for number in range(3)]
WEIGHTS = {f"{layer}.{name}": shape for layer in LAYERS for name, shape in MODULES.items()}
CONFIG = {"model_type": "llama", "vocab_size": 96, "hidden_size": H, "tie_word_embeddings": False}
ENGINE = ["--format", "compressed-tensors", "--group_size", 64]


def tensors_of(weights, **others):
    tensors = {f"{name}.weight": random(*shape) for name, shape in weights.items()}
    return tensors | {"model.embed_tokens.weight": random(96, H)} | others


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "in"
    return save_model(folder, tensors_of(WEIGHTS, **{"lm_head.weight": random(96, H)}), **CONFIG)


def statistics_of(source, cost=lambda name: 1.0):
    """Mean squares of one, and the costs of all layers that have one."""
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if weight.dim() == 2 and "embed" not in name:
            tensors[module] = torch.ones(weight.shape[1])
            if cost(module) is not None:
                tensors[f"{module}.cost"] = torch.tensor(float(cost(module)))
                tensors[f"{module}.gain"] = torch.tensor(1.0)
    return tensors


def statistics_file(folder, tensors):
    """Write the file; the options that give it."""
    save_file(tensors, folder / "statistics.safetensors")
    return [*ENGINE, "--importance", folder / "statistics.safetensors"]


def size_of(folder):
    return sum(map(len, folder_bytes(folder).values()))


def bits_of(folder):
    """The bits of each packed weight, by its shape and its words; 16 of others."""
    tensors = read_tensors(folder)
    bits = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            bits[module] = 32 * tensor.shape[1] // int(tensors[f"{module}.weight_shape"][1])
        elif part == "weight":
            bits[module] = 16
    return bits


def in_8_bits(folder):
    return {name for name, bits in bits_of(folder).items() if bits == 8}


def unit_of(name):
    """The name of what engines fuse a layer into, or its own."""
    parent, _, last = name.rpartition(".")
    for names in FUSED:
        if last in names:
            return f"{parent}.{'+'.join(names)}"
    return name


# --- what is chosen ---------------------------------------------------------------------------------------------------


def random_cost(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = {name: 10 ** float(torch.rand((), generator=generator) * 2) for name in WEIGHTS}
    return lambda name: costs.get(name, 1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_folder_is_filled_to_the_byte_and_what_engines_fuse_is_not_split(llama, tmp_path, seed):
    options = statistics_file(tmp_path, statistics_of(llama, random_cost(seed)))
    quantize(llama, tmp_path / "whole", *options, "--int8", ".", "--exclude", "lm_head")
    least = size_of(quantize_within(llama, tmp_path / "least", options, 1e-9))
    most = size_of(tmp_path / "whole")
    for share in (0.2, 0.5, 0.8):
        limit = round(least + share * (most - least))
        folder = quantize_within(llama, tmp_path / f"{share}", options, limit / 1e9)
        room = limit - size_of(folder)
        assert room >= 0

        units = {}
        for name, bits in bits_of(folder).items():
            units.setdefault(unit_of(name), {})[name] = bits
        more = []
        for names in units.values():
            assert len({*names.values()}) == 1, names
            if {*names.values()} == {4}:
                more.append(sum(bytes_added(WEIGHTS[name]) for name in names))
        # Beyond the weights, an entry of config.json and a name in the shard's header.
        assert min(more) > room - 1000


def bytes_added(shape):
    """Bytes that 8 bits take more than 4 in groups of 64, of a weight whose columns 128 divides or not."""
    rows, columns = shape
    scales = columns // (128 if columns % 128 == 0 else 64) - columns // 64
    return rows * (columns // 2 + 2 * scales)


def quantize_within(source, folder, options, gigabytes):
    """Convert within a limit, or, if that is too small, within the least that the error names."""
    result = run_cli(source, folder, *options, "--max_size_gb", f"{gigabytes:.9f}")
    if result.returncode:
        quantize(source, folder, *options, "--max_size_gb", least_size(result))
    return folder


GATE_AND_UP = {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}
OUTPUT = "model.layers.2.self_attn.o_proj"


def test_what_saves_most_a_byte_is_chosen_first(llama, tmp_path):
    """The gate and up of a layer save more than the output does, and take six times as much room."""
    costs = dict.fromkeys(GATE_AND_UP, 6.0) | {OUTPUT: 8.0}
    options = statistics_file(tmp_path, statistics_of(llama, lambda name: costs.get(name, 0.0)))
    least = size_of(quantize_within(llama, tmp_path / "least", options, 1e-9))
    assert in_8_bits(tmp_path / "least") == {"lm_head"}

    room = 2 * bytes_added((192, H)) + 1000
    quantize_within(llama, tmp_path / "small", options, (least + room) / 1e9)
    assert in_8_bits(tmp_path / "small") == {"lm_head", OUTPUT}
    room += bytes_added((H, 64))
    quantize_within(llama, tmp_path / "larger", options, (least + room) / 1e9)
    assert in_8_bits(tmp_path / "larger") == {"lm_head", OUTPUT, *GATE_AND_UP}


def test_what_error_feedback_makes_up_for_counts_less(llama, tmp_path):
    """Two layers cost as much, and one of them has inputs that a factor explains."""
    explained = "model.layers.0.self_attn.o_proj"
    costs = {explained: 1.1, OUTPUT: 1.0}
    tensors = statistics_of(llama, lambda name: costs.get(name, 0.0))
    tensors[f"{explained}.factor"] = torch.full((64, 1), 0.9)
    options = statistics_file(tmp_path, tensors)
    least = size_of(quantize_within(llama, tmp_path / "least", options, 1e-9))
    room = bytes_added((H, 64)) + 1000
    quantize_within(llama, tmp_path / "small", options, (least + room) / 1e9)
    assert in_8_bits(tmp_path / "small") == {"lm_head", OUTPUT}


def test_experts_of_all_layers_get_8_bits_together_or_not_at_all(tmp_path):
    tensors = {}
    for layer in range(2):
        module = f"model.layers.{layer}.mlp"
        tensors |= gated(f"{module}.experts")[1] | {f"{module}.gate.weight": random(E, 64)}
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = random(64, 64)
    source = save_model(tmp_path / "in", tensors, model_type="qwen3_moe")
    # One expert alone is worth it.
    costs = {"model.layers.1.mlp.experts.3.down_proj": 1e6}
    options = statistics_file(tmp_path, statistics_of(source, lambda name: costs.get(name, 1.0)))
    options += ["--group_size", 32]
    most = sum(tensor.nbytes for tensor in tensors.values())

    def is_expert(name):
        return ".experts." in name

    quantize(source, tmp_path / "all", *options, "--max_size_gb", most / 1e9)
    experts = [name for name in bits_of(tmp_path / "all") if is_expert(name)]
    assert len(experts) == 2 * 3 * E
    assert {*experts} <= in_8_bits(tmp_path / "all")
    least = size_of(quantize_within(source, tmp_path / "least", options, 1e-9))
    room = 2 * bytes_added((64, 64)) + 2000
    quantize(source, tmp_path / "few", *options, "--max_size_gb", (least + room) / 1e9)
    few = in_8_bits(tmp_path / "few")
    assert few
    assert not any(map(is_expert, few))
    assert q.read_facts(tmp_path / "all")["options"]["chosen"][-1] == q.ROUTED_EXPERTS


def test_exclude_and_int8_are_taken_as_given(llama, tmp_path):
    options = statistics_file(tmp_path, statistics_of(llama))
    given = ["--exclude", r"layers\.0\.", "--exclude", "lm_head", "--int8", r"layers\.1\.mlp"]
    quantize(llama, tmp_path / "all", *options, *given, "--max_size_gb", 1)
    bits = bits_of(tmp_path / "all")
    assert {bits[name] for name in WEIGHTS if ".0." in name} == {16}
    assert {bits[name] for name in WEIGHTS if ".0." not in name} == {8}
    assert bits["lm_head"] == 16

    quantize_within(llama, tmp_path / "least", [*options, *given], 1e-9)
    bits = bits_of(tmp_path / "least")
    assert {bits[name] for name in WEIGHTS if ".0." in name} == {16}
    assert {bits[name] for name in WEIGHTS if ".1.mlp" in name} == {8}
    assert {bits[name] for name in WEIGHTS if ".2." in name} == {4}


def test_weights_whose_costs_are_not_known_stay_in_4_bits_with_what_is_fused_with_them(
    llama, tmp_path
):
    def cost(name):
        return None if name.endswith("k_proj") else 1.0

    options = statistics_file(tmp_path, statistics_of(llama, cost))
    result = quantize(llama, tmp_path / "out", *options, "--max_size_gb", 1)
    bits = bits_of(tmp_path / "out")
    for name in WEIGHTS:
        assert bits[name] == (4 if name[-6:] in FUSED[0] else 8)
    assert re.search(r"3\s+weights\s+without\s+a\s+cost\s+not\s+counted", result.stdout)


def test_a_head_begins_in_8_bits_and_is_whole_where_there_is_room(llama, tmp_path):
    options = statistics_file(tmp_path, statistics_of(llama))
    quantize_within(llama, tmp_path / "least", options, 1e-9)
    quantize(llama, tmp_path / "most", *options, "--max_size_gb", 1)
    assert bits_of(tmp_path / "least")["lm_head"] == 8
    assert bits_of(tmp_path / "most")["lm_head"] == 16
    assert "tie_word_embeddings" in read_config(tmp_path / "least")


@pytest.mark.parametrize("reason", ["tied", "without a cost", "held whole by vLLM", "not loaded"])
def test_a_head_that_engines_would_not_load_in_8_bits_is_whole(tmp_path, reason):
    changes = {
        "tied": {"tie_word_embeddings": True},
        "held whole by vLLM": {"model_type": next(iter(q.ENGINES["vLLM"].plain_heads))},
    }
    tensors = tensors_of(WEIGHTS)
    name = "output.weight" if reason == "not loaded" else "lm_head.weight"
    source = save_model(
        tmp_path / "in", tensors | {name: random(96, H)}, **CONFIG | changes.get(reason, {})
    )

    def cost(name):
        return None if name == "lm_head" and reason == "without a cost" else 1.0

    options = statistics_file(tmp_path, statistics_of(source, cost))
    quantize_within(source, tmp_path / "least", options, 1e-9)
    assert bits_of(tmp_path / "least")[name.removesuffix(".weight")] == 16


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_limit_below_the_least_names_the_least_and_that_is_kept(llama, tmp_path):
    options = statistics_file(tmp_path, statistics_of(llama))
    result = run_cli(llama, tmp_path / "out", *options, "--max_size_gb", 0.00001)
    assert_refused(result, "--max_size_gb 1e-05 is too little", "with 4 bits and a head in 8")
    least = float(least_size(result))
    quantize(llama, tmp_path / "out", *options, "--max_size_gb", least)
    assert least * 1e9 - 3000 < size_of(tmp_path / "out") <= round(least * 1e9)
    refuse(llama, tmp_path / "no", options=[*options, "--max_size_gb", least - 4e-6])


def test_a_file_without_costs_is_refused(llama, tmp_path):
    options = statistics_file(tmp_path, statistics_of(llama, lambda name: None))
    words = ["has no costs", "costs=True"]
    refuse(llama, tmp_path / "out", *words, options=[*options, "--max_size_gb", 1])


def test_a_limit_without_statistics_is_refused(llama, tmp_path):
    refuse(
        llama,
        tmp_path / "out",
        "--max_size_gb needs --importance",
        options=[*ENGINE, "--max_size_gb", 1],
        exit_code=2,
    )


@pytest.mark.parametrize("form", ["int4", "gptq"])
def test_formats_without_a_second_width_refuse_a_limit(llama, tmp_path, form):
    options = statistics_file(tmp_path, statistics_of(llama))
    options += ["--format", form, "--scale", "mse", "--max_size_gb", 1]
    refuse(llama, tmp_path / "out", "--max_size_gb is not for", form, options=options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (torch.tensor(-1.0), "'model.layers.0.self_attn.q_proj.cost' is negative"),
        (torch.tensor(math.nan), "not finite"),
        (torch.ones(2), "a cost is one float32"),
        (torch.tensor(1.0).half(), "a cost is one float32"),
    ],
)
def test_a_cost_that_cannot_be_is_refused_by_its_name(llama, tmp_path, change, words):
    tensors = statistics_of(llama) | {"model.layers.0.self_attn.q_proj.cost": change}
    refuse(llama, tmp_path / "out", words, options=statistics_file(tmp_path, tensors))


# --- the choice is known afterwards -----------------------------------------------------------------------------------


@pytest.fixture
def chosen(llama, tmp_path):
    """A folder within a limit, and the options that made it."""
    options = statistics_file(tmp_path, statistics_of(llama, random_cost(1)))
    least = size_of(quantize_within(llama, tmp_path / "least", options, 1e-9))
    options += ["--max_size_gb", (least + 30_000) / 1e9]
    quantize(llama, tmp_path / "out", *options)
    assert 1 < len(in_8_bits(tmp_path / "out")) < len(WEIGHTS)
    return tmp_path / "out", options


def test_verify_and_restore_know_what_was_chosen(llama, chosen, tmp_path):
    folder, options = chosen
    assert "no problems found" in quantize(llama, folder, *options, "--verify").stdout
    assert "no problems found" in quantize(llama, folder, "--verify").stdout
    quantize(folder, tmp_path / "restored", "--restore")
    restored = read_tensors(tmp_path / "restored")
    for name, tensor in load_file(llama / "model.safetensors").items():
        relative = (restored[name].float() - tensor.float()).norm() / tensor.float().norm()
        bits = bits_of(folder)[name.removesuffix(".weight")]
        assert relative < {4: 0.2, 8: 0.01, 16: 1e-9}[bits]


def test_verify_finds_a_code_of_a_chosen_weight_that_is_one_off(llama, chosen):
    folder, options = chosen
    name = sorted(in_8_bits(folder))[-1]

    def change(tensors):
        tensors[f"{name}.weight_packed"][0, 0] += 1

    edit_shard(folder / "model-00001.safetensors", change)
    assert_verification_finds(run_cli(llama, folder, *options, "--verify"), name)
    assert_verification_finds(run_cli(llama, folder, "--verify"), name)


def assert_verification_finds(result, name):
    assert result.returncode == 1
    assert re.search(rf"WRONG: +'?{re.escape(name)}", result.stdout)


def test_a_resumed_run_chooses_the_same_and_another_limit_is_another_run(llama, chosen, tmp_path):
    folder, options = chosen
    expected = folder_bytes(folder)
    assert "is complete already" in quantize(llama, folder, *options).stdout
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001.safetensors").unlink()
    quantize(llama, folder, *options)
    assert folder_bytes(folder) == expected
    other = [*options[:-1], options[-1] + 1e-5]
    refuse(llama, folder, "--max_size_gb was", options=other)
    assert "chosen" not in run_cli(llama, folder, *other).stderr
    refuse(llama, folder, "--max_size_gb was", options=[*other, "--verify"])


def test_the_choice_does_not_depend_on_the_order_of_the_file(llama, chosen, tmp_path):
    folder, options = chosen
    path = options[options.index("--importance") + 1]
    tensors = load_file(path)
    other = tmp_path / "other.safetensors"
    save_file(dict(reversed(tensors.items())), other)
    quantize(llama, tmp_path / "again", *options, "--importance", other)
    assert_same_tensors(tmp_path / "again", folder)


# --- what is expected -------------------------------------------------------------------------------------------------


def expected_divergence(text):
    return float(re.search(r"Expected divergence +(\S+) nat a token", text)[1])


def listed(result):
    return list(csv.DictReader(io.StringIO(result.stdout), delimiter="\t"))


def test_the_plan_says_what_is_expected_and_what_the_choice_saves(llama, chosen, tmp_path):
    folder, options = chosen
    result = run_cli(llama, tmp_path / "dry", *options, "--dry_run")
    assert not (tmp_path / "dry").exists()
    text = " ".join(result.stdout.split())
    chosen_weights = len(in_8_bits(folder))
    assert f"Chosen: 8 bits for {chosen_weights} weights" in text
    expected, before = map(
        float,
        re.search(
            r"about (\S+) nat a token from the source; without the choice (\S+)", text
        ).groups(),
    )
    assert 0 < expected < before
    verified = expected_divergence(quantize(llama, folder, *options, "--verify").stdout)
    assert expected == pytest.approx(verified, rel=0.15)


def test_kinds_and_layers_of_what_was_chosen_are_listed(llama, tmp_path):
    options = statistics_file(tmp_path, statistics_of(llama))
    result = quantize(llama, tmp_path / "out", *options, "--max_size_gb", 1)
    text = " ".join(result.stdout.split())
    modules = "self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj"
    assert f"attention: {modules} of layers 0-2" in text
    assert "MLP: mlp.down_proj, mlp.gate_proj, mlp.up_proj of layers 0-2" in text


@pytest.mark.parametrize(
    ("numbers", "text"), [([0], "0"), ([0, 1, 2, 4], "0-2, 4"), ([1, 3, 5, 6], "1, 3, 5-6")]
)
def test_ranges_are_short(numbers, text):
    assert q.format_ranges(numbers) == text


def test_verification_adds_up_costs_times_squared_errors_of_outputs(llama, tmp_path):
    cost = random_cost(2)
    options = statistics_file(tmp_path, statistics_of(llama, cost))
    result = quantize(
        llama, tmp_path / "out", *options, "--int8", "v_proj|q_proj|k_proj", "--verify"
    )
    rows = listed(run_cli(llama, tmp_path / "out", *options, "--verify", "--list"))
    losses = {
        row["name"]: cost(row["name"].removesuffix(".weight"))
        * float(row["relative_output_error"]) ** 2
        for row in rows
    }
    total = math.fsum(losses.values())
    assert expected_divergence(result.stdout) == pytest.approx(total, rel=0.01)
    for row in rows:
        assert float(row["share_of_divergence"]) == pytest.approx(
            losses[row["name"]] / total, rel=1e-3
        )

    block = result.stdout.partition("Expected divergence")[2]
    kinds = re.findall(r"^  (attention, 8 bits|MLP|attention) +(\S+)", block, re.MULTILINE)
    assert math.fsum(float(number) for _, number in kinds) == pytest.approx(total, rel=0.02)
    assert {kind for kind, _ in kinds} == {"MLP", "attention", "attention, 8 bits"}
    costliest = re.findall(r"costliest: (\S+)  (\S+)", block)
    assert [name for _, name in costliest] == sorted(losses, key=losses.get, reverse=True)[:5]


def test_without_costs_nothing_is_expected(llama, tmp_path):
    options = statistics_file(tmp_path, statistics_of(llama, lambda name: None))
    result = quantize(llama, tmp_path / "out", *options, "--verify")
    assert "xpected" not in result.stdout


def test_the_gain_tells_how_large_outputs_are_that_mean_squares_do_not_know(tmp_path):
    """All inputs are the same up to a factor, and so the weight has outputs of its own size there."""
    columns = 128
    direction = torch.randn(columns, generator=torch.Generator().manual_seed(0))
    weight = (torch.outer(torch.randn(64), direction) + 0.5 * torch.randn(64, columns)).bfloat16()
    source = save_model(tmp_path / "in", {"layers.0.up.weight": weight})
    outputs = weight.double() @ direction.double()
    energy = outputs.square().sum()
    gain = energy / (weight.double().square().sum() * direction.double().square().mean())
    tensors = {
        "layers.0.up": direction.square(),
        "layers.0.up.cost": torch.tensor(1.0),
        "layers.0.up.gain": gain.float(),
    }
    options = statistics_file(tmp_path, tensors)
    quantize(source, tmp_path / "out", *options)
    (row,) = listed(run_cli(source, tmp_path / "out", *options, "--verify", "--list"))

    quantize(tmp_path / "out", tmp_path / "restored", "--restore")
    error = weight.double() - read_tensors(tmp_path / "restored")["layers.0.up.weight"].double()
    # Errors of columns are taken as independent, which a file of mean squares alone cannot know.
    squares = (error.square() * direction.double().square()).sum()
    expected = math.sqrt(squares / energy)
    assert float(row["relative_output_error"]) == pytest.approx(expected, rel=1e-2)


def test_a_stack_whose_projections_share_a_cost_splits_it(tmp_path):
    stacks, separate = gated("model.layers.0.mlp.experts")
    tensors = {"model.layers.0.mlp.gate.weight": random(E, 64)}
    source = save_model(tmp_path / "in", tensors | separate, model_type="qwen3_moe")
    costs = torch.arange(1.0, E + 1)
    statistics = {}
    for name, stack in stacks.items():
        statistics[name] = torch.ones(E, stack.shape[2])
        statistics[f"{name}.cost"] = costs.clone()
    options = statistics_file(tmp_path, statistics)
    quantize(source, tmp_path / "out", *options, "--group_size", 32)
    with closing(q.Checkpoint(source)) as checkpoint:
        importance = q.Importance(tmp_path / "statistics.safetensors")
        sources = [*checkpoint.tensors.values()]
        importance.match(sources, sources, q.oddity_with("projections", checkpoint.config))
        for info in sources:
            match = re.search(r"experts\.(\d+)\.(\w+)_proj", info.name)
            if match:
                share = 1 if match[2] == "down" else 2
                assert importance.cost_of(info) == float(costs[int(match[1])]) / share
            else:
                assert importance.cost_of(info) is None


# --- a line a weight --------------------------------------------------------------------------------------------------

TITLES = [
    "name",
    "kind",
    "bits",
    "relative_error",
    "relative_output_error",
    "share_of_divergence",
]


def test_list_prints_the_errors_of_each_weight_and_nothing_else_to_standard_output(llama, chosen):
    folder, options = chosen
    result = run_cli(llama, folder, *options, "--verify", "--list")
    rows = listed(result)
    assert result.returncode == 0
    assert result.stdout.splitlines()[0].split("\t") == TITLES
    assert "no problems found" in result.stderr
    bits = bits_of(folder)
    names = {f"{name}.weight": str(number) for name, number in bits.items() if number < 16}
    assert {row["name"]: row["bits"] for row in rows} == names
    assert math.fsum(float(row["share_of_divergence"]) for row in rows) == pytest.approx(1)
    for row in rows:
        usual = 0.09 if row["bits"] == "4" else 0.006
        assert float(row["relative_error"]) == pytest.approx(usual, rel=0.2)


def test_what_is_not_known_without_the_statistics_is_empty(llama, chosen):
    folder, _ = chosen
    rows = listed(run_cli(llama, folder, "--verify", "--list"))
    assert rows
    for row in rows:
        assert row["relative_output_error"] == row["share_of_divergence"] == ""
        assert 0 < float(row["relative_error"]) < 0.2


def test_list_of_a_folder_that_is_not_finished_is_refused(llama, tmp_path):
    options = [*ENGINE, "--verify", "--list"]
    refuse(llama, tmp_path / "out", "is not finished", "without --list", options=options)


def test_list_of_a_damaged_folder_ends_with_an_error(llama, chosen):
    folder, options = chosen
    name = next(name for name, bits in bits_of(folder).items() if bits == 4)

    def change(tensors):
        tensors[f"{name}.weight_packed"][0, 0] += 1

    edit_shard(folder / "model-00001.safetensors", change)
    result = run_cli(llama, folder, *options, "--verify", "--list")
    assert result.returncode == 1
    assert "WRONG" in result.stderr
    assert "WRONG" not in result.stdout


# --- expected and measured --------------------------------------------------------------------------------------------


def text_batches(count, seed):
    """Tokens of which each is one of four that its forerunner allows, the first of these in half of all cases."""
    rules = torch.randint(64, (64, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(64, (16, 1), generator=generator)
        for _ in range(63):
            which = (torch.rand(16, generator=generator) * 4).long() * torch.randint(
                2, (16,), generator=generator
            )
            tokens = torch.cat([tokens, rules[tokens[:, -1], which][:, None]], 1)
        yield tokens


@pytest.fixture(scope="module")
def trained():
    """A small Llama that has learned those rules."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with q.one_thread():
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for batch in text_batches(150, seed=1):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 2
    return model.bfloat16().float().eval()


@pytest.mark.parametrize("rank", [16, 32])
def test_what_is_expected_of_a_trained_model_is_what_it_loses(trained, tmp_path, rank):
    trained.bfloat16().save_pretrained(tmp_path / "in")
    trained.float()
    held_out = list(text_batches(6, seed=2))
    statistics = tmp_path / "statistics.safetensors"
    with q.one_thread():
        q.collect_statistics(trained, list(text_batches(8, seed=3)), statistics, rank=rank)
    options = [*ENGINE, "--group_size", 32, "--importance", statistics, "--verify"]
    text = quantize(tmp_path / "in", tmp_path / "out", *options).stdout
    quantize(tmp_path / "out", tmp_path / "restored", "--restore")
    restored = LlamaForCausalLM.from_pretrained(tmp_path / "restored").float()

    divergences = []
    with torch.no_grad():
        for batch in held_out:
            one, other = (
                model(input_ids=batch).logits.log_softmax(-1) for model in (trained, restored)
            )
            divergences.append((one.exp() * (one - other)).sum(-1).mean())
    measured = float(torch.stack(divergences).mean())
    assert expected_divergence(text) == pytest.approx(measured, rel=0.2)
