"""Who is asked: an endpoint that speaks the chat completions of OpenAI, or a model on this machine.

    caller = EndpointCaller("http://127.0.0.1:8000/v1", "Qwen3-32B")
    caller = LocalCaller.load("CHECKPOINT")
    reply = caller(Prompt("What is shown?", pictures=frames))

A caller takes one prompt, with or without pictures and turns before it, and returns text. It
remembers nothing between calls. Endpoints may be called from several threads; a local model answers
one after another. Whoever makes data or grades answers asks through here.

What goes wrong at an endpoint falls in two kinds. Passing: no connection, a timeout, status 408,
409, 429 or 5xx, an answer that is not what the protocol says. These are tried again after a pause
that doubles (or as long as ``Retry-After`` says, up to a minute), and raised when the tries are
used up. Lasting: any other status, an empty or missing key. These are raised at once, with what the
endpoint said.

Pictures are sent as JPEG in ``data:`` addresses. Nothing is sent anywhere but to the endpoint: one
that sends on to another address is refused, for the key would go there, too.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from longvila.errors import LongVILAError

_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LONGEST_PAUSE_S = 60.0
Picture = NDArray[np.uint8]


class CallError(LongVILAError):
    """A model could not be asked, or gave no answer; the message says who and why."""


class EmptyAnswer(CallError):
    """A model was asked and said nothing."""


class _Passing(Exception):
    """Worth another try, perhaps after a pause that the endpoint asked for."""

    def __init__(
        self, reason: str, pause_s: float | None = None, *, kind: type[CallError] = CallError
    ) -> None:
        super().__init__(reason)
        self.pause_s, self.kind = pause_s, kind


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        text: The question.
        pictures: RGB, uint8, shape (H, W, 3), in order; they come before the text.
        system: What the model is told about its task.
        max_new_tokens: Longest answer.
        turns: What was asked before and answered, in words, oldest first.
    """

    text: str
    pictures: tuple[Picture, ...] = field(default=(), compare=False)
    system: str | None = None
    max_new_tokens: int = 512
    turns: tuple[tuple[str, str], ...] = ()

    def messages(self, content: Any) -> list[dict[str, Any]]:
        """Return the conversation as chat completions and chat templates take it.

        Args:
            content: The last message's content: the text, or parts.
        """
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answered in self.turns:
            told.append({"role": "user", "content": asked})
            told.append({"role": "assistant", "content": answered})
        return [*told, {"role": "user", "content": content}]


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: The answer.
        complete: Whether the model ended it, and not the limit on tokens.
    """

    text: str
    complete: bool = True


class Caller(Protocol):
    """Answers prompts."""

    @property
    def name(self) -> str:
        """What settings and reports call it."""
        ...

    @property
    def used(self) -> Counter[str]:
        """Calls, tries and tokens so far."""
        ...

    def __call__(self, prompt: Prompt) -> Reply:
        """Answer one prompt.

        Raises:
            CallError: If there is no answer.
        """
        ...


def as_jpeg(picture: Picture, *, longest_side: int | None = None, quality: int = 90) -> bytes:
    """Encode a picture.

    Args:
        picture: RGB, uint8, shape (H, W, 3).
        longest_side: Most pixels of a side; None leaves the size.
        quality: Of JPEG, to 95.
    """
    image = Image.fromarray(picture)
    if longest_side is not None and max(image.size) > longest_side:
        image.thumbnail((longest_side, longest_side), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Goes to no other address than it was told."""

    def redirect_request(self, *_: Any) -> None:
        """Let the status be the answer."""


class EndpointCaller:
    """Asks an endpoint.

    Args:
        base_url: Address up to ``/v1``; ``/chat/completions`` is added.
        model: Name of the model there.
        key_variable: Environment variable that holds the key; None sends none.
        timeout_s: Longest wait for one answer.
        tries: Times a prompt is sent at most.
        pause_s: Pause after the first failure; doubles each time.
        temperature: Of sampling.
        longest_side: Most pixels of a picture's side.
        sleep: Waits; replaced in tests.

    Raises:
        CallError: If the address is none of http, or the key is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str | None = None,
        timeout_s: float = 120.0,
        tries: int = 5,
        pause_s: float = 1.0,
        temperature: float = 0.0,
        longest_side: int = 768,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise CallError(f"an endpoint's address begins with http:// or https://: {base_url!r}")
        if tries < 1 or timeout_s <= 0:
            raise CallError(f"tries and timeout_s must be above zero, got {tries}, {timeout_s:g}")
        self.address, self.model = f"{base_url.rstrip('/')}/chat/completions", model
        self.timeout_s, self.tries, self.pause_s = timeout_s, tries, pause_s
        self.temperature, self.longest_side, self._sleep = temperature, longest_side, sleep
        self.used: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_StayHere)
        self._headers = {"Content-Type": "application/json"}
        if key_variable is not None:
            key = os.environ.get(key_variable, "").strip()
            if not key:
                raise CallError(f"the environment variable {key_variable} holds no key")
            self._headers["Authorization"] = f"Bearer {key}"

    @property
    def name(self) -> str:
        """Model and address."""
        return f"{self.model} at {self.address}"

    def __call__(self, prompt: Prompt) -> Reply:
        """Answer one prompt; see `Caller`."""
        body = json.dumps(self._body(prompt)).encode()
        pause_s, last = self.pause_s, _Passing("")
        self._count(calls=1)
        for number in range(self.tries):
            try:
                self._count(tries=1)
                return self._once(body)
            except _Passing as fault:
                last = fault
                if number + 1 < self.tries:
                    wait = pause_s if fault.pause_s is None else fault.pause_s
                    # Threads that failed together should not come back together.
                    self._sleep(min(wait, _LONGEST_PAUSE_S) * random.uniform(1.0, 1.25))
                    pause_s *= 2
        raise last.kind(f"{self.name}: no answer after {self.tries} tries; the last: {last}")

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        content: Any = prompt.text
        if prompt.pictures:
            content = [
                {"type": "image_url", "image_url": {"url": self._address_of(picture)}}
                for picture in prompt.pictures
            ]
            content.append({"type": "text", "text": prompt.text})
        return {
            "model": self.model,
            "messages": prompt.messages(content),
            "max_tokens": prompt.max_new_tokens,
            "temperature": self.temperature,
        }

    def _address_of(self, picture: Picture) -> str:
        data = as_jpeg(picture, longest_side=self.longest_side)
        return "data:image/jpeg;base64," + base64.b64encode(data).decode()

    def _once(self, body: bytes) -> Reply:
        request = urllib.request.Request(self.address, body, self._headers)
        until = time.monotonic() + self.timeout_s
        try:
            with self._opener.open(request, timeout=self.timeout_s) as answer:
                parts = []
                # A timeout is of one reading; an endpoint may send a byte now and then for ever.
                while part := answer.read1(1 << 16):
                    parts.append(part)
                    if time.monotonic() > until:
                        raise _Passing(f"an answer that takes more than {self.timeout_s:g} s")
                data = b"".join(parts)
        except urllib.error.HTTPError as fault:
            reason = f"status {fault.code}: {_said(fault)}"
            if fault.code in _PASSING:
                raise _Passing(reason, _seconds(fault.headers.get("Retry-After"))) from fault
            if "Location" in fault.headers:
                reason += f"; it sends on to {fault.headers['Location']}, name that if it is meant"
            raise CallError(f"{self.name}: {reason}") from fault
        except (OSError, http.client.HTTPException) as fault:  # URLError and timeouts are OSErrors
            raise _Passing(str(fault) or type(fault).__name__) from fault
        return self._read(data)

    def _read(self, data: bytes) -> Reply:
        try:
            answer = json.loads(data)
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            usage = answer.get("usage") or {}
            self._count(
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                new_tokens=int(usage.get("completion_tokens") or 0),
            )
        except (
            ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
        ) as fault:  # fmt: skip
            said = data[:200].decode(errors="replace")
            raise _Passing(f"an answer that is no chat completion: {said!r}") from fault
        if not isinstance(text, str) or not text.strip():
            raise _Passing(f"an answer without text: {text!r}", kind=EmptyAnswer)
        return Reply(text.strip(), choice.get("finish_reason") != "length")

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self.used.update(numbers)


def _said(fault: urllib.error.HTTPError) -> str:
    """How the body of a failure begins, if it comes."""
    with fault:
        try:
            return fault.read(500).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException) as cut:
            return f"(what it says does not come: {cut or type(cut).__name__})"


def _seconds(text: str | None) -> float | None:
    """Seconds of a Retry-After header; dates are left to the usual pause."""
    return float(text) if text is not None and text.strip().isdecimal() else None


class LocalCaller:
    """Asks a model of this process: of a known family with pictures, a language model without.

    Args:
        model: LongVILA or a model of another known family, or a causal language model; in
            evaluation mode.
        processor: Its processor, or the tokenizer with a chat template.
        name: What settings and reports call it.
    """

    def __init__(self, model: Any, processor: Any, *, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.used: Counter[str] = Counter()
        self._one_at_a_time = threading.Lock()
        self._sees = hasattr(processor, "video_processor")
        if not self._sees and getattr(processor, "chat_template", None) is None:
            raise CallError(f"{name} has no chat template, so it cannot be asked")

    @classmethod
    def load(cls, folder: str, *, device: str = "auto", dtype: str = "auto") -> LocalCaller:
        """Load a checkpoint.

        Args:
            folder: Folder or hub id.
            device: As torch names it; ``auto`` is the first GPU, or the CPU.
            dtype: ``auto`` is bfloat16 on a GPU and float32 on a CPU.

        Raises:
            CallError: If there is no such checkpoint.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        from longvila.model.opening import open_checkpoint
        from longvila.model.vila.loading import is_vila

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        sees = is_vila(folder)
        try:
            if not sees:
                config = type(AutoConfig.from_pretrained(folder))
                sees = config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            if sees:
                model, processor = open_checkpoint(folder, device=device, dtype=dtype)
            else:
                loader: Any = AutoModelForCausalLM
                model = loader.from_pretrained(folder, dtype=getattr(torch, dtype))
                model, processor = model.to(device).eval(), AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, LongVILAError) as fault:
            raise CallError(f"{folder}: {fault}") from fault
        return cls(model, processor, name=folder)

    def __call__(self, prompt: Prompt) -> Reply:
        """Answer one prompt; see `Caller`."""
        if prompt.pictures and not self._sees:
            raise CallError(f"{self.name} is a language model, it sees no pictures")
        with self._one_at_a_time:
            try:
                reply = self._see(prompt) if self._sees else self._say(prompt)
            except LongVILAError as fault:
                raise CallError(f"{self.name}: {fault}") from fault
        if not reply.text:
            raise EmptyAnswer(f"{self.name}: an answer without text")
        return reply

    def _see(self, prompt: Prompt) -> Reply:
        from longvila.inference.prompts import said
        from longvila.inference.session import Session

        session = Session(self.model, self.processor)
        try:
            media = []
            if prompt.pictures:
                pictures = list(prompt.pictures)
                media.append(session.load_video(pictures, num_frames=len(pictures)))
            # The system's words go into the first turn: not every template has a place for them.
            asked = [*(question for question, _ in prompt.turns), prompt.text]
            if prompt.system is not None:
                asked[0] = f"{prompt.system}\n\n{asked[0]}"
            for question, (_, answered) in zip(asked, prompt.turns, strict=False):
                session.messages += [said("user", question), said("assistant", answered)]
            answer = session.ask(asked[-1], media, max_new_tokens=prompt.max_new_tokens)
        finally:
            session.close()
        timings = answer.timings
        self.used.update(
            calls=1, prompt_tokens=timings.prompt_tokens, new_tokens=timings.new_tokens
        )
        return Reply(answer.text, answer.complete)

    def _say(self, prompt: Prompt) -> Reply:
        import torch

        from longvila.inference.serving.sampling import stop_tokens

        inputs = self.processor.apply_chat_template(
            prompt.messages(prompt.text),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.model.device)
        read = inputs["input_ids"].shape[1]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and read + prompt.max_new_tokens > limit:
            raise CallError(
                f"{read} tokens and {prompt.max_new_tokens} new ones do not fit its context of "
                f"{limit}"
            )
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=prompt.max_new_tokens, do_sample=False,
                pad_token_id=self.processor.pad_token_id or self.processor.eos_token_id,
            )  # fmt: skip
        new = out[0, read:]
        self.used.update(calls=1, prompt_tokens=read, new_tokens=new.numel())
        text = self.processor.decode(new, skip_special_tokens=True).strip()
        return Reply(text, int(new[-1]) in stop_tokens(self.model, self.processor))


def ask_until(
    caller: Caller, prompt: Prompt, read: Callable[[Reply], Any], *, attempts: int
) -> Any:
    """Ask until an answer can be used; each time again, say what was wrong with the last.

    Args:
        caller: Who is asked.
        prompt: What is asked.
        read: Turns a reply into what is wanted, or raises ValueError with what is wrong.
        attempts: Times to ask at most.

    Returns:
        What ``read`` made.

    Raises:
        CallError: If there is no answer.
        ValueError: If no answer could be used; the last complaint, and how the answer began.
    """
    asked, said, complaint = prompt, "", ""
    for _ in range(attempts):
        reply = caller(asked)
        said = reply.text
        try:
            return read(reply)
        except ValueError as fault:
            complaint = str(fault)
        again = f"An earlier answer could not be used: {complaint}. Answer again."
        asked = replace(prompt, text=f"{prompt.text}\n\n{again}")
    raise ValueError(f"{complaint}; after {attempts} answers, the last begins {said[:120]!r}")
