"""Samples as files: npz and record, a grid of pictures, one PNG file per image."""

import importlib
import itertools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw
from PIL.Image import Dither
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.functional import to_pil_image

import cem
from lib import cli, files


def grid(images: Tensor, labels: Tensor, columns: int = 10, side: int = 64) -> Tensor:
    """Images uint8 (N, C, H, W) as one picture, each enlarged to at least `side` pixels.

    One row per class; without labels (all -1), the first columns² images.
    """
    if labels.max() < 0:
        images = images[: columns**2]
    else:
        rows = [images[labels == k][:columns] for k in labels.unique()]
        columns = max(map(len, rows))
        images = pad_sequence(rows, batch_first=True).flatten(0, 1)
    scale = math.ceil(side / images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return torchvision.utils.make_grid(images, nrow=columns, padding=2)


def write(folder: Path, name: str, images: Tensor, labels: Tensor, record: dict) -> Path:
    """Write name.npz (arr_0: images (N, H, W, C), arr_1: labels), its grid .png and record .json.

    images uint8 (N, C, H, W); labels int64 (N,), -1 for images without a class. They replace the
    set of the same record["set"]; beside another one, or files that are no set, they get a number.
    -> the path of the record.
    """
    path = claim(folder, name, record["set"])
    npz = path.with_suffix(".npz")
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy(), "arr_1": labels.numpy()}
    try:
        cem.write_atomically(npz, lambda file: np.savez_compressed(file, **arrays))
        write_grid(path.with_suffix(".png"), grid(images, labels))
        files.write_json(path, record)
    except BaseException:
        if not npz.exists():  # claimed now, with nothing to show for it
            path.unlink()
        raise
    print(f"wrote {npz}, .png and .json")
    return path


def write_grid(path: Path, picture: Tensor) -> None:
    """Write a picture uint8 (C, H, W) as PNG."""
    image = to_pil_image(picture)
    cem.write_atomically(path, lambda file: image.save(file, "PNG"))


def pyplot():
    """matplotlib.pyplot, which is optional."""
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise cem.CEMError("the figure needs matplotlib: pip install matplotlib") from error


def write_figure(path: Path, figure) -> None:
    """Write a figure of matplotlib as PNG, and close it."""
    options = dict(format="PNG", dpi=120, bbox_inches="tight")
    cem.write_atomically(path, lambda file: figure.savefig(file, **options))
    pyplot().close(figure)


def write_overview(path: Path, grids: dict[str, Path], columns: int = 4) -> None:
    """Write several grids as one PNG, each in half its size under its name."""
    tiles = []
    for name, file in grids.items():
        picture = Image.open(file).convert("RGB").reduce(2)
        tile = Image.new("RGB", (picture.width, picture.height + 16), "white")
        ImageDraw.Draw(tile).text((2, 2), name, "black")
        tile.paste(picture, (0, 16))
        tiles.append(tile)
    width, height = (max(size) for size in zip(*(tile.size for tile in tiles)))
    rows = math.ceil(len(tiles) / columns)
    whole = Image.new("RGB", (width * min(columns, len(tiles)), height * rows), "white")
    for i, tile in enumerate(tiles):
        whole.paste(tile, (i % columns * width, i // columns * height))
    cem.write_atomically(path, lambda file: whole.save(file, "PNG"))


FRAMES, COLOURS = 16, 64  # of a GIF: 10 x 10 images of 32 x 32 pixels take less than 2 MB


def write_gif(path: Path, frames: list[Tensor], labels: Tensor) -> None:
    """Write grids of the frames, uint8 (N, C, H, W) each, as an animation; the last one stays."""
    last = len(frames) - 1
    chosen = sorted({round(i * last / (FRAMES - 1)) for i in range(FRAMES)})
    grids = [grid(frames[i], labels, side=32) for i in chosen]
    palette = to_pil_image(torch.cat(grids, 1)).quantize(COLOURS)
    first, *others = [to_pil_image(g).quantize(palette=palette, dither=Dither.NONE) for g in grids]
    times = dict(duration=[200] * len(others) + [3000], loop=0)
    options = dict(format="GIF", save_all=True, append_images=others, **times)
    cem.write_atomically(path, lambda file: first.save(file, **options))
    print(f"wrote {path}")


def claim(folder: Path, name: str, identity: str) -> Path:
    """The .json file of the set `identity`, which is created if it does not exist yet.

    <name>.json, or <name>-1.json, -2, ... beside others' sets or files. Two processes never get
    the same one.
    """
    for number in itertools.count():
        path = folder / f"{name}{f'-{number}' * (number > 0)}.json"
        content = files.read_json(path)
        if isinstance(content, dict) and content.get("set") == identity and not path.is_symlink():
            return path
        if any(os.path.lexists(path.with_suffix(end)) for end in (".npz", ".png", ".json", ".gif")):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "x") as file:
                json.dump({"set": identity}, file)
        except FileExistsError:
            continue
        if number:
            print(f"kept {folder / name}.*: not drawn with these options and weights")
        return path


def part_of(parts: Path, first: int) -> Path:
    """The file of the batch whose first image has the number `first`."""
    return parts / f"{first:09d}.npz"


def write_part(parts: Path, first: int, images: Tensor, labels: Tensor) -> None:
    """Store a finished batch, from which an interrupted run continues."""
    arrays = {"images": images.numpy(), "labels": labels.numpy()}
    cem.write_atomically(part_of(parts, first), lambda file: np.savez(file, **arrays))


def read_part(parts: Path, first: int) -> tuple[Tensor, Tensor] | None:
    """The images and labels of a finished batch, or None if its file is missing or damaged."""
    path = part_of(parts, first)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive can fail in any way
        cli.warn(f"{path} is damaged ({type(error).__name__}): redrawing its batch")
        return None


def write_files(folder: Path, images: Tensor, labels: Tensor, classes: list[str]) -> None:
    """Write one PNG file per image, folder/<index>.png, and again as folder/<class>/<index>.png.

    The folder appears once it is complete. Images with label -1 have no class folder. Class names
    are names of folders, not paths: lib/schema.py refuses a checkpoint with others.
    """
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    digits = len(str(len(images)))
    try:
        temporary.mkdir(parents=True)
        for i, (image, label) in enumerate(zip(images, labels.tolist())):
            path = temporary / f"{i:0{digits}d}.png"
            to_pil_image(image).save(path)
            if label >= 0:
                of_class = temporary / classes[label]
                of_class.mkdir(exist_ok=True)
                shutil.copyfile(path, of_class / path.name)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {len(images)} PNG files to {folder}")
