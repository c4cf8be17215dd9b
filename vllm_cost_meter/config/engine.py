"""Engine settings: the few values that an engine process needs, read without pydantic.

EngineCore and every worker import this module. The full settings would bring pydantic and fifty of
our modules into them to read these. The operator's process checks the same environment and
file before any engine starts (`plugin.check_settings`).

Where an engine runs, its environment tells and nobody declares: pod, namespace and node. So these
labels are read here alone, in the process whose place they are.

Invariant: the values are those that `load_settings` would return in this process; labels of the
pod come on top.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from vllm_cost_meter.config.reading import read_text
from vllm_cost_meter.errors import SettingError

PREFIX = "COST_METER_"
Method = Literal["shapley", "tokens", "equal"]
METHOD_EXPECTED = "shapley, tokens or equal"
Payer = Literal["victim", "operator"]
PAYER_EXPECTED = "victim or operator"

LABELS_MAX = 16
# A name in Kubernetes has at most so many characters.
_LABEL_CHARS_MAX = 253
LABEL_EXPECTED = f"1 to {_LABEL_CHARS_MAX} printable characters"
LABELS_EXPECTED = (
    f"at most {LABELS_MAX} of NAME=VALUE joined by commas (in a file a table of texts): names of 1"
    f" to 64 small letters, digits, `_` or `-`, values of {LABEL_EXPECTED}"
)
_LABEL_NAME = re.compile(r"[a-z0-9_-]{1,64}")
# Labels by the names under which a pod's container is usually told where it runs.
POD_LABELS: Mapping[str, str] = {
    "POD_NAME": "pod",
    "POD_NAMESPACE": "namespace",
    "NODE_NAME": "node",
}


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a step's time is split, who pays preemptions, the step log's file, the labels."""

    method: Method = "shapley"
    step_log: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    preemption_paid_by: Payer = "victim"


def labels_of(given: object) -> dict[str, str]:
    """Return the labels of a setting, by name. Raises ValueError that says what was wrong."""
    if isinstance(given, str):
        pairs = [pair.partition("=") for pair in given.split(",")]
        if len({name for name, _, _ in pairs}) < len(pairs):
            raise ValueError("a name twice")
        given = {name.strip(): value.strip() for name, _, value in pairs}
    if not isinstance(given, Mapping):
        raise ValueError(f"a {type(given).__name__}")  # noqa: TRY004 - a wrong setting's value
    if len(given) > LABELS_MAX:
        raise ValueError(f"{len(given)} labels")
    for name, value in given.items():
        if not _LABEL_NAME.fullmatch(name):
            raise ValueError(f"the name {name[:_LABEL_CHARS_MAX]!r}")
        if not _is_label(value):
            raise ValueError(f"{str(value)[:_LABEL_CHARS_MAX]!r} at {name!r}")
    return dict(sorted(given.items()))


def with_pod_labels(declared: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the declared labels, and those that the environment tells of the engine's pod.

    A declared label wins. Those of the pod come on top of LABELS_MAX: where an engine runs must not
    depend on how much was declared. Raises SettingError for a name that is no label.
    """
    of_pod = {}
    for variable, label in POD_LABELS.items():
        if label in declared or not (value := environ.get(variable)):
            continue
        if not _is_label(value):
            raise SettingError(variable, LABEL_EXPECTED, value[:_LABEL_CHARS_MAX], "environment")
        of_pod[label] = value
    return dict(sorted({**of_pod, **declared}.items()))


def _is_label(value: object) -> bool:
    is_text = isinstance(value, str) and value.isprintable()
    return is_text and 1 <= len(str(value)) <= _LABEL_CHARS_MAX


def load_engine_settings(environ: Mapping[str, str] = os.environ) -> EngineSettings:
    """Return the engine's settings from this environment and the file that it names.

    Raises SettingError, OSError or ValueError where `load_settings` raises SettingError.
    """
    values: dict[str, Any] = asdict(EngineSettings())
    if path := environ.get(f"{PREFIX}CONFIG"):
        from_file = tomllib.loads(read_text(path))
        values |= {name: from_file[name] for name in values if name in from_file}
    values |= {name: given for name in values if (given := environ.get(PREFIX + name.upper()))}
    if values["method"] not in get_args(Method):
        raise SettingError(f"{PREFIX}METHOD", METHOD_EXPECTED, values["method"])
    if values["preemption_paid_by"] not in get_args(Payer):
        payer = values["preemption_paid_by"]
        raise SettingError(f"{PREFIX}PREEMPTION_PAID_BY", PAYER_EXPECTED, payer)
    try:
        values["labels"] = labels_of(values["labels"])
    except ValueError:
        raise SettingError(f"{PREFIX}LABELS", LABELS_EXPECTED, values["labels"]) from None
    values["labels"] = with_pod_labels(values["labels"], environ)
    return EngineSettings(**values)
