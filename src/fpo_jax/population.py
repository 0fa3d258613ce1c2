"""Many runs as one: members with agents, optimisers and windows of their own, and one frozen base for all of them.

A population's `TrainState` has a leading axis P on every leaf, so member p is `member(state, p)`: the state of a run of
its own. Environments are stepped, and observations encoded, as one batch of P·N; what learns is under vmap.
"""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from fpo_jax import train
from fpo_jax.config import PopulationOptions, TrainConfig, check
from fpo_jax.rollout import (
    Episodes,
    FrozenBase,
    RolloutState,
    System,
    decide,
    fill_next_state,
    record,
    slot_keys,
)
from fpo_jax.train import TrainState
from fpo_jax.types import FpoError, HostedEnv, LatentSample, Metrics, Params, Transition, suggestion

Values = dict[str, Array]  # [P] of every field in which members differ, by its dotted name

_GROUPS = ("actor", "critic", "fpo", "sac")  # whose numbers are read under vmap only


# --- members --------------------------------------------------------------------------------------------------------


def may_vary(config: TrainConfig) -> list[str]:
    """The settings that members may differ in: numbers, which change no array's shape."""
    groups = {group: getattr(config, group) for group in _GROUPS}
    return [f"{g}.{entry.name}" for g, o in groups.items() for entry in fields(o) if entry.type is float]


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other values of fields given by dotted names.

    They may be traced arrays, which the dataclasses' own annotations would not take.
    """

    def put(options: Any, name: str, value: Any) -> Any:
        first, _, rest = name.partition(".")
        changed = copy.copy(options)
        object.__setattr__(changed, first, put(getattr(options, first), rest, value) if rest else value)
        return changed

    return reduce(lambda changed, item: put(changed, *item), values.items(), config)


def members(config: TrainConfig) -> list[TrainConfig]:
    """The configuration of each member, as that of a run of its own: all seeds of the first setting, of the next, ...

    Raises FpoError for a setting that cannot vary.
    """
    check(config)
    options = config.population
    parsed = [_parse(config, assignment) for assignment in options.vary]
    settings = dict(parsed)
    if len(settings) < len(parsed):
        raise FpoError("--population.vary names a setting twice: give all its values in one list.")
    combinations = [dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())]
    alone = replace(config, population=PopulationOptions(), resume="no", run_dir=None)
    seeds = range(config.seed, config.seed + options.size)
    found = [with_values(alone, values | {"seed": seed}) for values in combinations for seed in seeds]
    for one in found:
        check(one)
    return found


def _parse(config: TrainConfig, assignment: str) -> tuple[str, list[float]]:
    """(name, values) of "fpo.epsilon=.1,.2" or "fpo.epsilon=.05:.4:4"."""
    name, _, text = assignment.partition("=")
    name, known = name.replace("-", "_"), may_vary(config)
    if name not in known:
        raise FpoError(
            f"Members of a population cannot differ in {name!r}, only in numbers that leave every array's shape as it "
            f"is{suggestion(name, known)}"
        )
    try:
        if ":" not in text:
            return name, [float(word) for word in text.split(",")]
        low, high, count = text.split(":")
        if int(count) < 1:
            raise ValueError(count)
        return name, np.geomspace(float(low), float(high), int(count)).tolist()
    except ValueError as error:
        raise FpoError(
            f"{assignment!r} is neither a list, as {name}=.1,.2, nor from:to:count with a count of at least "
            f"1, as {name}=.1:.4:3."
        ) from error


def differing(configs: Sequence[TrainConfig]) -> Values:
    """What `iteration` needs to know of the members: the settings in which they differ, apart from the seed."""

    def value(config: TrainConfig, name: str) -> float:
        group, field_name = name.split(".")
        return getattr(getattr(config, group), field_name)

    columns = {name: [value(config, name) for config in configs] for name in may_vary(configs[0])}
    return {name: jnp.array(column, jnp.float32) for name, column in columns.items() if len(set(column)) > 1}


def member(state: PyTree, index: int | Int[Array, ""]) -> PyTree:
    """One member's part of a population's state."""
    return jax.tree.map(lambda leaf: leaf[index], state)


def stack(states: Sequence[PyTree]) -> PyTree:
    """A population's state out of its members'."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Together:
    """The algorithm of a population in a rollout: its agent is (values, agents), its batch P·N."""

    algorithm: Any

    def act(
        self, config: TrainConfig, agent: tuple[Values, PyTree], state: Float[Array, "PN d"], keys: Key[Array, " PN"]
    ) -> LatentSample:
        def act(values: Values, agent: PyTree, state: Float[Array, "N d"], keys: Key[Array, " N"]) -> LatentSample:
            return self.algorithm.act(with_values(config, values), agent, state, keys)

        size = jax.tree.leaves(agent)[0].shape[0]
        return _merge(jax.vmap(act)(*agent, *_split(size, (state, keys))))


def _split(size: int, tree: PyTree) -> PyTree:
    """[P·N, ...] -> [P, N, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(size, leaf.shape[0] // size, *leaf.shape[1:]), tree)


def _merge(tree: PyTree) -> PyTree:
    """[P, N, ...] -> [P·N, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(math.prod(leaf.shape[:2]), *leaf.shape[2:]), tree)


def rollout(
    system: System, base: FrozenBase, values: Values, state: TrainState, keys: Key[Array, " P"]
) -> tuple[RolloutState, Transition, Episodes]:
    """`rollout.rollout` of every member, in one batch; leaves have a leading axis P, then [N] or [T, N]."""
    size, num_envs = state.rollout.episode_return.shape
    together = replace(system, algorithm=_Together(system.algorithm))
    agent = (values, state.agent)

    def slot(carry: RolloutState, keys: Key[Array, " P"]):
        env_keys = _merge(jax.vmap(partial(slot_keys, num_envs=num_envs))(keys))
        return record(together, decide(together, base, agent, carry, env_keys))

    split = partial(jax.random.split, num=system.decisions)
    carry, (transition, episodes) = jax.lax.scan(slot, _merge(state.rollout), jax.vmap(split, out_axes=1)(keys))
    transition = fill_next_state(together, base, carry, transition)

    def by_member(leaf: Array) -> Array:
        return jnp.moveaxis(leaf.reshape(leaf.shape[0], size, num_envs, *leaf.shape[2:]), 1, 0)

    return _split(size, carry), *jax.tree.map(by_member, (transition, episodes))


def iteration(system: System, base_params: Params, values: Values, state: TrainState) -> tuple[TrainState, Metrics]:
    """`train.train_iteration` of every member; metrics have a leading axis P."""

    def learn(values: Mapping[str, Array], *arguments: Any) -> tuple[TrainState, Metrics]:
        return train.learn(replace(system, config=with_values(system.config, values)), *arguments)

    key, rollout_key, update_key = jax.vmap(partial(jax.random.split, num=3), out_axes=1)(state.key)
    played = rollout(system, FrozenBase(base_params), values, state, rollout_key)
    return jax.vmap(learn)(values, state, played, key, update_key)


def init(system: System, base_params: Params, configs: Sequence[TrainConfig]) -> TrainState:
    """Every member's first state, each as its own run begins. Raises FpoError for what cannot be one batch."""
    if isinstance(system.env, HostedEnv):
        raise FpoError(f"{system.env.spec.name} is simulated by other processes: train its seeds as runs of their own.")
    if system.base.standardize:
        raise FpoError(
            "This base's features depend on each run's first episodes: train its seeds as runs of their own."
        )

    @jax.jit
    def begin(seed: Array, values: Values, base_params: Params) -> TrainState:
        return train.init(replace(system, config=with_values(system.config, values | {"seed": seed})), base_params)

    values, seeds = differing(configs), jnp.array([config.seed for config in configs])
    return stack([begin(seeds[i], member(values, i), base_params) for i in range(len(configs))])
