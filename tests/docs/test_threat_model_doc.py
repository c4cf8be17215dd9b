"""The threat model names a test for each of its promises, and each of these tests is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "threat-model.md").read_text(encoding="utf-8")
PROMISED = PAGE.partition("## What is promised")[2].partition("## What is not")[0]
ROWS = [line.split("|") for line in PROMISED.splitlines() if line.startswith("| ")]
HELD_BY = re.findall(r"`(tests/[\w/]+\.py)` `(test_\w+)`", PROMISED)


def test_every_promise_names_a_test() -> None:
    promises = [row for row in ROWS if row[1].strip() != "Promise"]
    assert len(promises) > 25
    assert [row[1] for row in promises if "`test_" not in row[2]] == []


@pytest.mark.parametrize(("path", "name"), HELD_BY)
def test_the_test_that_holds_a_promise_is_there(path: str, name: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE)
