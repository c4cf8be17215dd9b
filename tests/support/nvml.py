"""A fake NVML for tests of what reads energy: the real binding, a library compiled by the tests.

`nvmls` gives a machine without any card; a test puts cards in, and changes what they answer.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pynvml
import pytest

from vllm_cost_meter.engine.energy.nvml import REASONS, EnergyCounter, EnergyReading

S = 10**9
A, B = "GPU-aaaa1111-0000-0000-0000-000000000000", "GPU-bbbb2222-0000-0000-0000-000000000000"

SOURCE = Path(__file__).with_name("fake_nvml.c")
SONAME = "libnvidia-ml.so.1"

NOT_SUPPORTED, TIMEOUT, GPU_IS_LOST, UNKNOWN = 3, 10, 15, 999
DRIVER_NOT_LOADED = 9


def compile_library(folder: Path, *flags: str) -> Path:
    """Compile the fake in a folder of its own, under the name that the binding asks for."""
    library = folder / SONAME
    compiler = os.environ.get("CC", "cc").split()
    command = [*compiler, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *flags]
    command += [f"-Wl,-soname,{SONAME}", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return library


@dataclass
class Card:
    """One device of the fake machine: what it is, and what it answers."""

    uuid: str
    energy_mj: int = 0
    name: str = "NVIDIA H100 80GB HBM3"
    kind: str = "gpu"
    handle_result: int = 0
    energy_result: int = 0
    mig_mode: int = 0
    max_mw: int = 700_000
    power_mw: int = 100_000

    def line(self) -> str:
        results = f"{self.handle_result} {self.energy_result} {self.energy_mj}"
        powers = f"{self.max_mw} {self.power_mw}"
        return f"{self.kind} {self.uuid} {results} {self.mig_mode} {powers} {self.name}"


@dataclass
class Machine:
    """A machine with cards. A change is seen once `tell` has told the library."""

    script: Path
    cards: list[Card] = field(default_factory=list)
    init_result: int = 0

    def add(self, *cards: Card) -> None:
        self.cards += cards
        self.tell()

    def tell(self) -> None:
        lines = [f"init {self.init_result}", *(card.line() for card in self.cards)]
        # At once: another process may be reading it.
        new = self.script.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        new.replace(self.script)

    def use(self, *energies_mj: int) -> None:
        """Let each card use so much."""
        for card, energy_mj in zip(self.cards, energies_mj, strict=True):
            card.energy_mj += energy_mj
        self.tell()

    @property
    def inits(self) -> int:
        """How often the library was initialised, successfully or not, since it was loaded."""
        return int(pynvml.nvmlLib.fake_inits())


@contextmanager
def nvmls(library: Path, script: Path) -> Iterator[Machine]:
    """Make the binding load this library, as if the process had not loaded any yet."""
    machine = Machine(script)
    machine.tell()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_NVML", str(script))
        # What the binding would do on its own with LD_LIBRARY_PATH set before the process began.
        patch.setattr(pynvml, "CDLL", lambda _name: ctypes.CDLL(str(library)))
        patch.setattr(pynvml, "nvmlLib", None)
        patch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        yield machine
        if pynvml.nvmlLib is not None:
            while pynvml.nvmlLib.fake_users():  # the library stays loaded for the next test
                pynvml.nvmlLib.nvmlShutdown()


class Clock:
    """Reads a counter once a second, from second 100 on."""

    def __init__(self, counter: EnergyCounter) -> None:
        self.counter = counter
        self.now_ns = 100 * S

    def read(self, after_ns: int = S) -> EnergyReading:
        self.now_ns += after_ns
        return self.counter.read(self.now_ns)


def reader(ordinals: Sequence[int], visible: str | None = None, order: str = "PCI_BUS_ID") -> Clock:
    environ = {"CUDA_DEVICE_ORDER": order}
    if visible is not None:
        environ["CUDA_VISIBLE_DEVICES"] = visible
    return Clock(EnergyCounter(ordinals, environ))


def code(reading: EnergyReading) -> str:
    """Return the code of an unknown energy, and make sure that it is unknown."""
    assert reading.energy_mj is None
    assert reading.reason is not None
    found = reading.reason.split(":")[0]
    assert found in REASONS
    return found
