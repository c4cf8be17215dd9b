"""Make the sums anew from the rows, and compare them: the second way to the same figures.

The database adds up: pieces by hour and group in one query, exchanges in another. None of it is
code that `adding.py` uses, so each is a judge of the other. A migration and a repair begin with it.
What dropped rows had added up to is on record (`retention/tables.py`), and is added to the rest.

Invariant: the sums that are made here depend on the rows, and on that record, only.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Select,
    Table,
    Text,
    and_,
    case,
    cast,
    collate,
    delete,
    func,
    literal,
    or_,
    select,
    type_coerce,
    union_all,
)
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.rollups.bill_sums import rebuild_bill_sums
from vllm_cost_meter.ledger.rollups.groups import Group
from vllm_cost_meter.ledger.rollups.histograms import (
    MEASURES,
    Bucket,
    Counted,
    write_counted,
)
from vllm_cost_meter.ledger.rollups.sums import AMOUNTS, SumKey, SumsByKey, nothing, write
from vllm_cost_meter.ledger.schema import (
    ENDED_AMOUNTS,
    SUMMED_AMOUNTS,
    dropped_bills,
    dropped_hours,
    dropped_latencies,
    dropped_unknown_energy,
    http_requests,
    requests,
    rollup_arrivals,
    rollup_days,
    rollup_groups,
    rollup_hours,
    rollup_latencies,
)
from vllm_cost_meter.ledger.tables.pieces import (
    PIECE_HOUR,
    PIECE_NS,
    PROMPT_GROUP,
    piece_amount,
    summed_amount,
    with_pieces,
)
from vllm_cost_meter.ledger.tables.replies import SOURCES, is_replied
from vllm_cost_meter.ledger.tables.sums import ENDED_TOKENS, EXTERNAL_AMOUNTS
from vllm_cost_meter.units.calendar import HOURS_PER_DAY
from vllm_cost_meter.units.time import US_PER_HOUR, hour_of

_AMOUNTS_OF_PROMPTS = ENDED_AMOUNTS[1:]
_ROWS_AT_ONCE = 10_000


class SpanOfSums(NamedTuple):
    """A row of sums: a table, the hour or day, the group, and the amounts in order of AMOUNTS."""

    table: str
    span: int
    group: Group
    amounts: tuple[int, ...]


def rebuild(connection: Connection) -> None:
    """Delete all sums and make them anew from the rows."""
    rebuild_bill_sums(connection)
    for table in (rollup_hours, rollup_days, rollup_latencies, rollup_arrivals):
        connection.execute(delete(table))
    g = rollup_groups.c.group_id
    is_needed = (g.in_(select(t.c.group_id)) for t in (dropped_hours, dropped_unknown_energy))
    connection.execute(delete(rollup_groups).where(~or_(*is_needed)))
    write_counted(connection, _timed(connection))
    rows = _rows(connection)
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        write(connection, _added_up(some))


def differences(connection: Connection) -> list[SpanOfSums]:
    """Return the sums of the ledger that are not what its rows add up to."""
    expected = _added_up(_rows(connection))
    days: SumsByKey = {}
    for place, hour_amounts in expected.items():
        day = days.setdefault(place._replace(hour=place.hour // HOURS_PER_DAY), nothing())
        day[:] = (a + b for a, b in zip(day, hour_amounts, strict=True))
    wrong = []
    for table, right in ((rollup_hours, expected), (rollup_days, days)):
        found = dict(_stored(connection, table))
        wrong += [
            SpanOfSums(table.name, place.hour, place.group, found.get(place, ()))
            for place in right.keys() | found.keys()
            if tuple(right.get(place, nothing())) != found.get(place, tuple(nothing()))
        ]
    return sorted(wrong, key=lambda one: (one.table, one.span, str(one.group)))


def _added_up(rows: Iterable[tuple[SumKey, int, list[int]]]) -> SumsByKey:
    sums: SumsByKey = {}
    for key, first, amounts in rows:
        known = sums.setdefault(key, nothing())
        for at, amount in enumerate(amounts, first):
            known[at] += amount
    return sums


def wrong_histograms(connection: Connection) -> list[tuple[Any, ...]]:
    """Return the rows of latencies and arrivals that the ledger has too many, or lacks."""
    right = _timed(connection)
    expected: set[tuple[Any, ...]] = {(*key, *both) for key, both in right.buckets().items()}
    expected |= set(right.arrivals.items())
    found = {tuple(row) for row in connection.execute(select(rollup_latencies))}
    found |= {tuple(row) for row in connection.execute(select(rollup_arrivals))}
    return sorted(expected ^ found, key=str)


def _timed(connection: Connection) -> Counted:
    """Count all exchanges' times and arrivals, one row of the database for each exchange."""
    h, r = http_requests.c, requests.c
    beside = requests.alias("beside")
    b = beside.c
    exchange = func.coalesce(r.http_request_id, r.run_id + "/" + cast(r.seq, Text))
    times = (func.min(r.ttft_us), func.max(r.tpot_us), func.max(r.e2e_us))
    ended_at = func.coalesce(h.finished_at, b.ended_at, r.ended_at)
    # Of a bill with its reply beside it nothing else is looked up.
    other = case((r.reply_status.is_(None), r.http_request_id))
    is_beside = and_(b.http_request_id == other, b.reply_status.is_not(None))
    asked = (
        select(func.max(ended_at), func.min(r.started_at), *times)
        .join_from(requests, http_requests, h.http_request_id == other, isouter=True)
        .join(beside, is_beside, isouter=True)
        .group_by(exchange)
    )
    counted = Counted()
    for ended, came_at, *took_us in connection.execute(asked):
        counted.arrivals[hour_of(came_at)] += 1
        for measure, us in zip(MEASURES, took_us, strict=True):
            if us is not None:
                counted.add_time(hour_of(ended), measure, int(us))
    _add_dropped_times(connection, counted)
    return counted


def _add_dropped_times(connection: Connection, counted: Counted) -> None:
    d, h = dropped_latencies.c, dropped_hours.c
    key = (d.hour, d.measure, d.about_us)
    buckets = select(*key, func.sum(d.exchanges), func.sum(d.sum_us)).group_by(*key)
    for hour, measure, about_us, exchanges, sum_us in connection.execute(buckets):
        counted.add_bucket(Bucket(hour, measure, about_us), int(exchanges), int(sum_us))
    came = select(h.hour, func.sum(h.arrivals)).where(h.arrivals != 0).group_by(h.hour)
    for hour, exchanges in connection.execute(came):
        counted.arrivals[hour] += int(exchanges)


class Charged(NamedTuple):
    """An amount that costs: its columns in sums, and the term of it in an hour of a bill."""

    columns: tuple[str, ...]
    in_bill: ColumnElement[int]


# GPU-ns, and KV cache blocks x ms.
TIME = Charged(("prefill_ns", "decode_ns"), PIECE_NS)
RESIDENCY = Charged(("kv_block_ms",), piece_amount("kv_block_ms"))


def time_differences(connection: Connection) -> dict[str, int]:
    """Return how far the sums are from the bills, in GPU-ns, by run; runs without any are left out.

    This compares the time only, by hour and by day: cheaper by far than `differences`. Time that
    stands in a wrong hour counts where it lacks and where it is.
    """
    return _differences(connection, wrong_hours(), wrong_days(), wrong_dropped())


def residency_differences(connection: Connection) -> dict[str, int]:
    """Return the same for KV residency, in blocks x ms."""
    return _differences(connection, wrong_hours(RESIDENCY), wrong_days(RESIDENCY))


def _differences(connection: Connection, *queries: Select[Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for query in queries:
        for run_id, _, amount in connection.execute(query):
            found[run_id] = found.get(run_id, 0) + abs(int(amount))
    return found


def wrong_hours(charged: Charged = TIME) -> Select[Any]:
    """Select (run, hour, amount) where the bills have more of an amount than the sum, or less."""
    bills = select(requests.c.run_id, PIECE_HOUR.label("span"), charged.in_bill.label("amount"))
    bills = bills.select_from(with_pieces()).where(PIECE_HOUR.is_not(None))
    dropped, sums = _amount_in(dropped_hours, 1, charged), _amount_in(rollup_hours, -1, charged)
    return _unequal(bills, dropped, sums)


def wrong_days(charged: Charged = TIME) -> Select[Any]:
    """Select (run, day, amount) where the hours have more of an amount than the day, or less."""
    h = _amount_in(rollup_hours, 1, charged).subquery().c
    return _unequal(
        select(h.run_id, (h.span // HOURS_PER_DAY).label("span"), h.amount),
        _amount_in(rollup_days, -1, charged),
    )


def _amount_in(table: Table, sign: int, charged: Charged) -> Select[Any]:
    g = rollup_groups.c
    first, *others = (table.c[name] for name in charged.columns)
    amount = sum(others, start=first)
    side = select(g.run_id, next(iter(table.c)).label("span"), (sign * amount).label("amount"))
    return side.join(rollup_groups, g.group_id == table.c.group_id)


def wrong_dropped() -> Select[Any]:
    """Select (run, 0, GPU-ns) where the dropped bills have more time than their sums, or less."""
    d = dropped_bills.c
    bills = select(d.run_id, literal(0).label("span"), d.gpu_time_ns.label("amount"))
    of = _amount_in(dropped_hours, -1, TIME).subquery().c
    return _unequal(bills, select(of.run_id, literal(0).label("span"), of.amount))


def _unequal(*sides: Select[Any]) -> Select[Any]:
    of = union_all(*sides).subquery().c
    total = func.sum(of.amount)
    return select(of.run_id, of.span, total).group_by(of.run_id, of.span).having(total != 0)


def _stored(connection: Connection, table: Table) -> Iterator[tuple[SumKey, tuple[int, ...]]]:
    g = rollup_groups.c
    asked = select(
        next(iter(table.c)), *(g[name] for name in Group._fields), *(table.c[n] for n in AMOUNTS)
    ).join(rollup_groups, g.group_id == table.c.group_id)
    width = len(Group._fields)
    for span, *rest in connection.execute(asked):
        yield SumKey(span, Group(*rest[:width])), tuple(map(int, rest[width:]))


def _rows(connection: Connection) -> Iterator[tuple[SumKey, int, list[int]]]:
    """Yield amounts with their place, and where in AMOUNTS they begin."""
    width = len(Group._fields)
    for place, amounts in _stored(connection, dropped_hours):
        yield place, 0, list(amounts)
    for hour, *rest in connection.execute(_pieces()):
        yield SumKey(hour, Group(*rest[:width])), 0, [int(amount) for amount in rest[width:]]
    is_sorted_apart = connection.dialect.name == "postgresql"
    told = (_told(source, is_sorted_apart) for source in SOURCES)
    for query in (*told, _untold(is_sorted_apart)):
        for hour, *rest in connection.execute(query):
            place = SumKey(hour, Group(*rest[:width]))
            yield place, len(SUMMED_AMOUNTS), [int(amount) for amount in rest[width:]]


def _pieces() -> Select[Any]:
    """Add up the pieces of all bills by hour and group."""
    keys = [PIECE_HOUR, *(requests.c[name] for name in Group._fields)]
    return (
        select(*keys, *(func.sum(summed_amount(name)) for name in SUMMED_AMOUNTS))
        .select_from(with_pieces())
        .where(PIECE_HOUR.is_not(None))
        .group_by(*keys)
    )


def _told(source: FromClause, is_sorted_apart: bool) -> Select[Any]:
    """Count the exchanges that have a reply in a source and at least one part."""
    h, r = source.c, requests.c
    of_reply = {"tenant", "tenant_rule", "tenant_above"}
    # PostgreSQL knows of a table's key only that it decides the other columns.
    names = ("http_request_id", "finished_at", *sorted(of_reply), *ENDED_TOKENS)
    same = (h[name] for name in names)
    prompts = (
        select(
            h.http_request_id,
            _hour(h.finished_at).label("hour"),
            *(
                (h[name] if name in of_reply else _first(r[name], is_sorted_apart)).label(name)
                for name in Group._fields
            ),
            *(h[name].label(f"told_{name}") for name in ENDED_TOKENS),
            *_prompt_tokens(r),
        )
        .select_from(source)
        .join(requests, r.http_request_id == h.http_request_id)
        .group_by(*same, PROMPT_GROUP)
        .subquery()
    )
    p = prompts.c
    exchanges = (
        select(
            func.min(p.hour).label("hour"),
            *(_first(p[name], is_sorted_apart).label(name) for name in Group._fields),
            *(_told_or_own(p, name).label(name) for name in ENDED_TOKENS),
            *(func.sum(p[name]).label(name) for name in EXTERNAL_AMOUNTS),
        )
        .group_by(p.http_request_id)
        .subquery()
    )
    e = exchanges.c
    keys = [e[name] for name in ("hour", *Group._fields)]
    sums = (func.sum(e[name]) for name in _AMOUNTS_OF_PROMPTS)
    return select(*keys, func.count(), *sums).group_by(*keys)


def _told_or_own(p: Any, name: str) -> ColumnElement[Any]:
    """Return the SQL for the tokens of an exchange that was told some, over its prompts."""
    own = func.sum(p[name])
    told = func.coalesce(func.max(p[f"told_{name}"]), own)
    if name != "cached_tokens":
        return told
    return case((func.sum(p.external_tokens) > 0, own), else_=told)


def _untold(is_sorted_apart: bool) -> Select[Any]:
    """Add up the tokens of parts without a reply; they add no request."""
    r = requests.c
    exchange = func.coalesce(r.http_request_id, r.run_id + "/" + cast(r.seq, Text))
    prompts = (
        select(
            func.max(_hour(r.finished_at)).label("hour"),
            *(
                (r[name] if name == "tenant" else _first(r[name], is_sorted_apart)).label(name)
                for name in Group._fields
            ),
            *_prompt_tokens(r),
        )
        .where(~is_replied(r.http_request_id))
        .group_by(r.tenant, exchange, PROMPT_GROUP)
        .subquery()
    )
    p = prompts.c
    keys = [p[name] for name in ("hour", *Group._fields)]
    sums = (func.sum(p[name]) for name in _AMOUNTS_OF_PROMPTS)
    return select(*keys, literal(0), *sums).group_by(*keys)


def _hour(instant: ColumnElement[Any]) -> ColumnElement[int]:
    """Return the SQL for the hour of an instant, since the epoch."""
    return type_coerce(instant, BigInteger) // US_PER_HOUR


def _first(column: ColumnElement[Any], is_sorted_apart: bool) -> ColumnElement[Any]:
    """Return the first text, byte by byte, whatever language a database sorts by."""
    return func.min(collate(column, "C") if is_sorted_apart else column)


def _prompt_tokens(r: Any) -> list[ColumnElement[Any]]:
    """Return the SQL for the tokens of one prompt's parts: the prompt once, all outputs added."""
    is_known = func.count() == func.count(r.external_tokens)
    external = (func.max(r.external_tokens), func.max(r.prompt_tokens))
    return [
        func.max(r.prompt_tokens).label("prompt_tokens"),
        func.max(r.cached_tokens).label("cached_tokens"),
        func.sum(r.output_tokens).label("output_tokens"),
        *(
            case((is_known, amount), else_=0).label(name)
            for name, amount in zip(EXTERNAL_AMOUNTS, external, strict=True)
        ),
    ]
