"""The image tower of π0: a SigLIP vision transformer (arXiv:2303.15343) in Flax Linen.

One output token per patch, no pooling and no class token. Paths and shapes of the parameters, and the numbers, are
those of openpi's JAX model. Symbols used in shapes: s edge of the image [pixels], t patches, w width.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fpo_jax.parallel import gathered
from fpo_jax.types import FpoError, suggestion


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of an image tower."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch: int  # edge of a patch [pixels]


_SIZES = {"mu": (32, 1, 128, 2), "Ti": (192, 12, 768, 3), "So400m": (1152, 27, 4304, 16)}
SIGLIP = {f"{name}/{patch}": SiglipConfig(*sizes, patch) for name, sizes in _SIZES.items() for patch in (14, 16)}


def siglip_config(variant: str | SiglipConfig) -> SiglipConfig:
    """The sizes of a variant in `SIGLIP` such as "So400m/14"; explicit sizes are returned as they are."""
    if isinstance(variant, SiglipConfig):
        return variant
    if variant not in SIGLIP:
        raise FpoError(f"There is no image tower {variant!r}{suggestion(variant, SIGLIP)}")
    return SIGLIP[variant]


class MlpBlock(nn.Module):
    """Two dense layers with the tanh form of gelu between them."""

    hidden: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "N t w"]) -> Float[Array, "N t w"]:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        hidden = nn.gelu(dense(self.hidden)(x))  # made first, so it is Dense_0
        return dense(x.shape[-1])(hidden)


class EncoderBlock(nn.Module):
    """One pre-norm transformer layer; the signature is that of the body of a scan over layers."""

    config: SiglipConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "N t w"], _: None = None) -> tuple[Float[Array, "N t w"], None]:
        attention = nn.MultiHeadDotProductAttention(
            self.config.num_heads, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), deterministic=True
        )
        x = x + attention(nn.LayerNorm(dtype=self.dtype)(x))
        return x + MlpBlock(self.config.mlp_dim, self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)), None


class Encoder(nn.Module):
    """The transformer layers, stacked on a leading axis, and the last norm."""

    config: SiglipConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "N t w"]) -> Float[Array, "N t w"]:
        blocks = nn.scan(
            gathered(EncoderBlock),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.config.depth,
        )(self.config, self.dtype, name="encoderblock")
        return nn.LayerNorm(dtype=self.dtype, name="encoder_norm")(blocks(x, None)[0])


class Siglip(nn.Module):
    """Images in -1..1 to patch tokens of `out_width`. Activations have type `dtype`."""

    config: SiglipConfig
    out_width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: Float[Array, "N s s 3"]) -> Float[Array, "N t {self.out_width}"]:
        patch, width = self.config.patch, self.config.width
        if images.shape[1] % patch:
            raise FpoError(
                f"Images of {images.shape[1]} pixels don't divide into patches of {patch}: choose a multiple of it."
            )
        # Patches and positions in float32 whatever `dtype` is, like openpi.
        conv = nn.Conv(
            width, (patch, patch), strides=(patch, patch), padding="VALID", dtype="float32", name="embedding"
        )
        x = conv(images.astype(jnp.float32))
        x = x.reshape(x.shape[0], -1, width)
        positions = self.param("pos_embedding", nn.initializers.normal(width**-0.5), (1, x.shape[1], width))
        x = (x + positions).astype(self.dtype)
        x = Encoder(self.config, self.dtype, name="Transformer")(x)
        return nn.Dense(self.out_width, dtype=self.dtype, name="head")(x)
