"""What an engine computes in, as its configuration says it."""

from types import SimpleNamespace

import pytest

from vllm_cost_meter.vllm_hooks.identity import precision_of


@pytest.mark.parametrize(
    ("dtype", "quantization", "cache", "said"),
    [
        ("torch.float32", None, "auto", "float32"),
        ("torch.bfloat16", "fp8", "auto", "bfloat16, fp8 weights"),
        ("torch.bfloat16", "awq", "fp8_e5m2", "bfloat16, awq weights, fp8_e5m2 KV cache"),
    ],
)
def test_precision_is_data_type_and_quantization(dtype, quantization, cache, said):
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype, quantization=quantization),
        cache_config=SimpleNamespace(cache_dtype=cache),
    )
    assert precision_of(config) == said


def test_a_vllm_that_does_not_say_it_is_metered_without():
    config = SimpleNamespace(model_config=SimpleNamespace(), cache_config=SimpleNamespace())
    assert precision_of(config) == "unknown"
