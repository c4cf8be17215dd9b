"""Attribution: split the GPU time of engine steps among requests, in native code by default.

`COST_METER_PURE_PYTHON=1` chooses the Python twin instead, for tests and debugging. Type checkers
read the twin as the stub of both. If the native module cannot be loaded, that is an error. We never
fall back to the twin silently, because it takes many times longer per step.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING or os.environ.get("COST_METER_PURE_PYTHON") == "1":
    from vllm_cost_meter.attribution.step_meter_py import METHODS, StepMeter, split
else:
    try:
        from vllm_cost_meter.attribution._native import METHODS, StepMeter, split
    except ImportError as error:
        raise ImportError(
            f"expected the native module vllm_cost_meter.attribution._native, got: {error}."
            " Build it: have a C compiler (e.g. gcc) and run `pip install .` in a checkout;"
            " or set COST_METER_PURE_PYTHON=1 to run the slow Python twin."
        ) from error

NATIVE: bool = StepMeter.__module__ == "vllm_cost_meter.attribution._native"

__all__ = ["METHODS", "NATIVE", "StepMeter", "split"]
