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
# The path that is promised to stay.
MIDDLEWARE = f"{OWN_MODULES}middleware.CostMiddleware"

# While VLLM_PLUGINS is unset, vLLM loads every plugin of these groups. Endpoint plugins are not
# among them; they load only when named.
GROUPS_LOADED_BY_DEFAULT = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)

WITHOUT_A_PLACE = (
    "Without it every bill would be for 'unknown': use a vLLM that the meter's README names, or do"
    f" not name {NAME}"
)
WITH_RUST = (
    "requests are not billed: vLLM's Rust frontend (VLLM_USE_RUST_FRONTEND) runs no middleware of"
    " the meter; unset the variable to have them billed"
)

# Whether a command line of this process named the meter, and its settings are right.
_is_checked = False
# Whether a command line of this process did not name it, and that was said.
_is_said_inert = False


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


def check_admin_token(args: Any) -> None:
    """Exit with one line if the admin token is one of the API keys in vLLM's arguments."""
    with contextlib.suppress(CostMeterError):  # Wrong settings are said elsewhere.
        from vllm_cost_meter.api_server.access.start_warnings import shared_admin_token
        from vllm_cost_meter.config.loading import load_settings

        if (wrong := shared_admin_token(args, load_settings())) is not None:
            raise SystemExit(f"cost meter: {wrong}")


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
    act_after_parsing(parser)


def act_after_parsing(parser: argparse.ArgumentParser) -> None:
    """Have the settings checked, and the middleware brought, once this parser has parsed.

    All ways to start a server parse a command line, in the process that starts all others; `vllm`
    makes a parser for each of its commands, and uses one. What it parsed goes to each API server.
    Later vLLM parses empty lines, to learn the defaults: settings are checked at the first one.
    """
    parse = parser.parse_known_args

    @functools.wraps(parse)
    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        global _is_checked
        parsed = parse(*args, **kwargs)
        namespace = parsed[0]
        if (is_named() or has_middleware(namespace)) and not _is_checked:
            # A node that only runs engines uses no ledger.
            check_settings(with_ledger=not getattr(namespace, "headless", False))
            with _refusing():
                check_admin_token(namespace)
                warn_of_rust(namespace)
            _is_checked = True
        if is_named():
            with _refusing():
                bring_middleware(namespace)
        else:
            say_inert(namespace)
        return parsed

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def say_inert(namespace: argparse.Namespace) -> None:
    """Say once, where `vllm serve` parsed a line without plugins, that the meter is not named.

    A configuration file may name it, so this is known only once the line is parsed.
    """
    global _is_said_inert
    names_others = getattr(namespace, "plugins", None) is not None
    if _is_said_inert or names_others or is_refused() or not is_serve_parent():
        return
    _is_said_inert = True
    does = "it does nothing"
    if has_middleware(namespace):
        does = "no engine is measured, and its middleware has nothing to bill"
    # To stderr, as vLLM's log may be switched off.
    sys.stderr.write(
        f"cost meter: installed but not named, so {does}. To measure what requests cost: vllm serve"
        f" ... --plugins {NAME}\n"
    )


def warn_of_rust(namespace: argparse.Namespace) -> None:
    """Log one line if the parsed command line starts an HTTP server that is no Python."""
    from vllm_cost_meter.vllm_hooks import middleware_place

    if is_active() and middleware_place.serves_http_in_rust(namespace):
        logger.warning("cost meter: %s", WITH_RUST)


def has_middleware(namespace: argparse.Namespace) -> bool:
    """Return whether the parsed command line adds a middleware of ours."""
    given = getattr(namespace, "middleware", None) or ()
    return any(str(name).startswith(OWN_MODULES) for name in given)


def bring_middleware(namespace: argparse.Namespace) -> None:
    """Add the middleware to the parsed `--middleware`, where vLLM has no endpoint plugins.

    As by an endpoint plugin, it is added where it meters, or refuses what the settings refuse even
    unmetered. It stands first, and so inside the operator's own middleware, as that plugin's does.
    Exits with one line if vLLM has no such flag.
    """
    from vllm_cost_meter.vllm_hooks import middleware_place

    if not middleware_place.serves_http(namespace) or middleware_place.has_endpoint_plugins():
        return
    if has_middleware(namespace) or not (is_active() or _refuses_unmetered()):
        return
    if not hasattr(namespace, "middleware"):
        raise SystemExit(f"cost meter: {middleware_place.EXPECTED}. {WITHOUT_A_PLACE}")
    # A new list, because without the flag vLLM hands out the parser's own default.
    namespace.middleware = [MIDDLEWARE, *(namespace.middleware or ())]


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


# -- endpoint plugin ----------------------------------------------------------------------------


class EndpointPlugin:
    """Entry point of `vllm.endpoint_plugins` (vLLM 0.26 and later): adds the middleware.

    The middleware itself starts the meter with the application's lifespan. So it works the same
    whether this plugin or `--middleware` installed it. An older vLLM has no such entry points, and
    `bring_middleware` does this there.
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
        check_admin_token(getattr(getattr(app, "state", None), "args", None))
        with _refusing():
            if is_active() or _refuses_unmetered():
                from vllm_cost_meter.api_server.middleware import CostMiddleware

                app.add_middleware(CostMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Do nothing: the middleware starts the meter."""
