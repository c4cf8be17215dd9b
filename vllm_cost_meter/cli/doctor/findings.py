"""What a check of the doctor found, and how a check is kept from ending the others.

Invariant: a check that raises has failed, and its detail is the error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum


class Outcome(IntEnum):
    """How well something is, the worse the higher."""

    OK = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    name: str
    outcome: Outcome
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the check has not failed."""
        return self.outcome is not Outcome.FAIL

    def and_also(self, outcome: Outcome, detail: str) -> "Finding":
        """Return a finding with one more detail; the worse of both decides."""
        return Finding(self.name, max(self.outcome, outcome), f"{self.detail}; {detail}")


def fine(name: str, detail: str) -> Finding:
    """Return that all is well."""
    return Finding(name, Outcome.OK, detail)


def failed(name: str, detail: str) -> Finding:
    """Return that something is wrong."""
    return Finding(name, Outcome.FAIL, detail)


def contained(name: str, check: Callable[[], Finding]) -> Finding:
    """Return what a check finds, or that it has failed by an error."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a doctor reports what it meets
        cause = getattr(error, "orig", None) or error
        return failed(name, f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}")
