"""Imported by the launcher's server: compiles the kernels once, for all runs that it forks."""

import contextlib
import itertools

import torch

import quantize_int4

VARIANTS = {"quantize": ("ABSMAX", "SEARCH", "FEEDBACK"), "measure": ("ERRORS", "OUTPUTS")}

torch.set_num_threads(1)  # a pool of threads would not survive the fork
for task, variants in VARIANTS.items():
    kinds = itertools.starmap(
        quantize_int4.KernelKind, itertools.product([task], ["BF16", "F16", "F32"], variants)
    )
    with contextlib.suppress(quantize_int4.NoKernel):
        quantize_int4.compile_kernels(task, set(kinds))
