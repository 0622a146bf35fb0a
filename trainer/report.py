"""Pictures of a finished run."""

from __future__ import annotations

from pathlib import Path

from trainer.stages.checkpoints import read_metrics


def plot_losses(folder: Path) -> Path | None:
    """Draws the loss of every stage from metrics.jsonl into plots/loss.png; None when nothing was logged."""
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
