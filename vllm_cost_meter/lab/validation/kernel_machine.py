"""A GPU that runs a model kernel by kernel, and its steps as cooperative games: the second truth.

    step = start + tables of tokens, logits and sequences + attention + what any prefill adds
           + kernels that only some requests need (`feature_kernels.py`)

Kernels depend on the batch in three ways. Matrix products, experts, norms and exchanges between
GPUs depend on the number of tokens alone, which a captured graph pads; the vocabulary's product and
the drafts' on the numbers of logits and of sequences. So these are tables. Attention depends on
each request: its arithmetic and its memory traffic add up, and the longest tile is a limit of its
own. Nothing here has the form that the meter fits.

Invariant: a coalition's value depends only on its members, and nobody takes no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_cost_meter.lab.validation.feature_kernels import (
    Encoder,
    FeatureGame,
    adapter_games,
    encoder_games,
    grammar_games,
)
from vllm_cost_meter.lab.validation.games import Features, Flags, Floats, Ints
from vllm_cost_meter.lab.validation.kernel_truth import overlap_shares, total_shares
from vllm_cost_meter.lab.validation.kernels import (
    BYTES_PER_NUMBER,
    Chip,
    exchange_s,
    experts_s,
    matmul_s,
    streaming_s,
)
from vllm_cost_meter.lab.validation.roofline import Gpu, ModelShape

# Inputs are prepared and results are fetched in every step.
START_S = 200e-6
# Decodes alone run as one captured graph; with a prefill, attention starts outside of it.
PREFILL_LAYER_S = 6e-6
# Batches run in graphs that vLLM captured for these numbers of tokens, if they have no more.
CAPTURED_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
# Rows of queries in a tile of attention; the heads of a group share one.
TILE_ROWS = 128
ATTENTION_REACHED = 0.7
# The largest step: the token budget, and as many decodes with drafts.
TOKENS_MAX = 8_192


@dataclass(frozen=True)
class Architecture(ModelShape):
    """A transformer in bf16 with what else its kernels depend on.

    `windowed_layers` see at most `window` tokens back. With `latent` the cache has one vector of
    this size for all heads (MLA), and `latent_rope` numbers of position beside it. `shared_experts`
    compute every token. `routing_exponent` is that of experts' popularity. `draft_tokens` are
    proposed for each decode by a model of `draft_layers` layers, one after another. `gpus` share
    each layer (tensor parallelism). With `separate_prefills` attention runs one kernel for decodes
    and then one for prefills; else one kernel has both, and their work overlaps. Adapters of the
    rank `adapter_rank` are on all products of a dense layer. `encoder` is that of images.
    """

    shared_experts: int = 0
    routing_exponent: float = 0.0
    window: int = 0
    windowed_layers: int = 0
    latent: int = 0
    latent_rope: int = 0
    draft_tokens: int = 0
    draft_layers: int = 1
    gpus: int = 1
    separate_prefills: bool = False
    adapter_rank: int = 16
    encoder: Encoder | None = None

    @property
    def kv_numbers(self) -> int:
        """The numbers that a token has in a layer's cache, on each GPU."""
        if self.latent:
            return self.latent + self.latent_rope
        return 2 * max(1, self.kv_heads // self.gpus) * self.head_dim

    @property
    def products(self) -> list[tuple[int, int]]:
        """The products of a dense layer: columns and depth, on each GPU."""
        heads = self.heads // self.gpus * self.head_dim
        inner = self.intermediate // self.gpus
        return [
            (heads + self.kv_numbers, self.hidden),
            (self.hidden, heads),
            (2 * inner, self.hidden),
            (self.hidden, inner),
        ]

    @property
    def heads_per_key(self) -> int:
        """How many heads share a key, and with it a tile."""
        return self.heads // (self.gpus if self.latent else self.kv_heads)


class KernelMachine:
    """Gives the times of a model's steps on a GPU, in seconds of wall time."""

    def __init__(self, gpu: Gpu, shape: Architecture, slower: float = 1.0) -> None:
        """Make a machine whose arithmetic is so many times slower, as in a GPU that is too hot."""
        self.gpu = gpu
        self.shape = shape
        self.chip = Chip.of(gpu, slower)
        sizes = np.arange(TOKENS_MAX + 1, dtype=np.float64)
        self.tokens_s = self._layers_s(_padded(sizes), shape.layers)
        self.logits_s = self._logits_s(sizes)
        self.sequences_s = np.zeros_like(sizes)
        if shape.draft_tokens:
            drafting = self._layers_s(_padded(sizes), shape.draft_layers) + self._logits_s(sizes)
            self.sequences_s = shape.draft_tokens * drafting
        self.prefill_s = PREFILL_LAYER_S * shape.layers

    def _layers_s(self, tokens: Floats, layers: int) -> Floats:
        """Return the time of what depends on the number of tokens alone; shape as `tokens`."""
        shape, chip = self.shape, self.chip
        heads = shape.heads // shape.gpus
        if shape.latent:
            per_head = shape.head_dim + shape.latent_rope
            queries = matmul_s(chip, tokens, heads * per_head, shape.hidden)
            cached = matmul_s(chip, tokens, shape.kv_numbers, shape.hidden)
            # Queries are taken into the latent space, and its results out of it.
            absorbed = 2 * matmul_s(chip, tokens, heads * shape.latent, shape.head_dim)
            before = queries + cached + absorbed
        else:
            columns = heads * shape.head_dim + shape.kv_numbers
            before = matmul_s(chip, tokens, columns, shape.hidden)
        after = matmul_s(chip, tokens, shape.hidden, heads * shape.head_dim)
        norms = streaming_s(chip, 10.0 * tokens * shape.hidden * BYTES_PER_NUMBER, kernels=4)
        between = exchange_s(tokens * shape.hidden * BYTES_PER_NUMBER, shape.gpus)
        return layers * (before + after + norms + 2 * between + self._feed_forward_s(tokens))

    def _feed_forward_s(self, tokens: Floats) -> Floats:
        shape, chip = self.shape, self.chip
        if not shape.experts:
            return self._dense_s(tokens, shape.intermediate // shape.gpus)
        routed = experts_s(
            chip,
            tokens,
            experts=shape.experts,
            per_token=shape.experts_per_token,
            hidden=shape.hidden,
            intermediate=shape.intermediate // shape.gpus,
            exponent=shape.routing_exponent,
        )
        routing = matmul_s(chip, tokens, shape.experts, shape.hidden)
        if not shape.shared_experts:
            return routing + routed
        shared = shape.shared_experts * shape.intermediate // shape.gpus
        return routing + routed + self._dense_s(tokens, shared)

    def _dense_s(self, tokens: Floats, intermediate: int) -> Floats:
        chip, hidden = self.chip, self.shape.hidden
        activation = streaming_s(chip, 3.0 * tokens * intermediate * BYTES_PER_NUMBER)
        up = matmul_s(chip, tokens, 2 * intermediate, hidden)
        return up + activation + matmul_s(chip, tokens, hidden, intermediate)

    def _logits_s(self, rows: Floats) -> Floats:
        """Return the time of the vocabulary's product and of sampling; shape as `rows`."""
        vocab = self.shape.vocab // self.shape.gpus
        # float32, read for the largest, the sum, and the draw.
        sampling = streaming_s(self.chip, 3.0 * rows * vocab * 4, kernels=3)
        return matmul_s(self.chip, rows, vocab, self.shape.hidden) + sampling

    def game(
        self, tokens: Ints, positions: Ints, is_prefill: Flags, features: Features | None = None
    ) -> "KernelGame":
        """Return a step's game; arguments have the shape (n,), n at least 1."""
        shape = self.shape
        layers = [(shape.layers - shape.windowed_layers, 0), (shape.windowed_layers, shape.window)]
        attention = [
            part.times(count)
            for count, window in layers
            if count
            for part in self._attention(tokens, positions, is_prefill, window)
        ]
        others = [] if features is None else self._features(tokens, features)
        return KernelGame(self, tokens, is_prefill, attention, others)

    def _features(self, tokens: Ints, features: Features) -> list[FeatureGame]:
        """Return the games of the kernels that only some requests need."""
        shape, chip = self.shape, self.chip
        found = grammar_games(chip, shape.vocab // shape.gpus, features.grammar_rows)
        found += adapter_games(
            chip, shape.products, shape.layers, shape.adapter_rank, tokens, features
        )
        if shape.encoder is not None:
            found += encoder_games(chip, shape.encoder, features)
        return found

    def _attention(
        self, tokens: Ints, positions: Ints, is_prefill: Flags, window: int
    ) -> list["Attention"]:
        """Return the kernels of a layer's attention, behind a window of tokens if there is one.

        A causal kernel computes each token's pairs with what is before it. A tile of a prefill's
        queries reads its context on one multiprocessor; a decode's context is read by many.
        """
        shape, chip = self.shape, self.chip
        heads, reached = shape.heads // shape.gpus, chip.flops_per_s * ATTENTION_REACHED
        seen = np.minimum(positions + tokens, window + tokens) if window else positions + tokens
        pairs = np.asarray(tokens * (seen - tokens) + tokens * (tokens + 1) / 2, dtype=np.float64)
        # A tile that is not full computes as much as a half of a full one at the least.
        rows = tokens * shape.heads_per_key
        filled = np.ceil(rows / (TILE_ROWS / 2)) * (TILE_ROWS / 2) / rows
        numbers = 2.0 * shape.head_dim + shape.latent_rope
        flops = np.asarray(2.0 * heads * numbers * pairs * filled, dtype=np.float64)
        if shape.latent:
            in_latent = 2.0 * heads * (2 * shape.latent + shape.latent_rope) * pairs * filled
            unpacked = 4.0 * heads * shape.head_dim * shape.latent * seen
            flops = np.where(is_prefill, flops + unpacked, in_latent)
        moved = seen * shape.kv_numbers + 2.0 * tokens * heads * shape.head_dim
        tile = np.asarray(2.0 * TILE_ROWS * numbers * seen * is_prefill, dtype=np.float64)
        whole = Attention(
            flops / reached,
            moved * BYTES_PER_NUMBER / chip.bytes_per_s,
            tile * chip.multiprocessors / reached,
        )
        if not shape.separate_prefills:
            return [whole]
        return [whole.of(~is_prefill), whole.of(is_prefill)]


def _padded(tokens: Floats) -> Floats:
    """Return the number of tokens that a captured graph computes for so many."""
    sizes = np.array([0, *CAPTURED_SIZES], dtype=np.float64)
    next_sizes = sizes[np.minimum(np.searchsorted(sizes, tokens), len(sizes) - 1)]
    padded: Floats = np.maximum(next_sizes, tokens)
    return padded


@dataclass(frozen=True, slots=True)
class Attention:
    """A kernel of attention: each request's arithmetic, traffic and longest tile, in seconds.

    It takes as long as the largest of the sum of arithmetic, the sum of traffic, and the longest
    tile of all.
    """

    arithmetic_s: Floats
    memory_s: Floats
    longest_s: Floats

    def times(self, count: int) -> "Attention":
        """Return the same kernel run so many times."""
        return Attention(self.arithmetic_s * count, self.memory_s * count, self.longest_s * count)

    def of(self, which: Flags) -> "Attention":
        """Return the kernel with only these requests in it."""
        return Attention(self.arithmetic_s * which, self.memory_s * which, self.longest_s * which)

    def value(self, members: Floats) -> Floats:
        """Return the seconds of coalitions, rows of 0 and 1 of the shape (m, n); shape (m,)."""
        sums = np.maximum(members @ self.arithmetic_s, members @ self.memory_s)
        longest: Floats = np.maximum(sums, (members * self.longest_s).max(axis=1))
        return longest


class KernelGame:
    """A step as a cooperative game. `tokens`, `logits` and `is_prefill` have the shape (n,)."""

    def __init__(
        self,
        machine: KernelMachine,
        tokens: Ints,
        is_prefill: Flags,
        attention: list[Attention],
        others: Sequence[FeatureGame] = (),
    ) -> None:
        self.machine = machine
        self.tokens = tokens
        self.is_prefill = is_prefill
        # A prefill needs the logits of its last token, a decode those of all its drafts.
        self.logits = np.where(is_prefill, 1, tokens)
        self.attention = attention
        self.others = others
        self.total_s = float(self.value(np.ones((1, len(tokens))))[0])

    def __len__(self) -> int:
        return len(self.tokens)

    def value(self, members: Floats) -> Floats:
        """Return the seconds of coalitions, rows of 0 and 1 of the shape (m, n); shape (m,)."""
        machine = self.machine
        found = np.where(members.any(axis=1), START_S, 0.0)
        found += machine.tokens_s[(members @ self.tokens).astype(int)]
        found += machine.logits_s[(members @ self.logits).astype(int)]
        found += machine.sequences_s[members.sum(axis=1).astype(int)]
        found += machine.prefill_s * (members @ self.is_prefill > 0)
        for kernel in self.attention:
            found += kernel.value(members)
        for game in self.others:
            found += game.value(members)
        return found

    def shapley(self, permutations: int, rng: np.random.Generator) -> Floats:
        """Return each request's true share in seconds, shape (n,); they add up to `total_s`.

        The value is additive over games. What every step takes is shared equally, as is what
        depends on the number of sequences; what any prefill adds, equally among the prefills.
        """
        machine, count = self.machine, len(self)
        shares = np.full(count, (START_S + machine.sequences_s[count]) / count)
        shares += total_shares(self.tokens, machine.tokens_s)
        shares += total_shares(self.logits, machine.logits_s)
        if self.is_prefill.any():
            shares += self.is_prefill * (machine.prefill_s / self.is_prefill.sum())
        for kernel in self.attention:
            shares += overlap_shares(
                kernel.arithmetic_s, kernel.memory_s, kernel.longest_s, permutations, rng
            )
        for game in self.others:
            shares += game.shares()
        return shares

    def marginal_s(self) -> Floats:
        """Return the seconds that each request adds, v(N) - v(N without it); shape (n,)."""
        count = len(self)
        return self.total_s - self.value(np.ones((count, count)) - np.eye(count))

    def alone_s(self) -> Floats:
        """Return the seconds of a step with each request alone; shape (n,)."""
        return self.value(np.eye(len(self)))
