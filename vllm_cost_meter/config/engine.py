"""Engine settings: the two values that an engine process needs, read without pydantic.

EngineCore and every worker import this module. The full settings would bring pydantic and fifty of
our modules into them to read two values. The operator's process checks the same environment and
file before any engine starts (`plugin.check_settings`).

Invariant: the values are those that `load_settings` would return in this process.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vllm_cost_meter.errors import SettingError

PREFIX = "COST_METER_"
Method = Literal["shapley", "tokens", "equal"]
METHOD_EXPECTED = "shapley, tokens or equal"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The method that splits a step's time, and the file for the step log, if any."""

    method: Method = "shapley"
    step_log: str | None = None


def load_engine_settings(environ: Mapping[str, str] = os.environ) -> EngineSettings:
    """Return the engine's settings from this environment and the file that it names.

    Raises SettingError, OSError or ValueError where `load_settings` raises SettingError.
    """
    values: dict[str, Any] = asdict(EngineSettings())
    if path := environ.get(f"{PREFIX}CONFIG"):
        from_file = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        values |= {name: from_file[name] for name in values if name in from_file}
    values |= {name: given for name in values if (given := environ.get(PREFIX + name.upper()))}
    if values["method"] not in get_args(Method):
        raise SettingError(f"{PREFIX}METHOD", METHOD_EXPECTED, values["method"])
    return EngineSettings(**values)
