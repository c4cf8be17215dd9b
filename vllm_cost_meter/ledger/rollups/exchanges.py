"""What an exchange adds to the sums: one request, with the tokens that its client was told.

If the reply did not say, the tokens of its parts count; a prompt that several parts share counts
once. To its client vLLM calls cached what came over a KV connector too. So where some did, the
parts say how many were cached. Parts without an HTTP row add their tokens, but no request. An
exchange has one tenant. If its parts differ in run, model, adapter, route, tags or end status, it
counts under the first value by name. An exchange without a part, which never reached an engine,
adds nothing.

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
    external_tokens: int | None
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
    external_tokens: int
    external_known_tokens: int


class _Tokens(NamedTuple):
    """The tokens of prompts, by their parts; the names are those of `EndedExchanges`."""

    prompt: int
    cached: int
    output: int
    external: int
    external_known: int


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
    own = prompts[0] if len(prompts) == 1 else _Tokens(*map(sum, zip(*prompts, strict=True)))
    told_cached = None if own.external else reply.cached_tokens
    yield EndedExchanges(
        hour=reply.hour,
        group=group,
        requests=1,
        prompt_tokens=own.prompt if reply.prompt_tokens is None else reply.prompt_tokens,
        cached_tokens=own.cached if told_cached is None else told_cached,
        output_tokens=own.output if reply.output_tokens is None else reply.output_tokens,
        external_tokens=own.external,
        external_known_tokens=own.external_known,
    )


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


def _prompt_tokens(parts: Sequence[PartFacts]) -> _Tokens:
    """Return the tokens of one prompt's parts: the prompt once, all outputs added."""
    prompt_tokens = max(part.prompt_tokens for part in parts)
    external = [part.external_tokens for part in parts]
    known = [tokens for tokens in external if tokens is not None]
    is_known = len(known) == len(external)
    return _Tokens(
        prompt=prompt_tokens,
        cached=max(part.cached_tokens for part in parts),
        output=sum(part.output_tokens for part in parts),
        external=max(known) if is_known else 0,
        external_known=prompt_tokens if is_known else 0,
    )
