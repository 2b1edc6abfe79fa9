"""``from_pretrained`` on a checkpoint in the original's layout, for the model and its processor.

`VilaLoading` goes in front of ``PreTrainedModel`` in a class's bases. A folder in that layout is
planned as for a conversion; its tensors are handed to transformers' own loader as views that are
read one by one on their way into the model, so that ``dtype``, ``device_map`` and quantisation work
as always and the weights are never in memory twice. Everything else goes to transformers untouched.

Not possible this way: parts of the model left on disk (``device_map`` with "disk"), which needs our
own files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transformers import GenerationConfig, PreTrainedConfig

from longvila.errors import CheckpointError
from longvila.log import get_logger
from longvila.model.generation_longvila import DEFAULT_MAX_NEW_TOKENS
from longvila.model.vila.layout import (
    is_vila,
    is_vila_config,
    open_checkpoint,
    read_json,
)

if TYPE_CHECKING:
    from longvila.model.processing_longvila import LongVILAProcessor
    from longvila.model.vila.plan import Plan

_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def refuse_remote(path: Any, kwargs: dict[str, Any]) -> None:
    """Refuse the name of a repository in the original's layout before it is read as ours.

    Args:
        path: What was given to ``from_pretrained``.
        kwargs: Its other arguments.

    Raises:
        CheckpointError: If it names such a repository; the message says how to fetch it.
    """
    if path is None or Path(path).exists() or kwargs.get("config") is not None:
        return
    hub = {key: kwargs[key] for key in _HUB if key in kwargs}
    config, _ = PreTrainedConfig.get_config_dict(path, **hub)
    if is_vila_config(config):
        open_checkpoint(path)


def generation_config(plan: Plan) -> GenerationConfig:
    """Make the generation settings of a checkpoint: greedy, ending where its template ends answers.

    Sampling settings in ``llm/generation_config.json`` are those of the language model it grew
    from; the original ignores them.

    Args:
        plan: The checkpoint.

    Returns:
        The settings.
    """
    tokenizer = plan.tokenizer
    eos = tokenizer.eos_token_id
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
        eos_token_id=plan.stop_ids,
        pad_token_id=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        bos_token_id=eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
    )


def make_processor(plan: Plan, **overrides: Any) -> LongVILAProcessor:
    """Make the processor of a checkpoint.

    Args:
        plan: The checkpoint.
        **overrides: Arguments of `LongVILAProcessor.from_config`.

    Returns:
        The processor.
    """
    from longvila.model.processing_longvila import LongVILAProcessor

    file = plan.checkpoint.parts["vision_tower"] / "preprocessor_config.json"
    stored = read_json(file) if file.is_file() else {}
    names = ("image_mean", "image_std", "rescale_factor")
    values = {name: stored[name] for name in names if stored.get(name) is not None}
    values["system_prompt"] = plan.template.system_prompt
    values["chat_template"] = plan.template.text
    processor = LongVILAProcessor.from_config(
        plan.config, plan.tokenizer, **{**values, **overrides}
    )
    if plan.template.text is None and "chat_template" not in overrides:
        processor.chat_template = None
    plan.tokenizer.chat_template = processor.chat_template
    return processor


class VilaLoading:
    """Lets a model's ``from_pretrained`` read the original's layout."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Self:
        """Load a model from our own files or from a folder in the original's layout.

        Args:
            pretrained_model_name_or_path: As for transformers, or such a folder.
            *model_args: Passed on.
            **kwargs: Passed on. For the original's layout also ``token_order`` and
                ``conversation``, as for ``longvila convert``; settings of `LongVILAConfig` may be
                given by name.

        Returns:
            The model, in evaluation mode.

        Raises:
            CheckpointError: If a folder in the original's layout cannot be read.
        """
        load: Any = super().from_pretrained  # type: ignore[misc]
        if not is_vila(pretrained_model_name_or_path):
            refuse_remote(pretrained_model_name_or_path, kwargs)
            return load(pretrained_model_name_or_path, *model_args, **kwargs)
        for name in ("config", "state_dict"):
            if kwargs.pop(name, None) is not None:
                raise CheckpointError(
                    f"{name}= cannot be combined with a checkpoint in the original's layout; "
                    "convert it with `longvila convert`"
                )
        for name in (*_HUB, "use_safetensors", "variant", "weights_only"):
            kwargs.pop(name, None)
        options = {key: kwargs.pop(key, None) for key in ("token_order", "conversation")}
        # The plan needs the model's classes, which are built on this one.
        from longvila.model.vila.plan import plan_conversion

        plan = plan_conversion(pretrained_model_name_or_path, **options)
        for note in plan.notes:
            get_logger(__name__).info("%s: %s", plan.checkpoint.root.name, note)
        for key in [key for key in kwargs if key in plan.config.to_dict() and key != "dtype"]:
            setattr(plan.config, key, kwargs.pop(key))
        result = load(None, *model_args, config=plan.config, state_dict=plan.state_dict(), **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        if model.can_generate():
            model.generation_config = generation_config(plan)
        return result


class VilaProcessorLoading:
    """Lets a processor's ``from_pretrained`` read the original's layout."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a processor from our own files or from a folder in the original's layout.

        Args:
            pretrained_model_name_or_path: As for transformers, or such a folder.
            **kwargs: Passed on. For the original's layout ``token_order`` and ``conversation``, as
                for ``longvila convert``, arguments of the processor, and the tokenizer's
                ``padding_side``, ``truncation_side`` and ``model_max_length``.

        Returns:
            The processor.

        Raises:
            CheckpointError: If a folder in the original's layout cannot be read.
        """
        if not is_vila(pretrained_model_name_or_path):
            load: Any = super().from_pretrained  # type: ignore[misc]
            return load(pretrained_model_name_or_path, **kwargs)
        from longvila.model.vila.plan import plan_conversion

        for name in (*_HUB, "trust_remote_code", "use_fast"):
            kwargs.pop(name, None)
        options = {key: kwargs.pop(key, None) for key in ("token_order", "conversation")}
        plan = plan_conversion(pretrained_model_name_or_path, **options)
        for name in ("padding_side", "truncation_side", "model_max_length"):
            if name in kwargs:
                setattr(plan.tokenizer, name, kwargs.pop(name))
        return make_processor(plan, **kwargs)
