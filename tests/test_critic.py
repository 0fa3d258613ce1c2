import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax import critic

X, VALID = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])


def test_masked_mean():
    assert critic.masked_mean(X, VALID) == 2
    assert critic.masked_mean(X, jnp.zeros(3, bool)) == 0
    assert critic.masked_mean(jnp.array([[1.0, 2.0], [3.0, 9.0]]), jnp.array([[True, True], [True, False]])) == 2


def test_masked_std():
    np.testing.assert_allclose(critic.masked_std(X, VALID, 0.1), 1.0)  # of the population
    np.testing.assert_allclose(critic.masked_std(X, VALID, 5.0), 5.0)
    value, gradient = jax.value_and_grad(lambda x: critic.masked_std(x, VALID, 0.1))(jnp.full(3, 0.7))
    np.testing.assert_allclose(value, 0.1)
    np.testing.assert_array_equal(gradient, np.zeros(3))  # not NaN, as √ has at 0


def test_conservative_value():
    q = jnp.array([[1.0, 5.0], [2.0, -1.0], [3.0, 0.0]])  # [M B]
    np.testing.assert_array_equal(critic.conservative_value(q), [1.0, -1.0])


def test_critic_loss_metrics_are_over_valid_samples():
    q = jnp.array([[1.0, 90.0], [3.0, 70.0]])
    _, metrics = critic.critic_loss(q, jnp.array([2.5, 9.0]), jnp.array([True, False]))
    expected = {"critic_loss": (1.5**2 + 0.5**2) / 2, "q_mean": 2.0, "q_spread": 1.0, "td_target_mean": 2.5}
    assert {name: float(value) for name, value in metrics.items()} == expected


def test_advantages_of_each_environment_are_its_own():
    shape = (4, 3)
    reward, value = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([shape, (5, 3)]))
    done = jnp.zeros(shape, bool).at[1, 0].set(True)
    valid = jnp.ones(shape, bool).at[2, 2].set(False)
    args = reward, jnp.full(shape, 0.9), value, done, valid
    together = critic.generalized_advantage(*args, 0.95)
    for i in range(3):
        alone = critic.generalized_advantage(*(x[:, i : i + 1] for x in args), 0.95)
        np.testing.assert_allclose(together[:, i : i + 1], alone, rtol=1e-6)


def test_polyak():
    target, online = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}
    np.testing.assert_allclose(critic.polyak(target, online, 0.25)["w"], [1.5, 1.5])  # ¾ target + ¼ online
