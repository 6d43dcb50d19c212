"The leaderboard of the README is what its files say, and its rows can be had again."
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from t2i.cli import app
from t2i.leaderboard import MARKS, board_images, board_table, leaderboard, read_scores

root = Path(__file__).resolve().parent.parent
FILES = sorted((root/"docs"/"leaderboard").glob("*.json"))
SCORED = re.search(r"^SCORED := (.*)$", (root/"Makefile").read_text(), re.M).group(1).split()


def rows():
    return leaderboard([*SCORED, *FILES])


def test_the_readme_shows_what_the_files_say():
    page = (root/"README.md").read_text()
    shown = page.partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert shown.strip() == board_table(rows(), brief=True).strip(), "run make leaderboard"


def test_every_measured_file_has_what_a_row_needs():
    assert FILES
    for file in FILES:
        scores = read_scores(file)
        assert {"checkpoint", "settings", "machine", "per_task", "seed"} <= scores.keys(), file
        assert 0 < scores["cpu_seconds_per_image"] and file.with_suffix(".png").is_file()
    assert board_images(rows()).width > 1000


@pytest.mark.slow
@pytest.mark.parametrize("source", [*SCORED, *FILES], ids=lambda source: Path(source).stem)
def test_a_row_is_had_again_by_its_command(source):
    row, = leaderboard([source])
    result = CliRunner().invoke(app, [*shlex.split(row["command"])[1:], "--json"])
    again = json.loads(result.stdout.splitlines()[-1])
    low, high = row["mean_interval"]
    assert low <= again["mean"] <= high
