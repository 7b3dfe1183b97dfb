"""Collecting statistics: for every weight, the mean square of what its columns are multiplied with, and a factor of
their second moments."""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import families
import pytest
import torch
from conftest import ROOT, quantize
from families import TOKENS
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import quantize_int4 as q

FAMILIES = ["nemotron_h", "qwen3_moe", "llama"]
BATCHES = [
    {"input_ids": TOKENS},
    {"input_ids": TOKENS[:1, :7].flip(1)},
]  # unlike in size, so means must be weighed
ONE_TOKEN = [{"input_ids": TOKENS[:1, :1]}]


def collect_vectors(model, batches, folder, costs=False, **options):
    """Collect to a file in the folder; its tensors."""
    path = folder / "importance.safetensors"
    q.collect_statistics(model, batches, path, costs=costs, **options)
    return load_file(path)


# --- the same means, from hooks ---------------------------------------------------------------------------------------


def hook_matrices(model, inputs):
    """Add to `inputs`, by name, what enters each module that has a 2-D weight: layers, heads and routers."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2))
            )


def hook_stacks(model, inputs):
    """Add to `inputs`, by name and expert, what the router sends there and what that expert makes of it."""

    def hook(module, args, name):
        x, chosen, _ = args
        first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
        for expert in chosen.unique().tolist():
            rows = x[(chosen == expert).any(dim=1)]
            hidden = rows @ getattr(module, first)[expert].T
            if first == "gate_up_proj":
                gate, up = hidden.chunk(2, dim=-1)
                hidden = module.act_fn(gate) * up
            else:
                hidden = module.act_fn(hidden)
            inputs[f"{name}.{first}", expert].append(rows)
            inputs[f"{name}.down_proj", expert].append(hidden)

    for name, module in model.named_modules():
        if name.endswith(".experts") and not isinstance(module, nn.ModuleList):
            module.register_forward_pre_hook(
                lambda module, args, name=name: hook(module, args, name)
            )


def mean_squares(parts):
    return torch.cat(parts).double().square().mean(dim=0).float()


def collect_inputs(model, batches):
    """What entered each weight, by name, and by name and expert."""
    inputs = defaultdict(list)
    hook_matrices(model, inputs)
    hook_stacks(model, inputs)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return inputs


def expected_vectors(model, batches):
    """The vectors by name, and those of stacks by name and expert."""
    return {name: mean_squares(parts) for name, parts in collect_inputs(model, batches).items()}


def assert_equal(vectors, expected):
    """Every vector is as expected and nothing else is there but zeros."""
    assert set(vectors) == {name if isinstance(name, str) else name[0] for name in expected}
    for name, vector in vectors.items():
        assert vector.dtype == torch.float32
        for expert, row in enumerate(vector) if vector.dim() == 2 else [(None, vector)]:
            wanted = expected.get(
                name if expert is None else (name, expert), torch.zeros(vector.shape[-1])
            )
            torch.testing.assert_close(row, wanted, rtol=1e-3, atol=0)


# --- models of transformers -------------------------------------------------------------------------------------------


def build(name):
    model = families.build(name)
    model.eval()
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_the_mean_squares_over_all_tokens_that_reached_a_weight(name, tmp_path):
    expected = expected_vectors(build(name), BATCHES)
    assert_equal(collect_vectors(build(name), BATCHES, tmp_path, rank=0), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_that_is_multiplied_with_has_a_vector_in_its_parameters_name(name, tmp_path):
    model = build(name)
    vectors = collect_vectors(model, BATCHES, tmp_path, rank=0)
    others = ("conv1d.weight", "embeddings.weight", "embed_tokens.weight")
    names = [
        name
        for name, tensor in model.named_parameters()
        if tensor.dim() > 1 and not name.endswith(others)
    ]
    assert set(vectors) == {name.removesuffix(".weight") for name in names}


@pytest.mark.parametrize("name", ["nemotron_h", "qwen3_moe"])
def test_experts_that_saw_no_token_keep_zeros_and_all_others_have_a_vector(name, tmp_path):
    chosen = defaultdict(set)
    model = build(name)
    for module_name, module in model.named_modules():
        if module_name.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda _, args, name=module_name: chosen[name].update(args[1].flatten().tolist())
            )
    vectors = collect_vectors(model, ONE_TOKEN, tmp_path, rank=0)
    stacks = {name: stack for name, stack in vectors.items() if stack.dim() == 2}
    assert len(stacks) == 2 * len(chosen)
    for stack_name, stack in stacks.items():
        seen = chosen[stack_name.rpartition(".")[0]]
        assert 0 < len(seen) < len(stack)
        assert {expert for expert, row in enumerate(stack) if row.any()} == seen


@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_output_is_the_same_while_it_is_recorded(name, tmp_path):
    model = build(name)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        plain = [model(**batch).logits for batch in BATCHES]
    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    collect_vectors(model, BATCHES, tmp_path, rank=0)
    assert all(map(torch.equal, outputs, plain))
    assert len(outputs) == len(plain)


def test_a_model_in_training_is_recorded_as_it_runs_in_use(tmp_path):
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = expected_vectors(model, BATCHES)
    assert_equal(collect_vectors(model.train(), BATCHES, tmp_path, rank=0), expected)


def test_a_tied_head_has_its_inputs_in_both_names(tmp_path):
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    vectors = collect_vectors(model, BATCHES, tmp_path, rank=0)
    expected = expected_vectors(model, BATCHES)
    assert_equal(vectors, expected | {"model.embed_tokens": expected["lm_head"]})


# --- models of other code ---------------------------------------------------------------------------------------------


class SeparateExperts(nn.Module):
    """Routed experts as remote code has them: a module an expert, called with as many tokens as there are, or none."""

    def __init__(self, experts=6, width=16, inner=24):
        super().__init__()
        self.embeddings = nn.Embedding(320, width)
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up_proj": nn.Linear(width, inner),
                    "down_proj": nn.Linear(inner, width, bias=False),
                }
            )
            for _ in range(experts)
        )

    def forward(self, input_ids):
        x = self.embeddings(input_ids).flatten(0, 1)
        chosen = self.gate(x).topk(2).indices
        output = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).any(dim=1).nonzero().flatten()
            output.index_add_(0, rows, expert["down_proj"](expert["up_proj"](x[rows]).relu()))
        return output


def test_separate_experts_have_a_vector_each(tmp_path):
    torch.manual_seed(0)
    model = SeparateExperts()
    expected = expected_vectors(model, BATCHES)
    assert len(expected) == 13
    assert_equal(collect_vectors(model, BATCHES, tmp_path, rank=0), expected)


def test_separate_experts_that_were_called_without_tokens_have_no_vector(tmp_path):
    torch.manual_seed(0)
    vectors = collect_vectors(SeparateExperts(), ONE_TOKEN, tmp_path, rank=0)
    assert len(vectors) == 5  # the router, and two experts' two weights
    assert all(vector.isfinite().all() for vector in vectors.values())


class OneProduct(nn.Module):
    """A product of inputs and one parameter, written in some way."""

    def __init__(self, multiply, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.multiply = multiply

    def forward(self, x):
        return self.multiply(x, self.weight)


def collect_product(multiply, shape, x, folder):
    return collect_vectors(OneProduct(multiply, *shape), [{"x": x}], folder, rank=0)["weight"]


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, stack: x @ stack[1],
        lambda x, stack: torch.matmul(x, stack[1]),
        lambda x, stack: functional.linear(x, stack[1].T),
        lambda x, stack: torch.bmm(torch.stack([0 * x, x, 0 * x]), stack),
    ],
    ids=["operator", "matmul", "linear", "bmm"],
)
@pytest.mark.parametrize("rows", [8, 16], ids=["narrow", "square"])
def test_transposed_stacks_have_a_vector_of_their_inputs(multiply, rows, tmp_path):
    x = torch.randn(5, 16)
    vectors = collect_product(multiply, (3, 16, rows), x, tmp_path)
    torch.testing.assert_close(
        vectors, torch.stack([torch.zeros(16), x.square().mean(0), torch.zeros(16)])
    )


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, weight: x @ weight.T,
        lambda x, weight: functional.linear(input=x, weight=weight),
        lambda x, weight: functional.linear(x.to(torch.float64), weight.to(torch.float64)),
        lambda x, weight: [functional.linear(x, part) for part in weight.chunk(2)],
    ],
    ids=["operator", "keywords", "another dtype", "split into rows"],
)
@pytest.mark.parametrize("rows", [8, 16], ids=["narrow", "square"])
def test_a_matrix_has_a_vector_however_the_product_is_written(multiply, rows, tmp_path):
    x = torch.randn(2, 5, 16)
    vector = collect_product(multiply, (rows, 16), x, tmp_path)
    torch.testing.assert_close(vector, x.square().mean((0, 1)))


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, weight: x @ weight,
        lambda x, weight: functional.linear(x, weight.T),
        lambda x, weight: functional.linear(x[:, :8], weight[:, :8]),
        lambda x, weight: x @ weight[0],
        lambda x, weight: functional.embedding(x.argmax(1), weight),
    ],
    ids=["from the left", "transposed", "half the columns", "one row", "embedding"],
)
def test_a_matrix_whose_columns_are_not_multiplied_has_no_vector(multiply, tmp_path):
    with pytest.raises(q.QuantizeError, match="no weight of the model was multiplied"):
        collect_product(multiply, (16, 16), torch.randn(5, 16), tmp_path)


# --- factors ----------------------------------------------------------------------------------------------------------


def moments_of(inputs):
    """Second moments of each input, as factors should have their main part."""
    return {name: (x := torch.cat(parts).double()).T @ x / len(x) for name, parts in inputs.items()}


def captured(factor, moments):
    """How much of what the best factor of this rank leaves is left: 1 if it is the best."""
    values = torch.linalg.eigvalsh(moments).flip(0)
    left = (moments - factor.double() @ factor.double().T).diag().sum()
    return float(left / values[factor.shape[1] :].sum().clamp(min=1e-3 * values.sum()))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("whole", [4096, 0], ids=["whole", "sketched"])
def test_factors_hold_the_main_part_of_the_second_moments_of_all_tokens_that_reached_a_weight(
    name, whole, tmp_path
):
    moments = moments_of(collect_inputs(build(name), BATCHES))
    vectors = collect_vectors(build(name), BATCHES, tmp_path, rank=4, whole_columns=whole)
    stacks = 0
    for key, matrix in moments.items():
        module, expert = key if isinstance(key, tuple) else (key, None)
        factor = (
            vectors[f"{module}.factor"] if expert is None else vectors[f"{module}.factor"][expert]
        )
        assert factor.dtype == torch.float16
        assert factor.shape == (len(matrix), 4)
        stacks += expert is not None
        limit = 1.6 if whole == 0 or ".experts" in module else 1.02
        assert captured(factor, matrix) < limit, key
    assert bool(stacks) == (name != "llama")


def test_factors_never_exceed_the_mean_squares_and_quantize(tmp_path):
    model = build("qwen3_moe")
    vectors = collect_vectors(model, ONE_TOKEN, tmp_path, rank=32)  # more than there are tokens
    for name, vector in vectors.items():
        if not name.endswith(".factor"):
            sums = vectors[f"{name}.factor"].float().square().sum(-1)
            assert (sums <= vector * 1.01 + 1e-6 * vector.max()).all(), name
    model.to(torch.bfloat16).save_pretrained(tmp_path / "in")
    options = [
        "--format",
        "compressed-tensors",
        "--group_size",
        32,
        "--importance",
        tmp_path / "importance.safetensors",
    ]
    assert (
        "with error feedback of rank"
        in quantize(tmp_path / "in", tmp_path / "out", *options, "--verify").stdout
    )


def test_layers_that_read_the_same_have_the_same_factor_and_others_have_not(tmp_path):
    vectors = collect_vectors(build("llama"), BATCHES, tmp_path, rank=4)
    q_proj, k_proj, o_proj, gate, up = (
        vectors[f"model.layers.0.{name}.factor"]
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        )
    )
    assert torch.equal(q_proj, k_proj)
    assert torch.equal(gate, up)
    assert not torch.equal(q_proj, gate)
    assert not torch.equal(q_proj, o_proj)


def test_experts_that_read_the_very_input_of_the_router_have_factors(tmp_path):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(64, 3, bias=False)
            self.experts = nn.ModuleList(nn.Linear(64, 8, bias=False) for _ in range(3))

        def forward(self, x):
            shares = self.gate(x)
            return sum(shares[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))

    x = torch.randn(200, 64)
    vectors = collect_vectors(Dense(), [{"x": x}], tmp_path, rank=4)
    assert captured(vectors["experts.2.factor"], x.double().T @ x.double() / 200) < 1.02


def test_inputs_that_were_changed_in_place_are_not_taken_for_the_same(tmp_path):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)

        def forward(self, x):
            return self.first(x) + self.second(x.mul_(torch.arange(16)))

    x = torch.randn(9, 16)
    vectors = collect_vectors(Changed(), [{"x": x.clone()}], tmp_path, rank=4)
    changed = (x * torch.arange(16)).double()
    assert captured(vectors["second.factor"], changed.T @ changed / 9) < 1.02


def test_a_rank_of_0_collects_mean_squares_alone(tmp_path):
    assert not any(
        name.endswith(".factor")
        for name in collect_vectors(build("llama"), BATCHES, tmp_path, rank=0)
    )


# --- the same factors, plainly computed --------------------------------------------------------------------------------


def plain_factor(x, rank, is_sketched):
    """The factor of inputs (tokens, columns), as it is defined, in float64."""
    x = x.double()
    moments = x.T @ x / len(x)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(moments), rank + 8, generator=generator).double()
    if not is_sketched:
        for _ in range(8):
            directions = torch.linalg.qr(moments @ directions).Q
    values, vectors = torch.linalg.eigh(directions.T @ moments @ directions)
    half = moments @ directions @ vectors / values.clamp(min=values[-1] * 1e-6 + 1e-30).sqrt()
    half = (half @ torch.linalg.eigh(half.T @ half).eigenvectors)[:, -rank:]
    share = moments.diag() / half.square().sum(1).clamp(min=1e-30)
    return half * share.clamp(max=1).sqrt()[:, None]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("whole", [4096, 0], ids=["whole", "sketched"])
def test_factors_are_those_plainly_computed(name, whole, tmp_path):
    inputs = collect_inputs(build(name).float(), BATCHES)
    vectors = collect_vectors(build(name).float(), BATCHES, tmp_path, rank=8, whole_columns=whole)
    for key, parts in inputs.items():
        module, expert = key if isinstance(key, tuple) else (key, None)
        factor = vectors[f"{module}.factor"]
        factor = (factor if expert is None else factor[expert]).double()
        x = torch.cat(parts)
        expected = plain_factor(x, 8, is_sketched=whole == 0 or ".experts" in module)
        # Of a factor only its product with itself is determined.
        difference = factor @ factor.T - expected @ expected.T
        limit = 0.02 * (expected @ expected.T).norm()
        assert difference.norm() < limit, key


def test_transposed_stacks_have_the_factors_of_their_inputs(tmp_path):
    model = OneProduct(lambda x, stack: x @ stack[1], 3, 16, 24)
    x = torch.randn(50, 16)
    factor = collect_vectors(model, [{"x": x}], tmp_path, rank=4)["weight.factor"]
    expected = plain_factor(x, 4, is_sketched=True)
    torch.testing.assert_close(
        factor[1].double() @ factor[1].double().T, expected @ expected.T, rtol=0.01, atol=0.01
    )
    assert not factor[[0, 2]].any()


# --- costs -------------------------------------------------------------------------------------------------------------


def plain_costs(model, batches):
    """By layer: half the mean, over all tokens, of the squared gradients of each output, times that of the squared
    outputs; and the latter in that which random weights as large would give."""
    gradients, outputs, inputs = defaultdict(list), defaultdict(list), defaultdict(list)
    tokens = 0

    def hook(module, args, output, name):
        inputs[name].append(args[0].detach().flatten(0, -2))
        outputs[name].append((args[0] @ module.weight.T).detach().flatten(0, -2))
        output.register_hook(lambda gradient: gradients[name].append(gradient.flatten(0, -2)))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, args, output, name=name: hook(module, args, output, name)
            )
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        logits = model(**batch).logits.flatten(0, -2)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        logits.log_softmax(-1).gather(1, drawn).sum().backward()
        tokens += len(logits)
    numbers = {}
    for name, parts in gradients.items():
        gradient = torch.cat(parts).double()
        norms = torch.cat(outputs[name]).double().square().sum(1)
        assert len(gradient) == tokens
        weight = model.get_submodule(name).weight.detach().double()
        random = weight.square().sum() * torch.cat(inputs[name]).double().square().mean()
        cost = gradient.square().mean() * norms.mean() / 2
        numbers[name] = (cost.float(), (norms.mean() / random).float())
    return numbers


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_and_gains_are_those_plainly_computed(name, tmp_path):
    expected = plain_costs(build(name).float(), BATCHES)
    vectors = collect_vectors(build(name).float(), BATCHES, tmp_path, costs=True, rank=0)
    assert expected
    for key, (cost, gain) in expected.items():
        torch.testing.assert_close(vectors[f"{key}.cost"], cost, rtol=1e-3, atol=0)
        torch.testing.assert_close(vectors[f"{key}.gain"], gain, rtol=1e-3, atol=0)


def test_each_expert_has_the_cost_of_what_it_adds(tmp_path):
    """The cost of a small error in one expert's outputs is the divergence that it brings, about."""
    model = build("qwen3_moe").float()
    vectors = collect_vectors(model, BATCHES * 20, tmp_path, costs=True, rank=0)
    name = "model.layers.1.mlp.experts.down_proj"
    costs = vectors[f"{name}.cost"]
    assert (costs > 0).equal(vectors[name].any(1))
    expert = int(costs.argmax())
    weight = model.get_parameter(name)
    kept = weight.detach().clone()
    with torch.no_grad():
        plain = [model(**batch).logits.log_softmax(-1) for batch in BATCHES]
        divergences = []
        for seed in range(40):
            noise = torch.randn(kept[expert].shape, generator=torch.Generator().manual_seed(seed))
            # Relative to the outputs, whose inputs are not of one size in all columns.
            size = (vectors[name][expert] * kept[expert].square()).sum()
            size /= (vectors[name][expert] * noise.square()).sum()
            weight[expert] = kept[expert] + 0.03 * size.sqrt() * noise
            others = [model(**batch).logits.log_softmax(-1) for batch in BATCHES]
            parts = [(p.exp() * (p - o)).sum(-1).flatten() for p, o in zip(plain, others)]
            divergences.append(torch.cat(parts).mean() / 0.03**2)
    assert torch.stack(divergences).mean() == pytest.approx(float(costs[expert]), rel=0.3)


def test_costs_are_there_unless_they_are_not_asked_for(tmp_path):
    q.collect_statistics(build("llama"), BATCHES, tmp_path / "file")
    vectors = collect_vectors(build("llama"), BATCHES, tmp_path, costs=False)
    costs = {name for name in load_file(tmp_path / "file") if name not in vectors}
    names = [name for name in vectors if not name.endswith(".factor")]
    assert costs == {f"{name}.{what}" for name in names for what in ("cost", "gain")}


def test_a_model_without_a_way_back_has_no_costs_and_says_why(tmp_path, capsys):
    model = build("llama")
    expected = collect_vectors(model, BATCHES, tmp_path)
    model.forward = torch.no_grad()(model.forward)
    capsys.readouterr()
    assert_same_vectors(collect_vectors(model, BATCHES, tmp_path, costs=True), expected)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Costs:" in line]
    assert line.startswith("Costs:     left out: RuntimeError: cannot register a hook on a tensor")


def test_weights_have_no_gradients_and_need_them_afterwards_as_before(tmp_path):
    model = build("llama")
    model.lm_head.weight.requires_grad_(False)
    collect_vectors(model, BATCHES, tmp_path, costs=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    needing = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert needing == {name for name, _ in model.named_parameters()} - {"lm_head.weight"}


# --- what batches may be ----------------------------------------------------------------------------------------------


def assert_same_vectors(vectors, expected):
    assert set(vectors) == set(expected)
    for name, vector in vectors.items():
        torch.testing.assert_close(vector, expected[name], rtol=1e-3, atol=1e-6)


def test_tensors_of_tokens_are_taken_as_they_are(tmp_path):
    expected = collect_vectors(build("llama"), BATCHES, tmp_path, rank=0)
    tokens = [TOKENS, TOKENS[0, :7].flip(0)]
    assert_same_vectors(collect_vectors(build("llama"), iter(tokens), tmp_path, rank=0), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_a_mask_leaves_out_does_not_count(side, tmp_path):
    model = build("llama").float()
    prompts = [TOKENS[:1, :9], TOKENS[1:, :5], TOKENS[1:, 9:20]]
    expected = collect_vectors(model, prompts, tmp_path, rank=0)

    padded = torch.zeros(3, 11, dtype=torch.int64)
    mask = torch.zeros(3, 11, dtype=torch.int64)
    for row, (prompt,) in enumerate(prompts):
        columns = slice(11 - len(prompt), 11) if side == "left" else slice(0, len(prompt))
        padded[row, columns] = prompt
        mask[row, columns] = 1
    batch = {"input_ids": padded, "attention_mask": mask}
    assert_same_vectors(collect_vectors(model, [batch], tmp_path, rank=0), expected)


HOLES = torch.ones_like(TOKENS).index_fill(1, torch.tensor([5]), 0)
CUT = torch.ones_like(TOKENS).index_fill(1, torch.tensor([23]), 0)
PADDED = TOKENS.index_fill(1, torch.tensor([22, 23]), 0)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "batches gave no tokens"),
        ([TOKENS[:, :0]], "batches gave no tokens"),
        ({"input_ids": TOKENS}, "batch 1 is a str"),
        ([TOKENS, [1, 2, 3]], "batch 2 is a list"),
        ([TOKENS, PADDED], "batch 2 is padded (token 0) without an attention_mask"),
        ([{"input_ids": TOKENS, "attention_mask": HOLES}], "batch 1 is padded and cannot be cut"),
        (
            [{"input_ids": TOKENS, "attention_mask": CUT, "pixels": torch.zeros(2, 3)}],
            "batch 1 is padded and cannot be cut",
        ),
    ],
    ids=["none", "empty", "dict", "list", "padding", "holes", "images"],
)
def test_batches_that_would_count_wrongly_are_refused(batches, words, tmp_path):
    model = build("llama")
    model.config.pad_token_id = 0
    with pytest.raises(q.QuantizeError, match=re.escape(words)) as refusal:
        q.collect_statistics(model, batches, tmp_path / "file")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "file").exists()


# --- what models may be -----------------------------------------------------------------------------------------------


def with_codes(model):
    model.lm_head.weight = nn.Parameter(torch.zeros(256, 8, dtype=torch.uint8), requires_grad=False)


def with_packed_words(model):
    model.lm_head.register_buffer("qweight", torch.zeros(8, 256, dtype=torch.int32))


def with_float8(model):
    weight = model.lm_head.weight.detach().to(torch.float8_e4m3fn)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)


def offloaded(model):
    model.lm_head.to("meta")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_codes, "'lm_head.weight' is torch.uint8, so the model is quantized"),
        (with_float8, "'lm_head.weight' is torch.float8_e4m3fn, so the model is quantized"),
        (with_packed_words, "'lm_head.qweight' is torch.int32, so the model is quantized"),
        (offloaded, "'lm_head.weight' is offloaded"),
    ],
)
def test_models_whose_weights_are_not_there_are_refused(change, words, tmp_path):
    model = build("llama")
    change(model)
    with pytest.raises(q.QuantizeError, match=re.escape(words)):
        q.collect_statistics(model, BATCHES, tmp_path / "file")


@pytest.mark.parametrize("rank", [-1, 65])
def test_a_rank_that_cannot_be_used_is_refused(rank, tmp_path):
    with pytest.raises(q.QuantizeError, match=f"rank {rank} is not from 0 to 64"):
        q.collect_statistics(build("llama"), BATCHES, tmp_path / "file", rank=rank)


def test_a_path_that_cannot_be_written_is_refused_before_the_model_is_run(tmp_path):
    with pytest.raises(q.QuantizeError, match="cannot be written"):
        q.collect_statistics(build("llama"), None, tmp_path / "missing" / "file")


def test_the_model_is_left_as_it_was(tmp_path):
    model = build("qwen3_moe").train()
    model.lm_head.eval()
    model.set_experts_implementation("batched_mm")
    threads = torch.get_num_threads()
    collect_vectors(model, BATCHES, tmp_path, rank=0)
    assert model.training
    assert not model.lm_head.training
    assert model.config._experts_implementation == "batched_mm"
    assert torch.get_num_threads() == threads


# --- what is said and written -----------------------------------------------------------------------------------------


def test_the_file_tells_the_tokens_the_model_and_its_version(tmp_path):
    collect_vectors(build("llama"), BATCHES, tmp_path, rank=8)
    with safe_open(tmp_path / "importance.safetensors", "pt") as file:
        assert file.metadata() == {
            "quantize_int4_statistics": "1",
            "model_type": "llama",
            "rank": "8",
            "tokens": "55",
        }


def test_it_says_how_much_was_seen_and_whether_that_is_enough(tmp_path, capsys):
    vectors = collect_vectors(build("qwen3_moe"), BATCHES, tmp_path, rank=0)
    text = capsys.readouterr().out
    assert "batch 1 of 2" in text
    stacks = [stack for name, stack in vectors.items() if stack.dim() == 2]
    unseen = sum(int((~stack.any(1)).sum()) for stack in stacks)
    experts = sum(len(stack) for stack in stacks)
    others = len(vectors) - len(stacks)
    assert f"{experts - unseen + others} weights with data from 55 tokens\n" in text
    assert unseen == 0
    assert "no token reached" not in text
    assert "too few, give " in text


def test_it_counts_the_experts_that_no_token_reached(tmp_path, capsys):
    vectors = collect_vectors(build("qwen3_moe"), [torch.tensor([[1]])], tmp_path, rank=0)
    stacks = [stack for stack in vectors.values() if stack.dim() == 2]
    unseen = sum(int((~stack.any(1)).sum()) for stack in stacks)
    assert unseen > 0
    counted = f"no token reached {unseen} of their {sum(map(len, stacks))} weights\n"
    assert counted in capsys.readouterr().out


def test_enough_is_what_the_readmes_tables_had(tmp_path, capsys):
    model = OneProduct(lambda x, weight: x @ weight.T, 8, 16)
    q.collect_statistics(model, [{"x": torch.randn(2047, 16)}], tmp_path / "file")
    assert "too few, give 2 times as many" in capsys.readouterr().out
    q.collect_statistics(model, [{"x": torch.randn(2048, 16)}], tmp_path / "file")
    assert "enough: README's tables were measured with 2,048 tokens\n" in capsys.readouterr().out


def test_weights_that_nothing_was_multiplied_with_are_named(tmp_path, capsys):
    model = OneProduct(lambda x, weight: x @ weight.T, 8, 16)
    model.other = nn.Linear(16, 16)
    collect_vectors(model, [{"x": torch.randn(5, 16)}], tmp_path)
    assert "1 weight with data from 5 tokens; without: 'other.weight'" in capsys.readouterr().out


def test_a_terminal_sees_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(q, "is_terminal", lambda stream: True)
    collect_vectors(build("llama"), BATCHES, tmp_path, rank=0)
    assert f"{q.CLEAR_LINE}collecting  [##########..........]  batch 1 of 2" in (
        capsys.readouterr().out
    )


def test_importing_the_script_prints_nothing_and_starts_nothing():
    program = "import quantize_int4, threading; print(threading.active_count())"
    arguments = [sys.executable, "-c", program, "--no-such-option"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("1\n", "")


def test_the_readmes_example_runs_as_it_is_printed(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "collect_statistics" in block]
    (folder,) = re.findall(r'folder = "(.*)"', example)
    model = build("llama")

    class Tokenizer:
        def __call__(self, text, return_tensors):
            assert return_tensors == "pt"
            return {"input_ids": TOKENS[:1, : len(text)]}

    def load(source, **options):
        assert source == folder
        return model if options else Tokenizer()

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("Name three rivers.\n\nWhat is a group?\n\nHello")
    exec(example, {})
    expected = [TOKENS[:1, :length] for length in (18, 16, 5)]
    (tmp_path / "expected").mkdir()
    assert_same_vectors(
        load_file("importance.safetensors"),
        collect_vectors(build("llama"), expected, tmp_path / "expected", costs=True),
    )
