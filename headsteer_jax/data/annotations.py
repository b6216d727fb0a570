"""Labels of images that lie in one directory, in the files that the makers of Tiny ImageNet and ImageNet publish."""

from pathlib import Path
from typing import NamedTuple

from headsteer_jax.data.names import normalise_name
from headsteer_jax.errors import HeadSteerError, explain_errors

LEVELS = 4  # the number of directories above a split that are searched for annotations: ILSVRC/Data/CLS-LOC/val has 4


class Annotations(NamedTuple):
    """The classes of a split's images."""

    file: Path  # the file that lists them
    classes: dict[str, str]  # by the image's file name without its suffix


def find_annotations(split: Path) -> Annotations | None:
    """Find and read the classes of the images below a directory; None if no known file lists them.

    The known files are Tiny ImageNet's `val/val_annotations.txt`, Kaggle's `LOC_val_solution.csv` of ImageNet, and
    `ILSVRC2012_validation_ground_truth.txt` with `meta.mat` from ImageNet's development kit.

    Raises:
      HeadSteerError: the file cannot be read.
    """
    file = split / f"{split.name}_annotations.txt"
    if file.is_file():
        return Annotations(file, _read_rows(file, "\t", header=False))
    for directory in (split, *split.absolute().parents[:LEVELS]):
        file = directory / f"LOC_{split.name}_solution.csv"
        if file.is_file():
            return Annotations(file, _read_rows(file, ",", header=True))
        for kit in (directory, directory / "data", directory / "ILSVRC2012_devkit_t12" / "data"):
            file = kit / "ILSVRC2012_validation_ground_truth.txt"
            if split.name == "val" and file.is_file() and (kit / "meta.mat").is_file():
                return Annotations(file, _read_development_kit(file, kit / "meta.mat"))
    return None


def _read_rows(file: Path, separator: str, header: bool) -> dict[str, str]:
    """Read rows of an image's name and its class, the first word of the second column."""
    with explain_errors(normalise_name(str(file)), "download it again"):
        rows = [line.split(separator) for line in file.read_text("utf-8-sig").splitlines()[header:] if line.strip()]
        return {Path(row[0]).stem: row[1].split()[0] for row in rows}


def _read_development_kit(file: Path, meta: Path) -> dict[str, str]:
    """Read the class numbers of ImageNet's validation images, and convert them to WordNet names."""
    from scipy.io import loadmat

    with explain_errors(normalise_name(str(meta)), "download the development kit again"):
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    with explain_errors(normalise_name(str(file)), "download the development kit again"):
        numbers = [int(line) for line in file.read_text().split()]
    unknown = set(numbers) - set(wnids)
    if unknown:
        raise HeadSteerError(
            f"{normalise_name(str(file))}: {meta.name} has no class {min(unknown)}; download both again"
        )
    return {f"ILSVRC2012_val_{number:08d}": wnids[label] for number, label in enumerate(numbers, start=1)}
