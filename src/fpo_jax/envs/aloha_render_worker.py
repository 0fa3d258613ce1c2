"""The render process: draws ALOHA scenes for the process that holds the other end of its socket.

`aloha_render` starts this file by its path, with the socket as standard input; it ends when that end closes, however
that came about. It never imports JAX, which would take longer than everything else it does to get ready.
"""

import importlib.util
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def _load_wire() -> Any:
    """The messages' module beside this file, by its path: importing it from `fpo_jax.envs` would import JAX."""
    spec = importlib.util.spec_from_file_location("wire", Path(__file__).with_name("wire.py"))
    assert spec is not None and spec.loader is not None
    sys.modules["wire"] = wire = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wire)
    return wire


class _Painter:
    """Renderers for the sizes and qualities that were asked for; each has an OpenGL context of its own."""

    def __init__(self, mujoco: Any, xml: str):
        self.mujoco = mujoco
        self.model = mujoco.MjModel.from_xml_path(xml)
        self.data = mujoco.MjData(self.model)
        self.offsamples = self.model.vis.quality.offsamples
        self.renderers: dict[tuple[int, int, str], Any] = {}

    def renderer(self, height: int, width: int, quality: str) -> Any:
        if (height, width, quality) not in self.renderers:
            fast = quality == "fast"
            self.model.vis.quality.offsamples = 0 if fast else self.offsamples  # read when the context is made
            renderer = self.mujoco.Renderer(self.model, height, width)
            if fast:
                renderer.scene.flags[self.mujoco.mjtRndFlag.mjRND_SHADOW] = False
            self.renderers[height, width, quality] = renderer
        return self.renderers[height, width, quality]

    def paint(self, qpos: np.ndarray, camera: str, height: int, width: int, size: int, quality: str) -> np.ndarray:
        """RGB [height, width, 3], or [size, size, 3] unless `size` is 0."""
        from fpo_jax.images import resize_with_pad

        if not np.isfinite(qpos).all():
            raise ValueError("joint positions that are not finite")
        renderer = self.renderer(height, width, quality)
        self.data.qpos[:] = qpos
        self.mujoco.mj_kinematics(self.model, self.data)  # all that a picture depends on: geometries,
        self.mujoco.mj_camlight(self.model, self.data)  # cameras and lights
        renderer.update_scene(self.data, camera=camera)
        image = renderer.render()
        return resize_with_pad(image, size, size) if size else image


def main(xml: str) -> None:
    """Say hello, then answer requests in order, until the other end closes (OSError).

    Hello is {"failed": None, or why it cannot render; "opengl": True where OpenGL is to blame}.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other end to handle
    wire, connection = _load_wire(), socket.socket(fileno=0)
    opengl = False
    try:
        from fpo_jax.images import resize_with_pad

        resize_with_pad(np.zeros((2, 2, 3), np.uint8), 1, 1)  # its own dependencies are imported when it is used
        opengl = True
        import mujoco  # loads the OpenGL library

        opengl = False
        painter = _Painter(mujoco, xml)
        opengl = True
        painter.renderer(48, 64, "fast")
    except Exception as error:  # what a missing library raises depends on the library
        wire.send(connection, {"failed": f"{type(error).__name__}: {error}", "opengl": opengl})
        return
    wire.send(connection, {"failed": None})
    while True:
        request, qpos = wire.receive(connection)
        answer: dict[str, Any] = {"failed": None}
        pixels = b""
        try:
            image = painter.paint(np.frombuffer(qpos), **request)
            answer["shape"], pixels = image.shape, image.tobytes()
        except Exception as error:
            answer["failed"] = f"{type(error).__name__}: {error}"
        wire.send(connection, answer | {"cpu_seconds": time.process_time()}, pixels)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))  # where fpo_jax lies, if it is not installed
    try:
        main(sys.argv[1])
    except OSError:
        pass  # the other end has closed: nobody is left who would want anything
    finally:
        os._exit(0)  # graphics drivers like to crash while they are unloaded
