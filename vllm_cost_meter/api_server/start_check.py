"""Checks, when a server starts, that its settings are right and its ledger can be where they say.

A wrong setting stops the start, with one line, however vLLM was started. `plugin.py` asks once the
command line is parsed, before anything is loaded: `vllm serve` in all its forms and `python -m
vllm.entrypoints.openai.api_server` share that. It asks again when the application of an API server
is built, as its launcher may have parsed no command line. Where only `--middleware` brings the
meter, `middleware.py` stops the start of the application.

Invariant: what is wrong is one line, and nobody waits for it longer than `CHECK_WITHIN_S`.
"""

import time

from vllm_cost_meter.api_server.shipping.settings_puller import settings_at_start
from vllm_cost_meter.config.loading import fleet_place, load_settings, settings_with
from vllm_cost_meter.config.starting import check_start
from vllm_cost_meter.errors import CostMeterError
from vllm_cost_meter.guard import in_daemon_thread
from vllm_cost_meter.ledger.database import check_location, default_url
from vllm_cost_meter.prices.book import RunFacts
from vllm_cost_meter.records.shared_settings import NOTHING_SHARED

# Longer than the reading of a settings file, which says better what hangs.
CHECK_WITHIN_S = 20.0


def what_is_wrong(*, with_ledger: bool = True, within_s: float | None = None) -> str | None:
    """Return in one line what stops the start; None if nothing does.

    A node without an API server uses no ledger, so there its place does not matter. Raises what
    is no fault of a setting, such as a package that cannot be imported.
    """
    within_s = CHECK_WITHIN_S if within_s is None else within_s
    try:
        in_daemon_thread(_check, with_ledger).result(within_s)
    except CostMeterError as error:
        return f"cost meter: {error}"
    except TimeoutError:
        return (
            f"cost meter: the ledger's place could not be looked at within {within_s:g} s; is it on"
            " a mount that is away? Set COST_METER_LEDGER to a local path or to PostgreSQL"
        )
    return None


def _check(with_ledger: bool) -> None:
    place = fleet_place()
    if place.fleet_settings and not with_ledger:
        settings_with(NOTHING_SHARED)  # Engines use nothing of what a fleet shares.
        return
    if place.fleet_settings:
        check_location(place.ledger or default_url())  # The copy is to be beside it.
    settings = load_settings(shared=settings_at_start)
    # Of its engines nothing is known yet; the API server asks again when it knows them.
    check_start(settings, RunFacts(), time.time_ns())
    if with_ledger:
        check_location(settings.ledger or default_url())
