"""Questions and answers: about pictures, in text alone, and text that is tokenised already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longvila.data.datasets.base import Adapter, Context, conversation, letter, lettered
from longvila.data.records import Record
from longvila.data.sample import Sample


def _m3it(record: Record, context: Context) -> Sample:
    pictures = record["image_base64_str"]
    pictures = [pictures] if isinstance(pictures, str) else list(pictures or [])
    media = [context.media("image", f"data:image/jpeg;base64,{each}") for each in pictures]
    texts = [record["instruction"], record["inputs"] or ""]
    question = "\n".join(text for text in texts if text)
    name = record.get("id", context.index)
    return conversation(
        name, context, ("user", (*media, question)), ("assistant", record["outputs"])
    )


def _orca(record: Record, context: Context) -> Sample:
    return conversation(
        record["id"],
        context,
        ("user", record["question"]),
        ("assistant", record["response"]),
        system=record["system_prompt"] or None,
    )


def _flan(record: Record, context: Context) -> Sample:
    return conversation(
        context.index, context, ("user", record["inputs"]), ("assistant", record["targets"])
    )


def _gsm8k(record: Record, context: Context) -> Sample:
    return conversation(
        context.index, context, ("user", record["query"]), ("assistant", record["response"])
    )


def _visual_genome(record: Record, context: Context) -> Sample:
    """All questions about one picture; its folder is whichever of the two has it."""
    number = record["id"]
    name = f"VG_100K/{number}.jpg"
    other = f"VG_100K_2/{number}.jpg"
    folder = context.media_dir or Path()
    if not (folder / name).exists() and (folder / other).exists():
        name = other
    if not record["qas"]:
        raise context.error("has no questions")
    turns: list[tuple[str, Any]] = []
    for pair in record["qas"]:
        question = pair["question"]
        asked = (context.media("image", name), question) if not turns else question
        turns += [("user", asked), ("assistant", pair["answer"])]
    return conversation(number, context, *turns)


def _spoken(tokens: Any, objects: Any) -> str:
    """Write VCR's tokens, where a list of numbers stands for objects of the picture."""
    words: list[str] = []
    for token in tokens:
        if isinstance(token, list):
            token = " and ".join(f"{objects[n]}{n + 1}" for n in token)
        if words and token in (".", ",", "?", "!", "'s", "n't", "'re", "'", ";", ":"):
            words[-1] += token
        else:
            words.append(str(token))
    return " ".join(words)


def _vcr(record: Record, context: Context) -> Sample:
    """The question with its four choices; the right one, and why."""
    objects = record["objects"]
    choices = [_spoken(choice, objects) for choice in record["answer_choices"]]
    right = int(record["answer_label"])
    answer = f"{letter(right)}. {choices[right]}"
    if context.options.get("rationale", True):
        reasons = record["rationale_choices"]
        answer += f"\n{_spoken(reasons[int(record['rationale_label'])], objects)}"
    question = f"{_spoken(record['question'], objects)}\n{lettered(choices)}"
    name = record.get("annot_id", context.index)
    media = context.media("image", record["img_fn"])
    return conversation(name, context, ("user", (media, question)), ("assistant", answer))


def _science_qa(record: Record, context: Context) -> Sample:
    """The question with its choices; the right one, and with ``solution`` the worked solution."""
    name = record["__key__"]
    parts: list[Any] = []
    if record["image"]:
        where = f"images/{record['split']}/{name}/{record['image']}"
        parts.append(context.media("image", where))
    hint = f"{record['hint']}\n" if record.get("hint") else ""
    parts.append(f"{hint}{record['question']}\n{lettered(record['choices'])}")
    right = int(record["answer"])
    answer = f"{letter(right)}. {record['choices'][right]}"
    if context.options.get("solution", False) and record.get("solution"):
        answer = f"{record['solution']}\n{answer}"
    return conversation(name, context, ("user", parts), ("assistant", answer))


def _whole(values: Any) -> np.ndarray[Any, Any]:
    """Read whole numbers, written with or without a point; others would be cut to some."""
    found = np.asarray(values)
    if found.size == 0:
        return np.zeros(found.shape, np.int64)
    if found.dtype.kind not in "iuf":
        raise ValueError(f"expected whole numbers, got {str(values)[:60]}")
    if not (np.isfinite(found).all() and (found == np.trunc(found)).all()):
        raise ValueError(f"expected whole numbers, got {found[found != np.trunc(found)][:3]}")
    return found.astype(np.int64)


def _tokens(record: Record, context: Context) -> Sample:
    """A row of ids; ``document_lengths`` is ours, and says where documents end."""
    ids = record["text"] if "text" in record else record.get("input_ids")
    if ids is None or isinstance(ids, str):
        raise context.error(
            "needs a list of token ids in 'text' or 'input_ids'; texts are tokenised by "
            "`longvila data pack-text`"
        )
    try:
        row = _whole(ids)
        given = record.get("document_lengths")
        lengths = () if given is None else tuple(_whole(given).tolist())
        return Sample(
            str(record.get("id", context.index)),
            context.dataset,
            token_ids=row.astype(np.int32) if row.size and row.max() < 2**31 else row,
            document_lengths=lengths,
        )
    except (TypeError, ValueError) as fault:
        raise context.error(str(fault)) from fault


_VCR = (
    "question", "answer_choices", "answer_label", "rationale_choices", "rationale_label", "objects",
    "img_fn",
)  # fmt: skip

ADAPTERS = (
    Adapter(
        "m3it", "M3IT, 40 instruction sets",
        ("instruction", "inputs", "image_base64_str", "outputs"), (), _m3it, True,
        "the dataset viewer and card of MMInstruction/M3IT",
    ),
    Adapter(
        "openorca", "OpenOrca", ("id", "system_prompt", "question", "response"), (), _orca, True,
        "the dataset card of Open-Orca/OpenOrca",
    ),
    Adapter(
        "flan", "FLAN collection", ("inputs", "targets"),
        ("_template_idx", "_task_source", "_task_name", "_template_type", "task", "task_source",
         "task_name", "template_type", "template_idx"), _flan, False,
        "inputs and targets were seen in third parties' readers; names of the other columns are "
        "from FLAN's own pipeline and differ between copies",
    ),
    Adapter(
        "gsm8k-screl", "GSM8K-ScRel, sampled reasoning paths", ("query", "response"), (), _gsm8k,
        True, "train.py of OFA-Sys/gsm8k-ScRel, which reads these two fields",
    ),
    Adapter(
        "visual-genome", "Visual Genome, question_answers.json", ("id", "qas"), (), _visual_genome,
        False, "id, qas, question and answer were seen in third parties' readers",
    ),
    Adapter(
        "vcr", "Visual Commonsense Reasoning", _VCR, (), _vcr, True,
        "the README packaged with VCR 1.0, and its authors' example line",
        options=("rationale",),
    ),
    Adapter(
        "scienceqa", "ScienceQA, problems.json",
        ("__key__", "question", "choices", "answer", "image", "split"),
        ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"),
        _science_qa, False,
        "hint, image, grade and subject were seen in third parties' readers; the file itself was "
        "not",
        options=("solution",),
    ),
    Adapter(
        "tokens", "Rows of token ids (stage 4)", (),
        ("text", "input_ids", "document_lengths", "id"), _tokens, False,
        "the original's stage-4 files have one field, text, that is a list of ids; the other names "
        "are those of `longvila data pack-text`",
    ),
)  # fmt: skip
