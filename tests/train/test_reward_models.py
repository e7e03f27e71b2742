"""What reward models learn from besides pairs: margins, rankings, scores; from the file to predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.config import load
from trimtab.errors import ConfigError, DataError
from trimtab.pipeline import run_exp
from trimtab.rewards.model import score_rows_as
from trimtab.rundir import PREDICTIONS, RunFolder
from trimtab.train.assemble import REWARD, assemble
from trimtab.train.offline import OfflineTrainer
from trimtab.types import Pair, Ranking, TokenRow

pytestmark = pytest.mark.unit

Keys = Callable[..., dict[str, Any]]
WORDS = ["a", "b c", "d", "e f g", "h", "i j", "k", "l m"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ranked` (two to four answers, best first), `marks` (a score each), `leads` (pairs with a margin), and their chat forms."""
    folder = tmp_path_factory.mktemp("judged")
    answers = ["yes", "maybe so", "no", "never at all"]
    ranked = [{"instruction": w, "answers": answers[: 2 + i % 3]} for i, w in enumerate(WORDS)]
    marks = [{"instruction": w, "output": answers[i % 4], "mark": 3 - i % 4} for i, w in enumerate(WORDS)]
    leads = [{"instruction": w, "chosen": "yes", "rejected": "no", "lead": i / 4} for i, w in enumerate(WORDS)]
    chats = [
        {
            "messages": [{"role": "user", "content": w}],
            "answers": [{"role": "assistant", "content": a} for a in answers[:3]],
        }
        for w in WORDS
    ]
    sets: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "ranked": (ranked, {"ranking": True, "columns": {"ranked": "answers"}}),
        "chats": (chats, {"ranking": True, "formatting": "openai", "columns": {"ranked": "answers"}}),
        "marks": (marks, {"columns": {"score": "mark"}}),
        "unmarked": (marks, {}),
        "leads": (leads, {"ranking": True, "columns": {"margin": "lead"}}),
        "broken": (
            [
                {"instruction": "a", "answers": ["one"]},
                {"instruction": "b", "answers": "one"},
                {"instruction": "c", "answers": 3},
                {"instruction": "d", "answers": ["x", "x"]},
                {"instruction": "e", "answers": ["x", "y"]},
            ],
            {"ranking": True, "columns": {"ranked": "answers"}},
        ),
        "odd": (
            [{"instruction": "a", "output": "b", "mark": mark} for mark in ("high", None, "inf", True, "2.5")],
            {"columns": {"score": "mark"}},
        ),
    }
    for name, (rows, _) in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    entries = {name: {"file_name": f"{name}.json", **more} for name, (_, more) in sets.items()}
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture
def trainer(keys: Keys, judged: Path, tmp_path: Path) -> Callable[..., OfflineTrainer]:
    def make(dataset: str, **more: Any) -> OfflineTrainer:
        given = keys(
            "rm", tmp_path / "x", dataset=dataset, dataset_dir=str(judged), per_device_train_batch_size=8, **more
        )
        return OfflineTrainer(assemble(load(given)))

    return make


def scored(one: OfflineTrainer) -> list[list[float]]:
    """The scores of each row's answers, every answer alone."""
    return [
        [score_rows_as(one.session.roles, REWARD, [row], budget=1)[0] for row in answers]
        for answers in one.answers(one.rows)
    ]


def log1pexp(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("dataset", ["ranked", "chats"])
@pytest.mark.parametrize("budget", [30, 4000])
def test_a_ranking_of_any_length_in_both_losses(
    dataset: str, budget: int, trainer: Callable[..., OfflineTrainer]
) -> None:
    for loss in ("pairwise", "listwise"):
        one = trainer(dataset, rm_loss=loss, micro_batch_tokens=budget, center_rewards_coef=0.2)
        assert {len(row.answers) for row in one.rows} == ({2, 3, 4} if dataset == "ranked" else {3})
        scores = scored(one)
        expected = []
        for r in scores:
            pairs = [(r[i], r[j]) for i in range(len(r)) for j in range(i + 1, len(r))]
            centre = 0.2 * sum((a + b) ** 2 for a, b in pairs) / len(pairs)
            ranks = sum(math.log(sum(math.exp(x) for x in r[i:])) - r[i] for i in range(len(r)))
            expected.append(
                (sum(log1pexp(b - a) for a, b in pairs) / len(pairs) if loss == "pairwise" else ranks) + centre
            )
        assert one.step(0)["loss"] == pytest.approx(sum(expected) / 8, rel=1e-4)


def test_the_first_and_last_of_a_ranking_are_a_pair_for_other_stages(keys: Keys, judged: Path, tmp_path: Path) -> None:
    session = assemble(load(keys("dpo", tmp_path / "x", dataset="ranked", dataset_dir=str(judged))))
    assert all(isinstance(row, Pair) for row in session.data.train)
    assert [e.rejected.content for e in session.data.train_examples[:3] if e.rejected] == [
        "maybe so",
        "no",
        "never at all",
    ]


def test_margins_come_from_their_column(trainer: Callable[..., OfflineTrainer]) -> None:
    one = trainer("leads", rm_label_smoothing=0.2)
    assert [row.margin for row in one.rows] == [i / 4 for i in range(8)]
    leads = [a - b for a, b in scored(one)]
    margins = [i / 4 for i in range(8)]
    losses = [0.8 * log1pexp(m - d) + 0.2 * log1pexp(d - m) for d, m in zip(leads, margins, strict=True)]
    figures = one.step(0)
    assert figures["loss"] == pytest.approx(sum(losses) / 8, rel=1e-4)
    assert figures["nll"] == pytest.approx(sum(log1pexp(-d) for d in leads) / 8, rel=1e-4)


def test_scores_are_learnt_as_numbers(trainer: Callable[..., OfflineTrainer]) -> None:
    one = trainer("marks", rm_loss="pointwise", learning_rate=1e-2)
    marks = [3.0 - i % 4 for i in range(8)]
    assert one.best_metric == ("loss", False)
    scores = [r[0] for r in scored(one)]
    assert sum(scores) / 8 == pytest.approx(1.5, abs=1e-4)  # it starts at the mean of the data
    first = one.step(0)
    assert first["loss"] == pytest.approx(sum((r - s) ** 2 for r, s in zip(scores, marks, strict=True)) / 8, rel=1e-4)
    for number in range(1, 25):
        last = one.step(number)
    assert last["loss"] < first["loss"] / 4 and last["abs_error"] < first["abs_error"]
    assert not one.finish()  # the level of the scores is what was learnt
    figures = one.evaluate_judged(one.rows, one.session.data.train_examples)
    assert figures["score_correlation"] > 0.8
    assert figures["loss"] == pytest.approx(
        sum((r[0] - s) ** 2 for r, s in zip(scored(one), marks, strict=True)) / 8, abs=1e-3
    )


@pytest.mark.learning
@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_a_ranking_is_learnt(loss: str, trainer: Callable[..., OfflineTrainer]) -> None:
    one = trainer("ranked", rm_loss=loss, learning_rate=1e-2)
    for number in range(12):
        one.step(number)
    figures = one.evaluate_judged(one.rows, one.session.data.train_examples)
    assert figures["accuracy"] > 0.9
    assert figures["reward_chosen"] > figures["reward_rejected"]
    assert (figures["loss"] == figures["nll"]) == (loss == "pairwise")


@pytest.mark.parametrize(
    ("dataset", "loss", "columns"),
    [("ranked", "listwise", {"ranked", "row"}), ("marks", "pointwise", {"reward", "score", "row"})],
)
def test_from_a_run_to_predictions(
    dataset: str, loss: str, columns: set[str], keys: Keys, judged: Path, tmp_path: Path
) -> None:
    """A run with tokenized rows, evaluation and prediction; and prediction from the finished folder."""
    common = {"dataset_dir": str(judged), "rm_loss": loss}
    given = keys("rm", tmp_path / "run", dataset=dataset, val_size=3, tokenized_path=str(tmp_path / "rows"), **common)
    for name in ("run", "again"):
        folder = run_exp(
            {**given, "output_dir": str(tmp_path / name), "eval_strategy": "steps", "eval_steps": 1, "do_predict": True}
        )
        assert folder.metrics("eval")
    assert RunFolder(tmp_path / "run").metrics("train")[0]["loss"] == folder.metrics("train")[0]["loss"]
    lines = [json.loads(line) for line in (folder.path / PREDICTIONS).read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 3 and all(set(line) == columns for line in lines)
    infer = {k: given[k] for k in ("model_name_or_path", "template", "compute_dtype", "use_cpu", "cutoff_len")}
    infer |= {
        "stage": "rm",
        "adapter_name_or_path": str(folder.path),
        "eval_dataset": dataset,
        "do_predict": True,
        **common,
    }
    run_exp({**infer, "output_dir": str(tmp_path / "out")})
    assert len((tmp_path / "out" / PREDICTIONS).read_text(encoding="utf-8").splitlines()) == 8


def test_rows_that_cannot_be_used_say_why(trainer: Callable[..., OfflineTrainer]) -> None:
    one = trainer("broken", rm_loss="listwise")
    assert len(one.rows) == 1 and isinstance(one.rows[0], Ranking)
    assert set(one.session.data.report.reasons()) == {
        "fewer than two ranked answers",
        "ranked is text, but not JSON",
        "ranked is not a list of answers",
        "two ranked answers are the same",
    }
    odd = trainer("odd", rm_loss="pointwise")
    assert len(odd.rows) == 1 and isinstance(odd.rows[0], TokenRow)
    assert odd.session.data.train_examples[0].score == 2.5
    assert set(odd.session.data.report.reasons()) == {"score is not a number", "no score"}


@pytest.mark.parametrize(
    ("dataset", "loss", "words"),
    [
        ("unmarked", "pointwise", ("no column holds its scores", '"columns": {"score": "NAME"}')),
        ("ranked", "pointwise", ("its rows are preferences", "rm_loss: pairwise")),
        ("marks", "listwise", ("not a set of preferences",)),
    ],
)
def test_data_that_do_not_fit_the_loss(
    dataset: str, loss: str, words: tuple[str, ...], trainer: Callable[..., OfflineTrainer]
) -> None:
    with pytest.raises(DataError) as caught:
        trainer(dataset, rm_loss=loss)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"rm_loss": "pointwise", "center_rewards_coef": 0.1},
        {"rm_loss": "pointwise", "rm_label_smoothing": 0.1},
        {"rm_loss": "listwise", "rm_label_smoothing": 0.1},
        {"rm_label_smoothing": 0.5},
        {"rm_loss": "ordinal"},
    ],
)
def test_settings_that_do_not_fit_the_loss(more: dict[str, Any], keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load(keys("rm", tmp_path / "x", **more))


def test_a_margin_that_nobody_reads_is_told(keys: Keys, judged: Path, tmp_path: Path) -> None:
    session = assemble(load(keys("dpo", tmp_path / "x", dataset="leads", dataset_dir=str(judged))))
    assert "leads: margin is read for pairs of stage rm only" in session.data.report.notes
