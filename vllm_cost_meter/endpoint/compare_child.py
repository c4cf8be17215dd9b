"""The child process behind `GET /cost/compare`: reads a question, writes a result as JSON.

The question comes with the settings of the API server; without any this process reads its own. The
result has either `answer`, or `error` (one line) and `kind`. The kind is `question` if the caller
must change the question, `ledger` if the ledger cannot be read, and `failed` for anything else. The
environment variable COST_METER_LEDGER names the ledger, because its URL may hold a password and
command lines are public.

Invariant: the process writes exactly one result, unless it is killed.
"""

import os
import sys
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import msgspec
import orjson

from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.offers import offers_for
from vllm_cost_meter.errors import CostMeterError, LedgerError
from vllm_cost_meter.ledger.economics.answers import Comparison
from vllm_cost_meter.ledger.economics.api_comparison import ComparisonQuestion, compared
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.side_process.entry import end_with_parent
from vllm_cost_meter.side_process.handing import unpacked

LEDGER_VARIABLE = "COST_METER_LEDGER"


class Result(TypedDict):
    """The output of the process: an answer, or an error and its kind."""

    answer: NotRequired[Comparison]
    error: NotRequired[str]
    kind: NotRequired[Literal["question", "ledger", "failed"]]


class ComparisonWork(msgspec.Struct, frozen=True):
    """What the process reads: a question, and the settings that its asker was handed."""

    question: ComparisonQuestion
    settings: bytes | None


def result_of(work: bytes) -> Result:
    """Return the result for some work; never raises."""
    try:
        return {"answer": _answer(msgspec.msgpack.decode(work, type=ComparisonWork))}
    except LedgerError as error:
        return {"error": str(error), "kind": "ledger"}
    except (CostMeterError, ValueError) as error:
        return {"error": str(error), "kind": "question"}
    except Exception as error:  # noqa: BLE001 - the caller gets one line for any error
        line = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
        return {"error": line, "kind": "failed"}


def _answer(work: ComparisonWork) -> Comparison:
    question, handed = work.question, work.settings
    settings = load_settings() if handed is None else unpacked(handed)
    reader = LedgerReader(os.environ[LEDGER_VARIABLE], book=settings.price_book)
    try:
        question.check()
        named = settings.api_prices
        file = None if named is None else Path(named).expanduser()
        offers = offers_for(question.model, question.provider, file, question.label)
        return compared(reader, question, offers, None if file is None else str(file))
    finally:
        reader.close()


if __name__ == "__main__":
    end_with_parent()
    sys.stdout.buffer.write(orjson.dumps(result_of(sys.stdin.buffer.read())))
