"""Flow matching in latent space: straight paths, the CFM loss, and sampling. Flow time u: 0 is noise, 1 is latent.

A *velocity* here is a function `(params, x [B D], u [B], state [B d]) -> [B D]`.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fpo_jax.types import Params, Scalar

Velocity = Callable[[Params, Float[Array, "B D"], Float[Array, " B"], Float[Array, "B d"]], Float[Array, "B D"]]


def split_keys(keys: Key[Array, " N"], num: int = 2) -> Key[Array, "num N"]:
    """`num` independent keys for each key, so that every environment keeps its own stream of randomness."""
    return jax.vmap(lambda key: jax.random.split(key, num), out_axes=1)(keys)


def interpolate(
    noise: Float[Array, "*batch D"], latent: Float[Array, "*batch D"], u: Float[Array, "*batch"]
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]:
    """The straight path x_u = (1-u) ε + u x and its velocity x - ε (Lipman et al. 2022)."""
    u = u[..., None]
    return (1 - u) * noise + u * latent, latent - noise


def prior_scale(u: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """σ(u) = √(u² + (1-u)²): standard deviation of x_u when noise and latent are independent N(0, I)."""
    return jnp.sqrt(u**2 + (1 - u) ** 2)


def prior_velocity(x: Float[Array, "*batch D"], u: Float[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """The CFM-optimal field of N(0, I): E[x - ε | x_u] = x_u (2u-1) / (u² + (1-u)²)."""
    return x * ((2 * u - 1) / prior_scale(u) ** 2)[..., None]


def cfm_draws(key: Key[Array, ""], num_draws: int, latent_dim: int) -> tuple[Float[Array, "S D"], Float[Array, " S"]]:
    """The draws (ε, u) of one sample: ε ~ N(0, I), u stratified, one uniform draw in each of S equal bins of [0, 1]."""
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (num_draws, latent_dim))
    u = (jnp.arange(num_draws) + jax.random.uniform(time_key, (num_draws,))) / num_draws
    return noise, u


def cfm_terms(
    velocity: Velocity,
    params: Params,
    state: Float[Array, "B d"],
    latent: Float[Array, "B D"],
    keys: Key[Array, " B"],
    num_draws: int,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """ℓ_cfm and the squared deviation of v_θ from the prior field, at the same draws, each averaged over D.

    ℓ_cfm(x | s; θ) = |v_θ(x_u, u, s) - (x - ε)|² / D, one value per draw (ε, u).
    """
    batch, latent_dim = latent.shape
    noise, u = jax.vmap(lambda key: cfm_draws(key, num_draws, latent_dim))(keys)
    x_u, target = interpolate(noise, jnp.broadcast_to(latent[:, None], noise.shape), u)
    repeated_state = jnp.repeat(state, num_draws, axis=0)
    prediction = velocity(params, x_u.reshape(-1, latent_dim), u.reshape(-1), repeated_state)
    prediction = prediction.reshape(batch, num_draws, latent_dim)
    loss = jnp.mean((prediction - target) ** 2, axis=-1)
    deviation = jnp.mean((prediction - prior_velocity(x_u, u)) ** 2, axis=-1)
    return loss, deviation


def cfm_loss(
    velocity: Velocity,
    params: Params,
    state: Float[Array, "B d"],
    latent: Float[Array, "B D"],
    keys: Key[Array, " B"],
    num_draws: int,
) -> Float[Array, "B S"]:
    """ℓ_cfm(x | s; θ), one value per draw; the same keys give the same draws."""
    return cfm_terms(velocity, params, state, latent, keys, num_draws)[0]


def integrate(
    velocity: Velocity,
    params: Params,
    state: Float[Array, "N d"],
    noise: Float[Array, "N D"],
    num_steps: int,
    integrator: Literal["midpoint", "euler"] = "midpoint",
    preserve_prior: bool = True,
) -> Float[Array, "N D"]:
    """x(1; s) from x(0) = noise along dx/du = v_θ(x, u, s), in `num_steps` equal steps.

    With `preserve_prior` the variable is y = x / σ(u), for which dy/du = (v_θ - prior) / σ(u): a field equal to the
    prior's moves nothing, so the samples are exactly the noise, whatever the number of steps.
    """
    step = 1.0 / num_steps

    def slope(y, u):
        times = jnp.full(y.shape[:1], u)
        if not preserve_prior:
            return velocity(params, y, times, state)
        sigma = prior_scale(times)[:, None]
        x = sigma * y
        return (velocity(params, x, times, state) - prior_velocity(x, times)) / sigma

    def advance(y, i):
        u = i * step
        if integrator == "euler":
            return y + step * slope(y, u), None
        half = y + 0.5 * step * slope(y, u)
        return y + step * slope(half, u + 0.5 * step), None

    latent, _ = jax.lax.scan(advance, noise, jnp.arange(num_steps))  # σ(0) = σ(1) = 1: y and x agree at both ends
    return latent


def explore(
    velocity: Velocity,
    params: Params,
    state: Float[Array, "N d"],
    latent: Float[Array, "N D"],
    step_size: Scalar,
    num_steps: int,
) -> Float[Array, "N D"]:
    """x^(k+1) = x^(k) + η v_θ(x^(k), τ^(k) | s), k < K, with τ^(k) = k / K.  Eq. (7), reading B."""

    if num_steps == 0:
        return latent  # a scan of length zero does not run under jax.disable_jit

    def advance(x, k):
        tau = jnp.full(x.shape[:1], k / num_steps)
        return x + step_size * velocity(params, x, tau, state), None

    latent, _ = jax.lax.scan(advance, latent, jnp.arange(num_steps))
    return latent
