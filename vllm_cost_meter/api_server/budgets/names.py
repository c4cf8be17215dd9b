"""Warns of budgets that cover nobody so far, by name: a slip of the finger limits nothing.

Settings refuse what no request can ever be of. What is left is a name that a gateway's header may
bring, but never has, and a tag that no declared tenant carries.

Invariant: each budget is warned of once.
"""

from collections.abc import Iterator

from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.owner import UNKNOWN

logger = meter_logger()


class BudgetNames:
    """The budgets of one API server that were warned of."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._warned: set[str] = set()

    def look(self, settings: Settings) -> None:
        """Warn of the budgets of these settings that cover nobody. Blocks. Raises LedgerError."""
        for budget, line in self._of_nobody(settings):
            if budget not in self._warned:
                self._warned.add(budget)
                logger.warning("cost meter: budget %r covers nobody so far: %s", budget, line)

    def _of_nobody(self, settings: Settings) -> Iterator[tuple[str, str]]:
        declared = {tenant.name for tenant in settings.tenants} | {UNKNOWN}
        names = {budget.tenant for budget in settings.budgets if budget.tenant} - declared
        never_seen = set()
        if names:
            with LedgerReader(self._url, create=True) as reader:
                never_seen = set(reader.unseen(sorted(names)))
        tags = {tag for each in settings.resolver.declared.values() for tag in each.tags.items()}
        for budget in settings.declared_budgets:
            if budget.tenant in never_seen:
                line = (
                    f"tenant {budget.tenant!r} is not declared, and the ledger has no request of it"
                )
                yield budget.name, line
            elif budget.tag is not None and budget.tag not in tags:
                yield budget.name, f"no declared tenant has the tag {'='.join(budget.tag)!r}"
