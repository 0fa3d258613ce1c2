"""Reads openpi's recorded numbers (tests/golden/openpi), and rebuilds the weights and images they were made with."""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

FOLDER = Path(__file__).parent / "golden" / "openpi"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of `<name>.npz`."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


@cache
def facts(name: str) -> dict[str, Any]:
    """`<name>.json`: parameter checksums (.params), gradients (.grads) or a parameter tree (param_tree_...)."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def scale_and_offset(path: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Standard deviation and mean of the numbers in a leaf, so that activations keep their size."""
    parent, leaf = ("", *path.split("/"))[-2:]
    if leaf == "bias":
        return 0.1, 0.0
    if leaf == "scale":
        return 0.1, 0.0 if "/llm/" in path else 1.0
    if leaf == "pos_embedding":
        return 0.1, 0.0
    if leaf == "input_embedding":
        return shape[-1] ** -0.5, 0.0
    fan_in: tuple[int, ...] = shape[-2:-1]
    if (leaf == "w" and parent.startswith("attn_vec_einsum")) or (leaf == "kernel" and parent == "out"):
        fan_in = shape[-3:-1]
    elif leaf == "kernel" and parent in ("query", "key", "value"):
        fan_in = shape[-3:-2]
    elif leaf == "kernel" and parent == "embedding":
        fan_in = shape[-4:-1]
    return float(1.0 / np.sqrt(np.prod(fan_in))), 0.0


def fill(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The recorded value of one leaf; `path` is openpi's full one, such as PaliGemma/llm/final_norm/scale."""
    scale, offset = scale_and_offset(path, shape)
    value = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape, dtype=np.float32)
    value *= np.float32(scale)
    if offset:
        value += np.float32(offset)
    return value


def flat(tree: Any) -> dict[str, Any]:
    """Nested dictionaries as {path: leaf}."""
    return flatten_dict(tree, sep="/")


def params(name: str, within: str = "") -> Any:
    """The nested weights of a golden file; `within` is the place of a module that was tested alone, "PaliGemma/llm/".

    Raises AssertionError where a leaf differs from its recorded checksum.
    """
    values = {}
    for path, recorded in facts(f"{name}.params").items():
        values[path] = fill(within + path, tuple(recorded["shape"]))
        np.testing.assert_array_equal(values[path].ravel()[:4], np.asarray(recorded["first4"], np.float32), path)
        np.testing.assert_allclose(values[path].sum(dtype=np.float64), recorded["sum_f64"], rtol=1e-9, atol=1e-6)
    return unflatten_dict(values, sep="/")


@cache
def images() -> dict[str, np.ndarray]:
    """The three recorded camera images, float32 in -1..1, [2 224 224 3]."""
    pictures = {}
    for camera in CAMERAS:
        generator = np.random.default_rng(zlib.crc32(f"image/{camera}".encode()))
        pixels = generator.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
        pictures[camera] = pixels.astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)
    return pictures


def observation(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(images, image_masks, prompt, prompt_mask) of a full-model file."""
    golden = arrays(name)
    masks = {camera: golden[f"image_mask/{camera}"] for camera in CAMERAS}
    return images(), masks, golden["tokenized_prompt"], golden["tokenized_prompt_mask"]
