"""Train and measure the small model through the five stages, in parts that go on by themselves.

    python recipes/smol/run.py --prepared PREPARED --work WORK
    python recipes/smol/run.py --prepared PREPARED --work WORK --parts base draw-images align

1. **base** assembles the untrained model; **draw-...** draws a stage's data (``draw.py``).
2. **align, pretrain, sft, long, longer, longest, again, final, further, furthest** each run
   ``longvila train`` with the settings in ``stages/``, on the model of the part before
   (``WORK/stages/PART``), all in this process: what is imported, and the fork server of the
   workers, serve them all. **extend**, stage 4, is run where it is named, with ``--pages``; it goes
   on from **sft**, and stage 5 does not go on from it.
   Updates are low-rank; the delta of ``--deltas`` (``WORK/deltas/PART.safetensors``: what changed
   altogether, from the base on, in eight bits) has at most the ranks of ``RANKS``, and says what
   share of a matrix's change that left out. Where a part has a delta, base plus delta is what is
   measured, and what another machine goes on from.
3. **eval-sft, eval-furthest** (and **eval-PART** of any other part) run ``longvila needle`` for the
   tiers a, b and c.
4. **ablations** are half the steps of stages 4 and 5 up to 2,048 frames: in order, without stage 4,
   and stage 5 before stage 4.

With ``--ahead`` another process draws the sets of these parts, in the order in which they are
needed, while the GPU trains. A part whose result is there is skipped, one that was interrupted goes
on. On another machine, ``--parts`` with a delta in ``WORK/deltas`` goes on where it ends. With two
GPUs give ``--gpus 2``: a step is one row, which both share; in the parts of the third pass, two
rows, one each.

Not done here: fetching anything (``prepare.py``), shipping (``ship.py``).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INIT = {
    "llm": "smollm2-135m",
    "vision": "dinov2-small",
    "projector": "mlp_downsample_4x4",
    "image_size": 224,
    "vision_feature_layer": -3,
}
#: Most ranks of the shipped update of each matrix of the language model and of the tower. In eight
#: bits 31 and 4 MB, and the whole projector 4 MB. Up to the second pass of stage 5 no more was
#: needed: its parts went on from a delta of rank 40 after stage 3, with five times 12. After the
#: third pass the weakest 22 of a matrix's ranks are left out.
RANKS = {"model.language_model.": 102, "model.vision_tower.": 64}
LENGTHS = (32, 256, 1024, 2048, 6000)


@dataclass(frozen=True)
class Part:
    """A training part.

    Attributes:
        name: What users call it, and its folder.
        stage: Stage of ``longvila train``.
        config: Settings laid over it.
        after: The part it goes on from.
        sets: Data that ``draw.py`` draws for it.
        options: Further settings.
        half: Whether half of the steps are run.
        apart: Whether each of several GPUs has rows of its own.
    """

    name: str
    stage: str
    config: str
    after: str
    sets: tuple[str, ...]
    options: tuple[str, ...] = ()
    half: bool = False
    apart: bool = False


#: For what goes on from a part that has the context already.
_CONTEXT_IS_THERE = ("context=null",)
_TEXT = ("images", "short", "log", "text")
_LONG = ("images", "short", "long")
TRAINING = (
    Part("align", "align", "align", "base", ("images",)),
    Part("pretrain", "pretrain", "pretrain", "align", ("images",)),
    Part("sft", "sft", "sft", "pretrain", ("images", "short")),
    Part("extend", "extend-64k", "extend", "sft", _TEXT),
    Part("long", "long-sft-2048", "long", "sft", _LONG),
    Part("longer", "long-sft-2048", "longer", "long", (*_LONG, "longest")),
    Part("longest", "long-sft-2048", "longest", "longer", (*_LONG, "longest")),
    Part("again", "long-sft-2048", "again", "longest", _LONG),
    Part("final", "long-sft-2048", "final", "again", (*_LONG, "longest")),
    Part("further", "long-sft-2048", "further", "final", _LONG, apart=True),
    Part("furthest", "long-sft-2048", "furthest", "further", (*_LONG, "longest"), apart=True),
    # Half the steps: the order of the paper, without stage 4, and stage 4 last.
    Part("half-extend", "extend-64k", "extend", "sft", _TEXT, half=True),
    Part("half-long", "long-sft-2048", "long", "half-extend", _LONG, _CONTEXT_IS_THERE, half=True),
    Part("direct-long", "long-sft-2048", "long", "sft", _LONG, half=True),
    Part(
        "last-extend", "extend-64k", "extend", "direct-long", _TEXT, _CONTEXT_IS_THERE, half=True,
    ),
)  # fmt: skip
MAIN = (
    "base", "draw-images", "align", "pretrain", "draw-short", "sft", "draw-needles", "eval-sft",
    "draw-long", "long", "draw-longest", "longer", "longest", "again", "final", "further",
    "furthest", "eval-furthest",
)  # fmt: skip
ABLATIONS = (
    *(part.name for part in TRAINING if part.half),
    *(f"eval-{part.name}" for part in TRAINING if part.half),
)


class Runner:
    """Runs parts in a folder.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work
        self.data, self.deltas = self.work / "data", self.work / "deltas"
        self.training = {part.name: part for part in TRAINING}
        self.ahead: subprocess.Popen[bytes] | None = None

    def run(self, name: str) -> None:
        """Run one part, unless its result is there."""
        began = time.time()
        if name == "base":
            self.base()
        elif name.startswith("draw-"):
            self.draw(name.removeprefix("draw-"))
        elif name.startswith("eval-"):
            self.evaluate(name.removeprefix("eval-"))
        elif name in self.training:
            self.train(self.training[name])
        else:
            there = ("base", "draw-SET", *self.training, "eval-PART", "ablations")
            raise SystemExit(f"there is no part {name}; there are {', '.join(there)}")
        print(f"== {name}: {time.time() - began:.0f} s", flush=True)

    def longvila(self, *arguments: str, here: bool = False) -> None:
        """Run a verb, in a process of its own or here."""
        if here:
            import torch

            from longvila.cli.main import main as command_line

            status = command_line(list(arguments))
            if status:
                raise SystemExit(status)
            # Sharded models refer to themselves; the next part wants their memory.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return
        command = [sys.executable, "-m", "longvila", *arguments]
        subprocess.run(command, check=True)

    # ---- models

    def base(self) -> None:
        """Assemble the untrained model; videos give every frame once."""
        out = self.work / "base"
        if (out / "config.json").exists():
            return
        self.longvila(
            "init", str(out), "--llm", self.args.llm, "--vision", self.args.vision,
            "--projector", INIT["projector"], "--image-size", str(self.args.image_size),
            "--vision-feature-layer", str(INIT["vision_feature_layer"]), "--timestamps", "--force",
        )  # fmt: skip
        processor = json.loads((out / "processor_config.json").read_text())
        processor["video_processor"]["short"] = "all"
        (out / "processor_config.json").write_text(json.dumps(processor, indent=2))
        config = json.loads((out / "config.json").read_text())
        # Frames that go through the tower at once; the small tower wants many.
        config["vision_batch_size"] = 1024
        (out / "config.json").write_text(json.dumps(config, indent=2))

    def trained(self, name: str) -> Path:
        """Return what the next part goes on from: the trained model itself, where it is here."""
        folder = self.work / "stages" / name
        return folder if (folder / "config.json").exists() else self.model(name)

    def measured(self, name: str) -> Path:
        """Return what is measured: what is shipped, where a part has a delta."""
        delta = self.deltas / f"{name}.safetensors"
        return self.model(name) if delta.exists() else self.trained(name)

    def model(self, name: str) -> Path:
        """Return the base, or base plus a part's delta."""
        out = self.work / "models" / name
        if name == "base":
            return self.work / "base"
        if (out / "config.json").exists():
            return out
        delta = self.deltas / f"{name}.safetensors"
        if not delta.exists():
            raise SystemExit(f"{name} has not run: there is no {delta}")
        from longvila import LongVILAForConditionalGeneration, LongVILAProcessor
        from longvila.model.delta import apply_delta

        model = LongVILAForConditionalGeneration.from_pretrained(self.work / "base")
        apply_delta(model, delta)
        processor = LongVILAProcessor.from_pretrained(self.work / "base")
        processor.tokenizer.model_max_length = model.config.context_length
        partial = out.with_name(f".{name}")
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        partial.replace(out)
        return out

    # ---- training

    def train(self, part: Part) -> None:
        """Train a part; write what it changed, from the base on, if that is asked for."""
        delta = self.deltas / f"{part.name}.safetensors"
        out = self.work / "stages" / part.name
        if delta.exists():
            return
        if not (out / "config.json").exists():
            self.train_here(part, out)
        if part.name in self.args.deltas:
            self.write_delta(out, delta)

    def train_here(self, part: Part, out: Path) -> None:
        """Train a part into a folder."""
        for name in part.sets:
            self.draw(name)
        settings = list(part.options)
        if part.half:
            import yaml

            config = yaml.safe_load((HERE / "stages" / f"{part.config}.yaml").read_text())
            settings.append(f"optimizer.max_steps={config['optimizer']['max_steps'] // 2}")
        steps = dict(each.split("=") for each in self.args.steps)
        if part.name in steps:
            settings.append(f"optimizer.max_steps={int(steps[part.name])}")
        if self.args.gpus and not part.apart:
            share = 147456 // self.args.gpus
            settings += ["parallel.seq_parallel_size=0", f"parallel.tokens_per_rank={share}"]
        settings += self.args.set
        launch = ["--gpus", str(self.args.gpus)] if self.args.gpus else []
        self.longvila(
            "train", part.stage, "--model", str(self.trained(part.after)), "--data",
            str(self.datasets()), "--config", str(HERE / "stages" / f"{part.config}.yaml"),
            "--output", str(out), *launch, *(x for s in settings for x in ("--set", s)),
            here=self.args.gpus is None,
        )  # fmt: skip
        results = self.work / "results"
        results.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / "metrics.jsonl", results / f"{part.name}.metrics.jsonl")
        # Optimizer states are large, and whoever goes on starts from the model.
        shutil.rmtree(out / "saves", ignore_errors=True)

    def datasets(self) -> Path:
        """Write the file of datasets: those that are drawn."""
        known = {
            "align": {"adapter": "llava", "path": "align.jsonl", "media_dir": ".",
                      "options": {"placing": "in_place"}},
            "pretrain": {"adapter": "llava", "path": "pretrain.jsonl", "media_dir": ".",
                         "options": {"placing": "in_place"}},
            **{
                name: {"adapter": "llava", "path": f"{name}.jsonl", "media_dir": "."}
                for name in ("short", "long", "longest", "log", "text")
            },
            "rows": {"adapter": "tokens", "path": "rows"},
        }  # fmt: skip
        there = {name: each for name, each in known.items() if (self.data / each["path"]).exists()}
        out = self.data / "sets.json"
        # Another part may be reading it.
        partial = self.data / f".sets.{os.getpid()}"
        partial.write_text(json.dumps({"datasets": there}, indent=1))
        os.replace(partial, out)
        return out

    def write_delta(self, trained: Path, path: Path) -> None:
        """Write what differs between the base and a trained folder."""
        import torch
        from safetensors.torch import load_file

        from longvila.model.delta import difference, save_delta

        def rank(name: str) -> int | None:
            if "embed" in name:
                return None
            return next((r for prefix, r in RANKS.items() if name.startswith(prefix)), None)

        device = "cuda" if torch.cuda.is_available() else "cpu"
        base, after = (
            load_file(folder / "model.safetensors", device=device)
            for folder in (self.work / "base", trained)
        )
        delta, left_out = difference(base, after, rank=rank)
        config = json.loads((trained / "config.json").read_text())["text_config"]
        rope = config["rope_parameters"]
        context = {
            "rope_theta": rope["rope_theta"],
            "max_position_embeddings": config["max_position_embeddings"],
        }
        if rope.get("rope_type", "default") != "default":
            context["rope_parameters"] = rope
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        save_delta(
            {name: value.cpu() for name, value in delta.items()}, partial, init=INIT,
            dtype=torch.int8, context=json.dumps(context), left_out=f"{left_out:.4f}",
        )  # fmt: skip
        os.replace(partial, path)
        size = path.stat().st_size / 1e6
        print(f"delta: {size:.1f} MB, at most {left_out:.1%} of a matrix's change left out")

    # ---- data

    def draw_ahead(self) -> None:
        """Begin to draw the sets of these parts in another process."""
        sets = self.sets(self.args.parts)
        command = [sys.executable, str(HERE / "run.py"), *sys.argv[1:]]
        command[command.index("--ahead")] = "--drawing"
        # The last one of an option counts.
        self.ahead = subprocess.Popen([*command, "--parts", *(f"draw-{name}" for name in sets)])

    def sets(self, parts: Sequence[str]) -> list[str]:
        """Return which sets parts need, in the order in which they are drawn."""
        needed = {name.removeprefix("draw-") for name in parts}
        if any(name.startswith("eval-") for name in parts):
            needed.add("needles")
        for name in parts:
            needed.update(self.training[name].sets if name in self.training else ())
        order = ("images", "short", "log", "needles", "text", "long", "longest")
        return [name for name in order if name in needed]

    def is_drawn(self, name: str) -> bool:
        """Return whether a set is there, whole."""
        if name == "text" and self.args.pages and not (self.data / "rows").exists():
            return False
        last = {"images": "align.jsonl", "needles": "haystack.mp4"}.get(name, f"{name}.jsonl")
        return (self.data / last).exists()

    def draw(self, name: str) -> None:
        """Draw a set, or wait for who draws it; text is packed into rows, too."""
        while not self.is_drawn(name) and (
            self.args.wait or (self.ahead is not None and self.ahead.poll() is None)
        ):
            time.sleep(0.5)
        if self.is_drawn(name):
            return
        from draw import draw

        draw(
            self.args.prepared, self.data, [name], share=self.args.share,
            processes=self.args.processes, limit=self.args.limit, pages=self.args.pages,
            needles=self.args.needles, haystack=max(self.args.lengths), seed=self.args.seed,
        )  # fmt: skip
        if name == "text" and self.args.pages and not (self.data / "rows").exists():
            while self.args.drawing and not (self.work / "base" / "config.json").exists():
                time.sleep(0.5)
            partial = self.data / "rows-begun"
            self.longvila(
                "data", "pack-text", str(self.args.pages), "--output", str(partial),
                "--tokenizer", str(self.work / "base"), "--length", self.args.row_tokens,
                "--processes", str(self.args.processes), "--format", "jsonl",
            )  # fmt: skip
            partial.replace(self.data / "rows")

    # ---- needles

    def evaluate(self, name: str) -> None:
        """Hide needles of each tier; each tier has a folder with records and result."""
        self.draw("needles")
        model = self.measured(name)
        for tier in self.args.tiers:
            out = self.work / "needle" / f"{name}-{tier}"
            if (out / "result.json").exists():
                continue
            command = [
                "needle", "--model", str(model), "--haystack", str(self.data / "haystack.mp4"),
                "--needles", str(self.data / "needles" / tier), "--out", str(out),
                "--lengths", *map(str, self.args.lengths), "--protocol", "strict",
                "--depth-interval", str(self.args.depth_interval if tier == "a" else 0.5),
                "--tasks", *self.args.tasks, "--trials", str(self.args.trials),
                "--ways", str(min(20, self.args.needles)), "--beyond-context",
                "--control" if self.args.controls else "--no-control",
            ]  # fmt: skip
            self.longvila(*command)
            self.keep(out / "result.json", name, tier)

    def keep(self, path: Path, name: str, tier: str) -> None:
        """Copy a result to where results of all parts stand, under its part's name."""
        import torch
        import transformers

        result: dict[str, Any] = json.loads(path.read_text())
        on_gpu = torch.cuda.is_available()
        result["date"] = date.today().isoformat()
        result["commit"] = self.args.commit
        result["hardware"] = {
            "gpu": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
            "count": 1, "link": None,
        }  # fmt: skip
        result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        for row in result["rows"]:
            row["method"] = f"smol-stages {name}"
        folder = self.work / "results"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{result['date']}_needle_smol_{name}_{tier}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepared", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything made")
    parser.add_argument("--parts", nargs="+", default=list(MAIN))
    parser.add_argument("--pages", type=Path, help="folder of texts for stage 4")
    parser.add_argument("--llm", default=INIT["llm"])
    parser.add_argument("--vision", default=INIT["vision"])
    parser.add_argument("--image-size", type=int, default=INIT["image_size"])
    parser.add_argument("--share", type=float, default=1.0, help="share of the data")
    parser.add_argument("--limit", type=int, help="pictures of each split, to try things out")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpus", type=int, help="GPUs; one process alone if not given")
    parser.add_argument("--row-tokens", default="32k", help="tokens of a row of documentation")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--depth-interval", type=float, default=0.2)
    parser.add_argument("--tiers", nargs="+", default=["a", "b", "c"])
    parser.add_argument("--tasks", nargs="+", default=["retrieval", "grounding"])
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--needles", type=int, default=40, help="pictures of each tier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ahead", action="store_true", help="draw in another process meanwhile")
    parser.add_argument(
        "--wait", action="store_true", help="sets are drawn by a process begun with --drawing"
    )
    parser.add_argument(
        "--drawing", action="store_true", help="draws for another process, which trains"
    )
    parser.add_argument(
        "--steps", nargs="+", default=[], metavar="PART=N", help="steps instead of a stage's own"
    )
    parser.add_argument(
        "--deltas", nargs="*", default=["furthest"], metavar="PART",
        help="parts whose change is written, for shipping or for another machine",
    )  # fmt: skip
    parser.add_argument("--no-controls", dest="controls", action="store_false")
    parser.add_argument("--commit", default="", help="what results say they were made with")
    parser.add_argument("--set", action="append", default=[], help="a setting of all stages")
    args = parser.parse_args(argv)
    args.parts = [
        part for name in args.parts for part in (ABLATIONS if name == "ablations" else (name,))
    ]
    return args


def main() -> None:
    args = arguments()
    runner = Runner(args)
    if args.drawing:
        # Whoever trains goes first.
        os.nice(10)
    if args.ahead:
        # Rows of text need the base's tokenizer.
        runner.run("base")
        runner.draw_ahead()
    for name in args.parts:
        runner.run(name)


if __name__ == "__main__":
    main()
