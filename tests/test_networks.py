import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax import networks
from tiny import jit, perturbed


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


X, U, STATE = draw(3, 4), jnp.array([0.1, 0.5, 0.9]), draw(3, 5, seed=1)


def test_time_embedding():
    # u = ½: sin and cos of π/2, π, 2π, 4π
    np.testing.assert_allclose(networks.time_embedding(jnp.array([0.5])), [[0.5, 1, 0, 0, 0, 0, -1, 1, 1]], atol=1e-5)
    assert networks.time_embedding(U, 2).shape == (3, 5)


def test_velocity_starts_at_zero_and_depends_on_all_its_inputs():
    net = networks.VelocityNetwork((8,))
    params = jit(net.init)(jax.random.key(0), X, U, STATE)
    apply = jit(net.apply)
    np.testing.assert_array_equal(apply(params, X, U, STATE), np.zeros((3, 4)))
    params = perturbed(params)
    out = apply(params, X, U, STATE)
    assert out.shape == (3, 4)
    for changed in [(X + 1, U, STATE), (X, U / 2, STATE), (X, U, STATE + 1)]:
        assert np.abs(apply(params, *changed) - out).max() > 1e-3


def test_the_ensemble_is_m_independent_critics():
    ensemble, single = networks.q_ensemble(3, (8,)), networks.QNetwork((8,))
    params = jit(ensemble.init)(jax.random.key(0), STATE, X)
    q = jit(ensemble.apply)(params, STATE, X)
    assert q.shape == (3, 3)  # [M B]
    for i in range(3):
        own = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], params["params"])}
        np.testing.assert_allclose(q[i], single.apply(own, STATE, X), rtol=1e-5, atol=1e-6)
    assert np.abs(q[0] - q[1]).min() > 1e-3  # drawn apart


def test_gaussian_actor_starts_standard_and_bounds_its_spread():
    net = networks.GaussianActor((8,), 4)
    params = jit(net.init)(jax.random.key(0), STATE)
    mean, log_std = net.apply(params, STATE)
    np.testing.assert_array_equal(mean, np.zeros((3, 4)))
    np.testing.assert_array_equal(log_std, np.zeros((3, 4)))
    params["params"]["log_std"]["bias"] = jnp.array([-50.0, -1.0, 1.0, 50.0])
    np.testing.assert_array_equal(net.apply(params, STATE)[1][0], [-10.0, -1.0, 1.0, 2.0])


def test_apply():
    net = networks.QNetwork((8,))
    params = jit(net.init)(jax.random.key(0), STATE, X)
    np.testing.assert_array_equal(networks.apply(net, params, STATE, X), net.apply(params, STATE, X))
