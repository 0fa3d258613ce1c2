from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.clone import CloneConfig, CloneData, clone, flow_loss, flow_weight, sample_chunks, statistics
from fpo_jax.demos import Demonstrations
from fpo_jax.policies.small import SmallPolicy
from fpo_jax.types import FpoError

POLICY = SmallPolicy(horizon=4, action_dim=1, proprio_dim=1, width=64, depth=1, condition_width=16)


def bimodal(episodes: int = 64, length: int = 8) -> Demonstrations:
    """Half of the episodes always act +1, the other half -1; the observations don't tell which."""
    sign = np.where(np.arange(episodes) % 2, 1.0, -1.0)
    return Demonstrations(
        proprio=np.zeros((episodes, length, 1), np.float32),
        object_pose=np.zeros((episodes, length, 7), np.float32),
        actions=np.broadcast_to(sign[:, None, None], (episodes, length, 1)).astype(np.float32),
        success=np.ones(episodes, bool),
    )


def test_flow_loss_by_hand():
    """Errors (1, 2) and (0, 4): means 2.5 and 8; weighted by 1 and .5: (2.5 + 4) / 2."""
    target = jnp.zeros((2, 2, 1))
    predicted = jnp.array([[[1.0], [2.0]], [[0.0], [4.0]]])
    assert flow_loss(target, predicted, jnp.ones(2)) == pytest.approx(5.25)
    assert flow_loss(target, predicted, jnp.array([1.0, 0.5])) == pytest.approx(3.25)


def test_weight_makes_it_the_velocity_loss():
    """With w = 1/(1-u)² it is ‖v - (a - ε)‖²: u = .5, ε = 1, a = 3, x_u = 2, â = 2.5, v = 1, error (1 - 2)² = 1."""
    noise, target, predicted, u = 1.0, 3.0, 2.5, 0.5
    velocity = (predicted - ((1 - u) * noise + u * target)) / (1 - u)
    assert velocity == 1.0
    value = flow_loss(jnp.full((1, 1, 1), target), jnp.full((1, 1, 1), predicted), jnp.array([1 / (1 - u) ** 2]))
    assert value == pytest.approx((velocity - (target - noise)) ** 2)


def test_weight_is_capped_at_the_last_step():
    """5 steps: 1/(1-u)² is 1, 4, 25 at u = 0, .5, .8 and stays 25 beyond."""
    weight = flow_weight(CloneConfig(POLICY), jnp.array([0.0, 0.5, 0.8, 0.99]))
    chex.assert_trees_all_close(weight, jnp.array([1.0, 4.0, 25.0, 25.0]), rtol=1e-5)


def test_chunks_start_at_their_observation_and_repeat_the_last_action():
    steps = jnp.arange(6.0)[None, :, None]
    data = CloneData(features=jnp.tile(steps, (3, 1, 1)), actions=jnp.tile(10 * steps, (3, 1, 1)))
    config = CloneConfig(POLICY, state_noise=0.0, decision_steps=4, decision_fraction=0.0)
    features, chunk = sample_chunks(config, data, 64, jax.random.key(0))
    expected = 10 * jnp.minimum(features[:, :1] + jnp.arange(4.0)[None], 5.0)
    chex.assert_trees_all_close(chunk[..., 0], expected)
    assert len(set(features[:, 0].tolist())) == 6
    only_decisions = CloneConfig(POLICY, state_noise=0.0, decision_steps=4, decision_fraction=1.0)
    features, _ = sample_chunks(only_decisions, data, 64, jax.random.key(0))
    assert set(features[:, 0].tolist()) == {0.0, 4.0}


def test_statistics():
    demos = bimodal()
    stats = statistics(POLICY, demos)
    assert stats["action_mean"] == pytest.approx(0.0)
    assert stats["action_std"] == pytest.approx(1.0)
    assert stats["proprio_std"] == pytest.approx(0.01)  # the floor of a dimension that never moves
    assert stats["object_mean"].shape == (3,)


def test_statistics_are_those_of_what_the_policy_sees():
    poses = np.broadcast_to(np.arange(14.0, dtype=np.float32), (*bimodal().actions.shape[:2], 14))
    stats = statistics(replace(POLICY, object_start=7), bimodal()._replace(object_pose=poses))
    assert stats["object_mean"].tolist() == [7.0, 8.0, 9.0]


def test_cloning_recovers_both_modes():
    config = CloneConfig(POLICY, steps=300, batch_size=128, learning_rate=3e-3, ema_decay=0.98, steps_per_call=150)
    seen = []
    params = clone(config, bimodal(), jax.random.key(0), lambda step, metrics: seen.append((step, set(metrics))))
    assert seen == [(150, {"loss", "heldout_loss"}), (300, {"loss", "heldout_loss"})]
    noise = jax.random.normal(jax.random.key(1), (512, 4, 1))
    first = np.asarray(jax.jit(POLICY.decode)(params, jnp.zeros((512, 4)), noise)[:, 0, 0])
    assert np.mean(np.abs(np.abs(first) - 1.0) < 0.2) > 0.8  # nearly every chunk is one of the two
    assert 0.35 < np.mean(first > 0) < 0.65  # and the noise decides which
    assert np.mean((first > 0) == (np.asarray(noise.mean((1, 2))) > 0)) > 0.9


def test_wrong_widths_and_no_episodes():
    with pytest.raises(FpoError, match=r"widths \(1, 1\), the policy \(14, 14\)"):
        clone(CloneConfig(), bimodal(), jax.random.key(0))
    with pytest.raises(FpoError, match="no demonstrations left"):
        clone(CloneConfig(POLICY, heldout_fraction=1.0), bimodal(), jax.random.key(0))
