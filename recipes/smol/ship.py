"""Put what the demo needs into the package: needle pictures, names, the trained delta.

    python recipes/smol/ship.py --delta WORK/deltas/furthest.safetensors --num-frames 256
    python recipes/smol/ship.py SOURCES

The pictures are listed in ``splits/shipped.tsv``; all are openclipart's, released to the public
domain. Whether one was seen in training is looked up in the splits, not typed. ``names.json`` holds
the trained names, from which the demo draws the wrong choices.

The delta is stored in eight bits, without components of an update that are nothing but rounding
(stages whose ranks add up to less than the file's leave such). What that changes of each matrix's
update is printed, and a file above the limit is refused. It also says how its model wants
videos: a frame a second, up to a number that a CPU reads in minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from longvila.model.delta import read_delta, read_delta_metadata, save_delta

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "src" / "longvila" / "assets"
LIMIT_MB = 40.0
#: How the model is shown videos where nobody says otherwise: as many frames as stage 3 showed it.
#: A delta of stage 5 says more (``--num-frames``).
VIDEO: dict[str, Any] = {"short": "all", "fps": 1.0, "num_frames": 32}
#: Components of an update that are smaller than this share of its largest are rounding.
ROUNDING = 1e-5


def read_split(name: str) -> dict[str, str]:
    """Read one list of the splits: picture id -> name."""
    lines = (HERE / "splits" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return {line.split("\t")[1]: line.split("\t")[0] for line in lines}


def ship_pictures(sources: Path) -> None:
    """Write the pictures, their index and the trained names into the package.

    Args:
        sources: Packages that ``prepare.py`` fetched.

    Raises:
        ValueError: If one may not be shipped, is missing, or is neither seen nor unseen.
    """
    from pictures import gather
    from prepare import render

    folder = ASSETS / "needles"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train, unseen, shipped = read_split("train"), read_split("b"), read_split("shipped")
    entries = []
    for picture in gather(sources):
        if picture.id not in shipped:
            continue
        if not picture.id.startswith("openclipart/"):
            raise ValueError(f"{picture.id} may not be shipped: only openclipart is public domain")
        if (picture.id in train) == (picture.id in unseen):
            raise ValueError(f"{picture.id} is neither plainly seen nor plainly unseen")
        seen = picture.id in train
        name = picture.name.replace(" ", "-") + ("" if seen else "-unseen") + ".webp"
        render(picture).save(folder / name, "WEBP", quality=85, method=6)
        entries.append({"file": name, "name": picture.name, "seen": seen, "source": picture.id})
    missing = set(shipped) - {str(entry["source"]) for entry in entries}
    if missing:
        raise ValueError(f"not in the packages: {sorted(missing)}")
    entries.sort(key=lambda entry: str(entry["file"]))
    (folder / "needles.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    names = sorted(set(train.values()))
    (ASSETS / "names.json").write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")
    print(f"{len(entries)} pictures, {len(names)} names")


def ship_delta(
    source: Path,
    target: Path,
    *,
    limit_mb: float = LIMIT_MB,
    num_frames: int = VIDEO["num_frames"],
) -> dict[str, Any]:
    """Store a delta in eight bits.

    Args:
        source: What ``run.py`` wrote.
        target: The file to make.
        limit_mb: Its largest size.
        num_frames: Most frames of a video where nobody says otherwise.

    Returns:
        ``size_mb``, and ``rounding_max`` and ``rounding_mean``: the changed share (Frobenius norm)
        of the update of a tensor.

    Raises:
        ValueError: If the file would be larger; nothing is written.
    """
    whole, metadata = read_delta(source), read_delta_metadata(source)
    delta = without_rounding(whole)
    init = metadata.pop("init")
    metadata.pop("format")
    notes = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    notes["video_processor"] = json.dumps({**VIDEO, "num_frames": num_frames})
    partial = target.with_name(f".{target.name}")
    save_delta(delta, partial, init=init, dtype=torch.int8, **notes)
    errors = list(rounding(whole, read_delta(partial)).values())
    figures = {
        "size_mb": partial.stat().st_size / 1e6,
        "rounding_max": max(errors),
        "rounding_mean": sum(errors) / len(errors),
    }
    if figures["size_mb"] > limit_mb:
        partial.unlink()
        raise ValueError(
            f"{source.name} needs {figures['size_mb']:.1f} MB in eight bits, and {limit_mb:g} MB "
            "are allowed: write it with smaller RANKS (run.py)"
        )
    partial.chmod(0o644)
    partial.replace(target)
    return figures


def without_rounding(delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a delta without the components that its updates do not have.

    Args:
        delta: As `longvila.model.delta.difference` finds it: components of one update are
            orthogonal, so that the sizes of its rows and columns are those of what they add.
    """
    out = dict(delta)
    for key in delta:
        if key.endswith(".lora_A"):
            up = key.removesuffix("A") + "B"
            sizes = delta[key].norm(dim=1) * delta[up].norm(dim=0)
            kept = sizes > ROUNDING * sizes.max()
            out[key], out[up] = delta[key][kept], delta[up][:, kept]
    return out


def rounding(exact: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return, for each parameter, which share of its update storing changed."""
    shares = {}
    for key, value in exact.items():
        if key.endswith(".lora_B"):
            continue
        other = stored[key]
        if key.endswith(".lora_A"):
            up = key.removesuffix("A") + "B"
            value, other = exact[up] @ value, stored[up] @ other
        shares[key.removesuffix(".lora_A")] = float((other - value).norm() / value.norm())
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path, nargs="?", help="write the pictures anew, from here")
    parser.add_argument("--delta", type=Path, help="ship this delta")
    parser.add_argument("--limit-mb", type=float, default=LIMIT_MB)
    parser.add_argument(
        "--num-frames", type=int, default=VIDEO["num_frames"],
        help="most frames of a video where nobody says otherwise",
    )  # fmt: skip
    args = parser.parse_args()
    if args.sources is not None:
        ship_pictures(args.sources)
    if args.delta is not None:
        target = ASSETS / "smol-delta.safetensors"
        found = ship_delta(args.delta, target, limit_mb=args.limit_mb, num_frames=args.num_frames)
        print(
            f"delta: {found['size_mb']:.2f} MB; eight bits change {found['rounding_mean']:.2%} of "
            f"an update on average, {found['rounding_max']:.2%} at most"
        )
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB in {ASSETS}")


if __name__ == "__main__":
    main()
