"""Command: how it may be started (README: "Quick path")."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from conftest import ROOT, SCRIPT, command, quantize


def test_the_script_runs_when_it_alone_is_copied_somewhere(tiny, tmp_path):
    shutil.copy(SCRIPT, tmp_path / "quantize_int4.py")
    arguments = [
        argument.replace(str(SCRIPT), str(tmp_path / "quantize_int4.py"))
        for argument in command(tiny, "out")
    ]
    assert subprocess.run(arguments, cwd=tmp_path, env={"PATH": os.environ["PATH"]}).returncode == 0
    assert (tmp_path / "out" / "model-00001.safetensors").exists()


def test_the_script_runs_without_numpy(tiny, tmp_path):
    program = "import sys; sys.modules['numpy'] = None; import quantize_int4; sys.exit(quantize_int4.main())"
    arguments = [sys.executable, "-c", program, *command(tiny, tmp_path / "out", "--verify")[2:]]
    result = subprocess.run(arguments, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "verified, no problems found" in result.stdout


def test_the_readmes_first_command_works_twice_and_never_touches_another_folder(tmp_path):
    arguments = [sys.executable, ROOT / "tests" / "tiny_nemotron.py", tmp_path / "tiny"]
    subprocess.run(arguments, check=True)
    states = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()}
    quantize(tmp_path / "tiny", tmp_path / "out")
    subprocess.run(arguments, check=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()} == states
    assert "complete already" in quantize(tmp_path / "tiny", tmp_path / "out").stdout
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert subprocess.run(arguments, capture_output=True).returncode == 1
    assert (tmp_path / "tiny" / "config.json").read_text() == "{}"
