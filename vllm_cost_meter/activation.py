"""Whether the meter is on in this process: named by the operator, and understanding this vLLM.

Invariant: what was refused once stays refused for the life of the process.
"""

import os

# The name of the plugin in each of vLLM's entry-point groups.
NAME = "cost_meter"

_refused = False


def is_named() -> bool:
    """Tell whether VLLM_PLUGINS names the meter."""
    return NAME in os.environ.get("VLLM_PLUGINS", "").split(",")


def is_refused() -> bool:
    """Tell whether this process met a vLLM that is not understood, or could not install a hook."""
    return _refused


def refuse() -> None:
    """Keep the meter out of this process from now on."""
    global _refused
    _refused = True


def is_active() -> bool:
    """Tell whether the meter is named, and vLLM understood."""
    return is_named() and not _refused
