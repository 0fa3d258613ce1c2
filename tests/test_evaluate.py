import json
import math
import re
from contextlib import closing, contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from fpo_jax.algorithms import fixed, fpo
from fpo_jax.config import RolloutConfig, TrainConfig
from fpo_jax.evaluate import (
    EpisodeLog,
    Evaluator,
    Outcomes,
    compare,
    competition_rank,
    paired_difference,
    report,
    success_summary,
    summarize,
    versus,
)
from fpo_jax.metrics import paired_difference_interval, wilson_interval
from fpo_jax.rollout import FrozenBase
from fpo_jax.runs import build
from fpo_jax.types import EnvSpec, FpoError
from tiny import TINY, init_fpo, jit, make_system, perturbed, scripted_system


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        yield


def outcomes(success, invalid=None, control_steps=None) -> Outcomes:
    success = np.array(success, bool)
    invalid = np.zeros(len(success), bool) if invalid is None else np.array(invalid, bool)
    steps = np.full(len(success), 8) if control_steps is None else np.array(control_steps)
    return Outcomes(success, steps, success.astype(np.float32), invalid)


def assert_same_episodes(one: Outcomes, other: Outcomes) -> None:
    for name, a, b in zip(Outcomes._fields, one, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.fixture(scope="module")
def point_mass():
    """(evaluator of 10 episodes in batches of 4, fresh FPO agent)."""
    system = make_system()
    return Evaluator(system, FrozenBase({}), episodes=10, seed=5, batch=4), init_fpo(
        TINY, system.dims, jax.random.key(0)
    )


# --- pairing


def test_a_fresh_agent_repeats_the_base_episode_by_episode(point_mass):
    evaluator, agent = point_mass
    base = evaluator.play_base()
    assert len(base.success) == 10 and 0 < base.success.sum() < 10  # so that agreement means something
    assert_same_episodes(base, evaluator.play(agent))
    assert_same_episodes(evaluator.play_base(noise_seed=3), evaluator.play(agent, noise_seed=3))


def test_a_fresh_agent_repeats_the_base_on_aloha():
    """With the shipped base, in episodes too short to succeed in; whole ones are in test_base_policy."""
    config = replace(TINY, env="aloha_transfer_cube", episode_length=10, execute_steps=5)
    system, params = build(config)
    evaluator = Evaluator(system, FrozenBase(params), episodes=5, seed=0)
    base, fresh = evaluator.play_base(), evaluator.play(fpo.init(config, system.dims, jax.random.key(1)))
    assert_same_episodes(base, fresh)
    assert np.all(base.control_steps == 10) and not np.any(base.success | base.invalid)


def test_an_agent_that_has_learned_something_differs(point_mass):
    evaluator, agent = point_mass
    learned = evaluator.play(agent._replace(actor=perturbed(agent.actor, scale=1.0)))
    assert np.any(learned.success != evaluator.play_base().success)


def test_playing_again_gives_the_same_and_another_noise_seed_does_not(point_mass):
    evaluator, _ = point_mass
    assert_same_episodes(evaluator.play_base(), evaluator.play_base())
    assert np.any(evaluator.play_base(noise_seed=1).success != evaluator.play_base().success)


@pytest.mark.parametrize("episode", [0, 3, 4, 9])
def test_keys_of_an_episode_replay_it(point_mass, episode):
    evaluator, agent = point_mass
    env_keys, noise_key, column = evaluator.keys_of(episode, noise_seed=2)
    replayed = evaluator.play_from(agent, env_keys, noise_key)
    played = evaluator.play(agent, noise_seed=2)
    assert [field[column] for field in replayed] == [field[episode] for field in played]


def test_noise_seeds_share_the_initial_states(point_mass):
    evaluator, _ = point_mass
    (keys, noise, _), (other_keys, other_noise, _) = evaluator.keys_of(7, 0), evaluator.keys_of(7, 1)
    assert np.all(keys == other_keys) and noise != other_noise
    all_keys = np.concatenate([jax.random.key_data(evaluator.keys_of(first)[0]) for first in (0, 4, 8)])
    assert len(np.unique(all_keys, axis=0)) == 12  # every environment of every batch has its own


def test_a_batch_is_never_larger_than_the_episodes():
    evaluator = Evaluator(make_system(replace(TINY, num_envs=128)), FrozenBase({}), episodes=3, seed=0)
    assert evaluator.num_batches == 1 and len(evaluator.play_base().success) == 3


# --- going on


ABOUT = {"env": "point_mass", "seed": 5, "iteration": 3, "protocol": {"cameras": ["image"], "opengl": None}}


@contextmanager
def episode_log(path, about=ABOUT, say=None):
    with closing(EpisodeLog(path, about, say)) as log:
        yield log


def count_batches(monkeypatch, stop_before: int | None = None) -> list[int]:
    """Grows with every batch that is played; Ctrl-C comes before the batch of this number."""
    played, play_from = [], Evaluator.play_from

    def spy(self, *args):
        if len(played) == stop_before:
            raise KeyboardInterrupt
        played.append(len(played))
        return play_from(self, *args)

    monkeypatch.setattr(Evaluator, "play_from", spy)
    return played


def test_an_evaluation_goes_on_where_it_was_interrupted(point_mass, tmp_path, monkeypatch):
    evaluator, _ = point_mass
    whole, path, said = evaluator.play_base(), tmp_path / "base.jsonl", []
    policy = evaluator.base_agent, evaluator.base_system
    with monkeypatch.context() as patch:
        assert count_batches(patch, stop_before=2) == []
        with episode_log(path, say=said.append) as log, pytest.raises(KeyboardInterrupt):
            evaluator.play(*policy, log=log)
    assert [json.loads(line)["episode"] for line in path.read_text().splitlines()[1:]] == list(range(8))
    assert said[-1] == f"base: 8 episodes so far, {whole.success[:8].sum()} successes"
    text = path.read_text()
    path.write_text(text[: text.rindex(":")])  # a line cut short: its batch is played again
    played = count_batches(monkeypatch)
    with episode_log(path) as log:
        assert_same_episodes(whole, evaluator.play(*policy, log=log))
    assert len(played) == 2
    with episode_log(path) as log:
        assert_same_episodes(whole, evaluator.play(*policy, log=log))
    assert len(played) == 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"evaluation": ABOUT} and sorted(line["episode"] for line in lines[1:]) == list(range(10))


def test_what_is_reported_is_what_the_log_holds(point_mass, tmp_path, monkeypatch):
    """Of a batch that was half written the old lines stay, so they count too."""
    evaluator, _ = point_mass
    found = outcomes([1, 0, 1, 0])._replace(env_id=np.zeros(4, np.int32))
    monkeypatch.setattr(Evaluator, "play_from", lambda *_: found)
    with episode_log(tmp_path / "base.jsonl") as log:
        log.write(range(1), outcomes([0])._replace(env_id=np.zeros(1, np.int32)))
        played = evaluator.play(None, log=log)
    with episode_log(tmp_path / "base.jsonl") as log:
        assert_same_episodes(played, log.read(range(10)))
    assert played.success.tolist() == [False, False, True, False, *found.success, *found.success[:2]]


def test_episodes_of_another_evaluation_are_refused(tmp_path):
    path = tmp_path / "tuned.jsonl"
    with episode_log(path):
        pass
    for about, change in (
        (ABOUT | {"iteration": 4}, "iteration: 3 -> 4"),
        (ABOUT | {"seed": 6}, "seed: 5 -> 6"),
        (ABOUT | {"protocol": {"cameras": ["image"], "opengl": "egl"}}, "protocol.opengl: None -> egl"),
        (ABOUT | {"protocol": {"cameras": ["image", "wrist"], "opengl": None}}, "protocol.cameras.1: None -> wrist"),
    ):
        with pytest.raises(FpoError) as refused:
            EpisodeLog(path, about)
        assert f"of another evaluation ({change}): choose another --json" in str(refused.value)
    path.write_text('{"iteration": 1}\n')
    with pytest.raises(FpoError, match="holds no episodes"):
        EpisodeLog(path, ABOUT)


def test_a_log_keeps_what_broke_and_every_bit(tmp_path):
    given = outcomes([1, 0, 0], invalid=[0, 0, 1], control_steps=[3, 9, 2])._replace(
        ret=np.float32([0.1, 1 / 3, 0]), env_id=np.array([2, 0, 1])
    )
    path = tmp_path / "base.jsonl"
    with episode_log(path) as log:
        assert log.read(range(3)) is None
        log.write(range(3), given)
    with episode_log(path) as log:
        found = log.read(range(3))
        assert found is not None and log.read(range(4)) is None
    assert_same_episodes(given, found)
    assert [column.dtype for column in found] == [bool, np.int32, np.float32, bool, np.int32]


# --- outcomes


def test_outcomes_of_a_script():
    """Decisions of two steps: 0 succeeds at its third, 1 runs out of time after four, 2 breaks at its third."""
    config = TrainConfig(rollout=RolloutConfig(gamma=0.9))
    system = scripted_system(config, success_at=(3, 0, 0), fault_at=(0, 0, 3))
    evaluator = Evaluator(system, FrozenBase({}), episodes=3, seed=0)
    result = evaluator.play(fixed.base(4), evaluator.fixed_system)
    np.testing.assert_array_equal(result.success, [True, False, False])
    np.testing.assert_array_equal(result.invalid, [False, False, True])
    np.testing.assert_array_equal(result.control_steps, [6, 8, 6])
    np.testing.assert_allclose(result.ret, [0.9**2, 0, 0], rtol=1e-6)


def test_summary_leaves_invalid_episodes_out():
    summary = success_summary(
        outcomes([1, 0, 0, 0, 1], invalid=[0, 0, 0, 1, 0], control_steps=[4, 8, 8, 1000, 2]),
    )
    rate, low, high = wilson_interval(2, 4)
    assert summary == {
        "success_rate": rate,
        "low": low,
        "high": high,
        "episodes": 4,
        "invalid_episodes": 1,
        "return": 0.5,
        "episode_length": 5.5,
    }


def test_summary_of_nothing_valid():
    summary = success_summary(outcomes([0, 0], invalid=[1, 1]))
    assert math.isnan(summary["success_rate"]) and math.isnan(summary["episode_length"])
    assert (summary["low"], summary["high"], summary["episodes"], summary["invalid_episodes"]) == (0.0, 1.0, 0, 2)


def test_difference_is_over_the_episodes_valid_in_both():
    base = outcomes([0, 0, 1, 1, 0, 0], invalid=[0, 0, 0, 0, 1, 0])
    tuned = outcomes([1, 1, 1, 0, 1, 1], invalid=[0, 0, 0, 0, 0, 1])
    expected = paired_difference_interval(np.array([0, 0, 1, 1]), np.array([1, 1, 1, 0]))
    assert paired_difference(base, tuned) == expected
    assert expected.estimate == pytest.approx(0.25)


def test_the_result_as_json():
    result = json.loads(json.dumps(compare(outcomes([0, 0, 1, 0]), outcomes([1, 0, 1, 1]))))
    assert result.keys() == {"base", "tuned", "difference"}
    for policy in ("base", "tuned"):
        expected = {"success_rate", "low", "high", "episodes", "invalid_episodes", "return", "episode_length"}
        assert result[policy].keys() == expected
    assert result["difference"].keys() == {"success_rate", "low", "high", "interval"}
    assert (result["base"]["success_rate"], result["tuned"]["success_rate"]) == (0.25, 0.75)
    assert result["difference"]["success_rate"] == 0.5
    assert result["difference"]["low"] < 0.5 < result["difference"]["high"]


SUITE = EnvSpec("suite", 7, 8, 0, 8, 2, 20.0, tasks=("open", "close", "lift"), test_episodes=6)


def test_tasks_of_a_suite_are_counted_apart():
    """And one task that was not played is not there."""
    played = outcomes([1, 0, 0, 0, 1, 1], invalid=[0, 0, 0, 1, 0, 0])._replace(env_id=np.array([0, 2, 0, 2, 0, 2]))
    summary = summarize({"base": played}, SUITE)["base"]
    assert (summary["success_rate"], summary["episodes"], summary["invalid_episodes"]) == (3 / 5, 5, 1)
    assert summary["tasks"].keys() == {"open", "lift"}
    lift = summary["tasks"]["lift"]
    assert (lift["success_rate"], lift["low"], lift["high"]) == tuple(wilson_interval(1, 2))
    assert (lift["episodes"], lift["invalid_episodes"]) == (2, 1)
    text = report({"base": summary})
    assert re.search(r"^lift: base 0.500 \[0.\d+, 0.\d+\] of 2$", text, re.MULTILINE)
    assert "over 5 episodes (1 invalid, not counted), 8 steps each" in text


def test_fewer_episodes_than_the_protocol_has_are_a_deviation():
    official = {"versions": {}, "deviations": {"seeds": "episode instead of openpi"}}
    spec = SUITE._replace(protocol=official)
    assert summarize({"base": outcomes([1] * 6)}, spec)["protocol"] == official
    part = summarize({"base": outcomes([1] * 3)}, spec)
    assert part["protocol"]["deviations"] == official["deviations"] | {"episodes": "3 instead of 6"}
    assert "seeds: episode instead of openpi; episodes: 3 instead of 6" in report(part)
    assert len(official["deviations"]) == 1


def test_ties_share_the_best_rank():
    np.testing.assert_array_equal(competition_rank(np.array([0.2, 0.9, 0.5, 0.5])), [4, 1, 2, 2])
    np.testing.assert_array_equal(competition_rank(np.array([0.5, 0.5])), [1, 1])


def test_a_floor_is_compared_with_the_tuned_policy():
    floor, tuned = outcomes([0, 0, 1, 0]), outcomes([1, 0, 1, 1])
    result = versus(floor, tuned)
    above = result.pop("tuned_above")
    assert result == success_summary(floor)
    assert above == compare(floor, tuned)["difference"] and above["success_rate"] == 0.5


def test_the_result_in_words():
    tuned = outcomes([1, 0, 1, 1])
    result = compare(outcomes([0, 0, 1, 0]), tuned)
    text = report(result | {"floors": {"zero_noise": versus(outcomes([0, 0, 0, 0]), tuned)}})
    for pattern in (
        r"^ *base: success 0.250 \[0.\d+, 0.\d+\] over 4 episodes, 8 steps each$",
        r"^ *tuned: success 0.750 \[",
        r"^ *zero_noise: success 0.000 \[0.000, ",
        r"^tuned - +base: \+0.500 \[.*\] \(Newcombe",
        r"^tuned - +zero_noise: \+0.750 \[",
    ):
        assert re.search(pattern, text, re.MULTILINE), f"{pattern} not in\n{text}"
