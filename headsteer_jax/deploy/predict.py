"""Predictions of a deployed model for image files; neither the run nor its data are needed."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from headsteer_jax.data.image_files import ImageFile, read_images
from headsteer_jax.deploy.model import DeployedModel, predict

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


def predict_files(model: DeployedModel, files: Sequence[ImageFile]) -> Iterator[Prediction]:
    """Predict the class of image files, in order; a file that cannot be read gets a line that says why.

    An image of another size than the model reads is cropped at its centre and resized, as for the data of a run.
    """
    size = min(BATCH, len(files))
    for begin in range(0, len(files), size):
        chunk = files[begin : begin + size]
        images, errors = read_images(chunk, model.config.image)
        padded = np.pad(images, ((0, size - len(chunk)), (0, 0), (0, 0), (0, 0)))
        best_B, probability_BC = jax.device_get(predict(model.config, model.params, padded))
        for place, (file, fault) in enumerate(zip(chunk, errors, strict=True)):
            if fault:
                yield Prediction(str(file.path), error=fault)
            else:
                name = model.config.classes[best_B[place]]
                yield Prediction(str(file.path), name, float(probability_BC[place, best_B[place]]))
