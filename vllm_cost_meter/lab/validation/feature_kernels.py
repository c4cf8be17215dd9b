"""Kernels that only some requests of a step need: adapters (LoRA), an image encoder, grammars.

They run beside the kernels of the model (`kernel_machine.py`), and each kind is a game of its own:

- **Adapters.** As soon as one row of the batch has an adapter, each layer starts two more kernels
  for each of its products: one that shrinks the rows to the adapter's rank, and one that expands
  them and adds. They go over the whole batch, where a block without an adapter ends at once. Each
  adapter in the batch is read once. Its rows are computed in blocks, and at a rank of 16 they do 16
  FLOP a byte, so memory is the limit.
- **Images.** The encoder runs before the model, in the step where an image is scheduled, over all
  images of the step together: products over the sum of their patches, attention within each image.
- **Grammars.** The processor fills a mask of the vocabulary for each row that is sampled by a
  grammar. The masks are sent to the GPU, where one kernel applies them.

Each game has its Shapley value in closed form: a table over a sum has that of `total_shares`, own
parts belong to their owners, and of a pass over the batch each row's part is shared between the row
and whoever first causes the pass.

Invariant: without the requests that need them, these kernels take no time.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_cost_meter.lab.validation.games import Features, Flags, Floats, Ints
from vllm_cost_meter.lab.validation.kernel_truth import total_shares
from vllm_cost_meter.lab.validation.kernels import (
    BYTES_PER_NUMBER,
    GAP_S,
    Chip,
    matmul_s,
    streaming_s,
)

# A kernel over the few rows of an adapter takes so long at the least: it has too little work for
# the GPU's multiprocessors, and adds up pieces of its depth.
ADAPTER_KERNEL_S = 8e-6
# What a kernel takes for a token without an adapter: a block that ends at once.
PASSED_TOKEN_S = 0.5e-9
# Rows of an adapter that one block computes.
ADAPTER_BLOCK_ROWS = 16
# The encoder's input is brought to the GPU, and its result is put among the prompt's embeddings.
ENCODER_START_S = 300e-6
ENCODER_ATTENTION_REACHED = 0.7
# Filling one row's mask on the processor, and what masks take to be sent and applied at all.
MASK_ROW_S = 25e-6
MASKS_S = 150e-6


@dataclass(frozen=True)
class Encoder:
    """A vision transformer in bf16. `patches` of an image become one token of the prompt."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    patches: int = 4


class FeatureGame(Protocol):
    """What one kind of kernels takes in a step of n requests."""

    def value(self, members: Floats) -> Floats:
        """Return the seconds of coalitions, rows of 0 and 1 of the shape (m, n); shape (m,)."""

    def shares(self) -> Floats:
        """Return the Shapley value in seconds; shape (n,)."""


@dataclass(frozen=True)
class Totals:
    """The time follows from a sum of whole numbers; who brings 0 takes no part."""

    weights: Ints
    table: Floats  # from the sum 0 on

    def value(self, members: Floats) -> Floats:
        """Return the seconds of coalitions."""
        found: Floats = self.table[(members @ self.weights).astype(int)]
        return found

    def shares(self) -> Floats:
        """Return the Shapley value."""
        found = np.zeros(len(self.weights))
        takes_part = self.weights > 0
        found[takes_part] = total_shares(self.weights[takes_part], self.table)
        return found


@dataclass(frozen=True)
class Alone:
    """Each request takes its own time, whoever is beside it."""

    seconds: Floats

    def value(self, members: Floats) -> Floats:
        """Return the seconds of coalitions."""
        found: Floats = members @ self.seconds
        return found

    def shares(self) -> Floats:
        """Return the Shapley value."""
        return self.seconds


@dataclass(frozen=True)
class PassOver:
    """Kernels that go over all requests as soon as one of `causes` is there.

    Of k causes, a request that is none itself comes before all of them with the probability
    1 / (k + 1). Then the first cause brings the request's time, else the request does.
    """

    causes: Flags
    seconds: Floats  # of each request

    def value(self, members: Floats) -> Floats:
        """Return the seconds of coalitions."""
        found: Floats = (members @ self.causes > 0) * (members @ self.seconds)
        return found

    def shares(self) -> Floats:
        """Return the Shapley value."""
        count = int(self.causes.sum())
        others_s = float((self.seconds * ~self.causes).sum())
        caused = self.seconds + others_s / (count * (count + 1.0))
        found: Floats = np.where(self.causes, caused, self.seconds * count / (count + 1.0))
        return found


def adapter_games(
    chip: Chip,
    products: list[tuple[int, int]],
    layers: int,
    rank: int,
    tokens: Ints,
    features: Features,
) -> list[FeatureGame]:
    """Return the games of the adapters in a step, for a layer's products (columns, depth)."""
    has_adapter = features.adapters > 0
    if not has_adapter.any():
        return []
    kernels = 2 * len(products) * layers
    passed = PassOver(has_adapter, np.asarray(tokens * (kernels * PASSED_TOKEN_S), np.float64))
    started = Totals(has_adapter.astype(np.int64), _from_1(kernels * ADAPTER_KERNEL_S, has_adapter))
    games: list[FeatureGame] = [passed, started]
    for adapter in np.unique(features.adapters[has_adapter]):
        weights = np.where(features.adapters == adapter, tokens, 0)
        table = _adapter_s(chip, products, rank, np.arange(weights.sum() + 1.0))
        games.append(Totals(weights, layers * table))
    return games


def _adapter_s(chip: Chip, products: list[tuple[int, int]], rank: int, tokens: Floats) -> Floats:
    """Return the time of one adapter's products in a layer; shape as `tokens`."""
    rows = np.ceil(tokens / ADAPTER_BLOCK_ROWS) * ADAPTER_BLOCK_ROWS
    numbers = np.zeros_like(tokens)
    for columns, depth in products:
        weights = np.where(tokens > 0, float(rank * (columns + depth)), 0.0)
        # Rows are read, shrunk, read again, and added to what the model's product wrote.
        numbers += weights + rows * (depth + 2.0 * rank + 2.0 * columns)
    found: Floats = numbers * BYTES_PER_NUMBER / chip.bytes_per_s
    return found


def encoder_games(chip: Chip, encoder: Encoder, features: Features) -> list[FeatureGame]:
    """Return the games of the images in a step, one for each request at most."""
    if not features.encoded.any():
        return []
    hidden, patches = encoder.hidden, encoder.patches
    sums = np.arange(features.encoded.sum() + 1.0) * patches
    layer = (
        matmul_s(chip, sums, 3 * hidden, hidden)
        + matmul_s(chip, sums, hidden, hidden)
        + matmul_s(chip, sums, encoder.intermediate, hidden)
        + matmul_s(chip, sums, hidden, encoder.intermediate)
        + streaming_s(chip, 10.0 * sums * hidden * BYTES_PER_NUMBER, kernels=5)
    )
    begun = np.where(sums > 0, ENCODER_START_S, 0.0)
    # Queries meet all keys of their image; of each pair there are two products.
    pairs = (features.encoded * float(patches)) ** 2
    reached = chip.flops_per_s * ENCODER_ATTENTION_REACHED
    attention = np.asarray(encoder.layers * 4.0 * hidden * pairs / reached, np.float64)
    return [Totals(features.encoded, begun + encoder.layers * layer), Alone(attention)]


def grammar_games(chip: Chip, vocab: int, rows: Ints) -> list[FeatureGame]:
    """Return the game of the masks in a step; `rows` are those that each request samples by one."""
    if not rows.any():
        return []
    sums = np.arange(rows.sum() + 1.0)
    # A logit is float32, read and written; a mask has a bit for each.
    applied = streaming_s(chip, sums * vocab * (2 * 4 + 1 / 8))
    masks = np.where(sums > 0, MASKS_S + GAP_S, 0.0) + sums * MASK_ROW_S
    return [Totals(rows, masks + applied)]


def _from_1(seconds: float, flags: Flags) -> Floats:
    """Return a table that is 0 at 0 and then so many seconds, for so many flags."""
    table = np.full(int(flags.sum()) + 1, seconds)
    table[0] = 0.0
    return table
