"""trimtab's own figures: `python bench/run.py [WORK ...] [--rounds 3] [--out FILE]`. JSON rows, then a table.

Each round does every work once, each in a process of its own, so that a slow minute of the machine does not fall on one work alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from works import GPU_WORKS, WORKS

HERE = Path(__file__).resolve().parent


def measure(command: list[str]) -> dict[str, Any] | None:
    """The row that a measuring process prints; None, with what it said, when it fails."""
    rows = measure_all(command)
    return rows[-1] if rows else None


def measure_all(command: list[str]) -> list[dict[str, Any]]:
    """All rows that it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if done.returncode or not rows:
        print(f"FAILED: {' '.join(command)}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
    return rows


def ours(work: str) -> list[str]:
    return [sys.executable, str(HERE / "engines" / "ours.py"), work]


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    from trimtab.pipeline import versions
    from trimtab.train.device import hardware, pick_device

    return {
        **hardware(pick_device()),
        "versions": versions(),
        "mkldnn_bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", nargs="*", default=[name for name in WORKS if name not in GPU_WORKS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "trimtab.json")
    asked = parser.parse_args()

    import torch
    from limit import Products, limit

    from trimtab.train.device import pick_device, pick_dtype

    rows: list[dict[str, Any]] = []
    for number in range(asked.rounds):
        for work in asked.works:
            row = measure(ours(work))
            if row is not None:
                rows.append({**row, "round": number})
                print(f"round {number}: {work} {row['seconds']:.3f} s", flush=True)
    products = Products(pick_dtype("auto", pick_device())[0])
    summary = []
    for work in asked.works:
        mine = [row for row in rows if row["work"] == work]
        if not mine:
            continue
        seconds = median(row["seconds"] for row in mine)
        least = limit(WORKS[work], products)
        figures = {
            "work": work,
            "seconds": round(seconds, 4),
            "spread": [round(min(r["seconds"] for r in mine), 4), round(max(r["seconds"] for r in mine), 4)],
            "tokens_per_second": round(mine[-1]["tokens"] / seconds, 1),
            "limit_seconds": round(least, 4),
            "percent_of_products": round(100 * least / seconds, 1),
        }
        if "peak_memory_bytes" in mine[-1]:
            figures["peak_memory_bytes"] = max(row["peak_memory_bytes"] for row in mine)
        summary.append(figures)
        print(json.dumps(figures), flush=True)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(
        json.dumps(
            {"machine": machine(), "dtype": str(torch.get_default_dtype()), "summary": summary, "rows": rows}, indent=1
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
