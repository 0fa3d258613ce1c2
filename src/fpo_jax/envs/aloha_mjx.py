"""ALOHA Transfer Cube on MJX: thousands of environments on one accelerator, in 32 bit.

Two implementations behind one class. impl="jax" (every XLA device) runs a trimmed model, because XLA compiles a fixed
list of contacts and the original has 796 of them. impl="warp" (NVIDIA GPUs, extra `fpo_jax[warp]`) runs gym-aloha's
model unmodified. Neither is bit-exact to the C engine: compare success rates, see experiments/physics_agreement.py.
"""

import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Bool, Float, Key
from mujoco import mjx

from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_raycast import RayCaster
from fpo_jax.envs.aloha_render import Eye, RenderPool
from fpo_jax.envs.common import join, no_actions, pieces, where_env
from fpo_jax.flow import split_keys
from fpo_jax.types import Camera, EnvState, FpoError

# Convex hull of a left finger in the frame of its body [m], without the part behind the pad, which the cube never
# meets; right fingers are its mirror image in y. The inner face slopes from the pad to the tip.
_LEFT_FINGER_HULL = np.array(
    [[0.015, y, z] for y in (0.002, -0.0224) for z in (-0.0305, 0.0305)]
    + [[0.085, y, z] for y in (-0.0209, -0.0224) for z in (-0.005, 0.005)]
)
# Of 64 scripted episodes that all succeed in the C engine, 63 succeed with 20 and 10, and 41 with 10 and 8: the stock
# contacts are nearly rigid (solimp "2 1 0.01"), and a solver that stops early lets the cube slip.
ITERATIONS, LINE_SEARCH_ITERATIONS = 20, 10
# MJX-Warp's buffers. The most seen in the C engine was 16 contacts and 118 constraints (16 episodes).
_CONTACTS_PER_WORLD, _CONSTRAINTS_PER_WORLD = 64, 512


class MjxPhysics(NamedTuple):
    """What the next step depends on; leading axis N."""

    qpos: Float[Array, "N 23"]
    qvel: Float[Array, "N 22"]
    warmstart: Float[Array, "N 22"]  # the last accelerations, where the solver starts


def trimmed_spec() -> mujoco.MjSpec:
    """gym-aloha's scene with three kinds of contacts only: cube-table, cube-fingers, fingers-table.

    The table becomes a plane at the height of its top, a finger a hull of 8 vertices; all other geoms are dropped
    (every moving body has explicit inertia).
    """
    spec = mujoco.MjSpec.from_file(str(aloha.xml_path()))
    for geom in list(spec.geoms):
        # Two geoms collide where one's contype meets the other's conaffinity: fingers never meet fingers.
        if geom.name == aloha.TABLE_GEOM:
            geom.type, geom.meshname, geom.size = mujoco.mjtGeom.mjGEOM_PLANE, "", [1, 1, 0.1]
            geom.contype, geom.conaffinity = 1, 0
        elif geom.name == aloha.CUBE_GEOM:
            geom.contype, geom.conaffinity = 2, 1
        elif geom.name.endswith("gripper_finger"):
            mesh = spec.add_mesh(name=geom.name.replace("/", "_") + "_hull")
            mirror = -1.0 if "10_right" in geom.name else 1.0
            mesh.uservert = (_LEFT_FINGER_HULL * [1.0, mirror, 1.0]).ravel()
            geom.meshname, geom.pos, geom.quat = mesh.name, [0, 0, 0], [1, 0, 0, 0]
            geom.alt.type = mujoco.mjtOrientation.mjORIENTATION_QUAT  # the XML's euler angles would override it
            geom.contype, geom.conaffinity = 0, 3
        else:
            spec.delete(geom)
    used = {geom.meshname for geom in spec.geoms}
    for mesh in list(spec.meshes):
        if mesh.name not in used:
            spec.delete(mesh)
    return spec


def add_contact_sensors(spec: mujoco.MjSpec) -> None:
    """Sensors that count the cube's contacts with the right finger, the left finger and the table, in this order."""
    for other in (aloha.RIGHT_FINGER_GEOM, aloha.LEFT_FINGER_GEOM, aloha.TABLE_GEOM):
        spec.add_sensor(
            name=f"cube_{other}",
            type=mujoco.mjtSensor.mjSENS_CONTACT,
            objtype=mujoco.mjtObj.mjOBJ_GEOM,
            objname=aloha.CUBE_GEOM,
            reftype=mujoco.mjtObj.mjOBJ_GEOM,
            refname=other,
            intprm=[1 << int(mujoco.mjtConDataField.mjCONDATA_FOUND), 0, 1],  # found, no reduction, one slot
        )


class AlohaMjx:
    """N ALOHA Transfer Cube environments as pure functions (the `Env` protocol of fpo_jax.types).

    With a camera, each state has one picture of where the decision ended (or the episode begins), drawn by OpenGL on
    the host, as for the C engine, whatever the device; where that fails, the environment has a fault. With impl="warp"
    there is a third quality, `raycast`: MJX-Warp's batch renderer, whose pictures look different (see `aloha_raycast`).

    Raises FpoError for implementations and cameras that are not there, or where there is no OpenGL library.
    """

    def __init__(
        self,
        impl: str = "jax",
        episode_length: int = 300,
        execute_steps: int = 50,
        camera: Camera | None = None,
        renderer: RenderPool | None = None,
    ):
        self.spec = aloha.spec(episode_length, execute_steps)
        self.impl = impl
        if impl == "jax":
            model_spec = trimmed_spec()
            model_spec.option.iterations, model_spec.option.ls_iterations = ITERATIONS, LINE_SEARCH_ITERATIONS
        elif impl == "warp":
            if importlib.util.find_spec("warp") is None or jax.default_backend() != "gpu":
                raise FpoError("physics='warp' needs an NVIDIA GPU and `pip install fpo_jax[warp]`; use 'mjx' instead.")
            model_spec = mujoco.MjSpec.from_file(str(aloha.xml_path()))
        else:
            raise FpoError(f"AlohaMjx has the implementations 'jax' and 'warp', not {impl!r}.")
        if camera is None:
            self._eye = None
        elif camera.quality == "raycast" and impl == "warp":
            self._eye = RayCaster(camera)
        else:
            self._eye = Eye(camera, renderer)
        add_contact_sensors(model_spec)
        self._host_model = model_spec.compile()
        self._model = mjx.put_model(self._host_model, impl=impl)

    def reset(self, keys: Key[Array, " N"]) -> EnvState:
        """New episodes, each with the cube where its own key puts it."""
        return self._with_images(self._start_anywhere(keys))

    def reset_to(self, cube_position: Float[Array, "N 3"], keys: Key[Array, " N"]) -> EnvState:
        """New episodes with the cube at `cube_position` [m]; `keys` decide the resets after them."""
        return self._with_images(self._start(cube_position, keys))

    def _start_anywhere(self, keys: Key[Array, " N"]) -> EnvState:
        keys, draws = split_keys(keys)
        return self._start(jax.vmap(aloha.sample_cube_position)(draws), keys)

    def _start(self, cube_position: Float[Array, "N 3"], keys: Key[Array, " N"]) -> EnvState:
        qpos = jnp.asarray(aloha.initial_qpos(jnp.asarray(cube_position, jnp.float32)))
        still = jnp.zeros((len(qpos), self._host_model.nv))
        zeros = jnp.zeros(len(qpos), jnp.int32)
        return self._state(MjxPhysics(qpos, still, still), zeros, zeros > 0, zeros, keys)

    def step(self, state: EnvState, chunk: Float[Array, "N h 14"]) -> EnvState:
        """Execute the first actions of each chunk; environments that are done start a new episode instead."""
        actions = chunk[:, : self.spec.execute_steps].astype(jnp.float32)
        refused = no_actions(actions)
        ctrl = aloha.control_from_action(jnp.where(refused[:, None, None], 0.0, actions))

        def control_step(carry, ctrl):
            physics, reward, steps = carry
            active = (reward < aloha.SUCCESS_REWARD) & (steps < self.spec.episode_length)
            moved, stage = self._control_step(physics, ctrl)
            # An environment that has succeeded waits, frozen, for the end of the chunk.
            physics, reward = where_env(active, (moved, stage), (physics, reward))
            return (physics, reward, steps + active), None

        start = (state.physics, jnp.zeros_like(state.control_steps), state.control_steps)
        (physics, reward, steps), _ = jax.lax.scan(control_step, start, ctrl.swapaxes(0, 1))
        # Zeros were no actions that anybody chose.
        physics, reward, steps = where_env(refused, start, (physics, reward, steps))
        fault = ~_is_sane(physics)
        physics = where_env(fault, state.physics, physics)
        stepped = self._state(physics, jnp.where(fault, 0, reward), fault, steps, state.key)
        stepped = stepped._replace(truncated=stepped.truncated | refused)
        return self._with_images(where_env(state.done, self._start_anywhere(state.key), stepped))

    def qpos(self, state: EnvState) -> np.ndarray:
        """Joint positions [N, 23] in float64, on the host (for videos and analysis)."""
        return np.asarray(state.physics.qpos, np.float64)

    def _control_step(self, physics: MjxPhysics, ctrl: Float[Array, "N 16"]):
        """(physics 20 ms later, reward stage [N]).

        The sensors see the contacts at the beginning of the last 2 ms step, where gym-aloha looks at its end: seeing
        those would cost one more collision pass.
        """
        data = self._make_data(len(ctrl))

        def substep(carry, _):
            physics, _ = carry
            moved = jax.vmap(mjx.step, in_axes=(None, 0))(
                self._model,
                jax.vmap(lambda p, c: data.replace(qpos=p.qpos, qvel=p.qvel, qacc_warmstart=p.warmstart, ctrl=c))(
                    physics, ctrl
                ),
            )
            return (MjxPhysics(moved.qpos, moved.qvel, moved.qacc_warmstart), moved.sensordata), None

        start = (physics, jnp.zeros((len(ctrl), self._host_model.nsensordata)))
        (physics, found), _ = jax.lax.scan(substep, start, length=aloha.SUBSTEPS)
        touch = found > 0
        return physics, aloha.reward_stage(touch[:, 0], touch[:, 1], touch[:, 2])

    def _make_data(self, num_envs: int) -> mjx.Data:
        if self.impl == "jax":
            return mjx.make_data(self._model)
        contacts = _CONTACTS_PER_WORLD * num_envs
        return mjx.make_data(self._host_model, impl="warp", naconmax=contacts, njmax=_CONSTRAINTS_PER_WORLD)

    def _state(self, physics: MjxPhysics, reward, fault, control_steps, keys) -> EnvState:
        success = reward == aloha.SUCCESS_REWARD
        return EnvState(
            physics=physics,
            observation=aloha.observe(physics.qpos),
            reward=reward.astype(jnp.float32),
            terminated=success,
            truncated=(control_steps >= self.spec.episode_length) & ~success & ~fault,
            success=success,
            fault=fault,
            control_steps=control_steps,
            env_id=jnp.zeros_like(control_steps),
            key=keys,
        )

    def _with_images(self, state: EnvState) -> EnvState:
        """The state with its pictures, where there is a camera; one that cannot be drawn is a fault."""
        eye = self._eye
        if eye is None:
            return state
        if isinstance(eye, RayCaster):
            images = {eye.camera.name: eye.look(state.physics.qpos)}
            return state._replace(observation=state.observation._replace(images=images))

        def look(qpos):
            """The callback: NumPy only, never raises (an exception here could poison later callbacks)."""
            return eye.collect([eye.look(row) for row in join(qpos).astype(np.float64)])

        num_envs = len(state.reward)
        shapes = jax.ShapeDtypeStruct((num_envs, *eye.shape), jnp.uint8), jax.ShapeDtypeStruct((num_envs,), bool)
        images, broken = jax.pure_callback(look, shapes, pieces(state.physics.qpos))
        return state._replace(
            observation=state.observation._replace(images={eye.camera.name: images}),
            reward=jnp.where(broken, 0.0, state.reward),
            terminated=state.terminated & ~broken,
            truncated=state.truncated & ~broken,
            success=state.success & ~broken,
            fault=state.fault | broken,
        )


def _is_sane(physics: MjxPhysics) -> Bool[Array, " N"]:
    """MuJoCo's own test for a broken simulation: any value that is NaN or beyond 1e10."""
    return (jnp.abs(physics.qpos) < 1e10).all(axis=1) & (jnp.abs(physics.qvel) < 1e10).all(axis=1)
