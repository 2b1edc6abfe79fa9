"""The model's own behaviour: the seam, gradients, losses, checkpointing, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longvila.model.fusion import pack_features
from longvila.model.modeling_longvila import LongVILAModel
from longvila.testing.asserts import assert_close
from longvila.testing.tiny import tiny_inputs, tiny_labels, tiny_model, tiny_tokenizer

NEWLINE = tiny_tokenizer().convert_tokens_to_ids("Ċ")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def enable_checkpointing(model: Any) -> None:
    # Renamed in newer versions of transformers, where the old name warns.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


# ---- the seam


def test_forward_is_encode_fuse_and_language_model() -> None:
    model = tiny_model()
    batch = tiny_inputs(model.config, videos=(3, 2), images=2)
    core = model.model
    videos = model.encode_media(batch["pixel_values_videos"], [3, 2])
    images = model.encode_media(batch["pixel_values"], kind="image")
    assert (videos.counts, images.counts) == ([27, 18], [9, 9])
    embeds = model.fuse(
        batch["input_ids"], core.embed_tokens(batch["input_ids"]), images.rows, videos.rows
    )
    hidden = core.language_model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"]
    ).last_hidden_state
    assert torch.equal(model(**batch).logits, model.lm_head(hidden))


@pytest.mark.parametrize("size", [1, 2, 3, 5, None])
def test_micro_batches_change_nothing(size: int | None) -> None:
    model = tiny_model()
    pixels = torch.randn(5, 3, 20, 20)
    model.config.vision_batch_size = None
    expected = model.encode_media(pixels).rows
    model.config.vision_batch_size = size
    assert_close(model.encode_media(pixels).rows, expected, name="rows")


def test_feature_methods_give_one_entry_an_item() -> None:
    model = tiny_model()
    pixels = torch.randn(5, 3, 20, 20)
    video = model.get_video_features(pixels, torch.tensor([3, 2]))
    assert [tuple(v.shape) for v in video.pooler_output] == [(27, 32), (18, 32)]
    image = model.get_image_features(pixels, torch.tensor([1, 4]))
    assert [tuple(v.shape) for v in image.pooler_output] == [(9, 32), (36, 32)]
    assert len(model.get_image_features(pixels).pooler_output) == 5
    assert torch.equal(pack_features(video.pooler_output), model.encode_media(pixels).rows)


def test_placeholders_are_never_looked_up() -> None:
    """The table has fewer rows than the ids of the placeholders."""
    model = tiny_model()
    assert model.config.video_token_id >= model.get_input_embeddings().num_embeddings
    batch = tiny_inputs(model.config)
    model(**batch, labels=tiny_labels(model.config, batch)).loss.backward()
    seen = set(batch["input_ids"].flatten().tolist())
    grad = model.get_input_embeddings().weight.grad
    assert grad is not None
    touched = set(grad.abs().sum(1).nonzero().flatten().tolist())
    assert touched <= seen  # in particular not the row that stood in for a placeholder


def test_padding_beyond_the_table_is_not_looked_up() -> None:
    model = tiny_model(text_config={"pad_token_id": None})
    batch = tiny_inputs(model.config)
    padded = dict(batch)
    for name, value in (("input_ids", 10**6), ("attention_mask", 0)):
        rest = torch.full((1, 5), value)
        padded[name] = torch.cat([batch[name], rest], dim=1)
    assert_close(model(**padded).logits[:, :-5], model(**batch).logits, name="logits")


class InBytes(nn.Module):
    """A linear layer as quantisers leave it: the matrix in bytes beside a bias."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = float(layer.weight.detach().abs().max()) / 127
        levels = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(levels, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp_downsample"])
def test_a_quantised_projector_computes_in_the_precision_of_what_is_left(kind: str) -> None:
    model = tiny_model(projector_type=kind)
    pixels = torch.randn(2, 3, 20, 20)
    expected = model.encode_media(pixels).rows
    projector = model.model.multi_modal_projector
    for name, layer in list(projector.named_modules()):
        if isinstance(layer, nn.Linear):
            projector.set_submodule(name, InBytes(layer))
    assert_close(model.encode_media(pixels).rows, expected, name="rows", tolerance=0.03)


def test_newline_after_a_frame_is_trained() -> None:
    """Its gradient reaches the embedding table from the frames' separators alone."""
    model = tiny_model()
    batch = tiny_inputs(model.config, question="x")
    ids = batch["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[0, -1] = 5
    embeds, _ = model.model.fused_embeds(ids, pixel_values_videos=batch["pixel_values_videos"])
    embeds = embeds.detach().requires_grad_()
    model(inputs_embeds=embeds, labels=labels).loss.backward()
    newlines = (ids[0] == NEWLINE).nonzero().flatten()
    expected = embeds.grad[0, newlines].sum(0)
    after_frames = [i for i in newlines if ids[0, i - 1] == model.config.video_token_id]
    assert len(after_frames) == 3 and all(embeds.grad[0, i].abs().sum() > 0 for i in after_frames)
    model(**batch, labels=labels).loss.backward()
    assert_close(model.get_input_embeddings().weight.grad[NEWLINE], expected, name="newline")


def test_pooled_videos_run_end_to_end() -> None:
    model = tiny_model(pool_sizes=[[2, 1, 1], [4, 3, 3]])
    batch = tiny_inputs(model.config, videos=(5, 2))
    media = model.encode_media(batch["pixel_values_videos"], batch["video_num_frames"])
    assert media.counts == [3 * 9 + 2, 9 + 1]
    assert model(**batch).video_hidden_states.shape == (39, 32)
    plain = tiny_model()
    frames = plain.encode_media(batch["pixel_values_videos"]).rows.view(7, 9, 32)
    assert_close(media.rows[:9], frames[:2].mean(0), name="first block")
    assert_close(media.rows[18:27], frames[4], name="ragged block")


# ---- gradients and losses


@pytest.mark.parametrize("frozen", ["nothing", "tower", "tower and projector"])
def test_gradient_checkpointing_changes_nothing(frozen: str) -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if "tower" in frozen:
            model.model.vision_tower.requires_grad_(False)
        if "projector" in frozen:
            model.model.multi_modal_projector.requires_grad_(False)
        if checkpointing:
            enable_checkpointing(model)
            assert model.model.gradient_checkpointing
        batch = tiny_inputs(model.config, videos=(6, 3), images=1)
        loss = model(**batch, labels=tiny_labels(model.config, batch)).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, expected in results[0][1].items():
        assert_close(results[1][1][name], expected, name=name)


def test_checkpointing_keeps_pixels_and_rows_only() -> None:
    """What autograd stores for the tower does not grow with its depth times the frames."""

    def stored(checkpointing: bool, frames: int) -> int:
        model = tiny_model(vision_batch_size=1).train()
        if checkpointing:
            enable_checkpointing(model)
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel() if not isinstance(x, nn.Parameter) else 0
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.encode_media(torch.randn(frames, 3, 20, 20))
        return total

    plain, recomputed = stored(False, 4), stored(True, 4)
    assert recomputed <= 4 * 3 * 20 * 20
    assert plain > 10 * recomputed


def test_placeholders_are_no_targets() -> None:
    model = tiny_model(seed=1)
    batch = tiny_inputs(model.config)
    with pytest.raises(ValueError, match=r"labels ask for \d+ ids .* set labels to -100 there"):
        model(**batch, labels=batch["input_ids"])
    rows = model.config.text_config.vocab_size
    for nothing in (-100, 5000):
        labels = batch["input_ids"].masked_fill(batch["input_ids"] >= rows, nothing)
        assert model(**batch, labels=labels, ignore_index=nothing).loss > 0


def test_loss_takes_shifted_labels_and_a_token_count() -> None:
    model = tiny_model()
    batch = tiny_inputs(model.config)
    labels = tiny_labels(model.config, batch)
    loss = model(**batch, labels=labels).loss
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(**batch, shift_labels=shifted).loss, loss)
    assert torch.equal(model(**batch, labels=labels, shift_labels=shifted).loss, loss)
    count = int((shifted != -100).sum())
    summed = model(**batch, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    assert_close(summed, loss * count / 7, name="loss")


def test_labels_ids_beyond_the_table_are_not_asked_for() -> None:
    model = tiny_model()
    batch = tiny_inputs(model.config)
    logits = model(**batch).logits
    labels = tiny_labels(model.config, batch)
    expected = nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:], ignore_index=-100)
    assert_close(model(**batch, labels=labels).loss, expected, name="loss")


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 3])])
def test_logits_to_keep(keep: int | Tensor) -> None:
    model = tiny_model()
    batch = tiny_inputs(model.config)
    full = model(**batch).logits
    expected = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
    assert_close(model(**batch, logits_to_keep=keep).logits, expected, name="logits")


def test_other_keywords_reach_the_language_model() -> None:
    model = tiny_model()
    seen: dict[str, Any] = {}
    forward = model.model.language_model.layers[0].self_attn.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return forward(*args, **kwargs)

    model.model.language_model.layers[0].self_attn.forward = spy
    context = object()
    batch = tiny_inputs(model.config)
    model(**batch, labels=batch["input_ids"] * 0, sp_context=context, num_items_in_batch=3)
    assert seen["sp_context"] is context
    assert "num_items_in_batch" not in seen


# ---- errors


def test_too_few_frames_name_both_numbers() -> None:
    model = tiny_model()
    batch = tiny_inputs(model.config)
    batch["pixel_values_videos"], batch["video_num_frames"] = torch.randn(2, 3, 20, 20), None
    with pytest.raises(ValueError, match=r"27 video placeholders.*have 18 rows"):
        model(**batch)


def test_placeholders_without_features() -> None:
    model = tiny_model()
    batch = tiny_inputs(model.config)
    with pytest.raises(ValueError, match=r"27 video placeholders.*have 0 rows"):
        model(input_ids=batch["input_ids"])


def test_features_without_placeholders() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"0 image placeholders.*have 9 rows"):
        model(input_ids=torch.tensor([[1, 2]]), pixel_values=torch.randn(1, 3, 20, 20))


def test_boundary_errors() -> None:
    model = tiny_model()
    pixels = torch.randn(3, 3, 20, 20)
    with pytest.raises(ValueError, match=r"\[2, 2\] add up to 4, but pixels hold 3 frames"):
        model.encode_media(pixels, [2, 2])
    with pytest.raises(ValueError, match=r"shape \(frames, 3, 20, 20\), got \(3, 3, 24, 20\)"):
        model.encode_media(torch.randn(3, 3, 24, 20))
    with pytest.raises(ValueError, match=r"shape \(frames, 3, 20, 20\), got \(3, 1, 20, 20\)"):
        model.encode_media(pixels[:, :1])
    with pytest.raises(ValueError, match=r"\[-1, 4\] add up to 3"):
        model.encode_media(pixels, [-1, 4])
    with pytest.raises(TypeError, match="must be normalised"):
        model.encode_media(pixels.to(torch.uint8))
    with pytest.raises(ValueError, match="kind must be one of"):
        model.encode_media(pixels, kind="audio")
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    embeds = torch.randn(1, 4, 32)
    with pytest.raises(ValueError, match="no placeholders to fill; use fused_embeds"):
        model(inputs_embeds=embeds, pixel_values=pixels)
    batch = tiny_inputs(model.config)
    encoded = model.get_video_features(pixels)
    with pytest.raises(ValueError, match="both as pixels and in mm_encoder_outputs"):
        model(**batch, mm_encoder_outputs={"video": encoded})


@pytest.mark.parametrize(
    "extra",
    [{"model_type": "gemma2", "head_dim": 8}, {"model_type": "granite", "logits_scaling": 8.0}],
)
def test_a_head_that_is_not_a_plain_matrix_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"transforms its logits .*(softcapping|scaling)"):
        tiny_model(text_config=extra)


def test_base_model_alone() -> None:
    model = tiny_model()
    batch = tiny_inputs(model.config)
    assert isinstance(model.model, LongVILAModel)
    hidden = model.model(**batch).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(**batch).logits)
    assert model(**batch, return_dict=False)[0].shape == (1, batch["input_ids"].shape[1], 265)
