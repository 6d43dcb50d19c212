"The page of `t2i app` in a browser: drawn, placed, looked at, painted over, refused."
import re
import shutil
from importlib.util import find_spec

import pytest
from PIL import Image

from browser import FLAGS, find_chromium
from t2i.outputs import read_about

CHROMIUM = find_chromium()
PATIENCE = 300_000  # milliseconds until a wait gives up; nothing waits longer than it must

if find_spec("gradio") is None:
    pytest.skip("gradio is not here: pip install 't2i[app]'", allow_module_level=True)
if CHROMIUM is None:
    pytest.skip("no playwright or no Chromium: see CONTRIBUTING.md", allow_module_level=True)

from playwright.sync_api import expect, sync_playwright  # noqa: E402


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A model in a folder, which may be removed"
    from t2i.engine.files import bundled_folder
    return shutil.copytree(bundled_folder("digits-var"), tmp_path_factory.mktemp("own")/"mine")


@pytest.fixture(scope="module")
def url(own):
    from t2i.page import open_page
    _, url, close = open_page([str(own)], first="digits-var", port=0, device="cpu")
    yield url
    close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def open_tab(browser, url):
    "A visitor's tab, and a list of the addresses that it asks for"
    tab = browser.new_context(viewport=dict(width=1400, height=1000)).new_page()
    tab.set_default_timeout(PATIENCE)
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(url)
    tab.get_by_role("button", name="Draw", exact=True).wait_for()
    return tab, asked


def draw(tab, prompt, seed):
    "Draw four images"
    tab.get_by_label("Prompt", exact=True).fill(prompt)
    tab.get_by_label("Seed").first.fill(str(seed))
    tab.get_by_role("button", name="Draw", exact=True).click()


def wait_for_line(tab, text):
    "Wait until the visible line contains a text"
    line = tab.locator(".line textarea").locator("visible=true")
    expect(line).to_have_value(re.compile(re.escape(text)), timeout=PATIENCE)


def test_draw_look_and_edit(browser, url, tmp_path):
    tab, asked = open_tab(browser, url)
    draw(tab, "a handwritten seven", 3)
    wait_for_line(tab, "t2i generate 'a handwritten seven' -m digits-var -n 4 ")

    with tab.expect_download() as download:  # the file carries its settings
        tab.locator("a[download]").locator("visible=true").first.click()
    download.value.save_as(tmp_path/"seven.png")
    about = read_about(tmp_path/"seven.png")
    assert about["prompt"] == "a handwritten seven" and about["seed"] == "3"

    tab.get_by_role("tab", name="Tokens and scales").click()
    tab.get_by_role("button", name="Show how the image").click()
    wait_for_line(tab, "Image 1 of 4: a handwritten seven")
    tab.get_by_text("map 4: 16 tokens").first.wait_for()

    tab.get_by_role("tab", name="Edit").click()
    tab.get_by_role("button", name="Take the image").click()
    wait_for_line(tab, "Paint over")
    tab.locator("#canvas canvas").first.wait_for()
    tab.get_by_label("What the painted part").fill("a handwritten zero")
    tab.get_by_role("button", name="Draw anew").click()
    wait_for_line(tab, "nothing is painted")
    box = tab.locator("#canvas canvas").first.bounding_box()
    x, y = box["x"]+box["width"]/2, box["y"]+box["height"]/2
    tab.mouse.move(x-20, y-40)
    tab.mouse.down()
    tab.mouse.move(x+20, y+40, steps=8)
    tab.mouse.up()
    tab.get_by_role("button", name="Draw anew").click()
    wait_for_line(tab, "Seed ")
    elsewhere = [a for a in asked if not a.startswith((url, "data:", "blob:"))]
    assert not elsewhere, elsewhere


def test_bad_prompts_and_two_visitors(browser, url):
    first, _ = open_tab(browser, url)
    second, _ = open_tab(browser, url)
    draw(first, "  ", 0)
    wait_for_line(first, "the prompt is empty")
    draw(first, "a handwritten one", 1)
    draw(second, "a handwritten two", 2)
    wait_for_line(first, "t2i generate 'a handwritten one' -m digits-var")
    wait_for_line(second, "t2i generate 'a handwritten two' -m digits-var")
    first.get_by_role("tab", name="Tokens and scales").click()
    first.get_by_role("button", name="Show how the image").click()
    wait_for_line(first, "a handwritten one")  # each has his own


def test_a_file_that_is_no_image(browser, url, tmp_path):
    tab, _ = open_tab(browser, url)
    (tmp_path/"fake.png").write_text("no image")
    Image.new("RGB", (40, 30), "red").save(tmp_path/"real.png")
    tab.get_by_role("tab", name="Edit").click()
    tab.locator("#canvas input[type=file]").first.set_input_files(tmp_path/"fake.png")
    wait_for_line(tab, "fake.png is no image that can be read: open another file")
    run = tab.get_by_role("button", name="Draw anew")
    for prompt, why in ((" ", "the prompt is empty"), ("a zero", "fake.png is no image")):
        tab.get_by_label("What the painted part").fill(prompt)
        run.click()
        wait_for_line(tab, why)
    tab.locator("#canvas input[type=file]").first.set_input_files(tmp_path/"real.png")
    wait_for_line(tab, "Paint over")
    run.click()
    wait_for_line(tab, "nothing is painted")


def drag(tab, phrase, start, end):
    "Drag the mouse over the square for boxes, between two places from 0 to 1"
    tab.get_by_label("What the next box shows").fill(phrase)
    at = tab.locator("#square img").bounding_box()
    tab.mouse.move(at["x"] + start[0]*at["width"], at["y"] + start[1]*at["height"])
    tab.mouse.down()
    tab.mouse.move(at["x"] + end[0]*at["width"], at["y"] + end[1]*at["height"], steps=4)
    tab.mouse.up()


def choose_model(tab, name):
    "Take another model of the list"
    tab.get_by_label("Model").click()
    tab.get_by_role("option", name=name, exact=True).click()


def test_boxes_are_drawn_by_mouse(browser, url, tmp_path):
    tab, _ = open_tab(browser, url)
    tab.get_by_role("tab", name="Boxes").click()
    text, square = tab.get_by_label("Boxes: PHRASE"), tab.locator("#square img")
    run, empty = tab.get_by_role("button", name="Draw into the boxes"), square.get_attribute("src")
    run.click()
    wait_for_line(tab, "there is no box yet")
    drag(tab, " ", (.1, .1), (.4, .4))
    wait_for_line(tab, "which says what a box shows, is empty")
    drag(tab, "red circle", (.1, .1), (.11, .4))
    wait_for_line(tab, "is too thin")

    drag(tab, "red circle", (.4, .4), (.1, .1))  # from any corner
    expect(text).to_have_value(re.compile("red circle:0[.](1|09)[0-9]*,[0-9.]+,[0-9.]+,[0-9.]+"))
    drag(tab, "blue star", (.5, .5), (1.2, .9))  # a box ends at the edge of the square
    wait_for_line(tab, "Boxes: 2 of at most 8")
    expect(text).to_have_value(re.compile("\nblue star:0[.][0-9]+,0[.][0-9]+,1,0[.][0-9]+$"))
    tab.get_by_role("button", name="Undo the last box").click()
    wait_for_line(tab, "Boxes: 1 of at most 8")
    expect(text).to_have_value(re.compile("^red circle:[0-9.,]+$"))
    tab.get_by_role("button", name="Remove all boxes").click()
    expect(square).to_have_attribute("src", empty)

    text.fill("red circle:0.1,0.1,0.4")  # typed
    text.blur()
    wait_for_line(tab, "must be four numbers")
    text.fill("red circle:0.1,0.1,0.4,0.4")
    text.blur()
    wait_for_line(tab, "Boxes: 1 of at most 8")
    assert square.get_attribute("src") != empty
    run.click()
    wait_for_line(tab, "this model takes no boxes: load shapes-boxes")
    choose_model(tab, "shapes-var")
    run.click()
    wait_for_line(tab, "--box 'red circle:0.1,0.1,0.4,0.4' -m shapes-boxes")


def test_a_model_that_is_removed_and_a_taken_port(browser, url, own):
    from t2i.page import open_page
    tab, _ = open_tab(browser, url)
    choose_model(tab, str(own))
    draw(tab, "a handwritten one", 1)
    wait_for_line(tab, f"-m {own}")
    shutil.rmtree(own)
    draw(tab, "a handwritten one", 2)
    wait_for_line(tab, f"the model {own} was removed: choose another one")
    choose_model(tab, "digits-var")
    draw(tab, "a handwritten one", 1)
    wait_for_line(tab, "-m digits-var")
    choose_model(tab, str(own))
    wait_for_line(tab, f"the model {own} was removed: choose another one")
    assert not tab.locator(".toast-body").count()
    choose_model(tab, "digits-var")
    draw(tab, "a handwritten one", 3)
    wait_for_line(tab, "-m digits-var")
    draw(tab, "a handwritten one", "soon")
    wait_for_line(tab, "the seed must be a whole number or empty, not 'soon'")
    port = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(ValueError, match=f"cannot open port {port}.*try another --host or --port"):
        open_page(first="digits-var", port=port)
