"""One protocol for long prompts: prefill once, fork for free, decode, or generate.

    engine = Engine(model)                  # or Engine(model, mesh), the same calls on every rank
    film = engine.prefill(inputs)           # hours of video, read once
    turn = engine.fork(film)                # shares them
    out = engine.generate(turn, question_ids, max_new_tokens=100, streamer=...)

`generate` is transformers' own on the model's own object: processors, criteria, streamers, beams
and sampling are what they are elsewhere. It works because the engine gives this one model object a
forward that knows a `ShardedCache` (`longvila.inference.decode.CacheForward`) and the attention
``longvila_sp``; every other call still reaches the forward that was there, and `close` puts both
back. A model that was parallelized keeps its training forward.

**Equal tokens on all ranks.** Logits of every step are one rank's, broadcast. Sampling draws from
a generator that all ranks seed alike: with the seed given, or with one that the first rank draws.
A criterion given by the caller is decided by the first rank, since one rank that stops earlier
leaves the others waiting; what fails on one rank of what a caller gave ends all of them
(`longvila.inference.callbacks`).

Questions of different lengths about one prefix are decoded together: each row has filler in front
of its own tokens, which no query of it sees and no position counts.

It serves one caller at a time.

Letters: B rows, S tokens read, T new tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from longvila.errors import ContextLengthError
from longvila.inference.cache import ShardedCache
from longvila.inference.callbacks import Callbacks
from longvila.inference.decode import CacheForward, set_attention
from longvila.inference.forks import fork_first
from longvila.inference.frames import FrameSource
from longvila.inference.inputs import append_ids, cut_answers, pad_rows, whole_mask, whole_row
from longvila.inference.paging import Pager
from longvila.inference.positions import TextRuns
from longvila.inference.prefill import ReadTimes, media_mask, prefill_chunks, prefill_ranks
from longvila.inference.ranks import prefill_rank_chunks
from longvila.inference.static_step import Mode, StaticSteps
from longvila.inference.store import load_cache, model_key, save_cache
from longvila.parallel.families import Family, find_family
from longvila.parallel.mmsp import TwoStageForward, TwoStageOptions
from longvila.parallel.tower_attention import prepare_towers
from longvila.sp.mesh import SPMesh

#: So few tokens of text behind a cache are read by every rank: dealing them out costs more.
_FEW_TOKENS = 512
#: Inputs with an entry a token.
_PER_TOKEN = {"mm_token_type_ids", "position_ids"}


class CacheEngine(Protocol):
    """What evaluation and servers use of an engine."""

    def prefill(self, inputs: Mapping[str, Any]) -> ShardedCache:
        """Read a prompt."""
        ...

    def fork(self, cache: ShardedCache, *, tokens: int | None = None) -> ShardedCache:
        """Return a cache that begins alike."""
        ...

    def decode(self, cache: ShardedCache, ids: Tensor) -> Tensor:
        """Read further tokens; return the last one's logits."""
        ...


@contextlib.contextmanager
def _whole_or_not(cache: ShardedCache) -> Iterator[None]:
    """Forget what was read of some tokens if not all of them could be."""
    length, logits = cache.get_seq_length(), cache.logits
    try:
        yield
    except BaseException:
        cache.crop(length - cache.get_seq_length())
        cache.logits = logits
        raise


class Engine:
    """Prefill, fork, decode and generate with one model.

    Args:
        model: LongVILA or a causal language model of a known family, with its head, in evaluation
            mode.
        mesh: Ranks that share a sequence; None for one process. Every rank of a group must make
            the same calls with the same ids.
        chunk_tokens: Tokens of a prompt read at once where it is not dealt over ranks.
        split_tokens: Tokens of the chunks that long segments are viewed as when few queries read
            them; None to choose by device.
        family: Where the model's parts are and how its media become rows, if not as its own family
            says: media that are encoded already are a family whose encoder looks rows up.
        kv_offload: Bytes of keys and values that stay on each rank's device, older ones being
            paged to the host; a number, a `longvila.inference.paging.Pager`, or None for all.
        decode_graphs: How steps of few tokens run (`longvila.inference.static_step.StaticSteps`):
            ``"auto"`` captures them on a GPU, ``"uncaptured"`` launches the same step anew,
            ``"off"`` leaves all to the general way.

    Raises:
        TypeError: If the model is of no known family.
        ValueError: If ``chunk_tokens`` or ``split_tokens`` is not positive, ``decode_graphs`` is
            none of the three, an engine holds the model already, or FSDP shards it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mesh: SPMesh | None = None,
        *,
        chunk_tokens: int = 8192,
        split_tokens: int | None = None,
        family: Family | None = None,
        kv_offload: int | Pager | None = None,
        decode_graphs: Mode = "auto",
    ) -> None:
        for name, tokens in (("chunk_tokens", chunk_tokens), ("split_tokens", split_tokens)):
            if tokens is not None and tokens < 1:
                raise ValueError(f"{name} must be at least 1, got {tokens}")
        if hasattr(vars(model).get("forward"), "cache_forward"):
            raise ValueError(f"an engine holds this {type(model).__name__} already; close it first")
        if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            raise ValueError("an engine needs whole weights, these are shards: use model.generate")
        self.model, self.mesh = model, mesh
        self.family = find_family(model) if family is None else family
        self.places_in_3d = (
            self.family.position_ids is not Family.__dataclass_fields__["position_ids"].default
        )
        self.text = self.family.text_model(model)
        self.static = StaticSteps(model, self.family, mesh, decode_graphs)
        self.chunk_tokens, self.split_tokens = chunk_tokens, split_tokens
        self.pager = kv_offload if isinstance(kv_offload, Pager) else None
        if isinstance(kv_offload, int):
            self.pager = Pager(self._device, kv_offload)
        self._attention = set_attention(self.text)
        self._towers = prepare_towers(self.family, model)
        self._before = vars(model).get("forward")
        original = model.forward
        cache_forward = CacheForward(model, self.family, original, self.static, split_tokens)

        # wraps: generate reads the signature to see which arguments the model takes.
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return cache_forward(*args, **kwargs)

        forward.cache_forward = cache_forward  # type: ignore[attr-defined]
        self._forward = forward
        vars(model)["forward"] = forward
        self._two_stage: TwoStageForward | None = None
        if mesh is not None and mesh.sp_size > 1:
            options = TwoStageOptions(
                head_chunks=1, loss_tile_rows=1, gradient_reduction="mean",
                encode_on_every_rank=False, recompute_media=False, checked_steps=8,
            )  # fmt: skip
            self._two_stage = TwoStageForward(model, self.family, mesh, options, original)

    def close(self) -> None:
        """Give the model back its forward and its attention; calling it again does nothing.

        Raises:
            RuntimeError: If someone replaced the forward since.
        """
        if self._forward is None:
            return
        if vars(self.model).get("forward") is not self._forward:
            raise RuntimeError(
                f"the forward of {type(self.model).__name__} was replaced after the engine was "
                "made; undo that first"
            )
        del vars(self.model)["forward"]
        if self._before is not None:
            vars(self.model)["forward"] = self._before
        if self._attention is not None:
            self.text.set_attn_implementation(self._attention)
        for give_back in self._towers:
            give_back()
        self.static.clear()
        self._forward = None  # type: ignore[assignment]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    @property
    def num_ranks(self) -> int:
        """Ranks that share a sequence."""
        return 1 if self.mesh is None else self.mesh.sp_size

    # ---- the protocol

    @torch.no_grad()
    def prefill(
        self,
        inputs: Mapping[str, Any],
        *,
        onto: ShardedCache | None = None,
        times: ReadTimes | None = None,
    ) -> ShardedCache:
        """Read a prompt with its media.

        Args:
            inputs: What a processor returns for one sample: ``input_ids (1, S)``, perhaps a mask
                (padding is left out), pixels and counts. On one process pixels may be an iterator
                of tensors, which is drawn from while the prompt is read; on several, a rank may
                have its own frames only, as ``local_pixel_values_videos``.
            onto: A cache that the prompt follows; extended and returned. On several ranks every
                rank then reads all of it, chunk by chunk.
            times: Where to count time, and to report progress.

        Returns:
            The cache; ``logits (1, V)`` are those of the last token.

        Raises:
            ContextLengthError: If it does not fit the model's context.
            ValueError: If there is not one row with a token, or media do not fit.

        Comm: On one process none, else as `longvila.inference.prefill.prefill_ranks`.
        """
        rest = {name: value for name, value in inputs.items() if value is not None}
        mask = rest.pop("attention_mask", None)
        ids = whole_row(rest.pop("input_ids"), mask)
        if mask is not None:
            rest |= {name: rest[name][..., mask[0].bool()] for name in _PER_TOKEN & rest.keys()}
        return self.read(
            self.family.prepare(self.model.config, {"input_ids": ids, **rest}),
            onto=onto, times=times,
        )  # fmt: skip

    @torch.no_grad()
    def read(
        self,
        batch: Mapping[str, Any],
        *,
        onto: ShardedCache | None = None,
        times: ReadTimes | None = None,
    ) -> ShardedCache:
        """Read a prompt whose inputs its family has prepared already; see `prefill`.

        Args:
            batch: ``input_ids (1, S)`` without padding, pixels and counts as the family's media
                name them; ``position_ids`` are those behind the cache.
            onto: As for `prefill`.
            times: As for `prefill`.

        Returns:
            The cache.

        Comm: As `prefill`.
        """
        rest = dict(batch)
        ids = rest.pop("input_ids")
        cache = onto
        if cache is None:
            layers = self.text.config.num_hidden_layers
            cache = ShardedCache(layers, mesh=self.mesh, pager=self.pager)
            cache.text_runs = TextRuns() if self.places_in_3d else None
        self.check_context(cache.get_seq_length() + ids.shape[1])
        self.static.compile_ahead()
        positions = self._positions(cache, batch)
        path = self._path(batch, onto)
        with _whole_or_not(cache):
            if path == "one pass":
                assert self._two_stage is not None
                cache.logits = prefill_ranks(self._two_stage, cache, ids, rest)
                if positions is not None and cache.text_runs is not None:
                    is_media = media_mask(self.model, self.family, ids[0])
                    cache.text_runs = cache.text_runs.read(positions, is_media)
            elif path == "over ranks":
                cache.logits = prefill_rank_chunks(
                    self.model, self.family, cache, ids, rest,
                    chunk_tokens=self.chunk_tokens, positions=positions, times=times,
                )  # fmt: skip
            else:
                cache.logits = prefill_chunks(
                    self.model, self.family, cache, ids, rest,
                    chunk_tokens=self.chunk_tokens, split_tokens=self.split_tokens,
                    positions=positions, times=times,
                )  # fmt: skip
        append_ids(cache, ids.to(self._device))
        return cache

    def fork(self, cache: ShardedCache, *, tokens: int | None = None) -> ShardedCache:
        """Return a cache that begins with the same tokens, all or so many, by reference.

        Args:
            cache: Stays usable; what it holds is shared from now on.
            tokens: As for `longvila.inference.forks.fork_first`.
        """
        return fork_first(cache, tokens)

    @torch.no_grad()
    def decode(self, cache: ShardedCache, ids: Tensor | Sequence[Tensor]) -> Tensor:
        """Read further tokens.

        Args:
            cache: Extended.
            ids: ``(B, T)`` text tokens; B rows share a prefix of one row. Or B rows of different
                lengths, ``(T_b,)`` each, once behind a prefix of one row.

        Returns:
            ``(B, V)`` logits of the last token, the same to the bit on every rank.

        Raises:
            ContextLengthError: If they do not fit the model's context.
            ValueError: If there is no token.

        Comm: As a step of `longvila.inference.decode`, a chunk of the tokens.
        """
        ids, mask = pad_rows(ids)
        if ids.shape[1] == 0:
            raise ValueError(f"ids must hold at least one token, got {tuple(ids.shape)}")
        self._refuse_media(ids)
        self.check_context(cache.get_seq_length() + ids.shape[1])
        ids = ids.to(self._device)
        if mask is not None:
            past = mask.new_ones(len(mask), cache.get_seq_length())
            mask = torch.cat([past, mask], dim=1).to(self._device)
        logits = None
        with _whole_or_not(cache):
            for part in ids.split(self.chunk_tokens if mask is None else ids.shape[1], dim=1):
                output = self.model(
                    input_ids=part, past_key_values=cache, logits_to_keep=1, attention_mask=mask
                )
                logits = output.logits[:, -1]
        assert logits is not None
        cache.logits = logits
        append_ids(cache, ids)
        return logits

    # ---- stored prompts

    def save(
        self,
        cache: ShardedCache,
        path: str | Path,
        key: Mapping[str, Any] | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write a prompt that was read; see `longvila.inference.store.save_cache`.

        Args:
            cache: What was read.
            path: Folder to write to.
            key: What it depends on beside the model, which is added.
            extra: What else to keep beside it; not compared.
            overwrite: Whether a stored prompt that is there may be replaced.
        """
        whole = {**(key or {}), "model": model_key(self.model)}
        return save_cache(cache, path, whole, extra=extra, overwrite=overwrite)

    def load(self, path: str | Path, key: Mapping[str, Any] | None = None) -> ShardedCache:
        """Read a stored prompt, by any number of ranks; see `longvila.inference.store.load_cache`.

        Args:
            path: Its folder.
            key: What to compare beside the model.
        """
        whole = {**(key or {}), "model": model_key(self.model)}
        return load_cache(path, whole, mesh=self.mesh, device=self._device, pager=self.pager)

    # ---- generate

    def generate(
        self,
        prompt: ShardedCache | Mapping[str, Any],
        ids: Tensor | Sequence[Tensor] | None = None,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """Generate with transformers' ``generate`` behind a prefix.

        Args:
            prompt: A cache from `prefill`, extended by the ids and what is generated, but for the
                last token, which was never read: the next turn's ids begin with it. (A fork of it
                where rows multiply: beams, several return sequences.) Or inputs to prefill.
            ids: ``(1, T)`` text tokens to read first; None for none. Or B questions that share
                the prefix: ``(B, T)``, or B rows of different lengths, ``(T_b,)`` each, which get
                filler in front. The prefix then stays as it is.
            seed: Of sampling; drawn by the first rank if there are several.
            **options: Of ``generate``. Every rank must give the same; a streamer may be given on
                one rank alone.

        Returns:
            What ``generate`` returns; the sequences begin with everything in the prefix. After an
            error the cache is what it was.

        Raises:
            ValueError: If ``max_time`` is given on several ranks, the cache was filled without
                ids, or an ``attention_mask`` hides tokens of the prefix.
            RankError: If a streamer, criterion or processor raised on another rank.

        Comm: As a step of `longvila.inference.decode`, a token; one broadcast of a seed to sample,
            and what `longvila.inference.callbacks.Callbacks` tells.
        """
        cache = prompt if isinstance(prompt, ShardedCache) else self.prefill(prompt)
        option = functools.partial(self._option, options)
        ids, mask = (None, None) if ids is None else pad_rows(ids)
        if ids is not None:
            self._refuse_media(ids)
        rows = 1 if ids is None else ids.shape[0]
        many = max(rows, option("num_beams") or 1, option("num_return_sequences") or 1) > 1
        if cache.input_ids is None or cache.input_ids.shape[0] != 1:
            raise ValueError("generate needs a cache of one row from prefill, or a fork of it")
        if self.num_ranks > 1 and option("max_time") is not None:
            raise ValueError("max_time would stop ranks at different tokens; use a criterion")
        whole = cache.input_ids
        if ids is not None and ids.shape[1]:
            whole = torch.cat([whole.expand(rows, -1), ids.to(whole.device)], dim=1)
        given = options.get("attention_mask")
        options["attention_mask"] = whole_mask(given, mask, whole, cache.get_seq_length())
        if option("use_cache") is False:  # as many models say that were trained with checkpointing
            options["use_cache"] = True
        callbacks = Callbacks(options, ids, cache, self._device)
        restore = cache.remember()
        working = cache.fork() if many else cache
        if whole.shape[1] == cache.get_seq_length():
            working.crop(-1)  # generate needs a token to read
        try:
            with self._seeded(seed, bool(option("do_sample"))), self._no_rope_deltas():
                options = callbacks.options
                out = self.model.generate(whole, past_key_values=working, **options)  # type: ignore[operator]
            callbacks.end()
        except BaseException:
            restore()
            raise
        if not many:
            sequences = out if isinstance(out, Tensor) else out.sequences
            working.input_ids = sequences[:, : working.get_seq_length()]
            working.logits = None
        return out

    def generate_many(
        self, prompt: ShardedCache, questions: Sequence[Tensor], **options: Any
    ) -> list[Any]:
        """Answer questions of different lengths about one prefix, all at once.

        Args:
            prompt: A cache of one row; stays as it is.
            questions: Text tokens of each, ``(T_b,)`` or ``(1, T_b)``.
            **options: As for `generate`.

        Returns:
            For each question its new tokens ``(T,)``, up to and with the first that ends a text;
            with ``num_return_sequences=n`` above one, for each question a list of n of them.

        Comm: As `generate`.
        """
        rows = [question.flatten() for question in questions]
        # Rows that multiply leave the prefix alone; one row goes on behind it.
        out = self.generate(prompt if len(rows) > 1 else self.fork(prompt), rows, **options)
        sequences = out if isinstance(out, Tensor) else out.sequences
        start = prompt.get_seq_length() + max(row.numel() for row in rows)
        answers = cut_answers(sequences[:, start:], self._option(options, "eos_token_id"))
        each = len(answers) // len(rows)
        if each == 1:
            return answers
        return [answers[first : first + each] for first in range(0, len(answers), each)]

    def _option(self, options: Mapping[str, Any], name: str) -> Any:
        """Return an option of ``generate`` as it resolves it: what is not given is the model's."""
        if name in options:
            return options[name]
        found = getattr(options.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name, None) if found is None else found

    @contextlib.contextmanager
    def _seeded(self, seed: int | None, sampling: bool) -> Iterator[None]:
        """Run with the same random numbers on all ranks, and leave the caller's as they were."""
        if not sampling or (seed is None and self.num_ranks == 1):
            yield
            return
        if seed is None:
            assert self.mesh is not None
            drawn = torch.randint(2**62, (1,)).to(self._device)
            dist.broadcast(drawn, group=self.mesh.sp_group, group_src=0)
            seed = int(drawn)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def over_ranks(self, work: Callable[[int, int], list[int]]) -> list[int]:
        """Return what all ranks find, sorted, on every rank.

        Args:
            work: Given this rank and the number of ranks.

        Comm: One all-gather of objects.
        """
        if self.mesh is None or self.num_ranks == 1:
            return work(0, 1)
        parts: list[Any] = [None] * self.num_ranks
        found = work(self.mesh.sp_rank, self.num_ranks)
        dist.all_gather_object(parts, found, group=self.mesh.sp_group)
        return sorted(index for part in parts for index in part)

    @contextlib.contextmanager
    def _no_rope_deltas(self) -> Iterator[None]:
        """Hide what the model's own last call left behind for positions in 3-D.

        The cache knows its positions; deltas of another batch size would not even add up.
        """
        base: Any = self.model.base_model
        if not hasattr(base, "rope_deltas"):
            yield
            return
        before, base.rope_deltas = base.rope_deltas, None
        try:
            yield
        finally:
            base.rope_deltas = before

    # ---- inner

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.get_output_embeddings().weight.device
        return device

    def _refuse_media(self, ids: Tensor) -> None:
        for kind in self.family.media:
            token = kind.token_id(self.model.config)
            if bool((ids == token).any()):
                raise ValueError(
                    f"the tokens after a prefix hold {kind.name} placeholders (id {token}); media "
                    "are read by Engine.prefill"
                )

    def _path(
        self, batch: Mapping[str, Any], onto: ShardedCache | None
    ) -> Literal["alone", "one pass", "over ranks"]:
        """How a prompt is read; the same on every rank, since it follows from what all have."""
        if self._two_stage is None:
            return "alone"
        tokens = batch["input_ids"].shape[1]
        kinds = [
            kind for kind in self.family.media
            if batch.get(kind.pixels) is not None or batch.get(f"local_{kind.pixels}") is not None
        ]  # fmt: skip
        if onto is not None and not kinds and tokens <= _FEW_TOKENS:
            return "alone"
        streamed = any(isinstance(batch.get(kind.pixels), FrameSource) for kind in kinds)
        if onto is None and not streamed and tokens <= self.chunk_tokens * self.num_ranks:
            return "one pass"
        return "over ranks"

    def _positions(self, cache: ShardedCache, batch: Mapping[str, Any]) -> Tensor | None:
        """``(3, S)`` positions of a prompt that follows a cache; None where tokens are counted."""
        if cache.text_runs is None:
            return None
        positions: Tensor | None = batch.get("position_ids")
        if positions is None:
            positions = self.family.position_ids(self.model, batch)
            if positions is None:  # no media
                positions = torch.arange(batch["input_ids"].shape[1]).expand(3, 1, -1)
            positions = positions + cache.get_seq_length() + cache.text_runs.offset
        return positions[-3:, 0]

    def check_context(self, length: int) -> None:
        """Refuse a sequence that is too long.

        Args:
            length: Tokens.

        Raises:
            ContextLengthError: If they do not fit the model's context.
        """
        limit = self.context_length
        if limit is not None and length > limit:
            raise ContextLengthError(
                f"{length} tokens do not fit the model's context of {limit}: use fewer frames or "
                "tokens, or a model whose context was extended"
            )

    @property
    def context_length(self) -> int | None:
        """Most tokens of a sequence, as the configuration has it."""
        config = self.model.config
        limit: int | None = getattr(config, "context_length", None)
        if limit is None:
            limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return limit
