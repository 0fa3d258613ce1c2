"""Strict settings for every test: two CPU devices, no silent rank promotion, shapes checked at run time."""

import os
import tempfile

# Before anything imports JAX: two CPU devices, so that sharding is exercised everywhere.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
).strip()
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

# Before anything imports fpo_jax: its annotations become checks.
install_import_hook("fpo_jax", "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests begin anew with programs that another one has compiled already. Traces and compilations are counted as
# before. Each pytest process has a cache of its own, and those that it starts have none: JAX writes entries without a
# lock, so that others could read half of one.
_compiled = tempfile.TemporaryDirectory(prefix="fpo_jax-", ignore_cleanup_errors=True)
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_unconfigure():
    jax.config.update("jax_enable_compilation_cache", False)  # for what is still compiled at the very end
    _compiled.cleanup()


@pytest.fixture(autouse=True, scope="module")
def allow_rank_promotion_in_mjx(request: pytest.FixtureRequest):
    """MJX's own code promotes ranks."""
    with jax.numpy_rank_promotion("allow" if "mjx" in request.path.name else "raise"):
        yield
