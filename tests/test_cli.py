"The command as a user types it: good input, bad input, exit codes, one-line errors."
import json
import mimetypes
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i import __version__, cli
from t2i.core import T2IError
from t2i.engine.files import save_png
from t2i.outputs import is_grid_path, save_new_png
from t2i.pipeline import TextVARPipeline

QUICK = ["--num-steps", 1]  # per map, instead of eight
FEW = ["train.steps=2", "train.batch_size=4", "train.val_batches=1", "train.sample_every=0"]


@pytest.fixture
def t2i(tmp_path, monkeypatch, capsys, caplog):
    "Runs the command in this process, in an empty folder: exit code, stdout, stderr with log lines"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("T2I_HOME", str(tmp_path.parent/"home"))

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["t2i", *map(str, args)])
        caplog.clear()
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return code, out, err + caplog.text

    return run


def shell(*args, **environment):
    "Runs the command as a process of its own"
    env = os.environ | environment
    command = [sys.executable, "-m", "t2i", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def typed(monkeypatch, capsys, *args):
    "Runs the command in this process, where it stands: exit code, stdout, stderr"
    monkeypatch.setattr(sys, "argv", ["t2i", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0, *capsys.readouterr()


# ---- The command itself


def test_help_is_quick_and_complete(t2i):
    command = [sys.executable, "-X", "importtime", "-m", "t2i.cli", "--help"]
    p = subprocess.run(command, capture_output=True, text=True, check=True)
    for heavy in ("torch", "lightning", "open_clip", "numpy", "matplotlib"):
        assert f"| {heavy}\n" not in p.stderr, f"t2i --help imports {heavy}"
    for command in ("generate", "dream", "train", "evaluate", "info", "convert", "sweep", "data",
                    "bench"):
        assert command in p.stdout
        code, out, _ = t2i(command, "--help")
        assert code == 0 and "--help" in out


def test_version_and_module():
    for args in (["-m", "t2i"], ["-m", "t2i.cli"]):
        p = subprocess.run([sys.executable, *args, "--version"], capture_output=True, text=True)
        assert (p.returncode, p.stdout) == (0, f"t2i {__version__}\n")


def test_completion_is_offered(t2i):
    assert "--install-completion" in t2i("--help")[1]


@pytest.mark.parametrize("line, names", [
    ("generate -m shapes-vq", ["shapes-vqgan"]), ("generate -m runs/", ["runs/mine"]),
    ("generate -m no-such", []), ("generate --lora shapes-l", ["shapes-lora"]),
    ("train digits", ["digits-msvq", "digits-var"]), ("train runs/m", ["runs/mine"]),
    ("info digits", ["digits-msvq", "digits-var"]), ("sweep digits-v", ["digits-var"]),
    ("bench dream -m shapes-vq", ["shapes-vqgan"]), ("evaluate emoji-c", ["emoji-clip"]),
    ("plot r", ["runs/mine"]), ("app shapes-sr", ["shapes-sr4"]),
])
def test_names_are_completed(t2i, monkeypatch, line, names):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/recipe.yaml").touch()
    typed = dict(_T2I_COMPLETE="complete_bash", COMP_WORDS=f"t2i {line}",
                 COMP_CWORD=str(len(line.split())))
    for name, value in typed.items():
        monkeypatch.setenv(name, value)
    code, out, err = t2i()
    assert (code, out.split(), err) == (0, names, "")


def test_completion_is_quick_and_never_fails(tmp_path):
    typed = dict(_T2I_COMPLETE="complete_bash", COMP_WORDS="t2i train digits-v", COMP_CWORD="2")
    (tmp_path/"runs").write_text("no folder")
    command = [sys.executable, "-X", "importtime", "-m", "t2i"]
    environment = os.environ | typed
    p = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (p.returncode, p.stdout.split()) == (0, ["digits-var"])
    for heavy in ("torch", "numpy", "yaml"):
        assert f"| {heavy}\n" not in p.stderr, f"completion imports {heavy}"


@pytest.mark.parametrize("command", [
    "generate", "dream", "train", "evaluate", "info", "sweep", "data cache", "data caption",
    "bench dream"])
def test_flags_take_no_value_and_help_is_ascii(t2i, command):
    out = t2i(*command.split(), "--help")[1]
    assert "bool" not in out and out.isascii()


def test_help_names_the_python_argument(t2i):
    out = " ".join(t2i("generate", "--help")[1].split())
    assert "Python: num_images_per_prompt." in out and "Python: guidance_scale." in out


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_old_terminals(encoding):
    for command in ("generate", "dream", "train"):
        assert shell(command, "--help", PYTHONIOENCODING=encoding).returncode == 0


# ---- generate


def test_generate_grid_says_how_it_was_made(t2i, tmp_path):
    code, out, err = t2i("generate", "a red circle", "-n", 4, "--seed", 3, "-o", "a.png")
    assert (code, out.strip()) == (0, "a.png"), err
    about = Image.open("a.png").text
    assert about["prompt"] == "a red circle" and about["seed"] == "3"
    assert about["model"] == "shapes-var" and about["num_steps"] == "8"
    t2i("generate", "a red circle", "-n", 4, "--seed", 3, "-o", "b.png")
    assert np.array_equal(Image.open("a.png"), Image.open("b.png"))  # the same seed, the same image
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]        # nothing else is left


def test_generate_files_from_prompts_file(t2i):
    Path("p.txt").write_text("a red circle\na blue star\n")
    words = "--prompts", "p.txt", "-n", 2, "--seed", 0, *QUICK
    code, out, err = t2i("generate", *words, "-o", "drawn")
    assert code == 0, err
    files = sorted(Path("drawn").iterdir())
    assert [f.name for f in files] == [
        "000-a-red-circle-0.png", "000-a-red-circle-1.png",
        "001-a-blue-star-0.png", "001-a-blue-star-1.png"]
    assert Image.open(files[3]).text["prompt"] == "a blue star"
    assert Image.open(files[0]).size == (64, 64)


def digits(t2i, *args):
    code, out, err = t2i("generate", *args, "-m", "digits-var")
    assert code == 0, err
    return out.split()


def test_a_second_call_into_a_folder_replaces_nothing(t2i):
    paths = [digits(t2i, "a handwritten one", "-n", 2, "--seed", s, "-o", "d") for s in (0, 1)]
    assert len(set(sum(paths, []))) == 4
    seeds = sorted(Image.open(p).text["seed"] for p in Path("d").iterdir())
    assert seeds == ["0", "0", "1", "1"]


@pytest.mark.parametrize("options", [(), ("--process",)])
def test_a_folder_gets_each_batch_as_it_is_drawn(t2i, monkeypatch, options):
    Path("p.txt").write_text("a handwritten one\na handwritten two\n"*75)
    words = "--prompts", "p.txt", "-m", "digits-var", "--seed", 3, *options
    whole = t2i("generate", *words, "-o", "whole")[1].split()
    names = [Path(path).name for path in whole]
    assert names == sorted(os.listdir("whole")) and len(names) == 150
    draw, batches = TextVARPipeline.token_maps, []

    def stop(pipe, prompts, **arguments):
        batches.append(len(prompts))
        if len(batches) == 3:
            raise RuntimeError("out of power")
        return draw(pipe, prompts=prompts, **arguments)

    monkeypatch.setattr(TextVARPipeline, "token_maps", stop)
    code, out, err = t2i("generate", *words, "-o", "part")
    assert code == 1 and "out of power" in err and batches == [64, 64, 22]
    assert sorted(os.listdir("part")) == names[:128]
    for name in (names[0], names[127]):
        one, other = (Image.open(Path(folder, name)) for folder in ("whole", "part"))
        assert np.array_equal(one, other) and one.text == other.text


def test_a_new_image_has_its_name_when_it_is_whole(tmp_path, monkeypatch):
    seen = []

    def save(image, path, **about):
        seen.append(os.listdir(tmp_path))
        save_png(image, path, **about)

    monkeypatch.setattr("t2i.outputs.save_png", save)
    paths = [save_new_png(Image.new("RGB", (2, 2)), tmp_path/"a.png", seed=0) for _ in range(2)]
    assert [path.name for path in paths] == ["a.png", "a-2.png"] and seen == [[], ["a.png"]]
    assert sorted(os.listdir(tmp_path)) == ["a-2.png", "a.png"]


def test_a_folder_may_have_a_dot(t2i):
    Path("my.png").mkdir()
    for folder in ("my.images", "my.png"):
        digits(t2i, "a handwritten one", "-n", 1, "-o", folder)
        digits(t2i, "a handwritten one", "-n", 1, "-o", folder)
        assert len(list(Path(folder).iterdir())) == 2


@pytest.mark.parametrize("content, prompts", [
    (b"\xef\xbb\xbfa handwritten one\n", ["a handwritten one"]),                 # BOM
    ("a handwritten one\r\n".encode("utf-16"), ["a handwritten one"]),           # Windows
    (b"# no\n\n  a handwritten one \r\nseven\n", ["a handwritten one", "seven"]),  # a comment
    ("a handwritten\u2028one\n".encode(), ["a handwritten\u2028one"]),           # no end of line
    ("a handwritten\x0bone\x85\n".encode(), ["a handwritten\x0bone"]),
])  # fmt: skip
def test_prompt_files_of_many_editors(t2i, content, prompts):
    Path("p.txt").write_bytes(content)
    paths = digits(t2i, "--prompts", "p.txt", "-n", 1, "-o", "d")
    assert [Image.open(p).text["prompt"] for p in paths] == prompts


def test_a_reader_that_leaves_early(tmp_path):
    (tmp_path/"p.txt").write_text("a handwritten one\na handwritten two\n")
    command = f"'{sys.executable}' -m t2i generate --prompts p.txt -n 2 -m digits-var -o g"
    p = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], cwd=tmp_path, capture_output=True,
        text=True)
    assert (p.returncode, len(p.stdout.splitlines())) == (0, 1), p.stderr
    assert len(list((tmp_path/"g").iterdir())) == 4


def test_generate_process_shows_every_scale(t2i):
    args = ["a red circle", "-n", 2, "--seed", 0, *QUICK, "--process", "-o", "p.png"]
    code, _, err = t2i("generate", *args)
    assert code == 0, err
    assert Image.open("p.png").size == (6*(128+2)-2, 2*(128+2)-2)


def test_process_ends_with_the_image(t2i):
    digits(t2i, "a handwritten one", "-n", 1, "--seed", 5, "-o", "a")
    digits(t2i, "a handwritten one", "-n", 1, "--seed", 5, "--process", "-o", "b")
    image, strip = (Image.open(next(Path(folder).iterdir())) for folder in "ab")
    last = strip.crop((strip.width - strip.height, 0, strip.width, strip.height))
    assert np.array_equal(last.resize(image.size, Image.NEAREST), image)
    assert strip.text["seed"] == image.text["seed"] == "5"


def test_eight_images_make_a_grid_without_holes(t2i):
    digits(t2i, "a handwritten one", "-n", 8, "-o", "a.png")
    assert Image.open("a.png").size == (4*130-2, 2*130-2)


def test_more_smooth_is_a_flag(t2i):
    seeds = ("-m", "shapes-class-var", "-n", 1, "--seed", 0)
    assert t2i("generate", "heart", *seeds, "-o", "plain.png")[0] == 0
    assert t2i("generate", "heart", *seeds, "--more-smooth", "-o", "smooth.png")[0] == 0
    with Image.open("plain.png") as plain, Image.open("smooth.png") as smooth:
        assert "more_smooth" in str(smooth.info)
        assert not np.array_equal(plain, smooth)
    code, _, err = t2i("generate", "a red circle", "--more-smooth", "-n", 1)
    assert code == 1 and "no setting more_smooth" in err


@pytest.mark.parametrize("model, prompt, settings", [
    ("digits-var", "a handwritten one", {}), ("shapes-class-var", "heart", {}),
    ("shapes-class-var", "heart", dict(more_smooth=True)),
    ("shapes-adapter", "a red heart", {}), ("shapes-lora", "a red heart", dict(num_steps=1)),
])
def test_the_page_shows_the_command_that_draws_the_same(t2i, tmp_path, model, prompt, settings):
    from t2i.app import draw, load, shell_line
    *_, drawing = draw(load(model, "cpu"), prompt, tmp_path/"page", 1, seed=3, **settings)
    words = shlex.split(shell_line(drawing.output))
    code, _, err = t2i(*words[1:], "-o", "again")
    assert code == 0, err
    with Image.open(next(Path("again").iterdir())) as again:
        assert np.array_equal(again.convert("RGB"), drawing.output.images[0])


def test_digits(t2i):
    code, _, err = t2i("generate", "a handwritten seven", "-m", "digits-var", "-n", 1, "-o", "d")
    assert code == 0 and Image.open(next(Path("d").iterdir())).size == (32, 32), err


def test_words_without_quotes(t2i, tmp_path):
    code, _, err = t2i("generate", "a", "red", "circle")
    assert code == 1 and 'needs quotes: "a red circle"' in err
    code, _, err = t2i("generate", "a red circle", "--process", "true")
    assert code == 1 and "take no value" in err
    assert os.listdir(tmp_path) == []
    code, out, err = t2i("generate", "seven", "three", "-m", "digits-var", "-n", 1, "-o", "d")
    assert code == 0 and "one prompt needs quotes" in err and len(out.split()) == 2


# ---- info, bench, evaluate, convert, data


def test_info(t2i):
    code, out, _ = t2i("info", "--json")
    models = {m["name"]: m for m in json.loads(out)}
    assert {"shapes-msvq", "shapes-var", "digits-msvq", "digits-var", "shapes-vqgan",
            "shapes-vit-vqgan", "shapes-clip", "shapes-parti", "emoji-msvq",
            "emoji-clip"} <= set(models)
    emoji = [m["megabytes"] for name, m in models.items() if name.startswith("emoji")]
    assert sum(emoji) <= 40
    assert sum(m["megabytes"] for m in models.values()) - sum(emoji) <= 60
    code, out, _ = t2i("info", "shapes-var")
    assert code == 0 and "generator" in out and "tokenizer" in out and "num_steps" in out
    code, out, _ = t2i("info", "shapes-clip")
    assert code == 0 and "embed_dim" in out


def test_info_of_one_at_a_time(t2i):
    Image.new("RGB", (4, 4)).save("a.png")
    for names, why in ((["a.png", "b.png"], "one name at a time"),
                       (["b.png"], "no such file or folder: b.png"),
                       (["some/b.JPG"], "no such file or folder: some/b.JPG")):
        code, out, err = t2i("info", *names)
        assert (code, out, len(err.splitlines())) == (1, "", 1) and why in err


def test_info_of_an_image(t2i):
    digits(t2i, "a handwritten one", "-n", 1, "--seed", 7, "-o", "a.png")
    code, out, _ = t2i("info", "a.png", "--json")
    about = json.loads(out)["image"]
    assert (about["prompt"], about["seed"]) == ("a handwritten one", "7")
    assert about["model"] == "digits-var"
    Image.new("RGB", (4, 4)).save("plain.png")
    assert "no settings in it" in t2i("info", "plain.png")[1]


@pytest.mark.parametrize("name", ["vqgan-imagenet-f16-16384", "var-tokenizer", "someone/a-model"])
def test_info_fetches_nothing(t2i, tmp_path, name):
    code, out, err = t2i("info", name, "--json")
    assert code == 0 and "http" in json.loads(out)["published"]["source"], err
    assert os.listdir(tmp_path) == [] and not (tmp_path.parent/"home").exists()


def test_bench_shapes(t2i):
    code, out, err = t2i("bench", "shapes", "--count", 20)
    assert code == 0 and "scenes_per_second" in out, err


def test_evaluate_prints_json(t2i):
    args = ["--benchmark", "reconstruction", "--count", 50, "--json"]
    code, out, err = t2i("evaluate", "shapes-msvq", *args)
    assert code == 0 and {"psnr", "usage", "checked"} <= set(json.loads(out)), err
    code, out, err = t2i("evaluate", "shapes-clip", "--count", 100, "--json")
    assert code == 0 and json.loads(out)["pairs"] == 100, err
    code, out, err = t2i("evaluate", "shapes-var", "--per-task", 1, "-n", 1, *QUICK, "--json")
    assert code == 0 and json.loads(out)["images"] == 7, err


def test_convert_a_folder_and_load_it(t2i):
    assert t2i("convert", "digits-var", "copy")[0] == 0
    args = ["a handwritten two", "-m", "./copy", "-n", 1, "-o", "x.png"]
    assert t2i("generate", *args)[0] == 0
    assert t2i("convert", "digits-var", "copy")[0] == 1


def test_data_and_folder_training_input(t2i):
    code, _, err = t2i("data", "shapes", "made", "--count", 5)
    assert code == 0, err
    assert len(Path("made/captions.jsonl").read_text().splitlines()) == 5
    code, out, err = t2i("evaluate", "shapes-msvq", "--data", "made", "--count", 5, "--json")
    assert code == 0 and json.loads(out)["images"] == 5, err


def test_own_images_from_tokenizer_to_score(t2i):
    "A dozen images, fewer than a grid of samples has; the tokenizer is a run"
    assert t2i("data", "shapes", "mine", "--count", 12)[0] == 0
    own = ["data.name=folder", "data.path=mine", "data.resolution=32", *FEW[:2]]
    code, _, err = t2i("train", "digits-msvq", *own, "-o", "tok")
    assert code == 0 and "step 2 of 2: loss" in err, err   # no terminal, no bar: a line
    code, _, err = t2i("train", "digits-var", "tokenizer=tok", "data.cache=12", *own, "-o", "var")
    assert code == 0, err
    code, _, err = t2i("generate", "a red circle", "-m", "var", "-n", 1, "-o", "x.png")
    assert code == 0 and Path("x.png").exists(), err
    code, out, err = t2i("evaluate", "var", "--count", 8, "--json")
    scores = json.loads(out)
    assert code == 0 and scores["benchmark"] == "captions" and scores["images"] == 1, err
    assert "held out" in scores["data"] and scores["loss"] > 0
    code, out, _ = t2i("info", "var", "--json")
    training = json.loads(out)["training"]
    assert training["data"] == "folder mine" and training["step"] == training["steps"] == 2


def test_an_own_task_in_the_working_folder(t2i, monkeypatch):
    Path("owntask.py").write_text(
        "from t2i.tokenizers.training import TokenizerTask\nclass Mine(TokenizerTask): pass\n")
    assert t2i("train", "digits-msvq", "--show")[0] == 0
    recipe = t2i("train", "digits-msvq", "--show")[1]
    task = "task: t2i.tokenizers.training.TokenizerTask"
    Path("my.yaml").write_text(recipe.replace(task, "task: owntask.Mine"))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    code, _, err = t2i("train", "my.yaml", *FEW, "-o", "run")
    assert code == 0 and Path("run/last").exists(), err
    code, out, err = t2i("train", "run", "--resume")  # a run knows its recipe
    sys.modules.pop("owntask", None)
    assert (code, out.split()) == (0, ["run"]) and "nothing to do" in err


def test_nothing_left_to_do_is_no_interruption(t2i):
    assert t2i("train", "digits-msvq", *FEW, "-o", "run")[0] == 0
    kept = Path("run/recipe.yaml").read_text()
    code, _, err = t2i("train", "run", "--resume", "train.steps=1")
    assert code == 0 and "the run's recipe stays" in err, err
    Path("run/recipe.yaml").write_text(kept.replace("steps: 2\n", "steps: 9\n"))  # as if stopped
    code, _, err = t2i("train", "run", "--resume", "train.steps=2")
    assert code == 0 and "steps: 9" in Path("run/recipe.yaml").read_text(), err


# ---- dream


def test_dream_writes_an_image_and_a_video(t2i):
    args = ["--include", "a red circle", "--steps", 2, "cutouts.count=2", "--seed", 0]
    video = ["--video", "v.gif", "--fps", 5, "--every", 1, "--size", "64x128"]
    code, out, err = t2i("dream", *args, *video, "-o", "ball.png")
    assert code == 0 and out.split() == ["ball.png", "v.gif"], err
    image = Image.open("ball.png")
    assert image.size == (128, 64) and image.text["include"] == "a red circle"
    assert Image.open("v.gif").info["duration"] == 200


def test_an_image_format_is_no_folder_where_the_machine_lists_no_types(monkeypatch):
    monkeypatch.setattr(mimetypes, "guess_type", mimetypes.MimeTypes(filenames=()).guess_type)
    for name in ("a.webp", "a.tga", "a.txt", "a.mp4"):
        with pytest.raises(T2IError, match=f"cannot write {name}"):
            is_grid_path(name)
    assert not is_grid_path("my.photos") and not is_grid_path("v1.2")


def test_a_resumed_dream_has_its_own_model_and_settings(t2i):
    few = ["--include", "a ring", "--steps", 1, "--every", 1, "cutouts.count=2", "-o", "run"]
    assert t2i("dream", *few)[0] == 0
    for option in (["--quality", "best"], ["-m", "shapes-vit-vqgan"], ["--steps", 2]):
        code, _, err = t2i("dream", "-o", "run", "--resume", *option)
        assert code == 1 and "has its own prompts and settings" in err


def test_dream_shows_its_settings(t2i, tmp_path):
    code, out, _ = t2i("dream", "--show", "--steps", 7, "cutouts.noise=0", "--init", "gradient")
    assert code == 0 and "steps: 7" in out and "noise: 0" in out and "init: gradient" in out
    assert os.listdir(tmp_path) == []


# ---- Mistakes


README = str(Path(__file__).parents[1]/"README.md")
SAMPLE = str(next((Path(__file__).parents[1]/"data/sample/txt").glob("*.png")))
SAMPLES = str(Path(SAMPLE).parent)
IMAGES = str(Path(__file__).parents[1]/"docs/leaderboard/budget")
BUNDLED = Path(cli.__file__).parent/"pretrained"


@pytest.mark.parametrize("args, says", [
    (["data", "caption", "nowhere"], "nowhere is no folder"),  # no model is loaded before
    (["data", "coco", "--root", __file__, "--check"], "is a file"),
    (["data", "cache", "kept", "--coco"], "no shapes/annotations/captions_train2017"),
    (["generate"], "no prompt"),
    (["generate", "x", "-m", "no-such-model"], "model 'no-such-model'"),
    (["generate", "x", "-m", "no/such-model"], "cannot fetch 'no/such-model'"),
    (["generate", "x", "-m", "shapes-msvq"], "tokenizer"),
    (["generate", "x", "-m", "shapes-clip"], "(clip)"),
    (["generate", "x", "-n", "-2"], "num_images_per_prompt is -2"),
    (["generate", "x", "-n", "0"], "num_images_per_prompt is 0"),
    (["generate", "x", "--temperature", "-1"], "temperature"),
    (["generate", "x", "--top-p", "2"], "top_p"),
    (["generate", "x", "--guidance-scale", "nan"], "guidance_scale"),
    (["generate", "x", "--guidance-schedule", "steep"], "ramp or constant"),
    (["generate", "x", "-m", "digits-var", "--num-steps", "8"], "no setting num_steps"),
    (["generate", "x", "-m", "digits-var", "--alpha", "1"], "no setting alpha"),
    (["generate", "x", "-m", "digits-var", "--beta=-1"], "beta is -1"),
    (["generate", "x", "-m", "digits-var", "--lora", "ink:nan"], "factor of LoRA 'ink' is nan"),
    (["generate", "a red \udcff circle"], "not UTF-8"),
    (["generate", "x", "-o", "a.bmp"], "a.bmp"),
    (["generate", "x", "-o", "-"], "cannot write -: name a .png file, or a folder"),
    (["generate", "x", "-o", ".png"], "cannot write .png: name a .png file"),
    (["generate", "x", "--guidance-scale", "1e38"], "or with less guidance"),
    (["sweep", "shapes-var", "top_k="], "write alpha=0,0.5,1; settings are guidance_scale"),
    (["generate", "x", "-o", "/proc/nope/x.png"], "cannot write /proc/nope/x.png"),
    (["generate", "--prompts", "missing.txt"], "missing.txt"),
    (["generate", "x", "--upscale", "no-such-network"], "no-such-network"),
    (["generate", "x", "--upscale", "shapes-vqgan"], "shapes-vqgan does not enlarge"),
    (["generate", "x", "--upscale", "shapes-vqgan", "--process"], "leave out --upscale"),
    (["generate", "x", "--clip", "shapes-clip", "--process"], "leave out --clip"),
    (["generate", "x", "--judge", "both", "--process"], "leave out --judge"),
    (["edit", "a.png", "b.png", "x"], "no such file: a.png"),
    (["data", "caption", IMAGES, "-m", "no/blip"], "image processor for 'no/blip'): is it"),
    (["info", "parti-4b"], "no published size of Parti; these are"),
    (["generate", "x", "-m", "emoji-vr"], "did you mean emoji-var?"),
    (["train", "emoji-vr"], "no recipe 'emoji-vr': did you mean emoji-var?"),
    (["generate", "x", "-n", "99999999999"], "a whole number from 1 to 10,000"),
    (["generate", "x", "--rerank", "99999999999"], "rerank is 99999999999; it must be"),
    (["generate", "x", "--upscale", "emoji-msvq"], "emoji-msvq does not enlarge images"),
    (["evaluate", "shapes-var", "--samples", "notes.txt"], "notes.txt: name a .png"),
    (["evaluate", "shapes-var", "--json", "--markdown"], "--json and --markdown print the same"),
    (["evaluate", "emoji-var", "--quality", "best"], "generator does not read --quality"),
    (["evaluate", "emoji-var", "--benchmark", "shapes"], "emoji-var never learned"),
    (["evaluate", "shapes-var", "--benchmark", "digits"], "shapes-var never learned digits"),
    (["evaluate", "shapes-var", "--clip", "shapes-clip"], "candidates of rerank"),
    (["sweep", "shapes-var", "guidance_scale=1", "--data", IMAGES], "--data is read with"),
    (["dream", "--include", "a ring", "-m", "shapes-msvq"], "as shapes-vqgan, not a MultiScale"),
    (["dream", "--include", "a ring", "--video", "a.gif", "--fps", "0"], "0 frames per second"),
    (["dream", "--include", "a ring", "--video", "/proc/v.gif"], "cannot write /proc/v.gif"),
    (["sweep", "shapes-adapter", "alpha=0", "alpha=1"], "alpha stands there twice"),
    (["train", "digits-msvq", "train.final_lr=-5"], "train.final_lr is -5.0; it must be from 0"),
    (["train", "digits-msvq", "train.betas=[0.9,1.0]"], "train.betas is (0.9, 1.0)"),
    (["train", "digits-msvq", "-o", SAMPLES], "has images in it"),
    (["reconstruct", SAMPLE, "-o", SAMPLE], "would replace what is read"),
    (["evaluate", "shapes-clip", "--benchmark", "captions", "--top-k", "5"], "of a clip does not"),
    (["sweep", "emoji-var", "temperature=0,1"], "--eval-clip is missing"),
    (["leaderboard", "shapes-var", "-o", "board.png"], "name a .md file"),
    (["leaderboard", "shapes-var", "-o", "board.txt"], "name a .md file"),
    (["sweep", "shapes-var", "guidance_scale=1,2,1"], "1.0 stands there twice"),
    (["sweep", "shapes-class-var", "more_smooth=false,False"], "False stands there twice"),
    (["sweep", "shapes-var", "top_k=2.5"], "top_k is 2.5; it must be a whole number from 0"),
    (["train", "shapes-var", "--show", "--resume"], "leave out --resume"),
    (["train", "lora-folder"], "needs data.path"),
    (["train", "own-var", "tokenizer=shapes-clip", f"data.path={IMAGES}"],
     "no tokenizer of images"),
    (["info", "var-d16", "--tflops", "10"], "no recipe 'var-d16'"),
    (["leaderboard", "shapes-var", "--images", "board.md"], "board.md: name a .png"),
    (["reconstruct", "/dev/null"], "/dev/null is no image file"),
    (["info", ""], "the name of the model is empty"),
    (["plot", __file__], "is a file: name the folder of a run"),
    (["info", "emoji-vr", "--names", "mango"], "did you mean emoji-var?"),
    (["generate", "x", "-o", __file__], "a file: name a .png for a grid, or a folder"),
    (["evaluate", "shapes-var", "--benchmark", "partiprompts"], "needs --data"),
    (["evaluate", "shapes-var", "--benchmark", "partiprompts", "--data", "no.tsv", "--eval-clip",
      "shapes-clip"], "no file no.tsv"),
    (["evaluate", "shapes-var", "--benchmark", "beauty"], "unknown benchmark"),
    (["evaluate", "shapes-msvq", "--benchmark", "shapes"], "tokenizer"),
    (["evaluate", "shapes-clip", "--benchmark", "shapes"], "does not fit"),
    (["evaluate", "shapes-vqgan", "--benchmark", "clip"], "does not fit"),
    (["evaluate", "shapes-msvq", "--data", "/nowhere"], "no folder"),
    (["evaluate", "digits-var", "--benchmark", "captions", "--data", ""], "--data is empty"),
    (["evaluate", "digits-var", "--benchmark", "shapes"], "--benchmark captions"),
    (["train", "no-such-recipe"], "no recipe"),
    (["train", "shapes-msvq", "train.stepz=1"], "stepz"),
    (["train", "shapes-msvq", "train.steps=0"], "train.steps is 0"),
    (["train", "shapes-msvq", "train.batch_size=0"], "train.batch_size is 0"),
    (["evaluate", "shapes-var", "--per-task", "0"], "--per-task is 0"),
    (["generate", "x", "--num-steps", "0"], "num_steps is 0"),
    (["dream", "--resume", "-o", "nothing"], "there is no such folder"),
    (["dream", "--include", "a", "--size", "64 by 64"], "HxW"),
    (["dream", "--include", "a", "--size", "100000x100000"], "4096 pixels a side are the most"),
    (["dream", "--include", "a", "lr=fast"], "lr"),
    (["dream", "a red circle"], "after --include"),
    (["info", "."], "neither a saved model"),
    (["info", IMAGES], "an image in it is described by t2i info"),
    (["info", README], "README.md is a text file: t2i info describes"),
    (["generate", "x", "-o", "x.txt"], "cannot write x.txt: name a .png file, or"),
    (["info", "./nothing"], "no such file or folder"),
    (["evaluate", "shapes-var", "--count", "3"], "does not read --count; it reads --per-task"),
    (["evaluate", "shapes-class-var", "--per-task", "3"], "generator does not read --per-task"),
    (["evaluate", "shapes-msvq", "--guidance-scale", "3"], "does not read --guidance-scale"),
    (["generate", "x", "--clip", "shapes-clip"], "choose among the candidates of rerank"),
    (["generate", "x", "--judge", "both"], "choose among the candidates of rerank"),
    (["generate", "x", "--judge", "me", "--rerank", "2"], "clip, likelihood or both"),
    (["generate", "x", "-m", "shapes-parti", "--judge", "both", "--rerank", "4"], "cannot judge"),
    (["evaluate", "shapes-var", "--judge", "likelihood"], "choose among the candidates of rerank"),
    (["generate", "--box", "red circle:0.1,0.1,2,1"], "leaves the image: 0.1,0.1,2,1 must"),
    (["edit", IMAGES, "b.png", "x"], "is a folder: name an image file"),
    (["reconstruct", IMAGES], "is a folder: name an image file"),
    (["generate", "x", "-m", README], "README.md is not a weight file"),
    (["train", str(BUNDLED/"digits-var")], "is a run, no recipe: add --resume"),
    (["train", "runs/nope", "--resume"], "no checkpoint in runs/nope to go on from"),
    (["plot", "nowhere"], "no such folder: nowhere"),
    (["plot", IMAGES], "there is nothing to draw: no run has logged anything in"),
    (["train", "own-msvq", f"data.path={README}"], "README.md: a file"),
])  # fmt: skip
def test_mistakes_are_one_line(t2i, tmp_path, args, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = t2i(*args)
    assert code == 1 and says in err, err
    errors = [line for line in err.splitlines() if line.startswith("t2i: ")]
    assert len(errors) == 1 and "Traceback" not in err, err
    assert os.listdir(tmp_path) == []   # nothing half-written


@pytest.mark.parametrize("wrong", [
    ("--temperature", "-1"), ("--top-p", "2"), ("--num-steps", "0"), ("-n", "0"),
    ("--temperature-schedule", "warm"), ("--guidance-schedule", "flat"), ("--alpha", "-1")])
def test_settings_are_checked_before_a_model_is_loaded(t2i, monkeypatch, wrong):
    monkeypatch.setattr("t2i.cli.load_pipe", None)
    code, out, err = t2i("generate", "a red ring", *wrong)
    assert code in (1, 2) and "must be" in out+err, out+err
    assert "NoneType" not in err


@pytest.mark.parametrize("content", [b"PK\x03\x04xxxx", b"\xff"*100, b"\x80\x02garbage"])
def test_what_is_no_text_is_not_called_so(t2i, content):
    Path("a.pth").write_bytes(content)
    code, _, err = t2i("info", "a.pth")
    assert code == 1 and "a.pth" in err and "text file" not in err, err


def test_a_home_that_the_shell_left(t2i, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    assert digits(t2i, "one", "-n", 1, "-o", "~/a.png") == [str(tmp_path/"home/a.png")]
    assert os.listdir() == ["home"]


def test_wrong_usage_is_2(t2i):
    assert t2i("generate", "x", "--no-such-option")[0] == 2
    assert t2i("no-such-command")[0] == 2


@pytest.mark.parametrize("prompt", ["-a red circle", "--a circle", "-red", "-nice circle"])
def test_a_prompt_that_begins_with_a_dash(t2i, prompt):
    for words in (["generate"], ["edit", "a.png", "b.png"]):
        code, _, err = t2i(*words, prompt)
        assert code == 2 and "a prompt that begins with a dash goes after --" in err, err
    code, _, err = t2i("generate", "-n", 1, *QUICK, "-o", "a.png", "--", prompt)
    assert code == 0 and Image.open("a.png").text["prompt"] == prompt, err
    assert "goes after" not in t2i("generate", "x", "--guidence-scale", "3")[2]
    assert "goes after" not in t2i("info", prompt)[2]
    assert "needs quotes" in t2i("edit", "a.png", "b.png", "a", "red", "ring")[2]


def test_a_sweep_reads_the_whole_file(t2i, monkeypatch):
    Path("p.txt").write_text("".join(f"{i} rings\n" for i in range(120)))
    read = []

    def sweep(pipe, axes, prompts, measure, seed):
        read.append(len(prompts))
        raise ValueError("seen")

    monkeypatch.setattr("t2i.cli_sweep.sweep", sweep)
    words = "sweep", "digits-var", "top_k=1,2", "--eval-clip", "shapes-clip", "--prompts", "p.txt"
    assert "seen" in t2i(*words)[2] and "seen" in t2i(*words, "--count", 7)[2]
    assert "seen" in t2i("sweep", "shapes-var", "top_k=1,2")[2] and read == [120, 7, 100]


def test_debug_shows_the_traceback(t2i):
    with pytest.raises(ValueError):
        t2i("generate", "x", "-m", "no-such-model", "--debug")


@pytest.mark.parametrize("prompt, says", [
    ("", "empty"), ("red "*2500, "longer than"), ("é"*300, f"'{'é'*37}...' never"),
    ("a red circle 🎈", "🎈"), ("???", "no word"),
    ("ein roter Kreis", "'ein', 'roter', 'kreis'"), ("a red elephant", "elephant"),
    ("a red ring on a green background", "'green background' may not"), ("3 rings", "'3' (three?)"),
    ("a teal ring", "'teal ring' may not be drawn; objects are red"),
    ("a red ring, a blue star and a white heart", "names more than two things")])
def test_prompts_it_does_not_understand_are_warned_of(t2i, prompt, says):
    code, out, err = t2i("generate", prompt, "-n", 1, *QUICK, "-o", "x.png")
    assert code == 0 and says in err and Path("x.png").exists(), err


def test_a_box_that_the_prompt_does_not_name_is_warned_of(t2i):
    code, out, err = t2i("generate", "a red ring", "--box", "blue star:0,0,.5,.5", "-n", 1)
    assert code == 0 and "a box for 'blue star'" in err and "blue and star" in err, err


def test_another_tokenizer_under_the_same_name(t2i):
    "A folder in the way, and a tokenizer that was trained anew (F04)"
    assert t2i("convert", "digits-msvq", "shapes-msvq")[0] == 0
    digits(t2i, "a handwritten two", "-n", 1, "--seed", 0, "-o", "here.png")
    red = "a red circle", "-n", 1, "--seed", 0, *QUICK
    code, _, err = t2i("generate", *red, "-o", "a.png")
    assert code == 0, err
    Path("shapes-msvq").rename("elsewhere")
    t2i("generate", *red, "-o", "b.png")
    assert np.array_equal(Image.open("a.png"), Image.open("b.png"))
    assert t2i("convert", "digits-var", "copy")[0] == 0
    index = json.loads(Path("copy/model_index.json").read_text())
    assert index["format"] == 2 and len(index["fingerprints"]["tokenizer"]) == 16
    index["parts"]["tokenizer"] = "shapes-msvq"
    Path("copy/model_index.json").write_text(json.dumps(index))
    code, _, err = t2i("generate", "a handwritten two", "-m", "copy", "-n", 1, "-o", "c.png")
    assert code == 1 and "another tokenizer" in err and not Path("c.png").exists()


def test_a_grid_that_nothing_opens_is_warned_of(caplog):
    for place, count in ((Path("all.png"), 1001), (Path("all"), 1001), (Path("all.png"), 1000)):
        caplog.clear()
        cli.announce(count, 1, 1, {}, place)
        assert ("-o FOLDER" in caplog.text) == (place.suffix == ".png" and count > 1000)


def test_a_leaderboard_is_written_and_printed(t2i):
    code, out, _ = t2i("leaderboard", "shapes-var", "--json", "-o", "board.md")
    assert code == 0 and [row["model"] for row in json.loads(out)] == ["shapes-var"]
    assert "t2i evaluate shapes-var" in Path("board.md").read_text()
    assert t2i("leaderboard", "shapes-var", "-o", "board.md")[1] == "board.md\n"


def test_data_check_recognises_what_recipes_do(t2i, monkeypatch):
    sample = Path(__file__).parents[1]/"data"/"sample"
    monkeypatch.setenv("HOME", str(sample))
    code, out, err = t2i("data", "check", "~/coco", "--json")
    assert code == 0
    assert json.loads(out) == dict(kind="coco", train=8, val=4, captions=60, notes=[])
    assert t2i("data", "shards", "packed", "--data", sample/"coco", "--per-shard", 4)[0] == 0
    code, out, err = t2i("data", "check", "packed", "--json")
    assert code == 0 and json.loads(out)["kind"] == "shards"
    code, out, err = t2i("data", "check", sample)
    assert code == 0 and f"t2i data check {sample/'coco'} counts them" in err


def test_data_check_names_all_that_is_skipped(t2i):
    Path("photos").mkdir()
    for i in range(14):
        Image.new("RGB", (16, 16)).save(f"photos/{i:02}.png")
    for i in range(2):
        Path(f"photos/{i:02}.txt").write_text("a square")
    code, out, err = t2i("data", "check", "photos", "--json")
    (note,) = json.loads(out)["notes"]
    assert code == 0 and note.count("(no caption)") == 12 and "11.png (no caption)" in note
    assert "11.png (no caption) and 2 more" in err
    assert "t2i data check photos --json names all" in err


@pytest.fixture
def photos(t2i):
    "A folder of twenty captioned images"
    folder = Path("photos")
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (40, 30)).save(folder/f"{i:02}.png")
        (folder/f"{i:02}.txt").write_text("a square")
    return folder


def test_data_check_names_odd_sizes_and_captions(t2i, photos):
    assert json.loads(t2i("data", "check", photos, "--json")[1])["notes"] == []
    Image.new("RGB", (15, 40)).save(photos/"00.png")
    Image.new("RGB", (16, 129)).save(photos/"01.png")
    Image.new("RGB", (16, 128)).save(photos/"02.png")
    Image.new("RGB", (40, 30)).save(photos/"03.jpg")
    (photos/"lonely.txt").write_text("a circle")
    code, out, err = t2i("data", "check", photos, "--json")
    lonely, shared, small, long = json.loads(out)["notes"]
    assert code == 0 and all(note in err for note in (lonely, shared, small, long))
    assert "1 of 21 text files" in lonely and lonely.endswith(": lonely.txt")
    assert "1 of 20 captions" in shared and shared.endswith(": 03 (03.jpg, 03.png)")
    assert "1 of 21 images" in small and small.endswith("00.png (15x40)")
    assert "1 of 21 images" in long and long.endswith("01.png (16x129)")


def test_data_check_takes_fields_of_data_after_a_folder(t2i, photos):
    code, out, _ = t2i("data", "check", photos, "data.fraction=0.5", "--json")
    assert code == 0 and json.loads(out)["train"] == 10
    other = shutil.copytree(photos, photos.with_name("other"))
    code, out, _ = t2i("data", "check", photos, f"data.val_path={other}", "--json")
    assert code == 0 and (json.loads(out)["train"], json.loads(out)["val"]) == (20, 20)
    for field, says in {
        "nonsense=3": "nonsense=3: there is no field nonsense",
        "train.steps=3": "train.steps=3: there is no field train",
        "fraction=.5": "did you mean data.fraction?", "data.fraction=2": "data.fraction=2",
        "data.path=nowhere": "checked without", "data.name=mixture": "checked without",
    }.items():
        code, out, err = t2i("data", "check", photos, field)
        assert code == 1 and says in err and not out


def test_data_check_names_all_faulty_rows(t2i, photos):
    rows = ['{"file_name": "00.png", "text": "a square"}']*20
    for line in range(1, 13):
        rows[line] = "{"
    (photos/"captions.jsonl").write_text("\n".join(rows))
    code, out, err = t2i("data", "check", photos)
    assert code == 1 and not out and "captions.jsonl line 2: it is not JSON; line 3: " in err
    assert "line 11: it is not JSON; and 2 more" in err and "line 12" not in err


def test_prompts_that_are_not_utf8_name_the_remedy(t2i):
    Path("latin.txt").write_bytes(b"a caf\xe9")
    code, _, err = t2i("generate", "--prompts", "latin.txt")
    assert code == 1 and "latin.txt is not text in UTF-8: save it as UTF-8" in err
    command = [sys.executable, "-m", "t2i", "generate", "--prompts", "-"]
    environment = os.environ | dict(PYTHONIOENCODING="utf-8")
    p = subprocess.run(command, input=b"a caf\xe9", capture_output=True, env=environment)
    assert p.returncode == 1 and b"standard input is not text in UTF-8: save it" in p.stderr


def test_data_cache_recognises_coco(t2i):
    sample = Path(__file__).parents[1]/"data"/"sample"/"coco"
    assert t2i("data", "cache", "features", "--data", sample, "--count", 2)[0] == 0
    given = "--split", "train", "--count", 2                     # the first is what is usual
    code, _, err = t2i("data", "cache", "kept", "--recipe", "shapes-var", *given)
    assert code == 1 and "--recipe reads no --split --count: leave" in err
    assert not Path("kept").exists()
