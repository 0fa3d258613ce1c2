"""Simulators on the host as an `Env`: pure but for the ticket, in turns, and with every episode accounted for."""

import time
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from env_contract import assert_states_equal
from fpo_jax.envs import workers
from fpo_jax.envs.host import HostEnv, Outcome
from fpo_jax.rollout import FrozenBase, python_rollout, start
from fpo_jax.types import Camera, Env, EnvState, FpoError, HostedEnv
from test_rollout import plain
from tiny import TINY, jit, keys, run_rollout
from tiny_libero import FAKE, NoisyBase, base_system, fake_libero, log_of, pool_of


@pytest.fixture(scope="module")
def env():
    with fake_libero() as env:
        yield env


@pytest.fixture(scope="module")
def seeing():
    with fake_libero(cameras=(Camera("image", 16), Camera("wrist_image", 16))) as env:
        yield env


def without_ticket(state: EnvState) -> EnvState:
    """Tickets and slots say where a simulation is, not what it is."""
    zero = jnp.zeros_like(state.physics.ticket)
    return state._replace(physics=state.physics._replace(ticket=zero, slot=zero))


def begin(env: HostEnv, num: int = 4, seed: int = 0) -> EnvState:
    return jax.jit(env.reset)(keys(num, seed))


def still(num: int = 4) -> jax.Array:
    return jnp.zeros((num, 4, 7))


# --- the contract of environments, for simulations that cannot be taken back


def test_spec_and_observation(seeing):
    env, state = seeing, begin(seeing)
    assert isinstance(env, HostedEnv) and isinstance(env, Env)
    assert state.observation.proprio.shape == (4, 8) and state.observation.object_pose.shape == (4, 32 * 7)
    images = state.observation.images
    assert {name: image.shape for name, image in images.items()} == {
        "image": (4, 16, 16, 3),
        "wrist_image": (4, 16, 16, 3),
    }
    pictures = np.concatenate([np.asarray(image) for image in images.values()])
    assert len({picture.tobytes() for picture in pictures}) == 8  # each camera of each environment its own
    np.testing.assert_array_equal(state.observation.task, state.env_id)
    np.testing.assert_array_equal(state.observation.object_pose[:, 3], 1.0)  # wxyz
    assert not np.any(state.done) and not np.any(state.control_steps)


def test_an_episode_depends_on_its_key_alone(env):
    """Not on the environments beside it, nor on the slot, nor on the process that simulates it."""
    step = jax.jit(env.step)

    def play(keys):
        states = [jax.jit(env.reset)(keys)]
        chunk = jnp.tile(0.5 * jax.random.normal(jax.random.key(3), (1, 4, 7)), (len(keys), 1, 1))
        for _ in range(6):  # over an end and the reset after it
            states.append(step(states[-1], chunk))
        return [without_ticket(state) for state in states]

    def row(states, i):
        return [
            jax.tree.map(lambda leaf: leaf[i], state._replace(key=jax.random.key_data(state.key))) for state in states
        ]

    given = keys(4)
    together, reversed_, alone = play(given), play(given[::-1]), play(given[3:])
    for a, b, c in zip(row(together, 3), row(reversed_, 0), row(alone, 0), strict=True):
        for other in (b, c):
            jax.tree.map(np.testing.assert_array_equal, a, other)
    poses = np.asarray(together[0].observation.object_pose)
    assert len(np.unique(poses, axis=0)) == 4


def test_scan_equals_a_loop(env):
    @jax.jit
    def scanned(state):
        return jax.lax.scan(lambda state, _: (env.step(state, still()), None), state, length=6)[0]

    looped = begin(env)
    for _ in range(6):
        looped = env.step(looped, still())
    assert_states_equal(without_ticket(looped), without_ticket(scanned(begin(env))))


def test_last_chunk_is_shortened_and_the_time_limit_ends_the_episode():
    with fake_libero(episode_length=7) as env:
        state = begin(env)
        for steps in (3, 6, 7):
            assert not np.any(state.done)
            state = env.step(state, still())
            np.testing.assert_array_equal(state.control_steps, steps)
        assert np.all(state.truncated) and not np.any(state.terminated | state.fault)
        ended = state
        state = env.step(state, jnp.full((4, 4, 7), jnp.nan))  # ignored: this step begins other episodes
        assert not np.any(state.done) and not np.any(state.control_steps) and not np.any(state.reward)
        assert np.all(np.any(jax.random.key_data(state.key) != jax.random.key_data(ended.key), axis=-1))


def test_success_ends_a_chunk(env):
    state = begin(env)
    goal = state.observation.object_pose[:, :2]
    chunk = jnp.zeros((4, 4, 7)).at[..., :2].set(goal[:, None])
    state = env.step(state, chunk)
    # 3 steps of 0.25 bring it within 0.3 of 1
    np.testing.assert_array_equal(state.control_steps, 3)
    assert np.all(state.success & state.terminated & (state.reward == 1)) and not np.any(state.fault | state.truncated)


def test_actions_that_are_not_finite_are_a_failure_of_the_policy(env):
    """Not an invalid episode, which would raise the rate of success; and they cost no process."""
    begun = begin(env)
    pids = pool_of(env).pids()
    healthy = without_ticket(env.step(begin(env), still()))
    state = env.step(begin(env), still().at[0, 2, 6].set(jnp.nan))
    assert state.truncated.tolist() == [True, False, False, False] and not np.any(state.fault | state.success)
    np.testing.assert_array_equal(state.observation.object_pose[0], begun.observation.object_pose[0])
    assert state.physics.tally[0].sum(0).tolist() == [0, 1]
    others = [jax.tree.map(lambda leaf: leaf[1:], tree) for tree in (without_ticket(state), healthy)]
    assert_states_equal(*others)
    state = env.step(state, still())
    assert not np.any(state.fault) and state.control_steps.tolist() == [0, 6, 6, 6]
    assert pool_of(env).pids() == pids


def test_an_old_state_has_lost_its_episode(env):
    """Simulations cannot be taken back: a state may be stepped once, and a restored one of another process never."""
    old = begin(env)
    new = env.step(old, still())
    again = env.step(old, still())
    assert np.all(again.fault) and not np.any(again.success)
    assert np.all(env.step(new, still()).fault)  # `again` took its place
    foreign = begin(env)
    foreign = foreign._replace(physics=foreign.physics._replace(ticket=foreign.physics.ticket + 12345))
    state = env.step(foreign, still())
    assert np.all(state.fault) and not np.any(state.control_steps)
    state = env.step(state, still())
    assert not np.any(state.done)  # other episodes


def test_a_result_is_collected_once(env):
    flying = env.submit(begin(env), still())
    first, second = env.collect(flying), env.collect(flying)
    assert not np.any(first.fault) and np.all(second.fault)


def test_a_reset_is_collected_once(tmp_path):
    """A second time it is lost: it must not begin once more, in place of what the slot has come to since."""
    with fake_libero(told={"log": str(tmp_path)}) as env:
        over = begin(env)._replace(truncated=jnp.ones(4, bool))
        flying = env.submit(over, still())
        assert not np.any(env.collect(flying).fault) and np.all(env.collect(flying).fault)
        newer = env.submit(begin(env, seed=5), still())
        assert np.all(env.collect(flying).fault)  # of a stale ticket
        assert not np.any(env.collect(newer).fault)
    assert sum(entry["op"] == "reset" for entry in log_of(tmp_path)) == 3 * 4


def test_a_request_that_nobody_collects_does_not_disturb_the_next(env):
    env.submit(begin(env), still())
    expected, found = env.step(begin(env, seed=5), still()), begin(env, seed=5)
    env.submit(found, still())
    found = env.step(begin(env, seed=5), still())
    assert_states_equal(without_ticket(found), without_ticket(expected))


# --- rollouts


def test_rollout_equals_python_rollout_and_does_not_depend_on_the_turns(env):
    results = []
    for overlap, play in ((True, run_rollout), (True, python_rollout), (False, run_rollout)):
        env.overlap = overlap
        system = base_system(env)
        carry = jit(start, static_argnums=0)(system, keys(4))
        carry, transition, episodes = play(system, FrozenBase({}), None, carry, jax.random.key(1), 12)
        results.append(plain((carry._replace(env=without_ticket(carry.env)), transition, episodes)))
    env.overlap = True
    scanned, looped, plain_loop = results
    assert scanned[2].ended.sum() > 4 and scanned[2].success.any() and not scanned[2].fault.any()
    jax.tree.map(np.testing.assert_array_equal, scanned[2], looped[2])
    for other in (looped, plain_loop):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), scanned, other)


def test_an_odd_number_of_environments_takes_no_turns(env):
    system = base_system(env)
    carry = start(system, keys(3))
    _, transition, episodes = run_rollout(system, FrozenBase({}), None, carry, jax.random.key(1), 6)
    assert transition.reward.shape == (6, 3) and not episodes.fault.any()


class MeetingBase(NoisyBase):
    """Each decision waits for as many steps beside it as are `expected`, and ends them; the last one ends all."""

    def decode(self, params, context, noise):
        def decide(noise):
            expected, deadline = self.expected[len(self.met)], time.monotonic() + 60
            while len(steps := list(self.folder.glob("*.step"))) < expected and time.monotonic() < deadline:
                time.sleep(0.001)
            self.met.append(len(steps))
            if len(self.met) == len(self.expected):
                (self.folder / "alone").touch()
            for step in steps:
                step.unlink(missing_ok=True)
            return np.zeros_like(noise)  # nobody comes to a goal

        return jax.pure_callback(decide, jax.ShapeDtypeStruct(noise.shape, noise.dtype), noise)


@pytest.mark.parametrize("overlap", [False, True])
def test_halves_simulate_while_the_policy_decides(tmp_path, overlap):
    """With turns no step would end without a decision beside it; without them there is never a step beside one."""
    expected = [0] + 11 * [2] if overlap else 6 * [0]  # the first decision has nothing beside it
    if not overlap:
        (tmp_path / "alone").touch()
    with fake_libero(told={"meet": str(tmp_path)}, episode_length=60) as env:
        env.overlap = overlap
        base = MeetingBase(folder=tmp_path, expected=expected, met=[])
        system = base_system(env, base=base)
        carry = start(system, keys(4))
        _, _, episodes = run_rollout(system, FrozenBase({}), None, carry, jax.random.key(1), 6)
        assert not np.any(episodes.fault)
    assert base.met == expected


# --- faults: every episode counted once, as success, failure or invalid

FAULTS = {"die": 0.07, "nan": 0.07, "render": 0.07, "physics": 0.07, "garbage": 0.07, "step:hang": 0.01}


def test_a_hundred_faults_and_every_episode_accounted_for(tmp_path):
    num, decisions = 8, 28
    told = {"faults": FAULTS, "log": str(tmp_path)}
    # One step hangs. All others must be done within its deadline.
    with fake_libero(options=replace(FAKE, step_seconds=8.0, max_restarts=10_000), told=told) as env:
        system = base_system(env)
        first = start(system, keys(num, 4))
        _, transition, episodes = run_rollout(system, FrozenBase({}), None, first, jax.random.key(1), decisions)
        pool = pool_of(env)
        restarts, faults = pool.restarts, pool.faults
        ended, fault, success = (np.asarray(x) for x in (episodes.ended, episodes.fault, episodes.success))
    assert not np.any(ended & fault) and not np.any(success & ~ended)
    # a reset follows every end, and only that
    over = np.concatenate([np.asarray(first.env.fault)[None], (ended | fault)])
    begun = num + over[:-1].sum()
    counted = ended.sum() + fault.sum() + np.asarray(first.env.fault).sum()
    assert begun == counted + np.sum(~over[-1])
    # and the processes saw the same
    log = log_of(tmp_path)
    broken = [entry for entry in log if "broke" in entry]
    assert restarts == len(broken) > 100
    kinds = {"die": "died", "hang": "hung", "nan": "physics", "garbage": "protocol"}
    assert {entry["broke"] for entry in broken} == {name.split(":")[-1] for name in FAULTS}
    assert Counter(kinds.get(entry["broke"], entry["broke"]) for entry in broken) == faults
    at_reset = {str(e["episode"]) for e in broken if e["op"] == "reset"}  # these were begun twice, in vain
    at_step = [str(e["episode"]) for e in broken if e["op"] == "step"]
    assert len(at_step) == len(set(at_step)) and 2 * len(at_reset) + len(at_step) == len(broken)
    assert fault.sum() + np.asarray(first.env.fault).sum() == len(at_reset) + len(at_step)
    resets = {str(entry["episode"]) for entry in log if entry.get("op") == "reset"}
    assert len(resets) == begun
    assert ended.sum() > 10 and success.sum() > 0
    # what broke teaches nothing
    assert not np.any(np.asarray(transition.valid) & fault)
    for leaf in jax.tree.leaves(plain(transition)):
        assert np.isfinite(leaf).all()


def test_faults_strike_the_same_episodes_whatever_the_turns(tmp_path):
    """Results follow from keys, so from nothing that happened to the processes before."""
    found = []
    for overlap in (False, True):
        with fake_libero(options=replace(FAKE, max_restarts=1000), told={"faults": {"die": 0.2}}) as env:
            env.overlap = overlap
            system = base_system(env)
            _, _, episodes = run_rollout(system, FrozenBase({}), None, start(system, keys(4, 2)), jax.random.key(1), 12)
            found.append(plain(episodes))
    assert found[0].fault.any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)


def test_a_reset_that_fails_once_is_no_fault(tmp_path):
    with fake_libero(told={"die_once": str(tmp_path)}) as env:
        state = begin(env)
        assert not np.any(state.done) and pool_of(env).restarts == 1
        assert (tmp_path / "died").exists()


class BrokenVector:
    """Simulators that raise, which they must not."""

    def __init__(self):
        self.raising = False

    def prepare(self, slots): ...

    def submit_reset(self, slot, episode): ...

    def submit_step(self, slot, actions):
        raise RuntimeError

    def collect(self, slot):
        if self.raising:
            raise RuntimeError
        arrays = {"proprio": np.zeros(8, np.float32), "objects": np.zeros((32, 7), np.float32)}
        return Outcome("", arrays=arrays)

    def problem(self):
        return None

    def report(self):
        return {}

    def close(self): ...


def test_no_exception_leaves_a_callback(env):
    vector = BrokenVector()
    broken = HostEnv(vector, env.spec, env._sampler)
    state = jax.jit(broken.step)(begin(broken), still())
    assert np.all(state.fault)
    vector.raising = True
    assert np.all(begin(broken).fault)


def test_more_simulators_than_fit_are_refused_before_any_starts(monkeypatch):
    with fake_libero() as env:
        monkeypatch.setattr(workers, "available_memory", lambda: 3 * 2**30)
        with pytest.raises(FpoError, match=r"^64 simulators need about 16 GiB .* --num-envs 13 or fewer"):
            env.prepare(64)
        assert len(pool_of(env).pids()) == 1
        assert not np.any(begin(env).fault)


def test_suites_can_draw_by_success():
    with fake_libero(options=replace(FAKE, tasks="success")) as env:
        state = begin(env, 8)
        assert state.physics.tally.shape == (8, 3, 2) and not np.any(state.physics.tally)
        goal = state.observation.object_pose[:, :2]
        solved = state.env_id == 0  # the others stand still until the time limit
        for _ in range(4):
            chunk = jnp.where(solved[:, None, None], jnp.zeros((8, 4, 7)).at[..., :2].set(goal[:, None]), still(8))
            state = jax.jit(env.step)(state, chunk)
        tally = np.asarray(state.physics.tally)
        for i, task in enumerate(np.asarray(state.env_id)):
            if not solved[i]:
                assert tally[i, task].tolist() == [0, 1]
        tally = jnp.array([[5.0, 10], [10, 10], [0, 10]])
        env_id = np.asarray(env._sampler.draw(keys(600), tally, jnp.arange(600)).env_id)
        shares = np.bincount(env_id, minlength=3) / 600
        assert shares[0] > 0.45 and abs(shares[1] - shares[2]) < 0.1 and shares.min() > 0.1
    assert TINY.libero.tasks == "uniform"
