"""A disk of fixed size that a test fills and frees: a tmpfs in a mount namespace of its own.

The namespace lives in a small process that waits for its standard input to end. So the disk goes
with the test, also if that is killed, and nobody else on the machine sees it. Root needs the right
to mount; anybody else gets it in a user namespace, where the kernel allows those.

Invariant: what `fill` wrote is gone after `free`, and nothing else.
"""

import errno
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_BLOCKS_BYTES = (1 << 20, 1 << 12)
NOT_THERE = (
    "tests/ecosystem: expected to mount a tmpfs in a namespace of its own, as root or in a user"
    " namespace, got: "
)


class SmallDisk:
    """The disk, which programs see at its folder if they are started by `inside`."""

    def __init__(self, folder: Path, holder: int, user: pwd.struct_passwd | None) -> None:
        """`holder` is the process whose namespace has it; programs run as `user`."""
        self._holder = holder
        self._user = user
        self._filler = Path(f"/proc/{holder}/root{folder}/filler")

    def inside(self, program: Sequence[str]) -> list[str]:
        """Return the command that runs a program where the disk is."""
        enter = ["nsenter", "--target", str(self._holder), "--mount"]
        if self._user is None:
            return [*enter, "--user", "--preserve-credentials", "--", *program]
        ids = [f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}"]
        return [*enter, "--", "setpriv", *ids, "--clear-groups", *program]

    def fill(self) -> None:
        """Take all the space that is left."""
        with self._filler.open("ab", buffering=0) as file:
            for size in _BLOCKS_BYTES:
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Give the space back."""
        self._filler.unlink()


@contextmanager
def small_disk(folder: Path, size_mib: int, user: pwd.struct_passwd | None) -> Iterator[SmallDisk]:
    """Mount a disk of this size at a folder, for programs that run as `user`; None is this one."""
    owner = pwd.getpwuid(os.getuid()) if user is None else user
    options = f"size={size_mib}m,mode=700,uid={owner.pw_uid},gid={owner.pw_gid}"
    namespaces = (
        ["--mount"] if user is not None else ["--map-current-user", "--keep-caps", "--mount"]
    )
    script = 'mount -t tmpfs -o "$1" tmpfs "$0" && echo mounted && exec cat'
    folder.mkdir()
    with subprocess.Popen(
        ["unshare", *namespaces, "sh", "-c", script, str(folder), options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        is_mounted = holder.stdout.readline().strip() == "mounted"
        assert is_mounted, NOT_THERE + holder.stderr.read()
        try:
            yield SmallDisk(folder, holder.pid, user)
        finally:
            assert holder.stdin is not None
            holder.stdin.close()
    shutil.rmtree(folder)
