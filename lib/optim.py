"""Muon, an optimiser (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon)."""

import torch
from torch import Tensor


def orthogonalised(matrices: Tensor) -> Tensor:
    """Nearly U Vᵀ of the singular value decomposition U S Vᵀ of each of B matrices (B, M, N).

    Five steps x ← 3.4445 x - 4.775 (x xᵀ) x + 2.0315 (x xᵀ)² x (Newton-Schulz). They bring singular
    values to between 0.68 and 1.2, but leave those below a few thousandths of the norm smaller.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x.bmm(x.mT)
        gram = gram.baddbmm(gram, gram, beta=-4.775, alpha=2.0315)
        x = x.baddbmm(gram, x, beta=3.4445)
    return x.mT if tall else x


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
            alike = {}  # kernels of one shape move together, which takes fewer operator calls
            for p in group["params"]:
                if p.grad is not None:
                    shape = (len(p), p.numel() // len(p)) if p.dim() == 4 else None
                    alike.setdefault(shape, []).append(p)
            for shape, params in alike.items():
                self.update(params, shape, group["lr"], group["momentum"], group["weight_decay"])

    def update(self, params: list[Tensor], shape, lr: float, momentum: float, decay: float) -> None:
        """shape: (M, C h w) of the kernels, else None."""
        gradients = [p.grad for p in params]
        if not shape:
            gradients = torch._foreach_add(gradients, params, alpha=decay)
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        steps = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(steps, momentum)
        torch._foreach_add_(steps, gradients)
        if shape:
            torch._foreach_mul_(params, 1 - 2 * lr * decay)
            ahead = torch._foreach_add(gradients, steps, alpha=momentum)
            directions = orthogonalised(torch.stack([step.flatten(1) for step in ahead]))
            directions = directions * (max(1, shape[0] / shape[1]) ** 0.5 / 4)
            steps = [step.view_as(p) for step, p in zip(directions, params)]
        torch._foreach_add_(params, steps, alpha=-lr)


def optimizer(opt, model: torch.nn.Module) -> torch.optim.Optimizer:
    """--optimizer; the training loop sets its rate at every step."""
    settings = dict(lr=0.0, momentum=0.9, weight_decay=opt.weight_decay)
    if opt.optimizer == "muon":
        return Muon(model.parameters(), **settings)
    return torch.optim.SGD(model.parameters(), fused=True, **settings)
