"""Where this user's files are by convention: the meter's folder below the XDG state folder.

Invariant: nothing is made or changed here.
"""

import os
import pwd
from pathlib import Path

OWN_FOLDER = "vllm-cost-meter"


def default_ledger() -> Path:
    """Return the place of this user's ledger, a SQLite file.

    Raises LookupError where the user has no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    # By the XDG rules, programs ignore a relative path.
    home = Path(state) if state.startswith("/") else _home() / ".local" / "state"
    return home / OWN_FOLDER / "ledger.db"


def _home() -> Path:
    home = os.environ.get("HOME", "")
    if home.startswith("/"):
        return Path(home)
    return Path(pwd.getpwuid(os.getuid()).pw_dir)
