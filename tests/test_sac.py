from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.algorithms import sac
from fpo_jax.config import PRESETS
from fpo_jax.types import Dims, Transition
from tiny import jit, keys, shrink

CONFIG = shrink(PRESETS["no_ratio"])
DIMS, B = Dims(state=3, latent=4), 16


def test_tanh_gaussian_log_probability():
    """log π(x) = log N(ε) - log |∂x/∂ε|, the Jacobian by central differences in 64 bit."""
    mean, log_std = np.array([[0.3, -1.0], [2.0, 0.0]]), np.array([[-0.5, 0.2], [-2.0, 0.7]])
    noise, scale = np.array([[0.7, -1.3], [0.1, 1.5]]), 1.5
    latent, log_prob = sac.tanh_gaussian(*map(jnp.float32, (mean, log_std, noise)), scale)

    def squash(noise):
        return scale * np.tanh(mean + np.exp(log_std) * noise)

    jacobian = (squash(noise + 1e-6) - squash(noise - 1e-6)) / 2e-6  # diagonal
    expected = np.sum(-0.5 * noise**2 - 0.5 * np.log(2 * np.pi) - np.log(jacobian), axis=1)
    np.testing.assert_allclose(latent, squash(noise), rtol=1e-5)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)


def test_tanh_gaussian_integrates_to_one():
    noise = np.linspace(-8, 8, 4001)[:, None]
    column = [jnp.full((4001, 1), value) for value in (0.4, -0.3)]
    latent, log_prob = sac.tanh_gaussian(*column, jnp.float32(noise), 2.0)
    np.testing.assert_allclose(np.trapezoid(np.exp(log_prob), np.asarray(latent)[:, 0]), 1.0, rtol=1e-3)


def test_tanh_gaussian_is_finite_far_out():
    far = jnp.full((1, 2), 60.0)
    latent, log_prob = sac.tanh_gaussian(far, jnp.zeros((1, 2)), jnp.zeros((1, 2)), 2.0)
    gradient = jax.grad(lambda mean: sac.tanh_gaussian(mean, 0 * mean, 0 * mean, 2.0)[1].sum())(far)
    assert np.isfinite(log_prob).all() and np.isfinite(gradient).all() and np.all(np.abs(latent) <= 2)


@pytest.fixture(scope="module")
def agent():
    return jit(sac.init, static_argnums=(0, 1))(CONFIG, DIMS, jax.random.key(0))


@pytest.fixture(scope="module")
def batch() -> Transition:
    state, latent = jax.random.normal(jax.random.key(1), (B, 3)), jax.random.normal(jax.random.key(2), (B, 4))
    reward, flags = -jnp.arange(B) / B, jnp.ones(B, bool)
    return Transition(state, latent, reward, state + 1, jnp.full(B, 0.9), flags, flags, jnp.zeros((B, 0)), keys(B))


update = jit(sac.update, static_argnums=0)


def with_spread(agent, log_std: float):
    """The same agent with another (state-independent) log standard deviation."""
    head = agent.actor["params"]["log_std"]
    params = agent.actor["params"] | {"log_std": head | {"bias": jnp.full_like(head["bias"], log_std)}}
    return agent._replace(actor={"params": params})


@pytest.mark.parametrize("log_std, direction", [(0.0, -1), (-4.0, 1)])
def test_the_temperature_moves_the_entropy_towards_its_target(agent, batch, log_std, direction):
    """Too much entropy lowers the weight of entropy, too little raises it."""
    start = with_spread(agent, log_std)
    new, metrics = update(CONFIG, start, batch, jax.random.key(3))
    assert np.sign(CONFIG.sac.target_entropy - metrics["entropy"]) == direction
    assert np.sign(new.log_temperature - start.log_temperature) == direction
    np.testing.assert_allclose(metrics["temperature"], CONFIG.sac.initial_temperature)


def test_act(agent):
    state = jnp.ones((5, 3))
    sample = jit(sac.act, static_argnums=0)(CONFIG, agent, state, keys(5))
    assert sample.latent.shape == (5, 4) and sample.cfm_loss.shape == (5, 0)
    assert np.all(np.abs(sample.latent) < CONFIG.sac.scale)
    # before training: 2 tanh(ε), from each environment's own key
    noise_key = jax.random.split(keys(5)[2])[0]
    np.testing.assert_allclose(sample.latent[2], 2 * np.tanh(jax.random.normal(noise_key, (4,))), rtol=1e-5)


@pytest.mark.parametrize("reduction, expected", [("mean", [2.0, 4.0]), ("min", [1.0, 3.0])])
def test_reduction_of_the_ensemble(reduction, expected):
    q = jnp.array([[1.0, 5.0], [3.0, 3.0]])
    np.testing.assert_allclose(sac._reduce(replace(CONFIG.sac, reduction=reduction), q), expected)


def test_a_bandit_is_learned():
    """Reward -(x - ½)² in every dimension, no future: the critics fit it and the actor's latents move to ½."""
    config = replace(
        CONFIG,
        critic=replace(CONFIG.critic, learning_rate=1e-2, num_critics=2),
        sac=replace(CONFIG.sac, learning_rate=1e-2, initial_temperature=0.01, target_entropy=-10.0),
    )
    latent = jax.random.uniform(jax.random.key(1), (128, 4), minval=-2, maxval=2)
    state, flags = jnp.ones((128, 3)), jnp.ones(128, bool)
    reward = -jnp.mean((latent - 0.5) ** 2, axis=1)
    rest = state, jnp.zeros(128), flags, flags, jnp.zeros((128, 0)), keys(128)
    bandit = Transition(state, latent, reward, *rest)

    @jit
    def train(agent):
        return jax.lax.scan(lambda a, key: sac.update(config, a, bandit, key), agent, keys(400))

    agent, metrics = train(jit(sac.init, static_argnums=(0, 1))(config, DIMS, jax.random.key(0)))
    np.testing.assert_allclose(metrics["td_target_mean"], jnp.full(400, reward.mean()), rtol=1e-5)
    assert metrics["critic_loss"][-1] < 0.2 * metrics["critic_loss"][0]
    played = sac.act(config, agent, state, keys(128)).latent
    assert np.mean((played - 0.5) ** 2) < 0.3  # 2 tanh(ε) begins at 1.8
    assert 0.2 < played.mean() < 0.8


def test_invalid_samples_change_nothing(agent, batch):
    half = jnp.arange(B) < 8
    one, _ = update(CONFIG, agent, batch._replace(valid=half), jax.random.key(3))
    nonsense = batch._replace(valid=half, reward=jnp.where(half, batch.reward, 1e6))
    other, _ = update(CONFIG, agent, nonsense, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_prepare_flattens_the_window(agent, batch):
    window = jax.tree.map(lambda leaf: leaf.reshape(2, 4, 2, *leaf.shape[1:]), batch)
    samples, metrics = sac.prepare(CONFIG, agent, window, jax.random.key(0))
    np.testing.assert_array_equal(samples.latent, batch.latent)
    np.testing.assert_allclose(metrics["latent_std"], np.sqrt(np.mean(batch.latent[8:] ** 2)), rtol=1e-5)
