"""The paper's table from one command: trains what is missing, draws images, scores them.

    python reproduce.py                                     # digits, minutes on a laptop
    python reproduce.py --dataset cifar10 --budget 6h       # shortened to fit; 90m, 2d
    python reproduce.py --dataset cifar10 --full            # the paper's recipe, on GPUs
    python reproduce.py --rows sup-cs,unsup-maxent-cond     # a part of it

Writes table.md, table.json and grids.png into --out. If it is interrupted, the same
command resumes; finished parts with the same options are reused.
"""

import importlib
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import cem
from lib import budget, cli, data, distributed, files, metrics, paper, pictures
from lib.cli import option
from lib.device import pick_device
from lib.markdown import percent, table
from lib.parts import Parts, digest, drawn, evaluated

SAMPLERS = {  # of each model: a classifier, its second stage, an encoder, a larger encoder
    "sup": ["seeds", *cem.PARAMETRIC_SAMPLERS],
    "dat": list(cem.PARAMETRIC_SAMPLERS),
    "unsup": ["seeds", *cem.NON_PARAMETRIC_SAMPLERS, "pgd-cond", "maxent-cond"],
    "unsup50": ["pgd", "maxent", "pgd-cond", "maxent-cond"],  # with --full only
}
RECIPES = {  # what each training adds to its script's defaults
    "judge": "--loss st --seed 100", "sup": "", "dat": "--loss dat", "unsup": "",
    "unsup50": "--arch resnet50",
}  # fmt: skip
ROWS = [f"{model}-{sampler}" for model in SAMPLERS for sampler in SAMPLERS[model]]


@dataclass
class Options:
    dataset: str = option("digits", data.HELP)
    data_dir: str = option("data", data.DIR_HELP, metavar="PATH")
    budget: str = option("", "time for all of it, such as 90m, 6h or 2d")
    full: bool = option(False, "the paper's recipe")
    rows: str = option(
        "", "rows of the table, such as sup-cs,unsup-maxent-cond; "
        "--budget is still shared out as for all (default: all)"
    )  # fmt: skip
    weights: str = option(
        "",
        "FID Inception's weights (default: downloaded with --full or, but for digits, on a GPU)",
        metavar="PATH",
    )
    image_size: int = option(0, data.IMAGE_SIZE, least=0)
    out: str = option("runs/reproduce", "folder of runs, samples and table", "run", metavar="PATH")
    device: str = option("auto", cli.DEVICE, "run")
    quiet: bool = option(False, cli.QUIET, "run")


def wanted_rows(opt: Options) -> list[str]:
    known = [row for row in ROWS if opt.full or not row.startswith("unsup50")]
    rows = cli.names("--rows", opt.rows, known) if opt.rows else known
    return [row for row in known if row in rows]


# ----------------------------------------------------------------------------------------- parts


class Reproduction:
    """The trainings, samples and scores for the rows of the table.

    plan: for each training, the options added to its recipe; n: samples of a row; n_eval: test
    images under attack, 0 for all. inception: whether Inception also scores the samples.
    """

    def __init__(self, opt: Options, inception: bool):
        self.opt = opt
        self.inception = inception
        self.folder = Path(opt.out)
        common = ["--device", opt.device] + ["--quiet"] * opt.quiet
        self.parts = Parts(self.folder / "done.json", common)
        self.data_options = ["--data-dir", opt.data_dir]
        self.data_options += ["--image-size", opt.image_size] * bool(opt.image_size)
        self.data = ["--dataset", opt.dataset, *self.data_options]
        key = [opt.dataset, opt.image_size, opt.budget, opt.full, distributed.world_size()]
        self.plan_file = self.folder / f"plan-{digest(key)}.json"
        self.measured = self.folder / f"measured-{digest(key)}"
        self.plan = self.make_plan()

    def make_plan(self) -> dict:
        """That of an earlier call with these options, or a new one."""
        plan = files.read_json(self.plan_file)
        if not distributed.any_process(plan is None):
            return plan
        if self.opt.budget:
            if distributed.rank() == 0:
                shutil.rmtree(self.measured, ignore_errors=True)  # of a call that was killed
            distributed.barrier()
            try:
                plan = budget.shortened(self, sum(not row.startswith("unsup50") for row in ROWS))
            finally:
                if distributed.rank() == 0:
                    shutil.rmtree(self.measured, ignore_errors=True)
        else:
            judge = f"{budget.JUDGE} --epochs {budget.EPOCHS['judge']}" if self.opt.full else ""
            n = 50_000 if self.opt.full else 1000
            plan = {"options": {"judge": judge}, "n": n, "n_eval": 0}
        distributed.barrier()
        if distributed.rank() == 0:
            files.write_json(self.plan_file, plan)
        return plan

    def training(self, model: str, options=None, first_stage: Path | None = None) -> list[str]:
        """The script that trains a model and its options (default: the plan's), without --out."""
        script = "train_unsup.py" if model.startswith("unsup") else "train_sup.py"
        options = self.plan["options"].get(model, "") if options is None else options
        words = [script, *map(str, self.data), *shlex.split(f"{RECIPES[model]} {options}")]
        if model == "dat":
            words += ["--init", str(first_stage or self.train("sup"))]
        return words

    def full(self, model: str) -> str:
        """What --full has in place of a shortened training's options, where they differ."""
        script, *words = self.training(model, "")
        module = importlib.import_module(script.removesuffix(".py"))

        def options_of(more: str) -> dict:
            argv = [*words, *shlex.split(more), *self.parts.common]
            return vars(cli.parse(module.Options, module.__doc__, module.preset, argv))

        more = self.plan["options"].get(model, "") if "minutes" in self.plan else ""
        now, full = options_of(more), options_of("")
        return cli.as_flags({name: full[name] for name in now if now[name] != full[name]})

    def train(self, model: str) -> Path:
        """The model's checkpoint, in a folder of its own for each choice of options."""
        words = self.training(model)
        run = self.folder / f"{model}-{digest(words)}"
        more = ["--out", run, "--resume", "--on-diverge", "restart"]
        return self.parts.run(run / "ckpt.pt", *words, *more)

    def accuracy(self, model: str) -> dict:
        ckpt = self.train(model)
        name = "probe.json" if model.startswith("unsup") else "accuracy.json"
        words = [*self.data, "--n", self.plan["n_eval"]]
        return evaluated(self.parts, ckpt, *words, name=name, alone=True)

    def draw(self, row: str) -> Path:
        """The samples of a row, .npz."""
        model, sampler, cond = paper.split(row)
        return drawn(self.parts, self.train(model), sampler, self.plan["n"], cond)

    def scores(self, rows: list[str]) -> dict[str, dict]:
        """Row -> its figures by the judge and, if the plan has it, by Inception."""
        figures = {row: {} for row in rows}
        words = ["--samples", *map(self.draw, rows), "--ref", self.opt.dataset, *self.data_options]
        networks = {"judge": ["--features", self.train("judge")]}
        if self.inception:
            weights = ["--weights", self.opt.weights] if self.opt.weights else []
            networks["inception"] = ["--features", "inception", *weights]
        for name, network in networks.items():
            out = self.folder / f"scores-{digest(words + network)}.json"
            self.parts.run(out, "eval_is_fid.py", *words, *network, "--out", out)
            found = files.read_json(out)
            for row, scores in zip(rows, found["rows"]):
                # precision and recall remain the judge's
                figures[row] = scores | figures[row] | {name: found["network"]}
        return figures


def use_inception(opt: Options) -> bool:
    """Whether IS and FID are computed: with --weights or --full, else on a GPU if the weights
    download, but not of digits."""
    device = pick_device(opt.device)
    if not (opt.weights or opt.full) and (opt.dataset == "digits" or device.type != "cuda"):
        return False
    problem = ""
    try:
        metrics.Inception(opt.weights, device)
    except cem.CEMError as error:
        if opt.weights or opt.full:
            raise
        problem = str(error)
    missing = distributed.any_process(problem != "")
    if missing:
        cli.warn(f"{problem or 'a process has no Inception weights'}: C-IS and C-FD only")
    return not missing


def announce(job: Reproduction, models: list[str]) -> None:
    plan = job.plan
    planned = {part: f", {minutes:g} minutes" for part, minutes in plan.get("minutes", {}).items()}
    for model in ["judge", *models]:
        options = " ".join([RECIPES[model], plan["options"].get(model, "")]).strip()
        print(f"{model}: {options or 'defaults'}{planned.get(model, '')}")
    networks = "Inception and the judge" if job.inception else "the judge"
    print(f"samples: {plan['n']:,} a row{planned.get('samples', '')}")
    print(f"accuracies, scores: by {networks}{planned.get('scores', '')}", flush=True)


# ----------------------------------------------------------------------------------------- table


def text(content: dict) -> str:
    """table.md, from the content of table.json."""
    plan, figures = content["plan"], content["rows"]
    cut = " (`--full`: 50,000)" if "minutes" in plan else ""
    lines = [f"# {content['dataset']}, {plan['n']:,} samples a row{cut}", ""]
    lines += [f"    {content['command']}", ""]
    for model, found in content["accuracies"].items():
        shown = []
        for key, name in {"clean_accuracy": "clean", "pgd-20": "PGD-20"}.items():
            shown.append(f"{name} {percent(found[key], *found['intervals'][key])} %")
        line = f"- `{model}`: {', '.join(shown)} of {found['n']:,} test images"
        if "knn_accuracy" in found:
            knn = percent(found["knn_accuracy"], *found["intervals"]["knn_accuracy"])
            line += f"; k-NN {knn} % of all"
        lines += [f"{line}.", f"  `{content['trainings'][model]}`"]
        if content["full"][model]:
            lines.append(f"  `--full` has `{content['full'][model]}`.")
    if "minutes" in plan:
        judge = f"trains the judge for {budget.EPOCHS['judge']} epochs"
        lines.append(f"- `--full` adds `unsup50-*`, a ResNet-50, and {judge}.")
    rows = [paper.cells(row, found, content["dataset"]) for row, found in figures.items()]
    lines += ["", table(rows, bold=False)]  # C-FD does not rank classifiers against encoders
    distances = ["FID"] * all(map(paper.published, figures.values())) + ["C-FD"]
    lines += [line for name in distances for line in paper.order(figures, name)]
    lines.append(paper.NOTES.format(judge=content["trainings"]["judge"]))
    return "\n".join(lines) + "\n"


def write(job: Reproduction, accuracies: dict, figures: dict) -> str:
    """table.md, table.json and grids.png; -> the content of the first."""
    content = {"command": cli.command(), "dataset": job.opt.dataset, "plan": job.plan}
    models = ["judge", *accuracies]
    content["trainings"] = {m: shlex.join(["python", *job.training(m)]) for m in models}
    content["full"] = {model: job.full(model) for model in accuracies}
    content |= {"parts": job.parts.used, "accuracies": accuracies, "rows": figures}
    shown = text(content)
    samples = {row: job.draw(row) for row in figures}
    if distributed.rank() == 0:
        grids = {row: path.with_suffix(".png") for row, path in samples.items()}
        for row, path in grids.items():
            if not path.exists():
                pictures.write_grid(path, pictures.grid(*data.read_npz(samples[row])))
        files.write_json(job.folder / "table.json", content)
        files.write_text(job.folder / "table.md", shown)
        pictures.write_overview(job.folder / "grids.png", grids)
    return shown


def check(opt: Options) -> None:
    digits = opt.dataset == "digits"
    cem.require(not (opt.budget and opt.full), "--budget shortens what --full runs: choose one")
    chosen = opt.budget or opt.full
    cem.require(not digits or not chosen, "digits need neither --budget nor --full")
    cem.require(digits or chosen, f"--dataset {opt.dataset} needs a --budget such as 6h, or --full")
    if opt.budget:
        budget.seconds(opt.budget)
    found = data.exists(opt.dataset)
    cem.require(found, f"--dataset {opt.dataset} not found: see python train_sup.py --help")
    n = distributed.world_size()
    cem.require(128 % n == 0, f"{n} processes cannot split batches of 128 evenly: use 2, 4 or 8")
    folder = Path(opt.out)
    files.make_folder(folder)
    files.lock(folder, f"another process is running in {folder}: use another --out")
    files.check_output(folder / "done.json", files.json_with("finished"))
    beside = (folder / "table.md", folder / "grids.png")
    files.check_output(folder / "table.json", files.json_with("command", "plan", "rows"), *beside)


def main() -> None:
    opt = cli.parse(Options, __doc__)
    rows = wanted_rows(opt)
    check(opt)
    job = Reproduction(opt, use_inception(opt))
    models = list(dict.fromkeys(paper.split(row)[0] for row in rows))
    announce(job, models)
    accuracies, figures = {}, {}
    for model in models:
        accuracies[model] = job.accuracy(model)
        figures |= job.scores([row for row in rows if paper.split(row)[0] == model])
        shown = write(job, accuracies, figures)
    print(f"\n{shown}\nwrote table.md, table.json and grids.png in {job.folder}")


if __name__ == "__main__":
    cli.run(main)
