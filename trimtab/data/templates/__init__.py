"""Chat templates: how messages become text. A template is one file with `build` and one row here."""

from __future__ import annotations

from dataclasses import replace

from trimtab.data.templates.template import Segment, Template
from trimtab.data.templates.tools import tool_format
from trimtab.data.tokenizer import Tokenizer
from trimtab.errors import ConfigError, TemplateError
from trimtab.registry import Registry, Row

TEMPLATES = Registry(
    "template",
    [
        Row(name="auto", target="trimtab.data.templates.jinja:build", help="the tokenizer's own chat template"),
        Row(name="qwen", target="trimtab.data.templates.qwen:build", help="Qwen 1.5 to 2.5, with their system message"),
        Row(name="chatml", target="trimtab.data.templates.chatml:build", help="as qwen, without a system message"),
        Row(name="qwen3", target="trimtab.data.templates.qwen3:build", help="Qwen 3: thoughts before answers"),
        Row(
            name="qwen3_nothink",
            target="trimtab.data.templates.qwen3:build_nothink",
            help="Qwen 3 models that do not think",
        ),
        Row(name="llama2", target="trimtab.data.templates.llama2:build", help="Llama 2"),
        Row(name="llama3", target="trimtab.data.templates.llama3:build", help="Llama 3"),
        Row(name="mistral", target="trimtab.data.templates.mistral:build", help="Mistral 7B v0.3"),
        Row(name="gemma", target="trimtab.data.templates.gemma:build", help="Gemma 1 to 3"),
        Row(name="phi4", target="trimtab.data.templates.phi4:build", help="Phi 4"),
        Row(name="yi", target="trimtab.data.templates.yi:build", help="Yi"),
        Row(name="glm4", target="trimtab.data.templates.glm4:build", help="GLM 4"),
        Row(name="deepseek", target="trimtab.data.templates.deepseek:build", help="DeepSeek LLM and V2"),
        Row(name="deepseek3", target="trimtab.data.templates.deepseek:build_v3", help="DeepSeek V2.5 and V3"),
        Row(name="default", target="trimtab.data.templates.default:build", help="Human: / Assistant:, for base models"),
        Row(name="empty", target="trimtab.data.templates.empty:build", help="contents alone, for base models"),
    ],
)


def get(
    name: str | None,
    tokenizer: Tokenizer,
    *,
    default_system: str | None = None,
    enable_thinking: bool = True,
    tools: str | None = None,
    where: str = "template",
) -> Template:
    """The template called `name` for this tokenizer; None and "auto" are the tokenizer's own.

    Args:
        default_system: the system message of dialogues that have none; None keeps the template's, "" is none at all.
        enable_thinking: for templates that think, and handed to the tokenizer's own, which may look at it.
        tools: how tools and calls are written, by name (`tool_format`); None is the template's own way.
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
    return template if tools is None else replace(template, tools=tool_format(tools))


__all__ = ["TEMPLATES", "Segment", "Template", "get"]
