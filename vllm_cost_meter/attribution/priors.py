"""Priors of the cost model: predict a step's cost from FLOPs and bytes before any step ran.

A model's FLOPs and memory traffic are linear in the batch's sums (docs/explanation/attribution.md).
Divided by a GPU's published peaks, they give the two planes of its roofline. Both planes are too
low, because no GPU reaches its peaks. The fit finds each plane's scale from the first steps; the
prior gives the ratio between the terms within a plane. A prior cannot say which plane is higher for
a step, because a GPU reaches more of its bandwidth than of its arithmetic. Only an earlier fit's
planes are trusted with that.

Invariant: coefficients are in ns per unit, finite and >= 0.
"""

from dataclasses import dataclass

from vllm_cost_meter.attribution.cost_model import Plane, Planes


@dataclass(frozen=True, slots=True)
class Peaks:
    """A GPU's published peaks: dense FLOP/s, and memory bandwidth in bytes/s."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Prior:
    """The planes that a fit starts from. `trusted` means that they come from an earlier fit.

    `source` says where they come from.
    """

    planes: Planes | None
    trusted: bool
    source: str


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
NOTHING_KNOWN = Prior(None, trusted=False, source="tokens")


def peaks_of(device_name: str) -> Peaks | None:
    """Return the published peaks for a driver's device name; None if the device is unknown."""
    known = [name for name in KNOWN_PEAKS if device_name.startswith(name)]
    return KNOWN_PEAKS[max(known, key=len)] if known else None


def prior_of_counts(flops: Plane, bytes_moved: Plane, peaks: Peaks | None, source: str) -> Prior:
    """Return the prior for a model on a GPU.

    `flops` and `bytes_moved` are a step's counts, as planes over (1, tokens, sequences, products,
    context). The prior's planes are in ns; without peaks they are in arbitrary units.
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
