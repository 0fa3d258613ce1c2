"""Training: one iteration of Alg. 1 as one compiled program."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree, UInt

from fpo_jax import buffer, parallel
from fpo_jax.algorithms import fixed
from fpo_jax.rollout import (
    Episodes,
    FeatureStats,
    FrozenBase,
    RolloutState,
    System,
    base_system,
    feature_stats,
    rollout,
    start,
)
from fpo_jax.types import HostedEnv, Metrics, Params, Transition


class TrainState(NamedTuple):
    """All that changes during training; saving it and loading it continues bitwise."""

    agent: PyTree
    features: FeatureStats | None  # of the frozen base, where it asks for them; constant
    rollout: RolloutState
    window: Transition  # [W, T, N]
    key: Key[Array, ""]
    iteration: UInt[Array, ""]
    episodes: UInt[Array, ""]  # finished so far
    env_steps: UInt[Array, ""]  # control steps executed so far


PLACES = TrainState(
    agent=parallel.EVERYWHERE,
    features=parallel.EVERYWHERE,
    rollout=parallel.ENVS,
    window=parallel.WINDOW,
    key=parallel.EVERYWHERE,
    iteration=parallel.EVERYWHERE,
    episodes=parallel.EVERYWHERE,
    env_steps=parallel.EVERYWHERE,
)
"""Where each part of a `TrainState` lies on several devices."""


def init(system: System, base_params: Params) -> TrainState:
    """The state before the first iteration; everything follows from `config.seed`."""
    config = system.config
    agent_key, env_key, key = jax.random.split(jax.random.key(config.seed), 3)
    agent = system.algorithm.init(config, system.dims, agent_key)
    carry = start(system, jax.random.split(env_key, config.num_envs))
    zero = jnp.zeros((), jnp.uint32)
    base, finished, executed = FrozenBase(base_params), zero, zero
    if system.base.standardize:
        base, played, episodes = standardized(system, base, carry)
        if isinstance(system.env, HostedEnv):  # simulations that are elsewhere cannot be taken back
            carry = played
        finished, executed = (jnp.sum(x).astype(jnp.uint32) for x in (episodes.ended, episodes.executed))
    play = partial(rollout, system, num_decisions=system.decisions)
    _, shapes, _ = jax.eval_shape(play, base, agent, carry, key)
    window = buffer.init(shapes, config.rollout.window)
    return TrainState(agent, base.features, carry, window, key, zero, finished, executed)


def standardized(system: System, base: FrozenBase, carry: RolloutState) -> tuple[FrozenBase, RolloutState, Episodes]:
    """The base with its feature statistics, over whole episodes that it plays alone; what it left; these episodes."""
    alone = base_system(system)
    decisions = max(system.decisions, system.env.spec.decisions)
    key = jax.random.fold_in(jax.random.key(system.config.seed), 3)  # `init` splits the same key in three
    played, transition, episodes = rollout(alone, base, fixed.base(alone.dims.latent), carry, key, decisions)
    size = system.base.feature_dim
    features = transition.state[..., :size].reshape(-1, size)
    return base._replace(features=feature_stats(features, transition.valid.reshape(-1))), played, episodes


def episode_metrics(episodes: Episodes, tasks: tuple[str, ...] = ()) -> Metrics:
    """Rates over the episodes that ended in this rollout [T, N], and of each task of a suite; NaN where none did."""
    count = jnp.sum(episodes.ended)

    def task_rate(index):
        ended = episodes.ended & (episodes.env_id == index)
        return jnp.sum(ended & episodes.success) / jnp.where(jnp.any(ended), jnp.sum(ended), jnp.nan)

    def over_ended(x):
        return jnp.sum(jnp.where(episodes.ended, x, 0)) / jnp.where(count > 0, count, jnp.nan)

    return {
        "episodes_ended": count,
        "success_rate": over_ended(episodes.success),
        "return": over_ended(episodes.ret),
        "episode_length": over_ended(episodes.control_steps),
        "invalid_episodes": jnp.sum(episodes.fault),
    } | ({f"success_rate/{name}": task_rate(i) for i, name in enumerate(tasks)} if len(tasks) > 1 else {})


def update_phase(system: System, agent: PyTree, window: Transition, key: Key[Array, ""]) -> tuple[PyTree, Metrics]:
    """Alg. 1, lines 14-28: epochs x minibatches as a nested scan over the prepared window.

    On several devices each has all samples, which are small, and takes its share of every minibatch.
    """
    config, algorithm = system.config, system.algorithm
    prepare_key, key = jax.random.split(key)
    samples, metrics = algorithm.prepare(config, agent, window, prepare_key)
    samples = parallel.replicate(samples)
    size = config.update.minibatch_size
    num_minibatches = config.update.minibatches or -(-samples.valid.shape[0] // size)

    def minibatch(agent, inputs):
        indices, key = inputs
        indices = parallel.spread(indices)
        agent, metrics = algorithm.update(config, agent, jax.tree.map(lambda leaf: leaf[indices], samples), key)
        return parallel.replicate(agent), metrics

    def epoch(agent, key):
        shuffle_key, key = jax.random.split(key)
        indices = buffer.minibatch_indices(shuffle_key, samples.valid, num_minibatches, size)
        return jax.lax.scan(minibatch, agent, (indices, jax.random.split(key, num_minibatches)))

    agent, steps = jax.lax.scan(epoch, agent, jax.random.split(key, config.update.epochs))
    return agent, metrics | jax.tree.map(jnp.mean, steps)


def train_iteration(system: System, base_params: Params, state: TrainState) -> tuple[TrainState, Metrics]:
    """One round of Alg. 1: rollout, append to the window, update. Compiled once per run."""
    key, rollout_key, update_key = jax.random.split(state.key, 3)
    base = FrozenBase(base_params, state.features)
    played = rollout(system, base, state.agent, state.rollout, rollout_key, system.decisions)
    return learn(system, state, played, key, update_key)


def learn(
    system: System,
    state: TrainState,
    played: tuple[RolloutState, Transition, Episodes],
    key: Key[Array, ""],
    update_key: Key[Array, ""],
) -> tuple[TrainState, Metrics]:
    """The second half of an iteration: append what was played to the window, update; `key` is the next state's."""
    carry, transition, episodes = played
    window = buffer.append(state.window, transition)
    agent, update_metrics = update_phase(system, state.agent, window, update_key)
    episode = episode_metrics(episodes, system.env.spec.tasks)
    never_began = jnp.where(state.iteration == 0, jnp.sum(state.rollout.env.fault), 0)
    episode["invalid_episodes"] += never_began  # before the first decision: no rollout has seen them
    state = TrainState(
        agent,
        state.features,
        carry,
        window,
        key,
        state.iteration + 1,
        state.episodes + episode.pop("episodes_ended").astype(jnp.uint32),
        state.env_steps + jnp.sum(episodes.executed).astype(jnp.uint32),
    )
    totals = {"iteration": state.iteration, "episodes": state.episodes, "env_steps": state.env_steps}
    return state, totals | episode | update_metrics
