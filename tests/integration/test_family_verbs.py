"""The verbs on tiny checkpoints of other people's families, read from folders.

What the conversation of ``longvila ask`` says (`Session`, held against transformers' own generate
elsewhere) is what server and evaluation must say.
"""

from __future__ import annotations

import base64
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from family_files import PROCESSORS, needs_torchvision, save_family
from PIL import Image

from longvila.inference.engine import Engine
from longvila.inference.session import Session
from longvila.media.synthetic import clip
from longvila.model.opening import open_checkpoint

FAMILIES = sorted(PROCESSORS)
QUESTION = "What is on the table?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    needs_torchvision()
    base = tmp_path_factory.mktemp("families")
    return {name: save_family(name, base / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("film") / "film.mp4", 24)


def opened(folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return open_checkpoint(str(folder), device="cpu")


def conversation(folder: Path, film: Path, *questions: str, frames: int, new: int) -> list[str]:
    """What ``longvila ask`` answers."""
    model, processor = opened(folder)
    with Engine(model) as engine:
        session = Session(engine, processor)
        media = [session.load_video(str(film), num_frames=frames)]
        texts = []
        for question in questions:
            texts.append(session.ask(question, media, max_new_tokens=new).text)
            media = []
        return texts


def uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


# ---- serve -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_serve(name: str, folders: dict[str, Path], film: Path, tmp_path: Path) -> None:
    import openai

    from longvila.inference.serving.local import LocalServer
    from longvila.inference.serving.settings import Settings

    picture = tmp_path / "picture.png"
    Image.new("RGB", (24, 24), (200, 30, 60)).save(picture)
    expected = conversation(folders[name], film, QUESTION, "And now?", frames=4, new=6)
    model, processor = opened(folders[name])
    local = LocalServer(model, processor, Settings(name="tiny", slice_tokens=16))
    with local as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:

        def said(messages: list[Any], new: int = 6) -> Any:
            return client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=new, temperature=0
            )

        shown = {"type": "video_url", "video_url": {"url": uri(film, "video/mp4"), "num_frames": 4}}
        first = {"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}
        answer = said([first])
        assert answer.choices[0].message.content.strip() == expected[0]
        turns = [
            first,
            {"role": "assistant", "content": expected[0]},
            {"role": "user", "content": "And now?"},
        ]
        answer = said(turns)
        assert answer.choices[0].message.content.strip() == expected[1]
        # The film was read before: its tokens come from the first request.
        assert answer.usage.prompt_tokens_details.cached_tokens > 4
        image = {"type": "image_url", "image_url": {"url": uri(picture, "image/png")}}
        content = [image, {"type": "text", "text": "Which colour?"}]
        assert said([{"role": "user", "content": content}], 2).usage.completion_tokens >= 1
        with pytest.raises(openai.BadRequestError, match="own placeholder"):
            said([{"role": "user", "content": f"a {processor.video_token}"}])
        assert local.server.scheduler.alive


def test_another_time_between_frames_is_another_prompt(
    folders: dict[str, Path], film: Path
) -> None:
    """Qwen2.5-VL's positions depend on the frame rate; its ids do not."""
    from longvila.inference.family_prompts import FamilyPrompts, decoded_medium
    from longvila.inference.serving.family_prompt import build_family_prompt
    from longvila.inference.serving.media import Medium
    from longvila.inference.sight import FamilySampler

    model, processor = opened(folders["qwen2_5_vl"])

    class Numbers:
        def number(self, *data: Any) -> int:
            return -1 - (hash(b"".join(bytes(part) for part in data)) & 0xFFFFFFFF)

    with Engine(model) as engine:
        prompts = FamilyPrompts(model, processor, engine.family)
        video = FamilySampler(processor).sample(str(film), num_frames=8)
        slow = replace(video, metadata=replace(video.metadata, num_frames=2400))
        messages = [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Why?"}]}
        ]
        made = [
            build_family_prompt(
                prompts, messages,
                [Medium("video", 8, video.indices, -1, video=each)], Numbers(),  # type: ignore[arg-type]
            )
            for each in (video, video, slow)
        ]  # fmt: skip
        assert decoded_medium(video).frames == 8
    assert (made[0].ids == made[2].ids).all()
    assert (made[0].keys == made[1].keys).all()
    assert (made[0].keys != made[2].keys).any()
    block = made[0].blocks[0]
    assert made[0].slice_end(0, block.start + 1) == block.start
    assert made[0].slice_end(block.start, 1) == block.stop
