"""What a compiled program does, counted from its text; the tables of docs/scale.md rest on it."""

import jax
import jax.numpy as jnp
import pytest
import scaling
from hlo_counts import Counts, count

from fpo_jax import parallel
from fpo_jax.config import ParallelOptions
from tiny import jit

F32 = jnp.float32


def test_loops_count_as_often_as_they_run():
    def chain(x, y):
        def step(carry, _):
            inner = jax.lax.scan(lambda c, _: (c @ c, None), carry, length=3)[0]
            return inner @ y, None

        return jax.lax.scan(step, x, length=5)[0]

    square = jax.ShapeDtypeStruct((32, 32), F32)
    found = count(jit(chain).lower(square, square).compile().as_text(), 1)
    assert found.flops == 5 * (3 + 1) * 2 * 32**3
    assert found.bytes == 0 and not found.collectives


def test_convolutions_count():
    images, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), F32), jax.ShapeDtypeStruct((4, 4, 3, 16), F32)

    def patches(images, kernel):
        return jax.lax.conv_general_dilated(images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    found = count(jit(patches).lower(images, kernel).compile().as_text(), 1)
    assert found.flops == 2 * (2 * 2 * 2 * 16) * (4 * 4 * 3)


def test_exchanged_bytes():
    """On two devices a ring passes half of what is gathered, and all of what is summed."""

    def step(carry, x):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        return carry + jax.lax.psum(jnp.sum(whole) * x, parallel.AXES), None

    def body(xs):
        return jax.lax.scan(step, jnp.zeros(64), xs)[0]

    with parallel.using(parallel.make_mesh(ParallelOptions(devices=2, fsdp=2), 2)):
        xs = jax.ShapeDtypeStruct((7, 128), F32)
        mapped = parallel.over_devices(body, parallel.SLOTS, parallel.EVERYWHERE)
        found = count(jit(mapped).lower(xs).compile().as_text(), 2)
    assert found.received == {"all-gather": 7 * 4 * 128 / 2, "all-reduce": 7 * 4 * 64}
    assert found.collectives == {"all-gather": 7, "all-reduce": 7}


def test_the_model_of_the_machine():
    args = scaling.Args(teraflops=100.0, inside=300.0, between=50.0, latency=20.0)
    counts = Counts(1e14, {"all-reduce": 3e9}, {"all-reduce": 50})
    assert scaling.seconds(args, counts, 8) == pytest.approx((1.0, 0.01, 0.001))
    assert scaling.seconds(args, counts, 16) == pytest.approx((1.0, 0.06, 0.001))
    # 1 / 1.06 and 1 / 1.061
    assert scaling.row(args, "pi0", 16, counts, Counts(1e14, {}, {})).split(" | ")[-2:] == [
        "0.943",
        "0.943 |",
    ]  # 1 / 1.06, 1 / 1.061
