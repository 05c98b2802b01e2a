"""A module of your own: trained here on a toy task, then compressed and saved for torch alone.

python examples/own_module.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import slimfx


class Regressor(nn.Module):
    """Two hidden layers with a skip connection."""

    def __init__(self, inputs: int = 32, hidden: int = 256) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """y [batch, 1] for x [batch, inputs]."""
        x = torch.relu(self.first(x))
        return self.out(x + torch.relu(self.second(x)))


def data(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs, and a function of them that takes more than one layer."""
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :16] * x[:, 16:]).sum(1, keepdim=True).tanh()


def main(folder: str = ".") -> None:
    """Print the error before and after."""
    torch.manual_seed(0)
    model, (x, y) = Regressor(), data(8192, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        falling.step()

    dense = slimfx.capture(model, (x[:2],))
    small = slimfx.compress(dense, "joint-q", calibration=[x[:2048]])
    path = Path(folder) / "own.pt2"
    slimfx.save(small, path, form="aten")

    unseen, target = data(2048, 2)
    alone = torch.export.load(path).module()  # what a process without slimfx would do
    with torch.no_grad():
        for name, run in (("dense", dense.module()), ("compressed", alone)):
            print(f"{name}: mean squared error {nn.functional.mse_loss(run(unseen), target):.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
