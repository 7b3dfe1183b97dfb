#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8.0", "safetensors>=0.7.0", "psutil>=5.9.0"]
# ///
"""Quantize a merged bf16 checkpoint to INT4, on the CPU, in constant memory.

    python quantize_int4.py --input_dir merged --output_dir merged_int4 \\
        --format compressed-tensors --verify

The folders may also be given alone, and options spelled with hyphens. A REGEX
may match anywhere in a tensor's name. A GB is 10^9 bytes.

Quantized are 2-D floating-point tensors X.weight and stacks of routed experts.
Kept bit for bit are embeddings, what --exclude names, rows narrower than a
group and, in formats for engines, heads, routers and all but the language
model, unless --int8 names it.

--format decides what X.weight (rows, columns) becomes. Here g is group_size,
and padded is columns rounded up to whole groups:

  int4, for readers   X.qweight        int32    (rows, padded // 8)
    of your own       X.scales         float16  (rows, padded // g)
  compressed-tensors  X.weight_packed  int32    (rows, columns // 8)
    for vLLM and      X.weight_scale   *        (rows, columns // g)
    transformers      X.weight_shape   int64    (2,): rows, columns
  gptq (v1), other    X.qweight        int32    (columns // 8, rows)
    engines, dense    X.scales         float16  (columns // g, rows)
    models only       X.qzeros         int32    (columns // g, rows // 8): 7s
                      X.g_idx          int32    (columns,): group of each

* is the 16-bit dtype that config.json names, else the weight's own (float32
for float64). For engines --group_size defaults to the largest of 128, 64 and
32 that divides all columns.

A word holds eight codes along the columns, the first in its lowest bits: int4
as 4-bit two's complement, the others as code + 8. A weight is code * scale.
In 8 bits a word of weight_packed holds four codes, as code + 128. Weights that
are padded are listed in quantize_config.json.

A run that was stopped continues with the same command. Without a C compiler
(cc, or what CC names) it takes twice the time, with error feedback thirty
times, and has the same result.

Exit codes: 0 done, 1 refused or failed, 2 usage error, 3 too little memory,
129, 130, 143 stopped by SIGHUP, SIGINT, SIGTERM.
"""

# For those who change it. The file is read downwards, as a tensor goes:
#
#   Checkpoint       knows the place of each tensor; `WeightsFile` reads its bytes
#   Architectures    `expert_weights`: what a stack of experts becomes; `find_kinds`: layers' kinds;
#                    `find_language_model`: which part of a multimodal model is quantized
#   Formats          `FORMATS` and `ENGINES`: what a weight becomes, and what engines can hold
#   Collecting       `collect_statistics`: where a model runs, writes the file for --importance
#   Plan             `plan_tensors` and `reason_to_keep`: what is quantized, why others are kept;
#                    `with_recipe`: how; `plan_shards`: where each byte of the output goes
#   Budget           `spend_budget`: what gets 8 bits for --max_size_gb
#   Rules            `RULES`: what is refused, warned of and noted
#   Jobs             `cut_into_jobs`: the blocks in which the work is done
#   Output folder    `OutputFolder._survey`: whether an earlier run may be continued
#   Pipeline         threads that read ahead, hand blocks to a function, and wait for the disk
#   Quantization     `quantize_into`: scales and codes; the kernels do the same in C
#   Blocks           `Packer` and `Restorer`: what the bytes of a block become
#   Conversion       writes that at its place; `Verification` compares and measures it
#   Command          `run`: what is done, in which order
#
# A module X has a weight, the tensor X.weight, of rows by columns. A group is group_size columns of
# a row. A shard is an output file. A job is a block of a tensor that a worker handles at a time.
# The tests are in tests/test_SECTION*.py.

from __future__ import annotations

import signal

# Until there is a handler, Ctrl-C ends the command without a traceback of the imports.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import atexit
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
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, ClassVar, TextIO

__version__ = "1.1.0"

# ---- Options: what may be asked for. Before the imports of torch and others, which take seconds --

# What every error begins with.
ERROR = "error: "
# On a terminal: back to the line's start, erase to its end (ECMA-48).
CLEAR_LINE = "\r\033[K"
SEE_HELP = " (see quantize_int4.py --help)"
DEFAULT_SHARD_SIZE_GB = 4.0


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a person reads the stream. A process may have no standard streams."""
    return stream is not None and stream.isatty()


def terminal_width() -> int:
    """Return the columns of the terminal; for a pipe those of COLUMNS, or 80."""
    if is_terminal(sys.stdout) or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return 80


def printable(text: str) -> str:
    """Escape control characters: names come from files, and a terminal obeys what it is sent."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a question about what was meant, for the end of an error; empty if that is unclear.

    prefix: what stands before each of `known` and says nothing of how near it is"""
    matches = difflib.get_close_matches(word, list(known), 1)
    return f": did you mean {prefix}{matches[0]}?" if matches else ""


def meaning_of(word: str, meanings: Mapping[str, str]) -> str:
    """Return what a word of others means here, for the end of an error; empty if none is known.

    meanings: by words, separated by blanks"""
    for words, meaning in meanings.items():
        if word in words.split():
            return f": {meaning}"
    return ""


# Options of other programs, without their hyphens.
OTHER_OPTIONS = {
    "bits num_bits w_bits wbits int4": "codes have 4 bits, and --int8 REGEX names those of 8",
    "quant quantization scheme w4a16": "--format names the layout",
    "in model model_dir model_id model_path": "--input_dir names the checkpoint's folder",
    "out": "--output_dir names the folder to write to",
    "calib calib_data calib_dataset calibration dataset": (
        "--importance FILE gives activation statistics, which collect_statistics writes"
    ),
    "force": "--overwrite replaces what an earlier run left",
    "ignore modules_to_not_convert": "--exclude REGEX names what is kept",
    "continue resume": "the same command continues a run that was stopped",
}

# What others call formats, and what loads them.
OTHER_FORMATS = {
    "hf huggingface llm-compressor transformers vllm w4a16": (
        "vLLM and transformers load --format compressed-tensors"
    ),
    "sglang": (
        "SGLang should load --format compressed-tensors of dense models, which was never tried"
    ),
    "autoawq awq marlin": (
        "no such layout is made here, but --format compressed-tensors, which vLLM serves with the"
        " same kernels"
    ),
    "edge-llm edgellm tensorrt-edge-llm tensorrt-edgellm": (
        "TensorRT Edge-LLM loads --format gptq --group_size 128"
    ),
    "tensorrt tensorrt-llm trt trt-llm": (
        "TensorRT Edge-LLM loads --format gptq --group_size 128; for TensorRT-LLM, NVIDIA's Model"
        " Optimizer quantizes"
    ),
    "gguf llama.cpp ollama": (
        "not made here; llama.cpp makes it from the same checkpoint, with convert_hf_to_gguf.py"
        " and llama-quantize"
    ),
    "fp4 fp8 mxfp4 nvfp4": (
        "floats are not made here; llm-compressor and NVIDIA's Model Optimizer make them"
    ),
    "int8 w8a16": "--format compressed-tensors --int8 REGEX gives 8 bits to what REGEX names",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, as all others do, and say what was meant."""

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: ([^\s=]*)", message)
        if unknown and unknown[1].startswith("-"):
            name = unknown[1].lstrip("-")
            options = [known.lstrip("-") for known in self._option_string_actions]
            message += meaning_of(name, OTHER_OPTIONS) or nearest(name, options, "--")
        elif unknown:
            message += (
                ": quote a value with a space or a *, and give --exclude or --int8 once for each"
                " pattern"
            )
        self.exit(2, f"{ERROR}{message}{SEE_HELP}\n")


def checked(
    metavar: str, rule: str, convert: Callable, accept: Callable = lambda value: True
) -> dict:
    """Return settings of an option whose text is converted, and refused as not what `rule` says.

    An empty text is always refused: it comes of a variable that is not set, and would be the
    current folder, or match every name."""

    def parse(text: str) -> object:
        try:
            value = convert(text)
            is_valid = text and accept(value)
        except (ValueError, re.error):
            is_valid = False
        if not is_valid:
            raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")
        return value

    return {"metavar": metavar, "type": parse}


@dataclass(frozen=True)
class Option:
    """A row of `OPTIONS`: its name, its help, and the settings by which argparse reads it."""

    name: str
    text: str
    settings: dict


FLAG = {"action": "store_true"}
FOLDER = checked("DIR", "the name of a folder", Path)
FILE = checked("FILE", "the name of a file", Path)
GIGABYTES = checked("GB", "a number of gigabytes", float, lambda n: 0 <= n <= 1e9)
POSITIVE_GB = checked("GB", "a positive number of gigabytes", float, lambda n: 0 < n <= 1e9)
MULTIPLE_OF_8 = checked("N", "a positive multiple of 8", int, lambda n: n > 0 and n % 8 == 0)
THREADS = checked("N", "a number of threads from 1 to 1024", int, lambda n: 1 <= n <= 1024)
PATTERN = checked(
    "REGEX",
    "a regular expression (attn matches anywhere, without a *)",
    lambda text: re.compile(text).pattern,
)
PATTERNS = PATTERN | {"action": "append", "default": []}
# By the headings under which --help lists them. A line of help has room for 54 characters.
OPTIONS = {
    "folders": (
        Option("input_dir", "merged checkpoint: safetensors or torch pickles", FOLDER),
        Option("output_dir", "where to write: new, empty or of an earlier run", FOLDER),
        Option("config_dir", "where config.json and the tokenizer are, if elsewhere", FOLDER),
        Option("mtp_from", "base model, for MTP layers that a fine-tune lost", FOLDER),
        Option(
            "shard_size_gb",
            "maximum size of a file; a larger tensor gets its own"
            f" (default: {DEFAULT_SHARD_SIZE_GB})",
            POSITIVE_GB,
        ),
    ),
    "what is quantized": (
        Option("exclude", "keep tensors whose name matches; may be repeated", PATTERNS),
        Option(
            "int8",
            "8 bits for weights whose name matches; may be repeated (compressed-tensors only)",
            PATTERNS,
        ),
        Option(
            "max_size_gb",
            "fill a folder of this size with 8 bits where they help most (compressed-tensors only;"
            " needs --importance)",
            POSITIVE_GB,
        ),
        Option("quantize_embeddings", "quantize embeddings, too (int4 only)", FLAG),
    ),
    "how": (
        Option(
            "format",
            "int4 (default), compressed-tensors or gptq: see below",
            {"metavar": "NAME"},
        ),
        Option(
            "group_size",
            "columns that share a scale (default: 128; see below)",
            MULTIPLE_OF_8,
        ),
        Option(
            "scale",
            "absmax: max|weight| / 7 (default for int4); mse: of least squared error (default for"
            " engines)",
            {"choices": ("absmax", "mse")},
        ),
        Option(
            "importance",
            "activation statistics file that collect_statistics of this script wrote; needs"
            " --scale mse",
            FILE,
        ),
    ),
    "checking and converting back": (
        Option("dry_run", "print the plan and write nothing", FLAG),
        Option(
            "verify",
            "check the output against the source, after writing or on a finished folder",
            FLAG,
        ),
        Option(
            "list",
            "print tab-separated lines: each tensor with --dry_run, each weight's errors with"
            " --verify",
            FLAG,
        ),
        Option("restore", "convert a quantized folder back to a plain checkpoint", FLAG),
    ),
    "safety": (
        Option("overwrite", "replace what an earlier run left, and nothing else", FLAG),
        Option(
            "min_free_gb",
            "stop when less memory is available (default: 10)",
            GIGABYTES | {"default": 10.0},
        ),
    ),
    "other options": (
        Option("threads", "worker threads (default: all usable cores)", THREADS),
        Option("debug", "show tracebacks, and the memory at each stage", FLAG),
    ),
}


def make_parser() -> Parser:
    """Declare the options, each with its default and its check."""
    summary, example, rest = __doc__.split("\n\n", 2)
    parser = Parser(
        description=f"{summary}\n\n{example}", epilog=rest, allow_abbrev=False, add_help=False
    )
    parser.usage = "quantize_int4.py --input_dir DIR --output_dir DIR [option ...]"
    parser.formatter_class = functools.partial(
        argparse.RawDescriptionHelpFormatter, width=terminal_width() - 1, max_help_position=25
    )
    # The two folders without their options.
    parser.add_argument("folders", nargs="*", type=FOLDER["type"], help=argparse.SUPPRESS)
    for heading, options in OPTIONS.items():
        group = parser.add_argument_group(heading)
        for option in options:
            group.add_argument(f"--{option.name}", help=option.text, **option.settings)

    # Under the last heading.
    version = f"quantize_int4.py {__version__}"
    group.add_argument("--version", action="version", version=version, help="print the version")
    group.add_argument("-h", "--help", action="help", help="print this help")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the options, spelled --input_dir or --input-dir.

    Exits with a usage error if one is wrong, or if they make no sense together."""
    parser = make_parser()
    args = parser.parse_args([with_underscores(argument) for argument in argv])
    for name in ("input_dir", "output_dir"):
        if getattr(args, name) is None:
            if not args.folders:
                parser.error(f"--{name} is missing")
            setattr(args, name, args.folders.pop(0))
    if args.folders:
        parser.error(f"unrecognized arguments: {' '.join(map(str, args.folders))}")
    check_together(parser, args)
    return args


def with_underscores(argument: str) -> str:
    """Return an argument with underscores in its option's name. A value stays as it is."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = f"--{name[2:].replace('-', '_')}"
    return name + equals + value


def check_together(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with a usage error if the options make no sense together."""
    names = (
        "verify mtp_from format group_size exclude int8 max_size_gb scale importance"
        " quantize_embeddings"
    )
    if args.restore and any(getattr(args, name) for name in names.split()):
        parser.error(
            "--restore takes the layout from the folder: leave out --verify and the options that"
            " decide the layout, such as --format"
        )
    if args.list and not args.dry_run and not args.verify:
        parser.error("--list needs --dry_run, or --verify and a finished folder")
    if args.format is not None and args.format not in FORMAT_NAMES:
        names = ", ".join(FORMAT_NAMES)
        name = args.format.lower().replace("_", "-")
        suggestion = meaning_of(name, OTHER_FORMATS) or nearest(name, FORMAT_NAMES)
        parser.error(f"--format {args.format!r} is none of {names}{suggestion}")


# ---- Kernels: C for the work on each weight, compiled while torch is imported --------------------

# Of `search_scales`. Placed for least error on Gaussian, Laplace and Student-t (5) weights in
# groups of 32 to 128. A grid of 70 from 6.8 to 13.7 gains no more than 0.16 % of the relative RMS
# error.
SEARCH_STEPS = (7.1, 7.8, 8.2, 8.5, 8.8, 9.2, 9.7)
# Parts of 2^14 times these are codes times 2^25.
SEARCH_MULTIPLIERS = [round(step * (1 << 11)) for step in SEARCH_STEPS]
MAX_GROUP = 1024  # columns of a group that the kernel takes: the sums of its search fit 32 bits
MAX_RANK = 64  # of a factor of second moments
# Scales by which feedback may move a weight. One weight in 10,000 would go further, and --verify
# has a bound.
MAX_CHANGE = 2
# Scales beyond which --verify counts a weight as clipped. Rounding and error feedback reach 2.5.
FAR_SCALES = 3
COMPILER_TIMEOUT_S = 60  # it takes 0.2, and far longer on a small machine that is busy
FORMAT_NAMES = ("int4", "compressed-tensors", "gptq")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# `quantize_into` and `find_spread`, for groups of up to MAX_GROUP weights: the same
# bytes in half the time or less.
QUANTIZE_SOURCE = r"""
#include <stdint.h>

/* WEIGHTS is one of these, and VARIANT one of those. FEEDBACK can do what SEARCH can. */
#define BF16 1
#define F16 2
#define F32 3
#define ABSMAX 1
#define SEARCH 2
#define FEEDBACK 3

#define MAX(one, other) ((one) > (other) ? (one) : (other))
#define MIN(one, other) ((one) < (other) ? (one) : (other))

/* The compiler sees that these are multiples of 8 and of 32, and so loops need no remainder. */
#define EIGHTS(size) ((size) & ~7L)
#define PADDED(size) (((size) + 31) & ~31L)

/* Keep a function apart, so that the compiler optimizes it once and not at each call. */
#define SEPARATE static __attribute__((noinline))

/* Weights that are quantized together, so that no group waits for another's division. */
#define BLOCK (2 * MAX_GROUP)

/* 1.5 * 2^23 + 192: a number that is added to it is rounded to an integer, half to even. */
#define ROUND 12583104.0f
#define ROUND_BITS 0x4B4000C0

#define UNROLLED _Pragma("GCC unroll 8")

/* Add up a term of each k in the order of `sum_in_lanes`; `declared` are the eight lanes. */
#define SUM(declared, count, term) ({                                                          \
    declared = {0};                                                                            \
    for (long start = 0; start < (count); start += 8)                                          \
        UNROLLED                                                                               \
        for (long lane = 0, k = start; lane < 8; lane++, k++)                                  \
            lanes[lane] += (term);                                                             \
    (lanes[0] + lanes[4] + (lanes[2] + lanes[6]))                                              \
        + (lanes[1] + lanes[5] + (lanes[3] + lanes[7]));                                       \
})

typedef union {
    uint32_t bits;
    float value;
} word;

/* Eight numbers at once, on any processor. */
typedef float floats __attribute__((vector_size(32)));
typedef double doubles __attribute__((vector_size(64)));

/* What `quantize` is called with, and the number of scales that are not finite, which it fills
   in. Python takes the fields from here. */
typedef struct {
    const void *weights;
    uint8_t *words;
    void *scales;
    const float *importance;
    const int16_t *shares;
    const float *factor;
    const float *spread;
    long groups;
    long group_size;
    long groups_in_row;
    long rank;
    long bits_dropped;
    long offset;
    long not_finite;
} quantize_call;

/* A bf16 is the upper half of a float. The exponent of a float16 is less by 112, and 31 stands for
   infinity and NaN. */
static inline float widen(uint16_t weight) {
    word wide = {(uint32_t)weight << 16};
    if (WEIGHTS == F16) {
        wide.bits = (wide.bits & 0x80000000) | (uint32_t)(weight & 0x7FFF) << 13;
        wide.value *= 0x1p112f;
        wide.bits |= (weight & 0x7FFF) >= 0x7C00 ? 0x7F800000 : 0;
    }
    return wide.value;
}

static inline float weight_at(const void *weights, long i) {
    if (WEIGHTS == F32)
        return ((const float *)weights)[i];
    return widen(((const uint16_t *)weights)[i]);
}

static inline const void *skip_weights(const void *weights, long count) {
    return (const char *)weights + count * (WEIGHTS == F32 ? 4 : 2);
}

/* Round a scale to its dtype, which drops some of the bits of a float: none for float32, 13 for
   float16, 16 for bf16. There are no branches, so that several scales can be rounded at once. */
static inline float round_scale(float scale, int bits_dropped) {
    word rounded = {.value = scale};
    float magnitude = MAX(scale, -scale);
    uint32_t kept = -(1u << bits_dropped);
    uint32_t below_half = ~kept >> 1;
    uint32_t odd = rounded.bits >> bits_dropped & ~kept & 1;
    rounded.bits = (rounded.bits + below_half + odd) & kept;
    rounded.value = magnitude < __builtin_inff() ? rounded.value : scale;

    /* Subnormal numbers of float16 are multiples of 2^-24. */
    int is_float16 = bits_dropped == 13;
    float subnormal = scale + 0.75f - 0.75f;
    rounded.value = is_float16 & (magnitude < 0x1p-14f) ? subnormal : rounded.value;
    rounded.value = is_float16 & (magnitude >= 65520) ? __builtin_inff() : rounded.value;
    return rounded.value;
}

/* Store rounded scales, and count those that are not finite. The bits of a float16 are those of a
   float 2^112 times smaller. */
static inline void store_scales(
    quantize_call *call, const float *restrict scales, long first, long count
) {
    float *restrict wide = (float *)call->scales + first;
    uint16_t *restrict narrow = (uint16_t *)call->scales + first;
    int is_float16 = call->bits_dropped == 13;
    int not_finite = 0;
    for (long i = 0; i < count; i++)
        not_finite += !(scales[i] - scales[i] == 0);
    call->not_finite += not_finite;
    if (call->bits_dropped == 0) {
        for (long i = 0; i < count; i++)
            wide[i] = scales[i];
        return;
    }
    for (long i = 0; i < count; i++) {
        word scale = {.value = scales[i]};
        word smaller = {.value = scales[i] * 0x1p-112f};
        uint32_t float16 = (scale.bits >> 16 & 0x8000) | (smaller.bits >> 13 & 0x7FFF);
        narrow[i] = is_float16 ? float16 : scale.bits >> 16;
    }
}

/* Multiply a weight by the reciprocal of its scale, and round the quotient to an integer.

   This gives the integer that a division gives if both the weight and the scale have 16 bits. The
   quotient, here below 32, is then half-way between two integers or at least 2^-12 away from there.
   The product is off by less than 2^-17. Adding 192 rounds it to a multiple of 2^-16, which makes
   half-way cases exact again and moves no other one across. */
static inline word multiply(float weight, float reciprocal) {
#ifdef __FP_FAST_FMAF
    float sum = __builtin_fmaf(weight, reciprocal, 192.0f);
#else
    float sum = weight * reciprocal + 192.0f;
#endif
    return (word){.value = sum + (ROUND - 192.0f)};
}

static inline word divide(float weight, float divisor) {
    return (word){.value = weight / divisor + ROUND};
}

/* The code of a rounded quotient. */
static inline int32_t clamp(word rounded) {
    int32_t bits = MIN((int32_t)rounded.bits, ROUND_BITS + 7);
    return MAX(bits, ROUND_BITS - 8) - ROUND_BITS;
}

/* Whether `multiply` may be used. The reciprocal must be finite. And the smallest scales of float16
   have so few bits that the largest weight may be beyond 7.5 of them, where it must be clamped. */
static inline int may_multiply(float scale, int bits_dropped) {
    float magnitude = MAX(scale, -scale);
    float least = bits_dropped == 13 ? 0x1p-21f : 0x1p-126f;
    return (WEIGHTS != F32) & (bits_dropped > 0) & ((magnitude >= least) | (magnitude == 0));
}

#if VARIANT == ABSMAX

/* Find the largest magnitude of each group by its bits: without sign these have the order of the
   values, and NaN is above all. */
SEPARATE void find_largest(
    const void *restrict weights, float *restrict largest, long groups, long size
) {
    for (long group = 0; group < groups; group++) {
#if WEIGHTS == F32
        int32_t most = 0;
        for (long i = group * size; i < (group + 1) * size; i++) {
            int32_t magnitude = ((const int32_t *)weights)[i] & 0x7FFFFFFF;
            most = MAX(most, magnitude);
        }
        largest[group] = (word){most}.value;
#else
        int16_t most = 0;
        for (long i = group * size; i < (group + 1) * size; i++) {
            int16_t magnitude = ((const int16_t *)weights)[i] & 0x7FFF;
            most = MAX(most, magnitude);
        }
        largest[group] = widen(most);
#endif
    }
}

/* Fill in what each pair of columns is multiplied with or divided by. */
static inline void repeat_for_pairs(
    const float *restrict of_groups, float *restrict of_pairs, long groups, long size
) {
    for (long group = 0; group < groups; group++) {
        float number = of_groups[group];
        for (long pair = group * size / 2; pair < (group + 1) * size / 2; pair++)
            of_pairs[pair] = number;
    }
}

/* The codes of a pair of 16-bit weights, in a byte. ROUND ends in four bits that are 0. */
static inline uint8_t multiply_pair(uint32_t pair, float reciprocal) {
    word even = multiply(widen(pair), reciprocal);
    word odd = multiply(widen(pair >> 16), reciprocal);
    return (even.bits & 15) | odd.bits << 4;
}

SEPARATE void multiply_and_pack(
    const uint32_t *restrict pairs, const float *restrict reciprocals, uint8_t offset,
    uint8_t *restrict packed, long groups, long size
) {
    float of_pairs[BLOCK / 2];
    if (size % 128 == 0) {
        for (long first = 0; first < groups * size / 2; first += 64) {
            float reciprocal = reciprocals[first * 2 / size];
            for (long i = first; i < first + 64; i++)
                packed[i] = multiply_pair(pairs[i], reciprocal) ^ offset;
        }
        return;
    }
    repeat_for_pairs(reciprocals, of_pairs, groups, size);
    for (long i = 0; i < groups * size / 2; i++)
        packed[i] = multiply_pair(pairs[i], of_pairs[i]) ^ offset;
}

/* Weights of 16 bits seldom come here: for them it is compiled quickly, and slow. */
#if WEIGHTS != F32
__attribute__((cold))
#endif
SEPARATE void divide_and_pack(
    const void *restrict weights, const float *restrict divisors, uint8_t offset,
    uint8_t *restrict packed, long groups, long size
) {
    float of_pairs[BLOCK / 2];
    repeat_for_pairs(divisors, of_pairs, groups, size);
    for (long i = 0; i < groups * size / 2; i++) {
        int32_t even = clamp(divide(weight_at(weights, 2 * i), of_pairs[i]));
        int32_t odd = clamp(divide(weight_at(weights, 2 * i + 1), of_pairs[i]));
        packed[i] = ((even & 15) | odd << 4) ^ offset;
    }
}

static void quantize_block(quantize_call *call, long first, long groups) {
    float scales[BLOCK / 8];
    float divisors[BLOCK / 8];
    float reciprocals[BLOCK / 8];
    long size = EIGHTS(call->group_size);
    int bits_dropped = call->bits_dropped;
    const void *weights = skip_weights(call->weights, first * size);
    uint8_t *packed = call->words + first * size / 2;

    find_largest(weights, scales, groups, size);
    int to_divide = 0;
    for (long i = 0; i < groups; i++) {
        float scale = round_scale(scales[i] / 7, bits_dropped);
        scales[i] = scale;
        divisors[i] = scale ? scale : 1;
        reciprocals[i] = 1 / divisors[i];
        to_divide += !may_multiply(scale, bits_dropped);
    }
    store_scales(call, scales, first, groups);

    if (to_divide)
        divide_and_pack(weights, divisors, call->offset, packed, groups, size);
    else
        multiply_and_pack(weights, reciprocals, call->offset, packed, groups, size);
}

#else

/* As `search_scales`, but for one group of known largest weight, and before absmax is compared. */
SEPARATE float find_scale(
    const float *restrict weights, float largest, const int16_t *restrict shares, long size
) {
    static const int16_t steps[] = {SEARCH_MULTIPLIERS};
    enum { STEPS = sizeof steps / sizeof *steps };
    int16_t parts[MAX_GROUP];
    int16_t weighed[MAX_GROUP];
    int products[STEPS];
    int squares[STEPS];

    float magnitude = MAX(largest, -largest);
    float factor = magnitude > 1e-30f ? 1 / largest * -16384 : 0;
    for (long i = 0; i < size; i++) {
        parts[i] = (word){.value = weights[i] * factor + 12582912.0f}.bits;
        weighed[i] = (parts[i] * shares[i] + 8192) >> 14;
    }

    for (long step = 0; step < STEPS; step++) {
        int product = 0;
        int square = 0;
        for (long i = 0; i < size; i++) {
            int16_t code = parts[i] * steps[step] >> 16;
            code = (int16_t)(code + 256) >> 9;
            code = MAX(MIN(code, 7), -8);
            product += weighed[i] * code;
            square += (int16_t)(code * code) * shares[i];
        }
        products[step] = product;
        squares[step] = square;
    }

    float best_gain = 0;
    float best_scale = 0;
    for (long step = 0; step < STEPS; step++) {
        float scale = (float)products[step] / (float)squares[step];
        float gain = (float)products[step] * scale;
        best_scale = gain > best_gain ? scale : best_scale;
        best_gain = MAX(gain, best_gain);
    }
    return best_scale * -largest;
}

/* The weighed squared error of a group with this scale. Fills in the codes. */
SEPARATE float squared_error(
    const float *restrict weights, float scale, int multiplies, const float *restrict importance,
    int16_t *restrict codes, long size
) {
    float terms[MAX_GROUP];
    float divisor = scale ? scale : 1;
    float reciprocal = 1 / divisor;
    if (multiplies)
        for (long i = 0; i < size; i++)
            codes[i] = clamp(multiply(weights[i], reciprocal));
    else
        for (long i = 0; i < size; i++)
            codes[i] = clamp(divide(weights[i], divisor));
    for (long i = 0; i < size; i++) {
        float error = codes[i] * divisor - weights[i];
        terms[i] = error * error * importance[i];
    }
    return SUM(floats lanes, size, terms[k]);
}

/* Choose the scale of least squared error for a group, and fill in its codes. The group and its
   importance are padded with zeros. */
SEPARATE float choose_scale(
    quantize_call *call, long group, const float *restrict weights, int of_16_bits,
    int16_t *restrict codes
) {
    long size = PADDED(call->group_size);
    long column = group % call->groups_in_row * size;
    const float *importance = call->importance + column;
    int bits_dropped = call->bits_dropped;

    /* By bits, as in `find_largest`; negative floats are negative integers. */
    int32_t most = 0;
    int32_t highest = 0;
    for (long i = 0; i < size; i++) {
        int32_t bits = ((const int32_t *)weights)[i];
        int32_t magnitude = bits & 0x7FFFFFFF;
        most = MAX(most, magnitude);
        highest = MAX(highest, bits);
    }
    float magnitude = (word){most}.value;
    float largest = highest == most ? magnitude : -magnitude;

    float absmax = round_scale(magnitude / 7, bits_dropped);
    float found = find_scale(weights, largest, call->shares + column, size);
    found = round_scale(found, bits_dropped);

    int16_t codes_found[MAX_GROUP];
    int multiplies = of_16_bits & may_multiply(absmax, bits_dropped);
    float error = squared_error(weights, absmax, multiplies, importance, codes, size);
    multiplies = of_16_bits & may_multiply(found, bits_dropped);
    float error_found = squared_error(weights, found, multiplies, importance, codes_found, size);

    if (!found || !(error_found < error))
        return absmax;
    for (long i = 0; i < size; i++)
        codes[i] = codes_found[i];
    return found;
}

SEPARATE void pack(
    const int16_t *restrict codes, uint8_t offset, uint8_t *restrict packed, long pairs
) {
    for (long i = 0; i < pairs; i++)
        packed[i] = ((codes[2 * i] & 15) | codes[2 * i + 1] << 4) ^ offset;
}

static void quantize_block(quantize_call *call, long first, long groups) {
    long size = EIGHTS(call->group_size);
    float scales[BLOCK / 8];
    float wide[MAX_GROUP];
    int16_t codes[BLOCK + 32];
    for (long i = size; i < PADDED(size); i++)
        wide[i] = 0;
    for (long i = 0; i < groups; i++) {
        const void *weights = skip_weights(call->weights, (first + i) * size);
        for (long column = 0; column < size; column++)
            wide[column] = weight_at(weights, column);
        scales[i] = choose_scale(call, first + i, wide, 1, codes + i * size);
    }
    store_scales(call, scales, first, groups);
    pack(codes, call->offset, call->words + first * size / 2, groups * size / 2);
}

#endif

#if VARIANT == FEEDBACK

/* Quantize rows of float32 weights with error feedback, up to eight at once. */
SEPARATE void quantize_rows(quantize_call *call, long first, long rows) {
    long size = EIGHTS(call->group_size);
    long columns = call->groups_in_row * size;
    long rank = EIGHTS(call->rank);
    float lines[8][MAX_GROUP];
    int16_t codes[8][MAX_GROUP];
    floats block[MAX_GROUP];
    floats carried[MAX_RANK] = {0};
    floats scales = {0};
    floats divisors = {0};
    floats most = {0};
    for (long row = 0; row < 8; row++)
        for (long i = size; i < PADDED(size); i++)
            lines[row][i] = 0;

    for (long column = 0; column < columns; column += size) {
        const float *weights = (const float *)call->weights + first * columns + column;
        const float *factor = call->factor + column * rank;
        const float *spread = call->spread + column * rank;

        /* The scales, for the weights as the errors of the groups before change them. */
        for (long i = 0; i < size; i++) {
            for (long row = 0; row < 8; row++)
                block[i][row] = row < rows ? weights[row * columns + i] : 0;
            floats change = SUM(floats lanes[8], rank, spread[i * rank + k] * carried[k]);
            floats changed = block[i] + change;
            for (long row = 0; row < 8; row++)
                lines[row][i] = changed[row];
        }
        for (long row = 0; row < rows; row++) {
            long group = (first + row) * call->groups_in_row + column / size;
            float scale = choose_scale(call, group, lines[row], 0, codes[row]);
            store_scales(call, &scale, group, 1);
            scales[row] = scale;
            divisors[row] = scale ? scale : 1;
            most[row] = MAX_CHANGE * MAX(divisors[row], -divisors[row]);
        }

        /* The codes, column by column. A change that is NaN stays one. */
        for (long i = 0; i < size; i++) {
            floats change = SUM(floats lanes[8], rank, spread[i * rank + k] * carried[k]);
            for (long row = 0; row < 8; row++)
                change[row] = MAX(-most[row], MIN(most[row], change[row]));
            floats rounded = (block[i] + change) / divisors + ROUND;
            floats decoded;
            for (long row = 0; row < 8; row++)
                decoded[row] = clamp((word){.value = rounded[row]});
            for (long row = 0; row < 8; row++)
                codes[row][i] = decoded[row];
            floats error = block[i] - decoded * scales;
            for (long k = 0; k < rank; k++)
                carried[k] += error * factor[i * rank + k];
        }
        for (long row = 0; row < rows; row++) {
            uint8_t *packed = call->words + ((first + row) * columns + column) / 2;
            pack(codes[row], call->offset, packed, size / 2);
        }
    }
}

/* As `find_spread`. */
void spread_of(
    const float *factor, const float *rest, float *restrict spread, long columns, long rank
) {
    doubles inverse[MAX_RANK][MAX_RANK / 8];
    doubles turned[MAX_RANK / 8];
    for (long k = 0; k < rank; k++)
        for (long i = 0; i < rank; i++)
            inverse[k][i / 8][i % 8] = k == i;
    for (long column = columns - 1; column >= 0; column--) {
        const float *direction = factor + column * rank;
        for (long i = 0; i < rank / 8; i++)
            turned[i] = SUM(doubles lanes[8], rank, inverse[k][i] * direction[k]);
        double divisor = rest[column];
        divisor += SUM(doubles lanes, rank, turned[k / 8][k % 8] * direction[k]);
        for (long k = 0; k < rank; k++) {
            double number = turned[k / 8][k % 8];
            spread[column * rank + k] = number / divisor;
            for (long i = 0; i < rank / 8; i++)
                inverse[k][i] -= number * turned[i] * (1 / divisor);
        }
    }
}

#endif

void quantize(quantize_call *call) {
#if VARIANT == FEEDBACK
    if (call->rank) {
        long rows = call->groups / call->groups_in_row;
        for (long row = 0; row < rows; row += 8)
            quantize_rows(call, row, MIN(rows - row, 8));
        return;
    }
#endif
    long block = BLOCK / EIGHTS(call->group_size);
    for (long first = 0; first < call->groups; first += block)
        quantize_block(call, first, MIN(block, call->groups - first));
}
"""

# `measure`, written apart from what packs, so that one finds the other's faults.
MEASURE_SOURCE = r"""
#include <stdint.h>

/* WEIGHTS is one of these, and VARIANT one of those: errors of weights, or of their outputs too. */
#define BF16 1
#define F16 2
#define F32 3
#define ERRORS 1
#define OUTPUTS 2

#define MAX(one, other) ((one) > (other) ? (one) : (other))
#define MIN(one, other) ((one) < (other) ? (one) : (other))

/* Columns of a row that are decoded together; a multiple of every group size that is less. */
#define SPAN 1024

/* Numbers that the processor works on at once. */
#if defined __AVX512F__
#define LANES 16
#elif defined __AVX__
#define LANES 8
#else
#define LANES 4
#endif
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

typedef union {
    uint32_t bits;
    float value;
} word;

/* What `measure` is called with, and from `squared_errors` on what it finds, which it fills in.
   Python takes the fields from here. */
typedef struct {
    const void *weights;
    const uint8_t *words;
    const void *scales;
    const float *rest;
    const float *factor;
    long rows;
    long columns;
    long group_size;
    long rank;
    long code_bits;
    long has_offset;
    long scale_bits_dropped;
    long moved_from;
    float tolerance;
    float tiny;
    double squared_errors;
    double squared_weights;
    double output_errors;
    double output_weights;
    double furthest;
    long far;
    long first_wrong;
} measure_call;

/* A part of a row. */
typedef struct {
    float weights[SPAN];
    float codes[SPAN];
    float scales[SPAN];
    float errors[SPAN];
} span;

static inline float float16_of(uint32_t bits) {
    word wide = {(bits & 0x8000) << 16 | (bits & 0x7FFF) << 13};
    wide.value *= 0x1p112f;
    wide.bits |= (bits & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;
    return wide.value;
}

static void read_weights(
    const measure_call *call, long start, float *restrict weights, long count
) {
#if WEIGHTS == BF16
    const uint16_t *from = (const uint16_t *)call->weights + start;
    for (long i = 0; i < count; i++)
        weights[i] = (word){(uint32_t)from[i] << 16}.value;
#elif WEIGHTS == F16
    const uint16_t *from = (const uint16_t *)call->weights + start;
    for (long i = 0; i < count; i++)
        weights[i] = float16_of(from[i]);
#else
    const float *from = (const float *)call->weights + start;
    for (long i = 0; i < count; i++)
        weights[i] = from[i];
#endif
}

/* Codes are two's complements; an offset of half their range turns the topmost bit of each over. */
static void read_codes(
    const measure_call *call, long start, float *restrict codes, long count
) {
    const uint8_t *from = call->words + start * call->code_bits / 8;
    if (call->code_bits == 8) {
        uint8_t turned = call->has_offset ? 0x80 : 0;
        for (long i = 0; i < count; i++)
            codes[i] = (int8_t)(from[i] ^ turned);
        return;
    }
    uint8_t turned = call->has_offset ? 0 : 0x88;
    for (long i = 0; i < count / 2; i++) {
        int pair = from[i] ^ turned;
        codes[2 * i] = (pair & 15) - 8;
        codes[2 * i + 1] = (pair >> 4) - 8;
    }
}

static float scale_at(const measure_call *call, long group) {
    if (call->scale_bits_dropped == 0)
        return ((const float *)call->scales)[group];
    uint32_t bits = ((const uint16_t *)call->scales)[group];
    return call->scale_bits_dropped == 13 ? float16_of(bits) : (word){bits << 16}.value;
}

/* Whether no conversion can have made the code of a column, as in `measure`. */
static inline int is_wrong(const measure_call *call, const span *part, long i, long column) {
    float code = part->codes[i];
    float decoded = code * part->scales[i];
    float divisor = (part->scales[i] == 0) & (column >= call->moved_from) ? 1 : part->scales[i];
    float error = part->weights[i] - code * divisor;
    float magnitude = divisor < 0 ? -divisor : divisor;
    float beyond = divisor < 0 ? -error : error;
    float bound = magnitude * call->tolerance + call->tiny;
    float largest = call->code_bits == 8 ? 127 : 7;
    int open_above = (code == largest) & (divisor != 0);
    int open_below = (code == -largest - 1) & (divisor != 0);
    int above = !(beyond <= bound) & !open_above;
    int below = !(beyond >= -bound) & !open_below;
    int not_finite = !(decoded - decoded == 0);
    return above | below | not_finite;
}

/* Look closer at a span in which some weights are farther from their codes than a code inside the
   range allows: find the first that is wrong, and count those more than FAR_SCALES away. */
static void inspect(measure_call *call, long row, long column, const span *part, long count) {
    int wrong = 0;
    int far = 0;
    int32_t furthest = 0;
    for (long i = 0; i < count; i++) {
        wrong += is_wrong(call, part, i, column + i);
        word distance = {.value = part->errors[i] / part->scales[i]};
        distance.bits &= 0x7FFFFFFF;
        int is_far = (distance.value > FAR_SCALES) & (part->scales[i] != 0);
        int32_t bits = is_far ? distance.bits : 0;
        far += is_far;
        furthest = MAX(furthest, bits);
    }
    call->far += far;
    call->furthest = MAX(call->furthest, (word){furthest}.value);
    if (call->first_wrong >= 0)
        return;
    for (long i = 0; wrong && i < count; i++)
        if (is_wrong(call, part, i, column + i)) {
            call->first_wrong = row * call->columns + column + i;
            return;
        }
}

static inline lanes magnitude_of(lanes numbers) {
    return (lanes)((integers)numbers & 0x7FFFFFFF);
}

static inline double sum_of(lanes sums) {
    double sum = 0;
    for (long lane = 0; lane < LANES; lane++)
        sum += sums[lane];
    return sum;
}

/* Add up the squares of a span, weighed by the second moments. */
static double weigh_squares(const float *values, const float *rest, long count) {
    lanes sums = {0};
    for (long i = 0; i < count; i += LANES) {
        lanes numbers = *(const lanes *)(values + i);
        sums += numbers * numbers * *(const lanes *)(rest + i);
    }
    return sum_of(sums);
}

/* Add the products of a span of errors, and of its weights, with the factor's columns. */
static void multiply_factor(
    const span *part, const float *factor, long rank, long count, double *of_errors,
    double *of_weights
) {
    for (long first = 0; first < rank; first += LANES) {
        lanes sums[4] = {0};
        for (long i = 0; i < count; i += 2) {
            lanes even = *(const lanes *)(factor + i * rank + first);
            lanes odd = *(const lanes *)(factor + (i + 1) * rank + first);
            sums[0] += part->errors[i] * even;
            sums[1] += part->errors[i + 1] * odd;
            sums[2] += part->weights[i] * even;
            sums[3] += part->weights[i + 1] * odd;
        }
        for (long lane = 0; lane < LANES; lane++) {
            of_errors[first + lane] += (double)sums[0][lane] + sums[1][lane];
            of_weights[first + lane] += (double)sums[2][lane] + sums[3][lane];
        }
    }
}

/* Decode a part of a row, and fill it up with zeros to a multiple of LANES. */
static void read_span(
    const measure_call *call, long row, long column, long count, span *part
) {
    long size = call->group_size;
    long groups = (call->columns + size - 1) / size;
    read_weights(call, row * call->columns + column, part->weights, count);
    read_codes(call, row * groups * size + column, part->codes, (count + 1) / 2 * 2);
    for (long i = 0; i < count;) {
        long group = (column + i) / size;
        float scale = scale_at(call, row * groups + group);
        long end = MIN(count, (group + 1) * size - column);
        for (; i < end; i++)
            part->scales[i] = scale;
    }
    for (long i = count; i % LANES; i++) {
        part->weights[i] = 0;
        part->codes[i] = 0;
        part->scales[i] = 0;
    }
}

/* Fill in the errors of a span and add up their squares. Returns whether all weights are as near
   to what is decoded as a code inside the range allows. */
static int find_errors(measure_call *call, span *part, long count) {
    lanes squared_errors = {0};
    lanes squared_weights = {0};
    integers near = {0};
    near = ~near;
    for (long i = 0; i < count; i += LANES) {
        lanes weight = *(const lanes *)(part->weights + i);
        lanes scale = *(const lanes *)(part->scales + i);
        lanes error = weight - *(const lanes *)(part->codes + i) * scale;
        near &= magnitude_of(error) <= magnitude_of(scale) * call->tolerance + call->tiny;
        squared_errors += error * error;
        squared_weights += weight * weight;
        *(lanes *)(part->errors + i) = error;
    }
    call->squared_errors += sum_of(squared_errors);
    call->squared_weights += sum_of(squared_weights);
    int all_near = -1;
    for (long lane = 0; lane < LANES; lane++)
        all_near &= near[lane];
    return all_near;
}

static void measure_row(measure_call *call, long row) {
    span part;
    double of_errors[MAX_RANK] = {0};
    double of_weights[MAX_RANK] = {0};

    /* A span is of whole groups, but for groups that are larger and for the end of the row. */
    long size = call->group_size;
    long width = size < SPAN ? SPAN / size * size : SPAN;
    for (long column = 0; column < call->columns; column += width) {
        long count = MIN(width, call->columns - column);
        read_span(call, row, column, count, &part);
        if (!find_errors(call, &part, count))
            inspect(call, row, column, &part, count);
#if VARIANT == OUTPUTS
        /* Some weights of a run may have no statistics. */
        if (!call->rest)
            continue;
        const float *rest = call->rest + column;
        const float *factor = call->factor + column * call->rank;
        call->output_errors += weigh_squares(part.errors, rest, count);
        call->output_weights += weigh_squares(part.weights, rest, count);
        multiply_factor(&part, factor, call->rank, count, of_errors, of_weights);
#endif
    }
    for (long k = 0; k < call->rank; k++) {
        call->output_errors += of_errors[k] * of_errors[k];
        call->output_weights += of_weights[k] * of_weights[k];
    }
}

void measure(measure_call *call) {
    for (long row = 0; row < call->rows; row++)
        measure_row(call, row);
}
"""


class NoKernel(Exception):
    """Say why there is none."""


@dataclass(frozen=True)
class KernelKind:
    """What a kernel does, and with what weights."""

    task: str  # the C function: "quantize" or "measure"
    dtype: str  # of the weights: BF16, F16 or F32
    variant: str  # of the task, as in its source

    @property
    def source(self) -> str:
        return QUANTIZE_SOURCE if self.task == "quantize" else MEASURE_SOURCE

    @property
    def flags(self) -> list[str]:
        """Return the compiler's options.

        Nothing is linked, so that no C library's files are needed. Torch fuses no multiplication
        with an addition. Without traps, clamping needs no branches. Bits of floats are read as
        integers, which strict aliasing forbids. Error feedback gains by -O2, which takes the
        compiler a third longer."""
        constants = {
            "WEIGHTS": self.dtype,
            "VARIANT": self.variant,
            "MAX_GROUP": MAX_GROUP,
            "MAX_RANK": MAX_RANK,
            "MAX_CHANGE": MAX_CHANGE,
            "FAR_SCALES": FAR_SCALES,
            "SEARCH_MULTIPLIERS": ",".join(map(str, SEARCH_MULTIPLIERS)),
        }
        return [
            "-O2" if self.variant == "FEEDBACK" else "-O1",
            "-ftree-vectorize",
            "-shared",
            "-fPIC",
            "-ffreestanding",
            "-nostdlib",
            "-ffp-contract=off",
            "-fno-trapping-math",
            "-fno-strict-aliasing",
            *instruction_set(),
            *(f"-D{name}={value}" for name, value in constants.items()),
        ]


@functools.cache
def instruction_set() -> list[str]:
    """Return the compiler's options for the vectors of this processor. Results do not depend on
    it."""
    try:
        features = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    options = []
    for names in (["avx2", "fma"], ["avx512f", "avx512bw", "avx512dq", "avx512vl"]):
        if not features.issuperset(names):
            break
        options += [f"-m{name}" for name in names]
    return options


class Compilation:
    """A compiler at work on a kernel, in a folder of its own."""

    running: ClassVar[dict[KernelKind, Compilation]] = {}

    def __init__(self, kind: KernelKind):
        self._kind = kind
        # A command with options, or a path, which may have spaces.
        given = os.environ.get("CC", "")
        self._compiler = [given] if shutil.which(given) else given.split() or ["cc"]
        if not shutil.which(self._compiler[0]):
            raise NoKernel(f"there is no C compiler {self._compiler[0]!r}")
        # Signals wait until the process is known. It inherits this, so that SIGKILL alone ends it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._start()
            self.running[kind] = self
        except OSError as error:
            raise NoKernel(str(error)) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="quantize_int4.", ignore_cleanup_errors=True
        )
        folder = Path(self._folder.name)
        source = folder / "kernel.c"
        source.write_text(self._kind.source)
        self._library = folder / "kernel.so"
        self._messages = folder / "messages"
        command = [*self._compiler, *self._kind.flags, "-o", self._library, source]
        with open(self._messages, "wb") as messages:
            # A session of its own, so that Ctrl-C does not reach it, and all of it can be ended.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                env=os.environ | {"TMPDIR": self._folder.name},
                start_new_session=True,
            )

    def load(self) -> ctypes.CDLL:
        """Wait for the compiler and load what it made. Once loaded, its file is not needed."""
        try:
            self._wait()
            library = ctypes.CDLL(str(self._library))
            getattr(library, self._kind.task)
        except (OSError, AttributeError) as error:
            # A folder from which nothing may be executed; a library without the functions.
            raise NoKernel(str(error)) from None
        finally:
            self.end()
        return library

    def _wait(self) -> None:
        name = repr(self._compiler[0])
        deadline = time.monotonic() + COMPILER_TIMEOUT_S
        while self._process.poll() is None:
            check_signals()
            if time.monotonic() >= deadline:
                raise NoKernel(f"{name} took more than {COMPILER_TIMEOUT_S} s")
            time.sleep(0.005)
        if code := self._process.returncode:
            message = " ".join(self._messages.read_text(errors="replace").split())
            raise NoKernel(f"{name} failed: {message[:200] or f'exit code {code}'}")

    def end(self) -> None:
        """Stop the compiler if it still works, and delete its files."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._folder.cleanup()
        del self.running[self._kind]


def end_compilations() -> None:
    """Stop all compilers whose kernels were not loaded, and leave none of their files."""
    for compilation in list(Compilation.running.values()):
        compilation.end()


def scale_rule(args: argparse.Namespace) -> str:
    """Return how scales are chosen: for engines by mean square error, unless --scale says it."""
    return args.scale or ("absmax" if args.format in (None, "int4") else "mse")


def quantize_variant(scale: str, has_statistics: bool) -> str:
    """Return the variant of the kernel that quantizes."""
    if scale == "absmax":
        return "ABSMAX"
    return "FEEDBACK" if has_statistics else "SEARCH"


def measure_variant(has_statistics: bool) -> str:
    """Return the variant of the kernel that measures errors."""
    return "OUTPUTS" if has_statistics else "ERRORS"


def likely_kernels(args: argparse.Namespace) -> list[KernelKind]:
    """Guess from the options alone which kernels a run will need. It may need none, or others."""
    scale = scale_rule(args)
    has_statistics = bool(args.importance)
    refused = not args.input_dir.is_dir() or (has_statistics and scale != "mse")
    if args.dry_run or args.restore or refused:
        return []
    kinds = [KernelKind("quantize", "BF16", quantize_variant(scale, has_statistics))]
    if args.verify:
        kinds.append(KernelKind("measure", "BF16", measure_variant(has_statistics)))
    return kinds


def stop_while_loading(signum: int, _frame: object) -> None:
    """End as by a signal that nothing handles, but leave no compiler at work and no file of it."""
    end_compilations()
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


ARGUMENTS = parse_args(sys.argv[1:]) if __name__ == "__main__" else None
if ARGUMENTS:
    # A signal during the imports shows no traceback.
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, stop_while_loading)
    if missing := [
        name for name in ("torch", "safetensors", "psutil") if not importlib.util.find_spec(name)
    ]:
        cpu = (
            "; of torch the build for CPUs is enough, see pytorch.org/get-started"
            if "torch" in missing
            else ""
        )
        what = f"{', '.join(missing)}: pip install {' '.join(missing)}"
        sys.exit(f"{ERROR}missing: {what}{cpu}")
    with contextlib.suppress(OSError):
        print("loading torch ..." if is_terminal(sys.stdout) else "", end="", flush=True)
    atexit.register(end_compilations)
    for likely in likely_kernels(ARGUMENTS):
        with contextlib.suppress(NoKernel):
            Compilation(likely)
warnings.filterwarnings(
    "ignore", message="Failed to initialize NumPy|Validating sparse"
)  # torch's; neither is needed
import psutil  # noqa: E402
import torch  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402

# ---- Facts and constants -------------------------------------------------------------------------
# What several sections share. What only one needs stands there.

# Sizes are decimal throughout, as in disk sizes and the hub's shard sizes.
GB = 10**9
# Raise it whenever the bytes of the output change: leftovers of an older version are then foreign.
FORMAT_VERSION = 9
# The first version of this program that has the above. Folders state it, and not `__version__`:
# another version with the same format writes the same bytes, and may continue a run.
FORMAT_SINCE = "1.1.0"

# 4-bit codes in an int32.
CODES_PER_WORD = 8

# What a worker quantizes at a time. Each of a tile's calls to the kernel, to torch or the system
# hands the interpreter lock to another worker, and so tiles must not be small. Its buffers, 3 to 28
# bytes a weight, should still fit the last-level cache. (python tests/tools/benchmark.py --only
# tile18 tile19 tile20)
TILE_WEIGHTS = 1 << 20
# What --verify decodes at a time without a kernel.
VERIFY_WEIGHTS = 1 << 18
# Bytes that are copied at a time of a tensor that is kept, or of another file.
COPY_BYTES = 1 << 23
# Weights whose statistics are kept as they were prepared, for all jobs of one: the last ones.
KEPT_ROUNDINGS = 2

# Threads that read ahead of the workers. One alone does not keep an SSD busy.
DISK_READERS = 4
# Reads around the page cache are aligned to so many bytes, and so a buffer must have a margin
# beyond what is read into it.
DIRECT_BLOCK = 4096
READ_MARGIN = 2 * DIRECT_BLOCK
# Bytes of input after which what came of it is synced and both leave the page cache.
SYNC_BYTES = 1 << 27

# Ends of messages, and one in whole.
READ_ONLY = (
    "is on a read-only mount: choose another folder, or mount it writable"
    " (docker run -v without :ro)"
)
TWO_COPIES = "tensors {} are two copies of the same weights: leave one of them in the checkpoint"

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
# Names the parts of a model of sentence-transformers, each the folder of one.
MODULES_NAME = "modules.json"
# With it peft and transformers load a folder as an adapter.
ADAPTER_CONFIG_NAME = "adapter_config.json"
QUANTIZE_CONFIG_NAME = "quantize_config.json"
# Files beside config.json that describe how a model is quantized.
QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", QUANTIZE_CONFIG_NAME)
# A file that is being written, and the start of its run's fingerprint.
UNFINISHED_PATTERN = re.compile(r".+\.([0-9a-f]{12})\.unfinished")

# Keys of a shard's __metadata__. The fingerprint of sources and options:
METADATA_KEY = "quantize_int4"
# Of a file of statistics, the version of its layout:
STATISTICS_KEY = "quantize_int4_statistics"
# The sources' sizes and times, and the options, as JSON:
FACTS_KEY = "quantize_int4_facts"
# Name and SHA-256 of all files but shards and index, as JSON:
FILES_KEY = "quantize_int4_files"
# In `Options.rule`.
WEIGHED = "weighed by importance"
FEEDBACK = "with error feedback"

# The safetensors format: bits an element, by the dtype's name.
# (https://github.com/huggingface/safetensors, tensor.rs)
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
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

# Wrappers, the layers' container, and a layer's number.
LAYER_PATTERN = re.compile(r"(.*?)\.?(\w+)\.(\d+)\.")
# An expert's weight: its container and number.
EXPERT_PATTERN = re.compile(r"((?:.*\.)?experts)\.(\d+)\.\w+\.weight$")
# A stack of routed experts, or of Granite's.
STACK_PATTERN = re.compile(
    r"(?P<place>(?:.*\.)?)"
    r"(?:experts\.(?P<projection>gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight)?"
    r"|(?P<linear>input_linear|output_linear)\.weight)$"
)
# Parts of a multimodal model that are not its language model, and what joins them to it.
TOWER_WORDS = re.compile(
    r"vis(ion|ual)|image|audio|speech|tower|proj|merger|connector|adapter|sampler|pool|dense|linear"
    r"|(^|\.)(mlp|fc)"
)
TOWER_NAMES = r"vis(ion|ual)|vit|image|audio|speech|sound|tower|encoder"
# What config.json calls the config of a language model inside another model.
LANGUAGE_KEY = re.compile(r"(text|llm|language|thinker|decoder|generator)\w*config$|text$")
# Files of a trainer's.
TRAINER_PATTERN = re.compile(
    r"^(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state"
    r"|events\.out\.tfevents|zero_to_fp32)|^latest$|\.distcp$|^sampler(_\d+)?\.bin$"
    r"|^(dl_state_dict|dataloader|custom_checkpoint)[\w.]*\.(bin|pt|pkl)$|optim_states\.pt$"
)


# ---- Errors: one line each, with what to do ------------------------------------------------------

# What `stop_on_signals` has caught.
SIGNALS_RECEIVED: list[int] = []
# Set by `deferring_signals`.
signals_are_deferred = False


class QuantizeError(Exception):
    """What the user can mend. `main` prints it as one line and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message + (SEE_HELP if exit_code == 2 else ""))
        self.exit_code = exit_code


class Stopped(BaseException):
    """A signal. What catches errors on the way to `main` lets it pass."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let a signal stop the run, and a second one end the process on the spot.

    The first raises `Stopped` wherever the main thread is, or at the next `check_signals` while
    signals are deferred."""

    def handler(signum: int, _frame: object) -> None:
        if SIGNALS_RECEIVED:
            end_compilations()
            os._exit(128 + signum)
        SIGNALS_RECEIVED.append(signum)
        if not signals_are_deferred:
            check_signals()

    # nohup ignores SIGHUP. A shell ignores SIGINT for what it starts in the background.
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
    """Let a signal wait for the next `check_signals`, or for the end of this block.

    This is for what must not be left half-way, such as the start of a thread or a temporary file.
    It must be short or call `check_signals` itself."""
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
    """Raise `Stopped` if a signal has come.

    Any thread may call this. All that takes longer than a blink calls it from time to time."""
    if SIGNALS_RECEIVED:
        raise Stopped(SIGNALS_RECEIVED[0])


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to errors of the system, which calls on descriptors leave out."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def describe_os_error(error: OSError) -> str:
    """Describe what the system refused, for which file, and what helps."""
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
    """Describe what keeps this process from reading a file or folder, and the `chmod` that helps.

    Returns an empty text if the process may read it, or if it is not there."""
    # A link, as in the hub's cache, may lead to a folder that is closed.
    real = Path(os.path.realpath(path))
    for folder in (*reversed(path.absolute().parents), *reversed(real.parents)):
        if not os.path.exists(folder):
            return ""
        if not os.access(folder, os.X_OK):
            remedy = f"chmod a+x {shlex.quote(str(folder))}"
            return describe_denial(f"folder {folder}", folder, remedy)

    needed = os.R_OK
    if path.is_dir():
        needed |= os.X_OK
    if not real.exists() or os.access(path, needed):
        return ""
    if path.is_dir():
        return describe_denial("it", path, f"chmod a+rx {shlex.quote(str(path))}")
    return describe_denial("it", path, f"chmod a+r {unreadable_files(path)}")


def unreadable_files(path: Path) -> str:
    """Return a file in a shell's words, or a pattern if others of its suffix are unreadable too."""
    alike = [other for other in path.parent.glob(f"*{path.suffix}") if other.is_file()]
    unreadable = [other for other in alike if not os.access(other, os.R_OK)]
    if path.suffix and len(unreadable) > 1:
        return f"{shlex.quote(str(path.parent))}/*{path.suffix}"
    return shlex.quote(str(path))


def describe_denial(what: str, path: Path, remedy: str) -> str:
    """Describe whose a file or folder is, who this process is, and what helps."""
    status = path.stat()
    mode = f"{status.st_mode & 0o7777:04o}"
    owner = f"{what} belongs to {user_name(status.st_uid)}, mode {mode}"
    reader = f"this process is {user_name(os.geteuid())}"
    return f"Permission denied: {owner}, and {reader}: as its owner or root, {remedy}"


def user_name(uid: int) -> str:
    """Return a user's name and number. In a container a user need not have a name."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"


def is_lack_of_memory(error: Exception) -> bool:
    """Return whether Python, torch or the system raised this for want of memory."""
    words = "can't allocate memory|can't start new thread|Cannot allocate memory|bad_alloc"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


@contextlib.contextmanager
def converting_memory_errors() -> Iterator[None]:
    """Turn all that is raised for want of memory into one error."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        if not is_lack_of_memory(error):
            raise
        problem = "no memory for another thread" if "thread" in str(error) else "out of memory"
        advice = "stop other programs, raise the limits of the container or of ulimit"
        raise QuantizeError(f"{problem}: {advice}, or use fewer --threads", 3) from error


def quote_names(names: Iterable[str]) -> str:
    """Quote the first three names and count the others: 'a', 'b', 'c' and 4 more."""
    quoted = [repr(name) for name in names]
    text = ", ".join(quoted[:3])
    if len(quoted) > 3:
        text += f" and {len(quoted) - 3:,} more"
    return text


# ---- Words: lines, names and numbers as the user reads them --------------------------------------


def say(text: str = "", before: str = "", end: str = "\n") -> None:
    """Print `before` as it is, then `text` with its control characters escaped."""
    try:
        print(before + printable(text), end=end, flush=True)
    except OSError:
        # A reader that has gone or a full log must not end a long run. The stream stays open as
        # long as the process.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def clear_line() -> None:
    """Erase the line that is being updated, so that what follows starts on a fresh one."""
    if is_terminal(sys.stdout):
        say(before=CLEAR_LINE, end="")


def shorten(text: str, width: int) -> str:
    """Cut the middle out of a text that is too long: the end of a name says most."""
    width = max(width, 5)
    if len(text) <= width:
        return text

    kept = width - len("...")
    head = kept // 3
    tail = kept - head
    return f"{text[:head]}...{text[-tail:]}"


def say_paragraph(label: str, text: str, is_command: bool = False) -> None:
    """Print a label and a text in lines as wide as the terminal, or nothing if the text is empty.

    Words that are too long lose their middle, but not those of a command."""
    words = printable(text).split()
    if not words:
        return

    indent = " " * 11
    width = terminal_width() - 1
    if not is_command:
        words = [shorten(word, width - len(indent)) for word in words]
    lines = textwrap.wrap(
        " ".join([label.ljust(len(indent) - 1), *words]),
        width,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    for line in lines:
        say(line)


def format_bytes(nbytes: float) -> str:
    """Return a size in decimal units with three significant digits: 63.2 GB, 17.1 MB, 812 bytes."""
    # 0.9995 kB and more are rounded to 1.00 kB.
    power = min(int(math.log(max(nbytes, 1) / 0.9995, 1000)), 4)
    if power == 0:
        return count_of(round(nbytes), "byte")
    return f"{three_digits(nbytes / 1000**power)} {' kMGT'[power]}B"


def three_digits(number: float) -> str:
    """Return a number with three significant digits: 1.52, 63.2, 812, 0.0967."""
    if number >= 999.5:
        return f"{number:,.0f}"
    return f"{number:#.3g}".rstrip(".")


def format_seconds(seconds: float) -> str:
    """Return a duration: 7.32 s, 3:05, 1:02:03."""
    if seconds < 59.95:
        return f"{three_digits(seconds)} s"

    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural if need be: 1 file, 2 files."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}s"


# ---- Page cache: left as it was found. Where CPU and GPU share memory, it counts as used ---------

# The number of this system call, on all processors.
CACHESTAT = 451
# The flag of preadv2(2). Python itself knows it only where it was built with new headers.
RWF_NOWAIT = 8
# Bytes of a file that mincore is asked about at a time.
MINCORE_BYTES = 1 << 30
# Bytes of a file for each of which one page is asked for, where mincore does not tell.
ASK_BYTES = 1 << 18

# Calls by this keep the interpreter lock, so that they can be timed.
LIBC = ctypes.PyDLL(None, use_errno=True)

# Parts of a file: the first byte of each and the one after its last, in order.
Ranges = list[tuple[int, int]]


def count_cached_pages(fd: int) -> int | None:
    """Count a file's pages in the page cache, far faster than mincore; None where the system
    cannot. (cachestat(2), Linux 6.5)"""
    # Offset and length, of which 0 is all.
    part = (ctypes.c_uint64 * 2)()
    # The first is the number of pages.
    counts = (ctypes.c_uint64 * 5)()
    number = ctypes.c_long(CACHESTAT)
    failed = LIBC.syscall(number, ctypes.c_int(fd), part, counts, ctypes.c_uint(0))
    return None if failed else counts[0]


def cached_ranges(fd: int) -> Ranges:
    """List the parts of a file in the page cache. Raises OSError if the system does not tell."""
    size = os.fstat(fd).st_size
    count = count_cached_pages(fd)
    if count == 0:
        return []
    if count == -(-size // mmap.PAGESIZE):
        return [(0, size)]

    ranges = []
    for start in range(0, size, MINCORE_BYTES):
        resident = resident_pages(fd, start, min(MINCORE_BYTES, size - start))
        for run in re.finditer(rb"\x01+", resident):
            first = start + run.start() * mmap.PAGESIZE
            end = start + run.end() * mmap.PAGESIZE
            ranges.append((first, min(end, size)))
    return ranges


def resident_pages(fd: int, start: int, nbytes: int) -> bytes:
    """Return a byte for each page of a file's part: 1 if it is in the page cache. (mincore(2))"""
    # All are 1, and stay so if mincore fails.
    resident = ctypes.create_string_buffer(b"\1" * -(-nbytes // mmap.PAGESIZE))

    # No page of the map is touched. Its address has no name, since the map cannot be closed while
    # anything refers to it.
    with mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE, offset=start) as pages:
        ctypes.CDLL(None).mincore(
            ctypes.byref(ctypes.c_char.from_buffer(pages)), ctypes.c_size_t(nbytes), resident
        )

    # Only the lowest bit has a meaning.
    return resident.raw.translate(bytes([0, 1] * 128))


def mincore_tells(fd: int) -> bool:
    """Check whether mincore knows what of a file is in the page cache.

    Since Linux 5.2 it says that all is, of a file that one neither owns nor may write."""
    if os.fstat(fd).st_uid == os.geteuid():
        return True
    return os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True)


def within(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return the ranges that overlap a part of a file."""
    first = bisect.bisect_right(ranges, start, key=lambda each: each[1])
    last = bisect.bisect_left(ranges, end, key=lambda each: each[0])
    return ranges[first:last]


def drop_pages(fd: int, others: Ranges, start: int = 0, end: int = 1 << 62) -> None:
    """Let the page cache forget part of a file but for what others have there.

    Written pages must be synced before."""
    for other_start, other_end in within(others, start, end):
        if start < other_start:
            os.posix_fadvise(fd, start, other_start - start, os.POSIX_FADV_DONTNEED)
        start = max(start, other_end)
    if start < end:
        os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)


def asked_ranges(fd: int) -> Ranges:
    """Find which parts of a file are in the page cache by reads that do not wait.

    One page stands for ASK_BYTES. Raises OSError where there are no such reads."""
    size = os.fstat(fd).st_size
    ranges: Ranges = []

    # A read of a page that is not there makes the kernel fetch it. With this and for one byte, it
    # fetches that page alone.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for position in range(0, size, ASK_BYTES):
        check_signals()
        if is_resident(fd, position):
            ranges.append((position, min(position + ASK_BYTES, size)))
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)

    # Drop what was fetched. What is still on its way will go with what is read.
    drop_pages(fd, ranges)
    return ranges


def is_resident(fd: int, position: int) -> bool:
    """Check by reads that do not wait whether the page at `position` is in the page cache.

    Raises OSError where there are no such reads. (preadv2(2), RWF_NOWAIT)"""
    byte = ctypes.create_string_buffer(1)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(byte), 1)
    times = []
    for _ in range(2):
        started = time.perf_counter_ns()
        count = LIBC.preadv2(fd, vector, 1, ctypes.c_int64(position), RWF_NOWAIT)
        times.append(time.perf_counter_ns() - started)
        if count < 0 and ctypes.get_errno() != errno.EAGAIN:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if count < 1:
            return False

    # A disk may fetch the page before the first read returns, which then takes far longer than the
    # second.
    return times[0] < 8 * times[1]


class PageCache:
    """What others have of a file in the page cache, and so a run leaves there."""

    def __init__(self, fd: int):
        """Ask what is there, before this run reads any of it.

        This takes up to 20 ms a gigabyte, and ten times as long if mincore does not tell. If
        nothing tells, all that is there stays."""
        try:
            self._others = cached_ranges(fd) if mincore_tells(fd) else asked_ranges(fd)
            self._is_known = True
        except OSError:
            self._others = [(0, os.fstat(fd).st_size)]
            self._is_known = False

    def holds(self, start: int, end: int) -> bool:
        """Check whether any of a part is known to have been there."""
        return bool(within(self._others, start, end)) and self._is_known

    def drop(self, fd: int, start: int = 0, end: int = 1 << 62) -> None:
        """Let the page cache forget a part but for what others have there."""
        drop_pages(fd, self._others, start, end)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is read once, and leave the page cache as it was."""
    with open(path, "rb") as file:
        pages = PageCache(file.fileno())
        yield file
        pages.drop(file.fileno())


# ---- Checkpoint: what is in the input folder, and its bytes --------------------------------------

# To read around the page cache.
O_DIRECT = os.O_DIRECT
# What a file begins with whose content is still elsewhere, by what keeps it there.
POINTERS = {
    "Git LFS": b"version https://git-lfs.github.com/spec/",
    "Xet": b"# xet version ",
}
# Objects and lists inside one another. No model's config has ten.
MAX_JSON_DEPTH = 100
# Keys of config.json, at any depth, that describe how a model is quantized.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Modules that training wraps around a model or its layers. They have no weights of their own.
WRAPPER_PATTERN = re.compile(
    r"(^|(?<=\.))(_orig_mod|_(?:fsdp|checkpoint)_wrapped_module|_forward_module)\."
)

# The names of all dtypes that a pickle may hold.
DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


@dataclass(frozen=True)
class InFile:
    """Bytes that lie in one piece of the file, row after row, from `offset` on."""

    offset: int

    def skip(self, nbytes: int) -> InFile:
        return InFile(self.offset + nbytes)


@dataclass(frozen=True)
class InMap:
    """Bytes of a pickle's tensor, row after row from byte `start` on.

    They lie otherwise in the file, or are computed from what lies there."""

    tensor: str
    start: int = 0

    def skip(self, nbytes: int) -> InMap:
        return InMap(self.tensor, self.start + nbytes)


@dataclass(frozen=True)
class Transposed:
    """Bytes that lie column after column, each `stride` bytes after the one before."""

    columns: InFile | InMap
    stride: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it, or a matrix that is a part of one."""

    name: str

    # The name of the dtype in safetensors, such as "BF16".
    dtype: str

    shape: tuple[int, ...]
    nbytes: int
    file: Path
    location: InFile | InMap | Transposed

    # The name of this tensor in the file, or of the stack that it is cut from.
    name_in_file: str

    def part(self, name: str, shape: tuple[int, int], start: int) -> TensorInfo:
        """Describe a matrix that begins `start` bytes into this tensor."""
        nbytes = math.prod(shape) * DTYPE_BITS[self.dtype] // 8
        location = self.location.skip(start)
        return replace(self, name=name, shape=shape, nbytes=nbytes, location=location)

    def transposed_part(
        self, name: str, shape: tuple[int, int], start: int, stride: int
    ) -> TensorInfo:
        """Describe a matrix whose first column begins `start` bytes into this tensor.

        Each other column begins `stride` bytes after the one before."""
        part = self.part(name, shape, start)
        return replace(part, location=Transposed(part.location, stride))

    def transposed(self) -> TensorInfo:
        """Describe this matrix with rows and columns exchanged."""
        rows, columns = self.shape
        stride = columns * DTYPE_BITS[self.dtype] // 8
        return self.transposed_part(self.name, (columns, rows), 0, stride)


# Headers of safetensors files, and JSON.


def read_header(path: Path) -> tuple[dict, int]:
    """Read the JSON header of a safetensors file, and where the tensors' bytes begin.

    Raises ValueError if it has none."""
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        # The first is the library's own limit.
        if header_size > min(100_000_000, size - 8):
            raise ValueError(f"{size:,} bytes with a header of {header_size:,}")
        text = file.read(header_size).decode()
    header = json.loads(text, object_pairs_hook=make_object)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object, or names a tensor twice")
    return header, 8 + header_size


def make_object(pairs: list[tuple[str, object]]) -> dict | list:
    """Make a dict of a JSON object, or leave it a list if it has a name twice."""
    names = dict(pairs)
    return names if len(names) == len(pairs) else pairs


def read_tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Read what one safetensors file holds.

    Checks what the library checks: the tensors' sizes, that there is no gap or overlap between
    them, and the file's length. `safe_open` itself maps the file, which fails beyond the memory."""
    infos: dict[str, TensorInfo] = {}
    try:
        header, start = read_header(path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            infos[name] = read_entry(name, entry, path, start)
        check_no_gaps(infos, start, path.stat().st_size)
    except (ValueError, RecursionError) as error:
        raise QuantizeError(
            f"{path}: not a whole safetensors file ({error}): copy or download it again"
        ) from None
    return infos


def read_entry(name: str, entry: dict, path: Path, start: int) -> TensorInfo:
    """Read a tensor's entry in the header of a file whose tensors begin at `start`."""
    try:
        dtype = entry["dtype"]
        shape = entry["shape"]
        first, last = entry["data_offsets"]
        numbers = [*shape, first, last]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError

        # Torch allows no more dimensions. The product of millions would take minutes.
        if len(shape) > 64:
            raise ValueError
        if math.prod(shape) * DTYPE_BITS[dtype] != (last - first) * 8:
            raise ValueError
        name.encode()
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"tensor {name!r} has no valid dtype, shape and offsets") from None
    return TensorInfo(name, dtype, tuple(shape), last - first, path, InFile(start + first), name)


def check_no_gaps(infos: dict[str, TensorInfo], start: int, size: int) -> None:
    """Raise ValueError if tensors do not fill a file of this size from `start` on."""
    end = start
    for info in sorted(infos.values(), key=lambda info: (info.location.offset, info.nbytes)):
        if info.location.offset != end:
            raise ValueError(f"gap or overlap before tensor {info.name!r}")
        end += info.nbytes
    if end != size:
        raise ValueError(f"{size:,} bytes, {end:,} by its header")


def refuse_partial(path: Path) -> None:
    """Refuse a file that only tells which one belongs there, or that is still being downloaded.

    A clone without Git LFS leaves the former. aria2 gives a file its full size before the bytes,
    and removes what it notes beside it at the end."""
    if path.with_name(f"{path.name}.aria2").exists():
        problem = f"its download is not finished, since {path.name}.aria2 is beside it"
        raise QuantizeError(f"{path}: {problem}: download it again, to the end")
    with open(path, "rb") as file:
        start = file.read(max(map(len, POINTERS.values())))
    for keeper, beginning in POINTERS.items():
        if not start.startswith(beginning):
            continue
        remedy = "download the file again"
        if keeper == "Git LFS":
            remedy = f"run git lfs pull in {path.parent}, or {remedy}"
        raise QuantizeError(f"{path}: is a {keeper} pointer and not the file itself: {remedy}")


def broken_link(path: Path) -> str:
    """Describe a link to what is not there; empty for anything else."""
    if path.exists() or not path.is_symlink():
        return ""
    return f"a link to {os.readlink(path)}, which is missing"


def read_json(path: Path) -> dict:
    """Read a JSON object."""
    refuse_partial(path)
    too_deep = f"{path}: objects and lists nested more than {MAX_JSON_DEPTH} deep"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QuantizeError(
            f"{path}: not valid JSON ({error}): mend it, or copy or download it again"
        ) from None
    except RecursionError:
        raise QuantizeError(too_deep) from None
    if not isinstance(value, dict):
        raise QuantizeError(f"{path}: must hold a JSON object")

    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        deeper = []
        for whole in level:
            parts = whole.values() if isinstance(whole, dict) else whole
            deeper += [part for part in parts if isinstance(part, dict | list)]
        level = deeper
    if level:
        raise QuantizeError(too_deep)
    return value


# Files of tensors.


class WeightsFile:
    """A file of tensors: safetensors, or a state dict that torch.save wrote.

    It knows what the file was like at first, and what others then had of it in the page cache.
    Nothing but tensors and plain containers is ever unpickled."""

    def __init__(self, path: Path):
        if not path.is_file():
            problem = "not a regular one" if path.exists() else "missing"
            if link := broken_link(path):
                problem = f"{link}: copy or download it again"
            raise QuantizeError(f"file {path} is {problem}")
        refuse_partial(path)
        self.path = path

        # Taken before anything is read.
        self.state = file_state(path)

        self.notes: list[str] = []
        self._pickle: MappedPickle | None = None
        if path.suffix in (".bin", ".pth", ".pt"):
            self._pickle = MappedPickle(path, self.notes)
            self.infos = self._pickle.list_infos()
        else:
            self.infos = read_tensor_infos(path)

        # None until tensors are read.
        self._pages: PageCache | None = None

        # Bytes of scattered reads since the page cache last forgot them.
        self._not_dropped = 0

    @contextlib.contextmanager
    def _opened(self, flags: int = 0) -> Iterator[int]:
        """Open the file for one read, and check that it is as it was at first.

        It does not stay open, since a checkpoint may have more files than the system lets a process
        open."""
        fd = os.open(self.path, os.O_RDONLY | flags)
        try:
            if file_state(fd) != self.state:
                raise self._change_error()
            yield fd
        finally:
            os.close(fd)

    def _cached_before(self) -> PageCache:
        """Return what others have of the file in the page cache, asked for before the first
        read."""
        if self._pages is None:
            with self._opened() as fd:
                self._pages = PageCache(fd)
        return self._pages

    def close(self) -> None:
        """Close the file for good."""
        # The page cache cannot forget what is mapped.
        self._pickle = None
        self.drop_read()

    def check_unchanged(self) -> None:
        """Raise if the file was written to or replaced since it was first seen."""
        if file_state(self.path) != self.state:
            raise self._change_error()

    def _change_error(self) -> QuantizeError:
        advice = "let whatever writes to it finish, then give the same command again"
        return QuantizeError(f"{self.path} changed while it was read: {advice}")

    def is_cached(self, info: TensorInfo, offset: int, nbytes: int) -> bool:
        """Check whether any of a tensor's bytes were in the page cache before this run."""
        location = info.location
        if isinstance(location, Transposed):
            location = location.columns
        # A mapped tensor's bytes may lie anywhere: some other part of the file stands for them.
        start = offset
        if isinstance(location, InFile):
            start += location.offset
        return self._cached_before().holds(start, start + nbytes)

    def drop_read(self) -> None:
        """Let the page cache forget all that this run read, with pages that two tensors share."""
        if self._pages:
            # The file may be gone.
            with contextlib.suppress(OSError), open(self.path, "rb") as file:
                self._pages.drop(file.fileno())

    def read(
        self, info: TensorInfo, offset: int, nbytes: int, memory: memoryview | None = None
    ) -> memoryview:
        """Read a tensor's bytes, row after row, from `offset` on.

        Returns a part of `memory`, which must begin a page and have READ_MARGIN bytes more than are
        asked for. The page cache is left as it was."""
        if memory is None:
            memory = memoryview(bytearray(nbytes))
        location = info.location
        if isinstance(location, InFile):
            return self._read_piece(location.offset + offset, nbytes, memory)
        buffer = memory[:nbytes]
        self._cached_before()
        with self._opened() as fd:
            if isinstance(location, Transposed):
                self._read_transposed(fd, info, offset, buffer)
            else:
                self._pickle.copy(location.skip(offset), buffer)
        self._drop_later(nbytes)
        return buffer

    def _drop_later(self, nbytes: int) -> None:
        """Let the page cache forget scattered bytes once there are many of them.

        It does not at once, since rows that are read next lie in the same pages."""
        self._not_dropped += nbytes
        if self._not_dropped >= SYNC_BYTES:
            self.drop_read()
            self._not_dropped = 0

    def _read_piece(self, start: int, nbytes: int, memory: memoryview) -> memoryview:
        """Read bytes from `start` of the file on, around the page cache where that is possible."""
        pages = self._cached_before()
        has_room = len(memory) >= nbytes + READ_MARGIN
        # Bytes keep their place within a block, and torch needs whole numbers to be aligned.
        if has_room and start % 8 == 0 and not pages.holds(start, start + nbytes):
            # Some file systems do not open a file so, or do not read it then.
            with contextlib.suppress(OSError), self._opened(O_DIRECT) as fd:
                return self._read_around(fd, start, nbytes, memory)
        buffer = memory[:nbytes]
        with self._opened() as fd:
            self._read_through_cache(fd, start, buffer)
            pages.drop(fd, start, start + nbytes)
        return buffer

    def _read_around(self, fd: int, start: int, nbytes: int, memory: memoryview) -> memoryview:
        """Read whole blocks of the file into `memory`, around the page cache. (open(2), O_DIRECT)

        It takes a tenth of the processor's time of a read through the cache, which finds and frees
        each page."""
        skip = start % DIRECT_BLOCK
        end = -(-(skip + nbytes) // DIRECT_BLOCK) * DIRECT_BLOCK
        done = 0
        while done < skip + nbytes:
            check_signals()
            chunk = memory[done : min(done + COPY_BYTES, end)]
            count = os.preadv(fd, [chunk], start - skip + done)
            if not count:
                raise self._change_error()
            done += count
        return memory[skip : skip + nbytes]

    def _read_through_cache(self, fd: int, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from `start` of the file on.

        This is as fast as a map of the file. If the file is cut or fails, it is an error and no
        SIGBUS."""
        with naming(self.path):
            while buffer:
                check_signals()
                count = os.preadv(fd, [buffer[:COPY_BYTES]], start)
                if not count:
                    raise self._change_error()
                buffer = buffer[count:]
                start += count

    def _read_transposed(self, fd: int, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from a matrix that lies transposed: a part of each column."""
        # Integers keep all bits.
        dtype = getattr(torch, f"int{DTYPE_BITS[info.dtype]}")
        columns = info.shape[1]
        row_bytes = columns * dtype.itemsize
        first_row, skip = divmod(offset, row_bytes)
        rows = -(-(skip + len(buffer)) // row_bytes)
        part_bytes = rows * dtype.itemsize

        parts = memoryview(bytearray(columns * part_bytes))
        for column in range(columns):
            part = parts[column * part_bytes : (column + 1) * part_bytes]
            start = column * info.location.stride + first_row * dtype.itemsize
            location = info.location.columns.skip(start)
            if isinstance(location, InFile):
                self._read_through_cache(fd, location.offset, part)
            else:
                self._pickle.copy(location, part)

        matrix = torch.frombuffer(parts, dtype=dtype).view(columns, rows).T
        copy_bytes(matrix, skip, buffer)


def file_state(path: Path | int) -> tuple[int, int]:
    """Return the size of a file and when it was last changed."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def copy_bytes(tensor: torch.Tensor, start: int, buffer: memoryview) -> None:
    """Fill `buffer` with a tensor's bytes, row after row, from `start` on."""
    source = tensor.contiguous().view(-1).view(torch.uint8)
    torch.frombuffer(buffer, dtype=torch.uint8).copy_(source[start : start + len(buffer)])


# State dicts that torch.save wrote.


@dataclass(frozen=True)
class MappedRange:
    """A range of this process's addresses that is mapped from `offset` of a file on."""

    start: int
    end: int
    offset: int


class MappedPickle:
    """The tensors of a state dict, mapped and not read."""

    def __init__(self, path: Path, notes: list[str]):
        """Map a file's tensors, and note what else it holds."""
        self.path = path
        state_dict = load_state_dict(path, notes)
        self._tensors, self._factors = resolve_quantizers(state_dict, path, notes)

    def list_infos(self) -> dict[str, TensorInfo]:
        """Describe the tensors, and find those that lie in one piece of the file."""
        ranges = self._find_ranges()
        infos = {}
        for name, tensor in self._tensors.items():
            self._check_plain(name, tensor)
            dtype = DTYPE_NAMES[tensor.dtype]
            location = self._locate(name, tensor, ranges)
            infos[name] = TensorInfo(
                name, dtype, tuple(tensor.shape), tensor.nbytes, self.path, location, name
            )
        return infos

    def _find_ranges(self) -> list[MappedRange]:
        """List the ranges of addresses that are mapped from files. (proc(5))

        There are none of this file if torch swapped the bytes of each number as it loaded it."""
        with zipfile.ZipFile(self.path) as archive:
            for name in archive.namelist():
                if name.endswith("/byteorder") and archive.read(name).decode() != sys.byteorder:
                    return []
        ranges = []
        maps = Path("/proc/self/maps").read_text()
        for line in re.finditer(r"^(\w+)-(\w+) \S+ (\w+) \S+ [1-9]", maps, re.MULTILINE):
            ranges.append(MappedRange(int(line[1], 16), int(line[2], 16), int(line[3], 16)))
        return ranges

    def _check_plain(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a tensor that is no plain array of numbers."""
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if (
            tensor.dtype in DTYPE_NAMES
            and is_plain
            and not tensor.is_conj()
            and not tensor.is_neg()
        ):
            return
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        problem = f"is {kind}: only plain tensors with data can be read"
        raise QuantizeError(f"tensor {name!r} ({self.path.name}) {problem}")

    def _locate(self, name: str, tensor: torch.Tensor, ranges: list[MappedRange]) -> InFile | InMap:
        """Find where a tensor's bytes lie."""
        if tensor.is_contiguous() and name not in self._factors:
            address = tensor.data_ptr()
            for mapped in ranges:
                if mapped.start <= address <= mapped.end - tensor.nbytes:
                    return InFile(mapped.offset + address - mapped.start)
        return InMap(name)

    def copy(self, location: InMap, buffer: memoryview) -> None:
        """Fill `buffer` with a tensor's bytes."""
        tensor = torch.atleast_1d(self._tensors[location.tensor])
        row_bytes = tensor.nbytes // len(tensor)
        first, skip = divmod(location.start, row_bytes)
        end = -(-(location.start + len(buffer)) // row_bytes)
        rows = tensor[first:end]
        if location.tensor in self._factors:
            rows = (rows.to(torch.float32) * self._factors[location.tensor]).to(tensor.dtype)
        copy_bytes(rows, skip, buffer)


def load_state_dict(path: Path, notes: list[str]) -> dict[str, torch.Tensor]:
    """Map the tensors of a pickled state dict, and note what else it holds."""
    content = unwrap_state_dict(unpickle(path), path, notes)
    tensors = {}
    others = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            problem = f"{str(name)!r} is a dict inside the state dict"
            raise QuantizeError(f"{path}: {problem}: save model.state_dict() alone")
        if isinstance(value, torch.Tensor):
            tensors[str(name)] = value
        else:
            others.append(str(name))
    if others:
        notes.append(f"{path.name}: left out, since they are no tensors: {quote_names(others)}")
    return tensors


def unpickle(path: Path) -> object:
    """Load a file of torch.save without running what it holds, and without reading its tensors."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        problem = "is no pickle of tensors alone"
        if culprit:
            problem = f"would run {culprit[1]} when opened"
        advice = "only tensors are read: save model.state_dict() alone"
        raise QuantizeError(f"{path} {problem}, and {advice}") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        if is_lack_of_memory(error):
            raise
        problem = " ".join(str(error).split())
        raise QuantizeError(
            f"{path}: not a whole torch checkpoint ({problem}): copy or save it again"
        ) from None


def unwrap_state_dict(content: object, path: Path, notes: list[str]) -> Mapping:
    """Return the state dict itself. Trainers put it into a dict with other things."""
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise QuantizeError(f"{path} holds a {kind}, not a state dict: save model.state_dict()")
    for wrapper in ("state_dict", "model", "model_state_dict", "module"):
        if isinstance(content.get(wrapper), Mapping):
            beside = [key for key in content if key != wrapper]
            if beside:
                names = quote_names(beside)
                notes.append(f"{path.name}: only {wrapper!r} is read; beside it are {names}")
            return content[wrapper]
    return content


def resolve_quantizers(
    state_dict: dict[str, torch.Tensor], path: Path, notes: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Undo what ModelOpt (0.25 to 0.33) did to a state dict before its export failed, with a note.

    Returns the model's own tensors, and for some weights a float32 factor for each column. `_amax`
    records what was seen and changes nothing. AWQ divided each weight's columns by
    `input_quantizer._pre_quant_scale`, so they are multiplied back. If there is a
    `weight_quantizer._pre_quant_scale` too, the two cancel. Anything else is refused."""
    tensors = {}
    quantizers = {}
    for name, data in state_dict.items():
        if re.search(r"quantizer(\.\d+)?\._\w+$", name):
            quantizers[name] = data
        else:
            tensors[name] = data
    if not quantizers:
        return tensors, {}

    factors = {}
    cancelled = 0
    unknown = {name for name in quantizers if not name.endswith("._amax")}
    for name, data in quantizers.items():
        module = name.removesuffix(".input_quantizer._pre_quant_scale")
        weight = tensors.get(f"{module}.weight")
        if weight is None or weight.dim() != 2 or data.numel() != weight.shape[1]:
            continue
        scale = data.to(torch.float32).flatten()
        if not (torch.isfinite(scale) & (scale > 0)).all():
            rule = "scales must be positive and finite to be undone"
            raise QuantizeError(f"tensor {name!r} ({path.name}): {rule}")
        twin = f"{module}.weight_quantizer._pre_quant_scale"
        unknown -= {name, twin}
        if twin in quantizers:
            cancelled += 1
        else:
            factors[f"{module}.weight"] = scale

    if unknown:
        names = quote_names(sorted(unknown))
        problem = f"tensors of quantizers whose effect on the weights is unknown, {names}"
        raise QuantizeError(f"{path.name}: {problem}: give the checkpoint from before ModelOpt")
    scales = f"multiplied back into {len(factors):,} weights, cancelled in {cancelled:,}"
    dropped = f"ModelOpt's quantizer tensors are dropped: {len(quantizers):,}"
    notes.append(f"{dropped}; pre_quant_scale {scales}")
    return tensors, factors


# The input folder.


class Checkpoint:
    """The tensors of an input folder, in file order, however they are stored."""

    def __init__(
        self, folder: Path, config_folder: Path | None = None, mtp_folder: Path | None = None
    ):
        """Open a folder's weights, and config.json there or in another folder.

        Layers that predict further tokens are taken from a third one."""
        check_model_folder(folder)
        if config_folder is not None:
            check_model_folder(config_folder)
        self.folder = folder

        # The folder of config.json and of all else that is copied.
        self.config_folder = folder
        if config_folder is not None and config_folder.resolve() != folder.resolve():
            self.config_folder = config_folder

        names, weight_map = find_weights(folder)
        files = [WeightsFile(folder / name) for name in names]
        self.files = {file.path: file for file in files}

        # Sizes and times.
        self.sources = {file.path.name: list(file.state) for file in files}

        self.notes: list[str] = []
        for file in files:
            self.notes += file.notes
        self.tensors = collect_tensors(files, weight_map)
        self._check_index(weight_map)
        self._read_config()
        self._drop_wrappers()
        if mtp_folder is not None:
            self._add_mtp(mtp_folder)

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()

    def _check_index(self, weight_map: dict[str, str]) -> None:
        """Refuse an index that names a tensor which is missing, and note those it does not name."""
        if not self.tensors:
            raise QuantizeError(f"{self.folder}: {quote_names(self.sources)} hold no tensors")
        for name, file_name in weight_map.items():
            if name not in self.tensors:
                problem = f"the index puts {name!r} in {file_name}, which lacks it"
                raise QuantizeError(f"{self.folder}: {problem}")
        unlisted = [name for name in self.tensors if name not in weight_map]
        if weight_map and unlisted:
            count = count_of(len(unlisted), "tensor")
            self.notes.append(f"{count} in shards but not in the index: {quote_names(unlisted)}")

    def _read_config(self) -> None:
        """Read config.json, and note what in it, or beside it, is not used."""
        folder = self.config_folder
        self.has_config = (folder / CONFIG_NAME).exists()
        if link := broken_link(folder / CONFIG_NAME):
            raise QuantizeError(f"{folder / CONFIG_NAME}: {link}: copy or download it again")
        self.config_hash = hash_file(folder / CONFIG_NAME) if self.has_config else ""
        self.config = read_json(folder / CONFIG_NAME) if self.has_config else {}
        self.quantization = describe_quantization(pop_quantization(self.config), folder)
        if (folder / ADAPTER_CONFIG_NAME).exists():
            problem = "is not copied: loaders would take the folder for an adapter's"
            self.notes.append(f"{ADAPTER_CONFIG_NAME} {problem}")
        odd = odd_config_values(self.config)
        if odd:
            problem = "values that are not of the kind that belongs there and are not used"
            self.notes.append(f"{CONFIG_NAME} has {problem}: {', '.join(odd)}")
        if not self.has_config:
            problem = "without which no loader knows it: --config_dir"
            self.notes.append(f"no {CONFIG_NAME} in {folder}, {problem}")

    def _drop_wrappers(self) -> None:
        """Leave out of the names what training wrapped around the model.

        It holds no weights, and no loader knows it."""
        self._drop_step_counter()
        dropped: Counter[str] = Counter()
        modules = {}
        for name in self.tensors:
            for match in WRAPPER_PATTERN.finditer(name):
                dropped[match[2]] += 1
            modules[name] = WRAPPER_PATTERN.sub("", name).split(".")
        outer = self._find_outer_wrappers(list(modules.values()))
        for wrapper in outer:
            dropped[wrapper] += len(modules)
        if not dropped:
            return

        tensors: dict[str, TensorInfo] = {}
        for name, parts in modules.items():
            short_name = ".".join(parts[len(outer) :])
            if short_name in tensors:
                twins = quote_names([tensors[short_name].name_in_file, name])
                raise QuantizeError(TWO_COPIES.format(twins))
            tensors[short_name] = replace(self.tensors[name], name=short_name)
        self.tensors = tensors

        wrappers = [f"'{wrapper}.' ({count:,} times)" for wrapper, count in dropped.items()]
        problem = "dropped from the tensors' names, as what training wrapped around the model"
        self.notes.append(f"{problem}: {', '.join(wrappers)}")

    def _add_mtp(self, folder: Path) -> None:
        """Take the tensors of layers that predict further tokens from a folder of the base model.

        It is an error if they are there already, or do not fit."""
        check_model_folder(folder)
        base = BaseMtp.read(folder)
        problem = why_mtp_does_not_fit(base, self.tensors, self.config)
        if problem:
            raise QuantizeError(f"--mtp_from {folder}: {problem}")

        for file in base.files:
            self.files[file.path] = file
            self.sources[f"{file.path.name} of --mtp_from"] = list(file.state)
        self.tensors |= base.tensors
        count = count_of(len(base.tensors), "tensor")
        size = format_bytes(sum(info.nbytes for info in base.tensors.values()))
        self.notes.append(
            f"{count} of layers that predict further tokens ({size}) are those of {folder}: they"
            " were not trained with this model, so that fewer of their drafts may be accepted"
        )

    def _drop_step_counter(self) -> None:
        """Leave out the tensor that torch's AveragedModel counts its steps in."""
        counter = "n_averaged"
        others = [name for name in self.tensors if name != counter]
        if counter in self.tensors and all(name.startswith("module.") for name in others):
            del self.tensors[counter]
            self.notes.append("left out 'n_averaged', which counts an AveragedModel's steps")

    def _find_outer_wrappers(self, names: list[list[str]]) -> list[str]:
        """Find the modules that the whole model was put into, from names as lists of modules."""
        # Of lists, too, this returns what all begin with.
        prefix = os.path.commonprefix([name[:-1] for name in names])  # noqa: RUF071

        # A language model, body and head, may have been put into anything. But where config.json
        # has configs for a model's parts, it may be one of them, as `thinker` of Qwen-Omni.
        has_parts = any(
            key.endswith("_config") and isinstance(value, dict)
            for key, value in self.config.items()
        )
        if not has_parts and {name[len(prefix)] for name in names} == {"model", "lm_head"}:
            return prefix

        # Else it is only data parallelism's `module` that is known to be none of the model's own.
        return list(itertools.takewhile(lambda module: module == "module", prefix))

    def read(
        self, info: TensorInfo, offset: int, nbytes: int, memory: memoryview | None = None
    ) -> memoryview:
        """Read a tensor's bytes: see `WeightsFile.read`."""
        return self.files[info.file].read(info, offset, nbytes, memory)

    def read_job(self, job: Job, memory: memoryview) -> memoryview:
        """Read a job's bytes: see `WeightsFile.read`."""
        return self.read(job.tensor.source, job.offset, job.nbytes, memory)

    def is_cached(self, job: Job) -> bool:
        """Check whether some of a job's bytes were in the page cache before this run."""
        info = job.tensor.source
        return self.files[info.file].is_cached(info, job.offset, job.nbytes)

    def check_unchanged(self) -> None:
        """Raise if a file was written to or replaced since it was opened."""
        for file in self.files.values():
            file.check_unchanged()

    def drop_read(self) -> None:
        """Let the page cache forget all that this run read."""
        for file in self.files.values():
            file.drop_read()


def check_model_folder(folder: Path) -> None:
    """Refuse what is no folder of a model that this process may read."""
    denied = why_unreadable(folder)
    if denied:
        raise QuantizeError(f"folder {folder}: {denied}")
    snapshots = snapshots_in(folder)
    if snapshots:
        problem = "is of the hub's cache: give the model's folder inside it"
        count = f" (of {len(snapshots)} snapshots there)" if len(snapshots) > 1 else ""
        raise QuantizeError(f"folder {folder} {problem}, {snapshots[0]}{count}")
    if folder.is_dir():
        return
    if folder.exists():
        raise QuantizeError(f"folder {folder}: is a file, give its folder")
    problem = "no such folder"
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(folder)):
        download = f"hf download {folder} --local-dir {folder.name}"
        problem += f"; from the hub: {download}, then give {folder.name}"
    raise QuantizeError(f"folder {folder}: {problem}")


def snapshots_in(folder: Path) -> list[Path]:
    """List the models' folders in a folder of the hub's cache; none in any other.

    The one that `main` means comes first."""
    if (folder / CONFIG_NAME).exists() or not folder.is_dir():
        return []
    # Inside a model's folder of the cache, that itself, and what holds such folders.
    model = folder.parent if folder.name in ("snapshots", "blobs", "refs") else folder
    models = [model, *sorted(folder.glob("models--*")), *sorted(folder.glob("hub/models--*"))]
    snapshots = []
    for cached in models:
        if cached.name.startswith(("datasets--", "spaces--")):
            continue
        main = cached / "refs" / "main"
        revision = main.read_text().strip() if main.is_file() else ""
        folders = [path for path in (cached / "snapshots").glob("*") if path.is_dir()]
        snapshots += sorted(folders, key=lambda path: (path.name != revision, path.name))
    return snapshots


@dataclass(frozen=True)
class BaseMtp:
    """The layers of a base model that predict further tokens (MTP)."""

    config: dict
    files: list[WeightsFile]
    tensors: dict[str, TensorInfo]

    @staticmethod
    def read(folder: Path) -> BaseMtp:
        """Read where the tensors are: in files that the index names, or else in any others.

        Files of the model's other layers need not be there."""
        path = folder / CONFIG_NAME
        config = read_json(path) if path.exists() else {}
        weight_map = {}
        if (folder / INDEX_NAME).exists():
            weight_map = read_json(folder / INDEX_NAME).get("weight_map")
            weight_map = weight_map if isinstance(weight_map, dict) else {}
        names = {str(weight_map[name]) for name in find_mtp(weight_map, config)}
        if not names:
            names = {path.name for path in folder.glob("*.safetensors")}
            names -= set(map(str, weight_map.values()))

        files = []
        tensors = {}
        for name in sorted(names):
            file = WeightsFile(folder / name)
            found = {}
            for tensor in sorted(find_mtp(file.infos, config)):
                if weight_map.get(tensor, name) == name:
                    found[tensor] = file.infos[tensor]
            if found:
                files.append(file)
                tensors |= found
            else:
                file.close()
        return BaseMtp(config, files, tensors)


def why_mtp_does_not_fit(base: BaseMtp, tensors: dict[str, TensorInfo], config: dict) -> str:
    """Return why a model cannot take a base model's layers that predict further tokens; "" if it
    can."""
    return (
        why_mtp_is_not_due(base, tensors, config)
        or how_configs_differ(base, config)
        or how_mtp_differs(base, tensors, config)
    )


def why_mtp_is_not_due(base: BaseMtp, tensors: dict[str, TensorInfo], config: dict) -> str:
    """Return why there is nothing to take, or nothing that the model lacks."""
    if not base.tensors:
        return "no layers that predict further tokens are in it"
    present = sorted(find_mtp(tensors, config))
    if present:
        return f"the checkpoint has such layers already, e.g. {present[0]!r}: leave it out"
    if MtpPromise.of(config) is None:
        stated = MtpPromise.of(base.config)
        key = f" ({stated.key})" if stated else ""
        return f"{CONFIG_NAME} promises no such layers: add what that of the base says{key}"
    return ""


def how_configs_differ(base: BaseMtp, config: dict) -> str:
    """Return which size in config.json is another than the base model's."""
    keys = ["hidden_size", "d_model", "n_embd", *LAYER_COUNTS, *EXPERT_COUNTS, *EXPERT_WIDTHS]
    if any(re.search(VOCABULARY_WORDS, name) for name in base.tensors):
        keys.append("vocab_size")
    for key in keys:
        own = set(config_values(config, key))
        others = set(config_values(base.config, key))
        if own and others and own != others:
            return f"its {key} is {list_in_words(others)}, and the model's {list_in_words(own)}"
    return ""


def how_mtp_differs(base: BaseMtp, tensors: dict[str, TensorInfo], config: dict) -> str:
    """Return which of the base's tensors is named or shaped otherwise than the model's layers."""
    own_shapes: dict[str, set[tuple[int, ...]]] = {}
    containers = set()
    for name, info in tensors.items():
        layer = LAYER_PATTERN.match(name)
        if layer and not re.search(TOWER_NAMES, name):
            own_shapes.setdefault(name[layer.end() :], set()).add(info.shape)
            containers.add(name[: layer.start(3)])

    widths = config_values(config, "hidden_size", "d_model", "n_embd")
    for name, info in base.tensors.items():
        layer = LAYER_PATTERN.match(name)
        if not MTP_NAMES.search(name) and name[: layer.start(3)] not in containers:
            return f"the model's own layers are not called as {name!r} is"
        shapes = own_shapes.get(name[layer.end() :] if layer else "", {info.shape})
        if re.search(MTP_ENTRY_NAME, name) and not re.search(NO_MTP_ENTRY, name):
            shapes = {(width, 2 * width) for width in widths} or shapes
        if info.shape not in shapes:
            return f"{name!r} is {info.shape}, and would have to be {list_in_words(shapes)}"
    return ""


def collect_tensors(files: list[WeightsFile], weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    """Collect the tensors of all files, each from the file that the index takes it from."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in file.infos.items():
            if weight_map.get(name, file.path.name) != file.path.name:
                continue
            if name in tensors:
                both = f"{tensors[name].file.name} and {file.path.name}"
                problem = f"is in both {both}, and no index says which counts: remove one"
                raise QuantizeError(f"tensor {name!r} {problem}")
            tensors[name] = info
    return tensors


def find_weights(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Find the files of the weights, safetensors rather than pickles, and read their index.

    Returns the files' names and the index, tensor name -> file name, which is empty if there is
    none."""
    names = sorted(
        path.name for path in folder.iterdir() if not path.name.startswith((".", "adapter_"))
    )
    others = [name for name in names if not TRAINER_PATTERN.search(name)]
    safetensors = safetensors_of_model(others)
    pickles = [name for name in others if re.search(r"^pytorch_model.*\.bin$|\.pth?$", name)]

    index = folder / INDEX_NAME
    if not safetensors and not index.exists():
        index = folder / "pytorch_model.bin.index.json"
    if index.exists():
        weight_map = read_weight_map(index, [*safetensors, *pickles])
        return sorted(set(weight_map.values())), weight_map

    safetensors = [name for name in safetensors if not holds_statistics(folder / name)]
    weights = safetensors or [name for name in pickles if name.endswith(".bin")] or pickles
    problem = why_not_one_set(weights) if weights else why_no_weights(folder, names)
    if problem:
        raise QuantizeError(f"input folder {folder}: {problem}")
    return weights, {}


def safetensors_of_model(names: list[str]) -> list[str]:
    """List the safetensors files, but not Mistral's own copy of the weights beside Hugging Face's.

    `plan_other_files` names what is left out."""
    safetensors = [name for name in names if name.endswith(".safetensors")]
    hugging_face = [name for name in safetensors if not name.startswith("consolidated")]
    return hugging_face or safetensors


def holds_statistics(path: Path) -> bool:
    """Return whether a file is one that `collect_statistics` wrote; not if it cannot be read."""
    with contextlib.suppress(OSError):
        return path.suffix == ".safetensors" and STATISTICS_KEY in read_metadata(path)
    return False


# By a pattern of names, what a folder without weights that are read holds instead, and what helps.
OTHER_KINDS_OF_WEIGHTS = {
    r"\.gguf$": "GGUF is quantized already, give the checkpoint it was made from",
    r"\.onnx([_.]data)?$|^onnx$": "ONNX is an export, give the checkpoint it was made from",
    r"\.h5$|\.msgpack$": (
        "weights of TensorFlow or Flax are not read, save them with transformers' save_pretrained"
    ),
    r"\.nemo$": "NeMo's archive is not read, export it to Hugging Face's format",
    r"^latest_checkpointed_iteration\.txt$|^iter_\d+$": (
        "it is Megatron's, export it to Hugging Face's format (Megatron-Bridge)"
    ),
    r"^zero_to_fp32\.py$|^global_step\d+$": (
        "it is DeepSpeed's, run its zero_to_fp32.py and give what that writes"
    ),
    r"\.distcp$|^pytorch_model_fsdp_\d+$": (
        "it is a distributed checkpoint, make one file of it with accelerate merge-weights, or"
        " python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
    ),
}


def why_no_weights(folder: Path, names: list[str]) -> str:
    """Explain that none of the files in a folder, which have these names, holds weights."""
    problem = "no *.safetensors, pytorch_model*.bin, *.pth or *.pt in it"
    for name in names:
        if name.endswith(".safetensors") and holds_statistics(folder / name):
            return f"{name} holds statistics, for --importance: give the checkpoint's folder"
    if (folder / ADAPTER_CONFIG_NAME).exists():
        return f"{problem}: it holds a LoRA adapter, merge that into its base model first"
    for pattern, advice in OTHER_KINDS_OF_WEIGHTS.items():
        if any(re.search(pattern, name) for name in names):
            return f"{problem}: {advice}"
    others = [name for name in names if name.endswith((".ckpt", ".bin"))]
    others = [name for name in others if not TRAINER_PATTERN.search(name)]
    if others:
        return f"{problem}: if {others[0]!r} is the model's state dict, name it model.pth"
    inside = where_weights_are_inside(folder)
    if inside:
        return problem + inside
    training = r"^(optimizer|rng_state|training_args|trainer_state)"
    if any(re.search(training, name) for name in names):
        advice = "it holds training state alone, give the folder where the model was saved"
        return f"{problem}: {advice}"
    if CONFIG_NAME in names:
        return f"{problem}: copy or download the weights, too"
    return problem


def where_weights_are_inside(folder: Path) -> str:
    """Name the folders in a folder that hold weights, for the end of an error; "" if none do."""
    found = [*folder.glob("*/*.safetensors"), *folder.glob("*/pytorch_model*.bin")]
    found = [path for path in found if not TRAINER_PATTERN.search(path.name)]
    # checkpoint-20 before checkpoint-100.
    folders = sorted({path.parent for path in found}, key=lambda path: (len(path.name), path.name))
    if not folders:
        return ""
    if len(folders) == 1:
        return f", but some in {folders[0]}: give that folder if it is the model"
    names = quote_names(path.name for path in folders)
    return f", but some in its folders {names}: give the one that is the model"


def why_not_one_set(names: list[str]) -> str:
    """Explain why files of these names are not one whole set of weights; "" if they are."""
    # By pattern, such as model-*-of-00002.safetensors, the last file of each set.
    sets = {re.sub(r"\d+(?=-of-\d+\.)", "*", name): name for name in names}

    # Names of a whole model, of a rank, or of a set of numbered files.
    whole = r"-of-\d+\.|^(pytorch_)?model\.|\.pth?$"
    if len(sets) > 1 and any(re.search(whole, name) for name in names):
        patterns = quote_names(sets)
        return f"{patterns} are two sets of weights, or of several ranks: leave one, or merge them"
    for pattern, name in sets.items():
        part = re.search(r"(\d+)-of-0*(\d{1,5})\.\w+$", name)
        if not part:
            continue
        numbers = [f"{number:0{len(part[1])}}" for number in range(1, int(part[2]) + 1)]
        due = [pattern.replace("*", number) for number in numbers]
        missing = [file_name for file_name in due if file_name not in names]
        if missing:
            return f"{quote_names(missing)} of {part[2]} missing: copy it again"
    return ""


def read_weight_map(index: Path, names: list[str]) -> dict[str, str]:
    """Read an index, tensor name -> file name, all of whose files must lie beside it.

    `names` are those of the files that do."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QuantizeError(f"{index}: has no weight_map of tensor names to file names")
    for name, file_name in weight_map.items():
        if not re.fullmatch(r"[^/\\\0]+\.(safetensors|bin|pth?)", str(file_name)):
            problem = f"{name!r} is in {file_name!r}, no file of this folder that may hold tensors"
            raise QuantizeError(f"{index}: {problem}")
    listed = set(weight_map.values())
    missing = sorted(name for name in listed if not (index.parent / name).exists())
    if missing:
        remedy = "copy or download it again"
        others = sorted(set(names) - listed)
        if weight_map.keys() <= tensors_in(index.parent, others):
            stale = f"it may be stale, since {quote_names(others)} have all its tensors"
            remedy = f"{stale}: remove it if they are the model"
        raise QuantizeError(f"{index} names {missing[0]}, which is missing: {remedy}")
    return weight_map


def tensors_in(folder: Path, names: list[str]) -> set[str]:
    """Collect the names of all tensors in those of these files that can be read."""
    tensors: set[str] = set()
    for name in names:
        try:
            file = WeightsFile(folder / name)
        except QuantizeError:
            continue
        tensors |= file.infos.keys()
        file.close()
    return tensors


# What config.json says.

# The largest integer that is believed, of words for example.
MAX_INTEGER = 1 << 24

# The largest count of layers or experts.
MAX_COUNT = 10_000


def raw_values(config: dict, *keys: str) -> list:
    """List the values of these keys in config.json, then those in its language model's config.

    That is the entry `text_config` or one of a similar name."""
    values = []
    for key in keys:
        value = config.get(key)
        # ERNIE lists the experts for text and those for images.
        entries = value if isinstance(value, list) else [value]
        values += [entry for entry in entries if entry is not None]
    for key, nested in config.items():
        if isinstance(nested, dict) and LANGUAGE_KEY.match(key):
            values += raw_values(nested, *keys)
    return values


def as_integer(value: object) -> int | None:
    """Return the integer that 12, 12.0 or "12" in JSON stands for; None for anything else."""
    is_text = isinstance(value, str) and re.fullmatch(r" *[0-9]{1,20} *", value)
    is_whole = isinstance(value, float) and value.is_integer()
    if is_text or is_whole:
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_INTEGER else None


def as_count(value: object) -> int | None:
    """Return a count of layers or experts; None for anything else."""
    number = as_integer(value)
    return number if number is not None and number <= MAX_COUNT else None


def as_string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def as_boolean(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def config_values(config: dict, *keys: str) -> list:
    """List the values of these keys that are of the kind that CONFIG_KEYS says.

    `odd_config_values` names the others."""
    values = []
    for convert, known in CONFIG_KEYS.items():
        of_kind = [key for key in keys if key in known]
        values += map(convert, raw_values(config, *of_kind))
    return [value for value in values if value is not None]


def architectures_of(config: dict) -> list[str]:
    """List the classes that config.json names for the whole model, and not those for its parts."""
    return config_values(only(config, "architectures"), "architectures")


def only(config: dict, key: str) -> dict:
    """Reduce config.json to the one entry for the whole model, without those for its parts."""
    return {key: config.get(key)}


def odd_config_values(config: dict) -> list[str]:
    """List the keys that are read here and have a value of the wrong kind, each with the value."""
    odd = []
    for convert, keys in CONFIG_KEYS.items():
        for key in keys:
            wrong = [value for value in raw_values(config, key) if convert(value) is None]
            if wrong:
                odd.append(f"{key} {shorten(json.dumps(wrong[0]), 40)}")
    return odd


def model_dtype(config: dict) -> str | None:
    """Return the safetensors name of the 16-bit dtype in config.json, in which engines compute.

    Returns None if config.json names none."""
    dtypes = {"bfloat16": "BF16", "float16": "F16", "half": "F16"}
    for name in config_values(config, "dtype", "torch_dtype"):
        name = name.removeprefix("torch.")
        if name in dtypes:
            return dtypes[name]
    return None


def pop_quantization(value: dict | list, place: str = "") -> dict[str, object]:
    """Remove the entries about quantization from a JSON value, and return them by their places."""
    entries: dict[str, object] = {}
    parts = dict(value if isinstance(value, dict) else enumerate(value))
    for key, part in parts.items():
        if key in QUANTIZATION_KEYS:
            entries[place + key] = value.pop(key)
        elif isinstance(part, dict | list):
            entries |= pop_quantization(part, f"{place}{key}.")
    return entries


def describe_quantization(entries: dict[str, object], folder: Path) -> list[str]:
    """List what says how the model is quantized, each with its method.

    That is the entries that were in config.json, and files beside it. An entry of null says
    nothing."""
    described = []
    for place, entry in entries.items():
        if entry is not None:
            described.append(f"{place} ({quantization_method(entry)}) of {CONFIG_NAME}")
    for name in QUANTIZATION_FILES:
        path = folder / name
        if path.exists():
            try:
                method = quantization_method(read_json(path))
            except QuantizeError:
                method = "not readable"
            described.append(f"{name} ({method})")
    return described


def quantization_method(entry: object) -> str:
    """Name the method in an entry or a file about quantization, as far as it says so."""
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

    # ModelOpt's.
    nested = entry.get("quantization")
    if isinstance(nested, dict):
        return quantization_method(nested)
    bits = as_integer(entry.get("bits"))
    return "no method" if bits is None else f"{bits} bits"


# ---- Architectures: stacks of experts, and what a tensor is for ----------------------------------

# Patterns of weights' names, by the conventions of the hub's architectures. `find_kinds` finds
# other embeddings, heads and routers by their shape and place.
EMBEDDING_NAME = (
    r"(^|\.)(\w*embed(?!_out)\w*(\.(shard_)?\d+)?|\w+_emb|\w*Embedder_\d+|wte|wpe|\w+_bias"
    r"|\w+_token|query_\d+\w*)\.weight$"
    r"|^(\w+\.)?shared\.weight$"
)
HEAD_NAME = (
    r"(^|\.)(lm_head|embed_out|score|classifier|output_layer|shared_head\.head)\.weight$"
    r"|^output\.weight$"
)
ROUTER_NAME = r"(^|\.)(gate|router|shared_expert_gate)(\.\w+)?\.weight$"

# A weight beside experts that has a row for each, and one of these names, is no router.
NO_ROUTER = r"_proj$|^(shared_|self_)|attn|attention|(^|\.)mlp(\.|$)|experts"

# A weight with a row for each word: of a head, or of either in a layer.
HEAD_WORDS = r"head|output|logits|unembed|classifier|score"
VOCABULARY_WORDS = r"head|output_layer|logits|embed|vocab|wte"

# An embedding with one of these in its name is not of words.
NO_WORDS = r"pos|wpe|type|bias"

# Rows that an embedding or a head may have beyond vocab_size.
EXTRA_WORDS = 64

# Layers that predict further tokens (MTP), by their names. Others are numbered after the model's.
MTP_NAMES = re.compile(r"(^|\.)(mtp|nextn)")
# Keys of config.json that count such layers.
MTP_COUNTS = re.compile(
    r"num_nextn_predict_layers$|num_mtp_\w*$|mtp_\w*(num|layers|modules|depth)\w*$"
)
# Their kinds of weights: of the layers, and of the projection with which they begin, of a state
# and an embedding, which is in no such block.
MTP = "MTP"
MTP_ENTRY = "entry of MTP"
MTP_ENTRY_NAME = r"(^|\.)(eh_proj|fc|input_proj|mtp_linear_proj)(\.\d+)?\.weight$"
NO_MTP_ENTRY = r"attn|attention|mlp|experts|mixer|feed_forward|ffn"

# What has vLLM draft with them. Without blanks, at which it would be cut into lines.
SERVE_WITH_MTP = """--speculative-config '{"method":"mtp","num_speculative_tokens":1}'"""

# Kinds of other layers, for the tables that are printed. The first pattern that matches counts.
LAYER_KINDS = {
    "experts": r"\.experts\.\d+\.",
    "shared experts": r"\.shared_experts?\.",
    "attention": r"attn|attention|\.[qkvo]_proj\.|qkv|\.w[qkvo]\.",
    "Mamba": r"\.(in_proj|out_proj|x_proj|dt_proj)\.|mamba|ssm",
    "MLP": (
        r"mlp|ffn|feed_forward|(gate|up|down)_proj|fc\d|dense_(h_to|4h)|\.(w[123]|wi|wo)(_\d)?\."
    ),
}

# Keys of config.json.
EXPERT_COUNTS = (
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "moe_num_experts",
)
EXPERT_WIDTHS = (
    "moe_intermediate_size",
    "intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
)

EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
)

# Names of an expert's projections: gate, up and down.
GATED = ("gate_proj", "up_proj", "down_proj")
UNGATED = ("", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")

# Instead of a new name in `Oddity.in_memory`: it depends on more than the name in the file.
UNKNOWN = ""


# A row is equal to itself alone, since dicts have no hash.
@dataclass(frozen=True, eq=False)
class Oddity:
    """Exceptions by model type, where names and shapes alone would mislead."""

    # The types that the row is about, as config.json names them, separated by blanks.
    model_types: str

    # The names of an expert's gate, up and down projection where each expert has weights of its
    # own, as `save_pretrained` writes them and as vLLM 0.29.0 knows them (its models'
    # `ckpt_*_proj_name`). The gate is "" where experts have none.
    projections: tuple[str, ...] = ()

    # What else `save_pretrained` names otherwise than `model.state_dict()`: pattern -> replacement.
    renames: Mapping[str, str] = field(default_factory=dict)

    # Whether vLLM also reads stacks of experts as they are.
    whole_in_vllm: bool = True

    # Whether transformers makes each expert an nn.Linear once anything is quantized.
    linear_experts: bool = False

    # Whether the layers' weights lie as (in, out).
    conv1d: bool = False

    # Why stacks of experts cannot be read as one weight an expert, in any format.
    problem: str = ""

    # Why engines would not load the experts that a stack is read as. {} stands for the model type.
    problem_of_engines: str = ""

    # What helps against either problem, where it is not to exclude the stacks.
    remedy: str = ""

    # What transformers renames as it loads a model: pattern of names in the files -> replacement.
    # They apply one after the other. A "|" separates the names that one tensor is split into.
    in_memory: Mapping[str, str] = field(default_factory=dict)

    # What vLLM renames, in the same way. {layers} stands for the number of the model's layers.
    in_vllm: Mapping[str, str] = field(default_factory=dict)

    # A pattern of the weights that transformers joins or permutes as it loads them.
    computed: str = ""

    # A pattern of the tensors that it joins or permutes so, and beside packed layers reads only
    # packed.
    joined: str = ""

    # Ends of layers' names in memory, separated by blanks. transformers stops at a folder in which
    # one of them is the end of no packed layer's name.
    packed_at_least: str = ""

    # Whether transformers asks its layers for dense weights, and so must decode them while loading.
    asks_for_dense: bool = False

    # Whether it must do so where the head is tied, since it takes such a head for a packed layer.
    other_head: bool = False

    # A pattern of names. A checkpoint that has such has half as many layers as config.json says.
    halved: str = ""

    @property
    def tells_experts(self) -> bool:
        """Whether this row says how loaders know the experts of its types."""
        return bool(self.projections or self.problem or self.problem_of_engines)

    @property
    def tells_loading(self) -> bool:
        """Whether this row says what transformers makes of names or tensors as it loads them."""
        names = self.in_memory or self.computed or self.joined or self.packed_at_least
        return bool(names or self.asks_for_dense)

    @property
    def has_gate(self) -> bool:
        """Whether the experts are known to have a gate."""
        return bool(self.projections and self.projections[0])

    def is_about(self, model_type: str | None) -> bool:
        """Check whether this is a row about a model type."""
        return model_type in self.model_types.split()

    def projections_of(self, role: str) -> tuple[str, ...]:
        """Return the names of the weights that a stack is cut into, in their order."""
        gate, up, down = self.projections or GATED
        names = {
            "gate_up_proj": (gate, up),
            "gate_proj": (gate,),
            "up_proj": (up,),
            "down_proj": (down,),
        }
        return names[role]

    def renamed(self, name: str) -> str:
        """Rename a tensor of a state dict as `save_pretrained` does."""
        for pattern, replacement in self.renames.items():
            name = re.sub(pattern, replacement, name)
        return name


# Renamings that several rows share.
SPARSE_BLOCK = {r"\.mlp\.": ".block_sparse_moe."}
TO_Q_K_V = {
    r"\.self_attn\.to_([qkv])\.": r".self_attn.\1_proj.",
    r"\.self_attn\.to_out\.": ".self_attn.o_proj.",
}
FORGET_GATE = {r"self_attn\.f_([ab])_proj\.": r"self_attn.forget_gate.f_\1_proj."}
JOINED_CONVOLUTIONS = r"\.[qkv]_conv1d\.weight$"
MLP1 = {
    r"^mlp1\.1\.": "multi_modal_projector.linear_1.",
    r"^mlp1\.3\.": "multi_modal_projector.linear_2.",
}

# What transformers 5.24.0 renames as it loads a model (conversion_mapping.py), where it renames
# layers themselves and not only what wraps them. tests/test_model_types.py compares the two, type
# by type.
RENAMED_WHEN_LOADED = (
    Oddity(
        "axk2",
        in_memory={
            "W_down": "mlp.fc1",
            "W_up": "mlp.fc2",
            r"self_attn\.q_b_proj\.": "self_attn.q_gate_proj.",
        },
    ),
    Oddity(
        "bailing_hybrid sarvam_moe",
        in_memory={
            r"\.attention\.": ".self_attn.",
            r"\.query_key_value\.": ".q_proj.|.k_proj.|.v_proj.",
            r"self_attn\.f_proj\.": "self_attn.forget_gate.f_proj.",
            r"\.self_attn\.dense\.": ".self_attn.o_proj.",
        },
        joined=JOINED_CONVOLUTIONS,
    ),
    Oddity("cosmos3_omni", in_memory=TO_Q_K_V),
    Oddity(
        "cosmos3_edge",
        in_memory={
            **TO_Q_K_V,
            r"\.mlp\.up_proj\.": ".mlp.fc1.",
            r"\.mlp\.down_proj\.": ".mlp.fc2.",
        },
    ),
    Oddity(
        "deepseek_v4",
        in_memory={
            r"\.attn\.": ".self_attn.",
            r"\.ffn\.": ".mlp.",
            r"\.indexer\.compressor\.": ".compressor.indexer.",
            r"\.indexer\.weights_proj\.": ".compressor.indexer.scorer.weights_proj.",
            r"\.indexer\.wq_b\.": ".compressor.indexer.q_b_proj.",
            r"\.w(q_a|q_b|kv)\.": r".\1_proj.",
            r"\.wgate\.": ".gate_proj.",
            r"\.wo_([ab])\.": r".o_\1_proj.",
            r"\.shared_experts\.w1\.": ".shared_experts.gate_proj.",
            r"\.shared_experts\.w2\.": ".shared_experts.down_proj.",
            r"\.shared_experts\.w3\.": ".shared_experts.up_proj.",
        },
    ),
    # An attention block and an MLP are one layer here, and two in config.json.
    Oddity(
        "dory",
        in_memory={
            r"\.mixer\.": UNKNOWN,
            r"\.self_attn\.g_proj\.": ".self_attn.gate_proj.",
        },
        halved=r"\.(self_attn|mlp)\.",
    ),
    Oddity(
        "dots3_note dots3_note_audio_encoder dots3_note_vision_encoder",
        in_memory={
            r"audio_adapter\.|dots_encoder\.": UNKNOWN,
            r"(blocks\.\d+\.mlp)\.fc1\.": r"\1.gate_proj.",
            r"(blocks\.\d+\.mlp)\.fc2\.": r"\1.down_proj.",
            r"(blocks\.\d+\.mlp)\.fc3\.": r"\1.up_proj.",
        },
        joined=r"blocks\.\d+\.mlp\.experts\.\d+\.fc\d\.weight$",
    ),
    Oddity(
        "exaone",
        in_memory={
            r"^transformer\.h\.": "model.layers.",
            r"\.attn\.attention\.": ".self_attn.",
            r"\.self_attn\.out_proj\.": ".self_attn.o_proj.",
            r"\.mlp\.c_fc_0\.": ".mlp.gate_proj.",
            r"\.mlp\.c_fc_1\.": ".mlp.up_proj.",
            r"\.mlp\.c_proj\.": ".mlp.down_proj.",
        },
    ),
    Oddity(
        "ernie4_5_vl_moe",
        in_memory={
            r"(spatial|temporal)_linear\.0\.": r"\1_linear.fc1.",
            r"(spatial|temporal)_linear\.2\.": r"\1_linear.fc2.",
        },
        joined=r"\.mlp\.gate\.weight$",
    ),
    Oddity("glm5_next glm5_next_text", in_memory=FORGET_GATE, joined=JOINED_CONVOLUTIONS),
    Oddity(
        "gte",
        in_memory={
            r"encoder\.layer\.": "layers.",
            r"attention\.o_proj": "self_attn.o_proj",
            r"attention\.qkv_proj": "self_attn.q_proj|self_attn.k_proj|self_attn.v_proj",
            r"mlp\.up_gate_proj": "mlp.up_proj|mlp.gate_proj",
        },
    ),
    Oddity(
        "hrm_text",
        in_memory={
            r"mlp\.gate_up_proj\.": "mlp.gate_proj.|mlp.up_proj.",
            r"\.attn\.gqkv_proj\.": (
                ".self_attn.gate_proj.|.self_attn.q_proj.|.self_attn.k_proj.|.self_attn.v_proj."
            ),
            r"\.attn\.o_proj\.": ".self_attn.o_proj.",
        },
        packed_at_least="self_attn.gate_proj mlp.gate_proj",
    ),
    Oddity("hy_v3", in_memory={r"mlp\.shared_mlp\.": "mlp.shared_experts."}),
    Oddity(
        "hy_v4 hy_v4_vl hy_v4_vl_text hunyuan_vl",
        in_memory={
            r"\.linear_gate\.": ".gate_proj.",
            r"mlp\.dense_h_to_4h": "mlp.fc1",
            r"mlp\.dense_4h_to_h": "mlp.fc2",
            r"perceive\.": "patch_merger.",
        },
    ),
    Oddity("hyperclovax_vision_v2", in_memory={r"\.vision_projector\.": ".projector."}),
    Oddity(
        "inkling_mm_model inkling2 inkling2_text inkling2_loop inkling2_loop_text",
        in_memory={
            r"\.(attn\.\w+_\w+|controllers\.\w+)\.\w*weight$|sconv\.weight_proj$": UNKNOWN,
            r"visual\..*linear_\d|\.mlp\.c_(fc|proj)\.|\.proj_(in|out)\.": UNKNOWN,
            r"mlp\.w13_dn\.": "mlp.gate_proj.|mlp.up_proj.",
            r"mlp\.w2_md\.": "mlp.down_proj.",
            r"\.unembed\.": ".lm_head.",
        },
        joined=r"(^|\.)(unembed|lm_head)\.weight$",
    ),
    Oddity("jev", in_memory={"^weight$": "proj.weight"}),
    Oddity(
        "nomic_bert",
        in_memory={
            "fc11": "up_proj",
            "fc12": "gate_proj",
            "fc2": "down_proj",
        },
    ),
    Oddity(
        "jina_embeddings_v3 nomic_bert",
        in_memory={
            r"encoder\.layers": "layers",
            r"(attn|mixer)\.out_proj": "self_attn.o_proj",
            r"(attn|mixer)\.Wqkv": "self_attn.q_proj|self_attn.k_proj|self_attn.v_proj",
        },
    ),
    Oddity(
        "kimi_k25",
        in_memory={
            r"\.mlp\.fc1\.": ".mlp.fc2.",
            r"\.mlp\.fc0\.": ".mlp.fc1.",
            r"blocks\.(\d+)\.wo\.": r"blocks.\1.attn.proj.",
            r"\.wqkv\.": ".attn.q_proj.|.attn.k_proj.|.attn.v_proj.",
            r"mm_projector\.proj\.0": "mm_projector.in_proj",
            r"mm_projector\.proj\.2": "mm_projector.out_proj",
            r"vision_tower\.encoder\.": "vision_tower.",
            "blocks": "layers",
        },
    ),
    Oddity(
        "kimi_linear",
        in_memory={
            **FORGET_GATE,
            r"\.block_sparse_moe\.": ".mlp.",
        },
        joined=JOINED_CONVOLUTIONS,
    ),
    Oddity("laguna", in_memory={r"mlp\.shared_expert\.": "mlp.shared_experts."}),
    Oddity(
        "lara_mini", in_memory={r"\.in_proj\.": ".in_proj_qkv.|.in_proj_z.|.in_proj_b.|.in_proj_a."}
    ),
    Oddity("lfm3 lfm3_vl", in_memory={r"\.self_attn\.gate_proj\.": ".self_attn.g_proj."}),
    Oddity("lfm3_vl_vision", in_memory={"patchifier": "patch_embed"}),
    Oddity(
        "minimax_m3_vl",
        in_memory={
            r"\.block_sparse_moe\.(gate|shared_experts)\.": r".mlp.\1.",
            r"\.self_attn\.index_([qk])_proj\.": r".self_attn.indexer.\1_proj.",
            r"\.(gate|up)_proj\.weight": ".gate_up_proj.weight",
            r"^patch_merge_mlp\.linear_(\d)\.": r"multi_modal_projector.merge_linear_\1.",
        },
        computed=r"\.(gate|up)_proj\.weight$",
        joined=r"\.(mlp|shared_experts)\.(gate|up)_proj\.weight$",
    ),
    Oddity(
        "mistral_large4 mistral_large4_text",
        in_memory={
            r"\.wv\.": ".v_proj.",
            r"\.wo\.": ".o_proj.",
            r"\.wkv_a_with_mqa\.": ".kv_a_proj_with_mqa.",
            r"\.wkv_b\.": ".kv_b_proj.",
            r"\.wq\.": ".q_proj.",
            r"attention\.wk\.": "attention.k_proj.",
            r"\.(feed_forward|shared_experts)\.w1\.": r".\1.gate_proj.",
            r"\.(feed_forward|shared_experts)\.w2\.": r".\1.down_proj.",
            r"\.(feed_forward|shared_experts)\.w3\.": r".\1.up_proj.",
            r"(^|\.)layers\.(\d+)\.shared_experts\.": r"\1layers.\2.mlp.shared_experts.",
            r"^(?!.*vision)(.*\.)feed_forward\.": r"\1mlp.",
            r"^(?!.*vision)(.*\.)attention\.": r"\1self_attn.",
            r"\.w_in\.": ".linear_1.",
            r"\.w_out\.": ".linear_2.",
        },
        computed=r"^vision_encoder\..*\.w[qk]\.",
    ),
    Oddity(
        "molmo2 molmo2_text",
        in_memory={
            r"self_attn\.att_proj": "self_attn.q_proj|self_attn.k_proj|self_attn.v_proj",
            r"self_attn\.attn_out": "self_attn.o_proj",
            r"mlp\.ff_proj": "mlp.up_proj|mlp.gate_proj",
            r"mlp\.ff_out": "mlp.down_proj",
            r"\.transformer\.(res)?blocks\.": ".layers.",
            r"\.attention\.w([qkvo])": r".self_attn.\1_proj",
            r"\.feed_forward\.w1": ".mlp.fc1",
            r"\.feed_forward\.w2": ".mlp.fc2",
            r"image_pooling_2d\.w([qkvo])": r"image_pooling_2d.\1_proj",
            r"image_projector\.w1": "image_projector.gate_proj",
            r"image_projector\.w2": "image_projector.down_proj",
            r"image_projector\.w3": "image_projector.up_proj",
        },
        packed_at_least="mlp.up_proj",
    ),
    Oddity(
        "nemo_speechlm",
        in_memory={
            r"^perception\.proj\.": "multi_modal_projector.",
            r"^(perception|ctc_timestamp)\.": UNKNOWN,
        },
        computed=r"\.attn\.w_qkv\.",
        packed_at_least=".self_attn.q_proj",
    ),
    Oddity("nemotron_h_omni NemotronH_Omni_Reasoning_V3", in_memory=MLP1),
    Oddity("olmo_hybrid", joined=JOINED_CONVOLUTIONS),
    Oddity("phimoe", in_memory={r"\.block_sparse_moe\.gate\.weight": ".mlp.router.weight"}),
    Oddity(
        "qianfan_ocr",
        in_memory={
            **MLP1,
            r"(layers\.\d+)\.attn\.proj\.": r"\1.attention.projection_layer.",
            r"attn\.qkv\.": "attention.q_proj.|attention.k_proj.|attention.v_proj.",
        },
        packed_at_least="attention.q_proj",
    ),
    Oddity("qwen4_exp qwen4_exp_text", joined=r"\.ngram_embedding\.shard_\d+\.weight$"),
    Oddity(
        "radio",
        in_memory={
            r"\.patch_generator\.video_embedder\.": ".embeddings.video_patch_projection.",
            r"\.patch_generator\.embedder\.": ".embeddings.patch_projection.",
            r"radio_model\.model\.blocks": "encoder.layer",
            r"attn\.proj": "attention.o_proj",
            r"attn\.qkv": "attention.q_proj|attention.k_proj|attention.v_proj",
        },
    ),
    Oddity(
        "step3p7 step3p5_vision",
        in_memory={
            r"\.share_expert\.": ".mlp.shared_experts.",
            r"vit_large_projector": "multi_modal_projector",
            r"transformer\.resblocks\.": "layers.",
            r"\.mlp\.c_fc\.": ".mlp.fc1.",
            r"\.mlp\.c_proj\.": ".mlp.fc2.",
            r"\.attn\.": ".self_attn.",
            r"attn\.in_proj_weight": "attn.q_proj.weight|attn.k_proj.weight|attn.v_proj.weight",
        },
        joined=r"\.moe\.(gate|up)_proj\.weight$",
    ),
    Oddity(
        "timesfm2_5",
        in_memory={
            "ff0": "fc1",
            "ff1": "fc2",
        },
    ),
    Oddity("ultrabert", in_memory={r"^cls\.": "head.decoder."}),
    Oddity("ultravbert", in_memory={r"^head\.decoder\.": "lm_head."}),
    Oddity(
        """deepseek_ocr2 unlimited_ocr unlimited_ocr_sam_vision_model unlimited_ocr_vision
        unlimited_ocr_vision_encoder""",
        in_memory={
            r"(^|\.)blocks\.": r"\1layers.",
            r"(^|\.)transformer\.": r"\1encoder.",
            r"qkv_proj\.weight": "q_proj.weight|k_proj.weight|v_proj.weight",
            r"projector\.layers\.": "multi_modal_projector.",
        },
    ),
    Oddity(
        "unlimited_ocr unlimited_ocr_vision unlimited_ocr_vision_encoder",
        packed_at_least="q_proj",
    ),
    # Encoders of images and sound, in whose files layers have altogether other names.
    Oddity(
        "cohere_asr",
        in_memory={
            r"log_softmax\.mlp\.layer0": "proj_out",
            r"encoder|decoder": UNKNOWN,
        },
    ),
    Oddity(
        "gradium_phonon_tts",
        in_memory={r"^flow_lm\.": UNKNOWN},
        computed=r"in_proj\.",
        packed_at_least="self_attn.q_proj",
    ),
    Oddity("tipsv2_dpt", in_memory={r"_head\.": UNKNOWN}),
    Oddity(
        """altclip audio-spectrogram-transformer beit conditional_detr d_fine deformable_detr
        deit depth_pro detr dinov2 dinov2_with_registers ijepa lw_detr lw_detr_vit
        maskformer pixio pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4 rf_detr
        rf_detr_dinov2 rt_detr rt_detr_v2 sapiens2 segformer swin tipsv2 tipsv2_text_model
        tipsv2_vision_model vit vit_mae vit_msn vivit""",
        in_memory={r"\.\d+\.": UNKNOWN},
        computed=r"in_proj\.|qkv\.|weights_in\.|\.w12\.",
    ),
    Oddity(
        """depth_anything depth_pro dinov2 dinov2_with_registers prompt_depth_anything sapiens2
        tipsv2 tipsv2_dpt tipsv2_vision_model""",
        packed_at_least="mlp.gate_proj",
    ),
)

ODDITIES = (
    # Names of experts, from transformers 5.24.0, conversion_mapping.py, which is for loading and so
    # runs the other way. Each type there has a row (tests/test_model_types.py). Stacks of a type
    # without one are refused for engines.
    Oddity(
        """afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 dots3_note_text
        flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe jamba
        longcat_flash mellum olmoe qwen2_moe qwen3_moe qwen3_next qwen3_5_moe
        qwen3_5_moe_text qwen3_omni_moe qwen3_omni_moe_thinker qwen3_omni_moe_text qwen4_exp
        qwen4_exp_text sarvam_mla solar_open unlimited_ocr_text""",
        projections=GATED,
    ),
    Oddity("nemotron_h", projections=UNGATED, whole_in_vllm=False),
    Oddity(
        "ernie4_5_moe",
        projections=GATED,
        renames={r"\.mlp\.gate\.moe_statics\.": ".mlp.moe_statics."},
    ),
    # The stacks are transposed, too.
    Oddity("llama4 llama4_text", projections=GATED, whole_in_vllm=False, linear_experts=True),
    Oddity("lfm2_moe", projections=MIXTRAL, whole_in_vllm=False),
    Oddity(
        "mixtral minimax minimax_m2", projections=MIXTRAL, renames=SPARSE_BLOCK, whole_in_vllm=False
    ),
    Oddity(
        "phimoe",
        projections=MIXTRAL,
        renames={
            r"\.mlp\.router\.weight$": ".mlp.gate.weight",
            **SPARSE_BLOCK,
        },
        whole_in_vllm=False,
    ),
    # In transformers 5.24.0 gpt_oss slices `[..., ::2]`. The others' models slice so, too, or their
    # conversions say Interleave.
    Oddity(
        """gpt_oss openai_privacy_filter inkling_mm_model inkling_text inkling2 inkling2_text
        inkling2_loop inkling2_loop_text""",
        problem="with gate and up rows that alternate",
    ),
    # The hub has stacks, too, and transformers 5.24.0 reads no other form.
    Oddity(
        """aria aria_text dbrx deepseek_ocr2_text diffusion_gemma diffusion_gemma_text
        ernie4_5_vl_moe_text gemma4 gemma4_text glm4v_moe_text granitemoe granitemoe_swa
        granitemoehybrid granitemoeshared hy_v4 hy_v4_vl hy_v4_vl_text jetmoe lara_mini
        minimax_m3_vl_text mistral4 muse_spark muse_spark_text qwen3_vl_moe
        qwen3_vl_moe_text step3p5 step3p7 zaya""",
        problem_of_engines=(
            "as loaders know {} alone: transformers would leave separate experts random"
        ),
    ),
    # `save_pretrained` of transformers 5.24.0 gives other names to much more than experts.
    Oddity(
        """axk1 axk2 bailing_hybrid deepseek_ocr2 deepseek_v4 dots3_note
        dots3_note_vision_encoder ernie4_5_vl_moe exaone_moe flint glm5_next glm5_next_text
        hy_v3 kimi_k25 kimi_linear kolibri1 laguna mimo_v2_flash minimax_m3_vl
        mistral_large4 mistral_large4_text sarvam_moe unlimited_ocr""",
        problem_of_engines=(
            "named as in model.state_dict(), where {} has other names than loaders know"
        ),
        remedy="save it with model.save_pretrained()",
    ),
    *RENAMED_WHEN_LOADED,
    # vLLM 0.33.0, whisper.py: its layers look up such names.
    Oddity(
        "whisper",
        in_vllm={
            r"(layers\.\d+)\.": r"\1.layers.",
            r"\.fc([12])\.": r".mlp.fc\1.",
        },
    ),
    # vLLM 0.33.0, mimo_mtp.py and ernie_mtp.py: layers that predict further tokens are looked up as
    # those after the model's own.
    Oddity("mimo", in_vllm={r"\bmtp_layers\.0\.": "layers.{layers}."}),
    Oddity("ernie4_5_moe", in_vllm={r"\bmtp_block\.0\.": "layers.{layers}."}),
    # The models of transformers 5.24.0 that use Conv1D of pytorch_utils.
    Oddity("clvp clvp_decoder gpt2 openai-gpt imagegpt decision_transformer", conv1d=True),
    # The models of transformers 5.24.0 that ask layers for their `weight` as they are made or run.
    Oddity(
        """altclip_vision_model blt_global_transformer blt_local_decoder blt_local_encoder
        blt_patcher bridgetower bridgetower_text_model bridgetower_vision_model
        chinese_clip_vision_model chmv2 clap clap_audio_model clap_text_model clipseg
        clipseg_text_model clipseg_vision_model clvp clvp_decoder clvp_encoder
        colmodernvbert cvt d_fine deformable_detr depth_anything depth_pro dinov2
        dinov2_with_registers dinov3_vit emu3_vqgan esmfold2 falcon falcon_mamba
        fastspeech2_conformer fastspeech2_conformer_with_hifigan gpt_bigcode grounding-dino
        groupvit groupvit_text_model groupvit_vision_model hiera ijepa kosmos-2
        kosmos_2_text_model kosmos_2_vision_model longt5 lw_detr lw_detr_vit mamba mamba2
        mask2former mgp-str mlcd_vision_model mm-grounding-dino modernbert
        modernbert-decoder modernvbert mt5 musicgen musicgen_melody nanochat neomme neucodec
        omdet-turbo oneformer owlv2 owlv2_text_model owlv2_vision_model owlvit
        owlvit_text_model owlvit_vision_model pe_audio phi4_multimodal_vision pix2struct
        pix2struct_text_model pix2struct_vision_model pop2piano pp_doclayout_v2
        pp_doclayout_v3 pp_doclayout_v4 prompt_depth_anything pvt pvt_v2 qwen2_5_omni radio
        recurrent_gemma regnet rf_detr rf_detr_dinov2 rt_detr rt_detr_v2 rwkv sam3_lite_text
        sam3_lite_text_text_model sapiens2 seggpt siglip siglip2 siglip2_text_model
        siglip2_vision_model siglip_text_model siglip_vision_model speech-encoder-decoder
        swiftformer swin2sr switch_transformers t5 timesformer tipsv2_dpt
        tipsv2_vision_model udop umt5 unispeech unispeech-sat videoprism
        videoprism_text_model videoprism_vision_model vitdet vitpose vitpose_backbone vjepa2
        wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm xclip xclip_text_model
        xclip_vision_model xcodec xcodec2 xlstm zamba2""",
        asks_for_dense=True,
    ),
    # Those with a tied head that is not called lm_head: it is in no file, and so in no entry.
    Oddity(
        """albert bark bert bert-generation big_bird biogpt blip blip-2 camembert canary
        convbert deberta deberta-v2 distilbert electra encoder-decoder ernie esm
        fine_acoustics fnet gpt_neox_japanese granite_speech5_ctc gte ibert instructblip
        instructblipvideo jina_embeddings_v3 kosmos-2 kosmos-2.5 layoutlm longformer
        megatron-bert mobilebert modernbert modernbert-decoder moonshine mpnet mra neomme
        nomic_bert nystromformer rag roberta roberta-prelayernorm roc_bert roformer
        shieldgemma2 t5gemma trocr whisper xlm-roberta xlm-roberta-xl xmod""",
        other_head=True,
    ),
)


def oddity_with(field_name: str, config: dict) -> Oddity:
    """Find the row about the model's type, or else its language model's, that has this field.

    Returns an empty row if there is none."""
    for model_type in config_values(config, "model_type"):
        for row in ODDITIES:
            if getattr(row, field_name) and row.is_about(model_type):
                return row
    return Oddity("")


@dataclass(frozen=True)
class Loading:
    """What transformers renames or computes of a part of a model as it loads it."""

    # A pattern of the names that this applies to.
    scope: str
    oddity: Oddity

    def applies_to(self, name: str) -> bool:
        """Check whether a tensor of the files is in this part."""
        return bool(re.search(self.scope, name))


def loadings_of(config: dict, scope: str = "") -> Iterator[Loading]:
    """Yield what is renamed or computed as a model is loaded.

    The scope is that of all names, or for a part beside the language model that of towers."""
    model_type = as_string(config.get("model_type"))
    for row in ODDITIES:
        if row.tells_loading and row.is_about(model_type):
            yield Loading(scope, row)
    for key, nested in config.items():
        if isinstance(nested, dict):
            inner = scope if LANGUAGE_KEY.match(key) else TOWER_NAMES
            yield from loadings_of(nested, inner)


def names_in_memory(name: str, loadings: list[Loading]) -> tuple[str, ...] | None:
    """Return the names that transformers gives a file's tensor; None if that is not known."""
    names = [name]
    for loading in loadings:
        if not loading.applies_to(name):
            continue
        for pattern, replacement in loading.oddity.in_memory.items():
            if not any(re.search(pattern, old) for old in names):
                continue
            if replacement == UNKNOWN:
                return None
            names = rename_or_split(names, pattern, replacement.split("|"))
    return tuple(names)


def renames_in_vllm(config: dict) -> dict[str, str]:
    """Return what vLLM renames in a model's names: pattern -> replacement."""
    count = max(config_values(config, *LAYER_COUNTS), default=0)
    renames = oddity_with("in_vllm", config).in_vllm
    return {pattern: new.replace("{layers}", str(count)) for pattern, new in renames.items()}


def name_in_vllm(name: str, renames: Mapping[str, str]) -> str:
    """Return the name under which vLLM looks up entries for a file's tensor."""
    for pattern, replacement in renames.items():
        name = re.sub(pattern, replacement, name)
    return name


def rename_or_split(names: list[str], pattern: str, replacements: list[str]) -> list[str]:
    """Replace a pattern in each name, once by each of the replacements."""
    renamed = []
    for name in names:
        renamed += [re.sub(pattern, replacement, name, count=1) for replacement in replacements]
    return list(dict.fromkeys(renamed))


def separate_experts_in_engines(config: dict) -> str:
    """Return why engines would not load the experts that a stack is read as; "" if they would."""
    types = config_values(config, "model_type")
    row = oddity_with("tells_experts", config)
    if not row.tells_experts:
        model = f"model_type {types[0]!r}" if types else f"no model_type in {CONFIG_NAME}"
        return f"and with {model} it is not known how loaders name separate experts"
    named = [model_type for model_type in types if row.is_about(model_type)]
    return row.problem_of_engines.format(named[0])


@dataclass(frozen=True)
class ExpertStack:
    """A tensor that holds all routed experts of a layer."""

    info: TensorInfo

    # The 2-D weights that it is read as, expert by expert; none if its layout is not known.
    weights: list[TensorInfo]

    # Why it is not read so, as the end of a sentence; "" if it is.
    problem: str

    # Whether vLLM also reads the stack as it is.
    whole_in_vllm: bool = True


@dataclass(frozen=True)
class StackLayout:
    """How the stacks of a layer's experts lie."""

    # Why they cannot be read as one weight an expert, as the end of a sentence; "" if they can.
    problem: str = ""

    # Whether each expert's weight lies as (in, out).
    transposed: bool = False


def find_expert_stacks(checkpoint: Checkpoint, for_engines: bool) -> dict[str, ExpertStack]:
    """Find every tensor that holds a layer's routed experts together, by its name."""
    config = checkpoint.config
    oddity = oddity_with("projections", config)
    counts = config_values(config, *EXPERT_COUNTS)
    problem_in_engines = separate_experts_in_engines(config) if for_engines else ""
    stacks: dict[str, ExpertStack] = {}

    # Stacks whose names tell their roles: by the module that holds a layer's experts, then by role.
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        if not is_expert_stack(info, counts):
            continue
        match = STACK_PATTERN.match(name)
        if len(info.shape) != 3 or not match:
            stacks[name] = ExpertStack(info, [], "in a layout that is not known")
            continue
        role = role_of_stack(match)
        layer = layers.setdefault(f"{match['place']}experts", {})
        if role in layer:
            raise QuantizeError(TWO_COPIES.format(quote_names([layer[role].name, name])))
        layer[role] = info

    for module, layer in layers.items():
        layout = find_layout(module, layer, checkpoint, oddity)
        for role, info in layer.items():
            weights = []
            if not layout.problem:
                weights = list(expert_weights(info, module, role, oddity, layout.transposed))
            problem = layout.problem or problem_in_engines
            stacks[info.name] = ExpertStack(info, weights, problem, oddity.whole_in_vllm)
    return stacks


def is_expert_stack(info: TensorInfo, counts: list[int]) -> bool:
    """Check whether a tensor holds routed experts together.

    Its name tells it, or that it is in a layer and has as many parts as one of `counts` says."""
    if info.dtype not in FLOAT_DTYPES or re.search(r"conv|pos|embed|table", info.name):
        return False

    # DBRX's are 2-D.
    if len(info.shape) == 2:
        return bool(re.search(r"\.experts(\.[a-z]\w*)+(?<!weight)(?<!bias)$", info.name))

    # With fewer rows or columns, it is a convolution.
    if len(info.shape) != 3 or min(info.shape[1:]) < CODES_PER_WORD:
        return False
    if re.search(r"(^|[._])(experts?|moe)[._]", info.name):
        return True
    is_counted = info.shape[0] > 1 and info.shape[0] in counts
    return is_counted and bool(re.search(r"\.\d+\.", info.name))


def role_of_stack(match: re.Match) -> str:
    """Return which projections a stack holds, from a match of STACK_PATTERN."""
    if match["projection"]:
        return match["projection"]
    # Granite's are gated, too.
    return "gate_up_proj" if match["linear"] == "input_linear" else "down_proj"


def find_layout(
    module: str, layer: dict[str, TensorInfo], checkpoint: Checkpoint, oddity: Oddity
) -> StackLayout:
    """Find how a layer's stacks, by role, lie."""
    problem = oddity_with("problem", checkpoint.config).problem
    if problem:
        return StackLayout(problem)

    bias = re.compile(rf"{re.escape(module)}\.(?!.*correction)\w*bias$")
    for name in checkpoint.tensors:
        if bias.match(name):
            return StackLayout(f"that have biases ({name!r}), too")

    if not has_all_projections(layer, oddity):
        return StackLayout("but not all projections of the layer's experts are there")

    if len({info.shape[0] for info in layer.values()}) > 1:
        return StackLayout("and the layer's other stacks hold more or fewer")

    rows, columns = layer["down_proj"].shape[1:]
    if "gate_up_proj" in layer:
        return layout_of_gated_pair(layer["gate_up_proj"].shape[1:], rows, columns)
    for role, info in layer.items():
        if role != "down_proj" and info.shape[1:] != (columns, rows):
            return StackLayout("of shapes that do not go together")
    return layout_by_config(rows, columns, checkpoint.config, oddity)


def has_all_projections(layer: Collection[str], oddity: Oddity) -> bool:
    """Check whether the roles of a layer's stacks are all that an expert consists of."""
    has_up = "gate_up_proj" in layer or "up_proj" in layer
    has_gate = "gate_up_proj" in layer or "gate_proj" in layer or not oddity.has_gate
    return "down_proj" in layer and has_up and has_gate


def layout_of_gated_pair(gate_up: tuple[int, ...], rows: int, columns: int) -> StackLayout:
    """Find the layout of gate_up_proj and down_proj from their shapes.

    `rows` and `columns` are those of down_proj. The shapes are (2 I, H) and (H, I), or transposed
    (H, 2 I) and (I, H). No shapes fit both."""
    if gate_up == (2 * columns, rows):
        return StackLayout()
    if gate_up == (columns, 2 * rows):
        return StackLayout(transposed=True)
    return StackLayout("of shapes that are not a gated pair's")


def layout_by_config(rows: int, columns: int, config: dict, oddity: Oddity) -> StackLayout:
    """Find the layout of up_proj and down_proj from config.json.

    `rows` and `columns` are those of down_proj: H and I or, transposed, I and H. Their shapes
    alone do not tell which."""
    hidden = config_values(config, "hidden_size", "moe_latent_size")
    widths = config_values(config, *EXPERT_WIDTHS)
    may_be_straight = rows in hidden and columns in widths
    may_be_transposed = columns in hidden and rows in widths
    if may_be_straight == may_be_transposed and not oddity.projections:
        keys = "(hidden_size, moe_intermediate_size)"
        return StackLayout(f"and {CONFIG_NAME} {keys} does not tell whether transposed")
    return StackLayout(transposed=may_be_transposed and not may_be_straight)


def expert_weights(
    stack: TensorInfo, module: str, role: str, oddity: Oddity, transposed: bool
) -> Iterator[TensorInfo]:
    """Yield the 2-D weights (out, in) that a stack is read as, expert by expert.

    The stack is (experts, out, in) or, transposed, (experts, in, out)."""
    if transposed:
        in_features, out_features = stack.shape[1:]
    else:
        out_features, in_features = stack.shape[1:]
    names = oddity.projections_of(role)
    shape = (out_features // len(names), in_features)
    itemsize = DTYPE_BITS[stack.dtype] // 8

    for expert in range(stack.shape[0]):
        expert_start = expert * out_features * in_features * itemsize
        for number, name in enumerate(names):
            part = f"{module}.{expert}.{name}.weight"
            first_row = number * shape[0]
            if transposed:
                start = expert_start + first_row * itemsize
                yield stack.transposed_part(part, shape, start, stride=out_features * itemsize)
            else:
                start = expert_start + first_row * in_features * itemsize
                yield stack.part(part, shape, start)


# The kind of a weight of a multimodal model that is not in its language model.
TOWERS = "vision and audio"

# Words in the paths of such weights, and in the keys of config.json under which they are described.
TOWER_PATH = re.compile(
    r"(?<![a-z])(vis(ion|ual)|image|img|video|audio|speech|sound)|acoustic|semantic_tokenizer"
    r"|vit(?![a-z])|(^|[._])(vq|mm_)|talker|wav|vocoder|projector|qformer|perceiver"
)

# Those that no other model has in a weight's path: DistilBERT's head is a `vocab_projector`.
SURE_TOWER_PATH = re.compile(
    r"(?<![a-z])(vis(ion|ual)|image|img|video|audio|speech|sound)|acoustic|semantic_tokenizer"
    r"|(^|[._])mm_|talker|vocoder"
)

# Words in the paths of modules that join a tower to a language model, and may stand inside of it.
JOINT_PATH = re.compile(r"connector|merg|adapt|resampl|align|abstract|bridge|(^|\.)mlp\d")

# A weight in a numbered layer: the list of layers, the number, and the path inside the layer.
NUMBERED_LAYER = re.compile(r"(?P<layers>.+?)\.(?P<number>\d+)\.(?P<inside>.+\..+)")

# Names of embeddings of words, for checkpoints whose config.json does not tell their shape.
WORD_EMBEDDING = re.compile(
    r"(^|\.)(tok_embeddings|embed_tokens|word_embeddings|wte|embeddings?|token_embedding)"
    r"\.(weight|embedding)$"
)

# Rows that the embedding of a multimodal model may have beyond vocab_size.
EXTRA_TOKENS = 1024


@dataclass(frozen=True)
class LanguageModel:
    """Where a checkpoint's language model is."""

    # The path of the module that holds its embedding and its layers, with a dot at the end; or "".
    root: str

    # The paths of its lists of layers: `model.layers`, or `encoder.block` and `decoder.block`.
    layers: frozenset[str]

    def holds(self, name: str) -> bool:
        """Check whether a tensor is the language model's."""
        if MTP_NAMES.search(name):
            return True
        path = name.removeprefix(self.root)
        if not name.startswith(self.root) or TOWER_PATH.search(path):
            return False
        layer = NUMBERED_LAYER.match(name, len(self.root))
        if layer:
            return self.root + layer["layers"] in self.layers
        return not JOINT_PATH.search(path)


def find_towers(tensors: list[TensorInfo | OutputTensor], config: dict) -> set[str]:
    """Name the tensors of a multimodal model that are not in its language model.

    Returns an empty set for other models, and where no language model is found."""
    matrices = [info.name for info in tensors if len(info.shape) == 2]
    is_described = has_config_of_tower(config)
    if not is_described and not any(map(SURE_TOWER_PATH.search, matrices)):
        return set()
    language_model = find_language_model(tensors, config)
    if not language_model:
        return set()

    return {info.name for info in tensors if not language_model.holds(info.name)}


def has_config_of_tower(config: dict) -> bool:
    """Check whether config.json, or its language model's part, describes a tower."""
    for key, nested in config.items():
        if not isinstance(nested, dict):
            continue
        if LANGUAGE_KEY.match(key):
            if has_config_of_tower(nested):
                return True
        elif nested and TOWER_PATH.search(key):
            return True
    return False


def find_language_model(
    tensors: list[TensorInfo | OutputTensor], config: dict
) -> LanguageModel | None:
    """Find the language model: the nearest layers to an embedding of words, or else to a head,
    which often stands outside of the model.

    Lists with as many layers as config.json says come before others. Returns None if there are no
    such layers."""
    words = find_word_embeddings(tensors, config)
    heads = [info for info in words if re.search(HEAD_NAME, info.name)]
    embeddings = [info for info in words if not re.search(HEAD_NAME, info.name)]
    return layers_around(embeddings, tensors, config) or layers_around(heads, tensors, config)


def layers_around(
    weights: list[TensorInfo | OutputTensor],
    tensors: list[TensorInfo | OutputTensor],
    config: dict,
) -> LanguageModel | None:
    """Find the nearest layers to some weights; None if there are no layers of their width."""
    counts = set(config_values(config, *LAYER_COUNTS, "encoder_layers", "decoder_layers"))
    roots = []
    lists: set[str] = set()
    counted: set[str] = set()
    for weight in weights:
        root, layers = find_nearest_layers(tensors, weight)
        roots.append(root)
        lists |= layers.keys()
        counted |= {path for path, numbers in layers.items() if len(numbers) in counts}
    lists = counted or lists
    if not lists:
        return None

    # An encoder's embedding may stand inside of the encoder.
    around = [root for root in roots if all(path.startswith(root) for path in lists)]
    return LanguageModel(max(around, key=len, default=""), frozenset(lists))


def find_word_embeddings(
    tensors: list[TensorInfo | OutputTensor], config: dict
) -> list[TensorInfo | OutputTensor]:
    """Find the embeddings and heads of words: by their shape, or else the largest so named."""
    words = config_values(config, "vocab_size", "padded_vocab_size")
    widths = config_values(config, "hidden_size", "d_model", "n_embd")
    plain = [info for info in tensors if len(info.shape) == 2 and not TOWER_PATH.search(info.name)]

    found = []
    for info in plain:
        rows, columns = info.shape
        has_rows = any(count <= rows <= count + EXTRA_TOKENS for count in words)
        if has_rows and (columns in widths or not widths):
            found.append(info)
    if found:
        return found

    named = [info for info in plain if WORD_EMBEDDING.search(info.name)]
    most_rows = max((info.shape[0] for info in named), default=0)
    return [info for info in named if info.shape[0] == most_rows]


def find_nearest_layers(
    tensors: list[TensorInfo | OutputTensor], embedding: TensorInfo | OutputTensor
) -> tuple[str, dict[str, set[str]]]:
    """Find the innermost module around an embedding that has layers of its width.

    Returns the module's path, with a dot at the end, and the numbers of its layers by the paths of
    the lists that these are in, none if there are no such layers."""
    width = embedding.shape[1]
    parts = embedding.name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        root = "".join(f"{part}." for part in parts[:depth])
        numbers: dict[str, set[str]] = {}
        of_its_width = set()
        for info in tensors:
            if not info.name.startswith(root):
                continue
            layer = NUMBERED_LAYER.match(info.name, len(root))
            if not layer or TOWER_PATH.search(layer["layers"]):
                continue
            path = root + layer["layers"]
            numbers.setdefault(path, set()).add(layer["number"])
            if len(info.shape) > 1 and width in info.shape:
                of_its_width.add(path)
        if of_its_width:
            return root, {path: numbers[path] for path in of_its_width}
    return "", {}


@dataclass(frozen=True)
class MtpPromise:
    """That config.json counts layers which predict further tokens (MTP)."""

    # The key that counts them.
    key: str
    # The number of the first, where they come after the model's own layers.
    first: int

    @staticmethod
    def of(config: dict) -> MtpPromise | None:
        """Find the first such key in config.json or a part of it; None if there is none."""
        for part in [config, *config.values()]:
            keys = part if isinstance(part, dict) else []
            for key in keys:
                if MTP_COUNTS.match(str(key)) and as_count(part[key]):
                    counts = config_values(part, *LAYER_COUNTS)
                    counts = counts or config_values(config, *LAYER_COUNTS)
                    return MtpPromise(key, max(counts, default=MAX_COUNT))
        return None


def find_mtp(names: Iterable[str], config: dict) -> set[str]:
    """Name the tensors of layers that predict further tokens."""
    promise = MtpPromise.of(config)
    found = set()
    for name in names:
        layer = LAYER_PATTERN.match(name)
        is_beyond = promise and layer and int(layer[3]) >= promise.first
        if MTP_NAMES.search(name) or (is_beyond and not re.search(TOWER_NAMES, name)):
            found.add(name)
    return found


def is_mtp_entry(info: TensorInfo | OutputTensor, widths: Collection[int]) -> bool:
    """Check whether a weight of MTP is the projection that it begins with, by its shape and place.

    `widths` are the model's."""
    rows, columns = info.shape
    fits = columns == 2 * rows and (rows in widths or not widths)
    return fits and not re.search(NO_MTP_ENTRY, info.name)


def find_kinds(tensors: list[TensorInfo | OutputTensor], config: dict) -> dict[str, str]:
    """Find the kind of layer that each weight belongs to."""
    weights = [info for info in tensors if len(info.shape) == 2 and info.name.endswith(".weight")]
    names = {info.name for info in tensors}
    towers = find_towers(tensors, config)
    mtp = find_mtp(names, config)
    widths = config_values(config, "hidden_size", "d_model", "n_embd")
    counts = config_values(config, *EXPERT_COUNTS)
    kinds: dict[str, str] = {}
    for info in weights:
        kind = kind_by_name(info, names, counts)
        if kind:
            kinds[info.name] = kind

    embeddings = [info for info in weights if kinds.get(info.name) == "embeddings"]
    vocabulary = Vocabulary.of(embeddings, config)
    experts = count_experts(tensors)
    for info in weights:
        if info.name not in kinds:
            kind = kind_by_shape(info, vocabulary, experts)
            if kind not in ("embeddings", "head", "routers"):
                if info.name in towers:
                    kind = TOWERS
                elif info.name in mtp:
                    kind = MTP_ENTRY if is_mtp_entry(info, widths) else MTP
            kinds[info.name] = kind
    return kinds


def kind_by_name(
    info: TensorInfo | OutputTensor, names: Collection[str], expert_counts: list[int]
) -> str | None:
    """Return "embeddings", "routers" or "head" if a weight has such a name, else None.

    `names` are those of all tensors."""
    rows, columns = info.shape

    # Layers with numbers, of which the first has a bias, are linear ones in a row.
    first_bias = re.sub(r"\.\d+\.weight$", "", info.name) + ".0.bias"
    if re.search(EMBEDDING_NAME, info.name) and first_bias not in names:
        return "embeddings"

    # Others are gates with a row for each column. ERNIE's with images lie as (in, out).
    is_router_shape = rows < columns or columns in expert_counts
    if is_router_shape and re.search(ROUTER_NAME, info.name):
        return "routers"
    if re.search(HEAD_NAME, info.name):
        return "head"
    return None


def count_experts(tensors: list[TensorInfo | OutputTensor]) -> dict[str, int]:
    """Count the routed experts of each layer, by the module that they are in."""
    experts: dict[str, int] = {}
    for info in tensors:
        match = EXPERT_PATTERN.match(info.name)
        if match:
            module = match[1].rpartition(".")[0]
            experts[module] = max(experts.get(module, 0), int(match[2]) + 1)
            continue
        match = STACK_PATTERN.match(info.name)
        if match and len(info.shape) == 3:
            experts[match["place"].rstrip(".")] = info.shape[0]
    return experts


@dataclass(frozen=True)
class Vocabulary:
    """How many words a model may know, and in how many columns."""

    words: list[int]
    widths: set[int]

    @staticmethod
    def of(embeddings: list[TensorInfo | OutputTensor], config: dict) -> Vocabulary:
        """Find the numbers in config.json, and in the shapes of embeddings."""
        words = config_values(config, "vocab_size", "padded_vocab_size")
        widths = set(config_values(config, "hidden_size", "d_model", "n_embd"))
        for info in embeddings:
            if not re.search(NO_WORDS, info.name):
                words.append(info.shape[0])
                widths.add(info.shape[1])
        return Vocabulary(words, widths)

    def fits(self, rows: int, columns: int) -> bool:
        """Check whether a weight of this shape may have a row for each word."""
        if self.widths and columns not in self.widths:
            return False
        return any(count <= rows <= count + EXTRA_WORDS for count in self.words)


def kind_by_shape(
    info: TensorInfo | OutputTensor, vocabulary: Vocabulary, experts: dict[str, int]
) -> str:
    """Return the kind of a weight for which `kind_by_name` has none."""
    module = info.name.removesuffix(".weight")
    if has_row_for_each_expert(module, info.shape, experts):
        return "routers"

    parts = module.split(".")
    last = ".".join(parts[-2:])
    if vocabulary.fits(*info.shape):
        # A layer's projection may have this shape by chance, and so may what joins a tower to the
        # language model.
        if any(part.isdigit() for part in parts):
            is_of_words = bool(re.search(VOCABULARY_WORDS, last))
        else:
            is_of_words = not TOWER_WORDS.search(module)
        if is_of_words:
            return "head" if re.search(HEAD_WORDS, last) else "embeddings"

    for kind, pattern in LAYER_KINDS.items():
        if re.search(pattern, info.name):
            return kind
    return "other"


def has_row_for_each_expert(module: str, shape: tuple[int, ...], experts: dict[str, int]) -> bool:
    """Check whether a weight is a router: beside experts, with a row for each, and so named."""
    rows, columns = shape
    if rows >= columns:
        return False
    parts = module.split(".")
    for place in (parts[-1], ".".join(parts[-2:])):
        may_be_router = "rout" in place or not re.search(NO_ROUTER, place)
        if may_be_router and experts.get(module.removesuffix(place).rstrip(".")) == rows:
            return True
    return False


# ---- Formats: what a weight becomes, and what its readers are told -------------------------------


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
    # Who reads it, after its name in the plan's first line.
    readers: str
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
        "producer": f"quantize_int4.py {FORMAT_SINCE}",
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
    Beside other groups it names experts, too, which transformers matches by name before class.

    The head is named wherever it is packed, since in vLLM it is no `Linear`. An entry that kept it,
    too, would leave it random in transformers."""
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
                targets += targets_of_experts(tensors, packing)
            if any(map(is_lm_head, members[packing])):
                targets.append(r"re:(.*\.)?lm_head$")
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

    head_is_packed = any(tensor.packing and is_lm_head(tensor.source.name) for tensor in tensors)
    kept = [f"re:{pattern}" for pattern in patterns_of_modules(tensors, None)]
    description = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*([] if head_is_packed else ["lm_head"]), *kept],
    }
    described = {"quantization_config": description}
    # Without this key the model's class may tie the head to the embedding.
    if head_is_packed:
        described["tie_word_embeddings"] = False
    return {CONFIG_NAME: described}


def targets_of_experts(tensors: list[TensorPlan], packing: Packing) -> list[str]:
    """Name the experts of a packing: all experts, but where others (of MTP) have another one."""
    experts = [tensor for tensor in tensors if tensor.packing and is_expert(tensor)]
    if all(tensor.packing == packing for tensor in experts):
        return [r"re:(.*\.)?experts\.\d+\..*$"]
    return [f"re:{pattern}" for pattern in patterns_of_modules(experts, packing)]


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


# What engines call the parts of a multimodal model beside its language model, whatever its files
# call them. (transformers 5.24.0, conversion_mapping.py; vLLM 0.33.0, `hf_to_vllm_mapper` of its
# models)
BRANCHES_IN_ENGINES = (
    "visual",
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "vision_language_adapter",
    "vision_projection",
    "audio_tower",
    "audio_encoder",
    "sound_encoder",
    "multi_modal_projector",
    "projector",
    "patch_merger",
    "embed_vision",
    "embed_audio",
    "vpm",
    "vit_merger",
    "dit",
    "word_timestamp_encoder",
)

# Modules around a language model, which engines add, leave out and rename. No branch is named so.
WRAPPERS = ("model", "language_model", "text_model", "llm", "thinker", "backbone", "transformer")


def patterns_of_modules(tensors: list[TensorPlan], packing: Packing | None) -> list[str]:
    """Make regular expressions for the modules of one packing or, for None, of those that are
    kept. One stands for all layer numbers, or for a branch, where that matches no packed module of
    another.

    They leave out the wrappers in front, in which files and engines differ (`backbone.`,
    `model.language_model.` in transformers, `language_model.model.` in vLLM), since engines do not
    rename what a pattern says."""
    entries = []
    rivals = []
    for tensor in tensors:
        if tensor.packing == packing:
            entries += entries_of(tensor)
        elif tensor.packing:
            rivals += modules_of(tensor)

    patterns = [] if packing else patterns_of_branches(tensors, rivals)
    entries = [entry for entry in entries if not any_matches(patterns, entry.module)]

    names = ModuleNames(rivals)
    patterns += [pattern_of_module(entry, names) for entry in dict.fromkeys(entries)]
    return list(dict.fromkeys(patterns))


def patterns_of_branches(tensors: list[TensorPlan], packed: list[str]) -> list[str]:
    """Make a regular expression for each branch that is kept as a whole: a tower, or what --exclude
    names.

    Engines split, join and rename the layers of a tower more than those of a language model, and
    each looks up names of its own. The name of the branch is in all of them."""
    names = [branch.rpartition(".")[2] for branch in find_kept_branches(tensors, packed)]
    if any(tensor.kind == TOWERS and not tensor.packing for tensor in tensors):
        names += BRANCHES_IN_ENGINES
    patterns = []
    for name in dict.fromkeys(names):
        pattern = rf"(.*\.)?{re.escape(name)}(\..*)?$"
        if not any(map(re.compile(pattern).match, packed)):
            patterns.append(pattern)
    return patterns


def find_kept_branches(tensors: list[TensorPlan], packed: list[str]) -> list[str]:
    """List the topmost modules that hold layers of a tower, or that --exclude names, and none of
    `packed`. They are not in a numbered layer."""
    modules_with_packed = set()
    for module in packed:
        parts = module.split(".")
        modules_with_packed |= {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}

    branches = {}
    for tensor in tensors:
        is_excluded = (tensor.kept_because or "").startswith("--exclude")
        if tensor.packing or not (is_excluded or tensor.kind == TOWERS):
            continue
        for name in names_of(tensor):
            branch = topmost_module_outside(name, modules_with_packed)
            if branch:
                branches[branch] = None
    return list(branches)


def topmost_module_outside(name: str, modules: Collection[str]) -> str | None:
    """Return the topmost module around a tensor's own that is none of `modules`, no wrapper and not
    in a numbered layer; None if there is no such."""
    parts = name.split(".")
    for depth in range(1, len(parts) - 1):
        if parts[depth - 1].isdigit():
            return None
        module = ".".join(parts[:depth])
        if module not in modules and parts[depth - 1] not in WRAPPERS:
            return module
    return None


def any_matches(patterns: list[str], name: str) -> bool:
    """Check whether one of the patterns matches a name from its start."""
    return any(re.match(pattern, name) for pattern in patterns)


def modules_of(tensor: TensorPlan) -> list[str]:
    """List the names of a weight's module, in the file and in memory."""
    return [name.removesuffix(".weight") for name in names_of(tensor)]


def names_of(tensor: TensorPlan) -> list[str]:
    """List a tensor's name in the file and, where it has others in memory, those."""
    names = [tensor.source.name, *(tensor.in_memory or ()), tensor.in_vllm or tensor.source.name]
    return list(dict.fromkeys(names))


def entries_of(tensor: TensorPlan) -> list[Entry]:
    """List what engines look up to know how a tensor is stored."""
    name = tensor.source.name
    dimensions = len(tensor.source.shape)
    module = name.removesuffix(".weight")
    # Every description says that a head of this name is kept.
    if dimensions < 2 or (module == "lm_head" and not tensor.packing):
        return []

    # One entry for the layer's experts: vLLM asks for projections that a model need not have. Those
    # with names instead of numbers need not be kept alike.
    looked_up = dict.fromkeys([name, tensor.in_vllm or name])
    place = r"((?:.*\.)?experts)\.(?!gate\.|router\.|[a-z]\w*\.\w+\.weight$)"
    experts = [re.match(place, name) for name in looked_up]
    if all(experts):
        return [Entry(match[1], r"(\..*)?$") for match in experts]

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
    wrappers and none of `packed`.

    Where a tower, or the layers that predict further tokens, have layers of the same names as the
    language model, their pattern has the branch's name in it, and the language model's excludes
    that name. The other way round fails, since engines rename the wrappers of language models."""
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

    candidates = [of_any_layer, of_this_layer]
    if TOWER_WORDS.search(".".join(parts[:container])) or MTP_NAMES.search(entry.module):
        for begin in range(container - 1, -1, -1):
            candidates += tails(begin)
    else:
        parts_of_rivals = {part for rival in rivals for part in rival.split(".")}
        others = {part for part in parts_of_rivals if not part.isdigit()} - {*parts, *WRAPPERS}
        if others:
            unless = rf"(?!(.*\.)?({'|'.join(map(re.escape, sorted(others)))})\.)"
            candidates += tails(container, unless)
        for begin in range(container - 1, -1, -1):
            candidates += tails(begin)

    for candidate in candidates:
        if not matches_any(candidate, alike):
            return candidate
    raise QuantizeError(
        f"every pattern for {entry.module!r} would match {rivals[0]!r} too, which is stored"
        " otherwise: change --exclude or --int8 so that both are stored alike"
    )


# Classes that `AutoModelForCausalLM` (transformers 5.24.0) does not load, or not for each type that
# config.json may name beside them.
NOT_AUTO_CAUSAL = (
    "ClvpForCausalLM CsmDepthDecoderForCausalLM Emu3ForCausalLM Mistral4ForCausalLM"
    " MllamaForCausalLM MusicgenForCausalLM MusicgenMelodyForCausalLM"
)
LOAD_STEP = "transformers.{loader}.from_pretrained({path}, {load_options})"
LOAD_OPTIONS = "dtype='auto'"
# Where transformers has to decode all weights as it loads them.
DECODING_OPTIONS = (
    f"{LOAD_OPTIONS},"
    " quantization_config=transformers.CompressedTensorsConfig(run_compressed=False)"
)


def loading_class(config: dict) -> str:
    """Name the class of transformers that loads the whole model that config.json describes, head
    included.

    That is the model's own class, which `save_pretrained` writes there. A language model's may have
    another name on the hub, and the class for all of these goes by its type."""
    architecture = next(iter(architectures_of(config)), "")
    if not architecture.isidentifier():
        return loading_class_by_structure(config)
    own_classes = classes_of_its_own_code(config, architecture)
    if own_classes:
        return own_classes[0]
    is_causal = architecture.endswith("ForCausalLM") and architecture not in NOT_AUTO_CAUSAL.split()
    return "AutoModelForCausalLM" if is_causal else architecture


def loading_class_by_structure(config: dict) -> str:
    """Name the class for a config.json that names no class of the model."""
    towers = [
        key for key, value in config.items() if isinstance(value, dict) and key.endswith("_config")
    ]
    if any(re.search(r"vis(ion|ual)|image|^vq_", key) for key in towers):
        return "AutoModelForImageTextToText"
    if towers:
        return "AutoModelForMultimodalLM"
    is_pair = any(config_values(only(config, "is_encoder_decoder"), "is_encoder_decoder"))
    return "AutoModelForSeq2SeqLM" if is_pair else "AutoModelForCausalLM"


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
    # What it does not hold packed: kinds of layers by `find_kinds`, and GPT-2's Conv1D. Of towers
    # and entries of MTP it holds some, and which depends on the model's class.
    whole_kinds: tuple[str, ...] = ("embeddings", "head", "routers", "Conv1D", TOWERS, MTP_ENTRY)
    # Layers that it holds as one, and so in one precision.
    fused_layers: tuple[str, ...] = ()
    # Whether it holds all routed experts of a layer as one.
    fuses_experts: bool = False
    # Whether it reads the experts of all layers in one width, and others as noise.
    one_width_of_experts: bool = False
    # Whether it renames, splits or joins tensors as it loads them, and looks modules up by the
    # names that these have in memory.
    converts_tensors: bool = False
    # Formats for which it first unpacks what it splits or joins, and lets nothing else through.
    unpacks_first: tuple[str, ...] = ()
    # Formats in which it knows weights of 8 bits beside those of 4, and in which it knows
    # experts that are kept.
    two_widths: tuple[str, ...] = ()
    kept_experts: tuple[str, ...] = ()
    # Types of models to whose head it never passes the quantization.
    plain_heads: tuple[str, ...] = ()
    # Types of models that it does not compute in float16, and by format those that it does not
    # load.
    no_float16: tuple[str, ...] = ()
    not_loaded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # By format: types of models of whose MTP it takes all layers for unquantized once an entry of
    # config.json has "mtp" in it.
    whole_mtp: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # By format: how it misreads packed experts.
    misreads_experts: Mapping[str, str] = field(default_factory=dict)
    # Types of models that it knows, as config.json names them for the whole model, separated by
    # blanks, where it takes all others for Llama; and those whose packed experts it does not hold.
    known_types: str = ""
    experts_not_held: tuple[str, ...] = ()
    # What it makes of group sizes that it does not have, and of experts that are kept, where that
    # is no error.
    misreads_sizes: str = ""
    misreads_kept_experts: str = ""
    # What the rows of all packed weights must be a multiple of.
    row_multiple: int = 1
    # Whether it refuses models without a chat template, other than those of some types.
    needs_chat_template: bool = False
    types_without_template: tuple[str, ...] = ()
    # By format: the command that loads a finished folder {name}; and what that is called.
    commands: Mapping[str, str] = field(default_factory=dict)
    verb: str = ""

    @property
    def label(self) -> str:
        """Return its name and version as messages state them: transformers (5.24)."""
        return f"{self.name} ({self.version.removesuffix('.0')})"


EDGE_LLM = "TensorRT Edge-LLM"
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
            # Models of 0.33.0 that make a ParallelLMHead without a quant_config.
            plain_heads=(
                "alice_ai",
                "bloom",
                "dory",
                "falcon_h1",
                "falcon_mamba",
                "gpt_oss",
                "jamba",
                "mamba",
                "mamba2",
                "opt",
                "plamo3",
                "qwen3_next",
                "step3_text",
                "zamba2",
            ),
            # `_FLOAT16_NOT_SUPPORTED_MODELS` in config/model.py of 0.33.0.
            no_float16=("gemma2", "gemma3", "gemma3_text", "glm4"),
            not_loaded={"gptq": ("whisper",)},
            # qwen3_5_mtp.py of 0.33.0.
            whole_mtp={"gptq": ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")},
            misreads_experts={"gptq": "vLLM before 0.29"},
            commands={
                "compressed-tensors": "vllm serve {name} --max-model-len 8192",
                "gptq": "vllm serve {name} --dtype {dtype} --max-model-len 8192",
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
            unpacks_first=("compressed-tensors",),
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
        # The kernel of its groups has `divUp(K, 128)` built in, for any group size of the folder.
        Engine(
            name=EDGE_LLM,
            version="0.11.0",
            sources=(
                "tensorrt_edgellm/config.py, checkpoint/repacking.py, chat_template.py",
                "experimental/builder/models/registry.py, tensorrt_edgellm/scripts/export.py",
                "Int4GroupwiseGemmPlugin's kernels and documentation",
            ),
            kernels="Int4GroupwiseGemm",
            group_sizes=(128,),
            known_types="""
                alpamayo_r1 cosmos3_edge cosmos3_edge_text cosmos3_omni diffusion_gemma
                diffusion_gemma_text diffusiongemma gemma4 gemma4_text gemma4_unified
                gemma4_unified_text hunyuan_v1_dense internvl internvl_chat llama mistral
                muse_glimmer muse_glimmer_text nemotron3_5_asr nemotron_h NemotronH_Nano_VL_V2
                NemotronH_Nano_Omni_Reasoning_V3 phi4_multimodal phi4mm qwen2 qwen2_5_vl qwen2_vl
                qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_asr
                qwen3_asr_thinker qwen3_moe qwen3_omni qwen3_omni_moe qwen3_omni_moe_text
                qwen3_omni_moe_thinker qwen3_omni_next qwen3_omni_next_text
                qwen3_omni_next_text_moe qwen3_omni_next_thinker qwen3_omni_text
                qwen3_omni_thinker qwen3_tts qwen3_vl
            """,
            # It holds these in NVFP4 alone, which an Orin does not compute.
            experts_not_held=(
                "nemotron_h",
                "NemotronH_Nano_VL_V2",
                "NemotronH_Nano_Omni_Reasoning_V3",
            ),
            misreads_sizes="loads others without a warning and computes wrongly",
            misreads_kept_experts="loads them without a warning as if all their weights were -1",
            row_multiple=64,
            needs_chat_template=True,
            types_without_template=("alpamayo_r1", "qwen3_asr", "qwen3_asr_thinker", "qwen3_tts"),
        ),
    )
}

USE_COMPRESSED_TENSORS = "--format compressed-tensors makes what vLLM and transformers load"
INT4 = Format(
    name="int4",
    words=".qweight",
    scales=".scales",
    constants=(),
    describe=describe_int4,
    readers="which only your own code reads (dequantize_int4); for vLLM and transformers give"
    " --format compressed-tensors",
    other_steps=(("Read", "dequantize_int4 of quantize_int4.py, by {name}/quantize_config.json"),),
)
COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    words=".weight_packed",
    scales=".weight_scale",
    constants=(WEIGHT_SHAPE,),
    describe=describe_compressed_tensors,
    readers="for vLLM and transformers",
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
    readers="for engines that read GPTQ (v1)",
    loaded_by=("vLLM", "transformers", "GPTQModel", EDGE_LLM),
    with_offset=True,
    transposed=True,
    row_multiple=8,
)
FORMATS = {form.name: form for form in (INT4, COMPRESSED_TENSORS, GPTQ)}


# ---- Statistics of the layers' inputs ------------------------------------------------------------

# Numbers in a factor. A worker holds eight times as many.
MAX_FACTOR = 1 << 21
# The largest mean square of a weight's inputs is taken as it is between these. Beyond, its products
# with errors, or a part of it, may be no float32.
LEAST_LARGEST_SQUARE = 2.0**-64
MOST_LARGEST_SQUARE = 2.0**64


@dataclass(frozen=True)
class Vector:
    """Where a weight's mean squares are: in a tensor of the file, or in an expert's row of one."""

    name: str
    expert: int | None = None
    # Weights that the model holds as one, which share it.
    sharers: int = 1


def end_of_name(name: str) -> str:
    """Return what follows the wrappers: the name from the layers' container on, or the last two
    parts where it lies in no layer."""
    layer = LAYER_PATTERN.match(name)
    return name[layer.start(2) :] if layer else ".".join(name.split(".")[-2:])


class Importance:
    """Statistics of each layer's input activations, from --importance: mean squares (columns,),
    which weigh the error of a weight's columns, and, if they are there, a factor (columns, rank),
    which tells how the columns go together, a cost (), which tells what errors lose, and a gain (),
    which tells how large the outputs are.

    They are named as a model's parameters, X, X.factor, X.cost and X.gain, whose wrappers may
    differ from the checkpoint's. Where the model holds its experts as a stack, one tensor
    (experts, columns), (experts, columns, rank) or (experts,) stands for all."""

    def __init__(self, path: Path):
        self.path = path
        self._file = WeightsFile(path)
        self.infos = {
            name: info
            for name, info in self._file.infos.items()
            if not name.endswith((".cost", ".gain"))
        }
        self.has_costs = any(name.endswith(".cost") for name in self._file.infos)
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
        # By weight; see `rank_of` and `unexplained_share`.
        self._vectors: dict[str, Vector] = {}
        self._ranks: dict[str, int | None] = {}
        self._shares: dict[str, float] = {}
        self._number_of = functools.cache(self._read_number)

    def close(self) -> None:
        """Close the file, and let the page cache forget what was read of it."""
        self._file.close()

    def check_unchanged(self) -> None:
        """Raise if the file was written to or replaced since it was opened."""
        self._file.check_unchanged()

    def match(self, weights: list[TensorInfo], tensors: list[TensorInfo], oddity: Oddity) -> None:
        """Find each tensor's vector: by name, else by what follows the wrappers, where only one
        vector and only one of all tensors of the checkpoint ends so. Raises if more than half of
        the weights, which are packed, have none."""
        names = [name for name in self.infos if not name.endswith(".factor")]
        vectors: dict[str, Vector] = {}
        for name in names:
            vectors |= self._vectors_in(name, oddity)

        vector_ends = Counter(map(end_of_name, vectors))
        tensor_ends = Counter(end_of_name(info.name) for info in tensors)
        by_end = {end_of_name(name): vector for name, vector in vectors.items()}
        for info in tensors:
            end = end_of_name(info.name)
            vector = vectors.get(info.name)
            if not vector and vector_ends[end] == tensor_ends[end] == 1:
                vector = by_end[end]
            if vector:
                self._vectors[info.name] = vector

        named = sum(weight.name in self._vectors for weight in weights)
        if named * 2 < len(weights):
            own_names = quote_names(names)
            other_names = quote_names(weight.name for weight in weights)
            raise QuantizeError(
                f"{self.path} names {named:,} of {count_of(len(weights), 'weight')}"
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
        projections = oddity.projections_of(stack["projection"])
        for expert in range(shape[0]):
            for projection in projections:
                weight = f"{stack['place']}experts.{expert}.{projection}.weight"
                vectors[oddity.renamed(weight)] = Vector(name, expert, len(projections))
        return vectors

    def describe(self, weights: list[TensorInfo]) -> str:
        """Describe for the plan how many of these have what. All of it is read and checked."""
        ranks = [self.rank_of(weight) for weight in weights]
        weighed = len(weights) - ranks.count(None)
        named = sum(weight.name in self._vectors for weight in weights)
        feedback = ""
        if different := sorted(set(ranks) - {None, 0}):
            count = weighed - ranks.count(0)
            some = f"{count:,} of them " if count < weighed else ""
            different = ", ".join(map(str, different))
            feedback = f", {some}with error feedback of rank {different}"
        parts = [f"importance weighs {count_of(weighed, 'weight')}{feedback}"]
        if named > weighed:
            parts.append(f"{named - weighed:,} named without data")
        if len(weights) > named:
            parts.append(f"{len(weights) - named:,} not named")
        return "; ".join(parts)

    def rank_of(self, info: TensorInfo) -> int | None:
        """Return the rank of a weight's factor, 0 if it has none; None if it has no statistics.

        All of them are read once and checked."""
        if info.name not in self._ranks:
            rank = None
            if moments := self.get(info):
                squares, factor = moments
                rank = factor.shape[1]
                rest = (squares.double() - factor.double().square().sum(1)).clamp_(min=0)
                # Rounded, since machines add up in orders of their own, and all shall choose alike.
                self._shares[info.name] = round(float(rest.sum() / squares.double().sum()), 6)
            self._ranks[info.name] = rank
        return self._ranks[info.name]

    def unexplained_share(self, info: TensorInfo) -> float:
        """Return the part of the mean squares that a weight's factor leaves, 1 without a factor."""
        self.rank_of(info)
        return self._shares.get(info.name, 1.0)

    def get(self, info: TensorInfo) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Read a weight's mean squares, float32 (columns,), and its factor, float32
        (columns, rank), of rank 0 if it has none, in a unit of their own. None if the file does not
        name the weight, or if no data reached the layer."""
        vector = self._vectors.get(info.name)
        if not vector:
            return None
        columns = info.shape[1]
        rule = f"{info.name!r} needs a float32 for each of its {columns:,} columns"
        squares = self._read_vector(vector, ["F32"], [(columns,)], rule)
        if (squares < 0).any():
            raise QuantizeError(f"{self.path}: {vector.name!r} has negative values")
        if not squares.any():
            return None
        vector = replace(vector, name=f"{vector.name}.factor")
        if vector.name not in self.infos:
            return in_usual_range(squares, torch.zeros(columns, 0))

        rule = (
            f"a factor is float32 or float16 (columns, rank), here ({columns:,}, 1 to {MAX_RANK})"
        )
        shapes = [(columns, rank + 1) for rank in range(MAX_RANK)]
        factor = self._read_vector(vector, ["F32", "F16"], shapes, rule)
        if factor.numel() > MAX_FACTOR:
            raise QuantizeError(
                f"{self.path}: {vector.name!r} holds {factor.numel():,} numbers, at most"
                f" {MAX_FACTOR:,} are held in memory: collect it with a rank of"
                f" {MAX_FACTOR // columns}"
            )
        self._refuse_factor_of_other_inputs(vector.name, factor, squares)
        return in_usual_range(squares, factor.float())

    def cost_of(self, info: TensorInfo) -> float | None:
        """Read the divergence from the model, in nat a token, that a relative error of 1 in a
        weight's outputs is expected to bring; None if the file does not tell."""
        cost = self._number_of(info, "cost")
        # What the model holds as one has one cost. Its weights have as many outputs each.
        return cost and cost / self._vectors[info.name].sharers

    def gain_of(self, info: TensorInfo) -> float | None:
        """Read the mean square norm of a weight's outputs, in that which random weights as large
        would give to the same inputs; None if the file does not tell."""
        return self._number_of(info, "gain") or None

    def _read_number(self, info: TensorInfo, what: str) -> float | None:
        """Read a weight's cost or gain, if the file has it."""
        vector = self._vectors.get(info.name)
        name = f"{vector.name}.{what}" if vector else ""
        if name not in self._file.infos:
            return None
        rule = f"a {what} is one float32, or one for each expert of a stack"
        number = self._read_vector(replace(vector, name=name), ["F32"], [()], rule)
        if number < 0:
            raise QuantizeError(f"{self.path}: {name!r} is negative")
        return float(number)

    def _read_vector(
        self, vector: Vector, dtypes: list[str], shapes: list[tuple[int, ...]], rule: str
    ) -> torch.Tensor:
        """Read a tensor of the file, or an expert's row of one, which must have one of these
        dtypes and shapes."""
        info = self._file.infos[vector.name]
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
        data = self._file.read(info, row * nbytes, nbytes)
        tensor = torch.frombuffer(data, dtype=FLOAT_DTYPES[info.dtype]).view(shape)
        if not torch.isfinite(tensor).all():
            raise QuantizeError(f"{self.path}: {vector.name!r} has values not finite")
        return tensor

    def _refuse_factor_of_other_inputs(
        self, name: str, factor: torch.Tensor, squares: torch.Tensor
    ) -> None:
        """Refuse a factor whose squares add up, in a column, to more than the mean square of the
        same inputs can be."""
        # The factor was rounded to its dtype: a normal number by at most eps of itself, a smaller
        # one by at most eps * tiny. What rounding may have added does not count.
        dtype = torch.finfo(factor.dtype)
        least = factor.float().abs()
        least.mul_(1 - dtype.eps).sub_(dtype.eps * dtype.tiny).clamp_(min=0)
        sums = least.square_().sum(1)
        rounded = squares.max() * 1e-6 + torch.finfo(squares.dtype).tiny
        beyond = sums > squares * (1 + 1e-4) + rounded
        if beyond.any():
            column = int(beyond.int().argmax())
            raise QuantizeError(
                f"{self.path}: {name!r} has squares in column {column} that add up to"
                f" {float(sums[column]):.6g}, more than the column's mean square,"
                f" {float(squares[column]):.6g}: collect both from the same inputs"
            )


def in_usual_range(
    squares: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean squares and their factor in a unit in which the largest is no extreme number.

    Nothing depends on more than their ratios. The unit is a power of 4, that of the factor its
    root, and so all others are what they were, bit for bit."""
    largest = float(squares.max())
    if LEAST_LARGEST_SQUARE <= largest <= MOST_LARGEST_SQUARE:
        return squares, factor
    exponent = math.frexp(largest)[1] // 2
    return (
        (squares.double() * 4.0**-exponent).float(),
        (factor.double() * 2.0**-exponent).float(),
    )


# ---- Collecting statistics: what the layers are given, where the model runs ----------------------

# Of the file, in its metadata. Files without metadata, as README's snippet wrote them, are read
# alike.
STATISTICS_VERSION = "1"
# Columns up to which second moments are added up whole. Beyond, and for experts, of which there are
# many, only their products with some random directions are.
WHOLE_COLUMNS = 4096
# Directions that are followed beyond the rank of the factor.
SPARE_DIRECTIONS = 8
# How often whole second moments turn the directions to their main part. In SmolLM2 the factor then
# leaves 0.3019 of the mean squares, with 4 turns 0.3026, with 2 0.3063, with 1 0.3173.
TURNS = 8
# Tokens that README's tables were measured with, in all and for each expert.
ENOUGH_TOKENS = 2048
ENOUGH_TOKENS_OF_EXPERT = 256
# Parameters and buffers that hold codes, whatever their dtype.
CODES_PATTERN = re.compile(r"(^|\.)(qweight|weight_packed|qzeros)$")


@dataclass(eq=False)
class Inputs:
    """What one weight, or one expert of a stack, was multiplied with."""

    name: str
    # Columns, as a shape, and strides of a matrix of so many inputs; a stack may be transposed.
    layouts: list[tuple[tuple[int, ...], tuple[int, ...]]]
    is_expert: bool
    is_sketched: bool
    tokens: int = 0
    # Sums over tokens, float32: of squares (columns,), and of products with one another (columns,
    # columns) or with directions (columns, directions). None before the first token.
    squares: torch.Tensor | None = None
    products: torch.Tensor | None = None
    # The first of the weights that read the same, which has the products of all. None before the
    # first token.
    owner: Inputs | None = None


def collect_statistics(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor] | torch.Tensor],
    path: str | os.PathLike,
    rank: int = 32,
    whole_columns: int = WHOLE_COLUMNS,
    costs: bool = True,
) -> None:
    """Run a model on prompts and write the file for --importance.

    A batch is a dict of the model's arguments, or a tensor of tokens, int64 (prompts, tokens) or
    (tokens,); it is moved to the model's device. Of a batch with an attention mask (prompts,
    tokens) that leaves tokens out, each prompt is run alone, without them.

    For each weight X.weight that linear, matmul or bmm multiplied with, the file holds X, float32
    (columns,), the mean square of each column's inputs, and, unless `rank` is 0, X.factor, float16
    (columns, rank at most): factor @ factor.T is the main part of the inputs' second moments. A
    stack of experts has one of each, with the experts first. Second moments of up to
    `whole_columns` columns are held whole, but for those of experts.

    With `costs` each batch is run a second time, and backwards, and the file also holds X.cost,
    float32 () or (experts,): the divergence from the model, in nat a token, that a relative error
    of 1 in the weight's outputs is expected to bring. The expected divergence of a quantized model
    is the sum of costs times squared relative errors. X.gain, of the same shape, is the mean square
    norm of the outputs (without a bias) in that which random weights as large would give to the
    same inputs: E|Wx|^2 / (|W|^2 E|x|^2 / columns). Where there is no way back through the model,
    both are left out, and the reason is printed.

    Raises QuantizeError, before the model is run where that is possible, for a model that is
    quantized or not wholly in memory, for no or padded batches, and for a path or a rank that
    cannot be."""
    # The command does not need it.
    from safetensors.torch import save_file

    path = Path(path)
    refuse_collection(model, path, rank)
    inputs = find_inputs(model, whole_columns)
    with torch.no_grad(), in_use(model):
        recorder = Recorder(inputs, rank)
        gradients = CostRecorder(inputs) if costs else None
        tokens = run_batches(model, batches, recorder, gradients)
    if not any(part.tokens for part in inputs.values()):
        raise QuantizeError("no weight of the model was multiplied with anything that is recorded")

    config = getattr(model, "config", None)
    metadata = {
        STATISTICS_KEY: STATISTICS_VERSION,
        "model_type": str(getattr(config, "model_type", "")),
        "rank": str(rank),
        "tokens": str(tokens),
    }
    with torch.no_grad(), one_thread():
        tensors = make_statistics(model, inputs, rank, gradients)
    save_file(tensors, path, metadata=metadata)
    say_collected(model, inputs.values(), path, tokens)
    if gradients and gradients.failure:
        say_paragraph("Costs:", f"left out: {gradients.failure}")


def refuse_collection(model: torch.nn.Module, path: Path, rank: int) -> None:
    """Raise if statistics of this model cannot be collected to this file."""
    if not 0 <= rank <= MAX_RANK:
        raise QuantizeError(f"rank {rank} is not from 0 to {MAX_RANK}")
    if path.is_dir() or not path.parent.is_dir():
        raise QuantizeError(f"{path}: cannot be written: name a file in a folder that is there")
    refuse_model(model)


def refuse_model(model: torch.nn.Module) -> None:
    """Raise if a model's weights are not all there, or are quantized."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        is_weight = isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1
        is_wrapped = is_weight and type(tensor.data) not in (torch.Tensor, torch.nn.Parameter)
        is_packed = is_weight and tensor.dtype not in FLOAT_DTYPES.values()
        if tensor.is_meta:
            raise QuantizeError(
                f"{name!r} is offloaded: load the model without device_map, or where all of it fits"
            )
        if CODES_PATTERN.search(name) or is_packed:
            raise QuantizeError(
                f"{name!r} is {tensor.dtype}, so the model is quantized: load the original"
            )
        if is_wrapped:
            raise QuantizeError(
                f"{name!r} is a {type(tensor.data).__name__}, quantized or spread over devices:"
                " load the original as plain tensors"
            )


def find_inputs(model: torch.nn.Module, whole_columns: int) -> dict[int, Inputs]:
    """List what may be multiplied with, by the address of the weight or expert."""
    inputs = {}
    convolutions = weights_of(model, torch.nn.modules.conv._ConvNd)
    for name, parameter in model.named_parameters():
        if name in convolutions:
            continue
        is_stack = parameter.dim() == 3
        is_expert = is_stack or ".experts." in name
        for weight in matrices_of(parameter):
            views = [weight, weight.mT] if is_stack else [weight]
            inputs[weight.data_ptr()] = Inputs(
                name,
                [(view.shape[1:], view.stride()) for view in views],
                is_expert,
                is_sketched=is_expert or weight.shape[1] > whole_columns,
            )
    return inputs


def weights_of(model: torch.nn.Module, kind: type) -> set[str]:
    """Return the names of the weights of all modules of a kind."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kind)}


def matrices_of(parameter: torch.Tensor) -> list[torch.Tensor]:
    """Return a stack's experts, or the weight itself; nothing for vectors and the like."""
    if parameter.dim() == 3:
        return list(parameter)
    return [parameter] if parameter.dim() == 2 else []


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch work in one thread. With matrices as small as these several mostly wait for each
    other: on a busy machine with two cores, two took more than ten times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def in_use(model: torch.nn.Module) -> Iterator[None]:
    """Run a model as it is used, without gradients of its weights, and expert by expert instead of
    by a kernel for all of them (transformers 5)."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    experts = None
    if hasattr(model, "set_experts_implementation"):
        if hasattr(model, "get_experts_implementation"):
            experts = model.get_experts_implementation()
        model.set_experts_implementation("eager")
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
        if experts:
            model.set_experts_implementation(experts)


def run_batches(
    model: torch.nn.Module,
    batches: Iterable,
    recorder: Recorder,
    gradients: CostRecorder | None,
) -> int:
    """Run the model on all batches, and return how many tokens these had."""
    device = next(model.parameters()).device
    total = len(batches) if hasattr(batches, "__len__") else None
    progress = LoopProgress("collecting", "batch", total)
    tokens = 0
    for number, batch in enumerate(batches, 1):
        for prompts in prompts_of(model, batch, f"batch {number}"):
            if not count_tokens(prompts):
                continue
            moved = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in prompts.items()
            }
            with recorder:
                model(**moved)
            if gradients:
                gradients.add(model, moved)
            tokens += count_tokens(prompts)
        progress.show(number, count_of(tokens, "token"))
    progress.end()
    if not tokens:
        raise QuantizeError(
            "batches gave no tokens: a generator can be read only once, a list more often"
        )
    return tokens


def prompts_of(model: torch.nn.Module, batch: object, place: str) -> list[Mapping]:
    """Return the arguments of the calls that a batch takes: one, or one a prompt if it is padded.

    Padding would count as tokens."""
    if isinstance(batch, torch.Tensor) and batch.dim() in (1, 2) and not batch.is_floating_point():
        tokens = batch if batch.dim() == 2 else batch[None]
        batch = {getattr(model, "main_input_name", "input_ids"): tokens}
    if not isinstance(batch, Mapping):
        raise QuantizeError(
            f"{place} is a {type(batch).__name__}: give dicts of the model's arguments, or tensors"
            " of tokens"
        )
    mask = batch.get("attention_mask")
    if mask is None:
        refuse_padding(model, batch, place)
        return [batch]
    if mask.dim() != 2 or mask.all():
        return [batch]

    prompts = []
    for row, is_token in enumerate(mask.bool()):
        places = is_token.nonzero().flatten().tolist()
        if not places:
            continue
        columns = slice(places[0], places[-1] + 1)
        alike = all(
            isinstance(value, torch.Tensor) and value.shape == mask.shape
            for value in batch.values()
        )
        if not alike or columns.stop - columns.start != len(places):
            raise QuantizeError(
                f"{place} is padded and cannot be cut to its tokens: give each prompt alone"
            )
        prompts.append({name: value[row : row + 1, columns] for name, value in batch.items()})
    return prompts


def refuse_padding(model: torch.nn.Module, batch: Mapping, place: str) -> None:
    """Raise if prompts without an attention mask begin or end with padding. One such token may be
    the prompt's own, since some models pad with what ends or begins a text."""
    tokens = batch.get("input_ids")
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if tokens is None or not isinstance(padding, int) or tokens.dim() != 2 or tokens.shape[1] < 2:
        return
    is_padding = tokens == padding
    if is_padding[:, :2].all(1).any() or is_padding[:, -2:].all(1).any():
        raise QuantizeError(
            f"{place} is padded (token {padding}) without an attention_mask: give the tokenizer's"
            " whole result, or each prompt alone"
        )


def count_tokens(arguments: Mapping) -> int:
    """Return how many tokens, or else rows of another input, a call of the model has."""
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    first = arguments.get("input_ids", tensors[0] if tensors else torch.zeros(0))
    return math.prod(first.shape[:-1]) if first.is_floating_point() else first.numel()


@dataclass(frozen=True, eq=False)
class Product:
    """A product of inputs (..., columns) and one weight (rows, columns)."""

    inputs: Inputs
    # None once it was seen.
    x: torch.Tensor | None
    # Of those that one call makes; None if it makes one.
    place: int | None = None
    bias: torch.Tensor | None = None

    def part_of(self, output: torch.Tensor) -> torch.Tensor:
        """Return this product's part of what the call returned, or of its gradient."""
        return output if self.place is None else output[self.place]


class WeightFinder(torch.overrides.TorchFunctionMode):
    """Sees what the weights are multiplied with. It knows them by their addresses, whatever module
    or function does it."""

    def __init__(self, inputs: dict[int, Inputs]):
        super().__init__()
        self._inputs = inputs

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in ("to", "type", "float"):
            # Many routers multiply with a float32 copy of their weight.
            if isinstance(output, torch.Tensor) and output is not args[0]:
                output.address = args[0].data_ptr()
        elif name in ("linear", "matmul", "bmm"):
            left, right, *bias = [*args, *kwargs.values()]
            if name == "bmm":
                products = [
                    Product(inputs, x, place)
                    for place, (x, weight) in enumerate(zip(left, right))
                    if (inputs := self._find(x, weight.mT))
                ]
            else:
                weight = right if name == "linear" or right.dim() == 1 else right.mT
                inputs = self._find(left, weight)
                bias = bias[0] if bias and name == "linear" else None
                products = [Product(inputs, left, bias=bias)] if inputs else []
            if products:
                output = self.record(products, output)
        return output

    def _find(self, x: torch.Tensor, weight: torch.Tensor) -> Inputs | None:
        """Return what is known of a weight (rows, columns) that x (..., columns) multiplies;
        None if it is no weight of the model."""
        inputs = self._inputs.get(getattr(weight, "address", weight.data_ptr()))
        if inputs and (weight.shape[1:], weight.stride()) in inputs.layouts and x.numel():
            return inputs
        return None

    def record(self, products: list[Product], output: torch.Tensor) -> torch.Tensor:
        """Add the products of one call to what is known; return its output."""
        raise NotImplementedError


class Recorder(WeightFinder):
    """Adds up what the weights are multiplied with."""

    def __init__(self, inputs: dict[int, Inputs], rank: int):
        super().__init__(inputs)
        self._rank = rank
        # The tensor that was multiplied last, its version, and who has the products of it.
        self._last: tuple[torch.Tensor, int, Inputs] | None = None

    def record(self, products: list[Product], output: torch.Tensor) -> torch.Tensor:
        for product in products:
            self._add(product.inputs, product.x)
        return output

    def _add(self, inputs: Inputs, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        squares = rows.square().sum(0)
        inputs.squares = squares if inputs.squares is None else inputs.squares + squares
        inputs.tokens += len(rows)

        if not inputs.owner:
            # Layers that read the same share the products.
            inputs.owner = inputs
            if self._last and x is self._last[0] and x._version == self._last[1]:
                inputs.owner = self._last[2]
        self._last = (x, x._version, inputs.owner)
        if not self._rank or inputs.owner is not inputs:
            return
        others = rows
        if inputs.is_sketched:
            others = rows @ directions_for(rows.shape[1], self._rank, rows.device)
        if inputs.products is None:
            inputs.products = rows.T @ others
        else:
            inputs.products.addmm_(rows.T, others)


@dataclass
class CostSums:
    """Sums over the tokens that reached a weight."""

    rows: int = 0
    tokens: int = 0
    # Of squares, over all outputs: of the outputs without the bias, and of their gradients.
    outputs: torch.Tensor | float = 0.0
    gradients: torch.Tensor | float = 0.0

    @property
    def mean_square_norm(self) -> float:
        """Of the outputs without the bias."""
        return float(self.outputs) / self.tokens


class CostRecorder(WeightFinder):
    """Adds up what the outputs of weights are, and the gradients that reach them.

    The gradients are of the log-likelihood of tokens that are drawn from the model's own
    predictions, so that their second moments are the Fisher matrix."""

    def __init__(self, inputs: dict[int, Inputs]):
        super().__init__(inputs)
        self.sums: defaultdict[Inputs, CostSums] = defaultdict(CostSums)
        # Tokens that were predicted.
        self.tokens = 0
        # Why there are no costs, if so.
        self.failure = ""
        self._generator: torch.Generator | None = None

    def add(self, model: torch.nn.Module, arguments: Mapping) -> None:
        """Run the model forwards and backwards; what that cannot be done with has no costs."""
        if self.failure:
            return
        try:
            with torch.enable_grad():
                self._add(model, arguments)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".partition("\n")[0]

    def _add(self, model: torch.nn.Module, arguments: Mapping) -> None:
        with self:
            output = model(**arguments)
        if getattr(output, "logits", None) is None:
            raise ValueError("the model gives no logits")
        logits = output.logits.flatten(0, -2).float()
        if not self._generator:
            self._generator = torch.Generator(logits.device).manual_seed(0)
        chances = logits.detach().softmax(-1)
        drawn = torch.multinomial(chances, 1, generator=self._generator).flatten()
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        self.tokens += len(logits)

    def record(self, products: list[Product], output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            # Nothing before it has a gradient: weights need none. What begins a graph may not be
            # changed in place, and its copy may.
            output = output.requires_grad_().clone()
        for product in products:
            sums = self.sums[product.inputs]
            part = product.part_of(output.detach()).float()
            if product.bias is not None:
                part = part - product.bias
            sums.rows = part.shape[-1]
            sums.tokens += part[..., 0].numel()
            sums.outputs += part.square().sum()

        def add(gradient: torch.Tensor) -> None:
            for product in found:
                part = product.part_of(gradient).float()
                self.sums[product.inputs].gradients += part.square().sum()

        # Not the tensors, which may be large.
        found = [replace(product, x=None, bias=None) for product in products]
        output.register_hook(add)
        return output

    def cost_of(self, inputs: Inputs | None) -> torch.Tensor:
        """Return the divergence, in nat a token, that a relative error of 1 in these outputs is
        expected to bring; float32 (), 0 without data."""
        sums = self.sums.get(inputs)
        if not sums:
            return torch.tensor(0.0)
        # 1/2 * share of the tokens * mean square of the gradients * mean square norm.
        gradients = float(sums.gradients) / (sums.tokens * sums.rows)
        share = sums.tokens / self.tokens
        return torch.tensor(share * gradients * sums.mean_square_norm / 2)

    def gain_of(self, inputs: Inputs | None, weight: torch.Tensor) -> torch.Tensor:
        """Return the mean square norm of these outputs, in that which random weights as large would
        give; float32 (), 0 without data."""
        sums = self.sums.get(inputs)
        if not sums:
            return torch.tensor(0.0)
        random = float(weight.float().square().sum()) * float(mean_squares(inputs).mean())
        return torch.tensor(sums.mean_square_norm / random if random else 0.0)


@functools.lru_cache(maxsize=64)
def directions_for(columns: int, rank: int, device: torch.device) -> torch.Tensor:
    """Return random directions, float32 (columns, rank and some more), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(columns, rank + SPARE_DIRECTIONS, generator=generator).to(device)


def make_statistics(
    model: torch.nn.Module,
    inputs: dict[int, Inputs],
    rank: int,
    gradients: CostRecorder | None,
) -> dict[str, torch.Tensor]:
    """Return the file's tensors: for each parameter with data its mean squares, its factor and its
    cost."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    progress = LoopProgress("factors", "weight", len(parameters))
    # Of the owners.
    main_parts: dict[Inputs, torch.Tensor] = {}
    tensors = {}
    for number, (name, parameter) in enumerate(parameters, 1):
        matrices = matrices_of(parameter)
        parts = [inputs.get(matrix.data_ptr()) for matrix in matrices]
        key = name.removesuffix(".weight")
        if any(part and part.tokens for part in parts):
            shape = parameter.shape[:-2]
            tensors[key] = stack([mean_squares(part) for part in parts], shape)
            if rank:
                factors = [factor_of(part, rank, main_parts) for part in parts]
                tensors[f"{key}.factor"] = stack(factors, shape)
            if gradients and not gradients.failure:
                costs = [gradients.cost_of(part) for part in parts]
                tensors[f"{key}.cost"] = stack(costs, shape)
                gains = map(gradients.gain_of, parts, matrices)
                tensors[f"{key}.gain"] = stack(list(gains), shape)
        progress.show(number)
    progress.end()
    return tensors


def stack(parts: list[torch.Tensor | None], shape: tuple[int, ...]) -> torch.Tensor:
    """Put the parts of a parameter together in this shape, (experts,) or (), with zeros for those
    that are missing."""
    zeros = torch.zeros_like(next(part for part in parts if part is not None))
    whole = torch.stack([zeros if part is None else part for part in parts])
    return whole.view((*shape, *zeros.shape))


def mean_squares(inputs: Inputs) -> torch.Tensor | None:
    """Return the mean square of each column, float32 (columns,); None without data."""
    return inputs.squares.cpu() / inputs.tokens if inputs.tokens else None


def factor_of(
    inputs: Inputs, rank: int, main_parts: dict[Inputs, torch.Tensor]
) -> torch.Tensor | None:
    """Return a factor of the second moments, float16 (columns, rank at most); None without data."""
    if not inputs.tokens:
        return None
    if inputs.owner not in main_parts:
        main_parts[inputs.owner] = find_main_part(inputs.owner, rank).float()
        # What is not needed again makes room.
        inputs.owner.products = None
    factor = main_parts[inputs.owner].double()

    # What a sketch, or inputs of others, has beyond the mean square.
    squares = factor.square().sum(1).clamp(min=1e-30)
    share = mean_squares(inputs).double() / squares
    return (factor * share.clamp(max=1).sqrt()[:, None]).half()


def find_main_part(inputs: Inputs, rank: int) -> torch.Tensor:
    """Return the factor of these second moments that leaves the least, float64 (columns, rank at
    most).

    By Nystrom's approximation from their products with some directions: random ones, or, where the
    moments are whole, such as they have turned to their main part (Halko, Martinsson and Tropp
    2011, algorithms 4.4 and 5.5)."""
    products = inputs.products / inputs.tokens
    directions = directions_for(len(products), rank, products.device)
    if not inputs.is_sketched:
        moments = products
        for _ in range(TURNS):
            directions = torch.linalg.qr(moments @ directions).Q
        products = moments @ directions
    products = products.double()
    values, vectors = torch.linalg.eigh(directions.double().T @ products)
    half = products @ vectors / values.clamp(min=values[-1] * 1e-6 + 1e-30).sqrt()
    return (half @ torch.linalg.eigh(half.T @ half).eigenvectors)[:, -rank:].cpu()


class LoopProgress:
    """Shows how far a loop is: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, task: str, noun: str, total: int | None):
        self._task = task
        self._noun = noun
        self._total = total
        self._started = time.monotonic()
        self._next = self._started
        self._count_shown = 0

    def show(self, done: int, more: str = "") -> None:
        """Print how many rounds are done if the last line is old enough."""
        now = time.monotonic()
        if now < self._next:
            return
        on_terminal = is_terminal(sys.stdout)
        self._next = now + PROGRESS_INTERVAL_S[on_terminal]
        parts = [self._task, f"{self._noun} {done:,}", more]
        if self._total:
            parts[1] += f" of {self._total:,}"
            parts += describe_time_left(now - self._started, done / self._total)
            if on_terminal:
                filled = 20 * done // self._total
                parts.insert(1, f"[{'#' * filled:.<20}]")
        line = "  ".join(filter(None, parts))
        if on_terminal:
            say(shorten(line, terminal_width() - 1), before=CLEAR_LINE, end="")
        else:
            say(line)

    def end(self) -> None:
        clear_line()


def say_collected(
    model: torch.nn.Module, inputs: Iterable[Inputs], path: Path, tokens: int
) -> None:
    """Print what the file knows, and whether that is as much as README's tables were made with."""
    experts = [part.tokens for part in inputs if part.is_expert]
    layers = [part for part in inputs if not part.is_expert]
    embeddings = weights_of(model, torch.nn.Embedding)
    without = [part.name for part in layers if not part.tokens and part.name not in embeddings]
    reached = sum(part.tokens > 0 for part in inputs)
    text = f"{count_of(reached, 'weight')} with data from {count_of(tokens, 'token')}"
    if without:
        text += f"; without: {quote_names(without)}"
    say_paragraph("Statistics:", f"{path}: {text}")

    times = ENOUGH_TOKENS / tokens
    wanted = f"{ENOUGH_TOKENS:,} tokens"
    if experts:
        median = statistics.median_low(experts)
        seen = f"the least saw {count_of(min(experts), 'token')}, the median {median:,}"
        if unseen := experts.count(0):
            seen += f"; no token reached {unseen:,} of their {count_of(len(experts), 'weight')}"
        say_paragraph("Experts:", seen)
        times = max(times, ENOUGH_TOKENS_OF_EXPERT / max(median, 1))
        wanted += f", {ENOUGH_TOKENS_OF_EXPERT:,} for the median expert"
    verdict = "enough" if times <= 1 else f"too few, give {math.ceil(times):,} times as many"
    say_paragraph("Data:", f"{verdict}: README's tables were measured with {wanted}")


# ---- Plan: all that is decided before the first weight is read -----------------------------------

# Keys of config.json.
LAYER_COUNTS = (
    "num_hidden_groups",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_layers_per_stack",
)
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
        *EXPERTS_PER_TOKEN,
    ),
    as_string: ("model_type", "architectures", "dtype", "torch_dtype"),
    as_boolean: ("tie_word_embeddings", "is_encoder_decoder"),
}
# Files beside the weights that are not the model's. All others at the folder's top level are
# copied, among them the voices of Qwen2.5-Omni, without which transformers does not load it.
OTHER_WEIGHTS = (
    r"(?<!^spk_dict)"
    r"\.(safetensors|bin|pth?|ckpt|gguf|ggml|onnx([_.]data)?|h5|msgpack|npz|pkl|pickle|nemo|ot"
    r"|tflite|tar(\.\w+)?|tgz|zip|index\.json)$"
)
USUAL_GROUP_SIZE = 128
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
    # Of the whole folder; None where there is no limit.
    max_size_gb: float | None = None
    # What `spend_budget` chose for 8 bits beside --int8: names of weights, or ROUTED_EXPERTS. None
    # where there is no limit, or nothing was chosen yet.
    chosen: list[str] | None = None

    @property
    def form(self) -> Format:
        return FORMATS[self.format]

    @property
    def rule(self) -> str:
        """Describe how scales and codes are chosen."""
        use_and_digest = (self.importance or "").split()
        return " ".join([self.scale, *use_and_digest[:-1]])


@dataclass(frozen=True)
class Placement:
    """Where the bytes of an output tensor begin."""

    shard: int  # its number
    offset: int  # in the file


@dataclass(frozen=True)
class Recipe:
    """How the codes and scales of a packed weight are made: with its `Packing`, all that counts."""

    with_offset: bool  # codes are stored plus half of their range
    searches: bool = False  # scales are those of least squared error, not of the largest weight
    has_statistics: bool = False  # columns are weighed by their mean square inputs
    has_feedback: bool = False  # columns make up for the errors of those before them
    packed_by: KernelKind | None = None  # None: by torch
    measured_by: KernelKind | None = None


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
    # What vLLM makes of it, where it renames layers themselves.
    in_vllm: str = ""
    # None where it is kept.
    recipe: Recipe | None = None

    @property
    def bytes_read(self) -> int:
        return self.source.nbytes + (self.scales.nbytes if self.scales else 0)


@dataclass(frozen=True)
class TokenBytes:
    """The weights that are read for a token of text, in bytes of the output."""

    total: int
    # Of these the head's, or those of the embedding that it is tied to.
    head: int


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
    # By output tensor.
    placements: dict[str, Placement]
    # Beside the shards, by name: what is copied or written, the index last.
    other_files: dict[str, Path | bytes]
    # SHA-256 of these files.
    hashes: dict[str, str]
    left_out: list[str]
    # None where config.json and shapes do not tell.
    token_bytes: TokenBytes | None
    # The class of transformers that loads the whole model, and the options that it needs.
    loader: str
    load_options: str = LOAD_OPTIONS
    # The dtype for `vllm serve` where the format's scales have one of their own.
    serving_dtype: str = "float16"
    notes: Collection[str] = ()
    warnings: Collection[str] = ()
    statistics: Importance | None = None
    # How many stacks of experts are read as one weight an expert.
    stacks: int = 0
    # Why transformers would not load all of the folder.
    fails_in_transformers: str = ""
    # What the statistics' costs tell; None without these.
    expectation: Expectation | None = None


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
    if options.max_size_gb and options.chosen is None:
        draft = spend_budget(draft)
        refuse(draft, TENSORS)
    options = draft.options
    warnings = list(messages(draft, WARNING))
    notes = list(messages(draft, NOTE))
    tensors = [with_recipe(tensor, options, statistics) for tensor in draft.tensors]
    return replace(
        plan_files(checkpoint, tensors, options),
        notes=notes,
        warnings=warnings,
        statistics=statistics,
        stacks=len(separated),
        serving_dtype="bfloat16" if types_without_float16(draft) else "float16",
        fails_in_transformers=reason_transformers_fails(draft),
        load_options=DECODING_OPTIONS if must_be_decoded(draft) else LOAD_OPTIONS,
        expectation=Expectation.of(draft),
    )


def choose_group_size(sources: list[TensorInfo], kinds: dict[str, str], options: Options) -> int:
    """Return how many columns share a scale: what was asked for; else for engines the largest size
    that they hold and that divides all columns, or the least if none does; else the usual one."""
    if options.group_size:
        return options.group_size
    if not options.form.for_engines:
        return USUAL_GROUP_SIZE
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


def with_recipe(tensor: TensorPlan, options: Options, statistics: Importance | None) -> TensorPlan:
    """Decide how a weight's codes and scales are made; the plan of a tensor that is kept stays."""
    packing = tensor.packing
    if not packing:
        return tensor

    # The error of 8 bits is so small that a search gains nothing.
    searches = packing.bits == 4 and options.scale == "mse"
    rank = statistics.rank_of(tensor.source) if searches and statistics else None
    dtype = kernel_dtype(tensor.source)
    packed_by = None
    if packing.bits == 4 and packing.group_size <= MAX_GROUP:
        variant = quantize_variant(options.scale, statistics is not None)
        packed_by = KernelKind("quantize", dtype, variant)
    recipe = Recipe(
        options.form.with_offset,
        searches,
        has_statistics=rank is not None,
        has_feedback=bool(rank),
        packed_by=packed_by,
        measured_by=KernelKind("measure", dtype, measure_variant(statistics is not None)),
    )
    return replace(tensor, recipe=recipe)


def kernel_dtype(info: TensorInfo) -> str:
    """Return the dtype in which kernels take a weight."""
    return {"F64": "F32"}.get(info.dtype, info.dtype)


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
            tensors.append(plan_restored_weight(checkpoint, options, module, dtype, padded))
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
    options: Options,
    module: str,
    dtype: str,
    padded: dict[str, tuple[int, int]],
) -> TensorPlan:
    """Decide what the parts of a packed weight are decoded to."""
    form = options.form
    infos = checkpoint.tensors
    for suffix in form.suffixes:
        if module + suffix not in infos:
            problem = f"tensor {module + suffix!r} is missing: copy it again"
            raise QuantizeError(f"{checkpoint.folder}: {problem}")
    packing = packing_of_parts(checkpoint, options, module)
    words = infos[module + form.words]
    scales = infos[module + form.scales]
    if form.transposed:
        words = words.transposed()
        scales = scales.transposed()

    rows = words.shape[0]
    columns = words.shape[1] * packing.codes_per_word
    shape = padded.get(f"{module}.weight", (rows, columns))
    if shape[0] != rows or packing.columns_of(shape[1]) != columns:
        raise QuantizeError(
            f"{checkpoint.folder / QUANTIZE_CONFIG_NAME}: {shape[0]:,} by {shape[1]:,} are not"
            f" what {module!r} has, {rows:,} by {columns:,}: copy the folder again"
        )
    output = OutputTensor(f"{module}.weight", dtype, shape)
    recipe = Recipe(form.with_offset)
    return TensorPlan(words, None, packing, (output,), scales, recipe=recipe)


def packing_of_parts(checkpoint: Checkpoint, options: Options, module: str) -> Packing:
    """Find how a weight is packed. Raises if its parts are not what this program makes of any
    weight with the folder's options."""
    form = options.form
    size = options.group_size
    parts = [checkpoint.tensors[module + suffix] for suffix in form.suffixes]
    for packing in (Packing(4, size), Packing(8, 128), Packing(8, size)):
        if are_parts_of(packing, parts, form, checkpoint):
            return packing

    found = ", ".join(f"{info.name!r} {info.dtype} {info.shape}" for info in parts)
    raise QuantizeError(
        f"{checkpoint.folder}: {found} are not the parts of a weight in {form.name}, groups of"
        f" {size}: copy the folder again"
    )


def are_parts_of(
    packing: Packing, parts: list[TensorInfo], form: Format, checkpoint: Checkpoint
) -> bool:
    """Check whether a weight that is packed so has such parts, by their dtypes and shapes."""
    words, scales = parts[:2]
    if len(words.shape) != 2 or scales.dtype not in FLOAT_DTYPES:
        return False
    rows, row_words = words.shape[::-1] if form.transposed else words.shape
    weight = replace(words, shape=(rows, row_words * packing.codes_per_word))
    outputs = form.outputs(weight, packing, scales.dtype)
    for info, output in zip(parts, outputs):
        if (info.dtype, info.shape) != (output.dtype, output.shape):
            return False

    # Twice as many columns in 4 bits have as many words as these in 8.
    for info, constant, output in zip(parts[2:], form.constants, outputs[2:]):
        if constant == WEIGHT_SHAPE and checkpoint.read(info, 0, info.nbytes) != output.content():
            return False
    return True


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
            sources.append(replace(part, name=renamed))
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
    eights = []
    for info, reason in zip(sources, reasons):
        eights.append(not reason and gets_8_bits(info, kinds.get(info.name), options))
    # Groups of 128 where these fit. Engines hold routed experts as one, so they must fit all.
    ragged = {info.name for info, eight in zip(sources, eights) if eight and info.shape[1] % 128}
    ragged_experts = any(map(EXPERT_PATTERN.match, ragged))
    computed_in = model_dtype(config)
    loadings = list(dict.fromkeys(loadings_of(config)))
    renames = renames_in_vllm(config)
    for info, reason, eight in zip(sources, reasons, eights):
        packing = None
        outputs = (OutputTensor(info.name, info.dtype, info.shape),)
        if not reason:
            misfit = ragged_experts if EXPERT_PATTERN.match(info.name) else info.name in ragged
            size = 128 if eight and not misfit else options.group_size
            packing = Packing(8 if eight else 4, size)
            outputs = options.form.outputs(info, packing, computed_in)
        in_memory = names_in_memory(info.name, loadings) if len(info.shape) == 2 else ()
        kind = kinds.get(info.name, "")
        yield TensorPlan(
            info,
            reason,
            packing,
            outputs,
            kind=kind,
            in_memory=in_memory,
            in_vllm=name_in_vllm(info.name, renames),
        )


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
    is_whole = kind in options.form.whole_kinds and kind != "embeddings"
    may_have_8_bits = kind == TOWERS or (kind == "head" and is_lm_head(info.name))
    is_asked_for = may_have_8_bits and gets_8_bits(info, kind, options)
    if is_whole and not is_asked_for:
        return f"{kind} (whole for engines)"
    return None


def gets_8_bits(info: TensorInfo, kind: str | None, options: Options) -> bool:
    """Return whether --int8 names a weight, or --max_size_gb chose it."""
    return named_by(options.int8, info) is not None or is_chosen(info, kind, options)


def is_chosen(info: TensorInfo, kind: str | None, options: Options) -> bool:
    """Return whether --max_size_gb chose 8 bits for a weight."""
    return chosen_name(info, kind) in (options.chosen or ())


def chosen_name(info: TensorInfo, kind: str | None) -> str:
    """Return the name by which a weight stands in `Options.chosen`."""
    is_routed_expert = EXPERT_PATTERN.match(info.name) and kind != MTP
    return ROUTED_EXPERTS if is_routed_expert else info.name


def count_token_bytes(tensors: list[TensorPlan], config: dict) -> TokenBytes | None:
    """Count the weights that a model which generates text reads for each token.

    These are all of its language model, but of the routed experts those that a token reaches, and
    of an embedding no more than a row. Returns None for other models, and where config.json does
    not tell how many experts a token reaches."""
    sources = [tensor.source for tensor in tensors]
    apart = find_towers(sources, config) | find_mtp((info.name for info in sources), config)
    heads = find_heads(tensors, apart, config)
    if any(config_values(config, "is_encoder_decoder")) or not heads:
        return None

    share = share_of_experts(sources, config)
    head = sum(map(output_bytes, heads))
    total = float(head)
    for tensor in tensors:
        name = tensor.source.name
        if tensor.kind in ("embeddings", "head") or name in apart:
            continue
        if not is_routed(name):
            total += output_bytes(tensor)
        elif share is None:
            return None
        else:
            total += share * output_bytes(tensor)
    return TokenBytes(round(total), head)


def find_heads(tensors: list[TensorPlan], apart: set[str], config: dict) -> list[TensorPlan]:
    """Find the language model's heads, or the embedding that stands for one.

    `apart` names what is not in the language model, where its head may stand all the same."""
    heads = []
    for tensor in tensors:
        is_own = tensor.source.name not in apart or is_lm_head(tensor.source.name)
        if tensor.kind == "head" and is_own:
            heads.append(tensor)
    if heads or not any(config_values(config, "tie_word_embeddings")):
        return heads
    widths = config_values(config, "hidden_size", "d_model", "n_embd")
    of_words = []
    for tensor in tensors:
        # Of two dimensions, and not a scalar.
        is_embedding = tensor.kind == "embeddings" and is_of_words(tensor.source.name)
        if is_embedding and (not widths or tensor.source.shape[1] in widths):
            of_words.append(tensor)
    return sorted(of_words, key=output_bytes)[-1:]


def is_of_words(name: str) -> bool:
    """Check whether an embedding is of words, and not of positions, types or images."""
    return not re.search(NO_WORDS, name) and not TOWER_PATH.search(name)


def output_bytes(tensor: TensorPlan) -> int:
    """Return how many bytes a tensor becomes."""
    return sum(output.nbytes for output in tensor.outputs)


def is_routed(name: str) -> bool:
    """Check whether a tensor holds routed experts: one, or a stack of them."""
    return bool(EXPERT_PATTERN.match(name) or STACK_PATTERN.match(name))


def share_of_experts(sources: list[TensorInfo], config: dict) -> float | None:
    """Return which part of a layer's routed experts a token reaches; None if that is not known, or
    not the same in all layers."""
    counts = set(count_experts(sources).values())
    reached = set(config_values(config, *EXPERTS_PER_TOKEN))
    if len(counts) != 1 or len(reached) != 1:
        return None
    count = counts.pop()
    number = reached.pop()
    return number / count if 0 < number <= count else None


def is_lm_head(name: str) -> bool:
    """Check whether a head has the one name by which engines know a head that is packed."""
    return bool(re.search(r"(^|\.)lm_head\.weight$", name))


def plan_files(checkpoint: Checkpoint, tensors: list[TensorPlan], options: Options) -> Plan:
    """Plan the files: what is copied, written or left out, the shards, and the fingerprint of what
    decides them."""
    described = {} if options.restore else options.form.describe(tensors, options)
    config = checkpoint.config | described.pop(CONFIG_NAME, {})
    if not options.restore and EDGE_LLM in options.form.loaded_by:
        config |= count_of_listed_layers(config)
    if checkpoint.has_config:
        described[CONFIG_NAME] = config
    written = {name: as_json_file(value) for name, value in described.items()}
    copied, left_out = plan_other_files(checkpoint, {INDEX_NAME, *written})
    hashes = {name: hash_file(path) for name, path in copied.items()}
    hashes |= {name: hashlib.sha256(data).hexdigest() for name, data in written.items()}

    facts = {
        "version": FORMAT_VERSION,
        "program": FORMAT_SINCE,
        "options": vars(options),
        "sources": checkpoint.sources,
        "dtypes": {} if options.restore else dtypes_of_packed(tensors),
    }
    # The times of the weights' files decide no byte. What was made at other times is refused.
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
    weight_map = {name: shards[place.shard].name for name, place in sorted(placements.items())}
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
        token_bytes=None if options.restore else count_token_bytes(tensors, checkpoint.config),
        loader=loading_class(checkpoint.config),
    )


def bytes_of_other(content: Path | bytes) -> int:
    """Return how large one of `Plan.other_files` is."""
    return content.stat().st_size if isinstance(content, Path) else len(content)


def count_of_listed_layers(config: dict) -> dict[str, int]:
    """Make the count of layers where config.json has only their list, as transformers 5 writes it
    for NemotronH. TensorRT Edge-LLM stops without the count, which others derive from the list."""
    listed = config.get("layers_block_type")
    if not isinstance(listed, list) or "num_hidden_layers" in config:
        return {}
    return {"num_hidden_layers": len(listed)}


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
        if link := broken_link(path):
            raise QuantizeError(f"{path}: {link}: mend or remove it, it would be copied")
        refuse_partial(path)
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
    if holds_statistics(path):
        return "statistics"
    if re.search(OTHER_WEIGHTS, path.name):
        return "other weights"
    if path.suffix in (".aria2", ".crdownload", ".incomplete", ".part", ".partial"):
        return "of a download"
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
            placements[name] = Placement(number, len(data) + start)
        shards.append(ShardPlan(f"model-{number + 1:05}.safetensors", data, len(data) + end))
    return shards, placements


def read_facts(folder: Path) -> dict:
    """Read how a folder was made, `Plan.facts`, which each of its shards states. Raises if no shard
    does, if another version made one of them, or if they are not of one run."""
    facts: dict = {}
    # By fingerprint and facts, which all shards of a run have in common.
    shard_of_run: dict[tuple[str | None, str], str] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        metadata = read_metadata(path)
        if FACTS_KEY not in metadata:
            continue
        try:
            stated = parse_facts(metadata[FACTS_KEY])
        except FactsError as error:
            raise QuantizeError(f"{path}: {error}: {error.remedy}") from None
        facts = facts or stated
        run = (metadata.get(METADATA_KEY), metadata[FACTS_KEY])
        shard_of_run.setdefault(run, path.name)
    if not facts:
        raise QuantizeError(f"{folder}: {why_no_facts(folder)}")
    if len(shard_of_run) > 1:
        shards = quote_names(shard_of_run.values())
        raise QuantizeError(f"{folder}: {shards} are of different runs: convert again")
    return facts


def why_no_facts(folder: Path) -> str:
    """Explain that no shard in a folder says how it was made."""
    for path in filter(Path.is_file, sorted(folder.glob("model-*.safetensors"))):
        try:
            read_header(path)
        except (ValueError, RecursionError) as error:
            return f"{path.name} is not a whole safetensors file ({error}): copy it again"
    problem = "no shard in it says how it was made"
    return f"{problem}: only this program's own folders can be read"


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
    # Version 1.0.0 did not state itself.
    program = facts.pop("program", "1.0.0")
    if not isinstance(program, str):
        raise damaged
    if version != FORMAT_VERSION:
        raise FactsError(
            f"made by quantize_int4.py {program} (format {version}), this is {__version__} (format"
            f" {FORMAT_VERSION})",
            f"use version {program}, or convert again",
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
        and isinstance(value["max_size_gb"], int | float | None)
        and are_names(value["chosen"])
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


def are_names(value: object) -> bool:
    """Return whether a value read from JSON is a list of names, or none is given."""
    if value is None:
        return True
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


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
        # Where it is not given, the group size follows from the input's columns, and the choice
        # from the other options.
        if before == value or (name == "group_size" and others) or name == "chosen":
            continue
        if name == "importance":
            was_another = "another file" if before and value else describe_value(name, bool(before))
            changed.append(f"--importance was {was_another}")
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


# ---- Budget: what errors are expected to lose, and what gets 8 bits for --max_size_gb ------------

# Stands in `Options.chosen` for the routed experts of all layers, which engines hold in one width.
ROUTED_EXPERTS = "routed experts"
# Relative RMS errors of Gaussian weights in 4 bits, by the rule of scales and the columns of a
# group, and in 8 bits.
USUAL_ERRORS = {
    "absmax": {128: 0.1174, 64: 0.1077, 32: 0.0971},
    "mse": {128: 0.0967, 64: 0.0899, 32: 0.0810},
}
USUAL_ERROR_OF_8_BITS = 0.0063
# How many times as large the errors of trained weights may be, and with error feedback, which
# trades them for errors of outputs: for SmolLM2's worst weights 1.3 and 1.7 times.
STILL_USUAL = 1.5
STILL_USUAL_WITH_FEEDBACK = 2.0
# The part of the mean squares that error feedback leaves beyond what a factor does not explain.
# With the errors above and factors of rank 32 it foretells what --verify then expects, and up to a
# third more, for SmolLM2, a small Llama and a small mixture of experts.
LEFT_BY_FEEDBACK = 0.1


@dataclass(frozen=True)
class Expectation:
    """What the statistics' costs tell before a weight is read."""

    # The divergence from the source in nat a token, and what it would be without the choice of
    # --max_size_gb.
    divergence: float
    without_choice: float
    # Packed weights that the file has no costs of, and that are not counted.
    unknown: int

    @staticmethod
    def of(draft: Draft) -> Expectation | None:
        """Add up what is expected of a draft; None if its statistics have no costs."""
        statistics = draft.statistics
        if not statistics or not statistics.has_costs:
            return None
        losses = [expected_loss(tensor, statistics) for tensor in draft.tensors]
        divergence = without_choice = sum_of_known(losses)
        if draft.options.chosen:
            plain = with_choice(draft, [])
            without_choice = sum_of_known(
                expected_loss(tensor, statistics) for tensor in plain.tensors
            )
        return Expectation(divergence, without_choice, losses.count(None))


def sum_of_known(numbers: Iterable[float | None]) -> float:
    """Add up numbers, without those that are not known. The order does not matter."""
    return math.fsum(number for number in numbers if number is not None)


def expected_loss(tensor: TensorPlan, statistics: Importance) -> float | None:
    """Return the divergence that a tensor as it is planned is expected to bring, in nat a token:
    its cost times the usual square of the relative error of its outputs. None if its cost is not
    known."""
    if not tensor.packing:
        return 0.0
    info = tensor.source
    cost = statistics.cost_of(info)
    if not cost:
        return cost

    error = USUAL_ERROR_OF_8_BITS
    share = 1.0
    if tensor.packing.bits == 4:
        size = tensor.packing.group_size
        errors = USUAL_ERRORS["mse"]
        error = errors[min(errors, key=lambda known: abs(known - size))]
        share = min(1.0, statistics.unexplained_share(info) + LEFT_BY_FEEDBACK)
    return cost * error**2 * share / (statistics.gain_of(info) or 1.0)


def largest_usual_error(packing: Packing, options: Options) -> float | None:
    """Return up to what a weight's relative RMS error is usual; None where that is not known."""
    if packing.bits == 8:
        return STILL_USUAL * USUAL_ERROR_OF_8_BITS
    usual = USUAL_ERRORS[options.scale].get(packing.group_size)
    times = STILL_USUAL_WITH_FEEDBACK if FEEDBACK in options.rule else STILL_USUAL
    return usual and times * usual


@dataclass(frozen=True)
class Upgrade:
    """More bits for weights that engines hold in one width."""

    # Of the weights, as in `Options.chosen`.
    names: frozenset[str]
    # What it adds to the folder, and takes from the expected divergence.
    nbytes: int
    saving: float


def spend_budget(draft: Draft) -> Draft:
    """Give 8 bits to the weights where a byte saves most of the expected divergence, until the
    folder is as large as --max_size_gb allows. Raises if the least folder is larger.

    A head that engines load in 8 bits begins with these, and may become whole."""
    limit = round(draft.options.max_size_gb * GB)
    if not draft.statistics.has_costs:
        raise QuantizeError(
            f"{draft.statistics.path} has no costs (X.cost), by which --max_size_gb chooses:"
            " collect it again with costs=True, which is the default of collect_statistics"
        )
    heads = packable_heads(draft)
    least = with_choice(draft, heads)
    room = limit - folder_bytes(least)
    if room < 0:
        raise QuantizeError(describe_least(least, limit - room))

    upgrades = find_upgrades(least, heads)
    while True:
        chosen = set(heads)
        for upgrade in best_upgrades(upgrades, room):
            # A head that was chosen no longer is.
            chosen ^= upgrade.names
        filled = with_choice(draft, chosen)
        # Headers and config.json grow with what is chosen.
        excess = folder_bytes(filled) - limit
        if excess <= 0:
            return filled
        room -= excess


def describe_least(draft: Draft, nbytes: int) -> str:
    """Describe that a limit is too small, and the least that is not."""
    # The number itself is written to each shard, and longer ones take more.
    nbytes += 32 * (1 + math.ceil(nbytes / (draft.options.shard_size_gb * GB)))
    head = " and a head in 8" if draft.options.chosen else ""
    return (
        f"--max_size_gb {draft.options.max_size_gb} is too little: give"
        f" {math.ceil(nbytes / 1000) / 1e6} or more, which the folder takes with 4 bits{head}"
    )


def with_choice(draft: Draft, chosen: Iterable[str]) -> Draft:
    """Plan a draft's tensors with this choice."""
    options = replace(draft.options, chosen=sorted(chosen))
    tensors = list(plan_tensors(draft.sources, draft.kinds, options, draft.config))
    return replace(draft, options=options, tensors=tensors)


def folder_bytes(draft: Draft) -> int:
    """Return how large the folder of a draft is, with all its files."""
    plan = plan_files(draft.checkpoint, draft.tensors, draft.options)
    nbytes = sum(shard.size for shard in plan.shards)
    return nbytes + sum(map(bytes_of_other, plan.other_files.values()))


def packable_heads(draft: Draft) -> list[str]:
    """Name the heads that are whole by default, and that engines load in 8 bits."""
    names = []
    for tensor in draft.tensors:
        name = tensor.source.name
        is_known = draft.statistics.cost_of(tensor.source) is not None
        if tensor.kind == "head" and is_lm_head(name) and not tensor.packing and is_known:
            names.append(name)
    packed = with_choice(draft, names)
    problems = [*check_packed_head(packed), *check_columns(packed)]
    is_packed = {tensor.source.name for tensor in packed.tensors if tensor.packing}
    return [] if problems else sorted({*names} & is_packed)


def find_upgrades(least: Draft, heads: list[str]) -> list[Upgrade]:
    """List what may get more bits: all of a unit, if its costs are known, and an entry of
    config.json can name it."""
    statistics = least.statistics
    units = []
    for unit in units_of(least):
        are_heads = all(tensor.source.name in heads for tensor in unit)
        are_known = all(statistics.cost_of(tensor.source) is not None for tensor in unit)
        if are_known and (are_heads or all(map(may_have_more_bits, unit))):
            units.append(unit)

    most = with_choice(least, set().union(*map(names_in, units)) - {*heads})
    by_name = {tensor.source.name: tensor for tensor in most.tensors}
    upgrades = []
    for unit in units:
        nbytes = 0
        savings = []
        for tensor in unit:
            upgraded = by_name[tensor.source.name]
            nbytes += output_bytes(upgraded) - output_bytes(tensor)
            savings.append(expected_loss(tensor, statistics))
            savings.append(-expected_loss(upgraded, statistics))
        upgrades.append(Upgrade(names_in(unit), nbytes, math.fsum(savings)))
    return upgrades


def names_in(unit: list[TensorPlan]) -> frozenset[str]:
    """Return the names by which weights stand in `Options.chosen`."""
    return frozenset(chosen_name(tensor.source, tensor.kind) for tensor in unit)


def may_have_more_bits(tensor: TensorPlan) -> bool:
    """Return whether a weight has 4 bits and may have 8. The costs of layers that predict further
    tokens are not of what the model itself predicts."""
    is_packed = tensor.packing is not None and tensor.packing.bits == 4
    return is_packed and tensor.kind != MTP and tensor.in_memory is not None


def units_of(draft: Draft) -> list[list[TensorPlan]]:
    """Group the tensors that engines hold as one, or in one width."""
    # Of a tensor or a whole: another one of its unit, or itself.
    links: dict[str, str] = {}

    def first_of(name: str) -> str:
        while links.setdefault(name, name) != name:
            # Halve the way for those that come after.
            links[name] = links[links[name]]
            name = links[name]
        return name

    tensors = [tensor for tensor in draft.tensors if len(tensor.source.shape) > 1]
    for tensor in tensors:
        for whole in wholes_of(tensor, draft.form):
            links[first_of(tensor.source.name)] = first_of(whole)
    units: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        units.setdefault(first_of(tensor.source.name), []).append(tensor)
    return list(units.values())


def best_upgrades(upgrades: list[Upgrade], room: int) -> Iterator[Upgrade]:
    """Yield the upgrades that save most a byte, as long as there is room for them."""

    def rank(upgrade: Upgrade) -> tuple:
        return -upgrade.saving / upgrade.nbytes, sorted(upgrade.names)

    for upgrade in sorted(upgrades, key=rank):
        if upgrade.saving > 0 and upgrade.nbytes <= room:
            room -= upgrade.nbytes
            yield upgrade


# ---- Rules: what is refused, warned of and noted, in the order of `RULES` at the end -------------

# Names of norms.
NORM_NAME = r"norm|(^|\.)ln"
# Names of the norms before a layer's attention or mixer. A model with these has a norm after its
# last layer.
FIRST_NORM = re.compile(
    r"(input_layernorm|pre_attention_layernorm|attention_norm|attn_norm|operator_norm|norm|ln_?1"
    r"|norm_?1|ln_attn|layer\.0\.layer_norm|pre_mixer_layernorm)\.weight$"
)
# Layers that have no norm by design: ModernBERT's first one, which comes after the embeddings'
# norm, and Inkling's last one for images.
LAYER_WITHOUT_NORM = r"layers\.0\.attn_norm\.weight$|encoder_layers\.\d+\.layer_norm\.weight$"


@dataclass(frozen=True)
class TrainerNames:
    """A row of `TRAINERS_NAMES`: names of a trainer's own format."""

    pattern: str
    owner: str
    remedy: str
    # The types of models that never have such names, where only these are meant.
    model_types: str = ""


TRAINERS_NAMES = (
    TrainerNames(
        r"self_attention\.linear_(qkv|proj)\.|decoder\.layers\.\d+\.mlp\.linear_fc\d\."
        r"|decoder\.final_layernorm\.",
        "Megatron-Core",
        "export it with Megatron-Bridge (AutoBridge.export_ckpt) or with what trained it",
    ),
    TrainerNames(
        r"(^|\.)tok_embeddings\.|\.attention\.(wqkv|w[qkvo])\.|\.feed_forward\.w[123]\.",
        "Meta",
        "convert it with its model's script in transformers' repository, as"
        " convert_llama_weights_to_hf.py",
        "llama mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text phi3",
    ),
)

# Severities.
REFUSED = "refused"
WARNING = "warning"
NOTE = "note"
# What a rule applies to, and so from when on it can be asked.
CHECKPOINT = "checkpoint"
STACKS = "stacks of experts"
TENSORS = "planned tensors"
FOR_ENGINES = "planned tensors of a format for engines"
FOR_OTHERS = "planned tensors of a format for other readers"


def container_of(match: re.Match) -> str:
    """Return the path of the list that a layer is in, from a match of LAYER_PATTERN."""
    return f"{match[1]}.{match[2]}".lstrip(".")


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

    @property
    def packed_towers(self) -> list[TensorInfo]:
        """The packed weights that are not the language model's."""
        return [info for info in self.packed if self.kinds.get(info.name) == TOWERS]

    @property
    def packed_heads(self) -> list[TensorInfo]:
        """The packed heads that have the one name by which engines know these."""
        heads = [info for info in self.packed if self.kinds.get(info.name) == "head"]
        return [info for info in heads if is_lm_head(info.name)]

    @property
    def types(self) -> list[str]:
        """The types of the model and of its language model, as config.json names them."""
        return config_values(self.config, "model_type")

    @functools.cached_property
    def widths(self) -> set[int]:
        """The bits of the packed weights' codes."""
        return {tensor.packing.bits for tensor in self.tensors if tensor.packing}

    @functools.cached_property
    def conv1d(self) -> list[TensorInfo]:
        """The packed weights of GPT-2's Conv1D, which lie as (in, out)."""
        inside = [info for info in self.packed if re.search(r"\.\d+\.", info.name)]
        is_known = oddity_with("conv1d", self.config).conv1d
        for info in inside:
            rows, columns = info.shape
            if is_known or (info.name.endswith(".c_attn.weight") and columns == 3 * rows):
                return inside
        return []

    @property
    def nameable(self) -> list[TensorInfo]:
        """What a pattern may name: all tensors, and the experts of stacks that stay whole."""
        infos = list(self.sources)
        for stack in self.stacks.values():
            infos += stack.weights
        return infos

    @functools.cached_property
    def layers(self) -> dict[str, dict[int, set[str]]]:
        """By container and number of a layer: the names of the tensors in it."""
        layers: dict[str, dict[int, set[str]]] = {}
        for info in self.sources:
            match = LAYER_PATTERN.match(info.name)
            if match:
                numbers = layers.setdefault(container_of(match), {})
                numbers.setdefault(int(match[3]), set()).add(info.name[match.end() :])
        return layers

    @functools.cached_property
    def largest_container(self) -> str:
        """The container of the most layers, which are the language model's if any are.

        A layer has matrices in modules of its own, other than the parts of a sequence."""
        whole = set()
        for info in self.sources:
            match = LAYER_PATTERN.match(info.name)
            module = info.name[match.end() :].removesuffix(".weight") if match else ""
            if len(info.shape) == 2 and "." in module:
                whole.add(container_of(match))
        others = r"vis(ion|ual)|image|audio|speech|tower|mtp|encoder"
        lists = [name for name in self.layers if name in whole] or [*self.layers]
        names = [name for name in lists if not re.search(others, name)]
        return max(names or lists, key=lambda name: len(self.layers[name]), default="layers")

    @property
    def generates_text(self) -> bool:
        pattern = r"(For(CausalLM|ConditionalGeneration)|LMHeadModel)$"
        return any(re.search(pattern, name) for name in architectures_of(self.config))


@dataclass(frozen=True)
class Rule:
    """A row of `RULES`: how severe it is, what it applies to, and the function that yields its
    messages where it is broken."""

    severity: str
    applies_to: str
    check: Callable[[Draft], Iterator[str]]


def messages(draft: Draft, severity: str, subject: str = TENSORS) -> Iterator[str]:
    """Yield what the rules of a severity and subject have to say of a draft."""
    subjects = [subject]
    if subject == TENSORS:
        subjects.append(FOR_ENGINES if draft.form.for_engines else FOR_OTHERS)
    for rule in RULES:
        if rule.severity == severity and rule.applies_to in subjects:
            yield from rule.check(draft)


def refuse(draft: Draft, subject: str) -> None:
    """Raise the first message of the rules by which a draft is refused."""
    for message in messages(draft, REFUSED, subject):
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
        r"|\nF(4|6_|8_)|\.weight\n[IU]\d+ 2-D"
        # A plain parameter may be called so, too.
        r"|\.(W_q|q_weight|trellis|Qidxs|_?weight[.:_]_?q?data)\n[IU]",
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
# bitsandbytes, GPTQ and AWQ, compressed-tensors, ModelOpt, fp8, mxfp4, HQQ, AQLM, VPTQ, quanto,
# SpQR, QuIP# and torchao.
PACKED_DTYPES = {"U8", "I8", "U16", "I16", "U32", "I32"}
PACKED_DTYPES |= {name for name in DTYPE_BITS if name.startswith(("F4", "F6_", "F8_"))}
PACKED_PART = (
    r"(^|[._])((weight|input|output|act|activation)_(q?scales?|scale_inv|scale_2|global_scale"
    r"|zeros?|zero_points?|packed|shape|g_idx)|qweight|q?scales|q?zeros|g_idx|absmax|nested_absmax"
    r"|quant_map|quant_state.*|weight_format|SCB|W_q|blocks|codes|codebooks?|centroids|bitmask"
    r"|dense_weights|row_offsets|col_vals|Qidxs|weight[.:_]_?(q?data|scale))$"
)


def check_two_widths(draft: Draft) -> Iterator[str]:
    """Check that the format has two widths if an option asks for the wider one."""
    for name in ("int8", "max_size_gb"):
        if getattr(draft.options, name) and not draft.form.has_two_widths:
            reason = "not all of its readers know two widths: use --format compressed-tensors"
            yield f"--{name} is not for {draft.form.name}: {reason}"


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
        for end in re.finditer(r"\.", name):
            owner = f"{name[: end.start()]}.weight"
            if len(info.shape) == 2 and owner in infos and owner != name:
                inside.setdefault(owner, []).append(info)
    for owner, parts in inside.items():
        for down, up in itertools.permutations(parts, 2):
            product = (up.shape[0], down.shape[1])
            rank = down.shape[0]
            if product == infos[owner].shape and rank == up.shape[1] < min(product):
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


def check_patterns(draft: Draft) -> Iterator[str]:
    """Check that each pattern of --exclude matches something, be it an expert of a kept stack, and
    each of --int8 something that is packed."""
    for pattern in draft.options.exclude:
        if not any(named_by([pattern], info) for info in draft.nameable):
            yield describe_useless_pattern(draft, "--exclude", pattern)
    for pattern in draft.options.int8:
        matched = [tensor for tensor in draft.tensors if named_by([pattern], tensor.source)]
        is_tied = any(config_values(draft.config, "tie_word_embeddings"))
        if not matched and is_tied and re.search(pattern, "lm_head.weight"):
            yield (
                f"--int8 {shlex.quote(pattern)} means the head, which {CONFIG_NAME} ties to the"
                " embedding (tie_word_embeddings), and the embedding is kept: drop it"
            )
        elif not matched:
            yield describe_useless_pattern(draft, "--int8", pattern)
        elif not any(tensor.packing for tensor in matched):
            yield (
                f"--int8 {shlex.quote(pattern)} matches only tensors that are kept, e.g."
                f" {matched[0].source.name!r} ({matched[0].kept_because}): correct or drop it"
            )


def describe_useless_pattern(draft: Draft, option: str, pattern: str) -> str:
    """Describe a pattern that matches nothing, with what may have been meant."""
    names = [info.name for info in draft.nameable]
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
    """Check that --quantize_embeddings is not given. vLLM 0.33 has a class for packed embeddings;
    transformers 5.24 loads them, and stops at the first use (AttributeError)."""
    if draft.options.quantize_embeddings:
        name = draft.form.name
        yield (
            f"--quantize_embeddings: not all engines of {name} read packed embeddings"
            f" ({ENGINES['transformers'].label} does not); int4 can"
        )


def check_group_size(draft: Draft) -> Iterator[str]:
    """Check that engines' kernels have the group size."""
    sizes = draft.form.group_sizes
    if draft.options.group_size not in sizes:
        required = [engine.kernels for engine in draft.form.engines if engine.required]
        kernels = f"engines' kernels ({list_in_words(required)})"
        size = f"--group_size {draft.options.group_size}"
        yield f"{size}: {kernels} have {list_in_words(reversed(sizes))}"


def check_config(draft: Draft) -> Iterator[str]:
    """Check that config.json is there."""
    if not draft.checkpoint.has_config:
        path = draft.checkpoint.config_folder / CONFIG_NAME
        yield f"{path} is missing: engines read in it how {draft.form.name} is packed"


def check_conv1d(draft: Draft) -> Iterator[str]:
    """Check that no weight of GPT-2's Conv1D is packed."""
    yield from describe_weights(
        draft.conv1d,
        "of GPT-2's Conv1D, and so (in, out), which no engine reads packed; int4 can hold them",
    )


def check_names_in_memory(draft: Draft) -> Iterator[str]:
    """Check that the names in memory, under which an engine looks up entries of config.json, are
    known of each weight that needs an entry."""
    packed = []
    for tensor in draft.tensors:
        if tensor.packing:
            packed += modules_of(tensor)
    branches = patterns_of_branches(draft.tensors, packed)

    least = min(draft.widths)
    renamed = []
    for tensor in draft.tensors:
        usual = tensor.packing and tensor.packing.bits == least
        # A tower's own name is known, whatever its layers are called.
        is_in_tower = tensor.kind == TOWERS and any_matches(branches, tensor.source.name)
        if tensor.in_memory is None and not usual and not is_in_tower:
            renamed.append(tensor.source)
    for engine in draft.form.engines:
        if engine.converts_tensors:
            yield from describe_weights(
                renamed,
                f"kept or in 8 bits while {engine.label} calls them otherwise than the file does,"
                f" so that no entry of {CONFIG_NAME} would tell it: drop the option that means"
                " them, or use --format int4",
            )


def check_columns(draft: Draft) -> Iterator[str]:
    """Check that all columns are whole groups: engines have no padding."""
    ragged = []
    for tensor in draft.tensors:
        if tensor.packing and tensor.source.shape[1] % tensor.packing.group_size:
            ragged.append(tensor.source)
    sizes = draft.form.group_sizes
    remedy = f"none of {', '.join(map(str, sizes))} divides all: --exclude them"
    for size in reversed(sizes):
        if not any(info.shape[1] % size for info in draft.packed):
            remedy = f"--group_size {size} divides all{describe_lost_engines(draft, size)}"
    problem = f"with columns that are no multiple of --group_size {draft.options.group_size}"
    yield from describe_weights(ragged, f"{problem}: {remedy}")


def describe_lost_engines(draft: Draft, size: int) -> str:
    """Name the engines that have the group size that was asked for and not this one, and the
    pattern that keeps what is in their way."""
    lost = []
    for engine in draft.form.engines:
        has_size = draft.options.group_size in engine.group_sizes
        if has_size and size not in engine.group_sizes and not why_not_its_model(engine, draft):
            lost.append(engine.label)
    if not lost:
        return ""
    exclude = exclude_for_size(draft, draft.options.group_size)
    return f", but {list_in_words(lost)} cannot serve it{exclude and f': {exclude}'}"


def with_fused_layers(infos: list[TensorInfo], packed: list[TensorInfo]) -> list[TensorInfo]:
    """Add to some weights those of `packed` that vLLM holds as one with them."""
    wanted = {info.name for info in infos}
    for info in infos:
        module, _, name = info.name.removesuffix(".weight").rpartition(".")
        for row in ENGINES["vLLM"].fused_layers:
            if name in row.split(","):
                wanted |= {f"{module}.{part}.weight" for part in row.split(",")}
    return [info for info in packed if info.name in wanted]


def exclude_for_size(draft: Draft, size: int) -> str:
    """Return the option that keeps all that groups of this size do not divide, with what it costs;
    nothing where that is most of the model, or experts."""
    ragged = [info for info in draft.packed if info.shape[1] % size]
    if not ragged:
        return ""
    pattern = pattern_of(with_fused_layers(ragged, draft.packed))
    kept = [info for info in draft.packed if re.search(pattern, info.name)]
    nbytes = sum(info.nbytes for info in kept)
    are_most = 2 * nbytes > sum(info.nbytes for info in draft.packed)
    if are_most or any(EXPERT_PATTERN.match(info.name) for info in kept):
        return ""
    cost = f"{count_of(len(kept), 'weight')}, {format_bytes(nbytes)}"
    return f"--exclude {shlex.quote(pattern)} keeps what {size} does not divide ({cost})"


def check_rows(draft: Draft) -> Iterator[str]:
    """Check that all rows fill the format's words."""
    multiple = draft.form.row_multiple
    ragged = [info for info in draft.packed if info.shape[0] % multiple]
    yield from describe_weights(
        ragged,
        f"with rows that are no multiple of {multiple}: --exclude them, or use compressed-tensors",
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


def check_partly_kept_mtp(draft: Draft) -> Iterator[str]:
    """Check that no entry makes an engine take packed layers of MTP for unquantized ones."""
    packed = [tensor for tensor in draft.tensors if tensor.packing and tensor.kind == MTP]
    types = draft.types
    for engine in draft.form.engines:
        if not packed or not {*types} & {*engine.whole_mtp.get(draft.form.name, ())}:
            continue
        for pattern in patterns_of_modules(draft.tensors, None):
            if "mtp" in pattern:
                name = packed[0].source.name
                yield (
                    f"{engine.name} takes all layers of MTP for unquantized from {draft.form.name}"
                    f' where an entry of {CONFIG_NAME} has "mtp" in it, as that for what is kept,'
                    f" {pattern}, while {name!r} is quantized: --exclude mtp as a whole, too, or"
                    " use --format compressed-tensors"
                )
                break


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
        # It loads none of MTP.
        is_loaded = EXPERT_PATTERN.match(name) and tensor.kind != MTP
        if tensor.packing and engine.one_width_of_experts and is_loaded:
            wholes.append(
                f"{engine.label} reads the experts of all layers in one width, others as noise"
            )
    return wholes


def describe_fate(tensor: TensorPlan) -> str:
    """Describe what becomes of a tensor beside others."""
    if tensor.packing:
        return f"{tensor.source.name!r} gets {tensor.packing.bits} bits"
    return f"{tensor.source.name!r} is kept ({tensor.kept_because})"


def describe_weights(infos: list[TensorInfo], problem: str) -> Iterator[str]:
    """Count the weights that have a problem, if there are some, with one as an example."""
    if infos:
        weights = count_of(len(infos), "weight")
        yield f"{weights} {problem}; e.g. {infos[0].name!r} {infos[0].shape}"


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
    counts = config_values(draft.config, *keys) or config_values(draft.config, *LAYER_COUNTS)
    count = min(counts, default=0)
    halved = oddity_with("halved", draft.config).halved
    if halved and any(re.search(halved, info.name) for info in draft.sources):
        return count // 2
    return count


def check_norms_and_biases(draft: Draft) -> Iterator[str]:
    """Check that each layer has the norms and biases that the others of its kind have."""
    # Of modules in layers. Numbered modules without any are a sequence of unlike ones.
    vectors = set()
    for info in draft.sources:
        match = LAYER_PATTERN.match(info.name)
        name = info.name[match.end() :] if match else ""
        if len(info.shape) == 1 and name.endswith((".weight", ".bias")):
            vectors.add(name)

    missing = []
    for container, layers in draft.layers.items():
        if not container.endswith("experts"):
            missing += missing_vectors(container, layers, vectors)
    if missing:
        yield (
            f"NORMS OR BIASES ARE MISSING: {len(missing):,} that the other layers of their kind"
            f" have are not in the checkpoint: {quote_names(missing)}. {ONES_OR_ZEROS}"
        )


def missing_vectors(
    container: str, layers: dict[int, set[str]], vectors: set[str]
) -> Iterator[str]:
    """Name what layers of a rare kind lack, where exactly one other kind has all that they have,
    and beyond that only vectors."""
    kinds = Counter(map(frozenset, layers.values()))
    for number, names in layers.items():
        fuller = [kind for kind in kinds if kind > names and kind - names <= vectors]
        if are_few(kinds[frozenset(names)], len(layers)) and len(fuller) == 1:
            for name in sorted(fuller[0] - names):
                missing = f"{container}.{number}.{name}"
                if not re.search(LAYER_WITHOUT_NORM, missing):
                    yield missing


def are_few(count: int, total: int) -> bool:
    """Return whether blocks that lack something are too few to be a kind of their own."""
    return count <= max(1, total // 20)


def check_final_norm(draft: Draft) -> Iterator[str]:
    """Check that a model that generates text has a final norm if its layers have norms before
    attention or mixer."""
    post_norm = "openai-gpt" in draft.types
    container = draft.largest_container
    if not draft.generates_text or post_norm or TOWER_WORDS.search(container):
        return
    for info in draft.sources:
        is_outside = not re.search(rf"\.\d+\.|{MTP_NAMES.pattern}", info.name)
        is_norm = re.search(NORM_NAME, info.name) and not TOWER_WORDS.search(info.name)
        if is_outside and is_norm:
            return
    inside = set().union(*draft.layers.get(container, {}).values())
    if any(map(FIRST_NORM.match, inside)):
        yield (
            f"THE FINAL NORM IS MISSING: the layers of {container!r} have norms, but none comes"
            f" after them. {ONES_OR_ZEROS}"
        )


def check_weights(draft: Draft) -> Iterator[str]:
    """Check that each layer and expert has the weights that the others of its kind have, and that
    all experts that config.json counts are there."""
    missing = []
    experts = min(config_values(draft.config, *EXPERT_COUNTS), default=0)
    for (container, module), numbers in weights_by_block(draft.sources).items():
        if container.endswith("experts"):
            counted = 0 if re.search(TOWER_NAMES, container) else experts
            count = max(*numbers, counted - 1) + 1
            missing += [f"{container}.{n}" for n in range(count) if n not in numbers]
        usual = Counter(map(frozenset, numbers.values())).most_common(1)[0][0]
        lacking = [number for number, names in numbers.items() if names < usual]
        if len(numbers) > 2 and are_few(len(lacking), len(numbers)):
            for number in lacking:
                lost = sorted(usual - numbers[number])
                missing += [f"{container}.{number}.{module}{name}" for name in lost]
    if missing:
        yield (
            f"WEIGHTS ARE MISSING: {len(missing):,} that the others of their kind have are not in"
            f" the checkpoint: {quote_names(missing)}. {RANDOM_NUMBERS}"
        )


def weights_by_block(infos: list[TensorInfo]) -> dict[tuple[str, str], dict[int, set[str]]]:
    """Return the names of weights by a container and a module in it, and by the number between."""
    blocks: dict[tuple[str, str], dict[int, set[str]]] = {}
    for info in infos:
        match = re.match(r"(.*)\.(\d+)\.((?:\D*\.)?)(\w+)\.weight$", info.name)
        if match and len(info.shape) == 2:
            numbers = blocks.setdefault((match[1], match[3]), {})
            numbers.setdefault(int(match[2]), set()).add(match[4])
    return blocks


def missing_ends(draft: Draft) -> Iterator[str]:
    """Describe which of head and embedding a model that generates text lacks."""
    if not draft.generates_text:
        return
    ties = config_values(draft.config, "tie_word_embeddings")
    if ties and not any(ties) and not has_head(draft):
        yield f"{CONFIG_NAME} has tie_word_embeddings false, but the checkpoint has no head"
    embeddings = [name for name, kind in draft.kinds.items() if kind == "embeddings"]
    has_vocabulary = config_values(draft.config, "vocab_size")
    if has_vocabulary and all(re.search(NO_WORDS, name) for name in embeddings):
        yield f"{CONFIG_NAME} has a vocab_size, but the checkpoint has no embedding"


def has_head(draft: Draft) -> bool:
    """Return whether a head is there, or what may be one under another name: a matrix outside of
    the layers with a row for each word of an embedding."""
    if "head" in draft.kinds.values():
        return True
    embeddings = [info for info in draft.sources if draft.kinds.get(info.name) == "embeddings"]
    words = replace(Vocabulary.of(embeddings, draft.config), widths=set())
    for info in draft.sources:
        kind = draft.kinds.get(info.name, "embeddings")
        is_outside = not re.search(r"\.\d+\.", info.name)
        if kind != "embeddings" and is_outside and words.fits(*info.shape):
            return True
    return False


def check_ends(draft: Draft) -> Iterator[str]:
    """Check that head and embedding are there."""
    for problem in missing_ends(draft):
        yield f"HEAD OR EMBEDDING IS MISSING: {problem}"


def check_ends_for_engines(draft: Draft) -> Iterator[str]:
    """Check that head and embedding are there, without which no engine serves a model."""
    for problem in missing_ends(draft):
        yield (
            f"{problem}, which loaders would make up: save the whole model, or mend {CONFIG_NAME}"
        )


def check_names_of_trainers(draft: Draft) -> Iterator[str]:
    """Check that names are not of a trainer's own format, which no loader of the model that
    config.json names knows."""
    types = draft.types
    if not types:
        return
    for row in TRAINERS_NAMES:
        names = [info.name for info in draft.sources if re.search(row.pattern, info.name)]
        if names and (not row.model_types or {*types} & {*row.model_types.split()}):
            yield (
                f"NAMES OF A TRAINER: {len(names):,} tensors are named as in {row.owner}'s own"
                f" format, e.g. {names[0]!r}: no loader of model_type {types[0]!r} knows them, and"
                f" would make up its own: {row.remedy}"
            )


# What the owner of the checkpoint should know before the conversion rather than after the copy.


def note_checkpoint(draft: Draft) -> Iterator[str]:
    """Repeat what was noted when the checkpoint was read, and name what said that the model is
    quantized, which it is not."""
    yield from draft.checkpoint.notes
    if draft.checkpoint.quantization:
        stale = " and ".join(draft.checkpoint.quantization)
        yield f"left out as stale, since no tensor is packed: {stale}"


def note_statistics(draft: Draft) -> Iterator[str]:
    """Count what statistics there are for."""
    if draft.statistics:
        four_bits = [t.source for t in draft.tensors if t.packing and t.packing.bits == 4]
        yield draft.statistics.describe(four_bits)


# Names of files of which a tokenizer has one at least.
TOKENIZER_NAMES = r"^(tokenizer|vocab|merges|tekken|spiece|sentencepiece)|\.(model|tiktoken)$"


def note_tokenizer(draft: Draft) -> Iterator[str]:
    """Note that a model which generates text has no tokenizer, without which nobody serves it."""
    folder = draft.checkpoint.config_folder
    names = [path.name for path in folder.iterdir()]
    if draft.generates_text and not any(re.search(TOKENIZER_NAMES, name) for name in names):
        yield f"no tokenizer is in {folder}: copy the model's own there, or give --config_dir"


def warn_of_missing_modules(draft: Draft) -> Iterator[str]:
    """Warn of folders that modules.json names (sentence-transformers), since none is copied."""
    folder = draft.checkpoint.config_folder
    path = folder / MODULES_NAME
    if not path.is_file():
        return
    named = set(re.findall(r'"path": *"([^"/]+)"', path.read_text(errors="replace")))
    missing = sorted(name for name in named if (folder / name).is_dir())
    if missing:
        yield (
            f"{MODULES_NAME} names folders, and folders are not copied: copy {quote_names(missing)}"
            " into the output folder, else embeddings are pooled otherwise, or an engine stops"
        )


def note_group_size(draft: Draft) -> Iterator[str]:
    """State the group size where it was not asked for and is not the usual one."""
    size = draft.options.group_size
    if draft.group_size_is_chosen and size != USUAL_GROUP_SIZE:
        sizes = list_in_words(draft.form.group_sizes)
        yield f"groups of {size}: the largest of {sizes} that divides all columns"


def note_other_engines(draft: Draft) -> Iterator[str]:
    """State why engines that are not required would not serve the folder."""
    for engine in draft.form.engines:
        if engine.required:
            continue
        reason = why_not_its_model(engine, draft)
        reasons = [reason] if reason else reasons_not_to_serve(engine, draft)
        for reason in reasons:
            yield f"{engine.label} {reason}"


def why_not_its_model(engine: Engine, draft: Draft) -> str:
    """Return why an engine cannot serve this model in the format, whatever the options; nothing if
    it can."""
    for model_type in config_values(only(draft.config, "model_type"), "model_type"):
        if engine.known_types and model_type not in engine.known_types.split():
            return (
                f"does not know models of type {model_type}: it takes them for Llama, mostly"
                " without an error, and computes wrongly where they differ"
            )
        if model_type in engine.experts_not_held and any(map(is_expert, draft.tensors)):
            return f"does not hold experts of type {model_type} from {draft.form.name}: use vLLM"
    return ""


def reasons_not_to_serve(engine: Engine, draft: Draft) -> Iterator[str]:
    """Yield why an engine cannot serve the folder, and what could be done about it."""
    size = draft.options.group_size
    if engine.group_sizes and size not in engine.group_sizes:
        sizes = list_in_words(engine.group_sizes)
        what_it_does = engine.misreads_sizes and f", {engine.misreads_sizes}"
        remedy = remedy_for_size(draft, max(engine.group_sizes))
        yield f"cannot serve groups of {size}: it has {sizes} alone{what_it_does}{remedy}"

    ragged = [info for info in draft.packed if info.shape[0] % engine.row_multiple]
    if ragged:
        pattern = pattern_of(with_fused_layers(ragged, draft.packed))
        remedy = f"--exclude {shlex.quote(pattern)} keeps them"
        problem = f"with rows that are no multiple of {engine.row_multiple}: {remedy}"
        yield f"cannot serve {next(describe_weights(ragged, problem))}"

    kept = [tensor for tensor in draft.tensors if is_expert(tensor) and not tensor.packing]
    if kept and engine.misreads_kept_experts:
        yield f"cannot serve experts that are kept: it {engine.misreads_kept_experts}"

    types = config_values(only(draft.config, "model_type"), "model_type")
    is_exempt = any(model_type in engine.types_without_template for model_type in types)
    if engine.needs_chat_template and not is_exempt and not has_chat_template(draft.checkpoint):
        yield "needs a chat template, and the checkpoint has none: put in a chat_template.jinja"


def remedy_for_size(draft: Draft, size: int) -> str:
    """Return how to get groups of this size, as the end of a sentence; nothing where that is not to
    be had."""
    if size not in draft.form.group_sizes:
        return ""
    if not any(info.shape[1] % size for info in draft.packed):
        return f"; --group_size {size} divides all columns"
    exclude = exclude_for_size(draft, size)
    return exclude and f"; with --group_size {size}, {exclude}"


def has_chat_template(checkpoint: Checkpoint) -> bool:
    """Return whether a file beside the weights holds a chat template."""
    folder = checkpoint.config_folder
    if (folder / "chat_template.jinja").exists():
        return True
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        # What is there and cannot be read is refused when the files are planned.
        with contextlib.suppress(OSError):
            if b'"chat_template"' in (folder / name).read_bytes():
                return True
    return False


def note_delicate_layers(draft: Draft) -> Iterator[str]:
    """Advise to keep a head and routers."""
    delicate = []
    for tensor in draft.tensors:
        if tensor.packing and tensor.packing.bits == 4 and tensor.kind in ("head", "routers"):
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
    """State what layers that predict further tokens cost, what keeps them and what they are for."""
    mtp = find_mtp((info.name for info in draft.sources), draft.config)
    tensors = [tensor for tensor in draft.tensors if tensor.source.name in mtp]
    if not tensors:
        return
    before = format_bytes(sum(tensor.source.nbytes for tensor in tensors))
    after = format_bytes(sum(output.nbytes for tensor in tensors for output in tensor.outputs))
    fate = f"their {before} are kept"
    if any(tensor.packing for tensor in tensors):
        pattern = shlex.quote(pattern_of_mtp(mtp, [info.name for info in draft.sources]))
        fate = f"their {before} become {after}; --exclude {pattern} keeps them"
    yield (
        f"{count_of(len(tensors), 'tensor')} of layers that predict further tokens (MTP), with"
        f" which vLLM drafts given {SERVE_WITH_MTP}: {fate}"
    )


def pattern_of_mtp(mtp: Collection[str], names: list[str]) -> str:
    """Make a pattern for --exclude that means these tensors of layers that predict further tokens,
    and no others of `names`."""
    words = set()
    for name in mtp:
        named = MTP_NAMES.search(name)
        layer = LAYER_PATTERN.match(name)
        words.add(named[2] if named else rf"{layer[2]}\.{layer[3]}\.")
    pattern = "|".join(sorted(words))
    for candidate in (pattern, rf"(^|\.)({pattern})"):
        if {name for name in names if re.search(candidate, name)} == {*mtp}:
            return candidate
    return f"^({'|'.join(map(re.escape, sorted(mtp)))})$"


def warn_of_missing_mtp(draft: Draft) -> Iterator[str]:
    """Warn that layers which predict further tokens are missing, if config.json promises some."""
    promise = MtpPromise.of(draft.config)
    if promise is None or find_mtp((info.name for info in draft.sources), draft.config):
        return
    outcome = "speculative decoding with them will not work"
    if draft.form.for_engines:
        outcome = "asked to draft, vLLM does so with uninitialised memory, without a word"
    yield (
        f"{CONFIG_NAME} promises layers that predict further tokens ({promise.key}), and the"
        f" checkpoint has none (transformers' save_pretrained leaves them out): {outcome};"
        f" {where_to_take_mtp_from(draft.checkpoint)}"
    )


def where_to_take_mtp_from(checkpoint: Checkpoint) -> str:
    """Return what helps where layers that predict further tokens are missing. They may be in a file
    of the input that its index does not list."""
    folder = checkpoint.folder
    for path in sorted(set(folder.glob("*.safetensors")) - set(checkpoint.files)):
        if find_mtp(tensors_in(folder, [path.name]), checkpoint.config):
            place = shlex.quote(str(folder))
            return f"{path.name}, which no index lists, has them: --mtp_from {place} takes them"
    return "--mtp_from DIR takes those of the base model, of which DIR is a folder"


def types_without_float16(draft: Draft) -> list[str]:
    """List the model's types that vLLM does not compute in float16."""
    return [name for name in draft.types if name in ENGINES["vLLM"].no_float16]


def check_types_for_engines(draft: Draft) -> Iterator[str]:
    """Check that engines load models of this type from the format."""
    name = draft.form.name
    for engine in draft.form.engines:
        for model_type in draft.types:
            if model_type in engine.not_loaded.get(name, ()):
                yield (
                    f"{engine.name} does not load models of type {model_type} from {name}:"
                    " use --format compressed-tensors"
                )


def check_packed_head(draft: Draft) -> Iterator[str]:
    """Check that a head in 8 bits is a weight of its own, and that engines load it."""
    heads = [info.name for info in draft.packed_heads]
    if not heads:
        return
    if any(config_values(draft.config, "tie_word_embeddings")):
        yield (
            f"--int8 matches {heads[0]!r}, while {CONFIG_NAME} ties the head to the embedding"
            " (tie_word_embeddings): no engine would read the packed copy; let the pattern leave it"
            " out, or untie it there if it is a weight of its own"
        )
    for engine in draft.form.engines:
        for model_type in draft.types:
            if model_type in engine.plain_heads:
                yield (
                    f"--int8 matches {heads[0]!r}, and {engine.name} holds the head of models of"
                    f" type {model_type} in full precision alone: let the pattern leave it out"
                )


def note_packed_head(draft: Draft) -> Iterator[str]:
    """Note which engines load a head in 8 bits."""
    if draft.packed_heads:
        yield "a head in 8 bits needs vLLM 0.20, for NemotronH 0.23"


def warn_of_float16(draft: Draft) -> Iterator[str]:
    """Warn that the model is computed in another dtype than the format's scales have."""
    types = types_without_float16(draft)
    if types and draft.form.scale_dtype == "F16":
        yield (
            f"vLLM does not compute {types[0]} in float16, and in bfloat16 it rounds the float16"
            f" scales of {draft.form.name}: --format compressed-tensors has scales of the model's"
            " own dtype"
        )


def warn_of_packed_towers(draft: Draft) -> Iterator[str]:
    """Warn that not all engines hold towers packed."""
    towers = draft.packed_towers
    if towers:
        yield (
            f"--int8 packs {count_of(len(towers), 'layer')} of {TOWERS}, e.g."
            f" {towers[0].name!r}: engines hold some models' as plain layers, or under other"
            " names, and then do not load the folder; without --int8 for these all of them are kept"
        )


def warn_of_no_language_model(draft: Draft) -> Iterator[str]:
    """Warn where a multimodal model's language model is not found."""
    if has_config_of_tower(draft.config) and not find_language_model(draft.sources, draft.config):
        yield (
            f"{CONFIG_NAME} describes more than a language model, and no layers around an embedding"
            " of words are found: all linear layers are quantized; --exclude keeps what is vision"
            " or audio"
        )


def warn_of_small_language_model(draft: Draft) -> Iterator[str]:
    """Warn where what is taken for the language model is the smaller part."""
    towers = [tensor for tensor in draft.tensors if tensor.kind == TOWERS and not tensor.packing]
    kept = sum(tensor.source.nbytes for tensor in towers)
    packed = sum(info.nbytes for info in draft.packed)
    option = "--int8" if draft.form.has_two_widths else "--format compressed-tensors --int8"
    if kept > packed:
        yield (
            f"what is kept as {TOWERS} ({format_bytes(kept)}, e.g. {towers[0].source.name!r}) is"
            f" more than what is quantized ({format_bytes(packed)}, e.g. {draft.packed[0].name!r}):"
            f" if that is not the language model, name what is with {option}"
        )


def note_packed_towers(draft: Draft) -> Iterator[str]:
    """Note that towers are quantized, too."""
    towers = draft.packed_towers
    if towers:
        size = format_bytes(sum(info.nbytes for info in towers))
        yield (
            f"{count_of(len(towers), 'layer')} of {TOWERS} ({size}) are quantized, too; the formats"
            f" for engines keep them, and so does --exclude {pattern_of_branches(towers)}"
        )


def pattern_of_branches(infos: list[TensorInfo]) -> str:
    """Make a pattern for --exclude that means the modules around these tensors."""
    branches = {}
    for info in infos:
        parts = info.name.split(".")
        names = [part for part in parts[:-1] if part not in WRAPPERS]
        # A weight may stand in wrappers alone.
        branches[re.escape((names or parts)[0])] = None
    return shlex.quote(rf"(^|\.)({'|'.join(branches)})\.")


def note_two_widths(draft: Draft) -> Iterator[str]:
    """Warn of ways to load layers of two widths that decode them wrongly."""
    if len(draft.widths) > 1:
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


RESTORE_INSTEAD = "vLLM may read them; for transformers --restore it to dense weights"


def reason_transformers_fails(draft: Draft) -> str:
    """Return why transformers would not load the folder, or not all of it; nothing if it does."""
    if ENGINES["transformers"] not in draft.form.engines:
        return ""
    return why_it_loads_no_layers(draft) or why_it_loads_no_kept_experts(draft)


def why_it_loads_no_layers(draft: Draft) -> str:
    """Return why transformers stops at the folder, or decodes its layers wrongly; nothing if it
    does neither."""
    computed = computed_when_loaded(draft)
    if computed:
        return (
            f"stops at this folder: it splits or joins {computed[0].name!r} and alike as it loads"
            f" them, which packed weights do not survive; {RESTORE_INSTEAD}"
            f"{advice_to_keep(computed, draft)}"
        )

    lost = lost_beside_packed(draft)
    if lost:
        return (
            f"stops at this folder: it splits or joins {lost} as it loads them, and beside packed"
            f" layers takes only packed ones for these; {RESTORE_INSTEAD}"
        )

    if must_be_decoded(draft) and len(draft.widths) > 1:
        return (
            "asks this model's layers for dense weights, and decodes two widths wrongly;"
            f" {RESTORE_INSTEAD}"
        )
    return ""


def why_it_loads_no_kept_experts(draft: Draft) -> str:
    """Return what transformers makes of experts that are kept; nothing if it loads them."""
    row = oddity_with("tells_experts", draft.config)
    is_told = draft.form.name in ENGINES["transformers"].kept_experts
    kept = [tensor for tensor in draft.tensors if is_expert(tensor) and not tensor.packing]
    # It loads none of MTP.
    are_kept = any(tensor.kind != MTP for tensor in kept)
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


def advice_to_keep(computed: list[TensorInfo], draft: Draft) -> str:
    """Return how to keep weights that transformers computes with as it loads them, as the end of a
    sentence; nothing where it would stop at them then, too."""
    names = {info.name for info in computed}
    tensors = []
    for tensor in draft.tensors:
        if tensor.source.name in names:
            if tensor.in_memory is None:
                return ""
            tensor = replace(tensor, packing=None)
        tensors.append(tensor)
    if lost_beside_packed(replace(draft, tensors=tensors)):
        return ""
    return f", or --exclude {shlex.quote(pattern_of(computed))} keeps them"


def lost_beside_packed(draft: Draft) -> str:
    """Describe what transformers splits or joins as it loads it, where it takes only packed tensors
    for that once a folder has packed layers; nothing if there is no such."""
    if draft.form.name not in ENGINES["transformers"].unpacks_first:
        return ""
    loadings = list(loadings_of(draft.config))
    for tensor in draft.tensors:
        name = tensor.source.name
        for loading in loadings:
            joined = loading.oddity.joined
            is_kept = joined and not tensor.packing and loading.applies_to(name)
            if is_kept and re.search(joined, name):
                return f"{name!r} and alike"

    ends = [end for loading in loadings for end in loading.oddity.packed_at_least.split()]
    if ends:
        packed = [name for tensor in draft.tensors if tensor.packing for name in modules_of(tensor)]
        for end in ends:
            if not any(name.endswith(end) for name in packed):
                return f"layers called {end!r}"
    return ""


def must_be_decoded(draft: Draft) -> bool:
    """Return whether transformers has to decode the folder's weights as it loads them."""
    if draft.form.name not in ENGINES["transformers"].unpacks_first:
        return False
    head_is_tied = "head" not in draft.kinds.values()
    if head_is_tied and oddity_with("other_head", draft.config).other_head:
        return True
    if oddity_with("asks_for_dense", draft.config).asks_for_dense:
        return True
    # So are a tower's layers, which --int8 may pack.
    packed = [tensor.source.name for tensor in draft.tensors if tensor.packing]
    for loading in loadings_of(draft.config):
        if loading.oddity.asks_for_dense and any(map(loading.applies_to, packed)):
            return True
    return False


def computed_when_loaded(draft: Draft) -> list[TensorInfo]:
    """List the packed weights that transformers splits, joins or permutes as it loads them."""
    loadings = [loading for loading in loadings_of(draft.config) if loading.oddity.computed]
    computed = []
    for tensor in draft.tensors:
        name = tensor.source.name
        is_computed = len(tensor.in_memory or ()) > 1
        for loading in loadings:
            if loading.applies_to(name) and re.search(loading.oddity.computed, name):
                is_computed = True
        if is_computed and tensor.packing:
            computed.append(tensor.source)
    return computed


def is_expert(tensor: TensorPlan) -> bool:
    """Return whether this is a weight of one routed expert."""
    info = tensor.source
    return len(info.shape) == 2 and bool(EXPERT_PATTERN.match(info.name))


# The first refusal ends the run. Warnings and notes are printed in this order.
RULES = (
    Rule(REFUSED, CHECKPOINT, check_two_widths),
    Rule(REFUSED, CHECKPOINT, check_fitness),
    Rule(REFUSED, CHECKPOINT, check_low_rank_updates),
    Rule(REFUSED, STACKS, check_stacks),
    Rule(REFUSED, TENSORS, check_patterns),
    Rule(REFUSED, TENSORS, check_that_something_is_packed),
    Rule(REFUSED, TENSORS, check_output_names),
    Rule(REFUSED, FOR_ENGINES, check_embeddings),
    Rule(REFUSED, FOR_ENGINES, check_packed_head),
    Rule(REFUSED, FOR_ENGINES, check_group_size),
    Rule(REFUSED, FOR_ENGINES, check_types_for_engines),
    Rule(REFUSED, FOR_ENGINES, check_config),
    Rule(REFUSED, FOR_ENGINES, check_conv1d),
    Rule(REFUSED, FOR_ENGINES, check_names_in_memory),
    Rule(REFUSED, FOR_ENGINES, check_columns),
    Rule(REFUSED, FOR_ENGINES, check_rows),
    Rule(REFUSED, FOR_ENGINES, check_fused_layers),
    Rule(REFUSED, FOR_ENGINES, check_partly_kept_mtp),
    Rule(REFUSED, FOR_ENGINES, check_ends_for_engines),
    Rule(WARNING, TENSORS, check_layers),
    Rule(WARNING, TENSORS, check_norms_and_biases),
    Rule(WARNING, TENSORS, check_final_norm),
    Rule(WARNING, TENSORS, check_weights),
    Rule(WARNING, FOR_OTHERS, check_ends),
    Rule(WARNING, FOR_ENGINES, check_names_of_trainers),
    Rule(WARNING, FOR_ENGINES, warn_of_no_language_model),
    Rule(WARNING, FOR_ENGINES, warn_of_small_language_model),
    Rule(WARNING, FOR_ENGINES, warn_of_packed_towers),
    Rule(WARNING, FOR_ENGINES, warn_of_float16),
    Rule(WARNING, TENSORS, warn_of_missing_mtp),
    Rule(WARNING, FOR_ENGINES, warn_of_missing_modules),
    Rule(NOTE, TENSORS, note_checkpoint),
    Rule(NOTE, TENSORS, note_statistics),
    Rule(NOTE, FOR_ENGINES, note_tokenizer),
    Rule(NOTE, FOR_ENGINES, note_group_size),
    Rule(NOTE, FOR_ENGINES, note_other_engines),
    Rule(NOTE, FOR_OTHERS, note_packed_towers),
    Rule(NOTE, TENSORS, note_delicate_layers),
    Rule(NOTE, TENSORS, note_conv1d),
    Rule(NOTE, TENSORS, note_kept_stacks),
    Rule(NOTE, FOR_ENGINES, note_mtp),
    Rule(NOTE, TENSORS, note_two_widths),
    Rule(NOTE, FOR_ENGINES, note_packed_head),
    Rule(NOTE, FOR_ENGINES, note_experts),
    Rule(NOTE, FOR_ENGINES, note_transformers),
)


# ---- Memory: what the machine, the container and this process use --------------------------------


@dataclass(frozen=True)
class MemoryReading:
    """Bytes of memory. The page cache counts as available."""

    available: int
    used: int


class MemoryGuard:
    """Stops the run while the machine still breathes."""

    def __init__(self, min_free: int, system: Path = Path("/")):
        self.min_free = min_free
        # The most bytes of anonymous memory of this process that were seen at any look.
        self.own_peak = 0
        self._system = system
        self._process = psutil.Process()
        self._next_look = 0.0
        self._lock = threading.Lock()

    def read(self) -> MemoryReading:
        """Read the tightest of the machine and the control groups of this process; note its own
        peak."""
        machine = psutil.virtual_memory()
        readings = [MemoryReading(machine.available, machine.total - machine.available)]
        v2 = ["max", "current", "stat"]
        v1 = ["limit_in_bytes", "usage_in_bytes", "stat"]
        for limit, usage, stat in read_cgroups(self._system, "memory", v2, v1):
            # Version 1 writes "no limit" as a huge number.
            if int(limit) < machine.total:
                used = int(usage) - file_pages(stat)
                readings.append(MemoryReading(int(limit) - used, used))
        self.own_peak = max(self.own_peak, self.own())
        return min(readings, key=lambda reading: reading.available)

    def own(self) -> int:
        """Count the anonymous memory of this process: all but mapped files, which the kernel takes
        back at will."""
        info = self._process.memory_info()
        return info.rss - info.shared

    def shortage(self, needed: int = 0) -> str:
        """Describe that less than `min_free` is available, or would be once `needed` bytes are
        taken; empty if enough is."""
        available = self.read().available - needed
        if available >= self.min_free:
            return ""
        free = format_bytes(max(available, 0))
        least = format_bytes(self.min_free)
        when = "left at the peak" if needed else "available"
        advice = "stop other programs or containers, raise the container's --memory"
        advice += ", or lower --min_free_gb"
        return f"{free} of memory {when}, --min_free_gb asks for {least}: {advice}"

    def check(self) -> None:
        """Raise if less than `min_free` is available.

        This is cheap: it looks at most 10 times a second, for 0.5 ms."""
        with self._lock:
            if time.monotonic() < self._next_look:
                return
            self._next_look = time.monotonic() + 0.1
        shortage = self.shortage()
        if shortage:
            raise QuantizeError(f"stopped: {shortage}", 3)


def file_pages(stat: str) -> int:
    """Return the bytes of the page cache in a control group's memory.stat."""
    words = stat.split()
    counts = dict(zip(words[::2], map(int, words[1::2])))
    nbytes = 0
    for key in ("active_file", "inactive_file"):
        # In version 1 the plain keys leave out the groups below.
        nbytes += counts.get(f"total_{key}", counts.get(key, 0))
    return nbytes


def read_cgroups(
    system: Path, controller: str, v2: list[str], v1: list[str]
) -> Iterator[list[str]]:
    """Read files of the control groups that limit this process: its own and all above it.

    v2, v1: the ends of the files' names by the version of control groups; the first one holds the
        limit"""
    membership = system / "proc/self/cgroup"
    # Without this file the kernel has no control groups.
    if not membership.exists():
        return
    root = system / "sys/fs/cgroup"
    for line in membership.read_text().splitlines():
        # Version 2 has `0::/path`, and one tree. Version 1 has `N:controllers:/path`, and a tree
        # for each controller.
        number, controllers, path = line.split(":", 2)
        if number == "0":
            tree = root
            names = v2
        elif controller in controllers.split(","):
            tree = root / controller
            names = v1
        else:
            continue

        folder = tree / path.lstrip("/")
        groups = [folder, *folder.parents]
        if not folder.is_dir():
            # In a container the path may be the host's. The tree's root is then its group.
            groups = [tree]
        for group in groups:
            try:
                texts = [(group / f"{controller}.{name}").read_text() for name in names]
            except OSError:
                # Above the tree there are no such files.
                continue
            # Version 2 writes "max" for no limit, version 1 -1 for no quota.
            if texts[0][:1].isdigit():
                yield texts


def shares_memory_with_gpu(system: Path = Path("/")) -> bool:
    """Check whether this is a machine of NVIDIA's with one memory for CPU and GPU: a Jetson or a
    DGX Spark."""
    names = [
        "proc/device-tree/compatible",
        "sys/class/dmi/id/product_name",
        "sys/class/dmi/id/product_family",
    ]
    for name in names:
        with contextlib.suppress(OSError):
            text = (system / name).read_text(errors="replace")
            if re.search(r"nvidia,tegra|DGX.Spark|GB10", text, re.IGNORECASE):
                return True
    return False


def usable_cores(system: Path = Path("/")) -> int:
    """Count the cores that this process may use, by its affinity and its CPU quotas.

    `docker run --cpus` sets such a quota."""
    cores = len(os.sched_getaffinity(0))
    for texts in read_cgroups(system, "cpu", ["max"], ["cfs_quota_us", "cfs_period_us"]):
        # Version 2 has both numbers in one file.
        quota, period = " ".join(texts).split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


# ---- Jobs: how the work is cut, and how far it is ------------------------------------------------

# Weights that a worker takes from the queue at a time: consecutive tiles of one tensor.
JOB_WEIGHTS = 1 << 22
# The same where the job's words, half a byte a weight, are staged to be transposed.
TRANSPOSED_JOB_WEIGHTS = 1 << 24
# The time that a byte takes that is kept, beside one that is quantized by --scale mse.
KEPT_EFFORT = 0.2


@dataclass(frozen=True)
class Job:
    """A block of a tensor whose bytes lie in one piece: whole rows, or a part of one row.

    A tensor that is kept is taken as one row of bytes."""

    tensor: TensorPlan
    row: int  # the first one
    rows: int
    column: int  # the first one
    columns: int
    offset: int  # of the block in the source tensor, in bytes
    nbytes: int

    @property
    def effort(self) -> float:
        """Return about how long it takes, beside others."""
        return self.nbytes * (1.0 if self.tensor.packing else KEPT_EFFORT)


@dataclass(frozen=True)
class BlockShape:
    """The largest block that a tensor is cut into, and the bytes of an element."""

    rows: int
    columns: int
    itemsize: int


def block_shape(tensor: TensorPlan, form: Format) -> BlockShape:
    """Return the shape of a tensor's blocks.

    A block is of whole rows. Only a row that is longer than a tile is cut, between groups, and only
    where its parts can be quantized apart, without statistics."""
    if not tensor.packing:
        return BlockShape(1, min(COPY_BYTES, tensor.source.nbytes), 1)

    rows, columns = tensor.source.shape
    itemsize = DTYPE_BITS[tensor.source.dtype] // 8
    group_size = tensor.packing.group_size
    longest = max(1, TILE_WEIGHTS // group_size) * group_size
    if tensor.scales:
        # A quarter of a tile: torch makes several temporary tensors of the decoded weights.
        weights = TILE_WEIGHTS // 4 // tensor.packing.codes_per_word
    elif columns > longest and not tensor.recipe.has_statistics:
        return BlockShape(1, longest, itemsize)
    else:
        weights = TRANSPOSED_JOB_WEIGHTS if form.transposed else JOB_WEIGHTS
    return BlockShape(min(rows, max(1, weights // columns)), columns, itemsize)


def cut_into_jobs(tensor: TensorPlan, form: Format) -> Iterator[Job]:
    """Cut a tensor into jobs, in the order of its bytes. A tensor without elements has none."""
    if not tensor.source.nbytes:
        return
    block = block_shape(tensor, form)
    rows, columns = tensor.source.shape if tensor.packing else (1, tensor.source.nbytes)
    for row in range(0, rows, block.rows):
        for column in range(0, columns, block.columns):
            row_count = min(block.rows, rows - row)
            column_count = min(block.columns, columns - column)
            offset = (row * columns + column) * block.itemsize
            nbytes = row_count * column_count * block.itemsize
            yield Job(tensor, row, row_count, column, column_count, offset, nbytes)


class Account:
    """What there is to do, and how far it is."""

    def __init__(self, jobs: list[Job], task: str):
        self.task = task
        self.nbytes = sum(job.nbytes for job in jobs)
        self.nbytes_done = 0
        self.effort = sum(job.effort for job in jobs)
        self.effort_done = 0.0
        self._jobs_left = Counter(job.tensor.source.name for job in jobs)
        self.tensors = len(self._jobs_left)
        self.tensors_done = 0
        self._lock = threading.Lock()

    def book(self, job: Job) -> None:
        """Count a job as done."""
        name = job.tensor.source.name
        with self._lock:
            self.nbytes_done += job.nbytes
            self.effort_done += job.effort
            self._jobs_left[name] -= 1
            if not self._jobs_left[name]:
                self.tensors_done += 1


def rows_of_tile(columns: int) -> int:
    """Return how many rows of a job a worker quantizes at a time."""
    return max(1, TILE_WEIGHTS // columns)


# Bytes that torch takes by itself in a worker, at the most: verifying without a kernel.
TORCH_TEMPORARIES = VERIFY_WEIGHTS * 48
# Copies of a factor that a worker makes while it prepares error feedback, and those that are kept
# of each: the factor and its spread, for rounding and for the errors of outputs.
FACTOR_COPIES_MADE = 8
FACTOR_COPIES_KEPT = 4


def buffer_bytes(plan: Plan, threads: int) -> int:
    """Add up what a run holds in buffers at the most."""
    form = plan.options.form
    largest: dict[str, int] = {}
    largest_job = 0
    for tensor in list_unlike(plan.tensors):
        block = block_shape(tensor, form)
        largest_job = max(largest_job, block.rows * block.columns * block.itemsize)
        for role, nbytes in worker_buffers(tensor, form).items():
            largest[role] = max(largest.get(role, 0), nbytes)

    factor = 0
    if plan.statistics:
        factor = plan.statistics.largest_factor * torch.float32.itemsize
    worker = sum(map(whole_pages, largest.values())) + TORCH_TEMPORARIES
    worker += FACTOR_COPIES_MADE * whole_pages(factor)
    # Jobs that are read ahead, or worked on.
    jobs = (threads + DISK_READERS) * whole_pages(largest_job + READ_MARGIN)
    return threads * worker + jobs + KEPT_ROUNDINGS * FACTOR_COPIES_KEPT * factor


def list_unlike(tensors: list[TensorPlan]) -> list[TensorPlan]:
    """List one of all tensors that are alike: a model has a hundred thousand, of a dozen shapes."""
    unlike = {}
    for tensor in tensors:
        source = tensor.source
        output = tensor.outputs[0]
        become = (tensor.packing, tensor.recipe, output.dtype, output.shape)
        unlike[source.dtype, source.shape, become] = tensor
    return list(unlike.values())


def worker_buffers(tensor: TensorPlan, form: Format) -> dict[str, int]:
    """Return the bytes of the buffers of a `Workspace` that a tensor needs at the most, by role.

    Some of them are needed only where there is no kernel, or to compare with what is there."""
    block = block_shape(tensor, form)
    if not tensor.packing:
        return {"found": block.columns}
    if tensor.scales:
        return restoring_buffers(tensor, block)

    packing = tensor.packing
    columns = packing.columns_of(block.columns)
    words = columns // packing.codes_per_word * torch.int32.itemsize
    scales = columns // packing.group_size * (DTYPE_BITS[tensor.outputs[1].dtype] // 8)
    tile_rows = min(block.rows, rows_of_tile(block.columns))

    buffers = {}
    for role, dtype in TILE_BUFFERS.items():
        itemsize = dtype.itemsize if dtype else block.itemsize
        buffers[role] = tile_rows * width_in_tile(role, tensor, columns) * itemsize
    if form.transposed:
        buffers["words"] = tile_rows * words
        buffers["scales"] = tile_rows * scales
    buffers[WORDS] = block.rows * words
    buffers[SCALES] = block.rows * scales
    constants = [output.nbytes for output in tensor.outputs[2:]]
    buffers["found"] = max(buffers[WORDS], buffers[SCALES], *constants)
    return buffers


def width_in_tile(role: str, tensor: TensorPlan, columns: int) -> int:
    """Return how many of a row's columns lie in one of TILE_BUFFERS at a time; 0 if it is not
    needed."""
    recipe = tensor.recipe
    if role.startswith("search"):
        if not recipe.searches:
            return 0
        return tensor.packing.group_size if recipe.has_feedback else columns
    if role == "codes" and tensor.packing.bits == 8:
        return 0
    is_padded = tensor.source.shape[1] % tensor.packing.group_size
    if role == "padded" and not is_padded:
        return 0
    return columns


def restoring_buffers(tensor: TensorPlan, block: BlockShape) -> dict[str, int]:
    """Return what `worker_buffers` does, for a weight that is restored."""
    (output,) = tensor.outputs
    scales = block.rows * (tensor.scales.nbytes // tensor.scales.shape[0])
    dense = block.rows * output.shape[1] * (DTYPE_BITS[output.dtype] // 8)
    return {"scales": scales + READ_MARGIN, "dense": dense}


# ---- The plan as the user reads it ---------------------------------------------------------------


def print_plan(
    plan: Plan, checkpoint: Checkpoint, output: OutputFolder, guard: MemoryGuard, threads: int
) -> None:
    """Print what a run will do, and what the user should know before it."""
    options = plan.options
    fate = "restored to dense weights" if options.restore else options.form.readers
    say_paragraph("Format:", f"{options.format}, {fate}")
    say_paragraph("From:", str(checkpoint.folder))
    say_paragraph("To:", str(output.folder))
    scales = "" if options.restore else f" scales {options.rule},"
    how = f"groups of {options.group_size},{scales} {count_of(threads, 'thread')}"
    say_paragraph("How:", how)
    print_table(plan, checkpoint)
    say()

    token = plan.token_bytes
    if token:
        total = format_bytes(token.total)
        say_paragraph(
            "A token:", f"reads {total} of weights, {format_bytes(token.head)} of it the head"
        )
    print_expectation(plan)
    for warning in plan.warnings:
        say_paragraph("WARNING:", warning)
    for note in plan.notes:
        say_paragraph("Note:", note)
    print_files(plan, output)
    print_needs(plan, output, guard, threads)


def print_expectation(plan: Plan) -> None:
    """Print what --max_size_gb chose, and the divergence that is expected."""
    if plan.options.max_size_gb:
        chosen = []
        for tensor in plan.tensors:
            if is_chosen(tensor.source, tensor.kind, plan.options):
                chosen.append(tensor)
        what = f"8 bits for {count_of(len(chosen), 'weight')}" if chosen else "nothing"
        say_paragraph("Chosen:", f"{what}, within --max_size_gb {plan.options.max_size_gb}")
        for row in describe_chosen(chosen):
            say_paragraph("", row)

    expected = plan.expectation
    if not expected:
        return
    text = f"a divergence of about {three_digits(expected.divergence)} nat a token from the source"
    if plan.options.max_size_gb:
        text += f"; without the choice {three_digits(expected.without_choice)}"
    if expected.unknown:
        text += f"; {count_of(expected.unknown, 'weight')} without a cost not counted"
    say_paragraph("Expected:", text)


def describe_chosen(chosen: list[TensorPlan]) -> Iterator[str]:
    """Yield for weights of a kind and of the same layers: the kind, their modules and layers."""
    # By kind and module.
    layers: dict[tuple[str, str], set[int]] = {}
    for tensor in chosen:
        name = tensor.source.name.removesuffix(".weight")
        layer = LAYER_PATTERN.match(name)
        module = re.sub(r"\d+\.", "", name[layer.end() :]) if layer else name
        numbers = layers.setdefault((tensor.kind, module), set())
        if layer:
            numbers.add(int(layer[3]))

    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (kind, module), numbers in layers.items():
        alike.setdefault((kind, tuple(sorted(numbers))), []).append(module)
    for (kind, numbers), modules in sorted(alike.items()):
        noun = "layer" if len(numbers) == 1 else "layers"
        place = f" of {noun} {format_ranges(numbers)}" if numbers else ""
        yield f"{kind}: {', '.join(sorted(modules))}{place}"


def format_ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers in short: 0-3, 7."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)


def print_files(plan: Plan, output: OutputFolder) -> None:
    """Print what becomes of files beside the weights, and of those of an earlier run."""
    copied = [name for name, content in plan.other_files.items() if isinstance(content, Path)]
    say_paragraph("Copied:", ", ".join(copied) or "no other files")
    say_paragraph("Written:", ", ".join(sorted(plan.other_files.keys() - copied)))
    say_paragraph("Left out:", ", ".join(plan.left_out))

    finished = sum(shard.name in output.finished for shard in plan.shards)
    if finished and not output.nothing_to_write:
        shards = count_of(len(plan.shards), "shard")
        say_paragraph("Resuming:", f"{finished:,} of {shards} finished by an earlier run")
    if output.remove:
        leftovers = quote_names(path.name for path in output.remove)
        say_paragraph("Removing:", f"{leftovers} of an earlier run")


def print_needs(plan: Plan, output: OutputFolder, guard: MemoryGuard, threads: int) -> None:
    """Print how much disk and memory a run needs, and how much there is."""
    needed, free = output.room()
    shortage = ": not enough" if needed > free else ""
    say_paragraph("Disk:", f"{format_bytes(needed)} to write, {format_bytes(free)} free{shortage}")
    peak = guard.own() + buffer_bytes(plan, threads)
    available = format_bytes(guard.read().available)
    memory = f"about {format_bytes(peak)} at the peak; {available} available"
    if guard.min_free:
        memory += f", stops below {format_bytes(guard.min_free)}"
    say_paragraph("Memory:", memory)


def print_table(plan: Plan, checkpoint: Checkpoint) -> None:
    """Print how many tensors there are of each packing and kind, and how large they are."""
    say(f"{'Plan':<38}{'tensors':>7}{'size':>8}", before="\n")
    inputs = len(checkpoint.tensors)
    size = format_bytes(size_of(plan.tensors))
    print_row("input", inputs, size, count_of(len(checkpoint.files), "file"))
    if plan.stacks:
        weights = count_of(len(plan.tensors) - inputs + plan.stacks, "weight")
        print_row("  of these stacks of experts", plan.stacks, "", f"read as {weights}")

    packings = {tensor.packing for tensor in plan.tensors if tensor.packing}
    for packing in sorted(packings, key=lambda packing: (packing.bits, packing.group_size)):
        print_packed(plan, packing)

    kept = [tensor for tensor in plan.tensors if not tensor.packing]
    if kept:
        print_row("kept as they are", len(kept), format_bytes(size_of(kept)))
    # Of a folder that is restored, all else is kept for the one reason that it is not packed.
    if not plan.options.restore:
        print_kinds(kept)

    outputs = sum(len(tensor.outputs) for tensor in plan.tensors)
    note = count_of(len(plan.shards), "shard")
    if len(plan.shards) > 1:
        note += f", up to {format_bytes(plan.options.shard_size_gb * GB)}"
    print_row("output", outputs, format_bytes(plan.total_size), note)


def print_row(label: str, count: int, size: str, note: str = "") -> None:
    """Print a row of the plan's table."""
    note = shorten(note, terminal_width() - 55)
    # "812 bytes" would touch the count.
    size = size.replace(" bytes", " B")
    say(f"{shorten(label, 38):<38}{count:>7,}{size:>8}  {note}".rstrip())


def print_packed(plan: Plan, packing: Packing) -> None:
    """Print the rows of the tensors that are packed alike, or restored from that."""
    tensors = [tensor for tensor in plan.tensors if tensor.packing == packing]
    verb = "restored from" if plan.options.restore else "quantized to"
    label = f"{verb} {packing.bits} bits"
    if packing.bits == 8:
        label += f", by {packing.group_size}"
    after = sum(output.nbytes for tensor in tensors for output in tensor.outputs)
    size = format_bytes(size_of(tensors))
    print_row(label, len(tensors), size, f"become {format_bytes(after)}")
    print_kinds(tensors)

    # Of tensors that are restored, the padding is cut off.
    if plan.options.restore:
        return
    widths = [tensor.source.shape[1] for tensor in tensors]
    ragged = [width for width in widths if width % packing.group_size]
    if ragged:
        example = f"e.g. {ragged[0]:,} to {packing.columns_of(ragged[0]):,}"
        print_row("  of these padded to whole groups", len(ragged), "", example)


def print_kinds(tensors: list[TensorPlan]) -> None:
    """Print a row for each kind of tensor, or each reason to keep it: the largest in bytes first.

    A tensor that is the only one of its kind is named."""
    members: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        members.setdefault(tensor.kept_because or tensor.kind, []).append(tensor)
    for kind in sorted(members, key=lambda kind: size_of(members[kind]), reverse=True):
        alike = members[kind]
        name = alike[0].source.name.removesuffix(".weight") if len(alike) == 1 else ""
        print_row(f"  {kind}", len(alike), format_bytes(size_of(alike)), name)


def size_of(tensors: list[TensorPlan]) -> int:
    """Return how many bytes of the input these tensors are."""
    return sum(tensor.bytes_read for tensor in tensors)


def print_list(plan: Plan) -> None:
    """Print a line for each tensor, separated by tabs: name, dtype, shape, what it becomes, why."""
    for tensor in plan.tensors:
        info = tensor.source
        shape = "x".join(str(size) for size in info.shape)
        fate = "kept"
        if tensor.packing:
            fate = f"{tensor.packing.bits} bits, groups of {tensor.packing.group_size}"
        cells = [info.name, info.dtype, shape, fate, tensor.kept_because or tensor.kind]
        say(before="\t".join(printable(cell) for cell in cells))


# ---- Output folder: what may be there, and how files become final --------------------------------

SHARD_PATTERN = re.compile(r"model-\d{5}\.safetensors")


def write_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` at `offset`."""
    while len(buffer):
        check_signals()
        count = os.pwrite(fd, buffer[:COPY_BYTES], offset)
        buffer = buffer[count:]
        offset += count


# With it the interpreter lock is released meanwhile.
SYNC_FILE_RANGE = ctypes.CDLL(None, use_errno=True).sync_file_range
# SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER.
SYNC_AND_WAIT = 7
# What it fails with where there is no such call, or none for this file.
NO_SYNC_FILE_RANGE = (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ESPIPE, errno.ENOTSUP)


def sync_file(fd: int) -> None:
    """Make what was written to a file survive a power cut."""
    # fsync alone may take minutes on a slow disk, and no signal ends it. So the file is synced
    # piece by piece before. What fails then is not reported once more by fsync.
    # (sync_file_range(2); mm/filemap.c, file_fdatawait_range)
    nbytes = 2 * COPY_BYTES
    for start in range(0, os.fstat(fd).st_size, nbytes):
        check_signals()
        part = (ctypes.c_int64(start), ctypes.c_int64(nbytes))
        if SYNC_FILE_RANGE(fd, *part, SYNC_AND_WAIT):
            problem = ctypes.get_errno()
            if problem not in NO_SYNC_FILE_RANGE:
                raise OSError(problem, os.strerror(problem))
            break
    os.fsync(fd)


MEMCMP = ctypes.CDLL(None).memcmp
MEMCMP.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def first_difference(found: memoryview, expected: memoryview) -> int | None:
    """Return where bytes of the same number begin to differ; None if they are equal.

    The interpreter lock is released meanwhile, unless `expected` is read-only."""
    if expected.readonly or not len(found):
        are_equal = found == expected
    else:
        found_start = ctypes.addressof(ctypes.c_char.from_buffer(found))
        expected_start = ctypes.addressof(ctypes.c_char.from_buffer(expected))
        are_equal = MEMCMP(found_start, expected_start, len(found)) == 0
    if are_equal:
        return None
    pairs = enumerate(zip(found, expected))
    return next(number for number, (byte, other) in pairs if byte != other)


def sync_folder(folder: Path) -> None:
    """Make a folder's new and renamed entries survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(fd)
    except OSError as error:
        # Some mounts cannot sync a folder, and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def unfinished_path(path: Path, fingerprint: str) -> Path:
    """Name the file that a run of this fingerprint writes before it has its final name."""
    return path.with_name(f"{path.name}.{fingerprint[:12]}.unfinished")


class ShardFile:
    """A shard that is there, or is being written.

    Tensors are written in any order, under a temporary name until all are in."""

    def __init__(
        self,
        folder: Path,
        plan: ShardPlan,
        fingerprint: str,
        finished: bool,
        before_writing: Callable[[], None] = lambda: None,
    ):
        self.final = folder / plan.name
        self.path = self.final if finished else unfinished_path(self.final, fingerprint)
        self.plan = plan
        self.finished = finished
        self._before_writing = before_writing
        # Bytes by which its header is longer than planned: it may say more of sources and files.
        self.shift = 0
        self.jobs_left = 0
        self._fd: int | None = None
        self._pages: PageCache | None = None
        self._lock = threading.Lock()

    def _open(self) -> int:
        """Return the file's descriptor; at first use the file is opened, or created."""
        with self._lock:
            if self._fd is None:
                flags = os.O_RDONLY
                if not self.finished:
                    self._before_writing()
                    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
                self._fd = os.open(self.path, flags, 0o666)
                # Before anything is read or written.
                self._pages = self._pages or PageCache(self._fd)
                if not self.finished:
                    write_at(self._fd, memoryview(self.plan.header), 0)
                    os.ftruncate(self._fd, self.plan.size)
            return self._fd

    def write(self, buffer: memoryview, offset: int) -> None:
        with naming(self.path):
            write_at(self._open(), buffer, offset)

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with bytes of a shard that is there."""
        position = offset + self.shift
        with naming(self.path):
            fd = self._open()
            while len(buffer):
                count = os.preadv(fd, [buffer], position)
                if not count:
                    raise QuantizeError(
                        f"{self.path} was cut off while it was read: find out by what, then convert"
                        " again"
                    )
                buffer = buffer[count:]
                position += count

    def sync(self) -> None:
        """Bring what was written so far to the disk, and let the page cache forget it."""
        if self._fd is not None:
            with naming(self.path):
                sync_file(self._fd)
            self._pages.drop(self._fd)

    def finish(self) -> None:
        """Sync the file, whose bytes are all in, and give it its final name."""
        with naming(self.path):
            # Nothing was written yet to a shard of empty tensors.
            self._open()
            self.sync()
            self.close()
            os.rename(self.path, self.final)
            sync_folder(self.final.parent)
        self.finished = True
        self.path = self.final

    def close(self) -> None:
        fd = self._fd
        self._fd = None
        if fd is not None:
            os.close(fd)


# What an entry of the output folder is to a run. Finished: final, and as planned. A leftover: of
# a run of the same sources and options. Foreign: the user's own, or changed since.
FINISHED = "finished"
LEFTOVER = "leftover"
OF_ANOTHER_RUN = "of another run"
FOREIGN = "foreign"


@dataclass(frozen=True)
class Survey:
    """What this run does with what is in the output folder."""

    # Names of files that need not be written again.
    finished: set[str]
    # Paths of what earlier runs left.
    remove: list[Path]


class OutputFolder:
    """The output folder of one plan.

    It refuses what is not this program's, and keeps what an interrupted run finished."""

    def __init__(self, folder: Path, plan: Plan, overwrite: bool):
        self.folder = folder
        self.plan = plan
        self.overwrite = overwrite
        self._planned_shards = {shard.name: shard for shard in plan.shards}

        survey = self._survey()
        self.finished = survey.finished
        self.remove = survey.remove
        all_names = plan.hashes.keys() | self._planned_shards.keys()
        self.nothing_to_write = not self.remove and self.finished == all_names
        # The folder, or the nearest one above it that exists.
        parents = folder.absolute().parents
        self.existing = next(path for path in (folder, *parents) if path.exists())
        self.is_as_it_was = True
        self._has_made_way = False
        self._lock = threading.Lock()
        self._lock_fd: int | None = None

    def _survey(self) -> Survey:
        """Decide what this run need not write again, and what it removes.

        The user's own files are refused, and so are those of another run unless --overwrite is
        given."""
        if self.folder.exists() and not self.folder.is_dir():
            raise QuantizeError(f"output folder {self.folder}: is a file")
        entries = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        paths = self._by_kind(entries)
        if FOREIGN in paths:
            names = quote_names(path.name for path in paths[FOREIGN])
            raise QuantizeError(
                f"output folder {self.folder} holds {names}, not written by this program or changed"
                " since: choose a new or empty folder, or move it away"
            )
        if self.overwrite:
            return Survey(set(), entries)
        if OF_ANOTHER_RUN in paths:
            names = quote_names(path.name for path in paths[OF_ANOTHER_RUN])
            difference = self._how_it_differs(paths[OF_ANOTHER_RUN])
            raise QuantizeError(
                f"output folder {self.folder} holds {names} of another run: {difference}:"
                " --overwrite starts afresh, or choose another folder"
            )

        finished = {path.name for path in paths.get(FINISHED, [])}
        return Survey(finished, paths.get(LEFTOVER, []))

    def _by_kind(self, entries: list[Path]) -> dict[str, list[Path]]:
        """Sort the folder's entries by what they are to this run."""
        # The `__metadata__` of this program's shards, also of those that are not finished.
        shards = {}
        # Names and SHA-256 of the other files that their runs wrote.
        written: set[tuple[str, str]] = set()
        for path in entries:
            metadata = read_metadata(path) if SHARD_PATTERN.match(path.name) else {}
            if METADATA_KEY in metadata:
                shards[path] = metadata
                written |= files_of_run(metadata).items()

        paths: dict[str, list[Path]] = {}
        for path in entries:
            paths.setdefault(self._classify(path, shards, written), []).append(path)
        return paths

    def _classify(
        self, path: Path, shards: dict[Path, dict[str, str]], written: set[tuple[str, str]]
    ) -> str:
        """Find out who wrote an entry of the folder, and whether it is as planned."""
        name = path.name
        planned = self._planned_shards.get(name)
        if planned and path in shards and self._is_of_this_run(shards[path]):
            with open(path, "rb") as file:
                header = file.read(len(planned.header))
            if header == planned.header and path.stat().st_size == planned.size:
                return FINISHED
            return LEFTOVER

        digest = ""
        names = self.plan.hashes.keys() | dict(written)
        if name in names and path.is_file():
            digest = hash_file(path)
        if digest == self.plan.hashes.get(name):
            return FINISHED
        unfinished = UNFINISHED_PATTERN.fullmatch(name)
        if unfinished and self.plan.fingerprint.startswith(unfinished[1]):
            return LEFTOVER
        # The index follows from the shards.
        is_index = name == INDEX_NAME and shards
        if unfinished or path in shards or (name, digest) in written or is_index:
            return OF_ANOTHER_RUN
        return FOREIGN

    def _is_of_this_run(self, metadata: dict[str, str]) -> bool:
        """Return whether a shard was made with this run's options, of sources of the same times."""
        is_alike = metadata[METADATA_KEY] == self.plan.fingerprint
        return is_alike and metadata.get(FACTS_KEY) == json.dumps(self.plan.facts)

    def _how_it_differs(self, paths: list[Path]) -> str:
        """Describe how the sources and options of another run differ, as its first shard tells."""
        for metadata in map(read_metadata, paths):
            if FACTS_KEY not in metadata:
                continue
            try:
                difference = what_differs(parse_facts(metadata[FACTS_KEY]), self.plan.facts)
            except FactsError as error:
                return str(error)
            if metadata.get(METADATA_KEY) == self.plan.fingerprint:
                difference = (
                    "the times of source files changed (--verify tells whether a finished INT4"
                    " folder is still of them)"
                )
            return difference or f"tensors, {CONFIG_NAME} or another file that is copied changed"
        return "its options are not known"

    def room(self) -> tuple[int, int]:
        """Count the bytes that are still to write, and those that are free for it once leftovers
        are removed."""
        needed = 0
        for shard in self.plan.shards:
            if shard.name not in self.finished:
                needed += shard.size
        for name, content in self.plan.other_files.items():
            if name not in self.finished:
                needed += bytes_of_other(content)

        free = shutil.disk_usage(self.existing).free
        for path in self.remove:
            # Blocks of stat are of 512 bytes on every file system.
            free += path.stat().st_blocks * 512
        return needed, free

    def why_unwritable(self) -> str:
        """Describe why nothing can be written here; empty if it can."""
        if not self.existing.is_dir():
            return f"{self.existing} is a file"
        if os.access(self.existing, os.W_OK | os.X_OK):
            return ""
        if os.statvfs(self.existing).f_flag & os.ST_RDONLY:
            return f"{self.existing} {READ_ONLY}"
        return (
            f"Permission denied: {self.existing} is not writable, choose another or change its"
            " owner"
        )

    def lack_of_room(self) -> str:
        """Describe by how much the disk is too small for what is to be written, if it is."""
        needed, free = self.room()
        if needed <= free:
            return ""
        return (
            f"{format_bytes(needed)} to write, but the disk of {self.folder} has"
            f" {format_bytes(free)} free: make room for {format_bytes(needed - free)} more or"
            " choose another disk"
        )

    def prepare(self) -> None:
        """Create and lock the folder, and look at it again.

        The lock is the folder's own and dies with the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QuantizeError(
                f"output folder {self.folder}: another run is writing to it, wait for it"
            ) from None
        except OSError:
            # Some network file systems have no such locks.
            pass
        if self._survey() != Survey(self.finished, self.remove):
            raise QuantizeError(
                f"output folder {self.folder} changed since it was looked at: start again"
            )

    def make_way(self) -> None:
        """Remove leftovers, the index first: without it a folder is unfinished.

        Whoever is about to write calls this. A run that ends before leaves the folder as it was."""
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

    def check_other_files(self, checkpoint: Checkpoint) -> None:
        """Raise if config.json changed since the plan was made, or if a file that is read or copied
        came or went: the folder would not be what the next run plans.

        That copied files are as they were is found when they are copied."""
        written = set()
        planned = set(checkpoint.files)
        for name, content in self.plan.other_files.items():
            if isinstance(content, Path):
                planned.add(content)
            else:
                written.add(name)
        copied, _ = plan_other_files(checkpoint, written)
        weights, _ = find_weights(checkpoint.folder)
        found = {*copied.values(), *(checkpoint.folder / name for name in weights)}

        config = checkpoint.config_folder / CONFIG_NAME
        if checkpoint.has_config:
            planned.add(config)
        if config.exists():
            found.add(config)
        for path in sorted(path for path in planned - found if not path.exists()):
            raise self._changed_since_plan(path, "was removed", "put it back")
        for path in sorted(found - planned):
            raise self._changed_since_plan(path, "was added", "remove it")
        if checkpoint.has_config and hash_file(config) != checkpoint.config_hash:
            raise self._changed_since_plan(config)

    def _changed_since_plan(
        self, path: Path, what: str = "changed", undo: str = "put it back as it was"
    ) -> QuantizeError:
        remedy = "the same command starts afresh"
        if not self.overwrite:
            remedy = f"{undo}, or give --overwrite to start afresh"
        return QuantizeError(f"{path} {what} since the plan was made: {remedy}")

    def write_other_files(self) -> None:
        """Write copies and the program's own files, each complete before it gets its name, the
        index last, once all else is on the disk."""
        self.make_way()
        for name, content in self.plan.other_files.items():
            if name in self.finished:
                continue
            if name == INDEX_NAME:
                sync_folder(self.folder)
            check_signals()
            temporary = unfinished_path(self.folder / name, self.plan.fingerprint)
            source = reading(content) if isinstance(content, Path) else io.BytesIO(content)
            with source as file:
                digest = write_copy(file, temporary)
            if digest != self.plan.hashes[name]:
                raise self._changed_since_plan(content)
            os.rename(temporary, self.folder / name)
        sync_folder(self.folder)

    def close(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)


def write_copy(source: BinaryIO, target: Path) -> str:
    """Write a file's bytes to another, and to the disk; returns their SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with naming(target), open(target, "wb") as file:
        while data := source.read(COPY_BYTES):
            check_signals()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        drop_pages(file.fileno(), [])
    return digest.hexdigest()


def read_metadata(shard: Path) -> dict[str, str]:
    """Read a shard's `__metadata__`, where this program leaves its marks; empty if it has none, or
    is no whole file."""
    try:
        if not shard.is_file():
            return {}
        header, _ = read_header(shard)
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return texts_in(header.get("__metadata__"))


def are_marks_whole(metadata: dict[str, str]) -> bool:
    """Return whether a shard's `__metadata__` has all that this program leaves there, or nothing of
    it: another program may have rewritten the shard."""
    marks = {METADATA_KEY, FACTS_KEY, FILES_KEY}
    if not metadata.keys() & marks:
        return True
    # transformers reads no shard of another format. The facts were read before.
    is_whole = metadata.keys() == marks | {"format"} and metadata["format"] == "pt"
    return is_whole and metadata[FILES_KEY] == json.dumps(files_of_run(metadata))


def files_of_run(metadata: dict[str, str]) -> dict[str, str]:
    """Read which other files a shard's run wrote: their SHA-256, by name; empty if the shard does
    not say, or is damaged."""
    try:
        hashes = json.loads(metadata.get(FILES_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return texts_in(hashes)


def texts_in(value: object) -> dict[str, str]:
    """Return those entries of a JSON object that are texts; none of anything else."""
    if not isinstance(value, dict):
        return {}
    return {key: text for key, text in value.items() if isinstance(text, str)}


def hash_file(path: Path) -> str:
    """Hash a file: SHA-256, as hexadecimal digits."""
    digest = hashlib.sha256()
    with reading(path) as file:
        while data := file.read(COPY_BYTES):
            digest.update(data)
    return digest.hexdigest()


# ---- Pipeline: threads that read, work and sync. It knows nothing of quantization ----------------

# Shards that wait for the disk, at the most. Each may be an open file.
MAX_WAITING_SHARDS = 100


def most_waiting_shards() -> int:
    """Return how many shards may wait for the disk: they take a quarter of the files that this
    process may have open, which are a thousand or more, or under some limits a few dozen."""
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files == resource.RLIM_INFINITY:
        return MAX_WAITING_SHARDS
    return min(MAX_WAITING_SHARDS, most_files // 4)


class Pipeline:
    """Threads that do jobs in their order. The first error stops all.

    Some threads read ahead, the workers hand what was read to `handle`, and one thread, in the
    background, takes what must wait for the disk."""

    def __init__(
        self,
        jobs: list[Job],
        checkpoint: Checkpoint,
        handle: Callable[[Job, memoryview, Workspace], None],
    ):
        """Take the jobs, what they are read from, and what is done with a job's bytes and the
        buffers of one worker."""
        self._jobs = iter(jobs)
        self._checkpoint = checkpoint
        self._handle = handle
        self._buffer_size = max((job.nbytes for job in jobs), default=0) + READ_MARGIN
        self._free_buffers: list[mmap.mmap] = []
        # Jobs that were taken from the queue, and what returns their bytes.
        self._ahead: deque[tuple[Job, Callable]] = deque()
        self._tasks: set[concurrent.futures.Future] = set()  # that are not known to be done
        self._most_tasks = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, threads: int, watch: Callable[[], None]) -> None:
        """Do all jobs, and what was given to the background meanwhile.

        watch: called ten times a second, in this thread"""
        executor = concurrent.futures.ThreadPoolExecutor
        with (
            deferring_signals(),
            executor(DISK_READERS) as self._readers,
            executor(1) as self._background,
            executor(threads) as workers,
        ):
            # The workers are tasks, too.
            self._most_tasks = threads + most_waiting_shards()
            with self._lock:
                self._tasks |= {workers.submit(self._work) for _ in range(threads)}
            try:
                self._wait(watch)
            finally:
                self._stop.set()
                self._background.shutdown(wait=False, cancel_futures=True)
                self._readers.shutdown(wait=False, cancel_futures=True)

    def _wait(self, watch: Callable[[], None]) -> None:
        """Wait for all tasks, also those that come meanwhile; raises the first error of one."""
        while tasks := set(self._tasks):
            first_error = concurrent.futures.FIRST_EXCEPTION
            done = concurrent.futures.wait(tasks, 0.1, first_error).done
            for task in done:
                task.result()
            with self._lock:
                self._tasks -= done
            check_signals()
            watch()

    def in_background(self, function: Callable, *arguments: object) -> None:
        """Have a function called by the thread that waits for the disk.

        Waits while many such calls are due, since each may hold a file open."""
        with self._lock:
            self._tasks.add(self._background.submit(function, *arguments))

        while len(self._tasks) > self._most_tasks:
            if self._stop.is_set():
                return
            time.sleep(0.01)

    @torch.inference_mode()
    def _work(self) -> None:
        """Do jobs until there are no more."""
        workspace = Workspace()
        while not self._stop.is_set():
            taken = self._take()
            if not taken:
                return
            job, read = taken
            buffer, data = read()
            self._handle(job, data, workspace)
            self._free_buffers.append(buffer)

    def _take(self) -> tuple[Job, Callable] | None:
        """Take the next job, for one worker alone; meanwhile the disk is read for those after it.

        What is in memory already, the worker itself reads: then it is in its processor's cache."""
        with self._lock:
            for job in itertools.islice(self._jobs, 1 + DISK_READERS - len(self._ahead)):
                read = functools.partial(self._read_job, job)
                if not self._checkpoint.is_cached(job):
                    read = self._readers.submit(read).result
                self._ahead.append((job, read))
            return self._ahead.popleft() if self._ahead else None

    def _read_job(self, job: Job) -> tuple[mmap.mmap, memoryview]:
        """Read a job's bytes into a buffer that no other job has now."""
        with self._lock:
            buffer = self._free_buffers.pop() if self._free_buffers else None
        buffer = buffer or allocate(self._buffer_size)
        return buffer, self._checkpoint.read_job(job, memoryview(buffer))


# ---- Quantization: scales and codes of a block of weights. No I/O, no names. ---------------------

# 4-bit two's complement.
CODE_MIN = -8
CODE_MAX = 7

# c + 8 differs from c's two's complement in the top bit of each nibble; as int32.
OFFSET_BITS = 0x88888888 - (1 << 32)

# Floats are summed in so many lanes. Group sizes and ranks are multiples of it.
SUM_LANES = 8

# The least importance of a column, as a part of the largest in its group: see `weigh_columns`. It
# is the least that the search in integers, which counts in parts of 2^14, can tell from nothing.
# SmolLM2 loses more the larger it is: 0.110 nat a token with this or none at all, 0.112 with 4
# times, 0.114 with 16 times as much.
LEAST_SHARE = 2**-14

# Of error feedback. Few tokens overstate correlations, so the factor's share is scaled to 80 %. The
# best share is flat between 50 and 90 %.
FACTOR_SHARE = 0.8
# What is added to each second moment, as a part of their mean, as in GPTQ.
DAMPING = 0.01

# Bytes, where pages have 4 kB.
HUGE_PAGE = 1 << 21


@dataclass(frozen=True)
class Packing:
    """How a weight is stored: in codes of 4 or 8 bits, and a scale for each group of columns."""

    bits: int
    # Columns.
    group_size: int

    @property
    def codes_per_word(self) -> int:
        return 32 // self.bits

    @property
    def code_max(self) -> int:
        """Return the largest code. The smallest one is further from zero by one."""
        return (1 << (self.bits - 1)) - 1

    def columns_of(self, columns: int) -> int:
        """Round `columns` up to whole groups."""
        return -(-columns // self.group_size) * self.group_size


# What a worker holds of each weight of a tile, by role. None stands for the weights' own dtype.
TILE_BUFFERS: dict[str, torch.dtype | None] = {
    "padded": None,
    "magnitudes": None,
    "weights": torch.float32,
    "codes": torch.int16,
    "search: parts": torch.int32,
    "search: weighed": torch.int32,
    "search: codes": torch.int32,
    "search: products": torch.int32,
}


class Workspace:
    """One worker's buffers, reused from tile to tile.

    Fresh pages from the kernel cost more than the arithmetic. The tensors over the buffers are
    reused as well, since every call to torch hands the interpreter lock to another worker and back.
    `worker_buffers` lists all buffers of a run."""

    def __init__(self):
        self._buffers: dict[str, mmap.mmap] = {}
        self._tensors: dict[tuple, torch.Tensor] = {}

    def buffer(self, role: str, nbytes: int) -> memoryview:
        """Return `nbytes` writable bytes, the same ones for this role until it asks for more."""
        if len(self._buffers.get(role, b"")) < nbytes:
            # Some tensors lie over the old buffer.
            self._tensors.clear()
            self._buffers[role] = allocate(nbytes)
        return memoryview(self._buffers[role])[:nbytes]

    def tensor(self, role: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Return the role's buffer as a tensor. Tensors of two dtypes share their bytes."""
        key = (role, dtype, shape)
        if key not in self._tensors:
            buffer = self.buffer(role, math.prod(shape) * dtype.itemsize)
            self._tensors[key] = torch.frombuffer(buffer, dtype=dtype).view(shape)
        return self._tensors[key]

    def beside(self, weights: torch.Tensor, role: str) -> torch.Tensor:
        """Return a tensor of a tile's shape, in the dtype that TILE_BUFFERS names for the role."""
        return self.tensor(role, TILE_BUFFERS[role] or weights.dtype, *weights.shape)


def whole_pages(nbytes: float) -> int:
    """Round up to whole huge pages."""
    return math.ceil(nbytes / HUGE_PAGE) * HUGE_PAGE


def allocate(nbytes: int) -> mmap.mmap:
    """Take anonymous memory, in huge pages where the system has them: 5 % faster than in pages of
    4 kB."""
    try:
        memory = mmap.mmap(-1, whole_pages(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        problem = f"no memory for a buffer of {format_bytes(nbytes)}"
        raise QuantizeError(f"{problem}: use fewer --threads", 3) from None

    # What the disk writes to private memory during a fork may be lost: no child gets it. (open(2),
    # O_DIRECT)
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        # Not every kernel of the system knows these.
        with contextlib.suppress(OSError):
            memory.madvise(advice)
    return memory


@dataclass(frozen=True)
class Feedback:
    """How the rounding error of a column changes the columns after it: see `feedback_of`.

    Both are float32 (columns, rank), the rank a multiple of SUM_LANES."""

    # V: what each column's error adds to the sum that is carried along a row.
    factor: torch.Tensor
    # U: how that sum changes each column.
    spread: torch.Tensor


@dataclass(frozen=True)
class Rounding:
    """How scales and codes are chosen and stored."""

    # Nibbles hold the code plus 8: see `pack_int4`.
    with_offset: bool = False
    # Of columns, float32 (groups of a row, group_size), or (1, group_size) where it is the same in
    # all groups. With it scales are searched.
    importance: torch.Tensor | None = None
    # It needs the importance.
    feedback: Feedback | None = None
    # Does the work for 4 bits in groups of up to MAX_GROUP, to the same result.
    kernel: Kernel | None = None
    # 4, or 8, where the largest weight alone decides, without importance.
    bits: int = 4


def make_results(
    workspace: Workspace, count: int, scale_dtype: torch.dtype, packing: Packing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make room in a workspace for the words and scales of so many groups."""
    width = packing.group_size // packing.codes_per_word
    words = workspace.tensor("words", torch.int32, count, width)
    return words, workspace.tensor("scales", scale_dtype, count)


def quantize_into(
    words: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    workspace: Workspace,
    rounding: Rounding,
) -> bool:
    """Quantize groups, (n, group_size) of any float dtype, to packed words, int32, and scales (n,).

    scale = max|w| / 7 or 127, or searched by importance. code = clamp(round(w / scale)), by the
    stored scale, with float32's division and rounding to nearest even. An all-zero group, or one
    too small for the scale's dtype, has scale 0 and codes 0. A scale that is not finite marks a
    group with a value that no scale can hold. Returns whether all scales are finite."""
    if rounding.kernel and rounding.bits == 4 and groups.shape[1] <= MAX_GROUP:
        return quantize_with_kernel(words, scales, groups, workspace, rounding)

    code_max = Packing(rounding.bits, groups.shape[1]).code_max
    scales.copy_(largest_magnitudes(groups, workspace).div_(code_max))

    # The codes replace the weights.
    weights = workspace.beside(groups, "weights").copy_(groups)
    if rounding.feedback:
        round_with_feedback(weights, scales, workspace, rounding)
    else:
        if rounding.importance is not None:
            search_scales(weights, scales, rounding.importance, workspace)
        round_to_codes(weights, scales, weights, code_max)

    if rounding.bits == 8:
        # Four bytes a word, each a code plus 128, the first code's lowest.
        words.view(torch.uint8).copy_(weights.add_(code_max + 1))
    else:
        codes = workspace.beside(groups, "codes").copy_(weights)
        pack_int4(codes, words, rounding.with_offset)
    return bool(torch.isfinite(scales).all())


def largest_magnitudes(groups: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    """Return the largest magnitude of each group, float32; NaN where a group has one."""
    magnitudes = torch.abs(groups, out=workspace.beside(groups, "magnitudes"))
    # As integers, bits without a sign are ordered as the values are, NaN above all, and they are
    # compared several times faster.
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[groups.dtype.itemsize]
    largest = torch.amax(magnitudes.view(integers), -1)
    return largest.view(groups.dtype).float()


def round_to_codes(
    weights: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, code_max: int = CODE_MAX
) -> None:
    """Put clamp(round(w / scale)) into `out`.

    It is 0 where the scale is 0, since such weights were too small for any scale."""
    divisors = torch.where(scales == 0, 1, scales).float()[:, None]
    torch.div(weights, divisors, out=out).round_().clamp_(-code_max - 1, code_max)


def sum_in_lanes(terms: torch.Tensor) -> torch.Tensor:
    """Sum along the last dimension, a multiple of SUM_LANES, in one order on every machine: by
    lanes, which are then folded."""
    lanes = functools.reduce(torch.add, terms.unflatten(-1, (-1, SUM_LANES)).unbind(-2))
    while lanes.shape[-1] > 1:
        lanes = torch.add(*lanes.chunk(2, -1))
    return lanes[..., 0]


def weigh_columns(mean_squares: torch.Tensor) -> torch.Tensor:
    """Return the columns' importance in the choice of scales; float32, as `mean_squares`.

    mean_squares: float32 (groups of a row, group_size)

    It is their mean square input, but at least LEAST_SHARE of the largest in the group. Some models
    have a column whose inputs are so large that it alone would choose the scale, and then all other
    columns could be clipped (massive activations; Sun and others, 2024)."""
    return torch.maximum(mean_squares, mean_squares.amax(-1, keepdim=True) * LEAST_SHARE)


def shares_of(importance: torch.Tensor) -> torch.Tensor:
    """Return each column's part of its group's largest importance, in parts of 2^14; int32."""
    largest = importance.amax(-1, keepdim=True)
    parts = importance / torch.where(largest == 0, 1, largest)
    return parts.mul_(1 << 14).round_().to(torch.int32)


def search_scales(
    weights: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor, workspace: Workspace
) -> None:
    """Replace absmax scales (n,) of weights, float32 (n, group_size), where a scale of either sign
    has a smaller sum of squared errors, weighed by importance."""
    candidates = find_candidates(weights, importance, workspace).to(scales.dtype)
    errors_of_candidates = sum_squared_errors(weights, candidates, importance, workspace)
    errors_of_absmax = sum_squared_errors(weights, scales, importance, workspace)
    better = (errors_of_candidates < errors_of_absmax) & (candidates != 0)
    scales.copy_(torch.where(better, candidates, scales))


def find_candidates(
    weights: torch.Tensor, importance: torch.Tensor, workspace: Workspace
) -> torch.Tensor:
    """Return the scales of least squared error that the steps of the search lead to; 0 for none.

    Codes reach -8 but only 7, so the scale's sign puts the largest weight on the longer side. For
    each step weights are rounded with scale = -largest / step. For such codes the best scale is
    sum(w c) / sum(c c), which leaves the squared error sum(w w) - sum(w c)^2 / sum(c c). (After
    llama.cpp's make_qx_quants.) Weights are taken as parts of the largest, 2^14 for it: sums of
    integers are the same in whatever order a machine adds."""
    parts = workspace.beside(weights, "search: parts")
    weighed = workspace.beside(weights, "search: weighed")
    codes = workspace.beside(weights, "search: codes")
    products = workspace.beside(weights, "search: products")
    # Importance repeats from row to row.
    by_row = (-1, *importance.shape)
    shares = shares_of(importance)
    # Sums of larger groups need 64 bits, which take eight times as long.
    sum_dtype = torch.int32 if weights.shape[1] <= MAX_GROUP else torch.int64

    lowest, highest = torch.aminmax(weights, dim=-1)
    largest = torch.where(-lowest > highest, lowest, highest)
    # The reciprocal of a smaller one might be infinite.
    factors = torch.where(largest.abs() > 1e-30, largest.reciprocal() * -(1 << 14), 0)
    exact_parts = torch.mul(weights, factors[:, None], out=products.view(torch.float32))
    parts.copy_(exact_parts.round_())
    torch.mul(parts.view(by_row), shares, out=weighed.view(by_row))
    weighed.add_(1 << 13).bitwise_right_shift_(14)

    best_gain = torch.zeros_like(largest)
    best_scales = torch.zeros_like(largest)
    for multiplier in SEARCH_MULTIPLIERS:
        torch.mul(parts, multiplier, out=codes).bitwise_right_shift_(16)
        codes.add_(1 << 8).bitwise_right_shift_(9).clamp_(CODE_MIN, CODE_MAX)
        torch.mul(weighed, codes, out=products)
        products_sum = products.sum(-1, dtype=sum_dtype).float()
        codes.mul_(codes).view(by_row).mul_(shares)
        candidates = products_sum / codes.sum(-1, dtype=sum_dtype).float()

        # The gain is NaN for an all-zero group, and so never better.
        gain = products_sum * candidates
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scales = torch.where(better, candidates, best_scales)
    return best_scales * -largest


def sum_squared_errors(
    weights: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor, workspace: Workspace
) -> torch.Tensor:
    """Add up each group's squared errors of rounding by these scales, weighed by importance."""
    errors = workspace.beside(weights, "search: products").view(torch.float32)
    round_to_codes(weights, scales, errors)
    errors.mul_(scales.float()[:, None]).sub_(weights)
    errors.mul_(errors).view(-1, *importance.shape).mul_(importance)
    return sum_in_lanes(errors)


def feedback_of(
    mean_squares: torch.Tensor, factor: torch.Tensor, kernel: Kernel | None
) -> Feedback:
    """Prepare error feedback: what a column's rounding error changes in the columns after it.

    The errors of a row's products then cancel out, for inputs whose second moments are
    diag(mean_squares - row sums of factor^2) + factor factor^T.

    Let H = diag(d) + V V^T be these. Once the columns before j are rounded, let c be the sum of
    v_k (w_k - q_k) over them. The error to be expected is least with w_j + u_j c for column j,
    where u_j = (I + sum of v_k v_k^T / d_k over k >= j)^-1 v_j / d_j. (GPTQ by Frantar and
    others, 2023, for such an H.)"""
    missing_ranks = -factor.shape[1] % SUM_LANES
    missing_columns = len(mean_squares) - len(factor)
    factor = torch.nn.functional.pad(factor, (0, missing_ranks, 0, missing_columns))
    factor.mul_(math.sqrt(FACTOR_SHARE))
    rest = (mean_squares - sum_in_lanes(factor * factor)).clamp_(min=0)
    rest.add_(sum_in_lanes(mean_squares) / len(mean_squares) * DAMPING)

    spread = torch.empty_like(factor)
    if kernel:
        addresses = (tensor.data_ptr() for tensor in (factor, rest, spread))
        kernel.library.spread_of(*addresses, *factor.shape)
    else:
        find_spread(factor, rest, spread)
    return Feedback(factor, spread)


def find_spread(factor: torch.Tensor, rest: torch.Tensor, spread: torch.Tensor) -> None:
    """Fill in U of `feedback_of`, from V and d."""
    columns, rank = factor.shape
    inverse = torch.eye(rank, dtype=torch.float64)
    # Each column updates the inverse for those before it.
    for column in reversed(range(columns)):
        check_signals()
        direction = factor[column].double()
        turned = sum_in_lanes(inverse * direction)
        divisor = rest[column].double() + sum_in_lanes(turned * direction)
        spread[column] = turned / divisor
        inverse -= torch.outer(turned, turned) * (1 / divisor)


def round_with_feedback(
    weights: torch.Tensor, scales: torch.Tensor, workspace: Workspace, rounding: Rounding
) -> None:
    """Replace whole rows of weights, float32 (n, group_size), by their codes, and fill in the
    scales (n,).

    A group's scale is searched for its weights as the errors of the groups before change them. Then
    the group is rounded column by column."""
    groups_in_row, group_size = rounding.importance.shape
    weights = weights.view(-1, groups_in_row, group_size)
    scales = scales.view(-1, groups_in_row)
    # c of `feedback_of`, of each row.
    carried = torch.zeros(len(weights), rounding.feedback.factor.shape[1])
    factors = rounding.feedback.factor.split(group_size)
    spreads = rounding.feedback.spread.split(group_size)
    for group, (factor, spread) in enumerate(zip(factors, spreads)):
        columns = weights[:, group].T
        changes = [sum_in_lanes(carried * of_column) for of_column in spread]
        changed = weights[:, group] + torch.stack(changes, 1)
        group_scales = scales[:, group].copy_(changed.abs().amax(1) / CODE_MAX)
        search_scales(changed, group_scales, rounding.importance[group : group + 1], workspace)

        # A tile may take half a minute.
        check_signals()
        round_columns(columns, group_scales, Feedback(factor, spread), carried)


def round_columns(
    columns: torch.Tensor, scales: torch.Tensor, feedback: Feedback, carried: torch.Tensor
) -> None:
    """Replace the columns of a group, float32 (group_size, rows), by their codes, one by one, and
    add their errors to what is carried, float32 (rows, rank)."""
    steps = scales.float()
    divisors = torch.where(scales == 0, 1, scales).float()
    bound = divisors.abs() * MAX_CHANGE
    for column, factor, spread in zip(columns, feedback.factor, feedback.spread):
        change = sum_in_lanes(carried * spread).clamp_(-bound, bound)
        codes = ((column + change) / divisors).round_().clamp_(CODE_MIN, CODE_MAX)
        carried += (column - codes * steps)[:, None] * factor
        column.copy_(codes)


def pack_int4(codes: torch.Tensor, words: torch.Tensor, with_offset: bool = False) -> None:
    """Pack codes, int16 (rows, columns), into words, int32 (rows, columns // 8), the first lowest.

    The codes are destroyed."""
    # Pairs of codes, int32 0x000H000L, times 0x1001000 have 0xHL as their top byte. Four such bytes
    # are the little-endian word.
    pairs = codes.view(torch.int32)
    pairs.bitwise_and_(0x000F000F).mul_(0x1001000).bitwise_right_shift_(24)
    # This keeps the low byte.
    words.view(torch.int8).copy_(pairs)
    if with_offset:
        words.bitwise_xor_(OFFSET_BITS)


def unpack_int4(words: torch.Tensor, with_offset: bool = False) -> torch.Tensor:
    """Unpack words, int32 (rows, columns // 8), to codes, int8 (rows, columns)."""
    if with_offset:
        words = words ^ OFFSET_BITS
    # A shift to the left puts a code at the top. The shift back keeps its sign.
    shifts = torch.arange(28, -4, -4, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) << shifts) >> 28
    return codes.to(torch.int8).flatten(-2)


def dequantize(
    words: torch.Tensor, scales: torch.Tensor, packing: Packing, with_offset: bool
) -> torch.Tensor:
    """Decode words, int32 (rows, columns // codes_per_word), by scales (rows, columns //
    group_size); to float32."""
    if packing.bits == 4:
        codes = unpack_int4(words, with_offset)
    else:
        codes = words.view(torch.uint8).float() - 128
    groups = codes.unflatten(1, (-1, packing.group_size))
    return (groups * scales.float()[:, :, None]).flatten(1)


def dequantize_int4(
    qweight: torch.Tensor, scales: torch.Tensor, group_size: int, columns: int | None = None
) -> torch.Tensor:
    """Decode weights of the `int4` layout to float32 (rows, columns), approximately: code times its
    group's scale.

    qweight: int32 (rows, padded // 8)
    scales: float16 (rows, padded // group_size)
    columns: the weight's true number of columns where quantize_config.json lists it as padded; None
        keeps all"""
    rows, words = qweight.shape
    scale_rows, groups = scales.shape
    if rows != scale_rows or words * CODES_PER_WORD != groups * group_size:
        shapes = f"words {tuple(qweight.shape)}, scales {tuple(scales.shape)}"
        raise ValueError(f"{shapes}: group_size is not {group_size}?")
    weights = dequantize(qweight, scales, Packing(4, group_size), with_offset=False)
    return weights[:, :columns]


# ---- Kernels: their calls, and their trial beside torch ------------------------------------------

# Bits of a float's mantissa that a scale's dtype does not have.
SCALE_BITS_DROPPED = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
# A multiple of the vectors that the measuring kernel works with.
LANES = 16


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. Calls of its functions release the interpreter lock."""

    loaded: ClassVar[dict[KernelKind, Kernel]] = {}
    kind: KernelKind
    library: ctypes.CDLL

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights that it takes."""
        return FLOAT_DTYPES[self.kind.dtype]


def structure_in(source: str) -> type[ctypes.Structure]:
    """Make what a kernel is called with, of the first struct in its C source."""
    struct = re.search(r"typedef struct \{(.*?)\}", source, re.DOTALL)[1]
    fields = []
    for kind, pointer, name in re.findall(r"(\w+) (\*?)(\w+);", struct):
        fields.append((name, ctypes.c_void_p if pointer else getattr(ctypes, f"c_{kind}")))
    return type("Call", (ctypes.Structure,), {"_fields_": fields})


QuantizeCall = structure_in(QUANTIZE_SOURCE)
MeasureCall = structure_in(MEASURE_SOURCE)


def quantize_with_kernel(
    words: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    workspace: Workspace,
    rounding: Rounding,
) -> bool:
    """Do what `quantize_into` does, in groups of up to MAX_GROUP."""
    count, group_size = groups.shape
    # Error feedback changes the weights before they are rounded.
    dtype = torch.float32 if rounding.feedback else rounding.kernel.dtype
    if groups.dtype != dtype:
        groups = workspace.tensor("weights", dtype, count, group_size).copy_(groups)
    call = QuantizeCall(
        weights=groups.data_ptr(),
        words=words.data_ptr(),
        scales=scales.data_ptr(),
        groups=count,
        group_size=group_size,
        groups_in_row=1,
        bits_dropped=SCALE_BITS_DROPPED[scales.dtype],
        offset=OFFSET_BITS & 0xFF if rounding.with_offset else 0,
    )

    if rounding.importance is not None:
        # The kernel pads its groups so that its loops need no remainder.
        padding = (0, -group_size % 32)
        importance = torch.nn.functional.pad(rounding.importance, padding).contiguous()
        shares = shares_of(importance).to(torch.int16)
        call.importance = importance.data_ptr()
        call.shares = shares.data_ptr()
        call.groups_in_row = len(importance)
    if rounding.feedback:
        call.factor = rounding.feedback.factor.data_ptr()
        call.spread = rounding.feedback.spread.data_ptr()
        call.rank = rounding.feedback.factor.shape[1]
    rounding.kernel.library.quantize(ctypes.byref(call))
    return call.not_finite == 0


def compile_kernel(kind: KernelKind) -> Kernel:
    """Compile a kernel, by the compiler that CC names or cc, and compare it with torch."""
    if kind in Kernel.loaded:
        return Kernel.loaded[kind]

    compilation = Compilation.running.get(kind) or Compilation(kind)
    kernel = Kernel(kind, compilation.load())
    if kind.variant == "FEEDBACK":
        kernel.library.spread_of.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2
    works_as_torch = {"quantize": quantizes_as_torch, "measure": measures_as_torch}[kind.task]
    if not works_as_torch(kernel):
        raise NoKernel(f"what the C compiler made of it does not {kind.task} as torch does")
    Kernel.loaded[kind] = kernel
    return kernel


def compile_kernels(task: str, kinds: set[KernelKind]) -> dict[KernelKind, Kernel]:
    """Compile a task's kernels side by side, and end the compilations that are not needed."""
    with deferring_signals():
        for kind, compilation in list(Compilation.running.items()):
            if kind.task == task and kind not in kinds:
                compilation.end()
        for kind in kinds - Compilation.running.keys() - Kernel.loaded.keys():
            Compilation(kind)
        return {kind: compile_kernel(kind) for kind in kinds}


@dataclass(frozen=True)
class Trial:
    """Weights that a kernel and torch quantize, to compare what they make of them."""

    groups: torch.Tensor
    importance: torch.Tensor | None = None
    factor: torch.Tensor | None = None


def largest_weight_trial(size: int) -> Trial:
    """Make groups whose largest weight is at each place in turn. Their other weights are half-way
    between codes.

    The scales are of all kinds: half-way between two of float16, subnormal, also in bf16, of so few
    bits that the largest weight is beyond all codes, and 0."""
    number = torch.arange(size)
    mantissas = 1 + number / 32 + number % 4 * 2.0**-11
    scales = mantissas * 2.0 ** (number % 13 - 23)
    scales[::29] *= 2.0**-112
    scales[5::29] = 1.4 * 2.0**-24
    scales[11::29] = 2.0**-27
    halves = torch.arange(-6.5, 7, 0.5)
    groups = scales[:, None] * halves.repeat(-(-size // len(halves)))[:size]
    largest = scales * 7 * (-1.0) ** number
    return Trial(groups.fill_diagonal_(0) + torch.diag(largest))


def search_trial() -> Trial:
    """Make groups of which a quarter are so close to whole codes that two scales are as good."""
    size = 376
    groups = torch.randn(256, size, generator=torch.Generator().manual_seed(0)).mul_(5)
    distances = 2.0 ** -(6 + torch.arange(64) % 12)[:, None]
    close = groups[::4].round().clamp(-7, 7) + groups[1::4] * distances
    groups[::4] = close
    groups[1::4] = close.flip(0, 1)
    # Two groups to a row.
    importance = torch.arange(2.0 * size).view(2, size) * 0.618 % 1
    return Trial(groups, importance)


def feedback_trial() -> Trial:
    """Make rows that are not whole rounds of the loop over eight, with a weak column behind strong
    ones, where changes are bounded."""
    groups = torch.randn(404, 40, generator=torch.Generator().manual_seed(1)).mul_(5)
    importance = torch.arange(160.0).view(4, 40) * 0.618 % 1
    importance[3, -8:-1] = 40
    importance[3, -1] = 0.1
    factor = (torch.arange(160.0 * 16) * 0.414 % 1).view(160, 16)
    factor[-8:] = 1
    return Trial(groups, importance, factor * importance.view(-1, 1).sqrt() / 4)


def quantizes_as_torch(kernel: Kernel) -> bool:
    """Compare a kernel that quantizes with torch before it is relied upon.

    The compiler makes loops that take several weights at a time: 64 and 32 with AVX-512, 32 and 16
    with AVX2, 16 and 8 with NEON. Two groups of 376 weights take some rounds of each, and leave a
    remainder. Groups of 384 take the loop for multiples of 128."""
    trials = [search_trial()]
    if kernel.kind.variant == "ABSMAX":
        trials = [largest_weight_trial(376), largest_weight_trial(384)]
    elif kernel.kind.variant == "FEEDBACK":
        trials.append(feedback_trial())
    for trial in trials:
        trial = replace(trial, groups=trial.groups.to(kernel.dtype))
        by_kernel = quantize_trial(trial, kernel)
        by_torch = quantize_trial(trial, None)
        if not all(map(torch.equal, by_kernel, by_torch)):
            return False
    return True


def quantize_trial(trial: Trial, kernel: Kernel | None) -> list[torch.Tensor]:
    """Return all that is made of a trial's groups, for scales of each dtype."""
    groups = trial.groups
    results = []
    feedback = None
    if trial.factor is not None:
        feedback = feedback_of(trial.importance.flatten(), trial.factor.clone(), kernel)
        results.append(feedback.spread)
    rounding = Rounding(True, trial.importance, feedback, kernel)
    packing = Packing(4, groups.shape[1])
    for scale_dtype in SCALE_BITS_DROPPED:
        workspace = Workspace()
        words, scales = make_results(workspace, len(groups), scale_dtype, packing)
        quantize_into(words, scales, groups, workspace, rounding)
        results += [words, scales]
    return results


def measures_as_torch(kernel: Kernel) -> bool:
    """Compare a kernel that measures errors with torch before it is relied upon."""
    return all(measures_alike(kernel, number) for number in range(12))


def measures_alike(kernel: Kernel, number: int) -> bool:
    """Compare what a kernel and torch find where one weight of each row is farther from what is
    decoded, by another distance in each trial: where the code is the largest, the smallest, the
    largest with a scale of 0, or any.

    Rows are of two spans and a remainder, which ends within a group."""
    generator = torch.Generator().manual_seed(number)
    columns = 1333
    column = number * 331 % columns
    packing = Packing((4, 8)[number % 2], (24, 40, 1040)[number % 3])
    with_offset = packing.bits == 8 or number % 4 == 0
    padded = packing.columns_of(columns)
    size = (4, padded // packing.codes_per_word)
    words = torch.randint(-(1 << 31), 1 << 31, size, generator=generator, dtype=torch.int32)
    smallest = 0 if with_offset else OFFSET_BITS
    ends = torch.tensor([~smallest, smallest, ~smallest])
    words[:3, column // packing.codes_per_word] = ends
    scales = torch.randn(4, padded // packing.group_size, generator=generator)
    scales[2, column // packing.group_size] = 0
    scales = scales.to(list(SCALE_BITS_DROPPED)[number // 2 % 3])

    codes = dequantize(words, torch.ones_like(scales), packing, with_offset)[:, :columns]
    codes += (torch.rand(codes.shape, generator=generator) - 0.5) * 0.4
    distance = (0.8 + number % 5) * (-1) ** (number // 6)
    codes[:, column] += distance
    weights = codes * scales.float().repeat_interleave(packing.group_size, 1)[:, :columns]
    weights[2, column] = distance
    weights = weights.to(kernel.dtype)

    energy = None
    if kernel.kind.variant == "OUTPUTS" and number % 5:
        factor = torch.randn(columns, 24, generator=generator)
        rest = torch.rand(columns, generator=generator)
        energy = OutputEnergy.of(rest + factor.square().sum(1), factor)
    measuring = Measuring(packing, with_offset, number % 7 == 0, energy, kernel)
    for first in range(4):
        rows = (weights[first:], words[first:], scales[first:])
        by_kernel = measure(*rows, measuring, Workspace())
        by_torch = measure(*rows, replace(measuring, kernel=None), Workspace())
        if not by_kernel.agrees_with(by_torch):
            return False
    return True


# ---- Blocks: what a job's bytes become, and where each of them goes ------------------------------


@dataclass(frozen=True)
class Run:
    """Bytes of an output tensor that lie in one piece."""

    output: OutputTensor
    offset: int  # in the output tensor, in bytes
    data: memoryview


# Roles of a worker's buffers, in which a job's words and scales lie as they will in the output.
WORDS = "words of a job"
SCALES = "scales of a job"


def kernels_for(plan: Plan, task: str) -> dict[KernelKind | None, Kernel]:
    """Compile the kernels that a plan has work for.

    They are never needed, and so the user is only told where one cannot be had."""
    recipes = [tensor.recipe for tensor in plan.tensors if tensor.recipe]
    if task == "quantize":
        work = "rounding"
        kinds = {recipe.packed_by for recipe in recipes}
    else:
        work = "verifying"
        kinds = {recipe.measured_by for recipe in recipes}
    try:
        return compile_kernels(task, kinds - {None})
    except NoKernel as reason:
        times = "thirty times" if FEEDBACK in plan.options.rule else "twice"
        text = f"{work} with torch, which takes {times} the processor's time or more: {reason}"
        say_paragraph("Note:", text)
        return {}


class Packer:
    """Makes of a job's bytes what the plan says, in the buffers of a worker."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._form = plan.options.form
        self._kernels = kernels_for(plan, "quantize")
        # Kept for the other jobs of the same tensor.
        self._rounding_of = functools.lru_cache(KEPT_ROUNDINGS)(self._find_rounding)

    def runs(self, job: Job, data: memoryview, workspace: Workspace) -> Iterator[Run]:
        """Yield what a job's bytes become. The bytes are valid until the worker's next job."""
        if not job.tensor.packing:
            yield Run(job.tensor.outputs[0], job.offset, data)
            return

        self.pack(job, data, workspace)
        words, scales, *constants = job.tensor.outputs
        yield from self._runs_of(WORDS, job.tensor.packing.codes_per_word, words, job, workspace)
        yield from self._runs_of(SCALES, job.tensor.packing.group_size, scales, job, workspace)
        if job.row == 0 and job.column == 0:
            for output in constants:
                yield Run(output, 0, memoryview(output.content()))

    def pack(self, job: Job, data: memoryview, workspace: Workspace) -> None:
        """Quantize a job's rows, tile by tile, to words and scales as they lie in the output."""
        dtype = FLOAT_DTYPES[job.tensor.source.dtype]
        block = torch.frombuffer(data, dtype=dtype).view(job.rows, job.columns)
        packing = job.tensor.packing
        rounding = self._rounding_of(job.tensor)
        all_words, all_scales = self.results(job, workspace)
        step = rows_of_tile(job.columns)
        for row in range(0, job.rows, step):
            check_signals()
            rows = slice(row, row + step)
            weights = pad_columns(block[rows], packing, workspace)
            groups = weights.view(-1, packing.group_size)
            if self._form.transposed:
                words, scales = make_results(workspace, len(groups), all_scales.dtype, packing)
            else:
                words = all_words[rows].view(len(groups), -1)
                scales = all_scales[rows].flatten()
            if not quantize_into(words, scales, groups, workspace, rounding):
                raise QuantizeError(describe_bad_value(job, row, groups, scales))
            if self._form.transposed:
                all_words[rows] = words.view(len(weights), -1)
                all_scales[rows] = scales.view(len(weights), -1)

    def results(self, job: Job, workspace: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a worker's room for the words and scales of a job, with what is there already.

        Both have a row for each row of the weight, however they lie in the output."""
        packing = job.tensor.packing
        columns = packing.columns_of(job.columns)
        words = [job.rows, columns // packing.codes_per_word]
        scales = [job.rows, columns // packing.group_size]
        scale_dtype = FLOAT_DTYPES[job.tensor.outputs[1].dtype]
        if self._form.transposed:
            words = workspace.tensor(WORDS, torch.int32, *reversed(words))
            scales = workspace.tensor(SCALES, scale_dtype, *reversed(scales))
            return words.T, scales.T
        return (
            workspace.tensor(WORDS, torch.int32, *words),
            workspace.tensor(SCALES, scale_dtype, *scales),
        )

    def _runs_of(
        self, role: str, width: int, output: OutputTensor, job: Job, workspace: Workspace
    ) -> Iterator[Run]:
        """Yield a job's words, or scales, by the pieces in which they lie in the output tensor.

        `width` columns of the weight share a word, or a scale. A block of whole rows, or a part of
        one row, is one piece of a tensor that lies as (rows, columns), and so is a block of all
        rows of one that lies as (columns, rows). Of a block of some rows of the latter, each line
        is a piece:

            (rows, columns)      (columns, rows)

              . . . . .            . a a .
              a a a a a            . b b .
              a a a a a            . c c .
              . . . . .            . d d ."""
        itemsize = DTYPE_BITS[output.dtype] // 8
        count = job.rows * job.tensor.packing.columns_of(job.columns) // width
        data = workspace.buffer(role, count * itemsize)
        line = output.shape[1]
        first = job.column // width
        if not self._form.transposed:
            yield Run(output, (job.row * line + first) * itemsize, data)
            return

        piece = len(data) if job.rows == line else job.rows * itemsize
        for number, begin in enumerate(range(0, len(data), piece)):
            start = (first + number) * line + job.row
            yield Run(output, start * itemsize, data[begin : begin + piece])

    def _find_rounding(self, tensor: TensorPlan) -> Rounding:
        """Prepare how a weight is rounded, with its statistics, padded with zeros."""
        recipe = tensor.recipe
        packing = tensor.packing
        kernel = self._kernels.get(recipe.packed_by)
        importance = None
        feedback = None
        if recipe.has_statistics:
            mean_squares, factor = self._plan.statistics.get(tensor.source)
            padding = -len(mean_squares) % packing.group_size
            mean_squares = torch.nn.functional.pad(mean_squares, (0, padding))
            importance = weigh_columns(mean_squares.view(-1, packing.group_size))
            if recipe.has_feedback:
                feedback = feedback_of(mean_squares, factor, kernel)
        elif recipe.searches:
            # All columns count alike.
            importance = torch.ones(1, packing.group_size)
        return Rounding(recipe.with_offset, importance, feedback, kernel, packing.bits)


class Restorer:
    """Makes of a job's words the weights that they stand for."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def runs(self, job: Job, data: memoryview, workspace: Workspace) -> Iterator[Run]:
        """Yield what a job's bytes become. The bytes are valid until the worker's next job."""
        (output,) = job.tensor.outputs
        if not job.tensor.packing:
            yield Run(output, job.offset, data)
            return
        dense = self.unpack(job, data, workspace)
        offset = job.row * output.shape[1] * dense.itemsize
        yield Run(output, offset, workspace.buffer("dense", dense.nbytes))

    def unpack(self, job: Job, data: memoryview, workspace: Workspace) -> torch.Tensor:
        """Decode a job's rows, and drop the columns that were padded."""
        (output,) = job.tensor.outputs
        words = torch.frombuffer(data, dtype=torch.int32).view(job.rows, -1)

        info = job.tensor.scales
        row_bytes = info.nbytes // info.shape[0]
        memory = workspace.buffer("scales", job.rows * row_bytes + READ_MARGIN)
        part = self._checkpoint.read(info, job.row * row_bytes, job.rows * row_bytes, memory)
        scales = torch.frombuffer(part, dtype=FLOAT_DTYPES[info.dtype]).view(job.rows, -1)

        weights = dequantize(words, scales, job.tensor.packing, job.tensor.recipe.with_offset)
        dense = workspace.tensor("dense", FLOAT_DTYPES[output.dtype], job.rows, output.shape[1])
        dense.copy_(weights[:, : output.shape[1]])
        if not torch.isfinite(dense).all():
            problem = f"decodes to weights beyond {output.dtype}, which the source has"
            pattern = shlex.quote(pattern_of([replace(job.tensor.source, name=output.name)]))
            raise QuantizeError(
                f"tensor {output.name!r} {problem}: convert again with --exclude {pattern}, which"
                " keeps it"
            )
        return dense


def pad_columns(weights: torch.Tensor, packing: Packing, workspace: Workspace) -> torch.Tensor:
    """Return rows with their columns padded with zeros to whole groups."""
    rows, columns = weights.shape
    width = packing.columns_of(columns)
    if width == columns:
        return weights
    padded = workspace.tensor("padded", weights.dtype, rows, width)
    padded[:, :columns].copy_(weights)
    padded[:, columns:].zero_()
    return padded


def describe_bad_value(job: Job, first_row: int, groups: torch.Tensor, scales: torch.Tensor) -> str:
    """Name the first weight of a tile that is not finite, or too large for the scale's dtype."""
    info = job.tensor.source
    group_size = groups.shape[1]
    bad = int((~torch.isfinite(scales)).nonzero()[0])
    weights = groups[bad].double()
    place = int(torch.where(torch.isnan(weights), torch.inf, weights.abs()).argmax())
    value = float(weights[place])

    problem = "is not finite"
    if math.isfinite(value):
        largest = torch.finfo(scales.dtype).max * job.tensor.packing.code_max
        dtype = str(scales.dtype).removeprefix("torch.")
        problem = f"needs a scale beyond {dtype} (weights up to {largest:.6g})"
        if abs(value) <= largest:
            problem += ", since error feedback changes its group"
    row, group = divmod(bad, -(-job.columns // group_size))
    column = job.column + group * group_size + place
    where = f"row {job.row + first_row + row}, column {column}"
    advice = "mend the checkpoint, or keep this tensor as it is with --exclude"
    return f"tensor {info.name!r} ({info.file.name}), {where}: {value:.6g} {problem}: {advice}"


# ---- Conversion: what a job's bytes become is written at its planned place -----------------------


class OpenShards:
    """The shards of one run, and the jobs after whose last one each shard is finished."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, files: list[ShardFile]):
        self.files = files
        self._checkpoint = checkpoint
        self._plan = plan
        self._jobs: list[Job] = []
        self._unsynced = 0  # bytes of input since a sync was last due
        self._lock = threading.Lock()

    def of(self, tensor: TensorPlan) -> list[ShardFile]:
        """List the shards that hold what a tensor becomes."""
        numbers = {self._plan.placements[output.name].shard for output in tensor.outputs}
        return [self.files[number] for number in sorted(numbers)]

    def locate(self, run: Run) -> tuple[ShardFile, int]:
        """Return the shard in which bytes of an output lie, and where they begin in the file."""
        place = self._plan.placements[run.output.name]
        return self.files[place.shard], place.offset + run.offset

    def expect(self, tensors: list[TensorPlan], task: str) -> Account:
        """Cut these tensors into jobs, and count those of each shard."""
        for tensor in tensors:
            jobs = list(cut_into_jobs(tensor, self._plan.options.form))
            self._jobs += jobs
            for shard in self.of(tensor):
                shard.jobs_left += len(jobs)
        return Account(self._jobs, task)

    def run(
        self,
        handle: Callable[[Job, memoryview, Workspace], None],
        account: Account,
        threads: int,
        progress: Progress,
    ) -> None:
        """Do the jobs that are expected; returns when every shard has its final name."""

        def work(job: Job, data: memoryview, workspace: Workspace) -> None:
            progress.guard.check()
            handle(job, data, workspace)
            account.book(job)
            for shard in self._due_after(job):
                pipeline.in_background(self._sync, shard)

        pipeline = Pipeline(self._jobs, self._checkpoint, work)
        try:
            for shard in self.files:
                # Of empty tensors, or finished by an earlier run.
                if not shard.jobs_left:
                    self._sync(shard)
            pipeline.run(threads, lambda: progress.show(account))
            self._checkpoint.check_unchanged()
            self._checkpoint.drop_read()
        finally:
            for shard in self.files:
                shard.close()

    def _due_after(self, job: Job) -> list[ShardFile]:
        """Count a job as done; returns the shards that are now to be synced."""
        with self._lock:
            self._unsynced += job.nbytes
            sync_is_due = self._unsynced >= SYNC_BYTES
            if sync_is_due:
                self._unsynced = 0
            due = []
            for shard in self.of(job.tensor):
                shard.jobs_left -= 1
                if sync_is_due or not shard.jobs_left:
                    due.append(shard)
            return due

    def _sync(self, shard: ShardFile) -> None:
        """Sync a shard, and finish it when all its jobs are done."""
        if shard.jobs_left:
            shard.sync()
        elif shard.finished:
            shard.sync()
            shard.close()
        else:
            self._checkpoint.check_unchanged()
            shard.finish()


class Conversion:
    """One run that writes the shards of a plan which are not finished."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, files: list[ShardFile], task: str):
        self.shards = OpenShards(checkpoint, plan, files)
        self._maker = Restorer(checkpoint) if plan.options.restore else Packer(plan)
        tensors = []
        for tensor in plan.tensors:
            if not all(shard.finished for shard in self.shards.of(tensor)):
                tensors.append(tensor)
        self.account = self.shards.expect(tensors, task)

    def run(self, threads: int, progress: Progress) -> None:
        """Do all jobs; returns when every shard has its final name."""
        self.shards.run(self._write, self.account, threads, progress)

    def _write(self, job: Job, data: memoryview, workspace: Workspace) -> None:
        """Write what a job's bytes become."""
        for run in self._maker.runs(job, data, workspace):
            shard, offset = self.shards.locate(run)
            if not shard.finished:
                shard.write(run.data, offset)


# ---- Verification: the output as its readers see it, against the source --------------------------


@dataclass
class Measured:
    """What was added up of one weight: errors, and weights that lie far beyond their codes."""

    # Float64 (2, 2): of errors and of weights, the sums of their squares and of their outputs'.
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(2, 2, dtype=torch.float64))
    clipped: int = 0  # weights more than FAR_SCALES scales from what they decode to
    reach: float = 0.0  # the most scales of any of these
    first_wrong: int = -1  # place, row-major, of the first weight that no conversion can have made

    def add(self, other: Measured) -> None:
        """Add what was measured of another part of the weight."""
        self.squares += other.squares
        self.clipped += other.clipped
        self.reach = max(self.reach, other.reach)

    def agrees_with(self, other: Measured) -> bool:
        """Compare with what was measured otherwise; sums may be added up in another order."""
        exact = (self.clipped, self.reach, self.first_wrong)
        return exact == (other.clipped, other.reach, other.first_wrong) and torch.allclose(
            self.squares, other.squares, rtol=1e-4, equal_nan=True
        )

    def relative_errors(self, output_scale: float | None) -> list[float]:
        """Return the relative RMS errors of the weight and of its outputs.

        `output_scale` times the weight's square norm is that of its outputs, where the statistics
        know it; else it follows from the factor, which does not know all of the inputs."""
        errors, values = self.squares
        if output_scale:
            values = values[0] * torch.tensor([1.0, output_scale], dtype=torch.float64)
        return (errors / values.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().tolist()


@dataclass(frozen=True)
class OutputEnergy:
    """Second moments of a layer's inputs: diag(rest) + factor factor^T, float32.

    Both have LANES columns more than the weight, and the factor a multiple of LANES for its rank,
    all zeros."""

    rest: torch.Tensor
    factor: torch.Tensor

    @staticmethod
    def of(mean_squares: torch.Tensor, factor: torch.Tensor) -> OutputEnergy:
        """Split the diagonal, which is `mean_squares`, into the factor's part and the rest."""
        pad = torch.nn.functional.pad
        rest = mean_squares.double() - factor.double().square().sum(1)
        return OutputEnergy(
            pad(rest.clamp_min_(0).float(), (0, LANES)),
            pad(factor, (0, -factor.shape[1] % LANES, 0, LANES)),
        )

    def sum_of(self, rows: torch.Tensor) -> float:
        """Return the trace of R H R^T for rows R, float32 (rows, columns), and H of the inputs."""
        columns = rows.shape[1]
        own = rows.square().mul_(self.rest[:columns]).sum(dtype=torch.float64)
        products = rows @ self.factor[:columns]
        return float(own + products.square().sum(dtype=torch.float64))


@dataclass(frozen=True)
class Measuring:
    """How the errors of a weight are measured."""

    packing: Packing
    with_offset: bool
    moved: bool  # by error feedback
    energy: OutputEnergy | None = None
    kernel: Kernel | None = None
    first_column: int = 0  # of the part of each row that is measured

    @property
    def moved_from(self) -> int | None:
        """Return the first column of a part before which there may be errors that feedback carries
        on; None without feedback. A row's first group is rounded by a scale of its own weights."""
        if not self.moved:
            return None
        return 0 if self.first_column else self.packing.group_size

    def tolerance(self, scale_dtype: torch.dtype) -> float:
        """Return how many scales a weight may lie from its code, if that is inside the range."""
        rounded = self.packing.code_max * torch.finfo(scale_dtype).eps / 2
        return 0.5 + 1e-5 + rounded + self.moved * MAX_CHANGE

    def tiny(self, scale_dtype: torch.dtype) -> float:
        """Return how far a weight may lie from its code because the scale is subnormal."""
        finfo = torch.finfo(scale_dtype)
        return (self.packing.code_max + 1) * finfo.tiny * finfo.eps


def measure(
    weights: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    measuring: Measuring,
    workspace: Workspace,
) -> Measured:
    """Add up the errors of rows, and find the first weight that no conversion can have made.

    weights: (rows, columns)
    words, int32, and scales: (rows, ...), of columns padded to whole groups

    The rule holds for every input. A code inside the range lies within half a scale of its weight,
    or where error feedback moved the weight, within MAX_CHANGE scales more. A code at an end of the
    range has no bound on its side, since the search may clip any weight there. Where feedback moved
    all weights of a group so close to 0 that their scale is 0, codes are those of a scale of 1."""
    if measuring.kernel:
        return measure_with_kernel(weights, words, scales, measuring, workspace)

    packing = measuring.packing
    columns = weights.shape[1]
    weights = weights.float()
    codes = words.view(torch.uint8)
    if packing.bits == 4:
        # A byte holds the low nibble first.
        codes = torch.stack((codes % 16, codes // 16), -1).flatten(1)
    codes = codes[:, :columns].float()
    half = packing.code_max + 1
    codes -= half if measuring.with_offset else 2 * half * (codes >= half)
    steps = scales.float().repeat_interleave(packing.group_size, 1)[:, :columns]
    errors = weights - codes * steps
    wrong = find_wrong_codes(weights, codes, steps, measuring, scales.dtype)

    distances = (errors / steps).abs()
    far = (distances > FAR_SCALES) & (steps != 0)
    squares = []
    for values in (errors, weights):
        outputs = measuring.energy.sum_of(values) if measuring.energy else math.nan
        squares.append([float(values.square().sum(dtype=torch.float64)), outputs])
    measured = Measured(
        torch.tensor(squares, dtype=torch.float64),
        clipped=int(far.sum()),
        reach=float(torch.where(far, distances, 0).max()),
    )
    if len(wrong):
        measured.first_wrong = int(wrong[0])
    return measured


def find_wrong_codes(
    weights: torch.Tensor,
    codes: torch.Tensor,
    steps: torch.Tensor,
    measuring: Measuring,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """Return the places of the weights, counted row after row, whose codes no conversion can have
    made; int64 (places, 1). All three tensors are float32 (rows, columns)."""
    divisors = steps.clone()
    if measuring.moved_from is not None:
        moved = divisors[:, measuring.moved_from :]
        moved[moved == 0] = 1

    # Beyond is positive where the weight lies on the side of the larger codes.
    beyond = (weights - codes * divisors) * torch.where(divisors < 0, -1, 1)
    bound = divisors.abs() * measuring.tolerance(scale_dtype) + measuring.tiny(scale_dtype)
    code_max = measuring.packing.code_max
    right = (beyond <= bound) | (codes == code_max) & (divisors != 0)
    right &= (beyond >= -bound) | (codes == -code_max - 1) & (divisors != 0)
    right &= torch.isfinite(codes * steps)
    return (~right).flatten().nonzero()


def measure_with_kernel(
    weights: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    measuring: Measuring,
    workspace: Workspace,
) -> Measured:
    """Do what `measure` does."""
    rows, columns = weights.shape
    if weights.dtype != measuring.kernel.dtype:
        dtype = measuring.kernel.dtype
        weights = workspace.tensor("weights", dtype, rows, columns).copy_(weights)
    call = MeasureCall(
        weights=weights.data_ptr(),
        words=words.data_ptr(),
        scales=scales.data_ptr(),
        rows=rows,
        columns=columns,
        group_size=measuring.packing.group_size,
        code_bits=measuring.packing.bits,
        has_offset=measuring.with_offset,
        scale_bits_dropped=SCALE_BITS_DROPPED[scales.dtype],
        moved_from=columns if measuring.moved_from is None else measuring.moved_from,
        tolerance=measuring.tolerance(scales.dtype),
        tiny=measuring.tiny(scales.dtype),
        first_wrong=-1,
    )
    if measuring.energy:
        call.rest = measuring.energy.rest.data_ptr()
        call.factor = measuring.energy.factor.data_ptr()
        call.rank = measuring.energy.factor.shape[1]
    else:
        call.output_errors = call.output_weights = math.nan
    measuring.kernel.library.measure(ctypes.byref(call))
    squares = [
        [call.squared_errors, call.output_errors],
        [call.squared_weights, call.output_weights],
    ]
    return Measured(
        torch.tensor(squares, dtype=torch.float64), call.far, call.furthest, call.first_wrong
    )


class Verification:
    """Compares a finished folder with its source.

    Every byte is compared with what the source gives, and every weight, decoded by code that shares
    with the packing only where bytes lie, with the weight that it stands for. Problems are
    collected, not raised."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, folder: Path):
        self.folder = folder
        self.plan = plan
        self.errors: dict[str, list[float]] = {}  # by weight: relative, of it and of its outputs
        self.clipped: dict[str, Measured] = {}  # by weight, where some lie far from their codes
        # By weight: what its error is expected to lose, in nat a token.
        self.divergences: dict[str, float] = {}
        self.kept = 0  # tensors that are as in the source
        self.problems: list[str] = []
        # Without the statistics by which they were chosen, 4-bit codes are known within bounds.
        self.blind = bool(plan.options.importance) and plan.statistics is None

        self._packer = Packer(plan)
        self._kernels = kernels_for(plan, "measure")
        self._energy_of = functools.lru_cache(KEPT_ROUNDINGS)(self._find_energy)
        self._measured: dict[str, Measured] = {}  # by tensor
        # By weight: see `Measured.relative_errors`.
        self._output_scales: dict[str, float] = {}
        self._wrong: dict[str, WrongRow] = {}  # by tensor: the first one
        self._lock = threading.Lock()

        files = [ShardFile(folder, shard, plan.fingerprint, finished=True) for shard in plan.shards]
        self._shards = OpenShards(checkpoint, plan, files)
        sound = self._check_files()
        self._tensors: list[TensorPlan] = []
        for tensor in plan.tensors:
            if all(shard in sound for shard in self._shards.of(tensor)):
                self._tensors.append(tensor)
        self.account = self._shards.expect(self._tensors, "verifying")

    def _check_files(self) -> list[ShardFile]:
        """Check all that is in the folder but the tensors' bytes; returns the shards that hold the
        planned tensors at their places."""
        names = {path.name for path in self.folder.iterdir()}
        for name in sorted(names - {shard.name for shard in self.plan.shards}):
            if name.endswith(".safetensors"):
                self.problems.append(f"{name} is none of the shards")

        if read_facts(self.folder)["dtypes"] != self.plan.facts["dtypes"]:
            problem = "the dtypes to which --restore would go back are not the source's"
            self.problems.append(f"{problem}: what the shards say of them is damaged")

        # The other files, as they were written by what the shards say.
        hashes = {INDEX_NAME: self.plan.hashes[INDEX_NAME]}
        sound = []
        for shard in self._shards.files:
            problem = check_shard(shard)
            if problem:
                self.problems.append(f"{shard.final.name}: {problem}")
            else:
                sound.append(shard)
            metadata = read_metadata(shard.path)
            hashes |= files_of_run(metadata)
            if not are_marks_whole(metadata):
                problem = "what it says of its format and of the run that made it is damaged"
                self.problems.append(f"{shard.final.name}: {problem}")

        for name in hashes.keys() - names:
            self.problems.append(f"{name} is missing")
        for name in sorted(hashes.keys() & names):
            if hash_file(self.folder / name) != hashes[name]:
                self.problems.append(f"{name} is not as it was written")
        return sound

    def run(self, threads: int, progress: Progress) -> None:
        """Compare every tensor.

        Errors of outputs, products with inputs of the statistics, are sqrt(tr(E H E^T) /
        tr(W H W^T)), NaN without these."""
        self._shards.run(self._compare, self.account, threads, progress)
        for tensor in self._tensors:
            name = tensor.source.name
            if name in self._wrong:
                self.problems.append(f"{name!r}: {self._wrong[name].problem}")
            elif name in self._measured:
                measured = self._measured[name]
                self.errors[name] = measured.relative_errors(self._output_scales.get(name))
                self._expect_divergence(tensor.source)
                if measured.clipped:
                    self.clipped[name] = measured
            else:
                self.kept += 1

    @property
    def divergence(self) -> float:
        """What all errors are expected to lose, in nat a token."""
        return math.fsum(self.divergences.values())

    def _expect_divergence(self, info: TensorInfo) -> None:
        """Note what a weight's error is expected to lose, if the statistics tell."""
        cost = self.plan.statistics.cost_of(info) if self.plan.statistics else None
        if cost is not None:
            _, of_outputs = self.errors[info.name]
            self.divergences[info.name] = cost * of_outputs**2 if cost else 0.0

    def _compare(self, job: Job, data: memoryview, workspace: Workspace) -> None:
        """Compare what a job's bytes become with what is there, and measure its errors."""
        problem = ""
        for run in self._packer.runs(job, data, workspace):
            shard, offset = self._shards.locate(run)
            found = workspace.buffer("found", len(run.data))
            shard.read(found, offset)
            first = first_difference(found, run.data)
            if first is None:
                continue

            chosen = job.tensor.packing and not run.output.content
            if not (chosen and self.blind and job.tensor.packing.bits == 4):
                problem = describe_difference(run, first)
            if chosen:
                # What is decoded is what is there.
                run.data[:] = found

        if job.tensor.packing:
            problem = self._measure(job, data, workspace) or problem
        if problem:
            name = job.tensor.source.name
            wrong = WrongRow(job.row, problem)
            with self._lock:
                self._wrong[name] = min(wrong, self._wrong.get(name, wrong))

    def _measure(self, job: Job, data: memoryview, workspace: Workspace) -> str:
        """Add up a job's errors; describe the first weight that no conversion can have made."""
        info = job.tensor.source
        block = torch.frombuffer(data, dtype=FLOAT_DTYPES[info.dtype]).view(job.rows, job.columns)
        words, scales = self._packer.results(job, workspace)
        measuring = Measuring(
            job.tensor.packing,
            job.tensor.recipe.with_offset,
            # The recipe does not tell where the statistics are not given again.
            moved=job.tensor.packing.bits == 4 and FEEDBACK in self.plan.options.rule,
            energy=self._energy_of(info),
            kernel=self._kernels.get(job.tensor.recipe.measured_by),
            first_column=job.column,
        )
        measured = Measured()
        wrong = -1
        step = max(1, (TILE_WEIGHTS if measuring.kernel else VERIFY_WEIGHTS) // job.columns)
        for first in range(0, job.rows, step):
            check_signals()
            tile = slice(first, first + step)
            rows = (block[tile], words[tile].contiguous(), scales[tile].contiguous())
            of_tile = measure(*rows, measuring, workspace)
            measured.add(of_tile)
            if wrong < 0 <= of_tile.first_wrong:
                wrong = first * job.columns + of_tile.first_wrong
        with self._lock:
            self._measured.setdefault(info.name, Measured()).add(measured)

        if wrong < 0:
            return ""
        row, column = divmod(wrong, job.columns)
        own = slice(row, row + 1)
        decoded = dequantize(
            words[own].contiguous(), scales[own], measuring.packing, measuring.with_offset
        )
        scale = scales[row, column // measuring.packing.group_size]
        return (
            f"row {job.row + row}, column {job.column + column} decodes to"
            f" {float(decoded[0, column]):.6g}, the source has {float(block[row, column]):.6g},"
            f" too far for a scale of {float(abs(scale)):.6g}"
        )

    def _find_energy(self, info: TensorInfo) -> OutputEnergy | None:
        """Prepare the statistics of a weight, if there are some."""
        given = self.plan.statistics.get(info) if self.plan.statistics else None
        if not given:
            return None
        mean_squares, factor = given
        gain = self.plan.statistics.gain_of(info)
        if gain:
            self._output_scales[info.name] = gain * float(mean_squares.double().mean())
        return OutputEnergy.of(mean_squares, factor)


@dataclass(frozen=True, order=True)
class WrongRow:
    """A row of a tensor that is not what the source gives. Rows are ordered by their number."""

    row: int
    problem: str


def check_shard(shard: ShardFile) -> str:
    """Check that the library opens a shard, and that it holds the planned tensors at their places.

    Returns what is wrong, or nothing."""
    try:
        # The page cache is asked about the file before it is read.
        shard.read(memoryview(bytearray()), 0)
        # Not held open: pages that the library maps cannot be dropped from the cache.
        with safe_open(shard.path, framework="pt"):
            found, start = read_header(shard.path)
    except (FileNotFoundError, IsADirectoryError) as error:
        return f"cannot be opened ({error})"
    except (SafetensorError, RuntimeError, ValueError) as error:
        if is_lack_of_memory(error):
            raise
        return f"cannot be opened ({error})"
    finally:
        # There may be more shards than descriptors.
        shard.close()

    planned = json.loads(shard.plan.header[8:])
    shard.shift = start - len(shard.plan.header)
    for header in (found, planned):
        header.pop("__metadata__", None)
    differing = found.keys() ^ planned.keys()
    if not differing:
        differing = {name for name in found if found[name] != planned[name]}
    if differing:
        return f"{quote_names(sorted(differing))} differ from what the source gives"
    return ""


def describe_difference(run: Run, first: int) -> str:
    """Name the element of an output tensor in which a byte of a run differs."""
    element = (run.offset + first) * 8 // DTYPE_BITS[run.output.dtype]
    index = torch.unravel_index(torch.tensor(element), run.output.shape)
    return (
        f"{run.output.name}{[int(number) for number in index]} differs from what the source gives"
    )


# ---- Results: progress, and what was done and found ----------------------------------------------

# By whether standard output is a terminal.
PROGRESS_INTERVAL_S = {True: 0.5, False: 10.0}


class Progress:
    """Shows how far the work is: one updating line on a terminal, else a line every ten seconds."""

    def __init__(self, guard: MemoryGuard):
        self.guard = guard
        # The machine's memory and its page cache at each stage, by name.
        self.stages: dict[str, tuple[MemoryReading, int]] = {}
        self.mark("Baseline")
        self.restart()

    def restart(self) -> None:
        """Count time from here."""
        self.started = time.monotonic()
        self._next = self.started
        # A terminal's line is replaced by the next one, and so may come at once.
        if not is_terminal(sys.stdout):
            self._next += PROGRESS_INTERVAL_S[False]

    def mark(self, stage: str) -> None:
        """Note the memory at a stage, for the table of --debug."""
        self.stages[stage] = (self.guard.read(), cached_bytes())

    def show(self, account: Account) -> None:
        """Print how far the work is if the last line is old enough; note the memory half-way."""
        if "Half-way" not in self.stages and account.nbytes_done * 2 >= account.nbytes:
            self.mark("Half-way")

        now = time.monotonic()
        if now < self._next:
            return
        on_terminal = is_terminal(sys.stdout)
        self._next = now + PROGRESS_INTERVAL_S[on_terminal]

        parts = self._describe(account, now - self.started)
        while len("  ".join(parts)) >= terminal_width():
            parts.pop()
        if on_terminal:
            say("  ".join(parts), before=CLEAR_LINE, end="")
        else:
            say("  ".join(parts))

    def _describe(self, account: Account, elapsed: float) -> list[str]:
        """Return the parts of the line, the most important first."""
        tensors = count_of(account.tensors, "tensor")
        if account.nbytes_done == account.nbytes:
            return [f"{account.task}: {tensors} done, waiting for the disk"]

        share = account.effort_done / account.effort
        done = account.nbytes_done
        memory = self.guard.read()
        return [
            # Not 100 % before all is done.
            f"{account.task}  {min(int(share * 100), 99)}%",
            *describe_time_left(elapsed, share),
            f"{format_bytes(done)} of {format_bytes(account.nbytes)}",
            f"{format_bytes(done / max(elapsed, 1e-9))}/s",
            f"{account.tensors_done:,}/{tensors}",
            f"RAM {format_bytes(memory.used)} used, {format_bytes(memory.available)} available",
        ]


def cached_bytes() -> int:
    """Return how many bytes of files the page cache holds; 0 where the system does not tell."""
    return getattr(psutil.virtual_memory(), "cached", 0)


def describe_time_left(elapsed: float, share: float) -> list[str]:
    """Return how long the rest takes, as a part of a line of progress; none while it is a guess."""
    if elapsed < 2 or not 0.05 <= share < 1:
        return []
    left = math.ceil(elapsed / share * (1 - share) / 5) * 5
    return [f"about {format_time_left(left)} left"]


def format_time_left(seconds: float) -> str:
    """Return a time in the largest unit that is no guess: 25 s, 12 min, 2 h."""
    if seconds >= 5400:
        return f"{seconds / 3600:,.0f} h"
    if seconds > 90:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds:,.0f} s"


def print_summary(plan: Plan, account: Account, progress: Progress) -> None:
    """Print how long it took, what it made and how much memory it used."""
    seconds = time.monotonic() - progress.started
    rate = format_bytes(account.nbytes / max(seconds, 1e-9))
    say(f"Done in {format_seconds(seconds)}, {rate}/s")

    before = size_of(plan.tensors)
    packed = sum(tensor.packing is not None for tensor in plan.tensors)
    verb = "restored"
    smaller = ""
    if not plan.options.restore:
        verb = "quantized"
        smaller = f" ({three_digits(before / max(plan.total_size, 1))} times smaller)"
    result = f"{format_bytes(before)} became {format_bytes(plan.total_size)}{smaller}"
    result += f"; {count_of(packed, 'tensor')} {verb}"
    if packed < len(plan.tensors):
        result += f", {len(plan.tensors) - packed:,} kept"
    say_paragraph("Result:", result)

    peak = format_bytes(progress.guard.own_peak)
    say_paragraph("Memory:", f"{peak} at the peak of this process")
    if shares_memory_with_gpu():
        free = format_bytes(psutil.virtual_memory().free)
        say_paragraph(
            "GPU:",
            f"shares this memory; its programs see {free} free now, the page cache not counted",
        )


def print_stages(progress: Progress) -> None:
    """Print the machine's memory at each stage."""
    titles = f"{'RAM used':>12}{'Available':>12}{'Page cache':>12}"
    say(f"{'All programs':<34}{titles}", before="\n")
    for stage, (memory, cached) in progress.stages.items():
        sizes = (memory.used, memory.available, cached)
        say(f"{stage:<34}" + "".join(f"{format_bytes(size):>12}" for size in sizes))


def print_next_steps(plan: Plan, folder: Path, verified: bool) -> None:
    """Print what can be done with the finished folder."""
    say()
    say_paragraph("Next, in", f"{folder.resolve().parent}:")
    name = folder.resolve().name
    copy = "rsync -a --partial {name} HOST:"
    steps = dict(plan.options.form.next_steps)
    if plan.options.restore:
        steps = {"Try": LOAD_STEP}
    elif verified:
        steps["Copy"] = copy
    else:
        steps["Check"] = f"the same command with --verify; then copy it: {copy}"
    if plan.fails_in_transformers:
        engine = ENGINES["transformers"]
        steps[engine.verb] = f"not with {engine.label}, which {plan.fails_in_transformers}"

    for label, text in steps.items():
        text = text.replace("{loader}", plan.loader)
        text = text.replace("{load_options}", plan.load_options)
        text = text.replace("{dtype}", plan.serving_dtype)
        text = text.replace("{path}", repr(name))
        text = text.replace("{name}", shlex.quote(name))
        say_paragraph(f"  {label}:", text, is_command=True)


def print_verification(verification: Verification) -> None:
    """Print errors by kind of layer, the worst weights by name, and what is wrong."""
    say()
    print_errors(verification)
    if verification.kept:
        say(f"  {'kept, bit for bit':<22}{verification.kept:>7,}")
    errors = verification.errors
    for name in sorted(errors, key=lambda name: errors[name][0], reverse=True)[:5]:
        error = three_digits(errors[name][0])
        say(f"  worst: {error}  {shorten(name, terminal_width() - 18)}")
    print_unusual(verification)
    if verification.divergences:
        print_divergence(verification)
    if verification.clipped:
        print_clipped(verification.clipped)
    if verification.blind:
        print_bounds(verification.plan.options.rule)

    for problem in verification.problems[:20]:
        say_paragraph("WRONG:", problem)
    if not verification.problems:
        folder = shorten(str(verification.folder), terminal_width() - 40)
        say(f"  {folder}: verified, no problems found.")


def print_errors(verification: Verification) -> None:
    """Print the table of relative errors, a row for each kind of layer."""
    titles = f"{'Verified':<24}{'weights':>7}{'relative RMS error':>23}"
    columns = f"{'':<31}{'min':>8}{'median':>8}{'max':>8}"
    if verification.plan.statistics is not None:
        titles += f"{'of their outputs':>20}"
        columns += f"{'median':>12}{'max':>8}"
    say(titles)
    say(columns)

    errors_by_kind = by_kind(verification.plan, verification.errors)
    for kind in sorted(errors_by_kind):
        print_errors_of_kind(kind, errors_by_kind[kind])


def by_kind(plan: Plan, values: Mapping[str, object]) -> dict[str, list]:
    """List what was found of weights by the kinds of their layers and their bits."""
    grouped: dict[str, list] = {}
    for tensor in plan.tensors:
        name = tensor.source.name
        if name in values:
            kind = tensor.kind
            if tensor.packing.bits == 8:
                kind += ", 8 bits"
            grouped.setdefault(kind, []).append(values[name])
    return grouped


def print_errors_of_kind(kind: str, errors: list[list[float]]) -> None:
    """Print a row of the table of errors. `errors` are pairs: of a weight, and of its outputs.

    They are NaN where they are not known."""
    of_weights = [pair[0] for pair in errors if not math.isnan(pair[0])]
    of_outputs = [pair[1] for pair in errors if not math.isnan(pair[1])]
    line = f"  {shorten(kind, 22):<22}{len(of_weights):>7,}"
    for summarize in (min, statistics.median, max):
        line += f"{three_digits(summarize(of_weights or [math.nan])):>8}"
    if of_outputs:
        median = three_digits(statistics.median(of_outputs))
        line += f"{median:>12}{three_digits(max(of_outputs)):>8}"
    say(line)


def print_unusual(verification: Verification) -> None:
    """Print up to what errors are usual, and name the weights whose errors are larger."""
    limits = {}
    unusual = []
    for tensor in verification.plan.tensors:
        error, _ = verification.errors.get(tensor.source.name, (math.nan, math.nan))
        limit = tensor.packing and largest_usual_error(tensor.packing, verification.plan.options)
        if not limit or math.isnan(error):
            continue
        limits[tensor.packing] = limit
        if error > limit:
            unusual.append(tensor.source.name)

    places = []
    for packing in sorted(limits, key=lambda packing: (packing.bits, packing.group_size)):
        place = "in 8 bits" if packing.bits == 8 else f"in groups of {packing.group_size}"
        places.append(f"{three_digits(limits[packing])} {place}")
    if unusual:
        label = "  unusual:"
        verb = "has" if len(unusual) == 1 else "have"
        found = f"{count_of(len(unusual), 'weight')} {verb} more: {quote_names(unusual)}"
    else:
        label = "  usual:"
        found = "no weight has more"
    if places:
        say_paragraph(label, f"errors are up to {list_in_words(dict.fromkeys(places))}; {found}")


def print_divergence(verification: Verification) -> None:
    """Print the divergence that is expected, by kind of layer, and the weights that cost most."""
    divergences = verification.divergences
    total = verification.divergence
    say(f"Expected divergence{three_digits(total):>14} nat a token", before="\n")
    sums = {
        kind: math.fsum(of_kind)
        for kind, of_kind in by_kind(verification.plan, divergences).items()
    }
    for kind in sorted(sums, key=sums.get, reverse=True):
        share = sums[kind] / (total or 1)
        say(f"  {shorten(kind, 22):<22}{three_digits(sums[kind]):>9}{share:>7.0%}")
    for name in sorted(divergences, key=divergences.get, reverse=True)[:5]:
        name_shown = shorten(name, terminal_width() - 20)
        say(f"  costliest: {three_digits(divergences[name])}  {name_shown}")

    without = len(verification.errors.keys() - divergences)
    if without:
        say(f"  not counted: {count_of(without, 'weight')} without a cost in the file")


def print_bounds(rule: str) -> None:
    """Print how closely codes are checked without the statistics that they were chosen by."""
    reach = 0.5
    if FEEDBACK in rule:
        reach += MAX_CHANGE
    use = rule.partition(" ")[2]
    say_paragraph(
        "Note:",
        f"4-bit codes {use} are checked only within bounds: a code inside the range must lie"
        f" within {reach} scales of its weight, and one at an end of the range on its weight's"
        " side; with the --importance file that they were made with, each is checked exactly",
    )


def print_errors_of_weights(verification: Verification) -> None:
    """Print a line for each quantized weight, separated by tabs. What is not known is empty."""
    titles = (
        "name",
        "kind",
        "bits",
        "relative_error",
        "relative_output_error",
        "share_of_divergence",
    )
    say(before="\t".join(titles))
    total = verification.divergence
    for tensor in verification.plan.tensors:
        name = tensor.source.name
        if name not in verification.errors:
            continue
        share = math.nan
        if total and name in verification.divergences:
            share = verification.divergences[name] / total
        cells = [printable(name), tensor.kind, str(tensor.packing.bits)]
        for number in (*verification.errors[name], share):
            cells.append("" if math.isnan(number) else f"{number:.6g}")
        say(before="\t".join(cells))


def print_clipped(clipped: dict[str, Measured]) -> None:
    """Print how many weights were clipped, and name the tensor of the one that lies farthest."""
    count = sum(measured.clipped for measured in clipped.values())
    farthest = max(clipped, key=lambda name: clipped[name].reach)
    reach = three_digits(clipped[farthest].reach)
    verb = "lies" if count == 1 else "lie"
    say_paragraph(
        "  clipped:",
        f"{count_of(count, 'weight')} {verb} more than {FAR_SCALES} scales from what is decoded, up"
        f" to {reach} in {farthest}",
    )


# ---- Command: what is done, in which order -------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Do what is asked for; every error is raised."""
    guard = MemoryGuard(int(args.min_free_gb * GB))
    progress = Progress(guard)
    args.threads = args.threads or usable_cores()
    check_folders(args)
    # Of a folder that is finished, --verify writes nothing.
    is_finished = (args.output_dir / INDEX_NAME).exists()
    only_verify = args.verify and is_finished and not args.overwrite and not args.dry_run
    if args.list and not only_verify and not args.dry_run:
        state = "would be replaced" if is_finished else "is not finished"
        raise QuantizeError(
            f"{args.output_dir} {state}, and --verify --list is for a finished folder: convert"
            " without --list first"
        )
    folders = (args.input_dir, args.config_dir, args.mtp_from)
    with (
        contextlib.closing(Checkpoint(*folders)) as checkpoint,
        opened_statistics(args, only_verify) as statistics,
    ):
        plan = plan_as_asked(args, checkpoint, only_verify, statistics)
        if args.list and args.dry_run:
            print_list(plan)
            return
        if only_verify:
            verify(args, checkpoint, plan, progress)
            return

        converted = print_and_convert(args, checkpoint, plan, progress)
        if converted and args.debug:
            print_stages(progress)
        if converted and args.verify:
            verify(args, checkpoint, plan, progress)
    if converted:
        print_next_steps(plan, args.output_dir, args.verify)


def check_folders(args: argparse.Namespace) -> None:
    """Refuse to write into a folder that is read."""
    output = args.output_dir.resolve()
    for folder in (args.input_dir, args.config_dir, args.mtp_from):
        if folder and output.is_relative_to(folder.resolve()):
            place = "is" if output == folder.resolve() else "is inside"
            raise QuantizeError(
                f"output folder {args.output_dir} {place} the input folder {folder}: choose another"
            )


@contextlib.contextmanager
def opened_statistics(args: argparse.Namespace, finished: bool) -> Iterator[Importance | None]:
    """Open the file of --importance, if one is given, and leave the page cache as it was."""
    if not args.importance:
        yield None
        return
    if scale_rule(args) != "mse" and not finished:
        raise QuantizeError(
            "--importance needs --scale mse, which is the default of --format compressed-tensors",
            2,
        )
    with contextlib.closing(Importance(args.importance)) as statistics:
        yield statistics


def plan_as_asked(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    finished: bool,
    statistics: Importance | None = None,
) -> Plan:
    """Plan what the arguments ask for.

    Where a folder is restored, or is finished and only verified, its shards say how it was made."""
    if args.restore:
        return plan_restoration_as_asked(args, checkpoint)

    if args.max_size_gb and not args.importance and not finished:
        raise QuantizeError(
            "--max_size_gb needs --importance with a file of collect_statistics, whose costs tell"
            " where 8 bits save most",
            2,
        )
    asked = {name: getattr(args, name, None) for name in Options.__annotations__}
    if statistics:
        use = FEEDBACK if statistics.largest_factor else WEIGHED
        asked["importance"] = f"{use} {hash_file(statistics.path)}"

    if finished:
        options = options_of_finished(args.output_dir, asked, checkpoint)
    else:
        asked["format"] = args.format or "int4"
        asked["scale"] = scale_rule(args)
        asked["shard_size_gb"] = args.shard_size_gb or DEFAULT_SHARD_SIZE_GB
        options = Options(**asked)
    return plan_conversion(checkpoint, options, statistics)


def plan_restoration_as_asked(args: argparse.Namespace, checkpoint: Checkpoint) -> Plan:
    """Plan what a quantized folder decodes to."""
    facts = read_facts(args.input_dir)
    options = facts["options"]
    if options["restore"]:
        raise QuantizeError(f"{args.input_dir} is restored already: nothing in it is packed")
    options["importance"] = options["max_size_gb"] = options["chosen"] = None
    options["restore"] = True
    options["shard_size_gb"] = args.shard_size_gb or DEFAULT_SHARD_SIZE_GB
    return plan_restoration(checkpoint, Options(**options), facts["dtypes"])


def options_of_finished(folder: Path, asked: dict, checkpoint: Checkpoint) -> Options:
    """Return the options that a finished folder was made with.

    It is an error if the options that are given, or the checkpoint, are others."""
    made = read_facts(folder)
    if made["options"]["restore"]:
        raise QuantizeError(
            f"{folder} holds a restored checkpoint, and --verify is for what it was restored from"
        )

    given = {name: value for name, value in asked.items() if value}
    options = made["options"] | given
    now = {"version": FORMAT_VERSION, "options": options, "sources": checkpoint.sources}
    differences = what_differs(made, now)
    if differences:
        raise QuantizeError(
            f"{folder} was made differently: {differences}: verify it with the checkpoint, the"
            " options and the version that it was made with"
        )
    return Options(**options)


def print_and_convert(
    args: argparse.Namespace, checkpoint: Checkpoint, plan: Plan, progress: Progress
) -> bool:
    """Print the plan and write the output folder; returns whether there was something to do."""
    with contextlib.closing(OutputFolder(args.output_dir, plan, args.overwrite)) as output:
        progress.mark("Headers read")
        denial = output.why_unwritable()
        if denial and not args.dry_run:
            raise QuantizeError(f"output folder {output.folder}: {denial}")
        print_plan(plan, checkpoint, output, progress.guard, args.threads)

        if args.dry_run:
            problems = [denial]
            if not output.nothing_to_write:
                needed = buffer_bytes(plan, args.threads)
                problems += [output.lack_of_room(), progress.guard.shortage(needed)]
            for problem in filter(None, problems):
                say_paragraph("WARNING:", f"the run itself would stop: {problem}")
            say("Dry run: nothing was written.")
            return False
        if output.nothing_to_write:
            text = f"{shorten(str(args.output_dir), terminal_width() - 25)} is complete already."
            if not args.restore:
                text += " It was not compared with the source; --verify does that."
            say_paragraph("Finished:", text)
            return False

        convert(checkpoint, plan, output, progress, args.threads)
        return True


def convert(
    checkpoint: Checkpoint, plan: Plan, output: OutputFolder, progress: Progress, threads: int
) -> None:
    """Write the planned output folder."""
    problem = own_output_copied(plan) or output.lack_of_room()
    if problem:
        raise QuantizeError(problem)
    progress.guard.check()

    shards = []
    for shard in plan.shards:
        finished = shard.name in output.finished
        shards.append(ShardFile(output.folder, shard, plan.fingerprint, finished, output.make_way))
    task = "restoring" if plan.options.restore else "quantizing"
    conversion = Conversion(checkpoint, plan, shards, task)

    say()
    output.prepare()
    progress.restart()
    with deferring_signals():
        write_output(checkpoint, plan, conversion, output, threads, progress)

    progress.mark("Written")
    print_summary(plan, conversion.account, progress)


def own_output_copied(plan: Plan) -> str:
    """Describe a file that would be copied and takes what this run prints, so that it changes
    before it is copied. Empty if there is none."""
    for path in plan.other_files.values():
        for fd in (1, 2):
            with contextlib.suppress(OSError):
                if isinstance(path, Path) and os.path.samestat(path.stat(), os.fstat(fd)):
                    return (
                        f"{path} takes what this run prints, and would be copied: remove it, and"
                        " print into a file outside of the input folder"
                    )
    return ""


def write_output(
    checkpoint: Checkpoint,
    plan: Plan,
    conversion: Conversion,
    output: OutputFolder,
    threads: int,
    progress: Progress,
) -> None:
    """Write all files.

    An error says how much of the folder is kept, and nothing half-written stays."""
    try:
        with converting_memory_errors():
            conversion.run(threads, progress)
            if plan.statistics:
                plan.statistics.check_unchanged()
            output.check_other_files(checkpoint)
            output.write_other_files()
    except (QuantizeError, Stopped) as stop:
        if stop.exit_code == 3 or stop.exit_code > 128:
            kept = describe_kept(output, conversion.shards.files)
            stop.args = (f"{stop}; {kept}",)
        raise
    finally:
        clear_line()
        # The files of this run that stopped half-way. The error that stopped it is the one to
        # report.
        for path in output.folder.glob(f"*.{plan.fingerprint[:12]}.unfinished"):
            with contextlib.suppress(OSError):
                path.unlink()


def describe_kept(output: OutputFolder, shards: list[ShardFile]) -> str:
    """Describe what a run that was stopped leaves, and which command continues it."""
    if output.overwrite and output.is_as_it_was:
        return f"nothing was written, and {output.folder} is as it was"

    count = sum(shard.finished for shard in shards)
    verb = "is" if count == 1 else "are"
    how = " without --overwrite" if output.overwrite else ""
    return (
        f"{count:,} of {count_of(len(shards), 'shard')} {verb} finished and kept, the same"
        f" command{how} continues"
    )


def verify(
    args: argparse.Namespace, checkpoint: Checkpoint, plan: Plan, progress: Progress
) -> None:
    """Compare a finished folder with its source, and print what was found.

    With --list the cells alone are standard output's; all else is standard error's."""
    elsewhere = contextlib.redirect_stdout(sys.stderr) if args.list else contextlib.nullcontext()
    with elsewhere:
        say()
        say_paragraph(
            "Verifying",
            f"{args.output_dir} by decoding every weight and comparing it with {checkpoint.folder}",
        )
        verification = Verification(checkpoint, plan, args.output_dir)
        progress.restart()
        try:
            verification.run(args.threads, progress)
        finally:
            clear_line()
        print_verification(verification)
    if args.list:
        print_errors_of_weights(verification)

    if verification.problems:
        count = count_of(len(verification.problems), "problem")
        remedy = "convert again into another folder"
        if read_facts(args.output_dir)["sources"] != checkpoint.sources:
            remedy = (
                f"if it was made from {checkpoint.folder}, where file times have changed since,"
                f" {remedy}"
            )
        raise QuantizeError(
            f"verification of {args.output_dir} found {count}, listed above: {remedy}"
        )


def main(argv: list[str] | None = None) -> int:
    """Run with these arguments, or those of the command line, and return the exit code."""
    args = ARGUMENTS or parse_args(sys.argv[1:] if argv is None else argv)
    set_up_process()
    # Erase "loading torch".
    clear_line()
    try:
        with stop_on_signals(), converting_memory_errors():
            try:
                run(args)
            finally:
                end_compilations()
        return 0
    except (Exception, Stopped) as error:
        if args.debug:
            traceback.print_exc()
        print_error(describe_error(error))
        return getattr(error, "exit_code", 1)


def set_up_process() -> None:
    """Set what holds for the whole process: threads of torch, open files, names, garbage."""
    # The workers are the parallelism.
    torch.set_num_threads(1)
    # There may be many shards, each an open file.
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    # Names of files and tensors need not be in the encoding of standard output.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    # To search what the imports made for garbage takes 55 ms, during which no worker gets on.
    gc.freeze()


def describe_error(error: BaseException) -> str:
    """Describe an error in one line."""
    if isinstance(error, (QuantizeError, Stopped)):
        return str(error)
    if isinstance(error, OSError):
        return describe_os_error(error)
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)"


def print_error(message: str) -> None:
    """Print an error to standard error, which may be closed or full."""
    # A name in a damaged header may be as long as the header.
    message = printable(message[:2000])
    with contextlib.suppress(OSError):
        print(ERROR + message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
