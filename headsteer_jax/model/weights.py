"""Weight files: finding them, choosing one of several sets of weights, and reading tensors as NumPy arrays.

Nothing in a file is executed: .safetensors and .npz hold no pickle, and torch's files go through its weights-only
loading. Apart from tensors, only a training script's arguments are kept; see model/file_config.py.
"""

import argparse
import hashlib
import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file

from headsteer_jax.errors import HeadSteerError

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)
INDEX = ".index.json"  # the end of the name of a file that lists shards
HUB_FILES = tuple(f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX))
DESCRIPTIONS = ("config.json", "preprocessor_config.json")  # what publishers put beside the weights
TRAINERS_FILES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")  # hold no weights
SHARD = re.compile(r"-\d+-of-(\d+)\.")
# If a file has several sets of weights, the first of these is taken; averaged ones come first, as in timm.
SETS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "target_encoder", "state_dict", "model",
    "model_state_dict", "module", "encoder", "backbone", "net", "weights", "student",
)  # fmt: skip
ARGUMENTS = ("args", "hyper_parameters", "config", "model_args", "cfg", "hparams")  # of the training scripts


class Weights(NamedTuple):
    """The content of a weight file."""

    path: Path
    tensors: dict[str, np.ndarray]  # float32, by their names in the file
    choice: str = ""  # which of several sets of weights these are
    arguments: Mapping[str, Any] = {}  # the arguments of the script that trained them, if the file has them


def locate_weights(location: str) -> Path:
    """Return the path of a weight file or directory; files of the Hugging Face hub are downloaded once into its cache.

    Args:
      location: a path, hf://owner/model (its model.safetensors or pytorch_model.bin, whole or in shards), or
        hf://owner/model/FILE. The model's description, config.json, is downloaded too.

    Raises:
      HeadSteerError: huggingface_hub is not installed, or the file cannot be downloaded.
    """
    if not location.startswith("hf://"):
        return _expand(location)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise HeadSteerError(
            f"config.model.pretrained = {location}: needs the extra hub: pip install 'headsteer-jax[hub]'"
        ) from None
    owner, _, model_and_file = location.removeprefix("hf://").partition("/")
    model, _, file = model_and_file.partition("/")

    def download(name: str, *, needed: bool = True) -> Path | None:
        """Download a file of the model, or return None if the model has none of this name."""
        try:
            return Path(hf_hub_download(f"{owner}/{model}", name))
        except Exception as error:
            if not needed or type(error).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
                return None
            reason = str(error).strip().partition("\n")[0]
            raise HeadSteerError(
                f"config.model.pretrained = {location}: cannot be downloaded ({type(error).__name__}: {reason}); "
                "check the name and the network, or name a local file"
            ) from None

    names = (file,) if file else HUB_FILES
    name, path = next(((name, path) for name in names if (path := download(name)) is not None), ("", None))
    if path is None:
        raise HeadSteerError(
            f"config.model.pretrained = {location}: the model has no file {' or '.join(names)}; name its weight file: "
            f"hf://{owner}/{model}/FILE"
        )
    folder = PurePosixPath(name).parent
    for shard in _shard_names(path) if name.endswith(INDEX) else ():
        download(str(folder / shard))
    for description in DESCRIPTIONS:
        download(str(folder / description), needed=False)
    return path


def _expand(location: str) -> Path:
    """Replace a leading ~; keep ~user if there is no such user."""
    try:
        return Path(location).expanduser()
    except RuntimeError:
        return Path(location)


def fingerprint_weights(location: str) -> str:
    """Return the SHA-256 of a local weight file's content, of all shards in their order; nothing is downloaded.

    Returns:
      The digest in hexadecimal digits, or "" if the location is not a local file, or a directory that holds one.
    """
    if not location or location.startswith("hf://"):
        return ""
    digest = hashlib.sha256()
    try:
        for path in _find_files(_expand(location)):
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    except (HeadSteerError, OSError):
        return ""
    return digest.hexdigest()


def read_weights(path: Path) -> Weights:
    """Read a weight file's tensors as float32, by their names in the file.

    Args:
      path: a file, the index of a sharded one, or a directory that holds one of these.

    Raises:
      HeadSteerError: there is no such file, several are there, or one is truncated or not of the type that its suffix
        says.
    """
    try:
        files = _find_files(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise HeadSteerError(f"config.model.pretrained = {path}: cannot be read ({reason}); check the path") from None
    parts = [_read_file(file) for file in files]
    weights = parts[0]._replace(path=path if len(files) > 1 else files[0])
    for part in parts[1:]:
        weights.tensors.update(part.tensors)
    return weights


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a weight file that holds nothing else; see `read_weights`.

    Raises:
      HeadSteerError: as `read_weights`, or a tensor holds NaN.
    """
    tensors = read_weights(path).tensors
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors


def check_finite(path: Path, name: str, tensor: np.ndarray) -> None:
    """Check that a tensor of a file holds neither NaN nor infinity.

    Raises:
      HeadSteerError: it does.
    """
    if not np.isfinite(tensor).all():
        raise HeadSteerError(f"{path}: tensor {name!r} holds NaN or infinity; download it again")


def _find_files(path: Path) -> list[Path]:
    """Find the files that hold the weights: one, or the shards in their order.

    Raises:
      HeadSteerError: there is none, it is of another kind, or a directory holds several.
    """
    if path.is_dir():
        path = _find_in_directory(path)
    if not path.is_file():
        raise HeadSteerError(f"config.model.pretrained = {path}: no such file; correct the path")
    if path.name.endswith(INDEX):
        shards = [path.with_name(name) for name in _shard_names(path)]
        for shard in shards:
            if not shard.is_file():
                raise HeadSteerError(f"{path}: its shard {shard.name} is missing; download it too")
        return shards
    if path.suffix not in SUFFIXES:
        raise HeadSteerError(f"config.model.pretrained = {path}: must be a file that ends in {', '.join(SUFFIXES)}")
    if part := SHARD.search(path.name):
        raise HeadSteerError(
            f"config.model.pretrained = {path}: is one of {int(part[1])} shards; name their directory or their "
            f"{INDEX} file"
        )
    return [path]


def _find_in_directory(directory: Path) -> Path:
    """Find a directory's weight file: by its usual name, or because it is the only one."""
    usual = next((directory / name for name in HUB_FILES if (directory / name).is_file()), None)
    if usual:
        return usual
    files = sorted(
        path
        for path in directory.iterdir()
        if (path.suffix in SUFFIXES or path.name.endswith(INDEX))
        and not path.name.startswith((".", *TRAINERS_FILES))
        and not SHARD.search(path.name)
    )
    if len(files) != 1:
        names = ", ".join(path.name for path in files[:5]) + (", ..." if len(files) > 5 else "")
        has = f"holds {len(files)} weight files ({names}); name one of them" if files else "holds no weight file"
        raise HeadSteerError(f"config.model.pretrained = {directory}: the directory {has}")
    return files[0]


def _shard_names(index: Path) -> list[str]:
    """Return the names of the shards that an index lists, in their order."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        names = []
    if not names or any(Path(name).name != name for name in names):
        raise HeadSteerError(f"{index}: lists no shards under 'weight_map'; download it again")
    return names


def _read_file(path: Path) -> Weights:
    """Read one file, which has one of the SUFFIXES."""
    readers: dict[str, Callable[[Path], Weights]] = {
        ".safetensors": _read_safetensors,
        ".npz": _read_npz,
    }
    try:
        content = readers.get(path.suffix, _read_torch)(path)
        tensors = {name: np.asarray(tensor, np.float32) for name, tensor in content.tensors.items()}
    except HeadSteerError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, EOFError, RuntimeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise HeadSteerError(f"{path}: truncated or not a {path.suffix} file ({reason}); download it again") from None
    return content._replace(tensors=tensors)


def _read_safetensors(path: Path) -> Weights:
    return Weights(path, {name: np.asarray(tensor, np.float32) for name, tensor in load_file(path).items()})


def _read_npz(path: Path) -> Weights:
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # np.load would read other formats too
            raise ValueError("not a zip archive")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile and zlib have exceptions of their own
        raise ValueError(str(error)) from None
    for name, array in arrays.items():
        if array.dtype.kind == "V":  # np.savez writes the types of ml_dtypes as untyped bytes
            if array.dtype.itemsize != 2:
                raise HeadSteerError(
                    f"{path}: tensor {name!r} has the unknown type {array.dtype.str}; save it as float32 or bfloat16"
                )
            arrays[name] = array.view(ml_dtypes.bfloat16)
    return Weights(path, arrays)


def _read_torch(path: Path) -> Weights:
    try:
        import torch
    except ImportError:
        raise HeadSteerError(
            f"{path}: a {path.suffix} file needs the extra torch: pip install 'headsteer-jax[torch]'"
        ) from None
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # training scripts save their arguments, plain data
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        pickled = re.search(r"GLOBAL ([\w.]+)", str(error))
        example = f" ({pickled[1]})" if pickled else ""
        raise HeadSteerError(
            f"{path}: holds more than tensors and plain data{example}, and nothing else is loaded; save only its "
            "state_dict, or use a .safetensors file"
        ) from None

    def is_set(value: Any) -> bool:
        """Say whether a value is a state_dict."""
        return isinstance(value, dict) and any(
            isinstance(name, str) and isinstance(entry, torch.Tensor) for name, entry in value.items()
        )

    arguments = _read_arguments(content)
    state_dict, choice = _choose_set(content, is_set)
    if state_dict is None:
        raise HeadSteerError(f"{path}: it holds no state_dict, a dict of tensors; save one with torch.save")
    tensors = {
        str(name): tensor.detach().float().numpy()
        for name, tensor in state_dict.items()
        if isinstance(tensor, torch.Tensor)
    }
    return Weights(path, tensors, choice, arguments)


def _choose_set(content: Any, is_set: Callable[[Any], bool]) -> tuple[dict[Any, Any] | None, str]:
    """Choose one of the sets of weights in a torch file's content.

    Returns:
      The state_dict, or None if there is none, and the choice in words, "" if there was nothing to choose.
    """
    if not isinstance(content, dict) or is_set(content):
        return content if is_set(content) else None, ""
    names = [name for name in SETS if name in content] + [name for name in content if name not in SETS]
    sets = {}
    for name in names:
        state_dict, choice = _choose_set(content[name], is_set) if name in SETS else (content[name], "")
        if is_set(state_dict):
            sets[name] = state_dict, choice
    if not sets:
        return None, ""
    first = next(iter(sets))
    state_dict, choice = sets[first]
    return state_dict, f"{first} of {', '.join(map(str, sets))}" if len(sets) > 1 else choice


def _read_arguments(content: Any) -> dict[str, Any]:
    """Collect the arguments of the training script from a torch file's content."""
    arguments: dict[str, Any] = {}
    if isinstance(content, dict):
        for name in ARGUMENTS:
            value = content.get(name)
            value = vars(value) if isinstance(value, argparse.Namespace) else value
            arguments |= value if isinstance(value, dict) else {}
    return arguments
