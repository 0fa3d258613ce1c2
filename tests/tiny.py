"""Systems small enough for tests: point mass with networks of 16 units, and an environment that follows a script."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fpo_jax import parallel, train
from fpo_jax.algorithms import fpo, sac
from fpo_jax.config import PRESETS, TrainConfig
from fpo_jax.envs.common import where_env
from fpo_jax.envs.point_mass import PointMass
from fpo_jax.latent import LatentSpace
from fpo_jax.policies.point_mass import PointMassPolicy
from fpo_jax.rollout import System, rollout, start
from fpo_jax.types import EnvSpec, EnvState, LatentSample, Observation

# Compiling takes most of the time here: without optimisation it takes a quarter of it.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})
begin_training = jit(train.init, static_argnums=0)
iterate = jit(train.train_iteration, static_argnums=0)
run_rollout = jit(rollout, static_argnums=(0, 5))
begin = jit(start, static_argnums=0)
init_fpo = jit(fpo.init, static_argnums=(0, 1))
act_fpo = jit(fpo.act, static_argnums=0)


def shrink(config: TrainConfig) -> TrainConfig:
    """The same settings with four environments, two gradient steps and tiny networks."""
    return replace(
        config,
        env="point_mass",
        num_envs=4,
        actor=replace(config.actor, hidden=(16,), cfm_draws=2, sampler_steps=min(config.actor.sampler_steps, 3)),
        critic=replace(config.critic, hidden=(16,), value_samples=2),
        sac=replace(config.sac, hidden=(16,)),
        rollout=replace(config.rollout, decisions=5, window=2),
        update=replace(config.update, epochs=1, minibatch_size=16, minibatches=2),
    )


TINY = shrink(PRESETS["default"])


def make_system(config: TrainConfig = TINY) -> System:
    """The static parts of a run on point mass; the base's parameters are {}."""
    base = PointMassPolicy()
    space = LatentSpace(config.latent.space, base.horizon, base.action_dim, config.latent.rank)
    return System(config, PointMass(), base, space, {"fpo": fpo, "sac": sac}[config.algorithm])


def keys(num: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), num)


def perturbed(params, seed: int = 7, scale: float = 0.3):
    """Parameters with noise added, so that layers that start at zero no longer are."""
    leaves, tree = jax.tree.flatten(params)
    pairs = zip(leaves, keys(len(leaves), seed), strict=True)
    return jax.tree.unflatten(tree, [leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in pairs])


class Trained(NamedTuple):
    """A few iterations on some devices."""

    state: train.TrainState
    metrics: list[dict]  # of each iteration
    iterate: Callable  # the compiled iteration
    compilations: list[str]  # after the first iteration


def train_on(mesh: jax.sharding.Mesh | None, system: System, iterations: int = 3) -> Trained:
    """Training from the start on the devices of a mesh."""
    seen = logging.Handler()
    compilations, metrics = [], []
    seen.emit = lambda record: compilations.append(record.getMessage())
    with parallel.using(mesh):
        state = parallel.jit(partial(train.init, system), train.PLACES)({})
        iterate = parallel.jit(partial(train.train_iteration, system), (train.PLACES, parallel.EVERYWHERE))
        for index in range(iterations):
            with jax.log_compiles(index > 0):
                logging.getLogger("jax").addHandler(seen)
                state, found = iterate({}, state)
                logging.getLogger("jax").removeHandler(seen)
            metrics.append(jax.device_get(found))
    return Trained(state, metrics, iterate, [line for line in compilations if "XLA compilation" in line])


# --- an environment that follows a script: nothing the agent does matters


@dataclass(frozen=True, eq=False)
class ScriptedEnv:
    """Environment i succeeds at its decision `success_at[i]` and breaks at `fault_at[i]` (counted from 1, 0 = never).

    proprio = (decisions so far, i). Episodes last four decisions of two control steps.
    """

    success_at: tuple[int, ...]
    fault_at: tuple[int, ...]
    spec = EnvSpec("scripted", 2, 2, 0, episode_length=8, execute_steps=2, control_hz=1.0)

    def reset(self, keys) -> EnvState:
        zeros = jnp.zeros(len(keys), jnp.int32)
        return self._state(zeros, zeros > 0, zeros > 0, keys)

    def step(self, state: EnvState, chunk) -> EnvState:
        decisions = state.physics + 1
        success, fault = decisions == jnp.array(self.success_at), decisions == jnp.array(self.fault_at)
        return where_env(state.done, self.reset(state.key), self._state(decisions, success, fault, state.key))

    def _state(self, decisions, success, fault, keys) -> EnvState:
        index = jnp.arange(len(decisions))
        proprio = jnp.stack([decisions, index], axis=-1).astype(jnp.float32)
        truncated = (decisions == 4) & ~success & ~fault
        reward = success.astype(jnp.float32)
        return EnvState(
            decisions, Observation(proprio), reward, success, truncated, success, fault, 2 * decisions, 0 * index, keys
        )


@dataclass(frozen=True)
class EchoPolicy:
    """Features are the proprioception, the chunk is the noise."""

    horizon: int = 2
    action_dim: int = 2
    output_dim: int = 2
    feature_dim: int = 2
    standardize: bool = False
    cameras: tuple[str, ...] = ()
    image_size: int = 0

    def encode(self, params, observation):
        return observation.proprio, None

    def decode(self, params, context, noise):
        return noise


def scripted_system(config: TrainConfig, success_at: tuple[int, ...], fault_at: tuple[int, ...]) -> System:
    """A system on `ScriptedEnv` whose algorithm draws every latent from N(0, I) and has no agent (None)."""

    def act(config, agent, state, keys):
        latent = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
        return LatentSample(latent, jnp.zeros((len(keys), 0)), keys)

    space = LatentSpace("full", 2, 2)
    return System(config, ScriptedEnv(success_at, fault_at), EchoPolicy(), space, SimpleNamespace(act=act))
