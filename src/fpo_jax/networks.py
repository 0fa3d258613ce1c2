"""The trained networks, in Flax Linen: velocity field, Q ensemble, Gaussian actor."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fpo_jax.types import Params


def time_embedding(u: Float[Array, " B"], num_frequencies: int = 4) -> Float[Array, "B e"]:
    """u and the sines and cosines of π u 2^k, k < num_frequencies: [B, 1 + 2 num_frequencies]."""
    angles = jnp.pi * u[:, None] * 2.0 ** jnp.arange(num_frequencies)[None]
    return jnp.concatenate([u[:, None], jnp.sin(angles), jnp.cos(angles)], axis=-1)


class MLP(nn.Module):
    """Dense layers with SiLU; optional LayerNorm before each activation."""

    widths: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B i"]) -> Float[Array, "B o"]:
        for width in self.widths:
            x = nn.Dense(width)(x)
            if self.layer_norm:
                x = nn.LayerNorm()(x)
            x = nn.silu(x)
        return x


class VelocityNetwork(nn.Module):
    """The learned part of v_θ(x, u, s). Its last layer starts at zero, so the initial field is the prior's."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B D"], u: Float[Array, " B"], state: Float[Array, "B d"]
    ) -> Float[Array, "B D"]:
        h = MLP(self.hidden)(jnp.concatenate([x, time_embedding(u), state], axis=-1))
        return nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros, name="velocity")(h)


class QNetwork(nn.Module):
    """One critic Q_φ(s, x). It starts near 0, so that the first advantages are returns and not its random guesses."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, state: Float[Array, "B d"], latent: Float[Array, "B D"]) -> Float[Array, " B"]:
        h = MLP(self.hidden, layer_norm=True)(jnp.concatenate([state, latent], axis=-1))
        return nn.Dense(1, kernel_init=nn.initializers.variance_scaling(1e-4, "fan_in", "normal"))(h)[..., 0]


def q_ensemble(num_critics: int, hidden: tuple[int, ...]) -> nn.Module:
    """M independent critics as one module: (state [B d], latent [B D]) -> [M B], parameters with leading axis M."""
    return nn.vmap(
        QNetwork,
        in_axes=None,  # pyright: ignore[reportArgumentType]
        variable_axes={"params": 0},
        split_rngs={"params": True},
        axis_size=num_critics,
    )(hidden)


class GaussianActor(nn.Module):
    """Mean and log standard deviation of a diagonal Gaussian over the pre-tanh latent (SAC)."""

    hidden: tuple[int, ...]
    latent_dim: int

    @nn.compact
    def __call__(self, state: Float[Array, "B d"]) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        h = MLP(self.hidden)(state)
        mean = nn.Dense(self.latent_dim, kernel_init=nn.initializers.zeros, name="mean")(h)
        log_std = nn.Dense(self.latent_dim, kernel_init=nn.initializers.zeros, name="log_std")(h)
        return mean, jnp.clip(log_std, -10.0, 2.0)


def apply(module: nn.Module, params: Params, *inputs: Array) -> Any:
    """`module.apply`, whose declared type also has the mutable variables that nothing here uses."""
    return module.apply(params, *inputs)
