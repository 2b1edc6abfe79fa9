"""Whole conversions: to ours, back, what is refused, what is carried along."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures.upstream_case import PARTS, case_names, chat, index, write_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from longvila.errors import CheckpointError
from longvila.model.configuration_longvila import LongVILAConfig
from longvila.model.convert_vila import ORIGIN, convert_to_longvila, convert_to_vila
from longvila.model.modeling_longvila import LongVILAForConditionalGeneration, LongVILAModel
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.model.vila.plan import plan_conversion
from longvila.testing.tiny import tiny_model

CASES = [name for name in case_names() if name != "tsp_separators"]
SMALL = 60_000


def conversation(name: str) -> dict[str, Any]:
    return {"conversation": index()["cases"][name]["conversation"]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits(model: Any, processor: Any, folder: Path) -> torch.Tensor:
    inputs = processor.apply_chat_template(
        chat("video_image", folder), tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(name, tmp_path / "a")
    convert_to_longvila(source, tmp_path / "b", max_shard_bytes=SMALL, **conversation(name))
    assert (tmp_path / "b" / "model.safetensors.index.json").is_file()
    assert convert_to_vila(tmp_path / "b", tmp_path / "c", max_shard_bytes=SMALL) == []
    config = json.loads((source / "config.json").read_text())
    again = json.loads((tmp_path / "c" / "config.json").read_text())
    for part in PARTS:
        assert same(weights(source / part), weights(tmp_path / "c" / part))
        for file in (source / part).glob("*.json"):
            if file.name.startswith("model"):
                continue
            values = json.loads(file.read_text())
            if file.name == "config.json":
                values.pop("_name_or_path", None)
                assert again.pop(f"{part}_cfg") == values
                config.pop(f"{part}_cfg")
            assert json.loads((tmp_path / "c" / part / file.name).read_text()) == values
    for key in ("_name_or_path", "resume_path"):
        config.pop(key)
    assert again == config
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["even_row", "odd_fix_dynamic", "llama3_row"])
def test_converted_equals_loaded_directly(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(name, tmp_path / "a")
    convert_to_longvila(source, tmp_path / "b", **conversation(name))
    direct = LongVILAForConditionalGeneration.from_pretrained(source, **conversation(name))
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "b")
    assert type(ours) is LongVILAForConditionalGeneration
    assert same(dict(direct.state_dict()), dict(ours.state_dict()))
    assert direct.generation_config.to_dict() == ours.generation_config.to_dict()
    ignored = ("_name_or_path", "architectures", "transformers_version")
    a, b = (
        {k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (direct, ours)
    )
    assert a == b
    first = LongVILAProcessor.from_pretrained(source, **conversation(name))
    second = AutoProcessor.from_pretrained(tmp_path / "b")
    want = logits(direct, first, tmp_path / "media")
    assert torch.equal(logits(ours, second, tmp_path / "media"), want)


@pytest.mark.parametrize("name", ["even_row", "odd_fix_dynamic", "llama3_row", "qwen_column"])
def test_saved_by_transformers_and_back(tmp_path: Path, name: str) -> None:
    """Without the unused layers and without what was carried along, the result is the same."""
    options = conversation(name)
    source = write_checkpoint(name, tmp_path / "a")
    model = LongVILAForConditionalGeneration.from_pretrained(source, **options)
    processor = LongVILAProcessor.from_pretrained(source, **options)
    model.save_pretrained(tmp_path / "b")
    processor.save_pretrained(tmp_path / "b")
    assert all(name.startswith(("model.", "lm_head.")) for name in weights(tmp_path / "b"))
    notes = convert_to_vila(tmp_path / "b", tmp_path / "c")
    assert "written anew" in notes[0] and "written with 2 layers" in notes[1]
    again = LongVILAForConditionalGeneration.from_pretrained(tmp_path / "c", **options)
    assert again.config.vision_feature_layer == -1
    assert same(dict(model.state_dict()), dict(again.state_dict()))
    second = LongVILAProcessor.from_pretrained(tmp_path / "c", **options)
    want = logits(model, processor, tmp_path / "media")
    assert torch.equal(logits(again, second, tmp_path / "media"), want)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        (
            "even_row",
            "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3_row",
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_what_was_saved_since_goes_back_with_a_template_the_original_can_use(
    tmp_path: Path, name: str, before: str, after: str
) -> None:
    """There, placeholders are part of a message's text, and no variable is passed."""
    source = write_checkpoint(name, tmp_path / "a")
    if name == "even_row":
        file = source / "llm" / "tokenizer_config.json"
        own = json.loads(file.read_text())["chat_template"]
        edit(file, chat_template=own.replace("You are a helpful assistant.", "S."))
    LongVILAForConditionalGeneration.from_pretrained(source).save_pretrained(tmp_path / "b")
    processor = LongVILAProcessor.from_pretrained(source, **conversation(name))
    processor.save_pretrained(tmp_path / "b")
    convert_to_vila(tmp_path / "b", tmp_path / "c")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c" / "llm")
    message = {"role": "user", "content": "<image><vila/video>What?"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert text.endswith(f"{before}<image><vila/video>What?{after}")
    ours = LongVILAProcessor.from_pretrained(tmp_path / "c", conversation="auto")
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert ours.apply_chat_template(shown) == processor.apply_chat_template(shown)


def test_a_packed_repository_s_template_overrules_the_tokenizer_s(tmp_path: Path) -> None:
    """Only there: config classes of the others drop the setting."""
    text = (
        "{% if messages[0]['role'] != 'system' %}\n"
        "    {{ '<|im_start|>system\\nS<|im_end|>\\n' }}\n{% endif %}\n\n"
        "{% for m in messages if m['content'] is not none %}\n"
        "    {{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
    )
    for kind, system in (("vila", "S"), ("llava_llama", "You are a helpful assistant.")):
        source = write_checkpoint(
            "even_row", tmp_path / kind / "VILA1.5-3b", model_type=kind, chat_template="short"
        )
        (source / "short.jinja").write_text(text)
        options = {} if kind == "vila" else {"conversation": "auto"}
        processor = LongVILAProcessor.from_pretrained(source, **options)
        assert processor.system_prompt == system
        got = processor.apply_chat_template([{"role": "user", "content": "u"}])
        assert got == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"


def test_what_was_saved_since_goes_back_with_its_pixels(tmp_path: Path) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    edit(source / "vision_tower" / "preprocessor_config.json", image_mean=[0.4, 0.5, 0.6])
    LongVILAForConditionalGeneration.from_pretrained(source).save_pretrained(tmp_path / "b")
    LongVILAProcessor.from_pretrained(source).save_pretrained(tmp_path / "b")
    convert_to_vila(tmp_path / "b", tmp_path / "c")
    written = json.loads((tmp_path / "c" / "vision_tower" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.4, 0.5, 0.6]
    assert written["size"] == {"height": 56, "width": 56}


def test_every_form_of_weight_file(tmp_path: Path) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    want = LongVILAForConditionalGeneration.from_pretrained(source).state_dict()
    llm = load_file(source / "llm" / "model.safetensors")
    (source / "llm" / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(llm):
        weight_map[name] = f"model-{i % 3}.safetensors"
    for file in set(weight_map.values()):
        save_file({n: llm[n] for n in llm if weight_map[n] == file}, source / "llm" / file)
    index_file = source / "llm" / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    tower = load_file(source / "vision_tower" / "model.safetensors")
    (source / "vision_tower" / "model.safetensors").unlink()
    # As today's transformers names them, with a buffer that old versions stored.
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in tower.items()}
    bare["embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(bare, source / "vision_tower" / "pytorch_model.bin")
    got = LongVILAForConditionalGeneration.from_pretrained(source)
    assert same(dict(want), dict(got.state_dict()))
    plan = convert_to_longvila(source, tmp_path / "b")
    assert [m.source for m in plan.moves if m.fate == "recomputed"] == ["embeddings.position_ids"]
    assert same(
        dict(want),
        dict(LongVILAForConditionalGeneration.from_pretrained(tmp_path / "b").state_dict()),
    )


def test_rows_below_and_above_the_tokenizer_s_length_are_kept(tmp_path: Path) -> None:
    for name, rows in (("tsp_fewer_rows_pad", 303), ("odd_fix_dynamic", 384)):
        source = write_checkpoint(name, tmp_path / name)
        model = LongVILAForConditionalGeneration.from_pretrained(source)
        assert model.get_input_embeddings().weight.shape[0] == rows
        assert (
            model.config.text_config.vocab_size
            == rows
            != index()["cases"][name]["tokenizer_length"]
        )
    edit(source / "llm" / "config.json", vocab_size=999)
    plan = plan_conversion(source)
    assert plan.config.text_config.vocab_size == 384
    assert any("vocab_size 999" in note and "384" in note for note in plan.notes)


def test_leftovers_are_refused_by_name_or_dropped_when_told(tmp_path: Path) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    file = source / "mm_projector" / "model.safetensors"
    save_file({**load_file(file), "layers.9.weight": torch.zeros(2, 3)}, file)
    with pytest.raises(CheckpointError, match=r"mm_projector: layers\.9\.weight \[2, 3\].*--allow"):
        plan_conversion(source)
    with pytest.raises(CheckpointError, match="--allow-unused"):
        LongVILAForConditionalGeneration.from_pretrained(source)
    plan = convert_to_longvila(source, tmp_path / "b", allow_unused=True)
    assert [m.source for m in plan.moves if m.fate == "dropped"] == ["layers.9.weight"]
    assert not any("layers.9" in name for name in weights(tmp_path / "b") if "projector" in name)


@pytest.mark.parametrize(
    ("part", "name", "change", "message"),
    [
        ("llm", "model.norm.weight", None, r"1 tensors are missing: model\.language_model\.norm"),
        ("llm", "lm_head.weight", None, "missing: lm_head"),
        (
            "llm",
            "model.norm.weight",
            torch.zeros(7),
            r"model\.norm\.weight is \[7\], expected \[32\]",
        ),
        ("llm", "model.embed_tokens.weight", None, "is it a causal LM"),
        ("mm_projector", "layers.2.weight", torch.zeros(32, 24), r"expected \[32, 96\]"),
        ("vision_tower", "vision_model.embeddings.patch_embedding.bias", None, "missing"),
    ],
)
def test_incomplete_and_wrong_tensors_are_named(
    tmp_path: Path, part: str, name: str, change: torch.Tensor | None, message: str
) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    file = source / part / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change if change is not None else tensors[name]
    if change is None:
        del tensors[name]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(source, allow_unused=True)


def test_the_unused_layers_of_the_tower_may_be_absent(tmp_path: Path) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    file = source / "vision_tower" / "model.safetensors"
    tensors = load_file(file)
    unused = (".layers.2.", ".head.", ".post_layernorm.")
    save_file({k: v for k, v in tensors.items() if not any(u in k for u in unused)}, file)
    LongVILAForConditionalGeneration.from_pretrained(source)


def test_licences_and_the_card_come_along(tmp_path: Path) -> None:
    source = write_checkpoint("even_row", tmp_path / "qwen2-7b-longvila-1M")
    (source / "LICENSE").write_text("weights")
    (source / "README.md").write_text("license: cc-by-nc-sa-4.0")
    (source / "llm" / "LICENSE.qwen").write_text("qwen")
    convert_to_longvila(source, tmp_path / "b")
    assert (tmp_path / "b" / "LICENSE").read_text() == "weights"
    assert (tmp_path / "b" / "LICENSE.qwen").read_text() == "qwen"
    assert "cc-by-nc-sa" in (tmp_path / "b" / "README.md").read_text()
    notice = (tmp_path / "b" / "WEIGHTS_NOTICE.md").read_text()
    for word in ("CC-BY-NC-SA-4.0", "qwen2-7b-longvila-1M", "Qwen2", "siglip_vision_model"):
        assert word in notice
    convert_to_vila(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c" / "LICENSE").is_file() and (tmp_path / "c" / "LICENSE.qwen").is_file()


def test_no_path_of_another_machine_is_carried(tmp_path: Path) -> None:
    convert_to_longvila(write_checkpoint("even_row", tmp_path / "a"), tmp_path / "b")
    for file in (tmp_path / "b").rglob("*.json"):
        assert "/cluster" not in file.read_text(), file


def test_another_type_of_weights(tmp_path: Path) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    convert_to_longvila(source, tmp_path / "b", dtype=torch.bfloat16)
    model = LongVILAForConditionalGeneration.from_pretrained(tmp_path / "b")
    assert model.dtype is torch.bfloat16
    want = LongVILAForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    assert same(dict(model.state_dict()), dict(want.state_dict()))


def test_a_destination_in_use_is_left_alone_and_failures_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert_to_longvila(source, tmp_path / "b")
    assert os.listdir(tmp_path / "b") == ["mine"]
    import longvila.model.convert_vila as module

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "_carry_origin", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_to_longvila(source, tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_folder_that_exists_is_filled_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".partial").mkdir()  # of a run that was killed
    (tmp_path / "link").symlink_to(tmp_path / "b")
    before = (tmp_path / "b").stat().st_ino
    convert_to_longvila(source, tmp_path / "link")
    assert (tmp_path / "b").stat().st_ino == before and (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "b")
    assert {"config.json", "model.safetensors"} < set(os.listdir())
    assert not Path(".partial").exists()
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    convert_to_vila(tmp_path / "b", ".")
    assert set(os.listdir()) == {"config.json", *PARTS}


def test_what_cannot_go_back_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    with pytest.raises(CheckpointError, match="in the original's layout already"):
        convert_to_vila(source, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        convert_to_vila(tmp_path, tmp_path / "b")
    vision = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": 20, "patch_size": 4, "mlp_ratio": 2}
    model = tiny_model(vision_config=vision, vision_feature_select="patch")
    model.save_pretrained(tmp_path / "dino")
    with pytest.raises(CheckpointError, match="type 'dinov2'"):
        convert_to_vila(tmp_path / "dino", tmp_path / "b")


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    base = write_checkpoint("even_row", tmp_path / "base")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )
    key = "model.layers.1.self_attn.v_proj"
    a, b = torch.randn(2, 32), torch.randn(16, 2)
    prefix = f"base_model.model.llm.{key}"
    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
        lora / "adapter_model.safetensors",
    )
    bias = torch.randn(32)
    torch.save(
        {"base_model.model.mm_projector.layers.4.bias": bias}, lora / "non_lora_trainables.bin"
    )
    convert_to_longvila(lora, tmp_path / "out", base=base)
    got, old = weights(tmp_path / "out"), load_file(base / "llm" / "model.safetensors")
    name = "model.language_model.layers.1.self_attn.v_proj.weight"
    assert torch.allclose(got[name], old[f"{key}.weight"] + 2.0 * b @ a, rtol=0, atol=1e-6)
    assert torch.equal(got["model.multi_modal_projector.layers.4.bias"], bias)
    changed = {name, "model.multi_modal_projector.layers.4.bias"}
    convert_to_longvila(base, tmp_path / "plain")
    plain = weights(tmp_path / "plain")
    assert {k for k in plain if not torch.equal(plain[k], got[k])} == changed


def test_loading_options(tmp_path: Path) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    load = LongVILAForConditionalGeneration.from_pretrained
    model, info = load(
        source,
        dtype=torch.float64,
        attn_implementation="eager",
        output_loading_info=True,
        vision_batch_size=2,
        token_order="column",
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype is torch.float64 and not model.training
    assert model.config._attn_implementation == "eager"
    assert model.config.vision_batch_size == 2 and model.config.token_order == "column"
    assert model.config.name_or_path == str(source)
    assert load(source, device_map="cpu").dtype is torch.float32
    base = LongVILAModel.from_pretrained(source)
    assert torch.equal(
        base.language_model.embed_tokens.weight, load(source).get_input_embeddings().weight
    )
    with pytest.raises(CheckpointError, match="config= cannot be combined"):
        load(source, config=model.config)
    with pytest.raises(CheckpointError, match="is in the original's layout: take `config` of"):
        LongVILAConfig.from_pretrained(source)


def test_settings_of_the_processor(tmp_path: Path) -> None:
    source = write_checkpoint("tsp_fewer_rows_pad", tmp_path / "a")
    edit(source / "vision_tower" / "preprocessor_config.json", image_mean=[0.4, 0.5, 0.6])
    options = {"padding_side": "right", "use_fast": True, "trust_remote_code": True}
    processor = LongVILAProcessor.from_pretrained(source, num_frames=6, **options)
    assert processor.tokenizer.padding_side == "right"
    with pytest.raises(TypeError, match="num_framez"):
        LongVILAProcessor.from_pretrained(source, num_framez=6)
    assert processor.image_processor.image_mean == [0.4, 0.5, 0.6]
    assert processor.image_processor.image_aspect_ratio == "pad"
    assert processor.video_processor.num_frames == 6 and processor.pool_sizes == [[2, 1, 1]]
    assert processor.system_prompt == "You are a helpful assistant."
    plain = LongVILAProcessor.from_pretrained(write_checkpoint("llama3_row", tmp_path / "b"))
    assert plain.chat_template is None


def test_names_of_repositories_are_not_read_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedConfig

    found = {"model_type": "llava_llama", "llm_cfg": {}}
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda *_, **__: (found, {}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="hf download Some-Org/longvila --local-dir"):
        LongVILAForConditionalGeneration.from_pretrained("Some-Org/longvila")


def test_the_origin_can_be_thrown_away(tmp_path: Path) -> None:
    source = write_checkpoint("even_row", tmp_path / "a")
    convert_to_longvila(source, tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / ORIGIN)
    convert_to_vila(tmp_path / "b", tmp_path / "c")
    for part in PARTS:
        assert same(weights(source / part), weights(tmp_path / "c" / part))
    again = LongVILAForConditionalGeneration.from_pretrained(tmp_path / "c")
    want = LongVILAForConditionalGeneration.from_pretrained(source)
    assert same(dict(want.state_dict()), dict(again.state_dict()))
