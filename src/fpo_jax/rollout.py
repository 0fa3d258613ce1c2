"""Gathering experience: one decision of N environments, and T of them as a scan."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fpo_jax import parallel
from fpo_jax.algorithms import fixed
from fpo_jax.config import RolloutConfig, TrainConfig
from fpo_jax.flow import split_keys
from fpo_jax.latent import LatentSpace
from fpo_jax.types import BasePolicy, Dims, Env, EnvState, HostedEnv, LatentSample, Params, Transition


@dataclass(frozen=True, eq=False)
class System:
    """The static parts of a run; hashed by identity, so that jit can take it as a static argument."""

    config: TrainConfig
    env: Env
    base: BasePolicy
    latent_space: LatentSpace
    algorithm: Any  # a module that satisfies types.Algorithm

    @property
    def dims(self) -> Dims:
        clock = int(self.config.rollout.time_limit == "terminal")
        return Dims(state=self.base.feature_dim + clock, latent=self.latent_space.dim)

    @property
    def decisions(self) -> int:
        """T: decisions per environment and iteration."""
        return self.config.rollout.decisions or self.env.spec.decisions + 1


class FeatureStats(NamedTuple):
    """Standardises the features of a base that asks for it; frozen before training begins, saved with the run."""

    mean: Float[Array, " f"]
    std: Float[Array, " f"]


class FrozenBase(NamedTuple):
    """What never changes during training."""

    params: Params
    features: FeatureStats | None = None  # None: the features are of the right size as they come


class Episodes(NamedTuple):
    """What ended in each slot; leading axes [T, N]."""

    ended: Bool[Array, "*batch"]  # an episode ended here by success or time limit
    success: Bool[Array, "*batch"]
    fault: Bool[Array, "*batch"]  # the episode broke; neither success nor failure
    ret: Float[Array, "*batch"]  # Σ γ^t r_t so far, Eq. (1)
    control_steps: Int[Array, "*batch"]  # length so far
    executed: Int[Array, "*batch"]  # control steps executed in this slot
    env_id: Int[Array, "*batch"]


class RolloutState(NamedTuple):
    """Carried from rollout to rollout."""

    env: EnvState
    episode_return: Float[Array, " N"]  # Σ γ^t r_t of the running episode
    episode_discount: Float[Array, " N"]  # γ^t


def base_system(system: System) -> System:
    """The frozen base in place of the actor: `algorithms.fixed`, in a space that keeps its noise's distribution.

    `repeat` does not keep it; its agent is `fixed.base(base_system(system).dims.latent)`.
    """
    space = system.latent_space
    space = replace(space, space="full") if space.space == "repeat" else space
    return replace(system, algorithm=fixed, latent_space=space)


def start(system: System, keys: Key[Array, " N"], numbers: Int[Array, " N"] | None = None) -> RolloutState:
    """Fresh episodes in all N environments; `numbers`: the environment's own test episodes of these numbers."""

    def begin(keys: Key[Array, " N"], numbers: Int[Array, " N"] | None) -> RolloutState:
        num = keys.shape[0]
        if numbers is None:
            env_state = system.env.reset(keys)
        else:
            assert isinstance(system.env, HostedEnv)
            env_state = system.env.reset_test(numbers, keys)
        return RolloutState(env_state, jnp.zeros(num), jnp.ones(num))

    return parallel.over_devices(begin, parallel.ENVS, parallel.ENVS)(keys, numbers)


def feature_stats(features: Float[Array, "B f"], valid: Bool[Array, " B"]) -> FeatureStats:
    """Mean and standard deviation over the valid decisions.

    NaN where none is valid. A dimension that hardly moves would turn the rounding of a bfloat16 encoder into a large
    input: 1e-3 of its mean is the least standard deviation.
    """
    count = jnp.sum(valid)
    count = jnp.where(count > 0, count, jnp.nan)

    def mean_of(x: Float[Array, "B f"]) -> Float[Array, " f"]:
        return jnp.sum(jnp.where(valid[:, None], x, 0.0), axis=0) / count  # accelerators round matrix products

    mean = mean_of(features)
    variance = mean_of(jnp.square(features - mean[None]))
    return FeatureStats(mean, jnp.maximum(jnp.sqrt(variance), 1e-3 * jnp.abs(mean) + 1e-6))


def standardize(stats: FeatureStats, features: Float[Array, "N f"]) -> Float[Array, "N f"]:
    """(features - mean) / std within ±10: what the statistics have not seen must not blow up the networks."""
    return jnp.clip((features.astype(jnp.float32) - stats.mean[None]) / stats.std[None], -10.0, 10.0)


def observe(system: System, base: FrozenBase, env_state: EnvState) -> tuple[Float[Array, "N d"], PyTree]:
    """s_t and the base's context; where the time limit is terminal, s_t ends with the share of the episode left."""
    features, context = system.base.encode(base.params, env_state.observation)
    if base.features is not None:
        features = standardize(base.features, features)
    if system.config.rollout.time_limit == "terminal":
        remaining = 1 - env_state.control_steps / system.env.spec.episode_length
        features = jnp.concatenate([features, remaining[:, None].astype(features.dtype)], axis=-1)
    return jax.lax.stop_gradient(features), context


def residual_noise(system: System, keys: Key[Array, " N"]) -> Float[Array, "N h A"]:
    """The part of the base's noise that the latent leaves free, drawn from each environment's key."""
    shape = (system.base.horizon, system.base.action_dim)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def select_action(
    system: System, base: FrozenBase, agent: PyTree, env_state: EnvState, keys: Key[Array, " N"]
) -> tuple[Float[Array, "N h a"], LatentSample, Float[Array, "N d"]]:
    """encode -> act -> expand -> decode: the one inference path of training, evaluation and serving."""
    act_keys, noise_keys = split_keys(keys)
    state, context = observe(system, base, env_state)
    sample = system.algorithm.act(system.config, agent, state, act_keys)
    noise = system.latent_space.expand(sample.latent, residual_noise(system, noise_keys))
    return system.base.decode(base.params, context, noise), sample, state


def slot_keys(key: Key[Array, ""], num_envs: int) -> Key[Array, " N"]:
    """One key per environment for this slot; environment i's does not depend on how many there are, nor where."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(parallel.env_indices(num_envs))


def learner_reward(config: RolloutConfig, env_state: EnvState) -> Float[Array, " N"]:
    """r_t: sparse 1 at success else 0, or step_cost 0 at success else -1."""
    success = env_state.success.astype(jnp.float32)
    return success if config.reward == "sparse" else success - 1.0


class Decision(NamedTuple):
    """A decision whose chunk is being executed."""

    carry: RolloutState  # before it
    env: EnvState  # after it; of a `HostedEnv`: submitted
    sample: LatentSample
    state: Float[Array, "N d"]


def decide(system: System, base: FrozenBase, agent: PyTree, carry: RolloutState, keys: Key[Array, " N"]) -> Decision:
    """The first half of a slot: choose a chunk and let it be executed."""
    chunk, sample, state = select_action(system, base, agent, carry.env, keys)
    execute = system.env.submit if isinstance(system.env, HostedEnv) else system.env.step
    return Decision(carry, execute(carry.env, chunk), sample, state)


def record(
    system: System, decision: Decision, after_decision: Decision | None = None
) -> tuple[RolloutState, tuple[Transition, Episodes]]:
    """The second half of a slot: what became of it. `next_state` still holds s_t; `fill_next_state` shifts it.

    An environment that was done is reset in this slot; its transition is not valid. `after_decision`: one that must
    have been submitted before this one is waited for.
    """
    config, carry, sample, state = system.config.rollout, decision.carry, decision.sample, decision.state
    before, after = carry.env, decision.env
    if isinstance(system.env, HostedEnv):
        after = system.env.collect(after, None if after_decision is None else after_decision.env)
    resets = before.done
    valid = ~resets & ~after.fault
    reward = jnp.where(valid, learner_reward(config, after), 0.0)
    terminal = after.terminated | (after.truncated if config.time_limit == "terminal" else False)
    transition = Transition(
        state=state,
        latent=sample.latent,
        reward=reward,
        next_state=state,
        discount=jnp.where(valid & ~terminal, config.gamma, 0.0),
        done=after.done | resets,
        valid=valid,
        cfm_loss=sample.cfm_loss,
        cfm_key=sample.cfm_key,
    )
    episode_return = jnp.where(resets, 0.0, carry.episode_return + carry.episode_discount * reward)
    episode_discount = jnp.where(resets, 1.0, carry.episode_discount * config.gamma)
    episodes = Episodes(
        ended=valid & after.done,
        success=valid & after.success,
        fault=after.fault,
        ret=episode_return,
        control_steps=after.control_steps,
        executed=jnp.where(resets, 0, after.control_steps - before.control_steps),
        env_id=after.env_id,
    )
    return RolloutState(after, episode_return, episode_discount), (transition, episodes)


def decision_step(
    system: System, base: FrozenBase, agent: PyTree, carry: RolloutState, key: Key[Array, ""]
) -> tuple[RolloutState, tuple[Transition, Episodes]]:
    """One slot of all environments: decide, execute the chunk, record."""
    keys = slot_keys(key, carry.env.reward.shape[0])
    return record(system, decide(system, base, agent, carry, keys))


def _in_turns(
    system: System, base: FrozenBase, agent: PyTree, carry: RolloutState, keys: Key[Array, " T"], scan: Callable
) -> tuple[RolloutState, tuple[Transition, Episodes]]:
    """T slots in which two halves of the environments take turns: one simulates while the other decides."""
    num, half = carry.env.reward.shape[0], carry.env.reward.shape[0] // 2
    turns = jax.vmap(lambda key: slot_keys(key, num))(keys).reshape(-1, half)
    first, second = (jax.tree.map(lambda leaf: leaf[:half], carry), jax.tree.map(lambda leaf: leaf[half:], carry))

    def turn(pair, keys):
        ready, flying = pair
        submitted = decide(system, base, agent, ready, keys)
        landed, slot = record(system, flying, submitted)
        return (landed, submitted), slot

    (first, flying), slots = scan(turn, (second, decide(system, base, agent, first, turns[0])), turns[1:])
    second, slot = record(system, flying)
    carry = jax.tree.map(lambda *halves: jnp.concatenate(halves), first, second)
    slots = jax.tree.map(lambda most, last: jnp.concatenate([most, last[None]]), slots, slot)
    return carry, jax.tree.map(lambda leaf: leaf.reshape(len(keys), num, *leaf.shape[2:]), slots)


def fill_next_state(system: System, base: FrozenBase, carry: RolloutState, transition: Transition) -> Transition:
    """`next_state` by shifting; only the final observation needs one more encoding."""
    last, _ = observe(system, base, carry.env)
    return transition._replace(next_state=jnp.concatenate([transition.state[1:], last[None]]))


def _rollout(
    system: System,
    base: FrozenBase,
    agent: PyTree,
    carry: RolloutState,
    key: Key[Array, ""],
    num_decisions: int,
    scan: Callable,
) -> tuple[RolloutState, Transition, Episodes]:
    def body(carry, key):
        return decision_step(system, base, agent, carry, key)

    keys = jax.random.split(key, num_decisions)
    even = carry.env.reward.shape[0] % 2 == 0
    if isinstance(system.env, HostedEnv) and system.env.overlap and even:
        carry, (transition, episodes) = _in_turns(system, base, agent, carry, keys, scan)
    else:
        carry, (transition, episodes) = scan(body, carry, keys)
    return carry, fill_next_state(system, base, carry, transition), episodes


def rollout(
    system: System, base: FrozenBase, agent: PyTree, carry: RolloutState, key: Key[Array, ""], num_decisions: int
) -> tuple[RolloutState, Transition, Episodes]:
    """T decisions of all environments; Transition and Episodes have leading axes [T, N].

    Each device plays its own environments and exchanges nothing (but for a base that is split).
    """
    one, envs, slots = parallel.EVERYWHERE, parallel.ENVS, parallel.SLOTS

    def play(base: FrozenBase, agent: PyTree, carry: RolloutState, key: Key[Array, ""]):
        return _rollout(system, base, agent, carry, key, num_decisions, jax.lax.scan)

    inputs = (FrozenBase(parallel.weight_specs(base.params), one), one, envs, one)
    return parallel.over_devices(play, inputs, (envs, slots, slots))(base, agent, carry, key)


def python_rollout(
    system: System, base: FrozenBase, agent: PyTree, carry: RolloutState, key: Key[Array, ""], num_decisions: int
) -> tuple[RolloutState, Transition, Episodes]:
    """`rollout` as a Python loop over the same steps, for debugging and for host simulators."""
    return _rollout(system, base, agent, carry, key, num_decisions, _python_scan)


def _python_scan(body: Callable, carry: PyTree, inputs: Array) -> tuple[PyTree, PyTree]:
    slots = []
    for one in inputs:
        carry, slot = body(carry, one)
        slots.append(slot)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *slots)
