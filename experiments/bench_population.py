"""How fast a population trains, against its members one after the other.

python experiments/bench_population.py --train.env point_mass

python experiments/bench_population.py --train.env aloha_transfer_cube --train.num-envs 16

One iteration of P members in one program, and of one run, in turns; the ratio is P times the one over the other, the
median over rounds. Every ratio becomes a line of benchmarks/<machine>.jsonl.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro
from bench import Record, circumstances, default_machine, measure_and_append, timed
from rich.console import Console
from rich.table import Table

from fpo_jax import population, train
from fpo_jax.config import PopulationOptions, TrainConfig
from fpo_jax.rollout import System
from fpo_jax.runs import build, settled
from fpo_jax.types import FpoError, Params


@dataclass(frozen=True)
class Args:
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """P: members."""
    repeats: int = 5
    """Rounds, after one that warms up."""
    out: Path = Path("benchmarks")
    """Directory of the result file."""
    machine: str | None = None
    """Name of the result file; by default the kind of machine, e.g. cpu-2core-x86_64 or nvidia-h200."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Whose iteration it is; N environments for each member."""


def single(system: System, base_params: Params) -> Callable[[], Any]:
    """Plays and learns one iteration after another."""
    step = jax.jit(partial(train.train_iteration, system))
    state = jax.jit(partial(train.init, system))(base_params)

    def run() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(base_params, state))

    return run


def together(system: System, base_params: Params, size: int) -> Callable[[], Any]:
    """The same of a population."""
    configs = population.members(replace(system.config, population=PopulationOptions(size)))
    step = jax.jit(partial(population.iteration, system))
    state = population.init(system, base_params, configs)

    def run() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(base_params, {}, state))

    return run


def bench(args: Args) -> list[Record]:
    """One record for each P."""
    if args.repeats < 1 or min(args.sizes) < 1:
        raise FpoError("--repeats and --sizes must be at least 1.")
    config = settled(args.train)
    system, base_params = build(config)
    entrants = {0: single(system, base_params)} | {size: together(system, base_params, size) for size in args.sizes}
    rounds = [{size: timed(run)[1:] for size, run in entrants.items()} for _ in range(args.repeats + 1)][1:]
    about = circumstances(args.machine or default_machine())
    records = []
    for size in args.sizes:
        cpu, wall = ([size * turn[0][kind] / turn[size][kind] for turn in rounds] for kind in (0, 1))
        records.append(
            about
            | {
                "measurement": "population",
                "env": config.env,
                "num_envs": config.num_envs,
                "members": size,
                "seconds": statistics.median(turn[size][1] for turn in rounds),
                "ratio_seconds": statistics.median(wall),
                "ratio_cpu_seconds": statistics.median(cpu),
                "lowest": min(wall),
                "highest": max(wall),
            }
        )
    return records


def show(console: Console, records: list[Record]) -> None:
    """The records as a table."""
    first = records[0]
    title = f"{first['env']}, {first['num_envs']} environments per member: P single runs / one population"
    table = Table("P", "seconds per iteration", "per second", "per CPU second", title=title)
    for r in records:
        ratio = f"{r['ratio_seconds']:.2f} [{r['lowest']:.2f}, {r['highest']:.2f}]"
        table.add_row(str(r["members"]), f"{r['seconds']:.3f}", ratio, f"{r['ratio_cpu_seconds']:.2f}")
    console.print(table)


def main(arguments: list[str]) -> int:
    args = tyro.cli(Args, args=arguments, description=__doc__)
    path = args.out / f"{args.machine or default_machine()}.jsonl"
    return measure_and_append(path, Console(), lambda: bench(args), show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
