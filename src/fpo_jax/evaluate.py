"""Paired evaluation: base and tuned policy on the same initial states and the same noise seeds."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fpo_jax import parallel
from fpo_jax.algorithms import fixed
from fpo_jax.metrics import Interval, JsonlWriter, paired_difference_interval, read_jsonl, wilson_interval
from fpo_jax.rollout import FrozenBase, System, base_system, rollout, start
from fpo_jax.types import EnvSpec, FpoError, HostedEnv


class Outcomes(NamedTuple):
    """One entry per episode."""

    success: Bool[np.ndarray, " E"]
    control_steps: Int[np.ndarray, " E"]  # length of the episode
    ret: Float[np.ndarray, " E"]  # Σ γ^t r_t
    invalid: Bool[np.ndarray, " E"]  # the simulation broke: neither success nor failure
    env_id: Int[np.ndarray, " E"] | None = None  # which task of a suite


_DTYPES = (bool, np.int32, np.float32, bool, np.int32)  # of the fields of `Outcomes`


class EpisodeLog:
    """The finished episodes of one policy in a JSONL file, so that a repeated evaluation goes on after them.

    The first line is what was evaluated (`about`), every other one an episode. Raises FpoError where the file is of
    another evaluation, unless that is to be dropped (`anew`). `say`: told how far it is. `writes`: False in all
    processes but one, where several play together.
    """

    def __init__(
        self,
        path: Path,
        about: Mapping[str, Any],
        say: Callable[[str], None] | None = None,
        *,
        anew: bool = False,
        writes: bool = True,
    ):
        about = json.loads(json.dumps(about))
        records = read_jsonl(path) if path.exists() else []
        if records and anew and records[0].get("evaluation") != about:
            records = []
            if writes:
                path.unlink()
        if records:
            _check_same(path, records[0].get("evaluation"), about)
        self.name, self._say = path.stem, say
        self._episodes = {record["episode"]: record for record in records[1:]}
        self._writer = JsonlWriter(path, resumed_iteration=math.inf) if writes else None  # a line cut short goes
        if not records:
            self._write({"evaluation": about})

    @property
    def finished(self) -> int:
        """Episodes that it holds."""
        return len(self._episodes)

    def read(self, numbers: range) -> Outcomes | None:
        """The outcomes of these episodes, None where one is missing."""
        if any(number not in self._episodes for number in numbers):
            return None
        rows = [self._episodes[number] for number in numbers]
        columns = zip(Outcomes._fields, _DTYPES, strict=True)
        return Outcomes(*(np.array([row[name] for row in rows], kind) for name, kind in columns))

    def write(self, numbers: range, outcomes: Outcomes) -> None:
        """Add the outcomes of these episodes, which come first; they are on disk when this returns."""
        for number, *values in zip(numbers, *map(np.asarray, outcomes), strict=False):
            if number not in self._episodes:
                record = {"episode": number} | dict(zip(Outcomes._fields, values, strict=True))
                self._write(record)
                self._episodes[number] = record
        if self._say:
            successes = sum(bool(record["success"]) for record in self._episodes.values())
            self._say(f"{self.name}: {self.finished} episodes so far, {successes} successes")

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(record)


def _check_same(path: Path, before: Any, now: Any) -> None:
    """Raises FpoError naming what changed between two evaluations."""

    def flat(about: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(about, is_leaf=lambda leaf: leaf is None)
        return {jax.tree_util.keystr(keys, simple=True, separator="."): leaf for keys, leaf in leaves}

    if not isinstance(before, dict):
        raise FpoError(f"{path} holds no episodes of an evaluation: choose another --json.")
    old, new = flat(before), flat(now)
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    if changed:
        named = "; ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in changed)
        raise FpoError(
            f"{path} holds episodes of another evaluation ({named}): choose another --json, or remove that file to "
            "begin anew."
        )


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

    def play(
        self, agent: PyTree, system: System | None = None, noise_seed: int = 0, log: EpisodeLog | None = None
    ) -> Outcomes:
        """All episodes with this agent; another `noise_seed` draws other noise for the same initial states.

        `system`: the evaluator's own, or a variant of it (`fixed_system`, `base_system`). Batches that `log` holds are
        not played again.
        """
        played = []
        begun = zip(self._env_keys, self._noise_keys, self._numbers, strict=True)
        for index, (env_keys, noise_key, numbers) in enumerate(begun):
            wanted = range(index * self.batch, min((index + 1) * self.batch, self.episodes))
            outcomes = log.read(wanted) if log else None
            if outcomes is None:
                noise_key = jax.random.fold_in(noise_key, noise_seed)
                outcomes = self.play_from(agent, env_keys, noise_key, system, numbers)
                if log:  # which may hold a part of this batch already, and keeps what it holds
                    log.write(wanted, outcomes)
                    outcomes = log.read(wanted) or outcomes
            played.append(outcomes)
        return Outcomes(*(np.concatenate(column)[: self.episodes] for column in zip(*played, strict=True)))

    def play_from(
        self,
        agent: PyTree,
        env_keys: Key[Array, " N"],
        noise_key: Key[Array, ""],
        system: System | None = None,
        numbers: Int[Array, " N"] | None = None,
    ) -> Outcomes:
        """One batch of episodes from given initial-state keys, or the test episodes of these numbers.

        Raises FpoError where simulators outside this process cannot be started or cannot go on.
        """
        system = system or self.system
        if isinstance(system.env, HostedEnv):
            system.env.prepare(len(env_keys))
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
    """Success rate of the valid episodes, its Wilson 95 % interval, mean discounted return and length [steps]."""
    valid = ~outcomes.invalid

    def mean(values: Float[np.ndarray, " E"] | Int[np.ndarray, " E"]) -> float:
        return float(values[valid].mean()) if valid.any() else float("nan")

    interval = wilson_interval(int(outcomes.success[valid].sum()), int(valid.sum()))
    return {
        "success_rate": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "episodes": int(valid.sum()),
        "invalid_episodes": int(outcomes.invalid.sum()),
        "return": mean(outcomes.ret),
        "episode_length": mean(outcomes.control_steps),
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


def summarize(played: Mapping[str, Outcomes], spec: EnvSpec | None = None) -> dict[str, Any]:
    """`success_summary` of each policy; with `spec` also of each task, and the protocol with its deviations."""
    tasks = () if spec is None else spec.tasks
    result: dict[str, Any] = {name: success_summary(o) | task_summaries(o, tasks) for name, o in played.items()}
    if spec is None or spec.protocol is None:
        return result
    deviations = dict(spec.protocol.get("deviations", {}))
    for num in {len(outcomes.success) for outcomes in played.values()} - {spec.test_episodes}:
        deviations["episodes"] = f"{num} instead of {spec.test_episodes}"
    return result | {"protocol": spec.protocol | {"deviations": deviations}}


def compare(base: Outcomes, tuned: Outcomes, spec: EnvSpec | None = None) -> dict[str, Any]:
    """`base`, `tuned` and `difference`, as `experiments/evaluate.py` writes them; `spec`: tasks and protocol too."""
    return summarize({"base": base, "tuned": tuned}, spec) | {"difference": _difference(base, tuned)}


def competition_rank(success: Float[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """Ranks from 1, the best; ties share the best rank, and the ranks after them are left out (1, 2, 2, 4)."""
    return 1 + np.sum(success[None, :] > success[:, None], axis=1)


def versus(floor: Outcomes, tuned: Outcomes) -> dict[str, Any]:
    """A floor's own success, and by how much the tuned policy is above it."""
    return success_summary(floor) | {"tuned_above": _difference(floor, tuned)}


def report(result: Mapping[str, Any]) -> str:
    """The result of `summarize` or `compare`, in words; floors too where there are any."""
    floors = result.get("floors", {})
    policies = {name: result[name] for name in ("base", "tuned") if name in result}
    lines = []
    for task in policies["base"].get("tasks", {}):
        rates = [f"{name} {_rate(r['tasks'][task])} of {r['tasks'][task]['episodes']}" for name, r in policies.items()]
        lines.append(f"{task}: {', '.join(rates)}")
    for name, r in {**policies, **floors}.items():
        invalid = f" ({r['invalid_episodes']} invalid, not counted)" if r["invalid_episodes"] else ""
        episodes = f"{r['episodes']} episodes{invalid}, {r['episode_length']:.0f} steps each"
        lines.append(f"{name:>15}: success {_rate(r)} over {episodes}")
    differences = {"base": result["difference"]} if "difference" in result else {}
    for name, d in (differences | {name: floor["tuned_above"] for name, floor in floors.items()}).items():
        lines.append(
            f"tuned - {name:>7}: {d['success_rate']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}] ({d['interval']})"
        )
    if deviations := result.get("protocol", {}).get("deviations"):
        named = "; ".join(f"{name}: {difference}" for name, difference in deviations.items())
        lines.append(f"Not as the official protocol has it: {named}")
    return "\n".join(lines)


def _rate(summary: Mapping[str, Any]) -> str:
    return f"{summary['success_rate']:.3f} [{summary['low']:.3f}, {summary['high']:.3f}]"
