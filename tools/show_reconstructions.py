"""A run's tokenizer -> one PNG: held-out pictures, and under each what its codes keep of it.

    python tools/show_reconstructions.py runs/vqgan_64 kept.png [--pictures 10]
    python tools/show_reconstructions.py runs/vqgan_64 kept.png --query cat.jpg owl.jpg
    python tools/show_reconstructions.py runs/vqgan_64 kept.png --folder kept

--query: pictures of your own instead, cut to a square and scaled down.
--folder: every held-out picture as originals/000000.png and what is kept of it as reconstructions/000000.png,
for any program that compares two folders, such as one for the Frechet distance (FID).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from delvm import recipe as recipes
from delvm.errors import UserError
from delvm.given import Given
from delvm.images.augment import view
from delvm.images.files import read_picture
from delvm.material import open_samples
from delvm.tokenizer import Tokenizer
from delvm.tokenizer.training import to_pictures
from delvm.training import Shuffled

SIDE, GAP = 128, 4  # pixels: of a picture at least, between two


def held_out(folder: Path) -> ConcatDataset:
    """The held-out pictures of a run, (pictures of a sample, H, W, 3) uint8 each.

    Raises:
        UserError: no run, or one without pictures.
    """
    recipe = recipes.load(folder / "recipe.yaml", ["trainer.accelerator=auto", f"run_dir={folder}"])
    views = open_samples(Given(recipe), folder / "data", folder).views("validation")
    if not views:
        raise UserError(f"{folder}: all of its tasks come as tokens, there are no pictures to show")
    return ConcatDataset(views.values())


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, batch: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and what is kept of them: (number, H, W, 3) uint8 each."""
    pictures = to_pictures(batch)
    one, two = (
        (values * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for values in (pictures, tokenizer(pictures))
    )
    return one, two


def sheet(pictures: np.ndarray, kept: np.ndarray) -> Image.Image:
    """A row of pictures over what is kept of them, each pixel a square."""
    size = pictures.shape[1]
    side = size * max(1, SIDE // size)
    canvas = Image.new("RGB", (GAP + len(pictures) * (side + GAP), GAP + 2 * (side + GAP)), "white")
    for line, row in enumerate((pictures, kept)):
        for place, picture in enumerate(row):
            scaled = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(scaled, (GAP + place * (side + GAP), GAP + line * (side + GAP)))
    return canvas


def some(samples: ConcatDataset, number: int) -> torch.Tensor:
    """All pictures of samples spread evenly over each task, (about `number`, H, W, 3) uint8.

    Every task is there, with one sample at least, be they more pictures than `number`.
    """
    each = number // len(samples.datasets)  # pictures of a task
    items = []
    for dataset in samples.datasets:
        wanted = min(max(1, each // len(dataset[0])), len(dataset))
        items += [dataset[place] for place in np.linspace(0, len(dataset) - 1, wanted).astype(int).tolist()]
    return Shuffled.collate(items)


def own(files: list[Path], size: int) -> torch.Tensor:
    """Pictures of a user's, (number, size, size, 3) uint8.

    Raises:
        UserError: one that cannot be read.
    """
    settings = {"policy": "none", "size": size, "nearest": False, "seed": (0,)}
    return torch.from_numpy(np.stack([view([read_picture(file)], [False], **settings)[0] for file in files]))


def write_all(samples: ConcatDataset, tokenizer: Tokenizer, folder: Path) -> None:
    """Every held-out picture and what is kept of it, as PNG under numbers."""
    names = ("originals", "reconstructions")
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    number = 0
    for batch in DataLoader(samples, batch_size=16, collate_fn=Shuffled.collate):
        for pair in zip(*reconstruct(tokenizer, batch), strict=True):
            for name, picture in zip(names, pair, strict=True):
                Image.fromarray(picture).save(folder / name / f"{number:06}.png")
            number += 1


def main() -> int:
    """Arguments in, PNG out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument("--query", type=Path, nargs="+", metavar="PICTURE")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    try:
        if options.folder and options.folder.exists():
            if not options.folder.is_dir():
                raise UserError(f"{options.folder}: a file, must be a new or an empty folder")
            if any(options.folder.iterdir()):
                raise UserError(f"{options.folder}: not empty; old pictures would stay among the new ones")
        samples = held_out(options.run) if options.folder or not options.query else ConcatDataset([[]])
        tokenizer = Tokenizer.load(options.run / "tokenizer")
        shown = own(options.query, tokenizer.image_size) if options.query else some(samples, options.pictures)
        sheet(*reconstruct(tokenizer, shown)).save(options.out)
        if options.folder:
            write_all(samples, tokenizer, options.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
