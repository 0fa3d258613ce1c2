"""Several processes as one run, for real: on this machine, over its network interface."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import train as train_script

from fpo_jax import checkpoint, hosts
from fpo_jax.policies import open_base
from fpo_jax.provenance import tree_crc32
from fpo_jax.runs import load_run
from fpo_jax.signals import TRY_AGAIN
from test_parallel import python_environment

HERE = Path(__file__).parent
TRAIN = HERE.parent / "experiments" / "train.py"
TINY = [
    *("--env", "point_mass", "--num-envs", "4", "--rollout.decisions", "4", "--saving.every", "1"),
    *("--update.epochs", "1", "--update.minibatch-size", "16", "--actor.hidden", "8", "--critic.hidden", "8"),
    *("--actor.sampler-steps", "2", "--critic.value-samples", "2", "--actor.cfm-draws", "2"),
    *("--evaluation.episodes", "4", "--evaluation.no-video", "--saving.no-tensorboard"),
]


def free_port() -> int:
    """One below those that systems give to whoever asks for any: nobody takes it before the run does."""
    while True:
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 30_000)))
            return server.getsockname()[1]


def start(count: int, command: list[str]) -> list[subprocess.Popen]:
    """`count` processes of one run."""
    where = ["--parallel.coordinator", f"127.0.0.1:{free_port()}", "--parallel.num-processes", str(count)]
    return [
        subprocess.Popen(
            [sys.executable, *command, *where, "--parallel.process-id", str(index)],
            env=python_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes: list[subprocess.Popen], seconds: float | None = None) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each."""
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]


def metrics(run_dir: Path) -> list[dict]:
    """The records but for their times."""
    text = (run_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # one may be being written
    return [{name: value for name, value in line.items() if not name.endswith("_seconds")} for line in lines]


def files(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Two iterations in this process, on its two devices."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert train_script.main([*TINY, "--iterations", "2", "--run-dir", str(run_dir)]) == 0
    return run_dir


def wait_for_metrics(run_dir: Path, count: int, processes: list[subprocess.Popen]) -> None:
    try:
        while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < count:
            assert all(process.poll() is None for process in processes), finish(processes, 60.0)
            time.sleep(0.05)
    except BaseException:  # the time limit of the test
        for process in processes:
            process.kill()
        raise


def test_two_processes_train_as_one_and_stop_as_one(alone, tmp_path):
    run_dir = tmp_path / "run"
    processes = start(2, [str(TRAIN), *TINY, "--iterations", "100000", "--run-dir", str(run_dir)])
    wait_for_metrics(run_dir, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    stopped = finish(processes)
    assert [code for code, *_ in stopped] == [TRY_AGAIN] * 2, stopped
    done = checkpoint.latest_step(run_dir)
    assert done == len(metrics(run_dir))
    assert all(f"SIGTERM; the state after iteration {done} is saved" in errors for *_, errors in stopped)
    assert "Waiting for 1 of 2 processes" in stopped[0][1] and "2 of 2 devices, 1 in the first" in stopped[0][1]
    for one, other in zip(metrics(run_dir)[:2], metrics(alone), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_allclose(np.float64(other[name]), np.float64(value), rtol=1e-4, atol=1e-5, err_msg=name)
    # Two processes go on to the evaluation, and so does this one from a copy, on its two devices.
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    resume = ["--resume", "--iterations", str(done), "--run-dir"]
    ended = finish(start(2, [str(TRAIN), *resume, str(run_dir)]))
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "tuned -    base: " in ended[0][1]  # the first one talks, and nobody else but Gloo
    assert all(line.startswith("[Gloo]") for _, said, _ in (stopped[1], ended[1]) for line in said.splitlines())
    assert train_script.main([*resume, str(copy)]) == 0
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (run_dir, copy))
    assert ours["tuned"] == pytest.approx(theirs["tuned"], nan_ok=True)
    assert files(run_dir) == files(copy) and files(run_dir) - {"best"} == files(alone)  # two iterations make no best
    # Its checkpoint fits one process and one device.
    assert len(load_run(run_dir)[3].key.sharding.device_set) == 1


_SIMULATORS = """
import json
import jax, numpy as np, tyro
from dataclasses import replace
from fpo_jax import hosts, parallel
from fpo_jax.config import TrainConfig
from fpo_jax.policies import open_base
from fpo_jax.provenance import tree_crc32
from fpo_jax.rollout import FrozenBase, rollout, start
from tiny import keys
from tiny_libero import LIBERO, base_system, fake_libero
options = tyro.cli(TrainConfig).parallel
hosts.connect(options)
with parallel.using(parallel.make_mesh(options, 4)), hosts.one_for_all(ZeroDivisionError), fake_libero() as env:
    system = base_system(env, replace(LIBERO, num_envs=4))
    def play(keys, key):
        return rollout(system, FrozenBase({}), None, start(system, keys), key, 5)[1].state
    states = parallel.jit(play)(keys(4), jax.random.key(1))
    whole = parallel.here(parallel.place_weights(open_base("aloha_transfer_cube")[1]()))
    with parallel.using(None):
        crc = tree_crc32(whole)
    print(json.dumps([sorted(env.vector.pids()), float(np.asarray(states).sum()), crc]))
"""


def test_each_process_has_its_own_simulators_and_a_copy_of_the_base():
    """Slots are numbered over all processes; one that is not the first starts one more, to ask for the tasks."""
    done = finish(start(2, ["-c", _SIMULATORS]))
    assert [code for code, *_ in done] == [0, 0], done
    (slots, total, crc), (other_slots, other_total, other_crc) = (
        json.loads(said.splitlines()[-1]) for _, said, _ in done
    )
    assert slots == [0, 1] and other_slots == [0, 2, 3]
    assert total == other_total
    assert crc == other_crc == tree_crc32(open_base("aloha_transfer_cube")[1]())


@pytest.mark.slow
@pytest.mark.parametrize("victim", [2, 0])
def test_when_one_process_dies_the_others_end_and_the_run_goes_on(alone, tmp_path, victim):
    """4 processes; one is killed in the middle, and two processes finish the run."""
    run_dir = tmp_path / "run"
    endless = [str(TRAIN), *TINY, "--iterations", "100000", "--run-dir", str(run_dir)]
    processes = start(4, endless)
    wait_for_metrics(run_dir, 2, processes)
    os.kill(processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    processes[victim].communicate()
    others = [process for index, process in enumerate(processes) if index != victim]
    done = finish(others)
    assert time.monotonic() - began < 10 * hosts.SILENCE_SECONDS  # and not for ever
    assert all(code not in (0, None) for code, *_ in done), done
    if victim:  # where the first one is gone, JAX's own abort may be quicker
        assert [code for code, *_ in done] == [TRY_AGAIN] * 3, done
        assert all("the run is no longer whole" in errors for *_, errors in done), done
    finished = len(metrics(run_dir))
    resumed = [str(TRAIN), "--resume", "--run-dir", str(run_dir), "--iterations", str(finished + 2)]
    again = finish(start(2, resumed))
    assert [code for code, *_ in again] == [0, 0], again
    assert [line["iteration"] for line in metrics(run_dir)] == list(range(1, finished + 3))
    for one, other in zip(metrics(run_dir)[:2], metrics(alone), strict=True):
        np.testing.assert_allclose(one["critic_loss"], other["critic_loss"], rtol=1e-4)
