"""ChatModel as programs use it: answers, streams, generation keywords, scores, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from trimtab import ChatModel, Response
from trimtab.errors import AdapterError, ConfigError, DataError, ModelError, TrimtabError
from trimtab.models.heads import RECORD, HeadRecord, ValueHead, save_head
from trimtab.serve.chat import encode_rendered
from trimtab.types import Message

pytestmark = pytest.mark.unit

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = [{"role": "user", "content": "哪些镇名拥有重点旅游村?"}]
ANSWER = "SELECT DISTINCT 镇名 FROM 村;"


def rendered(question: str, answer: str, end: str = "<|im_end|>\n") -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}{end}"


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def model(base: Path, policy: Path) -> ChatModel:
    return ChatModel(
        {
            "model_name_or_path": str(base),
            "adapter_name_or_path": str(policy),
            "template": "chatml",
            "compute_dtype": "float32",
            "max_new_tokens": 12,
        }
    )


@pytest.fixture(scope="module")
def judge(base: Path, reward: Path) -> ChatModel:
    # no template in the file: that of the reward model's record is used
    return ChatModel(
        {
            "model_name_or_path": str(base),
            "adapter_name_or_path": str(reward),
            "stage": "rm",
            "compute_dtype": "float32",
            "micro_batch_tokens": 200,
        }
    )


# -------------------------------------------------------------------------------------------------------------- answers


def test_a_dialogue_has_one_response(model: ChatModel) -> None:
    (response,) = model.chat(QUESTION, do_sample=False)
    assert isinstance(response, Response)
    ids = model.served.template.encode_prompt(
        model.served.tokenizer, [Message(role="user", content=QUESTION[0]["content"])]
    )
    assert response.prompt_length == len(ids)
    assert 1 <= response.response_length <= 12
    assert response.finish_reason == ("length" if response.response_length == 12 else "stop")


def test_greedy_is_transformers_greedy(model: ChatModel, base: Path, policy: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, policy).eval()
    ids = tokenizer(rendered("hello", "", end=""), return_tensors="pt", add_special_tokens=False)
    written = theirs.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
    (ours,) = model.chat([{"role": "user", "content": "hello"}], do_sample=False)
    assert ours.response_text == tokenizer.decode(written, skip_special_tokens=True).rstrip("\ufffd")


def test_messages_of_the_user_alone_are_answered_one_by_one(model: ChatModel) -> None:
    questions = [{"role": "user", "content": text} for text in ("one", "a longer second", "三")]
    together = model.chat(questions, do_sample=False)
    assert together == [model.chat([question], do_sample=False)[0] for question in questions]
    # a dialogue of several turns is one
    turns = [questions[0], {"role": "assistant", "content": "1"}, questions[1]]
    assert len(model.chat(turns)) == 1
    assert model.chat([Message(role="user", content="one")], do_sample=False) == together[:1]


def test_a_system_message_is_the_first_of_every_dialogue(model: ChatModel) -> None:
    led = [{"role": "system", "content": "short"}, *QUESTION]
    assert model.chat(led, do_sample=False) == model.chat(QUESTION, "short", do_sample=False)
    assert model.chat(QUESTION, "short")[0].prompt_length > model.chat(QUESTION)[0].prompt_length
    with pytest.raises(DataError, match="two system messages"):
        model.chat(led, "other")


def test_several_answers_differ_and_a_seed_repeats_them(model: ChatModel) -> None:
    sampled = {"do_sample": True, "temperature": 1.5, "top_p": 1.0, "top_k": 0}
    first = model.chat(QUESTION, num_return_sequences=3, seed=5, **sampled)
    assert len({response.response_text for response in first}) == 3
    assert model.chat(QUESTION, num_return_sequences=3, seed=5, **sampled) == first
    assert model.chat(QUESTION, num_return_sequences=1, seed=5, **sampled) == first[:1]
    assert model.chat(QUESTION, num_return_sequences=3, seed=6, **sampled) != first


def test_keywords_win_over_the_file(args: dict[str, Any], model: ChatModel) -> None:
    settings = model._settings({})
    assert (settings.sampling.temperature, settings.sampling.top_p, settings.sampling.top_k) == (0.95, 0.7, 50)
    assert (settings.sampling.max_new_tokens, settings.max_length, settings.k) == (12, None, 1)
    settings = model._settings({"do_sample": False, "repetition_penalty": 1.2, "top_k": -1, "stop": "x", "seed": 3})
    assert (settings.sampling.temperature, settings.sampling.repetition_penalty) == (0.0, 1.2)
    assert (settings.sampling.top_k, settings.sampling.stop, settings.sampling.seed) == (0, ("x",), 3)
    assert model._settings({"max_length": 40}).max_length == 40
    assert model._settings({"max_length": 40, "max_new_tokens": 5}).max_length is None
    assert model._settings({"temperature": None}).sampling.temperature == 0.95


def test_max_length_counts_the_prompt(model: ChatModel) -> None:
    length = model.chat(QUESTION)[0].prompt_length
    (response,) = model.chat(QUESTION, max_length=length + 3, do_sample=False)
    assert response.response_length <= 3
    with pytest.raises(DataError, match="no room"):
        model.chat(QUESTION, max_length=length)


def test_a_stop_string_ends_the_answer(model: ChatModel) -> None:
    (whole,) = model.chat(QUESTION, do_sample=False)
    stop = whole.response_text[2:4]
    (cut,) = model.chat(QUESTION, do_sample=False, stop=[stop])
    assert cut.response_text == whole.response_text[: whole.response_text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.response_length < whole.response_length
    assert "".join(model.stream_chat(QUESTION, do_sample=False, stop=[stop])) == cut.response_text


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_the_answer_in_pieces(model: ChatModel, seed: int) -> None:
    sampled = {"seed": seed, "temperature": 1.2, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40}
    pieces = list(model.stream_chat(QUESTION, **sampled))
    assert len(pieces) > 2
    assert "".join(pieces) == model.chat(QUESTION, **sampled)[0].response_text
    assert not pieces[-1].endswith("\ufffd")


def test_the_async_forms(model: ChatModel, judge: ChatModel) -> None:
    async def all_at_once() -> tuple[list[Response], list[str], list[float], list[Response]]:
        async def stream() -> list[str]:
            return [piece async for piece in model.astream_chat(QUESTION, do_sample=False)]

        return await asyncio.gather(
            model.achat(QUESTION, do_sample=False),
            stream(),
            judge.aget_scores([rendered("q", "a")]),
            model.achat(QUESTION, do_sample=False, max_new_tokens=4),
        )

    answered, pieces, scores, short = asyncio.run(all_at_once())
    assert answered == model.chat(QUESTION, do_sample=False)
    assert "".join(pieces) == answered[0].response_text
    assert scores == judge.get_scores([rendered("q", "a")])
    assert short == model.chat(QUESTION, do_sample=False, max_new_tokens=4)


def test_two_streams_take_turns(model: ChatModel) -> None:
    a, b = (model.stream_chat(QUESTION, do_sample=False) for _ in range(2))
    texts = ["", ""]
    for first, second in zip(a, b, strict=True):
        texts = [texts[0] + first, texts[1] + second]
    assert texts[0] == texts[1] == model.chat(QUESTION, do_sample=False)[0].response_text


def test_special_tokens_are_shown_when_asked_for(model: ChatModel) -> None:
    sampled = {"seed": 0, "temperature": 3.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 200}
    (hidden,) = model.chat(QUESTION, **sampled)
    (shown,) = model.chat(QUESTION, **sampled, skip_special_tokens=False)
    assert "<|" not in hidden.response_text
    assert "<|endoftext|>" in shown.response_text  # of 200 tokens drawn almost evenly from 300, some are special


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"num_beams": 4}, "unknown generation keyword 'num_beams'"),
        ({"temperature": -1}, "temperature: -1"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"num_return_sequences": 0}, "num_return_sequences: 0"),
        ({"stop": [""]}, "stop: "),
        ({"tools": "[]x"}, "tools is not JSON"),
    ],
)
def test_wrong_keywords_are_refused(model: ChatModel, given: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        model.chat(QUESTION, **given)
    with pytest.raises((ConfigError, DataError), match=words):
        model.stream_chat(QUESTION, **given)  # at the call, not at the first piece


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no message"),
        ("hello", "a single text"),
        (5, "a single int"),
        ({"role": "user", "content": "x"}, "a single message"),
        ([{"role": "user"}], "message 1 is not a message"),
        ([{"role": "usr", "content": "x"}], "did you mean 'user'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "not text but list"),
        ([{"role": "assistant", "content": "x"}], "speakers out of order"),
        (dialogue("q", "a"), "nothing to answer"),
        ([{"role": "user", "content": "  "}], "empty prompt"),
        ([{"role": "system", "content": "s"}], "no message besides"),
    ],
)
def test_what_is_no_dialogue_is_refused(model: ChatModel, messages: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        model.chat(messages)


def test_a_stream_is_one_answer(model: ChatModel) -> None:
    with pytest.raises(ConfigError, match="asks for 2"):
        model.stream_chat([*QUESTION, *QUESTION])
    with pytest.raises(ConfigError, match="asks for 3"):
        model.stream_chat(QUESTION, num_return_sequences=3)


# --------------------------------------------------------------------------------------------------------------- scores


def test_a_score_is_the_head_at_the_end_marker(judge: ChatModel, base: Path, reward: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, reward).eval()
    ids = tokenizer(rendered("how many?", "3", end="<|im_end|>"), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        state = theirs(**ids, output_hidden_states=True).hidden_states[-1][0, -1]
    head = load_file(reward / "value_head.safetensors")
    expected = float(head["v_head.summary.weight"][0] @ state + head["v_head.summary.bias"][0])
    (score,) = judge.get_scores([dialogue("how many?", "3")])
    assert score == pytest.approx(expected, abs=1e-5)


def test_text_and_messages_score_the_same(judge: ChatModel) -> None:
    for answer in (ANSWER, "\n\n  SELECT 1", "the", ""):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            by_text = judge.get_scores([rendered("哪些?", answer), rendered("哪些?", answer, end="<|im_end|>")])
        assert by_text[0] == pytest.approx(by_text[1], abs=1e-6)
        assert judge.get_scores([dialogue("哪些?", answer)])[0] == pytest.approx(by_text[0], abs=1e-6)


def test_rendered_text_has_the_ids_of_its_messages(model: ChatModel) -> None:
    template, tokenizer = model.served.template, model.served.tokenizer
    messages = [
        Message(role="system", content="s"),
        Message(role="user", content="u"),
        Message(role="assistant", content="\n\nthe"),
        Message(role="user", content="\n"),
        Message(role="assistant", content=" SELECT"),
    ]
    pieces = template.encode(tokenizer, messages)
    text = template.text(messages, add_generation_prompt=False)
    assert encode_rendered(text, template, tokenizer) == [token for piece in pieces for token in piece.token_ids]


def test_a_score_does_not_depend_on_company(judge: ChatModel) -> None:
    items = [rendered("q" * n, "the answer " * (1 + n % 7)) for n in range(1, 20)]
    together = judge.get_scores(items)
    assert together == pytest.approx([judge.get_scores([item])[0] for item in items], abs=1e-4)
    assert judge.get_scores(list(reversed(items))) == pytest.approx(together[::-1], abs=1e-4)
    assert len({round(score, 6) for score in together}) == len(items)


def test_text_without_an_end_marker_is_read_at_its_last_token_with_a_warning(judge: ChatModel) -> None:
    cut = rendered("q", "a", end="")
    with pytest.warns(UserWarning, match="does not end in"):
        (score,) = judge.get_scores([cut])
    assert score != judge.get_scores([rendered("q", "a")])[0]


def test_a_foreign_head_is_read_at_the_last_token_of_the_whole(
    reward_args: dict[str, Any], reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = Path(shutil.copytree(reward, tmp_path / "foreign"))
    (folder / RECORD).unlink()
    model = ChatModel({**reward_args, "adapter_name_or_path": str(folder)})
    assert "last token of the whole" in capsys.readouterr().out.replace("\n", " ")
    (by_messages,) = model.get_scores([dialogue("q", "a")])
    assert model.get_scores([rendered("q", "a")])[0] == pytest.approx(by_messages, abs=1e-6)
    assert model.get_scores([rendered("q", "a", end="<|im_end|>")])[0] != pytest.approx(by_messages, abs=1e-3)
    # without stage: rm it may be what a policy's run has left, so it answers too
    both = ChatModel({**reward_args, "stage": "sft", "adapter_name_or_path": str(folder)})
    assert both.chat(QUESTION)
    assert both.get_scores([dialogue("q", "a")]) == [by_messages]


def test_what_cannot_be_scored_is_refused(judge: ChatModel, model: ChatModel) -> None:
    assert judge.get_scores([]) == []
    for wrong, words in (
        ("text", "a list of dialogues"),
        (dialogue("q", "a"), "a list of dialogues"),
        ([QUESTION], "does not end with an answer"),
        ([""], "is empty"),
        ([5], "dialogue 1 is no dialogue but int: 5"),
        ([dialogue("q", "a"), None], "dialogue 2 is no dialogue but NoneType"),
        (5, "is no dialogue but int"),
    ):
        with pytest.raises(DataError, match=words):
            judge.get_scores(wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no value head"):
        model.get_scores(["x"])
    for call in (judge.chat, judge.stream_chat):
        with pytest.raises(ModelError, match="reward model"):
            call(QUESTION)


def test_the_head_beside_an_adapter_makes_a_reward_model(
    reward_args: dict[str, Any], policy: Path, reward: Path, tmp_path: Path
) -> None:
    import shutil

    del reward_args["stage"]
    model = ChatModel(reward_args)
    assert not model.served.writes
    # but the head that a PPO run leaves beside its policy is its critic's
    folder = Path(shutil.copytree(policy, tmp_path / "ppo"))
    save_head(ValueHead(64), folder, HeadRecord(purpose="critic"))
    model = ChatModel({**reward_args, "adapter_name_or_path": str(folder)})
    assert model.chat(QUESTION)
    with pytest.raises(ModelError, match="no value head"):
        model.get_scores([dialogue("q", "a")])


# ---------------------------------------------------------------------------------------------------------------- files


def test_the_articles_script_runs(
    args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "predict.yaml"
    config.write_text(yaml.safe_dump({**args, "do_sample": False}), encoding="utf-8")
    loguru = ModuleType("loguru")
    loguru.logger = type("Logger", (), {"info": staticmethod(lambda *words: None)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loguru", loguru)
    rows = EXAMPLES / "text2sql" / "data" / "article.json"
    monkeypatch.setattr(sys, "argv", ["infer.py", str(config), str(rows)])
    runpy.run_path(str(EXAMPLES / "article" / "infer.py"), run_name="__main__")
    printed = capsys.readouterr().out
    data = json.loads(rows.read_text(encoding="utf-8"))
    model = ChatModel(str(config))
    for row in data:
        (response,) = model.chat([{"role": "user", "content": row["instruction"]}])
        assert response.response_text in printed


def test_a_training_file_serves_what_it_trained(args: dict[str, Any], policy: Path, tmp_path: Path) -> None:
    del args["adapter_name_or_path"]
    training = {**args, "stage": "sft", "do_train": True, "dataset": "any", "output_dir": str(policy)}
    trained = ChatModel(training).chat(QUESTION, do_sample=False)
    assert trained == ChatModel({**args, "adapter_name_or_path": str(policy)}).chat(QUESTION, do_sample=False)
    assert trained != ChatModel(args).chat(QUESTION, do_sample=False)
    with pytest.raises(TrimtabError, match="nothing has been trained"):
        ChatModel({**training, "output_dir": str(tmp_path)})


def test_bad_files_end_in_our_errors(args: dict[str, Any], reward_args: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        ChatModel({**args, "tempalte": "qwen"})
    with pytest.raises(ModelError, match="no model folder"):
        ChatModel({**args, "model_name_or_path": str(tmp_path / "none")})
    with pytest.raises(AdapterError, match="no adapter"):
        ChatModel({**args, "adapter_name_or_path": str(tmp_path)})
    with pytest.raises(AdapterError, match="no value head"):
        ChatModel({**reward_args, "adapter_name_or_path": args["adapter_name_or_path"]})
    with pytest.raises(AdapterError, match="no value head") as caught:
        ChatModel({**reward_args, "adapter_name_or_path": None})
    assert caught.value.why.endswith("this folder holds a model without one")
