"""The two sides of bench.py: our steps and the textbook's, under the same names.

`opt` has arch, width, image_size, batch_size, steps, precision and compile.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from torch import Tensor, nn

import cem
import train_sup
import train_unsup
from lib import augment, data, distributed
from lib.device import autocast, compile_network

STEP_SIZE = 0.1
EPS = 0.5
TEMPERATURE = 0.3
TORCHATTACKS = importlib.util.find_spec("torchattacks") is not None


def noise_images(opt) -> data.Dataset:
    shape = (64 * opt.batch_size, 3, opt.image_size, opt.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    return data.Dataset("noise", images, torch.arange(len(images)) % 10, list("0123456789"))


def new_model(kind: type, opt, device: torch.device, **sgd) -> tuple[nn.Module, torch.optim.SGD]:
    """A model with the same random weights at every call, and its optimiser."""
    torch.manual_seed(0)
    model = kind(opt.arch, width=opt.width).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, **sgd)
    return model, optimizer


# ------------------------------------------------------------------------------------------- ours


class Ours:
    """The steps of the training scripts, and `cem.ascend` as attack and samplers."""

    def __init__(self, opt, device: torch.device):
        self.opt = opt
        self.device = device
        self.train_set = noise_images(opt).to(device)
        self.index = distributed.local_rows(torch.arange(opt.batch_size, device=device))
        self.x = self.train_set.pixels(self.index)
        self.y = self.train_set.labels[self.index]
        self.classifier = self.frozen(cem.ParametricCEM)
        self.encoder = self.frozen(cem.NonParametricCEM)

    def frozen(self, kind: type) -> nn.Module:
        model, _ = new_model(kind, self.opt, self.device)
        model = cem.folded(model).to(memory_format=torch.channels_last)
        if self.opt.compile:
            compile_network(model, self.device)
        return model

    def training_step(self, script, kind: type, draws_per_image: int) -> Callable:
        opt = script.Options(
            attack_steps=self.opt.steps,
            batch_size=self.opt.batch_size,
            precision=self.opt.precision,
            compile=self.opt.compile,
        )
        model, optimizer = new_model(kind, self.opt, self.device, fused=True)
        model.to(memory_format=torch.channels_last).train()
        if opt.compile:
            compile_network(model, self.device)
        model = distributed.wrap(model, opt.batch_norm)
        batch_loss = script.make_batch_loss(opt, self.train_set)
        draws = torch.rand(len(self.index), draws_per_image, device=self.device)

        def step():
            optimizer.zero_grad(set_to_none=True)
            generator = distributed.RankGenerator(0, self.device)
            loss, _ = batch_loss(model, self.index, draws, generator)
            loss.backward()
            optimizer.step()

        return step

    def climb(self, name: str, model: nn.Module, y: Tensor | None = None, eps=None) -> None:
        potential = cem.potential(name, model, y)
        with autocast(self.device, self.opt.precision):
            cem.ascend(potential, self.x, steps=self.opt.steps, step_size=STEP_SIZE, eps=eps)

    def work(self) -> dict[str, tuple[Callable, int]]:
        """name -> our step and its FLOP, in forward passes of the batch."""
        k = self.opt.steps
        supervised = self.training_step(train_sup, cem.ParametricCEM, augment.CROP_DRAWS)
        unsupervised = self.training_step(train_unsup, cem.NonParametricCEM, train_unsup.VIEWS)
        attack = functools.partial(self.climb, "ce", self.classifier, self.y, EPS)
        pgd = functools.partial(self.climb, "pgd", self.encoder, self.x)
        maxent = functools.partial(self.climb, "maxent", self.encoder)
        work = {
            "supervised training step": (supervised, 2 * k + 3),
            # the other view is embedded for the attack, and both views are trained on
            "unsupervised training step": (unsupervised, 2 * k + 1 + 6),
            "attack": (attack, 2 * k),
            "sampler pgd": (pgd, 2 * k + 1),
            "sampler maxent": (maxent, 2 * k),
        }
        for name in cem.PARAMETRIC_SAMPLERS:
            sampler = functools.partial(self.climb, name, self.classifier, self.y)
            work[f"sampler {name}"] = (sampler, 2 * k)
        if TORCHATTACKS:
            work["attack, against torchattacks"] = (attack, 2 * k)
        return work


# ----------------------------------------------------------------------------------- the textbook


def norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def textbook_pgd(
    x: Tensor, objective: Callable[[Tensor], Tensor], steps: int, eps: float | None = None
) -> Tensor:
    """l2 PGD as in tutorials, from a little noise or, without eps, unbounded.

    backward() also computes the gradients of the weights, which nobody uses.
    """
    x_adv = x
    if eps is not None:
        x_adv = (x + 0.01 * torch.randn_like(x)).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        objective(x_adv).backward()
        gradient = x_adv.grad
        x_adv = x_adv.detach() + STEP_SIZE * gradient / norms(gradient)
        if eps is not None:
            delta = x_adv - x
            x_adv = x + delta * (eps / norms(delta)).clamp(max=1)
        x_adv = x_adv.clamp(0, 1)
    return x_adv.detach()


@dataclass
class TransformedImages(torch.utils.data.Dataset):
    """`views` transformed copies of an image, and its label."""

    source: data.Dataset
    transform: Callable
    views: int = 1

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple:
        image = T.functional.to_pil_image(self.source.images[i])
        return *(self.transform(image) for _ in range(self.views)), self.source.labels[i]

    def endless_batches(self, size: int) -> Iterator[list[Tensor]]:
        workers = min(os.cpu_count(), 8)
        while True:
            yield from torch.utils.data.DataLoader(self, size, shuffle=True, num_workers=workers)


class Textbook:
    """The same work, written as in a tutorial."""

    def __init__(self, opt, device: torch.device):
        self.opt = opt
        self.device = device
        images = noise_images(opt)
        first = torch.arange(opt.batch_size)
        self.x = images.pixels(first).contiguous().to(device)
        self.y = images.labels[first].to(device)
        crop = T.Compose(
            [
                T.RandomCrop(opt.image_size, padding=opt.image_size // 8),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
            ]
        )
        simclr = T.Compose(
            [
                T.RandomResizedCrop(opt.image_size),
                T.RandomHorizontalFlip(),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                T.RandomGrayscale(0.2),
                T.ToTensor(),
            ]
        )
        self.batches = TransformedImages(images, crop).endless_batches(opt.batch_size)
        self.pairs = TransformedImages(images, simclr, views=2).endless_batches(opt.batch_size)
        self.classifier, self.classifier_sgd = new_model(cem.ParametricCEM, opt, device)
        self.encoder, self.encoder_sgd = new_model(cem.NonParametricCEM, opt, device)
        self.embedded = self.encoder.eval()(self.x).detach()

    def supervised_step(self) -> None:
        x, y = (tensor.to(self.device) for tensor in next(self.batches))
        model = self.classifier.train()
        x_adv = textbook_pgd(x, lambda v: F.cross_entropy(model(v), y), self.opt.steps, EPS)
        self.classifier_sgd.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        self.classifier_sgd.step()

    def unsupervised_step(self) -> None:
        x, x_plus, _ = (tensor.to(self.device) for tensor in next(self.pairs))
        model = self.encoder.train()
        with torch.no_grad():
            z_plus = model(x_plus)
        x_adv = textbook_pgd(
            x, lambda v: cem.info_nce(model(v), z_plus, TEMPERATURE), self.opt.steps, EPS
        )
        self.encoder_sgd.zero_grad()
        cem.info_nce(model(x_adv), model(x_plus), TEMPERATURE).backward()
        self.encoder_sgd.step()

    def attack(self) -> None:
        model = self.classifier.eval()
        textbook_pgd(self.x, lambda v: F.cross_entropy(model(v), self.y), self.opt.steps, EPS)

    def parametric_sampler(self, name: str) -> None:
        model = self.classifier.eval()
        log_p = cem.PARAMETRIC_SAMPLERS[name]
        textbook_pgd(self.x, lambda v: log_p(model(v), self.y).sum(), self.opt.steps)

    def pgd_sampler(self) -> None:
        model = self.encoder.eval()
        textbook_pgd(
            self.x,
            lambda v: cem.info_nce(model(v), self.embedded, TEMPERATURE),
            self.opt.steps,
        )

    def maxent_sampler(self) -> None:
        model = self.encoder.eval()

        def entropy(v: Tensor) -> Tensor:
            z = model(v)
            diagonal = torch.eye(len(z), dtype=torch.bool, device=self.device)
            f = (z @ z.T / TEMPERATURE).masked_fill(diagonal, -torch.inf)
            return -f.logsumexp(1).sum()

        textbook_pgd(self.x, entropy, self.opt.steps)

    def torchattacks_pgd(self) -> None:
        library = importlib.import_module("torchattacks")
        model = self.classifier.eval()
        attack = library.PGDL2(model, eps=EPS, alpha=STEP_SIZE, steps=self.opt.steps)
        attack(self.x, self.y)

    def work(self) -> dict[str, Callable]:
        """The names of `Ours.work` -> the textbook's step."""
        work = {
            "supervised training step": self.supervised_step,
            "unsupervised training step": self.unsupervised_step,
            "attack": self.attack,
            "sampler pgd": self.pgd_sampler,
            "sampler maxent": self.maxent_sampler,
            "attack, against torchattacks": self.torchattacks_pgd,
        }
        for name in cem.PARAMETRIC_SAMPLERS:
            work[f"sampler {name}"] = functools.partial(self.parametric_sampler, name)
        return work
