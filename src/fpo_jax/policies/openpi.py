"""π0 and π0.5 as frozen bases: openpi's models, checkpoints and transforms behind `fpo_jax.types.BasePolicy`.

`encode` runs the prefix (images, prompt) once and keeps its key-value cache; `decode` runs only the suffix (robot
state, action tokens) on it, so several latents for one observation cost one prefix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fpo_jax.config import OpenpiOptions
from fpo_jax.parallel import weight_shardings
from fpo_jax.policies.openpi_checkpoint import checkpoint_root, load_norm_stats, params_folder, restore_params
from fpo_jax.policies.openpi_configs import OpenpiConfig
from fpo_jax.policies.pi0 import Pi0, Prefix, param_shapes, sample_actions
from fpo_jax.policies.storage import locate
from fpo_jax.policies.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from fpo_jax.policies.transforms import CAMERAS, STATE_DIM, RobotTransform, images_to_float, resize_with_pad
from fpo_jax.types import FpoError, Observation, Params

# The cameras of the simulated robot, by the environment's names; its others count as masked.
SIMULATED_CAMERAS = {"aloha": ("top",), "libero": ("image", "wrist_image")}


class Context(NamedTuple):
    """One encoded observation: all that `decode` needs besides the noise."""

    prefix: Prefix  # key-value cache of images and prompt
    state: Float[Array, "N A"]  # normalised and padded: the suffix's first token (π0)
    proprio: Float[Array, "N p"]  # robot state as observed, for actions relative to it


@dataclass(frozen=True)
class OpenpiPolicy:
    """A π0 or π0.5 that sees and acts in the environment's own units.

    `params` is `{"model": openpi's tree, "norm": {"state": NormStats, "actions": NormStats}}`. Cameras that are not in
    `cameras` count as masked: they are never encoded, which changes nothing for the others.
    """

    config: OpenpiConfig
    cameras: tuple[str, ...]  # the environment's names
    prompt: tuple[int, ...]  # token ids of the default task; () where they are written at run time, or there is none
    tokenizer: Tokenizer | None = None
    prompts: tuple[str, ...] = ()  # of a suite, by `Observation.task`; () for the default task
    features: Literal["mean", "last_token", "proprio"] = "mean"
    denoise_steps: int = 10

    def with_prompts(self, prompts: Sequence[str]) -> "OpenpiPolicy":
        """The same base for a suite of tasks; an observation's `task` says which. Raises FpoError without tokenizer."""
        if self.tokenizer is None:
            raise FpoError("This base cannot read the tasks' prompts: give its tokenizer by --openpi.tokenizer.")
        return replace(self, prompts=tuple(prompts))

    @property
    def writes_state(self) -> bool:
        """The robot state is part of the prompt, in words (π0.5)."""
        return self.config.model.pi05 and self.config.discrete_state_input

    @property
    def horizon(self) -> int:
        """h, steps in a chunk."""
        return self.config.model.horizon

    @property
    def action_dim(self) -> int:
        """A, width of the noise (π0: 32)."""
        return self.config.model.action_dim

    @property
    def output_dim(self) -> int:
        """a, width of the robot's actions."""
        return self.transform.output_dim

    @property
    def image_size(self) -> int:
        """Edge of the images [pixels]."""
        return self.config.model.image_size

    @property
    def render(self) -> Literal["official", "fast"]:
        """Quality of the pictures that it was trained on."""
        return self.config.render

    @property
    def standardize(self) -> bool:
        """Hidden states have no natural scale."""
        return True

    @property
    def feature_dim(self) -> int:
        """Width of the hidden states, and the robot state's."""
        hidden = 0 if self.features == "proprio" else self.config.model.width
        return hidden + STATE_DIM[self.config.robot]

    @cached_property
    def model(self) -> Pi0:
        """The Linen module whose weights are `params["model"]`."""
        return Pi0(self.config.model)

    @property
    def transform(self) -> RobotTransform:
        """From the robot's units to the model's and back."""
        return self.config.transform

    def encode(self, params: Params, observation: Observation) -> tuple[Float[Array, "N f"], Context]:
        """Runs the prefix once: (features, context). Raises FpoError where a camera is missing."""
        state = self.transform.inputs(params["norm"], observation.proprio)
        images, masks = self._images(observation)
        prompt, prompt_mask = self._prompt(observation, state)
        prefix, hidden = self.model.apply(
            {"params": params["model"]}, images, masks, prompt, prompt_mask, method=Pi0.prefix
        )
        features = jnp.concatenate(
            [self._summary(jnp.asarray(hidden), prefix.mask), state[:, : self.transform.state_dim]], axis=-1
        )
        return features, Context(prefix, state, observation.proprio)

    def decode(self, params: Params, context: Context, noise: Float[Array, "N h A"]) -> Float[Array, "N h a"]:
        """Denoises `noise` into actions in the environment's units, on the cached prefix.

        openpi's time runs from t = 1 (noise) to 0 (actions), ours from u = 0 to 1: `sample_actions` knows.
        """
        actions = sample_actions(
            self.model, params["model"], context.prefix, context.state, noise, num_steps=self.denoise_steps
        )
        return self.transform.outputs(params["norm"], context.proprio, actions)

    def _images(self, observation: Observation) -> tuple[dict[str, Array], dict[str, Array]]:
        shown, size = observation.images or {}, self.image_size
        images, masks = {}, {}
        for camera in self.cameras:
            if camera not in shown:
                raise FpoError(
                    f"This base sees through the camera {camera!r}, which the environment does not show "
                    f"({', '.join(shown) or 'it shows none'}): choose another --env or --base."
                )
            image, name = images_to_float(shown[camera]), CAMERAS[self.config.robot][camera]
            images[name] = image if image.shape[1:3] == (size, size) else resize_with_pad(image, size, size)
            everyone = jnp.ones(len(image), bool)
            masks[name] = (observation.image_masks or {}).get(camera, everyone)
        return images, masks

    def _prompt(
        self, observation: Observation, state: Float[Array, "N A"]
    ) -> tuple[Int[Array, "N l"], Bool[Array, "N l"]]:
        """The environment's prompt where it gives one, that of its task in a suite, else the default task's."""
        num = len(state)
        if observation.prompt is not None:
            assert observation.prompt_mask is not None
            if self.writes_state:
                raise FpoError("This base writes the robot state into its prompt: the environment must not give one.")
            return observation.prompt, observation.prompt_mask
        if self.config.prompt is None and not self.prompts:
            raise FpoError("This base has no task of its own: give it in words, as in --openpi.prompt 'Transfer cube'.")
        task = jnp.zeros(num, jnp.int32) if observation.task is None or not self.prompts else observation.task
        if not self.writes_state:
            ids, mask = self._prompt_table
            return jnp.asarray(ids)[task], jnp.asarray(mask)[task]
        assert self.tokenizer is not None
        tokenizer, dim = self.tokenizer, self.transform.state_dim
        prompts = self.prompts or (self.config.prompt or "",)
        length = tokenizer.trimmed_length(prompts, dim, self.config.max_token_len)

        def tokenize(task: Array, values: Array) -> tuple[np.ndarray, np.ndarray]:
            words = [prompts[index] for index in np.asarray(task).tolist()]
            return tokenizer.tokenize_batch(words, np.asarray(values), length)

        shapes = jax.ShapeDtypeStruct((num, length), jnp.int32), jax.ShapeDtypeStruct((num, length), jnp.bool_)
        ids, mask = jax.pure_callback(tokenize, shapes, task, state[:, :dim])
        return ids, mask

    @cached_property
    def _prompt_table(self) -> tuple[Int[np.ndarray, "K l"], Bool[np.ndarray, "K l"]]:
        """Token ids of every task, padded to the longest, and which of them are tokens."""
        if not self.prompts:
            ids = np.asarray(self.prompt, np.int32)[None]
            return ids, np.ones_like(ids, bool)
        assert self.tokenizer is not None
        length = self.tokenizer.trimmed_length(self.prompts, None, self.config.max_token_len)
        return self.tokenizer.tokenize_batch(self.prompts, None, length)

    def _summary(self, hidden: Float[Array, "N P w"], mask: Bool[Array, "N P"]) -> Float[Array, "N s"]:
        """What the actor sees of the prefix's last hidden states; invalid rows hold arbitrary numbers."""
        hidden = hidden.astype(jnp.float32)
        if self.features == "mean":
            weight = mask / jnp.sum(mask, axis=-1, keepdims=True)
            hidden = jnp.where(mask[..., None], hidden, 0.0)
            return jnp.einsum("np,npw->nw", weight, hidden, precision=jax.lax.Precision.HIGHEST)
        if self.features == "last_token":
            last = hidden.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
            return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return hidden[:, 0, :0]


def compute_dtype(name: str) -> str:
    """The dtype that `auto` means on this machine: openpi's serving precision on accelerators, float32 on CPU."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def open_openpi(
    config: OpenpiConfig, checkpoint: str | None = None, options: OpenpiOptions | None = None
) -> tuple[OpenpiPolicy, Callable[[], Params]]:
    """(policy, what loads its params) of an openpi checkpoint: a directory or bucket URL, by default the public one.

    All but the weights is read at once. Raises FpoError naming what is missing: checkpoint, statistics, tokenizer,
    prompt; and so does the loading.
    """
    options = options or OpenpiOptions()
    directory = locate(checkpoint or config.checkpoint)
    dtype = compute_dtype(options.dtype)
    config = replace(
        config,
        model=replace(config.model, dtype=dtype),
        prompt=options.prompt or config.prompt,
        asset_id=options.asset_id or config.asset_id,
    )
    if config.prompt is None and config.robot != "libero":  # LIBERO's suites come with their prompts
        raise FpoError("This base has no task of its own: give it in words, as in --openpi.prompt 'Transfer cube'.")
    params_folder(directory)  # a wrong directory is said to be one, before what it lacks
    norm = load_norm_stats(directory, config.asset_id)
    beside = checkpoint_root(directory)[0] / TOKENIZER_FILE
    tokenizer = load_tokenizer(options.tokenizer or (str(beside) if beside.exists() else None))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise FpoError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but the model knows {config.model.vocab_size}: give the "
            "one that the checkpoint was trained with by --openpi.tokenizer."
        )
    ids, mask = tokenizer.tokenize(config.prompt or "", None, config.max_token_len)
    policy = OpenpiPolicy(
        config,
        cameras=SIMULATED_CAMERAS[config.robot],
        prompt=tuple(ids[mask].tolist()) if config.prompt is not None else (),
        tokenizer=tokenizer,
        features=options.features,
        denoise_steps=options.denoise_steps,
    )

    def load() -> Params:
        shapes = param_shapes(config.model)
        where = weight_shardings(shapes)
        model = restore_params(directory, shapes, dtype=jnp.dtype(dtype), sharding=where, merge_lora=options.merge_lora)
        return {"model": model, "norm": norm}

    return policy, load
