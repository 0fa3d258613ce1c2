import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import buffer
from fpo_jax.types import Transition
from tiny import keys

T, N = 3, 2


def make_rollout(value: float) -> Transition:
    """A rollout whose numbers are all `value`, and whose slots are all valid."""
    full, flags = jnp.full((T, N), value), jnp.ones((T, N), bool)
    vectors = jnp.full((T, N, 4), value)
    slot_keys = keys(T * N, seed=int(value)).reshape(T, N)
    return Transition(vectors, vectors, full, vectors, full, flags, flags, vectors, slot_keys)


def test_an_empty_window_has_nothing_valid():
    for example in (make_rollout(1.0), jax.eval_shape(lambda: make_rollout(1.0))):
        window = buffer.init(example, 4)
        assert window.valid.shape == (4, T, N) and not window.valid.any()
        assert window.latent.shape == (4, T, N, 4) and not window.latent.any()
        assert window.cfm_key.shape == (4, T, N) and window.cfm_key.dtype == keys(1).dtype


def test_append_drops_the_oldest():
    window = buffer.init(make_rollout(1.0), 2)
    seen = []
    for value in (1.0, 2.0, 3.0):
        window = buffer.append(window, make_rollout(value))
        seen.append((window.reward[:, 0, 0].tolist(), window.valid[:, 0, 0].tolist()))
    assert seen == [([0, 1], [False, True]), ([1, 2], [True, True]), ([2, 3], [True, True])]
    newest = jax.random.key_data(make_rollout(3.0).cfm_key)
    np.testing.assert_array_equal(jax.random.key_data(window.cfm_key)[1], newest)


def test_flatten_keeps_the_order_and_the_rest():
    tree = {"scalar": jnp.arange(12).reshape(2, 3, 2), "vector": jnp.arange(24.0).reshape(2, 3, 2, 2)}
    flat = buffer.flatten(tree)
    np.testing.assert_array_equal(flat["scalar"], np.arange(12))
    np.testing.assert_array_equal(flat["vector"], np.arange(24.0).reshape(12, 2))
    assert buffer.flatten(tree, 2)["vector"].shape == (6, 2, 2)


VALID = jnp.array([False, True, True, False, True, True, True, True, False])  # six of nine
CHOSEN = [1, 2, 4, 5, 6, 7]


def test_minibatches_hold_each_valid_sample_once():
    indices = buffer.minibatch_indices(jax.random.key(0), VALID, 3, 2)
    assert indices.shape == (3, 2)
    assert sorted(indices.ravel().tolist()) == CHOSEN
    assert indices.ravel().tolist() != CHOSEN  # shuffled
    other = buffer.minibatch_indices(jax.random.key(1), VALID, 3, 2)
    assert other.ravel().tolist() != indices.ravel().tolist()


def test_minibatches_repeat_where_there_are_too_few():
    order = buffer.minibatch_indices(jax.random.key(0), VALID, 4, 4).ravel().tolist()  # 16 places for six samples
    assert sorted(order[:6]) == CHOSEN
    assert order[6:] == order[:6] + order[:4]


def test_minibatches_may_be_fewer_than_cover_all():
    order = buffer.minibatch_indices(jax.random.key(0), VALID, 1, 4).ravel().tolist()
    assert len(set(order)) == 4 and set(order) <= set(CHOSEN)


@pytest.mark.parametrize("num_valid", [0, 1])
def test_minibatches_of_next_to_nothing(num_valid):
    valid = jnp.arange(5) >= 5 - num_valid
    order = buffer.minibatch_indices(jax.random.key(0), valid, 2, 3)
    assert order.shape == (2, 3) and len(set(order.ravel().tolist())) == 1
    assert np.all(np.asarray(valid)[order]) == (num_valid == 1)  # with none valid, every step sees an invalid sample
