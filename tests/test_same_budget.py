"The tables at one budget are what their files say, and a row is had again."
from pathlib import Path

import pytest
import torch
from PIL import Image

from t2i import scoring
from t2i.engine.recipes import load_recipe
from t2i.same_budget import (
    BUDGET,
    BUDGET_MARKS,
    IMAGES,
    budget_page,
    read_budget,
    row_command,
    same_budget,
)
from t2i.scoring import ScoreOptions, score_emoji_model
from t2i.subjects import Subject

root = Path(__file__).resolve().parent.parent
SHELF = root/"docs"/"leaderboard"/"budget"
FILES = [SHELF/f"{name}.json" for name in BUDGET]


def test_the_readme_shows_what_the_files_say():
    page = (root/"README.md").read_text()
    shown = page.partition(BUDGET_MARKS[0])[2].partition(BUDGET_MARKS[1])[0]
    assert shown.strip() == budget_page(FILES).strip(), "run make budget"


@pytest.mark.parametrize("name", BUDGET)
def test_a_row_has_the_budget_and_what_its_table_needs(name):
    row, = read_budget([SHELF/f"{name}.json"])
    assert row["row"] == name and row["command"] == row_command(name, IMAGES, 0)
    assert Path(row["samples"]).is_file() and row["cpu_seconds_per_image"] > 0
    if not BUDGET[name].stages:
        assert row["stages"] == [] and row["weights_trained"] == 0
        return
    assert abs(sum(stage["images"] for stage in row["stages"]) - IMAGES) <= 32
    settings = row["settings"]
    assert (settings["guidance_scale"], settings["temperature"]) == (2., .7)
    assert row["curve"][-1]["images"] == row["stages"][-1]["images"]


@pytest.mark.parametrize("name", [name for name, row in BUDGET.items() if row.stages])
def test_a_row_was_drawn_with_the_settings_of_its_recipe(name):
    row, = read_budget([SHELF/f"{name}.json"])
    stage = BUDGET[name].stages[-1]
    after = {field: SHELF for field in stage.after}
    changes = [f"{field}={value}" for field, value in (stage.changes | after).items()]
    config = vars(load_recipe(stage.recipe, changes).config)
    wanted = {field.removeprefix("sample_"): value for field, value in config.items()
              if field.startswith("sample_") and value is not None}
    wanted["guidance_scale"] = wanted.pop("guidance")
    assert {field: row["settings"].get(field) for field in wanted} == wanted


def test_no_row_begins_with_trained_weights():
    for row in BUDGET.values():
        for stage in row.stages:
            changes = [f"{name}={value}" for name, value in stage.changes.items()]
            config = load_recipe(stage.recipe, changes).config
            assert config.train.init_from is None and getattr(config, "start", None) is None
            assert getattr(config, "text_init", None) is None


def scores_agree(a, b, n):
    "Whether two shares of n prompts differ by no more than the noise of both, in 95% of the cases"
    p = (a+b)/2
    return abs(a-b) <= 1.96*(2*p*(1-p)/n)**.5


def test_a_repetition_with_other_prompts_is_within_the_noise():
    files = sorted((SHELF/"again").rglob("*.json"))
    assert files
    for file in files:
        again, = read_budget([file])
        first, = read_budget([SHELF/f"{again['row']}.json"])
        assert again["command"] == first["command"] + " --prompts 1"
        assert again["checkpoint"] == first["checkpoint"]
        share, n = first["shares"]["mean"]
        assert scores_agree(share, again["shares"]["mean"][0], n), file


@pytest.mark.slow
def test_a_row_is_had_again_by_its_training(tmp_path):
    name = "shapes/text-var-pooled"
    first, = read_budget([SHELF/f"{name}.json"])
    again, = read_budget(same_budget([name], tmp_path))
    share, n = first["shares"]["mean"]
    assert scores_agree(share, again["shares"]["mean"][0], n)


def test_a_vqgan_is_steered_on_emoji_when_a_clip_is_named(monkeypatch):
    asked = []

    def draw(subject, prompts, options):
        asked.append(options.clip)
        return [[Image.new("RGB", (64, 64), "gray")] for _ in prompts]

    monkeypatch.setattr(scoring, "draw_prompts", draw)
    subject = Subject("mine", torch.nn.Identity(), "vqgan")
    scores = score_emoji_model(subject, ScoreOptions(count=2, clip="emoji-clip", device="cpu"))
    assert scores["images"] == 6 and set(asked) == {"emoji-clip"}
    assert scores["trained_top1"] < 1 and scores["settings"]["clip"] == "emoji-clip"
