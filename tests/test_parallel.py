"""Many devices give what one gives, with nothing exchanged that need not be."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import checkpoint, flow, hosts, parallel, train
from fpo_jax.algorithms import fpo
from fpo_jax.config import ParallelOptions
from fpo_jax.envs.aloha_mujoco import AlohaMujoco
from fpo_jax.evaluate import Evaluator
from fpo_jax.policies.openpi import OpenpiPolicy
from fpo_jax.policies.pi0 import init as init_pi0
from fpo_jax.rollout import FrozenBase, rollout, start
from fpo_jax.types import FpoError, Observation
from test_rollout import plain
from tiny import TINY, init_fpo, keys, make_system, perturbed, train_on
from tiny_libero import LIBERO, base_system, fake_libero
from tiny_pi0 import ALOHA, MODEL, STATS

TWO = parallel.make_mesh(ParallelOptions(devices=2), 4)
SPLIT_BASE = parallel.make_mesh(ParallelOptions(devices=2, fsdp=2), 4)


def close(ours, theirs, tolerance=1e-5):
    chex.assert_trees_all_close(plain(ours), plain(theirs), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def alone():
    return train_on(None, make_system())


@pytest.fixture(scope="module")
def split():
    return train_on(TWO, make_system())


# --- per-sample mathematics


def test_vmap_jit_shard_map_and_pmap_agree():
    """The actor's latents, the critics' values and the flow-matching loss of eight samples, computed four ways."""
    system = make_system()
    agent = init_fpo(TINY, system.dims, jax.random.key(0))
    agent = agent._replace(actor=perturbed(agent.actor), critic=perturbed(agent.critic))
    state, latent = jax.random.normal(jax.random.key(1), (2, 8, system.dims.state))
    latent, sample_keys = latent[:, : system.dims.latent], keys(8)

    def batch(state, latent, keys):
        velocity = partial(fpo.velocity, TINY.actor)
        return (
            fpo.sample_latent(TINY, agent, state, keys),
            fpo.ensemble_q(TINY.critic, agent.critic, state, latent).T,
            flow.cfm_loss(velocity, agent.actor, state, latent, keys, TINY.actor.cfm_draws),
        )

    def one(state, latent, key):
        return jax.tree.map(lambda leaf: leaf[0], batch(state[None], latent[None], key[None]))

    expected = jax.jit(batch)(state, latent, sample_keys)
    close(jax.jit(jax.vmap(one))(state, latent, sample_keys), expected)
    with parallel.using(TWO):
        mapped = parallel.over_devices(batch, (parallel.ENVS,) * 3, parallel.ENVS)
        close(jax.jit(mapped)(state, latent, sample_keys), expected)
    halves = [leaf.reshape(2, 4, *leaf.shape[1:]) for leaf in (state, latent, sample_keys)]
    pmapped = jax.pmap(batch, devices=jax.devices()[:2])(*halves)
    close(jax.tree.map(lambda leaf: leaf.reshape(8, *leaf.shape[2:]), pmapped), expected)


# --- training


def test_two_devices_train_as_one(alone, split):
    for one, two in zip(alone.metrics, split.metrics, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
    close(split.state, alone.state, 1e-4)
    assert split.state.rollout.episode_return.sharding.spec == parallel.ENVS
    assert split.state.agent.actor["params"]["velocity"]["bias"].sharding.is_fully_replicated


def test_one_program_for_all_iterations(alone, split):
    assert alone.compilations == split.compilations == []


def test_what_two_devices_exchange(split):
    """Nothing in the rollout, all samples once for the update, and the gradients."""
    system = make_system()
    with parallel.using(TWO):
        state = parallel.placed(jax.eval_shape(partial(train.init, system), {}), train.PLACES)
        compiled = jax.jit(partial(rollout, system, num_decisions=5)).lower(
            FrozenBase({}), state.agent, state.rollout, state.key
        )
        assert not re.search("all-|collective|reduce-scatter", compiled.compile().as_text())
        assert "all-reduce" in split.iterate.lower({}, split.state).compile().as_text()  # so they would be seen


def test_no_copy_between_host_and_device_in_an_iteration(alone, split):
    """Host to device: the other way has no meaning on a CPU."""
    for mesh, trained in ((None, alone), (TWO, split)):
        with parallel.using(mesh), jax.transfer_guard("disallow"):
            jax.block_until_ready(trained.iterate({}, trained.state))
    with pytest.raises(jax.errors.JaxRuntimeError, match="host-to-device"), jax.transfer_guard("disallow"):
        jax.jit(lambda x: x + 1)(np.ones(3))  # so the guard stands


_DEVICES = """
import json, sys
from dataclasses import replace
from fpo_jax import parallel
from fpo_jax.config import ParallelOptions
from tiny import TINY, make_system, train_on
system = make_system(replace(TINY, num_envs=8))
for count in map(int, sys.argv[1:]):
    metrics = train_on(parallel.make_mesh(ParallelOptions(devices=count), 8), system, 2).metrics
    print(json.dumps([{name: float(value) for name, value in line.items()} for line in metrics]))
"""


def python_environment(devices=1):
    """For another process: this one's package and test helpers, quick to compile."""
    here = Path(__file__).parent
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    path = os.pathsep.join(map(str, (here.parent / "src", here, here.parent / "experiments")))
    flags += f" --xla_force_host_platform_device_count={devices}"
    return os.environ | {"PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def test_eight_devices_train_as_one():
    """Two iterations on 1, 2, 4 and 8 devices."""
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES, *"1248"],
        env=python_environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, *others = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(others) == 3
    for other in others:
        for expected, found in zip(one, other, strict=True):
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


# --- environments


def test_simulators_on_the_host_take_turns_on_each_device():
    """Each device calls for its own environments, numbered over all devices, in two halves."""
    outcomes = []
    for mesh in (None, TWO):
        with fake_libero() as env, parallel.using(mesh):
            system = base_system(env, replace(LIBERO, num_envs=8))
            assert env.overlap

            def play(keys, key, system=system):
                return rollout(system, FrozenBase({}), None, start(system, keys), key, 6)

            carry, transition, episodes = jax.jit(play)(keys(8), jax.random.key(1))
            np.testing.assert_array_equal(carry.env.physics.slot, np.arange(8))
            outcomes.append(plain((transition, episodes)))
            assert env.problem() is None and len(set(env.vector.pids())) == 8
    chex.assert_trees_all_close(*outcomes, rtol=1e-5, atol=1e-5)
    assert outcomes[0][1].ended.any()


def test_physics_on_the_host_is_called_by_each_device():
    env = AlohaMujoco(episode_length=40, execute_steps=10)
    chunks = jnp.zeros((4, 10, 14)) + jax.random.uniform(jax.random.key(2), (4, 1, 1))

    def two_steps(keys, chunks):
        return env.step(env.step(env.reset(keys), chunks), chunks)

    expected = jax.jit(two_steps)(keys(4), chunks)
    with parallel.using(TWO):
        split = parallel.over_devices(two_steps, parallel.ENVS, parallel.ENVS)
        chex.assert_trees_all_equal(plain(jax.jit(split)(keys(4), chunks)), plain(expected))


def test_evaluation_gives_the_same_episodes_and_rounds_its_batches_up():
    system = make_system()
    expected = Evaluator(system, FrozenBase({}), 3, seed=5).play_base()
    with parallel.using(TWO):
        evaluator = Evaluator(system, FrozenBase({}), 3, seed=5)
        assert evaluator.batch == 4
        found = evaluator.play_base()
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-6)


# --- the base


@pytest.fixture(scope="module")
def pi0():
    """(a π0 of a few thousand weights, its params, an observation)."""
    policy = OpenpiPolicy(ALOHA, ("top",), (5, 6, 7), denoise_steps=2)
    params = {"model": jax.jit(init_pi0, static_argnums=0)(MODEL, jax.random.key(0)), "norm": STATS}
    images = jax.random.randint(jax.random.key(1), (4, 28, 28, 3), 0, 255).astype(jnp.uint8)
    return policy, params, Observation(jax.random.normal(jax.random.key(2), (4, 14)), images={"top": images})


def decide(policy, params, observation, noise):
    features, context = policy.encode(params, observation)
    return features, policy.decode(params, context, noise)


def test_a_base_split_over_devices_decides_as_a_whole_one(pi0):
    policy, params, observation = pi0
    noise = jax.random.normal(jax.random.key(3), (4, policy.horizon, policy.action_dim))
    expected = jax.jit(partial(decide, policy))(params, observation, noise)
    with parallel.using(SPLIT_BASE):
        placed, specs = parallel.place_weights(params), parallel.weight_specs(params)
        llm = placed["model"]["PaliGemma"]["llm"]
        assert llm["layers"]["mlp"]["linear"].addressable_shards[0].data.shape == (2, 32, 8)  # of [2, 32, 16]
        assert llm["embedder"]["input_embedding"].sharding.is_fully_replicated
        inputs = (specs, parallel.ENVS, parallel.ENVS)
        split = jax.jit(parallel.over_devices(partial(decide, policy), inputs, parallel.ENVS))
        close(split(placed, observation, noise), expected)
        chex.assert_trees_all_equal(parallel.here(placed), jax.device_get(params))
        # One layer at a time: no gathered array holds a whole stack.
        text = split.lower(placed, observation, noise).compile().as_text()
        gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
        assert gathered and max(np.prod([int(i) for i in shape.split(",")]) for shape in gathered) == 2 * 16 * 32


def test_a_base_that_cannot_be_split_says_which_weight():
    odd = {"layers": {"w": jnp.zeros((2, 4, 3))}}
    with parallel.using(SPLIT_BASE), pytest.raises(FpoError, match=r"layers.w \[2, 4, 3\]: choose a divisor of 3"):
        parallel.weight_specs(odd)


# --- checkpoints


def test_a_checkpoint_goes_from_two_devices_to_one_and_back(split, tmp_path):
    state, system = split.state, make_system()
    checkpoint.save(tmp_path, 3, state)
    shapes = jax.eval_shape(partial(train.init, system), {})
    on_one = checkpoint.restore(tmp_path, 3, parallel.placed(shapes, train.PLACES))
    chex.assert_trees_all_equal(plain(on_one), plain(state))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(on_one)} == {1}
    checkpoint.save(tmp_path, 4, on_one)
    with parallel.using(TWO):
        back = checkpoint.restore(tmp_path, 4, parallel.placed(shapes, train.PLACES))
    chex.assert_trees_all_equal(plain(back), plain(state))
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), back, state)
    assert all(jax.tree.leaves(same))


# --- what the user can get wrong


def test_what_cannot_be_split_is_one_sentence():
    def mesh(num_envs=4, **options):
        return parallel.make_mesh(ParallelOptions(**options), num_envs)

    assert mesh(devices=1) is None
    assert mesh().size == 2  # all of them
    with pytest.raises(FpoError, match=r"5 environments cannot be split evenly over 2 devices: choose --num-envs"):
        mesh(5)
    with pytest.raises(FpoError, match=r"--parallel.devices is 3, but this machine has 2"):
        mesh(devices=3)
    with pytest.raises(FpoError, match=r"--parallel.fsdp is 3, which does not divide the devices"):
        mesh(fsdp=3)


def test_a_base_is_split_within_a_process_whatever_the_order_of_devices():
    devices = [SimpleNamespace(process_index=index % 2, id=index) for index in range(8)]
    assert [[device.id for device in row] for row in parallel._rows(devices, 2)] == [[0, 2], [4, 6], [1, 3], [5, 7]]
    with pytest.raises(FpoError, match=r"--parallel.fsdp is 2, which does not divide the devices of each process"):
        parallel._rows([SimpleNamespace(process_index=index // 3, id=index) for index in range(6)], 2)


def test_an_address_is_whole_or_left_out():
    with pytest.raises(FpoError, match="need all three of --parallel"):
        hosts.connect(ParallelOptions(coordinator="localhost:1"))
    hosts.connect(ParallelOptions())  # nothing announces others
    for address in ("first-machine", "first-machine:", "first:machine:1", ":8476", "http://first:8476"):
        with pytest.raises(FpoError, match="give host:port of process 0"):
            hosts.connect(ParallelOptions(coordinator=address, num_processes=2, process_id=1))
    with pytest.raises(FpoError, match="process-id is 2: processes are numbered from 0"):
        hosts.connect(ParallelOptions(coordinator="[::1]:8476", num_processes=2, process_id=2))


def test_a_process_0_that_is_not_there_is_one_sentence():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(FpoError, match=rf"No process 0 at {address} after 0 s .*: start it there"):
            hosts._reach(address, 0.0)
        server.listen()
        hosts._reach(address, 0.0)


def test_announced_processes():
    assert hosts.tasks_announced({}) == 1
    assert hosts.tasks_announced({"SLURM_STEP_NUM_TASKS": "4"}) == 1  # a shell on a login node
    assert hosts.tasks_announced({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}) == 4
    assert hosts.tasks_announced({"OMPI_COMM_WORLD_SIZE": "3"}) == 3


def slurm(task=0, per_node="8(x4)", node=0, **more):
    return {"SLURM_LOCALID": str(task), "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_NODEID": str(node)} | more


@pytest.mark.parametrize(
    ("environment", "installed", "expected"),
    [
        ({}, 8, None),  # nothing says how many processes there are on this host
        (slurm(), 0, None),  # no GPU
        (slurm(CUDA_VISIBLE_DEVICES="-1"), 8, None),
        (slurm(per_node="1(x4)"), 8, [*range(8)]),  # one process per host
        (slurm(per_node="2,1(x3)", node=2), 8, [*range(8)]),
        (slurm(3), 8, [3]),  # one per GPU, all of which it sees
        (slurm(3, CUDA_VISIBLE_DEVICES="3"), 8, [0]),  # --gpus-per-task=1: it sees its own only
        (slurm(1, "2", CUDA_VISIBLE_DEVICES="4,5", SLURM_GPUS_PER_TASK="h200:2"), 8, [0, 1]),
        (slurm(1, "2", CUDA_VISIBLE_DEVICES="0,1,2,3"), 8, [2, 3]),  # each its share
        ({"SLURM_LOCALID": "2", "SLURM_NTASKS_PER_NODE": "4"}, 4, [2]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, 8, [*range(8)]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}, 8, [5]),
        (slurm(3, JAX_LOCAL_DEVICE_IDS="1,6"), 8, [1, 6]),  # JAX's own way of saying it
    ],
)
def test_gpus_of_a_process(environment, installed, expected):
    assert hosts.local_gpus(environment, installed) == expected


def test_more_processes_than_gpus_is_one_sentence():
    with pytest.raises(FpoError, match="8 processes on this host see 2 GPUs: start one per GPU"):
        hosts.local_gpus(slurm(3), 2)


class Store:
    """The key-value store of JAX's coordination service, in this process."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FpoError("no such base"), 2, "Error: no such base"),
        (PermissionError(13, "Permission denied", "/runs"), 2, "Error: [Errno 13] Permission denied: '/runs'"),
        (AssertionError(), 75, "no longer whole (AssertionError)"),
    ],
)
def test_a_mistake_in_one_process_is_that_of_all(error, code, words, monkeypatch, capsys):
    store = Store()
    monkeypatch.setattr(hosts, "_store", lambda: store)
    monkeypatch.setattr(hosts, "num_processes", lambda: 2)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left, hosts.one_for_all(ZeroDivisionError):
        raise error
    assert left.value.code == code and words in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:  # another process, whose collective failed by that
        hosts._leave("connection reset")
    assert left.value.code == code and ("connection reset" if code == 75 else words) in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), hosts.one_for_all(ZeroDivisionError):
        raise ZeroDivisionError  # what all raise together
