"""Where the journals of a ledger are: beside its file, or in this user's state folder.

A ledger in PostgreSQL has the journals of each machine on that machine, because a journal must be
written where no network is needed.

A second place, for when the first one refuses, is a folder of the settings.

Invariant: every process of this user on this machine finds the same folder for a ledger.
"""

from pathlib import Path

from vllm_cost_meter.journal.places import (
    folder_of_database,
    folder_of_ledger,
    second_folder,
)
from vllm_cost_meter.ledger.database import default_url, parse_url, sqlite_path


def second_journal_folder(url: str, root: str | None) -> Path | None:
    """Return where journals of a ledger go below the second place of the settings; None without."""
    if root is None:
        return None
    parsed = parse_url(url)
    path = sqlite_path(parsed)
    shown = parsed.render_as_string(hide_password=True) if path is None else str(path.resolve())
    return second_folder(Path(root).absolute(), shown)


def journal_folder(url: str) -> Path:
    """Return the folder of a ledger's journals. Raises LedgerError for a URL that is none."""
    parsed = parse_url(url)
    path = sqlite_path(parsed)
    if path is not None:
        return folder_of_ledger(path)
    default = sqlite_path(parse_url(default_url()))
    assert default is not None  # noqa: S101 - the default is a file
    return folder_of_database(parsed.render_as_string(hide_password=True), default.parent)
