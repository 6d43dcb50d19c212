"What the package imports when it is loaded comes with a plain installation."
import ast
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = dict(PIL="pillow", yaml="pyyaml", open_clip="open_clip_torch")  # others: as the module


def outside_imports(code:str)->set[str]:
    "Packages that a module imports outside its functions"
    found = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"t2i"}


def required()->set[str]:
    settings = ConfigParser()
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    words = settings["DEFAULT"]["requirements"].split()
    return {word.partition(">")[0].partition("<")[0] for word in words}


def test_imports_are_found():
    code = ("import os\nimport numpy as np\nfrom PIL import Image\nfrom .core import x\n"
            "def f():\n    import a")
    assert outside_imports(code) == {"numpy", "PIL"}


@pytest.mark.parametrize("path", sorted((ROOT/"t2i").rglob("*.py")), ids=lambda path: path.stem)
def test_a_plain_installation_has_what_is_imported(path):
    found = {PACKAGES.get(name, name) for name in outside_imports(path.read_text("utf-8"))}
    assert found <= required(), found - required()
