"""The pictures of README.md and docs/ that are made from a run. Each needs one command before, whose output is read here.

    make demo
    python benchmarks/control_architectures.py --virtual --latency_ms 800 --rounds=1 --scenes still --architectures sync threaded \
        --out=outputs/timeline
    python docs/pictures.py

docs/demo.gif is the video of `make demo`, smaller. docs/timeline.png is the arm of the replay study (CSV files of joint angles in degrees) with an
inference of 0.8 s: `sync` with 50 actions per chunk above `threaded` with 100.
Needs the extra [dev].
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "outputs" / "demo"
RUNS = ROOT / "outputs" / "timeline" / "runs"
ARMS = {
    "sync: the arm waits for each chunk of 50 actions": "still-sync-50-delay_800_ms",
    "threaded: the network computes while the arm moves, 100 actions per chunk": "still-threaded-100-delay_800_ms",
}
# 10 frames a second and 64 colours keep the file near a megabyte; README shows it at this width.
GIF_FILTER = "fps=10,scale=400:-1:flags=lanczos,split[a][b];[a]palettegen=max_colors=64[p];[b][p]paletteuse=dither=bayer:bayer_scale=5"
STILL_DEG_S = 3.0  # slower than this on every joint counts as standing still
SHORTEST_STOP_S = 0.1


def demo_gif(demo: Path, path: Path) -> None:
    """The video has one frame per tick and plays at the target rate; the picture plays at the rate that the run had on its machine."""
    run = json.loads((demo / "report.json").read_text())["run"]
    slower = run["target_hz"] / run["achieved_hz"]
    filters = f"setpts=PTS*{slower:.4f},{GIF_FILTER}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-i", str(demo / "demo.mp4"), "-filter_complex", filters, str(path)]
    subprocess.run(command, check=True)


def timeline(path: Path) -> None:
    """One panel per arm: its joints over time, and the stops shaded."""
    figure, axes = plt.subplots(len(ARMS), 1, figsize=(9, 4.6), sharex=True, sharey=True)
    for axis, (title, run) in zip(axes, ARMS.items(), strict=True):
        header, time_s, joints_deg = read_run(RUNS / run / "trial0" / "infer.csv")
        stops = stops_s(time_s, joints_deg)
        for begin_s, end_s in stops:
            axis.axvspan(begin_s, end_s, color="C3", alpha=0.18, linewidth=0)
        for name, values in zip(header, joints_deg.T, strict=True):
            axis.plot(time_s, values, linewidth=1.1, label=name)
        stood_s = sum(end_s - begin_s for begin_s, end_s in stops)
        axis.set_title(f"{title}: {time_s[-1]:.1f} s, of which {stood_s:.1f} s standing still (shaded)", fontsize=9, loc="left")
        axis.set_ylabel("degrees; gripper: per cent", fontsize=7)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=6, ncol=6, loc="lower right")
    axes[-1].set_xlabel("time since the first target (s); an inference takes 0.8 s, 50 Hz, simulated time, n = 1 run each", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def read_run(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Joint names, times in seconds (T,), joints in degrees (T, J)."""
    header = path.read_text().splitlines()[0].split(",")
    values = np.loadtxt(path, delimiter=",", skiprows=1)
    return header[1:], values[:, 0], values[:, 1:]


def stops_s(time_s: np.ndarray, joints_deg: np.ndarray) -> list[tuple[float, float]]:
    """Begin and end of each time in which no joint moves."""
    still = (np.abs(np.gradient(joints_deg, time_s, axis=0)) < STILL_DEG_S).all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], still.astype(int), [0]])))
    spans = [(time_s[begin], time_s[end - 1]) for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    return [(begin_s, end_s) for begin_s, end_s in spans if end_s - begin_s >= SHORTEST_STOP_S]


def main() -> int:
    for needed in (DEMO / "demo.mp4", RUNS):
        if not needed.exists():
            print(f"error: {needed.relative_to(ROOT)} is missing. Run the commands at the top of docs/pictures.py first.", file=sys.stderr)
            return 1
    demo_gif(DEMO, ROOT / "docs" / "demo.gif")
    timeline(ROOT / "docs" / "timeline.png")
    print("wrote docs/demo.gif, docs/timeline.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
