"""Worker processes: what goes wrong is noticed, replaced and counted, and nothing stays behind."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fpo_jax.envs import wire, workers
from fpo_jax.envs.host import Episode
from fpo_jax.envs.workers import WorkerPool, WorkerSettings
from fpo_jax.types import FpoError
from tiny_libero import COMMAND, alive, log_of

HELLO = {"image_size": 8, "cameras": [], "max_chunk": 3}
SETTINGS = WorkerSettings(COMMAND, HELLO, reset={"suite": "libero_90"}, start_seconds=300.0)


def episode(seed: int = 0) -> Episode:
    return Episode(0, 0, -1, seed, False)


@pytest.fixture
def make_pool(monkeypatch):
    pools = []

    def make(told: str = "{}", **settings) -> WorkerPool:
        monkeypatch.setenv("FAKE_WORKER", told)
        pools.append(WorkerPool(replace(SETTINGS, **settings)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def play(pool: WorkerPool, slot: int = 0, seed: int = 0):
    pool.submit_reset(slot, episode(seed))
    begun = pool.collect(slot)
    pool.submit_step(slot, np.ones((3, 7), np.float32))
    return begun, pool.collect(slot)


# --- messages and shared memory


def test_layout():
    plan = wire.layout(4, ["image", "wrist_image"], 5)
    assert {name: (f.dtype, f.shape) for name, f in plan.fields.items()} == {
        "actions": ("float32", (5, 7)),
        "proprio": ("float32", (8,)),
        "objects": ("float32", (32, 7)),
        "images": ("uint8", (2, 4, 4, 3)),
    }
    memory = bytearray(plan.size)
    arrays = wire.views(memory, plan)
    for number, array in enumerate(arrays.values(), start=1):
        array[...] = number
    for number, array in enumerate(arrays.values(), start=1):  # none overlaps another
        assert (array == number).all()
    assert all(f.offset % 64 == 0 for f in plan.fields.values())
    blind = wire.layout(4, [], 5)
    assert wire.views(bytearray(blind.size), blind)["images"].size == 0


def test_wire_needs_no_package(tmp_path):
    """Workers load it by its path, in environments that have nothing of ours."""
    script = "import runpy, sys; wire = runpy.run_path(sys.argv[1]); print(wire['layout'](2, [], 1).size)"
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", script, wire.__file__], capture_output=True, text=True)
    assert ran.stdout.strip() == str(wire.layout(2, [], 1).size), ran.stderr


# --- starting


def test_what_the_first_worker_says(make_pool):
    pool = make_pool()
    assert pool.hello["opengl"] == "fake" and pool.pids() == {0: pool.hello["pid"]}
    assert [task["inits"] for task in pool.ask({"op": "tasks"})["suites"]["libero_90"]] == [50, 50]
    begun, stepped = play(pool, slot=3)  # the others start when they are needed
    assert (begun.failed, begun.success, stepped.failed, stepped.steps) == ("", False, "", 3)
    np.testing.assert_array_equal(stepped.arrays["proprio"][:2], 0.75)
    assert set(pool.pids()) == {0, 3}


def test_a_simulator_that_cannot_start_says_why(make_pool, tmp_path):
    with pytest.raises(FpoError, match=r"cannot start.*No such file"):
        make_pool(command=("/nowhere/python",))
    with pytest.raises(FpoError, match="exit status 1, ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        make_pool(command=(sys.executable, "-c", "import nothing_of_this_name"))
    with pytest.raises(FpoError, match="render: no OpenGL"):
        make_pool('{"fail_hello": "render: no OpenGL"}')
    with pytest.raises(FpoError, match="hung"):
        make_pool(command=(sys.executable, "-c", "import time; time.sleep(100)"), start_seconds=0.1)
    with pytest.raises(FpoError, match="did not answer"):
        make_pool().ask({"op": "close"})


def test_another_python_gets_no_packages_of_this_one(make_pool, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    pool = make_pool()
    environ = Path(f"/proc/{pool.hello['pid']}/environ").read_bytes()
    assert b"PYTHONPATH" not in environ and b"LP_NUM_THREADS=0" in environ
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    play(pool, slot=1)
    assert len(list(Path("/proc/self/fd").iterdir())) - descriptors <= 4  # memory, socket, pipe, error log


def test_the_limit_of_open_files_rises_with_the_workers(make_pool, monkeypatch):
    limits = []
    monkeypatch.setattr(workers.resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(workers.resource, "setrlimit", lambda which, pair: limits.append(pair))
    pool = make_pool()
    for slots in (64, 2000):
        pool.prepare(slots)
    assert limits == [(1024 + 4 * 64, 4096), (4096, 4096)]


def test_memory_that_is_free():
    free = workers.available_memory()
    assert free is not None and 2**20 < free < 2**50


# --- faults


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("die", "died: exit status -9"),
        ("hang", "hung: it did not answer in time"),
        ("nan", "physics: the state is not finite"),
        ("render", "render: told to fail"),
        ("physics", "physics: told to fail"),
        ("garbage", "protocol: KeyError"),
    ],
)
def test_a_worker_that_fails_is_ended_and_replaced(make_pool, caplog, kind, expected):
    # Only what hangs has to be waited for; another answer may come as late as it likes.
    pool = make_pool(f'{{"faults": {{"{kind}": 1.0}}}}', reset_seconds=0.5 if kind == "hang" else 300.0)
    first = pool.pids()[0]
    pool.submit_reset(0, episode())
    with caplog.at_level(logging.WARNING):
        outcome = pool.collect(0)
    assert outcome.failed == expected and outcome.arrays is None and not outcome.success
    assert not alive(first) and alive(pool.pids()[0]) and pool.pids()[0] != first
    assert pool.report() == {"worker_restarts": 1.0} and str(first) in caplog.text
    assert pool.problem() is None


def test_a_worker_that_draws_with_another_opengl_is_no_worker(make_pool, tmp_path):
    """Results state the first one's, and pictures of another library differ."""
    pool = make_pool(json.dumps({"opengl_after": [str(tmp_path), "osmesa"]}), max_restarts=2)
    assert play(pool)[1].failed == ""
    begun, _ = play(pool, slot=1)
    assert begun.failed == "render: another OpenGL than the first worker (osmesa, fake)"
    assert set(pool.faults) == {"render"} and play(pool)[1].failed == ""


def test_a_worker_that_is_killed_from_outside(make_pool):
    pool = make_pool()
    play(pool)
    os.kill(pool.pids()[0], signal.SIGKILL)
    pool.submit_step(0, np.ones((3, 7), np.float32))
    assert pool.collect(0).failed.startswith("died")
    assert play(pool)[1].failed == ""


def test_a_hang_costs_the_others_nothing(make_pool, tmp_path, monkeypatch):
    """Deadlines run from the request, so several stuck workers cost one deadline, and the answers of others stay."""
    pool = make_pool(json.dumps({"faults": {"hang": 0.5}, "log": str(tmp_path)}), reset_seconds=300.0)
    for slot in range(6):
        pool.submit_reset(slot, episode(slot))
    while sum("broke" in entry or entry.get("op") == "reset" for entry in log_of(tmp_path)) < 6:
        time.sleep(0.01)
    # All have answered or are stuck. Now ten minutes go by, and no deadline is left to wait for.
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 600.0))
    began = time.monotonic()
    outcomes = [pool.collect(slot).failed for slot in range(6)]
    stuck = sum(failed.startswith("hung") for failed in outcomes)
    assert 2 <= stuck < 6 and set(outcomes) == {"", "hung: it did not answer in time"}
    assert time.monotonic() - began < 300.0  # from the call it would be twice that for each that is stuck


def test_after_too_many_restarts_nothing_begins_any_more(make_pool):
    pool = make_pool('{"faults": {"die": 1.0}}', max_restarts=3)
    for count in range(1, 5):
        assert pool.problem() is None
        pool.submit_reset(0, episode())
        assert pool.collect(0).failed.startswith("died")
        assert pool.restarts == count
    assert pool.problem() == "4 simulator processes were lost (4 died; the last: died: exit status -9)"
    assert pool.pids() == {}
    pool.submit_reset(0, episode())
    assert pool.collect(0).failed and pool.restarts == 4


def test_close_ends_every_worker_once(make_pool):
    pool = make_pool()
    for slot in range(3):
        play(pool, slot)
    pids = list(pool.pids().values())
    assert len(pids) == 3 and all(map(alive, pids))
    pool.close()
    pool.close()
    assert not any(map(alive, pids))
    pool.submit_reset(0, episode())
    assert pool.collect(0).failed and pool.pids() == {} and pool.problem() == "The simulators were closed"


# --- nothing outlives this process, not even a worker that is stuck

PARENT = """
import os, signal, sys, threading, time
from fpo_jax.envs.host import Episode
from fpo_jax.envs.workers import WorkerPool, WorkerSettings
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits that it is ignored
pool = WorkerPool(WorkerSettings(tuple(sys.argv[2:]), {"image_size": 8, "cameras": [], "max_chunk": 3},
                                 reset={"suite": "libero_90"}))
for slot in range(3):
    pool.submit_reset(slot, Episode(0, 0, -1, slot, False))  # in which they hang
print(*pool.pids().values(), flush=True)
sys.stdin.readline()
if sys.argv[1] == "wait":
    for slot in range(3):
        pool.collect(slot)
if sys.argv[1] == "fail":
    raise RuntimeError
"""


@pytest.mark.parametrize("how", ["exit", "fail", "interrupt", "terminate", "kill"])
def test_no_worker_stays_behind(how, tmp_path):
    mode = how if how in ("exit", "fail") else "wait"
    told = json.dumps({"faults": {"hang": 1.0}, "log": str(tmp_path)})
    environment = {**os.environ, "FAKE_WORKER": told, "XLA_FLAGS": ""}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, mode, *COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
        process_group=0,
    )
    with parent, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(parent.kill)  # a failure below must not wait for it for ever
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        while sum("broke" in entry for entry in log_of(tmp_path)) < 3:  # until they are stuck
            assert parent.poll() is None
            time.sleep(0.01)
        assert all(map(alive, pids))
        parent.stdin.write("go on\n")
        parent.stdin.flush()
        if mode == "wait":
            number = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}[how]
            os.killpg(parent.pid, number)  # as the terminal does: to the whole group, of which they are no part
        parent.wait(120)
    deadline = time.monotonic() + 120
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))
