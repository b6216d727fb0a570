"""Residuals for the autoencoders: held in memory, or cached in shards on disk or in a bucket.

A cached array is `<directory>/<fingerprint>/<split>/layer_<l>_<tokens>/`: a zarr array [N, T', D] that TensorStore
writes shard by shard, and `meta.json`, written last: without it the array is incomplete, and the next run continues
from its first missing shard. A shard is a file of about BLOCKS_PER_SHARD blocks; a block is a few images with a
checksum. Blocks can be read independently, so a random group of them mixes images from all over the split.

The fingerprint covers everything that a residual depends on: another model, image or mean has another directory.
Axes: N images, T' cached tokens of each (CLS, its patches or both, never registers), D width.
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
from jax.sharding import Mesh

from headsteer_jax.config.schema import Config, GateConfig
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import LazyImages, Split, gather_images, image_keys, sha256_of
from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.model.passes import Program, per_image_program, run_over_split, stream_split
from headsteer_jax.model.vit import TrainedModel, fingerprint_params
from headsteer_jax.runtime import hosts

logger = logging.getLogger(__name__)

Tokens = Literal["cls", "patches", "all"]
Directory = str | os.PathLike[str]  # local, or gs://bucket/path

CACHE_FORMAT = 1  # in the fingerprint: raise it when the files or the forward pass change
SAMPLED_IMAGES = 16  # of a split that is not in memory, which are decoded for the fingerprint
SHARD_BYTES = 32 * 2**20
BLOCKS_PER_SHARD = 32  # or a few more
CALL_BYTES = 256 * 2**20  # bytes that one call of the model may return; two calls are in flight
WRITES_UNDER_WAY = 2  # shards that are being written while the next ones are computed
RETRIES = {"max_retries": 5, "initial_delay": "500ms", "max_delay": "4s"}  # for a bucket; the defaults take minutes
CONNECT_SECONDS = 60  # seconds for a bucket's first answer


class Residuals(Protocol):
    """[N, D] float32 residuals, in memory or stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all of them in order, [n, D] at a time."""

    def groups(self, rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield all of them, about `rows` at a time, in random groups."""


class ResidualsInMemory(NamedTuple):
    """Residuals in memory."""

    x: np.ndarray  # [N, D]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.x.shape

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, [n, D] at a time."""
        for begin in range(0, len(self.x), 8192):
            yield self.x[begin : begin + 8192]

    def groups(self, rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield all rows in random order, `rows` at a time; if `rows` holds all, they come at once and in order."""
        if rows >= len(self.x):
            yield self.x
            return
        order = rng.permutation(len(self.x))
        for begin in range(0, len(order), rows):
            yield self.x[order[begin : begin + rows]]


class StoredResiduals(NamedTuple):
    """Residuals in a TensorStore array; rows are each image's tokens, image after image.

    Every method raises HeadSteerError if the data that it reads are missing or damaged. `chunks` and `groups` read
    ahead: two parts, and for a moment three, are in memory at once.
    """

    array: ts.TensorStore  # [N, T', D] float32
    block: int  # images that are stored, and best read, together
    location: str  # for error messages

    @property
    def shape(self) -> tuple[int, int]:
        """(N T', D)."""
        count, tokens, width = self.array.shape
        return count * tokens, width

    @property
    def tokens(self) -> int:
        """The number of tokens of each image, T'."""
        return self.array.shape[1]

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Read the residuals of images by their numbers, 0 to N - 1: [n] -> [n, T', D]."""
        return next(self._read([np.asarray(indices)]))

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, [n, D] at a time: whole blocks, of about 8192 rows together, but at least one."""
        count, step = self.array.shape[0], self.block * max(1, 8192 // (self.block * self.tokens))
        parts = (slice(begin, min(begin + step, count)) for begin in range(0, count, step))
        return (x_nTD.reshape(-1, x_nTD.shape[-1]) for x_nTD in self._read(parts))

    def groups(self, rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield all rows, of as many whole images at a time as `rows` holds (at least one): blocks in random order.

        If `rows` holds all of them, they come at once and in order.
        """
        count, per_group = self.array.shape[0], max(1, rows // self.tokens)
        blocks = rng.permutation(-(-count // self.block)) if per_group < count else np.arange(-(-count // self.block))
        order = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
        order = order[order < count]
        parts = (order[begin : begin + per_group] for begin in range(0, count, per_group))
        return (x_nTD.reshape(-1, x_nTD.shape[-1]) for x_nTD in self._read(parts))

    def _read(self, parts: Iterable[Any]) -> Iterator[np.ndarray]:
        """Yield [n, T', D] of each part, while the next one is being read."""
        reads = (self.array[part].read() for part in parts)
        waiting = deque(itertools.islice(reads, 1))
        while waiting:
            waiting.extend(itertools.islice(reads, 1))
            with explain_errors(self.location, **READ_FAULT):
                x_nTD = waiting.popleft().result()
            yield x_nTD
            del x_nTD  # only the caller holds it


class JoinedResiduals(NamedTuple):
    """Residuals of several sources as one: those of the first, then those of the next. Random groups mix them."""

    parts: tuple[Residuals, ...]  # one at least, each not empty

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D), N of all parts."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, [n, D] at a time."""
        return itertools.chain.from_iterable(part.chunks() for part in self.parts)

    def groups(self, rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield all rows, about `rows` at a time: a random group of each part. If `rows` holds all, they are in order.

        A part gives at least one row, or one image's, to each group.
        """
        count = self.shape[0]
        if rows >= count:
            yield load_all(self)
            return
        streams = [part.groups(max(1, rows * part.shape[0] // count), rng) for part in self.parts]
        while groups := [x_nD for stream in streams if (x_nD := next(stream, None)) is not None]:
            joined = np.concatenate(groups)
            del groups
            yield joined


def load_all(residuals: Residuals) -> np.ndarray:
    """Read all residuals into one array: [N, D] float32."""
    x_ND, end = np.empty(residuals.shape, np.float32), 0
    for x_nD in residuals.chunks():
        begin, end = end, end + len(x_nD)
        x_ND[begin:end] = x_nD
    return x_ND


class ResidualSelection(NamedTuple):
    """The residuals of a split that enter some layers, of some of each image's tokens."""

    split: Split
    name: str  # of the split
    layers: tuple[int, ...]
    tokens: Tokens

    def ordered(self) -> "ResidualSelection":
        """Return the same selection with its layers in rising order and without repetitions."""
        return self._replace(layers=tuple(sorted(set(self.layers))))

    @property
    def description(self) -> str:
        """The selection in words, for progress and the log."""
        layers = f"layer{'s' * (len(self.layers) > 1)} {', '.join(map(str, self.layers))}"
        return f"{self.name}: {self.tokens} residuals of {layers}"


class LabelledResiduals(NamedTuple):
    """The residuals of a split that an autoencoder reads, and what is known of the split's images."""

    residuals: Residuals
    tokens: Tokens  # whose residuals they are: cls, patches or all (CLS first)
    x_cls: np.ndarray  # [N, D] the CLS residuals, which steering changes
    labels: np.ndarray  # [N]
    classes: int  # C


class Location(NamedTuple):
    """A directory, as people and as TensorStore name it."""

    name: str
    kvstore: dict[str, Any]

    def open(self) -> ts.KvStore:
        """Open the directory with TensorStore."""
        return ts.KvStore.open(self.kvstore).result()


class Layout(NamedTuple):
    """How the residuals of a layer are stored."""

    shape: tuple[int, int, int]  # N, T', D
    shard: int  # images of a shard
    block: int  # images of a block

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.shape[0] // self.shard)


def _locate(directory: Directory, *parts: str) -> Location:
    root = os.fspath(directory)
    if not root.startswith("gs:/"):
        name = "/".join([os.path.abspath(root), *parts])
        return Location(name, {"driver": "file", "path": f"{name}/"})
    # a pathlib path has lost one of the two slashes
    bucket, *path = "/".join([root.removeprefix("gs:").strip("/"), *parts]).split("/")
    prefix = "".join(f"{part}/" for part in path)
    kvstore = {"driver": "gcs", "bucket": bucket, "path": prefix, "gcs_request_retries": RETRIES}
    return Location(f"gs://{bucket}/{prefix}".rstrip("/"), kvstore)


def _locate_layer(directory: Directory, fingerprint: str, name: str, layer: int, tokens: Tokens) -> Location:
    return _locate(directory, fingerprint, name, f"layer_{layer}_{tokens}")


# how errors describe a cache that cannot be read or written, and the remedy
READ_FAULT = {"fault": "truncated or damaged", "remedy": "delete it and run the same command"}
WRITE_FAULT = {"fault": "cannot be written", "remedy": "delete it or choose another directory"}


def fingerprint_ingredients(trained: TrainedModel, split: Split) -> dict[str, Any]:
    """Collect everything that the residuals of a split depend on, as JSON values.

    Images in memory are hashed completely. For images that are decoded as they are read, the hash covers their keys
    (`Split.keys`) and SAMPLED_IMAGES of the images.
    """
    config, images, shape = trained.config, split.images, list(split.images.shape)
    if isinstance(images, LazyImages):
        sample = np.linspace(0, len(images) - 1, SAMPLED_IMAGES).astype(int)
        pixels = sha256_of(shape, image_keys(split), gather_images(images, sample))
    else:
        pixels = sha256_of(shape, images)
    return {
        "format": CACHE_FORMAT,
        "model": fingerprint_params(trained.params),
        "config.model": config.model.model_dump(exclude={"pretrained", "pretrained_head"})
        | {"dtype": "float32"},  # in which residuals are computed, whatever the training's type
        "config.gate": _describe_gates(config.gate),
        "config.data": config.data.model_dump(include={"image_size", "channels", "mean", "std"}),
        "images": pixels,
        "labels": sha256_of(split.labels.astype(np.int64)),
    }


def _describe_gates(gate: GateConfig) -> dict[str, Any]:
    """Collect what residuals depend on of the gates; those of the heads are described as they always were."""
    described = gate.model_dump(include={"first_layer", "layer_norm", "dropped"})
    if gate.threshold != 0.5:
        described["threshold"] = gate.threshold
    if gate.kinds != ("heads",):
        described["kinds"] = sorted(gate.kinds)
        names = {"first_layer", "threshold", "normalise"}
        described |= {kind: getattr(gate, kind).model_dump(include=names) for kind in gate.kinds if kind != "heads"}
    return described


def fingerprint_residuals(trained: TrainedModel, split: Split) -> str:
    """Fingerprint the model, the images and their preprocessing: 16 hexadecimal digits of `fingerprint_ingredients`."""
    return sha256_of(fingerprint_ingredients(trained, split))[:16]


def _tokens_per_image(config: Config, tokens: Tokens) -> int:
    """Return the number of tokens that are selected from each image, T'."""
    patches = (config.data.image_size // config.model.patch) ** 2
    return {"cls": 1, "patches": patches, "all": 1 + patches}[tokens]


def make_residual_program(
    trained: TrainedModel, layers: Sequence[int], tokens: Tokens, mesh: Mesh | None = None
) -> Program:
    """Make a program: images -> [B, T', D] of each layer, with evaluation's gates and no layer after the last one.

    The layers are in rising order; see `per_image_program` for `mesh`.
    """
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
    return per_image_program(run, max(1, min(config.train.eval_batch, CALL_BYTES // image_bytes)), mesh=mesh)


def _choose_layout(config: Config, selection: ResidualSelection, shard_bytes: int) -> Layout:
    """Choose how many images go into a shard and a block."""
    count, tokens = len(selection.split.labels), _tokens_per_image(config, selection.tokens)
    width = config.model.width
    shard = min(count, max(1, shard_bytes // (4 * tokens * width)))
    block = max(1, shard // BLOCKS_PER_SHARD)
    return Layout((count, tokens, width), shard // block * block, block)


def _open_array(location: Location, layout: Layout, create: bool) -> ts.TensorStore:
    """Open an array; raises ValueError if a stored one has another shape or layout, or is damaged."""
    _, *image_shape = layout.shape
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    codec = {"chunk_shape": [layout.block, *image_shape], "codecs": checked, "index_codecs": checked}
    grid = {"name": "regular", "configuration": {"chunk_shape": [layout.shard, *image_shape]}}
    spec = {
        "driver": "zarr3",
        "kvstore": location.kvstore,
        "metadata": {
            "shape": list(layout.shape),
            "data_type": "float32",
            "fill_value": 0.0,
            "chunk_grid": grid,
            "codecs": [{"name": "sharding_indexed", "configuration": codec}],
        },
        "fill_missing_data_reads": False,  # missing data are an error, not zeros
        "store_data_equal_to_fill_value": True,  # therefore zeros must be stored
    }
    return ts.open(spec, open=True, create=create).result()


def _written_shards(location: Location) -> set[int]:
    """List the shards that are stored; TensorStore writes each atomically."""
    keys = location.open().list(ts.KvStore.KeyRange("c/", "c0")).result()
    matches = (re.fullmatch(rb"c/(\d+)/0/0", key) for key in keys)
    return {int(match[1]) for match in matches if match}


def _read_meta(location: Location) -> Any:
    """Read meta.json; None if the array is not complete."""
    with explain_errors(location.name, **READ_FAULT):
        read = location.open().read("meta.json").result(timeout=CONNECT_SECONDS)
        return json.loads(read.value) if read.state == "value" else None


def _regroup_into_shards(calls: Iterable[tuple[np.ndarray, ...]], begin: int, shard: int, count: int) -> Iterator[Any]:
    """Regroup the results of calls from image `begin` on: yield (first image, end, arrays) of each shard."""
    pending: tuple[np.ndarray, ...] = ()
    for call in calls:
        pending = tuple(np.concatenate(pair) for pair in zip(pending, call, strict=True)) if pending else call
        while begin < (end := min(begin + shard, count)) and len(pending[0]) >= end - begin:
            yield begin, end, [x[: end - begin] for x in pending]
            pending, begin = tuple(x[end - begin :] for x in pending), end


class _CacheFiles(NamedTuple):
    """The files of a selection in the cache."""

    root: Location
    locations: list[Location]  # of each layer
    layout: Layout

    def open_arrays(self, create: bool = False) -> list[ts.TensorStore]:
        """Open the array of each layer for writing."""
        arrays = []
        for location in self.locations:
            with explain_errors(location.name, **WRITE_FAULT):
                arrays.append(_open_array(location, self.layout, create))
        return arrays

    def first_missing_shard(self, begin: int, end: int) -> int:
        """Return the first of the shards `begin` to `end` that any layer lacks; `end` if there is none."""
        with explain_errors(self.root.name, **WRITE_FAULT):
            written = set.intersection(*map(_written_shards, self.locations))
        return next((shard for shard in range(begin, end) if shard not in written), end)


def _write_shards(trained: TrainedModel, selection: ResidualSelection, files: _CacheFiles) -> None:
    """Compute and write this host's share of the shards, from the first missing one on."""
    arrays, layout = files.open_arrays(), files.layout
    begin, end = hosts.process_share(layout.shards)
    missing = files.first_missing_shard(begin, end)
    start, stop = missing * layout.shard, min(end * layout.shard, layout.shape[0])
    if missing > begin:
        logger.info(f"{selection.description}: resuming from image {start}")
    program = make_residual_program(trained, selection.layers, selection.tokens)
    calls = stream_split(program, trained.params, selection.split, selection.description, start, stop)
    under_way: deque[list[Any]] = deque()  # meanwhile the model computes the next calls

    def finish_oldest() -> None:
        with explain_errors(files.root.name, **WRITE_FAULT):
            for write in under_way.popleft():
                write.result()

    try:
        for first, last, parts in _regroup_into_shards(calls, start, layout.shard, stop):
            with explain_errors(files.root.name, **WRITE_FAULT):
                under_way.append([array[first:last].write(part) for array, part in zip(arrays, parts, strict=True)])
            if len(under_way) > WRITES_UNDER_WAY:
                finish_oldest()
    finally:
        while under_way:
            finish_oldest()


def write_cache(
    directory: Directory, trained: TrainedModel, selection: ResidualSelection, shard_bytes: int = SHARD_BYTES,
    ingredients: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the residuals that enter some layers, by one forward pass over a split with evaluation's gates.

    Each host writes a share of the shards. An interrupted pass is continued: from the first shard of a host's share
    that any layer lacks.

    Args:
      directory: local or gs://bucket/path.
      trained: the model.
      selection: of which split, layers and tokens.
      shard_bytes: size of a shard, about.
      ingredients: the `fingerprint_ingredients`, if they are known already.

    Raises:
      HeadSteerError: the disk is full or not writable, the bucket cannot be reached, an image cannot be read.
    """
    split, name, layers, tokens = selection = selection.ordered()
    ingredients = ingredients or hosts.on_first_process(lambda: fingerprint_ingredients(trained, split))
    fingerprint, layout = sha256_of(ingredients)[:16], _choose_layout(trained.config, selection, shard_bytes)
    locations = [_locate_layer(directory, fingerprint, name, layer, tokens) for layer in layers]
    files = _CacheFiles(_locate(directory), locations, layout)

    def write_meta() -> None:
        meta: dict[str, Any] = {"fingerprint": fingerprint, "split": name, "tokens": tokens, "dtype": "float32"}
        meta |= {"shape": layout.shape, "of": ingredients}
        meta |= {"shard": layout.shard, "block": layout.block, "shards": layout.shards}
        with explain_errors(files.root.name, **WRITE_FAULT):
            for layer, location in zip(layers, locations, strict=True):
                content = json.dumps(meta | {"layer": layer}, indent=2).encode()
                location.open().write("meta.json", content).result()

    hosts.on_first_process(lambda: bool(files.open_arrays(create=True)))
    hosts.on_every_process(lambda: _write_shards(trained, selection, files))
    hosts.on_first_process(write_meta)


def open_cache(directory: Directory, fingerprint: str, name: str, layer: int, tokens: Tokens) -> StoredResiduals:
    """Open the residuals that `write_cache` wrote.

    Raises:
      HeadSteerError: there are none, they are incomplete or damaged, or of another fingerprint, split, layer or tokens.
    """
    location = _locate_layer(directory, fingerprint, name, layer, tokens)
    meta = _read_meta(location)
    if meta is None:
        complete = ", ".join(_complete_arrays(_locate(directory))) or "none"
        raise HeadSteerError(
            f"{location.name}: there is no complete cache of this model, split, layer and tokens, only of {complete}; "
            "write it first"
        )
    with explain_errors(location.name, **READ_FAULT):
        expected = {"fingerprint": fingerprint, "split": name, "layer": layer, "tokens": tokens, "dtype": "float32"}
        for field, value in expected.items():
            if meta[field] != value:
                raise HeadSteerError(
                    f"{location.name}: its {field} is {meta[field]!r}, not {value!r}; delete it and run the "
                    "same command"
                )
        layout = Layout(tuple(meta["shape"]), meta["shard"], meta["block"])
        array = _open_array(location, layout, create=False)
        missing = set(range(layout.shards)) - _written_shards(location)
        if missing:
            raise ValueError(f"shard {min(missing)} is missing")
    return StoredResiduals(array, layout.block, location.name)


def _complete_arrays(root: Location) -> list[str]:
    """List the complete arrays in a cache, each as fingerprint/split/layer_<l>_<tokens>."""
    with explain_errors(root.name, **READ_FAULT):
        keys = sorted(key.decode() for key in root.open().list().result())
    return [key.removesuffix("/meta.json") for key in keys if key.endswith("/meta.json")]


def load_or_compute_residuals(
    directory: Directory | None, trained: TrainedModel, selection: ResidualSelection, shard_bytes: int = SHARD_BYTES,
    may_write: bool = True,
) -> dict[int, StoredResiduals]:  # fmt: skip
    """Load residuals from the cache; one forward pass computes those that are not there.

    Args:
      directory: local or gs://bucket/path; None: nothing is written, all of them are held in memory.
      trained: the model.
      selection: of which split, layers and tokens.
      shard_bytes: size of a shard, about.
      may_write: whether computed residuals are written to the cache; otherwise they are held in memory.

    Returns:
      {layer: its residuals}.

    Raises:
      HeadSteerError: see `write_cache` and `open_cache`.
    """
    split, name, layers, tokens = selection = selection.ordered()
    if directory is None:
        return _compute_residuals(trained, selection, shard_bytes)
    ingredients = hosts.on_first_process(lambda: fingerprint_ingredients(trained, split))
    fingerprint = sha256_of(ingredients)[:16]

    def find_missing() -> tuple[int, ...]:
        metas = {layer: _read_meta(_locate_layer(directory, fingerprint, name, layer, tokens)) for layer in layers}
        return tuple(layer for layer, meta in metas.items() if meta is None)

    missing = hosts.on_first_process(find_missing)
    if missing and not may_write:
        return _compute_residuals(trained, selection, shard_bytes)
    if missing:
        if hosts.is_first_process():
            _report_stale(_locate(directory), fingerprint, name)
        write_cache(directory, trained, selection._replace(layers=missing), shard_bytes, ingredients)
    return {layer: open_cache(directory, fingerprint, name, layer, tokens) for layer in layers}


def _compute_residuals(
    trained: TrainedModel, selection: ResidualSelection, shard_bytes: int
) -> dict[int, StoredResiduals]:
    """Compute residuals and hold them in memory."""
    split, _, layers, tokens = selection
    arrays = run_over_split(
        make_residual_program(trained, layers, tokens), trained.params, split, selection.description
    )
    block = _choose_layout(trained.config, selection, shard_bytes).block
    return {layer: StoredResiduals(ts.array(x), block, "memory") for layer, x in zip(layers, arrays, strict=True)}


def _report_stale(root: Location, fingerprint: str, name: str) -> None:
    """Log what other models or data left in the cache of a split: it is never read, and never deleted either."""
    sizes: dict[str, int] = {}
    with suppress(Exception):  # it only informs: foreign files in the cache must not stop a run
        keys = [key.decode() for key in root.open().list().result()]
        for key in keys:
            match = re.fullmatch(rf"([0-9a-f]{{16}})/{re.escape(name)}/[^/]+/zarr\.json", key)
            if match and match[1] != fingerprint:
                grid = json.loads(root.open().read(key).result().value)["chunk_grid"]
                shards = sum(shard.startswith(f"{key.removesuffix('zarr.json')}c/") for shard in keys)
                size = 4 * shards * math.prod(grid["configuration"]["chunk_shape"])
                sizes[match[1]] = sizes.get(match[1], 0) + size
    if sizes:
        directories = ", ".join(f"{root.name}/{stale}" for stale in sorted(sizes))
        logger.info(
            f"{name}: activations of another model or other data are in {directories}; delete them to free up to "
            f"{sum(sizes.values()) / 1e6:.0f} MB"
        )
