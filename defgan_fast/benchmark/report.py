"""The table and the plot of a measurement: `python -m defgan_fast.benchmark.report FILE.json`.

Prints Markdown, and writes a plot beside the file (same name, `.png`), so that the numbers in the
documentation are never typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..precisions import ON_CPU


def table(result: dict[str, Any]) -> str:
    """A Markdown table of all rows, and a line that says on what they were measured."""
    lines = [
        "| images x restarts | precision | backend | ms a step | GFLOP/s | of peak | to best peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
        ratio = "" if row["ratio_to_best_peer"] is None else f"{row['ratio_to_best_peer']:.2f}"
        lines.append(
            f"| {row['images']} x {row['restarts']} | {row['precision']} | {row['backend']} "
            f"| {row['ms_per_step']:.3g} | {row['gflops_useful']:.0f} | {share} | {ratio} |"
        )
    return "\n".join([*lines, "", _caption(result)])


def _caption(result: dict[str, Any]) -> str:
    found = result["environment"]
    limits = ", ".join(
        f"{precision} {values['probe']:.0f}"
        for precision, values in result["limits"].items()
        if values["probe"]
    )
    threads = result["rows"][0]["threads"] if result["rows"] else found["cpu"]["threads"]
    return (
        f"{result['generator']} generator, {found['cpu']['model']}, {threads} threads, "
        f"{found['cpu']['active'] or 'no kernels'}, torch {found['versions']['torch']}, "
        f"commit {found['versions']['commit'] or 'unknown'}; peak GFLOP/s: {limits or 'not measured'}."
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of GFLOP/s by case, one panel for each precision, with the machine's peak as a line.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("the plot needs matplotlib: pip install 'defgan-fast[dev]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    precisions = [p for p in ON_CPU if any(row["precision"] == p for row in result["rows"])]
    figure, axes = pyplot.subplots(
        1, len(precisions), figsize=(5.5 * len(precisions), 4.8), squeeze=False, layout="constrained"
    )
    for axis, precision in zip(axes[0], precisions, strict=True):
        rows = [row for row in result["rows"] if row["precision"] == precision]
        cases = list(dict.fromkeys((row["images"], row["restarts"]) for row in rows))
        backends = list(dict.fromkeys(row["backend"] for row in rows))
        width = 0.8 / len(backends)
        for position, backend in enumerate(backends):
            of_backend = {(row["images"], row["restarts"]): row for row in rows if row["backend"] == backend}
            places = [i for i, case in enumerate(cases) if case in of_backend]
            heights = [of_backend[cases[i]]["gflops_useful"] for i in places]
            offset = (position - (len(backends) - 1) / 2) * width
            axis.bar([i + offset for i in places], heights, width, label=backend)
        peak = result["limits"][precision]["probe"]
        if peak:
            axis.axhline(peak, color="black", linestyle="--", linewidth=1, label="multiply-add peak")
        axis.set_xticks(range(len(cases)), [f"{images} x {restarts}" for images, restarts in cases])
        axis.set_xlabel("images x restarts")
        axis.set_ylabel("useful GFLOP/s")
        axis.set_title(precision)
        # Below: inside it would cover bars, whichever corner it took.
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Prints the table of the named file and writes its plot."""
    parser = argparse.ArgumentParser(prog="python -m defgan_fast.benchmark.report", description=__doc__)
    parser.add_argument("file", type=Path, help="what `defgan-fast bench --json FILE` wrote")
    args = parser.parse_args(argv)
    try:
        result = json.loads(args.file.read_text())
        print(table(result))
        plot(result, args.file.with_suffix(".png"))
    except FileNotFoundError:
        print(f"no such file: {args.file}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        print(f"{args.file}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
