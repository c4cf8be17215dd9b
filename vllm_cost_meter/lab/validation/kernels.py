"""Times of single GPU kernels: matrix products, experts, exchanges between GPUs, streaming.

A kernel takes as long as the slower of its arithmetic and its memory traffic, and some time to
start. Kernels of a step run one after another, so a step is a sum of such maxima and no maximum of
sums. Arithmetic comes in tiles, which the multiprocessors of a GPU compute in waves: a product of
130 rows costs as much as one of 192 (NVIDIA, "Matrix Multiplication Background User's Guide":
tile and wave quantization). Peaks are those that kernels reach, not the published ones.

Invariant: times are in seconds and finite, and a kernel without rows takes none.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from vllm_cost_meter.lab.validation.games import Floats
from vllm_cost_meter.lab.validation.roofline import Gpu

BYTES_PER_NUMBER = 2  # bf16
# The shares of its published peaks that a GPU's best kernels reach.
ARITHMETIC_REACHED = 0.75
BANDWIDTH_REACHED = 0.85
# From one kernel to the next in a captured graph.
GAP_S = 1e-6
# Tiles of rows and columns of a matrix product, with the share of the reached peak that each has.
# A larger tile reads less, and wastes more where it is not full.
TILES = (
    *((64, 64, 0.6), (64, 128, 0.75), (64, 256, 0.85), (128, 128, 0.9), (128, 192, 0.95)),
    *((128, 256, 1.0), (192, 128, 0.95), (256, 128, 1.0)),
)
# A kernel that stays on its multiprocessor and cuts the last wave's tiles along their depth
# ("stream-K") has no waves, and reaches this share of what its tiles reach.
WITHOUT_WAVES = 0.88
# A product with few tiles is also cut along its depth, into pieces of at least so much.
DEPTH_MIN = 512
# Rows that one block of an expert's product has.
EXPERT_BLOCK_ROWS = 16
# Two GPUs of one machine, by NVLink, and what an exchange takes to start.
LINK_BYTES_PER_S = 300e9
EXCHANGE_S = 8e-6


@dataclass(frozen=True, slots=True)
class Chip:
    """What kernels reach of a GPU: FLOP/s, bytes/s, and the number of its multiprocessors."""

    flops_per_s: float
    bytes_per_s: float
    multiprocessors: int

    @classmethod
    def of(cls, gpu: Gpu, slower: float = 1.0) -> Self:
        """Return what kernels reach of a GPU whose arithmetic is so many times slower."""
        return cls(
            gpu.peaks.flops_per_s * ARITHMETIC_REACHED / slower,
            gpu.peaks.bytes_per_s * BANDWIDTH_REACHED,
            gpu.multiprocessors,
        )


def matmul_s(chip: Chip, rows: Floats, columns: int, depth: int) -> Floats:
    """Return the time of a product of `rows` x `depth` and `depth` x `columns`; shape as `rows`.

    The fastest of `TILES` counts, as a library chooses.
    """
    numbers = rows * depth + depth * columns + rows * columns
    memory_s = numbers * BYTES_PER_NUMBER / chip.bytes_per_s
    arithmetic_s = np.full_like(rows, np.inf)
    for tile_rows, tile_columns, reached in TILES:
        tiles = np.ceil(rows / tile_rows) * np.ceil(columns / tile_columns)
        pieces = np.clip(
            chip.multiprocessors // np.maximum(tiles, 1), 1, max(1, depth // DEPTH_MIN)
        )
        waves = np.ceil(tiles * pieces / chip.multiprocessors)
        flops = 2.0 * tile_rows * tile_columns * depth / pieces
        per_multiprocessor = chip.flops_per_s * reached / chip.multiprocessors
        streamed = tiles * pieces / chip.multiprocessors / WITHOUT_WAVES
        waves = np.where(tiles > chip.multiprocessors, np.minimum(waves, streamed), waves)
        arithmetic_s = np.minimum(arithmetic_s, waves * flops / per_multiprocessor)
    found: Floats = np.where(rows > 0, np.maximum(arithmetic_s, memory_s) + GAP_S, 0.0)
    return found


def streaming_s(chip: Chip, moved_bytes: Floats, kernels: int = 1) -> Floats:
    """Return the time of kernels that only read and write, such as norms; shape as given."""
    started = np.where(moved_bytes > 0, kernels * GAP_S, 0.0)
    found: Floats = moved_bytes / chip.bytes_per_s + started
    return found


def chosen_experts(tokens: Floats, experts: int, per_token: int, exponent: float = 0.0) -> Floats:
    """Return the expected number of experts that so many tokens choose; shape as `tokens`.

    Each token leaves an expert out with the probability 1 - q, so the expected number is the sum of
    1 - (1 - q)^T. With `exponent` 0 all experts are as popular, q = k/E; else the popularity of the
    one in place n is n^-exponent (Zipf).
    """
    popular = np.arange(1, experts + 1, dtype=np.float64) ** -exponent
    chance = _inclusion(popular, per_token)
    chosen: Floats = (1 - (1 - chance) ** np.asarray(tokens)[..., None]).sum(axis=-1)
    return chosen


def _inclusion(popular: Floats, per_token: int) -> Floats:
    """Return each expert's probability to be among the `per_token` that a token chooses.

    In proportion to its popularity, and at most 1: what is beyond goes to the others.
    """
    chance: Floats = popular * (per_token / popular.sum())
    while (chance > 1).any():
        full = chance >= 1
        rest = popular * ~full
        chance = np.where(full, 1.0, rest * ((per_token - full.sum()) / rest.sum()))
    return chance


def experts_s(
    chip: Chip,
    tokens: Floats,
    *,
    experts: int,
    per_token: int,
    hidden: int,
    intermediate: int,
    exponent: float = 0.0,
) -> Floats:
    """Return the time of a layer's chosen experts, three products each; shape as `tokens`.

    Each chosen expert's weights are read once, and its last block of rows is half full on average.
    """
    chosen = chosen_experts(tokens, experts, per_token, exponent)
    weights = 3.0 * hidden * intermediate
    rows = tokens * per_token + chosen * EXPERT_BLOCK_ROWS / 2
    numbers = chosen * weights + tokens * per_token * 2 * (hidden + intermediate)
    arithmetic_s = 2.0 * rows * weights / (chip.flops_per_s * TILES[1][2])
    memory_s = numbers * BYTES_PER_NUMBER / chip.bytes_per_s
    started_s = np.where(tokens > 0, 4 * GAP_S, 0.0)  # sorting, two products, the sum
    found: Floats = np.maximum(arithmetic_s, memory_s) + started_s
    return found


def exchange_s(moved_bytes: Floats, gpus: int) -> Floats:
    """Return the time of an all-reduce of so many bytes between GPUs; shape as given."""
    if gpus == 1:
        return np.zeros(np.shape(moved_bytes))
    sent = 2.0 * (gpus - 1) / gpus * moved_bytes
    return np.where(moved_bytes > 0, EXCHANGE_S + sent / LINK_BYTES_PER_S, 0.0)
