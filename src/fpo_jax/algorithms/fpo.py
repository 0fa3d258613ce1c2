"""Flow Policy Optimization: PPO whose ratio is the change of each sample's flow-matching loss (paper Eqs. 2-4)."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree

from fpo_jax import buffer, critic, flow
from fpo_jax.config import ActorConfig, CriticConfig, TrainConfig
from fpo_jax.critic import masked_mean, masked_std
from fpo_jax.networks import VelocityNetwork, apply, q_ensemble
from fpo_jax.types import Dims, LatentSample, Metrics, Params, Scalar, Transition


class AgentState(NamedTuple):
    """Everything that learns."""

    actor: Params
    actor_opt: PyTree
    critic: Params  # leading axis M
    target_critic: Params
    critic_opt: PyTree


class Sample(NamedTuple):
    """A transition with its advantage; leading axis [B]."""

    transition: Transition
    advantage: Float[Array, "*batch"]

    @property
    def valid(self) -> Bool[Array, "*batch"]:
        return self.transition.valid


def velocity(config: ActorConfig, params: Params, x, u, state) -> Float[Array, "B D"]:
    """v_θ(x, u, s) = prior field + network (whose last layer starts at zero)."""
    residual = apply(VelocityNetwork(config.hidden), params, x, u, state)
    return flow.prior_velocity(x, u) + residual if config.preserve_prior else residual


def ensemble_q(config: CriticConfig, params: Params, state, latent) -> Float[Array, "M B"]:
    """All M critics at (s, x)."""
    return apply(q_ensemble(config.num_critics, config.hidden), params, state, latent)


def adam(learning_rate: Scalar, max_grad_norm: Scalar) -> optax.GradientTransformation:
    """Adam behind a global gradient clip."""
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.adam(learning_rate))


def init_critic(config: CriticConfig, dims: Dims, key: Key[Array, ""]) -> tuple[Params, PyTree]:
    """Critic parameters with leading axis M, and their optimiser state."""
    dummies = jnp.zeros((1, dims.state)), jnp.zeros((1, dims.latent))
    params = q_ensemble(config.num_critics, config.hidden).init(key, *dummies)
    return params, adam(config.learning_rate, config.max_grad_norm).init(params)


def critic_step(config: CriticConfig, agent: Any, batch: Transition, target: Float[Array, " B"]) -> tuple[Any, Metrics]:
    """One Adam step of all critics towards `target` (Eq. 6), then Polyak averaging; for any agent with critics."""

    def loss_fn(params):
        return critic.critic_loss(ensemble_q(config, params, batch.state, batch.latent), target, batch.valid)

    grads, metrics = jax.grad(loss_fn, has_aux=True)(agent.critic)
    updates, critic_opt = adam(config.learning_rate, config.max_grad_norm).update(grads, agent.critic_opt, agent.critic)
    params = optax.apply_updates(agent.critic, updates)
    target_params = critic.polyak(agent.target_critic, params, config.polyak)
    return agent._replace(critic=params, target_critic=target_params, critic_opt=critic_opt), metrics


def init(config: TrainConfig, dims: Dims, key: Key[Array, ""]) -> AgentState:
    """A fresh agent; with `actor.preserve_prior` its latents are exactly N(0, I)."""
    actor_key, critic_key = jax.random.split(key)
    dummies = jnp.zeros((1, dims.latent)), jnp.zeros(1), jnp.zeros((1, dims.state))
    actor = VelocityNetwork(config.actor.hidden).init(actor_key, *dummies)
    actor_opt = adam(config.actor.learning_rate, config.actor.max_grad_norm).init(actor)
    critic_params, critic_opt = init_critic(config.critic, dims, critic_key)
    return AgentState(actor, actor_opt, critic_params, critic_params, critic_opt)


def latent_dim(agent: AgentState) -> int:
    """D, read off the velocity network's last bias."""
    return agent.actor["params"]["velocity"]["bias"].shape[-1]


def sample_latent(
    config: TrainConfig, agent: AgentState, state: Float[Array, "N d"], keys: Key[Array, " N"]
) -> Float[Array, "N D"]:
    """x ~ π_θ(· | s): integrate v_θ from noise drawn from each key, then explore (Eq. 7)."""
    actor = config.actor
    field = partial(velocity, actor)
    noise = jax.vmap(lambda key: jax.random.normal(key, (latent_dim(agent),)))(keys)
    latent = flow.integrate(
        field, agent.actor, state, noise, actor.sampler_steps, actor.integrator, actor.preserve_prior
    )
    return flow.explore(field, agent.actor, state, latent, actor.explore_step_size, actor.explore_steps)


def act(config: TrainConfig, agent: AgentState, state: Float[Array, "N d"], keys: Key[Array, " N"]) -> LatentSample:
    """Sample x_t and cache ℓ_cfm(x_t | s_t; θ_old) with the key of its draws (Alg. 1, lines 7 and 10)."""
    noise_keys, cfm_keys = flow.split_keys(keys)
    latent = sample_latent(config, agent, state, noise_keys)
    loss = flow.cfm_loss(partial(velocity, config.actor), agent.actor, state, latent, cfm_keys, config.actor.cfm_draws)
    return LatentSample(latent, loss, cfm_keys)


def loss_reduction(cfm_loss_old: Float[Array, "B S"], cfm_loss_new: Float[Array, "B S"]) -> Float[Array, "B S"]:
    """Δℓ = ℓ_cfm(x | s; θ_old) - ℓ_cfm(x | s; θ), draw by draw.  Eq. (2)."""
    return jax.lax.stop_gradient(cfm_loss_old) - cfm_loss_new


def ratio_proxy(
    delta: Float[Array, "B S"],
    valid: Bool[Array, " B"],
    kind: Literal["mean", "sample", "paper"],
    beta: Scalar,
    std_floor: Scalar,
    log_ratio_clamp: Scalar,
) -> Float[Array, "B R"]:
    """The likelihood-free ratio ρ.  Eq. (3).

    paper:  ρ = exp(β z), z = (Δℓ - μ_Δ) / max(σ_Δ, floor), Δℓ averaged over draws; μ, σ are constants (R = 1)
    mean:   ρ = exp(clamp(Δℓ averaged over draws)) (R = 1; McAllister et al. 2025)
    sample: ρ = exp(clamp(Δℓ)) per draw (R = S)
    """
    if kind == "sample":
        return jnp.exp(jnp.clip(delta, -log_ratio_clamp, log_ratio_clamp))
    delta = jnp.mean(delta, axis=-1)
    if kind == "mean":
        return jnp.exp(jnp.clip(delta, -log_ratio_clamp, log_ratio_clamp))[:, None]
    mean = jax.lax.stop_gradient(masked_mean(delta, valid))
    std = jax.lax.stop_gradient(masked_std(delta, valid, std_floor))
    return jnp.exp(beta * (delta - mean) / std)[:, None]


def clipped_surrogate(
    ratio: Float[Array, "B R"],
    advantage: Float[Array, " B"],
    valid: Bool[Array, " B"],
    epsilon: Scalar,
    trust_region: Literal["clip", "asymmetric", "none"] = "clip",
) -> Float[Array, ""]:
    """E[min(ρ Â, clip(ρ, 1-ε, 1+ε) Â)], to be maximised.  Eq. (4).

    asymmetric: the same for Â >= 0; for Â < 0 ρ Â - |Â| / (2ε) (ρ - 1)², whose maximum is at ρ = 1 - ε.
    none:       ρ Â.
    """
    advantage = advantage[:, None]
    linear = ratio * advantage
    if trust_region == "none":
        objective = linear
    else:
        clipped = jnp.minimum(linear, jnp.clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)
        penalised = linear - jnp.abs(advantage) / (2 * epsilon) * (ratio - 1) ** 2
        asymmetric = trust_region == "asymmetric"
        objective = jnp.where(advantage < 0, penalised, clipped) if asymmetric else clipped
    return masked_mean(jnp.mean(objective, axis=-1), valid)


def state_value(
    config: TrainConfig, agent: AgentState, state: Float[Array, "B d"], key: Key[Array, ""]
) -> Float[Array, " B"]:
    """V(s) = mean over fresh latents x' ~ π_θ(· | s) of min_i Q_i(s, x')."""
    num = config.critic.value_samples
    repeated = jnp.repeat(state, num, axis=0)
    latent = sample_latent(config, agent, repeated, jax.random.split(key, repeated.shape[0]))
    q = critic.conservative_value(ensemble_q(config.critic, agent.critic, repeated, latent))
    return jnp.mean(q.reshape(-1, num), axis=-1)


def _advantages(
    config: TrainConfig, agent: AgentState, window: Transition, key: Key[Array, ""]
) -> Float[Array, "W T N"]:
    """Â of every slot of the window; GAE runs over whole trajectories, before any shuffling."""
    shape = window.reward.shape
    last = window.next_state[:, -1:]
    last_key, key = jax.random.split(key)
    stored_q = critic.conservative_value(
        ensemble_q(config.critic, agent.critic, buffer.flatten(window.state), buffer.flatten(window.latent))
    ).reshape(shape)
    if config.fpo.value_latents == "stored":
        value = stored_q
    else:
        value = state_value(config, agent, buffer.flatten(window.state), key).reshape(shape)
    if config.fpo.advantage == "q_minus_v":
        return jnp.where(window.valid, stored_q - value, 0.0)
    last_value = state_value(config, agent, buffer.flatten(last), last_key).reshape(last.shape[:-1])
    value = jnp.concatenate([value, last_value], axis=1)
    gae = partial(critic.generalized_advantage, lam=config.fpo.gae_lambda)
    return jax.vmap(gae)(window.reward, window.discount, value, window.done, window.valid)


def prepare(config: TrainConfig, agent: AgentState, window: Transition, key: Key[Array, ""]) -> tuple[Sample, Metrics]:
    """Advantages for the whole window, flattened to samples [W·T·N].

    `first_ratio_error` is max |ρ - 1| on the newest rollout before its first step: 0 up to rounding, unless the cached
    losses and the current ones disagree.
    """
    samples = Sample(window, _advantages(config, agent, window, key))
    newest = buffer.flatten(jax.tree.map(lambda leaf: leaf[-1], window), 2)
    field = partial(velocity, config.actor)
    new = flow.cfm_loss(field, agent.actor, newest.state, newest.latent, newest.cfm_key, config.actor.cfm_draws)
    error = jnp.abs(jnp.exp(jnp.mean(loss_reduction(newest.cfm_loss, new), axis=-1)) - 1)
    advantage = samples.advantage
    metrics = {
        "first_ratio_error": jnp.max(jnp.where(newest.valid, error, 0.0)),
        "advantage_std": masked_std(advantage, window.valid, 0.0),
        "latent_std": jnp.sqrt(masked_mean(jnp.mean(newest.latent**2, axis=-1), newest.valid)),
    }
    return buffer.flatten(samples), metrics


def update_critic(
    config: TrainConfig, agent: AgentState, batch: Transition, key: Key[Array, ""]
) -> tuple[AgentState, Metrics]:
    """One step on Eqs. (5) and (6), then Polyak averaging of the targets."""
    keys = jax.random.split(key, batch.reward.shape[0])
    next_latent = sample_latent(config, agent, batch.next_state, keys)
    next_q = ensemble_q(config.critic, agent.target_critic, batch.next_state, next_latent)
    target = critic.td_target(batch.reward, batch.discount, next_q)

    return critic_step(config.critic, agent, batch, target)


def actor_loss(config: TrainConfig, params: Params, batch: Sample) -> tuple[Float[Array, ""], Metrics]:
    """-(Eq. 4) + anchor · mean squared deviation of v_θ from the prior field.

    Gradients flow through ρ; only ℓ_old and the batch statistics are constants. (Stopping them at ρ itself, the
    paper's wording, would leave no gradient at all: docs/equations.md.)
    """
    fpo, transition = config.fpo, batch.transition
    new, deviation = flow.cfm_terms(
        partial(velocity, config.actor),
        params,
        transition.state,
        transition.latent,
        transition.cfm_key,
        config.actor.cfm_draws,
    )
    delta = loss_reduction(transition.cfm_loss, new)
    ratio = ratio_proxy(delta, batch.valid, fpo.ratio, fpo.beta, fpo.std_floor, fpo.log_ratio_clamp)
    advantage = batch.advantage
    if fpo.standardize_advantage:
        advantage = (advantage - masked_mean(advantage, batch.valid)) / masked_std(advantage, batch.valid, 1e-6)
    surrogate = clipped_surrogate(ratio, advantage, batch.valid, fpo.epsilon, fpo.trust_region)
    anchor = masked_mean(jnp.mean(deviation, axis=-1), batch.valid)
    loss = -surrogate + fpo.anchor * anchor
    mean_ratio = jnp.mean(ratio, axis=-1)
    weight, weight_sq = masked_mean(mean_ratio, batch.valid), masked_mean(mean_ratio**2, batch.valid)
    outside = jnp.mean(jnp.abs(ratio - 1) > fpo.epsilon, axis=-1, dtype=jnp.float32)
    metrics = {
        "actor_loss": loss,
        "anchor": anchor,
        "cfm_loss": masked_mean(jnp.mean(new, axis=-1), batch.valid),
        "ratio_mean": weight,
        "clip_fraction": masked_mean(outside, batch.valid),  # share with |ρ - 1| > ε, whatever the sign of Â
        "effective_sample_size": weight**2 / jnp.maximum(weight_sq, 1e-12),  # (Σρ)² / (n Σρ²), a share of n
        "delta_std": masked_std(jnp.mean(delta, axis=-1), batch.valid, 0.0),
    }
    return loss, metrics


def update_actor(config: TrainConfig, agent: AgentState, batch: Sample) -> tuple[AgentState, Metrics]:
    """One step on Eqs. (2), (3), (4)."""
    grads, metrics = jax.grad(lambda params: actor_loss(config, params, batch), has_aux=True)(agent.actor)
    optimizer = adam(config.actor.learning_rate, config.actor.max_grad_norm)
    updates, actor_opt = optimizer.update(grads, agent.actor_opt, agent.actor)
    metrics["actor_grad_norm"] = optax.tree.norm(grads)
    return agent._replace(actor=optax.apply_updates(agent.actor, updates), actor_opt=actor_opt), metrics


def update(
    config: TrainConfig, agent: AgentState, minibatch: Sample, key: Key[Array, ""]
) -> tuple[AgentState, Metrics]:
    """One gradient step: critics (Eqs. 5, 6), then actor (Eqs. 2-4). Alg. 1, lines 15-27."""
    agent, critic_metrics = update_critic(config, agent, minibatch.transition, key)
    agent, actor_metrics = update_actor(config, agent, minibatch)
    return agent, critic_metrics | actor_metrics
