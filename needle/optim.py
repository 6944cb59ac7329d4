"""Muon for attention matrices, AdamW for the rest, as one optimizer; and the warmup-stable-decay schedule.

torch.optim.Muon runs its Newton-Schulz iteration in bfloat16, matrix by matrix: right on a GPU, ruinous on a CPU. Here
matrices of one shape are stacked and iterated together, in float32 on a CPU and bfloat16 on a GPU. Cost: 10 x min(n,
m)^2 x (2 max(n, m) + min(n, m)) FLOPs a matrix and step, whatever the batch. At the batches that a CPU can afford this
exceeds the gradient's own cost for whole matrices; head by head it is a fraction.
"""

# M matrices of one shape, N rows, O columns

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from needle.student.matrices import cut_of, embedding_of, layer_matrices

# Jordan et al. 2024: a quintic whose iteration drives singular values into about [0.7, 1.2].
_QUINTIC = (3.4445, -4.7750, 2.0315)

Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def orthogonalise(matrices_MNO: Tensor, *, steps: int) -> Tensor:
    """Approximately U V^T of every matrix's singular value decomposition, by `steps` Newton-Schulz iterations."""
    x = matrices_MNO.bfloat16() if matrices_MNO.is_cuda else matrices_MNO
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(matrices_MNO.dtype)


def orthogonalise_by_head(matrices_MNO: Tensor, *, heads: int, by_column: bool, steps: int) -> Tensor:
    """Orthogonalises each head's part of attention matrices alone: rows of query, key and value, columns of output."""
    if heads == 1:
        return orthogonalise(matrices_MNO, steps=steps)
    matrices = matrices_MNO.mT if by_column else matrices_MNO
    count, rows, columns = matrices.shape
    parts = orthogonalise(matrices.reshape(count * heads, rows // heads, columns), steps=steps)
    whole = parts.reshape(count, rows, columns)
    return whole.mT if by_column else whole


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `kind="muon"` hold matrices of `heads` parts, cut `by_column` or by row; `kind="adamw"` anything.

    Muon (Jordan et al. 2024) steps by the orthogonalised Nesterov momentum, scaled by sqrt(max(1, rows / columns)), so
    one rate serves every shape. AdamW after Loshchilov & Hutter 2019.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._step_muon if group["kind"] == "muon" else self._step_adamw)(group, parameters)
        return loss

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        heads = group["heads"]
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            by_shape[p.shape].append(p)
        for (rows, columns), same in by_shape.items():
            gradients = [p.grad for p in same]
            momenta = [self.state[p]["momentum"] for p in same]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            update = orthogonalise_by_head(
                torch.stack(ahead), heads=heads, by_column=group["by_column"], steps=group["newton_schulz_steps"]
            )
            scale = math.sqrt(max(1.0, rows / columns))
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, list(update.unbind()), alpha=-group["lr"] * scale)

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        gradients = [p.grad for p in parameters]
        beta1, beta2 = group["betas"]
        means, squares = [s["mean"] for s in states], [s["square"] for s in states]
        for state in states:
            state["step"] += 1
        counts = [float(state["step"]) for state in states]  # fewer where a loss left a parameter out
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, [math.sqrt(1 - beta2**count) for count in counts])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        rates = [-group["lr"] / (1 - beta1**count) for count in counts]
        torch._foreach_addcdiv_(parameters, means, denominators, rates)


@dataclass(frozen=True)
class OptimSettings:
    """What conf/optim states. `muon_lr: null` gives AdamW for everything, at `adamw_lr`."""

    muon_lr: Rate | None
    muon_momentum: Fraction
    newton_schulz_steps: Annotated[int, Field(ge=1, le=20)]
    muon_by_head: bool
    adamw_lr: Rate
    embedding_lr: Rate
    betas: tuple[Fraction, Fraction]
    eps: Rate
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    decay_frac: Annotated[float, Field(ge=0, le=1)]

    def build(self, model: nn.Module, *, beside: nn.Module | None = None) -> MuonAdamW:
        """Matrices of attention and feed-forward layers go to Muon; embedding, copy head, norms, gates to AdamW, as
        do the parameters of `beside`, which a loss learns for itself."""
        embedding, rest = [], list(beside.parameters()) if beside is not None else []
        matrices: dict[tuple[int, bool], list[Tensor]] = defaultdict(list)
        layers, embedded = set(layer_matrices(model)), embedding_of(model)
        for name, parameter in model.named_parameters():
            if parameter is embedded:
                embedding.append(parameter)
            elif name in layers:
                heads, by_column = cut_of(name, config=model.config)
                matrices[(heads if self.muon_by_head else 1), by_column].append(parameter)
            else:
                rest.append(parameter)
        shared = {"betas": tuple(self.betas), "eps": self.eps, "kind": "adamw"}
        groups = [
            {"params": embedding, "lr": self.embedding_lr, "weight_decay": 0.0, **shared},
            {"params": rest, "lr": self.adamw_lr, "weight_decay": 0.0, **shared},
        ]
        muon = {"kind": "muon", "momentum": self.muon_momentum, "newton_schulz_steps": self.newton_schulz_steps}
        for (heads, by_column), same in matrices.items():
            decayed = {"params": same, "weight_decay": self.weight_decay}
            if self.muon_lr is None:
                groups.append({**decayed, "lr": self.adamw_lr, **shared})
            else:
                groups.append({**decayed, "lr": self.muon_lr, "heads": heads, "by_column": by_column, **muon})
        return MuonAdamW([group for group in groups if group["params"]])

    def rate_at(self, step: int, *, total_steps: int) -> float:
        """The factor on every learning rate: linear warm-up, 1, then linear decay to 0 over the last `decay_frac`."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay_steps = total_steps - self.decay_start(total_steps=total_steps)
        left = (total_steps - step) / decay_steps if decay_steps else 1.0
        return max(0.0, min(warm, left, 1.0))

    def decay_start(self, *, total_steps: int) -> float:
        """The step at which rates begin to fall."""
        return total_steps - self.decay_frac * total_steps
