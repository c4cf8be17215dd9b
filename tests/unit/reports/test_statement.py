"""Statements from facts by hand, their notes, and how they are written."""

import io
import json
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser

import pytest

from vllm_cost_meter.prices.cost import Rates
from vllm_cost_meter.records.owner import OWN, TenantScope
from vllm_cost_meter.reports.facts import UNALLOCATED, Ended, Facts, Used
from vllm_cost_meter.reports.idle import IdlePolicy
from vllm_cost_meter.reports.statement import (
    OverheadCost,
    format_cents,
    month_question,
    notes,
    statement,
)
from vllm_cost_meter.reports.statement_html import statement_html
from vllm_cost_meter.reports.statement_text import print_statement
from vllm_cost_meter.units.calendar import zone_of

UTC = zone_of(None)
HOUR = 500_000  # 2027-01-15T08Z
DAY = HOUR + 24
AFTER = (HOUR + 24 * 30) * 3600 * 10**9
SECOND = 10**9
EVIL = "<script>alert('x')</script>"
RENT = OverheadCost("rent", "lease 7", Fraction(10 * 10**9))


def facts(used, other_time, ended=(), missing_ns: int = 0) -> Facts:
    used = [Used(*one) for one in used]
    other_time = [Used("run", hour, (name,), ns) for hour, name, ns in other_time]
    wall = [one._replace(key=()) for one in (*used, *other_time)]
    total = sum(one.gpu_time_ns for one in wall) + missing_ns
    return Facts(used, other_time, ended, wall, total)


# A GPU-second costs a cent: alice 100.4 + 50.4, bob 30.4, idle 60, host 6.
MONTH = facts(
    used=[
        ("run", HOUR, ("alice", "m"), 100_400 * SECOND // 1000),
        ("run", DAY, ("alice", "m"), 50_400 * SECOND // 1000),
        ("run", DAY, ("bob", "n"), 30_400 * SECOND // 1000),
    ],
    other_time=[(HOUR, "idle", 40 * SECOND), (DAY, "idle", 20 * SECOND), (DAY, "host", 6 * SECOND)],
    ended=[Ended(HOUR, ("alice", "m"), (2, 30, 10, 7, 16, 30))],
)


def cent(run_id: str, hour: int) -> Rates:
    return Rates(Fraction(36))


def only_run(run_id: str, hour: int) -> Rates | None:
    return cent(run_id, hour) if run_id == "run" else None


def make(known=MONTH, idle="none", price_of=cent, month="2027-01", zone=UTC, tenant=None, **told):
    whose = None if tenant is None else TenantScope(tenant, OWN)
    asked = month_question(month, zone, IdlePolicy.parse(idle), whose)
    return statement(known, asked, price_of, **{"now_ns": AFTER, **told})


def about(answer):
    """The answer with what the ledger adds to it."""
    return {
        "month": "2027-01",
        "window": {
            "from": "2027-01-01T00:00:00.000000Z", "to": "2027-02-01T00:00:00.000000Z",
            "tz": "Europe/Berlin",
        },
        "taken_at": "2027-01-31T23:00:00.000000Z",
        "methods": ["shapley"],
        "preemption_paid_by": ["victim"],
        "prices": [{
            "usd_per_gpu_hour": "36", "usd_per_kv_block_hour": None, "amount": "36",
            "currency": "USD", "scope": "gpu",
            "gpus": 1, "usd_rate": "1", "kind": "reserved", "source": "invoice 9",
            "effective_from": "2027-01-01T00:00:00.000000Z",
        }],
        **answer,
    }  # fmt: skip


def cents(answer, *names):
    names = names or ("amount_cents",)
    return [(line["tenant"], line["day"], line["item"], *(line[n] for n in names))
            for line in answer["lines"] if line["amount_cents"]]  # fmt: skip


def text(answer) -> str:
    out = io.StringIO()
    print_statement(about(answer), out)
    return out.getvalue()


# ---- lines


def test_lines_are_by_model_and_day_and_classes_by_themselves():
    answer = make()
    # 100.4 + 50.4 = 150.8 and 30.4, of 247.2 in all: alice 151, bob 30, idle 60, host 6.
    assert cents(answer) == [
        ("alice", "2027-01-15", "m", 101), ("alice", "2027-01-16", "m", 50),
        ("bob", "2027-01-16", "n", 30), (None, None, "__idle__", 60), (None, None, "__host__", 6),
    ]  # fmt: skip
    assert [(one["tenant"], one["amount_usd"]) for one in answer["tenants"]] == [
        ("alice", "1.51"), ("bob", "0.30"),
    ]  # fmt: skip
    assert answer["total"]["amount_usd"] == answer["whole"]["amount_usd"] == "2.47"


def test_a_line_has_every_figure():
    assert make(tenant="alice")["lines"][0] == {
        "kind": "usage", "tenant": "alice", "day": "2027-01-15", "item": "m", "source": None,
        "requests": 2, "prompt_tokens": 30, "cached_tokens": 10, "output_tokens": 7,
        "external_tokens": 16, "external_known_tokens": 30,
        "gpu_time_ns": 100_400_000_000, "idle_share_ns": 0, "charge_known_ns": 0,
        "charge_error_ns": 0, "charge_error": None, "kv_block_ms": None,
        "usd_per_kv_block_hour": None, "usage_cents": 101,
        "idle_share_cents": 0, "amount_cents": 101, "usage_usd": "1.01", "idle_share_usd": "0.00",
        "amount_usd": "1.01", "cost_reason": None, "covers": "own",
    }  # fmt: skip


# Alice held blocks on two days, on the first at two prices: 1000 and 3000 block-hours, then 500.
BLOCKS = facts(
    used=[
        ("run", HOUR, ("alice", "m"), SECOND, 3_600_000 * 1000),
        ("dear", HOUR, ("alice", "m"), SECOND, 3_600_000 * 3000),
        ("run", DAY, ("alice", "m"), SECOND, 3_600_000 * 500),
        ("run", DAY, ("bob", "m"), SECOND),
    ],
    other_time=[],
)


def with_blocks(run_id: str, hour: int) -> Rates:
    return Rates(Fraction(36), Fraction("0.0001") if run_id == "run" else Fraction("0.0002"))


def test_blocks_have_a_line_of_their_own_with_quantity_and_price():
    answer = make(BLOCKS, price_of=with_blocks)
    found = [
        tuple(line[name] for name in ("kind", "day", "kv_block_ms", "usd_per_kv_block_hour"))
        + (line["gpu_time_ns"], line["amount_usd"])
        for line in answer["lines"]
        if line["tenant"] == "alice"
    ]
    assert found == [
        ("usage", "2027-01-15", None, None, 2 * SECOND, "0.02"),
        ("kv", "2027-01-15", 3_600_000 * 4000, "0.000175", None, "0.70"),
        ("usage", "2027-01-16", None, None, SECOND, "0.01"),
        ("kv", "2027-01-16", 3_600_000 * 500, "0.0001", None, "0.05"),
    ]
    assert {line["kind"] for line in answer["lines"] if line["tenant"] == "bob"} == {"usage"}
    whole = answer["whole"]
    assert (whole["wall_cents"], whole["kv_cents"], whole["amount_cents"]) == (4, 75, 79)
    assert answer["total"]["kv_block_ms"] == 3_600_000 * 4500
    assert answer["total"]["amount_cents"] == sum(x["amount_cents"] for x in answer["lines"])


def test_a_statement_as_text_and_html_shows_blocks_only_where_they_have_a_price():
    answer = about(make(BLOCKS, price_of=with_blocks))
    shown = text(answer)
    assert "KV cache of m" in shown
    assert "whole: 4.000000 GPU-seconds of wall time x price 0.04 + KV cache 0.75 = 0.79" in shown
    assert "charged on top of GPU time" in shown
    page = statement_html(answer)
    assert "<th>KV block-hours</th><th>USD per KV block-hour</th>" in page
    assert "<td>4000.000000</td><td>0.000175</td>" in page
    for free in (text(make(BLOCKS)), statement_html(about(make(BLOCKS)))):
        assert "KV" not in free


def test_tenants_are_rounded_before_their_lines():
    """Rounded all at once, the hundred lines of 0.4 cents would give all to the one of 0.6."""
    many = [("run", HOUR, ("many", f"m{n:03d}"), 400_000_000) for n in range(100)]
    answer = make(facts([*many, ("run", HOUR, ("one", "m"), 600_000_000)], []))
    assert {one["tenant"]: one["amount_cents"] for one in answer["tenants"]} == {
        "many": 40, "one": 1,
    }  # fmt: skip


def test_an_idle_share_stands_beside_usage_and_adds_up_on_each_line():
    answer = make(idle="even")
    assert cents(answer, "usage_cents", "idle_share_cents", "amount_cents") == [
        ("alice", "2027-01-15", "m", 100, 22, 122), ("alice", "2027-01-16", "m", 51, 11, 62),
        ("bob", "2027-01-16", "n", 30, 33, 63),
    ]  # fmt: skip
    assert answer["total"]["amount_cents"] == 247
    idle = next(line for line in answer["lines"] if line["item"] == "__idle__")
    assert (idle["gpu_time_ns"], idle["usage_cents"], idle["idle_share_cents"]) == (
        60 * SECOND, 60, -60,
    )  # fmt: skip


def test_who_reserved_capacity_and_used_none_has_lines_too():
    answer = make(idle="reserved:carol=50", tenant="carol")
    assert cents(answer) == [
        ("carol", "2027-01-15", UNALLOCATED, 20), ("carol", "2027-01-16", UNALLOCATED, 13),
    ]  # fmt: skip
    assert answer["idle"] == "reserved", "what others reserved is not theirs to know"
    assert make(idle="reserved:carol=50")["idle"] == "reserved:carol=50"


def test_overhead_is_shared_as_idle_is_with_its_source():
    answer = make(idle="proportional", overhead=[RENT])
    rent = {line["tenant"]: line for line in answer["lines"] if line["kind"] == "overhead"}
    assert {name: line["amount_cents"] for name, line in rent.items()} == {
        "alice": 832, "bob": 168,
    }  # fmt: skip
    assert (rent["bob"]["source"], rent["bob"]["gpu_time_ns"]) == ("lease 7", None)
    assert answer["whole"] == {
        "wall_gpu_ns": 247_200_000_000, "wall_cents": 247, "kv_cents": 0,
        "overhead": [{"name": "rent", "source": "lease 7", "cents": 1000}],
        "amount_cents": 1247, "amount_usd": "12.47",
    }  # fmt: skip
    assert answer["total"]["amount_cents"] == 1247


def test_overhead_that_nobody_carries_has_a_line_of_its_own():
    answer = make(overhead=[RENT])
    assert cents(answer)[-1] == (None, None, "rent", 1000)
    assert make(overhead=[RENT], tenant="bob")["total"]["amount_cents"] == 30


def test_overhead_that_is_not_known_makes_totals_unknown_and_no_line_else():
    answer = make(overhead=[OverheadCost("tax", "law", None)])
    assert cents(answer)[0] == ("alice", "2027-01-15", "m", 101)
    assert (answer["total"]["amount_usd"], answer["whole"]["amount_usd"]) == (None, None)
    assert answer["tenants"][0]["amount_cents"] == 151


def test_a_tenant_without_a_line_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"^tenant: expected .* \('alice', 'bob'\), got 'alise'$"):
        make(tenant="alise")
    with pytest.raises(ValueError, match=r"\(none\), got 'x'$"):
        make(facts([], []), tenant="x")


def test_what_is_no_month_is_refused():
    with pytest.raises(ValueError, match="^month: expected a month such as 2026-11, got '2027'$"):
        make(month="2027")


# ---- what is not known, or not over


def test_without_a_price_time_is_told_and_money_is_unknown():
    answer = make(price_of=lambda run_id, hour: None)
    line = answer["lines"][0]
    assert (line["gpu_time_ns"], line["amount_cents"], line["usage_usd"]) == (
        100_400_000_000, None, None,
    )  # fmt: skip
    assert line["cost_reason"] == "no price for run run"
    assert {answer[name]["amount_usd"] for name in ("total", "whole")} == {None}
    assert "total: unknown, no price" in text(answer)


def test_one_run_without_a_price_leaves_the_tenants_of_others_known():
    known = facts(
        [("run", HOUR, ("alice", "m"), 5 * SECOND), ("free", HOUR, ("bob", "m"), SECOND)], []
    )
    answer = make(known, price_of=only_run)
    assert [(one["tenant"], one["amount_usd"]) for one in answer["tenants"]] == [
        ("alice", "0.05"), ("bob", None),
    ]  # fmt: skip


def test_idle_without_a_price_leaves_usage_known():
    known = facts([("run", HOUR, ("alice", "m"), 5 * SECOND)], [(HOUR, "idle", SECOND)])
    known = replace(known, other_time=[known.other_time[0]._replace(run_id="free")])
    line = make(known, idle="even", price_of=only_run)["lines"][0]
    assert (line["usage_usd"], line["idle_share_usd"], line["amount_usd"]) == ("0.05", None, None)


@pytest.mark.parametrize(
    ("now_ns", "in_flight", "final", "said"),
    [
        (AFTER, 0, True, []),
        (HOUR * 3600 * 10**9, 0, False, ["the month is not over; figures are of 2027-01-31T23"]),
        (AFTER, 5 * SECOND, False, ["5.000000 GPU-seconds of requests without a bill yet"]),
    ],
)
def test_a_statement_that_may_change_says_why(now_ns, in_flight, final, said):
    answer = make(facts([], [(HOUR, "in_flight", in_flight)]), now_ns=now_ns)
    assert answer["final"] is final
    found = [note for note in notes(about(answer)) if note.startswith("preliminary: ")]
    assert [text in note for text, note in zip(said, found, strict=True)] == [True] * len(said)
    assert (", preliminary\n" in text(answer)) is not final


def test_books_that_do_not_balance_are_told():
    answer = make(facts(MONTH.used, [], missing_ns=7))
    assert (answer["adds_up"], answer["difference_ns"]) == (False, 7)
    assert "audit: DOES NOT ADD UP: 7 ns of wall time x GPUs are missing" in notes(about(answer))


@pytest.mark.parametrize(
    ("cents", "shown"),
    [(None, None), (0, "0.00"), (5, "0.05"), (123_456, "1234.56"), (-5, "-0.05"), (-250, "-2.50")],
)
def test_cents_are_dollars_with_two_places(cents, shown):
    assert format_cents(cents) == shown


# ---- written


def test_the_notes_say_how_the_figures_came_about():
    said = notes(about(make(idle="even")))
    assert said == [
        "GPU time is measured: each engine step's time is split among the requests in it "
        "(shapley; docs/explanation/attribution.md)",
        "idle time: charged evenly to the tenants that used something (policy even)",
        "days are those of Europe/Berlin; each UTC hour is of the day in which it begins",
        "price: 36 USD per GPU-hour (gpu, reserved, from 2027-01-01T00Z, invoice 9)",
        "rounded to the cent by largest remainder; tokens are of requests that ended on the day",
        "audit: difference 0 ns: lines and classes are all of wall time x GPUs",
    ]
    unpriced = notes({**about(make()), "prices": [], "methods": []})
    assert "price: none, so no cost is known" in unpriced
    assert "(no engine ran; docs/explanation/attribution.md)" in unpriced[0]


def test_a_tenants_table_has_its_lines_and_its_total():
    shown = text(make(tenant="alice")).splitlines()
    assert shown[0] == "Statement of alice on its own, 2027-01 (Europe/Berlin)"
    assert shown[1].split() == [
        "day", "item", "requests", "prompt_tokens", "cached_tokens", "output_tokens",
        "gpu_seconds", "idle_share_seconds", "usage_usd", "idle_share_usd", "amount_usd",
    ]  # fmt: skip
    assert [line.split()[-1] for line in shown[2:5]] == ["1.01", "0.50", "1.51"]
    assert shown[4].split()[:2] == ["total", "2"]
    assert shown[5:7] == ["taxes: none", "total: 1.51 USD"]


def test_the_table_of_all_ends_with_what_was_paid():
    shown = text(make(overhead=[RENT]))
    names = [line.split()[0] for line in shown.splitlines()[2:7]]
    assert names == ["alice", "alice", "alice", "bob", "bob"]
    assert "grand total" in shown
    assert (
        "whole: 247.200000 GPU-seconds of wall time x price 2.47 + rent 10.00 = 12.47 USD\n"
    ) in shown


def test_the_table_leaves_out_classes_in_which_no_time_was_spent():
    answer = make()
    items = {line["item"]: line["gpu_time_ns"] for line in answer["lines"] if not line["tenant"]}
    assert {name for name, ns in items.items() if ns} == {"__idle__", "__host__"}
    assert "__idle__" in text(answer)
    assert "__sleep__" in items
    assert "__sleep__" not in text(answer)


class Page(HTMLParser):
    """The cells of a page, the text outside tables, and all tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data.rstrip("\n")
        else:
            self.texts.append(data.strip())


def test_the_page_has_the_lines_the_totals_and_the_notes():
    answer = about(make(overhead=[RENT]))
    page = Page(statement_html(answer))
    head, *rows = page.rows
    assert head[:3] == ["Tenant", "Day", "Model or item"]
    assert rows[0][-3:] == ["1.01", "0.00", "1.01"]
    assert rows[0][7] == "100.400000"
    assert [row[-1] for row in rows if row[2] == "grand total"] == ["12.47"]
    assert set(notes(answer)) <= set(page.texts)
    assert "total: 12.47 USD" in page.texts
    assert Page(statement_html(about(make(tenant="bob")))).rows[0][0] == "Day"


def test_the_page_explains_a_cent_of_idle_time_that_is_only_rounding() -> None:
    answer = about(make(tenant="bob"))
    odd = {**answer["lines"][0], "idle_share_ns": 0, "idle_share_usd": "0.01"}
    explained = (
        "cents: Idle share is Amount less Usage, and both are rounded so that they add up; so it"
        " may be 0.01 or -0.01 where no idle time is charged"
    )
    assert explained in Page(statement_html({**answer, "lines": [odd]})).texts
    even = {**odd, "idle_share_usd": "0.00"}
    assert explained not in Page(statement_html({**answer, "lines": [even]})).texts


def test_the_page_loads_and_runs_nothing_and_prints_on_paper():
    html = statement_html(about(make()))
    assert set(Page(html).tags) == {
        *("html", "head", "meta", "title", "style", "body", "h1", "p", "div", "ul", "li"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    assert "http" not in html
    assert "@media print" in html
    assert "@page" in html


def test_what_clients_chose_is_text_on_the_page_and_at_the_terminal():
    known = facts([("run", HOUR, (EVIL, "\x1b[2J<b>"), SECOND)], [])
    for told in ({"tenant": EVIL}, {}):
        answer = make(known, overhead=[OverheadCost(EVIL, EVIL, Fraction(1))], **told)
        html = statement_html(about(answer))
        assert EVIL not in html
        assert "<b>" not in html
        assert "\x1b" not in html + text(answer)
        assert any(EVIL in "".join(row) for row in Page(html).rows) or told
        assert "script" not in Page(html).tags


def test_a_statement_is_json():
    assert json.loads(json.dumps(about(make(idle="owner:bob", overhead=[RENT]))))
