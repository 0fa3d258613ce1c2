"""Simulators in worker processes, one per slot: started, watched, ended and replaced (a `host.HostVectorEnv`).

Workers are started anew, never forked from JAX's process, and speak `wire`'s messages. One that dies, does not answer
in time, cannot render or returns numbers that are not finite is ended by its own process id, its episode is lost, and
another one takes its slot. None outlives this process, however it ends and whatever the worker is doing.
"""

import contextlib
import fcntl
import json
import logging
import mmap
import os
import resource
import select
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fpo_jax.envs import wire
from fpo_jax.envs.host import Episode, Outcome
from fpo_jax.types import FpoError

_PATIENCE = 1.0  # [s] for an answer whose deadline passed while this process was busy with something else
_FILES = 4  # that this process keeps open for each worker: memory, socket, pipe, error log
_KINDS = ("died", "hung", "render", "physics", "task", "protocol")

# What results say of all workers. One whose OpenGL falls back to another library would draw other pictures.
_SAME = {"opengl": "another OpenGL", "versions": "other versions"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSettings:
    """How workers are started, and how long they may take."""

    command: tuple[str, ...]
    hello: Mapping[str, Any]  # the `hello` request without its memory: image_size, cameras, max_chunk, ...
    reset: Mapping[str, Any] = field(default_factory=dict)  # what every `reset` request holds besides the episode
    test_reset: Mapping[str, Any] = field(default_factory=dict)  # what that of a test episode holds besides
    environment: Mapping[str, str] = field(default_factory=dict)  # variables beside this process's own
    slot_environments: tuple[Mapping[str, str], ...] = ()  # and beside these: in slot i those of i modulo their number
    start_seconds: float = 300.0  # until a new worker has said hello
    reset_seconds: float = 180.0
    step_seconds: float = 60.0
    max_restarts: int = 100  # workers replaced before the pool gives up
    memory: int = 0  # of a worker at work, about [bytes]

    @property
    def layout(self) -> wire.Layout:
        """The arrays in a worker's shared memory."""
        return wire.layout(self.hello["image_size"], self.hello["cameras"], self.hello["max_chunk"])


class StartError(FpoError):
    """No worker can start; `reason` is "kind: why"."""

    def __init__(self, reason: str):
        super().__init__(f"The simulator cannot start ({reason}).")
        self.reason = reason


class _Broken(Exception):
    """The worker lives but says that it cannot go on: `<kind>: why`."""


class _Worker:
    """A process, the socket to it and the memory shared with it."""

    def __init__(self, settings: WorkerSettings, slot: int, like: Mapping[str, Any] | None = None):
        """`like`: the hello of another worker, which results were stated by."""
        plan = settings.layout
        with contextlib.ExitStack() as on_failure:
            self._errors = on_failure.enter_context(tempfile.TemporaryFile())
            self.connection, theirs = socket.socketpair()
            on_failure.callback(self.connection.close)
            lifeline, self._lifeline = os.pipe()
            on_failure.callback(os.close, self._lifeline)
            with contextlib.ExitStack() as inherited:
                inherited.callback(theirs.close)
                inherited.callback(os.close, lifeline)
                file, path = _shared_file(plan.size)
                inherited.callback(os.close, file)
                self.arrays = wire.views(mmap.mmap(file, plan.size), plan)
                self.process = subprocess.Popen(
                    settings.command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,  # drivers are talkative
                    stderr=self._errors,
                    env=_environment(settings, slot),
                    pass_fds=(file, lifeline),
                    process_group=0,  # Ctrl-C is for this process alone
                )
                _end_with_this_process(lifeline, self.process.pid)
            on_failure.pop_all()
        self._waiting: deque[tuple[str, float]] = deque()  # (request, deadline) in the order of their answers
        self.hello: dict[str, Any] = {}
        self._like = like or {}
        hello = {"op": "hello", **settings.hello, "memory": path, "slots": plan.fields}
        self.request(hello, settings.start_seconds)

    def request(self, head: dict[str, Any], seconds: float) -> None:
        """Begin a request; a worker that is gone shows when the answer is read."""
        begin = self._waiting[-1][1] if self._waiting else time.monotonic()
        self._waiting.append((head["op"], begin + seconds))
        self.connection.settimeout(_PATIENCE)  # a message is far smaller than the socket's buffer
        with contextlib.suppress(OSError):
            wire.send(self.connection, head)

    def answer(self) -> dict[str, Any]:
        """The newest request's answer. Raises OSError where the worker is gone or stuck, _Broken where it fails."""
        head: dict[str, Any] = {}
        while self._waiting:
            op, deadline = self._waiting.popleft()
            self.connection.settimeout(max(_PATIENCE, deadline - time.monotonic()))
            head, _ = wire.receive(self.connection)
            if op == "hello":
                self.hello = head
            if head.get("failed") and (op == "hello" or not self._waiting):
                raise _Broken(head["failed"])
            if op == "hello":
                self._check_hello()
        return head

    def _check_hello(self) -> None:
        for name, noun in _SAME.items():
            if name in self._like and self._like[name] != (found := self.hello.get(name)):
                why = f": {tried}" if (tried := self.hello.get("opengl_failed")) else ""
                raise _Broken(f"render: {noun} than the first worker ({found}, {self._like[name]}{why})")

    def last_words(self) -> str:
        """The last line that it wrote to its standard error."""
        self._errors.seek(max(0, os.fstat(self._errors.fileno()).st_size - 2000))
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.kill()  # it holds nothing that would have to be saved
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        os.close(self._lifeline)
        self._errors.close()


def _shared_file(size: int) -> tuple[int, str]:
    """(descriptor, path under which a child that inherits it opens it): memory that no file is left of."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("fpo_jax")
    else:
        file, path = tempfile.mkstemp()
        os.unlink(path)
    os.ftruncate(file, size)
    return file, f"/proc/self/fd/{file}" if os.path.isdir("/proc/self/fd") else f"/dev/fd/{file}"


def _environment(settings: WorkerSettings, slot: int) -> dict[str, str]:
    """This process's variables but for those that would lead another Python to this one's packages."""
    several = settings.slot_environments
    own = {**settings.environment, **(several[slot % len(several)] if several else {})}
    environment = {"LP_NUM_THREADS": "0", **os.environ, **own}  # Mesa in software: no more threads
    for name in ("PYTHONPATH", "PYTHONHOME", "PYOPENGL_PLATFORM"):
        if name not in own:
            environment.pop(name, None)
    return environment


def _end_with_this_process(lifeline: int, pid: int) -> None:
    """Have the kernel end the process `pid` when the writing end of `lifeline`, which only this process has, closes.

    A worker that waits for a message sees its socket close, but one that is stuck would live on: SIGIO, which nobody
    handles, ends it. (PR_SET_PDEATHSIG goes by the thread that started it, and JAX's threads come and go.)
    """
    if not hasattr(os, "O_ASYNC"):
        return  # such a system has only the socket
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, pid)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def available_memory() -> int | None:
    """Memory that programs can still take [bytes]; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


class WorkerPool:
    """Slots of simulators, each in a worker of its own that starts when the slot is first used.

    The first worker starts at once: what it says is in `hello`. Raises StartError where it cannot.
    """

    def __init__(self, settings: WorkerSettings):
        self.settings = settings
        self.restarts = 0  # workers replaced
        self.faults: Counter[str] = Counter()  # what ended them
        self._lock = threading.Lock()
        self._last_fault, self._gave_up = "", False
        self._workers: dict[int, _Worker] = {}
        self._closed = threading.Event()
        # Called by the user, when the pool is collected, or at exit.
        self.close = weakref.finalize(self, _close, self._closed, self._workers)
        try:
            first = self._workers[0] = _Worker(settings, 0)
        except OSError as error:
            raise StartError(f"{settings.command[0]}: {error.strerror}") from error
        try:
            self.hello = first.answer()
        except (OSError, ValueError, _Broken) as error:
            reason = _reason(first, error)
            self.close()
            raise StartError(reason) from error

    def ask(self, head: dict[str, Any]) -> dict[str, Any]:
        """The first worker's answer to a request between episodes. Raises FpoError where there is none."""
        worker = self._workers[0]
        try:
            worker.request(head, self.settings.start_seconds)
            return worker.answer()
        except (OSError, ValueError, _Broken) as error:
            reason = _reason(worker, error)
            self.close()
            raise FpoError(f"The simulator did not answer ({reason}).") from error

    def prepare(self, slots: int) -> None:
        """Make sure that so many slots can have workers. Raises FpoError where they need more memory than there is."""
        running, memory, available = len(self._workers), self.settings.memory, available_memory()
        if memory and available is not None and (slots - running) * memory > available:
            raise FpoError(
                f"{slots} simulators need about {slots * memory / 2**30:.0f} GiB of memory, of which "
                f"{available / 2**30:.0f} GiB are free: choose --num-envs {max(1, running + available // memory)} or "
                "fewer."
            )
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 1024 + _FILES * slots
        if soft != resource.RLIM_INFINITY and soft < wanted:
            new = wanted if hard == resource.RLIM_INFINITY else max(soft, min(wanted, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))

    def submit_reset(self, slot: int, episode: Episode) -> None:
        """Begin an episode."""
        worker = self._workers.get(slot)
        if worker is None and not self._start(slot):
            return
        head = {"op": "reset", **self.settings.reset, **(self.settings.test_reset if episode.test else {})}
        head |= {"task": episode.task, "init": None if episode.init < 0 else episode.init, "seed": episode.seed}
        self._workers[slot].request(head, self.settings.reset_seconds)

    def submit_step(self, slot: int, actions: Float[np.ndarray, "k a"]) -> None:
        """Begin to execute `actions`."""
        worker = self._workers.get(slot)
        if worker is not None:
            worker.arrays["actions"][: len(actions)] = actions
            worker.request({"op": "step", "length": len(actions)}, self.settings.step_seconds)

    def answered(self, slot: int, seconds: float) -> bool:
        """Whether the slot's worker has answered within that time, for traces; `collect` still takes the answer."""
        worker = self._workers.get(slot)
        return worker is None or bool(select.select([worker.connection], [], [], seconds)[0])

    def collect(self, slot: int) -> Outcome:
        """The outcome of the slot's newest request; a worker that fails is replaced."""
        worker = self._workers.get(slot)
        if worker is None:
            return Outcome("died: its simulator cannot be started")
        try:
            head = worker.answer()
            arrays = {name: np.array(worker.arrays[name]) for name in ("proprio", "objects", "images")}
            if not all(np.isfinite(arrays[name]).all() for name in ("proprio", "objects")):
                raise _Broken("physics: the state is not finite")
            return Outcome("", int(head.get("steps", 0)), bool(head["success"]), arrays)
        except Exception as error:  # an answer that makes no sense counts as a fault too
            reason = _reason(worker, error)
            self._lose(slot, worker, reason)
            return Outcome(reason)

    def problem(self) -> str | None:
        """Why no episode can begin any more."""
        if self._closed.is_set():
            return "The simulators were closed"
        if not self._gave_up:
            return None
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.faults.most_common())
        return f"{self.restarts} simulator processes were lost ({kinds}; the last: {self._last_fault})"

    def report(self) -> dict[str, float]:
        """Workers replaced so far."""
        return {"worker_restarts": float(self.restarts)}

    def pids(self) -> dict[int, int]:
        """Slot -> process id of its worker."""
        return {slot: worker.process.pid for slot, worker in dict(self._workers).items()}

    def _start(self, slot: int) -> bool:
        """Put a new worker into the slot, without waiting for its hello; False where that is not possible."""
        if self.problem() is not None:
            return False
        try:
            worker = _Worker(self.settings, slot, self.hello)
        except OSError as error:
            self._count(f"died: {error.strerror}")
            return False
        self._workers[slot] = worker
        if self._closed.is_set():  # meanwhile: nobody else would end it
            worker.close()
        return True

    def _lose(self, slot: int, worker: _Worker, reason: str) -> None:
        self._workers.pop(slot, None)
        worker.close()
        if self._closed.is_set():
            return
        logger.warning("The simulator of environment %d (process %d) is replaced: %s", slot, worker.process.pid, reason)
        self._count(reason)
        self._start(slot)

    def _count(self, reason: str) -> None:
        with self._lock:
            kind = reason.split(":", 1)[0]
            self.faults[kind if kind in _KINDS else "protocol"] += 1
            self.restarts += 1
            self._last_fault = reason
            self._gave_up |= self.restarts > self.settings.max_restarts


def _reason(worker: _Worker, error: Exception) -> str:
    """`<kind>: why` in one line; the worker is still to be closed."""
    if isinstance(error, TimeoutError):
        return "hung: it did not answer in time"
    if isinstance(error, OSError):
        with contextlib.suppress(subprocess.TimeoutExpired):  # its end may take longer than its socket's
            worker.process.wait(1)
        said = worker.last_words()
        return f"died: exit status {worker.process.poll()}" + (f", {said}" if said else "")
    if isinstance(error, _Broken):
        return " ".join(str(error).split())
    if isinstance(error, json.JSONDecodeError | KeyError | TypeError | ValueError):
        return f"protocol: {type(error).__name__}"
    return f"protocol: {error!r}"


def _close(closed: threading.Event, workers: dict[int, _Worker]) -> None:
    closed.set()
    for slot in list(workers):
        worker = workers.pop(slot, None)
        if worker is not None:
            worker.close()
