"""openpi's robot conventions, against numbers that openpi's own code computed (tests/golden/openpi)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.policies import transforms
from fpo_jax.policies.transforms import NormStats, RobotTransform
from fpo_jax.types import FpoError

GOLDEN = np.load(Path(__file__).parent / "golden" / "openpi" / "transforms.npz")
ALOHA, LIBERO = transforms.DELTA_MASK["aloha"], transforms.DELTA_MASK["libero"]


def golden(key):
    return jnp.asarray(GOLDEN[key], jnp.float32)


def close(actual, expected, rtol=2e-6, atol=2e-6):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def golden_stats(name, size=None):
    return NormStats(*(golden(f"norm/{name}/{field}")[:size] for field in NormStats._fields))


def method_of(quantile):
    return "quantile" if quantile else "z-score"


def random_stats(rng, size):
    q01 = rng.uniform(-2.0, -1.0, size)
    fields = rng.normal(size=size), rng.uniform(0.5, 2.0, size), q01, q01 + rng.uniform(1.0, 3.0, size)
    return NormStats(*(jnp.asarray(values, jnp.float32) for values in fields))


# Normalisation


@pytest.mark.parametrize("quantile", [False, True])
@pytest.mark.parametrize("name", ["state", "actions"])
def test_normalisation_both_ways(quantile, name):
    stats, method, key = golden_stats(name), method_of(quantile), f"quantile_{quantile}/{name}"
    close(transforms.normalize(golden(f"norm/in_{name}"), stats, method), GOLDEN[f"norm/{key}"])
    close(transforms.unnormalize(golden(f"unnorm/{key}_in"), stats, method), GOLDEN[f"unnorm/{key}"])


@pytest.mark.parametrize("method", ["z-score", "quantile"])
def test_longer_statistics_are_cut(method):
    x = golden("norm/in_actions")[:, :7]
    for function in (transforms.normalize, transforms.unnormalize):
        close(
            function(x, golden_stats("actions"), method),
            function(x, golden_stats("actions", 7), method),
            rtol=0,
            atol=0,
        )


def test_the_formulas_at_simple_numbers():
    stats = NormStats(*(jnp.asarray([v]) for v in (1.0, 2.0, -1.0, 3.0)))
    x = jnp.asarray([5.0])
    close(transforms.normalize(x, stats, "z-score"), [2.0])  # (5 - 1) / 2
    close(transforms.normalize(x, stats, "quantile"), [2.0])  # 2 (5 + 1) / 4 - 1
    constant = NormStats(*(jnp.asarray([v]) for v in (5.0, 0.0, 5.0, 5.0)))
    for method in ("z-score", "quantile"):  # a dimension that never moved
        close(transforms.unnormalize(transforms.normalize(x, constant, method), constant, method), x)


def test_beyond_the_statistics():
    stats = golden_stats("state", 2)
    x = jnp.full((3, 5), 0.25)
    close(transforms.unnormalize(x, stats, "quantile")[:, 2:], x[:, 2:], rtol=0, atol=0)
    close(transforms.unnormalize(x, stats, "z-score")[:, 2:], 0.25 * (1 + 1e-6) * np.ones((3, 3)), rtol=0, atol=3e-8)


def test_statistics_that_do_not_fit():
    with pytest.raises(FpoError, match="cover 2 dimensions, but the data have 14"):
        transforms.normalize(golden("norm/in_state"), golden_stats("state", 2), "z-score")
    without = golden_stats("state")._replace(q01=None, q99=None)
    for function in (transforms.normalize, transforms.unnormalize):
        with pytest.raises(FpoError, match="needs q01 and q99"):
            function(golden("norm/in_state"), without, "quantile")


def test_norm_stats_json_round_trip():
    stats = {"state": golden_stats("state"), "actions": golden_stats("actions")._replace(q01=None, q99=None)}
    again = transforms.parse_norm_stats(transforms.dump_norm_stats(stats), "norm_stats.json")
    assert again["actions"].q01 is None
    jax.tree.map(np.testing.assert_array_equal, stats, again)
    assert json.loads(transforms.dump_norm_stats(stats))["norm_stats"]["state"]["mean"][0] == stats["state"].mean[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"norm_stats": {"state": {}}}',
        '{"norm_stats": {"state": {"mean": [1], "std": [1, 2]}, "actions": {"mean": [1], "std": [1]}}}',
        '{"norm_stats": {"state": {"mean": [1]}, "actions": {"mean": [1], "std": [1]}}}',
        '{"norm_stats": {"state": {"mean": 1, "std": 1}, "actions": {"mean": [1], "std": [1]}}}',
        '{"norm_stats": {"state": {"mean": [NaN], "std": [1]}, "actions": {"mean": [1], "std": [1]}}}',
    ],
)
def test_damaged_norm_stats(text):
    with pytest.raises(FpoError, match=r"somewhere\.json holds no normalisation statistics"):
        transforms.parse_norm_stats(text, "somewhere.json")


# ALOHA


def test_gripper_maps():
    x = golden("gripper/in")
    close(transforms.gripper_state_to_model(x), GOLDEN["gripper/to_angular"])
    close(transforms.gripper_action_from_model(x), GOLDEN["gripper/from_angular"])
    close(transforms.gripper_action_to_model(x), GOLDEN["gripper/from_angular_inv"])
    close(transforms.gripper_action_from_model(transforms.gripper_action_to_model(x)), x)


def test_grippers_outside_their_range_stay_finite():
    x = jnp.asarray([-10.0, -0.46613, -0.1, 1.1, 10.0])  # -0.46613: the fingers would be at 0 m
    assert np.isfinite(transforms.gripper_state_to_model(x)).all()


@pytest.mark.parametrize("adapt", [True, False])
def test_aloha(adapt):
    key = f"aloha/adapt_{adapt}"
    state = transforms.aloha_state(golden("aloha/raw_state"), adapt)
    close(state, GOLDEN[f"{key}/in_state"])
    actions = transforms.aloha_actions_in(golden("aloha/raw_actions"), adapt)
    close(actions, GOLDEN[f"{key}/in_actions"])
    delta = transforms.delta_actions(actions, state, ALOHA)
    close(delta, GOLDEN[f"{key}/delta_actions"])
    absolute = transforms.absolute_actions(transforms.pad_last(delta, 32), transforms.pad_last(state, 32), ALOHA)
    close(absolute, GOLDEN[f"{key}/absolute_actions"])
    out = transforms.aloha_actions_out(absolute, adapt)
    close(out, GOLDEN[f"{key}/out_actions"])
    close(out, GOLDEN["aloha/raw_actions"])


def test_libero_extra_delta():
    state, actions = golden("libero/state"), golden("libero/actions")
    delta = transforms.delta_actions(actions, state, LIBERO)
    close(delta, GOLDEN["libero/delta_actions_6_-1"])
    close(transforms.absolute_actions(delta, state, LIBERO), actions)


def test_each_chunk_has_its_own_state():
    rng = np.random.default_rng(0)
    states, chunks = jnp.asarray(rng.normal(size=(3, 14))), jnp.asarray(rng.normal(size=(3, 5, 20)))
    together = transforms.delta_actions(chunks, states, ALOHA)
    close(together, jnp.stack([transforms.delta_actions(c, s, ALOHA) for c, s in zip(chunks, states, strict=True)]))
    close(together[..., 14:], chunks[..., 14:], rtol=0, atol=0)
    close(together[..., jnp.asarray([6, 13])], chunks[..., jnp.asarray([6, 13])], rtol=0, atol=0)


def test_cameras():
    assert transforms.CAMERAS["aloha"]["top"] == transforms.CAMERAS["aloha"]["cam_high"] == "base_0_rgb"
    assert transforms.CAMERAS["libero"] == {"image": "base_0_rgb", "wrist_image": "left_wrist_0_rgb"}


# The whole way


def test_aloha_inputs_by_hand():
    """openpi's order: robot convention, then normalise, then pad."""
    transform = RobotTransform(robot="aloha", normalisation="z-score")
    stats = {"state": golden_stats("state"), "actions": golden_stats("actions")}
    state = transform.inputs(stats, golden("aloha/raw_state")[None])
    expected = (GOLDEN["aloha/adapt_True/in_state"] - GOLDEN["norm/state/mean"]) / (GOLDEN["norm/state/std"] + 1e-6)
    assert state.shape == (1, 32)
    close(state[0, :14], expected)
    close(state[0, 14:], np.zeros(18), rtol=0, atol=0)


@pytest.mark.parametrize("normalisation", ["z-score", "quantile"])
@pytest.mark.parametrize("adapt", [True, False])
def test_aloha_outputs_by_hand(normalisation, adapt):
    """openpi's order: unnormalise, then absolute, then robot convention."""
    stats = {"state": golden_stats("state"), "actions": golden_stats("actions")}
    transform = RobotTransform(
        robot="aloha", normalisation=normalisation, adapt_to_pi=adapt, delta_actions=True, action_dim=16
    )
    delta, q = GOLDEN[f"aloha/adapt_{adapt}/delta_actions"], {k: GOLDEN[f"norm/actions/{k}"] for k in NormStats._fields}
    if normalisation == "z-score":
        normalised = (delta - q["mean"]) / (q["std"] + 1e-6)
    else:
        normalised = (delta - q["q01"]) / (q["q99"] - q["q01"] + 1e-6) * 2 - 1
    chunk = jnp.asarray(np.pad(normalised, ((0, 0), (0, 2)), constant_values=7.0), jnp.float32)[None]
    out = transform.outputs(stats, golden("aloha/raw_state")[None], chunk)
    close(out[0], GOLDEN["aloha/raw_actions"], atol=5e-6)
    training = transform.training_actions(stats, golden("aloha/raw_state")[None], golden("aloha/raw_actions")[None])
    close(training[0, :, :14], normalised, atol=1e-5)
    close(training[0, :, 14:], np.zeros((5, 2)), rtol=0, atol=0)


@pytest.mark.parametrize("robot", ["aloha", "libero"])
@pytest.mark.parametrize("normalisation", ["z-score", "quantile"])
@pytest.mark.parametrize("delta", [False, True])
def test_outputs_invert_training_actions(robot, normalisation, delta):
    rng = np.random.default_rng(1)
    transform = RobotTransform(robot=robot, normalisation=normalisation, delta_actions=delta)
    stats = {"state": random_stats(rng, transform.state_dim), "actions": random_stats(rng, transform.output_dim)}
    proprio = jnp.asarray(rng.uniform(0.0, 1.0, (4, transform.state_dim)), jnp.float32)
    actions = jnp.asarray(rng.uniform(-1.0, 1.0, (4, 6, transform.output_dim)), jnp.float32)
    targets = jax.jit(transform.training_actions)(stats, proprio, actions)
    assert targets.shape == (4, 6, 32)
    close(jax.jit(transform.outputs)(stats, proprio, targets), actions, atol=1e-5)
    assert jax.jit(transform.inputs)(stats, proprio).shape == (4, 32)


def test_libero_state_is_taken_as_it_is():
    rng = np.random.default_rng(2)
    transform = RobotTransform(robot="libero", normalisation="quantile")
    stats = {"state": random_stats(rng, 8), "actions": random_stats(rng, 7)}
    expected = transforms.normalize(golden("libero/state"), stats["state"], "quantile")
    close(transform.inputs(stats, golden("libero/state")[None])[0, :8], expected, rtol=0, atol=0)


def test_a_robot_that_does_not_fit():
    with pytest.raises(FpoError, match="7 action dimensions can't hold the 8 state dimensions of libero"):
        RobotTransform(robot="libero", normalisation="quantile", action_dim=7)
    transform = RobotTransform(robot="aloha", normalisation="z-score")
    stats = {"state": golden_stats("state"), "actions": golden_stats("actions")}
    with pytest.raises(FpoError, match="8 numbers, but the base policy was trained on the 14 of aloha"):
        transform.inputs(stats, jnp.zeros((2, 8)))


# Images


def test_images_to_float():
    pixels = jnp.asarray([0, 51, 255], jnp.uint8)[None, None, None]
    close(transforms.images_to_float(pixels)[0, 0, 0], [-1.0, -0.6, 1.0])


def test_resizing_on_the_device():
    image = jnp.asarray(GOLDEN["resize/in_48x64"])
    resize = jax.jit(transforms.resize_with_pad, static_argnums=(1, 2))
    smaller = np.asarray(resize(image, 32, 32))
    assert smaller.dtype == np.uint8
    assert np.abs(smaller.astype(int) - GOLDEN["resize/jax_uint8_32x32"]).max() <= 1  # differs between JAX versions
    as_floats = transforms.images_to_float(image)
    # 2e-7 in a normal process; these tests switch XLA's optimisations off.
    close(resize(as_floats[None], 32, 32)[0], GOLDEN["resize/jax_float_32x32"], atol=1e-5)
    close(resize(as_floats, 80, 72), GOLDEN["resize/jax_float_80x72_up"], atol=1e-5)
    assert transforms.resize_with_pad(image, 48, 64) is image
