"""The types that cross module borders, and the three protocols (Env, BasePolicy, Algorithm).

Symbols used in shapes everywhere:
    N  parallel environments          T  decisions per rollout      W  rollouts kept in the window
    h  steps in a predicted chunk     A  action width of the base   a  action width of the environment
    D  latent size                    d  size of the state s_t      B  minibatch
    M  critics                        S  CFM draws per sample       p  proprioception size, o object pose size

One *decision* t is one query of the base policy; it executes `execute_steps` control steps.
"""

import difflib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

Metrics = dict[str, Array]  # scalar diagnostics of one update or iteration
Params = PyTree[Array]  # nested dict of arrays, as Flax Linen makes them
Scalar = float | Float[Array, ""]  # a setting, or what stands for it where members of a population differ


class FpoError(Exception):
    """A mistake the user can mend: `str(error)` is one sentence that says what is wrong and what to do."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of an error sentence: `; did you mean 'x'?` or `; choose one of x, y.`"""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choose one of {', '.join(known)}."


class Observation(NamedTuple):
    """What the environments show the base policy at a decision; all leaves have leading axis N."""

    proprio: Float[Array, "N p"]  # robot state, in the environment's own units
    object_pose: Float[Array, "N o"] | None = None  # privileged poses (position [m], quaternion wxyz)
    images: dict[str, UInt8[Array, "N y x 3"]] | None = None  # camera name -> RGB
    image_masks: dict[str, Bool[Array, " N"]] | None = None  # False: that camera is absent
    prompt: Int[Array, "N l"] | None = None  # token ids
    prompt_mask: Bool[Array, "N l"] | None = None
    task: Int[Array, " N"] | None = None  # which of `EnvSpec.prompts`, in suites of tasks


class EnvState(NamedTuple):
    """N environments at a decision. A pure value: saving it and loading it resumes the simulation exactly.

    Not that of a `HostedEnv`: episodes that were running in another process are lost, and end with a fault.
    """

    physics: PyTree  # the backend's own arrays, leading axis N
    observation: Observation
    reward: Float[Array, " N"]  # the task's own reward after the last executed control step (ALOHA: stage 0..4)
    terminated: Bool[Array, " N"]  # the task ended (success)
    truncated: Bool[Array, " N"]  # the time limit was reached, or an action was not finite
    success: Bool[Array, " N"]
    fault: Bool[Array, " N"]  # the simulation broke (non-finite physics, dead worker): the episode counts as invalid
    control_steps: Int[Array, " N"]  # control steps since the episode began
    env_id: Int[Array, " N"]  # which task of a suite; 0 where there is one
    key: Key[Array, " N"]  # decides the next reset of each environment

    @property
    def done(self) -> Bool[Array, " N"]:
        """The episode is over, so the next `step` resets this environment."""
        return self.terminated | self.truncated | self.fault


class LatentSample(NamedTuple):
    """The latent an actor chose, with its flow-matching loss at that moment (Alg. 1, line 10)."""

    latent: Float[Array, "N D"]
    cfm_loss: Float[Array, "N S"]  # ℓ_cfm(x_t | s_t; θ_old), one column per draw; S = 0 for algorithms without one
    cfm_key: Key[Array, " N"]  # redraws the same (ε, u)


class Transition(NamedTuple):
    """One decision, as the buffer keeps it. Leading axes [T, N], [W, T, N] or [B]."""

    state: Float[Array, "*batch d"]  # s_t
    latent: Float[Array, "*batch D"]  # x_t, the one that was executed
    reward: Float[Array, "*batch"]  # r_t of the learner (config.reward)
    next_state: Float[Array, "*batch d"]  # s_{t+1}
    discount: Float[Array, "*batch"]  # γ, or 0 where s_{t+1} is terminal
    done: Bool[Array, "*batch"]  # the episode ended here: cuts GAE
    valid: Bool[Array, "*batch"]  # False on a reset slot and where the simulation broke
    cfm_loss: Float[Array, "*batch S"]
    cfm_key: Key[Array, "*batch"]


class EnvSpec(NamedTuple):
    """Static facts of an environment."""

    name: str
    action_dim: int  # a
    proprio_dim: int  # p
    object_pose_dim: int  # o, 0 where object poses are not observed
    episode_length: int  # control steps until truncation
    execute_steps: int  # control steps per decision, H <= h
    control_hz: float
    tasks: tuple[str, ...] = ()  # of a suite, by `EnvState.env_id`; () where there is one
    prompts: tuple[str, ...] = ()  # each task in words, by `Observation.task`; () where the base knows its task
    test_episodes: int = 0  # numbered episodes that `HostedEnv.reset_test` has, 0: initial states are drawn by keys
    protocol: dict[str, Any] | None = None  # whatever else results depend on, as they state it

    @property
    def decisions(self) -> int:
        """Decisions in an episode that runs to its time limit."""
        return -(-self.episode_length // self.execute_steps)


# fast: no shadows, no multisampling; raycast: MJX-Warp's batch renderer, whose pictures look different
Quality = Literal["official", "fast", "raycast"]


class Camera(NamedTuple):
    """What a base wants to see: one camera, rendered once per decision, resized with padding to a square."""

    name: str  # the environment's own name of it, the key in `Observation.images`
    size: int  # edge of the square image [pixels]
    quality: Quality = "official"


class Dims(NamedTuple):
    """Sizes that an algorithm needs to build its networks."""

    state: int  # d
    latent: int  # D


@runtime_checkable  # beartype checks it in tests
class Env(Protocol):
    """A batch of environments as a pair of pure functions (both may be called under jit and scan).

    `step` executes the first `spec.execute_steps` actions of each chunk, fewer where the episode ends inside it.
    Next-step autoreset: an environment that is `done` ignores its chunk and is reset by `step`, drawing the
    initial state from its own key; the slot's transition is not valid.
    """

    spec: EnvSpec

    def reset(self, keys: Key[Array, " N"]) -> EnvState: ...

    def step(self, state: EnvState, chunk: Float[Array, "N h a"]) -> EnvState: ...


@runtime_checkable
class HostedEnv(Env, Protocol):
    """An `Env` whose simulators are elsewhere: `step(state, chunk)` is `collect(submit(state, chunk))`.

    Simulators work between the two. `collect` does not begin before `after` was submitted: without that, a compiled
    program would be free to wait first and submit later. `problem` is why the run must stop, or None.
    `prepare` comes before so many environments are played for the first time: it raises FpoError where they cannot be.
    """

    overlap: bool  # a rollout may let one half of the environments simulate while it decides for the other

    def prepare(self, num_envs: int) -> None: ...

    def submit(self, state: EnvState, chunk: Float[Array, "N h a"]) -> EnvState: ...

    def collect(self, state: EnvState, after: EnvState | None = None) -> EnvState: ...

    def reset_test(self, numbers: Int[Array, " N"], keys: Key[Array, " N"]) -> EnvState: ...

    def problem(self) -> str | None: ...

    def report(self) -> dict[str, float]: ...

    def close(self) -> None: ...


@runtime_checkable  # beartype checks it in tests
class BasePolicy(Protocol):
    """A frozen flow policy: noise in, action chunk out. `encode` runs once per decision, `decode` per latent."""

    @property
    def horizon(self) -> int: ...  # h

    @property
    def action_dim(self) -> int: ...  # A, width of the noise

    @property
    def output_dim(self) -> int: ...  # a, width of the actions that `decode` returns

    @property
    def cameras(self) -> tuple[str, ...]: ...  # the environment's cameras that `encode` looks through

    @property
    def image_size(self) -> int: ...  # edge of the square images it wants [pixels], 0 without cameras

    @property
    def feature_dim(self) -> int: ...  # size of the features that `encode` returns

    @property
    def standardize(self) -> bool: ...  # the features still need the statistics of a first rollout (rollout.py)

    def encode(self, params: Params, observation: Observation) -> tuple[Float[Array, "N f"], PyTree]: ...

    def decode(self, params: Params, context: PyTree, noise: Float[Array, "N h A"]) -> Float[Array, "N h a"]: ...


@runtime_checkable  # beartype checks it in tests
class Algorithm(Protocol):
    """A module with four pure functions; `config` is the whole `TrainConfig`.

    `prepare` sees whole trajectories [W T N] once per iteration (advantages) and returns flat samples [W·T·N] with a
    field `valid`; `update` takes one gradient step on a minibatch of them.
    """

    def init(self, config: Any, dims: Dims, key: Key[Array, ""]) -> PyTree: ...

    def act(self, config: Any, agent: PyTree, state: Float[Array, "N d"], keys: Key[Array, " N"]) -> LatentSample: ...

    def prepare(
        self, config: Any, agent: PyTree, window: Transition, key: Key[Array, ""]
    ) -> tuple[PyTree, Metrics]: ...

    def update(self, config: Any, agent: PyTree, minibatch: PyTree, key: Key[Array, ""]) -> tuple[PyTree, Metrics]: ...
