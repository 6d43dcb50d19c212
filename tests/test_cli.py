"The command as a user types it: good input, bad input, exit codes, one-line errors."
import json, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest
from PIL import Image

from t2i import cli


@pytest.fixture
def t2i(tmp_path, monkeypatch, capsys, caplog):
    "Runs the command in this process, in an empty folder; returns exit code, stdout, stderr with log lines"
    monkeypatch.chdir(tmp_path)
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["t2i", *map(str, args)])
        caplog.clear()
        try: cli.main(); code = 0
        except SystemExit as e: code = e.code or 0
        out, err = capsys.readouterr()
        return code, out, err + caplog.text
    return run


def test_help_is_quick_and_complete(t2i):
    modules = subprocess.run([sys.executable, "-X", "importtime", "-m", "t2i.cli", "--help"], capture_output=True, text=True, check=True)
    for heavy in ("torch", "lightning", "open_clip", "numpy", "matplotlib"):
        assert f"| {heavy}\n" not in modules.stderr, f"t2i --help imports {heavy}"
    for command in ("generate", "train", "evaluate", "info", "convert", "data", "bench"):
        assert command in modules.stdout
        code, out, _ = t2i(command, "--help")
        assert code == 0 and "--help" in out


def test_generate_grid_says_how_it_was_made(t2i, tmp_path):
    code, out, err = t2i("generate", "a red circle", "-n", 4, "--seed", 3, "-o", "a.png")
    assert (code, out.strip()) == (0, "a.png"), err
    about = Image.open("a.png").text
    assert about["prompt"] == "a red circle" and about["seed"] == "3" and about["model"] == "shapes-var"
    t2i("generate", "a red circle", "-n", 4, "--seed", 3, "-o", "b.png")
    assert np.array_equal(Image.open("a.png"), Image.open("b.png"))   # the same seed, the same picture
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]         # nothing else is left


def test_generate_files_from_prompts_file(t2i):
    Path("p.txt").write_text("a red circle\na blue star\n")
    code, out, err = t2i("generate", "--prompts", "p.txt", "-n", 2, "--seed", 0, "-o", "drawn")
    assert code == 0, err
    files = sorted(Path("drawn").iterdir())
    assert [f.name for f in files] == ["000-a-red-circle-0.png", "000-a-red-circle-1.png", "001-a-blue-star-0.png", "001-a-blue-star-1.png"]
    assert Image.open(files[3]).text["prompt"] == "a blue star" and Image.open(files[0]).size == (64, 64)


def test_generate_process_shows_every_scale(t2i):
    code, _, err = t2i("generate", "a red circle", "-n", 2, "--seed", 0, "--process", "-o", "p.png")
    assert code == 0, err
    assert Image.open("p.png").size == (6*(128+2)-2, 2*(128+2)-2)


def test_digits(t2i):
    code, _, err = t2i("generate", "a handwritten seven", "-m", "digits-var", "-n", 1, "-o", "d")
    assert code == 0 and Image.open(next(Path("d").iterdir())).size == (32, 32), err


def test_info(t2i):
    code, out, _ = t2i("info", "--json")
    models = {m["name"]: m for m in json.loads(out)}
    assert {"shapes-msvq", "shapes-var", "digits-msvq", "digits-var", "shapes-vqgan", "shapes-vit-vqgan", "shapes-clip"} <= set(models)
    assert sum(m["megabytes"] for m in models.values()) <= 25
    code, out, _ = t2i("info", "shapes-var")
    assert code == 0 and "generator" in out and "tokenizer" in out
    code, out, _ = t2i("info", "shapes-clip")
    assert code == 0 and "embed_dim" in out


def test_bench_shapes(t2i):
    code, out, err = t2i("bench", "shapes", "--count", 20)
    assert code == 0 and "scenes_per_second" in out, err


def test_evaluate_prints_json(t2i):
    code, out, err = t2i("evaluate", "shapes-msvq", "--benchmark", "reconstruction", "--count", 50, "--json")
    assert code == 0 and {"psnr", "usage", "checked"} <= set(json.loads(out)), err
    code, out, err = t2i("evaluate", "shapes-clip", "--count", 100, "--json")
    assert code == 0 and json.loads(out)["pairs"] == 100, err
    code, out, err = t2i("evaluate", "shapes-var", "--per-task", 1, "-n", 1, "--json")
    assert code == 0 and json.loads(out)["images"] == 7, err


def test_convert_a_folder_and_load_it(t2i):
    assert t2i("convert", "digits-var", "copy")[0] == 0
    assert t2i("generate", "a handwritten two", "-m", "./copy", "-n", 1, "-o", "x.png")[0] == 0
    assert t2i("convert", "digits-var", "copy")[0] == 1


def test_data_and_folder_training_input(t2i):
    code, _, err = t2i("data", "shapes", "made", "--count", 5)
    assert code == 0, err
    assert len(Path("made/captions.jsonl").read_text().splitlines()) == 5
    code, out, err = t2i("evaluate", "shapes-msvq", "--data", "made", "--count", 5, "--json")
    assert code == 0 and json.loads(out)["images"] == 5, err


def test_own_pictures_from_tokenizer_to_picture(t2i):
    "A dozen pictures, fewer than a grid of samples has; the tokenizer is a run"
    assert t2i("data", "shapes", "mine", "--count", 12)[0] == 0
    own = ["data.name=folder", "data.path=mine", "data.resolution=32", "train.steps=2", "train.batch_size=4"]
    code, _, err = t2i("train", "digits-msvq", *own, "-o", "tok")
    assert code == 0 and "step 2 of 2: loss" in err, err   # no terminal, no bar: a line
    code, _, err = t2i("train", "digits-var", "tokenizer=tok", "data.cache=12", *own, "-o", "var")
    assert code == 0, err
    code, _, err = t2i("generate", "a red circle", "-m", "var", "-n", 1, "-o", "x.png")
    assert code == 0 and Path("x.png").exists(), err


@pytest.mark.parametrize("args, says", [
    (["generate"], "no prompt"),
    (["generate", "x", "-m", "no-such-model"], "no model 'no-such-model'"),
    (["generate", "x", "-m", "no/such-model"], "cannot fetch 'no/such-model'"),
    (["generate", "x", "-m", "shapes-msvq"], "tokenizer"),
    (["generate", "x", "-m", "shapes-clip"], "CLIP"),
    (["generate", "x", "-n", "-2"], "num_images_per_prompt is -2"),
    (["generate", "x", "-n", "0"], "num_images_per_prompt is 0"),
    (["generate", "x", "--temperature", "-1"], "temperature"),
    (["generate", "x", "--top-p", "2"], "top_p"),
    (["generate", "x", "--guidance-scale", "nan"], "guidance_scale"),
    (["generate", "x", "-o", "a.bmp"], "a.bmp"),
    (["generate", "--prompts", "missing.txt"], "missing.txt"),
    (["evaluate", "shapes-var", "--benchmark", "beauty"], "unknown benchmark"),
    (["evaluate", "shapes-msvq", "--benchmark", "shapes"], "tokenizer"),
    (["evaluate", "shapes-clip", "--benchmark", "shapes"], "does not fit"),
    (["evaluate", "shapes-vqgan", "--benchmark", "clip"], "does not fit"),
    (["evaluate", "shapes-msvq", "--data", "/nowhere"], "no folder"),
    (["train", "no-such-recipe"], "no recipe"),
    (["train", "shapes-msvq", "train.stepz=1"], "stepz"),
    (["train", "shapes-msvq", "train.steps=0"], "train.steps is 0"),
    (["train", "shapes-msvq", "train.batch_size=0"], "train.batch_size is 0"),
    (["evaluate", "shapes-var", "--per-task", "0"], "--per-task is 0"),
    (["generate", "x", "--num-steps", "0"], "num_steps is 0"),
    (["dream", "--resume", "-o", "nothing"], "no run of t2i dream"),
    (["info", "."], "neither a saved model"),
])
def test_mistakes_are_one_line(t2i, tmp_path, args, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = t2i(*args)
    assert code == 1 and says in err, err
    errors = [l for l in err.splitlines() if l.startswith("t2i: ")]
    assert len(errors) == 1 and "Traceback" not in err, err
    assert os.listdir(tmp_path) == []   # nothing half-written


def test_wrong_usage_is_2(t2i):
    assert t2i("generate", "x", "--no-such-option")[0] == 2
    assert t2i("no-such-command")[0] == 2


def test_debug_shows_the_traceback(t2i):
    with pytest.raises(ValueError): t2i("generate", "x", "-m", "no-such-model", "--debug")


@pytest.mark.parametrize("prompt, says", [("", "empty"), ("red "*2500, "longer than"), ("a red circle 🎈", "🎈"), ("ein roter Kreis", "'ein', 'roter', 'kreis'"), ("a red elephant", "elephant")])
def test_prompts_it_does_not_understand_are_warned_of(t2i, prompt, says):
    code, out, err = t2i("generate", prompt, "-n", 1, "-o", "x.png")
    assert code == 0 and says in err and Path("x.png").exists(), err
