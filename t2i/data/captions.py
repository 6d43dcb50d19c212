"""Captions that say everything, and near misses: captions that are false in one thing alone."""
import random
from dataclasses import replace
from itertools import combinations

from t2i.data.shapes import (
    COLORS,
    NUMBERS,
    PLACES,
    RADII,
    SHAPES,
    SIDE,
    UNSEEN_PAIRS,
    Group,
    Obj,
    Scene,
    Spec,
    phrasings,
    quarter,
    relation_margin,
)

OPPOSITE = dict(left="right", right="left", above="below", below="above")


def true_relations(
    first:Obj,
    second:Obj,
)->list[str]:  # keys of `OPPOSITE`
    "The relations of the first object to the second that hold by at least 8 pixels"
    centres = (first.x, first.y), (second.x, second.y)
    return [side for side in OPPOSITE if relation_margin(side, *centres) >= 8]


def clear_place(
    o:Obj,
)->str|None:  # one of `PLACES`; None: the centre is less than 4 pixels from the image's middle lines
    "The quarter in which an object clearly lies"
    clear = min(abs(o.x - SIDE/2), abs(o.y - SIDE/2)) >= 4
    return quarter(o.x, o.y) if clear else None


def complete_groups(
    scene:Scene,
)->tuple[list[Group],list[Obj]]:  # and the first object of each
    "The groups of a scene's caption, with the color and size that the image shows"
    groups, firsts, start = [], [], 0
    for group in scene.spec.groups:
        o = scene.objects[start]
        groups.append(replace(group, color=o.color, size=o.size))
        firsts.append(o)
        start += group.count
    return groups, firsts


def describe(
    scene:Scene,
    rng:random.Random,  # chooses the order of the objects, and what is said of their places
)->Scene:
    "The same image with a caption that says everything"
    groups, objects = complete_groups(scene)
    task, relation = scene.task, None
    if len(groups) == 2 and rng.random() < .5:
        groups, objects = groups[::-1], objects[::-1]
    places = [clear_place(o) for o in objects]
    said = rng.random()  # below 1/2: relation; below 3/4: places; else neither
    if len(groups) == 1:
        if groups[0].count == 1 and said < .5:
            groups = [replace(groups[0], place=places[0])]
    elif said < .5:
        relations = true_relations(*objects)
        task, relation = "position", rng.choice(relations)
    elif said < .75:
        task = "two_objects"
        groups = [replace(g, place=p) for g, p in zip(groups, places)]
    elif task == "position":
        task = "two_objects"
    spec = Spec(tuple(groups), relation, scene.background)
    return replace(scene, caption=rng.choice(phrasings(spec, task)), spec=spec, task=task)


def with_group(spec:Spec, i:int, **values)->Spec:
    "The spec with another group number i"
    groups = list(spec.groups)
    groups[i] = replace(groups[i], **values)
    return replace(spec, groups=tuple(groups))


def exchanged(spec:Spec, name:str)->Spec:
    "The spec with a property of its two groups exchanged"
    first, second = (getattr(g, name) for g in spec.groups)
    return with_group(with_group(spec, 0, **{name: second}), 1, **{name: first})


def near_misses(
    spec:Spec,
)->dict[str,list[Spec]]:  # by what is false: "binding", "relation", "count", "place"
    "Specs that differ from this one in one thing; none of them names one of `UNSEEN_PAIRS`"
    found = dict(binding=[], relation=[], count=[], place=[])
    if len(spec.groups) == 2:
        first, second = spec.groups
        for name in ("color", "size"):
            values = getattr(first, name), getattr(second, name)
            if None not in values and values[0] != values[1]:
                found["binding"].append(exchanged(spec, name))
        if None not in (first.place, second.place) and first.place != second.place:
            found["place"].append(exchanged(spec, "place"))
    if spec.relation:
        found["relation"].append(replace(spec, relation=OPPOSITE[spec.relation]))
    for i, group in enumerate(spec.groups):
        if group.count > 1:
            others = [n for n in NUMBERS.values() if n != group.count]
            found["count"] += [with_group(spec, i, count=n) for n in others]
        if group.place and len(spec.groups) == 1:
            others = [p for p in PLACES if p != group.place]
            found["place"] += [with_group(spec, i, place=p) for p in others]
    return {kind: [s for s in specs if is_seen(s)] for kind, specs in found.items()}


def is_seen(spec:Spec)->bool:
    "Whether a spec names none of `UNSEEN_PAIRS`"
    return not any((g.color, g.shape) in UNSEEN_PAIRS for g in spec.groups)


def near_miss_captions(
    scene:Scene,
)->dict[str,list[str]]:  # by what is false; in the words and the order of the scene's caption
    "Captions that are false of a scene in one thing"
    number = phrasings(scene.spec, scene.task).index(scene.caption)
    found = {}
    for kind, specs in near_misses(scene.spec).items():
        captions = [phrasings(spec, scene.task)[number] for spec in specs]
        if captions:
            found[kind] = captions
    return found
