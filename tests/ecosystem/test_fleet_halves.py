"""The two bills of one request, sent to one fleet by a prefill server and by a decode server."""

from dataclasses import replace
from pathlib import Path

from tests.component.ledger.test_reader import http, part
from tests.ecosystem.test_fleet import send, write
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.records.requests import KV_CONSUMER, KV_PRODUCER


def test_the_halves_of_a_request_meet_in_the_fleet_and_not_before(tmp_path: Path, url: str) -> None:
    for run, role in (("prefill", KV_PRODUCER), ("decode", KV_CONSUMER)):
        ledger = f"sqlite:///{tmp_path / run}.db"
        for seq, tenant in ((1, "alice"), (2, "bob")):
            bill = replace(part(seq, f"{run}-{seq}", run_id=run, tenant=tenant), kv_role=role)
            reply = http(f"{run}-{seq}", tenant=tenant)
            write(ledger, bill, replace(reply, x_request_id="chosen by both"))
        send(ledger, url)
        with LedgerReader(ledger) as alone:
            assert [row["cost_nanousd"] for row in alone.look_up("chosen by both")] == [7, 7]
    with LedgerReader(url) as fleet:
        for tenant in ("alice", "bob"):
            (row,) = fleet.look_up("chosen by both", tenant)
            assert (row["tenant"], row["cost_nanousd"]) == (tenant, 14)
            assert {one["run_id"] for one in row["parts"]} == {"prefill", "decode"}
        assert len(fleet.look_up("chosen by both")) == 2
