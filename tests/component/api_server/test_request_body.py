"""Bodies that say whose a request is: what is read of them, and that they reach the application."""

import asyncio
import hashlib
import json
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
from fastapi import Depends, FastAPI, HTTPException, Request

from tests.component.api_server.test_admission import figures_of, held, standing_at
from tests.support.world import (
    BODY,
    COST_HEADERS,
    JSON,
    Client,
    no_more_messages,
    replying,
    scope_of,
)
from vllm_cost_meter.api_server import request_body
from vllm_cost_meter.api_server.request_body import claims_of, is_json, read_ahead
from vllm_cost_meter.tenants.rules import NO_CLAIMS, BodyClaims

SERVED = ("llama", "org/llama")
ALL_FIELDS = frozenset(("user", "metadata", "lora", "model"))
KEY = (b"authorization", b"Bearer sk-alice")
SENDS_JSON = (b"content-type", b"application/json")
TENANT = {"name": "alice", "api_key_sha256": [hashlib.sha256(b"sk-alice").hexdigest()]}
BY_USER = ({"rule": "api_key"}, {"rule": "user"})


# ---- what is read


def test_user_metadata_and_model_are_read():
    body = b'{"messages":[{"user":"no"}],"user":"u","metadata":{"team":"t"},"model":"llama"}'
    assert claims_of(body, SERVED) == BodyClaims("u", {"team": "t"}, None, "llama")


def test_a_model_that_is_not_served_is_an_adapter():
    assert claims_of(b'{"model":"sql"}', SERVED) == BodyClaims(lora="sql")
    assert claims_of(b'{"model":"Llama"}', SERVED) == BodyClaims(lora="Llama")
    assert claims_of(b'{"model":"org/llama"}', SERVED) == BodyClaims(model="org/llama")


def test_without_the_served_names_a_model_says_nothing():
    assert claims_of(b'{"model":"llama","user":"u"}', ()) == BodyClaims(user="u")


@pytest.mark.parametrize("model", ["", ',"model":null', ',"model":""'])
def test_without_a_model_it_is_the_one_that_vllm_takes(model):
    body = f'{{"user":"u"{model}}}'.encode()
    assert claims_of(body, SERVED) == BodyClaims(user="u", model="llama")
    assert claims_of(body, ()) == BodyClaims(user="u")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[1]",
        b'"user"',
        b"null",
        b"{",
        b'{"user":"a"',
        b"user=a",
        b"\xff\xfe",
        "[1]".encode("utf-16"),
        b'{"user":"\xff"}',
        b'{"user":5,"metadata":"x","model":["llama"]}',
        b'{"user":{"user":"a"},"model":5}',
        b'{"user":"' + b"a" * 1_000_000 + b'","model":5}',
    ],
)
def test_a_body_that_says_nothing_usable_chooses_nothing(body):
    assert claims_of(body, SERVED) == NO_CLAIMS


@pytest.mark.parametrize(
    ("body", "unread"),
    [
        (None, ALL_FIELDS),
        (b'{"x":' + b"[" * 200_000, ALL_FIELDS),
        (b'{"model":5,"metadata":' + b'{"a":' * 5_000 + b"1" + b"}" * 5_001, ALL_FIELDS),
        (b'{"model":5,"metadata":{"team":"' + b"a" * 1_000_000 + b'"}}', {"metadata"}),
        (b'{"model":5,"metadata":{' + b" " * 65_536 + b'"team":"a"}}', {"metadata"}),
    ],
)
def test_what_is_too_long_or_too_deep_is_known_to_be_unread(body, unread):
    assert claims_of(body, SERVED) == BodyClaims(unread=unread)


SAID = {"user": "u", "metadata": {"team": "t"}, "model": "sql", "prompt": "é"}
PLAIN = json.dumps(SAID)
FOREIGN = [
    *(PLAIN.encode(name) for name in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")),
    *(PLAIN.encode(name) for name in ("utf-32", "utf-32-le", "utf-32-be")),
    *(PLAIN.replace('"\\u00e9"', other).encode() for other in ("NaN", "Infinity", "-Infinity")),
    PLAIN.replace('"\\u00e9"', '"\\ud800"').encode(),
    PLAIN.replace('"\\u00e9"', "1" * 4_000).encode(),
    PLAIN.encode().replace(b'"\\u00e9"', b'"\xed\xa0\x80"'),
    PLAIN.replace('"t"', '"t", "x": "\\udfff"').encode(),
    PLAIN.encode().replace(b'"t"', b'"t", "x": "\xed\xa0\x80"'),
    PLAIN.replace('{"user"', '{"user": "not", "user": "nor", "user"').encode(),
    PLAIN.replace("user", "us\\u0065r").encode(),
    (" \r\n\t" + PLAIN + "\n").encode(),
]


async def asked_of_fastapi(body: bytes, *types: bytes) -> object:
    """What FastAPI takes a body for, as vLLM's routes declare theirs; None if it refuses it."""
    app, taken = FastAPI(), []

    def validate(request: Request) -> None:  # vLLM's `validate_json_request`
        media_type = request.headers.get("content-type", "").lower().split(";", maxsplit=1)[0]
        if media_type != "application/json":
            raise HTTPException(415)

    @app.post("/v1/completions", dependencies=[Depends(validate)])
    async def route(said: dict[str, Any]) -> None:
        taken.append(said)

    headers = [(b"content-type", each) for each in types]
    scope = scope_of(headers=headers, query_string=b"", root_path="")
    await app(scope, sending(part(body)), Client().send)
    return taken[0] if taken else None


@pytest.mark.parametrize("body", FOREIGN)
def test_every_body_that_vllms_web_framework_accepts_is_read_as_it_reads_it(body):
    assert claims_of(body, SERVED) == BodyClaims("u", ANY, "sql", None)
    taken = asyncio.run(asked_of_fastapi(body, b"application/json"))
    assert {key: taken[key] for key in ("user", "metadata", "model")} == {
        "user": "u",
        "metadata": claims_of(body, SERVED).metadata,
        "model": "sql",
    }
    assert taken["metadata"]["team"] == "t"


def test_one_field_that_is_wrong_costs_no_other():
    assert claims_of(b'{"user":5,"metadata":{"team":"t"}}', SERVED).metadata == {"team": "t"}


def test_a_name_of_escapes_only_is_read():
    escaped = "".join(f"\\u{ord(c):04x}" for c in "a" * 128)
    assert claims_of(f'{{"user":"{escaped}"}}'.encode(), SERVED).user == "a" * 128


def lines_run(body: bytes) -> int:
    """Count the lines of Python that reading a body runs."""
    lines = 0

    def trace(_frame, event, _argument):
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        claims_of(body, SERVED)
    finally:
        sys.settrace(before)
    return lines


def test_a_megabyte_of_user_is_put_aside_in_as_many_steps_as_a_kilobyte():
    kilobyte, megabyte = (
        json.dumps({"user": "a" * length}).encode() for length in (1_000, 1_000_000)
    )
    assert 0 < lines_run(megabyte) <= lines_run(kilobyte)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([b"application/json"], True),
        ([b"Application/JSON; charset=utf-8"], True),
        ([b"application/json;charset=utf-16"], True),
        ([b"application/json", b"text/plain"], True),
        ([b"application/json", b"application/json"], True),
        ([b"text/plain", b"application/json"], False),
        ([b"text/json"], False),
        ([b"application/vnd.api+json"], False),
        ([b"multipart/form-data; boundary=application/json"], False),
        ([b""], False),
        ([], False),
    ],
)
def test_a_body_is_json_if_the_first_content_type_says_so_as_it_is_to_vllm(types, expected):
    assert is_json([(b"Content-Type", each) for each in types]) is expected
    taken = asyncio.run(asked_of_fastapi(PLAIN.encode(), *types))
    assert (taken == SAID) is expected


# ---- how it is handed on


def part(body: bytes, more: bool = False) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


LEFT = {"type": "http.disconnect"}
BARE = {"type": "http.request"}


def heard(messages, bytes_max=request_body.BODY_BYTES_MAX):
    """Read ahead of a client that sends these; return the body, and all that is told again."""
    coming = iter(messages)

    async def receive():
        return next(coming)

    async def read():
        body, replayed = await read_ahead(receive, bytes_max)
        left = list(coming)
        return body, [await replayed() for _ in range(len(messages) - len(left))], left

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("messages", "body"),
    [
        ([part(b"{}")], b"{}"),
        ([part(b"{", True), part(b"", True), part(b"}", True), part(b"")], b"{}"),
        ([BARE], b""),
        ([part(b"{", True), LEFT], None),
        ([LEFT], None),
    ],
)
def test_every_message_is_told_again_as_it_came(messages, body):
    assert heard(messages) == (body, messages, [])


def test_a_body_that_is_too_long_is_read_no_further():
    messages = [part(b"1234", True), part(b"56789", True), part(b"x", True), part(b"")]
    assert heard(messages, bytes_max=8) == (None, messages[:2], messages[2:])
    assert heard([part(b"12345678")], bytes_max=8)[0] == b"12345678"
    assert heard([part(b"123456789")], bytes_max=8)[0] is None


# ---- through the middleware


class Application:
    """Reads its body to the end, as vLLM does, and generates."""

    def __init__(self, world) -> None:
        self.world = world
        self.messages: list[dict] = []

    async def __call__(self, scope, receive, send) -> None:
        while not self.messages or self.messages[-1].get("more_body", False):
            self.messages.append(await receive())
        name = f"r{self.world.engine.seq}"
        await replying(JSON, [BODY], lambda: self.world.engine.generate(name))(scope, receive, send)


def sending(*messages):
    coming = iter(messages)

    async def receive():
        for message in coming:
            return message
        return await no_more_messages()

    return receive


def ask(world, *messages, path="/v1/completions", headers=(KEY, SENDS_JSON)):
    app = Application(world)
    client = world.run(app, scope_of(path, headers), receive=sending(*messages))
    return client, app


@pytest.fixture
def by_user(make_world):
    return make_world(tenants=[TENANT], tenant_rules=BY_USER)


WHOSE = "SELECT tenant, tenant_rule, tenant_parent, tags FROM requests"


def test_a_users_child_is_told_and_recorded_with_its_parent_and_tags(make_world):
    tagged = {**TENANT, "tags": {"kind": "cogs"}}
    world = make_world(tenants=[tagged], tenant_rules=BY_USER)
    messages = [part(b'{"user":', True), part(b'"carol"}')]
    client, app = ask(world, *messages)
    assert client.ours[b"x-cost-meter-tenant"] == b"alice/carol"
    assert len(client.ours) == len(COST_HEADERS)
    assert app.messages == messages
    assert world.rows(WHOSE) == [("alice/carol", "api_key+user", "alice", '{"kind":"cogs"}')]
    assert world.rows("SELECT tenant, tenant_rule FROM replies") == [
        ("alice/carol", "api_key+user")
    ]


@pytest.mark.parametrize(
    ("rules", "said", "tenant"),
    [
        ({"rule": "metadata", "key": "team"}, {"metadata": {"team": "web"}}, "alice/web"),
        ({"rule": "metadata", "key": "team"}, {"metadata": {"Team": "web"}}, "alice"),
        ({"rule": "lora"}, {"model": "sql"}, "alice/sql"),
        ({"rule": "lora"}, {"model": "llama"}, "alice"),
        ({"rule": "model"}, {"model": "llama"}, "alice/llama"),
        ({"rule": "model"}, {"model": "org/llama"}, "alice/org--llama"),
        ({"rule": "model"}, {"model": "sql"}, "alice"),
        ({"rule": "model"}, {}, "alice/llama"),
        ({"rule": "lora"}, {}, "alice"),
    ],
)
def test_each_rule_reads_its_own_field(make_world, rules, said, tenant):
    world = make_world(tenants=[TENANT], tenant_rules=[{"rule": "api_key"}, rules])
    world.runtime.served = SERVED
    ask(world, part(json.dumps(said).encode()))
    assert world.rows("SELECT tenant FROM requests") == [(tenant,)]


@pytest.mark.parametrize(
    "body", [b"no json", b'{"user":"bob/x"}', b'{"user":"' + b"a" * 1_000_000 + b'"}', b""]
)
def test_a_body_that_chooses_no_child_leaves_the_cost_with_the_tenant(by_user, body):
    _, app = ask(by_user, part(body))
    assert app.messages == [part(body)]
    assert by_user.rows(WHOSE) == [("alice", "api_key", None, None)]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/completions", [KEY]),
        ("/v1/completions", [KEY, (b"content-type", b"multipart/form-data")]),
        ("/v1/load_lora_adapter", [KEY, SENDS_JSON]),
    ],
)
def test_other_bodies_and_other_routes_are_left_to_the_application(by_user, path, headers):
    receive = sending(part(b'{"user":"carol"}'))
    seen = []

    async def app(scope, its_receive, send):
        seen.append(await receive())  # had the body been read, this would wait for ever
        await replying(JSON, [BODY], by_user.engine.generate)(scope, its_receive, send)

    async def live():
        await asyncio.wait_for(by_user.ask(app, scope_of(path, headers), receive=receive), 10)

    asyncio.run(live())
    assert seen == [part(b'{"user":"carol"}')]
    assert by_user.rows("SELECT tenant FROM requests") == [("alice",)]


def test_without_such_rules_nothing_is_read_before_the_application_is_called(make_world):
    world = make_world(tenants=[TENANT])

    async def never():
        raise AssertionError("read by the meter")

    app = replying(JSON, [BODY], world.engine.generate)
    client = world.run(app, scope_of(headers=[KEY, SENDS_JSON]), receive=never)
    assert client.ours[b"x-cost-meter-tenant"] == b"alice"
    assert world.runtime.guard.errors == 0


def test_a_client_that_leaves_within_its_body_is_told_to_the_application(by_user):
    left = [part(b'{"user":', True), LEFT]
    seen = []

    async def app(scope, receive, send):
        seen.extend([await receive(), await receive()])
        by_user.engine.generate()

    by_user.run(app, scope_of(headers=[KEY, SENDS_JSON]), receive=sending(*left))
    assert seen == left
    # It left before it had said whose child it is.
    assert by_user.rows("SELECT tenant, status FROM replies") == [("alice/__unread__", 499)]


def test_a_client_that_leaves_after_its_body_is_told_to_the_application(by_user):
    async def app(scope, receive, send):
        assert await receive() == part(b'{"user":"carol"}')
        assert await receive() == LEFT
        by_user.engine.generate()

    receive = sending(part(b'{"user":"carol"}'), LEFT)
    by_user.run(app, scope_of(headers=[KEY, SENDS_JSON]), receive=receive)
    assert by_user.rows("SELECT tenant, status FROM replies") == [("alice/carol", 499)]


def test_a_body_that_cannot_be_understood_by_mistake_of_ours_is_still_handed_on(
    by_user, monkeypatch
):
    def fail(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr("vllm_cost_meter.api_server.middleware.claims_of", fail)
    client, app = ask(by_user, part(b'{"user":"carol"}'))
    assert client.ours[b"x-cost-meter-tenant"] == b"alice"
    assert app.messages == [part(b'{"user":"carol"}')]
    assert by_user.runtime.guard.errors == 1


def test_a_meter_that_switched_itself_off_hands_the_body_on(by_user):
    by_user.runtime.guard.off = True
    client, app = ask(by_user, part(b'{"user":"carol"}'))
    assert (client.ours, app.messages) == ({}, [part(b'{"user":"carol"}')])


def test_a_child_is_told_what_its_tenants_clients_are(make_world):
    world = make_world(tenants=[{**TENANT, "reply": "none"}], tenant_rules=BY_USER)
    client, _ = ask(world, part(b'{"user":"carol"}'))
    assert client.ours == {}
    assert world.rows("SELECT tenant FROM requests") == [("alice/carol",)]


UNREAD_BY_TYPE = [
    ("model", b"multipart/form-data; boundary=x", "alice/__unread__"),
    ("lora", b"application/x-www-form-urlencoded", "alice/__unread__"),
    ("model", b"text/plain", "alice"),
    ("user", b"multipart/form-data; boundary=x", "alice"),
]


@pytest.mark.parametrize(("rule", "sent", "tenant"), UNREAD_BY_TYPE)
def test_a_form_may_name_every_model_and_no_user(make_world, rule, sent, tenant):
    world = make_world(tenants=[TENANT], tenant_rules=[{"rule": "api_key"}, {"rule": rule}])
    ask(world, part(b"x"), path="/v1/audio/transcriptions", headers=[KEY, (b"content-type", sent)])
    assert world.rows("SELECT tenant FROM requests") == [(tenant,)]


def test_a_websocket_may_name_every_model(make_world):
    world = make_world(tenants=[TENANT], tenant_rules=[{"rule": "api_key"}, {"rule": "model"}])

    async def app(scope, receive, send):
        world.engine.generate()

    world.run(app, scope_of("/v1/realtime", [KEY], type="websocket"))
    assert world.rows("SELECT tenant FROM requests") == [("alice/__unread__",)]


def test_a_body_longer_than_the_bound_counts_against_every_child(make_world):
    budgets = [{"name": "carol's", "tenant": "alice/carol", "gpu_seconds": 1}]
    world = make_world(tenants=[TENANT], tenant_rules=BY_USER, budgets=budgets)
    world.body_bytes_max = 8
    ask(world, part(b'{"user":', True), part(b'"carol"}'))
    assert world.rows(WHOSE) == [("alice/__unread__", "api_key+user", "alice", None)]
    held(world.runtime)
    (carols,) = world.runtime.settings.declared_budgets
    world.runtime.admission.figures = figures_of(standing_at(carols, 10**9))
    refused, _ = ask(world, part(b'{"user":', True), part(b'"carol"}'))
    assert refused.status == 429
    world.body_bytes_max = 16
    assert ask(world, part(b'{"user":"dave"}'))[0].status == 200


# ---- the names of the model


def test_all_names_of_the_model_are_known_once_the_application_is_up(world):
    engine = SimpleNamespace(
        engine_core=SimpleNamespace(client_index=1, core_engines=[]),
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(served_model_name="llama"),
            parallel_config=SimpleNamespace(world_size=1),
        ),
    )
    paths = [SimpleNamespace(name="llama"), SimpleNamespace(name="org/llama")]
    state = SimpleNamespace(openai_serving_models=SimpleNamespace(base_model_paths=paths))

    async def served(state):
        await world.runtime.start_work(engine, state)
        return world.runtime.served

    assert asyncio.run(served(state)) == SERVED
    assert asyncio.run(served(SimpleNamespace())) == ("llama",)
