"""Hooks on vLLM's command line and plugin loading: the only hooks of a meter that is not named.

Invariant: vLLM's parser and plugins stay as they are, except for our flags and our stat logger.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import vllm.plugins

from vllm_cost_meter.errors import VllmMismatchError
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.vllm_hooks import canary

logger = meter_logger()

STAT_LOGGER_PLUGINS = "vllm.stat_logger_plugins"


# -- command line and plugin loading ------------------------------------------------------------


def hook_cli_flags(add_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    """Call `add_flags(parser)` whenever vLLM fills an argument parser with engine arguments."""
    from vllm.engine.arg_utils import EngineArgs  # At the top it would be a circular import.

    original = EngineArgs.add_cli_args
    if hasattr(original, "cost_meter_original"):
        return

    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        filled = original(parser, *args, **kwargs)
        try:
            add_flags(filled)
        except Exception:
            logger.exception("cost meter: its flags cannot be added; name it in VLLM_PLUGINS")
        return filled

    add_cli_args.cost_meter_original = original  # type: ignore[attr-defined]
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def hook_stat_logger_loading(is_active: Callable[[], bool], plugin_name: str) -> None:
    """Keep vLLM from using our stat logger while the meter is not active.

    Its mere presence would turn statistics on under --disable-log-stats.
    """
    original = vllm.plugins.load_plugins_by_group
    if hasattr(original, "cost_meter_original"):
        return

    @functools.wraps(original)
    def load_plugins_by_group(group: str, *args: Any, **kwargs: Any) -> Any:
        plugins = original(group, *args, **kwargs)
        if group == STAT_LOGGER_PLUGINS and not (is_active() and _stat_logger_fits()):
            plugins.pop(plugin_name, None)
        return plugins

    load_plugins_by_group.cost_meter_original = original  # type: ignore[attr-defined]
    vllm.plugins.load_plugins_by_group = load_plugins_by_group
    # This vLLM module may already hold the original function. Importing it here would be heavy.
    if loggers := sys.modules.get("vllm.v1.metrics.loggers"):
        loggers.load_plugins_by_group = load_plugins_by_group  # type: ignore[attr-defined]


def _stat_logger_fits() -> bool:
    """Return whether vLLM has the stat logger interface that ours expects; a misfit stops vLLM."""
    try:
        canary.check(canary.STAT_LOGGER)
    except VllmMismatchError as error:
        logger.error("cost meter: no latency metrics; everything else is metered: %s", error)
        return False
    return True
