"""Latent spaces: which part of the base policy's noise the actor chooses."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fpo_jax.types import FpoError


def dct_basis(horizon: int, rank: int) -> np.ndarray:
    """The first `rank` columns of the orthonormal DCT-II over the chunk: [h, r], BᵀB = I."""
    steps = (np.arange(horizon) + 0.5) / horizon
    basis = np.sqrt(2.0 / horizon) * np.cos(np.pi * steps[:, None] * np.arange(rank)[None])
    basis[:, 0] /= np.sqrt(2.0)
    return basis.astype(np.float32)


@dataclass(frozen=True)
class LatentSpace:
    """Maps a latent x [D] and fresh noise ε [h, A] to the noise that the base decodes.

    `dct`:    B x + (I - B Bᵀ) ε: the rank lowest temporal frequencies are chosen, the rest is drawn as always. If x is
              N(0, I), the result is N(0, I): step 0 equals the base.
    `full`:   x itself. Step 0 equals the base.
    `repeat`: one row for all steps (dsrl_pi0). Step 0 is *not* the base: its noise is constant over the chunk.
    """

    space: Literal["dct", "full", "repeat"]
    horizon: int
    action_dim: int  # columns of the noise that are steered, the first ones; what is right of them stays as drawn
    rank: int = 2

    def __post_init__(self) -> None:
        if self.space == "dct" and not 1 <= self.rank <= self.horizon:
            raise FpoError(f"latent.rank is {self.rank}; choose 1 to {self.horizon}, the base's chunk length.")

    @property
    def dim(self) -> int:
        """D."""
        return {"dct": self.rank, "full": self.horizon, "repeat": 1}[self.space] * self.action_dim

    def expand(self, latent: Float[Array, "N D"], noise: Float[Array, "N h A"]) -> Float[Array, "N h A"]:
        """The base's noise for this latent; `noise` fills what the latent leaves free."""
        steered, rest = noise[..., : self.action_dim], noise[..., self.action_dim :]
        return jnp.concatenate([self._expand(latent, steered), rest], axis=-1)

    def _expand(self, latent: Float[Array, "N D"], noise: Float[Array, "N h w"]) -> Float[Array, "N h w"]:
        rows = latent.reshape(latent.shape[0], -1, self.action_dim)
        if self.space == "full":
            return rows
        if self.space == "repeat":
            return jnp.broadcast_to(rows, noise.shape)
        basis = jnp.asarray(dct_basis(self.horizon, self.rank))
        free = noise - jnp.einsum("hr,gr,nga->nha", basis, basis, noise)
        return jnp.einsum("hr,nra->nha", basis, rows) + free

    def project(self, noise: Float[Array, "N h A"]) -> Float[Array, "N D"]:
        """The latent of a given noise: x with `expand(x, noise) == noise` for dct and full, the mean row for repeat."""
        noise = noise[..., : self.action_dim]
        if self.space == "repeat":
            return noise.mean(axis=1)
        if self.space == "full":
            return noise.reshape(noise.shape[0], -1)
        basis = jnp.asarray(dct_basis(self.horizon, self.rank))
        return jnp.einsum("hr,nha->nra", basis, noise).reshape(noise.shape[0], -1)
