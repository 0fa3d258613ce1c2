"""A whole system small enough for tests: point mass, its analytic base, and networks of 16 units."""

from dataclasses import replace

import jax

from fpo_jax.algorithms import fpo, sac
from fpo_jax.config import PRESETS, TrainConfig
from fpo_jax.envs.point_mass import PointMass
from fpo_jax.latent import LatentSpace
from fpo_jax.policies.point_mass import PointMassPolicy
from fpo_jax.rollout import System


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
