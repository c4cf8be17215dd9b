"""Checks of the installation: entry points, native part, vLLM, the energy counter, the settings.

Invariant: they look at this machine and this environment only.
"""

import os
import time
from importlib.metadata import entry_points

from vllm_cost_meter.activation import NAME
from vllm_cost_meter.cli.doctor.findings import Finding, Outcome, failed, fine
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.engine.energy.nvml import EnergyCounter
from vllm_cost_meter.version import __version__

GROUPS = ("vllm.general_plugins", "vllm.stat_logger_plugins", "vllm.endpoint_plugins")


def entry_points_found() -> Finding:
    """Look for the entry points that vLLM loads."""
    missing = [g for g in GROUPS if NAME not in {e.name for e in entry_points(group=g)}]
    if missing:
        return failed("entry points", f"{NAME} is missing in {', '.join(missing)}")
    return fine("entry points", f"{NAME} {__version__} is found in all three groups")


def is_named() -> Finding:
    """Look whether this environment names the meter."""
    names = os.environ.get("VLLM_PLUGINS")
    if names is None:
        return fine("named", f"VLLM_PLUGINS is unset: start with --plugins {NAME}")
    if NAME in names.split(","):
        return fine("named", f"VLLM_PLUGINS={names}")
    detail = f"VLLM_PLUGINS={names} leaves {NAME} out: it is never loaded, nor is --plugins"
    return failed("named", detail)


def native_loaded() -> Finding:
    """Look whether the native attribution is loaded."""
    from vllm_cost_meter import attribution  # fails where it is not built

    if attribution.NATIVE:
        return fine("native", "the native attribution is loaded")
    return failed("native", "the slow Python twin is loaded (COST_METER_PURE_PYTHON=1)")


def vllm_understood() -> Finding:
    """Compare vLLM with what the meter expects."""
    # takes seconds
    from vllm_cost_meter.vllm_hooks.canary import check_all
    from vllm_cost_meter.vllm_hooks.middleware_place import check_place

    return fine("vllm", f"vLLM {check_all()} looks as the meter expects; {check_place()}")


def energy_counter() -> Finding:
    """Read the energy of the first GPU that a server here would see; passes without a GPU."""
    counter = EnergyCounter([0])
    reading = counter.read(time.monotonic_ns())
    code, _, detail = (reading.reason or "").partition(": ")
    if code != "first":  # "first" is the first reading of a counter that works.
        # Only a missing binding is a fault, because it is installed with the meter.
        health = Outcome.FAIL if code == "no_binding" else Outcome.OK
        return Finding("energy", health, f"not measured: {detail}")
    device = counter.devices[0]
    return fine("energy", f"the counter of {device.name} ({device.uuid}) can be read")


def access(settings: Settings) -> Finding:
    """Recommend what keeps out those whom no rule of these settings names."""
    if settings.unnamed_requests == "refuse":
        return fine("access", "requests that no rule names are refused")
    if not settings.leaves_some_unnamed:
        return fine("access", "every request has the same right to be served")
    detail = (
        "requests that no rule names are served and billed to unknown, and vLLM's API keys do not"
        " guard all routes; recommended: COST_METER_UNNAMED_REQUESTS=refuse"
    )
    return fine("access", detail)
