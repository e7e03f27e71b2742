"""Online DPO: the policy writes the pairs that it learns from, a reward judges them. Read from the top.

**Sampled.** k = `group_size` completions of each prompt from the policy as it is now, each scored once.

**Compared** (`pairs`). Of each prompt the answer with the highest score, w, and the one with the lowest, l; of equals the first. Where
all scores are equal there is no pair: the prompt teaches nothing in this step, and is counted (`pairs/tied`).

**Minimised** (`policy_loss`, `epochs` times), with h_y = sum over the tokens of y of (logp - logp_ref):

    -(1 - e) logsig(beta (h_w - h_l)) - e logsig(-beta (h_w - h_l))           mean over the pairs

The reference is the policy as it was when the stage began; it alone holds the policy, by beta. Unlike in DPO on a data set, what the
policy comes to write is judged again in every step, so that it is corrected where it has gone.

**Assumed.** The score says which of two answers is better; by how much is not seen. As in ppo.py, the policy samples from its whole
distribution at the rollout temperature.

Guo et al. (2402.04792) with the judge as a reward; best and worst of k as in Xiong et al. (2312.11456). Details with sources, metrics,
signs of failure: docs/algorithms/online_dpo.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from trimtab.algos import Needs
from trimtab.algos.surrogate import kl_figures
from trimtab.ops import preference
from trimtab.ops.masked import Reduce, alone, row_sum
from trimtab.types import LossTerms, RolloutBatch, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineDpo:
    """Online DPO with the keys of its config.

    Attributes:
        group_size: k, completions per prompt.
        epochs: passes over each rollout batch (`ppo_epochs`).
        beta: `pref_beta`.
        smoothing: e, how often the judge has it the wrong way round (`dpo_label_smoothing`).
        kl_coef: 0: no KL penalty beside beta.
    """

    kind: ClassVar[Literal["online"]] = "online"
    unit: ClassVar[Literal["pair"]] = "pair"
    reduction: ClassVar[Literal["row"]] = "row"
    needs: ClassVar[Needs] = Needs(reference=True, critic=False, reward=True, old=False)
    kl_coef: ClassVar[float] = 0.0

    group_size: int = 4
    epochs: int = 1
    beta: float = 0.1
    smoothing: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> OnlineDpo:
        return cls(
            group_size=config.group_size,
            epochs=config.ppo_epochs,
            beta=config.pref_beta,
            smoothing=config.dpo_label_smoothing,
        )

    def pairs(self, batch: RolloutBatch) -> list[int]:
        """Row numbers of the answers that are compared: best, worst, best, worst ... of each prompt whose scores differ."""
        chosen: list[int] = []
        rows: dict[int, list[int]] = {}
        for row, group in enumerate(batch.group.tolist()):
            rows.setdefault(group, []).append(row)
        scores = batch.score.tolist()
        for group_rows in rows.values():
            best = max(group_rows, key=lambda row: scores[row])  # the first of equals
            worst = min(group_rows, key=lambda row: scores[row])
            if scores[best] > scores[worst]:
                chosen += [best, worst]
        return chosen

    @torch.no_grad()
    def credit(self, batch: RolloutBatch, *, reduce: Reduce = alone) -> RolloutBatch:
        """The whole rollout batch with `stats` filled in; the pairs are `pairs(batch)`."""
        chosen = self.pairs(batch)
        prompts = len(set(batch.group.tolist()))
        stats = {
            **batch.stats,
            **kl_figures(batch, reduce=reduce),
            "pairs/used": float(len(chosen) // 2),
            "pairs/tied": 1 - len(chosen) / 2 / max(prompts, 1),
        }
        if chosen:
            stats["pairs/lead"] = float((batch.score[chosen[0::2]] - batch.score[chosen[1::2]]).mean())
        return replace(batch, stats=stats)

    def policy_loss(self, scores: Scores, batch: RolloutBatch) -> LossTerms:
        """One number per pair `[b]` from the log-probabilities of its two rows `[2 b, t]`, the better one first."""
        assert batch.logp_ref is not None, "online DPO needs the reference's log-probabilities"
        h = preference.log_ratios(scores.logp, batch.logp_ref, batch.mask)
        h_w, h_l = h[0::2], h[1::2]
        loss = preference.dpo(h_w - h_l, self.beta, self.smoothing)
        logp = row_sum(scores.logp, batch.mask)
        real = batch.mask.any(dim=-1).view(-1, 2).all(dim=-1)
        return LossTerms(
            loss=torch.where(real, loss, torch.zeros_like(loss)),
            means=preference.pair_figures(self.beta * h_w, self.beta * h_l, logp[0::2], logp[1::2]),
        )

    def next_kl_coef(self, kl_coef: float, kl: float, n: int) -> float:
        """Unchanged: beta is fixed."""
        return kl_coef

    def describe(self) -> str:
        """What the run optimises."""
        smoothed = f", label smoothing {self.smoothing:g}" if self.smoothing else ""
        return (
            f"minimises -logsig(beta h), beta {self.beta:g}{smoothed}, on the best and worst of {self.group_size} answers; where the "
            "score ranks as Bradley and Terry's labels would, the optimum is pi_ref exp(score / beta)"
        )
