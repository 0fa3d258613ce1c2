"""Demonstration files: round trip, refusal of anything else, hand-computed statistics."""

import numpy as np
import pytest

from fpo_jax.demos import Demonstrations, load, normalisation, save
from fpo_jax.types import FpoError


@pytest.fixture
def demos() -> Demonstrations:
    rng = np.random.default_rng(0)
    shape = (3, 5)  # episodes, steps
    proprio, pose, actions = (rng.normal(size=(*shape, n)).astype(np.float32) for n in (14, 7, 14))
    return Demonstrations(proprio, pose, actions, np.array([True, False, True]))


def test_round_trip_is_exact(tmp_path, demos):
    save(tmp_path / "demos", demos)  # the name is kept as given
    for saved, loaded in zip(demos, load(tmp_path / "demos"), strict=True):
        np.testing.assert_array_equal(loaded, saved)
        assert loaded.dtype == saved.dtype


def test_load_never_unpickles(tmp_path, demos):
    evil = np.empty((3, 5, 14), object)
    save(tmp_path / "evil.npz", demos._replace(actions=evil))
    with pytest.raises(FpoError, match="not a demonstration file"):
        load(tmp_path / "evil.npz")


def test_load_refuses_missing_fields_and_other_formats(tmp_path, demos):
    np.savez(tmp_path / "partial.npz", actions=demos.actions)
    np.save(tmp_path / "array.npy", demos.actions)
    (tmp_path / "text.npz").write_text("hello")
    for name in ("partial.npz", "array.npy", "text.npz"):
        with pytest.raises(FpoError, match="not a demonstration file"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d._replace(actions=d.actions[:, :4]),
        lambda d: d._replace(success=d.success[:2]),
        lambda d: d._replace(proprio=d.proprio[..., 0]),
    ],
)
def test_load_refuses_disagreeing_shapes(tmp_path, demos, damage):
    save(tmp_path / "damaged.npz", damage(demos))
    with pytest.raises(FpoError, match="damaged"):
        load(tmp_path / "damaged.npz")


def test_normalisation_by_hand(demos):
    # Over 2 episodes x 2 steps. Column 0 holds 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5. Column 1 is
    # constant: its standard deviation is the floor.
    values = np.array([[[1, 2], [3, 2]], [[5, 2], [7, 2]]], np.float32)
    demos = Demonstrations(values, 2 * values, values - 4, np.array([True, True]))
    stats = normalisation(demos, std_floor=0.5)
    np.testing.assert_allclose(stats["proprio"].mean, [4, 2])
    np.testing.assert_allclose(stats["proprio"].std, [5**0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(stats["object_pose"].mean, [8, 4])
    np.testing.assert_allclose(stats["object_pose"].std, [2 * 5**0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(stats["actions"].mean, [0, -2])
    assert all(s.mean.dtype == s.std.dtype == np.float32 for s in stats.values())
