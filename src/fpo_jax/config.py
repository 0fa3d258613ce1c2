"""Every knob of the library as frozen dataclasses with units or equation numbers, and the presets."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fpo_jax.types import FpoError, Quality, suggestion


@dataclass(frozen=True)
class OpenpiOptions:
    """How an openpi base (π0, π0.5) is read; ignored by other bases. None: as its named configuration says."""

    features: Literal["mean", "last_token", "proprio"] = "mean"
    """s_t: mean: mean of the prefix's valid last hidden states, and proprio; last_token: its last one, and proprio."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and arithmetic: auto is bfloat16 (openpi's serving precision) on accelerators, float32 on CPU."""
    prompt: str | None = None
    """The task in words."""
    asset_id: str | None = None
    """Which normalisation statistics of the checkpoint's assets/ to use."""
    tokenizer: str | None = None
    """PaliGemma's SentencePiece model: a file or a bucket URL; by default the checkpoint's, else openpi's."""
    denoise_steps: int = 10
    """Euler steps from noise to actions."""
    merge_lora: bool = False
    """Add the checkpoint's LoRA factors to its weights while loading."""


@dataclass(frozen=True)
class LiberoOptions:
    """LIBERO's protocol and its processes; ignored by other environments. The defaults are openpi's evaluation, but for
    `seeds`, which results name as a deviation."""

    python: str | None = None
    """The Python of LIBERO's own virtual environment; by default what `python -m fpo_jax.envs.libero_setup` made."""
    assets: str | None = None
    """LIBERO's assets folder; by default what `python -m fpo_jax.envs.libero_setup` found."""
    train_inits: str = "sampled"
    """Where training begins: sampled (from the task's regions), all (official initial states), or a part, as 0:40."""
    test_inits: str = "all"
    """Which official initial states evaluation plays, in order: all, or a part, as 40:50."""
    tasks: Literal["uniform", "success", "spread"] = "uniform"
    """How training draws a suite's tasks: uniform; success: mostly those neither hopeless nor solved; spread: each
    environment always plays the same one (the first plays the first, and so on), so that no scene is built twice."""
    seeds: Literal["episode", "openpi"] = "episode"
    """Fixture poses in evaluation: episode: each episode's own seed; openpi: seed 7, in the order of its trials."""
    overlap: bool = True
    """Let one half of the environments simulate while the policy decides for the other half."""
    start_seconds: float = 300.0
    """How long a simulator process may take to start."""
    reset_seconds: float = 180.0
    """How long a reset may take; the first one of a task builds the scene."""
    step_seconds: float = 60.0
    """How long a decision's control steps and pictures may take."""
    max_restarts: int = 100
    """Simulator processes that may be lost and replaced before the run stops, with its state saved."""
    egl_devices: tuple[int, ...] = ()
    """EGL devices (GPUs) that draw for the environments in turn: the first for the first one, and so on, over and over.
    By default one draws for all."""


@dataclass(frozen=True)
class LatentConfig:
    """Which part of the base's noise is the latent x (notes on Eq. 7 in docs/equations.md)."""

    space: Literal["dct", "full", "repeat"] = "dct"
    """dct: low temporal frequencies, the rest of the noise stays random; full: all of it; repeat: one row repeated."""
    rank: int = 2
    """Number of temporal frequencies that `dct` steers; D = rank x steered action width."""
    steer_padding: bool = False
    """Also steer the action dimensions that the robot does not have (π0 pads its actions to 32)."""


@dataclass(frozen=True)
class ActorConfig:
    """The flow actor π_θ(x | s)."""

    hidden: tuple[int, ...] = (128, 128)
    """Widths of the velocity network."""
    learning_rate: float = 1e-3
    """Adam step size."""
    max_grad_norm: float = 1.0
    """Global gradient norm at which updates are clipped."""
    sampler_steps: int = 10
    """K: integration steps from noise to latent."""
    integrator: Literal["midpoint", "euler"] = "midpoint"
    """One-step method of the sampler."""
    preserve_prior: bool = True
    """Add the analytic field of N(0, I) and integrate x/√(u²+(1-u)²), so that step 0 is exactly the base."""
    explore_steps: int = 0
    """Extra steps of Eq. (7) after sampling (reading B); 0 = the K sampler steps are the exploration (reading A)."""
    explore_step_size: float = 0.02
    """η of Eq. (7), for explore_steps > 0."""
    cfm_draws: int = 8
    """S: Monte-Carlo draws (ε, u) per sample for ℓ_cfm."""


@dataclass(frozen=True)
class CriticConfig:
    """The Q ensemble."""

    num_critics: int = 4
    """M: members of the ensemble."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of each member."""
    learning_rate: float = 3e-4
    """Adam step size."""
    max_grad_norm: float = 1.0
    """Global gradient norm at which updates are clipped."""
    polyak: float = 0.02
    """Share of the online critics that enters the target critics at each gradient step."""
    value_samples: int = 8
    """Fresh latents per state for V(s) = mean of min_i Q(s, x')."""


@dataclass(frozen=True)
class FpoConfig:
    """Ratio, trust region and advantage (Eqs. 2-4)."""

    ratio: Literal["mean", "sample", "paper"] = "mean"
    """mean: exp(mean over draws of Δℓ); sample: one ratio per draw; paper: exp(β z), z standardised over the batch."""
    beta: float = 0.1
    """β of Eq. (3), for ratio=paper."""
    std_floor: float = 0.02
    """Lower bound of σ_Δ in Eq. (3), for ratio=paper; without one the first step divides 0 by 0."""
    log_ratio_clamp: float = 3.0
    """Bound of |log ρ|, for ratio=mean and sample."""
    trust_region: Literal["clip", "asymmetric", "none"] = "clip"
    """clip: Eq. (4); asymmetric: clip for Â >= 0, quadratic penalty for Â < 0; none: ρ Â (ablation no_clip)."""
    epsilon: float = 0.2
    """ε of Eq. (4)."""
    anchor: float = 0.02
    """Weight of the mean squared deviation of v_θ from the prior field; holds bad samples within reach."""
    advantage: Literal["gae", "q_minus_v"] = "gae"
    """gae: generalised advantage estimation over whole trajectories; q_minus_v: min_i Q(s, x) - V(s)."""
    value_latents: Literal["fresh", "stored"] = "fresh"
    """Latents at which V(s) reads the critics; stored (the paper) leaves no signal: docs/equations.md."""
    gae_lambda: float = 0.95
    """λ of GAE."""
    standardize_advantage: bool = True
    """Standardise Â within each minibatch."""


@dataclass(frozen=True)
class SacConfig:
    """Latent-space soft actor-critic (ablation `no_ratio`)."""

    hidden: tuple[int, ...] = (128, 128, 128)
    """Widths of the Gaussian actor."""
    learning_rate: float = 3e-4
    """Adam step size of the actor and the temperature."""
    scale: float = 2.0
    """Latents are scale · tanh(·)."""
    target_entropy: float = 0.0
    """Entropy per sample that the temperature aims at [nats]."""
    initial_temperature: float = 1.0
    """Entropy weight at the start."""
    reduction: Literal["mean", "min"] = "mean"
    """How the ensemble becomes one value."""


@dataclass(frozen=True)
class RolloutConfig:
    """How experience is gathered and valued."""

    decisions: int | None = None
    """T: decisions per environment and iteration; by default those of one whole episode, and one for its reset."""
    gamma: float = 0.99
    """γ per decision, Eq. (1)."""
    reward: Literal["sparse", "step_cost"] = "sparse"
    """sparse: 1 at success, else 0; step_cost: 0 at success, else -1."""
    time_limit: Literal["terminal", "truncate"] = "terminal"
    """terminal: the time limit ends the task and s holds the remaining time; truncate: bootstrap, s has no clock."""
    window: int = 2
    """W: rollouts that the sliding-window buffer keeps."""


@dataclass(frozen=True)
class UpdateConfig:
    """The update phase (K_update of Alg. 1 = epochs x minibatches)."""

    epochs: int = 8
    """Passes over the window per iteration."""
    minibatch_size: int = 128
    """B: transitions per gradient step."""
    minibatches: int | None = None
    """Minibatches per pass; by default as many as cover the window."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The paired evaluation at the end of a run."""

    episodes: int = 256
    """Episodes each for base and tuned, from the same initial states and noise seeds."""
    seed: int = 1_000_003
    """Seed of the initial states; apart from training's."""
    video: bool = True
    """Write a side-by-side video of base and tuned."""


@dataclass(frozen=True)
class SavingConfig:
    """What a run keeps on disk."""

    every: int = 5
    """Iterations between rolling checkpoints; one is always written at the end and on Ctrl-C or SIGTERM."""
    keep: int = 2
    """Rolling checkpoints kept."""
    milestone_every: int = 12
    """Iterations between milestones, from step 0 on, and one at the end: agent and its rollout's latents; 0 = none."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str | None = None
    """Weights & Biases project to log to."""
    stop_on_collapse: bool = True
    """End the run, with its state saved, when the policy has collapsed."""


@dataclass(frozen=True)
class ParallelOptions:
    """Devices and hosts; results do not depend on them, but for rounding (docs/scale.md)."""

    devices: int | None = None
    """Devices that the environments are split over; by default all."""
    fsdp: int = 1
    """Devices of one host that share a copy of the base's weights, for bases too large for one device."""
    hosts: Literal["auto", "one", "many"] = "auto"
    """auto: as many processes as SLURM or Open MPI announce; many: also ask the cluster (a TPU slice); one: alone."""
    coordinator: str | None = None
    """host:port of process 0, where nothing announces it; with num-processes and process-id."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""


@dataclass(frozen=True)
class PopulationOptions:
    """Several runs in one compiled program (docs/scale.md)."""

    size: int = 1
    """Seeds: seed, seed + 1, ..."""
    vary: tuple[str, ...] = ()
    """Settings, each as a list (actor.learning-rate=3e-4,1e-3) or from:to:count in equal ratios
    (fpo.epsilon=.05:.4:4); every combination is trained with every seed."""


@dataclass(frozen=True)
class TrainConfig:
    """Flow Policy Optimization of a frozen flow-matching base policy."""

    env: str = "aloha_transfer_cube"
    """Environment: aloha_transfer_cube, point_mass, a LIBERO suite (libero_spatial, libero_object, libero_goal,
    libero_10, libero_90), or one task of it, by name or index: libero_90/3."""
    base: str | None = None
    """Frozen base policy: a name (a shipped one, or openpi's pi0_aloha_sim, pi05_libero, ...) or a directory; by
    default the one shipped for the environment."""
    checkpoint: str | None = None
    """Where the weights of an openpi base lie: a directory or a bucket URL (gs://...); by default openpi's own."""
    algorithm: Literal["fpo", "sac"] = "fpo"
    """fpo, or latent-space SAC."""
    physics: Literal["auto", "mujoco", "mjx", "warp", "jax"] = "auto"
    """Simulator: auto takes C MuJoCo on CPU, MJX-Warp or MJX on NVIDIA, MJX on TPU; jax is point_mass's own."""
    seed: int = 0
    """Seed of everything random in training."""
    iterations: int = 48
    """Rollout-and-update rounds."""
    num_envs: int = 64
    """N: parallel environments."""
    episode_length: int | None = None
    """Control steps per episode; by default the environment's (ALOHA 300, LIBERO 220 to 520)."""
    execute_steps: int | None = None
    """Control steps executed per decision; by default the environment's (ALOHA 50, LIBERO 5)."""
    run_dir: str | None = None
    """Where the run is written; by default runs/<env>[-<base>]-<preset>-s<seed>."""
    resume: Literal["no", "yes", "auto"] = "no"
    """yes (or --resume alone): continue the run in run_dir from its last checkpoint; auto: continue it where there is
    one, else begin it, so that a restarted job runs the same command."""
    render: Quality | None = None
    """Camera images, by default as the base was trained on: official as gym-aloha draws them; fast without shadows and
    multisampling; raycast by MJX-Warp on the GPU, which look different (physics=warp only)."""
    preset: str = "default"
    """Named settings, see PRESETS; options given beside it override it."""
    openpi: OpenpiOptions = field(default_factory=OpenpiOptions)
    libero: LiberoOptions = field(default_factory=LiberoOptions)
    latent: LatentConfig = field(default_factory=LatentConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    fpo: FpoConfig = field(default_factory=FpoConfig)
    sac: SacConfig = field(default_factory=SacConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    population: PopulationOptions = field(default_factory=PopulationOptions)


_DEFAULT = TrainConfig()

LIBERO_BUTTER = replace(
    _DEFAULT,
    preset="libero_butter",
    env="libero_90/LIVING_ROOM_SCENE3_pick_up_the_butter_and_put_it_in_the_tray",
    base="libero_butter",
    iterations=20,
    num_envs=16,
    episode_length=100,
    execute_steps=20,
    rollout=replace(_DEFAULT.rollout, decisions=28),
    evaluation=replace(_DEFAULT.evaluation, episodes=200, video=False),
)
"""The paper's ablation task from a small state-based base: its simulators are slow, its episodes short."""

LIBERO_OBJECT = replace(
    LIBERO_BUTTER,
    preset="libero_object",
    env="libero_object",
    base="libero_object_basket",
    iterations=12,
    num_envs=20,
    episode_length=160,
    libero=replace(_DEFAULT.libero, tasks="spread"),
    rollout=replace(_DEFAULT.rollout, decisions=27),
    evaluation=replace(LIBERO_BUTTER.evaluation, episodes=500),
)
"""The ten tasks of a suite with one actor, from a small state-based base."""

PRESETS: dict[str, TrainConfig] = {
    "default": _DEFAULT,
    "libero_butter": LIBERO_BUTTER,
    "libero_object": LIBERO_OBJECT,
    # As literal as can run: z-scored ratio, plain clip, V from stored latents, plain Euler without the prior field
    # (an untrained field of 0 still samples N(0, I), but a trained one contracts), and reading B of Eq. (7). The paper
    # names no learning rate; at ours, 1e-3, its unguarded ratio diverges in three iterations.
    "paper": replace(
        _DEFAULT,
        preset="paper",
        actor=replace(_DEFAULT.actor, integrator="euler", preserve_prior=False, explore_steps=10, learning_rate=1e-4),
        fpo=replace(_DEFAULT.fpo, ratio="paper", anchor=0.0, value_latents="stored"),
    ),
    "no_clip": replace(_DEFAULT, preset="no_clip", fpo=replace(_DEFAULT.fpo, trust_region="none")),
    "single_step": replace(
        _DEFAULT, preset="single_step", actor=replace(_DEFAULT.actor, sampler_steps=1, integrator="euler")
    ),
    "single_critic": replace(_DEFAULT, preset="single_critic", critic=replace(_DEFAULT.critic, num_critics=1)),
    "no_ratio": replace(
        _DEFAULT,
        preset="no_ratio",
        algorithm="sac",
        critic=replace(_DEFAULT.critic, num_critics=10),
        rollout=replace(_DEFAULT.rollout, reward="step_cost", window=50),
        update=UpdateConfig(epochs=1, minibatch_size=256, minibatches=300),
    ),
}
"""Named starting points: `paper`, and the paper's Table II ablations."""


def preset(name: str) -> TrainConfig:
    """The settings of that name; raises FpoError for an unknown one."""
    if name not in PRESETS:
        raise FpoError(f"There is no preset {name!r}{suggestion(name, PRESETS)}")
    return PRESETS[name]


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested plain values, as JSON keeps them."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], like: Any = _DEFAULT) -> Any:
    """The inverse of `to_dict` (also after a trip through JSON); raises FpoError on fields that do not exist."""
    known = {entry.name: getattr(like, entry.name) for entry in dataclasses.fields(like)}
    if unknown := sorted(set(values) - set(known)):
        raise FpoError(
            f"The saved configuration has unknown fields ({', '.join(unknown)}); use the version that wrote it."
        )
    parsed = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(known[name]):
            value = from_dict(value, known[name])
        parsed[name] = tuple(value) if isinstance(value, list) else value
    return replace(like, **parsed)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Every field in which two configurations differ, as "name: old -> new"."""
    found = []
    for entry in dataclasses.fields(old):
        before, after, name = getattr(old, entry.name), getattr(new, entry.name), prefix + entry.name
        if dataclasses.is_dataclass(before):
            found += differences(before, after, name + ".")
        elif before != after:
            found.append(f"{name}: {before} -> {after}")
    return found


_AT_LEAST_ONE = (
    *(
        "iterations",
        "num_envs",
        "population.size",
        "latent.rank",
        "actor.sampler_steps",
        "actor.cfm_draws",
        "critic.num_critics",
    ),
    "openpi.denoise_steps",
    *("critic.value_samples", "rollout.window", "update.epochs", "update.minibatch_size"),
    *("saving.every", "parallel.fsdp"),
)
_AT_LEAST_ONE_OR_LEFT_OUT = ("rollout.decisions", "update.minibatches", "parallel.devices")
_POSITIVE = (
    *("actor.learning_rate", "actor.max_grad_norm", "critic.learning_rate", "critic.max_grad_norm"),
    *("fpo.epsilon", "fpo.beta", "fpo.std_floor", "fpo.log_ratio_clamp"),
    *("sac.learning_rate", "sac.scale", "sac.initial_temperature"),
    *("libero.start_seconds", "libero.reset_seconds", "libero.step_seconds"),
)
_SHARES = ("rollout.gamma", "fpo.gae_lambda", "critic.polyak")
_NOT_NEGATIVE = (
    *("evaluation.episodes", "saving.milestone_every", "saving.keep", "actor.explore_steps", "fpo.anchor"),
    "libero.max_restarts",
)


def check(config: TrainConfig) -> None:
    """Raises FpoError naming the first option whose value cannot work."""

    def value(name: str) -> Any:
        found: Any = config
        for part in name.split("."):
            found = getattr(found, part)
        return found

    rules = (
        (_AT_LEAST_ONE, lambda x: x >= 1, "at least 1"),
        (_AT_LEAST_ONE_OR_LEFT_OUT, lambda x: x is None or x >= 1, "at least 1 or left out"),
        (_POSITIVE, lambda x: x > 0, "greater than 0"),
        (_SHARES, lambda x: 0 <= x <= 1, "between 0 and 1"),
        (_NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
    )
    for names, allowed, wanted in rules:
        for name in names:
            if not allowed(value(name)):
                raise FpoError(f"{name} must be {wanted}, not {value(name)}.")
    if config.fpo.advantage == "q_minus_v" and config.fpo.value_latents == "stored":
        raise FpoError("fpo.advantage=q_minus_v with fpo.value_latents=stored is always 0; choose fresh latents.")
