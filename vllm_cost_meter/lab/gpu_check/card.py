"""The one NVIDIA card that a check runs on, as NVML shows it; and a watch of its energy and power.

This reads NVML by itself, past the meter's own reader, so that the two can be compared. The counter
of energy covers the whole board since the driver was loaded, and moves every 20 to 100 ms; power is
a mean over the last second on most cards since Ampere.
https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html

Invariant: a value that NVML does not give is None, never 0.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_cost_meter.engine.energy.nvml import MIG_PREFIX, is_sliced, visible_device_ids
from vllm_cost_meter.errors import ServerError

WHAT_TO_DO = (
    "run it on a machine with an NVIDIA GPU and vLLM for it, or with --allow-cpu to see that it"
    " works (figures of a CPU say nothing of a GPU)"
)
# CUDA and NVML then count cards alike.
ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
SAMPLE_EVERY_S = 0.02


class PowerSample(NamedTuple):
    """What a card said at an instant, in Unix ns: its counter in mJ, its power in mW."""

    unix_ns: int
    counter_mj: int | None
    power_mw: int | None


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card and its driver are.

    Of a slice of a card in MIG mode (`is_slice`) it may be that only the card has a name or memory.
    """

    name: str
    uuid: str
    memory_bytes: int | None
    driver: str
    cuda: str
    power_limit_mw: int | None
    cards_of_machine: int
    is_slice: bool = False


class NvidiaCard:
    """The first card that CUDA shows."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Find it. Raises ServerError, with one line, where there is none that NVML can read."""
        try:
            import pynvml  # noqa: PLC0415 - one who has no GPU may lack it

            self._nvml: Any = pynvml
            pynvml.nvmlInit()
            (card_id,) = visible_device_ids(environ.get("CUDA_VISIBLE_DEVICES"), [0])
            self._handle = self._handle_of(card_id)
            self._is_slice = card_id.startswith(MIG_PREFIX) or is_sliced(pynvml, self._handle)
            self.facts = self._facts()
        except Exception as error:
            raise ServerError(
                f"expected an NVIDIA GPU that NVML can read, got: {error}; {WHAT_TO_DO}"
            ) from None

    def sample(self) -> PowerSample:
        """Return the card's counter and power now; None for a slice, as both are of all slices."""
        if self._is_slice:
            return PowerSample(time.time_ns(), None, None)
        nvml, handle = self._nvml, self._handle
        counter_mj = self._or_none(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        power_mw = self._or_none(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return PowerSample(time.time_ns(), counter_mj, power_mw)

    def _handle_of(self, card_id: str) -> object:
        if card_id.isdecimal():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(card_id))
        return self._nvml.nvmlDeviceGetHandleByUUID(card_id)

    def _facts(self) -> CardFacts:
        nvml, handle = self._nvml, self._handle
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion())
        return CardFacts(
            name=str(nvml.nvmlDeviceGetName(handle)),
            uuid=str(nvml.nvmlDeviceGetUUID(handle)),
            memory_bytes=self._memory_bytes(),
            driver=str(nvml.nvmlSystemGetDriverVersion()),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
            power_limit_mw=self._or_none(
                lambda: nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)[1]
            ),
            cards_of_machine=int(nvml.nvmlDeviceGetCount()),
            is_slice=self._is_slice,
        )

    def _memory_bytes(self) -> int | None:
        if is_sliced(self._nvml, self._handle):
            return None  # That of the card, of which CUDA gives a slice.
        return self._or_none(lambda: self._nvml.nvmlDeviceGetMemoryInfo(self._handle).total)

    def _or_none(self, ask: Callable[[], Any]) -> int | None:
        try:
            return int(ask())
        except self._nvml.NVMLError:
            return None


class PowerWatch:
    """Samples a card in a thread of its own, from the beginning of a `with` block to its end."""

    def __init__(self, card: NvidiaCard, every_s: float = SAMPLE_EVERY_S) -> None:
        self.samples: list[PowerSample] = []
        self._card, self._every_s = card, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PowerWatch":
        self.samples.append(self._card.sample())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self.samples.append(self._card.sample())
        self.samples.append(self._card.sample())
