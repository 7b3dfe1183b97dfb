"""Printing: lines that fit, progress, what to do next, streams that fail (README: "What you see")."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from checkpoints import WEIGHT, save_model
from conftest import command, quantize, run_in_terminal
from folders import folder_bytes

import quantize_int4 as q

LONG = "model.language_model.layers.{}.a_very_long_name_of_a_module_that_somebody_chose.another_one.up_proj.weight"


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """Long names, many files beside the weights, layers that are missing, padding."""
    weights = {
        LONG.format(n): torch.randn(16, 200, generator=torch.Generator().manual_seed(n))
        for n in (0, 1, 3)
    }
    folder = tmp_path_factory.mktemp("awkward") / ("a_folder_with_a_long_name_" * 4)
    save_model(
        folder, weights | {"lm_head.weight": torch.ones(300, 256), "norm.weight": torch.ones(200)}
    )
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4}')
    for number in range(30):
        (folder / f"file_beside_the_weights_{number}.txt").write_text("x")
    return folder


# --- width ------------------------------------------------------------------------------------------------------------


def test_no_line_is_wider_than_the_terminal(awkward, tmp_path):
    for options, columns in ((["--verify"], 60), (["--dry_run"], 60), (["--help"], 80), ([], 60)):
        text, code = run_in_terminal(command(awkward, tmp_path / "out", *options), 60)
        assert code == 0
        lines = [line.rpartition("\r\033[K")[2] for line in text.split("\n")]
        assert max(map(len, lines)) <= columns


def test_a_pipe_gets_lines_of_80(awkward, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    for options in (["--verify"], ["--help"]):
        result = subprocess.run(
            command(awkward, tmp_path / "out", *options),
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert "\033" not in result.stdout


def test_names_lose_their_middle_and_keep_their_ends():
    assert q.shorten("model.layers.0.mlp.up_proj", 16) == "mode...p.up_proj"
    assert q.shorten("short", 16) == "short"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (63.16e9, "63.2 GB"),
        (999.9e6, "1.00 GB"),
        (17_123_456, "17.1 MB"),
        (812, "812 bytes"),
        (1, "1 byte"),
        (0, "0"),
    ],
)
def test_sizes_have_three_digits(number, text):
    assert q.format_bytes(number).startswith(text)


# --- plan and summary -------------------------------------------------------------------------------------------------


READERS = {
    "int4": "which only your own code reads (dequantize_int4); for vLLM and transformers give"
    " --format compressed-tensors",
    "compressed-tensors": "for vLLM and transformers",
    "gptq": "for engines that read GPTQ (v1)",
}


@pytest.mark.parametrize("form", READERS)
def test_the_plans_first_line_says_once_who_reads_the_format(tiny, tmp_path, form):
    text = quantize(tiny, tmp_path / "out", "--format", form).stdout
    assert text.startswith(f"Format:    {form}, {READERS[form]}\n")
    assert text.count("your own code") == (form == "int4")
    assert text.count("--format compressed-tensors") == (form != "compressed-tensors")


def test_a_restored_folder_is_not_said_to_be_of_a_format_that_only_your_own_code_reads(
    tiny, tmp_path
):
    quantize(tiny, tmp_path / "out")
    text = quantize(tmp_path / "out", tmp_path / "dense", "--restore").stdout
    assert text.startswith("Format:    int4, restored to dense weights\n")
    assert "your own code" not in text


def test_config_json_is_named_among_what_is_written(tiny, tmp_path):
    lines = quantize(tiny, tmp_path / "out").stdout.splitlines()
    (written,) = [line for line in lines if line.startswith("Written:")]
    (copied,) = [line for line in lines if line.startswith("Copied:")]
    assert "config.json" in written.replace(",", "").split()
    assert "config.json" not in copied.replace(",", "").split()


def test_the_summary_has_time_sizes_counts_and_the_peak(tiny, tmp_path):
    summary = quantize(tiny, tmp_path / "out").stdout.split("\nDone in")[1]
    for words in (
        "29 tensors quantized, 14 kept",
        "times smaller",
        "at the peak of this process",
    ):
        assert words in summary
    assert "RAM used" not in summary
    assert "age cache" not in summary


def test_the_memory_at_each_stage_is_for_debug(tiny, tmp_path):
    summary = quantize(tiny, tmp_path / "out", "--debug").stdout.split("\nDone in")[1]
    title, *rows = summary.split("\n\n")[1].splitlines()
    assert title.split() == ["All", "programs", "RAM", "used", "Available", "Page", "cache"]
    size = r" +[\d.]+ [kMGT]B"
    stages = [re.fullmatch(rf"(\S.*?){size}{size}{size}", row)[1] for row in rows]
    assert stages == ["Baseline", "Headers read", "Half-way", "Written"]


def test_counts_of_nothing_are_left_out(model, tmp_path):
    text = quantize(model, tmp_path / "out", "--verify").stdout
    assert "1 tensor quantized\n" in text
    assert "kept" not in text
    assert "  1 shard\n" in text
    assert "stops below" not in text
    text = quantize(tmp_path / "out", tmp_path / "back", "--restore").stdout
    assert "1 tensor restored\n" in text
    assert "kept" not in text


def test_limits_are_stated_where_they_limit_something(tiny, tmp_path):
    options = ["--shard_size_gb", "0.001", "--min_free_gb", "0.25"]
    text = quantize(tiny, tmp_path / "out", *options).stdout
    assert "  2 shards, up to 1.00 MB\n" in text
    assert "available, stops below 250 MB\n" in text


def test_the_plans_columns_do_not_touch(tmp_path):
    folder = save_model(tmp_path / "in", {**WEIGHT, "norm.weight": torch.ones(100)})
    (row,) = [
        line
        for line in quantize(folder, tmp_path / "out").stdout.splitlines()
        if "vectors and scalars" in line
    ]
    assert re.search(r" 1 +400 B  norm", row)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            ["--format", "compressed-tensors"],
            ["vllm serve out --max", "from_pretrained('out'", "with --verify; then"],
        ),
        (
            ["--format", "gptq", "--verify"],
            ["vllm serve out --dtype float16", "from_pretrained('out'", "rsync -a"],
        ),
        (
            [],
            ["dequantize_int4 of quantize_int4.py", "with --verify; then copy"],
        ),
    ],
    ids=["compressed-tensors", "gptq, verified", "int4"],
)
def test_the_end_says_a_line_each_what_can_be_done_with_the_folder(tiny, tmp_path, options, lines):
    end = quantize(tiny, tmp_path / "out", *options).stdout.split("\nNext, in   ")[1]
    folder, *found = end.splitlines()
    assert folder == f"{tmp_path}:"
    for line, words in zip(found, lines, strict=True):
        assert words in line


def test_a_restored_folder_is_to_be_evaluated(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    end = quantize(tmp_path / "out", tmp_path / "dense", "--restore").stdout.split("Next, in")[1]
    assert "  Try:     transformers.AutoModelForCausalLM.from_pretrained('dense'" in end


def test_a_folder_that_is_complete_says_that_it_was_not_compared(tiny, tmp_path):
    quantize(tiny, tmp_path / "out")
    assert (
        "It was not compared with the source; --verify does that"
        in quantize(tiny, tmp_path / "out").stdout
    )


# --- progress ---------------------------------------------------------------------------------------------------------

PROGRESS = re.compile(
    r"quantizing  \d+%  (about \d+ (s|min) left  )?[\d.]+ \w+ of 805 MB  [\d.]+ \w+/s  \d+/24 tensors"
    r"  RAM .* used, .* available"
)


def test_a_pipe_gets_whole_lines_of_progress(large, tmp_path):
    result = quantize(
        large, tmp_path / "out", constants={"PROGRESS_INTERVAL_S": {True: 0.1, False: 0.1}}
    )
    assert "\r" not in result.stdout
    assert "\033" not in result.stdout
    assert any(PROGRESS.fullmatch(line) for line in result.stdout.splitlines())


def test_a_terminal_gets_one_line_that_updates(large, tmp_path):
    master, slave = pty.openpty()
    with subprocess.Popen(
        command(large, tmp_path / "out"), stdout=slave, env={**os.environ, "COLUMNS": "200"}
    ) as run:
        os.close(slave)
        chunks = []
        try:
            while chunk := os.read(master, 4096):
                chunks.append(chunk)
        except OSError:  # Linux's end of file of a terminal
            pass
    assert run.returncode == 0
    text = b"".join(chunks).decode()
    loading, plan, *updates = text.split("\r\033[K")
    assert loading == "loading torch ..."
    assert plan.startswith("Format:")
    assert len(updates) >= 2
    assert PROGRESS.match(updates[0])
    assert "\n" not in "".join(updates[:-1])
    assert updates[-1].startswith("Done in")


@pytest.fixture
def shown(monkeypatch, capsys):
    """What is shown after some seconds, in so many columns, when `done` of `total` jobs are done.

    A job is 10 million bytes. The first `kept` jobs are of tensors that are kept."""
    monkeypatch.setattr(q, "PROGRESS_INTERVAL_S", {True: 0, False: 0})
    progress = q.Progress(q.MemoryGuard(0))

    def show(seconds: float, done: int, total: int, kept: int = 0, columns: int = 200) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        jobs = []
        for number in range(total):
            packing = None if number < kept else q.Packing(4, 128)
            tensor = SimpleNamespace(source=SimpleNamespace(name=str(number)), packing=packing)
            jobs.append(q.Job(tensor, 0, 1, 0, 1, 0, 10**7))
        account = q.Account(jobs, "quantizing")
        for job in jobs[:done]:
            account.book(job)
        progress.restart()
        with monkeypatch.context() as later:
            later.setattr(time, "monotonic", lambda: progress.started + seconds)
            progress.show(account)
        return capsys.readouterr().out.rstrip("\n")

    return show


def test_on_a_narrow_terminal_the_memory_goes_first(shown):
    lines = [shown(10.0, 10, 100, columns=columns) for columns in (201, 80, 41)]
    assert all("quantizing  10%  about 90 s left" in line for line in lines)
    assert "100 MB of 1.00 GB  10.0 MB/s  10/100 tensors" in lines[0]
    assert ["RAM" in line for line in lines] == [True, False, False]
    assert ["/s" in line for line in lines] == [True, True, False]
    assert all(len(line) < columns for line, columns in zip(lines, (201, 80, 41)))


def test_for_the_estimate_what_is_kept_counts_a_fifth(shown):
    assert "quantizing  0%  0 bytes of 1.00 GB" in shown(60, 0, 100, kept=50)
    # 50 kept jobs are 10 of 60 parts, and 80 jobs are 40.
    assert "quantizing  16%  about 50 s left  500 MB of" in shown(9.5, 50, 100, kept=50)
    assert "quantizing  66%  about 10 s left  800 MB of" in shown(18, 80, 100, kept=50)
    assert "quantizing  50%  about 20 s left" in shown(18, 50, 100, kept=100)


def test_there_is_no_estimate_before_it_means_something(shown):
    assert "left" not in shown(30, 4, 100)
    assert "left" not in shown(30, 49, 1000)
    assert "5%  about 10 min left" in shown(30, 5, 100)
    assert "left" not in shown(1, 10, 100)  # of the first two seconds
    assert "10%  about 45 s left" in shown(5, 10, 100)


def test_what_is_not_done_is_never_100_percent(shown):
    assert "quantizing  99%  about 5 s left" in shown(100, 9999, 10000)
    assert shown(100, 100, 100) == "quantizing: 100 tensors done, waiting for the disk"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "5 s"), (41, "45 s"), (95, "2 min"), (3000, "50 min"), (75_000, "21 h")],
)
def test_estimates_are_not_more_exact_than_they_are(shown, seconds, text):
    assert f"50%  about {text} left" in shown(seconds, 50, 100)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.318, "7.32 s"), (59.97, "1:00"), (185, "3:05"), (3723, "1:02:03"), (90_000, "25:00:00")],
)
def test_durations_longer_than_a_minute_are_those_of_a_clock(seconds, text):
    assert q.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.00"), (0.09667, "0.0967"), (1.5151, "1.52"), (9.997, "10.0"), (999.6, "1,000")],
)
def test_numbers_have_three_digits(number, text):
    assert q.three_digits(number) == text


# --- streams that take nothing ----------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_does_not_end_the_run(tiny, tmp_path):
    pipeline = ["sh", "-c", '"$@" | head -1', "sh", *command(tiny, tmp_path / "out")]
    assert subprocess.run(pipeline, capture_output=True).returncode == 0
    deadline = time.monotonic() + 20
    while not (tmp_path / "out" / "model.safetensors.index.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_full_log_does_not_end_the_run(tiny, tmp_path):
    with open("/dev/full", "w") as full:
        assert (
            subprocess.run(command(tiny, tmp_path / "out"), stdout=full, stderr=full).returncode
            == 0
        )
    quantize(tiny, tmp_path / "expected")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")


def test_a_closed_standard_output_does_not_end_the_run(tiny, tmp_path):
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command(tiny, tmp_path / "out")]
    assert subprocess.run(closed, capture_output=True).stderr == b""
    assert "complete already" in quantize(tiny, tmp_path / "out").stdout


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_run(tmp_path):
    model = save_model(tmp_path / "in", {"m.weight": torch.ones(4, 128)})
    (model / "r\u00e9sum\u00e9.md").write_text("x")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        command(model, tmp_path / "out"), env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert r"r\xe9sum\xe9.md" in result.stdout
