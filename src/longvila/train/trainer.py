"""A `transformers.Trainer` over sequence-parallel groups, and what makes any Trainer one.

    trainer = LongVILATrainer(model, LongVILATrainingArguments("out", seq_parallel_size=4), ...)
    trainer.train()

`MeshTrainer` holds all of it and goes before any class that goes back to `transformers.Trainer`.
Callbacks, trackers, schedules, saving and resuming stay the Trainer's. What changes:

1. **Model**: frozen and adapted as the arguments say, then put on the mesh by `parallelize`. On
   several GPUs its parameters are sharded there and then, in the groups that the two-stage forward
   needs; accelerate's FSDP2 finds them sharded, leaves them, and clips, saves and resumes. On CPU
   (or ``sharding="replicated"``) every rank keeps all parameters; nothing wraps the model, and
   gradients are combined once, before clipping.
2. **Batches**: a group of ranks that shares samples is one device. Its ranks draw the same batches;
   steps, batch size, and seen tokens are counted in groups.
3. **Loss**: the mean over all targets of a step, over all ranks and micro-batches. Trainer counts
   targets first (as documents have them: the first token of each is nobody's target) and multiplies
   the loss by the number of processes; here ``compute_loss`` returns the global mean, the same on
   every rank, with the gradient that an average over ranks makes exact, and multiplies nothing.
4. **Evaluation**: one forward for all ranks a round; ``eval_loss`` is the mean over all targets of
   the dataset, whatever the batch size and the mesh. No rank has whole logits, so there are no
   predictions.
5. **Data**: a map-style dataset with `longvila.data.collate.Collator` (told here which frames this
   rank decodes), any other collator that gives a model's inputs, or a loader with a state
   (`longvila.data.loader.PackedLoader`), which is saved and resumed to the row.

On GPUs the first step is planned before it runs, and a run that would not fit is refused. A step
without any target changes nothing. What is not supported is refused when the trainer is
made: model_init, compute_metrics, compute_loss_func, and what `MeshArguments` names.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from longvila.data.collate import Collator
from longvila.errors import CheckpointError
from longvila.log import get_logger
from longvila.memory.operations import Load
from longvila.model.opening import check_whole
from longvila.parallel.apply import parallelize, reduce_gradients
from longvila.parallel.families import find_family
from longvila.parallel.mmsp import plan_media
from longvila.sp.loss import IGNORE_INDEX
from longvila.sp.mesh import SPMesh, build_mesh
from longvila.train import lora
from longvila.train.arguments import MeshArguments
from longvila.train.budget import check, load_of_batch
from longvila.train.parts import base_model, export_state, named_parts, save_plain
from longvila.train.refused import check_arguments, check_loss
from longvila.train.stages import StageError
from longvila.train.step import Counts, count_batch, over_data_parallel

_LOG = get_logger(__name__)
#: What padding-free collators say to varlen kernels, beside ``position_ids``.
_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

if TYPE_CHECKING:  # methods of the mix-in are overrides, of whichever Trainer comes after it
    _Base = Trainer
else:
    _Base = object


class MeshTrainer(_Base):
    """Everything that makes a Trainer train over a mesh; put it before the Trainer's class.

    Args:
        model: A model of a known family, or PEFT around one; whatever the class takes.
        args: Arguments with `MeshArguments` among their classes.
        data_collator: A `Collator`, or any function that gives a model's inputs.
        kwargs: Those of the Trainer's class.

    Attributes:
        mesh: The mesh.

    Raises:
        TypeError: If the arguments are no `MeshArguments`.
        ValueError: If something is asked for that no rank can do alone.
    """

    mesh: SPMesh
    model: Any
    model_wrapped: Any
    data_collator: Any
    control: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, MeshArguments):
            raise TypeError(
                f"args must be LongVILATrainingArguments (or put MeshArguments before the class "
                f"you use), got {type(args).__name__}"
            )
        check_arguments(kwargs)
        check_loss(type(self), MeshTrainer)
        arguments: Any = args
        super().__init__(model=model, args=arguments, data_collator=data_collator, **kwargs)
        theirs = self.accelerator.parallelism_config
        if theirs is not None and theirs.non_data_parallel_size > 1:
            raise ValueError(
                f"accelerate was launched with a parallelism config of its own ({theirs}); leave "
                "it out of `accelerate config` and give seq_parallel_size"
            )
        self._memory_checked = self.args.device.type != "cuda" or not args.check_memory
        self._put_on_mesh(args)
        # The loss is divided by the targets of the whole step, whatever the model's class says.
        self.model_accepts_loss_kwargs = True
        self.optimizer_cls_and_kwargs = args.host_optimizer() or self.optimizer_cls_and_kwargs
        if isinstance(self.data_collator, Collator):
            self.data_collator = self._bind(self.data_collator)
        if _is_loader(self.train_dataset):
            # It goes on by its state; nothing is drawn again.
            self.args.ignore_data_skip = True

    # ---- the model

    def _put_on_mesh(self, args: MeshArguments) -> None:
        model = _tune(self.model, args)
        text = find_family(base_model(model)).text_model(base_model(model)).config
        self.mesh = build_mesh(
            args.seq_parallel_size,
            args.seq_parallel_ring_size,
            args.seq_parallel_ring_type,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            device_type=self.args.device.type,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs and would copy the model to each; start "
                "one process a GPU (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES"
            )
        _agree_on_weights(model, self.mesh, self.args.device)
        self._plan = plan = args.parallel_plan()
        parallelize(model, self.mesh, plan)
        if not plan.fsdp:
            # accelerate's own mark for a model that is ready: nothing wraps it.
            model._is_accelerate_prepared = True  # type: ignore[assignment]
        self.model = self.model_wrapped = model
        self.callback_handler.model = model
        if self.mesh.rank == 0:
            _LOG.info("%s", self.mesh.explain())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Set the optimiser up, with a learning rate for each part that has one of its own."""
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        rates: Any = self.args
        own = {part: rate for part, rate in rates.part_rates().items() if rate is not None}
        if existed or not own:
            return optimizer
        part_of = {
            id(parameter): part
            for part, named in named_parts(self.model).items()
            for _, parameter in named
        }
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            divided: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                rate = own.get(part_of[id(parameter)], group["lr"])
                divided.setdefault(rate, []).append(parameter)
            groups += [{**group, "params": each, "lr": rate} for rate, each in divided.items()]
        optimizer.param_groups[:] = groups
        return optimizer

    # ---- batches

    def _bind(self, collator: Collator) -> Collator:
        """Tell a collator which frames this rank decodes."""
        if collator.deal is not None or self.mesh.sp_size == 1:
            return collator
        config = base_model(self.model).config
        return replace(
            collator,
            sp_rank=self.mesh.sp_rank,
            sp_size=self.mesh.sp_size,
            deal=functools.partial(plan_media, config, self.mesh.sp_size),
        )

    def get_train_dataloader(self) -> Any:
        """Return this group's batches: a loader as it is, or the Trainer's for a dataset."""
        if _is_loader(self.train_dataset):
            return _Batches(self.train_dataset, self.args.device, endless=True)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return this group's batches of an evaluation."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]  # type: ignore[index,call-overload]
        if _is_loader(dataset):
            return _Batches(dataset, self.args.device) if hasattr(dataset, "finish") else dataset
        return super().get_eval_dataloader(eval_dataset)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        loader: Any = super()._get_dataloader(*args, **kwargs)
        if self.mesh.world_size > 1:
            sampler, dataset = loader.batch_sampler, loader.dataset
            shard = sampler if isinstance(sampler, BatchSamplerShard) else dataset
            if not isinstance(shard, BatchSamplerShard | IterableDatasetShard):
                raise TypeError(
                    f"batches of {type(dataset).__name__} are not dealt by accelerate's samplers "
                    f"({type(sampler).__name__}), so they cannot be dealt to groups of ranks"
                )
            shard.num_processes, shard.process_index = self.mesh.dp_size, self.mesh.dp_rank
            training = kwargs.get("is_training", False)
            if isinstance(shard, BatchSamplerShard) and (self.mesh.dp_size == 1 or not training):
                # Nothing is drawn twice: alone there is nobody to be even with, and evaluation
                # sees each sample once.
                shard.even_batches = False
        # Frames go to the device when they are encoded, a micro-batch at a time.
        loader.device = None
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler: Any = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            # The global generator moves differently on ranks that hold different tokens.
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.generator = torch.Generator().manual_seed(seed)
        return sampler

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        family = find_family(base_model(self.model))
        pixels = {f"{local}{kind.pixels}" for kind in family.media for local in ("", "local_")}
        # Where documents begin is in their positions; kernels of transformers want it said again.
        said = _VARLEN if inputs.get("position_ids") is not None else ()
        small = {n: value for n, value in inputs.items() if n not in pixels and n not in said}
        prepared = super()._prepare_inputs(small)
        return {**prepared, **{name: inputs[name] for name in inputs if name in pixels}}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Draw the micro-batches of a step and count its targets over all groups.

        Comm: One all-reduce of a few numbers over data parallelism.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if batches and not self._memory_checked:
            self._memory_checked = True
            self._check_memory(batches)
        counts = sum((_count(batch) for batch in batches), Counts())
        targets = over_data_parallel(counts, self.mesh).targets
        return batches, torch.tensor(targets, device=device)

    def _check_memory(self, batches: list[Any]) -> None:
        """Refuse a step that is planned not to fit, for the longest row of any group.

        Comm: An all-reduce of a few numbers.
        """
        loads = [load_of_batch(_ordinary(batch)) for batch in batches]
        longest = [max(getattr(load, n) for load in loads) for n in ("tokens", "frames", "targets")]
        values = torch.tensor(longest, device=self.args.device)
        if self.mesh.dp_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.mesh.dp_group)
        tokens, frames, targets = values.tolist()
        load = Load(tokens=tokens, frames=frames, targets=targets, micro_batches=len(batches))
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        check(self.model, self.mesh, self._plan, load, self.args.device, optimizer=optimizer)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the samples of a step: a group of ranks is one device."""
        return int(self._train_batch_size * args.gradient_accumulation_steps * self.mesh.dp_size)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return this rank's share of the operations of a batch."""
        return int(super().floating_point_ops(inputs) // self.mesh.sp_size)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // self.mesh.sp_size

    # ---- the step

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Compute in the type that the arguments ask for; FSDP does so itself."""
        stack = contextlib.ExitStack()
        if not self._is_sharded():
            stack.enter_context(self.accelerator.autocast())
        return stack

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch over all ranks, the same on each of them."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if not loss.requires_grad and torch.is_grad_enabled():
            # With all of the text model frozen, rows without media depend on nothing that is tuned.
            loss = loss.detach().requires_grad_()
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run a micro-batch forward and backward; after the last of a step, combine gradients.

        Comm: That of the passes; without FSDP, the gradients once a step.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self._is_sharded():
                self._reshard()
            elif self.mesh.world_size > 1:
                reduce_gradients(self.model)
            if num_items_in_batch is not None and int(num_items_in_batch) == 0:
                self.model.zero_grad(set_to_none=True)
        return loss

    def _is_sharded(self) -> bool:
        return isinstance(self.model, FSDPModule)

    def _reshard(self) -> None:
        # A forward pass without a backward one leaves parameters gathered, and the next pass would
        # take those instead of the updated shards.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # ---- evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the mean loss over all targets of a dataset, as ``PREFIX_loss``.

        Args:
            dataloader: This group's batches.
            description: What Trainer calls it.
            prediction_loss_only: Ignored: there are no predictions.
            ignore_keys: Ignored.
            metric_key_prefix: Prefix of the loss's name.

        Comm: That of a forward pass a round, and one all-reduce of a flag.
        """
        model = self.model
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        counts = Counts()
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for batch in self._rounds(dataloader):
            counts += _count(batch)
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                total += self.compute_loss(model, inputs, num_items_in_batch=1).double()
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        self._reshard()
        counts = over_data_parallel(counts, self.mesh)
        metrics = {f"{metric_key_prefix}_loss": float(total) / max(counts.targets, 1)}
        dataset = getattr(dataloader, "dataset", None)
        samples = len(dataset) if isinstance(dataset, Sized) else counts.documents
        nothing: Any = None
        return EvalLoopOutput(
            predictions=nothing, label_ids=None, metrics=metrics, num_samples=samples
        )

    def _rounds(self, dataloader: Any) -> Iterator[dict[str, Any]]:
        """Yield batches; where another group still has one, a batch without targets."""
        group = self.mesh.dp_group
        iterator = iter(dataloader)
        while True:
            batch = next(iterator, None)
            if self.mesh.dp_size > 1:
                some = torch.tensor(int(batch is not None), device=self.args.device)
                dist.all_reduce(some, op=dist.ReduceOp.MAX, group=group)
                if batch is None and int(some):
                    ids = torch.zeros(1, 2, dtype=torch.int64)
                    yield {"input_ids": ids, "labels": torch.full_like(ids, IGNORE_INDEX)}
                    continue
            if batch is None:
                return
            yield batch

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: predictions are whole logits."""
        raise NotImplementedError(
            "no rank has whole logits; evaluate() gives the loss, longvila.evaluation measures "
            "answers"
        )

    # ---- saved, resumed, exported

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and hasattr(self.model, "peft_config"):
            state = self.model.state_dict() if state_dict is None else state_dict
            lora.complete_adapter(Path(str(output_dir or self.args.output_dir)), self.model, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._is_sharded() or hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _load_whole(self.model, resume_from_checkpoint)
        if hasattr(self.model, "peft_config"):
            lora.load_in_full(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self._is_sharded() or hasattr(self.model, "peft_config"):
            super()._load_best_model()
        else:
            _load_whole(self.model, best)
        if hasattr(self.model, "peft_config"):
            lora.load_in_full(self.model, Path(best))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if _is_loader(self.train_dataset):
            loader: Any = self.train_dataset
            file = self._loader_file(output_dir)
            file.write_text(json.dumps(loader.state_dict()), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and _is_loader(self.train_dataset):
            loader: Any = self.train_dataset
            file = self._loader_file(checkpoint)
            if not file.is_file():
                # On more groups than before: data are dealt anew from where all of them ended.
                file = file.with_name("loader_state_0.json")
            if not file.is_file():
                raise CheckpointError(
                    f"{checkpoint} does not say where the data ended ({file.name}); it was saved "
                    "with another dataset, or with save_only_model"
                )
            loader.load_state_dict(json.loads(file.read_text(encoding="utf-8")))

    def _loader_file(self, folder: str) -> Path:
        return Path(folder) / f"loader_state_{self.mesh.dp_rank}.json"

    def export_model(self, output_dir: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the plain model, adapters merged, with its processor; all ranks call it.

        Args:
            output_dir: Folder that ``from_pretrained`` will load.
            dtype: Type of the weights.

        Raises:
            StageError: If the adapter is not plain LoRA.

        Comm: With FSDP, every parameter once to every rank, one at a time; a barrier.
        """
        state = export_state(self.model, lora.adapter_of(self.model), dtype)
        if self.mesh.rank == 0:
            save_plain(self.model, state, Path(output_dir))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(str(output_dir))
        if self.mesh.world_size > 1:
            dist.barrier()


class LongVILATrainer(MeshTrainer, Trainer):
    """`transformers.Trainer` over a mesh; see the module's text."""


# ---- helpers ---------------------------------------------------------------------------------


def _load_whole(model: Any, folder: str) -> None:
    """Read a checkpoint of the whole model, under whatever names its class saves it.

    Trainer looks for the model's own names, which some classes change when they save, and goes on
    from the weights at hand where it finds none.

    Raises:
        CheckpointError: If it lacks weights.
    """
    widest = max({p.dtype for p in model.parameters()}, key=lambda each: each.itemsize)
    saved, found = type(model).from_pretrained(folder, dtype=widest, output_loading_info=True)
    check_whole(found, f"checkpoint {folder}")
    model.load_state_dict(saved.state_dict())


def _is_loader(data: Any) -> bool:
    """Whether data is a loader of batches with a state (`longvila.train.loop.Loader`)."""
    return all(hasattr(data, name) for name in ("__iter__", "state_dict", "load_state_dict"))


class _Batches:
    """A loader's batches, finished where its workers leave pixels to the device."""

    def __init__(self, loader: Any, device: torch.device, *, endless: bool = False) -> None:
        self.loader, self.device, self.endless = loader, device, endless

    def __iter__(self) -> Iterator[dict[str, Any]]:
        finish = getattr(self.loader, "finish", None)
        drawn = True
        while drawn:
            drawn = False
            for batch in self.loader:
                drawn = self.endless
                yield batch if finish is None else finish(batch, self.device)


def _count(batch: Mapping[str, Any]) -> Counts:
    """Count a batch."""
    if batch.get("labels") is None and batch.get("shift_labels") is None:
        raise ValueError(f"a batch has no labels, only {sorted(batch)}; nothing can be learnt")
    return count_batch(_ordinary(batch))


def _ordinary(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch with one position a token, or none; further ones are for the rotary embedding."""
    positions = batch.get("position_ids")
    if positions is None or positions.dim() < 3:
        return batch
    return {**batch, "position_ids": positions[0] if positions.shape[0] == 4 else None}


def _tune(model: Any, args: MeshArguments) -> nn.Module:
    """Freeze what is not trained, and adapt the language model."""
    parts, adapter = named_parts(model), args.adapter()
    if adapter is not None and hasattr(model, "peft_config"):
        raise StageError("lora_enable is set, and the model comes with adapters of PEFT already")
    if adapter is not None and not args.tune_language_model:
        raise StageError(
            "the adapters are in the language model, which tune_language_model freezes"
        )
    for part, tuned in args.tuned_parts().items():
        frozen = not tuned or (part == "language_model" and adapter is not None)
        if frozen:
            for _, parameter in parts[part]:
                parameter.requires_grad_(False)
        elif part != "language_model" and not parts[part] and args.part_rates()[part] is not None:
            raise StageError(f"{part} has a learning rate, but the model has no such part")
    return model if adapter is None else lora.adapt(base_model(model), adapter)


def _agree_on_weights(model: nn.Module, mesh: SPMesh, device: torch.device) -> None:
    """Give all ranks rank 0's value of every tensor that differs: new weights drawn unseeded.

    Comm: One all-gather of a number a tensor; a broadcast of each tensor that differs.
    """
    if mesh.world_size == 1:
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sums = [t.detach().to(device).double().sum() for t in tensors.values() if t.numel()]
    mine = torch.stack(sums)
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=mesh.dp_sp_group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=mesh.dp_sp_group)
    filled = [(n, t) for n, t in tensors.items() if t.numel()]
    differ = [pair for pair, same in zip(filled, (low == high).tolist(), strict=True) if not same]
    if differ and mesh.rank == 0:
        _LOG.warning(
            "%d tensors differ between ranks (%s, ...); all take those of rank 0",
            len(differ), differ[0][0],
        )  # fmt: skip
    for _, tensor in differ:
        value = tensor.detach().to(device)
        dist.broadcast(value, src=0, group=mesh.dp_sp_group)
        with torch.no_grad():
            tensor.copy_(value)
