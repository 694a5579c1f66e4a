"""The attack of a training step: its options, its network, and the watch over a single step."""

import math

import torch
from torch import Tensor, nn

import cem
from lib import cli, data, distributed
from lib.device import autocast, compile_network, resolve_precision


def check_ball(opt) -> None:
    wrong = f"--eps {opt.eps:g} with --norm linf allows any image: pass one such as 8/255"
    cem.require(opt.norm == "l2" or opt.eps < 0.5, wrong)


def pgd_options(opt) -> dict:
    """The options of --attack, as those of cem.pgd."""
    ball = dict(eps=opt.eps, norm=opt.norm)
    if opt.attack == "fgsm":
        return ball | dict(steps=1, step_size=opt.eps, random_start=2.0)  # [N-FGSM]
    return ball | dict(steps=opt.attack_steps, step_size=opt.attack_step_size)


def hold_out(opt, train_set: data.Dataset) -> tuple[data.Dataset | None, data.Dataset]:
    """-> images for the watch, if the attack is a single step of at least eps, and the rest."""
    attack = pgd_options(opt)
    single = attack["steps"] == 1 and attack["step_size"] >= opt.eps
    if opt.loss in ("st", "jem") or not single or len(train_set) < 20:
        return None, train_set
    return train_set.hold_out(min(256, len(train_set) // 10))


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
            self.network = self.build(model)
        refold(self.network, model)
        return self.network

    def build(self, model: nn.Module) -> nn.Module:
        network = cem.folded(model)
        device = next(model.parameters()).device
        if resolve_precision(device, self.precision) == "bfloat16":
            for module in network.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.to(torch.bfloat16)
        if self.compiled:
            compile_network(network, device)
        return network


@torch.no_grad()
def refold(network: nn.Module, model: nn.Module) -> None:
    """Give `network`, a folded copy of `model`, its present weights, in a dozen operator calls."""
    state, target = dict(model.state_dict()), network.state_dict()
    pairs = list(cem.conv_bn_pairs(model))
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
    # torch before the fix of its issue 173383 overruns a GPU's memory where target types are mixed
    for kind in {tensor.dtype for tensor in target.values()}:
        names = [name for name, tensor in target.items() if tensor.dtype == kind]
        torch._foreach_copy_([target[name] for name in names], [state[name] for name in names])


def make_watch(opt, x: Tensor, target: Tensor):
    """-> watch(model) -> its accuracies on images x (N, C, H, W) under the training's single step,
    in jeat too on the cross-entropy, and PGD-10. target: their labels (N,) or, of an encoder, their
    positives (N, C, H, W), among which it has to find each image's own.

    It raises Diverged for catastrophic overfitting (Wong et al., 2020, arXiv:2001.03994): a network
    that withstands the single step of its training, but not several.
    """
    classifier = target.dim() == 1
    wanted = target if classifier else torch.arange(len(x), device=x.device)
    # of the size of a training batch, but at least 3: the smallest then has 2, as InfoNCE needs
    batches = math.ceil(len(x) / max(opt.batch_size // distributed.world_size(), 3))
    parts = list(zip(x.tensor_split(batches), target.tensor_split(batches)))

    def logits(network: nn.Module, settings: dict) -> Tensor:
        """Of the attacked images, over classes or, of an encoder, over all positives."""
        generator = torch.Generator(x.device).manual_seed(opt.seed)
        outputs = []
        for part, aim in parts:
            potential = cem.potential("ce" if classifier else "pgd", network, aim)
            outputs.append(network(cem.pgd(potential, part, **settings, generator=generator)))
        outputs = torch.cat(outputs)
        if classifier:
            return outputs
        return cem.similarity(outputs, torch.cat([network(aim) for _, aim in parts]), 1)

    @torch.no_grad()
    def watch(model):
        network = cem.folded(model)
        attacks = pgd_options(opt), dict(eps=opt.eps, norm=opt.norm, steps=10)
        with autocast(x.device, opt.precision):
            found = torch.stack([logits(network, settings) for settings in attacks])
        hits = (found.argmax(2) == wanted).float().mean(1)
        single, several = distributed.mean(hits).tolist()
        chance = 1 / found.shape[2]
        if single > max(0.3, chance + 0.2) and several < single / 2:
            under = f"{single:.3f} under its single step, {several:.3f} under PGD-10"
            raise cli.Diverged(f"catastrophic overfitting: accuracy {under}")
        return {"single_step_accuracy": single, "pgd10_accuracy": several}

    return watch
