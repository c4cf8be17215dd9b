"""Any engines, any bills, in any order and grouping: the books add up, and a loss has a name.

The world is drawn as bills per run; the snapshots are what an honest engine would say of them. The
judge is plain Python over the drawn values, never the ledger's own code.
"""

import itertools
import random
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select

from tests.support.builders import make_bill, make_open, make_part, make_snapshot
from tests.support.examples import examples
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import open_requests
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, OpenRequest, Usage
from vllm_cost_meter.records.snapshot import CLASSES, ClassTotals, Snapshot
from vllm_cost_meter.reports.grammar import question
from vllm_cost_meter.units.time import NS_PER_HOUR

HOUR = 500_000
NOW = HOUR * NS_PER_HOUR
amounts = st.integers(0, 10**13)
few = st.integers(0, 50)
pieces = st.lists(
    st.tuples(st.integers(0, 3), amounts, amounts, few, few), max_size=3, unique_by=lambda p: p[0]
)
bills = st.tuples(pieces, st.sampled_from("abc"), st.integers(0, 5), few, few)
overheads = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(CLASSES[1:]), amounts), max_size=6
)
runs = st.lists(st.tuples(st.lists(bills, max_size=12), overheads, st.integers(1, 4)), max_size=3)


def error_of(seq: int, prefill_ns: int) -> int | None:
    """Of every third bill nobody knows how far it may be off."""
    return prefill_ns // 7 if seq % 3 else None


def parts_of(run: int, drawn: list) -> list[EngineRequest]:
    return [
        make_part(
            make_bill(
                run_id=f"run{run}",
                seq=seq,
                request_id=f"cmpl-{run:016x}-0-{seq:08x}",
                prompt_tokens=prompt,
                cached_tokens=0,
                output_tokens=output,
                pieces=tuple(
                    UsagePiece(HOUR + hour, *rest, charge_error_ns=error_of(seq, rest[0]))
                    for hour, *rest in used
                ),
            ),
            http_request_id=f"cost-{tenant}-{group:032x}",
            prompt_group=f"g{group % 2}",
            tenant=tenant,
            started_at_ns=NOW,
            finished_at_ns=NOW,
            announced=True,
        )
        for seq, (used, tenant, group, prompt, output) in enumerate(drawn, 1)
    ]


def snapshot_of(run: int, parts: list[EngineRequest], other_time: list, gpus: int) -> Snapshot:
    """What an honest engine says; its idle time fills wall x gpus up to whole nanoseconds."""
    hours: dict[int, ClassTotals] = {HOUR: ClassTotals()}
    for piece in (piece for part in parts for piece in part.bill.pieces):
        hours.setdefault(piece.hour, ClassTotals()).requests += piece.gpu_time_ns
    for hour, name, ns in other_time:
        totals = hours.setdefault(HOUR + hour, ClassTotals())
        setattr(totals, name, getattr(totals, name) + ns)
    hours[HOUR].idle += -sum(totals.total() for totals in hours.values()) % gpus
    totals = ClassTotals(**{n: sum(getattr(h, n) for h in hours.values()) for n in CLASSES})
    return make_snapshot(
        run_id=f"run{run}",
        taken_at_ns=NOW,
        started_at_ns=NOW,
        gpus=gpus,
        totals=totals,
        last_seq=len(parts),
        billed_ns=sum(part.bill.gpu_time_ns for part in parts),
        engine_index=run,
        hours=hours,
    )


def http_of(part: EngineRequest) -> HttpRequest:
    return HttpRequest(
        part.http_request_id, None, None, part.owner, None, "/", 200, False, Usage(), None, None,
        NOW, NOW,
    )  # fmt: skip


def open_of(part: EngineRequest) -> OpenRequest:
    return make_open(
        request_id=part.bill.request_id,
        http_request_id=part.http_request_id,
        started_at_ns=part.started_at_ns,
    )


def store(engine: Engine, records: list, seed: int) -> None:
    """Write records shuffled, cut into transactions anywhere, some of them twice."""
    chance = random.Random(seed)
    records = records + chance.sample(records, len(records) // 2)
    chance.shuffle(records)
    while records:
        size = chance.randint(1, len(records))
        with writing(engine).begin() as connection:
            write(connection, records[:size])
        records = records[size:]


class World:
    """A ledger in a temporary file with everything that was drawn in it."""

    def __init__(self, drawn: list, seed: int, drop: set[tuple[str, int]] = frozenset()) -> None:
        self.parts = [parts_of(n, bills) for n, (bills, _, _) in enumerate(drawn)]
        self.snapshots = [
            snapshot_of(n, parts, other_time, gpus)
            for n, (parts, (_, other_time, gpus)) in enumerate(zip(self.parts, drawn, strict=True))
        ]
        self.bills = list(itertools.chain(*self.parts))
        kept = [b for b in self.bills if (b.bill.run_id, b.bill.seq) not in drop]
        https = {part.http_request_id: http_of(part) for part in self.bills}
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{Path(folder) / 'ledger.db'}"
            engine = open_database(url)
            announced = [open_of(part) for part in self.bills]
            store(engine, [*kept, *announced, *self.snapshots, *https.values()], seed)
            with engine.connect() as connection:
                self.open = set(connection.execute(select(open_requests.c.request_id)).scalars())
            engine.dispose()
            reader = LedgerReader(url)
            self.report = reader.tenants(as_of=AsOf(NOW, 0))
            self.windows = [
                reader.tenants(hour, hour + 1, as_of=AsOf(NOW, 0)) for hour in range(HOUR, HOUR + 4)
            ]
            asked = question(aggregate="tenant,model,status,hour", idle="proportional")
            self.asked = reader.report(asked, as_of=AsOf(NOW, 0))
            self.audit = reader.audit(as_of=AsOf(NOW, 0))
            reader.close()


slow = settings(max_examples=examples(25))


@slow
@given(runs, st.integers(0, 2**32))
def test_the_rows_add_up_and_the_audit_balances(drawn, seed):
    world = World(drawn, seed)
    assert world.audit["balanced"] is (True if drawn else None), world.audit
    assert world.open == set()
    wall_gpu_ns = sum(snapshot.wall_ns * snapshot.engine.gpus for snapshot in world.snapshots)
    assert world.report["wall_gpu_ns"] == wall_gpu_ns
    assert world.report["adds_up"]
    assert sum(row["gpu_time_ns"] for row in world.report["tenants"]) == wall_gpu_ns


@slow
@given(runs, st.integers(0, 2**32))
def test_tenants_owe_what_their_bills_say_and_windows_add_up_to_the_whole(drawn, seed):
    world = World(drawn, seed)
    rows = {row["tenant"]: row for row in world.report["tenants"]}
    for tenant in "abc":
        mine = [part for part in world.bills if part.owner.tenant == tenant]
        row = rows.get(tenant, {"gpu_time_ns": 0, "requests": 0, "prompt_tokens": 0})
        assert row["gpu_time_ns"] == sum(part.bill.gpu_time_ns for part in mine)
        assert row["requests"] == len({part.http_request_id for part in mine})
        prompts: dict[tuple, int] = {}
        for part in mine:
            key = (part.http_request_id, part.prompt_group)
            prompts[key] = max(prompts.get(key, 0), part.bill.prompt_tokens)
        assert row["prompt_tokens"] == sum(prompts.values())
        known = [p for p in mine if p.bill.seq % 3]
        assert row.get("charge_known_ns", 0) == sum(p.bill.gpu_time_ns for p in known)
        assert row.get("charge_error_ns", 0) == sum(
            piece.prefill_ns // 7 for p in known for piece in p.bill.pieces
        )
    assert all(window["adds_up"] for window in world.windows)
    assert sum(window["wall_gpu_ns"] for window in world.windows) == world.report["wall_gpu_ns"]
    for name, row in rows.items():
        mine = [
            other
            for window in world.windows
            for other in window["tenants"]
            if other["tenant"] == name
        ]
        for column in ("gpu_time_ns", "charge_known_ns", "charge_error_ns"):
            assert (row[column] or 0) == sum(other[column] or 0 for other in mine)


@slow
@given(runs, st.integers(0, 2**32))
def test_rows_told_apart_by_more_add_up_to_those_of_tenants(drawn, seed):
    world = World(drawn, seed)
    (series,) = world.asked["series"]
    assert world.asked["adds_up"]
    assert sum(row["idle_share_ns"] for row in series["rows"]) == 0
    for row in world.report["tenants"]:
        mine = [other for other in series["rows"] if other["tenant"] == row["tenant"]]
        names = ("gpu_time_ns", "requests", "prompt_tokens", "output_tokens")
        for name in (*names, "charge_known_ns", "charge_error_ns"):
            assert sum(other[name] or 0 for other in mine) == (row[name] or 0)


@slow
@given(runs.filter(lambda drawn: any(bills for bills, _, _ in drawn)), st.data())
def test_a_bill_that_is_taken_away_is_named_by_the_audit(drawn, data):
    keys = [(f"run{n}", seq) for n, (b, _, _) in enumerate(drawn) for seq in range(1, len(b) + 1)]
    run_id, seq = data.draw(st.sampled_from(keys))
    world = World(drawn, seed=0, drop={(run_id, seq)})
    assert not world.audit["balanced"]
    # In whatever order it was told: a request is open as long as it has no bill, and no longer.
    [gone] = [part for part in world.bills if (part.bill.run_id, part.bill.seq) == (run_id, seq)]
    assert world.open == {gone.bill.request_id}
    for run in world.audit["runs"]:
        assert run["missing_bills"] == ([str(seq)] if run["run_id"] == run_id else [])
