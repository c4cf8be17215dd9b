"""Budgets: how much a tenant or a tag may use in a period, and what happens at the limit.

This is pure arithmetic over amounts by UTC hour, the grain of the ledger. A local day, week or
month consists of the hours that begin in it. Amounts are integers: nano-USD or GPU-nanoseconds. A
rolling period ends with the present hour. It has room again when enough old use has left it.

We do not guess use that was not measured. Without fresh figures no request is refused for spent
budgets. Only tenants that fail closed are then refused, and the reason given is the missing figure.
The same goes for a budget in USD with time that has no price.

Invariant: a verdict depends on the arguments alone. A budget with unknown use refuses only tenants
that fail closed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Literal, NamedTuple, TypedDict

from vllm_cost_meter.records.owner import UNKNOWN, WITH_CHILDREN, Owner, TenantScope
from vllm_cost_meter.units.calendar import HOURS_PER_DAY
from vllm_cost_meter.units.money import NANOUSD_PER_USD, format_amount
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND

BudgetUnit = Literal["usd", "gpu_seconds"]
Period = Literal["day", "week", "month", "rolling"]
Over = Literal["block", "throttle"]

_ONE_HOUR = timedelta(hours=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class BudgetScope(NamedTuple):
    """Whose use a budget counts: two budgets with one scope count the same bills."""

    tenant: str | None
    tag: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class Budget:
    """The limit for a tenant with its children, or for all owners with a tag, in a period.

    `limit` is in nano-USD or GPU-nanoseconds, as `unit` says. Clients are warned from `soft_limit`
    on. At its limit a `hard` budget blocks or throttles new requests and, with `stop_running`, ends
    running ones. Only a rolling period uses `days`. `above` are the tenants that are declared above
    `tenant` now, the nearest first; they may see the budget. An API server runs at most
    `max_concurrent` of its requests at once, at the limit or not. In a fleet a budget counts what
    all servers have used; with `each_server` each one counts its own.
    """

    name: str
    limit: int
    unit: BudgetUnit
    period: Period
    zone: tzinfo = UTC
    tenant: str | None = None
    above: tuple[str, ...] = ()
    tag: tuple[str, str] | None = None
    days: int = 30
    soft_limit: int | None = None
    hard: bool = True
    over: Over = "block"
    stop_running: bool = False
    max_concurrent: int | None = None
    each_server: bool = False

    @property
    def scope(self) -> BudgetScope:
        """Whose use counts."""
        return BudgetScope(self.tenant, self.tag)

    def covers(self, owner: Owner) -> bool:
        """Return whether the use of this owner counts towards the budget."""
        if self.tag is not None:
            return owner.tags.get(self.tag[0]) == self.tag[1]
        of = self.tenant
        if of is None:
            return False
        return TenantScope(of).includes(owner.tenant, owner.above) or owner.may_be(of)

    def is_shared(self, owner: Owner) -> bool:
        """Tell whether others than this owner use it too, so that it is told no name and no amount.

        A child that a client chose is no other: the client has the key of the tenant above.
        """
        of = self.tenant
        if of is None or of == UNKNOWN:
            return True
        is_own = owner.tenant == of or (owner.child_rule is not None and owner.parent == of)
        return not is_own

    def hours(self, now_ns: int) -> tuple[int, int]:
        """Return the period around an instant as (first hour, hour after the last).

        Hours count since the epoch.
        """
        this_hour = now_ns // NS_PER_HOUR
        if self.period == "rolling":
            return this_hour + 1 - HOURS_PER_DAY * self.days, this_hour + 1
        now = _local(this_hour, self.zone)
        first = now.replace(hour=0, minute=0, second=0, microsecond=0)
        if self.period == "week":
            first -= timedelta(days=now.weekday())
        elif self.period == "month":
            first = first.replace(day=1)
        days = {"day": 1, "week": 7, "month": 31}[self.period]
        after = first + timedelta(days=days)
        if self.period == "month":
            after = after.replace(day=1)
        return _first_hour(first), _first_hour(after)

    def shown(self, amount: int) -> str:
        """Return an amount with its unit, for people."""
        # A billionth is a billionth: of a USD, or of a second.
        text = format_amount(Decimal(amount) / NANOUSD_PER_USD)
        return f"{text} {'USD' if self.unit == 'usd' else 'GPU-seconds'}"


@dataclass(frozen=True, slots=True)
class Others:
    """What other servers of a fleet add to a budget.

    `used_here` is what this server alone has used; None if that is unknown. `age_ns` is how long
    ago the others' part was read; None if it never was. `stale` says why it cannot be trusted; None
    if it can. What is stale counts as it was last known. Without `is_counted` nothing of the
    period was ever read.
    """

    used_here: int | None
    age_ns: int | None
    stale: str | None
    is_counted: bool


@dataclass(frozen=True, slots=True)
class Standing:
    """The use of a budget in its period, running requests included.

    `used` has no hour outside the period. It tells hours apart where they decide when the budget
    has room again: for a rolling period that is used up. It is None if an amount is unknown.
    `unknown` says why the budget cannot be trusted: time in its period has no price, or the present
    hour has none, so that the use of what is admitted now could not be counted. `others` says what
    comes from the other servers of a fleet; None for a budget that counts this server alone.
    """

    budget: Budget
    used: Mapping[int, int] | None
    now_ns: int
    unknown: str | None = None
    others: Others | None = None

    @property
    def total(self) -> int | None:
        """The amount used in the period; None if unknown."""
        return None if self.used is None else sum(self.used.values())

    @property
    def is_spent(self) -> bool:
        """Whether the limit is reached."""
        return self.total is not None and self.total >= self.budget.limit

    @property
    def is_soft_spent(self) -> bool:
        """Whether the soft limit is reached."""
        soft = self.budget.soft_limit
        return self.total is not None and soft is not None and self.total >= soft

    @property
    def over(self) -> int | None:
        """The amount used beyond the limit; running requests may go on, as nothing is reserved."""
        return None if self.total is None else max(self.total - self.budget.limit, 0)

    def resets_at(self) -> datetime:
        """Return when the budget has room again (rolling) or its period ends, in its time zone."""
        _, after = self.budget.hours(self.now_ns)
        if self.budget.period == "rolling" and self.used:
            length = HOURS_PER_DAY * self.budget.days
            left = sum(self.used.values())
            for hour in sorted(self.used):
                if left < self.budget.limit:
                    break
                left -= self.used[hour]
                after = max(after, hour + length)
        return _local(after, self.budget.zone)

    def reset_text(self) -> str:
        """Return the reset instant as text, with the name of the time zone."""
        return f"{self.resets_at().isoformat()} ({self.budget.zone})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision about a new request; `standing` belongs to the budget that decided.

    An `admitted` request may carry warnings about the budgets in `soft`. `stale` says why the
    figures could not be used. A `full` budget has as many requests running as it allows.
    """

    kind: Literal["admitted", "throttled", "blocked", "full", "unavailable"]
    standing: Standing | None = None
    soft: tuple[Standing, ...] = ()
    stale: str | None = None


@dataclass(frozen=True, slots=True)
class BudgetFigures:
    """All standings at one instant, and how reliable they are.

    `as_of_ns` is the instant of the oldest snapshot of a living engine behind them, by the clock of
    that engine. `heard_ns` is when the meter heard of it, on the monotonic clock of this machine,
    so no wall clock makes figures older or younger. Both are None if no engine lives. `broken` says
    what is wrong with the meter; None if nothing is.
    """

    standings: Sequence[Standing] = ()
    as_of_ns: int | None = None
    broken: str | None = None
    heard_ns: int | None = None

    def stale(self, monotonic_ns: int, max_age_ns: int) -> str | None:
        """Return why the figures cannot be trusted now, or None if they can."""
        if self.broken is not None:
            return self.broken
        if self.heard_ns is None:
            return "no engine has been heard of yet"
        age_ns = monotonic_ns - self.heard_ns
        if age_ns > max_age_ns:
            return f"the latest figures are {age_ns / NS_PER_SECOND:.0f} s old"
        return None


class BudgetRow(TypedDict):
    """How much of a budget is used. Amounts are nano-USD or GPU-nanoseconds, as `unit` says."""

    budget: str
    """The name of the budget."""
    tenant: str | None
    """The tenant that the budget limits, with all tenants below it; null for a tag."""
    covers: str | None
    """`with_children`: the use of all tenants below `tenant` counts too; null for a tag."""
    tag: str | None
    """The tag whose use counts, as `key=value`; null for a tenant."""
    unit: str
    """What the budget counts: `usd` or `gpu_seconds`."""
    limit: int
    """10^-9 of `unit`: the amount that may be used in a period."""
    soft_limit: int | None
    """10^-9 of `unit`: clients are warned from this amount on; null for never."""
    used: int | None
    """10^-9 of `unit`: use in the period, running requests included; null if unknown."""
    over: int | None
    """10^-9 of `unit`: use beyond the limit, by requests that were already running."""
    used_here: int | None
    """10^-9 of `unit`: the part of `used` that this server used, where the budget counts a fleet;
    null otherwise."""
    others_age_ns: int | None
    """Wall ns: how long ago the part of the other servers was read; null where none counts, and
    before the first time."""
    others_stale: str | None
    """Why that part may be out of date; it counts as last known. Null if it is not."""
    state: str
    """`within`, `soft`, `spent` or `unknown`."""
    unknown: str | None
    """Why the budget cannot be relied on: a run and an hour without a price; null if it can."""
    hard: bool
    """Whether requests beyond the limit are refused or slowed; otherwise clients are only
    warned."""
    over_action: str
    """What a hard budget does beyond its limit: `block` or `throttle`."""
    stop_running: bool
    """Whether running requests are ended at the limit."""
    max_concurrent: int | None
    """How many requests may run at once on each API server; null for any number."""
    each_server: bool
    """Whether each server of a fleet counts its own use only."""
    period: str
    """`day`, `week`, `month` or `rolling`."""
    period_from: str
    """RFC 3339: when the period began, in its time zone."""
    resets_at: str
    """RFC 3339: when the period ends, or has room again, in its time zone."""
    timezone: str
    """The name of its time zone."""


def budget_row(standing: Standing) -> BudgetRow:
    """Return a budget's answer row. Amounts are nano-USD or GPU-nanoseconds."""
    budget, total, others = standing.budget, standing.total, standing.others
    first, _ = budget.hours(standing.now_ns)
    state = "soft" if standing.is_soft_spent else "within"
    if standing.unknown is not None or total is None:
        state = "unknown"
    return {
        "budget": budget.name,
        "tenant": budget.tenant,
        "covers": None if budget.tenant is None else WITH_CHILDREN,
        "tag": None if budget.tag is None else "=".join(budget.tag),
        "unit": budget.unit,
        "limit": budget.limit,
        "soft_limit": budget.soft_limit,
        "used": total,
        "over": standing.over,
        "used_here": None if others is None else others.used_here,
        "others_age_ns": None if others is None else others.age_ns,
        "others_stale": None if others is None else others.stale,
        "state": "spent" if standing.is_spent else state,
        "unknown": standing.unknown,
        "hard": budget.hard,
        "over_action": budget.over,
        "stop_running": budget.stop_running,
        "max_concurrent": budget.max_concurrent,
        "each_server": budget.each_server,
        "period": budget.period,
        "period_from": _local(first, budget.zone).isoformat(),
        "resets_at": standing.resets_at().isoformat(),
        "timezone": str(budget.zone),
    }


def decide(standings: Iterable[Standing], stale: str | None, fail_closed: bool) -> Verdict:
    """Decide about a new request that these budgets cover.

    `stale` says why their figures cannot be trusted; None if they can. Blocking goes before an
    amount that is unknown, or that is stale for the part of other servers, and that before
    throttling. If several budgets are spent, the one declared first decides.
    """
    if stale is not None:
        return Verdict("unavailable" if fail_closed else "admitted", stale=stale)
    mine = list(standings)
    spent = [standing for standing in mine if standing.budget.hard and standing.is_spent]
    for standing in spent:
        if standing.budget.over == "block":
            return Verdict("blocked", standing)
    # Without its name: it may be one that the client shares.
    has_unknown = any(standing.unknown is not None for standing in mine)
    stale = "a budget in USD has time without a price" if has_unknown else None
    if stale is None:
        of_others = (each.others.stale for each in mine if each.others is not None)
        stale = next(filter(None, of_others), None)
    if stale is not None and fail_closed:
        return Verdict("unavailable", stale=stale)
    if spent:
        return Verdict("throttled", spent[0])
    soft = tuple(s for s in mine if s.is_soft_spent or (s.is_spent and not s.budget.hard))
    return Verdict("admitted", soft=soft, stale=stale)


def _local(hour: int, zone: tzinfo) -> datetime:
    return (_EPOCH + hour * _ONE_HOUR).astimezone(zone)


def _first_hour(local: datetime) -> int:
    """Return the first UTC hour that begins at or after a local instant, since the epoch."""
    # If a clock change skips midnight, `timestamp` gives the instant of the change.
    return -(-int(local.timestamp()) // 3600)
