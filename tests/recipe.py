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


def collect(model, batches, folder, **constants):
    """Run the snippet, with other values for some of its constants; the path of the file that it wrote."""
    path = Path(folder) / FILE_NAME
    recipe = read_recipe().replace(f'"{FILE_NAME}"', repr(str(path)))
    for name, value in constants.items():
        recipe, count = re.subn(rf"^{name} = \S+", f"{name} = {value}", recipe, flags=re.MULTILINE)
        assert count == 1, name
    exec(recipe, {"model": model, "batches": batches})
    return path


def collect_vectors(model, batches, folder, **constants):
    return load_file(collect(model, batches, folder, **constants))
