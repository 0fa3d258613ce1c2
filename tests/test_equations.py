"""The paper's equations in its order, against numbers computed by hand (docs/equations.md)."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import flow
from fpo_jax.algorithms import fpo
from fpo_jax.config import RolloutConfig, TrainConfig
from fpo_jax.critic import critic_loss, generalized_advantage, td_target
from fpo_jax.rollout import FrozenBase
from fpo_jax.types import Dims
from tiny import TINY, act_fpo, begin, init_fpo, jit, keys, perturbed, run_rollout, scripted_system

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)

# --- Eq. (1): J = E[Σ γ^t r_t]


@pytest.mark.parametrize(
    "reward, expected",
    [
        # success at the third decision: 0.9² · 1; the slot after it resets the environment, then a new episode begins
        ("sparse", [0, 0, 0.81, 0, 0, 0]),
        # -1 - 0.9 + 0.9² · 0
        ("step_cost", [-1, -1.9, -1.9, 0, -1, -1.9]),
    ],
)
def test_eq1_discounted_return(reward, expected):
    config = TrainConfig(rollout=RolloutConfig(gamma=0.9, reward=reward))
    system = scripted_system(config, success_at=(3,), fault_at=(0,))
    _, _, episodes = run_rollout(system, FrozenBase({}), None, begin(system, keys(1)), jax.random.key(1), 6)
    close(episodes.ret[:, 0], expected)
    assert episodes.ended[:, 0].tolist() == [False, False, True, False, False, False]


def test_eq1_the_return_goes_on_from_rollout_to_rollout():
    config = TrainConfig(rollout=RolloutConfig(gamma=0.9, reward="step_cost"))
    system = scripted_system(config, success_at=(0,), fault_at=(0,))
    carry = begin(system, keys(1))
    carry, _, first = run_rollout(system, FrozenBase({}), None, carry, jax.random.key(1), 2)
    _, _, second = run_rollout(system, FrozenBase({}), None, carry, jax.random.key(2), 3)
    close(first.ret[:, 0], [-1, -1.9])
    close(second.ret[:, 0], [-1.9 - 0.81, -1.9 - 0.81 - 0.729, 0])  # time limit after four decisions, then the reset
    assert second.ended[:, 0].tolist() == [False, True, False]


# --- Eq. (2): Δℓ = ℓ(θ_old) - ℓ(θ)


def test_eq2_loss_reduction():
    old, new = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, 3.0]])
    close(fpo.loss_reduction(old, new), [[0.5, -1.0]])
    by_old, by_new = jax.grad(lambda o, n: fpo.loss_reduction(o, n).sum(), argnums=(0, 1))(old, new)
    close(by_old, [[0, 0]])  # ℓ_old is a constant
    close(by_new, [[-1, -1]])


# --- Eq. (3): z = (Δℓ - μ) / σ, ρ = exp(β z)

ratio = partial(fpo.ratio_proxy, beta=0.1, std_floor=0.02, log_ratio_clamp=3.0)
# draws average to 0.5, 0.1 and 7; the third sample is not valid
DELTA = jnp.array([[0.4, 0.6], [0.3, -0.1], [7.0, 7.0]])
VALID = jnp.array([True, True, False])


def test_eq3_paper():
    # over the valid ones μ = 0.3, σ = 0.2 (of the population), z = ±1
    close(ratio(DELTA, VALID, "paper")[:2], [[1.1051709], [0.9048374]])  # e^±0.1
    close(ratio(DELTA, VALID, "paper", std_floor=1.0)[:2], [[1.0202013], [0.9801987]])  # z = ±0.2: e^±0.02


def test_eq3_mean():
    close(ratio(DELTA, VALID, "mean"), [[1.6487213], [1.1051709], [20.085537]])  # e^0.5, e^0.1, clamped to e^3
    close(ratio(-DELTA, VALID, "mean")[2:], [[0.04978707]])  # e^-3


def test_eq3_sample():
    expected = [[1.4918247, 1.8221188], [1.3498588, 0.9048374], [20.085537, 20.085537]]  # e^0.4, e^0.6, e^0.3, e^-0.1
    close(ratio(DELTA, VALID, "sample"), expected)


def test_eq3_without_spread_values_and_gradients_are_finite():
    """At θ = θ_old every Δℓ is 0: a plain σ would divide 0 by 0, and its gradient is NaN."""
    delta, valid = jnp.full((4, 2), 0.4), jnp.ones(4, bool)
    close(ratio(delta, valid, "paper"), np.ones((4, 1)))
    # β / floor = 0.1 / 0.02 per sample, shared by two draws
    gradient = jax.grad(lambda d: ratio(d, valid, "paper").sum())(delta)
    close(gradient, np.full((4, 2), 2.5))


def test_eq3_statistics_are_constants():
    """∂ρ_i/∂Δℓ_j = β ρ_i / σ for i = j, else 0: with gradients through μ and σ it would be full."""
    delta = jnp.array([[0.5], [0.1]])
    jacobian = jax.jacobian(lambda d: ratio(d, jnp.ones(2, bool), "paper")[:, 0])(delta)[..., 0]
    close(jacobian, [[0.1 * 1.1051709 / 0.2, 0], [0, 0.1 * 0.9048374 / 0.2]])


@cache
def make_batch(size: int = 6):
    """An agent whose network is no longer zero, and its own fresh samples with advantages ±1."""
    agent = init_fpo(TINY, Dims(state=3, latent=4), jax.random.key(0))
    agent = agent._replace(actor=perturbed(agent.actor))
    state = jax.random.normal(jax.random.key(1), (size, 3))
    sample = act_fpo(TINY, agent, state, keys(size))
    flags = jnp.ones(size, bool)
    transition = fpo.Transition(
        state, sample.latent, jnp.zeros(size), state, jnp.zeros(size), flags, flags, sample.cfm_loss, sample.cfm_key
    )
    return agent, fpo.Sample(transition, jnp.where(jnp.arange(size) < size // 2, 1.0, -1.0))


@pytest.mark.parametrize("kind", ["paper", "mean", "sample"])
def test_eq3_ratio_is_one_at_the_old_parameters(kind):
    config = replace(TINY, fpo=replace(TINY.fpo, ratio=kind))
    agent, batch = make_batch()
    loss = jit(partial(fpo.actor_loss, config))
    _, metrics = loss(agent.actor, batch)
    close(metrics["ratio_mean"], 1.0)
    close(metrics["effective_sample_size"], 1.0)  # each of them is 1, not only their mean
    assert metrics["clip_fraction"] == 0
    _, moved = loss(perturbed(agent.actor, seed=8), batch)
    assert moved["effective_sample_size"] < 0.999


# --- Eq. (4): E[min(ρ Â, clip(ρ, 1-ε, 1+ε) Â)]


def surrogate(value, advantage, trust_region, epsilon=0.2):
    one = jnp.ones(1, bool)
    return fpo.clipped_surrogate(jnp.full((1, 1), value), jnp.full(1, advantage), one, epsilon, trust_region)


@pytest.mark.parametrize(
    "value, advantage, expected, slope",
    [
        (1.1, 2.0, 2.2, 2.0),  # inside the band: ρ Â
        (1.5, 2.0, 2.4, 0.0),  # above it, no more to gain: 1.2 · 2
        (0.5, 2.0, 1.0, 2.0),  # below it, the way back is open
        (0.9, -2.0, -1.8, -2.0),
        (0.5, -2.0, -1.6, 0.0),  # 0.8 · (-2)
        (1.5, -2.0, -3.0, -2.0),
    ],
)
def test_eq4_clip(value, advantage, expected, slope):
    got = jax.value_and_grad(partial(surrogate, trust_region="clip"))(value, advantage)
    close(got, (expected, slope))


@pytest.mark.parametrize(
    "value, advantage, expected, slope",
    [
        (0.8, -2.0, -1.8, 0.0),  # ρ Â - |Â|/(2ε) (ρ-1)² = -1.6 - 5 · 0.04, flat at ρ = 1-ε
        (0.5, -2.0, -2.25, 3.0),  # -1 - 5 · 0.25: pulled back up, where the clip lets go
        (1.5, -2.0, -4.25, -7.0),  # -3 - 5 · 0.25
        (1.5, 2.0, 2.4, 0.0),  # Â >= 0: the clip
        (0.5, 2.0, 1.0, 2.0),
    ],
)
def test_eq4_asymmetric(value, advantage, expected, slope):
    got = jax.value_and_grad(partial(surrogate, trust_region="asymmetric"))(value, advantage)
    close(got, (expected, slope))


@pytest.mark.parametrize("epsilon", [0.05, 0.2])
def test_eq4_asymmetric_optimum(epsilon):
    grid = np.linspace(0.5, 1.5, 1001)
    values = jax.vmap(lambda v: surrogate(v, -0.7, "asymmetric", epsilon))(jnp.asarray(grid))
    close(grid[np.argmax(values)], 1 - epsilon, atol=2e-3)


def test_eq4_without_a_trust_region():
    close(jax.value_and_grad(partial(surrogate, trust_region="none"))(1.5, 2.0), (3.0, 2.0))
    close(jax.value_and_grad(partial(surrogate, trust_region="none"))(0.5, -2.0), (-1.0, -2.0))


def test_eq4_averages_over_draws_and_valid_samples():
    value = jnp.array([[1.1, 1.5], [0.9, 0.5], [9.0, 9.0]])
    # (2.2 + 2.4)/2 = 2.3 and (-1.8 - 1.6)/2 = -1.7; the third is not valid
    got = fpo.clipped_surrogate(value, jnp.array([2.0, -2.0, 5.0]), VALID, 0.2)
    close(got, (2.3 - 1.7) / 2)
    assert fpo.clipped_surrogate(value, jnp.ones(3), jnp.zeros(3, bool), 0.2) == 0


def test_eq4_the_literal_stop_gradient_leaves_no_gradient(monkeypatch):
    """ "We stop gradients through ρ_t": θ enters Eq. (4) through ρ alone, so nothing would be left to learn from."""
    config = replace(TINY, fpo=replace(TINY.fpo, anchor=0.0))
    agent, batch = make_batch()

    def largest_gradient():
        gradient = jit(jax.grad(lambda params: fpo.actor_loss(config, params, batch)[0]))(agent.actor)
        return max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))

    assert largest_gradient() > 1e-3
    ours = fpo.ratio_proxy
    monkeypatch.setattr(fpo, "ratio_proxy", lambda *args: jax.lax.stop_gradient(ours(*args)))
    assert largest_gradient() == 0


# --- Eq. (5): y = r + γ min_i Q_i(s', x')


def test_eq5_td_target():
    next_q = jnp.array([[2.0, 5.0], [3.0, 4.0]])  # [M B]: minima 2 and 4
    # 1 + 0.9 · 2; the second s' is terminal: its reward alone
    close(td_target(jnp.array([1.0, 0.5]), jnp.array([0.9, 0.0]), next_q), [2.8, 0.5])


# --- Eq. (6): E[(Q - y)²]


def test_eq6_critic_loss():
    q, target = jnp.array([[1.0, 2.0], [4.0, 5.0]]), jnp.array([2.0, 0.0])  # [M B], [B]
    both, first = jnp.ones(2, bool), jnp.array([True, False])
    close(critic_loss(q, target, both)[0], 8.5)  # ((1 + 4)/2 + (4 + 25)/2) / 2
    close(critic_loss(q, target, first)[0], 2.5)

    def loss(q, target, valid):
        return critic_loss(q, target, valid)[0]

    by_q, by_y = jax.grad(loss, argnums=(0, 1))(q, target, first)
    close(by_q, [[-1, 0], [2, 0]])  # 2 (Q - y) / M
    close(by_y, [0, 0])  # y is a constant
    nothing = jax.value_and_grad(loss)(q, target, jnp.zeros(2, bool))
    close(nothing[0], 0.0)
    close(nothing[1], np.zeros((2, 2)))


# --- advantages: A_t = δ_t + γ λ A_{t+1}

REWARD, VALUE = [1.0, 0.0, 2.0], [0.5, 1.0, -1.0, 3.0]
# γ = 0.9: δ = 1 + 0.9 - 0.5, -0.9 - 1, 2 + 2.7 + 1
DELTAS = [1.4, -1.9, 5.7]


def gae(lam, reward=REWARD, discount=(0.9, 0.9, 0.9), value=VALUE, done=(0, 0, 0), valid=(1, 1, 1)):
    def column(x, dtype=jnp.float32):
        return jnp.asarray(x, dtype)[:, None]

    args = column(reward), column(discount), column(value), column(done, bool), column(valid, bool)
    return generalized_advantage(*args, lam)[:, 0]


def test_gae_three_steps():
    # λ = 0.8, γλ = 0.72: A_2 = 5.7; A_1 = -1.9 + 0.72 · 5.7; A_0 = 1.4 + 0.72 · 2.204
    close(gae(0.8), [2.98688, 2.204, 5.7])


def test_gae_lambda_zero_is_the_td_residual():
    close(gae(0.0), DELTAS)


def test_gae_lambda_one_is_the_return_minus_the_value():
    # 1 + 0 + 0.81 · 2 + 0.729 · 3 - 0.5;  0 + 0.9 · 2 + 0.81 · 3 - 1;  2 + 0.9 · 3 + 1
    close(gae(1.0), [4.307, 3.23, 5.7])


@pytest.mark.parametrize("discount, before", [(0.0, -1.0), (0.9, -1.9)])  # terminal: 0 - V_1; time limit: + 0.9 V_2
def test_gae_does_not_leak_across_the_end_of_an_episode(discount, before):
    cut = partial(gae, 0.8, discount=(0.9, discount, 0.9), done=(0, 1, 0))
    close(cut(), [1.4 + 0.72 * before, before, 5.7])
    close(cut(reward=[1.0, 0.0, 99.0])[:2], cut()[:2])


def test_gae_does_not_leak_across_invalid_slots():
    """A broken slot in the middle of an episode, without `done`: the slot before keeps its own residual only."""
    cut = partial(gae, 0.8, valid=(1, 0, 1))
    close(cut(), [1.4, 0, 5.7])
    close(cut(reward=[1.0, 99.0, 99.0])[:2], [1.4, 0])


# --- Eq. (7): x ← x + η v(x, τ | s)


def linear(params, x, u, state):
    """v = a x + u + s."""
    return params * x + u[:, None] + state


def test_eq7_reading_b_steps_after_sampling():
    explore = partial(flow.explore, linear, jnp.array(2.0), jnp.ones((1, 1)), jnp.ones((1, 1)))  # a = 2, s = x = 1
    # η = 0.1, K = 2: 1 + 0.1 (2 · 1 + 0 + 1) = 1.3; 1.3 + 0.1 (2 · 1.3 + 0.5 + 1) = 1.71
    close(explore(0.1, 2), [[1.71]])
    close(explore(0.1, 1), [[1.3]])
    close(explore(0.1, 0), [[1.0]])


def sample(velocity, params, noise, steps, integrator, preserve_prior):
    return flow.integrate(velocity, params, jnp.zeros((len(noise), 1)), noise, steps, integrator, preserve_prior)


def test_eq7_reading_a_steps_of_the_sampler():
    one = jnp.ones((1, 1))
    # Euler, K = 2, v = x + u: 1 + 0.5 · 1 = 1.5; 1.5 + 0.5 (1.5 + 0.5) = 2.5
    close(sample(linear, jnp.array(1.0), one, 2, "euler", False), [[2.5]])
    # midpoint, K = 1: halfway 1 + 0.5 · 1 = 1.5, whose slope is 1.5 + 0.5: 1 + 2
    close(sample(linear, jnp.array(1.0), one, 1, "midpoint", False), [[3.0]])
    # dx/du = x + u from 1: 2e - 2
    close(sample(linear, jnp.array(1.0), one, 100, "midpoint", False), [[3.436564]], rtol=1e-4)


def fitted(params, x, u, state):
    """The field that flow matching finds for latents N(0, I)."""
    return flow.prior_velocity(x, u)


def test_eq7_one_plain_euler_step_collapses_to_the_mean():
    noise = jax.random.normal(jax.random.key(0), (5, 3))
    close(sample(fitted, None, noise, 1, "euler", False), np.zeros((5, 3)))  # x + (E[x] - x)
    # Π_i [1 + 0.1 (2u-1)/(u²+(1-u)²)], u = i/10: ten steps still shrink the spread to 0.879
    close(sample(fitted, None, noise, 10, "euler", False), 0.8789846 * noise)


@pytest.mark.parametrize("integrator", ["euler", "midpoint"])
def test_eq7_preserve_prior_keeps_the_noise_exactly(integrator):
    """For a network that is zero, bit by bit and whatever K; also with the compiler's optimisations."""
    noise = jax.random.normal(jax.random.key(0), (64, 3))
    for steps in (1, 3, 10):
        run = partial(sample, fitted, None, steps=steps, integrator=integrator, preserve_prior=True)
        np.testing.assert_array_equal(run(noise), noise)
        np.testing.assert_array_equal(jax.jit(run)(noise), noise)


def test_eq7_preserve_prior_one_step_adds_one_shift():
    def shifted(c, x, u, state):
        return flow.prior_velocity(x, u) + c

    noise = jnp.array([[0.7]])
    close(sample(shifted, jnp.array(0.5), noise, 1, "euler", True), [[1.2]])  # dy/du = c / σ(u), σ(0) = 1
    close(sample(shifted, jnp.array(0.5), noise, 1, "midpoint", True), [[1.4071068]])  # σ(½) = √½: 0.7 + 0.5 √2
