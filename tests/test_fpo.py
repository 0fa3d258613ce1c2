"""The parts of FPO between the equations (those are in test_equations.py)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import flow
from fpo_jax.algorithms import fpo
from fpo_jax.types import Dims, Transition
from tiny import TINY, act_fpo, init_fpo, jit, keys, perturbed

DIMS = Dims(state=3, latent=4)
W, T, N = 2, 3, 2


@pytest.fixture(scope="module")
def agent():
    agent = init_fpo(TINY, DIMS, jax.random.key(0))
    return agent._replace(actor=perturbed(agent.actor))


@pytest.fixture(scope="module")
def window(agent) -> Transition:
    """Two rollouts of the agent's own samples; slot 1 of environment 0 of the newest is not valid."""
    num = W * T * N
    state = jax.random.normal(jax.random.key(1), (num, 3))
    sample = act_fpo(TINY, agent, state, keys(num))
    state, latent, loss, key = (x.reshape(W, T, N, *x.shape[1:]) for x in (state, *sample))
    reward = jax.random.normal(jax.random.key(2), (W, T, N))
    valid = jnp.ones((W, T, N), bool).at[1, 1, 0].set(False)
    discount = jnp.full((W, T, N), 0.9)
    done = jnp.zeros((W, T, N), bool)
    return Transition(state, latent, reward, jnp.roll(state, -1, axis=1), discount, done, valid, loss, key)


def prepare(config, agent, window):
    return jit(fpo.prepare, static_argnums=0)(config, agent, window, jax.random.key(3))


ensemble_q = jit(fpo.ensemble_q, static_argnums=0)
state_value = jit(fpo.state_value, static_argnums=0)


@jit
def cfm_loss(actor, state, latent, keys):
    return flow.cfm_loss(partial(fpo.velocity, TINY.actor), actor, state, latent, keys, TINY.actor.cfm_draws)


def stored_q(agent, window):
    q = ensemble_q(TINY.critic, agent.critic, window.state.reshape(-1, 3), window.latent.reshape(-1, 4))
    return np.asarray(q).min(axis=0).reshape(W, T, N)


def test_act_caches_the_loss_of_the_latent_that_it_executes(agent):
    state = jax.random.normal(jax.random.key(1), (5, 3))
    sample = act_fpo(TINY, agent, state, keys(5))
    again = cfm_loss(agent.actor, state, sample.latent, sample.cfm_key)
    np.testing.assert_allclose(sample.cfm_loss, again, rtol=1e-5)
    assert sample.cfm_loss.shape == (5, TINY.actor.cfm_draws)


def test_exploration_after_sampling_is_part_of_the_executed_latent(agent):
    """Reading B: x^(K), not x^(0), is what is decoded and stored."""
    state = jnp.ones((2, 3))
    explored = replace(TINY, actor=replace(TINY.actor, explore_steps=2, explore_step_size=0.1))
    before, after = (act_fpo(config, agent, state, keys(2)).latent for config in (TINY, explored))
    expected = flow.explore(partial(fpo.velocity, TINY.actor), agent.actor, state, before, 0.1, 2)
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(after - before).min() > 1e-4


def test_value_is_the_mean_over_fresh_latents_of_the_smallest_q(agent):
    state, key = jax.random.normal(jax.random.key(1), (2, 3)), jax.random.key(5)
    num = TINY.critic.value_samples
    repeated = jnp.repeat(state, num, axis=0)  # state 0, state 0, state 1, state 1
    latent = jit(fpo.sample_latent, static_argnums=0)(TINY, agent, repeated, jax.random.split(key, 2 * num))
    smallest = np.asarray(ensemble_q(TINY.critic, agent.critic, repeated, latent)).min(axis=0)
    by_hand = [smallest[:num].mean(), smallest[num:].mean()]
    np.testing.assert_allclose(state_value(TINY, agent, state, key), by_hand, rtol=1e-4, atol=1e-5)
    assert np.ptp(smallest[:num]) > 1e-3  # the latents differ


def test_advantages_with_stored_latents_are_the_td_errors_of_the_critic(agent, window):
    """Why V is not read at stored latents: for λ = 0 the advantage is what the critic's training takes to zero."""
    config = replace(TINY, fpo=replace(TINY.fpo, value_latents="stored", gae_lambda=0.0))
    samples, _ = prepare(config, agent, window)
    q = stored_q(agent, window)
    error = np.asarray(window.reward[:, :-1]) + 0.9 * q[:, 1:] - q[:, :-1]
    error = np.where(window.valid[:, :-1], error, 0)
    np.testing.assert_allclose(samples.advantage.reshape(W, T, N)[:, :-1], error, rtol=1e-4, atol=1e-5)


def test_advantages_q_minus_v(agent, window):
    config = replace(TINY, fpo=replace(TINY.fpo, advantage="q_minus_v"))
    advantage = prepare(config, agent, window)[0].advantage.reshape(W, T, N)
    _, key = jax.random.split(jax.random.key(3))
    value = state_value(TINY, agent, window.state.reshape(-1, 3), key).reshape(W, T, N)
    expected = np.where(window.valid, stored_q(agent, window) - np.asarray(value), 0)
    np.testing.assert_allclose(advantage, expected, rtol=1e-4, atol=1e-5)


def test_prepare_keeps_rollouts_apart_and_flattens_in_order(agent, window):
    samples, metrics = prepare(TINY, agent, window)
    np.testing.assert_array_equal(samples.transition.reward, window.reward.ravel())
    np.testing.assert_array_equal(samples.valid, window.valid.ravel())
    assert samples.advantage[8] == 0  # [1, 1, 0]
    assert metrics["first_ratio_error"] < 1e-5
    changed, _ = prepare(TINY, agent, window._replace(reward=window.reward.at[1].add(5.0)))
    difference = np.asarray(changed.advantage - samples.advantage).reshape(W, T, N)
    assert not difference[0].any() and np.all(difference[1][window.valid[1]] > 0)


def test_first_ratio_error_sees_a_cache_of_other_parameters(agent, window):
    _, metrics = prepare(TINY, agent._replace(actor=perturbed(agent.actor, seed=9)), window)
    assert metrics["first_ratio_error"] > 1e-2


def minibatch(window, advantage):
    flat = jax.tree.map(lambda leaf: leaf.reshape(W * T * N, *leaf.shape[3:]), window)
    return fpo.Sample(flat._replace(valid=jnp.ones(W * T * N, bool)), advantage)


update = jit(fpo.update, static_argnums=0)


def test_an_update_moves_losses_against_the_advantage(agent, window):
    """A good sample becomes more likely (its CFM loss falls), a bad one less."""
    good = jnp.arange(W * T * N) % 2 == 0
    batch = minibatch(window, jnp.where(good, 1.0, -1.0))
    new = agent
    for _ in range(5):
        new, metrics = update(TINY, new, batch, jax.random.key(0))
    rows = batch.transition
    after = cfm_loss(new.actor, rows.state, rows.latent, rows.cfm_key)
    change = np.asarray(after - rows.cfm_loss).mean(axis=-1)
    assert change[good].mean() < 0 < change[~good].mean()
    assert set(metrics) >= {"actor_loss", "critic_loss", "ratio_mean", "clip_fraction", "effective_sample_size"}


def test_an_update_moves_targets_by_polyak(agent, window):
    new, _ = update(TINY, agent, minibatch(window, jnp.ones(W * T * N)), jax.random.key(0))
    rate = TINY.critic.polyak
    expected = jax.tree.map(lambda t, o: (1 - rate) * t + rate * o, agent.target_critic, new.critic)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), new.target_critic, expected)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new.critic, agent.critic)
    assert max(jax.tree.leaves(moved)) > 0


def test_invalid_samples_change_nothing(agent, window):
    """Neither the losses of valid ones nor, alone, the parameters; not even where they hold nonsense."""
    batch = minibatch(window, jnp.linspace(-1, 1, W * T * N))
    half = jnp.arange(W * T * N) < 6
    transition = batch.transition._replace(valid=half)
    nonsense = transition._replace(
        reward=jnp.where(half, transition.reward, 1e6), cfm_loss=jnp.where(half[:, None], transition.cfm_loss, 2.0)
    )
    one, _ = update(TINY, agent, batch._replace(transition=transition), jax.random.key(0))
    other, _ = update(TINY, agent, batch._replace(transition=nonsense), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    nothing, _ = update(
        TINY, agent, batch._replace(transition=transition._replace(valid=~half & half)), jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, (nothing.actor, nothing.critic), (agent.actor, agent.critic))
