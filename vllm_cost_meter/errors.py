"""The error tree of the cost meter: whose fault it is decides the branch.

    CostMeterError
    ├── SettingError        the operator's: stops the start, one line
    ├── LedgerError         the ledger cannot be opened, read or written
    ├── StepLogError        a step log cannot be written or read, or is none
    ├── DependencyError     a command needs a package that is not installed
    ├── ServerError         a server that the demo or a benchmark runs is not what it should be
    └── VllmMismatchError   this vLLM does not look as the meter expects: it is left untouched

Every message says what was expected, what came, where, and what to do. Errors at run time inside
vLLM's own calls never leave the meter (see `vllm_cost_meter.guard`).
"""


class CostMeterError(Exception):
    """Base class of everything the meter raises on purpose."""


class SettingError(CostMeterError):
    """A setting is wrong: names the key, what was expected and what came."""

    def __init__(self, key: str, expected: str, got: object, where: str = "environment") -> None:
        super().__init__(f"{key} ({where}): expected {expected}, got {got!r}")
        self.key = key


class LedgerError(CostMeterError):
    """The ledger cannot be used: names the ledger, the cause and what to do."""


class StepLogError(CostMeterError):
    """A step log cannot be used: names the file, what was expected, what came and what to do."""


class DependencyError(CostMeterError):
    """A command needs a package that is not installed: names both."""


class VllmMismatchError(CostMeterError):
    """vLLM has a name or signature the meter does not understand."""


class ServerError(CostMeterError):
    """The vLLM server could not be started, ended by itself, or did not answer."""
