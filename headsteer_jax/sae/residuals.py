"""Residuals for the autoencoders: held in memory, or cached in shards on disk or in a bucket.

A cached array is `<directory>/<fingerprint>/<split>/layer_<l>_<tokens>/`: a zarr array [N, T', D] that TensorStore
writes shard by shard, and `meta.json`, written last: without it the array is incomplete, and the next run goes on from
its first missing shard. A shard is a file of about BLOCKS blocks; a block is a few images with a checksum, and what is
read by itself, so that a random group of blocks mixes images from all over the split.

The fingerprint is of everything that a residual depends on: another model, image or mean has another directory.
Axes: N images, T' tokens kept of each (CLS, its patches or both, never registers), D width.
"""

import itertools
import json
import logging
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath

from headsteer_jax.config.schema import Config, DataConfig
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import SAMPLED_IMAGES, LazyImages, Split, gather_images, sha256_of
from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.model.passes import Program, per_image_program, run_over_split, stream_split
from headsteer_jax.model.vit import TrainedModel, fingerprint_params
from headsteer_jax.runtime import hosts

logger = logging.getLogger(__name__)

Tokens = Literal["cls", "patches", "all"]
Directory = str | os.PathLike[str]  # local, or gs://bucket/path

CACHE_FORMAT = 1  # in the fingerprint: raise it when the files or the forward pass change
SHARD_BYTES = 32 * 2**20
BLOCKS_PER_SHARD = 32  # of a shard, or a few more
CALL_BYTES = 256 * 2**20  # that one call of the model may return, two of which are under way
RETRIES = {"max_retries": 5, "initial_delay": "500ms", "max_delay": "4s"}  # of a bucket; TensorStore's own take minutes
CONNECT_SECONDS = 60  # seconds for a bucket's first answer


class Residuals(Protocol):
    """[N, D] float32 residuals, wherever they are."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def chunks(self) -> Iterator[np.ndarray]:
        """All of them in order, [n, D] at a time."""

    def groups(self, rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """All of them, about `rows` at a time; which ones come together is random."""


class ResidualsInMemory(NamedTuple):
    """Residuals in memory."""

    x_ND: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.x_ND.shape

    def chunks(self) -> Iterator[np.ndarray]:
        for begin in range(0, len(self.x_ND), 8192):
            yield self.x_ND[begin : begin + 8192]

    def groups(self, rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        if rows >= len(self.x_ND):
            yield self.x_ND
            return
        order = rng.permutation(len(self.x_ND))
        for begin in range(0, len(order), rows):
            yield self.x_ND[order[begin : begin + rows]]


class StoredResiduals(NamedTuple):
    """Residuals in a TensorStore array, each image's tokens one after the other as rows.

    Every method raises HeadSteerError where what it reads is missing or damaged. `chunks` and `groups` read ahead: two
    parts, and for a moment three, are in memory at once.
    """

    array: ts.TensorStore  # [N, T', D] float32
    block: int  # images that are stored, and best read, together
    where: str

    @property
    def shape(self) -> tuple[int, int]:
        count, tokens, width = self.array.shape
        return count * tokens, width

    @property
    def tokens(self) -> int:
        """T'."""
        return self.array.shape[1]

    def images(self, indices: np.ndarray) -> np.ndarray:
        """[n] image numbers, 0 to N - 1 -> [n, T', D]."""
        return next(self._read([np.asarray(indices)]))

    def chunks(self) -> Iterator[np.ndarray]:
        """All rows in order, [n, D] at a time, whole blocks of about 8192 rows or one."""
        count, step = self.array.shape[0], self.block * max(1, 8192 // (self.block * self.tokens))
        parts = (slice(begin, min(begin + step, count)) for begin in range(0, count, step))
        return (x_nTD.reshape(-1, x_nTD.shape[-1]) for x_nTD in self._read(parts))

    def groups(self, rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """All rows, of as many whole images at a time as `rows` holds (at least one): blocks in random order.

        All at once, and then in order, where `rows` holds them.
        """
        count, per_group = self.array.shape[0], max(1, rows // self.tokens)
        blocks = rng.permutation(-(-count // self.block)) if per_group < count else np.arange(-(-count // self.block))
        order = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
        order = order[order < count]
        parts = (order[begin : begin + per_group] for begin in range(0, count, per_group))
        return (x_nTD.reshape(-1, x_nTD.shape[-1]) for x_nTD in self._read(parts))

    def _read(self, parts: Iterable[Any]) -> Iterator[np.ndarray]:
        """[n, T', D] of each part, the next one under way meanwhile."""
        reads = (self.array[part].read() for part in parts)
        waiting = deque(itertools.islice(reads, 1))
        while waiting:
            waiting.extend(itertools.islice(reads, 1))
            with explain_errors(self.where, **READ_FAULT):
                x_nTD = waiting.popleft().result()
            yield x_nTD
            del x_nTD  # the caller's alone


class Place(NamedTuple):
    """A directory, for people and for TensorStore."""

    name: str
    kvstore: dict[str, Any]

    def open(self) -> ts.KvStore:
        return ts.KvStore.open(self.kvstore).result()


def _place(directory: Directory, *parts: str) -> Place:
    root = os.fspath(directory)
    if not root.startswith("gs:/"):
        name = "/".join([os.path.abspath(root), *parts])
        return Place(name, {"driver": "file", "path": f"{name}/"})
    # pathlib makes one slash of two
    bucket, *path = "/".join([root.removeprefix("gs:").strip("/"), *parts]).split("/")
    prefix = "".join(f"{part}/" for part in path)
    kvstore = {"driver": "gcs", "bucket": bucket, "path": prefix, "gcs_request_retries": RETRIES}
    return Place(f"gs://{bucket}/{prefix}".rstrip("/"), kvstore)


# what is wrong with a cache that cannot be read or written, and the remedy
READ_FAULT = {"fault": "truncated or damaged", "remedy": "delete it and run the same command"}
WRITE_FAULT = {"fault": "cannot be written", "remedy": "delete it or choose another directory"}


def _source_files(config: DataConfig) -> list[tuple[str, int, float]]:
    """Name, size and time of change of every file of a dataset that is decoded as it is read."""
    paths: Iterable[Any] = ()
    if config.source == "folder":
        paths = epath.Path(config.path).glob("*/*/*")
    elif config.source == "tfds":
        from tensorflow_datasets.core.read_only_builder import builder_from_files

        paths = builder_from_files(config.name, data_dir=config.path or None).data_path.iterdir()
    facts = ((path, path.stat()) for path in sorted(paths))
    return [("/".join(path.parts[-3:]), about.length, about.mtime) for path, about in facts]


def fingerprint_ingredients(trained: TrainedModel, split: Split) -> dict[str, Any]:
    """Everything that the residuals of a split depend on, in JSON's types.

    Images in memory are hashed whole. Of those that are decoded as they are read it is a hash of which they are (their
    places in the source), of the name, size and time of change of each of the source's files, and of SAMPLE of them.
    """
    config, images, shape = trained.config, split.images, list(split.images.shape)
    if isinstance(images, LazyImages):
        some = np.linspace(0, len(images) - 1, SAMPLED_IMAGES).astype(int)
        pixels = sha256_of(
            shape, _source_files(config.data), images._places.astype(np.int64), gather_images(images, some)
        )
    else:
        pixels = sha256_of(shape, images)
    return {
        "format": CACHE_FORMAT,
        "model": fingerprint_params(trained.params),
        "config.model": config.model.model_dump(exclude={"pretrained", "pretrained_head"}),
        "config.gate": config.gate.model_dump(include={"first_layer", "layer_norm", "dropped"}),
        "config.data": config.data.model_dump(include={"image_size", "channels", "mean", "std"}),
        "images": pixels,
        "labels": sha256_of(split.labels.astype(np.int64)),
    }


def fingerprint_residuals(trained: TrainedModel, split: Split) -> str:
    """Of the model, the images and their preprocessing: 16 hexadecimal digits (see `fingerprint_ingredients`)."""
    return sha256_of(fingerprint_ingredients(trained, split))[:16]


def _shape(config: Config, split: Split, tokens: Tokens) -> tuple[int, int, int]:
    """(N, T', D)."""
    return len(split.labels), _tokens_per_image(config, tokens), config.model.width


def _tokens_per_image(config: Config, tokens: Tokens) -> int:
    """T'."""
    patches = (config.data.image_size // config.model.patch) ** 2
    return {"cls": 1, "patches": patches, "all": 1 + patches}[tokens]


def _program(trained: TrainedModel, layers: Sequence[int], tokens: Tokens) -> Program:
    """Images -> [B, T', D] of each layer, which are in rising order: evaluation's gates, no layer after the last."""
    model, config = trained.model, trained.config
    first = 1 + config.model.registers
    parts = {"cls": [slice(1)], "patches": [slice(first, None)], "all": [slice(1), slice(first, None)]}[tokens]

    def run(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        x_BTD = model.apply(params, preprocess(images, config.data), layers[0], method="before")
        residuals = [x_BTD]
        for before, layer in itertools.pairwise(layers):
            x_BTD, _ = model.apply(params, x_BTD, before, stop=layer, method="blocks")
            residuals.append(x_BTD)
        return tuple(jnp.concatenate([x_BTD[:, part] for part in parts], axis=1) for x_BTD in residuals)

    image_bytes = 4 * len(layers) * _tokens_per_image(config, tokens) * config.model.width
    return per_image_program(run, max(1, min(config.train.eval_batch, CALL_BYTES // image_bytes)))


def _layout(shape: tuple[int, int, int], shard_bytes: int) -> tuple[int, int]:
    """Images of a shard and of a block."""
    count, tokens, width = shape
    shard = min(count, max(1, shard_bytes // (4 * tokens * width)))
    block = max(1, shard // BLOCKS_PER_SHARD)
    return shard // block * block, block


def _open(place: Place, shape: Sequence[int], shard: int, block: int, create: bool) -> ts.TensorStore:
    """The array; ValueError where what is there is of another shape or layout, or damaged."""
    _, *each = shape
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    codec = {"chunk_shape": [block, *each], "codecs": checked, "index_codecs": checked}
    grid = {"name": "regular", "configuration": {"chunk_shape": [shard, *each]}}
    spec = {
        "driver": "zarr3",
        "kvstore": place.kvstore,
        "metadata": {
            "shape": list(shape),
            "data_type": "float32",
            "fill_value": 0.0,
            "chunk_grid": grid,
            "codecs": [{"name": "sharding_indexed", "configuration": codec}],
        },
        "fill_missing_data_reads": False,  # what is missing is an error, not zeros
        "store_data_equal_to_fill_value": True,  # so zeros must not be left out
    }
    return ts.open(spec, open=True, create=create).result()


def _written_shards(place: Place) -> set[int]:
    """The shards that are there; TensorStore writes each whole or not at all."""
    keys = place.open().list(ts.KvStore.KeyRange("c/", "c0")).result()
    found = (re.fullmatch(rb"c/(\d+)/0/0", key) for key in keys)
    return {int(match[1]) for match in found if match}


def _read_meta(place: Place) -> Any:
    """What is in meta.json; None where the array is not complete."""
    with explain_errors(place.name, **READ_FAULT):
        read = place.open().read("meta.json").result(timeout=CONNECT_SECONDS)
        return json.loads(read.value) if read.state == "value" else None


def _regroup_into_shards(calls: Iterable[tuple[np.ndarray, ...]], begin: int, shard: int, count: int) -> Iterator[Any]:
    """What calls give from image `begin` on, as (first image, last, arrays) of each shard."""
    held: tuple[np.ndarray, ...] = ()
    for call in calls:
        held = tuple(np.concatenate(pair) for pair in zip(held, call, strict=True)) if held else call
        while begin < (end := min(begin + shard, count)) and len(held[0]) >= end - begin:
            yield begin, end, [x[: end - begin] for x in held]
            held, begin = tuple(x[end - begin :] for x in held), end


def write_cache(
    directory: Directory, trained: TrainedModel, split: Split, name: str, layers: Iterable[int], tokens: Tokens,
    shard_bytes: int = SHARD_BYTES, of: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """One forward pass over a split, with evaluation's gates: the residuals that enter these layers.

    Each host writes a share of the shards. What an interrupted pass wrote is kept: this one goes on from the first
    shard of a host's share that any layer lacks.

    Args:
      directory: local or gs://bucket/path.
      name: the split's.
      of: the `fingerprint_ingredients`, where they are known.

    Raises:
      HeadSteerError: the disk is full or not writable, the bucket cannot be reached, an image cannot be read.
    """
    of = of or hosts.on_first_process(lambda: fingerprint_ingredients(trained, split))
    mark, layers, shape = sha256_of(of)[:16], sorted(set(layers)), _shape(trained.config, split, tokens)
    shard, block = _layout(shape, shard_bytes)
    shards = -(-shape[0] // shard)
    places, root = [_place(directory, mark, name, f"layer_{layer}_{tokens}") for layer in layers], _place(directory)
    what = f"{name}: {tokens} residuals of layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"

    def opened(create: bool) -> list[ts.TensorStore]:
        arrays = []
        for place in places:
            with explain_errors(place.name, **WRITE_FAULT):
                arrays.append(_open(place, shape, shard, block, create=create))
        return arrays

    def own_shards() -> None:
        arrays, (begin, end) = opened(create=False), hosts.process_share(shards)
        with explain_errors(root.name, **WRITE_FAULT):
            there = set.intersection(*map(_written_shards, places))
        missing = next((number for number in range(begin, end) if number not in there), end)
        start, stop = missing * shard, min(end * shard, shape[0])
        if missing > begin:
            logger.info(f"{what}: going on from image {start}")
        calls = stream_split(_program(trained, layers, tokens), trained.params, split, what, start, stop)
        for first, last, parts in _regroup_into_shards(calls, start, shard, stop):
            with explain_errors(root.name, **WRITE_FAULT):  # the model's next calls are under way
                writes = [array[first:last].write(part) for array, part in zip(arrays, parts, strict=True)]
                for write in writes:
                    write.result()

    def write_meta() -> None:
        about: dict[str, Any] = {"fingerprint": mark, "split": name, "tokens": tokens, "dtype": "float32"}
        about |= {"shape": shape, "of": of, "shard": shard, "block": block, "shards": shards}
        with explain_errors(root.name, **WRITE_FAULT):
            for layer, place in zip(layers, places, strict=True):
                place.open().write("meta.json", json.dumps(about | {"layer": layer}, indent=2).encode()).result()

    hosts.on_first_process(lambda: bool(opened(create=True)))
    hosts.on_every_process(own_shards)
    hosts.on_first_process(write_meta)


def open_cache(directory: Directory, fingerprint: str, name: str, layer: int, tokens: Tokens) -> StoredResiduals:
    """The residuals that `write_cache` wrote.

    Raises:
      HeadSteerError: there are none, they are incomplete or damaged, or of another fingerprint, split, layer or tokens.
    """
    place, root = _place(directory, fingerprint, name, f"layer_{layer}_{tokens}"), _place(directory)
    meta = _read_meta(place)
    if meta is None:
        with explain_errors(root.name, **READ_FAULT):
            keys = sorted(key.decode() for key in root.open().list().result())
        there = [key.removesuffix("/meta.json") for key in keys if key.endswith("/meta.json")]
        raise HeadSteerError(
            f"{place.name}: there is no complete cache of this model, split, layer and tokens, only of "
            f"{', '.join(there) or 'none'}; write it first"
        )
    with explain_errors(place.name, **READ_FAULT):
        wanted = {"fingerprint": fingerprint, "split": name, "layer": layer, "tokens": tokens, "dtype": "float32"}
        for field, value in wanted.items():
            if meta[field] != value:
                raise HeadSteerError(
                    f"{place.name}: it is of another {field}, {meta[field]!r}, not {value!r}; delete it and run the "
                    "same command"
                )
        array = _open(place, meta["shape"], meta["shard"], meta["block"], create=False)
        missing = set(range(-(-meta["shape"][0] // meta["shard"]))) - _written_shards(place)
        if missing:
            raise ValueError(f"shard {min(missing)} is missing")
    return StoredResiduals(array, meta["block"], place.name)


def load_or_compute_residuals(
    directory: Directory | None, trained: TrainedModel, split: Split, name: str, layers: Iterable[int], tokens: Tokens,
    shard_bytes: int = SHARD_BYTES,
) -> dict[int, StoredResiduals]:  # fmt: skip
    """{layer: its residuals}: those in the cache, and what is missing there from one forward pass.

    Args:
      directory: None: nothing is written, all of them are held in memory.

    Raises:
      HeadSteerError: see `write_cache` and `open_cache`.
    """
    layers = sorted(set(layers))
    if directory is None:
        arrays = run_over_split(_program(trained, layers, tokens), trained.params, split, f"{name}: {tokens} residuals")
        _, block = _layout(_shape(trained.config, split, tokens), shard_bytes)
        return {layer: StoredResiduals(ts.array(x), block, "memory") for layer, x in zip(layers, arrays, strict=True)}
    of = hosts.on_first_process(lambda: fingerprint_ingredients(trained, split))
    mark = sha256_of(of)[:16]

    def absent() -> list[int]:
        return [
            layer for layer in layers if _read_meta(_place(directory, mark, name, f"layer_{layer}_{tokens}")) is None
        ]

    if missing := hosts.on_first_process(absent):
        if hosts.is_first_process():
            _report_stale(_place(directory), mark, name)
        write_cache(directory, trained, split, name, missing, tokens, shard_bytes, of)
    return {layer: open_cache(directory, mark, name, layer, tokens) for layer in layers}


def _report_stale(root: Place, mark: str, name: str) -> None:
    """Tell of what other models or data left in the cache of a split: it is never read, and never deleted either."""
    sizes: dict[str, int] = {}
    with suppress(Exception):  # it only informs: what others keep there must not stop a run
        keys = [key.decode() for key in root.open().list().result()]
        for key in keys:
            other, *rest = key.split("/")
            if (
                other != mark
                and re.fullmatch("[0-9a-f]{16}", other)
                and len(rest) == 3
                and rest[0] == name
                and rest[2] == "zarr.json"
            ):
                each = json.loads(root.open().read(key).result().value)["chunk_grid"]["configuration"]["chunk_shape"]
                shards = sum(shard.startswith(f"{key.removesuffix('zarr.json')}c/") for shard in keys)
                sizes[other] = sizes.get(other, 0) + 4 * shards * math.prod(each)
    if sizes:
        places, mb = ", ".join(f"{root.name}/{other}" for other in sorted(sizes)), sum(sizes.values()) / 1e6
        logger.info(
            f"{name}: activations of another model or other data are in {places}: delete to free up to {mb:.0f} MB"
        )
