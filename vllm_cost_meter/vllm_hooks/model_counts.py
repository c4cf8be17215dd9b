"""Derive the cost model's prior from vLLM's own counts of FLOPs and bytes (ModelMetrics).

vLLM counts the FLOPs and bytes of a batch operation by operation (`vllm/v1/metrics/perf.py`). The
counts are linear in the batch's sums, so a few made-up batches give the coefficients. This runs
once in the engine's process, when the meter is made.

Invariant: an error here never leaves the module; the prior then knows nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm_cost_meter.attribution.cost_model import Plane
from vllm_cost_meter.attribution.priors import NOTHING_KNOWN, Prior, peaks_of, prior_of_counts
from vllm_cost_meter.logs import meter_logger, quieter

logger = meter_logger()

# A batch has (tokens, context at the end of the step) for each request.
Batch = Sequence[tuple[int, int]]
# The made-up batches have so many tokens that every expert is chosen.
MANY = 4_096


def context_of(batch: Batch) -> Any:
    """Return a batch in vLLM's form. As in vLLM, more than one token means a prefill chunk."""
    from vllm.v1.metrics.perf import ExecutionContext  # Some vLLMs do not have it.

    context = ExecutionContext()
    for tokens, context_tokens in batch:
        context.add(tokens, context_tokens, is_prefill=tokens > 1)
    return context


def linear(count: Callable[[Batch], int]) -> tuple[float, tuple[float, float, float, float]]:
    """Return the fixed part of a count and its coefficients, by differences.

    There is one coefficient each for tokens, requests, the sum of tokens x context, and context.
    """
    small, large = count([(MANY, 0)]), count([(2 * MANY, 0)])
    per_token = (large - small) / MANY
    per_sequence = count([(MANY, 0), (MANY, 0)]) - large
    small_context = count([(MANY, 1)]) - small
    large_context = count([(2 * MANY, 1)]) - large
    per_token_context = (large_context - small_context) / MANY
    per_context = small_context - per_token_context * MANY
    fixed = small - per_token * MANY - per_sequence
    return fixed, (per_token, per_sequence, per_token_context, per_context)


def prior_of_model(vllm_config: Any, device_name: str) -> Prior:
    """Return the cost model's prior for the model of a vLLM configuration.

    If vLLM counts nothing for the model, or fails, the prior says that a step costs its tokens.
    """
    try:
        with quieter("vllm.v1.metrics.perf"):  # Otherwise it logs each object it makes.
            return _counted_prior(vllm_config, device_name)
    except Exception as error:  # noqa: BLE001 - vLLM may raise anything for an unknown model
        logger.warning("cost meter: no counts of FLOPs and bytes for this model: %r", error)
        return NOTHING_KNOWN


def _counted_prior(vllm_config: Any, device_name: str) -> Prior:
    from vllm.v1.metrics.perf import ModelMetrics  # Some vLLMs do not have it.

    metrics = ModelMetrics(vllm_config)
    if not metrics.is_enabled():
        return NOTHING_KNOWN
    return prior_of_counts(
        _plane(*linear(lambda batch: metrics.get_num_flops(context_of(batch)))),
        _plane(*linear(lambda batch: _bytes(metrics, context_of(batch)))),
        peaks_of(device_name),
        "ModelMetrics",
    )


def _bytes(metrics: Any, context: Any) -> int:
    moved: int = metrics.get_read_bytes(context) + metrics.get_write_bytes(context)
    return moved


def _plane(fixed: float, per: tuple[float, float, float, float]) -> Plane:
    per_token, per_sequence, per_token_context, per_context = per
    return fixed, per_token, per_sequence, per_token_context, per_context
