"""A stage from files to files: what every rank does between its start and the finished model.

    1. join the job (torchrun's variables, or one process alone), plan the mesh
    2. load the model, give it the stage's context, freeze and adapt, put it on the mesh
    3. open the data file, build this rank's loader
    4. run the stage
    5. gather the weights, merge the adapter, write model and processor; also in the original's
       layout if the stage says so

The output folder is the next stage's model. Its ``config.json`` is written last: a folder that has
one is finished, and is not trained again. Beside the weights stand ``stage.yaml`` (the settings
that ran), ``metrics.jsonl``, and the saves.

Every rank reads the whole model once in the type of its files and keeps its float32 shards.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from longvila.data.agreement import Agreement
from longvila.data.families import coders
from longvila.data.loader import PackedLoader
from longvila.errors import CheckpointError, ContextLengthError, LongVILAError
from longvila.log import get_logger
from longvila.memory.offload import Offload
from longvila.model.configuration_longvila import LongVILAConfig
from longvila.model.convert_vila import convert_to_vila
from longvila.model.opening import check_whole, loading
from longvila.parallel.apply import ParallelPlan, parallelize
from longvila.parallel.families import find_family
from longvila.parallel.mmsp import plan_media
from longvila.sp.mesh import SPMesh, build_mesh
from longvila.train.checkpoint import held, seed_everything, writing
from longvila.train.loop import Progress, run_stage
from longvila.train.parts import export_state, named_parts, save_plain, set_context, tune
from longvila.train.settings import leaves, read_yaml, to_yaml
from longvila.train.stages import Stage, StageError, choose_seq_parallel_size, open_mixture

_LOG = get_logger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a stage runs on.

    Attributes:
        stage: The stage.
        model: Folder (or hub name) of the model to begin from.
        data: File that lists datasets and mixtures.
        output: Folder of the result.
        stop_after: Steps after which to save and end, for trials; None for the whole stage.
    """

    stage: Stage
    model: str
    data: Path
    output: Path
    stop_after: int | None = None


@contextmanager
def joined() -> Iterator[torch.device]:
    """Join the job that started this process, and leave it at the end.

    Yields:
        The device of this rank: a GPU where there is one, else the CPU.
    """
    on_gpu = torch.cuda.is_available()
    local = _local_rank()
    if on_gpu and torch.cuda.device_count() == 1:
        local = 0  # launchers that show each rank its own GPU alone call all of them the first
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    mine = not dist.is_initialized()
    if mine and "RANK" in os.environ:
        try:
            dist.init_process_group(backend, timeout=timedelta(hours=1))
        except dist.DistError as fault:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise LongVILAError(
                f"rank {os.environ['RANK']} cannot meet the others at {where} (MASTER_ADDR and "
                f"MASTER_PORT): {str(fault).splitlines()[0]}"
            ) from fault
    elif mine:
        # One process alone shards over itself, so that it takes the very same path.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        if mine:
            dist.destroy_process_group()


def _local_rank() -> int:
    """Check what the launcher says of this process, and return its number on the machine.

    Raises:
        LongVILAError: If a word is missing or wrong, on which the ranks would wait for each other.
    """
    numbers = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}
    if "RANK" in os.environ and not dist.is_initialized():
        needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if not os.environ.get(name)]:
            raise LongVILAError(
                f"RANK is set, {', '.join(missing)} not: a launcher sets RANK, LOCAL_RANK, "
                "WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without one, unset RANK"
            )
        numbers |= {name: os.environ[name] for name in ("RANK", "WORLD_SIZE")}
    if wrong := [f"{name}={value}" for name, value in numbers.items() if not value.isdecimal()]:
        raise LongVILAError(f"the launcher's {', '.join(wrong)}: expected a number")
    rank, world, local = (int(value) for value in numbers.values())
    if rank >= world:
        raise LongVILAError(f"RANK is {rank}, but WORLD_SIZE {world}: ranks count from 0")
    return local


def _check_same_job(job: Job) -> None:
    """Refuse ranks that were given different settings: each would train its shards by its own.

    Raises:
        StageError: On every rank, naming what differs.

    Comm: One all-gather of objects.
    """
    mine = {"--output": str(job.output), "--stop-after": job.stop_after, **leaves(job.stage)}
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    first = everyones[0]
    for rank, theirs in enumerate(everyones):
        names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if names:
            told = (f"{name} is {first.get(name)} on rank 0, {theirs.get(name)}" for name in names)
            raise StageError(
                f"ranks were started with different settings: {'; '.join(told)} on rank {rank}. "
                "Give every process the same command and files"
            )


def is_finished(output: Path) -> bool:
    """Return whether a folder holds the result of a stage."""
    return (output / "config.json").is_file()


def _stage_of(output: Path) -> Any:
    settings = output / "stage.yaml"
    return read_yaml(settings).get("name") if settings.is_file() else None


def train(job: Job) -> Progress | None:
    """Run a stage on this rank.

    Args:
        job: The stage and its files; the same on every rank.

    Returns:
        How far it came; None if the output was finished before.
    """
    with joined() as device:
        _check_same_job(job)
        finished = [is_finished(job.output), _stage_of(job.output)]
        dist.broadcast_object_list(finished, src=0)
        if finished[0]:
            if finished[1] != job.stage.name:
                raise CheckpointError(
                    f"{job.output} holds a finished model, of {finished[1] or 'no stage'}; give "
                    f"{job.stage.name} an output folder of its own"
                )
            _LOG.info("%s is finished; nothing to do", job.output)
            return None
        with held(job.output):
            return _train(job, device)


def _train(job: Job, device: torch.device) -> Progress:
    size = choose_seq_parallel_size(job.stage, dist.get_world_size())
    stage = replace(job.stage, parallel=replace(job.stage.parallel, seq_parallel_size=size))
    base = _load_model(job.model)
    if stage.context is not None:
        set_context(base, stage.context)
    _check_context(base, stage)
    if stage.saving.vila and not isinstance(base.config, LongVILAConfig):
        raise StageError(
            f"saving.vila writes the original's layout, which knows no {type(base).__name__}"
        )
    with loading(f"--model {job.model}"):
        processor = AutoProcessor.from_pretrained(job.model)
    text = find_family(base).text_model(base).config
    mesh = build_mesh(
        size,
        stage.parallel.seq_parallel_ring_size,
        stage.parallel.seq_parallel_ring_type,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        num_tokens=stage.data.max_tokens,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        device_type=device.type,
    )
    # New weights (adapters) must be the same on every rank.
    seed_everything(stage.seed)
    model = put_on_mesh(tune(base, stage.rates, stage.adapter), mesh, stage)
    loader = build_loader(
        job.data, stage, processor, base, mesh, report=job.output / "left-out.json"
    )
    if mesh.rank == 0:
        job.output.mkdir(parents=True, exist_ok=True)
        settings = job.output / "stage.yaml"
        with writing(settings):
            settings.write_text(to_yaml(stage), encoding="utf-8")
        _LOG.info("%s on %s", stage.name, mesh.explain())
        _LOG.info("data:\n%s", loader.mixture.describe())
        for part, named in named_parts(model).items():
            tuned = sum(p.numel() for _, p in named if p.requires_grad)
            _LOG.info("%s: %s parameters tuned", part, f"{tuned:,}")
    progress = run_stage(model, mesh, loader, stage, job.output, stop_after=job.stop_after)
    if progress.done >= 1:
        export(model, processor, stage, job)
    return progress


def _load_model(name: str) -> PreTrainedModel:
    """A model of a known family: of text and media, or a language model alone."""
    with loading(f"--model {name}"):
        config = AutoConfig.from_pretrained(name)
        loader: Any = AutoModelForCausalLM
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            loader = AutoModelForImageTextToText
        model, found = loader.from_pretrained(
            name, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    check_whole(found, f"--model {name}")  # nothing is drawn at random, nor accepted in part
    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(
            f"{name} holds a {type(model).__name__}, which cannot be trained here"
        )
    try:
        find_family(model)
    except (TypeError, ValueError) as fault:
        raise CheckpointError(f"{name} cannot be trained here: {fault}") from fault
    return model.train()


def _check_context(model: PreTrainedModel, stage: Stage) -> None:
    limit = find_family(model).text_model(model).config.max_position_embeddings
    if stage.data.sample_tokens > limit:
        hint = f" (the stage goes on from {stage.base})" if stage.base else ""
        raise ContextLengthError(
            f"rows of {stage.name} have {stage.data.sample_tokens} tokens, the model's context is "
            f"{limit}{hint}; extend it first (longvila train extend-...), or shorten rows: --set "
            f"data.max_tokens={limit} (data.max_sample_tokens={limit} where samples are short)"
        )
    if stage.data.spread_positions is not None and stage.data.spread_positions > limit:
        raise ContextLengthError(
            f"{stage.name} spreads positions over {stage.data.spread_positions}, the model's "
            f"context is {limit}; --set data.spread_positions={limit}"
        )


def put_on_mesh(model: nn.Module, mesh: SPMesh, stage: Stage) -> nn.Module:
    """Put a model on a mesh as a stage says: float32 shards, layers in the stage's type.

    Returns:
        The same object.
    """
    settings = stage.parallel
    offload = None
    if settings.offload_gib > 0:
        offload = Offload(
            budget_bytes=int(settings.offload_gib * 2**30), keep_last=settings.offload_keep_last
        )
    plan = ParallelPlan(
        fsdp_replicate=settings.fsdp_replicate,
        compute_dtype=None if settings.compute == "float32" else _DTYPES[settings.compute],
        keep_gathered=settings.keep_gathered,
        activation_checkpointing=settings.activation_checkpointing,
        plain_layers=settings.plain_layers,
        offload=offload,
        mlp_tile_rows=settings.mlp_tile_rows,
        compile_modules=settings.compile,
        head_chunks=settings.head_chunks,
        loss_tile_rows=settings.loss_tile_rows,
        two_stage=True,
    )
    return parallelize(model, mesh, plan)


def build_loader(
    path: Path,
    stage: Stage,
    processor: Any,
    model: PreTrainedModel,
    mesh: SPMesh,
    *,
    report: Path,
) -> PackedLoader:
    """Build this rank's loader.

    Args:
        path: File that lists datasets and mixtures.
        stage: Gives the mixture (see `open_mixture`), style and lengths.
        processor: The model's processor.
        model: Its configuration says how frames are dealt.
        mesh: The mesh.
        report: File that lists what was left out.

    Raises:
        StageError: If the mixture names datasets that the file has not.
    """
    data, mixture = stage.data, open_mixture(path, stage)
    encoder, collator = coders(
        processor,
        model.config,
        encoder={
            "max_tokens": data.sample_tokens,
            "style": data.style,
            "too_long": data.too_long,
            "num_frames": data.num_frames,
            "fps": data.fps,
        },
        collator={
            "sp_rank": mesh.sp_rank,
            "sp_size": mesh.sp_size,
            "deal": functools.partial(plan_media, model.config, mesh.sp_size),
            "threads": data.threads,
            "spread": data.spread_positions,
        },
    )
    return PackedLoader(
        mixture,
        encoder,
        collator,
        agreement=Agreement.from_mesh(mesh),
        report=report,
        window=data.window,
        max_documents=data.max_documents,
        row_tokens=data.max_tokens,
        epochs=1,
        prefetch=data.prefetch,
        threads=data.threads,
        workers=data.workers,
    )


def export(model: nn.Module, processor: Any, stage: Stage, job: Job) -> None:
    """Write the finished model and its processor into the output folder.

    Args:
        model: The trained model on its mesh.
        processor: Its processor.
        stage: Gives the type of the weights, and whether the original's layout is written too.
        job: Gives the folder.

    Comm: That of `export_state`, and a barrier.
    """
    dtype = _DTYPES[stage.saving.dtype]
    state = export_state(model, stage.adapter, dtype)
    if dist.get_rank() == 0:
        partial = job.output / ".partial-model"
        if partial.exists():
            shutil.rmtree(partial)
        _lengthen(processor, stage)
        with writing(partial):
            save_plain(model, state, partial)
            processor.save_pretrained(partial)
            # The configuration says that all is there, so it comes last.
            for file in sorted(partial.iterdir(), key=lambda each: each.name == "config.json"):
                os.replace(file, job.output / file.name)
            partial.rmdir()
            if stage.saving.vila:
                convert_to_vila(job.output, job.output / "vila")
        _LOG.info("wrote %s", job.output)
    dist.barrier()


def _lengthen(processor: Any, stage: Stage) -> None:
    tokenizer = getattr(processor, "tokenizer", processor)
    if stage.context is not None:
        tokenizer.model_max_length = stage.context.max_position_embeddings
