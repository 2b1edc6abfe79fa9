"""Tokenizers and templates against the ids of the original."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.sentencepiece import write_tokenizer_files
from tests.fixtures.upstream_case import FIXTURES, index
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from longvila.errors import CheckpointError
from longvila.model.conversation import build_labels
from longvila.model.vila.tokens import (
    IMAGE,
    SENTINEL,
    VIDEO,
    bare_frame_end,
    choose_template,
    frame_end,
    load_tokenizer,
    stop_token_ids,
    write_tokenizer,
)

LLMS = FIXTURES / "parts" / "llm"
QUESTION = {"role": "user", "content": "What?"}
TWO = [QUESTION, {"role": "assistant", "content": "A cat"}, {"role": "user", "content": "Then?"}]
COMPLETE = [*TWO, {"role": "assistant", "content": "It runs"}]
WITH_IMAGE = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": " "},
            {"type": "image"},
            {"type": "text", "text": "What happens? "},
        ],
    }
]


def render(tokenizer: Any, template: Any, chat: Any, **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(
        chat,
        chat_template=template.text,
        tokenize=False,
        system_prompt=template.system_prompt or "",
        **options,
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@pytest.mark.parametrize(
    ("case", "slow_files"),
    [
        pytest.param(case, slow, id=f"{case['llm']}-{case['conversation']}{'-slow' * slow}")
        for case in index()["templates"]
        for slow in ((False,) if case["llm"] == "llama3" else (False, True))
    ],
)
def test_ids_of_every_conversation_format(tmp_path: Path, case: Any, slow_files: bool) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(LLMS / case["llm"], folder)
    if slow_files:  # what the original's training writes
        (folder / "tokenizer.json").unlink()
    tokenizer = load_tokenizer(folder)
    template = choose_template(tokenizer, "x", case["conversation"])
    one = render(tokenizer, template, WITH_IMAGE, add_generation_prompt=True)
    assert one == case["one_turn"]
    if case["two_turns"] is not None:  # the original's "plain" cannot write an answer
        assert render(tokenizer, template, TWO, add_generation_prompt=True) == case["two_turns"]
        assert render(tokenizer, template, COMPLETE) == case["complete"]


@pytest.mark.parametrize("name", sorted(index()["cases"]))
def test_media_ids_and_stop_tokens(name: str) -> None:
    case = index()["cases"][name]
    tokenizer = load_tokenizer(LLMS / case["parts"]["llm"])
    ids = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
    assert dict(zip(("image", "video"), ids, strict=True)) == case["media_token_ids"]
    assert len(tokenizer) == case["tokenizer_length"]
    template = choose_template(tokenizer, "x", case["conversation"])
    assert stop_token_ids(tokenizer, template) == case["stop_token_ids"]


def test_ids_that_exist_are_kept_and_the_sentinel_comes_first() -> None:
    assert load_tokenizer(LLMS / "qwen2_full").convert_tokens_to_ids(IMAGE) == 306
    added = load_tokenizer(LLMS / "qwen2_fewer_rows")
    assert added.convert_tokens_to_ids([SENTINEL, IMAGE, VIDEO]) == [303, 304, 305]


@pytest.mark.parametrize(
    ("folder", "want"),
    [
        ("qwen2-7b-longvila-1M", "chat template of the tokenizer"),
        ("VILA1.5-3b", "vicuna_v1"),
        ("VILA1.5-13b-AWQ", "vicuna_v1"),
        ("VILA1.5-40b", "hermes-2"),
        ("Llama-3-LongVILA-8B-512Frames", "llama_3"),
    ],
)
def test_families_told_by_name(folder: str, want: str) -> None:
    template = choose_template(load_tokenizer(LLMS / "qwen2_full"), folder)
    assert want in template.reason
    assert "as asked" in choose_template(load_tokenizer(LLMS / "llama3"), folder, "plain").reason


def test_without_any_template_there_is_none(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(LLMS / "llama3")
    template = choose_template(tokenizer, "model")
    assert template.text is None and "--conversation" in template.reason
    assert stop_token_ids(tokenizer, template) == [tokenizer.eos_token_id]
    with pytest.raises(CheckpointError, match="'qwen2' is not known; known: auto, hermes-2"):
        choose_template(tokenizer, "model", "qwen2")
    with pytest.raises(CheckpointError, match="no tokenizer_config"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("system", ["You are a helpful assistant", "S.", ""])
def test_chatml_becomes_the_template_that_marks_answers(system: str) -> None:
    tokenizer = load_tokenizer(LLMS / "qwen2_full")
    own = tokenizer.chat_template.replace("You are a helpful assistant.", system)
    tokenizer.chat_template = own
    template = choose_template(tokenizer, "x")
    assert "generation" in template.text and template.system_prompt == system
    want = tokenizer.apply_chat_template(COMPLETE, tokenize=False)
    assert render(tokenizer, template, COMPLETE) == tokenizer(want).input_ids


def test_another_template_is_kept_and_takes_media() -> None:
    tokenizer = load_tokenizer(LLMS / "qwen2_full")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    )
    template = choose_template(tokenizer, "x")
    assert "no labels" in template.reason
    got = render(tokenizer, template, [*WITH_IMAGE, {"role": "assistant", "content": " yes "}])
    assert tokenizer.decode(got) == "[user] <image>What happens?[assistant] yes"


def test_a_media_token_typed_as_text_is_removed() -> None:
    tokenizer = load_tokenizer(LLMS / "qwen2_full")
    template = choose_template(tokenizer, "x", "plain")
    parts = [{"type": "video"}, {"type": "text", "text": " a <image> b "}]
    got = render(tokenizer, template, [{"role": "user", "content": parts}])
    assert tokenizer.decode(got) == "<vila/video>a  b\n"


def test_frames_end_as_the_original_tokenises_it() -> None:
    llama = load_tokenizer(LLMS / "llama3")
    text = frame_end(llama, "\n", token_order="row")
    assert text == "<|begin_of_text|>\n" and bare_frame_end(llama, text) == "\n"
    assert frame_end(llama, "\n", token_order="column") == "\n"
    assert bare_frame_end(llama, "\n") == "\n"
    qwen = load_tokenizer(LLMS / "qwen2_full")
    for end in ("\n", "", ">\n"):
        assert frame_end(qwen, end, token_order="row") == end == bare_frame_end(qwen, end)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer_files(tmp_path_factory.mktemp("sentencepiece"))


def test_a_sentencepiece_tokenizer_reads_as_in_the_original(sentencepiece: Path) -> None:
    """The first word has its space, texts behind special tokens have none, answers are whole."""
    tokenizer = load_tokenizer(sentencepiece)
    template = choose_template(tokenizer, "VILA1.5-3b")
    prompts, spans = render_jinja_template(
        conversations=[[QUESTION, {"role": "assistant", "content": "yes"}, *TWO]],
        chat_template=template.text,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    encoded = tokenizer(
        prompts, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt"
    )
    ids = encoded.input_ids[0]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[:2] == ["<s>", "▁A"]
    assert tokenizer(prompts[0].removeprefix("<s> ")).input_ids == ids.tolist()
    behind = [after for piece, after in itertools.pairwise(pieces) if piece == "</s>"]
    assert behind == ["U", "U"]
    labels = build_labels(encoded.input_ids, encoded.attention_mask, encoded.offset_mapping, spans)[
        0
    ]
    learned = tokenizer.convert_ids_to_tokens(ids[labels != -100])
    assert learned == ["▁yes", "</s>", "▁A", "▁", "c", "a", "t", "</s>"]
    assert torch.equal(labels[labels != -100], ids[labels != -100])


def test_a_sentencepiece_tokenizer_ends_frames_as_the_original(sentencepiece: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece)
    text = frame_end(tokenizer, "\n", token_order="row")
    inside = tokenizer(f"{IMAGE}{text}{IMAGE}", add_special_tokens=False).input_ids[1:-1]
    assert inside == tokenizer("\n").input_ids
    assert tokenizer.convert_ids_to_tokens(inside) == ["<s>", "▁", "<0x0A>"]
    assert bare_frame_end(tokenizer, text) == "\n"
    # What VILA1.5 was trained on: LLaVA's pieces between images, whose first token is a space.
    text = frame_end(tokenizer, "\n", token_order="column")
    inside = tokenizer(f"{IMAGE}{text}{IMAGE}", add_special_tokens=False).input_ids[1:-1]
    assert tokenizer.convert_ids_to_tokens(inside) == ["▁", "<0x0A>"]
    assert bare_frame_end(tokenizer, text) == "\n"


def test_a_sentencepiece_tokenizer_goes_back(sentencepiece: Path, tmp_path: Path) -> None:
    """Its own class reads a SentencePiece file in transformers 4, which a saved model has not."""
    tokenizer = load_tokenizer(sentencepiece)
    tokenizer.save_pretrained(tmp_path / "ours")
    (tmp_path / "new").mkdir()
    write_tokenizer(tmp_path / "ours", tmp_path / "new", None)
    settings = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = load_tokenizer(tmp_path / "new")
    for text in ("yes", f"A{IMAGE}yes</s>U", "\n"):
        assert again(text).input_ids == tokenizer(text).input_ids


def test_a_sentencepiece_file_says_what_reads_it(
    sentencepiece: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(sentencepiece / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    (tmp_path / "tokenizer.model").write_bytes(b"spm")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name)
    )
    with pytest.raises(CheckpointError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["qwen2_full", "qwen2_fewer_rows", "llama3"])
def test_tokenizers_go_back(tmp_path: Path, name: str) -> None:
    ours, new, exact = tmp_path / "ours", tmp_path / "new", tmp_path / "exact"
    tokenizer = load_tokenizer(LLMS / name)
    tokenizer.save_pretrained(ours)
    for folder, origin in ((new, None), (exact, LLMS / name)):
        folder.mkdir()
        write_tokenizer(ours, folder, origin)
        again = load_tokenizer(folder)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again("a.\n\nb <image>").input_ids == tokenizer("a.\n\nb <image>").input_ids
        assert again.eos_token == tokenizer.eos_token and again.pad_token == tokenizer.pad_token
    assert (exact / "tokenizer.json").read_bytes() == (LLMS / name / "tokenizer.json").read_bytes()
    assert {"vocab.json", "merges.txt"} <= {f.name for f in new.iterdir()}
    settings = json.loads((new / "tokenizer_config.json").read_text())
    assert "TokenizersBackend" not in str(settings["tokenizer_class"])
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(ours)
    shutil.rmtree(new)
    new.mkdir()
    write_tokenizer(ours, new, LLMS / name)
    assert "<new>" in AutoTokenizer.from_pretrained(new).get_vocab()


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=12),
    spans=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), max_size=5),
    pad=st.integers(0, 3),
)
def test_targets_are_the_tokens_that_begin_in_a_range_or_reach_into_it(
    tokens: list[int], spans: list[tuple[int, int]], pad: int
) -> None:
    ends = list(itertools.accumulate(tokens))
    offsets = [*([(0, 0)] * pad), *zip([0, *ends], ends, strict=False)]
    ranges = [(start, start + length) for start, length in spans]
    ids = torch.arange(len(offsets))[None]
    mask = (ids >= pad).long()
    labels = build_labels(ids, mask, torch.tensor(offsets).reshape(1, -1, 2), [ranges])
    expected = [
        i if i >= pad and any((a >= s or b > s) and a < e for s, e in ranges) else -100
        for i, (a, b) in enumerate(offsets)
    ]
    assert labels[0].tolist() == expected


def test_labels_of_very_long_conversations_take_no_minutes() -> None:
    """Answer by answer over all tokens, this took more than a minute."""
    answers, tokens = 20_000, 400_000
    starts = torch.arange(tokens)
    ranges = [(i * 20 + 5, i * 20 + 9) for i in range(answers)]
    before = time.process_time()
    labels = build_labels(
        starts[None],
        torch.ones(1, tokens),
        torch.stack([starts, starts + 1], -1)[None],
        [ranges],
    )
    assert time.process_time() - before < 10
    assert int((labels != -100).sum()) == 4 * answers
