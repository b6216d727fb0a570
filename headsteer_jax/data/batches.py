"""The order in which training sees the images, and the prefetching of its batches onto the devices."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Split, gather_images
from headsteer_jax.runtime import mesh

T = TypeVar("T")


def prefetch(function: Callable[[int], T], count: int, start: int = 0, threads: int = 2) -> Iterator[T]:
    """Yield function(i) for i in range(start, count), in order, computed ahead in threads.

    An error of a call is raised when its turn comes.
    """
    # Results are wrapped in a tuple, because grain leaves out elements that are None.
    ahead = grain.MapDataset.range(start, count).map(lambda i: (function(int(i)),))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return (element[0] for element in ahead.to_iter_dataset(options))


def batch_indices(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Return the indices [batch] of a training step's images.

    Each epoch is a permutation that follows from (seed, epoch) alone, so that resuming needs no iterator's state.
    Images at the end of an epoch that do not fill a batch are left out.
    """
    epoch, position = divmod(step, count // batch)
    return _draw_order(count, seed, epoch)[position * batch : (position + 1) * batch]


@functools.lru_cache(maxsize=4)  # a permutation of ImageNet's size takes as long as several training steps
def _draw_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Draw the order of an epoch's images, [count]."""
    order = np.random.default_rng([seed, 1, epoch]).permutation(count)
    order.flags.writeable = False  # all callers share it
    return order


def device_batches(
    split: Split, config: Config, devices: Mesh, calls: Sequence[tuple[int, int]], offset: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yield each call's images [n, B, h, w, c] uint8 and labels [n, B] on the devices, read ahead in threads.

    Each host reads the rows of its own devices. The batches follow from the seed and the step alone: they are the same
    on any number of hosts and for a resumed run.

    Args:
      calls: the first step of each call, and the step after its last.
      offset: the phase's first step, counted from the beginning of the whole training.
    """
    batch, count = config.train.batch, len(split.labels)
    sharding, rows = mesh.batch_sharding(devices, axis=1), mesh.local_rows(mesh.batch_sharding(devices), batch)

    def load_call(call: int) -> tuple[jax.Array, jax.Array]:
        indices = np.stack([batch_indices(count, batch, config.seed, offset + i)[rows] for i in range(*calls[call])])
        images = gather_images(split.images, indices.ravel())
        images = images.reshape(*indices.shape, *images.shape[1:])
        return tuple(
            jax.make_array_from_process_local_data(sharding, part, (len(part), batch, *part.shape[2:]))
            for part in (images, split.labels[indices])
        )

    return prefetch(load_call, len(calls), threads=config.machine.prefetch)
