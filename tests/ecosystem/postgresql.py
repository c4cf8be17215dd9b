"""A real PostgreSQL server in a folder of its own, reached by a Unix socket, for as long as asked.

Its database sorts text by a human language where the server can, as most databases out there do:
what must compare byte by byte may not rely on the C locale. It runs as an unprivileged user,
because PostgreSQL refuses root.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.ecosystem.small_disk import SmallDisk, small_disk

USER = "meter"
# Names the folder with the programs of another version.
CHOSEN = "POSTGRESQL_PROGRAMS"
# Debian keeps the server's programs out of PATH, a folder for each version.
DEBIAN = Path("/usr/lib/postgresql")
START_TIMEOUT_S = 30
NOT_THERE = (
    "tests/ecosystem: expected the programs of a PostgreSQL server (initdb, postgres, pgbouncer) in"
    f" PATH or below {DEBIAN}, got none: install them, as `apt-get install postgresql pgbouncer`"
)


def program(name: str) -> str:
    """Return the path of one of the server's programs. Fails the tests where there is none."""
    if (folder := os.environ.get(CHOSEN)) and (Path(folder) / name).exists():
        return str(Path(folder) / name)
    newest = sorted(DEBIAN.glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
    # Debian has the pooler where only root looks for programs.
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    found = str(newest[-1]) if newest else shutil.which(name, path=path)
    if found is None:
        pytest.exit(NOT_THERE, returncode=1)
    return found


class Server:
    """A server that is up, unless it was killed or its disk is full."""

    def __init__(
        self, folder: Path, user: pwd.struct_passwd | None, disk: SmallDisk | None = None
    ) -> None:
        self._folder = folder
        self._user = user
        self._databases = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.disk = disk

    @property
    def socket(self) -> Path:
        """The socket on which it listens."""
        return self._folder / ".s.PGSQL.5432"

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone, as after a write-ahead log that had no space."""
        return self._process is None or self._process.poll() is not None

    def make(self) -> None:
        """Make its files."""
        self._run([program("initdb"), *_initdb_options(), "-D", str(self._folder / "data")])

    def start(self) -> None:
        """Start it on its files, and wait until it answers."""
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._folder),
            "fsync": "off",
        }
        command = [program("postgres"), "-D", str(self._folder / "data")]
        command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._inside(command),
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                **self._as_user(),
            )
        self._wait(self._process)

    def stop(self) -> None:
        """Stop it, if it is up."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # the fast shutdown: sessions are ended
            self._process.wait(START_TIMEOUT_S)

    def kill(self) -> None:
        """End all its processes at once."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(START_TIMEOUT_S)

    def _inside(self, command: list[str]) -> list[str]:
        return command if self.disk is None else self.disk.inside(command)

    def _as_user(self) -> dict[str, object]:
        # Only root may enter the namespace of its disk; the user changes there.
        return _as(self._user) if self.disk is None else {}

    def _run(self, command: list[str]) -> None:
        _run(self._inside(command), **self._as_user())

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                psycopg.connect(**_at(self._folder)).close()
                return
            except psycopg.OperationalError:
                if process.poll() is not None or time.monotonic() > until:
                    raise AssertionError((self._folder / "log").read_text()) from None
                time.sleep(0.05)

    @contextmanager
    def pooled(self, url: str, sessions: int) -> Iterator[str]:
        """Give the URL of a database behind PgBouncer, which has so few sessions for all."""
        folder = Path(tempfile.mkdtemp(prefix="cost-meter-pgbouncer-"))
        config = folder / "pgbouncer.ini"
        name = re.search(r"/(\w+)\?", url)
        assert name is not None
        config.write_text(f"""
[databases]
{name[1]} = host={self._folder} user={USER}
[pgbouncer]
unix_socket_dir = {folder}
listen_port = 6432
auth_type = any
pool_mode = transaction
default_pool_size = {sessions}
ignore_startup_parameters = extra_float_digits
""")
        user = _unprivileged()
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        pooler = subprocess.Popen(
            [program("pgbouncer"), str(config)], stderr=subprocess.DEVNULL, cwd="/", **_as(user)
        )
        try:
            yield f"postgresql+psycopg://{USER}@/{name[1]}?host={folder}&port=6432"
        finally:
            pooler.send_signal(signal.SIGINT)
            pooler.wait(START_TIMEOUT_S)
            shutil.rmtree(folder)

    def new_database(self) -> str:
        """Make a database; return the URL of a ledger in it."""
        self._databases += 1
        name = f"ledger{self._databases}"
        with psycopg.connect(**_at(self._folder), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{USER}@/{name}?host={self._folder}"


@contextmanager
def postgresql(disk_mib: int | None = None) -> Iterator[Server]:
    """Serve one in a new folder; with `disk_mib` its files are on a disk of that size."""
    # Not below pytest's folder, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="cost-meter-pg-"))
    user = _unprivileged()
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        disk = None
        if disk_mib is not None:
            disk = stack.enter_context(small_disk(folder / "data", disk_mib, user))
        server = Server(folder, user, disk)
        server.make()
        stack.callback(server.stop)
        server.start()
        yield server


def _at(folder: Path) -> dict[str, str]:
    return {"host": str(folder), "user": USER, "dbname": "postgres"}


def _initdb_options() -> list[str]:
    options = ["--auth=trust", f"--username={USER}", "--encoding=UTF8", "--no-sync"]
    if CHOSEN in os.environ:  # It may be built without ICU.
        return [*options, "--locale=C.UTF-8"]
    version = re.search(r"\d+", _run([program("initdb"), "--version"]))
    assert version is not None
    if int(version[0]) >= 15:
        return [*options, "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US"]
    return [*options, "--locale=C.UTF-8"]


def _unprivileged() -> pwd.struct_passwd | None:
    """Return the user to run as; None for this one, which will do unless it is root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _as(user: pwd.struct_passwd | None) -> dict[str, object]:
    if user is None:
        return {}
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", **options)
    assert done.returncode == 0, done.stderr
    return done.stdout
