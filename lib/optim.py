"""Muon, an optimiser (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon)."""

import torch
from torch import Tensor


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly U Vᵀ of the singular value decomposition U S Vᵀ of a matrix (M, N).

    Five steps of a quintic Newton-Schulz iteration. They bring singular values to 0.7 to 1.2, but
    those below some thousandths of the norm not as far.
    """
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with momentum μ and weight decay λ that orthogonalises the step of every convolution.

    A kernel (M, C, h, w), as a matrix w (M, C h w) with gradient g, takes the step

        v ← μ v + g
        w ← (1 - 2 lr λ) w - lr / 4 √max(1, M / (C h w)) orthogonalised(g + μ v)

    All other parameters take SGD's, v ← μ v + g + λ w and w ← w - lr v. With the factor 1/4, one lr
    suits both kinds.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group["lr"], group["momentum"], group["weight_decay"])

    def update(self, p: Tensor, lr: float, momentum: float, decay: float) -> None:
        state, kernel = self.state[p], p.dim() == 4
        gradient = p.grad if kernel else p.grad.add(p, alpha=decay)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        step = state["momentum_buffer"].mul_(momentum).add_(gradient)
        if kernel:
            p.mul_(1 - 2 * lr * decay)
            matrix = (gradient + momentum * step).flatten(1)
            scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5 / 4
            step = scale * orthogonalised(matrix).view_as(p)
        p.add_(step, alpha=-lr)


def optimizer(opt, model: torch.nn.Module) -> torch.optim.Optimizer:
    """--optimizer; the training loop sets its rate at every step."""
    settings = dict(lr=0.0, momentum=0.9, weight_decay=opt.weight_decay)
    if opt.optimizer == "muon":
        return Muon(model.parameters(), **settings)
    return torch.optim.SGD(model.parameters(), fused=True, **settings)
