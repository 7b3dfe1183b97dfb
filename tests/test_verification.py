"""Verification finds what is wrong with a folder, and nothing where all is well (README: "It checks").

Its bounds: a code inside the range must lie within half a scale of its weight, or 2.5 scales where error feedback moved
the weight. A code at an end of the range may be any distance away on its side, since a scale may clip weights: how many
lie more than 3 scales from what is decoded is printed, and is no fault.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil

import pytest
import torch
from checkpoints import WEIGHT, random, save_model
from conftest import AS_NOBODY, FORMATS, assert_refused, quantize, run_cli
from folders import edit_facts, edit_json, edit_metadata, edit_shard, overwrite_weights, read_header
from reference import pack_rows
from safetensors.torch import load_file, save_file

import quantize_int4 as q

WORDS = {"int4": "qweight", "compressed-tensors": "weight_packed", "gptq": "qweight"}
SCALES = {"int4": "scales", "compressed-tensors": "weight_scale", "gptq": "scales"}
EXPERT = "backbone.layers.1.mixer.experts.2.down_proj"


@pytest.fixture(scope="module", params=FORMATS)
def finished(request, tiny, tmp_path_factory):
    """A finished folder of each format."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    quantize(tiny, folder, "--format", request.param, "--group_size", 64, "--scale", "absmax")
    return request.param, folder


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy of it to damage."""
    form, folder = finished
    shutil.copytree(folder, tmp_path / "out")
    return form, tmp_path / "out"


def edit(folder, change):
    edit_shard(folder / "model-00001.safetensors", change)


def assert_found(tiny, folder, *fragments):
    result = run_cli(tiny, folder, "--verify")
    assert_refused(result, "verification of", "listed above: convert again into another folder")
    for fragment in ("WRONG: ", *fragments):
        assert fragment in result.stdout


# --- what it passes, prints and needs ---------------------------------------------------------------------------------


def test_a_finished_folder_verifies_alone(finished, tiny):
    _, folder = finished
    result = quantize(tiny, folder, "--verify")
    assert "verified, no problems found" in result.stdout
    assert "Done in" not in result.stdout


def test_verify_follows_a_conversion(tiny, tmp_path):
    stdout = quantize(tiny, tmp_path / "out", "--verify").stdout
    assert stdout.index("Done in") < stdout.index("verified, no problems found")


def test_verify_reads_a_group_size_and_padding_of_int4(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", "--group_size", 40, "--shard_size_gb", 3e-4, "--verify")


def test_a_source_whose_config_has_a_null_quantization_config_verifies(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "in")
    edit_json(
        tmp_path / "in" / "config.json", lambda config: config.update(quantization_config=None)
    )
    assert (
        "verified, no problems found"
        in quantize(tmp_path / "in", tmp_path / "out", "--verify").stdout
    )
    assert (
        "verified, no problems found"
        in quantize(tmp_path / "in", tmp_path / "out", "--verify").stdout
    )


def test_the_table_has_a_row_per_kind_and_the_five_worst_by_name(finished, tiny):
    form, folder = finished
    lines = quantize(tiny, folder, "--verify").stdout.splitlines()
    rows = {line[:24].strip(): line[24:].split() for line in lines}
    counts = {"experts": 16, "shared experts": 4, "attention": 4, "Mamba": 2}
    counts |= (
        {"head": 1, "routers": 2, "kept, bit for bit": 14}
        if form == "int4"
        else {"kept, bit for bit": 17}
    )
    for kind, count in counts.items():
        assert rows[kind][0] == str(count)
        if kind != "kept, bit for bit":
            low, middle, high = map(float, rows[kind][1:])
            assert 0.09 < low <= middle <= high < 0.13
    assert sum(line.startswith("  worst: 0.1") and ".weight" in line for line in lines) == 5


def test_the_guard_watches_over_verification_too(finished, tiny):
    assert_refused(
        run_cli(tiny, finished[1], "--verify", "--min_free_gb", 10**6), "--min_free_gb", exit_code=3
    )


def test_an_error_ends_the_verification_at_once(tiny, tmp_path):
    class Guard:
        looks = 0

        def check(self):
            self.looks += 1
            if self.looks > 3:
                raise q.QuantizeError("too little memory", 3)

        def read(self):
            return q.MemoryReading(0, 0)

    quantize(tiny, tmp_path / "out")
    with contextlib.closing(q.Checkpoint(tiny)) as checkpoint:
        plan = q.plan_conversion(checkpoint, q.Options(**q.read_facts(tmp_path / "out")["options"]))
        verification = q.Verification(checkpoint, plan, tmp_path / "out")
        with pytest.raises(q.QuantizeError, match="too little memory"):
            verification.run(1, q.Progress(Guard()))
    assert verification.account.tensors_done == 3


# --- weights and tensors ----------------------------------------------------------------------------------------------


def change_a_code(form):
    def change(tensors):
        tensors[f"{EXPERT}.{WORDS[form]}"].view(-1)[77] ^= 0x00500000

    return change


def change_a_scale(form):
    def change(tensors):
        tensors[f"{EXPERT}.{SCALES[form]}"].view(-1)[5] *= 1.25

    return change


def swap_experts(form):
    def change(tensors):
        for part in (WORDS[form], SCALES[form]):
            one, other = f"{EXPERT}.{part}", f"{EXPERT}.{part}".replace("experts.2", "experts.3")
            tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


@pytest.mark.parametrize("fault", [change_a_code, change_a_scale, swap_experts])
def test_a_wrong_weight_is_found_and_named(damaged, tiny, fault):
    form, folder = damaged
    edit(folder, fault(form))
    assert_found(tiny, folder, f"'{EXPERT}.weight': row ", "the source has")


def expert_weights(folder):
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.endswith("up_proj.weight"):
                yield name.removesuffix(".weight"), tensor


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.5])
def test_scales_of_mse_that_were_changed_are_found_though_the_codes_fit_them(
    tiny, tmp_path, factor
):
    quantize(tiny, tmp_path / "out", "--scale", "mse", "--group_size", 64)
    name, weight = next(iter(expert_weights(tiny)))

    def change(tensors):
        scales = tensors[f"{name}.scales"].mul_(factor).float().repeat_interleave(64, 1)
        codes = (weight.float() / scales).round().clamp(-8, 7).int()
        tensors[f"{name}.qweight"] = pack_rows(codes.tolist())

    edit(tmp_path / "out", change)
    assert_found(tiny, tmp_path / "out", f"'{name}.weight'")


@pytest.mark.parametrize(
    ("form", "part"),
    [("gptq", "qzeros"), ("gptq", "g_idx"), ("compressed-tensors", "weight_shape")],
)
def test_wrong_constants_are_found(tiny, tmp_path, form, part):
    quantize(tiny, tmp_path / "out", "--format", form, "--group_size", 64, "--scale", "absmax")
    edit(tmp_path / "out", lambda tensors: tensors[f"{EXPERT}.{part}"].view(-1)[-1].add_(1))
    assert_found(tiny, tmp_path / "out", f"{EXPERT}.{part}")


def test_a_kept_tensor_that_differs_in_one_bit_is_found(damaged, tiny):
    _, folder = damaged
    name = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    edit(folder, lambda tensors: tensors[name].view(torch.int32)[2].bitwise_xor_(1))
    assert_found(tiny, folder, f"'{name}'", f"{name}[2] differs from what the source gives")


def test_a_kept_tensor_in_another_dtype_is_found(damaged, tiny):
    _, folder = damaged
    name = "backbone.embeddings.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].half()}))
    assert_found(tiny, folder, f"'{name}'", "differ from what the source gives")


def test_a_lost_tensor_is_found(damaged, tiny):
    form, folder = damaged
    edit(folder, lambda tensors: tensors.pop(f"{EXPERT}.{SCALES[form]}"))
    assert_found(tiny, folder, f"'{EXPERT}.{SCALES[form]}'", "differ from what the source gives")


def test_a_tensor_too_many_is_found(damaged, tiny):
    _, folder = damaged
    edit(folder, lambda tensors: tensors.update({"stray": torch.ones(1)}))
    assert_found(tiny, folder, "'stray'", "differ from what the source gives")


def test_a_tensor_in_another_shard_is_found(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", "--shard_size_gb", 0.0005)
    one, other = sorted((tmp_path / "out").glob("*.safetensors"))[:2]
    kept = dict(itertools.islice(load_file(other).items(), 1))
    edit_shard(one, lambda tensors: tensors.update(kept))
    assert_found(tiny, tmp_path / "out", f"{one.name}: ", repr(next(iter(kept))))


def test_an_unreadable_shard_is_found(damaged, tiny):
    _, folder = damaged
    shard = folder / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_found(tiny, folder, "model-00001.safetensors: cannot be opened")


def test_a_shard_that_may_not_be_read_is_not_called_wrong(open_folder):
    source, folder = open_folder / "in", open_folder / "out"
    quantize(source, folder, "--shard_size_gb", 0.0005)
    shard = folder / "model-00002.safetensors"
    shard.chmod(0)
    result = run_cli(source, folder, "--verify", **AS_NOBODY)
    assert_refused(result, f"{shard}: Permission denied", f"chmod a+r {shard}")
    assert "WRONG" not in result.stdout
    again = run_cli(source, folder, "--shard_size_gb", 0.0005, **AS_NOBODY)
    assert_refused(again, f"{shard}: Permission denied")


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: bytes(len(data))])
def test_a_folder_whose_only_shard_lost_its_header_is_not_said_to_be_another_programs(
    model, tmp_path, damage
):
    quantize(model, tmp_path / "out")
    shard = tmp_path / "out" / "model-00001.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    result = run_cli(model, tmp_path / "out", "--verify")
    assert_refused(result, "model-00001.safetensors is not a whole safetensors file", "copy it")


# --- index, config and other files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["weight_map"].popitem(),
        lambda index: index["metadata"].update(total_size=12),
    ],
    ids=["map", "size"],
)
def test_a_wrong_index_is_found(damaged, tiny, change):
    _, folder = damaged
    edit_json(folder / "model.safetensors.index.json", change)
    assert_found(tiny, folder, "model.safetensors.index.json is not as it was written")


def test_a_wrong_true_shape_is_found(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    path = tmp_path / "out" / "quantize_config.json"
    edit_json(
        path, lambda config: config["padded_weights"].update({f"{EXPERT}.weight": [256, 191]})
    )
    assert_found(tiny, tmp_path / "out", "quantize_config.json is not as it was written")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_lost_or_changed_file_is_found(tiny, tmp_path, name):
    quantize(tiny, tmp_path / "out")
    (tmp_path / "out" / name).write_text("{}")
    assert_found(tiny, tmp_path / "out", f"{name} is not as it was written")
    (tmp_path / "out" / name).unlink()
    assert_found(tiny, tmp_path / "out", f"{name} is missing")


@pytest.mark.parametrize("change", ["changed", "added", "touched"])
def test_files_of_the_source_that_changed_since_are_not_blamed_on_the_folder(
    tiny, tmp_path, change
):
    shutil.copytree(tiny, tmp_path / "in")
    quantize(tmp_path / "in", tmp_path / "out")
    if (
        change == "touched"
    ):  # a time of fewer digits, which shortens the header that a run would write now
        for path in (tmp_path / "in").glob("*.safetensors"):
            os.utime(path, (3, 3))
    else:
        name = "tokenizer.json" if change == "changed" else "a_file_that_is_new.json"
        (tmp_path / "in" / name).write_text("{}")
    assert (
        "verified, no problems found"
        in quantize(tmp_path / "in", tmp_path / "out", "--verify").stdout
    )


# --- a folder made otherwise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [["--group_size", 128], ["--format", "int4"], ["--format", "gptq"]], ids=str
)
def test_a_finished_folder_of_another_layout_is_not_passed_off_as_what_was_asked_for(
    finished, tiny, options
):
    form, folder = finished
    if options == ["--format", form]:
        assert "verified, no problems found" in quantize(tiny, folder, "--verify", *options).stdout
    else:
        assert_refused(
            run_cli(tiny, folder, "--verify", *options),
            "was made differently: --",
            "verify it with",
        )


OTHER_OPTIONS = [
    ["--scale", "mse"],
    ["--exclude", "o_proj"],
    ["--quantize_embeddings"],
    ["--shard_size_gb", 0.0001],
]


@pytest.mark.parametrize("options", OTHER_OPTIONS, ids=str)
def test_a_finished_folder_of_other_options_is_not_passed_off_as_what_was_asked_for(
    tiny, tmp_path, options
):
    quantize(tiny, tmp_path / "plain")
    quantize(tiny, tmp_path / "asked", *options)
    refused = run_cli(tiny, tmp_path / "plain", "--verify", *options)
    assert_refused(refused, f"was made differently: {options[0]} was ", "verify it with")
    if "--scale" in options:
        refused = run_cli(tiny, tmp_path / "asked", "--verify", "--scale", "absmax")
        assert_refused(refused, "was made differently: --scale was mse, is absmax")
    assert (
        "verified, no problems found"
        in quantize(tiny, tmp_path / "asked", "--verify", *options).stdout
    )
    assert "verified, no problems found" in quantize(tiny, tmp_path / "asked", "--verify").stdout


def test_a_folder_whose_shards_do_not_say_how_they_were_made_is_refused(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    for shard in (tmp_path / "out").glob("*.safetensors"):
        save_file(load_file(shard), shard)
    assert_refused(
        run_cli(tiny, tmp_path / "out", "--verify"), "no shard in it says how it was made"
    )


def test_a_shard_without_its_marks_is_still_compared(tiny, tmp_path):
    """Another program may rewrite one; the others say how the folder was made."""
    quantize(tiny, tmp_path / "out", "--shard_size_gb", 0.0005)
    shard = tmp_path / "out" / "model-00002.safetensors"
    header, start = read_header(shard)
    del header["__metadata__"]
    text, tensors = json.dumps(header).encode(), shard.read_bytes()[start:]
    shard.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
    assert "verified, no problems found" in quantize(tiny, tmp_path / "out", "--verify").stdout
    shard.write_bytes(
        len(text).to_bytes(8, "little") + text + tensors[:-1] + bytes([tensors[-1] ^ 1])
    )
    assert_refused(run_cli(tiny, tmp_path / "out", "--verify"), "found 1 problem")


def misspell(key):
    def change(metadata):
        metadata[key.replace("i", "j")] = metadata.pop(key)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.update(format="pu"),
        misspell("quantize_int4_files"),
        misspell("quantize_int4"),
    ],
    ids=["format", "files", "fingerprint"],
)
def test_damaged_marks_of_a_shard_are_found(model, tmp_path, change):
    quantize(model, tmp_path / "out")
    edit_metadata(tmp_path / "out", change)
    assert_found(model, tmp_path / "out", "model-00001.safetensors: what it says of its format")


FACTS_AT_FAULT = {
    "an older version": (
        lambda facts: (facts.pop("program"), facts.update(version=6)),
        "made by quantize_int4.py 1.0.0 (format 6), this is 1.1.0 (format 9)",
    ),
    "a newer version": (
        lambda facts: facts.update(version=99, program="7.5.0"),
        "made by quantize_int4.py 7.5.0 (format 99), this is 1.1.0",
    ),
    "of which nothing is known": (
        lambda facts: (facts.clear(), facts.update(version=7)),
        "made by quantize_int4.py 1.0.0 (format 7)",
    ),
    "a program that has no name": (
        lambda facts: facts.update(version=99, program=[7]),
        "damaged",
    ),
    "no version": (lambda facts: facts.pop("version"), "damaged"),
    "a version that is no number": (lambda facts: facts.update(version=[9]), "damaged"),
    "an option more": (lambda facts: facts["options"].update(colour="red"), "damaged"),
    "an option less": (lambda facts: facts["options"].pop("scale"), "damaged"),
    "no options": (lambda facts: facts.update(options=None), "damaged"),
    "no such format": (lambda facts: facts["options"].update(format="int3"), "damaged"),
    "a format that is none": (lambda facts: facts["options"].update(format=["int4"]), "damaged"),
    "a group of 12": (lambda facts: facts["options"].update(group_size=12), "damaged"),
    "a group of true": (lambda facts: facts["options"].update(group_size=True), "damaged"),
    "a broken pattern": (lambda facts: facts["options"].update(exclude=["("]), "damaged"),
    "a pattern that is none": (lambda facts: facts["options"].update(int8=[5]), "damaged"),
    "sources without times": (lambda facts: facts["sources"].update(x=5), "damaged"),
    "no dtypes": (lambda facts: facts.pop("dtypes"), "damaged"),
    "an unknown dtype": (lambda facts: facts["dtypes"].update(most="F4"), "damaged"),
    "dtypes without names": (lambda facts: facts["dtypes"].update(others={"F32": [5]}), "damaged"),
    "a field more": (lambda facts: facts.update(colour="red"), "damaged"),
}


@pytest.mark.parametrize("case", FACTS_AT_FAULT)
def test_a_folder_of_another_version_or_with_damaged_facts_is_refused_with_what_to_do(
    tmp_path, case
):
    source = save_model(tmp_path / "in", WEIGHT)
    quantize(source, tmp_path / "out")
    change, problem = FACTS_AT_FAULT[case]
    edit_facts(tmp_path / "out", change)
    remedy = "copy the folder again"
    if problem != "damaged":
        program = problem.removeprefix("made by quantize_int4.py ").partition(" ")[0]
        remedy = f"use version {program}, or"
    for runs in (
        [source, tmp_path / "out", "--verify"],
        [tmp_path / "out", tmp_path / "back", "--restore"],
    ):
        assert_refused(run_cli(*runs), "model-00001.safetensors", problem, remedy, "convert again")
    assert_refused(run_cli(source, tmp_path / "out", "--group_size", 64), problem, "--overwrite")
    quantize(source, tmp_path / "out", "--group_size", 64, "--overwrite")


def test_a_folder_of_the_same_format_is_read_whatever_program_it_names(tmp_path):
    source = save_model(tmp_path / "in", WEIGHT)
    quantize(source, tmp_path / "out")
    for change in (lambda facts: facts.update(program="9.9.9"), lambda facts: facts.pop("program")):
        edit_facts(tmp_path / "out", change)
        assert "no problems found" in quantize(source, tmp_path / "out", "--verify").stdout
        quantize(tmp_path / "out", tmp_path / "back", "--restore", "--overwrite")


def test_dtypes_of_the_source_that_a_shard_names_wrongly_are_found(model, tmp_path):
    quantize(model, tmp_path / "out")
    edit_facts(tmp_path / "out", lambda facts: facts["dtypes"].update(most="F16"))
    assert_found(model, tmp_path / "out", "the dtypes to which --restore would go back are not")


def test_shards_of_two_runs_are_not_taken_for_one_folder(tmp_path):
    source = save_model(tmp_path / "in", {f"m.{i}.weight": random(8, 128) for i in range(2)})
    quantize(source, tmp_path / "out", "--shard_size_gb", 0.000002)
    quantize(source, tmp_path / "other", "--shard_size_gb", 0.000002, "--scale", "mse")
    shutil.copy(tmp_path / "other" / "model-00002.safetensors", tmp_path / "out")
    for runs in (
        [source, tmp_path / "out", "--verify"],
        [tmp_path / "out", tmp_path / "back", "--restore"],
    ):
        assert_refused(run_cli(*runs), "'model-00001.safetensors', 'model-00002", "different runs")


def test_a_restored_folder_is_neither_verified_nor_restored_again(tmp_path):
    source = save_model(tmp_path / "in", WEIGHT)
    quantize(source, tmp_path / "out")
    quantize(tmp_path / "out", tmp_path / "back", "--restore")
    assert_refused(run_cli(source, tmp_path / "back", "--verify"), "holds a restored checkpoint")
    again = run_cli(tmp_path / "back", tmp_path / "again", "--restore")
    assert_refused(again, "is restored already")


@pytest.mark.parametrize("text", ["5", "[]", "{", '{"config.json": 5}'])
def test_damaged_names_of_other_files_are_found_and_no_unexpected_error(tmp_path, text):
    source = save_model(tmp_path / "in", WEIGHT)
    quantize(source, tmp_path / "out")
    edit_metadata(tmp_path / "out", lambda metadata: metadata.update(quantize_int4_files=text))
    assert_found(source, tmp_path / "out", "model-00001.safetensors: what it says of its format")
    assert "unexpected" not in run_cli(source, tmp_path / "out").stderr


def test_a_source_of_other_files_ends_the_verification_before_it_begins(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    other = save_model(tmp_path / "other", {"m.weight": torch.ones(4, 128).bfloat16()})
    result = run_cli(other, tmp_path / "out", "--verify")
    assert_refused(
        result,
        "was made differently",
        "'model-00001-of-00002.safetensors'",
        "verify it with the checkpoint",
    )
    assert "overwrite" not in result.stderr
    assert "WRONG" not in result.stdout


def test_another_source_of_the_same_sizes_is_found_and_not_blamed_on_the_folder(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    shard = next(other.glob("*.safetensors"))
    name = next(name for name in load_file(shard) if name.endswith("up_proj.weight"))
    overwrite_weights(shard, name, b"\x12\x34" * 1000)
    result = run_cli(other, tmp_path / "out", "--verify")
    assert_refused(
        result,
        "found 1 problem, listed above",
        "where file times have changed since, convert again",
    )
    assert f"WRONG:     '{name}'" in result.stdout
    assert result.stdout.count(name) == 1


def test_a_missing_shard_is_a_problem_among_others(tmp_path):
    save_model(tmp_path / "two", {f"m.{i}.weight": torch.ones(8, 128).bfloat16() for i in range(2)})
    quantize(tmp_path / "two", tmp_path / "out", "--shard_size_gb", 0.000002)
    (tmp_path / "out" / "model-00002.safetensors").unlink()
    assert_found(tmp_path / "two", tmp_path / "out", "model-00002.safetensors: cannot be opened")


def test_weights_too_small_for_a_scale_of_float16_are_checked_without_the_statistics_too(tmp_path):
    small = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).mul(5e-5).bfloat16()
    source = save_model(tmp_path / "in", {"m.0.up_proj.weight": small})
    save_file({"m.0.up_proj": torch.rand(256) + 0.1}, tmp_path / "statistics.safetensors")
    quantize(
        source,
        tmp_path / "out",
        "--scale",
        "mse",
        "--importance",
        tmp_path / "statistics.safetensors",
    )
    assert "verified, no problems found" in quantize(source, tmp_path / "out", "--verify").stdout
    edit(tmp_path / "out", lambda tensors: tensors["m.0.up_proj.qweight"].bitwise_not_())
    assert_found(source, tmp_path / "out", "too far for a scale of")


def test_weights_whose_squares_overflow_are_verified(tmp_path):
    source = save_model(tmp_path / "in", {"m.0.up_proj.weight": torch.randn(8, 128) * 1e20})
    quantize(source, tmp_path / "out", "--format", "compressed-tensors")
    assert "verified, no problems found" in quantize(source, tmp_path / "out", "--verify").stdout


# --- what the system does ---------------------------------------------------------------------------------------------


def test_a_system_that_reads_less_at_a_time_is_asked_again(tmp_path, monkeypatch):
    (tmp_path / "model-00001.safetensors").write_bytes(bytes(range(100)))
    plan = q.ShardPlan("model-00001.safetensors", b"", 100)
    shard = q.ShardFile(tmp_path, plan, "", finished=True)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: read(fd, [parts[0][:7]], at))
    buffer = memoryview(bytearray(90))
    shard.read(buffer, 5)
    assert buffer == bytes(range(5, 95))
    with pytest.raises(q.QuantizeError, match=r"model-00001\.safetensors was cut off while it was"):
        shard.read(buffer, 20)
    shard.close()


# --- errors that are not usual ----------------------------------------------------------------------------------------


def outliers():
    """A weight with one large number a row, beside which most others are rounded to zero."""
    weight = random(64, 256)
    weight[:, ::64] = 12
    return weight


def found_unusual(result):
    text = " ".join(result.stdout.split())
    return re.search(r"(unusual|usual): errors are up to (.*?) in groups of \d+.*?; (.*?) /", text)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (["--scale", "mse", "--group_size", 64], "0.135"),
        (["--scale", "absmax", "--group_size", 64], "0.162"),
        (["--scale", "absmax", "--group_size", 128], "0.176"),
    ],
)
def test_errors_that_are_usual_are_said_to_be_so_and_others_are_named(tmp_path, options, limit):
    usual = {f"layers.{number}.up.weight": random(64, 256) for number in range(2)}
    source = save_model(tmp_path / "in", usual)
    found = found_unusual(quantize(source, tmp_path / "out", *options, "--verify"))
    assert found.groups() == ("usual", limit, "no weight has more")

    source = save_model(tmp_path / "odd", usual | {"layers.2.up.weight": outliers()})
    found = found_unusual(quantize(source, tmp_path / "odd_out", *options, "--verify"))
    assert found.groups() == ("unusual", limit, "1 weight has more: 'layers.2.up.weight'")


def test_8_bits_have_usual_errors_of_their_own_and_other_groups_none(tmp_path):
    weights = {"layers.0.up.weight": random(64, 256), "layers.1.up.weight": random(64, 256)}
    source = save_model(tmp_path / "in", weights)
    options = ["--format", "compressed-tensors", "--int8", r"layers\.1", "--verify"]
    text = quantize(source, tmp_path / "out", *options).stdout
    assert "errors are up to 0.145 in groups of 128 and 0.00945 in 8 bits" in " ".join(text.split())
    options = ["--group_size", 8, "--verify"]
    assert "errors are up to" not in quantize(source, tmp_path / "eights", *options).stdout


def test_a_weight_of_zeros_has_no_error_whatever_its_outputs_are_said_to_be():
    assert q.Measured().relative_errors(None) == [0, 0]
    assert q.Measured().relative_errors(2.0) == [0, 0]
