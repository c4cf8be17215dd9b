"""Look through an answer for a figure that a tenant with coarse figures must not see."""

import re
from collections.abc import Iterator
from typing import Any

from vllm_cost_meter.reports.coarse import HIDDEN

EXACT_INSTANT = re.compile(r"T\d\d:\d\d:\d\d\.\d{4}")


def figures_of(answer: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of every figure, at any depth."""
    if isinstance(answer, dict):
        for key, value in answer.items():
            yield from figures_of(value, key)
    elif isinstance(answer, list):
        for value in answer:
            yield from figures_of(value, name)
    else:
        yield name, answer


def assert_coarse(answer: Any) -> None:
    """Fail if an answer has a hidden figure, or a time that is more exact than a millisecond."""
    for name, value in figures_of(answer):
        assert value is None or name not in HIDDEN, name
        if value is not None and name.endswith("_ns"):
            assert value % 1_000_000 == 0, name
        if value is not None and name.endswith("_ms"):
            assert value == int(value), name
        if isinstance(value, str):
            assert not EXACT_INSTANT.search(value), name
