"""How the terms of an objective are added up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Balance(Protocol):
    def attach(self, names: Sequence[str]) -> nn.Module:
        """A module that is called as (means, coefficients, part_frac) and gives the scalar to minimise. `means` are
        the terms' sums over this micro-batch, each divided by the whole batch's count; `part_frac` is the
        micro-batch's share of the batch, for what is added once a batch."""
        ...


@dataclass(frozen=True)
class Fixed:
    """sum over terms of coefficient * mean."""

    def attach(self, names: Sequence[str]) -> nn.Module:
        return _Sum()


@dataclass(frozen=True)
class LearnedUncertainty:
    """sum over terms of coefficient * (exp(-s) * mean + s), one s a term, learnt from 0 (Kendall, Gal & Cipolla 2018,
    with s = log sigma^2 and their factor 1/2 dropped, since ours are likelihood terms).

    A term whose mean stays large is given a small weight exp(-s) = 1 / mean at the optimum. A coefficient of 0 leaves a
    term out, its s included.
    """

    def attach(self, names: Sequence[str]) -> nn.Module:
        return _Uncertainty(names)


class _Sum(nn.Module):
    def forward(self, means: Mapping[str, Tensor], coefficients: Mapping[str, float], part_frac: float) -> Tensor:
        return torch.stack([coefficients[name] * mean for name, mean in means.items()]).sum()


class _Uncertainty(nn.Module):
    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})

    def forward(self, means: Mapping[str, Tensor], coefficients: Mapping[str, float], part_frac: float) -> Tensor:
        terms = []
        for name, mean in means.items():
            s = self.log_variances[name]
            terms.append(coefficients[name] * (torch.exp(-s) * mean + part_frac * s))
        return torch.stack(terms).sum()
