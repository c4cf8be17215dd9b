"""Coefficients for a step's FLOPs and bytes, from vLLM's own ModelMetrics.

vLLM's component classes (`vllm/v1/metrics/perf.py`) count a batch in Python, operation by
operation. That is too slow for a million batches. Their counts are linear in a batch's sums, so a
few artificial batches give the coefficients, and two more check them.

Invariant: a vLLM that counts in another way raises VllmMismatchError, and never gives a wrong
figure.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from vllm.v1.metrics.perf import (
    AttentionMetrics,
    ComponentMetrics,
    FfnMetrics,
    MLAAttentionMetrics,
    UnembedMetrics,
)

from vllm_cost_meter.attribution.cost_model import Experts, Layers, ServedModel
from vllm_cost_meter.attribution.priors import Prior
from vllm_cost_meter.errors import VllmMismatchError
from vllm_cost_meter.lab.validation.kernel_machine import CAPTURED_SIZES, Architecture
from vllm_cost_meter.lab.validation.roofline import Gpu, ModelShape, StepWork
from vllm_cost_meter.vllm_hooks.model_counts import (
    Batch,
    bytes_of_expert,
    context_of,
    counted_prior,
    linear,
)

BF16_BYTES = 2


class VllmCounts:
    """vLLM's own counts for a model on one GPU."""

    def __init__(self, shape: ModelShape) -> None:
        common = {
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden,
            "vocab_size": shape.vocab,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "weight_byte_size": BF16_BYTES,
            "activation_byte_size": BF16_BYTES,
            "cache_byte_size": BF16_BYTES,
            "tp_size": 1,
            "pp_size": 1,
            "dp_size": 1,
            "ffn_tp_size": 1,
            "ffn_ep_size": 1,
            "intermediate_size": shape.intermediate,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.intermediate if shape.experts else 0,
            "num_shared_experts": 0,
            "num_moe_layers": shape.layers if shape.experts else 0,
        }
        attention: ComponentMetrics = AttentionMetrics(**common)
        if isinstance(shape, Architecture):
            common["num_shared_experts"] = shape.shared_experts
        if isinstance(shape, Architecture) and shape.latent:
            attention = MLAAttentionMetrics(
                **common,
                kv_lora_rank=shape.latent,
                qk_nope_head_dim=shape.head_dim,
                qk_rope_head_dim=shape.latent_rope,
                v_head_dim=shape.head_dim,
            )
        self._components = [attention, FfnMetrics(**common), UnembedMetrics(**common)]

    def flops(self, batch: Batch) -> int:
        """Return a batch's FLOPs."""
        return self.totals(batch)[0]

    def bytes_moved(self, batch: Batch) -> int:
        """Return the bytes that a batch reads and writes."""
        return self.totals(batch)[1]

    def totals(self, batch: Batch) -> tuple[int, int]:
        """Return a batch's FLOPs, and its bytes read and written."""
        context = context_of(batch)
        flops = sum(part.get_num_flops(context) for part in self._components)
        read = sum(part.get_read_bytes(context) for part in self._components)
        written = sum(part.get_write_bytes(context) for part in self._components)
        return flops, read + written


def production_prior(shape: Architecture, gpu: Gpu) -> Prior:
    """Return the prior that the meter has in production: vLLM's counts, and published peaks.

    It is that of one GPU of those that share the model, as vLLM counts it.
    """
    on_one = replace(
        shape,
        heads=shape.heads // shape.gpus,
        kv_heads=max(1, shape.kv_heads // shape.gpus),
        intermediate=shape.intermediate // shape.gpus,
        vocab=shape.vocab // shape.gpus,
    )
    counts = VllmCounts(on_one)
    return counted_prior(
        counts.flops,
        counts.bytes_moved,
        served_model(shape),
        shape.layers,
        gpu.peaks,
        BF16_BYTES,
    )


def served_model(shape: Architecture) -> ServedModel:
    """Return what the meter reads of a model's configuration, and of vLLM's captured graphs."""
    return ServedModel(
        Experts(shape.experts, shape.experts_per_token),
        Layers(shape.layers - shape.windowed_layers, shape.windowed_layers, shape.window),
        CAPTURED_SIZES,
    )


def step_work(
    shape: ModelShape, counts_of: Callable[[ModelShape], VllmCounts] = VllmCounts
) -> StepWork:
    """Return a model's coefficients. Raises VllmMismatchError if they do not give vLLM's counts.

    `expected_experts` changes the number of experts that are read, not the bytes of one expert.
    """
    counts = counts_of(shape)
    flops_fixed, *flops, _ = linear(counts.flops)
    per_bytes = linear(counts.bytes_moved)
    bytes_fixed, *bytes_moved, _ = per_bytes
    expert_bytes = 0.0
    if shape.experts:
        experts = Experts(shape.experts, shape.experts_per_token)
        expert_bytes = bytes_of_expert(counts.bytes_moved, per_bytes, experts)
        bytes_fixed -= expert_bytes * shape.experts
    work = StepWork(
        flops_fixed=flops_fixed,
        flops=(flops[0], flops[1], flops[2], flops[3]),
        bytes_fixed=bytes_fixed,
        bytes_moved=(bytes_moved[0], bytes_moved[1], bytes_moved[2], bytes_moved[3]),
        expert_bytes=expert_bytes,
        experts=shape.experts,
        experts_per_token=shape.experts_per_token,
        expected_experts=shape.expected_experts,
        kv_bytes=2.0 * shape.layers * shape.kv_heads * shape.head_dim * BF16_BYTES,
    )
    _check(work, counts, shape)
    return work


def _check(work: StepWork, counts: VllmCounts, shape: ModelShape) -> None:
    mixed = [(2_000, 3_000), (47, 47), (1, 900), (1, 5_000)]
    decodes = [(1, 100), (1, 7_000)]
    for batch in (mixed, decodes):
        if shape.expected_experts and batch is decodes:
            continue
        tokens = np.array([tokens for tokens, _ in batch])
        positions = np.array([context for _, context in batch]) - tokens
        expected = counts.totals(batch)
        if not np.allclose(work.totals(tokens, positions), expected, rtol=1e-9):
            raise VllmMismatchError(
                f"expected FLOPs and bytes of {shape.name} to be linear in a batch's sums, found"
                f" {expected} in vllm.v1.metrics.perf and {work.totals(tokens, positions)} from"
                f" coefficients for the batch {batch}"
            )
