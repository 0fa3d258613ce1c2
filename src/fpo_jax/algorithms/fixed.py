"""Latents that do not depend on the state: x = mean + scale · ε. Nothing is learned; these are the floors to beat.

mean 0, scale 1: the base policy itself · scale 0: zero noise · scale .5: scaled noise · mean c, scale 0: a constant.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fpo_jax import flow
from fpo_jax.config import TrainConfig
from fpo_jax.types import LatentSample


class FixedLatent(NamedTuple):
    """A Gaussian over latents; `mean` may differ between environments."""

    mean: Float[Array, "*N D"]
    scale: Float[Array, ""]


def base(dim: int) -> FixedLatent:
    """N(0, I): the frozen base, untouched."""
    return FixedLatent(jnp.zeros(dim), jnp.ones(()))


def act(config: TrainConfig, agent: FixedLatent, state: Float[Array, "N d"], keys: Key[Array, " N"]) -> LatentSample:
    """x = mean + scale · ε, with the same ε that FPO's sampler starts from for these keys."""
    noise_keys, cfm_keys = flow.split_keys(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, agent.mean.shape[-1:]))(noise_keys)
    return LatentSample(
        jnp.broadcast_to(agent.mean, noise.shape) + agent.scale * noise, jnp.zeros((state.shape[0], 0)), cfm_keys
    )
