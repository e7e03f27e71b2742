"""Where reward functions come from: a file of the user's, an importable module, a ready-made one, or an object given by a program.

    reward_funcs: path/to/rewards.py:right              a file; its folder is searched for what it imports
    reward_funcs: package.module:right                  anything that Python can import
    reward_funcs: sql_execution                         a ready-made one (`REWARD_FUNCTIONS`)

A relative path starts at the working directory. A file is run once, however many of its functions are named.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import RewardError
from trimtab.registry import Registry, Row, nearest
from trimtab.rewards.function import FunctionReward, Worker

REWARD_FUNCTIONS = Registry(
    "reward function",
    [
        Row(
            name="sql_execution",
            target="trimtab.rewards.sql:sql_execution",
            help="1 if the answer's SQL gives the rows of the row's own on its `database`, else 0",
        ),
        Row(
            name="sql_graded",
            target="trimtab.rewards.sql:sql_graded",
            help="the same, with part of it for SQL that reads, runs, or has the right columns",
        ),
        Row(
            name="sql_match",
            target="trimtab.rewards.sql:sql_match",
            help="1 if the answer's SQL is the row's own up to spelling; needs no database",
        ),
    ],
)
"""Ready-made reward functions. One is a file and a row here."""

TAKEN = ("model", "api", "length")
"""Names of the parts that other sources have in the logs."""


def load_functions(
    entries: Sequence[Any], *, timeout: float, where: str = "reward_funcs"
) -> tuple[FunctionReward, ...]:
    """The reward functions that a file or program names, in order, with names that differ.

    Args:
        entries: names as above, or callables.
        timeout: seconds that a call may take.
        where: the place in the user's config.

    Raises:
        RewardError: a file or function that does not exist, cannot be loaded, or is not a function.
    """
    if not entries:
        return ()
    worker = Worker()
    names: list[str] = []
    functions = []
    for entry in entries:
        function = entry if callable(entry) else worker.do(lambda _, text=str(entry): _find(text, where))  # type: ignore[misc]
        names.append(_free(_name(function, entry), _stem(entry), names))
        functions.append(FunctionReward(function, name=names[-1], worker=worker, timeout=timeout, where=where))
    return tuple(functions)


def function_files(entries: Sequence[Any]) -> dict[str, str]:
    """SHA-256 of each file that `entries` name, by the file's name as written: for the record of a run."""
    files = dict.fromkeys(
        _split(entry)[0] for entry in entries if isinstance(entry, str) and _is_file(_split(entry)[0])
    )
    return {file: hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest() for file in files}


def _split(entry: str) -> tuple[str, str]:
    """`C:\\rewards.py:right` has two colons, so the last one parts; a path alone has none that does."""
    home, colon, name = entry.rpartition(":")
    if not colon or "/" in name or "\\" in name or name.endswith(".py"):
        return entry, ""
    return home, name


def _is_file(home: str) -> bool:
    return home.endswith(".py") or "/" in home or "\\" in home


def _find(entry: str, where: str) -> Callable[..., Any]:
    home, name = _split(entry)
    if not name and not _is_file(home):
        if home in REWARD_FUNCTIONS:
            return REWARD_FUNCTIONS.load(home)  # type: ignore[no-any-return]
        guess = nearest(home, REWARD_FUNCTIONS.names())
        raise RewardError(
            f"there is no ready-made reward function {entry!r}" + (f"; did you mean {guess!r}?" if guess else ""),
            where=where,
            why=f"the ready-made ones are {', '.join(REWARD_FUNCTIONS.names())}",
            remedy="one of your own is path/to/file.py:NAME, or module:NAME",
        )
    module = _run_file(Path(home).expanduser(), where) if _is_file(home) else _import(home, where)
    known = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
    shown = f"its functions are {', '.join(known)}" if known else "it defines no function"
    place = str(getattr(module, "__file__", home))
    if not name:
        raise RewardError(
            f"reward_funcs: {entry!r} names a file, and no function in it",
            where=where,
            why=shown,
            remedy=f"write {home}:{known[0] if known else 'NAME'}",
        )
    found = getattr(module, name, None)
    if found is None:
        guess = nearest(name, known)
        raise RewardError(
            f"there is no function {name!r} in {place}" + (f"; did you mean {guess!r}?" if guess else ""),
            where=where,
            why=shown,
            remedy="correct the name, or write the function",
        )
    if not callable(found):
        raise RewardError(
            f"{name!r} in {place} is not a function",
            where=where,
            why=f"it is {found!r:.60} ({type(found).__name__})",
            remedy=f"def {name}(prompt, completion, **columns): return a number",
        )
    return found  # type: ignore[no-any-return]


def _run_file(path: Path, where: str) -> Any:
    if not path.is_file():
        raise RewardError(
            f"there is no file {str(path)!r} with reward functions",
            where=f"{where}: {path.absolute()}",
            why="it is a folder"
            if path.is_dir()
            else "nothing exists at that path; relative paths start at the working directory",
            remedy="correct the path in reward_funcs",
        )
    path = path.resolve()
    name = f"trimtab_rewards_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    known = sys.modules.get(name)
    text = path.read_bytes()
    if known is not None and known.__dict__.get("__trimtab_text__") == text:
        return known
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: nothing of the user's hides a module of Python's
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # what it defines may be pickled, and dataclasses look themselves up
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        raise _broken(str(path), error, where) from error
    module.__dict__["__trimtab_text__"] = text
    return module


def _import(home: str, where: str) -> Any:
    try:
        return importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name is not None and (home == error.name or home.startswith(error.name + ".")):
            raise RewardError(
                f"there is no module {home!r} with reward functions",
                where=where,
                why=f"{error}; Python looked in the installed packages and in the folders of PYTHONPATH",
                remedy="for a file write its path: path/to/file.py:NAME",
            ) from None
        raise _broken(home, error, where) from error
    except BaseException as error:
        raise _broken(home, error, where) from error


def _broken(home: str, error: BaseException, where: str) -> RewardError:
    """A file that fails while it is loaded, with the line of it that failed."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    place, line = home, ""
    if isinstance(error, SyntaxError) and error.filename:
        place, line = f"{error.filename}:{error.lineno}", (error.text or "").strip()
    else:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if f.filename == home] or [
            f for f in frames if not f.filename.startswith(("<", __file__, str(Path(importlib.__file__).parent)))
        ]
        if theirs:
            place, line = f"{theirs[-1].filename}:{theirs[-1].lineno}", (theirs[-1].line or "").strip()
    kind = type(error).__name__
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return RewardError(
        f"the reward functions in {home} cannot be loaded: {kind}" + (f": {message}" if message else ""),
        where=f"{place}; {where}",
        why=f"at `{line}`" if line else "it failed while it was imported",
        remedy="mend the file; `python FILE` shows the whole traceback",
    )


def _name(function: Any, entry: Any) -> str:
    if isinstance(entry, str):
        return _split(entry)[1] or entry
    function = getattr(function, "func", function)  # of a partial
    return str(getattr(function, "__name__", None) or type(function).__name__)


def _stem(entry: Any) -> str:
    home = _split(entry)[0] if isinstance(entry, str) else str(getattr(entry, "__module__", None) or "function")
    return home.replace("\\", "/").rpartition("/")[2].removesuffix(".py")


def _free(name: str, home: str, taken: Sequence[str]) -> str:
    """A name that no other part has: `right`, then `rewards.right`, then `rewards.right 2` ..."""
    used = (*TAKEN, *taken)
    candidates = [name, f"{home}.{name}", *(f"{home}.{name} {n}" for n in range(2, len(used) + 3))]
    return next(c for c in candidates if c not in used)
