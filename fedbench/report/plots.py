"""The plots of a report, in their order: which figures each shows, how, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedbench.report import specs


@dataclass(frozen=True)
class Plot:
    """A plot: the figures it shows, by their name, and what is said of it.

    summary: the column of figures whose range its text alternative gives. every: whether it shows all sections that
    the filters leave, not one. first: whether it shows the first run with figures alone.
    """

    name: str
    figures: str
    title: str
    caption: str
    summary: str
    spec: specs.Spec
    every: bool = False
    first: bool = False


def plots(methods: Sequence[str]) -> list[Plot]:
    """All plots; `methods` are the labels of all lines, of which each keeps its colour from plot to plot."""
    return [
        Plot(
            "accuracy-rounds", "accuracy", "Accuracy over rounds",
            "Accuracy on the validation rows after each round that was scored; a line is one run. Dashed: the proxy.",
            "accuracy", specs.accuracy(methods, "round", "round"),
        ),
        Plot(
            "accuracy-bytes", "accuracy", "Accuracy over bytes",
            "The same over what had crossed by then, both ways, set-up included (MB: 10^6 bytes).",
            "accuracy", specs.accuracy(methods, "mb", "MB that have crossed"),
        ),
        Plot(
            "front-bytes", "front", "Accuracy against traffic",
            "Mean test accuracy of each method, ± its standard deviation over seeds, over the MB of a run both ways, "
            "set-up included. Faint: dominated, for another costs no more in traffic, client memory and exposure, and "
            "is better; half: open, for such another cannot be told apart.", "accuracy",
            specs.front(methods, "mb", "MB both ways", log=True),
        ),
        Plot(
            "front-memory", "front", "Accuracy against client memory",
            "The same over the parameters that a client holds, 4 bytes each.", "accuracy",
            specs.front(methods, "client_mb", "client MB"),
        ),
        Plot(
            "front-exposure", "front", "Accuracy against exposure",
            "The same over the share of the FM's weights at a client verbatim.", "accuracy",
            specs.front(methods, "exposed", "exposed %"),
        ),
        Plot(
            "traffic", "traffic", "Communication by kind",
            "MB of each kind of message over all clients and rounds, on a logarithmic axis; a mark is one run.",
            "mb", specs.traffic(),
        ),
        Plot(
            "gradient-rounds", "gradient", "Gradient error over rounds",
            "Gradient on the proxy against the FM's, relative norm over all of the FM's tunables; 0 is before the "
            "first round.", "error", specs.gradient(methods),
        ),
        Plot(
            "gradient-layers", "layers", "Gradient error by layer",
            "The same by layer of the FM, at the first moment it was measured at, and dashed at the last.",
            "error", specs.layers(methods),
        ),
        Plot(
            "gap", "gap", "Proxy gap against gradient error",
            "Plug-in minus proxy accuracy in points, over the mean gradient error of the run; a mark is one run. All "
            "scenarios that the filters leave.", "gap", specs.gap(methods), every=True,
        ),
        Plot(
            "clients", "clients", "Accuracy of clients",
            "Clients by their accuracy in classes of 2 points, over all seeds; the darker, the more clients.",
            "clients", specs.clients(),
        ),
        Plot(
            "labels", "labels", "Labels of clients",
            "Rows of each class at each client; of several seeds the first.", "rows", specs.labels(), first=True,
        ),
        Plot(
            "shares", "shares", "Labels of clients, counted",
            "How many clients have a class as such a share of their rows, in classes of 10 points; the darker, the "
            "more clients; of several seeds the first.", "clients", specs.shares(), first=True,
        ),
        Plot(
            "distillation", "distillation", "Course of distillation",
            "Relative error of hidden states on the batches of the distillation, in up to ten stretches; a line is one "
            "layer of one run. Where the last ones still fall, more steps would have helped.",
            "residual", specs.distillation(methods),
        ),
    ]  # fmt: skip
