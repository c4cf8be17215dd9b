"""Worlds for the tests of the API side: a collector, its engine and its ledger's file."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., object]]:
    """Make worlds with the settings given."""
    from tests.unit.world import worlds  # it imports vLLM, which few of the tests here need

    with worlds(tmp_path) as make:
        yield make


@pytest.fixture
def world(make_world: Callable[..., object]) -> object:
    return make_world()
