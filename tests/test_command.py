"""The command as its users meet it: a dry run, the script alone, without what it does not need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from conftest import SCRIPT, command, quantize


def test_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path):
    result = quantize(tiny, tmp_path / "out", "--dry_run")
    for words in ("quantized to 4 bits", "embeddings", "vectors and scalars", "3-D", "free", "at the peak", "Dry run"):
        assert words in result.stdout
    assert not (tmp_path / "out").exists()


def test_the_script_runs_without_numpy(tiny, tmp_path):
    program = "import sys; sys.modules['numpy'] = None; import quantize_int4; sys.exit(quantize_int4.main())"
    arguments = [sys.executable, "-c", program, *command(tiny, tmp_path / "out", "--verify")[2:]]
    result = subprocess.run(arguments, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "holds what it should" in result.stdout


def test_the_script_runs_when_it_alone_is_copied_somewhere(tiny, tmp_path):
    shutil.copy(SCRIPT, tmp_path / "quantize_int4.py")
    arguments = [argument.replace(str(SCRIPT), str(tmp_path / "quantize_int4.py")) for argument in command(tiny, "out")]
    assert subprocess.run(arguments, cwd=tmp_path, env={"PATH": os.environ["PATH"]}).returncode == 0
    assert (tmp_path / "out" / "model-00001.safetensors").exists()
