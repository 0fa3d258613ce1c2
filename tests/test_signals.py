"""Signals to a process that is inside a compiled computation, where Python's own handlers have to wait."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from fpo_jax import fit, fit_population, signals
from fpo_jax.signals import stop_signals
from fpo_jax.types import FpoError
from tiny import TINY

# It says that it is ready from within a computation that takes an hour.
SCRIPT = """
import contextlib, sys, threading, time, jax, jax.numpy as jnp
from jax.experimental import io_callback
from fpo_jax.signals import StopSignal, stop_signals

@jax.jit
def compute():
    io_callback(lambda: print("ready", flush=True), None, ordered=True)
    return jax.lax.fori_loop(0, 10**9, lambda _, x: jnp.sin(x) @ x, jnp.ones((32, 32)))

def watch(stop):
    while not stop.received:
        time.sleep(0.01)
    print("noted", flush=True)

compiled = compute.lower().compile()
with stop_signals(StopSignal(at_once=sys.argv[1] == "at_once", advice="do it again")) as stop:
    threading.Thread(target=watch, args=(stop,), daemon=True).start()
    with stop.deferred() if sys.argv[1] == "deferred" else contextlib.nullcontext():
        compiled().block_until_ready()
"""


@pytest.fixture
def start():
    """Starts the script and returns when it computes; what still runs at the end is killed."""
    processes = []

    def one(how: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        processes.append(process)
        assert process.stdout and process.stdout.readline() == "ready\n"
        return process

    yield one
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_the_second_signal_ends_a_compiled_computation_at_once(number, code, start):
    process = start("deferred")
    process.send_signal(number)
    assert process.stdout and process.stdout.readline() == "noted\n"  # before, two would be one
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert not out and "left at once" in err and "Traceback" not in err


def test_sigterm_ends_it_at_once_where_nothing_is_to_be_saved(start):
    process = start("idle")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75


def test_ctrl_c_ends_it_at_once_where_that_was_asked_for(start):
    process = start("at_once")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.strip() == "SIGINT: left at once; what was saved before is whole: do it again."


def test_one_signal_is_noted_and_the_former_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as stop:
        with stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            deadline = time.monotonic() + 120
            while not stop.received and time.monotonic() < deadline:
                time.sleep(0.01)
        assert stop.received == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_is_pythons_own_where_nothing_is_to_be_saved():
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("module", [fit, fit_population])
def test_sigterm_while_a_run_begins_leaves_at_once(module, monkeypatch, tmp_path):
    left, codes = threading.Event(), []

    def leave(received, advice):
        codes.append(signals.exit_code(received))
        left.set()

    def build(config):
        signal.raise_signal(signal.SIGTERM)
        assert left.wait(120)
        raise FpoError("the end of this test")

    monkeypatch.setattr(signals, "_leave", leave)
    monkeypatch.setattr(module, "build", build)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # so that a failure does not end the tests
    try:
        with pytest.raises(FpoError, match="the end of this test"):
            module.fit(replace(TINY, run_dir=str(tmp_path / "r")))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert codes == [75]
