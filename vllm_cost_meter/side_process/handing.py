"""Hand values with dates, time zones and exact numbers to a side process: as pickles.

The values are dataclasses that change with the code, and both ends run the same code, so a message
type of its own for each of them would be a copy of every field. multiprocessing does the same.

Invariant: pickles travel from a process to one that it started, over a socket or pipe of their own,
and never back. What comes back is typed messages.
"""

import pickle
from typing import Any


def packed(value: object) -> bytes:
    """Return a value as it is handed over."""
    return pickle.dumps(value)


def unpacked(data: bytes) -> Any:
    """Return what was handed over: see the module for why it may be believed."""
    return pickle.loads(data)  # noqa: S301
