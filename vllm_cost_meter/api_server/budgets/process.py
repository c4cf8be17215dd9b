"""The process that counts what budgets have used, beside an API server: its main program.

To count the bills of a busy month takes seconds of a processor, and each look some milliseconds of
the interpreter's lock: no token may wait for that. The process looks when it is asked. A question
that comes while it still looks has the answer of that look.

Invariant: the ledger is read by one thread only.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import msgspec

from vllm_cost_meter.api_server.budgets.looks import BudgetLooks
from vllm_cost_meter.api_server.budgets.messages import (
    LOOK,
    RULES,
    CounterHello,
    Looked,
    LookQuestion,
    SentFigures,
    SentRules,
)
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.side_process import entry
from vllm_cost_meter.side_process.channel import decoded
from vllm_cost_meter.side_process.entry import ToServer
from vllm_cost_meter.tenants.budgets import Budget

# Above the lowest: on a machine without a spare moment figures would be stale, and fail closed.
PRIORITY = 5


class _Counting:
    """Answers the API server's questions."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cost-meter-budgets")
        self._looks: BudgetLooks | None = None
        self._version = 0
        self._budgets: tuple[Budget, ...] = ()
        self._book = PriceBook()
        self._looking: asyncio.Task[Looked] | None = None

    async def main(self, server: ToServer, hello: CounterHello) -> None:
        """Begin: from now on there are answers."""
        self._looks = BudgetLooks(hello.url)
        self._take_rules(hello.rules)
        server.ready()

    async def answer(self, name: str, given: msgspec.Raw) -> Looked:
        """Answer a question; what is asked with it, an `LookQuestion` says."""
        if name != LOOK:
            raise ValueError(f"expected the question {LOOK!r}, got {name!r}")
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(decoded(given, LookQuestion)))
        # Who asked may be gone before the end; the next one has this answer.
        return await asyncio.shield(self._looking)

    def take(self, name: str, value: msgspec.Raw) -> None:
        """Take up news."""
        if name == RULES:
            self._take_rules(decoded(value, SentRules))

    def _take_rules(self, rules: SentRules) -> None:
        self._version = rules.version
        self._budgets, self._book = rules.rules()

    async def _look(self, asked: LookQuestion) -> Looked:
        looks = self._looks
        if looks is None:
            raise RuntimeError("asked before the greeting")
        version = self._version  # Others may come meanwhile.
        given = self._budgets, self._book, asked
        loop = asyncio.get_running_loop()
        figures = await loop.run_in_executor(self._thread, looks.look, *given)
        if figures is None:
            return Looked(None)
        return Looked(SentFigures.of(version, figures), looks.left)


if __name__ == "__main__":
    counting = _Counting()
    entry.run(CounterHello, counting.main, counting.answer, counting.take, priority=PRIORITY)
