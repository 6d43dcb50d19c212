"The house rules that a machine can check; house.py says what each of them is."
import ast
import json
import os
import re
import shutil
import subprocess

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import house
from house import bin_, root

notebooks = {p.stem: p for p in house.notebook_paths()}
lessons = {p.stem: p for p in house.lesson_paths()}
modules = house.module_paths()
written = {k: p for k, p in modules.items() if not p.stem.startswith("__")}  # by nbdev
scripts = [*(root/"tests").glob("*.py"), *(root/"docs").glob("*.py")]
tests = {p.stem: p for p in sorted(scripts)}
rooms = house.rooms()
number = house.room_numbers()
ruff = house.ruff_faults("t2i", "tests", "nbs", "docs")
each = pytest.mark.parametrize("stem", notebooks)
module = pytest.mark.parametrize("name", written)


def faults(stem):
    "All breaches of form and style in a notebook and its module, in a test or in the site's code"
    if stem in tests:
        return [*house.style_faults(tests[stem].read_text()), *ruff.get(tests[stem], [])]
    found = [*house.notebook_style_faults(notebooks[stem]), *ruff.get(notebooks[stem], [])]
    if stem in lessons:
        found += house.lesson_faults(notebooks[stem])
    if stem == "start":  # before the first lesson: no exercises, and its own way out
        all_cells = house.cells(notebooks[stem])
        prose = [c for c in all_cells if c.cell_type == "markdown"]
        found += house.outline_faults(notebooks[stem], all_cells)
        found += house.prose_faults(notebooks[stem], prose)
    for name, room in rooms.items():
        if room == stem:
            found += house.module_faults(modules[name].read_text())
            found += ruff.get(modules[name], [])
    return found


# ---- Form and style


@pytest.mark.parametrize("stem", [*notebooks, *tests])
def test_form_and_style(stem):
    found = faults(stem)
    assert not found, "\n".join([stem, *found])


@pytest.mark.parametrize("name", ["__init__", "__main__"])
def test_style_of_what_is_written_by_hand(name):
    found = [*house.module_faults(modules[name].read_text()), *ruff.get(modules[name], [])]
    assert not found, "\n".join(found)


def test_no_undefined_or_unused_names():
    found = house.ruff_faults("t2i", "tests", select="F")
    assert not found, "\n".join(f"{p.relative_to(root)}: {f}" for p in found for f in found[p])


@each
def test_title(stem):
    first = house.cells(notebooks[stem])[0]
    assert first.cell_type == "markdown" and re.match(house.TITLE, first.source), first.source


@module
def test_exports_have_docstrings(name):
    tree = ast.parse(modules[name].read_text())
    assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
    (public,) = [n.value for n in assigned if getattr(n.targets[0], "id", "") == "__all__"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if node.name in ast.literal_eval(public):
                assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


@module
def test_no_prints_and_no_fastcore(name):
    text = modules[name].read_text()
    assert "fastcore" not in text
    if name != "cli":
        assert not re.search(r"^\s*print\(", text, re.M)


def test_no_paths_of_a_machine():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    p = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if p.returncode:
        pytest.skip("not a git checkout")
    text_files = r"\.(py|md|ipynb|yaml|yml|ini|toml|cff|svg|json|jsonl)$"
    for name in filter(re.compile(text_files).search, p.stdout.split("\0")):
        text = (root/name).read_text(errors="ignore") if (root/name).is_file() else ""
        found = re.search(r"/(home|root|Users)/\w|/wor" + r"k/\w", text)
        assert not found, f"{name}: {text[found.start()-20:found.end()+20]}"


def test_readme_and_index_list_the_same_lessons():
    readme = (root/"README.md").read_text()
    index = "\n".join(cell.source for cell in house.cells(notebooks["index"]))
    rows = re.findall(r"\[([^][]+)\]\(nbs/(\d\d_\w+)\.ipynb\) \|", readme)
    assert rows == re.findall(r"\[([^][]+)\]\((\d\d_\w+)\.ipynb\) \|", index)
    for title, stem in rows:
        first = house.cells(notebooks[stem])[0].source
        assert first.startswith(f"# {title}\n"), f"README.md calls {stem} {title!r}"
    missing = [stem for stem in lessons if f"(nbs/{stem}.ipynb)" not in readme]
    assert not missing, f"README.md has no link to {', '.join(missing)}"


# ---- Notebooks and modules belong together


def test_there_are_notebooks():
    assert len(lessons) >= 16 and set(modules) > {"__init__", "core", "cli"}


@each
def test_is_clean_and_whole(stem):
    text = notebooks[stem].read_text()
    nb = json.loads(text)
    assert not re.search(r"<<<<<<<|>>>>>>>", text), "conflict cell"
    nbformat.validate(nb)
    ids = [c.get("id") for c in nb["cells"]]
    assert all(ids) and len(set(ids)) == len(ids), "cell ids"
    for c in nb["cells"]:
        assert c.get("execution_count") is None
        for o in c.get("outputs", []):
            assert o["output_type"] != "error", "a traceback is committed"
            assert "Traceback (most recent call last)" not in json.dumps(o)
            assert o.get("name") != "stderr", f"a warning or progress bar: {o.get('text')}"
            assert o.get("execution_count") is None
    assert len(text) < 400_000, f"{len(text)} bytes"


def test_clean_and_export_leave_no_difference(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "pretrained")
    for name in ("nbs", "t2i"):
        shutil.copytree(root/name, tmp_path/name, ignore=ignored)
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(root/name, tmp_path/name)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev_export is idle in tests
    subprocess.run([bin_/"nbdev_clean"], cwd=tmp_path, env=env, check=True)
    subprocess.run([bin_/"nbdev_export"], cwd=tmp_path, env=env, check=True)
    old = {*notebooks.values(), *modules.values(), root/"t2i"/"_modidx.py"}
    new = {*house.notebook_paths(tmp_path), *(tmp_path/"t2i").rglob("*.py")}
    assert {p.relative_to(root) for p in old} == {p.relative_to(tmp_path) for p in new}
    for path in sorted(p.relative_to(root) for p in old):
        same = (tmp_path/path).read_text() == (root/path).read_text()
        assert same, f"{path} is not what nbdev_clean and nbdev_export make of the notebooks"


FOLDERS = {1: "tokenizers", 2: "guidance", 3: "generators", 4: "control", 9: "engine"}


@module
def test_the_decade_decides_the_folder(name):
    assert name in number, f"{name} is stale: no notebook exports it"
    usual = "data" if number[name] in (1, 2, 3, 8, 9) else ""
    assert name.rpartition(".")[0] == FOLDERS.get(number[name]//10, usual)


# ---- Imports go one way


def test_imports_go_one_way():
    graph = house.package_imports()
    assert len(graph["cli"]) > 3 and "core" in graph["data.datasets"], "imports are not read"
    wrong = [w for name in graph for w in house.wrong_imports(name, graph[name], number)]
    assert not wrong, "\n".join(wrong)
    assert not house.cycle(graph)


@pytest.mark.parametrize("stem", lessons)
def test_lessons_use_what_was_taught(stem):
    lazy = house.lazy_names()
    for cell in house.cells(lessons[stem], "code"):
        code = house.plain_code(cell.source)
        for name in house.imported_modules(code, modules, lazy) if code else ():
            assert name in number, f"{stem} imports t2i.{name}, which no notebook exports"
            if not house.is_exported(cell) and not house.is_engine(name, number):
                assert number[name] <= int(stem[:2]), f"{stem} uses t2i.{name}, taught later"


def test_models_load_nothing_heavy():
    models = [f"t2i.{m}" for m in number if number[m] < 50 and not m.endswith("training")]
    assert {"t2i.attention", "t2i.tokenizers.vqgan", "t2i.generators.var"} <= set(models)
    assert not house.heavy_imports(*models)
    assert house.heavy_imports("json", "omegaconf") == ["omegaconf loads omegaconf"]


@pytest.mark.parametrize("module, source", {
    "tokenizers.vqgan": "from t2i.generators.var import VAR",       # absolute, upwards
    "tokenizers.losses": "from ..generators.var import VAR",        # relative, upwards
    "tokenizers.quantize": "from .. import generators, pipeline",   # names of the package
    "attention": "import t2i.tokenizers.vqgan as v",
    "sampling": "def f():\n    if True:\n        from .guidance import clip",  # in a function
    "text": "from t2i import VAR",                                  # a lazy public name
    "core": "import t2i\n\ndef f():\n    return t2i.load('x')",     # and as an attribute
    "training": "import importlib\nimportlib.import_module('t2i.cli')",
    "engine.files": "from ..training import fit",                   # the engine uses core alone
    "engine.runs": "from t2i.data import shapes",
    "data.__init__": "from .shapes import Scene",                   # a folder loads nothing
    "__init__": "from .core import T2IError",
    "cli": "from .clip import CLIP",                                # there is no such module
}.items())
def test_a_planted_import_is_found(module, source):
    package = ".".join(["t2i", *module.split(".")[:-1]])
    imports = house.imported_modules(source, modules, house.lazy_names(), package)
    assert house.wrong_imports(module, imports, number), imports


@pytest.mark.parametrize("module, source", {
    "tokenizers.vqgan": "from .quantize import x\nfrom ..engine import files\nfrom ..core import y",
    "tokenizers.quantize": "from t2i.tokenizers.vqgan import y",    # of its own decade
    "engine.runs": "from .files import x\nfrom ..core import y\nimport t2i.engine.caches",
    "cli": "from .saved import load\nfrom t2i import VAR, __version__",
    "__main__": "from t2i.cli import main",
    "text": "import torch\nfrom os import path\nimport t2iother",
}.items())
def test_a_right_import_passes(module, source):
    package = ".".join(["t2i", *module.split(".")[:-1]])
    imports = house.imported_modules(source, modules, house.lazy_names(), package)
    assert not house.wrong_imports(module, imports, number)


def test_a_planted_cycle_is_found(tmp_path):
    ignored = shutil.ignore_patterns("pretrained", "figures")
    for name in ("nbs", "t2i"):
        shutil.copytree(root/name, tmp_path/name, ignore=ignored)
    assert not house.cycle(house.package_imports(tmp_path))
    with open(tmp_path/"t2i"/"core.py", "a") as f:
        f.write("\n\ndef later():\n    from .data import datasets\n    return datasets\n")
    found = house.cycle(house.package_imports(tmp_path)).split(" → ")
    assert {"core", "data.datasets"} <= set(found) and found[0] == found[-1]


# ---- The rules of style and form find what they should


@pytest.mark.parametrize("source, fault", [
    ("[[x for x in y] for y in z]", "a comprehension inside"),
    ("{a: sum(b for b in c) for a, c in d}", "a comprehension inside"),
    ("[x if x else 0 for x in y]", "comprehension's head"),
    ("{k: (v if v else 0) for k, v in y}", "comprehension's head"),
    ("a, b = 1, (2 if c else 3)", "inside a tuple"),
    ("f((1, g(2 if c else 3)))", "inside a tuple"),
    ("if (a := f()):\n    print(a)", "walrus"),
    ("def f():\n    '''two\n    lines'''\n" + "    a = 1\n"*41, "41 lines"),
])
def test_a_planted_fault_of_style_is_found(source, fault):
    assert any(fault in f for f in house.style_faults(source))


@pytest.mark.parametrize("source", [
    "[x for y in z for x in y if x]",
    "a = 1 if b else 2",
    "f(1 if b else 2, 3)",
    "while line := f():\n    print(line)",
    "def f(\n    a,\n    b,\n):\n    '''one\n    two\n    three'''\n" + "    a = 1\n"*40,
    house.plain_code("#| hide\nif colab:\n    %pip install -q t2i\n!ls"),
    house.plain_code("%%bash\nfor i in 1; do echo; done"),
])
def test_right_style_passes(source):
    assert not list(house.style_faults(source))


def test_module_faults():
    header = '"' + "t"*120 + '"\n\n__all__ = [' + "'name', "*20 + "]\n"
    line = "# %% ../nbs/10_quantize.ipynb #1234\n" + "x = 1  # short\n"*400
    assert not list(house.module_faults(header + line + "\n# a comment\n"))
    long = f"# {'x'*108}\n"
    assert ["401 lines" in f for f in house.module_faults(header + line + "x = 2\n")] == [True]
    assert ["110 columns" in f for f in house.module_faults(header + line + long)] == [True]


def lesson():
    "Cells of a lesson that obeys every rule: the notebook 11_two"
    link = "[Tian et al. 2024](https://arxiv.org/abs/2404.02905)"
    badge = "[![Colab](b.svg)](https://colab.research.google.com/github/o/r/blob/main/nbs/11_two.ipynb)"
    fold = "\n<details><summary>Solution</summary>\n\nYes.\n</details>\n"
    prose = [
        "# Two\n\n> What it is.", badge, "The question.\n\n![Two boxes](figures/two.svg)",
        f"As in {link}, section 2.", f"## Exercises\n\n1. Why?{fold}2. How?{fold}3. When?{fold}",
        "← [One](10_one.ipynb) | [index](index.ipynb) | [Three](12_three.ipynb) →",
    ]
    cells = [new_markdown_cell(p) for p in prose]
    cells[2:2] = [new_code_cell("#| export\ndef f():\n    'An image'\n    return 1")]
    cells[-1:-1] = [new_code_cell(f"x = {i}") for i in range(4)]
    return cells


def change(i, source):
    return lambda cells: cells[i].update(source=source)


def swap(i, old, new):
    return lambda cells: cells[i].update(source=cells[i].source.replace(old, new))


@pytest.mark.parametrize("spoil, fault", [
    (lambda cells: None, None),
    (change(0, "# Two\n> What it is."), "first cell"),
    (swap(1, "11_two", "12_three"), "Colab badge"),
    (lambda cells: cells.extend(new_code_cell("x") for _ in range(70)), "81 cells"),
    (lambda cells: [c.update(source="x\n"*9) for c in cells[6:10]], "the median code cell has 9"),
    (change(7, "x\n"*41), "a code cell of 41 lines"),
    (lambda cells: cells.__delitem__(slice(6, 10)), "of the cells are prose"),
    (lambda cells: cells.insert(6, new_markdown_cell("- short\n- " + "word "*100)), "a paragraph"),
    (swap(3, "two.svg", "three.svg"), "figures/three.svg does not exist"),
    (swap(3, "Two boxes", ""), "no alternative text"),
    (swap(3, "![Two boxes](figures/two.svg)", ""), "no drawn figure"),
    (swap(4, "As in", "Lee & van den Oord (2020), as in"), "without a link: Lee & van den Oord"),
    (swap(4, "https://arxiv.org/abs/2404.02905", "13_x.ipynb"), "without a link: Tian et al. 2024"),
    (swap(4, "As in", "Pictures as in"), "the word is image"),
    (swap(2, "An image", "A picture"), "the word is image"),
    (swap(5, "## Exercises", "## Questions"), "no section ## Exercises"),
    (swap(5, "2. How?\n<details>", "2. How?"), "2 folded solutions"),
    (swap(5, "</summary>\n\n", "</summary>\n"), "no empty line after a </summary>"),
    (swap(-1, "10_one", "09_zero"), "the last line is not ← [title](10_one.ipynb)"),
    (swap(-1, " →", ""), "the last line is not"),
])
def test_a_planted_fault_of_form_is_found(tmp_path, spoil, fault):
    (tmp_path/"nbs"/"figures").mkdir(parents=True)
    (tmp_path/"nbs"/"figures"/"two.svg").write_text("<svg/>")
    cells = lesson()
    spoil(cells)
    for stem in ("10_one", "11_two", "12_three", "index"):
        nbformat.write(new_notebook(cells=cells), tmp_path/"nbs"/f"{stem}.ipynb")
    found = list(house.lesson_faults(tmp_path/"nbs"/"11_two.ipynb"))
    assert any(fault in f for f in found) if fault else not found, found


@pytest.mark.parametrize("text, stem, faults", [
    ("'a picture of {a}', 'there is {a}'", "01_shapes", 0),
    ("a picture", "01_shapes", 1),
    ("the picture of a circle", "01_shapes", 1),
    ("a picture often", "01_shapes", 1),
    ("'a picture of {a}'", "02_checker", 1),
])
def test_one_room_may_use_one_phrase(text, stem, faults):
    assert len(list(house.picture_faults(text, stem))) == faults


def test_first_and_last_lesson_have_one_way_out(tmp_path):
    (tmp_path/"nbs").mkdir()
    for stem in ("00_one", "01_two"):
        nbformat.write(new_notebook(), tmp_path/"nbs"/f"{stem}.ipynb")
    first = new_markdown_cell("[index](index.ipynb) | [Two](01_two.ipynb) →")
    last = new_markdown_cell("Text.\n\n← [One](00_one.ipynb) | [index](index.ipynb)")
    for stem, cell in (("00_one", first), ("01_two", last)):
        assert not list(house.navigation_faults(tmp_path/"nbs"/f"{stem}.ipynb", cell))
    assert list(house.navigation_faults(tmp_path/"nbs"/"00_one.ipynb", last))
