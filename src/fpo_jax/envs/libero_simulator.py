"""One LIBERO task in robosuite: reset, step, look. Loaded by path, in LIBERO's virtual environment, by `libero_worker`.

It does what openpi's LIBERO client sees, bit for bit, at a fraction of the cost: one picture per decision instead of
one per control step, and a reset that keeps the compiled model.
"""

import contextlib
import ctypes
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}  # openpi's name -> LIBERO's
WAIT_STEPS = 10  # in which things come to rest; they do not count
WAIT_ACTION = np.array([0, 0, 0, 0, 0, 0, -1.0])
_PLACEMENTS = 10  # attempts at placing all objects: each gives up after 5000 samples per object


class Failure(Exception):
    """`str(failure)` is "kind: reason" in one line, with kind one of task, physics, render, protocol."""

    def __init__(self, kind: str, reason: BaseException | str):
        text = f"{type(reason).__name__}: {reason}" if isinstance(reason, BaseException) else reason
        super().__init__(f"{kind}: {' '.join(text.split())[:500]}")


class Simulator:
    """The simulation of one task at a time, which writes what it sees into `arrays` (see `wire.layout`).

    `render_size` is the edge of the square pictures [pixels] before they are resized to that of arrays["images"].
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], cameras: Sequence[str] = (), render_size: int = 256, fast: bool = False
    ):
        self.arrays, self.cameras = arrays, tuple(cameras)
        self.render_size, self.fast = render_size, fast
        self.env: Any = None
        self.inits: np.ndarray | None = None
        self.ready = False  # to be stepped
        self.looking = False  # this control step ends a decision: draw

    def build(self, bddl: Path, inits: np.ndarray) -> None:
        """Make the simulation of a task, with its initial states [states, 1 + nq + nv]. Raises Failure."""
        self.close()
        try:
            self.env = _make(bddl, self._look, bool(self.cameras), self.render_size, self.fast)
        except Failure:
            raise
        except Exception as error:
            raise Failure("task", error) from error
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # a tenth of the memory was for compiling the model
        self.inits = inits
        self.properties = list(self.env.object_property_initializers)  # drawers and knobs, how they are to begin
        self._openpi: tuple[int, list[Any]] = (0, [])  # seed, the generator before each reset
        self.names = list(self.env.objects_dict)
        self.objects = [self.env.obj_body_id[name] for name in self.names]

    def close(self) -> None:
        """Free the simulation: at the interpreter's exit its destructors would complain."""
        env, self.env, self.ready = self.env, None, False
        if env is not None:
            env.close()

    def reset(self, init: int | None, seed: int, order: str) -> bool:
        """Begin an episode from official initial state `init`, or from one sampled; True where it is done already.

        Where furniture stands is not part of LIBERO's initial states but drawn at every reset. With order="episode"
        it depends on the seed alone; with "openpi" it is what openpi's client gets, which seeds once per task and then
        runs one episode for each initial state.

        Raises Failure.
        """
        self.ready = self.looking = False
        assert self.env is not None and self.inits is not None
        if init is not None and not 0 <= init < len(self.inits):
            raise Failure("protocol", f"there are initial states 0 to {len(self.inits) - 1}, but not {init}")
        if order not in ("episode", "openpi") or (order == "openpi" and init is None):
            raise Failure("protocol", f"the order is episode or, of official initial states, openpi, and not {order!r}")
        try:
            if order == "openpi" and init is not None:
                self._draw_as_openpi(init, seed)
            else:
                np.random.seed(seed)  # noqa: NPY002  LIBERO draws from the global generator
                self._restart(1)
            if init is not None:
                self._set_state(self.inits[init])
            else:
                self.env._update_observables(force=True)  # sensors keep time as after an official state
            for self.looking in [False] * (WAIT_STEPS - 1) + [True]:
                success = self._step(WAIT_ACTION)
        except Failure:
            raise
        except Exception as error:
            self.close()  # the next reset builds it anew
            raise Failure("task", error) from error
        self.ready = True
        return success

    def step(self, length: int) -> tuple[int, bool]:
        """Run actions[:length], as far as success. Returns (steps that were run, success). Raises Failure."""
        actions = np.array(self.arrays["actions"][:length], np.float64)
        if not self.ready:
            raise Failure("protocol", "an episode must begin with a reset")
        if not 1 <= length == len(actions):
            raise Failure("protocol", f"a decision has 1 to {len(self.arrays['actions'])} control steps, not {length}")
        self.ready = False
        if not np.isfinite(actions).all():
            raise Failure("physics", "an action is not finite")
        done, success = 0, False
        for done, action in enumerate(actions, start=1):
            self.looking = done == length
            success = self._step(action)
            if success:
                if not self.looking:
                    self._paint()
                break
        self.ready = True
        return done, success

    def _step(self, action: np.ndarray) -> bool:
        """One control step; True where LIBERO says that the task is done."""
        try:
            *_, success, _ = self.env.step(action)
        except Failure:
            raise
        except Exception as error:  # a mass matrix that has no inverse, an arm that is out of bounds
            raise Failure("physics", error) from error
        data = self.env.sim.data._data
        # MuJoCo starts anew from its default state where numbers are not finite, and says so here only.
        if any(data.warning[kind].number for kind in self.env.faults) or not np.isfinite(data.qpos).all():
            raise Failure("physics", "positions or velocities are not finite")
        return bool(success)

    def _restart(self, openings: int) -> None:
        """robosuite's soft reset, made equal to its hard one, which compiles the model anew."""
        from robosuite.utils.errors import RandomizationError  # pyright: ignore[reportMissingImports]

        env = self.env
        env.object_property_initializers = self.properties * openings
        for attempt in range(_PLACEMENTS):
            for name, values in env.pristine.items():  # the last episode's furniture decides what is near what
                getattr(env.sim.model, name)[:] = values
            try:
                env.reset()
            except RandomizationError as error:
                if attempt == _PLACEMENTS - 1:
                    raise Failure("task", error) from error
            else:
                break
        gripper = env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)  # integrates the commands

    def _draw_as_openpi(self, episode: int, seed: int) -> None:
        """The reset of openpi's client before this episode of its task: the resets before it are drawn as well.

        Its hard resets append the initial openings of drawers once more to the list of them, so that every reset takes
        more numbers from the generator than the one before.
        """
        if self._openpi[0] != seed or not self._openpi[1]:
            np.random.seed(seed)  # noqa: NPY002
            self._openpi = (seed, [np.random.get_state()])  # noqa: NPY002
        states = self._openpi[1]
        for reset in range(min(episode, len(states) - 1), episode + 1):
            np.random.set_state(states[reset])  # noqa: NPY002
            self._restart(reset + 2)  # one for the construction, one for the reset itself
            if reset + 1 == len(states):
                states.append(np.random.get_state())  # noqa: NPY002

    def _set_state(self, state: np.ndarray) -> None:
        env, model = self.env, self.env.sim.model
        if len(state) != 1 + model.nq + model.nv:
            raise Failure("task", "the initial states do not fit the model: are these LIBERO's own assets?")
        env.sim.set_state_from_flattened(state)
        env.sim.forward()
        env._check_success()
        env._post_process()
        env._update_observables(force=True)

    def _look(self) -> None:
        """Called by robosuite whenever LIBERO would observe.

        That is not at the end of a control step but 2 ms before it, as robosuite 1.4.0 counts the time of its sensors.
        """
        if self.env is None:  # it is being built
            return
        env, data = self.env, self.env.sim.data
        robot = env.robots[0]
        quaternion = data.get_body_xquat(robot.robot_model.eef_name)[[1, 2, 3, 0]]
        gripper = data.qpos[robot._ref_gripper_joint_pos_indexes]
        position = data.site_xpos[robot.eef_site_id]
        self.arrays["proprio"][:] = np.concatenate([position, axis_angle(quaternion), gripper])
        poses = self.arrays["objects"]
        objects = self.objects[: len(poses)]
        poses[: len(objects), :3] = data.body_xpos[objects]
        poses[: len(objects), 3:] = data.body_xquat[objects]
        poses[len(objects) :] = 0
        if self.looking:
            self._paint()

    def _paint(self) -> None:
        images, size = self.arrays["images"], self.render_size
        for image, camera in zip(images, self.cameras, strict=True):
            try:
                picture = self.env.sim.render(camera_name=CAMERAS[camera], width=size, height=size)
                image[:] = resize_with_pad(picture[::-1, ::-1], image.shape[0])  # upright, and mirrored as openpi's
            except Exception as error:
                raise Failure("render", error) from error


def _make(bddl: Path, look: Callable[[], None], render: bool, size: int, fast: bool) -> Any:
    """LIBERO's own environment of a task as its OffScreenRenderEnv makes it, with `look` for all of its sensors."""
    import mujoco
    import robosuite  # pyright: ignore[reportMissingImports]
    from libero.libero.envs import TASK_MAPPING, bddl_utils  # pyright: ignore[reportMissingImports]
    from robosuite.utils.observables import Observable, sensor  # pyright: ignore[reportMissingImports]

    problem = TASK_MAPPING[bddl_utils.get_problem_info(str(bddl))["problem_name"]]

    @sensor(modality="state")
    def view(_: Any) -> np.ndarray:
        look()
        return np.zeros(1)

    def initialize_sim(self: Any, xml_string: str | None = None) -> None:
        if not render:
            self.set_xml_processor(without_looks)
        super(task, self)._initialize_sim(xml_string)
        model = self.sim.model
        # All that a reset or an episode changes in a model: where furniture stands, which sites are visible.
        self.pristine = {name: getattr(model, name).copy() for name in ("body_pos", "body_quat", "site_rgba")}
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        if fast:
            model.vis.quality.offsamples = 0

    def step(self: Any, action: np.ndarray) -> Any:
        """robosuite's control step, without computing all that follows from a state three times per substep.

        Its controller asks for it again, and so does MuJoCo's own step: here the first half of that step is the answer.
        """
        sim, fresh = self.sim, False
        model, data = sim.model._model, sim.data._data

        def forward() -> None:
            nonlocal fresh
            if not fresh:
                mujoco.mj_step1(model, data)
            fresh = True

        def advance() -> None:
            nonlocal fresh
            mujoco.mj_step2(model, data)
            fresh = False

        sim.forward, sim.step = forward, advance
        try:
            return super(task, self).step(action)
        finally:
            del sim.forward, sim.step

    parts = {
        "_initialize_sim": initialize_sim,
        "step": step,
        "_setup_observables": lambda self: {"view": Observable("view", view, sampling_rate=self.control_freq)},
        "reward": lambda self, action=None: 0.0,  # it would check success, which `step` does again
        "faults": (
            mujoco.mjtWarning.mjWARN_BADQPOS,
            mujoco.mjtWarning.mjWARN_BADQVEL,
            mujoco.mjtWarning.mjWARN_BADQACC,
        ),
    }
    task = type(problem.__name__, (problem,), parts)  # LIBERO compares the name with the BDDL file's
    env = task(
        str(bddl),
        robots=["Panda"],
        controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
        gripper_types="default",
        initialization_noise=None,
        use_camera_obs=False,
        has_offscreen_renderer=render,
        control_freq=20,
        ignore_done=True,
        hard_reset=False,
    )
    if render and fast:
        flags = env.sim._render_context_offscreen.scn.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return env


def without_looks(xml: str) -> str:
    """A model without textures and without the meshes that nothing collides with, for simulations that draw nothing.

    LIBERO's visual geometries (group 1, no contacts, no inertia) become tiny spheres of the same name: trajectories are
    the same bit for bit, with a fourth of the memory.
    """
    root = ElementTree.fromstring(xml)
    for geom in root.iter("geom"):
        visual = (geom.get("group"), geom.get("contype"), geom.get("conaffinity")) == ("1", "0", "0")
        if visual and "mesh" in geom.attrib:
            del geom.attrib["mesh"]
            geom.attrib.update(type="sphere", size="0.001")
    used = {geom.get("mesh") for geom in root.iter("geom")}
    for assets in root.iter("asset"):
        for asset in list(assets):
            asset.attrib.pop("texture", None)
            if asset.tag == "texture" or (asset.tag == "mesh" and asset.get("name") not in used):
                assets.remove(asset)
    return ElementTree.tostring(root, encoding="unicode")


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation vector [rad] of a unit quaternion xyzw, as openpi's LIBERO client computes it."""
    w = min(max(float(quaternion[3]), -1.0), 1.0)
    length = math.sqrt(1.0 - w * w)
    return np.zeros(3) if length == 0 else quaternion[:3] * 2.0 * math.acos(w) / length


def resize_with_pad(image: np.ndarray, size: int) -> np.ndarray:
    """`fpo_jax.images.resize_with_pad` of one image uint8 [y, x, 3] to a square, for processes without fpo_jax."""
    from PIL import Image

    height, width, _ = image.shape
    if (height, width) == (size, size):
        return image
    ratio = max(width, height) / size
    rows, columns = max(1, int(height / ratio)), max(1, int(width / ratio))
    top, left = (size - rows) // 2, (size - columns) // 2
    padded = np.zeros((size, size, 3), np.uint8)
    inner = Image.fromarray(np.ascontiguousarray(image)).resize((columns, rows), Image.Resampling.BILINEAR)
    padded[top : top + rows, left : left + columns] = np.asarray(inner)
    return padded
