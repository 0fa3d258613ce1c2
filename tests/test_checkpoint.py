import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import checkpoint
from fpo_jax.types import FpoError


class State(NamedTuple):
    params: dict
    keys: jax.Array
    fast_key: jax.Array
    counts: np.ndarray
    flags: jax.Array
    nothing: None
    empty: jax.Array
    scale: float


def make_state(seed: int = 0) -> State:
    kernel = jax.random.normal(jax.random.key(seed), (7, 3))
    return State(
        params={
            "Dense_0": {"kernel": kernel.at[0, 0].set(jnp.nan).at[0, 1].set(-0.0), "bias": kernel[0].astype("bfloat16")}
        },
        keys=jax.random.split(jax.random.key(seed), 5),
        fast_key=jax.random.key(seed, impl="rbg"),
        counts=np.array([2**32 - 1, seed], np.uint32),
        flags=jnp.array([True, False]),
        nothing=None,
        empty=jnp.zeros((4, 0)),
        scale=0.1,
    )


def bits(tree):
    def one(leaf):
        leaf = checkpoint._to_array(leaf)
        return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()

    return jax.tree.map(one, tree)


def test_everything_comes_back_bitwise(tmp_path):
    state = make_state()
    checkpoint.save(tmp_path, 3, state, config={"seed": 0})
    restored = checkpoint.restore(tmp_path, 3, make_state(1))
    assert bits(restored) == bits(state)
    assert jax.random.key_impl(restored.fast_key) == jax.random.key_impl(state.fast_key)
    assert isinstance(restored.counts, np.ndarray)
    assert type(restored.scale) is float
    assert checkpoint.load_config(tmp_path, 3) == {"seed": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_restores_from_abstract_shapes_and_onto_two_devices(tmp_path):
    checkpoint.save(tmp_path, 0, {"x": jnp.arange(8.0), "key": jax.random.key(3)})
    abstract = jax.eval_shape(lambda: {"x": jnp.arange(8.0), "key": jax.random.key(0)})
    restored = checkpoint.restore(tmp_path, 0, abstract)
    np.testing.assert_array_equal(restored["x"], np.arange(8.0))
    assert jnp.array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(jax.random.key(3)))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    like = {"x": jax.device_put(jnp.zeros(8), sharding), "key": jax.random.key(0)}
    restored = checkpoint.restore(tmp_path, 0, like)
    assert restored["x"].sharding == sharding
    np.testing.assert_array_equal(restored["x"], np.arange(8.0))


def test_rolling_best_and_milestones(tmp_path):
    tree = {"x": jnp.ones(3)}
    for step in range(5):
        checkpoint.save(tmp_path, step, tree, keep=2)
        checkpoint.save(tmp_path, step, tree, shelf="best")
        checkpoint.save(tmp_path, step, tree, shelf="milestones", extra={"latents": np.full((2, 3), step, np.float32)})
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert checkpoint.steps(tmp_path, "best") == [4]
    assert checkpoint.steps(tmp_path, "milestones") == [0, 1, 2, 3, 4]
    latents = checkpoint.load_extra(tmp_path, 2)["latents"]
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, np.full((2, 3), 2))
    assert checkpoint.load_extra(tmp_path, 4, shelf="checkpoints") == {}


def test_best_may_go_back_after_a_resume(tmp_path):
    checkpoint.save(tmp_path, 9, {"x": jnp.ones(3)}, shelf="best")
    checkpoint.save(tmp_path, 4, {"x": jnp.zeros(3)}, shelf="best")
    assert checkpoint.latest_step(tmp_path, "best") == 4


def test_a_continuation_that_was_given_up_does_not_outlive_what_came_before(tmp_path):
    tree = {"x": jnp.ones(3)}
    for step in (5, 10, 6):  # the run went on from 5
        checkpoint.save(tmp_path, step, tree, keep=2)
    assert checkpoint.steps(tmp_path) == [5, 6]
    checkpoint.forget_later(tmp_path, 5)
    assert checkpoint.steps(tmp_path) == [5]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": jnp.ones(3)})
    checkpoint.save(tmp_path, 1, {"x": jnp.full(3, 2.0)})
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, 1, {"x": np.zeros(3, np.float32)})["x"], 2.0)


def test_a_half_written_checkpoint_is_never_picked(tmp_path, monkeypatch):
    assert checkpoint.latest_step(tmp_path) is None
    checkpoint.save(tmp_path, 1, {"x": jnp.ones(3)})
    # The process dies between the arrays and the rename: nothing cleans up.
    monkeypatch.setattr(checkpoint, "_write_synced", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, {"x": jnp.ones(3)})
    monkeypatch.undo()
    assert (tmp_path / "checkpoints" / ".2.partial" / "state").is_dir()
    assert checkpoint.latest_step(tmp_path) == 1
    checkpoint.save(tmp_path, 2, {"x": jnp.ones(3)})
    assert checkpoint.latest_step(tmp_path) == 2
    assert not list(tmp_path.rglob("*.partial"))


def biggest_file(path: Path) -> Path:
    return max((p for p in (path / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    state = make_state()
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, state)
    file = biggest_file(path)
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        (path / "manifest.json").write_text("{")
    else:
        shutil.rmtree(path)
        path.mkdir()
    with pytest.warns(UserWarning, match=r"checkpoints.2 is damaged"):
        assert checkpoint.latest_step(tmp_path) == 1
    assert bits(checkpoint.restore(tmp_path, 1, state)) == bits(state)
    with pytest.raises(FpoError, match="damaged"):
        checkpoint.restore(tmp_path, 2, state)


def test_missing_and_unfit_checkpoints_name_the_reason(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": jnp.ones((3, 2)), "key": jax.random.key(0)})
    like = {"x": jnp.ones((3, 2)), "key": jax.random.key(0)}
    with pytest.raises(FpoError, match=r"no checkpoint 7 .* there are: \[1\]"):
        checkpoint.restore(tmp_path, 7, like)
    with pytest.raises(FpoError, match=r"holds float32\[3, 2\] for 'x', needed is float32\[4, 2\]"):
        checkpoint.restore(tmp_path, 1, like | {"x": jnp.ones((4, 2))})
    with pytest.raises(FpoError, match="nothing for 'y'"):
        checkpoint.restore(tmp_path, 1, like | {"y": jnp.ones(1)})
    with pytest.raises(FpoError, match=r"\(PRNG key\) for 'key', needed is nothing"):
        checkpoint.restore(tmp_path, 1, {"x": like["x"]})
    with pytest.raises(FpoError, match="no readable configuration"):
        checkpoint.load_config(tmp_path, 1)


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch):
    tree = {"x": jnp.ones(3)}
    checkpoint.save(tmp_path, 1, tree)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(FpoError, match="Not enough disk space"):
        checkpoint.save(tmp_path, 2, tree)
    monkeypatch.undo()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_synced", fail)
    with pytest.raises(FpoError, match="became full"):
        checkpoint.save(tmp_path, 2, tree)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert checkpoint.latest_step(tmp_path) == 1


def test_the_manifest_names_arrays_by_their_path(tmp_path):
    path = checkpoint.save(tmp_path, 1, make_state())
    arrays = json.loads((path / "manifest.json").read_text())["arrays"]
    assert arrays["params.Dense_0.kernel"] == {"shape": [7, 3], "dtype": "float32"}
    assert arrays["keys"] == {"shape": [5, 2], "dtype": "uint32", "key": "threefry2x32"}
