"Start here, as people use it: their zip files and folders, what is refused, what is printed."
import logging
import random
import unicodedata
import zipfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import house
from t2i.core import T2IError, log, warn_once

codes = [cell.source for cell in house.cells(house.root/"nbs"/"start.ipynb", "code")]
last = next(i for i, code in enumerate(codes) if "data = load_dataset" in code)
codes = [code for code in codes[:last+1] if "%pip" not in code and "pipe." not in code]


@pytest.fixture
def run(tmp_path, monkeypatch):
    "Runs the notebook in an empty folder, until it shows the images; returns its names"
    monkeypatch.chdir(tmp_path)
    level = log.level
    warn_once.cache_clear()

    def run(own):
        names = {}
        for code in codes:
            exec(code.replace("own = None", f"own = {own!r}"), names)
        return names

    yield run
    log.setLevel(level)


def image(path, size=(70, 66), **options):
    "An image of noise"
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = random.Random(path.name).randbytes(3*size[0]*size[1])
    pixels = np.frombuffer(noise, np.uint8).reshape(size[1], size[0], 3)
    Image.fromarray(pixels).save(path, **options)


def trained(names):
    return [names["data"].caption(i) for i in range(len(names["data"]))]


def test_without_images_the_shapes_world_takes_their_place(run, capsys):
    assert len(trained(run(None))) == 7
    assert "8 images, 0 of them captioned by their file names" in capsys.readouterr().out


def test_every_format_of_the_loader_gets_captions(run, tmp_path):
    for name in ("red-kite.webp", "dog.gif", "cat.BMP", "owl.webp"):
        image(tmp_path/"holiday"/name)
    assert trained(run("holiday")) == ["cat", "dog", "owl"]
    assert not list((tmp_path/"holiday").rglob("*.txt"))  # what is yours stays as it was


def test_what_a_mac_adds_to_a_zip_is_left_out(run, tmp_path, capsys):
    image(tmp_path/"kite.png")
    with zipfile.ZipFile(tmp_path/"Holiday.ZIP", "w") as archive:
        for name in ("red-kite-1", "red-kite-2", unicodedata.normalize("NFD", "Möwe"), "z"):
            archive.write(tmp_path/"kite.png", f"holiday/{name}.png")
            archive.writestr(f"__MACOSX/holiday/._{name}.png", b"mac")
            archive.writestr(f"holiday/._{name}.png", b"mac")
        archive.writestr("holiday/.DS_Store", b"mac")
    assert sorted(trained(run("Holiday.ZIP"))) == ["Möwe", "red kite", "red kite"]
    out = capsys.readouterr().out
    assert "4 images, 4 of them captioned" in out and "cannot be read" not in out


def test_names_of_a_camera_and_broken_files_are_told(run, tmp_path, capsys):
    for i in range(4):
        image(tmp_path/"holiday"/f"IMG_203{i}.jpg")
    (tmp_path/"holiday"/"IMG_9.heic").write_bytes(b"no image")
    assert trained(run("holiday")) == ["IMG"]*3
    out = capsys.readouterr().out
    assert '4 of them are captioned "IMG", which says nothing' in out
    assert "1 cannot be read (save HEIC and raw photographs as JPEG): IMG_9.heic" in out


def test_photographs_are_shrunk_once(run, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    image(tmp_path/"holiday"/"a.jpg", (1200, 900), exif=exif)
    image(tmp_path/"holiday"/"b.png", (600, 300))
    image(tmp_path/"holiday"/"deep"/"c.png")
    data = run("holiday")["data"]
    assert len(data) == 2
    sizes = {p.name: Image.open(p).size for p in tmp_path.glob("t2i-start/my-images/**/*.[jp]*g")}
    assert sizes == {"a.jpg": (128, 171), "b.png": (256, 128), "c.png": (70, 66)}


def test_tables_and_text_files_speak_first(run, tmp_path):
    for folder in ("jsonl", "txt"):
        for i in range(4):
            image(tmp_path/folder/f"{i}.png")
    rows = [f'{{"file_name": "{i}.png", "text": "number {i}"}}\n' for i in range(3)]
    (tmp_path/"jsonl"/"captions.jsonl").write_text("".join(rows))
    (tmp_path/"txt"/"0.txt").write_text("nought")
    assert trained(run("jsonl")) == ["number 0", "number 1"]
    assert trained(run("txt")) == ["nought", "an image", "an image"]


@pytest.mark.parametrize("own, says", [
    ("holidays.zip", "there is no 'holidays.zip' in .*; there are divided, holiday"),
    ("note.zip", "no folder and no whole zip file"),
    ("none", "images in 'none' that can be read: 0; 3 are needed at least"),
    ("one", "images in 'one' that can be read: 1; 3 are needed"),
    ("two", "images in 'two' that can be read: 2; 3 are needed"),
    ("divided", "one captioned image is left to train; 2 are needed"),
])
def test_what_cannot_train_is_refused_in_one_line(run, tmp_path, own, says):
    (tmp_path/"holiday").mkdir()
    (tmp_path/"note.zip").write_text("no zip")
    (tmp_path/"none").mkdir()
    for name in ("one/a", "two/a", "two/b", "divided/train/a", "divided/val/b", "divided/val/c"):
        image(tmp_path/f"{name}.png")
    with pytest.raises(T2IError, match=says) as e:
        run(own)
    assert "\n" not in str(e.value)


def test_images_in_the_folder_that_is_emptied_stay(run, tmp_path):
    image(tmp_path/"t2i-start"/"mine"/"a.png")
    for own in ("t2i-start", "t2i-start/mine"):
        with pytest.raises(T2IError, match="lies in t2i-start, which this notebook empties"):
            run(own)
    assert (tmp_path/"t2i-start"/"mine"/"a.png").exists()


def test_a_training_tells_how_far_it_is(run, capsys):
    with mock.patch.object(logging.getLogger(), "handlers", []):  # as in a new process
        run(None)
        log.info("step 2 of 8")
    assert "step 2 of 8" in capsys.readouterr().out
