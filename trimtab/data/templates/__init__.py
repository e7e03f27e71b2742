"""Chat templates: how messages become text. A template is one file with `build` and one row here."""

from __future__ import annotations

from trimtab.data.templates.template import Segment, Template
from trimtab.data.tokenizer import Tokenizer
from trimtab.errors import ConfigError, TemplateError
from trimtab.registry import Registry, Row

TEMPLATES = Registry(
    "template",
    [
        Row(name="auto", target="trimtab.data.templates.jinja:build", help="the tokenizer's own chat template"),
        Row(name="qwen", target="trimtab.data.templates.qwen:build", help="Qwen 1.5 to 2.5, with their system message"),
        Row(name="chatml", target="trimtab.data.templates.chatml:build", help="as qwen, without a system message"),
        Row(name="llama3", target="trimtab.data.templates.llama3:build", help="Llama 3"),
        Row(name="default", target="trimtab.data.templates.default:build", help="Human: / Assistant:, for base models"),
    ],
)


def get(
    name: str | None,
    tokenizer: Tokenizer,
    *,
    default_system: str | None = None,
    enable_thinking: bool = True,
    where: str = "template",
) -> Template:
    """The template called `name` for this tokenizer; None and "auto" are the tokenizer's own.

    Args:
        default_system: the system message of dialogues that have none; None keeps the template's, "" is none at all.
        enable_thinking: handed to the tokenizer's own template, which may look at it.
        where: what to point at in errors.

    Raises:
        TemplateError: no such template, or its special tokens are not tokens of this tokenizer.
    """
    try:
        build = TEMPLATES.load(name or "auto", where=where)
    except ConfigError as error:
        raise TemplateError(
            error.what,
            where=where,
            why="only templates whose exact strings are known can be named",
            remedy=f"{error.remedy}; `template: auto` uses the model's own",
        ) from None
    template: Template = build(tokenizer, default_system=default_system, enable_thinking=enable_thinking)
    return template


__all__ = ["TEMPLATES", "Segment", "Template", "get"]
