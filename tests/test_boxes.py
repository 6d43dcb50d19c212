"Boxes around the objects of an image, as the checker sees them."
import numpy as np
import pytest
from PIL import Image

from t2i.control.boxes_training import box_scores, found_boxes, object_box
from t2i.control.contours import object_parts
from t2i.data.checker import find_objects, image_parts
from t2i.data.shapes import render, sample_scene

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
