"""The command `explain`: show how a request's bill was computed, factor by factor."""

import json
from typing import Annotated

import typer

from vllm_cost_meter.cli.options import Config, Json, Ledger, dropped_lines, reading
from vllm_cost_meter.ledger.economics.figures import FIGURES
from vllm_cost_meter.units.text import plain


def explain(
    request_id: Annotated[
        str,
        typer.Argument(
            help="The id in the reply, X-Request-Id, the meter's own, or vLLM's internal one."
        ),
    ],
    ledger: Ledger = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """How the bill of one request came about.

    It prints every factor, so that you can compute the bill again by hand.

    Example: vllm-cost-meter explain chatcmpl-4f1c
    """
    with reading(ledger, config) as reader:
        rows = reader.look_up(request_id)
        if not rows:
            raise ValueError(
                "; ".join([_not_found(request_id), *dropped_lines(reader.kept_from())])
            )
        answers = [reader.explain(row) for row in rows]
    if as_json:
        print(json.dumps(answers[0] if len(answers) == 1 else {"matches": answers}, indent=2))
        return
    for answer in answers:
        print("\n".join(plain(line) for line in answer["text"]))


def _not_found(request_id: str) -> str:
    line = f"no request with the id {request_id!r} in the ledger"
    if request_id in FIGURES:
        return f"{line}; a figure is explained by `economics --explain {request_id}`"
    return line
