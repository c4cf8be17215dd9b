"""A settings file that changes while the server runs: what is taken over, refused, or held back."""

import asyncio
import contextlib
import hashlib
import logging
import os
import sqlite3

import pytest

from tests.component.api_server.test_request_body import SENDS_JSON, part, sending
from tests.support.world import BODY, JSON, Engine, replying, scope_of
from vllm_cost_meter.api_server.middleware import CostMiddleware
from vllm_cost_meter.api_server.runtime import Runtime
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.reading import stamp_of
from vllm_cost_meter.config.reload import Reloader
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.records.owner import Owner

HASHES = {name: hashlib.sha256(f"sk-{name}".encode()).hexdigest() for name in ("a", "b")}


def tenant(name: str, more: str = "") -> str:
    return f'[[tenants]]\nname = "{name}"\napi_key_sha256 = ["{HASHES[name]}"]\n{more}\n'


def key(name: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer sk-{name}".encode()


@pytest.fixture
def file(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("COST_METER_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "meter.toml"
    path.write_text(tenant("a"))
    monkeypatch.setenv("COST_METER_CONFIG", str(path))
    return path


class Lines(logging.Handler):
    """What was logged, one line each."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def lines():
    handler = Lines()
    logger = logging.getLogger("vllm.cost_meter")
    before = logger.level
    logger.setLevel(logging.INFO)  # not `level =`: a logger remembers which levels it lets through
    logger.addHandler(handler)
    yield handler.said
    logger.removeHandler(handler)
    logger.setLevel(before)


def whose(settings, name: str) -> str:
    return settings.resolver.resolve([key(name)]).tenant


def look(reloader: Reloader, settings: Settings) -> Settings | None:
    """Return what a look gives at a file that nobody writes any more."""
    return reloader.look(settings) or reloader.look(settings)


# ---- the file


def test_a_file_that_did_not_change_is_read_once_and_gives_nothing(file, lines):
    reads = []

    def load(**options):
        reads.append(options)
        return load_settings(**options)

    settings, reloader = load_settings(), Reloader(str(file), load)
    assert [look(reloader, settings) for _ in range(3)] == [None, None, None]
    assert reads == [{"config": str(file)}]
    assert lines == []


def test_a_tenant_that_was_added_is_taken_over_with_its_tags(file, lines):
    settings, reloader = load_settings(), Reloader(str(file))
    look(reloader, settings)
    file.write_text(tenant("a") + tenant("b", 'tags = { kind = "cogs" }'))
    new = look(reloader, settings)
    assert (whose(settings, "b"), whose(new, "b"), whose(new, "a")) == ("unknown", "b", "a")
    assert new.resolver.resolve([key("b")]).tags == {"kind": "cogs"}
    assert lines == [f"cost meter: {file}: taken over, changed tenants"]
    assert look(reloader, new) is None


def test_a_change_between_the_start_and_the_first_look_is_not_missed(file):
    settings = load_settings()
    file.write_text(tenant("b"))
    new = look(Reloader(str(file)), settings)
    assert (whose(new, "a"), whose(new, "b")) == ("unknown", "b")


def test_a_change_of_the_same_size_and_time_in_a_file_put_in_its_place_is_seen(file, tmp_path):
    settings, reloader = load_settings(), Reloader(str(file))
    look(reloader, settings)
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    other = tmp_path / "other.toml"
    other.write_text(tenant("b"))
    os.utime(other, ns=times)
    other.replace(file)
    assert whose(look(reloader, settings), "b") == "b"


def test_a_link_that_is_turned_to_another_file_is_seen(file, tmp_path):
    """So Kubernetes changes the files of a ConfigMap."""
    (tmp_path / "one.toml").write_text(tenant("a"))
    (tmp_path / "two.toml").write_text(tenant("b"))
    file.unlink()
    file.symlink_to("one.toml")
    settings, reloader = load_settings(), Reloader(str(file))
    look(reloader, settings)
    (tmp_path / "link").symlink_to("two.toml")
    (tmp_path / "link").replace(file)
    assert whose(look(reloader, settings), "b") == "b"


def test_a_file_that_is_being_written_is_not_read(file, lines):
    """Whoever writes in place empties the file first, and an empty file is a valid one."""
    file.write_text(tenant("a") + tenant("b"))
    settings, reloader = load_settings(), Reloader(str(file))
    look(reloader, settings)
    with file.open("w") as writer:
        assert reloader.look(settings) is None
        writer.write(tenant("a"))
        writer.flush()
        assert reloader.look(settings) is None
        writer.write(tenant("b", 'tags = { kind = "cogs" }'))
    assert reloader.look(settings) is None
    new = reloader.look(settings)
    assert (whose(new, "a"), whose(new, "b")) == ("a", "b")
    assert len(lines) == 1


def test_a_file_that_changes_while_it_is_read_is_read_again(file, lines):
    next_texts = [tenant("b")]

    def load(**options):
        loaded = load_settings(**options)
        if next_texts:
            file.write_text(next_texts.pop())
        return loaded

    settings, reloader = load_settings(), Reloader(str(file), load)
    assert [reloader.look(settings) for _ in range(2)] == [None, None]
    assert whose(reloader.look(settings), "b") == "b"
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[tenants]", "expected the path of a readable TOML file"),
        (tenant("a") * 2, "expected each tenant's name once, got 'a' twice"),
        ('tenant_ruls = "x"', "expected a known key, perhaps tenant_rules"),
    ],
)
def test_a_wrong_file_is_refused_with_one_line_and_the_settings_stay(file, lines, text, said):
    settings, reloader = load_settings(), Reloader(str(file))
    look(reloader, settings)
    file.write_text(text)
    for _ in range(3):
        assert look(reloader, settings) is None
    (line,) = lines
    assert line.startswith("cost meter: the settings stay as they were: ")
    assert str(file) in line
    assert said in line
    file.write_text(tenant("b"))
    assert whose(look(reloader, settings), "b") == "b"


def test_a_file_that_is_gone_is_spoken_of_once_and_taken_over_when_it_is_back(file, lines):
    settings, reloader = load_settings(), Reloader(str(file))
    look(reloader, settings)
    file.unlink()
    assert stamp_of(file) is None
    assert [look(reloader, settings) for _ in range(3)] == [None] * 3
    assert len(lines) == 1
    file.write_text(tenant("b"))
    assert whose(look(reloader, settings), "b") == "b"


def test_what_takes_a_restart_is_named_and_keeps_its_value(file, lines):
    settings, reloader = load_settings(), Reloader(str(file))
    file.write_text(
        'port = 1\nmethod = "equal"\nadmin_token = "s3cret-of-the-operator"\n' + tenant("b")
    )
    new = look(reloader, settings)
    assert (new.port, new.method, new.admin_token) == (9477, "shapley", None)
    assert whose(new, "b") == "b"
    assert lines == [
        f"cost meter: {file}: a restart is needed for admin_token, method, port",
        f"cost meter: {file}: taken over, changed tenants",
    ]
    file.write_text('port = 1\nmethod = "equal"\n' + tenant("b"))
    assert look(reloader, new) is None
    assert lines[2:] == [f"cost meter: {file}: a restart is needed for method, port"]


def test_every_setting_that_is_kept_survives_being_checked_again(file, monkeypatch):
    """Among them those whose form in the file is not the form they are kept in."""
    for name, value in {
        "GPU_HOUR_USD": "1e-7",
        "HOST": "0.0.0.0",
        "ADMIN_TOKEN": "s3cret-of-the-operator",
        "GATEWAY_SECRET": "s3cret-of-the-gateway",
        "PORT": "off",
        "LEDGER": "sqlite:////tmp/x.db",
        "STEP_LOG": "/tmp/steps",
        "SNAPSHOT_INTERVAL_S": "0.5",
    }.items():
        monkeypatch.setenv(f"COST_METER_{name}", value)
    settings = load_settings()
    file.write_text('reply = "none"')
    new = look(Reloader(str(file)), settings)
    kept = Settings.model_fields.keys() - {"reply", "tenants"}
    assert {n: getattr(new, n) for n in kept} == {n: getattr(settings, n) for n in kept}
    assert (new.reply, new.reply_for("a")) == ("none", "none")


def test_what_the_environment_sets_the_file_cannot_change(file, lines, monkeypatch):
    monkeypatch.setenv("COST_METER_REPLY", "headers")
    settings, reloader = load_settings(), Reloader(str(file))
    look(reloader, settings)
    file.write_text('reply = "none"\n' + tenant("a"))
    assert look(reloader, settings) is None
    assert lines == []


BUDGET = '[[budgets]]\nname = "b"\ntenant = "a"\nusd = 1\n'


def test_a_budget_is_taken_over_with_the_tenants_below_its_own(file, monkeypatch):
    monkeypatch.setenv("COST_METER_GPU_HOUR_USD", "1")
    settings, reloader = load_settings(), Reloader(str(file))
    look(reloader, settings)
    file.write_text(tenant("a") + tenant("b", 'parent = "a"') + BUDGET)
    new = look(reloader, settings)
    (budget,) = new.declared_budgets
    assert (budget.tenant, budget.limit) == ("a", 10**9)
    assert budget.covers(Owner("b", parent=new.resolver.declared["b"].parent))


def test_a_budget_that_needs_what_takes_a_restart_waits_for_that(file, lines):
    settings, reloader = load_settings(), Reloader(str(file))
    look(reloader, settings)
    file.write_text("gpu_hour_usd = 1\n" + tenant("b") + BUDGET.replace('"a"', '"b"'))
    for _ in range(2):
        assert look(reloader, settings) is None
    assert lines == [
        f"cost meter: {file}: a restart is needed for gpu_hour_usd",
        f"cost meter: the settings stay as they were: {file} needs a restart as a whole",
    ]


# ---- the server


def test_a_running_server_takes_a_change_over_for_requests_that_come_from_then_on(
    file, tmp_path, monkeypatch
):
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{tmp_path / 'ledger.db'}")
    monkeypatch.setenv("COST_METER_BILL_TIMEOUT_MS", "10000")

    async def live() -> list[tuple[bytes, bytes]]:
        runtime = Runtime(load_settings(), reload_interval_s=0.02)
        engine = Engine(runtime)
        await runtime.start_work(Stub())
        arrived, go_on = asyncio.Event(), asyncio.Event()

        async def app(scope, receive, send):
            if scope["path"] == "/v1/chat/completions":  # runs while the file changes
                engine.born("slow")
                arrived.set()
                await go_on.wait()
                await replying(JSON, [BODY], lambda: engine.billed("slow"))(scope, receive, send)
            else:
                name = f"quick-{engine.seq}"
                await replying(JSON, [BODY], lambda: engine.generate(name))(scope, receive, send)

        async def ask(path: str) -> bytes:
            messages = []

            async def send(message):
                messages.append(message)

            scope = scope_of(path, [key("a"), SENDS_JSON])
            receive = sending(part(b'{"user":"carol"}'))
            await CostMiddleware(app, lambda: runtime)(scope, receive, send)
            return dict(messages[0]["headers"])[b"x-cost-meter-tenant"]

        slow = asyncio.create_task(ask("/v1/chat/completions"))
        await arrived.wait()
        before = runtime.settings
        whole = tmp_path / "whole.toml"  # Put in place whole: no look can find a half.
        whole.write_text(
            '[[tenant_rules]]\nrule = "api_key"\n[[tenant_rules]]\nrule = "user"\n'
            + tenant("a", 'tags = { kind = "new" }')
        )
        whole.replace(file)
        while runtime.settings is before:
            await asyncio.sleep(0.01)
        told = [await ask("/v1/completions")]
        go_on.set()
        told.append(await slow)
        assert runtime.guard.errors == 0
        await runtime.stop()
        return told

    assert asyncio.run(asyncio.wait_for(live(), 20)) == [b"a/carol", b"a"]
    rows = rows_of(tmp_path, "SELECT request_id, tenant, tenant_parent, tags FROM requests")
    assert rows == [("quick-0", "a/carol", "a", '{"kind":"new"}'), ("slow", "a", None, None)]


def test_a_first_budget_holds_without_a_restart(file, tmp_path, monkeypatch):
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{tmp_path / 'ledger.db'}")
    open_database(f"sqlite:///{tmp_path / 'ledger.db'}").dispose()  # another API server made it

    async def live() -> list[str]:
        runtime = Runtime(load_settings(), reload_interval_s=0.02)
        await runtime.start_work(Stub())
        assert runtime.admission is None
        file.write_text(tenant("a") + BUDGET.replace("usd", "gpu_seconds"))
        while not runtime.figures().standings:
            await asyncio.sleep(0.01)
        names = [standing.budget.name for standing in runtime.figures().standings]
        file.write_text(tenant("a"))
        while runtime.figures().standings:
            await asyncio.sleep(0.01)
        assert runtime.guard.errors == 0
        await runtime.stop()
        return names

    assert asyncio.run(asyncio.wait_for(live(), 20)) == ["b"]


def test_an_error_of_the_reloader_is_contained(file, tmp_path, monkeypatch):
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{tmp_path / 'ledger.db'}")
    looks = []

    def look(_self, _settings):
        looks.append(1)
        if len(looks) == 1:
            raise RuntimeError("boom")

    monkeypatch.setattr(Reloader, "look", look)

    async def live() -> None:
        runtime = Runtime(load_settings(), reload_interval_s=0.02)
        await runtime.start_work(Stub())
        while len(looks) < 3:
            await asyncio.sleep(0.01)
        assert (runtime.loops["reload"].failures, runtime.guard.errors) == (1, 0)
        await runtime.stop()

    asyncio.run(asyncio.wait_for(live(), 20))


def test_a_file_that_a_fifo_replaces_stops_neither_metering_nor_the_next_change(
    file, tmp_path, monkeypatch, lines
):
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{tmp_path / 'ledger.db'}")

    async def live() -> None:
        runtime = Runtime(load_settings(), reload_interval_s=0.02)
        await runtime.start_work(Stub())
        reload = runtime.loops["reload"]
        file.unlink()
        os.mkfifo(file)
        while reload.failures < 3:
            await asyncio.sleep(0.01)
        assert runtime.health()["status"] == "failing"
        assert (runtime.guard.errors, whose(runtime.settings, "a")) == (0, "a")
        file.unlink()
        file.write_text(tenant("b"))
        while whose(runtime.settings, "b") != "b":
            await asyncio.sleep(0.01)
        assert not reload.failing
        await runtime.stop()

    asyncio.run(asyncio.wait_for(live(), 20))
    said = [line for line in lines if "`reload`" in line]
    assert len(said) == 2
    assert "it is a FIFO or pipe" in said[0]


class Stub:
    """What the runtime asks of vLLM's engine client in an API server that does not poll."""

    class engine_core:  # noqa: N801
        client_index = 1

    class vllm_config:  # noqa: N801
        class model_config:  # noqa: N801
            served_model_name = "m"

        class parallel_config:  # noqa: N801
            world_size = 1


def rows_of(folder, query: str) -> list:
    assert catch_up(f"sqlite:///{folder / 'ledger.db'}") == 0
    with contextlib.closing(sqlite3.connect(folder / "ledger.db")) as connection:
        return connection.execute(query).fetchall()
