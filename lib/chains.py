"""The chains of energy-based training: a replay buffer, or chains that grow."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import cem
from lib import data, distributed


class ReplayBuffer(nn.Module):
    """SGLD chains, continued from one training step to the next (Grathwohl et al., 2020).

    fresh(n, generator) -> (n, C, H, W) creates chains, initially and, with probability `reinit`,
    whenever one is drawn: uniform noise by default; GaussianSeeds.sample is another choice.
    `images` (size, C, H, W), in half precision, is a buffer of the module.
    """

    def __init__(self, size: int, shape: Sequence[int], reinit=0.05, fresh: Callable | None = None):
        super().__init__()
        self.reinit = reinit
        self.shape = tuple(shape)
        self.fresh = fresh or self._uniform
        self.register_buffer("images", torch.empty(0, dtype=torch.float16))
        self.images = self.fresh(size, None).half()

    def _uniform(self, n: int, generator) -> Tensor:
        like = dict(dtype=self.images.dtype, device=self.images.device)
        return torch.rand(n, *self.shape, generator=generator, **like).float()

    def sample(self, potential: Callable, n: int, generator=None, **options) -> Tensor:
        """n distinct chains, n at most the buffer's size, climb a potential (cem.ascend's options)
        and are stored again -> x_s (n, C, H, W), detached."""
        device = self.images.device
        index = torch.randperm(len(self.images), generator=generator, device=device)[:n]
        drawn = torch.rand(n, 1, 1, 1, generator=generator, device=device)
        x = self.images[index].float()
        x = torch.where(drawn < self.reinit, self.fresh(n, generator), x)
        x = cem.ascend(potential, x, norm="none", generator=generator, **options)
        self.images[index] = x.half()
        return x


def mixed(names: Sequence[str], network: nn.Module, y: Tensor, which: Tensor) -> Callable:
    """The potential of a classifier in which image i climbs names[which[i]] of class y[i]."""

    def potential(x: Tensor) -> Tensor:
        logits = network(x)
        values = torch.stack([cem.PARAMETRIC_SAMPLERS[name](logits, y) for name in names])
        return values.gather(0, which[None])[0]

    return potential


def chain_starts(where: str, data_dir: str, seeds, device) -> Callable:
    """-> start(labels (N,) or N, generator) -> images (N, C, H, W): seeds.sample if `where` is
    "gaussian", else images of this dataset, folder or npz file, drawn with replacement.

    seeds: GaussianSeeds, or the ClusterSeeds of an encoder.
    """
    if where == "gaussian":
        return seeds.sample
    size = 0 if where in data.NAMES else seeds.shape[-1]
    images = data.images(where, "train", data_dir, size)
    shape, wanted = tuple(images.shape[1:]), seeds.shape
    cem.require(shape == wanted, f"--chain-start has images of {shape}, the dataset of {wanted}")
    images = images.to(device)
    like = torch.empty(0, device=device)

    def start(labels: int | Tensor, generator) -> Tensor:
        n = labels if isinstance(labels, int) else len(labels)
        drawn = generator.draw(torch.rand, (n,), like)
        return images[(drawn * len(images)).long()].float().div(255)

    return start


@torch.no_grad()
def with_statistics_of(x: Tensor, model: nn.Module) -> nn.Module:
    """A copy of the model whose BatchNorms hold the statistics of the images x (N, C, H, W).

    SGLD climbs this copy, the function that the loss sees. Running statistics lag: samples with low
    energy under them have high energy in the loss, and JEM diverges.
    """
    model = copy.deepcopy(model).requires_grad_(False).eval()

    def store(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        wide = inputs[0].to(norm.running_var.dtype)
        norm.running_var, norm.running_mean = torch.var_mean(wide, (0, 2, 3), correction=0)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(store) for norm in norms]
    model(x)
    for hook in hooks:
        hook.remove()
    return model


class GrowingChains(nn.Module):
    """The chains of dual adversarial training (arXiv:2510.13872), and their curriculum.

    Every chain starts anew, and takes T - 2 to T steps of `step_size` along the l2-normalised
    gradient, the same number in all processes. T, at first 5, grows by one, up to `longest`, when
    samples are easily told from data: when the mean AUC of log p(x) over 8 training steps exceeds
    0.8. (In the paper all take T steps, from 0 on, and the AUC is that of f(x, y).) `offsets` are
    the b of the loss, for log p(x) and for log p(y | x): the midpoints between the means of data
    and of all samples in the first step.
    """

    def __init__(self, longest: int, step_size: float, samplers: Sequence[str] = ()):
        super().__init__()
        self.longest = longest
        self.samplers = tuple(samplers)
        self.step_size = step_size
        self.register_buffer("length", torch.tensor(min(5, longest)))  # T
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("auc_sum", torch.tensor(0.0))  # since T was last reviewed
        self.register_buffer("offsets", torch.zeros(2))

    def sample(self, potential: Callable, x: Tensor, generator) -> Tensor:
        """The images x (N, C, H, W) after their chains."""
        length = self.length.item()
        steps = torch.randint(max(length - 2, 1), length + 1, (), generator=generator.host)
        return cem.ascend(potential, x, steps=steps.item(), step_size=self.step_size)

    def begin(self, logits: Tensor, y: Tensor) -> None:
        """Set the offsets, in the first step, from equal numbers of data and sample logits."""
        means = cem.log_marginal(logits).mean(), cem.log_posterior(logits, y).mean()
        self.offsets.copy_(distributed.mean(torch.stack(means)))

    @property
    def settings(self) -> dict[str, dict]:
        """Of the samplers, for the checkpoint: a few more steps than in training work best."""
        ascent = dict(steps=self.length.item() + 4, step_size=self.step_size, noise=0.0, norm="l2")
        return {name: ascent for name in self.samplers}

    @torch.no_grad()
    def update(self, log_p: Tensor, log_p_s: Tensor) -> dict[str, Tensor]:
        """After a training step, with log p (N,) of its data and of its samples: lengthen the
        chains when that is due -> metrics for the log."""
        real, drawn = map(distributed.gather_on_device, (log_p, log_p_s))
        auc = ((real[:, None] - drawn).sign().mean() + 1) / 2
        self.updates += 1
        self.auc_sum = self.auc_sum.to(auc.device) + auc  # read at every eighth step only
        if self.updates % 8 == 0:
            if self.auc_sum > 8 * 0.8:
                self.length.add_(1).clamp_(max=self.longest)
            self.auc_sum.zero_()
        return {
            "energy": -log_p.mean(), "energy_s": -log_p_s.mean(),
            "energy_gap": log_p.mean() - log_p_s.mean(), "auc": auc,
            "chain_steps": log_p.new_full((), self.length.item()),
        }  # fmt: skip


def dual_state(opt, model: nn.Module, samplers: Sequence[str]) -> nn.ModuleDict:
    """The chains of dat and, with --keep, the network that it starts from."""
    state = nn.ModuleDict()
    state["chains"] = GrowingChains(opt.dat_max_steps, opt.dat_step_size, samplers)
    if opt.keep:
        state["reference"] = cem.folded(model)
    return state
