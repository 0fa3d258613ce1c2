"""A point in the plane that must reach one of four goals: small enough for tests and for a first tutorial.

A base policy that does not know the goal heads anywhere; steering its noise by the observed goal solves the task, which
makes this the smallest problem with the structure of steering a frozen flow policy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fpo_jax.envs.common import no_actions, where_env
from fpo_jax.flow import split_keys
from fpo_jax.types import EnvSpec, EnvState, Observation

GOALS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))  # [m], one is drawn for each episode
STEP_LENGTH = 0.25  # [m] at full speed in one control step: four steps from the origin to a goal
RADIUS = 0.3  # [m] around the goal that counts as reached


class PointMassPhysics(NamedTuple):
    position: Float[Array, "N 2"]
    goal: Float[Array, "N 2"]


class PointMass:
    """N point masses (the `Env` protocol): proprio = position [m], object_pose = goal [m], action = velocity.

    Velocities are clipped to [-1, 1]. Reward 1 and termination where the point comes within `RADIUS` of its goal.
    """

    def __init__(self, episode_length: int = 8, execute_steps: int = 2):
        self.spec = EnvSpec(
            name="point_mass",
            action_dim=2,
            proprio_dim=2,
            object_pose_dim=2,
            episode_length=episode_length,
            execute_steps=execute_steps,
            control_hz=10.0,
        )

    def reset(self, keys: Key[Array, " N"]) -> EnvState:
        """New episodes: the point at the origin, the goal drawn by each environment's key."""
        keys, draws = split_keys(keys)
        goal = jax.vmap(lambda key: jax.random.choice(key, jnp.array(GOALS)))(draws)
        nothing = jnp.zeros(len(keys), bool)
        physics = PointMassPhysics(jnp.zeros_like(goal), goal)
        return self._state(physics, nothing, jnp.zeros(len(keys), jnp.int32), keys)

    def step(self, state: EnvState, chunk: Float[Array, "N h 2"]) -> EnvState:
        """Execute the first actions of each chunk; environments that are done start a new episode instead."""
        actions = chunk[:, : self.spec.execute_steps]
        refused = no_actions(actions)

        def control_step(carry, action):
            position, reached, steps = carry
            active = ~reached & ~refused & (steps < self.spec.episode_length)
            moved = position + STEP_LENGTH * jnp.clip(action, -1.0, 1.0)
            position = jnp.where(active[:, None], moved, position)
            reached |= jnp.linalg.norm(position - state.physics.goal, axis=-1) < RADIUS
            return (position, reached, steps + active), None

        start = (state.physics.position, jnp.zeros_like(refused), state.control_steps)
        (position, reached, steps), _ = jax.lax.scan(control_step, start, actions.swapaxes(0, 1))
        physics = PointMassPhysics(position, state.physics.goal)
        stepped = self._state(physics, reached, steps, state.key)
        stepped = stepped._replace(truncated=stepped.truncated | refused)
        return where_env(state.done, self.reset(state.key), stepped)

    def _state(self, physics, success, control_steps, keys) -> EnvState:
        return EnvState(
            physics=physics,
            observation=Observation(proprio=physics.position, object_pose=physics.goal),
            reward=success.astype(jnp.float32),
            terminated=success,
            truncated=(control_steps >= self.spec.episode_length) & ~success,
            success=success,
            fault=jnp.zeros_like(success),
            control_steps=control_steps,
            env_id=jnp.zeros_like(control_steps),
            key=keys,
        )
