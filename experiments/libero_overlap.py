"""Shows that LIBERO's simulators work while the policy decides: who works when, by the clock, with overlap and without.

python experiments/libero_overlap.py --out docs/figures/libero_overlap.png

The policy is π0's own code with random weights, two cameras and the size of `bench_pi0.py --model`: it has to take
time, and need not solve anything. An episode begins with the trace, and none ends in it.
"""

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench_pi0 import MODELS, random_params
from jaxtyping import Float

from fpo_jax.algorithms import fixed, fpo
from fpo_jax.analysis import Span, check_figure_path, timeline
from fpo_jax.config import LiberoOptions, TrainConfig
from fpo_jax.envs import wire
from fpo_jax.envs.host import Episode, HostEnv, Outcome
from fpo_jax.envs.libero import make_libero
from fpo_jax.envs.workers import WorkerPool
from fpo_jax.latent import LatentSpace
from fpo_jax.policies.openpi import SIMULATED_CAMERAS, OpenpiPolicy
from fpo_jax.policies.openpi_configs import OPENPI_CONFIGS
from fpo_jax.policies.transforms import NormStats
from fpo_jax.rollout import FrozenBase, System, base_system, rollout, start
from fpo_jax.types import Camera, FpoError


@dataclass(frozen=True)
class Args:
    env: str = "libero_10/0"
    """LIBERO task."""
    num_envs: int = 2
    """Simulators, an even number: half of them work while the policy decides for the other half."""
    decisions: int = 8
    """Decisions of each, that are traced."""
    execute_steps: int = 10
    """Control steps per decision."""
    model: Literal["dummy-ti", "dummy-so400m"] = "dummy-ti"
    """Size of the policy, as in bench_pi0.py."""
    out: Path = Path("docs/figures/libero_overlap.png")
    """Figure to write (.png, .svg or .pdf)."""


class Event(NamedTuple):
    """A moment of a slot: its request began, its worker has answered, its answer was taken."""

    kind: Literal["submitted", "answered", "collected"]
    slot: int
    time: float


class Traced:
    """A `WorkerPool` (as a `host.HostVectorEnv`) that writes down when requests begin and when their answers arrive."""

    def __init__(self, pool: WorkerPool):
        self.pool, self.events = pool, list[Event]()
        self._watchers = dict[int, threading.Thread]()
        self.prepare, self.problem, self.report, self.close = pool.prepare, pool.problem, pool.report, pool.close

    def submit_reset(self, slot: int, episode: Episode) -> None:
        self.pool.submit_reset(slot, episode)

    def submit_step(self, slot: int, actions: Float[np.ndarray, "k a"]) -> None:
        self._note("submitted", slot)
        self.pool.submit_step(slot, actions)
        self._watchers[slot] = threading.Thread(target=self._watch, args=(slot,), daemon=True)
        self._watchers[slot].start()

    def collect(self, slot: int) -> Outcome:
        if slot in self._watchers:
            self._watchers.pop(slot).join()  # an answer that is taken can no longer be seen to arrive
        outcome = self.pool.collect(slot)
        self._note("collected", slot)
        return outcome

    def _watch(self, slot: int) -> None:
        if self.pool.answered(slot, self.pool.settings.step_seconds):
            self._note("answered", slot)

    def _note(self, kind: Literal["submitted", "answered", "collected"], slot: int) -> None:
        self.events.append(Event(kind, slot, time.perf_counter()))


def spans_of(events: Sequence[Event], num_envs: int, groups: Sequence[str]) -> list[Span]:
    """Who worked when, in seconds since the first request; `groups`: the parts of the slots that take turns.

    The policy decides for a group from the last request of another group, or the last answer taken, to its request.
    """
    events = sorted(events, key=lambda event: event.time)
    asked, deciding, simulating = dict[int, float](), [], []  # slot -> time of its request
    before: Event | None = None  # other than an answer that arrives
    for event in events:
        group, now = groups[event.slot * len(groups) // num_envs], event.time - events[0].time
        if event.kind == "answered":
            simulating.append(Span(f"simulator {event.slot}", group, asked[event.slot], now))
            continue
        if event.kind == "submitted":
            asked[event.slot] = now
            same = before and before.kind == "submitted" and groups[before.slot * len(groups) // num_envs] == group
            if before and not same:
                deciding.append(Span("policy", group, before.time - events[0].time, now))
        before = event
    return deciding + sorted(simulating, key=lambda span: span.who)


def hidden_share(spans: Sequence[Span]) -> float:
    """The share of the policy's time in which a simulator worked too."""
    deciding = [span for span in spans if span.who == "policy"]
    edges = sorted({edge for span in spans for edge in (span.begin, span.end)})
    hidden = sum(
        last - first
        for first, last in pairwise(edges)
        if any(s.begin <= first and last <= s.end for s in deciding)
        and any(s.begin <= first and last <= s.end for s in spans if s.who != "policy")
    )
    return hidden / sum(span.end - span.begin for span in deciding)


def make_system(args: Args) -> tuple[System, FrozenBase, HostEnv]:
    """The base alone on LIBERO. Raises FpoError where LIBERO is not set up."""
    config = replace(OPENPI_CONFIGS["pi0_libero"], model=MODELS[args.model], prompt="any words", delta_actions=False)
    base = OpenpiPolicy(config, SIMULATED_CAMERAS["libero"], prompt=tuple(range(3, 20)))
    sizes = {"state": wire.PROPRIO_DIM, "actions": wire.ACTION_DIM}
    norm = {name: NormStats(jnp.zeros(size), jnp.ones(size)) for name, size in sizes.items()}
    params = FrozenBase({"model": random_params(config.model), "norm": norm})
    cameras = [Camera(name, base.image_size) for name in base.cameras]
    env = make_libero(args.env, cameras, LiberoOptions(), execute_steps=args.execute_steps)
    if args.decisions * args.execute_steps >= env.spec.episode_length:
        raise FpoError(f"An episode of {args.env} has {env.spec.episode_length} control steps: trace fewer decisions.")
    space = LatentSpace("full", base.horizon, base.output_dim)
    return base_system(System(TrainConfig(num_envs=args.num_envs), env, base, space, fpo)), params, env


def trace(args: Args, system: System, params: FrozenBase, env: HostEnv, overlap: bool) -> list[Span]:
    """The spans of a rollout, after one that compiles."""
    env.overlap = overlap
    agent, keys = fixed.base(system.dims.latent), jax.random.split(jax.random.key(0), args.num_envs)
    play = jax.jit(partial(rollout, system, num_decisions=args.decisions))
    assert isinstance(env.vector, Traced)
    for _ in range(2):
        carry = jax.block_until_ready(start(system, keys))
        env.vector.events.clear()
        jax.block_until_ready(play(params, agent, carry, jax.random.key(1)))
    if env.report()["worker_restarts"]:
        raise FpoError("A simulator broke: run experiments/libero_tasks.py to see which task does not work.")
    return spans_of(env.vector.events, args.num_envs, ("first half", "second half") if overlap else ("all",))


def main(args: Args) -> None:
    check_figure_path(args.out)
    if args.num_envs < 2 or args.num_envs % 2 or args.decisions < 2:
        raise FpoError("--num-envs must be an even number, and --decisions at least 2.")
    system, params, env = make_system(args)
    assert isinstance(env.vector, WorkerPool)
    env.vector = Traced(env.vector)
    panels = {}
    try:
        for overlap in (True, False):
            spans = trace(args, system, params, env, overlap)
            deciding = sum(span.end - span.begin for span in spans if span.who == "policy")
            name = "the halves take turns" if overlap else "all together"
            told = f"{name}: {max(span.end for span in spans):.2f} s, of which the policy decides {deciding:.2f} s"
            told += f", {hidden_share(spans):.0%} of that while a simulator works"
            panels[told] = spans
            print(told, flush=True)
    finally:
        env.close()
    title = f"{args.env}: {args.num_envs} simulators, {args.decisions} decisions of {args.execute_steps} steps each"
    print(f"Figure: {timeline(panels, args.out, title=f'{title}, π0 {args.model}')}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except FpoError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
