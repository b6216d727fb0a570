"""The dataset whose sizes decide the programs' shapes: the real one where it is, else one that only has its sizes."""

from collections.abc import Iterable

import numpy as np

from headsteer_jax.config.schema import Config, DataConfig
from headsteer_jax.data.dataset import Dataset, LazyImages, Split
from headsteer_jax.data.sources import cut_dataset, data_places, load_dataset
from headsteer_jax.data.splits import RawData
from headsteer_jax.errors import HeadSteerError

# images of train and test, classes, and an image's side (0: images of several sizes), as their makers publish them
PUBLISHED = {
    "mnist": (60_000, 10_000, 10, 28),
    "fashion_mnist": (60_000, 10_000, 10, 28),
    "cifar10": (50_000, 10_000, 10, 32),
    "cifar100": (50_000, 10_000, 100, 32),
    "imagenet2012": (1_281_167, 50_000, 1_000, 0),
}


def find_sizes(config: Config, images: int | None, classes: int | None) -> Dataset:
    """Load the dataset of a config if it is on this machine, or make one of the same sizes that has no images.

    Args:
      images: of train and everything that is cut from it, if the user says it.
      classes: the number of classes, if the user says it.

    Raises:
      HeadSteerError: the data are not here and their sizes are not known, or only one of the two is given.
    """
    data = config.data
    if (images is None) != (classes is None):
        missing = "classes" if classes is None else "images"
        raise HeadSteerError(f"--{missing}: missing; --images and --classes together replace the data")
    if images is not None and classes is not None:
        return imagine_dataset(config, images, None, classes, data.image_size)
    places = data_places(data)
    if not places or all(place.exists() for place in places):
        return load_dataset(data, config.seed, config.machine.image_memory)
    if data.source == "tfds" and data.name in PUBLISHED:
        train, test, classes, side = PUBLISHED[data.name]
        return imagine_dataset(config, train, test, classes, side or data.image_size)
    raise HeadSteerError(
        f"{places[0]}: the data are not here, and their sizes are not known; put them there, or pass --images=N "
        "--classes=C"
    )


def imagine_dataset(config: Config, train: int, test: int | None, classes: int, side: int) -> Dataset:
    """Make a dataset of these sizes, cut and limited as the config says, whose images cannot be read.

    Args:
      train: the number of published images of train.
      test: of test; None: it is cut from train.
      side: of an image.

    Raises:
      HeadSteerError: there are too few images for the classes.
    """
    if train < 3 * classes or classes < 1:
        raise HeadSteerError(f"--images={train}: must be at least 3 for each of the {classes} classes")

    def refuse(places: list[int]) -> Iterable[np.ndarray]:
        raise AssertionError("these images do not exist")

    def make_split(count: int) -> Split:
        shape = (side, side, config.data.channels)
        return Split(LazyImages(refuse, np.arange(count), shape), (np.arange(count) % classes).astype(np.int32))

    def read(_: DataConfig) -> RawData:
        names = tuple(f"class {number}" for number in range(classes))
        return RawData(make_split(train), None if test is None else make_split(test), names)

    return cut_dataset(read, config.data.model_copy(update={"related": ()}), config.seed, memory=0)
