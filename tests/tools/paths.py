"""Let the scripts of this folder import quantize_int4 and what the tests share. They import this first."""

import sys
from pathlib import Path

TOOLS = Path(__file__).parent
ROOT = TOOLS.parent.parent

# Processes that the scripts start take this over.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
