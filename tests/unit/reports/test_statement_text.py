"""What a statement at a terminal says of its cents."""

from vllm_cost_meter.reports.statement_text import CENTS_NOTE, cents_notes


def line(idle_share_ns: int | None, idle_share_usd: str | None) -> dict[str, int | str | None]:
    return {"idle_share_ns": idle_share_ns, "idle_share_usd": idle_share_usd}


def test_a_cent_of_idle_time_that_is_only_rounding_is_explained() -> None:
    assert cents_notes([line(0, "0.00"), line(0, "-0.01")]) == [CENTS_NOTE]
    assert cents_notes([line(None, "0.01")]) == [CENTS_NOTE]


def test_cents_of_real_idle_time_and_none_at_all_need_no_note() -> None:
    assert cents_notes([]) == []
    assert cents_notes([line(5, "0.01"), line(0, "0.00"), line(0, None), line(-5, "-0.01")]) == []
