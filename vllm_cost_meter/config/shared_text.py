"""Shared settings as text: as a settings file, and as the lines of a change.

Invariant: what `toml_text` returns can be pushed again, and changes nothing then. No line of a
change has the whole digest of a secret.
"""

from collections.abc import Iterator
from typing import Any

import tomlkit

from vllm_cost_meter.config.shared_changes import EntryChange, SharedPlan
from vllm_cost_meter.config.tenant_file import inline_table
from vllm_cost_meter.config.tenants import HASH_CHARS_SHOWN
from vllm_cost_meter.records.shared_settings import SharedSettings

# Their values are digests of secrets: a line has how they begin.
_DIGESTS = ("api_key_sha256", "proof_sha256")
_VALUE_CHARS_MAX = 60


def toml_text(settings: SharedSettings) -> str:
    """Return all entries as a settings file."""
    lines = [f"# The fleet's settings, version {settings.version}"]
    for entry in settings.entries:
        lines += ["", f"[[{entry.section}]]"]
        lines += [f"{key} = {_toml(value)}" for key, value in entry.table.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    item: Any = inline_table(value) if isinstance(value, dict) else tomlkit.item(value)
    text: str = item.as_string()
    return text


def plan_lines(plan: SharedPlan) -> Iterator[str]:
    """Yield what a change does, entry by entry, and what it moves."""
    for change in plan.changes:
        yield f"{change.kind} {change.entry.section} {change.entry.name}{_details(change)}"
    for moved in plan.moves:
        yield f"moves money: {moved.text}"


def _details(change: EntryChange) -> str:
    if change.before is None or change.after is None:
        return ""
    was, becomes = change.before.table, change.after.table
    was["position"], becomes["position"] = change.before.position, change.after.position
    shown = (
        f"{key} {_shown(key, was.get(key))} -> {_shown(key, becomes.get(key))}"
        for key in change.keys
    )
    return f": {', '.join(shown)}"


def _shown(key: str, value: Any) -> str:
    if key in _DIGESTS and value is not None:
        digests = [value] if isinstance(value, str) else value
        return f"[{', '.join(f'{digest[:HASH_CHARS_SHOWN]}...' for digest in digests)}]"
    text = "nothing" if value is None else str(value)
    return text if len(text) <= _VALUE_CHARS_MAX else f"{text[:_VALUE_CHARS_MAX]}..."
