"""Ten thousand tenants in one ledger: the report is right to the last of them, and soon there."""

import time

from tests.component.ledger.test_reader import Ledger, http, part, snapshot
from vllm_cost_meter.records.bill import UsagePiece

TENANTS = 10_000


def test_ten_thousand_tenants_are_reported_each_with_its_own(tmp_path):
    """Tenant n has used n ns, at one USD a second."""
    bills = [
        part(
            n,
            f"h{n}",
            tenant=f"tenant-{n}",
            pieces=(UsagePiece(500_000, n - n // 2, n // 2, 8, 5),),
        )
        for n in range(1, TENANTS + 1)
    ]
    told = [http(f"h{n}", tenant=f"tenant-{n}") for n in range(1, TENANTS + 1)]
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.write(*bills, *told, snapshot(bills), usd="3600")
    start_s = time.monotonic()
    answer = ledger.tenants()
    took_s = time.monotonic() - start_s
    ledger.close()

    rows = [row for row in answer["tenants"] if not row["tenant"].startswith("__")]
    expected = [(f"tenant-{n}", n, n, 1, 10) for n in range(TENANTS, 0, -1)]
    columns = ("tenant", "gpu_time_ns", "cost_nanousd", "requests", "prompt_tokens")
    assert [tuple(row[column] for column in columns) for row in rows] == expected
    assert answer["adds_up"]
    # 0.8 s measured on a busy machine.
    assert took_s < 5
