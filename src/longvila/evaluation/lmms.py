"""The model as lmms-eval's plug-in, found by its entry point, without a fork of lmms-eval.

    lmms-eval --model longvila --model_args pretrained=CHECKPOINT --tasks videomme

lmms-eval loads data, makes requests and computes its metrics; this class answers. It takes the
requests of all ranks together, so that a video is read once for all its questions and ranks may
share a sequence (`longvila.evaluation.asking`), however lmms-eval dealt them.

Model arguments: ``pretrained`` (folder or hub id), ``num_frames`` (a number, or ``paper`` for each
benchmark's own), ``fps``, ``device``, ``dtype``, ``log`` (folder of answers: what a run that was
interrupted goes on from, and where frames, prompt, answer and parse of every question are),
``seq_parallel_size`` and ``seq_parallel_ring_type`` under torchrun, ``seed``, and ``keep`` to hold
the model when lmms-eval is done with it.

lmms-eval's own ``--use_cache`` may leave ranks without questions, which then wait for others:
on several ranks use ``log`` instead. Likelihoods are not asked of chat models; rounds of several
turns that depend on answers are refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from longvila import build_mesh
from longvila.evaluation.answers import Answers
from longvila.evaluation.asking import Asking, Place, Question
from longvila.evaluation.families import open_answerer
from longvila.evaluation.lmms_media import normal_messages
from longvila.evaluation.lmms_share import Ranks
from longvila.evaluation.presets import Preset, find_preset, preset_of_task
from longvila.inference.engine import Engine
from longvila.inference.sight import NUM_FRAMES
from longvila.log import get_logger, log_once
from longvila.model.opening import open_checkpoint

_LOG = get_logger(__name__)
_DTYPES = ("bfloat16", "float16", "float32")
#: Of a task's generation settings; the others mean nothing to this model.
_GREEDY = ("max_new_tokens", "num_beams", "do_sample", "repetition_penalty")
_SAMPLING = ("temperature", "top_p", "top_k")
#: Longest answer of a task that says nothing about it.
_NEW_TOKENS = 128


def manifest() -> ModelManifest:
    """Return what the entry point group ``lmms_eval.models`` wants to know."""
    return ModelManifest(
        model_id="longvila", chat_class_path="longvila.evaluation.lmms.LongVILA", aliases=("vila",)
    )


class LongVILA(lmms):  # type: ignore[misc]
    """LongVILA behind lmms-eval; see the module for the arguments, which come as strings."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_frames: int | str = "paper",
        fps: float | None = None,
        device: str | None = None,
        dtype: str = "auto",
        log: str | None = None,
        seq_parallel_size: int = 1,
        seq_parallel_ring_type: str = "zigzag_ring_varlen",
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self.keep = keep
        if num_frames != "paper" and int(num_frames) < 1:
            raise ValueError(f"num_frames must be a positive number or paper, got {num_frames}")
        if batch_size not in (None, 1, "1"):
            log_once(
                __name__, 30, "questions about one video are asked one by one; batch_size is unused"
            )
        self.num_frames, self.fps = num_frames, fps
        self.device = _join(device)
        model, processor, name = load_model(pretrained, self.device, dtype)
        text = model.config.get_text_config()
        mesh = build_mesh(
            int(seq_parallel_size),
            ring_type=seq_parallel_ring_type,  # type: ignore[arg-type]
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
        )
        many = dist.is_initialized()
        place = Place(
            ranks=dist.get_world_size() if many else 1,
            rank=dist.get_rank() if many else 0,
            groups=mesh.dp_size if many else 1,
            group=mesh.dp_rank if many else 0,
            leads=mesh.sp_rank == 0 if many else True,
            shares=Ranks(mesh.sp_group, mesh.sp_rank, mesh.sp_size) if mesh.sp_size > 1 else None,
        )
        self._rank, self._world_size = place.rank, place.ranks
        self.engine = Engine(model, mesh)
        self.processor = processor
        self.asking = Asking(
            open_answerer(self.engine, processor),
            Answers(Path(log) if log else None, f"group-{place.group}" if place.leads else None),
            settings={"model": name, "dtype": str(model.dtype)},
            seed=int(seed),
            place=place,
            progress=self._report,
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer requests; every rank makes the call with its own.

        Args:
            requests: lmms-eval's.

        Returns:
            The answers, in order. Requests that only fill up a rank are not asked.

        Comm: As `Asking.ask`.
        """
        real = [i for i, r in enumerate(requests) if not r.metadata.get("__padding_only__")]
        seen: Counter[tuple[str, str, int]] = Counter()
        records = self.asking.ask([self.question(requests[i], seen) for i in real])
        answers = [""] * len(requests)
        for i, record in zip(real, records, strict=True):
            answers[i] = record["answer"]
            context, _, options = requests[i].args[:3]
            self.cache_hook.add_partial("generate_until", (context, options), answers[i])
        return answers

    def question(self, request: Instance, seen: Counter[tuple[str, str, int]]) -> Question:
        """Return the question of a request.

        Args:
            request: lmms-eval's.
            seen: How often each document was asked before; counted on.
        """
        _, _, options, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        preset = self.preset_of(request)
        repeat = seen[task, split, doc_id]
        seen[task, split, doc_id] += 1
        generation, until = generation_options(
            options, preset.new_tokens if preset is not None else None
        )
        joined = preset is not None and preset.frames_as_video
        messages, missing = shown_by(request, doc)
        return Question(
            task=task,
            split=split,
            doc_id=int(doc_id),
            repeat=repeat,
            messages=tuple(normal_messages(messages, frames_as_video=joined)),
            missing=missing,
            frames=self.frames_of(preset),
            options=generation,
            until=until,
            benchmark=None if preset is None else preset.name,
            sample=None if preset is None else preset.read(doc),
            fps=None if self.fps is None else float(self.fps),
        )

    @staticmethod
    def preset_of(request: Instance) -> Preset | None:
        """Return the benchmark of a request: the one its task file names, or the task's.

        Args:
            request: lmms-eval's.
        """
        named = request.metadata.get("benchmark")
        return find_preset(named) if named else preset_of_task(request.metadata["task"])

    def frames_of(self, preset: Preset | None) -> int:
        """Return how many frames of a video a benchmark's questions see.

        Args:
            preset: The benchmark, if it is known.
        """
        if self.num_frames != "paper":
            return int(self.num_frames)
        sampled = self.asking.answerer.sampler.num_frames
        return (sampled or NUM_FRAMES) if preset is None else preset.frames

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse: lmms-eval asks chat models to generate."""
        raise NotImplementedError(
            "this plug-in answers in words, not with likelihoods: take tasks of output_type "
            "generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse."""
        raise NotImplementedError(
            "this plug-in answers in one round: take tasks of output_type generate_until"
        )

    def clean(self) -> None:
        """Free the model, for a judge that lmms-eval may start next; not if it is to be kept."""
        if self.keep:
            return
        self.asking.answers.close()
        self.engine.close()
        model: Any = self.engine.model
        model.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _report(self, done: int, total: int) -> None:
        _LOG.info("group %d: %d of %d videos", self.asking.place.group, done, total)


def shown_by(request: Instance, doc: Mapping[str, Any]) -> tuple[list[Any], str]:
    """Return the messages of a request, or its words alone and why its video is not there.

    Args:
        request: lmms-eval's.
        doc: Its document.

    Returns:
        Messages, and what is missing.
    """
    try:
        return request.args[1](doc), ""
    # Tasks of lmms-eval end the whole process, and all ranks with it, over one missing video.
    except (FileNotFoundError, AssertionError, SystemExit) as fault:
        words = [{"role": "user", "content": str(request.args[0])}]
        return words, f"FileNotFoundError: {fault or request.metadata['task']}"


def generation_options(
    given: Mapping[str, Any], new_tokens: int | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what of a task's generation settings concerns the model, and the texts that end it.

    Args:
        given: The task's.
        new_tokens: Longest answer if the task does not say.

    Returns:
        Options of transformers' generation, and the texts.
    """
    options = {name: given[name] for name in _GREEDY if given.get(name) is not None}
    options["max_new_tokens"] = int(options.get("max_new_tokens") or new_tokens or _NEW_TOKENS)
    temperature = given.get("temperature")
    # Tasks say greedy in every way there is: a temperature of zero, or none, or do_sample.
    options["do_sample"] = bool(options.get("do_sample", temperature)) and temperature != 0
    if options["do_sample"]:
        options |= {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    until = given.get("until") or ()
    return options, (until,) if isinstance(until, str) else tuple(until)


def load_model(pretrained: str, device: torch.device, dtype: str) -> tuple[Any, Any, str]:
    """Load a model and its processor.

    Args:
        pretrained: Folder or hub id; the original's layout is understood.
        device: Where it runs.
        dtype: Name of its precision; auto is bfloat16 on a GPU, float32 elsewhere.

    Returns:
        Model, processor, and a name that tells checkpoints apart.

    Raises:
        CheckpointError: If there is no such checkpoint.
        ValueError: If the precision has no such name.
    """
    if dtype not in ("auto", *_DTYPES):
        raise ValueError(f"dtype must be auto or one of {', '.join(_DTYPES)}, got {dtype}")
    model, processor = open_checkpoint(pretrained, device=device, dtype=dtype, label="pretrained")
    folder = Path(pretrained)
    name = str(folder.resolve()) if folder.exists() else pretrained
    commit = getattr(model.config, "_commit_hash", None)
    return model, processor, f"{name}@{commit}" if commit else name


def _join(device: str | None) -> torch.device:
    """Join the job that started this process, and return the device of this rank."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    wanted = device if device not in (None, "auto") else None
    on_gpu = torch.cuda.is_available() and (wanted is None or wanted.startswith("cuda"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if not on_gpu:
        return torch.device(wanted or "cpu")
    place = torch.device(wanted) if wanted and ":" in wanted else torch.device("cuda", local)
    torch.cuda.set_device(place)
    return place
