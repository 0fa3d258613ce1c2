"""Pictures of the ALOHA task from joint positions, without a display.

Rendering runs in a process of its own: MuJoCo chooses its OpenGL library once, when it is imported, which here is long
before the first picture; and a graphics driver that crashes does not take the training run with it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from fpo_jax.envs import aloha
from fpo_jax.types import FpoError

CAMERAS = ("top", "angle", "front_close", "left_pillar", "right_pillar")
_NO_OPENGL = 3  # exit status of the child


def render_episode(
    qpos: Float[np.ndarray, "T 23"], camera: str = "top", height: int = 240, width: int = 320
) -> UInt8[np.ndarray, "T y x 3"]:
    """RGB frames of an episode, one for each row of joint positions [rad, m] (layout: see `aloha`).

    EGL is tried first, then OSMesa; the environment variable MUJOCO_GL, where set, before both. Without a GPU a frame
    takes about 0.1 s: pass qpos[::2] for half of them.

    Raises FpoError for an unknown camera, and where no OpenGL library works, naming the packages to install.
    """
    if camera not in CAMERAS:
        raise FpoError(f"There is no camera '{camera}'; there are: {', '.join(CAMERAS)}.")
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "qpos.npy", np.asarray(qpos, np.float64))
        for backend in dict.fromkeys([os.environ.get("MUJOCO_GL") or "egl", "egl", "osmesa"]):
            child = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "fpo_jax.envs.aloha_render",
                    str(aloha.xml_path()),
                    folder,
                    camera,
                    str(height),
                    str(width),
                ],
                env={**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend},
                capture_output=True,
                text=True,
                check=False,
            )
            if child.returncode == 0:
                return np.load(Path(folder) / "frames.npy")
            if child.returncode > 0 and child.returncode != _NO_OPENGL:
                raise FpoError(f"Rendering failed: {child.stderr.strip().splitlines()[-1]}")
            # Otherwise: no such library, or it crashed (negative status). Try the next one.
    raise FpoError(
        "No OpenGL library for rendering: run `apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri` (or libosmesa6)."
    )


def _render(xml: str, folder: str, camera: str, height: int, width: int) -> None:
    """The child: qpos.npy -> frames.npy."""
    try:
        import mujoco

        model = mujoco.MjModel.from_xml_path(xml)
        model.vis.quality.offsamples = 0  # antialiasing triples the time of a software renderer
        renderer = mujoco.Renderer(model, height, width)
    except Exception as error:  # what a missing library raises depends on the library
        print(error, file=sys.stderr)
        sys.exit(_NO_OPENGL)
    data = mujoco.MjData(model)
    rows = np.load(Path(folder) / "qpos.npy")
    frames = np.empty((len(rows), height, width, 3), np.uint8)
    for row, frame in zip(rows, frames, strict=True):
        data.qpos[:] = row
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        renderer.update_scene(data, camera=camera)
        renderer.render(out=frame)
    np.save(Path(folder) / "frames.npy", frames)
    renderer.close()


if __name__ == "__main__":
    _xml, _folder, _camera, _height, _width = sys.argv[1:]
    _render(_xml, _folder, _camera, int(_height), int(_width))
