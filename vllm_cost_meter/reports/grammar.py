"""Parse the parameters of a report, which the command line and HTTP share, into a question.

The parameters are OpenCost's: `window`, `aggregate`, `step`, `accumulate`, `idle`, `filter`. All
are checked before the ledger is read. An unknown word is refused and never skipped. Core:
standard library only.

Invariant: a filter names columns and values only. Its labels choose the engines that an answer is
about, and everything else in it chooses rows and changes none.
"""

import re
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field, replace
from datetime import UTC, tzinfo
from decimal import Decimal
from typing import Self, TypedDict, TypeVar, cast

from vllm_cost_meter.records.owner import OWN, WITH_CHILDREN, Covers, TenantScope, check_covers
from vllm_cost_meter.reports.engine_labels import EngineFilter
from vllm_cost_meter.reports.idle import IdlePolicy
from vllm_cost_meter.units.calendar import Unit, hours_of_window, zone_of
from vllm_cost_meter.units.text import fields, quoted

DIMENSIONS = ("tenant", "model", "lora", "route", "status")
TIMES = ("hour", "day", "month")
# A column of facts that no question names: whether a row is of the tenants that are meant.
COVERED = "covered"
YES, NO = "yes", "no"
# The prefixes of columns that users name: a tenant's tag, an engine's label.
TAG = "tag:"
LABEL = "label:"
STEPS: Mapping[str, Unit] = {"1h": "hour", "1d": "day", "1w": "week", "month": "month"}
_COLUMNS = f"{', '.join((*DIMENSIONS, *TIMES))}, {TAG}NAME or {LABEL}NAME"
_PRICE = re.compile(r"\d{1,9}(\.\d{1,18})?\Z", re.ASCII)
# A question with more of them is a mistake, and each costs time in every row.
COLUMNS_MAX = 16
_TOKEN = re.compile(
    # Quoted text belongs to a value.
    r'"(?:[^"]|"")*"'
    # A plus sign before another condition. One that was not encoded in a URL comes as a space.
    # Nothing is given back once it has matched (`*+`), so that a run of spaces takes linear time.
    rf"|(?P<and>[+\s]\s*+)(?=(?:{'|'.join((*DIMENSIONS, *TIMES, 'tag', 'label'))}):)"
    r"|\s++|.",
    re.DOTALL,
)


T = TypeVar("T", bound=Sized)


class Words(TypedDict, total=False):
    """The parameters of a report as users write them; see docs/reference/reports.md."""

    window: str | None
    tz: str | None
    aggregate: str | None
    step: str | None
    accumulate: bool
    idle: str | None
    filter: str | None
    covers: Covers
    price: str | None


@dataclass(frozen=True, slots=True)
class Question:
    """A parsed question for a report. Hours are [from_hour, to_hour) since the epoch; None is open.

    Rows are added up by the columns in `aggregate`. `conditions` has the allowed values by column;
    those of labels choose engines.
    `covers` says what a tenant in the conditions means. `price`, in USD per GPU-hour, replaces all
    real prices. If a tenant asks, `only` is its name: it sees the rows of itself and of all tenants
    below it, and no total over other tenants.
    """

    from_hour: int | None = None
    to_hour: int | None = None
    zone: tzinfo = UTC
    aggregate: tuple[str, ...] = ("tenant",)
    step: Unit | None = None
    accumulate: bool = False
    idle: IdlePolicy = field(default_factory=IdlePolicy)
    conditions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    covers: Covers = WITH_CHILDREN
    price: Decimal | None = None
    only: str | None = None

    def by(self, tenant: str | None) -> Self:
        """Return the question as a tenant asks it; None asks for all tenants.

        Without a tenant in the conditions `covers` says what the one that asks means by itself.
        """
        if tenant is None:
            return self
        whose = {"tenant": frozenset([tenant]), **self.conditions}
        conditions = whose if self.covers == OWN else self.conditions
        return replace(self, conditions=conditions, only=tenant)

    @property
    def asked(self) -> tuple[TenantScope, ...] | None:
        """Return the tenants that are meant, each of which will do; None means all tenants."""
        names = self.conditions.get("tenant")
        return None if names is None else tuple(TenantScope(name, self.covers) for name in names)

    @property
    def names_tenants(self) -> bool:
        """Whether the question is about some tenants, or asked by one."""
        return self.only is not None or self.asked is not None

    @property
    def tells_coverage(self) -> bool:
        """Whether the name of a row's tenant does not say if the row is shown."""
        return self.only is not None or bool(self.asked and self.covers == WITH_CHILDREN)

    def includes(self, tenant: str) -> bool:
        """Return whether a tenant is meant, by its name alone."""
        by_asker = self.only is None or TenantScope(self.only).includes(tenant)
        return by_asker and (
            self.asked is None or any(scope.includes(tenant) for scope in self.asked)
        )

    @property
    def engines(self) -> EngineFilter:
        """Return the engines that the question is about."""
        return EngineFilter(
            {
                column.removeprefix(LABEL): values
                for column, values in self.conditions.items()
                if column.startswith(LABEL)
            }
        )

    @property
    def row_conditions(self) -> Mapping[str, frozenset[str]]:
        """Return the conditions that choose rows."""
        return {
            column: values
            for column, values in self.conditions.items()
            if not column.startswith(LABEL)
        }

    @property
    def names_labels(self) -> bool:
        """Whether rows are added up or engines chosen by a label."""
        return any(name.startswith(LABEL) for name in (*self.aggregate, *self.conditions))

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Return the dimensions that the facts must distinguish; the first is always the tenant."""
        named = (name for name in (*self.aggregate, *self.row_conditions) if name not in TIMES)
        coverage = (COVERED,) if self.tells_coverage else ()
        return tuple(dict.fromkeys(("tenant", *coverage, *named)))

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the dimensions that are labels: those that engine time has a value of, too."""
        return tuple(name for name in self.dimensions if name.startswith(LABEL))

    @property
    def times(self) -> tuple[Unit, ...]:
        """Return the periods (hour, day, month) that the facts must distinguish."""
        named = (name for name in (*self.aggregate, *self.conditions) if name in TIMES)
        return cast("tuple[Unit, ...]", tuple(dict.fromkeys(named)))

    @property
    def tells_hours_apart(self) -> bool:
        """Whether rows depend on the hour of usage in another way than by its price."""
        return self.step is not None or bool(self.times)

    @property
    def is_by_tenant(self) -> bool:
        """Whether rows are by tenant alone, over the whole window."""
        columns = (*self.aggregate, *self.row_conditions)
        return set(columns) == {"tenant"} and not self.tells_hours_apart


def question(
    *,
    window: str | None = None,
    tz: str | None = None,
    aggregate: str | None = None,
    step: str | None = None,
    accumulate: bool = False,
    idle: str | None = None,
    filter: str | None = None,  # noqa: A002 - the word of the grammar
    covers: Covers = WITH_CHILDREN,
    price: str | None = None,
    now_ns: int | None = None,
) -> Question:
    """Parse the parameters. Raises ValueError for one that is not understood."""
    zone = zone_of(tz)
    check_covers(covers)
    from_hour, to_hour = hours_of_window(window, now_ns, zone)
    if step and step not in STEPS:
        raise ValueError(f"step: expected one of {', '.join(STEPS)}, got {quoted(step)}")
    return Question(
        from_hour=from_hour,
        to_hour=to_hour,
        zone=zone,
        aggregate=_columns(aggregate or "tenant"),
        step=STEPS[step] if step else None,
        accumulate=accumulate,
        idle=IdlePolicy.parse(idle),
        conditions=_conditions(filter or ""),
        covers=covers,
        price=_price(price),
    )


def engines_named(filter: str | None) -> EngineFilter:  # noqa: A002 - the word of the grammar
    """Parse a filter for an answer that is about engines as a whole: labels only.

    Raises ValueError for one that is not understood, or names anything else.
    """
    asked = Question(conditions=_conditions(filter or ""))
    if others := [*asked.row_conditions]:
        raise ValueError(
            f"filter: expected {LABEL}NAME=VALUE,... joined by + here, got {quoted(others[0])}"
        )
    return asked.engines


def _columns(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(fields(text)))
    for name in names:
        if not _is_column(name):
            raise ValueError(
                f"aggregate: expected {_COLUMNS}, joined by commas, got {quoted(name)}"
            )
    return _few("aggregate", names)


def _few(word: str, columns: T) -> T:
    if len(columns) > COLUMNS_MAX:
        raise ValueError(f"{word}: expected at most {COLUMNS_MAX} columns, got {len(columns)}")
    return columns


def _conditions(text: str) -> dict[str, frozenset[str]]:
    """Parse a filter such as `tenant:a,b+tag:team=x` into the allowed values by column."""
    found: dict[str, frozenset[str]] = {}
    for term in _terms(text):
        column, colon, values = term.partition(":")
        if column in ("tag", "label"):
            name, colon, values = values.partition("=")
            column = f"{column}:{name}"
        allowed = frozenset(fields(values))
        if not colon or not _is_column(column) or not allowed:
            raise ValueError(
                f"filter: expected COLUMN:VALUE,... joined by +, the column one of {_COLUMNS} "
                f"(tag:NAME=VALUE,..., label:NAME=VALUE,...), got {quoted(term)}"
            )
        found[column] = _both(column, found[column], allowed) if column in found else allowed
    return _few("filter", found)


def _both(column: str, some: frozenset[str], others: frozenset[str]) -> frozenset[str]:
    """Return the values that two conditions on one column allow; a child is of its parent too."""
    if column != "tenant":
        return some & others
    pairs = ((some, others), (others, some))
    return frozenset(
        name
        for names, above in pairs
        for name in names
        if any(TenantScope(each).includes(name) for each in above)
    )


def _terms(text: str) -> list[str]:
    text = text.strip()
    separators = [token.span() for token in _TOKEN.finditer(text) if token["and"]]
    starts = [0, *(end for _, end in separators)]
    ends = [*(start for start, _ in separators), len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)] if text else []


def _is_column(name: str) -> bool:
    is_named = any(name.startswith(kind) and name != kind for kind in (TAG, LABEL))
    return is_named or name in DIMENSIONS or name in TIMES


def _price(text: str | None) -> Decimal | None:
    if not text:
        return None
    # An exponent is refused: exact arithmetic would have to compute a million digits.
    if not _PRICE.match(text):
        raise ValueError(f"price: expected USD per GPU-hour, such as 2.10, got {quoted(text)}")
    return Decimal(text)
