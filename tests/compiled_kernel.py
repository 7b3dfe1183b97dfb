"""Imported by the launcher's server: compiles the kernels once, for all runs that it forks."""

import contextlib

import torch

import quantize_int4

torch.set_num_threads(1)  # a pool of threads would not survive the fork
with contextlib.suppress(quantize_int4.QuantizeError):
    quantize_int4.compile_kernel(False), quantize_int4.compile_kernel(True)
