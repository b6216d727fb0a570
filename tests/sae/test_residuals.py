"""The activation cache gives the model's own residuals, whatever is on disk; damaged or stale files are never read."""

import functools
import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import jax
import numpy as np
import pytest
import tensorstore as ts
from builders import CLASSES, random_params, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headsteer_jax.config import Config, DataConfig
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import LazyImages, Split
from headsteer_jax.data.folder import read_folder
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import TrainedModel, build_model, fingerprint_params
from headsteer_jax.sae import residuals as cache
from headsteer_jax.sae.residuals import (
    SHARD_BYTES,
    JoinedResiduals,
    ResidualSelection,
    ResidualsInMemory,
    StoredResiduals,
    fingerprint_residuals,
    load_all,
    load_or_compute_residuals,
    open_cache,
    write_cache,
)

# tensorstore reports more about a damaged file when its futures are collected
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TOKENS = ("cls", "patches", "all")
BYTES = {"cls": 12 * 96, "patches": 12 * 4 * 96, "all": 12 * 5 * 96}  # 12 images: 8 shards of the fixture's 90


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Make blocks of 3 images in these shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "BLOCKS_PER_SHARD", 4)
        yield


def config_of(registers: int = 0, **train: Any) -> Config:
    config = tiny_config()
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"registers": registers}),
            "train": config.train.model_copy(update={"eval_batch": 16} | train),
        }
    )


def trained_model(config: Config, params: Any = None) -> TrainedModel:
    """A model of a config with these parameters, or with random ones."""
    params = random_params(config, CLASSES) if params is None else params
    return TrainedModel(config, build_model(config, CLASSES), params)


TRAINED = trained_model(config_of())
CONFIG, MODEL, PARAMS = TRAINED


def selection(split: Split, name: str, layers: Sequence[int], tokens: Any) -> ResidualSelection:
    return ResidualSelection(split, name, tuple(layers), tokens)


def load(
    directory: Any, trained: TrainedModel, split: Split, name: str, layers: Sequence[int], tokens: Any,
    size: int = SHARD_BYTES,
) -> dict[int, StoredResiduals]:  # fmt: skip
    return load_or_compute_residuals(directory, trained, selection(split, name, layers, tokens), size)


@functools.cache
def forward(config: Config, layer: int) -> Callable[..., Any]:
    """(params, images) -> the CLS residual as the whole model gives it, [N, D], and the residual, [N, T, D]."""
    model = build_model(config, CLASSES)

    def run(params: Any, images: np.ndarray) -> Any:
        normalised = preprocess(images, config.data)
        cls = model.apply(params, normalised)[1]["cls"][layer]
        return cls, model.apply(params, normalised, layer, method="before")

    return jax.jit(run)


def expected(config: Config, params: Any, split: Split, layer: int, tokens: str) -> np.ndarray:
    """[N, T', D]: the whole split in one batch, without the cache's code."""
    cls, x_BTD = map(np.asarray, forward(config, layer)(params, split.images))
    patches = x_BTD[:, 1 + config.model.registers :]
    return {"cls": cls[:, None], "patches": patches, "all": np.concatenate([cls[:, None], patches], axis=1)}[tokens]


def whole(stored: StoredResiduals) -> np.ndarray:
    """[N, T', D], through `chunks`."""
    rows = np.concatenate(list(stored.chunks()))
    assert rows.shape == stored.shape
    return rows.reshape(-1, stored.tokens, rows.shape[1])


def one_line(error: pytest.ExceptionInfo[HeadSteerError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def shards(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("c/*/0/0") if p.is_file())


# ---- what is read is what the model gives


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("registers", "where"), [(0, "disk"), (2, "disk"), (0, "memory")])
def test_the_models_own_residuals(split: Split, tmp_path: Path, tokens: Any, registers: int, where: str) -> None:
    trained = trained_model(config_of(registers))
    directory = tmp_path / "a b%20" if where == "disk" else None
    by_layer = load(directory, trained, split, "train", (2, 0, 1), tokens, BYTES[tokens])
    assert set(by_layer) == {0, 1, 2}
    assert len(shards(tmp_path)) == (3 * 8 if where == "disk" else 0)
    rng = np.random.default_rng(0)
    for layer, stored in by_layer.items():
        x_NTD = expected(trained.config, trained.params, split, layer, tokens)
        count, T, width = x_NTD.shape
        assert (stored.shape, stored.tokens) == ((count * T, width), T)
        np.testing.assert_allclose(whole(stored), x_NTD, atol=1e-5)
        assert whole(stored).dtype == np.float32
        sample = rng.integers(0, count, 7)
        np.testing.assert_array_equal(stored.images(sample), whole(stored)[sample])
        (all_at_once,) = stored.groups(count * T, rng)
        np.testing.assert_array_equal(all_at_once.reshape(x_NTD.shape), whole(stored))


def test_gates_are_thresholded(split: Split) -> None:
    """Gates matter: the last layer's residual is not the dense model's."""
    stored = load(None, TRAINED, split, "train", [2], "cls")[2]
    dense = jax.jit(lambda p, images: MODEL.apply(p, preprocess(images, CONFIG.data), gating="dense")[1]["cls"][2])
    assert np.abs(whole(stored)[:, 0] - dense(PARAMS, split.images)).max() > 0.1


def test_lazy_images_have_the_same_residuals(split: Split, tmp_path: Path) -> None:
    images = np.asarray(split.images)
    lazy = replace(split, images=LazyImages(lambda places: images[places], np.arange(len(images)), (8, 8, 1)))
    from_lazy = load(tmp_path, TRAINED, lazy, "train", [1], "all", BYTES["all"])[1]
    held = load(None, TRAINED, split, "train", [1], "all")[1]
    np.testing.assert_array_equal(whole(from_lazy), whole(held))


@pytest.mark.parametrize(("batch", "size"), [(7, 2**20), (64, 1), (1000, BYTES["all"]), (1, 4 * BYTES["all"])])
def test_the_number_of_calls_and_shards_changes_nothing(split: Split, tmp_path: Path, batch: int, size: int) -> None:
    """One shard or many, a call smaller or larger than a shard."""
    trained = trained_model(config_of(eval_batch=batch), PARAMS)
    stored = load(tmp_path, trained, split, "train", [1], "all", size)[1]
    np.testing.assert_allclose(whole(stored), expected(CONFIG, PARAMS, split, 1, "all"), atol=1e-5)


def test_zeros_are_written(split: Split, tmp_path: Path) -> None:
    """TensorStore leaves zeros out by default, and a shard that is left out counts as missing."""
    zeros = TRAINED._replace(params=jax.tree.map(np.zeros_like, PARAMS))
    stored = load(tmp_path, zeros, split, "train", [0], "all", BYTES["all"])[0]
    np.testing.assert_array_equal(whole(stored), np.zeros((90, 5, 24), np.float32))


# ---- streamed and shuffled


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60), tokens=st.integers(1, 3), block=st.integers(1, 9), rows=st.integers(1, 200),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_groups_and_chunks_give_each_row_once(count: int, tokens: int, block: int, rows: int, seed: int) -> None:
    x_NTD = np.arange(count * tokens * 2, dtype=np.float32).reshape(count, tokens, 2)
    stored = StoredResiduals(ts.array(x_NTD), block, "memory")
    groups = list(stored.groups(rows, np.random.default_rng(seed)))
    flat = np.concatenate(groups)
    assert sorted(flat[:, 0].tolist()) == x_NTD[..., 0].ravel().tolist()
    np.testing.assert_array_equal(flat[:, 1], flat[:, 0] + 1)
    sizes = [len(group) for group in groups]
    assert set(sizes[:-1]) <= {max(tokens, rows // tokens * tokens)}  # of one size, so that a step is compiled once
    assert max(sizes) <= max(rows, tokens)
    images = flat[:, 0].reshape(count, tokens)  # an image's tokens stay together
    np.testing.assert_array_equal(images - images[:, :1], np.tile(2.0 * np.arange(tokens), (count, 1)))
    np.testing.assert_array_equal(np.concatenate(list(stored.chunks())), x_NTD.reshape(-1, 2))


def test_groups_mix_the_whole_split_in_a_new_order_each_time() -> None:
    x_NTD = np.arange(3000, dtype=np.float32).reshape(3000, 1, 1)
    stored, rng = StoredResiduals(ts.array(x_NTD), 3, "memory"), np.random.default_rng(0)
    first, second = list(stored.groups(300, rng)), list(stored.groups(300, rng))
    for group in first + second:
        assert abs(group.mean() - 1499.5) < 400  # 8 standard errors
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    again = list(stored.groups(300, np.random.default_rng(0)))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))


@pytest.mark.parametrize("rows", [7, 40, 10**6])
def test_joined_residuals_give_each_row_once_and_mix_their_parts(rows: int) -> None:
    """Of parts of 100, 192 and 15 rows; the second is read in blocks of images with three tokens."""
    x = np.arange(307, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    blocks = StoredResiduals(ts.array(x[100:292].reshape(64, 3, 2)), 5, "memory")
    joined = JoinedResiduals((ResidualsInMemory(x[:100]), blocks, ResidualsInMemory(x[292:])))
    assert joined.shape == (307, 2)
    np.testing.assert_array_equal(np.concatenate(list(joined.chunks())), x)
    np.testing.assert_array_equal(load_all(joined), x)
    groups = list(joined.groups(rows, np.random.default_rng(0)))
    flat = np.concatenate(groups)
    np.testing.assert_array_equal(np.sort(flat[:, 0]), x[:, 0])
    if rows > 307:
        np.testing.assert_array_equal(flat, x)
        return
    again = np.concatenate(list(joined.groups(rows, np.random.default_rng(0))))
    other = np.concatenate(list(joined.groups(rows, np.random.default_rng(1))))
    np.testing.assert_array_equal(again, flat)
    assert (other != flat).any()
    assert max(map(len, groups)) <= rows
    early = flat[: len(flat) // 2, 0]
    assert 30 < np.sum(early < 100) < 70  # half of each part, not the first part alone


def test_no_more_is_read_than_one_part_ahead(split: Split, tmp_path: Path) -> None:
    class Counted:
        """An array that counts its reads."""

        def __init__(self, array: Any) -> None:
            self.array, self.shape, self.reads = array, array.shape, 0

        def __getitem__(self, part: Any) -> Any:
            self.reads += 1
            return self.array[part]

    stored = load(tmp_path, TRAINED, split, "train", [1], "all", BYTES["all"])[1]
    counted = Counted(stored.array)
    for number, group in enumerate(stored._replace(array=counted).groups(50, np.random.default_rng(0))):  # type: ignore[arg-type]
        assert len(group) == 50
        assert counted.reads == min(number + 2, 9)


# ---- written once, and continued after an interruption


def count_calls(monkeypatch: pytest.MonkeyPatch, fail_after: int = 10**9) -> list[int]:
    """Count the calls of each of the cache's forward passes; one is interrupted after `fail_after`."""
    stream_split, counts = cache.stream_split, []

    def passes(*args: Any) -> Iterator[Any]:
        counts.append(0)
        for part in stream_split(*args):
            if counts[-1] == fail_after:
                raise KeyboardInterrupt
            counts[-1] += 1
            yield part

    monkeypatch.setattr(cache, "stream_split", passes)
    return counts


@pytest.mark.parametrize(
    ("tokens", "batch", "fail_after"),
    [("cls", 16, 2), ("patches", 40, 1), ("all", 5, 9), ("all", 16, 0), ("all", 16, 3), ("all", 40, 2)],
)
def test_an_interrupted_pass_is_continued(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: Any, batch: int, fail_after: int
) -> None:
    trained = trained_model(config_of(eval_batch=batch), PARAMS)
    arguments = (trained, selection(split, "train", (1, 2), tokens), BYTES[tokens])
    write_cache(tmp_path / "whole", *arguments)
    mark = fingerprint_residuals(trained, split)
    with monkeypatch.context() as patch:
        count_calls(patch, fail_after)
        with pytest.raises(KeyboardInterrupt):
            load_or_compute_residuals(tmp_path / "resumed", *arguments)
    written_shards = len(shards(tmp_path / "resumed"))
    assert written_shards == 2 * (fail_after * batch // 12)  # shards of 12 images
    with pytest.raises(HeadSteerError) as error:
        open_cache(tmp_path / "resumed", mark, "train", 1, tokens)
    one_line(error, f"layer_1_{tokens}", "no complete cache")
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "resumed")}
    counts = count_calls(monkeypatch)
    load_or_compute_residuals(tmp_path / "resumed", *arguments)
    assert counts == [-(-90 // batch) - written_shards // 2 * 12 // batch]  # calls: only those of the missing shards
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_a_reader_writes_nothing(split: Split, tmp_path: Path) -> None:
    chosen = selection(split, "test", [1], "cls")
    computed = load_or_compute_residuals(tmp_path / "cache", TRAINED, chosen, may_write=False)
    assert not (tmp_path / "cache").exists()
    written = load_or_compute_residuals(tmp_path / "cache", TRAINED, chosen)
    np.testing.assert_array_equal(load_all(computed[1]), load_all(written[1]))
    before = files(tmp_path / "cache")
    read = load_or_compute_residuals(tmp_path / "cache", TRAINED, chosen, may_write=False)
    np.testing.assert_array_equal(load_all(read[1]), load_all(written[1]))
    assert files(tmp_path / "cache") == before


def test_only_meta_json_is_missing(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (tmp_path, TRAINED, split, "train", [1], "cls", BYTES["cls"])
    load(*arguments)
    before = files(tmp_path)
    next(tmp_path.rglob("meta.json")).unlink()
    counts = count_calls(monkeypatch)
    load(*arguments)
    assert counts == [0]
    assert files(tmp_path) == before


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_that_were_interrupted_at_different_shards(split: Split, tmp_path: Path, layer: int) -> None:
    arguments = (tmp_path, TRAINED, split, "train", [1, 2], "cls", BYTES["cls"])
    load(*arguments)
    before = files(tmp_path)
    for path in tmp_path.rglob("meta.json"):
        path.unlink()
    shards(next(tmp_path.rglob(f"layer_{layer}_cls")))[3].unlink()
    load(*arguments)
    assert files(tmp_path) == before


def test_only_missing_residuals_are_computed(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_calls(monkeypatch)
    arguments = (TRAINED, split)
    load(tmp_path, *arguments, "train", [1], "cls")
    load(tmp_path, *arguments, "train", [1], "cls")
    assert len(counts) == 1
    by_layer = load(tmp_path, *arguments, "train", [2, 1, 1], "cls")
    assert (len(counts), sorted(by_layer)) == (2, [1, 2])
    load(tmp_path, *arguments, "train", [1], "all")
    load(tmp_path, *arguments, "test", [1], "cls")
    assert len(counts) == 4
    names = sorted("/".join(path.parts[-3:-1]) for path in tmp_path.rglob("meta.json"))
    assert names == ["test/layer_1_cls", "train/layer_1_all", "train/layer_1_cls", "train/layer_2_cls"]


def test_meta_json_identifies_the_array(split: Split, tmp_path: Path) -> None:
    write_cache(tmp_path, TRAINED, selection(split, "train", [2], "all"), BYTES["all"])
    mark = fingerprint_residuals(TRAINED, split)
    meta = json.loads((tmp_path / mark / "train" / "layer_2_all" / "meta.json").read_text())
    assert {key: meta[key] for key in ("fingerprint", "split", "layer", "tokens", "shape", "dtype", "shards")} == {
        "fingerprint": mark, "split": "train", "layer": 2, "tokens": "all", "shape": [90, 5, 24], "dtype": "float32",
        "shards": 8,
    }  # fmt: skip
    assert meta["of"]["model"] == fingerprint_params(PARAMS)


# ---- damaged files are refused


@pytest.fixture(scope="module")
def written(split: Split, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("cache")
    write_cache(directory, TRAINED, selection(split, "train", [1, 2], "all"), BYTES["all"])
    return directory, fingerprint_residuals(TRAINED, split)


def read_back(directory: Path, mark: str) -> np.ndarray:
    return whole(open_cache(directory, mark, "train", 1, "all"))


READS: dict[str, Callable[[StoredResiduals], Any]] = {
    "chunks": lambda stored: list(stored.chunks()),
    "groups": lambda stored: list(stored.groups(60, np.random.default_rng(0))),
    "all": lambda stored: list(stored.groups(10**6, np.random.default_rng(0))),
    "images": lambda stored: stored.images(np.arange(90)),
}


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_of_a_shard_is_refused(written: tuple[Path, str], tmp_path: Path, seed: int) -> None:
    directory, mark = tmp_path / "copy", written[1]
    shutil.copytree(written[0], directory)
    rng = np.random.default_rng(seed)
    path = rng.choice(shards(directory / mark / "train" / "layer_1_all"))
    content = bytearray(path.read_bytes())
    place = int(rng.integers(len(content)))
    content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    stored = open_cache(directory, mark, "train", 1, "all")
    for read in READS.values():
        with pytest.raises(HeadSteerError) as error:
            read(stored)
        one_line(error, str(path), "damaged", f"{path.parents[3]}:", "delete it")
    whole(open_cache(directory, mark, "train", 2, "all"))  # the other layer is unchanged


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_elsewhere_is_refused_or_harmless(written: tuple[Path, str], tmp_path: Path, seed: int) -> None:
    directory, mark = tmp_path / "copy", written[1]
    shutil.copytree(written[0], directory)
    rng = np.random.default_rng(seed)
    path = directory / mark / "train" / "layer_1_all" / ("meta.json", "zarr.json")[seed % 2]
    content = bytearray(path.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    message, residuals = "layer_1_all", read_back(*written)
    try:
        np.testing.assert_array_equal(read_back(directory, mark), residuals)
    except HeadSteerError as error:
        message = str(error)
    assert "\n" not in message
    assert "layer_1_all" in message


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("which", [0, 3, -1, "meta.json", "zarr.json"])
def test_a_file_cut_short_is_refused(written: tuple[Path, str], tmp_path: Path, share: float, which: Any) -> None:
    directory, mark = tmp_path / "copy", written[1]
    shutil.copytree(written[0], directory)
    array = directory / mark / "train" / "layer_1_all"
    path = array / which if isinstance(which, str) else shards(array)[which]
    content = path.read_bytes()
    path.write_bytes(content[: min(int(share * len(content)), len(content) - 3)])
    with pytest.raises(HeadSteerError) as error:
        read_back(directory, mark)
    one_line(error, str(array), "truncated or damaged", "delete it")


@pytest.mark.parametrize("which", [0, 3, -1])
def test_a_missing_shard_is_refused(written: tuple[Path, str], tmp_path: Path, which: int) -> None:
    directory, mark = tmp_path / "copy", written[1]
    shutil.copytree(written[0], directory)
    array = directory / mark / "train" / "layer_1_all"
    stored = open_cache(directory, mark, "train", 1, "all")
    shards(array)[which].unlink()
    with pytest.raises(HeadSteerError) as error:
        read_back(directory, mark)
    one_line(error, str(array), f"shard {which % 8} is missing", "delete it")
    for read in READS.values():  # also by an array that was opened before
        with pytest.raises(HeadSteerError) as error:
            read(stored)
        one_line(error, str(array), "is missing")


def test_a_missing_zarr_json_is_refused(written: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(written[0], tmp_path / "copy")
    array = tmp_path / "copy" / written[1] / "train" / "layer_1_all"
    (array / "zarr.json").unlink()
    with pytest.raises(HeadSteerError) as error:
        read_back(tmp_path / "copy", written[1])
    one_line(error, str(array), "does not exist", "delete it")


def test_a_deleted_array_is_written_again(split: Split, written: tuple[Path, str], tmp_path: Path) -> None:
    """The remedy that the messages name."""
    directory, mark = tmp_path / "copy", written[1]
    shutil.copytree(written[0], directory)
    shutil.rmtree(directory / mark / "train" / "layer_1_all")
    load(directory, TRAINED, split, "train", [1, 2], "all", BYTES["all"])
    assert files(directory) == files(written[0])


# ---- arrays of another model, split, layer or tokens are refused


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("f" * 16, "train", 1, "all"), ["f" * 16, "no complete cache"]),
        ((None, "test", 1, "all"), ["test", "no complete cache"]),
        ((None, "train", 0, "all"), ["layer_0_all", "no complete cache", "train/layer_1_all, "]),
        ((None, "train", 1, "cls"), ["layer_1_cls", "no complete cache", "train/layer_2_all; write it first"]),
    ],
)
def test_an_array_that_does_not_exist(written: tuple[Path, str], arguments: tuple[Any, ...], parts: list[str]) -> None:
    mark, *names = arguments
    with pytest.raises(HeadSteerError) as error:
        open_cache(written[0], mark or written[1], *names)
    one_line(error, *parts)


def test_an_empty_cache(tmp_path: Path) -> None:
    with pytest.raises(HeadSteerError) as error:
        open_cache(tmp_path / "none", "f" * 16, "train", 1, "all")
    one_line(error, str(tmp_path / "none"), "only of none")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("f" * 16, "train", 1, "all"), ["its fingerprint is ", "not 'ffffffffffffffff'"]),
        ((None, "test", 1, "all"), ["its split is ", "'train', not 'test'"]),
        ((None, "train", 0, "all"), ["its layer is ", "1, not 0"]),
        ((None, "train", 1, "patches"), ["its tokens is ", "'all', not 'patches'"]),
    ],
)
def test_a_directory_that_was_renamed(
    written: tuple[Path, str], tmp_path: Path, arguments: tuple[Any, ...], parts: list[str]
) -> None:
    mark, name, layer, tokens = arguments[0] or written[1], *arguments[1:]
    target = tmp_path / mark / name / f"layer_{layer}_{tokens}"
    shutil.copytree(written[0] / written[1] / "train" / "layer_1_all", target)
    with pytest.raises(HeadSteerError) as error:
        open_cache(tmp_path, mark, name, layer, tokens)
    one_line(error, str(target), "delete it", *parts)


def test_an_interrupted_cache_of_another_layout(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (tmp_path, TRAINED, split, "train", [1], "cls")
    with monkeypatch.context() as patch:
        count_calls(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            load(*arguments, BYTES["cls"])
    with pytest.raises(HeadSteerError) as error:
        load(*arguments)
    one_line(error, str(tmp_path), "chunk_shape", "delete it")


# ---- the fingerprint


def changed(config: Config, section: str, **fields: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


def with_bit(params: Any, seed: int) -> Any:
    """Flip one bit of one parameter."""
    leaves, tree = jax.tree.flatten(params)
    leaves, rng = [np.array(leaf) for leaf in leaves], np.random.default_rng(seed)
    raw = rng.choice(np.array(leaves, dtype=object)).reshape(-1).view(np.uint8)
    raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
    return jax.tree.unflatten(tree, leaves)


@pytest.mark.parametrize("seed", range(10))
def test_any_bit_of_the_model_counts(split: Split, seed: int) -> None:
    other = with_bit(PARAMS, seed)
    assert fingerprint_params(other) != fingerprint_params(PARAMS)
    assert fingerprint_residuals(TRAINED._replace(params=other), split) != fingerprint_residuals(TRAINED, split)


@pytest.mark.parametrize("seed", range(10))
def test_any_image_and_label_counts(split: Split, seed: int) -> None:
    rng, original = np.random.default_rng(seed), fingerprint_residuals(TRAINED, split)
    images, labels = np.array(split.images), split.labels.copy()
    images.reshape(-1)[rng.integers(images.size)] ^= 1
    assert fingerprint_residuals(TRAINED, replace(split, images=images)) != original
    labels[rng.integers(len(labels))] += 1
    assert fingerprint_residuals(TRAINED, replace(split, labels=labels)) != original
    order = np.r_[1, 0, 2 : len(labels)]
    assert fingerprint_residuals(TRAINED, Split(split.images[order], split.labels[order])) != original
    assert fingerprint_residuals(TRAINED, Split(split.images[:-1], split.labels[:-1])) != original


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("data", {"mean": (1e-9,)}),
        ("data", {"std": (0.999999,)}),
        ("data", {"image_size": 12}),
        ("gate", {"dropped": "identity"}),
        ("gate", {"first_layer": 2}),
        ("gate", {"layer_norm": True}),
        ("model", {"gelu": "tanh"}),
        ("model", {"layer_norm_epsilon": 1e-5}),
    ],
)
def test_settings_of_the_forward_pass_count(split: Split, section: str, fields: dict[str, Any]) -> None:
    other = trained_model(changed(CONFIG, section, **fields), PARAMS)
    assert fingerprint_residuals(other, split) != fingerprint_residuals(TRAINED, split)


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("data", {"flip": True}),
        ("gate", {"temperature": 5.0}),
        ("model", {"pretrained": "x.npz"}),
        ("model", {"dtype": "bfloat16"}),  # of training; residuals are computed in float32
        ("train", {"eval_batch": 3}),
        ("sae", {"k": 3}),
    ],
)
def test_other_settings_do_not_count(split: Split, section: str, fields: dict[str, Any]) -> None:
    original = fingerprint_residuals(TRAINED, split)
    assert fingerprint_residuals(trained_model(changed(CONFIG, section, **fields), PARAMS), split) == original
    assert fingerprint_residuals(TRAINED._replace(params=jax.tree.map(np.asarray, PARAMS)), split) == original


def test_a_stale_cache_is_never_read(split: Split, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headsteer_jax")
    load(tmp_path, TRAINED, split, "train", [1], "cls")
    load(tmp_path, TRAINED, split, "test", [1], "cls")
    other = with_bit(PARAMS, 1)
    images = np.array(split.images)
    images[0] ^= 255
    for params, config, data in (
        (other, CONFIG, split),
        (PARAMS, changed(CONFIG, "data", mean=(0.5,)), split),
        (PARAMS, CONFIG, replace(split, images=images)),
    ):
        caplog.clear()
        stored = load(tmp_path, trained_model(config, params), data, "train", [1], "cls")[1]
        np.testing.assert_allclose(whole(stored), expected(config, params, data, 1, "cls"), atol=1e-5)
        lines = [line for line in caplog.messages if "another model" in line]
        assert len(lines) == 1
        assert str(tmp_path / fingerprint_residuals(TRAINED, split)) in lines[0]
        assert "delete" in lines[0]
    assert len(list(tmp_path.iterdir())) == 4


def write_images(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in (f"{split}/{label}/{i}.png" for split in ("train", "test") for label in "ab" for i in range(12)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(root / name, "bmp")
    return root


def test_files_that_are_decoded_as_they_are_read(tmp_path: Path) -> None:
    """The fingerprint covers names, contents and which images there are, and not when the files were written."""
    root = write_images(tmp_path / "images")
    data = DataConfig(source="folder", path=str(root), image_size=8)
    config = CONFIG.model_copy(update={"data": data})
    path = root / "train" / "a" / "3.png"
    stat, content = path.stat(), path.read_bytes()

    def fingerprint(places: Any = range(20)) -> str:
        train, chosen = read_folder(data)[0], np.array(places)
        assert isinstance(train.images, LazyImages)
        assert train.keys is not None
        split = Split(train.images[chosen], np.zeros(20, np.int32), train.keys[chosen])
        return fingerprint_residuals(trained_model(config, PARAMS), split)

    original = fingerprint()
    os.utime(path, ns=(stat.st_mtime_ns + 60 * 10**9,) * 2)
    assert fingerprint() == original
    assert fingerprint([*range(19), 20]) != original
    path.write_bytes(content + b"x")
    assert fingerprint() != original
    path.write_bytes(content)
    assert fingerprint() == original
    path.rename(path.with_name("3b.png"))
    assert fingerprint() != original
    path.with_name("3b.png").rename(path)
    path.write_bytes(content[:-1] + b"x")  # of the same size
    assert fingerprint() != original


# ---- a full disk, a bucket


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(split: Split, tmp_path: Path, small_disk: Path) -> None:
    arguments = (TRAINED, split, "train", [1, 2], "all", BYTES["all"])
    (small_disk / "ballast").write_bytes(bytes(180 * 1024))
    with pytest.raises(HeadSteerError) as error:
        load(small_disk, *arguments)
    one_line(error, str(small_disk), "the disk is full", "free some space")
    assert not list(small_disk.rglob("meta.json"))
    partial = shards(small_disk)
    assert partial
    load(tmp_path / "whole", *arguments)
    for path in partial:  # every shard on the disk is complete
        assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(small_disk)).read_bytes()
    (small_disk / "ballast").unlink()
    load(small_disk, *arguments)
    assert files(small_disk) == files(tmp_path / "whole")


def test_a_directory_that_cannot_be_written(split: Split, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HeadSteerError) as error:
        load(tmp_path / "file", TRAINED, split, "train", [1], "cls")
    one_line(error, str(tmp_path / "file"))


class Bucket(BaseHTTPRequestHandler):
    """The part of Google's storage that TensorStore needs; buckets named gone-... do not answer."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, code: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def request_parts(self) -> tuple[str, str, dict[str, str]]:
        """Parse the URL into bucket, object and query."""
        url = urlsplit(self.path)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        return bucket, unquote(name.removeprefix("/")), {key: values[0] for key, values in parse_qs(url.query).items()}

    def do_GET(self) -> None:
        bucket, name, query = self.request_parts()
        if bucket.startswith("gone"):
            self.close_connection = True
            return
        if not name:
            keys = sorted(key.removeprefix(f"{bucket}/") for key in self.objects if key.startswith(f"{bucket}/"))
            first, last = query.get("startOffset", ""), query.get("endOffset", "~")
            keys = [key for key in keys if key.startswith(query.get("prefix", "")) and first <= key < last]
            items = [
                {"name": key, "size": str(len(self.objects[f"{bucket}/{key}"])), "generation": "1"} for key in keys
            ]
            return self.reply(200, json.dumps({"items": items}).encode())
        content = self.objects.get(f"{bucket}/{name}")
        if content is None:
            return self.reply(404)
        if "Range" not in self.headers:
            return self.reply(200, content, x_goog_generation="1")
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        begin = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        content_range = f"bytes {begin}-{end - 1}/{len(content)}"
        return self.reply(206, content[begin:end], x_goog_generation="1", Content_Range=content_range)

    def do_POST(self) -> None:
        bucket, _, query = self.request_parts()
        self.objects[f"{bucket}/{query['name']}"] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(200, json.dumps({"name": query["name"], "generation": "1"}).encode())


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, bytes]]:
    """The objects of a server in Google's place, to which TensorStore's own gs:// driver talks."""
    Bucket.objects = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_port}"  # read once in a process
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
    yield Bucket.objects
    server.shutdown()


@pytest.mark.parametrize("as_path", [False, True])
def test_a_bucket(split: Split, tmp_path: Path, bucket: dict[str, bytes], as_path: bool) -> None:
    bucket.clear()
    arguments = (TRAINED, split, "train", [1, 2], "all", BYTES["all"])
    url: Any = Path("gs://shelf/some where/x") if as_path else "gs://shelf/some where/x/"
    by_layer = load(url, *arguments)
    load(tmp_path, *arguments)
    assert {key.removeprefix("shelf/some where/x/"): value for key, value in bucket.items()} == files(tmp_path)
    np.testing.assert_array_equal(by_layer[2].images(np.array([70, 3])), whole(by_layer[2])[[70, 3]])
    mark = fingerprint_residuals(TRAINED, split)
    key = f"shelf/some where/x/{mark}/train/layer_2_all/c/3/0/0"
    bucket[key] = bucket[key][:-1] + b"~"
    with pytest.raises(HeadSteerError) as error:
        whole(open_cache(url, mark, "train", 2, "all"))
    one_line(error, f"gs://shelf/some where/x/{mark}/train/layer_2_all: truncated or damaged", "c/3/0/0", "delete it")
    del bucket[key]
    with pytest.raises(HeadSteerError) as error:
        open_cache(url, mark, "train", 2, "all")
    one_line(error, "truncated or damaged", "shard 3 is missing")


def test_a_bucket_that_does_not_answer(split: Split, bucket: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cache.RETRIES, "max_retries", 1)
    for attempt in (
        lambda: open_cache("gs://gone-away/x", "f" * 16, "train", 1, "all"),
        lambda: load("gs://gone-away/x", TRAINED, split, "train", [1], "cls"),
    ):
        with pytest.raises(HeadSteerError) as error:
            attempt()
        one_line(error, "gs://gone-away/x", "cannot be reached", "check the network")
    with pytest.raises(HeadSteerError) as error:
        open_cache("gs://", "f" * 16, "train", 1, "all")
    one_line(error, "gs://", "bucket")
