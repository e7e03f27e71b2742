"""Plant one small fault at a time in the formulas and see that a test notices.

    python -m tests.mutants.mutate                    all of trimtab/ops against tests/ops (also: make mutants)
    python -m tests.mutants.mutate --package algos    all of trimtab/algos against tests/algos
    python -m tests.mutants.mutate --only kl          one file of it

A fault is what a hurried hand writes: another operator, comparison or constant, a sign lost, a mask not applied (a call replaced by
what it is given), a keyword left out, two arguments or two branches swapped, an index one off, a statement gone. Each runs in a
process of its own, forked from one that has imported torch, on a copy of the tree; the tests that import it first, and no further than the
first test that fails. Times out = caught.

What survives must stand in survivors.toml with the reason why no test could tell it from the original. The command fails when one
does not, when one listed is caught or gone, or when fewer than 95 % are caught. Forking needs Linux or macOS.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTED = Path(__file__).with_name("survivors.toml")
ENOUGH = 0.95

SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}

# Keywords that do nothing where the tests run: lengths agree, and there is one device.
IDLE = {"strict", "device"}

# Sizes that decide about speed alone: results do not depend on them, and tests set their own.
SIZES = {"BLOCK", "TILE"}

# The order of their arguments is nothing.
ORDERLESS = {"min", "max", "minimum", "maximum", "logaddexp", "vecdot"}


@dataclass(frozen=True)
class Mutant:
    """A fault: its name, which does not change when lines move, and the text of the whole file with it."""

    file: str
    name: str
    line: int
    text: str


def mutants(path: Path) -> list[Mutant]:
    """Every fault of a file."""
    file = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found, names = [], Counter[str]()
    original = ast.unparse(tree)
    for parent, key, index, function in _places(tree):
        node = getattr(parent, key) if index is None else getattr(parent, key)[index]
        for other in _faults(node, parent, key):
            _put(parent, key, index, other)
            text = ast.unparse(ast.fix_missing_locations(tree))
            _put(parent, key, index, node)
            if text == original:
                continue
            name = f"{function}: {_short(node)} => {_short(other)}"
            names[name] += 1
            if names[name] > 1:
                name += f" #{names[name]}"
            found.append(Mutant(file, name, getattr(node, "lineno", 0), text))
    return found


def _put(parent: ast.AST, key: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, key, node)
    else:
        getattr(parent, key)[index] = node


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 100 else text[:97] + "..."


def _places(node: ast.AST, function: str = "module") -> Iterator[tuple[ast.AST, str, int | None, str]]:
    """Where something stands: parent, field, index in it, and the function around it. Not in annotations, decorators, texts."""
    for key, value in ast.iter_fields(node):
        if key in ("annotation", "returns", "decorator_list", "type_comment", "type_params", "bases"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Import | ast.ImportFrom):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):  # a docstring
                continue
            if _is_idle(child):
                continue
            inside = child.name if isinstance(child, ast.FunctionDef | ast.ClassDef) else function
            yield node, key, index, inside
            yield from _places(child, inside)


def _is_idle(node: ast.AST) -> bool:
    """A keyword of `IDLE`, a size, or `Reduction = Literal[...]`, which says types and does nothing."""
    match node:
        case ast.keyword(arg=arg):
            return arg in IDLE
        case ast.Assign(value=ast.Subscript(value=ast.Name(id="Literal"))):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name in SIZES
    return False


def _faults(node: ast.AST, parent: ast.AST, key: str) -> Iterator[ast.AST]:
    """What a hurried hand could have written in its place."""
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op):
            for swap in SWAPS.get(type(op), ()):
                yield _with(node, op=swap())
        case ast.BoolOp(op=op):
            for swap in SWAPS[type(op)]:
                yield _with(node, op=swap())
        case ast.Compare(ops=[op]):
            for swap in SWAPS.get(type(op), ()):
                yield _with(node, ops=[swap()])
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)) if isinstance(parent, ast.Call | ast.keyword):
            pass  # the last axis of an array of two, or the one after the last of a row: axis 1 is the same
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)) | ast.Constant(value=float(value)):
            yield ast.Constant(value + 1)
            if value:
                yield ast.Constant(type(value)(0))
        case ast.IfExp(body=body, orelse=orelse):
            yield _with(node, body=orelse, orelse=body)
        case ast.If(test=test):
            yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Call(func=ast.Name(id="cast")):
            pass  # says a type, does nothing
        case ast.Call(func=func, args=args, keywords=keywords):
            if isinstance(func, ast.Attribute) and not _is_module(func.value):
                yield func.value  # x.f(...) -> x
            elif args and not isinstance(args[0], ast.Starred):
                yield args[0]  # f(x, ...) -> x
            for i, word in enumerate(keywords):
                if word.arg is not None and word.arg not in IDLE:
                    yield _with(node, keywords=[*keywords[:i], *keywords[i + 1 :]])
            if (
                len(args) >= 2
                and _name(func) not in ORDERLESS
                and not any(isinstance(a, ast.Starred) for a in args[:2])
            ):
                yield _with(node, args=[args[1], args[0], *args[2:]])
    if isinstance(parent, ast.Subscript) and key == "slice" and isinstance(node, ast.Name):
        yield ast.BinOp(node, ast.Add(), ast.Constant(1))
    if isinstance(parent, ast.Slice) and not isinstance(node, ast.Constant):
        yield ast.BinOp(node, ast.Add(), ast.Constant(1))


def _is_module(node: ast.expr) -> bool:
    """torch.f(x), torch.linalg.f(x) and math.f(x) are functions, not methods."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in ("torch", "math", "F", "nn", "np", "ctx")


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for key, value in fields.items():
        setattr(other, key, value)
    return other


# -------------------------------------------------------------------------------------------------------------- run them


def copy_tree(folder: Path) -> Path:
    skip = shutil.ignore_patterns("__pycache__", ".*", "*.png")
    for name in ("trimtab", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def survivors(todo: list[Mutant], trees: list[Path], package: str, seconds: float) -> Iterator[tuple[Mutant, bool]]:
    """Each fault with whether all tests pass with it; one at a time in each tree. One that takes longer than `seconds` is killed."""
    waiting, free = list(reversed(todo)), list(trees)
    running: dict[int, tuple[Mutant, Path, str, float]] = {}
    while waiting or running:
        while waiting and free:
            mutant, tree = waiting.pop(), free.pop()
            target = tree / mutant.file
            before = target.read_text(encoding="utf-8")
            target.write_text(mutant.text, encoding="utf-8")
            running[start_tests(tree, package, target.stem, planted=True)] = (
                mutant,
                tree,
                before,
                time.monotonic() + seconds,
            )
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            mutant, tree, before, _ = running.pop(child)
            target, when = tree / mutant.file, (ROOT / mutant.file).stat().st_mtime
            target.write_text(before, encoding="utf-8")
            os.utime(target, (when, when))  # what the first run compiled of it is good again
            free.append(tree)
            yield mutant, os.waitstatus_to_exitcode(status) == 0
            continue
        for late in [pid for pid, (*_, end) in running.items() if time.monotonic() > end]:
            os.kill(late, signal.SIGKILL)
        time.sleep(0.02)


def start_tests(tree: Path, package: str, stem: str, *, planted: bool) -> int:
    """A forked process that runs the package's tests, those of `stem` first; its pid."""
    child = os.fork()
    if child != 0:
        return child
    code = 1
    try:
        log = os.open(tree / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = (
            planted  # what is compiled without a fault may be kept, and a file with one is newer than that
        )
        import pytest

        tests = sorted((tree / "tests" / package).glob("test_*.py"))
        own = [path for path in tests if f"{package}.{stem} " in path.read_text("utf-8") or path.stem == f"test_{stem}"]
        code = 0
        for group in (own, [path for path in tests if path not in own]):
            if group and code == 0:
                code = int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *map(str, group)]))
    finally:
        os._exit(code)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plant faults in the formulas; see that tests notice.")
    parser.add_argument("--package", default="ops", help="folder of trimtab and of tests")
    parser.add_argument("--only", action="append", help="stem of a file (several times)")
    parser.add_argument("--name", help="only faults whose name holds this text")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    listed = {(e["file"], e["fault"]): e["why"] for e in tomllib.loads(LISTED.read_text("utf-8")).get("survivor", [])}

    files = sorted((ROOT / "trimtab" / given.package).glob("*.py"))
    files = [f for f in files if given.only is None or f.stem in given.only]
    todo = [m for f in files for m in mutants(f) if given.name is None or given.name in m.name]
    # imported once, for all that are forked
    import beartype  # noqa: F401
    import hypothesis  # noqa: F401
    import jaxtyping  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    torch.testing.assert_close(torch.ones(1), torch.ones(1))  # its first call imports for seconds
    left: list[Mutant] = []
    with tempfile.TemporaryDirectory(prefix="trimtab-mutants-") as scratch:
        trees = [copy_tree(Path(scratch) / str(i)) for i in range(given.workers)]
        started = time.monotonic()
        _, status = os.waitpid(start_tests(trees[0], given.package, "", planted=False), 0)
        whole = time.monotonic() - started
        for tree in trees[1:]:
            shutil.rmtree(tree)
            shutil.copytree(trees[0], tree)
        if status != 0:
            print((trees[0] / "log.txt").read_text(encoding="utf-8"), "\nthe tests fail without any fault")
            return 1
        print(f"{len(todo)} faults in {len(files)} files; all tests of {given.package} take {whole:.0f} s", flush=True)
        for done, (mutant, lives) in enumerate(survivors(todo, trees, given.package, 30 + 3 * whole), 1):
            if lives:
                left.append(mutant)
                known = "listed" if (mutant.file, mutant.name) in listed else "NOT LISTED"
                print(f"  survives ({known}): {mutant.file}:{mutant.line}: {mutant.name}", flush=True)
            if done % 100 == 0:
                print(f"  {done} of {len(todo)}, {time.monotonic() - started:.0f} s", flush=True)
    keys = {(m.file, m.name) for m in left}
    asked = {(m.file, m.name) for m in todo}
    every = {
        (m.file, m.name) for f in (ROOT / "trimtab").rglob("*.py") if f.parent.name == given.package for m in mutants(f)
    }
    here = {key for key in listed if key[0].startswith(f"trimtab/{given.package}/")}
    stale = sorted((here - every) | ((here & asked) - keys))
    for file, name in stale:
        print(f"  listed, but caught or gone: {file}: {name}")
    rate = 1 - len(left) / max(1, len(todo))
    print(
        f"{len(todo) - len(left)} of {len(todo)} caught ({rate:.1%}), {len(keys - listed.keys())} survivors not listed, "
        f"{time.monotonic() - started:.0f} s"
    )
    return int(bool(keys - listed.keys()) or bool(stale) or rate < ENOUGH)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
