"""Derive the cost model's prior from a vLLM configuration and vLLM's own counts (ModelMetrics).

vLLM counts the FLOPs and bytes of a batch operation by operation (`vllm/v1/metrics/perf.py`). The
counts are linear in the batch's sums, so a few made-up batches give the coefficients. What the
model's configuration says (experts, windows, captured graphs) is read from it. This runs once in
the engine's process, when the meter is made.

Invariant: an error here never leaves the module; the prior then knows less, or nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from vllm_cost_meter.attribution.cost_model import Experts, Layers, ServedModel
from vllm_cost_meter.attribution.priors import (
    ExpertCounts,
    Peaks,
    Prior,
    peaks_of,
    prior_of_counts,
    prior_without_counts,
)
from vllm_cost_meter.logs import meter_logger, quieter

logger = meter_logger()

T = TypeVar("T")

# A batch has (tokens, context at the end of the step) for each request.
Batch = Sequence[tuple[int, int]]
BatchCount = Callable[[Batch], int]
# The made-up batches have so many tokens that every expert is chosen.
MANY = 4_096


class Linear(NamedTuple):
    """The coefficients of a count that is linear in a batch's sums."""

    fixed: float
    token: float
    sequence: float
    product: float  # of tokens x context
    prefill_context: float
    decode_context: float


def context_of(batch: Batch) -> Any:
    """Return a batch in vLLM's form. As in vLLM, more than one token means a prefill chunk."""
    from vllm.v1.metrics.perf import ExecutionContext  # Some vLLMs do not have it.

    context = ExecutionContext()
    for tokens, context_tokens in batch:
        context.add(tokens, context_tokens, is_prefill=tokens > 1)
    return context


def linear(count: BatchCount) -> Linear:
    """Return the coefficients of a count, by differences."""
    small, large = count([(MANY, 0)]), count([(2 * MANY, 0)])
    token = (large - small) / MANY
    sequence = count([(MANY, 0), (MANY, 0)]) - large
    small_context = count([(MANY, 1)]) - small
    large_context = count([(2 * MANY, 1)]) - large
    product = (large_context - small_context) / MANY
    decode_context = count([(1, 1)]) - count([(1, 0)]) - product
    return Linear(
        fixed=small - token * MANY - sequence,
        token=token,
        sequence=sequence,
        product=product,
        prefill_context=small_context - product * MANY,
        decode_context=decode_context,
    )


def bytes_of_expert(bytes_moved: BatchCount, per: Linear, experts: Experts) -> float:
    """Return the bytes of one expert in all layers: one token reads those it chooses, many all."""
    one = per.fixed + per.token + per.sequence
    return (one - bytes_moved([(1, 0)])) / (experts.number - experts.per_token)


def counted_prior(
    flops: BatchCount,
    bytes_moved: BatchCount,
    served: ServedModel,
    layers: int,
    peaks: Peaks | None,
    weight_bytes: float,
) -> Prior:
    """Return the prior by counts of FLOPs and bytes.

    `layers` is the number of layers, `weight_bytes` the size of a parameter of an expert.
    """
    per_flops, per_bytes = linear(flops), linear(bytes_moved)
    experts = ExpertCounts()
    if served.experts.number > served.experts.per_token > 0:
        bytes_each = max(0.0, bytes_of_expert(bytes_moved, per_bytes, served.experts))
        # A token meets each parameter of the experts it chooses with two FLOPs.
        parameters = bytes_each / weight_bytes * served.experts.per_token
        experts = ExpertCounts(bytes_each, 2.0 * parameters)
    return prior_of_counts(
        (per_flops.fixed, per_flops.token, per_flops.sequence, per_flops.product, 0.0),
        (per_bytes.fixed, per_bytes.token, per_bytes.sequence, 0.0, per_bytes.decode_context),
        peaks,
        served,
        experts,
        layers,
    )


def prior_of_model(vllm_config: Any, device_name: str) -> Prior:
    """Return the cost model's prior for the model of a vLLM configuration.

    If vLLM counts nothing for the model, or fails, the prior says that a step costs its tokens.
    """
    served = served_model(vllm_config)
    try:
        with quieter("vllm.v1.metrics.perf"):  # Otherwise it logs each object it makes.
            return _by_metrics(vllm_config, served, device_name)
    except Exception as error:  # noqa: BLE001 - vLLM may raise anything for an unknown model
        logger.warning("cost meter: no counts of FLOPs and bytes for this model: %r", error)
        return prior_without_counts(served)


def served_model(vllm_config: Any) -> ServedModel:
    """Return what a configuration says of the model; what cannot be read is left out."""
    return ServedModel(
        _read("experts", _experts, vllm_config, Experts()),
        _read("layers", _layers, vllm_config, Layers()),
        _read("captured graphs", _captured, vllm_config, ()),
    )


def _read(what: str, read: Callable[[Any], T], vllm_config: Any, otherwise: T) -> T:
    try:
        return read(vllm_config)
    except Exception as error:  # noqa: BLE001 - configurations have many forms
        logger.warning("cost meter: cannot read the model's %s: %r", what, error)
        return otherwise


def _experts(vllm_config: Any) -> Experts:
    model = vllm_config.model_config
    number = int(model.get_num_experts())
    if hasattr(model, "get_num_experts_per_tok"):  # Earlier vLLMs have only the first.
        return _chosen_of(number, model.get_num_experts_per_tok())
    config = model.hf_text_config
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    per_token = next((getattr(config, name) for name in names if hasattr(config, name)), 0)
    return _chosen_of(number, per_token)


def _chosen_of(number: int, per_token: int | list[int] | None) -> Experts:
    """Return how many of so many experts a token chooses; some models say it for each layer."""
    most = max(per_token) if isinstance(per_token, list) else per_token or 0
    return Experts(number, int(most)) if 0 < most < number else Experts()


def _layers(vllm_config: Any) -> Layers:
    config = vllm_config.model_config.hf_text_config
    number = int(config.num_hidden_layers)
    window = vllm_config.model_config.get_sliding_window()
    if not window:
        return Layers()
    kinds = getattr(config, "layer_types", None)
    windowed = sum("sliding" in str(kind) for kind in kinds[:number]) if kinds else number
    return Layers(number - windowed, windowed, int(window)) if windowed else Layers()


def _captured(vllm_config: Any) -> tuple[int, ...]:
    """Return the sizes of captured graphs, ascending; none if vLLM captures none."""
    compilation = vllm_config.compilation_config
    mode = getattr(compilation, "cudagraph_mode", None)
    is_off = mode is not None and getattr(mode, "name", "") == "NONE"
    if is_off or getattr(vllm_config.model_config, "enforce_eager", False):
        return ()
    return tuple(sorted(int(size) for size in compilation.cudagraph_capture_sizes or ()))


def _by_metrics(vllm_config: Any, served: ServedModel, device_name: str) -> Prior:
    from vllm.v1.metrics.perf import ModelMetrics  # Some vLLMs do not have it.

    metrics = ModelMetrics(vllm_config)
    if not metrics.is_enabled():
        return prior_without_counts(served)
    sizes = [getattr(part, "weight_byte_size", 0) for part in metrics.metrics]
    return counted_prior(
        lambda batch: int(metrics.get_num_flops(context_of(batch))),
        lambda batch: _bytes(metrics, context_of(batch)),
        served,
        int(getattr(vllm_config.model_config.hf_text_config, "num_hidden_layers", 0)),
        peaks_of(device_name),
        min((float(size) for size in sizes if size), default=2.0),
    )


def _bytes(metrics: Any, context: Any) -> int:
    moved: int = metrics.get_read_bytes(context) + metrics.get_write_bytes(context)
    return moved
