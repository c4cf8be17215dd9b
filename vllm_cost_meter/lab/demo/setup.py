"""Set the demo up: its folder, the tenants' keys, the settings file and vLLM's arguments.

Invariant: an API key is in memory and in no file that `prepare` writes.
"""

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console

from vllm_cost_meter.config.engine import PREFIX
from vllm_cost_meter.config.loading import OTHER_NAMES, load_settings
from vllm_cost_meter.lab.demo.traffic import TENANTS
from vllm_cost_meter.lab.server import CPU_ARGUMENTS, environment_of, is_cpu_build, meter_arguments
from vllm_cost_meter.lab.tiny_model import default_path, make_tiny_model

ASSUMED_GPU_HOUR_USD = "2.50"
SETTINGS = "meter.toml"
# The demo keeps these settings of the user; all others are its own.
KEPT_SETTINGS = OTHER_NAMES | {f"{PREFIX}GPU_HOUR_USD", f"{PREFIX}METHOD"}


@dataclass(frozen=True, slots=True)
class Setup:
    """One run of the demo: the model, the folder, the tenants' keys and vLLM's arguments."""

    # The path or name that vLLM loads, and the name that clients use.
    model: str
    name: str
    folder: Path
    keys: Mapping[str, str]
    environment: Mapping[str, str]
    arguments: Sequence[str]


def prepare(console: Console, model: str | None) -> Setup:
    """Make the folder, the keys, the settings file and, if no model was named, the tiny model."""
    on_cpu = is_cpu_build()
    tiny = default_path()
    arguments = ["--enable-prompt-tokens-details"]
    if model is None:
        if not tiny.exists():
            console.print("making a tiny random model (10 s)")
        make_tiny_model(tiny)
        arguments += ["--served-model-name", tiny.name]
        arguments += CPU_ARGUMENTS if on_cpu else ()
    folder = tiny.parent / "demo" / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S-%f")
    folder.mkdir(parents=True, mode=0o700)
    keys = {tenant: f"sk-demo-{secrets.token_hex(24)}" for tenant in TENANTS}
    config = folder / SETTINGS
    write_private(config, settings_file(keys))
    environment = {
        name: value
        for name, value in environment_of(tiny.parent, offline=model is None).items()
        if not name.upper().startswith(PREFIX) or name.upper() in KEPT_SETTINGS
    }
    environment[f"{PREFIX}LEDGER"] = f"sqlite:///{folder / 'ledger.db'}"
    _say_price(console, environment, on_cpu=on_cpu)
    load_settings(environment, config)  # A wrong setup fails now, and not in half a minute.
    return Setup(
        model=model or str(tiny),
        name=model or tiny.name,
        folder=folder,
        keys=keys,
        environment=environment,
        arguments=[*meter_arguments(config), *arguments],
    )


def _say_price(console: Console, environment: dict[str, str], *, on_cpu: bool) -> None:
    name = f"{PREFIX}GPU_HOUR_USD"
    whose = "as set" if name in environment else f"assumed; set {name} to yours"
    price = environment.setdefault(name, ASSUMED_GPU_HOUR_USD)
    cpu = "; this vLLM runs on the CPU, which counts as one GPU" if on_cpu else ""
    console.print(f"price: {price} USD per GPU-hour ({whose}){cpu}", soft_wrap=True)


def settings_file(keys: Mapping[str, str]) -> str:
    """Return a settings file (TOML) with the tenants and the SHA-256 of their keys."""
    return "\n".join(
        f'[[tenants]]\nname = "{tenant}"\n'
        f'api_key_sha256 = ["{hashlib.sha256(key.encode()).hexdigest()}"]\n'
        for tenant, key in keys.items()
    )


def write_private(path: Path, text: str) -> None:
    """Write a new file that only this user can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
