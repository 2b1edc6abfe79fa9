"""Measure the trained model on unseen film, tier by tier, against chance and two controls.

Tiers, never averaged: ``a`` pictures seen in training, ``b`` unseen pictures of trained names,
``c`` unseen names. In each, "What is shown at mm:ss?" is asked of videos cut from film that
training did not see, in two ways: greedy generation must give the exact name, and the name must be
the likeliest of 20 (the others are drawn from the trained names), where guessing gives 5 %.
Controls on tier a: all frames grey; frames in another order than their times. Other kinds of
question (when, is there, which, how many) are scored by exact greedy answers.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import torch
from synth import Batch, Packer, Pool, plan_batch, to_device
from torch import Tensor

from longvila.evaluation.metrics import wilson_interval

WAYS = 20


def wilson(right: int, n: int) -> list[float]:
    """95 % interval of a share."""
    if n == 0:
        return [0.0, 1.0]
    return [round(end, 4) for end in wilson_interval(right, n, confidence=0.95)]


def generate(model: Any, packer: Packer, batch: Batch, rows: Tensor, hidden: Callable) -> list[str]:
    """Answer the first question of each video greedily (at most 12 tokens)."""
    device = rows.device
    replies: list[list[int]] = [[] for _ in batch.questions]
    end = packer.end[0]
    for _ in range(12):
        asked = [[(q[0][0], list(r))] for q, r in zip(batch.questions, replies, strict=True)]
        packed = to_device(packer.pack(batch, asked), str(device))
        states = hidden(model, packed, rows, batch.image)
        last = (packed.segment >= 0).int().cumsum(1).argmax(1)
        picks = model.lm_head(states[torch.arange(len(last), device=device), last]).argmax(-1)
        for reply, pick in zip(replies, picks.tolist(), strict=True):
            if not reply or reply[-1] != end:
                reply.append(pick)
        if all(reply[-1] == end for reply in replies):
            break
    texts = [r[:-1] if r[-1] == end else r for r in replies]
    return [packer.tokenizer.decode(t).strip() for t in texts]


def choose(
    model: Any,
    packer: Packer,
    batch: Batch,
    rows: Tensor,
    hidden: Callable,
    options: list[list[str]],
) -> list[int]:
    """Index of the likeliest option for the first question of each video."""
    asked = [
        [(q[0][0], option) for option in given]
        for q, given in zip(batch.questions, options, strict=True)
    ]
    packed = to_device(packer.pack(batch, asked), str(rows.device))
    states = hidden(model, packed, rows, batch.image)
    wanted = packed.targets >= 0
    logits = model.lm_head(states[wanted]).float().log_softmax(-1)
    scores = logits.gather(1, packed.targets[wanted][:, None])[:, 0]
    video = wanted.nonzero()[:, 0]
    totals = torch.zeros(len(asked), WAYS, device=rows.device)
    totals.index_put_((video, packed.segment[wanted]), scores, accumulate=True)
    return totals.argmax(1).tolist()


def evaluate(
    model: Any,
    pool: Pool,
    packer: Packer,
    media_rows: Callable,
    last_hidden: Callable,
    *,
    n: int,
    seed: int,
    lengths: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Run all tiers and controls.

    Returns:
        Result rows.
    """
    index, results = pool.index, []
    every = sorted({index.names[i] for part in index.splits.values() for i in part})
    tiers = [("a", "train", None), ("b", "b", None), ("c", "c", None)]
    tiers += [("a", "train", "blank"), ("a", "train", "shuffled")]
    for frames in lengths:
        for tier, part, control in tiers:
            free = ways = asked = 0
            shown: list[dict[str, str]] = []
            size = max(2, min(n, 256 // frames))
            for number in range(max(1, n // size)):
                batch = plan_batch(
                    index,
                    (seed, 10**6, frames, number, ord(tier)),
                    videos=size,
                    num_frames=frames,
                    pictures=part,
                    backgrounds="test",
                    only_at=True,
                )
                rows = media_rows(model, pool, batch, blank=control == "blank")
                rng = np.random.default_rng([seed, frames, number, ord(tier)])
                if control == "shuffled":
                    per = rows.view(size, frames, -1, rows.shape[-1])
                    order = torch.from_numpy(rng.permutation(frames)).to(rows.device)
                    rows = per[:, order].flatten(0, 2)
                for questions in batch.questions:
                    questions[:] = [questions[rng.integers(len(questions))]]
                truths = [q[0][1] for q in batch.questions]
                options = []
                for truth in truths:
                    others = [name for name in every if name != truth]
                    picked = list(rng.choice(others, WAYS - 1, replace=False))
                    options.append([truth, *map(str, picked)])
                picks = choose(model, packer, batch, rows, last_hidden, options)
                ways += sum(pick == 0 for pick in picks)
                asked += size
                answers = generate(model, packer, batch, rows, last_hidden)
                free += sum(x == y for x, y in zip(answers, truths, strict=True))
                shown += [{"answer": x, "truth": y} for x, y in zip(answers, truths, strict=True)]
            row = {
                "method": "longvila-smol" + (f" ({control} control)" if control else ""),
                "kind": "ours",
                "tokens": frames * (packer.tokens_per_frame + 7),
                "shape": {"tier": tier, "frames_max": frames, "n": asked, "control": control},
                "metrics": {
                    "accuracy": round(free / asked, 4),
                    "accuracy_interval": wilson(free, asked),
                    "accuracy_20way": round(ways / asked, 4),
                    "accuracy_20way_interval": wilson(ways, asked),
                    "chance_20way": 1 / WAYS,
                },
                "samples": shown[:24],
            }
            print(row["method"], row["shape"], row["metrics"], flush=True)
            results.append(row)
    results += _other_questions(
        model, pool, packer, media_rows, last_hidden, n=n, seed=seed, frames=lengths[0]
    )
    return results


def _kind(question: str) -> str:
    if question.startswith(("When", "At what")):
        return "when"
    if question.startswith(("Is there", "Does")):
        return "is_there"
    if question.startswith(("Which pictures", "List")):
        return "which"
    return "how_many" if question.startswith("How many") else "at"


def _other_questions(
    model: Any, pool: Pool, packer: Packer, media_rows: Callable, last_hidden: Callable,
    *, n: int, seed: int, frames: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Exact greedy answers, all tokens at once: right where every token is the likeliest."""
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    size = min(n, 16)
    for number in range(max(1, n // size)):
        batch = plan_batch(
            pool.index,
            (seed, 2 * 10**6, number),
            videos=size,
            num_frames=frames,
            backgrounds="test",
            questions=6,
        )
        rows = media_rows(model, pool, batch)
        packed = to_device(packer.pack(batch), str(rows.device))
        states = last_hidden(model, packed, rows, False)
        wanted = packed.targets >= 0
        hits = model.lm_head(states[wanted]).argmax(-1) == packed.targets[wanted]
        wrong = torch.zeros(size, 16, device=rows.device)
        wrong.index_put_(
            (wanted.nonzero()[:, 0], packed.segment[wanted]), (~hits).float(), accumulate=True
        )
        for b, questions in enumerate(batch.questions):
            for k, (question, _) in enumerate(questions):
                asked[_kind(question)] += 1
                right[_kind(question)] += int(wrong[b, k] == 0)
    rows_out = []
    for kind in sorted(asked):
        metrics = {
            "accuracy": round(right[kind] / asked[kind], 4),
            "accuracy_interval": wilson(right[kind], asked[kind]),
        }
        shape = {"tier": "a", "frames_max": frames, "n": asked[kind], "question": kind}
        print(shape, metrics, flush=True)
        rows_out.append(
            {"method": "longvila-smol", "kind": "ours", "tokens": frames * 23, "shape": shape,
             "metrics": metrics, "samples": []}
        )  # fmt: skip
    return rows_out


def result_file(rows: list[dict[str, Any]], args: Any, elapsed_s: float) -> dict[str, Any]:
    """Wrap result rows in the repository's result format."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    import transformers

    return {
        "benchmark": "needle",
        "question": "Are pictures, seen in training and not, named at a time in unseen film?",
        "date": date.today().isoformat(),
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "hardware": {"gpu": gpu, "count": 1, "link": None},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {k: str(v) for k, v in vars(args).items()},
        "elapsed_s": round(elapsed_s),
        "rows": rows,
    }


def main() -> None:
    """Measure an assembled model end to end: processor, video frames as bytes, cached reading."""
    import argparse
    import json
    import time
    from pathlib import Path

    from synth import MEAN, STD, Index, compose

    from longvila.evaluation.answerer import Answerer
    from longvila.inference.engine import Engine
    from longvila.media.video import read_frames
    from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
    from longvila.model.processing_longvila import LongVILAProcessor

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="folder, or 'default'")
    parser.add_argument("--tiers", nargs="+", default=["a", "b", "c"])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--n", type=int, default=112)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    began = time.time()
    if args.model == "default":
        from longvila.packaged import default_model

        args.model = str(default_model())
    model = LongVILAForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = LongVILAProcessor.from_pretrained(args.model)
    index = Index(args.data)
    pool = Pool(index, "cpu")
    every = sorted({index.names[i] for part in index.splits.values() for i in part})
    answerer = Answerer(Engine(model), processor)
    mean, std = (np.array(v, np.float32) for v in (MEAN, STD))
    rows = []
    for tier in args.tiers:
        named = chosen = asked = number = 0
        samples = []
        while asked < args.n:
            batch = plan_batch(
                index,
                (args.seed, 3 * 10**6, args.frames, number, ord(tier)),
                videos=1,
                num_frames=args.frames,
                pictures="train" if tier == "a" else tier,
                backgrounds="test",
                only_at=True,
            )
            number += 1
            # The processor's clock starts at 0 and rounds down: half-second steps would repeat.
            step_s = max(1.0, round(batch.step_s[0]))
            pixels = compose(pool, batch).permute(0, 2, 3, 1).numpy() * std + mean
            frames = (pixels * 255).round().clip(0, 255).astype(np.uint8)
            video = read_frames(frames, indices=range(len(frames)), frame_rate=1 / step_s)
            watched = answerer.watch(video)
            rng = np.random.default_rng([args.seed, number, ord(tier)])
            for start, length, picture in batch.shown[0]:
                truth = index.names[picture]
                time_s = video.timestamps_s[start + length // 2]
                others = [name for name in every if name != truth]
                options = [truth, *map(str, rng.choice(others, WAYS - 1, replace=False))]
                question = f"What is shown at {int(time_s) // 60:02d}:{int(time_s) % 60:02d}?"
                answer = answerer.answer(watched, question, max_new_tokens=16)
                choice = options[int(np.argmax(answerer.choose(watched, question, options)))]
                named += answer == truth
                chosen += choice == truth
                asked += 1
                samples.append({"answer": answer, "truth": truth, "choice": choice})
        metrics = {
            "accuracy": round(named / asked, 4),
            "accuracy_interval": wilson(named, asked),
            "accuracy_20way": round(chosen / asked, 4),
            "accuracy_20way_interval": wilson(chosen, asked),
            "chance_20way": 1 / WAYS,
        }
        shape = {"tier": tier, "frames_max": args.frames, "n": asked}
        print(shape, metrics, flush=True)
        rows.append(
            {"method": "longvila-smol", "kind": "ours", "tokens": watched.tokens, "shape": shape,
             "metrics": metrics, "samples": samples[:24]}
        )  # fmt: skip
        result = result_file(rows, args, time.time() - began)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
