"""COCO 2017 from the archives to a trained generator. A server on this machine publishes the
sample of the repository in archives that are named and laid out like COCO's; nothing is fetched
from elsewhere."""
import json
import shutil
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

import processes
from house import root
from t2i import cli
from t2i.core import T2IError
from t2i.data import coco
from t2i.data.datasets import CocoDataset, DataConfig, InfiniteDataset, load_dataset
from t2i.data.webdataset import read_index, write_shards
from t2i.engine.downloads import fetch_file, is_disk_full
from t2i.generators.var import VAR, VARConfig
from t2i.recompute import checkpoint_blocks

SAMPLE = root/"data"/"sample"/"coco"
pytestmark = pytest.mark.skipif(not SAMPLE.is_dir(), reason="no data/sample/coco here")


class Server(BaseHTTPRequestHandler):
    "Knows ranges, as COCO's server does, and hangs up after `limit` bytes of an answer"
    files, asked, limit = {}, [], 10**9

    def do_GET(self):
        content = self.files.get(self.path)
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.asked.append((self.path, start))
        if content is None or start >= len(content):
            return self.send_error(416 if content else 404)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content)-start))
        self.end_headers()
        self.wfile.write(content[start:start+self.limit])

    def log_message(self, *args):
        "Silent"


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    "The address of the archives of the sample; their sizes are the published ones of this test"
    sizes = {}
    for part, (address, _) in coco.COCO_FILES.items():
        name = "annotations" if part == "annotations" else f"{part}2017"
        with zipfile.ZipFile(tmp_path/"a.zip", "w") as archive:
            for path in sorted((SAMPLE/name).iterdir()):
                archive.write(path, f"{name}/{path.name}")
        Server.files[f"/{address}"] = (tmp_path/"a.zip").read_bytes()
        sizes[part] = address, len(Server.files[f"/{address}"])
    monkeypatch.setattr(coco, "COCO_FILES", sizes)
    monkeypatch.setattr(Server, "limit", 10**9)
    Server.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_broken_download_goes_on(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(Server, "limit", 5000)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path/"coco"
    coco.fetch_coco("~/coco", source=mirror, files=coco.COCO_FILES)
    address, size = coco.COCO_FILES["annotations"]
    starts = [start for path, start in Server.asked if path == f"/{address}"]
    assert starts == list(range(0, size, 5000)) and len(starts) > 2
    for split in ("train", "val"):
        report = coco.check_coco("~/coco", split, decode=True)
        assert report["present"] == report["images"] and not report["missing"]
    assert not list(folder.glob("*.zip*"))
    Server.asked.clear()
    coco.fetch_coco(folder, source=mirror, files=coco.COCO_FILES)
    assert not Server.asked                                      # complete: nothing is asked for


def test_a_killed_download_goes_on(tmp_path, mirror):
    "What an earlier process left is used, and a torn image is unpacked again"
    address, size = coco.COCO_FILES["val"]
    whole = Server.files[f"/{address}"]
    (tmp_path/"val2017.zip.part").write_bytes(whole[:1234])
    path = fetch_file(f"{mirror}/{address}", tmp_path/"val2017.zip", size)
    assert path.read_bytes() == whole and Server.asked == [(f"/{address}", 1234)]


def test_other_files_and_no_network_are_one_line(tmp_path, mirror):
    address, size = coco.COCO_FILES["val"]
    with pytest.raises(T2IError, match=f"{size+1:,} were published"):
        fetch_file(f"{mirror}/{address}", tmp_path/"x.zip", size+1)
    with pytest.raises(T2IError, match="404"):
        fetch_file(f"{mirror}/none", tmp_path/"x.zip")
    with pytest.raises(T2IError, match="cannot fetch") as e:
        fetch_file("http://127.0.0.1:9/none", tmp_path/"x.zip")
    assert "\n" not in str(e.value)


LIMITED = """
import resource, signal, sys, torch
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_file(dict(x=torch.zeros(10**5)), sys.argv[1])
except Exception as e:
    print(e)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
def test_safetensors_tells_the_number_of_an_error(tmp_path):
    "A file that may not grow fails as a full disk does, with another number in the same place"
    p = processes.run("-c", LIMITED, tmp_path/"x")
    assert "os error 27)" in p.stdout
    assert is_disk_full(RuntimeError(p.stdout.replace("27)", "28)")))


def test_missing_images(tmp_path):
    shutil.copytree(SAMPLE, tmp_path/"coco")
    lost = sorted((tmp_path/"coco"/"train2017").iterdir())[2]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 8 images are missing .*{lost.name}"):
        load_dataset(DataConfig(path=str(tmp_path/"coco")))
    there = load_dataset(DataConfig(path=str(tmp_path/"coco"), missing="skip"))
    assert len(there.items) == 7 and lost not in [path for path, _ in there.items]


def test_blank_captions_are_named_and_dropped(tmp_path, caplog):
    shutil.copytree(SAMPLE, tmp_path/"coco")
    table = tmp_path/"coco"/"annotations"/"captions_train2017.json"
    content = json.loads(table.read_text())
    first, second = sorted(about["id"] for about in content["images"])[:2]
    for note in content["annotations"]:
        if note["image_id"] == first:
            note["caption"] = " "
    notes = [note for note in content["annotations"] if note["image_id"] != second]
    table.write_text(json.dumps(content | dict(annotations=notes)))
    data = CocoDataset(tmp_path/"coco", resolution=8)
    assert len(data.items) == 6 and all(data.caption(i).strip() for i in range(len(data)))
    assert f"2 images have no caption and are left out: {first:012}.jpg" in caplog.text


def test_one_caption_is_drawn_at_each_visit():
    data = load_dataset(DataConfig(path=str(SAMPLE), captions="one"))
    stream = InfiniteDataset(data, seed=1)
    assert len(data) == 8 and len(list(data)) == 8
    told = {}
    for position in range(80):
        index = stream.index(position)
        caption = stream[position]["caption"]
        assert caption in data.items[index][1]
        told.setdefault(index, set()).add(caption)
    assert sorted(told) == list(range(8)) and max(map(len, told.values())) > 2
    assert stream[77]["caption"] == InfiniteDataset(data, seed=1)[77]["caption"]


def test_shares_of_the_images():
    def names(fraction):
        data = load_dataset(DataConfig(path=str(SAMPLE), fraction=fraction))
        return {path.name for path, _ in data.items}

    assert len(names(.25)) == 2 and names(.25) < names(.5) < names(1.)
    held_out = load_dataset(DataConfig(path=str(SAMPLE), fraction=.25), "val")
    assert len(held_out.items) == 4                              # a validation is never a share


def test_boxes_lie_where_the_shapes_are():
    data = CocoDataset(SAMPLE, resolution=64)
    for i in range(8):
        for _, (left, top, right, bottom) in data.boxes(i):
            image = data[i]["image"]
            inside = image[:, int(top*64):int(bottom*64), int(left*64):int(right*64)]
            assert (inside - image[:, :1, :1]).abs().amax() > .3   # not the background alone


def test_shards_give_the_same_items(tmp_path):
    source = load_dataset(DataConfig(path=str(SAMPLE)))
    write_shards(source, tmp_path, per_shard=3)
    write_shards(load_dataset(DataConfig(path=str(SAMPLE)), "val"), tmp_path, "val")
    data = load_dataset(DataConfig(path=str(tmp_path)))
    assert len(data) == len(source) == 40
    assert all(torch.equal(data[i]["image"], source[i]["image"]) for i in range(8))
    assert [data.caption(i) for i in range(40)] == [source.caption(i) for i in range(40)]
    assert set(read_index(tmp_path/"train-000000.tar")["000000001"]) == {"jpg", "json", "txt"}


def test_gradients_of_a_var_are_the_same_when_computed_again():
    torch.manual_seed(0)
    config = VARConfig(scales=(1, 2), codebook_size=8, code_dim=4, depth=3, width=64, heads=1,
                       num_classes=3)
    model = VAR(config)
    sums, labels = torch.randn(2, 4, 4), torch.tensor([0, 2])

    def gradients():
        model.zero_grad()
        condition, net = model.condition(labels), model.net
        x = torch.cat([net.embed.start(condition.vector), net.embed(sums, 1)], 1)
        net.forward_blocks(x, net.condition(condition), net.mask).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    assert checkpoint_blocks(model) == 3
    again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert sum(g.abs().sum() for g in plain) > 0


FIELDS = ["model.depth=1", "model.width=48", "model.heads=1", "text.width=48",
          "tokenizer=shapes-msvq", "clip=shapes-clip", "start=null", f"data.path={SAMPLE}",
          "data.resolution=64", "gallery=null", "train.devices=1", "train.batch_size=4",
          "train.warmup=1", "train.val_batches=1", "train.val_every=2", "train.precision=32-true"]


@pytest.fixture
def t2i(tmp_path, monkeypatch):
    "Runs a command in this process, in an empty folder; returns its exit code"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("T2I_HOME", str(tmp_path/"home"))

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["t2i", *map(str, args)])
        try:
            cli.main()
        except SystemExit as e:
            return e.code or 0
        return 0

    return run


def test_the_command(t2i, mirror, capsys):
    "Fetches, reports, and fails where images are missing"
    assert t2i("data", "coco", "--root", "c", "--source", mirror, "--json") == 0
    reports = json.loads(capsys.readouterr().out)
    assert [reports[split]["present"] for split in ("train", "val")] == [8, 4]
    lost = sorted(Path("c/val2017").iterdir())[0]
    lost.unlink()
    assert t2i("data", "coco", "--root", "c", "--check") == 1
    assert f"missing           1     {lost.name}" in capsys.readouterr().out
    assert t2i("data", "coco", "--root", "d", "--source", "http://127.0.0.1:9") == 1
    assert capsys.readouterr().err.count("cannot fetch") == 1


def test_the_recipe_from_cache_to_gallery(t2i, tmp_path, capsys):
    "The sample takes the path of COCO: check, cache, train sharded, kill, resume, score, draw"
    name = "text-var-coco-d20"
    assert t2i("data", "coco", "--root", SAMPLE, "--check", "--decode") == 0
    assert t2i("data", "cache", "kept", *FIELDS, "--recipe", name) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"kept").rglob("*.safetensors")}
    assert {p.parent.name for p in before} == {"tokens", "text"}
    cached = [*FIELDS, "data.cache_dir=kept"]
    often = ["train.save_every=2", "train.log_every=1", "train.sample_every=4"]
    command, log = ["-m", "t2i", "train", name, "-o", "run"], tmp_path/"log.txt"
    log.touch()
    with processes.ranks(2, *command, *cached, *often, "train.steps=1000", stderr=log) as two:
        processes.wait_for("step 3 of", two[0], log)
        two[0].kill()
        two[1].join(900)             # the other process does not wait for a dead one
        assert two[1].exitcode
    done = int(Path("run/last").read_text().removeprefix("step-"))
    processes.torchrun(2, *command, "--resume", f"train.steps={done+2}", stderr=log)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path/"kept").rglob("*.safetensors")}
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, done+3)]
    logged = {key for line in lines for key in line}
    assert {"val_loss", "val_accuracy_1", "val_accuracy_6"} <= logged
    assert "sharding: fsdp" in Path("run/recipe.yaml").read_text()
    state = torch.load(f"run/checkpoints/step-{done+2}/state.pt", weights_only=True)
    assert len(state["random"]) == 2                             # processes that trained
    capsys.readouterr()
    assert t2i("evaluate", "run", "--benchmark", "captions", "--count", 4, "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 4
    gallery = ["--prompts", root/"docs"/"gallery.txt", "--seed", 1103, "--guidance-scale", 4.5]
    assert t2i("generate", *gallery, "-m", "run", "-o", "gallery.png") == 0
    with Image.open("gallery.png") as image:
        assert image.width == 8*130-2 and image.height > 2*130   # 16 prompts with their captions
        assert image.text["seed"] == "1103"
    assert t2i("plot", "run", "-o", "curves.png") == 0
    assert Path("curves.png").read_bytes()[1:4] == b"PNG"
    capsys.readouterr()
    assert t2i("train", name, *cached, "data.fraction=0.5", "-o", "half") == 1
    assert "is stale: it was made with another" in capsys.readouterr().err


def test_what_a_recipe_costs(t2i, capsys):
    assert t2i("info", "text-var-coco-d20", "train.batch_size=32", "--tflops", 20, "--json") == 0
    few = json.loads(capsys.readouterr().out)
    assert t2i("info", "text-var-coco-d20", "--tflops", 20, "--json") == 0
    all_ = json.loads(capsys.readouterr().out)
    assert all_["step"]["teraflops"] == pytest.approx(2*few["step"]["teraflops"])
    assert all_["model"]["parameters"] > 600e6 and all_["memory"]["device_gib"] < 24
