"""A run of benchmarks, from a model to a folder, with lmms-eval for data and prompts.

1. The presets are lmms-eval tasks; what the user changed (where data are, how many frames) is a
   task file that includes the packaged one, in a folder that lasts as long as the run.
2. The plug-in answers. Tasks whose own scoring guesses, needs a judge or a server are asked
   without being scored by lmms-eval.
3. The folder of the run is written by the first rank (`longvila.evaluation.runs`); answers are in
   its ``answers`` as they come, and a run begun again goes on from them, with the settings it began
   with.

Not done: fetching videos of benchmarks whose licences forbid it; lmms-eval says where they go.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from tenacity import RetryError

from longvila.errors import LongVILAError
from longvila.evaluation.answers import Answers, Record
from longvila.evaluation.lmms import LongVILA
from longvila.evaluation.presets import TASKS_FOLDER, Preset
from longvila.evaluation.report import Summary
from longvila.evaluation.runs import begin, check_settings, write_results

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run.

    Attributes:
        presets: The benchmarks.
        model: Folder or hub id.
        out: Folder of the results.
        frames: Frames of each video; None for the paper's.
        limit: Questions of each benchmark, for trials; None for all.
        data: Folder of a benchmark's files, by its name.
        seq_parallel_size: Ranks that share a sequence.
        ring_type: How they share it.
        device: Where; None chooses.
        dtype: Precision; auto chooses.
        seed: Of sampling, and of whatever lmms-eval draws.
    """

    presets: tuple[Preset, ...]
    model: str
    out: Path
    frames: int | None = None
    limit: int | None = None
    data: Mapping[str, Path] = field(default_factory=dict)
    seq_parallel_size: int = 1
    ring_type: str = "zigzag_ring_varlen"
    device: str | None = None
    dtype: str = "auto"
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Return what answers depend on."""
        return {
            "model": self.model,
            "frames": "paper" if self.frames is None else self.frames,
            "limit": self.limit,
            "dtype": self.dtype,
            "seed": self.seed,
        }


def task_changes(preset: Preset, *, frames: int | None, data: Path | None) -> dict[str, Any]:
    """Return what of a preset's task the user changed.

    Args:
        preset: The benchmark.
        frames: Frames of a video, if not the paper's.
        data: Folder of its files, if the user named one.

    Returns:
        Keys of a task file; none if nothing is changed.

    Raises:
        LongVILAError: If the folder holds no questions, or lmms-eval alone knows where they are.
    """
    changes: dict[str, Any] = {}
    if data is not None:
        if not preset.data:
            home = os.environ.get("HF_HOME", "~/.cache/huggingface")
            raise LongVILAError(
                f"{preset.name} is a task of lmms-eval's own, which looks for its videos under "
                f"HF_HOME ({home}); set that instead of --data"
            )
        files = _questions(data, preset.data)
        changes["dataset_path"] = _BUILDERS[files[0].suffix]
        changes["dataset_kwargs"] = {"data_files": {"test": [str(file) for file in files]}}
    if preset.ours and (data is not None or frames is not None):
        media = str(data.resolve()) if data is not None else preset.name.split("_")[0]
        options = {"media": media, "frames": frames or preset.frames}
        changes["lmms_eval_specific_kwargs"] = {"default": options}
    return changes


def write_changed_tasks(plan: Plan, folder: Path) -> None:
    """Write task files that are packaged ones with the user's changes, under the same names.

    Args:
        plan: The run.
        folder: Where to; lmms-eval looks there first.
    """
    for preset in plan.presets:
        changes = task_changes(preset, frames=plan.frames, data=plan.data.get(preset.name))
        if changes:
            file = {"include": str(TASKS_FOLDER / f"{preset.task}.yaml"), "task": preset.task}
            text = yaml.safe_dump({**file, **changes})
            (folder / f"{preset.task}.yaml").write_text(text, encoding="utf-8")


def _questions(folder: Path, patterns: Sequence[str]) -> list[Path]:
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if found:
            return [file.resolve() for file in found] if "**" in pattern else [found[0].resolve()]
    raise LongVILAError(f"{folder} has no file of questions ({', '.join(patterns)})")


def run(plan: Plan) -> dict[str, Summary]:
    """Run benchmarks; under torchrun every rank makes the call.

    Args:
        plan: What to run.

    Returns:
        A summary a benchmark, on the first rank; the other ranks get none.

    Raises:
        LongVILAError: If the folder holds a run with other settings.
    """
    # Some tasks read it, and some of those do not expand a home folder.
    home = Path(os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface")))
    os.environ["HF_HOME"] = str(home)
    check_settings(plan.out, plan.settings())
    for preset in plan.presets:  # A folder without questions is told before a model is loaded.
        task_changes(preset, frames=plan.frames, data=plan.data.get(preset.name))
    model = LongVILA(
        plan.model,
        num_frames="paper" if plan.frames is None else plan.frames,
        device=plan.device,
        dtype=plan.dtype,
        log=str(plan.out / "answers"),
        seq_parallel_size=plan.seq_parallel_size,
        seq_parallel_ring_type=plan.ring_type,
        seed=plan.seed,
        keep=True,
    )
    try:
        return _run(plan, model)
    finally:
        model.asking.answers.close()


def _run(plan: Plan, model: LongVILA) -> dict[str, Summary]:
    first = model.rank == 0
    if first:
        begin(plan.out, plan.settings(), _versions())
    official: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as changed:
        write_changed_tasks(plan, Path(changed))
        manager = TaskManager(
            "WARNING",
            include_path=[changed, str(TASKS_FOLDER)],
            include_defaults=not all(preset.ours for preset in plan.presets),
            model_name="longvila",
        )
        for scored in (True, False):
            chosen = [preset for preset in plan.presets if preset.official == scored]
            if not chosen:
                continue
            with _loading(chosen):
                out = simple_evaluate(
                    model=model,
                    tasks=[preset.task for preset in chosen],
                    task_manager=manager,
                    limit=plan.limit,
                    predict_only=not scored,
                    log_samples=True,
                    random_seed=plan.seed,
                    numpy_random_seed=plan.seed,
                    torch_random_seed=plan.seed,
                    fewshot_random_seed=plan.seed,
                    bootstrap_iters=0,
                    distributed_executor_backend=(
                        "torchrun" if model.world_size > 1 else "accelerate"
                    ),
                )
            if out is not None and scored:
                for preset in chosen:
                    official[preset.name] = _numbers(out["results"].get(preset.task, {}))
    if not first:
        return {}
    return write_results(plan.out, _asked(model), official)


@contextmanager
def _loading(presets: Sequence[Preset]) -> Iterator[None]:
    """Say in a line what lmms-eval could not fetch or import."""
    names = ", ".join(preset.name for preset in presets)
    try:
        yield
    except RetryError as fault:
        cause = fault.last_attempt.exception()
        if type(cause).__name__ == "DatasetGenerationError":  # says no more than that
            cause = getattr(cause, "__cause__", None) or cause
        named = " ".join(f"--data {preset.name}=FOLDER" for preset in presets if preset.data)
        raise LongVILAError(
            f"lmms-eval cannot get the questions of {names}: {cause}; it needs whole files, the "
            f"Hugging Face Hub, or what an earlier run left under HF_HOME ({os.environ['HF_HOME']})"
            + (f"; what you have yourself is named by {named}" if named else "")
        ) from fault
    except KeyError as fault:
        place = traceback.extract_tb(fault.__traceback__)[-1]
        if Path(place.filename).name != "lmms_tasks.py":
            raise
        raise LongVILAError(f"a question of {names} has no {fault}") from fault
    except ModuleNotFoundError as fault:
        raise LongVILAError(
            f"lmms-eval's tasks ({names}) need the package {fault.name}: pip install {fault.name}"
        ) from fault


def _asked(model: LongVILA) -> list[Record]:
    """The answers of this run; the folder may hold those of an earlier, longer one too."""
    answers: Answers = model.asking.answers
    everywhere = Answers(answers.folder, None)
    records = {record["key"]: record for record in everywhere.records()}
    return [records[key] for key in model.asking.asked if key in records]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """lmms-eval's scores of a task, without its errors and its filters' names."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key and "_stderr" not in key
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("lmms-eval", "transformers", "torch")}
