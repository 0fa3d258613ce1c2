import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.latent import LatentSpace, dct_basis
from fpo_jax.types import FpoError

H, A, N = 6, 2, 3
SPACES = [LatentSpace("dct", H, A, rank=2), LatentSpace("dct", H, A, rank=H), LatentSpace("full", H, A)]


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_dct_is_orthonormal():
    basis = dct_basis(50, 50)
    np.testing.assert_allclose(basis.T @ basis, np.eye(50), atol=1e-5)
    np.testing.assert_array_equal(dct_basis(50, 3), basis[:, :3])
    # h = 2: rows (1, 1)/√2 and (cos π/4, cos 3π/4)
    np.testing.assert_allclose(dct_basis(2, 2), np.array([[1, 1], [1, -1]]) / np.sqrt(2), atol=1e-7)


@pytest.mark.parametrize("space, dim", [*zip(SPACES, [4, 12, 12], strict=True), (LatentSpace("repeat", H, A), 2)])
def test_dim(space, dim):
    assert space.dim == dim


@pytest.mark.parametrize("space", SPACES)
def test_round_trips(space):
    latent, noise = draw(N, space.dim), draw(N, H, A, seed=1)
    np.testing.assert_allclose(space.project(space.expand(latent, noise)), latent, atol=1e-5)
    np.testing.assert_allclose(space.expand(space.project(noise), noise), noise, atol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_step_0_is_the_base(space):
    """(x, ε) -> noise is linear, M (x, ε) = noise: if both are N(0, I), its covariance M Mᵀ must be I."""

    def joint(z):
        return space.expand(z[None, : space.dim], z[None, space.dim :].reshape(1, H, A)).ravel()

    matrix = jax.jacobian(joint)(jnp.zeros(space.dim + H * A))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(H * A), atol=1e-5)
    np.testing.assert_allclose(joint(jnp.zeros(space.dim + H * A)), 0)  # and its mean 0


def test_dct_leaves_the_other_frequencies_alone():
    space = LatentSpace("dct", H, A, rank=2)
    noise, rest = draw(N, H, A), dct_basis(H, H)[:, 2:]
    expanded = space.expand(draw(N, 4, seed=1), noise)
    np.testing.assert_allclose(*(np.einsum("hr,nha->nra", rest, x) for x in (expanded, noise)), atol=1e-5)


def test_dct_rows_are_frequencies():
    """x = (row of frequency 0, row of frequency 1), each A wide: the first is constant over the chunk."""
    space = LatentSpace("dct", H, A, rank=2)
    constant = space.expand(jnp.array([[3.0, -1.0, 0.0, 0.0]]), jnp.zeros((1, H, A)))
    np.testing.assert_allclose(constant[0], np.tile([3.0, -1.0], (H, 1)) / np.sqrt(H), atol=1e-6)


def test_repeat_is_one_row_and_not_the_base():
    space = LatentSpace("repeat", H, A)
    latent = draw(N, A)
    expanded = space.expand(latent, draw(N, H, A, seed=1))
    np.testing.assert_array_equal(expanded, np.tile(latent[:, None], (1, H, 1)))
    np.testing.assert_allclose(space.project(expanded), latent, atol=1e-6)
    matrix = jax.jacobian(lambda z: space.expand(z[None], jnp.zeros((1, H, A))).ravel())(jnp.zeros(A))
    assert np.abs(matrix @ matrix.T - np.eye(H * A)).max() == 1  # steps are fully correlated


@pytest.mark.parametrize("rank", [0, H + 1])
def test_a_rank_beyond_the_chunk_is_an_error(rank):
    with pytest.raises(FpoError, match=rf"latent\.rank is {rank}; choose 1 to {H}"):
        LatentSpace("dct", H, A, rank=rank)
    assert LatentSpace("full", H, A, rank=rank).dim == H * A  # rank means nothing there


@pytest.mark.parametrize("name", ["dct", "full", "repeat"])
def test_padding_stays_as_drawn(name):
    """Noise wider than what is steered (π0 pads 14 actions to 32): the first columns as alone, the rest untouched."""
    space = LatentSpace(name, H, A)
    latent, noise = draw(N, space.dim), draw(N, H, A + 3, seed=1)
    expanded = space.expand(latent, noise)
    np.testing.assert_array_equal(expanded[..., A:], noise[..., A:])
    np.testing.assert_allclose(expanded[..., :A], space.expand(latent, noise[..., :A]), atol=1e-6)
    np.testing.assert_allclose(space.project(expanded), latent, atol=1e-5)
