"""The cost calculators by name, with a description for each input.

Each calculator is a function of `economics`. The command line and the side endpoint build their
options and bodies from the signatures of these functions, so that both take and refuse the same.

Invariant: an answer holds the inputs as they were used, the formula, and the unrounded result.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from vllm_cost_meter import economics
from vllm_cost_meter.economics import Curve

CALCULATORS: Mapping[str, Callable[..., Any]] = {
    "c-eff": economics.c_eff,
    "arrival": economics.arrival,
    "request": economics.request,
    "blended": economics.blended,
    "penalty": economics.penalty,
    "slo": economics.slo,
    "crossover": economics.crossover,
    "break-even": economics.break_even,
    "serverless": economics.serverless,
}
# The meaning and unit of each input. The command line and the OpenAPI document show these.
INPUTS: Mapping[str, str] = {
    "usd_per_hour": "USD per hour of the whole deployment",
    "usd_per_gpu_hour": "USD per hour of one GPU",
    "gpus": "GPUs of the deployment, with usd_per_gpu_hour",
    "output_tokens_per_s": "output tokens per second of the whole deployment",
    "total_tokens_per_s": "input and output tokens per second of the whole deployment",
    "requests_per_s": "requests per second of the whole deployment",
    "output_tokens_per_request": "output tokens of a mean request",
    "input_usd_per_m": "USD per million input tokens",
    "output_usd_per_m": "USD per million output tokens",
    "ratio": "input tokens to output tokens, such as 3:1",
    "m_tokens_per_day": "million tokens per day, input and output together",
    "days": "days of a month",
    "failure_share": "part of the attempts that fail, 0 to 1",
    "retries_max": "how often a failed request is sent again at most",
    "curve": "points of requests_per_s (or rps) and output_tokens_per_s, for SLOs with ttft_p99_ms"
    " and tpot_ms: JSON or CSV",
    "ttft_p99_ms": "the 99th percentile of time to first token, at most so many ms",
    "tpot_ms": "time per output token, at most so many ms",
    "api_usd_per_m_output": "USD per million output tokens at the API",
    "tokens_per_hour": "tokens per hour at full load, of those that the API's price is for",
    "api_usd_per_m": "USD per million tokens at the API",
    "reserved_usd_per_hour": "the same as usd_per_hour, reserved",
    "spot_usd_per_hour": "the same as usd_per_hour, spot",
    "overhead_usd_per_month": "USD per month besides: engineering, storage",
    "overhead_percent": "percent of the hardware's cost besides",
    "redundancy": "factor on the hardware's price for standby, 1 or more",
    "hours_per_month": "hours in a month",
    "utilization": "parts of the capacity, 0 to 1",
    "volume": "million tokens per month to judge",
    "gpu_usd_per_s": "USD per second of the GPUs",
    "run_s": "seconds that a call takes",
    "calls": "calls per month",
    "cpu_cores": "CPU cores",
    "cpu_usd_per_core_s": "USD per second of one core",
    "memory_gib": "GiB of memory",
    "memory_usd_per_gib_s": "USD per second of one GiB",
    "multiplier": "factor of the price tier or region",
    "build_s": "seconds that one build takes",
    "builds": "builds per month",
    "init_s": "seconds that a cold start takes",
    "cold_starts": "cold starts per month",
    "storage_gib": "GiB stored",
    "free_storage_gib": "GiB of them that are free",
    "storage_usd_per_gib_month": "USD per GiB and month",
}


def calculate(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a calculator's inputs, formula and result, ready for JSON.

    `name` is a key of CALCULATORS; `given` holds the function's arguments. Raises ValueError for
    an input that the calculator refuses.
    """
    function = CALCULATORS[name]
    bound = inspect.signature(function).bind(**given)
    bound.apply_defaults()
    result = function(**given)
    return {
        "calculator": name,
        "inputs": {key: _shown(value) for key, value in bound.arguments.items()},
        "formula": type(result).FORMULA,
        **asdict(result),
    }


def _shown(value: Any) -> Any:
    if isinstance(value, Curve):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value
