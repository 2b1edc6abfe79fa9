"""Every adapter on invented rows of its published shape; refusals; files of datasets."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from longvila.data.datasets import ADAPTERS, Dataset, SchemaError, open_dataset, read_file
from longvila.data.encode import Document, Encoder
from longvila.data.mixture import Mixture
from longvila.data.records import open_records
from longvila.data.sample import Media, Sample

FIXTURES = Path(__file__).parents[2] / "fixtures" / "data"
FILES = {path.stem: path for path in sorted(FIXTURES.iterdir())}


def opened(name: str, **more: Any) -> Dataset:
    return open_dataset(name, FILES[name], **{"media_dir": "/m", **more})


def shown(sample: Sample) -> list[str]:
    """A sample in short: the roles' letters, texts, and media as kind:path."""
    return [
        f"{turn.role[0]} "
        + "|".join(
            part if isinstance(part, str) else f"{part.kind}:{part.name[:22]}"
            for part in turn.parts
        )
        for turn in sample.turns
    ]


#: The first sample of each fixture.
FIRST = {
    "llava": ["u image:/m/a/kettle.jpg|What is on the stove?", "a A red kettle.\nIt steams."],
    "llava-align": [
        "u image:/m/000/000.jpg|Tell me briefly what this shows.", "a a red kettle",
    ],
    "llava-instruct": [
        "u image:/m/coco/0.jpg|Where is a red kettle?", "a In the middle.", "u And why?",
        "a Nobody knows.",
    ],
    "sharegpt4v": [
        "u image:/m/sam/0.jpg|Describe every detail.",
        "a The picture shows a red kettle, in soft light.",
    ],
    "sharegpt4o": ["u video:/m/0.mp4|Describe the video.", "a It begins with a red kettle."],
    "sharegpt-video": ["u video:/m/h0|What does the person hold?", "a A red kettle."],
    "longvila-sft": ["u video:/m/yt0.mp4|How does it end?", "a With a red kettle."],
    "video-chatgpt": [
        "u video:/m/v_id0.mp4|What happens to a red kettle?", "a It is moved aside.",
    ],
    "mmc4": [
        "a image:/m/0a.jpg|We begin with a red kettle. |It stood there for years.|"
        "image:/m/0b.jpg|Then it was sold.",
    ],
    "coyo": ["u image:/m/900000.jpg|Describe the image.", "a picture of a red kettle"],
    "wit": ["u image:/m/0.jpg|Describe the image.", "a The kettle in use"],
    "vatex": [
        "u video:/m/Ab0_000010_000020.m|Describe the video.",
        "a A person looks at a red kettle.",
    ],
    "shot2story": [
        "u video:/m/s0.mp4|Elaborate on the visual and narrative elements of the video in detail.",
        "a The video opens on a red kettle and ends at night.",
    ],
    "youcook2": [
        "u video:/m/yc0.mp4|Which steps does the video show? Give the time and one line for each.",
        "a 00:12 - 00:25: wash a red kettle\n01:01 - 01:15: stir until thick",
    ],
    "m3it": [
        "u image:data:image/jpeg;base64|Answer the question about the picture.\n"
        "Is there a red kettle?",
        "a There is.",
    ],
    "openorca": [
        "s You explain step by step.", "u Why would one buy a red kettle?",
        "a For use.\nOr for show.",
    ],
    "flan": ["u Translate to shouting: a red kettle", "a A RED KETTLE"],
    "gsm8k-screl": [
        "u Ann has 2 pears and eats one. How many are left?",
        "a She starts with 2.\n2 - 1 = <<2-1=1>>1\n#### 1",
    ],
    "visual-genome": [
        "u image:/m/VG_100K/1.jpg|What is shown?", "a A red kettle.", "u When was it taken?",
        "a Daytime.",
    ],
    "vcr": [
        "u image:/m/lsmdc_0/0@0.jpg|Why is person1 running?\nA. To catch a train.\n"
        "B. person2 calls.\nC. For the dog3's sake.\nD. No reason.",
        "a C. For the dog3's sake.\ndog3 runs ahead of person1 and person2.",
    ],
    "scienceqa": [
        "u image:/m/images/train/1/imag|Think of the material.\n"
        "Which property fits a red kettle?\nA. hard\nB. soft",
        "a A. hard",
    ],
    "tokens": [],
}  # fmt: skip


def test_every_set_that_is_asked_for_has_a_fixture() -> None:
    assert set(FILES) == set(FIRST) == set(ADAPTERS) - {"webdataset"}
    assert all(len(opened(name)) >= 5 for name in FILES)


@pytest.mark.parametrize("name", FIRST)
def test_the_first_sample_of_each_set(name: str) -> None:
    dataset = opened(name)
    assert shown(dataset[0]) == FIRST[name]
    samples = [dataset[index] for index in range(len(dataset))]
    assert len({sample.id for sample in samples}) == len(samples)
    assert all(sample.dataset == name for sample in samples)


@pytest.mark.parametrize("name", FIRST)
def test_every_sample_becomes_a_document(name: str, processor: Any, media_dir: Path) -> None:
    """With real media in place of the names."""
    style: Any = "chat"
    encoder = Encoder(processor, 4096, style=style)
    dataset = opened(name)
    for index in range(len(dataset)):
        sample = dataset[index]
        for media in sample.media:
            real = "clip0.mp4" if media.kind == "video" else "image0.png"
            object.__setattr__(media, "source", str(media_dir / real))
        document = encoder(sample)
        assert isinstance(document, Document)
        assert (document.labels != -100).any()


@pytest.mark.parametrize("name", FIRST)
def test_a_record_without_a_field_is_refused(name: str) -> None:
    adapter = ADAPTERS[name]
    rows = [dict(row) for row in open_records(FILES[name], under=adapter.under)]
    for field in adapter.required:
        row = {key: value for key, value in rows[0].items() if key != field}
        dataset = Dataset(name, [row], adapter)
        with pytest.raises(SchemaError, match=rf"{name}, record 0: lacks \['{field}'\]"):
            dataset[0]


@pytest.mark.parametrize("name", FIRST)
def test_unknown_fields_are_refused_where_the_schema_was_not_seen(name: str) -> None:
    adapter = ADAPTERS[name]
    rows = iter(open_records(FILES[name], under=adapter.under))
    dataset = Dataset(name, [{**row, "surprise": 1} for row in rows], adapter, media_dir="/m")
    if adapter.verified:
        assert shown(dataset[0]) == FIRST[name]
        return
    with pytest.raises(SchemaError, match=r"fields \['surprise'\] that the adapter .* not know"):
        dataset[0]


def test_every_adapter_says_where_its_schema_was_read() -> None:
    assert all(adapter.source and adapter.about for adapter in ADAPTERS.values())
    assert {name for name, adapter in ADAPTERS.items() if not adapter.verified} == {
        "flan", "longvila-sft", "scienceqa", "sharegpt-video", "sharegpt4o", "sharegpt4v",
        "tokens", "vatex", "video-chatgpt", "visual-genome",
    }  # fmt: skip


def test_llava_prepends_media_and_removes_placeholders_with_their_newlines() -> None:
    dataset = opened("llava")
    assert shown(dataset[1])[0] == "u image:/m/a.png|image:/m/b.png|Which is older?"
    assert shown(dataset[2])[0] == "u video:/m/boats.mp4|Who wins?"
    assert shown(dataset[3]) == ["s Be brief.", "u Name a metal.", "a Tin."]
    assert shown(dataset[4]) == [
        "u video:/m/x.mp4|video:/m/y.mp4|First?", "a A walk.", "u Second?", "a A swim.",
    ]  # fmt: skip
    assert shown(dataset[5]) == ["u video:/m/v_abc.mp4|What colour is the tram?", "a Green."]


def test_llava_keeps_lines_around_a_placeholder_apart_as_the_original() -> None:
    for value, want in {
        "First?\n<image>\nSecond?": "First?\nSecond?",
        "First?\n<image>": "First?",
        "<image> What?": "What?",
        "a <image> b": "a  b",
        "<image>\n<image>\nWhich?\n": "Which?",
        "One.\n<image>\n<video>\nTwo.": "One.\nTwo.",
    }.items():
        rows = [
            {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "!"}]}
        ]
        assert shown(open_dataset("llava", rows)[0])[0] == f"u {want}"


def test_llava_in_place() -> None:
    dataset = opened("llava", options={"placing": "in_place"})
    assert shown(dataset[2])[0] == "u Who wins?\n|video:/m/boats.mp4"
    assert shown(dataset[4]) == [
        "u video:/m/x.mp4|\nFirst?", "a A walk.", "u video:/m/y.mp4|\nSecond?", "a A swim.",
    ]  # fmt: skip
    with pytest.raises(SchemaError, match="1 media without a placeholder"):
        dataset[5]
    many = [{"conversations": [{"from": "human", "value": "<image>"}], "id": 1}]
    with pytest.raises(SchemaError, match="more placeholders than media"):
        open_dataset("llava", many, options={"placing": "in_place"})[0]
    odd = [{"conversations": [{"from": "robot", "value": "?"}]}]
    with pytest.raises(SchemaError, match="a message from 'robot'"):
        open_dataset("llava", odd)[0]
    odd = [{"conversations": [{"role": "tool", "content": "?"}]}]
    with pytest.raises(SchemaError, match="a message from 'tool'"):
        open_dataset("llava", odd)[0]


def test_options_of_adapters() -> None:
    few = opened("mmc4", options={"max_images": 1})
    assert [media.name for media in few[0].media] == ["/m/0b.jpg"]
    assert not opened("mmc4", options={"min_similarity": 0.5})[0].media
    assert opened("mmc4", media_dir=None)[0].media[0].name == "https://example.org/0a.jpg"
    assert shown(opened("vatex", options={"language": "ch"})[1])[1] == "a 有人指着。"
    assert shown(opened("scienceqa", options={"solution": True})[0])[1].startswith("a One presses")
    assert shown(opened("vcr", options={"rationale": False})[0])[1] == "a C. For the dog3's sake."
    path = opened("youcook2", options={"path": "{subset}/{recipe_type}/{id}.mkv"})
    assert path[0].media[0].name == "/m/training/100/yc0.mkv"
    assert opened("coyo", media_dir=None)[0].media[0].name == "https://example.org/0.jpg"
    assert shown(opened("shot2story")[4])[1] == "a A street, then a hall."
    with pytest.raises(ValueError, match=r"no options \['size'\]"):
        opened("coyo", options={"size": 3})


def test_pictures_with_text_are_plain_beside_conversations(tmp_path: Path) -> None:
    assert {name for name, adapter in ADAPTERS.items() if adapter.style} == {"mmc4", "coyo"}
    assert opened("mmc4")[0].style == opened("coyo")[0].style == "plain"
    assert opened("llava")[0].style is None
    (tmp_path / "a.jsonl").write_text('{"text": "a kettle", "image": "a.jpg"}\n')
    (tmp_path / "sets.yaml").write_text(
        "datasets:\n"
        "  own: {adapter: coyo, path: a.jsonl, style: chat}\n"
        "  as_it_is: {adapter: coyo, path: a.jsonl}\n"
    )
    datasets = read_file(tmp_path / "sets.yaml").datasets
    assert [datasets[name][0].style for name in ("own", "as_it_is")] == ["chat", "plain"]
    with pytest.raises(ValueError, match="style must be chat or plain, got 'llama_3'"):
        open_dataset("coyo", tmp_path / "a.jsonl", style="llama_3")


def test_webdataset_shards(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as out:
        for name, content in {
            "a.jpg": b"J", "a.txt": b"A boat.", "b.mp4": b"V", "b.json": b'{"caption": "A swim."}',
            "c.txt": b"Nothing to see.",
        }.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    dataset = open_dataset("webdataset", tmp_path)
    assert dataset[0].media == (Media("image", b"J"),) and dataset[0].turns[1].text == "A boat."
    assert dataset[1].media == (Media("video", b"V"),) and dataset[1].turns[1].text == "A swim."
    with pytest.raises(SchemaError, match="no picture and no video"):
        dataset[2]


def test_token_rows_are_not_texts() -> None:
    with pytest.raises(SchemaError, match="needs a list of token ids"):
        open_dataset("tokens", [{"text": "words"}])[0]
    sample = open_dataset("tokens", [{"input_ids": [1, 2, 3], "document_lengths": [1, 2]}])[0]
    assert sample.document_lengths == (1, 2)
    with pytest.raises(SchemaError, match="add up to 3"):
        open_dataset("tokens", [{"input_ids": [1, 2, 3], "document_lengths": [1]}])[0]


def test_files_of_datasets_and_mixtures(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(FILES["llava"].read_text())
    file = tmp_path / "data.yaml"
    file.write_text(
        "datasets:\n"
        "  clips: {adapter: llava, path: rows.json, media_dir: videos}\n"
        "  twice: {adapter: llava, path: [rows.json, rows.json]}\n"
        "mixtures: {sft: clips*2+twice}\n"
    )
    content = read_file(file)
    assert {name: len(each) for name, each in content.datasets.items()} == {"clips": 6, "twice": 12}
    assert content.datasets["clips"][0].media[0].name == str(tmp_path / "videos/a/kettle.jpg")
    assert content.mixtures == {"sft": "clips*2+twice"}
    for text, message in (
        ("datasets: {a: {adapter: llava, path: rows.json, folder: x}}", "dataset 'a': keys are"),
        ("data: {}", "expected the keys datasets"),
        ("datasets: {a: {adapter: lava, path: rows.json}}", "dataset 'a': .*did you mean 'llava'"),
        ("datasets: [a]", "are mappings"),
        ("datasets: {a: {adapter: llava, path: rows.json}}\nmixtures: [a]", "are mappings"),
        ("datasets: {a: {adapter: llava, path: rows.json}}\nmixtures: {b: 3}", "text like a"),
        ("datasets: {a b: {adapter: llava, path: rows.json}}", "'a b': mixtures cannot name it"),
        ("datasets: {a: {adapter: llava, path: null}}", "path is a text or a list"),
        ("datasets: {a: {adapter: llava, path: []}}", "path is a text or a list"),
        ("datasets: {a: {adapter: llava, path: rows.json, media_dir: 5}}", "media_dir a text"),
        ("datasets: {a: {adapter: llava, path: rows.json, options: x}}", "options are a mapping"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_file(file)


def test_numbers_are_names_and_home_folders_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.json").write_text(FILES["llava"].read_text())
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "data.yaml"
    file.write_text("datasets: {2024: {adapter: llava, path: ~/rows.json, media_dir: ~/m}}")
    content = read_file(file)
    assert len(Mixture(list(content.datasets.values()), "2024*2")) == 12
    assert content.datasets["2024"][0].media[0].name == str(tmp_path / "m/a/kettle.jpg")


@pytest.mark.parametrize(
    "said",
    [
        None, "text", ["Why?"], [{"from": "human"}], [{"from": "human", "value": None}],
        [{"from": "human", "value": [{"type": "text"}]}],
    ],
)  # fmt: skip
def test_conversations_of_another_shape_are_refused_by_name(said: Any) -> None:
    with pytest.raises(SchemaError, match="llava, record 0: "):
        open_dataset("llava", [{"conversations": said}])[0]


def test_a_record_that_an_adapter_cannot_read_is_named_with_the_reason() -> None:
    record = {"text_list": None, "image_info": []}
    with pytest.raises(SchemaError, match="record 0: is not what the adapter 'mmc4' reads: TypeE"):
        open_dataset("mmc4", [record])[0]


def test_pictures_as_bytes_are_one_picture() -> None:
    said = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    for picture in (b"JPEG", {"bytes": b"JPEG", "path": None}, [b"JPEG"]):
        found = open_dataset("llava", [{"image": picture, "conversations": said}])[0]
        assert found.media == (Media("image", b"JPEG"),)


def test_a_colon_in_a_name_is_no_address() -> None:
    record = {"video": "cam:10.mp4", "conversations": [{"from": "human", "value": "Why?"},
              {"from": "gpt", "value": "So."}]}  # fmt: skip
    assert open_dataset("llava", [record], media_dir="/m")[0].media[0].name == "/m/cam:10.mp4"
    for address in ("https://a/b.mp4", "data:video/mp4;base64,AA"):
        found = open_dataset("llava", [{**record, "video": address}], media_dir="/m")[0]
        assert found.media[0].name == address


def test_records_of_hugging_face_datasets_are_taken_by_index() -> None:
    class Table:
        """Stands for a ``datasets.Dataset``: a length, and rows by number."""

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, Any]:
            return json.loads(FILES["video-chatgpt"].read_text())[index]

    assert open_dataset("video-chatgpt", Table())[0].media[0].name == "v_id0.mp4"


@pytest.mark.parametrize("named", ["", " ", 5, float("nan"), True, {"url": "a.mp4"}])
def test_a_medium_that_is_no_name_is_refused_with_its_record(tmp_path: Path, named: Any) -> None:
    """An empty name would be the folder of all media, whose pictures are taken for frames."""
    row = {"video": named, "conversations": [{"from": "human", "value": "Why?"}]}
    dataset = open_dataset("llava", [row], media_dir=tmp_path, name="mine")
    with pytest.raises(SchemaError, match=r"mine, record 0: names (no )?video"):
        dataset[0]


@pytest.mark.parametrize("ids", [[1, 2.5], [1, float("nan")], [1, 2**70], [1, -5], ["1"], [True]])
def test_ids_that_are_no_whole_numbers_are_refused(ids: list[Any]) -> None:
    """They were cut to whole numbers, or ended the run without a word of the record."""
    with pytest.raises(SchemaError, match="tokens, record 0: "):
        open_dataset("tokens", [{"text": ids}])[0]


def test_ids_and_lengths_may_be_written_with_a_point() -> None:
    sample = open_dataset("tokens", [{"text": [1.0, 2.0], "document_lengths": [1.0, 1.0]}])[0]
    assert sample.token_ids is not None
    assert sample.token_ids.tolist() == [1, 2] and sample.document_lengths == (1, 1)
    with pytest.raises(SchemaError, match="whole numbers"):
        open_dataset("tokens", [{"text": [1, 2], "document_lengths": [1.2, 1]}])[0]
