"""Records survive their way: bills as JSON text, snapshots as msgpack, instants as text.

The utility RPC carries plain values through msgspec's msgpack, so that is what is used here.
"""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import Bill, UsagePiece, read_bill, write_bill
from vllm_cost_meter.records.engine import EngineIdentity
from vllm_cost_meter.records.snapshot import CLASSES, ClassTotals, CostModel, LearntCurve, Snapshot
from vllm_cost_meter.units.time import rfc3339, unix_ns_of

count = st.integers(0, 2**63 - 1)
text = st.text(max_size=30)
hours = st.integers(-1_000, 10**6)
pieces = st.builds(UsagePiece, hours, *[count] * 14, st.none() | count)
bills = st.builds(
    Bill,
    run_id=text,
    seq=st.integers(1, 2**63 - 1),
    request_id=text,
    engine_status=text,
    method=text,
    prompt_tokens=count,
    cached_tokens=count,
    output_tokens=count,
    preemptions=count,
    steps=count,
    batch=count,
    first_model=count,
    last_model=count,
    pieces=st.lists(pieces, max_size=4).map(tuple),
    external_tokens=st.none() | count,
)
totals = st.builds(ClassTotals, **dict.fromkeys(CLASSES, count))
plane = st.tuples(*[st.floats(0, 1e12)] * 5)
share = st.floats(0, 1)
models = st.builds(
    CostModel,
    version=count,
    form=text,
    planes=st.tuples(plane, plane) | st.tuples(plane, plane, plane),
    steps=count,
    error_two_planes=share,
    error_other_form=share,
    explained=share,
    curve=st.none()
    | st.builds(
        LearntCurve,
        st.lists(st.floats(0, 1e12), max_size=33).map(tuple),
        st.tuples(count, count),
        st.tuples(count, count, count),
        st.lists(count, max_size=3).map(tuple),
    ),
    charge_errors=st.none() | st.tuples(*[share] * 7),
)
engines = st.builds(
    EngineIdentity,
    **dict.fromkeys(("model", "vllm_version", "meter_version", "hardware", "parallelism"), text),
    **dict.fromkeys(("method", "host", "precision"), text),
    engine_index=count,
    gpus=st.integers(1, 2**31),
    native=st.booleans(),
    **dict.fromkeys(("kv_blocks", "kv_block_size"), st.none() | count),
    labels=st.dictionaries(text, text, max_size=3),
)
snapshots = st.builds(
    Snapshot,
    **dict.fromkeys(
        ("number", "taken_at_ns", "started_at_ns", "wall_ns", "last_seq", "billed_ns", "running"),
        count,
    ),
    **dict.fromkeys(("waiting", "steps", "busy_ns", "own_ns", "errors", "step_ns"), count),
    **dict.fromkeys(("run_id", "state", "prior"), text),
    engine=engines,
    cost_models=st.lists(models, max_size=2).map(tuple),
    totals=totals,
    kv_cache_usage=st.none() | st.floats(0, 1),
    hours=st.dictionaries(hours, totals, max_size=3),
    live=st.lists(
        st.tuples(text, st.builds(Accrued, *[count] * len(Accrued._fields))), max_size=3
    ).map(tuple),
)
# Years 1 to 9999, in nanoseconds since 1970.
instants = st.integers(-62_135_596_800 * 10**9, 253_402_300_800 * 10**9 - 1)


@given(bills)
def test_a_bill_survives_its_ride(bill):
    ridden = read_bill(write_bill(bill))
    assert ridden == bill
    assert ridden.gpu_time_ns == sum(piece.gpu_time_ns for piece in bill.pieces)
    assert ridden.gpu_time_ns == ridden.prefill_ns + ridden.decode_ns


@given(bills)
def test_a_bill_rides_as_one_line(bill):
    assert len(write_bill(bill).split("\n")) == 1
    assert not any(character < " " for character in write_bill(bill))


@given(
    st.text()
    | st.recursive(st.none() | st.integers() | text, st.lists, max_leaves=20).map(json.dumps)
)
def test_anything_else_is_refused_as_an_error_of_value(garbage):
    with pytest.raises(ValueError, match="bill"):
        read_bill(garbage)


@given(snapshots)
def test_a_snapshot_survives_the_wire(snapshot):
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot.to_wire()))
    assert Snapshot.from_wire(wire) == snapshot


@given(snapshots)
def test_the_wire_and_the_snapshot_share_nothing_that_changes(snapshot):
    wire = snapshot.to_wire()
    wire["totals"]["idle"] = -1
    assert snapshot.totals.idle != -1


@given(instants)
def test_an_instant_survives_its_text_to_the_microsecond(unix_ns):
    assert unix_ns_of(rfc3339(unix_ns)) == unix_ns - unix_ns % 1_000


@given(st.lists(instants, max_size=20))
def test_text_order_is_time_order(moments):
    whole = [moment - moment % 1_000 for moment in moments]
    assert [rfc3339(moment) for moment in sorted(whole)] == sorted(map(rfc3339, whole))
    assert len({len(rfc3339(moment)) for moment in moments}) <= 1
