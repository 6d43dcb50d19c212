"The widgets of the playground in JupyterLab, in a browser: each control is moved by hand."
import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from browser import FLAGS, find_chromium
from house import root

CHROMIUM = find_chromium()
PATIENCE = 120_000  # milliseconds until a wait gives up; nothing waits longer than it must

if CHROMIUM is None:
    pytest.skip("no playwright or no Chromium: see CONTRIBUTING.md", allow_module_level=True)
if find_spec("jupyterlab") is None:
    pytest.skip("jupyterlab is not here: pip install 't2i[dev]'", allow_module_level=True)

from playwright.sync_api import expect, sync_playwright  # noqa: E402

pytestmark = pytest.mark.slow  # a JupyterLab, a kernel and six widgets: `make test-slow`

CELLS = """
import t2i
pipe = t2i.load("shapes-var", "cpu")
adapter = t2i.load("shapes-adapter", "cpu")
prompt = "a large red circle left of a small blue star on a gray background"
image = pipe(prompt, seed=0, num_steps=1).images[0]
---
t2i.explore_codes(pipe.tokenizer, image)
---
t2i.play_scales(pipe, prompt, num_steps=1)
---
t2i.guidance_sliders(pipe, prompt, images=1, num_steps=1)
---
t2i.adapter_sliders(adapter, "a large green ring on a pink background", images=1)
---
t2i.word_attention(pipe, prompt, num_steps=1)
---
t2i.prompt_box(pipe, prompt, candidates=4, keep=2, num_steps=1)
"""
CODES, SCALES, GUIDANCE, ADAPTER, WORDS, PROMPT = range(1, 7)  # numbers of the cells
SETTINGS = {
    "notebook-extension/tracker": dict(windowingMode="none"),  # cells out of sight are drawn, too
    "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
}
IDLE = """() => {
    const widget = window.jupyterapp?.shell.currentWidget
    return widget?.sessionContext?.session?.kernel?.status === "idle"
}"""
PIXELS = """image => {
    const canvas = document.createElement("canvas")
    canvas.width = image.naturalWidth
    canvas.height = image.naturalHeight
    canvas.getContext("2d").drawImage(image, 0, 0)
    return image.naturalWidth && canvas.toDataURL()
}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    "The address of a notebook in a JupyterLab of its own"
    from t2i.page import free_port
    folder, token = tmp_path_factory.mktemp("lab"), secrets.token_hex()
    port = free_port("127.0.0.1", 0)
    server_url, log = f"http://127.0.0.1:{port}", folder/"log.txt"
    cells = [new_code_cell(source.strip()) for source in CELLS.split("---")]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3"))
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder/"play.ipynb")
    for name, values in SETTINGS.items():
        path = folder/"settings"/"@jupyterlab"/f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    own = {f"JUPYTER_{name}_DIR": str(folder/name) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= dict(JUPYTERLAB_SETTINGS_DIR=str(folder/"settings"), IPYTHONDIR=str(folder/"ipython"),
                PYTHONPATH=str(root), HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    options = [f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}", "--ip=127.0.0.1",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--no-browser",
               "--allow-root", "--expose-app-in-browser"]
    with open(log, "w") as file:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=folder,
                                  env=os.environ | own, stdout=file, stderr=file)
    try:
        wait_for_server(server, f"{server_url}/api/status?token={token}", log)
        yield f"{server_url}/lab/tree/play.ipynb?token={token}"
    finally:
        server.terminate()  # it ends its kernels
        server.wait(60)


def wait_for_server(server, address, log):
    "Until it answers, or has ended"
    end = time.monotonic() + PATIENCE/1000
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=10).read()
        except OSError:
            time.sleep(.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def tab(url):
    "A browser's tab in which the notebook was run, and the addresses that it asked for"
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_context(viewport=dict(width=1400, height=1000)).new_page()
        tab.set_default_timeout(PATIENCE)
        tab.asked = []
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.goto(url)
        tab.wait_for_function(IDLE)
        tab.evaluate("jupyterapp.commands.execute('notebook:run-all-cells').then(() => 0)")
        yield tab
        browser.close()


class Cell:
    "A cell with a widget"
    def __init__(self, tab, number):
        self.tab = tab
        self.at = tab.locator(".jp-CodeCell").nth(number)
        self.image = self.at.locator("img.t2i-pixels")
        self.image.wait_for()
        self.seen = self.pixels(None)

    def pixels(self, old):
        "The image, as soon as it is another one"
        end = time.monotonic() + PATIENCE/1000
        while time.monotonic() < end:
            found = self.image.evaluate(PIXELS)
            if found and found != old:
                return found
            self.tab.wait_for_timeout(50)
        raise AssertionError(f"the image did not change; {self.at.inner_text()[-400:]}")

    def changed(self):
        self.seen = self.pixels(self.seen)

    def drag(self, label, share):
        "Drag the handle of a slider to a place of its track, from 0 to 1"
        row = self.at.locator(".widget-slider").filter(has_text=label)
        row.scroll_into_view_if_needed()
        track = row.locator(".noUi-target").bounding_box()
        handle = row.locator(".noUi-handle").bounding_box()
        mouse, y = self.tab.mouse, handle["y"] + handle["height"]/2
        mouse.move(handle["x"] + handle["width"]/2, y)
        mouse.down()
        mouse.move(track["x"] + share*track["width"], y, steps=4)
        mouse.up()


def test_codes(tab):
    cell = Cell(tab, CODES)
    assert cell.image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    cell.drag("map", .4)  # of 1 to 6: map 3
    cell.changed()
    buttons = cell.at.locator(".jupyter-button")
    expect(buttons).to_have_count(9)
    code = cell.at.locator("input[type=number]").first
    other = next(b for b in buttons.all() if b.inner_text() != code.input_value())
    other.click()
    cell.changed()
    expect(code).to_have_value(other.inner_text())


@pytest.mark.parametrize("number, moves", [
    (SCALES, {"resample map": .35, "with seed": .8, "after map": .5}),
    (GUIDANCE, {"guidance": .05, "temperature": .6, "seed": .5}),
    (ADAPTER, {"alpha": .9, "beta": .1, "seed": .5}),
    (WORDS, {"block": .7, "map": .6}),
    (PROMPT, {"candidates": .3, "seed": .5}),
])
def test_sliders(tab, number, moves):
    cell = Cell(tab, number)
    for label, share in moves.items():
        cell.drag(label, share)
        cell.changed()


def test_words_prompts_and_errors(tab):
    words = Cell(tab, WORDS)
    words.at.locator("select").select_option(label="10. star")
    words.changed()
    words.at.get_by_text(re.compile('"star" gets .*% of the attention')).wait_for()

    prompt = Cell(tab, PROMPT)
    prompt.at.locator("input[type=text]").fill("a purple square on a teal background")
    prompt.at.locator("input[type=text]").press("Enter")
    prompt.changed()
    prompt.at.locator("input[type=text]").fill("")
    prompt.at.locator("input[type=text]").press("Enter")
    prompt.at.get_by_text("the prompt is empty").wait_for()

    adapter = Cell(tab, ADAPTER)
    adapter.drag("alpha", 0)
    adapter.changed()
    adapter.drag("beta", 0)
    adapter.at.get_by_text("alpha and beta are both 0").wait_for()
    assert adapter.image.evaluate(PIXELS) == adapter.seen  # the last image stays
    assert not tab.locator("[data-mime-type*=stderr], [data-mime-type*=error]").count()


def test_nothing_from_elsewhere(tab, url):
    elsewhere = [a for a in tab.asked if not a.startswith((url.split("/lab")[0], "data:", "blob:"))]
    assert not elsewhere, elsewhere
