"""What a real engine's steps teach, where it goes, and what drafts that are always wrong cost.

One server guesses tokens by n-grams, which a random model's output never fulfils, logs its steps,
and is started twice on one ledger: the second time it begins with what the first had learnt.
"""

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.integration.server import Server
from tests.integration.traffic import PROMPT, ask
from tests.support.waiting import wait_for
from vllm_cost_meter.attribution import METHODS
from vllm_cost_meter.engine.step_log import read_steps
from vllm_cost_meter.lab.server import meter_arguments

DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}
# vLLM 0.30.0's CPU build looks for a Triton kernel when it checks a draft, and its engine dies,
# metered or not. All else that is tested here is tested there without drafts.
VLLM = metadata.version("vllm")
DRAFTS_WORK = VLLM != "0.30.0+cpu"
# So many requests with drafts end in as many ways.
SEEDS = 48
ARGUMENTS = [
    *meter_arguments(),
    *(["--speculative-config", json.dumps(DRAFTS)] if DRAFTS_WORK else []),
]


@pytest.fixture(scope="module")
def drafting(work: Path) -> Iterator[Server]:
    log = work / "steps.jsonl"
    server = Server(
        work / "drafting", arguments=ARGUMENTS, environment={"COST_METER_STEP_LOG": str(log)}
    )
    try:
        yield server.start()
    finally:
        server.stop()


def model_of(server: Server) -> Any:
    return server.cost("models")["models"][0]


@pytest.mark.skipif(
    not DRAFTS_WORK,
    reason=f"vLLM {VLLM} cannot serve drafts: 'Cannot inspect kernel parameters' in its worker",
)
def test_rejected_drafts_stand_apart_and_the_rest_is_what_came_out(drafting: Server) -> None:
    with drafting.client() as client, ThreadPoolExecutor(8) as pool:

        def one(seed: int) -> Any:
            return ask(client, "/v1/completions", **drafted(seed)).response_id

        replies = list(pool.map(one, range(SEEDS)))
    drafting.balanced()  # all have their bills, those that ended at a stop string too
    parts = [drafting.bill_of(reply)["parts"][0] for reply in replies]
    for part in parts:
        computed = part["prefill_tokens"] + part["decode_tokens"]
        nobody_got = part["recomputed_tokens"] + part["rejected_tokens"] + part["cut_tokens"]
        kept = part["prompt_tokens"] - part["cached_tokens"] + part["output_tokens"] - 1
        assert computed - nobody_got == kept, part
        assert part["rejected_ns"] + part["cut_ns"] < part["gpu_time_ns"]
        assert (part["rejected_ns"] > 0) == (part["rejected_tokens"] > 0)
        assert (part["cut_ns"] > 0) == (part["cut_tokens"] > 0)
    wrong, right = parts[0::4], parts[1::4]
    assert all(part["rejected_tokens"] for part in wrong)
    # Each step brings several tokens, and most of these requests end before the last of them.
    assert any(part["cut_tokens"] for part in right)


def drafted(seed: int) -> dict[str, Any]:
    """Return a request: its drafts are, by turns, mostly wrong, all right, or what they are.

    Of few words there is always an n-gram to guess by, of one word it is always right. It ends by
    its length, at a stop string, or at a stop token if one comes.
    """
    random = Random(seed)
    options = {"prompt": PROMPT * random.randint(1, 8), "temperature": 1, "seed": seed}
    if seed % 4 == 0:
        some = list(range(300, 308))
        return {**options, "max_tokens": random.randint(150, 200), "allowed_token_ids": some}
    options["max_tokens"] = random.randint(1, 50)
    if seed % 4 == 1:
        return {**options, "allowed_token_ids": [300]}
    if seed % 4 == 2:
        word = [300]  # " re"
        return {**options, "max_tokens": 4000, "allowed_token_ids": word, "stop": [" re" * 9]}
    options["temperature"] = random.choice([0, 1])
    return {**options, "stop_token_ids": sorted(random.sample(range(900), 100))}


def test_the_engine_learns_from_its_steps_and_bills_name_the_model(drafting: Server) -> None:
    with drafting.client() as client, ThreadPoolExecutor(8) as pool:

        def one(index: int) -> str:
            # If all drafts were right, a step of eight requests would bring 40 tokens.
            options = {"max_tokens": 160, "ignore_eos": True}
            prompt = f"{index} {PROMPT * (index % 9 + 1)}"
            return ask(client, "/v1/completions", prompt=prompt, **options).response_id

        last = list(pool.map(one, range(160)))[-1]
    drafting.balanced()
    model = model_of(drafting)
    assert model["prior"] == "ModelMetrics"
    assert model["method"] == "shapley"
    assert model["version"] > 0
    assert model["steps"] >= 512
    assert 0 < model["error"] < 0.5
    versions = drafting.cost(f"models?run={model['run_id']}")["models"]
    assert [row["version"] for row in versions] == list(range(model["version"] + 1))
    part = drafting.bill_of(last)["parts"][0]
    assert 0 <= part["first_model"] <= part["last_model"] <= model["version"]
    assert 0 < part["marginal_ns"] <= part["gpu_time_ns"] + part["steps"]
    assert part["batch"] >= part["steps"]


def test_guided_requests_have_their_bills_and_the_engine_knows_which_they_are(
    drafting: Server,
) -> None:
    log = drafting.folder.parent / "steps.jsonl"
    with drafting.client() as client, ThreadPoolExecutor(8) as pool:

        def one(index: int) -> str:
            grammar = {"structured_outputs": {"regex": "[ab]{12}"}} if index % 2 else {}
            options = {"prompt": f"{index} {PROMPT}", "max_tokens": 12, **grammar}
            return ask(client, "/v1/completions", **options).response_id

        replies = list(pool.map(one, range(16)))
    drafting.balanced()
    assert all(drafting.bill_of(reply)["gpu_time_ns"] > 0 for reply in replies)
    curve = model_of(drafting)["curve"]
    assert curve["form"] == "curve with features"
    assert curve["terms"]["lora_ns"] == curve["terms"]["encoder_ns"] == 0, "nobody had any"
    parts = {part.request_id: part for step in read_steps(log) for part in step.parts}
    guided = {
        index
        for index, reply in enumerate(replies)
        for name, part in parts.items()
        if reply in name and part.is_guided
    }
    assert guided == set(range(1, 16, 2))
    assert not any(part.has_lora or part.encoder_tokens for part in parts.values())


def test_the_step_log_replays_through_every_method(drafting: Server) -> None:
    drafting.balanced()  # a snapshot, which brings what is written so far to the disk
    log = drafting.folder.parent / "steps.jsonl"
    command = ["vllm-cost-meter", "validate", "--step-log", str(log), "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    answer = json.loads(output.splitlines()[-1])
    assert answer["step_log"]["steps"] > 500
    assert set(answer["methods"]) == set(METHODS)
    assert {method["charged_ns"] for method in answer["methods"].values()} == {
        answer["step_log"]["gpu_time_ns"]
    }
    assert PROMPT.split()[0] not in log.read_text()


def test_a_new_engine_begins_with_what_one_like_it_had_learnt(drafting: Server) -> None:
    before = model_of(drafting)
    drafting.stop()
    again = Server(
        drafting.folder, arguments=ARGUMENTS, port=drafting.port, side_port=drafting.side_port
    ).start()
    try:
        # The engine is sent what is known after its first answer, and says so with the next.
        after = wait_for(lambda: model_of(again), lambda model: model["prior"] == "ledger")
        assert after["run_id"] != before["run_id"]
        assert after["planes"] == before["planes"]
        assert after["form"] == before["form"]
    finally:
        again.stop()
