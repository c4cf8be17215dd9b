"""vllm_cost_meter measures the cost of every request that a vLLM server runs.

The names below and those of `vllm_cost_meter.economics` are the public Python API. Everything else
is internal. A name is loaded when it is first used, because engine processes import this file too
and need none of the names.

Invariant: importing the package loads nothing but its version.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from vllm_cost_meter.version import __version__

__all__ = [
    "CostMeterError",
    "LedgerReader",
    "PriceBook",
    "__version__",
    "load_settings",
    "open_ledger",
]

if TYPE_CHECKING:
    from vllm_cost_meter.config.loading import load_settings
    from vllm_cost_meter.errors import CostMeterError
    from vllm_cost_meter.ledger.opening import open_ledger
    from vllm_cost_meter.ledger.reader import LedgerReader
    from vllm_cost_meter.prices.book import PriceBook
else:
    # Type checkers must not see `__getattr__`, because it would make every name pass.
    _MODULES = {
        "CostMeterError": "errors",
        "LedgerReader": "ledger.reader",
        "PriceBook": "prices.book",
        "load_settings": "config.loading",
        "open_ledger": "ledger.opening",
    }

    def __getattr__(name):
        """Return a public name, loading its module."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__():
        """Return the public names."""
        return __all__
