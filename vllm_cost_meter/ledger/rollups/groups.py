"""The group of a sum: the run, and all that a report can ask for by name.

A group is stored once, under a number that is a digest of its texts. So the number needs no look
into the ledger, and two ledgers, or two orders of writing, give a group the same one.

Invariant: groups that differ in any text have different numbers, up to a chance of 1 in 10^9 among
100,000 groups.
"""

import hashlib
import json
from functools import lru_cache
from typing import NamedTuple

# A 64-bit integer of a database has a sign.
_ID_BYTES = 8
_CACHED = 10_000


class Group(NamedTuple):
    """The texts that the rows of one sum share; the fields are columns of `rollup_groups`."""

    run_id: str
    tenant: str
    tenant_rule: str
    tenant_parent: str | None
    tags: str | None
    tenant_above: str | None
    model: str | None
    lora: str | None
    route: str | None
    engine_status: str


@lru_cache(_CACHED)
def group_id_of(group: Group) -> int:
    """Return the number of a group, from 0 to 2^63 - 1."""
    text = json.dumps(group, ensure_ascii=True).encode()
    digest = hashlib.blake2b(text, digest_size=_ID_BYTES).digest()
    return int.from_bytes(digest) >> 1
