"""How tools are told to a model, and how its calls are written: one row for each family's way (`tool_format`).

    name     tools                                            a call
    default  a list in words, in the system message           Action: NAME / Action Input: {...}
    qwen     JSON lines between <tools> tags                  <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    llama3   indented JSON                                    {"name": ..., "parameters": {...}}
    glm4     JSON under Chinese headings                      NAME, a newline, {...}
    mistral  [AVAILABLE_TOOLS] [...][/AVAILABLE_TOOLS]        [{"name": ..., "arguments": {...}}]

Rows hold tools as a JSON list of functions, bare or as `{"type": "function", "function": ...}`, and a `function` turn as the
JSON of one call or a list of calls, each with `name` and `arguments`, perhaps after a thought.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.templates import thoughts
from trimtab.errors import DataError
from trimtab.registry import nearest

Tool = Mapping[str, Any]


class UnusableTools(DataError):
    """Tools or calls of a row that cannot be read; the row is dropped and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One family's way.

    Attributes:
        tools: the functions, unwrapped, as text.
        calls: calls as text.
        joint: what stands between a system message and the tools.
    """

    name: str
    tools: Callable[[Sequence[Tool]], str]
    calls: Callable[[Sequence[Call]], str]
    joint: str = ""

    def written_tools(self, system: str, tools: Sequence[Tool]) -> str:
        """The system message that tells of the tools."""
        return system + (self.joint if system else "") + self.tools([_bare(tool) for tool in tools])

    def written_calls(self, text: str) -> str:
        """A function turn as the model is to write it.

        Raises:
            UnusableTools: it is not JSON of calls.
        """
        thought, content = "", text
        if thoughts.CLOSE in text:
            content = thoughts.without(text)
            thought = text[: len(text) - len(content)]
        return thought + self.calls(read_calls(content))


def read_tools(text: str | None) -> list[Tool] | None:
    """The tools column of a row; None where there is nothing in it.

    Raises:
        UnusableTools: it is not a JSON list of functions with names.
    """
    if not text or not text.strip():
        return None
    try:
        listed = json.loads(text)
    except json.JSONDecodeError as error:
        raise UnusableTools(
            "tools is not JSON", why=f"{error.msg} at {text[max(0, error.pos - 10) : error.pos + 20]!r}"
        ) from None
    listed = [listed] if isinstance(listed, dict) else listed
    if not isinstance(listed, list) or not all(
        isinstance(t, dict) and isinstance(_bare(t).get("name"), str) for t in listed
    ):
        raise UnusableTools("tools is not a list of functions with names", why=text[:60])
    return listed or None


def read_calls(text: str) -> list[Call]:
    """The calls of a function turn.

    Raises:
        UnusableTools: it is not JSON of one call or a list of calls.
    """
    try:
        listed = json.loads(text)
    except json.JSONDecodeError:
        raise UnusableTools("a function call is not JSON", why=text[:60]) from None
    listed = listed if isinstance(listed, list) else [listed]
    calls = []
    for item in listed:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or "arguments" not in item:
            raise UnusableTools("a function call without name and arguments", why=str(item)[:60])
        arguments = item["arguments"]
        if isinstance(arguments, str):  # OpenAI writes the arguments as a JSON text inside the JSON
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                raise UnusableTools("the arguments of a function call are not JSON", why=arguments[:60]) from None
        calls.append(Call(name=item["name"], arguments=arguments))
    if not calls:
        raise UnusableTools("a function turn without a call")
    return calls


def tool_format(name: str) -> ToolFormat:
    """The format called `name`.

    Raises:
        DataError: there is none of that name.
    """
    found = FORMATS.get(name)
    if found is None:
        guess = nearest(name, FORMATS)
        raise DataError(
            f"unknown tool_format {name!r}" + (f"; did you mean {guess!r}?" if guess else ""),
            where="tool_format",
            why="only formats whose exact strings are known can be named",
            remedy=f"choose one of {', '.join(FORMATS)}, or leave it out: each template has its own",
        )
    return found


def _bare(tool: Tool) -> Tool:
    return tool.get("function", {}) if tool.get("type") == "function" else tool


def _wrapped(tool: Tool) -> Tool:
    return {"type": "function", "function": tool}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------------- formats


def _default_tools(tools: Sequence[Tool]) -> str:
    described = []
    for tool in tools:
        parameters = tool.get("parameters") or {}
        required = parameters.get("required") or ()
        lines = [f"- {tool['name']}: {tool.get('description', '')}".rstrip()]
        for name, parameter in (parameters.get("properties") or {}).items():
            kind = str(parameter.get("type", "any")) + (", required" if name in required else "")
            text = f"    {name} ({kind}): {parameter.get('description', '')}".rstrip()
            if parameter.get("enum"):
                text += f" One of {_json(parameter['enum'])}."
            lines.append(text)
        described.append("\n".join(lines))
    names = ", ".join(str(tool["name"]) for tool in tools)
    return (
        "These tools can be used:\n" + "\n".join(described) + "\nTo use one, answer with two lines and nothing else:\n"
        f"Action: its name (one of {names})\nAction Input: its arguments as a JSON object\n"
    )


def _default_calls(calls: Sequence[Call]) -> str:
    return "\n".join(f"Action: {call.name}\nAction Input: {_json(call.arguments)}" for call in calls)


def _qwen_tools(tools: Sequence[Tool]) -> str:
    listed = "".join("\n" + _json(_wrapped(tool)) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
        'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _qwen_calls(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n{_json({'name': call.name, 'arguments': call.arguments})}\n</tool_call>" for call in calls
    )


def _llama3_tools(tools: Sequence[Tool]) -> str:
    # Their template writes today's date. A row that changes overnight could not be resumed: this is its default date.
    listed = "".join(json.dumps(_wrapped(tool), indent=4, ensure_ascii=False) + "\n\n" for tool in tools)
    return (
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nYou have access to the following functions. "
        "To call a function, please respond with JSON for a function call. Respond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}. Do not use variables.\n\n'
        + listed
    )


def _llama3_calls(calls: Sequence[Call]) -> str:
    written = [{"name": call.name, "parameters": call.arguments} for call in calls]
    return _json(written[0] if len(written) == 1 else written)


def _glm4_tools(tools: Sequence[Tool]) -> str:
    listed = "".join(
        f"\n\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}"
        "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
        for tool in tools
    )
    return (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具" + listed
    )


def _glm4_calls(calls: Sequence[Call]) -> str:
    if len(calls) > 1:
        raise UnusableTools("several function calls in one turn", why="glm4 writes one call in a turn")
    return f"{calls[0].name}\n{_json(calls[0].arguments)}"


def _mistral_tools(tools: Sequence[Tool]) -> str:
    return f"[AVAILABLE_TOOLS] {_json([_wrapped(tool) for tool in tools])}[/AVAILABLE_TOOLS]"


def _mistral_calls(calls: Sequence[Call]) -> str:
    return _json([{"name": call.name, "arguments": call.arguments} for call in calls])


FORMATS: dict[str, ToolFormat] = {
    row.name: row
    for row in (
        ToolFormat(name="default", tools=_default_tools, calls=_default_calls, joint="\n\n"),
        ToolFormat(name="qwen", tools=_qwen_tools, calls=_qwen_calls, joint="\n\n"),
        ToolFormat(name="llama3", tools=_llama3_tools, calls=_llama3_calls),
        ToolFormat(name="glm4", tools=_glm4_tools, calls=_glm4_calls),
        ToolFormat(name="mistral", tools=_mistral_tools, calls=_mistral_calls),
    )
}
DEFAULT_TOOLS = FORMATS["default"]
