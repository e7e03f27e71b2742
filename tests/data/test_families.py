"""The templates of model families: against Jinja renderings of the same format, and the places where formats differ."""

from __future__ import annotations

import json

import pytest

from trimtab.data import encode, templates
from trimtab.data.dropped import Dropped
from trimtab.errors import DataError
from trimtab.types import Example, Message, Origin

pytestmark = pytest.mark.template

# What the models' own templates say, written anew and shortened to text dialogues.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}{% set c = m.content %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or r) %}<think>\n{{ r.strip('\n') }}\n</think>\n\n{{ c.lstrip('\n') }}"
    "{% else %}{{ c }}{% endif %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NOTHINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set lead = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ lead if loop.first else '' }}{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DEEPSEEK3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# name: (tokens, eos, bos, jinja, has a system turn there, end of text after the last answer)
FAMILIES = {
    "qwen3": ("chatml", "<|im_end|>", None, QWEN3, True, ""),
    "qwen3_nothink": ("chatml", "<|im_end|>", None, NOTHINK, True, ""),
    "yi": ("chatml", "<|endoftext|>", None, NOTHINK, True, ""),
    "gemma": ("gemma", "<eos>", "<bos>", GEMMA, True, ""),
    "phi4": ("phi4", "<|endoftext|>", None, PHI4, True, ""),
    "glm4": ("glm4", "<|endoftext|>", None, GLM4, True, "<|endoftext|>"),
    "deepseek3": ("deepseek", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", DEEPSEEK3, True, ""),
    "mistral": ("llama2", "</s>", "<s>", MISTRAL, False, ""),
}
SYSTEM = Message(role="system", content="要简短。Be brief.")


def ask(text):
    return Message(role="user", content=text)


def say(text):
    return Message(role="assistant", content=text)


TALK = [ask("How many? 有几个？"), say("Three."), ask("Which?")]


def jinja_text(tokenizer, messages, **given):
    listed = [{"role": m.role, "content": m.content} for m in messages]
    return tokenizer.apply_chat_template(listed, tokenize=False, **given)


@pytest.fixture(scope="module")
def family(make, special):
    def build(name):
        tokens, eos, bos, jinja, *_ = FAMILIES[name]
        return make(special[tokens], eos, jinja, bos=bos)

    return build


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("system", [False, True])
def test_prompts_and_rows_are_those_of_the_model(family, name, system):
    tokenizer = family(name)
    *_, has_system, end = FAMILIES[name]
    template = templates.get(name, tokenizer)
    messages = [*([SYSTEM] if system and has_system else []), *TALK]
    assert template.text(messages, add_generation_prompt=True) == jinja_text(
        tokenizer, messages, add_generation_prompt=True
    )
    whole = [*messages, say("All. 全部")]
    assert template.text(whole, add_generation_prompt=False) == jinja_text(tokenizer, whole) + end
    joined = [t for piece in template.encode(tokenizer, whole) for t in piece.token_ids]
    assert tokenizer.decode(joined) == template.text(whole, add_generation_prompt=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_the_prompt_and_the_answer(family, name):
    """What the engine is given and what a data row holds are the same ids, and every answer of the row is learnt."""
    tokenizer = family(name)
    template = templates.get(name, tokenizer)
    example = Example(origin=Origin(file="f", row=1), prompt=(SYSTEM, *TALK), response=say("All."))
    row = encode.encode_sft(example, template, tokenizer, cutoff_len=999)
    prompt = template.encode_prompt(tokenizer, example.prompt)
    assert list(row.token_ids[: len(prompt)]) == prompt
    assert tokenizer.decode(row.token_ids) == template.text([SYSTEM, *TALK, say("All.")], add_generation_prompt=False)
    learnt = tokenizer.decode([row.token_ids[i] for i in row.scored])
    end = template.end_marker + template.after_end
    first = "" if template.efficient_eos else end
    thought = "<think>\n\n</think>\n\n" if template.thinks else ""
    assert learnt == f"{template.lead}Three.{first}{template.lead}{thought}All.{end}"
    assert template.end_of_turn_id == tokenizer.convert_tokens_to_ids(template.end_marker)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("qwen3", ["<|im_end|>"]),
        ("yi", ["<|im_end|>", "<|endoftext|>"]),
        ("gemma", ["<end_of_turn>"]),
        ("phi4", ["<|im_end|>"]),
        ("glm4", ["<|endoftext|>", "<|user|>", "<|observation|>"]),
        ("deepseek3", ["<｜end▁of▁sentence｜>"]),
        ("mistral", ["</s>"]),
    ],
)
def test_stops(family, name, stops):
    tokenizer = family(name)
    assert templates.get(name, tokenizer).stop_ids == tuple(tokenizer.convert_tokens_to_ids(stop) for stop in stops)


def test_templates_in_words(make, special):
    """llama2, mistral with a system message, deepseek and empty, whose strings differ from the models' own Jinja."""
    llama = make(special["llama2"], "</s>", None, bos="<s>")
    deep = make(special["deepseek"], "<｜end▁of▁sentence｜>", None, bos="<｜begin▁of▁sentence｜>")
    expected = {
        "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST]b</s><s>[INST] c [/INST]d</s>",
        "mistral": "<s>[INST] S\n\na[/INST] b</s>[INST] c[/INST] d</s>",
        "empty": "Sabcd</s>",
    }
    messages = [Message(role="system", content="S"), ask("a"), say("b"), ask("c"), say("d")]
    for name, text in expected.items():
        assert templates.get(name, llama).text(messages, add_generation_prompt=False) == text
        without = templates.get(name, llama).text(messages[1:], add_generation_prompt=False)
        assert without == text.replace("<<SYS>>\nS\n<</SYS>>\n\n", "").replace("S\n\n", "").removeprefix("S")
    text = templates.get("deepseek", deep).text(messages, add_generation_prompt=False)
    end = "<｜end▁of▁sentence｜>"
    assert text == f"<｜begin▁of▁sentence｜>S\n\nUser: a\n\nAssistant:b{end}User: c\n\nAssistant:d{end}"


def test_a_fused_system_message_is_not_cut_from_its_question(make, special):
    tokenizer = make(special["llama2"], "</s>", None, bos="<s>")
    template = templates.get("mistral", tokenizer)
    pieces = template.encode(tokenizer, [SYSTEM, ask("a"), say("b"), ask("c")], add_generation_prompt=True)
    shown = [(tokenizer.decode(p.token_ids), p.message) for p in pieces]
    first = f"[INST] {SYSTEM.content}\n\na[/INST]"
    assert shown == [("<s>", -1), (first, 0), (" b</s>"[:-4], 1), ("</s>", 1), ("[INST] c[/INST]", 2)]


# ------------------------------------------------------------------------------------------------------------ thoughts

THOUGHT = "<think>\nhm\n</think>\n\nThree."


def test_thoughts_of_earlier_turns_are_stripped_and_later_ones_kept(family):
    tokenizer = family("qwen3")
    template = templates.get("qwen3", tokenizer)
    for messages in (
        [ask("1"), say(THOUGHT), ask("2"), say("<think>\nmm\n</think>\n\n4")],
        [ask("1"), say(THOUGHT), ask("2"), say("4")],
        [ask("1"), say("<think>loose</think>4")],
    ):
        assert template.text(messages, add_generation_prompt=False) == jinja_text(tokenizer, messages)
    assert "hm" not in template.text([ask("1"), say(THOUGHT), ask("2")], add_generation_prompt=True)


def test_not_thinking_puts_an_empty_thought_into_the_prompt_untrained(family):
    tokenizer = family("qwen3")
    template = templates.get("qwen3", tokenizer, enable_thinking=False)
    text = template.text([ask("1")], add_generation_prompt=True)
    assert text == jinja_text(tokenizer, [ask("1")], add_generation_prompt=True, enable_thinking=False)
    for answer in ("Three.", THOUGHT):
        example = Example(origin=Origin(file="f", row=1), prompt=(ask("1"),), response=say(answer))
        row = encode.encode_sft(example, template, tokenizer, cutoff_len=999)
        assert tokenizer.decode(row.token_ids) == text + "Three.<|im_end|>\n"
        assert tokenizer.decode([row.token_ids[i] for i in row.scored]) == "Three.<|im_end|>\n"
        whole = template.encode(tokenizer, [ask("1"), say(answer)])
        assert tuple(t for piece in whole for t in piece.token_ids) == row.token_ids


def test_auto_learns_the_empty_thought_as_the_model_writes_it(family):
    tokenizer = family("qwen3")
    example = Example(origin=Origin(file="f", row=1), prompt=(ask("1"),), response=say("Three."))
    for thinking in (True, False):
        named, own = (templates.get(name, tokenizer, enable_thinking=thinking) for name in ("qwen3", None))
        rows = [encode.encode_sft(example, template, tokenizer, cutoff_len=999) for template in (named, own)]
        assert rows[0] == rows[1]


# --------------------------------------------------------------------------------------------------------------- tools

TOOL = {
    "name": "weather",
    "description": "Weather of a town.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}
CALL = {"name": "weather", "arguments": {"town": "上海"}}
CALLING = (
    ask("Rain?"),
    Message(role="function", content=json.dumps(CALL)),
    Message(role="observation", content="sunny"),
)
WRITTEN = {
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"town": "上海"}}\n</tool_call><|im_end|>\n',
    "glm4": 'weather\n{"town": "上海"}',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "上海"}}]</s>',
    "phi4": 'Action: weather\nAction Input: {"town": "上海"}<|im_end|>',
}
RESULT = {
    "qwen3": "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n",
    "glm4": "<|observation|>\nsunny",
    "mistral": '[TOOL_RESULTS] {"content": sunny}[/TOOL_RESULTS]',
    "phi4": "<|im_start|>user<|im_sep|>sunny<|im_end|>",
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("wrapped", [False, True])
def test_calls_are_learnt_and_results_are_not(family, name, wrapped):
    tokenizer = family(name)
    template = templates.get(name, tokenizer)
    tools = json.dumps([{"type": "function", "function": TOOL} if wrapped else TOOL])
    example = Example(origin=Origin(file="f", row=1), prompt=CALLING, response=say("Sunny."), tools=tools)
    row = encode.encode_sft(example, template, tokenizer, cutoff_len=9999)
    text = tokenizer.decode(row.token_ids)
    learnt = tokenizer.decode([row.token_ids[i] for i in row.scored])
    assert WRITTEN[name] + RESULT[name] in text
    assert learnt.startswith(WRITTEN[name]) and "sunny" not in learnt
    assert "weather" in text[: text.index("Rain?")]
    assert '"function": {"type"' not in text
    last = Example(origin=Origin(file="f", row=1), prompt=CALLING[:1], response=CALLING[1], tools=tools)
    row = encode.encode_sft(last, template, tokenizer, cutoff_len=9999)
    assert (
        tokenizer.decode([row.token_ids[i] for i in row.scored])
        .removeprefix("<think>\n\n</think>\n\n")
        .startswith(WRITTEN[name])
    )


def test_llama3_calls_with_parameters(make, special, jinja):
    tokenizer = make(special["llama3"], None, jinja["llama3"], bos="<|begin_of_text|>")
    template = templates.get("llama3", tokenizer)
    text = template.text(CALLING, add_generation_prompt=True, tools=[TOOL])
    assert '{"name": "weather", "parameters": {"town": "上海"}}<|eot_id|>' in text
    assert "<|start_header_id|>ipython<|end_header_id|>\n\nsunny<|eot_id|>" in text
    assert text.index("Cutting Knowledge Date") < text.index('"name": "weather"') < text.index("Rain?")


def test_qwen_tools_as_their_template_lists_them(family):
    template = templates.get("qwen3", family("qwen3"))
    text = template.text([SYSTEM, ask("Rain?")], add_generation_prompt=False, tools=[TOOL])
    listed = json.dumps({"type": "function", "function": TOOL})
    assert text.startswith(f"<|im_start|>system\n{SYSTEM.content}\n\n# Tools\n\nYou may call one or more functions")
    assert f"<tools>\n{listed}\n</tools>" in text
    bare = template.text([ask("Rain?")], add_generation_prompt=False, tools=[TOOL])
    assert bare.startswith("<|im_start|>system\n# Tools\n\n")


def test_several_calls_and_openai_arguments(family):
    template = templates.get("qwen3", family("qwen3"))
    both = json.dumps([CALL, {"name": "b", "arguments": '{"x": 1}'}])
    written = template.tools.written_calls(both)
    assert written.count("<tool_call>") == 2
    assert '{"name": "b", "arguments": {"x": 1}}' in written
    thought = template.tools.written_calls("<think>\nhm\n</think>\n\n" + json.dumps(CALL))
    assert thought.startswith("<think>\nhm\n</think>\n\n<tool_call>")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tools": "not json"}, "tools is not JSON"),
        ({"tools": '[{"description": "x"}]'}, "tools is not a list of functions with names"),
        ({"response": Message(role="function", content="call it")}, "a function call is not JSON"),
        (
            {"response": Message(role="function", content='{"name": "b"}')},
            "a function call without name and arguments",
        ),
    ],
)
def test_unusable_tools_are_counted(tokenizer, given, reason):
    template = templates.get("chatml", tokenizer)
    example = Example(**{"origin": Origin(file="f", row=3), "prompt": (ask("q"),), "response": say("a"), **given})
    dropped = encode.encode_sft(example, template, tokenizer, cutoff_len=99)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.origin.row) == (reason, 3)


def test_glm4_writes_one_call_in_a_turn(family):
    template = templates.get("glm4", family("glm4"))
    with pytest.raises(DataError, match="several function calls"):
        template.tools.written_calls(json.dumps([CALL, CALL]))


def test_tool_format_overrides_the_template(family):
    tokenizer = family("qwen3")
    template = templates.get("qwen3", tokenizer, tools="glm4")
    assert 'weather\n{"town": "上海"}<|im_end|>' in template.text(CALLING, add_generation_prompt=True)
    with pytest.raises(DataError, match="did you mean 'qwen'"):
        templates.get("qwen3", tokenizer, tools="qwn")
