"""Everything that differs between operating systems, each with a portable path.

No other module imports `fcntl`, `msvcrt` or `resource`, or asks which system it runs on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

__all__ = [
    "WINDOWS", "address_space_limit", "available_memory", "copy_file", "copy_range", "cores", "drop_lock",
    "end_with_parent", "forget_pages", "give_back_memory", "peak_rss", "preallocate", "replace", "resident_bytes",
    "sync_folder", "try_lock", "unportable",
]  # fmt: skip

WINDOWS: bool = sys.platform == "win32"
SHARING_WAITS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds between the attempts of a rename on Windows, where a virus scanner may hold a file for a moment."""
_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in "123456789¹²³")}
_FORBIDDEN = set('<>:"|?*\\/')
_LOCKED_BYTE = 1 << 30  # far behind the text: Windows lets no other process read a locked byte
_UNLIMITED = 1 << 60  # cgroup 1 says "no limit" with a number near 2**63


if sys.platform == "win32":
    import msvcrt

    def try_lock(fd: int) -> None:
        """Take the exclusive lock of an open file; OSError if another process has it."""
        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

    def drop_lock(fd: int, path: Path) -> None:
        """Close a lock file and remove it; an open file cannot be removed on Windows."""
        os.close(fd)
        with suppress(PermissionError):  # the next writer has opened it already and removes it
            path.unlink(missing_ok=True)

    def sync_folder(path: Path) -> None:
        """Do nothing: Windows cannot open a folder, and NTFS journals its renames."""

    class _Counters(ctypes.Structure):
        _fields_ = [("cb", ctypes.c_uint32), ("faults", ctypes.c_uint32), ("peak", ctypes.c_size_t)] + [
            (f"other{i}", ctypes.c_size_t) for i in range(7)
        ]

    class _Memory(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
            (name, ctypes.c_uint64) for name in ("total", "free", "pages", "free_pages", "virtual", "rest", "extended")
        ]

    def peak_rss() -> int:
        """Peak resident bytes of this process."""
        found = _Counters(cb=ctypes.sizeof(_Counters))
        process = ctypes.c_void_p(-1)  # this process
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(found), found.cb)
        return int(found.peak)

    def available_memory() -> int:
        """Bytes of main memory that this process may still take."""
        found = _Memory(length=ctypes.sizeof(_Memory))
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(found))
        return int(found.free)

    @contextmanager
    def address_space_limit(extra_bytes: int) -> Iterator[None]:
        """Set no limit: Windows has none for a running process."""
        yield

else:
    import fcntl
    import resource

    def try_lock(fd: int) -> None:
        """Take the exclusive lock of an open file; OSError if another process has it."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def drop_lock(fd: int, path: Path) -> None:
        """Remove a lock file while the lock is held, then free it."""
        path.unlink(missing_ok=True)
        os.close(fd)

    def sync_folder(path: Path) -> None:
        """Flush a folder's entries to the disk."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def peak_rss() -> int:
        """Peak resident bytes of this process."""
        status = Path("/proc/self/status")
        if status.exists():  # getrusage on Linux also counts what the process was before it became this program
            line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), None)
            if line is not None:
                return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def available_memory() -> int:
        """Bytes of main memory that this process may still take.

        On Linux what the kernel calls available, within the limits of every control group of the
        process; elsewhere all memory of the machine, as the system does not tell what is free.
        """
        if sys.platform == "linux":
            return _linux_memory(Path("/"))
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @contextmanager
    def address_space_limit(extra_bytes: int) -> Iterator[None]:
        """Let the process map at most so many bytes more, where the system tells how many it maps (Linux)."""
        statm = Path("/proc/self/statm")
        if not statm.exists():
            yield
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = int(statm.read_text().split()[0]) * resource.getpagesize() + extra_bytes
        least = wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
        resource.setrlimit(resource.RLIMIT_AS, (least, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def replace(source: Path, target: Path) -> None:
    """Rename, replacing a file; on Windows wait a little for a program that has it open.

    Raises
    ------
    OSError
        As of `os.replace`: on Windows also where `target` is a folder, or a file below `source` stays open.
    """
    for seconds in SHARING_WAITS if WINDOWS else ():
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content: within the file system where that is possible, sharing its blocks where it can."""
    with open(source, "rb") as read, open(target, "wb") as write:
        if sys.platform == "linux" and hasattr(os, "copy_file_range"):
            left = os.fstat(read.fileno()).st_size
            with suppress(OSError):  # another file system, or one without it: what is left is copied below
                while left and (count := os.copy_file_range(read.fileno(), write.fileno(), left)):
                    left -= count
        shutil.copyfileobj(read, write, 1 << 20)


def copy_range(source: Path, offset: int, target: FileIO, place: int, count: int) -> None:
    """Copy bytes from one file into another, in the kernel where it can.

    Raises
    ------
    OSError
        The source is shorter, or the disk is full.
    """
    with open(source, "rb", buffering=0) as file:
        done = 0
        while done < count:
            moved = _moved(file, offset + done, target, place + done, count - done)
            if not moved:
                raise OSError(errno.EIO, "became shorter while it was copied", str(source))
            done += moved


def _moved(source: FileIO, offset: int, target: FileIO, place: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            if moved := os.copy_file_range(source.fileno(), target.fileno(), count, offset, place):
                return moved  # 0 also means that this file system cannot
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF):
                raise
    source.seek(offset)
    target.seek(place)
    return target.write(source.read(min(count, 1 << 23)))


def preallocate(file: FileIO, size: int) -> None:
    """Give a file its final size, with its room on the disk reserved where the system can."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    file.truncate(size)


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes() -> int:
    """Resident bytes of this process now, where the system tells (Linux); else the peak."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_rss()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back_memory() -> None:
    """Return to the system what the allocator keeps of freed memory, where it can be asked to (glibc)."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def forget_pages(fd: int, start: int, length: int) -> None:
    """Let the system drop a file's pages that were read and are not read again soon, where it can be told so."""
    if sys.platform == "linux" and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)


def unportable(name: str) -> str | None:
    """Why a file or folder name cannot stand on every system (Windows is the strictest), or None."""
    if bad := sorted(c for c in set(name) if c in _FORBIDDEN or ord(c) < 32):
        return f"{bad[0]!r} is not allowed in a name on Windows"
    if name != name.rstrip(". "):
        return "a name on Windows cannot end in a dot or a space"
    if name.split(".")[0].rstrip().lower() in _DEVICES:
        return "it is the name of a device on Windows"
    return None


def _linux_memory(root: Path) -> int:
    """MemAvailable, or what the tightest control group leaves; `root` is the root of the file system."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    free = found.get("MemAvailable", found.get("MemFree", 0))
    return max(0, min([free, *_group_memory(root)]))


def end_with_parent() -> None:
    """Have the kernel end this process once its parent is killed; only Linux does that, elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _group_memory(root: Path) -> Iterator[int]:
    """Free bytes of every control group of this process that has a limit, its ancestors included."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            folder = base.joinpath(*parts[:depth])
            with suppress(OSError, ValueError):  # no such group here, or its limit is "max"
                most = int((folder / limit).read_text())
                if most < _UNLIMITED:
                    yield most - int((folder / used).read_text()) + _stat(folder / "memory.stat", cache)


def _stat(path: Path, name: str) -> int:
    """One number of a memory.stat: pages of files that the kernel gives back when asked."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)
