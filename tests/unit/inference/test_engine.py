"""One process: the engine's tokens are those of generate, however the prompt is cut and shared."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from longvila.errors import ContextLengthError
from longvila.inference.engine import Engine
from longvila.testing.tiny import tiny_tokenizer

from .cases import greedy, language_model, prompt, video_model, video_prompt


def said(out: Tensor) -> list[int]:
    return out[0].tolist()


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_chunk_size_does_not_change_tokens_of_text(name: str, chunk: int) -> None:
    model, inputs = language_model(name), prompt(41)
    expected = greedy(model, inputs, 12)
    with Engine(model, chunk_tokens=chunk, split_tokens=3) as engine:
        out = engine.generate(inputs, max_new_tokens=12, do_sample=False)
    assert said(out) == expected


@pytest.mark.parametrize("chunk", [5, 64, 1000])
@pytest.mark.parametrize(
    "overrides", [{}, {"pool_sizes": [[2, 1, 1], [1, 3, 3]]}, {"frame_separator": ""}]
)
def test_chunk_size_does_not_change_tokens_of_video(chunk: int, overrides: dict) -> None:
    model = video_model(**overrides)
    inputs = video_prompt(model, videos=(5, 2), images=2)
    expected = greedy(model, inputs, 10)
    with Engine(model, chunk_tokens=chunk) as engine:
        out = engine.generate(inputs, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert said(out) == expected


def test_prefill_gives_the_logits_of_the_last_token_and_decode_those_after() -> None:
    model, inputs = language_model(), prompt(30)
    whole = model(**inputs).logits[0]
    with Engine(model, chunk_tokens=8) as engine:
        cache = engine.prefill({"input_ids": inputs["input_ids"][:, :21]})
        assert cache.get_seq_length() == 21
        torch.testing.assert_close(cache.logits[0], whole[20])
        logits = engine.decode(cache, inputs["input_ids"][:, 21:22])
        torch.testing.assert_close(logits[0], whole[21])
        cache = engine.fork(cache)  # what follows attends to a segment and a tail
        logits = engine.decode(cache, inputs["input_ids"][:, 22:])
        torch.testing.assert_close(logits[0], whole[29])
    assert cache.input_ids.tolist() == inputs["input_ids"].tolist()


def test_frames_are_encoded_as_the_prompt_is_read() -> None:
    model = video_model()
    inputs = video_prompt(model, videos=(8,))
    expected = greedy(model, inputs, 6)
    events: list[str] = []
    pixels = inputs.pop("pixel_values_videos")

    def film() -> Any:
        for number, piece in enumerate(pixels.split([1, 3, 2, 2])):
            events.append(f"decoded {number}")
            yield piece

    seen: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].shape[0]),
        with_kwargs=True,
    )
    model.model.language_model.register_forward_hook(
        lambda module, args, output: events.append("read")
    )
    with Engine(model, chunk_tokens=20) as engine:
        out = engine.generate(
            {**inputs, "pixel_values_videos": film()}, max_new_tokens=6, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    assert said(out) == expected
    assert max(seen) <= 2 and sum(seen) == 8
    # The first chunk is read before the film has been decoded to its end.
    assert events.index("read") < events.index("decoded 3")


def test_a_rank_s_own_frames_are_all_frames_on_one_process() -> None:
    model = video_model()
    inputs = video_prompt(model, videos=(3,))
    expected = greedy(model, inputs, 4)
    inputs["local_pixel_values_videos"] = inputs.pop("pixel_values_videos")
    with Engine(model) as engine:
        out = engine.generate(inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert said(out) == expected


def test_forks_share_the_prefix_and_do_not_see_each_other() -> None:
    model, inputs = language_model(), prompt(50)
    questions = [prompt(n, seed=n)["input_ids"] for n in (1, 4, 9)]
    whole = [torch.cat([inputs["input_ids"], q], 1) for q in questions]
    expected = [greedy(model, {"input_ids": each}, 8) for each in whole]
    with Engine(model, chunk_tokens=16) as engine:
        film = engine.prefill(inputs)
        turns = [engine.fork(film) for _ in questions]
        outs = [
            said(engine.generate(turn, q, max_new_tokens=8, do_sample=False))
            for turn, q in zip(turns, questions, strict=True)
        ]
        assert outs == expected
        first = film.shards[0].segments[0][0]
        for turn in turns:
            assert turn.shards[0].segments[0][0].data_ptr() == first.data_ptr()
        # The prefix itself goes on as if nobody had asked.
        assert (
            said(engine.generate(film, questions[1], max_new_tokens=8, do_sample=False))
            == (expected[1])
        )


def test_a_conversation_goes_on_behind_the_answer() -> None:
    model, inputs = language_model(), prompt(20)
    with Engine(model) as engine:
        cache = engine.prefill(inputs)
        answer = engine.generate(cache, max_new_tokens=5, do_sample=False)
        # The last token was never read; a next turn reads it.
        assert cache.get_seq_length() == 24 == cache.input_ids.shape[1]
        turn = torch.cat([answer[:, -1:], prompt(6, seed=3)["input_ids"]], 1)
        out = engine.generate(cache, turn, max_new_tokens=5, do_sample=False)
    whole = torch.cat([answer, turn[:, 1:]], 1)
    assert said(out) == greedy(model, {"input_ids": whole}, 5)


def test_a_second_video_is_read_onto_a_cache() -> None:
    model = video_model()
    first, second = video_prompt(model, videos=(3,)), video_prompt(model, videos=(2,))
    second["pixel_values_videos"] = -second["pixel_values_videos"]
    both = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "pixel_values_videos": torch.cat(
            [first["pixel_values_videos"], second["pixel_values_videos"]]
        ),
        "video_num_frames": torch.tensor([3, 2]),
    }
    expected = greedy(model, both, 6)
    with Engine(model, chunk_tokens=13) as engine:
        cache = engine.prefill(second, onto=engine.prefill(first))
        out = engine.generate(cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert said(out) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
        {"repetition_penalty": 1.3, "do_sample": False},
        {"no_repeat_ngram_size": 2, "do_sample": False},
    ],
)
def test_options_of_generate_mean_what_they_mean_elsewhere(options: dict) -> None:
    model, inputs = language_model(), prompt(23)
    expected = model.generate(**inputs, max_new_tokens=9, pad_token_id=0, **options).tolist()
    with Engine(model) as engine:
        cache = engine.prefill(inputs)
        out = engine.generate(cache, max_new_tokens=9, **options)
        assert out.tolist() == expected


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_gives_the_same_tokens(how: str) -> None:
    model, inputs = language_model(), prompt(30)
    inputs["input_ids"][0, 20:] = inputs["input_ids"][0, 5:15]  # something to look up
    assistant = language_model("llama", heads=4, kv_heads=2)
    options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": assistant}
    question = inputs["input_ids"][:, 5:9]
    whole = torch.cat([inputs["input_ids"], question], 1)
    expected = greedy(model, {"input_ids": whole}, 12)
    with Engine(model, chunk_tokens=8) as engine:
        film = engine.prefill(inputs)
        turn = engine.fork(film)
        out = engine.generate(turn, question, max_new_tokens=12, do_sample=False, **options)
        assert said(out) == expected
        assert turn.get_seq_length() == turn.input_ids.shape[1] == 45
        # The conversation goes on, and the prefix is what it was.
        more = engine.generate(turn, out[:, -1:], max_new_tokens=3, do_sample=False)
        assert said(more) == greedy(model, {"input_ids": out}, 3)
        again = engine.generate(film, question, max_new_tokens=12, do_sample=False, **options)
        assert said(again) == expected
        with pytest.raises(ValueError, match="not those that the cache holds"):
            model(
                input_ids=torch.ones(1, 80, dtype=torch.long),
                attention_mask=torch.ones(1, 80, dtype=torch.long),
                past_key_values=turn,
            )


def test_sampling_with_a_seed_is_that_of_generate_and_leaves_the_generator_alone() -> None:
    model, inputs = language_model(), prompt(23)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "pad_token_id": 0}
    torch.manual_seed(11)
    expected = model.generate(**inputs, **options).tolist()
    with Engine(model) as engine:
        cache = engine.prefill(inputs)
        before = torch.get_rng_state()
        out = engine.generate(engine.fork(cache), seed=11, **options)
        assert torch.equal(before, torch.get_rng_state())
        other = engine.generate(engine.fork(cache), seed=12, **options)
    assert out.tolist() == expected
    assert other.tolist() != expected


class At(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class Heard:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streamers_and_criteria_work() -> None:
    model, inputs = language_model(), prompt(10)
    heard = Heard()
    with Engine(model) as engine:
        out = engine.generate(
            inputs, max_new_tokens=50, do_sample=False, streamer=heard,
            stopping_criteria=StoppingCriteriaList([At(14)]),
        )  # fmt: skip
    assert out.shape[1] == 14
    assert heard.tokens == [*said(out), -1]


@pytest.mark.parametrize("name", ["chunk_tokens", "split_tokens"])
def test_pieces_without_tokens_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Engine(language_model(), **{name: 0})


def test_close_gives_everything_back() -> None:
    model, inputs = language_model(), prompt(9)
    attention = model.config._attn_implementation
    engine = Engine(model)
    with pytest.raises(ValueError, match="close it first"):
        Engine(model)
    cache = engine.prefill(inputs)
    assert greedy(model, inputs, 3)  # other calls are what they were
    engine.close()
    engine.close()
    assert "forward" not in vars(model) and model.config._attn_implementation == attention
    with pytest.raises(RuntimeError, match="does not attend over it"):
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
    # The failed step left nothing in the cache.
    assert cache.get_seq_length() == 9 == cache.shards[0].num_local_tokens


def test_what_cannot_be_read_is_refused() -> None:
    model = video_model(text_config={"max_position_embeddings": 80})
    inputs = video_prompt(model, videos=(4,))
    with Engine(model) as engine:
        with pytest.raises(ValueError, match=r"36 video placeholders .* give 27 rows"):
            engine.prefill({**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:3],
                            "video_num_frames": torch.tensor([3])})  # fmt: skip
        with pytest.raises(ValueError, match="frames end 1 before"):
            engine.prefill({**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:3]})
        text = {"input_ids": torch.ones(1, 76, dtype=torch.long)}
        with pytest.raises(ContextLengthError, match="81 tokens do not fit"):
            engine.decode(engine.prefill(text), torch.ones(1, 5, dtype=torch.long))
        with pytest.raises(ContextLengthError):
            engine.prefill({"input_ids": torch.ones(1, 81, dtype=torch.long)})
        with pytest.raises(ValueError, match="one sample"):
            engine.prefill({"input_ids": torch.ones(2, 6, dtype=torch.long)})
        cache = engine.prefill({"input_ids": torch.ones(1, 6, dtype=torch.long)})
        for call in (engine.decode, engine.generate):
            with pytest.raises(ValueError, match=r"must be \(B, T\)"):
                call(cache, torch.ones(4, dtype=torch.long))
        with pytest.raises(ValueError, match="hides tokens"):
            model(
                input_ids=torch.ones(1, 2, dtype=torch.long),
                attention_mask=torch.tensor([[0] * 4 + [1] * 4]),
                past_key_values=cache,
            )
        with pytest.raises(ValueError, match="video placeholders"):
            engine.decode(cache, torch.tensor([[model.config.video_token_id, 1]]))
        with pytest.raises(ValueError, match="pixel_values_videos does not go with"):
            model(
                input_ids=torch.ones(1, 2, dtype=torch.long),
                pixel_values_videos=inputs["pixel_values_videos"],
                past_key_values=cache,
            )


@pytest.mark.parametrize("ids", [None, prompt(4, seed=4)["input_ids"]])
def test_what_fails_leaves_the_cache_as_it_was(ids: Tensor | None) -> None:
    model, inputs = language_model(), prompt(20)

    class Full(Heard):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.tokens) > 26:
                raise OSError("disk full")

    with Engine(model, chunk_tokens=8) as engine:
        cache = engine.prefill(inputs)
        expected = said(engine.generate(engine.fork(cache), ids, max_new_tokens=9, do_sample=False))
        before = cache.logits
        with pytest.raises(ValueError, match="bogus"):
            engine.generate(cache, ids, bogus=1)
        with pytest.raises(OSError, match="disk full"):
            engine.generate(cache, ids, max_new_tokens=9, do_sample=False, streamer=Full())
        head = model.get_output_embeddings()
        # The second of two chunks fails: nothing of the first is left.
        text, more = engine.text, prompt(16, seed=1)
        with fails_at(2, text), pytest.raises(OSError, match="call 2"):
            engine.prefill(more, onto=cache)
        with fails_at(2, head), pytest.raises(OSError, match="call 2"):
            engine.decode(cache, more["input_ids"])
        assert cache.get_seq_length() == cache.shards[0].num_local_tokens == 20
        assert cache.logits is before and cache.input_ids.shape == (1, 20)
        assert said(engine.generate(cache, ids, max_new_tokens=9, do_sample=False)) == expected


def fails_at(number: int, module: Any) -> Any:
    calls, forward = itertools.count(1), module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise OSError(f"call {number}")
        return forward(*args, **kwargs)

    return mock.patch.object(module, "forward", call)


def test_options_that_are_the_model_s_own_are_obeyed() -> None:
    model, inputs = language_model(), prompt(20)
    config = GenerationConfig(max_new_tokens=5, pad_token_id=0)
    model.generation_config.update(num_beams=3, do_sample=False)
    expected = model.generate(**inputs, generation_config=config).tolist()
    # Checkpoints that were trained with gradient checkpointing often come with this one.
    model.generation_config.use_cache = False
    with Engine(model) as engine:
        cache = engine.prefill(inputs)
        for options in ({"generation_config": config}, {"max_new_tokens": 5, "pad_token_id": 0}):
            assert engine.generate(cache, **options).tolist() == expected
        assert {part[0].shape for part in cache.shards[0].parts()} == {(1, 20, 3, 8)}
        model.generation_config.update(num_beams=1, do_sample=True)
        assert engine.generate(cache, generation_config=config, seed=1).tolist() != expected
        end = expected[0][20:]
        model.generation_config.update(do_sample=False, eos_token_id=end)
        for answer in engine.generate_many(
            engine.prefill(inputs), [torch.tensor([n]) for n in (1, 2, 3)], generation_config=config
        ):
            found = torch.isin(answer, torch.tensor(end)).nonzero().flatten().tolist()
            assert found in ([], [len(answer) - 1])


def test_one_question_of_many_is_answered_and_the_prefix_stays() -> None:
    model, inputs = language_model(), prompt(20)
    question = prompt(4, seed=4)["input_ids"]
    expected = greedy(model, {"input_ids": torch.cat([inputs["input_ids"], question], 1)}, 6)[24:]
    with Engine(model) as engine:
        cache = engine.prefill(inputs)
        for _ in range(2):
            (answer,) = engine.generate_many(cache, [question], max_new_tokens=6, do_sample=False)
            assert answer.tolist() == expected and cache.get_seq_length() == 20


def test_padding_of_a_prompt_is_left_out() -> None:
    model, inputs = language_model(), prompt(9)
    expected = greedy(model, inputs, 4)[9:]
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), inputs["input_ids"]], 1),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 9]),
    }
    with Engine(model) as engine:
        out = engine.generate(padded, max_new_tokens=4, do_sample=False)
    assert said(out)[9:] == expected


@pytest.mark.parametrize("lengths", [(3, 1), (2, 7, 4), (5, 5)])
def test_questions_of_different_lengths_are_answered_together(lengths: tuple[int, ...]) -> None:
    model, inputs = language_model(), prompt(40)
    questions = [prompt(n, seed=n)["input_ids"][0] for n in lengths]
    wholes = [torch.cat([inputs["input_ids"], q[None]], 1) for q in questions]
    expected = [greedy(model, {"input_ids": w}, 8)[w.shape[1] :] for w in wholes]
    with Engine(model, split_tokens=8) as engine:
        cache = engine.prefill(inputs)
        answers = engine.generate_many(cache, questions, max_new_tokens=8, do_sample=False)
        assert [a.tolist() for a in answers] == expected
        assert cache.get_seq_length() == 40 and cache.pads is None
        end = expected[0][3]
        cut = engine.generate_many(
            cache, questions, max_new_tokens=8, do_sample=False, eos_token_id=end
        )
        for answer, whole in zip(cut, expected, strict=True):
            stop = whole.index(end) + 1 if end in whole else 8
            assert answer.tolist() == whole[:stop]
        beams = engine.generate_many(
            cache, questions, max_new_tokens=4, num_beams=2, do_sample=False
        )
        # Logits of a step, and of one after it that all rows take; then the rows go apart again.
        fork = engine.fork(cache)
        logits = [engine.decode(fork, questions), engine.decode(fork, torch.ones(len(lengths), 3,
                                                                dtype=torch.long))]  # fmt: skip
        later = engine.decode(engine.fork(fork), torch.full((len(lengths), 1), 2))
        if len(set(lengths)) > 1:
            with pytest.raises(ValueError, match="differ in length at one place"):
                engine.decode(engine.fork(fork), questions)
        fork.crop(-3 - max(lengths))
        assert fork.pads is None and greedy_behind(engine, fork) == greedy(model, inputs, 3)
    for row, whole in enumerate(wholes):
        more = torch.cat([whole, torch.ones(1, 3, dtype=torch.long), torch.tensor([[2]])], 1)
        after = model(input_ids=more).logits[0]
        torch.testing.assert_close(logits[0][row], after[whole.shape[1] - 1])
        torch.testing.assert_close(logits[1][row], after[-2])
        torch.testing.assert_close(later[row], after[-1])
        alone = model.generate(
            whole, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0
        )
        assert beams[row].tolist() == alone[0, whole.shape[1] :].tolist()


@pytest.mark.parametrize("lengths", [(3, 5), (4,)])
def test_several_answers_a_question_come_question_by_question(lengths: tuple[int, ...]) -> None:
    model, inputs = language_model(), prompt(20)
    questions = [prompt(n, seed=n)["input_ids"] for n in lengths]
    options: dict[str, Any] = {"num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    with Engine(model) as engine:
        cache = engine.prefill(inputs)
        found = engine.generate_many(cache, questions, max_new_tokens=4, **options)
        # As the model's own configuration says.
        model.generation_config.update(**options)
        again = engine.generate_many(cache, questions, max_new_tokens=4)
        assert cache.get_seq_length() == 20
    assert [[a.tolist() for a in each] for each in found] == [
        model.generate(
            torch.cat([inputs["input_ids"], q], 1), max_new_tokens=4, pad_token_id=0, **options
        )[:, 20 + q.shape[1] :].tolist()
        for q in questions
    ]  # fmt: skip
    assert str(again) == str(found)


def test_filler_is_nothing_that_was_said() -> None:
    model, inputs = language_model(), prompt(20)
    with torch.no_grad():
        model.lm_head.weight[0] *= 3  # the id that filler would have
    questions = [prompt(n, seed=n)["input_ids"][0] for n in (1, 6, 3, 2)]
    wholes = [torch.cat([inputs["input_ids"], q[None]], 1) for q in questions]
    options = {"repetition_penalty": 3.0}
    expected = [greedy(model, {"input_ids": w}, 8, **options)[w.shape[1] :] for w in wholes]
    assert any(0 in answer for answer in expected)
    with Engine(model) as engine:
        answers = engine.generate_many(
            engine.prefill(inputs), questions, max_new_tokens=8, do_sample=False, **options
        )
    assert [a.tolist() for a in answers] == expected


def test_texts_that_stop_an_answer_and_masks_that_cannot_be_kept() -> None:
    model, inputs = video_model(), video_prompt(video_model())
    tokenizer, ids = tiny_tokenizer(), inputs["input_ids"]
    expected = greedy(model, inputs, 12)
    stop = tokenizer.decode(expected[ids.shape[1] + 2 : ids.shape[1] + 3])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    stops = {"stop_strings": [stop], "tokenizer": tokenizer}
    until = greedy(model, inputs, 12, **stops)
    assert len(until) < len(expected)
    with Engine(model) as engine:
        film = engine.prefill(inputs)
        assert said(engine.generate(engine.fork(film), **options, **stops)) == until
        assert said(engine.generate(engine.fork(film), attention_mask=None, **options)) == expected
        hidden = torch.ones(1, ids.shape[1] + 1, dtype=torch.long)
        hidden[0, 4] = 0
        for question, mask in ((None, hidden[:, :-1]), (ids[:, :1], hidden), (ids[:, :1], None)):
            mask = torch.ones(1, 3) if mask is None else mask
            with pytest.raises(ValueError, match="attention_mask hides tokens"):
                engine.generate(film, question, attention_mask=mask, **options)
        rows = [ids[0, :3], ids[0, :1]]
        shown = torch.ones(2, ids.shape[1] + 3, dtype=torch.long)
        with pytest.raises(ValueError, match="attention_mask hides tokens"):
            engine.generate(film, rows, attention_mask=shown, **options)
        assert film.get_seq_length() == ids.shape[1]


def greedy_behind(engine: Engine, cache: Any) -> list[int]:
    return said(engine.generate(cache, max_new_tokens=3, do_sample=False))


def test_rows_of_questions_share_a_prefix_of_one_row() -> None:
    model, inputs = language_model(), prompt(40)
    rows = torch.cat([prompt(5, seed=n)["input_ids"] for n in (1, 2, 3)])
    with Engine(model, split_tokens=8) as engine:
        cache = engine.prefill(inputs)
        logits = engine.decode(cache, rows)
        again = engine.decode(cache, rows[:, :1])
    whole = torch.cat([inputs["input_ids"].expand(3, -1), rows, rows[:, :1]], 1)
    expected = model(input_ids=whole).logits
    torch.testing.assert_close(logits, expected[:, -2])
    torch.testing.assert_close(again, expected[:, -1])
    assert cache.shards[0].segments[0][0].shape[0] == 1
