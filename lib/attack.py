"""The network that a training step attacks."""

import torch
from torch import nn

import cem
from lib import distributed
from lib.device import resolve_precision


class AttackCopy:
    """The network that a training step attacks: the current model, frozen and folded.

    One network, whose weights every call overwrites: convolutions and matrices in the type in which
    they are computed, so that autocast need not cast frozen weights in each forward pass.
    """

    def __init__(self, precision: str, compiled: bool):
        self.precision = precision
        self.compiled = compiled
        self.network = None

    def __call__(self, model: nn.Module) -> nn.Module:
        model = distributed.unwrap(model)
        if self.network is None:
            self.network = self.first(model)
        refold(self.network, model)
        return self.network

    def first(self, model: nn.Module) -> nn.Module:
        network = cem.folded(model)
        device = next(model.parameters()).device
        if resolve_precision(device, self.precision) == "bfloat16":
            for module in network.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.to(torch.bfloat16)
        if self.compiled:
            network.compile()
        return network


@torch.no_grad()
def refold(network: nn.Module, model: nn.Module) -> None:
    """Give `network`, a folded copy of `model`, its present weights, in a dozen operator calls."""
    state, target = dict(model.state_dict()), network.state_dict()
    pairs = list(cem.folding(model))
    convs = [state[f"{conv}.weight"] for conv, _ in pairs]
    names = ("running_mean", "running_var", "weight", "bias")
    means, variances, weights, biases = ([state[f"{bn}.{k}"] for _, bn in pairs] for k in names)
    eps = [model.get_submodule(bn).eps for _, bn in pairs]
    scales = torch._foreach_add(variances, eps)
    torch._foreach_rsqrt_(scales)
    shifts = torch._foreach_neg(means)
    for factor in (scales, weights):
        torch._foreach_mul_(shifts, factor)
    torch._foreach_add_(shifts, biases)
    torch._foreach_mul_(scales, weights)
    kernels = torch._foreach_mul(convs, [scale.view(-1, 1, 1, 1) for scale in scales])
    for (conv, _), kernel, shift in zip(pairs, kernels, shifts):
        state |= {f"{conv}.weight": kernel, f"{conv}.bias": shift}
    torch._foreach_copy_(list(target.values()), [state[name] for name in target])
