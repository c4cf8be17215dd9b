"""Any hours and any bills: days add up to their total to the nano-USD, in every column of money.

The judge is plain Python over the drawn values: it adds up fractions, hour by hour.
"""

import tempfile
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.component.ledger.test_billing import a_file
from tests.component.ledger.test_reader import HOUR, NOW, Ledger, snapshot
from tests.support.examples import examples
from vllm_cost_meter.invoices.timeline import InvoiceLine
from vllm_cost_meter.ledger.billing.importing import import_invoice
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.prices.book import PriceEntry
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR

HOURS = range(HOUR, HOUR + 96)
USED_NS = st.dictionaries(st.sampled_from(HOURS), st.integers(1, NS_PER_HOUR), max_size=12)
# The part of an hour that a line is for, in thousandths, and its nano-USD.
BILLED = st.dictionaries(
    st.sampled_from(HOURS),
    st.tuples(st.integers(1, 1000), st.integers(0, 10**10)),
    max_size=12,
)
PRICE = st.decimals("0.001", 1_000, places=3)
Amount = Fraction | None


def added(amounts: list[Amount]) -> Amount:
    """Return the sum; None if any amount is unknown."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known, Fraction(0)) if len(known) == len(amounts) else None


def judged(used_ns: dict, billed: dict, price_at: Callable[[int], Decimal | None], hours) -> dict:
    """Return the exact amounts of these hours by column."""

    def cost(hour: int) -> Amount:
        price = price_at(hour)
        return None if price is None else used_ns[hour] * Fraction(price) / 3600

    ran = [hour for hour in hours if hour in used_ns]
    bills = [hour for hour in hours if hour in billed]
    both = [hour for hour in ran if hour in billed]
    covered = [
        None if cost(hour) is None else cost(hour) * Fraction(billed[hour][0], 1000)
        for hour in both
    ]
    return {
        "metered": added([cost(hour) for hour in ran]) if ran else None,
        "metered_while_billed": added(covered) if bills else None,
        "billed_gpu": sum(billed[hour][1] for hour in bills) if bills else None,
    }


def nanousd(text: str | None) -> int | None:
    return None if text is None else int(Decimal(text).scaleb(9))


def answer_of(used_ns: dict, billed: dict, price: Decimal, since: int | None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(f"sqlite:///{Path(folder) / 'ledger.db'}")
        try:
            hours = {hour: ClassTotals(idle=ns) for hour, ns in used_ns.items()}
            totals = ClassTotals(idle=sum(used_ns.values()))
            ledger.write(snapshot([], totals=totals, hours=hours))
            ledger.priced(PriceEntry("p", price, "s", since))
            lines = [
                InvoiceLine(
                    *("gpu-1", "gpu", hour * NS_PER_HOUR),
                    hour * NS_PER_HOUR + thousandths * NS_PER_HOUR // 1000,
                    amount,
                )
                for hour, (thousandths, amount) in billed.items()
            ]
            import_invoice(ledger.url, a_file(*lines), NS_PER_HOUR, NOW)
            return ledger.reader.invoice_days(as_of=AsOf(NOW, 0))
        finally:
            ledger.close()


@settings(max_examples=examples(20), deadline=None)
@given(USED_NS, BILLED, PRICE, st.none() | st.sampled_from(HOURS))
def test_days_add_up_to_the_total_to_the_nano_usd_in_every_column(used_ns, billed, price, since):
    answer = answer_of(used_ns, billed, price, since)

    def price_at(hour: int) -> Decimal | None:
        return price if since is None or hour >= since else None

    exact = judged(used_ns, billed, price_at, HOURS)
    by_day = [
        judged(used_ns, billed, price_at, [hour for hour in HOURS if hour // 24 == day])
        for day in sorted({hour // 24 for hour in used_ns.keys() | billed.keys()})
    ]
    assert len(answer["days"]) == len(by_day)
    for row in (answer["total"], *answer["days"]):
        for name in ("billed_disk", "billed_network", "billed_other"):
            assert row[f"{name}_usd"] is None
        metered, bill, difference = (
            nanousd(row[f"{name}_usd"])
            for name in ("metered_while_billed", "billed_gpu", "difference")
        )
        assert difference == (None if metered is None or bill is None else bill - metered)

    def rounded(name: str) -> int | None:
        """Round half to even; a part that lacks whole units of its whole goes the whole's way."""
        amount, whole = exact[name], exact["metered"]
        if amount is None:
            return None
        is_part = name == "metered_while_billed" and whole is not None
        if is_part and (whole - amount).denominator == 1:
            return round(whole) - int(whole - amount)
        return round(amount)

    for shown, of_row in zip([answer["total"], *answer["days"]], [exact, *by_day], strict=True):
        if of_row["metered"] == of_row["metered_while_billed"]:
            assert shown["metered_usd"] == shown["metered_while_billed_usd"]
    for name in exact:
        total = nanousd(answer["total"][f"{name}_usd"])
        assert total == rounded(name), name
        days = [nanousd(row[f"{name}_usd"]) for row in answer["days"]]
        for day, of_day in zip(days, (row[name] for row in by_day), strict=True):
            assert (day is None) == (of_day is None), name
            assert of_day is None or abs(day - of_day) < 1, name
        if total is not None:
            assert sum(day for day in days if day is not None) == total, name
    differences = [nanousd(row["difference_usd"]) for row in answer["days"]]
    if (total := nanousd(answer["total"]["difference_usd"])) is not None:
        assert sum(day for day in differences if day is not None) == total
