"""Camera images on the host, in NumPy and Pillow only: processes that render import this file and never JAX."""

import numpy as np
from jaxtyping import UInt8


def padded_size(image_size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Largest (height, width) [pixels] with the image's aspect ratio that fits the target, rounded down as openpi does.

    size / r with r = max(height / target height, width / target width), and at least one pixel.
    """
    ratio = max(image_size[1] / target[1], image_size[0] / target[0])
    return max(1, int(image_size[0] / ratio)), max(1, int(image_size[1] / ratio))


def resize_with_pad(images: UInt8[np.ndarray, "*batch y x 3"], height: int, width: int) -> UInt8[np.ndarray, "..."]:
    """Resizes images to [*batch height width 3] bilinearly, keeping the aspect ratio, with equal black bars around.

    This is what openpi's policy server does to its input (Pillow's bilinear filter, which averages where it shrinks).
    Images that have the right size already come back as they are, without a copy.
    """
    from PIL import Image

    *batch, y, x, _ = images.shape
    if (y, x) == (height, width):
        return images
    inner_height, inner_width = padded_size((y, x), (height, width))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    padded = np.zeros((*batch, height, width, 3), np.uint8)
    for index in np.ndindex(*batch):
        inner = Image.fromarray(images[index]).resize((inner_width, inner_height), Image.Resampling.BILINEAR)
        padded[(*index, slice(top, top + inner_height), slice(left, left + inner_width))] = np.asarray(inner)
    return padded
