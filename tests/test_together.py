"""Two at once: locks on folders, simultaneous runs, numbered sample sets, threads."""

import contextlib
import os
from pathlib import Path

import pytest
from conftest import assert_refused, files, script, succeeded
from test_survival import ForkedScript, contents, training_of

import cem
from lib import cli
from lib import files as outputs

CKPT = "runs/sup/ckpt.pt"
SHORT = ["--dataset", "digits", "--width", 8, "--epochs", 1, "--n-eval", 10, "--quiet"]


@contextlib.contextmanager
def locked(folder: Path):
    """As if another process had locked the folder: each open file locks by itself."""
    with contextlib.ExitStack() as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "AT_END", end)
        outputs.lock(folder, "unused")
        patch.undo()
        yield


@pytest.mark.parametrize("name", ["train_sup.py", "train_unsup.py"])
@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_run_refuses_a_folder_in_which_another_one_trains(name, more, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("mine")
    with locked(tmp_path / "run"):
        done = script(name, *SHORT, "--out", "run", *more, cwd=tmp_path)
    assert_refused(done, "another process is training in run")
    assert contents(tmp_path) == {"run/log.jsonl": b"mine"}


def test_sampling_refuses_a_set_that_another_process_draws(digits_run, tmp_path):
    options = ["--ckpt", digits_run / CKPT, "--n", 10, "--steps", 1, "--out", tmp_path / "o"]
    succeeded(script("sample.py", *options, cwd=tmp_path))
    identity = outputs.read_json(tmp_path / "o/samples-rcs.json")["set"]
    parts = tmp_path / f"o/samples-rcs-{identity}.parts"
    parts.mkdir()
    before = contents(tmp_path)
    with locked(parts):
        assert_refused(
            script("sample.py", *options, cwd=tmp_path), "another process is drawing these images"
        )
        other = script("sample.py", *options, "--seed", 1, cwd=tmp_path)
    assert other.returncode == 0 and "samples-rcs.*: not drawn with these options" in other.stdout
    assert before.items() <= contents(tmp_path).items()


def test_sets_with_other_options_get_a_number_and_equal_ones_replace_theirs(digits_run, tmp_path):
    options = ["--ckpt", digits_run / CKPT, "--n", 10, "--steps", 1, "--out", "o"]
    for seed, name in ((0, "samples-rcs"), (1, "samples-rcs-1"), (2, "samples-rcs-2")) * 2:
        done = script("sample.py", *options, "--seed", seed, cwd=tmp_path)
        assert f"wrote o/{name}.npz" in done.stdout, (done.stdout, done.stderr)
    assert len(files(tmp_path / "o")) == 9
    (tmp_path / "o/samples-cs.png").write_text("mine")
    done = script("sample.py", *options, "--sampler", "cs", cwd=tmp_path)
    assert "wrote o/samples-cs-1.npz" in done.stdout
    assert (tmp_path / "o/samples-cs.png").read_text() == "mine"


def test_a_lock_ends_with_the_script_and_a_file_system_without_locks_is_a_warning(
    tmp_path, monkeypatch, capsys
):
    def refuse(*_):
        raise OSError("no locks available")

    with locked(tmp_path), pytest.raises(cem.CEMError, match="busy"), cli.AT_END:
        outputs.lock(tmp_path, "busy")
    with cli.AT_END:
        outputs.lock(tmp_path, "busy")
    monkeypatch.setattr(outputs.fcntl, "flock", refuse)
    with cli.AT_END:
        outputs.lock(tmp_path, "busy")
    assert "without locks" in capsys.readouterr().err


def start_together(n: int, *args, cwd: Path) -> list:
    """Run train_sup.py n times at the same moment."""
    runs = [ForkedScript("train_sup.py", *args, cwd=cwd) for _ in range(n)]
    return [run.wait() for run in runs]


def test_of_two_runs_started_together_exactly_one_goes_on(tmp_path):
    for i in range(2):
        options = [*SHORT, "--batch-size", 700, "--seed", i, "--out", f"run{i}"]
        done = start_together(2, *options, cwd=tmp_path)
        assert sorted(d.returncode for d in done) == [0, 2], [d.stderr for d in done]
        (refused,) = [d for d in done if d.returncode == 2]
        assert_refused(refused, f"another process is training in run{i}")
        run = tmp_path / f"run{i}"
        assert training_of(run / "ckpt.pt")["step"] == 2
        names = {"ckpt.pt", "log.jsonl", "options.json"}
        assert names <= set(files(run)) and not (run / "previous-1").exists()


def test_scripts_run_without_home_and_display_from_another_folder(digits_run, tmp_path):
    """A script that writes neither to the checkout nor to HOME runs where it cannot."""
    empty = {name: "/nonexistent" for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR")}
    root = Path(cli.__file__).resolve().parent.parent
    before = {p for p in root.rglob("*") if "__pycache__" not in p.parts}
    options = ["--ckpt", digits_run / CKPT, "--n", 10, "--steps", 1, "--out", "o"]
    succeeded(script(root / "sample.py", *options, cwd=tmp_path, DISPLAY="", **empty))
    assert before == {p for p in root.rglob("*") if "__pycache__" not in p.parts}
    assert not os.path.exists("/nonexistent")


def test_a_folder_that_its_holder_removed_counts_as_locked(tmp_path, monkeypatch):
    """The first process ends, and removes the folder, between our opening and our locking it."""
    parts = tmp_path / "parts"
    parts.mkdir()
    monkeypatch.setattr(outputs.fcntl, "flock", lambda *_: parts.rmdir())
    with pytest.raises(cem.CEMError, match="busy"), cli.AT_END:
        outputs.lock(parts, "busy")


def test_a_set_of_other_weights_gets_a_number(digits_run, tmp_path):
    model = cem.load(digits_run / CKPT)
    for name in ("samples-rcs", "samples-rcs-1"):
        cem.save(tmp_path / "c.pt", model, **model.extra)
        draw = ["--ckpt", "c.pt", "--n", 10, "--steps", 1, "--out", "o"]
        assert f"wrote o/{name}.npz" in script("sample.py", *draw, cwd=tmp_path).stdout
        model.net.fc.bias.data += 1
