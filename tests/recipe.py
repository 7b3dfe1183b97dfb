"""README.md's snippet that collects the file for --importance, run as it is printed there."""

import re
from pathlib import Path

from safetensors.torch import load_file

README = Path(__file__).parent.parent / "README.md"
FILE_NAME = "importance.safetensors"


def read_recipe():
    """The one Python block of the README that writes the file."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (recipe,) = [block for block in blocks if FILE_NAME in block]
    return recipe


def collect(model, batches, folder):
    """Run the snippet; the path of the file that it wrote into the folder."""
    path = Path(folder) / FILE_NAME
    exec(read_recipe().replace(f'"{FILE_NAME}"', repr(str(path))), {"model": model, "batches": batches})
    return path


def collect_vectors(model, batches, folder):
    return load_file(collect(model, batches, folder))
