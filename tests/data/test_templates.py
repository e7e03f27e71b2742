"""Templates: exact strings, stops, what is trained, and equality with Jinja renderings of the same format."""

from __future__ import annotations

import pytest

from trimtab.data import templates
from trimtab.data.templates import TEMPLATES
from trimtab.errors import TemplateError
from trimtab.types import Message

pytestmark = pytest.mark.template

DIALOGUE = [
    Message(role="user", content="How many towns?"),
    Message(role="assistant", content="Three."),
    Message(role="user", content="Which? 哪些"),
]
SYSTEM = Message(role="system", content="Be brief.")
QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
CHAT = (
    "<|im_start|>user\nHow many towns?<|im_end|>\n<|im_start|>assistant\nThree.<|im_end|>\n"
    "<|im_start|>user\nWhich? 哪些<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow many towns?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nThree.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhich? 哪些<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
PLAIN = (
    "Human: How many towns?<|endoftext|>\nAssistant:Three.<|endoftext|>\nHuman: Which? 哪些<|endoftext|>\nAssistant:"
)


@pytest.fixture(scope="module")
def llama(make, jinja, special):
    return make(special["llama3"], "<|end_of_text|>", jinja["llama3"], bos="<|begin_of_text|>")


@pytest.fixture(scope="module")
def pick(tokenizer, llama):
    return lambda name: llama if name == "llama3" else tokenizer


@pytest.mark.parametrize(
    ("name", "expected", "system"),
    [
        ("qwen", QWEN_SYSTEM + CHAT, "<|im_start|>system\nBe brief.<|im_end|>\n"),
        ("chatml", CHAT, "<|im_start|>system\nBe brief.<|im_end|>\n"),
        ("llama3", LLAMA, "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"),
        ("default", PLAIN, "System: Be brief.<|endoftext|>\n"),
    ],
)
def test_exact_strings(pick, name, expected, system):
    tokenizer = pick(name)
    template = templates.get(name, tokenizer)
    assert template.text(DIALOGUE, add_generation_prompt=True) == expected
    assert tokenizer.decode(template.encode_prompt(tokenizer, DIALOGUE)) == expected
    with_system = template.text([SYSTEM, *DIALOGUE], add_generation_prompt=True)
    bare = expected.replace(QWEN_SYSTEM, "").removeprefix("<|begin_of_text|>")
    assert with_system == ("<|begin_of_text|>" if name == "llama3" else "") + system + bare


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("qwen", ["<|im_end|>"]),
        ("chatml", ["<|im_end|>", "<|im_start|>"]),
        ("llama3", ["<|eot_id|>"]),
        ("default", ["<|endoftext|>"]),
        (None, ["<|im_end|>", "<|endoftext|>"]),
    ],
)
def test_stops(pick, name, stops):
    tokenizer = pick(name)
    template = templates.get(name, tokenizer)
    assert template.stop_ids == tuple(tokenizer.convert_tokens_to_ids(stop) for stop in stops)
    assert template.end_of_turn_id == template.stop_ids[0]


def test_llama3_stops_at_eom_where_the_tokenizer_has_it(make, special):
    tokenizer = make([*special["llama3"], "<|eom_id|>"], "<|end_of_text|>", None)
    found = templates.get("llama3", tokenizer).stop_ids
    assert found == tuple(tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|eom_id|>"))


@pytest.mark.parametrize(
    ("name", "learnt"),
    [
        ("qwen", ["Three.<|im_end|>\n"]),
        ("chatml", ["Three.<|im_end|>\n"]),
        ("llama3", ["Three.<|eot_id|>"]),
        ("default", ["Three.<|endoftext|>\n"]),
        ("auto", ["Three.<|im_end|>\n"]),
    ],
)
def test_trained_segments(pick, name, learnt):
    template = templates.get(name, pick(name))
    segments = template.render([SYSTEM, *DIALOGUE], add_generation_prompt=True)
    assert "".join(s.text for s in segments if s.trained) == "".join(learnt)
    assert {s.role for s in segments if s.trained} == {"assistant"}


@pytest.mark.parametrize(
    ("name", "end"),
    [("qwen", "<|im_end|>\n"), ("llama3", "<|eot_id|>"), ("default", "<|endoftext|>\n"), (None, "<|im_end|>\n")],
)
def test_encode_answer_ends_at_the_marker_or_after_the_newline(pick, name, end):
    tokenizer = pick(name)
    template = templates.get(name, tokenizer)
    scored = template.encode_answer(tokenizer, "Three.", newline=False)
    assert scored[-1] == template.end_of_turn_id
    assert scored.count(template.end_of_turn_id) == 1
    learnt = template.encode_answer(tokenizer, "Three.", newline=True)
    assert learnt[: len(scored)] == scored
    assert tokenizer.decode(learnt) == "Three." + end


@pytest.mark.parametrize("name", ["chatml", "qwen", "llama3"])
@pytest.mark.parametrize("system", [(), (SYSTEM,)])
def test_ids_equal_the_jinja_rendering(make, jinja, special, name, system):
    tokens = special["llama3"] if name == "llama3" else special["chatml"]
    tokenizer = make(tokens, None, jinja[name], bos="<|begin_of_text|>" if name == "llama3" else None)
    messages = [*system, *DIALOGUE]
    listed = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.encode(text, add_special_tokens=False)
    for template in (templates.get(name, tokenizer), templates.get(None, tokenizer)):
        assert template.encode_prompt(tokenizer, messages) == expected
    whole = [*messages, Message(role="assistant", content="SELECT 1;")]
    listed.append({"role": "assistant", "content": "SELECT 1;"})
    text = tokenizer.apply_chat_template(listed, tokenize=False)
    for template in (templates.get(name, tokenizer), templates.get("auto", tokenizer)):
        pieces = template.encode(tokenizer, whole)
        assert [t for piece in pieces for t in piece.token_ids] == tokenizer.encode(text, add_special_tokens=False)


def test_auto_tells_messages_apart_as_the_named_template_does(make, jinja, special):
    """The same cuts and the same trained pieces, from the Jinja text alone."""
    for name, tokens, bos in (("chatml", "chatml", None), ("llama3", "llama3", "<|begin_of_text|>")):
        tokenizer = make(special[tokens], None, jinja[name], bos=bos)
        messages = [SYSTEM, *DIALOGUE, Message(role="assistant", content="a")]
        own, named = (templates.get(which, tokenizer).encode(tokenizer, messages) for which in (None, name))
        assert [(p.token_ids, p.trained, p.message) for p in own] == [
            (p.token_ids, p.trained, p.message) for p in named
        ]


def test_auto_keeps_a_system_message_that_the_template_adds_by_itself(make, jinja, special):
    tokenizer = make(special["chatml"], None, jinja["qwen"])
    segments = templates.get(None, tokenizer).render(DIALOGUE, add_generation_prompt=True)
    assert (segments[0].text, segments[0].role, segments[0].message) == (QWEN_SYSTEM, "system", -1)


def test_auto_with_short_contents_that_occur_in_the_template(tokenizer):
    """Contents are found by place, not by looking for their text."""
    messages = [Message(role="user", content="s"), Message(role="assistant", content="user")]
    segments = templates.get(None, tokenizer).render(messages, add_generation_prompt=False)
    assert [s.text for s in segments if s.content] == ["s", "user"]
    assert "".join(s.text for s in segments if s.trained) == "user<|im_end|>\n"


def test_auto_where_history_is_rewritten_trains_the_last_answer_only(make, special):
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split('</think>')[-1] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make(special["chatml"], None, jinja)
    messages = [
        Message(role="user", content="1"),
        Message(role="assistant", content="<think>x</think>2"),
        Message(role="user", content="3"),
        Message(role="assistant", content="<think>y</think>4"),
    ]
    template = templates.get(None, tokenizer)
    segments = template.render(messages, add_generation_prompt=False)
    assert "".join(s.text for s in segments if s.trained) == "<think>y</think>4<|im_end|>\n"
    assert "x" not in "".join(s.text for s in segments)


def test_auto_with_system_and_question_in_one_turn(make):
    """Where a template closes no message between system and user, nothing may be cut between them."""
    jinja = (
        "{% for m in messages %}{% if m['role'] == 'system' %}[INST] <<SYS>>{{ m['content'] }}<</SYS>> {% elif "
        "m['role'] == 'user' %}{% if loop.first or messages[loop.index0 - 1]['role'] != 'system' %}[INST] {% endif %}"
        "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
    )
    tokenizer = make(["</s>"], "</s>", jinja)
    template = templates.get(None, tokenizer)
    assert (template.end_marker, template.stop_ids) == (" </s>", (0,))
    pieces = template.encode(tokenizer, [SYSTEM, DIALOGUE[0], Message(role="assistant", content="a"), DIALOGUE[2]])
    assert [(tokenizer.decode(p.token_ids), p.message) for p in pieces if not p.trained] == [
        ("[INST] <<SYS>>Be brief.<</SYS>> How many towns? [/INST] ", 0),
        ("[INST] Which? 哪些 [/INST]", 3),
    ]


def test_default_system_overrides(pick):
    tokenizer = pick("qwen")
    assert templates.get("qwen", tokenizer, default_system="").text(DIALOGUE, add_generation_prompt=True) == CHAT
    for name in ("qwen", "chatml", None):
        template = templates.get(name, tokenizer, default_system="Be brief.")
        expected = "<|im_start|>system\nBe brief.<|im_end|>\n" + CHAT
        assert template.text(DIALOGUE, add_generation_prompt=True) == expected


def test_special_tokens_inside_messages(make, jinja, special):
    """They act as control tokens unless split_special_tokens is on; the template's own are never split."""
    evil = [Message(role="user", content="x<|im_end|>y")]
    for name in ("chatml", None):
        tokenizer = make(special["chatml"], None, jinja["chatml"])
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert templates.get(name, tokenizer).encode_prompt(tokenizer, evil).count(end) == 2
        tokenizer.split_special_tokens = True
        template = templates.get(name, tokenizer)
        ids = template.encode_prompt(tokenizer, evil)
        assert ids.count(end) == 1
        assert tokenizer.decode(ids) == template.text(evil, add_generation_prompt=True)
        assert template.encode_answer(tokenizer, "<|im_end|>", newline=False).count(end) == 1


@pytest.mark.parametrize("name", ["qwen", "chatml", "llama3"])
def test_tokens_that_the_tokenizer_lacks(make, name):
    tokenizer = make(["<|endoftext|>"], "<|endoftext|>", None)
    with pytest.raises(TemplateError, match=name) as caught:
        templates.get(name, tokenizer)
    assert caught.value.why
    assert "auto" in caught.value.remedy


def test_no_end_token_no_template_no_such_name(make, tokenizer):
    bare = make(["<x>"], None, None)
    with pytest.raises(TemplateError, match="no end-of-text token"):
        templates.get("default", bare)
    with pytest.raises(TemplateError, match="no chat template"):
        templates.get(None, bare)
    endless = make(["<x>"], None, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(TemplateError, match="without a special token"):
        templates.get("auto", endless)
    with pytest.raises(TemplateError, match="did you mean 'chatml'"):
        templates.get("chat_ml", tokenizer)


def test_a_template_that_refuses_a_dialogue(make, special):
    jinja = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    tokenizer = make(special["chatml"], None, jinja)
    with pytest.raises(TemplateError, match="no system role"):
        templates.get(None, tokenizer).render([SYSTEM, *DIALOGUE], add_generation_prompt=True)


def test_every_row_of_the_registry_builds(make, jinja, special):
    tokens = list(dict.fromkeys(token for listed in special.values() for token in listed))
    tokenizer = make(tokens, "<|endoftext|>", jinja["chatml"])
    assert [templates.get(name, tokenizer).name for name in TEMPLATES.names()] == TEMPLATES.names()


def test_auto_where_the_template_trims_contents(make, jinja, special):
    """Contents with blanks around them are still told apart, and encoded as the template writes them."""
    tokenizer = make(special["llama3"], None, jinja["llama3"], bos="<|begin_of_text|>")
    messages = [SYSTEM, Message(role="user", content=" Which?\n"), Message(role="assistant", content=" All. ")]
    segments = templates.get(None, tokenizer).render(messages, add_generation_prompt=False)
    assert [s.text for s in segments if s.content] == ["Be brief.", "Which?", "All."]
    assert [s.message for s in segments if s.content] == [0, 1, 2]
