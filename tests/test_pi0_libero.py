"""A π0 with two cameras and a prompt per task on LIBERO, from pictures to an evaluated run."""

import json

import evaluate as evaluate_script
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train as train_script

from fpo_jax.envs.host import HostEnv
from fpo_jax.policies.openpi import OpenpiPolicy
from fpo_jax.runs import load_run
from libero_venv import installed
from tiny import jit, keys
from tiny_libero import pool_of, use_fake_workers
from tiny_pi0 import LIBERO, MODEL, write_checkpoint

SETTINGS = [
    *("--num-envs", "2", "--episode-length", "10", "--execute-steps", "5", "--openpi.denoise-steps", "2"),
    *("--rollout.decisions", "3", "--update.epochs", "1", "--update.minibatch-size", "8"),
    *("--actor.hidden", "8", "--critic.hidden", "8", "--actor.sampler-steps", "2", "--critic.value-samples", "2"),
    *("--iterations", "1", "--evaluation.episodes", "0", "--saving.no-tensorboard"),
]


@pytest.mark.parametrize(
    ("env", "prompt"),
    [
        ("libero_90/1", "KITCHEN SCENE2 close the drawer"),  # fake workers
        pytest.param(
            *("libero_object/0", "pick up the alphabet soup and place it in the basket"), marks=pytest.mark.libero
        ),
    ],
)
def test_pi0_from_pictures_and_prompt_to_an_evaluated_run(env, prompt, tmp_path, monkeypatch):
    if env == "libero_90/1":
        use_fake_workers(monkeypatch)
    else:
        installed()
    base, folder, target = write_checkpoint(tmp_path / "micro", LIBERO), tmp_path / "run", tmp_path / "result.json"
    assert train_script.main([*SETTINGS, "--env", env, "--base", str(base), "--run-dir", str(folder)]) == 0
    line = json.loads((folder / "metrics.jsonl").read_text())
    assert np.isfinite(line["critic_loss"]) and line["invalid_episodes"] == 0
    command = ["--run-dir", str(folder), "--episodes", "2", "--json", str(target)]
    assert evaluate_script.main(command) == 0
    result = json.loads(target.read_text())
    for policy in ("base", "tuned"):
        assert (result[policy]["episodes"], result[policy]["invalid_episodes"]) == (2, 0)
    assert result["protocol"]["cameras"] == ["image", "wrist_image"]
    assert result["protocol"]["image_size"] == MODEL.image_size
    assert result["protocol"]["deviations"]["episodes"] == "2 instead of 50"

    _, system, frozen, _ = load_run(folder)
    policy, simulators = system.base, system.env
    assert isinstance(policy, OpenpiPolicy) and isinstance(simulators, HostEnv) and pool_of(simulators)
    try:
        seen = jax.jit(simulators.reset)(keys(2)).observation
    finally:
        simulators.close()
    check_what_pi0_sees(policy, frozen.params, seen, prompt)


def check_what_pi0_sees(policy: OpenpiPolicy, params, seen, prompt: str) -> None:
    """Both pictures, each in its place and none for the third camera; the task's words; the robot's own state."""
    size = MODEL.image_size
    images, masks = policy._images(seen)
    assert images.keys() == masks.keys() == {"base_0_rgb", "left_wrist_0_rgb"}
    for camera, name in (("image", "base_0_rgb"), ("wrist_image", "left_wrist_0_rgb")):
        assert seen.images[camera].shape == images[name].shape == (2, size, size, 3) and np.all(masks[name])
        np.testing.assert_allclose(images[name], seen.images[camera] / 127.5 - 1, atol=1e-6)
        assert images[name].std() > 0.05
    assert policy.prompts == (prompt,) and policy.tokenizer is not None
    ids, mask = policy._prompt(seen, jnp.zeros((2, MODEL.action_dim)))
    expected, written = policy.tokenizer.tokenize(prompt, None, policy.config.max_token_len)
    np.testing.assert_array_equal(ids[0][mask[0]], expected[written])
    encode = jit(policy.encode)
    features, context = encode(params, seen)
    assert features.shape == (2, policy.feature_dim) and np.isfinite(features).all()
    np.testing.assert_allclose(features[:, -8:], seen.proprio / (1 + 1e-6), rtol=1e-5, atol=1e-6)
    hidden = np.asarray(features[:, :-8])
    for camera in ("image", "wrist_image"):
        black = seen._replace(images=seen.images | {camera: jnp.zeros_like(seen.images[camera])})
        assert np.abs(encode(params, black)[0][:, :-8] - hidden).max() > 1e-4, camera
    absent = seen._replace(image_masks={"wrist_image": jnp.array([True, False])})
    change = np.abs(encode(params, absent)[0][:, :-8] - hidden).max(axis=1)
    assert change[0] < 1e-5 < 1e-4 < change[1]
    assert np.abs(jit(policy.with_prompts(["wait"]).encode)(params, seen)[0][:, :-8] - hidden).max() > 1e-4
    actions = jit(policy.decode)(params, context, jnp.zeros((2, MODEL.horizon, MODEL.action_dim)))
    assert actions.shape == (2, MODEL.horizon, 7) and np.isfinite(actions).all()
