"""ALOHA Transfer Cube on MuJoCo's C engine: every environment stepped by a pool of CPU threads.

Bit-exact to gym-aloha, which steps through dm_control: an Euler step split around the control
(`mj_step2; mj_step(9); mj_step1`), with MuJoCo's warm start carried along. JAX runs in 32 bit, so the float64 physics
state travels through it as pairs of uint32.
"""

import functools
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_render import Eye, RenderPool
from fpo_jax.envs.common import join, no_actions, num_cpus, pieces
from fpo_jax.flow import split_keys
from fpo_jax.types import Camera, EnvState

# Everything the next step depends on. (mjSTATE_INTEGRATION adds the control, which every step sets anew, and external
# forces, which are always zero here: four times the bytes for nothing.)
STATE_KIND = mujoco.mjtState.mjSTATE_FULLPHYSICS | mujoco.mjtState.mjSTATE_WARMSTART
_QPOS = slice(1, 24)  # in the state vector: time, qpos, qvel, warm start
_BROKEN = [
    int(w)
    for w in (
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
        mujoco.mjtWarning.mjWARN_BADCTRL,
    )
]
_thread = threading.local()


@functools.cache
def load_model() -> mujoco.MjModel:
    """gym-aloha's unmodified model, one per process."""
    return mujoco.MjModel.from_xml_path(str(aloha.xml_path()))


@functools.cache
def _contact_flags() -> list[list[int]]:
    """[geom, geom] -> 1 cube-right finger, 2 cube-left finger, 4 cube-table, 0 any other pair; symmetric."""
    model = load_model()
    flags = np.zeros((model.ngeom, model.ngeom), int)
    cube = model.geom(aloha.CUBE_GEOM).id
    for bit, name in enumerate([aloha.RIGHT_FINGER_GEOM, aloha.LEFT_FINGER_GEOM, aloha.TABLE_GEOM]):
        other = model.geom(name).id
        flags[cube, other] = flags[other, cube] = 1 << bit
    return flags.tolist()  # lists: indexing them is several times faster than indexing arrays


_BITS = (np.arange(8)[:, None] & np.array([1, 2, 4])) > 0
_STAGES = aloha.reward_stage(_BITS[:, 0], _BITS[:, 1], _BITS[:, 2]).tolist()


def _thread_data() -> mujoco.MjData:
    """This thread's own workspace: there are many more environments than threads."""
    if not hasattr(_thread, "data"):
        _thread.data = mujoco.MjData(load_model())
    return _thread.data


def _reset_data(data: mujoco.MjData, cube_position: np.ndarray) -> None:
    mujoco.mj_resetData(load_model(), data)
    data.qpos[:] = aloha.initial_qpos(cube_position)
    data.ctrl[:] = aloha.START_ARMS


def _control_step(model: mujoco.MjModel, data: mujoco.MjData, ctrl: np.ndarray) -> int:
    """One control step of 20 ms; expects `mj_step1` done and leaves it done. Returns the reward stage 0..4."""
    data.ctrl[:] = ctrl
    mujoco.mj_step2(model, data)
    mujoco.mj_step(model, data, aloha.SUBSTEPS - 1)
    mujoco.mj_step1(model, data)
    table, flags = _contact_flags(), 0
    for geom1, geom2 in data.contact.geom.tolist():
        flags |= table[geom1][geom2]
    return _STAGES[flags]


def _get_state(data: mujoco.MjData) -> np.ndarray:
    state = np.empty(state_size())
    mujoco.mj_getState(load_model(), data, state, STATE_KIND)
    return state


def state_size() -> int:
    """Number of float64 in one environment's physics state."""
    return mujoco.mj_stateSize(load_model(), STATE_KIND)


def simulate(cube_position: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run one open-loop episode without JAX, in the calling thread (safe to call from many threads).

    cube_position [3] in m, actions [T, 14] -> (qpos [T+1, 23], reward stage [T]); does not stop at success.
    """
    model, data = load_model(), _thread_data()
    _reset_data(data, np.asarray(cube_position, np.float64))
    mujoco.mj_step1(model, data)
    ctrl = aloha.control_from_action(np.asarray(actions, np.float64))
    qpos, reward = np.empty((len(ctrl) + 1, model.nq)), np.empty(len(ctrl), np.int32)
    qpos[0] = data.qpos
    for t, target in enumerate(ctrl):
        reward[t] = _control_step(model, data, target)
        qpos[t + 1] = data.qpos
    return qpos, reward


class _Row(NamedTuple):
    """One environment's outcome of a chunk, as the callback returns it (stacked to leading axis N)."""

    state: np.ndarray  # float64 [n]
    reward: int
    steps: int  # control steps executed
    fault: bool


def _reset_row(cube_position: np.ndarray) -> _Row:
    data = _thread_data()
    _reset_data(data, cube_position)
    return _Row(_get_state(data), 0, 0, False)


def _step_row(state: np.ndarray, actions: np.ndarray) -> _Row:
    """Run `actions` [k, 14] until they are used up or the task succeeds; a broken simulation returns `state`."""
    model, data = load_model(), _thread_data()
    data.warning.number[:] = 0
    mujoco.mj_setState(model, data, state, STATE_KIND)
    mujoco.mj_step1(model, data)
    reward = steps = 0
    for ctrl in aloha.control_from_action(actions.astype(np.float64)):
        reward = _control_step(model, data, ctrl)
        steps += 1
        if reward == aloha.SUCCESS_REWARD:
            break
    # MuJoCo answers non-finite physics with a silent reset to its default pose, and counts a warning.
    if data.warning.number[_BROKEN].any():
        return _Row(state, 0, steps, True)
    return _Row(_get_state(data), reward, steps, False)


class AlohaMujoco:
    """N ALOHA Transfer Cube environments as pure functions (the `Env` protocol of fpo_jax.types).

    `state.physics` is uint32 [N, 2 * state_size()]: the float64 physics state, bit for bit. With a camera, each state
    has one picture of where the decision ended (or the episode begins), equal to gym-aloha's pixel for pixel where its
    quality is official and its size 0. `renderer` draws it, by default the pool that all environments share; where it
    cannot, the environment has a fault.

    Raises FpoError for a camera that is not there, or where there is no OpenGL library.
    """

    def __init__(
        self,
        episode_length: int = 300,
        execute_steps: int = 50,
        num_threads: int | None = None,
        camera: Camera | None = None,
        renderer: RenderPool | None = None,
    ):
        self.spec = aloha.spec(episode_length, execute_steps)
        load_model()  # before the threads start: they share it
        self._pool = ThreadPoolExecutor(num_threads or num_cpus(), "aloha")
        self._eye = None if camera is None else Eye(camera, renderer)

    def reset(self, keys: Key[Array, " N"]) -> EnvState:
        """New episodes, each with the cube where its own key puts it."""
        keys, draws = split_keys(keys)
        return self.reset_to(jax.vmap(aloha.sample_cube_position)(draws), keys)

    def reset_to(self, cube_position: Float[Array, "N 3"], keys: Key[Array, " N"]) -> EnvState:
        """New episodes with the cube at `cube_position` [m]; `keys` decide the resets after them."""
        num_envs = len(cube_position)
        everyone = jnp.ones(num_envs, bool)
        zeros = jnp.zeros(num_envs, jnp.int32)
        physics = jnp.zeros((num_envs, 2 * state_size()), jnp.uint32)
        chunk = jnp.zeros((num_envs, 0, self.spec.action_dim))
        return self._advance(physics, chunk, everyone, jnp.asarray(cube_position, jnp.float32), zeros, keys)

    def step(self, state: EnvState, chunk: Float[Array, "N h 14"]) -> EnvState:
        """Execute the first actions of each chunk; environments that are done start a new episode instead."""
        next_keys, draws = split_keys(state.key)
        cube_position = jax.vmap(aloha.sample_cube_position)(draws)
        keys = jnp.where(state.done, next_keys, state.key)
        chunk = chunk[:, : self.spec.execute_steps]
        after = self._advance(state.physics, chunk, state.done, cube_position, state.control_steps, keys)
        return after._replace(truncated=after.truncated | (no_actions(chunk) & ~state.done))

    def qpos(self, state: EnvState) -> np.ndarray:
        """Joint positions [N, 23] in float64, on the host (for videos and analysis)."""
        return _as_float64(np.asarray(state.physics))[:, _QPOS]

    def _advance(self, physics, chunk, done, cube_position, control_steps, keys) -> EnvState:
        num_envs = len(done)
        shapes = {
            "physics": jax.ShapeDtypeStruct(physics.shape, jnp.uint32),
            "qpos": jax.ShapeDtypeStruct((num_envs, load_model().nq), jnp.float32),
            "reward": jax.ShapeDtypeStruct((num_envs,), jnp.float32),
            "fault": jax.ShapeDtypeStruct((num_envs,), bool),
            "control_steps": jax.ShapeDtypeStruct((num_envs,), jnp.int32),
        }
        if self._eye is not None:
            shapes["images"] = jax.ShapeDtypeStruct((num_envs, *self._eye.shape), jnp.uint8)
        operands = (physics, chunk.astype(jnp.float32), done, cube_position, control_steps)
        out = jax.pure_callback(self._simulate, shapes, *map(pieces, operands))
        observation = aloha.observe(out.pop("qpos"))
        if self._eye is not None:
            observation = observation._replace(images={self._eye.camera.name: out.pop("images")})
        terminated = out["reward"] == aloha.SUCCESS_REWARD
        return EnvState(
            **out,
            observation=observation,
            terminated=terminated,
            truncated=(out["control_steps"] >= self.spec.episode_length) & ~terminated & ~out["fault"],
            success=terminated,
            env_id=jnp.zeros(num_envs, jnp.int32),
            key=keys,
        )

    def _simulate(self, *operands):
        """The callback: NumPy only, never raises (an exception here could poison later callbacks)."""
        physics, chunk, done, cube_position, control_steps = map(join, operands)
        steps_left = self.spec.episode_length - control_steps  # the last chunk may be cut short
        operands = (_as_float64(physics), chunk, done, cube_position.astype(np.float64), steps_left)
        rows, pictures = zip(*self._pool.map(self._run_row, *operands), strict=True)
        state, reward, steps, fault = (np.array(column) for column in zip(*rows, strict=True))
        out = {}
        if self._eye is not None:
            out["images"], broken = self._eye.collect(pictures)
            reward, fault = np.where(broken, 0, reward), fault | broken
        return out | {
            "physics": state.view(np.uint32),
            "qpos": state[:, _QPOS].astype(np.float32),
            "reward": reward.astype(np.float32),
            "fault": fault,
            "control_steps": np.where(done, 0, control_steps + steps).astype(np.int32),
        }

    def _run_row(self, state, actions, done, cube_position, steps_left) -> tuple[_Row, Future[np.ndarray] | None]:
        """One environment's outcome, and a picture of it, which is drawn while others are still simulated."""
        try:
            if done:
                row = _reset_row(cube_position)
            elif not np.isfinite(actions).all():
                row = _Row(state, 0, 0, False)
            else:
                row = _step_row(state, actions[: max(steps_left, 0)])
        except Exception:  # whatever went wrong is this environment's fault alone
            row = _Row(state, 0, 0, True)
        return row, None if self._eye is None else self._eye.look(row.state[_QPOS])


def _as_float64(physics: UInt32[np.ndarray, "N m"]) -> np.ndarray:
    return np.ascontiguousarray(physics).view(np.float64)
