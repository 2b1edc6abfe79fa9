"""Long texts: cut where the ids stay those of the whole, or said to be too long."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from longvila.data import stretches as room
from longvila.data.stretches import encode, stretches

WORDS = (
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CORPUS = [
    "It's a long way; don't you think?\n\n  The end, the rest: 3.14 (of it).\r\n" * 9,
    "今天天气很好，我们去公园散步。他说：“你好！”然后离开了" * 9,  # noqa: RUF001
    "Привет, мир! Как дела?\t cafe\u0301 \u00a0 🙂\u200d <|end|>, the last  word\n" * 9,
]


def made(kind: str) -> Any:
    pieces = pre_tokenizers
    how: dict[str, tuple[Any, Any]] = {
        "split": (
            pieces.Sequence(
                [
                    pieces.Split(Regex(WORDS), "isolated"),
                    pieces.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            normalizers.NFC(),
        ),
        "bytes": (pieces.ByteLevel(add_prefix_space=True), None),
        "spaces": (pieces.Metaspace(), normalizers.NFKC()),
        "one word": (
            None,
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        ),
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = how[kind]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500, show_progress=False, initial_alphabet=pieces.ByteLevel.alphabet()
        ),
    )
    tokenizer.add_special_tokens(["<|end|>", AddedToken("the rest")])
    return tokenizer


@pytest.mark.parametrize("kind", ["split", "bytes", "spaces", "one word"])
def test_ids_of_stretches_are_those_of_the_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "STRETCH", 60)
    monkeypatch.setattr(room, "AT_ONCE", 500)
    backend, draw = made(kind), random.Random(5)
    signs = ["<|end|>", "the rest", " ", "  ", "\n", "\r\n", *"abz'sé文字。，01._-\u0301🙂\t"]  # noqa: RUF001
    texts = ["", *CORPUS, "".join(draw.choice(signs) for _ in range(3000)), "x" * 400, "end "]
    whole = [each.ids for each in backend.encode_batch(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in encode(backend, texts)] == whole
    for text in texts:
        assert "".join(stretches(backend, text)) == text
    cut = [len(stretches(backend, text)) for text in texts]
    assert max(cut) > 9 if kind != "one word" else max(cut) == 1


def test_what_cannot_be_cut_is_refused_before_memory_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "STRETCH", 50)
    monkeypatch.setattr(room, "LONGEST", 1000)
    backend = made("split")
    assert len(stretches(backend, "ab " * 2000)) > 50
    for text in ("ACGT" * 500, "ab " * 20 + "ACGT" * 500):
        with pytest.raises(ValueError, match=r"more than 1,000 characters .* lets it be cut"):
            stretches(backend, text)
