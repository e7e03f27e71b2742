"""Verdicts that are kept: a policy writes the same query again and again, and running it once is enough.

The key is (statement, gold, database); the limits are the judge's own, one for all its verdicts. A statement is kept under its text
without line comments and the final `;`, with runs of space as one and unquoted words in small letters: no dialect here tells those
apart, so which spelling came first cannot change a verdict. (`canonical_sql` would join more spellings, also some that one database
runs and another refuses.)
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from trimtab.sql.judge import Database, Judge, Official
from trimtab.sql.statement import MAX_CHARACTERS, find_statement, tokens
from trimtab.sql.verdicts import Verdict

Task = tuple[str, str, Database]
"""An answer, the gold query, the database."""
MOST = 100_000
"""Verdicts that are kept at once."""
WORKERS = 4
"""Processes at most, where nobody says how many."""


def same_statement(statement: str, dialect: str) -> str:
    """One text for statements that differ in space, line comments, a final `;` and the case of unquoted words."""
    pieces: list[str] = []
    for token in tokens(statement, dialect):
        if token.kind == "space" or (token.kind == "comment" and not token.text.startswith("/*")):
            pieces += [] if pieces[-1:] == [" "] else [" "]
        elif token.kind == "word" and token.text.isascii():  # other letters are told apart by SQLite
            pieces.append(token.text.lower())
        else:
            pieces.append(token.text)
    text = "".join(pieces).rstrip()
    return text.removesuffix(";").strip()


@dataclass(slots=True)
class CachedJudge:
    """A judge that runs each query on each database once.

    Attributes:
        asked, found: verdicts that were asked for, and those of them that were known.
    """

    judge: Judge
    asked: int = 0
    found: int = 0
    _verdicts: dict[tuple[str, str, Database], Verdict] = field(default_factory=dict)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def verdicts(self, tasks: Sequence[Task]) -> list[tuple[Verdict, bool]]:
        """The verdict on each task in order, and whether it was known (from before, or from an earlier task)."""
        with self._one_at_a_time:
            if len(self._verdicts) > MOST:
                self._verdicts.clear()
            keys = [self._key(task) for task in tasks]
            seen = {key for key in keys if key in self._verdicts}
            new = {key: task for key, task in zip(keys, tasks, strict=True) if key not in seen}
            self._verdicts.update(zip(new, self.judge.judge_many(list(new.values())), strict=True))
            result: list[tuple[Verdict, bool]] = []
            for key in keys:
                result.append((self._verdicts[key], key in seen))
                seen.add(key)
            self.asked += len(result)
            self.found += sum(known for _, known in result)
            return result

    def verdict(self, answer: str, gold: str, database: Database) -> Verdict:
        """Of one answer."""
        return self.verdicts([(answer, gold, database)])[0][0]

    def why_unverified(self, gold: str, database: Database) -> str | None:
        """Why no instance can tell right from wrong; None where one can."""
        golds = self.judge.golds(gold, database)
        if any(one.verifiable for one in golds):
            return None
        return next((one.reason for one in golds if one.reason), "the row's own query gives no rows on any database")

    def officials(self, tasks: Sequence[Task]) -> list[Official]:
        """The two public evaluators on each answer."""
        with ThreadPoolExecutor(self.judge.workers) as pool:
            return list(pool.map(lambda task: self.judge.official(*task), tasks))

    @staticmethod
    def _key(task: Task) -> tuple[str, str, Database]:
        answer, gold, database = task
        statement = find_statement(answer)
        if statement is None:
            return "", gold, database
        if len(statement) > MAX_CHARACTERS:  # its length is its verdict, so that it is not cut into pieces first
            return statement, gold, database
        return same_statement(statement, database.dialect), gold, database


_shared: CachedJudge | None = None


def shared_judge(workers: int | None = None) -> CachedJudge:
    """The one judge of this process, closed when Python ends.

    Args:
        workers: processes; None keeps what there is, or makes as many as there are cores, at most `WORKERS`. The number changes no verdict.
    """
    global _shared
    if _shared is None:
        atexit.register(_close)
    if _shared is None or workers not in (None, _shared.judge.workers):
        _close()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _shared = CachedJudge(Judge(workers=workers or min(cores, WORKERS)))
    return _shared


def _close() -> None:
    if _shared is not None:
        _shared.judge.close()
