"The lessons' stored outputs are fresh, and every lesson runs where only the wheel is installed."
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement

import house
import lessons
from house import root

PACKAGING = ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in")
all_lessons = {p.stem: p for p in [*house.lesson_paths(), root/"nbs"/"start.ipynb"]}


def test_outputs_are_fresh(monkeypatch):
    for name in ("package_imports", "lazy_names", "module_paths"):  # the package is read once
        monkeypatch.setattr(house, name, functools.cache(getattr(house, name)))
    reasons = {p.stem: lessons.stale(p) for p in house.notebook_paths()}
    found = [f"{stem} {reason}" for stem, reason in reasons.items() if reason]
    assert not found, "\n".join(["`make lessons` runs these again:", *found])


def test_images_are_stored_once():
    twice = set()
    for path in house.notebook_paths():
        for cell in house.cells(path, "code"):
            for output in cell.outputs:
                if {"image/png", "image/jpeg"} <= output.get("data", {}).keys():
                    twice.add(path.stem)
    assert not twice, f"`make lessons` stores these without the JPEG: {sorted(twice)}"


# ---- Fingerprints and runs, on a small repository


@pytest.fixture
def small(tmp_path):
    "A repository of three rooms, a bundled model that names another, and a notebook that uses them"
    files = {
        "settings.ini": "[DEFAULT]\nlib_name = t2i\nlib_path = t2i\nnbs_path = nbs\n"
                        "tst_flags = slow gpu net\nallowed_metadata_keys = fingerprint\n",
        "t2i/__init__.py": "_modules = {'a': ['A']}\n",
        "t2i/core.py": "x = 1\n",
        "t2i/a.py": "# a comment\ndef A():\n    from .core import x\n    return x\n",
        "t2i/b.py": "from .core import x\n",
        "t2i/cli.py": "from .b import x\n",
        "t2i/recipes/small-var.yaml": "steps: 1\n",
        "t2i/pretrained/small-var/part/w.safetensors": "1",
        "t2i/pretrained/small-var/model_index.json": '{"tokenizer": "small-vq"}',
        "t2i/pretrained/small-vq/w.safetensors": "1",
        "t2i/pretrained/small-vq/README.md": "1",
        "t2i/pretrained/small-vq/scores.json": "1",
        "t2i/pretrained/small-var-lora/w.safetensors": "1",
    }
    for name, text in files.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text)
    (tmp_path/"nbs").mkdir()
    write(tmp_path, "from t2i import A", "name = 'small-var'")
    return tmp_path


def write(folder, *code):
    "A notebook of these code cells, 10_one.ipynb"
    cells = [new_markdown_cell("# One"), *map(new_code_cell, code)]
    for i, cell in enumerate(cells):
        cell.id = f"c{i}"
    path = folder/"nbs"/"10_one.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize("name, part", {
    "t2i/a.py": "package",
    "t2i/core.py": "package",  # imported by what is imported
    "t2i/b.py": None,          # not imported
    "t2i/pretrained/small-var/part/w.safetensors": "models",
    "t2i/pretrained/small-vq/w.safetensors": "models",  # a part of the named model
    "t2i/pretrained/small-vq/README.md": None,
    "t2i/pretrained/small-vq/scores.json": None,  # no code of the lesson names such a file
    "t2i/pretrained/small-var-lora/w.safetensors": None,  # a longer name
    "t2i/recipes/small-var.yaml": "models",
}.items())
def test_what_makes_a_lesson_stale(small, name, part):
    path = small/"nbs"/"10_one.ipynb"
    assert lessons.stale(path, small) == "has never been run"
    nb = nbformat.read(path, 4)
    nb.metadata["fingerprint"] = lessons.fingerprint(nb, small)
    nbformat.write(nb, path)
    assert lessons.stale(path, small) == ""
    with open(small/name, "a") as f:
        f.write("\n# a comment\n\n" if name.endswith(".py") else "\n")
    if name.endswith(".py"):
        assert lessons.stale(path, small) == ""
        (small/name).write_text((small/name).read_text().replace("x", "y"))
    assert lessons.stale(path, small) == (f"changed: {part}" if part else "")
    nb.cells[-1].source += "\nmore"
    nbformat.write(nb, path)
    assert "code" in lessons.stale(path, small)


@pytest.mark.parametrize("name", lessons.RECORDS)
def test_records_count_where_code_names_them(small, name):
    scores = small/"t2i"/"pretrained"/"small-vq"/name
    scores.touch()
    assert scores not in lessons.bundled_files(["load('small-vq')"], small)
    assert scores in lessons.bundled_files([f"load('small-vq')/'{name}'"], small)


@pytest.mark.parametrize("cell, used", {
    "import torch": [],
    "import t2i.b": ["b", "core"],
    "import t2i\nt2i.A()": ["a", "core"],
    "recipe = 'task: t2i.a.A'": ["a", "core"],
    "!t2i info": ["b", "cli", "core"],
    "run([sys.executable, '-m', 't2i', 'info'])": ["b", "cli", "core"],
    "if colab:\n    %pip install t2i": [],
}.items())
def test_used_modules(small, cell, used):
    assert lessons.used_modules([cell], small) == used


def test_run_stores_outputs_that_stay_clean(small):
    path = write(
        small, "import os, sys\nprint(os.getcwd())", "print('bar', file=sys.stderr)",
        "#| slow\n1 + 1", "#| eval: false\n1/0", "#| gpu\n1/0",
        "#| export\nfrom IPython.display import Image\n7",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "from PIL import Image\nImage.new('RGB', (8, 8))",
    )
    nb = nbformat.read(path, 4)
    nb.cells[5].outputs = [new_output("stream", text="from a machine with a GPU")]
    nbformat.write(nb, path)
    problem, seconds = lessons.run(path, small)
    assert not problem and 0 < seconds < 60
    text = path.read_text()
    nb = nbformat.read(path, 4)
    assert nb.cells[1].outputs == [new_output("stream", text=f"{small/'nbs'}\n")]
    assert [len(c.outputs) for c in nb.cells[2:7]] == [0, 1, 0, 1, 1]
    assert nb.cells[3].outputs[0].data == {"text/plain": "2"}
    assert nb.cells[5].outputs[0].text == "from a machine with a GPU"  # skipped: kept
    assert "image/png" in nb.cells[7].outputs[0].data
    assert sorted(nb.cells[8].outputs[0].data) == ["image/png", "text/plain"]  # and no JPEG
    assert lessons.stale(path, small) == "" and not list((small/"nbs").glob(".*.tmp"))
    assert not any(c.execution_count for c in nb.cells[1:]) and "language_info" not in nb.metadata
    lessons.clean(path, small)
    assert path.read_text() == text


def test_a_lesson_that_stops_keeps_its_outputs(small, monkeypatch, capsys):
    path = write(small, "x = 1", "1/0")
    before = path.read_text()
    assert lessons.run_all([path], 1) == 1
    assert re.match(r"10_one .* cell 2 stopped: ZeroDivisionError", capsys.readouterr().out)
    assert path.read_text() == before
    monkeypatch.setattr(lessons, "execute", lambda *a: write(small, "x = 2") and "")
    assert "was edited while it ran" in lessons.run(path, small)[0]


def test_chosen():
    everything = [Path("nbs/10_one.ipynb"), Path("nbs/11_two.ipynb")]
    assert lessons.chosen([], everything) == everything
    assert lessons.chosen(["nbs/11_two.ipynb"], everything) == everything[1:]
    with pytest.raises(SystemExit, match="no lesson 12_x; there are 10_one, 11_two"):
        lessons.chosen(["12_x"], everything)


# ---- Every lesson as a plain script, where only the wheel and the extra `lessons` are installed


def as_script(path):
    "The code cells in one text, and the line at which each begins; magics are dropped"
    text, starts = "", {}
    for i, cell in enumerate(house.cells(path)):
        # On Colab every cell runs: what needs a GPU or files stands behind an `if`.
        if cell.cell_type == "code" and not {"net", "slow"} & set(house.directives(cell)):
            starts[i] = text.count("\n") + 1
            text += house.plain_code(cell.source) + "\n\n"
    return text, starts


def heed_interrupts():
    "Lessons show what Ctrl-C does; a shell ignores it in what runs in the background"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(path, python, folder):
    "Runs a notebook's code in an empty folder; returns what stopped it, with the cell, or nothing"
    script = folder/f"{path.stem}.py"
    text, starts = as_script(path)
    script.write_text(text, encoding="utf-8")
    (folder/"empty").mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")}
    env |= dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", MPLBACKEND="agg")
    env |= {k: str(folder/k.lower()) for k in ("T2I_HOME", "HF_HOME", "TORCH_HOME")}
    env["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    options = dict(cwd=folder/"empty", env=env, stdin=subprocess.DEVNULL, timeout=1800)
    options["preexec_fn"] = heed_interrupts
    p = subprocess.run([python, "-P", script], capture_output=True, text=True, **options)
    if p.returncode == 0:
        return ""
    where = rf'File "{re.escape(str(script))}", line (\d+)(?:, in <module>|$)'
    lines = re.findall(where, p.stderr, re.M) or [0]
    cell = max((i for i in starts if starts[i] <= int(lines[-1])), default="?")
    return f"{path.stem} stopped in cell {cell} (exit code {p.returncode}):\n{p.stderr[-3000:]}"


def needed(*requirements):
    "Names of the installed distributions that pip would install for some requirements"
    found = set()
    waiting = [(Requirement(r), "") for r in requirements]
    while waiting:
        wanted, extra = waiting.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        for e in {"", *wanted.extras}:
            if (wanted.name, e) not in found:
                found.add((wanted.name, e))
                waiting += [(Requirement(r), e) for r in distribution(wanted.name).requires or ()]
    return {name for name, _ in found}


def link(name, site):
    "Makes an installed distribution visible in another site-packages folder"
    here = distribution(name)
    tops = {f.parts[0] for f in here.files if f.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        if not (site/top).exists():
            (site/top).symlink_to(here.locate_file(top))


@pytest.fixture(scope="session")
def wheel_only(tmp_path_factory):
    "The Python of an environment that holds the built wheel and what `t2i[lessons]` asks for"
    folder = tmp_path_factory.mktemp("wheel")
    source = folder/"source"
    shutil.copytree(root/"t2i", source/"t2i", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*PACKAGING, "README.md", "LICENSE"):
        shutil.copy(root/name, source/name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source]
    subprocess.run([*pip, *build], check=True)
    venv.create(folder/"venv", symlinks=True)
    python = folder/"venv"/"bin"/"python"
    (site,) = (folder/"venv"/"lib").glob("python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    install = ["install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, "--python", python, *install], check=True)
    settings = lessons.settings(root)
    wanted = f"{settings['requirements']} {settings['lessons_requirements']}".split()
    for name in needed(*wanted):
        link(name, site)
    return python


@pytest.mark.slow
def test_the_environment_holds_the_wheel_alone(wheel_only, tmp_path):
    script = "import t2i, fastcore; print(t2i.__file__); import nbdev"
    command = [wheel_only, "-P", "-c", script]
    p = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert Path(p.stdout.strip()).is_relative_to(wheel_only.parent.parent), p.stdout
    assert "No module named 'nbdev'" in p.stderr
    assert (wheel_only.parent/"t2i").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stem", all_lessons)
def test_lesson_runs_with_the_wheel_alone(stem, wheel_only, tmp_path):
    problem = run_script(all_lessons[stem], wheel_only, tmp_path)
    assert not problem, problem


def test_run_script_names_the_cell(small, tmp_path):
    good = ["if False:\n    %pip install t2i", "#| net\n1/0", "#| eval: false\nx = 1", "assert x"]
    assert not run_script(write(small, *good), Path(sys.executable), tmp_path/"nbs")
    (tmp_path/"other").mkdir()
    path = write(small, *good, "def f():\n    return 1/0", "\n\nf()", "x = 2")
    problem = run_script(path, Path(sys.executable), tmp_path/"other")
    assert problem.startswith("10_one stopped in cell 6") and "ZeroDivisionError" in problem


def test_needed_follows_markers_and_extras():
    found = needed("typer", "torch; python_version < '3'", "fsspec[http]")
    assert {"typer", "rich", "aiohttp"} <= found and "torch" not in found
