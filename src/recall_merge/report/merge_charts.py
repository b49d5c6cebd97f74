"""The charts of a merge: similarity and merge weights by layer, the sizes of the deltas, and how the deltas agree.

Tables have the form of `record.json`: `{"experts": [..], "layers": [..], "rows": [[one number per expert], ..]}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recall_merge.report.pictures import DIVERGING, SEQUENTIAL, WIDTH, altair, chart_of, model_colours, save_chart

LAYER = "layer (0 = embedding)"


def points_of(table: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A table as one point per number."""
    return [
        {"layer": layer, "model": model, name: value}
        for layer, row in zip(table["layers"], table["rows"], strict=True)
        for model, value in zip(table["experts"], row, strict=True)
        if value is not None
    ]


def draw_weights(similarity: Mapping[str, Any] | None, weights: Mapping[str, Any], path: Path, *, title: str = "") -> Path:
    """Save a picture of similarity and merge weights by layer.

    Raises:
        MissingExtra: without the `report` extra.
        OutputError: if the suffix of `path` is not one of .png, .svg, .html, .json.
    """
    chart = similarity_and_weights(similarity, weights)
    return save_chart(chart.properties(title=title) if title else chart, path)


def similarity_and_weights(similarity: Mapping[str, Any] | None, weights: Mapping[str, Any]) -> Any:
    """Heat maps of both, and the weights as lines. Pointing at a layer of the first map marks it in all; the legend highlights a model."""
    alt = altair()
    at_layer = alt.selection_point(name="at_layer", fields=["layer"], on="pointerover", clear="pointerout", empty=False)
    chosen = alt.selection_point(name="chosen", fields=["model"], bind="legend")
    even = 1 / len(weights["experts"])
    parts = []
    if similarity:
        colour = alt.Color("similarity:Q", scale=alt.Scale(scheme=SEQUENTIAL), title="similarity to the newest")
        parts.append(_heat(similarity, "similarity", colour, at_layer, last=weights["layers"][-1]))
    spread = max(abs(value - even) for row in weights["rows"] for value in row) or 0.1
    scale = alt.Scale(scheme=DIVERGING, domain=[even - spread, even + spread], domainMid=even)
    colour = alt.Color("weight:Q", scale=scale, title=f"weight (even share: {even:.3f})", legend=alt.Legend(format=".3f"))
    if any(row != weights["rows"][0] for row in weights["rows"]) or not parts:
        parts.append(_heat(weights, "weight", colour, at_layer, last=weights["layers"][-1]))
    base = chart_of(points_of(weights, "weight"))
    lines = _lines(base, weights, "weight", alt.Y("weight:Q", title="weight")).add_params(chosen)
    lines = lines.encode(opacity=alt.condition(chosen, alt.value(1), alt.value(0.15)))
    rule = base.mark_rule(aria=False).encode(x="layer:Q", opacity=alt.condition(at_layer, alt.value(0.3), alt.value(0)))
    parts[0] = parts[0].add_params(at_layer)
    parts.append(alt.layer(lines, rule).properties(width=WIDTH, height=220))
    return alt.vconcat(*parts, spacing=14).resolve_scale(color="independent", shape="independent", strokeDash="independent")


def explore(similarity: Mapping[str, Any], merge_weights: Mapping[str, Any]) -> Any:
    """Merge weights from the stored similarity, for a temperature, a bandwidth and a scale that the reader sets.

    w_q = softmax_q(S_q^(1 / c^2) / tau), drawn times lambda. S^(1/c^2) is the rbf similarity at c times the bandwidth, exactly if all
    samples of a layer are equally far apart. Other kernels have no bandwidth, and no slider for it.

    Args:
        merge_weights: the options of RECALL's weights.
    """
    alt = altair()
    temperature = float(merge_weights.get("temperature", 1.0))
    tau = alt.param(name="temperature", value=temperature, bind=alt.binding_range(min=0.02, max=2, step=0.01, name="temperature"))
    width = alt.param(name="bandwidth", value=1, bind=alt.binding_range(min=0.25, max=4, step=0.05, name="bandwidth x"))
    scale = alt.param(name="lambda", value=1, bind=alt.binding_range(min=0, max=3, step=0.05, name="lambda"))
    rbf = merge_weights.get("kernel", "rbf") == "rbf"
    kernel = "pow(datum.similarity, 1 / (bandwidth * bandwidth))" if rbf else "datum.similarity"
    drawn = (
        chart_of(points_of(similarity, "similarity"))
        .transform_calculate(alike=kernel)
        .transform_joinaggregate(most="max(alike)", groupby=["layer"])
        .transform_calculate(power="exp((datum.alike - datum.most) / temperature)")
        .transform_joinaggregate(total="sum(power)", groupby=["layer"])
        .transform_calculate(weight="lambda * datum.power / datum.total")
    )
    lines = _lines(drawn, similarity, "weight", alt.Y("weight:Q", title="lambda x weight"))
    return lines.add_params(tau, *([width] if rbf else []), scale).properties(width=WIDTH, height=240)


def lines(table: Mapping[str, Any], name: str, title: str, *, log: bool = False, last_is_merge: bool = False) -> Any:
    """The numbers of a table over the layers, one line per model.

    Args:
        log: on a logarithmic scale, which leaves out zeros.
        last_is_merge: draw the last model dashed and grey.
    """
    alt = altair()
    y = alt.Y(f"{name}:Q", title=title)
    points = points_of(table, name)
    if log:
        points = [point for point in points if point[name] > 0]
        y = alt.Y(f"{name}:Q", title=f"{title} (log)", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=5, format="~g"))
    return _lines(chart_of(points), table, name, y, last_is_merge=last_is_merge).properties(width=WIDTH, height=240)


def delta_cosines(cosines: Mapping[str, Any]) -> Any:
    """Cosine between two experts' deltas at every layer. 0, the middle of the colours: they are at right angles."""
    alt = altair()
    largest = max((abs(point["cosine"]) for point in points_of(cosines, "cosine")), default=0.0) or 1.0
    scale = alt.Scale(scheme=DIVERGING, domain=[-largest, largest], domainMid=0)
    colour = alt.Color("cosine:Q", scale=scale, title="cosine; 0 = at right angles", legend=alt.Legend(format=".2f"))
    return _heat(cosines, "cosine", colour, None, last=cosines["layers"][-1]).properties(width=WIDTH)


def _heat(table: Mapping[str, Any], name: str, colour: Any, at_layer: Any, *, last: int) -> Any:
    """Layers to the right, models down; one tile per number."""
    alt = altair()
    points = [point | {"from": point["layer"] - 0.5, "to": point["layer"] + 0.5} for point in points_of(table, name)]
    chart = (
        chart_of(points)
        .mark_rect()
        .encode(
            x=alt.X("from:Q", title=LAYER, scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False), axis=_axis()),
            x2="to:Q",
            y=alt.Y("model:N", title=None, scale=alt.Scale(domain=list(table["experts"]))),
            color=colour,
            tooltip=[alt.Tooltip("model:N"), alt.Tooltip("layer:Q"), alt.Tooltip(f"{name}:Q", format=".4f")],
        )
        .properties(width=WIDTH, height=max(40, 26 * len(table["experts"])))
    )
    if at_layer is None:
        return chart
    return chart.encode(strokeWidth=alt.condition(at_layer, alt.value(2), alt.value(0)), stroke=alt.value("#d8358c"))


def _lines(base: Any, table: Mapping[str, Any], name: str, y: Any, *, last_is_merge: bool = False) -> Any:
    """One line per model over the layers, distinguished by colour, shape and dash."""
    alt = altair()
    order, ends = list(table["experts"]), [table["layers"][0] - 0.5, table["layers"][-1] + 0.5]  # as in the heat maps
    colours = model_colours(order)
    dashes = [[1, 0]] * len(order)
    if last_is_merge:
        colours, dashes = {**colours, "range": [*colours["range"][:-1], "#888888"]}, [*dashes[:-1], [6, 3]]
    return base.mark_line(point=alt.OverlayMarkDef(size=34, filled=True), strokeWidth=2).encode(
        x=alt.X("layer:Q", title=LAYER, axis=_axis(), scale=alt.Scale(domain=ends, nice=False)),
        y=y,
        color=alt.Color("model:N", scale=alt.Scale(**colours), title="model"),
        shape=alt.Shape("model:N", scale=alt.Scale(domain=order), title="model"),
        strokeDash=alt.StrokeDash("model:N", scale=alt.Scale(domain=order, range=dashes), title="model"),
        tooltip=[alt.Tooltip("model:N"), alt.Tooltip("layer:Q"), alt.Tooltip(f"{name}:Q", format=".4f")],
    )


def _axis() -> Any:
    return altair().Axis(tickMinStep=1, format="d", grid=False)
