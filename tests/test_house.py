"The house rules that a machine can check."
import ast, json, re, shutil, statistics, subprocess, sys
from pathlib import Path

import nbformat, pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/"nbs").glob("*.ipynb"))
modules = sorted(p for p in (root/"t2i").glob("*.py") if not p.stem.startswith("_"))
number = {p.stem.partition("_")[2]: int(p.stem[:2]) for p in notebooks if p.stem[:2].isdigit()}
each = pytest.mark.parametrize("path", notebooks, ids=lambda p: p.stem)
module = pytest.mark.parametrize("path", modules, ids=lambda p: p.stem)


def cells(path, kind=None): return [c for c in nbformat.read(path, 4).cells if kind in (None, c.cell_type)]


def test_there_are_notebooks(): assert len(notebooks) >= 16


@each
def test_is_clean_and_whole(path):
    text = path.read_text()
    nb = json.loads(text)
    assert not re.search(r"<<<<<<<|>>>>>>>", text), "conflict cell"
    ids = [c.get("id") for c in nb["cells"]]
    assert all(ids) and len(set(ids)) == len(ids), "cell ids"
    for c in nb["cells"]:
        for o in c.get("outputs", []):
            assert o["output_type"] != "error", "a traceback is committed"
            assert "Traceback (most recent call last)" not in json.dumps(o)
            assert o.get("name") != "stderr", f"a warning or progress bar is committed: {o.get('text')}"
            assert o.get("execution_count") is None
        assert c.get("execution_count") is None
    assert len(text) < 400_000, f"{len(text)} bytes"


@each
def test_title(path):
    first = cells(path)[0]
    lines = first.source.splitlines()
    assert first.cell_type == "markdown" and lines[0].startswith("# ") and lines[1] == "" and lines[2].startswith("> "), lines[:3]


@each
def test_cell_sizes(path):
    code = [len(c.source.splitlines()) for c in cells(path, "code")]
    assert max(code, default=0) <= 60, f"a cell of {max(code)} lines"
    assert statistics.median(code or [0]) <= 8
    for c in cells(path, "markdown"):
        for paragraph in c.source.split("\n\n"):
            if not paragraph.lstrip().startswith(("|", "-", "1", "<", "!", "[", "$")): assert len(paragraph) <= 480, paragraph[:80]


@each
def test_share_of_prose(path):
    prose, code = len(cells(path, "markdown")), len(cells(path, "code"))
    assert .25 <= prose/(prose+code) <= .6 or path.stem == "index", f"{prose} of {prose+code} cells are prose"


def test_clean_and_export_leave_no_difference(tmp_path):
    for name in ("nbs", "t2i", "settings.ini", "setup.py", "pyproject.toml"):
        source = root/name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path/name, **(dict(ignore=shutil.ignore_patterns("__pycache__", "pretrained")) if source.is_dir() else {}))
    bin_ = Path(sys.executable).parent
    subprocess.run([bin_/"nbdev_clean"], cwd=tmp_path, check=True)
    subprocess.run([bin_/"nbdev_export"], cwd=tmp_path, check=True)
    for old in [*notebooks, *modules, root/"t2i"/"_modidx.py"]:
        assert (tmp_path/old.relative_to(root)).read_text() == old.read_text(), f"{old.name} is not what nbdev_clean and nbdev_export make"


@module
def test_every_module_has_a_notebook(path): assert path.stem in number, f"{path.name} is stale: no notebook exports it"


def test_stems_are_unique(): assert len(number) == len([p for p in notebooks if p.stem[:2].isdigit()])


@module
def test_imports_go_one_way(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name and name.startswith("t2i."): assert number[name[4:]] < number[path.stem], f"{path.stem} imports {name}"


@each
def test_lessons_import_one_way(path):
    if not path.stem[:2].isdigit(): return
    for name in re.findall(r"(?:from|import) t2i\.(\w+)", "\n".join(c.source for c in cells(path, "code"))):
        assert number[name] <= int(path.stem[:2]), f"{path.stem} imports t2i.{name}"


@module
def test_exports_have_docstrings(path):
    tree = ast.parse(path.read_text())
    public = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__")
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public:
            assert ast.get_docstring(node), f"{path.stem}.{node.name} has no docstring"


@module
def test_no_prints_and_no_fastcore(path):
    text = path.read_text()
    assert "fastcore" not in text
    if path.stem != "cli": assert not re.search(r"^\s*print\(", text, re.M)


def test_no_undefined_or_unused_names():
    p = subprocess.run([Path(sys.executable).parent/"ruff", "check", "--output-format", "concise", root/"t2i", root/"tests"], capture_output=True, text=True)
    assert p.returncode == 0, p.stdout


def test_no_paths_of_a_machine():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True).stdout.decode().split("\0")
    for f in filter(None, files):
        p = root/f
        if p.is_file() and p.suffix in (".py", ".md", ".ipynb", ".yaml", ".ini", ".toml", ".json", ".jsonl"):
            assert not re.search(r"/(home|root|Users)/\w|/wor" + r"k/\w", p.read_text(errors="ignore")), f
