"""The rows of a batch that one rank has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Trajectories of a batch that one rank has: the rows `first` to `first + count` of `total`."""

    first: int
    count: int
    total: int
    ranks: int = 1
    """Ranks that share the batch."""

    @property
    def rows(self) -> slice:
        """The rows as an index of the batch."""
        return slice(self.first, self.first + self.count)

    def owners(self, rows: Tensor) -> Tensor:
        """The rank of each row of the batch."""
        each, larger = divmod(self.total, self.ranks)
        behind = larger * (each + 1)
        return torch.where(rows < behind, rows // (each + 1), larger + (rows - behind) // max(each, 1))
