"""Worlds for the tests of the API side: a collector, its engine and its ledger's file; and NVML."""

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


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the fake `libnvidia-ml.so.1`."""
    from tests.unit.nvml import compile_library

    return compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(nvml_library: Path, tmp_path: Path) -> Iterator[object]:
    """Give a machine with an NVIDIA driver, and without cards so far."""
    from tests.unit.nvml import nvmls

    with nvmls(nvml_library, tmp_path / "script") as machine:
        yield machine
