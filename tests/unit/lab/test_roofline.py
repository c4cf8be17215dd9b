"""Step times come from vLLM's own counts, exactly, and from published peaks."""

import numpy as np
import pytest

from vllm_cost_meter.errors import VllmMismatchError
from vllm_cost_meter.lab.validation import vllm_work
from vllm_cost_meter.lab.validation.roofline import GPUS, LAUNCH_S, MODELS, Machine

AS_VLLM_COUNTS = [name for name, shape in MODELS.items() if not shape.expected_experts]


def random_batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    count = int(rng.integers(1, 200))
    return rng.choice([1, 1, 1, 1, 7, 300], size=count), rng.integers(0, 9_000, size=count)


def vllm_totals(counts, tokens, positions) -> tuple[int, int]:
    return counts.totals([(int(t), int(t + p)) for t, p in zip(tokens, positions, strict=True)])


@pytest.mark.parametrize("name", AS_VLLM_COUNTS)
def test_coefficients_are_vllms_model_metrics_to_the_last_flop_and_byte(name):
    rng = np.random.default_rng(1)
    work, counts = vllm_work.step_work(MODELS[name]), vllm_work.VllmCounts(MODELS[name])
    for _ in range(100):
        batch = random_batch(rng)
        assert work.totals(*batch) == vllm_totals(counts, *batch)


def test_random_experts_are_the_expected_number_of_distinct_ones():
    shape = MODELS["qwen3-30b-a3b-random"]
    work = vllm_work.step_work(shape)
    rng = np.random.default_rng(1)
    for tokens in (1, 5, 40):
        chosen = [
            len({e for _ in range(tokens) for e in rng.choice(128, 8, replace=False)})
            for _ in range(200)
        ]
        expected = float(work.distinct_experts(np.array(float(tokens))))
        assert expected == pytest.approx(np.mean(chosen), rel=0.02)
    many = np.array([3_000]), np.array([0])
    assert work.totals(*many) == pytest.approx(
        vllm_totals(vllm_work.VllmCounts(shape), *many), rel=1e-12
    )


def test_a_decode_is_bound_by_memory_and_a_long_chunk_by_arithmetic():
    machine = Machine(GPUS["h100"], vllm_work.step_work(MODELS["llama-3.1-8b"]))
    decode = machine.game(np.array([1]), np.array([1_000]))
    weights_s = 15.0e9 / (3.35e12 * 0.85)
    assert decode.total_s == pytest.approx(LAUNCH_S + weights_s, rel=0.02)
    chunk = machine.game(np.array([2_048]), np.array([0]))
    # Per token the layers' weights twice; and each token with the whole context, 32 x 32 x 128 x 4.
    arithmetic_s = 2_048 * (13.96e9 + 2_048 * 524_288) / (989e12 * 0.6)
    assert chunk.total_s == pytest.approx(LAUNCH_S + arithmetic_s, rel=0.001)


class Bent(vllm_work.VllmCounts):
    """Counts of a vLLM whose attention costs the square of the tokens."""

    def totals(self, batch):
        flops, moved = super().totals(batch)
        return flops + sum(tokens**2 for tokens, _ in batch), moved


def test_a_vllm_that_counts_otherwise_is_refused():
    with pytest.raises(VllmMismatchError, match=r"FLOPs and bytes of llama-3.1-8b to be linear"):
        vllm_work.step_work(MODELS["llama-3.1-8b"], Bent)
