"""What brings the meter's middleware into vLLM's HTTP application: a plugin, or a flag.

Where vLLM has endpoint plugins (0.26 and later), ours adds the middleware wherever an application
is built. An older vLLM only has the flag `--middleware`, so there `plugin.py` puts the middleware
into the parsed command line, which vLLM hands to each of its API servers. Without the middleware
every bill would be for `unknown`, and nothing would ask the engines for their totals.

Invariant: this asks for features, never for versions, and changes nothing in vLLM.
"""

import argparse
import os
from typing import Any

from vllm_cost_meter.errors import VllmMismatchError
from vllm_cost_meter.vllm_hooks import canary

ENDPOINT_PLUGINS = "load_endpoint_plugins"
FLAG = "--middleware"
EXPECTED = (
    f"expected vllm.plugins.{ENDPOINT_PLUGINS} or the flag {FLAG} of `vllm serve`, which bring the"
    " meter's middleware, found neither"
)
RUST = "VLLM_USE_RUST_FRONTEND"


def has_endpoint_plugins() -> bool:
    """Return whether vLLM lets endpoint plugins add to the application that it builds."""
    return hasattr(canary.find("vllm.plugins", ""), ENDPOINT_PLUGINS)


def serves_http(parsed: argparse.Namespace) -> bool:
    """Return whether a parsed command line starts vLLM's HTTP application in Python.

    `vllm serve`, its old form `python -m`, and render servers do; batches and benchmarks do not. A
    node that only runs engines does not either, nor does the gRPC server.
    """
    is_other = getattr(parsed, "headless", False) or getattr(parsed, "grpc", False)
    return _has_keys(parsed) and not is_other and not _uses_rust()


def serves_http_in_rust(parsed: argparse.Namespace) -> bool:
    """Return whether it starts vLLM's HTTP server in Rust, which runs no Python of ours."""
    return _has_keys(parsed) and not getattr(parsed, "headless", False) and _uses_rust()


def _has_keys(parsed: argparse.Namespace) -> bool:
    # Keys are for clients of the HTTP server, so only its parser has a flag for them.
    return hasattr(parsed, "api_key")


def _uses_rust() -> bool:
    return os.environ.get(RUST, "0").strip() not in ("", "0")


def check_place() -> str:
    """Return what brings the middleware into `vllm serve`, for a message.

    Raises VllmMismatchError if nothing does.
    """
    if has_endpoint_plugins():
        return "an endpoint plugin adds the middleware"
    if FLAG not in _serve_parser()._option_string_actions:
        raise VllmMismatchError(EXPECTED)
    return f"it has no endpoint plugins, so the meter adds its middleware to {FLAG} by itself"


def _serve_parser() -> argparse.ArgumentParser:
    """Return the parser of `vllm serve`, which is built in seconds. Raises VllmMismatchError."""
    commands: Any = canary.find("vllm.entrypoints.cli.serve", "cmd_init")()
    make: Any = canary.find("vllm.utils.argparse_utils", "FlexibleArgumentParser")
    parser: argparse.ArgumentParser = commands[0].subparser_init(make().add_subparsers())
    return parser
