"""Packs: every row once, none too long, tight; joined rows keep their scored tokens; workers give the same rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data import loader, packing, templates
from trimtab.data.loader import load_data
from trimtab.errors import DataError
from trimtab.types import TokenRow

ROWS = [{"instruction": f"question {n} 问题", "output": "answer " * (n % 7 + 1)} for n in range(40)]


def test_packs_by_hand():
    # 7 takes 3; 6 takes 4; then 2 and 1 are left
    assert packing.packs([2, 7, 3, 6, 4, 1], 10) == [[0, 5], [1, 2], [3, 4]]
    assert packing.packs([12, 3], 10) == [[0], [1]]
    assert packing.packs([], 10) == []


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(5, 40))
def test_every_row_once_and_none_too_long(lengths, room):
    found = packing.packs(lengths, room)
    assert sorted(row for pack in found for row in pack) == list(range(len(lengths)))
    for pack in found:
        assert len(pack) == 1 or sum(lengths[row] for row in pack) <= room
    # no two packs that would fit into one: the first would have taken the other's rows
    totals = [sum(lengths[row] for row in pack) for pack in found]
    assert all(a + b > room for i, a in enumerate(totals) for b in totals[i + 1 :])


def test_joined_rows_keep_their_scored_tokens():
    rows = [TokenRow(token_ids=(1, 2, 3), scored=(2,)), TokenRow(token_ids=(4, 5), scored=(1,))]
    assert packing.joined(rows) == TokenRow(token_ids=(1, 2, 3, 4, 5), scored=(2, 4))


def test_documents_as_one_text():
    rows = [TokenRow(token_ids=(1, 2, 3), scored=(1, 2)), TokenRow(token_ids=(4, 5, 6, 7), scored=(1, 2, 3))]
    pieces, owners = packing.recut(rows, 2)
    assert [piece.token_ids for piece in pieces] == [(1, 2), (3, 4), (5, 6)]  # a 7 alone predicts nothing
    assert owners == [0, 0, 1]
    assert all(piece.scored == (1,) for piece in pieces)


@pytest.fixture
def load(config, write, tokenizer):
    folder = write("rows.json", ROWS).parent

    def go(**given):
        stage = given.get("stage", "sft")
        settings = config(**{"dataset_dir": str(folder), "cutoff_len": 64, "stage": stage, **given})
        return load_data(settings, tokenizer, templates.get("chatml", tokenizer))

    return go


def test_neat_packs_hold_the_same_rows(load):
    plain, neat = load(), load(neat_packing=True)
    assert neat.train == plain.train
    assert sorted(row for pack in neat.packs for row in pack) == list(range(40))
    assert 1 < len(neat.packs) < 40
    assert plain.packs is None
    assert "no row sees another" in "\n".join(neat.report.lines())


def test_plain_packing_joins_them(load):
    plain, joined = load(), load(packing=True)
    groups = packing.packs([len(row.token_ids) for row in plain.train], 64)
    assert joined.train == [packing.joined([plain.train[i] for i in group]) for group in groups]
    assert [example.origin.row for example in joined.train_examples] == [group[0] + 1 for group in groups]
    assert sum(len(row.scored) for row in joined.train) == sum(len(row.scored) for row in plain.train)
    assert "see the ones before" in "\n".join(joined.report.lines())


def test_held_out_rows_are_not_packed(load):
    assert load(packing=True, val_size=5).eval == load(val_size=5).eval


def test_pretraining_packs_texts_into_full_pieces(load):
    found = load(stage="pt", packing=True, cutoff_len=50)
    assert {len(row.token_ids) for row in found.train[:-1]} == {50}
    loose = [token for row in load(stage="pt", cutoff_len=50).train for token in row.token_ids]
    packed = [token for row in found.train for token in row.token_ids]
    assert packed == loose[: len(packed)]
    assert len(loose) - len(packed) in (0, 1)  # a piece of one token predicts nothing


def test_documents_are_counted_not_the_pieces_of_them(load):
    found = load(stage="pt", packing=True, cutoff_len=10)
    assert len(load(stage="pt", cutoff_len=10).train) > len(ROWS)
    words = f"packing: {len(ROWS)} texts as one, in {len(found.train)} pieces of at most 10 tokens"
    assert words in found.report.notes


def test_workers_give_the_same_rows(load, monkeypatch):
    monkeypatch.setattr(loader, "LONG", 10)
    alone = load()
    many = load(preprocessing_num_workers=2)
    assert many.train == alone.train
    assert replace(many.report, notes=()) == replace(alone.report, notes=())


def test_what_goes_wrong_in_a_worker_is_raised_here(tokenizer):
    from trimtab.data.workers import mapped

    with pytest.raises(TypeError):
        list(mapped(len, [1, 2], (), 1))
    with pytest.raises(DataError, match="has ended"):
        list(mapped(exit, [3], (), 1))
