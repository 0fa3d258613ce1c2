from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import rollout as rollout_module
from fpo_jax.algorithms import fixed
from fpo_jax.config import RolloutConfig, TrainConfig
from fpo_jax.flow import split_keys
from fpo_jax.rollout import (
    Episodes,
    FeatureStats,
    FrozenBase,
    feature_stats,
    observe,
    python_rollout,
    select_action,
    standardize,
)
from fpo_jax.types import Transition
from tiny import TINY, begin, init_fpo, jit, keys, make_system, perturbed, run_rollout, scripted_system

close = np.testing.assert_allclose


def plain(tree):
    """NumPy arrays, random keys as their bits: for comparisons."""

    def one(leaf):
        return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    return jax.tree.map(one, tree)


# --- bookkeeping, on an environment that follows a script
# environment 0 succeeds at its third decision, 1 runs into the time limit after four, 2 breaks at its third


def scripted(time_limit="terminal", reward="sparse") -> tuple[Transition, Episodes]:
    config = TrainConfig(rollout=RolloutConfig(gamma=0.9, reward=reward, time_limit=time_limit))
    system = scripted_system(config, success_at=(3, 0, 0), fault_at=(0, 0, 3))
    _, transition, episodes = run_rollout(system, FrozenBase({}), None, begin(system, keys(3)), jax.random.key(1), 6)
    return jax.tree.map(lambda leaf: leaf.T if leaf.ndim == 2 else leaf, (transition, episodes))  # [N T]


def test_slots_of_a_rollout():
    transition, episodes = scripted()
    # The slot after the end of an episode resets: no valid transition.
    close(transition.valid, [[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1]])
    close(transition.done, [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]])
    close(transition.reward, [[0, 0, 1, 0, 0, 0], [0] * 6, [0] * 6])
    g = 0.9
    close(transition.discount, [[g, g, 0, 0, g, g], [g, g, g, 0, 0, g], [g, g, 0, 0, g, g]])
    close(episodes.ended, [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0] * 6])
    close(episodes.success, [[0, 0, 1, 0, 0, 0], [0] * 6, [0] * 6])
    close(episodes.fault, [[0] * 6, [0] * 6, [0, 0, 1, 0, 0, 0]])
    close(episodes.control_steps, [[2, 4, 6, 0, 2, 4], [2, 4, 6, 8, 0, 2], [2, 4, 6, 0, 2, 4]])
    close(episodes.executed, [[2, 2, 2, 0, 2, 2], [2, 2, 2, 2, 0, 2], [2, 2, 2, 0, 2, 2]])


def test_next_state_is_the_state_of_the_slot_after():
    transition, _ = scripted()
    # features (decisions so far, i), then the share of the episode that is left
    close(transition.state[..., 0].T, [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 0, 1]])
    # the final observation too (3 and 4), and one more encoding at the end of the rollout
    close(transition.next_state[..., 0].T, [[1, 2, 3, 0, 1, 2], [1, 2, 3, 4, 0, 1], [1, 2, 3, 0, 1, 2]])
    close(transition.state[:, 1, 2], [1, 0.75, 0.5, 0.25, 0, 1])
    close(transition.next_state[:, 1, 2], [0.75, 0.5, 0.25, 0, 1, 0.75])


def test_truncate_bootstraps_at_the_time_limit_and_has_no_clock():
    transition, _ = scripted("truncate")
    g = 0.9
    close(transition.discount, [[g, g, 0, 0, g, g], [g, g, g, g, 0, g], [g, g, 0, 0, g, g]])
    close(transition.done[1], [0, 0, 0, 1, 1, 0])
    assert transition.state.shape[-1] == 2


def test_step_cost():
    transition, _ = scripted(reward="step_cost")
    close(transition.reward, [[-1, -1, 0, 0, -1, -1], [-1, -1, -1, -1, 0, -1], [-1, -1, 0, 0, -1, -1]])


# --- point mass


@pytest.fixture(scope="module")
def trained():
    """(system, agent with an actor that is no longer the prior, rollout state)."""
    system = make_system()
    agent = init_fpo(TINY, system.dims, jax.random.key(0))
    return system, agent._replace(actor=perturbed(agent.actor)), begin(system, keys(4))


def test_the_scan_equals_the_python_loop(trained, monkeypatch):
    system, agent, carry = trained
    scanned = run_rollout(system, FrozenBase({}), agent, carry, jax.random.key(1), 5)
    monkeypatch.setattr(rollout_module, "decision_step", jit(rollout_module.decision_step, static_argnums=0))
    looped = python_rollout(system, FrozenBase({}), agent, carry, jax.random.key(1), 5)
    chex.assert_trees_all_close(plain(scanned), plain(looped), rtol=1e-5, atol=1e-5)
    _, transition, episodes = scanned
    assert episodes.ended.any() and not transition.valid.all()  # it went through a reset
    close(transition.next_state[:-1], transition.state[1:])


def test_two_rollouts_are_one_long_one_to_the_environment(trained):
    system, agent, carry = trained
    first, _, _ = run_rollout(system, FrozenBase({}), agent, carry, jax.random.key(1), 5)
    second, transition, _ = run_rollout(system, FrozenBase({}), agent, first, jax.random.key(2), 5)
    close(transition.state[0, :, :2], first.env.observation.proprio)
    close(second.env.control_steps <= 8, True)


def test_an_environment_does_not_depend_on_how_many_there_are(trained):
    """Not its initial state, not its noise, not its latents: only rounding may differ with the batch size."""
    system, agent, carry = trained
    np.testing.assert_array_equal(*(jax.random.key_data(x) for x in (keys(2), keys(4)[:2])))  # as `train.init` splits
    together = run_rollout(system, FrozenBase({}), agent, carry, jax.random.key(1), 5)[1:]
    alone = run_rollout(system, FrozenBase({}), agent, begin(system, keys(2)), jax.random.key(1), 5)[1:]
    first_two = jax.tree.map(lambda leaf: leaf[:, :2], together)
    chex.assert_trees_all_close(plain(first_two), plain(alone), rtol=1e-4, atol=1e-4)
    latent = together[0].latent
    assert np.abs(latent[:, 0] - latent[:, 1]).min() > 1e-4  # each has noise of its own


# --- step 0 is the base


def base_chunk(system, env_state, step_keys):
    """What the frozen base does from the same keys, were there no actor: the latent's noise is N(0, I)."""
    act_keys, residual_keys = split_keys(step_keys)
    noise_keys, _ = split_keys(act_keys)
    latent = jax.vmap(lambda key: jax.random.normal(key, (4,)))(noise_keys)
    residual = jax.vmap(lambda key: jax.random.normal(key, (4, 2)))(residual_keys)
    noise = system.latent_space.expand(latent, residual)
    return latent, noise, system.base.decode({}, env_state.observation.proprio, noise)


def optimised(function):
    """`jit` as users have it: the tests' own flags (conftest.py) leave the optimisations out."""
    options = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    return jax.jit(function, static_argnums=0, compiler_options=options)


def test_step_0_is_the_base():
    """The initial actor's latents are its noise, bit by bit, and the chunks those of the frozen base.

    Compiled as users compile it, with all optimisations; for the default sampler and for a single Euler step.
    """
    system, step_keys = make_system(), keys(64)
    agent, env_state = init_fpo(TINY, system.dims, jax.random.key(0)), begin(system, keys(64, seed=1)).env
    latent, noise, expected = optimised(base_chunk)(system, env_state, step_keys)
    for options in ({}, {"integrator": "euler", "sampler_steps": 1}):
        variant = replace(system, config=replace(TINY, actor=replace(TINY.actor, **options)))
        chunk, sample, _ = optimised(select_action)(variant, FrozenBase({}), agent, env_state, step_keys)
        np.testing.assert_array_equal(sample.latent, latent)
        np.testing.assert_array_equal(chunk, expected)
    # the noise that the base sees is N(0, I): 64 · 8 numbers
    close((noise.mean(), noise.std()), (0, 1), atol=0.15)
    assert len(np.unique(np.round(np.asarray(expected[:, 0])), axis=0)) == 4  # and it goes all four ways


def test_the_first_rollout_is_the_one_of_the_untouched_base():
    """`algorithms.fixed` is the base in evaluation: paired with FPO's initial actor, every episode is the same."""
    system = make_system()
    agent, carry = init_fpo(TINY, system.dims, jax.random.key(0)), begin(system, keys(4))
    _, ours, _ = run_rollout(system, FrozenBase({}), agent, carry, jax.random.key(1), 5)
    untouched = replace(system, algorithm=fixed)
    _, base, _ = run_rollout(untouched, FrozenBase({}), fixed.base(4), carry, jax.random.key(1), 5)
    for name in ("state", "latent", "reward", "next_state", "done", "valid"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(base, name), err_msg=name)


# --- features of a base that asks for statistics


def test_feature_statistics_are_over_valid_decisions_with_a_floor():
    features = jnp.array([[1.0, 10.0], [3.0, 10.0], [100.0, 0.0]])
    stats = feature_stats(features, jnp.array([True, True, False]))
    close(stats.mean, [2.0, 10.0])
    close(stats.std, [1.0, 1e-3 * 10 + 1e-6], rtol=1e-6)  # the second dimension never moved
    close(standardize(stats, features[:2]), [[-1.0, 0.0], [1.0, 0.0]])
    assert standardize(stats, features[2:])[0].tolist() == [10.0, -10.0]  # cut off
    broken = jnp.array([[1.0, 10.0], [3.0, 10.0], [jnp.nan, jnp.inf]])
    close(feature_stats(broken, jnp.array([True, True, False])).mean, [2.0, 10.0])
    assert np.isnan(feature_stats(features, jnp.zeros(3, bool)).mean).all()  # nothing to go by


def test_a_base_without_statistics_shows_its_features_as_they_are():
    system = make_system()
    carry = begin(system, keys(4))
    plain_state, _ = observe(system, FrozenBase({}), carry.env)
    stats = FeatureStats(jnp.full(4, 0.5), jnp.full(4, 2.0))
    standardised, _ = observe(system, FrozenBase({}, stats), carry.env)
    close(standardised[:, :4], (plain_state[:, :4] - 0.5) / 2.0, rtol=1e-6)
    close(standardised[:, 4], plain_state[:, 4])  # the clock stays
