"""Activation: is the meter on in this process?

The meter is on if the operator named it in VLLM_PLUGINS and it understands this vLLM.

Invariant: once the meter is refused in a process, it stays refused.
"""

import os

# The name of the plugin in each of vLLM's entry-point groups.
NAME = "cost_meter"

_refused = False


def is_named() -> bool:
    """Return whether VLLM_PLUGINS names the meter."""
    return NAME in os.environ.get("VLLM_PLUGINS", "").split(",")


def is_refused() -> bool:
    """Return whether this process found an unknown vLLM, or could not install a hook."""
    return _refused


def refuse() -> None:
    """Keep the meter out of this process from now on."""
    global _refused
    _refused = True


def is_active() -> bool:
    """Return whether the meter is named and was not refused."""
    return is_named() and not _refused
