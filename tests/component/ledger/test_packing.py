"""Ledgers of before version 14, whose instants and ids were texts; and ids in their short form."""

import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import select

from tests.support.builders import HOUR
from tests.support.older import LATENCIES
from tests.support.upkeep import sql, url_of, wrong_sums
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import metadata
from vllm_cost_meter.ledger.tables.packed import is_packed_id, pack_id, unpack_id
from vllm_cost_meter.ledger.tables.replies import REPLY_COLUMNS, replies
from vllm_cost_meter.ledger.upkeep.repairing import repair

PACKED = {
    "requests": "request_id",
    "open_requests": "request_id",
    "http_requests": "http_request_id",
}
# Their place, from 1 on, is the first byte of an id that begins so.
BEGINNINGS = [
    *("cost-", "cmpl-", "chatcmpl-", "resp_", "msg_", "embd-", "pool-", "classify-", "score-"),
    *("rerank-", "trsc-", "trsl-", "generative-scoring-"),
]
# The number of the only bill that has two.
OF_TWO_HOURS = 5
HEX = "0123456789abcdef"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A ledger as version 13 of its schema had it, with ids as vLLM makes them and others."""
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((Path(__file__).parent / "ledger_v13.sql").read_text())
    return path


def rows_as_texts(path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows of an old ledger as its file has them, by id."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return {
            name: [dict(row) for row in connection.execute(f"SELECT * FROM {name} ORDER BY {id}")]
            for name, id in PACKED.items()
        }


def with_hour(rows: dict[str, list[Mapping[str, Any]]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return rows of an old ledger with what later versions say of them, replies by their ids."""
    bills = []
    for bill in rows["requests"]:
        bill = dict(bill)
        hour = None if bill["seq"] == OF_TWO_HOURS else HOUR
        group = bill.pop("prompt_group")
        bill |= {"prompt_group": "" if group == bill["request_id"] else group}
        for name in LATENCIES:
            ms = bill.pop(f"{name}_ms")
            bill[f"{name}_us"] = None if ms is None else round(ms * 1000)
        del bill["cost_usd"]
        unknown = dict.fromkeys(("charge_error_ns", "external_tokens", "kv_role"))
        bills.append({**bill, "hour": hour, **unknown})
    told = [
        {name: value for name, value in row.items() if name != "cost_usd"}
        for row in rows["http_requests"]
    ]
    running = [{**row, "kv_role": None} for row in rows["open_requests"]]
    return {"requests": bills, "http_requests": told, "open_requests": running}


def rows_as_read(path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Return the same of a ledger of today, replies wherever they stand."""
    engine = open_database(url_of(path), create=False)
    tables = {**metadata.tables, "http_requests": replies}
    with engine.connect() as connection:
        found = {
            name: [row._asdict() for row in connection.execute(select(tables[name]))]
            for name in PACKED
        }
    engine.dispose()
    for row in found["requests"]:
        for name in REPLY_COLUMNS:
            del row[name]
    return {name: sorted(rows, key=itemgetter(PACKED[name])) for name, rows in found.items()}


def definitions(path: Path) -> dict[str, str]:
    """Return all tables and indexes of a file by name, whatever blanks and quotes they have."""
    found = sql(path, "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: re.sub(r'[\s"]+', "", made) for name, made in found}


def test_every_row_of_an_old_ledger_has_the_same_instants_and_ids_in_fewer_bytes(old, tmp_path):
    before = rows_as_texts(old)
    open_database(url_of(old)).dispose()
    assert rows_as_read(old) == with_hour(before)
    assert sql(old, "SELECT seq, hour FROM usage_pieces") == [(5, HOUR - 1), (5, HOUR)]
    assert sql(old, "SELECT DISTINCT typeof(finished_at) FROM requests") == [("integer",)]
    at = "cost-00112233445566778899aabbccddeeff"
    assert sql(old, "SELECT length(http_request_id) FROM open_requests") == [(18,)]
    with LedgerReader(url_of(old)) as reader:
        assert reader.find(at)
        assert reader.audit(full=True)["runs"][0]["changed"] is False
    assert wrong_sums(old) == []
    new = tmp_path / "new.db"
    open_database(url_of(new)).dispose()
    columns, expected = definitions(old), definitions(new)
    assert {name: columns[name] for name in PACKED} == {name: expected[name] for name in PACKED}
    assert columns.keys() == expected.keys()


def test_an_older_sqlite_migrates_too_and_leaves_a_column_empty(old, monkeypatch):
    before = rows_as_texts(old)
    with monkeypatch.context() as patched:
        patched.setattr("sqlite3.sqlite_version_info", (3, 34, 1))
        open_database(url_of(old)).dispose()
    assert sql(old, "SELECT count(*), count(cost_usd) FROM requests") == [(8, 0)]
    assert rows_as_read(old) == with_hour(before)
    assert wrong_sums(old) == []
    repair(url_of(old), 0, force=True)
    assert rows_as_read(old) == with_hour(before)


def test_without_room_on_the_disk_an_old_ledger_stays_as_it_is_and_the_message_says_so(
    old, monkeypatch, caplog
):
    before, size = rows_as_texts(old), old.stat().st_size
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * size - 1))
        with pytest.raises(
            LedgerError,
            match=rf"from schema version 13 to \d+: expected {2 * size:,} free bytes in"
            rf" {old.parent} to change its rows, got {2 * size - 1:,}; free some, nothing was",
        ):
            open_database(url_of(old))
    assert rows_as_texts(old) == before
    caplog.set_level("INFO")
    open_database(url_of(old)).dispose()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].endswith("begins; what is told meanwhile waits in the journal")
    assert re.search(r"done in \d+\.\d s$", said[1])


def test_an_old_ledger_that_is_damaged_is_repaired_and_migrated(old):
    before = rows_as_texts(old)
    model = "SELECT run_id, error_two_planes, error_{}, explained FROM cost_models"
    models = sql(old, model.format("one_plane"))
    assert models
    repair(url_of(old), 0, force=True)
    assert rows_as_read(old) == with_hour(before)
    assert sql(old, model.format("other_form")) == models


PARTS = (HEX, "-", "cost", "cmpl", "0", "89abcdef", "ABCDEF", "é", "/")


def taken_apart(id: str) -> bytes | str:
    """Return an id's stored form by its definition, character by character."""
    digits = re.compile("(?:[0-9a-f]{2}){3,127}")
    if not all(" " <= character <= "~" and character != "/" for character in id):
        return id
    if not digits.search(id):
        return id
    found, at = b"", 0
    while at < len(id):
        run = digits.match(id, at)
        if run:
            found += bytes([128 + len(run[0]) // 2]) + bytes.fromhex(run[0])
            at = run.end()
            continue
        end = next(i for i in range(at, len(id) + 1) if i == len(id) or digits.match(id, i))
        between = id[at:end]
        is_beginning = at == 0 and between in BEGINNINGS
        found += bytes([BEGINNINGS.index(between) + 1]) if is_beginning else between.encode()
        at = end
    return found


@given(
    st.text()
    | st.text(HEX + "-_cmpletost", max_size=90)
    | st.lists(
        st.sampled_from([HEX, "-", "cost", "cmpl", "0", "89abcdef", "ABCDEF", "é", "/"])
    ).map("".join)
)
@example("cost-" + HEX * 2)
@example("-".join([HEX] * 40))
@example(f"{HEX}-é")
@example(f"/-{HEX}")
@example(f"{HEX}-AB")
@example(f"cmpl-{HEX}-12345")
@example(f"cmpl-{HEX}-ABCDEF12")
@example(f"cost-{HEX}-")
@example("cost-" + HEX * 40)
@example("cmpl-0123456789abcdef-0-89abcdef")
@example("\x01\x90")
@example("\ud800")
def test_an_id_has_one_stored_form_that_is_never_longer(id):
    stored = pack_id(id)
    assert stored == taken_apart(id), "however it was come by"
    assert unpack_id(stored) == id
    assert isinstance(stored, str) or len(stored) < len(id.encode())


@given(st.binary())
def test_other_bytes_are_never_taken_for_an_id(stored):
    if is_packed_id(stored):
        assert pack_id(unpack_id(stored)) == stored
