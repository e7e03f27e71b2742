"""Preference stages as runs: the first loss by plain PyTorch, one result however a batch is cut, the reference and its cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trimtab.algos.dpo import Dpo
from trimtab.algos.kto import Kto
from trimtab.config import load
from trimtab.errors import DataError
from trimtab.rundir import RunFolder
from trimtab.train import reference
from trimtab.train.assemble import assemble
from trimtab.train.device import cpu_has_bfloat16
from trimtab.train.preference import PreferenceTrainer, mismatched
from trimtab.types import LossTerms, Scores, TokenRow

pytestmark = pytest.mark.unit

Keys = Callable[..., dict[str, Any]]
Run = Callable[..., RunFolder]


def trainer(keys: dict[str, Any]) -> PreferenceTrainer:
    return PreferenceTrainer(assemble(load(keys)))


def logp_by_pytorch(folder: Path, rows: list[TokenRow]) -> list[torch.Tensor]:
    """log p of each row's scored tokens under the base model alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for row in rows:
            log_p = model(torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
            found.append(torch.stack([log_p[i - 1, row.token_ids[i]] for i in row.scored]))
    return found


@pytest.mark.parametrize(
    ("keys_of", "want"),
    [
        ({"stage": "simpo", "pref_beta": 2.0}, lambda w, r: -torch.log(torch.sigmoid(2 * (w.mean() - r.mean()) - 0.5))),
        ({"stage": "dpo", "pref_loss": "simpo"}, lambda w, r: -torch.log(torch.sigmoid((w.mean() - r.mean()) / 10 - 0.5))),
        ({"stage": "dpo"}, lambda w, r: torch.tensor(0.6931471805599453)),
        ({"stage": "dpo", "pref_ftx": 0.5}, lambda w, r: 0.6931471805599453 - 0.5 * w.mean()),
        ({"stage": "dpo", "pref_loss": "ipo", "pref_beta": 0.5}, lambda w, r: torch.tensor(1.0)),
        ({"stage": "orpo", "pref_beta": 0.0001}, lambda w, r: -w.mean() - 1e-4 * torch.log(torch.sigmoid(odds(w) - odds(r)))),
    ],
    ids=["simpo", "dpo as simpo", "dpo", "dpo with nll", "ipo", "orpo"],
)  # fmt: skip
def test_the_first_loss_by_plain_pytorch(
    keys_of: dict[str, Any], want: Any, keys: Keys, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    one = trainer({**keys("dpo", tmp_path, per_device_train_batch_size=9), **keys_of})
    pairs = one.session.data.train
    chosen, rejected = (
        logp_by_pytorch(tiny_folder("qwen2"), [getattr(p, kind) for p in pairs]) for kind in ("chosen", "rejected")
    )
    assert all(
        pair.chosen.token_ids[-1] == pair.rejected.token_ids[-1] == 2 for pair in pairs
    )  # ends at the end marker
    figures = one.step(0)
    expected = torch.stack([want(w, r) for w, r in zip(chosen, rejected, strict=True)]).mean()
    assert figures["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert figures["logps/chosen"] == pytest.approx(sum(float(w.sum()) for w in chosen) / 9, rel=1e-5)
    assert figures["logps/rejected"] == pytest.approx(sum(float(r.sum()) for r in rejected) / 9, rel=1e-5)


def odds(logp: torch.Tensor) -> torch.Tensor:
    p = logp.mean().exp()
    return torch.log(p / (1 - p))


WAYS: list[dict[str, Any]] = [
    *({"per_device_train_batch_size": n, "gradient_accumulation_steps": 8 // n} for n in (1, 2, 4, 8)),
    *({"per_device_train_batch_size": 8, "micro_batch_tokens": budget} for budget in (1, 90, 200)),
]


@pytest.mark.parametrize(
    ("stage", "more"),
    [("dpo", {"pref_loss": "kto_pair", "pref_bco_weight": 0.5, "pref_ftx": 0.1}), ("dpo", {"ld_alpha": 0.5}), ("kto", {}), ("orpo", {})],
)  # fmt: skip
def test_results_do_not_depend_on_how_a_batch_is_cut(
    stage: str, more: dict[str, Any], keys: Keys, tmp_path: Path
) -> None:
    """per_device 1, 2, 4, 8 x accumulation at one global batch, and any token budget: two steps of each."""
    expected: tuple[list[dict[str, float]], dict[str, torch.Tensor]] | None = None
    for way in WAYS:
        one = trainer(keys(stage, tmp_path, pref_beta=0.5, **more, **way))
        rows = [one.step(0), one.step(1)]
        del rows[0]["accuracy"]  # at the start every pair is a tie, which rounding decides
        weights = {name: p.detach().clone() for name, p in one.parameters.items()}
        if expected is None:
            expected = rows, weights
        for row, other in zip(rows, expected[0], strict=True):
            assert row == pytest.approx(other, rel=2e-5, abs=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[1][name], atol=2e-5, rtol=1e-4)


def test_statistics_are_those_of_the_whole_step(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro-batch for each pair, and every one of them is given the same z and the same mean."""
    seen: list[tuple[float, float, float]] = []
    loss = Dpo.loss

    def watched(self: Dpo, scores: Scores, batch: Any) -> LossTerms:
        seen.append((batch.z_chosen, batch.z_rejected, batch.h_mean))
        return loss(self, scores, batch)

    one = trainer(
        keys("dpo", tmp_path, pref_loss="kto_pair", pref_bco_weight=1.0, micro_batch_tokens=1, learning_rate=5e-3)
    )
    first = one.step(0)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert one.seen == (pytest.approx(0, abs=1e-4), 6)
    monkeypatch.setattr(Dpo, "loss", watched)
    figures = one.step(1)
    assert len(seen) == 3
    assert len(set(seen)) == 1
    z_w, z_l, mean = seen[0]
    assert z_w == pytest.approx(max(0.0, figures["rewards/chosen"] / 0.1), rel=1e-4)
    assert z_l == pytest.approx(max(0.0, figures["rewards/rejected"] / 0.1), rel=1e-4, abs=1e-4)
    # both steps have six answers; the first had log-ratios of 0
    assert mean == pytest.approx((figures["rewards/chosen"] + figures["rewards/rejected"]) / 0.1 / 4, rel=1e-4)
    assert one.seen == (mean, 12)


def test_z0_of_a_step_is_that_of_its_mismatched_answers(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(keys("kto", tmp_path, learning_rate=2e-2, disable_shuffling=True, max_steps=9))
    for number in range(3):
        one.step(number)
    found: list[Any] = []
    observe = Kto.observe
    monkeypatch.setattr(
        Kto,
        "observe",
        lambda self, logp, observed, batch: found.append((logp, observed)) or observe(self, logp, observed, batch),
    )
    z0 = one.step(3)["z0"]
    ((logp, observed),) = found
    rows = [one.train.rows[i][1] for i in range(3)]
    assert observed.mask.sum(-1).tolist() == [len(row.scored) for row in rows]
    assert z0 == pytest.approx(max(0.0, float(((logp - observed.logp_ref) * observed.mask).sum() / 3)), rel=1e-5)
    assert not logp.requires_grad


# ------------------------------------------------------------------------------------------------------------ mismatched


def row(prompt: int, answer: int, length: int = 1) -> TokenRow:
    return TokenRow(token_ids=(1, prompt, *[answer] * length), scored=tuple(range(2, 2 + length)))


def test_mismatched_answers_belong_to_another_prompt() -> None:
    """Prompts 5 5 6 7 7: the next row, going round, with another prompt; also past a neighbour with the same one."""
    rows = [row(5, 50), row(5, 51), row(6, 60), row(7, 70), row(7, 71)]
    assert [r.token_ids for r in mismatched(rows, 64)] == [(1, 5, 60), (1, 5, 60), (1, 6, 70), (1, 7, 50), (1, 7, 50)]
    around = [row(5, 50), row(6, 60), row(5, 51)]
    assert [r.token_ids for r in mismatched(around, 64)] == [(1, 5, 60), (1, 6, 51), (1, 5, 60)]


def test_a_mismatched_row_fits_the_limit_by_its_prompts_end() -> None:
    long = TokenRow(token_ids=(1, 2, 3, 4, 5, 50), scored=(5,))
    first, second = mismatched([long, row(6, 60, length=3)], 6)
    assert first == TokenRow(token_ids=(3, 4, 5, 60, 60, 60), scored=(3, 4, 5))
    assert second == TokenRow(token_ids=(1, 6, 50), scored=(2,))


def test_one_prompt_alone_has_no_mismatch() -> None:
    with pytest.raises(DataError, match="the same prompt"):
        mismatched([row(5, 50), row(5, 51)], 64)


# ------------------------------------------------------------------------------------------------------------- reference


def test_the_reference_is_the_policy_at_the_start_of_the_stage(
    keys: Keys, tmp_path: Path, sft_folder: Path, tiny_folder: Callable[..., Path]
) -> None:
    """After SFT the margin is 0 at step 0 though the policy is far from the base; with the adapter continued or a new one on top."""
    for new in (False, True):
        one = trainer(keys("dpo", tmp_path, adapter_name_or_path=str(sft_folder), create_new_adapter=new))
        figures = one.step(0)
        assert (figures["rewards/chosen"], figures["rewards/rejected"]) == (
            pytest.approx(0, abs=1e-4),
            pytest.approx(0, abs=1e-4),
        )
        i = next(iter(one.train.reference))
        (base,) = logp_by_pytorch(tiny_folder("qwen2"), [one.train.rows[i][0]])
        assert (one.train.reference[i][0] - base).abs().max() > 0.1


def test_full_training_starts_at_its_own_copy_of_the_weights(keys: Keys, tmp_path: Path) -> None:
    one = trainer(keys("dpo", tmp_path, finetuning_type="full", learning_rate=1e-4))
    assert one.step(0)["margin"] == pytest.approx(0, abs=1e-4)
    assert one.session.roles.of("reference") is not one.session.roles.of("policy")


def test_a_reference_that_the_file_names(keys: Keys, tmp_path: Path, sft_folder: Path) -> None:
    """The policy starts at the SFT adapter and is compared with the bare base; then the other way round."""
    base = load(keys("dpo", tmp_path)).model_name_or_path
    one = trainer(keys("dpo", tmp_path, adapter_name_or_path=str(sft_folder), ref_model=base))
    other = trainer(keys("dpo", tmp_path, ref_model_adapters=str(sft_folder)))
    gains = [figures.step(0)["rewards/chosen"] for figures in (one, other)]
    assert abs(gains[0]) > 0.01
    assert gains[0] == pytest.approx(-gains[1], rel=1e-4)


def test_reference_log_probs_are_computed_once_and_anew_when_anything_differs(
    keys: Keys, tmp_path: Path, sft_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    computed: list[int] = []
    compute = reference._compute
    monkeypatch.setattr(
        reference, "_compute", lambda session, rows: computed.append(len(rows)) or compute(session, rows)
    )

    def first_step(**more: Any) -> dict[str, float]:
        return trainer(keys("dpo", tmp_path / "r", max_steps=3, **more)).step(0)

    first = first_step()
    assert computed == [18]
    assert first_step() == first  # bit for bit, from the disk
    first_step(pref_beta=0.3, pref_loss="ipo", learning_rate=1e-2)  # nothing that the reference depends on
    assert computed == [18]
    changes: list[dict[str, Any]] = [
        {"adapter_name_or_path": str(sft_folder)},
        {"cutoff_len": 20},
        {"default_system": "be brief"},
        {"dataset": "pairs_eval"},
    ]
    if cpu_has_bfloat16():  # elsewhere the run falls back to float32, and nothing differs
        changes.append({"compute_dtype": "bfloat16"})
    for more in changes:
        before = len(computed)
        first_step(**more)
        assert len(computed) == before + 1, more
    # a base whose embedding differs in a few rows in the middle, all that is at the beginning of each matrix being equal
    edited = tmp_path / "edited"
    shutil.copytree(str(load(keys("dpo", tmp_path)).model_name_or_path), edited)
    tensors = load_file(edited / "model.safetensors")
    tensors["model.embed_tokens.weight"][100:140] += 1.0
    save_file(tensors, edited / "model.safetensors", metadata={"format": "pt"})
    before = len(computed)
    assert first_step(model_name_or_path=str(edited))["margin"] == pytest.approx(
        0, abs=1e-6
    )  # the policy is its own reference
    assert len(computed) == before + 1
    (damaged, *_) = sorted((tmp_path / "cache" / "reference").glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
    damaged.write_bytes(damaged.read_bytes()[:100])
    before = len(computed)
    assert first_step() == first
    assert len(computed) == before + 1


def test_only_rows_that_the_run_uses_are_scored_by_the_reference(keys: Keys, tmp_path: Path) -> None:
    for steps, used in ((1, 3), (2, 6), (3, 9), (7, 9)):
        one = trainer(keys("dpo", tmp_path, max_steps=steps))
        one.step(0)
        assert len(one.train.reference) == used
    without = trainer(keys("simpo", tmp_path))
    without.step(0)
    assert without.train.reference == {}


def test_a_cache_that_cannot_be_written_costs_time_only(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    trainer(keys("dpo", tmp_path)).step(0)
    captured = capsys.readouterr()
    assert "not kept on disk" in captured.out + captured.err


# ------------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("stage", ["dpo", "kto", "orpo", "simpo"])
def test_a_run_evaluates_and_ends_with_its_best_model(stage: str, run: Run, tmp_path: Path) -> None:
    held_out = {
        "eval_dataset": "marks_eval" if stage == "kto" else "pairs_eval",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    folder = run(stage, tmp_path / "r", max_steps=3, eval_on_start=True, load_best_model_at_end=True, **held_out)
    rows = folder.metrics("eval")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    for name in ("loss", "accuracy", "rewards/chosen", "rewards/rejected", "margin", "logps/chosen", "logps/rejected"):
        assert f"eval/{name}" in rows[0]
    assert folder.results("eval")["eval_loss"] == min(r["eval/loss"] for r in rows[1:])
    if stage in ("dpo", "kto"):
        assert rows[0]["eval/margin"] == pytest.approx(0, abs=1e-5)
    assert (folder.path / "adapter_model.safetensors").is_file()


def test_evaluation_is_of_all_held_out_rows_and_does_not_move_the_training(keys: Keys, tmp_path: Path) -> None:
    one, other = (
        trainer(keys("dpo", tmp_path, eval_dataset="pairs_eval", eval_strategy="steps", pref_bco_weight=0.5))
        for _ in range(2)
    )
    first = one.step(0)
    found = one.evaluate(1)
    assert found == one.evaluate(1)
    assert other.step(0) == first
    assert other.step(1) == one.step(1)


@pytest.mark.parametrize(
    ("stage", "dataset", "what"),
    [
        ("dpo", "qa", "not a set of preferences"),
        ("kto", "pairs", "its rows are pairs"),
        ("kto", "qa", r"no label \(kto_tag\)"),
    ],
)
def test_a_set_of_the_wrong_kind_is_an_error_that_says_which_kind(
    stage: str, dataset: str, what: str, keys: Keys, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=what):
        trainer(keys(stage, tmp_path, dataset=dataset))
