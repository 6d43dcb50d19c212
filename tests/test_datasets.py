"Folders as users have them: every layout is read, and what is left out is counted."
import io
import json
import logging
import os
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.core import from_pil, log, to_rgb, warn_once
from t2i.data.datasets import (
    CocoDataset,
    DataConfig,
    FolderDataset,
    ImageFiles,
    InfiniteDataset,
    ShapesDataset,
    fit_square,
    info_once,
    load_dataset,
    open_image,
    stream_loader,
)
from t2i.data.mixtures import load_mixture
from t2i.engine import caches, folders
from t2i.engine.folders import IMAGE_SUFFIXES, is_image, visible_files
from t2i.generators.finetuning import own_images
from t2i.generators.var_training import classified
from t2i.text import TextTokenizer, prepare_text_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of EXIF with errors
root = Path(__file__).resolve().parent.parent


@pytest.fixture
def messages():
    "What the package logs in a test"
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    level = log.level
    warn_once.cache_clear()
    info_once.cache_clear()
    log.addHandler(handler)
    log.setLevel("INFO")
    yield found
    log.removeHandler(handler)
    log.setLevel(level)


def image(path, caption=None, color="red", size=(40, 30), **options):
    "Writes an image, and its caption beside it"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def captions(folder, **options):
    "Per name within a folder, the captions that the dataset reads"
    items = FolderDataset(folder, 8, **options).items
    return {path.relative_to(folder).as_posix(): texts for path, texts in items}


def rows(path, *values):
    path.write_text("".join(json.dumps(v, ensure_ascii=False)+"\n" for v in values), "utf-8")


# ---- EXIF


def with_exif(path, *fields, order=">", count=None):
    "A JPEG of 40x30 whose EXIF has these fields: (tag, type, count, four bytes)"
    data = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(data, "JPEG")
    data = data.getvalue()
    mark = {">": b"MM\0*", "<": b"II*\0"}[order]
    exif = b"Exif\0\0" + mark + struct.pack(order+"I", 8)
    exif += struct.pack(order+"H", len(fields) if count is None else count)
    for tag, kind, number, value in fields:
        exif += struct.pack(order+"HHI", tag, kind, number) + value
    exif += b"\0"*4
    head = b"\xff\xe1" + struct.pack(">H", len(exif)+2)
    path.write_bytes(data[:2] + head + exif + data[2:])
    return path


TURNED = (0x112, 3, 1, b"\0\6\0\0")  # Orientation 6: the camera was held upright


@pytest.mark.parametrize("kind", range(14))
@pytest.mark.parametrize("tag", [0x10E, 0x8769, 0x8825, 0x112, 0x9286, 0x927C, 0xA005, 0x501B])
def test_odd_exif_never_stops_training(tmp_path, tag, kind):
    counts = {0: bytes(4), 1: b"\0\0\0\6", 3: b"\xff\xff\xff\xff", 2**31: b"ab\0\0"}
    for number, value in counts.items():
        path = with_exif(tmp_path/"x.jpg", TURNED, (tag, kind, number, value))
        if is_image(path):
            item = ImageFiles([(path, [""])], 8)[0]
            assert item["image"].shape == (3, 8, 8)
        from_pil(Image.open(path))
        os.utime(path, ns=(0, number))


def test_odd_exif_is_turned_as_far_as_it_can_be_read(tmp_path):
    odd = (0x10E, 5, 1, bytes(4))  # a description that is the number 0/0
    assert to_rgb(Image.open(with_exif(tmp_path/"a.jpg", TURNED, odd))).size == (30, 40)
    little = (0x112, 3, 1, b"\6\0\0\0")
    assert to_rgb(Image.open(with_exif(tmp_path/"b.jpg", little, order="<"))).size == (30, 40)
    cut = with_exif(tmp_path/"c.jpg", TURNED, count=999)
    assert is_image(cut) and to_rgb(Image.open(cut)).size in ((30, 40), (40, 30))
    assert is_image(tmp_path/"a.jpg")


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_turned_once(tmp_path, turn):
    corner = Image.new("RGB", (40, 30), "white")
    corner.paste("red", (0, 0, 20, 15))
    exif = Image.Exif()
    exif[0x112] = turn
    corner.save(tmp_path/"x.png", exif=exif)
    image = to_rgb(Image.open(tmp_path/"x.png"))
    left, top = turn in (1, 4, 5, 8), turn in (1, 2, 5, 6)
    assert image.size == ((40, 30) if turn < 5 else (30, 40))
    x = 2 if left else image.width-3
    y = 2 if top else image.height-3
    assert image.getpixel((x, y)) == (255, 0, 0)
    assert to_rgb(image).size == image.size


# ---- Squares


def test_thin_images_take_little_memory():
    code = (
        "import resource, sys\nfrom PIL import Image\nfrom t2i.data.datasets import fit_square\n"
        "def peak():\n    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for size in ((2, 20000), (20000, 2), (1, 60000), (30000, 3)):\n"
        "    fit_square(Image.new('RGB', size), 256)\n"
        "print(peak()-before)"
    )
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(p.stdout) < 100*1024  # KiB


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (640, 481), (64, 64)])
@pytest.mark.parametrize("x", [0, .3, 1])
def test_every_square_lies_inside(size, x):
    for share in (1., .9, .7501):
        image = fit_square(Image.new("RGB", size, "red"), 9, share, x, 1-x)
        assert image.size == (9, 9) and image.getpixel((8, 8)) == (255, 0, 0)


def photograph(path, size, **options):
    "A JPEG with edges and shades"
    y, x = np.mgrid[:size[1], :size[0]]/min(size)
    waves = [np.sin(9*x + 4*y), np.cos(13*y*x), np.sign(np.sin(20*x)*np.sin(15*y))]
    pixels = np.stack([127.5 + 120*w for w in waves], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_photographs_are_shrunk_while_they_are_decoded(tmp_path, orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = photograph(tmp_path/"large.jpg", (1603, 1201), exif=exif)
    whole = from_pil(fit_square(open_image(path), 64))[0]
    sides = []
    see = fit_square
    monkeypatch.setattr(
        "t2i.data.datasets.fit_square", lambda i, *a, **k: sides.append(i.size) or see(i, *a, **k))
    files = ImageFiles([(path, [""])], 64)
    assert (files[0]["image"] - whole).abs().mean() < 1/127.5
    files.__getitem__(0, share=.75)  # a small crop needs more
    ImageFiles([(path, [""])], 512)[0]
    turned = slice(None, None, -1 if orientation == 6 else 1)
    assert sides == [size[turned] for size in [(200, 150), (401, 300), (1603, 1201)]]


@pytest.mark.parametrize("size", [(255, 300), (64, 64), (40, 700), (9, 9)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_images_less_than_four_times_as_large_are_read_as_before(tmp_path, size, mode):
    path = tmp_path/"small.jpg"
    Image.open(photograph(path, size)).convert(mode).save(path)
    whole = from_pil(fit_square(open_image(path), 64))[0]
    assert torch.equal(ImageFiles([(path, [""])], 64)[0]["image"], whole)


def test_other_formats_are_read_whole(tmp_path):
    for name in ("large.png", "large.webp", "large.gif", "large.bmp"):
        path = photograph(tmp_path/name, (640, 520))
        whole = from_pil(fit_square(open_image(path), 64))[0]
        assert torch.equal(ImageFiles([(path, [""])], 64)[0]["image"], whole)


# ---- Which files


def test_links_suffixes_and_hidden_names(tmp_path, messages):
    folder = tmp_path/"set"
    image(tmp_path/"real"/"linked.png", "linked")
    image(folder/"a.png", "a")
    image(folder/"B.JPG", "upper case")
    (folder/"sub").symlink_to(tmp_path/"real")
    (folder/"ring").symlink_to(folder)
    (folder/"up").symlink_to(tmp_path)
    (folder/"gone.png").symlink_to(tmp_path/"nowhere.png")
    for suffix in ("gif", "tif", "bmp", "ppm", "jfif", "jpe"):
        options = {"format": "JPEG"} if suffix in ("jfif", "jpe") else {}
        image(folder/f"b_{suffix}.{suffix}", suffix, **options)
    (folder/"phone.heic").write_bytes(b"not for Pillow")
    for hidden in (".ipynb_checkpoints", ".Trash-1000/files", "@eaDir", "__MACOSX", ".thumbnails"):
        image(folder/hidden/"x.png", "hidden")
    image(folder/"._a.png", "a fork")
    found = set(captions(folder))
    expected = {"a.png", "B.JPG", "sub/linked.png", "b_jfif.jfif", "b_jpe.jpe"}
    assert found == expected | {f"b_{s}.{s}" for s in ("gif", "tif", "bmp", "ppm")}
    (warning,) = messages
    assert "skipped 2 of 11" in warning and "gone.png" in warning and "phone.heic" in warning


def test_folders_that_link_to_each_other_are_entered_once(tmp_path):
    for name in ("a", "b"):
        image(tmp_path/name/f"{name}.png", name)
    (tmp_path/"a"/"to_b").symlink_to(tmp_path/"b")
    (tmp_path/"b"/"to_a").symlink_to(tmp_path/"a")
    assert sorted(captions(tmp_path)) == ["a/a.png", "b/b.png"]
    assert sorted(captions(tmp_path/"a")) == ["a.png", "to_b/b.png"]
    (tmp_path/"loop").symlink_to(tmp_path/"loop")
    assert len(visible_files(tmp_path)) == 4 + 1


def test_the_folder_itself_may_be_hidden_or_a_link(tmp_path):
    image(tmp_path/".cache"/"a.png", "a")
    (tmp_path/"link").symlink_to(tmp_path/".cache")
    assert captions(tmp_path/".cache") == captions(tmp_path/"link") == {"a.png": ["a"]}


def test_suffixes_that_pillow_reads_are_images():
    readable = {s for s, f in Image.registered_extensions().items() if f in Image.OPEN}
    assert readable < set(IMAGE_SUFFIXES) and not {".txt", ".json", ".csv"} & set(IMAGE_SUFFIXES)


# ---- Captions


@pytest.mark.parametrize("key", ["text", "caption"])
def test_a_list_is_several_captions(tmp_path, key):
    for i in range(3):
        image(tmp_path/f"{i}.png")
    said = enumerate((["one", "two"], "only", [" b "]))
    rows(tmp_path/"captions.jsonl", *({"file_name": f"{i}.png", key: t} for i, t in said))
    data = FolderDataset(tmp_path, 8)
    assert [i["caption"] for i in data] == ["one", "only", "b", "two", "only", "b"]
    stream = InfiniteDataset(data)
    assert {stream[p]["caption"] for p in range(6)} == {"one", "two", "only", "b"}


def test_captions_with_colons_stay_whole(tmp_path):
    said = "a sign: stop: 10:30, https://example.org"
    image(tmp_path/"beside"/"a.png", said)
    image(tmp_path/"table"/"a.png")
    row = json.dumps(dict(file_name="a.png", text=said))
    (tmp_path/"table"/"captions.jsonl").write_text(row + "\n")
    for layout in ("beside", "table"):
        assert FolderDataset(tmp_path/layout)[0]["caption"] == said


def test_several_rows_are_several_captions(tmp_path):
    image(tmp_path/"a.png")
    rows(tmp_path/"metadata.jsonl", *({"file_name": "a.png", "text": t} for t in "xyx"))
    assert captions(tmp_path) == {"a.png": ["x", "y"]}


@pytest.mark.parametrize("value", [5, 1.5, True, {"en": "a"}, ["a", 5], [["a"]], "\ud800"])
def test_other_captions_are_errors_with_file_and_line(tmp_path, value):
    image(tmp_path/"a.png")
    lines = [json.dumps({"file_name": "a.png", "text": text}) for text in ("x", value)]
    (tmp_path/"captions.jsonl").write_text("\n\n".join(lines))
    with pytest.raises(ValueError, match=r"captions\.jsonl line 3: ") as e:
        FolderDataset(tmp_path)
    assert "\n" not in str(e.value)
    assert len(FolderDataset(tmp_path, captioned=False)) == 1  # a tokenizer needs no captions


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"file_name": 3, "text": "x"}', '"a.png"'])
def test_broken_rows_name_their_line(tmp_path, line):
    image(tmp_path/"a.png")
    (tmp_path/"metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    if not line:
        assert captions(tmp_path) == {"a.png": ["x"]}
        return
    with pytest.raises(ValueError, match=r"metadata\.jsonl line 2: it "):
        FolderDataset(tmp_path)


def test_all_broken_rows_are_named_at_once(tmp_path, messages):
    image(tmp_path/"a.png")
    image(tmp_path/"sub"/"b.png")
    good = '{"file_name": "a.png", "text": "x"}'
    (tmp_path/"captions.jsonl").write_text("\n".join([good, "{", "", "[]", good]))
    (tmp_path/"sub"/"metadata.csv").write_text("file_name,words\n" + "b.png,x\n"*12)
    with pytest.raises(ValueError) as e:
        FolderDataset(tmp_path)
    said = str(e.value)
    assert "captions.jsonl line 2: it is not JSON; line 4: it needs" in said and "\n" not in said
    assert "metadata.csv line 2: it needs" in said and said.endswith('; and 2 more')
    FolderDataset(tmp_path, captioned=False)
    assert sum("captions are not read" in m for m in messages) == 2
    (tmp_path/"sub"/"metadata.csv").write_text("name,text\nb.png,x\nb.png," + "x"*200_000)
    with pytest.raises(ValueError, match="csv line 2: it needs .*; line 3: field larger"):
        FolderDataset(tmp_path/"sub")


def test_blank_captions_are_no_captions(tmp_path, messages):
    for i, caption in enumerate(("a cat", " \n", "\ufeff", "\u2003")):
        image(tmp_path/"txt"/f"{i}.png", caption)
    assert captions(tmp_path/"txt") == {"0.png": ["a cat"]}
    assert messages[-1].count("(no caption)") == 3
    for i in range(5):
        image(tmp_path/"table"/f"{i}.png")
    texts = ("a cat", "", None, ["", " "], "  ")
    rows(tmp_path/"table"/"captions.jsonl", *(
        {"file_name": f"{i}.png", "text": t} for i, t in enumerate(texts)
    ))  # fmt: skip
    assert captions(tmp_path/"table") == {"0.png": ["a cat"]}
    assert messages[-1].count("(no caption)") == 4


@pytest.mark.parametrize("said", [
    "a.png", "./a.png", "sub/../a.png", ".\\a.png", "a",
    "{folder}/a.png", "{folder}/./sub/../a.png", "{link}/a.png",
])  # fmt: skip
def test_spellings_of_a_name(tmp_path, said, messages):
    folder = tmp_path/"set"
    image(folder/"a.png")
    (tmp_path/"link").symlink_to(folder)
    name = said.format(folder=folder, link=tmp_path/"link")
    rows(folder/"captions.jsonl", {"file_name": name, "text": "x"})
    assert captions(folder) == {"a.png": ["x"]}
    assert not messages


@pytest.mark.parametrize("said", ["sub/a.png", "sub\\a.png", ".\\sub\\a.png", "sub//a.png"])
def test_spellings_of_a_name_in_a_subfolder(tmp_path, said):
    image(tmp_path/"sub"/"a.png")
    rows(tmp_path/"captions.jsonl", {"file_name": said, "text": "x"})
    assert captions(tmp_path) == {"sub/a.png": ["x"]}


@pytest.mark.parametrize("disk, table", [("NFD", "NFC"), ("NFC", "NFD")])
@pytest.mark.parametrize("name", ["café.png", "Ångström/日本語が.png", "한국.png"])
def test_composed_and_decomposed_letters(tmp_path, disk, table, name):
    image(tmp_path/unicodedata.normalize(disk, name))
    said = unicodedata.normalize(table, name)
    rows(tmp_path/"captions.jsonl", {"file_name": said, "text": "x"})
    assert list(captions(tmp_path).values()) == [["x"]]
    rows(tmp_path/"captions.jsonl", {"file_name": str(tmp_path/said), "text": "y"})
    assert list(captions(tmp_path).values()) == [["y"]]


def test_rows_without_an_image_are_counted(tmp_path, messages):
    image(tmp_path/"a.png")
    names = ("a.png", "b.png", "C:\\photos\\a.png", "/photos/a.png")
    rows(tmp_path/"captions.jsonl", *({"file_name": n, "text": "x"} for n in names))
    assert captions(tmp_path) == {"a.png": ["x"]}
    (warning,) = messages
    assert warning.startswith("3 of 4 names") and "b.png" in warning


# ---- Text files


def test_text_files_without_an_image_are_counted(tmp_path, messages):
    image(tmp_path/"a.png", "a")
    (tmp_path/"sub").mkdir()
    (tmp_path/"sub"/"b.txt").write_text("b")
    assert captions(tmp_path) == {"a.png": ["a"]}
    assert any("1 of 2 text files" in m and m.endswith(": sub/b.txt") for m in messages)


@pytest.mark.parametrize("table, shared", [
    (None, True), ([("a", "x")], True), ([("a.png", "x"), ("a.jpg", "y")], False),
    ([("a", "x"), ("a.jpg", "y")], False),
])
def test_captions_that_images_share_are_named(tmp_path, messages, table, shared):
    image(tmp_path/"a.png", None if table else "x")
    image(tmp_path/"a.jpg")
    if table:
        rows(tmp_path/"captions.jsonl", *({"file_name": n, "text": t} for n, t in table))
    assert len(captions(tmp_path)) == 2
    said = [m for m in messages if "belong to several images" in m]
    assert len(said) == shared and all(m.endswith(": a (a.jpg, a.png)") for m in said)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends(tmp_path, encoding, end):
    for name in ("txt", "jsonl", "csv"):
        for i in range(2):
            image(tmp_path/name/f"{i}.png")
    (tmp_path/"txt"/"0.TXT").write_bytes(f"é{end}".encode(encoding))
    (tmp_path/"txt"/"1.Txt").write_bytes("b".encode(encoding))
    said = [{"file_name": f"{i}.png", "text": "éb"[i]} for i in range(2)]
    lines = [json.dumps(s, ensure_ascii=False) for s in said]
    (tmp_path/"jsonl"/"metadata.jsonl").write_bytes((end.join(lines) + end).encode(encoding))
    table = end.join(["file_name,text", "0.png,é", '"1.png","b"'])
    (tmp_path/"csv"/"metadata.csv").write_bytes(table.encode(encoding))
    for name in ("txt", "jsonl", "csv"):
        assert captions(tmp_path/name) == {"0.png": ["é"], "1.png": ["b"]}


def test_a_mark_in_the_middle_of_joined_files(tmp_path):
    for i in range(2):
        image(tmp_path/f"{i}.png")
    line = '\ufeff{{"file_name": "{}.png", "text": "x"}}\n'
    (tmp_path/"captions.jsonl").write_text(line.format(0) + line.format(1), encoding="utf-8")
    assert captions(tmp_path) == {"0.png": ["x"], "1.png": ["x"]}


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_separators_within_a_line(tmp_path, sign):
    image(tmp_path/"json"/"a.png")
    image(tmp_path/"csv"/"a.png")
    said = f"a red{sign}circle"
    ascii_only = sign < " "  # JSON demands an escape for these
    line = json.dumps({"file_name": "a.png", "text": said}, ensure_ascii=ascii_only)
    (tmp_path/"json"/"captions.jsonl").write_text(line, encoding="utf-8")
    (tmp_path/"csv"/"metadata.csv").write_text(f"file_name,text\na.png,{said}\n", encoding="utf-8")
    assert captions(tmp_path/"json") == captions(tmp_path/"csv") == {"a.png": [said]}


def test_text_that_is_not_utf8(tmp_path, messages):
    image(tmp_path/"a.png", "a")
    image(tmp_path/"b.png")
    (tmp_path/"b.txt").write_bytes(b"caf\xe9")
    (tmp_path/"LICENSE.txt").write_bytes(b"\xa9")  # beside no image: not read
    assert captions(tmp_path) == {"a.png": ["a"]}
    assert [m for m in messages if "UTF-8" in m] == [
        f"{tmp_path/'b.txt'} is not text in UTF-8: save it as UTF-8"]
    (tmp_path/"captions.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        FolderDataset(tmp_path)


# ---- Hugging Face's imagefolder


def write_table(place, pairs, table):
    if table == "csv":
        lines = [f'{name},"{text}"' for name, text in pairs]
        (place/"metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    else:
        rows(place/"metadata.jsonl", *({"file_name": n, "text": t} for n, t in pairs))


def imagefolder(folder, table="jsonl", splits=("train", "validation", "test"), top=False):
    "Two images per split; the tables lie in the splits, or one at the top"
    pairs = []
    for split in splits:
        for i in range(2):
            image(folder/split/f"{i}.png")
        inside = [(f"{i}.png", f"{split} {i}") for i in range(2)]
        pairs += [(f"{split}/{name}", text) for name, text in inside]
        if not top:
            write_table(folder/split, inside, table)
    if top:
        write_table(folder, pairs, table)


def read(config):
    "The captions of both splits"
    found = {}
    for split in ("train", "val"):
        data = load_dataset(config, split)
        found[split] = [data.caption(i) for i in range(len(data))]
    return found


@pytest.mark.parametrize("table", ["jsonl", "csv"])
@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("val", ["validation", "valid", "val", "dev"])
def test_an_imagefolder_has_its_own_splits(tmp_path, messages, table, top, val):
    imagefolder(tmp_path, table, ("train", val, "test"), top)
    found = read(DataConfig(path=str(tmp_path), resolution=8))
    assert found == dict(train=["train 0", "train 1"], val=[f"{val} 0", f"{val} 1"])
    assert not any("skipped" in m or "meet no image" in m for m in messages)


@pytest.mark.parametrize("splits", [("train",), ("train", "test")])
def test_without_a_validation_folder_some_of_train_is_held_out(tmp_path, splits):
    imagefolder(tmp_path, splits=splits)
    found = read(DataConfig(path=str(tmp_path), resolution=8))
    assert found == dict(train=["train 0"], val=["train 1"])


def test_photographs_of_trains_are_no_split(tmp_path):
    for kind in ("train", "car"):
        image(tmp_path/kind/"0.png", kind)
    found = read(DataConfig(path=str(tmp_path), resolution=8))
    assert found == dict(train=["car"], val=["train"])


def test_images_beside_the_splits_are_counted(tmp_path, messages):
    imagefolder(tmp_path)
    image(tmp_path/"cover.png", "a cover")
    assert len(load_dataset(DataConfig(path=str(tmp_path), resolution=8))) == 2
    assert any(m.startswith("left out 1 images") for m in messages)


def test_metadata_in_subfolders_and_the_nearest_table(tmp_path):
    for place in ("", "cats", "cats/old", "notes"):
        image(tmp_path/place/"a.png", "a text file")
    rows(tmp_path/"cats"/"metadata.jsonl", {"file_name": "a.png", "text": "cat"},
         {"file_name": "old/a.png", "text": "far"})  # fmt: skip
    rows(tmp_path/"cats"/"old"/"captions.jsonl", {"file_name": "a.png", "text": "near"})
    assert captions(tmp_path) == {
        "a.png": ["a text file"], "notes/a.png": ["a text file"],
        "cats/a.png": ["cat"], "cats/old/a.png": ["near"],
    }  # fmt: skip


@pytest.mark.parametrize("inner", ["a", "a.png"])
@pytest.mark.parametrize("outer", ["a", "a.png"])
def test_the_nearest_table_wins_however_names_are_written(tmp_path, inner, outer):
    image(tmp_path/"cats"/"a.png", "a text file")
    image(tmp_path/"cats"/"a.b.png", "a text file")
    rows(tmp_path/"metadata.jsonl", {"file_name": f"cats/{outer}", "text": "far"},
         {"file_name": "cats/a.b.png", "text": "another"})  # fmt: skip
    rows(tmp_path/"cats"/"metadata.jsonl", {"file_name": inner, "text": "near"})
    assert captions(tmp_path) == {"cats/a.png": ["near"], "cats/a.b.png": ["another"]}


# ---- Which dataset


def test_a_path_is_never_ignored(tmp_path, messages):
    image(tmp_path/"mine"/"a.png", "a")
    image(tmp_path/"mine"/"b.png", "b")
    for name in ("shapes", "digits"):
        config = DataConfig(name, path=str(tmp_path/"mine"))
        assert config.name == "folder" and load_dataset(config)[0]["caption"] == "a"
    assert messages[0].endswith("means data.name=folder")
    assert messages.count(messages[0]) == 1
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_dataset(DataConfig(path=str(tmp_path/"nowhere")))
    with pytest.raises(ValueError, match="data.val_path needs data.path"):
        DataConfig(val_path="x")
    for name in ("folder", "t2i.data.webdataset.ShardDataset"):
        with pytest.raises(ValueError, match="is the folder of data.path: leave it out"):
            DataConfig(name, path=str(tmp_path), val_path=f"{tmp_path}/./")


@pytest.mark.parametrize("name", ["mnist", "", "Shapes", "..", "a b.c", "folder "])
def test_unknown_names_list_the_known(name):
    known = ("known are shapes, terse-shapes, hard-shapes, digits, emoji, emoji-large, "
             "emoji-portraits, folder, coco, mixture, and your own")
    with pytest.raises(ValueError, match=known):
        load_dataset(DataConfig(name))


def test_a_class_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mine_for_test.py").write_text(
        "class Data:\n    def __init__(self, config, split):\n"
        "        self.size = config.resolution\n        self.split = split\n\n"
        "    def __len__(self):\n        return 3\n"
    )
    Path("torn_for_test.py").write_text("import no_such_thing_anywhere\n")
    data = load_dataset(DataConfig("mine_for_test.Data", resolution=16), "val")
    assert (data.size, data.split, len(data)) == (16, "val", 3)
    with pytest.raises(ValueError, match="No module named 'no_such_thing_anywhere'"):
        load_dataset(DataConfig("torn_for_test.Data"))
    with pytest.raises(ValueError, match="mine_for_test has no Other"):
        load_dataset(DataConfig("mine_for_test.Other"))
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        load_dataset(DataConfig("nowhere.Data"))


def test_every_twentieth_is_held_out(tmp_path, messages):
    for i in range(40):
        image(tmp_path/f"{i:02}.png", str(i))
    parts = read(DataConfig(path=str(tmp_path), resolution=8))
    assert parts["val"] == ["19", "39"] and len(parts["train"]) == 38
    assert messages == [f"data.path={tmp_path} means data.name=folder"]


def held_out(folder, captioned):
    "Names of the images that validate; the others train, and there is one at least"
    names = {}
    for split in ("train", "val"):
        items = FolderDataset(folder, 8, captioned, split=split).items
        names[split] = [path.name for path, _ in items]
    assert names["train"] and names["val"] and not set(names["train"]) & set(names["val"])
    return names["val"], set(names["train"])


def test_what_is_skipped_moves_no_image_to_another_split(tmp_path):
    for i in range(40):
        image(tmp_path/f"{i:02}.png", str(i))
    (tmp_path/"05.txt").unlink()
    (tmp_path/"10.png").write_bytes(b"torn")
    for captioned in (True, False):
        assert held_out(tmp_path, captioned)[0] == ["19.png", "39.png"]
    (tmp_path/"19.txt").unlink()
    assert held_out(tmp_path, True)[0] == ["39.png"]
    assert held_out(tmp_path, False)[0] == ["19.png", "39.png"]


@pytest.mark.parametrize("mute, broken", [
    ((3,), ()), ((), (3,)), ((2,), (3,)), ((0, 3), ()), ((0, 1), ()), ((), (0, 1)), ((1, 2, 3), ()),
])
def test_a_small_folder_trains_no_tokenizer_on_what_a_generator_holds_out(tmp_path, mute, broken):
    for i in range(4):
        image(tmp_path/f"{i}.png", None if i in mute else str(i))
    for i in broken:
        (tmp_path/f"{i}.png").write_bytes(b"torn")
    _, trains = held_out(tmp_path, False)
    if len(mute) == 3:
        with pytest.raises(ValueError, match="holds one image"):
            FolderDataset(tmp_path, 8, split="train")
    else:
        assert not trains & set(held_out(tmp_path, True)[0])


def test_a_later_start_decodes_what_is_new_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_HOME", str(tmp_path/"home"))
    monkeypatch.setattr(caches, "REMEMBERED", 6)
    decode, read = folders.decode, []
    monkeypatch.setattr(folders, "decode", lambda p, least: read.append(p.name) or decode(p))
    for i in range(6):
        image(tmp_path/"own"/f"{i}.png", str(i))
    whole = (tmp_path/"own"/"0.png").read_bytes()
    (tmp_path/"own"/"3.png").write_bytes(whole[:60])  # its head can be read

    def start():  # in a new process
        folders.can_decode.cache_clear()
        read.clear()
        return len(FolderDataset(tmp_path/"own", 8)), sorted(read)

    assert start() == (5, [f"{i}.png" for i in range(6)])
    assert start() == (5, ["3.png"])
    (tmp_path/"own"/"3.png").write_bytes(whole)
    (tmp_path/"own"/"5.png").write_bytes(whole[:70])
    assert start() == (5, ["3.png", "5.png"])
    for record in (tmp_path/"home"/"cache").glob("*.json"):
        record.write_text("torn")
    assert start() == (5, [f"{i}.png" for i in range(6)])


def test_classes_and_mixtures_hold_out_the_same_images(tmp_path):
    for i in range(24):
        image(tmp_path/"ab"[i//12]/f"{i:02}.png", None if i in (3, 15) else str(i))
    (tmp_path/"a"/"05.png").write_bytes(b"torn")
    config = DataConfig(path=str(tmp_path), resolution=8)
    mixture = DataConfig("mixture", sources=[dict(path=str(tmp_path))], resolution=8)
    parts = [load_mixture(mixture, "val", c).parts[tmp_path.name] for c in (True, False)]
    for data in (classified(config, "val"), load_dataset(config, "val"), *parts):
        assert [path.name for path, _ in data.items] == ["19.png"]


def test_the_only_image_of_a_class_trains(tmp_path):
    for i in range(40):
        image(tmp_path/("cat" if i < 19 else "dog" if i == 19 else "owl")/f"{i:02}.png")
    config = DataConfig(path=str(tmp_path), resolution=8)
    for read in (classified, own_images):
        val, train = [read(config, split).items for split in ("val", "train")]
        assert [path.name for path, _ in val] == ["39.png"] and len(train) == 39
    for name in ("cat", "owl"):
        for path in sorted((tmp_path/name).iterdir())[1:]:
            path.unlink()
    for read in (classified, own_images):
        with pytest.raises(ValueError, match="each class in .* has one image.*data.val_path"):
            read(config)
    image(tmp_path/"cat"/"more.png")
    assert [path.name for path, _ in classified(config, "val").items] == ["more.png"]
    assert len(load_dataset(config, captioned=False)) == 3  # without classes: any one
    (tmp_path/"cat"/"deeper").mkdir()
    (tmp_path/"cat"/"more.png").rename(tmp_path/"cat"/"deeper"/"more.png")
    assert [path.name for path, _ in classified(config, "val").items] == ["more.png"]


def test_both_splits_have_an_image_where_all_usable_ones_would_validate(tmp_path):
    for i in range(40):
        image(tmp_path/f"{i:02}.png", str(i) if i in (19, 39) else None)
    assert held_out(tmp_path, True) == (["39.png"], {"19.png"})
    assert held_out(tmp_path, False)[0] == ["39.png"]


# ---- COCO, and the sample data of the repository


def test_the_coco_sample():
    folder = root/"data"/"sample"/"coco"
    if not folder.is_dir():
        pytest.skip("no data/sample/coco here")
    config = DataConfig(path=str(folder))
    assert config.name == "coco"
    train, val = load_dataset(config), load_dataset(config, "val")
    about = json.loads((folder/"annotations"/"captions_train2017.json").read_text())
    assert len(train.items) == len(about["images"]) and len(train) == 5*len(train.items)
    first = min(i["id"] for i in about["images"])
    said = [a["caption"].strip() for a in about["annotations"] if a["image_id"] == first]
    n = len(train.items)
    assert [train.caption(j*n) for j in range(len(said[:5]))] == said[:5]
    assert train[0]["image"].shape == (3, 64, 64)
    assert not {p for p, _ in train.items} & {p for p, _ in val.items}


@pytest.mark.parametrize("layout", ["txt", "jsonl", "imagefolder"])
def test_the_sample_layouts_are_read(layout, messages):
    folder = root/"data"/"sample"/layout
    if not folder.is_dir():
        pytest.skip(f"no data/sample/{layout} here")
    data = FolderDataset(folder)
    images = [p for p in folder.rglob("*.png")]
    assert len(data.items) == len(images) > 1 and all(data.caption(i) for i in range(len(data)))
    assert not messages


def test_coco_blank_captions_and_broken_files(tmp_path):
    (tmp_path/"annotations").mkdir()
    table = tmp_path/"annotations"/"captions_val2017.json"
    image(tmp_path/"val2017"/"a.jpg")
    notes = [dict(image_id=1, caption=c) for c in (" ", "a\u2028cat ", "")]
    images = [dict(id=i, file_name=f"{name}.jpg") for i, name in ((1, "a"), (2, "b"))]
    content = dict(images=images, annotations=notes)
    table.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    data = CocoDataset(tmp_path, "val", 8)
    assert {data.caption(i) for i in range(len(data))} == {"a\u2028cat"} and len(data.items) == 1
    for broken in ("{", "[]", "{}", '{"images": [], "annotations": [{}]}'):
        table.write_text(broken)
        with pytest.raises(ValueError, match="captions_val2017.json"):
            CocoDataset(tmp_path, "val")


# ---- Order and augmentation


def test_the_order_is_that_of_earlier_versions():
    stream = InfiniteDataset([dict(i=i) for i in range(37)], seed=5)
    assert [stream[p]["i"] for p in range(10)] == [21, 10, 23, 16, 35, 33, 7, 3, 2, 5]
    assert [stream.index(p) for p in range(37, 43)] == [32, 35, 18, 30, 26, 13]
    u = torch.stack([stream[p]["u"] for p in range(3)])
    torch.testing.assert_close(u, torch.tensor([.787527, .217137, .988641]))
    assert InfiniteDataset(ShapesDataset(7)).index(10**6) == 10**6


def noise(path, seed=0):
    pixels = torch.randint(256, (40, 60, 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.byte().numpy()).save(path)


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_augmentation_depends_on_seed_and_position_alone(tmp_path, augment):
    for i in range(3):
        noise(tmp_path/f"{i}.png", i)
        (tmp_path/f"{i}.txt").write_text("x")
    config = DataConfig(path=str(tmp_path), resolution=16, augment=augment)
    data = load_dataset(config)
    stream = InfiniteDataset(data, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = [b["image"] for b in stream_loader(stream, 4, range(4))]
    two = [b["image"] for b in stream_loader(InfiniteDataset(data, 3), 4, range(4), workers=2)]
    assert torch.equal(torch.cat(one), torch.cat(two))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(stream[9]["image"], torch.cat(one)[9])
    views = {stream[p]["image"].numpy().tobytes() for p in range(40)}
    assert len(views) == {"none": 2, "flip": 4, "crop": 40}[augment]
    plain = InfiniteDataset(load_dataset(config, "val"), 3)
    assert torch.equal(plain[0]["image"], plain[1]["image"])  # what validates is not varied


@pytest.mark.parametrize("config, says", [
    (dict(name="folder", path="x", augment="spin"), "known are none, flip, crop"),
    (dict(augment="flip"), "varies folders and COCO"),
    (dict(path="x", cache=10, augment="crop"), "data.cache"),
])  # fmt: skip
def test_augmentation_that_cannot_be(config, says):
    with pytest.raises(ValueError, match=says):
        DataConfig(**config)


def test_an_image_that_breaks_later_is_named(tmp_path, messages):
    data = ImageFiles([(image(tmp_path/f"{name}.png"), [name]) for name in "abc"], 8)
    (tmp_path/"a.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match="cannot read .*a.png"):
        data.read(0)
    assert [item["caption"] for item in data] == ["b", "b", "c"]  # the next one takes its place
    (line,) = [m for m in messages if "takes its place" in m]
    assert "a.png: it is not an image" in line
    (tmp_path/"c.png").unlink()
    with pytest.raises(FileNotFoundError, match="c.png"):         # no damage
        data[2]


def test_items_end(tmp_path):
    data = ImageFiles([(image(tmp_path/"a.png"), ["a", "b"])], 8)
    assert [i["caption"] for i in data] == ["a", "b"] and data[-1]["caption"] == "b"
    with pytest.raises(IndexError):
        data[2]


# ---- Captions as tokens


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(["a red circle", "two blue stars on pink"], length=8)


@pytest.mark.parametrize("text", ["", " ", "???", "...", "!?", '"";:', "\u2026"])
def test_texts_without_a_word_are_empty(tokenizer, text):
    assert not tokenizer.encode(text) and not tokenizer.unfamiliar(text)
    assert torch.equal(tokenizer([text])[0], tokenizer([""])[0])


@pytest.mark.parametrize("text", ["a", "A?", "elephant", "\U0001f388", "(", "5"])
def test_texts_with_a_sign_are_not_empty(tokenizer, text):
    assert tokenizer.encode(text)


@pytest.mark.parametrize("text", ["a \udcff circle", "\ud83d", "\udcc3"])
def test_half_characters_are_one_clear_line(tokenizer, text):
    for call in (tokenizer.encode, tokenizer.rest, tokenizer.unfamiliar):
        with pytest.raises(ValueError, match="^the text is not valid UTF-8: ") as e:
            call(text)
        assert str(e.value).isascii() and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="UTF-8"):
        tokenizer(["a red circle", text])


@pytest.mark.parametrize("text", [5, None, ["a"], b"a"])
def test_what_is_no_text_is_refused(tokenizer, text):
    with pytest.raises(TypeError, match="a caption is a text, not"):
        tokenizer([text])


def test_cut_captions_are_counted_once(tmp_path, messages):
    for i, caption in enumerate(("a cat", "a cat and a dog and an owl", "a dog")):
        image(tmp_path/f"{i}.png", caption)
    config = DataConfig(path=str(tmp_path))
    for _ in range(2):
        prepare_text_tokenizer(tmp_path/"run", None, config, 100, 64, 5)
        prepare_text_tokenizer(None, None, config, 100, 64, 5)
    (line,) = [m for m in messages if "tokens" in m]
    assert line.startswith("1 of 2 captions have more than 4 tokens")
