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

SCRIPT = """
import signal, sys, jax, jax.numpy as jnp
from fpo_jax.signals import StopSignal, stop_signals

def compute(thousands):
    steps = thousands * 1000
    jax.lax.fori_loop(0, steps, lambda _, x: jnp.sin(x) @ x, jnp.ones((32, 32))).block_until_ready()

compute(0)
with stop_signals(StopSignal(at_once=sys.argv[1] == "at_once", advice="do it again")) as stop:
    if sys.argv[1] == "deferred":
        with stop.deferred():
            print("ready", flush=True)
            compute(int(sys.argv[2]))
        print(f"noted {stop.received.name}", flush=True)
        sys.exit()
    print("ready", flush=True)
    compute(int(sys.argv[2]))
"""


def start(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_the_second_signal_ends_a_compiled_computation_at_once(number, code):
    process = start("deferred", "1000000")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert "noted" not in out and "left at once" in err and "Traceback" not in err


def test_sigterm_ends_it_at_once_where_nothing_is_to_be_saved():
    process = start("idle", "1000000")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75
    process.communicate()


def test_ctrl_c_ends_it_at_once_where_that_was_asked_for():
    process = start("at_once", "1000000")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.strip() == "SIGINT: left at once; what was saved before is whole: do it again."


def test_one_signal_is_noted_and_the_former_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as stop:
        with stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
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
        assert left.wait(10)
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
