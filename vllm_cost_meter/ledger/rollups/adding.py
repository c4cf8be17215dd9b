"""Add what new rows add up to, in the transaction that writes them.

Rows may come twice, in any order and in any batch. So before the rows are written, `new_rows` looks
which of them the ledger lacks. A new bill adds its pieces. An exchange is counted whole: what it
added before is taken off, and what it adds now is put on, because its HTTP row and its parts may
come apart.

The ledger of a SQLite file has one writer at a time. In PostgreSQL a lock, until the transaction
ends, does that for all that write here.

Invariant: after each transaction the sums are what `rebuilding.py` would make of the rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.rollups.bill_sums import add_bills
from vllm_cost_meter.ledger.rollups.exchanges import PartFacts, ReplyFacts, ended_of
from vllm_cost_meter.ledger.rollups.groups import Group
from vllm_cost_meter.ledger.rollups.histograms import Counted, write_counted
from vllm_cost_meter.ledger.rollups.sums import SumKey, SumsByKey, write
from vllm_cost_meter.ledger.rollups.upserts import in_chunks, lock_sums
from vllm_cost_meter.ledger.rows import tags_text, us_of
from vllm_cost_meter.ledger.schema import ENDED_AMOUNTS, SUMMED_AMOUNTS, http_requests, requests
from vllm_cost_meter.ledger.tables.packed import pack_id, unpack_id
from vllm_cost_meter.ledger.tables.replies import replies
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest
from vllm_cost_meter.units.time import NS_PER_HOUR, hour_of


class NewRows(NamedTuple):
    """The records of a batch that the ledger lacks, each once.

    `begun` are the exchanges of these of which the ledger has a row already.
    """

    parts: Mapping[tuple[str, int], EngineRequest]
    replies: Mapping[str, HttpRequest]
    begun: frozenset[str]


def new_rows(
    connection: Connection, parts: Sequence[EngineRequest], told: Sequence[HttpRequest]
) -> NewRows:
    """Return the bills and HTTP requests that are not in the ledger yet."""
    if parts or told:
        lock_sums(connection)
    by_key: dict[tuple[str, int], EngineRequest] = {}
    for part in parts:
        by_key.setdefault((part.bill.run_id, part.bill.seq), part)
    by_id: dict[str, HttpRequest] = {}
    for reply in told:
        by_id.setdefault(reply.http_request_id, reply)
    for key in _bills_there(connection, by_key):
        del by_key[key]
    ids = {part.http_request_id for part in by_key.values()} | by_id.keys()
    asked = sorted(id for id in ids if id is not None)
    found = [*_there(connection, _BILLS, asked), *_there(connection, _REPLIES_ALONE, asked)]
    replied = {id for id, status in found if status is not None}
    news = {id: by_id[id] for id in by_id if id not in replied}
    return NewRows(by_key, news, frozenset(id for id, _ in found))


# The exchanges of bills, each with the status of the reply that stands beside it; and all others.
_BILLS = select(requests.c.http_request_id, requests.c.reply_status)
_REPLIES_ALONE = select(http_requests.c.http_request_id, http_requests.c.status)


def _there(
    connection: Connection, rows: Select[Any], ids: Sequence[str]
) -> Iterator[tuple[str, int | None]]:
    """Yield the rows of a query that begin with one of these ids."""
    column = rows.selected_columns[0]
    for some in in_chunks(ids):
        if connection.dialect.name == "sqlite":
            # SQLAlchemy would take three times as long for the parameters as SQLite for the rows.
            asked = _sqlite_text_of_in(rows, len(some))
            packed = connection.exec_driver_sql(asked, tuple(map(pack_id, some)))
            yield from ((unpack_id(id), status) for id, status in packed)
        else:
            found = connection.execute(rows.where(column.in_(some)))
            yield from ((id, status) for id, status in found)


@lru_cache(maxsize=8)
def _sqlite_text_of_in(rows: Select[Any], count: int) -> str:
    return f"{rows} WHERE {rows.selected_columns[0]} IN ({', '.join('?' * count)})"


def _bills_there(
    connection: Connection, keys: Iterable[tuple[str, int]]
) -> Iterator[tuple[str, int]]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for run_id, seq in keys:
        numbers[run_id].append(seq)
    r = requests.c
    for run_id, seqs in numbers.items():
        # An engine's bills come nearly in order, so most are above all that are there.
        top = connection.execute(select(func.max(r.seq)).where(r.run_id == run_id)).scalar()
        for some in in_chunks([seq for seq in seqs if top is not None and seq <= top]):
            there = select(r.seq).where(r.run_id == run_id, r.seq.in_(some))
            for (seq,) in connection.execute(there).all():
                yield run_id, seq


# Amounts in the order of SUMMED_AMOUNTS or of ENDED_AMOUNTS, all that belong into one sum.
_RowsByKey = dict[SumKey, list[Sequence[int]]]


def add(connection: Connection, new: NewRows) -> None:
    """Add what new rows add up to; they must be written already."""
    facts = {key: _facts_of(part) for key, part in new.parts.items()}
    pieces: _RowsByKey = defaultdict(list)
    for key, part in new.parts.items():
        group = facts[key].group
        for piece in part.bill.pieces:
            pieces[SumKey(piece.hour, group)].append((*piece[1:-1], *piece.charges_known))
    ended: _RowsByKey = defaultdict(list)
    counted = Counted()
    for reply, parts, sign in _changes(connection, new, facts):
        counted.add(reply, parts, sign)
        for hour, group, *amounts in ended_of(reply, parts):
            signed = amounts if sign > 0 else [sign * amount for amount in amounts]
            ended[SumKey(hour, group)].append(signed)
    write(connection, _added_up(pieces, ended))
    write_counted(connection, counted)
    add_bills(connection, new.parts.values())


def _added_up(pieces: _RowsByKey, ended: _RowsByKey) -> SumsByKey:
    no_pieces, none_ended = [0] * len(SUMMED_AMOUNTS), [0] * len(ENDED_AMOUNTS)
    return {
        key: [
            *map(sum, zip(*pieces.get(key, (no_pieces,)), strict=True)),
            *map(sum, zip(*ended.get(key, (none_ended,)), strict=True)),
        ]
        for key in pieces.keys() | ended.keys()
    }


def _group_of(part: EngineRequest) -> Group:
    owner = part.owner
    return Group(
        *(part.bill.run_id, owner.tenant, owner.rule_text, owner.parent, tags_text(owner)),
        *(owner.above_text, part.model, part.lora, part.route, part.bill.engine_status),
    )


# ---- exchanges


ExchangeFacts = tuple[ReplyFacts | None, Sequence[PartFacts]]


def _changes(
    connection: Connection, new: NewRows, facts: Mapping[tuple[str, int], PartFacts]
) -> Iterator[tuple[ReplyFacts | None, Sequence[PartFacts], int]]:
    """Yield exchanges as they are now, and as they were before with a sign of -1."""
    there = read_exchanges(connection, sorted(new.begun))
    for id, (reply, parts) in there.items():
        yield reply, parts, 1
        before = [part for part in parts if (part.run_id, part.seq) not in new.parts]
        if before:
            yield None if id in new.replies else reply, before, -1
    whole: dict[str, list[PartFacts]] = defaultdict(list)
    for key, part in new.parts.items():
        if part.http_request_id is None:
            yield None, [facts[key]], 1
        elif part.http_request_id not in new.begun:
            whole[part.http_request_id].append(facts[key])
    for id, parts in whole.items():
        told = new.replies.get(id)
        yield None if told is None else _reply_of(told), parts, 1


def _reply_of(reply: HttpRequest) -> ReplyFacts:
    owner, usage = reply.owner, reply.usage
    return ReplyFacts(
        *(reply.finished_at_ns // NS_PER_HOUR, owner.tenant, owner.rule_text, owner.above_text),
        *(usage.prompt_tokens, usage.cached_tokens, usage.output_tokens),
    )


def _facts_of(part: EngineRequest) -> PartFacts:
    bill, times = part.bill, part.latencies
    return PartFacts(
        *(bill.run_id, bill.seq, part.prompt_group),
        *(part.finished_at_ns // NS_PER_HOUR, _group_of(part)),
        *(bill.prompt_tokens, bill.cached_tokens, bill.output_tokens),
        bill.external_tokens,
        part.started_at_ns // NS_PER_HOUR,
        *(us_of(times.ttft_ms), us_of(times.tpot_ms), us_of(times.e2e_ms)),
    )


def read_exchanges(connection: Connection, ids: Sequence[str]) -> dict[str, ExchangeFacts]:
    """Return the HTTP rows and parts of exchanges, as they are in the ledger."""
    told: dict[str, ReplyFacts] = {}
    parts: dict[str, list[PartFacts]] = {}
    h, r = replies.c, requests.c
    for some in in_chunks(ids):
        for id, at, *rest in connection.execute(_REPLIES.where(h.http_request_id.in_(some))):
            told[id] = ReplyFacts(hour_of(at), *rest)
        for http_id, facts in read_parts(connection, r.http_request_id.in_(some)):
            if http_id is not None:
                parts.setdefault(http_id, []).append(facts)
    return {id: (told.get(id), parts.get(id, [])) for id in ids}


def read_parts(
    connection: Connection, mine: ColumnElement[bool]
) -> Iterator[tuple[str | None, PartFacts]]:
    """Yield the parts that meet a condition on `requests`, each with its exchange's id."""
    for row in connection.execute(_PARTS.where(mine)):
        yield (
            row.http_request_id,
            PartFacts(
                run_id=row.run_id,
                seq=row.seq,
                prompt_group=row.prompt_group or row.request_id,
                hour=hour_of(row.finished_at),
                group=Group._make(row[-len(Group._fields) :]),
                prompt_tokens=row.prompt_tokens,
                cached_tokens=row.cached_tokens,
                output_tokens=row.output_tokens,
                external_tokens=row.external_tokens,
                started_hour=hour_of(row.started_at),
                ttft_us=_whole(row.ttft_us),
                tpot_us=_whole(row.tpot_us),
                e2e_us=_whole(row.e2e_us),
            ),
        )


def _whole(us: float | None) -> int | None:
    return None if us is None else int(us)


_REPLIES: Select[Any] = select(
    *(replies.c[name] for name in ("http_request_id", "finished_at")),
    *(replies.c[name] for name in ReplyFacts._fields[1:]),
)
_PART_COLUMNS = (
    *("http_request_id", "seq", "request_id", "prompt_group", "finished_at", "started_at"),
    *("prompt_tokens", "cached_tokens", "output_tokens", "external_tokens"),
    *("ttft_us", "tpot_us", "e2e_us"),
    *Group._fields,
)
_PARTS: Select[Any] = select(*(requests.c[name] for name in _PART_COLUMNS))
