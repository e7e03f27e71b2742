"""The prefix table and the few-token transformer: states by hand, folders that transformers loads, and the engine against the scorer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.engine.generator import Engine
from trimtab.errors import ModelError
from trimtab.models.enumerable import NEVER, PrefixTableConfig, PrefixTableForCausalLM
from trimtab.models.forward import choose_layout, score_tokens
from trimtab.models.load import load_base
from trimtab.models.roles import Roles
from trimtab.models.tiny import make_few_tokens, make_prefix_table, tiny_tokenizer
from trimtab.types import Example, Origin, Prompt, Sampling, TokenRow

pytestmark = pytest.mark.unit

A, B, END, ONE, TWO, ELSE = range(6)


def table() -> Any:
    """Letters a and b, digits 1 and 2, answers of up to two letters: 7 nodes a table (root; a, b; aa, ab, ba, bb)."""
    config = PrefixTableConfig(letters=(A, B), end=END, digits=(ONE, TWO), depth=2, vocab_size=6)
    model: Any = PrefixTableForCausalLM(config)
    with torch.no_grad():  # the row of state s is (s, 10 s, 100 s)
        model.model.table.weight.copy_(torch.tensor([1.0, 10.0, 100.0])[:, None] * torch.arange(14.0))
    return model.eval()


def states(model: Any, *ids: int, **keys: Any) -> list[int]:
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids]), **keys).last_hidden_state[0]
    assert torch.equal(hidden[:, 1], 10 * hidden[:, 0])
    assert torch.equal(hidden[:, 3], torch.ones(len(hidden)))
    return [int(state) for state in hidden[:, 0]]


def test_the_states_of_a_sequence_by_hand() -> None:
    # 1 chooses the first table, a and b go down it, anything else goes back to its root; 2 chooses the second
    assert states(table(), ONE, ELSE, A, B, ELSE, B, A, A) == [0, 0, 1, 4, 0, 2, 5, 5]
    assert states(table(), TWO, B, B) == [7, 9, 13]


def test_a_padded_column_is_not_seen() -> None:
    model = table()
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[:, 0] = False
    mask[0, 0] = True
    assert states(model, TWO, ONE, ELSE, A, attention_mask=mask[None, None])[1:] == [0, 0, 1]


def test_the_logits_are_the_row_and_never() -> None:
    with torch.no_grad():
        logits = table()(torch.tensor([[ONE, A]])).logits[0, -1]
    assert logits.tolist() == [1.0, 10.0, 100.0, NEVER, NEVER, NEVER]


@pytest.mark.parametrize("kind", ["table", "transformer"])
def test_what_samples_is_what_scores(kind: str, tmp_path: Path) -> None:
    """Prompts of unlike length, so that some are padded on the left; answers that stop at different times, so that rows leave."""
    make = {"table": make_prefix_table, "transformer": make_few_tokens}[kind]
    model = load_base(make(tmp_path / "model"), dtype=torch.float32, device="cpu")
    roles = Roles(model=model)
    roles.define("policy")
    ids: Any = tiny_tokenizer("qwen2").convert_tokens_to_ids
    letters, end = ids(["a", "b"]), ids("<|im_end|>")
    prompts = [
        Prompt(index=i, token_ids=tuple(ids(list(text))), example=Example(origin=Origin(file="f", row=1 + i)))
        for i, text in enumerate(("1:", "ab1:", "1:ab1b:"))
    ]
    drawn = Engine(roles=roles, role="policy", stop_ids=(end,)).generate(
        prompts, Sampling(max_new_tokens=3, seed=1), k=8
    )
    assert {token for completion in drawn for token in completion.token_ids} <= {*letters, end}
    assert len({len(completion.token_ids) for completion in drawn}) > 1
    rows = []
    for completion in drawn:
        before = prompts[completion.prompt_index].token_ids
        scored = tuple(range(len(before), len(before) + len(completion.token_ids)))
        rows.append(TokenRow(token_ids=(*before, *completion.token_ids), scored=scored))
    with torch.no_grad(), roles.enter("policy"):
        found = score_tokens(model, rows).logp
    assert found is not None
    for completion, logp in zip(drawn, found, strict=True):
        assert logp[: len(completion.token_ids)].tolist() == pytest.approx(completion.logprobs, abs=1e-5)


def test_rows_of_a_table_are_padded_and_not_packed(tmp_path: Path) -> None:
    model = load_base(make_prefix_table(tmp_path / "model"), dtype=torch.float32, device="cpu")
    assert choose_layout([model])[0] == "padded"


def test_a_folder_with_another_table_is_refused(tmp_path: Path) -> None:
    folder = make_prefix_table(tmp_path / "model", depth=2)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"depth": 2', '"depth": 3'))
    with pytest.raises(ModelError):
        load_base(folder, dtype=torch.float32, device="cpu")
