"""The records: what they refuse, and how instants are written."""

from datetime import UTC, datetime

import pytest

from tests.support.builders import make_bill
from vllm_cost_meter.records.bill import Bill, UsagePiece, read_bill, write_bill
from vllm_cost_meter.records.snapshot import CLASSES, ClassTotals, Snapshot
from vllm_cost_meter.units.time import rfc3339, unix_ns_of

PIECE = UsagePiece(500_000, 1, 2, 3, 4)


def bill(**changes) -> Bill:
    pieces = (PIECE, UsagePiece(500_001, 10, 20, 30, 40, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14))
    return make_bill(**{"pieces": pieces, **changes})


@pytest.mark.parametrize(
    ("unix_ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (1_790_000_000_123_456_789, "2026-09-21T14:13:20.123456Z"),
        (999, "1970-01-01T00:00:00.000000Z"),
        (1_000, "1970-01-01T00:00:00.000001Z"),
        (-1, "1969-12-31T23:59:59.999999Z"),
        (951_782_399_999_999_999, "2000-02-28T23:59:59.999999Z"),
        (951_782_400_000_000_000, "2000-02-29T00:00:00.000000Z"),
        (-62_135_596_800_000_000_000, "0001-01-01T00:00:00.000000Z"),
        (253_402_300_799_999_999_999, "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_an_instant_is_written_with_a_fixed_width(unix_ns, text):
    for _ in range(2):
        assert rfc3339(unix_ns) == text


def test_an_instant_outside_the_calendar_is_refused():
    for unix_ns in (10**30, -(10**30), 253_402_300_800 * 10**9):
        with pytest.raises((ValueError, OverflowError)):
            rfc3339(unix_ns)


@pytest.mark.parametrize(
    ("text", "unix_ns"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:00.000001Z", 1_000),
        ("1970-01-01T01:00:00+01:00", 0),
        ("1969-12-31T23:59:59.5Z", -500_000_000),
    ],
)
def test_an_instant_is_read_with_its_time_zone(text, unix_ns):
    assert unix_ns_of(text) == unix_ns


@pytest.mark.parametrize(
    "text", ["", "now", "2026-01-01", "2026-01-01T00:00:00", "2026-13-01T00:00Z"]
)
def test_what_is_no_instant_is_refused(text):
    with pytest.raises(ValueError, match=r"time zone|isoformat|month"):
        unix_ns_of(text)


def test_the_text_of_now_is_that_of_the_library():
    instant = datetime(2026, 3, 29, 2, 30, 59, 7, UTC)
    unix_ns = int(instant.timestamp()) * 10**9 + 7_999
    assert rfc3339(unix_ns) == instant.isoformat().replace("+00:00", "Z")


def test_a_bill_is_the_sum_of_its_pieces():
    assert (bill().prefill_ns, bill().decode_ns, bill().gpu_time_ns) == (11, 22, 33)


def test_the_whole_of_a_bill_is_a_piece_that_adds_up_all_in_the_first_hour():
    amounts = tuple(range(1, len(UsagePiece._fields)))
    one, other = UsagePiece(7, *amounts), UsagePiece(8, *(10 * amount for amount in amounts))
    assert make_bill(pieces=(one, other)).whole() == (7, *(11 * amount for amount in amounts))
    assert make_bill(pieces=(one,)).whole() == one
    assert make_bill(pieces=()).whole().gpu_time_ns == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"seq": 0},
        {"pieces": (UsagePiece(1, -1, 0, 0, 0),)},
        {"pieces": (PIECE, UsagePiece(1, 0, -1, 0, 0))},
    ],
)
def test_a_bill_that_cannot_be_is_refused(changes):
    with pytest.raises(ValueError, match=r"seq starts at 1|cannot be negative"):
        read_bill(write_bill(bill(**changes)))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "[1,2]", '["run",1]', "not json", write_bill(bill())[:-1]]
)
def test_what_is_no_bill_is_refused(text):
    with pytest.raises(ValueError, match="expected the text of a bill"):
        read_bill(text)


def test_a_bill_rides_as_a_compact_array():
    assert write_bill(bill(external_tokens=384)) == (
        '["run",1,"internal-1","stopped","tokens",10,2,5,0,6,12,1,3,'
        "[[500000,1,2,3,4,0,0,0,0,0,0,0,0,0,0,null],[500001,10,20,30,40,5,6,7,8,9,10,11,12,13,14,null]],384]"
    )


def test_totals_are_the_sum_of_all_classes():
    totals = ClassTotals(**{name: 10**n for n, name in enumerate(CLASSES)})
    assert totals.total() == 1_111_111_111
    assert totals.plus(totals).total() == 2_222_222_222
    assert list(totals.as_dict()) == list(CLASSES)


@pytest.mark.parametrize("wire", [{}, {"totals": {}, "hours": {}}, {"totals": None}])
def test_what_is_no_snapshot_is_refused(wire):
    with pytest.raises((TypeError, KeyError)):
        Snapshot.from_wire(wire)
