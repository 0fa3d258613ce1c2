"""For tests that render."""

import os

import pytest

from fpo_jax.envs.aloha_render import RenderPool, shared_pool
from fpo_jax.types import FpoError


def opengl_pool() -> RenderPool:
    """The shared pool. Without an OpenGL library the test that asks is skipped, in CI, which installs one, it fails."""
    try:
        return shared_pool()
    except FpoError as error:
        if os.environ.get("FPO_JAX_REQUIRE_OPENGL"):
            raise
        pytest.skip(str(error))
