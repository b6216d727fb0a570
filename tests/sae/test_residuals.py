"""The activation cache: the model's own residuals, whatever is on disk; what is damaged or stale is never read."""

import functools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
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
from headsteer_jax.data.sources import _read_folder
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import build_model, fingerprint_params
from headsteer_jax.sae import residuals as cache
from headsteer_jax.sae.residuals import (
    StoredResiduals,
    fingerprint_residuals,
    load_or_compute_residuals,
    open_cache,
    write_cache,
)

# tensorstore says more about a damaged file when its futures are collected
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TOKENS = ("cls", "patches", "all")
BYTES = {"cls": 12 * 96, "patches": 12 * 4 * 96, "all": 12 * 5 * 96}  # 12 images: 8 shards of the fixture's 90


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Of 3 images in these shards."""
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


CONFIG = config_of()
MODEL, PARAMS = build_model(CONFIG, CLASSES), random_params(CONFIG, CLASSES)


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
    config = config_of(registers)
    params = random_params(config, CLASSES)
    directory = tmp_path / "a b%20" if where == "disk" else None
    found = load_or_compute_residuals(
        directory, build_model(config, CLASSES), params, config, split, "train", (2, 0, 1), tokens, BYTES[tokens]
    )
    assert set(found) == {0, 1, 2}
    assert len(shards(tmp_path)) == (3 * 8 if where == "disk" else 0)
    rng = np.random.default_rng(0)
    for layer, stored in found.items():
        x_NTD = expected(config, params, split, layer, tokens)
        count, tokens_kept, width = x_NTD.shape
        assert (stored.shape, stored.tokens) == ((count * tokens_kept, width), tokens_kept)
        np.testing.assert_allclose(whole(stored), x_NTD, atol=1e-5)
        assert whole(stored).dtype == np.float32
        some = rng.integers(0, count, 7)
        np.testing.assert_array_equal(stored.images(some), whole(stored)[some])
        (all_at_once,) = stored.groups(count * tokens_kept, rng)
        np.testing.assert_array_equal(all_at_once.reshape(x_NTD.shape), whole(stored))


def test_gates_are_thresholded(split: Split) -> None:
    """And they matter: the last layer's residual is not the dense model's."""
    stored = load_or_compute_residuals(None, MODEL, PARAMS, CONFIG, split, "train", [2], "cls")[2]
    dense = jax.jit(lambda p, images: MODEL.apply(p, preprocess(images, CONFIG.data), gating="dense")[1]["cls"][2])
    assert np.abs(whole(stored)[:, 0] - dense(PARAMS, split.images)).max() > 0.1


def test_of_lazy_images(split: Split, tmp_path: Path) -> None:
    images = np.asarray(split.images)
    lazy = replace(split, images=LazyImages(lambda places: images[places], np.arange(len(images)), (8, 8, 1)))
    of_lazy = load_or_compute_residuals(tmp_path, MODEL, PARAMS, CONFIG, lazy, "train", [1], "all", BYTES["all"])[1]
    held = load_or_compute_residuals(None, MODEL, PARAMS, CONFIG, split, "train", [1], "all")[1]
    np.testing.assert_array_equal(whole(of_lazy), whole(held))


@pytest.mark.parametrize(("batch", "size"), [(7, 2**20), (64, 1), (1000, BYTES["all"]), (1, 4 * BYTES["all"])])
def test_the_number_of_calls_and_shards_changes_nothing(split: Split, tmp_path: Path, batch: int, size: int) -> None:
    """One shard or many, a call smaller or larger than a shard."""
    config = config_of(eval_batch=batch)
    stored = load_or_compute_residuals(tmp_path, MODEL, PARAMS, config, split, "train", [1], "all", size)[1]
    np.testing.assert_allclose(whole(stored), expected(CONFIG, PARAMS, split, 1, "all"), atol=1e-5)


def test_zeros_are_written(split: Split, tmp_path: Path) -> None:
    """TensorStore leaves them out unless told not to, and what is left out counts as missing."""
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    stored = load_or_compute_residuals(tmp_path, MODEL, zeros, CONFIG, split, "train", [0], "all", BYTES["all"])[0]
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
    assert set(sizes[:-1]) <= {max(tokens, rows // tokens * tokens)}  # of one size: a step is compiled once
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


def test_no_more_is_read_than_one_part_ahead(split: Split, tmp_path: Path) -> None:
    class Counted:
        """An array that counts what it is asked for."""

        def __init__(self, array: Any) -> None:
            self.array, self.shape, self.reads = array, array.shape, 0

        def __getitem__(self, part: Any) -> Any:
            self.reads += 1
            return self.array[part]

    stored = load_or_compute_residuals(tmp_path, MODEL, PARAMS, CONFIG, split, "train", [1], "all", BYTES["all"])[1]
    counted = Counted(stored.array)
    for number, group in enumerate(stored._replace(array=counted).groups(50, np.random.default_rng(0))):  # type: ignore[arg-type]
        assert len(group) == 50
        assert counted.reads == min(number + 2, 9)


# ---- written once, gone on with


def counted_passes(monkeypatch: pytest.MonkeyPatch, fail_after: int = 10**9) -> list[int]:
    """How many calls each of the cache's forward passes made; one is interrupted after `fail_after`."""
    real, made = cache.stream_split, []

    def passes(*args: Any) -> Iterator[Any]:
        made.append(0)
        for part in real(*args):
            if made[-1] == fail_after:
                raise KeyboardInterrupt
            made[-1] += 1
            yield part

    monkeypatch.setattr(cache, "stream_split", passes)
    return made


@pytest.mark.parametrize(
    ("tokens", "batch", "fail_after"),
    [("cls", 16, 2), ("patches", 40, 1), ("all", 5, 9), ("all", 16, 0), ("all", 16, 3), ("all", 40, 2)],
)
def test_an_interrupted_pass_goes_on(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: Any, batch: int, fail_after: int
) -> None:
    config = config_of(eval_batch=batch)
    given = (MODEL, PARAMS, config, split, "train", (1, 2), tokens, BYTES[tokens])
    write_cache(tmp_path / "whole", *given)
    mark = fingerprint_residuals(config, PARAMS, split)
    with monkeypatch.context() as patch:
        counted_passes(patch, fail_after)
        with pytest.raises(KeyboardInterrupt):
            load_or_compute_residuals(tmp_path / "resumed", *given)
    there = len(shards(tmp_path / "resumed"))
    assert there == 2 * (fail_after * batch // 12)  # shards of 12 images
    with pytest.raises(HeadSteerError) as error:
        open_cache(tmp_path / "resumed", mark, "train", 1, tokens)
    one_line(error, f"layer_1_{tokens}", "no complete cache")
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "resumed")}
    made = counted_passes(monkeypatch)
    load_or_compute_residuals(tmp_path / "resumed", *given)
    assert made == [-(-90 // batch) - there // 2 * 12 // batch]  # calls: only those of the shards that are missing
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_complete_but_for_its_meta(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (tmp_path, MODEL, PARAMS, CONFIG, split, "train", [1], "cls", BYTES["cls"])
    load_or_compute_residuals(*given)
    before = files(tmp_path)
    next(tmp_path.rglob("meta.json")).unlink()
    made = counted_passes(monkeypatch)
    load_or_compute_residuals(*given)
    assert made == [0]
    assert files(tmp_path) == before


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_that_got_to_different_places(split: Split, tmp_path: Path, layer: int) -> None:
    given = (tmp_path, MODEL, PARAMS, CONFIG, split, "train", [1, 2], "cls", BYTES["cls"])
    load_or_compute_residuals(*given)
    before = files(tmp_path)
    for path in tmp_path.rglob("meta.json"):
        path.unlink()
    shards(next(tmp_path.rglob(f"layer_{layer}_cls")))[3].unlink()
    load_or_compute_residuals(*given)
    assert files(tmp_path) == before


def test_only_what_is_missing_is_computed(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted_passes(monkeypatch)
    given = (MODEL, PARAMS, CONFIG, split)
    load_or_compute_residuals(tmp_path, *given, "train", [1], "cls")
    load_or_compute_residuals(tmp_path, *given, "train", [1], "cls")
    assert len(made) == 1
    both = load_or_compute_residuals(tmp_path, *given, "train", [2, 1, 1], "cls")
    assert (len(made), sorted(both)) == (2, [1, 2])
    load_or_compute_residuals(tmp_path, *given, "train", [1], "all")
    load_or_compute_residuals(tmp_path, *given, "test", [1], "cls")
    assert len(made) == 4
    names = sorted("/".join(path.parts[-3:-1]) for path in tmp_path.rglob("meta.json"))
    assert names == ["test/layer_1_cls", "train/layer_1_all", "train/layer_1_cls", "train/layer_2_cls"]


def test_meta_says_what_it_is_of(split: Split, tmp_path: Path) -> None:
    write_cache(tmp_path, MODEL, PARAMS, CONFIG, split, "train", [2], "all", BYTES["all"])
    mark = fingerprint_residuals(CONFIG, PARAMS, split)
    meta = json.loads((tmp_path / mark / "train" / "layer_2_all" / "meta.json").read_text())
    assert {key: meta[key] for key in ("fingerprint", "split", "layer", "tokens", "shape", "dtype", "shards")} == {
        "fingerprint": mark, "split": "train", "layer": 2, "tokens": "all", "shape": [90, 5, 24], "dtype": "float32",
        "shards": 8,
    }  # fmt: skip
    assert meta["of"]["model"] == fingerprint_params(PARAMS)


# ---- what is damaged is refused


@pytest.fixture(scope="module")
def written(split: Split, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("cache")
    write_cache(directory, MODEL, PARAMS, CONFIG, split, "train", [1, 2], "all", BYTES["all"])
    return directory, fingerprint_residuals(CONFIG, PARAMS, split)


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
    whole(open_cache(directory, mark, "train", 2, "all"))  # the other layer is as it was


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_elsewhere_is_refused_or_harmless(written: tuple[Path, str], tmp_path: Path, seed: int) -> None:
    directory, mark = tmp_path / "copy", written[1]
    shutil.copytree(written[0], directory)
    rng = np.random.default_rng(seed)
    path = directory / mark / "train" / "layer_1_all" / ("meta.json", "zarr.json")[seed % 2]
    content = bytearray(path.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    said, found = "layer_1_all", read_back(*written)
    try:
        np.testing.assert_array_equal(read_back(directory, mark), found)
    except HeadSteerError as error:
        said = str(error)
    assert "\n" not in said
    assert "layer_1_all" in said


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
    for read in READS.values():  # of one that was opened before
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


def test_what_was_deleted_is_made_again(split: Split, written: tuple[Path, str], tmp_path: Path) -> None:
    """The mend that the messages name."""
    directory, mark = tmp_path / "copy", written[1]
    shutil.copytree(written[0], directory)
    shutil.rmtree(directory / mark / "train" / "layer_1_all")
    load_or_compute_residuals(directory, MODEL, PARAMS, CONFIG, split, "train", [1, 2], "all", BYTES["all"])
    assert files(directory) == files(written[0])


# ---- what is of something else is refused


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        (("f" * 16, "train", 1, "all"), ["f" * 16, "no complete cache"]),
        ((None, "test", 1, "all"), ["test", "no complete cache"]),
        ((None, "train", 0, "all"), ["layer_0_all", "no complete cache", "train/layer_1_all, "]),
        ((None, "train", 1, "cls"), ["layer_1_cls", "no complete cache", "train/layer_2_all; write it first"]),
    ],
)
def test_it_is_not_there(written: tuple[Path, str], asked: tuple[Any, ...], parts: list[str]) -> None:
    mark, *rest = asked
    with pytest.raises(HeadSteerError) as error:
        open_cache(written[0], mark or written[1], *rest)
    one_line(error, *parts)


def test_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(HeadSteerError) as error:
        open_cache(tmp_path / "none", "f" * 16, "train", 1, "all")
    one_line(error, str(tmp_path / "none"), "only of none")


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        (("f" * 16, "train", 1, "all"), ["another fingerprint", "not 'ffffffffffffffff'"]),
        ((None, "test", 1, "all"), ["another split", "'train', not 'test'"]),
        ((None, "train", 0, "all"), ["another layer", "1, not 0"]),
        ((None, "train", 1, "patches"), ["another tokens", "'all', not 'patches'"]),
    ],
)
def test_a_directory_that_was_renamed(
    written: tuple[Path, str], tmp_path: Path, asked: tuple[Any, ...], parts: list[str]
) -> None:
    mark, name, layer, tokens = asked[0] or written[1], *asked[1:]
    target = tmp_path / mark / name / f"layer_{layer}_{tokens}"
    shutil.copytree(written[0] / written[1] / "train" / "layer_1_all", target)
    with pytest.raises(HeadSteerError) as error:
        open_cache(tmp_path, mark, name, layer, tokens)
    one_line(error, str(target), "delete it", *parts)


def test_a_begun_cache_of_another_layout(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (tmp_path, MODEL, PARAMS, CONFIG, split, "train", [1], "cls")
    with monkeypatch.context() as patch:
        counted_passes(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            load_or_compute_residuals(*given, BYTES["cls"])
    with pytest.raises(HeadSteerError) as error:
        load_or_compute_residuals(*given)
    one_line(error, str(tmp_path), "chunk_shape", "delete it")


# ---- the fingerprint


def changed(config: Config, section: str, **fields: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


def with_bit(params: Any, seed: int) -> Any:
    """One bit of one parameter flipped."""
    leaves, tree = jax.tree.flatten(params)
    leaves, rng = [np.array(leaf) for leaf in leaves], np.random.default_rng(seed)
    raw = rng.choice(np.array(leaves, dtype=object)).reshape(-1).view(np.uint8)
    raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
    return jax.tree.unflatten(tree, leaves)


@pytest.mark.parametrize("seed", range(10))
def test_any_bit_of_the_model_counts(split: Split, seed: int) -> None:
    other = with_bit(PARAMS, seed)
    assert fingerprint_params(other) != fingerprint_params(PARAMS)
    assert fingerprint_residuals(CONFIG, other, split) != fingerprint_residuals(CONFIG, PARAMS, split)


@pytest.mark.parametrize("seed", range(10))
def test_any_image_and_label_counts(split: Split, seed: int) -> None:
    rng, own = np.random.default_rng(seed), fingerprint_residuals(CONFIG, PARAMS, split)
    images, labels = np.array(split.images), split.labels.copy()
    images.reshape(-1)[rng.integers(images.size)] ^= 1
    assert fingerprint_residuals(CONFIG, PARAMS, replace(split, images=images)) != own
    labels[rng.integers(len(labels))] += 1
    assert fingerprint_residuals(CONFIG, PARAMS, replace(split, labels=labels)) != own
    order = np.r_[1, 0, 2 : len(labels)]
    assert fingerprint_residuals(CONFIG, PARAMS, Split(split.images[order], split.labels[order])) != own
    assert fingerprint_residuals(CONFIG, PARAMS, Split(split.images[:-1], split.labels[:-1])) != own


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
        ("model", {"dtype": "bfloat16"}),
        ("model", {"layer_norm_epsilon": 1e-5}),
    ],
)
def test_what_changes_the_forward_pass_counts(split: Split, section: str, fields: dict[str, Any]) -> None:
    assert fingerprint_residuals(changed(CONFIG, section, **fields), PARAMS, split) != fingerprint_residuals(
        CONFIG, PARAMS, split
    )


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("data", {"flip": True}),
        ("gate", {"temperature": 5.0}),
        ("model", {"pretrained": "x.npz"}),
        ("train", {"eval_batch": 3}),
        ("sae", {"k": 3}),
    ],
)
def test_what_does_not_does_not(split: Split, section: str, fields: dict[str, Any]) -> None:
    assert fingerprint_residuals(changed(CONFIG, section, **fields), PARAMS, split) == fingerprint_residuals(
        CONFIG, PARAMS, split
    )
    assert fingerprint_residuals(CONFIG, jax.tree.map(np.asarray, PARAMS), split) == fingerprint_residuals(
        CONFIG, PARAMS, split
    )


def test_a_stale_cache_is_never_read(split: Split, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_or_compute_residuals(tmp_path, MODEL, PARAMS, CONFIG, split, "train", [1], "cls")
    load_or_compute_residuals(tmp_path, MODEL, PARAMS, CONFIG, split, "test", [1], "cls")
    capsys.readouterr()
    other = with_bit(PARAMS, 1)
    images = np.array(split.images)
    images[0] ^= 255
    for params, config, data in (
        (other, CONFIG, split),
        (PARAMS, changed(CONFIG, "data", mean=(0.5,)), split),
        (PARAMS, CONFIG, replace(split, images=images)),
    ):
        stored = load_or_compute_residuals(
            tmp_path, build_model(config, CLASSES), params, config, data, "train", [1], "cls"
        )[1]
        np.testing.assert_allclose(whole(stored), expected(config, params, data, 1, "cls"), atol=1e-5)
        said = [line for line in capsys.readouterr().err.splitlines() if "another model" in line]
        assert len(said) == 1
        assert str(tmp_path / fingerprint_residuals(CONFIG, PARAMS, split)) in said[0]
        assert "delete" in said[0]
    assert len(list(tmp_path.iterdir())) == 4


def write_images(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in (f"{split}/{label}/{i}.png" for split in ("train", "test") for label in "ab" for i in range(12)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(root / name, "bmp")
    return root


def test_files_that_are_decoded_as_they_are_read(tmp_path: Path) -> None:
    """Their names, sizes and times, the images' places, and some images themselves."""
    root = write_images(tmp_path / "images")
    data = DataConfig(source="folder", path=str(root), image_size=8)
    config = CONFIG.model_copy(update={"data": data})
    path = root / "train" / "a" / "3.png"
    about, content = path.stat(), path.read_bytes()

    def now(places: Any = range(20)) -> str:
        train = _read_folder(data)[0]
        assert isinstance(train.images, LazyImages)
        return fingerprint_residuals(config, PARAMS, Split(train.images[np.array(places)], np.zeros(20, np.int32)))

    def touched(time: int) -> str:
        os.utime(path, ns=(time, time))
        return now()

    own = now()
    assert touched(about.st_mtime_ns) == own
    assert now([*range(19), 20]) != own
    assert touched(about.st_mtime_ns + 60 * 10**9) != own
    path.write_bytes(content + b"x")
    assert touched(about.st_mtime_ns) != own  # its size
    path.write_bytes(content)
    assert touched(about.st_mtime_ns) == own
    path.rename(path.with_name("3b.png"))
    assert now() != own
    path.with_name("3b.png").rename(path)
    for path in (root / "train").rglob("*.png"):  # an uncompressed format: neither its size nor its time tells
        about = path.stat()
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path, "bmp")
        assert len(path.read_bytes()) == about.st_size
        os.utime(path, ns=(about.st_mtime_ns, about.st_mtime_ns))
    assert now() != own


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
    given = (MODEL, PARAMS, CONFIG, split, "train", [1, 2], "all", BYTES["all"])
    (small_disk / "ballast").write_bytes(bytes(180 * 1024))
    with pytest.raises(HeadSteerError) as error:
        load_or_compute_residuals(small_disk, *given)
    one_line(error, str(small_disk), "the disk is full", "free some space")
    assert not list(small_disk.rglob("meta.json"))
    there = shards(small_disk)
    assert there
    load_or_compute_residuals(tmp_path / "whole", *given)
    for path in there:  # what was written is whole
        assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(small_disk)).read_bytes()
    (small_disk / "ballast").unlink()
    load_or_compute_residuals(small_disk, *given)
    assert files(small_disk) == files(tmp_path / "whole")


def test_a_place_that_cannot_be_written(split: Split, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HeadSteerError) as error:
        load_or_compute_residuals(tmp_path / "file", MODEL, PARAMS, CONFIG, split, "train", [1], "cls")
    one_line(error, str(tmp_path / "file"))


class Bucket(BaseHTTPRequestHandler):
    """As much of Google's storage as TensorStore asks for; buckets named gone-... do not answer."""

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

    def asked(self) -> tuple[str, str, dict[str, str]]:
        """Bucket, object, query."""
        url = urlsplit(self.path)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        return bucket, unquote(name.removeprefix("/")), {key: values[0] for key, values in parse_qs(url.query).items()}

    def do_GET(self) -> None:
        bucket, name, query = self.asked()
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
        where = f"bytes {begin}-{end - 1}/{len(content)}"
        return self.reply(206, content[begin:end], x_goog_generation="1", Content_Range=where)

    def do_POST(self) -> None:
        bucket, _, query = self.asked()
        self.objects[f"{bucket}/{query['name']}"] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(200, json.dumps({"name": query["name"], "generation": "1"}).encode())


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, bytes]]:
    """What a server in Google's place holds: TensorStore's own gs:// driver talks to it."""
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
    given = (MODEL, PARAMS, CONFIG, split, "train", [1, 2], "all", BYTES["all"])
    url: Any = Path("gs://shelf/some where/x") if as_path else "gs://shelf/some where/x/"
    found = load_or_compute_residuals(url, *given)
    load_or_compute_residuals(tmp_path, *given)
    assert {key.removeprefix("shelf/some where/x/"): value for key, value in bucket.items()} == files(tmp_path)
    np.testing.assert_array_equal(found[2].images(np.array([70, 3])), whole(found[2])[[70, 3]])
    mark = fingerprint_residuals(CONFIG, PARAMS, split)
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
        lambda: load_or_compute_residuals("gs://gone-away/x", MODEL, PARAMS, CONFIG, split, "train", [1], "cls"),
    ):
        with pytest.raises(HeadSteerError) as error:
            attempt()
        one_line(error, "gs://gone-away/x", "cannot be reached", "check the network")
    with pytest.raises(HeadSteerError) as error:
        open_cache("gs://", "f" * 16, "train", 1, "all")
    one_line(error, "gs://", "bucket")
