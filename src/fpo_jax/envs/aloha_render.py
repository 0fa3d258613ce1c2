"""Pictures of the ALOHA task from joint positions, without a display.

Rendering runs in processes of its own: MuJoCo chooses its OpenGL library once, when it is imported, which here is long
before the first picture; OpenGL contexts belong to threads, and JAX calls back from any of its own; and a graphics
driver that crashes does not take the training run with it. The processes are started anew, never forked from JAX's.
"""

import contextlib
import functools
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from fpo_jax.envs import aloha, aloha_render_worker, wire
from fpo_jax.envs.common import num_cpus
from fpo_jax.types import Camera, FpoError, suggestion

CAMERAS = ("top", "angle", "front_close", "left_pillar", "right_pillar", "left_wrist", "right_wrist")
QUALITIES = ("official", "fast")
HEIGHT, WIDTH = 480, 640  # [pixels], what gym-aloha renders

_START_SECONDS, _PICTURE_SECONDS = 120.0, 60.0  # a process that takes longer is stuck
_ATTEMPTS = 2  # for one picture, the second in a new process
_MOST_WORKERS = 16  # each has an OpenGL context, which takes memory of the graphics card
_GIVE_UP = 8  # processes lost in a row, without one picture between them

logger = logging.getLogger(__name__)


def check_camera(camera: Camera) -> None:
    """Raises FpoError for a camera that the ALOHA scene does not have."""
    if camera.name not in CAMERAS:
        raise FpoError(f"There is no camera '{camera.name}'; there are: {', '.join(CAMERAS)}.")
    if camera.quality == "raycast":
        raise FpoError("The quality 'raycast' needs physics='warp'; choose official or fast.")
    if camera.quality not in QUALITIES:
        raise FpoError(f"Pictures have no quality {camera.quality!r}{suggestion(camera.quality, QUALITIES)}")
    if camera.size < 0:
        raise FpoError(f"A picture's edge must be at least 1 pixel, or 0 for {HEIGHT} x {WIDTH}, not {camera.size}.")


def picture_shape(camera: Camera, height: int = HEIGHT, width: int = WIDTH) -> tuple[int, int, int]:
    """(rows, columns, 3) of this camera's pictures."""
    return (camera.size, camera.size, 3) if camera.size else (height, width, 3)


class _Worker:
    """A render process and the socket to it. Every method but `close` raises OSError where it is gone or stuck."""

    def __init__(self, opengl: str):
        environment = {"LP_NUM_THREADS": "0", **os.environ, "MUJOCO_GL": opengl}  # Mesa in software: no more threads
        environment.pop("PYOPENGL_PLATFORM", None)  # mujoco derives it from MUJOCO_GL, and refuses contradictions
        self.connection, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", aloha_render_worker.__file__, str(aloha.xml_path())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,  # drivers are talkative
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()
        self.connection.settimeout(_START_SECONDS)

    def hello(self) -> dict[str, Any]:
        """Its first message (see `aloha_render_worker.main`)."""
        head, _ = wire.receive(self.connection)
        self.connection.settimeout(_PICTURE_SECONDS)
        return head

    def render(self, qpos: Float[np.ndarray, "23"], request: dict[str, Any]) -> tuple[np.ndarray, float]:
        """(picture, CPU seconds since the process began). Raises FpoError where the process lives but fails."""
        wire.send(self.connection, request, qpos.tobytes())
        head, pixels = wire.receive(self.connection)
        if head["failed"]:
            raise FpoError(f"A picture could not be rendered ({head['failed']}): check the joint positions.")
        return np.frombuffer(pixels, np.uint8).reshape(head["shape"]), head["cpu_seconds"]

    def close(self) -> None:
        self.connection.close()
        self.process.kill()  # it holds nothing that would have to be saved
        self.process.wait()


def _start(opengl: str) -> _Worker | None:
    """A process that can render, None where this OpenGL library cannot. Raises FpoError where all else fails."""
    worker = _Worker(opengl)
    try:
        hello = worker.hello()
    except OSError:  # a library that crashes
        hello = {"failed": "it ended", "opengl": True}
    if not hello["failed"]:
        return worker
    worker.close()
    if not hello["opengl"]:
        raise FpoError(f"The render process cannot start ({hello['failed']}): install all that fpo_jax depends on.")
    return None


def _first_worker() -> tuple[str, _Worker]:
    for opengl in dict.fromkeys([os.environ.get("MUJOCO_GL") or "egl", "egl", "osmesa"]):
        worker = _start(opengl)
        if worker is not None:
            return opengl, worker
    raise FpoError(
        "No OpenGL library for rendering: run `apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri` (or libosmesa6)."
    )


class RenderPool:
    """Processes that draw pictures side by side, one per core but 16 at most unless told otherwise, started on demand.

    EGL is tried first, then OSMesa; the environment variable MUJOCO_GL, where set, before both. What a picture looks
    like does not depend on which process draws it. A process that ends or is stuck is replaced.

    Raises FpoError where no OpenGL library works, naming the packages to install.
    """

    def __init__(self, num_workers: int | None = None):
        self.num_workers = num_workers or min(num_cpus(), _MOST_WORKERS)
        self.opengl, first = _first_worker()
        self._lock = threading.Lock()
        self._lost = 0  # processes, since the last picture
        self._cpu_seconds: dict[int, float] = {}  # of each process, ended ones too
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None is yet to be started: taken last
        for worker in [None] * (self.num_workers - 1) + [first]:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(self.num_workers, "render")
        self._closed = threading.Event()
        # Called by the user, when the pool is collected, or at exit.
        self.close = weakref.finalize(self, _close, self._closed, self._threads, self._idle)

    def submit(
        self, qpos: Float[np.ndarray, "23"], camera: Camera, height: int = HEIGHT, width: int = WIDTH
    ) -> Future[np.ndarray]:
        """Begin a picture of joint positions [rad, m] (layout: see `aloha`), uint8 [*picture_shape(camera)].

        Never raises; its `result()` raises FpoError where it cannot be drawn.
        """
        request = {"camera": camera.name, "height": height, "width": width, "size": camera.size}
        try:
            return self._threads.submit(self._render, np.array(qpos, np.float64), request | {"quality": camera.quality})
        except RuntimeError:
            refused: Future[np.ndarray] = Future()
            refused.set_exception(FpoError("No picture can be rendered any more: the renderer is closed."))
            return refused

    def render_rows(
        self,
        qpos: Float[np.ndarray, "M 23"],
        camera: Camera,
        height: int = HEIGHT,
        width: int = WIDTH,
        progress: Callable[[int, int], object] | None = None,
    ) -> UInt8[np.ndarray, "M y x 3"]:
        """Pictures of many joint positions [rad, m], in order; `progress(done, M)` is called after each.

        They are rendered with `height` x `width` pixels and then, unless camera.size is 0, resized with padding.

        Raises FpoError for an unknown camera and where a picture cannot be drawn.
        """
        check_camera(camera)
        images = np.empty((len(qpos), *picture_shape(camera, height, width)), np.uint8)
        pending = {self.submit(row, camera, height, width): i for i, row in enumerate(qpos)}
        try:
            for done, picture in enumerate(as_completed(pending), start=1):
                images[pending.pop(picture)] = picture.result()
                if progress is not None:
                    progress(done, len(images))
        finally:
            for picture in pending:
                picture.cancel()  # whatever ended this early must not wait for the rest
        return images

    def cpu_seconds(self) -> float:
        """What the processes have used so far, up to the last picture of each: no clock of this process counts it."""
        with self._lock:
            return sum(self._cpu_seconds.values(), 0.0)

    def _render(self, qpos: np.ndarray, request: dict[str, Any]) -> np.ndarray:
        """In a thread of the pool: there are as many as processes, so one is always idle."""
        worker = self._idle.get()
        try:
            for _ in range(_ATTEMPTS):
                if self._lost >= _GIVE_UP or self._closed.is_set():
                    break
                try:
                    worker = worker or _start(self.opengl)
                    if worker is not None:
                        image, cpu_seconds = worker.render(qpos, request)
                        with self._lock:
                            self._lost, self._cpu_seconds[worker.process.pid] = 0, cpu_seconds
                        return image
                except OSError:
                    if worker is not None:
                        worker.close()
                    worker = None
                self._count_loss()
        finally:
            self._idle.put(worker)
            if self._closed.is_set():
                _end(self._idle)
        raise FpoError("The processes that render pictures keep ending: check memory and graphics driver, then resume.")

    def _count_loss(self) -> None:
        with self._lock:
            self._lost += 1
            if self._lost == _GIVE_UP:
                logger.error("%d render processes were lost in a row: there will be no more pictures.", _GIVE_UP)


def _close(closed: threading.Event, threads: ThreadPoolExecutor, idle: "queue.LifoQueue[_Worker | None]") -> None:
    closed.set()  # whoever is drawing now ends the process afterwards
    threads.shutdown(wait=False, cancel_futures=True)
    _end(idle)


def _end(idle: "queue.LifoQueue[_Worker | None]") -> None:
    workers = []
    with contextlib.suppress(queue.Empty):
        while True:
            workers.append(idle.get_nowait())
    for worker in workers:
        if worker is not None:
            worker.close()
        idle.put(None)  # for a thread that is about to take one


@functools.cache
def shared_pool() -> RenderPool:
    """The pool that this process's environments and videos share. Raises FpoError where no OpenGL library works."""
    return RenderPool()


def render_rows(
    qpos: Float[np.ndarray, "M 23"], camera: Camera, progress: Callable[[int, int], object] | None = None
) -> UInt8[np.ndarray, "M y x 3"]:
    """`RenderPool.render_rows` of the shared pool: what the environment shows at these joint positions [rad, m]."""
    check_camera(camera)
    return shared_pool().render_rows(qpos, camera, progress=progress)


def render_episode(
    qpos: Float[np.ndarray, "T 23"], camera: str = "top", height: int = 240, width: int = 320
) -> UInt8[np.ndarray, "T y x 3"]:
    """RGB frames of an episode, one for each row of joint positions [rad, m] (layout: see `aloha`).

    Without a GPU a frame takes about 0.07 s of one core: pass qpos[::2] for half of them.

    Raises FpoError for an unknown camera, and where no OpenGL library works, naming the packages to install.
    """
    whole = Camera(camera, size=0)
    check_camera(whole)
    return shared_pool().render_rows(qpos, whole, height, width)


class Eye:
    """One camera of an environment, and the pool that draws its pictures: by default the shared one.

    Raises FpoError for a camera that is not there, and where no OpenGL library works.
    """

    def __init__(self, camera: Camera, pool: RenderPool | None = None):
        check_camera(camera)
        self.camera, self.shape = camera, picture_shape(camera)
        self._pool = pool or shared_pool()

    def look(self, qpos: Float[np.ndarray, "23"]) -> Future[np.ndarray]:
        """Begin a picture of joint positions [rad, m]; never raises."""
        return self._pool.submit(qpos, self.camera)

    def collect(
        self, pictures: Sequence[Future[np.ndarray]]
    ) -> tuple[UInt8[np.ndarray, "N y x 3"], Bool[np.ndarray, " N"]]:
        """(pictures, which of them could not be drawn and are black); waits for them; never raises."""
        images, broken = np.zeros((len(pictures), *self.shape), np.uint8), np.zeros(len(pictures), bool)
        for i, picture in enumerate(pictures):
            try:
                images[i] = picture.result()
            except Exception:
                broken[i] = True
        return images, broken
