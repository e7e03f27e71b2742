"""A reward from a Python function of the user's.

    def right(completion, output):                     one answer: a number
    def lengths(completions, **columns):               all answers of a batch: a list of numbers
    async def asked(prompt, completion): ...           one answer; those of a batch run at the same time

A function is given what its parameters name, as keywords:

    prompt, completion     text: the last message before the answer, and the answer without its end marker
    messages               the dialogue before the answer, as a list of {"role": ..., "content": ...}
    gold                   the row's own answer as text, None where it has none
    data_folder            the folder of the data file that holds the row: where relative paths in its columns start
    anything else          the row's column of that name, as the data file has it; **kwargs takes all of them

It is *batched* if it names `prompts` or `completions`; then each of these (`messages`, `gold` and columns too, under the same names)
is a list, one entry per answer.

Functions run in one thread of their own, where their file was loaded too, so that what a file opens (a database, an event loop)
is used where it was opened, and a call can be given up when its time is over. Python cannot stop a thread: after a time limit
the call goes on in the background until the process ends.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import queue
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, TypeVar

from trimtab.errors import RewardError
from trimtab.rewards import Answer
from trimtab.types import Example

T = TypeVar("T")
Task = Callable[[asyncio.Runner], Any]

SINGLE = ("prompt", "completion", "messages")
BATCHED = ("prompts", "completions", "messages")
BESIDE = ("gold", "data_folder")
"""Given too; a column of that name goes before them."""
RESUME = "mend the function, then go on with --resume"


# -------------------------------------------------------------------------------------------------------------- a thread


class Late(Exception):
    """A task is not done in time."""


class Worker:
    """A thread that does one task after another; a task is given the thread's event loop."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Task, queue.SimpleQueue[tuple[bool, Any]]] | None] | None = None
        self._end: weakref.finalize[Any, Worker] | None = None

    def do(self, task: Callable[[asyncio.Runner], T], timeout: float | None = None) -> T:
        """What the task returns.

        Raises:
            Late: it is not done after `timeout` seconds. The thread is left to it, and the next task gets a new one.
            BaseException: what the task raises.
        """
        if self._tasks is None:
            self._tasks = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._tasks,), name="trimtab rewards", daemon=True).start()
            self._end = weakref.finalize(self, self._tasks.put, None)
        done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._tasks.put((task, done))
        try:
            well, result = done.get(timeout=timeout)
        except queue.Empty:
            self._tasks.put(None)
            self._tasks = None
            raise Late from None
        if not well:
            raise result
        return result  # type: ignore[no-any-return]


def _work(tasks: queue.SimpleQueue[tuple[Task, queue.SimpleQueue[tuple[bool, Any]]] | None]) -> None:
    with asyncio.Runner() as runner:
        while (given := tasks.get()) is not None:
            _do(*given, runner)
            del given  # the task knows its worker, whose end it would put off


def _do(task: Task, done: queue.SimpleQueue[tuple[bool, Any]], runner: asyncio.Runner) -> None:
    try:
        done.put((True, task(runner)))
    except BaseException as error:  # raised again where the task was given
        done.put((False, error))


# ------------------------------------------------------------------------------------------------------------ a function


class FunctionReward:
    """Scores of a Python function.

    Raises:
        RewardError: on construction, a signature that cannot be served.
    """

    def __init__(
        self, function: Callable[..., Any], *, name: str, worker: Worker, timeout: float = 60.0, where: str = ""
    ) -> None:
        """
        Args:
            name: what its part is called in the logs.
            timeout: seconds for a call: of one answer, of a batch, or of all answers of an asynchronous function.
            where: the place in the user's config, for errors.
        """
        self.name, self._function, self._worker, self._timeout, self._where = name, function, worker, timeout, where
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"the parameters of the reward function {name!r} cannot be read",
                where=where,
                why=str(error),
                remedy="wrap it: def reward(completion): return ...",
            ) from None
        self.batched = any(p.name in ("prompts", "completions") for p in parameters)
        own = {*(BATCHED if self.batched else SINGLE), *BESIDE}
        self._positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._named = {p.name for p in named}
        self._required = [p.name for p in named if p.default is p.empty and p.name not in own]
        self._all_columns = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @property
    def place(self) -> str:
        """file:line of the function, or its name where it has none."""
        code = _code(self._function)
        return f"{code.co_filename}:{code.co_firstlineno}" if code else self.name

    def check(self, examples: Sequence[Example]) -> None:
        """Before anything is computed: does every row have the columns that the function asks for?

        Raises:
            RewardError: the first row that has not.
        """
        for example in examples:
            for name in self._required:
                if name not in example.columns:
                    raise RewardError(
                        f"the reward function {self.name!r} asks for {name!r}, which this row does not have",
                        where=f"{example.origin}; {self.place}",
                        why=f"its columns are {', '.join(map(str, example.columns)) or 'none'}; besides them there are "
                        + ", ".join((*(BATCHED if self.batched else SINGLE), *BESIDE)),
                        remedy=f"name one of these, give {name} a default, or add the column to the data",
                    )

    # --------------------------------------------------------------------------------------------------------- scoring

    def score(self, answers: Sequence[Answer]) -> list[float]:
        if not answers:
            return []
        self.check([answer.prompt.example for answer in answers])
        if self.batched:
            return self._score_batch(answers)
        given = [self._call(self._arguments(answer), [answer]) for answer in answers]
        if any(inspect.isawaitable(value) for value in given):
            given = self._gather(given, answers)
        return [self._number(value, answer) for value, answer in zip(given, answers, strict=True)]

    def _score_batch(self, answers: Sequence[Answer]) -> list[float]:
        given = self._call(self._columns(answers), answers)
        if inspect.isawaitable(given):
            (given,) = self._gather([given], answers)
        if hasattr(given, "tolist"):  # an array or a tensor
            given = given.tolist()
        if not isinstance(given, list | tuple):
            raise self._error(
                f"the batched reward function {self.name!r} gives {_shown(given)}",
                answers,
                why=f"it names {' or '.join(n for n in BATCHED[:2] if n in self._named)}, so it must return a list with one number "
                "per answer",
            )
        if len(given) != len(answers):
            raise self._error(
                f"the reward function {self.name!r} gives {len(given)} numbers for {len(answers)} answers",
                answers,
                why="one is needed for each, in the order of `completions`",
            )
        return [self._number(value, answer) for value, answer in zip(given, answers, strict=True)]

    def _call(self, values: dict[str, Any], answers: Sequence[Answer]) -> Any:
        first = [values.pop(name) for name in self._positional]
        try:
            return self._worker.do(lambda _: self._function(*first, **values), self._timeout)
        except Late:
            raise self._late(answers) from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a user's code may raise, sys.exit included
            raise self._raised(error, answers) from error

    def _gather(self, given: Sequence[Any], answers: Sequence[Answer]) -> list[Any]:
        """What awaitables give, all of them running at the same time, in order."""

        async def everything() -> tuple[list[Any], int | None, BaseException | None]:
            tasks = [asyncio.ensure_future(_awaited(value)) for value in given]
            await asyncio.wait(tasks, timeout=self._timeout, return_when=asyncio.FIRST_EXCEPTION)
            raised = [task.exception() if task.done() and not task.cancelled() else None for task in tasks]
            late = [i for i, task in enumerate(tasks) if not task.done() or task.cancelled()]
            for i in late:
                tasks[i].cancel()
            if late:
                await asyncio.wait(tasks, timeout=1)
            for i, error in enumerate(raised):
                if error is not None:
                    return [], i, error
            if late:
                return [], late[0], None
            return [task.result() for task in tasks], None, None

        try:
            # a coroutine that blocks the loop keeps the loop's own clock from ringing: hence a second one outside
            found, which, error = self._worker.do(lambda runner: runner.run(everything()), self._timeout + 2)
        except Late:
            raise self._late(answers) from None
        if which is None:
            return found
        about = [answers[which]] if len(given) == len(answers) else answers
        if error is None:
            raise self._late(about)
        raise self._raised(error, about) from error

    # ------------------------------------------------------------------------------------------------- in and out of it

    def _arguments(self, answer: Answer) -> dict[str, Any]:
        example = answer.prompt.example
        values = {**_own(answer), **{str(k): v for k, v in example.columns.items() if k not in SINGLE}}
        return values if self._all_columns else {name: values[name] for name in self._named if name in values}

    def _columns(self, answers: Sequence[Answer]) -> dict[str, list[Any]]:
        owns = [_own(answer) for answer in answers]
        values: dict[str, list[Any]] = {
            "prompts": [own["prompt"] for own in owns],
            "completions": [own["completion"] for own in owns],
            "messages": [own["messages"] for own in owns],
            **{name: [own[name] for own in owns] for name in BESIDE},
        }
        rows = [answer.prompt.example.columns for answer in answers]
        for name in dict.fromkeys(key for row in rows for key in row):
            if name not in BATCHED:
                values[str(name)] = [row.get(name) for row in rows]
        return values if self._all_columns else {name: values[name] for name in self._named if name in values}

    def _number(self, value: Any, answer: Answer) -> float:
        """A score as a float: any real number, numpy's and torch's among them; true is 1 and false 0."""
        plain = value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value
        if isinstance(plain, int | float) and math.isfinite(plain):
            return float(plain)
        why = "a score is a finite number"
        if value is None:
            why += "; a function without a return statement gives None"
        elif isinstance(value, list | tuple | dict) and not self.batched:
            why += " for one answer; name `completions` instead of `completion` to be given all answers of a batch"
        raise self._error(f"the reward function {self.name!r} gives {_shown(value)} for an answer", [answer], why=why)

    # ---------------------------------------------------------------------------------------------------------- errors

    def _raised(self, error: BaseException, answers: Sequence[Answer]) -> RewardError:
        place, line = self.place, ""
        frames = _frames(error.__traceback__, _file(self._function))
        if frames:
            place, line = f"{frames[-1].filename}:{frames[-1].lineno}", (frames[-1].line or "").strip()
        kind, message = type(error).__name__, str(error)
        return self._error(
            f"the reward function {self.name!r} raises {kind}" + (f": {message}" if message else ""),
            answers,
            place=place,
            why=f"at `{line}`" if line else "it was called with what it names",
        )

    def _late(self, answers: Sequence[Answer]) -> RewardError:
        return self._error(
            f"the reward function {self.name!r} is not done after {self._timeout:g} s (reward_timeout)",
            answers,
            why="a run that waits without end is worse than one that stops",
            remedy="make it faster, or raise reward_timeout; then go on with --resume",
        )

    def _error(
        self, what: str, answers: Sequence[Answer], *, place: str = "", why: str = "", remedy: str = RESUME
    ) -> RewardError:
        first = str(answers[0].prompt.example.origin)
        rows = (
            first if len(answers) == 1 else f"{first} ... {answers[-1].prompt.example.origin} ({len(answers)} answers)"
        )
        return RewardError(what, where=f"{place or self.place}, for {rows}", why=why, remedy=remedy)


def _own(answer: Answer) -> dict[str, Any]:
    example = answer.prompt.example
    gold = example.response or example.chosen
    return {
        "prompt": example.prompt[-1].content if example.prompt else "",
        "completion": answer.text,
        "messages": [{"role": m.role, "content": m.content} for m in example.prompt],
        "gold": gold.content if gold is not None else None,
        "data_folder": str(Path(example.origin.file).parent),
    }


async def _awaited(given: Any) -> Any:
    return await given if inspect.isawaitable(given) else given


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _code(function: Any) -> CodeType | None:
    """The code of a function, of a partial's function, or of an object's `__call__`."""
    function = inspect.unwrap(getattr(function, "func", function))
    for candidate in (function, inspect.getattr_static(type(function), "__call__", None)):
        code = getattr(candidate, "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None


def _file(function: Any) -> str:
    code = _code(function)
    return code.co_filename if code else ""


def _frames(trace: TracebackType | None, file: str) -> list[traceback.FrameSummary]:
    """The frames of a traceback in a user's file or, where there is none, in code that is neither ours nor Python's own."""
    frames = traceback.extract_tb(trace)
    theirs = [frame for frame in frames if frame.filename == file]
    if theirs:
        return theirs
    ours = (str(Path(__file__).parents[1]), str(Path(asyncio.__file__).parents[1]), sys.prefix)
    return [frame for frame in frames if not frame.filename.startswith((*ours, "<"))]
