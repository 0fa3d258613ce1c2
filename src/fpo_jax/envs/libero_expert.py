"""Scripted expert for LIBERO's pick-and-place tasks: closed loop on robot state and object poses, by OSC_POSE actions.

It moves above the object, turns the fingers to its narrow side, descends, closes, lifts, carries, lowers and opens,
each phase until the hand is where it should be; then it takes the next object, where the goal names several.
Displacing a grasp (`Plan.grasp_offset`) leaves the rest of the motion as it is: the raw material of a steerable base
policy, one that contains the right behaviour but does not choose it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from fpo_jax.config import LiberoOptions
from fpo_jax.demos import Demonstrations
from fpo_jax.envs import libero
from fpo_jax.envs.common import num_cpus
from fpo_jax.envs.host import Episode
from fpo_jax.envs.workers import WorkerPool
from fpo_jax.types import FpoError

REACH = 0.05  # [m] by which an action of 1 moves the controller's goal away from the hand
TURN = 0.5  # [rad] the same for rotations
OPEN, CLOSED = -1.0, 1.0
ARRIVED = 0.012  # [m] from a phase's goal, sideways and in height
ALIGNED = 0.06  # [rad]
CLOSING_STEPS = 10  # control steps until the fingers hold
OPENING_STEPS = 8
RETREAT_STEPS = 8  # until the hand is above the container again
APPROACH_STEPS = 16  # in which the hand's goal moves above the object, at constant speed
SETTLING_STEPS = 6  # until the hand has followed it
CLEARANCE = 0.10  # [m] above the grasp: where the hand waits before it descends
PATIENCE = 40  # control steps after which a phase is over anyway
START_STEPS = 4  # in which the hand is pushed to where a demonstration starts
REACHED = 0.3  # share of an action's reach that the hand has gone when the next one comes

HAND_WIDTH = 0.2  # [m] along the fingers' axis
FREE = 0.075  # [m] from the hand's middle line to the middle of a thing that it does not touch
TALLER = 0.02  # [m] higher than the object: things that the hand could meet
TURNS, SHIFTS = (0.0, 0.2, -0.2), (0.0, 0.015, -0.015)  # [rad] and, across the fingers, [m]: the smallest first

PHASES = ("above", "descend", "close", "lift", "carry", "lower", "open", "retreat")


@dataclass(frozen=True)
class Shape:
    """How a kind of object is grasped, in its body's frame."""

    narrow: tuple[float, float, float]  # the axis along which the fingers close
    height: float = 0.0  # [m] of the grasp above the body's origin


@dataclass(frozen=True)
class Container:
    """Where things are put down in a kind of container."""

    centre: tuple[float, float]  # [m] from its origin, in world axes: LIBERO's containers are not turned
    carry: float  # [m] height of the hand over it while carrying, from its origin
    lower: float  # [m] height of the hand when it opens


# Boxes lie on their broad side; bottles and cartons stand on an end, with their y axis up, and so do cans.
SHAPES: Mapping[str, Shape] = {
    "alphabet_soup": Shape((0.0, 0.0, 1.0)),
    "bbq_sauce": Shape((1.0, 0.0, 0.0), height=0.025),
    "butter": Shape((0.0, 1.0, 0.0)),
    "chocolate_pudding": Shape((0.0, 1.0, 0.0)),
    "cream_cheese": Shape((0.0, 1.0, 0.0)),
    "ketchup": Shape((1.0, 0.0, 0.0), height=0.035),
    "milk": Shape((1.0, 0.0, 0.0), height=0.03),
    "orange_juice": Shape((1.0, 0.0, 0.0), height=0.035),
    "salad_dressing": Shape((1.0, 0.0, 0.0), height=0.035),
    "tomato_sauce": Shape((0.0, 0.0, 1.0)),
}
CONTAINERS: Mapping[str, Container] = {
    "wooden_tray": Container((0.0086, -0.0047), carry=0.15, lower=0.10),
    "basket": Container((0.0, 0.0), carry=0.30, lower=0.20),
}


class Plan(NamedTuple):
    """Which object goes where, and how it is grasped."""

    item: int  # its row among the observed objects
    target: int  # the container's
    shape: Shape
    container: Container
    grasp_offset: tuple[float, float] = (0.0, 0.0)  # [m] x and y of the grasp beside where it should be


class State(NamedTuple):
    """What the expert remembers between control steps."""

    phase: int = 0  # in PHASES
    steps: int = 0  # in this phase
    yaw: float = 0.0  # [rad] of the fingers' axis, chosen in the first step
    grasp: tuple[float, float, float] = (0.0, 0.0, 0.0)  # [m] where the hand closes, chosen in the first step
    start: tuple[float, float, float] = (0.0, 0.0, 0.0)  # [m] where the hand was then


def rotation(vector: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """Rotation matrix of a rotation vector [rad] (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / angle if angle else np.zeros(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rotation_of_quaternion(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3 3"]:
    """Rotation matrix of a unit quaternion wxyz."""
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def axis_yaw(axis: Float[np.ndarray, "3"]) -> float:
    """Angle [rad] of a finger axis about the vertical, from world y; an axis has no sign, so it is within ±π/2."""
    yaw = float(np.arctan2(-axis[0], axis[1]))
    return (yaw + np.pi / 2) % np.pi - np.pi / 2


def make_plans(task: Mapping[str, Any]) -> tuple[Plan, ...]:
    """What to do, one thing after another, in a task as `libero_files.Task` describes it, by its goal.

    Raises FpoError where the task asks for more than picking known things and putting them into known containers.
    """
    plans = []
    for predicate in re.findall(r"\([^()]*\)", task["goal"]) or [""]:
        found = re.fullmatch(r"\(In (\w+) (\w+)_contain_region\)", predicate, re.IGNORECASE)
        item, target = found.groups() if found else ("", "")
        shape, container = SHAPES.get(item.rpartition("_")[0]), CONTAINERS.get(target.rpartition("_")[0])
        if shape is None or container is None:
            raise FpoError(
                f"The scripted expert cannot do {task['name']!r}: it puts {', '.join(SHAPES)} into containers."
            )
        plans.append(Plan(task["objects"].index(item), task["objects"].index(target), shape, container))
    return tuple(plans)


def begin(plan: Plan, proprio: Float[np.ndarray, "8"], objects: Float[np.ndarray, "K 7"]) -> State:
    """The state before a plan's first step: where and how the hand will close.

    Beside tall things the hand turns and moves along the object a little: it is 20 cm wide, and near the fingers' tips.
    """
    poses = objects.astype(np.float64)
    pose = poses[plan.item]
    narrow = rotation_of_quaternion(pose[3:]) @ np.array(plan.shape.narrow)
    exists = np.any(poses[:, 3:] != 0, axis=1) & ~np.isin(np.arange(len(poses)), (plan.item, plan.target))
    tall = poses[exists & (poses[:, 2] > pose[2] + TALLER), :2]
    best = (-np.inf, 0.0, np.zeros(2))
    for turn, shift in product(TURNS, SHIFTS):
        yaw = axis_yaw(narrow) + turn
        fingers, across = np.array([-np.sin(yaw), np.cos(yaw)]), np.array([np.cos(yaw), np.sin(yaw)])
        away = tall - pose[:2] - shift * across
        along = np.clip(away @ fingers, -HAND_WIDTH / 2, HAND_WIDTH / 2)
        clearance = min([FREE, *np.linalg.norm(away - along[:, None] * fingers, axis=1)])
        if clearance > best[0]:  # the first of equal ones: the one that evades least
            best = (clearance, yaw, shift * across)
    offset = np.array([*(best[2] + plan.grasp_offset), plan.shape.height])
    return State(yaw=best[1], grasp=tuple((pose[:3] + offset).tolist()), start=tuple(proprio[:3].tolist()))


def act(
    plan: Plan, state: State, proprio: Float[np.ndarray, "8"], objects: Float[np.ndarray, "K 7"]
) -> tuple[Float[np.ndarray, "7"], State]:
    """(action, next state): one control step; the first call takes what `begin` gave.

    `proprio` is LIBERO's: position [m] and rotation vector [rad] of the hand, two finger positions [m].
    """
    hand, grasp = proprio[:3].astype(np.float64), np.array(state.grasp)
    turn = _turn(state.yaw, proprio[3:6].astype(np.float64))
    while True:
        phase = PHASES[state.phase]
        goal = _goal(plan, phase, grasp, objects[plan.target, :3].astype(np.float64))
        if phase == "above":
            share = min((state.steps + 1) / APPROACH_STEPS, 1.0)
            goal = state.start + share * (goal - state.start)
        if not _over(phase, state.steps, goal - hand, turn):
            break
        state = state._replace(phase=state.phase + 1, steps=0)
    rotate = turn if phase in ("above", "descend") and abs(turn) > ALIGNED / 2 else 0.0
    gripper = CLOSED if phase in ("close", "lift", "carry", "lower") else OPEN
    action = np.array([*(goal - hand) / REACH, 0.0, 0.0, rotate / TURN, gripper])
    return np.clip(action, -1.0, 1.0), state._replace(steps=state.steps + 1)


def _goal(plan: Plan, phase: str, grasp: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where the hand should be [m]."""
    over = target + np.array([*plan.container.centre, plan.container.carry])
    if phase == "above":
        return grasp + np.array([0.0, 0.0, CLEARANCE])
    if phase in ("descend", "close"):
        return grasp
    if phase == "lift":
        return np.array([*grasp[:2], over[2]])
    if phase in ("lower", "open"):
        return np.array([*over[:2], target[2] + plan.container.lower])
    return over


def _over(phase: str, steps: int, error: np.ndarray, turn: float) -> bool:
    """Whether a phase is over: the hand has arrived, or the fingers have had their time."""
    if phase == "retreat":
        return False
    if phase in ("close", "open"):
        return steps >= (CLOSING_STEPS if phase == "close" else OPENING_STEPS)
    if steps >= PATIENCE:
        return True
    sideways, height = float(np.hypot(*error[:2])), abs(float(error[2]))
    if phase == "above":  # all grasps take the same time: a clone must not tell them apart by it
        arrived = sideways < ARRIVED and height < 2 * ARRIVED and abs(turn) < ALIGNED
        return steps >= APPROACH_STEPS + SETTLING_STEPS and arrived
    if phase == "lift":
        return height < 3 * ARRIVED
    return sideways < ARRIVED and height < ARRIVED


def _turn(yaw: float, hand: Float[np.ndarray, "3"]) -> float:
    """Angle [rad] about the vertical that brings the fingers' axis to `yaw`, the short way."""
    error = yaw - axis_yaw(rotation(hand)[:, 1])
    return float((error + np.pi / 2) % np.pi - np.pi / 2)


@dataclass(frozen=True)
class Mixture:
    """Which grasps the demonstrations hold: right ones, and ones that close in front of or behind the object.

    They are displaced across the fingers, past the line x = `middle`: the sign depends on where the object lies, so no
    one noise makes them right everywhere. (Away from the line some would meet the next can.) Both signs must take the
    same course in time: with a hand that hurries to its goal, displaced grasps were late on one side and early on the
    other, and one constant latent was right on both (measured: .45 -> 1.00). And halfway should be a miss too.
    """

    displaced_fraction: float = 0.5  # of all episodes
    displacement: float = 0.105  # [m] in x; from 5 cm on the fingers miss the butter, so that halfway is a miss too
    middle: float = 0.05  # [m] x of the line past which grasps are displaced
    jitter: float = 0.003  # [m] standard deviation of every grasp in x and y
    start_jitter: float = 0.012  # [m] standard deviation of where the hand starts, as in the official initial states
    # Standard deviation added to each turn. At a turn of exactly 0 robosuite's controller holds the orientation, and at
    # any other lets it drift: a clone is never exact, so where the expert seldom turns (butter: often) it must not be.
    turn_jitter: float = 0.0

    def grasp_offset(self, item: Float[np.ndarray, "3"], rng: np.random.Generator) -> tuple[float, float]:
        """Draws where one episode grasps, relative to the object [m]."""
        displaced = rng.random() < self.displaced_fraction
        sign = 1.0 if item[0] < self.middle else -1.0
        x, y = self.jitter * rng.standard_normal(2)
        return float(x + sign * displaced * self.displacement), float(y)


def play(
    pool: WorkerPool,
    slot: int,
    plans: Sequence[Plan],
    episode: Episode,
    control_steps: int,
    mixture: Mixture | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """One episode in a worker: (proprio [T, 8], objects [T, K, 7], actions [T, 7], success); it goes on after success.

    With a mixture, hand and grasps are displaced as it draws them.

    Raises FpoError where the simulation breaks.
    """

    def look() -> tuple[np.ndarray, np.ndarray, bool]:
        outcome = pool.collect(slot)
        if outcome.failed or outcome.arrays is None:
            raise FpoError(f"A demonstration broke off: {outcome.failed}")
        return outcome.arrays["proprio"], outcome.arrays["objects"], outcome.success

    pool.submit_reset(slot, episode)
    proprio, objects, success = look()
    if mixture is not None and rng is not None:
        push = np.zeros((START_STEPS, 7), np.float32)
        push[:, :3] = mixture.start_jitter * rng.standard_normal(3) / (START_STEPS * REACH * REACHED)
        push[:, 6] = OPEN
        pool.submit_step(slot, push)
        proprio, objects, _ = look()
        plans = [plan._replace(grasp_offset=mixture.grasp_offset(objects[plan.item, :3], rng)) for plan in plans]
    plan, *later = plans
    state, records = begin(plan, proprio, objects), []
    for _ in range(control_steps):
        if later and PHASES[state.phase] == "retreat" and state.steps >= RETREAT_STEPS:
            plan = later.pop(0)
            state = begin(plan, proprio, objects)
        action, state = act(plan, state, proprio, objects)
        if mixture is not None and rng is not None and mixture.turn_jitter:
            action[3:6] += mixture.turn_jitter * rng.standard_normal(3)
        action = action.astype(np.float32)
        records.append((proprio, objects, action))
        pool.submit_step(slot, action[None])
        proprio, objects, now = look()
        success |= now
    seen, poses, actions = (np.stack(column) for column in zip(*records, strict=True))
    return seen, poses, actions, success


def _record_episode(
    pool: WorkerPool,
    slot: int,
    task: int,
    plans: Sequence[Plan],
    seed: tuple[int, int],
    control_steps: int,
    mixture: Mixture,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """`play` of the episode that follows from `seed`, which if it breaks off is played once more, in another worker.

    Raises FpoError where that breaks off too.
    """

    def once() -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        rng = np.random.default_rng(seed)
        sampled = Episode(0, task, -1, int(rng.integers(2**31 - 1)), False)
        return play(pool, slot, plans, sampled, control_steps, mixture, rng)

    try:
        return once()
    except FpoError:
        return once()


def record_mixture(
    env: str,
    mixture: Mixture,
    num_episodes: int,
    seed: int = 0,
    workers: int | None = None,
    control_steps: int = 120,
    options: LiberoOptions | None = None,
    on_progress: Callable[[int], None] = lambda episodes: None,
) -> Demonstrations:
    """Records `num_episodes` episodes of the task `env` (suite/task), from resets sampled from its regions.

    Of a whole suite, its tasks get equal shares, one after another. Episode i depends on (env, num_episodes, seed, i)
    only, not on the number of worker processes (`workers`, default: one per CPU). `on_progress(i + 1)` is called as
    episode i arrives, in order.

    Raises FpoError for a task that the expert cannot do, for fewer episodes than tasks, and where one broke off twice.
    """
    suite, _, name = env.partition("/")
    pool = libero.start_pool(suite, (), START_STEPS, options or LiberoOptions())
    workers = workers or num_cpus()
    pool.prepare(workers)
    idle: SimpleQueue[int] = SimpleQueue()
    for slot in range(workers):
        idle.put(slot)
    try:
        known = pool.ask({"op": "tasks"})["suites"][suite]
        names = [task["name"] for task in known]
        numbers = [libero.find_task(suite, name, names)] if name else range(len(known))
        plans = {number: make_plans(known[number]) for number in numbers}
        if num_episodes < len(numbers):
            raise FpoError(f"{suite} has {len(numbers)} tasks: record at least as many episodes, not {num_episodes}.")

        def episode(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
            number = numbers[index * len(numbers) // num_episodes]
            slot = idle.get()
            try:
                return _record_episode(pool, slot, number, plans[number], (seed, index), control_steps, mixture)
            finally:
                idle.put(slot)

        episodes = []
        with ThreadPoolExecutor(workers) as threads:
            for result in threads.map(episode, range(num_episodes)):
                episodes.append(result)
                on_progress(len(episodes))
    finally:
        pool.close()
    proprio, objects, actions, success = (np.stack(column) for column in zip(*episodes, strict=True))
    return Demonstrations(proprio, objects.reshape(*actions.shape[:2], -1), actions, success)
