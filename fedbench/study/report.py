"""A study of gradient error as tables and as a picture, and the files it is kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedbench.files import write_text
from fedbench.records.text import dumps, plain
from fedbench.study.study import Block, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

LEGEND = (
    "own path: gradient error at the method's own values; common: at those of fedavg-lora's run with the same seed,",
    "batches and optimiser. Relative norms, zero-filled (restricted: over the proxy's tunables); cos: cosine.",
    "update: of local training from the common values; drift: of the aggregate, relative to how far the FM's run came;",
    "aggregation: lost by averaging LoRA's factors instead of their products, relative.",
)
PHASES = {"start": "start", "round": "", "before_alignment": "before alignment", "after_alignment": "after alignment"}


def points_frame(study: Study) -> pd.DataFrame:
    """One line a point of the run: errors and cosines as numbers, NaN where there is none."""
    updates, drift = ({block["round"]: block for block in blocks} for blocks in (study.updates, study.drift))
    lines = []
    for point in study.points:
        round, common = point["round"], point["common"]
        # What a round trained and where it ended is told once, beside the last point of the round.
        last = point is [p for p in study.points if p["round"] == round][-1]
        update, drifted = (blocks.get(round) if last else None for blocks in (updates, drift))
        lines.append(
            {
                "method": study.method,
                "round": round + 1,
                "phase": PHASES[point["phase"]],
                "own path": _at(point, "zero_filled", "error"),
                "restricted": _at(point, "restricted", "error"),
                "cos": _at(point, "zero_filled", "cosine"),
                "common": _at(common, "zero_filled", "error"),
                "common restricted": _at(common, "restricted", "error"),
                "common cos": _at(common, "zero_filled", "cosine"),
                "update": _at(update, "zero_filled", "error"),
                "update cos": _at(update, "zero_filled", "cosine"),
                "drift": _at(drifted, "zero_filled", "error"),
                "drift cos": _at(drifted, "zero_filled", "cosine"),
                "aggregation": drifted and drifted["aggregation"],
            }
        )
    return pd.DataFrame(lines)


def layers_frame(study: Study) -> pd.DataFrame:
    """One line a layer of the FM: residuals of distillation, and errors at the common values, start and end."""
    residuals = {entry["layer"]: entry for entry in study.residuals}
    first, last = study.points[0]["common"], study.points[-1]["common"]
    update = study.updates[0] if study.updates else None
    lines = []
    for i, layer in enumerate(entry["layer"] for entry in first["layers"]):
        residual: Mapping[str, Any] = residuals.get(layer, {})
        lines.append(
            {
                "method": study.method,
                "layer": layer,
                "hidden before": residual.get("hidden_before"),
                "hidden": residual.get("hidden"),
                "weight before": residual.get("weight_before"),
                "weight": residual.get("weight"),
                "gradient at start": first["layers"][i]["error"],
                "cos at start": first["layers"][i]["cosine"],
                "gradient at end": last["layers"][i]["error"],
                "cos at end": last["layers"][i]["cosine"],
                "first update": update["layers"][i]["error"] if update else None,
            }
        )
    return pd.DataFrame(lines).astype({name: float for name in lines[0] if name not in ("method", "layer")})


def _at(block: Block | None, part: str, name: str) -> float | None:
    return None if block is None else block[part][name]


def _frames(studies: Sequence[Study]) -> list[tuple[str, pd.DataFrame]]:
    """Titles and tables with their numbers as text."""
    about = studies[0].about
    where = f"{about['scenario']['name']}, {about['fm']}, seed {about['seed']}"
    errors = f"Gradient error, {where}, {about['probe_rows']} probe rows"
    layers = "By layer of the FM: residuals of distillation, and errors at common values"
    every = [(errors, [points_frame(s) for s in studies]), (layers, [layers_frame(s) for s in studies])]
    return [(title, pd.concat([f.astype(object) for f in frames]).map(_as_text)) for title, frames in every]


def _as_text(value: Any) -> str:
    if isinstance(value, (str, int)):
        return str(value)
    return "–" if pd.isna(value) else f"{round(value, 2) + 0.0:.2f}"  # no -0.00


def terminal(studies: Sequence[Study]) -> RenderableType:
    """Both tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for title, frame in _frames(studies):
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for i, column in enumerate(frame.columns):
            table.add_column(column, justify="left" if i == 0 or column == "phase" else "right", overflow="fold")
        for line in frame.itertuples(index=False):
            table.add_row(*line)
        parts += [table, Text("")]
    return Group(*parts, *(Text(line, style="dim") for line in LEGEND))


def markdown(studies: Sequence[Study]) -> str:
    """Both tables in Markdown."""
    parts = []
    for title, frame in _frames(studies):
        align = ["left" if i == 0 or c == "phase" else "right" for i, c in enumerate(frame.columns)]
        parts += [f"## {title}", str(frame.to_markdown(index=False, disable_numparse=True, colalign=align))]
    return "\n\n".join([*parts, "\n".join(f"{line}  " for line in LEGEND).rstrip()]) + "\n"


def plot(studies: Sequence[Study], path: Path) -> None:
    """Errors over the rounds and over the layers, a colour for each method; the format follows from the name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((errors, cosines), (paths, layers)) = pyplot.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    for i, study in enumerate(studies):
        colour, points = f"C{i}", points_frame(study)
        for axes, own, common in ((errors, "own path", "common"), (cosines, "cos", "common cos")):
            axes.plot(points["round"], points[own], color=colour, marker="o", label=f"{study.method}, own path")
            axes.plot(
                points["round"],
                points[common],
                color=colour,
                marker="o",
                ls="--",
                label=f"{study.method}, common values",
            )
        for name, style, blocks in (("update", ":", study.updates), ("drift", "-", study.drift)):
            rounds, values = [b["round"] + 1 for b in blocks], [b["zero_filled"]["error"] for b in blocks]
            paths.plot(rounds, values, color=colour, ls=style, marker=".", label=f"{study.method}, {name}")
        _layers(layers, layers_frame(study), study.method, colour, (i - (len(studies) - 1) / 2) * 0.3 / len(studies))
        aligned = [p["round"] + 1 for p in study.points if p["phase"] == "after_alignment"]
        for axes in (errors, cosines, paths):
            for round in aligned:
                axes.axvline(round, color=colour, alpha=0.3, lw=5, zorder=0)
    for axes, title, unit in (
        (errors, "gradient error on the probe rows", "relative norm, zero-filled"),
        (cosines, "cosine of the gradients", "cosine"),
        (paths, "update of a client's local training; drift of the aggregate", "relative norm, zero-filled"),
        (layers, "by layer: gradient error and residual of distillation", "relative"),
    ):
        axes.set(title=title, ylabel=unit, xlabel="layer" if axes is layers else "rounds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        # Below, one row for each method: inside it would hide points.
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3 if axes is layers else 2)
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), None)
    about = studies[0].about
    where = f"{about['scenario']['name']}, {about['fm']}, seed {about['seed']}"
    figure.suptitle(f"{where}; reference: fedavg-lora on the same batches; bands: alignments")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _layers(axes: Axes, frame: pd.DataFrame, method: str, colour: str, shift: float) -> None:
    places = frame["layer"] + shift
    axes.plot(places, frame["gradient at start"], "o", color=colour, label=f"{method}, gradient, start")
    axes.plot(places, frame["gradient at end"], "s", color=colour, mfc="none", label=f"{method}, gradient, end")
    axes.bar(places, frame["hidden"], 0.3, color=colour, alpha=0.35, label=f"{method}, hidden residual")


def save(studies: Sequence[Study], results: Path) -> Path:
    """Write tables (.md), picture (.png) and each study (.json) under <results>/studies; return the tables' path."""
    about = studies[0].about
    folder = results / "studies" / about["scenario"]["name"]
    for study in studies:
        name = f"{study.method}-s{about['seed']}-{study.about['key'][:12]}.json"
        write_text(folder / name, dumps(plain(study.to_json())))
    path = folder / f"{'-'.join(s.method for s in studies)}-s{about['seed']}.md"
    write_text(path, markdown(studies))
    plot(studies, path.with_suffix(".png"))
    return path
