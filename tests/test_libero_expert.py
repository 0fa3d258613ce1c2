"""LIBERO's scripted expert: its geometry by hand, its phases on a hand without weight, and in LIBERO itself."""

import clone_libero
import numpy as np
import pytest

from fpo_jax.config import LIBERO_BUTTER, LiberoOptions
from fpo_jax.envs import libero
from fpo_jax.envs import libero_expert as expert
from fpo_jax.envs.host import Episode
from fpo_jax.types import FpoError
from libero_venv import installed
from tiny_libero import fake_libero

TASK = {"name": "butter", "objects": ["ketchup_1", "butter_1", "wooden_tray_1"]}
TASK["goal"] = "(In butter_1 wooden_tray_1_contain_region)"
BUTTER, TRAY = np.array([0.05, 0.05, 0.445]), np.array([0.0, 0.26, 0.437])
POINTING_DOWN = np.array([np.pi, 0.0, 0.0])


def scene(butter: np.ndarray = BUTTER, yaw: float = 0.0) -> np.ndarray:
    objects = np.zeros((3, 7), np.float32)
    objects[:, 3] = 1.0
    objects[0, :3], objects[1, :3], objects[2, :3] = (-0.2, -0.2, 0.5), butter, TRAY
    objects[1, 3:] = np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)
    return objects


class Hand:
    """Goes where it is told at once, without weight; what is between its fingers when they close goes with it."""

    def __init__(self, objects: np.ndarray):
        self.objects, self.held, self.yaw = objects.copy(), False, 0.0
        self.position = np.array([-0.05, 0.0, 0.7])
        self.closed_at: np.ndarray | None = None

    def proprio(self) -> np.ndarray:
        half = self.yaw / 2  # a half turn about x, then the yaw: a half turn about an axis between x and y
        down = np.pi * np.array([np.cos(half), np.sin(half), 0.0])
        return np.concatenate([self.position, down, [0.04, -0.04]]).astype(np.float32)

    def step(self, action: np.ndarray) -> None:
        moved = expert.REACH * expert.REACHED * action[:3]
        self.position, self.yaw = self.position + moved, self.yaw + expert.TURN * expert.REACHED * action[5]
        if action[6] > 0 and self.closed_at is None:
            self.closed_at = self.position.copy()
            self.held = bool(np.all(np.abs(self.position - self.objects[1, :3]) < [0.04, 0.02, 0.01]))
        self.held &= action[6] > 0
        if self.held:
            self.objects[1, :3] += moved


def run(plan: expert.Plan, objects: np.ndarray, steps: int = 150) -> tuple[Hand, list[str]]:
    hand, state, phases = Hand(objects), expert.begin(plan, Hand(objects).proprio(), objects), []
    for _ in range(steps):
        action, state = expert.act(plan, state, hand.proprio(), hand.objects)
        assert np.all(np.abs(action) <= 1)
        hand.step(action)
        phases.append(expert.PHASES[state.phase])
    return hand, phases


def test_rotations_by_hand():
    quarter = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(expert.rotation(np.array([0, 0, np.pi / 2])), quarter, atol=1e-12)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(expert.rotation_of_quaternion(np.array([half, 0, 0, half])), quarter, atol=1e-12)
    np.testing.assert_array_equal(expert.rotation(np.zeros(3)), np.eye(3))


@pytest.mark.parametrize(("axis", "yaw"), [((0, 1, 0), 0.0), ((0, -1, 0), 0.0), ((-0.5, 0.5, 0), np.pi / 4)])
def test_an_axis_has_a_yaw_but_no_sign(axis, yaw):
    assert expert.axis_yaw(np.array(axis, float)) == pytest.approx(yaw, abs=1e-12)


def test_a_goal_with_two_things_makes_two_plans():
    goal = "(In ketchup_1 wooden_tray_1_contain_region) (In butter_1 wooden_tray_1_contain_region)"
    assert [plan.item for plan in expert.make_plans(TASK | {"goal": goal})] == [0, 1]


def test_the_goal_makes_the_plan():
    plan = expert.make_plans(TASK)[0]
    assert (plan.item, plan.target) == (1, 2) and plan.container == expert.CONTAINERS["wooden_tray"]


@pytest.mark.parametrize(
    "goal",
    [
        "",
        "(On butter_1 plate_1)",
        "(In wine_bottle_1 wooden_tray_1_contain_region)",
        "(In butter_1 wooden_tray_1_contain_region) (Close cabinet_1_top_region)",
    ],
)
def test_other_goals_are_refused(goal):
    with pytest.raises(FpoError, match="cannot do 'butter'"):
        expert.make_plans(TASK | {"goal": goal})


def test_it_carries_the_object_into_the_container():
    hand, phases = run(expert.make_plans(TASK)[0], scene())
    assert list(dict.fromkeys(phases)) == list(expert.PHASES)
    container = expert.CONTAINERS["wooden_tray"]
    np.testing.assert_allclose(hand.objects[1, :2], TRAY[:2] + container.centre, atol=2 * expert.ARRIVED)
    np.testing.assert_allclose(hand.objects[1, 2], TRAY[2] + container.lower, atol=2 * expert.ARRIVED)
    assert not hand.held


def test_a_displaced_grasp_closes_beside_the_object_and_carries_nothing():
    plan = expert.make_plans(TASK)[0]
    hand, phases = run(plan._replace(grasp_offset=(0.065, 0.0)), scene())
    assert hand.closed_at is not None
    np.testing.assert_allclose(hand.closed_at, BUTTER + np.array([0.065, 0, 0]), atol=expert.ARRIVED)
    np.testing.assert_allclose(hand.objects[1, :3], BUTTER, atol=1e-6)
    assert phases[-1] == "retreat"  # it goes through the whole motion


@pytest.mark.parametrize("yaw", [0.6, -0.6, 0.6 + np.pi])
def test_the_fingers_turn_to_the_narrow_side(yaw):
    hand, _ = run(expert.make_plans(TASK)[0], scene(yaw=yaw))
    assert (hand.yaw - yaw + np.pi / 2) % np.pi - np.pi / 2 == pytest.approx(0.0, abs=expert.ALIGNED)


def test_a_phase_that_gets_nowhere_ends_all_the_same():
    plan, objects = expert.make_plans(TASK)[0], scene()
    hand = Hand(objects)
    state = expert.begin(plan, hand.proprio(), objects)
    for _ in range(6 * expert.PATIENCE):
        _, state = expert.act(plan, state, hand.proprio(), objects)  # the hand is stuck
    assert expert.PHASES[state.phase] == "retreat"


def test_mixture_draws_by_the_rule():
    mixture = expert.Mixture(displaced_fraction=0.5, displacement=0.065, middle=0.05, jitter=0.003)
    rng = np.random.default_rng(0)
    for x, sign in ((0.03, 1), (0.07, -1)):
        offsets = np.array([mixture.grasp_offset(np.array([x, 0.05, 0.44]), rng) for _ in range(400)])
        displaced = np.abs(offsets[:, 0]) > 0.03
        assert abs(displaced.mean() - 0.5) < 0.1  # four standard errors
        np.testing.assert_allclose(offsets[displaced, 0], sign * 0.065, atol=0.015)
        np.testing.assert_allclose(offsets[~displaced], 0, atol=0.015)
        np.testing.assert_allclose(offsets[:, 1].std(), 0.003, atol=0.001)


def test_a_demonstration_that_breaks_off_is_played_once_more(monkeypatch):
    tries = []

    def play(pool, slot, plans, episode, control_steps, mixture, rng):
        tries.append((episode.seed, rng.random()))
        if len(tries) % 3:
            raise FpoError("A demonstration broke off: died")
        return np.zeros((1, 8)), np.zeros((1, 32, 7)), np.zeros((1, 7)), True

    monkeypatch.setattr(expert, "play", play)
    told = (0, 3, expert.make_plans(TASK), (0, 5), 1, expert.Mixture())
    with fake_libero() as env:
        with pytest.raises(FpoError, match="died"):
            expert._record_episode(env.vector, *told)
        assert expert._record_episode(env.vector, *told)[3] and len(tries) == 3
    assert len(set(tries)) == 1  # the same episode


def test_the_cloning_command_hands_on_where_libero_lies(monkeypatch, tmp_path):
    given, options = [], LiberoOptions(python="/elsewhere")
    monkeypatch.setattr(clone_libero, "make_env", lambda *_, libero, **__: given.append(libero))
    monkeypatch.setattr(clone_libero, "record_mixture", lambda *told: given.append(told[6]))
    monkeypatch.setattr(clone_libero, "Subject", lambda about, mixture, env, record: record)
    monkeypatch.setattr(clone_libero, "make_base", lambda args, record: record(print))
    clone_libero.main(clone_libero.Args(out=tmp_path, libero=options))
    assert given == [options, options]


@pytest.mark.libero
def test_in_libero_it_succeeds_and_a_displaced_grasp_fails():
    installed()
    suite, _, name = LIBERO_BUTTER.env.partition("/")
    pool = libero.start_pool(suite, (), expert.START_STEPS, LiberoOptions())
    try:
        known = pool.ask({"op": "tasks"})["suites"][suite]
        number = libero.find_task(suite, name, [task["name"] for task in known])
        (plan,) = expert.make_plans(known[number])
        poor = plan._replace(grasp_offset=(0.065, 0.0))
        for init in (0, 25, 49):
            episode = Episode(0, number, init, 0, True)
            proprio, objects, actions, success = expert.play(pool, 0, [plan], episode, 100)
            assert success and proprio.shape == (100, 8) and objects.shape == (100, 32, 7) and actions.shape == (100, 7)
            assert not expert.play(pool, 0, [poor], episode, 100)[3]
    finally:
        pool.close()


@pytest.mark.libero
def test_in_libero_it_puts_both_things_into_the_basket():
    installed()
    pool = libero.start_pool("libero_10", (), expert.START_STEPS, LiberoOptions())
    try:
        plans = expert.make_plans(pool.ask({"op": "tasks"})["suites"]["libero_10"][7])
        episode = Episode(0, 7, 0, 0, True)
        assert expert.play(pool, 0, plans, episode, 250)[3]
        assert not expert.play(pool, 0, plans[:1], episode, 250)[3]  # one is not enough
    finally:
        pool.close()


@pytest.mark.libero
def test_recording_does_not_depend_on_the_number_of_workers():
    installed()
    one, two = (expert.record_mixture(LIBERO_BUTTER.env, expert.Mixture(), 2, 3, n, control_steps=30) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.object_pose.shape == (2, 30, 224)
    assert np.abs(one.proprio[0] - one.proprio[1]).max() > 1e-3


@pytest.mark.libero
def test_a_suite_s_tasks_get_equal_shares():
    installed()
    environments = ("libero_object", "libero_object/5")
    suite, alone = (expert.record_mixture(env, expert.Mixture(), 10, control_steps=2) for env in environments)
    np.testing.assert_array_equal(suite.object_pose[5], alone.object_pose[5])
    assert np.abs(suite.object_pose[4] - alone.object_pose[4]).max() > 1e-3
    with pytest.raises(FpoError, match="libero_object has 10 tasks: record at least as many episodes, not 9"):
        expert.record_mixture("libero_object", expert.Mixture(), 9)
