"""Reload the settings file while the server runs.

Once a second the file's stamp is compared. If it differs, and is still the same a second later, the
file is read as at the start. The settings that may change while a server runs (`live`: tenants,
their rules and budgets, prices, what clients are told) take effect together, for requests that come
from then on. A faulty file changes nothing: one line in the log says so, once per change, and the
settings stay as they were. A file that cannot be read, as on a mount that is away, is looked at
again until it can.

A change waits for the second look because a file may be seen half written: a program that opens it
to write empties it first, and an empty file, or the first half of one, can be a valid one in which
tenants are missing.

Invariant: the settings in use were checked as a whole, and come from a file that nobody was
writing. A setting that is not live keeps the value that it had when the server started.
"""

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError

from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.reading import Stamp, stamp_of
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.errors import SettingError, UnreadableError
from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

INTERVAL_S = 1.0


def live_names() -> frozenset[str]:
    """Return the settings that may change while a server runs."""
    fields = Settings.model_fields.items()
    return frozenset(
        name
        for name, field in fields
        if isinstance(extra := field.json_schema_extra, dict) and extra.get("live")
    )


class Reloader:
    """Watches the settings file for one process."""

    def __init__(self, path: str, load: Callable[..., Settings] = load_settings) -> None:
        self._path = path
        self._load = load
        # No file has this stamp, so the file is read once: it may have changed since the start.
        self._seen: Stamp | None = (0, 0, 0)
        self._before: Stamp | None = self._seen

    def look(self, current: Settings) -> Settings | None:
        """Return the settings to use from now on; None if nothing changed. Blocks on the file.

        Each state of the file that two looks find is read and logged once, right or wrong. Raises
        UnreadableError or TimeoutError while the file is there and cannot be read: it is looked at
        again then, as nothing of it need change for that to be over.
        """
        stamp = stamp_of(self._path)
        is_settled, self._before = stamp == self._before, stamp
        if stamp == self._seen or not is_settled:
            return None
        try:
            loaded = self._load(config=self._path)
        except SettingError as error:
            if isinstance(error, UnreadableError) and stamp is not None:
                raise
            if self._mark_seen(stamp):
                logger.error("cost meter: the settings stay as they were: %s", error)
            return None
        return self._taken_over(current, loaded) if self._mark_seen(stamp) else None

    def _mark_seen(self, stamp: Stamp | None) -> bool:
        """Count a state of the file as seen. Returns False if the file changed meanwhile."""
        self._before = stamp_of(self._path)
        if self._before != stamp:
            return False
        self._seen = stamp
        return True

    def _taken_over(self, current: Settings, loaded: Settings) -> Settings | None:
        """Return the current settings with what is live of those that were loaded."""
        values, live = _values(current), live_names()
        changed = {name for name, value in _values(loaded).items() if value != values[name]}
        if held := changed - live:
            logger.warning("cost meter: %s: a restart is needed for %s", self._path, _list(held))
        taken = changed & live
        if not taken:
            return None
        try:
            # Settings are built anew: a copy would keep values derived from the old ones.
            new = Settings(**values | {name: getattr(loaded, name) for name in taken})
        except ValidationError:  # One cause is a first budget in USD together with a first price.
            logger.error(
                "cost meter: the settings stay as they were: %s needs a restart as a whole",
                self._path,
            )
            return None
        new.derive()
        logger.info("cost meter: %s: taken over, changed %s", self._path, _list(taken))
        return new


def _values(settings: Settings) -> dict[str, Any]:
    # `dict(settings)` would also have the derived values.
    return {name: getattr(settings, name) for name in Settings.model_fields}


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
