"""Sums by hour and day are what the rows add up to, in whatever order and batches the rows come.

Two judges: the queries that make the sums anew, which share no code with the incremental way; and a
few lines of plain Python over the drawn records.
"""

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from tests.component.ledger.test_reader import http, part
from tests.support.batches import batches_of, write_batches
from tests.support.builders import reply_of
from tests.support.examples import examples
from tests.support.upkeep import rows_of, url_of, wrong_sums
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.rollups.rebuilding import rebuild, wrong_histograms
from vllm_cost_meter.ledger.schema import (
    bill_sums,
    rollup_arrivals,
    rollup_days,
    rollup_groups,
    rollup_hours,
    rollup_latencies,
)
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.owner import NamedBy, Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Latencies, Usage
from vllm_cost_meter.units.time import rfc3339

# Around midnight, UTC.
MIDNIGHT = 500_016
NS = 3_600 * 10**9
OWNERS = (
    Owner("alice"),
    Owner("alice/web", NamedBy("api_key"), NamedBy("user"), "alice", {"team": "blue"}),
    Owner("bob", NamedBy("api_key"), parent="group"),
)
hours = st.integers(MIDNIGHT - 2, MIDNIGHT + 2)
times = st.none() | st.floats(0, 10_000)
tokens = st.none() | st.integers(0, 9)
# As the meter makes them, which SQLite stores as bytes, and another.
exchange_ids = st.sampled_from(["h1", f"cost-{2:032x}", f"cost-{3:032x}"])
owners = st.sampled_from(OWNERS)


@st.composite
def bills(draw: st.DrawFn) -> list[EngineRequest]:
    found = []
    for seq in range(1, draw(st.integers(0, 6)) + 1):
        spent = draw(st.dictionaries(hours, st.integers(0, 50), max_size=3))
        pieces = tuple(UsagePiece(hour, ns, 2 * ns, 3, 4) for hour, ns in sorted(spent.items()))
        if draw(st.booleans()):  # The error of a bill is known in all of its hours or in none.
            pieces = tuple(p._replace(charge_error_ns=p.prefill_ns // 3) for p in pieces)
        changes = {
            "owner": draw(owners),
            "model": draw(st.sampled_from([None, "m", "n"])),
            "lora": draw(st.sampled_from([None, "x"])),
            "prompt_group": draw(st.sampled_from(["p", "q"])),
            "finished_at_ns": draw(hours) * NS + 1,
            "started_at_ns": draw(hours) * NS + 1,
            "latencies": Latencies(1.0, draw(times), draw(times), draw(times)),
        }
        run, status = draw(st.sampled_from("ab")), draw(st.sampled_from(["stop", "abort"]))
        made = part(seq, draw(exchange_ids | st.none()), run_id=run, pieces=pieces, status=status)
        bill = made.bill._replace(external_tokens=draw(tokens))
        role = draw(st.sampled_from([None, "kv_producer", "kv_consumer"]))
        found.append(replace(made, bill=bill, kv_role=role, **changes))
    return found


@st.composite
def replies(draw: st.DrawFn) -> list[HttpRequest]:
    ids = draw(st.frozensets(exchange_ids))
    return [
        replace(
            http(id, Usage(draw(tokens), draw(tokens), draw(tokens))),
            owner=draw(owners),
            finished_at_ns=draw(hours) * NS + 1,
        )
        for id in sorted(ids)
    ]


@settings(max_examples=examples(60))
@given(bills(), replies(), st.data())
def test_sums_are_those_of_the_rows_in_any_order_and_batches(parts, https, data):
    https = [
        reply_of(data.draw(st.sampled_from(mine)), reply)
        if (mine := [one for one in parts if one.http_request_id == reply.http_request_id])
        and data.draw(st.booleans())
        else reply
        for reply in https
    ]
    batches = data.draw(batches_of([*parts, *https]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        engine = open_database(url_of(path))
        write_batches(engine, batches)
        assert wrong_sums(path) == []
        with engine.connect() as connection:
            assert wrong_histograms(connection) == []
            judge_by_hand(connection, parts, https)
        before = rows_of(path)
        with writing(engine).begin() as connection:
            rebuild(connection)
        after = rows_of(path)
        for table in (rollup_hours, rollup_days, rollup_latencies, rollup_arrivals, bill_sums):
            assert after[table.name] == before[table.name]
        engine.dispose()


def judge_by_hand(connection, parts, https) -> None:
    spent, days = Counter(), Counter()
    known, errors = Counter(), Counter()
    first_hours: dict[tuple, int] = {}
    for one in parts:
        for piece in one.bill.pieces:
            spent[piece.hour] += piece.prefill_ns + piece.decode_ns
            days[piece.hour // 24] += piece.prefill_ns + piece.decode_ns
            if piece.charge_error_ns is not None:
                known[piece.hour] += piece.prefill_ns + piece.decode_ns
                errors[piece.hour] += piece.charge_error_ns
            whose = (one.owner.tenant, one.owner.rule_text, one.owner.parent, one.owner.above_text)
            of_bill = (one.bill.run_id, *whose, one.model, one.lora, one.bill.engine_status)
            key = (piece.hour // 24, *of_bill)
            first_hours[key] = min(piece.hour, first_hours.get(key, piece.hour))
    ended = Counter(
        reply.finished_at_ns // NS
        for reply in https
        if any(one.http_request_id == reply.http_request_id for one in parts)
    )
    found, found_days, found_ended = Counter(), Counter(), Counter()
    found_known, found_errors = Counter(), Counter()
    for row in connection.execute(select(rollup_hours)):
        found_known[row.hour] += row.charge_known_ns
        found_errors[row.hour] += row.charge_error_ns
        found[row.hour] += row.prefill_ns + row.decode_ns
        found_ended[row.hour] += row.requests
    in_group = rollup_groups.c.group_id == rollup_days.c.group_id
    for row in connection.execute(select(rollup_days, rollup_groups).join(rollup_groups, in_group)):
        found_days[row.day] += row.prefill_ns + row.decode_ns
        # A piece counts without GPU time too: it has tokens.
        whose = (row.tenant, row.tenant_rule, row.tenant_parent, row.tenant_above)
        key = (row.day, row.run_id, *whose, row.model, row.lora, row.engine_status)
        assert row.first_hour == first_hours.get(key)
    assert +found == +spent
    assert (+found_known, +found_errors) == (+known, +errors)
    assert +found_days == +days
    assert +found_ended == +ended
    of_run: dict[str, list[EngineRequest]] = {}
    for one in parts:
        of_run.setdefault(one.bill.run_id, []).append(one)
    assert {
        row.run_id: (row.bills, row.last_seq, row.gpu_time_ns, row.started_at, row.finished_at)
        for row in connection.execute(select(bill_sums))
    } == {
        run_id: (
            len(some),
            max(one.bill.seq for one in some),
            sum(piece.gpu_time_ns for one in some for piece in one.bill.pieces),
            rfc3339(min(one.started_at_ns for one in some)),
            rfc3339(max(one.finished_at_ns for one in some)),
        )
        for run_id, some in of_run.items()
    }
