#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8.0", "safetensors>=0.7.0", "psutil>=5.9.0"]
# ///
"""Quantize a merged bf16 checkpoint to INT4, on the CPU, in constant memory.

    python quantize_int4.py --input_dir merged_model --output_dir merged_int4

(Or --input-dir; or the two folders alone.) No model code is imported, so any
architecture will do. Every 2-D floating-point *.weight, rows (outputs) by
columns (inputs), of at least one group (group_size columns of a row, which
share a scale) is quantized, but for embeddings, what --exclude names and, in
formats for engines, heads and expert routers; 3-D stacks of routed experts are
read as one weight an expert and projection. All else is kept bit for bit. The
plan is printed before the first weight is read. By --format, X.weight (rows,
columns) becomes (g: group_size; padded: columns rounded up to whole groups):

  int4, for readers   X.qweight        int32    (rows, padded // 8)
    of your own       X.scales         float16  (rows, padded // g)
  compressed-tensors  X.weight_packed  int32    (rows, columns // 8)
    for vLLM and      X.weight_scale   *        (rows, columns // g)
    transformers      X.weight_shape   int64    (2,): rows, columns
  gptq (v1), other    X.qweight        int32    (columns // 8, rows)
    engines, dense    X.scales         float16  (columns // g, rows)
    models only       X.qzeros         int32    (columns // g, rows // 8): 7s
                      X.g_idx          int32    (columns,): group of each

*: bfloat16 or float16 if config.json names it, else the weight's own dtype,
float32 for float64. If padded differs from columns, quantize_config.json says
so. For engines g is by default the largest of 128, 64 and 32 that divides all
columns. Eight codes a word along the columns, element 0 in the lowest bits, as
4-bit two's complement in int4 and as code + 8 in the others; weight = code *
scale; code = clamp(round(weight / scale), -8, 7). --scale absmax: max|weight|
/ 7, rounded to its dtype; mse, the default for engines: the scale of least
squared error. --importance FILE: for each X, a float32 tensor X of its
columns' mean square inputs, which weigh the columns' errors, and X.factor
(columns, up to 64) of their second moments, for error feedback as in GPTQ.
What --int8 names has 8 bits: scale = max|weight| / 127, and weight_packed
(rows, columns // 4) holds code + 128, the first in the lowest byte.

With a C compiler (cc, or what CC names) this takes half of torch's time or
less, to the same result. A run that was stopped, killed or out of memory or
disk continues with the same command. Exit codes: 0 done, 1 refused or failed,
2 usage, 3 too little memory, 129, 130, 143 stopped by SIGHUP, SIGINT, SIGTERM.
"""

# For those who change it, downwards as a tensor goes: `Checkpoint` knows each tensor's place; `expert_weights` tells
# what a stack of experts becomes, `stays_whole` if it stays one, `reason_to_keep` why a tensor is kept; `FORMATS` has a
# row for each format, `ODDITIES` for each unusual type of models; `plan_shards` gives each byte its place; `_survey`
# finds whether a run may continue; `Conversion` does jobs, `Verification` does them again and compares. Tests are in
# tests/test_SECTION*.py. Words: a module X has a weight, the tensor X.weight, of rows by columns; group_size columns of
# a row are a group; a shard is an output file, a job the block of a tensor that a worker does at a time.

from __future__ import annotations

import argparse
import bisect
import concurrent.futures
import contextlib
import ctypes
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import mmap
import os
import pickle
import pwd
import re
import resource
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter, deque, namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, ClassVar, TextIO

__version__ = "1.0.0"

# ---- Options: what may be asked for. Before the imports of torch and others, which take seconds ---------------------

ERROR = "error: "  # before every message of one
BOLD_RED, GREEN = "31;1", "32"  # ECMA-48, select graphic rendition
CLEAR_LINE = "\r\033[K"  # on a terminal: back to the line's start, erase to its end (ECMA-48)
SEE_HELP = " (see quantize_int4.py --help)"


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a person reads the stream; there is none in a process without standard streams."""
    return stream is not None and stream.isatty()


def terminal_width() -> int:
    """Return the columns of the terminal; for a pipe COLUMNS, or 80."""
    return (
        shutil.get_terminal_size().columns
        if is_terminal(sys.stdout) or os.environ.get("COLUMNS")
        else 80
    )


def paint(text: str, colour: str, stream: TextIO | None) -> str:
    """Colour a text for a terminal that shows colours; any other stream gets it as it is."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return f"\033[{colour}m{text}\033[m" if colour and is_terminal(stream) and not plain else text


def printable(text: str) -> str:
    """Escape control characters: names come from files, and a terminal obeys what it is sent."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggest what was meant by a word that is not known, in words for the end of an error; nothing if unclear."""
    meant = difflib.get_close_matches(word, list(known), 1)
    return f": did you mean {meant[0]}?" if meant else ""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Say in one line, as with all errors, what is wrong and what was meant."""
        unknown = re.match(r"unrecognized arguments: ([^\s=]*)", message)
        if unknown and unknown[1].startswith("-"):
            message += nearest(
                unknown[1], [name for action in self._actions for name in action.option_strings]
            )
        elif unknown:
            message += ": quote a value with a space or a *, and give --exclude or --int8 once for each pattern"
        self.exit(2, f"{paint(ERROR, BOLD_RED, sys.stderr)}{message}{SEE_HELP}\n")


def checked(
    metavar: str, rule: str, convert: Callable, accept: Callable = lambda value: True, **settings
) -> dict:
    """Make the settings of an option whose text `convert` reads and whose value `accept` accepts, as `rule` says."""

    def parse(text: str) -> object:
        with contextlib.suppress(ValueError, re.error):
            if accept(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")

    return {"metavar": metavar, "type": parse, **settings}


def make_parser() -> Parser:
    """Declare the options, each with its default and its check."""
    summary, description = __doc__.split("\n\n", 1)
    parser = Parser(description=summary, epilog=description, allow_abbrev=False)
    parser.usage = "quantize_int4.py --input_dir DIR --output_dir DIR [option ...]"
    parser.formatter_class = functools.partial(
        argparse.RawDescriptionHelpFormatter, width=terminal_width() - 1
    )
    # An empty one, as of a variable that is not set, would be the current folder.
    path = functools.partial(checked, convert=lambda text: text and Path(text), accept=bool)
    folder = path("DIR", "the name of a folder")
    file = path("FILE", "the name of a file")
    flag = {"action": "store_true"}
    many = {"action": "append", "default": []}
    regex = checked(
        "REGEX", "a regular expression", lambda text: re.compile(text).pattern, bool, **many
    )
    eights = checked("N", "a positive multiple of 8", int, lambda n: n > 0 and n % 8 == 0)
    threads = checked("N", "a number of threads from 1 to 1024", int, lambda n: 1 <= n <= 1024)
    size = checked("GB", "a positive number of gigabytes", float, lambda n: 0 < n <= 1e9)
    free = checked("GB", "a number of gigabytes", float, lambda n: 0 <= n <= 1e9, default=10.0)
    parser.add_argument("folders", nargs="*", type=folder["type"], help=argparse.SUPPRESS)
    for name, text, settings in (
        ("input_dir", "folder of the merged checkpoint: safetensors, or torch pickles", folder),
        ("output_dir", "folder to write to: new, empty, or of an earlier run", folder),
        ("config_dir", "folder of config.json, tokenizer and so on, if not --input_dir", folder),
        (
            "format",
            "layout of the output, see below: int4 (default), compressed-tensors or gptq",
            {"metavar": "NAME"},
        ),
        (
            "group_size",
            "columns that share a scale, a multiple of 8 (default: 128; for engines see below)",
            eights,
        ),
        (
            "shard_size_gb",
            "largest size of an output file, in 10^9 bytes, but for larger tensors (default: 4.0)",
            size,
        ),
        (
            "exclude",
            "keep tensors whose name this matches anywhere (Python re.search); may be given again",
            regex,
        ),
        (
            "scale",
            "how scales are chosen, see below (default: absmax; engines: mse)",
            {"choices": ("absmax", "mse")},
        ),
        (
            "importance",
            "what the layers' inputs are like, see below (safetensors); needs --scale mse",
            file,
        ),
        (
            "int8",
            "pack what this matches anywhere in 8 bits (compressed-tensors); may be given again",
            regex,
        ),
        (
            "quantize_embeddings",
            "quantize embeddings too, in int4 alone (default: they are kept)",
            flag,
        ),
        (
            "min_free_gb",
            "stop when less memory is available, in 10^9 bytes, container limits too (default: 10)",
            free,
        ),
        ("threads", "worker threads (default: the cores that this process may use)", threads),
        ("dry_run", "print the plan and stop; nothing is written", flag),
        (
            "list",
            "with --dry_run: print every tensor and its fate instead of the plan, separated by tabs",
            flag,
        ),
        (
            "verify",
            "compare the output with the source, weight by weight: a finished folder, or after writing",
            flag,
        ),
        (
            "restore",
            "the other way: make a plain checkpoint of what a folder of any format decodes to",
            flag,
        ),
        ("overwrite", "replace what an earlier run left in the output folder, nothing else", flag),
        ("debug", "show a traceback with an error", flag),
    ):
        parser.add_argument(f"--{name}", help=text, **settings)
    parser.add_argument("--version", action="version", version=f"quantize_int4.py {__version__}")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the options, spelled --input_dir or --input-dir; exits with a usage error if they make no sense together."""
    argv = [
        re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), argument)
        for argument in argv
    ]
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("input_dir", "output_dir"):
        if getattr(args, name) is None:
            setattr(
                args,
                name,
                args.folders.pop(0) if args.folders else parser.error(f"--{name} is missing"),
            )
    if args.folders:
        parser.error(f"unrecognized arguments: {' '.join(map(str, args.folders))}")
    layout = (
        args.format or args.group_size or args.exclude or args.int8 or args.scale or args.importance
    )
    if args.restore and (args.verify or args.quantize_embeddings or layout):
        parser.error(
            "--restore takes the layout from the folder: leave out --verify and what decides it, as --format"
        )
    if args.list and not args.dry_run:
        parser.error("--list needs --dry_run")
    return args


ARGUMENTS = parse_args(sys.argv[1:]) if __name__ == "__main__" else None
if ARGUMENTS:
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports shows no traceback
    if missing := [
        name for name in ("torch", "safetensors", "psutil") if not importlib.util.find_spec(name)
    ]:
        cpu = (
            "; of torch the build for CPUs is enough, see pytorch.org/get-started"
            if "torch" in missing
            else ""
        )
        what = f"{', '.join(missing)}: pip install {' '.join(missing)}"
        sys.exit(f"{paint(ERROR, BOLD_RED, sys.stderr)}missing: {what}{cpu}")
    with contextlib.suppress(OSError):
        print("loading torch ..." if is_terminal(sys.stdout) else "", end="", flush=True)
warnings.filterwarnings(
    "ignore", message="Failed to initialize NumPy|Validating sparse"
)  # torch's; neither is needed
import psutil  # noqa: E402
import torch  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402

# ---- Facts and constants --------------------------------------------------------------------------------------------

GB = 10**9  # sizes are decimal throughout, as in disk sizes and the hub's shard sizes
FORMAT_VERSION = 8  # raise it whenever the bytes of the output change: leftovers of an older version are then foreign

CODE_MIN, CODE_MAX = -8, 7  # 4-bit two's complement
CODES_PER_WORD = 8  # 4-bit codes in an int32
# Of `search_scales`. Placed for least error on Gaussian, Laplace and Student-t (5) weights in groups of 32 to 128; a
# grid of 70 from 6.8 to 13.7 gains no more than 0.16 % of the relative RMS error.
SEARCH_STEPS = (7.1, 7.8, 8.2, 8.5, 8.8, 9.2, 9.7)
SEARCH_MULTIPLIERS = [
    round(step * (1 << 11)) for step in SEARCH_STEPS
]  # of parts of 2^14: codes times 2^25
# Of a group's largest importance, the least that any column of the group has: see `weigh_columns`.
# It is the least that the search in integers, which counts in parts of 2^14, can tell from nothing. SmolLM2 loses more
# the larger it is: 0.110 nat a token with this or none at all, 0.112 with 4 times, 0.114 with 16 times as much.
LEAST_SHARE = 2**-14
SUM_LANES = 8  # of sums in float; group sizes and ranks are multiples of it
MAX_GROUP = 1024  # columns of a group that the kernel takes: the sums of its search fit 32 bits
MAX_RANK = 64  # of a factor of second moments
MAX_FACTOR = 1 << 21  # numbers in it; a worker holds eight times as many
KEPT_ROUNDINGS = (
    2  # of the last weights, with what was prepared of their statistics for all jobs of one
)
# Of error feedback. What few tokens say of columns' correlation is believed by four fifths; the best is flat between a
# half and nine tenths. The damping is a part of the mean second moment, as in GPTQ.
FACTOR_SHARE, DAMPING = 0.8, 0.01
MAX_CHANGE = 2  # scales by which feedback may move a weight: one in 10,000 would go further, and --verify has a bound
OFFSET_BITS = 0x88888888 - (
    1 << 32
)  # c + 8 differs from c's two's complement in the top bit of each nibble

# What a worker quantizes at a time. Each of a tile's calls to the kernel, to torch or the system hands the interpreter
# lock to another worker, and so tiles must not be small; its buffers (3 to 28 bytes a weight) should still fit the
# last-level cache. (python tests/benchmark.py --only tile18 tile19 tile20)
TILE_WEIGHTS = 1 << 20
JOB_WEIGHTS = (
    1 << 22
)  # what a worker takes from the queue at a time: consecutive tiles of one tensor
TRANSPOSED_JOB_WEIGHTS = (
    1 << 24
)  # the same where the job's words, half a byte a weight, are staged to be transposed
DISK_READERS = 4  # threads that read ahead of the workers; one alone does not keep an SSD busy
O_DIRECT = getattr(os, "O_DIRECT", 0)  # to read around the page cache, where the system can
DIRECT_BLOCK = 4096  # bytes, to which such reads are aligned
READ_MARGIN = 2 * DIRECT_BLOCK  # that a buffer must have beyond what is read into it
MAX_IDLE_FILES = 16  # of the input, that stay open; each takes two descriptors
MAX_WAITING_SHARDS = (
    100  # for the disk; each may be an open file, and the system allows about a thousand
)
SYNC_BYTES = (
    1 << 27
)  # of input, after which what came of it is synced and both leave the page cache
ASK_BYTES = (
    1 << 18
)  # of a file, for each of which one page is asked for where mincore does not tell
MINCORE_BYTES = 1 << 30  # of a file that is asked about at a time
HUGE_PAGE = 1 << 21  # bytes, where pages have 4 kB
SYNC_AND_WAIT = 7  # of sync_file_range: SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER
COPY_BYTES = 1 << 23  # what is copied at a time of a tensor that is kept, or of another file
VERIFY_WEIGHTS = 1 << 18  # what --verify decodes at a time
# Scales beyond which --verify counts a weight as clipped. Rounding and error feedback reach 2.5.
FAR_SCALES = 3
COMPILER_TIMEOUT_S = 60  # it takes 0.2, and far longer on a small machine that is busy
PROGRESS_INTERVAL_S = {True: 0.5, False: 10.0}  # by whether standard output is a terminal
TWO_COPIES = "tensors {} are two copies of the same weights: leave one of them in the checkpoint"

READ_ONLY = (
    "is on a read-only mount: choose another folder, or mount it writable"
    " (docker run -v without :ro)"
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what such a file begins with
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = (
    "adapter_config.json"  # with which peft and transformers load a folder as an adapter
)
QUANTIZE_CONFIG_NAME = "quantize_config.json"
# What says how a model is quantized: keys of config.json, at any depth, and files beside it.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", QUANTIZE_CONFIG_NAME)
MAX_JSON_DEPTH = 100  # of objects and lists in one another; no model's config has ten
METADATA_KEY = "quantize_int4"  # in a shard's __metadata__: the fingerprint of sources and options
FACTS_KEY = (
    "quantize_int4_facts"  # there too: the sources' sizes and times, and the options, as JSON
)
FILES_KEY = (
    "quantize_int4_files"  # there too: name and SHA-256 of all files but shards and index, as JSON
)
WEIGHED, FEEDBACK = "weighed by importance", "with error feedback"  # in `Options.rule`
SHARD_PATTERN = re.compile(r"model-\d{5}\.safetensors")
UNFINISHED_PATTERN = re.compile(
    r".+\.([0-9a-f]{12})\.unfinished"
)  # a file being written, and its fingerprint's start

# The safetensors format: dtype name -> bits an element. (https://github.com/huggingface/safetensors, tensor.rs)
DTYPE_BITS = dict.fromkeys(
    ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8
)
DTYPE_BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16) | dict.fromkeys(
    ("I32", "U32", "F32"), 32
)
DTYPE_BITS |= dict.fromkeys(("I64", "U64", "F64", "C64"), 64) | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
FLOAT_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}  # of all that a pickle may hold
DTYPE_NAMES |= {
    getattr(torch, n.replace("I", "int").replace("U", "uint")): n
    for n in DTYPE_BITS
    if n[0] in "IU"
}
DTYPE_NAMES |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
DTYPE_NAMES |= {torch.bool: "BOOL", torch.complex64: "C64"}
LAYER_PATTERN = re.compile(
    r"(.*?)\.?(\w+)\.(\d+)\."
)  # wrappers, the layers' container, a layer's number
# Parts of a multimodal model that are not its language model, and what joins them to it.
TOWER_WORDS = re.compile(
    r"vis(ion|ual)|image|audio|speech|tower|proj|merger|connector|adapter|sampler|pool|dense|linear|(^|\.)(mlp|fc)"
)
TOWER_NAMES = r"vis(ion|ual)|vit|image|audio|speech|sound|tower|encoder"
# What config.json calls the config of a language model inside another model.
LANGUAGE_KEY = re.compile(r"(text|llm|language|thinker|decoder|generator)\w*config$|text$")
# Names of norms, and of those before a layer's attention or mixer: a model with these has one after its last layer.
NORM_NAME = r"norm|(^|\.)ln"
FIRST_NORM = re.compile(
    r"(input_layernorm|pre_attention_layernorm|attention_norm|attn_norm|operator_norm|norm|ln_?1|norm_?1|ln_attn"
    r"|layer\.0\.layer_norm|pre_mixer_layernorm)\.weight$"
)
# By design: of ModernBERT's first layer, before which the embeddings' norm comes, and of Inkling's last one for images.
LAYER_WITHOUT_NORM = r"layers\.0\.attn_norm\.weight$|encoder_layers\.\d+\.layer_norm\.weight$"
MTP_NAMES = r"(^|\.)(mtp|nextn)"  # layers that predict further tokens
MTP_COUNTS = re.compile(
    r"num_nextn_predict_layers$|num_mtp_\w*$|mtp_\w*(num|layers|modules|depth)\w*$"
)
# Names that are those of a trainer's own format, beside models that never have them; and what exports them.
TRAINERS_NAMES = (
    (
        r"self_attention\.linear_(qkv|proj)\.|decoder\.layers\.\d+\.mlp\.linear_fc\d\.|decoder\.final_layernorm\.",
        "Megatron-Core's",
        "export it with Megatron-Bridge (AutoBridge.export_ckpt) or with what trained it",
        "",
    ),
    (
        r"(^|\.)tok_embeddings\.|\.attention\.(wqkv|w[qkvo])\.|\.feed_forward\.w[123]\.",
        "Meta's",
        "convert it with its model's script in transformers' repository, as convert_llama_weights_to_hf.py",
        "llama mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text phi3",
    ),
)
EXPERT_PATTERN = re.compile(r"((?:.*\.)?experts)\.(\d+)\.\w+\.weight$")
STACK_PATTERN = re.compile(  # of routed experts, or of Granite's
    r"(?P<place>(?:.*\.)?)(?:experts\.(?P<projection>gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight)?"
    r"|(?P<linear>input_linear|output_linear)\.weight)$"
)
# Modules that training wraps around a model or its layers; they have no weights of their own.
WRAPPER_PATTERN = re.compile(
    r"(^|(?<=\.))(_orig_mod|_(?:fsdp|checkpoint)_wrapped_module|_forward_module)\."
)
TRAINER_PATTERN = re.compile(  # files of a trainer's
    r"^(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state|events\.out\.tfevents|zero_to_fp32)"
    r"|^latest$|\.distcp$"
)

# ---- Errors: one line each, with what to do -------------------------------------------------------------------------

SIGNALS_RECEIVED: list[int] = []  # see `stop_on_signals`
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
signals_are_deferred = False  # see `deferring_signals`


class QuantizeError(Exception):
    """Report what the user can mend: `main` prints it as one line and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message + (SEE_HELP if exit_code == 2 else ""))
        self.exit_code = exit_code


class Stopped(BaseException):
    """Report a signal, as `QuantizeError` reports an error, but past all that catches errors on the way."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let a signal stop the run by raising `Stopped` wherever the main thread is, or at the next `check_signals` while
    signals are deferred. A second one ends the process on the spot."""

    def handler(signum: int, _frame: object) -> None:
        if SIGNALS_RECEIVED:
            os._exit(128 + signum)
        SIGNALS_RECEIVED.append(signum)
        if not signals_are_deferred:
            check_signals()

    # nohup ignores SIGHUP, and a shell SIGINT for what it starts in the background.
    heeded = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    try:
        for signum in heeded:
            signal.signal(signum, handler)
        yield
    finally:
        # From here on there is nothing that a signal could leave half done.
        for signum in heeded:
            signal.signal(signum, signal.SIG_DFL)


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
    """Let a signal wait for the next `check_signals`, or the end of this: for what must not be left half-way, as the
    start of a thread or a temporary file, and is short or calls `check_signals` itself."""
    global signals_are_deferred
    before = signals_are_deferred
    signals_are_deferred = True
    try:
        yield
    finally:
        signals_are_deferred = before
    if not signals_are_deferred:
        check_signals()


def check_signals() -> None:
    """Raise if a signal has come. Any thread may call this; all that takes longer than a blink calls it at times."""
    for signum in SIGNALS_RECEIVED:
        raise Stopped(signum)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system name the file, which calls on descriptors leave out."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def describe_os_error(error: OSError) -> str:
    """Say in words what the system refused, of which file, and what helps."""
    place = f"{error.filename}: " if error.filename else ""
    problem = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{place}{problem}: make room, then the same command continues"
    if error.errno == errno.EROFS:
        return f"{place}{READ_ONLY}"
    if isinstance(error, PermissionError) and isinstance(error.filename, str):
        return place + (why_unreadable(Path(error.filename)) or problem)
    return place + problem


def why_unreadable(path: Path) -> str:
    """Say what keeps this process from reading a file or folder, and the `chmod` that mends it;
    nothing if it may."""
    real = Path(os.path.realpath(path))  # of a link, as in the hub's cache
    for folder in (*reversed(path.absolute().parents), *reversed(real.parents)):
        if not os.path.exists(folder):
            return ""
        if not os.access(folder, os.X_OK):
            remedy = f"chmod a+x {shlex.quote(str(folder))}"
            return describe_denial(f"folder {folder}", folder, remedy)
    if not real.exists():
        return ""
    if path.is_dir():
        if os.access(path, os.R_OK | os.X_OK):
            return ""
        return describe_denial("it", path, f"chmod a+rx {shlex.quote(str(path))}")
    if os.access(path, os.R_OK):
        return ""
    alike = [other for other in path.parent.glob(f"*{path.suffix}") if other.is_file()]
    closed = [other for other in alike if not os.access(other, os.R_OK)]
    files = shlex.quote(str(path))
    if path.suffix and len(closed) > 1:
        files = f"{shlex.quote(str(path.parent))}/*{path.suffix}"
    return describe_denial("it", path, f"chmod a+r {files}")


def describe_denial(what: str, path: Path, remedy: str) -> str:
    """Say to whom a file or folder belongs that this process may not read, who this process is, and
    what helps."""
    found = path.stat()
    owner = f"{what} belongs to {user_name(found.st_uid)}, mode {found.st_mode & 0o7777:04o}"
    reader = f"this process is {user_name(os.geteuid())}"
    return f"Permission denied: {owner}, and {reader}: as its owner or root, {remedy}"


def user_name(uid: int) -> str:
    """Name a user, who in a container need not have a name."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"


@contextlib.contextmanager
def telling_of_memory() -> Iterator[None]:
    """Turn what Python, torch and the system raise when memory cannot be had into one error with one exit code."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        of_torch = isinstance(error, RuntimeError) and re.search(
            "can't allocate memory|can't start new thread", str(error)
        )
        of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if not (isinstance(error, MemoryError) or of_torch or of_system):
            raise
        what = "no memory for another thread" if "thread" in str(error) else "out of memory"
        advice = "stop other programs, raise the limits of the container or of ulimit, or use fewer --threads"
        raise QuantizeError(f"{what}: {advice}", 3) from error


def quote_names(names: Iterable[str]) -> str:
    """Quote the first names and count the others: 'a', 'b', 'c' and 4 more."""
    names = list(map(repr, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


# ---- Page cache: a guest leaves it as it was. Where CPU and GPU share memory, the GPU's programs count it as used ----

LIBC = ctypes.PyDLL(None, use_errno=True)  # whose calls keep the interpreter lock: to be timed
Ranges = list[tuple[int, int]]  # of bytes: start and end of each, in order


def cached_ranges(fd: int) -> Ranges:
    """Ask which parts of a file are in the page cache; all of it where the system does not tell. (mincore(2))"""
    size, page, ranges = os.fstat(fd).st_size, mmap.PAGESIZE, []
    with contextlib.suppress(OSError):
        mincore = ctypes.CDLL(None).mincore
        for start in range(0, size, MINCORE_BYTES):
            nbytes = min(MINCORE_BYTES, size - start)
            resident = ctypes.create_string_buffer(
                b"\1" * -(-nbytes // page)
            )  # and stays so where mincore fails
            with mmap.mmap(
                fd, nbytes, flags=mmap.MAP_PRIVATE, offset=start
            ) as pages:  # no page of which is touched
                mincore(
                    ctypes.byref(ctypes.c_char.from_buffer(pages)),
                    ctypes.c_size_t(nbytes),
                    resident,
                )
            runs = re.finditer(
                rb"\x01+", resident.raw.translate(bytes([0, 1] * 128))
            )  # the other bits mean nothing
            ranges += [
                (start + run.start() * page, min(start + run.end() * page, size)) for run in runs
            ]
        return ranges
    return [(0, size)]


def mincore_tells(fd: int) -> bool:
    """Tell whether mincore knows what of a file is in the page cache: since Linux 5.2, of a file that one neither owns
    nor may write, it says that all is."""
    effective = os.access in os.supports_effective_ids
    may_write = os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=effective)
    return os.fstat(fd).st_uid == os.geteuid() or may_write


def within(ranges: Ranges, start: int, end: int) -> Ranges:
    """Pick the ranges that overlap a part of a file."""
    first = bisect.bisect_right(ranges, start, key=lambda each: each[1])
    last = bisect.bisect_left(ranges, end, key=lambda each: each[0])
    return ranges[first:last]


def drop_pages(fd: int, others: Ranges, start: int = 0, end: int = 1 << 62) -> None:
    """Let the page cache forget part of a file but for what others have there. Written pages must be synced before."""
    for first, last in [*within(others, start, end), (end, end)]:
        if start < min(first, end) and (
            first >= end or first - start >= 1 << 16
        ):  # fewer are not worth a call
            os.posix_fadvise(fd, start, min(first, end) - start, os.POSIX_FADV_DONTNEED)
        start = max(start, last)


def asked_ranges(fd: int) -> Ranges | None:
    """Find which parts of a file are in the page cache, to ASK_BYTES, by reads that do not wait; None where there are
    no such reads. (preadv2(2), RWF_NOWAIT)"""
    ranges, size = [], os.fstat(fd).st_size
    # A read of a page that is not there makes the kernel fetch it; with this, and for one byte, that page alone.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for position in range(0, size, ASK_BYTES):
        check_signals()
        found = is_resident(fd, position)
        if found is None:
            return None
        if found:
            if not ranges or ranges[-1][1] != position:
                ranges.append((position, position))
            ranges[-1] = ranges[-1][0], min(position + ASK_BYTES, size)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
    drop_pages(fd, ranges)  # what was fetched; what is on its way yet will go with what is read
    return ranges


def is_resident(fd: int, position: int) -> bool | None:
    """Tell by a read that does not wait whether the page at `position` is there; None where there are no such reads."""
    byte = ctypes.create_string_buffer(1)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(byte), 1)
    times = []
    try:
        for _ in range(2):
            started = time.perf_counter_ns()
            count = LIBC.preadv2(fd, vector, 1, ctypes.c_int64(position), os.RWF_NOWAIT)
            times.append(time.perf_counter_ns() - started)
            if count < 1:
                return False if not count or ctypes.get_errno() == errno.EAGAIN else None
    except AttributeError:  # an old C library, or no Linux
        return None
    # A disk may fetch the page before the read returns, which then takes far longer than it takes again.
    return times[0] < 8 * times[1]


class PageCache:
    """What others have of a file in the page cache, and so a run leaves there."""

    def __init__(self, fd: int):
        self.fd = fd
        self._is_known = True

    @functools.cached_property
    def others(self) -> Ranges:
        """What was there before this run read tensors: asked before the first, since it takes 10 ms a gigabyte, and ten
        times as long where mincore does not tell. Where nobody does, all that there is stays."""
        ranges = cached_ranges(self.fd) if mincore_tells(self.fd) else asked_ranges(self.fd)
        if ranges is not None:
            return ranges
        self._is_known = False
        return [(0, os.fstat(self.fd).st_size)]

    def holds(self, start: int, end: int) -> bool:
        """Tell whether some of a part is known to have been there."""
        return bool(within(self.others, start, end)) and self._is_known

    def drop(self, start: int = 0, end: int = 1 << 62) -> None:
        """Let the page cache forget a part but for what others have there."""
        drop_pages(self.fd, self.others, start, end)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is read once, and leave the page cache as it was."""
    with open(path, "rb") as file:
        pages = PageCache(file.fileno())
        _ = pages.others  # asked before it is read
        yield file
        pages.drop()


# ---- Checkpoint: what is in the input folder, and its bytes ---------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it; its `nbytes` bytes, row-major, start at `offset` in `file`, but for
    tensors of a pickle that are not in one piece."""

    name: str
    dtype: str  # the safetensors name, such as "BF16"
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int | None
    stored: str = (
        ""  # the tensor of the file that this one is, or is a part of, where that has another name
    )
    start: int = 0  # bytes into that tensor
    stride: int = 0  # not 0: it lies transposed, its columns as many bytes apart

    @property
    def name_in_file(self) -> str:
        return self.stored or self.name

    def part(self, name: str, shape: tuple[int, int], start: int, stride: int = 0) -> TensorInfo:
        """Describe a matrix that begins `start` bytes into this tensor."""
        nbytes = math.prod(shape) * DTYPE_BITS[self.dtype] // 8
        offset = None if self.offset is None else self.offset + start
        return TensorInfo(
            name, self.dtype, shape, nbytes, self.file, offset, self.name_in_file, start, stride
        )


def read_header(path: Path) -> tuple[dict, int]:
    """Read the JSON header of a safetensors file, and where the tensors' bytes begin. ValueError if it has none."""
    with open(path, "rb") as file:
        header_size, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if header_size > min(100_000_000, size - 8):  # the library's own limit
            raise ValueError(f"{size:,} bytes with a header of {header_size:,}")
        text = file.read(header_size).decode()
    # An object with a name given twice stays a list of pairs.
    header = json.loads(
        text,
        object_pairs_hook=lambda pairs: dict(pairs) if len(dict(pairs)) == len(pairs) else pairs,
    )
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object, or names a tensor twice")
    return header, 8 + header_size


def read_tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Read what one safetensors file holds. Checks what the library checks (tensors without gap or overlap, their
    sizes, the file's length), and unique names; `safe_open` itself maps the file, which fails beyond the memory."""
    infos: dict[str, TensorInfo] = {}
    try:
        header, start = read_header(path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            try:
                dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
                whole = all(
                    type(number) is int and 0 <= number < 2**63 for number in [*shape, first, last]
                )
                # No tensor has more dimensions than torch allows; the product of millions would take minutes.
                if (
                    not whole
                    or len(shape) > 64
                    or math.prod(shape) * DTYPE_BITS[dtype] != (last - first) * 8
                ):
                    raise ValueError
                name.encode()
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"tensor {name!r} has no valid dtype, shape and offsets") from None
            infos[name] = TensorInfo(name, dtype, tuple(shape), last - first, path, start + first)
        for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
            if info.offset != start:
                raise ValueError(f"gap or overlap before tensor {info.name!r}")
            start += info.nbytes
        if start != path.stat().st_size:
            raise ValueError(f"{path.stat().st_size:,} bytes, {start:,} by its header")
    except (ValueError, RecursionError) as error:
        raise QuantizeError(
            f"{path}: not a whole safetensors file ({error}): copy or download it again"
        ) from None
    return infos


def refuse_pointer(path: Path) -> None:
    """Refuse a file that only tells Git LFS which one belongs there, as a clone without it leaves
    them."""
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        remedy = f"run git lfs pull in {path.parent}, or download the file again"
        raise QuantizeError(f"{path}: is a Git LFS pointer and not the file itself: {remedy}")


def read_json(path: Path) -> dict:
    """Read a JSON object."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QuantizeError(f"{path}: not valid JSON ({error})") from None
    except RecursionError:
        raise QuantizeError(
            f"{path}: objects and lists nested more than {MAX_JSON_DEPTH} deep"
        ) from None
    if not isinstance(value, dict):
        raise QuantizeError(f"{path}: must hold a JSON object")
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [part for whole in level for part in parts_of(whole)]
    if level:
        raise QuantizeError(f"{path}: objects and lists nested more than {MAX_JSON_DEPTH} deep")
    return value


def parts_of(value: dict | list) -> list[dict | list]:
    """List the objects and lists that a JSON value holds directly."""
    parts = value.values() if isinstance(value, dict) else value
    return [part for part in parts if isinstance(part, dict | list)]


IDLE_FILES: dict[WeightsFile, None] = {}  # that are open and nobody reads, the latest last
IDLE_FILES_LOCK = threading.RLock()


class WeightsFile:
    """A file of tensors, and what it and its pages were like when it was opened: safetensors, or a
    state dict saved by torch.save, of which nothing but tensors and plain containers is ever unpickled."""

    def __init__(self, path: Path):
        check_signals()
        if not path.is_file():
            raise QuantizeError(
                f"file {path} is {'not a regular one' if path.exists() else 'missing'}"
            )
        refuse_pointer(path)
        self.path = path
        self.state = path.stat().st_size, path.stat().st_mtime_ns  # before anything is read
        self._not_dropped = 0  # bytes of scattered reads since the last drop
        self.notes, self._tensors, self._factors = (
            [],
            {},
            {},
        )  # the last two of a pickle: see `resolve_quantizers`
        self.infos = (
            self._load_pickle()
            if path.suffix in (".bin", ".pth", ".pt")
            else read_tensor_infos(path)
        )
        self.fd: int | None = None  # see `_opened`
        self._direct_fd: int | None = None
        self._readers = 0
        self.pages: PageCache | None = None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Hold the file open. Of those that nobody reads, the last few stay so: a checkpoint may have more files than
        the system lets a process open."""
        with IDLE_FILES_LOCK:
            IDLE_FILES.pop(self, None)
            if self.fd is None:
                self._open()
            self._readers += 1
        try:
            yield
        finally:
            with IDLE_FILES_LOCK:
                self._readers -= 1
                if not self._readers:
                    IDLE_FILES[self] = None
                while len(IDLE_FILES) > MAX_IDLE_FILES:
                    longest = next(iter(IDLE_FILES))
                    longest._close_descriptors()

    def _open(self) -> None:
        self.fd = os.open(self.path, os.O_RDONLY)
        self.pages = self.pages or PageCache(self.fd)
        self.pages.fd = self.fd
        self.check_unchanged()
        with contextlib.suppress(OSError):  # a file system without
            self._direct_fd = os.open(self.path, os.O_RDONLY | O_DIRECT) if O_DIRECT else None

    def _close_descriptors(self) -> None:
        IDLE_FILES.pop(self, None)
        self.drop_read()
        for fd in {self.fd, self._direct_fd} - {None}:
            os.close(fd)
        self.fd = self._direct_fd = None

    def _load_pickle(self) -> dict[str, TensorInfo]:
        """Map a pickle's tensors, and find in the file those that lie there in one piece."""
        self._tensors, self._factors = resolve_quantizers(
            load_state_dict(self.path, self.notes), self.path, self.notes
        )
        with zipfile.ZipFile(self.path) as archive:
            orders = {
                archive.read(name).decode()
                for name in archive.namelist()
                if name.endswith("/byteorder")
            }
        # This process's maps: start, end, offset in the file (proc(5)); none where torch.load swapped bytes in memory.
        lines = re.findall(
            r"^(\w+)-(\w+) \S+ (\w+) \S+ [1-9]", Path("/proc/self/maps").read_text(), re.MULTILINE
        )
        maps = [[int(number, 16) for number in line] for line in lines if orders <= {sys.byteorder}]
        infos = {}
        for name, tensor in self._tensors.items():
            traits = tensor.layout, tensor.device.type, tensor.is_conj(), tensor.is_neg()
            if tensor.dtype not in DTYPE_NAMES or traits != (torch.strided, "cpu", False, False):
                kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}: only plain tensors with data can be read"
                raise QuantizeError(f"tensor {name!r} ({self.path.name}) is {kind}")
            at = tensor.data_ptr()
            offsets = (
                offset + at - start
                for start, end, offset in maps
                if start <= at <= end - tensor.nbytes
            )
            offset = (
                next(offsets, None)
                if tensor.is_contiguous() and name not in self._factors
                else None
            )
            dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
            infos[name] = TensorInfo(name, dtype, shape, tensor.nbytes, self.path, offset)
        return infos

    def check_unchanged(self, whole: bool = True) -> None:
        """Raise if the file was written to or replaced since it was opened, or its end is missing."""
        with IDLE_FILES_LOCK:
            places = [self.path] if self.fd is None else [self.fd, self.path]
            found = {(found.st_size, found.st_mtime_ns) for found in map(os.stat, places)}
        if found != {self.state} or not whole:
            advice = "let whatever writes to it finish, then give the same command again"
            raise QuantizeError(f"{self.path} changed while it was read: {advice}")

    def is_cached(self, info: TensorInfo, offset: int, nbytes: int) -> bool:
        """Tell whether some of a tensor's bytes were in the page cache before this run."""
        start = (info.offset or 0) + offset
        with self._opened():
            return self.pages.holds(start, start + nbytes)

    def read(
        self, info: TensorInfo, offset: int, nbytes: int, memory: memoryview | None = None
    ) -> memoryview:
        """Read a tensor's bytes, row-major, from `offset` on, and leave the page cache as it was. Returns a part of
        `memory`, which begins a page and has READ_MARGIN bytes more than are asked for."""
        memory = memoryview(bytearray(nbytes)) if memory is None else memory
        with self._opened():
            return self._read(info, offset, nbytes, memory)

    def _read(self, info: TensorInfo, offset: int, nbytes: int, memory: memoryview) -> memoryview:
        buffer, start = memory[:nbytes], (info.offset or 0) + offset
        in_one_piece, cached = (
            info.offset is not None and not info.stride,
            self.is_cached(info, offset, nbytes),
        )
        may_go_around = (
            in_one_piece and self._direct_fd is not None and len(memory) >= nbytes + READ_MARGIN
        )
        if may_go_around and start % 8 == 0 and not cached:
            with contextlib.suppress(OSError):  # some file systems open it so, and read it not
                if self._read_around(start, nbytes, memory):
                    skip = start % DIRECT_BLOCK
                    return memory[skip : skip + nbytes]
        (self._read_transposed if info.stride else self._read_line)(info, offset, buffer)
        self._not_dropped += 0 if in_one_piece else nbytes
        if in_one_piece:
            self.pages.drop(start, start + nbytes)
        elif (
            self._not_dropped >= SYNC_BYTES
        ):  # and not at once, since other rows lie in the same pages
            self.drop_read()
            self._not_dropped = 0
        return buffer

    def drop_read(self) -> None:
        """Let the page cache forget all that this run read, with the pages that two tensors share."""
        with IDLE_FILES_LOCK:
            if self.fd is not None and "others" in vars(self.pages):  # else nothing was read
                self.pages.drop()

    def _read_around(self, start: int, nbytes: int, memory: memoryview) -> bool:
        """Read bytes of the file around the page cache: whole blocks, from the start of `memory` on. Tells whether all
        could be read."""
        # A tenth of the processor's time of a read through the cache, which finds and frees each page. (open(2))
        skip = start % DIRECT_BLOCK
        end = -(-(skip + nbytes) // DIRECT_BLOCK) * DIRECT_BLOCK
        done = 0
        while done < skip + nbytes:
            check_signals()
            some = memory[done : min(done + COPY_BYTES, end)]
            count = os.preadv(self._direct_fd, [some], start - skip + done)
            done += count
            if count < len(some):  # the end of the file, which only the last block may pass
                break
        return done >= skip + nbytes

    def _read_line(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on, as the tensor's bytes lie, or by rows of one that is not in one piece."""
        if info.offset is None:
            self.check_unchanged()  # reading the map beyond the file's end would be a SIGBUS
            tensor, offset = torch.atleast_1d(self._tensors[info.name_in_file]), offset + info.start
            row_bytes = tensor.nbytes // len(tensor)
            first, skip = divmod(offset, row_bytes)
            rows = tensor[first : -(-(offset + len(buffer)) // row_bytes)]
            if info.name_in_file in self._factors:
                rows = (rows.to(torch.float32) * self._factors[info.name_in_file]).to(tensor.dtype)
            source = rows.contiguous().view(-1).view(torch.uint8)[skip : skip + len(buffer)]
            torch.frombuffer(buffer, dtype=torch.uint8).copy_(source)
            return
        position = info.offset + offset
        # As fast from the page cache as a map, and where the file is truncated or fails, an error and not a SIGBUS.
        with naming(self.path):
            while buffer and (count := os.preadv(self.fd, [buffer[:COPY_BYTES]], position)):
                check_signals()
                buffer, position = buffer[count:], position + count
        if buffer:
            self.check_unchanged(whole=False)

    def _read_transposed(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from a tensor that lies transposed: of each column, the part that is in these rows."""
        columns, dtype = (
            info.shape[1],
            getattr(torch, f"int{DTYPE_BITS[info.dtype]}"),
        )  # which keeps all bits
        row_bytes = columns * dtype.itemsize
        first, skip = divmod(offset, row_bytes)
        width = -(-(skip + len(buffer)) // row_bytes) * dtype.itemsize
        lines = memoryview(bytearray(columns * width))
        for column in range(columns):
            line = lines[column * width : (column + 1) * width]
            self._read_line(info, column * info.stride + first * dtype.itemsize, line)
        source = (
            torch.frombuffer(lines, dtype=dtype)
            .view(columns, -1)
            .T.contiguous()
            .view(-1)
            .view(torch.uint8)
        )
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(source[skip : skip + len(buffer)])

    def close(self) -> None:
        self._tensors.clear()  # pages that are mapped cannot be dropped
        with IDLE_FILES_LOCK:
            self._close_descriptors()


def load_state_dict(path: Path, notes: list[str]) -> dict[str, torch.Tensor]:
    """Load the tensors of a pickled state dict, mapped and not read, and make notes on what else it held."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        problem = (
            f"would run {culprit[1]} when opened" if culprit else "is no pickle of tensors alone"
        )
        raise QuantizeError(
            f"{path} {problem}, and only tensors are read: save model.state_dict() alone"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise QuantizeError(
            f"{path}: not a whole torch checkpoint ({problem}): copy or save it again"
        ) from None
    if not isinstance(content, Mapping):
        raise QuantizeError(
            f"{path} holds a {type(content).__name__}, not a state dict: save model.state_dict()"
        )
    wrappers = (
        key for key in ("state_dict", "model", "model_state_dict", "module") if key in content
    )  # trainers'
    if wrapper := next((key for key in wrappers if isinstance(content[key], Mapping)), None):
        if beside := [key for key in content if key != wrapper]:
            notes.append(
                f"{path.name}: only {wrapper!r} is read; beside it are {quote_names(beside)}"
            )
        content = content[wrapper]
    tensors = {
        str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)
    }
    if nested := [str(name) for name, value in content.items() if isinstance(value, Mapping)]:
        raise QuantizeError(
            f"{path}: {nested[0]!r} is a dict inside the state dict: save model.state_dict() alone"
        )
    if others := [str(name) for name in content if str(name) not in tensors]:
        notes.append(f"{path.name}: left out, since they are no tensors: {quote_names(others)}")
    return tensors


def resolve_quantizers(
    state_dict: dict[str, torch.Tensor], path: Path, notes: list[str]
) -> tuple[dict, dict]:
    """Undo what ModelOpt (0.25 to 0.33) did to a state dict before its export failed, with a note.

    Returns the model's own tensors, and for some weights a float32 factor for each column. `_amax` records what was
    seen and changes nothing. AWQ divided each weight's columns by `input_quantizer._pre_quant_scale`, so they are
    multiplied back; with a `weight_quantizer._pre_quant_scale` too, the two cancel. Anything else is refused."""
    tensors = {
        name: data
        for name, data in state_dict.items()
        if not re.search(r"quantizer(\.\d+)?\._\w+$", name)
    }
    quantizers, factors = state_dict.keys() - tensors.keys(), {}
    known = {name for name in quantizers if name.endswith("._amax")}
    for name in quantizers:
        module = name.removesuffix(".input_quantizer._pre_quant_scale")
        weight, twin = (
            tensors.get(f"{module}.weight"),
            f"{module}.weight_quantizer._pre_quant_scale",
        )
        if weight is not None and weight.dim() == 2 and state_dict[name].numel() == weight.shape[1]:
            factors[f"{module}.weight"] = scale = state_dict[name].to(torch.float32).flatten()
            if not (torch.isfinite(scale) & (scale > 0)).all():
                raise QuantizeError(
                    f"tensor {name!r} ({path.name}): scales must be positive and finite to be undone"
                )
            known |= {name, twin}
    if unknown := sorted(quantizers - known):
        problem = (
            f"tensors of quantizers whose effect on the weights is unknown, {quote_names(unknown)}"
        )
        raise QuantizeError(f"{path.name}: {problem}: give the checkpoint from before ModelOpt")
    cancelled = [
        factors.pop(name)
        for name in [*factors]
        if f"{name}_quantizer._pre_quant_scale" in quantizers
    ]
    if quantizers:
        scales = f"multiplied back into {len(factors):,} weights, cancelled in {len(cancelled):,}"
        notes.append(
            f"ModelOpt's quantizer tensors are dropped: {len(quantizers):,}; pre_quant_scale {scales}"
        )
    return tensors, factors


class Checkpoint:
    """The tensors of an input folder, in file order, and the door to their bytes, however they are stored."""

    def __init__(self, folder: Path, config_folder: Path | None = None):
        """Open a folder's weights, and config.json there or in another folder."""
        for path in filter(None, (folder, config_folder)):
            if denied := why_unreadable(path):
                raise QuantizeError(f"folder {path}: {denied}")
            if inside := snapshots_in(path):
                more = f" (of {len(inside)} snapshots there)" if len(inside) > 1 else ""
                problem = "is of the hub's cache: give the model's folder inside it"
                raise QuantizeError(f"folder {path} {problem}, {inside[0]}{more}")
            if not path.is_dir():
                problem = "is a file, give its folder" if path.exists() else "no such folder"
                if not path.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", str(path)):
                    problem += f"; from the hub: hf download {path} --local-dir {path.name}, then give {path.name}"
                raise QuantizeError(f"folder {path}: {problem}")
        names, weight_map = find_weights(folder)
        with (
            contextlib.ExitStack() as opened
        ):  # if one cannot be read, those before it are closed again
            files = [
                opened.enter_context(contextlib.closing(WeightsFile(folder / name)))
                for name in names
            ]
            self.close = opened.pop_all().close
        self.folder = folder
        one_folder = config_folder is None or config_folder.resolve() == folder.resolve()
        self.config_folder = config_folder = (
            folder if one_folder else config_folder
        )  # of all that is copied, too
        self.files = {file.path: file for file in files}
        self.sources = {file.path.name: list(file.state) for file in files}  # sizes and times
        self.tensors: dict[str, TensorInfo] = {}
        self.notes = [note for file in files for note in file.notes]
        for name, info in (item for file in files for item in file.infos.items()):
            if weight_map.get(name, info.file.name) != info.file.name:
                continue  # the index takes it from another shard
            if name in self.tensors:
                both = f"{self.tensors[name].file.name} and {info.file.name}"
                raise QuantizeError(
                    f"tensor {name!r} is in both {both}, and no index says which counts: remove one"
                )
            self.tensors[name] = info
        if not self.tensors:
            raise QuantizeError(f"{folder}: {quote_names(self.sources)} hold no tensors")
        if lost := [name for name in weight_map if name not in self.tensors]:
            raise QuantizeError(
                f"{folder}: the index puts {lost[0]!r} in {weight_map[lost[0]]}, which lacks it"
            )
        if unlisted := [name for name in self.tensors if weight_map and name not in weight_map]:
            self.notes.append(
                f"{count_of(len(unlisted), 'tensor')} in shards but not in the index:"
                f" {quote_names(unlisted)}"
            )
        self.has_config = (config_folder / CONFIG_NAME).exists()
        self.config = read_json(config_folder / CONFIG_NAME) if self.has_config else {}
        self.quantization = find_quantization(config_folder, self.config)
        if (config_folder / ADAPTER_CONFIG_NAME).exists():
            problem = "is not copied: loaders would take the folder for an adapter's"
            self.notes.append(f"{ADAPTER_CONFIG_NAME} {problem}")
        if odd := odd_config_values(self.config):
            problem = "values that are not of the kind that belongs there and are not used"
            self.notes.append(f"{CONFIG_NAME} has {problem}: {', '.join(odd)}")
        if not self.has_config:
            self.notes.append(
                f"no {CONFIG_NAME} in {config_folder}, without which no loader knows it: --config_dir"
            )
        self._drop_wrappers()

    def _drop_wrappers(self) -> None:
        """Leave out of the names what training wrapped around the model: it holds nothing, and no loader knows it."""
        averaged = all(name == "n_averaged" or name.startswith("module.") for name in self.tensors)
        if averaged and self.tensors.pop("n_averaged", None):
            self.notes.append("left out 'n_averaged', which counts an AveragedModel's steps")
        dropped = Counter(
            match[2] for name in self.tensors for match in WRAPPER_PATTERN.finditer(name)
        )
        parts = {name: WRAPPER_PATTERN.sub("", name).split(".") for name in self.tensors}
        # What stands before every name may be data parallelism's `module`s, or whatever a whole language model, body
        # and head, was put into; but a model's part where config.json has configs for these, as Qwen-Omni's `thinker`.
        shared = os.path.commonprefix([part[:-1] for part in parts.values()])  # noqa: RUF071 - of lists
        nested = any(
            isinstance(value, dict) and key.endswith("_config")
            for key, value in self.config.items()
        )
        if nested or {part[len(shared)] for part in parts.values()} != {"model", "lm_head"}:
            shared = list(itertools.takewhile("module".__eq__, shared))
        dropped.update(shared * len(parts))
        if not dropped:
            return
        names = {name: ".".join(part[len(shared) :]) for name, part in parts.items()}
        counts = Counter(names.values())
        if twins := [name for name in names if counts[names[name]] > 1]:
            raise QuantizeError(TWO_COPIES.format(quote_names(twins)))
        self.tensors = {
            short: replace(self.tensors[name], name=short, stored=name)
            for name, short in names.items()
        }
        wrappers = ", ".join(
            f"'{wrapper}.' ({count:,} times)" for wrapper, count in dropped.items()
        )
        self.notes.append(
            f"dropped from the tensors' names, as what training wrapped around the model: {wrappers}"
        )

    def read(
        self, info: TensorInfo, offset: int, nbytes: int, memory: memoryview | None = None
    ) -> memoryview:
        """Read a tensor's bytes: see `WeightsFile.read`."""
        return self.files[info.file].read(info, offset, nbytes, memory)


def snapshots_in(folder: Path) -> list[Path]:
    """List the models' folders in a folder of the hub's cache, the one that `main` means first;
    none in any other."""
    if (folder / CONFIG_NAME).exists() or not folder.is_dir():
        return []
    model = folder.parent if folder.name == "snapshots" else folder
    models = [model, *sorted(folder.glob("models--*"))]
    snapshots = []
    for cached in models:
        main = cached / "refs" / "main"
        revision = main.read_text().strip() if main.is_file() else ""
        found = [path for path in (cached / "snapshots").glob("*") if path.is_dir()]
        snapshots += sorted(found, key=lambda path: (path.name != revision, path.name))
    return snapshots


def find_weights(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Name the files of the weights, safetensors rather than pickles, and read their index, if there is one."""
    names = sorted(
        path.name for path in folder.iterdir() if not path.name.startswith((".", "adapter_"))
    )
    safetensors = [name for name in names if name.endswith(".safetensors")]
    # Mistral's own copy of the weights beside Hugging Face's. `plan_other_files` names what is left out.
    safetensors = [
        name for name in safetensors if not name.startswith("consolidated")
    ] or safetensors
    pickles = [name for name in names if re.search(r"^pytorch_model.*\.bin$|\.pth?$", name)]
    pickles = [name for name in pickles if not TRAINER_PATTERN.search(name)]
    index = folder / (
        INDEX_NAME if safetensors or INDEX_NAME in names else "pytorch_model.bin.index.json"
    )
    if index.exists():
        weight_map = read_weight_map(index, [*safetensors, *pickles])
        return sorted(set(weight_map.values())), weight_map
    found = safetensors or [name for name in pickles if name.endswith(".bin")] or pickles
    problem = "" if found else "no *.safetensors, pytorch_model*.bin, *.pth or *.pt in it"
    inside = []
    for pattern in () if found else ("*/*.safetensors", "*/pytorch_model*.bin"):
        inside += [path.parent for path in folder.glob(pattern)]
    others = [name for name in names if name.endswith((".ckpt", ".bin")) and not found]
    if (folder / ADAPTER_CONFIG_NAME).exists() and not found:
        problem += ": it holds a LoRA adapter, merge that into its base model first"
    elif others:
        problem += f": if {others[0]!r} is the model's state dict, name it model.pth"
    elif inside and not found:
        problem += f", but some in {sorted(inside)[0]}: give that folder if it is the model"
    sets = {re.sub(r"\d+(?=-of-\d+\.)", "*", name): name for name in found}
    whole = r"-of-\d+\.|^(pytorch_)?model\.|\.pth?$"  # in names of a whole model or rank, or of its numbered parts
    if len(sets) > 1 and re.search(whole, "\n".join(found), re.MULTILINE):
        problem = f"{quote_names(sets)} are two sets of weights, or of several ranks: leave one, or merge them"
    for pattern, name in sets.items():
        if part := re.search(r"(\d+)-of-0*(\d{1,5})\.\w+$", name):
            parts = [
                pattern.replace("*", f"{number:0{len(part[1])}}")
                for number in range(1, int(part[2]) + 1)
            ]
            if missing := [name for name in parts if name not in found]:
                problem = problem or f"{quote_names(missing)} of {part[2]} missing: copy it again"
    if problem:
        raise QuantizeError(f"input folder {folder}: {problem}")
    return found, {}


def read_weight_map(index: Path, names: list[str]) -> dict[str, str]:
    """Read an index, tensor name -> file name; all files must lie beside it, where files of these names do."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QuantizeError(f"{index}: has no weight_map of tensor names to file names")
    for name, file in weight_map.items():
        if not re.fullmatch(r"[^/\\\0]+\.(safetensors|bin|pth?)", str(file)):
            raise QuantizeError(
                f"{index}: {name!r} is in {file!r}, no file of this folder that may hold tensors"
            )
    missing = sorted(
        file for file in set(weight_map.values()) if not (index.parent / file).exists()
    )
    if not missing:
        return weight_map
    # Other files may have all the weights, as after a save into an old folder.
    found, remedy, others = (
        set(),
        "copy or download it again",
        sorted({*names} - {*weight_map.values()}),
    )
    for name in others:
        with (
            contextlib.suppress(QuantizeError),
            contextlib.closing(WeightsFile(index.parent / name)) as file,
        ):
            found |= file.infos.keys()
    if weight_map.keys() <= found:
        remedy = f"it may be stale, since {quote_names(others)} have all its tensors: remove it if they are the model"
    raise QuantizeError(f"{index} names {missing[0]}, which is missing: {remedy}")


# ---- Architectures: stacks of experts, and what a tensor is for -----------------------------------------------------

# Names of weights, by the convention of the architectures on the hub; `find_kinds` finds others by shape and place.
EMBEDDING_NAME = (
    r"(^|\.)(\w*embed(?!_out)\w*(\.(shard_)?\d+)?|wte|wpe|\w+_bias|\w*pos_emb|\w+_token|query_\d+\w*)\.weight$"
    r"|^(\w+\.)?shared\.weight$"
)
HEAD_NAME = r"(^|\.)(lm_head|embed_out|score|classifier|output_layer|shared_head\.head)\.weight$|^output\.weight$"
ROUTER_NAME = r"(^|\.)(gate|router|shared_expert_gate)(\.\w+)?\.weight$"
NO_ROUTER = r"_proj$|^(shared_|self_)|attn|attention|(^|\.)mlp(\.|$)|experts"
HEAD_WORDS = r"head|output|logits|unembed|classifier|score"
VOCABULARY_WORDS = r"head|output_layer|logits|embed|vocab|wte"
NO_WORDS = r"pos|wpe|type|bias"  # in the name of an embedding of something else
EXTRA_WORDS = 64  # rows that an embedding or head may have beyond vocab_size
LAYER_KINDS = (  # for the tables; the first that matches
    ("experts", r"\.experts\.\d+\."),
    ("shared experts", r"\.shared_experts?\."),
    ("attention", r"attn|attention|\.[qkvo]_proj\.|qkv|\.w[qkvo]\."),
    ("Mamba", r"\.(in_proj|out_proj|x_proj|dt_proj)\.|mamba|ssm"),
    (
        "MLP",
        r"mlp|ffn|feed_forward|(gate|up|down)_proj|fc\d|dense_(h_to|4h)|\.(w[123]|wi|wo)(_\d)?\.",
    ),
)
EXPERT_COUNTS = (
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "moe_num_experts",
)  # in config.json
EXPERT_WIDTHS = (
    "moe_intermediate_size",
    "intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
)


@dataclass(frozen=True)
class Oddity:
    """Say what sets models of some types apart from what most checkpoints' names and shapes tell.

    `projections` and `renames` turn names of `model.state_dict()`, which has stacks of experts, into those that
    `save_pretrained` writes and vLLM 0.29.0 alone knows (its models' `ckpt_*_proj_name`)."""

    model_types: str  # separated by blanks
    projections: tuple[str, ...] = ()  # of an expert: gate (nothing where it has none), up and down
    renames: tuple[tuple[str, str], ...] = ()  # what else has another name: pattern, replacement
    whole_in_vllm: bool = True  # whether vLLM also reads the stacks as they are
    linear_experts: bool = (
        False  # each is an nn.Linear in transformers, as soon as anything is quantized
    )
    conv1d: bool = False  # the layers' weights lie as (in, out)
    problem: str = ""  # why stacks of experts are not read as one weight an expert
    problem_of_engines: str = (
        ""  # the same, where an engine is to load what comes of it; {}: the model's type
    )
    remedy: str = ""  # if it is another than to exclude the stacks
    # What transformers calls tensors once it has loaded them: a pattern of their names in files and its replacement, in
    # turn; several where it splits one, with a | between; nothing where other names than the pattern's decide.
    in_memory: tuple[tuple[str, str], ...] = ()
    computed: str = ""  # pattern of weights that it also joins or permutes as it loads them
    halved: str = (
        ""  # pattern of names that tell files with half of the layers that config.json counts
    )

    @property
    def tells_experts(self) -> bool:
        """Whether this row says how loaders know the experts of its types."""
        return bool(self.projections or self.problem or self.problem_of_engines)

    def projections_of(self, role: str) -> tuple[str, ...]:
        """Name the weights of a stack, in their order."""
        gate, up, down = self.projections or GATED
        return {
            "gate_up_proj": (gate, up),
            "gate_proj": (gate,),
            "up_proj": (up,),
            "down_proj": (down,),
        }[role]

    def renamed(self, name: str) -> str:
        """Rename a tensor of a state dict as `save_pretrained` does."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


GATED, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
SPARSE_BLOCK = (r"\.mlp\.", ".block_sparse_moe.")
TO_Q_K_V = (
    (r"\.self_attn\.to_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.self_attn\.to_out\.", ".self_attn.o_proj."),
)
FORGET_GATE = (r"self_attn\.f_([ab])_proj\.", r"self_attn.forget_gate.f_\1_proj.")
MLP1 = (
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
)
# What transformers 5.24.0 renames as it loads a model (conversion_mapping.py), as far as it has layers of its own under
# these names and not the wrappers around them alone. (tests/test_model_types.py compares the two, type by type.)
RENAMED_WHEN_LOADED = (
    Oddity(
        "axk2",
        in_memory=(
            ("W_down", "mlp.fc1"),
            ("W_up", "mlp.fc2"),
            (r"self_attn\.q_b_proj\.", "self_attn.q_gate_proj."),
        ),
    ),
    Oddity(
        "bailing_hybrid sarvam_moe",
        in_memory=(
            (r"\.attention\.", ".self_attn."),
            (r"\.query_key_value\.", ".q_proj.|.k_proj.|.v_proj."),
            (r"self_attn\.f_proj\.", "self_attn.forget_gate.f_proj."),
            (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        ),
    ),
    Oddity("cosmos3_omni", in_memory=TO_Q_K_V),
    Oddity(
        "cosmos3_edge",
        in_memory=(
            *TO_Q_K_V,
            (r"\.mlp\.up_proj\.", ".mlp.fc1."),
            (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        ),
    ),
    Oddity(
        "deepseek_v4",
        in_memory=(
            (r"\.attn\.", ".self_attn."),
            (r"\.ffn\.", ".mlp."),
            (r"\.indexer\.compressor\.", ".compressor.indexer."),
            (r"\.indexer\.weights_proj\.", ".compressor.indexer.scorer.weights_proj."),
            (r"\.indexer\.wq_b\.", ".compressor.indexer.q_b_proj."),
            (r"\.w(q_a|q_b|kv)\.", r".\1_proj."),
            (r"\.wgate\.", ".gate_proj."),
            (r"\.wo_([ab])\.", r".o_\1_proj."),
            (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
            (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
            (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
        ),
    ),
    Oddity(
        "dory",
        in_memory=((r"\.mixer\.", ""), (r"\.self_attn\.g_proj\.", ".self_attn.gate_proj.")),
        halved=r"\.(self_attn|mlp)\.",  # an attention block and an MLP are one layer, and two in config.json
    ),
    Oddity(
        "dots3_note dots3_note_audio_encoder dots3_note_vision_encoder",
        in_memory=(
            (r"audio_adapter\.|dots_encoder\.", ""),
            (r"(blocks\.\d+\.mlp)\.fc1\.", r"\1.gate_proj."),
            (r"(blocks\.\d+\.mlp)\.fc2\.", r"\1.down_proj."),
            (r"(blocks\.\d+\.mlp)\.fc3\.", r"\1.up_proj."),
        ),
    ),
    Oddity(
        "exaone",
        in_memory=(
            (r"^transformer\.h\.", "model.layers."),
            (r"\.attn\.attention\.", ".self_attn."),
            (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.mlp\.c_fc_0\.", ".mlp.gate_proj."),
            (r"\.mlp\.c_fc_1\.", ".mlp.up_proj."),
            (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
        ),
    ),
    Oddity(
        "ernie4_5_vl_moe",
        in_memory=(
            (r"(spatial|temporal)_linear\.0\.", r"\1_linear.fc1."),
            (r"(spatial|temporal)_linear\.2\.", r"\1_linear.fc2."),
        ),
    ),
    Oddity("glm5_next glm5_next_text", in_memory=(FORGET_GATE,)),
    Oddity(
        "gte",
        in_memory=(
            (r"encoder\.layer\.", "layers."),
            (r"attention\.o_proj", "self_attn.o_proj"),
            (r"attention\.qkv_proj", "self_attn.q_proj|self_attn.k_proj|self_attn.v_proj"),
            (r"mlp\.up_gate_proj", "mlp.up_proj|mlp.gate_proj"),
        ),
    ),
    Oddity(
        "hrm_text",
        in_memory=(
            (r"mlp\.gate_up_proj\.", "mlp.gate_proj.|mlp.up_proj."),
            (
                r"\.attn\.gqkv_proj\.",
                ".self_attn.gate_proj.|.self_attn.q_proj.|.self_attn.k_proj.|.self_attn.v_proj.",
            ),
            (r"\.attn\.o_proj\.", ".self_attn.o_proj."),
        ),
    ),
    Oddity("hy_v3", in_memory=((r"mlp\.shared_mlp\.", "mlp.shared_experts."),)),
    Oddity(
        "hy_v4 hy_v4_vl hy_v4_vl_text hunyuan_vl",
        in_memory=(
            (r"\.linear_gate\.", ".gate_proj."),
            (r"mlp\.dense_h_to_4h", "mlp.fc1"),
            (r"mlp\.dense_4h_to_h", "mlp.fc2"),
            (r"perceive\.", "patch_merger."),
        ),
    ),
    Oddity("hyperclovax_vision_v2", in_memory=((r"\.vision_projector\.", ".projector."),)),
    Oddity(
        "inkling_mm_model inkling2 inkling2_text inkling2_loop inkling2_loop_text",
        in_memory=(
            (r"\.(attn\.\w+_\w+|controllers\.\w+)\.\w*weight$|sconv\.weight_proj$", ""),
            (r"visual\..*linear_\d|\.mlp\.c_(fc|proj)\.|\.proj_(in|out)\.", ""),
            (r"mlp\.w13_dn\.", "mlp.gate_proj.|mlp.up_proj."),
            (r"mlp\.w2_md\.", "mlp.down_proj."),
            (r"\.unembed\.", ".lm_head."),
        ),
    ),
    Oddity("jev", in_memory=(("^weight$", "proj.weight"),)),
    Oddity(
        "nomic_bert",
        in_memory=(("fc11", "up_proj"), ("fc12", "gate_proj"), ("fc2", "down_proj")),
    ),
    Oddity(
        "jina_embeddings_v3 nomic_bert",
        in_memory=(
            (r"encoder\.layers", "layers"),
            (r"(attn|mixer)\.out_proj", "self_attn.o_proj"),
            (r"(attn|mixer)\.Wqkv", "self_attn.q_proj|self_attn.k_proj|self_attn.v_proj"),
        ),
    ),
    Oddity(
        "kimi_k25",
        in_memory=(
            (r"\.mlp\.fc1\.", ".mlp.fc2."),
            (r"\.mlp\.fc0\.", ".mlp.fc1."),
            (r"blocks\.(\d+)\.wo\.", r"blocks.\1.attn.proj."),
            (r"\.wqkv\.", ".attn.q_proj.|.attn.k_proj.|.attn.v_proj."),
            (r"mm_projector\.proj\.0", "mm_projector.in_proj"),
            (r"mm_projector\.proj\.2", "mm_projector.out_proj"),
            (r"vision_tower\.encoder\.", "vision_tower."),
            ("blocks", "layers"),
        ),
    ),
    Oddity(
        "kimi_linear",
        in_memory=(FORGET_GATE, (r"\.block_sparse_moe\.", ".mlp.")),
    ),
    Oddity("laguna", in_memory=((r"mlp\.shared_expert\.", "mlp.shared_experts."),)),
    Oddity(
        "lara_mini",
        in_memory=((r"\.in_proj\.", ".in_proj_qkv.|.in_proj_z.|.in_proj_b.|.in_proj_a."),),
    ),
    Oddity("lfm3 lfm3_vl", in_memory=((r"\.self_attn\.gate_proj\.", ".self_attn.g_proj."),)),
    Oddity("lfm3_vl_vision", in_memory=(("patchifier", "patch_embed"),)),
    Oddity(
        "minimax_m3_vl",
        in_memory=(
            (r"\.block_sparse_moe\.(gate|shared_experts)\.", r".mlp.\1."),
            (r"\.self_attn\.index_([qk])_proj\.", r".self_attn.indexer.\1_proj."),
            (r"\.(gate|up)_proj\.weight", ".gate_up_proj.weight"),
            (r"^patch_merge_mlp\.linear_(\d)\.", r"multi_modal_projector.merge_linear_\1."),
        ),
        computed=r"\.(gate|up)_proj\.weight$",
    ),
    Oddity(
        "mistral_large4 mistral_large4_text",
        in_memory=(
            (r"\.wv\.", ".v_proj."),
            (r"\.wo\.", ".o_proj."),
            (r"\.wkv_a_with_mqa\.", ".kv_a_proj_with_mqa."),
            (r"\.wkv_b\.", ".kv_b_proj."),
            (r"\.wq\.", ".q_proj."),
            (r"attention\.wk\.", "attention.k_proj."),
            (r"\.(feed_forward|shared_experts)\.w1\.", r".\1.gate_proj."),
            (r"\.(feed_forward|shared_experts)\.w2\.", r".\1.down_proj."),
            (r"\.(feed_forward|shared_experts)\.w3\.", r".\1.up_proj."),
            (r"(^|\.)layers\.(\d+)\.shared_experts\.", r"\1layers.\2.mlp.shared_experts."),
            (r"^(?!.*vision)(.*\.)feed_forward\.", r"\1mlp."),
            (r"^(?!.*vision)(.*\.)attention\.", r"\1self_attn."),
            (r"\.w_in\.", ".linear_1."),
            (r"\.w_out\.", ".linear_2."),
        ),
        computed=r"^vision_encoder\..*\.w[qk]\.",
    ),
    Oddity(
        "molmo2 molmo2_text",
        in_memory=(
            (r"self_attn\.att_proj", "self_attn.q_proj|self_attn.k_proj|self_attn.v_proj"),
            (r"self_attn\.attn_out", "self_attn.o_proj"),
            (r"mlp\.ff_proj", "mlp.up_proj|mlp.gate_proj"),
            (r"mlp\.ff_out", "mlp.down_proj"),
            (r"\.transformer\.(res)?blocks\.", ".layers."),
            (r"\.attention\.w([qkvo])", r".self_attn.\1_proj"),
            (r"\.feed_forward\.w1", ".mlp.fc1"),
            (r"\.feed_forward\.w2", ".mlp.fc2"),
            (r"image_pooling_2d\.w([qkvo])", r"image_pooling_2d.\1_proj"),
            (r"image_projector\.w1", "image_projector.gate_proj"),
            (r"image_projector\.w2", "image_projector.down_proj"),
            (r"image_projector\.w3", "image_projector.up_proj"),
        ),
    ),
    Oddity(
        "nemo_speechlm",
        in_memory=(
            (r"^perception\.proj\.", "multi_modal_projector."),
            (r"^(perception|ctc_timestamp)\.", ""),
        ),
        computed=r"\.attn\.w_qkv\.",
    ),
    Oddity("nemotron_h_omni NemotronH_Omni_Reasoning_V3", in_memory=MLP1),
    Oddity(
        "phimoe",
        in_memory=((r"\.block_sparse_moe\.gate\.weight", ".mlp.router.weight"),),
    ),
    Oddity(
        "qianfan_ocr",
        in_memory=(
            *MLP1,
            (r"(layers\.\d+)\.attn\.proj\.", r"\1.attention.projection_layer."),
            (r"attn\.qkv\.", "attention.q_proj.|attention.k_proj.|attention.v_proj."),
        ),
    ),
    Oddity(
        "radio",
        in_memory=(
            (r"\.patch_generator\.video_embedder\.", ".embeddings.video_patch_projection."),
            (r"\.patch_generator\.embedder\.", ".embeddings.patch_projection."),
            (r"radio_model\.model\.blocks", "encoder.layer"),
            (r"attn\.proj", "attention.o_proj"),
            (r"attn\.qkv", "attention.q_proj|attention.k_proj|attention.v_proj"),
        ),
    ),
    Oddity(
        "step3p7 step3p5_vision",
        in_memory=(
            (r"\.share_expert\.", ".mlp.shared_experts."),
            (r"vit_large_projector", "multi_modal_projector"),
            (r"transformer\.resblocks\.", "layers."),
            (r"\.mlp\.c_fc\.", ".mlp.fc1."),
            (r"\.mlp\.c_proj\.", ".mlp.fc2."),
            (r"\.attn\.", ".self_attn."),
            (r"attn\.in_proj_weight", "attn.q_proj.weight|attn.k_proj.weight|attn.v_proj.weight"),
        ),
    ),
    Oddity("timesfm2_5", in_memory=(("ff0", "fc1"), ("ff1", "fc2"))),
    Oddity("ultrabert", in_memory=((r"^cls\.", "head.decoder."),)),
    Oddity("ultravbert", in_memory=((r"^head\.decoder\.", "lm_head."),)),
    Oddity(
        "deepseek_ocr2 unlimited_ocr unlimited_ocr_sam_vision_model unlimited_ocr_vision"
        " unlimited_ocr_vision_encoder",
        in_memory=(
            (r"(^|\.)blocks\.", r"\1layers."),
            (r"(^|\.)transformer\.", r"\1encoder."),
            (r"qkv_proj\.weight", "q_proj.weight|k_proj.weight|v_proj.weight"),
            (r"projector\.layers\.", "multi_modal_projector."),
        ),
    ),
    # Encoders of images and sound, in whose files layers have altogether other names
    Oddity(
        "cohere_asr",
        in_memory=((r"log_softmax\.mlp\.layer0", "proj_out"), (r"encoder|decoder", "")),
    ),
    Oddity("gradium_phonon_tts", in_memory=((r"^flow_lm\.", ""),), computed=r"in_proj\."),
    Oddity("tipsv2_dpt", in_memory=((r"_head\.", ""),)),
    Oddity(
        "altclip audio-spectrogram-transformer beit conditional_detr d_fine deformable_detr deit depth_pro"
        " detr dinov2 dinov2_with_registers ijepa lw_detr lw_detr_vit maskformer pixio"
        " pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4 rf_detr rf_detr_dinov2 rt_detr rt_detr_v2 sapiens2"
        " segformer swin tipsv2 tipsv2_text_model tipsv2_vision_model vit vit_mae vit_msn vivit",
        in_memory=((r"\.\d+\.", ""),),
        computed=r"in_proj\.|qkv\.|weights_in\.|\.w12\.",
    ),
)
ODDITIES = (
    # Names of experts: transformers 5.24.0, conversion_mapping.py, which is for loading and so runs the other way. Each
    # type there has a row (tests/test_model_types.py): stacks of a type without one are refused for engines.
    Oddity(
        "afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 dots3_note_text flex_olmo glm4_moe"
        " glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe jamba longcat_flash mellum olmoe qwen2_moe qwen3_moe qwen3_next qwen3_5_moe"
        " qwen3_5_moe_text qwen3_omni_moe qwen3_omni_moe_thinker qwen3_omni_moe_text qwen4_exp qwen4_exp_text"
        " sarvam_mla solar_open unlimited_ocr_text",
        GATED,
    ),
    Oddity("nemotron_h", ("", "up_proj", "down_proj"), whole_in_vllm=False),
    Oddity("ernie4_5_moe", GATED, ((r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics."),)),
    Oddity("llama4 llama4_text", GATED, whole_in_vllm=False, linear_experts=True),  # and transposed
    Oddity("lfm2_moe", MIXTRAL, whole_in_vllm=False),
    Oddity("mixtral minimax minimax_m2", MIXTRAL, (SPARSE_BLOCK,), whole_in_vllm=False),
    Oddity(
        "phimoe",
        MIXTRAL,
        ((r"\.mlp\.router\.weight$", ".mlp.gate.weight"), SPARSE_BLOCK),
        whole_in_vllm=False,
    ),
    # transformers 5.24.0: gpt_oss slices `[..., ::2]`; the others' conversions say Interleave, or their models slice so
    Oddity(
        "gpt_oss openai_privacy_filter inkling_mm_model inkling_text inkling2 inkling2_text inkling2_loop"
        " inkling2_loop_text",
        problem="with gate and up rows that alternate",
    ),
    # Stacks are what the hub has, too, and transformers 5.24.0 reads no other form.
    Oddity(
        "aria aria_text dbrx deepseek_ocr2_text diffusion_gemma diffusion_gemma_text ernie4_5_vl_moe_text gemma4"
        " gemma4_text glm4v_moe_text granitemoe granitemoe_swa granitemoehybrid granitemoeshared hy_v4 hy_v4_vl"
        " hy_v4_vl_text jetmoe lara_mini minimax_m3_vl_text mistral4 muse_spark muse_spark_text qwen3_vl_moe"
        " qwen3_vl_moe_text step3p5 step3p7 zaya",
        problem_of_engines="as loaders know {} alone: transformers would leave separate experts random",
    ),
    # Here `save_pretrained` (transformers 5.24.0) gives other names to much more than experts.
    Oddity(
        "axk1 axk2 bailing_hybrid deepseek_ocr2 deepseek_v4 dots3_note dots3_note_vision_encoder ernie4_5_vl_moe"
        " exaone_moe flint glm5_next glm5_next_text hy_v3 kimi_k25 kimi_linear kolibri1 laguna mimo_v2_flash"
        " minimax_m3_vl mistral_large4 mistral_large4_text sarvam_moe unlimited_ocr",
        problem_of_engines="named as in model.state_dict(), where {} has other names than loaders know",
        remedy="save it with model.save_pretrained()",
    ),
    *RENAMED_WHEN_LOADED,
    # transformers 5.24.0: what uses Conv1D of pytorch_utils
    Oddity("clvp clvp_decoder gpt2 openai-gpt imagegpt decision_transformer", conv1d=True),
)


def config_values(config: dict, *keys: str) -> list:
    """List what config.json says under any of `keys`, then its language model's config (`text_config` and alike)."""
    named = (
        config.get(key) for key in keys
    )  # lists, as ERNIE's of experts for text and for images, one by one
    values = [
        v
        for value in named
        for v in (value if isinstance(value, list) else [value])
        if v is not None
    ]
    for key, nested in config.items():
        if isinstance(nested, dict) and LANGUAGE_KEY.match(key):
            values += config_values(nested, *keys)
    return values


MAX_INTEGER = 1 << 24  # the largest that is believed, of words for example
MAX_COUNT = 10_000  # of layers or experts


def as_integer(value: object) -> int | None:
    """Return a whole number of JSON, 12 or 12.0, or the one that a string of digits stands for;
    None of all else."""
    digits = isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value.strip())
    whole = isinstance(value, float) and value.is_integer()
    if digits or whole:
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_INTEGER else None


def as_count(value: object) -> int | None:
    """Return a number of layers or experts; None of all else."""
    number = as_integer(value)
    return number if number is not None and number <= MAX_COUNT else None


def as_string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def as_boolean(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def config_integers(config: dict, *keys: str) -> list[int]:
    """List the whole numbers that config.json has under these keys; `odd_config_values` names what
    is none."""
    found = map(as_integer, config_values(config, *keys))
    return [number for number in found if number is not None]


def config_counts(config: dict, *keys: str) -> list[int]:
    """List the numbers of layers or experts that config.json has under these keys."""
    found = map(as_count, config_values(config, *keys))
    return [number for number in found if number is not None]


def config_strings(config: dict, *keys: str) -> list[str]:
    """List the strings that config.json has under these keys."""
    found = map(as_string, config_values(config, *keys))
    return [text for text in found if text is not None]


def config_booleans(config: dict, *keys: str) -> list[bool]:
    """List what config.json says as true or false under these keys."""
    found = map(as_boolean, config_values(config, *keys))
    return [value for value in found if value is not None]


def architectures_of(config: dict) -> list[str]:
    """List the classes that config.json names for the whole model, and not those for a part of
    it."""
    return config_strings(only(config, "architectures"), "architectures")


def only(config: dict, key: str) -> dict:
    """Leave of config.json the one entry that is for the whole model, and not those of its
    parts."""
    return {key: config.get(key)}


def odd_config_values(config: dict) -> list[str]:
    """Name what config.json has under the keys that are read here and that is not of the kind that
    belongs there."""
    odd = []
    for convert, keys in CONFIG_KEYS.items():
        for key in keys:
            values = config_values(config, key)
            found = [value for value in values if convert(value) is None]
            if found:
                odd.append(f"{key} {shorten(json.dumps(found[0]), 40)}")
    return odd


def find_quantization(folder: Path, config: dict) -> list[str]:
    """Take what says how a model is quantized out of its config.json; names it, and the files
    beside it that say so, each with its method. An entry of null says nothing."""
    found = [
        f"{place} ({quantization_method(value)}) of {CONFIG_NAME}"
        for place, value in pop_quantization(config).items()
        if value is not None
    ]
    for name in QUANTIZATION_FILES:
        path = folder / name
        if path.exists():
            try:
                method = quantization_method(read_json(path))
            except QuantizeError:
                method = "not readable"
            found.append(f"{name} ({method})")
    return found


def pop_quantization(value: dict | list, place: str = "") -> dict[str, object]:
    """Remove the entries about quantization from a JSON value, at any depth; returns them by their
    places."""
    found = {}
    if isinstance(value, dict):
        for key in QUANTIZATION_KEYS:
            if key in value:
                found[place + key] = value.pop(key)
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if isinstance(part, dict | list):
            found |= pop_quantization(part, f"{place}{key}.")
    return found


def quantization_method(entry: object) -> str:
    """Name the method that an entry or a file about quantization is of, as far as it says so."""
    if isinstance(entry, str):
        return shorten(entry, 40)
    if not isinstance(entry, dict):
        return "no method"
    for key in ("quant_method", "quant_algo"):
        if isinstance(entry.get(key), str):
            return shorten(entry[key], 40)
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"
    if "config_groups" in entry:
        return "compressed-tensors"
    nested = entry.get("quantization")  # ModelOpt's
    if isinstance(nested, dict):
        return quantization_method(nested)
    bits = as_integer(entry.get("bits"))
    return "no method" if bits is None else f"{bits} bits"


def model_dtype(config: dict) -> str | None:
    """Return the 16-bit dtype that engines compute in, by its safetensors name; None if config.json names no such."""
    known = {"bfloat16": "BF16", "float16": "F16", "half": "F16"}
    names = (
        value.removeprefix("torch.") for value in config_strings(config, "dtype", "torch_dtype")
    )
    return next((known[name] for name in names if name in known), None)


def oddity_with(field: str, config: dict) -> Oddity:
    """Find a row that has something in a field and is about a type that config.json names, or an empty one: first
    about the whole model's type, then about that of its language model."""
    for model_type in config_strings(config, "model_type"):
        for row in ODDITIES:
            if getattr(row, field) and model_type in row.model_types.split():
                return row
    return Oddity("")


def rows_when_loaded(config: dict, scope: str = "") -> Iterator[tuple[str, Oddity]]:
    """Yield the rows about what transformers renames or computes as it loads a model and its parts, each with a pattern
    of the names that it is about: all, or for a part beside the language model those of towers."""
    model_type = as_string(config.get("model_type"))
    for row in ODDITIES:
        if (row.in_memory or row.computed) and model_type in row.model_types.split():
            yield scope, row
    for key, nested in config.items():
        if isinstance(nested, dict):
            yield from rows_when_loaded(nested, scope if LANGUAGE_KEY.match(key) else TOWER_NAMES)


def names_in_memory(name: str, rows: list[tuple[str, Oddity]]) -> tuple[str, ...] | None:
    """Name what transformers makes of a file's tensor as it loads it; None if the rows do not tell."""
    names = [name]
    for scope, row in rows:
        rules = row.in_memory if re.search(scope, name) else ()
        for pattern, replacement in rules:
            if not any(re.search(pattern, known) for known in names):
                continue
            if not replacement:
                return None
            parts = replacement.split("|")
            renamed = [re.sub(pattern, part, known, count=1) for known in names for part in parts]
            names = list(dict.fromkeys(renamed))
    return tuple(names)


def separate_experts_in_engines(config: dict) -> str:
    """Say why engines would not find what stacks of experts become, if so or if that is not known."""
    types = config_strings(config, "model_type")
    row = oddity_with("tells_experts", config)
    if not row.tells_experts:
        model = f"model_type {types[0]!r}" if types else f"no model_type in {CONFIG_NAME}"
        return f"and with {model} it is not known how loaders name separate experts"
    its_type = next(name for name in types if name in row.model_types.split())
    return row.problem_of_engines.format(its_type)


# A tensor that holds all routed experts of a layer; the 2-D weights it is read as, expert by expert, or none if its
# layout does not tell them; why it is not read so; whether vLLM knows it as it is, too.
ExpertStack = namedtuple("ExpertStack", "info weights problem whole_in_vllm", defaults=[True])


def find_expert_stacks(checkpoint: Checkpoint, for_engines: bool) -> dict[str, ExpertStack]:
    """Find every tensor that holds a layer's routed experts together, by its name."""
    config, stacks, layers = (
        checkpoint.config,
        {},
        {},
    )  # layers: stacks by where the experts are, then by role
    oddity, counts = oddity_with("projections", config), config_counts(config, *EXPERT_COUNTS)
    in_engines = separate_experts_in_engines(config) if for_engines else ""
    for name, info in checkpoint.tensors.items():
        if info.dtype not in FLOAT_DTYPES or re.search(r"conv|pos|embed|table", name):
            continue
        match = STACK_PATTERN.match(name) if len(info.shape) == 3 else None
        if len(info.shape) == 3 and min(info.shape[1:]) >= CODES_PER_WORD:  # else a convolution
            counted = info.shape[0] > 1 and info.shape[0] in counts
            found = re.search(r"(^|[._])(experts?|moe)[._]", name) or (
                counted and re.search(r"\.\d+\.", name)
            )
        else:  # DBRX's
            found = len(info.shape) == 2 and re.search(
                r"\.experts(\.[a-z]\w*)+(?<!weight)(?<!bias)$", name
            )
        if found and not match:
            stacks[name] = ExpertStack(info, [], "in a layout that is not known")
        elif found:  # Granite's are gated, too
            role = match["projection"] or (
                "gate_up_proj" if match["linear"] == "input_linear" else "down_proj"
            )
            twin = layers.setdefault(f"{match['place']}experts", {}).setdefault(role, info)
            if twin is not info:
                raise QuantizeError(TWO_COPIES.format(quote_names([twin.name, name])))
    for module, layer in layers.items():
        problem, turned = layout_of_stacks(module, layer, checkpoint, oddity)
        for role, info in layer.items():
            weights = [] if problem else list(expert_weights(info, module, role, oddity, turned))
            stacks[info.name] = ExpertStack(
                info, weights, problem or in_engines, oddity.whole_in_vllm
            )
    return stacks


def layout_of_stacks(
    module: str, layer: dict, checkpoint: Checkpoint, oddity: Oddity
) -> tuple[str, bool]:
    """Say why a layer's stacks, by role, cannot be read as one weight an expert, if so, and whether they are (in, out).

    The shapes of gate_up_proj and down_proj tell: (2 I, H) and (H, I), or transposed, (H, 2 I) and (I, H), which are
    never the same. Without a gate, (I, H) and (H, I), it takes config.json."""
    config, shapes = checkpoint.config, {role: info.shape[1:] for role, info in layer.items()}
    if problem := oddity_with("problem", config).problem:
        return problem, False
    bias = re.compile(rf"{re.escape(module)}\.(?!.*correction)\w*bias$")
    if name := next(filter(bias.match, checkpoint.tensors), None):
        return f"that have biases ({name!r}), too", False
    gated = (
        {"gate_up_proj", "gate_proj"}
        if oddity.projections and oddity.projections[0]
        else shapes.keys()
    )
    if not all(
        roles & shapes.keys() for roles in ({"down_proj"}, {"gate_up_proj", "up_proj"}, gated)
    ):
        return "but not all projections of the layer's experts are there", False
    if len({info.shape[0] for info in layer.values()}) > 1:
        return "and the layer's other stacks hold more or fewer", False
    rows, columns = shapes.pop("down_proj")
    if gate_up := shapes.get("gate_up_proj"):
        straight, turned = gate_up == (2 * columns, rows), gate_up == (columns, 2 * rows)
        return "" if straight or turned else "of shapes that are not a gated pair's", turned
    if any(shape != (columns, rows) for shape in shapes.values()):
        return "of shapes that do not go together", False
    hidden, widths = (
        config_integers(config, "hidden_size", "moe_latent_size"),
        config_integers(config, *EXPERT_WIDTHS),
    )
    straight, turned = (
        (rows in hidden and columns in widths),
        (columns in hidden and rows in widths),
    )
    if straight == turned and not oddity.projections:
        return (
            f"and {CONFIG_NAME} (hidden_size, moe_intermediate_size) does not tell whether transposed",
            False,
        )
    return "", turned and not straight


def expert_weights(
    stack: TensorInfo, module: str, role: str, oddity: Oddity, turned: bool
) -> Iterator[TensorInfo]:
    """Yield the 2-D weights (out, in) of a stack (experts, out, in), each in one piece of it, or (experts, in, out)."""
    out_features, in_features = reversed(stack.shape[1:]) if turned else stack.shape[1:]
    names, itemsize = oddity.projections_of(role), DTYPE_BITS[stack.dtype] // 8
    shape, stride = (
        (out_features // len(names), in_features),
        out_features * itemsize if turned else 0,
    )
    for expert, (number, name) in itertools.product(range(stack.shape[0]), enumerate(names)):
        start = expert * out_features * in_features + number * shape[0] * (
            1 if turned else in_features
        )
        yield stack.part(f"{module}.{expert}.{name}.weight", shape, start * itemsize, stride)


def find_kinds(tensors: list[TensorInfo | OutputTensor], config: dict) -> dict[str, str]:
    """Find of which kind each weight's layer is: embeddings, head and routers by their names, or shapes and places.

    A router beside a layer's experts has a row for each. A weight with as many rows as there are words is an embedding
    or a head, but for a layer's projections and what joins a tower to the language model, where it may be chance."""
    names, kinds, experts = (
        {info.name for info in tensors},
        {},
        {},
    )  # experts: their number, by the module around them
    counts = config_counts(config, *EXPERT_COUNTS)
    weights = [info for info in tensors if len(info.shape) == 2 and info.name.endswith(".weight")]
    for info in weights:
        numbered_with_bias = (
            re.sub(r"\.\d+\.weight$", "", info.name) + ".0.bias" in names
        )  # linear layers in a row
        if re.search(EMBEDDING_NAME, info.name) and not numbered_with_bias:
            kinds[info.name] = "embeddings"
        elif re.search(ROUTER_NAME, info.name) and (
            info.shape[0] < info.shape[1] or info.shape[1] in counts
        ):  # else a gate for each column; ERNIE's with images lie as (in, out)
            kinds[info.name] = "routers"
        elif re.search(HEAD_NAME, info.name):
            kinds[info.name] = "head"
    for info in tensors:
        if match := EXPERT_PATTERN.match(info.name):
            place = match[1].rpartition(".")[0]
            experts[place] = max(experts.get(place, 0), int(match[2]) + 1)
        elif len(info.shape) == 3 and (match := STACK_PATTERN.match(info.name)):
            experts[match["place"].rstrip(".")] = info.shape[0]
    tables = [
        i.shape
        for i in weights
        if kinds.get(i.name) == "embeddings" and not re.search(NO_WORDS, i.name)
    ]
    words = config_integers(config, "vocab_size", "padded_vocab_size")
    words += [rows for rows, _ in tables]
    widths = {
        *config_integers(config, "hidden_size", "d_model", "n_embd"),
        *(columns for _, columns in tables),
    }
    for info in (info for info in weights if info.name not in kinds):
        module, (rows, columns) = info.name.removesuffix(".weight"), info.shape
        parts = module.split(".")
        last, in_layer = ".".join(parts[-2:]), any(map(str.isdigit, parts))
        as_many = any(count <= rows <= count + EXTRA_WORDS for count in words) and (
            not widths or columns in widths
        )
        if as_many and (
            re.search(VOCABULARY_WORDS, last) if in_layer else not TOWER_WORDS.search(module)
        ):
            kinds[info.name] = "head" if re.search(HEAD_WORDS, last) else "embeddings"
        for place in (parts[-1], last):
            beside = rows < columns and experts.get(module.removesuffix(place).rstrip(".")) == rows
            if beside and ("rout" in place or not re.search(NO_ROUTER, place)):
                kinds[info.name] = "routers"
        named = (kind for kind, pattern in LAYER_KINDS if re.search(pattern, info.name))
        kinds.setdefault(info.name, next(named, "other"))
    return kinds


# ---- Quantization: scales and codes of a block of weights. No I/O, no names. ----------------------------------------


@dataclass(frozen=True)
class Packing:
    """How a weight is stored: in codes of 4 or 8 bits, and a scale for each group of columns."""

    bits: int
    group_size: int  # columns

    @property
    def codes_per_word(self) -> int:
        return 32 // self.bits

    @property
    def code_max(self) -> int:
        return (1 << (self.bits - 1)) - 1  # the smallest code is one further from zero

    def columns_of(self, columns: int) -> int:
        """Round `columns` up to whole groups."""
        return -(-columns // self.group_size) * self.group_size


class Workspace:
    """One worker's buffers, reused from tile to tile: fresh pages from the kernel cost more than the arithmetic. So are
    the tensors over them, since every call to torch hands the interpreter lock to another worker and back."""

    def __init__(self):
        self._buffers: dict[str, mmap.mmap] = {}
        self._tensors: dict[tuple, torch.Tensor] = {}

    def buffer(self, role: str, nbytes: int) -> memoryview:
        """Return `nbytes` writable bytes, the same ones for this role until it asks for more."""
        if len(self._buffers.get(role, b"")) < nbytes:
            self._tensors.clear()  # some lie over the old buffer
            self._buffers[role] = allocate(nbytes)
        return memoryview(self._buffers[role])[:nbytes]

    def tensor(self, role: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Return the role's buffer as a tensor; of two dtypes, it is the same bytes."""
        key = (role, dtype, shape)
        if key not in self._tensors:
            buffer = self.buffer(role, math.prod(shape) * dtype.itemsize)
            self._tensors[key] = torch.frombuffer(buffer, dtype=dtype).view(shape)
        return self._tensors[key]


def whole_pages(nbytes: float) -> int:
    return math.ceil(nbytes / HUGE_PAGE) * HUGE_PAGE


def allocate(nbytes: int) -> mmap.mmap:
    """Take anonymous memory, in huge pages where the system has them: 5 % faster than in pages of 4 kB."""
    try:
        memory = mmap.mmap(-1, whole_pages(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise QuantizeError(
            f"no memory for a buffer of {format_bytes(nbytes)}: use fewer --threads", 3
        ) from None
    with contextlib.suppress(OSError, AttributeError):  # a system, or a kernel of it, without
        memory.madvise(mmap.MADV_HUGEPAGE)
    with contextlib.suppress(OSError, AttributeError):
        # What the disk writes to private memory during a fork may be lost. (open(2), O_DIRECT)
        memory.madvise(mmap.MADV_DONTFORK)
    return memory


@dataclass(frozen=True)
class Rounding:
    """How scales and codes are chosen and stored."""

    with_offset: bool = False  # nibbles hold the code plus 8 (`pack_int4`)
    importance: torch.Tensor | None = (
        None  # of columns, float32 (groups of a row, group_size); scales are searched
    )
    feedback: tuple[torch.Tensor, ...] | None = None  # of `feedback_of`; needs importance
    kernel: Kernel | None = (
        None  # which does the work for 4 bits in groups of up to MAX_GROUP; the result is the same
    )
    bits: int = 4  # or 8, always by the largest weight, without importance


def quantize_groups(
    groups: torch.Tensor, scale_dtype: torch.dtype, workspace: Workspace, rounding: Rounding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize groups, (n, group_size) of any float dtype, to packed words, int32, and scales (n,), in the workspace.

    scale = max|w| / 7 or 127, or searched by importance; code = clamp(round(w / scale)), by the stored scale, with
    float32's division and rounding to nearest even. An all-zero group, or one too small for the scale's dtype, has
    scale 0 and codes 0. A scale that is not finite marks a group with a value that none can hold."""
    count, group_size = groups.shape
    scales = workspace.tensor("scales", scale_dtype, count)
    if rounding.kernel and rounding.bits == 4 and group_size <= MAX_GROUP:
        return quantize_with_kernel(groups, scales, workspace, rounding), scales
    # By the bits: without sign these are ordered as the values, NaN above all, and compared several times faster.
    magnitudes = torch.abs(
        groups, out=workspace.tensor("magnitudes", groups.dtype, count, group_size)
    )
    bits = magnitudes.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[groups.dtype.itemsize])
    code_max = Packing(rounding.bits, group_size).code_max
    scales.copy_(torch.amax(bits, -1).view(groups.dtype).to(torch.float32).div_(code_max))
    weights = workspace.tensor("weights", torch.float32, count, group_size).copy_(groups)
    if rounding.feedback:
        round_with_feedback(weights, scales, workspace, rounding)
    else:
        if rounding.importance is not None:
            search_scales(weights, scales, rounding.importance, workspace)
        round_to_codes(weights, scales, weights, code_max)
    if rounding.bits == 8:  # four bytes a word, each a code plus 128, the first code's lowest
        workspace.tensor("words", torch.uint8, count, group_size).copy_(weights.add_(code_max + 1))
        return workspace.tensor("words", torch.int32, count, group_size // 4), scales
    codes = workspace.tensor("codes", torch.int16, count, group_size).copy_(weights)
    return pack_int4(codes, workspace, rounding.with_offset), scales


def round_to_codes(
    weights: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, code_max: int = CODE_MAX
) -> None:
    """Put clamp(round(w / scale)) into `out`, and 0 where the scale is 0: the weights were too small for any."""
    divisors = torch.where(scales == 0, 1, scales).to(torch.float32)[:, None]
    torch.div(weights, divisors, out=out).round_().clamp_(-code_max - 1, code_max)


def sum_in_lanes(terms: torch.Tensor) -> torch.Tensor:
    """Sum along the last dimension, a multiple of SUM_LANES, in one order on every machine: by lanes, then folded."""
    lanes = functools.reduce(torch.add, terms.unflatten(-1, (-1, SUM_LANES)).unbind(-2))
    while lanes.shape[-1] > 1:
        lanes = torch.add(*lanes.chunk(2, -1))
    return lanes[..., 0]


def weigh_columns(mean_squares: torch.Tensor) -> torch.Tensor:
    """Return the columns' importance in the choice of scales, float32 (groups of a row, group_size).

    It is their mean square input, but at least LEAST_SHARE of the largest in the group. Some models
    have a column whose inputs are so large that it alone would choose the scale, and then all other
    columns could be clipped (massive activations; Sun and others, 2024)."""
    return torch.maximum(mean_squares, mean_squares.amax(-1, keepdim=True) * LEAST_SHARE)


def shares_of(importance: torch.Tensor) -> torch.Tensor:
    """Return each column's part of its group's importance, 2^14 for the largest; int32, as that."""
    largest = importance.amax(-1, keepdim=True)
    parts = importance / torch.where(largest == 0, 1, largest)
    return parts.mul_(1 << 14).round_().to(torch.int32)


def search_scales(
    weights: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor, workspace: Workspace
) -> None:
    """Replace absmax scales (n,) of weights, float32 (n, group_size), by those of least squared error, of either sign.

    Codes reach -8 but only 7, so the scale's sign puts the largest weight on the longer side. For each step weights are
    rounded with scale = -largest / step; for such codes the best scale is sum(w c) / sum(c c), which leaves the squared
    error sum(w w) - sum(w c)^2 / sum(c c). (After llama.cpp's make_qx_quants.) Weights are taken as parts of the
    largest, 2^14 for it: sums of integers are the same in whatever order a machine adds."""
    parts, weighed, codes, products = (
        workspace.tensor(f"search {i}", torch.int32, *weights.shape) for i in range(4)
    )
    by_row, shares, errors = (
        (-1, *importance.shape),
        shares_of(importance),
        products.view(torch.float32),
    )
    sum_dtype = (
        torch.int32 if weights.shape[1] <= MAX_GROUP else torch.int64
    )  # which takes eight times as long
    lowest, highest = torch.aminmax(weights, dim=-1)
    largest = torch.where(-lowest > highest, lowest, highest)
    factors = torch.where(
        largest.abs() > 1e-30, largest.reciprocal() * -(1 << 14), 0
    )  # beyond, it might be infinite
    parts.copy_(torch.mul(weights, factors[:, None], out=errors).round_())
    torch.mul(parts.view(by_row), shares, out=weighed.view(by_row)).add_(
        1 << 13
    ).bitwise_right_shift_(14)
    best_gain, best_scales = torch.zeros_like(largest), torch.zeros_like(largest)
    for step in SEARCH_MULTIPLIERS:
        torch.mul(parts, step, out=codes).bitwise_right_shift_(16)
        codes.add_(1 << 8).bitwise_right_shift_(9).clamp_(CODE_MIN, CODE_MAX)
        products_sum = (
            torch.mul(weighed, codes, out=products).sum(-1, dtype=sum_dtype).to(torch.float32)
        )
        codes.mul_(codes).view(by_row).mul_(shares)
        candidates = products_sum / codes.sum(-1, dtype=sum_dtype).to(torch.float32)
        gain = products_sum * candidates  # NaN for an all-zero group, and so never better
        better = gain > best_gain
        best_gain, best_scales = (
            torch.where(better, gain, best_gain),
            torch.where(better, candidates, best_scales),
        )
    found, sums = (best_scales * -largest).to(scales.dtype), []
    for some in (found, scales):
        round_to_codes(weights, some, errors)
        errors.mul_(some.to(torch.float32)[:, None]).sub_(weights)
        sums.append(
            sum_in_lanes(errors.mul_(errors).view(by_row).mul_(importance).view(weights.shape))
        )
    scales.copy_(torch.where((sums[0] < sums[1]) & (found != 0), found, scales))


def feedback_of(
    mean_squares: torch.Tensor, factor: torch.Tensor, kernel: Kernel | None
) -> tuple[torch.Tensor, ...]:
    """Prepare error feedback: what a column's rounding error changes in the columns after it, so that the errors of a
    row's products cancel out, for inputs of second moments diag(mean_squares - row sums of factor^2) + factor factor^T.

    Let H = diag(d) + V V^T be these: once the columns before j are rounded, and c is the sum of v_k (w_k - q_k) over
    these, the error to be expected is least with w_j + u_j c for column j, where u_j = (I + sum of v_k v_k^T / d_k over
    k >= j)^-1 v_j / d_j. Returns V and U, float32 (columns, rank), the rank a multiple of SUM_LANES. (GPTQ by Frantar
    and others, 2023, for such an H)"""
    padding = (0, -factor.shape[1] % SUM_LANES, 0, len(mean_squares) - len(factor))
    factor = torch.nn.functional.pad(factor, padding).mul_(math.sqrt(FACTOR_SHARE))
    rest = (mean_squares - sum_in_lanes(factor * factor)).clamp_(min=0)
    rest.add_(sum_in_lanes(mean_squares) / len(mean_squares) * DAMPING)
    spread, inverse = torch.empty_like(factor), torch.eye(factor.shape[1], dtype=torch.float64)
    if kernel:
        kernel.spread_of(*(tensor.data_ptr() for tensor in (factor, rest, spread)), *factor.shape)
    for column in (
        () if kernel else range(len(factor) - 1, -1, -1)
    ):  # each of them updates the inverse
        check_signals()
        direction = factor[column].to(torch.float64)
        turned = sum_in_lanes(inverse * direction)
        divisor = rest[column].to(torch.float64) + sum_in_lanes(turned * direction)
        spread[column] = turned / divisor
        inverse -= torch.outer(turned, turned) * (1 / divisor)
    return factor, spread


def round_with_feedback(
    weights: torch.Tensor, scales: torch.Tensor, workspace: Workspace, rounding: Rounding
) -> None:
    """Replace whole rows of weights, float32 (n, group_size), by their codes, and fill in the scales (n,): a group's is
    searched for its weights as the errors of the groups before change them, then column by column is rounded."""
    shape = rounding.importance.shape  # groups of a row, and columns of a group
    weights, scales = weights.view(-1, *shape), scales.view(-1, shape[0])
    factors, spreads = (part.unflatten(0, shape) for part in rounding.feedback)
    carried = torch.zeros(len(weights), factors.shape[-1])  # c of each row
    for group, (factor, spread) in enumerate(zip(factors, spreads)):
        columns = weights[:, group].T
        changed = torch.stack(
            [column + sum_in_lanes(carried * u) for column, u in zip(columns, spread)], 1
        )
        found = scales[:, group].copy_(changed.abs().amax(1) / CODE_MAX)
        search_scales(changed, found, rounding.importance[group : group + 1], workspace)
        steps, divisors = (
            found.to(torch.float32),
            torch.where(found == 0, 1, found).to(torch.float32),
        )
        most = divisors.abs() * MAX_CHANGE
        check_signals()  # a tile may take half a minute
        for column, v, u in zip(columns, factor, spread):
            change = sum_in_lanes(carried * u).clamp_(-most, most)
            codes = ((column + change) / divisors).round_().clamp_(CODE_MIN, CODE_MAX)
            carried += (column - codes * steps)[:, None] * v
            column.copy_(codes)


def pack_int4(codes: torch.Tensor, workspace: Workspace, with_offset: bool = False) -> torch.Tensor:
    """Pack codes, int16 (rows, columns), destroying them, to words, int32 (rows, columns // 8), the first lowest."""
    # Pairs of codes, int32 0x000H000L, times 0x1001000 have 0xHL as top byte. Four such are the little-endian word.
    pairs = (
        codes.view(torch.int32).bitwise_and_(0x000F000F).mul_(0x1001000).bitwise_right_shift_(24)
    )
    workspace.tensor("words", torch.int8, *pairs.shape).copy_(pairs)  # keeps the low byte
    words = workspace.tensor("words", torch.int32, len(codes), codes.shape[1] // CODES_PER_WORD)
    return words.bitwise_xor_(OFFSET_BITS) if with_offset else words


def unpack_int4(words: torch.Tensor, with_offset: bool = False) -> torch.Tensor:
    """Unpack words, int32 (rows, columns // 8), to codes, int8 (rows, columns)."""
    words = words ^ OFFSET_BITS if with_offset else words
    shifts = torch.arange(
        28, -4, -4, dtype=torch.int32, device=words.device
    )  # code i to the top, then back, signed
    return ((words.unsqueeze(-1) << shifts) >> 28).to(torch.int8).flatten(-2)


def dequantize(
    words: torch.Tensor, scales: torch.Tensor, packing: Packing, with_offset: bool
) -> torch.Tensor:
    """Decode words, int32 (rows, columns // codes_per_word), by scales (rows, columns // group_size); to float32."""
    codes = (
        unpack_int4(words, with_offset)
        if packing.bits == 4
        else words.view(torch.uint8).to(torch.float32) - 128
    )
    return (
        codes.unflatten(1, (-1, packing.group_size)) * scales.to(torch.float32)[:, :, None]
    ).flatten(1)


def dequantize_int4(
    qweight: torch.Tensor, scales: torch.Tensor, group_size: int, columns: int | None = None
) -> torch.Tensor:
    """Decode weights of the `int4` layout to float32 (rows, columns), approximately: code times its group's scale.

    qweight: int32 (rows, padded // 8), and scales: float16 (rows, padded // group_size)
    columns: the weight's true number of columns where quantize_config.json lists it as padded; None keeps all"""
    (rows, words), (scale_rows, groups) = qweight.shape, scales.shape
    if (rows, words * CODES_PER_WORD) != (scale_rows, groups * group_size):
        raise ValueError(
            f"words {tuple(qweight.shape)}, scales {tuple(scales.shape)}: group_size is not {group_size}?"
        )
    return dequantize(qweight, scales, Packing(4, group_size), with_offset=False)[:, :columns]


# ---- Kernel: what `quantize_groups` does, in C: the same bytes in half the time or less -----------------------------

KERNEL_SOURCE = r"""
#include <stdint.h>

typedef union { uint32_t bits; float value; } word;
typedef float floats __attribute__((vector_size(32)));  /* eight at once, on any processor */
typedef double doubles __attribute__((vector_size(64)));
enum { BF16, FLOAT16, FLOAT32 };
typedef struct {  /* as `quantize_with_kernel` fills it */
    const char *weights;
    uint8_t *packed;
    float *scales;
    const float *importance;
    const int16_t *shares;
    const float *factor, *spread;
    long dtype, groups, group_size, in_row, rank, dropped, offset;
} work;

#define MAX(one, other) ((one) > (other) ? (one) : (other))
#define MIN(one, other) ((one) < (other) ? (one) : (other))
#define WHOLE(size) ((size) & ~7L)  /* a multiple of 8 that the compiler sees as one, and so without a rest */
#define SEPARATE static __attribute__((noinline))  /* a function that the compiler works on once, not at each call */
#define ROUND 12582912.0f  /* 1.5 * 2^23: a sum with it is rounded to an integer, half to even */

/* Add up a term of each k in the order of `sum_in_lanes`; `declared` are the eight lanes. */
#define SUM(declared, count, term) ({                                                               \
    declared = {0};                                                                                 \
    for (long start = 0; start < (count); start += 8)                                               \
        for (long lane = 0, k = start; lane < 8; lane++, k++)                                       \
            lanes[lane] += (term);                                                                  \
    (lanes[0] + lanes[4] + (lanes[2] + lanes[6])) + (lanes[1] + lanes[5] + (lanes[3] + lanes[7]));  \
})

/* A bf16 is the upper half of a float. A float16's exponent is less by 112, and 31 for infinity and NaN. */
static inline float widen(uint16_t weight, int dtype) {
    word wide = {(uint32_t)weight << 16};
    if (dtype == FLOAT16) {
        wide.bits = (wide.bits & 0x80000000) | (uint32_t)(weight & 0x7FFF) << 13;
        wide.value *= 0x1p112f;
        wide.bits |= (weight & 0x7FFF) >= 0x7C00 ? 0x7F800000 : 0;
    }
    return wide.value;
}

/* The largest magnitude, found by its bits: without sign these have the order of the values, and NaN is above all. */
static inline float largest_of(const void *restrict weights, int dtype, long size) {
    int32_t most = 0;
    int16_t most_of_16 = 0;
    for (long i = 0; dtype == FLOAT32 && i < size; i++)
        most = MAX(most, ((const int32_t *)weights)[i] & 0x7FFFFFFF);
    for (long i = 0; dtype != FLOAT32 && i < size; i++) {
        int16_t magnitude = ((const int16_t *)weights)[i] & 0x7FFF;
        most_of_16 = MAX(most_of_16, magnitude);
    }
    return dtype == FLOAT32 ? (word){most}.value : widen(most_of_16, dtype);
}

/* A scale as its dtype stores it, which drops some of a float's bits: none for float32, 13 for float16, 16 for bf16. */
static inline float round_scale(float scale, int dropped) {
    word rounded = {.value = scale};
    float magnitude = MAX(scale, -scale);
    if (!dropped || !(magnitude < __builtin_inff()))
        return scale;
    if (dropped == 13 && magnitude < 0x1p-14f)
        return scale + 0.75f - 0.75f;  /* subnormal: a multiple of 2^-24 */
    if (dropped == 13 && magnitude >= 65520)
        return __builtin_inff();
    rounded.bits += (1 << (dropped - 1)) - 1 + (rounded.bits >> dropped & 1);
    rounded.bits &= -(1 << dropped);
    return rounded.value;
}

/* The code of a quotient to which ROUND was added, clamped as an integer, which takes a third of the time. */
static inline int32_t code(float sum) {
    word rounded = {.value = sum};
    int32_t bits = MIN((int32_t)rounded.bits, 0x4B400007);
    return MAX(bits, 0x4B3FFFF8) - 0x4B400000;
}

/* Divide weights by their scale and add ROUND, half of the sums for even columns, half for odd ones. */
static inline void divide(const void *restrict weights, int dtype, float scale, float *restrict sums, long size) {
    float divisor = scale ? scale : 1;
    for (long i = 0; i < size / 2; i++)
        for (long odd = 0; odd < 2; odd++) {
            float weight = dtype == FLOAT32 ? ((const float *)weights)[2 * i + odd]
                : widen(((const uint32_t *)weights)[i] >> 16 * odd, dtype);  /* of a pair the odd one is higher */
            sums[odd * MAX_GROUP + i] = weight / divisor + ROUND;
        }
}

SEPARATE void pack(const float *restrict sums, uint8_t offset, uint8_t *restrict packed, long count) {
    for (long i = 0; i < count / 2; i++)
        packed[i] = ((code(sums[i]) & 15) | code(sums[MAX_GROUP + i]) << 4) ^ offset;
}

/* As `search_scales`, but for one group, of which the largest magnitude is known, and before absmax is compared. */
SEPARATE float find_scale(const float *restrict weights, float most, const int16_t *restrict share, long size) {
    static const int16_t steps[] = {SEARCH_MULTIPLIERS};
    int16_t parts[MAX_GROUP], weighed[MAX_GROUP];
    int positive = 0;
    for (long i = 0; i < size; i++)
        positive |= weights[i] == most;
    float largest = positive ? most : -most, factor = most > 1e-30f ? 1 / largest * -16384 : 0;
    float best_gain = 0, best_scale = 0;
    for (long i = 0; i < size; i++) {
        parts[i] = (word){.value = weights[i] * factor + ROUND}.bits;
        weighed[i] = (parts[i] * share[i] + 8192) >> 14;
    }
    for (long step = 0; step < (long)(sizeof steps / sizeof *steps); step++) {
        int products = 0, squares = 0;
        for (long i = 0; i < size; i++) {
            int16_t code = parts[i] * steps[step] >> 16;
            code = (int16_t)(code + 256) >> 9;
            code = MAX(MIN(code, 7), -8);
            products += weighed[i] * code;
            squares += (int16_t)(code * code) * share[i];
        }
        float scale = (float)products / (float)squares, gain = (float)products * scale;
        best_scale = gain > best_gain ? scale : best_scale;
        best_gain = MAX(gain, best_gain);
    }
    return best_scale * -largest;
}

static float squared_error(const float *restrict weights, float scale, const float *restrict counts, long size) {
    float terms[MAX_GROUP], divisor = scale ? scale : 1;
    for (long i = 0; i < size; i++) {
        float error = code(weights[i] / divisor + ROUND) * divisor - weights[i];
        terms[i] = error * error * counts[i];
    }
    return SUM(floats lanes, size, terms[k]);
}

/* The scale of least squared error where columns have importance, else that of the largest weight. */
static inline float choose_scale(const work *all, const void *restrict weights, int dtype, long group) {
    long size = WHOLE(all->group_size), column = group % all->in_row * size;
    float largest = largest_of(weights, dtype, size), absmax = round_scale(largest / 7, all->dropped), wide[MAX_GROUP];
    if (!SEARCH || !all->importance)  /* what is not needed takes the compiler as long again */
        return absmax;
    for (long i = 0; i < size; i++)
        wide[i] = dtype == FLOAT32 ? ((const float *)weights)[i] : widen(((const uint16_t *)weights)[i], dtype);
    const float *counts = all->importance + column;
    float found = round_scale(find_scale(wide, largest, all->shares + column, size), all->dropped);
    float found_error = squared_error(wide, found, counts, size);
    return found && found_error < squared_error(wide, absmax, counts, size) ? found : absmax;
}

/* First the scales of some groups, then their codes: while one group's division waits for its largest weight, the next
   ones go on. */
static inline void quantize_groups(const work *all, int dtype) {
    float sums[2 * MAX_GROUP];
    long size = WHOLE(all->group_size), bytes = size * (dtype == FLOAT32 ? 4 : 2), some = 2 * MAX_GROUP / size;
    for (long first = 0; first < all->groups; first += some) {
        const char *weights = all->weights + first * bytes;
        float *scales = all->scales + first;
        some = MIN(some, all->groups - first);
        for (long i = 0; i < some; i++)
            scales[i] = choose_scale(all, weights + i * bytes, dtype, first + i);
        for (long i = 0; i < some; i++)
            divide(weights + i * bytes, dtype, scales[i], sums + i * size / 2, size);
        pack(sums, all->offset, all->packed + first * size / 2, some * size);
    }
}

/* Rows with feedback, up to eight at once. */
SEPARATE void quantize_rows(const work *all, long first, long rows) {
    long size = WHOLE(all->group_size), columns = all->in_row * size, rank = WHOLE(all->rank);
    float lines[8][2 * MAX_GROUP];
    floats block[MAX_GROUP], carried[MAX_RANK] = {0}, scales = {0}, divisors = {0}, most = {0}, codes;
    for (long column = 0; column < columns; column += size) {
        const float *weights = (const float *)all->weights + first * columns + column;
        const float *factor = all->factor + column * rank, *spread = all->spread + column * rank;
        for (long i = 0; i < size; i++) {
            for (long row = 0; row < 8; row++)
                block[i][row] = row < rows ? weights[row * columns + i] : 0;
            floats changed = block[i] + SUM(floats lanes[8], rank, spread[i * rank + k] * carried[k]);
            for (long row = 0; row < 8; row++)
                lines[row][i] = changed[row];
        }
        for (long row = 0; row < rows; row++) {
            long group = (first + row) * all->in_row + column / size;
            scales[row] = all->scales[group] = choose_scale(all, lines[row], FLOAT32, group);
            divisors[row] = scales[row] ? scales[row] : 1;
            most[row] = MAX_CHANGE * MAX(divisors[row], -divisors[row]);
        }
        for (long i = 0; i < size; i++) {
            floats change = SUM(floats lanes[8], rank, spread[i * rank + k] * carried[k]);
            for (long row = 0; row < 8; row++)
                change[row] = MAX(-most[row], MIN(most[row], change[row]));  /* NaN stays */
            floats sums = (block[i] + change) / divisors + ROUND;
            for (long row = 0; row < 8; row++) {
                codes[row] = code(sums[row]);
                lines[row][i % 2 * MAX_GROUP + i / 2] = sums[row];
            }
            floats error = block[i] - codes * scales;
            for (long k = 0; k < rank; k++)
                carried[k] += error * factor[i * rank + k];
        }
        for (long row = 0; row < rows; row++)
            pack(lines[row], all->offset, all->packed + ((first + row) * columns + column) / 2, size);
    }
}

void quantize(const work *all) {
    long rows = all->groups / all->in_row;
    if (SEARCH && all->rank)
        for (long row = 0; row < rows; row += 8)
            quantize_rows(all, row, MIN(rows - row, 8));
    else if (all->dtype == BF16)
        quantize_groups(all, BF16);
    else if (all->dtype == FLOAT16)
        quantize_groups(all, FLOAT16);
    else
        quantize_groups(all, FLOAT32);
}

void spread_of(const float *factor, const float *rest, float *restrict spread, long columns, long rank) {
    doubles inverse[MAX_RANK][MAX_RANK / 8], turned[MAX_RANK / 8];
    for (long k = 0; k < rank; k++)
        for (long i = 0; i < rank; i++)
            inverse[k][i / 8][i % 8] = k == i;
    for (long column = columns - 1; SEARCH && column >= 0; column--) {
        const float *direction = factor + column * rank;
        for (long i = 0; i < rank / 8; i++)
            turned[i] = SUM(doubles lanes[8], rank, inverse[k][i] * direction[k]);
        double divisor = rest[column] + SUM(doubles lanes, rank, turned[k / 8][k % 8] * direction[k]);
        for (long k = 0; k < rank; k++) {
            spread[column * rank + k] = turned[k / 8][k % 8] / divisor;
            for (long i = 0; i < rank / 8; i++)
                inverse[k][i] -= turned[k / 8][k % 8] * turned[i] * (1 / divisor);
        }
    }
}
"""
# Of the processor what torch uses, as it or ATEN_CPU_CAPABILITY says. Nothing is linked, so that no C library's files
# are needed. Torch fuses no multiplication with an addition; without traps, clamping needs no branches.
KERNEL_FLAGS = (
    "-x c -O3 -shared -fPIC -ffreestanding -nostdlib -ffp-contract=off -fno-trapping-math"
    " -fno-strict-aliasing"
    f" -DMAX_GROUP={MAX_GROUP} -DMAX_RANK={MAX_RANK} -DMAX_CHANGE={MAX_CHANGE}"
    f" -DSEARCH_MULTIPLIERS={','.join(map(str, SEARCH_MULTIPLIERS))} "
    + {
        "AVX2": "-mavx2 -mfma",
        "AVX512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl",
    }.get(torch.backends.cpu.get_cpu_capability(), "")
).split()
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of the source's enum
SCALE_BITS_DROPPED = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # of a float's
Kernel = ctypes.CDLL  # calls of its functions release the interpreter lock


def quantize_with_kernel(
    groups: torch.Tensor, scales: torch.Tensor, workspace: Workspace, rounding: Rounding
) -> torch.Tensor:
    """Fill in the scales and return the words of `quantize_groups`, in groups of up to MAX_GROUP."""
    (count, group_size), nothing = groups.shape, torch.empty(0)  # whose address is 0
    if rounding.feedback or groups.dtype not in KERNEL_DTYPES:
        groups = workspace.tensor("weights", torch.float32, count, group_size).copy_(groups)
    words = workspace.tensor("words", torch.int32, count, group_size // CODES_PER_WORD)
    found, importance, shares = workspace.tensor("found", torch.float32, count), nothing, nothing
    if rounding.importance is not None:
        importance, shares = (
            rounding.importance.contiguous(),
            shares_of(rounding.importance).to(torch.int16),
        )
    factor, spread = rounding.feedback or (nothing, nothing)
    numbers = (
        KERNEL_DTYPES.index(groups.dtype),
        count,
        group_size,
        max(1, len(importance)),
        factor.shape[-1],
    )
    numbers += SCALE_BITS_DROPPED[scales.dtype], OFFSET_BITS & 0xFF if rounding.with_offset else 0
    tensors = (
        groups,
        words,
        found,
        importance,
        shares,
        factor,
        spread,
    )  # as in the source's struct, like the numbers
    rounding.kernel.quantize(
        (ctypes.c_long * 14)(*(tensor.data_ptr() for tensor in tensors), *numbers)
    )
    scales.copy_(found)
    return words


def rounds_as_torch(kernel: Kernel, search: bool) -> bool:
    """Compare a kernel with torch before it is relied upon."""
    # Groups of 376 are, in pairs, some rounds of each loop that the compiler makes, of 64 and 32 with AVX-512, 32 and
    # 16 with AVX2, 16 and 8 with NEON, and a rest.
    # The largest weight at each place. Half-way cases at many scales, subnormal ones in float16 and half-way ones, too.
    number = torch.arange(376)
    scales = (1 + number / 32 + number % 2 * 2.0**-11) * 2.0 ** (number % 13 - 23)
    groups = scales[:, None] * torch.arange(-6.5, 7, 0.5).repeat(14)[:376]
    trials = [(groups.fill_diagonal_(0) + torch.diag(scales * 7 * (-1) ** number), None, None)]
    if search:
        # Two groups to a row, half of them so close to whole codes that two scales are nearly as good.
        groups = torch.randn(1024, 376, generator=torch.Generator().manual_seed(0)).mul_(5)
        close = (
            groups[::4].round().clamp(-7, 7)
            + groups[1::4] * 2.0 ** -(6 + torch.arange(256) % 12)[:, None]
        )
        groups[::4], groups[1::4] = close, close.flip(0, 1)
        trials.append((groups, torch.arange(2.0 * 376).view(2, 376) * 0.618 % 1, None))
        # Not whole rounds of the loop over eight rows. A weak column behind strong ones, where changes are bounded.
        importance = torch.arange(160.0).view(4, 40) * 0.618 % 1
        importance[3, -8:-1], importance[3, -1] = 40, 0.1
        factor = (torch.arange(160.0 * 16) * 0.414 % 1).view(160, 16)
        factor[-8:] = 1
        trials.append((groups[4:, :40], importance, factor * importance.view(-1, 1).sqrt() / 4))
    for weights, importance, factor in trials:
        results = []
        for some in (kernel, None):
            feedback = None if factor is None else feedback_of(importance.flatten(), factor, some)
            results.append([feedback[1]] if feedback else [])
            for dtype, scale_dtype in itertools.product(
                KERNEL_DTYPES[2 if feedback else 0 :], SCALE_BITS_DROPPED
            ):
                rounding = Rounding(True, importance, feedback, some)
                results[-1] += quantize_groups(
                    weights.to(dtype), scale_dtype, Workspace(), rounding
                )
        if not all(map(torch.equal, *results)):
            return False
    return True


def run_compiler(command: list[str], folder: str) -> None:
    """Give the kernel's source to a compiler, with this folder for its own files, and wait for it no longer than
    COMPILER_TIMEOUT_S or until a signal comes. Raises as subprocess.run."""
    deadline = time.monotonic() + COMPILER_TIMEOUT_S
    text, pipes = (
        KERNEL_SOURCE.encode(),
        dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
    )
    environment = os.environ | {"TMPDIR": folder}
    # In a session of its own, to end it together with the processes that it starts.
    with subprocess.Popen(command, **pipes, env=environment, start_new_session=True) as run:
        try:
            while run.returncode is None:
                check_signals()
                try:
                    _, errors = run.communicate(text, timeout=0.05)
                except subprocess.TimeoutExpired:
                    text = None  # `communicate` goes on with what it was given first
                    if time.monotonic() > deadline:
                        raise
        finally:
            if run.returncode is None:
                os.killpg(run.pid, signal.SIGKILL)
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, stderr=errors)


@functools.cache
def compile_kernel(search: bool) -> Kernel:
    """Compile the kernel, with what --scale mse needs or without, by the compiler that CC names, or cc."""
    compiler = os.environ.get("CC", "").split() or ["cc"]
    if not shutil.which(compiler[0]):
        raise QuantizeError(f"there is no C compiler {compiler[0]!r}")
    try:
        with (
            deferring_signals(),
            tempfile.TemporaryDirectory(
                prefix="quantize_int4.", ignore_cleanup_errors=True
            ) as folder,
        ):
            library = f"{folder}/kernel.so"  # once loaded, the file is not needed
            command = [*compiler, *KERNEL_FLAGS, f"-DSEARCH={int(search)}", "-o", library, "-"]
            run_compiler(command, folder)
            kernel = ctypes.CDLL(library)
            kernel.quantize.argtypes = [ctypes.c_void_p]
            kernel.spread_of.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2
    except subprocess.CalledProcessError as error:
        message = " ".join(error.stderr.decode(errors="replace").split())
        raise QuantizeError(
            f"{compiler[0]!r} failed: {message[:200] or f'exit code {error.returncode}'}"
        ) from None
    except subprocess.TimeoutExpired:
        raise QuantizeError(f"{compiler[0]!r} took more than {COMPILER_TIMEOUT_S} s") from None
    except (
        OSError,
        AttributeError,
    ) as error:  # a folder from which nothing may be executed; a library without them
        raise QuantizeError(str(error)) from None
    if not rounds_as_torch(kernel, search):
        raise QuantizeError(f"what {compiler[0]!r} made of it rounds otherwise")
    return kernel


# ---- Formats: what a weight becomes, and what its readers are told --------------------------------------------------


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output as its shard's header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    # Given where the bytes follow from the shapes alone.
    content: Callable[[], bytes] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Constant:
    """A tensor beside words and scales whose content follows from the weight's shape."""

    suffix: str
    # By its name, and the weight's rows, groups in a row and columns in a group.
    make: Callable[[str, int, int, int], OutputTensor]


def make_weight_shape(name: str, rows: int, groups: int, group_size: int) -> OutputTensor:
    """Make the weight's shape, without which transformers cannot unpack it."""
    return OutputTensor(name, "I64", (2,), lambda: struct.pack("<2q", rows, groups * group_size))


def make_zero_points(name: str, rows: int, groups: int, _group_size: int) -> OutputTensor:
    """Make the zero points of gptq, 8 each, which version 1 of the format stores less one."""
    return OutputTensor(name, "I32", (groups, rows // 8), lambda: b"\x77" * (groups * rows // 2))


def make_group_indices(name: str, _rows: int, groups: int, group_size: int) -> OutputTensor:
    """Make the number of each column's group."""

    def content() -> bytes:
        return b"".join(struct.pack("<i", group) * group_size for group in range(groups))

    return OutputTensor(name, "I32", (groups * group_size,), content)


WEIGHT_SHAPE = Constant(".weight_shape", make_weight_shape)
ZERO_POINTS = Constant(".qzeros", make_zero_points)
GROUP_INDICES = Constant(".g_idx", make_group_indices)


@dataclass(frozen=True)
class Format:
    """A row of `FORMATS`: what a weight becomes, and what its readers are told."""

    name: str
    # The endings that replace ".weight".
    words: str
    scales: str
    constants: tuple[Constant, ...]
    # Makes what is added to JSON files, by their names.
    describe: Callable[[list[TensorPlan], Options], dict[str, dict]]
    # Names of rows of `ENGINES`. A format without any is padded to whole groups.
    loaded_by: tuple[str, ...] = ()
    # None where scales have the dtype that the model computes in.
    scale_dtype: str | None = "F16"
    # Whether words hold code + 8, or + 128.
    with_offset: bool = False
    # Whether words and scales lie as (columns, rows).
    transposed: bool = False
    row_multiple: int = 1
    # What readers other than engines do with a finished folder {name}.
    other_steps: tuple[tuple[str, str], ...] = ()

    @property
    def suffixes(self) -> list[str]:
        return [self.words, self.scales, *(constant.suffix for constant in self.constants)]

    @property
    def engines(self) -> list[Engine]:
        return [ENGINES[name] for name in self.loaded_by]

    @property
    def for_engines(self) -> bool:
        return bool(self.loaded_by)

    @property
    def group_sizes(self) -> list[int]:
        """List the group sizes that all its required engines have, the largest first."""
        sizes = [set(engine.group_sizes) for engine in self.engines if engine.required]
        return sorted(set.intersection(*sizes), reverse=True)

    @property
    def whole_kinds(self) -> set[str]:
        """Return the kinds of layers that not all of its engines hold packed."""
        return {kind for engine in self.engines for kind in engine.whole_kinds}

    @property
    def has_two_widths(self) -> bool:
        """Return whether all its engines hold weights of 8 bits beside those of 4."""
        return self.for_engines and all(self.name in row.two_widths for row in self.engines)

    @property
    def next_steps(self) -> list[tuple[str, str]]:
        """List what to do with a finished folder {name}."""
        steps = []
        for engine in self.engines:
            if self.name in engine.commands:
                steps.append((engine.verb, engine.commands[self.name]))
        return [*steps, *self.other_steps]

    def outputs(
        self, info: TensorInfo, packing: Packing, computed_in: str | None
    ) -> tuple[OutputTensor, ...]:
        """List what replaces a weight. Engines would round the scales to `computed_in`
        (`model_dtype`) when they load them, and so the codes are made for scales of that dtype."""
        rows = info.shape[0]
        columns = packing.columns_of(info.shape[1])
        groups = columns // packing.group_size
        words_shape = (rows, columns // packing.codes_per_word)
        scales_shape = (rows, groups)
        if self.transposed:
            words_shape = words_shape[::-1]
            scales_shape = scales_shape[::-1]

        own_dtype = "F32" if info.dtype == "F64" else info.dtype
        scale_dtype = self.scale_dtype or computed_in or own_dtype

        module = info.name.removesuffix(".weight")
        words = OutputTensor(module + self.words, "I32", words_shape)
        scales = OutputTensor(module + self.scales, scale_dtype, scales_shape)
        constants = [
            constant.make(module + constant.suffix, rows, groups, packing.group_size)
            for constant in self.constants
        ]
        return (words, scales, *constants)


def describe_int4(tensors: list[TensorPlan], options: Options) -> dict[str, dict]:
    """Describe all that a reader needs beside the shards.

    Nothing here is called GPTQ, since no GPTQ reader could load it. config.json has no
    quant_method, so that transformers (5.24) and vLLM (0.29) stop. At a method that it does not
    know, transformers would only warn, and fill the weights with random numbers."""
    form = options.form
    size = options.group_size
    words = f"X{form.words}"
    scales = f"X{form.scales}"
    packed = [tensor.source for tensor in tensors if tensor.packing]
    padded = [info for info in packed if info.shape[1] % size]

    order = "8 codes a word along the columns, element 0 in the lowest 4 bits, two's complement"
    description = {
        "quant_method": "int4_weight_only",
        "format": form.name,
        "producer": f"quantize_int4.py {__version__}",
        "bits": 4,
        "group_size": size,
        "symmetric": True,
        "tensors": {
            words: f"int32 (rows, padded_columns // 8): {order}",
            scales: "float16 (rows, padded_columns // group_size)",
        },
        "dequantize": "weight[r, c] = code[r, c] * scales[r, c // group_size]",
        "padding": "columns are padded with zeros to a multiple of group_size; drop those past"
        " the true shape",
        "padded_weights": {info.name: list(info.shape) for info in padded},
        "quantized_weights": len(packed),
        "kept_weights": [tensor.source.name for tensor in tensors if not tensor.packing],
    }
    mark = {
        "quant_method": None,
        "format": form.name,
        "bits": 4,
        "group_size": size,
        "about": "packed by quantize_int4.py in a layout of its own, which"
        f" {QUANTIZE_CONFIG_NAME} describes and no engine loads; {USE_COMPRESSED_TENSORS}",
    }
    return {QUANTIZE_CONFIG_NAME: description, CONFIG_NAME: {"quantization_config": mark}}


def describe_compressed_tensors(tensors: list[TensorPlan], _options: Options) -> dict[str, dict]:
    """Make config.json's `quantization_config`, by the compressed-tensors package
    (quant_config.py).

    There is a group for each packing. The first takes whatever is `Linear`, the others name their
    modules. The first is that of fewest bits, and of most weights where several have as few: vLLM
    refuses experts whose projections are named apart ("must have same quantization scheme").
    Beside other groups it names experts, too, which transformers matches by name before class."""
    members: dict[Packing, list[str]] = {}
    for tensor in tensors:
        if tensor.packing:
            members.setdefault(tensor.packing, []).append(tensor.source.name)
    packings = sorted(members, key=lambda packing: (packing.bits, -len(members[packing])))

    groups = {}
    for number, packing in enumerate(packings):
        if number == 0:
            targets = ["Linear"]
            if len(members) > 1 and any(map(EXPERT_PATTERN.match, members[packing])):
                targets.append(r"re:(.*\.)?experts\.\d+\..*$")
        else:
            targets = [f"re:{pattern}" for pattern in patterns_of_modules(tensors, packing)]
        groups[f"group_{number}"] = {
            "targets": targets,
            "format": "pack-quantized",
            "weights": {
                "num_bits": packing.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": packing.group_size,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
        }

    kept = [f"re:{pattern}" for pattern in patterns_of_modules(tensors, None)]
    description = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *kept],
    }
    return {CONFIG_NAME: {"quantization_config": description}}


def describe_gptq(tensors: list[TensorPlan], options: Options) -> dict[str, dict]:
    """Make GPTQ v1's quantize_config.json, and the same in config.json.
    (GPTQModel, quantization/config.py)"""
    description = {
        "bits": 4,
        "group_size": options.group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "dynamic": {f"-:{pattern}": {} for pattern in patterns_of_modules(tensors, None)},
    }
    return {QUANTIZE_CONFIG_NAME: description, CONFIG_NAME: {"quantization_config": description}}


@dataclass(frozen=True)
class Entry:
    """A module that engines look up in a list of patterns, and the end that its pattern gets."""

    module: str
    end: str = "$"


class ModuleNames:
    """Names of modules, grouped by how they end: to search all of them for each of as many others
    would take minutes."""

    def __init__(self, names: list[str]):
        self.names = names
        self._by_last_part: dict[str, list[str]] = {}
        for name in names:
            self._by_last_part.setdefault(self._last_part(name), []).append(name)
        # By how many parts a tail has, and by the tail.
        self._by_tail: dict[int, dict[str, list[str]]] = {}

    @staticmethod
    def _last_part(name: str) -> str:
        """Return the part after the last dot, without the number for which a pattern's `\\d+`
        stands."""
        return re.sub(r".*\.|\d+$", "", name)

    def with_last_part_of(self, module: str) -> list[str]:
        """List the names that can match a pattern which ends as `module` does."""
        return self._by_last_part.get(self._last_part(module), [])

    def ending_in(self, tail: str) -> list[str]:
        """List the names whose last parts are these."""
        length = tail.count(".") + 1
        if length not in self._by_tail:
            by_tail: dict[str, list[str]] = {}
            for name in self.names:
                by_tail.setdefault(".".join(name.split(".")[-length:]), []).append(name)
            self._by_tail[length] = by_tail
        return self._by_tail[length].get(tail, [])


def patterns_of_modules(tensors: list[TensorPlan], packing: Packing | None) -> list[str]:
    """Make regular expressions for the modules of one packing or, for None, of those that are
    kept. One stands for all layer numbers where that matches no packed module of another.

    They leave out the wrappers in front, in which files and engines differ (`backbone.`,
    `model.language_model.` in transformers, `language_model.model.` in vLLM), since engines do not
    rename what a pattern says."""
    entries = []
    rivals = []
    for tensor in tensors:
        if tensor.packing == packing:
            entries += entries_of(tensor)
        elif tensor.packing:
            rivals += [name.removesuffix(".weight") for name in names_of(tensor)]

    names = ModuleNames(rivals)
    patterns = [pattern_of_module(entry, names) for entry in dict.fromkeys(entries)]
    return list(dict.fromkeys(patterns))


def names_of(tensor: TensorPlan) -> list[str]:
    """List a tensor's name in the file and, where it has others in memory, those."""
    return list(dict.fromkeys([tensor.source.name, *(tensor.in_memory or ())]))


def entries_of(tensor: TensorPlan) -> list[Entry]:
    """List what engines look up to know how a tensor is stored."""
    name = tensor.source.name
    dimensions = len(tensor.source.shape)
    module = name.removesuffix(".weight")
    # Engines know that the head is kept.
    if module == "lm_head" or dimensions < 2:
        return []

    # One entry for the layer's experts: vLLM asks for projections that a model need not have.
    experts = re.match(r"((?:.*\.)?experts)\.(?!gate\.|router\.)", name)
    if experts:
        return [Entry(experts[1], r"(\..*)?$")]

    stack = STACK_PATTERN.match(name)
    if dimensions == 3 and stack:
        return [Entry(f"{stack['place']}experts", r"(\..*)?$"), Entry(module)]
    if dimensions > 2:
        return []

    # What has another name in memory is looked up by that there, and by the file's in vLLM.
    layers = [name for name in names_of(tensor) if name.endswith(".weight")]
    return [Entry(name.removesuffix(".weight")) for name in layers]


def pattern_of_module(entry: Entry, packed: ModuleNames) -> str:
    """Make the shortest pattern, from the layers' container on, that matches the module under any
    wrappers and none of `packed`. Where a tower has layers of the same names, either the tower's
    name is in the pattern, or the pattern excludes it."""
    parts = entry.module.split(".")
    this_layer = [re.escape(part) for part in parts]
    any_layer = [r"\d+" if part.isdigit() else part for part in this_layer]
    first_number = any_layer.index(r"\d+") if r"\d+" in any_layer else len(parts)
    container = max(first_number - 1, 0)

    def tails(begin: int, unless: str = "") -> list[str]:
        return [
            rf"{unless}(.*\.)?" + r"\.".join(names[begin:]) + entry.end
            for names in (any_layer, this_layer)
        ]

    def matches_any(pattern: str, names: list[str]) -> bool:
        return any(map(re.compile(pattern).match, names))

    of_any_layer, of_this_layer = tails(container)
    if entry.end == "$":
        alike = packed.with_last_part_of(entry.module)
        rivals = packed.ending_in(".".join(parts[container:]))
    else:
        alike = packed.names
        rivals = list(filter(re.compile(of_this_layer).match, packed.names))
    if not rivals:
        return of_this_layer if matches_any(of_any_layer, alike) else of_any_layer

    parts_of_rivals = {part for rival in rivals for part in rival.split(".")}
    others = {part for part in parts_of_rivals if not part.isdigit()} - {*parts, "model"}
    unless = ""
    if others:
        unless = rf"(?!(.*\.)?({'|'.join(map(re.escape, sorted(others)))})\.)"

    longer = []
    for begin in range(container - 1, -1, -1):
        longer += tails(begin)
    without = tails(container, unless)
    in_tower = TOWER_WORDS.search(".".join(parts[:container]))
    candidates = longer + without if in_tower else without + longer
    for candidate in [of_any_layer, of_this_layer, *candidates]:
        if not matches_any(candidate, alike):
            return candidate
    raise QuantizeError(
        f"every pattern for {entry.module!r} would match {rivals[0]!r} too, which is stored"
        " otherwise: change --exclude or --int8 so that both are stored alike"
    )


@dataclass(frozen=True)
class Loader:
    """A row of `LOADERS`: the class of transformers that loads models whose architecture's name
    ends so."""

    name: str
    # A pattern.
    architectures: str
    # Of these types alone, separated by blanks; of all where there are none.
    model_types: str = ""


CONDITIONAL = "ForConditionalGeneration"
# The first row that fits. (transformers 5.24.0, models/auto/modeling_auto.py)
LOADERS = (
    Loader(
        "AutoModelForSpeechSeq2Seq",
        CONDITIONAL,
        "canary cohere_asr dia moonshine moonshine_streaming pop2piano speech_to_text whisper",
    ),
    Loader("AutoModelForSpeechSeq2Seq", "ForSpeechToText"),
    Loader("AutoModelForSpeechSeq2Seq", "EncoderDecoderModel", "speech-encoder-decoder"),
    Loader(
        "AutoModelForTextToWaveform",
        CONDITIONAL,
        "csm gradium_phonon_tts higgs_audio_v2 musicgen musicgen_melody pocket_tts vibevoice",
    ),
    Loader("AutoModelForTextToSpectrogram", "ForTextToSpeech", "speecht5"),
    Loader("AutoModelForTextToWaveform", "ForTextToSpeech"),
    Loader("AutoModelForSeq2SeqLM", CONDITIONAL, "audioflamingo3 musicflamingo"),
    Loader("AutoModelForSeq2SeqLM", "MTModel|EncoderDecoderModel", "encoder-decoder marian"),
    Loader("AutoModelForSeq2SeqLM", "ForTextToText"),
    Loader("AutoModelForImageTextToText", CONDITIONAL, "pi0 t5gemma2 udop"),
    Loader("AutoModelForImageTextToText", "ForCausalLM", "mistral4"),
    Loader("AutoModelForImageTextToText", "ForVisionText2Text|ForProteinText2Text"),
    Loader("AutoModelForImageTextToText", "ForBlockDiffusion"),
    Loader("AutoModelForImageTextToText", "", "nemotron_h_omni vision-encoder-decoder"),
    Loader("AutoModel", CONDITIONAL, "clvp"),
    Loader("AutoModelForMaskedLM", "LMHeadModel", "flaubert"),
    Loader("AutoModelForCausalLM", "LMHeadModel|ModelWithLMHead"),
    Loader("AutoModelForCausalLM", "Decoder", "bert-generation"),
    Loader("AutoModelForTextEncoding", "EncoderModel", "mt5 t5 t5gemma umt5"),
    Loader("AutoModelForTextEncoding", "TextModel", "emu3 llama4 mllama"),
    Loader(
        "AutoModelForMaskGeneration",
        "EdgeTamModel|Sam2Model|Sam3TrackerModel",
        "edgetam_video sam2_video sam3_video",
    ),
    Loader("AutoModelForPreTraining", "ForRetrieval"),
    Loader("AutoModelForTableQuestionAnswering", "ForQuestionAnswering", "tapas"),
    Loader("AutoModelForVisualQuestionAnswering", "ForQuestionAnswering", "blip vilt"),
    Loader("AutoModelForDocumentQuestionAnswering", "ForQuestionAnswering", "layoutlm"),
    Loader("AutoModelForQuestionAnswering", "ForQuestionAnsweringSimple"),
    Loader(
        "AutoModelForAudioClassification",
        "ForSequenceClassification",
        "data2vec-audio hubert sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-bert"
        " wav2vec2-conformer wavlm",
    ),
    Loader("AutoModelForAudioXVector", "ForXVector"),
    Loader(
        "AutoModelForImageClassification",
        "ForImageClassification(WithTeacher|Learned|Fourier|ConvProcessing)",
    ),
    Loader("AutoModelForZeroShotImageClassification", "ForImageTextRetrieval", "blip-2"),
    Loader(
        "AutoModelForZeroShotObjectDetection",
        "ForObjectDetection",
        "grounding-dino mm-grounding-dino omdet-turbo owlv2 owlvit",
    ),
    Loader("AutoModelForUniversalSegmentation", "ForSegmentation", "detr"),
    Loader("AutoModelForImageToImage", "ForImageSuperResolution"),
    Loader("AutoModelForTimeSeriesPrediction", "ModelForPrediction"),
    Loader("AutoBackbone", "Backbone"),
)
# Names X such that AutoModelForX loads a model Y whose architecture is called YForX.
SAME_NAMES = (
    "AudioClassification AudioFrameClassification CTC CausalLM Decision DepthEstimation"
    " ImageClassification ImageMatting InstanceSegmentation KeypointDetection KeypointMatching"
    " MaskedImageModeling MaskedLM MultipleChoice NextSentencePrediction NormalEstimation"
    " ObjectDetection PointmapEstimation PoseEstimation PreTraining QuestionAnswering RNNT"
    " SemanticSegmentation SequenceClassification TDT TableRecognition TextRecognition"
    " TokenClassification UniversalSegmentation VideoClassification"
)
LOAD_STEP = "transformers.{loader}.from_pretrained({path}, dtype='auto')"


def loading_class(config: dict) -> str:
    """Name the class of transformers that loads the whole model that config.json describes, head
    included."""
    architectures = architectures_of(config)
    architecture = architectures[0] if architectures else ""
    own_classes = classes_of_its_own_code(config, architecture)
    if own_classes:
        return own_classes[0]

    towers = [
        key for key, value in config.items() if isinstance(value, dict) and key.endswith("_config")
    ]
    if not architecture:
        pairs = config_booleans(only(config, "is_encoder_decoder"), "is_encoder_decoder")
        architecture = CONDITIONAL if towers or any(pairs) else "ForCausalLM"

    types = set(config_strings(only(config, "model_type"), "model_type"))
    for row in LOADERS:
        is_of_type = not row.model_types or types & {*row.model_types.split()}
        if is_of_type and re.search(f"({row.architectures})$", architecture):
            return row.name
    for name in SAME_NAMES.split():
        if architecture.endswith(f"For{name}"):
            return f"AutoModelFor{name}"

    if not architecture.endswith(CONDITIONAL):
        return "AutoModel"
    if any(re.search(r"vis(ion|ual)|image|^vq_", key) for key in towers):
        return "AutoModelForImageTextToText"
    return "AutoModelForMultimodalLM" if towers else "AutoModelForSeq2SeqLM"


def classes_of_its_own_code(config: dict, architecture: str) -> list[str]:
    """List the classes under which config.json registers code beside it (`auto_map`) for its
    architecture, the most useful first."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict):
        return []
    names = []
    for name, target in auto_map.items():
        is_own = isinstance(target, str) and target.rpartition(".")[2] == architecture
        if is_own and re.fullmatch(r"AutoModel\w*", name):
            names.append(name)
    return sorted(
        names, key=lambda name: (name != "AutoModelForCausalLM", name == "AutoModel", name)
    )


@dataclass(frozen=True)
class Engine:
    """A row of `ENGINES`: what an engine can hold of the formats that name it. `RULES` has what is
    refused and what is noted of it.

    For every engine, stacks of experts that are packed become one weight an expert."""

    name: str
    # The version with which the columns were read or tried, and where they were read.
    version: str
    sources: tuple[str, ...]
    # The group sizes that its kernels have, any where none are stated; and whether all folders
    # must have one of these, or others are only noted.
    kernels: str = ""
    group_sizes: tuple[int, ...] = ()
    required: bool = False
    # What it does not hold packed: kinds of layers by `find_kinds`, and GPT-2's Conv1D. It may
    # hold all else, towers' layers among it.
    whole_kinds: tuple[str, ...] = ("embeddings", "head", "routers", "Conv1D")
    # Layers that it holds as one, and so in one precision.
    fused_layers: tuple[str, ...] = ()
    # Whether it holds all routed experts of a layer as one.
    fuses_experts: bool = False
    # Whether it reads the experts of all layers in one width, and others as noise.
    one_width_of_experts: bool = False
    # Whether it renames, splits or joins tensors as it loads them, and looks modules up by the
    # names that these have in memory.
    converts_tensors: bool = False
    # Formats in which it knows weights of 8 bits beside those of 4, and in which it knows
    # experts that are kept.
    two_widths: tuple[str, ...] = ()
    kept_experts: tuple[str, ...] = ()
    # By format: how it misreads packed experts.
    misreads_experts: Mapping[str, str] = field(default_factory=dict)
    # By format: the command that loads a finished folder {name}; and what that is called.
    commands: Mapping[str, str] = field(default_factory=dict)
    verb: str = ""

    @property
    def label(self) -> str:
        """Return its name and version as messages state them: transformers (5.24)."""
        return f"{self.name} ({self.version.removesuffix('.0')})"


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="vLLM",
            version="0.29.0",
            sources=(
                "model_executor/layers/quantization/utils/marlin_utils.py",
                "packed_modules_mapping of its models",
            ),
            kernels="Marlin",
            group_sizes=(128, 64, 32),
            required=True,
            fused_layers=(
                "q_proj,k_proj,v_proj",
                "gate_proj,up_proj",
                "w1,w3",
                "q_a_proj,kv_a_proj_with_mqa",
                "in_proj_qkv,in_proj_z",
                "in_proj_b,in_proj_a",
                "wq,wk,wv",
                "q,k,v",
                "c_fc_0,c_fc_1",
                "fc1,fc3",
                "gate_proj,dense_h_to_4h",
            ),
            fuses_experts=True,
            two_widths=("compressed-tensors", "gptq"),
            kept_experts=("compressed-tensors",),
            misreads_experts={"gptq": "vLLM before 0.29"},
            commands={
                "compressed-tensors": "vllm serve {name} --max-model-len 8192",
                "gptq": "vllm serve {name} --dtype float16 --max-model-len 8192",
            },
            verb="Serve",
        ),
        # It reads gptq through optimum (2.3), which ignores `dynamic`, and so what is kept or has
        # 8 bits.
        Engine(
            name="transformers",
            version="5.24.0",
            sources=("conversion_mapping.py", "quantizers/quantizer_compressed_tensors.py"),
            one_width_of_experts=True,
            converts_tensors=True,
            two_widths=("compressed-tensors",),
            kept_experts=("compressed-tensors",),
            misreads_experts={"gptq": "transformers leaves them random without an error"},
            commands={"compressed-tensors": LOAD_STEP, "gptq": LOAD_STEP},
            verb="Load",
        ),
        # Its experts were not tried.
        Engine(
            name="GPTQModel",
            version="7.7.0",
            sources=("quantization/config.py", "nn_modules/qlinear/torch.py"),
            kernels="TorchLinear",
            group_sizes=(1024, 512, 256, 128, 64, 32, 16),
            two_widths=("gptq",),
        ),
    )
}

USE_COMPRESSED_TENSORS = "--format compressed-tensors makes what vLLM and transformers load"
NO_ENGINE = f"no engine loads int4, which is for readers of your own; {USE_COMPRESSED_TENSORS}"
INT4 = Format(
    name="int4",
    words=".qweight",
    scales=".scales",
    constants=(),
    describe=describe_int4,
    other_steps=(
        ("Serve", NO_ENGINE),
        ("Read", "dequantize_int4 of quantize_int4.py, by {name}/quantize_config.json"),
    ),
)
COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    words=".weight_packed",
    scales=".weight_scale",
    constants=(WEIGHT_SHAPE,),
    describe=describe_compressed_tensors,
    loaded_by=("vLLM", "transformers"),
    scale_dtype=None,
    with_offset=True,
)
GPTQ = Format(
    name="gptq",
    words=".qweight",
    scales=".scales",
    constants=(ZERO_POINTS, GROUP_INDICES),
    describe=describe_gptq,
    loaded_by=("vLLM", "transformers", "GPTQModel"),
    with_offset=True,
    transposed=True,
    row_multiple=8,
)
FORMATS = {form.name: form for form in (INT4, COMPRESSED_TENSORS, GPTQ)}


# ---- Statistics of the layers' inputs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vector:
    """Where a weight's mean squares are: in a tensor of the file, or in an expert's row of one."""

    name: str
    expert: int | None = None


def end_of_name(name: str) -> str:
    """Return what follows the wrappers: the name from the layers' container on, or the last two
    parts where it lies in no layer."""
    layer = LAYER_PATTERN.match(name)
    return name[layer.start(2) :] if layer else ".".join(name.split(".")[-2:])


class Importance(WeightsFile):
    """Statistics of each layer's input activations, from --importance: mean squares (columns,),
    which weigh the error of a weight's columns, and a factor (columns, rank), which tells how the
    columns go together, if there is one.

    They are named as a model's parameters, X and X.factor, whose wrappers may differ from the
    checkpoint's. Where the model holds its experts as a stack, one tensor (experts, columns) or
    (experts, columns, rank) stands for all."""

    def __init__(self, path: Path):
        super().__init__(path)
        if not self.infos:
            raise QuantizeError(
                f"{path}: names no layer: collect it from this model, as in README.md"
            )
        # Numbers in the largest factor of a weight.
        self.largest_factor = 0
        for name, info in self.infos.items():
            module = name.removesuffix(".factor")
            if module == name:
                continue
            if module not in self.infos:
                raise QuantizeError(f"{path}: {name!r} has no {module!r} beside it")
            self.largest_factor = max(self.largest_factor, math.prod(info.shape[-2:]))
        # By weight.
        self._vectors: dict[str, Vector] = {}

    def match(self, weights: list[TensorInfo], tensors: list[TensorInfo], oddity: Oddity) -> None:
        """Find each weight's vector: by name, else by what follows the wrappers, where only one
        vector and only one of all tensors of the checkpoint ends so. Raises if more than half of
        the weights have none."""
        names = [name for name in self.infos if not name.endswith(".factor")]
        vectors: dict[str, Vector] = {}
        for name in names:
            vectors |= self._vectors_in(name, oddity)

        vector_ends = Counter(map(end_of_name, vectors))
        tensor_ends = Counter(end_of_name(info.name) for info in tensors)
        by_end = {end_of_name(name): vector for name, vector in vectors.items()}
        for weight in weights:
            end = end_of_name(weight.name)
            vector = vectors.get(weight.name)
            if not vector and vector_ends[end] == tensor_ends[end] == 1:
                vector = by_end[end]
            if vector:
                self._vectors[weight.name] = vector

        if len(self._vectors) * 2 < len(weights):
            own_names = quote_names(names)
            other_names = quote_names(weight.name for weight in weights)
            raise QuantizeError(
                f"{self.path} names {len(self._vectors):,} of {count_of(len(weights), 'weight')}"
                f" that are quantized: its names are {own_names}, the checkpoint's {other_names}:"
                " collect them from this model"
            )

    def _vectors_in(self, name: str, oddity: Oddity) -> dict[str, Vector]:
        """List the vectors that a tensor of the file holds, by the weights that it is about."""
        shape = self.infos[name].shape
        stack = STACK_PATTERN.match(name)
        if len(shape) != 2 or not stack or not stack["projection"]:
            return {oddity.renamed(f"{name}.weight"): Vector(name)}
        vectors = {}
        for expert in range(shape[0]):
            for projection in oddity.projections_of(stack["projection"]):
                weight = f"{stack['place']}experts.{expert}.{projection}.weight"
                vectors[oddity.renamed(weight)] = Vector(name, expert)
        return vectors

    def describe(self, weights: list[TensorInfo]) -> str:
        """Describe for the plan how many of these have what. All of it is read and checked."""
        named = 0
        weighed = 0
        ranks = []
        for weight in weights:
            named += weight.name in self._vectors
            data = self.get(weight)
            if data:
                weighed += 1
                _, factor = data
                if factor is not None:
                    ranks.append(factor.shape[1])

        feedback = ""
        if ranks:
            different = ", ".join(map(str, sorted(set(ranks))))
            feedback = f", {len(ranks):,} of them with error feedback of rank {different}"
        return (
            f"importance weighs {count_of(weighed, 'weight')}{feedback};"
            f" {named - weighed:,} named without data, {len(weights) - named:,} not named"
        )

    def has_factor(self, info: TensorInfo) -> bool:
        vector = self._vectors.get(info.name)
        return vector is not None and f"{vector.name}.factor" in self.infos

    def get(self, info: TensorInfo) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Read a weight's mean squares, float32 (columns,), and its factor, float32
        (columns, rank), or None if it has none. None if the file does not name the weight, or if
        no data reached the layer."""
        vector = self._vectors.get(info.name)
        if not vector:
            return None
        columns = info.shape[1]
        rule = f"{info.name!r} needs a float32 for each of its {columns:,} columns"
        squares = self._read_vector(vector, ["F32"], [(columns,)], rule)
        self._refuse_not_finite(vector.name, squares, may_be_negative=False)
        if not squares.any():
            return None
        if not self.has_factor(info):
            return squares, None

        vector = replace(vector, name=f"{vector.name}.factor")
        rule = (
            f"a factor is float32 or float16 (columns, rank), here ({columns:,}, 1 to {MAX_RANK})"
        )
        shapes = [(columns, rank + 1) for rank in range(MAX_RANK)]
        factor = self._read_vector(vector, ["F32", "F16"], shapes, rule)
        self._refuse_not_finite(vector.name, factor, may_be_negative=True)
        if factor.numel() > MAX_FACTOR:
            raise QuantizeError(
                f"{self.path}: {vector.name!r} holds {factor.numel():,} numbers, at most"
                f" {MAX_FACTOR:,} are held in memory: collect it with a rank of"
                f" {MAX_FACTOR // columns}"
            )
        self._refuse_factor_of_other_inputs(vector.name, factor, squares)
        return squares, factor.to(torch.float32)

    def _read_vector(
        self, vector: Vector, dtypes: list[str], shapes: list[tuple[int, ...]], rule: str
    ) -> torch.Tensor:
        """Read a tensor of the file, or an expert's row of one, which must have one of these
        dtypes and shapes."""
        info = self.infos[vector.name]
        rows = 1
        row = 0
        shape = info.shape
        if vector.expert is not None:
            rows = math.prod(info.shape[:1])
            row = vector.expert
            shape = info.shape[1:]
        if info.dtype not in dtypes or shape not in shapes or row >= rows:
            raise QuantizeError(
                f"{self.path}: {vector.name!r} is {info.dtype} {info.shape}; {rule}"
            )
        nbytes = info.nbytes // rows
        data = self.read(info, row * nbytes, nbytes)
        return torch.frombuffer(data, dtype=FLOAT_DTYPES[info.dtype]).view(shape)

    def _refuse_not_finite(self, name: str, tensor: torch.Tensor, may_be_negative: bool) -> None:
        """Refuse a tensor with values that statistics cannot have."""
        usable = torch.isfinite(tensor)
        problem = "not finite"
        if not may_be_negative:
            usable &= tensor >= 0
            problem = "negative or not finite"
        if not usable.all():
            raise QuantizeError(f"{self.path}: {name!r} has values {problem}")

    def _refuse_factor_of_other_inputs(
        self, name: str, factor: torch.Tensor, squares: torch.Tensor
    ) -> None:
        """Refuse a factor whose squares add up, in a column, to more than the mean square of the
        same inputs can be."""
        # The factor was rounded to its dtype: a normal number by at most eps of itself, a smaller
        # one by at most eps * tiny. What rounding may have added does not count.
        dtype = torch.finfo(factor.dtype)
        least = factor.to(torch.float32).abs()
        least.mul_(1 - dtype.eps).sub_(dtype.eps * dtype.tiny).clamp_(min=0)
        sums = least.square_().sum(1)
        beyond = sums > squares * (1 + 1e-4) + squares.max() * 1e-6
        if beyond.any():
            column = int(beyond.int().argmax())
            raise QuantizeError(
                f"{self.path}: {name!r} has squares in column {column} that add up to"
                f" {float(sums[column]):.6g}, more than the column's mean square,"
                f" {float(squares[column]):.6g}: collect both from the same inputs"
            )


# ---- Plan: all that is decided before the first weight is read ------------------------------------------------------

# Keys of config.json.
LAYER_COUNTS = ("num_hidden_groups", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
# All keys that are read there, by the kind of value that belongs under each.
CONFIG_KEYS = {
    as_integer: (
        "vocab_size",
        "padded_vocab_size",
        "hidden_size",
        "d_model",
        "n_embd",
        "moe_latent_size",
        *EXPERT_WIDTHS,
    ),
    as_count: (
        "encoder_layers",
        "num_encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
        *LAYER_COUNTS,
        *EXPERT_COUNTS,
    ),
    as_string: ("model_type", "architectures", "dtype", "torch_dtype"),
    as_boolean: ("tie_word_embeddings", "is_encoder_decoder"),
}
# Files beside the weights that are not the model's. All others at the folder's top level are
# copied.
OTHER_WEIGHTS = (
    r"\.(safetensors|bin|pth?|ckpt|gguf|ggml|onnx(_data)?|h5|msgpack|npz|pkl|pickle|nemo"
    r"|tar(\.\w+)?|tgz|zip|index\.json)$"
)
# Why an expert is kept decides the group size.
NARROW = "narrow: under {} columns"


@dataclass(frozen=True)
class Options:
    """What the user asked for, as far as it decides the output's bytes. Shards state it as JSON."""

    format: str
    # None until `plan_conversion` has chosen one.
    group_size: int | None
    exclude: list[str]
    quantize_embeddings: bool
    # Patterns of what is packed in 8 bits.
    int8: list[str]
    # "absmax", or "mse": least squared error.
    scale: str
    # FEEDBACK or WEIGHED, and the file's SHA-256.
    importance: str | None
    # The other way: from `format` to dense weights.
    restore: bool
    shard_size_gb: float

    @property
    def form(self) -> Format:
        return FORMATS[self.format]

    @property
    def rule(self) -> str:
        """Describe how scales and codes are chosen."""
        use_and_digest = (self.importance or "").split()
        return " ".join([self.scale, *use_and_digest[:-1]])


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor of the input."""

    source: TensorInfo
    # None where it is quantized.
    kept_because: str | None
    # None where it is kept.
    packing: Packing | None
    # Words, scales and constants; or the tensor that is kept; or the weight that is restored.
    outputs: tuple[OutputTensor, ...]
    # The scales of words that are restored, which are the source.
    scales: TensorInfo | None = None
    # Of a layer, for the tables.
    kind: str = ""
    # What transformers makes of the source; None where that is not known.
    in_memory: tuple[str, ...] | None = ()

    @property
    def bytes_read(self) -> int:
        return self.source.nbytes + (self.scales.nbytes if self.scales else 0)


@dataclass(frozen=True)
class ShardPlan:
    """A shard of the output: its name, its first bytes, and how many it has in all."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first weight is read."""

    options: Options
    # What decides the output and the user can change; JSON.
    facts: dict
    # Of sources and options: two runs with the same one write the same bytes.
    fingerprint: str
    tensors: list[TensorPlan]
    # Bytes of all output tensors.
    total_size: int
    shards: list[ShardPlan]
    # By output tensor: the number of its shard, and where in that file it begins.
    placements: dict[str, tuple[int, int]]
    # Beside the shards, by name: what is copied or written, the index last.
    other_files: dict[str, Path | bytes]
    # SHA-256 of these files.
    hashes: dict[str, str]
    left_out: list[str]
    # The class of transformers that loads the whole model.
    loader: str
    notes: Collection[str] = ()
    warnings: Collection[str] = ()
    statistics: Importance | None = None
    # How many stacks of experts are read as one weight an expert.
    stacks: int = 0
    # Why transformers would not load all of the folder.
    fails_in_transformers: str = ""


def plan_conversion(
    checkpoint: Checkpoint, options: Options, statistics: Importance | None = None
) -> Plan:
    """Decide what becomes of every tensor and file and where each byte goes, or refuse."""
    config = checkpoint.config
    draft = Draft(checkpoint, options, statistics)
    refuse(draft, CHECKPOINT)

    stacks = find_expert_stacks(checkpoint, options.form.for_engines)
    separated = {}
    for name, stack in stacks.items():
        if not stays_whole(stack, options):
            separated[name] = stack
    draft = replace(draft, stacks=stacks, separated=separated)
    refuse(draft, STACKS)

    sources = separate_experts(checkpoint, separated)
    kinds = find_kinds(sources, config)
    group_size = choose_group_size(sources, kinds, options)
    is_chosen = options.group_size is None
    options = replace(options, group_size=group_size)
    tensors = list(plan_tensors(sources, kinds, options, config))
    draft = replace(
        draft,
        options=options,
        sources=sources,
        kinds=kinds,
        tensors=tensors,
        group_size_is_chosen=is_chosen,
    )
    refuse(draft, TENSORS)

    if statistics:
        statistics.match(draft.packed, sources, oddity_with("projections", config))
    warnings = list(messages(draft, WARNING))
    notes = list(messages(draft, NOTE))
    return replace(
        plan_files(checkpoint, tensors, options),
        notes=notes,
        warnings=warnings,
        statistics=statistics,
        stacks=len(separated),
        fails_in_transformers=reason_transformers_fails(draft),
    )


def choose_group_size(sources: list[TensorInfo], kinds: dict[str, str], options: Options) -> int:
    """Return how many columns share a scale: what was asked for; else for engines the largest size
    that they hold and that divides all columns, or the least if none does; else 128."""
    if options.group_size:
        return options.group_size
    if not options.form.for_engines:
        return 128
    sizes = options.form.group_sizes
    for size in sizes:
        if fits_all(sources, kinds, replace(options, group_size=size)):
            return size
    return sizes[-1]


def fits_all(sources: list[TensorInfo], kinds: dict[str, str], options: Options) -> bool:
    """Return whether groups of this size divide the columns of all that is quantized, and no expert
    is too narrow for one. A weight of 8 bits that has groups of 128 divides by all smaller ones."""
    size = options.group_size
    for info in sources:
        reason = reason_to_keep(info, options, kinds.get(info.name))
        if not reason and info.shape[1] % size:
            return False
        if reason == NARROW.format(size) and EXPERT_PATTERN.match(info.name):
            return False
    return True


def plan_restoration(checkpoint: Checkpoint, options: Options, dtypes: dict) -> Plan:
    """Decide what weights are decoded to: each to the dtype that it had in the source, by
    `dtypes_of_packed`."""
    folder = checkpoint.folder
    form = options.form
    if not (folder / INDEX_NAME).exists():
        raise QuantizeError(f"{folder} is unfinished: give the command that began it again")
    padded = {} if form.for_engines else read_padded_weights(folder)
    dtype_of = {name: dtype for dtype, names in dtypes["others"].items() for name in names}

    tensors = []
    parts = set()
    for name in checkpoint.tensors:
        module = name.removesuffix(form.words)
        if module != name:
            dtype = dtype_of.get(f"{module}.weight", dtypes["most"])
            tensors.append(plan_restored_weight(checkpoint, form, module, dtype, padded))
            parts |= {module + suffix for suffix in form.suffixes}
    kept = [info for name, info in checkpoint.tensors.items() if name not in parts]

    weights = [tensor.outputs[0] for tensor in tensors]
    kinds = find_kinds([*weights, *kept], checkpoint.config)
    tensors = [replace(tensor, kind=kinds[tensor.outputs[0].name]) for tensor in tensors]
    for info in kept:
        output = OutputTensor(info.name, info.dtype, info.shape)
        tensors.append(TensorPlan(info, "not packed", None, (output,)))
    return replace(plan_files(checkpoint, tensors, options), notes=checkpoint.notes)


def plan_restored_weight(
    checkpoint: Checkpoint,
    form: Format,
    module: str,
    dtype: str,
    padded: dict[str, tuple[int, int]],
) -> TensorPlan:
    """Decide what the parts of a packed weight are decoded to."""
    infos = checkpoint.tensors
    for suffix in form.suffixes:
        if module + suffix not in infos:
            problem = f"tensor {module + suffix!r} is missing: copy it again"
            raise QuantizeError(f"{checkpoint.folder}: {problem}")
    words = infos[module + form.words]
    scales = infos[module + form.scales]
    if form.transposed:
        words = transpose(words)
        scales = transpose(scales)

    rows = words.shape[0]
    columns = words.shape[1] * CODES_PER_WORD
    # Twice as many columns and 8 bits have as many words.
    if WEIGHT_SHAPE in form.constants:
        stated = checkpoint.read(infos[module + WEIGHT_SHAPE.suffix], 0, 16)
        rows, columns = struct.unpack("<2q", stated)
    packing = Packing(32 * words.shape[1] // columns, columns // scales.shape[1])

    shape = padded.get(f"{module}.weight", (rows, columns))
    if shape[0] != rows or packing.columns_of(shape[1]) != columns:
        raise QuantizeError(
            f"{checkpoint.folder / QUANTIZE_CONFIG_NAME}: {shape[0]:,} by {shape[1]:,} are not"
            f" what {module!r} has, {rows:,} by {columns:,}: copy the folder again"
        )
    output = OutputTensor(f"{module}.weight", dtype, shape)
    return TensorPlan(words, None, packing, (output,), scales)


def transpose(info: TensorInfo) -> TensorInfo:
    """Describe a matrix that lies as (columns, rows) as one of rows by columns."""
    row_bytes = info.shape[1] * DTYPE_BITS[info.dtype] // 8
    return info.part(info.name, info.shape[::-1], 0, row_bytes)


def read_padded_weights(folder: Path) -> dict[str, tuple[int, int]]:
    """Read the true shapes of the weights that `int4` padded, by name."""
    path = folder / QUANTIZE_CONFIG_NAME
    listed = read_json(path).get("padded_weights")
    if not isinstance(listed, dict):
        raise QuantizeError(f"{path}: its padded_weights are missing: copy it again")
    shapes = {}
    for name, shape in listed.items():
        if not isinstance(shape, list) or [type(size) for size in shape] != [int, int]:
            raise QuantizeError(f"{path}: {name!r} has no rows and columns: copy it again")
        shapes[name] = tuple(shape)
    return shapes


def named_by(patterns: list[str], info: TensorInfo) -> str | None:
    """Return the first pattern that matches this tensor's name or that of the stack it is read
    from."""
    for pattern in patterns:
        if re.search(pattern, info.name) or re.search(pattern, info.name_in_file):
            return pattern
    return None


def stays_whole(stack: ExpertStack, options: Options) -> bool:
    """Return whether a stack of experts is written as it is: if --exclude matches it or all its
    weights, and all readers know it so."""

    def is_excluded(infos: list[TensorInfo]) -> bool:
        return bool(infos) and all(named_by(options.exclude, info) for info in infos)

    known = stack.whole_in_vllm or not options.form.for_engines
    return known and (is_excluded([stack.info]) or is_excluded(stack.weights))


def separate_experts(checkpoint: Checkpoint, stacks: dict[str, ExpertStack]) -> list[TensorInfo]:
    """List the checkpoint's tensors, these stacks replaced by their weights, all named as
    `save_pretrained` names them."""
    oddity = oddity_with("projections", checkpoint.config) if stacks else Oddity("")
    sources = []
    for name, info in checkpoint.tensors.items():
        for part in stacks[name].weights if name in stacks else [info]:
            renamed = oddity.renamed(part.name)
            sources.append(replace(part, name=renamed, stored=part.name_in_file))
    return sources


def pattern_of(infos: Iterable[TensorInfo]) -> str:
    """Make a pattern for --exclude that means tensors of these names, in any layer."""
    tails = set()
    for info in infos:
        parts = info.name.removesuffix(".weight").split(".")[-2:]
        escaped = [r"\d+" if part.isdigit() else re.escape(part) for part in parts]
        tails.add(r"\.".join(escaped))
    return rf"\b({'|'.join(sorted(tails))})(\.weight)?$"


def plan_tensors(
    sources: list[TensorInfo], kinds: dict, options: Options, config: dict
) -> Iterator[TensorPlan]:
    """Decide for each tensor whether it is quantized, and what it becomes."""
    reasons = [reason_to_keep(info, options, kinds.get(info.name)) for info in sources]
    eights = [not reason and named_by(options.int8, info) for info, reason in zip(sources, reasons)]
    # Groups of 128 where these fit. Engines hold routed experts as one, so they must fit all.
    ragged = {info.name for info, eight in zip(sources, eights) if eight and info.shape[1] % 128}
    ragged_experts = any(map(EXPERT_PATTERN.match, ragged))
    computed_in = model_dtype(config)
    rows = list(dict.fromkeys(rows_when_loaded(config)))
    for info, reason, eight in zip(sources, reasons, eights):
        packing = None
        outputs = (OutputTensor(info.name, info.dtype, info.shape),)
        if not reason:
            misfit = ragged_experts if EXPERT_PATTERN.match(info.name) else info.name in ragged
            size = 128 if eight and not misfit else options.group_size
            packing = Packing(8 if eight else 4, size)
            outputs = options.form.outputs(info, packing, computed_in)
        in_memory = names_in_memory(info.name, rows) if len(info.shape) == 2 else ()
        kind = kinds.get(info.name, "")
        yield TensorPlan(info, reason, packing, outputs, kind=kind, in_memory=in_memory)


def reason_to_keep(info: TensorInfo, options: Options, kind: str | None) -> str | None:
    """Return why a tensor is not quantized, in words for the plan; None if it is."""
    dimensions = len(info.shape)
    size = options.group_size
    pattern = named_by(options.exclude, info)
    if pattern is not None:
        return f"--exclude {pattern}"
    if dimensions < 2:
        return "vectors and scalars (norms)"
    if dimensions > 2:
        return f"{dimensions}-D (not a linear layer)"
    if not info.name.endswith(".weight"):
        return "2-D but not named *.weight"
    if info.dtype not in FLOAT_DTYPES:
        return f"2-D of dtype {info.dtype}"
    if kind == "embeddings" and not options.quantize_embeddings:
        return "embeddings"
    if not info.nbytes or info.shape[1] < size:
        return NARROW.format(size)
    # To ask for embeddings where they are whole is refused by a rule.
    if kind in options.form.whole_kinds and kind != "embeddings":
        return f"{kind} (whole for engines)"
    return None


def plan_files(checkpoint: Checkpoint, tensors: list[TensorPlan], options: Options) -> Plan:
    """Plan the files: what is copied, written or left out, the shards, and the fingerprint of what
    decides them."""
    described = {} if options.restore else options.form.describe(tensors, options)
    config = checkpoint.config | described.pop(CONFIG_NAME, {})
    if checkpoint.has_config:
        described[CONFIG_NAME] = config
    written = {name: as_json_file(value) for name, value in described.items()}
    copied, left_out = plan_other_files(checkpoint, {INDEX_NAME, *written})
    hashes = {name: hash_file(path) for name, path in copied.items()}
    hashes |= {name: hashlib.sha256(data).hexdigest() for name, data in written.items()}

    facts = {
        "version": FORMAT_VERSION,
        "options": vars(options),
        "sources": checkpoint.sources,
        "dtypes": {} if options.restore else dtypes_of_packed(tensors),
    }
    # The times of the weights' files decide nothing: they call for a comparison.
    timeless = facts | {"sources": {name: size for name, (size, _) in facts["sources"].items()}}
    shapes = [(tensor.source.name, tensor.source.dtype, tensor.source.shape) for tensor in tensors]
    fingerprint = hashlib.sha256(json.dumps([timeless, hashes, shapes]).encode()).hexdigest()

    metadata = {
        "format": "pt",
        METADATA_KEY: fingerprint,
        FACTS_KEY: json.dumps(facts),
        FILES_KEY: json.dumps(hashes),
    }
    shards, placements = plan_shards(tensors, round(options.shard_size_gb * GB), metadata)
    weight_map = {name: shards[number].name for name, (number, _) in sorted(placements.items())}
    total_size = sum(output.nbytes for tensor in tensors for output in tensor.outputs)
    index = as_json_file({"metadata": {"total_size": total_size}, "weight_map": weight_map})
    hashes[INDEX_NAME] = hashlib.sha256(index).hexdigest()
    return Plan(
        options=options,
        facts=facts,
        fingerprint=fingerprint,
        tensors=tensors,
        total_size=total_size,
        shards=shards,
        placements=placements,
        other_files=copied | written | {INDEX_NAME: index},
        hashes=hashes,
        left_out=left_out,
        loader=loading_class(checkpoint.config),
    )


def as_json_file(value: dict) -> bytes:
    """Return the bytes of a JSON file. Half of a surrogate pair, which Python reads and no encoding
    has, is escaped again."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return f"{text}\n".encode(errors="backslashreplace")


def dtypes_of_packed(tensors: list[TensorPlan]) -> dict:
    """Return which dtypes the weights that are packed have in the source: that of most, and the
    names of the others."""
    names: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.packing:
            names.setdefault(tensor.source.dtype, []).append(tensor.source.name)
    most = max(names, key=lambda dtype: len(names[dtype]))
    del names[most]
    return {"most": most, "others": names}


def plan_other_files(checkpoint: Checkpoint, written: set) -> tuple[dict[str, Path], list[str]]:
    """List the files beside the weights that are copied, by name, and why others are not."""
    folder = checkpoint.config_folder
    beside = set(folder.iterdir()) - set(checkpoint.files) - {folder / name for name in written}
    copied = {}
    left_out = []
    for path in sorted(beside):
        reason = reason_to_leave_out(path)
        if reason:
            name = f"{path.name}/" if path.is_dir() else path.name
            left_out.append(f"{name} ({reason})")
            continue
        denied = why_unreadable(path)
        if denied:
            raise QuantizeError(f"{path}: {denied}, or remove it: it would be copied")
        if not path.exists():
            problem = f"a link to {os.readlink(path)}, which is missing"
            raise QuantizeError(f"{path}: {problem}: mend or remove it, it would be copied")
        refuse_pointer(path)
        copied[path.name] = path

    if folder != checkpoint.folder:
        for path in sorted(set(checkpoint.folder.iterdir()) - set(checkpoint.files)):
            left_out.append(f"{path.name} (of {checkpoint.folder}; --config_dir counts)")
    return copied, left_out


def reason_to_leave_out(path: Path) -> str | None:
    """Return why a file beside the weights is not copied; None if it is."""
    if path.is_dir():
        return "folder"
    if path.name.startswith("."):
        return "hidden"
    if TRAINER_PATTERN.search(path.name):
        return "training state"
    if re.search(OTHER_WEIGHTS, path.name):
        return "other weights"
    if path.name == ADAPTER_CONFIG_NAME:
        return "of an adapter"
    if path.exists() and not path.is_file():
        return "not a regular file"
    if UNFINISHED_PATTERN.fullmatch(path.name):
        return "of another conversion"
    if path.name in QUANTIZATION_FILES:
        return "of the quantization"
    return None


def plan_shards(
    tensors: list[TensorPlan], shard_size: int, metadata: dict
) -> tuple[list[ShardPlan], dict[str, tuple[int, int]]]:
    """Fill shards in the input's order. A file holds at most `shard_size` bytes unless one tensor
    alone is larger."""
    # With the length field and the padding.
    empty = len(json.dumps({"__metadata__": metadata})) + 16
    # No tensor's entry is longer, but for its name and shape.
    entry = {"dtype": "F8_E4M3FNUZ", "shape": [], "data_offsets": [10**14, 10**14]}

    contents: list[list[OutputTensor]] = []
    used = shard_size
    for tensor in tensors:
        sizes = {}
        for output in tensor.outputs:
            longest = json.dumps({output.name: entry | {"shape": output.shape}})
            sizes[output.name] = output.nbytes + len(longest)
        # A weight's words and scales stay together, unless the limit is too small to hold both.
        parts = [tensor.outputs]
        if empty + sum(sizes.values()) > shard_size:
            parts = [(output,) for output in tensor.outputs]
        for part in parts:
            nbytes = sum(sizes[output.name] for output in part)
            if not contents or used + nbytes > shard_size:
                contents.append([])
                used = empty
            contents[-1].extend(part)
            used += nbytes

    shards = []
    placements = {}
    for number, outputs in enumerate(contents):
        # Widest elements first, as the safetensors library sorts them, so that every tensor is
        # aligned.
        outputs.sort(key=lambda output: -DTYPE_BITS[output.dtype])
        header = {"__metadata__": metadata}
        starts = {}
        end = 0
        for output in outputs:
            start = end
            end += output.nbytes
            starts[output.name] = start
            header[output.name] = {
                "dtype": output.dtype,
                "shape": output.shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = len(text).to_bytes(8, "little") + text
        for name, start in starts.items():
            placements[name] = (number, len(data) + start)
        shards.append(ShardPlan(f"model-{number + 1:05}.safetensors", data, len(data) + end))
    return shards, placements


def read_facts(folder: Path) -> dict:
    """Read how a folder was made, `Plan.facts`, which each of its shards states. Raises if no shard
    does, if another version made one of them, or if they are not of one run."""
    facts: dict = {}
    # By fingerprint.
    shard_of_run: dict[str | None, str] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        metadata = read_metadata(path)
        if FACTS_KEY not in metadata:
            continue
        try:
            stated = parse_facts(metadata[FACTS_KEY])
        except FactsError as error:
            raise QuantizeError(f"{path}: {error}: {error.remedy}") from None
        facts = facts or stated
        shard_of_run.setdefault(metadata.get(METADATA_KEY), path.name)
    if not facts:
        raise QuantizeError(
            f"{folder}: no shard in it says how it was made: only this program's own folders can"
            " be read"
        )
    if len(shard_of_run) > 1:
        shards = quote_names(shard_of_run.values())
        raise QuantizeError(f"{folder}: {shards} are of different runs: convert again")
    return facts


class FactsError(Exception):
    """The facts that a shard states cannot be used; and what helps a finished folder."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(problem)
        self.remedy = remedy


def parse_facts(text: str) -> dict:
    """Read the facts that a shard states, the version first: what the others mean depends on it.
    Raises FactsError."""
    damaged = FactsError(
        "what it says of how it was made is damaged", "copy the folder again, or convert again"
    )
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged from None
    version = facts.get("version") if isinstance(facts, dict) else None
    if type(version) is not int:
        raise damaged
    if version != FORMAT_VERSION:
        raise FactsError(
            f"made by another version of this program (format {version}, this one writes"
            f" {FORMAT_VERSION})",
            "use that version, or convert again",
        )
    if facts.keys() != {"version", "options", "sources", "dtypes"}:
        raise damaged
    if not are_options(facts["options"]) or not are_sources(facts["sources"]):
        raise damaged
    if not facts["options"]["restore"] and not are_dtypes(facts["dtypes"]):
        raise damaged
    return facts


def are_options(value: object) -> bool:
    """Return whether a value read from JSON holds the fields of `Options`, each of its kind."""
    if not isinstance(value, dict) or value.keys() != Options.__annotations__.keys():
        return False
    size, shard_size = value["group_size"], value["shard_size_gb"]
    return (
        value["format"] in list(FORMATS)
        and type(size) is int
        and size > 0
        and size % CODES_PER_WORD == 0
        and are_patterns(value["exclude"])
        and are_patterns(value["int8"])
        and type(value["quantize_embeddings"]) is bool
        and type(value["restore"]) is bool
        and value["scale"] in ["absmax", "mse"]
        and isinstance(value["importance"], str | None)
        and type(shard_size) in (int, float)
        and 0 < shard_size <= 1e9
    )


def are_patterns(value: object) -> bool:
    """Return whether a value read from JSON is a list of regular expressions."""
    if not isinstance(value, list):
        return False
    try:
        for pattern in value:
            re.compile(pattern)
    except (TypeError, re.error, RecursionError, OverflowError):
        return False
    return True


def are_sources(value: object) -> bool:
    """Return whether a value read from JSON gives files' sizes and times by their names."""
    if not isinstance(value, dict):
        return False
    for state in value.values():
        if not isinstance(state, list) or [type(number) for number in state] != [int, int]:
            return False
    return True


def are_dtypes(value: object) -> bool:
    """Return whether a value read from JSON is of `dtypes_of_packed`."""
    if not isinstance(value, dict) or value.keys() != {"most", "others"}:
        return False
    if not isinstance(value["others"], dict) or value["most"] not in list(FLOAT_DTYPES):
        return False
    for dtype, names in value["others"].items():
        if dtype not in FLOAT_DTYPES or not isinstance(names, list):
            return False
        if not all(isinstance(name, str) for name in names):
            return False
    return True


def what_differs(was: dict, now: dict) -> str:
    """List the facts that are not as they were for another run: options, names and sizes of
    sources."""
    sizes_before = {(name, size) for name, (size, _) in was["sources"].items()}
    sizes_now = {(name, size) for name, (size, _) in now["sources"].items()}
    others = sorted({name for name, _ in sizes_before ^ sizes_now})
    changed = []
    if others:
        changed.append(f"the input was another, {quote_names(others)} had other names or sizes")
    for name, value in now["options"].items():
        before = was["options"].get(name)
        # Where it is not given, the group size follows from the input's columns.
        if before == value or (name == "group_size" and others):
            continue
        if name == "importance" and before and value:
            changed.append("--importance was another file")
        else:
            said = f"was {describe_value(name, before)}, is {describe_value(name, value)}"
            changed.append(f"--{name} {said}")
    return ", ".join(changed)


def describe_value(name: str, value: object) -> str:
    """Describe the value of an option as it is given on the command line."""
    if not value:
        return "not given"
    if value is True:
        return "given"
    if isinstance(value, list):
        return f" --{name} ".join(value)
    return str(value)


# ---- Rules: what is refused, warned of and noted, in the order of `RULES` at this section's end ----------------------

# Severities.
REFUSED = "refused"
WARNING = "warning"
NOTE = "note"
# What a rule looks at, and so from when on it can be asked.
CHECKPOINT = "checkpoint"
STACKS = "stacks of experts"
TENSORS = "planned tensors"
# Formats that a rule is for.
EVERY_FORMAT = "every format"
ENGINE_FORMATS = "formats for engines"
OTHER_FORMATS = "formats for other readers"


@dataclass(frozen=True)
class Draft:
    """A plan as far as it has come, which rules look at."""

    checkpoint: Checkpoint
    options: Options
    statistics: Importance | None = None
    # Stacks of experts, and those of them that are read as one weight an expert.
    stacks: Mapping[str, ExpertStack] = field(default_factory=dict)
    separated: Mapping[str, ExpertStack] = field(default_factory=dict)
    # All tensors with stacks separated, the kinds of their layers, and what becomes of them.
    sources: list[TensorInfo] = field(default_factory=list)
    kinds: Mapping[str, str] = field(default_factory=dict)
    tensors: list[TensorPlan] = field(default_factory=list)
    group_size_is_chosen: bool = False

    @property
    def config(self) -> dict:
        return self.checkpoint.config

    @property
    def form(self) -> Format:
        return self.options.form

    @functools.cached_property
    def packed(self) -> list[TensorInfo]:
        return [tensor.source for tensor in self.tensors if tensor.packing]

    @functools.cached_property
    def conv1d(self) -> list[TensorInfo]:
        """The packed weights of GPT-2's Conv1D, which lie as (in, out)."""
        inside = [info for info in self.packed if re.search(r"\.\d+\.", info.name)]
        if oddity_with("conv1d", self.config).conv1d:
            return inside
        for info in inside:
            rows, columns = info.shape
            if info.name.endswith(".c_attn.weight") and columns == 3 * rows:
                return inside
        return []

    @functools.cached_property
    def layers(self) -> dict[str, dict[int, set[str]]]:
        """By container and number of a layer: the names of the tensors in it."""
        layers: dict[str, dict[int, set[str]]] = {}
        for info in self.sources:
            match = LAYER_PATTERN.match(info.name)
            if match:
                container = f"{match[1]}.{match[2]}".lstrip(".")
                names = layers.setdefault(container, {}).setdefault(int(match[3]), set())
                names.add(info.name[match.end() :])
        return layers

    @functools.cached_property
    def largest_container(self) -> str:
        """The container of the most layers, which are the language model's if any are."""
        others = r"vis(ion|ual)|image|audio|speech|tower|mtp|encoder"
        names = [name for name in self.layers if not re.search(others, name)]
        return max(names or self.layers, key=lambda name: len(self.layers[name]), default="layers")

    @property
    def generates_text(self) -> bool:
        pattern = r"(For(CausalLM|ConditionalGeneration)|LMHeadModel)$"
        return any(re.search(pattern, name) for name in architectures_of(self.config))


@dataclass(frozen=True)
class Rule:
    """A row of `RULES`: how severe it is, what it applies to, and the function that yields its
    messages where it is broken."""

    severity: str
    subject: str
    formats: str
    check: Callable[[Draft], Iterator[str]]


def messages(draft: Draft, severity: str, subject: str = TENSORS) -> Iterator[str]:
    """Yield what the rules of a severity and subject have to say of a draft."""
    formats = (EVERY_FORMAT, ENGINE_FORMATS if draft.form.for_engines else OTHER_FORMATS)
    for rule in RULES:
        if (rule.severity, rule.subject) == (severity, subject) and rule.formats in formats:
            yield from rule.check(draft)


def refuse(draft: Draft, subject: str) -> None:
    """Raise the first message of the rules by which a draft is refused."""
    message = next(messages(draft, REFUSED, subject), None)
    if message:
        raise QuantizeError(message)


# What is no merged checkpoint.

QUANTIZED = (
    "means that it is already quantized: give the merged bf16, fp16 or fp32 checkpoint it was made"
    " from"
)
ADAPTER = (
    "is an unmerged adapter's: merge it into its base model first (peft: merge_and_unload), then"
    " save that"
)


@dataclass(frozen=True)
class Unfit:
    """A row of `UNFIT`: how to tell a tensor of what is no merged model, and what is wrong with it.
    The pattern is for its name and a second line such as "BF16 2-D empty"."""

    pattern: str
    problem: str


UNFIT = (
    # Formats in use on the hub.
    Unfit(
        r"\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|weight_scale_2"
        r"|weight\.(absmax|quant_state.*)|SCB|weight_zero_point|weight_global_scale"
        r"|(gate_up|gate|up|down)_proj_(blocks|scales)|\w*quantizer\._\w+)$"
        r"|\nF(4|6_|8_)|\.weight\n[IU]\d+ 2-D",
        QUANTIZED,
    ),
    # The spellings of peft, torchtune, kohya's scripts and AdapterHub. `check_low_rank_updates`
    # finds others.
    Unfit(
        r"(^|[._])(?i:lora)[._]?([AB]|up|down|left|right|embedding_[AB])(\.|$)"
        r"|(^|\.)(lora_[ab]|adapter_?[AB])(\.|$)|magnitude_vector"
        r"|(^|\.)(hada_[wt][12]|lokr_[wt][12]|b?oft_[RSrs]|vera_[AB]|ia3_l|trainable_tokens_)"
        r"|(^|\.)(base_layer\.(weight|bias)|original_module\.|modules_to_save\.\w+\."
        r"|adapters\.\w+\.adapter_)|\.default(\.weight)?$"
        r"|^(base_model\.model\.|prompt_encoder\.\w+\.embedding\.|prompt_embeddings$)",
        ADAPTER,
    ),
    Unfit(
        r"^__metadata__\n",
        "has a name that no tensor of a safetensors file can have: rename it, or leave it out",
    ),
    Unfit(
        "flat_param",
        "holds layers' weights, flattened by FSDP: save a FULL_STATE_DICT, or run accelerate"
        " merge-weights",
    ),
    # Some models' convolutions have such parts of their own, of more dimensions.
    Unfit(
        r"\.(weight_(orig|mask)|parametrizations\.weight\.original\d*)\n\w+ 2-D",
        "is what a weight is computed from, by pruning or another parametrization: make it"
        " permanent first (torch.nn.utils: prune.remove, parametrize.remove_parametrizations),"
        " then save that",
    ),
    Unfit(
        r"(weight|bias|\.experts\..*)\n.* empty",
        "has no elements: a save under DeepSpeed ZeRO-3 that did not gather the weights leaves"
        " such; save with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py",
    ),
)
# What a checkpoint that is said to be quantized has beside or instead of plain weights: those of
# bitsandbytes, GPTQ and AWQ, compressed-tensors, ModelOpt, fp8, mxfp4, HQQ, AQLM, VPTQ, quanto
# and torchao.
PACKED_DTYPES = {"U8", "I8", "U16", "I16", "U32", "I32"}
PACKED_DTYPES |= {name for name in DTYPE_BITS if name.startswith(("F4", "F6_", "F8_"))}
PACKED_PART = (
    r"(^|[._])((weight|input|output|act|activation)_(q?scales?|scale_inv|scale_2|global_scale"
    r"|zeros?|zero_points?|packed|shape|g_idx)|qweight|q?scales|q?zeros|g_idx|absmax|nested_absmax"
    r"|quant_map|quant_state.*|weight_format|SCB|W_q|blocks|codes|codebooks?|centroids|bitmask"
    r"|weight[.:_]_?(q?data|scale))$"
)


def check_int8(draft: Draft) -> Iterator[str]:
    """Check that the format has two widths if --int8 asks for them."""
    form = draft.form
    if draft.options.int8 and not form.has_two_widths:
        reason = "its words hold codes of 4 bits alone"
        if form.for_engines:
            reason = f"not all of {form.name}'s readers know two widths"
        yield f"--int8 is not for {form.name}: {reason}: use --format compressed-tensors"


def check_fitness(draft: Draft) -> Iterator[str]:
    """Check that no tensor is quantized already, which would quietly multiply its error, and that
    none is an adapter's or a trainer's."""
    claims = " and ".join(draft.checkpoint.quantization)
    for info in draft.checkpoint.tensors.values():
        if claims and may_be_packed(info):
            yield describe_unfit(info, f"beside {claims} {QUANTIZED}")
        empty = "" if info.nbytes else " empty"
        described = f"{info.name}\n{info.dtype} {len(info.shape)}-D{empty}"
        for row in UNFIT:
            if re.search(row.pattern, described, re.MULTILINE):
                yield describe_unfit(info, row.problem)


def check_low_rank_updates(draft: Draft) -> Iterator[str]:
    """Check that no module with a weight (out, in) has matrices (rank, in) and (out, rank) inside,
    whatever they are called."""
    infos = draft.checkpoint.tensors
    inside: dict[str, list[TensorInfo]] = {}
    for name, info in infos.items():
        if len(info.shape) != 2:
            continue
        for end in re.finditer(r"\.", name):
            owner = f"{name[: end.start()]}.weight"
            if owner in infos and owner != name:
                inside.setdefault(owner, []).append(info)
    for owner, parts in inside.items():
        shape = infos[owner].shape
        for down, up in itertools.permutations(parts, 2):
            rank = down.shape[0]
            is_pair = up.shape[1] == rank and (up.shape[0], down.shape[1]) == shape
            if is_pair and rank < min(shape):
                yield describe_unfit(down, ADAPTER)


def describe_unfit(info: TensorInfo, problem: str) -> str:
    """Describe a tensor by which a checkpoint is refused."""
    place = f"{info.dtype} {info.shape} ({info.file.name})"
    return f"tensor {info.name_in_file!r} {place} {problem}"


def may_be_packed(info: TensorInfo) -> bool:
    """Return whether a tensor of a checkpoint that is said to be quantized is a packed weight, or a
    companion of one: whatever is of small integers or float8, but for masks, or has the name of
    scales and alike."""
    mask = re.search(r"bias$|mask", info.name)
    matrix = info.dtype in PACKED_DTYPES and len(info.shape) >= 2 and not mask
    return matrix or bool(re.search(PACKED_PART, info.name))


def check_stacks(draft: Draft) -> Iterator[str]:
    """Check that all stacks of experts can be read as one weight an expert. Otherwise most of the
    model would stay as it is, and engines would miss experts."""
    unreadable = [stack for stack in draft.separated.values() if stack.problem]
    if not unreadable:
        return
    stack = unreadable[0]
    row = oddity_with("tells_experts", draft.config)
    pattern = shlex.quote(pattern_of(stack.info for stack in unreadable))
    kept = f"--exclude {pattern} keeps such tensors as they are"
    remedy = f"it cannot be quantized; {kept}"
    if stack.weights and row.remedy:
        remedy = row.remedy
    elif stack.weights and not row.tells_experts:
        remedy = f"save it with model.save_pretrained(), whose names they know; or {kept}"
    info = stack.info
    yield (
        f"tensor {info.name!r} {info.shape} ({info.file.name}) holds all routed experts of a layer,"
        f" {stack.problem}: {remedy}"
    )


# What the options make of it.


def check_exclude(draft: Draft) -> Iterator[str]:
    """Check that each pattern of --exclude matches something, be it an expert of a kept stack."""
    infos = list(draft.sources)
    for stack in draft.stacks.values():
        infos += stack.weights
    for pattern in draft.options.exclude:
        if not any(named_by([pattern], info) for info in infos):
            yield describe_useless_pattern(draft, "--exclude", pattern)


def check_int8_patterns(draft: Draft) -> Iterator[str]:
    """Check that each pattern of --int8 matches something that is packed."""
    for pattern in draft.options.int8:
        matched = [tensor for tensor in draft.tensors if named_by([pattern], tensor.source)]
        if not matched:
            yield describe_useless_pattern(draft, "--int8", pattern)
        elif not any(tensor.packing for tensor in matched):
            yield (
                f"--int8 {shlex.quote(pattern)} matches only tensors that are kept, e.g."
                f" {matched[0].source.name!r} ({matched[0].kept_because}): correct or drop it"
            )


def describe_useless_pattern(draft: Draft, option: str, pattern: str) -> str:
    """Describe a pattern that matches nothing, with what may have been meant."""
    names = [info.name for info in draft.sources]
    for stack in draft.stacks.values():
        names += [weight.name for weight in stack.weights]
    parts = re.findall(r"[^,\s]+", pattern)
    if len(parts) > 1 and all(any(part in name for name in names) for part in parts):
        joined = shlex.quote("|".join(parts))
        hint = f": give the option once for each pattern, or join them: {joined}"
    else:
        words = sorted({part for name in names for part in name.split(".")})
        hint = nearest(pattern, words) or f" (one is {names[0]!r}): correct or drop it"
    count = count_of(len(draft.tensors), "tensor")
    return f"{option} {shlex.quote(pattern)} matches none of the {count}{hint}"


def check_that_something_is_packed(draft: Draft) -> Iterator[str]:
    """Check that the run would quantize something."""
    if not draft.packed:
        first = draft.tensors[0]
        yield (
            f"no weight would be quantized of the {count_of(len(draft.tensors), 'tensor')}, e.g."
            f" {first.source.name!r} ({first.kept_because}): lower --group_size or drop --exclude"
            " if that keeps them"
        )


def check_output_names(draft: Draft) -> Iterator[str]:
    """Check that no two tensors of the output would have one name."""
    makers: dict[str, TensorInfo] = {}
    for tensor in draft.tensors:
        for output in tensor.outputs:
            maker = makers.setdefault(output.name, tensor.source)
            if maker is not tensor.source:
                both = quote_names([maker.name_in_file, tensor.source.name_in_file])
                yield (
                    f"tensors {both} become {output.name!r}: leave one of two copies, or --exclude"
                    " the weight"
                )


# What converts well, and would then not load in engines, or load as noise.


def check_embeddings(draft: Draft) -> Iterator[str]:
    """Check that engines hold packed embeddings if --quantize_embeddings asks for them."""
    if draft.options.quantize_embeddings and "embeddings" in draft.form.whole_kinds:
        name = draft.form.name
        yield f"--quantize_embeddings: no engine reads them packed as {name}; int4 can"


def check_group_size(draft: Draft) -> Iterator[str]:
    """Check that engines' kernels have the group size."""
    sizes = draft.form.group_sizes
    if draft.options.group_size not in sizes:
        required = [engine for engine in draft.form.engines if engine.required]
        kernels = list_in_words(engine.kernels for engine in required)
        size = f"--group_size {draft.options.group_size}"
        yield f"{size}: engines' kernels ({kernels}) have {list_in_words(reversed(sizes))}"


def check_config(draft: Draft) -> Iterator[str]:
    """Check that config.json is there."""
    if not draft.checkpoint.has_config:
        path = draft.checkpoint.config_folder / CONFIG_NAME
        yield f"{path} is missing: engines read in it how {draft.form.name} is packed"


def check_conv1d(draft: Draft) -> Iterator[str]:
    """Check that no weight of GPT-2's Conv1D is packed."""
    if draft.conv1d and "Conv1D" in draft.form.whole_kinds:
        yield describe_weights(
            draft.conv1d,
            "of GPT-2's Conv1D, and so (in, out), which no engine reads packed; int4 can hold them",
        )


def check_names_in_memory(draft: Draft) -> Iterator[str]:
    """Check that the names in memory, under which an engine looks up entries of config.json, are
    known of each weight that needs an entry."""
    converting = [engine for engine in draft.form.engines if engine.converts_tensors]
    widths = {tensor.packing.bits for tensor in draft.tensors if tensor.packing}
    renamed = []
    for tensor in draft.tensors:
        usual = tensor.packing and tensor.packing.bits == min(widths)
        if tensor.in_memory is None and not usual:
            renamed.append(tensor.source)
    if converting and renamed:
        form = "kept" if len(widths) == 1 else "kept or in 8 bits"
        yield describe_weights(
            renamed,
            f"{form} while {converting[0].label} calls them otherwise than the file does, so"
            f" that no entry of {CONFIG_NAME} would tell it: drop the option that means them, or"
            " use --format int4",
        )


def check_columns(draft: Draft) -> Iterator[str]:
    """Check that all columns are whole groups: engines have no padding."""
    ragged = []
    for tensor in draft.tensors:
        if tensor.packing and tensor.source.shape[1] % tensor.packing.group_size:
            ragged.append(tensor.source)
    if not ragged:
        return
    sizes = draft.form.group_sizes
    fitting = []
    for size in sizes:
        if not any(info.shape[1] % size for info in draft.packed):
            fitting.append(size)
    remedy = f"none of {', '.join(map(str, sizes))} divides all: --exclude them"
    if fitting:
        remedy = f"--group_size {fitting[0]} divides all"
    size = draft.options.group_size
    problem = f"with columns that are no multiple of --group_size {size}"
    yield describe_weights(ragged, f"{problem}: {remedy}")


def check_rows(draft: Draft) -> Iterator[str]:
    """Check that all rows fill the format's words."""
    multiple = draft.form.row_multiple
    ragged = [info for info in draft.packed if info.shape[0] % multiple]
    if ragged:
        yield describe_weights(
            ragged,
            f"with rows that are no multiple of {multiple}: --exclude them, or use"
            " compressed-tensors",
        )


def check_fused_layers(draft: Draft) -> Iterator[str]:
    """Check that what engines hold as one is in one precision."""
    first_parts: dict[str, TensorPlan] = {}
    for tensor in draft.tensors:
        if len(tensor.source.shape) < 2:
            continue
        for whole in wholes_of(tensor, draft.form):
            first = first_parts.setdefault(whole, tensor)
            if first.packing != tensor.packing:
                fates = f"{describe_fate(first)} while {describe_fate(tensor)}"
                yield f"{whole}: {fates}: --exclude or --int8 all of them or none"


def wholes_of(tensor: TensorPlan, form: Format) -> list[str]:
    """Describe each whole that engines hold in one precision and that this tensor is a part of."""
    name = tensor.source.name
    parent, _, module = name.removesuffix(".weight").rpartition(".")
    experts = re.match(
        r"((?:.*\.)?experts)\.(\d+\.\w+\.weight|(gate_up|gate|up|down)_proj(\.weight)?)$", name
    )
    wholes = []
    for engine in form.engines:
        for modules in engine.fused_layers:
            if module in modules.split(","):
                wholes.append(f"engines fuse {parent}.{{{modules}}}")
        if experts and engine.fuses_experts:
            wholes.append(f"engines fuse all experts of {experts[1]}")
        if tensor.packing and engine.one_width_of_experts and EXPERT_PATTERN.match(name):
            wholes.append(
                f"{engine.label} reads the experts of all layers in one width, others as noise"
            )
    return wholes


def describe_fate(tensor: TensorPlan) -> str:
    """Describe what becomes of a tensor, for a comparison."""
    if tensor.packing:
        return f"{tensor.source.name!r} gets {tensor.packing.bits} bits"
    return f"{tensor.source.name!r} is kept ({tensor.kept_because})"


def describe_weights(infos: list[TensorInfo], problem: str) -> str:
    """Count the weights that have a problem, and give one as an example."""
    weights = count_of(len(infos), "weight")
    return f"{weights} {problem}; e.g. {infos[0].name!r} {infos[0].shape}"


def list_in_words(items: Iterable[object]) -> str:
    """List items as in a sentence: 128, 64 and 32."""
    *others, last = map(str, items)
    return f"{', '.join(others)} and {last}" if others else last


# What the checkpoint should have and lacks.

RANDOM_NUMBERS = "Loaders fill them with random numbers"
ONES_OR_ZEROS = "Loaders put ones or zeros in their place"


def check_layers(draft: Draft) -> Iterator[str]:
    """Check that the checkpoint has all layers that config.json counts."""
    decoder = draft.largest_container
    encoder = decoder.replace("decoder", "encoder")
    containers = [decoder]
    if encoder != decoder and encoder in draft.layers:
        containers.append(encoder)
    for container in containers:
        count = count_layers(draft, container)
        present = draft.layers.get(container, {})
        missing = [f"{container}.{number}" for number in range(count) if number not in present]
        if missing:
            yield (
                f"LAYERS ARE MISSING: {len(missing):,} of {count:,} by {CONFIG_NAME} are not in the"
                f" checkpoint: {quote_names(missing)}. {RANDOM_NUMBERS}, unless the model shares"
                " its layers"
            )


def count_layers(draft: Draft, container: str) -> int:
    """Return how many layers of a container config.json counts; 0 if it does not say."""
    part = re.search("decoder|encoder", container)
    keys = [f"{part[0]}_layers", f"num_{part[0]}_layers"] if part else []
    counts = config_counts(draft.config, *keys) or config_counts(draft.config, *LAYER_COUNTS)
    count = min(counts, default=0)
    halved = oddity_with("halved", draft.config).halved
    if halved and any(re.search(halved, info.name) for info in draft.sources):
        return count // 2
    return count


def check_norms_and_biases(draft: Draft) -> Iterator[str]:
    """Check that each layer has the norms and biases that the others of its kind have."""
    vectors = set()
    for info in draft.sources:
        match = LAYER_PATTERN.match(info.name)
        name = info.name[match.end() :] if match else ""
        if len(info.shape) == 1 and name.endswith((".weight", ".bias")):
            vectors.add(name)

    missing = []
    for container, layers in draft.layers.items():
        if container.endswith("experts"):
            continue
        kinds = Counter(map(frozenset, layers.values()))
        for number, names in layers.items():
            # Layers that are not rare are a kind of their own.
            is_rare = kinds[frozenset(names)] <= max(1, len(layers) // 20)
            fuller = [kind for kind in kinds if kind > names and kind - names <= vectors]
            if is_rare and len(fuller) == 1:
                lost = [f"{container}.{number}.{name}" for name in sorted(fuller[0] - names)]
                missing += [name for name in lost if not re.search(LAYER_WITHOUT_NORM, name)]
    if missing:
        yield (
            f"NORMS OR BIASES ARE MISSING: {len(missing):,} that the other layers of their kind"
            f" have are not in the checkpoint: {quote_names(missing)}. {ONES_OR_ZEROS}"
        )


def check_final_norm(draft: Draft) -> Iterator[str]:
    """Check that a model that generates text has a final norm if its layers have norms before
    attention or mixer."""
    post_norm = "openai-gpt" in config_strings(draft.config, "model_type")
    container = draft.largest_container
    if not draft.generates_text or post_norm or TOWER_WORDS.search(container):
        return
    inside = set().union(*draft.layers.get(container, {}).values())
    if not any(map(FIRST_NORM.match, inside)):
        return
    for info in draft.sources:
        is_outside = not re.search(rf"\.\d+\.|{MTP_NAMES}", info.name)
        is_norm = re.search(NORM_NAME, info.name) and not TOWER_WORDS.search(info.name)
        if is_outside and is_norm:
            return
    yield (
        f"THE FINAL NORM IS MISSING: the layers of {container!r} have norms, but none comes after"
        f" them. {ONES_OR_ZEROS}"
    )


def check_weights(draft: Draft) -> Iterator[str]:
    """Check that each layer and expert has the weights that the others of its kind have, and that
    all experts that config.json counts are there."""
    # By container and module: the names of weights by the container's number.
    blocks: dict[tuple[str, str], dict[int, set[str]]] = {}
    for info in draft.sources:
        match = re.match(r"(.*)\.(\d+)\.((?:\D*\.)?)(\w+)\.weight$", info.name)
        if match and len(info.shape) == 2:
            numbers = blocks.setdefault((match[1], match[3]), {})
            numbers.setdefault(int(match[2]), set()).add(match[4])

    missing = []
    experts = min(config_counts(draft.config, *EXPERT_COUNTS), default=0)
    for (container, module), numbers in blocks.items():
        if container.endswith("experts"):
            counted = 0 if re.search(TOWER_NAMES, container) else experts
            count = max(*numbers, counted - 1) + 1
            missing += [f"{container}.{n}" for n in range(count) if n not in numbers]
        usual = Counter(map(frozenset, numbers.values())).most_common(1)[0][0]
        lacking = [number for number, names in numbers.items() if names < usual]
        # If many lack them, these are a kind of their own.
        if len(numbers) > 2 and len(lacking) <= max(1, len(numbers) // 20):
            for number in lacking:
                lost = sorted(usual - numbers[number])
                missing += [f"{container}.{number}.{module}{name}" for name in lost]
    if missing:
        yield (
            f"WEIGHTS ARE MISSING: {len(missing):,} that the others of their kind have are not in"
            f" the checkpoint: {quote_names(missing)}. {RANDOM_NUMBERS}"
        )


def missing_ends(draft: Draft) -> dict[str, str]:
    """Return what is wrong with a model that generates text and lacks its head or embedding, by
    the part that is missing."""
    missing: dict[str, str] = {}
    if not draft.generates_text:
        return missing
    ties = config_booleans(draft.config, "tie_word_embeddings")
    if ties and not any(ties) and "head" not in draft.kinds.values():
        missing["head"] = (
            f"{CONFIG_NAME} has tie_word_embeddings false, but the checkpoint has no head"
        )
    embeddings = [name for name, kind in draft.kinds.items() if kind == "embeddings"]
    of_words = [name for name in embeddings if not re.search(NO_WORDS, name)]
    if config_integers(draft.config, "vocab_size") and not of_words:
        missing["embedding"] = (
            f"{CONFIG_NAME} has a vocab_size, but the checkpoint has no embedding"
        )
    return missing


def check_ends(draft: Draft) -> Iterator[str]:
    """Check that head and embedding are there."""
    for part, problem in missing_ends(draft).items():
        yield f"THE {part.upper()} IS MISSING: {problem}"


def check_ends_for_engines(draft: Draft) -> Iterator[str]:
    """Check that head and embedding are there, without which no engine serves a model."""
    for problem in missing_ends(draft).values():
        yield (
            f"{problem}, which loaders would make up: save the whole model, or mend {CONFIG_NAME}"
        )


def check_names_of_trainers(draft: Draft) -> Iterator[str]:
    """Check that names are not of a trainer's own format, which no loader of the model that
    config.json names knows."""
    types = config_strings(draft.config, "model_type")
    if not types:
        return
    for pattern, whose, remedy, model_types in TRAINERS_NAMES:
        names = [info.name for info in draft.sources if re.search(pattern, info.name)]
        if names and (not model_types or {*types} & {*model_types.split()}):
            yield (
                f"NAMES OF A TRAINER: {len(names):,} tensors are named as in {whose} own format,"
                f" e.g. {names[0]!r}: no loader of model_type {types[0]!r} knows them, and would"
                f" make up its own: {remedy}"
            )


# What the owner of the checkpoint should know before the conversion rather than after the copy.


def note_checkpoint(draft: Draft) -> Iterator[str]:
    """Repeat what was noted when the checkpoint was read."""
    yield from draft.checkpoint.notes


def note_stale_quantization(draft: Draft) -> Iterator[str]:
    """Name what said that the model is quantized, which it is not."""
    if draft.checkpoint.quantization:
        stale = " and ".join(draft.checkpoint.quantization)
        yield f"left out as stale, since no tensor is packed: {stale}"


def note_statistics(draft: Draft) -> Iterator[str]:
    """Count what statistics there are for."""
    if draft.statistics:
        tensors = [tensor for tensor in draft.tensors if tensor.packing]
        yield draft.statistics.describe([t.source for t in tensors if t.packing.bits == 4])


def note_group_size(draft: Draft) -> Iterator[str]:
    """State the group size where it was not asked for."""
    if draft.group_size_is_chosen:
        sizes = list_in_words(draft.form.group_sizes)
        size = draft.options.group_size
        yield f"groups of {size}: the largest of {sizes} that divides all columns"


def note_engines_without_group_size(draft: Draft) -> Iterator[str]:
    """Name the engines, of those that are not required, that have no groups of this size."""
    size = draft.options.group_size
    for engine in draft.form.engines:
        if not engine.required and engine.group_sizes and size not in engine.group_sizes:
            sizes = list_in_words(engine.group_sizes)
            yield f"{engine.label} cannot serve groups of {size}: it has {sizes} alone"


def note_no_engine(_draft: Draft) -> Iterator[str]:
    """State that the folder is for readers other than engines."""
    yield NO_ENGINE


def note_delicate_layers(draft: Draft) -> Iterator[str]:
    """Advise to keep a head and routers."""
    delicate = []
    for tensor in draft.tensors:
        if tensor.packing and tensor.kind in ("head", "routers"):
            delicate.append(tensor)
    if delicate:
        pattern = shlex.quote(pattern_of(tensor.source for tensor in delicate))
        kinds = " and ".join(sorted({tensor.kind for tensor in delicate}))
        saving = "in 4 bits, too, costs quality and saves little"
        yield f"{kinds} {saving}: --exclude {pattern} keeps them"


def note_conv1d(draft: Draft) -> Iterator[str]:
    """Count weights whose groups run along the outputs."""
    if draft.conv1d:
        weights = count_of(len(draft.conv1d), "weight")
        yield f"{weights} of GPT-2's Conv1D, as (in, out): groups run along the outputs"


def note_kept_stacks(draft: Draft) -> Iterator[str]:
    """Count 3-D weights that are kept, which may be much of the model."""
    stacks = []
    for tensor in draft.tensors:
        shape = tensor.source.shape
        if not tensor.packing and len(shape) == 3 and shape[1] > 1:
            stacks.append(tensor.source)
    if stacks:
        size = format_bytes(sum(info.nbytes for info in stacks))
        count = count_of(len(stacks), "3-D one")
        yield f"only 2-D weights are quantized; {count} ({size}) kept, e.g. {stacks[0].name}"


def note_mtp(draft: Draft) -> Iterator[str]:
    """Note that layers which predict further tokens are missing, if config.json promises some."""
    parts = [draft.config]
    parts += [value for value in draft.config.values() if isinstance(value, dict)]
    promised = []
    for part in parts:
        for key, value in part.items():
            if MTP_COUNTS.match(key) and type(value) is int and value > 0:
                promised.append(key)
    if not promised:
        return

    counts = config_counts(draft.config, *LAYER_COUNTS)
    for info in draft.sources:
        if re.search(MTP_NAMES, info.name):
            return
        match = LAYER_PATTERN.match(info.name)
        is_beyond = match and counts and int(match[3]) >= min(counts)
        if is_beyond and not re.search(TOWER_NAMES, info.name):
            return
    yield (
        f"{CONFIG_NAME} promises layers that predict further tokens ({promised[0]}), and the"
        " checkpoint has none: speculative decoding with them will not work (transformers'"
        " save_pretrained leaves them out)"
    )


def note_two_widths(draft: Draft) -> Iterator[str]:
    """Warn of ways to load layers of two widths that decode them wrongly."""
    widths = {tensor.packing.bits for tensor in draft.tensors if tensor.packing}
    if len(widths) > 1:
        yield (
            f"two widths: {ENGINES['transformers'].label} with run_compressed=False or"
            " dequantize=True decodes all layers as if they had one; load the folder without"
            " these, or --restore it to dense weights"
        )


def note_experts(draft: Draft) -> Iterator[str]:
    """Name the engines that misread packed experts."""
    misreadings = []
    for engine in draft.form.engines:
        if draft.form.name in engine.misreads_experts:
            misreadings.append(engine.misreads_experts[draft.form.name])
    if misreadings and any(tensor.packing and is_expert(tensor) for tensor in draft.tensors):
        yield (
            f"engines read expert layers from {draft.form.name} wrongly or not at all"
            f" ({'; '.join(misreadings)}): use --format compressed-tensors"
        )


def note_transformers(draft: Draft) -> Iterator[str]:
    """State why transformers would not load the folder."""
    reason = reason_transformers_fails(draft)
    if reason:
        yield f"{ENGINES['transformers'].label} {reason}"


def reason_transformers_fails(draft: Draft) -> str:
    """Return why transformers would not load the folder, or not all of it; nothing if it does."""
    transformers = ENGINES["transformers"]
    if transformers not in draft.form.engines:
        return ""
    computed = computed_when_loaded(draft)
    if computed:
        pattern = shlex.quote(pattern_of(computed))
        return (
            f"stops at this folder: it splits or joins {computed[0].name!r} and alike as it loads"
            " them, which packed weights do not survive; vLLM may read them; --exclude"
            f" {pattern} keeps them"
        )

    row = oddity_with("tells_experts", draft.config)
    is_told = draft.form.name in transformers.kept_experts
    are_kept = any(is_expert(tensor) and not tensor.packing for tensor in draft.tensors)
    if not are_kept or not is_told or row.linear_experts:
        return ""
    if not row.tells_experts:
        return (
            "may stop at experts that are kept, or leave them random, if it holds this model's as"
            " stacks"
        )
    if row.projections and not row.projections[0]:
        return "leaves experts that are kept random, with no more than a warning; vLLM reads them"
    if row.problem_of_engines and not row.remedy:
        return (
            "reads this model's experts only as stacks, and leaves these random; vLLM may read them"
        )
    return "stops at experts that are kept beside packed layers (RuntimeError); vLLM reads them"


def computed_when_loaded(draft: Draft) -> list[TensorInfo]:
    """List the packed weights that transformers splits, joins or permutes as it loads them."""
    rows = [(scope, row) for scope, row in rows_when_loaded(draft.config) if row.computed]
    computed = []
    for tensor in draft.tensors:
        name = tensor.source.name
        if not tensor.packing:
            continue
        is_split = len(tensor.in_memory or ()) > 1
        if is_split or any(
            re.search(scope, name) and re.search(row.computed, name) for scope, row in rows
        ):
            computed.append(tensor.source)
    return computed


def is_expert(tensor: TensorPlan) -> bool:
    """Return whether this is a weight of one routed expert."""
    info = tensor.source
    return len(info.shape) == 2 and bool(EXPERT_PATTERN.match(info.name))


# The first refusal ends the run. Warnings and notes are printed in this order.
RULES = (
    Rule(REFUSED, CHECKPOINT, EVERY_FORMAT, check_int8),
    Rule(REFUSED, CHECKPOINT, EVERY_FORMAT, check_fitness),
    Rule(REFUSED, CHECKPOINT, EVERY_FORMAT, check_low_rank_updates),
    Rule(REFUSED, STACKS, EVERY_FORMAT, check_stacks),
    Rule(REFUSED, TENSORS, EVERY_FORMAT, check_exclude),
    Rule(REFUSED, TENSORS, EVERY_FORMAT, check_int8_patterns),
    Rule(REFUSED, TENSORS, EVERY_FORMAT, check_that_something_is_packed),
    Rule(REFUSED, TENSORS, EVERY_FORMAT, check_output_names),
    Rule(REFUSED, TENSORS, ENGINE_FORMATS, check_embeddings),
    Rule(REFUSED, TENSORS, ENGINE_FORMATS, check_group_size),
    Rule(REFUSED, TENSORS, ENGINE_FORMATS, check_config),
    Rule(REFUSED, TENSORS, ENGINE_FORMATS, check_conv1d),
    Rule(REFUSED, TENSORS, ENGINE_FORMATS, check_names_in_memory),
    Rule(REFUSED, TENSORS, ENGINE_FORMATS, check_columns),
    Rule(REFUSED, TENSORS, ENGINE_FORMATS, check_rows),
    Rule(REFUSED, TENSORS, ENGINE_FORMATS, check_fused_layers),
    Rule(REFUSED, TENSORS, ENGINE_FORMATS, check_ends_for_engines),
    Rule(WARNING, TENSORS, EVERY_FORMAT, check_layers),
    Rule(WARNING, TENSORS, EVERY_FORMAT, check_norms_and_biases),
    Rule(WARNING, TENSORS, EVERY_FORMAT, check_final_norm),
    Rule(WARNING, TENSORS, EVERY_FORMAT, check_weights),
    Rule(WARNING, TENSORS, OTHER_FORMATS, check_ends),
    Rule(WARNING, TENSORS, ENGINE_FORMATS, check_names_of_trainers),
    Rule(NOTE, TENSORS, EVERY_FORMAT, note_checkpoint),
    Rule(NOTE, TENSORS, EVERY_FORMAT, note_stale_quantization),
    Rule(NOTE, TENSORS, EVERY_FORMAT, note_statistics),
    Rule(NOTE, TENSORS, ENGINE_FORMATS, note_group_size),
    Rule(NOTE, TENSORS, ENGINE_FORMATS, note_engines_without_group_size),
    Rule(NOTE, TENSORS, OTHER_FORMATS, note_no_engine),
    Rule(NOTE, TENSORS, EVERY_FORMAT, note_delicate_layers),
    Rule(NOTE, TENSORS, EVERY_FORMAT, note_conv1d),
    Rule(NOTE, TENSORS, EVERY_FORMAT, note_kept_stacks),
    Rule(NOTE, TENSORS, EVERY_FORMAT, note_mtp),
    Rule(NOTE, TENSORS, EVERY_FORMAT, note_two_widths),
    Rule(NOTE, TENSORS, ENGINE_FORMATS, note_experts),
    Rule(NOTE, TENSORS, ENGINE_FORMATS, note_transformers),
)


# ---- Memory: what the machine, the container and this process use ---------------------------------------------------

MemoryReading = namedtuple(
    "MemoryReading", "available used"
)  # bytes; the page cache counts as available


class MemoryGuard:
    """Stops the run while the machine still breathes."""

    def __init__(self, min_free: int, system: Path = Path("/")):
        self.min_free = min_free
        self.own_peak = 0  # bytes of anonymous memory of this process, the most seen at any look
        self._system = system
        self._process = psutil.Process()
        self._next_look = 0.0
        self._lock = threading.Lock()

    def read(self) -> MemoryReading:
        """Read the tightest of the machine and the control groups that this process is in, and note its own peak."""
        machine = psutil.virtual_memory()
        readings = [MemoryReading(machine.available, machine.total - machine.available)]
        v2, v1 = "max current stat", "limit_in_bytes usage_in_bytes stat"
        for limit, usage, *stat in read_cgroups(self._system, "memory", v2, v1):
            counts = dict(
                zip(stat[::2], map(int, stat[1::2]))
            )  # those of v1's groups below are in total_*
            cached = sum(
                counts.get(f"total_{key}", counts.get(key, 0))
                for key in ("active_file", "inactive_file")
            )
            if int(limit) < machine.total:  # v1 writes "no limit" as a huge number
                readings.append(
                    MemoryReading(int(limit) - int(usage) + cached, int(usage) - cached)
                )
        self.own_peak = max(self.own_peak, self.own())
        return min(readings)

    def own(self) -> int:
        """Count the anonymous memory of this process: all but mapped files, which the kernel takes back at will."""
        info = self._process.memory_info()
        return info.rss - getattr(info, "shared", 0)

    def shortage(self, needed: int = 0) -> str:
        """Say that less than `min_free` is available, or would be once `needed` bytes are taken;
        nothing if not so."""
        available = self.read().available - needed
        if available >= self.min_free:
            return ""
        free, least = format_bytes(max(available, 0)), format_bytes(self.min_free)
        advice = "stop other programs or containers, raise the container's --memory"
        advice += ", or lower --min_free_gb"
        left = " left at the peak" if needed else " available"
        return f"{free} of memory{left}, --min_free_gb asks for {least}: {advice}"

    def check(self) -> None:
        """Raise if less than `min_free` is available. Cheap: it looks at most 10 times a second, for 0.5 ms."""
        with self._lock:
            if time.monotonic() < self._next_look:
                return
            self._next_look = time.monotonic() + 0.1
        if shortage := self.shortage():
            raise QuantizeError(f"stopped: {shortage}", 3)


def read_cgroups(system: Path, controller: str, v2: str, v1: str) -> Iterator[list[str]]:
    """Read the words of some files of the control groups that limit this process: its own and all above it. v2 lists
    `0::/path` under one tree, v1 `N:controllers:/path` under `controller/`."""
    membership, root = system / "proc/self/cgroup", system / "sys/fs/cgroup"
    for line in (
        membership.read_text().splitlines() if membership.exists() else ()
    ):  # no Linux, no limits
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        tree, names = (root, v2) if number == "0" else (root / controller, v1)
        folder = tree / path.lstrip("/")
        # In a container the path may be the host's and not exist there: the tree's root is then the container's group.
        for group in (folder, *folder.parents) if folder.is_dir() else (tree,):
            with contextlib.suppress(OSError):  # above the tree there are no such files
                text = "\n".join(
                    (group / f"{controller}.{name}").read_text() for name in names.split()
                )
                if text[:1].isdigit():  # v2 writes "max" for no limit, v1 -1 for no quota
                    yield text.split()


def shares_memory_with_gpu(system: Path = Path("/")) -> bool:
    """Tell whether this is a machine of NVIDIA's with one memory for CPU and GPU: a Jetson or a DGX Spark."""
    for name in (
        "proc/device-tree/compatible",
        "sys/class/dmi/id/product_name",
        "sys/class/dmi/id/product_family",
    ):
        with contextlib.suppress(OSError):
            if re.search(
                r"nvidia,tegra|DGX.Spark|GB10",
                (system / name).read_text(errors="replace"),
                re.IGNORECASE,
            ):
                return True
    return False


def usable_cores(system: Path = Path("/")) -> int:
    """Count the cores that this process may use, by its affinity and its CPU quotas (`docker run --cpus`)."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for quota, period in read_cgroups(system, "cpu", "max", "cfs_quota_us cfs_period_us"):
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


# ---- Output folder: what may be there, and how files become final ---------------------------------------------------


def write_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` at `offset`."""
    while len(buffer):
        check_signals()
        count = os.pwrite(fd, buffer[:COPY_BYTES], offset)
        buffer, offset = buffer[count:], offset + count


def sync_file(fd: int) -> None:
    """Make what was written to a file survive a power cut."""
    # fsync alone may take minutes on a slow disk, and no signal ends it. (sync_file_range(2))
    with contextlib.suppress(AttributeError):  # no Linux
        sync_range = ctypes.CDLL(None).sync_file_range
        for start in range(0, os.fstat(fd).st_size, 2 * COPY_BYTES):
            check_signals()
            sync_range(fd, ctypes.c_int64(start), ctypes.c_int64(2 * COPY_BYTES), SYNC_AND_WAIT)
    os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Make a folder's new and renamed entries survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounts cannot, and need not
            raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(fd)


def unfinished_path(path: Path, fingerprint: str) -> Path:
    """Name the file that a run of this fingerprint writes before it has its final name."""
    return path.with_name(f"{path.name}.{fingerprint[:12]}.unfinished")


class ShardFile:
    """A shard that is there, or is being written: tensors in any order, under a temporary name until all are in."""

    def __init__(
        self,
        folder: Path,
        plan: ShardPlan,
        fingerprint: str,
        finished: bool,
        compare: bool,
        before_writing: Callable[[], None] = lambda: None,
    ):
        self.final = folder / plan.name
        self.path = self.final if finished else unfinished_path(self.final, fingerprint)
        self.plan = plan
        self.finished = finished
        self.compare = compare  # what is there with what would be written
        self._before_writing = before_writing
        self.shift = 0  # bytes by which its header is longer than planned, for what it says of sources and files
        self.jobs_left = 0
        self._fd: int | None = None
        self._pages: PageCache | None = None
        self._lock = threading.Lock()

    def _open(self) -> int:
        with self._lock:
            if self._fd is None and self.finished:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                self._pages = self._pages or PageCache(self._fd)
                self._pages.fd = self._fd
                _ = self._pages.others  # asked before it is first read
            elif self._fd is None:
                self._before_writing()
                self._fd = os.open(
                    self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666
                )
                write_at(self._fd, memoryview(self.plan.header), 0)
                os.ftruncate(self._fd, self.plan.size)
            return self._fd

    def write(self, buffer: memoryview, offset: int) -> None:
        with naming(self.path):
            write_at(self._open(), buffer, offset)

    def read(self, nbytes: int, offset: int) -> bytes:
        """Read bytes of a shard that is there."""
        data, position = b"", offset + self.shift
        with naming(self.path):
            fd = self._open()
            while len(data) < nbytes and (some := os.pread(fd, nbytes - len(data), position)):
                data, position = data + some, position + len(some)
        if len(data) < nbytes:
            problem = "was cut off while it was read"
            raise QuantizeError(f"{self.path} {problem}: find out by what, then convert again")
        return data

    def sync(self) -> None:
        """Bring what was written so far to the disk, and let the page cache forget it."""
        if self._fd is not None:
            with naming(self.path):
                sync_file(self._fd)
            if self._pages:
                self._pages.drop()
            else:
                drop_pages(self._fd, [])

    def finish(self) -> None:
        """Sync the file, whose bytes are all in, and give it its final name."""
        with naming(self.path):
            self._open()  # a shard of empty tensors, to which nothing was written
            self.sync()
            self.close()
            if not self.finished:
                os.rename(self.path, self.final)
                sync_folder(self.final.parent)
        self.finished, self.path = True, self.final

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class OutputFolder:
    """The output folder of one plan: refuses what is not this program's, keeps what an interrupted run finished."""

    def __init__(self, folder: Path, plan: Plan, overwrite: bool):
        self.folder = folder
        self.plan = plan
        self.overwrite = overwrite
        # Names of files that are final and as planned; those of them that were made when the sources had other times
        # and are to be compared; and paths of what earlier runs left.
        self.finished, self.compare, self.remove = self._survey()
        self.nothing_to_write = not self.remove and self.finished == {
            *plan.hashes,
            *(s.name for s in plan.shards),
        }
        self.existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        self.is_as_it_was = True
        self._has_made_way = False
        self._lock = threading.Lock()
        self._lock_fd: int | None = None

    def _survey(self) -> tuple[set[str], set[str], list[Path]]:
        """Sort what is in the folder: what this run need not write again, what of it to compare, what to remove. The
        user's own files are refused, and so are an earlier run's unless --overwrite is given."""
        if self.folder.exists() and not self.folder.is_dir():
            raise QuantizeError(f"output folder {self.folder}: is a file")
        planned = {shard.name: shard for shard in self.plan.shards}
        entries = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        marks = {path: read_metadata(path) for path in entries if SHARD_PATTERN.match(path.name)}
        shards = {
            path
            for path in marks
            if SHARD_PATTERN.fullmatch(path.name) and METADATA_KEY in marks[path]
        }
        own_files = {item for path in shards for item in files_of_run(marks[path]).items()}
        known, facts = {*self.plan.hashes, *dict(own_files)}, json.dumps(self.plan.facts)
        finished, compare, remove, stale, foreign = set(), set(), [], [], []
        for path in entries:
            unfinished, shard = UNFINISHED_PATTERN.fullmatch(path.name), planned.get(path.name)
            own = (
                bool(shard)
                and path in shards
                and marks[path][METADATA_KEY] == self.plan.fingerprint
            )
            digest = hash_file(path) if path.name in known and path.is_file() else ""
            index = path.name == INDEX_NAME  # which follows from the shards
            if own and path.stat().st_size == shard.size:
                with open(path, "rb") as file:
                    as_planned = file.read(len(shard.header)) == shard.header
                if as_planned or marks[path].get(FACTS_KEY) != facts:  # else it is damaged
                    finished.add(path.name)
                    compare |= set() if as_planned else {path.name}
                    continue
            if digest == self.plan.hashes.get(path.name):
                finished.add(path.name)
            elif own or (unfinished and self.plan.fingerprint.startswith(unfinished[1])):
                remove.append(path)
            elif (
                unfinished
                or path in shards
                or (path.name, digest) in own_files
                or (index and shards)
            ):
                stale.append(path)
            else:
                foreign.append(path)
        if foreign:
            problem = "not written by this program or changed since: choose a new or empty folder, or move it away"
            raise QuantizeError(
                f"output folder {self.folder} holds {quote_names(p.name for p in foreign)}, {problem}"
            )
        if self.overwrite:
            return set(), set(), [*remove, *stale, *(self.folder / name for name in finished)]
        if stale:
            theirs = [marks[path][FACTS_KEY] for path in stale if FACTS_KEY in marks.get(path, {})]
            differs = "its options are not known"
            if theirs:
                try:
                    differs = what_differs(parse_facts(theirs[0]), self.plan.facts)
                    differs = (
                        differs or f"tensors, {CONFIG_NAME} or another file that is copied changed"
                    )
                except FactsError as error:
                    differs = str(error)
            problem = f"{quote_names(p.name for p in stale)} of another run: {differs}"
            advice = "--overwrite starts afresh, or choose another folder"
            raise QuantizeError(f"output folder {self.folder} holds {problem}: {advice}")
        return finished, compare, remove

    def room(self) -> tuple[int, int]:
        """Count the bytes that are still to write, and those that are free for it once leftovers are removed."""
        sizes = {shard.name: shard.size for shard in self.plan.shards}
        for name, content in self.plan.other_files.items():
            sizes[name] = len(content) if isinstance(content, bytes) else content.stat().st_size
        needed = sum(size for name, size in sizes.items() if name not in self.finished)
        free = shutil.disk_usage(self.existing).free
        return needed, free + sum(path.stat().st_blocks * 512 for path in self.remove)

    def why_unwritable(self) -> str:
        """Say why nothing can be written here; nothing if it can."""
        if not self.existing.is_dir():
            return f"{self.existing} is a file"
        if os.access(self.existing, os.W_OK | os.X_OK):
            return ""
        if os.statvfs(self.existing).f_flag & os.ST_RDONLY:
            return f"{self.existing} {READ_ONLY}"
        problem = f"Permission denied: {self.existing} is not writable"
        return f"{problem}, choose another or change its owner"

    def lack_of_room(self) -> str:
        """Say that the disk is too small for what is to be written; nothing if it is not."""
        needed, free = self.room()
        if needed <= free:
            return ""
        problem = f"{format_bytes(needed)} to write, but the disk of {self.folder} has"
        problem += f" {format_bytes(free)} free"
        return f"{problem}: make room for {format_bytes(needed - free)} more or choose another disk"

    def prepare(self) -> None:
        """Create and lock the folder, and look at it again. The lock is the folder's own and dies with the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QuantizeError(
                f"output folder {self.folder}: another run is writing to it, wait for it"
            ) from None
        except OSError:
            pass  # a network file system without such locks
        if (self.finished, self.compare, self.remove) != self._survey():
            raise QuantizeError(
                f"output folder {self.folder} changed since it was looked at: start again"
            )

    def make_way(self) -> None:
        """Remove leftovers, the index first: without it a folder is unfinished. Whoever is about to write calls this,
        so that a run which ends before that leaves the folder as it was."""
        with self._lock:
            if self._has_made_way:
                return
            check_signals()
            self.is_as_it_was = False
            # Shards last: they tell which of the other files are this program's.
            leftovers = sorted(self.remove, key=lambda path: path.name.endswith(".safetensors"))
            for path in [self.folder / INDEX_NAME, *leftovers]:
                check_signals()
                path.unlink(missing_ok=True)
            self.finished.discard(INDEX_NAME)
            sync_folder(self.folder)
            self._has_made_way = True

    def write_other_files(self) -> None:
        """Write copies and the program's own files, each complete before it gets its name; the index once all is on
        disk."""
        if self.nothing_to_write:
            return
        self.make_way()
        for name, content in self.plan.other_files.items():
            if name in self.finished:
                continue
            if name == INDEX_NAME:
                sync_folder(self.folder)
            check_signals()
            temporary = unfinished_path(self.folder / name, self.plan.fingerprint)
            digest = hashlib.sha256()
            with (
                reading(content) if isinstance(content, Path) else io.BytesIO(content) as source,
                open(temporary, "wb", buffering=0) as target,
            ):
                while data := source.read(COPY_BYTES):
                    digest.update(data)
                    with naming(temporary):
                        write_at(target.fileno(), memoryview(data), source.tell() - len(data))
                with naming(temporary):
                    os.fsync(target.fileno())
                drop_pages(target.fileno(), [])
            if digest.hexdigest() != self.plan.hashes[name]:
                now = "starts afresh with it as it is now"
                advice = (
                    f"put it back as it was and the same command continues, or --overwrite {now}"
                )
                if self.overwrite:
                    advice = f"the same command {now}"
                raise QuantizeError(f"{content} changed since the plan was made: {advice}")
            os.rename(temporary, self.folder / name)
        sync_folder(self.folder)

    def close(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)


def read_metadata(shard: Path) -> dict[str, str]:
    """Read a shard's `__metadata__`, where this program leaves its marks; empty for a file without."""
    try:
        metadata = read_header(shard)[0].get("__metadata__") if shard.is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def files_of_run(metadata: dict[str, str]) -> dict[str, str]:
    """Read which other files a shard's run wrote: their SHA-256, by name. None if it is not said,
    or damaged."""
    try:
        hashes = json.loads(metadata.get(FILES_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(hashes, dict):
        return {}
    return {name: digest for name, digest in hashes.items() if isinstance(digest, str)}


def hash_file(path: Path) -> str:
    """Hash a file: SHA-256, as hexadecimal digits."""
    digest = hashlib.sha256()
    with reading(path) as file:
        while data := file.read(COPY_BYTES):
            digest.update(data)
    return digest.hexdigest()


# ---- Conversion: read, quantize, pack and write each block of weights at its planned place --------------------------


@dataclass(frozen=True)
class Job:
    """A block of a tensor that lies in one piece, row-major: whole rows, or part of one row. A tensor that is kept is
    taken as one row of bytes."""

    tensor: TensorPlan
    shards: list[ShardFile]  # that hold what it becomes
    kind: str  # of work, one of Conversion.COSTS
    row: int
    rows: int
    column: int
    columns: int
    offset: int  # of the source's bytes
    nbytes: int


class Conversion:
    """One run over a plan: threads that do jobs in the input's order. The first error stops all."""

    COSTS: ClassVar = {
        "kept": 1,
        "absmax": 1.2,
        "8 bits": 4,
        "restored": 4,
        "mse": 5,
        "feedback": 16,
    }  # until measured

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        shards: list[ShardFile],
        guard: MemoryGuard,
        task: str,
    ):
        self.checkpoint = checkpoint
        self.plan = plan
        self.shards = shards
        self.task = task
        self.work: dict[
            str, list[float]
        ] = {}  # by kind: its cost, bytes in all, bytes done, seconds in one thread
        self._guard = guard
        self._kernel = kernel_for(plan)
        self._rounding_of = functools.lru_cache(KEPT_ROUNDINGS)(
            self._find_rounding
        )  # for the jobs of one tensor
        self._unsynced = 0  # bytes of input since a sync was last asked for
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._tasks: set[concurrent.futures.Future] = set()  # that are not known to be done
        jobs, self._due = (
            [],
            set(),
        )  # the latter: names of tensors for which there is something to do
        for tensor in plan.tensors:
            of_tensor = [
                shards[number]
                for number in {plan.placements[output.name][0] for output in tensor.outputs}
            ]
            if self._is_due(of_tensor):
                self._due.add(tensor.source.name)
                jobs += self._plan_jobs(tensor, of_tensor)
        for job in jobs:
            self.work.setdefault(job.kind, [self.COSTS[job.kind], 0, 0, 0.0])[1] += job.nbytes
            for shard in job.shards:
                shard.jobs_left += 1
        self._jobs = iter(jobs)
        self._left = Counter(job.tensor.source.name for job in jobs)  # jobs by tensor
        self.tensors_total, self.tensors_done = len(self._left), 0
        self._ahead: deque[tuple[Job, concurrent.futures.Future | None]] = deque()
        self._room = max((job.nbytes for job in jobs), default=0) + READ_MARGIN
        self._free: list[mmap.mmap] = []  # buffers of that size

    def _is_due(self, shards: list[ShardFile]) -> bool:
        """Tell whether there is something to do for what these hold: an earlier run may have finished it."""
        return any(shard.compare or not shard.finished for shard in shards)

    def _plan_jobs(self, tensor: TensorPlan, shards: list[ShardFile]) -> Iterator[Job]:
        """Cut a tensor: whole rows, but for a row longer than a tile, which is cut between groups where its parts can
        be quantized apart. A tensor of no elements has no job."""
        info, packing, options, statistics = (
            tensor.source,
            tensor.packing,
            self.plan.options,
            self.plan.statistics,
        )
        if not packing:
            kind, (rows, columns), itemsize, width, height = (
                "kept",
                (1, info.nbytes),
                1,
                COPY_BYTES,
                1,
            )
        else:
            kind = "feedback" if statistics and statistics.has_factor(info) else options.scale
            kind = "restored" if tensor.scales else "8 bits" if packing.bits == 8 else kind
            (rows, columns), itemsize = info.shape, DTYPE_BITS[info.dtype] // 8
            weights = TRANSPOSED_JOB_WEIGHTS if options.form.transposed else JOB_WEIGHTS
            if tensor.scales:  # a quarter of a tile of words: torch makes several temporary tensors of their weights
                weights = TILE_WEIGHTS // 4 // packing.codes_per_word
            whole_groups = max(1, TILE_WEIGHTS // packing.group_size) * packing.group_size
            width = columns if tensor.scales or statistics else min(columns, whole_groups)
            height = max(1, weights // columns) if width == columns else 1
        for row, column in itertools.product(range(0, rows, height), range(0, columns, width)):
            row_count, column_count = min(height, rows - row), min(width, columns - column)
            offset, nbytes = (
                (row * columns + column) * itemsize,
                row_count * column_count * itemsize,
            )
            yield Job(tensor, shards, kind, row, row_count, column, column_count, offset, nbytes)

    def run(self, threads: int, progress: Progress) -> None:
        """Do all jobs; returns when every shard has its final name."""
        executor = concurrent.futures.ThreadPoolExecutor
        try:
            # Syncing a shard takes as long as the disk does, so it has a thread of its own.
            with (
                deferring_signals(),
                executor(DISK_READERS) as self._readers,
                executor(1) as self._syncer,
                executor(threads) as workers,
            ):
                with self._lock:
                    self._tasks |= {
                        self._syncer.submit(self._sync, s) for s in self.shards if not s.jobs_left
                    }
                    self._tasks |= {workers.submit(self._work) for _ in range(threads)}
                try:
                    while tasks := set(self._tasks):
                        done = concurrent.futures.wait(
                            tasks, 0.1, concurrent.futures.FIRST_EXCEPTION
                        ).done
                        for task in done:
                            task.result()
                        with self._lock:
                            self._tasks -= done
                        check_signals()
                        progress.show(self)
                finally:
                    self._stop.set()
                    self._syncer.shutdown(wait=False, cancel_futures=True)
                    self._readers.shutdown(wait=False, cancel_futures=True)
            for file in self.checkpoint.files.values():
                file.check_unchanged()
                file.drop_read()
        finally:
            for shard in self.shards:
                shard.close()

    @torch.inference_mode()
    def _work(self) -> None:
        """Do jobs until there are no more."""
        workspace = Workspace()
        while (taken := self._take()) and not self._stop.is_set():
            job, ahead = taken
            self._guard.check()
            buffer, data = ahead.result() if ahead else self._read(job)
            started = time.monotonic()
            self._do(job, data, workspace)
            self._free.append(buffer)
            self._count(job, time.monotonic() - started)

    def _take(self) -> tuple[Job, concurrent.futures.Future | None] | None:
        """Take the next job, for one worker alone; meanwhile the disk reads for those after it. What is in memory
        already, the worker itself reads: then it is in its processor's cache, too."""
        with self._lock:
            for job in itertools.islice(self._jobs, 1 + DISK_READERS - len(self._ahead)):
                info = job.tensor.source
                cached = self.checkpoint.files[info.file].is_cached(info, job.offset, job.nbytes)
                self._ahead.append((job, None if cached else self._readers.submit(self._read, job)))
            return self._ahead.popleft() if self._ahead else None

    def _read(self, job: Job) -> tuple[mmap.mmap, memoryview]:
        """Read a job's bytes into a buffer that no other job has now."""
        with self._lock:
            buffer = self._free.pop() if self._free else allocate(self._room)
        return buffer, self.checkpoint.read(
            job.tensor.source, job.offset, job.nbytes, memoryview(buffer)
        )

    def _do(self, job: Job, data: memoryview, workspace: Workspace) -> None:
        """Write what a job's bytes become, or compare it with what an earlier run wrote."""
        for output, offset, part in self._parts(job, data, workspace):
            number, start = self.plan.placements[output.name]
            shard = self.shards[number]
            if shard.compare and shard.read(len(part), start + offset) != bytes(
                part
            ):  # views are compared slowly
                problem = f"the source files changed since {shard.final.name} was made, or are another checkpoint's"
                raise QuantizeError(
                    f"{problem}: choose another folder, or --overwrite starts afresh"
                )
            if not shard.finished:
                shard.write(part, start + offset)

    def _count(self, job: Job, seconds: float) -> None:
        """Book a job. Its shard is synced if a sync is due, and finished if that was its last job."""
        name = job.tensor.source.name
        with self._lock:
            self.work[job.kind][2] += job.nbytes
            self.work[job.kind][3] += seconds
            self._left[name] -= 1
            self.tensors_done += self._left[name] == 0
            due = self._unsynced + job.nbytes >= SYNC_BYTES
            self._unsynced = 0 if due else self._unsynced + job.nbytes
            for shard in job.shards:
                shard.jobs_left -= 1
                if due or not shard.jobs_left:
                    self._tasks.add(self._syncer.submit(self._sync, shard))
        while (
            len(self._tasks) > MAX_WAITING_SHARDS + threading.active_count()
            and not self._stop.is_set()
        ):
            time.sleep(0.01)  # the workers are tasks, too

    def _sync(self, shard: ShardFile) -> None:
        """Sync a shard, and give it its final name when all is in."""
        if shard.jobs_left:
            shard.sync()
        elif shard.compare or not shard.finished:
            for file in self.checkpoint.files.values():
                file.check_unchanged()
            shard.finish()

    def _parts(self, job: Job, data: memoryview, workspace: Workspace) -> Iterator[tuple]:
        """Make what a job's bytes become: the output tensor, from which of its bytes on, and these bytes."""
        tensor, packing = job.tensor, job.tensor.packing
        if not packing:
            yield tensor.outputs[0], job.offset, data
            return
        lines = (
            self._restore(job, data, workspace)
            if tensor.scales
            else self._quantize(job, data, workspace)
        )
        widths = (
            packing.codes_per_word,
            packing.group_size,
        )  # columns of the weight in one of an output
        for output, (role, part), width in zip(tensor.outputs, lines.items(), widths):
            first, across, nbytes = (
                job.column // width,
                output.shape[1],
                part.nbytes,
            )  # across: a row of the output
            start = job.row * across + first  # of whole rows, or of part of one
            if self.plan.options.form.transposed and not tensor.scales:
                start = first * across + job.row
                nbytes = (
                    nbytes if job.rows == across else job.rows * part.itemsize
                )  # of what lies in one piece
            for begin in range(0, part.nbytes, nbytes):
                piece = workspace.buffer(role, part.nbytes)[begin : begin + nbytes]
                yield output, (start + begin // nbytes * across) * part.itemsize, piece
        for output in tensor.outputs[len(lines) :] if job.row == job.column == 0 else ():
            yield output, 0, memoryview(output.content())

    def _lines(self, job: Job, workspace: Workspace) -> dict[str, torch.Tensor]:
        """Make room for a job's words and scales: (rows, columns) or, if transposed, (columns, rows)."""
        packing, lines = job.tensor.packing, {}
        widths = {"lines of words": packing.codes_per_word, "lines of scales": packing.group_size}
        for output, (role, width) in zip(job.tensor.outputs, widths.items()):
            shape = (job.rows, packing.columns_of(job.columns) // width)
            shape = shape[::-1] if self.plan.options.form.transposed else shape
            dtype = torch.int32 if output.dtype == "I32" else FLOAT_DTYPES[output.dtype]
            lines[role] = workspace.tensor(role, dtype, *shape)
        return lines

    def _quantize(
        self, job: Job, data: memoryview, workspace: Workspace
    ) -> dict[str, torch.Tensor]:
        """Quantize a job's rows tile by tile, padded with zeros to whole groups; returns words and scales as they lie
        in the output."""
        info, packing = job.tensor.source, job.tensor.packing
        block = torch.frombuffer(data, dtype=FLOAT_DTYPES[info.dtype]).view(job.rows, job.columns)
        lines = self._lines(job, workspace)
        by_row = [part.T if self.plan.options.form.transposed else part for part in lines.values()]
        padded_columns, in_row = packing.columns_of(job.columns), by_row[1].shape[1]
        rounding, first = self._rounding_of(job.tensor), job.column // packing.group_size
        if rounding.importance is not None:
            rounding = replace(rounding, importance=rounding.importance[first : first + in_row])
        step = max(1, TILE_WEIGHTS // job.columns)
        for row in range(0, job.rows, step):
            check_signals()
            weights = block[row : row + step]
            if padded_columns > job.columns:
                padded = workspace.tensor("padded", weights.dtype, len(weights), padded_columns)
                padded[:, : job.columns].copy_(weights)
                padded[:, job.columns :].zero_()
                weights = padded
            groups = weights.view(-1, packing.group_size)
            results = quantize_groups(groups, by_row[1].dtype, workspace, rounding)
            if not torch.isfinite(results[1]).all():
                raise QuantizeError(describe_bad_value(job, row, groups, results[1]))
            for part, values in zip(by_row, results):
                part[row : row + step].copy_(values.view(-1, part.shape[1]))
        return lines

    def _find_rounding(self, tensor: TensorPlan) -> Rounding:
        """Say how a weight is rounded, by its statistics if there are some, whose columns are padded with zeros."""
        packing, options = tensor.packing, self.plan.options
        rounding = Rounding(options.form.with_offset, kernel=self._kernel, bits=packing.bits)
        if options.scale == "absmax" or packing.bits == 8:
            return rounding
        columns = tensor.source.shape[1]
        padding = packing.columns_of(columns) - columns
        mean_squares, factor = torch.ones(columns), None
        if self.plan.statistics:
            mean_squares, factor = self.plan.statistics.get(tensor.source) or (mean_squares, None)
        mean_squares = torch.nn.functional.pad(mean_squares, (0, padding))
        feedback = None if factor is None else feedback_of(mean_squares, factor, self._kernel)
        importance = weigh_columns(mean_squares.view(-1, packing.group_size))
        return replace(rounding, importance=importance, feedback=feedback)

    def _restore(self, job: Job, data: memoryview, workspace: Workspace) -> dict[str, torch.Tensor]:
        """Decode a job's rows."""
        tensor, (output,), info = job.tensor, job.tensor.outputs, job.tensor.scales
        words, row_bytes = (
            torch.frombuffer(data, dtype=torch.int32).view(job.rows, -1),
            info.nbytes // info.shape[0],
        )
        memory = workspace.buffer("scales", job.rows * row_bytes + READ_MARGIN)
        scales = self.checkpoint.read(info, job.row * row_bytes, job.rows * row_bytes, memory)
        scales = torch.frombuffer(scales, dtype=FLOAT_DTYPES[info.dtype]).view(job.rows, -1)
        dense = workspace.tensor("dense", FLOAT_DTYPES[output.dtype], job.rows, output.shape[1])
        weights = dequantize(words, scales, tensor.packing, self.plan.options.form.with_offset)
        if not torch.isfinite(dense.copy_(weights[:, : output.shape[1]])).all():
            problem = f"decodes to weights beyond {output.dtype}, which the source has"
            pattern = shlex.quote(pattern_of([replace(tensor.source, name=output.name)]))
            raise QuantizeError(
                f"tensor {output.name!r} {problem}: convert again with --exclude {pattern}, which"
                " keeps it"
            )
        return {"dense": dense}


def describe_bad_value(job: Job, first_row: int, groups: torch.Tensor, scales: torch.Tensor) -> str:
    """Name the first weight of a tile that is not finite or too large for the scale's dtype."""
    info, bad = job.tensor.source, int((~torch.isfinite(scales)).nonzero()[0])
    weights = groups[bad].to(torch.float64)
    place = int(torch.where(torch.isnan(weights), torch.inf, weights.abs()).argmax())
    row, group = divmod(bad, -(-job.columns // groups.shape[1]))
    value, problem = float(weights[place]), "is not finite"
    if math.isfinite(value):
        largest = torch.finfo(scales.dtype).max * job.tensor.packing.code_max
        problem = f"needs a scale beyond {str(scales.dtype).removeprefix('torch.')} (weights up to {largest:.6g})"
    where = (
        f"row {job.row + first_row + row}, column {job.column + group * groups.shape[1] + place}"
    )
    advice = "mend the checkpoint, or keep this tensor as it is with --exclude"
    return f"tensor {info.name!r} ({info.file.name}), {where}: {value:.6g} {problem}: {advice}"


# ---- Printing: what the user reads ----------------------------------------------------------------------------------


def say(text: str = "", before: str = "", end: str = "\n", colour: str = "") -> None:
    """Print `before` as it is, then `text`, escaped; a reader that went away or a full log must not end a long run."""
    try:
        print(before + paint(printable(text), colour, sys.stdout), end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - stays open as long as the process


def clear_line() -> None:
    """Leave an updating line, so that what follows starts on a fresh one."""
    if is_terminal(sys.stdout):
        say(before=CLEAR_LINE, end="")


def shorten(text: str, room: int) -> str:
    """Leave out the middle of what is longer than `room`: the end of a name tells most."""
    room = max(room - 3, 2)
    return text if len(text) <= room + 3 else f"{text[: room // 3]}...{text[room // 3 - room :]}"


def say_paragraph(label: str, text: str, command: bool = False) -> None:
    """Print a text, if any, in lines as long as the terminal; words too long lose their middle, but not a command's."""
    width, indent = terminal_width() - 1, " " * 11
    words = [
        word if command else shorten(word, width - len(indent)) for word in printable(text).split()
    ]
    text = " ".join([label.ljust(len(indent) - 1), *words]) if words else ""
    for line in textwrap.wrap(
        text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    ):
        say(line)


def format_bytes(nbytes: float) -> str:
    """Give a size in decimal units and three significant digits: 63.2 GB, 17.1 MB, 812 bytes."""
    power = min(int(math.log(max(nbytes, 1) / 0.9995, 1000)), 4)
    return (
        f"{three_digits(nbytes / 1000**power)} {' kMGT'[power]}B"
        if power
        else count_of(round(nbytes), "byte")
    )


def three_digits(number: float) -> str:
    """Give a number in three significant digits: 1.52, 63.2, 812, 0.0967."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:#.3g}".rstrip(".")


def format_seconds(seconds: float) -> str:
    """Give a duration: 7.32 s, 3:05, 1:02:03."""
    clock = f"{round(seconds) // 3600}:{round(seconds) // 60 % 60:02}:{round(seconds) % 60:02}"
    return clock.lstrip("0:") if seconds >= 59.95 else f"{three_digits(seconds)} s"


def count_of(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def buffer_bytes(plan: Plan, threads: int) -> int:
    """Add up what `Conversion` will hold in buffers at the most."""
    options = plan.options
    itemsize = max((DTYPE_BITS[t.source.dtype] // 8 for t in plan.tensors if t.packing), default=0)
    job = TRANSPOSED_JOB_WEIGHTS if options.form.transposed else JOB_WEIGHTS
    jobs = (threads + DISK_READERS) * whole_pages(
        max(job * itemsize, COPY_BYTES) + READ_MARGIN
    )  # at work or ahead
    factor = plan.statistics.largest_factor * 4 if plan.statistics else 0
    # A worker's padded weights, magnitudes, float32 weights, codes, words, scales (twice); a search's four; a job's.
    words = 1 if options.int8 else 0.5
    widths = [itemsize, itemsize, 4, 2, words, 0.1, 0.1, *(4, 4, 4, 4) * (options.scale == "mse")]
    buffers = [TILE_WEIGHTS * width for width in widths] + [job * words, job * 0.1]
    return (
        threads * sum(map(whole_pages, [*buffers, *[factor] * 8]))
        + jobs
        + 4 * KEPT_ROUNDINGS * factor
    )


def print_plan(
    plan: Plan, checkpoint: Checkpoint, output: OutputFolder, guard: MemoryGuard, threads: int
) -> None:
    """Say what a run will do, and what the user should know before it."""
    options = plan.options
    choice = "restored to dense weights" if options.restore else f"scales {options.rule}"
    how = f"format {options.format}, groups of {options.group_size}, {choice}, {count_of(threads, 'thread')}"
    for label, text in (
        ("From:", str(checkpoint.folder)),
        ("To:", str(output.folder)),
        ("How:", how),
    ):
        say_paragraph(label, text)
    print_table(plan, checkpoint)
    say()
    shards, compared = (count_of(len(some), "shard") for some in (plan.shards, output.compare))
    finished = sum(shard.name in output.finished for shard in plan.shards)
    more = finished and not output.nothing_to_write  # to do
    copied = [name for name, content in plan.other_files.items() if isinstance(content, Path)]
    need, free = output.room()
    own = guard.own() + buffer_bytes(plan, threads)
    available, least = format_bytes(guard.read().available), format_bytes(guard.min_free)
    seen = f"{format_bytes(psutil.virtual_memory().free)} free now, the page cache not counted"
    for label, text in (
        *(("WARNING:", warning) for warning in plan.warnings),
        *(("Note:", note) for note in plan.notes),
        ("Copied:", ", ".join(copied) or "no other files"),
        ("Written:", ", ".join(sorted(plan.other_files.keys() - copied))),
        ("Left out:", ", ".join(plan.left_out)),
        ("Resuming:", f"{finished:,} of {shards} finished by an earlier run" if more else ""),
        ("Comparing:", f"{compared} with source files of another time" if output.compare else ""),
        (
            "Removing:",
            f"{quote_names(path.name for path in output.remove)} of an earlier run"
            if output.remove
            else "",
        ),
        (
            "Disk:",
            f"{format_bytes(need)} to write, {format_bytes(free)} free{': not enough' if need > free else ''}",
        ),
        (
            "Memory:",
            f"about {format_bytes(own)} at the peak; {available} available, stops below {least}",
        ),
        (
            "GPU:",
            f"shares this memory; its programs see {seen}" if shares_memory_with_gpu() else "",
        ),
    ):
        say_paragraph(label, text)


def print_table(plan: Plan, checkpoint: Checkpoint) -> None:
    """Print how many tensors of how many bytes have which fate, and of each fate which kinds."""

    def row(label: str, count: int, size: str, note: str) -> None:
        say(
            f"{shorten(label, 35):<35}{count:>8,}{size:>10}  {shorten(note, terminal_width() - 56)}".rstrip()
        )

    tensors, files = plan.tensors, count_of(len(checkpoint.files), "file")
    say(f"{'Plan':<35}{'tensors':>8}{'size':>10}", before="\n")
    row(
        "input",
        len(checkpoint.tensors),
        format_bytes(sum(tensor.bytes_read for tensor in tensors)),
        files,
    )
    if plan.stacks:
        weights = count_of(len(tensors) - len(checkpoint.tensors) + plan.stacks, "weight")
        row("  of these stacks of experts", plan.stacks, "", f"read as {weights}")
    for packing in [
        *sorted({t.packing for t in tensors if t.packing}, key=lambda p: (p.bits, p.group_size)),
        None,
    ]:
        group = [tensor for tensor in tensors if tensor.packing == packing]
        label, note, padded = "kept as they are", "", []
        if packing:
            by = f", by {packing.group_size}" if packing.bits == 8 else ""
            label = f"{'restored from' if plan.options.restore else 'quantized to'} {packing.bits} bits{by}"
            note = f"become {format_bytes(sum(output.nbytes for tensor in group for output in tensor.outputs))}"
            padded = [
                t.source.shape[1]
                for t in group
                if not t.scales and t.source.shape[1] % packing.group_size
            ]
        row(label, len(group), format_bytes(sum(tensor.bytes_read for tensor in group)), note)
        sizes, names = Counter(), {}  # by kind
        for tensor in group:
            kind = f"  {tensor.kept_because or tensor.kind}"
            sizes[kind] += tensor.bytes_read
            names.setdefault(kind, []).append(tensor.source.name.removesuffix(".weight"))
        for kind, nbytes in sizes.most_common():
            row(
                kind,
                len(names[kind]),
                format_bytes(nbytes),
                names[kind][0] if len(names[kind]) == 1 else "",
            )
        for wide in padded[:1]:
            row(
                "  of these padded to whole groups",
                len(padded),
                "",
                f"e.g. {wide:,} to {packing.columns_of(wide):,}",
            )
    shards = f"{count_of(len(plan.shards), 'shard')}, up to {format_bytes(plan.options.shard_size_gb * GB)}"
    row(
        "output",
        sum(len(tensor.outputs) for tensor in tensors),
        format_bytes(plan.total_size),
        shards,
    )


def print_list(plan: Plan) -> None:
    """Print a line for each tensor, separated by tabs: its name, dtype, shape, what becomes of it and why."""
    for tensor in plan.tensors:
        info, packing = tensor.source, tensor.packing
        fate = f"{packing.bits} bits, groups of {packing.group_size}" if packing else "kept"
        cells = (
            info.name,
            info.dtype,
            "x".join(map(str, info.shape)),
            fate,
            tensor.kept_because or tensor.kind,
        )
        say(before="\t".join(map(printable, cells)))


class Progress:
    """One updating line on a terminal, else a line every ten seconds."""

    def __init__(self, guard: MemoryGuard):
        self.guard = guard
        self.stages = [("Baseline", guard.read())]
        self.cached = getattr(psutil.virtual_memory(), "cached", 0)  # bytes of files
        self.restart()

    def restart(self) -> None:
        """Count time from here."""
        self.started = time.monotonic()
        self._next = self.started + (0 if is_terminal(sys.stdout) else PROGRESS_INTERVAL_S[False])

    def mark(self, stage: str) -> None:
        """Note the memory at a stage, for the table at the end."""
        self.stages.append((stage, self.guard.read()))

    def show(self, conversion: Conversion) -> None:
        """Print how far it is, if the last time is long enough ago; and note the memory half-way."""
        work, task, tensors = (
            [(0, 0, 0, 0.0), *conversion.work.values()],
            conversion.task,
            conversion.tensors_total,
        )
        _, total, done, spent = map(sum, zip(*work))
        if len(self.stages) == 2 and done * 2 >= total:
            self.mark(f"Mid-{task.replace('izing', 'ization').replace('oring', 'oration')}")
        now, terminal, room = time.monotonic(), is_terminal(sys.stdout), terminal_width() - 1
        if now < self._next:
            return
        self._next, elapsed, reading = (
            now + PROGRESS_INTERVAL_S[terminal],
            now - self.started,
            self.guard.read(),
        )
        guess = sum(cost * part for cost, _, part, _ in work)
        costs = [
            n * (seconds / part if part else cost * spent / guess)
            for cost, n, part, seconds in work
            if guess
        ]
        share = min(1.0, spent / (sum(costs) or 1.0))
        left = math.ceil(elapsed / max(share, 0.02) * (1 - share) / 5) * 5  # seconds
        unit, size = ("h", 3600) if left >= 5400 else ("min", 60) if left > 90 else ("s", 1)
        parts = [
            f"{task}  {share:.0%}",
            *([f"about {left / size:,.0f} {unit} left"] if elapsed >= 2 and share >= 0.02 else []),
            f"{format_bytes(done)} of {format_bytes(total)}",
            f"{format_bytes(done / max(elapsed, 1e-9))}/s",
            f"{conversion.tensors_done:,}/{count_of(tensors, 'tensor')}",
            f"RAM {format_bytes(reading.used)} used, {format_bytes(reading.available)} available",
        ]
        if done == total:
            parts = [f"{task}: {count_of(tensors, 'tensor')} done, waiting for the disk"]
        fitting = [
            line for line in itertools.accumulate(parts, "{}  {}".format) if len(line) <= room
        ]
        say(
            fitting[-1] if fitting else "", CLEAR_LINE if terminal else "", "" if terminal else "\n"
        )


def print_summary(plan: Plan, conversion: Conversion, progress: Progress) -> None:
    """Say what was done, and what it took."""
    seconds, verb = (
        time.monotonic() - progress.started,
        "restored" if plan.options.restore else "quantized",
    )
    rate = format_bytes(
        sum(nbytes for _, nbytes, *_ in conversion.work.values()) / max(seconds, 1e-9)
    )
    before, after = sum(tensor.bytes_read for tensor in plan.tensors), plan.total_size
    smaller = (
        "" if plan.options.restore else f" ({three_digits(before / max(after, 1))} times smaller)"
    )
    packed = sum(tensor.packing is not None for tensor in plan.tensors)
    counts = f"{count_of(packed, 'tensor')} {verb}, {len(plan.tensors) - packed:,} kept"
    say(f"Done in {format_seconds(seconds)}, {rate}/s", colour=GREEN)
    say_paragraph(
        "Result:", f"{format_bytes(before)} became {format_bytes(after)}{smaller}; {counts}"
    )
    peak, memory = format_bytes(progress.guard.own_peak), psutil.virtual_memory()
    say_paragraph("Memory:", f"{peak} at the peak of this process (mapped files not counted)")
    more = getattr(memory, "cached", 0) - progress.cached
    say_paragraph(
        "Cache:",
        f"the page cache holds {format_bytes(more) if more > 0 else 'no'} more than before",
    )
    say_paragraph(
        "GPU:",
        f"its programs see {format_bytes(memory.free)} free now"
        if shares_memory_with_gpu()
        else "",
    )
    say(f"{'All programs, no page cache':<34}{'RAM used':>12}{'Available':>12}", before="\n")
    for stage, reading in progress.stages:
        say(f"{stage:<34}{format_bytes(reading.used):>12}{format_bytes(reading.available):>12}")


def print_next_steps(plan: Plan, folder: Path, verified: bool) -> None:
    """Say what can be done with the finished folder."""
    copy = "rsync -a --partial {name} HOST:"
    last = (
        ("Copy", copy)
        if verified
        else ("Check", f"the same command with --verify; then copy it: {copy}")
    )
    steps = [("Try", LOAD_STEP)] if plan.options.restore else [*plan.options.form.next_steps, last]
    say()
    say_paragraph("Next, in", f"{folder.resolve().parent}:")
    name = folder.resolve().name
    for label, text in steps:
        if label == "Load" and plan.fails_in_transformers:
            reason = f"not with transformers (5.24), which {plan.fails_in_transformers}"
            say_paragraph(f"  {label}:", reason)
            continue
        text = text.replace("{loader}", plan.loader).replace("{path}", repr(name))
        text = text.replace("{name}", shlex.quote(name))
        say_paragraph(f"  {label}:", text, command=True)


# ---- Verification: the output as its readers see it, against the source ---------------------------------------------


@dataclass
class Measured:
    """What was added up of one weight: errors, and weights that lie far beyond their codes."""

    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(2, 2, dtype=torch.float64))
    clipped: int = 0  # weights more than FAR_SCALES scales from what they decode to
    reach: float = 0.0  # the most scales of any of these

    def add(self, other: Measured) -> None:
        """Add what was measured of another part of the weight."""
        self.squares += other.squares
        self.clipped += other.clipped
        self.reach = max(self.reach, other.reach)

    def relative_errors(self) -> list[float]:
        """Return the relative RMS errors of the weight and of its outputs.

        `squares` is float64 (2, 2): of the weight and of its outputs, the sums of squares of the
        errors and of the values themselves."""
        errors, values = self.squares.T
        return (errors / values.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().tolist()


class Verification(Conversion):
    """Compares a finished folder with the plan of how it was made, byte for byte with what its source becomes, and each
    weight, decoded by code that shares with the packing only where bytes lie, with the source."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, folder: Path, guard: MemoryGuard):
        self.folder = folder
        self.errors: dict[
            str, list[float]
        ] = {}  # relative RMS errors of each weight, and of its outputs
        self.clipped: dict[str, Measured] = {}  # by weight, where some lie far from their codes
        self.kept = 0  # tensors that are as in the source
        # Without the statistics by which they were chosen, 4-bit codes are known within bounds alone.
        self.blind = bool(plan.options.importance) and plan.statistics is None
        self._statistics_of = functools.lru_cache(KEPT_ROUNDINGS)(
            lambda info: plan.statistics.get(info)
        )
        self._measured: dict[str, Measured] = {}  # by tensor
        self._wrong: dict[
            str, tuple[int, str]
        ] = {}  # by tensor: the first row, and what is wrong there
        self._hashes = {INDEX_NAME: plan.hashes[INDEX_NAME]}  # of other files, as they were written
        names, self.problems = {path.name for path in folder.iterdir()}, []
        strays = names - {shard.name for shard in plan.shards}
        self.problems += [
            f"{name} is none of the shards"
            for name in sorted(strays)
            if name.endswith(".safetensors")
        ]
        shards = [
            ShardFile(folder, shard, plan.fingerprint, finished=True, compare=True)
            for shard in plan.shards
        ]
        self._sound = [
            shard for shard in shards if self._is_sound(shard)
        ]  # `_is_due` asks, while jobs are planned
        self.problems += [f"{name} is missing" for name in self._hashes if name not in names]
        different = (
            n
            for n, digest in self._hashes.items()
            if n in names and hash_file(folder / n) != digest
        )
        self.problems += [f"{name} is not as it was written" for name in different]
        super().__init__(checkpoint, plan, shards, guard, "verifying")

    def _is_sound(self, shard: ShardFile) -> bool:
        """Tell whether the library opens a shard, and it holds the planned tensors at their places."""
        try:
            shard.read(0, 0)  # which asks what of it is cached
            with safe_open(
                shard.path, framework="pt"
            ):  # and no longer: pages that it maps cannot be dropped
                found, start = read_header(shard.path)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            self.problems.append(f"{shard.final.name}: cannot be opened ({error})")
            shard.compare = False
            return False
        finally:
            shard.close()  # there may be more of them than descriptors
        planned, shard.shift = json.loads(shard.plan.header[8:]), start - len(shard.plan.header)
        self._hashes |= files_of_run(read_metadata(shard.path))
        for header in (found, planned):
            header.pop("__metadata__", None)
        differing = found.keys() ^ planned.keys() or {
            name for name in found if found[name] != planned[name]
        }
        if differing:
            names = quote_names(sorted(differing))
            self.problems.append(f"{shard.final.name}: {names} differ from what the source gives")
        return not differing

    def _is_due(self, shards: list[ShardFile]) -> bool:
        return all(shard in self._sound for shard in shards)

    def run(self, threads: int, progress: Progress) -> None:
        """Compare every tensor; problems are collected, not raised. Errors of outputs, products with inputs of the
        statistics, are sqrt(tr(E H E^T) / tr(W H W^T)), NaN without these."""
        super().run(threads, progress)
        for tensor in self.plan.tensors:
            name = tensor.source.name
            if name in self._wrong:
                self.problems.append(f"{name!r}: {self._wrong[name][1]}")
            elif name in self._measured:
                self.errors[name] = self._measured[name].relative_errors()
                if self._measured[name].clipped:
                    self.clipped[name] = self._measured[name]
            elif name in self._due:
                self.kept += 1

    def _do(self, job: Job, data: memoryview, workspace: Workspace) -> None:
        """Compare what a job's bytes become with what is there."""
        tensor, problem = job.tensor, ""
        for output, offset, part in self._parts(job, data, workspace):
            number, start = self.plan.placements[output.name]
            found = self.shards[number].read(len(part), start + offset)
            chosen = tensor.packing and not output.content  # words or scales
            if found != bytes(part) and not (chosen and self.blind and tensor.packing.bits == 4):
                first = next(
                    number for number, pair in enumerate(zip(found, part)) if pair[0] != pair[1]
                )
                element = torch.tensor((offset + first) * 8 // DTYPE_BITS[output.dtype])
                index = [int(number) for number in torch.unravel_index(element, output.shape)]
                problem = f"{output.name}{index} differs from what the source gives"
            if chosen:
                part[:] = found  # so that what is decoded is what is there
        if tensor.packing:
            problem = self._measure(job, data, workspace) or problem
        if problem:
            with self._lock:
                name = tensor.source.name
                self._wrong[name] = min((job.row, problem), self._wrong.get(name, (math.inf, "")))

    def _measure(self, job: Job, data: memoryview, workspace: Workspace) -> str:
        """Add up a job's errors; describe the first weight that no conversion can have made.

        The rule holds for every input. A code inside the range lies within half a scale of its
        weight, or where error feedback moved the weight, within MAX_CHANGE scales more. A code at
        an end of the range has no bound on its side, since the search may clip any weight there."""
        info, packing, rule = job.tensor.source, job.tensor.packing, self.plan.options.rule
        with_offset = self.plan.options.form.with_offset
        transposed = self.plan.options.form.transposed
        block = torch.frombuffer(data, dtype=FLOAT_DTYPES[info.dtype]).view(job.rows, job.columns)
        words, scales = (
            part.T if transposed else part for part in self._lines(job, workspace).values()
        )
        finfo, half = torch.finfo(scales.dtype), packing.code_max + 1
        moved = packing.bits == 4 and FEEDBACK in rule
        tolerance = 0.5 + 1e-5 + packing.code_max * finfo.eps / 2 + moved * MAX_CHANGE
        smallest = finfo.tiny * finfo.eps  # subnormal
        given = self.plan.statistics and self._statistics_of(info)
        measured, problem = Measured(), ""
        step = max(1, VERIFY_WEIGHTS // job.columns)

        for row in range(0, job.rows, step):
            check_signals()
            weights = block[row : row + step].to(torch.float32)
            codes = words[row : row + step].contiguous().view(torch.uint8)
            if packing.bits == 4:
                # A byte holds the low nibble first.
                codes = torch.stack((codes % 16, codes // 16), -1).flatten(1)
            codes = codes[:, : job.columns].to(torch.float32)
            codes -= half if with_offset else 2 * half * (codes >= half)
            steps = scales[row : row + step].to(torch.float32)
            steps = steps.repeat_interleave(packing.group_size, 1)[:, : job.columns]
            decoded = codes * steps
            errors = weights - decoded

            # Beyond is positive where the weight lies on the side of the larger codes.
            beyond = torch.where(steps < 0, -errors, errors)
            bound = steps.abs() * tolerance + half * smallest
            open_above = (codes == packing.code_max) & (steps != 0)
            open_below = (codes == -half) & (steps != 0)
            right = (beyond <= bound) | open_above
            right &= (beyond >= -bound) | open_below
            right &= torch.isfinite(decoded)
            if not problem and not right.all():
                at, column = (int(i) for i in (~right).nonzero()[0])
                values = (
                    f"{float(tensor[at, column]):.6g}" for tensor in (decoded, weights, steps)
                )
                text = (
                    "row {}, column {} decodes to {}, the source has {}, too far for a scale of {}"
                )
                problem = text.format(job.row + row + at, column, *values)

            # The quotient is not a number where a scale is 0, and then not counted.
            distances = (errors / steps).abs()
            far = distances > FAR_SCALES
            if far.any():
                measured.clipped += int(far.sum())
                measured.reach = max(measured.reach, float(distances[far].max()))
            for number, values in enumerate((errors, weights)):
                measured.squares[0, number] += values.square().sum(dtype=torch.float64)
                energy = output_energy(values, *given) if given else math.nan
                measured.squares[1, number] += energy

        with self._lock:
            self._measured.setdefault(info.name, Measured()).add(measured)
        return problem


def output_energy(
    rows: torch.Tensor, mean_squares: torch.Tensor, factor: torch.Tensor | None
) -> float:
    """Return the trace of R H R^T for rows R, float32 (rows, columns), and H of the statistics, in float64."""
    rows, rest = rows.to(torch.float64), mean_squares.to(torch.float64)
    if factor is None:
        return float((rows.square() @ rest).sum())
    factor = factor.to(torch.float64)
    rest = (rest - factor.square().sum(1)).clamp_min(0)
    return float((rows.square() @ rest).sum() + (rows @ factor).square().sum())


def print_verification(verification: Verification) -> None:
    """Print errors by kind of layer, and the worst weights by name."""
    errors, outputs = verification.errors, verification.plan.statistics is not None
    kinds: dict[str, list[list[float]]] = {}
    for tensor in verification.plan.tensors:
        if tensor.source.name in errors:
            kind = tensor.kind + (", 8 bits" if tensor.packing.bits == 8 else "")
            kinds.setdefault(kind, []).append(errors[tensor.source.name])
    say()
    say(
        f"{'Verified':<24}{'weights':>7}{'relative RMS error':>23}{'of their outputs' if outputs else '':>20}".rstrip()
    )
    say(
        f"{'':<31}{'min':>8}{'median':>8}{'max':>8}"
        + (f"{'median':>12}{'max':>8}" if outputs else "")
    )
    for kind in sorted(kinds):
        own, of_outputs = (
            [error for error in column if not math.isnan(error)] for column in zip(*kinds[kind])
        )
        cells = [
            f"{three_digits(some(own or [math.nan])):>8}" for some in (min, statistics.median, max)
        ]
        if of_outputs:
            cells += [
                f"{three_digits(statistics.median(of_outputs)):>12}{three_digits(max(of_outputs)):>8}"
            ]
        say(f"  {shorten(kind, 22):<22}{len(own):>7,}{''.join(cells)}")
    say(f"  {'kept, bit for bit':<22}{verification.kept:>7,}")
    for name, (error, _) in sorted(errors.items(), key=lambda item: -item[1][0])[:5]:
        say(f"  worst: {three_digits(error)}  {shorten(name, terminal_width() - 18)}")
    if verification.clipped:
        print_clipped(verification.clipped)
    if verification.blind:
        rule = verification.plan.options.rule
        codes = f"4-bit codes {rule.partition(' ')[2]} are checked only so far"
        reach = 0.5 + MAX_CHANGE * (FEEDBACK in rule)
        inside = f"those inside the range to lie within {reach} scales of their weights"
        ends = "those at its ends on their side"
        exact = "with the --importance that they were made with, each is checked exactly"
        say_paragraph("Note:", f"{codes}: {inside}, {ends}; {exact}")
    for problem in verification.problems[:20]:
        say_paragraph("WRONG:", problem)
    if not verification.problems:
        say(
            f"  {shorten(str(verification.folder), terminal_width() - 30)} holds what it should.",
            colour=GREEN,
        )


def print_clipped(clipped: dict[str, Measured]) -> None:
    """Count the weights that were clipped, and name the tensor of the farthest one."""
    count = sum(measured.clipped for measured in clipped.values())
    farthest = max(clipped, key=lambda name: clipped[name].reach)
    lie = "lies" if count == 1 else "lie"
    text = f"{count_of(count, 'weight')} {lie} more than {FAR_SCALES} scales from what is decoded"
    reach = three_digits(clipped[farthest].reach)
    say_paragraph("  clipped:", f"{text}, up to {reach} in {farthest}")


# ---- Command: what is done, in which order --------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Do what is asked for; every error is raised."""
    name = args.format or "int4"
    if name not in FORMATS:  # which is said before anything is opened
        raise QuantizeError(
            f"--format {name!r} is none of {', '.join(FORMATS)}{nearest(name, FORMATS)}", 2
        )
    guard = MemoryGuard(int(args.min_free_gb * GB))
    progress = Progress(guard)
    args.threads = args.threads or usable_cores()
    for folder in filter(None, (args.input_dir, args.config_dir)):
        if args.output_dir.resolve().is_relative_to(folder.resolve()):
            raise QuantizeError(
                f"output folder {args.output_dir} is inside the input folder {folder}, or is it itself"
            )
    finished = (
        args.verify
        and (args.output_dir / INDEX_NAME).exists()
        and not args.overwrite
        and not args.dry_run
    )
    with contextlib.closing(Checkpoint(args.input_dir, args.config_dir)) as checkpoint:
        plan = plan_as_asked(args, checkpoint, finished)
        if args.list:
            print_list(plan)
            return
        converted = not finished and print_and_convert(args, checkpoint, plan, progress)
        if finished or (converted and args.verify):
            verify(args, checkpoint, plan, progress)
    if converted:
        print_next_steps(plan, args.output_dir, args.verify)


def plan_as_asked(args: argparse.Namespace, checkpoint: Checkpoint, finished: bool) -> Plan:
    """Plan what the arguments ask for; where a folder is only verified, or restored, its shards say how it was made. By
    default int4 takes absmax scales, and formats for engines those of mse."""
    form, shard_size_gb = FORMATS[args.format or "int4"], args.shard_size_gb or 4.0
    scale = args.scale or ("mse" if form.for_engines else "absmax")
    if args.importance and scale != "mse" and not finished:
        raise QuantizeError("--importance needs --scale mse", 2)
    statistics = Importance(args.importance) if args.importance else None
    asked = {name: getattr(args, name, None) for name in Options.__annotations__}
    if statistics:
        asked["importance"] = (
            f"{FEEDBACK if statistics.largest_factor else WEIGHED} {hash_file(args.importance)}"
        )
    if args.restore:
        facts = read_facts(args.input_dir)
        made = facts["options"]
        if made["restore"]:
            raise QuantizeError(f"{args.input_dir} is restored already: nothing in it is packed")
        made |= {"importance": None, "restore": True, "shard_size_gb": shard_size_gb}
        return plan_restoration(checkpoint, Options(**made), facts["dtypes"])
    if finished:
        made = read_facts(args.output_dir)
        if made["options"]["restore"]:
            problem = "holds a restored checkpoint, and --verify is for what it was restored from"
            raise QuantizeError(f"{args.output_dir} {problem}")
        given = made["options"] | {name: value for name, value in asked.items() if value}
        now = {"version": FORMAT_VERSION, "options": given, "sources": checkpoint.sources}
        if differs := what_differs(made, now):
            remedy = (
                "verify it with the checkpoint, the options and the version that it was made with"
            )
            raise QuantizeError(f"{args.output_dir} was made otherwise: {differs}: {remedy}")
        return plan_conversion(checkpoint, Options(**given), statistics)
    asked |= {"format": form.name, "scale": scale, "shard_size_gb": shard_size_gb}
    return plan_conversion(checkpoint, Options(**asked), statistics)


def print_and_convert(
    args: argparse.Namespace, checkpoint: Checkpoint, plan: Plan, progress: Progress
) -> bool:
    """Print the plan and write the output folder; tells whether there was something to do."""
    with contextlib.closing(OutputFolder(args.output_dir, plan, args.overwrite)) as output:
        progress.mark("Headers read")
        denied = output.why_unwritable()
        if denied and not args.dry_run:
            raise QuantizeError(f"output folder {output.folder}: {denied}")
        print_plan(plan, checkpoint, output, progress.guard, args.threads)
        complete = output.nothing_to_write and not output.compare
        if args.dry_run:
            short = progress.guard.shortage(buffer_bytes(plan, args.threads))
            for problem in (denied, *(() if complete else (output.lack_of_room(), short))):
                say_paragraph("WARNING:", problem and f"the run itself would stop: {problem}")
            say("Dry run: nothing was written.")
        elif complete:
            there = shorten(str(args.output_dir), terminal_width() - 25)
            told = (
                "" if args.restore else "It was not compared with the source; --verify does that."
            )
            say_paragraph("Finished:", f"{there} is complete already. {told}")
        else:
            convert(checkpoint, plan, output, progress, args.threads)
            return True
    return False


def convert(
    checkpoint: Checkpoint, plan: Plan, output: OutputFolder, progress: Progress, threads: int
) -> None:
    """Write the planned output folder, or compare what is there."""
    if problem := output.lack_of_room():
        raise QuantizeError(problem)
    progress.guard.check()
    compared, task = output.nothing_to_write, "restoring" if plan.options.restore else "quantizing"
    shards = [
        ShardFile(
            output.folder,
            shard,
            plan.fingerprint,
            shard.name in output.finished,
            shard.name in output.compare,
            output.make_way,
        )
        for shard in plan.shards
    ]
    conversion = Conversion(checkpoint, plan, shards, progress.guard, task)
    say()
    output.prepare()
    progress.restart()
    with deferring_signals():
        write_output(plan, conversion, output, threads, progress)
    progress.mark("Compared" if compared else "Written")
    if compared:
        seconds = format_seconds(time.monotonic() - progress.started)
        say(f"Compared in {seconds}: what is there is what the source files give.", colour=GREEN)
    else:
        print_summary(plan, conversion, progress)


def write_output(
    plan: Plan, conversion: Conversion, output: OutputFolder, threads: int, progress: Progress
) -> None:
    """Write or compare all files; an error says what of them is kept, and nothing half-written stays."""
    shards = conversion.shards
    try:
        with telling_of_memory():
            conversion.run(threads, progress)
            if plan.statistics:
                plan.statistics.check_unchanged()
            output.write_other_files()
    except (QuantizeError, Stopped) as stop:
        if stop.exit_code == 3 or stop.exit_code > 128:
            count = sum(shard.finished for shard in shards)
            finished = (
                f"{count:,} of {count_of(len(shards), 'shard')} {'is' if count == 1 else 'are'}"
            )
            command = "the same command"
            if output.overwrite:
                command = "the same command without --overwrite"
            told = f"{finished} finished and kept, {command} continues"
            if output.overwrite and output.is_as_it_was:
                told = f"nothing was written, and {output.folder} is as it was"
            stop.args = (f"{stop}; {told}",)
        raise
    finally:
        clear_line()
        for path in output.folder.glob(
            f"*.{plan.fingerprint[:12]}.unfinished"
        ):  # of a run that stopped here
            with contextlib.suppress(OSError):  # the error that stopped it is the one to report
                path.unlink()


def verify(
    args: argparse.Namespace, checkpoint: Checkpoint, plan: Plan, progress: Progress
) -> None:
    """Compare a finished folder with its source."""
    say()
    say_paragraph(
        "Verifying",
        f"{args.output_dir} by decoding every weight and comparing it with {checkpoint.folder}",
    )
    verification = Verification(checkpoint, plan, args.output_dir, progress.guard)
    progress.restart()
    try:
        verification.run(args.threads, progress)
    finally:
        clear_line()
    print_verification(verification)
    if verification.problems:
        remedy = "convert again into another folder"
        if read_facts(args.output_dir)["sources"] != checkpoint.sources:
            remedy = (
                f"if {checkpoint.folder}, now of another time, is what it was made from, {remedy}"
            )
        found = f"{count_of(len(verification.problems), 'problem')}, listed above"
        raise QuantizeError(f"verification of {args.output_dir} found {found}: {remedy}")


def kernel_for(plan: Plan) -> Kernel | None:
    """Compile the kernel if the plan has work for it. It is never needed, and so the user is only told."""
    if plan.options.restore or all(
        not tensor.packing or tensor.packing.bits == 8 for tensor in plan.tensors
    ):
        return None
    try:
        return compile_kernel(plan.options.scale == "mse")
    except QuantizeError as reason:
        times = "thirty times" if FEEDBACK in plan.options.rule else "twice"
        say_paragraph(
            "Note:",
            f"rounding with torch, which takes {times} the processor's time or more: {reason}",
        )
        return None


def main(argv: list[str] | None = None) -> int:
    """Run with these arguments, or those of the command line; returns the exit code."""
    args = ARGUMENTS or parse_args(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)  # the workers are the parallelism
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2
    )  # many shards
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # names of files and tensors need not be in its encoding
    clear_line()  # "loading torch"
    gc.freeze()  # what the imports made; searching it for garbage takes 55 ms, during which no worker gets on
    try:
        with stop_on_signals(), telling_of_memory():
            run(args)
        return 0
    except (Exception, Stopped) as error:
        if args.debug:
            traceback.print_exc()
        message = f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        if isinstance(error, (QuantizeError, Stopped)):
            message = str(error)
        elif isinstance(error, OSError):
            message = describe_os_error(error)
        with contextlib.suppress(OSError):
            message = printable(
                message[:2000]
            )  # a name in a damaged header may be as long as the header
            print(paint(ERROR, BOLD_RED, sys.stderr) + message, file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 1)


if __name__ == "__main__":
    sys.exit(main())
