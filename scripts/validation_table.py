"""Print what `validate --roofline --json` says as the table of docs/explanation/attribution.md.

vllm-cost-meter validate --roofline --json | tail -1 | python scripts/validation_table.py
"""

import json
import sys
from typing import Any


def main() -> None:
    answer = json.load(sys.stdin)
    methods = list(next(iter(answer.values()))["methods"])
    print("| GPU / model / batch | noise p95 |", *(f"{method} |" for method in methods))
    print("|---|---|" + "---|" * len(methods))
    for name, found in answer.items():
        noise = percent(found["noise"]["request_error"]["p95"])
        cells = [cell(found["methods"][method]) for method in methods]
        print("|", " | ".join([name.replace("/", " / "), noise, *cells]), "|")


def cell(errors: dict[str, Any]) -> str:
    figures = (
        errors["request_error"]["p95"],
        errors["tenant_error"]["max"],
        errors["misplaced_share"],
        errors["outside_interval_share"],
    )
    return " · ".join(percent(figure) for figure in figures)


def percent(fraction: float) -> str:
    value = 100 * fraction
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    main()
