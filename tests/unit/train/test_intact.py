"""Every bit of a stored tensor counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from longvila.train.intact import find_damage


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_any_flipped_bit_of_a_tensor_is_found_by_the_rank_that_looks(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.randn(50 * (n + 1)) for n in range(5)}
    dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    torch.save({"state": torch.arange(70)}, tmp_path / "rank-0.pt")
    for ranks in (1, 3):
        assert {find_damage(tmp_path, rank=rank, ranks=ranks) for rank in range(ranks)} == {None}
    for name, tensor in [("__0_0.distcp", t) for t in tensors.values()] + [
        ("rank-0.pt", torch.arange(70))
    ]:
        file, whole = tmp_path / name, (tmp_path / name).read_bytes()
        place = whole.index(tensor.numpy().tobytes())
        for byte, bit in ((0, 0), (tensor.nbytes // 2, 7), (tensor.nbytes - 1, 3)):
            content = bytearray(whole)
            content[place + byte] ^= 1 << bit
            file.write_bytes(content)
            found = [find_damage(tmp_path, rank=rank, ranks=3) for rank in range(3)]
            assert sum(each is not None and name in each for each in found) == 1
        file.write_bytes(whole[: place + 9])
        assert any(find_damage(tmp_path, rank=rank, ranks=3) for rank in range(3))
        file.write_bytes(whole)
    (tmp_path / "__0_0.distcp").unlink()
    assert "No such file" in (find_damage(tmp_path) or "")
