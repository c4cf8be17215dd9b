"""What stops the start of a server though every setting is right by itself: money without a price.

Prices have dates and are for certain runs, so whether one applies depends on when and where a
server starts. Reports of such settings are made all the same.

Invariant: a server is refused only if no price can apply to it, whatever is not known of it yet.
"""

from vllm_cost_meter.config import types as t
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.prices.book import RunFacts
from vllm_cost_meter.units.time import NS_PER_HOUR


def check_start(settings: Settings, run: RunFacts, now_ns: int) -> None:
    """Raise SettingError for a budget in USD if no price can apply to this run now.

    Its use would be unknown, and it would refuse nobody.
    """
    hour = now_ns // NS_PER_HOUR
    in_usd = [budget.name for budget in settings.budgets if budget.usd is not None]
    if not in_usd or settings.price_book.may_have_price(run, hour):
        return
    raise SettingError(
        "budgets",
        "a price that applies to this server now, for a budget in USD, or gpu_seconds",
        t.Text(f"{in_usd[0]!r} in USD and no price: {settings.price_book.why_no_price(run, hour)}"),
        settings.config or "environment",
    )
