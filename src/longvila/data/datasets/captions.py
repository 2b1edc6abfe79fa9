"""Image-text and video-text sets: captions, interleaved documents, timed steps.

A caption set gives a question that the ``plain`` style leaves out. An interleaved document (MMC4)
has no question at all: it is one turn of the assistant with images inside, for the ``plain`` style.
"""

from __future__ import annotations

from typing import Any

from longvila.data.datasets.base import Adapter, Context, caption, conversation
from longvila.data.records import Record
from longvila.data.sample import Sample

_DETAIL = "Elaborate on the visual and narrative elements of the video in detail."
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tiff")
_VIDEOS = (".mp4", ".webm", ".mkv", ".avi")


def _mmc4(record: Record, context: Context) -> Sample:
    """Images stand before the sentence they match; the best matches where there are too many.

    Sentences are joined by spaces, but for those before an image.
    """
    sentences = list(record["text_list"])
    most = int(context.options.get("max_images", 6))
    least = float(context.options.get("min_similarity", 0.0))
    images = [i for i in record["image_info"] if i.get("matched_sim", 1.0) >= least]
    images.sort(key=lambda image: -image.get("matched_sim", 1.0))
    before: dict[int, list[Any]] = {}
    for image in images[:most]:
        at = int(image["matched_text_index"])
        if not 0 <= at < len(sentences):
            raise context.error(f"matches an image to sentence {at} of {len(sentences)}")
        data = image.get("image_base64")
        source = f"data:image/jpeg;base64,{data}" if data else image.get("image_name")
        if source is None or (context.media_dir is None and not data):
            source = image.get("raw_url")
        before.setdefault(at, []).append(context.media("image", source))
    parts: list[Any] = []
    for number, sentence in enumerate(sentences):
        parts += before.get(number, [])
        last = number + 1 == len(sentences)
        parts.append(sentence if last or number + 1 in before else f"{sentence} ")
    name = record.get("url") or record.get("__key__") or context.index
    return conversation(name, context, ("assistant", parts))


def _coyo(record: Record, context: Context) -> Sample:
    data = record.get("image") or record.get("rawbytes")
    text = record.get("text") or record.get("caption")
    name = record.get("id", context.index)
    if isinstance(data, str):
        source: Any = f"data:image/jpeg;base64,{data}"
    elif data is not None:
        source = data
    elif context.media_dir is not None:
        source = f"{name}.jpg"
    else:
        source = record.get("url")
    return caption(name, context, context.media("image", source), text)


def _wit(record: Record, context: Context) -> Sample:
    fields = (
        "caption_reference_description",
        "caption_alt_text_description",
        "caption_attribution_description",
    )
    text = next((record[f] for f in fields if record.get(f)), None)
    url = record["image_url"]
    source = url if context.media_dir is None else url.rpartition("/")[2]
    return caption(
        f"{record['language']}/{record['page_title']}",
        context,
        context.media("image", source),
        text,
    )


def _webdataset(record: Record, context: Context) -> Sample:
    kind, found = next(
        (
            (kind, record[suffix])
            for kind, suffixes in (("image", _IMAGES), ("video", _VIDEOS))
            for suffix in suffixes
            if suffix in record
        ),
        (None, None),
    )
    if kind is None:
        raise context.error(f"has no picture and no video, only {sorted(record)}")
    text = record.get(".txt")
    if text is None:
        about = record.get(".json", {})
        key = context.options.get("caption_key")
        text = about.get(key) if key else about.get("caption") or about.get("text")
    return caption(record["__key__"], context, context.media(kind, found), text)  # type: ignore[arg-type]


def _vatex(record: Record, context: Context) -> Sample:
    language = context.options.get("language", "en")
    texts = record[f"{language}Cap"]
    clip = record["videoID"]
    # Ten people described each clip; which one is taken follows from the record's number.
    text = texts[context.index % len(texts)] if texts else None
    return caption(clip, context, context.media("video", f"{clip}.mp4"), text)


def _shot2story(record: Record, context: Context) -> Sample:
    """The summary of the whole video; in the older files, the caption with index -1."""
    video = context.media("video", record["video"])
    text = record.get("whole_caption")
    if text is None:
        listed = record.get("captions") or []
        text = next(
            (c["content"] for c in listed if isinstance(c, dict) and str(c.get("idx")) == "-1"),
            None,
        )
    if not text:
        raise context.error("has no summary (whole_caption)")
    return conversation(
        record.get("id", record["video"]), context, ("user", (video, _DETAIL)), ("assistant", text)
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"


def _youcook2(record: Record, context: Context) -> Sample:
    """All steps of a recipe with their times."""
    name = record["__key__"]
    steps = sorted(record["annotations"], key=lambda step: step["segment"][0])
    lines = [
        f"{_clock(step['segment'][0])} - {_clock(step['segment'][1])}: {step['sentence']}"
        for step in steps
    ]
    where = context.options.get("path", "{id}.mp4").format(
        id=name, recipe_type=record["recipe_type"], subset=record["subset"]
    )
    question = "Which steps does the video show? Give the time and one line for each."
    return conversation(
        name,
        context,
        ("user", (context.media("video", where), question)),
        ("assistant", "\n".join(lines)),
    )


_COYO_META = (
    "id", "url", "width", "height", "image_phash", "text_length", "word_count", "num_tokens_bert",
    "num_tokens_gpt", "num_faces", "clip_similarity_vitb32", "clip_similarity_vitl14",
    "nsfw_score_opennsfw2", "nsfw_score_gantman", "watermark_score", "aesthetic_score_laion_v2",
)  # fmt: skip
_WIT_META = (
    "page_url", "section_title", "hierarchical_section_title", "caption_reference_description",
    "caption_attribution_description", "caption_alt_text_description", "mime_type",
    "original_height", "original_width", "is_main_image", "attribution_passes_lang_id",
    "page_changed_recently", "context_page_description", "context_section_description",
)  # fmt: skip

ADAPTERS = (
    Adapter(
        "mmc4", "Multimodal C4, documents with images", ("text_list", "image_info"),
        ("url", "similarity_matrix", "could_have_url_duplicate"), _mmc4, True,
        "the README of allenai/mmc4; image_base64 is what the original's own shards add",
        options=("max_images", "min_similarity"), style="plain",
    ),
    Adapter(
        "coyo", "COYO-700M, image and alt text", (),
        ("text", "caption", "image", "rawbytes", *_COYO_META), _coyo, True,
        "the dataset card of kakaobrain/coyo-700m; image and rawbytes are the original's shards",
        options=("question",), style="plain",
    ),
    Adapter(
        "wit", "Wikipedia image-text", ("language", "page_title", "image_url"), _WIT_META, _wit,
        True, "the dataset card of google/wit; the caption is the reference description, else the "
        "alternative text, else the attribution",
        options=("question",),
    ),
    Adapter(
        "webdataset", "Tars of pictures or videos with captions", ("__key__",), (), _webdataset,
        True, "WebDataset's naming; .txt or a key of .json is the caption",
        options=("question", "caption_key"),
    ),
    Adapter(
        "vatex", "VATEX, ten captions a clip in English and Chinese", ("videoID",),
        ("enCap", "chCap", "path"), _vatex, False,
        "videoID and enCap were seen in a third party's reader; the set's own page shows no file",
        options=("language", "question"),
    ),
    Adapter(
        "shot2story", "Shot2Story, summaries of multi-shot videos", ("video",),
        ("image_id", "id", "whole_caption", "whole_ASR", "nvid", "video_names", "audio_captions",
         "captions", "ASR"), _shot2story, True,
        "DATA.md of bytedance/Shot2Story; the list of captions with idx -1 is what the original's "
        "older loader reads, and the question is the original's",
    ),
    Adapter(
        "youcook2", "YouCook2, recipe steps with times",
        ("__key__", "annotations", "recipe_type", "subset"), ("duration", "video_url"), _youcook2,
        True, "entries of youcookii_annotations_trainval.json quoted in public code",
        under="database", options=("path",),
    ),
)  # fmt: skip
