import json
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from fpo_jax import analysis
from fpo_jax.metrics import wilson_interval
from fpo_jax.types import FpoError

PNG = b"\x89PNG\r\n\x1a\n"


def test_smoothed_success_pools_episodes_and_not_iterations():
    episodes = np.array([10.0, 10.0, 40.0])  # 10, 0 and 30 episodes ended
    rate = np.array([0.5, 0.0, 0.9])  # 5, 0 and 27 successes
    smooth = analysis.smoothed_success(episodes, rate, window=2)
    np.testing.assert_allclose(smooth[0], wilson_interval(5, 10))
    np.testing.assert_allclose(smooth[1], wilson_interval(5, 10))
    np.testing.assert_allclose(smooth[2], wilson_interval(27, 30))
    np.testing.assert_allclose(analysis.smoothed_success(episodes, rate, window=3)[2], wilson_interval(32, 40))


def test_learning_curve(tmp_path):
    metrics_path = tmp_path / "metrics.jsonl"
    records = [{"iteration": i, "episodes": 32 * i, "success_rate": i / 40} for i in range(1, 31)]
    records[0]["success_rate"] = None  # no episode ended yet
    metrics_path.write_text("".join(json.dumps(r) + "\n" for r in records))
    path = analysis.learning_curve_png(metrics_path, tmp_path / "figures" / "curve.png", base=wilson_interval(27, 100))
    assert path.read_bytes().startswith(PNG)


def test_learning_curve_of_a_run_without_episodes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "episodes": 0, "success_rate": null}\n')
    with pytest.raises(FpoError, match="no finished episode"):
        analysis.learning_curve_png(tmp_path / "metrics.jsonl", tmp_path / "curve.png")


def test_steerability_figure(tmp_path):
    rates = {"base": wilson_interval(40, 100), "zero noise": wilson_interval(0, 100), "best": wilson_interval(100, 100)}
    path = analysis.steerability_png(rates, np.linspace(0, 1, 50), tmp_path / "steerability.png")
    assert path.read_bytes().startswith(PNG)


def test_side_by_side_video_holds_the_last_frame(tmp_path):
    base = np.full((12, 44, 60, 3), 40, np.uint8)
    tuned = np.full((7, 44, 60, 3), 200, np.uint8)
    path = analysis.side_by_side_video(base, tuned, tmp_path / "videos" / "both.mp4", fps=10.0)
    decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    pixels = subprocess.run(decode, capture_output=True, check=True).stdout
    video = np.frombuffer(pixels, np.uint8).reshape(12, 64, 120, 3)
    assert abs(video[-1, 40:, 10:50].mean() - 40) < 5
    assert abs(video[-1, 40:, 70:110].mean() - 200) < 5
