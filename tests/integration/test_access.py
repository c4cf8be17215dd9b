"""Whose a request is, who may look, and what is kept of it, on a real server.

Goal: a client is itself or a child of itself, sees its own figures and nobody else's, and nothing
that it wrote or was answered is on disk afterwards. The server has two API servers, budgets, and
rules by API key and by the body's `user`.
"""

import json
import re
import socket

import httpx
import pytest

from tests.integration.server import TENANT_KEYS, Server
from tests.integration.traffic import PROMPT
from tests.support.waiting import wait_for

# In no other test, and in no name.
SECRET = "zyxwelk-7741-okapi"


def complete(client: httpx.Client, **more: object) -> httpx.Response:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, **more}
    return client.post("/v1/completions", json=body)


def test_a_user_chooses_a_child_of_the_keys_tenant_whatever_else_it_claims(hard: Server) -> None:
    with hard.client("gamma", headers={"x-tenant-id": "alpha"}) as client:
        reply = complete(client, user="web", metadata={"team": "alpha"})
    assert reply.headers["x-cost-meter-tenant"] == "gamma/web"
    row = hard.bill_of(reply.json()["id"])
    assert (row["tenant"], row["tenant_rule"]) == ("gamma/web", "api_key+user")
    rows = {row["tenant"]: row["requests"] for row in hard.cost("tenants")["tenants"]}
    assert rows["gamma/web"] >= 1
    hard.balanced()


@pytest.mark.parametrize(
    "user", ["../alpha", "alpha/x", "__idle__", "u" * 1_000_000, "x\x1b[2J", 7]
)
def test_a_user_that_is_no_name_leaves_the_cost_with_its_tenant(hard: Server, user: object) -> None:
    with hard.client("gamma") as client:
        reply = complete(client, user=user)
    # vLLM may refuse it; what it serves is the tenant's.
    assert reply.headers.get("x-cost-meter-tenant", "gamma") == "gamma"
    assert reply.status_code in (200, 400, 422)


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


GAMMA, ALPHA, SHARED = (
    *(bearer(TENANT_KEYS[name]) for name in ("gamma", "alpha")),
    bearer("any-key"),
)
ALPHAS_OTHER = ("x-api-key", TENANT_KEYS["alpha"])
BETAS_OTHER = ("x-api-key", TENANT_KEYS["beta"])


def sent(hard: Server, headers: list[tuple[str, str]], body: bytes, path: str) -> httpx.Response:
    kind = [] if any(name == "content-type" for name, _ in headers) else [PLAIN]
    return httpx.post(f"{hard.url}{path}", content=body, headers=[*headers, *kind], timeout=60)


PLAIN = ("content-type", "application/json")
ASKED = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ([GAMMA, ALPHA], "gamma"),
        ([ALPHA, GAMMA], "alpha"),
        ([GAMMA, ("authorization", "x")], "gamma"),
        ([GAMMA, ("authorization", "")], "gamma"),
        ([ALPHAS_OTHER, GAMMA], "gamma"),
        ([SHARED, ALPHAS_OTHER], "alpha"),
        ([SHARED, ("x-tenant-id", "alpha"), ("x-tenant-id", "beta")], "unknown"),
        # vLLM takes the first, and refuses it.
        ([("authorization", "x"), GAMMA], None),
        ([("authorization", ""), GAMMA], None),
        ([ALPHAS_OTHER], None),
    ],
)
def test_whom_vllm_admits_by_its_first_authorization_pays(
    hard: Server, headers: list[tuple[str, str]], tenant: str | None
) -> None:
    reply = sent(hard, headers, json.dumps(ASKED).encode(), "/v1/completions")
    assert reply.status_code == (401 if tenant is None else 200)
    assert reply.headers.get("x-cost-meter-tenant") == tenant


@pytest.mark.parametrize(
    ("headers", "path"),
    [
        ([SHARED, ALPHAS_OTHER, BETAS_OTHER], "/v1/completions"),
        ([GAMMA, ALPHAS_OTHER], "/invocations"),  # Here vLLM asks for no key.
        ([GAMMA, ALPHA], "/invocations"),
    ],
)
def test_keys_of_two_tenants_are_refused_where_vllm_does_not_decide(
    hard: Server, headers: list[tuple[str, str]], path: str
) -> None:
    reply = sent(hard, headers, json.dumps(ASKED).encode(), path)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "contradicting_credentials"


OF_WEB = json.dumps({**ASKED, "user": "web"})
TEXT = ("content-type", "text/plain")


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        *(([], OF_WEB.encode(name)) for name in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32")),
        ([], OF_WEB.replace('"web"', '"web", "x": NaN').encode()),
        ([], OF_WEB.replace('"user"', '"user": "app", "user"').encode()),
        ([("content-type", "Application/JSON;x")], OF_WEB.encode()),
        ([PLAIN, TEXT], OF_WEB.encode()),
    ],
)
def test_a_body_that_vllm_accepts_names_the_child_that_it_says(
    hard: Server, headers: list[tuple[str, str]], body: bytes
) -> None:
    reply = sent(hard, [GAMMA, *headers], body, "/v1/completions")
    assert (reply.status_code, reply.headers["x-cost-meter-tenant"]) == (200, "gamma/web")


@pytest.mark.parametrize(
    "headers",
    [
        [TEXT, PLAIN],
        [("content-type", "text/json")],
        [("content-type", "application/vnd.api+json")],
        [("content-type", "application/json ; x")],
        [("content-type", "")],
    ],
)
def test_a_body_that_the_meter_does_not_read_as_json_is_refused_by_vllm(
    hard: Server, headers: list[tuple[str, str]]
) -> None:
    reply = sent(hard, [GAMMA, *headers], OF_WEB.encode(), "/v1/completions")
    assert reply.status_code == 400


def test_pipelined_requests_of_two_tenants_in_one_write_are_billed_to_each(hard: Server) -> None:
    names = ["alpha", "beta", "beta", "alpha"]
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 4}).encode()
    requests = b"".join(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + f"Authorization: Bearer {TENANT_KEYS[name]}\r\nContent-Length: {len(body)}\r\n"
        f"Connection: {'close' if number == len(names) else 'keep-alive'}\r\n\r\n".encode()
        + body
        for number, name in enumerate(names, 1)
    )
    url = httpx.URL(hard.url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(requests)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    told = re.findall(rb"x-cost-meter-tenant: (\w+)", answer)
    assert told == [name.encode() for name in names]
    ids = re.findall(rb'"id":"(cmpl-[^"]+)"', answer)
    rows = [hard.bill_of(response_id.decode()) for response_id in ids]
    assert [(row["tenant"], len(row["parts"])) for row in rows] == [(name, 1) for name in names]


def own(hard: Server, path: str, key: str | None) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{hard.url}{path}", headers=headers, timeout=30)


def test_on_vllms_port_a_tenant_sees_its_own_figures_and_nobody_elses(hard: Server) -> None:
    with hard.client("beta") as client:
        response_id = complete(client).json()["id"]
    hard.bill_of(response_id)
    mine, others = TENANT_KEYS["beta"], TENANT_KEYS["gamma"]
    found = wait_for(
        lambda: own(hard, f"/v1/cost/requests/{response_id}", mine),
        lambda reply: reply.status_code != 404,
    )
    assert found.json()["tenant"] == "beta"
    assert own(hard, "/v1/cost/me", mine).json()["tenant"] == "beta"
    theirs, unknown = (
        own(hard, f"/v1/cost/requests/{name}", others) for name in (response_id, "cmpl-none")
    )
    assert theirs.status_code == unknown.status_code == 404
    assert theirs.text.replace(response_id, "cmpl-none") == unknown.text
    assert own(hard, "/v1/cost/me", None).status_code == 401
    assert own(hard, "/v1/cost/me", "any-key").status_code == 401  # vLLM's, and no tenant's


@pytest.mark.parametrize("path", ["/cost/summary", "/cost/tenants", "/v1/cost/tenants", "/v1/cost"])
def test_nothing_else_of_the_meter_is_on_vllms_port(hard: Server, path: str) -> None:
    assert own(hard, path, TENANT_KEYS["beta"]).status_code == 404


def test_routes_that_the_keys_leave_open_are_named_at_the_start_and_closed_on_demand(
    server: Server,
) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}

    def status(key: str | None) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        url = f"{server.url}/invocations"
        return httpx.post(url, json=body, headers=headers, timeout=60).status_code

    assert status(None) == 200
    (warning,) = {line for line in server.log.splitlines() if "keys do not guard" in line}
    assert "POST /invocations" in warning
    assert "/v1/" not in warning
    config = server.folder / "meter.toml"
    before = config.read_text()
    config.write_text(f'unnamed_requests = "refuse"\n{before}')
    try:
        wait_for(lambda: status(None), lambda told: told == 401)
        assert status("any-key") == 401  # vLLM's, and no tenant's
        assert status(TENANT_KEYS["alpha"]) == 200
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
    finally:
        config.write_text(before)
        wait_for(lambda: status(None), lambda told: told == 200)


def test_nothing_that_a_client_wrote_or_was_answered_is_kept(hard: Server) -> None:
    with hard.client("gamma") as client:
        replies = [
            complete(client, prompt=f"{SECRET} {PROMPT}", stop=[SECRET], echo=True),
            client.post(
                "/v1/chat/completions",
                json={
                    "model": "tiny",
                    "messages": [{"role": "user", "content": SECRET}],
                    "metadata": {"note": SECRET},
                    "max_tokens": 4,
                },
            ),
            client.post("/v1/completions", content=json.dumps({"model": SECRET, "prompt": 1})),
        ]
    assert [reply.status_code for reply in replies[:2]] == [200, 200]
    assert SECRET in replies[0].text
    hard.bill_of(replies[1].json()["id"])
    hard.balanced()
    files = [path for path in hard.folder.rglob("*") if path.is_file()]
    assert hard.ledger_file in files
    ours = [path for path in files if SECRET.encode() in path.read_bytes()]
    # vLLM itself logs the name of a model that it does not know.
    assert [path.name for path in ours] in ([], ["server.log"])
    lines = [line for line in hard.log.splitlines() if SECRET in line]
    assert not [line for line in lines if "cost meter" in line or "prompt" in line.lower()]
