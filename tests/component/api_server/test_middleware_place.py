"""Where vLLM has no endpoint plugins, the meter brings its middleware by the command line, once.

vLLM's own loading of endpoint plugins is taken away here, as vLLM 0.25 does not have it. The real
command line of `vllm serve`: tests/integration/test_start.py.
"""

import argparse
import logging
import os

import pytest

from vllm_cost_meter import activation, plugin
from vllm_cost_meter.errors import VllmMismatchError
from vllm_cost_meter.plugin import MIDDLEWARE
from vllm_cost_meter.vllm_hooks import middleware_place

KEY = "sk-of-a-client-and-of-the-operator"


@pytest.fixture(autouse=True)
def named(monkeypatch, tmp_path):
    """Name the meter, in an environment without settings; hooks are for integration tests."""
    for name in list(os.environ):
        if name.startswith(("COST_METER_", "VLLM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_PLUGINS", "cost_meter")
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{tmp_path}/ledger.db")
    monkeypatch.setattr(plugin, "activate", lambda: None)
    monkeypatch.setattr(plugin, "_is_checked", False)
    monkeypatch.setattr(activation, "_refused", False)
    return monkeypatch


@pytest.fixture
def without_plugins(named):
    """Let vLLM have no endpoint plugins."""
    named.delattr("vllm.plugins.load_endpoint_plugins")
    return named


def parser(*, serves: bool = True, takes_middleware: bool = True) -> argparse.ArgumentParser:
    """A parser as vLLM fills it for a command that serves HTTP, or for a batch."""
    command = argparse.ArgumentParser()
    if serves:
        command.add_argument("--api-key", nargs="*")
        command.add_argument("--headless", action="store_true")
        command.add_argument("--grpc", action="store_true")
    if serves and takes_middleware:
        command.add_argument("--middleware", action="append", default=[])
    plugin.add_flags(command)
    return command


def middleware(*arguments: str) -> list[str]:
    return parser().parse_args(arguments).middleware


def test_the_middleware_is_in_what_was_parsed_and_so_in_every_api_server(without_plugins):
    assert middleware() == [MIDDLEWARE]
    module, _, name = MIDDLEWARE.rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name).__name__ == "CostMiddleware"


def test_each_parse_adds_it_once_and_leaves_the_parsers_default_alone(without_plugins):
    command = parser()
    assert command.parse_args([]).middleware == [MIDDLEWARE]
    assert command.parse_args([]).middleware == [MIDDLEWARE]
    assert command.get_default("middleware") == []


def test_a_flag_that_names_the_meter_is_enough_wherever_it_stands(without_plugins):
    without_plugins.delenv("VLLM_PLUGINS")
    assert middleware("--middleware", "a.B", "--plugins", "cost_meter") == [MIDDLEWARE, "a.B"]


def test_it_stands_inside_the_operators_own(without_plugins):
    """vLLM wraps the application in one after another, so the first is the innermost."""
    assert middleware("--middleware", "a.B", "--middleware", "c.D") == [MIDDLEWARE, "a.B", "c.D"]


@pytest.mark.parametrize(
    "ours", [MIDDLEWARE, "vllm_cost_meter.api_server.middleware.CostMiddleware"]
)
def test_one_that_the_operator_gave_by_hand_stays_the_only_one(without_plugins, ours):
    assert middleware("--middleware", "a.B", "--middleware", ours) == ["a.B", ours]


def test_where_vllm_has_endpoint_plugins_the_command_line_stays_as_it_is(named):
    assert middleware() == []
    assert middleware("--middleware", "a.B") == ["a.B"]


@pytest.mark.parametrize("names", [None, "", "other", "cost_meter_tests"])
def test_a_meter_that_is_not_named_adds_nothing(without_plugins, names):
    without_plugins.delenv("VLLM_PLUGINS")
    if names is not None:
        without_plugins.setenv("VLLM_PLUGINS", names)
    assert middleware() == []


def test_where_no_python_serves_http_it_adds_nothing(without_plugins):
    assert middleware("--headless") == []
    assert middleware("--grpc") == []
    assert not hasattr(parser(serves=False).parse_args([]), "middleware")


def test_a_meter_that_does_not_understand_vllm_adds_it_only_to_refuse(without_plugins):
    without_plugins.setattr(activation, "_refused", True)
    assert middleware() == []
    without_plugins.setenv("COST_METER_TENANTS", '[{"name": "strict", "fail_closed": true}]')
    assert middleware() == [MIDDLEWARE]


def test_a_command_line_without_the_flag_stops_the_start_with_one_line(without_plugins):
    with pytest.raises(SystemExit) as caught:
        parser(takes_middleware=False).parse_args([])
    line = str(caught.value)
    assert line.startswith("cost meter: expected vllm.plugins.load_endpoint_plugins or the flag ")
    assert "--middleware" in line
    assert line.endswith("do not name cost_meter")
    assert "\n" not in line


def test_without_the_flag_what_serves_nothing_or_is_not_named_starts(without_plugins):
    assert parser(takes_middleware=False).parse_args(["--headless"]).headless
    assert not hasattr(parser(serves=False).parse_args([]), "api_key")
    without_plugins.delenv("VLLM_PLUGINS")
    assert parser(takes_middleware=False).parse_args([]).api_key is None


def test_a_frontend_in_rust_is_warned_of_once_and_gets_no_flag(without_plugins, caplog):
    """It refuses to start with `--middleware`."""
    without_plugins.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with caplog.at_level(logging.WARNING, "vllm.cost_meter"):
        assert middleware() == []
        assert middleware() == []
        assert not parser(serves=False).parse_args([]).plugins
    [line] = [record.getMessage() for record in caplog.records]
    assert "requests are not billed: vLLM's Rust frontend (VLLM_USE_RUST_FRONTEND)" in line


def test_a_frontend_in_rust_is_nothing_to_a_meter_that_is_not_named(without_plugins, caplog):
    without_plugins.setenv("VLLM_USE_RUST_FRONTEND", "1")
    without_plugins.delenv("VLLM_PLUGINS")
    with caplog.at_level(logging.WARNING, "vllm.cost_meter"):
        assert middleware() == []
    assert not caplog.records


def test_an_admin_token_that_is_a_key_of_the_command_line_stops_it_before_a_model_is_loaded(named):
    named.setenv("COST_METER_ADMIN_TOKEN", KEY)
    with pytest.raises(SystemExit, match="^cost meter: COST_METER_ADMIN_TOKEN: expected a token"):
        parser().parse_args(["--api-key", "other", KEY])
    assert parser().parse_args(["--api-key", "other"]).api_key == ["other"]


def test_the_endpoint_plugin_adds_it_to_an_application_whatever_else_that_has(named):
    class App:
        def __init__(self) -> None:
            self.added: list[str] = []

        def add_middleware(self, middleware: type) -> None:
            self.added.append(middleware.__name__)

    app = App()
    plugin.EndpointPlugin().attach_router(app)
    assert app.added == ["CostMiddleware"]


# ---- not named


@pytest.fixture
def serving(named):
    named.delenv("VLLM_PLUGINS")
    named.setattr("sys.argv", ["vllm", "serve", "model"])
    named.setattr(plugin, "_is_said_inert", False)
    return named


def test_a_server_that_names_no_plugins_says_once_that_the_meter_is_inert(serving, capsys):
    middleware()
    middleware()
    said = capsys.readouterr().err
    assert said.count("cost meter: installed but not named, so it does nothing. ") == 1
    assert said.endswith("vllm serve ... --plugins cost_meter\n")


def test_with_its_middleware_alone_it_says_that_nothing_is_measured(serving, capsys):
    middleware("--middleware", MIDDLEWARE)
    said = capsys.readouterr().err
    assert "installed but not named, so no engine is measured, and its middleware has" in said


@pytest.mark.parametrize("names", ["cost_meter", "other"])
def test_a_server_that_names_plugins_is_told_nothing(serving, capsys, names):
    serving.setenv("VLLM_PLUGINS", "")  # put back by the fixture
    middleware("--plugins", names)
    assert capsys.readouterr().err == ""


# ---- the doctor


def test_the_doctor_says_what_brings_the_middleware(named):
    assert middleware_place.check_place() == "an endpoint plugin adds the middleware"
    named.delattr("vllm.plugins.load_endpoint_plugins")
    said = middleware_place.check_place()
    assert said.endswith("so the meter adds its middleware to --middleware by itself")


def test_the_doctor_fails_where_vllm_has_neither(without_plugins):
    from vllm.entrypoints.cli import serve

    class Bare:
        def subparser_init(self, commands):
            return commands.add_parser("serve")

    without_plugins.setattr(serve, "cmd_init", lambda: [Bare()])
    with pytest.raises(VllmMismatchError, match="or the flag --middleware of `vllm serve`"):
        middleware_place.check_place()
    without_plugins.delattr(serve, "cmd_init")
    with pytest.raises(VllmMismatchError, match="expected vllm.entrypoints.cli.serve.cmd_init"):
        middleware_place.check_place()
