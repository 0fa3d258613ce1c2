"""Gathering experience: one decision of N environments, and T of them as a scan."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fpo_jax.algorithms import fixed
from fpo_jax.config import RolloutConfig, TrainConfig
from fpo_jax.flow import split_keys
from fpo_jax.latent import LatentSpace
from fpo_jax.types import BasePolicy, Dims, Env, EnvState, LatentSample, Params, Transition


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


def start(system: System, keys: Key[Array, " N"]) -> RolloutState:
    """Fresh episodes in all N environments."""
    num = keys.shape[0]
    return RolloutState(system.env.reset(keys), jnp.zeros(num), jnp.ones(num))


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
    """One key per environment for this slot; environment i's does not depend on how many there are."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_envs))


def learner_reward(config: RolloutConfig, env_state: EnvState) -> Float[Array, " N"]:
    """r_t: sparse 1 at success else 0, or step_cost 0 at success else -1."""
    success = env_state.success.astype(jnp.float32)
    return success if config.reward == "sparse" else success - 1.0


def decision_step(
    system: System, base: FrozenBase, agent: PyTree, carry: RolloutState, key: Key[Array, ""]
) -> tuple[RolloutState, tuple[Transition, Episodes]]:
    """One slot: decide, execute the chunk, record. `next_state` still holds s_t; `rollout` shifts it.

    An environment that was done is reset in this slot; its transition is not valid.
    """
    config, before = system.config.rollout, carry.env
    keys = slot_keys(key, before.reward.shape[0])
    chunk, sample, state = select_action(system, base, agent, before, keys)
    after = system.env.step(before, chunk)
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
        fault=~resets & after.fault,
        ret=episode_return,
        control_steps=after.control_steps,
        executed=jnp.where(resets, 0, after.control_steps - before.control_steps),
        env_id=before.env_id,
    )
    return RolloutState(after, episode_return, episode_discount), (transition, episodes)


def _shift(system: System, base: FrozenBase, carry: RolloutState, transition: Transition) -> Transition:
    """Fill next_state by shifting; only the final observation needs one more encoding."""
    last, _ = observe(system, base, carry.env)
    return transition._replace(next_state=jnp.concatenate([transition.state[1:], last[None]]))


def rollout(
    system: System, base: FrozenBase, agent: PyTree, carry: RolloutState, key: Key[Array, ""], num_decisions: int
) -> tuple[RolloutState, Transition, Episodes]:
    """T decisions of all environments; Transition and Episodes have leading axes [T, N]."""

    def body(carry, key):
        return decision_step(system, base, agent, carry, key)

    carry, (transition, episodes) = jax.lax.scan(body, carry, jax.random.split(key, num_decisions))
    return carry, _shift(system, base, carry, transition), episodes


def python_rollout(
    system: System, base: FrozenBase, agent: PyTree, carry: RolloutState, key: Key[Array, ""], num_decisions: int
) -> tuple[RolloutState, Transition, Episodes]:
    """`rollout` as a Python loop over the same step, for debugging and for host simulators."""
    slots = []
    for slot_key in jax.random.split(key, num_decisions):
        carry, slot = decision_step(system, base, agent, carry, slot_key)
        slots.append(slot)
    transition, episodes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *slots)
    return carry, _shift(system, base, carry, transition), episodes
