"""A small state-based flow policy over action chunks, with its checkpoints.

Flow time runs as in the paper: u = 0 is noise, u = 1 is the action chunk. The network predicts the *clean chunk*
â(x_u, u, s), and the velocity follows from it; predicting the velocity itself would have to pass all h·A noise
dimensions through the hidden layers, which a network this narrow can't do.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fpo_jax.latent import dct_basis
from fpo_jax.types import BasePolicy, EnvSpec, FpoError, Observation, Params

FORMAT = 1  # of the checkpoint folder; raise it when old checkpoints can no longer be read
_CONFIG, _WEIGHTS, _CARD = "config.json", "params.msgpack", "README.md"


class ChunkDenoiser(nn.Module):
    """Clean chunk â(x_u, u, s) = μ(s) + δ(r, u, s), with the residual r = (x_u - u μ(s)) / √((1-u)² + (u σ)²).

    The mean μ sees the state only and carries the precision. δ tells motions apart that the demonstrations hold for
    the same state: they differ little from each other beside the whole motion, and r enlarges that difference to the
    scale of the noise (σ = `spread` is its size). Without this split the network averages them at moderate training.
    """

    width: int
    depth: int
    condition_width: int
    frequencies: int
    spread: float

    @nn.compact
    def __call__(
        self, x_u: Float[Array, "N h A"], u: Float[Array, " N"], features: Float[Array, "N f"]
    ) -> Float[Array, "N h A"]:
        num, horizon, action_dim = x_u.shape
        hidden = nn.silu(nn.Dense(self.width)(features))
        hidden = nn.silu(nn.Dense(self.width)(hidden))
        mean = nn.Dense(horizon * action_dim)(hidden).reshape(x_u.shape)

        time = u[:, None, None]
        residual = (x_u - time * mean) / jnp.sqrt(jnp.square(1.0 - time) + jnp.square(self.spread * time))
        # Motions are slow: what tells one from another lies in the low temporal frequencies (an orthonormal DCT), and
        # leaving the noise of the others out makes the decision between two motions sharp.
        low = jnp.einsum("hr,nha->nra", dct_basis(horizon, min(self.frequencies, horizon)), residual)
        angles = jnp.outer(u, jnp.pi * jnp.asarray([0.5, 1.0, 2.0, 4.0]))
        condition = jnp.concatenate([features, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        embedded = nn.silu(nn.Dense(self.condition_width)(condition))
        embedded = nn.silu(nn.Dense(self.condition_width)(embedded))
        hidden = nn.Dense(self.width)(low.reshape(num, -1)) + nn.Dense(self.width)(embedded)
        for _ in range(self.depth):
            scale, shift = jnp.split(nn.Dense(2 * self.width)(embedded), 2, axis=-1)
            block = nn.LayerNorm(use_scale=False, use_bias=False)(hidden) * (1.0 + scale) + shift
            hidden = hidden + nn.Dense(self.width)(nn.silu(block))
        deviation = nn.Dense(horizon * action_dim, kernel_init=nn.initializers.zeros)(nn.silu(hidden))
        return mean + deviation.reshape(x_u.shape)


def integrate_denoiser(
    predict: Callable[[Float[Array, "N h A"], Float[Array, " N"]], Float[Array, "N h A"]],
    noise: Float[Array, "N h A"],
    num_steps: int,
) -> Float[Array, "N h A"]:
    """x_1 of dx/du = (â(x_u, u) - x_u) / (1 - u) from x_0 = `noise` by equal Euler steps.

    The last step has length 1 - u, so it lands exactly on â.
    """

    def step(x: Float[Array, "N h A"], index: Array) -> tuple[Float[Array, "N h A"], None]:
        target = predict(x, jnp.full(x.shape[0], index / num_steps))
        # du / (1 - u) with u = k/n is 1 / (n - k): exactly 1 in the last step.
        return x + (target - x) / (num_steps - index), None

    return jax.lax.scan(step, noise, jnp.arange(num_steps, dtype=noise.dtype))[0]


@dataclasses.dataclass(frozen=True)
class SmallPolicy:
    """A flow policy over chunks of `horizon` actions that sees robot state and object position, no images.

    `params` is `{"network": ..., "stats": {"{proprio,object,action}_{mean,std}": ...}}`, so a policy is this config
    and its params. Implements `fpo_jax.types.BasePolicy`.
    """

    horizon: int = 50  # h, control steps in a chunk
    action_dim: int = 14  # A = a
    proprio_dim: int = 14  # p
    object_dim: int = 3  # entries of `object_pose` that are seen: the position [m]
    object_start: int = 0  # the first of them
    width: int = 512
    depth: int = 2  # residual blocks
    condition_width: int = 128
    frequencies: int = 8  # temporal frequencies of x_u that the network sees; the prediction has all of them
    spread: float = 0.1  # size of the difference between motions, in normalised actions
    euler_steps: int = 5

    @property
    def feature_dim(self) -> int:
        """Size of the features that `encode` returns."""
        return self.proprio_dim + self.object_dim

    @property
    def seen_of_objects(self) -> slice:
        """The entries of `object_pose` that it sees."""
        return slice(self.object_start, self.object_start + self.object_dim)

    @property
    def output_dim(self) -> int:
        """Width of the actions that `decode` returns: this base's noise has the same."""
        return self.action_dim

    @property
    def standardize(self) -> bool:
        """The features come normalised by the demonstrations' statistics."""
        return False

    @property
    def cameras(self) -> tuple[str, ...]:
        """It sees no images."""
        return ()

    @property
    def image_size(self) -> int:
        """It sees no images."""
        return 0

    @property
    def network(self) -> ChunkDenoiser:
        """The Linen module whose weights are `params["network"]`."""
        return ChunkDenoiser(self.width, self.depth, self.condition_width, self.frequencies, self.spread)

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh weights, and statistics that change nothing (mean 0, std 1)."""
        x = jnp.zeros((1, self.horizon, self.action_dim))
        weights = self.network.init(key, x, jnp.zeros(1), jnp.zeros((1, self.feature_dim)))
        sizes = {"proprio": self.proprio_dim, "object": self.object_dim, "action": self.action_dim}
        stats = {f"{name}_mean": jnp.zeros(size) for name, size in sizes.items()}
        stats |= {f"{name}_std": jnp.ones(size) for name, size in sizes.items()}
        return {"network": weights, "stats": stats}

    def encode(self, params: Params, observation: Observation) -> tuple[Float[Array, "N f"], Float[Array, "N f"]]:
        """Returns (features, context): the normalised robot state and object position, twice the same array."""
        if observation.object_pose is None:
            raise FpoError(
                "This base policy needs the object's position, which the environment doesn't show: "
                "use a state-based environment (object_pose) or a base that sees images."
            )
        stats = {name: values[None] for name, values in params["stats"].items()}
        proprio = (observation.proprio - stats["proprio_mean"]) / stats["proprio_std"]
        position = (observation.object_pose[:, self.seen_of_objects] - stats["object_mean"]) / stats["object_std"]
        features = jnp.concatenate([proprio, position], axis=-1)
        return features, features

    def predict(
        self, params: Params, x_u: Float[Array, "N h A"], u: Float[Array, " N"], features: Float[Array, "N f"]
    ) -> Float[Array, "N h A"]:
        """The clean chunk â(x_u, u, s), in normalised actions."""
        return jnp.asarray(self.network.apply(params["network"], x_u, u, features))

    def decode(
        self, params: Params, context: Float[Array, "N f"], noise: Float[Array, "N h A"]
    ) -> Float[Array, "N h A"]:
        """Integrates the flow from `noise`; returns actions in the environment's units."""
        chunk = integrate_denoiser(lambda x, u: self.predict(params, x, u, context), noise, self.euler_steps)
        return chunk * params["stats"]["action_std"][None, None] + params["stats"]["action_mean"][None, None]


def check_action_space(policy: BasePolicy, spec: EnvSpec) -> None:
    """Raises `FpoError` where the policy's chunks don't fit the environment."""
    if policy.output_dim != spec.action_dim:
        raise FpoError(
            f"The base policy has {policy.output_dim} action dimensions, but {spec.name} takes {spec.action_dim}: "
            "choose a base that was trained for this environment."
        )
    if policy.horizon < spec.execute_steps:
        raise FpoError(
            f"The base policy predicts {policy.horizon} steps, but {spec.name} executes {spec.execute_steps} per "
            f"decision: set execute_steps to {policy.horizon} or less."
        )


def save_policy(directory: str | Path, policy: SmallPolicy, params: Params, model_card: str) -> None:
    """Writes a checkpoint folder: `config.json`, `params.msgpack` (float32 arrays) and the model card `README.md`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "policy": type(policy).__name__, **dataclasses.asdict(policy)}
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    (directory / _WEIGHTS).write_bytes(flax.serialization.msgpack_serialize(weights))
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (directory / _CARD).write_text(model_card.rstrip() + "\n")


def load_policy(directory: str | Path) -> tuple[SmallPolicy, Params]:
    """Reads what `save_policy` wrote; a missing, damaged or foreign folder is an `FpoError`."""
    directory = Path(directory)
    for name in (_CONFIG, _WEIGHTS):
        if not (directory / name).is_file():
            raise FpoError(
                f"There is no base policy in {directory} ({name} is missing): "
                "give the folder of a checkpoint, or make one with experiments/clone.py."
            )
    damaged = (
        f"The base policy in {directory} is damaged: restore it from git or clone it again with experiments/clone.py."
    )
    try:
        config = json.loads((directory / _CONFIG).read_text())
        version, kind = config.pop("format"), config.pop("policy")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FpoError(damaged) from error
    if (version, kind) != (FORMAT, SmallPolicy.__name__):
        raise FpoError(
            f"The base policy in {directory} has format {version} of {kind}, and this version reads format {FORMAT} of "
            f"{SmallPolicy.__name__}: use a matching version of fpo_jax or clone it again with experiments/clone.py."
        )
    try:
        policy = SmallPolicy(**config)
        expected = jax.eval_shape(policy.init, jax.random.key(0))
        params = flax.serialization.msgpack_restore((directory / _WEIGHTS).read_bytes())
        # Raises where the two trees differ in structure; shapes, types and numbers are looked at one by one.
        intact = jax.tree.map(
            lambda e, p: p.shape == e.shape and p.dtype == e.dtype and np.isfinite(p).all(), expected, params
        )
    except Exception as error:  # msgpack, flax and jax each raise their own kinds on broken bytes
        raise FpoError(damaged) from error
    if not all(jax.tree.leaves(intact)):
        raise FpoError(damaged)
    return policy, jax.tree.map(jnp.asarray, params)
