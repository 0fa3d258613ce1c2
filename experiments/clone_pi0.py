"""Clones a tiny π0 from demonstrations with camera images, measures it alone and writes its checkpoint folder.

python experiments/clone_pi0.py --out checkpoints/pi0_tiny
"""

import dataclasses
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import rich.progress
import tyro
from clone import base_success, rate
from jaxtyping import Float, UInt8

from fpo_jax.clone_pi0 import (
    ClonePi0Config,
    clone_pi0,
    norm_stats,
    prepare_data,
    prompt_ids,
    save_pi0,
    tiny_openpi_config,
)
from fpo_jax.demos import Demonstrations, load, save
from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_expert import Mixture, record_mixture
from fpo_jax.envs.aloha_mujoco import AlohaMujoco
from fpo_jax.envs.aloha_render import RenderPool
from fpo_jax.policies import load_base
from fpo_jax.policies.small import check_action_space
from fpo_jax.policies.tokenizer import train_tiny_tokenizer
from fpo_jax.policies.transforms import RobotTransform
from fpo_jax.types import Camera, FpoError

PROMPT = "Transfer cube"
ASSET_ID = "aloha_transfer_cube"


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path  # checkpoint folder to write; must not be there yet
    demos: Path | None = None  # demonstration file (.npz); a mixture is recorded where none is given
    record_episodes: int = 3000  # length of that recording
    mixture: Mixture = dataclasses.field(default_factory=Mixture)  # which grasps it holds
    save_demos: Path | None = None  # file to keep the recorded demonstrations in, for --demos
    render: Literal["official", "fast"] = "fast"  # images; fast without shadows and multisampling
    seed: int = 0  # of the recording, the training and the evaluation
    eval_episodes: int = 512
    eval_envs: int = 128  # simulated side by side
    clone: ClonePi0Config = dataclasses.field(default_factory=ClonePi0Config)


def cpu_seconds() -> float:
    """CPU time [s] of this process and of those it started that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def qpos_from_observation(
    proprio: Float[np.ndarray, "*batch 14"], object_pose: Float[np.ndarray, "*batch 7"]
) -> Float[np.ndarray, "*batch 23"]:
    """Joint positions [rad, m] whose picture shows this observation, the inverse of `aloha.observe`.

    The second finger of each gripper is taken as the mirror image of the first, which the physics keeps to fractions
    of a millimetre.
    """
    span, closed = aloha.GRIPPER_OPEN - aloha.GRIPPER_CLOSED, aloha.GRIPPER_CLOSED
    left, right = (span * proprio[..., i : i + 1] + closed for i in (6, 13))
    return np.concatenate([proprio[..., :6], left, -left, proprio[..., 7:13], right, -right, object_pose], axis=-1)


def render_decisions(args: Args, demos: Demonstrations, progress: rich.progress.Progress) -> UInt8[np.ndarray, "..."]:
    """The images [E K s s 3] at the decisions of every episode."""
    every, camera = args.clone.decision_steps, Camera("top", args.clone.model.image_size, args.render)
    qpos = qpos_from_observation(demos.proprio[:, ::every], demos.object_pose[:, ::every])
    bar = progress.add_task("images", total=qpos[..., 0].size, note="")
    pool = RenderPool()
    rows = pool.render_rows(
        qpos.reshape(-1, qpos.shape[-1]), camera, progress=lambda done, _: progress.update(bar, completed=done)
    )
    pool.close()  # its processes end, so that their time counts
    return rows.reshape(*qpos.shape[:2], *rows.shape[1:])


def model_card(args: Args, demos: Demonstrations, measured: dict[str, str]) -> str:
    """The README.md of the checkpoint."""
    config = args.clone
    rows = "\n".join(f"| {name} | {value} |" for name, value in measured.items())
    return f"""# {args.out.name}: a tiny π0 on pixels

π0 itself, only smaller: the same code and file layout as openpi's π0, with narrow language model, action expert and
image tower, trained from scratch for gym-aloha's AlohaTransferCube-v0. It sees the `top` camera
({config.model.image_size} x {config.model.image_size} pixels, `--render {args.render}`) and the robot state, not the
cube's position. It is deliberately imperfect: it was cloned from a mixture of correct and displaced grasps, and its
noise decides how far beside the cube it grasps. Steering that noise is what fpo_jax learns.

| | |
|---|---|
{rows}

Command: `python {shlex.join(sys.argv)}`

Use: `python experiments/train.py --env aloha_transfer_cube --base {args.out.name} --render {args.render}`

Demonstrations: {args.demos or f"{args.record_episodes} episodes of {args.mixture}"}

Recipe: {config}

Limits: simulation only; one task, one prompt ("{PROMPT}", whose words it has no reason to read), one camera; trained
for decisions every {config.decision_steps} control steps and for `{args.render}` images. `tokenizer.model` holds these
two words, not PaliGemma's vocabulary.
Licence: Apache-2.0, as the repository. Scene and task: gym-aloha (Apache-2.0). No weights of others are in it.
"""


def obtain_demos(args: Args, progress: rich.progress.Progress) -> Demonstrations:
    """Loads or records."""
    if args.demos is not None:
        return load(args.demos)
    bar = progress.add_task("demonstrations", total=args.record_episodes, note="")
    demos = record_mixture(
        args.mixture, args.record_episodes, args.seed, on_progress=lambda n: progress.update(bar, completed=n)
    )
    if args.save_demos:
        save(args.save_demos, demos)
    return demos


def main(args: Args) -> None:
    if args.out.exists():
        raise FpoError(f"{args.out} exists already: delete it or choose another --out.")
    key_clone, key_eval = jax.random.split(jax.random.key(args.seed))
    config = tiny_openpi_config(args.clone.model, PROMPT, ASSET_ID, args.render)
    with tempfile.TemporaryDirectory() as folder:
        prompt = prompt_ids(train_tiny_tokenizer(Path(folder) / "tokenizer.model", [PROMPT]), config)
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("{task.fields[note]}"))
    with rich.progress.Progress(*columns) as progress:
        clock = [cpu_seconds()]
        demos = obtain_demos(args, progress)
        images = render_decisions(args, demos, progress)
        transform = RobotTransform(
            config.robot, config.normalisation, config.model.action_dim, config.adapt_to_pi, config.delta_actions
        )
        data = prepare_data(args.clone, transform, demos, images)
        clock.append(cpu_seconds())
        bar = progress.add_task("cloning", total=args.clone.steps, note="")
        latest = {}

        def report(step: int, metrics: dict[str, float]) -> None:
            latest.update(metrics)
            note = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            progress.update(bar, completed=step, note=note)
            if step % 1000 == 0:
                progress.console.print(f"step {step}: {note}")

        weights = clone_pi0(args.clone, data, prompt, key_clone, report)
        clock.append(cpu_seconds())
        del data, images
        save_pi0(args.out, config, weights, norm_stats(demos), "")

        policy, params = load_base(args.out)
        env = AlohaMujoco(camera=Camera(policy.cameras[0], policy.image_size, args.render))
        check_action_space(policy, env.spec)
        bar = progress.add_task("evaluation", total=args.eval_episodes, note="")
        success = np.zeros(0)
        while success.size < args.eval_episodes:
            num_envs = min(args.eval_envs, args.eval_episodes - success.size)
            key = jax.random.fold_in(key_eval, success.size)
            success = np.append(success, base_success(env, policy, params, key, num_envs))
            progress.update(bar, completed=success.size, note=f"success {success.mean():.3f}")
    minutes = np.diff(clock) / 60
    measured = {
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(weights)):,}",
        "success alone, fresh noise per decision, 95 % Wilson interval": rate(success),
        "success of the demonstrations": rate(np.asarray(demos.success, float)),
        "held-out flow-matching loss (normalised actions)": f"{latest.get('heldout_loss', float('nan')):.4f}",
        "the same with the images of other episodes": f"{latest.get('wrong_image_loss', float('nan')):.4f}",
        "CPU minutes: demonstrations and images, cloning": f"{minutes[0]:.1f}, {minutes[1]:.1f}",
    }
    (args.out / "README.md").write_text(model_card(args, demos, measured))
    print(f"{args.out}: success {rate(success)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except FpoError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
