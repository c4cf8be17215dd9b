"""What a report at a terminal says of its last digit."""

from typing import Any

from vllm_cost_meter.cli.report import NANO_USD_NOTE, nano_usd_notes


def answer(idle_share_ns: int, usage: int | None, cost: int | None) -> dict[str, Any]:
    row = {"idle_share_ns": idle_share_ns, "usage_cost_nanousd": usage, "cost_nanousd": cost}
    return {"series": [{"rows": [row]}]}


def test_a_nano_usd_that_is_only_rounding_is_explained() -> None:
    assert nano_usd_notes(answer(0, 7, 8)) == [NANO_USD_NOTE]


def test_what_idle_time_costs_and_what_has_no_price_need_no_note() -> None:
    assert nano_usd_notes(answer(5, 7, 8)) == []
    assert nano_usd_notes(answer(0, 7, 7)) == []
    assert nano_usd_notes(answer(0, None, None)) == []
