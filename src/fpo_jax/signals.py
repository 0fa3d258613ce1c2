"""Ctrl-C and SIGTERM: noted while there is something to save, obeyed at once otherwise."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

TRY_AGAIN = 75  # exit code: EX_TEMPFAIL of sysexits.h
_STOPPING = (signal.SIGINT, signal.SIGTERM)


def exit_code(received: signal.Signals) -> int:
    """130 after Ctrl-C, as shells have it; after SIGTERM one of its own, which no process that was killed returns."""
    return TRY_AGAIN if received == signal.SIGTERM else 128 + received


class StopSignal:
    """What was received while `deferred`; a second signal, or SIGTERM outside, ends the process at once.

    `at_once`: Ctrl-C outside does too, for work that has nothing to save. `advice`: what is said then.
    """

    def __init__(self, at_once: bool = False, advice: str = "go on with --resume auto") -> None:
        self.at_once, self.advice = at_once, advice
        self.received: signal.Signals | None = None
        self._deferring = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first signal is only noted."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def handle(self, number: int, frame: Any) -> None:
        """In the main thread, when Python has it: Ctrl-C outside `deferred` is Python's own, but for `at_once`."""
        if number == signal.SIGINT and not self._deferring and not self.received and not self.at_once:
            raise KeyboardInterrupt

    def listen(self, numbers: socket.socket) -> None:
        """In a thread of its own, so that a compiled iteration cannot hold a signal back."""
        while number := numbers.recv(1):
            if number[0] not in _STOPPING:
                continue
            received = signal.Signals(number[0])
            if self.received or (not self._deferring and (self.at_once or received == signal.SIGTERM)):
                _leave(received, self.advice)
            if self._deferring:
                self.received = received


def _leave(received: signal.Signals, advice: str) -> NoReturn:
    cursor = "\x1b[?25h" if os.isatty(2) else ""  # the progress line hides it
    sentence = f"{received.name}: left at once; what was saved before is whole: {advice}."
    os.write(2, f"{cursor}\n{sentence}\n".encode())
    os._exit(exit_code(received))


@contextmanager
def stop_signals(stop: StopSignal | None = None) -> Iterator[StopSignal]:
    """Within, Ctrl-C and SIGTERM are a `StopSignal`'s. For the main thread."""
    stop = stop or StopSignal()
    heard, told = socket.socketpair()
    told.setblocking(False)
    listener = threading.Thread(target=stop.listen, args=(heard,), name="signals", daemon=True)
    listener.start()
    previous = {number: signal.signal(number, stop.handle) for number in _STOPPING}
    previous_told = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(previous_told)
        for number, handler in previous.items():
            signal.signal(number, handler)
        told.close()  # ends the listener
        listener.join()
        heard.close()
