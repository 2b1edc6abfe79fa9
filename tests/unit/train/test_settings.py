"""Settings: round trips, typed overrides, and messages that name what was meant."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from longvila.train.settings import (
    SettingsError,
    from_plain,
    leaves,
    overlay,
    override,
    paths,
    read_yaml,
    to_plain,
    to_yaml,
)
from longvila.train.stages import STAGES, Adapter, Stage, get_stage


@pytest.mark.parametrize("name", list(STAGES))
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    stage = get_stage(name)
    file = tmp_path / "stage.yaml"
    file.write_text(to_yaml(stage))
    assert from_plain(Stage, read_yaml(file)) == stage
    # Laid over any other stage, a complete file wins.
    assert overlay(get_stage("sft"), read_yaml(file)) == stage


def test_a_file_may_say_less() -> None:
    stage = overlay(
        get_stage("align"), {"data": {"max_tokens": 512}, "rates": {"projector": "2e-3"}}
    )
    assert (stage.data.max_tokens, stage.rates.projector) == (512, 2e-3)
    assert stage.data.samples_per_step == 2048 and stage.optimizer == get_stage("align").optimizer


@pytest.mark.parametrize(
    ("assignment", "path", "expected"),
    [
        ("rates.projector=1e-4", ("rates", "projector"), 1e-4),
        ("max_tokens=2048", ("data", "max_tokens"), 2048),
        ("seq_parallel_size=4", ("parallel", "seq_parallel_size"), 4),
        ("clip_norm=1", ("optimizer", "clip_norm"), 1.0),
        ("vision_tower=null", ("rates", "vision_tower"), None),
        ("betas=[0.9, 0.95]", ("optimizer", "betas"), (0.9, 0.95)),
        ("vila=true", ("saving", "vila"), True),
        ("mixture=a+b*2", ("data", "mixture"), "a+b*2"),
        ("compute=float32", ("parallel", "compute"), "float32"),
    ],
)
def test_overrides_have_the_type_of_their_field(
    assignment: str, path: tuple[str, str], expected: object
) -> None:
    stage = override(get_stage("sft"), [assignment])
    value = getattr(getattr(stage, path[0]), path[1])
    assert value == expected and type(value) is type(expected)


def test_overrides_can_make_and_unmake_a_part() -> None:
    stage = override(get_stage("sft"), ["adapter.rank=4"])
    assert stage.adapter == Adapter(rank=4)
    assert override(stage, ["adapter=null"]).adapter is None
    both = override(get_stage("sft"), ["data={samples_per_step: null, rows_per_step: 3}"])
    assert both.data.rows_per_step == 3 and both.data.max_tokens == 4096


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data.max_token=3", r"no setting data.max_token; did you mean data.max_tokens"),
        ("max_tokns=3", r"no setting max_tokns; did you mean .*data.max_tokens"),
        ("seed=3.5", r"seed must be a whole number, got 3.5"),
        ("data.max_tokens=many", r"data.max_tokens must be a whole number, got 'many'"),
        ("rates.projector=fast", r"rates.projector must be a number, got 'fast'"),
        ("vila=1", r"saving.vila must be true or false, got 1"),
        ("schedule=cosin", r"must be one of .*'cosine'.* did you mean cosine"),
        ("betas=0.9", r"optimizer.betas must be a list"),
        ("rates=3", r"rates must be a mapping"),
        ("max_tokens", r"takes key=value"),
        ("max_tokens=[", r"no YAML"),
        ("samples_per_step=null", r"either samples_per_step or rows_per_step"),
        ("adapter.rnk=3", r"no setting adapter.rnk; did you mean adapter.rank"),
        ("clip_norm=-1", r"clip_norm must be above zero"),
        ("adapter={yes: 3}", r"there is no setting adapter.True"),
    ],
)
def test_messages(assignment: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        override(get_stage("sft"), [assignment])


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Outer:
    left: Inner = field(default_factory=Inner)
    right: Inner = field(default_factory=Inner)


def test_an_ambiguous_name_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"several settings: left.size, right.size"):
        override(Outer(), ["size=2"])
    assert override(Outer(), ["right.size=2"]) == Outer(right=Inner(2))
    # A whole path always wins over a last name.
    assert {"seed", "data.seed"} <= set(paths(Stage))
    values = leaves(get_stage("sft"))
    assert values["data.max_tokens"] == get_stage("sft").data.max_tokens
    assert set(values) < set(paths(Stage)) and "data" not in values
    assert override(get_stage("sft"), ["seed=3"]).data.seed == 0


def test_assignments_that_only_together_make_sense() -> None:
    stage = get_stage("sft")
    for given in (
        ["samples_per_step=null", "rows_per_step=2"], ["rows_per_step=2", "samples_per_step=null"],
        ["samples_per_step=null", "seed=3", "rows_per_step=2"],
    ):  # fmt: skip
        data = override(stage, given).data
        assert (data.samples_per_step, data.rows_per_step) == (None, 2)
    with pytest.raises(SettingsError, match=r"^--set samples_per_step=null: data: give either"):
        override(stage, ["samples_per_step=null", "data.seed=3"])
    dropped = override(get_stage("extend-64k"), ["adapter.rank=4", "adapter=null"])
    assert dropped.adapter is None
    fresh = override(get_stage("extend-64k"), ["adapter.alpha=4", "adapter=null", "adapter.rank=2"])
    assert fresh.adapter is not None and (fresh.adapter.rank, fresh.adapter.alpha) == (2, 16)


def test_unknown_keys_of_a_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("data: {max_lenght: 3}\n")
    with pytest.raises(SettingsError, match=r"x.yaml: there is no setting data.max_lenght"):
        overlay(get_stage("sft"), read_yaml(file), where=str(file))
    file.write_text("- 1\n")
    with pytest.raises(SettingsError, match="must hold a mapping"):
        read_yaml(file)
    file.write_text("a: [")
    with pytest.raises(SettingsError, match="no YAML"):
        read_yaml(file)
    file.write_bytes(b"a: \xff")
    with pytest.raises(SettingsError, match="no YAML"):
        read_yaml(file)
    file.write_text("")
    assert read_yaml(file) == {}
    with pytest.raises(
        SettingsError, match=r"^--set adapter=\{rank: x\}: adapter.rank must be a w"
    ):
        override(get_stage("sft"), ["adapter={rank: x}"])
    with pytest.raises(SettingsError, match="missing"):
        from_plain(Stage, {"name": "x"})
    with pytest.raises(SettingsError, match="there is no setting nam; did you mean name"):
        from_plain(Stage, {"nam": "x"})


def test_plain_values_are_what_yaml_can_hold() -> None:
    for stage in STAGES.values():
        assert yaml.safe_load(yaml.safe_dump(to_plain(stage))) == to_plain(stage)
