"""What every row of the registry promises the loops: built from a config, finite on nothing, deterministic, documented."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.algos import ALGORITHMS
from trimtab.config import load
from trimtab.config.stages import ONLINE
from trimtab.errors import ConfigError
from trimtab.train.online import what_moves_the_optimum
from trimtab.types import LabelledBatch, LossTerms, PairBatch, PreferenceBatch, RolloutBatch, Scores, TokenBatch

pytestmark = pytest.mark.contract

DOCS = Path(__file__).parents[2] / "docs" / "algorithms"
NAN = float("nan")


def keys(stage: str, **given: object) -> Any:
    """The config of a stage with nothing written but what it must have."""
    needed = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True, "stage": stage}
    return load({**needed, **({"reward_model": "r"} if stage in ONLINE else {}), **given})


def losses(algorithm: object, *, real: bool, garbage: float = 0.25) -> list[LossTerms]:
    """Every loss of an algorithm on two rows of two tokens (or two pairs); `real` = are any of them?"""
    mask = torch.full((2, 2), real)
    filled = torch.full((2, 2), -0.5 if real else garbage)
    if algorithm.kind == "online":  # type: ignore[attr-defined]
        batch = algorithm.credit(  # type: ignore[attr-defined]
            RolloutBatch(
                mask=mask,
                logp_old=filled,
                logp_ref=filled,
                values=filled,
                score=torch.tensor([1.0, -1.0]),
                group=torch.tensor([0, 0]),
                greedy=torch.tensor([0.5, 0.5]),
                finished=torch.tensor([True, True]),
                kl_coef=0.1,
            )
        )
        assert all(torch.isfinite(torch.tensor(list(batch.stats.values()))))
        terms = [algorithm.policy_loss(Scores(logp=filled, entropy=filled), batch)]  # type: ignore[attr-defined]
        return [*terms, algorithm.value_loss(filled, batch)] if algorithm.needs.critic else terms  # type: ignore[attr-defined]
    if algorithm.kind == "preference":  # type: ignore[attr-defined]
        scores = Scores(logp=filled, entropy=filled)
        if algorithm.unit == "pair":  # type: ignore[attr-defined]
            return [algorithm.loss(scores, PreferenceBatch(mask=mask, logp_ref=filled))]  # type: ignore[attr-defined]
        labels = torch.tensor([True, False])
        return [algorithm.loss(scores, LabelledBatch(mask=mask, logp_ref=filled, desirable=labels))]  # type: ignore[attr-defined]
    if algorithm.reads == "reward":  # type: ignore[attr-defined]
        rows = 2 if real else 0
        return [algorithm.loss(torch.zeros(rows, 2), PairBatch(margin=torch.zeros(rows)))]  # type: ignore[attr-defined]
    return [algorithm.loss(Scores(logp=filled, entropy=filled), TokenBatch(mask=mask))]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ALGORITHMS.names())
class TestEveryAlgorithm:
    def test_defaults_are_the_defaults_of_its_keys(self, name: str) -> None:
        algorithm = ALGORITHMS.load(name)
        assert algorithm.from_config(keys(name)) == algorithm()

    def test_is_a_frozen_value_that_says_what_the_loops_ask(self, name: str) -> None:
        algorithm = ALGORITHMS.load(name).from_config(keys(name))
        assert algorithm.__dataclass_params__.frozen
        assert algorithm.reduction in ("token", "sequence", "constant", "row")
        assert algorithm.describe()
        if algorithm.kind == "online":
            assert algorithm.unit in ("completion", "pair", "group")
            assert algorithm.group_size >= 1
            assert algorithm.epochs >= 1
        elif algorithm.kind == "preference":
            assert algorithm.unit in ("row", "pair")
            assert algorithm.reduction == "row"
            assert algorithm.observes in ("nothing", "own", "mismatched")
            assert hasattr(algorithm, "observe") or algorithm.observes == "nothing"
            assert not (algorithm.needs.critic or algorithm.needs.reward)
        else:
            assert algorithm.unit in ("row", "pair")
            assert algorithm.reads in ("logprobs", "reward")

    @pytest.mark.parametrize("garbage", [0.25, NAN, float("inf")])
    def test_nothing_real_is_a_finite_zero(self, name: str, garbage: float) -> None:
        for terms in losses(ALGORITHMS.load(name).from_config(keys(name)), real=False, garbage=garbage):
            assert terms.loss.sum() == 0
            for array in (terms.loss, *terms.means.values(), *terms.maxima.values()):
                assert torch.isfinite(array).all()
            assert terms.among.keys() <= terms.means.keys()

    def test_is_deterministic(self, name: str) -> None:
        first, second = (losses(ALGORITHMS.load(name).from_config(keys(name)), real=True) for _ in range(2))
        assert all(torch.equal(a.loss, b.loss) for a, b in zip(first, second, strict=True))

    def test_metrics_have_the_shape_of_the_loss_and_no_graph(self, name: str) -> None:
        for terms in losses(ALGORITHMS.load(name).from_config(keys(name)), real=True):
            for array in (*terms.means.values(), *terms.maxima.values()):
                assert array.shape == terms.loss.shape
                assert not array.requires_grad

    def test_has_a_page_that_explains_each_metric(self, name: str) -> None:
        module = ALGORITHMS.row(name).target.split(":")[0].rsplit(".", 1)[1]
        page = (DOCS / f"{module}.md").read_text(encoding="utf-8")
        assert "Curve: see docs/log.md" in page
        for terms in losses(ALGORITHMS.load(name).from_config(keys(name)), real=True):
            for metric in (*terms.means, *terms.maxima):
                assert metric in page, f"{metric} is logged but not explained in {module}.md"


def test_a_wrong_name_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ppo'"):
        ALGORITHMS.load("ppoo")


def test_one_clip_range_or_two() -> None:
    """`clip_range` is both bounds; `clip_range_low` and `clip_range_high` each replace one, 0 included."""
    ppo = ALGORITHMS.load("ppo")
    assert ppo.from_config(keys("ppo", clip_range=0.3, clip_range_high=0.0)) == replace(
        ppo(), clip_low=0.3, clip_high=0.0
    )


def test_the_examples_of_the_page_run() -> None:
    """Every block of docs/algorithms/README.md, as it stands there."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "README.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        gradient = names["logp"].grad
        # both answers' advantages: plus and minus (1 - 0) less beta x (0.2 - 0.1); each a row of two
        assert gradient.tolist() == [pytest.approx([-0.4975, -0.4975]), pytest.approx([0.4975, 0.0])]


def test_the_pages_name_what_moves_the_optimum() -> None:
    """Every key that the start of a run speaks of stands in the table that each online stage's page points to."""
    source = inspect.getsource(what_moves_the_optimum)
    read = set(re.findall(r"config\.([a-z_]+)|getattr\(config, \"([a-z_]+)\"", source))
    found = {one or other for one, other in read} - {"answer_limit"}
    assert {"ref_update_every", "entropy_coef", "mask_truncated"} <= found
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    table = text.split("## Settings that move the optimum")[1].split("\n## ")[0]
    assert {name for name in found if f"`{name}`" not in table} == set()
    for stage in ONLINE:
        page = (DOCS / f"{stage}.md").read_text(encoding="utf-8")
        assert "(README.md#settings-that-move-the-optimum)" in page, stage
