"""Checkpoint: its folder, files, index and config, and what is none (README: "It reads what you have")."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from checkpoints import WEIGHT, layers, random, save_model, save_pickle, write_checkpoint
from conftest import AS_NOBODY, assert_refused, quantize, refuse, run_cli
from folders import assert_same_tensors, folder_bytes, read_tensors
from safetensors.torch import save_file

# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_missing_input_folder_is_refused(tmp_path):
    refuse(tmp_path / "nowhere", tmp_path / "out", "nowhere", "no such folder")


def test_a_model_of_the_hub_is_answered_with_the_command_that_gets_it(tmp_path):
    result = run_cli("nvidia/Some-Model-4B", tmp_path / "out")
    assert_refused(
        result,
        "hf download nvidia/Some-Model-4B --local-dir Some-Model-4B, then give Some-Model-4B",
    )


def hub_cache(root, model, *revisions, main=""):
    """Lay out a model as the hub's cache does: `revisions` of links to one file of weights."""
    cached = root / "models--a--b"
    (cached / "blobs").mkdir(parents=True)
    for number, path in enumerate(model.iterdir()):
        blob = cached / "blobs" / f"{number:040}"
        shutil.copy(path, blob)
        for revision in revisions:
            (cached / "snapshots" / revision).mkdir(parents=True, exist_ok=True)
            (cached / "snapshots" / revision / path.name).symlink_to(blob)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(main or revisions[0])
    return cached


def test_a_root_of_the_hubs_cache_is_answered_with_the_snapshot_inside(model, tmp_path):
    cached = hub_cache(tmp_path / "hub", model, "aaa", "bbb", "ccc", main="bbb")
    snapshot = cached / "snapshots" / "bbb"
    inside = [cached / name for name in ("snapshots", "blobs", "refs")]
    for folder in (cached, cached.parent, *inside):
        refuse(folder, tmp_path / "out", f"inside it, {snapshot} (of 3 snapshots there)")
    (tmp_path / "weights").mkdir()
    shutil.copy(model / "model.safetensors", tmp_path / "weights")
    config_dir = ["--config_dir", cached]
    refuse(tmp_path / "weights", tmp_path / "out", f"inside it, {snapshot}", options=config_dir)
    quantize(snapshot, tmp_path / "out")


def test_so_is_the_folder_of_the_cache_and_a_data_set_has_no_model(model, tmp_path):
    cached = hub_cache(tmp_path / "home" / "hub", model, "aaa")
    refuse(tmp_path / "home", tmp_path / "out", f"inside it, {cached / 'snapshots' / 'aaa'}")
    cached.rename(cached.with_name("datasets--a--b"))
    refuse(cached.with_name("datasets--a--b"), tmp_path / "out", "no *.safetensors")


def test_weights_in_a_folder_inside_are_pointed_out(model, tmp_path):
    shutil.copytree(model, tmp_path / "outer" / "checkpoint-100")
    inside = tmp_path / "outer" / "checkpoint-100"
    refuse(tmp_path / "outer", tmp_path / "out", f"but some in {inside}: give that folder")
    shutil.copytree(model, tmp_path / "outer" / "checkpoint-20")
    names = "but some in its folders 'checkpoint-20', 'checkpoint-100': give the one"
    refuse(tmp_path / "outer", tmp_path / "out", names)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 63160000000\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.model", "model.safetensors.index.json"]
)
def test_a_git_lfs_pointer_is_answered_with_the_command_that_gets_the_file(model, tmp_path, name):
    (model / name).write_text(LFS_POINTER)
    command = f"{model / name}: is a Git LFS pointer and not the file itself: run git lfs pull in"
    refuse(model, tmp_path / "out", command)


def test_a_pickle_that_is_a_git_lfs_pointer_is_answered_so_too(tmp_path):
    folder = save_pickle(tmp_path / "in", {})
    (folder / "pytorch_model.bin").write_text(LFS_POINTER)
    refuse(folder, tmp_path / "out", "pytorch_model.bin: is a Git LFS pointer")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_so_is_a_pointer_of_xet(model, tmp_path, name):
    (model / name).write_text("# xet version 0\nfilesize = 63160000000\nhash = '4d7a'\n")
    refuse(model, tmp_path / "out", f"{model / name}: is a Xet pointer and not the file itself")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_is_being_downloaded_is_refused(model, tmp_path, name):
    """aria2 gives a file its full size at once: what is not there yet would be read as zeros."""
    (model / "tokenizer.json").write_text("{}")
    (model / f"{name}.aria2").touch()
    refuse(model, tmp_path / "out", f"{model / name}: its download is not finished", "again")


def test_what_a_download_left_is_not_copied(model, tmp_path):
    for name in ("other.json.aria2", "vocab.json.incomplete", "vocab.json.part"):
        (model / name).touch()
    quantize(model, tmp_path / "out")
    left = [path.suffix for path in (tmp_path / "out").iterdir()]
    assert not {".aria2", ".incomplete", ".part"} & {*left}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_to_what_is_missing_is_called_so(model, tmp_path, name):
    (model / name).unlink()
    (model / name).symlink_to("../blobs/0123")
    refuse(model, tmp_path / "out", f"{model / name}", "a link to ../blobs/0123, which is missing")


OTHERS_WEIGHTS = {  # what is there, and words of the answer
    "model.Q4_K_M.gguf": "GGUF is quantized already",
    "onnx": "ONNX is an export, give the checkpoint",
    "model.onnx": "ONNX is an export, give the checkpoint",
    "tf_model.h5": "save them with transformers' save_pretrained",
    "flax_model.msgpack": "save them with transformers' save_pretrained",
    "model.nemo": "export it to Hugging Face's format",
    "iter_0000010": "Megatron's, export it",
    "global_step10": "run its zero_to_fp32.py",
    "__0_0.distcp": "accelerate merge-weights",
    "optimizer.pt": "training state alone, give the folder where the model was saved",
    "training_args.bin": "training state alone, give the folder where the model was saved",
    "optimizer.safetensors": "training state alone, give the folder where the model was saved",
    "config.json": "copy or download the weights, too",
}


@pytest.mark.parametrize("name", OTHERS_WEIGHTS)
def test_a_folder_of_other_weights_is_answered_with_what_helps(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text("{}")
    refuse(tmp_path / "in", tmp_path / "out", "no *.safetensors", OTHERS_WEIGHTS[name])


def test_training_state_beside_what_may_be_the_model_does_not_hide_it(model, tmp_path):
    outer = tmp_path / "outer"
    (outer / "checkpoint-1").mkdir(parents=True)
    (outer / "trainer_state.json").write_text("{}")
    save_file({"m.weight": torch.ones(8)}, outer / "checkpoint-1" / "optimizer.safetensors")
    refuse(outer, tmp_path / "out", "training state alone")
    shutil.copytree(model, outer / "checkpoint-20")
    refuse(outer, tmp_path / "out", f"but some in {outer / 'checkpoint-20'}: give that folder")
    shutil.rmtree(outer / "checkpoint-20")
    (outer / "model.ckpt").touch()
    refuse(outer, tmp_path / "out", "if 'model.ckpt' is the model's state dict")


def test_an_optimizer_beside_the_weights_is_no_second_set_of_them(model, tmp_path):
    save_file({"m.weight": torch.ones(8)}, model / "optimizer.safetensors")
    plan = quantize(model, tmp_path / "out").stdout
    assert "optimizer.safetensors (training state)" in plan


def test_folders_of_sentence_transformers_are_to_be_copied_which_a_warning_says(model, tmp_path):
    parts = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}]
    (model / "modules.json").write_text(json.dumps(parts))
    (model / "1_Pooling").mkdir()
    options = ["--format", "compressed-tensors"]
    plan = quantize(model, tmp_path / "out", *options).stdout
    warning = (
        "modules.json names folders, and folders are not copied: copy '1_Pooling' into the out"
    )
    assert f"WARNING:   {warning}" in plan
    shutil.copytree(model / "1_Pooling", tmp_path / "out" / "1_Pooling")
    quantize(model, tmp_path / "out", *options, "--verify")


def test_a_file_as_input_folder_is_refused(model, tmp_path):
    refuse(model / "model.safetensors", tmp_path / "out", "is a file")


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    refuse(tmp_path / "in", tmp_path / "out", "no *.safetensors")


def test_files_without_a_tensor_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({}, tmp_path / "in" / "model.safetensors")
    refuse(tmp_path / "in", tmp_path / "out", "'model.safetensors' hold no tensors")


def test_a_lora_adapter_alone_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_file(WEIGHT, tmp_path / "in" / "adapter_model.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text("{}")
    refuse(tmp_path / "in", tmp_path / "out", "LoRA adapter", "merge")


def test_a_pipe_among_the_files_does_not_hang_the_run(model, tmp_path):
    os.mkfifo(model / "vocab.json")
    assert "vocab.json (not a regular file)" in quantize(model, tmp_path / "out").stdout
    os.mkfifo(tmp_path / "out" / "pipe")
    assert_refused(run_cli(model, tmp_path / "out"), "'pipe', not written by this program")
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    assert_refused(run_cli(model, tmp_path / "other"), "model.safetensors is not a regular one")


def test_an_unreadable_file_is_an_error_that_names_it(open_folder):
    shard = open_folder / "in" / "model-00002-of-00002.safetensors"
    os.chmod(shard, 0)
    assert_refused(
        run_cli(open_folder / "in", open_folder / "out", **AS_NOBODY),
        shard.name,
        "Permission denied",
    )
    assert not (open_folder / "out").exists()


def test_an_unreadable_file_beside_the_weights_is_refused_before_the_run(open_folder):
    os.chmod(open_folder / "in" / "tokenizer.json", 0)
    assert_refused(
        run_cli(open_folder / "in", open_folder / "out", **AS_NOBODY),
        "tokenizer.json",
        "chmod a+r",
    )
    assert not (open_folder / "out").exists()


DENIED = {  # what is closed to others, and the chmod that mends it
    "one shard": (["model-00002-of-00002.safetensors"], "a+r {}/model-00002-of-00002.safetensors"),
    "all shards": (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        "a+r {}/*.safetensors",
    ),
    "config.json": (["config.json"], "a+r {}/config.json"),
    "a copied file": (["chat_template.jinja"], "a+r {}/chat_template.jinja"),
    "the folder": ([""], "a+rx {}"),
}


# Whoever is not root cannot run the command as another user.
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@AS_ROOT
@pytest.mark.parametrize("case", DENIED)
def test_what_another_user_may_not_read_is_answered_with_the_chmod_that_mends_it(open_folder, case):
    names, remedy = DENIED[case]
    source = open_folder / "in"
    for name in names:
        os.chmod(source / name, 0o600)
    (open_folder / "out").mkdir()
    os.chmod(open_folder / "out", 0o777)
    result = run_cli(source, open_folder / "out", **AS_NOBODY)
    remedy = "chmod " + remedy.format(source)
    assert_refused(
        result, "Permission denied", "belongs to", "mode 0600", "this process is", remedy
    )
    command = re.search(r"chmod [^,\n]+", result.stderr)[0]
    subprocess.run(command.split(":")[0], shell=True, check=True)
    assert run_cli(source, open_folder / "out", **AS_NOBODY).returncode == 0


@AS_ROOT
def test_a_closed_folder_above_is_named_with_the_chmod_that_mends_it(open_folder):
    os.chmod(open_folder, 0o700)
    result = run_cli(open_folder / "in", "/nowhere/out", **AS_NOBODY)
    assert_refused(result, f"folder {open_folder} belongs to", f"chmod a+x {open_folder}")


@AS_ROOT
def test_statistics_that_another_user_may_not_read_are_answered_so_too(open_folder):
    path = open_folder / "statistics.safetensors"
    save_file({"x": torch.ones(1)}, path)
    os.chmod(path, 0o600)
    options = ["--scale", "mse", "--importance", path]
    result = run_cli(open_folder / "in", open_folder / "out", *options, **AS_NOBODY)
    assert_refused(result, "statistics.safetensors: Permission denied", f"chmod a+r {path}")


@pytest.mark.parametrize(
    "name", ["../../escape.weight", "/etc/passwd.weight", "a/b.weight", "..", "m\n\x1b.weight"]
)
def test_a_tensor_name_with_path_characters_is_only_a_name(tmp_path, name):
    source = save_model(
        tmp_path / "deep" / "in", {name: torch.ones(8, 128), "other.weight": torch.ones(8, 128)}
    )
    result = quantize(source, tmp_path / "deep" / "out", "--exclude", "^(?!other)")
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"in", "out"}
    assert read_tensors(tmp_path / "deep" / "out").keys() == {name, "other.qweight", "other.scales"}
    assert "\x1b" not in result.stdout


# --- files and index --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["single file", "several files without index", "indexed"])
def test_all_safetensors_layouts_give_the_same_tensors(tiny, tmp_path, layout):
    tensors, folder = read_tensors(tiny), tmp_path / "in"
    if layout == "single file":
        save_model(folder, tensors)
    else:
        write_checkpoint(folder, tensors, shards=3)
        if layout != "indexed":
            (folder / "model.safetensors.index.json").unlink()
    quantize(folder, tmp_path / "out")
    quantize(tiny, tmp_path / "expected")
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


def test_a_hub_cache_snapshot_of_links_is_read_and_copied_through(tiny, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in tiny.iterdir():
        (snapshot / path.name).symlink_to(path)
    quantize(snapshot, tmp_path / "out")
    quantize(tiny, tmp_path / "direct")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "direct")


def indexed(tmp_path, weight_map):
    folder = save_model(tmp_path / "in", WEIGHT)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    folder = indexed(tmp_path, {"m.weight": "model-00002-of-00002.safetensors"})
    refuse(folder, tmp_path / "out", "model-00002-of-00002.safetensors", "missing")


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        (
            "model-00001-of-000002.safetensors",
            "model-00002-of-000002.safetensors",
        ),  # as DeepSeek-V3's
        ("pytorch_model-00002-of-00002.bin", "pytorch_model-00001-of-00002.bin"),
    ],
)
def test_a_missing_part_is_refused_without_an_index_too(tmp_path, there, missing):
    folder = tmp_path / "in"
    folder.mkdir()
    (torch.save if there.endswith(".bin") else save_file)(
        {"m.weight": torch.ones(8, 128)}, folder / there
    )
    refuse(folder, tmp_path / "out", repr(missing), "missing", "copy it again")


def test_a_tensor_missing_from_its_shard_is_refused(tmp_path):
    folder = indexed(tmp_path, {"m.weight": "model.safetensors", "n.weight": "model.safetensors"})
    refuse(folder, tmp_path / "out", "'n.weight'", "model.safetensors", "which lacks it")


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""]
)
def test_an_index_that_points_outside_the_folder_is_refused(tmp_path, file):
    refuse(
        indexed(tmp_path, {"m.weight": file}),
        tmp_path / "out",
        repr(file),
        "no file of this folder",
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\xff"]
)
def test_a_broken_index_is_refused(model, tmp_path, text):
    (model / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    refuse(model, tmp_path / "out", "model.safetensors.index.json")


def write_index(folder, names, file):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, file)})
    )


@pytest.mark.parametrize("saved", [save_model, save_pickle], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("complete", [True, False])
def test_an_index_of_missing_shards_beside_whole_weights_may_be_stale(tmp_path, complete, saved):
    source = saved(tmp_path / "in", layers(0, 1))
    names = list(layers(0, 1) if complete else layers(0, 1, 2))
    write_index(source, names, "model-00001-of-00002.safetensors")
    result = run_cli(source, tmp_path / "out")
    assert_refused(result, "model-00001-of-00002.safetensors", "missing")
    assert ("may be stale" in result.stderr) == complete
    if complete:  # follow the advice
        (source / "model.safetensors.index.json").unlink()
        quantize(source, tmp_path / "out")


def test_a_tensor_in_two_files_without_an_index_is_refused(model, tmp_path):
    (model / "model.safetensors").rename(model / "one.safetensors")
    save_file(WEIGHT, model / "other.safetensors")
    refuse(model, tmp_path / "out", "'m.weight'", "other.safetensors", "one.safetensors")


@pytest.mark.parametrize("other", ["model-00001-of-00001.safetensors", "ema.safetensors"])
def test_two_sets_of_weights_without_an_index_are_refused(tmp_path, other):
    source = save_model(tmp_path / "in", layers(0))
    save_file(layers(1), source / other)
    assert_refused(
        run_cli(source, tmp_path / "out"),
        "model.safetensors",
        other.replace("00001-", "*-"),
        "two sets",
    )


def test_consolidated_weights_beside_shards_are_left_out_by_name(tmp_path):
    source = save_model(tmp_path / "in", layers(0, 1))
    save_file(
        {"layers.0.attention.wq.weight": random(64, 128)},
        source / "consolidated-00001-of-00001.safetensors",
    )
    plan = quantize(source, tmp_path / "out").stdout
    assert re.search(r"^Left out: .*consolidated-00001-of-00001.safetensors", plan, re.MULTILINE)
    assert not any("wq" in name for name in read_tensors(tmp_path / "out"))


def test_consolidated_weights_alone_are_the_model(tmp_path):
    source = save_model(tmp_path / "in", layers(0))
    (source / "model.safetensors").rename(source / "consolidated.safetensors")
    quantize(source, tmp_path / "out")


# --- what is quantized already ----------------------------------------------------------------------------------------


def test_a_plain_parameter_with_the_name_of_a_packed_one_is_copied(tmp_path):
    plain = {f"m.{name}": random(4, 128) for name in ("W_q", "q_weight", "trellis", "weight_data")}
    source = save_model(tmp_path / "in", WEIGHT | plain)
    quantize(source, tmp_path / "out", "--verify")
    assert read_tensors(tmp_path / "out").keys() >= plain.keys()


@pytest.mark.parametrize(
    "tensors",
    [
        {"m.qweight": torch.ones(4, 16, dtype=torch.int32)},
        {"m.weight": torch.ones(4, 128, dtype=torch.int8)},
        {"m.weight": torch.ones(4, 128).to(torch.float8_e4m3fn)},
        {"m.weight": torch.ones(4, 128), "m.weight_scale_inv": torch.ones(1, 1)},
        {"m.W_q": torch.ones(4, 128, dtype=torch.uint8), "n.weight": torch.ones(4, 128)},
        {"m.weight._data": torch.ones(4, 128, dtype=torch.int8), "n.weight": torch.ones(4, 128)},
        {"m.q_weight": torch.ones(4, 16, dtype=torch.int32), "n.weight": torch.ones(4, 128)},
    ],
    ids=["qweight", "int8", "float8", "weight_scale_inv", "HQQ", "quanto", "exl2"],
)
def test_a_checkpoint_of_quantized_tensors_is_refused(tmp_path, tensors):
    refuse(save_model(tmp_path / "in", tensors), tmp_path / "out", "already quantized", "'m.")


def test_our_own_output_as_input_is_refused(model, tmp_path):
    quantize(model, tmp_path / "out")
    refuse(tmp_path / "out", tmp_path / "again", "tensor 'm.qweight'", "already quantized")


def test_the_config_of_a_quantized_model_serves_for_plain_weights(tmp_path):
    folder = save_pickle(tmp_path / "in", {"m.weight": random(24, 256)})
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(
        '{"quantization_config": {"quant_method": "awq"}}'
    )
    options = ["--config_dir", tmp_path / "config"]
    assert "quantization_config (awq)" in quantize(folder, tmp_path / "out", *options).stdout


# --- config files elsewhere -------------------------------------------------------------------------------------------


def test_config_dir_provides_config_and_tokenizer(tmp_path, tiny):
    tensors = {
        "m.x.weight": random(24, 256),
        "backbone.embeddings.weight": torch.cat([random(24, 256)] * 4),
    }
    folder = save_pickle(tmp_path / "in", tensors, "modelopt_model.0.pth")
    (folder / "config.json").write_text('{"model_type": "not this one"}')
    options = ["--config_dir", tiny, "--format", "compressed-tensors"]
    result = quantize(folder, tmp_path / "out", *options)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "nemotron_h"
    assert "quantization_config" in written
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny / name).read_bytes()
    assert "config.json (of " in result.stdout  # the one that does not count is named
    assert not list((tmp_path / "out").glob("model-*-of-*"))


def test_a_missing_config_json_is_warned_of(tmp_path):
    folder = save_pickle(tmp_path / "in", {"m.weight": random(24, 256)})
    (folder / "config.json").unlink()
    assert "Note:      no config.json in" in quantize(folder, tmp_path / "out").stdout


@pytest.mark.parametrize("where", ["", "out"])
def test_an_output_folder_in_the_config_folder_is_refused(tmp_path, tiny, where):
    folder = save_pickle(tmp_path / "in", {"m.weight": random(24, 256)})
    config = tmp_path / "config"
    shutil.copytree(tiny, config)
    before = folder_bytes(config)
    assert_refused(run_cli(folder, config / where, "--config_dir", config), "config")
    assert folder_bytes(config) == before


def test_a_folder_of_gguf_says_what_to_give(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    words = ["GGUF is quantized already", "give the checkpoint it was made from"]
    refuse(tmp_path / "in", tmp_path / "out", *words)
