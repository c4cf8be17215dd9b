"""A little world around the API side: an engine that bills when told, an application, a client.

The runtime, its ledger and the middleware are the real ones; the engine is these few lines, and
calls the runtime just as vLLM's hooks do.
"""

import asyncio
import contextlib
import errno
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from tests.support.builders import make_bill
from tests.support.raw_rows import texts
from vllm_cost_meter.api_server.collector import Collector
from vllm_cost_meter.api_server.middleware import CostMiddleware
from vllm_cost_meter.api_server.open_requests import OpenRequests
from vllm_cost_meter.api_server.request_body import BODY_BYTES_MAX
from vllm_cost_meter.api_server.runtime import NoRuntime, Runtime
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.exchange import Birth, current_exchange
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.journal.segments import Segment
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.metrics import series
from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.units.time import NS_PER_HOUR

JSON = b"application/json"
SSE = b"text/event-stream; charset=utf-8"
COST_HEADERS = [
    b"x-cost-meter-cost-usd",
    b"x-cost-meter-gpu-seconds",
    b"x-cost-meter-marginal-cost-usd",
    b"x-cost-meter-request-id",
    b"x-cost-meter-tenant",
    b"x-litellm-response-cost",
]
# What an application replies, whole and as a stream.
BODY = json.dumps(
    {
        "id": "cmpl-1",
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
).encode()
TOKEN = b'data: {"choices":[{"text":"a","usage":null}],"usage":null}\n\n'
USAGE = b'data: {"id":"cmpl-1","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"
# By this header a client asks for a comment in its stream.
ASKED = (b"x-cost-meter-comment", b"true")
# Where the fields of the meter begin in a usage object, at what `Engine.billed` bills.
COST = b',"cost":0.000000030,"cost_details":'
# 36 USD an hour are 0.01 nano-USD a nanosecond: costs can be told at a glance.
GPU_HOUR_USD = "36"


def make_runtime(
    folder: Path, open_requests: OpenRequests | None = None, *, opens: bool = True, **settings: Any
) -> Runtime:
    """A runtime of its own, with a ledger in the folder that is open already if it `opens`."""
    ledger = f"sqlite:///{folder / 'ledger.db'}"
    given = {"gpu_hour_usd": GPU_HOUR_USD, "ledger": ledger, **settings}
    # Tests of the bound set their own; no other may fail because the machine is busy.
    given = {"bill_timeout_ms": 10_000, **given}
    runtime = Runtime(Settings(**given), open_requests=open_requests)
    runtime.is_served = True  # as by an application that started it
    if opens:
        journal(runtime)
    return runtime


def journal(runtime: Runtime, *records: Record) -> None:
    """Journal records, and have the ledger hold all that was handed over until now."""
    runtime.writer.append(*records).result(10)
    assert catch_up(runtime.ledger_url) == 0


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no journal of this process grow, as on a full disk."""
    real = Segment.append

    def full(segment: Segment, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Segment.append = full  # type: ignore[method-assign]
    try:
        yield
    finally:
        Segment.append = real  # type: ignore[method-assign]


class RefusedError(Exception):
    """An engine request was refused; the application answers its client with this message."""


class Engine:
    """Gives birth to engine requests and bills them, in the calls that vLLM's hooks make."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.seq = 0

    def born(self, request_id: str, external_id: str | None = None, **changes: Any) -> None:
        birth = Birth(
            **{
                "request_id": request_id,
                "external_id": external_id or request_id,
                "prompt_group": request_id,
                "lora": None,
                "arrived_at_ns": time.time_ns(),
                "exchange": current_exchange.get(),
                "times": None,
                **changes,
            }
        )
        self.runtime.run("add_request", Collector.born, birth)

    def asked(self, request_id: str, **changes: Any) -> None:
        """Give birth to an engine request unless that is refused: RefusedError, as vLLM has one."""
        exchange = changes.get("exchange", current_exchange.get())
        refusal = self.runtime.run("refuse", Collector.refused, exchange)
        if refusal is not None:
            raise RefusedError(refusal.message)
        self.born(request_id, **changes)

    def bill(self, request_id: str, prefill_ns: int = 1_000, decode_ns: int = 2_000) -> Bill:
        self.seq += 1
        hour = time.time_ns() // NS_PER_HOUR
        pieces = (UsagePiece(hour, prefill_ns, decode_ns, 8, 5, marginal_ns=2_000),)
        return make_bill(seq=self.seq, request_id=request_id, pieces=pieces)

    def billed(self, request_id: str, prefill_ns: int = 1_000, decode_ns: int = 2_000) -> None:
        bill = self.bill(request_id, prefill_ns, decode_ns)
        self.runtime.run("bill", Collector.billed, bill)

    def generate(self, request_id: str = "r") -> None:
        self.born(request_id)
        self.billed(request_id)


class Client:
    """What a client of one exchange saw, message by message."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.at_s: list[float] = []
        self.started_s = time.monotonic()

    async def send(self, message: Any) -> None:
        self.messages.append(dict(message))
        self.at_s.append(time.monotonic() - self.started_s)

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return list(self.messages[0]["headers"])

    @property
    def ours(self) -> dict[bytes, bytes]:
        """The headers that the meter added."""
        return {name: value for name, value in self.headers if b"cost" in name}

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages if m["type"].endswith(".body"))

    @property
    def waited_s(self) -> float:
        return self.at_s[0]


def event_of(name: str, **data: object) -> bytes:
    """An event as Anthropic's and the Responses API send it."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


def scope_of(
    path: str = "/v1/completions",
    headers: Iterable[tuple[bytes, bytes]] = (),
    type: str = "http",
    **more: Any,
) -> dict[str, Any]:
    return {"type": type, "method": "POST", "path": path, "headers": list(headers), **more}


async def no_more_messages() -> dict[str, Any]:
    """A client that stays: it has nothing to say, for ever."""
    await asyncio.Event().wait()
    raise AssertionError


App = Callable[[Any, Any, Any], Awaitable[None]]


def replying(
    content_type: bytes,
    bodies: Sequence[bytes],
    before: Callable[[], Any] = lambda: None,
    status: int = 200,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> App:
    """An application that calls `before`, then replies with these body messages."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        result = before()
        if asyncio.iscoroutine(result):
            await result
        start = [(b"content-type", content_type), *headers]
        await send({"type": "http.response.start", "status": status, "headers": start})
        for number, body in enumerate(bodies, 1):
            more = number < len(bodies)
            await send({"type": "http.response.body", "body": body, "more_body": more})

    return app


def misses() -> int:
    """The misses that the metrics of this process show."""
    return int(series.MISSES._value.get())


class World:
    """One API server: its runtime, its engine, and its ledger's file."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.path = folder / "ledger.db"
        self.runtime = make_runtime(folder, **changes)
        self.collector = self.runtime.collector
        self.engine = Engine(self.runtime)
        # What the middleware finds in this process: the runtime, or what stands in for it.
        self.found: Runtime | NoRuntime = self.runtime
        self.body_bytes_max = BODY_BYTES_MAX
        self._misses_before = misses()

    @property
    def misses(self) -> int:
        """The replies that went out without their cost."""
        return misses() - self._misses_before

    def let_replies_wait(self, seconds: float) -> None:
        """Change how long a reply may wait for its bill, as a reloaded setting would."""
        changed = {"bill_timeout_ms": round(seconds * 1000)}
        self.runtime.settings = self.runtime.settings.model_copy(update=changed)

    def metered(self, app: App) -> CostMiddleware:
        """The application behind the middleware of this API server."""
        return CostMiddleware(app, lambda: self.found, self.body_bytes_max)

    async def ask(
        self, app: App, scope: dict[str, Any] | None = None, receive: Any = no_more_messages
    ) -> Client:
        client = Client()
        await self.metered(app)(scope or scope_of(), receive, client.send)
        return client

    def run(self, app: App, scope: dict[str, Any] | None = None, **more: Any) -> Client:
        return asyncio.run(self.ask(app, scope, **more))

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Answer a query from the file, once all that was handed over is written."""
        journal(self.runtime)
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            return texts(connection.execute(query))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the ledger as another process's transaction would."""
        blocker = sqlite3.connect(self.path, isolation_level=None)
        try:
            blocker.execute("BEGIN EXCLUSIVE")
            yield
        finally:
            blocker.close()


@contextlib.asynccontextmanager
async def listening(app: Any, http: str = "auto") -> AsyncIterator[tuple[str, int]]:
    """Serve an application from a real uvicorn; yield its host and port."""
    config = uvicorn.Config(app, port=0, http=http, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        host, port = server.servers[0].sockets[0].getsockname()
        yield host, port
    finally:
        server.should_exit = True
        await serving


@contextlib.contextmanager
def worlds(folder: Path) -> Iterator[Callable[..., World]]:
    """Make worlds with the settings given, and end them."""
    made: list[World] = []

    def make(**changes: Any) -> World:
        place = folder / str(len(made))
        place.mkdir()
        made.append(World(place, **changes))
        return made[-1]

    yield make
    for world in made:
        world.runtime.writer.close(5)
