"""The runtime of the meter in an API server: makes its parts, and starts and stops them.

Each API server process has one `Runtime`, made at its first use. The first API server also polls
the engines for their books and has the side endpoint served. A part gets what it needs through its
constructor. It gets settings as a function, because some settings change while the server runs.

Invariant: nothing here stops vLLM from serving, but settings that were never right for it.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from vllm_cost_meter.activation import is_refused
from vllm_cost_meter.api_server.access.start_warnings import (
    shared_admin_token,
    start_warnings,
    vllm_args,
)
from vllm_cost_meter.api_server.admission import Admission, Rules
from vllm_cost_meter.api_server.api_guard import ApiGuard
from vllm_cost_meter.api_server.applying.follower import Applying
from vllm_cost_meter.api_server.applying.messages import ApplierHello
from vllm_cost_meter.api_server.background import Loops, in_own_thread
from vllm_cost_meter.api_server.budgets.follower import BudgetFollower
from vllm_cost_meter.api_server.budgets.messages import CountedFleet
from vllm_cost_meter.api_server.budgets.names import BudgetNames
from vllm_cost_meter.api_server.collector import Collector
from vllm_cost_meter.api_server.judging import refuse_birth
from vllm_cost_meter.api_server.open_requests import OpenRequests
from vllm_cost_meter.api_server.poller import Poller
from vllm_cost_meter.api_server.record_making import price_of_run
from vllm_cost_meter.api_server.shipping.follower import Shipping
from vllm_cost_meter.api_server.shipping.messages import ShippingHello
from vllm_cost_meter.api_server.side_endpoint import SideEndpoint, health_of
from vllm_cost_meter.api_server.start_check import what_is_wrong
from vllm_cost_meter.config.kept_copy import kept_path
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.reload import INTERVAL_S, Reloader, reloader_of
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.config.starting import check_start
from vllm_cost_meter.endpoint.answers import MeterHealth
from vllm_cost_meter.endpoint.handed import OwnAnswer, OwnQuestion
from vllm_cost_meter.endpoint.tenant_routes import make_router
from vllm_cost_meter.errors import AwayError, LedgerError, SettingError
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.database import default_url, parse_url, sqlite_path
from vllm_cost_meter.ledger.fleet_use.kept import figures_path
from vllm_cost_meter.ledger.journal_place import journal_folder, second_journal_folder
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.metrics import series
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.records.snapshot import EarlierFit, Snapshot
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures
from vllm_cost_meter.units.time import NS_PER_SECOND
from vllm_cost_meter.vllm_hooks import engines

logger = meter_logger()

STOP_TIMEOUT_S = 10.0
# A ledger that cannot be read is looked at again for the names of budgets after such pauses.
NAMES_PAUSE_FIRST_S = 1.0
NAMES_PAUSE_MOST_S = 60.0
UNSERVED = (
    "requests run in a process without an HTTP application that starts the meter, as offline, in"
    " batches, by gRPC or in an application of one's own: they are billed to 'unknown', and nobody"
    " asks for the totals that an audit needs. `app.add_middleware` gives an application the class"
    " vllm_cost_meter.middleware.CostMiddleware"
)


class Runtime:
    """The meter of one API-server process."""

    def __init__(
        self,
        settings: Settings,
        *,
        open_requests: OpenRequests | None = None,
        reload_interval_s: float = INTERVAL_S,
    ) -> None:
        self.settings = settings
        self.guard = ApiGuard()
        self.loops = Loops()
        self.ledger_url = settings.ledger or default_url()
        second = second_journal_folder(self.ledger_url, settings.second_journal)
        self.writer = JournalWriter(
            journal_folder(self.ledger_url), second=second, to_disk=settings.durability == "disk"
        )
        self.writer.start()
        self.applying = Applying(
            ApplierHello(
                self.ledger_url,
                None if second is None else str(second),
                settings.keep_rows_days,
                settings.keep_rows_bytes,
                settings.archive,
                sends=settings.fleet is not None,
            )
        )
        self.shipping: Shipping | None = None
        if settings.fleet is not None:
            kept = kept_path(self.ledger_url) if settings.fleet_settings else None
            self.shipping = Shipping(
                ShippingHello(
                    self.ledger_url,
                    settings.fleet,
                    settings.fleet_interval_s,
                    settings.fleet_rows,
                    settings.fleet_files,
                    settings.fleet_outbox_bytes,
                    None if kept is None else str(kept),
                )
            )
        self.collector = Collector(
            self.writer,
            self.guard,
            lambda: self.settings,
            open_requests=open_requests,
            refuses=lambda exchange: refuse_birth(exchange, self.admission, self.settings),
            on_bill=self._on_bill,
        )
        # Served model names, the default first; empty until `start`.
        self.served: tuple[str, ...] = ()
        self.poller: Poller | None = None
        self.side_endpoint = SideEndpoint(
            lambda: self.settings,
            self.ledger_url,
            refresh=self._refresh,
            catch_up=self.applying.catch_up,
            alive=self.alive,
            figures=self.figures,
            health=self.health,
        )
        self.admission: Admission | None = None
        self.follower: BudgetFollower | None = None
        self._names = BudgetNames(self.ledger_url)
        self._reload_interval_s = reload_interval_s
        # Background tasks by name.
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Whether an application starts the meter. Where none does, the first bill says so.
        self.is_served = False
        self._said_unserved = False

    def run(self, hook: str, body: Callable[..., Any], *args: Any) -> Any:
        """Call `body(collector, *args)` for a hook of vLLM. Never raises; None after an error."""
        return self.guard.run(hook, body, self.collector, *args)

    def book(self) -> PriceBook:
        """Return the price book as it is declared now."""
        return self.settings.price_book

    def figures(self) -> BudgetFigures:
        """Return how much of each budget is used."""
        return self.admission.figures if self.admission is not None else BudgetFigures()

    def health(self) -> MeterHealth:
        """Return whether the meter of this API server works."""
        loops, writer = self.loops.health(), self.writer
        ledger_error = writer.last_error or self.applying.state.last_error
        processes = {
            "side endpoint": self.side_endpoint.process,
            "ledger": self.applying.process,
        }
        if self.follower is not None:
            processes["budgets"] = self.follower.process
        if self.shipping is not None:
            processes["fleet"] = self.shipping.process
        is_failing = ledger_error is not None or any(each["state"] != "ok" for each in loops)
        return {
            "status": "off" if self.guard.off else "failing" if is_failing else "ok",
            "errors": self.guard.errors,
            "waiting": writer.waiting,
            "dropped": writer.dropped,
            "ledger_error": ledger_error,
            "loops": loops,
            "side_processes": [health_of(name, each) for name, each in processes.items()],
            "fleet": None if self.shipping is None else self.shipping.health(),
        }

    # -- life -------------------------------------------------------------------------------

    async def start(self, app: Any) -> str | None:
        """Start with vLLM's application and, in the first API server, serve the side endpoint.

        Returns why the settings do not allow this server to start, None if they do.
        """
        engine_client = getattr(getattr(app, "state", None), "engine_client", None)
        if engine_client is None:
            return None  # A render server has no engine.
        if (wrong := shared_admin_token(vllm_args(app), self.settings)) is not None:
            return wrong
        try:
            facts = engines.run_facts(engine_client, self.settings.labels)
            check_start(self.settings, facts, time.time_ns())
            polls = await self.start_work(engine_client, app.state)
            app.include_router(make_router(self._ask_endpoint))
            if polls:
                for line in start_warnings(app, self.settings):
                    logger.warning("cost meter: %s", line)
                await self.side_endpoint.serve()
        except SettingError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self.guard.failed("start", error)
        return None

    async def start_work(self, engine_client: Any, state: Any = None) -> bool:
        """Start the background tasks of this API server; `state` is its application's state.

        Returns True if this API server is the one that polls the engines.
        """
        self.is_served = True
        self.collector.run_facts = engines.run_facts(engine_client, self.settings.labels)
        self.collector.kv_role = engines.kv_role(engine_client)
        self.served = tuple(engines.served_names(engine_client, state))
        self._start_loop("announce", self._announce, self.settings.snapshot_interval_s)
        self._hold_to_budgets(engine_client)
        if (reloader := reloader_of(self.settings, self.ledger_url)) is not None:
            self._show_version()
            reload = functools.partial(self._reload, reloader, engine_client)
            self._start_loop("reload", reload, self._reload_interval_s)
        if engines.api_server_index(engine_client) != 0 or self.poller is not None:
            return False
        self.poller = Poller(
            engine_client,
            self.writer,
            self.loops,
            self.settings.snapshot_interval_s,
            self._earlier_fit,
            lambda snapshot: price_of_run(self.book(), snapshot),
            announce=self._announce_all,
        )
        self.applying.start()
        if self.shipping is not None:
            self.shipping.start()
        self.collector.facts_of = self.poller.facts_of
        self._start_task("poll", self.poller.run)
        self._start_task("names", self._look_at_names)
        return True

    async def stop(self) -> None:
        """Stop the tasks, poll the engines a last time, and write all that waits to the ledger."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(self._stop_writing(), self.side_endpoint.stop())

    async def _stop_writing(self) -> None:
        self._announce_all()
        if self.poller is not None:
            self.poller.stopping = True
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.poller.refresh(), timeout=1.0)
        if self.follower is not None:
            await self.follower.stop()
        await asyncio.to_thread(self.writer.close, 2.0)
        await self.applying.stop()
        if self.shipping is not None:
            await self.shipping.stop()

    def _start_task(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start a task, unless it runs already."""
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(work())

    def _start_loop(
        self, name: str, work: Callable[[], Coroutine[Any, Any, None]], pause_s: float
    ) -> None:
        self._start_task(name, lambda: self.loops[name].run(work, pause_s))

    # -- open requests and settings ---------------------------------------------------------

    def _announce_all(self) -> None:
        self.guard.run("announce", self.collector.announce_all)

    async def _announce(self) -> None:
        writer = self.writer
        series.set_journal(
            writer.waiting,
            writer.dropped,
            is_in_second_place=writer.is_in_second_place,
            has_reserve=writer.reserve_error is None,
        )
        # Budgets count running requests by owner, so the ledger must know the owners at once.
        if self.admission is not None:
            self.collector.announce_all()
        else:
            self.collector.announce_due()

    def _show_version(self) -> None:
        if (version := self.settings.shared_version) is not None:
            series.set_settings_version(version)

    async def _reload(self, reloader: Reloader, engine_client: Any) -> None:
        # Reading a file may be slow, so a thread does it: vLLM's tokens must not wait.
        new = await in_own_thread(reloader.look, self.settings)
        if new is not None:
            self.settings = new
            self._show_version()
            self.side_endpoint.settings_changed()
        self._hold_to_budgets(engine_client)
        if new is not None and self.poller is not None:
            if (before := self._tasks.pop("names", None)) is not None:
                before.cancel()
            self._start_task("names", self._look_at_names)

    # -- budgets ----------------------------------------------------------------------------

    async def _look_at_names(self) -> None:
        """Warn of budgets that cover nobody so far, as soon as the ledger can be read."""
        pause_s = NAMES_PAUSE_FIRST_S
        while True:
            try:
                await in_own_thread(self._names.look, self.settings)
            except LedgerError:  # Without a ledger nobody knows.
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, NAMES_PAUSE_MOST_S)
            else:
                return

    def _hold_to_budgets(self, engine_client: Any) -> None:
        has_rules = self.settings.budgets or self.settings.failing_closed
        if not has_rules or self.admission is not None:
            return
        # The poller starts later, and is asked at each look.
        self.follower = BudgetFollower(
            self.ledger_url,
            alive=self.alive,
            waiting=lambda: self.writer.waiting,
            fleet=self._counted_fleet(engine_client),
        )
        self.admission = Admission(
            functools.partial(self._follow, self.follower),
            self.budget_rules,
            self.guard,
            self.settings.snapshot_interval_s,
            running_of=self.collector.open_requests_of,
            stop=lambda ids: engines.stop_requests(engine_client, ids, STOP_TIMEOUT_S),
            loop=self.loops["budgets"],
            lag_ns=lambda: self.follower.pending.lag_ns if self.follower is not None else 0,
        )
        self._start_task("budgets", self.admission.run)

    def _counted_fleet(self, engine_client: Any) -> CountedFleet | None:
        """Return the fleet whose use budgets count; None without one."""
        path, fleet = sqlite_path(parse_url(self.ledger_url)), self.settings.fleet
        if fleet is None or path is None:
            return None
        kept_at = figures_path(path, engines.api_server_index(engine_client))
        return CountedFleet(fleet, self.settings.fleet_interval_s, str(kept_at))

    async def _follow(
        self, follower: BudgetFollower, budgets: Sequence[Budget], book: PriceBook
    ) -> BudgetFigures | None:
        figures = await follower.follow(budgets, book)
        if self.shipping is not None and figures is not None:
            of_others = [each.others for each in figures.standings if each.others is not None]
            just_read_ns = self.settings.fleet_interval_s * NS_PER_SECOND
            if any(each.age_ns is not None and each.age_ns < just_read_ns for each in of_others):
                self.shipping.try_again()
        return figures

    def _on_bill(self, part: EngineRequest) -> None:
        if not (self.is_served or self._said_unserved) and part.http_request_id is None:
            self._said_unserved = True
            logger.warning("cost meter: %s", UNSERVED)
        if self.follower is not None:
            self.follower.pending.add(part)

    def budget_rules(self) -> Rules:
        """Return the present settings for budgets."""
        return Rules(
            budgets=self.settings.declared_budgets,
            fail_closed=self.settings.failing_closed,
            book=self.book(),
        )

    # -- figures ----------------------------------------------------------------------------

    async def _ask_endpoint(self, question: OwnQuestion) -> OwnAnswer:
        self.applying.start()  # beside the endpoint's process, which asks for it once it works
        return await self.side_endpoint.ask(question)

    async def _earlier_fit(self, snapshot: Snapshot) -> EarlierFit | None:
        # The first server makes the ledger, and a newer one migrates it. On a busy machine its
        # process may not be there yet, and what earlier runs learnt is in the ledger without it.
        with contextlib.suppress(AwayError, LedgerError):
            await self.applying.catch_up()
        return await in_own_thread(self._read_earlier_fit, snapshot)

    def _read_earlier_fit(self, snapshot: Snapshot) -> EarlierFit | None:
        path = sqlite_path(parse_url(self.ledger_url))
        if path is not None and not path.exists():
            return None
        with LedgerReader(self.ledger_url) as reader:
            return reader.earlier_fit(snapshot)

    async def _refresh(self) -> None:
        """Journal the books of now; API servers other than the first are a snapshot behind."""
        if self.poller is not None:
            await self.poller.look()

    def alive(self) -> Collection[str]:
        """Return the runs with an engine that is known to be alive, even if it is silent.

        Only the poller of the first API server knows them. To the other API servers an engine that
        is silent for too long is dead, until its next snapshot.
        """
        return () if self.poller is None else self.poller.alive()


class NoRuntime:
    """The stand-in for a runtime that could not be made: every hook passes through.

    `settings` name the tenants that fail closed. They are None if they could not be read. `wrong`
    says in one line why the start must stop, None if it need not.
    """

    def __init__(self, settings: Settings | None = None, wrong: str | None = None) -> None:
        self.settings = settings
        self.wrong = wrong

    def run(self, hook: str, body: object, *args: object) -> None:
        """Do nothing."""


def make_runtime() -> Runtime | NoRuntime:
    """Make a runtime from this process's settings, or a stand-in if that fails. Never raises."""
    settings, wrong = None, None
    try:
        wrong = what_is_wrong()
        settings = load_settings()
        if wrong is None:
            # `--middleware` also brings us here in a vLLM that the meter does not understand.
            return NoRuntime(settings) if is_refused() else Runtime(settings)
    except SettingError:
        pass  # `wrong` says it.
    except Exception:
        logger.exception("cost meter: could not start in the API server; it runs unmetered")
    if wrong is not None:
        logger.error("%s", wrong)
    return NoRuntime(settings, wrong)


@functools.cache
def get_runtime() -> Runtime | NoRuntime:
    """Return this process's runtime, made at the first call. Never raises."""
    return make_runtime()
