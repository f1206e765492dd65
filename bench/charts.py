"""Charts of a report as inline SVG; colours and fonts come from the page's style sheet, light and dark."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10
from typing import Any

from petool_lite.bench.errors import CLASSES
from petool_lite.bench.tables import letters

WIDTH, HEIGHT = 520, 374
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 34, 14, 64
_COLOURS = 8  # series colours in the style sheet, s0 to s7
_DOT = 8
_NAMES = {"tool": "tool accuracy, %", "param": "parameter accuracy, %", "joint": "tool and parameters right, %"}


@dataclass(frozen=True)
class Point:
    """One mark of a chart: letter and colour of its variant, value and interval in percent, text for the pointer."""

    letter: str
    colour: int
    x: float
    y: float
    low: float
    high: float
    title: str


def _y(value: float) -> float:
    return _TOP + (100 - value) / 100 * (HEIGHT - _TOP - _BOTTOM)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _frame(parts: Sequence[str], title: str, y_name: str, x_name: str, height: int = HEIGHT) -> str:
    """The whole picture: percent grid, axis names and `parts`."""
    grid = [_line(_LEFT, _y(step), WIDTH - _RIGHT, _y(step), "axis" if step == 0 else "grid") for step in _STEPS]
    grid += [_text(_LEFT - 8, _y(step) + 4, str(step), "tick", "end") for step in _STEPS]
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    names = [
        _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_name, "name"),
        f'<text class="name" text-anchor="middle" transform="translate(12 {middle:.0f}) rotate(-90)">'
        f"{escape(y_name)}</text>",
    ]
    return _svg([*grid, *names, *parts], title, height)


_STEPS = (0, 20, 40, 60, 80, 100)


def _svg(parts: Sequence[str], title: str, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _mark(point: Point, x: float) -> str:
    """A whisker for the interval and a lettered dot."""
    y = _y(point.y)
    ends = [_y(point.low), _y(point.high)]
    whisker = _line(x, ends[0], x, ends[1], f"whisker s{point.colour}")
    whisker += "".join(_line(x - 5, end, x + 5, end, f"whisker s{point.colour}") for end in ends)
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_DOT}" class="dot s{point.colour}"/>'
    letter = _text(x, y + 4, point.letter, "letter")
    return f"<g><title>{escape(point.title)}</title>{whisker}{dot}{letter}</g>"


def _spread(points: Sequence[tuple[float, Point]], low: float, high: float) -> list[float]:
    """x of each point, moved sideways where dots or whiskers would cover each other, kept between low and high."""
    placed: list[tuple[float, Point]] = []
    offsets = [0.0, *(sign * step * _DOT for step in range(1, 20) for sign in (1, -1))]
    for x, point in points:
        free = (x + offset for offset in offsets if low <= x + offset <= high)
        clear = (at for at in free if not any(_covers(at - other, point, mark) for other, mark in placed))
        placed.append((next(clear, x), point))
    return [x for x, _ in placed]


def _covers(apart: float, one: Point, other: Point) -> bool:
    dots = abs(apart) < 2 * _DOT + 1 and abs(_y(one.y) - _y(other.y)) < 2 * _DOT + 1
    return dots or (abs(apart) < _DOT + 4 and one.low < other.high and other.low < one.high)


def scatter(
    points: Sequence[Point], levels: Sequence[Point], metric: str, x_name: str, x_text: Callable[[float], str]
) -> str:
    """Accuracy against a cost on a logarithmic axis; `levels` are variants without that cost, drawn as lines."""
    parts = []
    right = WIDTH - _RIGHT - (12 if levels else 0)
    if points:
        low, high = min(point.x for point in points), max(point.x for point in points)
        start, end = log10(low) - 0.2, log10(high) + 0.2

        def place(value: float) -> float:
            return _LEFT + (log10(value) - start) / (end - start) * (right - _LEFT)

        for tick in _ticks(start, end):
            parts += [
                _line(place(tick), HEIGHT - _BOTTOM, place(tick), HEIGHT - _BOTTOM + 5, "axis"),
                _text(place(tick), HEIGHT - _BOTTOM + 24, x_text(tick), "tick"),
            ]
    heights = _stack([_y(level.y) for level in levels])
    for level, height in zip(levels, heights, strict=True):
        parts.append(
            f"<g><title>{escape(level.title)}</title>"
            + _line(_LEFT, _y(level.y), WIDTH - _RIGHT, _y(level.y), f"level s{level.colour}")
            + f'<circle cx="{WIDTH - _RIGHT + 14:.1f}" cy="{height:.1f}" r="{_DOT}" class="dot s{level.colour}"/>'
            + _text(WIDTH - _RIGHT + 14, height + 4, level.letter, "letter")
            + "</g>"
        )
    if points:
        at = _spread([(place(point.x), point) for point in points], _LEFT + _DOT, right - _DOT)
        parts += [_mark(point, x) for point, x in zip(points, at, strict=True)]
    return _frame(parts, f"{_NAMES[metric]} against {x_name}", _NAMES[metric], x_name)


def _stack(heights: Sequence[float]) -> list[float]:
    """Heights moved apart so that dots do not cover each other, from the lowest up."""
    order = sorted(range(len(heights)), key=lambda index: -heights[index])
    found = list(heights)
    last = HEIGHT - _BOTTOM + 2.0 * _DOT
    for index in order:
        found[index] = last = min(heights[index], last - 2 * _DOT - 1)
    return found


def _ticks(start: float, end: float) -> list[float]:
    """Round values between 10^start and 10^end, at most seven."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        found = [
            step * 10.0**power
            for power in range(floor(start), floor(end) + 1)
            for step in steps
            if start <= log10(step * 10.0**power) <= end
        ]
        if len(found) <= 7:
            break
    return found


def history_chart(variants: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Accuracy by length of the history: groups of dots with whiskers, a group a part."""
    parts_found = {part["part"]: 0 for item in variants for part in item["breakdown"]["history_length"]}
    for item in variants:
        for part in item["breakdown"]["history_length"]:
            parts_found[part["part"]] = max(parts_found[part["part"]], part["n"])
    drawn = []
    room = (WIDTH - _LEFT - _RIGHT) / max(1, len(parts_found))
    for place, (name, n) in enumerate(parts_found.items()):
        middle = _LEFT + (place + 0.5) * room
        drawn.append(_text(middle, HEIGHT - _BOTTOM + 20, name, "tick"))
        drawn.append(_text(middle, HEIGHT - _BOTTOM + 38, f"n {n:,}", "tick"))
        if place:
            drawn.append(_line(_LEFT + place * room, _TOP, _LEFT + place * room, HEIGHT - _BOTTOM, "grid"))
        points = [
            _point(index, middle, part, metric, f"{item['name']}, {name} calls, n {part['n']}")
            for index, item in enumerate(variants)
            for part in item["breakdown"]["history_length"]
            if part["part"] == name
        ]
        step = min(2.4 * _DOT, (room - 6) / max(1, len(points)))
        first = middle - step * (len(points) - 1) / 2
        drawn += [_mark(point, first + step * index) for index, point in enumerate(points)]
    title = f"{_NAMES[metric]} by length of the history"
    return _frame(drawn, title, _NAMES[metric], "earlier calls in the history")


def classes_chart(variants: Sequence[Mapping[str, Any]]) -> str:
    """A bar of 100 % a variant, cut by error class."""
    names = letters(len(variants))
    bar, gap = 20, 10
    height = _TOP + len(variants) * (bar + gap) + 40
    wide = WIDTH - _LEFT - 14
    drawn = []
    for step in _STEPS:
        x = _LEFT + step / 100 * wide
        drawn += [_line(x, _TOP, x, height - 40, "grid"), _text(x, height - 24, str(step), "tick")]
    for index, item in enumerate(variants):
        top = _TOP + index * (bar + gap) + gap / 2
        drawn.append(f'<circle cx="{_LEFT - 18}" cy="{top + bar / 2:.1f}" r="{_DOT}" class="dot s{index % _COLOURS}"/>')
        drawn.append(_text(_LEFT - 18, top + bar / 2 + 4, names[index], "letter"))
        total, start = sum(item["classes"].values()) or 1, float(_LEFT)
        for name in CLASSES:
            share = item["classes"][name] / total
            if not share:
                continue
            title = f"{item['name']}, {name.replace('_', ' ')}: {item['classes'][name]} of {total}, {100 * share:.1f} %"
            drawn.append(
                f"<g><title>{escape(title)}</title>"
                f'<rect x="{start:.1f}" y="{top:.1f}" width="{max(0.5, share * wide):.1f}" height="{bar}" '
                f'class="bar c-{name}"/>'
                + (
                    _text(start + share * wide / 2, top + 14, f"{100 * share:.0f}", f"in c-{name}")
                    if share > 0.06
                    else ""
                )
                + "</g>"
            )
            start += share * wide
    drawn.append(_text(_LEFT + wide / 2, height - 6, "share of entries, %", "name"))
    return _svg(drawn, "error classes of each variant, in percent of the entries", height)


def cost_points(
    variants: Sequence[Mapping[str, Any]], metric: str, value: Callable[[Mapping[str, Any]], float | None]
) -> tuple[list[Point], list[Point]]:
    """Points of the variants that have a cost, and those that have none."""
    points: list[Point] = []
    levels: list[Point] = []
    for index, item in enumerate(variants):
        at = value(item)
        (points if at else levels).append(_point(index, at or 0, item, metric, item["name"]))
    return points, levels


def _point(index: int, x: float, scores: Mapping[str, Any], metric: str, name: str) -> Point:
    """The mark of variant number `index`: its accuracy by `metric`, from the scores of all or of a part of its rows."""
    value, (low, high) = scores[f"{metric}_acc"], scores[f"{metric}_ci"]
    title = f"{name}: {value:.1f} % ({low:.1f}–{high:.1f})"
    return Point(letters(index + 1)[index], index % _COLOURS, x, value, low, high, title)
