"""A request is found by its ids, whatever texts other clients choose for theirs."""

import pytest

from tests.component.endpoint.test_app import Side
from tests.component.ledger.test_reader import Ledger, http, part
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.ledger.queries.requests import Match
from vllm_cost_meter.records.client_text import stored


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def test_however_many_requests_carry_somebodys_id_it_is_found(ledger):
    ledger.write(part(1), http())
    forged = [
        http(f"{id}-{n}", at=n + 1, tenant="mallory", x_request_id=id)
        for id in ("h1", "internal-1", "x-h1")
        for n in range(101)
    ]
    ledger.write(*forged)
    # The meter's own id and vLLM's internal one: to everybody, the operator included.
    for id in ("h1", "internal-1"):
        found = ledger.reader.find(id)
        assert (len(found), found[0]) == (100, Match("h1"))
    # What clients choose: to the tenant whose request it is.
    assert ledger.reader.find("x-h1", only="alice") == [Match("h1")]
    assert ledger.reader.find("x-h1", only="ali") == []


def test_a_tenant_finds_its_request_though_others_send_a_hundred_under_its_id(tmp_path):
    access = Access(sha256("admin"), lambda: {sha256("alices"): "alice"})
    side = Side(tmp_path, access=access)
    side.write(*[http(f"f{n}", at=n + 9, tenant="bob", x_request_id="x-h1") for n in range(101)])
    reply = side.get("/cost/requests/x-h1", authorization="Bearer alices")
    assert reply.json()["http_request_id"] == "h1"
    side.reader.close()


def test_a_request_is_found_by_the_whole_of_an_id_that_is_stored_short(ledger):
    long = "x" * 5_000
    ledger.write(http(x_request_id=stored(long)), http("h2", x_request_id=stored(long + "y")))
    assert ledger.reader.find(long) == [Match("h1")]
    # And by what reports show of it.
    assert ledger.reader.find(stored(long)) == [Match("h1")]
