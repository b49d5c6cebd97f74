"""Put results into docs/performance.md: python -m benchmarks.page [runs/bench/results/*.json]

Copies all results into docs/results/performance.json, and writes tables of them between the marks of the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.__main__ import NAMES
from benchmarks.bars import short
from benchmarks.measure import ROOT

PAGE, KEPT = ROOT / "docs" / "performance.md", ROOT / "docs" / "results" / "performance.json"
BEGIN, END = "<!-- figures: python -m benchmarks.page -->", "<!-- end of figures -->"


def main() -> None:
    paths = [Path(word) for word in sys.argv[1:]] or sorted((ROOT / "runs" / "bench" / "results").glob("*.json"))
    results = sorted((json.loads(path.read_text("utf-8")) for path in paths), key=lambda result: NAMES.index(result["benchmark"]))
    if any(result["quick"] for result in results):
        sys.exit("results of --quick mean nothing, and do not go on the page")
    KEPT.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    PAGE.write_text(with_figures(PAGE.read_text("utf-8"), results), "utf-8")


def with_figures(page: str, results: Sequence[dict[str, Any]]) -> str:
    """The page with these results between its marks."""
    return placed(page, BEGIN, figures(results), END)


def placed(page: str, begin: str, text: str, end: str) -> str:
    """The page with this text between two marks."""
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}"


def figures(results: Sequence[dict[str, Any]]) -> str:
    """One table per benchmark; a missed bar is bold."""
    parts = [] if results else ["There are no results yet: `make bench` makes them.\n"]
    for result in results:
        machine = result["machine"]
        parts.append(f"### {result['benchmark']}\n")
        parts.append(
            f"Commit {result['commit']}, {result['created'][:10]}; {machine['cores']} cores of {machine['cpu']}, "
            f"{machine['memory'] / 1e9:.0f} GB; load {machine['load']:.1f} at the start.\n"
        )
        parts.append("| what | on | median | min to max | pairs | bar | ours | other | |\n|---|---|---|---|---|---|---|---|---|")
        parts += [_row(figure) for figure in result["figures"]]
        parts.append("")
    return "\n".join(parts)


def _row(figure: dict[str, Any]) -> str:
    values = figure["values"]
    bar = "" if figure["bar"] is None else f"{figure['bar']}: {'met' if figure['met'] else '**missed**'}"
    spread = f"{short(figure['min'])} to {short(figure['max'])}" if len(values) > 1 else ""
    behind = [short(median(figure[side])) if figure[side] else "" for side in ("ours", "other")]
    value = f"{short(figure['median'])} {figure['unit']}"
    cells = [figure["work"], figure["case"], value, spread, str(len(values)), bar, *behind, figure["note"]]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
