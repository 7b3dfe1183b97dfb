"""Starts the command in a fresh process, as a shell would, without paying for the import of torch every time: a server
imports the script once and forks for each run."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

TESTS = Path(__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["quantize_int4"])
os.environ["PYTHONPATH"] = f"{TESTS.parent}{os.pathsep}{TESTS}"  # where the server finds the script


def launch(arguments: list[str], stdout, stderr, constants: dict[str, object], umask: int) -> int:
    """Run the command to its end with its output in the two files; returns the exit code."""
    with open(os.devnull) as nothing:
        files = [multiprocessing.reduction.DupFd(file.fileno()) for file in (nothing, stdout, stderr)]
        process = CONTEXT.Process(target=_run_main, args=(arguments, files, constants, umask))
        process.start()
    process.join()
    return process.exitcode


def _run_main(arguments: list[str], files: list, constants: dict[str, object], umask: int) -> None:
    import quantize_int4

    for number, file in enumerate(files):
        os.dup2(file.detach(), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.umask(umask)
    for name, value in constants.items():
        setattr(quantize_int4, name, value)
    sys.exit(quantize_int4.main(arguments))
