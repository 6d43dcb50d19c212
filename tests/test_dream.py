"VQGAN+CLIP: one seed, one image, also when it is stopped anywhere, in parts, or resumed."
import json
import signal

import pytest
import torch
from PIL import Image

import processes
from t2i.guidance.clip import load_clip
from t2i.guidance.dream import dream, open_image, parse_prompt, play, read_run, read_story
from t2i.guidance.vqgan_clip import VQGANCLIP, VQGANCLIPConfig, make_config
from t2i.tokenizers.training import load_tokenizer

SMALL = dict(steps=7, cutouts=3)


@pytest.fixture(scope="module")
def models():
    return dict(vqgan=load_tokenizer("shapes-vqgan"), clip=load_clip("shapes-clip", "cpu"))


def propose(run):
    "A random search: every other step, the best of three candidates"
    if run.step%2 == 0:
        noise = torch.randn(2, *run.z.shape[1:], generator=run.generator(run.step, 1))
        candidates = torch.cat([run.z.detach(), run.z.detach() + .5*noise])
        run.z.data.copy_(candidates[run.candidate_losses(candidates).argmin()])


@pytest.fixture(scope="module", params=[None, propose], ids=["gradient", "search"])
def whole(request, models):
    run = VQGANCLIP("a red circle", "blue", **models, **SMALL, ema=.5, search=request.param)
    run.run()
    return run


def interrupted(function, run, step):
    "The function, which presses Ctrl-C once, at its end in one step of the run"
    pressed = []

    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        if run.step == step and not pressed:
            pressed.append(step)
            signal.raise_signal(signal.SIGINT)
        return result
    return wrapper


@pytest.mark.parametrize("where", ["search", "decode", "optimizer", "make_step", "image"])
@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_run_stopped_anywhere_resumes_bit_for_bit(tmp_path, models, whole, where, step):
    def fresh():
        return VQGANCLIP("a red circle", "blue", **models, **SMALL, ema=.5, search=whole.search)

    run, folder = fresh(), tmp_path/"run"
    if where == "optimizer":
        run.optimizer.step = interrupted(run.optimizer.step, run, step)
    elif where == "search":
        run.search = interrupted(whole.search or (lambda run: None), run, step)
    else:
        setattr(run, where, interrupted(getattr(run, where), run, step))
    about = dict(include=["a red circle"])
    finished = dream(run, folder, about, every=3)
    assert finished == (run.step == 7)
    rest = fresh()
    assert dream(rest, folder, read_run(folder), every=3, resume=True)
    assert torch.equal(rest.z, whole.z) and torch.equal(rest.average, whole.average)
    assert open_image(folder/"image.png").tobytes() == whole.image().tobytes()


@pytest.fixture
def interruptible():
    "Ctrl-C raises KeyboardInterrupt, also where the tests run in the background"
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def test_a_second_ctrl_c_interrupts_and_leaves_a_whole_state(
    tmp_path, models, whole, interruptible,
):
    run = VQGANCLIP("a red circle", "blue", **models, **SMALL, ema=.5, search=whole.search)

    def twice(*args):
        if run.step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return make_step()

    make_step, run.make_step = run.make_step, twice
    with pytest.raises(KeyboardInterrupt):
        dream(run, tmp_path/"run", {}, every=2)
    rest = VQGANCLIP("a red circle", "blue", **models, **SMALL, ema=.5, search=whole.search)
    assert dream(rest, tmp_path/"run", {}, resume=True)
    assert torch.equal(rest.z, whole.z)


KILLED = """
import os, signal, sys
from pathlib import Path
from t2i.guidance.dream import dream
from t2i.guidance.vqgan_clip import VQGANCLIP
run = VQGANCLIP("a red circle", "blue", device="cpu", steps=7, cutouts=3, ema=.5)
def kill(run):
    if run.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
run.search = kill
dream(run, Path(sys.argv[1]), {}, every=2)
"""


def test_a_killed_run_resumes_bit_for_bit(tmp_path, models):
    p = processes.run("-c", KILLED, tmp_path/"run")
    assert p.returncode == -signal.SIGKILL, p.stderr
    whole = VQGANCLIP("a red circle", "blue", **models, **SMALL, ema=.5)
    rest = VQGANCLIP("a red circle", "blue", **models, **SMALL, ema=.5)
    rest.restore(tmp_path/"run"/"state.pt")
    assert rest.step == 4
    rest.run()
    whole.run()
    assert torch.equal(rest.z, whole.z)


def test_play_counts_and_keeps(models):
    run, kept = VQGANCLIP("a red circle", **models, **SMALL), []
    assert play(run, lambda: kept.append(run.step), every=3)
    assert kept == [0, 3, 6, 7]


# ---- Gradients


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_cutouts_in_parts_give_the_same_gradient(models, batch):
    gradients = []
    for size in (0, batch):
        run = VQGANCLIP(["a red circle", "a star:.3"], "blue", "a large circle", **models, steps=1,
                        cutouts=5, cutout_batch_size=size, optimizer="SGD", lr=1.)
        before = run.z.detach().clone()
        run.advance()
        gradients.append(before-run.z.detach())
    assert gradients[0].abs().max() > 1e-4
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def test_the_gradient_is_that_of_the_loss(models):
    "By finite differences, through cutouts and CLIP, without rounding to codes"
    run = VQGANCLIP("a red circle", "blue", **models, steps=1, cutouts=4, optimizer="SGD", lr=1.,
                    quantize=False)
    z, low, high = run.z.detach().clone(), run.low, run.high
    run.low, run.high = low-9, high+9
    run.advance()
    gradient = z-run.z.detach()
    run.step = 0
    step = 1e-2*gradient/gradient.norm()
    up, down = run.candidate_losses(torch.cat([z+step, z-step])).tolist()
    assert (up-down)/2e-2 == pytest.approx(gradient.norm().item(), rel=.05)


def test_nothing_in_a_step_waits_for_the_device(models, monkeypatch):
    run = VQGANCLIP("a red circle", "blue", **models, **SMALL)
    run.advance()
    run.optimizer.step = lambda: None  # it counts its steps on the CPU

    def waits(*args, **kwargs):
        raise AssertionError("a tensor became a number within a step")

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    run.advance()
    monkeypatch.undo()
    assert run.step == 2


def test_models_stay_where_they_are(models):
    run = VQGANCLIP("a red circle", **models, **SMALL)
    assert run.vqgan is models["vqgan"] and run.device.type == "cpu"


def test_init_weight_keeps_the_image_to_start_from(tmp_path, models):
    image = Image.new("RGB", (64, 64), (128, 128, 128))
    image.paste((45, 90, 220), (20, 20, 44, 44))
    image.save(tmp_path/"square.png")
    settings = dict(models, init=str(tmp_path/"square.png"), steps=40, cutouts=4)
    change = {}
    for weight in (0., 10.):
        run = VQGANCLIP("a purple heart", init_weight=weight, **settings)
        first = run.decode(run.z.detach())
        run.run()
        change[weight] = (run.decode(run.z.detach())-first).abs().mean().item()
    assert change[10.] < .5*change[0.], change


# ---- Prompts, stories, settings


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
