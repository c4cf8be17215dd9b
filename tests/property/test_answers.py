"""Whatever is in a ledger, an answer has the fields of its type, of those types, and no other."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typing_extensions import is_typeddict

from tests.property.test_ledger_books import (
    NOW,
    http_of,
    open_of,
    parts_of,
    runs,
    snapshot_of,
    store,
)
from tests.property.test_ledger_prices import HOUR, book_of, entries
from tests.support.small_ledger import small_ledger
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.queries.answers import Audit, CostModelRow
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.reports.answers import Report, Summary, Tenant, TenantsReport
from vllm_cost_meter.reports.grammar import question
from vllm_cost_meter.reports.request_answers import Explanation, RequestsPage, RequestWithParts
from vllm_cost_meter.reports.statement_answers import Statement, TenantStatement

few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
AT = AsOf(NOW, 0)
LATER = AsOf(NOW + 10**12, 0)


# It takes a millisecond, and is asked for each row.
hints_of = cache(get_type_hints)


def assert_is(answer: Any, kind: Any) -> None:
    """Types of values by msgspec, which takes no other; and names of fields, which it ignores."""
    msgspec.convert(answer, kind, strict=True)
    assert_names(answer, kind)


def assert_names(answer: Any, kind: Any) -> None:
    if is_typeddict(kind):
        assert set(answer) <= set(kind.__annotations__), kind
        assert kind.__required_keys__ <= set(answer), kind
        for name, each in hints_of(kind).items():
            if name in answer:
                assert_names(answer[name], each)
    elif isinstance(answer, list):
        for each in answer:
            assert_names(each, get_args(kind)[0])


def check(reader: LedgerReader, as_of: AsOf) -> None:
    for window in ((), (HOUR, HOUR + 1), (HOUR + 9, None)):
        assert_is(reader.tenants(*window, as_of=as_of), TenantsReport)
        assert_is(reader.summary(*window, as_of=as_of), Summary)
        for row in reader.tenants(*window, as_of=as_of)["tenants"]:
            assert_is(reader.tenant(row["tenant"], *window, as_of=as_of), Tenant)
    for words in ({"aggregate": "day"}, {"aggregate": "tenant,hour", "step": "1h"}):
        answer = reader.report(question(**words), as_of)
        msgspec.convert(answer, Report, strict=True)
        columns = set(words["aggregate"].split(","))
        for row in (row for one in answer["series"] for row in one["rows"]):
            for column in columns:
                del row[column]
        assert_names(answer, Report)
    assert_is(reader.audit(as_of), Audit)
    assert_is(reader.cost_models(), list[CostModelRow])
    assert_is(reader.requests(as_of=as_of), RequestsPage)
    for listed in reader.requests(as_of=as_of)["requests"]:
        for row in reader.look_up(listed["http_request_id"]):
            assert_is(row, RequestWithParts)
            assert_is(reader.explain(row), Explanation)
    everyone = reader.statement("2027-01", as_of=as_of)
    assert_is(everyone, Statement)
    for line in everyone["tenants"]:
        assert_is(reader.statement("2027-01", tenant=line["tenant"], as_of=as_of), TenantStatement)


@few
@given(runs, entries, st.booleans())
def test_answers_of_any_ledger_are_of_their_types(drawn, priced, answered):
    parts = [parts_of(n, bills) for n, (bills, _, _) in enumerate(drawn)]
    snapshots = [
        snapshot_of(n, bills, other_time, gpus)
        for n, (bills, (_, other_time, gpus)) in enumerate(zip(parts, drawn, strict=True))
    ]
    bills = [part for run in parts for part in run]
    told = {part.http_request_id: http_of(part) for part in bills} if answered else {}
    # The last bill is on its way: its request is open.
    records = [*bills[:-1], *map(open_of, bills), *told.values(), *snapshots]
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'ledger.db'}"
        engine = open_database(url)
        store(engine, records, seed=0)
        engine.dispose()
        reader = LedgerReader(url, book=book_of(priced))
        check(reader, AT)
        check(reader, LATER)
        reader.close()


def test_answers_with_energy_overheads_and_models_are_of_their_types(tmp_path):
    reader = small_ledger(tmp_path)
    check(reader, AsOf(settle_s=0))
    reader.close()
