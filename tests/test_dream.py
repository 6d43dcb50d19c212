"Prompts, stories and settings of VQGAN+CLIP: what is read, and what is refused."
import json

import pytest
from PIL import Image

from t2i.guidance.dream import parse_prompt, read_story
from t2i.guidance.vqgan_clip import VQGANCLIPConfig, make_config


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.avif", "a.jfif", "a", "a: 12:30.png", "á b"])
@pytest.mark.parametrize("weight", ["", ":2"])
def test_a_file_that_exists_is_an_image(tmp_path, monkeypatch, name, weight):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9), "red").save(name, "PNG")
    prompt = parse_prompt(name+weight)
    assert isinstance(prompt.content, Image.Image) and prompt.weight == (2. if weight else 1.)


@pytest.mark.parametrize("prompt, why", {
    "none.jpg": "no such file", "folder/none.tif:2": "no such file", "text.txt": "not an image",
    "cut.png": "not an image", "https://a.b/c.png": "is not fetched", "a:0": "above 0",
    "a:nan": "above 0", "": "is empty",
}.items())  # fmt: skip
def test_a_wrong_prompt(tmp_path, monkeypatch, prompt, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"text.txt").write_text("words")
    (tmp_path/"cut.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    with pytest.raises((OSError, ValueError), match=why) as e:
        parse_prompt(prompt)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("scene, why", [
    (dict(include=5), "include must be a prompt or a list of prompts, got 5"),
    (dict(include=dict(a=1)), "include must be"), (dict(include=[[]]), "a text or an image"),
    (dict(include="a", exclude=True), "exclude must be"),
    (dict(include="a", steps=0), "steps must"),
    (dict(exclude="a"), "nothing to include"), (dict(include=None), "nothing to include"),
    (dict(include="a", extra="b"), "unknown field 'extra'"), ("a", "table of fields"),
])  # fmt: skip
def test_a_wrong_scene_is_named(tmp_path, scene, why):
    (tmp_path/"story.yaml").write_text(json.dumps([dict(include="a"), scene]))
    with pytest.raises(ValueError, match=why) as e:
        read_story(tmp_path/"story.yaml")
    assert "story.yaml, scene 2: " in str(e.value) and "\n" not in str(e.value)


def test_the_defaults_are_those_of_the_public_scripts():
    config = VQGANCLIPConfig()
    assert (config.cutouts.count, config.lr, config.optimizer, config.init) == (
        32, .1, "Adam", "random")
    assert make_config("normal") == config
