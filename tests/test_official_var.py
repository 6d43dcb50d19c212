"""Published VAR by name, as a user meets it. Small files of the recorded sizes stand in for the
published ones: their entries are those of VAR's code, their numbers are random."""
import json

import numpy as np
import pytest
import torch

import t2i
from t2i.core import T2IError, fold_in
from t2i.generators.official import PUBLISHED_SCALES
from t2i.generators.var import VAR
from t2i.pipeline import VARPipeline
from test_cli import typed
from test_golden import Case, levels


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A data folder with var_d16.pth and its tokenizer"
    home = tmp_path_factory.mktemp("home")
    (home/"checkpoints").mkdir()
    case = Case("var", "var")
    torch.save(case.weights | dict(lvl_1L=levels(case)), home/"checkpoints"/"var_d16.pth")
    vqvae = Case("var", "vqvae").weights
    torch.save(vqvae, home/"checkpoints"/"vae_ch160v4096z32.pth")
    return home


@pytest.fixture(scope="module")
def pipe(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T2I_HOME", str(home))
        return t2i.load("var-d16", "cpu")


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_published_name_gives_a_pipeline(pipe):
    assert isinstance(pipe, VARPipeline) and pipe.name == "var-d16"
    assert pipe.generator.config.scales == PUBLISHED_SCALES[0]
    assert pipe.defaults["top_k"] == 900 and pipe.defaults["guidance_scale"] == 5
    out = pipe(["3", "7"], seed=0)
    assert out.images[0].size == (256, 256) and out.settings["model"] == "var-d16"
    frames = list(pipe.stream(["3", "7"], seed=0))
    assert [f.step for f in frames] == list(range(1, 11)) and same(frames[-1].images, out.images)
    assert not same(out.images, pipe(["3", "7"], seed=0, more_smooth=True).images)
    with pytest.raises(T2IError, match="no class 10; classes go from 0 to 9"):
        pipe("10")
    with pytest.raises(T2IError, match="no class 'lorikete'"):
        pipe(["3", "lorikete"])


def test_official_sampling(pipe):
    "The convention of VAR's code, and ours"
    labels = torch.tensor([3, 7])
    settings = dict(top_k=100, top_p=.9)
    ids = pipe.generator.generate(labels, cfg=1.5, generator=fold_in(0), **settings)
    ours = pipe.generator.generate(labels, 2.5, generator=fold_in(0), **settings)
    assert all(torch.equal(a, b) for a, b in zip(ids, ours))
    with pytest.raises(ValueError, match="labels go from 0 to 9"):
        pipe.generator.generate(torch.tensor([11]))


def test_it_is_saved_and_found_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path/"var", torch.float32)
    index = json.loads((tmp_path/"var"/"model_index.json").read_text())
    assert index["model_type"] == "var" and "text_encoder" not in index["parts"]
    again = t2i.load(tmp_path/"var", "cpu")
    assert same(again("3", seed=0).images, pipe("3", seed=0).images)
    index["fingerprints"]["tokenizer"] = "0"*16
    (tmp_path/"var"/"model_index.json").write_text(json.dumps(index))
    with pytest.raises(T2IError, match="another tokenizer"):
        t2i.load(tmp_path/"var")


def test_the_tokenizer_lies_beside_the_file(home, tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_HOME", str(tmp_path))
    assert isinstance(t2i.load(home/"checkpoints"/"var_d16.pth", "cpu"), VARPipeline)


def test_without_a_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_HOME", str(tmp_path))
    monkeypatch.setattr("t2i.engine.downloads.urlopen", lambda *a, **kw: 1/0)
    with pytest.raises(T2IError, match="download it by hand and put it at .*var_d30.pth") as e:
        t2i.load("var-d30")
    assert "\n" not in str(e.value)


def test_another_tokenizer_is_refused(pipe, home, tmp_path):
    weights = torch.load(home/"checkpoints"/"var_d16.pth")
    weights["word_embed.weight"] = torch.zeros(128, 16)
    with pytest.raises(T2IError, match="code_dim 8, not 16"):
        VAR.from_official(weights, tokenizer=pipe.tokenizer)
    torch.save(weights, tmp_path/"var_d16.pth")
    (tmp_path/"vae_ch160v4096z32.pth").symlink_to(home/"checkpoints"/"vae_ch160v4096z32.pth")
    with pytest.raises(T2IError, match="code_dim 8, not 16"):
        t2i.load(tmp_path/"var_d16.pth")


def test_from_the_shell(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("T2I_HOME", str(home))
    grid = tmp_path/"grid.png"
    words = "generate", "3", "7", "-m", "var-d16", "-n", "1", "--seed", "0", "--process"
    code, _, err = typed(monkeypatch, capsys, *words, "-o", grid)
    assert code == 0 and grid.is_file(), err
    about = json.loads(typed(monkeypatch, capsys, "info", "var-d16", "--json")[1])
    assert about["generator"]["num_classes"] == 10 and about["vocabulary"]["number"] == 10
    words = "generate", "golden retreiver", "-m", "var-d16"
    code, _, err = typed(monkeypatch, capsys, *words)
    assert code == 1 and "no class 'golden retreiver'" in err.splitlines()[-1]
