"""What somebody writes who has the installed package only: every public name, fully typed."""

import json
import sys
from typing import Any

from vllm_cost_meter import (
    CostMeterError,
    LedgerReader,
    PriceBook,
    __version__,
    load_settings,
    open_ledger,
)
from vllm_cost_meter.economics import c_eff


def answers(ledger: LedgerReader) -> dict[str, Any]:
    request = ledger.request("chatcmpl-1")
    assert request is not None
    return {
        "report": ledger.report(
            window="2027-01", aggregate="tenant,day", step="1w", idle="proportional"
        ),
        "statement": ledger.statement("2027-01", tenant="search", idle="proportional"),
        "audit": ledger.audit(),
        "request": request,
        "explain": ledger.explain(request),
        "nobody": ledger.request("an id that nobody has"),
    }


def error_of(url: str) -> str:
    try:
        open_ledger(url)
    except CostMeterError as error:
        return str(error)
    return ""


def main(path: str) -> None:
    book: PriceBook = load_settings({"COST_METER_GPU_HOUR_USD": "2.5"}).price_book
    with open_ledger(path, book=book) as ledger:
        found = answers(ledger)
    version: str = __version__
    usd: float | None = c_eff(usd_per_hour=3.6, total_tokens_per_s=1000).usd_per_m_total_tokens
    rest = {"version": version, "usd": usd, "error": error_of(path + ".not")}
    print(json.dumps(found | rest))


if __name__ == "__main__":
    main(sys.argv[1])
