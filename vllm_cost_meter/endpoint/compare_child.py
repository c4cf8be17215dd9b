"""The child process behind `GET /cost/compare`: reads a question, writes a result, both as JSON.

The result has either `answer`, or `error` (one line) and `kind`. The kind is `question` if the
caller must change the question, `ledger` if the ledger cannot be read, and `failed` for anything
else. The environment variable COST_METER_LEDGER names the ledger, because its URL may hold a
password and command lines are public.

Invariant: the process writes exactly one result, unless it is killed.
"""

import sys
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import orjson

from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.offers import offers_for
from vllm_cost_meter.errors import CostMeterError, LedgerError
from vllm_cost_meter.ledger.database import default_url
from vllm_cost_meter.ledger.economics.answers import Comparison
from vllm_cost_meter.ledger.economics.api_comparison import ComparisonQuestion, compared
from vllm_cost_meter.ledger.reader import LedgerReader


class Result(TypedDict):
    """The output of the process: an answer, or an error and its kind."""

    answer: NotRequired[Comparison]
    error: NotRequired[str]
    kind: NotRequired[Literal["question", "ledger", "failed"]]


def result_of(text: bytes) -> Result:
    """Return the result for a question in JSON; never raises."""
    try:
        return {"answer": _answer(ComparisonQuestion(**orjson.loads(text)))}
    except LedgerError as error:
        return {"error": str(error), "kind": "ledger"}
    except (CostMeterError, ValueError) as error:
        return {"error": str(error), "kind": "question"}
    except Exception as error:  # noqa: BLE001 - the caller gets one line for any error
        line = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
        return {"error": line, "kind": "failed"}


def _answer(question: ComparisonQuestion) -> Comparison:
    settings = load_settings()
    reader = LedgerReader(settings.ledger or default_url(), book=settings.price_book)
    try:
        question.check()
        named = settings.api_prices
        file = None if named is None else Path(named).expanduser()
        offers = offers_for(question.model, question.provider, file, question.label)
        return compared(reader, question, offers, None if file is None else str(file))
    finally:
        reader.close()


if __name__ == "__main__":
    sys.stdout.buffer.write(orjson.dumps(result_of(sys.stdin.buffer.read())))
