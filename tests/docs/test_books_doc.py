"""The page on the books: the real books compute its example, its classes are all there are."""

import re
from dataclasses import replace

import pytest

from tests.support.builders import ENGINE, ENGINE_STATE
from tests.support.pages import DOCS, names, section
from vllm_cost_meter import guard
from vllm_cost_meter.cli.audit import audit_lines
from vllm_cost_meter.engine.books import EngineBooks, RequestFacts
from vllm_cost_meter.ledger.auditing.audit import DIFFERENCES
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS
from vllm_cost_meter.records.snapshot import CLASSES, Snapshot
from vllm_cost_meter.units.time import NS_PER_HOUR

PAGE = DOCS / "explanation" / "books.md"
EXAMPLE = section(PAGE, "An example by hand")
ENDED = RequestFacts(
    engine_status="stopped", prompt_tokens=0, cached_tokens=0, output_tokens=0, preemptions=0
)


def books_of(gpus: int) -> EngineBooks:
    return EngineBooks(
        run_id="run",
        engine=replace(ENGINE, gpus=gpus, kv_block_size=None),
        created_ns=0,
        now_ns=1000,
        unix_ns=500_000 * NS_PER_HOUR + 1000,
    )


def look(books: EngineBooks, now_ns: int) -> Snapshot:
    return books.snapshot(now_ns, 500_000 * NS_PER_HOUR + now_ns, 0, ENGINE_STATE)


def live_the_example(gpus: int = 1) -> tuple[list[int], Snapshot]:
    """Do what the table says, line by line; return the bills' amounts and the snapshot."""
    books, bills = books_of(gpus), []
    books.open("A", 6, 1500)
    books.begin_step(1, {"A": 6}, 1600)
    books.end_step(1, 2200)
    books.open("B", 3, 2250)
    books.begin_step(2, {"A": 1, "B": 3}, 2300)
    books.end_step(2, 2701)
    bills.append(books.bill("A", ENDED, 2701))
    books.begin_step(3, {"B": 1}, 2750)
    assert not books.leave("B")
    books.end_step(3, 3050)
    assert books.meter.drained() == ["B"]
    bills.append(books.bill("B", ENDED, 3050))
    return [n for bill in bills for n in (bill.prefill_ns, bill.decode_ns)], look(books, 4000)


def test_the_example_comes_out_as_written():
    amounts, snapshot = live_the_example()
    a, b = amounts[:2], amounts[2:]
    assert f"Bill 1 (A) is {a[0]} + {a[1]} = {sum(a)} ns" in EXAMPLE
    assert f"bill 2 (B) {b[0]} + {b[1]} = {sum(b)} ns" in EXAMPLE
    shown = {
        name: int(n) for name, n in re.findall(r"(\w+) (\d+)", EXAMPLE.split("4000 x 1 = ")[1])
    }
    totals = snapshot.totals.as_dict()
    assert {name: n for name, n in totals.items() if n} == {
        name: shown[name] for name in ("requests", "idle", "host", "startup")
    }
    assert snapshot.difference_ns == 0
    assert (snapshot.wall_ns, snapshot.last_seq, snapshot.billed_ns) == (4000, 2, 1301)


def test_the_lines_of_the_example_add_up_class_by_class():
    booked = [row.split("|")[-2] for row in EXAMPLE.splitlines() if re.match(r"\| \d", row)]
    totals = live_the_example()[1].totals.as_dict()
    for name in ("startup", "idle", "host"):
        amounts = [int(n) for cell in booked for n in re.findall(f"`{name}` (\\d+)", cell)]
        assert sum(amounts) == totals[name]
    steps = [int(found[1]) for cell in booked if (found := re.match(r" (\d+): ", cell))]
    assert sum(steps) == totals["requests"]


def test_two_gpus_double_it():
    one, two = live_the_example()[1], live_the_example(gpus=2)[1]
    assert two.wall_ns == one.wall_ns
    assert two.totals.as_dict() == {name: 2 * n for name, n in one.totals.as_dict().items()}
    assert live_the_example(gpus=2)[0] == [2 * n for n in live_the_example()[0]]


def test_the_tail_of_the_example_is_half_of_the_step():
    books = books_of(1)
    books.open("A", 6, 1500)
    books.open("B", 3, 1500)
    books.begin_step(2, {"A": 1, "B": 3}, 2300)
    books.begin_step(3, {"A": 1, "B": 1}, 2400)
    books.end_step(2, 2701)
    books.bill("A", ENDED, 2701)
    books.end_step(3, 3001)
    assert look(books, 3001).totals.tail == 150
    assert sum(books.meter.accrued("B", 3001)[:2]) == 301 + 150
    assert "`tail` the other 150" in EXAMPLE.replace("\n", " ")


def test_the_classes_are_those_of_the_code():
    assert names(PAGE, "Classes") == list(CLASSES)
    identity = PAGE.read_text().split("wall x gpus = ")[1].split("\n")[0]
    assert identity.split(" + ") == list(CLASSES)


def test_what_the_audit_compares_is_all_there():
    assert set(names(PAGE, "The audit")) == {*DIFFERENCES, "missing_bills"}


def test_the_audit_line_has_the_form_of_the_command():
    lines = PAGE.read_text().splitlines()
    place = next(place for place, line in enumerate(lines) if "run 194d4656" in line)
    shown = [line.removeprefix("    ") for line in lines[place : place + 5]]
    line = " ".join(" ".join(shown[1:3]).split())
    seconds = dict(re.findall(r"(\w+) (\d+\.\d+) [+;]", line.replace(";", " ;")))
    run = {f"{name}_ns": round(float(seconds.get(name, 0)) * 1e9) for name in CLASSES}
    run |= {"run_id": "194d4656", "engine_index": 0, "wall_ns": 116_702_000_000, "gpus": 1}
    run |= {"last_seq": 622, "difference_ns": 0, "ledger_difference_ns": 0}
    run |= {"billed_difference_ns": 0, "uneven_bills": None, "changed": None}
    run |= {"sums_difference_ns": 0, "sums_difference_block_ms": None}
    run |= {"hours_difference_ns": 0, "in_flight_difference_ns": 0, "missing_bills": []}
    run |= {"lost_requests": [], "lost_step_ns": 0, "unbilled_replies": []}
    run |= dict.fromkeys(("last_bills", "last_bills_ns", "last_bills_in_flight_ns"), 0)
    run |= {"energy_difference_mj": 0}
    run |= {"started_at": "2026-11-25T09:30:00.000000Z", "host": "gpu-7", "model": "llama"}
    whole = {
        "full": False,
        "fleet": None,
        "runs": [run],
        "without_totals": [],
        "set_aside": [],
        "journal_losses": [],
        "rows_kept_from": None,
        "balanced": True,
    }
    assert list(audit_lines(whole)) == shown


@pytest.mark.parametrize(
    "said",
    [
        f"fails {guard.ERRORS_IN_A_ROW_MAX} times in a row",
        f"after {DEAD_AFTER_NS // 10**9} s without one",
    ],
)
def test_the_numbers_are_those_of_the_code(said):
    assert said in PAGE.read_text()
