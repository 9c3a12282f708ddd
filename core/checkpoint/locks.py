"""One process at a time: a lock file that says who holds it, and that nobody holds who has died.

The lock is the kernel's (`flock`), so it ends with the process, however that ends. The file tells others who it is:
host, process and since when. On file systems without locks the file alone decides; a holder on the same machine that
has died does not count then either.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from core.errors import VitrineError

# What flock answers on a file system that has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Locked(VitrineError):
    """Somebody else holds the lock; `holder` tells who, where that is known."""

    def __init__(self, message: str, holder: Holder | None = None) -> None:
        super().__init__(message)
        self.holder = holder

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.holder)


@dataclass(frozen=True)
class Holder:
    """A process among all processes of all machines.

    Attributes:
        host: name of the machine.
        pid: number of the process on it.
        began: when the process began, in the kernel's ticks since `boot`: numbers of processes are used again.
        boot: identifies the machine's run since it was started, and the space of process numbers.
        since: local time at which the lock was taken.
    """

    host: str
    pid: int
    began: int | None
    boot: str
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        """The calling process, now."""
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), _began(os.getpid()), _boot(), now)

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """What a lock file says; None where it says nothing that can be read."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def elsewhere(self) -> bool:
        """Whether it is a process of another machine, or one that this process cannot see."""
        return (self.host, self.boot) != (socket.gethostname(), _boot())

    def before_restart(self) -> bool:
        """Whether this machine was started again since."""
        return self.host == socket.gethostname() and self.boot.partition(" ")[0] != _boot().partition(" ")[0]

    def is_dead(self) -> bool:
        """Whether the process is known to have ended; False where that cannot be seen from here."""
        if self.elsewhere():
            return False
        began = _began(self.pid)
        return began is None or (self.began is not None and began != self.began)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


def _boot() -> str:
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None if there is none, 0 where that cannot be told."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return 0
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if status[0] in "ZX" else int(status[19])  # behind the name: state is field 3, starttime field 22


class FileLock:
    """A lock of one process, or of one piece of work in it; ``with lock:`` takes and releases it.

    Processes that are forked meanwhile do not hold it. On a file system without locks, a holder on another machine
    counts until its file is removed.

    Args:
        path: the lock file; it exists while the lock is held.
        what: what is locked, for messages.
    """

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self.path, self.what = Path(path), what
        self._descriptor: int | None = None
        self._file: Path | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            Locked: somebody has it.
            OSError: the file cannot be written.
        """
        while not self.held:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in _NO_LOCKS:
                    self._acquire_by_name(self.path.with_name(f"{self.path.name}.pid"))
                elif isinstance(error, BlockingIOError):
                    self._refuse_unless_dead(self.path)  # a child of a dead one may keep its file open
                else:
                    raise
                continue
            if _is_open_as(descriptor, self.path):
                self._hold(descriptor, self.path)
            else:  # the one who had it has removed it since we opened it
                os.close(descriptor)

    def wait(self, tell: Callable[[str], None], every: float = 0.2, again: float = 60.0) -> None:
        """Takes the lock as soon as it is free.

        Args:
            tell: gets a line that names the holder when waiting begins, with every new holder and from time to time.
            every: seconds between two attempts.
            again: seconds after which the same line comes again.

        Raises:
            Locked: this very process holds it, so that waiting would not end.
        """
        told, when = None, 0.0
        while True:
            try:
                return self.acquire()
            except Locked as locked:
                if locked.holder is not None and locked.holder.pid == os.getpid() and not locked.holder.elsewhere():
                    raise
                if told != locked.holder or time.monotonic() - when >= again:
                    told, when = locked.holder, time.monotonic()
                    tell(f"waiting for {locked.holder or 'another process'}: {self.what}")
            time.sleep(every)

    def release(self) -> None:
        """Gives the lock back and removes its file."""
        if self._descriptor is None:
            return
        if _is_open_as(self._descriptor, self._file):
            with contextlib.suppress(OSError):
                os.unlink(self._file)
        self._forget()

    def _acquire_by_name(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            self._refuse_unless_dead(path)
            return
        self._hold(descriptor, path)

    def _hold(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._file = descriptor, path
        _HELD.add(self)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(Holder.this_process())).encode(), 0)
        except OSError:
            self.release()
            raise

    def _forget(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        _HELD.discard(self)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _refuse_unless_dead(self, path: Path) -> None:
        """Removes the file of a holder that has died.

        Raises:
            Locked: it lives, or that cannot be told.
        """
        holder = Holder.read(path)
        named = path != self.path  # the kernel, which forgets locks at a restart, has not been asked
        if holder is not None and (holder.is_dead() or (named and holder.before_restart())):
            stale = path.with_name(f"{path.name}.{os.getpid()}.dead")
            with contextlib.suppress(OSError):
                os.rename(path, stale)  # of several who see this, one gets it
                os.unlink(stale)
            return
        raise Locked(f"{self.what} is in use by {holder or 'another process'}", holder)

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def _is_open_as(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


_HELD: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked process: its copies of the descriptors would keep the locks of a parent that has died."""
    for lock in list(_HELD):
        lock._forget()


os.register_at_fork(after_in_child=_leave_to_parent)
