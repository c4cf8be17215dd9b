"""A tenant's own figures: what the routes on vLLM's own port answer, made beside the API server.

Invariant: nothing here tells of another tenant.
"""

from collections.abc import Callable

from fastapi import HTTPException
from orjson import dumps

from vllm_cost_meter.endpoint.access import Viewer
from vllm_cost_meter.endpoint.answers import NothingUsed, OwnFigures
from vllm_cost_meter.endpoint.app import look_up
from vllm_cost_meter.endpoint.dependencies import hours_asked
from vllm_cost_meter.endpoint.handed import OwnAnswer, OwnQuestion
from vllm_cost_meter.endpoint.questions import RETRY_AFTER_S, Questions
from vllm_cost_meter.errors import AwayError, LedgerError, OverdueError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.tenants.budgets import BudgetFigures, budget_row


class OwnFiguresOf:
    """Answers tenants' questions of themselves."""

    def __init__(
        self,
        reader: LedgerReader,
        refresh: Callable[[], None],
        budgets: Callable[[], BudgetFigures],
        questions: Questions,
        is_coarse: Callable[[], bool] = lambda: False,
    ) -> None:
        """The first arguments are those of the side endpoint's application.

        `is_coarse` returns whether tenants see coarse figures only.
        """
        self._reader = reader
        self._refresh = refresh
        self._budgets = budgets
        self._questions = questions
        self._is_coarse = is_coarse

    async def answer(self, asked: OwnQuestion) -> OwnAnswer:
        """Return the answer, or what is wrong."""
        try:
            return await self._questions.answer(lambda: self._answer(asked))
        except HTTPException as error:
            return OwnAnswer(error.status_code, detail=str(error.detail))
        except LedgerError as error:
            return OwnAnswer(503, detail=str(error))
        except (AwayError, OverdueError) as error:
            return OwnAnswer(503, detail=str(error), retry_after=str(RETRY_AFTER_S))

    def _answer(self, asked: OwnQuestion) -> OwnAnswer:
        viewer = Viewer(asked.tenant, is_coarse=self._is_coarse())
        if asked.request_id is None:
            return OwnAnswer(200, dumps(self._own(viewer, asked)))
        (row, *_) = look_up(self._reader, self._refresh, asked.request_id, viewer)
        return OwnAnswer(200, dumps(viewer.view(row)))

    def _own(self, viewer: Viewer, asked: OwnQuestion) -> OwnFigures | NothingUsed:
        hours = hours_asked(asked.window)
        self._refresh()
        name, covers = asked.tenant, asked.covers
        row = self._reader.tenant(name, *hours, covers=covers, only=name)
        own_budgets = [
            viewer.view(budget_row(standing))
            for standing in self._budgets().standings
            if viewer.may_see(standing.budget.tenant, standing.budget.above)
        ]
        if row is not None:
            return {**viewer.view(row), "budgets": own_budgets}
        return {
            "tenant": name,
            "covers": covers,
            "requests": 0,
            "gpu_time_ns": 0,
            "budgets": own_budgets,
        }
