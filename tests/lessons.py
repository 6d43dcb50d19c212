"""Runs the lessons and stores their outputs, with a fingerprint of what the outputs depend on.

    python tests/lessons.py                    # every lesson (`make lessons`)
    python tests/lessons.py 13_multiscale      # one (`make lessons LESSON=13_multiscale`)
    python tests/lessons.py --stale            # those whose fingerprint no longer fits
    python tests/lessons.py --check            # list them, run nothing

A lesson's fingerprint has three parts: its code cells; the modules of t2i that it imports, with all
that those import; and the bundled models and recipes that either of them names. It stands in the
notebook's metadata under `fingerprint`, which settings.ini allows nbdev_clean to keep.
"""
import argparse
import base64
import io
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from configparser import ConfigParser
from functools import cache
from hashlib import blake2b
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

import house
from house import bin_, root

ENVIRONMENT = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
WIDGET = "application/vnd.jupyter.widget-view+json"
TIMEOUT = 1800  # seconds per cell
LARGE = 80_000  # characters of a PNG in base64
COMMAND = r"""^\s*!.*\bt2i\b|\[["']t2i["']|-m["'], ["']t2i"""  # the command line, as a process


# ---- What a lesson's outputs depend on


def hash_of(*parts):
    "A short BLAKE2 hash of strings and bytes, in this order"
    h = blake2b(digest_size=8)
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        h.update(len(part).to_bytes(8, "big") + part)
    return h.hexdigest()


@cache
def without_comments(source):
    "The lines that do something: a comment, or a renamed notebook, makes no output stale"
    lines = [line.rstrip() for line in source.splitlines()]
    return "\n".join(line for line in lines if line.strip() and line.strip()[0] != "#")


def used_modules(code, root=root):
    "The modules of t2i that some code imports or starts, with all that those import"
    graph = house.package_imports(root)
    lazy = house.lazy_names(root)
    waiting = set()
    for cell in code:
        waiting |= house.imported_modules(house.plain_code(cell), graph, lazy)
        for name in re.findall(r"\bt2i(?:\.\w+)+", cell):  # as a recipe names a task
            waiting |= house.imported_modules(f"import {name}", graph, lazy)
        if re.search(COMMAND, cell, re.M):
            waiting.add("cli")
    used = set()
    while waiting:
        name = waiting.pop()
        if name in graph and name not in used:
            used.add(name)
            waiting |= graph[name]
    return sorted(used)


# of a model; they count where code names them
RECORDS = ("scores.json", "ablation.jsonl", "preferences.jsonl")


@cache
def names_in(text, names):
    "Those of some names that stand in a text as words of their own"
    found = {name for name in names if name in text}
    return {name for name in found if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)}


def bundled_files(texts, root=root):
    "The files of the bundled models and recipes that texts name, and of those models' parts"
    folder = root/"t2i"/"pretrained"
    names = {p.name for p in folder.glob("*")} | {p.stem for p in (root/"t2i/recipes").glob("*")}
    names = frozenset(names)
    found = set()
    waiting = list(texts)
    while waiting:
        new = names_in(waiting.pop(), names) - found
        waiting += [p.read_text() for name in new for p in (folder/name).glob("*index.json")]
        found |= new
    files = [root/"t2i"/"recipes"/f"{name}.yaml" for name in found]
    everything = "\n".join(texts)
    unread = {"README.md", *(name for name in RECORDS if name not in everything)}
    files += [p for name in found for p in (folder/name).rglob("*") if p.name not in unread]
    return sorted(p for p in files if p.is_file())


def fingerprint(nb, root=root):
    "The hashes of code cells, package and bundled models that a notebook's outputs stand on"
    code = [c.source for c in nb.cells if c.cell_type == "code"]
    modules = house.module_paths(root)
    used = used_modules(code, root)
    package = [without_comments(modules[name].read_text(encoding="utf-8")) for name in used]
    files = bundled_files(code + package, root)
    models = [part for p in files for part in (p.relative_to(root).as_posix(), p.read_bytes())]
    return dict(code=hash_of(*code), package=hash_of(*used, *package), models=hash_of(*models))


def stale(path, root=root):
    "Why a notebook's outputs are not those of its code, package and models; empty if they are"
    nb = nbformat.read(path, 4)
    stored = nb.metadata.get("fingerprint")
    if not stored:
        return "has never been run"
    changed = [k for k, v in fingerprint(nb, root).items() if stored.get(k) != v]
    return ", ".join(changed) and f"changed: {', '.join(changed)}"


# ---- Running


def settings(root=root):
    "What settings.ini says"
    config = ConfigParser(delimiters=["="])
    config.read(root/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def runs(cell, flags):
    "Is this a code cell that nbdev_test would run, too, with these flags set aside?"
    if cell.cell_type != "code" or "nbdev_export(" in cell.source:
        return False
    found = house.directives(cell)
    idle = any(re.match(r"eval:\s*false", d, re.I) for d in found)
    return not idle and not any(flags & set(d.split()[:1]) for d in found)


def small_png(data):
    "A PNG in base64; a large one with a palette of 256 colours, a third of the size"
    if len(data) < LARGE:
        return data
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def tidy(cell):
    "Drops what differs from run to run: counts, warnings, live widgets, this machine's folders"
    cell.execution_count = None
    kept = []
    for output in cell.outputs:
        if "execution_count" in output:
            output.execution_count = None
        if "text" in output:
            output.text = output.text.replace(str(root), "…")
        if "data" in output:
            output.data.pop(WIDGET, None)
            if "image/png" in output.data:  # PIL offers a JPEG of the same image, too
                output.data.pop("image/jpeg", None)
        for kind, value in output.get("data", {}).items():
            if kind == "image/png":
                output.data[kind] = small_png(value)
            elif isinstance(value, str):
                output.data[kind] = value.replace(str(root), "…")
        if output.get("name") != "stderr" and output.get("data") != {}:
            kept.append(output)
    cell.outputs = kept


def execute(nb, folder, flags):
    "Runs the cells in a fresh kernel that stands in `folder`; returns what stopped it, or nothing"
    env = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "IN_TEST")} | ENVIRONMENT
    options = dict(timeout=TIMEOUT, store_widget_state=False, record_timing=False)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(nb, kernel_name="python3", resources=resources, **options)
    client.coalesce_streams = True
    client.extra_arguments = ["--log-level=ERROR"]
    client.reset_execution_trackers()
    with client.setup_kernel(env=env):
        for i, cell in enumerate(nb.cells):
            if not runs(cell, flags):
                continue
            try:
                client.execute_cell(cell, i)
            except CellExecutionError as e:
                return f"cell {i} stopped: {e.ename}: {e.evalue}"
            except (CellTimeoutError, DeadKernelError) as e:
                return f"cell {i} stopped: {e}"
            tidy(cell)
    return ""


def sources(nb):
    return [(c.cell_type, c.source) for c in nb.cells]


def clean(path, root=root):
    "Brings a notebook into the form that nbdev_clean leaves"
    subprocess.run([bin_/"nbdev_clean", "--fname", path], cwd=root, check=True)


def run(path, root=root):
    "Runs a notebook and stores outputs and fingerprint; a notebook that stops stays as it is"
    if "fingerprint" not in settings(root).get("allowed_metadata_keys", "").split():
        raise SystemExit("settings.ini needs the line: allowed_metadata_keys = fingerprint")
    start = time.perf_counter()
    nb = nbformat.read(path, 4)
    before = sources(nb)
    nb.metadata["fingerprint"] = fingerprint(nb, root)
    flags = set(settings(root)["tst_flags"].split()) - {"slow"}  # too slow for a test, not for this
    problem = execute(nb, path.parent, flags)
    if not problem and sources(nbformat.read(path, 4)) != before:
        problem = "was edited while it ran: run it again"
    if not problem:
        temporary = path.with_name(f".{path.stem}.tmp")
        nbformat.write(nb, temporary)
        os.replace(temporary, path)
        clean(path, root)
    return problem, time.perf_counter() - start


# ---- The command


def chosen(names, everything):
    "The notebooks of these names, which may be stems or paths; all if no name is given"
    known = {p.stem: p for p in everything}
    stems = [Path(n).stem for n in names]
    unknown = [s for s in stems if s not in known]
    if unknown:
        raise SystemExit(f"no lesson {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[s] for s in stems] or everything


def run_all(paths, jobs):
    "Runs notebooks side by side, a line of progress each; returns how many stopped"
    stopped = 0
    with ProcessPoolExecutor(jobs) as pool:
        waiting = {pool.submit(run, p): p for p in paths}
        for done in as_completed(waiting):
            problem, seconds = done.result()
            stopped += bool(problem)
            print(f"{waiting[done].stem:24} {seconds:6.1f} s  {problem}".rstrip(), flush=True)
    return stopped


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", help="stems such as 13_multiscale; none means all")
    parser.add_argument("--check", action="store_true", help="list stale lessons, run nothing")
    parser.add_argument("--stale", action="store_true", help="run only stale lessons")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="lessons side by side")
    args = parser.parse_args()
    paths = chosen(args.lessons, house.notebook_paths())
    if args.check or args.stale:
        reasons = {p: stale(p) for p in paths}
        paths = [p for p in paths if reasons[p]]
    if args.check:
        for p in paths:
            print(f"{p.stem:24} {reasons[p]}")
        print(f"{len(paths)} of {len(reasons)} lessons are stale")
        return bool(paths)
    return bool(run_all(paths, args.jobs))


if __name__ == "__main__":
    sys.exit(main())
