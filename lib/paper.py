"""The paper's table, and ours beside it (used by reproduce.py)."""

import itertools
import math

from lib.markdown import Figure, percent

FIGURES = {  # row -> IS and FID on CIFAR-10, 50,000 samples
    "sup-ta": (9.26, 56.72),
    "sup-langevin": (9.65, 63.34),
    "sup-cs": (9.77, 56.26),
    "sup-rcs": (9.80, 55.91),
    "unsup-pgd": (5.35, 74.27),
    "unsup-maxent": (8.24, 41.80),
    "unsup-pgd-cond": (5.85, 68.54),
    "unsup-maxent-cond": (8.68, 36.44),
    "unsup50-pgd": (5.24, 141.54),
    "unsup50-maxent": (9.57, 44.86),
    "unsup50-pgd-cond": (5.37, 137.68),
    "unsup50-maxent-cond": (9.61, 40.25),
}
PUBLISHED = "inception-6726825d"  # with these weights IS and FID are called so
NOTES = (
    "The paper's figures are of CIFAR-10 and 50,000 samples; fewer raise FID and lower IS. C-IS, "
    "C-FD, precision, recall and `wanted` are by a separate classifier, `{judge}`. ± is the "
    "standard deviation of an IS over ten parts and the standard error of a Fréchet distance; "
    "intervals are 95 %. `table.json` also has kernel distances, density and coverage."
)


def split(row: str) -> tuple[str, str, bool]:
    """A row's model and sampler, and whether its seeds are those of classes."""
    model, _, sampler = row.partition("-")
    return model, sampler.removesuffix("-cond"), sampler.endswith("-cond")


def published(found: dict) -> bool:
    """Whether a row's IS and FID are those of the published weights."""
    return found.get("inception", "").startswith(PUBLISHED)


def order(figures: dict[str, dict], distance: str) -> list[str]:
    """Lines on whether the samplers of a model have the paper's order, in pairs with the same
    seeds. A gap below twice its standard error decides nothing."""
    counts = {"agree": 0, "disagree": 0, "are within the error bars": 0}
    for a, b in itertools.combinations([row for row in figures if row in FIGURES], 2):
        (model_a, _, cond_a), (model_b, _, cond_b) = split(a), split(b)
        if (model_a, cond_a) != (model_b, cond_b):
            continue
        gap = figures[a][distance] - figures[b][distance]
        error = math.hypot(*(figures[row].get(f"{distance} std", math.inf) for row in (a, b)))
        if abs(gap) <= 2 * error:
            counts["are within the error bars"] += 1
        else:
            same = gap * (FIGURES[a][1] - FIGURES[b][1]) > 0
            counts["agree" if same else "disagree"] += 1
    listed = ", ".join(f"{n} {what}" for what, n in counts.items())
    line = f"Pairs of samplers, their order by {distance} against the paper's by FID: {listed}."
    return [line, ""] if any(counts.values()) else []


def cells(row: str, found: dict, dataset: str) -> dict:
    """A line of the table, from the figures of eval_is_fid.py and the key of its `inception`."""
    line = {"row": f"`{row}`"}
    paper = FIGURES.get(row)
    if "FID" in found:
        by = "" if published(found) else f" by {found['inception']}"
        for i, name in enumerate(("IS", "FID")):
            line[f"{name}{by}"] = Figure(found[name], 2, found.get(f"{name} std"))
            if published(found) and dataset == "cifar10":
                line[f"{name} - paper's"] = f"{found[name] - paper[i]:+.2f}" if paper else "–"
        if "FID∞" in found:
            line[f"FID∞{by}"] = Figure(found["FID∞"], 2)
    for name, figure in zip(("paper's IS", "paper's FID"), paper or (None, None)):
        line[name] = f"{figure:.2f}" if figure else "–"
    line["C-IS"] = Figure(found["C-IS"], 2, found["C-IS std"])
    line["C-FD"] = Figure(found["C-FD"], 1, found.get("C-FD std"))
    if "C-FD∞" in found:
        line["C-FD∞"] = Figure(found["C-FD∞"], 1)
    for name in ("precision", "recall"):
        line[name] = Figure(found[name], 2)
    line["wanted, %"] = "–"
    if "wanted" in found:
        line["wanted, %"] = percent(*(found[f"wanted{end}"] for end in ("", " low", " high")))
    return line
