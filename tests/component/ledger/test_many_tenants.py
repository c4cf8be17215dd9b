"""Ten thousand tenants in one ledger: the report is right, in as many queries as for ten."""

from tests.component.ledger.test_reader import Ledger, http, part, snapshot
from tests.support.statements import statements
from vllm_cost_meter.records.bill import UsagePiece

TENANTS = 10_000


def test_ten_thousand_tenants_are_reported_each_with_its_own(tmp_path):
    """Tenant n has used n ns, at one USD a second."""
    answer, asked = report_of(TENANTS, tmp_path / "ledger.db")

    rows = [row for row in answer["tenants"] if not row["tenant"].startswith("__")]
    expected = [(f"tenant-{n}", n, n, 1, 10) for n in range(TENANTS, 0, -1)]
    columns = ("tenant", "gpu_time_ns", "cost_nanousd", "requests", "prompt_tokens")
    assert [tuple(row[column] for column in columns) for row in rows] == expected
    assert answer["adds_up"]
    _, asked_of_ten = report_of(10, tmp_path / "ten.db")
    assert asked == asked_of_ten, "no query is asked tenant by tenant"


def report_of(tenants, path):
    """Return the report of a ledger with so many tenants, and the statements it took."""
    bills = [
        part(
            n,
            f"h{n}",
            tenant=f"tenant-{n}",
            pieces=(UsagePiece(500_000, n - n // 2, n // 2, 8, 5),),
        )
        for n in range(1, tenants + 1)
    ]
    told = [http(f"h{n}", tenant=f"tenant-{n}") for n in range(1, tenants + 1)]
    ledger = Ledger(f"sqlite:///{path}")
    ledger.write(*bills, *told, snapshot(bills), usd="3600")
    with statements() as asked:
        answer = ledger.tenants()
    ledger.close()
    return answer, len(asked)
