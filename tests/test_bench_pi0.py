"""The bench of the frozen π0 runs, counts right, and what it writes can be read; speed depends on the machine."""

import json
import math
from dataclasses import replace

import bench_pi0
import bench_pi0_counts
import jax
import pytest

from fpo_jax.policies.gemma import GemmaConfig
from fpo_jax.policies.openpi_checkpoint import save_params
from fpo_jax.policies.pi0 import Pi0Config, param_shapes
from fpo_jax.policies.siglip import SiglipConfig

MICRO = Pi0Config(
    paligemma=GemmaConfig(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
    expert=GemmaConfig(width=8, depth=2, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8),
    image_tower=SiglipConfig(width=12, depth=3, mlp_dim=20, num_heads=2, patch=14),
    action_dim=6,
    horizon=5,
    image_size=28,
    vocab_size=50,
)
# Weights that one token is multiplied by. Image tower: patches; per layer query, key, value, output, two dense; head.
TOWER = 14 * 14 * 3 * 12 + 3 * (4 * 12 * 12 + 2 * 12 * 20) + 12 * 16
# Per layer query, key and value, output, gate and value, linear.
LANGUAGE = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 2 * 16 * 32 + 32 * 16)
EXPERT = 2 * (8 * 16 + 2 * 8 * 8 + 16 * 8 + 2 * 8 * 16 + 16 * 8)
ACTION = 6 * 8 + 16 * 8 + 8 * 8 + 8 * 6  # in, the two that mix in the time, out

KINDS = ["limits", *["latency"] * 4, "ratio", "ratio", "chunk", "memory"]
ABOUT = {"date", "machine", "device", "load_average", "git_revision", "python", "versions"}
ABOUT |= {"model", "dtype", "cameras", "prompt_tokens", "steps", "repeats"}


@pytest.fixture(autouse=True, scope="module")
def micro():
    """A model of a few thousand weights, and small limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench_pi0.MODELS, "dummy-ti", MICRO)
        patch.setitem(bench_pi0.LIMIT_SIZES, "cpu", (64, 2**20))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(records of a tiny bench, its result file)."""
    out = tmp_path_factory.mktemp("benchmarks")
    assert bench_pi0.main(["--batch-sizes", "2", "1", "--repeats", "3", "--out", str(out)]) == 0
    (path,) = out.iterdir()
    return [json.loads(line) for line in path.read_text().splitlines()], path


def of_kind(records, kind):
    return [record for record in records if record["measurement"] == f"pi0_{kind}"]


# --- counting by hand


def test_operations_of_encode():
    images, tokens = 3 * 4, 3 * 4 + 7
    attention = 3 * 12 * images * 4 + 2 * 2 * 8 * tokens * tokens  # layers · channels · queries · keys
    by_hand = 2 * (2 * TOWER * images + 2 * LANGUAGE * tokens + 4 * attention)
    assert bench_pi0_counts.encode_work(MICRO, batch=2, cameras=3, prompt=7).flops == by_hand


@pytest.mark.parametrize("latents", [1, 4])
def test_operations_of_decode(latents):
    attention = 2 * 2 * 8 * 6 * (19 + 6)  # a state and five actions see 19 tokens of the prefix and themselves
    per_latent = 2 * (EXPERT * 6 + ACTION * 5) + 4 * attention
    by_hand = 10 * 2 * (latents * per_latent + 2 * 6 * 8)  # steps · batch · (... and the state's projection)
    assert bench_pi0_counts.decode_work(MICRO, batch=2, prefix=19, latents=latents).flops == by_hand


def test_operations_of_pi05():
    config = replace(MICRO, pi05=True)
    per_latent = 2 * (EXPERT * 5 + (6 * 8 + 8 * 6) * 5) + 4 * 2 * 2 * 8 * 5 * (19 + 5)
    time = 2 * (2 * 8 * 8 + 5 * 8 * 3 * 8)  # two dense layers; two norms per layer, and the last one
    assert bench_pi0_counts.decode_work(config, batch=2, prefix=19).flops == 10 * 2 * (per_latent + time)
    assert bench_pi0_counts.encode_work(config, 2, 3, 7) == bench_pi0_counts.encode_work(MICRO, 2, 3, 7)


def test_bytes():
    keys_and_values = 2 * 2 * 2 * 19 * 8  # two of them · layers · batch · tokens · head size
    scales, biases = 2 * 2 * 8 + 8, 4 * 8 + 6
    numbers = EXPERT + scales + ACTION + biases + 6 * 8 + keys_and_values
    noise_and_actions = 2 * 2 * 5 * 6
    assert bench_pi0_counts.decode_work(MICRO, batch=2, prefix=19).bytes == 4 * (10 * numbers + noise_and_actions)
    half = bench_pi0_counts.decode_work(replace(MICRO, dtype="bfloat16"), batch=2, prefix=19)
    assert half.bytes == 2 * 10 * numbers + 4 * noise_and_actions

    tower = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(MICRO)["PaliGemma"]["img"]))
    language = LANGUAGE + 2 * 2 * 16 + 16
    observation, hidden = 2 * (3 * 28 * 28 * 3 + 7 * 16), 2 * 19 * 16  # images and embeddings
    by_hand = 4 * (tower + language + observation + hidden + keys_and_values)
    assert bench_pi0_counts.encode_work(MICRO, batch=2, cameras=3, prompt=7).bytes == by_hand


@pytest.mark.parametrize(("model", "params"), [("pi0", 3_238_048_528), ("pi05", 3_353_433_872)])
def test_all_weights_are_counted(model, params):
    parts = bench_pi0_counts.weights(replace(bench_pi0.MODELS[model], dtype="bfloat16"))
    assert sum(part.bytes for part in parts.values()) == 2 * params
    assert parts["table"] == (0, 2 * 257_152 * 2048)


# --- running


def test_every_line_says_what_when_and_with_what(written):
    records, path = written
    assert [r["measurement"] for r in records] == [f"pi0_{kind}" for kind in 2 * KINDS]
    assert [r["batch_size"] for r in records] == len(KINDS) * [1] + len(KINDS) * [2]
    for record in records:
        assert record.keys() > ABOUT and record["machine"] == path.stem
        assert (record["model"], record["dtype"], record["prompt_tokens"]) == ("dummy-ti", "float32", 48)
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))


def test_latencies_and_limits(written):
    records, _ = written
    limits = {r["batch_size"]: r for r in of_kind(records, "limits")}
    latencies = of_kind(records, "latency")
    assert [r["program"] for r in latencies] == 2 * ["encode 1 camera", "encode", "decode", "decode 4 latents"]
    for r in latencies:
        limit = limits[r["batch_size"]]
        assert 0 < r["lowest_seconds"] <= r["seconds"] and r["cpu_seconds"] > 0 and r["per"] == "CPU second"
        assert r["flops_per_second"] == pytest.approx(r["flops"] / r["cpu_seconds"])
        assert r["ratio_to_matmul"] == pytest.approx(r["flops_per_second"] / limit["flops_per_second"])
        assert r["ratio_to_bandwidth"] == pytest.approx(r["bytes_per_second"] / limit["bytes_per_second"])
        larger = "compute" if r["ratio_to_matmul"] > r["ratio_to_bandwidth"] else "memory"
        assert r["binding_limit"] == larger
        assert r["program_bytes"] > 4 * EXPERT  # weights, if nothing else
    cameras = {"encode": 3, "encode 1 camera": 1}
    for r in latencies[:2]:
        assert r["flops"] == bench_pi0_counts.encode_work(MICRO, 1, cameras[r["program"]], 48).flops
    assert [r["flops"] for r in latencies[2:4]] == [bench_pi0_counts.decode_work(MICRO, 1, 60, n).flops for n in (1, 4)]


def test_xla_agrees_with_the_count_by_hand(written):
    # XLA also counts norms, softmax and activations, which are much of a model as narrow as this one.
    records, _ = written
    assert all(1 < r["xla_flops_ratio"] < 2.5 for r in of_kind(records, "latency"))


def test_ratios(written):
    records, _ = written
    found = of_kind(records, "ratio")
    assert [(r["program"], r["to"], r["target"]) for r in found] == 2 * [
        ("encode 1 camera", "encode", 0.45),
        ("decode 4 latents", "4 x (encode + decode)", None),
    ]
    assert all(0 < r["lowest"] <= r["ratio"] <= r["highest"] < math.inf for r in found)


def test_ratios_are_medians_of_the_rounds():
    rounds = {"encode": [2.0, 4.0, 4.0], "encode 1 camera": [1.0, 1.0, 3.0], "decode": [1.0] * 3}
    rounds["decode 4 latents"] = [3.0, 5.0, 10.0]
    one, several = bench_pi0.ratios({name: [(t, -1.0) for t in times] for name, times in rounds.items()})
    assert (one["lowest"], one["ratio"], one["highest"]) == (0.25, 0.5, 0.75)
    assert (several["lowest"], several["ratio"], several["highest"]) == (0.25, 0.25, 0.5)


def test_the_reference_stands_beside_what_it_fits(written):
    records, _ = written
    small, large = of_kind(records, "chunk")
    assert small["reference_cpu_seconds"] == 0.32 and "not measured here" in small["reference"]
    assert large["reference_cpu_seconds"] is None and large["reference"] is None
    assert all(r["cpu_seconds"] > 0 for r in (small, large))


def test_a_checkpoint_is_loaded_and_lines_are_appended(tmp_path):
    params = jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, 0.01), param_shapes(MICRO))
    save_params(tmp_path / "base", params, {}, "none")
    (tmp_path / "here.jsonl").write_text('{"measurement": "earlier"}\n')
    options = ["--checkpoint", str(tmp_path / "base"), "--batch-sizes", "--out", str(tmp_path), "--machine", "here"]
    assert bench_pi0.main([*options, "--dtype", "bfloat16"]) == 0
    earlier, load = [json.loads(line) for line in (tmp_path / "here.jsonl").read_text().splitlines()]
    assert earlier == {"measurement": "earlier"}
    assert (load["measurement"], load["checkpoint"], load["dtype"]) == ("pi0_load", "base", "bfloat16")
    assert load["seconds"] > 0 and load["peak_host_bytes"] >= load["peak_host_bytes_before"] > 1e8


def test_what_is_too_large_spoils_no_smaller_one(tmp_path, monkeypatch, capsys):
    def one_batch(args, config, params, batch):
        if batch > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return [{"measurement": "pi0_memory", "batch_size": batch, **bench_pi0.peak_memory()}]

    monkeypatch.setattr(bench_pi0, "one_batch", one_batch)
    assert bench_pi0.main(["--batch-sizes", "4", "1", "2", "--out", str(tmp_path)]) == 0
    assert "Left out, with all larger ones: RESOURCE_EXHAUSTED" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert [json.loads(line)["batch_size"] for line in path.read_text().splitlines()] == [1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--batch-sizes", "8", "0"], "--batch-sizes must be at least 1"),
        (["--batch-sizes"], "nothing to measure"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(options, sentence, tmp_path, capsys):
    assert bench_pi0.main([*options, "--out", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
