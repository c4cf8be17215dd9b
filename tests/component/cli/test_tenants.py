"""`vllm-cost-meter tenants`: what it makes of a settings file, to the byte; what it refuses."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
import tomllib

import pytest
from typer.testing import CliRunner, Result

from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.config import tenant_file
from vllm_cost_meter.config.loading import load_settings

KEYS = {name: f"sk-{name}-secret-of-tests" for name in "abcd"}
HASHES = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}

FILE = f"""\
# The meter of the lab.
gpu_hour_usd = 2.5  # as of May

# the search team
[[tenants]]
name = "search"  # since 2024
api_key_sha256 = [
  "{HASHES["a"]}", # old
  "{HASHES["b"]}",
]
tags = {{ kind = "cogs" }}

# the support team,
# which is new
[[tenants]]
name = "support"
parent = "search"
[tenants.tags]
kind = "r-d"

# how requests find them
[[tenant_rules]]
rule = "api_key"
"""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("COST_METER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "meter.toml"
    path.write_text(FILE)
    return path


def run(*arguments: object, **environment: str) -> Result:
    given = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, ["tenants", *given], env=environment)
    assert not any(key in result.output for key in KEYS.values())
    return result


def done(*arguments: object, **environment: str) -> str:
    result = run(*arguments, **environment)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def refused(*arguments: object, **environment: str) -> str:
    result = run(*arguments, **environment)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("vllm-cost-meter: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# ---- add


def test_a_tenant_is_added_after_the_others_and_every_comment_stays(file):
    said = done(
        *("add", "web", "--config", file, "--parent", "search", "--reply", "none"),
        *("--key-sha256", HASHES["c"], "--tag", "kind=cogs", "--tag", "site=the shop"),
    )
    assert said == f"{file}: added 'web'\n"
    new = f"""
[[tenants]]
name = "web"
api_key_sha256 = ["{HASHES["c"]}"]
parent = "search"
tags = {{kind = "cogs", site = "the shop"}}
reply = "none"
"""
    before, comment, after = FILE.partition("\n# how requests")
    assert file.read_text() == before + new + comment + after


def test_a_tenant_fails_closed_and_no_longer(file):
    done("add", "web", "--config", file, "--fail-closed")
    assert "web" in load_settings({}, file).failing_closed
    done("set", "search", "--config", file, "--fail-closed")
    done("set", "web", "--config", file, "--no-fail-closed")
    closed = load_settings({}, file).failing_closed
    assert "search" in closed
    assert "web" not in closed
    assert "fail_closed = true" in file.read_text()
    rows = [line.split() for line in done("list", "--config", file).splitlines()]
    assert [row[-2] for row in rows if row[0] in ("search", "web")] == ["yes", "-"]


def test_a_key_may_come_from_the_environment_and_only_its_hash_is_written(file):
    done("add", "web", "--config", file, "--key-from-env", "WEB_KEY", WEB_KEY=f"{KEYS['c']}\n")
    assert KEYS["c"] not in file.read_text()
    settings = load_settings({}, file)
    header = (b"authorization", f"Bearer {KEYS['c']}".encode())
    assert settings.resolver.resolve([header]).tenant == "web"


def test_a_short_key_is_taken_with_a_warning_that_does_not_show_it(file):
    given = ("--config", file, "--key-from-env", "WEB_KEY")
    result = run("add", "web", *given, WEB_KEY="fifteen-letters")
    assert result.exit_code == 0
    assert "warning: WEB_KEY: the API key has fewer than 16 characters" in result.stderr
    assert "fifteen-" not in result.output
    assert "warning" not in run("set", "web", *given, WEB_KEY="sixteen-letters!").output


@pytest.mark.parametrize("text", ["", "port = 1", "port = 1\n", "# only this\n", "\n"])
def test_the_first_tenant_is_added_at_the_end(file, text):
    file.write_text(text)
    done("add", "web", "--config", file)
    assert file.read_text().startswith(text)
    assert file.read_text().endswith('[[tenants]]\nname = "web"\n')


def test_any_name_that_may_be_declared_is_written_as_toml_wants_it(file):
    for name in ('a "quoted" name', "münchen", "back\\slash", "search/web", "#x", "[x]"):
        done("add", name, "--config", file)
        assert name in {tenant.name for tenant in load_settings({}, file).tenants}


def test_a_child_is_added_below_its_parent(file):
    done("add", "search/web", "--config", file)
    tenant = load_settings({}, file).tenants[-1]
    assert (tenant.name, tenant.owner) == ("search/web", "search")


# ---- set


def test_what_is_set_changes_in_its_place(file):
    done("set", "search", "--config", file, "--tag", "kind=r-d", "--reply", "headers")
    expected = FILE.replace('kind = "cogs"', 'kind = "r-d"').replace(
        " }\n\n# the support", ' }\nreply = "headers"\n\n# the support'
    )
    assert file.read_text() == expected


def test_an_empty_value_takes_one_away(file):
    done("set", "support", "--config", file, "--parent", "", "--tag", "kind=")
    assert file.read_text() == FILE.replace('parent = "search"\n[tenants.tags]\nkind = "r-d"\n', "")


def test_keys_are_added_and_taken_away_by_their_first_digits(file):
    done(
        *("set", "search", "--config", file, "--key-sha256", HASHES["c"].upper()),
        *("--remove-key", HASHES["a"][:8], "--key-from-env", "KEY"),
        KEY=KEYS["b"],
    )
    assert load_settings({}, file).tenants[0].api_key_sha256 == (HASHES["b"], HASHES["c"])


def test_a_first_tag_and_a_first_key_are_set(file):
    done("add", "web", "--config", file)
    done("set", "web", "--config", file, "--tag", "a=1", "--key-sha256", HASHES["d"])
    tenant = load_settings({}, file).tenants[-1]
    assert (tenant.tags, tenant.api_key_sha256) == ({"a": "1"}, (HASHES["d"],))
    done("set", "web", "--config", file, "--tag", "a=")
    assert "tags" not in tomllib.loads(file.read_text())["tenants"][-1]


# ---- remove


def test_a_tenant_goes_with_its_own_comments_and_no_other(file):
    assert done("remove", "support", "--config", file) == f"{file}: removed 'support'\n"
    start, end = FILE.index("# the support"), FILE.index("# how requests")
    assert file.read_text() == FILE[:start] + FILE[end:]


def test_the_last_tenant_of_all_can_be_removed(file):
    for name in ("support", "search"):
        done("remove", name, "--config", file)
    assert "tenants" not in tomllib.loads(file.read_text())
    assert file.read_text().startswith("# The meter of the lab.\ngpu_hour_usd = 2.5  # as of May\n")


def test_what_was_added_and_removed_leaves_no_trace(file):
    done("add", "web", "--config", file, "--tag", "a=b")
    done("remove", "web", "--config", file)
    assert file.read_text() == FILE


# ---- other ways to write entries


def test_tenants_that_are_written_inline_are_edited_there(file):
    file.write_text('tenants = [\n  {name = "a"},  # A\n  {name = "b", tags = {x = "y"}},\n]\n')
    done("add", "c", "--config", file, "--tag", "k=v")
    done("set", "b", "--config", file, "--tag", "x=z", "--parent", "c")
    done("set", "c", "--config", file, "--key-sha256", HASHES["c"])
    assert "# A" in file.read_text()
    done("remove", "a", "--config", file)
    assert tomllib.loads(file.read_text())["tenants"] == [
        {"name": "b", "tags": {"x": "z"}, "parent": "c"},
        {"name": "c", "tags": {"k": "v"}, "api_key_sha256": [HASHES["c"]]},
    ]


def test_an_empty_list_gets_its_first_tenant(file):
    file.write_text("tenants = []\nport = 1\n")
    done("add", "c", "--config", file, "--tag", "k=v")
    assert tomllib.loads(file.read_text())["tenants"] == [{"name": "c", "tags": {"k": "v"}}]


def test_lines_that_look_like_an_entry_within_a_text_spoil_nothing(file):
    before = f'step_log = """a\n[[tenants]]\nb"""\n{FILE}'
    file.write_text(before)
    assert "edit the file by hand" in refused("remove", "support", "--config", file)
    assert file.read_text() == before


def test_line_ends_of_another_system_stay(file):
    file.write_bytes(FILE.replace("\n", "\r\n").encode())
    done("set", "support", "--config", file, "--reply", "none")
    assert file.read_bytes().count(b"\r\n") >= FILE.count("\n")
    assert load_settings({}, file).tenants[1].reply == "none"


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "search"], "NAME (command line): expected a new tenant, got 'search', which is"),
        (["add", "unknown"], "tenants[2].name"),
        (["add", "x/y"], "expected a slash only in PARENT/CHILD of a declared parent, got 'x/y'"),
        (["add", "x", "--parent", "y"], "expected each parent to be a declared tenant, got 'y'"),
        (["add", "x", "--key-sha256", KEYS["a"]], "got a text of 20 characters"),
        (["add", "x", "--key-sha256", HASHES["a"]], "each api_key_sha256 at one tenant"),
        (["add", "x", "--key-from-env", "NOT_SET"], "NOT_SET (environment): expected an API key"),
        (["add", "x", "--tag", "k"], "--tag (command line): expected KEY=VALUE, got 'k'"),
        (["add", "x", "--tag", "K=v"], "tenants[2].tags"),
        (["add", "x", "--reply", "some"], "expected all, headers or none, got 'some'"),
        (
            ["set", "suport", "--reply", "none"],
            "a declared tenant, perhaps 'support', got 'suport'",
        ),
        (["set", "support"], "expected an option that changes something, got none"),
        (["set", "support", "--parent", "support"], "expected parents without a circle"),
        (["set", "search", "--remove-key", "0" * 8], "got none that begins so"),
        (["set", "search", "--remove-key", "0"], "at least 8 digits"),
        (["remove", "nobody"], "NAME (command line): expected a declared tenant, got 'nobody'"),
        (["remove", "search"], "expected each parent to be a declared tenant, got 'search' of"),
    ],
)
def test_an_edit_that_is_wrong_changes_nothing_and_says_why_in_one_line(file, arguments, message):
    assert message in refused(*arguments, "--config", file)
    assert file.read_text() == FILE
    assert [path.name for path in file.parent.iterdir()] == ["meter.toml"]


def test_a_file_that_is_wrong_is_not_edited(file):
    file.write_text("prot = 1\n" + FILE)
    assert "perhaps port, got" in refused("add", "x", "--config", file)


def test_without_a_file_there_is_nothing_to_edit(tmp_path):
    assert "COST_METER_CONFIG, got neither" in refused("add", "x")
    gone = tmp_path / "gone.toml"
    assert "No such file" in refused("add", "x", "--config", gone)
    assert "No such file" in refused("add", "x", "--config", tmp_path / "no" / "gone.toml")


def test_tenants_of_the_environment_go_before_the_file_so_it_is_not_edited(file):
    said = refused("add", "x", "--config", file, COST_METER_TENANTS="[]")
    assert said.startswith("vllm-cost-meter: COST_METER_TENANTS (environment): expected no tenants")


def test_a_file_that_cannot_be_replaced_is_left_as_it_was(file, monkeypatch):
    def full(_number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused("add", "x", "--config", file)
    assert file.read_text() == FILE
    assert [path.name for path in file.parent.iterdir()] == ["meter.toml"]


# ---- the file


def test_the_file_of_the_environment_is_edited_and_keeps_its_mode(file):
    file.chmod(0o640)
    inode = file.stat().st_ino
    done("add", "web", COST_METER_CONFIG=str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert file.stat().st_ino != inode


def test_a_link_stays_a_link(file, tmp_path):
    link = tmp_path / "link.toml"
    link.symlink_to(file.name)
    done("add", "web", "--config", link)
    assert link.is_symlink()
    assert "web" in file.read_text()


def test_commands_that_come_at_once_wait_for_each_other(file):
    entered, text = threading.Event(), []

    def other():
        with tenant_file.alone(file):
            entered.set()
            time.sleep(0.3)
            text.append(file.read_text())

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    done("add", "web", "--config", file)
    thread.join()
    assert text == [FILE]


# ---- list


def test_the_list_shows_tenants_and_no_key(file):
    lines = done("list", "--config", file).splitlines()
    assert lines[0].split() == ["tenant", "parent", "tags", "reply", "fail", "closed", "keys"]
    assert lines[1].split() == ["search", "-", "kind=cogs", "-", "-", "2"]
    assert lines[2].split() == ["support", "search", "kind=r-d", "-", "-", "0"]
    shown = json.loads(done("list", "--json", COST_METER_CONFIG=str(file)))["tenants"]
    assert shown[0] == {
        "name": "search",
        "parent": None,
        "tags": {"kind": "cogs"},
        "reply": None,
        "fail_closed": False,
        "api_key_sha256": [f"{HASHES[name][:8]}..." for name in "ab"],
    }
    assert HASHES["a"][:9] not in str(shown)


def test_the_list_shows_tenants_of_the_environment_too():
    assert "web" in done("list", COST_METER_TENANTS='[{"name": "web"}]')


def test_the_command_is_there_for_real(file):
    command = [sys.executable, "-m", "vllm_cost_meter.cli", "tenants", "add", "web"]
    environment = {**os.environ, "COST_METER_CONFIG": str(file)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert 'name = "web"' in file.read_text()
