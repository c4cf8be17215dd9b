"""Engine requests that a running request has later: none once its budget is used up.

Beam search, tool loops and long-lived sockets have engine requests one after the other. The
application here does with a refused one what vLLM does: it answers with its error.
"""

import json

import pytest

from tests.component.api_server.test_admission import (
    TENANTS,
    as_tenant,
    figures_of,
    held,
    standing_at,
)
from tests.support.world import BODY, JSON, SSE, TOKEN, RefusedError, World
from vllm_cost_meter.api_server.admission import Admission
from vllm_cost_meter.tenants.budgets import Standing

STEPS = 5
SPENT_AFTER = 2
BUDGET = {"name": "prepaid", "tenant": "acme", "gpu_seconds": 1, "stop_running": True}


def held_world(make_world, **changes) -> World:
    world = make_world(tenants=TENANTS, budgets=[{**BUDGET, **changes}])
    held(world.runtime)
    stand_at(world, 0)
    return world


def stand_at(world: World, part: float, age_s: float = 0) -> Standing:
    (budget,) = world.runtime.settings.declared_budgets
    standing = standing_at(budget, int(part * budget.limit))
    world.runtime.admission.figures = figures_of(standing, age_s=age_s)
    return standing


@pytest.fixture
def world(make_world) -> World:
    return held_world(make_world)


class Beams:
    """An application with an engine request in each of its steps, as beam search has them.

    Its budget is used up after some of them.
    """

    def __init__(self, world: World, age_s: float = 0) -> None:
        self.world = world
        self.age_s = age_s
        self.born = 0

    def steps(self) -> None:
        for step in range(STEPS):
            if step == SPENT_AFTER:
                stand_at(self.world, 1.25, self.age_s)
            self.world.engine.asked(f"r{step}")
            self.world.engine.billed(f"r{step}")
            self.born += 1

    async def __call__(self, _scope, _receive, send) -> None:
        status, body = 200, BODY
        try:
            self.steps()
        except RefusedError as error:
            status, body = 400, json.dumps({"error": {"message": str(error)}}).encode()
        headers = [(b"content-type", JSON), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Streamed(Beams):
    """The same as a stream, whose status is sent before its first step."""

    async def __call__(self, _scope, _receive, send) -> None:
        headers = [(b"content-type", SSE)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": TOKEN, "more_body": True})
        try:
            self.steps()
        except RefusedError as error:
            event = b"data: %s\n\n" % json.dumps({"error": {"message": str(error)}}).encode()
            await send({"type": "http.response.body", "body": event})


class Socket(Beams):
    """A WebSocket that goes on for ever."""

    async def __call__(self, _scope, _receive, send) -> None:
        await send({"type": "websocket.accept"})
        try:
            self.steps()
        except RefusedError as error:
            await send({"type": "websocket.send", "text": str(error)})
        await send({"type": "websocket.close"})


def test_a_request_whose_budget_is_spent_meanwhile_has_no_further_engine_request(world):
    beams = Beams(world)
    client = world.run(beams, as_tenant("acme"))
    assert beams.born == SPENT_AFTER
    assert client.status == 429
    error = json.loads(client.body)["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "budget_exceeded")
    assert error["message"].startswith("budget 'prepaid' is used up: 1.25 GPU-seconds of 1.00 GPU-")
    headers = dict(client.headers)
    assert headers[b"x-should-retry"] == b"false"
    assert int(headers[b"content-length"]) == len(client.body)
    # It pays for what ran.
    assert headers[b"x-cost-meter-gpu-seconds"] == b"0.000006000"
    assert world.rows("SELECT status FROM replies") == [(429,)]
    assert world.rows("SELECT count(*) FROM requests") == [(SPENT_AFTER,)]


def test_a_refused_birth_tells_coarse_amounts_where_tenants_see_such(make_world):
    world = held_world(make_world, gpu_seconds="0.01")
    coarse = {"tenant_detail": "coarse"}
    world.runtime.settings = world.runtime.settings.model_copy(update=coarse)
    client = world.run(Beams(world), as_tenant("acme"))
    message = json.loads(client.body)["error"]["message"]
    assert message.startswith("budget 'prepaid' is used up: 0.012 GPU-seconds of 0.01 GPU-seconds")


def test_the_refusal_of_anthropics_messages_has_their_frame(world):
    client = world.run(Beams(world), as_tenant("acme", "/v1/messages"))
    content = json.loads(client.body)
    assert (content["type"], content["error"]["type"]) == ("error", "rate_limit_error")


def test_a_stream_that_began_ends_with_the_applications_error(world):
    streamed = Streamed(world)
    client = world.run(streamed, as_tenant("acme"))
    assert (client.status, streamed.born) == (200, SPENT_AFTER)
    assert b"budget 'prepaid' is used up" in client.body


def test_a_budget_that_lets_requests_run_on_lets_them_have_further_engine_requests(make_world):
    world = held_world(make_world, stop_running=False)
    beams = Beams(world)
    assert world.run(beams, as_tenant("acme")).status == 200
    assert beams.born == STEPS


def test_others_go_on_while_a_budget_is_spent(world):
    beams = Beams(world)
    assert world.run(beams, as_tenant("rival")).status == 200
    assert beams.born == STEPS


def test_stale_figures_end_nothing(world):
    beams = Beams(world, age_s=60)
    assert world.run(beams, as_tenant("acme")).status == 200
    assert beams.born == STEPS


@pytest.mark.parametrize("stop_running", [True, False])
def test_on_a_socket_each_engine_request_is_a_new_request_to_a_budget(make_world, stop_running):
    """A socket would else be a way around every hard budget."""
    world = held_world(make_world, stop_running=stop_running)
    socket = Socket(world)
    client = world.run(socket, as_tenant("acme", "/v1/realtime", type="websocket"))
    assert socket.born == SPENT_AFTER
    assert "budget 'prepaid' is used up" in client.messages[1]["text"]


def test_a_check_that_fails_refuses_nothing(world, monkeypatch):
    monkeypatch.setattr(Admission, "refused_birth", lambda *_: 1 / 0)
    beams = Beams(world)
    assert world.run(beams, as_tenant("acme")).status == 200
    assert beams.born == STEPS
