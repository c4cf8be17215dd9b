"""Where a ledger may live and how it is opened: real files, mounts given as text."""

import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import inspect, select, text

from tests.component.ledger.test_reader import http, part
from tests.support.builders import make_bill, make_part, make_snapshot
from tests.support.ledger_writer import LedgerWriter
from tests.support.older import as_version_17
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import (
    check_location,
    default_url,
    filesystem_of,
    open_database,
    parse_url,
    writing,
)
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.rollups.rebuilding import wrong_histograms
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION, metadata, requests
from vllm_cost_meter.records.requests import Latencies
from vllm_cost_meter.records.snapshot import ClassTotals

NOBODY = 65_534  # a user id without rights
MOUNTS = (
    "/dev/vda / ext4 rw 0 0\n"
    "server:/home /home nfs4 rw 0 0\n"
    "/dev/vdb /home/local ext4 rw 0 0\n"
    "user@host: /mnt/my\\040files fuse.sshfs rw 0 0\n"
    "tmpfs /home/local/tmp tmpfs rw 0 0\n"
)


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


def test_the_default_is_a_file_in_the_xdg_state_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_url() == f"sqlite:///{tmp_path}/vllm-cost-meter/ledger.db"


@pytest.mark.parametrize("state", ["", "relative"])
def test_without_a_usable_xdg_folder_the_default_is_in_the_home(monkeypatch, tmp_path, state):
    monkeypatch.setenv("XDG_STATE_HOME", state)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_url() == f"sqlite:///{tmp_path}/.local/state/vllm-cost-meter/ledger.db"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ledger.db",
        "mysql://host/db",
        "nosuch://x/y",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite+aiosqlite:///x.db",
        "postgresql+asyncpg://u@h/d",
        "sqlite:///file:x.db?uri=true",
        "http://[::1",
    ],
)
def test_a_url_we_cannot_use_is_refused_with_one_line(url):
    with pytest.raises(LedgerError, match="expected") as caught:
        parse_url(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["mysql://u:hunter2@h/db", "mysql//u:hunter2@h/db"])
def test_a_refusal_does_not_tell_the_password(url):
    with pytest.raises(LedgerError) as caught:
        parse_url(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/x", "ext4"),
        ("/home/me/x", "nfs4"),
        ("/home/local/x", "ext4"),
        ("/home/localother/x", "nfs4"),
        ("/home/local/tmp/x", "tmpfs"),
        ("/mnt/my files/x", "fuse.sshfs"),
    ],
)
def test_the_longest_mount_point_names_the_filesystem(path, kind):
    assert filesystem_of(Path(path), MOUNTS) == kind


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "9p", "lustre", "ceph", "fuse.sshfs"])
def test_a_network_filesystem_is_refused_with_one_line(tmp_path, kind):
    mounts = f"/dev/vda / ext4 rw 0 0\nserver: {tmp_path} {kind} rw 0 0\n"
    with pytest.raises(LedgerError, match="network filesystem") as caught:
        check_location(url_of(tmp_path / "ledger.db"), mounts=mounts)
    assert kind in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_local_file_is_accepted_and_its_folder_is_private(tmp_path):
    check_location(url_of(tmp_path / "state" / "meter" / "ledger.db"))
    assert stat.S_IMODE((tmp_path / "state" / "meter").stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be created"):
        check_location(url_of(tmp_path / "file" / "ledger.db"))
    with pytest.raises(LedgerError, match="got a folder"):
        check_location(url_of(tmp_path))


@contextmanager
def not_root() -> Iterator[None]:
    """Let go of root's rights, which would allow everything, and take them back."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_folder_that_cannot_be_written_is_refused():
    # Not tmp_path: only root may even look into that where the tests run as root.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        with not_root(), pytest.raises(LedgerError, match="cannot write in the folder"):
            check_location(url_of(Path(folder) / "ledger.db"))
        Path(folder).chmod(0o700)


def test_the_files_of_a_ledger_are_for_their_owner_only(tmp_path):
    path = tmp_path / "meter" / "ledger.db"
    engine = open_database(url_of(path))
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO prices VALUES ('p', '1', 's', 'now', NULL)"))
        files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    engine.dispose()
    assert files == dict.fromkeys(["ledger.db", "ledger.db-wal", "ledger.db-shm"], 0o600)


def test_a_ledger_is_in_wal_mode_and_has_every_table(tmp_path):
    engine = open_database(url_of(tmp_path / "ledger.db"))
    with engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 1
        assert set(inspect(connection).get_table_names()) == set(metadata.tables)
    engine.dispose()


def test_a_ledger_of_a_newer_meter_is_refused(tmp_path):
    url = url_of(tmp_path / "ledger.db")
    engine = open_database(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE schema_version SET version = 99"))
    engine.dispose()
    with pytest.raises(LedgerError, match="schema version 99"):
        open_database(url)


def test_a_ledger_of_an_older_meter_is_brought_up_to_date_and_keeps_its_bills(tmp_path):
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as old:
        old.executescript((Path(__file__).parent / "ledger_v1.sql").read_text())
    with pytest.raises(
        LedgerError,
        match=f"version 1, this cost meter needs {SCHEMA_VERSION}; run `vllm-cost-meter",
    ):
        open_database(url_of(path), create=False)
    open_database(url_of(path)).dispose()
    engine = open_database(url_of(path), create=False)
    with engine.connect() as connection:
        found = inspect(connection)
        for name, table in metadata.tables.items():
            columns = {column["name"] for column in found.get_columns(name)}
            assert columns == set(table.c.keys()), name
        kept = connection.execute(text("SELECT gpu_time_ns, marginal_ns, batch FROM requests"))
        assert kept.all() == [(300, 0, 0)]
        energy = connection.execute(text("SELECT energy_mj, energy_reason FROM snapshots"))
        assert energy.all() == [(None, "earlier: this version did not measure it")]
    engine.dispose()
    reader = LedgerReader(url_of(path))
    assert reader.audit()["balanced"]
    writer = LedgerWriter(url_of(path))
    writer.start()
    writer.commit(make_part(make_bill(run_id="new"))).result(10)
    writer.close()


def test_a_ledger_of_before_bills_were_imported_gets_their_tables_and_keeps_the_rest(tmp_path):
    url = url_of(tmp_path / "ledger.db")
    bills = ("billing_snapshots", "invoice_lines", "billed_hours")
    engine = open_database(url)
    with engine.begin() as connection:
        for table in bills:
            connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("UPDATE schema_version SET version = 5"))
        connection.execute(text("INSERT INTO prices VALUES ('p', '1', 's', 'now', NULL)"))
    engine.dispose()
    with pytest.raises(
        LedgerError,
        match=f"version 5, this cost meter needs {SCHEMA_VERSION}; run `vllm-cost-meter",
    ):
        open_database(url, create=False)
    engine = open_database(url)
    with engine.connect() as connection:
        assert set(bills) < set(inspect(connection).get_table_names())
        assert connection.execute(text("SELECT price_id FROM prices")).all() == [("p",)]
    engine.dispose()


def test_a_price_of_before_blocks_could_have_one_charges_nothing_for_them(tmp_path):
    url = url_of(tmp_path / "ledger.db")
    engine = open_database(url)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE prices DROP COLUMN usd_per_kv_block_hour"))
        connection.execute(text("INSERT INTO prices VALUES ('p', '1', 's', 'now')"))
        connection.execute(text("UPDATE schema_version SET version = 15"))
    engine.dispose()
    engine = open_database(url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT * FROM prices")).all() == [
            ("p", "1", "s", "now", None)
        ]
    engine.dispose()


def test_a_run_of_before_there_was_a_policy_had_its_preemptions_paid_by_the_victim(tmp_path):
    url = url_of(tmp_path / "ledger.db")
    writer = LedgerWriter(url)
    writer.start()
    writer.commit(make_snapshot()).result(10)
    writer.close()
    added = [
        *(("runs", "preemption_paid_by"), ("snapshots", "recomputed_mj")),
        *((table, "recomputed_ns") for table in ("snapshots", "engine_hours")),
        ("energy_hours", "recomputed_mj"),
    ]
    engine = open_database(url)
    with engine.begin() as connection:
        for table, column in added:
            connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        connection.execute(text("UPDATE schema_version SET version = 15"))
    engine.dispose()
    open_database(url).dispose()
    with closing(LedgerReader(url)) as reader:
        assert reader.audit()["balanced"]
        summary = reader.summary()
    assert (summary["recomputed_ns"], summary["recomputed_mj"]) == (0, None)
    assert summary["runs"][0]["preemption_paid_by"] == "victim"


def test_a_bill_of_before_tokens_cut_off_were_counted_has_none_and_still_adds_up(tmp_path):
    url = url_of(tmp_path / "ledger.db")
    writer = LedgerWriter(url)
    writer.start()
    totals = ClassTotals(requests=300)
    writer.commit(make_part(), make_snapshot(totals=totals, last_seq=1, billed_ns=300)).result(10)
    writer.close()
    engine = open_database(url)
    with engine.begin() as connection:
        for table in ("requests", "usage_pieces"):
            for column in ("cut_ns", "cut_tokens"):
                connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        connection.execute(text("UPDATE schema_version SET version = 6"))
    engine.dispose()
    with pytest.raises(
        LedgerError,
        match=f"version 6, this cost meter needs {SCHEMA_VERSION}; run `vllm-cost-meter",
    ):
        open_database(url, create=False)
    open_database(url).dispose()
    reader = LedgerReader(url)
    (row,) = reader.look_up("internal-1")
    (part,) = row["parts"]
    assert (part["gpu_time_ns"], part["cut_ns"], part["cut_tokens"]) == (300, 0, 0)
    assert reader.audit()["balanced"]
    reader.close()


def test_a_run_shows_its_labels_and_one_of_before_there_were_any_has_none_that_are_known(tmp_path):
    url = url_of(tmp_path / "ledger.db")
    writer = LedgerWriter(url)
    writer.start()
    writer.commit(make_snapshot(labels={"pool": "spot", "zone": "ü"})).result(10)
    writer.close()
    reader = LedgerReader(url)
    assert [run["labels"] for run in reader.summary()["runs"]] == [{"pool": "spot", "zone": "ü"}]
    reader.close()
    engine = open_database(url)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE runs DROP COLUMN labels"))
        connection.execute(text("UPDATE schema_version SET version = 7"))
    engine.dispose()
    open_database(url).dispose()
    reader = LedgerReader(url)
    (run,) = reader.summary()["runs"]
    assert run["labels"] is None
    reader.close()


def test_a_request_of_before_all_tenants_above_were_kept_is_its_parents(tmp_path):
    url = url_of(tmp_path / "ledger.db")
    writer = LedgerWriter(url)
    writer.start()
    of_web = {"tenant": "web", "tenant_parent": "search", "http_request_id": "h1"}
    writer.commit(make_part(**of_web), http("h1", tenant="web"), http("h2", at=1)).result(10)
    writer.close()
    engine = open_database(url)
    tables = ("requests", "open_requests", "http_requests")
    with engine.begin() as connection:
        as_version_17(connection.exec_driver_sql)
        for table in tables:
            connection.execute(text(f"ALTER TABLE {table} DROP COLUMN tenant_above"))
        connection.execute(text("UPDATE schema_version SET version = 8"))
    engine.dispose()
    open_database(url).dispose()
    reader = LedgerReader(url)
    for name, ids in (("search", ["h1"]), ("web", ["h1"]), ("sea", []), ("alice", ["h2"])):
        page = reader.requests(tenant=name)
        assert [row["http_request_id"] for row in page["requests"]] == ids
    reader.close()


def test_latencies_that_are_migrated_are_rounded_as_their_sums_are(tmp_path):
    path = tmp_path / "ledger.db"
    engine = open_database(url_of(path))
    us = [0.5, 1.5, 2.5, 7812.5, 7813.5, 0.49, 12.51, 2.4999]
    bills = [
        replace(part(seq, f"h{seq}"), latencies=Latencies(*[times / 1000] * 4))
        for seq, times in enumerate(us, 1)
    ]
    with writing(engine).begin() as connection:
        write(connection, bills)
    with engine.begin() as connection:
        as_version_17(connection.exec_driver_sql)
        for bill in bills:
            for name in ("queue", "ttft", "tpot", "e2e"):
                set_it = f"UPDATE requests SET {name}_ms = ? WHERE seq = ?"
                connection.exec_driver_sql(set_it, (bill.latencies.ttft_ms, bill.bill.seq))
    engine.dispose()
    engine = open_database(url_of(path))
    with engine.connect() as connection:
        assert wrong_histograms(connection) == []
        asked = select(requests.c.ttft_us, requests.c.queue_us).order_by(requests.c.seq)
        rounded = [round(bill.latencies.ttft_ms * 1000) for bill in bills]
        assert [tuple(row) for row in connection.execute(asked)] == [(one, one) for one in rounded]
    engine.dispose()


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    path = tmp_path / "ledger.db"
    with pytest.raises(LedgerError, match="no such file"):
        open_database(url_of(path), create=False)
    path.write_text("this is not a database, it only looks long enough to be one " * 20)
    with pytest.raises(LedgerError, match="not a database"):
        open_database(url_of(path))
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(LedgerError, match="holds no ledger"):
        open_database(url_of(tmp_path / "other.db"), create=False)


def test_two_processes_may_create_the_ledger_at_once(tmp_path):
    url = url_of(tmp_path / "deep" / "ledger.db")
    program = (
        "import sys; from vllm_cost_meter.ledger.database import open_database; sys.stdin.read(1);"
        f" open_database({url!r}).dispose()"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) for _ in range(2)
    ]
    for process in processes:
        process.stdin.write(b"g")
        process.stdin.close()
    assert [process.wait() for process in processes] == [0, 0]
    engine = open_database(url, create=False)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version FROM schema_version")).all() == [
            (SCHEMA_VERSION,)
        ]
    engine.dispose()


# A server: it has the ledger open, opens it once more, as its readers do, and writes on when told.
SERVER = """
import sys
from sqlalchemy import text
from vllm_cost_meter.ledger.database import open_database, writing
first = open_database(sys.argv[1])
kept = first.connect()  # a pooled connection: closed, it would let go of its locks itself
kept.execute(text("SELECT 1"))
kept.commit()
second = open_database(sys.argv[1])
second.dispose()
with writing(first).begin() as connection:
    connection.execute(text("CREATE TABLE told (cost INTEGER)"))
for number, _line in enumerate(sys.stdin):
    with writing(first).begin() as connection:
        connection.execute(text("INSERT INTO told VALUES (:number)"), {"number": number})
    print("committed", flush=True)
"""


def test_a_command_beside_a_server_leaves_the_servers_wal_alone(tmp_path):
    path = tmp_path / "ledger.db"
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, url_of(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def commit() -> None:
            server.stdin.write("on\n")
            server.stdin.flush()
            assert server.stdout.readline() == "committed\n"

        commit()
        wal = path.with_name("ledger.db-wal").stat().st_ino
        # Another process that opens the file and is the last to close it folds the WAL into the
        # file and removes it, unless it sees the server's locks.
        command = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('SELECT * FROM told')"
        subprocess.run([sys.executable, "-c", command, str(path)], check=True)
        commit()
        commit()
        server.kill()
    assert path.with_name("ledger.db-wal").stat().st_ino == wal
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT cost FROM told").fetchall() == [(0,), (1,), (2,)]


def test_an_existing_ledger_is_never_opened_but_by_sqlite(tmp_path, monkeypatch):
    path = tmp_path / "ledger.db"
    open_database(url_of(path)).dispose()
    opened = []
    real = os.open

    def watched(name, flags, *rest, **more):
        descriptor = real(name, flags, *rest, **more)
        opened.append(Path(name))
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    open_database(url_of(path)).dispose()
    assert path not in opened
