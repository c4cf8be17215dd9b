"""The simulated traffic is scheduled as vLLM schedules, at the load that was asked for."""

import functools
import itertools

import numpy as np
import pytest

from tests.unit.lab.test_truth import machine_of
from vllm_cost_meter.lab.validation import traffic
from vllm_cost_meter.lab.validation.kernel_machine import KernelMachine
from vllm_cost_meter.lab.validation.roofline import GPUS
from vllm_cost_meter.lab.validation.scenarios import DENSE
from vllm_cost_meter.lab.validation.traffic import (
    ACCEPTED,
    TENANTS,
    TOKEN_BUDGET,
    Load,
    MachineChange,
    SimulatedTenant,
    Trace,
    make_trace,
)

STEPS = 1_500


@functools.cache
def trace_of(mean_batch: int = 20, seed: int = 1) -> Trace:
    return make_trace(machine_of(compute=False), Load(mean_batch), STEPS, seed)


def lives(trace: Trace) -> dict[int, list[tuple[int, int, int]]]:
    """Return (step, position, tokens) of each request."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for number, step in enumerate(trace.steps):
        for request, position, tokens in zip(
            step.requests, step.positions.tolist(), step.tokens.tolist(), strict=True
        ):
            found.setdefault(request, []).append((number, position, tokens))
    return found


def test_tenants_with_features_have_them_in_the_steps_where_they_count():
    tenants = (
        SimulatedTenant("adapter", 3_000, 16, 0.4, adapter=2),
        SimulatedTenant("grammar", 3_000, 16, 0.3, has_grammar=True),
        SimulatedTenant("images", 100, 16, 0.3, image_tokens=3_000),
    )
    machine = KernelMachine(GPUS["h100"], DENSE)
    trace = make_trace(machine, Load(4, tenants, draft_tokens=3), 300, 1)
    seen = np.zeros(3, dtype=int)
    for step in trace.steps:
        features = step.features
        assert features is not None
        for place, request in enumerate(step.requests):
            name = trace.tenant_of(request).name
            position, tokens = int(step.positions[place]), int(step.tokens[place])
            samples = position + tokens >= trace.prompt_tokens[request]
            rows = 1 if step.is_prefill[place] else tokens
            expected = (
                2 if name == "adapter" else 0,
                rows if name == "grammar" and samples else 0,
                trace.image_tokens[request] if name == "images" and position == 0 else 0,
            )
            found = (
                features.adapters[place],
                features.grammar_rows[place],
                features.encoded[place],
            )
            assert found == expected
            seen += np.array(expected) > 0
    assert (seen > 3).all()
    assert all(
        image < prompt
        for image, prompt in zip(trace.image_tokens, trace.prompt_tokens, strict=True)
    )


def test_tenants_without_features_leave_a_trace_without_them():
    assert all(step.features is None for step in trace_of().steps)


def test_the_mean_batch_is_what_was_asked_for():
    for mean_batch in (5, 20):
        assert trace_of(mean_batch).mean_batch == pytest.approx(mean_batch, rel=0.03)


def test_no_step_is_beyond_the_budget_and_none_is_empty():
    for step in trace_of().steps:
        assert 0 < len(step.requests) == len(set(step.requests))
        assert step.tokens.sum() <= TOKEN_BUDGET
        assert step.gpu_time_ns > 0


def test_a_request_runs_in_every_step_from_its_first_to_its_last_without_a_gap():
    trace = trace_of()
    started = {request: i for i, step in enumerate(trace.steps) for request in step.started}
    ended = {request: i for i, step in enumerate(trace.steps) for request in step.ended}
    assert len(ended) > 20
    for request, life in lives(trace).items():
        steps, positions, tokens = zip(*life, strict=True)
        assert steps[0] == started[request]
        assert steps[-1] == ended.get(request, STEPS - 1)
        assert steps == tuple(range(steps[0], steps[-1] + 1))
        assert positions[0] == trace.first_positions[request]
        assert list(positions[1:]) == [p + t for p, t in zip(positions, tokens, strict=True)][:-1]


def test_prompts_come_in_chunks_and_then_one_token_at_a_time():
    trace = trace_of()
    for request, life in lives(trace).items():
        prompt = trace.prompt_tokens[request]
        for _, position, tokens in life:
            assert position + tokens <= prompt if position < prompt else tokens == 1


def test_only_the_request_that_was_admitted_last_is_in_the_midst_of_its_prompt():
    trace = trace_of()
    partial = 0
    for step in trace.steps:
        prompts = np.array(trace.prompt_tokens)[step.requests]
        is_partial = step.positions + step.tokens < prompts
        assert not is_partial[:-1].any()
        if is_partial.any():
            partial += 1
            assert step.tokens.sum() == TOKEN_BUDGET
    assert partial > 0


def test_requests_are_admitted_in_the_order_they_came():
    admitted = [request for step in trace_of().steps for request in step.started]
    assert admitted == sorted(admitted)


def test_a_trace_starts_in_the_midst_of_life():
    trace = trace_of()
    assert trace.steps[0].started[:20] == list(range(20))
    assert all(trace.first_positions[r] >= trace.prompt_tokens[r] for r in range(20))


def test_lengths_have_the_means_of_the_tenants():
    server = traffic._Server(machine_of(), Load(0), 1, requests_per_s=1.0)
    for place, tenant in enumerate(TENANTS):
        requests = [server._add(place, size_biased=False) for _ in range(3_000)]
        prompts = [server.trace.prompt_tokens[r] for r in requests]
        outputs = [server._ends[r] - server.trace.prompt_tokens[r] + 1 for r in requests]
        assert np.mean(prompts) == pytest.approx(tenant.prompt_tokens, rel=0.03)
        assert np.mean(outputs) == pytest.approx(tenant.output_tokens, rel=0.05)


def test_arrivals_are_poisson_with_the_tenants_parts():
    server = traffic._Server(machine_of(), Load(0), 1, requests_per_s=50.0)
    server._now_s = 100.0
    server._admit_arrivals()
    tenants = np.array(server.trace.tenants)
    assert len(tenants) == pytest.approx(5_000, abs=4 * 5_000**0.5)
    parts = np.bincount(tenants) / len(tenants)
    assert parts == pytest.approx([tenant.requests_share for tenant in TENANTS], abs=0.03)
    assert sum(tenant.requests_share for tenant in TENANTS) == pytest.approx(1)


def test_step_times_have_two_percent_of_noise():
    trace = trace_of()
    machine = machine_of(compute=False)
    logs = [
        np.log(step.gpu_time_ns / 1e9 / machine.game(step.tokens, step.positions).total_s)
        for step in trace.steps
    ]
    assert np.std(logs) == pytest.approx(0.02, rel=0.1)
    assert np.mean(logs) == pytest.approx(0, abs=0.002)


def test_a_server_without_requests_waits_for_the_next():
    server = traffic._Server(machine_of(), Load(0), 1, requests_per_s=0.001)
    server.run(3)
    assert server._now_s > 100
    assert server.trace.steps[0].requests == [0]


def test_a_seed_gives_the_same_trace_again():
    first, second = (make_trace(machine_of(), Load(5), 50, seed=3) for _ in range(2))
    other = make_trace(machine_of(), Load(5), 50, seed=4)
    times = [[step.gpu_time_ns for step in trace.steps] for trace in (first, second, other)]
    assert times[0] == times[1] != times[2]


def test_a_decode_computes_its_drafts_and_goes_on_by_those_that_are_accepted():
    trace = make_trace(machine_of(compute=False), Load(20, draft_tokens=3), 400, seed=1)
    goes_on = []
    for step, after in itertools.pairwise(trace.steps):
        decodes = ~step.is_prefill
        assert set(step.tokens[decodes]) <= {4}
        assert not step.rejected[step.is_prefill].any()
        where = dict(zip(after.requests, after.positions.tolist(), strict=True))
        for place in np.flatnonzero(decodes):
            request = step.requests[place]
            if request in where:
                accepted = where[request] - step.positions[place]
                assert accepted == 4 - step.rejected[place]
                goes_on.append(accepted)
    assert np.mean(goes_on) == pytest.approx(sum(ACCEPTED**n for n in range(4)), rel=0.03)


def test_an_embedding_is_over_with_its_prompt():
    embeddings = SimulatedTenant("embeddings", 300, 1, 0.4)
    trace = make_trace(machine_of(), Load(8, (TENANTS[0], embeddings)), 500, seed=1)
    of = [request for request, place in enumerate(trace.tenants) if place == 1]
    assert len(of) > 10
    for request in of:
        for _, position, tokens in lives(trace).get(request, []):
            assert position + tokens <= trace.prompt_tokens[request]


def test_a_late_tenant_and_another_machine_come_when_they_are_said_to():
    late = SimulatedTenant("late", 64, 8, 0.5, first_step=200)
    slow = machine_of(compute=False)
    load = Load(8, (SimulatedTenant("chat", 64, 8, 0.5), late), change=MachineChange(300, slow))
    trace = make_trace(machine_of(), load, 400, seed=1)
    first = min(
        number
        for number, step in enumerate(trace.steps)
        if any(trace.tenants[request] == 1 for request in step.requests)
    )
    assert first > 200
    assert trace.machine_at(299) is trace.machine
    assert trace.machine_at(300) is slow
    for number in (0, 399):
        assert trace.steps[number].gpu_time_ns / 1e9 == pytest.approx(
            trace.game(number).total_s, rel=0.1
        )
