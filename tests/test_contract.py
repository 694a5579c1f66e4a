"""The contract of errors: a wrong command line ends with exit status 2 and one line `error: ...`;
it leaves no file behind and changes none. A wrong call of the library raises CEMError.

Tables hold Python statements that prepare a folder or damage a checkpoint, and command lines.
"""

import copy
import dataclasses
import functools
import importlib
import io
import json
import math
import os
import pickle
import random
import shlex
import shutil
import signal
import stat
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
import torch
from conftest import script, succeeded
from PIL import Image

import cem
from lib import cli, data, interop, schema
from lib.chains import ReplayBuffer

LIMIT = 20  # seconds for one command
SMALL = "--dataset digits --width 8 --epochs 1 --n-eval 2 --max-minutes 0.001 --out run"
BASES = {
    "train_sup.py": SMALL,
    "train_unsup.py": SMALL,
    "sample.py": "--ckpt sup.pt --n 2 --steps 1",
    "eval_is_fid.py": "--samples s.npz --ref s.npz --features sup.pt --splits 2",
    "eval_robust.py": "--ckpt sup.pt --n 2",
    "bench/bench.py": "--width 8 --image-size 8 --batch-size 2 --steps 1 --repeats 1 --only none",
}
SAMPLE, FID, ROBUST, BENCH = (f"{name} {BASES[name]}" for name in list(BASES)[2:])
SUP, UNSUP = (f"{name} {SMALL}" for name in list(BASES)[:2])
SCORE = "eval_is_fid.py --ref s.npz --features sup.pt --splits 2"

# ---------------------------------------------------------------------------------------- harness


class Stuck(BaseException):
    """Not an Exception, which a script may handle."""


def _stuck(*_):
    raise Stuck(f"no end after {LIMIT} s")


def listing(folder: Path) -> dict:
    """Type and content of everything in a folder; pipes are not opened."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in folders + names):
            content, mode = None, path.lstat().st_mode
            if stat.S_ISLNK(mode):
                content = os.readlink(path)
            elif stat.S_ISREG(mode):
                content = zlib.crc32(path.read_bytes()), path.stat().st_size
            found[str(path.relative_to(folder))] = stat.S_IFMT(mode), content
    return found


def fault(folder: Path, command: str, part: str = "", legal: bool = False) -> str:
    """How a command breaks the contract, "" if it does not; `legal`: it may also succeed."""
    before, name, argv = listing(folder), *command.split(" ", 1)
    previous = signal.signal(signal.SIGALRM, _stuck)
    signal.alarm(LIMIT)
    try:
        done = script(name, *shlex.split(argv), cwd=folder)
    except (Exception, Stuck) as error:
        return f"{command}: {type(error).__name__}: {str(error)[:150]!r}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if legal and done.returncode == 0:
        return ""
    line, after = done.stderr, listing(folder)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    wrong = {
        f"exit status {done.returncode}": done.returncode != 2,
        "more than one line": line.count("\n") != 1 or "\r" in line,
        "no error line": not line.startswith("error: ") or len(line.strip()) < 10,
        f"not about {part}": part not in line,
        f"changed {changed}": bool(changed),
    }
    found = [what for what, is_wrong in wrong.items() if is_wrong]
    return f"{command}: {', '.join(found)}: {line[:300]!r}" if found else ""


def png(path: str, size=(8, 8), mode="L") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 90 if mode == "L" else (90, 80, 70)).save(path)


def text(path: str, content="mine\n") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)


def fifo(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def images(root: str, classes=("a", "b"), size=(8, 8)) -> None:
    for i, split in enumerate(("train", "test")):
        for name in classes if isinstance(classes[0], str) else classes[i]:
            for k in range(3):
                png(f"{root}/{split}/{name}/{k}.png", size)


def pack(arr_0=None, arr_1=None, path="t.npz", **more) -> None:
    arrays = dict(arr_0=arr_0, arr_1=arr_1, **more)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


TOOLS = {f.__name__: f for f in (png, text, fifo, images, pack, Path)}
TOOLS |= dict(
    cem=cem, os=os, np=np, torch=torch, pickle=pickle, nan=math.nan, inf=math.inf, json=json
)
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
TOOLS |= dict(pixels=PIXELS, u8=functools.partial(np.zeros, dtype=np.uint8))


@pytest.fixture(scope="module")
def contents(digits_run, unsup_run):
    """The content of a small classifier's and a small encoder's checkpoint."""
    paths = digits_run / "runs/sup/ckpt.pt", unsup_run / "runs/unsup/ckpt.pt"
    return [torch.load(path, weights_only=True) for path in paths]


@pytest.fixture
def make(tmp_path, digits_run, unsup_run, monkeypatch):
    """make(statement) -> a new folder with checkpoints, samples and files of the user."""
    load = functools.cache(sklearn.datasets.load_digits)
    monkeypatch.setattr(sklearn.datasets, "load_digits", load)

    def folder(statement: str = "") -> Path:
        place = tmp_path / f"{len(list(tmp_path.iterdir())):03d}"
        place.mkdir()
        shutil.copy(digits_run / "runs/sup/ckpt.pt", place / "sup.pt")
        shutil.copy(unsup_run / "runs/unsup/ckpt.pt", place / "unsup.pt")
        monkeypatch.chdir(place)
        pack(PIXELS, np.arange(12) % 10, "s.npz")
        text("mine.txt")
        text("mine.json", '{"mine": 1}')
        exec(statement, dict(TOOLS))
        monkeypatch.chdir(tmp_path)
        return place

    return folder


def assert_no_fault(faults: list[str]) -> None:
    """faults: one per row of a table, "" where there is none."""
    found = [line for line in faults if line]
    if found:
        pytest.fail(f"{len(found)} of {len(faults)} rows:\n" + "\n".join(found), pytrace=False)


# ---------------------------------------------------------------------------------- command lines


def wrong_values(field: dataclasses.Field) -> list[str]:
    """Values that an option must refuse, by its type, bounds and choices."""
    meta, values = field.metadata, []
    if meta.get("type") in (cli.number, float):
        values += ["nan", "inf", "-inf", "1e400", "text", "", "1/0", "0x10", "1/nan"]
    if field.name == "max_minutes":
        values = ["nan", "-inf", "text", ""]
    if meta.get("type") is cli.integer:
        values += ["1.5", "text", "9" * 23, "-" + "9" * 23, "", "nan", "1e3"]
    for bound, below in (("least", 1), ("above", 0), ("most", -1), ("below", 0)):
        if bound in meta:
            values.append(str(meta[bound] - below))
    if "above" in meta:
        values.append("-1")
    if "choices" in meta:
        values += ["unknown", "", "ALL", "None"]
    return values


def generated_rows(name: str) -> list[tuple[str, str]]:
    """(command, what its error must name) for each option of a script."""
    fields = dataclasses.fields(importlib.import_module(Path(name).stem).Options)
    rows = []
    for field in fields:
        flag, call = f"--{field.name.replace('_', '-')}", f"{name} {BASES[name]}"
        rows += [(f"{call} {flag}={shlex.quote(v)}", flag) for v in wrong_values(field)]
        if field.metadata.get("nargs") == "+" and field.metadata["type"] is not str:
            rows += [(f"{call} {flag} 0.5 {value}", flag) for value in ("nan", "text")]
        last = f"{flag}=yes" if field.type in (bool, "bool") else flag
        rows.append((f"{call} {last}", flag))
    for more in ("--unknown 1", "--unknown=", "word", "--", "-x", "--dat x", "--seed=--", "-- -1"):
        rows.append((f"{name} {BASES[name]} {more}", "" if "--seed" in more else more.split()[0]))
    return [row for row in rows if not row[0].endswith(" --")]


@pytest.mark.parametrize("name", BASES)
def test_wrong_values_of_options_are_refused(name, make):
    rows, folder = generated_rows(name), make()
    assert len(rows) >= 50
    assert_no_fault([fault(folder, *row) for row in rows])


HUGE = [
    (f"{SUP} --width 10000000", "bytes"),
    (f"{UNSUP} --width 10000000", "bytes"),
    (f"{UNSUP} --embed-dim 1000000000000", "bytes"),
    (f"{SUP} --arch wrn-28-10 --width 100000000", "bytes"),
    (f"{SUP} --loss jem --buffer 1000000000000", "bytes"),
    (f"{SUP} --loss jeat --reinit-from gaussian --buffer 1000000000000", "bytes"),
    (f"{SAMPLE} --n 1000000000000 --batch-size 1000000000000", "bytes"),
    (f"{SAMPLE} --n 1000000000000 --sampler seeds", ""),
    (f"{SAMPLE} --n 9223372036854775807 --batch-size 9223372036854775807", ""),
    (f"{SAMPLE} --ckpt unsup.pt --sampler maxent --batch-size 1000000000000", "bytes"),
    (f"{SUP} --width 9223372036854775807", ""),
    (f"{SUP} --loss jem --buffer 9223372036854775807", ""),
    (f"{UNSUP} --embed-dim 9223372036854775807", ""),
    (f"{UNSUP} --width 4611686018427387904", ""),
    (f"{BENCH} --width 10000000", "bytes"),
    (f"{BENCH} --image-size 1000000", "bytes"),
    (f"{BENCH} --image-size 9223372036854775807", ""),
    (f"{BENCH} --width 9223372036854775807", ""),
    (f"{BENCH} --only at --batch-size 1000000000000", "bytes"),
    (f"{SUP} --dataset photos --image-size 1000000000", ""),
    (f"{SUP} --dataset photos --image-size 9223372036854775807", ""),
    (f"{FID} --ref photos/test/a --image-size 1000000000", ""),
    (f"{FID} --splits 9223372036854775807", "--splits"),
    (f"{SUP} --max-minutes 1e-300 --epochs 0", "--epochs"),
]
LEGAL = [  # extreme values which may succeed or be refused
    f"{SUP} --seed 9223372036854775807",
    f"{SUP} --seed -9223372036854775808",
    f"{UNSUP} --seed 9223372036854775807",
    f"{SUP} --epochs 9223372036854775807",
    f"{SUP} --batch-size 9223372036854775807",
    f"{SUP} --n-eval 9223372036854775807 --seed-rank 9223372036854775807",
    f"{UNSUP} --n-eval 9223372036854775807 --eval-every 9223372036854775807",
    f"{SUP} --max-minutes 1e300",
    f"{SUP} --max-minutes inf --seed -1",
    f"{SAMPLE} --seed 9223372036854775807",
    f"{SAMPLE} --seed -9223372036854775808",
    f"{SAMPLE} --batch-size 9223372036854775807",
    f"{SAMPLE} --step-size 1e308 --noise 1e308",
    f"{SAMPLE} --norm none --step-size 1e308 --steps 3",
    f"{FID} --batch-size 9223372036854775807",
    f"{ROBUST} --n 9223372036854775807 --batch-size 9223372036854775807",
    f"{ROBUST} --seed 9223372036854775807 --attacks pgd-10",
    f"{ROBUST} --seed -9223372036854775808 --attacks pgd-10",
    f"{ROBUST} --eps 1e308 --attacks pgd-10",
    f"{ROBUST} --eps 0 --attacks pgd-10",
]


def test_sizes_that_no_machine_has_are_refused(make):
    folder = make("images('photos')")
    assert_no_fault([fault(folder, *row) for row in HUGE])


def test_extreme_values_succeed_or_are_refused(make):
    assert_no_fault([fault(make(), row, legal=True) for row in LEGAL])


DEVICES = ["meta", "cuda:99", "nonsense", "''", "cuda:-1", "cpu:x", "xla", "hpu", "vulkan", "ipu"]
DEVICES += ["cuda:99999999999999999999", "privateuseone", "mkldnn", "lazy", "fpga"]


def test_devices_that_are_not_here_are_refused(make):
    folder, rows = make(), []
    for call in (SUP, UNSUP, SAMPLE, FID, ROBUST, BENCH):
        rows += [(f"{call} --device {name}", "--device") for name in DEVICES]
        if call != BENCH:  # "only none" is refused first
            rows.append((f"{call} --device cpu --precision tf32", "tf32"))
    assert_no_fault([fault(folder, *row) for row in rows])


# ---------------------------------------------------------------------------- damaged checkpoints

READERS = [f"{SAMPLE} --ckpt bad.pt", f"{ROBUST} --ckpt bad.pt --dataset digits"]
RESUME = "train_sup.py --resume --out old --max-minutes 0.001"
FOR_ENCODERS = [f"{SAMPLE} --ckpt bad.pt --sampler maxent", READERS[1]]
FOR_ENCODERS += ["train_unsup.py --resume --out old --max-minutes 0.001"]
FOR_ALL = [*READERS, RESUME, f"{FID} --features bad.pt", f"{SUP} --init bad.pt"]

# statements on c: the content, w: its weights, g: its config
WEIGHTS = """
w['net.fc.weight'][0, 0] = nan; w['net.bn1.running_var'][0] = inf; w['std'].zero_()
w['std'].fill_(nan); w['mean'].fill_(-inf); del w['net.fc.bias']; w['other'] = torch.zeros(1)
w['net.fc.weight'] = torch.zeros(3, 3); w['net.fc.weight'] = 1.0; w['net.fc.bias'] = None
w['net.fc.bias'] = w['net.fc.bias'] + 1j; w['std'].neg_(); del g['arch']
w['net.fc.bias'] = torch.zeros(10).to_sparse(); w[3] = torch.zeros(1); w.clear()
c['state'] = []; c['state'] = None; del c['state']; del c['config']; del c['kind']; del c['extra']
g['width'] = 10**9; g['width'] = 10**30; g['width'] = -1; g['width'] = nan; g['width'] = 'wide'
g['width'] = 8.5; g['width'] = None; g['in_channels'] = 0; g['in_channels'] = 10**12
g['arch'] = 'vgg'; g['arch'] = ['resnet18']; g['depth'] = 3; c['config'] = None
c['kind'] = 'Other'; c['kind'] = ['x']; c['kind'] = 'NonParametricCEM'; c['extra'] = 3
c['extra'] = [1]; c['extra'] = None; g['mean'] = 'x'; c['config'] = list(g)
"""
# on e: its extra, s: seeds, t: training state, o: its optimiser
EXTRA = """
del s['mean']; del s['factor']; del s['shape']; s['mean'] = None; s['mean'] = [1.0]
s['mean'][0, 0] = nan; s['factor'][0, 0, 0] = inf; s['mean'] = torch.zeros(0)
s['factor'] = s['factor'][:, :5]; s['factor'] = s['factor'][..., 0]; s['mean'] = s['mean'][:5]
s['shape'] = [8, 8]; s['shape'] = [1, 4, 16]; s['shape'] = 3; s['shape'] = 'abc'
s['shape'] = [1, 8, 8.0]; s['shape'] = None; s['mean'] = s['mean'].to_sparse(); e['seeds'] = None
del s['residual']; del s['channels']; s['residual'][3, 3] = nan; s['channels'] = torch.zeros(2, 2)
s['residual'] = s['residual'][1:]; s['unknown'] = torch.zeros(2)
s.update(shape=[1, -8, -8]), e.pop('image_shape'); e['seeds'] = 3; e['seeds'] = []; e['seeds'] = 'x'
s['shape'] = [torch.tensor(1), 8, 8]; s['mean'] = s['mean'].to(torch.complex64) + 1j
e['classes'] = 3; e['classes'] = 'abcdefghij'; e['classes'] = ['a']; e['classes'] = []
e['classes'] = ['a'] * 10; e['classes'][3] = '../../evil'; e['classes'][3] = ''
e['classes'][3] = '..'; e['classes'][3] = 'a/b'; e['classes'][3] = 3; e['classes'][3] = 'a\\0b'
e['classes'] = list(range(10)); e['classes'].append('x'); e['classes'] = dict.fromkeys('abc')
e['classes'][3] = '/tmp/evil'; e['classes'][3] = ['x']
e['num_images'] = torch.ones(2); e['num_images'] = 3.0; t['restarted_at'] = torch.ones(2)
e['image_shape'] = 3; e['image_shape'] = [8, 8]; e['image_shape'] = [3, 8, 8]
e['image_shape'] = [1, 9, 9]; e['image_shape'] = [1, 8, 8.0]; e['image_shape'] = [1, 0, 8]
e['dataset'] = 3; e['dataset'] = None; e['options'] = 3; e['options'] = None; del e['options']
e['training'] = 3; e['training'] = None; e['training'] = {}; e['training'] = []; t['step'] = 'x'
t['step'] = -1; t['step'] = nan; t['step'] = 10**400; t['restarts'] = 10**400; del t['step']
t['seconds'] = nan; t['seconds'] = 'x'; t['log'] = 3; t['log'] = [3]; t['sums'] = 3
t['sums'] = {'loss': nan}; t['sums'] = {'loss': 'x'}; t['sums'] = {'loss': 10**400}
t['model'] = None; t['model'].popitem(); t['model']['net.fc.weight'][0, 0] = nan
t['model']['net.fc.weight'] = torch.zeros(2, 2); t['model']['net.fc.weight'] = 3; del t['model']
t['optimizer'] = None; t['optimizer'] = {}; o['state'] = 3; del o['state']
o['state'][0] = 3; o['state'][0]['momentum_buffer'] = torch.zeros(2)
o['state'][0]['momentum_buffer'].fill_(nan); o['state'][9999] = {}; o['state']['x'] = {}
t['chains'] = 3; t['chains'] = {'images': 3}; t['chains'] = {'images': torch.tensor([nan])}
e['settings'] = 3; e['settings'] = {'rcs': {'steps': 3}}; e['settings'] = {'rcs': None}
"""
RESUMED = """
del e['training']; e['options']['lr'] = 'x'; e['options']['seed'] = 1
t['restarts'] = 10**30; e['options']['dataset'] = 'other'
e['options']['epochs'] = 'x'; e['options']['dataset'] = ['digits']
"""
ENCODER = """
g['temperature'] = nan; g['temperature'] = 0; g['temperature'] = -1.0; g['temperature'] = 'x'
g['temperature'] = None; g['embed_dim'] = 10**12; g['embed_dim'] = 3
w['net.fc.2.bias'][0] = nan; del s['mean']; e['classes'] = ['a', 'a']; e['training'] = 3
"""
FILES = """
raw.write_bytes(b''); raw.write_text('hello'); raw.write_bytes(all[:1000]); raw.write_bytes(all[1:])
raw.write_bytes(all[:len(all) // 2]); raw.write_bytes(all[:-1]); raw.write_bytes(all[:-30])
raw.write_bytes(bytes(len(all))); raw.write_bytes(flipped(0)); raw.write_bytes(flipped(0.3))
raw.write_bytes(flipped(0.5)); raw.write_bytes(flipped(0.9))
raw.mkdir(); fifo(raw); raw.symlink_to('nowhere'); raw.symlink_to('.'); torch.save(3, raw)
torch.save([], raw); torch.save({}, raw); torch.save({'format': 'cem'}, raw)
raw.write_bytes(pickle.dumps(os.getcwd)); torch.save({'format': 'cem', 'state': {}}, raw)
torch.save({'state_dict': {'conv1.weight': torch.zeros(3)}}, raw); np.savez(raw.open('wb'), a=3)
"""


def statements(table: str) -> list[str]:
    return [part.strip() for part in table.replace("\n", ";").split(";") if part.strip()]


def damaged(content: dict, statement: str) -> dict:
    content = copy.deepcopy(content)
    extra = content["extra"]
    names = dict(c=content, w=content["state"], g=content["config"], e=extra, s=extra["seeds"])
    names |= dict(t=extra["training"], o=extra["training"]["optimizer"])
    exec(statement, TOOLS | names)
    return content


@pytest.mark.parametrize("statement", statements(WEIGHTS + EXTRA))
def test_a_checkpoint_with_damaged_content_is_refused(statement, contents, tmp_path):
    """When it is read, before a script does anything else."""
    torch.save(damaged(contents[0], statement), tmp_path / "bad.pt")
    with pytest.raises(cem.CEMError, match="bad.pt"):
        schema.load(tmp_path / "bad.pt")


def flip(raw: bytes, where: float) -> bytes:
    at = int(where * len(raw))
    return raw[:at] + bytes([raw[at] ^ 64]) + raw[at + 1 :]


def damage_faults(folder: Path, run: Path, statement: str, content, commands: list[str]):
    """The faults of commands that read bad.pt, or the run in old, damaged by the statement."""
    shutil.rmtree(folder / "old", ignore_errors=True)
    (folder / "old").mkdir()
    shutil.copy(run / "options.json", folder / "old")
    found = []
    for path in (folder / "bad.pt", folder / "old/ckpt.pt"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(True)
        if content is None:
            raw = (run / "ckpt.pt").read_bytes()
            names = dict(raw=path, all=raw, flipped=functools.partial(flip, raw))
            exec(statement, TOOLS | names)
        else:
            torch.save(damaged(content, statement), path)
    for command in commands:
        found.append(fault(folder, command))
        if found[-1]:
            found[-1] = f"{statement}: {found[-1]}"
    return found


@pytest.mark.parametrize("commands", [FOR_ALL, FOR_ENCODERS], ids=["classifier", "encoder"])
def test_undamaged_checkpoints_are_read(commands, make, digits_run, unsup_run):
    """By the commands that refuse the damaged ones below."""
    run = digits_run / "runs/sup" if commands is FOR_ALL else unsup_run / "runs/unsup"
    folder = make()
    shutil.copytree(run, folder / "old", dirs_exist_ok=True)
    shutil.copy(run / "ckpt.pt", folder / "bad.pt")
    for command in commands:
        name, argv = command.split(" ", 1)
        succeeded(script(name, *shlex.split(argv), cwd=folder))


@pytest.mark.parametrize(
    "table, commands",
    [(RESUMED, [RESUME]), (ENCODER, FOR_ENCODERS), (FILES, FOR_ALL)],
    ids=["resumed", "encoder", "files"],
)
def test_damaged_checkpoints_are_refused(table, commands, make, contents, digits_run, unsup_run):
    run = unsup_run / "runs/unsup" if table is ENCODER else digits_run / "runs/sup"
    content = None if table is FILES else contents[table is ENCODER]
    folder, found = make(), []
    for name in ("sup.pt", "unsup.pt"):  # not read, and slow to compare
        (folder / name).unlink()
    for statement in statements(table):
        found += damage_faults(folder, run, statement, content, commands)
    assert_no_fault(found)


# ------------------------------------------------------------------------------- data and outputs

TRAIN = f"{SUP} --dataset photos"
PHOTO_FID = SCORE.replace("s.npz", "photos/test/a") + " --samples s.npz"
FOUR = "[png(f'some/{i}.png') for i in range(4)]"
DATA = [  # (statement, commands)
    (f"{FOUR}; {wrong}", [f"{SCORE} --samples some"])
    for wrong in (
        "os.mkdir('some/x.png')",
        "fifo('some/x.png')",
        "text('some/x.png')",
        "text('some/x.png', '')",
        "os.symlink('none', 'some/x.png')",
        "png('some/x.png', (9, 8))",
        "png('some/x.png', mode='RGB')",
    )
]
DATA += [
    ("os.mkdir('some'); text('some/a.txt')", [f"{SCORE} --samples some"]),
    ("fifo('some')", [f"{SCORE} --samples some", f"{FID} --ref some", f"{FID} --features some",
        f"{FID} --features inception --weights some", f"{SAMPLE} --ckpt some",
        f"{ROBUST} --ckpt some", f"{SUP} --dataset some", f"{ROBUST} --dataset some",
        f"{ROBUST} --ood some --dataset digits", f"{SUP} --out some"]),
    ("fifo('t.npz')", [f"{SCORE} --samples t.npz", f"{FID} --ref t.npz"]),
    ("text('t.npz')", [f"{SCORE} --samples t.npz", f"{FID} --ref t.npz",
        f"{FID} --features t.npz", f"{FID} --features inception --weights t.npz"]),
    ("text('t.npz', '')", [f"{SCORE} --samples t.npz", f"{FID} --ref t.npz"]),
    ("os.mkdir('t.npz')", [f"{SCORE} --samples t.npz", f"{FID} --ref t.npz"]),
    ("Path('t.npz').write_bytes(Path('s.npz').read_bytes()[:500])", [
        f"{SCORE} --samples t.npz", f"{FID} --ref t.npz"]),
    ("pass", [f"{SCORE} --samples none.npz", f"{FID} --ref none.npz", f"{SAMPLE} --ckpt none",
        f"{FID} --features none", f"{FID} --features inception --weights none",
        f"{ROBUST} --ckpt none", f"{SUP} --dataset none", f"{ROBUST} --ood none --dataset digits",
        f"{ROBUST} --dataset none", f"{SUP} --init none", f"{SAMPLE} --sampler maxent",
        f"{SAMPLE} --ckpt unsup.pt", f"{SAMPLE} --classes 99", f"{SAMPLE} --classes x,y",
        f"{SAMPLE} --dataset digits", f"{SAMPLE} --mean 0", f"{SAMPLE} --mean 0 --std 0",
        f"{SAMPLE} --norm none", f"{SAMPLE} --image-size 8", f"{ROBUST} --std 1",
        f"{ROBUST} --attacks pgd-0 nonsense", f"{ROBUST} --attacks pgd-x", f"{SCORE} --samples .",
        f"{ROBUST} --ckpt unsup.pt --ood digits", f"{FID} --preprocess tf1", f"{FID} --out a.npz",
        f"{FID} --save-stats a.npz", f"{FID} --splits 12", f"{SUP} --image-size 9",
        f"{SUP} --init s.npz", f"{UNSUP} --init mine.txt", f"{SUP} --mean 0 --std 1",
        f"{SUP} --init sup.pt --mean 0 --std 1", f"{SUP} --init sup.pt --arch wrn-16-4",
        f"{SUP} --loss dat --chain-start none", f"{SUP} --loss dat --chain-start mine.txt",
        f"{SUP} --loss dat --chain-samplers x", f"{SUP} --loss dat --chain-samplers ''",
        "train_sup.py --dataset digits --init sup.pt --out .",
        f"{SCORE} --neighbours",
        f"{SUP} --dataset mine.txt", f"{SUP} --dataset ''", f"{SUP} --batch-size 1",
        f"{SUP} --loss jem --likelihood-weight 0", f"{SUP} --loss jem --buffer 1",
        f"{UNSUP} --loss mle", f"{BENCH}", "sample.py --png .",
        f"{SAMPLE} --ckpt unsup.pt --sampler maxent --batch-size 1"]),
    ("cem.save('bare.pt', cem.ParametricCEM('resnet18', 3, width=4))", [
        f"{SAMPLE} --ckpt bare.pt"]),
    *((f"pack({arrays})", [f"{SCORE} --samples t.npz", f"{FID} --ref t.npz"]) for arrays in (
        "", "np.array([None])", "pixels.astype(object)", "pixels, np.array(list('ab' * 6))",
        "pixels[..., 0]", "pixels[:0]", "pixels, np.arange(5)", "pixels.astype(float)",
        "pixels / 255 * nan", "pixels.astype(np.int64)", "u8((4, 8, 8, 2))", "u8((4, 0, 0, 1))",
        "np.array(3)", "pixels.astype(complex)", "pixels > 3", "pixels - 1.5", "u8(())",
        "pixels, np.arange(12).astype(object)", "pixels, np.arange(12) * nan",
        "np.zeros((), [('a', int)])", "mu=np.zeros(3), sigma=np.zeros((3, 3))",
        "mu=np.full(2048, nan), sigma=np.zeros((2048, 2048))", "mu=pixels, sigma=None")),
    ("pack(u8((12, 9, 9, 1)))", [f"{SCORE} --samples t.npz", f"{FID} --ref t.npz"]),
    ("pack(u8((12, 8, 8, 3)))", [f"{SCORE} --samples t.npz", f"{FID} --ref t.npz"]),
    ("pack(u8((1, 8, 8, 1)))", [f"{SCORE} --samples t.npz", f"{FID} --ref t.npz"]),
    ("images('photos', size=(8, 9))", [TRAIN, f"{ROBUST} --dataset photos --image-size 0"]),
    ("images('photos', size=(4, 4))", [TRAIN]),
    ("images('photos', (('a', 'b'), ('a', 'c')))", [TRAIN, f"{ROBUST} --dataset photos"]),
    ("images('photos', ('a',)); png('photos/test/a/9.png', (9, 9))", [TRAIN, PHOTO_FID]),
    ("images('photos'); fifo('photos/train/a/x.png')", [TRAIN]),
    ("images('photos'); fifo('photos/test/a/x.png')", [TRAIN, PHOTO_FID]),
    ("images('photos'); text('photos/train/b/x.png')", [TRAIN]),
    ("images('photos'); os.mkdir('photos/train/c')", [TRAIN]),
    ("images('photos'); os.rename('photos/test', 'photos/valid')", [TRAIN]),
    ("os.makedirs('photos/train'); os.makedirs('photos/test')", [TRAIN, f"{FID} --ref photos"]),
    ("images('photos'); os.symlink('none', 'photos/train/a/x.png')", [TRAIN]),
    ("images('photos')", [f"{ROBUST} --dataset photos", f"{ROBUST} --dataset digits --ood photos/x",
        f"{TRAIN} --image-size 4", f"{FID} --ref photos --image-size 7"]),
]  # fmt: skip
TO = f"{FID} --out"
MEASURE = f"{ROBUST} --dataset digits"
OUTPUTS = [
    ("pass", [f"{call} --out {place}" for call in (SUP, UNSUP, SAMPLE, MEASURE) for place in (
        "mine.txt", "mine.txt/a/b", "/proc/a", "/dev/null", "/sys/a/b", "s.npz")]),
    ("pass", [f"{SAMPLE} --png {place}" for place in (
        ".", "mine.txt", "mine.txt/a", "/proc/a", "/dev/null", "/")]),
    ("pass", [f"{call} {place}" for call in (TO, f"{BENCH} --only at --out") for place in (
        "mine.txt", "mine.json", "mine.txt/a", "/proc/a.json", "/dev/null", ".", "s.npz", "/",
        "mine.json/")]),
    ("pass", [f"{FID} --features inception --save-stats {place}" for place in (
        "mine.txt", "mine.json", "s.npz", "/proc/a.npz", "/dev/null", ".", "mine.txt/a")]),
    ("text('m.md')", [f"{TO} m.json"]),
    ("text('metrics.json')", [FID]),
    ("fifo('f.json')", [f"{TO} f.json", f"{BENCH} --out f.json"]),
    ("fifo('f.npz')", [f"{FID} --features inception --save-stats f.npz"]),
    ("os.symlink('mine.json', 'l.json')", [f"{TO} l.json", f"{BENCH} --out l.json"]),
    ("os.symlink('none', 'l.json')", [f"{TO} l.json", f"{BENCH} --out l.json"]),
    ("os.symlink('none', 'l')", [f"{SUP} --out l", f"{SAMPLE} --out l", f"{SAMPLE} --png l"]),
    ("os.symlink('l', 'l')", [f"{SUP} --out l", f"{SAMPLE} --out l", f"{SAMPLE} --png l"]),
    ("os.mkdir('d.json')", [f"{TO} d.json", f"{BENCH} --out d.json"]),
    ("text('accuracy.json', '{\"mine\": 1}')", [f"{ROBUST} --dataset digits"]),
    ("os.mkdir('accuracy.json')", [f"{ROBUST} --dataset digits"]),
    ("fifo('accuracy.json')", [f"{ROBUST} --dataset digits"]),
    ("os.symlink('mine.json', 'accuracy.json')", [f"{ROBUST} --dataset digits"]),
    ("text('probe.json', 'x')", [f"{ROBUST} --ckpt unsup.pt --dataset digits"]),
    *((f"os.mkdir('run'); {make}", [SUP, UNSUP, f"{SUP} --resume"]) for make in (
        "os.mkdir('run/ckpt.pt')", "os.symlink('../sup.pt', 'run/ckpt.pt')", "fifo('run/ckpt.pt')",
        "os.symlink('none', 'run/ckpt.pt')", "os.mkdir('run/log.jsonl')",
        "os.symlink('../mine.txt', 'run/log.jsonl')", "fifo('run/options.json')",
        "os.mkdir('run/options.json')", "os.mkdir('run/ckpt-previous.pt')")),
    ("os.mkdir('run'); text('run/ckpt.pt')", [f"{SUP} --resume", f"{UNSUP} --resume"]),
    ("pass", [f"{SUP} --dataset nope --out new/folder", f"{SAMPLE} --ckpt no --out new/folder",
        f"{SUP} --device meta --out new/folder", f"{SUP} --precision tf32 --out new/a/b/c",
        f"{SUP} --width 10000000000000 --out new/f", f"{TO} new/a.json --ref nope",
        f"{TO} new/a.json --features no", f"{BENCH} --out new/a.json",
        f"{SAMPLE} --out new/a --precision tf32", f"{SAMPLE} --png new/a --precision tf32",
        f"{FID} --features inception --weights mine.txt --save-stats new/a.npz"]),
]  # fmt: skip


@pytest.mark.parametrize("table", [DATA, OUTPUTS], ids=["data", "outputs"])
def test_wrong_data_and_outputs_are_refused(table, make):
    found = []
    for statement, commands in table:
        folder = make(statement)
        found += [line and f"{statement}: {line}" for line in (fault(folder, c) for c in commands)]
    assert_no_fault(found)


# ---------------------------------------------------------------------------------- library calls

ASCEND = "cem.ascend(rcs, x, **dict(steps=2, step_size=0.1) | dict({}))"
PGD = "cem.pgd(ce, x, **dict(eps=0.5, steps=2) | dict({}))"
SEEDS = "cem.GaussianSeeds({})"
STATE = "cem.GaussianSeeds.from_state_dict({})"
FIT = "cem.GaussianSeeds.fit({})"
IMAGES = ["255 * x", "(x - 0.5) / 0.25", "x.mul(255).byte()", "x * nan", "x - inf", "x[0, 0, 0]"]
IMAGES += ["x.numpy()", "x.long()", "None", "x > 0.5", "x.tolist()", "x.to(torch.complex64)"]
LABELS = ["y.float()", "y.int()", "y[:, None]", "y + 5", "y - 1", "None", "y == 1", "y[0]"]
LABELS += ["y.numpy()", "y.tolist()"]
WRONG = [
    *(ASCEND.format(f"{name}={value}") for value in ("nan", "inf", "-1") for name in (
        "steps", "step_size", "noise", "momentum", "eps")),
    *(PGD.format(f"{name}={value}") for value in ("nan", "inf", "-1") for name in (
        "steps", "step_size", "eps", "random_start")),
    *(PGD.format(f"steps=1, random_start=2, step_size=0.1, eps={v}") for v in ("nan", "inf", "-1")),
    PGD.format("steps=0"), PGD.format("norm='none'"), PGD.format("norm='l3'"),
    "cem.pgd(ce, x, eps=0.5, steps=2, random_start=2)",
    ASCEND.format("norm='l3'"), ASCEND.format("norm='none', eps=1"), ASCEND.format("norm=None"),
    ASCEND.format("start=x[:2]"), ASCEND.format("noise=1, generator=[g]"),
    PGD.format("generator=[g]"), ASCEND.format("clip=(0.9, 1)"), "cem.project(x, 1, 'l3')",
    "cem.ascend(lambda x: x, x, steps=1, step_size=1)",
    "cem.ascend(lambda x: x.sum(), x, steps=1, step_size=1)",
    *(f"cem.ascend(rcs, {bad}, steps=1, step_size=0.1)" for bad in IMAGES),
    *(f"cem.pgd(ce, {bad}, eps=0.5)" for bad in IMAGES),
    *(f"cem.potential('{name}', model, {bad})" for name in ("ce", "rcs") for bad in LABELS),
    "cem.potential('x', model, y)", "cem.potential('pgd', model, x)", "cem.potential('', model)",
    "cem.potential('ce', encoder, y)", "cem.potential('pgd', encoder)",
    "cem.potential('maxent', model)", "cem.potential(None, model, y)",
    "cem.potential('maxent', encoder)(x[:1])", "cem.potential('maxent', encoder)(x[:0])",
    *(f"buffer.sample(log_p, 2, **dict(steps=1, step_size=1) | dict({name}={v}))" for name in (
        "steps", "step_size", "noise") for v in ("nan", "inf", "-1")),
    *(f"cem.ParametricCEM(**dict(width=4) | dict({name}={v}))" for name in (
        "width", "num_classes", "in_channels") for v in ("nan", "inf", "-1", "0")),
    *(f"cem.ParametricCEM(width=4, {name}={v})" for name in ("mean", "std") for v in (
        "nan", "inf", "[0.5, nan, 0.5]", "[0.5, 0.5]", "[]")),
    "cem.ParametricCEM(width=4, std=0)", "cem.ParametricCEM(width=4, std=-1)",
    *(f"cem.NonParametricCEM('resnet18', width=4, {name}={v})" for name in (
        "embed_dim", "temperature") for v in ("nan", "inf", "-1", "0")),
    "cem.ParametricCEM('vgg')", "cem.ParametricCEM('')", "cem.ParametricCEM('wrn-28-4', width=0)",
    "cem.ParametricCEM(None)", "cem.NonParametricCEM('resnet')",
    "cem.info_nce(z, z[:2], 0.3)", "cem.info_nce(z[:1], z[:1], 0.3)",
    "cem.info_nce(z, z, 0.3, 'sum')", "cem.info_nce(z[:0], z[:0], 0.3)",
    "cem.supervised_loss('x', model, x, y)", "cem.supervised_loss('at', model, x, y)",
    "cem.supervised_loss('dat', model, x[:2], y[:2], x, x_s=x)",
    "cem.supervised_loss('mle', model, x, y)", "cem.supervised_loss('jeat', model, x, y)",
    SEEDS.format("m[0], f, (3, 8, 8)"), SEEDS.format("m, f[0], (3, 8, 8)"),
    SEEDS.format("m, f, (8, 8)"), SEEDS.format("m, f, (3, 9, 9)"), SEEDS.format("m[:2], f, s"),
    SEEDS.format("m * nan, f, (3, 8, 8)"), SEEDS.format("m, f * inf, (3, 8, 8)"),
    *(STATE.format(f"{{**state, '{name}': {v}}}") for name, v in (
        ("mean", "None"), ("mean", "3"), ("factor", "[1]"), ("shape", "3"), ("shape", "None"),
        ("mean", "m * nan"), ("factor", "f[:2]"), ("shape", "(3, 8.0, 8)"), ("shape", "'abc'"))),
    STATE.format("{}"), STATE.format("None"), STATE.format("[]"), STATE.format("'mean'"),
    FIT.format("x, y[:3]"), FIT.format("x[:1], y[:1]"), FIT.format("255 * x, y"),
    FIT.format("x * nan, y"), FIT.format("x, y.float()"), FIT.format("x, y - 1"),
    FIT.format("x, y % 2, rank=0"), FIT.format("x, y % 2, rank=-1"), FIT.format("x, y"),
    FIT.format("x, y % 2, num_classes=1"), FIT.format("x, y % 2, num_classes=3"),
    FIT.format("x[0], y"), FIT.format("x.long(), y % 2"), FIT.format("x, y[:, None] % 2"),
    "seeds.sample(y + 2)", "seeds.sample(y.float())", "seeds.sample(2, [g])", "seeds.sample(-1)",
    *(f"cem.save('a.pt', model, {v})" for v in (
        "a=np.zeros(2)", "a=object()", "a=[{'b': np.float32(1)}]", "a={1, 2}", "a=b'x'", "a=1j",
        "a=Path('x')", "a=len")),
    "setattr(encoder, 'temperature', -1.0) or cem.save('a.pt', encoder)",
    "cem.save('a.pt', cem.folded(model))", "cem.save('a.pt', torch.nn.Linear(2, 2))",
    "cem.save('a.pt', type('Mine', (cem.ParametricCEM,), {})(width=4))",
    "cem.supervised_loss('jem', model, x, y)", "cem.load('none.pt')", "cem.load('.')",
    "cem.load('junk')", "cem.load('empty')", "cem.load('pickled')", "cem.load('other.pt')",
    "interop.load('junk')", "interop.load('other.pt')", "interop.load('pickled')",
    "interop.export('a.pt', model, 'x')", "interop.export('a.pt', encoder)",
]  # fmt: skip
RIGHT = [
    "cem.pgd(cem.potential('ce', model, y[:0]), x[:0], eps=0.5)",
    "cem.ascend(cem.potential('rcs', model, y[:0]), x[:0], steps=2, step_size=0.1, noise=1)",
    ASCEND.format("steps=0"), ASCEND.format("step_size=0"), ASCEND.format("eps=0"),
    PGD.format("eps=0"), PGD.format("norm='linf', random_start=False"),
    PGD.format("generator=[g] * 6"), ASCEND.format("noise=0.1, generator=[g] * 6"),
    ASCEND.format("clip=None, momentum=0.9"), ASCEND.format("start=x.flip(0)"),
    "cem.pgd(ce, x[:1].expand(6, -1, -1, -1), eps=0.5)",
    "cem.pgd(ce, x.transpose(2, 3), eps=0.5)",
    "cem.pgd(ce, x[:, :, ::2].repeat(1, 1, 2, 1), eps=1)",
    "cem.pgd(cem.potential('ce', copy.deepcopy(model).double(), y), x.double(), eps=0.5)",
    "cem.pgd(ce, x.requires_grad_(), eps=0.5)", "cem.pgd(ce, torch.zeros_like(x), eps=0.5)",
    "cem.pgd(ce, x.to(memory_format=torch.channels_last), eps=8 / 255, norm='linf')",
    "buffer.sample(log_p, 8, steps=1, step_size=0.1)", "seeds.sample(0)", "seeds.sample(y[:0])",
    "buffer.sample(log_p, 0, steps=1, step_size=0.1)", "seeds.sample(2, [g, g])",
    FIT.format("x, y % 2, rank=10**9") + ".mean", "cem.info_nce(z, z, 0.3, 'none')",
    FIT.format("x.mul(255).byte(), y % 2") + ".mean", "model(x[:0])", "encoder(x[:0])",
    "cem.potential('langevin', model)(x)",
]  # fmt: skip


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the statements of the tables refer to."""
    monkeypatch.chdir(tmp_path)
    text("junk")
    text("empty", "")
    Path("pickled").write_bytes(pickle.dumps(print, 2))
    torch.save({"format": "other"}, "other.pt")
    n = SimpleNamespace(**TOOLS, copy=copy, interop=interop, s=(3, 8, 8))
    n.ReplayBuffer = ReplayBuffer
    n.model, n.encoder = (kind(width=4).eval() for kind in cem.KINDS.values())
    n.x, n.y, n.g = torch.rand(6, 3, 8, 8), torch.arange(6) % 3 + 2, torch.Generator()
    n.ce, n.rcs = (cem.potential(name, n.model, n.y) for name in ("ce", "rcs"))
    n.log_p, n.z = cem.potential("langevin", n.model), n.encoder(n.x).detach()
    n.seeds, n.buffer = cem.GaussianSeeds.fit(n.x, n.y % 2), ReplayBuffer(8, n.s)
    n.m, n.f, n.state = n.seeds.mean, n.seeds.factor, n.seeds.state_dict()
    n.y = n.y.add(3)  # for `model`, the largest label is 7
    return vars(n)


def test_wrong_calls_raise_a_cem_error_of_one_line(names, tmp_path):
    found, before = [], listing(tmp_path)
    names["y"] = torch.tensor([9, 0, 1, 2, 3, 4])  # beyond 9 with + 5, below 0 with - 1
    for row in WRONG:
        try:
            eval(row, dict(names))
            found.append(f"{row}: no error")
        except cem.CEMError as error:
            line = len(str(error)) > 8 and "\n" not in str(error)
            found.append("" if line else f"{row}: {error}")
        except Exception as error:
            found.append(f"{row}: {type(error).__name__}: {str(error).splitlines()[0]}")
    found.append("a file was left" if listing(tmp_path) != before else "")
    assert_no_fault(found)


def test_unusual_calls_succeed(names):
    found = []
    for row in RIGHT:
        try:
            finite = bool(eval(row, dict(names)).isfinite().all())
            found.append("" if finite else f"{row}: not finite")
        except Exception as error:
            found.append(f"{row}: {type(error).__name__}: {str(error).splitlines()[0]}")
    assert_no_fault(found)


# ------------------------------------------------------------------------------------------- fuzz


def nodes(value, parents=()) -> list:
    """(container, key) of everything in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in list(items):
        found.append((value, key))
        if isinstance(item, (dict, list)):
            found += nodes(item)
    return found


def mutate(content: dict, rng: random.Random) -> dict:
    """Remove, rename, replace or distort one to three parts of nested dicts and lists."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        parent, key = rng.choice(nodes(content) or [(content, "none")])
        value = parent[key] if isinstance(parent, list) else parent.get(key)
        kind = rng.randrange(4)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice([f"{key}x", 3, "", "mean", "shape"])] = parent.pop(key)
        elif kind == 2 and isinstance(value, (torch.Tensor, np.ndarray)) and value.size:
            parent[key] = distort(value, rng)
        else:
            other = [None, 3, -1, 0, 2.5, math.nan, 10**400, "x", "../x", [], {}, [8, 8], True]
            parent[key] = rng.choice([*other, torch.zeros(2), torch.zeros(3, 0)])
        if not content:
            break
    return content


def distort(value, rng: random.Random):
    """An array or tensor with another value, shape or type."""
    tensor = torch.as_tensor(value).clone()
    if not tensor.numel():
        return value
    how = rng.randrange(5)
    if how == 0:
        wild = [math.nan, math.inf, -1e30] if tensor.is_floating_point() else [-5, 200]
        if tensor.dtype != torch.uint8:
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(wild)
    elif how == 1:
        tensor = tensor.reshape(-1)[: rng.randint(0, tensor.numel())]
    elif how == 2:
        tensor = tensor.to(rng.choice([torch.float64, torch.int8, torch.bool, torch.complex64]))
    elif how == 3:
        tensor = tensor.unsqueeze(rng.randint(0, tensor.dim()))
    else:
        tensor = tensor.transpose(0, -1) if tensor.dim() else tensor[None]
    return tensor if isinstance(value, torch.Tensor) else tensor.numpy()


def scramble(raw: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut out or inserted in one to three places."""
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(raw)), rng.choice([1, 4, 100, 5000])
        rubbish = rng.randbytes(length)
        replaced = rng.choice([length, 0])
        raw = raw[:at] + (rubbish if rng.random() < 0.7 else b"") + raw[at + replaced :]
    return raw or b"x"


def read_checkpoint(path: Path) -> None:
    model = interop.load(path)
    assert all(v.isfinite().all() for v in model.state_dict().values())
    if "seeds" in model.extra:
        seeds = cem.GaussianSeeds.from_state_dict(model.extra["seeds"])
        assert seeds.sample(2).isfinite().all()
        assert seeds.sample(torch.zeros(1, dtype=torch.int64)).isfinite().all()


def read_archive(path: Path) -> None:
    pixels, labels = data.read_samples(path)
    assert pixels.dtype == torch.uint8 and pixels.dim() == 4 and len(pixels) == len(labels) > 0


def fuzzed(content: dict, encode, read, path: Path, seed: int, count: int) -> list[str]:
    """The faults of reading `count` mutations of the content, or of its encoded bytes."""
    rng, found, whole = random.Random(seed), [], encode(content)
    for i in range(count):
        raw = scramble(whole, rng) if i % 2 else encode(mutate(content, rng))
        path.write_bytes(raw)
        try:
            read(path)
            found.append("")
        except cem.CEMError as error:
            found.append("" if "\n" not in str(error) else f"mutation {i}: {error}")
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else ""
            found.append(f"mutation {i} of seed {seed}: {type(error).__name__}: {line}")
    return found


def encoded(write, content) -> bytes:
    file = io.BytesIO()
    write(content, file)
    return file.getvalue()


def write_archive(content: dict, file) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in content.items():
            with archive.open(f"{name}.npy", "w") as member:
                kind = None if hasattr(value, "dtype") else object
                np.save(member, np.asarray(value, dtype=kind))


@pytest.mark.slow
def test_mutated_files_are_refused_or_finite(tmp_path):
    model, x, y = cem.ParametricCEM(num_classes=2, width=4), torch.rand(8, 3, 8, 8), torch.arange(8)
    seeds = cem.GaussianSeeds.fit(x, y % 2, 2).state_dict()
    content = {"format": "cem", "kind": "ParametricCEM", "config": model.config}
    content["state"] = dict(model.state_dict())
    content["extra"] = dict(seeds=seeds, classes=["a", "b"], image_shape=[3, 8, 8], dataset="d")
    save = functools.partial(encoded, torch.save)
    found = fuzzed(content, save, read_checkpoint, tmp_path / "a.pt", 0, 500)
    samples = {"arr_0": PIXELS, "arr_1": np.arange(12)}
    pack_up = functools.partial(encoded, write_archive)
    found += fuzzed(samples, pack_up, read_archive, tmp_path / "a.npz", 1, 500)
    assert_no_fault(found)
