"""Starts the command in a fresh process, as a shell would, without paying for the import of torch every time: a server
imports the script, compiles its kernels and runs it once, and forks for each run."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import termios
from dataclasses import dataclass, field
from multiprocessing.reduction import DupFd
from pathlib import Path

TESTS = Path(__file__).parent
WIDE = "1000"  # columns, for which nothing is wrapped
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["quantize_int4", "compiled_kernel"])
OF_THE_COMPILER = {"ATEN_CPU_CAPABILITY", "CC", "PATH"}  # variables by which kernels differ
os.environ["PYTHONPATH"] = f"{TESTS.parent}{os.pathsep}{TESTS}"  # where the server finds the script


@dataclass(frozen=True)
class Setting:
    """What a run finds around it. `constants` replaces constants of the script: sizes and intervals that a short run
    would not reach."""

    constants: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    umask: int = 0o022
    user: int | None = None
    largest_file: int | None = None  # bytes, as `ulimit -f`
    open_files: int | None = None  # as `ulimit -n`
    more_memory: int | None = (
        None  # bytes of addresses beside what it has at its start, as `ulimit -v`
    )


class Run:
    """A started command; its process is `pid`. What it prints is kept, or shown by a terminal."""

    def __init__(self, arguments: list[str], setting: Setting, terminal: int | None = None):
        self.arguments = arguments
        self._streams = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - closed by wait
        with open(os.devnull) as nothing:
            files = [file.fileno() for file in (nothing, *self._streams)]
            if terminal is not None:
                files = [terminal] * 3
            self._process = CONTEXT.Process(
                target=_run_main,
                args=(arguments, [DupFd(file) for file in files], setting, terminal is not None),
            )
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Give its exit code, or None while it runs."""
        return self._process.exitcode

    def has_printed(self) -> bool:
        """Tell whether there is something on its standard output yet."""
        return os.fstat(self._streams[0].fileno()).st_size > 0

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess:
        """Its exit code (negative: killed by that signal) and what it printed."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.arguments}")
        texts = []
        for stream in self._streams:
            stream.seek(0)
            texts.append(stream.read())
            stream.close()
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, *texts)


def _run_main(
    arguments: list[str], files: list[DupFd], setting: Setting, in_terminal: bool
) -> None:
    import quantize_int4

    for number, file in enumerate(files):
        os.dup2(file.detach(), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    if in_terminal:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.environ.pop("NO_COLOR", None)
    os.umask(setting.umask)
    os.environ |= {"COLUMNS": WIDE} | setting.environment
    for name, value in setting.constants.items():
        assert hasattr(quantize_int4, name), name
        setattr(quantize_int4, name, value)
    if setting.environment.keys() & OF_THE_COMPILER:
        quantize_int4.Kernel.loaded.clear()
    if setting.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (setting.largest_file, setting.largest_file))
    if setting.open_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (setting.open_files, setting.open_files))
    if setting.more_memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + setting.more_memory
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    if setting.user is not None:
        os.setuid(setting.user)
    sys.exit(quantize_int4.main(arguments))
