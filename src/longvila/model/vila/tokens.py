"""Tokenizers and conversation templates of the original's checkpoints.

1. The tokenizer is that of ``llm/``. Three special tokens are added where it lacks them, in the
   order in which the original adds them at load, so that ids agree: sentinel, image, video. Their
   embedding rows need not exist; nothing looks them up.
2. The template is the tokenizer's own (``chat_template`` of config.json has no effect there
   either, but in repositories packed with their own Python files, where it names a file beside
   them), unless the folder's name is one of a family trained with another format, or the user
   names a format. Whatever it is, it is wrapped so that it takes messages whose content is a list
   of text, image and video parts: parts are joined in order without separators, and the whole is
   stripped.
3. Stop tokens are the end-of-text token and whatever follows an answer in that template.

Formats without a tokenizer template are what their models were trained on, so their wording is
data. The original's quirks are kept where they change ids: a tokenizer that adds a begin token adds
it before one that is written out as well, and SentencePiece tokenizers mark the first word of a
text as one behind a space.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from longvila.errors import CheckpointError
from longvila.model.vila.layout import read_json

SENTINEL, IMAGE, VIDEO = "<vila/sentinel>", "<image>", "<vila/video>"


@dataclass(frozen=True)
class Format:
    """A conversation format that is not the tokenizer's own.

    Args:
        system: What every conversation starts with; ``{}`` is the place of the system message.
        default_system: The system message if there is none.
        user: Before a user's message.
        assistant: Before an answer.
        after_user: After a user's message.
        after_assistant: After an answer.
        after_last: After the last message of a conversation that is complete, if different.
        prompt: What invites an answer, if different from ``assistant``.
    """

    system: str
    default_system: str
    user: str
    assistant: str
    after_user: str
    after_assistant: str
    after_last: str | None = None
    prompt: str | None = None


_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
FORMATS: dict[str, Format] = {
    "hermes-2": Format(
        system="<|im_start|>system\n{}<|im_end|>",
        default_system="Answer the questions.",
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        after_user="<|im_end|>",
        after_assistant="<|im_end|>",
    ),
    "llama_3": Format(
        system="<|begin_of_text|>" + _HEADER.format("system") + "{}<|eot_id|>",
        default_system=(
            "You are a helpful language and vision assistant. You are able to understand the "
            "visual content that the user provides, and assist the user with a variety of tasks "
            "using natural language."
        ),
        user=_HEADER.format("user"),
        assistant=_HEADER.format("assistant"),
        after_user="<|eot_id|>",
        after_assistant="<|eot_id|>",
        after_last="<|end_of_text|>",
    ),
    "vicuna_v1": Format(
        system="{} ",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        user="USER: ",
        assistant="ASSISTANT: ",
        after_user=" ",
        after_assistant="</s>",
        prompt="ASSISTANT:",
    ),
    "plain": Format(
        system="{}",
        default_system="",
        user="",
        assistant="",
        after_user="\n",
        after_assistant="\n",
    ),
}
FORMATS["v1"] = FORMATS["vicuna_v1"]
#: Part of a folder's name, and the format its family was trained with.
_FAMILIES = (
    ("nvila15b", "vicuna_v1"),
    ("vila1.5-3b", "vicuna_v1"),
    ("vila1.5-8b", "llama_3"),
    ("vila1.5-13b", "vicuna_v1"),
    ("vila1.5-40b", "hermes-2"),
    ("llama-3", "llama_3"),
    ("llama3", "llama_3"),
)

_FLATTEN = """\
{%- macro clean(text) -%}
{%- if '<image>' in text or '<vila/video>' in text -%}
{{- text | replace('<image>', '') | replace('<vila/video>', '') | trim -}}
{%- else -%}
{{- text -}}
{%- endif -%}
{%- endmacro -%}
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set text = namespace(value='') -%}
{%- if message['content'] is string -%}
{%- set text.value = clean(message['content']) -%}
{%- elif message['content'] is not none -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set text.value = text.value + '<image>' -%}
{%- elif part['type'] == 'video' -%}
{%- set text.value = text.value + '<vila/video>' -%}
{%- elif part['type'] == 'text' -%}
{%- set text.value = text.value + clean(part['text']) -%}
{%- else -%}
{{- raise_exception('content must be text, image or video, not ' ~ part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [dict(message, content=text.value | trim)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
#: What reads a SentencePiece file: name of the package and its module.
_READERS = (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf"))
#: What the template shipped here says where nobody else does.
_DEFAULT_SYSTEM = "You are a helpful assistant."
_CHATML_SYSTEM = re.compile(
    r"<\|im_start\|>system\n(.*)<\|im_end\|>\n<\|im_start\|>user\nu<\|im_end\|>\n", re.DOTALL
)
_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "u"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "u v"}],
    [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ],
    [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
)


@dataclass(frozen=True)
class Template:
    """A chat template for messages with media parts.

    Args:
        text: The template, None if a checkpoint has none.
        reason: Which it is, and why.
        system_prompt: Value of its variable of that name; None leaves it unset.
    """

    text: str | None
    reason: str
    system_prompt: str | None = None


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def format_template(form: Format) -> str:
    """Write a format as a Jinja template over messages whose content is text.

    Args:
        form: The format.

    Returns:
        The template.
    """
    before, _, after = form.system.partition("{}")
    last = form.after_assistant if form.after_last is None else form.after_last
    prompt = form.assistant if form.prompt is None else form.prompt
    put = {name: _quoted(getattr(form, name)) for name in ("user", "assistant", "after_user")}
    return (
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
        "{%- else -%}"
        f"{{%- set system = {_quoted(form.default_system)} -%}}{{%- set turns = messages -%}}"
        "{%- endif -%}"
        f"{{{{- {_quoted(before)} + system + {_quoted(after)} -}}}}"
        "{%- for message in turns -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{- {put['user']} + message['content'] -}}}}"
        + _end(put["after_user"], form, last)
        + "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{- {put['assistant']} -}}}}"
        "{%- generation -%}{{- message['content'] -}}"
        + _end(_quoted(form.after_assistant), form, last)
        + "{%- endgeneration -%}"
        + "{%- else -%}"
        "{{- raise_exception('a system message can only come first') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(prompt)} -}}}}{{%- endif -%}}"
    )


def _end(after: str, form: Format, last: str) -> str:
    if form.after_last is None:
        return f"{{{{- {after} -}}}}"
    return (
        "{%- if loop.last and not add_generation_prompt -%}"
        f"{{{{- {_quoted(last)} -}}}}{{%- else -%}}{{{{- {after} -}}}}{{%- endif -%}}"
    )


def _importable(module: str) -> bool:
    parent, _, _ = module.rpartition(".")
    if parent and importlib.util.find_spec(parent) is None:
        return False
    return importlib.util.find_spec(module) is not None


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer and give it the media tokens.

    Args:
        folder: ``llm/`` of a checkpoint.

    Returns:
        The tokenizer; ids of tokens it already had are as they were.

    Raises:
        CheckpointError: If the folder has no tokenizer, or a package that reads it is missing.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        absent = [name for name, module in _READERS if not _importable(module)]
        if absent:
            raise CheckpointError(
                f"{folder / 'tokenizer.model'} is a SentencePiece file, which transformers reads "
                f"with packages that are not installed: pip install {' '.join(absent)}"
            )
    kind = str(read_json(folder / "tokenizer_config.json").get("tokenizer_class"))
    # The original asks for this whatever the file says.
    options = {"legacy": False} if kind.startswith("Llama") else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    known = tokenizer.get_vocab()
    missing = [token for token in (SENTINEL, IMAGE, VIDEO) if token not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def packed_template(root: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template of a repository packed with its own Python files.

    Args:
        root: Folder with config.json.
        config: Its content.

    Returns:
        The template that config.json names, without indentation and line ends as the code of such
        repositories reads it; None if it names none that is there.
    """
    name = config.get("chat_template")
    if config.get("model_type") != "vila" or not isinstance(name, str):
        return None
    file = root / f"{name}.jinja"
    if not file.is_file():
        return None
    return file.read_text(encoding="utf-8").replace("    ", "").replace("\n", "")


def choose_template(tokenizer: Any, folder: str, asked: str | None = None) -> Template:
    """Choose the template of a checkpoint.

    Args:
        tokenizer: Its tokenizer.
        folder: Name of the folder the user gave.
        asked: A format, ``auto`` for the tokenizer's own, None to decide by the name.

    Returns:
        The template.

    Raises:
        CheckpointError: If the format is not known.
    """
    if asked not in (None, "auto", *FORMATS):
        raise CheckpointError(
            f"conversation format {asked!r} is not known; known: auto, {', '.join(sorted(FORMATS))}"
        )
    name = asked
    reason = "as asked"
    if name is None:
        name = "auto"
        for part, family in _FAMILIES:
            if part in folder.lower():
                name, reason = family, f"the name has {part!r}"
                break
    if name != "auto":
        text = _started(tokenizer, format_template(FORMATS[name]))
        return Template(text, f"conversation format {name} ({reason})")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        return Template(
            None,
            "no chat template: the tokenizer has none and the name is of no known family; choose "
            "one with --conversation",
        )
    known = None if begin_text(tokenizer) else _as_shipped(tokenizer, own)
    if known is not None:
        return known
    return Template(
        _started(tokenizer, own),
        "chat template of the tokenizer (it does not mark answers: no labels from it)",
    )


def begin_text(tokenizer: Any, text: str = "") -> str:
    """Return what has to be written before a text for the tokens that a tokenizer puts there.

    Args:
        tokenizer: The tokenizer.
        text: What follows. A SentencePiece tokenizer puts a space before the first word of a text,
            but none before a word behind a begin token that is written out.

    Returns:
        The begin token if the tokenizer adds one, and a space if it takes one.
    """
    begin = "".join(tokenizer.convert_ids_to_tokens(tokenizer("").input_ids))
    if not begin or not text:
        return begin
    wanted = tokenizer(text).input_ids
    for start in (begin, f"{begin} "):
        if tokenizer(start + text, add_special_tokens=False).input_ids == wanted:
            return start
    return begin


def _started(tokenizer: Any, template: str) -> str:
    """Let a template write the tokenizer's begin token, and messages of parts be plain text.

    transformers leaves the tokenizer's own begin token out where a prompt starts with one.
    """
    if not begin_text(tokenizer):
        return _FLATTEN + template
    probe = tokenizer.apply_chat_template(
        _PROBES[0], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return f"{_FLATTEN}{{{{- {_quoted(begin_text(tokenizer, probe))} -}}}}{template}"


def _as_shipped(tokenizer: Any, own: str) -> Template | None:
    """Return the template shipped with this package if it writes what another one writes."""
    from longvila.model.processing_longvila import default_chat_template

    shipped = default_chat_template()

    def write(template: str, probe: list[dict[str, str]], **options: Any) -> str:
        text: str = tokenizer.apply_chat_template(
            probe, chat_template=template, tokenize=False, **options
        )
        return text

    system = _CHATML_SYSTEM.fullmatch(write(own, _PROBES[0]))
    if system is None:
        return None
    for probe in _PROBES:
        for ask in (False, True):
            ours = write(shipped, probe, add_generation_prompt=ask, system_prompt=system[1])
            if ours != write(own, probe, add_generation_prompt=ask):
                return None
    return Template(shipped, "chat template of the tokenizer", system[1])


def stop_token_ids(tokenizer: Any, template: Template) -> list[int]:
    """Return the tokens that end an answer.

    Args:
        tokenizer: The tokenizer, with the sentinel token.
        template: The template.

    Returns:
        Ids in ascending order.
    """
    stop = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if template.text is None:
        return sorted(stop)
    sentinel = tokenizer.convert_tokens_to_ids(SENTINEL)
    # Two exchanges: what ends the very last answer may differ from what ends the others.
    chat = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": SENTINEL},
    ] * 2
    text = tokenizer.apply_chat_template(
        chat,
        chat_template=template.text,
        tokenize=False,
        system_prompt=template.system_prompt or "",
    )
    ids = tokenizer(text).input_ids
    for here, after in itertools.pairwise(ids):
        if here == sentinel:
            stop.add(int(after))
    return sorted(stop)


def frame_end(tokenizer: Any, text: str, *, token_order: str) -> str:
    """Return the text that, tokenised inside a prompt, ends a frame as the original does.

    The original tokenises the end token on its own, so that a tokenizer which starts every text
    with a begin token puts one after every frame. Checkpoints older than that code (column-major
    ones) were trained on prompts that were cut at images and tokenised in pieces, begin tokens left
    out.

    Args:
        tokenizer: The tokenizer.
        text: The text of the checkpoint's encoder.
        token_order: ``row`` or ``column``.

    Returns:
        The text.

    Raises:
        CheckpointError: If no text gives those tokens inside a prompt.
    """
    if not text:
        return text
    wanted = tokenizer(text).input_ids
    special = set(tokenizer.all_special_ids)
    begin = [i for i in wanted if i in special]
    if token_order == "column":
        begin, wanted = [], wanted[len(begin) :]
    start = "".join(tokenizer.convert_ids_to_tokens(begin))
    for whole in (start + text, f"{start} {text}"):
        if _inside(tokenizer, whole) == wanted:
            return whole
    raise CheckpointError(
        f"the tokens {wanted} that end a frame cannot be written in a prompt ({start + text!r} "
        f"gives {_inside(tokenizer, start + text)})"
    )


def _inside(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text inside a prompt, between placeholders."""
    ids: list[int] = tokenizer(IMAGE + text + IMAGE, add_special_tokens=False).input_ids
    return ids[1:-1]


def bare_frame_end(tokenizer: Any, text: str) -> str:
    """Undo `frame_end`: return the text that, tokenised on its own, gives a frame's end.

    Args:
        tokenizer: The tokenizer.
        text: What ends a frame inside a prompt.

    Returns:
        The text without the begin token that the tokenizer adds by itself.
    """
    wanted = _inside(tokenizer, text)
    begin = tokenizer("").input_ids
    bare = text.removeprefix(begin_text(tokenizer))
    for each in (bare.removeprefix(" "), bare):
        if tokenizer(each).input_ids in (wanted, begin + wanted):
            return each
    return text


def _system_prompt(source: Path) -> str | None:
    file = source / "processor_config.json"
    prompt: str | None = read_json(file).get("system_prompt") if file.is_file() else None
    return prompt


def _for_the_original(tokenizer: Any, template: str, system_prompt: str | None) -> str:
    """Return a template as the original needs it.

    There a message is a text that holds the placeholders of its media, which ours takes for typed
    ones and removes; the tokenizer writes its begin token by itself; no variable is passed.
    """
    from longvila.model.processing_longvila import default_chat_template

    if template == default_chat_template():
        system = _DEFAULT_SYSTEM if system_prompt is None else system_prompt
        start = _quoted(f"<|im_start|>system\n{system}<|im_end|>\n")
        return (
            f"{{%- if messages[0]['role'] != 'system' -%}}{{{{- {start} -}}}}{{%- endif -%}}"
            "{%- for message in messages if message['content'] is not none -%}"
            "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
            "{{- message['content'] + '<|im_end|>\\n' -}}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
        )
    bare = template.removeprefix(_FLATTEN)
    begin = begin_text(tokenizer)
    for start in (begin, f"{begin} ") if begin and bare != template else ():
        bare = bare.removeprefix(f"{{{{- {_quoted(start)} -}}}}")
    return bare


def write_tokenizer(source: Path, folder: Path, origin: Path | None) -> None:
    """Write a tokenizer as transformers 4 reads it.

    Args:
        source: Folder of one of our checkpoints.
        folder: ``llm/`` of the new checkpoint.
        origin: Tokenizer files the model was converted from. If ``source`` still has those tokens
            and ids, they are copied; media tokens that were added are added again at load.

    Raises:
        CheckpointError: If the tokenizer has no file form that transformers 4 knows.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    if origin is not None and load_tokenizer(origin).get_vocab() == tokenizer.get_vocab():
        for file in origin.iterdir():
            if file.name not in ("config.json", "generation_config.json"):
                shutil.copyfile(file, folder / file.name)
        return
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"the tokenizer of {source} has no tokenizer.json")
    whole = read_json(path)
    model = whole["model"]
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        # The original loads tokenizers without the fast form, from these two files.
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        text = "\n".join(["#version: 0.2", *merges, ""])
        (folder / "merges.txt").write_text(text, encoding="utf-8")
        vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
        (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    settings = read_json(folder / "tokenizer_config.json")
    # Without its SentencePiece file, such a tokenizer is read from tokenizer.json alone.
    if settings.get("tokenizer_class") in ("TokenizersBackend", None) or model.get("byte_fallback"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("backend", "is_local", "processor_class", "local_files_only"):
        settings.pop(name, None)
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", [])
    settings["added_tokens_decoder"] = {
        str(token["id"]): {k: v for k, v in token.items() if k != "id"}
        for token in whole["added_tokens"]
    }
    template = folder / "chat_template.jinja"
    if template.is_file():
        ours = template.read_text(encoding="utf-8")
        settings["chat_template"] = _for_the_original(tokenizer, ours, _system_prompt(source))
        template.unlink()
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
