"""What bench/speed.py found, as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stopwatch import OURS, STOCK


def table(cells: dict[str, Any]) -> str:
    """All measured cells as Markdown, one row each."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "prompt, reply tokens": lambda c: (
            f"{c['prompt_tokens']:.0f}, {c['decoded_tokens'][OURS]:.0f}"
        ),
        "step s": lambda c: f"{c['seconds'][STOCK]['step']:.2f} → {c['seconds'][OURS]['step']:.2f}",
        "step": lambda c: _times(c["ratios"]["step"]),
        "rollout": lambda c: _times(c["ratios"]["rollout"]),
        "training": lambda c: _times(c["ratios"]["training"]),
        "A/A step": lambda c: _times(c["control"]["step"]),
        "memory growth MB": lambda c: _growth(c, "peak_bytes"),
        "of it kept": lambda c: _growth(c, "kept_bytes"),
        "checkpointing": lambda c: " → ".join(
            "on" if c["setups"][kind]["checkpointing"] else "off" for kind in (STOCK, OURS)
        ),
        "of product rate": _matrix_share,
        "of bandwidth": lambda c: _share(c, "bandwidth_share"),
    }
    lines = [
        "| model/shots/prompts | " + " | ".join(columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, cell in cells.items():
        lines.append(f"| {name} | " + " | ".join(show(cell) for show in columns.values()) + " |")
    return "\n".join(lines)


def _times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} × ({spread['min']:.2f}–{spread['max']:.2f})"


def _growth(cell: dict[str, Any], name: str) -> str:
    found = cell["memory_growth"]
    if not found:
        return "–"
    stock, ours = (found[kind][name] / 1e6 for kind in (STOCK, OURS))
    is_peak = name == "peak_bytes" and ours > 0
    return f"{stock:.0f} → {ours:.0f}" + (f" ({stock / ours:.1f} ×)" if is_peak else "")


def _share(cell: dict[str, Any], name: str) -> str:
    limits = cell.get("limits")
    if not limits:
        return "–"
    return " → ".join(f"{limits[kind][name]:.0%}" for kind in (STOCK, OURS))


def _matrix_share(cell: dict[str, Any]) -> str:
    limits = cell.get("limits")
    if limits and min(limits[kind]["seen_of_least"] for kind in (STOCK, OURS)) < 1:
        return "products went unseen"
    return _share(cell, "matrix_share")
