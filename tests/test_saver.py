import threading

import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import checkpoint
from fpo_jax.saver import Saver
from fpo_jax.types import FpoError


@pytest.fixture
def disk(monkeypatch):
    """A disk that takes no manifest until `disk.set()`."""
    ready, write = threading.Event(), checkpoint._write_synced

    def wait_and_write(*arguments):
        assert ready.wait(300)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "_write_synced", wait_and_write)
    return ready


def test_a_save_does_not_wait_for_the_disk_and_nothing_half_written_is_seen(tmp_path, disk):
    values = np.arange(5.0)
    with Saver() as saver:
        for step in range(3):
            saver.save(tmp_path, step, {"device": jnp.full(3, step), "host": values}, keep=2)
        values[:] = -1  # later changes are no part of it
        assert checkpoint.steps(tmp_path) == [] and checkpoint.latest_step(tmp_path) is None
        assert (tmp_path / "checkpoints" / ".2.partial").is_dir()
        disk.set()
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert not list(tmp_path.rglob("*.partial"))
    restored = checkpoint.restore(tmp_path, 2, {"device": jnp.zeros(3, jnp.int32), "host": values})
    np.testing.assert_array_equal(restored["device"], [2, 2, 2])
    np.testing.assert_array_equal(restored["host"], np.arange(5.0))


def test_a_step_that_is_being_written_is_finished_before_it_is_written_again(tmp_path, disk, monkeypatch):
    begin, finished = checkpoint.begin, []

    def begin_after(*arguments):
        finished.append(checkpoint.steps(tmp_path))
        return begin(*arguments)

    monkeypatch.setattr(checkpoint, "begin", begin_after)
    with Saver() as saver:
        saver.save(tmp_path, 1, {"x": jnp.zeros(3)})
        threading.Timer(0.2, disk.set).start()
        saver.save(tmp_path, 1, {"x": jnp.ones(3)})
    assert finished == [[], [1]]
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, 1, {"x": np.zeros(3, np.float32)})["x"], 1.0)


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    tree = {"x": jnp.ones(3)}
    with Saver() as saver:
        saver.save(tmp_path, 1, tree)
        saver.wait()
        monkeypatch.setattr(checkpoint, "_write_synced", fail)
        saver.save(tmp_path, 2, tree)
        with pytest.raises(FpoError, match="became full"):
            saver.wait()
    with pytest.raises(FpoError, match="became full"), Saver() as saver:
        saver.save(tmp_path, 2, tree)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_an_error_elsewhere_still_finishes_what_was_begun(tmp_path):
    with pytest.raises(ZeroDivisionError), Saver() as saver:
        saver.save(tmp_path, 1, {"x": jnp.ones(3)})
        raise ZeroDivisionError
    assert checkpoint.latest_step(tmp_path) == 1
