"""The process that simulates LIBERO, for the process that holds the other end of its socket.

It is started by its path, in LIBERO's virtual environment, with the socket as standard input, and ends when the other
end closes, however that came about. Messages are `wire.py`'s: JSON; actions, states and pictures lie in a file that
both sides map. It imports neither JAX nor fpo_jax.

Requests, each with the fields that its function below takes: hello, reset, step, tasks, close. Every reply has
"failed": "" or "kind: reason", with kind one of task, physics, render, protocol.
"""

import contextlib
import importlib.util
import json
import mmap
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def _sibling(name: str) -> Any:
    """The file beside this one, loaded by its path: fpo_jax is not installed here."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def use_opengl(library: str) -> None:
    """Choose the OpenGL library, "disable" for none: robosuite would insist on EGL, and on a log file of its own."""
    os.environ["MUJOCO_GL"] = library
    os.environ.pop("PYOPENGL_PLATFORM", None)  # derived from MUJOCO_GL; contradictions are refused
    device = os.environ.pop("CUDA_VISIBLE_DEVICES", "").split(",")[0]  # robosuite fails at many of its values
    if device.isdigit():
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", device)
    spec = importlib.util.find_spec("robosuite")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("robosuite is not installed")
    path = Path(spec.submodule_search_locations[0]) / "macros.py"
    macros_spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    assert macros_spec is not None and macros_spec.loader is not None
    macros: Any = importlib.util.module_from_spec(macros_spec)
    macros_spec.loader.exec_module(macros)
    macros.MUJOCO_GPU_RENDERING = False
    macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL = None, "ERROR"
    sys.modules["robosuite.macros"] = macros  # before anything of robosuite is imported


def check_opengl() -> None:
    """Draw something very small. What a missing or broken library raises depends on the library."""
    import mujoco
    from robosuite.utils.binding_utils import GLContext  # pyright: ignore[reportMissingImports]

    context = GLContext(max_width=8, max_height=8)
    context.make_current()
    model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
    mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100).free()
    context.free()


class Worker:
    """Answers requests; `tried` are the OpenGL libraries that do not work here, the last one for this reason."""

    def __init__(self, tried: Sequence[str] = (), reason: str = ""):
        self.tried, self.reason = tried, reason
        self.files = _sibling("libero_files")
        self.simulator: Any = None
        self.task: tuple[str, int] | None = None  # the one that is built
        spec = importlib.util.find_spec("libero")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("hf-libero is not installed")
        self.root = Path(spec.submodule_search_locations[0]) / "libero"
        self.names: dict[str, list[str]] = self.files.task_names(self.root)

    def hello(
        self,
        assets: str,
        memory: str,
        slots: dict[str, list[Any]],
        cameras: list[str],
        render_size: int = 256,
        quality: str = "official",
        **_: Any,  # what the slots already say
    ) -> dict[str, Any]:
        """Get ready: `slots` are the fields of `wire.layout`, which lie in the file `memory`."""
        request = {"assets": assets, "memory": memory, "slots": slots, "cameras": cameras}
        request |= {"render_size": render_size, "quality": quality}
        wire, simulator = _sibling("wire"), _sibling("libero_simulator")
        plan = wire.Layout({name: wire.Field(*slot) for name, slot in slots.items()}, 0)
        with open(memory, "r+b") as file:
            arrays = wire.views(mmap.mmap(file.fileno(), 0), plan)
        if unknown := sorted(set(cameras) - set(simulator.CAMERAS)):
            raise simulator.Failure("protocol", f"there is no camera {unknown[0]!r}")
        opengl = next(iter(self._libraries()), None) if cameras else "disable"
        if opengl is None:
            advice = "install the system's packages libegl1 libegl-mesa0 libgl1-mesa-dri, or libosmesa6"
            raise simulator.Failure("render", f"no OpenGL library works ({self.reason}): {advice}")
        use_opengl(opengl)
        try:
            self._import(assets)
            if cameras:
                check_opengl()
        except Exception as error:
            if not cameras:
                raise
            # What was imported has chosen its library for good, so this process begins again.
            tried = {"tried": [*self.tried, opengl], "reason": f"{type(error).__name__}: {error}"[:300]}
            os.execv(sys.executable, [sys.executable, "-P", __file__, json.dumps({"request": request} | tried)])
        self.simulator = simulator.Simulator(arrays, cameras, render_size, quality == "fast")
        packages = ("mujoco", "robosuite", "hf-libero")
        versions = {package: metadata.version(package) for package in packages}
        stand_ins = self.files.stand_ins(Path(assets))
        said = {"opengl": opengl, "pid": os.getpid(), "versions": versions, "stand_ins": stand_ins}
        said |= {"opengl_failed": self.reason}  # why it is not another one
        return said | {"wait_steps": simulator.WAIT_STEPS}

    def _libraries(self) -> list[str]:
        """Those still to be tried: what the environment says, what worked at the set-up, the fast one, the safe one."""
        known = [os.environ.get("MUJOCO_GL")]
        with contextlib.suppress(OSError, ValueError):
            known.append(json.loads((Path(sys.prefix) / self.files.RECORD).read_text()).get("opengl"))
        every = dict.fromkeys([*known, "egl", "osmesa"])
        return [library for library in every if library in ("egl", "osmesa", "glfw") and library not in self.tried]

    def _import(self, assets: str) -> None:
        config = Path(sys.prefix) / self.files.CONFIG
        self.files.write_config(config, self.root, assets)
        os.environ["LIBERO_CONFIG_PATH"] = str(config)
        import libero.libero  # pyright: ignore[reportMissingImports]

        libero.libero._assets_path_cache = assets  # it ignores the assets of its config.yaml
        import libero.libero.envs  # pyright: ignore[reportMissingImports]

    def tasks(self) -> dict[str, Any]:
        """All tasks; no simulator is built."""
        suites = self.files.tasks(self.root)
        return {"suites": {suite: [task._asdict() for task in tasks] for suite, tasks in suites.items()}}

    def reset(self, suite: str, task: int, init: int | None, seed: int, order: str = "episode") -> dict[str, Any]:
        """Begin an episode: see `Simulator.reset`."""
        simulator: Any = self._simulator()
        if suite not in self.names or not 0 <= task < len(self.names[suite]):
            raise _sibling("libero_simulator").Failure("protocol", f"there is no task {task} in suite {suite!r}")
        before = time.process_time()
        if self.task != (suite, task) or simulator.env is None:
            name, self.task = self.names[suite][task], None
            inits = self.files.inits(self.root, suite, name)
            simulator.build(self.files.bddl_file(self.root, suite, name), inits)
            self.task = (suite, task)
        success = simulator.reset(init, seed, order)
        return {"success": success, "objects": simulator.names, "seconds": time.process_time() - before}

    def step(self, length: int) -> dict[str, Any]:
        """Run the first actions in the shared memory: see `Simulator.step`."""
        before = time.process_time()
        steps, success = self._simulator().step(length)
        return {"steps": steps, "success": success, "seconds": time.process_time() - before}

    def _simulator(self) -> Any:
        if self.simulator is None:
            raise _sibling("libero_simulator").Failure("protocol", "say hello first")
        return self.simulator

    def answer(self, op: str, **request: Any) -> dict[str, Any]:
        """The reply to a request; never raises."""
        failure = _sibling("libero_simulator").Failure
        handlers = {"hello": self.hello, "reset": self.reset, "step": self.step, "tasks": self.tasks}
        try:
            if op not in handlers:
                raise failure("protocol", f"there is no request {op!r}")
            return {"failed": "", **handlers[op](**request)}
        except failure as error:
            return {"failed": str(error)}
        except TypeError as error:
            return {"failed": str(failure("protocol", error))}
        except Exception as error:
            return {"failed": str(failure("task", error))}


def main(again: str = "") -> None:
    """Answer requests in order, until the other end closes (OSError) or says so; `again`: after another OpenGL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other end to handle
    os.chdir(tempfile.gettempdir())  # MuJoCo writes its warnings where it stands
    os.environ["LP_NUM_THREADS"] = os.environ.get("LP_NUM_THREADS", "0")  # a process is one core's work:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):  # read when they are imported
        os.environ[name] = "1"
    wire, connection = _sibling("wire"), socket.socket(fileno=0)
    begun: dict[str, Any] = json.loads(again) if again else {}
    request = begun.pop("request", None)
    worker = Worker(**begun)
    if request is not None:
        wire.send(connection, worker.answer("hello", **request))
    while True:
        request, _ = wire.receive(connection)
        if request.get("op") == "close":
            wire.send(connection, {"failed": ""})
            return
        wire.send(connection, worker.answer(**request))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError:
        pass  # the other end has closed: nobody is left who would want anything
    finally:
        os._exit(0)  # graphics drivers like to crash while they are unloaded
