"""A roofline model of a step's time, and the step as a cooperative game between its requests.

    time = launch + max(FLOPs / (peak x 0.6), bytes / (bandwidth x 0.85))

The roofline model is from Williams, Waterman and Patterson, "Roofline: an insightful visual
performance model", CACM 52(4), 2009. FLOPs and bytes are linear in the batch's sums (`SUMS`).
The exception is a mixture of experts: a step reads only the experts that its tokens chose. Units
are seconds, FLOPs and bytes, as float64; `n` is the size of a batch.

Invariant: a coalition's value depends only on sums over its members, so running sums give the
values of many coalitions at once.
"""

from dataclasses import dataclass

import numpy as np

from vllm_cost_meter.attribution.cost_model import Experts, ServedModel
from vllm_cost_meter.attribution.priors import (
    KNOWN_PEAKS,
    ExpertCounts,
    Peaks,
    Prior,
    prior_of_counts,
)
from vllm_cost_meter.lab.validation.games import Features, Flags, Floats, Ints
from vllm_cost_meter.lab.validation.truth import StepGame

# A batch's work is linear in these sums: computed tokens, requests, tokens x context, and context.
# A request's context is counted at the end of the step, as in vLLM's ModelMetrics.
SUMS = ("tokens", "sequences", "token_context", "context")

# Dense matrix products and streaming reads reach these shares of the published peaks in practice.
COMPUTE_EFFICIENCY = 0.6
MEMORY_EFFICIENCY = 0.85
# Launches, input preparation and sampling take this time in every step, whatever its batch.
LAUNCH_S = 300e-6


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker publishes it: peaks, memory size in bytes, number of multiprocessors."""

    name: str
    peaks: Peaks
    memory_bytes: float
    multiprocessors: int
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "h100",
            KNOWN_PEAKS["NVIDIA H100"],
            80e9,
            132,
            "NVIDIA H100 Tensor Core GPU datasheet, SXM: bfloat16 1,979 TFLOPS with sparsity,"
            " which is twice the dense rate; 80 GB, 3.35 TB/s",
        ),
        Gpu(
            "a100",
            KNOWN_PEAKS["NVIDIA A100-SXM4-80GB"],
            80e9,
            108,
            "NVIDIA A100 Tensor Core GPU datasheet, 80GB SXM: bfloat16 312 TFLOPS; 2,039 GB/s",
        ),
        Gpu(
            "l4",
            KNOWN_PEAKS["NVIDIA L4"],
            24e9,
            58,
            "NVIDIA L4 Tensor Core GPU datasheet: bfloat16 242 TFLOPS with sparsity, which is"
            " twice the dense rate; 24 GB, 300 GB/s",
        ),
    )
}


@dataclass(frozen=True)
class ModelShape:
    """The shape of a transformer in bf16, from its config.json. Without experts it is dense.

    vLLM's ModelMetrics counts min(T x top, experts) distinct experts for T tokens, as if no two
    tokens chose the same expert. With `expected_experts` the count is the expected number if each
    token chooses at random.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    expected_experts: bool = False


def _qwen3(name: str, *, expected_experts: bool) -> ModelShape:
    return ModelShape(
        name, 48, 2048, 32, 4, 128, 768, 151_936, 128, 8, expected_experts=expected_experts
    )


MODELS = {
    model.name: model
    for model in (
        # meta-llama/Llama-3.1-8B
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14_336, 128_256),
        # Qwen/Qwen3-30B-A3B
        _qwen3("qwen3-30b-a3b", expected_experts=False),
        _qwen3("qwen3-30b-a3b-random", expected_experts=True),
    )
}


@dataclass(frozen=True)
class StepWork:
    """FLOPs and bytes for a step of one model: a fixed part, and a part per unit of `SUMS`.

    `expert_bytes` are one expert's weights in all layers. A step reads them if any of its tokens
    chose that expert; they are 0 in a dense model. `kv_bytes` is one token's size in the KV cache.
    """

    flops_fixed: float
    flops: tuple[float, float, float, float]
    bytes_fixed: float
    bytes_moved: tuple[float, float, float, float]
    expert_bytes: float
    experts: int
    experts_per_token: int
    expected_experts: bool
    kv_bytes: float

    @property
    def weight_bytes(self) -> float:
        """The bytes of all weights."""
        return self.bytes_fixed + self.expert_bytes * self.experts

    def distinct_experts(self, tokens: Floats) -> Floats:
        """Return the number of distinct experts per layer that so many tokens choose.

        If tokens choose at random, each token leaves out each of the E experts with the probability
        1 - k/E, so the expected number is E x (1 - (1 - k/E)^T). Shape as `tokens`.
        """
        if not self.experts:
            return np.zeros_like(tokens)
        if self.expected_experts:
            left_out = 1 - self.experts_per_token / self.experts
            return np.asarray(self.experts * (1 - left_out**tokens), dtype=np.float64)
        return np.minimum(tokens * self.experts_per_token, self.experts)

    def totals(self, tokens: Ints, positions: Ints) -> tuple[float, float]:
        """Return a batch's FLOPs and bytes; both arguments have the shape (n,)."""
        sums = sums_of(tokens, positions).sum(axis=0)
        flops = self.flops_fixed + float(sums @ self.flops)
        experts = float(self.distinct_experts(sums[0]))
        moved = self.bytes_fixed + float(sums @ self.bytes_moved) + experts * self.expert_bytes
        return flops, moved


def sums_of(tokens: Ints, positions: Ints) -> Floats:
    """Return each request's part in the sums of SUMS; shape (n, 4)."""
    result = np.empty((len(tokens), len(SUMS)))
    context = positions + tokens
    result[:, 0] = tokens
    result[:, 1] = 1
    result[:, 2] = tokens * context
    result[:, 3] = context
    return result


class Machine:
    """A GPU that runs a model: it gives the times of steps in seconds."""

    def __init__(self, gpu: Gpu, work: StepWork, launch_s: float = LAUNCH_S) -> None:
        self.gpu = gpu
        self.work = work
        self.launch_s = launch_s
        flops_per_s = gpu.peaks.flops_per_s * COMPUTE_EFFICIENCY
        bytes_per_s = gpu.peaks.bytes_per_s * MEMORY_EFFICIENCY
        self.compute_fixed_s = work.flops_fixed / flops_per_s
        self.memory_fixed_s = work.bytes_fixed / bytes_per_s
        self.expert_s = work.expert_bytes / bytes_per_s
        self._compute_s = np.array(work.flops) / flops_per_s
        self._memory_s = np.array(work.bytes_moved) / bytes_per_s

    def prior(self) -> Prior:
        """Return the prior that the meter would have: vLLM's counts and the published peaks.

        It lacks what the meter cannot know: launches, and the share of its peaks that the machine
        reaches, and does not know of captured graphs.
        """
        work = self.work
        tokens, sequences, products, _ = work.flops
        compute = (work.flops_fixed, tokens, sequences, products, 0.0)
        tokens, sequences, _, context = work.bytes_moved
        memory = (work.weight_bytes, tokens, sequences, 0.0, context)
        return prior_of_counts(
            compute,
            memory,
            self.gpu.peaks,
            ServedModel(Experts(work.experts, work.experts_per_token)),
            # Each parameter of an expert is two bytes, and two FLOPs for each token.
            ExpertCounts(work.expert_bytes, work.expert_bytes * work.experts_per_token),
        )

    def experts_s(self, tokens: Floats) -> Floats:
        """Return the seconds to read the experts that so many tokens choose; shape as `tokens`."""
        return self.expert_s * self.work.distinct_experts(tokens)

    def game(
        self,
        tokens: Ints,
        positions: Ints,
        is_prefill: Flags | None = None,
        features: Features | None = None,
    ) -> StepGame:
        """Return a step's game; arguments have the shape (n,), n at least 1.

        Whether a token is of a prefill makes no difference here, and nothing has features.
        """
        if features is not None:
            raise ValueError(f"a roofline knows no features, got {features!r}")
        parts = sums_of(tokens, positions)
        return StepGame(self, parts @ self._compute_s, parts @ self._memory_s, parts[:, 0])
