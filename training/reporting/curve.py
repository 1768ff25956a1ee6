"""Draw the learning curve of a run as an SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from training.files import read_lines, write_atomic

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 64, 40, 48
COLOURS = ("#1f6f8b", "#c8553d", "#588b3f", "#7a4f9a", "#b8860b")
Points = list[tuple[float, float]]


def draw_curve(run_dir: Path, title: str = "") -> Path:
    """Draw `metrics.jsonl` of `run_dir` to `learning_curve.svg`; returns its path.

    The loss is on the left axis, metrics are on the right axis.
    """
    loss: dict[int, float] = {}
    metrics: dict[str, dict[int, float]] = {}
    for line in read_lines(run_dir / "metrics.jsonl"):  # a later attempt's line replaces an earlier one's
        if _finite(line.get("loss")):
            loss[line["step"]] = line["loss"]
        for name, value in line.get("eval", {}).items():
            if name != "samples" and _finite(value):
                metrics.setdefault(name, {})[line["step"]] = value
    curves = {name: sorted(values.items()) for name, values in metrics.items()}
    path = run_dir / "learning_curve.svg"
    write_atomic(path, svg(sorted(loss.items()), curves, title), 0o666)
    return path


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)  # others are logged as strings, such as "NaN"


def svg(loss: Sequence[tuple[float, float]], metrics: dict[str, Any], title: str) -> str:
    """The SVG as text; `loss` and each of `metrics` are (step, value) points."""
    last = max([step for points in (loss, *metrics.values()) for step, _ in points], default=1) or 1
    highest = max([value for _, value in loss], default=1.0) or 1.0
    lowest = min([0.0, *(value for points in metrics.values() for _, value in points)])

    def place(points: Sequence[tuple[float, float]], low: float, high: float) -> str:
        across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return " ".join(
            f"{LEFT + across * step / last:.1f},{TOP + down * (1 - (value - low) / (high - low)):.1f}"
            for step, value in points
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">',
        '<style>text{font-size:12px}</style><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="22">{escape(title)}</text>',
    ]
    for tick in range(5):
        share = tick / 4
        x, y = LEFT + (WIDTH - LEFT - RIGHT) * share, TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)
        parts += [
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>',
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{highest * share:.2f}</text>',
            f'<text x="{WIDTH - RIGHT + 6}" y="{y + 4:.1f}">{lowest + (1 - lowest) * share:.2f}</text>',
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{last * share:.0f}</text>',
        ]
    curves = [("loss", loss, 0.0, highest), *((name, points, lowest, 1.0) for name, points in metrics.items())]
    for number, (name, points, low, high) in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        line = place(points, low, high)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if number:
            parts += [
                f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
                for x, y in (point.split(",") for point in line.split())
            ]
        side = "left axis" if not number else "right axis"
        x = LEFT + 150 * number
        parts.append(f'<text x="{x}" y="{HEIGHT - 8}" fill="{colour}">{escape(name)} ({side})</text>')
    return "\n".join([*parts, "</svg>\n"])
