"""SFT, reward models, DPO and its kin, KTO: the first step of trimtab and of TRL on the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parity.sides import (
    Step,
    arguments,
    difference,
    keys,
    load_theirs,
    our_step,
    padded,
    their_step,
    tokenizer_of,
    write,
)
from trimtab.config import load
from trimtab.train.assemble import POLICY, REWARD, assemble
from trimtab.train.offline import OfflineTrainer
from trimtab.train.preference import PreferenceTrainer

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("parity"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


def equal(name: str, ours: Step, theirs: Step, record: Any, **how: Any) -> None:
    """Float32 sums in two orders: losses to 1e-5, gradients to 1e-4 of the largest of a tensor, parameters to a hundredth of a step."""
    found = difference(ours, theirs, **how)
    record(name, found)
    assert found.loss < 1e-5
    assert found.gradient < 1e-4
    assert found.after < 1e-4


def test_sft(folder: Path, record_property: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = OfflineTrainer(assemble(load(keys(folder, "sft", dataset="qa"))))
    batch = padded(trainer.rows)
    ours = our_step(trainer, trainer.parameters, trainer.optimizers[POLICY])
    their = SFTTrainer(
        model=load_theirs(folder),
        args=SFTConfig(**{k: v for k, v in arguments(folder).items() if k != "disable_dropout"}),
        train_dataset=Dataset.from_list([{"text": "a"}] * 4),
        processing_class=tokenizer_of(folder),
    )
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    theirs = their_step(
        their, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    )
    equal("sft", ours, theirs, record_property)


@pytest.mark.parametrize("centre", [0.0, 0.01])
def test_reward_model(centre: float, folder: Path, record_property: Any) -> None:
    """Their head has no bias; ours starts from its bias 0 and, where pairs are compared, does not learn it."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    given = keys(folder, "rm", dataset="pairs", **({"center_rewards_coef": centre} if centre else {}))
    trainer = OfflineTrainer(assemble(load(given)))
    head = {n: p.detach().clone() for n, p in trainer.session.roles.trainable(REWARD).items() if "summary" in n}
    rows = [row for side in zip(*trainer.answers(trainer.rows), strict=True) for row in side]
    batch = padded(rows, tokenizer_of(folder).pad_token_id)  # by which their classifier finds an answer's end
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=torch.float32)
    (weight,) = (p for n, p in head.items() if n.endswith("weight"))
    (bias,) = (p for n, p in head.items() if n.endswith("bias"))
    with torch.no_grad():
        classifier.score.weight.copy_(weight)
    their = RewardTrainer(
        model=classifier,
        args=RewardConfig(**arguments(folder), center_rewards_coefficient=centre or None),
        train_dataset=Dataset.from_list([{"chosen": "a", "rejected": "b"}] * 4),
        processing_class=tokenizer_of(folder),
    )
    if centre:  # their scores lack our bias, which centring sees
        scorer = their.model.score
        their.model.score = torch.nn.Linear(scorer.in_features, 1, bias=True)
        with torch.no_grad():
            their.model.score.weight.copy_(weight)
            their.model.score.bias.copy_(bias)
    ours = our_step(trainer, trainer.parameters, trainer.optimizers[REWARD])
    theirs = their_step(their, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    names = {n: "score." + n.rsplit(".", 1)[-1] for n in ours.after if "summary" in n}
    equal(f"rm, centring {centre:g}", ours, theirs, record_property, names=names)


PAIR_LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "sigmoid, ld_alpha 0.5": ({"ld_alpha": 0.5}, {"loss_type": ["sigmoid"], "ld_alpha": 0.5}),
    "hinge": ({"pref_loss": "hinge"}, {"loss_type": ["hinge"]}),
    "robust": ({"pref_loss": "robust", "dpo_label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "exo": ({"pref_loss": "exo", "dpo_label_smoothing": 0.1}, {"loss_type": ["exo_pair"], "label_smoothing": 0.1}),
    "nca": ({"pref_loss": "nca"}, {"loss_type": ["nca_pair"]}),
    "ipo_avg": ({"pref_loss": "ipo_avg"}, {"loss_type": ["ipo"]}),
    "sigmoid per token": ({"pref_length_normalized": True}, {"loss_type": ["sigmoid_norm"]}),
}


@pytest.mark.parametrize("name", list(PAIR_LOSSES))
def test_dpo(name: str, folder: Path, record_property: Any) -> None:
    """The reference is another model, so that no log-ratio is 0."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    mine, yours = PAIR_LOSSES[name]
    given = keys(folder, "dpo", dataset="pairs", ref_model=str(folder / "other"), pref_beta=0.3, **mine)
    trainer = PreferenceTrainer(assemble(load(given)))
    rows = [row for side in zip(*trainer.train.rows, strict=True) for row in side]
    ours = our_step(trainer, trainer.parameters, trainer.optimizers[POLICY])
    their = DPOTrainer(
        model=load_theirs(folder),
        ref_model=load_theirs(folder, "other"),
        args=DPOConfig(**arguments(folder), beta=0.3, **yours),
        train_dataset=Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4),
        processing_class=tokenizer_of(folder),
    )
    equal(f"dpo {name}", ours, their_step(their, padded(rows)), record_property)


def test_label_smoothing_of_sigmoid_differs_on_purpose(folder: Path) -> None:
    """TRL 1.16 leaves label smoothing out of its sigmoid loss; ours is (1 - e) of one side and e of the other."""
    import inspect

    from trl import DPOTrainer

    source = inspect.getsource(DPOTrainer._compute_loss)
    branch = source.split('loss_type == "sigmoid":')[1].split("elif")[0]
    assert "label_smoothing" not in branch
    trainer = PreferenceTrainer(
        assemble(load(keys(folder, "dpo", dataset="pairs", ref_model=str(folder / "other"), dpo_label_smoothing=0.2)))
    )
    assert trainer.algorithm.smoothing == 0.2  # type: ignore[attr-defined]


def test_kto(folder: Path, record_property: Any) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    given = keys(
        folder,
        "kto",
        dataset="marks",
        ref_model=str(folder / "other"),
        pref_beta=0.3,
        kto_chosen_weight=1.5,
        kto_rejected_weight=0.7,
    )
    trainer = PreferenceTrainer(assemble(load(given)))
    own, mismatched = (padded(side) for side in zip(*trainer.train.rows, strict=True))
    labels = trainer.train.labels
    ours = our_step(trainer, trainer.parameters, trainer.optimizers[POLICY])
    their = KTOTrainer(
        model=load_theirs(folder),
        ref_model=load_theirs(folder, "other"),
        args=KTOConfig(**arguments(folder), beta=0.3, desirable_weight=1.5, undesirable_weight=0.7),
        train_dataset=Dataset.from_list([{"prompt": "q", "completion": "a", "label": bool(i % 2)} for i in range(4)]),
        processing_class=tokenizer_of(folder),
    )
    inputs = {**own, **{f"KL_{name}": value for name, value in mismatched.items()}, "label": torch.tensor(labels)}
    theirs = their_step(their, inputs)
    equal("kto", ours, theirs, record_property)
