"""The report on a reward model: figures worked out by hand, a picture, and the errors of files that hold no scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trimtab.errors import DataError
from trimtab.report.rewards import Scored, by_length, by_margin, figures, read_pairs, write_report

pytestmark = pytest.mark.unit


def pair(chosen: float, rejected: float, *tokens: int) -> Scored:
    lengths = dict(zip(("chosen_tokens", "rejected_tokens"), tokens, strict=False))
    return Scored(chosen=float(chosen), rejected=float(rejected), **lengths)


PAIRS = [pair(2, 0, 5, 3), pair(1, 0, 2, 4), pair(0, 1, 3, 3), pair(1, 1, 6, 2), pair(4, 0, 8, 8)]
"""Leads 2, 1, -1, 0, 4: three of five right, the tie an error."""


def test_accuracy_and_margin() -> None:
    found = figures(PAIRS)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["ties"] == 1
    assert found["margin"] == pytest.approx(6 / 5)
    assert found["reward_chosen"] == pytest.approx(8 / 5) and found["reward_rejected"] == pytest.approx(2 / 5)
    assert found["nll"] == pytest.approx(sum(math.log1p(math.exp(-d)) for d in (2, 1, -1, 0, 4)) / 5)


def test_calibration() -> None:
    """sigmoid of 0, 1, 1, 2, 4 = 0.5, 0.731, 0.731, 0.881, 0.982; right: no, yes, no, yes, yes. Bins of 0.05 from 0.5 on."""
    found = figures(PAIRS)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    ece = (abs(0.5 - 0) + 2 * abs(sigmoid(1) - 1 / 2) + abs(sigmoid(2) - 1) + abs(sigmoid(4) - 1)) / 5
    assert found["calibration_error"] == pytest.approx(ece)
    assert [b["count"] for b in found["calibration"]] == [1, 0, 0, 0, 2, 0, 0, 1, 0, 1]


def test_by_margin_from_the_closest_pairs_on() -> None:
    assert [(part.count, part.accuracy) for part in by_margin(PAIRS)] == [(1, 0), (1, 1), (1, 0), (1, 1), (1, 1)]
    assert sum(part.count for part in by_margin([*PAIRS, *PAIRS, pair(9, 0)])) == 11
    assert [part.count for part in by_margin(PAIRS[:2])] == [1, 1]


def test_by_length() -> None:
    assert [(part.count, part.accuracy) for part in by_length(PAIRS)] == [(2, 0.5), (2, 0.5), (1, 1.0)]
    assert by_length(PAIRS[:1])[1].accuracy is None


def test_length_correlation() -> None:
    # lengths 1, 2, 3 and 4 with scores equal to them: r = 1; the other way round: r = -1
    assert figures([pair(1, 2, 1, 2), pair(3, 4, 3, 4)])["length_correlation"] == pytest.approx(1)
    assert figures([pair(4, 3, 1, 2), pair(2, 1, 3, 4)])["length_correlation"] == pytest.approx(-1)
    assert "length_correlation" not in figures([pair(1, 0)])


def test_written_beside_the_scores(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    rows = [{"chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found, paths = write_report(path)
    assert json.loads(paths[0].read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    assert paths[1].read_bytes().startswith(b"\x89PNG") and paths[1].stat().st_size < 200_000


@pytest.mark.parametrize(
    ("text", "said", "where"),
    [
        ('{"chosen": 1, "rejected": 0}\n{"chosen": 1}', "without the two scores", ":2"),
        ('{"predict": "a", "label": "b"}', "trimtab eval", ":1"),
        ('{"chosen": NaN, "rejected": 0}', "not finite", ":1"),
        ("half", "without the two scores", ":1"),
        ("\n", "no scores", ""),
    ],
)
def test_files_without_scores(tmp_path: Path, text: str, said: str, where: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said) as caught:
        read_pairs(path)
    assert f"{path}{where}" in str(caught.value)
