"""Whatever comes over a socket, the bill goes to whom the page on tenants says, or to nobody.

Goal: no pipeline, header, body or disconnect moves a bill to another tenant, or off every bill.
Method: a real uvicorn, with both of its parsers, on both loops, with and without a check of keys as
vLLM's; before it the real middleware, collector and ledger. A client writes random requests in
random pieces, and leaves at times. `tests/support/payers.py` says who pays; it shares no code with
the rules.
"""

import asyncio
import hashlib
import http.client
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop
from hypothesis import event, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request as Asked
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.support.examples import examples
from tests.support.key_check import GUARDED, AuthenticationMiddleware
from tests.support.payers import CONTRADICTION, Payer, Request, Situation, payer
from tests.support.world import World, worlds
from vllm_cost_meter.api_server.middleware import CostMiddleware
from vllm_cost_meter.config.settings import Settings

SECRET = "only the gateway knows"
KEYS = {"sk-alice": "alice", "sk-alice-2": "alice", "sk-bob": "bob"}
SHARED = "sk-shared"  # vLLM's, and no tenant's
TENANTS = [
    {"name": "alice", "api_key_sha256": ["sk-alice", "sk-alice-2"], "tags": {"kind": "cogs"}},
    {"name": "alice/web", "tags": {"site": "shop"}},
    {"name": "corp", "tags": {"kind": "r-d"}},
    {"name": "bob", "api_key_sha256": ["sk-bob"], "parent": "corp"},
]
SERVED = ("llama", "org/llama")
COMPLETIONS, INVOCATIONS, HEALTH = "/v1/completions", "/invocations", "/health"
AUDIO, MODELS = "/v1/audio/transcriptions", "/v1/models"
GENERATING = (COMPLETIONS, INVOCATIONS, AUDIO)

TENANT_HEADER = {"rule": "header", "name": "x-tenant-id", "proof": SECRET}
RULES: list[dict[str, Any]] = [
    {"rule": "api_key"},
    TENANT_HEADER,
    {"rule": "header", "name": "x-team", "names": "child", "proof": SECRET},
    {"rule": "header", "name": "x-work", "names": "tag", "tag": "workload", "proof": SECRET},
    {"rule": "header", "name": "x-kind", "names": "tag", "tag": "kind"},
    {"rule": "user"},
    {"rule": "user", "trust_clients": True},
    {"rule": "metadata", "key": "team"},
    {"rule": "metadata", "key": "team", "trust_clients": True},
    {"rule": "lora"},
    {"rule": "lora", "trust_clients": True},
    {"rule": "model"},
]
# These answer nearly every request, so they come last, as an operator would have them.
LAST_RULES: list[dict[str, Any]] = [
    {"rule": "header", "name": "x-tenant-id"},
    {"rule": "constant", "tenant": "guests"},
]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def as_setting(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule as the settings have it."""
    if rule["rule"] != "header":
        return rule
    rest = {key: value for key, value in rule.items() if key != "proof"}
    proof = {"proof_sha256": digest(rule["proof"])} if "proof" in rule else {"trust": "everyone"}
    return {**rest, **proof}


TAGS = {
    "alice": {"kind": "cogs"},
    "alice/web": {"kind": "cogs", "site": "shop"},
    "corp": {"kind": "r-d"},
    "bob": {"kind": "r-d"},
}
PARENTS = {"alice": None, "alice/web": "alice", "corp": None, "bob": "corp"}

# ---- what a client may send

key_texts = st.sampled_from(["sk-alice", "sk-alice-2", "sk-bob", SHARED, "sk-nobody", ""])
authorizations = st.builds(
    str.__add__, st.sampled_from(["Bearer "] * 4 + ["bearer ", "Basic ", "Bearer  ", ""]), key_texts
)
tenant_texts = st.sampled_from(
    ["acme", "bob", "alice/web", "acme, bob", "acme,acme", ",acme", "alice/app", "unknown", "Other"]
    + ["__idle__", "a" * 129, "a" * 128, "", "\xfcml\xe4ut", "unknown/acme", "guests"]
)
child_texts = st.sampled_from(["web", "web", "app", "web, app", "x/y", "", "__unread__", "w" * 126])
proofs = st.sampled_from([SECRET] * 3 + ["a guess", f"a guess, {SECRET}", digest(SECRET), ""])
headers = st.one_of(
    st.tuples(st.sampled_from(["Authorization", "AUTHORIZATION"]), authorizations),
    st.tuples(st.sampled_from(["x-api-key", "X-API-Key"]), key_texts),
    st.tuples(st.sampled_from(["x-tenant-id", "X-Tenant-Id"]), tenant_texts),
    st.tuples(st.just("x-cost-meter-gateway-secret"), proofs),
    st.tuples(st.sampled_from(["x-team", "x-work"]), child_texts),
    st.tuples(st.just("x-kind"), child_texts),
    st.tuples(st.just("content-type"), st.sampled_from(["text/plain", "application/json"])),
    st.tuples(st.just("x-request-id"), st.text("abc-", max_size=3)),
)
# What a gateway sends, and what it lets through.
gateways = st.builds(
    lambda proof, *others: [("x-cost-meter-gateway-secret", proof), *others],
    proofs,
    st.tuples(st.just("x-tenant-id"), tenant_texts),
    st.tuples(st.sampled_from(["x-team", "x-work"]), child_texts),
)
header_lists = st.lists(headers.map(lambda header: [header]) | gateways, max_size=4).map(
    lambda groups: [header for group in groups for header in group]
)
first_headers = st.one_of(
    st.just([("Authorization", "Bearer sk-alice")]),
    st.just([("Authorization", f"Bearer {SHARED}")]),
    st.just([("Authorization", "Bearer sk-bob")]),
    st.just([]),
)
content_types = st.sampled_from(
    ["application/json"] * 5 + ["Application/JSON; charset=x", "multipart/form-data; boundary=b"]
)
said = st.sampled_from(["carol", "web", "alice", "x/y", "", "unknown", "\xfc", "c" * 126, None, 5])
models = st.sampled_from(["llama", "org/llama", "sql", "org/sql", "", None, 7])
bodies = st.fixed_dictionaries(
    {"user": said},
    optional={
        "metadata": st.dictionaries(st.sampled_from(["team", "Team"]), said, max_size=2) | said,
        "model": models,
        "prompt": st.just("p"),
    },
)


def written(body: dict[str, Any], style: str) -> bytes:
    text = json.dumps(body)
    if style == "nan":
        text = text[:-1] + (', "n": NaN}' if body else '"n": NaN}')
    if style == "twice":
        text = '{"user": "dave", "user": "eve"' + (", " if body else "") + text[1:]
    if style == "cut":
        return text.encode()[:-1]
    return text.encode(style if style.startswith("utf") else "utf-8")


styles = st.sampled_from(
    ["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "nan", "twice", "cut"]
)


@dataclass(frozen=True)
class Sent:
    """A request as it is written: its path, headers and body, and how it asks to be served."""

    path: str
    headers: Sequence[tuple[str, str]]
    said: bytes
    spaces: int  # behind it; uvicorn pauses a connection whose body is big
    is_chunked: bool
    works_on: bool  # the application generates once more after its reply

    @property
    def body(self) -> bytes:
        return self.said + b" " * self.spaces

    def text(self, name: str, *, is_last: bool) -> bytes:
        lines = [f"POST {self.path} HTTP/1.1", "Host: x", f"X-Name: {name}"]
        lines += [f"{key}: {value}" for key, value in self.headers]
        lines += ["X-Works-On: 1"] if self.works_on else []
        lines += ["Connection: close"] if is_last else []
        if self.is_chunked and self.body:
            half = len(self.body) // 2
            pieces = [piece for piece in (self.body[:half], self.body[half:]) if piece]
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
            lines.append("Transfer-Encoding: chunked")
            return "\r\n".join([*lines, "", ""]).encode("latin-1") + body + b"0\r\n\r\n"
        lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body

    def asked(self) -> Request:
        latin = [(name, value.encode("latin-1")) for name, value in self.headers]
        return Request(latin, self.body)


requests = st.builds(
    lambda path, first, kind, rest, *others: Sent(path, [*first, *kind, *rest], *others),
    st.sampled_from([COMPLETIONS] * 6 + [INVOCATIONS] * 3 + [AUDIO, HEALTH, MODELS]),
    first_headers,
    st.lists(st.tuples(st.just("content-type"), content_types), max_size=1),
    header_lists,
    st.builds(written, bodies, styles) | st.binary(max_size=8),
    st.sampled_from([0, 0, 0, 0, 300_000]),
    st.booleans(),
    st.booleans(),
)
rule_lists = st.builds(
    lambda order, left_out, last: [*order[left_out:], *last],
    st.permutations(RULES),
    st.integers(0, len(RULES)),
    st.sampled_from([[], [], [], LAST_RULES[:1], LAST_RULES[1:], LAST_RULES]),
)

# ---- the server


def application(world: World, is_checking: bool, working: set[asyncio.Task[None]]) -> Starlette:
    """An application that reads its body and generates, as vLLM's does."""

    async def generate(request: Asked) -> JSONResponse:
        name = request.headers["x-name"]
        await request.body()
        world.engine.generate(name)
        await asyncio.sleep(0)

        async def work_on() -> None:
            await asyncio.sleep(0.002)
            world.engine.generate(f"{name}+")

        if "x-works-on" in request.headers:
            working.add(asyncio.create_task(work_on()))
        return JSONResponse({"id": name}, headers={"x-name": name})

    async def answer(request: Asked) -> JSONResponse:
        await request.body()
        return JSONResponse({}, headers={"x-name": request.headers["x-name"]})

    app = Starlette(
        routes=[
            *(Route(path, generate, methods=["POST"]) for path in GENERATING),
            *(Route(path, answer, methods=["POST"]) for path in (HEALTH, MODELS)),
        ]
    )
    app.add_middleware(CostMiddleware, runtime=lambda: world.found)
    if is_checking:
        app.add_middleware(AuthenticationMiddleware, tokens=[*KEYS, SHARED])
    return app


class Server:
    """A server with a loop of its own, which runs only while `talk` does."""

    def __init__(self, world: World, parser: str, loop: Callable[[], Any], is_checking: bool):
        self.world, self.is_checking = world, is_checking
        self._working: set[asyncio.Task[None]] = set()
        app = application(world, is_checking, self._working)
        config = uvicorn.Config(app, port=0, http=parser, lifespan="off", log_level="critical")
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._runner = asyncio.Runner(loop_factory=loop)
        self._runner.run(self._server.startup())
        self._address = self._server.servers[0].sockets[0].getsockname()[:2]

    def close(self) -> None:
        self._runner.run(self._server.shutdown())
        self._runner.close()

    def talk(self, pieces: Sequence[bytes], leaves: bool) -> bytes:
        """Write pieces one by one; return the answers once all work is done."""
        return self._runner.run(asyncio.wait_for(self._talk(pieces, leaves), 60))

    async def _talk(self, pieces: Sequence[bytes], leaves: bool) -> bytes:
        reader, writer = await asyncio.open_connection(*self._address)
        answers = asyncio.create_task(reader.read())
        try:
            for piece in pieces:
                if writer.transport.is_closing():  # The server may close first, as after a 401.
                    break
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001 if len(pieces) > 1 else 0)
            if leaves:
                writer.transport.abort()
            answer = await answers
        except ConnectionError:  # The server may close first.
            answer = b"" if answers.exception() or leaves else answers.result()
        writer.close()
        while self._server.server_state.tasks or self._server.server_state.connections:
            await asyncio.sleep(0.001)
        await asyncio.gather(*self._working)
        self._working.clear()
        return answer


PARSERS = ("h11", "httptools")
LOOPS = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}
SERVERS = list(itertools.product(PARSERS, LOOPS, (True, False)))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Give the server of a parser, a loop and a check; each is made when it is first asked for."""
    made: dict[tuple[Any, ...], Server] = {}
    folder: Path = tmp_path_factory.mktemp("payers")
    with worlds(folder) as make:

        def serve(parser: str, loop: str, is_checking: bool) -> Server:
            key = parser, loop, is_checking
            if key not in made:
                world = make(tenants=DECLARED)
                world.runtime.served = SERVED
                made[key] = Server(world, parser, LOOPS[loop], is_checking)
            return made[key]

        yield serve
        for server in made.values():
            server.close()


DECLARED = [
    {**tenant, "api_key_sha256": [digest(key) for key in tenant.get("api_key_sha256", ())]}
    for tenant in TENANTS
]


# ---- what is expected


def expected(situation: Situation, sent: Sent, is_checking: bool) -> Payer | int:
    """Who pays, or the status of a refusal; 200 if nothing is generated."""
    asked = sent.asked()
    is_guarded = is_checking and sent.path.startswith(GUARDED)
    if is_guarded:
        first = next((v for n, v in asked.headers if n.lower() == "authorization"), b"")
        scheme, _, key = first.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or key not in (*KEYS, SHARED):
            return 401
    if sent.path not in GENERATING:
        return 200
    who = payer(situation, Request(asked.headers, asked.body, is_guarded))
    return 400 if who == CONTRADICTION else who  # type: ignore[return-value]


class Answers(io.BytesIO):
    """All that a server wrote, as the socket that http.client wants."""

    def makefile(self, *_: Any) -> "Answers":
        return self

    def close(self) -> None:
        """Stay open for the next answer."""


def answers_of(told: bytes) -> list[http.client.HTTPResponse]:
    """Take the answers apart; the last one may be cut."""
    stream, found = Answers(told), []
    while stream.tell() < len(told):
        answer = http.client.HTTPResponse(stream)  # type: ignore[arg-type]
        try:
            answer.begin()
            answer.read()
        except (http.client.HTTPException, ValueError):
            break
        found.append(answer)
    return found


def check_answer(answer: http.client.HTTPResponse, name: str, who: Payer | int) -> None:
    tenant = answer.getheader("x-cost-meter-tenant")
    if isinstance(who, Payer):
        assert (answer.status, answer.getheader("x-name")) == (200, name)
        assert tenant == who.tenant
    else:
        assert (answer.status, tenant) == (who, None)


ROWS = (
    "SELECT r.request_id, h.http_request_id, r.tenant, r.tenant_rule, r.tenant_parent, r.tags,"
    " h.tenant FROM requests r LEFT JOIN replies h USING (http_request_id)"
    " WHERE r.request_id LIKE '{}-%'"
)
numbers = itertools.count()


def check_rows(world: World, example: str, sent: dict[str, Sent], whos: dict[str, Any]) -> set[str]:
    """Compare what is billed with who pays; return the names of all billed requests."""
    exchanges: dict[str, str] = {}
    billed: set[str] = set()
    for part, exchange, tenant, rule, parent, tags, told in world.rows(ROWS.format(example)):
        name = part.removesuffix("+")
        assert part not in billed
        billed.add(part)
        found = Payer(tenant, rule, parent, json.loads(tags) if tags else {})
        assert found == whos[name]
        assert told == tenant
        # A request has an exchange of its own, and keeps it while it works on.
        assert exchanges.setdefault(exchange, name) == name
    return billed


@given(
    st.sampled_from(SERVERS),
    rule_lists,
    st.lists(requests, min_size=1, max_size=4),
    st.lists(st.integers(1, 3_000), max_size=3),
    st.none() | st.integers(0, 2_000),
)
@settings(max_examples=examples(1_500))
def test_who_pays_over_a_socket_is_who_the_page_says(serving, where, rules, sent, cuts, leaves_at):
    server = serving(*where)
    world, example = server.world, f"e{next(numbers)}"
    world.runtime.settings = Settings(
        **{"gpu_hour_usd": "36", "bill_timeout_ms": 10_000, "ledger": world.runtime.ledger_url},
        tenants=DECLARED,
        tenant_rules=[as_setting(rule) for rule in rules],
    )
    asked_in_order = rules or [{"rule": "api_key"}]
    situation = Situation(asked_in_order, KEYS, PARENTS, TAGS, SERVED)
    named = {f"{example}-{number}": each for number, each in enumerate(sent)}
    whos = {name: expected(situation, each, server.is_checking) for name, each in named.items()}
    for who in whos.values():
        event(who.rule if isinstance(who, Payer) else str(who))
    last = list(named)[-1]
    whole = b"".join(each.text(name, is_last=name == last) for name, each in named.items())
    leaves = leaves_at is not None and leaves_at < len(whole)
    if leaves:
        whole = whole[:leaves_at]
    ends = [*sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    pieces = [whole[start:end] for start, end in itertools.pairwise([0, *ends])]

    answers = answers_of(server.talk(pieces, leaves))
    billed = check_rows(world, example, named, whos)
    assert world.runtime.guard.errors == 0
    # The server may close a connection once it has refused a request whose body it has not read.
    is_refusing = any(who in (400, 401) for who in whos.values())
    if not (leaves or is_refusing):
        assert len(answers) == len(sent)
    for answer, (name, who) in zip(answers, whos.items(), strict=False):
        check_answer(answer, name, who)
        if isinstance(who, Payer):
            assert name in billed
            assert not named[name].works_on or f"{name}+" in billed


def test_the_model_knows_what_the_page_shows():
    """The model is right where the page gives an example; the page's examples are its anchor."""
    situation = Situation([{"rule": "api_key"}, TENANT_HEADER], KEYS, PARENTS, TAGS, SERVED)
    alice, bob = (("authorization", f"Bearer sk-{name}".encode()) for name in ("alice", "bob"))
    bobs_other = ("x-api-key", b"sk-bob")
    for guarded, free, sent in (
        ("alice", CONTRADICTION, [alice, bob]),
        ("alice", "alice", [alice, ("authorization", b"")]),
        ("alice", CONTRADICTION, [alice, bobs_other]),
        ("bob", "bob", [("authorization", b"Bearer sk-shared"), bobs_other]),
    ):
        for is_guarded, who in ((True, guarded), (False, free)):
            found = payer(situation, Request(sent, b"", is_guarded))
            assert getattr(found, "tenant", found) == who


def test_each_rule_of_the_settings_is_fuzzed():
    kinds = {rule["rule"] for rule in RULES + LAST_RULES}
    assert kinds == set(re.findall(r"\w+", "api_key header user metadata lora model constant"))
