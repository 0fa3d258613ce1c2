"""Measures LIBERO's workers against hf-libero's own SubprocVectorEnv and a bare robosuite loop, in turn.

python experiments/bench_libero.py --workers 2

The contenders take turns, and a ratio is of CPU time in the same round: it holds on a machine that others use too.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from libero_tasks import cpu_seconds, memory

from fpo_jax.envs import libero_setup
from fpo_jax.envs.host import Episode
from fpo_jax.envs.workers import WorkerPool, WorkerSettings
from fpo_jax.types import FpoError

CAMERAS = ("image", "wrist_image")

# Runs in LIBERO's virtual environment: answers {"chunk": n, "chunks": k} with the CPU and wall time of n x k steps.
CONTENDER = """
import json, multiprocessing, os, resource, sys, time
import numpy as np
from pathlib import Path

assets, kind, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.environ["MUJOCO_GL"] = sys.argv[4]
os.environ["LIBERO_CONFIG_PATH"] = os.path.join(sys.prefix, "libero_config")
import libero.libero
libero.libero._assets_path_cache = assets
from libero.libero.envs import OffScreenRenderEnv, SubprocVectorEnv
from libero.libero.envs.env_wrapper import ControlEnv

bddl = next((Path(libero.libero.__file__).parent / "bddl_files" / "libero_spatial").glob("*between*.bddl"))


def make():
    if kind == "bare":
        env = ControlEnv(str(bddl), use_camera_obs=False, has_offscreen_renderer=False, ignore_done=True)
    else:
        env = OffScreenRenderEnv(bddl_file_name=str(bddl), camera_heights=256, camera_widths=256, ignore_done=True)
    env.seed(0)
    return env


def cpu(pids):
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


env = make() if kind == "bare" else SubprocVectorEnv([make] * workers)
env.env.reset() if kind == "bare" else env.reset()
pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
sizes = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") for pid in pids]
print(json.dumps({"memory": sizes}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    actions = np.random.default_rng(request["seed"]).uniform(-1, 1, (request["chunks"] * request["chunk"], 7))
    cpu_before, before = cpu(pids), time.perf_counter()
    for action in actions:
        env.step(action) if kind == "bare" else env.step(np.tile(action, (workers, 1)))
    wall, used = time.perf_counter() - before, cpu(pids) - cpu_before
    env.env.reset() if kind == "bare" else env.reset()
    print(json.dumps({"cpu": used, "wall": wall}), flush=True)
"""


@dataclass(frozen=True)
class Args:
    workers: int = 2
    chunks: tuple[int, ...] = (5, 10, 50)  # control steps per decision
    steps: int = 100  # control steps of each worker in a round
    rounds: int = 3
    quality: str = "official"  # of our pictures


class Contender:
    """hf-libero's own ways, in a process that starts theirs by forking, as it always does."""

    def __init__(self, kind: str, workers: int, python: Path, assets: Path, opengl: str):
        self.process = subprocess.Popen(
            [str(python), "-P", "-c", CONTENDER, str(assets), kind, str(workers), opengl],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            text=True,
        )
        self.memory = self._answer()["memory"]

    def run(self, chunk: int, chunks: int, seed: int) -> dict[str, float]:
        """CPU and wall time [s]."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"chunk": chunk, "chunks": chunks, "seed": seed}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # robosuite prints too
                return json.loads(line)
        raise FpoError("The contender ended: run the script's CONTENDER by hand to see why.")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Ours:
    """Our workers, each with the same actions."""

    def __init__(self, pool: WorkerPool, workers: int):
        self.pool, self.workers = pool, workers
        self._all(lambda slot: pool.submit_reset(slot, Episode(0, 0, init=0, seed=0, test=False)))

    def run(self, chunk: int, chunks: int, seed: int) -> dict[str, float]:
        """CPU time of the workers and wall time [s]."""
        actions = np.random.default_rng(seed).uniform(-1, 1, (chunks, chunk, 7)).astype(np.float32)
        cpu, before = self._cpu(), time.perf_counter()
        for piece in actions:
            self._all(lambda slot, piece=piece: self.pool.submit_step(slot, piece))
        wall, used = time.perf_counter() - before, self._cpu() - cpu
        self._all(lambda slot: self.pool.submit_reset(slot, Episode(0, 0, init=0, seed=seed, test=False)))
        return {"cpu": used, "wall": wall}

    @property
    def memory(self) -> list[int]:
        return [memory(pid) for pid in self.pool.pids().values()]

    def _cpu(self) -> float:
        return sum(cpu_seconds(pid) for pid in self.pool.pids().values())

    def _all(self, submit) -> None:
        for slot in range(self.workers):
            submit(slot)
        for slot in range(self.workers):
            outcome = self.pool.collect(slot)
            if outcome.failed:
                raise FpoError(f"A worker failed ({outcome.failed}): run experiments/libero_tasks.py.")


@contextmanager
def ours(args: Args, workers: int, cameras: tuple[str, ...], python: Path, assets: Path) -> Iterator[Ours]:
    """Our workers; they end with the block."""
    hello = {"assets": str(assets), "image_size": 224, "cameras": list(cameras), "max_chunk": max(args.chunks)}
    hello["quality"] = args.quality
    reset = {"suite": "libero_spatial", "order": "episode"}
    pool = WorkerPool(WorkerSettings(libero_setup.worker_command(python), hello, reset))
    try:
        yield Ours(pool, workers)
    finally:
        pool.close()


def measure(args: Args) -> Iterator[str]:
    """The lines of two tables. Raises FpoError where LIBERO is not set up."""
    python, assets = libero_setup.find()
    opengl = libero_setup.read_record(libero_setup.default_venv()).get("opengl", "egl")
    with ExitStack() as ending:
        own = ending.enter_context(ours(args, args.workers, CAMERAS, python, assets))
        theirs = Contender("vector", args.workers, python, assets, opengl)
        ending.callback(theirs.close)
        yield f"Two cameras, {args.workers} workers, median of {args.rounds} rounds: control steps per second."
        yield "| steps per decision | ours | hf-libero | ratio (wall) | ratio (CPU time) |"
        yield "| --- | --- | --- | --- | --- |"
        for chunk in args.chunks:
            yield _row(str(chunk), own, theirs, chunk, args, args.workers)
        yield f"Memory per worker: ours {_mib(own.memory)}, hf-libero {_mib(theirs.memory[1:])}."
    with ExitStack() as ending:
        own = ending.enter_context(ours(args, 1, (), python, assets))
        theirs = Contender("bare", 1, python, assets, opengl)
        ending.callback(theirs.close)
        yield "No cameras, 1 worker against a bare robosuite loop: control steps per second."
        yield "| steps per decision | ours | robosuite | ratio (wall) | ratio (CPU time) |"
        yield "| --- | --- | --- | --- | --- |"
        for chunk in args.chunks:
            yield _row(str(chunk), own, theirs, chunk, args, 1)
        yield f"Memory: ours {_mib(own.memory)}, robosuite {_mib(theirs.memory)}."


def _row(name: str, own: Ours, theirs: Contender, chunk: int, args: Args, workers: int) -> str:
    chunks = max(1, args.steps // chunk)
    steps, speeds, ratios = chunk * chunks * workers, ([], []), ([], [])
    for seed in range(args.rounds + 1):
        a, b = own.run(chunk, chunks, seed), theirs.run(chunk, chunks, seed)
        if seed > 0:  # the first warms up
            speeds[0].append(steps / a["wall"])
            speeds[1].append(steps / b["wall"])
            ratios[0].append(b["wall"] / a["wall"])
            ratios[1].append(b["cpu"] / a["cpu"])
    values = [statistics.median(each) for each in (*speeds, *ratios)]
    return f"| {name} | {values[0]:.1f} | {values[1]:.1f} | {values[2]:.2f} | {values[3]:.2f} |"


def _mib(sizes: list[int]) -> str:
    return " / ".join(f"{size / 2**20:.0f} MiB" for size in sizes)


if __name__ == "__main__":
    try:
        for text in measure(tyro.cli(Args, description=__doc__)):
            print(text, flush=True)
    except FpoError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
