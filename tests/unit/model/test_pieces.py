"""Pieces of a text that must not merge when it is tokenised, and runs that are tokenised as one."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longvila.model.pieces import CUT, tokenize_pieces
from longvila.testing.tiny import tiny_processor, tiny_tokenizer

MARK = "<image>"
VIDEO = "<vila/video>"
TOKENIZER = tiny_tokenizer()


def test_pieces_are_tokenised_apart() -> None:
    tokenizer = tiny_tokenizer()
    apart = tokenize_pieces(tokenizer, [f"a\n{CUT}\nb"], MARK)["input_ids"][0]
    assert apart == tokenizer("a\n").input_ids + tokenizer("\nb").input_ids
    assert apart != tokenizer("a\n\nb").input_ids  # two newlines have a token of their own


def test_texts_without_marks_are_the_tokenizer_s() -> None:
    tokenizer = tiny_tokenizer()
    want = tokenizer(["a\n\nb", "c"], padding=True)
    assert tokenize_pieces(tokenizer, ["a\n\nb", "c"], MARK, padding=True) == dict(want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_offsets_and_padding(side: str) -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"ab {MARK}x\n{CUT}\n{CUT}the end.", f"{MARK}\n{CUT}"]
    got = tokenize_pieces(
        tokenizer, texts, MARK, padding=True, padding_side=side, return_offsets_mapping=True
    )
    lengths = {len(row) for name in got for row in got[name]}
    assert len(lengths) == 1
    for text, ids, mask, spans in zip(
        texts, got["input_ids"], got["attention_mask"], got["offset_mapping"], strict=True
    ):
        plain = text.replace(CUT, "")
        real = [i for i, keep in enumerate(mask) if keep]
        assert real == list(range(len(ids)))[-len(real) :] if side == "left" else real[0] == 0
        assert "".join(plain[a:b] for a, b in spans) == plain
        assert ids.count(tokenizer.convert_tokens_to_ids(MARK)) == 1
        for i in real:
            assert tokenizer.decode([ids[i]]) == plain[slice(*spans[i])]


def test_marked_texts_are_not_truncated() -> None:
    with pytest.raises(ValueError, match="cannot be truncated"):
        tokenize_pieces(tiny_tokenizer(), [f"a{CUT}"], MARK, truncation=True, max_length=1)


def test_lengths_are_those_of_the_ids() -> None:
    texts = [f"a{MARK * 4}{CUT}b", f"{MARK}{CUT}"]
    out = tokenize_pieces(tiny_tokenizer(), texts, MARK, placeholders=(MARK,), return_length=True)
    assert out["length"] == [len(ids) for ids in out["input_ids"]] == [6, 1]
    with pytest.raises(ValueError, match="do not go with text_pair"):
        tokenize_pieces(tiny_tokenizer(), texts, MARK, text_pair=texts)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.lists(
            st.sampled_from([CUT, MARK, MARK * 3, VIDEO, VIDEO * 4, "\n", "\n\n", " x", "the"]),
            max_size=9,
        ).map("".join),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_runs_change_nothing(texts: list[str], offsets: bool) -> None:
    options = {"padding": True, "padding_side": "left", "return_offsets_mapping": offsets}
    want = tokenize_pieces(TOKENIZER, texts, MARK, **options)
    got = tokenize_pieces(TOKENIZER, texts, MARK, placeholders=(MARK, VIDEO), **options)
    assert list(got) == list(want)
    for name, rows in want.items():
        assert [[tuple(x) if offsets and name == "offset_mapping" else x for x in row]
                for row in got[name]] == [
            [tuple(x) if offsets and name == "offset_mapping" else x for x in row] for row in rows
        ]  # fmt: skip


def test_an_hour_of_video_is_tokenised_at_once() -> None:
    processor = tiny_processor()
    processor.frame_grid = [14, 14]
    text = "Hi " + processor.video_text(6000, separator="\n", cut=CUT) + "\nWhat?"
    start = time.process_time()  # the machine may have other work
    ids = tokenize_pieces(TOKENIZER, [text], MARK, placeholders=(MARK, VIDEO))["input_ids"][0]
    spent = time.process_time() - start
    assert ids.count(processor.video_token_id) == 6000 * 196
    ends = TOKENIZER("Hi ").input_ids, TOKENIZER("\nWhat?").input_ids
    assert ids[: len(ends[0])] == ends[0] and ids[-len(ends[1]) :] == ends[1]
    assert spent < 5  # half a second of a core, where token by token is fourteen


def test_a_placeholder_that_is_not_kept_whole_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not keep placeholders whole"):
        tokenize_pieces(TOKENIZER, ["a <vila> b"], MARK, placeholders=("<vila>",))


def test_no_warning_of_a_length_that_is_not_the_prompt_s() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    tokenize_pieces(tokenizer, ["a b c d e f g h i j" + CUT + "k"], "<|im_end|>")
    assert not tokenizer.deprecation_warnings
    tokenizer("a b c d e f g h i j")  # what it says of a text as such is its own affair
    assert tokenizer.deprecation_warnings
