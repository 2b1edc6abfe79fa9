"""Needles and haystacks of every kind that people have."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longvila.evaluation.needle_sets import (
    NeedleError,
    load_needles,
    open_haystack,
    pasted,
    whole_frame,
)
from longvila.media.synthetic import clip, read_number
from longvila.packaged import asset
from longvila.testing.tiny import tiny_processor

from .cases import needles


def _picture(path: Path, colour: str = "red", size: tuple[int, int] = (8, 6)) -> Path:
    Image.new("RGBA", size, colour).save(path)
    return path


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    _picture(tmp_path / "teddy-bear.png")
    _picture(tmp_path / "Old_Key.webp", "blue")
    (tmp_path / "notes.txt").write_text("no picture")
    found = load_needles(tmp_path)
    assert [(n.id, n.answer, n.question) for n in found] == [
        ("Old_Key", "old key", None), ("teddy-bear", "teddy bear", None),
    ]  # fmt: skip
    assert found[1].open().getpixel((0, 0)) == (255, 0, 0, 255)


def test_pictures_as_people_have_them(tmp_path: Path) -> None:
    names = ["Red Balloon.PNG", "cat.jpg", "cat.png", "cat (2).JPEG", "Löwe.webp"]
    for name in names:
        Image.new("RGB", (8, 6), "red").save(tmp_path / name)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    Image.new("RGB", (8, 6), "red").save(tmp_path / "dog.jpg", exif=sideways)
    found = {needle.id: needle for needle in load_needles(tmp_path)}
    assert {id: n.answer for id, n in found.items()} == {
        "Red Balloon": "red balloon", "cat.jpg": "cat", "cat.png": "cat", "cat (2)": "cat",
        "Löwe": "löwe", "dog": "dog",
    }  # fmt: skip
    assert found["dog"].open().size == (6, 8)
    (tmp_path / "bird.jpg").write_text("no picture")
    with pytest.raises(NeedleError, match=r"bird.jpg cannot be read as a picture"):
        load_needles(tmp_path)
    (tmp_path / "bird.jpg").rename(tmp_path / "___.jpg")
    with pytest.raises(NeedleError, match="name must be the name of what it shows"):
        load_needles(tmp_path)


def test_pictures_of_other_kinds_and_files_that_nobody_sees(tmp_path: Path) -> None:
    moving = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    moving[0].save(tmp_path / "top.gif", save_all=True, append_images=moving[1:])
    levels = np.full((6, 8), 0x8000, np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    Image.new("1", (1, 1)).save(tmp_path / "dot.png")
    # As one system writes names, and what it leaves beside files.
    Image.new("RGB", (8, 6)).save(tmp_path / "lo\u0308we.png")
    (tmp_path / "._top.png").write_bytes(b"\0")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    found = {needle.answer: needle.open() for needle in load_needles(tmp_path)}
    assert set(found) == {"top", "deep", "dot", "l\u00f6we"}
    assert found["top"].getpixel((0, 0)) == (255, 0, 0, 255)
    assert found["deep"].getpixel((0, 0)) == (128, 128, 128, 255)
    _picture(tmp_path / "ghost.png", "#ff000000")
    with pytest.raises(NeedleError, match="'ghost' is transparent everywhere"):
        load_needles(tmp_path)
    (tmp_path / "ghost.png").unlink()
    Image.new("F", (4, 4), 0.5).save(tmp_path / "map.tiff")
    with pytest.raises(NeedleError, match=r"map.tiff cannot be read .* has floating-point pixels"):
        load_needles(tmp_path)
    (tmp_path / "map.tiff").unlink()
    (tmp_path / "logo.svg").write_text("<svg/>")
    with pytest.raises(NeedleError, match=r"logo.svg cannot be read as a picture: save it as PNG"):
        load_needles(tmp_path)
    (tmp_path / "logo.svg").unlink()
    drawn = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "drawn.png").write_text(drawn)
    with pytest.raises(NeedleError, match=r"drawn.png cannot be .* is PostScript, a program"):
        load_needles(tmp_path)


def test_lists(tmp_path: Path) -> None:
    _picture(tmp_path / "a.png")
    entries: list[dict[str, Any]] = [
        {"file": "a.png", "name": "ant", "seen": False},
        {"image": "a.png", "id": "own", "answer": "B", "question": "Which? A or B", "tier": "x",
         "options": ["A", "B"]},
    ]  # fmt: skip
    (tmp_path / "needles.json").write_text(json.dumps(entries))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, entries)))
    for source in (tmp_path, tmp_path / "needles.json", tmp_path / "lines.jsonl"):
        ant, own = load_needles(source)
        assert (ant.id, ant.answer, ant.tier) == ("a", "ant", "unseen")
        assert (own.question, own.options, own.tier) == ("Which? A or B", ("A", "B"), "x")
        assert [n.id for n in load_needles(source, tier="x")] == ["own"]
    (tmp_path / "lines.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({**entries[0], "question": "a\u2028b", "tier": 1},
                                    ensure_ascii=False).encode()
    )  # fmt: skip
    assert load_needles(tmp_path / "lines.jsonl")[0].question == "a\u2028b"
    with pytest.raises(NeedleError, match="no needle of tier 'y'; its tiers are"):
        load_needles(tmp_path, tier="y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": " "}, "entry 0 needs a picture .* and one answer"),
        ({"file": 1}, "entry 0 needs a picture"),
        ({"answer": ["sofa", "couch"]}, "entry 0 needs a picture .* and one answer"),
        ({"question": 3}, "a question is a text, options are a list"),
        ({"options": "ab"}, "a question is a text, options are a list"),
        ({"options": ["b", "c"]}, r"'a' is none of \['b', 'c'\]"),
    ],
)
def test_entries_that_are_none_are_told(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _picture(tmp_path / "a.png")
    file = tmp_path / "needles.json"
    file.write_text(json.dumps([{"file": "a.png", "name": "a", **change}]))
    with pytest.raises(NeedleError, match=message):
        load_needles(file)
    file.write_bytes('[{"name": "Löwe"}]'.encode("latin-1"))
    with pytest.raises(NeedleError, match="is not JSON"):
        load_needles(file)


def test_longvas_list(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    _picture(tmp_path / "images" / "pills.png")
    prompt = "\nFind the frame of the tablets. How many mg has each?"
    entries = [{"path": "pills.png", "prompt": prompt, "answer": answer} for answer in ("200", 0)]
    entries[1]["id"] = "none"
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    needles = load_needles(tmp_path)
    assert [n.id for n in load_needles(tmp_path / "dataset.json")] == ["pills", "none"]
    assert [(needle.question, needle.answer) for needle in needles] == [
        (prompt, "200"),
        (prompt, "0"),
    ]
    assert needles[0].open().mode == "RGBA"


def test_shipped_pictures_are_a_set() -> None:
    folder = asset("needles")
    assert folder is not None
    assert {n.tier for n in load_needles(folder)} == {"seen", "unseen"}


def test_longvas_format(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "lime").save(buffer, "PNG")
    rows = [
        {"image": {"bytes": buffer.getvalue(), "path": None}, "question": f"Q{k}", "answer": "C"}
        for k in range(2)
    ]
    (tmp_path / "data").mkdir()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "data" / "test-0.parquet")
    for source in (tmp_path, tmp_path / "data" / "test-0.parquet"):
        found = load_needles(source)
        assert [(n.id, n.question, n.answer) for n in found] == [
            ("test-0-0", "Q0", "C"), ("test-0-1", "Q1", "C"),
        ]  # fmt: skip
        assert found[1].open().getpixel((0, 0)) == (0, 255, 0, 255)
    pyarrow.parquet.write_table(table.drop_columns("answer"), tmp_path / "other.parquet")
    with pytest.raises(NeedleError, match=r"\['answer'\] missing"):
        load_needles(tmp_path / "other.parquet")


def test_a_set_that_is_not_there_says_what_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(NeedleError, match=r"cannot be had from the Hugging Face Hub \(no network"):
        load_needles("lmms-lab/v_niah_needles")
    with pytest.raises(NeedleError, match="neither a file, a folder nor"):
        load_needles("./nowhere/x/y")
    with pytest.raises(NeedleError, match="holds no picture"):
        load_needles(tmp_path)
    (tmp_path / "needles.json").write_text("{")
    with pytest.raises(NeedleError, match="is not JSON"):
        load_needles(tmp_path)
    (tmp_path / "needles.json").write_text('[{"file": "a.png"}]')
    with pytest.raises(NeedleError, match="entry 0 needs a picture"):
        load_needles(tmp_path)
    (tmp_path / "needles.json").write_text('[{"file": "a.png", "name": "a"}]')
    with pytest.raises(NeedleError, match="there is no picture"):
        load_needles(tmp_path)
    _picture(tmp_path / "a.png")
    (tmp_path / "needles.json").write_text(json.dumps([{"file": "a.png", "name": "a"}] * 2))
    with pytest.raises(NeedleError, match="more than one needle called a"):
        load_needles(tmp_path)


def test_drawing() -> None:
    part = tiny_processor(image_aspect_ratio="pad").video_processor
    (apple,) = needles(1)
    frame = whole_frame(apple, part.square)
    assert frame.shape == (20, 20, 3) and (frame == (255, 0, 0)).all()
    film = np.zeros((20, 30, 3), np.uint8)
    out = pasted(film, apple, (1.0, 0.0), share=0.5)
    red = (out == (255, 0, 0)).all(-1)
    assert 0.08 < red.mean() < 0.2 and not red[:, :18].any() and not red[11:].any()
    assert film.max() == 0
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    see_through = type(apple)("x", "x", lambda: clear)
    assert (whole_frame(see_through, part.square) == 255).all()


def _film(source: Any, **options: Any) -> Any:
    part = tiny_processor(size={"height": 48, "width": 64}).video_processor
    options = {"num_frames": 4, "fps": 1.0, **options}
    return open_haystack(source, processor=part, **options)


def _numbers(haystack: Any, count: int) -> list[int | None]:
    return [read_number(haystack.book.frame(k)) for k in range(count)]


def test_a_film_is_sampled_by_the_second(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 24 * 6)
    film = _film(path, num_frames=6, block=4)
    assert _numbers(film, 6) == [0, 24, 48, 72, 96, 120]
    assert (film.label, film.step_s, film.repeats) == ("a.mp4", 1.0, 1)
    assert _numbers(_film(path, num_frames=12, fps=2), 3) == [0, 12, 24]


def test_films_of_a_folder_follow_each_other_and_may_repeat(tmp_path: Path) -> None:
    clip(tmp_path / "b.mp4", 24 * 2, first_number=1000)
    clip(tmp_path / "a.mp4", 24 * 3)
    film = _film(tmp_path, num_frames=5, block=2)
    assert _numbers(film, 5) == [0, 24, 48, 1000, 1024]
    again = _film(tmp_path, num_frames=9, repeat=True, block=4)
    assert _numbers(again, 9) == [0, 24, 48, 1000, 1024, 0, 24, 48, 1000] and again.repeats == 2
    many = _film(tmp_path, num_frames=16, repeat=True, block=16)
    assert _numbers(many, 16)[8:12] == [1000, 1024, 0, 24] and many.repeats == 4
    with pytest.raises(NeedleError, match=r"gives 5 frames .* and 9 are needed: .*--fps 1.8"):
        _film(tmp_path, num_frames=9)
    assert len(_numbers(_film(tmp_path, num_frames=9, fps=1.8), 9)) == 9


def test_the_rate_that_is_offered_does(tmp_path: Path) -> None:
    # Ten seconds and a half give eleven frames at one a second, but 21 at two.
    path = clip(tmp_path / "a.mp4", 252)
    with pytest.raises(NeedleError, match=r"gives 11 frames .* 22 are needed: .*--fps 2\.1\)"):
        _film(path, num_frames=22)
    assert _numbers(_film(path, num_frames=22, fps=2.1), 22)[-1] == 240
    with pytest.raises(NeedleError, match="must be a number above zero, got inf"):
        _film(path, fps=float("inf"))


def test_folders_as_people_have_them(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        clip(tmp_path / f"film {number}.MP4", 24, first_number=1000 * number)
    _picture(tmp_path / "poster.png")
    for name in (".DS_Store", "._film 1.MP4", "film 1.srt"):
        (tmp_path / name).write_bytes(b"x")
    assert _numbers(_film(tmp_path, num_frames=3), 3) == [1000, 2000, 10000]
    for film in tmp_path.glob("film*.MP4"):
        film.unlink()
    with pytest.raises(NeedleError, match=r"gives 1 frames .* are needed: show it again"):
        _film(tmp_path)


def test_a_part_of_a_film(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 24 * 8)
    assert _numbers(_film(path, part=(0.5, 1.0)), 4) == [96, 120, 144, 168]
    assert _numbers(_film(path, num_frames=2, part=(0.25, 0.5)), 2) == [48, 72]
    with pytest.raises(NeedleError, match="gives 4 frames"):
        _film(path, num_frames=5, part=(0.5, 1.0))
    with pytest.raises(NeedleError, match=r"two shares of it in order, .*got 0.5 0.5"):
        _film(path, part=(0.5, 0.5))


def test_a_folder_of_pictures_is_a_film(tmp_path: Path) -> None:
    for number, colour in enumerate(("red", "lime", "blue", "red")):
        _picture(tmp_path / f"{number}.png", colour, (64, 48))
    film = _film(tmp_path)
    assert [int(film.book.frame(k).argmax(-1)[0, 0]) for k in range(4)] == [0, 1, 2, 0]


def test_padded_frames_keep_their_shape(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 24, height=48, width=128)
    part = tiny_processor(
        size={"height": 64, "width": 64}, image_aspect_ratio="pad"
    ).video_processor
    film = open_haystack(path, num_frames=1, fps=1.0, processor=part)
    frame = film.book.frame(0)
    assert frame.shape == (64, 64, 3) and (frame[:18] == 127).all() and (frame[-18:] == 127).all()


def test_broken_and_missing_films_are_errors(tmp_path: Path) -> None:
    with pytest.raises(NeedleError, match="there is no haystack"):
        _film(tmp_path / "none.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NeedleError, match="is empty"):
        _film(tmp_path / "empty")
    for number in range(3):
        _picture(tmp_path / "empty" / f"{number}.png", size=(64, 48))
    (tmp_path / "empty" / "1.png").write_bytes(b"not a picture")
    film = _film(tmp_path / "empty", num_frames=3, block=2)
    first = film.book.frame(0)
    assert first.shape == (48, 64, 3) and film.undecoded() == ["empty, frame 1"]
    assert (film.book.frame(1) == first).all()
    assert (_film(tmp_path / "empty", num_frames=3, block=1).book.frame(1) == 128).all()
    again = _film(tmp_path / "empty", num_frames=6, block=6, repeat=True)
    assert all((again.book.frame(k) == first).all() for k in (1, 4))


def test_a_drawn_film_says_so_and_no_frame_is_like_another() -> None:
    part = tiny_processor().video_processor
    film = open_haystack("synthetic", num_frames=300, fps=1.0, processor=part)
    assert film.label.startswith("synthetic")
    frames = {film.book.frame(k).tobytes() for k in range(300)}
    assert len(frames) == 300


def test_a_picture_whose_exif_is_damaged_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "dog.webp"
    Image.new("RGBA", (8, 6), "red").save(path, lossless=True, exif=b"Exif\0\0damaged")
    (needle,) = load_needles(tmp_path)
    assert needle.open().getpixel((3, 3)) == (255, 0, 0, 255)
