from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax import flow
from tiny import jit, keys

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def zero(params, x, u, state):
    return jnp.zeros_like(x)


def prior(params, x, u, state):
    return flow.prior_velocity(x, u)


def test_interpolate():
    noise, latent = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[3.0, 4.0], [3.0, 4.0]])
    x_u, velocity = flow.interpolate(noise, latent, jnp.array([0.25, 1.0]))
    close(x_u, [[1.5, 1.0], [3.0, 4.0]])  # ¾ noise + ¼ latent; u = 1 is the latent
    close(velocity, [[2.0, 4.0], [2.0, 4.0]])


def test_prior_field():
    u = jnp.array([0.0, 0.25, 0.5, 1.0])
    close(flow.prior_scale(u), [1.0, np.sqrt(0.0625 + 0.5625), np.sqrt(0.5), 1.0])
    # x (2u-1)/(u²+(1-u)²): back to the mean at u = 0, outwards at u = 1
    close(flow.prior_velocity(jnp.full((4, 1), 2.0), u), [[-2.0], [2 * -0.5 / 0.625], [0.0], [2.0]])


def test_prior_field_is_optimal_for_the_normal_distribution():
    """2 - ∫(2u-1)²/(u²+(1-u)²) du = π/2 per dimension, against 2 for v = 0 (both from 65 536 draws)."""
    latent = jax.random.normal(jax.random.key(1), (4096, 4))
    run = jit(lambda v: flow.cfm_loss(v, None, jnp.zeros((4096, 1)), latent, keys(4096), 16), static_argnums=0)
    close(run(prior).mean(), np.pi / 2, atol=0.02)
    close(run(zero).mean(), 2.0, atol=0.02)
    for factor in (0.9, 1.1):
        off = run(lambda params, x, u, state, f=factor: f * prior(params, x, u, state)).mean()
        assert off > run(prior).mean()


def test_cfm_draws_are_stratified():
    noise, u = jax.tree.map(np.asarray, jit(jax.vmap(lambda key: flow.cfm_draws(key, 8, 3)))(keys(200)))
    bins = np.arange(8) / 8
    assert noise.shape == (200, 8, 3)
    assert np.all((u >= bins) & (u < bins + 1 / 8))
    close((u * 8 % 1).mean(), 0.5, atol=0.03)  # uniform within each
    close((noise.mean(), noise.std()), (0, 1), atol=0.05)


def test_cfm_loss_is_the_squared_error_averaged_over_dimensions():
    latent, state = jnp.array([[1.0, -2.0, 0.5]]), jnp.array([[0.3]])
    noise, u = map(np.asarray, flow.cfm_draws(keys(1)[0], 4, 3))

    def field(params, x, u, state):
        return params * x + u[:, None] * state

    x_u = (1 - u[:, None]) * noise + u[:, None] * np.asarray(latent)
    residual = 2.0 * x_u + 0.3 * u[:, None] - (np.asarray(latent) - noise)
    args = jnp.array(2.0), state, latent, keys(1)
    loss, deviation = jit(lambda *args: flow.cfm_terms(field, *args, 4))(*args)
    close(loss[0], (residual**2).mean(axis=-1))
    close(jit(lambda *args: flow.cfm_loss(field, *args, 4))(*args), loss)
    prior_part = x_u * ((2 * u - 1) / (u**2 + (1 - u) ** 2))[:, None]
    close(deviation[0], ((2.0 * x_u + 0.3 * u[:, None] - prior_part) ** 2).mean(axis=-1))


def test_the_same_keys_give_the_same_draws():
    latent = jax.random.normal(jax.random.key(1), (5, 3))
    run = jit(lambda latent, keys: flow.cfm_loss(zero, None, jnp.zeros((len(keys), 1)), latent, keys, 2))
    losses = run(latent, keys(5))
    np.testing.assert_array_equal(losses, run(latent, keys(5)))
    assert np.all(losses != run(latent, keys(5, seed=1)))
    close(run(latent[3:4], keys(5)[3:4]), losses[3:4])  # a sample's draws do not depend on the batch around it


def test_split_keys():
    first, second = flow.split_keys(keys(3))
    for i, key in enumerate(keys(3)):
        data = jax.random.key_data(jax.random.split(key))
        np.testing.assert_array_equal(jax.random.key_data(first[i]), data[0])
        np.testing.assert_array_equal(jax.random.key_data(second[i]), data[1])
    assert flow.split_keys(keys(3), 4).shape == (4, 3)
