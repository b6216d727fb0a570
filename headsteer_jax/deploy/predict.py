"""Predictions of a deployed model for image files; neither the run nor its data are needed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from headsteer_jax.data.decode import decode_image, readable_suffixes
from headsteer_jax.data.names import is_system_name
from headsteer_jax.deploy.model import DeployedModel, predict
from headsteer_jax.errors import HeadSteerError

BATCH = 64


class Prediction(NamedTuple):
    """The answer for one image file."""

    path: str
    class_name: str = ""
    probability: float = 0.0
    error: str = ""  # why there is no answer

    def to_json(self) -> dict[str, str | float]:
        """Return what `headsteer predict --json` prints."""
        if self.error:
            return {"path": self.path, "error": self.error}
        return {"path": self.path, "class": self.class_name, "probability": round(self.probability, 6)}


def list_images(paths: Sequence[str]) -> list[Path]:
    """List image files: those that are named, and those that lie below directories that are named, in order.

    Raises:
      HeadSteerError: a path does not exist, or a directory holds no image.
    """
    files: list[Path] = []
    for text in paths:
        path = Path(text)
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*")
                if file.suffix.lower() in readable_suffixes() and not is_system_name(file.name) and file.is_file()
            )  # fmt: skip
            if not inside:
                raise HeadSteerError(f"{path}: there is no image in it; give image files, or directories of them")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise HeadSteerError(f"{path}: no such file; give image files, or directories of them")
    return files


def predict_files(model: DeployedModel, files: Sequence[Path]) -> Iterator[Prediction]:
    """Predict the class of image files, in order; a file that cannot be read gets a line that says why.

    An image of another size than the model reads is cropped at its centre and resized, as for the data of a run.
    """
    size = min(BATCH, len(files))
    for begin in range(0, len(files), size):
        chunk = files[begin : begin + size]
        images, errors = np.zeros((size, *model.config.image), np.uint8), [""] * len(chunk)
        for place, file in enumerate(chunk):
            try:
                images[place] = decode_image(file, str(file), model.config.image, fit=True)
            except HeadSteerError as error:
                errors[place] = str(error)
        best_B, probability_BC = jax.device_get(predict(model.config, model.params, images))
        for place, (file, fault) in enumerate(zip(chunk, errors, strict=True)):
            if fault:
                yield Prediction(str(file), error=fault)
            else:
                name = model.config.classes[best_B[place]]
                yield Prediction(str(file), name, float(probability_BC[place, best_B[place]]))
