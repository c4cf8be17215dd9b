"""Warns of budgets that cover nobody so far, by name: a slip of the finger limits nothing.

Settings refuse what no request can ever be of. What is left is a name that a gateway's header may
bring, but never has, and a tag that no declared tenant has and no request ever had.

Invariant: each budget is warned of once.
"""

from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.owner import UNKNOWN
from vllm_cost_meter.tenants.budgets import Budget

logger = meter_logger()


class BudgetNames:
    """The budgets of one API server that were warned of."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._warned: set[str] = set()
        # What the ledger has seen it will always have seen.
        self._seen: set[str | tuple[str, str]] = set()

    def look(self, settings: Settings) -> None:
        """Warn of the budgets of these settings that cover nobody. Blocks. Raises LedgerError."""
        declared = settings.resolver.declared
        known = self._seen | declared.keys() | {UNKNOWN}
        known |= {tag for each in declared.values() for tag in each.tags.items()}
        asked = [
            budget
            for budget in settings.declared_budgets
            if budget.name not in self._warned and (budget.tenant or budget.tag) not in known
        ]
        if not asked:
            return
        tenants = {budget.tenant for budget in asked if budget.tenant is not None}
        tags = {budget.tag for budget in asked if budget.tag is not None}
        with LedgerReader(self._url, late=True) as reader:
            unseen = {*reader.unseen(sorted(tenants)), *reader.unseen_tags(sorted(tags))}
        self._seen |= (tenants | tags) - unseen
        for budget in asked:
            if (budget.tenant or budget.tag) in unseen:
                self._warned.add(budget.name)
                logger.warning(
                    "cost meter: budget %r covers nobody so far: %s", budget.name, _line(budget)
                )


def _line(budget: Budget) -> str:
    if budget.tag is not None:
        tag = "=".join(budget.tag)
        return f"no declared tenant has the tag {tag!r}, and the ledger has no request with it"
    return f"tenant {budget.tenant!r} is not declared, and the ledger has no request of it"
