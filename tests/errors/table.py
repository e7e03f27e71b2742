"""Every error that trimtab can raise, read from the code that raises it; docs/errors.md is written from here.

    python -m tests.errors.table          write docs/errors.md (also: make errors)

A *site* is a call that makes a `TrimtabError`, or a call of a function that makes one out of its own argument (`wrong(key, what, ...)`):
then each of its callers is a site and the function is none.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trimtab import errors

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.TrimtabError)
}
FIELDS = ("what", "where", "why", "remedy")


@dataclass(frozen=True)
class Site:
    """One place that raises: its lines, and what its message looks like (`{...}` for what varies)."""

    file: str
    first: int
    last: int
    kind: str
    what: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.first}: {self.kind}: {self.what}"


# ---------------------------------------------------------------------------------------------------------- from the code


@dataclass
class _Helper:
    """A function that makes an error of its own arguments."""

    name: str
    parameters: list[str]
    kind: str
    parts: dict[str, ast.expr | None]
    defaults: dict[str, ast.expr]
    lines: set[int] = field(default_factory=set)


def sites(root: Path = ROOT / "trimtab") -> list[Site]:
    """All sites of the package, in the order of its files."""
    found: list[Site] = []
    for path in sorted(root.rglob("*.py")):
        found += _sites_of(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8")))
    return found


def _sites_of(file: str, tree: ast.Module) -> list[Site]:
    helpers: dict[str, _Helper] = {}
    plain: list[tuple[ast.Call, str, dict[str, ast.expr | None], dict[str, ast.expr]]] = []
    for call, function in _calls(tree):
        kind = _name(call.func)
        if kind not in CLASSES:
            continue
        parts = _parts(call)
        parameters = _parameters(function)
        used = (
            {n.id for n in ast.walk(parts["what"]) if isinstance(n, ast.Name)} if parts["what"] is not None else set()
        )
        bare = isinstance(parts["what"], ast.Name) and parts["what"].id in parameters
        if function is not None and (bare or "what" in used & set(parameters)):
            helper = _Helper(function.name, [p for p in parameters if p != "self"], kind, parts, _defaults(function))
            helpers[function.name] = helper
        else:
            plain.append((call, kind, parts, _locals(function)))
    found = [_site(file, call, kind, parts, given) for call, kind, parts, given in plain]
    for call, function in _calls(tree):
        helper = helpers.get(_name(call.func))
        if helper is not None and (function is None or function.name != helper.name):
            given = {**helper.defaults, **dict(zip(helper.parameters, call.args, strict=False))}
            given |= {k.arg: k.value for k in call.keywords if k.arg is not None}
            found.append(_site(file, call, helper.kind, helper.parts, given))
    return sorted(found, key=lambda site: site.first)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _calls(tree: ast.AST, function: Function | None = None) -> Iterator[tuple[ast.Call, Function | None]]:
    """Every call with the function it stands in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield node, function
        yield from _calls(node, node if isinstance(node, Function) else function)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _parts(call: ast.Call) -> dict[str, ast.expr | None]:
    given = {k.arg: k.value for k in call.keywords}
    return {"what": call.args[0] if call.args else given.get("what"), **{name: given.get(name) for name in FIELDS[1:]}}


def _parameters(function: Function | None) -> list[str]:
    if function is None:
        return []
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


def _defaults(function: Function) -> dict[str, ast.expr]:
    args = function.args
    named = [*args.posonlyargs, *args.args]
    found = dict(zip([a.arg for a in named[len(named) - len(args.defaults) :]], args.defaults, strict=True))
    return found | {a.arg: d for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d is not None}


def _locals(function: Function | None) -> dict[str, ast.expr]:
    """Texts that the function gives a name, once, before it raises them."""
    if function is None:
        return {}
    found: dict[str, list[ast.expr]] = defaultdict(list)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id].append(node.value)
    return {
        name: values[0]
        for name, values in found.items()
        if len(values) == 1
        and isinstance(values[0], ast.Constant | ast.JoinedStr)
        and not (isinstance(values[0], ast.Constant) and not isinstance(values[0].value, str))
    }


def _site(file: str, call: ast.Call, kind: str, parts: dict[str, ast.expr | None], given: dict[str, ast.expr]) -> Site:
    texts = {name: "" if part is None else _text(part, given) for name, part in parts.items()}
    return Site(file, call.lineno, call.end_lineno or call.lineno, kind, texts["what"], texts["why"], texts["remedy"])


def _text(node: ast.expr, given: dict[str, ast.expr]) -> str:
    """What the expression looks like as text, `{...}` where it varies."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.Constant(value=None):
            return ""
        case ast.JoinedStr(values=values):
            return "".join(_text(v, given) for v in values)
        case ast.FormattedValue(value=value):
            inner = _text(value, given) if isinstance(value, ast.Name) and value.id in given else ""
            return inner or "{" + _placeholder(value) + "}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, given) + _text(right, given)
        case ast.BoolOp(op=ast.Or(), values=values):
            return " / ".join(filter(None, (_text(v, given) for v in values)))
        case ast.IfExp(body=body, orelse=orelse):
            one, other = _text(body, given), _text(orelse, given)
            return f"[{one or other}]" if not one or not other else f"{one} / {other}"
        case ast.Name(id=name) if name in given:
            rest = {k: v for k, v in given.items() if k != name}
            return _text(given[name], rest)
    return "{" + _placeholder(node) + "}"


def _placeholder(node: ast.expr) -> str:
    """A word or two for what stands there: the last name of the expression."""
    names = [
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute | ast.Name)
    ]
    plain = [n.strip("_").lower() for n in names if n not in ("str", "len", "join", "map", "repr", "self")]
    return plain[0] if plain else "..."


# --------------------------------------------------------------------------------------------------------------- the page

HEAD = """# What can go wrong

Every message that trimtab stops with, read from the code that raises it: `make errors` writes this page, and a test compares it.
`{...}` stands for what varies, `[...]` for what may be missing.

On the command line each ends with exit code 2, without a traceback (`--debug` shows it), and nothing that was there before is
overwritten. In Python it is an exception of `trimtab.errors`; its class is the first column.
"""

AREAS = {
    "config": "Config files and command lines",
    "data": "Data",
    "models": "Models and adapters",
    "engine": "Sampling",
    "rewards": "Rewards",
    "evals": "Evaluation",
    "algos": "Algorithms",
    "train": "Training",
    "serve": "Chat, predictions, export",
    "report": "Reports",
    "sql": "SQL",
}


def page() -> str:
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites():
        parts = site.file.split("/")
        name = AREAS.get(parts[1], "Runs and the machine" if len(parts) == 2 else parts[1])
        groups[name].append(site)
    out = [HEAD]
    for name in [*AREAS.values(), *sorted(groups.keys() - set(AREAS.values()))]:
        if not groups[name]:
            continue
        out.append(f"## {name}\n")
        out.append("| error | what | why | what to do |\n|---|---|---|---|")
        rows = dict.fromkeys(
            f"| `{s.kind}` | {_cell(s.what)} | {_cell(s.why)} | {_cell(s.remedy)} |" for s in groups[name]
        )
        out += [*rows, ""]
    return "\n".join(out).rstrip() + "\n"


def _cell(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    print(f"{len(sites())} places that raise: {PAGE.relative_to(ROOT)}")
