"""Two real processes (gloo) give the gradients of one process with the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from llm2clip import losses
from llm2clip.distributed import all_gather_with_grad, rank, world_size

BATCH = 8


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale = self.logit_scale.exp()
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1), scale


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 5, generator=generator)


def objective(name: str, model: nn.Module, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return losses.LOSSES[name](losses.Features(*model(images, texts), logit_bias=torch.tensor(-2.0)))


def gradients(name: str, *, with_grad: bool = True) -> dict[str, torch.Tensor]:
    """Gradients of this process' share of the batch, averaged over processes by DDP."""
    model = TwoTowers()
    images, texts = (tensor.chunk(world_size())[rank()] for tensor in batch())
    wrapped = DistributedDataParallel(model) if world_size() > 1 else model
    gather = losses.all_gather_with_grad
    if not with_grad:
        losses.all_gather_with_grad = lambda tensor: gather(tensor.detach())
    try:
        loss = objective(name, wrapped, images, texts)
        loss.backward()
    finally:
        losses.all_gather_with_grad = gather
    mean_loss = loss.detach().clone()
    if world_size() > 1:
        dist.all_reduce(mean_loss)
    return {"loss": mean_loss / world_size(), **{n: p.grad for n, p in model.named_parameters()}}


def worker(directory: Path) -> None:
    """What each of two processes does; started by `two_processes`."""
    dist.init_process_group("gloo")
    mine = torch.full((2, 3), float(rank()), requires_grad=True)
    gathered = all_gather_with_grad(mine)
    (gathered * torch.arange(4.0)[:, None] * (rank() + 1)).sum().backward()
    result = {
        "gathered": gathered.detach() + 0,
        "gathered_grad": mine.grad,
        **{name: gradients(name) for name in losses.LOSSES},
        "contrastive, gather without grad": gradients("contrastive", with_grad=False),
    }
    torch.save(result, directory / f"{rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for number in range(2):
        variables = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-W", "error", __file__, str(directory)]
        processes.append(subprocess.Popen(command, env={**os.environ, **variables, "OMP_NUM_THREADS": "1"}))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]  # -W error: no deprecated collective
    return [torch.load(directory / f"{number}.pt", weights_only=True) for number in range(2)]


@pytest.mark.distributed
def test_gather_and_its_gradient(two_processes: list[dict]):
    for number, result in enumerate(two_processes):
        assert_close(result["gathered"], torch.tensor([0.0, 0, 1, 1])[:, None].expand(4, 3))
        assert_close(
            result["gathered_grad"], (3.0 * torch.arange(4.0)[2 * number : 2 * number + 2, None]).expand(2, 3)
        )


@pytest.mark.distributed
@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_two_processes_give_the_gradients_of_one(two_processes: list[dict], name: str):
    expected = gradients(name)
    for result in two_processes:
        for parameter, gradient in expected.items():
            assert_close(result[name][parameter], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.distributed
def test_gather_without_gradient_is_wrong_although_the_loss_is_right(two_processes: list[dict]):
    expected, wrong = gradients("contrastive"), two_processes[0]["contrastive, gather without grad"]
    assert_close(wrong["loss"], expected["loss"])
    for parameter in ("image.weight", "text.weight"):
        error = (wrong[parameter] - expected[parameter]).norm() / expected[parameter].norm()
        assert error > 0.1


def test_one_process_gathers_nothing():
    tensor = torch.randn(3, 2, requires_grad=True)
    assert all_gather_with_grad(tensor) is tensor
    assert (rank(), world_size()) == (0, 1)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
