"""What the cost model knows of a served model before any step: by vLLM's own configuration.

The configurations are vLLM's own objects for the config.json of a model; nothing is downloaded.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_cost_meter.attribution.cost_model import (
    EXPERTS,
    FIXED,
    PAIRS,
    READ,
    SLOPES,
    Experts,
    Layers,
    ServedModel,
)
from vllm_cost_meter.attribution.priors import KNOWN_PEAKS, Prior
from vllm_cost_meter.lab.validation.roofline import GPUS
from vllm_cost_meter.lab.validation.scenarios import DENSE as DENSE_SHAPE
from vllm_cost_meter.lab.validation.scenarios import EXPERTS as EXPERTS_SHAPE
from vllm_cost_meter.lab.validation.vllm_work import production_prior
from vllm_cost_meter.vllm_hooks.model_counts import prior_of_model, served_model

H100 = "NVIDIA H100 80GB HBM3"
BF16 = 2
PER_BYTE = 1e9 / KNOWN_PEAKS["NVIDIA H100"].bytes_per_s
PER_FLOP = 1e9 / KNOWN_PEAKS["NVIDIA H100"].flops_per_s
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gemma-3-12b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 48,
        "hidden_size": 3840,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "intermediate_size": 15360,
        "vocab_size": 262144,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    },
}


@pytest.fixture(scope="module")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return vLLM's configuration of each model."""
    from vllm.engine.arg_utils import EngineArgs

    found = {}
    for name, config in CONFIGURATIONS.items():
        folder: Path = tmp_path_factory.mktemp(name)
        usual = {"max_position_embeddings": 32768, "torch_dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps({**usual, **config}))
        found[name] = EngineArgs(
            model=str(folder), skip_tokenizer_init=True, load_format="dummy", max_model_len=8192
        ).create_engine_config()
    return found


def prior(configurations: dict[str, Any], name: str) -> Prior:
    return prior_of_model(configurations[name], H100)


def test_what_a_dense_model_reads_and_computes_is_known(configurations):
    found = prior(configurations, "llama-3.1-8b")
    reading, arithmetic, begin = found.curve.parts
    assert (found.source, found.served.experts) == ("ModelMetrics", Experts())
    weights = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336) + 128256 * 4096
    assert reading.coefficients[FIXED] == pytest.approx(PER_BYTE * BF16 * weights, rel=0.01)
    assert reading.coefficients[READ] == pytest.approx(PER_BYTE * 32 * 2 * 1024 * BF16)
    assert arithmetic.coefficients[PAIRS] == pytest.approx(PER_FLOP * 32 * 4 * 4096)
    per_token = PER_FLOP * 2 * (weights - 128256 * 4096)
    assert arithmetic.coefficients[EXPERTS - 1] == pytest.approx(per_token, rel=0.01)
    assert arithmetic.coefficients[SLOPES] == 0, "few tokens are free beside the weights"
    assert begin.coefficients[FIXED] > 0


def test_experts_are_those_of_the_configuration_and_each_is_read_once(configurations):
    found = prior(configurations, "qwen3-30b-a3b")
    assert found.served.experts == Experts(128, 8)
    reading = found.curve.parts[0].coefficients
    one = 48 * 3 * 2048 * 768 * BF16
    assert reading[EXPERTS] == pytest.approx(PER_BYTE * one)
    assert reading[FIXED] < PER_BYTE * one * 128 / 5, "the rest of the weights is without experts"


def test_windows_are_those_of_the_configuration(configurations):
    assert prior(configurations, "gemma-3-12b").served.layers == Layers(8, 40, 1024)


def test_the_simulated_servers_start_with_the_prior_of_production(configurations):
    for name, shape in (("llama-3.1-8b", DENSE_SHAPE), ("qwen3-30b-a3b", EXPERTS_SHAPE)):
        simulated = production_prior(shape, GPUS["h100"])
        real = prior(configurations, name)
        for part, other in zip(real.curve.parts[:2], simulated.curve.parts[:2], strict=True):
            known = {term: part.coefficients[term] for term in (FIXED, EXPERTS, EXPERTS - 1)}
            expected = {term: pytest.approx(other.coefficients[term], rel=0.01) for term in known}
            assert known == expected, name


def test_graphs_that_are_captured_are_known_and_none_where_vllm_captures_none():
    def captured(**compilation: Any) -> tuple[int, ...]:
        config = SimpleNamespace(
            model_config=SimpleNamespace(enforce_eager=compilation.pop("eager", False)),
            compilation_config=SimpleNamespace(**compilation),
        )
        return served_model(config).captured

    full = SimpleNamespace(name="FULL_AND_PIECEWISE")
    assert captured(cudagraph_mode=full, cudagraph_capture_sizes=[8, 1, 2]) == (1, 2, 8)
    none = SimpleNamespace(name="NONE")
    assert captured(cudagraph_mode=none, cudagraph_capture_sizes=[1, 2]) == ()
    assert captured(eager=True, cudagraph_mode=full, cudagraph_capture_sizes=[1]) == ()


def test_a_configuration_that_cannot_be_read_is_a_model_that_is_not_known(caplog):
    assert served_model(SimpleNamespace()) == ServedModel()
    found = prior_of_model(SimpleNamespace(), H100)
    assert (found.source, found.served) == ("tokens", ServedModel())
