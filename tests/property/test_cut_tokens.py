"""Every token that was computed is in the output, was rejected or was cut off.

vLLM's own schedulers run, metered as in an engine; only the model is made up. It accepts as much
of each draft as chance wants and samples what chance wants, so requests end by their length, by a
stop token and at the end of the context, in the middle of what a step brought, and are preempted
and aborted while steps are in flight. What it computed is counted here apart from the meter.
"""

from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.examples import examples
from vllm_cost_meter.lab.tiny_model import default_path
from vllm_cost_meter.records.bill import BILL_KEY, CARRIER_ID, Bill, read_bill
from vllm_cost_meter.vllm_hooks.scheduler import meter_scheduler_class

DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2}
BLOCK_SIZE = 16
CONTEXT_TOKENS = 96
TOKENS = range(12)  # that the model knows
STOP = [3]


class Computed(NamedTuple):
    """What one step did for one request."""

    start: int  # the position in its context
    tokens: int
    drafts: int
    sampled: int

    @property
    def rejected(self) -> int:
        return self.drafts + 1 - self.sampled if self.drafts and self.sampled else 0

    def behind(self, prompt_tokens: int) -> int:
        """Return how many tokens of the output were computed, the rejected ones left out."""
        end = self.start + self.tokens - self.rejected
        return max(0, end - max(self.start, prompt_tokens))


@dataclass
class Life:
    """What came of one request, counted by who computed it."""

    prompt_tokens: int
    taken_up: list[Computed] = field(default_factory=list)
    in_flight_at_abort: int | None = None
    output_tokens: int = 0
    last_output_tokens: int = 0
    bill: Bill | None = None


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    arguments = EngineArgs(
        model=str(default_path()),
        dtype="float32",
        max_model_len=CONTEXT_TOKENS,
        max_num_seqs=5,
        max_num_batched_tokens=40,
        block_size=BLOCK_SIZE,
        speculative_config=DRAFTS,
        enforce_eager=True,
    )
    init_none_hash(sha256)
    return arguments.create_engine_config()


class World:
    """An engine without a model."""

    def __init__(self, config: VllmConfig, base: type, caching: bool, random: Random) -> None:
        self.random = random
        blocks = random.randint(8, 16)  # few enough that some are preempted
        config.cache_config.enable_prefix_caching = caching
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        self.scheduler: Any = meter_scheduler_class(base)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
        )
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256) if caching else None
        self.overlaps = base is AsyncScheduler
        self.in_flight: deque[tuple[Any, dict[str, Computed]]] = deque()
        self.lives: dict[str, Life] = {}

    def a_request_comes(self) -> None:
        name = f"r{len(self.lives)}"
        prompt_tokens = self.random.randint(1, 60)
        sampling = SamplingParams(
            max_tokens=self.random.randint(1, 30),
            stop_token_ids=self.random.choice([[], STOP]),
            ignore_eos=True,
        )
        request = Request(
            request_id=name,
            # Much of it is the same for all, so that it may be found in the cache.
            prompt_token_ids=[1] * (prompt_tokens - 1) + [self.random.choice(TOKENS)],
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.lives[name] = Life(prompt_tokens)
        self.scheduler.add_request(request)

    def a_step_is_scheduled(self) -> None:
        output = self.scheduler.schedule()
        drafts = output.scheduled_spec_decode_tokens
        step = {}
        for name, tokens in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            count = len(drafts.get(name, ()))
            step[name] = Computed(
                request.num_computed_tokens - tokens,
                tokens,
                count,
                0 if request.is_prefill_chunk else 1 + self.random.randint(0, count),
            )
        self.in_flight.append((output, step))

    def a_result_comes(self) -> None:
        output, step = self.in_flight.popleft()
        for name, computed in step.items():
            if self.lives[name].bill is None:
                self.lives[name].taken_up.append(computed)
        result = ModelRunnerOutput(
            req_ids=list(step),
            req_id_to_index={name: place for place, name in enumerate(step)},
            sampled_token_ids=[
                [self.random.choice(TOKENS) for _ in range(computed.sampled)]
                for computed in step.values()
            ],
        )
        outputs = self.scheduler.update_from_output(output, result)
        self.outputs_leave([one for client in outputs.values() for one in client.outputs])
        if not self.overlaps:
            self.drafts_are_made(list(step))

    def outputs_leave(self, outputs: list[Any]) -> None:
        for one in outputs:
            if one.request_id != CARRIER_ID:
                life = self.lives[one.request_id]
                life.output_tokens += len(one.new_token_ids)
                life.last_output_tokens = len(one.new_token_ids)
            if text := (one.trace_headers or {}).get(BILL_KEY):
                bill = read_bill(text)
                assert self.lives[bill.request_id].bill is None
                self.lives[bill.request_id].bill = bill

    def drafts_are_made(self, names: list[str]) -> None:
        drafts = [[0] * self.random.randint(0, DRAFTS["num_speculative_tokens"]) for _ in names]
        self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))

    def a_request_is_aborted(self) -> None:
        name = self.random.choice(list(self.scheduler.requests))
        in_flight = sum(name in step for _, step in self.in_flight)
        self.lives[name].in_flight_at_abort = in_flight
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def run(self, requests: int, aborts: float) -> None:
        depth = 2 if self.overlaps else 1
        while len(self.lives) < requests or self.scheduler.requests or self.in_flight:
            if len(self.lives) < requests and self.random.random() < 0.3:
                self.a_request_comes()
            if len(self.in_flight) < depth and self.random.random() < 0.8:
                self.a_step_is_scheduled()
            if self.scheduler.requests and self.random.random() < aborts:
                self.a_request_is_aborted()
            if self.in_flight and self.random.random() < 0.8:
                self.a_result_comes()
        # What ended last may wait for one more step's outputs.
        self.a_step_is_scheduled()
        self.a_result_comes()


def check(life: Life, caching: bool) -> None:
    """Compare a bill with what was computed."""
    bill = life.bill
    assert bill is not None
    computed = bill.sum_of("prefill_tokens") + bill.sum_of("decode_tokens")
    recomputed, rejected = bill.sum_of("recomputed_tokens"), bill.sum_of("rejected_tokens")
    cut, cut_ns = bill.sum_of("cut_tokens"), bill.sum_of("cut_ns")
    aborted = life.in_flight_at_abort is not None
    assert (bill.engine_status == "aborted") is aborted
    assert bill.output_tokens == life.output_tokens
    assert computed == sum(one.tokens for one in life.taken_up)
    assert rejected == sum(one.rejected for one in life.taken_up)
    assert 0 <= cut_ns <= bill.gpu_time_ns - bill.sum_of("rejected_ns")
    if not aborted:
        assert cut == life.taken_up[-1].sampled - life.last_output_tokens
    elif not bill.preemptions:
        unheard = life.taken_up[len(life.taken_up) - life.in_flight_at_abort :]
        assert cut == sum(one.behind(life.prompt_tokens) for one in unheard)
    if life.output_tokens:
        kept = life.prompt_tokens - bill.cached_tokens + life.output_tokens - 1
        found_later = kept - (computed - recomputed - rejected - cut)
        # A preempted request may find in the cache what others have computed meanwhile.
        assert found_later == 0 or (caching and bill.preemptions and found_later > 0)


@pytest.mark.parametrize("base", [Scheduler, AsyncScheduler], ids=["steps apart", "overlapping"])
@given(
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 6),
    aborts=st.sampled_from([0, 0.02, 0.2]),
    caching=st.booleans(),
)
@settings(max_examples=examples(150))
def test_computed_tokens_are_output_rejected_or_cut_off(
    config, base, seed, requests, aborts, caching
):
    world = World(config, base, caching, Random(seed))
    world.run(requests, aborts)
    for life in world.lives.values():
        check(life, caching)
    snapshot = world.scheduler.cost_meter.snapshot(0, (), 0, 0, None)
    assert (snapshot.errors, snapshot.difference_ns, snapshot.totals.in_flight) == (0, 0, 0)
