"""Token rows: what is trained, what is cut, what is dropped. Numbers derived by hand or by counting tokens."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.data import encode, templates
from trimtab.data.dropped import Dropped
from trimtab.data.encode import Chunk, keep_tail, split_budget
from trimtab.types import Example, Message, Origin, Pair, Prompt, TokenRow

pytestmark = pytest.mark.unit

ORIGIN = Origin(file="a.json", row=1)


def ask(text):
    return Message(role="user", content=text)


def answer(text):
    return Message(role="assistant", content=text)


def example(*prompt, **given):
    return Example(origin=ORIGIN, prompt=prompt, **given)


@pytest.fixture(scope="module")
def chatml(tokenizer):
    return templates.get("chatml", tokenizer)


def learnt(tokenizer, row):
    return tokenizer.decode([row.token_ids[index] for index in row.scored])


# ------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("source", "target", "budget", "expected"),
    [
        (3000, 2000, 1000, (600, 400)),  # both long: 1000 * 2000 / 5000 = 400
        (2000, 3000, 1000, (400, 600)),
        (3000, 100, 1000, (900, 100)),  # short target: it stays whole
        (3000, 499, 1000, (501, 499)),
        (100, 3000, 1000, (100, 900)),  # short source: it stays whole
        (499, 3000, 1000, (499, 501)),
        (500, 500, 1000, (500, 500)),  # all fits
        (600, 500, 1000, (546, 454)),  # neither is below half: floor(1000 * 500 / 1100) = 454
        (10, 3, 0, (0, 0)),
        (5, 5, 1, (1, 0)),  # floor(1 * 5 / 10) = 0
    ],
)
def test_split_budget(source, target, budget, expected):
    assert split_budget(source, target, budget) == expected


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 3000))
def test_split_budget_keeps_within_the_budget_and_wastes_none(source, target, budget):
    kept_source, kept_target = split_budget(source, target, budget)
    assert 0 <= kept_source <= source
    assert 0 <= kept_target <= target
    assert kept_source + kept_target == min(source + target, budget)


def chunk(message, *ids, role="user"):
    return Chunk(token_ids=ids, role=role, message=message)


def test_keep_tail_by_hand():
    opening = chunk(-1, 9, role="system")
    system = chunk(0, 1, 1, role="system")
    talk = [chunk(1, 2, 2), chunk(2, 3, 3, role="assistant"), chunk(3, 4, 4, 4)]
    source = [opening, system, *talk]
    assert keep_tail(source, 10) == (9, 1, 1, 2, 2, 3, 3, 4, 4, 4)
    # 9 tokens: dropping the first question drops its answer too, so that a user speaks first
    assert keep_tail(source, 9) == (9, 1, 1, 4, 4, 4)
    assert keep_tail(source, 6) == (9, 1, 1, 4, 4, 4)
    # the system message does not fit with the last question any more
    assert keep_tail(source, 5) == (9, 4, 4, 4)
    assert keep_tail(source, 4) == (9, 4, 4, 4)
    # nor does the last question: its end stays
    assert keep_tail(source, 3) == (9, 4, 4)
    assert keep_tail(source, 1) == (4,)
    assert keep_tail(source, 0) == ()
    # without a template opening
    assert keep_tail([system, *talk], 2) == (4, 4)
    # a system message alone is text like any other
    assert keep_tail([chunk(0, 1, 2, 3, role="system")], 2) == (2, 3)


ROLES = st.sampled_from(["system", "user", "assistant", "observation"])


@given(st.lists(st.tuples(ROLES, st.integers(1, 6)), min_size=1, max_size=7), st.integers(0, 2), st.integers(0, 30))
def test_keep_tail_never_exceeds_and_keeps_the_end(shape, opening, budget):
    numbers = iter(range(1000))
    source = [chunk(-1, *(next(numbers) for _ in range(opening)), role="system")] if opening else []
    source += [
        chunk(place, *(next(numbers) for _ in range(size)), role=role) for place, (role, size) in enumerate(shape)
    ]
    everything, kept = encode.join(source), keep_tail(source, budget)
    assert len(kept) <= budget
    assert list(kept) == sorted(set(kept))  # in order, nothing twice
    if budget:
        assert kept[-1] == everything[-1]
    last = source[-1].token_ids
    if len(last) + opening <= budget:  # the last message is whole as soon as it fits beside the opening
        assert kept[-len(last) :] == last
    if len(everything) <= budget:
        assert kept == everything


# ----------------------------------------------------------------------------------------------------------------- SFT

THREE = (ask("How many?"), answer("Three."), ask("Which?"))


def test_sft_learns_every_answer_with_end_marker_and_newline(tokenizer, chatml):
    row = encode.encode_sft(example(*THREE, response=answer("All.")), chatml, tokenizer, cutoff_len=500)
    assert tokenizer.decode(row.token_ids) == (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nThree.<|im_end|>\n"
        "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\nAll.<|im_end|>\n"
    )
    assert learnt(tokenizer, row) == "Three.<|im_end|>\nAll.<|im_end|>\n"
    assert list(row.scored) == sorted(row.scored)


def test_sft_mask_history(tokenizer, chatml):
    row = encode.encode_sft(
        example(*THREE, response=answer("All.")), chatml, tokenizer, cutoff_len=500, mask_history=True
    )
    assert learnt(tokenizer, row) == "All.<|im_end|>\n"
    assert tokenizer.decode(row.token_ids).startswith("<|im_start|>user\nHow many?")


def test_sft_train_on_prompt_is_all_but_the_first_token(tokenizer, chatml):
    row = encode.encode_sft(
        example(*THREE, response=answer("All.")), chatml, tokenizer, cutoff_len=500, train_on_prompt=True
    )
    assert row.scored == tuple(range(1, len(row.token_ids)))


def test_sft_prompt_is_the_prompt_of_generation(tokenizer, chatml):
    row = encode.encode_sft(example(*THREE, response=answer("All.")), chatml, tokenizer, cutoff_len=500)
    prompt = chatml.encode_prompt(tokenizer, THREE)
    assert list(row.token_ids[: len(prompt)]) == prompt
    assert list(row.token_ids[len(prompt) :]) == chatml.encode_answer(tokenizer, "All.", newline=True)


def test_sft_takes_the_chosen_answer_of_a_preference(tokenizer, chatml):
    row = encode.encode_sft(
        example(ask("q"), chosen=answer("good"), rejected=answer("bad")), chatml, tokenizer, cutoff_len=99
    )
    assert learnt(tokenizer, row) == "good<|im_end|>\n"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "no answer to learn from"),
        ({"response": answer(" ")}, "empty answer"),
        ({"response": answer("a"), "label": False}, "the answer is marked as unwanted"),
    ],
)
def test_sft_dropped(tokenizer, chatml, given, reason):
    dropped = encode.encode_sft(example(ask("q"), **given), chatml, tokenizer, cutoff_len=99)
    assert dropped == Dropped(origin=ORIGIN, reason=reason)


def test_sft_truncation_is_600_to_400(make, special):
    """Letters of digits make one token each, so lengths are known: source 3000, target 2000."""
    tokenizer = make(special["chatml"], "<|endoftext|>", None)
    chatml = templates.get("chatml", tokenizer)
    shell = len(chatml.encode_prompt(tokenizer, [ask("")]))
    question, reply = "7" * (3000 - shell), "8" * (2000 - 2)  # the end marker and the newline are two
    whole = chatml.encode_prompt(tokenizer, [ask(question)])
    assert (len(whole), len(chatml.encode_answer(tokenizer, reply, newline=True))) == (3000, 2000)
    row, lost = encode.fit_sft(example(ask(question), response=answer(reply)), chatml, tokenizer, cutoff_len=1000)
    assert len(row.token_ids) == 1000
    assert row.scored == tuple(range(600, 1000))
    assert lost == 4000
    assert list(row.token_ids[:600]) == whole[-600:]  # the question's end and the assistant's header
    assert tokenizer.decode(row.token_ids[600:]) == "8" * 400  # the answer's head


def test_sft_later_turns_get_what_is_left(tokenizer, chatml):
    """Two equal turns of n tokens: with n tokens of room the first fills it, with mask_history the last does."""
    turns = example(ask("aaaa"), answer("bbbb"), ask("cccc"), response=answer("dddd"))
    whole = encode.encode_sft(turns, chatml, tokenizer, cutoff_len=999)
    half = encode.encode_sft(example(ask("aaaa"), response=answer("bbbb")), chatml, tokenizer, cutoff_len=999)
    n = len(half.token_ids)
    assert len(whole.token_ids) == 2 * n
    assert encode.encode_sft(turns, chatml, tokenizer, cutoff_len=n) == half
    last = encode.encode_sft(turns, chatml, tokenizer, cutoff_len=n, mask_history=True)
    assert last.token_ids == whole.token_ids[n:]
    assert learnt(tokenizer, last) == "dddd<|im_end|>\n"


WORDS = st.text(alphabet="ab \n问?", min_size=1, max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.integers(1, 80), st.booleans(), st.booleans())
def test_sft_never_exceeds_cutoff_len(tokenizer, chatml, talk, cutoff, mask_history, train_on_prompt):
    messages = [message for q, a in talk for message in (ask(q), answer(a))]
    row = encode.encode_sft(
        example(*messages[:-1], response=answer(messages[-1].content + "x")),
        chatml,
        tokenizer,
        cutoff_len=cutoff,
        mask_history=mask_history,
        train_on_prompt=train_on_prompt,
    )
    if isinstance(row, Dropped):
        return
    assert len(row.token_ids) <= cutoff
    assert row.scored
    assert all(0 < index < len(row.token_ids) for index in row.scored)
    assert list(row.scored) == sorted(set(row.scored))


# ---------------------------------------------------------------------------------------------------------------- text


def test_text_in_chunks_every_token_a_label(tokenizer):
    rows = encode.encode_text(example(text="7" * 10), tokenizer, cutoff_len=4)
    assert [len(row.token_ids) for row in rows] == [4, 4, 3]  # ten and the end-of-text token
    assert [row.scored for row in rows] == [(1, 2, 3), (1, 2, 3), (1, 2)]
    assert rows[-1].token_ids[-1] == tokenizer.eos_token_id
    assert (
        len(encode.encode_text(example(text="7" * 8), tokenizer, cutoff_len=4)) == 2
    )  # a lone ninth token teaches nothing


def test_text_of_a_dialogue(tokenizer):
    (row,) = encode.encode_text(example(ask("q"), response=answer("a")), tokenizer, cutoff_len=99)
    assert tokenizer.decode(row.token_ids) == "q\na<|endoftext|>"


# --------------------------------------------------------------------------------------------------------------- pairs


def test_pair_ends_at_the_end_marker_and_shares_its_prompt(tokenizer, chatml):
    one = example(ask("q"), chosen=answer("good"), rejected=answer("bad one"))
    pair = encode.encode_pair(one, chatml, tokenizer, cutoff_len=99)
    prompt = chatml.encode_prompt(tokenizer, [ask("q")])
    for row, text in ((pair.chosen, "good"), (pair.rejected, "bad one")):
        assert row.token_ids[-1] == chatml.end_of_turn_id
        assert list(row.token_ids[: len(prompt)]) == prompt
        assert row.scored == tuple(range(len(prompt), len(row.token_ids)))
        assert learnt(tokenizer, row) == text + "<|im_end|>"
    assert pair.example is one


def test_pair_equals_the_row_that_scoring_makes(tokenizer, chatml):
    """One input for the reward model in training, PPO and get_scores."""
    one = example(*THREE, chosen=answer("good"), rejected=answer("bad"))
    pair = encode.encode_pair(one, chatml, tokenizer, cutoff_len=99)
    assert pair.chosen == encode.encode_dialogue(THREE, "good", chatml, tokenizer)
    prompt = encode.encode_prompt(one, chatml, tokenizer, index=0, cutoff_len=99)
    reply = chatml.encode_answer(tokenizer, "good", newline=False)
    assert pair.chosen == encode.scored_row(prompt.token_ids, reply)


def test_pair_cut_by_its_longer_answer(tokenizer, chatml):
    """The prompt gives way; a pair is dropped once its longer answer would lose its end marker."""
    one = example(ask("7" * 50), chosen=answer("8"), rejected=answer("9" * 19))
    source = chatml.encode_prompt(tokenizer, [ask("7" * 50)])
    pair, lost = encode.fit_pair(one, chatml, tokenizer, cutoff_len=45)
    assert (len(pair.rejected.token_ids), len(pair.chosen.token_ids)) == (45, 25 + 2)
    assert list(pair.chosen.token_ids[:25]) == source[-25:]
    assert lost == len(source) - 25
    dropped = encode.encode_pair(one, chatml, tokenizer, cutoff_len=40)  # 2 x 20 is not below 40
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "an answer does not fit within cutoff_len"
    assert f"prompt {len(source)}, longer answer 20, cutoff_len 40" in dropped.detail


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"response": answer("a")}, "no chosen and rejected answers"),
        ({"chosen": answer("a"), "rejected": answer("a")}, "chosen and rejected are the same"),
    ],
)
def test_pair_dropped(tokenizer, chatml, given, reason):
    assert encode.encode_pair(example(ask("q"), **given), chatml, tokenizer, cutoff_len=99).reason == reason


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORDS, WORDS, WORDS, st.integers(1, 60))
def test_pair_never_exceeds_and_never_loses_its_end(tokenizer, chatml, question, chosen, rejected, cutoff):
    one = example(ask(question), chosen=answer(chosen), rejected=answer(rejected))
    pair = encode.encode_pair(one, chatml, tokenizer, cutoff_len=cutoff)
    if isinstance(pair, Pair):
        for row in (pair.chosen, pair.rejected):
            assert len(row.token_ids) <= cutoff
            assert row.token_ids[-1] == chatml.end_of_turn_id
            assert row.scored[0] > 0


# ------------------------------------------------------------------------------------------------------------- prompts


def test_prompt_cut_on_the_left_at_message_boundaries(tokenizer, chatml):
    system = Message(role="system", content="Be brief.")
    messages = [system, ask("1" * 20), answer("2" * 20), ask("3" * 20)]
    one = example(*messages, response=answer("gold"))
    whole = chatml.encode_prompt(tokenizer, messages)
    full = encode.encode_prompt(one, chatml, tokenizer, index=5, cutoff_len=len(whole))
    assert (full.index, full.token_ids, full.cut) == (5, tuple(whole), False)
    cut = encode.encode_prompt(one, chatml, tokenizer, index=5, cutoff_len=len(whole) - 1)
    assert list(cut.token_ids) == chatml.encode_prompt(tokenizer, [system, ask("3" * 20)])
    assert cut.cut
    alone = chatml.encode_prompt(tokenizer, [ask("3" * 20)])
    assert list(encode.encode_prompt(one, chatml, tokenizer, index=0, cutoff_len=len(alone)).token_ids) == alone
    short = encode.encode_prompt(one, chatml, tokenizer, index=0, cutoff_len=12)
    assert list(short.token_ids) == alone[-12:]
    assert tokenizer.decode(short.token_ids).endswith("<|im_start|>assistant\n")
    assert short.example.response.content == "gold"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, min_size=1, max_size=5).filter(lambda talk: len(talk) % 2 == 1), st.integers(1, 60))
def test_prompt_never_exceeds_and_keeps_its_end(tokenizer, chatml, talk, cutoff):
    messages = [ask(text) if place % 2 == 0 else answer(text) for place, text in enumerate(talk)]
    prompt = encode.encode_prompt(example(*messages), chatml, tokenizer, index=0, cutoff_len=cutoff)
    whole = chatml.encode_prompt(tokenizer, messages)
    assert isinstance(prompt, Prompt)
    assert len(prompt.token_ids) <= cutoff
    assert list(prompt.token_ids) == whole[len(whole) - len(prompt.token_ids) :]
    assert prompt.cut == (len(whole) > cutoff)


def test_prompt_without_messages_is_dropped(tokenizer, chatml):
    assert encode.encode_prompt(example(text="x"), chatml, tokenizer, index=0, cutoff_len=9).reason == "no prompt"


def test_dialogue_to_score_never_loses_its_answer(tokenizer, chatml):
    row = encode.encode_dialogue([ask("7" * 50)], "8" * 30, chatml, tokenizer, cutoff_len=40)
    assert isinstance(row, TokenRow)
    assert len(row.token_ids) == 40
    assert learnt(tokenizer, row) == "8" * 30 + "<|im_end|>"
    long = encode.encode_dialogue([ask("7" * 50)], "8" * 60, chatml, tokenizer, cutoff_len=40)
    assert long.scored == tuple(range(1, 62))
