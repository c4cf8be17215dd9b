"""Budgets: how much a tenant or a tag may use in a period, and what follows once it has.

Pure arithmetic over amounts by UTC hour, the grain of the ledger, in which a local day, week or
month consists of the hours that begin in it. Amounts are integers: nano-USD or GPU-nanoseconds. A
rolling period ends with the present hour; it resets when enough of what was used has left it.

What is not measured is not guessed. Without fresh figures nobody is refused for what they may have
used, and those who asked to fail closed are refused for that reason and no other. The same goes for
a budget in USD with time that has no price.

Invariant: a verdict depends on the arguments alone; a budget whose use is unknown refuses only
tenants that fail closed.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Literal, NamedTuple, TypedDict

from vllm_cost_meter.records.owner import UNKNOWN, Owner
from vllm_cost_meter.units.money import NANOUSD_PER_USD, format_amount
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND

Unit = Literal["usd", "gpu_seconds"]
Period = Literal["day", "week", "month", "rolling"]
Over = Literal["block", "throttle"]

HOURS_PER_DAY = 24
_ONE_HOUR = timedelta(hours=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Scope(NamedTuple):
    """Whose use a budget counts: two budgets with one scope count the same bills."""

    tenant: str | None
    members: frozenset[str]
    tag: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class Budget:
    """What one tenant with its children, or all that carries a tag, may use in a period.

    `limit` is in nano-USD or GPU-nanoseconds, as `unit` says. At `soft_limit` clients are warned;
    a `hard` budget at its limit blocks or throttles new requests and, with `stop_running`, ends
    those that run. `days` counts only for a rolling period. `members` are the tenants that are
    declared below its tenant, however far. Of what it covers at most `max_concurrent` requests run
    at once on an API server, used up or not.
    """

    name: str
    limit: int
    unit: Unit
    period: Period
    zone: tzinfo = UTC
    tenant: str | None = None
    members: Collection[str] = frozenset()
    tag: tuple[str, str] | None = None
    days: int = 30
    soft_limit: int | None = None
    hard: bool = True
    over: Over = "block"
    stop_running: bool = False
    max_concurrent: int | None = None

    @property
    def scope(self) -> Scope:
        """Whose use counts."""
        return Scope(self.tenant, frozenset(self.members), self.tag)

    def covers(self, owner: Owner) -> bool:
        """Tell whether what this owner uses counts."""
        if self.tag is not None:
            return owner.tags.get(self.tag[0]) == self.tag[1]
        of = self.tenant
        if of is None:
            return False
        if of in (owner.tenant, owner.parent) or owner.tenant.startswith(f"{of}/"):
            return True
        # Its parent too: a child that a client chose is declared nowhere.
        return owner.tenant in self.members or owner.parent in self.members

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
        """Return the first hour of the period that holds an instant, and the hour after its last.

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
class Standing:
    """Where a budget stands: what was used in its period, running requests included.

    `used` has no hour outside the period. It tells hours apart where they decide when the budget
    resets: for a rolling period that is used up. It is None where an amount is not known. `unknown`
    says why the budget cannot be relied on: time in its period has no price, or the present hour
    has none, so that what is admitted now could not be counted.
    """

    budget: Budget
    used: Mapping[int, int] | None
    now_ns: int
    unknown: str | None = None

    @property
    def total(self) -> int | None:
        """What was used in the period."""
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
        """What was used beyond the limit: by what ran on, as nothing is reserved in advance."""
        return None if self.total is None else max(self.total - self.budget.limit, 0)

    def resets_at(self) -> datetime:
        """Return when the budget has room again, or a fixed period ends, in its time zone."""
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
        """Return when it resets, with the name of the time zone."""
        return f"{self.resets_at().isoformat()} ({self.budget.zone})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a new request; `standing` is that of the budget which decided.

    `admitted` ones may be warned of by `soft` standings. `stale` says why nothing is known. `full`
    is a request too many at once.
    """

    kind: Literal["admitted", "throttled", "blocked", "full", "unavailable"]
    standing: Standing | None = None
    soft: tuple[Standing, ...] = ()
    stale: str | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """All standings at one instant, and whether they may be relied on.

    `as_of_ns` is the instant of the oldest snapshot that they hold of a living engine, by that
    engine's clock. `heard_ns` is when it was heard of, by the monotonic clock of this machine: no
    wall clock makes figures older or younger. Both are None if no engine lives. `broken` says what
    is wrong with the meter, None if nothing.
    """

    standings: Sequence[Standing] = ()
    as_of_ns: int | None = None
    broken: str | None = None
    heard_ns: int | None = None

    def stale(self, monotonic_ns: int, max_age_ns: int) -> str | None:
        """Return why the figures cannot be relied on now, or None."""
        if self.broken is not None:
            return self.broken
        if self.heard_ns is None:
            return "no engine has been heard of yet"
        age_ns = monotonic_ns - self.heard_ns
        if age_ns > max_age_ns:
            return f"the latest figures are {age_ns / NS_PER_SECOND:.0f} s old"
        return None


class BudgetRow(TypedDict):
    """Where a budget stands. Amounts are nano-USD or GPU-nanoseconds, as `unit` says."""

    budget: str
    """Its name."""
    tenant: str | None
    """The tenant whose use counts; null for a tag."""
    tag: str | None
    """`key=value`; null for a tenant."""
    unit: str
    """`usd` or `gpu_seconds`."""
    limit: int
    """10^-9 of `unit`: how much may be used."""
    soft_limit: int | None
    """10^-9 of `unit`: from when on clients are warned; null for never."""
    used: int | None
    """10^-9 of `unit`: what was used in the period, running requests included; null if unknown."""
    over: int | None
    """10^-9 of `unit`: what running requests used beyond the limit."""
    state: str
    """`within`, `soft`, `spent` or `unknown`."""
    unknown: str | None
    """Why the budget cannot be relied on: a run and an hour without a price; null if it can."""
    hard: bool
    """Whether it acts, or only warns."""
    over_action: str
    """`block` or `throttle`."""
    stop_running: bool
    """Whether running requests are ended."""
    max_concurrent: int | None
    """How many requests may run at once on each API server; null for any number."""
    period: str
    """`day`, `week`, `month` or `rolling`."""
    period_from: str
    """RFC 3339: when the period began, in its time zone."""
    resets_at: str
    """RFC 3339: when the period ends, or has room again, in its time zone."""
    timezone: str
    """The name of its time zone."""


def told(standing: Standing) -> BudgetRow:
    """Return what the side endpoint says of a budget. Amounts are nano-USD or GPU-nanoseconds."""
    budget, total = standing.budget, standing.total
    first, _ = budget.hours(standing.now_ns)
    state = "soft" if standing.is_soft_spent else "within"
    if standing.unknown is not None or total is None:
        state = "unknown"
    return {
        "budget": budget.name,
        "tenant": budget.tenant,
        "tag": None if budget.tag is None else "=".join(budget.tag),
        "unit": budget.unit,
        "limit": budget.limit,
        "soft_limit": budget.soft_limit,
        "used": total,
        "over": standing.over,
        "state": "spent" if standing.is_spent else state,
        "unknown": standing.unknown,
        "hard": budget.hard,
        "over_action": budget.over,
        "stop_running": budget.stop_running,
        "max_concurrent": budget.max_concurrent,
        "period": budget.period,
        "period_from": _local(first, budget.zone).isoformat(),
        "resets_at": standing.resets_at().isoformat(),
        "timezone": str(budget.zone),
    }


def decide(standings: Iterable[Standing], stale: str | None, fail_closed: bool) -> Verdict:
    """Return what becomes of a new request that these budgets cover.

    `stale` says why their figures cannot be relied on, None if they can. Blocking goes before an
    amount that is unknown, and that before throttling; of several budgets the first that was
    declared decides.
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
    # A midnight that a clock change skips is the instant of the change: through UTC and back.
    return -(-int(local.timestamp()) // 3600)
