"""The doctor: each check finds what it looks for, and what is wrong with it."""

import contextlib
import json
import socket
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

from tests.component.ledger.test_reader import part, snapshot
from tests.support.nvml import A, Card, nvmls
from tests.support.small_ledger import live_now
from vllm_cost_meter.api_server.background import Loop
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.cli.doctor import examine
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.endpoint.answers import NO_METER
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.writer import LedgerWriter
from vllm_cost_meter.prices.book import PriceBook, PriceEntry, RunMatch

CHECKS = [
    "entry points",
    "named",
    "native",
    "vllm",
    "ledger",
    "books",
    "server",
    "cost model",
    "price",
    "energy",
    "access",
]


@pytest.fixture(autouse=True)
def named(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "cost_meter,other")
    # Another server may run on this machine.
    monkeypatch.setenv("COST_METER_PORT", "off")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    bills = [part(1)]
    writer = LedgerWriter(f"sqlite:///{path}")
    writer.start()
    writer.commit(*bills, snapshot(bills)).result(10)
    writer.close(5)
    return path


def findings(path: Path, **options: Any) -> dict[str, tuple[bool, str]]:
    return {f.name: (f.ok, f.detail) for f in examine(f"sqlite:///{path}", **options)}


def sql(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def test_a_good_installation_passes_every_check(path):
    found = findings(path)
    assert list(found) == CHECKS
    assert all(ok for ok, _ in found.values()), found
    assert found["books"][1] == "1 engine runs balance"


def test_the_command_prints_one_line_a_check_or_one_json_object(path):
    text = CliRunner().invoke(app, ["doctor", "--ledger", str(path)])
    assert text.exit_code == 0
    assert [line.partition(":")[0] for line in text.stdout.splitlines()] == [
        f"ok   {name}" for name in CHECKS
    ]
    answer = json.loads(CliRunner().invoke(app, ["doctor", "--json", "--ledger", str(path)]).stdout)
    assert answer["ok"] is True
    assert [finding["name"] for finding in answer["findings"]] == CHECKS
    assert set(answer["findings"][0]) == {"name", "ok", "detail"}


def test_once_tenants_are_declared_refusing_the_unnamed_is_recommended(path):
    acme = {"name": "acme", "api_key_sha256": ["ab" * 32]}
    for settings, said in (
        (Settings(), "every request has the same right to be served"),
        (Settings(tenants=[acme]), "recommended: COST_METER_UNNAMED_REQUESTS=refuse"),
        (Settings(tenants=[acme], unnamed_requests="refuse"), "that no rule names are refused"),
    ):
        ok, detail = findings(path, settings=settings)["access"]
        assert ok
        assert said in detail


def test_a_ledger_that_is_not_there_is_made(tmp_path):
    found = findings(tmp_path / "new" / "ledger.db")
    assert found["ledger"] == (True, f"sqlite:///{tmp_path}/new/ledger.db can be written")
    assert found["books"][0]


def test_a_ledger_that_cannot_be_written_fails_and_so_does_the_command(tmp_path):
    found = findings(tmp_path)
    assert "expected a file, got a folder" in found["ledger"][1]
    result = CliRunner().invoke(app, ["doctor", "--ledger", str(tmp_path)])
    assert result.exit_code == 1
    assert "FAIL ledger: " in result.stdout
    as_json = CliRunner().invoke(app, ["doctor", "--json", "--ledger", str(tmp_path)])
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["ok"] is False


def test_books_that_do_not_balance_fail(path):
    sql(path, "DELETE FROM requests")
    sql(path, "UPDATE snapshots SET taken_at = '2020-01-01T00:00:00.000000Z'")
    ok, detail = findings(path)["books"]
    assert not ok
    assert "vllm-cost-meter audit says where" in detail


def test_an_engine_whose_meter_is_off_fails(path):
    sql(path, "UPDATE snapshots SET state = 'off'")
    live_now(path)
    ok, detail = findings(path)["books"]
    assert not ok
    assert "switched itself off in run run" in detail


def test_a_ledger_that_is_locked_is_a_ledger_that_cannot_be_written(path):
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        ok, detail = findings(path, ledger_timeout_s=0.1)["ledger"]
    finally:
        blocker.close()
    assert not ok
    assert "locked" in detail


@pytest.mark.parametrize("plugins", ["other", ""])
def test_plugins_that_leave_the_meter_out_fail(path, monkeypatch, plugins):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    ok, detail = findings(path)["named"]
    assert not ok
    assert "leaves cost_meter out" in detail


def test_plugins_that_are_unset_need_the_flag(path, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS")
    assert findings(path)["named"] == (
        True,
        "VLLM_PLUGINS is unset: start with --plugins cost_meter",
    )


def test_a_ledger_that_refuses_a_write_cannot_be_written(path):
    """What SQLite says when a disk is full, said here by a trigger."""
    sql(
        path,
        "CREATE TRIGGER full BEFORE UPDATE ON schema_version"
        " BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END",
    )
    ok, detail = findings(path)["ledger"]
    assert not ok
    assert detail.endswith("database or disk is full")


def test_a_password_in_the_ledgers_url_is_not_shown():
    found = {f.name: f.detail for f in examine("postgresql+psycopg://me:s3cret@127.0.0.1:1/x")}
    assert "s3cret" not in str(found)


def priced(path: Path, *entries: PriceEntry) -> tuple[bool, str]:
    found = {f.name: f for f in examine(f"sqlite:///{path}", PriceBook(entries))}
    return found["price"].ok, found["price"].detail


def test_the_price_in_force_is_named_with_its_source_for_the_latest_run(path):
    then = PriceEntry("prices[0]", Decimal("2"), "old list", 0, matches=RunMatch(host="node-1"))
    now = PriceEntry("prices[1]", Decimal("3"), "list", 1, matches=RunMatch(host="node-1"))
    later = PriceEntry("prices[2]", Decimal("4"), "x", 10**6, matches=RunMatch(host="node-1"))
    other = PriceEntry("prices[3]", Decimal("5"), "y", 1)
    assert priced(path, then, now, later, other) == (
        True,
        "now 3 USD per GPU-hour (gpu, from 1970-01-01T01Z, list), by prices[1]",
    )


def test_no_price_at_all_is_no_fault(path):
    assert priced(path) == (
        True,
        "none now, so cost is null: none is set by COST_METER_GPU_HOUR_USD or [[prices]]",
    )


def test_prices_of_which_none_is_for_the_latest_run_fail(path, tmp_path):
    other = PriceEntry("prices[0]", Decimal("2"), "list", 0, matches=RunMatch(host="node-2"))
    ok, detail = priced(path, other)
    assert not ok
    assert detail == (
        "none now, so cost is null: no entry matches model 'm', GPU 'a GPU', host 'node-1'"
    )
    assert priced(tmp_path / "new.db", other)[0], "no engine has run yet"


def test_the_command_takes_the_prices_of_the_settings(path, monkeypatch):
    monkeypatch.setenv("COST_METER_GPU_HOUR_USD", "2.49")
    said = CliRunner().invoke(app, ["doctor", "--ledger", str(path)]).stdout
    assert (
        "ok   price: now 2.49 USD per GPU-hour (gpu, COST_METER_GPU_HOUR_USD), by"
        " COST_METER_GPU_HOUR_USD\n"
    ) in said


def test_a_gpu_whose_energy_can_be_read_is_named(machine, path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine.add(Card(A))
    detail = f"the counter of NVIDIA H100 80GB HBM3 ({A}) can be read"
    assert findings(path)["energy"] == (True, detail)


def test_a_gpu_whose_energy_cannot_be_read_says_why_and_fails_nothing(machine, path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine.add(Card(A, mig_mode=1))
    ok, detail = findings(path)["energy"]
    assert ok
    assert detail.startswith("not measured: a MIG slice has no counter")


def test_a_machine_without_a_driver_passes(tmp_path, path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with nvmls(tmp_path / "none.so", tmp_path / "script"):
        assert findings(path)["energy"] == (
            True,
            "not measured: no libnvidia-ml.so.1, so no NVIDIA driver is here",
        )


def test_an_installation_without_the_binding_fails(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    ok, detail = findings(path)["energy"]
    assert not ok
    assert "pip install nvidia-ml-py" in detail


# ---- the server


@contextlib.contextmanager
def answering(**health) -> Iterator[Settings]:
    """Serve the side endpoint of a meter that does as told; yield the settings that name it."""
    told = {**NO_METER, "status": "ok", "loops": [Loop("poll").health()], **health}
    with (
        tempfile.TemporaryDirectory() as folder,
        LedgerReader(f"sqlite:///{folder}/ledger.db", create=True) as reader,
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
    assert detail.startswith("none answers at http://127.0.0.1:PORT: ")
