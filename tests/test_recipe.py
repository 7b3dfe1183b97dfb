"""README.md's recipe for --importance: for every weight, the mean square of what its columns are multiplied with, and a
factor of their second moments."""

from collections import defaultdict

import families
import pytest
import torch
from conftest import quantize
from families import TOKENS
from recipe import collect_vectors
from torch import nn
from torch.nn import functional

FAMILIES = ["nemotron_h", "qwen3_moe", "llama"]
BATCHES = [
    {"input_ids": TOKENS},
    {"input_ids": TOKENS[:1, :7].flip(1)},
]  # unlike in size, so means must be weighed
ONE_TOKEN = [{"input_ids": TOKENS[:1, :1]}]

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
    assert_equal(collect_vectors(build(name), BATCHES, tmp_path, RANK=0), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_that_is_multiplied_with_has_a_vector_in_its_parameters_name(name, tmp_path):
    model = build(name)
    vectors = collect_vectors(model, BATCHES, tmp_path, RANK=0)
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
    vectors = collect_vectors(model, ONE_TOKEN, tmp_path, RANK=0)
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
    collect_vectors(model, BATCHES, tmp_path, RANK=0)
    assert all(map(torch.equal, outputs, plain))
    assert len(outputs) == len(plain)


def test_a_model_in_training_is_recorded_as_it_runs_in_use(tmp_path):
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = expected_vectors(model, BATCHES)
    assert_equal(collect_vectors(model.train(), BATCHES, tmp_path, RANK=0), expected)


def test_a_tied_head_has_its_inputs_in_both_names(tmp_path):
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    vectors = collect_vectors(model, BATCHES, tmp_path, RANK=0)
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
    assert_equal(collect_vectors(model, BATCHES, tmp_path, RANK=0), expected)


def test_separate_experts_that_were_called_without_tokens_have_no_vector(tmp_path):
    torch.manual_seed(0)
    vectors = collect_vectors(SeparateExperts(), ONE_TOKEN, tmp_path, RANK=0)
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
    vectors = collect_vectors(OneProduct(multiply, *shape), [{"x": x}], folder, RANK=0)
    return vectors.get("weight")


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
    assert collect_product(multiply, (16, 16), torch.randn(5, 16), tmp_path) is None


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
    vectors = collect_vectors(build(name), BATCHES, tmp_path, RANK=4, WHOLE=whole)
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
    vectors = collect_vectors(model, ONE_TOKEN, tmp_path, RANK=32)  # more than there are tokens
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
    vectors = collect_vectors(build("llama"), BATCHES, tmp_path, RANK=4)
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
    vectors = collect_vectors(Dense(), [{"x": x}], tmp_path, RANK=4)
    assert captured(vectors["experts.2.factor"], x.double().T @ x.double() / 200) < 1.02


def test_inputs_that_were_changed_in_place_are_not_taken_for_the_same(tmp_path):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)

        def forward(self, x):
            return self.first(x) + self.second(x.mul_(torch.arange(16)))

    x = torch.randn(9, 16)
    vectors = collect_vectors(Changed(), [{"x": x.clone()}], tmp_path, RANK=4)
    changed = (x * torch.arange(16)).double()
    assert captured(vectors["second.factor"], changed.T @ changed / 9) < 1.02


def test_a_rank_of_0_collects_mean_squares_alone(tmp_path):
    assert not any(
        name.endswith(".factor")
        for name in collect_vectors(build("llama"), BATCHES, tmp_path, RANK=0)
    )
