"""Environments: batches of simulated tasks behind the `Env` protocol of `fpo_jax.types`."""

import importlib.util
from typing import Any

import jax

from fpo_jax.config import LiberoOptions
from fpo_jax.types import Camera, Env, FpoError, suggestion

# Backends are imported by `make_env` alone: each needs packages or devices that the others don't.
ENVS = {
    "aloha_transfer_cube": ("mujoco", "mjx", "warp"),  # name -> its physics backends, the CPU one first
    "point_mass": ("jax",),
    **dict.fromkeys(("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"), ("mujoco",)),
}


def make_env(
    name: str,
    physics: str = "auto",
    episode_length: int | None = None,
    execute_steps: int | None = None,
    camera: Camera | tuple[Camera, ...] | None = None,
    libero: LiberoOptions | None = None,
) -> Env:
    """Build the environment `name` of ENVS on one of its physics backends; None keeps the task's own default [steps].

    physics="auto": MuJoCo's C engine on CPU, MJX-Warp on NVIDIA GPUs where it is installed, else MJX. With a camera,
    the observations have its pictures; LIBERO takes several. One task of a LIBERO suite is `suite/task`.

    Raises FpoError for what there is not, and where a camera finds no OpenGL library.
    """
    physics = resolve_physics(name, physics)
    lengths = {"episode_length": episode_length, "execute_steps": execute_steps}
    options: dict[str, Any] = {key: value for key, value in lengths.items() if value is not None}
    for key, value in options.items():
        if value < 1:
            raise FpoError(f"{key} must be at least 1 control step, not {value}.")
    cameras = (camera,) if isinstance(camera, Camera) else camera or ()
    if name.startswith("libero"):
        from fpo_jax.envs.libero import make_libero

        return make_libero(name, cameras, libero or LiberoOptions(), **options)
    camera = cameras[0] if cameras else None
    if name == "point_mass":
        from fpo_jax.envs.point_mass import PointMass

        if camera is not None:
            raise FpoError("The environment 'point_mass' has no cameras: choose a base policy that needs none.")
        return PointMass(**options)
    if physics == "mujoco":
        from fpo_jax.envs.aloha_mujoco import AlohaMujoco

        return AlohaMujoco(camera=camera, **options)
    from fpo_jax.envs.aloha_mjx import AlohaMjx

    return AlohaMjx(impl="warp" if physics == "warp" else "jax", camera=camera, **options)


def resolve_physics(name: str, physics: str = "auto") -> str:
    """The backend that `physics` means for this environment on this machine. Raises FpoError for unknown names."""
    suite, slash, task = name.partition("/")
    if suite not in ENVS:
        raise FpoError(f"There is no environment {name!r}{suggestion(suite, ENVS)}")
    if slash and not suite.startswith("libero"):
        raise FpoError(f"The environment {suite!r} has no task {task!r}: only LIBERO's suites have tasks.")
    physics = _default_physics(ENVS[suite]) if physics == "auto" else physics
    if physics not in ENVS[suite]:
        raise FpoError(f"The environment {name!r} has no physics {physics!r}{suggestion(physics, ENVS[suite])}")
    return physics


def _default_physics(backends: tuple[str, ...]) -> str:
    platform = jax.default_backend()
    if platform == "cpu" or len(backends) == 1:
        return backends[0]
    return "warp" if platform == "gpu" and importlib.util.find_spec("warp") else "mjx"
