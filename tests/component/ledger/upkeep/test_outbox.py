"""What becomes of the outbox of a ledger that is repaired or merged: its fleet gets all anew."""

from tests.component.ledger.test_reader import NOW, http, part
from tests.support.upkeep import url_of
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.fleet import outbox
from vllm_cost_meter.ledger.fleet.changes import unpacked
from vllm_cost_meter.ledger.schema import requests
from vllm_cost_meter.ledger.upkeep.merging import merge
from vllm_cost_meter.ledger.upkeep.repairing import repair


def sending(path, *records):
    """A ledger that sends to a fleet and has these records, all in its outbox."""
    engine = open_database(url_of(path))
    with writing(engine).begin() as connection:
        outbox.begin(connection)
    engine.dispose()
    writer = BatchWriter(url_of(path))
    writer.write(records)
    writer.drop()


def state(path):
    engine = open_database(url_of(path), create=False)
    with engine.connect() as connection:
        found = outbox.read_sender(connection), outbox.next_rows(connection, 0, 1 << 30)
    engine.dispose()
    return found


def test_what_a_transaction_writes_is_in_the_outbox_of_a_ledger_that_sends(tmp_path):
    path = tmp_path / "ledger.db"
    sending(path, part(1, "h1"), http("h1"))
    sender, ((number, content),) = state(path)
    tables = {name: rows for name, _, rows in unpacked(content)}
    assert (number, sender.last_number, sender.sent_number) == (1, 1, 0)
    assert len(tables["requests"]) == len(tables["bill_sums"]) == len(tables["rollup_hours"]) == 1
    assert "rollup_days" not in tables
    assert "journals" not in tables


def test_a_ledger_whose_server_has_no_fleet_any_more_stops_and_remembers_its_names(tmp_path):
    path = tmp_path / "ledger.db"
    sending(path, part(1, "h1"))
    before, _ = state(path)
    for sends in (False, False, None):
        writer = BatchWriter(url_of(path), sends=sends)
        writer.write([part(2, "h2")])
        writer.drop()
        assert state(path) == (None, [])
    writer = BatchWriter(url_of(path), sends=True)
    writer.write([part(3, "h3")])
    writer.drop()
    after, ((number, _),) = state(path)
    assert after.retired == (before.sender_id,)
    assert (after.joined_at, number) == (None, 2)


def test_without_a_fleet_nothing_is_put_in(tmp_path):
    path = tmp_path / "ledger.db"
    writer = BatchWriter(url_of(path))
    writer.write([part(1, "h1")])
    writer.drop()
    assert state(path) == (None, [])


def test_a_bill_that_no_ledger_can_take_is_not_in_the_outbox_either(tmp_path):
    path = tmp_path / "ledger.db"
    sending(path)
    writer = BatchWriter(url_of(path))
    (bad,) = writer.write([part(1, "h1"), part(2, "h2", tenant="a\ud800"), part(3, "h3")])
    writer.drop()
    assert bad.record.bill.seq == 2
    _, ((_, content),) = state(path)
    ((_, columns, rows),) = (each for each in unpacked(content) if each.table == "requests")
    assert columns == tuple(requests.c.keys())
    assert sorted(row[columns.index("seq")] for row in rows) == [1, 3]


def test_a_ledger_that_is_repaired_joins_anew(tmp_path):
    path = tmp_path / "ledger.db"
    sending(path, part(1, "h1"), part(2, "h2"))
    before, _ = state(path)
    assert repair(url_of(path), NOW, force=True) is not None
    after, waiting = state(path)
    assert after.retired == (before.sender_id,)
    assert (after.joined_at, waiting) == (None, [])


def test_a_ledger_that_gets_another_ones_rows_joins_anew_and_one_without_a_fleet_does_not(tmp_path):
    one, two = tmp_path / "one.db", tmp_path / "two.db"
    sending(one, part(1, "h1"))
    open_database(url_of(two)).dispose()
    before, _ = state(one)
    merge(url_of(one), [two], 1)
    after, waiting = state(one)
    assert (after.retired, waiting) == ((before.sender_id,), [])
    merge(url_of(two), [one], 1)
    assert state(two) == (None, [])
