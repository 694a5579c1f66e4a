"""Rewrite the tables of the README files, and results/reproduce-*.md, from their JSON files.

    python results/tables.py            # in the repository's root, after a JSON file has changed
    python results/tables.py --check    # writes nothing; also links, scripts, files in results/

A table stands between <!-- table: NAME --> and <!-- end -->. Bold is the best figure of a column,
if it is ahead of the second best by more than twice the error of their difference. Errors, after ±,
are over seeds or splits, "NAME std" in the JSON or, of shares of n images, binomial."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cem
import reproduce
from lib import cli, files, markdown
from lib.markdown import between, figure, percent, share

END = "<!-- end -->"
SHIPPED = {  # row of the front page -> samplers, in the order of its last cell
    "classifier, first stage": "ta langevin cs rcs",
    "`sup.pt`, its second stage": "seeds ta langevin cs rcs",
    "encoder, first stage": "seeds pgd maxent",
    "`unsup.pt`, its second stage": "seeds pgd maxent marginal",
}


@dataclass
class Options:
    check: bool = cli.option(False, "write nothing; fail if a table differs or a link is broken")


def by_sampler(record: dict) -> dict[str, dict]:
    return {Path(row["samples"]).stem.removeprefix("samples-"): row for row in record["rows"]}


# ---------------------------------------------------------------------------------------- tables
# A function per table: from the content of its JSON files to its rows.


def shipped(*records: dict) -> Iterator[dict]:
    for (label, samplers), accuracy, scores in zip(SHIPPED.items(), records[::2], records[1::2]):
        row = {"model": label}
        for name, key in (("clean", "clean_accuracy"), ("PGD-20", "adversarial_accuracy")):
            row[name] = str(share(accuracy, key))  # never bold: the models do not compete
        found = by_sampler(scores)
        distances = [f"`{name}` {figure(found[name], 'C-FD')}" for name in samplers.split()]
        yield row | {"C-FD of 1,000 images, by [sampler](#samplers)": ", ".join(distances)}


def cards(real: dict, *records: dict) -> Iterator[dict]:
    (judge,) = real["rows"]  # of test images, `wanted` is its accuracy
    interval = {"clean_accuracy": (judge["wanted low"], judge["wanted high"])}
    judge |= {"ckpt": "judge.pt", "clean_accuracy": judge["wanted"], "intervals": interval}
    keys = {"clean, %": "clean_accuracy", "PGD-20, %": "pgd-20", "AutoAttack, %": "autoattack"}
    rows = {}
    for found in (*records, judge):  # of two figures the later one
        name = f"`{Path(found['ckpt']).name}`"
        row = rows.setdefault(name, {"file": name} | dict.fromkeys(keys, "–"))
        for column, key in keys.items():
            if key in found:
                row[column] = f"{percent(found[key], *found['intervals'][key])} of {found['n']:,}"
    yield from rows.values()


def sup(second: dict, first: dict, real: dict) -> Iterator[dict]:
    for name, scores in (by_sampler(second) | {"": real["rows"][0]}).items():
        row = {"1,000 images": f"[`{name}`](sup-{name}.png)" if name else "test images"}
        row["C-FD"] = figure(scores, "C-FD")
        row |= {key: figure(scores, key, 2) for key in ("precision", "recall")}
        row["wanted"] = share(scores, "wanted")
        row["C-FD, first stage"] = figure(by_sampler(first)[name], "C-FD") if name else "–"
        yield row if name else {column: str(cell) for column, cell in row.items()}  # never bold


def dual(record: dict) -> Iterator[dict]:
    """By the first judge."""
    for run in record["rows"]:
        seed = f", seed {run['seed']}" if run["seed"] else ""
        row = {"variant": run["variant"].replace("lambda", "λ") + seed}
        row |= {key: figure(run, key) for key in ("clean", "PGD-20")}
        for name in cem.PARAMETRIC_SAMPLERS:
            row[f"`{name}`"] = replace(figure(run, f"{name} 1"), least=True)
        yield row


def unsup_at(record: dict) -> Iterator[dict]:
    found = by_sampler(record)
    for name in ("seeds", "pgd", "maxent"):
        row = {"": f"[`{name}`](unsup-at-{name}-cond.png)"}
        for scores, cond in ((found[name], ""), (found[f"{name}-cond"], ", `--cond`")):
            row[f"C-FD{cond}"] = figure(scores, "C-FD")
        row["C-IS"] = figure(found[name], "C-IS", 2)
        yield row | {"wanted, `--cond`": share(scores, "wanted")}


def unsup(record: dict) -> Iterator[dict]:
    found = by_sampler(record)
    for name in ("seeds", "pgd", "maxent", "neighbour", "marginal", "maxent-marginal"):
        row = {"second stage": f"`{name}`"}
        for scores, seeds in ((found[name], "clusters"), (found[f"{name}-cond"], "`--cond`")):
            row[f"C-FD, {seeds}"] = figure(scores, "C-FD")
        yield row | {"wanted, `--cond`": share(scores, "wanted")}


def digits(first: dict, second: dict) -> Iterator[dict]:
    first, second = by_sampler(first), by_sampler(second)
    for name in ("seeds", "pgd", "maxent", "neighbour", "marginal", "maxent-marginal"):
        row = {"": f"`{name}`", "one Gaussian": figure(first[name], "C-FD")}
        row["second stage, clusters"] = figure(second[name], "C-FD")
        row["class-wise (`--cond`)"] = figure(first[f"{name}-cond"], "C-FD")
        yield row | {"second stage, class-wise": figure(second[f"{name}-cond"], "C-FD")}


LOSSES = {  # column -> kind of figure, key, unit or digits
    "minutes": (figure, "minutes", 1),
    "clean": (share, "clean_accuracy", ""),
    "PGD-20": (share, "pgd-20", ""),
    "AutoAttack": (share, "autoattack", ""),
    "ECE": (figure, "calibration_error", 3),
    "AUROC noise": (figure, "auroc_noise", 3),
    "AUROC constant": (figure, "auroc_constant", 3),
    "AUROC digits": (figure, "auroc_digits", 3),
    "AUROC held-out": (figure, "auroc_held-out", 3),
    "C-FD `cs`": (figure, "c-fd_cs", 1),
    "C-FD `langevin`": (figure, "c-fd_langevin", 1),
}


def losses(record: dict, held_out: dict | None = None) -> Iterator[dict]:
    """Mean ± standard deviation over the runs that did not diverge. held_out: of runs of their own,
    without some classes."""
    more = held_out["rows"] if held_out else {}
    rows = [run for runs in record["rows"].values() for run in runs]
    measured = {key for row in [*rows, *more.values()] for key in row}
    for loss, runs in record["rows"].items():
        finished = [more.get(loss, {}) | run for run in runs if "diverged" not in run]
        row = {"": f"`{loss}`"}
        if len(runs) > 1:
            row["finished"] = f"{len(finished)} of {len(runs)}"
        for column, (kind, key, form) in LOSSES.items():
            cells = [kind(run, key, form) for run in finished if key in run]
            if len(cells) > 1:
                values = [cell.value for cell in cells]
                cells = [replace(cells[0], value=mean(values), error=stdev(values))]
            if key in measured and (key != "minutes" or len(runs) == 1):  # many share the cores
                row[column] = cells[0] if cells else "–"
        yield row


def finetune(record: dict) -> Iterator[dict]:
    for start in ("nothing", "encoder"):
        row = {"": "from the encoder" if start == "encoder" else "from scratch"}
        for run in record["rows"]:
            if run["start"] == start:
                labels = f"{100 * run['share']:g} %"
                for name in ("clean", "PGD-20", "AutoAttack"):
                    if LOSSES[name][1] in run:
                        row[f"{labels}, {name}"] = share(run, LOSSES[name][1], "")
        yield row


def bench(record: dict, *float32: dict) -> Iterator[dict]:
    ratios = {row["what"]: figure(row, "ratio", 2) for other in float32 for row in other["rows"]}
    for run in record["rows"]:
        row = {"": re.sub("sampler (.+)", r"sampler `\1`", run["what"])}
        row["ratio"] = between(run["ratio"], run["lowest"], run["highest"], 2)
        gpu = "share_of_peak" in run
        row["images/s"] = figure(run, "images_per_second", 0 if gpu else 1)
        row["textbook"] = figure(run, "textbook", 0 if gpu else 1)
        if gpu:
            row["of peak"] = f"{run['share_of_peak']:.1%}"
        else:
            row["GFLOP/s"] = figure(run, "GFLOP_per_second", 0)
            row["ratio in float32"] = ratios.get(run["what"], "–")
        yield row


def leaderboard(record: dict) -> Iterator[dict]:
    for run in record["rows"]:
        row = {key: run[key] for key in ("recipe", "machine")}
        row["minutes"] = figure(run, "minutes", 1 if run["minutes"] < 10 else 0)
        row |= {key: share(run, key, "") for key in ("clean", "PGD-20")}
        yield row | {"AutoAttack": share(run, "AutoAttack", "") if "AutoAttack" in run else "–"}


def ablations(record: dict) -> Iterator[dict]:
    for run in record["rows"]:
        yield {"recipe": run["recipe"]} | {key: figure(run, key) for key in ("clean", "PGD-10")}


def cost(record: dict) -> Iterator[dict]:
    for run in record["rows"]:
        row = {"images": run["batch_size"], "steps": run["steps"], "width": run["width"]}
        row["seconds"] = figure(run, "seconds", 3)
        yield row | {"relative arithmetic": figure(run, "arithmetic", 2)}


TABLES = {  # document -> marker -> function and its JSON files
    "README.md": {
        "shipped": (shipped, "sup-at-accuracy sup-at sup-accuracy sup "
                    "unsup-at-probe unsup-at unsup-probe unsup"),
    },
    "results/README.md": {
        "sup": (sup, "sup sup-at real"),
        "dual-cifar10": (dual, "dual-cifar10"),
        "unsup-at": (unsup_at, "unsup-at"),
        "unsup": (unsup, "unsup"),
        "finetune-cifar10": (finetune, "finetune-cifar10"),
        "digits-unsup": (digits, "digits-unsup digits-unsup-dat"),
        "losses-digits": (losses, "losses-digits"),
        "losses-cifar10": (losses, "losses-cifar10 held-out"),
    },
    "checkpoints/README.md": {
        "cards": (cards, "real sup-autoattack unsup-autoattack sup-accuracy unsup-probe")},
    "bench/README.md": {
        "leaderboard": (leaderboard, "leaderboard"),
        "five-epochs": (ablations, "five-epochs"), "ablations": (ablations, "ablations"),
        "bench-cpu": (bench, "bench-cpu bench-cpu-float32"), "bench-cuda": (bench, "bench-cuda"),
        "cost-cpu": (cost, "cost-cpu"),
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------- documents


def made(document: str, name: str) -> str:
    """The table as its JSON files give it. Raises CEMError if they lack a figure."""
    function, stems = TABLES[document][name]
    folder = "bench" if document == "bench/README.md" else "results"
    sources = [f"{folder}/{stem}.json" for stem in stems.split()]
    try:
        records = [json.loads(Path(source).read_text()) for source in sources]
        return markdown.table(function(*records))
    except (ValueError, KeyError) as error:
        problem = f"table {name} cannot be made from {', '.join(sources)}"
        raise cem.CEMError(f"{problem}: {type(error).__name__} {error}") from error


def rewritten(document: str) -> tuple[str, list[str]]:
    """The document's text with new tables, and the names of those that differ."""
    text, differ = Path(document).read_text(), []
    for name in re.findall("<!-- table: (.*?) -->", text):
        cem.require(name in TABLES[document], f"{document}: unknown table {name}")
    for name in TABLES[document]:
        start = f"<!-- table: {name} -->"
        cem.require(text.count(start) == 1, f"{document}: table {name} needs one marker {start}")
        before, rest = text.split(start)
        old, end, after = rest.partition(END)
        closed = end != "" and "<!-- table:" not in old
        cem.require(closed, f"{document}: table {name} is not closed by {END}")
        new = f"\n\n{made(document, name)}\n"
        if new != old:
            differ.append(name)
        text = before + start + new + end + after
    return text, differ


def orphans() -> list[str]:
    """Files in results/ that its README names neither in backticks, as a glob, nor in a link."""
    mentioned = re.findall(r"`([^`\s]+)`|\]\(([^)\s]+)\)", Path("results/README.md").read_text())
    names = {"README.md", "*.py"} | {name or link for name, link in mentioned}
    found = sorted(path.name for path in Path("results").iterdir() if path.is_file())
    return [name for name in found if not any(fnmatchcase(name, known) for known in names)]


def main() -> None:
    opt = cli.parse(Options, __doc__)
    problems = []
    documents = {name: rewritten(name) for name in TABLES}  # all, before one is written
    for name in sorted({path.stem for path in Path("results").glob("reproduce-*")}):
        content = json.loads(Path(f"results/{name}.json").read_text())
        document, text = Path(f"results/{name}.md"), reproduce.text(content)
        same = document.exists() and document.read_text() == text
        documents[str(document)] = text, [] if same else ["reproduce"]
    for document, (text, differ) in documents.items():
        if differ and not opt.check:
            files.write_text(Path(document), text)
            print(f"{document}: rewrote {', '.join(differ)}")
        problems += [f"{document}: table {name} differs from its JSON" for name in differ]
    if opt.check:
        for document in map(Path, [*TABLES, *sorted(Path("docs").glob("*.md"))]):
            problems += [f"{document}: no {name}" for name in markdown.broken_links(document)]
        for folder in ("results", "bench"):
            document = Path(folder, "README.md")
            problems += [f"{document}: no {name}" for name in markdown.missing_files(document)]
        problems += [f"results/README.md does not mention {name}" for name in orphans()]
        cem.require(not problems, "; ".join(problems))


if __name__ == "__main__":
    cli.run(main)
