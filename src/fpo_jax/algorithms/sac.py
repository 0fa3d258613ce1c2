"""Latent-space soft actor-critic (the ablation `no_ratio`), in the manner of DSRL (Wagenmaker et al. 2025).

The actor is a tanh-Gaussian over the base's noise; there is no flow, no ratio and no GAE.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from fpo_jax import buffer, critic, flow
from fpo_jax.algorithms.fpo import adam, critic_step, ensemble_q, init_critic
from fpo_jax.config import SacConfig, TrainConfig
from fpo_jax.critic import masked_mean
from fpo_jax.networks import GaussianActor, apply
from fpo_jax.types import Dims, LatentSample, Metrics, Params, Scalar, Transition


class AgentState(NamedTuple):
    """Everything that learns."""

    actor: Params
    actor_opt: PyTree
    critic: Params  # leading axis M
    target_critic: Params
    critic_opt: PyTree
    log_temperature: Float[Array, ""]
    temperature_opt: PyTree


def _latent_dim(actor: Params) -> int:
    return actor["params"]["mean"]["bias"].shape[-1]


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    return adam(config.sac.learning_rate, config.actor.max_grad_norm)


def init(config: TrainConfig, dims: Dims, key: Key[Array, ""]) -> AgentState:
    """A fresh agent. Its first latents are scale · tanh(N(0, I)): near the base, not equal to it."""
    actor_key, critic_key = jax.random.split(key)
    actor = GaussianActor(config.sac.hidden, dims.latent).init(actor_key, jnp.zeros((1, dims.state)))
    critic_params, critic_opt = init_critic(config.critic, dims, critic_key)
    log_temperature = jnp.log(jnp.float32(config.sac.initial_temperature))
    optimizer = _optimizer(config)
    return AgentState(
        actor,
        optimizer.init(actor),
        critic_params,
        critic_params,
        critic_opt,
        log_temperature,
        optimizer.init(log_temperature),
    )


def tanh_gaussian(
    mean: Float[Array, "B D"], log_std: Float[Array, "B D"], noise: Float[Array, "B D"], scale: Scalar
) -> tuple[Float[Array, "B D"], Float[Array, " B"]]:
    """x = scale · tanh(μ + σ ε) and log π(x) = Σ_D [log N(ε) - log σ - log(scale (1 - tanh²))]."""
    pre = mean + jnp.exp(log_std) * noise
    log_normal = -0.5 * (noise**2 + jnp.log(2 * jnp.pi)) - log_std
    log_jacobian = jnp.log(scale) + 2 * (jnp.log(2.0) - pre - jax.nn.softplus(-2 * pre))
    return scale * jnp.tanh(pre), jnp.sum(log_normal - log_jacobian, axis=-1)


def sample_latent(
    config: SacConfig, actor: Params, state: Float[Array, "B d"], keys: Key[Array, " B"]
) -> tuple[Float[Array, "B D"], Float[Array, " B"]]:
    """x ~ π(· | s) and log π(x | s)."""
    latent_dim = _latent_dim(actor)
    mean, log_std = apply(GaussianActor(config.hidden, latent_dim), actor, state)
    noise = jax.vmap(lambda key: jax.random.normal(key, (latent_dim,)))(keys)
    return tanh_gaussian(mean, log_std, noise, config.scale)


def act(config: TrainConfig, agent: AgentState, state: Float[Array, "N d"], keys: Key[Array, " N"]) -> LatentSample:
    """Sample a latent; there is no flow-matching loss to cache (S = 0)."""
    noise_keys, cfm_keys = flow.split_keys(keys)
    latent, _ = sample_latent(config.sac, agent.actor, state, noise_keys)
    return LatentSample(latent, jnp.zeros((state.shape[0], 0)), cfm_keys)


def prepare(
    config: TrainConfig, agent: AgentState, window: Transition, key: Key[Array, ""]
) -> tuple[Transition, Metrics]:
    """The replay window, flattened; SAC needs no advantages."""
    newest = jax.tree.map(lambda leaf: leaf[-1], window)
    latent_std = jnp.sqrt(masked_mean(jnp.mean(newest.latent**2, axis=-1), newest.valid))
    return buffer.flatten(window), {"latent_std": latent_std}


def _reduce(config: SacConfig, q: Float[Array, "M B"]) -> Float[Array, " B"]:
    return jnp.mean(q, axis=0) if config.reduction == "mean" else critic.conservative_value(q)


def update(
    config: TrainConfig, agent: AgentState, minibatch: Transition, key: Key[Array, ""]
) -> tuple[AgentState, Metrics]:
    """One step each of critics, actor and temperature (Haarnoja et al. 2018, without entropy in the backup)."""
    sac, batch = config.sac, minibatch
    next_key, actor_key = jax.random.split(key)
    size = batch.reward.shape[0]
    q_fn = partial(ensemble_q, config.critic)

    next_latent, _ = sample_latent(sac, agent.actor, batch.next_state, jax.random.split(next_key, size))
    next_value = _reduce(sac, q_fn(agent.target_critic, batch.next_state, next_latent))
    target = batch.reward + batch.discount * next_value

    agent, metrics = critic_step(config.critic, agent, batch, target)

    temperature = jnp.exp(agent.log_temperature)

    def actor_loss_fn(params):
        latent, log_prob = sample_latent(sac, params, batch.state, jax.random.split(actor_key, size))
        loss = temperature * log_prob - _reduce(sac, q_fn(agent.critic, batch.state, latent))
        return masked_mean(loss, batch.valid), masked_mean(-log_prob, batch.valid)

    (actor_loss, entropy), grads = jax.value_and_grad(actor_loss_fn, has_aux=True)(agent.actor)
    optimizer = _optimizer(config)
    updates, actor_opt = optimizer.update(grads, agent.actor_opt, agent.actor)
    actor = optax.apply_updates(agent.actor, updates)

    # d/dα of α (H - H_target), taken with respect to log α
    grad = temperature * (entropy - sac.target_entropy)
    step, temperature_opt = optimizer.update(grad, agent.temperature_opt)
    metrics |= {"actor_loss": actor_loss, "entropy": entropy, "temperature": temperature}
    log_temperature = optax.apply_updates(agent.log_temperature, step)
    agent = agent._replace(
        actor=actor, actor_opt=actor_opt, log_temperature=log_temperature, temperature_opt=temperature_opt
    )
    return agent, metrics
