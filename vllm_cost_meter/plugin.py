"""vLLM's entry points: decides whether the meter is named, and installs or withholds its hooks.

vLLM loads a general plugin in every process (API servers, engines, workers, short-lived helpers)
and for every `vllm ...` command, and does not catch what it raises. So `register` is cheap, starts
nothing, and is idempotent. The meter works only where `cost_meter` is named, by VLLM_PLUGINS or
by `--plugins`; otherwise it adds its two flags, withholds its stat logger, and touches nothing.

Flags are exported to the environment as soon as they are parsed: API servers and engines are child
processes that see no namespace.

Invariant: not named, or in a vLLM that is not understood, no vLLM class is changed but
`EngineArgs.add_cli_args`.
"""

import argparse
import contextlib
import functools
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from typing import Any

from vllm_cost_meter.activation import NAME, is_active, is_named, is_refused, refuse
from vllm_cost_meter.errors import VllmMismatchError

logger = logging.getLogger("vllm.cost_meter")

# What --middleware names begins so if it is ours.
OWN_MODULES = "vllm_cost_meter."

# Groups that vLLM loads in full while VLLM_PLUGINS is unset. Endpoint plugins are not: those load
# only when named.
GROUPS_LOADED_BY_DEFAULT = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


# Whether a command line of this process named the meter, and its settings are right.
_is_checked = False


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    with _refusing():
        # It needs vLLM's internals and our native part; vLLM does not catch what we raise, and an
        # installation that is broken must not end every `vllm` command.
        from vllm_cost_meter.vllm_hooks import canary, loading

        canary.check(canary.PLUGIN_LOADING)
        loading.hook_stat_logger_loading(is_active, NAME)
        canary.check(canary.COMMAND_LINE)
        loading.hook_cli_flags(add_flags)
    if is_named():
        activate()
    elif not is_refused() and is_serve_parent() and not _given("--plugins", sys.argv):
        # vLLM's logging is not set up yet.
        sys.stderr.write(
            "cost meter: installed but not named, so it does nothing. To measure what requests "
            f"cost: vllm serve ... --plugins {NAME}\n"
        )


def is_serve_parent() -> bool:
    """Tell whether this is the process the operator started with `vllm serve`."""
    return multiprocessing.parent_process() is None and sys.argv[1:2] == ["serve"]


def activate() -> None:
    """Install every hook; in a vLLM that is not understood, none."""
    if is_refused():
        return
    with _refusing():
        from vllm_cost_meter.vllm_hooks import canary, engine_core, output_processor, scheduler

        canary.check_when_named()
        scheduler.hook_scheduler_choice()
        engine_core.hook_engine_core()
        output_processor.hook_output_processor(_runtime)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Contain what the body raises: the meter stays out of this process, and says so once."""
    try:
        yield
    except VllmMismatchError as error:
        refuse()
        from vllm_cost_meter.vllm_hooks.canary import WHAT_TO_DO, vllm_version

        # Every process of a server meets the same vLLM: the one that started them speaks for all.
        is_child = multiprocessing.parent_process() is not None
        logger.log(
            logging.DEBUG if is_child else logging.ERROR,
            "cost meter: vLLM %s is left untouched and runs unmetered: %s. %s",
            *(vllm_version(), " ".join(str(error).split()), WHAT_TO_DO),
        )
    except Exception:
        refuse()
        logger.exception("cost meter: it could not be installed; vLLM goes on unmetered")


def check_settings(*, with_ledger: bool = True) -> None:
    """Stop the start, with one line, if a setting is wrong or the ledger cannot be where it is."""
    try:
        from vllm_cost_meter.api_server.start_check import what_is_wrong

        wrong = what_is_wrong(with_ledger=with_ledger)
    except Exception:
        logger.exception("cost meter: its settings could not be checked; vLLM goes on")
        return
    if wrong is not None:
        raise SystemExit(wrong)


def _anyone_fails_closed() -> bool:
    from vllm_cost_meter.config.loading import load_settings

    return bool(load_settings().failing_closed)


def _runtime() -> Any:
    # The ledger must not be loaded into engine processes, which register but never call this.
    from vllm_cost_meter.api_server.runtime import get_runtime

    return get_runtime()


# -- flags --------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--plugins` and `--cost-meter-config`, unless vLLM has grown its own."""
    group = parser.add_argument_group("Cost meter")
    if "--plugins" not in parser._option_string_actions:
        group.add_argument(
            "--plugins",
            action=NamePlugins,
            metavar="NAME[,NAME]",
            default=None,
            help="Plugins to load, besides those that VLLM_PLUGINS names or, where it is unset, "
            f"those that load by default. {NAME} switches the cost meter on.",
        )
    if "--cost-meter-config" not in parser._option_string_actions:
        group.add_argument(
            "--cost-meter-config",
            action=NameConfig,
            metavar="FILE.toml",
            default=None,
            help="Settings of the cost meter; the environment (COST_METER_*) goes before them.",
        )
    check_after_parsing(parser)


def check_after_parsing(parser: argparse.ArgumentParser) -> None:
    """Have the settings checked once this parser has parsed a command line that names the meter.

    All ways to start a server parse one, in the process that starts all others; `vllm` makes a
    parser for each of its commands, and uses one. Later it parses empty ones, to learn the
    defaults: only the first one counts.
    """
    parse = parser.parse_known_args

    @functools.wraps(parse)
    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        global _is_checked
        parsed = parse(*args, **kwargs)
        namespace = parsed[0]
        middlewares = getattr(namespace, "middleware", None) or ()
        names_us = is_named() or any(str(name).startswith(OWN_MODULES) for name in middlewares)
        if names_us and not _is_checked:
            # A node that only runs engines uses no ledger.
            check_settings(with_ledger=not getattr(namespace, "headless", False))
            _is_checked = True
        return parsed

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


class _Exporting(argparse.Action):
    """Keeps a flag's value and exports it to the environment, for the processes to come."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        self.export(str(values))

    def export(self, value: str) -> None:
        """Export the value, and do what it asks for."""
        raise NotImplementedError


class NamePlugins(_Exporting):
    """Exports `--plugins a,b` as VLLM_PLUGINS, and switches the meter on if it is among them."""

    def export(self, value: str) -> None:
        """Name the plugins."""
        wanted = [name.strip() for name in value.split(",") if name.strip()]
        os.environ["VLLM_PLUGINS"] = ",".join(plugins_to_name(wanted))
        if is_named():
            activate()


class NameConfig(_Exporting):
    """Exports `--cost-meter-config FILE` as COST_METER_CONFIG."""

    def export(self, value: str) -> None:
        """Name the file."""
        os.environ["COST_METER_CONFIG"] = os.path.abspath(value)  # noqa: PTH100 - keeps symlinks


def plugins_to_name(wanted: Sequence[str]) -> list[str]:
    """Return the VLLM_PLUGINS that adds `wanted` and switches nothing else off.

    The variable is an allowlist over all groups, platforms included: where it was unset, every
    plugin that would have loaded must now be named.
    """
    present = os.environ.get("VLLM_PLUGINS")
    if present is not None:
        before = [name for name in present.split(",") if name]
    else:
        before = [
            entry_point.name
            for group in GROUPS_LOADED_BY_DEFAULT
            for entry_point in entry_points(group=group)
            if entry_point.name != NAME
        ]
    return list(dict.fromkeys([*before, *wanted]))


def _given(flag: str, argv: Sequence[str]) -> bool:
    spellings = (flag, flag.replace("-", "_").replace("__", "--", 1))
    return any(
        argument == spelling or argument.startswith(f"{spelling}=")
        for argument in argv
        for spelling in spellings
    )


# -- endpoint plugin ----------------------------------------------------------------------------


class EndpointPlugin:
    """Entry point of `vllm.endpoint_plugins` (vLLM 0.27 and later): adds the middleware.

    The meter starts with the application's lifespan, which both ways of installing the
    middleware share.
    """

    name = NAME
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the middleware, inside vLLM's authentication.

        In a vLLM that is not understood only for tenants that are to fail closed. Here a wrong
        setting stops the start of an API server whose launcher parsed no command line.
        """
        if not is_named():
            return
        check_settings()
        with _refusing():
            if is_active() or _anyone_fails_closed():
                from vllm_cost_meter.api_server.middleware import CostMiddleware

                app.add_middleware(CostMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing to do: see the class."""
