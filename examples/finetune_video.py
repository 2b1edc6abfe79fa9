"""Fine-tune a video language model on questions about your own clips, with Hugging Face's Trainer.

    python examples/finetune_video.py --model MODEL --data clips.jsonl --output_dir out \
        --max_tokens 65536 --num_frames 256 --bf16 --num_train_epochs 1
    torchrun --nproc-per-node 8 examples/finetune_video.py ... --seq_parallel_size 8

Each line of the data names a clip and what is said about it:

    {"video": "a.mp4", "question": "What happens?", "answer": "A dog runs.", "start_s": 3.0}

Paths are taken from where the file is; `start_s` and `end_s` may be left out. Every argument of
`transformers.TrainingArguments` is one here, beside the mesh's: `--help` lists them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from longvila.data.collate import Collator
from longvila.data.encode import Encoder
from longvila.data.sample import Media, Sample, Turn
from longvila.train.arguments import LongVILATrainingArguments
from longvila.train.trainer import LongVILATrainer


@dataclass
class Task:
    """What is trained on what."""

    model: str = field(metadata={"help": "Folder or hub name of the model."})
    data: str = field(metadata={"help": "JSON lines with video, question and answer."})
    held_out: int = field(default=0, metadata={"help": "Lines at the end kept for evaluation."})
    max_tokens: int = field(default=32768, metadata={"help": "Most tokens of a sample."})
    num_frames: int = field(default=64, metadata={"help": "Frames of a clip."})


def read(path: Path) -> list[Sample]:
    """Read the clips and what is said about them."""
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        clip = Media("video", str(path.parent / row["video"]), row.get("start_s"), row.get("end_s"))
        turns = (Turn("user", (clip, row["question"])), Turn("assistant", (row["answer"],)))
        samples.append(Sample(str(number), path.stem, turns))
    return samples


def main() -> None:
    task, args = HfArgumentParser((Task, LongVILATrainingArguments)).parse_args_into_dataclasses()
    processor = AutoProcessor.from_pretrained(task.model)
    encoder = Encoder(processor, task.max_tokens, num_frames=task.num_frames)
    samples = read(Path(task.data))
    kept = len(samples) - task.held_out
    trainer = LongVILATrainer(
        AutoModelForImageTextToText.from_pretrained(task.model, dtype="float32"),
        args,
        data_collator=Collator(processor, encoder),
        train_dataset=samples[:kept],
        eval_dataset=samples[kept:] or None,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if task.held_out:
        print(trainer.evaluate())
    trainer.export_model(Path(args.output_dir) / "model")


if __name__ == "__main__":
    main()
