"""A wrong setting stops the start with one line, whoever runs the server and wherever its home is.

Processes of their own run here, as what they are asked for is the end of a process, an environment
that is empty, and a user that nobody has entered. Real servers: tests/integration/test_start.py.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest

from vllm_cost_meter import activation, plugin
from vllm_cost_meter.api_server import start_check
from vllm_cost_meter.api_server.start_check import what_is_wrong
from vllm_cost_meter.ledger import database

# In the password file of no machine.
NOBODY_AT_ALL = 4_242_424
PLACE = "set COST_METER_LEDGER to a place that this user can write, such as"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Leave nothing of the meter in the environment but a state folder, and put vLLM's back."""
    for name in list(os.environ):
        if name.startswith(("COST_METER_", "VLLM_PLUGINS")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


# ---- what is wrong


def test_right_settings_and_a_ledger_that_can_be_written_are_no_problem(tmp_path):
    assert what_is_wrong() is None
    assert (tmp_path / "state" / "vllm-cost-meter").is_dir()


def test_a_wrong_setting_is_one_line(monkeypatch):
    monkeypatch.setenv("COST_METER_GPU_HOUR_USD", "cheap")
    assert what_is_wrong() == what_is_wrong(with_ledger=False)
    assert what_is_wrong().startswith("cost meter: COST_METER_GPU_HOUR_USD (environment): expected")


def test_a_ledger_that_cannot_be_where_it_is_said_to_be_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{tmp_path}/file/ledger.db")
    said = what_is_wrong()
    assert f"the folder {tmp_path}/file cannot be created: {tmp_path}/file is a file;" in said
    assert what_is_wrong(with_ledger=False) is None
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{tmp_path}/fifo")
    assert f"expected a file, got a FIFO or a device; {PLACE}" in what_is_wrong()


def test_a_place_that_hangs_is_given_up_with_one_line(monkeypatch):
    with monkeypatch.context() as away:
        mkdir = Path.mkdir
        waiting: list[Path] = []
        is_back = threading.Event()

        def hanging(path: Path, *args: object, **options: object) -> None:
            waiting.append(path)
            is_back.wait()
            mkdir(path, *args, **options)

        away.setattr(Path, "mkdir", hanging)
        assert what_is_wrong(within_s=0.1) == (
            "cost meter: the ledger's place could not be looked at within 0.1 s; is it on a mount"
            " that is away? Set COST_METER_LEDGER to a local path or to PostgreSQL"
        )
        assert len(waiting) == 1
        is_back.set()


# ---- the command line


def parser() -> argparse.ArgumentParser:
    """A parser as vLLM fills it: with commands, of which some start engines."""
    root = argparse.ArgumentParser()
    commands = root.add_subparsers(dest="command")
    for name in ("serve", "bench"):
        command = commands.add_parser(name)
        command.add_argument("--headless", action="store_true")
        command.add_argument("--middleware", action="append")
        plugin.add_flags(command)
    commands.add_parser("chat")
    return root


@pytest.fixture
def naming(monkeypatch):
    """Have flags export to an environment that is put back; hooks are for integration tests."""
    monkeypatch.setenv("VLLM_PLUGINS", "cost_meter")
    monkeypatch.setattr(plugin, "activate", lambda: None)
    monkeypatch.setattr(plugin, "_is_checked", False)
    return monkeypatch


@pytest.mark.parametrize(
    "arguments", [["serve"], ["bench"], ["serve", "--headless"], ["serve", "--plugins", "x"]]
)
def test_a_command_that_starts_engines_ends_at_a_wrong_setting(naming, arguments):
    naming.setenv("COST_METER_PORT", "none")
    with pytest.raises(SystemExit, match="^cost meter: COST_METER_PORT "):
        parser().parse_args(arguments)


def test_a_command_that_starts_none_does_not(naming):
    naming.setenv("COST_METER_PORT", "none")
    assert parser().parse_args(["chat"]).command == "chat"


def test_a_meter_that_is_not_named_stops_nothing(naming):
    naming.setenv("COST_METER_PORT", "none")
    naming.delenv("VLLM_PLUGINS")
    assert parser().parse_args(["serve"]).command == "serve"
    naming.setenv("VLLM_PLUGINS", "other")
    assert parser().parse_args(["serve"]).command == "serve"
    other = ["serve", "--middleware", "of.somebody.Else"]
    assert parser().parse_args(other).command == "serve"


def test_the_middleware_names_the_meter_too(naming):
    naming.setenv("COST_METER_PORT", "none")
    naming.delenv("VLLM_PLUGINS")
    ours = ["serve", "--middleware", "vllm_cost_meter.middleware.CostMiddleware"]
    with pytest.raises(SystemExit, match="COST_METER_PORT"):
        parser().parse_args(ours)


def test_flags_are_checked_together_in_any_order(naming, tmp_path):
    naming.delenv("VLLM_PLUGINS")
    naming.setenv("COST_METER_CONFIG", "")  # put back by the fixture
    wrong, right = tmp_path / "wrong.toml", tmp_path / "right.toml"
    wrong.write_text("port = -1")
    right.write_text("port = 1")
    for flags in (["--plugins", "cost_meter", "--cost-meter-config"], ["--cost-meter-config"]):
        after = [] if "--plugins" in flags else ["--plugins", "cost_meter"]
        naming.setattr(plugin, "_is_checked", False)
        assert parser().parse_args(["serve", *flags, str(right), *after]).command == "serve"
        naming.setattr(plugin, "_is_checked", False)
        with pytest.raises(SystemExit, match=r"port \(.*wrong.toml\): expected"):
            parser().parse_args(["serve", *flags, str(wrong), *after])


def test_a_node_that_only_runs_engines_needs_no_place_for_a_ledger(naming, tmp_path):
    (tmp_path / "file").touch()
    naming.setenv("COST_METER_LEDGER", f"sqlite:///{tmp_path}/file/ledger.db")
    assert parser().parse_args(["serve", "--headless"]).headless
    # vLLM looks at the defaults of a parser later, where nothing is headless.
    assert not parser().parse_args(["serve"]).headless
    naming.setattr(plugin, "_is_checked", False)
    with pytest.raises(SystemExit, match="cannot be created"):
        parser().parse_args(["serve"])


@pytest.mark.parametrize("module", ["start_check", "access.start_warnings"])
def test_a_check_that_is_itself_broken_stops_nothing(naming, caplog, module):
    """As where a package of ours is missing."""
    naming.setattr(activation, "_refused", False)  # put back by the fixture
    naming.setitem(sys.modules, f"vllm_cost_meter.api_server.{module}", None)
    assert parser().parse_args(["serve"]).command == "serve"


def test_an_api_server_whose_launcher_parsed_no_command_line_is_stopped_too(naming):
    class App:
        added: list[object] = []

        def add_middleware(self, middleware: object) -> None:
            self.added.append(middleware)

    naming.setenv("COST_METER_PORT", "none")
    with pytest.raises(SystemExit, match="^cost meter: COST_METER_PORT "):
        plugin.EndpointPlugin().attach_router(App())
    naming.setenv("VLLM_PLUGINS", "other")
    plugin.EndpointPlugin().attach_router(App())
    assert App.added == []


# ---- whose home it is


def checked(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process with this environment only, the check's modules loaded."""
    head = """
        import os, pwd, sys
        from vllm_cost_meter import activation, plugin
        from vllm_cost_meter.api_server import start_check
        # What Python imports late, a user who is nobody may not be able to read.
        "x".encode().decode("unicode_escape")
    """
    text = textwrap.dedent(head) + textwrap.dedent(code)
    root = str(Path(plugin.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", text],
        env={"PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# Where the tests run as root it really becomes that user; elsewhere the password file forgets it.
BECOME_NOBODY = f"""
if os.geteuid() == 0:
    os.setgid({NOBODY_AT_ALL})
    os.setuid({NOBODY_AT_ALL})
else:
    def getpwuid(uid):
        raise KeyError(uid)
    pwd.getpwuid = getpwuid
"""


def the_line(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    (line,) = ended.stderr.splitlines()
    return line


def test_a_user_without_home_and_without_entry_gets_one_line_that_says_which_setting_to_give():
    ended = checked(BECOME_NOBODY + "plugin.check_settings()")
    line = the_line(ended)
    assert line.startswith(
        "cost meter: ledger: expected a home folder for its default place, got no HOME and no entry"
        " for user id "
    )
    assert line.endswith(f"in the password file; {database.SET_LEDGER}")


@pytest.mark.parametrize("home", ["", "relative", "~"])
def test_a_home_that_is_no_path_is_none(home):
    ended = checked(BECOME_NOBODY + "plugin.check_settings()", HOME=home)
    assert "got no HOME and no entry" in the_line(ended)


def test_without_home_the_password_file_says_where_it_is():
    ended = checked("from vllm_cost_meter.ledger.database import default_url; print(default_url())")
    home = subprocess.run(
        [sys.executable, "-c", "import os, pwd; print(pwd.getpwuid(os.getuid()).pw_dir)"],
        env={},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert ended.stdout.strip() == f"sqlite:///{home}/.local/state/vllm-cost-meter/ledger.db"


def test_a_home_that_cannot_be_written_gets_one_line_that_says_which_setting_to_give(tmp_path):
    # /proc takes no folder, whoever asks.
    ended = checked("plugin.check_settings()", HOME="/proc")
    line = the_line(ended)
    assert line.startswith(
        "cost meter: ledger /proc/.local/state/vllm-cost-meter/ledger.db: the folder"
        " /proc/.local/state/vllm-cost-meter cannot be created: "
    )
    assert line.endswith(database.SET_LEDGER)


def test_a_folder_that_one_may_not_enter_gets_one_line():
    # Not tmp_path: only root may even look into that where the tests run as root.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = Path(name) / ".local/state/vllm-cost-meter"
        folder.mkdir(parents=True)
        folder.chmod(0)
        ended = checked(BECOME_NOBODY + "plugin.check_settings()", HOME=name)
        folder.chmod(0o700)
    said = f"cost meter: ledger {folder}/ledger.db: cannot write in the folder {folder}; {PLACE}"
    assert the_line(ended).startswith(said)


def test_a_ledger_that_is_given_needs_no_home(tmp_path):
    tmp_path.chmod(0o777)
    code = """
        assert start_check.what_is_wrong() is None, start_check.what_is_wrong()
    """
    ended = checked(code, COST_METER_LEDGER=f"sqlite:///{tmp_path}/state/ledger.db")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_command_line_of_the_meter_says_the_same_without_a_traceback():
    code = BECOME_NOBODY + "from vllm_cost_meter.cli.commands import app; app(['report'])"
    ended = checked("from vllm_cost_meter.cli import report\n" + code)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "vllm-cost-meter: ledger: expected a home folder" in ended.stderr
    assert database.SET_LEDGER in ended.stderr


# ---- an application of which only the middleware is ours

SERVE = """
import fastapi, uvicorn
from vllm_cost_meter.middleware import CostMiddleware
app = fastapi.FastAPI()
app.add_middleware(CostMiddleware)
uvicorn.run(app, port=0)
"""


def test_an_application_with_the_middleware_does_not_start_with_wrong_settings(tmp_path):
    ended = checked(SERVE, COST_METER_REPLY="loud", HOME=str(tmp_path))
    assert ended.returncode == 3, "uvicorn's status of a start that failed"
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if "COST_METER_REPLY" in line]
    assert "cost meter: COST_METER_REPLY (environment): expected" in lines[-1]


def test_nor_where_its_ledger_has_no_place():
    ended = checked(SERVE, HOME="/proc")
    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr
    assert database.SET_LEDGER in ended.stderr


def test_the_bound_of_the_check_is_longer_than_that_of_a_file():
    """So that a file that hangs is what is spoken of."""
    from vllm_cost_meter.config import reading

    assert start_check.CHECK_WITHIN_S > reading.READ_WITHIN_S
