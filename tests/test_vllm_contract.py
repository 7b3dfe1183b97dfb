"""What vLLM demands of a compressed-tensors folder of Nemotron-3-Nano, as tables, checked against all that is planned.

The tables were read from vLLM's sources, of the version below; each row says where. Nothing of vLLM is needed here:
where it is installed, test_vllm_loader.py compares the tables with what vLLM allocates. What they are checked against
is the bytes of the headers and of config.json that the program would write for the full model's 6,243 tensors.

vLLM notices little of this by itself: it leaves what it misses uninitialised, skips experts that it does not know, and
cuts off rows and columns that are too many. At the end each demand is shown to notice when it is not met.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from dataclasses import dataclass

import pytest
from tiny_nemotron import NANO_30B

import quantize_int4 as q

VLLM_VERSIONS = (
    "0.29.0",
    "0.33.0",
)  # every row below was read in the first; paths are below vllm/model_executor/
NEMOTRON = "models/nemotron_h.py"
MAMBA = "layers/mamba/mamba_mixer2.py"
MARLIN = "layers/quantization/utils/marlin_utils.py"
CT = "layers/quantization/compressed_tensors"
WNA16 = f"{CT}/schemes/compressed_tensors_wNa16.py"

GROUP_SIZE = 64
KINDS = (
    NANO_30B.hybrid_override_pattern
)  # a letter a layer: M Mamba, * attention, E mixture of experts

# --- what vLLM demands ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What a layer's sizes must be multiples of, so that Marlin takes it as it is, without padding."""

    rows: int
    columns: int
    source: str


LINEAR_TILE = Tile(
    64, 128, f"{MARLIN} verify_marlin_supports_shape"
)  # 0.29 would pad, versions before it refuse
UP_TILE = Tile(
    64, 128, f"{MARLIN} check_moe_marlin_supports_config"
)  # a hidden size of 128s, experts of 64s
DOWN_TILE = Tile(128, 64, f"{MARLIN} check_moe_marlin_supports_config")


@dataclass(frozen=True)
class Linear:
    """A layer that vLLM holds packed, one in each layer of its kind, and the projections on disk it is made of."""

    kind: str
    rows: dict[str, int]  # by projection; # stands for the number of an expert
    columns: int
    tile: Tile
    source: str

    def __str__(self):
        return f"{self.kind}-{'+'.join(self.rows)}"

    def instances(self):
        """Names of the projections of each such layer of the model."""
        for prefix in layer_prefixes(self.kind):
            for expert in range(128 if "#" in "".join(self.rows) else 1):
                yield [
                    f"{prefix}mixer.{projection.replace('#', str(expert))}"
                    for projection in self.rows
                ]


LINEARS = [
    Linear("M", {"in_proj": 10304}, 2688, LINEAR_TILE, f"{MAMBA} MambaMixer2.__init__"),
    Linear("M", {"out_proj": 2688}, 4096, LINEAR_TILE, f"{MAMBA} MambaMixer2.__init__"),
    Linear(
        "*",
        {"q_proj": 4096, "k_proj": 256, "v_proj": 256},
        2688,
        LINEAR_TILE,
        f"{NEMOTRON} NemotronHAttention.__init__",
    ),
    Linear("*", {"o_proj": 2688}, 4096, LINEAR_TILE, f"{NEMOTRON} NemotronHAttention.__init__"),
    Linear(
        "E",
        {"shared_experts.up_proj": 3712},
        2688,
        LINEAR_TILE,
        f"{NEMOTRON} NemotronHMLP.__init__",
    ),
    Linear(
        "E",
        {"shared_experts.down_proj": 2688},
        3712,
        LINEAR_TILE,
        f"{NEMOTRON} NemotronHMLP.__init__",
    ),
    # Not gated, so there is no gate_proj, and up_proj alone is vLLM's w13.
    Linear("E", {"experts.#.up_proj": 1856}, 2688, UP_TILE, f"{NEMOTRON} NemotronHMoE.__init__"),
    Linear(
        "E", {"experts.#.down_proj": 2688}, 1856, DOWN_TILE, f"{NEMOTRON} NemotronHMoE.__init__"
    ),
]


@dataclass(frozen=True)
class Part:
    """A tensor that each projection of a packed layer consists of."""

    suffix: str
    dtype: str
    shape: str  # of rows n and columns k in groups of g
    source: str

    def __str__(self):
        return self.suffix

    def expected(self, rows, columns, group_size):
        """Its dtype and shape for one projection."""
        shapes = {
            "(n, k/8)": (rows, columns // 8),
            "(n, k/g)": (rows, columns // group_size),
            "(2,)": (2,),
        }
        return self.dtype, shapes[self.shape]


# Experts are stored like other projections and turned when they are loaded: layers/fused_moe/routed_experts.py
PARTS = [
    Part("weight_packed", "I32", "(n, k/8)", f"{WNA16} CompressedTensorsWNA16.create_weights"),
    # Allocated in the model's dtype; another one's digits would be rounded off without a word.
    Part("weight_scale", "BF16", "(n, k/g)", f"{WNA16} CompressedTensorsWNA16.create_weights"),
    Part("weight_shape", "I64", "(2,)", f"{WNA16} CompressedTensorsWNA16.create_weights"),
]

FLOAT = "BF16, F16 or F32"  # vLLM casts it to what it computes in


@dataclass(frozen=True)
class Kept:
    """A tensor that vLLM has no packed form of, in each layer of its kind, or outside of all layers."""

    kind: str | None
    name: str
    shape: tuple[int, ...]
    source: str

    def __str__(self):
        return f"{self.kind or 'model'}-{self.name}"

    def names(self):
        """Its name in each layer."""
        return [prefix + self.name for prefix in (layer_prefixes(self.kind) if self.kind else [""])]


KEPT = [
    Kept(None, "backbone.embeddings.weight", (131072, 2688), f"{NEMOTRON} NemotronHModel.__init__"),
    Kept(None, "backbone.norm_f.weight", (2688,), f"{NEMOTRON} NemotronHModel.__init__"),
    Kept(None, "lm_head.weight", (131072, 2688), f"{NEMOTRON} NemotronHForCausalLM.__init__"),
    Kept("M", "norm.weight", (2688,), f"{NEMOTRON} NemotronHMambaDecoderLayer.__init__"),
    Kept("M", "mixer.A_log", (64,), f"{NEMOTRON} hf_to_vllm_mapper; {MAMBA} MambaMixer2.__init__"),
    Kept("M", "mixer.D", (64,), f"{MAMBA} MambaMixer2.__init__"),
    Kept("M", "mixer.dt_bias", (64,), f"{MAMBA} MambaMixer2.__init__"),
    Kept("M", "mixer.conv1d.weight", (6144, 1, 4), f"{MAMBA} MambaMixer2.__init__"),
    Kept("M", "mixer.conv1d.bias", (6144,), f"{MAMBA} MambaMixer2.__init__"),
    Kept("M", "mixer.norm.weight", (4096,), f"{MAMBA} Mixer2RMSNormGated.__init__"),
    Kept("*", "norm.weight", (2688,), f"{NEMOTRON} NemotronHAttentionDecoderLayer.__init__"),
    Kept("E", "norm.weight", (2688,), f"{NEMOTRON} NemotronHMoEDecoderLayer.__init__"),
    Kept("E", "mixer.gate.weight", (128, 2688), f"{NEMOTRON} NemotronHMoE.__init__"),
    Kept("E", "mixer.gate.e_score_correction_bias", (128,), f"{NEMOTRON} NemotronHMoE.__init__"),
]

# By these names vLLM asks `ignore` for all experts of a layer, which must get one answer. NemotronH has no gate_proj.
# (layers/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe.py get_moe_method)
EXPERTS_ASKED = ("experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj")


@dataclass(frozen=True)
class Setting:
    """A value of the config's quantization_config that vLLM reads."""

    path: str
    value: object
    source: str

    def __str__(self):
        return self.path


GROUP = "config_groups.group_0"
PARSED = f"{CT}/compressed_tensors.py CompressedTensorsConfig._quantization_scheme_map_from_config"
CHOSEN = f"{CT}/compressed_tensors.py CompressedTensorsConfig._is_wNa16_group_channel"
SETTINGS = [
    Setting(
        "quant_method",
        "compressed-tensors",
        f"{CT}/compressed_tensors.py CompressedTensorsConfig.get_name",
    ),
    Setting(
        "format",
        "pack-quantized",
        f"{CT}/compressed_tensors.py CompressedTensorsConfig._get_scheme_from_parts",
    ),
    Setting(
        f"{GROUP}.format",
        "pack-quantized",
        f"{CT}/compressed_tensors_moe/compressed_tensors_moe.py get_moe_method",
    ),
    # Experts are looked for as Linear, too. Targets that name projections would have to name a gate_proj.
    Setting(
        f"{GROUP}.targets",
        ["Linear"],
        f"{CT}/compressed_tensors.py _add_fused_moe_to_target_scheme_map",
    ),
    Setting(f"{GROUP}.input_activations", None, CHOSEN),
    Setting(f"{GROUP}.weights.num_bits", 4, f"{WNA16} WNA16_SUPPORTED_TYPES_MAP"),
    Setting(f"{GROUP}.weights.type", "int", PARSED),
    Setting(
        f"{GROUP}.weights.symmetric", True, f"{WNA16} CompressedTensorsWNA16.__init__"
    ),  # codes are then q + 8
    Setting(f"{GROUP}.weights.strategy", "group", CHOSEN),
    Setting(f"{GROUP}.weights.group_size", GROUP_SIZE, f"{WNA16} CompressedTensorsWNA16.__init__"),
    Setting(f"{GROUP}.weights.dynamic", False, CHOSEN),
    Setting(
        f"{GROUP}.weights.actorder", None, f"{WNA16} CompressedTensorsWNA16.__init__"
    ),  # else weight_g_idx is due
]
MARLIN_GROUP_SIZES = (
    32,
    64,
    128,
)  # layers/quantization/utils/marlin_utils.py MARLIN_SUPPORTED_GROUP_SIZES


def layer_prefixes(kind):
    """What the names of the tensors of each layer of a kind begin with."""
    return [f"backbone.layers.{number}." for number, letter in enumerate(KINDS) if letter == kind]


def sources():
    """Where the tables' rows were read: a file, and what it defines."""
    rows = [*LINEARS, *PARTS, *KEPT, *SETTINGS, LINEAR_TILE, UP_TILE, DOWN_TILE]
    return {source for row in rows for source in row.source.split("; ")}


def expected_tensors(group_size):
    """Dtype and shape of every tensor that vLLM takes from a folder, by its name there."""
    tensors = {name: (FLOAT, kept.shape) for kept in KEPT for name in kept.names()}
    for linear in LINEARS:
        for projections in linear.instances():
            for module, rows in zip(projections, linear.rows.values()):
                for part in PARTS:
                    tensors[f"{module}.{part}"] = part.expected(rows, linear.columns, group_size)
    return tensors


# --- what the program would write -------------------------------------------------------------------------------------


@dataclass(
    repr=False
)  # of 18,000 tensors. Assertions below are on small values for the same reason: pytest prints them
class Folder:
    """A folder as a reader sees it that looks at headers and JSON files only."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name
    holders: dict[str, str]  # file by tensor
    index: dict
    config: dict

    @property
    def quantization(self):
        """The quantization's description in config.json."""
        return self.config["quantization_config"]

    @property
    def group_size(self):
        """The group size that the description claims."""
        return self.quantization["config_groups"]["group_0"]["weights"]["group_size"]


def plan(source, group_size, *exclude):
    """What the program decides for a folder."""
    options = q.Options(
        format="compressed-tensors",
        group_size=group_size,
        exclude=list(exclude),
        quantize_embeddings=False,
        int8=[],
        scale="absmax",
        importance=None,
        restore=False,
        shard_size_gb=4.0,
    )
    with contextlib.closing(q.Checkpoint(source)) as checkpoint:
        return q.plan_conversion(checkpoint, options)


def read_plan(planned):
    """The folder that a plan leads to, read from the bytes of its files."""
    tensors, holders = {}, {}
    for shard in planned.shards:
        header = json.loads(shard.header[8:])
        del header["__metadata__"]
        assert tensors.keys().isdisjoint(header)
        tensors |= {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        holders |= dict.fromkeys(header, shard.name)
    config = planned.other_files["config.json"]
    return Folder(
        tensors,
        holders,
        json.loads(planned.other_files["model.safetensors.index.json"]),
        json.loads(config),
    )


@pytest.fixture(scope="module")
def planned(inventory):
    """The folder; tests must not change it."""
    return read_plan(plan(inventory, GROUP_SIZE))


@pytest.fixture
def folder(planned):
    """A folder to spoil."""
    index = {"weight_map": dict(planned.index["weight_map"])}
    return Folder(
        dict(planned.tensors), dict(planned.holders), index, copy.deepcopy(planned.config)
    )


# --- checks -----------------------------------------------------------------------------------------------------------


def check_part(folder, linear, part):
    """Every projection of a kind of layer has this tensor, in vLLM's dtype and shape."""
    tensors, group_size = folder.tensors, folder.group_size
    for projections in linear.instances():
        for module, rows in zip(projections, linear.rows.values()):
            expected, found = (
                part.expected(rows, linear.columns, group_size),
                tensors.get(f"{module}.{part}"),
            )
            assert found == expected, (f"{module}.{part}", part.source, linear.source)


def check_kept(folder, kept):
    """Every layer of a kind has this tensor, of any float dtype, in vLLM's shape."""
    for name in kept.names():
        dtype, shape = folder.tensors.get(name, ("missing", ()))
        assert (dtype in FLOAT.replace(",", "").split(), shape) == (True, kept.shape), (
            name,
            dtype,
            kept.source,
        )


def check_sizes(folder, linear):
    """Marlin takes each such layer unpadded: as vLLM fuses it, in whole tiles and whole groups of a size it has."""
    group_size = folder.group_size
    assert group_size in MARLIN_GROUP_SIZES
    for projections in linear.instances():
        words = [folder.tensors[f"{module}.weight_packed"][1] for module in projections]
        groups = {folder.tensors[f"{module}.weight_scale"][1][1] for module in projections}
        rows, columns = sum(shape[0] for shape in words), words[0][1] * 8
        assert rows % linear.tile.rows == 0, (projections, rows, linear.tile.source)
        assert columns % linear.tile.columns == 0, (projections, columns, linear.tile.source)
        assert groups == {columns / group_size}, (projections, columns, groups)


def check_names(folder):
    """No tensor is missing, which vLLM would not notice, and none is there that it does not know."""
    differences = sorted(folder.tensors.keys() ^ expected_tensors(folder.group_size).keys())
    assert not differences[:3]


def check_index(folder):
    """vLLM opens the files that the index names; model_loader/weight_utils.py filter_duplicate_safetensors_files."""
    differences = sorted(folder.index["weight_map"].items() ^ folder.holders.items())
    assert not differences[:3]
    # A folder with such a file goes to Mistral's loader: model_loader/default_loader.py _prepare_weights
    others = {file for file in folder.holders.values() if file.startswith("consolidated")}
    assert not others


def check_setting(folder, setting):
    """The config says this, where vLLM looks for it."""
    value = read_setting(folder.quantization, setting.path)
    assert value == setting.value, (setting.path, setting.source)


def read_setting(quantization, path):
    """The value at a dotted path."""
    for key in path.split("."):
        quantization = quantization[key]
    return quantization


def is_ignored(folder, name):
    """Whether the config keeps a layer that is asked for by this name: patterns match from its start, other entries
    are equal. (layers/quantization/compressed_tensors/utils.py _is_equal_or_regex_match)"""
    entries = folder.quantization["ignore"]
    return any(re.match(e[3:], name) if e.startswith("re:") else e == name for e in entries)


def vllm_module(module):
    """vLLM's name of a module: models/nemotron_h.py hf_to_vllm_mapper. It does not rename what `ignore` says."""
    return re.sub(r"^backbone\.", "model.", module)


def check_ignore(folder, linear):
    """Asked for each such layer by all the names that vLLM has for it, the config says what the files hold."""
    for projections in linear.instances():
        kept = [f"{module}.weight" in folder.tensors for module in projections]
        for module in names_asked(projections):
            ignored = is_ignored(folder, vllm_module(module))
            assert {ignored} == set(kept), (module, kept)


def names_asked(projections):
    """What vLLM asks `ignore` for to decide about a layer. (Fused q, k, v one by one: utils.py should_ignore_layer)"""
    mixer, _, expert = projections[0].partition(".experts.")
    if not expert:
        return projections
    return [f"{mixer}.{name}" for name in EXPERTS_ASKED]


def check_never_packed_are_ignored(folder):
    """Head and routers are kept by their names too, so that readers which ask the config, as transformers, agree."""
    for name in ["lm_head", *(f"{prefix}mixer.gate" for prefix in layer_prefixes("E"))]:
        ignored = is_ignored(folder, vllm_module(name))
        assert ignored, name


# --- claims -----------------------------------------------------------------------------------------------------------


def test_the_tables_count_as_the_model_does():
    """23 Mamba, 6 attention and 23 expert layers, of 6,243 tensors in all, 6,004 of them packed."""
    assert [KINDS.count(kind) for kind in "M*E"] == [23, 6, 23]
    projections = [
        module for linear in LINEARS for instance in linear.instances() for module in instance
    ]
    kept = [name for row in KEPT for name in row.names()]
    assert len(set(projections)) == len(projections) == 6004
    assert len(set(kept)) == len(kept) == 6243 - 6004
    assert sum(".experts." in module for module in projections) == 23 * 128 * 2


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("linear", LINEARS, ids=str)
def test_every_projection_has_the_tensors_vllm_allocates(planned, linear, part):
    check_part(planned, linear, part)


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_what_vllm_never_holds_packed_is_kept(planned, kept):
    check_kept(planned, kept)


@pytest.mark.parametrize("linear", LINEARS, ids=str)
def test_every_fused_layer_is_one_that_marlin_takes_without_padding(planned, linear):
    check_sizes(planned, linear)


def test_the_folder_holds_the_tensors_vllm_knows_and_no_other(planned):
    check_names(planned)


def test_the_index_names_the_file_of_every_tensor(planned):
    check_index(planned)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_config_says_what_vllm_reads(planned, setting):
    check_setting(planned, setting)


def test_the_rest_of_config_json_reaches_vllm_unchanged(planned, inventory):
    model = json.loads((inventory / "config.json").read_text())
    assert {
        key: value for key, value in planned.config.items() if key != "quantization_config"
    } == model


@pytest.mark.parametrize("linear", LINEARS, ids=str)
def test_vllm_is_told_of_every_layer_whether_it_is_packed(planned, linear):
    check_ignore(planned, linear)


def test_head_and_routers_are_ignored_by_name(planned):
    check_never_packed_are_ignored(planned)


@pytest.fixture(scope="module")
def partly_kept(inventory):
    """A folder in which one layer of every kind that can be kept alone is kept."""
    names = [
        "0.mixer.in_proj",
        "1.mixer.experts",
        "3.mixer.shared_experts.up_proj",
        "5.mixer.[qkv]_proj",
    ]
    return read_plan(plan(inventory, GROUP_SIZE, *(rf"layers\.{name}\." for name in names)))


@pytest.mark.parametrize("linear", LINEARS, ids=str)
def test_vllm_is_told_which_layers_the_user_kept(partly_kept, linear):
    """Other layers of the same kind stay packed, and so do layer 10 and up beside a layer 1 that is kept."""
    check_ignore(partly_kept, linear)
    check_never_packed_are_ignored(partly_kept)


def test_what_the_user_kept_is_there(partly_kept):
    kept = {name for name in partly_kept.tensors if name.endswith("_proj.weight")}
    assert len(kept) == 1 + 2 * 128 + 1 + 3


@pytest.mark.parametrize(
    ("group_size", "reason"), [(128, "--group_size 64 divides all"), (16, "Marlin")]
)
def test_group_sizes_that_vllm_refuses_are_refused(inventory, group_size, reason):
    """Experts of 1,856 columns are no whole groups of 128: CompressedTensorsWNA16MoEMethod.create_weights."""
    with pytest.raises(q.QuantizeError, match=reason):
        plan(inventory, group_size)


# --- the checks notice what is wrong ----------------------------------------------------------------------------------


def spoilt_entries(dtype, shape):
    """A tensor's header entry with another dtype, more rows, another last dimension; and no entry."""
    return [
        ("I8", shape),
        (dtype, (shape[0] + 1, *shape[1:])),
        (dtype, (*shape[:-1], shape[-1] // 2)),
        None,
    ]


def assert_each_is_noticed(folder, name, check, *row):
    """`check` passes, and fails for each way in which the tensor `name` could be wrong."""
    check(folder, *row)
    right = folder.tensors[name]
    for wrong in spoilt_entries(*right):
        folder.tensors[name] = wrong
        if wrong is None:
            del folder.tensors[name]
        with pytest.raises(AssertionError, match=re.escape(name)):
            check(folder, *row)
        folder.tensors[name] = right


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("linear", LINEARS, ids=str)
def test_a_wrong_tensor_of_the_last_layer_of_a_kind_is_noticed(folder, linear, part):
    *_, last = linear.instances()
    assert_each_is_noticed(folder, f"{last[-1]}.{part}", check_part, linear, part)


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_a_wrong_kept_tensor_is_noticed(folder, kept):
    assert_each_is_noticed(folder, kept.names()[-1], check_kept, kept)


def resize(folder, linear, rows=0, columns=0, groups=0):
    """Make the last layer of a kind larger by rows, columns or groups, in the headers."""
    *_, last = linear.instances()
    for suffix, more in (("weight_packed", columns // 8), ("weight_scale", groups)):
        dtype, shape = folder.tensors[f"{last[0]}.{suffix}"]
        folder.tensors[f"{last[0]}.{suffix}"] = dtype, (shape[0] + rows, shape[1] + more)


@pytest.mark.parametrize("linear", LINEARS, ids=str)
@pytest.mark.parametrize("part", ["rows", "columns", "groups"])
def test_a_size_that_marlin_pads_or_refuses_is_noticed(folder, linear, part):
    """Half a tile too many of rows or columns, though in whole groups, or one group too many."""
    change = {
        "rows": {"rows": linear.tile.rows // 2},
        "columns": {
            "columns": linear.tile.columns // 2,
            "groups": linear.tile.columns // 2 // folder.group_size,
        },
        "groups": {"groups": 1},
    }[part]
    resize(folder, linear, **change)
    with pytest.raises(AssertionError):
        check_sizes(folder, linear)


def test_a_group_size_that_marlin_lacks_is_noticed(folder):
    folder.quantization["config_groups"]["group_0"]["weights"]["group_size"] = 16
    with pytest.raises(AssertionError):
        check_sizes(folder, LINEARS[0])


@pytest.mark.parametrize(
    "name", ["backbone.layers.1.mixer.experts.128.up_proj.weight_packed", "lm_head.weight_scale"]
)
def test_a_tensor_too_many_is_noticed(folder, name):
    folder.tensors[name] = ("I32", (1856, 336))
    with pytest.raises(AssertionError, match=re.escape(name)):
        check_names(folder)


@pytest.mark.parametrize(
    "name", ["backbone.layers.51.mixer.experts.127.down_proj.weight_scale", "lm_head.weight"]
)
def test_a_tensor_too_few_is_noticed(folder, name):
    del folder.tensors[name]
    with pytest.raises(AssertionError, match=re.escape(name)):
        check_names(folder)


def test_a_tensor_in_another_file_than_the_index_says_is_noticed(folder):
    folder.holders["lm_head.weight"] = "model-00001.safetensors"
    with pytest.raises(AssertionError):
        check_index(folder)


def test_a_file_that_sends_vllm_to_another_loader_is_noticed(folder):
    folder.holders["lm_head.weight"] = folder.index["weight_map"]["lm_head.weight"] = (
        "consolidated.safetensors"
    )
    with pytest.raises(AssertionError):
        check_index(folder)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_wrong_setting_is_noticed(folder, setting):
    path, _, key = setting.path.rpartition(".")
    parent = read_setting(folder.quantization, path) if path else folder.quantization
    parent[key] = "another"
    with pytest.raises(AssertionError, match=re.escape(setting.path)):
        check_setting(folder, setting)


@pytest.mark.parametrize("linear", LINEARS, ids=str)
def test_a_packed_layer_that_is_ignored_is_noticed(folder, linear):
    """Named as vLLM names the first of the names it asks by, in the last layer of the kind."""
    *_, last = linear.instances()
    folder.quantization["ignore"].append(vllm_module(names_asked(last)[0]))
    with pytest.raises(AssertionError):
        check_ignore(folder, linear)


@pytest.mark.parametrize("linear", LINEARS, ids=str)
def test_a_kept_layer_that_is_not_ignored_is_noticed(folder, linear):
    *_, last = linear.instances()
    folder.tensors[f"{last[-1]}.weight"] = ("BF16", (1, 1))
    with pytest.raises(AssertionError):
        check_ignore(folder, linear)


@pytest.mark.parametrize("entry", ["lm_head", r"re:backbone\.layers\.\d+\.mixer\.gate$"])
def test_a_head_or_router_that_is_not_ignored_is_noticed(folder, entry):
    """Where the only entry is another one, or one by the checkpoint's name, which vLLM does not rename in patterns."""
    folder.quantization["ignore"] = [entry]
    with pytest.raises(AssertionError):
        check_never_packed_are_ignored(folder)
