"""Builds every LIBERO task, resets it to some of its initial states, simulates, draws, and writes what was seen.

python experiments/libero_tasks.py --out tasks.md
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from fpo_jax.envs import libero_files, libero_setup
from fpo_jax.envs.host import Episode, Outcome
from fpo_jax.envs.libero import CAMERAS, find_task
from fpo_jax.envs.workers import WorkerPool
from fpo_jax.types import FpoError, suggestion

IDLE = np.array([[0, 0, 0, 0, 0, 0, -1]], np.float32)


@dataclass(frozen=True)
class Args:
    out: Path | None = None  # file to write the table to, in Markdown
    suites: tuple[str, ...] = libero_files.SUITES
    tasks: tuple[int, ...] | None = None  # of each suite; all where not given
    inits: tuple[int, ...] | None = None  # official initial states; all 50 where not given
    cameras: bool = True  # draw
    idle_steps: int = 20  # after each reset, at rest


class Seen(NamedTuple):
    """One task."""

    suite: str
    task: int
    prompt: str
    objects: int  # that can move
    inits: int  # initial states that were played
    moved: float  # the farthest that an object went while the arm was idle [m]
    done: int  # initial states in which the task was done at once
    build: float  # CPU time of the first reset [s]
    reset: float  # mean CPU time of a later one, its 10 wait steps and pictures included [s]
    step: float  # mean CPU time of a control step without pictures [s]
    pictures: tuple[float, ...]  # standard deviation of each camera's last picture, in 0..255
    memory: int  # of the worker [bytes]
    failed: str


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """Resident memory of a process [bytes]."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def inspect(pool: WorkerPool, suite: str, task: int, prompt: str, inits: list[int], idle_steps: int) -> Seen:
    """Play the beginning of this task from all these initial states."""
    objects, moved, done, resets, steps, outcome = 0, 0.0, 0, [], [], Outcome("none")
    for init in inits:
        pool.submit_reset(0, Episode(task, task, init, seed=init, test=False))
        pid = pool.pids()[0]
        before = cpu_seconds(pid)
        began = pool.collect(0)
        after = cpu_seconds(pid) if not began.failed else before
        resets.append(after - before)
        if began.arrays is None:
            return Seen(suite, task, prompt, 0, len(resets), 0, 0, 0, 0, 0, (), 0, f"init {init}: {began.failed}")
        done += began.success
        pool.submit_step(0, np.repeat(IDLE, idle_steps, axis=0))
        outcome = pool.collect(0)
        if outcome.arrays is None:
            return Seen(suite, task, prompt, 0, len(resets), 0, 0, 0, 0, 0, (), 0, f"init {init}: {outcome.failed}")
        steps.append((cpu_seconds(pid) - after) / max(1, outcome.steps))
        poses = outcome.arrays["objects"]
        objects = int(np.any(poses[:, 3:], axis=1).sum())
        moved = max(moved, float(np.abs(poses[:, :3] - began.arrays["objects"][:, :3]).max()))
    assert outcome.arrays is not None
    pictures = tuple(float(image.std()) for image in outcome.arrays["images"])
    later = float(np.mean(resets[1:] or [0]))
    used = memory(pool.pids()[0])
    return Seen(
        *(suite, task, prompt, objects, len(inits), moved, done, resets[0], later, float(np.mean(steps))),
        *(pictures, used, ""),
    )


def visit(args: Args) -> Iterator[Seen]:
    """What was seen of every task. Raises FpoError for what there is not, and where LIBERO is not set up."""
    if not 1 <= args.idle_steps <= libero_setup.MAX_CHUNK:
        raise FpoError(f"--idle-steps must be 1 to {libero_setup.MAX_CHUNK}, not {args.idle_steps}.")
    for suite in args.suites:
        if suite not in libero_files.SUITES:
            raise FpoError(f"LIBERO has no suite {suite!r}{suggestion(suite, libero_files.SUITES)}")
    python, assets = libero_setup.find()
    for suite in args.suites:
        with libero_setup.worker(python, assets, suite, CAMERAS if args.cameras else ()) as pool:
            known = pool.ask({"op": "tasks"})["suites"][suite]
            names = [task["name"] for task in known]
            wanted = range(len(known)) if args.tasks is None else args.tasks
            for task in [find_task(suite, str(number), names) for number in wanted]:
                inits = list(args.inits if args.inits is not None else range(known[task]["inits"]))
                yield inspect(pool, suite, task, known[task]["prompt"], inits, args.idle_steps)


def row(seen: Seen) -> str:
    """A line of the table."""
    pictures = " / ".join(f"{spread:.0f}" for spread in seen.pictures) or "none"
    cells = [f"{seen.suite}/{seen.task}", seen.prompt, seen.objects, seen.inits, f"{1e3 * seen.moved:.1f}", seen.done]
    cells += [f"{seen.build:.1f}", f"{seen.reset:.2f}", f"{1e3 * seen.step:.1f}", pictures]
    return " | ".join(map(str, ["", *cells, f"{seen.memory / 2**20:.0f}", seen.failed or "works", ""])).strip()


HEAD = (
    "| task | prompt | objects | initial states | moved while idle [mm] | done at reset | first reset [s CPU] "
    "| later reset [s CPU] | step [ms CPU] | spread of pictures | memory [MiB] | seen |\n" + "| --- " * 12 + "|"
)


def main(args: Args) -> int:
    """2 where a task failed, else 0."""
    lines, failed = [HEAD], []
    for seen in visit(args):
        if len(lines) == 1:
            print(HEAD, flush=True)
        failed += [f"{seen.suite}/{seen.task}"] if seen.failed else []
        lines.append(row(seen))
        print(lines[-1], flush=True)
        if args.out is not None:
            args.out.write_text("\n".join(lines) + "\n")
    if failed:
        print(f"Error: {len(failed)} tasks do not work: {', '.join(failed)}.", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except FpoError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
