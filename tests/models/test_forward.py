"""Scored tokens against the model's own logits, in every layout; micro-batches against their budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.errors import ConfigError
from trimtab.models import forward, lora
from trimtab.models.attention import Segment
from trimtab.models.forward import choose_layout, pack, score_rows, score_tokens
from trimtab.models.heads import ValueHead
from trimtab.models.layout import GRAIN, Layout, in_common, plan
from trimtab.models.roles import Roles
from trimtab.models.tiny import FAMILIES, Family, tiny_model
from trimtab.types import TokenRow

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
PROMPT = (20, 31, 42, 53)
SYSTEM = (70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80)
LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")


def row(prompt: tuple[int, ...], *answer: int) -> TokenRow:
    start = len(prompt)
    return TokenRow(token_ids=(*prompt, *answer), scored=tuple(range(start, start + len(answer))))


ROWS = [
    row(PROMPT, 64, 75, 86),
    row((9, 8), 17),
    row(PROMPT, 64, 3),
    TokenRow(token_ids=(11, 12, 13, 14, 15, 16), scored=(1, 4, 5)),  # trained tokens of several turns
    row(PROMPT, 99, 98, 97, 96, 95),
    row((9, 8, 7, 6, 5, 4, 3), 2),
    # what unlike prompts begin with, and answers
    row(SYSTEM, 64, 75),
    row((*SYSTEM[:9], 5, 6), 7, 8),
    row(SYSTEM, 33, *SYSTEM[2:9], 17, 4),
    row(SYSTEM, 33, *SYSTEM[2:9], 5),
    row(SYSTEM, 64, 75),
]


def adapted(family: Family) -> Roles:
    """A tiny model with one trained adapter."""
    model = tiny_model(family).requires_grad_(False)
    roles = Roles(model=model)
    lora.new_adapter(model, "x", paths=lora.inject(model, ["all"], roles.switch), rank=3, alpha=6, rslora=False, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters(model, "x").values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    roles.define("x", "x", head=ValueHead(64, seed=2))
    assert choose_layout([model])[0] == "shared"
    return roles


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_number_is_that_of_the_row_alone_in_plain_transformers(
    family: Family, layout: Layout, temperature: float
) -> None:
    roles = adapted(family)
    with torch.no_grad(), roles.enter("x") as spec:
        scores = score_tokens(roles.model, ROWS, layout=layout, temperature=temperature, head=spec.head, width=10)
        rewards = score_rows(roles.model, ROWS, spec.head, layout=layout)
        assert scores.logp.shape == (11, 10)
        for i, one in enumerate(ROWS):
            out = roles.model(torch.tensor([one.token_ids]), output_hidden_states=True)
            log_p = torch.log_softmax(out.logits[0] / temperature, dim=-1)
            hidden = out.hidden_states[-1][0]
            before = [index - 1 for index in one.scored]
            targets = [one.token_ids[index] for index in one.scored]
            n = len(before)
            assert scores.mask[i].tolist() == [True] * n + [False] * (10 - n)
            close = {"atol": 1e-5, "rtol": 1e-5}
            torch.testing.assert_close(scores.logp[i, :n], log_p[before, targets], **close)
            torch.testing.assert_close(scores.entropy[i, :n], -(log_p.exp() * log_p).sum(-1)[before], **close)
            torch.testing.assert_close(scores.values[i, :n], spec.head(hidden)[before], **close)
            # the reward is read at the last scored token itself
            torch.testing.assert_close(rewards[i], spec.head(hidden)[one.scored[-1]], **close)
            for array in (scores.logp, scores.entropy, scores.values):
                assert array[i, n:].tolist() == [0.0] * (10 - n)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_nobody_reads_is_not_computed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log-probability is read before its token: the last scored token and what follows it never enter the model."""
    rows = [TokenRow(token_ids=(11, 12, 13, 14, 15), scored=(2, 3)), row(PROMPT, 7), row(PROMPT, 64, 3)]
    model = adapted("llama").model
    seen: list[Tensor] = []
    hidden = forward._hidden
    monkeypatch.setattr(forward, "_hidden", lambda model, packed: (seen.append(packed.ids), hidden(model, packed))[1])
    with torch.no_grad():
        found = score_tokens(model, rows, layout=layout).logp
        for one, logp in zip(rows, found, strict=True):
            plain = torch.log_softmax(model(torch.tensor([one.token_ids])).logits[0], dim=-1)
            wanted = plain[[i - 1 for i in one.scored], [one.token_ids[i] for i in one.scored]]
            torch.testing.assert_close(logp[: len(wanted)], wanted, atol=1e-5, rtol=1e-5)
    ids = {
        "padded": [[11, 12, 13, 0, 0], [*PROMPT, 0], [*PROMPT, 64]],
        "packed": [[11, 12, 13, *PROMPT, *PROMPT, 64]],
        "shared": [[11, 12, 13, *PROMPT, 64]],
    }
    assert [x.tolist() for x in seen] == [ids[layout]]


def summed(roles: Roles, layout: Layout, chunks: list[list[int]]) -> tuple[float, dict[str, Tensor]]:
    """A loss through all four outputs, micro-batch by micro-batch; the loss and its gradient."""
    weight = torch.linspace(0.5, 2.0, len(ROWS))[:, None]
    total = 0.0
    for chunk in chunks:
        with roles.enter("x") as spec:
            rows = [ROWS[i] for i in chunk]
            scores = score_tokens(roles.model, rows, layout=layout, head=spec.head, width=10)
            rewards = score_rows(roles.model, rows, spec.head, layout=layout)
            arrays = (scores.logp * 2 + scores.entropy + scores.values.square()) * weight[chunk]
            loss = arrays.sum() + (rewards * weight[chunk, 0]).sum()
            loss.backward()
            total += float(loss.detach())
    found = {name: p.grad.clone() for name, p in roles.trainable("x").items()}
    for parameter in roles.trainable("x").values():
        parameter.grad = None
    return total, found


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_and_micro_batches_have_one_loss_and_one_gradient(family: Family) -> None:
    roles = adapted(family)
    loss, gradient = summed(roles, "padded", [[i] for i in range(len(ROWS))])
    for layout in LAYOUTS:
        for budget in (1, 12, 30, 10_000):
            other_loss, other = summed(roles, layout, plan(ROWS, budget, layout=layout))
            assert other_loss == pytest.approx(loss, rel=1e-5)
            assert other.keys() == gradient.keys()
            for name in gradient:
                scale = float(gradient[name].abs().max())
                torch.testing.assert_close(other[name], gradient[name], atol=1e-5 * scale, rtol=1e-5, msg=name)


def test_a_tree_is_a_prompt_once_and_its_answers_after_it() -> None:
    packed = pack([ROWS[0], ROWS[1], ROWS[2]], "shared", CPU)
    assert packed.ids.tolist() == [[9, 8, 17, 20, 31, 42, 53, 64, 3, 64, 75, 86]]
    # the second answer goes on from the prompt's positions, the next row starts from 0
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 4, 5, 6]]
    assert packed.places == [(0, [3, 4, 5, 6, 9, 10, 11]), (0, [0, 1, 2]), (0, [3, 4, 5, 6, 7, 8])]
    assert packed.trees is not None
    assert packed.trees.segments == (Segment(0, 3), Segment(3, 7), Segment(7, 9, 1), Segment(9, 12, 1))


def test_unlike_prompts_share_what_they_begin_with() -> None:
    """Rows 6 to 10: eight tokens of all, then a prompt of three tokens more, of whose four answers two are equal and two begin alike."""
    packed = pack(ROWS[6:], "shared", CPU)
    answer = [33, *SYSTEM[2:9]]
    assert packed.ids.tolist() == [[*SYSTEM[:9], 5, 6, 7, 8, *SYSTEM[8:], *answer, 5, 17, 4, 64, 75]]
    assert packed.positions.tolist() == [[*range(13), 8, 9, 10, *range(11, 20), 19, 20, 11, 12]]
    assert packed.trees is not None
    assert packed.trees.segments == (
        Segment(0, 8),
        Segment(8, 13, 0),
        Segment(13, 16, 0),
        Segment(16, 24, 2),
        Segment(24, 25, 3),
        Segment(25, 27, 3),
        Segment(27, 29, 2),
    )
    prompt = [*range(8), 13, 14, 15]
    assert packed.places == [
        (0, [*prompt, 27, 28]),
        (0, list(range(13))),
        (0, [*prompt, *range(16, 24), 25, 26]),
        (0, [*prompt, *range(16, 24), 24]),
        (0, [*prompt, 27, 28]),
    ]


def test_how_much_two_rows_have_in_common() -> None:
    assert GRAIN == 8
    assert in_common(row(SYSTEM, 1), row(SYSTEM, 2, 3)) == 11  # the prompt, which is no multiple of eight
    assert in_common(row(SYSTEM, 1), row(SYSTEM[:10], 1, 3)) == 8  # of unlike prompts a multiple of eight
    assert in_common(row(SYSTEM[:7], 1), row(SYSTEM[:6], 1, 3)) == 0
    assert in_common(row(SYSTEM, *range(9)), row(SYSTEM, *range(12))) == 11 + 8
    assert in_common(row(SYSTEM, 1, 2), row(SYSTEM, 1, 2)) == 13
    assert in_common(row(PROMPT, 1), row((20, 31, 42, 5), 1)) == 0  # as long, and not the same


def test_packed_rows_have_no_padding_and_share_nothing() -> None:
    packed = pack([ROWS[0], ROWS[2]], "packed", CPU)
    assert packed.ids.tolist() == [[20, 31, 42, 53, 64, 75, 86, 20, 31, 42, 53, 64, 3]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]]
    assert packed.trees is not None
    assert packed.trees.segments == (Segment(0, 7), Segment(7, 13))


def test_padded_rows_need_no_trees_and_no_new_positions() -> None:
    packed = pack(ROWS, "padded", CPU)
    assert packed.trees is None
    # a position that starts again would be taken for a second packed sequence, and a mask built for it
    assert packed.positions.tolist() == [list(range(21))] * len(ROWS)


def test_packed_rows_are_refused_by_a_model_that_would_mix_them() -> None:
    model = tiny_model("qwen2")
    model.set_attn_implementation("eager")
    assert choose_layout([model])[0] == "padded"
    with pytest.raises(RuntimeError, match="mix them up"):
        score_tokens(model, ROWS, layout="packed")


@st.composite
def batches(draw: st.DrawFn, unit: int) -> list[TokenRow]:
    prompts = [tuple(range(10, 10 + n)) for n in draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))]
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.sampled_from(prompts))
        rows += [row(prompt, *range(1, 1 + draw(st.integers(1, 15)))) for _ in range(unit)]
    return rows


@pytest.mark.property
@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data(), budget=st.integers(1, 200))
def test_a_plan_covers_every_row_once_and_keeps_to_its_budget(
    unit: int, layout: Layout, data: st.DataObject, budget: int
) -> None:
    rows = data.draw(batches(unit))
    chunks = plan(rows, budget, layout=layout, unit=unit)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(rows)))
    for chunk in chunks:
        for start in range(0, len(chunk), unit):  # units stay together and in order
            assert chunk[start] % unit == 0
            assert chunk[start : start + unit] == list(range(chunk[start], chunk[start] + unit))
        size = pack([rows[i] for i in chunk], layout, CPU).ids.numel()
        assert size <= budget or len(chunk) == unit, (size, chunk)


def test_a_plan_by_hand() -> None:
    rows = [row((1, 2, 3), 4, 5), row((9,), 8), row((1, 2, 3), 4, 6, 7), row((9, 9), 8)]
    assert plan(rows, 12) == [[2, 0], [3, 1]]  # 6 x 2, then 3 x 2; 6 x 3 would be 18
    # together the two answers to (1, 2, 3) are 3 + 2 + 3 = 8 tokens
    assert plan(rows, 12, layout="shared") == [[0, 2, 1], [3]]  # 8 + 2, then 3
    assert plan(rows, 24, layout="shared") == [[0, 2, 1, 3]]
    assert plan(rows, 12, layout="packed") == [[2, 0], [3, 1]]  # 6 + 5, then 3 + 2
    assert plan(rows, 1) == [[2], [0], [3], [1]]


def test_rows_that_begin_alike_come_together() -> None:
    begins = [tuple(range(i, i + 40)) for i in (3, 60)]
    rows = [row((*begins[i % 2], 100 + i), 5, 6) for i in range(6)]
    # three rows of a beginning are 40 + 3 x 3 tokens
    assert plan(rows, 49, layout="shared") == [[0, 2, 4], [1, 3, 5]]
    assert plan(rows, 49, layout="packed") == [[i] for i in range(6)]


def test_equal_rows_are_cut_by_what_is_read_of_them() -> None:
    """They add no tokens, but each has its own scored states."""
    chunks = plan([row(PROMPT, 1, 2, 3, 4, 5)] * 20, 30, layout="shared")
    assert [len(chunk) for chunk in chunks] == [5, 5, 5, 5]  # 4 + 5 x 5 tokens; ten rows would be as many tokens


def test_a_data_set_of_one_prompt_is_still_cut() -> None:
    rows = [row(PROMPT, 1, 2, 3, i) for i in range(20)]
    chunks = plan(rows, 20, layout="shared")
    assert [len(chunk) for chunk in chunks] == [4] * 5  # 4 + 4 x 4 = 20


@pytest.mark.parametrize("family", FAMILIES)
def test_these_models_share_prompts(family: Family) -> None:
    model = tiny_model(family)
    assert choose_layout([model], "auto")[0] == "shared"
    assert choose_layout([model], "packed")[0] == "packed"
    assert choose_layout([model], "padded") == ("padded", "as the file says")


def test_one_model_of_a_run_that_cannot_be_packed_pads_all() -> None:
    odd = tiny_model("qwen2")
    odd.config.layer_types = ["full_attention", "sliding_attention"]
    odd.config.sliding_window = 4096  # cannot be seen on a dozen tokens: the model's config says it
    layout, why = choose_layout([tiny_model("qwen2"), odd])
    assert layout == "padded"
    assert "sliding" in why


def blind_to_trees(model: PreTrainedModel) -> PreTrainedModel:
    """One layer that never learns which rows are packed: it sees all earlier columns."""

    def drop(module: object, args: object, keys: dict[str, object]) -> tuple[object, object]:
        if keys.pop("trees", None) is not None:
            keys["attention_mask"] = None
        return args, keys

    model.model.layers[1].self_attn.register_forward_pre_hook(drop, with_kwargs=True)
    return model


def test_a_model_that_mixes_packed_rows_is_padded() -> None:
    model = blind_to_trees(tiny_model("qwen2"))
    layout, why = choose_layout([model])
    assert layout == "padded"
    assert "not plain causal softmax" in why
    # and is left as it was
    assert model.config._attn_implementation == "sdpa"


def test_a_layout_that_would_change_results_is_refused() -> None:
    with pytest.raises(ConfigError, match="layout: packed would change the results") as caught:
        choose_layout([blind_to_trees(tiny_model("qwen2"))], "packed")
    assert "layout: padded" in str(caught.value)
