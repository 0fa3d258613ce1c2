"""Simulators outside the compiled program as an `Env`: two callbacks per decision, `submit` and `collect`.

Nothing of a simulation lies in `EnvState` but a ticket, which every `submit` replaces and which says how far the host
must have come. A state whose ticket is not the newest of its slot (an old state stepped again, a resumed run whose
simulators are gone) has lost its episode: it gets a fault, and the next step begins another episode. The tickets also
chain the callbacks: a `collect` takes those that a `submit` gave, so none can overtake another.
"""

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from fpo_jax.envs.common import join, pieces, where_env
from fpo_jax.flow import split_keys
from fpo_jax.hosts import num_processes
from fpo_jax.parallel import env_indices, num_devices
from fpo_jax.types import EnvSpec, EnvState, Observation

_RESET_ATTEMPTS = 2  # an episode that did not begin is begun again, by then in another worker
_TALLY_DECAY = 0.98  # per episode of an environment: tasks whose success changes must not be judged by their past


class Episode(NamedTuple):
    """Which episode: everything that its beginning depends on. Arrays [N], or numbers for one slot."""

    env_id: Any  # of the task
    task: Any  # the simulator's number of it
    init: Any  # official initial state, -1: sampled by the seed
    seed: Any
    test: Any  # a test episode


class Outcome(NamedTuple):
    """What a slot's simulator answered."""

    failed: str  # "", or why the episode is lost
    steps: int = 0  # control steps executed
    success: bool = False
    arrays: Mapping[str, np.ndarray] | None = None  # name -> as in `HostEnv.shapes`; None where it failed


@runtime_checkable  # beartype checks it in tests
class HostVectorEnv(Protocol):
    """Simulators in numbered slots, each made when it is first used; nothing here raises but `prepare`.

    A slot's requests come one at a time, but those of different slots may come from different threads.
    """

    def prepare(self, slots: int) -> None: ...  # before they are used; raises FpoError where so many cannot be

    def submit_reset(self, slot: int, episode: Episode) -> None: ...

    def submit_step(self, slot: int, actions: Float[np.ndarray, "k a"]) -> None: ...

    def collect(self, slot: int) -> Outcome: ...  # waits for the slot's request, at most until its deadline

    def problem(self) -> str | None: ...  # why no episode can begin any more: one sentence

    def report(self) -> dict[str, float]: ...  # metrics

    def close(self) -> None: ...


@runtime_checkable
class Sampler(Protocol):
    """Which episodes are played."""

    def check(self, num_envs: int) -> None:
        """Raises FpoError where so many environments cannot play what is to be played."""
        ...

    def draw(self, keys: Key[Array, " N"], tally: Float[Array, "K 2"], slots: Int[Array, " N"]) -> Episode:
        """Training episodes for these slots; tally: recent (successes, episodes) of each task."""
        ...

    def test(self, numbers: Int[Array, " N"], keys: Key[Array, " N"]) -> Episode:
        """The test episodes of these numbers."""
        ...


class HostPhysics(NamedTuple):
    """What `EnvState.physics` holds of simulators that are elsewhere."""

    slot: Int[Array, " N"]
    ticket: UInt32[Array, " N"]
    once: Bool[Array, " N"]  # a test episode: none follows it
    tally: Float[Array, "N K 2"]  # this environment's recent (successes, episodes) of each task


@dataclass
class _Slot:
    """What the host remembers of a slot between callbacks."""

    ticket: int = 0
    episode: Episode | None = None  # begun by the request in progress
    waiting: bool = False  # for the simulator
    failed: str = ""  # without asking the simulator
    idle: bool = False
    refused: bool = False  # actions that are not finite: the policy's failure


class HostEnv:
    """N environments whose simulators are `vector`'s slots, numbered as they are (`fpo_jax.types.HostedEnv`).

    `shapes` names what an outcome holds: proprio [p], objects [o / 7, 7], and images [cameras, y, x, 3] (uint8) where
    there are `cameras`. An episode and all it draws follow from the environment's own key. With `overlap`, a rollout
    lets half of the environments simulate while the policy decides for the other half.
    """

    def __init__(
        self,
        vector: HostVectorEnv,
        spec: EnvSpec,
        sampler: Sampler,
        cameras: tuple[str, ...] = (),
        image_size: int = 0,
        overlap: bool = True,
    ):
        self.spec, self.overlap = spec, overlap
        self.vector, self._sampler, self._cameras = vector, sampler, cameras
        self._slots: dict[int, _Slot] = {}
        # From a random start: a ticket that was saved by another process means nothing to this one.
        self._tickets = itertools.count(int.from_bytes(os.urandom(4), "little"))
        self.shapes: dict[str, tuple[tuple[int, ...], Any]] = {"proprio": ((spec.proprio_dim,), np.float32)}
        if spec.object_pose_dim:
            self.shapes["objects"] = ((spec.object_pose_dim // 7, 7), np.float32)
        if cameras:
            self.shapes["images"] = ((len(cameras), image_size, image_size, 3), np.uint8)

    def reset(self, keys: Key[Array, " N"]) -> EnvState:
        """New training episodes in these environments' slots; whatever ran there before is lost."""
        self._sampler.check(len(keys) * num_devices())
        keys, draws = split_keys(keys)
        tally = jnp.zeros((len(keys), max(len(self.spec.tasks), 1), 2))
        episode = self._sampler.draw(draws, tally.sum(0), env_indices(len(keys)))
        return self._begin(episode, keys, tally, once=False)

    def reset_test(self, numbers: Int[Array, " N"], keys: Key[Array, " N"]) -> EnvState:
        """The test episodes of these numbers (0.. in the benchmark's order); nothing follows where one is over."""
        tally = jnp.zeros((len(keys), max(len(self.spec.tasks), 1), 2))
        return self._begin(self.test_episodes(numbers, keys), split_keys(keys)[0], tally, once=True)

    def test_episodes(self, numbers: Int[Array, " N"], keys: Key[Array, " N"]) -> Episode:
        """Which episodes `reset_test` begins."""
        return self._sampler.test(numbers, split_keys(keys)[1])

    def step(self, state: EnvState, chunk: Float[Array, "N h a"]) -> EnvState:
        """Execute the first actions of each chunk; environments that are done start a new episode instead."""
        return self.collect(self.submit(state, chunk))

    def submit(self, state: EnvState, chunk: Float[Array, "N h a"]) -> EnvState:
        """Let the simulators begin what `step` does; only `collect` can take the result."""
        next_keys, draws = split_keys(state.key)
        episode = self._sampler.draw(draws, state.physics.tally.sum(0), state.physics.slot)
        state = state._replace(
            key=jnp.where(state.done, next_keys, state.key),
            env_id=jnp.where(state.done & ~state.physics.once, episode.env_id, state.env_id),
        )
        return self._submit(state, episode, chunk, park=state.done & state.physics.once)

    def collect(self, state: EnvState, after: EnvState | None = None) -> EnvState:
        """Wait for what `submit` began, in any case not before `after` was submitted."""
        physics, resets, num_envs = state.physics, state.done, len(state.done)
        token = (physics if after is None else after.physics).ticket
        shapes = {
            "fault": jax.ShapeDtypeStruct((num_envs,), bool),
            "idle": jax.ShapeDtypeStruct((num_envs,), bool),
            "refused": jax.ShapeDtypeStruct((num_envs,), bool),
            "success": jax.ShapeDtypeStruct((num_envs,), bool),
            "steps": jax.ShapeDtypeStruct((num_envs,), jnp.int32),
        }
        shapes |= {name: jax.ShapeDtypeStruct((num_envs, *s), kind) for name, (s, kind) in self.shapes.items()}
        out = io_callback(self._on_collect, shapes, physics.slot, physics.ticket, token)
        success = out["success"] & ~resets  # what is done already when it begins takes a step, as in any evaluation
        control_steps = jnp.where(resets, 0, state.control_steps) + out["steps"]
        truncated = ((control_steps >= self.spec.episode_length) | out["refused"]) & ~success & ~out["fault"]
        ended = ~resets & (success | truncated)
        tasks = jnp.arange(physics.tally.shape[1])
        scored = (ended[:, None] & (state.env_id[:, None] == tasks[None]))[..., None]
        news = jnp.stack([success.astype(jnp.float32), jnp.ones(num_envs)], axis=-1)[:, None]
        return EnvState(
            physics=physics._replace(tally=jnp.where(scored, _TALLY_DECAY * physics.tally + news, physics.tally)),
            observation=where_env(out["refused"], state.observation, self._observe(out, state.env_id)),
            reward=success.astype(jnp.float32),
            terminated=success,
            truncated=truncated | out["idle"],  # over, so that no one takes it for an episode
            success=success,
            fault=out["fault"],
            control_steps=control_steps,
            env_id=state.env_id,
            key=state.key,
        )

    def prepare(self, num_envs: int) -> None:
        """Make sure that so many environments can be simulated. Raises FpoError where they cannot."""
        self.vector.prepare(-(-num_envs // num_processes()))

    def problem(self) -> str | None:
        """Why no episode can begin any more, in one sentence; a run must stop then."""
        return self.vector.problem()

    def report(self) -> dict[str, float]:
        """Metrics of the simulators since they were started."""
        return self.vector.report()

    def close(self) -> None:
        """End the simulators."""
        self.vector.close()

    def _begin(self, episode: Episode, keys, tally, once: bool) -> EnvState:
        num_envs = len(keys)
        everyone, nobody = jnp.ones(num_envs, bool), jnp.zeros(num_envs, bool)
        zeros = jnp.zeros(num_envs, jnp.int32)
        slot = env_indices(num_envs)  # of all devices and hosts, so that a state fits on other ones too
        physics = HostPhysics(slot, jnp.zeros(num_envs, jnp.uint32), everyone if once else nobody, tally)
        blank = {name: jnp.zeros((num_envs, *shape), kind) for name, (shape, kind) in self.shapes.items()}
        state = EnvState(
            physics,
            self._observe(blank, episode.env_id),
            reward=jnp.zeros(num_envs),
            terminated=nobody,
            truncated=everyone,  # so it begins anew
            success=nobody,
            fault=nobody,
            control_steps=zeros,
            env_id=episode.env_id,
            key=keys,
        )
        chunk = jnp.zeros((num_envs, 0, self.spec.action_dim))
        return self.collect(self._submit(state, episode, chunk, park=nobody))

    def _observe(self, out: Mapping[str, Array], task: Int[Array, " N"]) -> Observation:
        return Observation(
            proprio=out["proprio"],
            object_pose=out["objects"].reshape(len(task), -1) if "objects" in out else None,
            images={name: out["images"][:, i] for i, name in enumerate(self._cameras)} or None,
            task=task,
        )

    def _submit(self, state: EnvState, episode: Episode, chunk, park: Bool[Array, " N"]) -> EnvState:
        steps_left = self.spec.episode_length - state.control_steps  # the last chunk may be cut short
        chunk = chunk[:, : self.spec.execute_steps].astype(jnp.float32)
        physics = state.physics
        ticket = io_callback(
            self._on_submit,
            jax.ShapeDtypeStruct(physics.ticket.shape, jnp.uint32),
            *(physics.slot, physics.ticket, state.done, park, steps_left),
            pieces(chunk),
            *episode,
        )
        return state._replace(physics=physics._replace(ticket=ticket))

    # --- the callbacks: NumPy only, and no exception leaves them (one could poison later callbacks)

    def _on_submit(self, slots, tickets, resets, park, steps_left, chunk, *episode) -> np.ndarray:
        columns = [np.asarray(column).tolist() for column in (slots, tickets, resets, park, steps_left)]
        episodes = map(Episode, *(np.asarray(column).tolist() for column in episode))
        rows = zip(*columns, join(chunk), episodes, strict=True)
        return np.array([self._submit_row(*row) for row in rows], np.uint32)

    def _submit_row(self, slot, ticket, reset, park, steps_left, actions, episode) -> int:
        known = self._slots.get(slot)
        is_newest = known is not None and known.ticket == ticket and not known.waiting
        this = self._slots[slot] = _Slot(next(self._tickets) % 2**32)
        try:
            if reset:
                this.idle = park or self.vector.problem() is not None
                if not this.idle:
                    this.episode = episode
                    self.vector.submit_reset(slot, episode)
            elif not is_newest:
                this.failed = "lost: the simulators that played this episode are gone"
            elif not np.isfinite(actions).all():
                this.refused = True
            else:
                self.vector.submit_step(slot, actions[: max(steps_left, 0)])
            this.waiting = not (this.idle or this.failed or this.refused)
        except Exception as error:  # whatever went wrong is this environment's fault alone
            this.failed = f"host: {type(error).__name__}"
        return this.ticket

    def _on_collect(self, slots, tickets, _token) -> dict[str, np.ndarray]:
        rows = list(zip(np.asarray(slots).tolist(), np.asarray(tickets).tolist(), strict=True))
        known = [self._known(*row) for row in rows]
        awaited = [this is not None and this.waiting for this in known]  # by this call alone
        outcomes = [self._collect_row(*row) for row in rows]
        for _ in range(_RESET_ATTEMPTS - 1):
            again = [i for i, row in enumerate(rows) if awaited[i] and outcomes[i].failed and self._begin_again(row[0])]
            for i in again:
                outcomes[i] = self._collect_row(*rows[i])
        out = {
            "fault": np.array([bool(outcome.failed) for outcome in outcomes]),
            "idle": np.array([this is not None and this.idle for this in known]),
            "refused": np.array([this is not None and this.refused for this in known]),
            "success": np.array([outcome.success for outcome in outcomes]),
            "steps": np.array([outcome.steps for outcome in outcomes], np.int32),
        }
        for name, (shape, kind) in self.shapes.items():
            out[name] = np.zeros((len(rows), *shape), kind)
            for row, outcome in zip(out[name], outcomes, strict=True):
                if outcome.arrays is not None:
                    row[...] = outcome.arrays[name]
        return out

    def _known(self, slot: int, ticket: int) -> _Slot | None:
        """The slot, where this ticket is its newest."""
        this = self._slots.get(slot)
        return this if this is not None and this.ticket == ticket else None

    def _collect_row(self, slot: int, ticket: int) -> Outcome:
        this = self._known(slot, ticket)
        if this is None or not (this.waiting or this.failed or this.idle or this.refused):
            return Outcome("lost: this state was never submitted, or collected before")
        if not this.waiting:
            return Outcome(this.failed)
        this.waiting = False
        try:
            return self.vector.collect(slot)
        except Exception as error:
            return Outcome(f"host: {type(error).__name__}")

    def _begin_again(self, slot: int) -> bool:
        """Submit the reset that failed once more; False where it was none or nothing can begin any more."""
        this = self._slots.get(slot)
        if this is None or this.episode is None or self.vector.problem() is not None:
            return False
        try:
            self.vector.submit_reset(slot, this.episode)
        except Exception:
            return False
        this.waiting = True
        return True
