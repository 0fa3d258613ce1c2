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


def test_moving_mean_pools_episodes_and_not_iterations():
    mean = analysis.moving_mean(np.array([10.0, 40.0, 50.0]), np.array([4.0, 8.0, 0.0]), window=2)
    np.testing.assert_allclose(mean, [4.0, (10 * 4 + 30 * 8) / 40, 30 * 8 / 40])


def curves(scale: float, iterations: int = 20) -> analysis.Curves:
    episodes = 10.0 * np.arange(1, iterations + 1)
    values = {"success_rate": np.clip(scale * episodes / 200, 0, 1), "return": episodes, "episode_length": -episodes}
    return analysis.Curves(episodes, values)


def test_training_curves_say_what_they_show(tmp_path):
    base = {"success_rate": 0.25, "episode_length": 300.0}
    one = analysis.training_curves([curves(1.0)], tmp_path / "one.svg", base=base, title="a task").read_text()
    for words in ("a task", "last 5 iterations (about 50 episodes); 200 episodes", "Wilson", "base policy (0.25)"):
        assert words in one
    assert "base policy (300)" in one and one.count("base policy") < 4  # the return's is not known
    two = analysis.training_curves([curves(1.0), curves(0.5, 15)], tmp_path / "two.svg").read_text()
    assert "mean of 2 seeds" in two and "200 / 150 episodes" in two and "base policy" not in two


def test_a_figure_has_a_format_that_is_known(tmp_path):
    with pytest.raises(FpoError, match=r"end in \.png, \.svg or \.pdf"):
        analysis.training_curves([curves(1.0)], tmp_path / "curves.jpeg")


def test_film_strip(tmp_path):
    frames = np.zeros((3, 20, 30, 3), np.uint8)
    rows = [analysis.FilmRow("base", frames, [0, 5, 9], False), analysis.FilmRow("tuned", frames, [0, 3, 6], True)]
    text = analysis.film_strip(rows, tmp_path / "film.svg", title="state 7").read_text()
    for words in ("state 7", "base", "tuned", "step 5", "step 9: failure", "step 6: success"):
        assert words in text
    assert text.count("<image") == 6


def test_timeline(tmp_path):
    spans = [analysis.Span("policy", "one half", 0.0, 1.0), analysis.Span("simulator 0", "the other", 0.5, 3.0)]
    text = analysis.timeline({"with": spans, "without": spans}, tmp_path / "timeline.svg", title="who").read_text()
    for words in ("who", "with", "without", "policy", "simulator 0", "seconds", "one half", "the other"):
        assert words in text


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
