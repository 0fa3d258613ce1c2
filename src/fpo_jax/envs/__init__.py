"""Environments: batches of simulated tasks behind the `Env` protocol of `fpo_jax.types`."""

import importlib.util
from typing import Any

import jax

from fpo_jax.types import Camera, Env, FpoError, suggestion

# Backends are imported by `make_env` alone: each needs packages or devices that the others don't.
ENVS = {
    "aloha_transfer_cube": ("mujoco", "mjx", "warp"),  # name -> its physics backends, the CPU one first
    "point_mass": ("jax",),
}


def make_env(
    name: str,
    physics: str = "auto",
    episode_length: int | None = None,
    execute_steps: int | None = None,
    camera: Camera | None = None,
) -> Env:
    """Build the environment `name` of ENVS on one of its physics backends; None keeps the task's own default [steps].

    physics="auto": MuJoCo's C engine on CPU, MJX-Warp on NVIDIA GPUs where it is installed, else MJX. With a camera,
    the observations have its pictures.

    Raises FpoError for what there is not, and where a camera finds no OpenGL library.
    """
    physics = resolve_physics(name, physics)
    lengths = {"episode_length": episode_length, "execute_steps": execute_steps}
    options: dict[str, Any] = {key: value for key, value in lengths.items() if value is not None}
    for key, value in options.items():
        if value < 1:
            raise FpoError(f"{key} must be at least 1 control step, not {value}.")
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
    if name not in ENVS:
        raise FpoError(f"There is no environment {name!r}{suggestion(name, ENVS)}")
    physics = _default_physics(ENVS[name]) if physics == "auto" else physics
    if physics not in ENVS[name]:
        raise FpoError(f"The environment {name!r} has no physics {physics!r}{suggestion(physics, ENVS[name])}")
    return physics


def _default_physics(backends: tuple[str, ...]) -> str:
    platform = jax.default_backend()
    if platform == "cpu" or len(backends) == 1:
        return backends[0]
    return "warp" if platform == "gpu" and importlib.util.find_spec("warp") else "mjx"
