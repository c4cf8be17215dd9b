"""Requests of one engine and their parts of steps, in Python: the twin of `csrc/requests.pxd`.

A request is open until it is closed. Its parts of steps that are still in flight live on, and
nobody pays for them.
"""

from dataclasses import dataclass

from vllm_cost_meter.attribution.features_py import ENCODER_TOKENS_MAX, StepPart
from vllm_cost_meter.attribution.planes_py import Work
from vllm_cost_meter.records.accrued import Accrued

# Weights and tokens of one step add up to at most this, so that (W - 1) * W fits 64 bits.
WEIGHT_MAX = 2**31 - 1
# Largest count of a request's tokens in one phase.
COUNT_MAX = 2**32 - 1
# Largest count of nanoseconds.
NS_MAX = 2**63 - 1


@dataclass(slots=True, eq=False)
class Request:
    """An open request: what it has accrued, and its position in its context."""

    request_id: str
    prefill_end: int
    has_lora: bool = False
    is_guided: bool = False
    position: int = 0
    recompute_end: int = 0  # the farthest position reached before a preemption
    prefill_ns: int = 0
    decode_ns: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    marginal_ns: float = 0.0
    recomputed_ns: int = 0
    recomputed_tokens: int = 0
    rejected_ns: int = 0
    rejected_tokens: int = 0
    cut_ns: int = 0
    cut_tokens: int = 0
    kv_block_ns: int = 0
    step_ns: int = 0
    steps: int = 0
    batch: int = 0
    blocks: int = 0  # of the KV cache that it holds, counted until blocks_since_ns
    blocks_since_ns: int = 0
    # Tokens of its last ended step with several tokens that are neither rejected nor cut off yet.
    kept_tokens: int = 0
    kept_ns: int = 0
    in_flight: int = 0
    left: bool = False
    is_open: bool = True

    def enter(self, tokens: int) -> "Part":
        """Take part in a step with so many tokens."""
        is_prefill = self.position < self.prefill_end
        self.position = min(self.position + tokens, WEIGHT_MAX)
        self.in_flight += 1
        # A chunk that does not end the prefill samples nothing.
        samples = not is_prefill or self.position >= self.prefill_end
        return Part(self, Work.of(tokens, self.position), is_prefill, self.is_guided and samples)

    def hold_blocks(self, block_size: int, now_ns: int) -> None:
        """Hold as many blocks as the context fills, but never fewer than before."""
        blocks = -(-self.position // block_size)
        if blocks > self.blocks:
            self.count_blocks(now_ns)
            self.blocks = blocks

    def release_blocks(self, now_ns: int) -> None:
        """Hold no blocks any more."""
        self.count_blocks(now_ns)
        self.blocks = 0

    def count_blocks(self, now_ns: int) -> None:
        """Add the time that the blocks were held since the last count."""
        passed_ns = max(now_ns - self.blocks_since_ns, 0)
        self.kv_block_ns = min(self.kv_block_ns + self.blocks * passed_ns, NS_MAX)
        self.blocks_since_ns = now_ns

    def trim(self, tokens: int) -> None:
        """Count the last `tokens` of its last ended step as cut off."""
        tokens = min(tokens, self.kept_tokens)
        cut_ns = _part_of(self.kept_ns, tokens, self.kept_tokens)
        self.cut_tokens += tokens
        self.cut_ns += cut_ns
        self.kept_tokens -= tokens
        self.kept_ns -= cut_ns

    def accrued(self, now_ns: int) -> Accrued:
        """Return what was accrued since the last reset."""
        self.count_blocks(now_ns)
        return Accrued(*(int(getattr(self, name)) for name in Accrued._fields))

    def reset(self) -> None:
        """Set what was accrued to zero."""
        for name in Accrued._fields:
            setattr(self, name, 0)


@dataclass(slots=True)
class Part:
    """One request's part of one step."""

    request: Request
    work: Work
    is_prefill: bool
    is_guided: bool = False  # in this step
    encoder_tokens: int = 0
    rejected: int = 0  # tokens
    is_cut: bool = False  # the request was aborted meanwhile
    kept_ns: int = 0  # the part of its last share that was neither rejected nor cut off

    @property
    def in_step(self) -> StepPart:
        """Return what its step's game sees of it."""
        return StepPart(
            self.work.tokens,
            self.work.context,
            self.is_prefill,
            self.request.has_lora,
            self.is_guided,
            self.encoder_tokens,
        )

    def encode(self, tokens: int) -> None:
        """Note that an encoder computes so many tokens for it in this step."""
        self.encoder_tokens = min(tokens, ENCODER_TOKENS_MAX)

    @property
    def recomputed(self) -> int:
        """Return how many of the tokens had been computed before a preemption."""
        if not self.is_prefill:
            return 0
        start = self.work.context - self.work.tokens
        return max(0, min(self.work.context, self.request.recompute_end) - start)

    @property
    def kept(self) -> int:
        """Return how many of the tokens were not rejected."""
        return self.work.tokens - self.rejected

    @property
    def cut(self) -> int:
        """Return how many of the kept tokens are cut off because the request was aborted.

        These would have become its output: all tokens of a decode, and those behind the end of a
        prefill.
        """
        if not self.is_cut or not self.is_prefill:
            return self.kept if self.is_cut else 0
        end = self.work.context - self.rejected
        return max(0, min(self.kept, end - self.request.prefill_end))

    def reject(self, tokens: int) -> None:
        """Note how many of the tokens were rejected drafts."""
        self.rejected = min(tokens, max(self.work.tokens - 1, 0))
        self.request.position -= min(self.rejected, self.request.position)

    def pay(self, share_ns: int, marginal_ns: float, step_ns: int, charges_recomputed: bool) -> int:
        """Take a share of the step's time. Return the ns of it that nobody is charged."""
        request = self.request
        request.step_ns = min(request.step_ns + step_ns, NS_MAX)
        request.marginal_ns += marginal_ns
        recomputed_ns = _part_of(share_ns, self.recomputed, self.work.tokens)
        uncharged_ns = 0 if charges_recomputed else recomputed_ns
        if self.is_prefill:
            request.prefill_ns += share_ns - uncharged_ns
        else:
            request.decode_ns += share_ns
        request.recomputed_ns += recomputed_ns
        rejected_ns = _part_of(share_ns, self.rejected, self.work.tokens)
        request.rejected_ns += rejected_ns
        self.kept_ns = share_ns - rejected_ns
        cut_ns = _part_of(self.kept_ns, self.cut, self.kept)
        request.cut_ns += cut_ns
        self.kept_ns -= cut_ns
        return uncharged_ns

    def end(self, batch: int) -> None:
        """Count the step and its tokens."""
        request = self.request
        request.steps += 1
        request.batch += batch
        if self.is_prefill:
            request.prefill_tokens = min(request.prefill_tokens + self.work.tokens, COUNT_MAX)
        else:
            request.decode_tokens = min(request.decode_tokens + self.work.tokens, COUNT_MAX)
        request.recomputed_tokens += self.recomputed
        request.rejected_tokens += self.rejected
        request.cut_tokens += self.cut
        if self.work.tokens > 1:
            request.kept_tokens = self.kept - self.cut
            request.kept_ns = self.kept_ns


@dataclass(slots=True)
class Step:
    """A step in flight."""

    parts: list[Part]
    shared_ns: int = 0


def _part_of(share_ns: int, tokens: int, all_tokens: int) -> int:
    if tokens == 0:
        return 0
    return share_ns if tokens == all_tokens else int(float(share_ns) * tokens / all_tokens)
