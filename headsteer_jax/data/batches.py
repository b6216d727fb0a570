"""The order in which training sees the images, and its batches on the devices, ahead of the steps."""

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
    """function(i) for i in range(start, count), in order, computed ahead in threads.

    What a call raises is raised here when its turn comes.
    """
    # In a tuple, as grain leaves out elements that are None.
    ahead = grain.MapDataset.range(start, count).map(lambda i: (function(int(i)),))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return (element[0] for element in ahead.to_iter_dataset(options))


def batch_indices(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """[batch] indices of training step `step`: each epoch is a permutation that follows from (seed, epoch) alone.

    Resuming is arithmetic: no iterator has a state. The rest of an epoch that does not fill a batch is left out.
    """
    epoch, position = divmod(step, count // batch)
    order = np.random.default_rng([seed, 1, epoch]).permutation(count)
    return order[position * batch : (position + 1) * batch]


def device_batches(
    split: Split, config: Config, devices: Mesh, calls: Sequence[tuple[int, int]], offset: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Each call's images [n, B, h, w, c] uint8 and labels [n, B], on the devices, ahead of the call in threads.

    Each host reads the rows of its own devices. The batches follow from the seed and the step alone: they are the same
    on any number of hosts, and a run goes on in the middle of them.

    Args:
      calls: the first step of each, and the one after its last.
      offset: of the phase's first step, in steps of the whole training.
    """
    batch, count = config.train.batch, len(split.labels)
    live, rows = mesh.batch_sharding(devices, axis=1), mesh.local_rows(mesh.batch_sharding(devices), batch)

    def one(call: int) -> tuple[jax.Array, jax.Array]:
        indices = np.stack([batch_indices(count, batch, config.seed, offset + i)[rows] for i in range(*calls[call])])
        images = gather_images(split.images, indices.ravel())
        images = images.reshape(*indices.shape, *images.shape[1:])
        return tuple(
            jax.make_array_from_process_local_data(live, part, (len(part), batch, *part.shape[2:]))
            for part in (images, split.labels[indices])
        )

    return prefetch(one, len(calls), threads=config.machine.prefetch)
