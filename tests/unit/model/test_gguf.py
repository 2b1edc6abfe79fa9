"""A GGUF written here is read back as a Qwen2 model whose logits equal the Llama original's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from longvila.errors import CheckpointError
from longvila.model.gguf import hf_name, read_gguf, unpermute

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, LAYERS, ROWS = 4, 2, 2, 48


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    return LlamaForCausalLM(config).eval()


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows the way llama.cpp stores them."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def _write(
    path: Path,
    model: LlamaForCausalLM,
    *,
    arch: str = "llama",
    leave: str = "",
    output: np.ndarray | None = None,
    scaling: str | None = None,
) -> None:
    """Write the model with 8-bit matrices, and put what they mean back into it."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    if output is not None:
        four = GGMLQuantizationType.Q4_0
        writer.add_tensor("output.weight", quantize(output, four), raw_dtype=four)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        parts = name.split(".", 3)
        inner = parts[1] == "layers"
        target = f"blk.{parts[2]}.{_NAMES[parts[3]]}" if inner else _NAMES[name]
        value = parameter.numpy().copy()
        if value.ndim == 1:
            writer.add_tensor(target, value)
            continue
        eight = GGMLQuantizationType.Q8_0
        stored = quantize(value, eight)
        parameter.copy_(torch.from_numpy(dequantize(stored, eight)))
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if heads:
            stored = quantize(_permute(value, heads), eight)
        if target != leave:
            writer.add_tensor(target, stored, raw_dtype=eight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_logits_equal_the_original(tmp_path: Path) -> None:
    model = _llama()
    _write(tmp_path / "tiny.gguf", model)
    config, state = read_gguf(tmp_path / "tiny.gguf")
    assert config.tie_word_embeddings
    assert config.num_key_value_heads == KV_HEADS
    assert config.rope_parameters["rope_theta"] == pytest.approx(1e5)
    qwen = Qwen2ForCausalLM(config).eval()
    missing, unexpected = qwen.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    qwen.tie_weights()
    ids = torch.randint(0, ROWS, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(qwen(ids).logits, model(ids).logits)


def test_row_order_is_undone() -> None:
    weight = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    stored = torch.from_numpy(_permute(weight.numpy(), 3))
    assert torch.equal(unpermute(stored, 3), weight)
    assert not torch.equal(unpermute(stored, 1), weight)


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "tiny.gguf", _llama(), arch="gemma")
    with pytest.raises(CheckpointError, match="'gemma' model, expected 'llama'"):
        read_gguf(tmp_path / "tiny.gguf")


def test_scaled_angles_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "none.gguf", _llama(), scaling="none")
    read_gguf(tmp_path / "none.gguf")
    _write(tmp_path / "tiny.gguf", _llama(), scaling="linear")
    with pytest.raises(CheckpointError, match=r"scales its rotary angles \(.*type is 'linear'\)"):
        read_gguf(tmp_path / "tiny.gguf")


def test_an_output_table_of_its_own_is_the_head(tmp_path: Path) -> None:
    table = np.random.default_rng(0).integers(-8, 8, (ROWS, 64)).astype(np.float32)
    table[:, ::32] = -8  # so that four bits hold it
    _write(tmp_path / "tiny.gguf", _llama(), output=table)
    config, state = read_gguf(tmp_path / "tiny.gguf")
    assert not config.tie_word_embeddings
    assert np.array_equal(state["lm_head.weight"].numpy(), table)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "tiny.gguf", _llama(), leave="blk.1.attn_k.weight")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        read_gguf(tmp_path / "tiny.gguf")


def test_unknown_tensor_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q_norm\.weight has no place"):
        hf_name("blk.0.attn_q_norm.weight")
