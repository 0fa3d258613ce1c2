"""The image tower against openpi's recorded numbers."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import openpi_golden as golden
from fpo_jax.policies.siglip import Siglip, SiglipConfig, siglip_config
from fpo_jax.types import FpoError

TOWERS = {"siglip_mu16": "mu/16", "siglip_Ti16": "Ti/16"}
every_file = pytest.mark.parametrize("name", TOWERS)


@cache
def run(name: str):
    """(output, output of every module inside) on the recorded weights and image."""
    model = Siglip(siglip_config(TOWERS[name]), out_width=24)
    weights = jax.tree.map(jnp.asarray, golden.params(name, "PaliGemma/img/"))
    apply = jax.jit(lambda weights, image: model.apply({"params": weights}, image, capture_intermediates=True))
    out, state = apply(weights, golden.arrays(name)["image"])
    return out, golden.flat(state["intermediates"])


@every_file
def test_output_and_every_step_inside(name):
    z = golden.arrays(name)
    out, inside = run(name)
    block = "Transformer/encoderblock"
    layers = inside[f"{block}/__call__"][0][0]
    attention = inside[f"{block}/MultiHeadDotProductAttention_0/__call__"][0][0]
    mlp = inside[f"{block}/MlpBlock_0/__call__"][0][0]
    steps = {
        "out": out,
        "stem": inside["embedding/__call__"][0],
        "block00_sa": attention,
        "block00_mlp": mlp,
        "block00_plus_sa": layers[0] - mlp,
        "block00_plus_mlp": layers[0],
        "blocklast_plus_mlp": layers[-1],
        "encoded": inside["Transformer/__call__"][0],
    }
    for step, value in steps.items():
        np.testing.assert_allclose(value, z[step], rtol=0, atol=2e-5, err_msg=step)


@every_file
def test_fresh_parameters_have_the_recorded_shapes(name):
    model = Siglip(siglip_config(TOWERS[name]), out_width=24)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(golden.arrays(name)["image"]))["params"]
    recorded = golden.facts(f"{name}.params")
    expected = {path: tuple(fact["shape"]) for path, fact in recorded.items()}
    assert {path: leaf.shape for path, leaf in golden.flat(shapes).items()} == expected


def test_other_image_sizes_and_types():
    model = Siglip(SiglipConfig(width=16, depth=2, mlp_dim=32, num_heads=2, patch=14), out_width=6, dtype="bfloat16")
    out, weights = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((3, 98, 98, 3)))
    assert (out.shape, out.dtype) == ((3, 49, 6), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}


def test_mistakes():
    with pytest.raises(FpoError, match="98 pixels don't divide into patches of 16"):
        Siglip(siglip_config("mu/16"), 8).init(jax.random.key(0), jnp.zeros((1, 98, 98, 3)))
    with pytest.raises(FpoError, match="no image tower 'So400/14'; did you mean 'So400m/14'"):
        siglip_config("So400/14")
