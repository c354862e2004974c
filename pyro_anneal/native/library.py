"""Compiles C++ and keeps the machine code on disk for processes to come.

A library is found by the digest of its source, of the compiler and its options, and of the
processor. It lies in the folder that ``PYRO_ANNEAL_CACHE_DIR`` names, else beside what torch's
compiler keeps; the folder must belong to the user, and nobody else may write to it. Libraries that
were not used for longest go where there are more than 4096, or more bytes than
``PYRO_ANNEAL_CACHE_MB`` (256) allows.
"""

from __future__ import annotations

import _ctypes
import atexit
import contextlib
import ctypes
import functools
import getpass
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .values import CannotGenerate

__all__ = ["Library", "compiler_problem", "folder", "load"]

_OPTIONS = (
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
    "-Wno-psabi",
    "-shared",
    "-fPIC",
)
# What is kept on disk; a library has 15 to 100 kB.
_MOST_MEGABYTES, _MOST_FILES = 256, 4096
_STALE_SECONDS = 24 * 3600
# Operations on vectors that are worth a closer look of the compiler.
_MUCH_WORK = 20_000
# Operations on vectors that are worth a thread.
_WORK_OF_A_THREAD = 200_000


def folder() -> Path:
    """Names the folder where libraries are kept."""
    named = os.environ.get("PYRO_ANNEAL_CACHE_DIR")
    if named:
        return Path(named)
    beside = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not beside:
        beside = os.path.join(tempfile.gettempdir(), f"torchinductor_{_user()}")
    return Path(beside) / "pyro_anneal"


def _user() -> str:
    try:
        return "".join(c if c.isalnum() else "_" for c in getpass.getuser())
    except (KeyError, OSError, ImportError):
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def _compiler() -> list[str]:
    """Finds the C++ compiler: what ``CXX`` names, else g++ or clang++."""
    given = os.environ.get("CXX")
    command = shlex.split(given) if given is not None else []
    if given is None:
        command = [name for name in ("g++", "clang++") if shutil.which(name)][:1]
    if not command or shutil.which(command[0]) is None:
        raise CannotGenerate("no C++ compiler")
    return command


def compiler_problem() -> str | None:
    """Says why nothing can be compiled here, or None."""
    if os.name != "posix":
        return "native code is made on POSIX systems only"
    try:
        _compiler()
    except CannotGenerate as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=8)
def _identity(command: tuple[str, ...], modified: float) -> str:
    """Describes the compiler and the processor."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = "".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model"))}))
    except OSError:
        cpu = platform.processor()
    return repr((command, version.stdout, platform.machine(), platform.system(), cpu, _OPTIONS))


def _owned(place: Path) -> bool:
    """Tells whether a file or folder is the user's own, and nobody else may write to it."""
    status = place.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _place() -> Path:
    """Returns the folder, made if need be; one for this process where it is not to be trusted."""
    place = folder()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _owned(place) and os.access(place, os.W_OK):
            return place
    except OSError:
        pass
    return _own_folder(os.getpid())


@functools.cache
def _own_folder(process: int) -> Path:
    """Makes a folder that goes with this process, and not with one that it forks."""
    place = Path(tempfile.mkdtemp(prefix="pyro_anneal_"))

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(place, ignore_errors=True)

    atexit.register(remove)
    return place


class Library:
    """A loaded library with one function, ``run(count, begin, end, pointers, scratch)``.

    It leaves memory with the object, so that thousands of models may follow one another.
    """

    def __init__(self, file: Path) -> None:
        loaded = ctypes.CDLL(str(file))
        weakref.finalize(self, _ctypes.dlclose, loaded._handle).atexit = False
        self._run = loaded.run
        number, pointer = ctypes.c_longlong, ctypes.c_void_p
        self._run.argtypes = [number, number, number, pointer, pointer]
        self._run.restype = None

    def run(
        self, count: int, tensors: Sequence[Tensor], *, lanes: int, scratch: int, work: int
    ) -> None:
        """Calls the function for all chains, on as many threads as torch uses and it is worth.

        Args:
            count: Number K of chains.
            tensors: What its pointers point to.
            lanes: Chains that are one piece of work.
            scratch: Bytes of memory that each thread needs.
            work: Operations on vectors for one piece of work.
        """
        pointers = (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])
        blocks = -(-count // lanes)
        threads = min(torch.get_num_threads(), blocks, 1 + blocks * work // _WORK_OF_A_THREAD)
        if threads <= 1:
            self._part(count, 0, count, pointers, scratch)
            return
        edges = [min(lanes * (blocks * k // threads), count) for k in range(threads + 1)]
        edges[-1] = count
        calls = [
            _pool().submit(self._part, count, edges[k], edges[k + 1], pointers, scratch)
            for k in range(threads)
        ]
        for call in calls:
            call.result()

    def _part(
        self, count: int, begin: int, end: int, pointers: ctypes.Array[ctypes.c_void_p], size: int
    ) -> None:
        memory = ctypes.create_string_buffer(size + 128)
        address = ctypes.addressof(memory)
        self._run(count, begin, end, pointers, address + -address % 128)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pyro_anneal")


_LOADED: OrderedDict[str, Library] = OrderedDict()
_CAPACITY = 256


def load(source: str, *, work: int = 0) -> Library:
    """Compiles C++, or finds what it was compiled to before.

    Args:
        source: With a function ``run``.
        work: Its operations on vectors; little work is compiled sooner, and runs as fast.

    Raises:
        CannotGenerate: If there is no compiler, or it fails.
    """
    problem = compiler_problem()
    if problem is not None:
        raise CannotGenerate(problem)
    command = tuple(_compiler())
    program = shutil.which(command[0]) or command[0]
    identity = _identity(command, os.stat(program).st_mtime)
    level = "-O2" if work > _MUCH_WORK else "-O1"
    digest = hashlib.sha256(f"{identity}{level}\n{source}".encode()).hexdigest()[:40]
    if digest not in _LOADED:
        _LOADED[digest] = _loaded(source, [*command, level], digest)
        if len(_LOADED) > _CAPACITY:
            _LOADED.popitem(last=False)
    _LOADED.move_to_end(digest)
    return _LOADED[digest]


def _loaded(source: str, command: Sequence[str], digest: str) -> Library:
    for _ in range(3):  # another process may remove a library before it is loaded
        with contextlib.suppress(OSError):
            return Library(_compiled(source, command, digest))
    raise CannotGenerate("libraries on disk cannot be loaded")


def _compiled(source: str, command: Sequence[str], digest: str) -> Path:
    """Returns the library of a digest, compiled if it is not there."""
    place = _place()
    kept = place / f"{digest}.so"
    with contextlib.suppress(OSError):  # another process may remove it
        if _owned(kept):
            os.utime(kept)  # it is in use
            return kept
    with tempfile.TemporaryDirectory(dir=place) as own:
        text, made = Path(own) / "source.cpp", Path(own) / "library.so"
        text.write_text(source)
        done = subprocess.run(
            [*command, *_OPTIONS, "-o", str(made), str(text), "-lm"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not made.exists():
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise CannotGenerate(f"the C++ compiler failed ({(lines or ['no reason given'])[0]})")
        made.chmod(0o700)
        os.replace(made, kept)  # another process may have been as quick, with the same content
    _remove_oldest(place, _most_bytes())
    return kept


def _most_bytes() -> int:
    """Reads how much may be kept, in bytes."""
    try:
        return int(float(os.environ.get("PYRO_ANNEAL_CACHE_MB", _MOST_MEGABYTES)) * 2**20)
    except (ValueError, OverflowError):
        return _MOST_MEGABYTES * 2**20


def _remove_oldest(place: Path, most: int) -> None:
    """Removes libraries that were not used for longest, but the last one, and what a crash left."""
    found, total = [], 0
    for entry in os.scandir(place):
        with contextlib.suppress(OSError):  # another process may have removed it
            status = entry.stat(follow_symlinks=False)
            if entry.name.endswith(".so"):
                found.append((status.st_mtime, status.st_size, entry.path))
                total += status.st_size
            elif stat.S_ISDIR(status.st_mode) and status.st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(entry.path, ignore_errors=True)
    found.sort()
    for number, (_, size, path) in enumerate(found[:-1]):
        if total <= most and len(found) - number <= _MOST_FILES:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)  # a process that has loaded it keeps it
        total -= size
