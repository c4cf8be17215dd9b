"""Entry points for vLLM's plugin system: install the meter's hooks if the operator named it.

vLLM loads a general plugin in every process (API servers, engines, workers, short-lived helpers)
and for every `vllm ...` command, and it does not catch the plugin's errors. So `register` is cheap,
starts nothing, and may be called twice. The meter works only if VLLM_PLUGINS or `--plugins` names
`cost_meter`. Otherwise it adds its two flags, withholds its stat logger, and touches nothing else.

Flags are exported to the environment as soon as they are parsed, because API servers and engines
are child processes that do not see the parsed arguments.

Invariant: if the meter is not named, or does not understand this vLLM, it changes no vLLM class
but `EngineArgs.add_cli_args`.
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
from vllm_cost_meter.errors import CostMeterError, VllmMismatchError
from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

# The meter's own modules, as `--middleware` names them, begin with this.
OWN_MODULES = "vllm_cost_meter."

# While VLLM_PLUGINS is unset, vLLM loads every plugin of these groups. Endpoint plugins are not
# among them; they load only when named.
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
        # These imports need vLLM's internals and our native module. vLLM does not catch our errors,
        # and a broken installation must not end every `vllm` command.
        from vllm_cost_meter.vllm_hooks import canary, loading

        canary.check(canary.PLUGIN_LOADING)
        loading.hook_stat_logger_loading(is_active, NAME)
        canary.check(canary.COMMAND_LINE)
        loading.hook_cli_flags(add_flags)
    if is_named():
        activate()
    elif not is_refused() and is_serve_parent() and not _given("--plugins", sys.argv):
        # We write to stderr because vLLM's logging is not set up yet.
        sys.stderr.write(
            "cost meter: installed but not named, so it does nothing. To measure what requests "
            f"cost: vllm serve ... --plugins {NAME}\n"
        )


def is_serve_parent() -> bool:
    """Return whether this is the process that the operator started with `vllm serve`."""
    return multiprocessing.parent_process() is None and sys.argv[1:2] == ["serve"]


def activate() -> None:
    """Install every hook, or none if the meter does not understand this vLLM."""
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
    """Contain errors of the body: the meter stays out of this process and logs one line."""
    try:
        yield
    except VllmMismatchError as error:
        refuse()
        from vllm_cost_meter.vllm_hooks.canary import WHAT_TO_DO, vllm_version

        # Every process of a server has the same vLLM, so only the parent logs an error.
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
    """Exit with one line if a setting is wrong or the ledger's location is not usable."""
    try:
        from vllm_cost_meter.api_server.start_check import what_is_wrong

        wrong = what_is_wrong(with_ledger=with_ledger)
    except Exception:
        logger.exception("cost meter: its settings could not be checked; vLLM goes on")
        return
    if wrong is not None:
        raise SystemExit(wrong)


def _refuses_unmetered() -> bool:
    from vllm_cost_meter.config.loading import load_settings

    return load_settings().refuses_unmetered


def check_admin_token(app: Any) -> None:
    """Exit with one line if the admin token is one of the API keys that vLLM was started with."""
    with contextlib.suppress(CostMeterError):  # Wrong settings are said elsewhere.
        from vllm_cost_meter.api_server.access.start_warnings import vllm_keys
        from vllm_cost_meter.config.loading import load_settings
        from vllm_cost_meter.tenants.rules import sha256_of

        admin = load_settings().admin_sha256()
        if admin is not None and admin in {sha256_of(key.encode()) for key in vllm_keys(app)}:
            raise SystemExit(
                "cost meter: COST_METER_ADMIN_TOKEN: expected a token other than vLLM's API keys,"
                " got one of them, so that every client could read all tenants' figures"
            )


def _runtime() -> Any:
    # Imported here because engine processes must not load the ledger. They never call this.
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
    """A flag that also exports its value to the environment, so that child processes see it."""

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
        """Export the value and act on it."""
        raise NotImplementedError


class NamePlugins(_Exporting):
    """`--plugins a,b`: exports VLLM_PLUGINS, and switches the meter on if it is named."""

    def export(self, value: str) -> None:
        """Add the plugins to VLLM_PLUGINS."""
        wanted = [name.strip() for name in value.split(",") if name.strip()]
        os.environ["VLLM_PLUGINS"] = ",".join(plugins_to_name(wanted))
        if is_named():
            activate()


class NameConfig(_Exporting):
    """`--cost-meter-config FILE`: exports COST_METER_CONFIG."""

    def export(self, value: str) -> None:
        """Set COST_METER_CONFIG to the absolute path."""
        os.environ["COST_METER_CONFIG"] = os.path.abspath(value)  # noqa: PTH100 - keeps symlinks


def plugins_to_name(wanted: Sequence[str]) -> list[str]:
    """Return a VLLM_PLUGINS value that adds `wanted` and switches no other plugin off.

    The variable is an allowlist over all groups, platforms included. If it was unset, every plugin
    that would have loaded must now be named.
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

    The middleware itself starts the meter with the application's lifespan. So it works the same
    whether this plugin or `--middleware` installed it.
    """

    name = NAME
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the middleware, inside vLLM's authentication.

        If the meter does not understand this vLLM, the middleware is added only to refuse requests
        that the settings refuse even then. A wrong setting stops the start here if the launcher of
        this API server parsed no command line.
        """
        if not is_named():
            return
        check_settings()
        check_admin_token(app)
        with _refusing():
            if is_active() or _refuses_unmetered():
                from vllm_cost_meter.api_server.middleware import CostMiddleware

                app.add_middleware(CostMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Do nothing: the middleware starts the meter."""
