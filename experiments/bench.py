"""How fast: physics backends against the raw C loop and gym-aloha, and where the time of a training iteration goes.

python experiments/bench.py

python experiments/bench.py --pixels --mjx --batch-sizes 8 32

python experiments/bench.py --mjx --warp --batch-sizes 256 1024 4096 8192 --train.num-envs 1024   # on a GPU

Everything that is compared is measured in one run, in turns (A B C A B C ...), and the figures are medians. "Per CPU
second" divides by the CPU time of the whole process and of those that render for it, so it holds on a machine that is
busy with other things; wall time does not. Every measurement becomes a line of benchmarks/<machine>.jsonl.
"""

import json
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from bench_contenders import (
    GYM,
    GYM_PIXELS,
    GYM_STATE,
    OURS,
    OURS_PIXELS,
    PEERS,
    RAW,
    Contender,
    Workload,
    gym_vector,
    gym_with_pixels,
    jax_env,
    pixel_env,
    raw_loop,
    workload,
)
from rich.console import Console
from rich.table import Table

from fpo_jax import train
from fpo_jax.config import TrainConfig
from fpo_jax.envs import make_env
from fpo_jax.envs.aloha_mujoco import AlohaMujoco
from fpo_jax.envs.aloha_render import shared_pool
from fpo_jax.envs.common import num_cpus
from fpo_jax.provenance import provenance
from fpo_jax.rollout import FrozenBase, System, observe, residual_noise, slot_keys
from fpo_jax.runs import build
from fpo_jax.train import TrainState
from fpo_jax.types import FpoError, Params

Record = dict[str, Any]

TARGETS = {  # least env-steps per CPU second of ours, as a multiple of theirs
    (OURS, RAW): 0.75,
    (OURS, GYM): 1.5,
    (OURS_PIXELS["official"], GYM_PIXELS): 50.0,
}


@dataclass(frozen=True)
class Args:
    out: Path = Path("benchmarks")
    """Directory of the result file."""
    machine: str | None = None
    """Name of the result file; by default the kind of machine, e.g. cpu-2core-x86_64 or nvidia-h200."""
    repeats: int = 5
    """Rounds; the figures are medians over them."""
    throughput: bool = True
    """Compare the backends."""
    phases: bool = True
    """Take a training iteration apart."""
    num_envs: int = 64
    """Environments of the C backend, and episodes of the raw loop."""
    gym_envs: int = 8
    """Environments in gym-aloha's vector environment, which steps them one after the other."""
    threads: int | None = None
    """Threads of the C backend and of the raw loop; by default one per CPU."""
    max_steps: int = 200
    """Control steps per environment and round, at most; fewer where an episode succeeds before (see `workload`)."""
    pixels: bool = False
    """Also gym-aloha as shipped, and the C backend with pictures; needs OpenGL, and takes minutes."""
    pixel_envs: int = 16
    """Environments of the C backend with pictures."""
    mjx: bool = False
    """Also MJX, impl jax; compiles for a minute or more."""
    warp: bool = False
    """Also MJX-Warp; needs an NVIDIA GPU and the extra `warp`."""
    batch_sizes: tuple[int, ...] = (8,)
    """Environments of MJX and MJX-Warp."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Whose iteration is taken apart."""


# --- env-steps per second -------------------------------------------------------------------------------------------


def contenders(args: Args, work: Workload) -> list[Contender]:
    """All that the options ask for."""
    threads = args.threads or num_cpus()
    pixels = []
    if args.pixels:
        pixels = [gym_with_pixels(work)]  # first: it decides what gym-aloha renders with
        pixels += [pixel_env(quality, work, args.pixel_envs, threads) for quality in ("official", "fast")]
    ours = AlohaMujoco(execute_steps=work.chunk, num_threads=threads)
    found = [
        raw_loop(work, args.num_envs, threads),
        jax_env(OURS, ours, work, args.num_envs, threads),
        gym_vector(GYM, work, args.gym_envs),
        gym_vector(GYM_STATE, work, args.gym_envs),
        *pixels,
    ]
    for physics in [name for name, wanted in (("mjx", args.mjx), ("warp", args.warp)) if wanted]:
        env = make_env("aloha_transfer_cube", physics, execute_steps=work.chunk)
        found += [jax_env(f"fpo_jax {physics}", env, work, batch, threads) for batch in args.batch_sizes]
    return found


def timed(call: Callable[[], Any], cpu_seconds: Callable[[], float] = time.process_time) -> tuple[Any, float, float]:
    """(result, CPU seconds of the whole process, wall seconds)."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    result = call()
    return result, cpu_seconds() - cpu, time.perf_counter() - wall


def throughput(args: Args, console: Console) -> list[Record]:
    """Rates of all contenders, and ratios: medians over rounds that go through all of them."""
    work = workload(args.max_steps)
    entrants, first_seconds, rounds = [], {}, {}
    for contender in contenders(args, work):
        console.print(f"Warming up: {contender.name}, {contender.num_envs} environments", markup=False)
        try:
            _, _, first_seconds[contender] = timed(contender.play)
            entrants.append(contender)
        except jax.errors.JaxRuntimeError as error:  # a batch too large for the memory spoils no other measurement
            console.print(f"Left out: {str(error).splitlines()[0]}", markup=False)
    for number in range(args.repeats):
        console.print(f"Backends: round {number + 1} of {args.repeats}")
        for contender in entrants:
            steps, cpu, wall = timed(contender.play, contender.cpu_seconds)
            rounds.setdefault(contender, []).append((steps / cpu, steps / wall))
    records = []
    for contender in entrants:
        per_cpu_second, per_second = map(statistics.median, zip(*rounds[contender], strict=True))
        records.append(
            {
                "measurement": "env_steps",
                "contender": contender.name,
                "num_envs": contender.num_envs,
                "threads": contender.threads,
                "env_steps_per_cpu_second": per_cpu_second,
                "env_steps_per_second": per_second,
                "first_round_seconds": first_seconds[contender],  # compilation included
            }
        )
    return records + ratios(rounds)


def ratios(rounds: dict[Contender, list[tuple[float, float]]]) -> list[Record]:
    """The C backend against its peers per CPU second, with pictures where they have them; MJX and Warp against it per
    wall second.

    rounds: (env-steps per CPU second, per second) of each round; the rates of one round are divided by each other.
    """
    named = {contender.name: contender for contender in rounds}
    ours, with_pixels = named[OURS], [named[name] for name in OURS_PIXELS.values() if name in named]
    pairs = []  # (one, other, column)
    for contender in rounds:
        if contender.name == GYM_PIXELS:
            pairs += [(one, contender, 0) for one in with_pixels]
        elif contender.name in (RAW, *PEERS):
            pairs.append((ours, contender, 0))
        elif contender is not ours and contender not in with_pixels:
            pairs.append((contender, ours, 1))
    found = []
    for one, other, column in pairs:
        of_rounds = [a[column] / b[column] for a, b in zip(rounds[one], rounds[other], strict=True)]
        found.append(
            {
                "measurement": "ratio",
                "contender": one.name,
                "num_envs": one.num_envs,
                "to": other.name,
                "per": ("CPU second", "second")[column],
                "ratio": statistics.median(of_rounds),
                "lowest": min(of_rounds),
                "highest": max(of_rounds),
                "target": TARGETS.get((one.name, other.name)),
            }
        )
    return found


# --- a training iteration -------------------------------------------------------------------------------------------


def compiled_phases(system: System) -> dict[str, Callable]:
    """The parts of `train_iteration`, each a program of its own."""

    def decode(base_params, context, latent, keys):
        noise = system.latent_space.expand(latent, residual_noise(system, keys))
        return system.base.decode(base_params, context, noise)

    parts = {
        "encode": partial(observe, system),
        "act": partial(system.algorithm.act, system.config),
        "decode": decode,
        "physics": system.env.step,
        "update": partial(train.update_phase, system),
    }
    return {name: jax.jit(part) for name, part in parts.items()}


def cpu_clock(system: System) -> Callable[[], float]:
    """CPU seconds of this process, and of those that render for it."""
    if not system.base.cameras:
        return time.process_time
    pool = shared_pool()
    return lambda: time.process_time() + pool.cpu_seconds()


def phase_times(
    system: System, phases: dict[str, Callable], base: FrozenBase, state: TrainState
) -> dict[str, tuple[float, float]]:
    """(CPU seconds, wall seconds) of each phase, summed over the decisions of one iteration."""
    spent = dict.fromkeys(phases, (0.0, 0.0))
    clock = cpu_clock(system)

    def run(name: str, *inputs: Any) -> Any:
        result, cpu, wall = timed(lambda: jax.block_until_ready(phases[name](*inputs)), clock)
        spent[name] = spent[name][0] + cpu, spent[name][1] + wall
        return result

    env_state = state.rollout.env
    for key in jax.random.split(state.key, system.decisions):
        keys = jax.block_until_ready(slot_keys(key, system.config.num_envs))
        features, context = run("encode", base, env_state)
        sample = run("act", state.agent, features, keys)
        chunk = run("decode", base.params, context, sample.latent, keys)
        env_state = run("physics", env_state, chunk)
    run("encode", base, env_state)  # the next state of the last decision
    run("update", state.agent, state.window, state.key)
    return spent


def iteration(args: Args, console: Console) -> list[Record]:
    """Whole iterations and their phases, compilation, retraces and peak memory."""
    system, base_params = build(args.train)
    traces = 0

    def counted(base_params: Params, state: TrainState) -> Any:
        nonlocal traces
        traces += 1  # Python runs when JAX traces, not when the program runs
        return train.train_iteration(system, base_params, state)

    iterate, phases = jax.jit(counted), compiled_phases(system)
    console.print(f"Compiling train_iteration: {args.train.env}, {args.train.num_envs} environments")
    state = jax.jit(partial(train.init, system))(base_params)
    clock = cpu_clock(system)
    (state, _), first_cpu, first_wall = timed(lambda: jax.block_until_ready(iterate(base_params, state)), clock)
    base = FrozenBase(base_params, state.features)
    phase_times(system, phases, base, state)  # compiles
    whole, parts = [], []
    for number in range(args.repeats):
        console.print(f"Iterations: round {number + 1} of {args.repeats}")
        parts.append(phase_times(system, phases, base, state))
        (state, _), cpu, wall = timed(lambda state=state: jax.block_until_ready(iterate(base_params, state)), clock)
        whole.append((cpu, wall))
    about = {"env": args.train.env, "physics": type(system.env).__name__, "num_envs": args.train.num_envs}

    def seconds(samples: list[tuple[float, float]]) -> Record:
        cpu, wall = (statistics.median(column) for column in zip(*samples, strict=True))
        return {"cpu_seconds": cpu, "seconds": wall}

    records = [{"measurement": "phase", "phase": name, **seconds([p[name] for p in parts]), **about} for name in phases]
    total = seconds(whole)
    records.append({"measurement": "phase", "phase": "train_iteration", **total, **about})
    compile_seconds = {
        "compile_cpu_seconds": max(first_cpu - total["cpu_seconds"], 0.0),
        "compile_seconds": max(first_wall - total["seconds"], 0.0),  # tracing included
    }
    records.append({"measurement": "compilation", **compile_seconds, "retraces": traces - 1, **about})
    return [*records, {"measurement": "memory", **peak_memory(), **about}]


def peak_memory() -> Record:
    """Most memory this process has held so far, on the host and on the accelerator [bytes]."""
    unit = 1 if sys.platform == "darwin" else 1024
    on_device = jax.devices()[0].memory_stats() or {}  # None on CPU
    return {
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_device_bytes": on_device.get("peak_bytes_in_use"),
    }


# --- report ---------------------------------------------------------------------------------------------------------


def default_machine() -> str:
    """The kind of machine, not its name."""
    if jax.default_backend() == "cpu":
        return f"cpu-{num_cpus()}core-{platform.machine()}"
    return jax.devices()[0].device_kind.lower().replace(" ", "-")


def circumstances(machine: str) -> Record:
    """What every line says about when, where and with what it was measured."""
    about = provenance()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "device": jax.devices()[0].device_kind,
        "load_average": os.getloadavg()[0],  # above 0 before the run begins: others use this machine too
        "git_revision": about["git_revision"],
        "python": about["python"],
        "versions": {**about["versions"], "gym-aloha": version("gym-aloha")},
    }


def show(console: Console, records: list[Record]) -> None:
    """The same figures as tables."""

    def rows(kind: str) -> list[Record]:
        return [record for record in records if record["measurement"] == kind]

    if rows("env_steps"):
        table = Table("backend", "environments", "threads", "per CPU second", "per second", title="env-steps")
        for r in rows("env_steps"):
            rates = f"{r['env_steps_per_cpu_second']:,.0f}", f"{r['env_steps_per_second']:,.0f}"
            table.add_row(r["contender"], str(r["num_envs"]), str(r["threads"]), *rates)
        console.print(table)
    for r in rows("ratio"):
        target = f"; target {r['target']}" if r["target"] else ""
        spread = f"[{r['lowest']:.2f}, {r['highest']:.2f}]"
        text = f"{r['contender']} ({r['num_envs']}) / {r['to']}, per {r['per']}: {r['ratio']:.2f} {spread}{target}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if rows("phase"):
        table = Table("phase", "CPU seconds", "seconds", title="one training iteration")
        for r in rows("phase"):
            table.add_row(r["phase"], f"{r['cpu_seconds']:.3f}", f"{r['seconds']:.3f}")
        console.print(table)
    for r in rows("compilation"):
        compilation = f"{r['compile_seconds']:.1f} s ({r['compile_cpu_seconds']:.1f} CPU seconds)"
        console.print(f"Compilation of train_iteration: {compilation}; retraces: {r['retraces']}")
    for r in rows("memory"):
        device = "" if r["peak_device_bytes"] is None else f", device {r['peak_device_bytes'] / 2**30:.2f} GiB"
        console.print(f"Peak memory: host {r['peak_host_bytes'] / 2**30:.2f} GiB{device}")


def bench(args: Args, console: Console) -> list[Record]:
    """All records, in the order in which they were measured. Raises FpoError."""
    for name in ("repeats", "num_envs", "gym_envs", "pixel_envs", "max_steps", "batch_sizes"):
        if np.min(getattr(args, name)) < 1:
            raise FpoError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    about = circumstances(args.machine or default_machine())
    records = iteration(args, console) if args.phases else []  # first: its memory is the process's
    if args.throughput:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium has opinions about gym-aloha's spaces
            records += throughput(args, console)
        for name in (GYM, GYM_STATE):
            console.print(f"{name}: {PEERS[name]}.", markup=False, highlight=False, soft_wrap=True)
    return [about | record for record in records]


def measure_and_append(
    path: Path, console: Console, measure: Callable[[], list[Record]], show: Callable[[Console, list[Record]], None]
) -> int:
    """Measure, show, and append every record to `path` as a line; returns the exit code."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before the minutes of measuring
        records = measure()
        show(console, records)
        with path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
    except (FpoError, OSError) as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    console.print(f"Appended {len(records)} lines to {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def main(arguments: list[str]) -> int:
    args = tyro.cli(Args, args=arguments, description=__doc__)
    console = Console()
    path = args.out / f"{args.machine or default_machine()}.jsonl"
    return measure_and_append(path, console, lambda: bench(args, console), show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
