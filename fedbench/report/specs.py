"""What each plot looks like, in Vega-Lite. The page fills in its rows, each with the names of its run, and its width.

Colours are variables of the page's style sheet, so that a plot follows it into dark mode and onto paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Spec = dict[str, Any]

COLOURS = tuple(f"var(--series-{number})" for number in range(1, 11))

SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")


def _colour(methods: Sequence[str]) -> Spec:
    return _of_methods(methods, COLOURS)


def _shape(methods: Sequence[str]) -> Spec:
    return _of_methods(methods, SHAPES)


def _of_methods(methods: Sequence[str], values: Sequence[str]) -> Spec:
    """A channel that tells methods apart, each by a value of its own as far as these go."""
    scale = {"domain": list(methods), "range": [values[place % len(values)] for place in range(len(methods))]}
    return {"field": "method", "type": "nominal", "title": None, "scale": scale}


def _axis(field: str, title: str, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, "scale": {"zero": False}, **more}


_LOG: Spec = {"type": "log", "nice": False, "padding": 24}

_WHOLE: Spec = {"axis": {"ticks": False, "labelExpr": "datum.value % 1 === 0 ? format(datum.value, 'd') : ''"}}
"""Of an axis of whole numbers."""


def _told(*fields: tuple[str, str]) -> list[Spec]:
    """What is shown of the mark under the pointer: the run, then these fields with their formats."""
    run = [{"field": name, "type": "nominal"} for name in ("method", "scenario", "seed")]
    return run + [
        {"field": field, "type": "quantitative" if form else "nominal"} | ({"format": form} if form else {})
        for field, form in fields
    ]


_PICKED: Spec = {
    "params": [{"name": "picked", "select": {"type": "point", "fields": ["method"]}, "bind": "legend"}],
}
"""A click on a method in the legend lets the others fade."""

_FADING: Spec = {"condition": {"param": "picked", "value": 0.9}, "value": 0.1}


def _lines(
    methods: Sequence[str], x: Spec, y: Spec, told: list[Spec], detail: Sequence[str], dash: Spec | None = None
) -> Spec:
    encoding: Spec = {
        "x": x, "y": y, "color": _colour(methods), "opacity": _FADING, "tooltip": told,
        "detail": [{"field": name, "type": "nominal"} for name in detail],
    }  # fmt: skip
    if dash:
        encoding["strokeDash"] = dash
    mark = {"type": "line", "point": {"size": 22, "filled": True}, "strokeWidth": 1.8}
    return _PICKED | {"mark": mark, "encoding": encoding}


def _dash(field: str, solid: str, dashed: str) -> Spec:
    scale = {"domain": [solid, dashed], "range": [[1, 0], [5, 3]]}
    return {"field": field, "type": "nominal", "title": None, "scale": scale}


def accuracy(methods: Sequence[str], field: str, title: str) -> Spec:
    told = _told(("model", ""), ("round", "d"), ("mb", ",.1f"), ("accuracy", ".1f"))
    y = _axis("accuracy", "accuracy %")
    x = _axis(field, title, **(_WHOLE if field == "round" else {}))
    return _lines(methods, x, y, told, ("run", "model"), _dash("model", "plug-in", "proxy"))


def gradient(methods: Sequence[str]) -> Spec:
    told = _told(("round", "d"), ("phase", ""), ("error", ".3f"))
    return _lines(methods, _axis("round", "round", **_WHOLE), _axis("error", "gradient error"), told, ("run",))


def layers(methods: Sequence[str]) -> Spec:
    told = _told(("layer", "d"), ("moment", ""), ("error", ".3f"))
    x = {"field": "layer", "type": "ordinal", "title": "layer", "axis": {"labelAngle": 0}}
    y = _axis("error", "gradient error")
    return _lines(methods, x, y, told, ("run",), _dash("moment", "first", "last"))


def distillation(methods: Sequence[str]) -> Spec:
    told = _told(("layer", "d"), ("stretch", "d"), ("residual", ".4f"))
    x = {"field": "stretch", "type": "ordinal", "title": "stretch of the distillation", "axis": {"labelAngle": 0}}
    return _lines(methods, x, _axis("residual", "hidden residual"), told, ("run", "layer"))


def gap(methods: Sequence[str]) -> Spec:
    told = _told(("error", ".3f"), ("gap", "+.1f"))
    points = _PICKED | {
        "mark": {"type": "point", "filled": True, "size": 60},
        "encoding": {
            "x": _axis("error", "mean gradient error"), "y": _axis("gap", "gap in points"),
            "color": _colour(methods), "shape": _shape(methods), "opacity": _FADING, "tooltip": told,
        },
    }  # fmt: skip
    zero = {
        "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 3]}, "encoding": {"y": {"datum": 0}}
    }  # fmt: skip
    return {"layer": [zero, points]}


def front(methods: Sequence[str], field: str, title: str, log: bool = False) -> Spec:
    """Accuracy over the cost `field`; the fainter, the less a method may be on the front."""
    x = _axis(field, title) | ({"scale": _LOG} if log else {"scale": {"zero": False, "padding": 24}})
    y = _axis("accuracy", "accuracy %")
    standing = {
        "field": "standing", "type": "ordinal", "legend": None,
        "scale": {"domain": ["front", "open", "dominated"], "range": [1, 0.55, 0.2]},
    }  # fmt: skip
    told = [
        {"field": "method", "type": "nominal"}, {"field": "scenario", "type": "nominal"},
        {"field": field, "type": "quantitative", "format": ",.1f", "title": title},
        {"field": "accuracy", "type": "quantitative", "format": ".1f"},
        {"field": "std", "type": "quantitative", "format": ".1f"}, {"field": "seeds", "type": "quantitative"},
        {"field": "standing", "type": "nominal"},
    ]  # fmt: skip
    bars = {
        "transform": [
            {"filter": "datum.std != null"},
            {"calculate": "datum.accuracy - datum.std", "as": "low"},
            {"calculate": "datum.accuracy + datum.std", "as": "high"},
        ],
        "mark": {"type": "rule"},
        "encoding": {
            "x": x, "y": _axis("low", "accuracy %"), "y2": {"field": "high"}, "color": _colour(methods),
            "opacity": standing,
        },
    }  # fmt: skip
    points = {
        "mark": {"type": "point", "filled": True, "size": 90},
        "encoding": {
            "x": x, "y": y, "color": _colour(methods), "shape": _shape(methods), "opacity": standing, "tooltip": told,
        },
    }  # fmt: skip
    above = [{"filter": f"datum.{field} > 0"}] if log else []
    return {"transform": above, "layer": [bars, points]}


def traffic() -> Spec:
    told = _told(("direction", ""), ("kind", ""), ("mb", ",.4~g"))
    return {
        "transform": [{"filter": "datum.mb > 0"}],
        "mark": {"type": "point", "filled": True, "size": 80, "opacity": 0.85},
        "height": {"step": 26},
        "encoding": {
            "x": {"field": "mb", "type": "quantitative", "title": "MB", "scale": _LOG},
            "y": {"field": "method", "type": "nominal", "title": None, "sort": None},
            "color": {"field": "kind", "type": "nominal", "scale": {"range": list(COLOURS)}},
            "shape": {
                "field": "direction", "type": "nominal",
                "scale": {"domain": ["up", "down"], "range": ["triangle-up", "triangle-down"]},
            },
            "tooltip": told,
        },
    }  # fmt: skip


def _counts(y: Spec, x: str, groups: Sequence[str]) -> Spec:
    """Clients in classes, from `low` to `high` along x: a rectangle each, the darker the more."""
    return {
        "transform": [
            {"aggregate": [{"op": "sum", "field": "clients", "as": "clients"}], "groupby": [*groups, "low", "high"]}
        ],
        "mark": {"type": "rect", "color": "var(--series-1)"},
        "height": {"step": 26},
        "encoding": {
            "x": {"field": "low", "type": "quantitative", "title": x, "scale": {"zero": False, "nice": False}},
            "x2": {"field": "high"},
            "y": y,
            "opacity": {
                "field": "clients", "type": "quantitative", "scale": {"range": [0.12, 1], "domainMin": 0},
                "legend": {"title": "clients", "tickCount": 4},
            },
            "tooltip": [
                *({"field": name, "type": "nominal"} for name in groups),
                *({"field": name, "type": "quantitative"} for name in ("low", "high", "clients")),
            ],
        },
    }  # fmt: skip


def clients() -> Spec:
    return _counts({"field": "method", "type": "nominal", "title": None, "sort": None}, "accuracy %", ("method",))


def shares() -> Spec:
    return _counts({"field": "class", "type": "ordinal", "title": "class"}, "% of a client's rows", ("class",))


def labels() -> Spec:
    return {
        "mark": {"type": "bar", "stroke": "var(--paper)", "strokeWidth": 0.5},
        "encoding": {
            "x": {
                "field": "client", "type": "ordinal", "title": "client",
                "axis": {"labelAngle": 0, "labelOverlap": "greedy", "ticks": False},
            },
            "y": {"field": "rows", "type": "quantitative", "title": "rows", "stack": "zero"},
            "color": {"field": "class", "type": "nominal", "scale": {"range": list(COLOURS)}},
            "order": {"field": "class"},
            "tooltip": [
                {"field": "client", "type": "ordinal"}, {"field": "class", "type": "nominal"},
                {"field": "rows", "type": "quantitative"},
            ],
        },
    }  # fmt: skip


CONFIG: Spec = {
    "background": None,
    "font": 'system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif',
    "view": {"stroke": None},
    "aria": False,
    "axis": {
        "labelColor": "var(--ink)", "titleColor": "var(--ink)", "gridColor": "var(--rule)",
        "domainColor": "var(--muted)", "tickColor": "var(--muted)", "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "labelLimit": 150,
    },
    "legend": {
        "orient": "bottom", "labelColor": "var(--ink)", "titleColor": "var(--ink)", "labelFontSize": 12,
        "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 260, "columnPadding": 16,
    },
}  # fmt: skip
"""Of every plot. The drawing is one image with a text of its own, so its marks are not read out one by one."""
