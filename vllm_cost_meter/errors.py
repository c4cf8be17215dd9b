"""All exceptions that the cost meter raises on purpose.

    CostMeterError
    ├── SettingError        a setting is wrong: the server does not start
    │   └── UnreadableError   the settings file is there, and cannot be read now
    ├── LedgerError         the ledger cannot be opened, read or written
    ├── ConflictError       a change was made on what is no longer the latest version
    ├── StepLogError        a step log cannot be written or read, or the file is not a step log
    ├── DependencyError     a command needs a package that is not installed
    ├── AwayError           a side process is not there, or does not answer
    ├── OverdueError        a question to the ledger took longer than it may
    ├── ServerError         a server failed, or is not what was expected there
    │   ├── UnansweredError   nobody answers at its address
    │   └── StatusError       it answers with a status of HTTP that says no
    └── VllmMismatchError   this vLLM differs from what the meter expects: it is left untouched

Every message says what was expected, what came instead, where, and what to do. Errors in hooks on
vLLM's calls never leave the meter (see `vllm_cost_meter.guard`).
"""


class CostMeterError(Exception):
    """The base class of all errors that the meter raises on purpose."""


class SettingError(CostMeterError):
    """A setting is wrong. The message names the key, what was expected and what came."""

    def __init__(self, key: str, expected: str, got: object, where: str = "environment") -> None:
        super().__init__(f"{key} ({where}): expected {expected}, got {got!r}")
        self.key = key


class UnreadableError(SettingError):
    """The settings file cannot be read. It may be readable later, with the same text."""


class LedgerError(CostMeterError):
    """The ledger cannot be used. The message names the ledger, the cause and what to do.

    `is_missing` tells that there is none at its place.
    """

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing


class ConflictError(CostMeterError):
    """A change was meant for another version than the latest one, which is `version`."""

    def __init__(self, message: str, version: int) -> None:
        super().__init__(message)
        self.version = version


class StepLogError(CostMeterError):
    """A step log cannot be used. The message names the file, what was expected and what came."""


class DependencyError(CostMeterError):
    """A command needs a package that is not installed. The message names both."""


class VllmMismatchError(CostMeterError):
    """vLLM has a name or signature that the meter does not know."""


class ServerError(CostMeterError):
    """The vLLM server could not be started, ended by itself, or did not answer."""


class UnansweredError(ServerError):
    """Nobody answers at an address."""


class StatusError(ServerError):
    """A server answers that it will not. `status` is that of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class AwayError(CostMeterError):
    """A side process is not there, or does not answer; it is started again by itself."""


class OverdueError(CostMeterError):
    """A question took longer than it may, and was ended."""


LINE_CHARS_MAX = 300


def cause_of_error(error: BaseException) -> BaseException:
    """Return what a database's driver raised, where SQLAlchemy wraps it, or the error itself."""
    cause = getattr(error, "orig", None)
    return cause if isinstance(cause, BaseException) else error


def in_one_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message, at most LINE_CHARS_MAX long."""
    cause = cause_of_error(error)
    lines = str(cause).strip().splitlines()
    name = type(cause).__name__
    return (f"{name}: {lines[0]}" if lines else name)[:LINE_CHARS_MAX]
