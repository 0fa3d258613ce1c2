"""Resizing on the host, against openpi's numbers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fpo_jax.images import padded_size, resize_with_pad

GOLDEN = np.load(Path(__file__).parent / "golden" / "openpi" / "transforms.npz")


@pytest.mark.parametrize(("key", "size"), [("resize/pil_32x32", (32, 32)), ("resize/pil_80x72_up", (80, 72))])
def test_as_openpi_resizes(key, size):
    image = GOLDEN["resize/in_48x64"]
    np.testing.assert_array_equal(resize_with_pad(image, *size), GOLDEN[key])
    batch = resize_with_pad(np.stack([image, image[::-1]]), *size)
    np.testing.assert_array_equal(batch[0], GOLDEN[key])
    np.testing.assert_array_equal(batch[1], resize_with_pad(image[::-1], *size))


def test_several_leading_axes_and_none():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7, 3), np.uint8)
    resized = resize_with_pad(images, 4, 4)
    assert resized.shape == (2, 3, 4, 4, 3)
    np.testing.assert_array_equal(resized[1, 2], resize_with_pad(images[1, 2], 4, 4))
    assert resize_with_pad(images[:0], 4, 4).shape == (0, 3, 4, 4, 3)


def test_the_right_size_is_left_alone():
    images = np.zeros((2, 4, 6, 3), np.uint8)
    assert resize_with_pad(images, 4, 6) is images


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [((48, 64), (32, 32), (24, 32)), ((480, 640), (224, 224), (168, 224)), ((64, 48), (32, 32), (32, 24))],
)
def test_the_aspect_ratio_stays(size, target, expected):
    assert padded_size(size, target) == expected
    white = resize_with_pad(np.full((*size, 3), 255, np.uint8), *target)
    rows, columns = (white == 255).all(-1).any(1), (white == 255).all(-1).any(0)
    assert (rows.sum(), columns.sum()) == expected
    assert white.sum() == 255 * 3 * expected[0] * expected[1]  # black elsewhere


def test_an_extreme_ratio_keeps_a_pixel():
    assert padded_size((1, 1000), (8, 8)) == (1, 8)
    assert resize_with_pad(np.full((1, 1000, 3), 255, np.uint8), 8, 8).any()


def test_a_render_process_needs_no_jax():
    code = "import sys, fpo_jax.images; sys.exit('jax' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
