"""Moments on the host over shards on two GPUs: AdamW's own steps, bit for bit.

torchrun --nproc-per-node 2 tests/gpu/test_host_adamw.py
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from longvila.train.host_adamw import HostAdamW
from longvila.train.step import gradient_norm


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded() -> nn.Module:
    torch.manual_seed(0)
    # Odd sizes: ranks hold shards of different lengths.
    sizes = [(1000, 3001), (3001, 3001), (3001, 7)]
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes)).cuda()
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    options = {"lr": 1e-2, "weight_decay": 0.1}
    models = [sharded(), sharded()]
    host = HostAdamW(models[0].parameters(), piece=1 << 18, small=5000, **options)
    plain = torch.optim.AdamW(models[1].parameters(), fused=True, **options)
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    for _ in range(4):
        x = torch.randn(64, 1000, generator=generator, device="cuda")
        norms = []
        for model in models:
            model.zero_grad()
            model(x).float().square().mean().backward()
            norms.append(gradient_norm([p.grad for p in model.parameters()]))
        assert torch.equal(*norms)
        host.step()
        plain.step()
    host.synchronize()
    kinds = set()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(local(a), local(b))
        for name in ("exp_avg", "exp_avg_sq"):
            moment = local(host.state[a][name])
            kinds.add(moment.device.type)
            assert torch.equal(moment.cuda(), local(plain.state[b][name])), name
    assert kinds == {"cpu", "cuda"}, kinds
    if dist.get_rank() == 0:
        print("host moments are AdamW's on every shard")
    dist.destroy_process_group()


@pytest.mark.gpu
def test_shards_take_adamws_steps() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, found {torch.cuda.device_count()}")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, __file__], capture_output=True, text=True, timeout=200
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "host moments are AdamW's" in done.stdout


if __name__ == "__main__":
    main()
