"""What all tests share: worlds with a real collector and ledger, an NVML, and Hypothesis' profiles.

`ci`, the profile of `make test`, tries the same examples each time: a failure belongs to the change
that is tested. `fuzz`, that of `make fuzz`, tries forty times as many, new ones each time, and
remembers in `.hypothesis` what failed.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Machines are busy at times: that an example takes long says nothing.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)

settings.register_profile("ci", UNTIMED, max_examples=50, derandomize=True)
settings.register_profile("fuzz", UNTIMED, max_examples=2_000)
settings.load_profile("ci")


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., object]]:
    """Make worlds with the settings given."""
    from tests.support.world import worlds  # it imports vLLM, which few of the tests here need

    with worlds(tmp_path) as make:
        yield make


@pytest.fixture
def world(make_world: Callable[..., object]) -> object:
    return make_world()


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the fake `libnvidia-ml.so.1`."""
    from tests.support.nvml import compile_library

    return compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(nvml_library: Path, tmp_path: Path) -> Iterator[object]:
    """Give a machine with an NVIDIA driver, and without cards so far."""
    from tests.support.nvml import nvmls

    with nvmls(nvml_library, tmp_path / "script") as machine:
        yield machine
