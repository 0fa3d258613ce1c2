"""An analytic frozen base for `envs/point_mass.py`: an exact flow policy over four headings that ignores the goal."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fpo_jax.policies.small import integrate_denoiser
from fpo_jax.types import Observation, Params

HEADINGS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))  # full speed along the axes


@dataclasses.dataclass(frozen=True)
class PointMassPolicy:
    """Moves at full speed along one of four headings; the noise decides which, the position makes it persist.

    The data distribution of this flow is a mixture of four constant chunks c_k with prior weights
    π_k ∝ exp(persistence · ⟨heading_k, position⟩), whose denoiser is known in closed form:
        â(x_u, u) = Σ_k softmax_k(log π_k + (u ⟨c_k, x_u⟩ - u² ‖c_k‖² / 2) / (1 - u)²) c_k.
    It never looks at the goal, so the right noise depends on the state and no constant noise is right more often than
    another. Implements `fpo_jax.types.BasePolicy`.
    """

    horizon: int = 4
    action_dim: int = 2
    output_dim: int = 2
    feature_dim: int = 4
    standardize: bool = False
    cameras: tuple[str, ...] = ()
    image_size: int = 0
    persistence: float = 8.0  # [1/m]
    euler_steps: int = 10

    def init(self) -> Params:
        """There is nothing to learn: an empty tree."""
        return {}

    def encode(self, params: Params, observation: Observation) -> tuple[Float[Array, "N 4"], Float[Array, "N 2"]]:
        """Features: position and goal [m]. Context: the position."""
        goal = observation.object_pose
        assert goal is not None, "the point mass shows its goal as object_pose"
        return jnp.concatenate([observation.proprio, goal], axis=-1), observation.proprio

    def decode(
        self, params: Params, context: Float[Array, "N 2"], noise: Float[Array, "N h 2"]
    ) -> Float[Array, "N h 2"]:
        """Velocities in [-1, 1]; of the noise, only its mean over the chunk matters."""
        headings = jnp.asarray(HEADINGS)
        prior = self.persistence * context @ headings.T
        squared_norm = float(self.horizon)  # ‖c_k‖² of h unit headings

        def predict(x: Float[Array, "N h 2"], u: Float[Array, " N"]) -> Float[Array, "N h 2"]:
            u = u[:, None]
            evidence = (u * jnp.einsum("nha,ka->nk", x, headings) - u**2 * squared_norm / 2) / (1 - u) ** 2
            weights = jax.nn.softmax(prior + evidence, axis=-1)
            return jnp.broadcast_to((weights @ headings)[:, None], x.shape)

        return integrate_denoiser(predict, noise, self.euler_steps)
