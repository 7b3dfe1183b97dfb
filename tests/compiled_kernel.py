"""Imported by the launcher's server: does once, for all runs that it forks, what each would begin with."""

import contextlib
import gc
import io
import itertools
import tempfile
from pathlib import Path

import torch
from checkpoints import WEIGHT, write_checkpoint

import quantize_int4

VARIANTS = {"quantize": ("ABSMAX", "SEARCH", "FEEDBACK"), "measure": ("ERRORS", "OUTPUTS")}

torch.set_num_threads(1)  # a pool of threads would not survive the fork
for task, variants in VARIANTS.items():
    kinds = itertools.starmap(
        quantize_int4.KernelKind, itertools.product([task], ["BF16", "F16", "F32"], variants)
    )
    with contextlib.suppress(quantize_int4.NoKernel):
        quantize_int4.compile_kernels(task, set(kinds))

# One run, for the expressions that it compiles and the modules that it imports.
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    write_checkpoint(Path(folder, "in"), WEIGHT)
    arguments = [f"{folder}/in", f"{folder}/out", "--min_free_gb", "0"]
    assert quantize_int4.main(arguments) == 0

gc.freeze()  # so that no run searches what torch holds for garbage, and copies it by that
