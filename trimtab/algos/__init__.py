"""Algorithms: one file each, and one row here. The loops of `train` know these two shapes and no algorithm by name.

Shapes: b completions, rows or pairs of a micro-batch (of the whole rollout, in `credit`); t scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from trimtab.registry import Registry, Row

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from trimtab.ops.reduction import Reduction
    from trimtab.types import LossTerms, RolloutBatch, Scores

ALGORITHMS = Registry(
    "stage",
    [
        Row(name="pt", target="trimtab.algos.sft:Sft", help="pre-training: plain text, every token a label"),
        Row(name="sft", target="trimtab.algos.sft:Sft", help="supervised fine-tuning: imitate given answers"),
        Row(name="rm", target="trimtab.algos.rm:RewardModel", help="reward model: learn a score from pairs of answers"),
        Row(
            name="dpo",
            target="trimtab.algos.dpo:Dpo",
            help="direct preference optimisation: pairs of answers, no reward",
        ),
        Row(
            name="kto", target="trimtab.algos.kto:Kto", help="Kahneman-Tversky optimisation: answers marked good or bad"
        ),
        Row(
            name="orpo",
            target="trimtab.algos.orpo:Orpo",
            help="odds-ratio preference optimisation: SFT and pairs in one",
        ),
        Row(
            name="simpo", target="trimtab.algos.simpo:SimPo", help="simple preference optimisation: pairs, no reference"
        ),
        Row(name="ppo", target="trimtab.algos.ppo:Ppo", help="proximal policy optimisation: a reward, with a critic"),
        Row(
            name="rloo",
            target="trimtab.algos.rloo:Rloo",
            help="REINFORCE, each answer against the others to its prompt (leave one out)",
        ),
        Row(
            name="grpo",
            target="trimtab.algos.grpo:Grpo",
            help="group-relative policy optimisation, with Dr.GRPO, DAPO, GSPO and CISPO as presets",
        ),
        Row(
            name="reinforce_pp",
            target="trimtab.algos.reinforce_pp:ReinforcePp",
            help="REINFORCE++: PPO's reward and clip, no critic, advantages normalised over the batch",
        ),
        Row(
            name="remax",
            target="trimtab.algos.remax:Remax",
            help="REINFORCE against the policy's own greedy answer",
        ),
        Row(
            name="raft",
            target="trimtab.algos.raft:Raft",
            help="reward-ranked fine-tuning: imitate the best of the policy's own answers",
        ),
        Row(
            name="online_dpo",
            target="trimtab.algos.online_dpo:OnlineDpo",
            help="DPO on the policy's own answers: the best and the worst of each prompt, by a reward",
        ),
    ],
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Which models besides the policy an algorithm wants beside it; `greedy`: the greedy answer's score of every prompt.

    `old`: what `credit` gives depends on the old log-probabilities (a KL in the reward), beyond the figures that it logs.
    """

    reference: bool
    critic: bool
    reward: bool
    greedy: bool = False
    old: bool = True


class Online(Protocol):
    """An algorithm that learns from what the policy writes.

    Attributes:
        needs: the other roles.
        group_size: completions per prompt.
        epochs: passes over each rollout batch.
        reduction: the mean that a loss is taken in (`ops.reduction`).
        unit: what a micro-batch may not separate.
        kl_coef: the beta to start with.
    """

    kind: Literal["online"]
    needs: Needs
    reduction: Reduction
    unit: Literal["completion", "pair", "group"]
    group_size: int
    epochs: int
    kl_coef: float

    @classmethod
    def from_config(cls, config: Any) -> Online:
        """Built from a stage's config, whose attributes are the YAML keys."""
        ...

    def credit(self, batch: RolloutBatch) -> RolloutBatch:
        """The whole rollout batch with advantages (and returns) filled in; no gradients."""
        ...

    def policy_loss(self, scores: Scores, batch: RolloutBatch) -> LossTerms:
        """Unreduced loss of a micro-batch."""
        ...

    def value_loss(self, values: Float[Tensor, "b t"], batch: RolloutBatch) -> LossTerms:
        """The same for the critic; only where `needs.critic` (others have no such method)."""
        ...

    def pairs(self, batch: RolloutBatch) -> list[int]:
        """Rows that are compared: better, worse, better ...; only where `unit` is "pair" (others have no such method)."""
        ...

    def next_kl_coef(self, kl_coef: float, kl: float, n: int) -> float:
        """Beta for the next rollout batch, after n completions with this KL."""
        ...

    def describe(self) -> str:
        """One line for the start of a run: what is being optimised."""
        ...


class Offline(Protocol):
    """An algorithm that learns from a data set.

    Attributes:
        reads: what the model is asked for: log-probabilities of scored tokens, or a reward per answer.
        reduction, unit: as for `Online`.
    """

    kind: Literal["offline"]
    reads: Literal["logprobs", "reward"]
    reduction: Reduction
    unit: Literal["row", "pair"]

    @classmethod
    def from_config(cls, config: Any) -> Offline:
        """Built from a stage's config, whose attributes are the YAML keys."""
        ...

    def loss(self, scores: Any, batch: Any) -> LossTerms:
        """Unreduced loss of a micro-batch; `scores` is what `reads` asked for."""
        ...

    def describe(self) -> str:
        """One line for the start of a run: what is being optimised."""
        ...


class Preference(Protocol):
    """An algorithm that learns from judged answers of a data set: pairs, or single answers with a label.

    One that measures its losses against the whole optimizer step has a method `observe(logp, observed, batch) -> batch`,
    called before the first gradient; what `observed` holds is the attribute `observes`.

    Attributes:
        unit: "pair" reads `PreferenceBatch` (two rows an entry), "row" reads `LabelledBatch`.
        needs: does it compare with the policy at the start of the stage?
        observes: the step's own rows, mismatched answers (each to another row's prompt), or nothing.
    """

    kind: Literal["preference"]
    unit: Literal["pair", "row"]
    reduction: Literal["row"]
    needs: Needs

    @property
    def observes(self) -> Literal["nothing", "own", "mismatched"]: ...

    @classmethod
    def from_config(cls, config: Any) -> Preference:
        """Built from a stage's config, whose attributes are the YAML keys."""
        ...

    def loss(self, scores: Scores, batch: Any) -> LossTerms:
        """Unreduced loss of a micro-batch: one number per pair or answer."""
        ...

    def describe(self) -> str:
        """One line for the start of a run: what is being optimised."""
        ...
