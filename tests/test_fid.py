"FID and its relatives: the Inception network, files that are no weights, the command."
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg

from t2i import fid
from t2i.core import T2IError, from_uint8, log
from t2i.engine.checkpoints import CheckpointError
from t2i.evaluation import frechet_distance


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A file with random weights of the Inception network, laid out like the published one"
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception")/"weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = inception.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_inception_network(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    network = fid.InceptionNetwork(weights)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    images = torch.stack([from_uint8(p) for p in pixels])
    features, logits = network(images)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    own = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    expected = own(torch.as_tensor(pixels).permute(0, 3, 1, 2))          # the library's own input
    assert torch.equal(features, expected[0]) and torch.equal(logits, expected[1])
    assert not features.requires_grad and network.key == fid.InceptionNetwork(weights).key


def test_weights_that_would_execute_something_are_refused(weights, tmp_path):
    class Payload:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path/'ran')!r}, 'w')",))

    path = tmp_path/"weights.pth"
    torch.save(dict(a=Payload()), path)
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        fid.InceptionNetwork(path)
    assert not (tmp_path/"ran").exists()


def test_without_network_one_line_says_what_to_do(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_HOME", str(tmp_path))
    monkeypatch.setattr(fid, "INCEPTION", fid.PublishedFile("w.pth", "file:///nowhere/w.pth"))
    with pytest.raises(CheckpointError, match="cannot fetch .*download it by hand and put it at"):
        fid.InceptionNetwork()


def test_distances_of_many_numbers():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(300, 40, generator=g)
    b = torch.randn(200, 40, generator=g)*1.5 + .2
    ours = frechet_distance(a, b)
    x, y = a.double().numpy(), b.double().numpy()
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    spread = x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2*np.trace(root)
    assert ours == pytest.approx(((x.mean(0)-y.mean(0))**2).sum() + spread, rel=1e-6)
    twice = frechet_distance(torch.cat([a, a], 1), torch.cat([b, b], 1)) # rank 40 of 80
    assert twice == pytest.approx(2*ours, rel=1e-6)
    assert np.isfinite(frechet_distance(a[:5], b[:5]))


def test_kernel_distance_is_unbiased():
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(300):
        x, y = torch.randn(2, 12, 4, generator=g)
        found.append(fid.squared_mmd(x, y))
    mean, error = np.mean(found), np.std(found)/len(found)**.5
    assert abs(mean) < 4*error
    x, y = torch.randn(2, 12, 4, generator=g)
    with_itself = [float(fid.kernel(v, v).mean()) for v in (x, y)]       # the biased estimate
    assert sum(with_itself) - 2*float(fid.kernel(x, y).mean()) > fid.squared_mmd(x, y) + 10*error


def test_subsets_agree_with_all():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 900, 6, generator=g)
    y = y + .5
    whole = fid.squared_mmd(x.double(), y.double())
    mean, error = fid.kernel_distance(x, y, 40, 100)
    assert error > 0 and mean == pytest.approx(whole, abs=5*error)


def test_parts_of_a_thousand_give_the_same_region():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1100, 2, generator=g), torch.randn(1050, 2, generator=g)*2
    precision, recall = fid.precision_recall(x, y)
    distances = torch.cdist(y.double(), x.double())
    radii = torch.cdist(x.double(), x.double()).sort(1).values[:, 3]
    assert precision == pytest.approx(float((distances <= radii).any(1).double().mean()))
    assert precision < recall


def test_inception_score_of_sorted_images():
    logits = 30*torch.eye(5).repeat_interleave(40, 0)
    assert fid.inception_score(logits, 10)[0] > 4
    parts = [fid.inception_score(part, 1)[0] for part in logits.chunk(10)]
    assert np.mean(parts) == pytest.approx(1, abs=1e-5)                  # what shuffling cures


@pytest.mark.parametrize("function, fault", [
    (lambda x: frechet_distance(x[:1], x), "at least 2 images"),
    (lambda x: frechet_distance(x, x[:1]), "at least 2 images"),
    (lambda x: fid.kernel_distance(x[:1], x), "at least 2 images"),
    (lambda x: fid.precision_recall(x[:3], x), "more than 3 images"),
])
def test_too_few_images(function, fault):
    with pytest.raises(T2IError, match=fault):
        function(torch.randn(9, 4))


def test_a_note_on_few_images(caplog):
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    with caplog.at_level("INFO", log.name):
        fid.distribution_scores(x, x)
    assert "9 images for features of 16 numbers: fid is far too large" in caplog.text


def test_evaluate_fid(t2i_main, tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_HOME", str(tmp_path))
    command = ["evaluate", "digits-var", "--benchmark", "fid", "--features", "shapes-clip",
               "--count", "12", "--top-p", "0.9", "--seed", "5", "--eval-clip", "shapes-clip"]
    scores = json.loads(t2i_main(*command, "--json"))
    assert scores["images"] == scores["reference_images"] == 12 and scores["seed"] == 5
    assert scores["settings"]["top_p"] == .9 and "guidance_scale" in scores["settings"]
    assert scores["frechet"] > 0 and 0 <= scores["precision"] <= 1 and scores["checkpoint"]
    (kept,) = (tmp_path/"cache"/"fid").iterdir()
    before = kept.stat().st_mtime_ns
    names, _, values = t2i_main(*command, "--markdown").splitlines()
    row = dict(zip(names.strip("| ").split(" | "), values.strip("| ").split(" | ")))
    assert row["frechet"] == f"{scores['frechet']:.4g}"
    assert row["checkpoint"] == scores["checkpoint"]
    assert (row["top_p"], row["seed"], row["images"]) == ("0.9", "5", "12")
    assert kept.stat().st_mtime_ns == before                             # read, not written again


def test_coco_by_its_name(t2i_main, tmp_path, monkeypatch):
    "The validation images of the folder where COCO is fetched to, and their features kept"
    monkeypatch.setenv("T2I_HOME", str(tmp_path))
    shutil.copytree(Path(__file__).parent.parent/"data"/"sample"/"coco", tmp_path/"coco")
    command = ["evaluate", "shapes-msvq", "--benchmark", "fid", "--features", "shapes-clip"]
    for data in ("coco", str(tmp_path/"coco")):
        scores = json.loads(t2i_main(*command, "--data", data, "--count", "4", "--json"))
        assert scores["images"] == scores["reference_images"] == 4 and scores["data"] == data
    assert len([*(tmp_path/"cache"/"fid").iterdir()]) == 1


@pytest.fixture
def t2i_main(monkeypatch, capsys):
    "Runs the command in this process: what it prints"
    import sys

    from t2i.cli import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["t2i", *words])
        capsys.readouterr()
        try:
            main()
        except SystemExit as e:
            assert not e.code, capsys.readouterr().err
        return capsys.readouterr().out.strip()
    return run
