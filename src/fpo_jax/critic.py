"""The critic ensemble: values, TD target, loss, generalised advantages."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fpo_jax.types import Metrics, Params, Scalar

EnsembleQ = Callable[[Params, Float[Array, "B d"], Float[Array, "B D"]], Float[Array, "M B"]]


def masked_mean(x: Float[Array, "*batch"], valid: Bool[Array, "*batch"]) -> Float[Array, ""]:
    """Mean of x over the valid entries; 0 where there is none."""
    return jnp.sum(jnp.where(valid, x, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def masked_std(x: Float[Array, "*batch"], valid: Bool[Array, "*batch"], floor: Scalar) -> Float[Array, ""]:
    """Standard deviation of x over the valid entries, at least `floor`; finite gradient where all x are equal."""
    variance = masked_mean((x - masked_mean(x, valid)) ** 2, valid)
    return jnp.sqrt(jnp.maximum(variance, floor**2))


def conservative_value(q: Float[Array, "M B"]) -> Float[Array, " B"]:
    """min_i Q_i."""
    return jnp.min(q, axis=0)


def td_target(
    reward: Float[Array, " B"], discount: Float[Array, " B"], next_q: Float[Array, "M B"]
) -> Float[Array, " B"]:
    """y = r + γ min_i Q_i(s', x'), without the bootstrap where s' is terminal (discount 0).  Eq. (5)."""
    return reward + discount * conservative_value(next_q)


def critic_loss(
    q: Float[Array, "M B"], target: Float[Array, " B"], valid: Bool[Array, " B"]
) -> tuple[Float[Array, ""], Metrics]:
    """E[(Q_φ(s, x) - y)²], averaged over members and valid samples; y is a constant.  Eq. (6)."""
    error = q - jax.lax.stop_gradient(target)[None]
    loss = masked_mean(jnp.mean(error**2, axis=0), valid)
    metrics = {
        "critic_loss": loss,
        "q_mean": masked_mean(jnp.mean(q, axis=0), valid),
        "q_spread": masked_mean(jnp.std(q, axis=0), valid),
        "td_target_mean": masked_mean(target, valid),
    }
    return loss, metrics


def generalized_advantage(
    reward: Float[Array, "T N"],
    discount: Float[Array, "T N"],
    value: Float[Array, "T+1 N"],
    done: Bool[Array, "T N"],
    valid: Bool[Array, "T N"],
    lam: Scalar,
) -> Float[Array, "T N"]:
    """A_t = δ_t + γ_t λ A_{t+1} within an episode, δ_t = r_t + γ_t V_{t+1} - V_t (Schulman et al. 2016).

    Cut by `done` and by `valid`: an invalid slot has advantage 0 and passes nothing on.
    """
    delta = reward + discount * value[1:] - value[:-1]

    def backward(next_advantage, slot):
        delta, discount, done, valid = slot
        advantage = jnp.where(valid, delta + discount * lam * jnp.where(done, 0.0, next_advantage), 0.0)
        return advantage, advantage

    _, advantage = jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, discount, done, valid), reverse=True)
    return advantage


def polyak(target: Params, online: Params, rate: Scalar) -> Params:
    """φ̄ ← (1 - rate) φ̄ + rate φ."""
    return jax.tree.map(lambda t, o: (1 - rate) * t + rate * o, target, online)
