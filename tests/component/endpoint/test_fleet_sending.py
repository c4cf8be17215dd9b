"""What the side endpoint says of a ledger that is sent to a fleet."""

from tests.component.endpoint.test_app import Side
from vllm_cost_meter.endpoint.answers import NO_METER


def test_a_summary_says_how_the_ledger_is_sent_to_the_fleet(tmp_path):
    fleet = {
        **{"waiting_rows": 3, "waiting_bytes": 411, "sent_at": "2027-01-15T08:00:00.000000Z"},
        **{"failures": 2, "last_error": "fleet postgresql://db/fleet: connection refused"},
    }
    side = Side(tmp_path, health=lambda: {**NO_METER, "fleet": fleet})
    assert side.get("/cost/summary").json()["fleet"] == fleet
    assert side.get("/cost/health").json()["fleet"] == fleet
    side.reader.close()
