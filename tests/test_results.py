"""results/tables.py: tables are what their JSON files say; links and files in results/."""

import json
import math
import shutil
from pathlib import Path

import pytest
import tables
from conftest import ROOT, assert_refused, script, succeeded

import cem
from lib import robustness
from lib.markdown import Figure, rounded, share, table


def tables_of(folder: Path, *options):
    return script("results/tables.py", *options, cwd=folder)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def repository(tmp_path):
    """A copy of the documents and JSON files, with empty pictures and scripts."""

    def copy(source, target):
        if Path(source).suffix in (".md", ".json"):
            shutil.copy(source, target)
        else:
            Path(target).touch()

    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("results", "bench", "docs", "lib"):
        shutil.copytree(ROOT / name, tmp_path / name, copy_function=copy, ignore=ignored)
    (tmp_path / "checkpoints").mkdir()
    others = [*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "LICENSE"]
    for path in [*others, ROOT / "checkpoints/README.md"]:
        copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


def test_the_documents_agree_with_the_json_files():
    done = succeeded(tables_of(ROOT, "--check"))
    assert done.stdout == ""


# ---------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "file, old, new, named",
    [
        ("results/sup.json", "11.3546", "11.6546", ["README.md: table shipped", "table sup "]),
        ("results/sup-accuracy.json", "0.86549", "0.86649", ["table shipped", "table cards"]),
        ("results/unsup-at.json", "0.152083", "0.45", ["results/README.md: table unsup-at"]),
        ("results/dual-cifar10.json", "36.9035", "36.8", ["table dual-cifar10"]),
        ("results/digits-unsup-dat.json", "1.86682", "2.4", ["table digits-unsup"]),
        ("results/losses-digits.json", "5.13217", "9.13217", ["table losses-digits"]),
        ("results/losses-cifar10.json", "19.2312", "20", ["table losses-cifar10"]),
        ("bench/bench-cpu-float32.json", "1.984", "1.884", ["bench/README.md: table bench-cpu"]),
        ("results/finetune-cifar10.json", "0.60299", "0.61299", ["table finetune-cifar10"]),
        ("bench/bench-cuda.json", "1.993", "1.893", ["bench/README.md: table bench-cuda"]),
        ("bench/ablations.json", "76.9", "75.9", ["bench/README.md: table ablations"]),
        ("bench/cost-cpu.json", "0.6678", "0.6", ["bench/README.md: table cost-cpu"]),
        ("bench/leaderboard.json", "0.7972", "0.7872", ["bench/README.md: table leaderboard"]),
        ("results/reproduce-digits.json", '"C-IS": 9.', '"C-IS": 8.', ["table reproduce"]),
        ("results/reproduce-digits.md", "PGD-20 8", "PGD-20 9", ["reproduce-digits.md: table"]),
        ("results/README.md", "| 33.3 ± 0.3 |", "| 33.2 ± 0.3 |", ["results/README.md: table sup"]),
    ],
)
def test_a_changed_figure_is_named_and_rewritten(file, old, new, named, repository):
    change(repository / file, old, new)
    done = tables_of(repository, "--check")
    assert_refused(done, *named)
    assert done.stderr.count(" differs ") == len(named)
    succeeded(tables_of(repository))
    succeeded(tables_of(repository, "--check"))


def test_rewriting_is_idempotent(repository):
    change(repository / "results/sup.json", "11.3546", "11.6546")
    assert "results/README.md: rewrote sup" in tables_of(repository).stdout
    documents = [repository / name for name in tables.TABLES]
    before = [(path.read_text(), path.stat().st_mtime_ns) for path in documents]
    assert tables_of(repository).stdout == ""
    assert [(path.read_text(), path.stat().st_mtime_ns) for path in documents] == before


START = "<!-- table: sup -->"


@pytest.mark.parametrize(
    "old, new, message",
    [
        (START, "", f"table sup needs one marker {START}"),
        (START, f"{START}\n{START}", f"table sup needs one marker {START}"),
        (START, f"<!-- table: mine -->\n<!-- end -->\n{START}", "unknown table mine"),
        ("<!-- end -->", "", "table sup is not closed by <!-- end -->"),
    ],
)
def test_markers_that_are_missing_or_unclosed(old, new, message, repository):
    change(repository / "results/README.md", old, new)
    for options in ([], ["--check"]):
        assert_refused(tables_of(repository, *options), f"results/README.md: {message}")


@pytest.mark.parametrize("new", ['"C-FD of old"', "C-FD"])
def test_a_json_file_without_a_figure(new, repository):
    change(repository / "results/sup.json", '"C-FD"', new)
    assert_refused(tables_of(repository), "table shipped", "results/sup.json")


# ------------------------------------------------------------------------------- figures and bold


def test_figures_are_rounded_half_up_after_removing_float32_noise():
    assert rounded(100 * 0.6014999747276306, 1) == "60.2"
    assert [rounded(x, 2) for x in (2.985, 0.565, 1e-9, 4)] == ["2.99", "0.57", "0.00", "4.00"]
    assert [rounded(x, 1) for x in (1e24, -math.inf, math.nan)] == ["1e+24", "-inf", "nan"]


def test_the_error_of_a_share_is_binomial_and_never_0():
    """Close to √(p (1 - p) / n); of 200 hits of 200, Wilson's interval is as wide."""
    assert str(share({"p": 0.1, "n": 10_000}, "p")) == "10.0 ± 0.3 %"
    all_of_200 = share({"p": 1.0, "n": 200}, "p")
    assert all_of_200.value == 100 and all_of_200.error == pytest.approx(0.69, abs=0.01)
    assert share({"p": 1.0}, "p").error is None


@pytest.mark.parametrize(
    "first, second, bold",
    [
        (Figure(9.0, error=0.3), Figure(8.0, error=0.3), True),  # 1 > 2 x 0.42
        (Figure(9.0, error=0.4), Figure(8.0, error=0.4), False),  # 1 < 2 x 0.57
        (Figure(9.0, error=0.0), Figure(9.0, error=0.0), False),
        (Figure(9.0), Figure(1.0, error=0.1), False),
        (Figure(9.0, error=0.1), Figure(1.0), False),
        (Figure(9.0, error=0.1), "–", False),
    ],
)
def test_bold_is_the_best_only_outside_the_errors(first, second, bold):
    for column in ([first, second], [second, first, Figure(-9.0)]):
        assert ("**9.0**" in table({"": cell} for cell in column)) == bold
        assert table({"": cell} for cell in column).count("**") == 2 * bold
        assert "**" not in table(({"": cell} for cell in column), bold=False)


def test_bold_is_ahead_of_every_other_figure():
    column = [Figure(9.0, error=0.1), Figure(8.0, error=0.1), Figure(7.0, error=3.0)]
    assert "**" not in table({"": cell} for cell in column)
    column[2] = Figure(7.0)
    assert "**9.0**" in table({"": cell} for cell in column)


def test_less_is_better_of_distances():
    rows = [{"C-FD": 9.25, "C-FD std": 0.2}, {"C-FD": 3.2, "C-FD std": 0.1}]
    lines = table({"": "x", "C-FD": tables.figure(row, "C-FD")} for row in rows).splitlines()
    assert lines == ["| | C-FD |", "|---|---|", "| x | 9.3 ± 0.2 |", "| x | **3.2** ± 0.1 |"]


def test_shares_of_n_images_have_the_binomial_error(repository):
    """99.5 against 96.5 % of 1,000 images differ, of 40 they do not."""
    for n, bold in ((1000, "| **99.5** ± 0.3 % |"), (40, "| 99.5 ± 3.3 % |")):
        change(repository / "results/sup.json", '"n": 1000', f'"n": {n}')
        tables_of(repository)
        assert bold in (repository / "results/README.md").read_text()


def test_errors_are_printed_once_the_json_files_have_them(repository):
    change(repository / "results/dual-cifar10.json", '"ta 1"', '"ta 1 std": 0.3, "ta 1"')
    tables_of(repository)
    assert "| 36.5 ± 0.3 |" in (repository / "results/README.md").read_text()


@pytest.mark.parametrize("name", ["losses", "dual", "finetune"])
def test_a_file_of_the_user_is_not_replaced_by_a_table(name, tmp_path):
    path = tmp_path / f"results/{name}-digits.json"
    path.parent.mkdir()
    path.write_text("mine")
    done = script(f"results/{name}.py", "--name", "digits", cwd=tmp_path)
    assert_refused(done, f"{name}-digits.json exists and this script did not write it")
    assert path.read_text() == "mine"
    if name != "finetune":  # their scores need error bars
        done = script(f"results/{name}.py", "--n-samples", 19, cwd=tmp_path)
        assert_refused(done, "--n-samples must be at least 20")


QUICK = "--share 0.1 --attack-steps 1 --dat-max-steps 3 --n-eval 10 --seed-rank 4"  # a second stage


def test_losses_at_chosen_epochs_and_first_stage(digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "autoattack", lambda model, x, y, opt: y < 0)  # finds all
    first = digits_run / "runs/sup/ckpt.pt"
    options = ["--losses", "dat", "--epochs", 1, "--seeds", 0, "--first-stage", first]
    options += ["--options", f"--width 8 {QUICK}", "--judge", first]
    options += ["--evaluation", "--n 10 --restarts 1 --ood digits"]
    options += ["--n-samples", 50, "--autoattack", 1]
    done = succeeded(script("results/losses.py", *options, cwd=tmp_path))
    (row,) = json.loads((tmp_path / "results/losses-digits.json").read_text())["rows"]["dat"]
    (last,) = tmp_path.glob("runs/losses/digits-dat-0-*/ckpt.pt")
    seconds = sum(cem.load(ckpt).extra["training"]["seconds"] for ckpt in (first, last))
    assert row["minutes"] == pytest.approx(seconds / 60)
    assert "--epochs 1" in row["commands"][0] and f"--init {first}" in row["commands"][0]
    assert (row["n"], row["autoattack n"]) == (10, 1)
    assert row["autoattack"] == 0 and 0 <= row["auroc_digits"] <= 1
    assert {"c-fd_cs", "c-fd_rcs", "c-fd_langevin"} <= row.keys()
    table, _ = done.stdout.split("wrote results/losses-digits.json")
    assert table.endswith(f"{row['c-fd_langevin']:.1f} ± {row['c-fd_langevin std']:.1f} |\n")
    again = script("results/losses.py", *options, cwd=tmp_path)
    assert "python " not in again.stdout  # nothing is repeated
    assert json.loads((tmp_path / "results/losses-digits.json").read_text())["rows"]["dat"] == [row]
    more = ["--evaluation", "--n 12 --restarts 1"]
    more = script("results/losses.py", *options, *more, cwd=tmp_path)
    assert more.stdout.count("python ") == more.stdout.count("python eval_robust.py") == 2
    (other,) = json.loads((tmp_path / "results/losses-digits.json").read_text())["rows"]["dat"]
    assert other["n"] == 12 and "auroc_digits" not in other
    longer = script("results/losses.py", *options, "--epochs", 2, cwd=tmp_path)
    assert all(f"python {name}" in longer.stdout for name in ("train_sup.py", "eval_is_fid.py"))
    refused = script("results/losses.py", *options, "--epochs", 1, 2, cwd=tmp_path)
    assert_refused(refused, "--epochs needs 1 numbers, for dat")


def test_dual_trains_each_variant_and_judges_four_samplers(digits_run, tmp_path):
    first = digits_run / "runs/sup/ckpt.pt"
    options = ["--init", first, "--seeds", 1, "--judges", first, "--evaluation", "--n 20"]
    options += ["--variants", "recipe", "lambda 3", "--options", f"--epochs 1 {QUICK}"]
    options += ["--n-samples", 50]
    succeeded(script("results/dual.py", *options, cwd=tmp_path))
    rows = json.loads((tmp_path / "results/dual-digits.json").read_text())["rows"]
    assert [(row["variant"], row["seed"]) for row in rows] == [("recipe", 1), ("lambda 3", 0)]
    assert "--likelihood-weight 3" in rows[1]["command"]
    for row in rows:
        (run,) = tmp_path.glob(f"runs/dual/digits-{row['variant'].replace(' ', '-')}-*")
        (measured,) = run.glob("accuracy-*/accuracy.json")
        found = json.loads(measured.read_text())
        assert row["PGD-20"] == 100 * found["pgd-20"] and found["n"] == 20
        assert row["minutes"] == cem.load(run / "ckpt.pt").extra["training"]["seconds"] / 60
        (judged,) = run.glob("samples-50/scores-*.json")
        distances = {r["samples"]: r["C-FD"] for r in json.loads(judged.read_text())["rows"]}
        for path, distance in distances.items():
            name = Path(path).stem.removeprefix("samples-")
            assert row[f"{name} 1"] == distance and 0 < row[f"{name} 1 std"] < distance
        assert len(set(distances.values())) == 4
    again = script("results/dual.py", *options, cwd=tmp_path)
    assert "python " not in again.stdout  # nothing is repeated
    assert json.loads((tmp_path / "results/dual-digits.json").read_text())["rows"] == rows


def test_finetune_trains_twice_with_each_share_of_the_labels(unsup_run, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "autoattack", lambda model, x, y, opt: y < 3)
    options = ["--encoder", unsup_run / "runs/unsup/ckpt.pt", "--shares", 0.1, 0.5]
    options += ["--epochs", 2, 1, "--options", "--width 8 --loss st"]
    options += ["--evaluation", "--n 20 --attacks pgd-20 autoattack"]
    done = succeeded(script("results/finetune.py", *options, cwd=tmp_path))
    assert "| from the encoder |" in done.stdout and "| 10 %, AutoAttack |" in done.stdout
    record = json.loads((tmp_path / "results/finetune-digits.json").read_text())
    found = [(row["start"], row["share"]) for row in record["rows"]]
    assert found == [(s, x) for x in (0.1, 0.5) for s in ("nothing", "encoder")]
    assert all(row["autoattack"] <= 0.3 for row in record["rows"])
    assert len({(row["clean_accuracy"], row["pgd-20"]) for row in record["rows"]}) > 1
    made = []
    for path in (tmp_path / "runs/finetune").glob("*/options.json"):
        trained = json.loads(path.read_text())
        start = "encoder" if trained["init"] else "nothing"
        assert path.parent.name.startswith(start)
        made.append((trained["share"], trained["epochs"], start))
    assert sorted(made) == [
        (share, epochs, start)
        for share, epochs in ((0.1, 2), (0.5, 1))
        for start in ("encoder", "nothing")
    ]
    again = script("results/finetune.py", *options, cwd=tmp_path)
    assert "python train_sup.py" not in again.stdout  # nothing is repeated
    assert json.loads((tmp_path / "results/finetune-digits.json").read_text()) == record
    fewer = [*options, "--shares", 0.5, "--epochs", 1]
    succeeded(script("results/finetune.py", *fewer, cwd=tmp_path))
    record = json.loads((tmp_path / "results/finetune-digits.json").read_text())
    assert len(record["commands"]) == 4  # of these rows alone
    assert_refused(
        script("results/finetune.py", *options[:-4], "--epochs", 1, cwd=tmp_path), "many"
    )


# ------------------------------------------------------------------------------ links and orphans


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("README.md", "(results/sup-jitter-rcs.png)", "(sup-rcs.png)", "README.md: no sup-rcs.png"),
        ("results/README.md", "(entropy.png)", "(entropie.png)", "no entropie.png"),
        ("results/README.md", "(#bfloat16)", "(#float16)", "results/README.md: no #float16"),
        ("bench/README.md", "README.md#bfloat16", "README.md#x", "no ../results/README.md#x"),
        ("results/README.md", "\n## bfloat16", "\n## x", "no ../results/README.md#bfloat16"),
        ("docs/running.md", "(checkpoints.md)", "(none.md)", "docs/running.md: no none.md"),
        ("docs/checkpoints.md", "python sample.py", "python draw.py", "no draw.py"),
        ("checkpoints/README.md", "(../results/README.md)", "(../results/x)", "no ../results/x"),
        (
            "bench/README.md",
            "python bench/speedrun.py",
            "python speedrun.py",
            "bench/README.md: no speedrun.py",
        ),
    ],
)
def test_a_broken_link_is_named(file, old, new, message, repository):
    change(repository / file, old, new)
    assert_refused(tables_of(repository, "--check"), message)


@pytest.mark.parametrize(
    "name",
    ["entropy.png", "epsilon.png", "sup-transfer.json", "finetune.py", "reproduce-digits.json"],
)
def test_a_missing_picture_script_or_json_is_named(name, repository):
    (repository / "results" / name).unlink()
    assert_refused(tables_of(repository, "--check"), name)


def test_the_fields_of_robustbench_are_those_of_the_results():
    card = (ROOT / "checkpoints/README.md").read_text().split("```json\n")[1].split("```")[0]
    card = json.loads(card)
    found = json.loads((ROOT / "results/sup-accuracy.json").read_text())
    assert card["clean_acc"] == rounded(100 * found["clean_accuracy"], 2)
    assert card["eps"] == str(found["eps"])
    found = json.loads((ROOT / "results/sup-autoattack.json").read_text())
    assert card["autoattack_acc"] == rounded(100 * found["autoattack"], 2)


def test_comments_in_code_are_no_headings(repository):
    readme = repository / "README.md"
    readme.write_text(f"{readme.read_text()}\n[x](#mine)\n\n```\n# mine\n```\n")
    assert_refused(tables_of(repository, "--check"), "README.md: no #mine")


def test_an_orphan_in_results_is_named(repository):
    (repository / "results/sup-other.png").touch()  # sup-*.png
    (repository / "results/other.py").touch()
    succeeded(tables_of(repository, "--check"))
    (repository / "results/losses-digits.md").touch()
    assert_refused(tables_of(repository, "--check"), "does not mention losses-digits.md")
