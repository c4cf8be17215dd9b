"""Data-parallel engines that share the experts of a model: one steps, all must step.

An engine without requests then runs dummy batches while another one works. That is vLLM's own
doing; only two collective operations, which the CPU build lacks, come from the tests' plugin.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.server import SEVERAL_ENGINES, Server
from tests.integration.traffic import ask
from vllm_cost_meter.lab.server import meter_arguments
from vllm_cost_meter.lab.tiny_model import default_path


@pytest.fixture(scope="module")
def experts(work: Path) -> Iterator[Server]:
    server = Server(
        work / "experts",
        arguments=[
            *(*meter_arguments(), "--max-model-len", "1024"),
            *("--data-parallel-size", "2", "--api-server-count", "1"),
        ],
        environment={"CMT_EXPERTS": "1", **SEVERAL_ENGINES},
        model_path=make_experts(work / "tiny-experts"),
    )
    try:
        yield server.start()
    finally:
        server.stop()


def make_experts(path: Path) -> Path:
    """Write a tiny random model with 4 experts, which has the tokenizer of the tiny model."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(default_path())
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    transformers.MixtralForCausalLM(config).to(torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_dummy_batches_are_a_class_of_their_own_and_no_requests_cost(experts: Server) -> None:
    with experts.client() as client:
        for _ in range(4):  # by turns to one engine and the other
            ask(client, "/v1/completions", max_tokens=40, ignore_eos=True)
    audit = experts.balanced()
    runs = {run["engine_index"]: run for run in audit["runs"]}
    assert set(runs) == {0, 1}
    assert sum(run["last_seq"] for run in audit["runs"]) == 4
    for mine, other in ((runs[0], runs[1]), (runs[1], runs[0])):
        if mine["requests_ns"]:
            # While one works, the other one runs a dummy batch for each of its steps.
            assert other["dummy_ns"] > mine["requests_ns"] / 2
    billed_ns = sum(run["requests_ns"] for run in audit["runs"])
    rows = {row["tenant"]: row for row in experts.cost("tenants")["tenants"]}
    assert rows["alpha"]["gpu_time_ns"] == billed_ns
    # vLLM goes on with dummy batches for a while after the last request.
    assert rows["__dummy__"]["gpu_time_ns"] >= sum(run["dummy_ns"] for run in audit["runs"]) > 0
