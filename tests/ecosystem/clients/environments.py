"""Where the clients of others are installed, and how they are run.

`make test-clients` installs them below `.cache/clients`, apart from our own environment: one
folder for Python, one for Node.

Invariant: no client sees a package of ours.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_CLIENTS = HERE.parents[2] / ".cache" / "clients"
PYTHON = _CLIENTS / "python" / "bin" / "python"
NODE_FOLDER = _CLIENTS / "node"
# LiteLLM asks the internet for a list of prices otherwise.
NO_DOWNLOAD = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
_TIMEOUT_S = 240


def environment() -> dict[str, str]:
    """Return the environment of a client: nothing of ours is found in it."""
    ours = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
    return {name: value for name, value in os.environ.items() if name not in ours} | NO_DOWNLOAD


def ask_in_python(url: str, model: str) -> dict[str, Any]:
    """Return by id what the Python clients were told by a server."""
    return _asked([str(PYTHON), str(HERE / "in_python.py"), url, model], HERE)


def ask_in_node(url: str, model: str) -> dict[str, Any]:
    """Return by id what the JavaScript clients were told by a server."""
    return _asked(["node", str(HERE / "in_node.mjs"), url, model], NODE_FOLDER)


def _asked(command: list[str], folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"id"')]
    return {line.pop("id"): line for line in lines}
