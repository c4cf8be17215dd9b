"""A request that a router split between a prefill and a decode server: one answer, or two.

What decides is the rule of `ledger/fleet/halves.py`; each test changes one thing of a true pair.
"""

from dataclasses import replace
from typing import Any

import pytest

from tests.component.ledger.test_reader import http, part, snapshot
from tests.component.ledger.test_reader import ledger as ledger  # a fixture
from tests.support.builders import make_open
from vllm_cost_meter.ledger.queries.requests import Match
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import KV_CONSUMER, KV_PRODUCER, Usage

ID = "router-1"


def half(run_id: str, role: str | None, seq: int = 1, **changes: Any) -> tuple[Any, Any]:
    """The bill and the reply of one server's half; they are of the HTTP request `run_id`-seq."""
    owner = Owner(changes.pop("tenant", "alice"))
    x_request_id = changes.pop("x_request_id", ID)
    id = f"{run_id}-{seq}"
    bill = replace(part(seq, id, run_id=run_id), kv_role=role, owner=owner, cost_nanousd=100 * seq)
    reply = replace(http(id, Usage(10, None, 5)), owner=owner, x_request_id=x_request_id)
    return replace(bill, **changes), reply


def pair() -> tuple[Any, ...]:
    return (*half("prefill", KV_PRODUCER), *half("decode", KV_CONSUMER, 2))


def costs(ledger: Any, id: str = ID, only: str | None = None) -> list[int]:
    return sorted(row["cost_nanousd"] for row in ledger.reader.look_up(id, only))


def test_the_halves_of_a_request_are_one_answer_with_the_sum_of_both(ledger):
    ledger.write(*pair())
    (row,) = ledger.reader.look_up(ID)
    assert (row["cost_nanousd"], row["gpu_time_ns"], row["prefill_ns"]) == (300, 600, 200)
    assert (row["http_request_id"], row["prefill_http_request_id"]) == ("decode-2", "prefill-1")
    assert row["kv_role"] == f"{KV_CONSUMER}+{KV_PRODUCER}"
    assert [one["run_id"] for one in row["parts"]] == ["prefill", "decode"]
    # The client sent one prompt, and got one output.
    assert (row["prompt_tokens"], row["output_tokens"], row["ttft_ms"]) == (10, 5, 4.0)


def test_explain_has_both_halves(ledger):
    ledger.write(*pair(), snapshot([], run_id="prefill"), snapshot([], run_id="decode"))
    (row,) = ledger.reader.look_up(ID)
    explained = ledger.reader.explain(row)
    assert [one["kv_role"] for one in explained["parts"]] == [KV_PRODUCER, KV_CONSUMER]
    told = "\n".join(explained["text"])
    assert "at a prefill server" in told
    assert "at a decode server" in told
    assert "alone" not in told


def test_by_an_id_of_its_own_each_half_is_found_alone(ledger):
    ledger.write(*pair())
    for id, cost in (("prefill-1", 100), ("decode-2", 200), ("internal-1", 100)):
        (row,) = ledger.reader.look_up(id)
        assert (row["cost_nanousd"], row["prefill_http_request_id"]) == (cost, None)
    assert "part of a prefill server alone" in "\n".join(
        ledger.reader.explain(ledger.reader.look_up("prefill-1")[0])["text"]
    )


def test_a_half_that_has_not_come_is_not_waited_for(ledger):
    ledger.write(*half("prefill", KV_PRODUCER))
    (row,) = ledger.reader.look_up(ID)
    assert (row["cost_nanousd"], row["kv_role"]) == (100, KV_PRODUCER)


def test_by_the_id_in_the_reply_both_are_found(ledger):
    bill, reply = half("decode", KV_CONSUMER, 2)
    same = {"response_id": f"chatcmpl-{ID}"}
    ledger.write(*half("prefill", KV_PRODUCER), replace(bill, **same), replace(reply, **same))
    assert costs(ledger, f"chatcmpl-{ID}") == [300]


def test_halves_are_joined_while_the_decode_server_works(ledger):
    ledger.write(*half("prefill", KV_PRODUCER))
    running = make_open(
        request_id="running", x_request_id=ID, http_request_id="decode-2", kv_role=KV_CONSUMER
    )
    ledger.write(running)
    (match,) = ledger.reader.find(ID)
    assert match == Match("decode-2", prefill_http_request_id="prefill-1")


@pytest.mark.parametrize(
    "other",
    [
        half("decode", KV_CONSUMER, 2, tenant="bob"),
        half("decode", KV_PRODUCER, 2),
        half("decode", None, 2),
        half("prefill", KV_CONSUMER, 2),
    ],
    ids=["another tenant's", "two prefills", "not split", "at one server"],
)
def test_what_only_has_the_same_id_stays_apart(ledger, other):
    ledger.write(*half("prefill", KV_PRODUCER), *other)
    assert costs(ledger) == [100, 200]


def test_an_id_that_a_client_chose_twice_joins_nothing(ledger):
    ledger.write(*pair(), *half("another", None, 3))
    assert costs(ledger) == [100, 200, 300]
    ledger.write(*half("prefill", KV_PRODUCER, 4))
    assert costs(ledger) == [100, 200, 300, 400]


def test_another_tenant_with_the_same_id_neither_joins_nor_hinders(ledger):
    ledger.write(*pair(), *half("prefill", KV_PRODUCER, 3, tenant="bob"))
    assert costs(ledger) == [300, 300]
    assert costs(ledger, only="alice") == [300]
    assert [row["tenant"] for row in ledger.reader.look_up(ID, "bob")] == ["bob"]


def test_every_part_must_be_of_the_half(ledger):
    mixed, _ = half("decode", None, 3)
    ledger.write(*pair(), replace(mixed, http_request_id="decode-2"))
    assert costs(ledger) == [100, 500]


def test_lists_and_totals_have_each_servers_request(ledger):
    ledger.write(*pair())
    page = ledger.reader.requests()["requests"]
    assert sorted(row["cost_nanousd"] for row in page) == [100, 200]
    assert ledger.rows()["alice"]["requests"] == 2
