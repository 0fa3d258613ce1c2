"""The trace of who works when."""

import jax
import libero_overlap as script
import numpy as np
import pytest

from fpo_jax.analysis import Span
from fpo_jax.rollout import FrozenBase
from tiny import begin, keys, run_rollout
from tiny_libero import base_system, fake_libero, pool_of


def test_spans_of_a_trace():
    """Two slots in turns: the policy's first decision for slot 1 follows the request of slot 0."""
    told = [
        ("submitted", 0, 10.0),
        ("submitted", 1, 11.0),
        ("answered", 0, 13.0),
        ("collected", 0, 13.5),
        ("submitted", 0, 15.0),
        ("answered", 1, 14.0),
        ("collected", 1, 15.5),
        ("submitted", 1, 16.0),
        ("answered", 0, 17.0),
        ("collected", 0, 17.0),
    ]
    spans = script.spans_of([script.Event(*event) for event in told], 2, ("a", "b"))
    assert spans == [
        Span("policy", "b", 0.0, 1.0),
        Span("policy", "a", 3.5, 5.0),
        Span("policy", "b", 5.5, 6.0),
        Span("simulator 0", "a", 0.0, 3.0),
        Span("simulator 0", "a", 5.0, 7.0),
        Span("simulator 1", "b", 1.0, 4.0),
    ]
    assert script.hidden_share(spans) == pytest.approx((1.0 + 0.5 + 0.5) / 3.0)


def test_those_who_work_together_hide_nothing():
    told = [("submitted", 0, 0.0), ("submitted", 1, 0.1), ("answered", 0, 1.0), ("answered", 1, 2.0)]
    told += [("collected", 0, 2.0), ("collected", 1, 2.1), ("submitted", 0, 3.0), ("submitted", 1, 3.1)]
    spans = script.spans_of([script.Event(*event) for event in told], 2, ("all",))
    assert [span for span in spans if span.who == "policy"] == [Span("policy", "all", 2.1, 3.0)]
    assert script.hidden_share(spans) == 0.0


@pytest.mark.parametrize("overlap", [True, False])
def test_a_rollout_is_traced(overlap):
    with fake_libero(told={"step_seconds": 0.02}) as env:
        env.vector = traced = script.Traced(pool_of(env))
        env.overlap = overlap
        system = base_system(env)
        state = jax.block_until_ready(begin(system, keys(4)))
        traced.events.clear()
        run_rollout(system, FrozenBase({}), None, state, jax.random.key(0), 3)
        jax.effects_barrier()
        spans = script.spans_of(traced.events, 4, ("first half", "second half") if overlap else ("all",))
    for slot in range(4):
        times = [event.time for event in traced.events if event.slot == slot]
        assert len(times) == 9 and times == sorted(times)
    simulating = [span for span in spans if span.who != "policy"]
    assert len(simulating) == 12 and all(span.end - span.begin > 0.02 for span in simulating)
    assert len(spans) - len(simulating) == (5 if overlap else 2)
    assert 0.0 <= script.hidden_share(spans) <= 1.0 and np.isfinite(script.hidden_share(spans))
    assert overlap or script.hidden_share(spans) == 0.0
