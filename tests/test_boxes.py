"Boxes around the objects of an image: as the checker sees them, and of images that are turned."
import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw

from t2i.control.boxes import MAX_BOXES
from t2i.control.boxes_training import (
    BoxedCoco,
    BoxedFolder,
    BoxedShapes,
    box_scores,
    found_boxes,
    object_box,
    pack_boxes,
    read_bbox_file,
)
from t2i.control.contours import object_parts
from t2i.data.checker import find_objects, image_parts
from t2i.data.coco import check_coco
from t2i.data.datasets import CocoDataset, DataConfig, load_dataset
from t2i.data.mixtures import Mixture
from t2i.data.shapes import render, sample_scene
from t2i.generators.text_training import cached_tokens

SCENES = [sample_scene(seed, "color_attribution") for seed in range(7, 11)]


@pytest.mark.parametrize("scene", SCENES)
def test_found_boxes_are_those_of_the_scene(scene):
    asked = dict(map(object_box, scene.objects))
    found = {f"{own.color} {own.shape}": edges for own, edges in found_boxes(render(scene))}
    assert found == asked
    scores = box_scores([Image.fromarray(render(scene))], [list(asked.items())])
    assert scores == dict(iou=1., bound=1., count=1.)


@pytest.mark.parametrize("scene", SCENES)
def test_contours_and_the_checker_see_the_same_parts(scene):
    image = render(scene)
    background, parts = image_parts(image)
    assert background == scene.background == find_objects(image)[0]
    seen = object_parts(Image.fromarray(image))
    assert all(np.array_equal(part, own) for part, (own, _, _) in zip(parts, seen, strict=True))
    assert [color for _, color, _ in seen] == [found.color for found in find_objects(image)[1]]


# ---- Images that a camera stored lying, with a note that they are to be turned


def save_turned(path, turn, box=(50, 10, 70, 20)):
    "An image of 90x60 pixels with a red box, before it is turned"
    image = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2]-1, box[3]-1), fill="red")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    image.save(path, exif=exif, quality=95, subsampling=0)


def red_box(image):
    "Where an image (3,60,60) is red"
    red = (image[1] < 0).numpy()
    return tuple(edge/60 for edge in Image.fromarray(red).getbbox())


@pytest.mark.parametrize("name", ("a.jpg", "a.tif"))
@pytest.mark.parametrize("turn", range(1, 9))
def test_boxes_of_coco_turn_with_their_image(tmp_path, turn, name):
    (tmp_path/"annotations").mkdir()
    (tmp_path/"train2017").mkdir()
    save_turned(tmp_path/"train2017"/name, turn)
    images = [dict(id=1, file_name=name, width=90, height=60)]
    tables = dict(
        captions=[dict(image_id=1, caption="a box")],
        instances=[dict(image_id=1, category_id=1, bbox=[50, 10, 20, 10])])  # width and height
    for name, notes in tables.items():
        table = dict(images=images, annotations=notes, categories=[dict(id=1, name="box")])
        (tmp_path/"annotations"/f"{name}_train2017.json").write_text(json.dumps(table))
    data = CocoDataset(tmp_path, resolution=60)
    ((name, edges),) = data.boxes(0)
    assert name == "box" and edges == pytest.approx(red_box(data[0]["image"]))


@pytest.mark.parametrize("turn", range(1, 9))
def test_boxes_of_a_folder_are_those_of_the_image_as_it_is_seen(tmp_path, turn):
    for name in "ab":
        save_turned(tmp_path/f"{name}.jpg", turn)
        (tmp_path/f"{name}.txt").write_text("a box")
    data = BoxedFolder(DataConfig(name="folder", path=str(tmp_path), resolution=60))
    left, top, right, bottom = red_box(data[0]["image"])
    seen = [left, (15+60*top)/90, right, (15+60*bottom)/90]      # 15 pixels are cut from each end
    if turn < 5:
        seen = [(15+60*left)/90, top, (15+60*right)/90, bottom]
    (tmp_path/"a.bbox").write_text(json.dumps(dict(label="box", bbox=seen)))
    assert data.boxes(0) == [("box", pytest.approx((left, top, right, bottom)))]


def test_boxes_that_are_not_utf8_name_the_file_and_the_remedy(tmp_path):
    line = '{"label": "caf\u00e9", "bbox": [0, 0, 1, 1]}'
    (tmp_path/"a.bbox").write_text(line, encoding="utf-16")
    assert read_bbox_file(tmp_path/"a.bbox")[0][0] == "caf\u00e9"
    (tmp_path/"a.bbox").write_text(line, encoding="latin-1")
    with pytest.raises(ValueError, match="a.bbox is not text in UTF-8: save it as UTF-8"):
        read_bbox_file(tmp_path/"a.bbox")


def test_boxed_images_are_chosen_as_others_are(tmp_path):
    for folder, count in (("all", 8), ("held-out", 3)):
        (tmp_path/folder).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path/folder/f"{i}.png")
            (tmp_path/folder/f"{i}.txt").write_text("a box")
    about = dict(name="folder", path=str(tmp_path/"all"), val_path=str(tmp_path/"held-out"))
    config = DataConfig(**about, resolution=8, fraction=.5, captions="one")
    data, other = [BoxedFolder(config, split) for split in ("train", "val")]
    assert data.items == load_dataset(config).items and len(data.items) == 4 and data.one
    assert other.items == load_dataset(config, "val").items and len(other.items) == 3
    item = data.augmented(0, torch.Generator())
    assert item["caption"] == "a box" and item["edges"].shape == (MAX_BOXES, 4)


def test_boxed_coco_is_chosen_and_its_boxes_are_read_at_once(tmp_path):
    (tmp_path/"annotations").mkdir()
    (tmp_path/"train2017"/"part").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path/"train2017"/"part"/f"{i}.jpg")
    images = [dict(id=i, file_name=f"part/{i}.jpg", width=8, height=8) for i in range(4)]
    notes = [dict(image_id=i, category_id=1, bbox=[0, 0, 4, 4], caption="a box") for i in range(4)]
    table = dict(images=images, annotations=notes, categories=[dict(id=1, name="box")])
    for name in ("captions", "instances"):
        (tmp_path/"annotations"/f"{name}_train2017.json").write_text(json.dumps(table))
    data = BoxedCoco(DataConfig("coco", str(tmp_path), resolution=8, fraction=.5, captions="one"))
    assert len(data.items) == 2 and data.one
    assert check_coco(tmp_path, "train")["not_listed"] == []     # part/ has what is listed
    (tmp_path/"annotations"/"instances_train2017.json").unlink()
    assert data.boxes(0) == [("box", (0., 0., .5, .5))]


class Brightness(torch.nn.Module):
    def encode(self, images):
        return images.mean((1, 2, 3)).mul(99).long()[:, None]


def test_a_mixture_of_kept_images_has_boxes(tmp_path):
    parts = {split: BoxedShapes(DataConfig(), split) for split in ("train", "val")}
    kept = Mixture(parts, [1, 1]).encoded(
        DataConfig(cache=4, cache_dir=str(tmp_path)),
        lambda config, data: cached_tokens(config, Brightness(), torch.device("cpu"), data))
    for position in range(4):
        item = kept.drawn(position, 0)
        source, stream, place = kept.find(position)
        boxes = list(parts.values())[source].boxes(stream.index(place))
        assert item["phrases"] == pack_boxes(boxes)["phrases"] and len(item["tokens"]) == 1
