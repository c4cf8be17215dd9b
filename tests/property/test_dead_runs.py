"""However an engine dies, each tenant owes what its bills say, and the books add up to its time.

The world is what engines did, drawn request by request: what each had used at the last snapshot,
what it used later, and whether it was billed before, after or never. The ledger holds what they
told of it. The judge is plain Python over the drawn values, never the ledger's own code.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.builders import make_bill, make_part, make_snapshot
from tests.support.examples import examples
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS, AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.records.snapshot import CLASSES, ClassTotals, Snapshot
from vllm_cost_meter.units.time import NS_PER_HOUR

HOUR = 500_000
HOURS = range(HOUR, HOUR + 3)
NOW = HOUR * NS_PER_HOUR
ALIVE, DEAD = AsOf(NOW, 0), AsOf(NOW + DEAD_AFTER_NS + 1, 0)
Billed = Literal["before", "after", "never"]
# GPU-ns by hour, in the order in which a request used them.
Ns = dict[int, int]


@dataclass(frozen=True)
class Request:
    """What one request did: GPU-ns by hour up to the last snapshot and after it."""

    tenant: str
    billed: Billed
    before: Ns
    after: Ns
    # The part of `after` that its step had run for when the snapshot was taken.
    of_step: int

    @property
    def all(self) -> Ns:
        return dict(Counter(self.before) + Counter(self.after))


@dataclass(frozen=True)
class Run:
    """What one engine did; without `told` it never told its totals."""

    number: int
    requests: list[Request]
    idle: Ns
    lost: Ns
    # The time of the step at the snapshot that belonged to requests which got no bill.
    lost_step: int
    # The hour of the last snapshot.
    at: int
    told: bool

    @property
    def run_id(self) -> str:
        return f"run{self.number}"

    def billed(self, *when: Billed) -> list[Request]:
        return [request for request in self.requests if request.billed in when]

    def bills(self) -> list[Request]:
        """The requests with a bill, in the order of their numbers."""
        return [*self.billed("before"), *self.billed("after")]

    @property
    def step(self) -> int:
        return self.lost_step + sum(request.of_step for request in self.billed("after"))

    def parts(self) -> Iterator[EngineRequest]:
        for seq, request in enumerate(self.bills(), 1):
            pieces = tuple(UsagePiece(hour, ns, 0, 1, 0) for hour, ns in request.all.items() if ns)
            bill = make_bill(
                run_id=self.run_id, seq=seq, request_id=self.id_of(request), pieces=pieces
            )
            yield make_part(bill, tenant=request.tenant, started_at_ns=NOW, finished_at_ns=NOW)

    def id_of(self, request: Request) -> str:
        return f"{self.run_id}-{[id(each) for each in self.requests].index(id(request)):08x}"

    def snapshot(self) -> Snapshot:
        hours = {hour: ClassTotals() for hour in HOURS if hour <= self.at}
        for request in self.requests:
            for hour, ns in (request.all if request.billed == "before" else request.before).items():
                if request.billed == "before":
                    hours[hour].requests += ns
                else:
                    hours[hour].in_flight += ns
        hours[self.at].in_flight += self.step
        for hour in hours:
            hours[hour].idle += self.idle.get(hour, 0)
            hours[hour].lost += self.lost.get(hour, 0)
        totals = ClassTotals(**{n: sum(getattr(h, n) for h in hours.values()) for n in CLASSES})
        live = tuple(
            (self.id_of(request), Accrued(prefill_ns=sum(request.before.values())))
            for request in self.billed("after", "never")
            if sum(request.before.values())
        )
        return make_snapshot(
            run_id=self.run_id,
            taken_at_ns=NOW,
            started_at_ns=NOW,
            totals=totals,
            hours=hours,
            last_seq=len(self.billed("before")),
            billed_ns=totals.requests,
            live=live,
            step_ns=self.step,
        )


amounts = st.one_of(st.just(0), st.integers(0, 10**12))


@st.composite
def requests(draw: st.DrawFn, at: int) -> Request:
    billed = draw(st.sampled_from(("before", "after", "after", "never")))
    before = {hour: draw(amounts) for hour in HOURS if hour <= at}
    after: Ns = {}
    if billed != "before":
        after = {hour: draw(amounts) for hour in HOURS if hour >= at}
    of_step = draw(st.integers(0, after[at])) if billed == "after" and draw(st.booleans()) else 0
    return Request(draw(st.sampled_from("abc")), billed, before, after, of_step)


@st.composite
def worlds(draw: st.DrawFn) -> list[Run]:
    found = []
    for number in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(HOURS))
        own = st.dictionaries(st.sampled_from([h for h in HOURS if h <= at]), amounts)
        run = Run(
            number,
            draw(st.lists(requests(at), max_size=6)),
            draw(own),
            draw(own),
            draw(amounts),
            at,
            draw(st.sampled_from((True, True, True, False))),
        )
        found.append(run)
    return found


class Ledger:
    """A ledger in a temporary file of what all runs told, but for bills that are dropped."""

    def __init__(self, world: list[Run], drop: frozenset[tuple[str, int]] = frozenset()) -> None:
        self._folder = tempfile.TemporaryDirectory()
        url = f"sqlite:///{Path(self._folder.name) / 'ledger.db'}"
        records = [
            part
            for run in world
            for part in run.parts()
            if (part.bill.run_id, part.bill.seq) not in drop
        ]
        engine = open_database(url)
        with writing(engine).begin() as connection:
            write(connection, [*records, *(run.snapshot() for run in world if run.told)])
        engine.dispose()
        self.reader = LedgerReader(url)

    def __enter__(self) -> LedgerReader:
        return self.reader

    def __exit__(self, *_error: object) -> None:
        self.reader.close()
        self._folder.cleanup()


def owed(world: list[Run], hour: int | None = None) -> dict[str, int]:
    """What each tenant's bills say, in an hour or in all."""
    sums: Counter[str] = Counter()
    for request in (request for run in world for request in run.bills()):
        used = request.all
        sums[request.tenant] += sum(used.values()) if hour is None else used.get(hour, 0)
    return {tenant: ns for tenant, ns in sums.items() if ns}


def rows_of(report: dict) -> dict[str, int]:
    return {row["tenant"]: row["gpu_time_ns"] for row in report["tenants"]}


def tenants_in(rows: dict[str, int]) -> dict[str, int]:
    return {name: ns for name, ns in rows.items() if ns and not name.startswith("__")}


slow = settings(max_examples=examples(40))


@slow
@given(worlds())
def test_what_was_told_is_billed_and_is_in_its_tenants_row_hour_by_hour(world):
    with Ledger(world) as reader:
        report = reader.tenants(as_of=DEAD)
        windows = {hour: reader.tenants(hour, hour + 1, as_of=DEAD) for hour in HOURS}
        audit = reader.audit(as_of=DEAD)
    assert tenants_in(rows_of(report)) == owed(world)
    assert (report["adds_up"], report["after_cut"]["bills"]) == (True, 0)
    assert sum(rows_of(report).values()) == report["wall_gpu_ns"]
    for hour, window in windows.items():
        assert tenants_in(rows_of(window)) == owed(world, hour)
        assert window["adds_up"]
        assert sum(rows_of(window).values()) == window["wall_gpu_ns"]
        assert min(rows_of(window).values()) >= 0
    for name, ns in rows_of(report).items():
        assert ns == sum(rows_of(window).get(name, 0) for window in windows.values())
    bare = [run for run in world if not run.told and run.bills()]
    assert report["without_totals_ns"] == sum(sum(r.all.values()) for b in bare for r in b.bills())
    ran = bare or any(run.told for run in world)
    assert audit["balanced"] is (None if bare or not ran else True), audit
    assert audit["reason"] == ("no_totals" if bare else None if ran else "no_runs")


@slow
@given(worlds())
def test_what_is_lost_is_what_no_bill_has_and_no_time_is_counted_twice(world):
    with Ledger(world) as reader:
        audit = reader.audit(as_of=DEAD)
        hours = {hour: rows_of(reader.tenants(hour, hour + 1, as_of=DEAD)) for hour in HOURS}
    told = {run.run_id: run for run in world if run.told}
    assert {run["run_id"] for run in audit["runs"]} == told.keys()
    for found in audit["runs"]:
        run = told[found["run_id"]]
        gone = [request for request in run.billed("never") if sum(request.before.values())]
        assert {one["request_id"] for one in found["lost_requests"]} == set(map(run.id_of, gone))
        assert found["lost_requests_ns"] == sum(sum(request.before.values()) for request in gone)
        rest = found["lost_requests_ns"] + found["lost_step_ns"]
        assert found["lost_ns"] == sum(run.lost.values()) + rest
        # The bills may hold the whole step, so both are at most what they were.
        later = sum(sum(request.after.values()) for request in run.billed("after"))
        assert max(0, run.step - later) <= found["lost_step_ns"] <= run.lost_step
        beyond = found["last_bills_ns"] - found["last_bills_in_flight_ns"]
        assert max(0, later - run.step) <= beyond <= later - (run.step - run.lost_step)
        assert sum(found[f"{name}_ns"] for name in CLASSES) == found["wall_ns"] + beyond
    for hour, rows in hours.items():
        exact = sum(
            run.lost.get(hour, 0) + sum(gone.before.get(hour, 0) for gone in run.billed("never"))
            for run in told.values()
        )
        steps = [run.step for run in told.values() if run.at == hour]
        assert exact <= rows["__lost__"] <= exact + sum(steps)
        if not any(steps):
            assert rows["__lost__"] == exact


@slow
@given(worlds())
def test_a_living_run_is_counted_as_its_snapshot_says(world):
    with Ledger(world) as reader:
        report = reader.tenants(as_of=ALIVE)
        audit = reader.audit(as_of=ALIVE)
    told = [run for run in world if run.told]
    bare = [run for run in world if not run.told]
    counted: Counter[str] = Counter()
    for request in (request for run in told for request in run.billed("before")):
        counted[request.tenant] += sum(request.all.values())
    assert Counter(tenants_in(rows_of(report))) == counted + Counter(owed(bare))
    snapshots = [run.snapshot() for run in told]
    for name in CLASSES[1:]:
        in_all = sum(getattr(snapshot.totals, name) for snapshot in snapshots)
        assert rows_of(report)[f"__{name}__"] == in_all
    wall = sum(snapshot.wall_ns for snapshot in snapshots) + report["without_totals_ns"]
    assert (report["wall_gpu_ns"], report["adds_up"]) == (wall, True)
    late = [request for run in told for request in run.billed("after")]
    assert report["after_cut"] == {
        "bills": len(late),
        "gpu_time_ns": sum(sum(request.all.values()) for request in late),
    }
    assert all(run["last_bills"] == 0 and run["lost_requests"] == [] for run in audit["runs"])


@slow
@given(worlds().filter(lambda world: any(run.bills() for run in world)), st.data())
def test_a_bill_that_is_gone_is_named_if_a_later_one_is_there(world, data):
    some = [(run, seq) for run in world for seq in range(1, len(run.bills()) + 1)]
    run, seq = data.draw(st.sampled_from(some))
    with Ledger(world, frozenset([(run.run_id, seq)])) as reader:
        audit = reader.audit(as_of=DEAD)
    all_runs = [*audit["runs"], *audit["without_totals"]]
    named = {each["run_id"]: each["missing_bills"] for each in all_runs if each["missing_bills"]}
    known = len(run.billed("before")) if run.told else 0
    is_last = seq == len(run.bills()) and seq > known
    assert named == ({} if is_last else {run.run_id: [str(seq)]})
    if not is_last:
        assert audit["balanced"] is False
