"""OpenAI's chat completions: requests checked and turned into questions, answers given their form.

What would change an answer and is not done here is refused by name, not ignored; what only
describes a request is taken and not used. Beyond OpenAI's fields: ``video_url`` parts, the sampling
of frames (``num_frames``, ``fps``; for all videos or in a part) and ``top_k``.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from longvila.inference.serving.access import shorten
from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.jobs import Done, Question, question_of
from longvila.inference.serving.media import Wanted
from longvila.inference.serving.sampling import Sampling
from longvila.inference.serving.settings import Settings

#: Fields that do not change an answer.
_UNUSED = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    )
)
#: Fields that would, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}


#: Beyond any video's own rate; keeps products with durations finite.
MOST_FPS = 1000.0
_LONGEST_STOP = 256


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, values: Any) -> Any:
        """Take null for absent, as clients that send a message back do."""
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if value is not None}
        return values


_Form = TypeVar("_Form", bound=_Strict)


class _Address(_Strict):
    url: str


class _ImageAddress(_Address):
    detail: Literal["auto", "low", "high"] = "auto"


class _VideoAddress(_Address):
    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[float, Field(gt=0, le=MOST_FPS)] | None = None


def _as_address(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: Annotated[_ImageAddress, BeforeValidator(_as_address)]


class _Video(_VideoAddress):
    type: Literal["video_url"]
    url: str = ""
    video_url: Annotated[_VideoAddress, BeforeValidator(_as_address)]


_Part = Annotated[_Text | _Image | _Video, Field(discriminator="type")]


def _form(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


_Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[_Part], Tag("parts")], Discriminator(_form)
]


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content = ""
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _answer_sent_back(cls, values: Any) -> Any:
        """Drop the empty fields that a client's own answer object carries."""
        if isinstance(values, dict) and values.get("role") == "assistant":
            return {key: value for key, value in values.items() if value not in (None, [], {})}
        return values


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _not_empty(texts: tuple[str, ...]) -> tuple[str, ...]:
    if not all(0 < len(text) <= _LONGEST_STOP for text in texts):
        raise ValueError(
            f"a stop sequence must not be empty nor longer than {_LONGEST_STOP} characters"
        )
    return texts


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Strict):
    """The body of a request for a chat completion."""

    model: str
    messages: Annotated[list[_Message], Field(min_length=1, max_length=2000)]
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        tuple[str, ...],
        BeforeValidator(_as_tuple),
        Field(max_length=4),
        AfterValidator(_not_empty),
    ] = ()
    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[float, Field(gt=0, le=MOST_FPS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _not_done(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if key not in _UNUSED}
        for name, neutral in _NEUTRAL.items():
            if name in values and values.pop(name) not in (None, *neutral):
                raise ValueError(f"{name} is not done by this server; leave it out")
        return values


def parse_request(body: bytes) -> ChatRequest:
    """Read the body of a request.

    Args:
        body: JSON.

    Returns:
        The request.

    Raises:
        RequestError: Naming the first field that is wrong.
    """
    return _parse(ChatRequest, body)


def parse_frames(body: bytes) -> Wanted:
    """Read the body of a request for the frames of a video.

    Args:
        body: JSON.

    Returns:
        The video and how it is sampled.

    Raises:
        RequestError: Naming the first field that is wrong.
    """
    video = _parse(_VideoAddress, body)
    return Wanted("video", video.url, video.num_frames, video.fps)


def _parse(form: type[_Form], body: bytes) -> _Form:
    try:
        return form.model_validate_json(body)
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_context=False, include_input=False)[0]
        where = shorten(".".join(str(part) for part in _field(first["loc"])))
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = "there is no such field here; leave it out"
        raise RequestError(
            f"{where}: {what}" if where else what, param=where or None, code="invalid_request"
        ) from None


def _field(place: tuple[int | str, ...]) -> list[int | str]:
    """Return where a fault is, without the names of the forms that a content and a part may have.

    messages, 0, content, *parts*, 2, *video_url*, video_url, fps
    """
    forms = (3, 5) if place[:1] == ("messages",) else ()
    return [part for number, part in enumerate(place) if number not in forms]


def to_question(request: ChatRequest, settings: Settings) -> Question:
    """Turn a request into a question.

    Args:
        request: The request.
        settings: Of the server.

    Returns:
        The question.

    Raises:
        RequestError: If it asks for another model, or for more than is given.
    """
    if request.model != settings.name:
        raise RequestError(
            f"there is no model {shorten(request.model)!r}; this server has {settings.name!r}",
            status=404, code="model_not_found", param="model",
        )  # fmt: skip
    limits = settings.limits
    most = request.max_completion_tokens or request.max_tokens or 0
    if most > limits.new_tokens:
        raise RequestError(
            f"max_tokens={most}, at most {limits.new_tokens} are given; lower it",
            param="max_tokens",
        )
    if request.messages[-1].role == "assistant":
        raise RequestError(
            "the last message must not be the assistant's; end with a question", param="messages"
        )
    length = sum(_text_length(message) for message in request.messages)
    if length > limits.text_chars:
        raise RequestError(
            f"{length} characters of text, at most {limits.text_chars} are taken; shorten the "
            "conversation",
            code="context_length_exceeded",
            param="messages",
        )
    media: list[Wanted] = []
    messages = [_message(message, request, media) for message in request.messages]
    if len(media) > limits.media_items:
        raise RequestError(
            f"{len(media)} images and videos, at most {limits.media_items} are taken; send fewer",
            code="too_many_media", param="messages",
        )  # fmt: skip
    temperature = settings.temperature if request.temperature is None else request.temperature
    sampling = Sampling(most, temperature, request.top_p, request.top_k, request.seed, request.stop)
    return question_of(messages, media, sampling)


def _text_length(message: _Message) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(part.text) for part in message.content if isinstance(part, _Text))


def _message(message: _Message, request: ChatRequest, media: list[Wanted]) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    items: list[dict[str, str]] = []
    for part in message.content:
        if isinstance(part, _Text):
            items.append({"type": "text", "text": part.text})
            continue
        if role != "user":
            raise RequestError(
                f"a message of the {role} holds text only; put media into the user's",
                param="messages",
            )
        if isinstance(part, _Image):
            media.append(Wanted("image", part.image_url.url))
            items.append({"type": "image"})
            continue
        given = [
            (place.num_frames, place.fps)
            for place in (part.video_url, part, request)
            if place.num_frames is not None or place.fps is not None
        ]
        frames, fps = given[0] if given else (None, None)
        media.append(Wanted("video", part.video_url.url, frames, fps))
        items.append({"type": "video"})
    return {"role": role, "content": items}


# ---- answers


class Answer:
    """The forms of one answer.

    Args:
        model: What the model is called.
    """

    def __init__(self, model: str) -> None:
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        """Return an answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": done.reason,
        }
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(done),
            "longvila": extras(done),
        }

    def chunk(self, delta: dict[str, Any], done: Done | None = None) -> dict[str, Any]:
        """Return one piece of a streamed answer."""
        reason = None if done is None else done.reason
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": [choice]}
        return chunk if done is None else {**chunk, "longvila": extras(done)}

    def usage_chunk(self, done: Done) -> dict[str, Any]:
        """Return the piece that only counts tokens."""
        return {
            **self.head,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": usage(done),
        }


def usage(done: Done) -> dict[str, Any]:
    """Return the token counts of an answer."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.new_tokens,
        "total_tokens": done.prompt_tokens + done.new_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def extras(done: Done) -> dict[str, Any]:
    """Return what the model saw."""
    return {
        "media": [
            {"kind": one.kind, "frames": one.frames, "timestamps_s": one.timestamps_s}
            for one in done.media
        ]
    }
