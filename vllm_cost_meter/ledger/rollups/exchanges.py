"""What an exchange adds to the sums: one request, with the tokens that its client was told.

If the reply did not say, the tokens of its parts count; a prompt that several parts share counts
once. Parts without an HTTP row add their tokens, but no request. An exchange has one tenant. If its
parts differ in run, model, adapter, route, tags or end status, it counts under the first value by
name. An exchange without a part, which never reached an engine, adds nothing.

These are pure functions over rows. `rebuilding.py` has the same rule in SQL, written on its own.

Invariant: each exchange, and each part without one, is in exactly one group. So all groupings have
the same totals.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from vllm_cost_meter.ledger.rollups.groups import Group


class PartFacts(NamedTuple):
    """The columns of a part in `requests` that count.

    `hour` is the UTC hour in which it ended. Latencies are in microseconds, None if unknown.
    """

    run_id: str
    seq: int
    prompt_group: str
    hour: int
    group: Group
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    started_hour: int
    ttft_us: int | None
    tpot_us: int | None
    e2e_us: int | None


class ReplyFacts(NamedTuple):
    """The columns of an exchange in `replies` that count; tokens are None if not told."""

    hour: int
    tenant: str
    tenant_rule: str
    tenant_above: str | None
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None


class EndedExchanges(NamedTuple):
    """What ended in an hour in a group: exchanges, and their tokens."""

    hour: int
    group: Group
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


def ended_of(reply: ReplyFacts | None, parts: Sequence[PartFacts]) -> Iterator[EndedExchanges]:
    """Yield what an exchange with this HTTP row, or none, and these parts adds."""
    if not parts:
        return
    if reply is None:
        for some in _by_tenant_and_prompt(parts):
            hour, group = max(part.hour for part in some), _group_of(some)
            yield EndedExchanges(hour, group, 0, *_prompt_tokens(some))
        return
    group = _group_of(parts)
    owner = (reply.tenant, reply.tenant_rule, reply.tenant_above)
    if (group.tenant, group.tenant_rule, group.tenant_above) != owner:  # which is rare
        tenant, rule, above = owner
        group = group._replace(tenant=tenant, tenant_rule=rule, tenant_above=above)
    prompts = [_prompt_tokens(some) for some in _by_prompt(parts)]
    sums = prompts[0] if len(prompts) == 1 else map(sum, zip(*prompts, strict=True))
    own = (reply.prompt_tokens, reply.cached_tokens, reply.output_tokens)
    counted = (s if told is None else told for told, s in zip(own, sums, strict=True))
    yield EndedExchanges(reply.hour, group, 1, *counted)


def _group_of(parts: Sequence[PartFacts]) -> Group:
    """Return the first value by name of each column."""
    if len(parts) == 1:  # as most are
        return parts[0].group
    columns = zip(*(part.group for part in parts), strict=True)
    return Group._make(
        min((text for text in texts if text is not None), default=None) for texts in columns
    )


def _by_prompt(parts: Sequence[PartFacts]) -> Iterator[list[PartFacts]]:
    if len(parts) == 1:
        yield [*parts]
        return
    ordered = sorted(parts, key=lambda part: part.prompt_group)
    for _, some in groupby(ordered, key=lambda part: part.prompt_group):
        yield list(some)


def _by_tenant_and_prompt(parts: Sequence[PartFacts]) -> Iterator[list[PartFacts]]:
    ordered = sorted(parts, key=lambda part: part.group.tenant)
    for _, of_tenant in groupby(ordered, key=lambda part: part.group.tenant):
        yield from _by_prompt(list(of_tenant))


def _prompt_tokens(parts: Sequence[PartFacts]) -> tuple[int, int, int]:
    """Return the tokens of one prompt's parts: the prompt once, all outputs added."""
    if len(parts) == 1:
        only = parts[0]
        return only.prompt_tokens, only.cached_tokens, only.output_tokens
    return (
        max(part.prompt_tokens for part in parts),
        max(part.cached_tokens for part in parts),
        sum(part.output_tokens for part in parts),
    )
