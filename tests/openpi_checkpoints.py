"""Recorded and small checkpoints for the tests of `policies.openpi_checkpoint` and `policies.storage`."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import openpi_golden as golden
from fpo_jax.policies.openpi_checkpoint import save_params
from fpo_jax.policies.transforms import NormStats

TRAIN = golden.FOLDER / "checkpoints" / "pi0_dummy_train"  # written by openpi's own training code, tower Ti/14
SHARED = Path(__file__).parents[2] / "shared" / "openpi_reference"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"openpi's larger checkpoints are not in {SHARED}")

IMAGE_VALUE = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/value/kernel"
NORM = "PaliGemma/llm/final_norm/scale"
ACTION = "action_in_proj/kernel"
STATS = {
    "state": NormStats(jnp.arange(3.0), jnp.ones(3)),
    "actions": NormStats(jnp.zeros(2), jnp.ones(2), -jnp.ones(2), jnp.ones(2)),
}


def shapes(*paths: str) -> dict:
    """Shapes of the recorded training checkpoint, of all leaves or of these."""
    tree = golden.facts("pi0_dummy_ti.params")
    return unflatten_dict(
        {path: jax.ShapeDtypeStruct(tuple(tree[path]["shape"]), jnp.float32) for path in paths or tree}, sep="/"
    )


def pattern(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The recorded values: 61 numbers, repeated."""
    scale, offset = golden.scale_and_offset(path, shape)
    numbers = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(61, dtype=np.float32)
    return np.resize((numbers * np.float32(scale) + np.float32(offset)).astype(jnp.bfloat16), shape)


def assert_recorded(params: dict, dtype: str, num: int) -> None:
    leaves = golden.flat(params)
    assert len(leaves) == num
    for path, leaf in leaves.items():
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf), pattern(path, leaf.shape).astype(dtype), path)


def small_tree(lora: bool = False) -> dict:
    """Random weights with the names of a π0, tiny; of mixed dtypes where they have low-rank updates."""
    sizes = {
        "PaliGemma/llm/layers/attn/q_einsum/w": (2, 4, 6, 3),
        "PaliGemma/llm/layers/attn/kv_einsum_1/w": (2, 2, 1, 6, 3),
        "PaliGemma/llm/layers/attn/attn_vec_einsum/w": (2, 4, 3, 6),
        "PaliGemma/llm/layers/mlp/gating_einsum": (2, 2, 6, 5),
        "PaliGemma/llm/layers/mlp_1/linear": (2, 5, 6),
        "PaliGemma/llm/final_norm/scale": (6,),
        "action_in_proj/kernel": (3, 6),
        "action_time_mlp_in/kernel": (6, 6),
    }
    if lora:
        for path in [path for path in sizes if "layers" in path]:
            stem, (*stack, rows, columns) = path.removesuffix("w") if path.endswith("/w") else f"{path}_", sizes[path]
            sizes |= {f"{stem}lora_a": (*stack, rows, 2), f"{stem}lora_b": (*stack, 2, columns)}
    random = np.random.default_rng(0)
    leaves = {path: jnp.asarray(random.normal(size=size), jnp.float32) for path, size in sizes.items()}
    frozen = {path: leaf.astype(jnp.bfloat16) for path, leaf in leaves.items() if "llm" in path and "lora" not in path}
    return unflatten_dict(leaves | frozen if lora else leaves, sep="/")


def structs(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_same(tree: dict, other: dict) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), tree, other)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_params(tmp_path / "saved", small_tree(), STATS, "some/robot")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
