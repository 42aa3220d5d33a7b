"""What joins a picture encoder to a decoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """Linear, GELU (tanh), linear: from the vision encoder's width to the decoder's."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, width_out)
        self.fc2 = nn.Linear(width_out, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
