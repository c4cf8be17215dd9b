"""A server's own copy of the settings that its fleet shares: a file beside the ledger.

It is the way from the fleet's database into the processes of a server. The process that sends to
the fleet writes it, each API server watches it as it watches the settings file. So a server can
start while the database is away, and no process but one asks the network.

Invariant: at every instant the file is the old copy or the new one, and only this user can read it.
"""

import contextlib
import os
import re
import tempfile
from pathlib import Path

from vllm_cost_meter.config.fleet import FleetPlace
from vllm_cost_meter.config.reading import READ_WITHIN_S, read_text
from vllm_cost_meter.config.types import Text
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.records.shared_settings import (
    KeptSettings,
    SharedSettings,
    decoded_copy,
    encoded,
)
from vllm_cost_meter.units.places import default_ledger

SUFFIX = ".fleet-settings.json"
KEY = "COST_METER_FLEET_SETTINGS"
_FILE = re.compile(r"sqlite(\+\w+)?:///(?P<path>[^?]+)")


def kept_path(ledger_url: str | None) -> Path:
    """Return where the copy of a server is, by the URL of its ledger; None is the default.

    Raises SettingError for a ledger that is no file, or without a place for the default one.
    """
    if ledger_url is None:
        try:
            ledger = default_ledger()
        except LookupError:
            got = Text("no home folder for its default place")
            raise SettingError("COST_METER_LEDGER", "the URL of a ledger", got) from None
    else:
        found = _FILE.fullmatch(ledger_url)
        if found is None:
            got = Text("another database")
            raise SettingError(KEY, "a SQLite ledger, beside which the copy is kept", got)
        ledger = Path(found["path"]).absolute()
    return ledger.with_name(ledger.name + SUFFIX)


def read_kept(path: Path, within_s: float = READ_WITHIN_S) -> KeptSettings | None:
    """Return the copy in a file; None without one. Raises SettingError for what is no whole copy.

    A file that cannot be read in time is such an error too.
    """
    try:
        return decoded_copy(read_text(path, within_s).encode())
    except FileNotFoundError:
        return None
    except OSError as error:
        got = Text(error.strerror or str(error))
    except ValueError as error:
        got = Text(error)
    raise SettingError(KEY, "a copy of the fleet's settings", got, str(path))


def write_kept(path: Path, kept: KeptSettings) -> None:
    """Put a copy in the place of the one before, in one step. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(number, "wb") as file:
            file.write(encoded(kept))
            file.flush()
            os.fsync(number)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def kept_settings(place: FleetPlace) -> SharedSettings:
    """Return what a server has of the fleet's settings, from its copy. Raises SettingError."""
    path = kept_path(place.ledger)
    kept = read_kept(path)
    if kept is None:
        got = Text("none; a server that starts makes it")
        raise SettingError(KEY, "a copy of the fleet's settings", got, str(path))
    return kept.settings
