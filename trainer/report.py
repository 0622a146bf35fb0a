"""Pictures of a finished run."""

from __future__ import annotations

import json
from pathlib import Path


def plot_losses(folder: Path) -> Path:
    """Draws the loss of every stage from metrics.jsonl into plots/loss.png; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, axes = pyplot.subplots(1, len(stages), figsize=(4 * len(stages), 3), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        points = [(row["step"], row["loss"]) for row in rows if row["stage"] == stage]
        axis.plot(*zip(*points, strict=True))
        axis.set_title(stage.upper())
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
    figure.tight_layout()
    picture = folder / "plots" / "loss.png"
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return picture
