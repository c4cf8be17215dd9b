"""Priors of the cost model: predict a step's cost from FLOPs and bytes before any step ran.

A model's FLOPs and memory traffic are linear in the batch's sums (docs/explanation/attribution.md).
Divided by a GPU's published peaks, they give the two planes of its roofline, and the parts of its
curve: what is read, what is computed, and what a step takes to begin. All are too low, because no
GPU reaches its peaks. The fit finds each part's scale from the first steps; the prior gives the
ratio between the terms within a part, and roughly that between the parts. A prior cannot say which
plane is higher for a step, because a GPU reaches more of its bandwidth than of its arithmetic. Only
an earlier fit's planes are trusted with that.

Invariant: coefficients are in ns per unit, or in any unit if no part has a scale; finite and >= 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm_cost_meter.attribution.cost_model import (
    DECODE_COMPUTE,
    ENCODER,
    ENCODER_TOKEN,
    EXPERTS,
    FIT_TERMS,
    FIXED,
    GUIDED,
    GUIDED_ROW,
    LORA,
    LORA_TOKEN,
    PAIRS,
    PREFILL,
    PREFILL_COMPUTE,
    RAMPS,
    READ,
    SEQUENCE,
    SLOPES,
    UNKNOWN_MODEL,
    Coefficients,
    Plane,
    Planes,
    ServedModel,
)


@dataclass(frozen=True, slots=True)
class Peaks:
    """A GPU's published peaks: dense FLOP/s, and memory bandwidth in bytes/s."""

    flops_per_s: float
    bytes_per_s: float


class PriorPart(NamedTuple):
    """Coefficients of a curve that are known but for their scale.

    `scale` is the expected one, known to `spread` of itself. Without any idea of it, it is 0.
    """

    coefficients: Coefficients
    scale: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class CurvePrior:
    """What is known of a curve before any step: parts, and the coefficients to start with.

    `counts_reading` says that the first part is all that is read, by counts of bytes.
    """

    parts: tuple[PriorPart, ...]
    start: Coefficients
    counts_reading: bool = False

    @property
    def has_ratio(self) -> bool:
        """Whether the ratio of the parts is roughly known."""
        return all(part.scale > 0.0 for part in self.parts)


@dataclass(frozen=True, slots=True)
class Prior:
    """What a fit starts from: planes, parts of a curve, and what is known of the model.

    `source` says where they come from.
    """

    planes: Planes
    curve: CurvePrior
    served: ServedModel
    source: str


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """The bytes of one expert in all layers, and a token's FLOPs in the experts it chooses."""

    bytes_each: float = 0.0
    flops_per_token: float = 0.0


NO_EXPERTS = ExpertCounts()

# Known GPUs by the beginning of their driver's device name. The figures come from NVIDIA's
# datasheets and are for dense bf16, i.e. half of the figures with sparsity.
KNOWN_PEAKS = {
    "NVIDIA H200": Peaks(989e12, 4.8e12),
    "NVIDIA H100 PCIe": Peaks(756e12, 2.0e12),
    "NVIDIA H100 NVL": Peaks(835e12, 3.9e12),
    "NVIDIA H100": Peaks(989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": Peaks(312e12, 2.039e12),
    "NVIDIA A100 80GB PCIe": Peaks(312e12, 1.935e12),
    "NVIDIA A100": Peaks(312e12, 1.555e12),
    "NVIDIA L40S": Peaks(362e12, 0.864e12),
    "NVIDIA L4": Peaks(121e12, 0.3e12),
    "NVIDIA A10": Peaks(125e12, 0.6e12),
}
# FLOPs per byte at which a GPU of this decade is equally busy with both. Used for unknown GPUs.
USUAL_BALANCE = 250.0
# Published peaks divided by what kernels reach: of bandwidth, and of arithmetic.
USUAL_BYTES_SCALE, USUAL_FLOPS_SCALE, USUAL_SCALE_SPREAD = 1.2, 1.5, 0.33
# A step's launches in all, and in each layer; known to their order only.
START_NS, LAYER_START_NS, START_SPREAD = 300_000.0, 15_000.0, 1.0
# Of what a step reads, on a GPU whose peaks are unknown.
START_PART = 0.1
# From so many tokens on products are limited by arithmetic, where nothing is counted.
USUAL_RIDGE_TOKENS = 256.0
# Terms of an earlier fit that are scaled together, and how well their scale is known.
_KINDS_OF_TERMS = (
    (FIXED, PREFILL, SEQUENCE, READ, LORA, LORA_TOKEN, GUIDED, GUIDED_ROW, EXPERTS),
    (PAIRS, PREFILL_COMPUTE, DECODE_COMPUTE, ENCODER, ENCODER_TOKEN, *range(SLOPES, EXPERTS)),
)
EARLIER_SPREAD = 0.33

# The default planes: a step costs its tokens.
TOKEN_PLANES: Planes = ((0.0, 1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0, 0.0))


def prior_without_counts(served: ServedModel = UNKNOWN_MODEL) -> Prior:
    """Return the prior where nothing is counted: a step costs its tokens.

    The parts are the fixed time, the arithmetic of tokens beyond `USUAL_RIDGE_TOKENS`, the reading
    of contexts, the pairs of attention, and the reading of experts, each in a unit of its own.
    """
    alone = (FIXED, READ, PAIRS, *([EXPERTS] if served.experts.number else []))
    parts = (_beyond(USUAL_RIDGE_TOKENS, 1.0), *(_only(term) for term in alone))
    start = [0.0] * FIT_TERMS
    start[SLOPES:EXPERTS] = [1.0] * len(RAMPS)
    curve = CurvePrior(tuple(PriorPart(tuple(part)) for part in parts), tuple(start))
    return Prior(TOKEN_PLANES, curve, served, "tokens")


def prior_of_counts(
    flops: Plane,
    bytes_moved: Plane,
    peaks: Peaks | None,
    served: ServedModel = UNKNOWN_MODEL,
    experts: ExpertCounts = NO_EXPERTS,
    layers: int = 0,
) -> Prior:
    """Return the prior for a model on a GPU.

    `flops` and `bytes_moved` are a step's counts, as planes over (1, tokens, sequences, products,
    context), where all experts are read. `layers` is the number of layers. Without peaks the
    prior's parts and planes are in arbitrary units.
    """
    per_flop = 1e9 / (peaks.flops_per_s if peaks else 1e12)
    per_byte = 1e9 / (peaks.bytes_per_s if peaks else 1e12 / USUAL_BALANCE)
    compute = _scaled(flops, per_flop)
    memory = _scaled(bytes_moved, per_byte)
    f, a, b, q, _ = compute
    g, a2, b2, _, k = memory
    planes = ((f, a, b, q, 0.0), (g, a2, b2, 0.0, k))
    expert_ns = per_byte * experts.bytes_each
    all_experts_ns = expert_ns * served.experts.number
    weights_ns = max(0.0, g - all_experts_ns)
    expert_token_ns = per_flop * experts.flops_per_token
    token_ns = max(0.0, a - expert_token_ns)
    shown_layers = served.layers.whole + served.layers.windowed
    reading = [0.0] * FIT_TERMS
    reading[FIXED] = weights_ns
    reading[READ] = k / shown_layers
    reading[SLOPES:EXPERTS] = [a2] * len(RAMPS)
    reading[EXPERTS] = expert_ns
    arithmetic = _beyond(_ridge(weights_ns, token_ns), token_ns)
    for term, slope in enumerate(_beyond(_ridge(all_experts_ns, expert_token_ns), expert_token_ns)):
        arithmetic[term] += slope
    arithmetic[PAIRS] = q / shown_layers
    begin_ns = START_NS + LAYER_START_NS * layers if peaks else START_PART * g
    parts = (
        PriorPart(tuple(reading), USUAL_BYTES_SCALE, USUAL_SCALE_SPREAD),
        PriorPart(tuple(arithmetic), USUAL_FLOPS_SCALE, USUAL_SCALE_SPREAD),
        PriorPart(tuple(_only(FIXED, begin_ns)), 1.0, START_SPREAD),
    )
    return Prior(
        planes, CurvePrior(parts, _sum_of(parts), counts_reading=True), served, "ModelMetrics"
    )


def curve_of_earlier(coefficients: Coefficients) -> CurvePrior | None:
    """Return what an earlier fit tells of a curve: its arithmetic and the rest, scaled apart.

    If it has no coefficient, that is nothing.
    """
    parts = []
    for terms in _KINDS_OF_TERMS:
        part = [value if term in terms else 0.0 for term, value in enumerate(coefficients)]
        if any(part):
            parts.append(PriorPart(tuple(part), 1.0, EARLIER_SPREAD))
    return CurvePrior(tuple(parts), tuple(coefficients)) if parts else None


def peaks_of(device_name: str) -> Peaks | None:
    """Return the published peaks for a driver's device name; None if the device is unknown."""
    known = [name for name in KNOWN_PEAKS if device_name.startswith(name)]
    return KNOWN_PEAKS[max(known, key=len)] if known else None


def _ridge(reading_ns: float, token_ns: float) -> float:
    """Return how many tokens take as long to compute as the weights to read, as kernels reach."""
    if token_ns <= 0.0:
        return USUAL_RIDGE_TOKENS
    return (USUAL_BYTES_SCALE * reading_ns) / (USUAL_FLOPS_SCALE * token_ns)


def _beyond(ridge: float, token_ns: float) -> list[float]:
    """Return the coefficients of tokens that take so long each beyond a ridge."""
    coefficients = [0.0] * FIT_TERMS
    for place, (begin, end) in enumerate(zip(RAMPS, (*RAMPS[1:], 2 * RAMPS[-1]), strict=True)):
        beyond = max(0.0, end - ridge) - max(0.0, begin - ridge)
        coefficients[SLOPES + place] = token_ns * beyond / (end - begin)
    return coefficients


def _only(term: int, value: float = 1.0) -> list[float]:
    coefficients = [0.0] * FIT_TERMS
    coefficients[term] = value
    return coefficients


def _sum_of(parts: Sequence[PriorPart]) -> Coefficients:
    """Return the parts' sum at their expected scales."""
    return tuple(
        sum(part.scale * part.coefficients[term] for part in parts) for term in range(FIT_TERMS)
    )


def _scaled(plane: Plane, factor: float) -> Plane:
    f, a, b, q, k = (factor * max(0.0, coefficient) for coefficient in plane)
    return f, a, b, q, k


NOTHING_KNOWN = prior_without_counts()
