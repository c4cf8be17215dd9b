"""A settings file that blocks whoever opens it holds up nobody for long.

What hangs here is what hangs in a server: a FIFO that nobody writes into, and a mount that is away,
which is played by a thread that does not come back.
"""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from vllm_cost_meter.config import reading
from vllm_cost_meter.config.engine import load_engine_settings
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.reload import Reloader
from vllm_cost_meter.errors import SettingError, UnreadableError


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "meter.toml"
    os.mkfifo(path)
    return path


def why_not(path: Path, within_s: float = reading.READ_WITHIN_S) -> str:
    with pytest.raises(UnreadableError) as caught:
        load_settings({"COST_METER_CONFIG": str(path)}, read_within_s=within_s)
    return str(caught.value)


def test_a_fifo_is_refused_at_once_with_one_line_that_says_what_it_is(fifo):
    assert why_not(fifo) == (
        "COST_METER_CONFIG (environment): expected the path of a readable TOML file,"
        f" got '{fifo}': it is a FIFO or pipe"
    )
    with pytest.raises(OSError, match="it is a FIFO or pipe"):
        load_engine_settings({"COST_METER_CONFIG": str(fifo)})


def test_what_else_is_no_file_is_refused_with_one_line_that_says_what_it_is(tmp_path):
    assert why_not(tmp_path).endswith("it is a folder")
    assert why_not(Path("/dev/tty")).endswith("it is a device")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        assert why_not(tmp_path / "socket").endswith("it is a socket")
    assert why_not(tmp_path / "none").endswith("No such file or directory")


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "file").write_text('reply = "none"')
    (tmp_path / "link").symlink_to("file")
    assert load_settings({"COST_METER_CONFIG": str(tmp_path / "link")}).reply == "none"


class Mount:
    """A mount whose server does not answer: whoever looks at a file on it waits until it does."""

    def __init__(self) -> None:
        self.is_back = threading.Event()
        self.waiting = 0

    def stat(self, path: Path) -> os.stat_result:
        self.waiting += 1
        self.is_back.wait()
        return os.stat(path)  # noqa: PTH116 - the one of Path hangs


@pytest.fixture
def mount(monkeypatch, tmp_path):
    mount = Mount()
    stat = Path.stat

    def hanging(path: Path, **options) -> os.stat_result:
        return mount.stat(path) if path.name == "away.toml" else stat(path, **options)

    monkeypatch.setattr(Path, "stat", hanging)
    (tmp_path / "away.toml").write_text('reply = "none"')
    yield mount
    mount.is_back.set()


def test_a_mount_that_is_away_is_given_up_and_costs_one_thread_however_often_it_is_asked(
    mount, tmp_path
):
    path = tmp_path / "away.toml"
    for _ in range(5):
        with pytest.raises(TimeoutError, match=r"within 0.05 s; is it on a mount that is away\?"):
            reading.stamp_of(path, within_s=0.05)
        with pytest.raises(TimeoutError):
            reading.read_text(path, within_s=0.05)
    assert mount.waiting == 1
    mount.is_back.set()
    deadline = time.monotonic() + 5
    while not reading._given_up[path].done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reading.read_text(path, within_s=5) == 'reply = "none"'
    assert reading.stamp_of(path, within_s=5) is not None


def test_a_start_on_a_mount_that_is_away_ends_with_one_line(mount, tmp_path):
    line = why_not(tmp_path / "away.toml", within_s=0.05)
    assert line.endswith("it could not be read within 0.05 s; is it on a mount that is away?")
    assert "\n" not in line


def test_a_file_that_cannot_be_read_for_a_while_is_read_when_it_can_though_it_did_not_change(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("COST_METER_CONFIG", str(tmp_path / "meter.toml"))
    path = tmp_path / "meter.toml"
    path.write_text('reply = "all"')
    settings, reloader = load_settings(), Reloader(str(path))
    path.write_text('reply = "none"')
    assert reloader.look(settings) is None  # It may be half written.
    before = path.stat()

    def unreadable(*_arguments: object) -> int:  # root may read everything
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as away:
        away.setattr(os, "open", unreadable)
        for _ in range(3):
            with pytest.raises(UnreadableError, match="Permission denied"):
                reloader.look(settings)
    assert path.stat() == before
    assert reloader.look(settings).reply == "none"


def test_a_file_that_a_fifo_replaced_leaves_the_settings_and_is_read_again_afterwards(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("COST_METER_CONFIG", str(tmp_path / "meter.toml"))
    path = tmp_path / "meter.toml"
    path.write_text('reply = "all"')
    settings, reloader = load_settings(), Reloader(str(path))
    path.unlink()
    os.mkfifo(path)
    assert reloader.look(settings) is None  # It may be half written.
    threads = threading.active_count()
    for _ in range(20):
        with pytest.raises(SettingError, match="FIFO"):
            reloader.look(settings)
    assert threading.active_count() <= threads
    path.unlink()
    path.write_text('reply = "none"')
    assert reloader.look(settings) is None
    assert reloader.look(settings).reply == "none"
