"""Clones a small state-based base for a pick-and-place task of LIBERO, measures it alone and writes its folder.

python experiments/clone_libero.py --out checkpoints/libero_butter

python experiments/clone_libero.py --env libero_10/7 --record-steps 240 --record-episodes 400 --episode-length 280 \
    --clone.policy.object-start 0 --clone.policy.object-dim 10 --mixture.displaced-fraction .3 \
    --mixture.turn-jitter .002 --eval-episodes 200 --out checkpoints/libero_10_basket

Of a whole suite (--env libero_object), every task gets an equal share of the recording; the command that made
checkpoints/libero_object_basket is in its README.

A base sees entries object_start to object_start + object_dim of the objects' poses, seven for each in the order of its
task's file.
"""

import dataclasses
import sys
from collections.abc import Callable

import tyro
from clone import CloneArgs, Subject, make_base

from fpo_jax.clone import CloneConfig
from fpo_jax.config import LIBERO_BUTTER, LiberoOptions
from fpo_jax.demos import Demonstrations
from fpo_jax.envs import make_env
from fpo_jax.envs.libero_expert import Mixture, record_mixture
from fpo_jax.envs.wire import POSE_DIM
from fpo_jax.policies.small import SmallPolicy
from fpo_jax.types import FpoError

BUTTER = 4 * POSE_DIM  # where the butter's pose begins among those of its scene
DECISION = LIBERO_BUTTER.execute_steps or 0
POLICY = SmallPolicy(
    horizon=DECISION, action_dim=7, proprio_dim=8, object_start=BUTTER, spread=1.0, frequencies=4, width=384
)


@dataclasses.dataclass(frozen=True)
class Args(CloneArgs):
    env: str = LIBERO_BUTTER.env  # one task of LIBERO, or a suite
    libero: LiberoOptions = dataclasses.field(default_factory=LiberoOptions)  # of recording and evaluation
    mixture: Mixture = dataclasses.field(default_factory=Mixture)  # which grasps the recording holds
    workers: int | None = None  # processes that record; by default one per CPU
    record_steps: int = 105  # control steps of a demonstration
    record_episodes: int = 600  # length of the recording
    episode_length: int = LIBERO_BUTTER.episode_length or 0  # control steps of the base's own episodes
    eval_episodes: int = 400
    eval_envs: int = 20  # simulated side by side
    clone: CloneConfig = dataclasses.field(
        default_factory=lambda: CloneConfig(POLICY, steps=5000, decision_steps=DECISION)
    )


def main(args: Args) -> None:
    def record(on_progress: Callable[[int], None]) -> Demonstrations:
        return record_mixture(
            *(args.env, args.mixture, args.record_episodes, args.seed, args.workers, args.record_steps),
            *(args.libero, on_progress),
        )

    about = f"robot state and the object's position (no images), for\nLIBERO's {args.env}"
    length, chunk = args.episode_length, args.clone.decision_steps
    env = make_env(args.env, episode_length=length, execute_steps=chunk, libero=args.libero)
    make_base(args, Subject(about, args.mixture, env, record))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except FpoError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
