import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.envs.point_mass import PointMass
from fpo_jax.policies import load_base
from fpo_jax.policies.point_mass import HEADINGS
from fpo_jax.policies.small import SmallPolicy, check_action_space, load_policy, save_policy
from fpo_jax.types import EnvSpec, FpoError, Observation

POLICY = SmallPolicy(horizon=5, action_dim=2, proprio_dim=3, width=16, depth=1, condition_width=8)


def make_params(policy: SmallPolicy = POLICY) -> dict:
    params = policy.init(jax.random.key(0))
    params["stats"]["action_mean"] = jnp.array([1.0, -2.0])
    params["stats"]["action_std"] = jnp.array([0.5, 3.0])
    params["stats"]["object_mean"] = jnp.array([0.1, 0.5, 0.0])
    params["stats"]["object_std"] = jnp.array([0.1, 0.1, 2.0])
    return params


def test_default_size():
    shapes = jax.eval_shape(SmallPolicy().init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) * 4 < 8e6
    assert SmallPolicy().feature_dim == 17


def test_encode_normalises():
    observation = Observation(proprio=jnp.ones((1, 3)), object_pose=jnp.array([[0.2, 0.4, 1.0, 1.0, 0.0, 0.0, 0.0]]))
    features, context = POLICY.encode(make_params(), observation)
    chex.assert_trees_all_close(features, jnp.array([[1.0, 1.0, 1.0, 1.0, -1.0, 0.5]]), atol=1e-6)
    chex.assert_trees_all_equal(features, context)


def test_encode_sees_the_object_that_it_is_told_to():
    policy = dataclasses.replace(POLICY, object_start=7)
    poses = jnp.array([[9.0] * 7 + [0.2, 0.4, 1.0, 1.0, 0.0, 0.0, 0.0]])
    features, _ = policy.encode(make_params(), Observation(proprio=jnp.ones((1, 3)), object_pose=poses))
    chex.assert_trees_all_close(features, jnp.array([[1.0, 1.0, 1.0, 1.0, -1.0, 0.5]]), atol=1e-6)


def test_encode_needs_the_object():
    with pytest.raises(FpoError, match="needs the object's position"):
        POLICY.encode(make_params(), Observation(proprio=jnp.ones((1, 3))))


def test_decode_lands_on_a_constant_prediction(monkeypatch):
    """Where the network always answers â, every noise ends on â, in the environment's units."""
    target = jnp.array([[[0.2, -0.4]]]) * jnp.arange(1.0, 6.0)[None, :, None]
    monkeypatch.setattr(SmallPolicy, "predict", lambda self, params, x, u, s: jnp.broadcast_to(target, x.shape))
    noise = jax.random.normal(jax.random.key(1), (4, 5, 2))
    chunk = POLICY.decode(make_params(), jnp.zeros((4, 6)), noise)
    expected = target * jnp.array([[[0.5, 3.0]]]) + jnp.array([[[1.0, -2.0]]])
    chex.assert_trees_all_close(chunk, jnp.broadcast_to(expected, chunk.shape), atol=1e-6)


def test_decode_integrates_euler_by_hand(monkeypatch):
    """â = 2x, two steps: x_0 = 1, x_.5 = 1 + .5 (2 - 1)/1 = 1.5, x_1 = â(1.5) = 3."""
    monkeypatch.setattr(SmallPolicy, "predict", lambda self, params, x, u, s: 2.0 * x)
    policy = dataclasses.replace(POLICY, euler_steps=2)
    chunk = policy.decode(policy.init(jax.random.key(0)), jnp.zeros((1, 6)), jnp.ones((1, 5, 2)))
    chex.assert_trees_all_close(chunk, jnp.full((1, 5, 2), 3.0), atol=1e-6)


def test_decode_is_deterministic_and_depends_on_noise_and_state():
    # A fresh network's deviation from the mean is zero, so that it ignores the noise; these weights are all random.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), make_params())
    key_a, key_b = jax.random.split(jax.random.key(2))
    noise, context = jax.random.normal(key_a, (3, 5, 2)), jax.random.normal(key_b, (3, 6))
    decode = jax.jit(POLICY.decode)
    chunk = decode(params, context, noise)
    chex.assert_trees_all_equal(chunk, decode(params, context, noise))
    assert not np.allclose(chunk, decode(params, context, noise + 1.0))
    assert not np.allclose(chunk, decode(params, context + 1.0, noise))


def test_round_trip(tmp_path):
    params = make_params()
    save_policy(tmp_path / "base", POLICY, params, "# A card")
    policy, restored = load_policy(tmp_path / "base")
    assert policy == POLICY
    chex.assert_trees_all_equal(params, restored)
    assert (tmp_path / "base" / "README.md").read_text() == "# A card\n"
    by_name, _ = load_base("base", tmp_path)
    by_folder, _ = load_base(tmp_path / "base")
    assert by_name == by_folder == POLICY


def test_missing_and_damaged_checkpoints(tmp_path):
    with pytest.raises(FpoError, match="There is no base policy in"):
        load_policy(tmp_path / "nothing")
    save_policy(tmp_path / "base", POLICY, make_params(), "")
    weights = tmp_path / "base" / "params.msgpack"
    intact = weights.read_bytes()
    for broken in (intact[: len(intact) // 2], b"", b"\x00" * 64):
        weights.write_bytes(broken)
        with pytest.raises(FpoError, match="is damaged: restore it"):
            load_policy(tmp_path / "base")
    weights.write_bytes(intact)
    config = tmp_path / "base" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"width": 17}))  # the weights no longer fit
    with pytest.raises(FpoError, match="is damaged"):
        load_policy(tmp_path / "base")
    config.write_text(json.dumps(fields | {"format": 99}))
    with pytest.raises(FpoError, match="has format 99"):
        load_policy(tmp_path / "base")


def test_unknown_name_gets_a_suggestion(tmp_path):
    save_policy(tmp_path / "aloha_transfer_cube", POLICY, make_params(), "")
    with pytest.raises(FpoError, match="did you mean 'aloha_transfer_cube'"):
        load_base("aloha_transfer_cub", tmp_path)
    with pytest.raises(FpoError, match="choose one of aloha_transfer_cube, point_mass"):
        load_base("zzz", tmp_path)


def test_shipped_base_loads():
    policy, params = load_base("aloha_transfer_cube")
    assert policy == SmallPolicy()
    assert params["stats"]["action_std"].shape == (14,)


def test_wrong_action_space():
    spec = EnvSpec(
        "Reach", action_dim=7, proprio_dim=3, object_pose_dim=0, episode_length=50, execute_steps=5, control_hz=50
    )
    with pytest.raises(FpoError, match="has 2 action dimensions, but Reach takes 7"):
        check_action_space(POLICY, spec)
    check_action_space(POLICY, spec._replace(action_dim=2))
    with pytest.raises(FpoError, match="set execute_steps to 5 or less"):
        check_action_space(POLICY, spec._replace(action_dim=2, execute_steps=9))


def test_point_mass_base_follows_the_noise():
    """Noise that leans towards one heading makes the base take it, at full speed."""
    policy, params = load_base("point_mass")
    headings = jnp.asarray(HEADINGS)
    noise = jnp.repeat(headings[:, None], policy.horizon, axis=1)
    chunk = policy.decode(params, jnp.zeros((4, 2)), noise)
    chex.assert_trees_all_close(chunk, noise, atol=0.02)


def test_point_mass_base_needs_steering_by_the_state():
    """Success: about a quarter alone and with any constant lean, nearly always when the noise leans to the goal."""
    policy, params = load_base("point_mass")
    env, num_envs = PointMass(), 1024

    def success(lean: float, constant: bool) -> float:
        state, won = env.reset(jax.random.split(jax.random.key(0), num_envs)), jnp.zeros(num_envs, bool)
        for key in jax.random.split(jax.random.key(1), env.spec.decisions):
            _, context = policy.encode(params, state.observation)
            way = jnp.asarray([[1.0, 0.0]]) if constant else state.observation.object_pose
            noise = jax.random.normal(key, (num_envs, policy.horizon, 2)) + lean * way[:, None]
            state = env.step(state, policy.decode(params, context, noise))
            won |= state.success  # episodes of one length: none starts again within these decisions but after a win
        return float(won.mean())

    assert 0.17 < success(0.0, constant=True) < 0.32
    assert success(1.5, constant=True) < 0.32
    assert success(1.5, constant=False) > 0.9
