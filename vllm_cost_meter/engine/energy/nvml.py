"""Read the energy of an engine's GPUs through NVML.

NVML counts the millijoules that each card has used since its driver was loaded. The count covers
the whole board, memory included, and everything that runs on it. It exists on Volta and newer, and
moves every 20 to 100 ms. `EnergyCounter` reads the cards of one engine and returns the energy used
since the last read, a *window*; `shares.py` divides it. All NVML calls here are documented at
https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html

An unknown energy is None with a reason, never 0. One unreadable card makes the window unknown,
because a sum over the others would be wrong. A reason reads "code: what happened"; the codes are
`REASONS`. A lost card is looked for again. Its energy in the meantime is not made up.

Invariant: nothing here raises into its caller, waits for anything, or starts a thread.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.units.time import NS_PER_SECOND

logger = meter_logger()

# Reasons that hold for good: no card can become readable later.
FINAL_REASONS = ("no_device", "no_binding", "no_library", "order")
# All reasons why energy is unknown. Those that are not final hold until the next good reading.
REASONS = (*FINAL_REASONS, "mig", "no_counter", "error", "first", "reset", "jump", "still")
# Reasons that hold while the cards stay the same. Before any good reading they mean: give up.
LASTING_REASONS = (*FINAL_REASONS, "mig", "no_counter")

# This is far more than a board draws (an H100 SXM: 700 W), so a larger reading is an error.
POWER_MAX_W = 5_000
# Ten times the period of the slowest counter. A window may include energy used this long before it.
# A counter that stands still for this long does not work, because a card that is on draws power.
COUNTER_PERIOD_NS_MAX = NS_PER_SECOND
# A driver that keeps the counter in 32 bits starts it again every 1.7 hours at 700 W.
WRAP_MJ = 2**32
# If a counter went back, a wrap must explain it with at most this much energy; else it was reset.
# One reset in 430 (WRAP_MJ / the plausible energy) is mistaken for a wrap, for windows of 1 s.
WRAP_DELTA_MJ_MAX = WRAP_MJ // 8
# NVML must be initialised anew to find a lost card. Doing so more often would only cost time.
RETRY_NS = 10 * NS_PER_SECOND

MIG_PREFIX = "MIG-"
_UUID_PREFIXES = ("GPU-", MIG_PREFIX)


class _Nvml(Protocol):
    """The functions of `pynvml` (nvidia-ml-py) that we use; it has no types of its own."""

    NVMLError: type[Exception]
    NVML_ERROR_LIBRARY_NOT_FOUND: int
    NVML_ERROR_FUNCTION_NOT_FOUND: int
    NVML_ERROR_NOT_SUPPORTED: int

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> object: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object: ...
    def nvmlDeviceGetName(self, handle: object) -> str: ...
    def nvmlDeviceGetUUID(self, handle: object) -> str: ...
    def nvmlDeviceGetMigMode(self, handle: object) -> list[int]: ...
    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle: object) -> list[int]: ...
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int: ...


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One card (or MIG slice) of an engine, as NVML names it; None where it did not say."""

    name: str | None
    uuid: str | None


@dataclass(frozen=True, slots=True)
class EnergyReading:
    """The energy of an engine's cards since the last reading, in millijoules.

    `energy_mj` is the sum over all cards. It is None if the energy of any card is unknown; `reason`
    then says why.
    """

    energy_mj: int | None
    reason: str | None

    def __post_init__(self) -> None:
        if (self.energy_mj is None) != (self.reason is not None):
            raise ValueError(f"expected an energy or a reason why there is none, got {self}")


class _UnknownError(Exception):
    """An energy is unknown. The error has a code of `REASONS` and says what happened."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


def visible_device_ids(visible: str | None, ordinals: Sequence[int]) -> list[str]:
    """Map each CUDA ordinal to its card: an index in the machine, or a UUID.

    `visible` is the value of CUDA_VISIBLE_DEVICES, or None if that is not set. We follow CUDA: an
    entry that names no card ("-1", or an empty one) ends the list, and a card named twice voids it.
    Source: https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html
    Raises ValueError if there are no ordinals, one is negative, or one has no card.
    """
    if not ordinals or min(ordinals) < 0:
        raise ValueError(f"expected the ordinals of the engine's GPUs, got {list(ordinals)}")
    if visible is None:
        return [str(ordinal) for ordinal in ordinals]
    ids: list[str] = []
    for entry in (text.strip() for text in visible.split(",")):
        if not (entry.isdecimal() or entry.startswith(_UUID_PREFIXES)):
            break
        ids.append(str(int(entry)) if entry.isdecimal() else entry)
    if len(set(ids)) < len(ids):
        ids = []
    if max(ordinals) >= len(ids):
        raise ValueError(
            f"expected at least {max(ordinals) + 1} GPUs in CUDA_VISIBLE_DEVICES={visible!r},"
            f" got {len(ids)}"
        )
    return [ids[ordinal] for ordinal in ordinals]


@dataclass(slots=True)
class _Device:
    """One card: its place and its last counter value. Without a handle it cannot be read now."""

    device_id: str
    handle: object | None = None
    info: DeviceInfo = DeviceInfo(None, None)
    power_max_mw: int | None = None
    value_mj: int | None = None
    changed_ns: int = 0
    code: str | None = None
    reason: str | None = None

    def advance(self, nvml: _Nvml, now_ns: int, wall_ns: int) -> int:
        """Read the counter and return the millijoules since the last read.

        Raises _UnknownError, or any error of the binding. The next call then starts anew.
        """
        before_mj, self.value_mj = self.value_mj, None
        value_mj = self.value_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        moved = value_mj != before_mj
        if moved:
            self.changed_ns = now_ns
        if before_mj is None or (moved and self.code == "still"):
            raise _UnknownError("first", "there is no earlier reading to compare with")
        if not moved and now_ns - self.changed_ns >= COUNTER_PERIOD_NS_MAX:
            raise _UnknownError("still", "the counter stands still, though the card is on")
        return _delta_mj(before_mj, value_mj, wall_ns)


def _delta_mj(before_mj: int, now_mj: int, wall_ns: int) -> int:
    """Return the millijoules between two values of a counter, read `wall_ns` apart.

    If the counter went back, it has wrapped at 32 bits, provided that gives a plausible power.
    Otherwise it was reset. Raises _UnknownError for a reset, and for more than any card can use.
    """
    plausible_mj = POWER_MAX_W * (max(wall_ns, 0) + COUNTER_PERIOD_NS_MAX) * 1000 // NS_PER_SECOND
    delta_mj = now_mj - before_mj
    if delta_mj < 0 and before_mj < WRAP_MJ:
        wrapped_mj = delta_mj + WRAP_MJ
        if wrapped_mj <= min(plausible_mj, WRAP_DELTA_MJ_MAX):
            return wrapped_mj
    if delta_mj < 0:
        raise _UnknownError("reset", "the counter went back; its driver was loaded anew")
    if delta_mj > plausible_mj:
        raise _UnknownError("jump", f"the counter moved by more than {POWER_MAX_W} W can")
    return delta_mj


class EnergyCounter:
    """Reads the energy of one engine's cards. For one thread; costs nothing before the first read.

    NVML stays initialised until the process ends. NVML counts its users, so vLLM's own use in the
    same process and ours do not disturb each other.
    """

    def __init__(
        self,
        ordinals: Sequence[int],
        environ: Mapping[str, str] = os.environ,
        *,
        why_none: str | None = None,
    ) -> None:
        """Take the cards with these CUDA ordinals, among those that `environ` makes visible.

        The ordinals must be the engine's own. With several engines on a host they start at local
        rank x world size, unless CUDA_VISIBLE_DEVICES was already cut to the engine. An engine
        without an NVIDIA GPU of its own, or with GPUs on another host, passes no ordinals and gives
        the reason in `why_none`. Never raises.
        """
        self._nvml: _Nvml | None = None
        self._initialised = False
        self._devices: list[_Device] = []
        self._read_ns: int | None = None
        self._retry_ns: int | None = None
        self._logged: set[tuple[str, str]] = set()
        self._final_reason: str | None = None
        self._is_bus_order = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        try:
            ids = visible_device_ids(environ.get("CUDA_VISIBLE_DEVICES"), ordinals)
            self._devices = [_Device(device_id) for device_id in ids]
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self._give_up(f"no_device: {why_none or error}")

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        """The engine's cards in ordinal order; their names are None before the first read."""
        return tuple(device.info for device in self._devices)

    @property
    def power_max_mw(self) -> int | None:
        """The largest power limit of all cards together, in milliwatts; None if unknown."""
        limits = [device.power_max_mw for device in self._devices if device.power_max_mw]
        return sum(limits) if limits and len(limits) == len(self._devices) else None

    def read(self, now_ns: int) -> EnergyReading:
        """Return the energy since the last call; `now_ns` is monotonic. Never raises.

        The first call imports the binding (20 ms) and opens NVML, which attaches to the driver. It
        returns an unknown energy, because it has no earlier reading to compare with.
        """
        try:
            amounts = self._read(now_ns)
            reason = self._final_reason or next((d.reason for d in self._devices if d.reason), None)
            if reason is None:
                return EnergyReading(sum(mj for mj in amounts if mj is not None), None)
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            reason = f"error: {error!r}"
            for device in self._devices:
                device.value_mj = None
        return EnergyReading(None, reason)

    def _read(self, now_ns: int) -> tuple[int | None, ...]:
        wall_ns = now_ns - (now_ns if self._read_ns is None else self._read_ns)
        self._read_ns = now_ns
        if self._final_reason is None and self._is_due(now_ns):
            self._retry_ns = now_ns + RETRY_NS
            self._open()
        return tuple(self._amount(device, now_ns, wall_ns) for device in self._devices)

    def _amount(self, device: _Device, now_ns: int, wall_ns: int) -> int | None:
        if device.handle is None or self._nvml is None:
            device.value_mj = None
            return None  # The reason noted before still holds.
        try:
            amount_mj = device.advance(self._nvml, now_ns, wall_ns)
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self._note_unknown(device, error)
            return None
        device.code = device.reason = None
        return amount_mj

    def _is_due(self, now_ns: int) -> bool:
        """Return whether to look for cards now: at first, and every `RETRY_NS` while one fails."""
        if self._retry_ns is None:
            return True
        return now_ns >= self._retry_ns and any(d.code == "error" for d in self._devices)

    # -- finding the cards --------------------------------------------------------------------

    def _open(self) -> None:
        """Initialise NVML and find every card anew: the handle of a lost card stays dead."""
        try:
            nvml = self._nvml = self._nvml or _load_binding()
            if self._initialised:
                self._initialised = False
                nvml.nvmlShutdown()
            nvml.nvmlInit()
            self._initialised = True
            self._check_order(nvml)
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            code, reason = self._explain(error)
            if code in FINAL_REASONS:
                self._give_up(reason)
            for device in self._devices:
                device.handle = None
                self._note_unknown(device, error)
            return
        for device in self._devices:
            device.handle = None
            try:
                _find(nvml, device)
            except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
                device.handle = None
                self._note_unknown(device, error)

    def _check_order(self, nvml: _Nvml) -> None:
        """Raise _UnknownError if an index may mean one card to CUDA and another to NVML.

        NVML counts cards in bus order. CUDA counts the fastest first, unless CUDA_DEVICE_ORDER says
        otherwise.
        """
        count = nvml.nvmlDeviceGetCount()
        by_index = any(device.device_id.isdecimal() for device in self._devices)
        if self._is_bus_order or not by_index or len(self._devices) == count:
            return
        names = {nvml.nvmlDeviceGetName(handle) for handle in _handles(nvml)}
        if len(names) > 1:
            raise _UnknownError(
                "order",
                f"the machine has different cards ({', '.join(sorted(names))}), so an index may"
                " mean one card to CUDA and another to NVML; set CUDA_DEVICE_ORDER=PCI_BUS_ID,"
                " or name the cards by UUID in CUDA_VISIBLE_DEVICES",
            )

    # -- what went wrong ----------------------------------------------------------------------

    def _give_up(self, reason: str) -> None:
        self._final_reason = reason
        logger.info("cost meter: energy is not measured: %s", reason)

    def _note_unknown(self, device: _Device, error: Exception) -> None:
        device.code, reason = self._explain(error)
        device.reason = f"{reason} (device {device.info.uuid or device.device_id})"
        key = (device.device_id, device.code)
        if device.code not in (*FINAL_REASONS, "first") and key not in self._logged:
            self._logged.add(key)
            logger.warning(
                "cost meter: the engine's energy is unknown for now: %s. Its requests have null"
                " energy until a reading works again. This is not logged again.",
                device.reason,
            )

    def _explain(self, error: Exception) -> tuple[str, str]:
        """Return the code and the reason text for an error."""
        if isinstance(error, _UnknownError):
            return error.code, str(error)
        nvml = self._nvml
        if nvml is None or not isinstance(error, nvml.NVMLError):
            return "error", f"error: {error!r}"
        value = getattr(error, "value", None)
        if value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return "no_library", "no_library: no libnvidia-ml.so.1, so no NVIDIA driver is here"
        if value in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            return "no_counter", "no_counter: the card or its driver does not count energy"
        return "error", f"error: NVML says {error}"


def _load_binding() -> _Nvml:
    """Import pynvml. This is not done at the top, because most processes read no energy."""
    try:
        import pynvml  # noqa: PLC0415
    except ImportError as error:
        raise _UnknownError("no_binding", f"{error}; pip install nvidia-ml-py") from None
    if not hasattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption"):
        where = getattr(pynvml, "__file__", "?")
        raise _UnknownError(
            "no_binding",
            f"{where} is another pynvml; pip uninstall pynvml, then pip install nvidia-ml-py",
        )
    nvml: _Nvml = pynvml
    return nvml


def _handles(nvml: _Nvml) -> list[object]:
    """Return the handles of all cards in the machine that can be opened."""
    handles = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handles.append(nvml.nvmlDeviceGetHandleByIndex(index))
        except nvml.NVMLError:
            continue
    return handles


def _find(nvml: _Nvml, device: _Device) -> None:
    """Set the handle, names and power limit of a card. Raises _UnknownError for a MIG slice."""
    is_slice = device.device_id.startswith(MIG_PREFIX)
    try:
        handle = _handle_of(nvml, device.device_id)
        device.info = DeviceInfo(nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle))
    except nvml.NVMLError:
        if not is_slice:
            raise
        device.info = DeviceInfo(None, device.device_id)  # A MIG slice may have only its id.
    if is_slice or is_sliced(nvml, handle):
        raise _UnknownError("mig", "a MIG slice has no counter; the card's counts all its slices")
    device.handle = handle
    try:
        device.power_max_mw = nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)[1] or None
    except nvml.NVMLError:
        device.power_max_mw = None


def _handle_of(nvml: _Nvml, device_id: str) -> object:
    if device_id.isdecimal():
        # The binding cuts an index to 32 bits, so a huge index could mean another card.
        if int(device_id) >= (count := nvml.nvmlDeviceGetCount()):
            raise _UnknownError("error", f"expected GPU {device_id}, got {count} GPUs")
        return nvml.nvmlDeviceGetHandleByIndex(int(device_id))
    try:
        return nvml.nvmlDeviceGetHandleByUUID(device_id)
    except nvml.NVMLError:
        # CUDA accepts an unambiguous beginning of a UUID; NVML needs all of it.
        handles = _handles(nvml)
        matches = [h for h in handles if nvml.nvmlDeviceGetUUID(h).startswith(device_id)]
        if len(matches) != 1:
            raise
        return matches[0]


def is_sliced(nvml: _Nvml, handle: object) -> bool:
    """Return whether a card is in MIG mode, in which CUDA gives a process one slice of it."""
    try:
        return nvml.nvmlDeviceGetMigMode(handle)[0] == 1  # NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError:
        return False  # The card or its driver does not know MIG.
