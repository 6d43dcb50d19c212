"The site: its links, its commands, its pages of the interface; one slow test builds all of it."
import ast
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
import typer

import house
from house import root

sys.path.append(str(root/"docs"))
import api_pages  # noqa: E402
import build_site  # noqa: E402

HOWTO = sorted((root/"docs"/"howto").glob("*.md"))
TEXTS = [root/name for name in ("README.md", "CONTRIBUTING.md", "data/README.md", "docs/index.md")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "All pages as Sphinx reads them"
    folder = tmp_path_factory.mktemp("site")/"pages"
    build_site.assemble(folder)
    return folder


# ---- Links


def markdown(path):
    "The Markdown of a page or of a notebook, without code"
    if path.suffix == ".ipynb":
        text = "\n\n".join(c.source for c in house.cells(path, "markdown"))
    else:
        text = path.read_text(encoding="utf-8")
    text = re.sub(r"^ *(`{3,})(?!\{py:).*?^ *\1 *$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def links(text):
    "What links and images point to, within the site or repository"
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [link for link in found if not re.match(r"\w+:", link)]


def anchors(text):
    "The anchors of headings, as GitHub and MyST make them"
    found = set()
    for heading in re.findall(r"^#{1,6} +(.*)$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-"))
    return found


def dead_links(path, base):
    "Links of a file that lead to no file or heading; `base` is what they may not leave"
    text = markdown(path)
    for link in links(text):
        file, anchor = urldefrag(unquote(link))
        target = (path.parent/file).resolve() if file else path
        if not target.exists() or not target.is_relative_to(base.resolve()):
            yield f"{path.name}: {link}"
        elif anchor and target.suffix in (".md", ".ipynb"):
            if anchor not in anchors(markdown(target)):
                yield f"{path.name}: {link} (no such heading)"


def test_links_of_the_pages(pages):
    files = [*pages.rglob("*.md"), *pages.rglob("*.ipynb")]
    assert len(files) > 130 and sum(len(links(markdown(p))) for p in files) > 600
    dead = [fault for path in files for fault in dead_links(path, pages)]
    assert not dead, "\n".join(dead)


@pytest.mark.parametrize("path", [*TEXTS[:3], root/"CHANGELOG.md", *HOWTO], ids=lambda p: p.name)
def test_links_of_the_repository(path):
    dead = list(dead_links(path, root))
    assert not dead, "\n".join(dead)


def test_planted_dead_links_are_found(tmp_path):
    (tmp_path/"b.md").write_text("# A heading, here\n")
    text = ("[1](b.md) [2](b.md#a-heading-here) [3](c.md) [4](b.md#none) [5](../x.md) `[6](c.md)`\n"
            "![7](d.svg) <img src=\"e.png\"> [8](https://a.b) [9](#own)\n\n## Own\n\n"
            "```\n[10](f.md)\n```\n")
    (tmp_path/"a.md").write_text(text)
    (tmp_path.parent/"x.md").write_text("")
    found = list(dead_links(tmp_path/"a.md", tmp_path))
    assert [f.split()[1] for f in found] == ["c.md", "b.md#none", "../x.md", "d.svg", "e.png"]


# ---- Commands


def shell_commands(path):
    "The commands `t2i …` of a page, as lists of words"
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "-m" in words[:-1] and words[words.index("-m")+1] == "t2i":  # of torchrun
                yield words[words.index("-m")+2:]
            elif words and words[0] == "t2i":
                yield words[1:]


def parse(words):
    "The values that the command line reads from words; a usage error names what is wrong"
    from t2i.cli import app
    command, path = typer.main.get_command(app), "t2i"
    while hasattr(command, "commands"):
        path, words = f"{path} {words[0]}", words[1:]
        command = command.commands[path.split()[-1]]
    return path, command.make_context(path, list(words)).params


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder in which the how-to pages' own files lie: photos, stripes.py, average.yaml and so on"
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(root/"data"/"sample"/"txt", folder/"my-photos")
    shutil.copytree(root/"data"/"sample"/"txt", folder/"my-images")
    (folder/"my-shards").mkdir()
    for path in HOWTO:
        for block in re.findall(r"^```\w+\n(# [\w.]+\n.*?)^```", path.read_text(), re.M | re.S):
            name = block.splitlines()[0].removeprefix("# ")
            (folder/name).write_text(block)
    return folder


@pytest.mark.parametrize("path", [*TEXTS, *HOWTO], ids=lambda p: p.stem)
def test_commands_of_the_pages(path, desk, monkeypatch):
    from t2i.engine.recipes import load_recipe
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(desk)
    commands = list(shell_commands(path))
    assert commands or path.stem in ("CONTRIBUTING", "index")
    for words in commands:
        name, values = parse(words)
        fields = tuple(values.get("overrides") or ())
        recipe = values.get("recipe") or values.get("model")
        trains = name == "t2i train" or (fields and name in ("t2i info", "t2i data cache"))
        if trains and not values.get("resume"):
            config = load_recipe(recipe, fields).config  # an unknown field is an error
            parts = config.train.accumulate*config.train.devices
            assert config.train.batch_size%parts == 0, words


@pytest.mark.parametrize("words, fault", [
    ("generate 'a red circle' --steps 3", "No such option"),
    ("train text-var --show=3 --resum", "No such option|does not take a value"),
    ("evaluate", "Missing parameter|Missing argument"),
    ("generate x -n many", "valid integer"),
])
def test_planted_wrong_commands_are_found(words, fault):
    with pytest.raises(Exception, match=fault):
        parse(shlex.split(words))


def test_own_dataset_and_task_train(desk, monkeypatch):
    from t2i.data.datasets import DataConfig, load_dataset
    from t2i.training import train
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(desk)
    config = DataConfig("stripes.Stripes", resolution=32)
    data, held_out = load_dataset(config), load_dataset(config, "val")
    assert len(data) == 6 and len(held_out) == 4
    image = data[3]["image"]
    assert image.shape == (3, 32, 32) and image.min() == -1 and image.max() == 1
    assert data[3]["caption"] == "level stripes of 4 pixels"
    assert (image == image[:, :, :1]).all() and not (image == image[:, :1]).all()
    short = ("train.steps=2", "train.batch_size=4", "train.workers=0", "train.val_batches=1")
    folder = train("average.yaml", desk/"runs"/"average", (*short, "width=4"))
    lines = (folder/"metrics.jsonl").read_text().splitlines()
    assert any("error" in line for line in lines)


# ---- Pages of the interface

SOURCE = '''"What the module is for."
__all__ = ["join", "Box", "SIZE", "elsewhere"]
SIZE = 3  # pixels


def join(
    a:Tensor,  # first, (n,d)
    b:int|None=None, c:str="x",  # how
    *more:Tensor, # others
    dim=0,
)->Tensor:     # all in one
    "Put together | in a row"
    return a  # not this


def _hidden():
    "Not exported"


@dataclass
class Box:
    "A box"
    left:float=0.  # of its edge, pixels
    right:float=1.

    def area(self)->float:  # pixels
        "Width times height"

    def _own(self):
        "Nobody's business"
'''


def test_read_module():
    text, (size, join, box), others = api_pages.read_module(SOURCE)
    assert others == ["elsewhere"]
    assert text == "What the module is for."
    assert (size.name, size.what, size.text) == ("SIZE", "data", "pixels")
    rows = [(p.name, p.kind, p.default, p.comment) for p in join.parameters]
    assert rows == [
        ("a", "Tensor", "", "first, (n,d)"), ("b", "int | None", "None", ""),
        ("c", "str", "'x'", "how"), ("*more", "Tensor", "", "others"), ("dim", "", "0", "")]
    assert join.returns.kind == "Tensor" and join.returns.comment == "all in one"
    assert join.signature.startswith("(a: Tensor, b: int | None = None, c: str = 'x', *more")
    assert (box.what, box.signature) == ("class", "(left: float = 0.0, right: float = 1.0)")
    assert [m.name for m in box.members] == ["area"]
    assert box.members[0].returns.comment == "pixels"
    page = api_pages.module_page("boxes", SOURCE, "https://a.b/boxes.py", "[Boxes](x.ipynb)")
    assert "| `a` | `Tensor` |  | first, (n,d) |" in page and "_hidden" not in page
    assert f"[source](https://a.b/boxes.py#L{join.first}-L{join.last})" in page
    assert SOURCE.splitlines()[join.first-1].startswith("def join")


def test_every_public_name_has_its_place(pages):
    for name in house.rooms():
        path = house.module_paths()[name]
        page = (pages/"api"/f"{name}.md").read_text(encoding="utf-8")
        shown = set(re.findall(r"^`+\{py:(?:function|class|data)\} (\w+)", page, re.M))
        shown |= set(re.findall(r"`(\w+)`", "".join(re.findall(r"^Also here.*", page, re.M))))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                assert set(ast.literal_eval(node.value)) == shown, name


def test_equations_become_mathml(pages):
    from latex2mathml.converter import convert
    count = 0
    for path in (pages/"lessons").glob("*.ipynb"):
        text = markdown(path)
        found = re.findall(r"\$\$(.+?)\$\$", text, re.S)
        found += re.findall(r"\$([^$\n]+)\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.S))
        for equation in found:
            assert "\\" not in convert(equation), f"{path.stem}: {equation}"
        count += len(found)
    assert count > 500


def test_lessons_lose_bookkeeping_alone(pages):
    for path in house.notebook_paths():
        nb = nbformat.read(pages/"lessons"/path.name, 4)
        text = "\n".join(c.source for c in nb.cells)
        assert "assets/colab-badge" not in text and "%pip" not in text, path.stem
        before = [o for c in house.cells(path, "code") for o in c.outputs
                  if "hide" not in " ".join(house.directives(c))]
        after = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
        assert len(after) == len(before), path.stem


# ---- The whole site


class References(HTMLParser):
    "Links, images and scripts of a page, and its anchors"
    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("img", "script", "iframe", "source") and found.get("src"):
            self.loaded.append(found["src"])
        elif tag == "link" and found.get("href") and found.get("rel") != "canonical":
            self.loaded.append(found["href"])


def html_faults(site):
    "Dead links within the site, and all that a page would load from elsewhere"
    parsed = {p: References(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    for path, page in parsed.items():
        outside = [url for url in page.loaded if re.match(r"(https?:)?//", url)]
        yield from (f"{path.name} loads {url}" for url in outside)
        inner = [url for url in page.links + page.loaded if not re.match(r"(\w+:|//)", url)]
        for url in inner:
            file, anchor = urldefrag(unquote(url))
            target = (path.parent/file.split("?")[0]).resolve() if file else path
            if not target.is_file():
                yield f"{path.name}: {url}"
            elif anchor and target in parsed and anchor not in parsed[target].ids:
                yield f"{path.name}: {url} (no such place)"


@pytest.mark.slow
def test_the_site_builds_without_dead_links(tmp_path):
    command = [sys.executable, root/"docs"/"build_site.py", "-o", tmp_path/"site"]
    p = subprocess.run([str(w) for w in command], capture_output=True, text=True, cwd=root)
    assert p.returncode == 0, p.stderr[-5000:]
    site = tmp_path/"site"
    assert len(list(site.rglob("*.html"))) > 130
    faults = list(html_faults(site))
    assert not faults, "\n".join(faults[:50])
    assert "fold_in" in (site/"searchindex.js").read_text(encoding="utf-8")
    page = (site/"lessons"/"00_core.html").read_text(encoding="utf-8")
    assert "<math" in page and "MathJax" not in page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", style.read_text()), style.name


def test_planted_faults_of_html_are_found(tmp_path):
    (tmp_path/"a.html").write_text(
        '<p id="x"><a href="#x">1</a><a href="#y">2</a><a href="b.html">3</a><a href="c.html">4</a>'
        '<script src="https://cdn.example/x.js"></script><img src="b.html?v=1">')
    (tmp_path/"b.html").write_text("")
    assert len(list(html_faults(tmp_path))) == 3
