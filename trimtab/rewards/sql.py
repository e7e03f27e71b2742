"""Rewards for text to SQL: the answer's query against the row's own, by execution or by spelling.

    reward_model_type: sql     `ExecutionReward`: `Worth` of the verdict, on rows that `trimtab sql build` has written
    sql_execution              1 where both give the same rows on every instance of the database, else 0
    sql_graded                 the same, with part of it for what is nearly right (`GRADES`)
    sql_match                  1 where they are the same query up to spelling (`trimtab.sql.canonical`); needs no database

The last three are functions for `reward_funcs`. Two of them read the row's columns `database` (an SQLite file, a `postgresql://` address,
or a list of several instances of one schema) and, if they are there, `dialect` and `quoted_values`. Where execution concludes nothing
(gold fails, is not determined, or both answers are empty) the spelling decides there; rows of that kind have no part in `ExecutionReward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.errors import DataError, RewardError
from trimtab.rewards import Answer, Judged
from trimtab.sql.cached import CachedJudge, shared_judge
from trimtab.sql.canonical import canonical_sql
from trimtab.sql.rows import row_of, sql_row
from trimtab.sql.verdicts import KINDS, Kind, Verdict

GRADES: dict[Kind, float] = {
    "format_error": 0.0,
    "multi_statement": 0.0,
    "write_attempt": 0.0,
    "parse_error": 0.0,
    "unknown_identifier": 0.1,
    "exec_error": 0.1,
    "timeout": 0.1,
    "too_many_rows": 0.1,
    "wrong_columns": 0.2,
    "wrong_rows": 0.3,
    "wrong_order": 0.6,
    "wrong_multiplicity": 0.6,
    "equal": 1.0,
}
"""Partial credit: ever more for a query that reads, that runs, that has the right columns, the right rows."""


# -------------------------------------------------------------------------------------------------- reward_model_type: sql


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What a verdict is worth.

    Attributes:
        equal: right on every instance that can tell.
        executes: it runs, with the right number of columns, and gives other rows.
        other: everything else.
        graded: `GRADES` in place of these three.
    """

    equal: float = 1.0
    executes: float = 0.1
    other: float = 0.0
    graded: bool = False

    def of(self, verdict: Verdict) -> float:
        """The reward of an answer with this verdict, which is not `unverified`."""
        if self.graded:
            return GRADES[verdict.kind]
        return self.equal if verdict.kind == "equal" else self.executes if verdict.right_shape else self.other


class ExecutionReward:
    """The worth of each answer's verdict.

    Its parts: `sql` is the score, `sql/VERDICT` is 1 for answers with that verdict (so its mean is their share), and `sql/cached` is 1
    where the verdict was known before.
    """

    name = "sql"

    def __init__(self, worth: Worth, *, judge: CachedJudge) -> None:
        self._worth, self._judge = worth, judge

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return self.judge(answers).scores

    def judge(self, answers: Sequence[Answer]) -> Judged:
        """Scores and parts.

        Raises:
            RewardError: a row whose answers cannot be judged. None is left when a run starts, so its databases have changed since;
                or a server that cannot be asked.
            DataError: a row without databases.
        """
        tasks = []
        for answer in answers:
            example = answer.prompt.example
            gold = example.response or example.chosen
            tasks.append((answer.text, gold.content if gold is not None else "", row_of(example).database))
        try:
            found = self._judge.verdicts(tasks)
        except DataError as error:  # as a reward that failed: the run keeps a checkpoint
            raise RewardError(
                "the database server cannot be asked what answers are worth",
                where=error.where,
                why=error.why,
                remedy="mend that, or start the server; then go on with --resume",
            ) from error
        for answer, (verdict, _) in zip(answers, found, strict=True):
            if verdict.kind == "unverified":
                raise RewardError(
                    "the answers to a row cannot be judged by execution any more",
                    where=str(answer.prompt.example.origin),
                    why=verdict.message,
                    remedy="its databases are not what they were when the set was built: run `trimtab sql build` again, then --resume",
                )
        scores = [self._worth.of(verdict) for verdict, _ in found]
        kinds = {f"{self.name}/{kind}": [float(v.kind == kind) for v, _ in found] for kind in KINDS if kind in GRADES}
        known = [float(cached) for _, cached in found]
        return Judged(scores=scores, parts={self.name: scores, **kinds, f"{self.name}/cached": known})


# ------------------------------------------------------------------------------------------------------------ reward_funcs


def sql_execution(
    completion: str,
    gold: str | None,
    database: str | Sequence[str],
    dialect: str = "sqlite",
    data_folder: str = "",
    quoted_values: bool = False,
) -> float:
    """1.0 if the answer's query is right by execution, else 0.0."""
    return float(_verdict(completion, gold, database, dialect, data_folder, quoted_values) == "equal")


def sql_graded(
    completion: str,
    gold: str | None,
    database: str | Sequence[str],
    dialect: str = "sqlite",
    data_folder: str = "",
    quoted_values: bool = False,
) -> float:
    """The worth of the verdict on the answer's query."""
    return GRADES[_verdict(completion, gold, database, dialect, data_folder, quoted_values)]


def sql_match(completion: str, gold: str | None) -> float:
    """1.0 if the answer's query is the row's own up to spelling, else 0.0."""
    return float(_same(completion, _needed(gold)))


def _verdict(
    completion: str, gold: str | None, database: str | Sequence[str], dialect: str, folder: str, quoted: bool
) -> Kind:
    wanted = _needed(gold)
    columns = {"database": database, "dialect": dialect, "quoted_values": quoted}
    row = sql_row(columns, folder, where="column `database`")
    found = shared_judge().verdict(completion, wanted, row.database).kind
    if found == "unverified":
        return "equal" if _same(completion, wanted) else "wrong_rows"
    return found


def _needed(gold: str | None) -> str:
    if gold is None:
        raise ValueError(
            "this row has no answer of its own to compare with (column `output`, or the entry's `response`)"
        )
    return gold


def _same(completion: str, gold: str) -> bool:
    wanted = canonical_sql(gold)
    return canonical_sql(completion) == wanted if wanted is not None else completion.split() == gold.split()
