"""Paired evaluation: base and tuned policy on the same initial states and the same noise seeds."""

from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fpo_jax import parallel
from fpo_jax.algorithms import fixed
from fpo_jax.metrics import Interval, paired_difference_interval, wilson_interval
from fpo_jax.rollout import FrozenBase, System, base_system, rollout, start
from fpo_jax.types import EnvSpec, FpoError, HostedEnv


class Outcomes(NamedTuple):
    """One entry per episode."""

    success: Bool[np.ndarray, " E"]
    control_steps: Int[np.ndarray, " E"]  # length of the episode
    ret: Float[np.ndarray, " E"]  # Σ γ^t r_t
    invalid: Bool[np.ndarray, " E"]  # the simulation broke: neither success nor failure
    env_id: Int[np.ndarray, " E"] | None = None  # which task of a suite


def _play(
    system: System,
    base: FrozenBase,
    agent: PyTree,
    env_keys: Key[Array, " N"],
    numbers: Int[Array, " N"] | None,
    key: Key[Array, ""],
) -> tuple[Array, Array, Array, Array, Array]:
    """One whole episode in each of N environments: the fields of `Outcomes`."""
    begun = start(system, env_keys, numbers)
    _, _, episodes = rollout(system, base, agent, begun, key, system.env.spec.decisions)
    over = episodes.ended | episodes.fault
    missing = begun.env.fault | ~jnp.any(over, axis=0)  # simulators that broke before the first decision
    first = jnp.argmax(over, axis=0)  # later slots belong to the next episode

    def at_end(x):
        return jnp.take_along_axis(x, first[None], axis=0)[0]

    success, invalid = at_end(episodes.success) & ~missing, at_end(episodes.fault) | missing
    return success, at_end(episodes.control_steps), at_end(episodes.ret), invalid, begun.env.env_id


class Evaluator:
    """Plays episodes of a fixed set of initial states; every policy meets the same states and noise seeds.

    `batch` environments run at a time; `episodes` need not be a multiple of it. Each algorithm compiles once. Where the
    environment has numbered test episodes, they are played in order. On several devices each plays its share of a
    batch, which is rounded up to a multiple of their number; every process gets all outcomes.
    """

    def __init__(self, system: System, base: FrozenBase, episodes: int, seed: int, batch: int | None = None):
        self.system, self.base, self.episodes = system, base, episodes
        batch = min(batch or system.config.num_envs, episodes)
        self.batch = batch = -(-batch // parallel.num_devices()) * parallel.num_devices()
        self.num_batches = -(-episodes // batch)
        env_key, noise_key = jax.random.split(jax.random.key(seed))
        self._env_keys = jax.random.split(env_key, (self.num_batches, batch))
        self._noise_keys = jax.random.split(noise_key, self.num_batches)
        numbers = jnp.arange(self.num_batches * batch).reshape(-1, batch)
        self._numbers = numbers if system.env.spec.test_episodes else [None] * self.num_batches
        self._compiled = {}

    def play(self, agent: PyTree, system: System | None = None, noise_seed: int = 0) -> Outcomes:
        """All episodes with this agent; another `noise_seed` draws other noise for the same initial states.

        `system`: the evaluator's own, or a variant of it (`fixed_system`, `base_system`).
        """
        batches = []
        for env_keys, noise_key, numbers in zip(self._env_keys, self._noise_keys, self._numbers, strict=True):
            noise_key = jax.random.fold_in(noise_key, noise_seed)
            batches.append(self.play_from(agent, env_keys, noise_key, system, numbers))
        columns = zip(*batches, strict=True)
        return Outcomes(*(np.concatenate(column)[: self.episodes] for column in columns))

    def play_from(
        self,
        agent: PyTree,
        env_keys: Key[Array, " N"],
        noise_key: Key[Array, ""],
        system: System | None = None,
        numbers: Int[Array, " N"] | None = None,
    ) -> Outcomes:
        """One batch of episodes from given initial-state keys, or the test episodes of these numbers.

        Raises FpoError where simulators outside this process cannot go on.
        """
        system = system or self.system
        if system not in self._compiled:
            self._compiled[system] = parallel.jit(partial(_play, system))
        outcomes = Outcomes(*jax.device_get(self._compiled[system](self.base, agent, env_keys, numbers, noise_key)))
        if isinstance(system.env, HostedEnv) and (problem := system.env.problem()):
            raise FpoError(f"The evaluation stopped: {problem}. Mend what ends them, then evaluate again.")
        return outcomes

    @cached_property
    def fixed_system(self) -> System:
        """The same system with latents that do not depend on the state (agents of `algorithms.fixed`)."""
        return replace(self.system, algorithm=fixed)

    @cached_property
    def base_system(self) -> System:
        """The frozen base: N(0, I) in a latent space that keeps its noise distribution, as `repeat` does not."""
        return base_system(self.system)

    @property
    def base_agent(self) -> fixed.FixedLatent:
        """The agent of `base_system`."""
        return fixed.base(self.base_system.dims.latent)

    def keys_of(self, episode: int, noise_seed: int = 0) -> tuple[Key[Array, " N"], Key[Array, ""], int]:
        """(initial-state keys, noise key) of the batch that holds an episode, and its column in it."""
        batch, column = divmod(episode, self._env_keys.shape[1])
        return self._env_keys[batch], jax.random.fold_in(self._noise_keys[batch], noise_seed), column

    def play_base(self, noise_seed: int = 0) -> Outcomes:
        """All episodes with the frozen base alone."""
        return self.play(self.base_agent, self.base_system, noise_seed)


def success_summary(outcomes: Outcomes) -> dict[str, Any]:
    """Success rate of the valid episodes, its Wilson 95 % interval, and the mean episode length [control steps]."""
    valid = ~outcomes.invalid
    interval = wilson_interval(int(outcomes.success[valid].sum()), int(valid.sum()))
    return {
        "success_rate": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "episodes": int(valid.sum()),
        "invalid_episodes": int(outcomes.invalid.sum()),
        "episode_length": float(outcomes.control_steps[valid].mean()) if valid.any() else float("nan"),
    }


def paired_difference(base: Outcomes, tuned: Outcomes) -> Interval:
    """Difference of the success rates, tuned - base, over the episodes valid in both; Newcombe's paired interval."""
    valid = ~base.invalid & ~tuned.invalid
    return paired_difference_interval(base.success[valid], tuned.success[valid])


def _difference(base: Outcomes, tuned: Outcomes) -> dict[str, Any]:
    difference = paired_difference(base, tuned)
    return {
        "success_rate": difference.estimate,
        "low": difference.low,
        "high": difference.high,
        "interval": "Newcombe's paired interval (method 10), 95 %",
    }


def task_summaries(outcomes: Outcomes, tasks: tuple[str, ...]) -> dict[str, Any]:
    """`success_summary` of each task of a suite that was played; {} where there is one task."""
    if outcomes.env_id is None or len(tasks) < 2:
        return {}
    rows = {name: outcomes.env_id == index for index, name in enumerate(tasks)}
    columns = (*outcomes[:-1], outcomes.env_id)
    parts = {name: Outcomes(*(column[row] for column in columns)) for name, row in rows.items() if row.any()}
    return {"tasks": {name: success_summary(part) for name, part in parts.items()}}


def compare(base: Outcomes, tuned: Outcomes, spec: EnvSpec | None = None) -> dict[str, Any]:
    """`base`, `tuned` and `difference`, as `experiments/evaluate.py` writes them; `spec`: tasks and protocol too."""
    tasks = () if spec is None else spec.tasks
    result = {name: success_summary(o) | task_summaries(o, tasks) for name, o in {"base": base, "tuned": tuned}.items()}
    protocol = {} if spec is None or spec.protocol is None else {"protocol": spec.protocol}
    return result | {"difference": _difference(base, tuned)} | protocol


def versus(floor: Outcomes, tuned: Outcomes) -> dict[str, Any]:
    """A floor's own success, and by how much the tuned policy is above it."""
    return success_summary(floor) | {"tuned_above": _difference(floor, tuned)}


def report(result: dict[str, Any]) -> str:
    """The result of `compare`, in words; floors too where there are any."""
    lines = []
    floors = result.get("floors", {})
    for name, r in {"base": result["base"], "tuned": result["tuned"], **floors}.items():
        interval = f"{r['success_rate']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
        lines.append(
            f"{name:>15}: success {interval} over {r['episodes']} episodes, {r['episode_length']:.0f} steps each"
        )
    differences = {"base": result["difference"]} | {name: floor["tuned_above"] for name, floor in floors.items()}
    for name, d in differences.items():
        lines.append(
            f"tuned - {name:>7}: {d['success_rate']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}] ({d['interval']})"
        )
    return "\n".join(lines)
