"""Pictures of many ALOHA environments at once, by MJX-Warp's ray caster on an NVIDIA GPU.

It is not what gym-aloha's OpenGL draws: no highlights, no antialiasing, light of a fixed strength. Its pictures differ
from the official ones by 5 of 255 on average, where `fast` ones differ by 1.2 (camera top, 224 pixels); so nothing uses
it unless asked for. Tried with Warp's CPU device only, never on a GPU.

One call from JAX does everything: between `mjx.refit_bvh` and `mjx.render` (3.8.1) no data flows that would keep XLA
from swapping them.
"""

from collections.abc import Callable, Sequence
from typing import no_type_check

import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_render import HEIGHT, WIDTH, check_camera, picture_shape
from fpo_jax.images import padded_size
from fpo_jax.types import Camera

_BRIGHTNESS = 0.66  # of every colour: a surface that faces upwards is then as bright as gym-aloha's lights make it
_BLACK = 0xFF000000  # alpha, red, green, blue


class RayCaster:
    """Draws camera images of joint positions, in one launch for all environments; needs the package warp.

    Raises FpoError for a camera that is not there.
    """

    def __init__(self, camera: Camera):
        check_camera(camera._replace(quality="fast"))
        self.camera, self.shape = camera, picture_shape(camera)
        self._model = _scene()
        self._calls: dict[int, Callable] = {}  # by number of environments, which Warp's buffers fix

    def look(self, qpos: Float[Array, "N 23"]) -> UInt8[Array, "N y x 3"]:
        """Pictures of joint positions [rad, m]; may be called under jit, but not under vmap."""
        if len(qpos) not in self._calls:
            self._calls[len(qpos)] = self._prepare(len(qpos))
        height, width = self._resolution()
        packed = self._calls[len(qpos)](qpos)[0].reshape(len(qpos), height, width)
        image = jnp.stack([packed >> 16, packed >> 8, packed], axis=-1).astype(jnp.uint8)
        above, left = (self.shape[0] - height) // 2, (self.shape[1] - width) // 2
        below, right = self.shape[0] - height - above, self.shape[1] - width - left
        return jnp.pad(image, ((0, 0), (above, below), (left, right), (0, 0)))

    def _resolution(self) -> tuple[int, int]:
        return padded_size((HEIGHT, WIDTH), self.shape[:2])

    def _prepare(self, num_envs: int) -> Callable[[Float[Array, "N 23"]], Sequence[UInt32[Array, "N pixels"]]]:
        import warp as wp
        from mujoco.mjx.third_party import mujoco_warp as mjw
        from mujoco.mjx.third_party.warp._src.jax_experimental import ffi  # MJX's own; warp's has no CPU

        height, width = self._resolution()
        model = mjw.put_model(self._model)
        data = mjw.make_data(self._model, nworld=num_envs, naconmax=1, njmax=1)  # only where things are matters
        context = mjw.create_render_context(
            self._model,
            nworld=num_envs,
            cam_res=(width, height),
            render_rgb=True,
            render_depth=False,
            render_seg=False,
            use_textures=False,
            cam_active=[self._model.camera(i).name == self.camera.name for i in range(self._model.ncam)],
        )
        context.background_color = wp.uint32(_BLACK)

        @no_type_check  # Warp reads these annotations, and they are no types to anybody else
        def draw(qpos: wp.array2d(dtype=wp.float32), rgb: wp.array2d(dtype=wp.uint32)):
            wp.copy(data.qpos, qpos)
            mjw.kinematics(model, data)
            mjw.camlight(model, data)
            context.rgb_data = rgb
            mjw.refit_bvh(model, data, context)
            mjw.render(model, data, context)

        return ffi.jax_callable(
            draw, output_dims=(num_envs, height * width), graph_mode=ffi.GraphMode.NONE, vmap_method=None
        )


def _scene() -> mujoco.MjModel:
    """gym-aloha's, with colours for the ray caster's lights and still cameras where they stand.

    MJX-Warp (3.8.1) cannot turn a camera to a target straight below it, as the official camera `top` has it.
    """
    spec = mujoco.MjSpec.from_file(str(aloha.xml_path()))
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    for camera in spec.cameras:
        if camera.targetbody == aloha.TABLE_GEOM:
            camera.mode = mujoco.mjtCamLight.mjCAMLIGHT_FIXED
            camera.alt.type = mujoco.mjtOrientation.mjORIENTATION_QUAT
            quaternion = np.empty(4)
            mujoco.mju_mat2Quat(quaternion, data.cam(camera.name).xmat)
            camera.quat = quaternion
    for geom in spec.geoms:
        geom.rgba = geom.rgba * [_BRIGHTNESS, _BRIGHTNESS, _BRIGHTNESS, 1.0]
    return spec.compile()
