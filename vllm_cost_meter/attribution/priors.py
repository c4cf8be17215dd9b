"""What a step costs before any step was seen: planes from counts of FLOPs and bytes.

A model's FLOPs and bytes of memory traffic are linear in what a batch holds
(docs/explanation/attribution.md), so divided by a GPU's published peaks they are the two planes of
its roofline, too low by whatever
the GPU does not reach of its peaks. The fit finds the scale of each plane from the first steps;
the prior's part is the ratio of the terms within a plane. Which plane is higher for a step it
cannot say, as a GPU reaches more of its bandwidth than of its arithmetic: only the planes of an
earlier fit are trusted with that.

Invariant: coefficients are in ns per unit, finite and >= 0.
"""

from dataclasses import dataclass

from vllm_cost_meter.attribution.cost_model_py import Plane, Planes


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a GPU could do at best, as its maker publishes it: dense FLOP/s, bytes/s of memory."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Prior:
    """Planes to start from. `trusted`: an earlier fit's. `source` says whence."""

    planes: Planes | None
    trusted: bool
    source: str


# A known GPU by the start of the name that its driver tells. Sources: NVIDIA datasheets (dense
# bf16, half of the figures with sparsity).
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
# FLOPs per byte at which a GPU of this decade is as busy with either: for one that is not known.
USUAL_BALANCE = 250.0
NOTHING_KNOWN = Prior(None, trusted=False, source="tokens")


def peaks_of(device_name: str) -> Peaks | None:
    """Return the published peaks of a device by the name its driver tells, None if not known."""
    known = [name for name in KNOWN_PEAKS if device_name.startswith(name)]
    return KNOWN_PEAKS[max(known, key=len)] if known else None


def prior_of_counts(flops: Plane, bytes_moved: Plane, peaks: Peaks | None, source: str) -> Prior:
    """Return the prior of a model on a GPU.

    `flops` and `bytes_moved` are the counts of a step, as planes over (1, tokens, sequences,
    products, context). Without peaks the planes are in units of their own.
    """
    peaks = peaks or Peaks(1e12, 1e12 / USUAL_BALANCE)
    compute = _scaled(flops, 1e9 / peaks.flops_per_s)
    memory = _scaled(bytes_moved, 1e9 / peaks.bytes_per_s)
    f, a, b, q, _ = compute
    g, a2, b2, _, k = memory
    one = (f + g, a + a2, b + b2, q, k)
    return Prior((compute, memory, one), trusted=False, source=source)


def _scaled(plane: Plane, factor: float) -> Plane:
    f, a, b, q, k = (factor * max(0.0, coefficient) for coefficient in plane)
    return f, a, b, q, k
