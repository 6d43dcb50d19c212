"""The house rules. Each function reads a source or a notebook and returns what is wrong, in words.

tests/test_house.py applies them, tests/lessons.py uses the reading of imports.
"""
import ast
import itertools
import json
import re
import statistics
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent
bin_ = Path(sys.executable).parent


# ---- Reading notebooks and modules


def notebook_paths(root=root):
    "All notebooks"
    return sorted((root/"nbs").glob("*.ipynb"))


def lesson_paths(root=root):
    "The numbered notebooks"
    return [p for p in notebook_paths(root) if p.stem[:2].isdigit()]


def module_paths(root=root):
    "Every Python file of the package, by its dotted name: `data.shapes`, `data.__init__`, `cli`"
    files = [p for p in sorted((root/"t2i").rglob("*.py")) if p.name != "_modidx.py"]
    return {".".join(p.relative_to(root/"t2i").with_suffix("").parts): p for p in files}


def cells(path, kind=None):
    "The cells of a notebook, of one kind if given"
    return [c for c in nbformat.read(path, 4).cells if kind in (None, c.cell_type)]


def directives(cell):
    "The directives at a cell's head, as nbdev reads them: `#| eval: false` gives `eval: false`"
    head = itertools.takewhile(re.compile(r"\s*($|#|%%)").match, cell.source.splitlines())
    return [" ".join(line.split("|", 1)[1].split()) for line in head if re.match(r"#\s*\|", line)]


def is_exported(cell):
    "Does nbdev write this cell into the package?"
    return any(re.match(r"exporti?s?\b", d) for d in directives(cell))


def plain_code(source):
    "A cell's source without IPython's lines: `%pip …` and `!ls` become `pass`"
    try:
        ast.parse(source)
        return source
    except SyntaxError:
        if re.match(r"(\s*#.*\n)*%%(?!time|capture)", source):
            return ""
        return re.sub(r"^([ \t]*)[%!?].*$", r"\1pass", source, flags=re.M)


def rooms(root=root):
    "The notebook of each module: `tokenizers.vqgan` is exported by 11_vqgan"
    found = {}
    for path in lesson_paths(root):
        for name in re.findall(r"#\| default_exp ([\w.]+)", path.read_text(encoding="utf-8")):
            if name in found:
                raise ValueError(f"{path.stem} and {found[name]} both export t2i.{name}")
            found[name] = path.stem
    return found


def room_numbers(root=root):
    "The number of each module: `data.shapes` is 1, `tokenizers.vqgan` is 11"
    return {name: int(stem[:2]) for name, stem in rooms(root).items()}


def lazy_names(root=root):
    "The public names of `t2i` and the module of each, as t2i/__init__.py lists them"
    for node in ast.parse((root/"t2i"/"__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_modules":
            table = ast.literal_eval(node.value)
            return {name: module for module, names in table.items() for name in names}
    return {}


# ---- Imports

HEAVY = ("lightning", "omegaconf", "open_clip")


@cache
def imported_names(source, package="t2i"):
    "Absolute names of all that a source imports, at any depth; `package` is where it stands"
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("."*node.level + (node.module or ""), package)
            found |= {f"{base}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "t2i":
            found.add(f"t2i.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {a.value for a in node.args if isinstance(getattr(a, "value", None), str)}
    return frozenset(name for name in found if name.startswith("t2i."))


def imported_modules(source, modules, lazy, package="t2i"):
    "Modules of the package that a source imports; a name that leads to none is kept as it is"
    packages = {m.rpartition(".")[0] for m in modules} - {""}
    found = set()
    for name in imported_names(source, package):
        parts = name.removeprefix("t2i.").split(".")
        prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
        known = [lazy.get(p, p) for p in prefixes if p in modules or p in lazy]
        if known:
            found.add(known[0])
        elif prefixes[0] not in packages and not parts[0].startswith("__"):
            found.add(prefixes[0])
    return found


def package_imports(root=root):
    "For each file of the package, the modules that it imports"
    files = module_paths(root)
    lazy = lazy_names(root)
    graph = {}
    for name, path in files.items():
        package = ".".join(["t2i", *name.split(".")[:-1]])
        graph[name] = imported_modules(path.read_text(encoding="utf-8"), files, lazy, package)
    return graph


def is_engine(name, number):
    return number.get(name, 0) >= 90


def wrong_imports(name, imports, number):
    "Imports of one module that do not go down: to its own decade, a lower one, or the engine"
    wrong = []
    for other in sorted(imports):
        if other not in number:
            wrong.append(f"{name} imports t2i.{other}, which no notebook exports")
        elif name.endswith("__init__"):
            wrong.append(f"{name} imports t2i.{other}: importing a folder must load nothing")
        elif not goes_down(name, other, number):
            wrong.append(f"{name} ({number.get(name)}) imports {other} ({number[other]})")
    return wrong


def goes_down(name, other, number):
    "May module `name` import module `other`? (`python -m t2i` stands for the command line)"
    name = "cli" if name == "__main__" else name
    if name == "cli" or name.startswith("cli_"):
        return True  # commands stand above all rooms
    if is_engine(name, number):
        return other == "core" or is_engine(other, number)
    return is_engine(other, number) or number[other]//10 <= number.get(name, 0)//10


LOADED = """
import importlib, sys
heavy = set(sys.argv[1].split(","))
for module in sys.argv[2:]:
    importlib.import_module(module)
    for name in sorted(heavy & sys.modules.keys()):
        print(module, "loads", name)
    heavy -= sys.modules.keys()
"""


def heavy_imports(*modules):
    "Imports the modules one after the other in a fresh interpreter: which first load HEAVY ones?"
    command = [sys.executable, "-c", LOADED, ",".join(HEAVY), *modules]
    p = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return p.stdout.splitlines()


def cycle(graph):
    "The first cycle of imports as `a → b → a`, or an empty string"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return " → ".join(e.args[1])
    return ""


# ---- Style of code

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def contains(node, kinds):
    "Does something of these kinds stand inside the node?"
    return any(isinstance(n, kinds) for n in ast.walk(node) if n is not node)


def comprehension_faults(node):
    "What is wrong with a comprehension"
    heads = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
    if contains(node, COMPREHENSIONS):
        yield "a comprehension inside a comprehension"
    if contains(ast.Tuple(heads), ast.IfExp):
        yield "a conditional in a comprehension's head"


def body_lines(function):
    "Lines of a function after its signature and docstring"
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.end_lineno - (first.end_lineno if documented else first.lineno-1)


def style_faults(source):
    "What ruff cannot see: nesting, conditionals, walruses, long functions"
    tree = ast.parse(source)
    tests = [n.test for n in ast.walk(tree) if isinstance(n, ast.While)]
    allowed = {id(n) for test in tests for n in ast.walk(test)}
    for node in ast.walk(tree):
        faults = []
        if isinstance(node, COMPREHENSIONS):
            faults += comprehension_faults(node)
        if isinstance(node, ast.Tuple) and contains(node, ast.IfExp):
            faults.append("a conditional inside a tuple")
        if isinstance(node, ast.NamedExpr) and id(node) not in allowed:
            faults.append("a walrus outside the test of a while")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and body_lines(node) > 40:
            faults.append(f"{node.name} has {body_lines(node)} lines, 40 are allowed")
        for fault in faults:
            yield f"line {node.lineno}: {fault}"


def without_header(source):
    "An exported module without what nbdev writes at its top: the title, `__all__`"
    return re.split(r"^(?=# %% \S+\.ipynb #)", source, maxsplit=1, flags=re.M)[-1]


def module_faults(source):
    "Style of an exported module; nbdev's header does not count"
    code = without_header(source)
    yield from style_faults(source)
    lines = [line for line in code.splitlines() if line.strip() and line.strip()[0] != "#"]
    if len(lines) > 400:
        yield f"{len(lines)} lines of code, 400 are allowed: split it along an idea"
    for line in code.splitlines():
        if len(line) > 100:
            yield f"{len(line)} columns: {line.strip()[:60]}…"


def notebook_style_faults(path):
    "Style of a notebook's code cells"
    for i, cell in enumerate(cells(path)):
        if cell.cell_type == "code":
            for fault in style_faults(plain_code(cell.source)):
                yield f"cell {i}, {fault}"


def ruff_faults(*where, root=root, select=None):
    "What ruff finds, by file; the rules stand in pyproject.toml"
    command = [bin_/"ruff", "check", "--output-format", "json", "--no-cache", *where]
    if select:
        command += ["--select", select]
    p = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if p.returncode not in (0, 1):
        raise RuntimeError(p.stderr)
    found = {}
    for f in json.loads(p.stdout):
        cell = f"cell {f['cell']-1}, " if f.get("cell") else ""
        text = f"{cell}line {f['location']['row']}: {f['code']} {f['message']}"
        found.setdefault(Path(f["filename"]), []).append(text)
    return found


# ---- Form of a lesson

LINK = r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*%s[^()\s]*(?:\([^()]*\)[^()\s]*)*\)"
TITLE = r"# \S.*\n\n> \S.*\Z"
FIGURE = r"!\[([^\]]*)\]\(figures/([^)\s]*)\)"
NAME = r"[A-ZÀ-Þ][\w'’-]+"
AUTHORS = rf"{NAME}(?:\s{NAME})?\s(?:et\sal\.?|(?:&|and)\s(?:[a-z]+\s)*{NAME}(?:\s{NAME})?)"
CITATION = rf"{AUTHORS},?\s\(?(?:19|20)\d\d\b"
ALLOWED = {
    "01_shapes": "a picture of",  # words of the world's captions, which models have learned
    "09_emoji_prompts": "a picture of",  # what people type
}
NO_PARAGRAPH = re.compile(r"\s*(\||<|!\[|\[!\[|\$\$)")  # tables, HTML, figures, equations


def outline_faults(path, all_cells):
    "Title, badge, length, sizes of cells, share of prose"
    if not re.match(TITLE, all_cells[0].source):
        yield "the first cell is not `# Title`, an empty line, `> one sentence`"
    badge = rf"colab\.research\.google\.com/github/\S+/nbs/{path.stem}\.ipynb\)"
    if not re.search(badge, all_cells[1].source):
        yield f"the second cell is no Colab badge that opens {path.name}"
    if len(all_cells) > 80:
        yield f"{len(all_cells)} cells, 80 are allowed"
    code = [len(c.source.splitlines()) for c in all_cells if c.cell_type == "code"] or [0]
    if statistics.median(code) > 8:
        yield f"the median code cell has {statistics.median(code):g} lines, 8 are allowed"
    if max(code) > 40:
        yield f"a code cell of {max(code)} lines, 40 are allowed"
    prose = sum(c.cell_type == "markdown" for c in all_cells)/len(all_cells)
    if not .25 <= prose <= .6:
        yield f"{prose:.0%} of the cells are prose; it should be 25–60 %"


def paragraphs(text):
    "Paragraphs and list items of a markdown cell, links shown as a reader sees them"
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"\[([^\[\]]*)\]\([^()\s]*\)", r"\1", text)
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+[.)])\s)", text)
    return [p for p in parts if not NO_PARAGRAPH.match(p)]


def prose_faults(path, prose):
    "Paragraphs, figures, citations, words"
    text = "\n\n".join(c.source for c in prose)
    for p in paragraphs(text):
        if len(p) > 480:
            yield f"a paragraph of {len(p)} characters, 480 are allowed: {p.strip()[:50]}…"
    figures = re.findall(FIGURE, text)
    if not any(file.endswith(".svg") for _, file in figures):
        yield "no drawn figure: ![what it shows](figures/NAME.svg)"
    for alternative, file in figures:
        if not (path.parent/"figures"/file).is_file():
            yield f"figures/{file} does not exist"
        if not alternative.strip():
            yield f"figures/{file} has no alternative text"
    for citation in re.findall(CITATION, re.sub(LINK % "https?://", "", text)):
        yield f"a citation without a link: {citation}"
    yield from picture_faults(text, path.stem)


def picture_faults(text, stem):
    "The other word for an image, except in the phrase that this room is allowed"
    if stem in ALLOWED:
        text = re.sub(rf"\b{ALLOWED[stem]}\b", "", text)
    for found in re.findall(r".{,20}picture.{,20}", text, re.I):
        yield f"the word is image: …{found}…"


def navigation_faults(path, last):
    "The last cell leads back, to the index and on: ← [One](…) | [index](…) | [Other](…) →"
    stems = [p.stem for p in lesson_paths(path.parent.parent)]
    here = stems.index(path.stem)
    line = last.source.strip().splitlines()[-1]
    before, after = (stems[here-1:here], stems[here+1:here+2])
    ways = [rf"← \[[^\]]+\]\({s}\.ipynb\)" for s in before]
    ways += [r"\[index\]\(index\.ipynb\)"]
    ways += [rf"\[[^\]]+\]\({s}\.ipynb\) →" for s in after]
    if last.cell_type != "markdown" or not re.fullmatch(r" \| ".join(ways), line):
        wanted = [f"← [title]({s}.ipynb)" for s in before] + ["[index](index.ipynb)"]
        wanted += [f"[title]({s}.ipynb) →" for s in after]
        yield f"the last line is not {' | '.join(wanted)}"


def exercise_faults(prose):
    "Three exercises with folded solutions"
    text = "\n\n".join(c.source for c in prose)
    _, heading, rest = text.rpartition("## Exercises")
    if not heading:
        yield "no section ## Exercises"
    solutions = re.findall(r"<details>\s*<summary>.+?</summary>.*?</details>", rest, re.S)
    if len(solutions) < 3:
        yield f"{len(solutions)} folded solutions (<details><summary>…), 3 are needed"
    if re.search(r"</summary> *\n *\S", text):  # else its Markdown is shown as it is written
        yield "no empty line after a </summary>"


def lesson_faults(path):
    "All that is wrong with the form of a lesson"
    all_cells = cells(path)
    prose = [c for c in all_cells if c.cell_type == "markdown"]
    exported = [c for c in all_cells if c.cell_type == "code" and is_exported(c)]
    yield from outline_faults(path, all_cells)
    yield from prose_faults(path, prose)
    for cell in exported:
        yield from picture_faults(cell.source, path.stem)
    yield from navigation_faults(path, all_cells[-1])
    yield from exercise_faults(prose)
