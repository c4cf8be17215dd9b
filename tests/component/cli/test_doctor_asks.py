"""The doctor beside a server: whom it asks, and what it makes of the answer."""

import contextlib
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tests.support.builders import make_snapshot
from tests.support.doctor import findings, named, path, state_of_check
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.api_server.background import Loop
from vllm_cost_meter.cli.doctor import examine
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.endpoint.answers import NO_METER
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.errors import LedgerError, ServerError
from vllm_cost_meter.lab.sweep.side_client import SideClient
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook, PriceEntry
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR

__all__ = ["named", "path"]


def ledger_in(folder: str) -> str:
    """Make an empty ledger; return its URL."""
    url = f"sqlite:///{folder}/ledger.db"
    open_database(url).dispose()
    return url


@contextlib.contextmanager
def answering(ledger: Path | None = None, book=NO_PRICES, **health) -> Iterator[Settings]:
    """Serve the side endpoint of a meter that does as told; yield the settings that name it.

    Without a ledger it has an empty one of its own.
    """
    told = {**NO_METER, "status": "ok", "loops": [Loop("poll").health()], **health}
    with (
        tempfile.TemporaryDirectory() as folder,
        LedgerReader(
            ledger_in(folder) if ledger is None else f"sqlite:///{ledger}", book=book
        ) as reader,
    ):
        access = Access(sha256("token-of-the-admin"))
        app = make_app(reader, access=access, health=lambda: told)
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            port = listening.getsockname()[1]
            yield Settings(port=port, admin_token="token-of-the-admin")
        finally:
            server.should_exit = True
            thread.join()
            listening.close()


def ran_now(path: Path) -> None:
    """Write a ledger of an engine that was idle until now, in this hour."""
    now_ns = time.time_ns()
    totals = ClassTotals(idle=10**9)
    state = make_snapshot(
        taken_at_ns=now_ns,
        started_at_ns=now_ns - totals.total(),
        totals=totals,
        hours={now_ns // NS_PER_HOUR: totals},
    )
    writer = LedgerWriter(f"sqlite:///{path}")
    writer.start()
    writer.commit(state).result(10)
    writer.close()


def server_of(path: Path, settings: Settings) -> tuple[bool, str]:
    (found,) = [f for f in examine(f"sqlite:///{path}", settings=settings) if f.name == "server"]
    return found.ok, found.detail.replace(str(settings.port), "PORT")


def test_a_server_whose_meter_works_says_so(path):
    with answering() as settings:
        assert server_of(path, settings) == (True, "http://127.0.0.1:PORT says ok; poll work")


def test_a_server_whose_loop_fails_is_a_failed_check_that_names_it(path):
    clock = iter([0, 90 * 10**9])
    loop = Loop("budgets", lambda: next(clock))
    loop.failed(LedgerError("ledger x: is away"))
    with answering(status="failing", loops=[loop.health()]) as settings:
        assert server_of(path, settings) == (
            False,
            "http://127.0.0.1:PORT says failing; budgets fails for 90 s"
            " (LedgerError: ledger x: is away)",
        )


def test_a_server_that_is_off_or_cannot_write_is_a_failed_check(path):
    with answering(status="off", loops=[], ledger_error="OperationalError: full") as settings:
        assert server_of(path, settings) == (
            False,
            "http://127.0.0.1:PORT says off; the meter switched itself off: see the log, and"
            " restart the server; the ledger cannot be written: OperationalError: full",
        )


def test_a_side_process_that_ended_is_said_though_it_is_back(path):
    ended = {"process": "side endpoint", "state": "ok", "pid": 7, "restarts": 2}
    side = {**ended, "last_end": "was ended by SIGKILL"}
    with answering(side_processes=[side]) as settings:
        assert server_of(path, settings) == (
            True,
            "http://127.0.0.1:PORT says ok; the process of the side endpoint ended 2 times, the"
            " last time it was ended by SIGKILL",
        )


def test_no_server_is_no_fault_and_one_that_wants_another_token_says_what_to_do(path):
    with answering() as settings:
        other = Settings(port=settings.port, admin_token="another-token-of-an-admin")
        assert server_of(path, other) == (
            False,
            "http://127.0.0.1:PORT answers 401 to /cost/health; set COST_METER_ADMIN_TOKEN",
        )
        digest = Settings(port=settings.port, admin_token_sha256=sha256("token-of-the-admin"))
        ok, detail = server_of(path, digest)
        assert ok
        assert detail.startswith("not asked: of the token")
    ok, detail = server_of(path, settings)
    assert ok
    assert detail.startswith("none answers at http://127.0.0.1:PORT/cost/health: ")


def test_a_server_that_was_named_and_does_not_answer_is_a_fault(path):
    with answering() as settings:
        pass
    url = f"http://127.0.0.1:{settings.port}/"
    state, detail = state_of_check(path, "server", server_url=url)
    assert state == "fail"
    assert detail.startswith(f"none answers at {url}cost/health: ")


def test_a_server_is_asked_for_its_own_price_whatever_this_shell_has(tmp_path):
    path = tmp_path / "ledger.db"
    ran_now(path)
    entry = PriceEntry("prices[0]", Decimal("2.49"), "contract 17", None)
    with answering(path, PriceBook([entry])) as settings:
        state, detail = state_of_check(path, "price", settings=settings)
        url = f"http://127.0.0.1:{settings.port}"
        theirs = f"now 2.49 USD per GPU-hour (gpu, contract 17), by {url}"
        none = "none now, so cost is null: none is set by COST_METER_GPU_HOUR_USD or [[prices]]"
        assert (state, detail) == ("ok", f"{theirs}; these settings differ: {none}")
        other = PriceBook([PriceEntry("prices[0]", Decimal(3), "a guess", None)])
        state, detail = state_of_check(path, "price", settings=settings, book=other)
        assert state == "warn"
        assert detail.startswith(f"{theirs}; these settings differ: now 3 USD per GPU-hour")
        same = PriceBook([entry])
        assert state_of_check(path, "price", settings=settings, book=same) == ("ok", theirs)
        found = {f.name: f for f in examine(f"sqlite:///{path}", settings=settings)}
        assert found["books"].detail == "1 engine runs balance"
        assert found["ledger"].outcome.name == "OK"


def test_a_server_that_writes_to_another_ledger_is_said(path):
    with answering() as settings:
        state, detail = state_of_check(path, "ledger", settings=settings)
    assert state == "warn"
    assert f"; http://127.0.0.1:{settings.port} writes to sqlite:////" in detail


class Foreign(BaseHTTPRequestHandler):
    """Another program: it answers as its server was told, and notes the tokens that it saw."""

    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get("authorization"))
        status, headers, body = self.server.told
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def foreign(status: int, body: bytes = b"", **headers: str) -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Foreign) as server:
        server.told, server.seen = (status, headers, body), []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<!DOCTYPE html>", "got '<!DOCTYPE html>': another program"),
        (b"", "got an empty answer: another program"),
        (b"[1]", "got other JSON (Expected `object`, got `array`): another program"),
        (b'{"status": "UP"}', "got other JSON (Object missing required field `errors`): another"),
    ],
)
def test_another_program_at_the_address_is_one_line_with_address_and_answer(path, body, said):
    with foreign(200, body) as server:
        settings = Settings(port=server.server_port)
        state, detail = state_of_check(path, "server", settings=settings)
    assert state == "fail"
    assert f"at http://127.0.0.1:{server.server_port}/cost/health, {said}" in detail
    assert "\n" not in detail


def test_a_redirect_is_not_followed_and_the_token_goes_nowhere_else(path):
    with foreign(200) as other:
        to = f"http://127.0.0.1:{other.server_port}/"
        with foreign(302, Location=to) as server:
            settings = Settings(port=server.server_port, admin_token="token-of-the-admin")
            state, detail = state_of_check(path, "server", settings=settings)
            with pytest.raises(ServerError, match="a redirect to"):
                SideClient(f"http://127.0.0.1:{server.server_port}", "a-token").deployment()
    assert state == "fail"
    assert f"answered 302, a redirect to '{to}' that is not followed" in detail
    assert server.seen == ["Bearer token-of-the-admin", "Bearer a-token"]
    assert other.seen == []


def test_a_ledger_that_is_locked_is_a_ledger_that_cannot_be_written(path):
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        ok, detail = findings(path, ledger_timeout_s=0.1)["ledger"]
        # Beside a server it may be at work on it: that passes.
        with answering() as settings:
            state, said = state_of_check(path, "ledger", settings=settings, ledger_timeout_s=0.1)
    finally:
        blocker.close()
    assert not ok
    assert detail.endswith("cannot be written: database is locked")
    assert state == "warn"
    assert "database is locked now: http://127.0.0.1:" in said
