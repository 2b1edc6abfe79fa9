"""The stages of LongVILA's training as data.

    align -> pretrain -> sft -> extend-64k -> extend-256k -> extend-512k -> extend-1m
                                    |              |              |
                              long-sft-256   long-sft-512,   long-sft-2048
                                             long-sft-1024

A stage says which parts are tuned and at which rate, how long rows are, how many frames a video
gives, which mixture, how much a step sees, the schedule, the context the model is given first, and
the adapter. `STAGES` holds the original recipe; `longvila.train.settings` lays files and overrides
over it. Nothing here builds anything but the order of a stage's data.

What the original's scripts get wrong, and what stands here instead:

- ``extend-64k`` calls itself 64k but sets the model to 131072 positions; rows of its data are as
  long as that script says or half of it, nobody can tell. Here rows have 65536 tokens and the
  context afterwards is 131072, as in the published configuration.
- The adapter's ``embed,norm`` names nothing called ``embed_tokens``, so embeddings stay frozen
  though the flag says otherwise. Here ``also_tune`` names parts of a model that are looked up, and
  a name that finds nothing is an error.
- ``extend-512k`` and ``extend-1m`` forget to copy the other parts and to merge the adapter, and the
  last one passes the wrong folder. Here every stage ends with one folder that the next one loads.
- ``long-sft-2048`` begins from an unset variable. Here ``base`` says from which stage a stage goes
  on, and a model whose context is too short for a stage's rows is refused.
- A step's batch is an integer division by the number of nodes, and so depends on it. Here it is a
  number of samples (or of rows), whatever the mesh. The long-video numbers are that script's value
  on its own cluster: 1024 samples a step over the sequence-parallel degree, times the batch of a
  device, rounded.
- ``fps 2.0`` of the last stage was ignored at release; here a stage says frames, and ``data.fps``
  is there for who wants it.
- Stage 4 trains with a linear position scaling if the length is passed in another way. Here the
  rotary base is what `longvila.ops.rope` says, and positions are never rescaled.

Not in the scripts: gradient clipping (their ZeRO files leave it out), so ``clip_norm`` is null.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from longvila.data.datasets import read_file
from longvila.data.mixture import Mixture
from longvila.errors import LongVILAError
from longvila.ops.rope import stage as context_stage

TooLong = Literal["truncate_frames", "drop", "error"]
Precision = Literal["bfloat16", "float32"]


class StageError(LongVILAError, ValueError):
    """There is no such stage, or a stage contradicts itself."""


def _at_least(least: float, group: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{group}: {name} must be at least {least:g}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rate of each part; null freezes it.

    Attributes:
        vision_tower: The vision encoder.
        projector: What joins the two.
        language_model: The language model with its embeddings and head. Under an adapter, the rate
            of the adapter and of what is tuned beside it.
    """

    vision_tower: float | None = None
    projector: float | None = None
    language_model: float | None = None

    def __post_init__(self) -> None:
        values = (self.vision_tower, self.projector, self.language_model)
        if all(value is None for value in values):
            raise ValueError("rates: every part is frozen; give at least one a learning rate")
        if any(value is not None and not 0 < value < math.inf for value in values):
            raise ValueError(f"rates must be above zero, or null to freeze a part, got {values}")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Low-rank adapters in the language model, and what is trained in full beside them.

    With ``tower_targets`` they stand in the vision tower as well, which then is not trained in
    full: two low-rank parts make a model whose change fits a small file.

    Attributes:
        rank: Rank of the adapters.
        alpha: Their scale times their rank.
        dropout: Dropout before them.
        targets: Names of the linear layers of the language model that get one.
        also_tune: Groups of the language model that are trained in full: embeddings (and a head
            tied to them), norms, head.
        tower_targets: Names of the linear layers of the vision tower that get one, if the tower
            has a rate; none leaves the tower to be trained in full.
        folded: Whether a layer's update is added to its weight in each pass, in place of a second
            path beside it: few and large kernels, and nothing saved for the adapter, for half as
            much arithmetic again as frozen weights cost. For small models; needs no dropout.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    also_tune: tuple[Literal["embeddings", "norms", "head"], ...] = ("embeddings", "norms")
    tower_targets: tuple[str, ...] = ()
    folded: bool = False

    def __post_init__(self) -> None:
        _at_least(1, "adapter", rank=self.rank, alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter: dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class Context:
    """Positions that the language model is given before it is trained.

    Attributes:
        rope_theta: Base of the rotary embedding.
        max_position_embeddings: Context afterwards.
        yarn_factor: How much slower YaRN turns the pairs that did not come round in the context so
            far; those that turned often stay as they are, and near tokens look as they did. Null
            for a base alone, which slows down all but the first.
    """

    rope_theta: float
    max_position_embeddings: int
    yarn_factor: float | None = None

    def __post_init__(self) -> None:
        _at_least(
            1, "context", rope_theta=self.rope_theta, yarn_factor=self.yarn_factor,
            max_position_embeddings=self.max_position_embeddings,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a step sees.

    Attributes:
        mixture: Names of datasets with weights, or of a mixture that the data file names; null
            takes every dataset of the file once.
        style: ``chat``, or ``plain`` for captions and documents without a template; a dataset that
            says its own goes first.
        max_tokens: Tokens of a packed row, and most of a sample.
        max_sample_tokens: Most tokens of a sample where a row may be longer than the model's
            context, as short samples do not see each other; null for those of a row.
        spread_positions: Positions that a sample's tokens are spread over, by jumps between frames,
            so that rows meet the angles of longer ones; see `longvila.data.spread`. Null for none.
        max_documents: Most samples of a row; null for as many as fit.
        too_long: What becomes of longer samples.
        num_frames: Frames of a video; null for the processor's.
        fps: Frames a second of a video, at most ``num_frames``.
        samples_per_step: Samples an optimiser step sees at least, over all ranks: rows are added
            until there are as many.
        rows_per_step: Rows an optimiser step sees, over all ranks; instead of samples.
        window: Samples that wait to be packed.
        prefetch: Rows built ahead.
        threads: Samples looked at, and media decoded, at once.
        workers: Processes that do this in place of threads, on each rank; zero for none. One
            interpreter gives some hundred pictures a second beside training.
        seed: Seed of the order.
    """

    mixture: str | None = None
    style: Literal["chat", "plain"] = "chat"
    max_tokens: int = 4096
    max_sample_tokens: int | None = None
    spread_positions: int | None = None
    max_documents: int | None = None
    too_long: TooLong = "truncate_frames"
    num_frames: int | None = 8
    fps: float | None = None
    samples_per_step: int | None = None
    rows_per_step: int | None = None
    window: int = 64
    prefetch: int = 2
    threads: int = 2
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        given = [n for n in (self.samples_per_step, self.rows_per_step) if n is not None]
        if len(given) != 1 or given[0] < 1:
            raise ValueError(
                "data: give either samples_per_step or rows_per_step, above zero (set the other "
                f"to null); got {self.samples_per_step} and {self.rows_per_step}"
            )
        _at_least(2, "data", max_tokens=self.max_tokens, max_sample_tokens=self.max_sample_tokens)
        _at_least(
            1, "data", max_documents=self.max_documents, num_frames=self.num_frames,
            window=self.window, threads=self.threads,
        )  # fmt: skip
        _at_least(0, "data", prefetch=self.prefetch, workers=self.workers)
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"data: fps must be above zero, got {self.fps}")
        if self.max_sample_tokens is not None and self.max_sample_tokens > self.max_tokens:
            raise ValueError(
                f"data: a sample of max_sample_tokens {self.max_sample_tokens} does not fit a row "
                f"of max_tokens {self.max_tokens}"
            )
        if self.spread_positions is not None and self.spread_positions < self.sample_tokens:
            raise ValueError(
                f"data: samples of {self.sample_tokens} tokens do not fit spread_positions "
                f"{self.spread_positions}"
            )

    @property
    def sample_tokens(self) -> int:
        """Most tokens of a sample."""
        return self.max_tokens if self.max_sample_tokens is None else self.max_sample_tokens


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, and how the rate changes over a stage.

    Attributes:
        betas: Decay of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decay of matrices; vectors have none.
        clip_norm: Norm that gradients are clipped to; null for none.
        offload: Whether the moments wait on the host and pass through the device in the update.
        schedule: Shape of the rate after warm-up.
        warmup_ratio: Share of the stage in which the rate rises.
        warmup_steps: Steps in which it rises, instead; needs ``max_steps``.
        epochs: Epochs of the mixture; null where ``max_steps`` ends the stage.
        max_steps: Steps of the stage; null where epochs end it.
    """

    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    offload: bool = False
    schedule: Literal["cosine", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    epochs: int | None = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer: betas are two numbers in [0, 1), got {self.betas}")
        if self.epochs is None and self.max_steps is None:
            raise ValueError("optimizer: epochs and max_steps are both null; one must end a stage")
        _at_least(1, "optimizer", epochs=self.epochs, max_steps=self.max_steps)
        _at_least(
            0, "optimizer", eps=self.eps, weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
        )  # fmt: skip
        if self.warmup_steps is not None and self.max_steps is None:
            raise ValueError("optimizer: warmup_steps needs max_steps; or use warmup_ratio")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"optimizer: warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer: clip_norm must be above zero, got {self.clip_norm}")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a stage is put on devices.

    Attributes:
        seq_parallel_size: Ranks that share a row; -1 or 1 for none, 0 for the fewest that hold
            ``tokens_per_rank`` at most.
        tokens_per_rank: Tokens of a row that a rank should hold, where the size is chosen.
        seq_parallel_ring_size: Ring degree; -1 to choose.
        seq_parallel_ring_type: Layout of the ring.
        fsdp_replicate: Whether parameters are sharded within a group only.
        compute: Type that layers compute in; parameters, gradients and states are float32.
        keep_gathered: Whether layers stay gathered from forward to backward: fewer and smaller
            kernels for a small model, and one more copy of it in memory, which is not planned for.
        activation_checkpointing: Whether layers are recomputed in backward; attention never is.
        plain_layers: Text layers, the last ones, that are not recomputed.
        offload_gib: Host memory a rank in which checkpoints (and what plain layers save) wait; zero
            for none.
        offload_keep_last: Layers, the last ones, whose tensors stay on the device.
        mlp_tile_rows: Tokens whose MLP is computed at once; null for all.
        compile: Whether norms and MLPs of the language model are compiled.
        head_chunks: Parts in which attention exchanges heads.
        loss_tile_rows: Rows of head and loss computed at once.
    """

    seq_parallel_size: int = -1
    tokens_per_rank: int = 32768
    seq_parallel_ring_size: int = -1
    seq_parallel_ring_type: Literal["ring_varlen", "zigzag_ring_varlen", "gather"] = (
        "zigzag_ring_varlen"
    )
    fsdp_replicate: bool = False
    compute: Precision = "bfloat16"
    keep_gathered: bool = False
    activation_checkpointing: bool = True
    plain_layers: int = 0
    offload_gib: float = 0.0
    offload_keep_last: int = 1
    mlp_tile_rows: int | None = None
    compile: bool = False
    head_chunks: int = 1
    loss_tile_rows: int = 4096

    def __post_init__(self) -> None:
        _at_least(
            1, "parallel", tokens_per_rank=self.tokens_per_rank, mlp_tile_rows=self.mlp_tile_rows,
            head_chunks=self.head_chunks, loss_tile_rows=self.loss_tile_rows,
        )  # fmt: skip
        _at_least(
            0, "parallel", plain_layers=self.plain_layers, offload_gib=self.offload_gib,
            offload_keep_last=self.offload_keep_last,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Saving:
    """When a stage is saved, and what is written down.

    Attributes:
        every: Steps between saves; null saves at the end alone.
        keep: Saves that are kept.
        log_every: Steps between lines of the log.
        vila: Whether the end of the stage is also written in the original's layout.
        dtype: Type of the weights that the stage ends with.
        trackers: Where numbers are shown beside ``metrics.jsonl``; null for TensorBoard where it is
            installed.
    """

    every: int | None = 20
    keep: int = 2
    log_every: int = 1
    vila: bool = False
    dtype: Precision = "bfloat16"
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] | None = None

    def __post_init__(self) -> None:
        if self.keep < 1 or self.log_every < 1 or (self.every is not None and self.every < 1):
            raise ValueError("saving: every, keep and log_every must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        name: What users call it.
        base: The stage whose result it goes on from, for messages; null where it begins.
        rates: What is tuned, and how fast.
        adapter: Low-rank adapters; null trains parts in full.
        context: Positions given to the language model; null leaves them.
        data: What a step sees.
        optimizer: How a step changes parameters.
        parallel: How it is put on devices.
        saving: When it is saved.
        seed: Seed of dropout and of whatever is new.
    """

    name: str
    base: str | None = None
    rates: Rates
    adapter: Adapter | None = None
    context: Context | None = None
    data: Data
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallel: Parallel = field(default_factory=Parallel)
    saving: Saving = field(default_factory=Saving)
    seed: int = 42

    def __post_init__(self) -> None:
        if self.adapter is not None and self.rates.language_model is None:
            raise ValueError(
                "the adapter lives in the language model, which rates.language_model freezes"
            )
        if self.adapter and self.adapter.tower_targets and self.rates.vision_tower is None:
            raise ValueError(
                "adapter.tower_targets tune the vision tower, which rates.vision_tower freezes"
            )


_LONG = Parallel(seq_parallel_size=0)


def _extend(name: str, base: str, *, steps: int, rows: int, save_every: int) -> Stage:
    context = context_stage(name)
    return Stage(
        name=f"extend-{name}",
        base=base,
        rates=Rates(language_model=2e-5),
        adapter=Adapter(),
        context=Context(
            rope_theta=context.rope_theta, max_position_embeddings=context.max_position_embeddings
        ),
        data=Data(
            mixture=f"slimpajama_encode_qwen2_{name}",
            max_tokens=context.train_tokens,
            too_long="error",
            num_frames=None,
            rows_per_step=rows,
            window=16,
        ),
        optimizer=Optimizer(
            schedule="constant_with_warmup", warmup_steps=2, epochs=None, max_steps=steps
        ),
        parallel=_LONG,
        saving=Saving(every=save_every),
    )


def _long_sft(frames: int, base: str, *, rate: float, tokens: int, samples: int) -> Stage:
    return Stage(
        name=f"long-sft-{frames}",
        base=base,
        rates=Rates(vision_tower=rate, projector=rate, language_model=rate),
        data=Data(
            mixture="longvila_sft_dataset",
            max_tokens=tokens,
            num_frames=frames,
            samples_per_step=samples,
            window=16,
        ),
        optimizer=Optimizer(epochs=6),
        parallel=_LONG,
    )


_SFT_MIXTURE = (
    "sharegpt4v_gpt4_100k + llava_instruct + sharegpt4v_sft + dvqa_train_200k + chartqa_train_18k"
    " + ai2d_train_12k + docvqa_train_10k + geoqa + synthdog_en + vflan + shot2story_shotonly"
    " + video_chatgpt + youcook2 + vatex + sharegpt_video + scienceqa + wit_subset + math"
    " + sherlock"
)

_ALL = (
    Stage(
        name="align",
        rates=Rates(projector=1e-3),
        data=Data(mixture="llava_1_5_mm_align", style="plain", samples_per_step=2048),
    ),
    Stage(
        name="pretrain",
        base="align",
        rates=Rates(projector=5e-5, language_model=5e-5),
        # Two of its sets are pictures with text, plain by their adapters; one is conversations.
        data=Data(
            mixture="coyo_25m + mmc4core + sharegpt4v_pretrain",
            samples_per_step=1024,
        ),
    ),
    Stage(
        name="sft",
        base="pretrain",
        rates=Rates(vision_tower=1e-4, projector=1e-4, language_model=1e-4),
        data=Data(mixture=_SFT_MIXTURE, samples_per_step=1024),
    ),
    _extend("64k", "sft", steps=40, rows=4, save_every=40),
    _extend("256k", "extend-64k", steps=80, rows=16, save_every=40),
    _extend("512k", "extend-256k", steps=80, rows=16, save_every=40),
    _extend("1m", "extend-512k", steps=50, rows=4, save_every=10),
    _long_sft(256, "extend-64k", rate=2e-5, tokens=2**17, samples=146),
    _long_sft(512, "extend-256k", rate=5e-5, tokens=2**18, samples=73),
    _long_sft(1024, "extend-256k", rate=5e-5, tokens=2**18, samples=37),
    _long_sft(2048, "extend-512k", rate=5e-5, tokens=2**19, samples=37),
)
#: Every stage by its name, in the order in which they follow each other.
STAGES: Mapping[str, Stage] = {each.name: each for each in _ALL}


def get_stage(name: str) -> Stage:
    """Return a stage by its name, in any case.

    Raises:
        StageError: If there is none; the nearest names are given.
    """
    found = STAGES.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), STAGES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise StageError(f"there is no stage {name!r}{hint}; there are {', '.join(STAGES)}")
    return found


def choose_seq_parallel_size(stage: Stage, world_size: int) -> int:
    """Return the ranks that share a row.

    Returns:
        What the stage says; where it leaves the choice, the smallest divisor of the world that
        holds a row in ``tokens_per_rank`` and leaves no data-parallel rank without one, else the
        world.

    Raises:
        StageError: If it does not divide the world, or a step has fewer rows than groups.
    """
    parallel, data = stage.parallel, stage.data
    sizes = [d for d in range(1, world_size + 1) if world_size % d == 0]
    size = 1 if parallel.seq_parallel_size == -1 else parallel.seq_parallel_size
    if size == 0:
        fits = [
            d
            for d in sizes
            if d * parallel.tokens_per_rank >= data.max_tokens
            and (data.rows_per_step is None or data.rows_per_step % (world_size // d) == 0)
        ]
        return fits[0] if fits else world_size
    if size not in sizes:
        raise StageError(
            f"parallel.seq_parallel_size is {size}, which does not divide {world_size} ranks; use "
            f"one of {sizes}, or 0 to choose"
        )
    if data.rows_per_step is not None and data.rows_per_step % (world_size // size):
        raise StageError(
            f"data.rows_per_step is {data.rows_per_step}, which {world_size // size} data-parallel "
            f"groups of {size} ranks cannot share; raise it, or parallel.seq_parallel_size"
        )
    return size


def open_mixture(path: Path, stage: Stage) -> Mixture:
    """Open the datasets of a stage.

    Args:
        path: File that lists datasets and mixtures.
        stage: Gives the mixture. Where it is still the original recipe's, one of the file that has
            the stage's name goes first.

    Raises:
        StageError: If the mixture names datasets that the file has not.
    """
    file = read_file(path)
    spec, recipe = stage.data.mixture, STAGES.get(stage.name)
    if stage.name in file.mixtures and (recipe is None or spec == recipe.data.mixture):
        spec = stage.name
    datasets = list(file.datasets.values())
    try:
        return Mixture(datasets, spec, known=file.mixtures, seed=stage.data.seed)
    except ValueError as fault:
        raise StageError(
            f"{path}: {fault}. The stage {stage.name} takes {spec!r}; name a mixture "
            f"{stage.name!r} in the file, or --set data.mixture=NAMES (null for all datasets)"
        ) from fault


def shortened(stage: Stage, *, max_steps: int) -> Stage:
    """Return a stage that ends after some steps, for trials; all else stays."""
    warmup = stage.optimizer.warmup_steps
    return replace(
        stage,
        optimizer=replace(
            stage.optimizer,
            max_steps=max_steps,
            warmup_steps=None if warmup is None else min(warmup, max_steps),
        ),
    )
