"""Rows as a ledger's file has them, with ids as the texts that they stand for."""

from collections.abc import Iterable
from typing import Any

from vllm_cost_meter.ledger.tables.packed import unpack_id


def texts(rows: Iterable[Iterable[Any]]) -> list[tuple[Any, ...]]:
    return [tuple(unpack_id(v) if isinstance(v, bytes) else v for v in row) for row in rows]
