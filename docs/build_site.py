"""Builds the site without a network and without running a notebook: `make site`.

    python docs/build_site.py            # into _site/
    python docs/build_site.py -o FOLDER

The pages are assembled first, in build/site: the notebooks of nbs/ with their stored outputs,
pages of the interface from the sources of t2i/, and the pages under docs/. Then Sphinx makes HTML.
"""
import argparse
import ast
import re
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import api_pages
import nbformat

root = Path(__file__).resolve().parent.parent
PARTS = {0: "Groundwork", 1: "Tokenizers", 2: "Guidance", 3: "Generators", 4: "Control",
         5: "Use", 6: "Play", 9: "The engine"}
BADGE = re.compile(r"\[!\[[^\]]*\]\(https://colab\.research\.google\.com/assets/[^)]*\)\]\(([^)]*)\)")
WAYS = re.compile(r"^(← \[.*|\[index\]\(index\.ipynb\).*|Next: \[.*)$", re.M)
LANGUAGE = dict(name="python", pygments_lexer="ipython3")


def repository():
    "Where files of the repository are seen on the web"
    config = ConfigParser(delimiters=["="])
    config.read(root/"settings.ini", encoding="utf-8")
    settings = config["DEFAULT"]
    return f"{settings['git_url']}/blob/{settings['branch']}"


# ---- Lessons


def open_details(text):
    "Folded solutions whose Markdown is read as such: an empty line after the summary"
    head = r"^( *)(<details>\s*<summary>.*?</summary>)[ \t]*\n?"
    text = re.sub(head, r"\1\2\n\n", text, flags=re.M)
    return re.sub(r"\n( *)</details>", r"\n\n\1</details>", text)


def page_text(text):
    "A Markdown cell as the site shows it"
    badge = BADGE.fullmatch(text.strip())
    if badge:
        notebook = badge[1].replace("colab.research.google.com/github", "github.com")
        return f"[Open in Colab]({badge[1]}) · [the notebook]({notebook})"
    text = BADGE.sub(r"[Colab](\1)", text)
    return open_details(WAYS.sub("", text)).strip()


def page_code(source):
    "A code cell without what is meant for nbdev; nothing if the reader is not to see it"
    lines = source.splitlines()
    marks = [line for line in lines if line.startswith("#|")]
    if any("hide" in mark or "default_exp" in mark for mark in marks):
        return ""
    return "\n".join(line for line in lines if not line.startswith("#|")).strip()


def only_imports(source):
    "Does a cell do nothing but import? The site folds it"
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a line of IPython
        return False
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def lesson_page(nb, module=""):
    "A notebook as a page: stored outputs, no badges, no bookkeeping; at its end a link to the API"
    kept = []
    for cell in nb.cells:
        is_code = cell.cell_type == "code"
        cell.source = page_code(cell.source) if is_code else page_text(cell.source)
        if is_code and only_imports(cell.source):
            cell.metadata["tags"] = ["hide-input"]
        if cell.source:
            kept.append(cell)
    if module:
        see = f"All of it: [`t2i.{module}`](../api/{module}.md)."
        kept.append(nbformat.v4.new_markdown_cell(see, id="interface"))
    nb.cells = kept
    nb.metadata = dict(language_info=LANGUAGE)
    return nb


def title_of(nb):
    "The title of a notebook"
    return nb.cells[0].source.splitlines()[0].removeprefix("# ")


def exported_module(nb):
    "The module that a notebook exports, or nothing"
    found = re.search(r"#\| default_exp ([\w.]+)", "\n".join(c.source for c in nb.cells))
    return found[1] if found else ""


def write_lessons(pages):
    "All notebooks; returns for each its title and module"
    (pages/"lessons").mkdir()
    shutil.copytree(root/"nbs"/"figures", pages/"lessons"/"figures")
    about = {}
    for path in sorted((root/"nbs").glob("[!.]*.ipynb")):
        nb = nbformat.read(path, 4)
        about[path.stem] = title_of(nb), exported_module(nb)
        nbformat.write(lesson_page(nb, about[path.stem][1]), pages/"lessons"/path.name)
    return about


# ---- The interface and the pages under docs/


def write_interface(pages, about):
    "A page per module, and their list"
    (pages/"api").mkdir()
    rows = []
    for stem, (title, module) in about.items():
        if not module:
            continue
        file = f"t2i/{module.replace('.', '/')}.py"
        source = (root/file).read_text(encoding="utf-8")
        lesson = f"[{title}](../lessons/{stem}.ipynb)"
        page = api_pages.module_page(module, source, f"{repository()}/{file}", lesson)
        (pages/"api"/f"{module}.md").write_text(page, encoding="utf-8")
        about_it = api_pages.cell(api_pages.read_module(source)[0])
        rows.append(f"| [t2i.{module}]({module}.md) | {about_it} |")
    listed = "\n".join(module for _, module in about.values() if module)
    text = (root/"docs"/"api.md").read_text(encoding="utf-8")
    table = "\n".join(["| module | what is in it |", "|---|---|", *rows])
    page = f"{text}\n{table}\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    (pages/"api"/"index.md").write_text(page, encoding="utf-8")


def write_howto(pages):
    "The how-to pages; what they link to in the repository is a page of the site here"
    (pages/"howto").mkdir()
    for path in (root/"docs"/"howto").glob("*.md"):
        text = path.read_text(encoding="utf-8").replace("](../../nbs/", "](../lessons/")
        for module in re.findall(r"\]\(\.\./\.\./t2i/([\w/]+)\.py\)", text):
            page = f"../api/{module.replace('/', '.')}.md"
            text = text.replace(f"../../t2i/{module}.py", page)
        (pages/"howto"/path.name).write_text(text, encoding="utf-8")


def toctree(caption, names):
    "A list of pages in the side bar"
    lines = "\n".join(names)
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n\n"


def write_front(pages, about):
    "The first page, with the order of all others"
    text = (root/"docs"/"index.md").read_text(encoding="utf-8")
    howto = sorted((root/"docs"/"howto").glob("*.md"))
    trees = [toctree("Begin", ["lessons/start"])]
    trees.append(toctree("How to", [f"howto/{p.stem}" for p in howto]))
    stems = [stem for stem in about if stem[:2].isdigit()]
    trees.append(toctree("The course", ["All lessons <lessons/index>"]))
    for digit, part in PARTS.items():
        names = [f"lessons/{stem}" for stem in stems if int(stem[0]) == digit]
        trees += [toctree(part, names)] if names else []
    trees.append(toctree("Reference", ["All modules <api/index>"]))
    (pages/"index.md").write_text(f"{text}\n{''.join(trees)}", encoding="utf-8")


def assemble(pages):
    "Write all pages into a new folder, for Sphinx to read"
    pages.mkdir(parents=True)
    about = write_lessons(pages)
    write_interface(pages, about)
    write_howto(pages)
    for image in (root/"docs").glob("*.png"):
        shutil.copy(image, pages/image.name)
    write_front(pages, about)


def build(pages, site, jobs=2):
    "Assemble and make HTML; the exit code of Sphinx, for which a warning is an error"
    shutil.rmtree(pages, ignore_errors=True)
    for folder in (site, pages.with_name("site-work")):
        shutil.rmtree(folder, ignore_errors=True)
    assemble(pages)
    work = pages.with_name("site-work")  # myst-nb writes images beside the folder of the pages
    options = ["-q", "-W", "--keep-going", "-j", str(jobs), "-d", work/"doctrees"]
    command = [sys.executable, "-m", "sphinx", "-b", "html", *options, "-c", root/"docs"]
    code = subprocess.run([str(word) for word in (*command, pages, work/"html")]).returncode
    shutil.move(work/"html", site)
    return code


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=root/"_site", help="a folder")
    args = parser.parse_args()
    start = time.perf_counter()
    code = build(root/"build"/"site", args.output.resolve())
    count = len(list(args.output.rglob("*.html")))
    print(f"{count} pages in {time.perf_counter()-start:.0f} s: {args.output}/index.html")
    sys.exit(code)


if __name__ == "__main__":
    main()
