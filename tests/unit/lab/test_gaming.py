"""What a client gains by asking for the same work in another way: nothing that others pay for."""

import json

import pytest
from typer.testing import CliRunner

from tests.support.pages import DOCS, section
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.lab.validation.gaming import GAMES, play


@pytest.fixture(scope="module")
def played():
    return play()


@pytest.mark.parametrize(
    "name",
    [
        "one prompt of 2,048 tokens as eight of 256 at once",
        "64 samples as one request with n=64, not as 64 requests",
        "two replies as one of twice the length",
    ],
)
def test_the_same_work_in_other_pieces_costs_the_same(played, name):
    assert played[name].change == pytest.approx(0, abs=0.005)


def test_a_prompt_that_is_cut_saves_the_attention_between_its_pieces_and_no_more(played):
    game = played["one prompt of 8,192 tokens as four of 2,048, one after another"]
    assert -0.15 < game.change < -0.05
    # What others pay more is small beside what the client saves: it computes less.
    assert game.others_played_ms - game.others_usual_ms < 0.2 * (game.usual_ms - game.played_ms)


def test_in_a_fuller_batch_everybody_pays_less(played):
    game = played["a reply when 63 others run, not 7"]
    assert game.change < -0.7
    assert game.others_played_ms / 63 < game.others_usual_ms / 7


def test_the_command_and_the_page_say_the_same(played):
    told = CliRunner().invoke(app, ["validate", "--gaming", "--json"])
    answer = json.loads(told.stdout.splitlines()[-1])
    assert answer.keys() == GAMES.keys()
    shown = section(DOCS / "explanation" / "attribution.md", "Can it be played?")
    lines = [line for line in shown.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {row[0]: row[1:] for row in cells}
    for name, game in answer.items():
        figures = [
            f"{game['usual_ms']:.1f}",
            f"{game['played_ms']:.1f}",
            f"{100 * game['change']:+.1f}",
        ]
        assert [float(cell) for cell in rows[name][:3]] == pytest.approx(
            [float(figure) for figure in figures], abs=0.2
        ), name
    table = CliRunner().invoke(app, ["validate", "--gaming"], env={"COLUMNS": "200"})
    assert "two replies as one of twice the length" in table.stdout
