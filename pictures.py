"""Samples as files: npz and record, a grid of pictures, a PNG file an image."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

import cem
import cli


def grid(images: Tensor, labels: Tensor, columns: int = 10) -> Tensor:
    """A picture with a row a class, enlarged to at least 64 pixels an image; without labels, the first images."""
    if labels.max() >= 0:
        rows = [images[labels == k][:columns] for k in labels.unique()]
        columns = max(len(row) for row in rows)
        blank = torch.zeros_like(images[:1])
        images = torch.cat([torch.cat([row, blank.expand(columns - len(row), -1, -1, -1)]) for row in rows])
    else:
        images = images[: columns**2]
    scale = -(-64 // images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return torchvision.utils.make_grid(images, nrow=columns, padding=2)


def write(folder: Path, name: str, images: Tensor, labels: Tensor, record: dict) -> None:
    npz, png = folder / f"{name}.npz", folder / f"{name}.png"
    arrays = dict(arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    cem.replace(npz, lambda file: np.savez_compressed(file, **arrays))
    picture = torchvision.transforms.functional.to_pil_image(grid(images, labels))
    cem.replace(png, lambda file: picture.save(file, "PNG"))
    cli.write_text(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
    print(f"wrote {npz}, .png and .json")


def part_of(parts: Path, first: int) -> Path:
    return parts / f"{first:09d}.npz"


def write_part(parts: Path, first: int, images: Tensor, labels: Tensor) -> None:
    """Keep a finished batch, which begins with image number `first`."""
    cem.replace(part_of(parts, first), lambda file: np.savez(file, images=images.numpy(), labels=labels.numpy()))


def read_part(parts: Path, first: int) -> tuple[Tensor, Tensor] | None:
    """The finished batch, if it is there and whole."""
    try:
        with np.load(part_of(parts, first), allow_pickle=False) as arrays:
            return tuple(torch.from_numpy(arrays[name]) for name in ("images", "labels"))
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive can fail in any way
        cli.warn(f"{part_of(parts, first)} is damaged ({type(error).__name__}): drawn anew")
        return None


def write_files(folder: Path, images: Tensor, labels: Tensor, classes: list[str]) -> None:
    """A PNG an image: folder/<class>/<index>.png, and the same file as folder/<index>.png; the folder whole or not at all."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for i, (image, k) in enumerate(zip(images, labels.tolist())):
            path = temporary / f"{i:0{len(str(len(images)))}d}.png"
            torchvision.transforms.functional.to_pil_image(image).save(path)
            if k >= 0:  # names from a file: no paths
                (inner := temporary / (re.sub(r"[^\w -]", "_", classes[k]) or str(k))).mkdir(exist_ok=True)
                try:
                    os.link(path, inner / path.name)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, inner / path.name)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {len(images)} PNG files into {folder}")
