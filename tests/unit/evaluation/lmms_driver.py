"""Everything that needs lmms-eval, in one process, since its import takes ten seconds.

    python lmms_driver.py FOLDER        writes FOLDER/results.json

1. A scripted model that knows the answers, one that always says A and one that never answers run
   all packaged tasks on small data in each benchmark's format.
2. lmms-eval's own command line runs the plug-in, found by its entry point, on a tiny model.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fixture import videomme_rows, write_task, write_videomme
from lmms_eval.__main__ import cli_evaluate
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image
from test_presets import DOCS

from longvila.cli.main import main as longvila
from longvila.evaluation.presets import find_preset
from longvila.media.synthetic import clip

LETTERS = "ABCD"


class Scripted(lmms):
    """A model that is told what to say."""

    is_simple = False

    def __init__(self, say: Callable[[str, Any], str]) -> None:
        super().__init__()
        self.say = say

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for request in requests:
            _, to_messages, _, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            assert to_messages(doc)[0]["content"][0]["type"] == "video"
            answers.append(self.say(request.metadata["benchmark"], doc))
        return answers

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: Any) -> Any:
        raise NotImplementedError


MODELS = {
    "oracle": lambda name, doc: find_preset(name).sample(doc).answer or "",
    "blind": lambda name, doc: "A",
    "silent": lambda name, doc: "I would rather not say.",
}


def write_tasks(folder: Path) -> list[str]:
    """Small data in the format of every packaged task; right letters are equally frequent."""
    clip(folder / "a.mp4", 4)
    clip(folder / "b.mp4", 4)
    rotations = [
        {
            "video": f"{video}.mp4",
            "question": "Which fruit?",
            "options": [f"fruit {(i - turn) % 4}" for i in range(4)],
            "gt": "fruit 0",
            "gt_option": LETTERS[turn],
            "type": "ret_edit1",
            "try": turn,
            "length": 10 if video == "a" else 100,
        }
        for video in "ab"
        for turn in range(4)
    ]
    (folder / "vnbench.json").write_text(json.dumps(rotations))
    events = [
        {
            "question_id": number,
            "video": "a.mp4",
            "question": "What happens?",
            "candidates": [f"event {i}" for i in range(4)],
            "answer": f"event {number}",
            "task": "causal",
        }
        for number in range(4)
    ]
    (folder / "event.json").write_text(json.dumps(events))
    needles = [
        {
            "haystack": "a.mp4",
            "needle": "needle.png",
            "frames": 8,
            "depth": depth / 4,
            "question": "What is on the picture?",
            "answer": LETTERS[depth],
            "options": [f"thing {i}" for i in range(4)],
        }
        for depth in range(4)
    ]
    (folder / "needles.json").write_text(json.dumps(needles))
    data = {"longvila_vnbench": "vnbench", "longvila_eventbench": "event"}
    for base, file in {**data, "longvila_needle": "needles"}.items():
        write_task(
            folder / "tasks" / f"{base}.yaml",
            base,
            task=f"{base}_fixture",
            dataset_path="json",
            dataset_kwargs={"data_files": {"test": str(folder / f"{file}.json")}},
            lmms_eval_specific_kwargs={"default": {"media": str(folder)}},
        )
    return [f"{base}_fixture" for base in (*data, "longvila_needle")]


def run_scripted(names: list[str], *folders: Path) -> dict[str, Any]:
    manager = TaskManager(
        "ERROR",
        include_path=[str(folder) for folder in folders],
        include_defaults=False,
        model_name="longvila",
    )
    out: dict[str, Any] = {}
    for who, say in MODELS.items():
        result = simple_evaluate(model=Scripted(say), tasks=list(names), task_manager=manager)
        out[who] = {
            task: {
                key.partition(",")[0]: value
                for key, value in values.items()
                if key.endswith(",none") and isinstance(value, float)
            }
            for task, values in result["results"].items()
        }
    return out


def run_command(folder: Path, tasks: Path, log: str, out: str) -> None:
    arguments = [
        "--model=longvila",
        f"--model_args=pretrained={folder / 'model'},num_frames=4,log={folder / log}",
        "--tasks=longvila_videomme_fixture,longvila_videomme_w_subtitle_fixture",
        f"--include_path={tasks}",
        "--log_samples",
        f"--output_path={folder / out}",
        "--verbosity=DEBUG",
    ]
    sys.argv = ["lmms-eval", *arguments]
    cli_evaluate()


def run_verb(folder: Path, out: str, *more: str) -> int:
    """The verb of this package, on the same data."""
    data = folder / "videomme"
    return longvila(
        [
            "eval",
            "--tasks=videomme,lmms-videomme_w_subtitle-256",
            f"--data=videomme={data}",
            f"--data=videomme_w_subtitle={data}",
            "--frames=4",
            f"--model={folder / 'model'}",
            f"--out={folder / out}",
            *more,
        ]
    )


def theirs_agree() -> dict[str, list[bool]]:
    """What lmms-eval's own scoring says to the letter that a preset holds for right, and to others.

    Only of tasks whose modules import without packages of their own.
    """
    functions = {
        "egoschema": ("egoschema", "egoschema_process_results_generation"),
        "perceptiontest_val_mc": ("perceptiontest.val", "perceptiontest_val_process_results_mc"),
        "mvbench": ("mvbench", "mvbench_process_results"),
        "nextqa_mc_test": ("nextqa", "nextqa_mc_process_results"),
        "mlvu": ("mlvu", "mlvu_process_results"),
        "lvbench": ("lvbench", "lvbench_process_results"),
    }
    out = {}
    for name, (package, function) in functions.items():
        module = importlib.import_module(f"lmms_eval.tasks.{package}.utils")
        doc = {**DOCS[name][0], **MORE.get(name, {})}
        sample = find_preset(name).sample(doc)
        out[name] = []
        for letter in sorted(sample.letters, key=lambda x: x != sample.answer):
            (value,) = [
                value
                for key, value in getattr(module, function)(doc, [letter]).items()
                if key != "submission"
            ]
            if isinstance(value, dict):
                value = next(
                    right(value)
                    for keys, right in RIGHT.items()
                    if all(key in value for key in keys.split())
                )
            out[name].append(bool(value))
    return out


#: How their entries say whether an answer is right, by the keys they have.
RIGHT: dict[str, Callable[[Any], bool]] = {
    "correct": lambda v: v["correct"],
    "score": lambda v: v["score"],
    "pred ground_truth": lambda v: str(v["pred"]) == str(v["ground_truth"]),
    "pred_answer answer": lambda v: v["pred_answer"] == v["answer"],
}
#: What their scoring reads of a document beside what ours does.
MORE: dict[str, dict[str, Any]] = {
    "perceptiontest_val_mc": {"question": "q"},
    "mlvu": {"question": "q"},
    "nextqa_mc_test": {f"a{i}": f"thing {i}" for i in range(5)},
    "mvbench": {"candidates": ["a cat", "a dog"], "answer": "a cat", "question": "q"},
}


def run_ours(folder: Path) -> int:
    """The verb on tasks whose questions are files in a folder, with pictures put into a video."""
    data = folder / "files"
    data.mkdir()
    for name, rows in (("VNBench-main-4try", "vnbench"), ("needles", "needles")):
        suffix = ".jsonl" if name == "needles" else ".json"
        text = (folder / f"{rows}.json").read_text()
        if suffix == ".jsonl":
            text = "".join(json.dumps(row) + "\n" for row in json.loads(text))
        (data / f"{name}{suffix}").write_text(text)
    for video in "ab":
        (data / f"{video}.mp4").write_bytes((folder / f"{video}.mp4").read_bytes())
    Image.new("RGB", (30, 20), "red").save(data / "needle.png")
    return longvila(
        [
            "eval",
            "--tasks=vnbench,needle",
            f"--data=vnbench={data}",
            f"--data=needle={data}",
            "--frames=3",
            f"--model={folder / 'model'}",
            f"--out={folder / 'ours'}",
        ]
    )


def interrupt(run: Path) -> None:
    """Leave what a process leaves that dies over its sixth answer."""
    for file in run.iterdir():
        if file.suffix in (".html", ".txt") or file.name in ("samples.jsonl", "results.json"):
            file.unlink()
    log = run / "answers" / "group-0.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:5]) + lines[5][:20])


def main() -> None:
    folder = Path(sys.argv[1])
    tasks = write_videomme(folder / "videomme")
    names = [
        *write_tasks(folder),
        "longvila_videomme_fixture",
        "longvila_videomme_w_subtitle_fixture",
    ]
    results = run_scripted(names, tasks, folder / "tasks")
    results["questions"] = len(videomme_rows(2, 4))
    results["status"] = [run_verb(folder, "one"), run_verb(folder, "two"), run_verb(folder, "one")]
    interrupt(folder / "two")
    results["status"] += [run_verb(folder, "two"), run_ours(folder)]
    results["theirs"] = theirs_agree()
    results["other settings"] = run_verb(folder, "one", "--seed=1")
    (folder / "results.json").write_text(json.dumps(results))
    run_command(folder, tasks, "log", "out")


if __name__ == "__main__":
    main()
