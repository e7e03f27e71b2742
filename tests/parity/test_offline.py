"""SFT, reward models, DPO and its kin, KTO: the first step of trimtab and of TRL on the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parity.sides import (
    MARGINS,
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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sft(smoothing: float, folder: Path, record_property: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    more = {"label_smoothing_factor": smoothing}
    trainer = OfflineTrainer(assemble(load(keys(folder, "sft", dataset="qa", **more))))
    batch = padded(trainer.rows)
    ours = our_step(trainer, trainer.parameters, trainer.optimizers[POLICY])
    their = SFTTrainer(
        model=load_theirs(folder),
        args=SFTConfig(**{k: v for k, v in arguments(folder, **more).items() if k != "disable_dropout"}),
        train_dataset=Dataset.from_list([{"text": "a"}] * 4),
        processing_class=tokenizer_of(folder),
    )
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    theirs = their_step(
        their, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    )
    equal(f"sft, smoothing {smoothing:g}", ours, theirs, record_property)


@pytest.mark.parametrize(("centre", "margins"), [(0.0, False), (0.01, False), (0.0, True)])
def test_reward_model(centre: float, margins: bool, folder: Path, record_property: Any) -> None:
    """Their head has no bias; ours starts from its bias 0 and, where pairs are compared, does not learn it."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    given = keys(
        folder, "rm", dataset="led" if margins else "pairs", **({"center_rewards_coef": centre} if centre else {})
    )
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
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    theirs = their_step(their, {**inputs, "margin": torch.tensor(MARGINS)} if margins else inputs)
    names = {n: "score." + n.rsplit(".", 1)[-1] for n in ours.after if "summary" in n}
    equal(f"rm, centring {centre:g}, margins {margins}", ours, theirs, record_property, names=names)


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


def pair_steps(
    folder: Path, mine: dict[str, Any], yours: dict[str, Any], *, dataset: str = "pairs", reference: str = "other"
) -> tuple[Step, Step]:
    """A step of `stage: dpo` and of their DPOTrainer; the reference is another model, so that no log-ratio is 0."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    given = keys(folder, "dpo", dataset=dataset, ref_model=str(folder / reference), pref_beta=0.3, **mine)
    trainer = PreferenceTrainer(assemble(load(given)))
    rows = [row for side in zip(*trainer.train.rows, strict=True) for row in side]
    ours = our_step(trainer, trainer.parameters, trainer.optimizers[POLICY])
    their = DPOTrainer(
        model=load_theirs(folder),
        ref_model=load_theirs(folder, reference),
        args=DPOConfig(**arguments(folder), beta=0.3, **yours),
        train_dataset=Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4),
        processing_class=tokenizer_of(folder),
    )
    return ours, their_step(their, padded(rows))


@pytest.mark.parametrize("name", list(PAIR_LOSSES))
def test_dpo(name: str, folder: Path, record_property: Any) -> None:
    equal(f"dpo {name}", *pair_steps(folder, *PAIR_LOSSES[name]), record_property)


def test_label_smoothing_of_sigmoid_differs_on_purpose(folder: Path, record_property: Any) -> None:
    """TRL 1.16 leaves label smoothing out of its sigmoid loss: theirs with e = 0.2 is ours with 0.

    Ours with e is (1 - e) s(h) + e s(-h), s = -logsig; theirs has the same as a mixture, 2 (1 - e) sigmoid - (1 - 2 e) robust.
    """
    plain = {"loss_type": ["sigmoid"], "label_smoothing": 0.2}
    mixture = {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.6, -0.6], "label_smoothing": 0.2}
    equal("their smoothed sigmoid", *pair_steps(folder, {}, plain), record_property)
    smoothed = pair_steps(folder, {"dpo_label_smoothing": 0.2}, mixture)
    equal("our smoothed sigmoid", *smoothed, record_property)
    assert difference(smoothed[0], pair_steps(folder, {}, plain)[1]).gradient > 0.1


def test_ftx_differs_in_its_mean_on_purpose(folder: Path, record_property: Any) -> None:
    """Ours is the mean over pairs of the chosen answers' mean, theirs the mean over all chosen tokens: one where lengths are equal."""
    mine, yours = {"pref_ftx": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    equal("sigmoid with ftx", *pair_steps(folder, mine, yours, dataset="level"), record_property)
    assert difference(*pair_steps(folder, mine, yours)).gradient > 0.01


def test_bco_differs_in_its_shift_on_purpose(folder: Path, record_property: Any) -> None:
    """Ours is measured from the running mean of the implicit rewards, as the paper has it, theirs from 0: one where policy is reference."""
    mine, yours = {"pref_bco_weight": 0.5}, {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1 / 1.5, 0.5 / 1.5]}
    equal("sigmoid with bco", *pair_steps(folder, mine, yours, reference="model"), record_property)
    assert difference(*pair_steps(folder, mine, yours)).gradient > 0.01


def without_reference(folder: Path, kind: str, trainer: PreferenceTrainer, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A trainer of theirs of `trl.experimental` ("orpo" or "cpo"), and its inputs."""
    from importlib import import_module

    from datasets import Dataset

    module = import_module(f"trl.experimental.{kind}")
    name = kind.upper()
    their = getattr(module, f"{name}Trainer")(
        model=load_theirs(folder),
        args=getattr(module, f"{name}Config")(**arguments(folder, **more), max_length=64, remove_unused_columns=False),
        train_dataset=Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4),
        processing_class=tokenizer_of(folder),
    )
    inputs: dict[str, Any] = {}
    for side, rows in zip(("chosen", "rejected"), zip(*trainer.train.rows, strict=True), strict=True):
        laid = padded(rows)
        inputs[f"{side}_input_ids"], inputs[f"{side}_attention_mask"] = laid["input_ids"], laid["attention_mask"]
        inputs[f"{side}_labels"] = laid["input_ids"].masked_fill(laid["completion_mask"] == 0, -100)
    return their, inputs


def test_simpo(folder: Path, record_property: Any) -> None:
    given = keys(folder, "simpo", dataset="pairs", pref_beta=2.0, simpo_gamma=0.7)
    trainer = PreferenceTrainer(assemble(load(given)))
    their, inputs = without_reference(
        folder, "cpo", trainer, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.7
    )
    ours = our_step(trainer, trainer.parameters, trainer.optimizers[POLICY])
    equal("simpo", ours, their_step(their, inputs), record_property)


def test_orpo_differs_in_its_nll_on_purpose(folder: Path, record_property: Any) -> None:
    """Theirs takes the NLL over the prompt too, and as a mean over tokens. The odds ratio is one: what lambda 3 has beyond lambda 1."""
    sides: dict[float, tuple[Step, Step]] = {}
    for weight in (1.0, 3.0):
        given = keys(folder, "orpo", dataset="level", pref_beta=weight)
        trainer = PreferenceTrainer(assemble(load(given)))
        their, inputs = without_reference(folder, "orpo", trainer, beta=weight)
        ours = our_step(trainer, trainer.parameters, trainer.optimizers[POLICY])
        sides[weight] = (ours, their_step(their, inputs))
    assert difference(*sides[1.0]).gradient > 0.1  # their NLL is another
    left = [
        Step(more.loss - less.loss, {n: g - less.gradients[n] for n, g in more.gradients.items()}, more.gradients)
        for more, less in zip(sides[3.0], sides[1.0], strict=True)
    ]
    found = difference(*left)
    record_property("odds ratio of orpo", {"loss": found.loss, "gradient": found.gradient})
    assert found.loss < 1e-5
    assert found.gradient < 1e-4


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
