"""Reload the settings while the server runs: its file, and what the fleet shares.

Once a second the file's stamp is compared, and that of the copy of the fleet's settings (in a
process without such a copy the version that it has read itself). If one differs, and is still the
same a second later, the files are read as at the start. The settings that may change while a
server runs (`live`: tenants, their rules and budgets, prices, what clients are told) take effect
together, for requests that come from then on. A faulty file changes nothing: one line in the log
says so, once per change, and the settings stay as they were. A file that cannot be read, as on a
mount that is away, is looked at again until it can.

A change waits for the second look because a file may be seen half written: a program that opens it
to write empties it first, and an empty file, or the first half of one, can be a valid one in which
tenants are missing.

Invariant: the settings in use were checked as a whole, and come from a file that nobody was
writing. A setting that is not live keeps the value that it had when the server started.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from pydantic import ValidationError

from vllm_cost_meter.config.kept_copy import kept_path
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


class Seen(NamedTuple):
    """A state of what is watched: the file, None without one, and what the fleet shares."""

    file: Stamp | None
    shared: object


def _nothing() -> object:
    return None


class Reloader:
    """Watches the settings file and the fleet's settings for one process."""

    def __init__(
        self,
        path: str | None,
        load: Callable[..., Settings] = load_settings,
        shared: Callable[[], object] = _nothing,
    ) -> None:
        """`path` is the settings file, None without one.

        `shared` returns what differs between two states of the fleet's settings.
        """
        self._path = path
        self._load = load
        self._shared = shared
        # Nothing is ever in this state, so all is read once: it may have changed since the start.
        self._seen = Seen((0, 0, 0), (0, 0, 0))
        self._before = self._seen

    def look(self, current: Settings) -> Settings | None:
        """Return the settings to use from now on; None if nothing changed. Blocks on the files.

        Each state of the files that two looks find is read and logged once, right or wrong. Raises
        UnreadableError or TimeoutError while the file is there and cannot be read: it is looked at
        again then, as nothing of it need change for that to be over.
        """
        stamp = self._stamp()
        is_settled, self._before = stamp == self._before, stamp
        if stamp == self._seen or not is_settled:
            return None
        try:
            loaded = self._load(config=self._path)
        except SettingError as error:
            if isinstance(error, UnreadableError) and stamp.file is not None:
                raise
            if self._mark_seen(stamp):
                logger.error("cost meter: the settings stay as they were: %s", error)
            return None
        where = self._where(stamp, loaded)
        return self._taken_over(current, loaded, where) if self._mark_seen(stamp) else None

    def _stamp(self) -> Seen:
        return Seen(None if self._path is None else stamp_of(self._path), self._shared())

    def _where(self, stamp: Seen, loaded: Settings) -> str:
        """Return what has changed, for the log."""
        changed = [self._path] if self._path is not None and stamp.file != self._seen.file else []
        if loaded.shared_version is not None and stamp.shared != self._seen.shared:
            changed.append(f"the fleet's settings, version {loaded.shared_version}")
        return " and ".join(changed)

    def _mark_seen(self, stamp: Seen) -> bool:
        """Count a state of the files as seen. Returns False if one changed meanwhile."""
        self._before = self._stamp()
        if self._before != stamp:
            return False
        self._seen = stamp
        return True

    def _taken_over(self, current: Settings, loaded: Settings, where: str) -> Settings | None:
        """Return the current settings with what is live of those that were loaded."""
        values, live = _values(current), live_names()
        changed = {name for name, value in _values(loaded).items() if value != values[name]}
        if held := changed - live:
            logger.warning("cost meter: %s: a restart is needed for %s", where, _list(held))
        if "fleet_settings" in held:  # The sections would come from elsewhere than they did.
            return None
        taken = changed & live
        if not taken and loaded.shared_version == current.shared_version:
            return None
        try:
            # Settings are built anew: a copy would keep values derived from the old ones.
            new = Settings(**values | {name: getattr(loaded, name) for name in taken})
        except ValidationError:  # One cause is a first budget in USD together with a first price.
            logger.error(
                "cost meter: the settings stay as they were: %s needs a restart as a whole", where
            )
            return None
        new.note_shared(loaded.shared_version)
        new.derive()
        if taken:
            logger.info("cost meter: %s: taken over, changed %s", where, _list(taken))
        return new


def reloader_of(settings: Settings, ledger_url: str) -> Reloader | None:
    """Return what watches the settings of a server; None if none of them can change."""
    if settings.fleet_settings:
        kept = kept_path(ledger_url)
        return Reloader(settings.config, shared=lambda: stamp_of(kept))
    return None if settings.config is None else Reloader(settings.config)


def _values(settings: Settings) -> dict[str, Any]:
    # `dict(settings)` would also have the derived values.
    return {name: getattr(settings, name) for name in Settings.model_fields}


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
