"""`trimtab data clean`: a cleaned copy of a data set, and a report of every fault with its row numbers.

    unreadable       a broken line, or a row that its format cannot read (no prompt, speakers out of order ...)
    empty            no question, or no answer; of a dialogue the last question, or any answer
    equal answers    a preference or ranking that gives one answer twice: training drops it
    duplicate        the question, answers, label, score and margin of an earlier row, full-width forms and blanks aside
    near-duplicate   a question much like an earlier one (Jaccard of shingles), the same numbers, and the same answer
    conflict         one question with different answers: no row of it can be trusted (preferences: the same pair both ways round,
                     or with two margins; rankings: two answers both ways round; with labels or scores: one answer with two of them)
    over-long        more tokens than cutoff_len, with a tokenizer to count them
    unparsable SQL   an answer that is to be SQL and is not
    leak             a question that is also in the held-out set (or nearly, with the same answer)

Nothing else is removed. A row is removed for the first fault in this order, and every fault of every row is in the report.
What was removed is kept beside the cleaned file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data import source, sql_text
from trimtab.data.dropped import Dropped
from trimtab.data.formats.dialogue import ANSWERING
from trimtab.data.info import DatasetSpec
from trimtab.data.similar import bare, figures, near_pairs, normal
from trimtab.types import Example, Message, Origin

FAULTS = (
    "unreadable",
    "empty",
    "equal answers",
    "duplicate",
    "near-duplicate",
    "conflict",
    "over-long",
    "unparsable SQL",
    "leak",
)
THRESHOLD = 0.8
SQL_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing wrong with one row; `other` is the row it repeats, contradicts or is a leak of."""

    kind: str
    origin: Origin
    detail: str = ""
    other: Origin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """What became of a data set.

    Attributes:
        kept, removed: (origin, row as read), in the order of the file.
        faults: every fault of every row.
        sql: the answers were taken for SQL.
        skipped: checks that were not made, and why.
    """

    kept: tuple[tuple[Origin, Any], ...]
    removed: tuple[tuple[Origin, Any], ...]
    faults: tuple[Fault, ...]
    sql: bool
    skipped: tuple[str, ...]

    def reason(self, origin: Origin) -> Fault:
        """The fault that a removed row was removed for."""
        return min((f for f in self.faults if f.origin == origin), key=lambda f: FAULTS.index(f.kind))

    def report(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "read": len(self.kept) + len(self.removed),
            "kept": len(self.kept),
            "removed": len(self.removed),
            "faults": {kind: sum(f.kind == kind for f in self.faults) for kind in FAULTS},
            "sql": self.sql,
            "not checked": list(self.skipped),
            "rows": [
                {
                    "file": f.origin.file,
                    "row": f.origin.row,
                    "fault": f.kind,
                    "detail": f.detail,
                    "other": None if f.other is None else {"file": f.other.file, "row": f.other.row},
                }
                for f in self.faults
            ],
            "kept_rows": [{"file": origin.file, "row": origin.row} for origin, _ in self.kept],
        }


def clean(
    spec: DatasetSpec,
    *,
    held_out: DatasetSpec | None = None,
    threshold: float = THRESHOLD,
    sql: bool | None = None,
    dialect: str | None = None,
    conflicts: bool = True,
    tokens: Callable[[Example], int] | None = None,
    cutoff_len: int = 2048,
) -> Cleaned:
    """Look at every row.

    Args:
        threshold: the similarity from which questions are near-duplicates.
        sql: the answers are SQL; None: when most of them begin like it.
        conflicts: remove rows with conflicting answers; else they are only reported.
        tokens: counts the tokens of a row; None: lengths are not looked at.
    """
    raw = list(source.rows(spec))
    faults: list[Fault] = []
    examples: list[Example] = []
    for origin, value in raw:
        found = source.example(value, origin, spec)
        if isinstance(found, Dropped):
            kind = (
                "empty"
                if found.reason.startswith("empty") or (found.reason.startswith("no ") and _blank(value))
                else "unreadable"
            )
            faults.append(Fault(kind=kind, origin=origin, detail=str(found).partition(": ")[2]))
        else:
            examples.append(found)
    asks_only = all(example.text is None and not answers(example) for example in examples)
    for example in examples:
        if (what := _empty(example, asks_only)) is not None:
            faults.append(Fault(kind="empty", origin=example.origin, detail=what))
    examples = [example for example in examples if _empty(example, asks_only) is None]
    for example in examples:
        if (twice := _equal_answers(example)) is not None:
            faults.append(Fault(kind="equal answers", origin=example.origin, detail=twice[:80]))
    examples = [example for example in examples if _equal_answers(example) is None]

    is_sql = _mostly_sql(examples) if sql is None else sql
    first: dict[Any, Example] = {}
    unique: list[Example] = []
    for example in examples:
        earlier = first.setdefault(_key(example), example)
        if earlier is example:
            unique.append(example)
        else:
            faults.append(Fault(kind="duplicate", origin=example.origin, other=earlier.origin))
    meaning = _meaning(is_sql, dialect)
    skipped = []
    if asks_only:
        skipped.append("empty answers, near-duplicates: the set holds questions without answers")
    else:
        faults += _near(unique, threshold, meaning)
    faults += _conflicts(unique, meaning)
    if tokens is None:
        skipped.append("lengths: no tokenizer was named")
    else:
        faults += _long(unique, tokens, cutoff_len)
    if is_sql:
        faults += _unparsable(unique, dialect)
    if held_out is None:
        skipped.append("leaks: no held-out set was named")
    else:
        faults += _leaks(unique, held_out, threshold, meaning)

    faults.sort(key=lambda f: (f.origin.file, f.origin.row, FAULTS.index(f.kind)))
    bad = {f.origin for f in faults if conflicts or f.kind != "conflict"}
    return Cleaned(
        kept=tuple((origin, value) for origin, value in raw if origin not in bad),
        removed=tuple((origin, value) for origin, value in raw if origin in bad),
        faults=tuple(faults),
        sql=is_sql,
        skipped=tuple(skipped),
    )


def question(example: Example) -> str:
    """All that stands before the answer, as one text (for pre-training the text itself)."""
    return example.text if example.text is not None else "\n".join(message.content for message in example.prompt)


def answers(example: Example) -> tuple[Message, ...]:
    """The answers of a row: one, or the chosen and the rejected, or all of a ranking."""
    if example.ranked:
        return example.ranked
    return tuple(answer for answer in (example.response, example.chosen, example.rejected) if answer is not None)


# -------------------------------------------------------------------------------------------------------------- checks


def _blank(value: Any) -> bool:
    return isinstance(value, dict) and not any(
        str(cell).strip() for cell in value.values() if cell not in (None, [], {})
    )


def _empty(example: Example, asks_only: bool) -> str | None:
    if example.text is not None:
        return None
    *earlier, last = example.prompt
    if last.role == "user" and not last.content.strip():  # an observation may be empty: a tool found nothing
        return "no question"
    if any(not turn.content.strip() for turn in earlier if turn.role in ANSWERING):
        return "an earlier answer is empty"
    listed = answers(example)
    if asks_only or (listed and all(answer.content.strip() for answer in listed)):
        return None
    return "no answer"


def _equal_answers(example: Example) -> str | None:
    """An answer that stands twice among those to choose from, compared as training compares them."""
    listed = [answer.content for answer in answers(example)]
    return next((answer for place, answer in enumerate(listed) if answer in listed[:place]), None)


def _verdict(example: Example) -> tuple[bool | None, float | None, float]:
    """What a row says its answers are worth: label, score, and margin of a pair."""
    return example.label, example.score, example.margin


def _key(example: Example) -> Any:
    roles = tuple((message.role, normal(message.content)) for message in example.prompt)
    return (
        roles,
        normal(example.text or ""),
        tuple(normal(a.content) for a in answers(example)),
        _verdict(example),
        example.tools,
    )


def _mostly_sql(examples: Sequence[Example]) -> bool:
    listed = [answer.content for example in examples for answer in answers(example)]
    return bool(listed) and sum(map(sql_text.looks_like_sql, listed)) > SQL_SHARE * len(listed)


Meaning = Callable[[Example], tuple[str, ...]]


def _meaning(is_sql: bool, dialect: str | None) -> Meaning:
    """What the answers of a row say, as a key: rows with equal keys give the same answers."""

    def of(text: str) -> str:
        if is_sql:
            return sql_text.canonical(text, dialect) or normal(text)
        return bare(text) or normal(text)

    return lambda example: tuple(of(answer.content) for answer in answers(example))


def _near(examples: Sequence[Example], threshold: float, meaning: Meaning) -> list[Fault]:
    """Looked for among rows of one answer only: a schema in every prompt makes all prompts alike."""
    alike: dict[Any, list[Example]] = defaultdict(list)
    for example in examples:
        alike[meaning(example), _verdict(example)].append(example)
    faults: dict[Origin, Fault] = {}
    for group in alike.values():
        for i, j, similarity in near_pairs([question(example) for example in group], threshold):
            a, b = group[i], group[j]
            if a.origin not in faults and b.origin not in faults and _same_request(a, b):
                detail = f"similarity {similarity:.2f}"
                faults[b.origin] = Fault(kind="near-duplicate", origin=b.origin, other=a.origin, detail=detail)
    return list(faults.values())


def _same_request(a: Example, b: Example) -> bool:
    """Nearly equal questions that differ in a number ask for different things, whatever the answers."""
    return figures(question(a)) == figures(question(b))


def _conflicts(examples: Sequence[Example], meaning: Meaning) -> list[Fault]:
    asked: dict[Any, list[Example]] = defaultdict(list)
    for example in examples:
        if example.text is None:
            asked[tuple((m.role, normal(m.content)) for m in example.prompt), example.tools].append(example)
    faults = []
    for group in asked.values():
        for example in group:
            against = next((other for other in group if _contradict(example, other, meaning)), None)
            if against is not None:
                faults.append(
                    Fault(
                        kind="conflict",
                        origin=example.origin,
                        other=against.origin,
                        detail=answers(example)[0].content[:80],
                    )
                )
    return faults


def _contradict(a: Example, b: Example, meaning: Meaning) -> bool:
    if a is b:
        return False
    if a.chosen is not None and b.chosen is not None:
        both = ([normal(answer.content) for answer in answers(one)] for one in (a, b))
        return _order_differs(*both) or (meaning(a) == meaning(b) and a.margin != b.margin)
    if _judged(a) and _judged(
        b
    ):  # a question may have many answers with labels or scores, but one answer only one of each
        return meaning(a) == meaning(b) and _verdict(a) != _verdict(b)
    return not _judged(a) and not _judged(b) and meaning(a) != meaning(b)


def _judged(example: Example) -> bool:
    return example.label is not None or example.score is not None


def _order_differs(a: Sequence[str], b: Sequence[str]) -> bool:
    """Do two rankings (or pairs) have two answers in common, and say of them that the other is better?"""
    place = {answer: i for i, answer in enumerate(b)}
    shared = [place[answer] for answer in a if answer in place]
    return shared != sorted(shared)


def _long(examples: Iterable[Example], tokens: Callable[[Example], int], cutoff_len: int) -> list[Fault]:
    counted = ((example, tokens(example)) for example in examples)
    return [
        Fault(kind="over-long", origin=example.origin, detail=f"{count} tokens, cutoff_len {cutoff_len}")
        for example, count in counted
        if count > cutoff_len
    ]


def _unparsable(examples: Iterable[Example], dialect: str | None) -> list[Fault]:
    """A rejected answer may be wrong on purpose: of a preference only the chosen one is to be SQL."""
    faults = []
    for example in examples:
        answer = example.response or example.chosen
        problem = sql_text.fault(answer.content, dialect) if answer is not None else None
        if problem:
            faults.append(Fault(kind="unparsable SQL", origin=example.origin, detail=problem))
    return faults


def _leaks(examples: Sequence[Example], held_out: DatasetSpec, threshold: float, meaning: Meaning) -> list[Fault]:
    read = [source.example(value, origin, held_out) for origin, value in source.rows(held_out)]
    held = [example for example in read if isinstance(example, Example)]
    known = {normal(question(example)): example for example in reversed(held)}
    faults: dict[Origin, Fault] = {}
    for example in examples:
        twin = known.get(normal(question(example)))
        if twin is not None:
            faults[example.origin] = Fault(
                kind="leak", origin=example.origin, other=twin.origin, detail="the same question"
            )
    alike: dict[Any, list[tuple[Example, bool]]] = defaultdict(list)
    for example, ours in [*((example, False) for example in held), *((example, True) for example in examples)]:
        if answers(example) or example.text is not None:
            alike[meaning(example)].append((example, ours))
    for group in alike.values():
        for i, j, similarity in near_pairs([question(example) for example, _ in group], threshold):
            (a, _), (b, ours) = group[i], group[j]
            if ours and not group[i][1] and b.origin not in faults and _same_request(a, b):
                detail = f"similarity {similarity:.2f}, the same answer"
                faults[b.origin] = Fault(kind="leak", origin=b.origin, other=a.origin, detail=detail)
    return list(faults.values())
