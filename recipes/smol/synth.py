"""Training samples made on the fly: pictures pasted on frames at known times, and questions about
them.

1. ``Index`` knows names, splits and clips; ``Pool`` holds all pictures (RGBA) and background
   frames as bytes on the device that trains.
2. ``plan_batch`` decides on the host, from one seed, what a batch shows: for each video a run of
   consecutive frames of one clip (or plain colours), a frame rate, which picture appears in which
   frames, where and how large, and the questions with their exact answers. No pixel is touched.
3. ``compose`` draws the batch: one affine ``grid_sample`` for all pasted pictures, alpha-blended
   on the frames, a common change of brightness per video, ImageNet normalisation.
4. ``pack`` lays one sequence a video: the frames once, then each question with its answer. The
   mask lets a question see the frames and itself only, and its positions continue after the
   frames, so each one is exactly the sequence it would be alone, and the frames are paid for once.

Dimensions: B videos of a batch, F frames of each, S sequence.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from questions import (
    AT,
    COUNT,
    IMAGE,
    IN_THE_FILM,
    NEVER,
    NOTHING,
    THERE,
    WHEN,
    WHICH,
    clock,
    with_article,
)
from torch import Tensor

SIDE, FRAME = 160, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEPS_S = (0.5, 1, 1, 2, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20)


class Index:
    """Names, sizes, splits and clips of the prepared folder: all that planning needs, no pixels.

    Args:
        folder: What ``prepare.py`` wrote.
        limit: Keep only so many pictures of each split and a part of the frames (for trying things
        out).
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        entries = json.loads((folder / "pictures.json").read_text())
        frames = json.loads((folder / "frames.json").read_text())
        if limit is not None:
            seen: Counter[str] = Counter()
            kept = []
            for entry in entries:
                seen[entry["split"]] += 1
                if seen[entry["split"]] <= limit:
                    kept.append(entry)
            entries, frames = kept, frames[::8]
        self.folder, self.entries, self.frame_entries = folder, entries, frames
        self.names = [e["name"] for e in entries]
        self.sizes = np.array([e["size"] for e in entries], np.int32)
        self.splits = {
            part: np.array([i for i, e in enumerate(entries) if e["split"] == part])
            for part in ("train", "b", "c")
        }
        self.runs: dict[str, list[np.ndarray]] = {"train": [], "test": []}
        for part, runs in self.runs.items():
            for clip in sorted({e["clip"] for e in frames}):
                run = [i for i, e in enumerate(frames) if e["clip"] == clip and e["split"] == part]
                if len(run) >= 4:
                    runs.append(np.array(run))
        # Names are drawn evenly at first, pictures after that: fifty drawings do not make a name
        # likelier.
        self.by_name: dict[str, list[int]] = {}
        for i in self.splits["train"]:
            self.by_name.setdefault(self.names[i], []).append(int(i))
        self.trained = sorted(self.by_name)


class Pool:
    """Pixels of all pictures (N, 4, SIDE, SIDE) and frames (N, 3, FRAME, FRAME), as bytes on a
    device.

    Args:
        index: Which pictures and frames.
        device: Where the bytes go.
    """

    def __init__(self, index: Index, device: str) -> None:
        self.index, self.device = index, device
        pictures = np.zeros((len(index.entries), SIDE, SIDE, 4), np.uint8)
        with zipfile.ZipFile(index.folder / "pictures.zip") as archive:
            blobs = [archive.read(e["file"]) for e in index.entries]
        with ThreadPoolExecutor() as workers:
            for i, image in enumerate(workers.map(lambda b: _decode(b, "RGBA"), blobs)):
                h, w = image.shape[:2]
                top, left = (SIDE - h) // 2, (SIDE - w) // 2
                pictures[i, top : top + h, left : left + w] = image
            with zipfile.ZipFile(index.folder / "frames.zip") as archive:
                blobs = [archive.read(e["file"]) for e in index.frame_entries]
            frames = np.stack(list(workers.map(lambda b: _decode(b, "RGB"), blobs)))
        self.pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().to(device)
        self.frames = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(device)


def _decode(data: bytes, mode: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


@dataclass
class Paste:
    """One picture on one frame: where, how large (fractions of the frame), how turned, on what."""

    frame: int
    picture: int
    x: float
    y: float
    width: float
    height: float
    angle: float
    flip: bool
    card: int  # 0 straight on the frame, 1 on a rectangle, 2 the whole frame is covered
    colour: tuple[float, float, float]


@dataclass
class Batch:
    """A planned batch: everything but pixels.

    ``backgrounds`` (B * F,) are frame numbers, -1 for a plain colour; ``questions[b]`` are pairs.
    """

    num_frames: int
    step_s: list[float]
    start_s: list[float]
    backgrounds: np.ndarray
    plain: np.ndarray
    jitter: np.ndarray
    pastes: list[Paste] = field(default_factory=list)
    questions: list[list[tuple[str, str]]] = field(default_factory=list)
    shown: list[list[tuple[int, int, int]]] = field(default_factory=list)
    image: bool = False

    def times(self, video: int) -> list[str]:
        """Texts in front of the frames of one video."""
        start, step = self.start_s[video], self.step_s[video]
        return [clock(start + step * k) for k in range(self.num_frames)]


def _draw(index: Index, rng: np.random.Generator, part: str) -> int:
    if part != "train" or rng.random() < 0.4:
        return int(rng.choice(index.splits[part]))
    return int(rng.choice(index.by_name[index.trained[rng.integers(len(index.trained))]]))


def _paste(index: Index, rng: np.random.Generator, frame: int, picture: int, film: bool) -> Paste:
    h, w = (float(s) / SIDE for s in index.sizes[picture])
    scale = float(rng.uniform(0.4, 0.95)) if rng.random() < 0.8 else float(rng.uniform(0.25, 0.5))
    # A wide film is squeezed into the square input, and with it what was pasted on it.
    squeeze = 9 / 16 if film and rng.random() < 0.5 else float(rng.uniform(0.6, 1.1))
    width, height = min(1.0, w * scale * squeeze), min(1.0, h * scale)
    return Paste(
        frame=frame,
        picture=picture,
        x=float(rng.uniform(width / 2, 1 - width / 2)),
        y=float(rng.uniform(height / 2, 1 - height / 2)),
        width=width,
        height=height,
        angle=float(rng.normal(0, 8)),
        flip=bool(rng.random() < 0.4),
        card=int(rng.choice(3, p=(0.4, 0.4, 0.2))),
        colour=tuple(rng.uniform(0.6, 1, 3)) if rng.random() < 0.5 else (1.0, 1.0, 1.0),
    )


def plan_batch(
    index: Index,
    seed: Sequence[int],
    *,
    videos: int,
    num_frames: int,
    questions: int = 5,
    pictures: str = "train",
    backgrounds: str = "train",
    image: bool = False,
    only_at: bool = False,
    max_pictures: int = 4,
) -> Batch:
    """Decide what a batch shows and asks.

    Args:
        index: Names and clips.
        seed: Names the batch; the same seed plans the same batch.
        videos: B.
        num_frames: F.
        questions: Questions a video.
        pictures: Split that the pasted pictures come from.
        backgrounds: Part of the frames.
        image: One picture a sample, asked without a time.
        only_at: One "at" question for each shown picture (evaluation).
        max_pictures: Most pictures in one video.

    Returns:
        The plan.
    """
    rng = np.random.default_rng(list(seed))
    batch = Batch(
        num_frames=num_frames,
        step_s=[float(rng.choice(STEPS_S)) for _ in range(videos)],
        start_s=[0.0] * videos,
        backgrounds=np.full(videos * num_frames, -1),
        plain=rng.random((videos, 3)).astype(np.float32),
        jitter=np.stack([rng.uniform(0.75, 1.25, videos), rng.normal(0, 0.06, videos)], 1),
        image=image,
    )
    for b in range(videos):
        runs = index.runs[backgrounds]
        film = rng.random() > 0.08
        if film:
            weights = np.array([len(r) for r in runs], float) ** 0.5
            run = runs[rng.choice(len(runs), p=weights / weights.sum())]
            # Stored frames are at least half a second apart; strides vary how fast the film runs.
            stride = int(rng.integers(1, max(2, min(8, len(run) // num_frames) + 1)))
            first = int(rng.integers(0, max(1, len(run) - stride * (num_frames - 1))))
            picks = run[(first + stride * np.arange(num_frames)) % len(run)]
            batch.backgrounds[b * num_frames : (b + 1) * num_frames] = picks
        if not image and rng.random() < 0.3:
            batch.start_s[b] = float(rng.integers(0, 300))
        shown = _place(index, rng, num_frames, pictures, image, max_pictures)
        for start, length, picture in shown:
            template = _paste(index, rng, 0, picture, film)
            for k in range(start, start + length):
                batch.pastes.append(Paste(**{**template.__dict__, "frame": b * num_frames + k}))
        batch.shown.append(shown)
        if image:
            name = index.names[shown[0][2]]
            batch.questions.append([(str(rng.choice(IMAGE)), name)])
        elif only_at:
            batch.questions.append(
                [(AT[0].format(t=batch.times(b)[s + n // 2]), index.names[p]) for s, n, p in shown]
            )
        else:
            batch.questions.append(_ask(index, rng, batch, b, shown, questions))
    return batch


def _place(
    index: Index, rng: np.random.Generator, num_frames: int, part: str, image: bool, most: int
) -> list[tuple[int, int, int]]:
    """Choose (first frame, frames, picture), in order of time, without overlap or equal names."""
    if image:
        return [(0, 1, _draw(index, rng, part))]
    count = int(rng.integers(1, max(2, min(most, num_frames // 2) + 1)))
    free = np.ones(num_frames, bool)
    shown: list[tuple[int, int, int]] = []
    names: set[str] = set()
    for _ in range(count):
        picture = _draw(index, rng, part)
        length = int(rng.choice((1, 2, 3), p=(0.6, 0.25, 0.15)))
        start = int(rng.integers(0, max(1, num_frames - length + 1)))
        span = slice(start, start + length)
        if index.names[picture] in names or not free[span].all() or start + length > num_frames:
            continue
        free[max(0, start - 1) : start + length + 1] = False
        names.add(index.names[picture])
        shown.append((start, length, picture))
    return sorted(shown) or [(0, 1, _draw(index, rng, part))]


def _ask(
    index: Index,
    rng: np.random.Generator,
    batch: Batch,
    b: int,
    shown: list[tuple[int, int, int]],
    count: int,
) -> list[tuple[str, str]]:
    times = batch.times(b)
    names = [index.names[p] for _, _, p in shown]
    covered = {k for start, length, _ in shown for k in range(start, start + length)}
    # Times that two frames share (half-second steps) name no single frame.
    single = [k for k in range(len(times)) if times.count(times[k]) == 1]
    questions: list[tuple[str, str]] = []
    for _ in range(count * 3):
        kind = rng.choice(5, p=(0.5, 0.2, 0.12, 0.12, 0.06))
        which = int(rng.integers(len(shown)))
        start, length, _ = shown[which]
        if kind == 0:
            k = start + int(rng.integers(length))
            answer = names[which]
            if rng.random() < 0.15:
                others = [f for f in single if f not in covered]
                if not others:
                    continue
                k, answer = int(rng.choice(others)), NOTHING
            if k not in single:
                continue
            question = str(rng.choice(AT)).format(t=times[k])
        elif kind == 1:
            if start not in single:
                continue
            name, answer = names[which], times[start]
            if rng.random() < 0.15:
                name, answer = str(rng.choice(index.trained)), NEVER
                if name in names:
                    continue
            question = str(rng.choice(WHEN)).format(name=name)
        elif kind == 2:
            name, answer = names[which], "yes"
            if rng.random() < 0.5:
                name, answer = str(rng.choice(index.trained)), "no"
                if name in names or set(name.split()) & IN_THE_FILM:
                    continue
            question = str(rng.choice(THERE)).format(a_name=with_article(name))
        elif kind == 3:
            question, answer = str(rng.choice(WHICH)), ", ".join(names)
        else:
            question, answer = str(rng.choice(COUNT)), str(len(names))
        if question not in [q for q, _ in questions]:
            questions.append((question, answer))
        if len(questions) == count:
            break
    return questions


def compose(pool: Pool, batch: Batch, *, blank: bool = False) -> Tensor:
    """Draw the frames of a batch.

    Args:
        pool: Pictures and frames.
        batch: The plan.
        blank: Leave everything grey (a control).

    Returns:
        Normalised frames, shape (B * F, 3, FRAME, FRAME), float32.
    """
    device = pool.device
    total, n = len(batch.backgrounds), batch.num_frames
    index = torch.from_numpy(batch.backgrounds).to(device)
    frames = pool.frames[index.clamp_min(0)].float().div_(255)
    plain = torch.from_numpy(batch.plain).to(device).repeat_interleave(n, 0)[:, :, None, None]
    frames = torch.where((index < 0)[:, None, None, None], plain.expand_as(frames), frames)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    if blank:
        return (torch.full((total, 3, FRAME, FRAME), 0.5, device=device) - mean) / std
    if batch.pastes:
        _blend(pool, batch, frames)
    jitter = torch.from_numpy(batch.jitter).float().to(device).repeat_interleave(n, 0)
    gain, shift = jitter[:, 0].view(-1, 1, 1, 1), jitter[:, 1].view(-1, 1, 1, 1)
    frames = ((frames - 0.5) * gain + 0.5 + shift).clamp_(0, 1)
    return (frames - mean) / std


def _blend(pool: Pool, batch: Batch, frames: Tensor) -> None:
    device, pastes = pool.device, batch.pastes
    values = np.array([[p.x, p.y, p.width, p.height, p.angle, p.flip] for p in pastes], np.float32)
    x, y, width, height, angle, flip = torch.from_numpy(values).to(device).unbind(1)
    sizes = (
        torch.from_numpy(pool.index.sizes[[p.picture for p in pastes]]).float().to(device) / SIDE
    )
    # From output coordinates in [-1, 1] to the picture's: shift to its centre, turn, scale to its
    # box.
    angle = angle * (torch.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    sx = sizes[:, 1] / width * (1 - 2 * flip)
    sy = sizes[:, 0] / height
    cx, cy = 2 * x - 1, 2 * y - 1
    theta = torch.stack(
        [
            torch.stack([cos * sx, sin * sx, -(cos * cx + sin * cy) * sx], 1),
            torch.stack([-sin * sy, cos * sy, (sin * cx - cos * cy) * sy], 1),
        ],
        1,
    )
    pictures = pool.pictures[torch.tensor([p.picture for p in pastes], device=device)].float() / 255
    pictures[:, :3] *= pictures[:, 3:]
    grid = F.affine_grid(theta, [len(pastes), 4, FRAME, FRAME], align_corners=False)
    drawn = F.grid_sample(pictures, grid, mode="bilinear", align_corners=False)
    colour, alpha = drawn[:, :3], drawn[:, 3:]
    target = torch.tensor([p.frame for p in pastes], device=device)
    under = frames[target]
    card = torch.tensor([p.card for p in pastes], device=device).view(-1, 1, 1, 1)
    paper = torch.tensor([p.colour for p in pastes], device=device, dtype=torch.float32)
    line = torch.linspace(0, 1, FRAME, device=device)
    inside = ((line[None, None, :] - x.view(-1, 1, 1)).abs() < width.view(-1, 1, 1) * 0.56) & (
        (line[None, :, None] - y.view(-1, 1, 1)).abs() < height.view(-1, 1, 1) * 0.56
    )
    on_card = (card == 2) | ((card == 1) & inside[:, None])
    under = torch.where(on_card, paper[:, :, None, None].expand_as(under), under)
    frames[target] = under * (1 - alpha) + colour


@dataclass
class Packed:
    """Token tensors of a batch.

    ``ids``, ``positions`` (B, S); ``mask`` (B, 1, S, S) True where attention is allowed;
    ``targets`` (B, S), shifted: the token that position predicts, -100 for none; ``segment`` (B,
    S) is -1 on the frames, -2 on padding, otherwise the question's number.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    segment: Tensor


class Packer:
    """Lays out sequences as the processor does, several questions to one set of frames.

    Args:
        tokenizer: The language model's.
        video_token_id: Placeholder of a frame's tokens.
        image_token_id: Placeholder of an image's tokens.
        tokens_per_frame: Placeholders a frame.
        before: Text in front of the media.
        after: Text between a question and its answer.
        end: Text after an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        video_token_id: int,
        image_token_id: int,
        tokens_per_frame: int,
        before: str,
        after: str,
        end: str,
    ) -> None:
        self.tokenizer, self.tokens_per_frame = tokenizer, tokens_per_frame
        self.video_token_id, self.image_token_id = video_token_id, image_token_id
        self.before, self.after, self.end = (
            self.encode(before),
            self.encode(after),
            self.encode(end),
        )
        self.newline = self.encode("\n")
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens of the tokenizer's own."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _cached(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.encode(text)
        return self.cache[text]

    def frames(self, times: list[str] | None, count: int) -> list[int]:
        """Ids of everything up to the question."""
        media = self.image_token_id if times is None else self.video_token_id
        out = list(self.before)
        for k in range(count):
            if times is not None:
                out += self._cached(times[k] + " ")
            out += [media] * self.tokens_per_frame + self.newline
        return out

    def pack(self, batch: Batch, questions: Any = None) -> Tensor:
        """Lay out a planned batch.

        Args:
            batch: The plan.
            questions: In place of the batch's own.

        Returns:
            ids, targets, segment, positions stacked: shape (4, B, S), int64.
        """
        rows = []
        for b, asked in enumerate(batch.questions if questions is None else questions):
            head = self.frames(None if batch.image else batch.times(b), batch.num_frames)
            ids, targets = list(head), [-100] * len(head)
            segment, positions = [-1] * len(head), list(range(len(head)))
            for number, (question, answer) in enumerate(asked):
                prompt = self._cached(question) + self.after
                # A list is a beginning: tokens generated so far, without an end.
                reply = (
                    list(answer) if isinstance(answer, list) else self._cached(answer) + self.end
                )
                tokens = prompt + reply
                ids += tokens
                targets += [-100] * (len(prompt) - 1) + reply + [-100]
                segment += [number] * len(tokens)
                positions += range(len(head), len(head) + len(tokens))
            rows.append((ids, targets, segment, positions))
        length = -(-max(len(r[0]) for r in rows) // 8) * 8
        arrays = []
        for column, pad in enumerate((0, -100, -2, 0)):
            array = np.full((len(rows), length), pad, np.int64)
            for b, row in enumerate(rows):
                array[b, : len(row[column])] = row[column]
            arrays.append(array)
        return torch.from_numpy(np.stack(arrays))


def to_device(layout: Tensor, device: str) -> Packed:
    """Move a layout to the device and build its mask there."""
    ids, targets, segment, positions = layout.to(device, non_blocking=True).unbind(0)
    same = segment[:, :, None] == segment[:, None, :]
    allowed = same | (segment == -1)[:, None, :]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=device).tril()
    return Packed(ids, positions, (allowed & causal)[:, None], targets, segment)
