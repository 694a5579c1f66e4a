"""The paper's table from one command: its plan, its parts, what it compares."""

import json
import math
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import assert_refused, files, script, succeeded
from PIL import Image
from test_scripts import write_folder
from test_survival import ForkedScript, launch

import cem
import reproduce
from lib import budget, cli, data, metrics, paper, parts, pictures

SMALL = "--arch resnet18 --width 8 --epochs 1 --ema 0.5 --seed-rank 4"
COMMAND = "--dataset set --budget 1m --rows sup-cs,unsup-maxent".split()
OUT = Path("runs/reproduce")


@pytest.fixture
def folder(tmp_path):
    """A small dataset, and a plan of it."""
    write_folder(tmp_path / "set", per_class=12)
    write_plan(tmp_path)
    return tmp_path


def write_plan(folder, processes=1, **options):
    options = dict.fromkeys(("judge", "sup", "unsup"), SMALL) | options
    digest = parts.digest(["set", 0, "1m", False, processes])
    (folder / OUT).mkdir(parents=True, exist_ok=True)
    plan = {"options": options, "n": 20, "n_eval": 0}
    (folder / OUT / f"plan-{digest}.json").write_text(json.dumps(plan))


def table_of(folder) -> list:
    names = [file for file in files(folder / OUT) if file.endswith((".npz", "grids.png"))]
    return [(folder / OUT / name).read_bytes() for name in ("table.md", *names)]


# ---------------------------------------------------------------------------------- the whole thing


@pytest.mark.slow
def test_killed_at_five_moments_it_ends_with_the_same_table(folder, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    write_folder(whole / "set", per_class=12)
    write_plan(whole)
    succeeded(ForkedScript("reproduce.py", *COMMAND, cwd=whole).wait())
    finished = folder / OUT / "done.json"

    def parts():
        return len(json.loads(finished.read_text())["finished"]) if finished.exists() else 0

    moments = [lambda: list(folder.glob(f"{OUT}/sup-*/ckpt.pt"))]
    moments += [lambda n=n: parts() >= n for n in (1, 3, 5, 8)]
    for moment in moments:
        process = ForkedScript("reproduce.py", *COMMAND, cwd=folder)
        process.wait_for(moment)
        process.send(signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
    done = succeeded(ForkedScript("reproduce.py", *COMMAND, cwd=folder).wait())
    assert "\npython train_sup.py" not in done.stdout  # finished before
    assert table_of(folder) == table_of(whole)


@pytest.mark.slow
def test_parts_are_reused_where_their_options_agree(folder):
    succeeded(script("reproduce.py", *COMMAND, cwd=folder))
    first = json.loads((folder / OUT / "table.json").read_text())
    assert list(first["rows"]) == ["sup-cs", "unsup-maxent"]
    assert "C-FD" in first["rows"]["sup-cs"] and "FID" not in first["rows"]["sup-cs"]
    done = script("reproduce.py", *COMMAND, cwd=folder)
    assert done.returncode == 0 and "\npython " not in done.stdout
    (checkpoint,) = folder.glob(f"{OUT}/sup-*/ckpt.pt")
    evaluation = ["--ckpt", checkpoint, "--attacks", "margin", "--n", 20]
    succeeded(script("eval_robust.py", *evaluation, cwd=folder))
    (grid,) = folder.glob(f"{OUT}/sup-*/samples-*/samples-cs.png")
    before = grid.read_bytes()
    grid.unlink()
    done = script("reproduce.py", *COMMAND, cwd=folder)
    assert done.returncode == 0 and "\npython " not in done.stdout, done.stderr
    assert grid.read_bytes() == before
    assert json.loads((folder / OUT / "table.json").read_text())["rows"] == first["rows"]
    grid.with_suffix(".npz").rename(folder / "elsewhere.npz")
    with mock.patch.object(parts, "call"):
        done = script("reproduce.py", *COMMAND, cwd=folder)
    assert_refused(done, "samples-cs.npz: delete what is left of it, samples-cs.*, and repeat")
    (folder / "elsewhere.npz").rename(grid.with_suffix(".npz"))
    write_plan(folder, sup=f"{SMALL} --seed 1")
    done = succeeded(script("reproduce.py", *COMMAND, cwd=folder))
    for name, again in (("train_sup", True), ("sample.py", True), ("train_unsup", False)):
        assert (f"\npython {name}" in done.stdout) == again
    second = json.loads((folder / OUT / "table.json").read_text())
    assert second["rows"]["unsup-maxent"] == first["rows"]["unsup-maxent"]
    assert second["rows"]["sup-cs"] != first["rows"]["sup-cs"]


def small_networks():
    budget.JUDGE = small = "--arch resnet18 --width 8 --batch-size 8"
    budget.NETWORKS = [(small, small)]
    budget.EPOCHS = dict.fromkeys(budget.EPOCHS, 1)


@pytest.mark.slow
def test_two_processes_make_one_plan_and_one_table(tmp_path):
    write_folder(tmp_path / "set", per_class=80)
    options = [*COMMAND, "--budget", "4m"]
    done = succeeded(launch(2, "reproduce.py", *options, cwd=tmp_path, prepare=small_networks))
    # the first process alone prints: three measured in two parts, then sup and judge
    assert done.stdout.count("\npython train_sup.py") == 3 * 2 + 2
    content = json.loads((tmp_path / OUT / "table.json").read_text())
    assert list(content["rows"]) == ["sup-cs", "unsup-maxent"]
    assert content["rows"]["sup-cs"]["n"] == content["plan"]["n"]
    shown = (tmp_path / OUT / "table.md").read_text()
    full = "--arch resnet50 --width 64 --epochs 150 --batch-size 256"
    assert f"\n  `--full` has `{full}`.\n" in shown


@pytest.mark.slow
def test_a_budget_is_measured_and_planned(tmp_path, monkeypatch):
    small = "--arch resnet18 --width 8"
    monkeypatch.setattr(budget, "JUDGE", small)
    monkeypatch.setattr(budget, "NETWORKS", [(small, small)])
    write_folder(tmp_path / "set", per_class=12)
    options = "--dataset set --budget 0.6m --rows dat-cs".split()
    succeeded(script("reproduce.py", *options, cwd=tmp_path, TORCHELASTIC_MAX_RESTARTS="1"))
    names = files(tmp_path / OUT)
    assert not [name for name in names if name.startswith("measured")]
    table = json.loads((tmp_path / OUT / "table.json").read_text())
    assert table["plan"]["n"] >= 100
    assert set(table["plan"]["minutes"]) == {*budget.SHARES, "plan", "samples", "scores"}
    shown = (tmp_path / OUT / "table.md").read_text()
    assert f"--epochs {budget.EPOCHS['dat']}" in shown
    assert "`--full` has" not in shown  # the same
    assert "- `--full` adds `unsup50-*`" in shown
    done = script("reproduce.py", *options, cwd=tmp_path)
    assert done.returncode == 0 and "\npython " not in done.stdout
    assert files(tmp_path / OUT) == names


# ------------------------------------------------------------------------------------------- plan


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """plan(budget, speed): the plan on a machine that trains `speed` images of 50,000 a second with
    width 16, and as slower as networks are wider."""
    calls = []

    def make(limit, speed, inception=None):
        def measured(job, model, options, minutes, first_stage=None):
            calls.append((model, minutes))
            width = int(options.partition("--width ")[2].split()[0]) if "--width" in options else 64
            if model == "dat":
                width = int(first_stage.stem)
            paper = not options and model != "dat"
            return Path(f"{width}.pt"), speed * 16 / width / (10 if paper else 1)

        monkeypatch.setattr(budget, "measured", measured)
        monkeypatch.setattr(budget, "sampling_rate", lambda job, ckpt: speed / 20)
        monkeypatch.setattr(budget, "inception_cost", lambda job, samples: inception)
        monkeypatch.setattr(budget, "read_once", lambda *_: range(50_000))
        opt = SimpleNamespace(budget=limit, dataset="set", data_dir="data", image_size=0)
        calls.clear()
        job = SimpleNamespace(opt=opt, folder=tmp_path, inception=inception is not None)
        return budget.shortened(job, 17), list(calls)

    return make


def value_of(options: str, name: str) -> float:
    return float(options.split(f"--{name} ")[1].split()[0])


@pytest.mark.parametrize("limit, speed", [("60m", 500), ("60m", 2000), ("6h", 2000), ("25m", 8000)])
def test_a_plan_fills_the_time_and_no_more(plan, limit, speed):
    made, calls = plan(limit, speed)
    total = budget.seconds(limit) / 60
    assert max(minutes for _, minutes in calls) <= min(total / 60, 1)
    minutes = made["minutes"]
    assert minutes["samples"] == pytest.approx(17 * made["n"] / (speed / 20) / 60, abs=0.05)
    assert 0.5 * total < sum(minutes.values()) < total
    for model, share in budget.SHARES.items():
        assert minutes[model] <= share * total
        assert value_of(made["options"][model], "epochs") <= budget.EPOCHS[model]


def test_inception_takes_its_time_from_the_plan(plan):
    """50,000 images of the training set, and those of the rows."""
    without, _ = plan("60m", 2000)
    made, _ = plan("60m", 2000, inception=(100, 0))
    longer = (50_000 + 17 * made["n"]) / 100 / 60
    assert made["minutes"]["scores"] > longer and made["n"] < without["n"]
    assert sum(made["minutes"].values()) < 60
    assert made["minutes"]["sup"] < 0.87 * without["minutes"]["sup"]  # 8.3 of 60 minutes less
    with pytest.raises(cem.CEMError, match="Inception takes 83 minutes for the training images"):
        plan("60m", 2000, inception=(10, 0))
    slow, _ = plan("60m", 2000, inception=(100, 6))  # seconds for the distances of a row
    assert slow["n"] < made["n"] and sum(slow["minutes"].values()) < 60
    assert slow["minutes"]["scores"] > made["minutes"]["scores"]


def test_inception_is_timed(monkeypatch, tmp_path):
    class Network:
        def __init__(self, weights, device):
            assert weights == "w.pth"

        def __call__(self, images):
            time.sleep(0.001 * len(images))
            return [torch.zeros(len(images), 2)], torch.zeros(len(images), 2)

    monkeypatch.setattr(metrics, "Inception", Network)
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((120, 8, 8, 3), np.uint8))
    job = SimpleNamespace(opt=SimpleNamespace(weights="w.pth", device="cpu"))
    with mock.patch.object(metrics, "frechet_distance", lambda *_: time.sleep(0.01)):
        rate, row = budget.inception_cost(job, tmp_path / "s.npz")
    assert 100 < rate < 1000 and 0.1 < row < 1


def test_the_plan_is_announced(capsys):
    minutes = {"judge": 1.5, "sup": 9, "samples": 2.5, "scores": 4}
    plan = {"options": {"judge": "", "sup": "--epochs 4"}, "minutes": minutes, "n": 1200}
    reproduce.announce(SimpleNamespace(plan=plan, inception=True), ["sup"])
    assert capsys.readouterr().out.splitlines() == [
        "judge: --loss st --seed 100, 1.5 minutes",
        "sup: --epochs 4, 9 minutes",
        "samples: 1,200 a row, 2.5 minutes",
        "accuracies, scores: by Inception and the judge, 4 minutes",
    ]


def test_the_network_grows_with_the_time(plan):
    def width(limit):
        options = plan(limit, 2000)[0]["options"]
        assert ("--width" in options["sup"]) == ("--width" in options["unsup"])
        return value_of(options["sup"], "width") if "--width" in options["sup"] else "the paper's"

    assert [width(time) for time in ("20m", "45m", "2h", "2d")] == [16, 32, 64, "the paper's"]


def test_less_than_an_epoch_is_a_share_of_the_images(plan):
    made, _ = plan("20m", 280)
    assert 0 < value_of(made["options"]["dat"], "share") < 1
    assert value_of(made["options"]["dat"], "epochs") == 1
    with pytest.raises(cem.CEMError, match="too short for an epoch of the encoder: try 15m"):
        plan("5m", 300)
    plan("15m", 300)


def test_a_second_stage_is_planned_slower_than_its_first_minute(monkeypatch, tmp_path):
    rates = iter([0.0, 320.0, 320.0])

    def load(path):
        return SimpleNamespace(extra={"training": {"images_per_second": next(rates)}})

    calls = []
    monkeypatch.setattr(budget, "call", lambda *words: calls.append(words))
    monkeypatch.setattr(budget.cem, "load", load)
    opt, common = SimpleNamespace(budget="1m"), SimpleNamespace(common=[])
    job = SimpleNamespace(training=lambda *_: [], measured=tmp_path, parts=common, opt=opt)
    with pytest.raises(cem.CEMError, match="--budget 1m is too short: sup has not trained a step"):
        budget.measured(job, "sup", "", 1)
    assert [words[-2:] for words in calls] == [("--max-minutes", 0.25), ("--max-minutes", 0.75)]
    assert [budget.measured(job, model, "", 1)[1] for model in ("sup", "dat")] == [320, 320 / 1.5]


def test_a_plan_leaves_out_the_time_that_measuring_took(plan, monkeypatch):
    clock = iter([0, 900, 1800])
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    made, _ = plan("60m", 500)
    assert made["minutes"].pop("plan") == 30
    assert sum(made["minutes"].values()) < 30


def test_budgets():
    times = [budget.seconds(text) for text in ("90m", "6h", "1.5d")]
    assert times == [5400, 21600, 129600]


def test_what_a_training_sets_does_not_reach_the_next_part(monkeypatch):
    """A measured budget must not change figures: sampling runs without cudnn.benchmark."""
    seen = []

    def main():
        seen.append((torch.backends.cudnn.benchmark, sys.argv[1:]))
        torch.backends.cudnn.benchmark = True
        cli.AT_END.callback(seen.append, "unlocked")

    monkeypatch.setitem(sys.modules, "part", SimpleNamespace(main=main))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # whichever test ran before
    before = list(sys.argv)
    for _ in range(2):
        parts.call("part.py", "--n", 3)
    assert seen == [(False, ["--n", "3"]), "unlocked"] * 2
    assert sys.argv == before and not torch.backends.cudnn.benchmark


def test_a_dataset_is_read_once_for_all_parts(tmp_path, monkeypatch):
    write_folder(tmp_path / "set")
    reads, folder = [], data._folder
    monkeypatch.setattr(data, "_folder", lambda *args: reads.append(args[1]) or folder(*args))
    options = ["--dataset", tmp_path / "set", "--arch", "resnet18", "--width", 8, "--loss", "st"]
    for k in range(2):
        more = ["--epochs", 1, "--n-eval", 2, "--quiet", "--out", tmp_path / f"run{k}"]
        parts.call("train_sup.py", *options, *more)
    assert reads == ["train", "test"]
    first, second = (cem.load(tmp_path / f"run{k}/ckpt.pt").state_dict() for k in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)  # it was not changed


def test_overview_shows_every_grid_under_its_name(tmp_path):
    grids = {}
    for name, level in (("a", 50), ("b", 100), ("c", 200)):
        grids[name] = tmp_path / f"{name}.png"
        pictures.write_grid(grids[name], torch.full((3, 40, 60), level, dtype=torch.uint8))
    pictures.write_overview(tmp_path / "all.png", grids, columns=2)
    whole = torch.from_numpy(np.asarray(Image.open(tmp_path / "all.png")).astype(int))
    assert whole.shape == (2 * (20 + 16), 2 * 30, 3)  # halves, with a line of text
    for i, level in enumerate((50, 100, 200)):
        top, left = i // 2 * 36, i % 2 * 30
        assert bool((whole[top + 16 : top + 36, left : left + 30] == level).all())
        assert whole[top : top + 16, left : left + 30].min() < 128  # the name


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options, part",
    [
        ("--dataset cifar10", "needs a --budget"),
        ("--budget 6h", "digits need neither --budget nor --full"),
        ("--dataset nothing --full", "--dataset nothing not found"),
        ("--dataset cifar10 --budget 6h --full", "choose one"),
        ("--dataset cifar10 --budget 0h", "90m, 6h or 2d"),
        ("--dataset cifar10 --budget six", "90m, 6h or 2d"),
        ("--rows sup-cs,sup-nothing", "unknown 'sup-nothing'"),
        ("--rows unsup50-pgd", "unknown 'unsup50-pgd'"),  # with --full only
        ("--rows ,", "unknown ''"),
        ("--weights missing.pth", "missing.pth not found"),
    ],
)
def test_errors(tmp_path, options, part):
    assert_refused(script("reproduce.py", *options.split(), cwd=tmp_path), part)
    assert files(tmp_path) == []


def test_files_of_the_users_stay(tmp_path):
    (tmp_path / OUT).mkdir(parents=True)
    for name in ("table.md", "table.json", "done.json", "grids.png"):
        path = tmp_path / OUT / name
        path.write_text("mine")
        assert_refused(script("reproduce.py", cwd=tmp_path), name)
        assert path.read_text() == "mine"
        path.unlink()


# ------------------------------------------------------------------------------------------ table


def test_every_row_of_the_paper_has_a_sampler():
    assert set(paper.FIGURES) <= set(reproduce.ROWS)
    for row in reproduce.ROWS:
        model, sampler, cond = paper.split(row)
        kind = cem.NON_PARAMETRIC_SAMPLERS if model.startswith("unsup") else cem.PARAMETRIC_SAMPLERS
        assert sampler in [*kind, "seeds"] and (not cond or kind is cem.NON_PARAMETRIC_SAMPLERS)


def test_order_counts_pairs_of_one_model_beyond_the_error_bars():
    """The paper: rcs < cs < ta < langevin, of unsup maxent < pgd, with either kind of seeds."""
    distances = {"sup-rcs": 1, "sup-cs": 1.5, "sup-ta": 9, "sup-langevin": 5, "sup-seeds": 90}
    distances |= {"unsup-pgd": 20, "unsup-maxent": 9, "unsup-maxent-cond": 30}
    found = {row: {"FID": value, "FID std": 0.3} for row, value in distances.items()}
    line, _ = paper.order(found, "FID")
    # rcs and cs lie within 2 x 0.42; langevin before ta is the wrong way round
    assert line.endswith("5 agree, 1 disagree, 1 are within the error bars.")
    assert paper.order({"sup-cs": found["sup-cs"]}, "FID") == []  # no pair
    del found["sup-rcs"]["FID std"]  # its three pairs are not decided
    line, _ = paper.order(found, "FID")
    assert line.endswith("3 agree, 1 disagree, 3 are within the error bars.")


FOUND = {"IS": 9.5, "IS std": 0.1, "FID": 50.0, "FID std": 0.5, "C-IS": 9.0, "C-IS std": 0.1}
FOUND |= {
    "FID∞": 48.0,
    "C-FD∞": 2.5,
    "C-FD": 3.0,
    "C-FD std": 0.2,
    "precision": 0.5,
    "recall": 0.25,
}


def test_only_published_weights_give_a_fid():
    line = paper.cells("sup-cs", FOUND | {"inception": "inception-6726825d-torch"}, "cifar10")
    assert str(line["FID"]) == "50.00 ± 0.50" and line["FID - paper's"] == "-6.26"
    assert line["paper's FID"] == "56.26" and line["IS - paper's"] == "-0.27"
    line = paper.cells("sup-cs", FOUND | {"inception": "inception-6726825d-torch"}, "svhn")
    assert "FID" in line and "FID - paper's" not in line
    assert str(line["FID∞"]) == "48.00" and str(line["C-FD∞"]) == "2.5"
    assert not paper.published({"C-FD": 3.0})
    line = paper.cells("sup-cs", FOUND | {"inception": "inception-00c0ffee-torch"}, "cifar10")
    assert not {"FID", "IS", "FID - paper's"} & line.keys()
    assert str(line["FID by inception-00c0ffee-torch"]) == "50.00 ± 0.50"


@pytest.mark.parametrize("weights, shown", [("6726825d", True), ("00c0ffee", False)])
def test_the_order_by_fid_is_that_of_the_published_weights(weights, shown):
    rows = {
        row: FOUND | {"inception": f"inception-{weights}-torch"} for row in ("sup-cs", "sup-ta")
    }
    content = {"command": "python reproduce.py", "dataset": "cifar10", "plan": {"n": 1000}}
    content |= {"accuracies": {}, "trainings": {"judge": "python train_sup.py"}, "rows": rows}
    text = reproduce.text(content)
    assert ("order by FID" in text) == shown and "order by C-FD" in text


@pytest.mark.slow
def test_stand_in_weights_give_figures_of_their_own_name(folder, inception_weights):
    options = ["--weights", inception_weights, "--rows", "sup-cs"]
    done = script("reproduce.py", *COMMAND[:-2], *options, cwd=folder)
    assert done.returncode == 0 and "not comparable with published ones" in done.stderr
    header, row = (folder / OUT / "table.md").read_text().split("\n| ")[1:3]
    key = metrics.Inception(inception_weights, torch.device("cpu")).key
    assert f"| IS by {key} | FID by {key} | paper's IS | paper's FID |" in header
    found = json.loads((folder / OUT / "table.json").read_text())["rows"]["sup-cs"]
    assert found["inception"] == key and math.isfinite(found["FID"] + found["IS"])
    assert row.startswith(f"`sup-cs` | {found['IS']:.2f} ± ")


def test_precision_stays_the_judges(tmp_path):
    def run(out, script, *words):
        by = "FID" if "inception" in words else "C-FD"
        row = {by: 3.0, "precision": {"FID": 0.9, "C-FD": 0.5}[by]}
        out.write_text(json.dumps({"network": "n", "rows": [row]}))

    job = SimpleNamespace(
        draw=lambda row: Path("s.npz"), train=lambda model: Path("j.pt"), folder=tmp_path,
        data_options=[], inception=True, opt=SimpleNamespace(dataset="digits", weights=""),
        parts=SimpleNamespace(run=run),
    )  # fmt: skip
    (row,) = reproduce.Reproduction.scores(job, ["sup-cs"]).values()
    assert row["precision"] == 0.5 and {"FID", "C-FD"} <= row.keys()


def test_full_trains_the_papers_models_by_their_own_defaults(tmp_path, monkeypatch):
    commands = {}

    def run(self, product, *words, **_):
        commands[product.parent.name.split("-")[0], product.stem] = " ".join(map(str, words))
        return product

    monkeypatch.setattr(parts.Parts, "run", run)
    opt = reproduce.Options(dataset="cifar10", full=True, out=str(tmp_path))
    job = reproduce.Reproduction(opt, inception=True)
    rows = reproduce.wanted_rows(opt)
    assert set(paper.FIGURES) <= set(rows) and job.plan["n_eval"] == 0
    for row in rows:
        job.draw(row)
    trained = {model: words for (model, kind), words in commands.items() if kind == "ckpt"}
    data = "--dataset cifar10 --data-dir data"
    assert trained["sup"].startswith(f"train_sup.py {data} --out ")
    assert trained["unsup"].startswith(f"train_unsup.py {data} --out ")
    assert trained["unsup50"].startswith(f"train_unsup.py {data} --arch resnet50 --out ")
    drawn = [words for words in commands.values() if words.startswith("sample.py")]
    assert drawn and all("--n 50000 " in words for words in drawn)


def test_a_plan_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def shortened(job, rows):
        job.measured.mkdir(parents=True)
        raise cem.CEMError("too short")

    monkeypatch.setattr(budget, "shortened", shortened)
    write_folder(tmp_path / "set")
    done = script("reproduce.py", *COMMAND, cwd=tmp_path)
    assert_refused(done, "too short")
    assert not (tmp_path / OUT).exists()
