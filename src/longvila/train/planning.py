"""Which mesh and which switches a step of some length needs on some devices, and why.

1. Ranks that share a row: what is asked for; else the fewest whose share fits with the first
   switches, since fewer ranks a row leave more rows at once; else all.
2. The mesh: every way of writing that number as ring x ulysses is timed with the measured rates.
   The library's own choice (`longvila.sp.mesh.plan_mesh`) stands unless another is faster by more
   than ``WORTH``.
3. The switches, in order, each on top of those before it, until the predicted peak fits:

       nothing                 no layer runs again
       checkpoints             layers run again, attention is kept
       fewer frames at once    where frames are the peak
       tiled MLP               where a layer's MLP is the peak
       offload                 checkpoints wait on the host, within its memory
       moments on the host     AdamW's states pass through the device in the update

   More GPUs is the last resort: the smallest number of them that would do is given.

Everything here is arithmetic on plain numbers; nothing is built or measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from longvila.memory.estimate import Peak, training_peak
from longvila.memory.operations import Load, Tuned
from longvila.memory.prompts import PromptTime, prompt_peak, prompt_time
from longvila.memory.rates import GIB, Gpu
from longvila.memory.settings import Ranks, Settings
from longvila.memory.sizes import ModelSize, PlanError
from longvila.memory.timing import Links, StepTime, training_time
from longvila.sp.mesh import MeshPlan, plan_mesh

#: How much faster another mesh must be before it is preferred to the library's choice.
WORTH = 0.02
#: Rows of a tile, and frames at once, where a plan turns them down.
TILE_ROWS = 8192
FRAMES_AT_ONCE = 8
#: Steps in which budgets on the host are tried.
OFFLOAD_STEP_GIB = 4
#: Numbers of GPUs that are tried when those at hand are too few, as multiples of them.
MORE = tuple(2**i for i in range(1, 11))


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One set of switches.

    Attributes:
        name: What was switched on last.
        settings: All switches.
        size: The model, with its frames at once.
        peak: Predicted peak.
        seconds: Predicted seconds of a step.
        fits: Whether the peak fits the device, and the host.
        how: How to switch it on.
    """

    name: str
    settings: Settings
    size: ModelSize
    peak: Peak
    seconds: float
    fits: bool
    how: str


@dataclass(frozen=True, kw_only=True)
class MeshChoice:
    """One mesh that was timed.

    Attributes:
        ranks: Its sizes.
        seconds: Predicted seconds of a step.
        reasons: What `plan_mesh` says about it.
    """

    ranks: Ranks
    seconds: float
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was planned.

    Attributes:
        size: The model, with its frames at once.
        load: The row.
        ranks: The mesh.
        settings: The switches.
        tuned: Which parts have gradients.
        gpu: The device.
        peak: Predicted peak of a rank.
        time: Predicted time of a step; None where no rates are known.
        limit_bytes: What a rank's device can give torch.
        host_limit_bytes: What the host can give a rank.
        attempts: Switches that were tried, in order.
        meshes: Meshes that were timed, the fastest first.
        reasons: Why this mesh.
        enough_gpus: Fewest GPUs that would do, where these do not.
    """

    size: ModelSize
    load: Load
    ranks: Ranks
    settings: Settings
    tuned: Tuned
    gpu: Gpu | None
    peak: Peak
    time: StepTime | None
    limit_bytes: float
    host_limit_bytes: float | None = None
    attempts: tuple[Attempt, ...] = ()
    meshes: tuple[MeshChoice, ...] = ()
    reasons: tuple[str, ...] = ()
    enough_gpus: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the peak fits the device, and what waits outside of it the host."""
        host = self.host_limit_bytes is None or self.peak.host_bytes <= self.host_limit_bytes
        return self.peak.bytes <= self.limit_bytes and host


@dataclass(frozen=True, kw_only=True)
class PromptPlan:
    """What was planned for reading a prompt.

    Attributes:
        size: The model.
        load: The prompt.
        ranks: The mesh.
        gpu: The device.
        peak: Predicted peak of a rank.
        time: Predicted times.
        limit_bytes: What a rank's device can give torch.
        enough_gpus: Fewest GPUs that would do, where these do not.
    """

    size: ModelSize
    load: Load
    ranks: Ranks
    gpu: Gpu
    peak: Peak
    time: PromptTime
    limit_bytes: float
    enough_gpus: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the peak fits the device."""
        return self.peak.bytes <= self.limit_bytes


def ranks_of(plan: MeshPlan, *, replicate: bool = False) -> Ranks:
    """Return the plain numbers of a planned mesh.

    Args:
        plan: The mesh.
        replicate: Whether parameters are sharded within a sequence-parallel group only.
    """
    return Ranks(
        dp=plan.dp_size,
        ring=plan.ring_size,
        ulysses=plan.ulysses_size,
        per_node=plan.ranks_per_node,
        kv_exchange=plan.kv_exchange,
        replicate=replicate,
    )


class Planner:
    """Plans steps of one model on one kind of device.

    Args:
        size: The model.
        gpu: Its device; None where no rates are known, and then nothing is timed.
        tuned: Which parts have gradients.
        base: Switches to begin from.
        links: Links between nodes.
        per_node: GPUs of a node.
        host_bytes: Host memory a GPU may use.
        limit_bytes: What the device can give torch; that of the device in the table if None.

    Raises:
        PlanError: If neither a device nor its bytes are given.
    """

    def __init__(
        self,
        size: ModelSize,
        gpu: Gpu | None,
        *,
        tuned: Tuned | None = None,
        base: Settings | None = None,
        links: Links | None = None,
        per_node: int = 8,
        host_bytes: float = 128.0 * GIB,
        limit_bytes: float | None = None,
    ) -> None:
        self.size, self.gpu, self.tuned = size, gpu, tuned or Tuned()
        self.base, self.links, self.per_node = base or Settings(), links or Links(), per_node
        self.host_bytes = host_bytes
        if limit_bytes is None:
            if gpu is None:
                raise PlanError("give a device or the bytes that it can give torch")
            limit_bytes = gpu.memory_bytes - gpu.reserved_bytes
        self.limit = limit_bytes

    # ---- meshes

    def mesh(self, gpus: int, sp: int, *, ring: int = -1, tokens: int | None = None) -> MeshPlan:
        """Return the library's own mesh."""
        text = self.size.text
        return plan_mesh(
            gpus,
            sp,
            ring,
            num_heads=text.heads,
            num_kv_heads=text.kv_heads,
            num_tokens=tokens,
            head_dim=text.head_dim,
            ranks_per_node=min(self.per_node, gpus),
        )

    def meshes(
        self, load: Load, gpus: int, sp: int, settings: Settings
    ) -> tuple[MeshChoice, tuple[MeshChoice, ...]]:
        """Time every ring x ulysses and return the chosen one, and all, the fastest first."""
        own = self.mesh(gpus, sp, tokens=load.tokens)
        found: list[MeshChoice] = []
        for ring in (r for r in range(1, sp + 1) if sp % r == 0):
            plan = self.mesh(gpus, sp, ring=ring)
            if plan.ulysses_size > self.size.text.heads:
                continue
            ranks = ranks_of(plan)
            seconds = self._seconds(self.size, load, ranks, settings)
            same = (own.ring_size, own.ulysses_size) == (plan.ring_size, plan.ulysses_size)
            found.append(
                MeshChoice(
                    ranks=ranks, seconds=seconds, reasons=own.reasons if same else plan.reasons
                )
            )
        found.sort(key=lambda each: each.seconds)
        default = next(
            each
            for each in found
            if (each.ranks.ring, each.ranks.ulysses) == (own.ring_size, own.ulysses_size)
        )
        if found[0].seconds < (1 - WORTH) * default.seconds:
            return found[0], tuple(found)
        return default, tuple(found)

    def time(
        self, size: ModelSize, load: Load, ranks: Ranks, settings: Settings
    ) -> StepTime | None:
        """Predict the time of a step, None without rates."""
        if self.gpu is None:
            return None
        return training_time(
            size, load, gpu=self.gpu, ranks=ranks, settings=settings, tuned=self.tuned,
            links=self.links,
        )  # fmt: skip

    def _seconds(self, size: ModelSize, load: Load, ranks: Ranks, settings: Settings) -> float:
        time = self.time(size, load, ranks, settings)
        return math.nan if time is None else time.seconds

    # ---- switches

    def ladder(self, load: Load, ranks: Ranks, *, given: Settings | None = None) -> list[Attempt]:
        """Try the switches in order; the last one fits, or nothing does.

        Args:
            load: The row.
            ranks: The mesh.
            given: Switches to begin from; None for those of the planner, without checkpoints.
        """
        size = self.size
        settings = given or replace(self.base, checkpointing=False, offload_bytes=0)
        tried: list[Attempt] = []

        def attempt(name: str, how: str) -> bool:
            peak = training_peak(size, load, ranks=ranks, settings=settings, tuned=self.tuned)
            fits = peak.bytes <= self.limit and peak.host_bytes <= self.host_bytes
            seconds = self._seconds(size, load, ranks, settings)
            tried.append(
                Attempt(
                    name=name, settings=settings, size=size, peak=peak, fits=fits, how=how,
                    seconds=seconds,
                )
            )  # fmt: skip
            return fits

        if attempt("nothing" if given is None else "as it is", _as_setting(settings)):
            return tried
        if not settings.checkpointing or settings.plain_layers or not settings.keep_attention:
            settings = replace(settings, checkpointing=True, keep_attention=True, plain_layers=0)
            if attempt("checkpoints that keep attention", _as_setting(settings)):
                return tried
        tower = size.tower
        many = (
            tower is not None
            and tower.adjustable
            and (tower.frames_per_call or load.frames) > FRAMES_AT_ONCE
        )
        if many and load.frames and "tower" in tried[-1].peak.moment:
            size = size.with_frames_per_call(FRAMES_AT_ONCE)
            how = f"vision_batch_size={FRAMES_AT_ONCE} in the model's configuration"
            if attempt("fewer frames at once", how):
                return tried
        local = ranks.local_tokens(load.tokens)
        untiled = settings.mlp_tile_rows is None or settings.mlp_tile_rows > TILE_ROWS
        if local > TILE_ROWS and untiled and "MLP" in tried[-1].peak.moment:
            settings = replace(settings, mlp_tile_rows=TILE_ROWS)
            if attempt("tiled MLP", f"parallel.mlp_tile_rows={TILE_ROWS}"):
                return tried
        before = settings
        settings = self._offloaded(load, ranks, settings, size, self.host_bytes)
        if settings.offload_bytes and attempt("offload", _offload_setting(settings)):
            return tried
        if settings.optimizer == "adamw":
            settings = replace(before, optimizer="adamw-host")
            room = self.host_bytes - 8.0 * self.tuned.parameters(size) / ranks.shards
            settings = self._offloaded(load, ranks, settings, size, room)
            how = f"optimizer.offload=true, {_offload_setting(settings)}"
            if room >= 0:
                attempt("moments on the host", how)
        return tried

    def _offloaded(
        self, load: Load, ranks: Ranks, settings: Settings, size: ModelSize, room: float
    ) -> Settings:
        """Return the settings with the smallest budget that fits, or the largest there is."""
        budget = settings
        for gib in range(int(settings.offload_bytes / GIB), int(room / GIB) + 1, OFFLOAD_STEP_GIB):
            budget = replace(settings, offload_bytes=int(gib * GIB))
            peak = training_peak(size, load, ranks=ranks, settings=budget, tuned=self.tuned)
            if peak.bytes <= self.limit:
                break
        return budget

    # ---- the whole

    def plan(self, load: Load, gpus: int, *, seq_parallel_size: int | None = None) -> Plan:
        """Plan a step.

        Args:
            load: The row.
            gpus: GPUs.
            seq_parallel_size: Ranks that share it; None to choose.

        Raises:
            PlanError: If the numbers do not divide.
        """
        if gpus < 1 or (gpus > self.per_node and gpus % self.per_node):
            raise PlanError(
                f"{gpus} GPUs are no whole number of nodes of {self.per_node}; say --per-node"
            )
        sizes = [d for d in range(1, gpus + 1) if gpus % d == 0]
        if seq_parallel_size is not None:
            if seq_parallel_size not in sizes:
                raise PlanError(
                    f"{seq_parallel_size} ranks a row do not divide {gpus} GPUs; use one of {sizes}"
                )
            return self._plan(load, gpus, seq_parallel_size)
        for sp in sizes:
            first = self.plan_if_simple(load, gpus, sp)
            if first is not None:
                return first
        whole = self._plan(load, gpus, gpus)
        if whole.fits:
            return whole
        enough = self.enough(gpus, lambda ranks: self.ladder(load, ranks)[-1].fits)
        return replace(whole, enough_gpus=enough)

    def plan_if_simple(self, load: Load, gpus: int, sp: int) -> Plan | None:
        """Return the plan if it needs neither the host nor tiles."""
        ranks = ranks_of(self.mesh(gpus, sp, tokens=load.tokens))
        settings = replace(self.base, checkpointing=True, keep_attention=True)
        peak = training_peak(self.size, load, ranks=ranks, settings=settings, tuned=self.tuned)
        return self._plan(load, gpus, sp) if peak.bytes <= self.limit else None

    def _plan(self, load: Load, gpus: int, sp: int) -> Plan:
        settings = replace(self.base, checkpointing=True)
        chosen, meshes = self.meshes(load, gpus, sp, settings)
        tried = self.ladder(load, chosen.ranks)
        last = tried[-1]
        time = self.time(last.size, load, chosen.ranks, last.settings)
        return Plan(
            size=last.size,
            load=load,
            ranks=chosen.ranks,
            settings=last.settings,
            tuned=self.tuned,
            gpu=self.gpu,
            peak=last.peak,
            time=time,
            limit_bytes=self.limit,
            host_limit_bytes=self.host_bytes,
            attempts=tuple(tried),
            meshes=meshes,
            reasons=chosen.reasons,
        )

    def enough(self, gpus: int, fits: Callable[[Ranks], bool]) -> int | None:
        """Return the fewest GPUs, a multiple of these, that hold a row; None if none do."""
        for factor in MORE:
            number = gpus * factor
            if number > self.per_node and number % self.per_node:
                continue
            if fits(ranks_of(self.mesh(number, number))):
                return number
        return None

    def prompt(self, load: Load, gpus: int, *, chunk_tokens: int = 8192) -> PromptPlan:
        """Plan reading a prompt over some GPUs, all of which share it."""
        if self.gpu is None:
            raise PlanError("reading a prompt is planned for a device whose rates are known")

        def peak_on(ranks: Ranks) -> Peak:
            return prompt_peak(self.size, load, ranks=ranks, chunk_tokens=chunk_tokens)

        ranks = ranks_of(self.mesh(gpus, gpus))
        peak = peak_on(ranks)
        time = prompt_time(
            self.size, load, gpu=self.gpu, ranks=ranks, backend=self.base.backend, links=self.links
        )
        enough = None
        if peak.bytes > self.limit:
            enough = self.enough(gpus, lambda more: peak_on(more).bytes <= self.limit)
        return PromptPlan(
            size=self.size, load=load, ranks=ranks, gpu=self.gpu, peak=peak, time=time,
            limit_bytes=self.limit, enough_gpus=enough,
        )  # fmt: skip


def _as_setting(settings: Settings) -> str:
    return f"parallel.activation_checkpointing={str(settings.checkpointing).lower()}"


def _offload_setting(settings: Settings) -> str:
    return f"parallel.offload_gib={settings.offload_bytes / GIB:.0f}"


def advice(attempts: Sequence[Attempt]) -> list[str]:
    """Say what each switch saves over the one before it, one line each.

    Args:
        attempts: Switches in the order in which they were tried.
    """
    lines = []
    for before, after in itertools.pairwise(attempts):
        saved = (before.peak.bytes - after.peak.bytes) / GIB
        verdict = "fits" if after.fits else "does not fit"
        lines.append(
            f"{after.name} ({after.how}): {after.peak.bytes / GIB:.1f} GiB, {saved:.1f} less; "
            f"{verdict}"
        )
    return lines
