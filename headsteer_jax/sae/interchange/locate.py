"""Finding an autoencoder's files, and naming what a path holds instead."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from headsteer_jax.errors import HeadSteerError
from headsteer_jax.sae.interchange.files import find_transformer_tensor

# the files in a library's directory: one of each group must exist; overcomplete has single files
FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "saelens": (("cfg.json",), ("sae_weights.safetensors",)),
    "sparsify": (("cfg.json",), ("sae.safetensors",)),
    "dictionary_learning": (("config.json",), ("ae.safetensors", "ae.pt")),
}
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SHOWN = 3  # names of a list, at most


def find_files(library: str, location: str) -> list[Path]:
    """Return an autoencoder's files in a fixed order; an empty list if one of them is missing."""
    path = _find_path(library, location)
    if library not in FILES:
        return [path] if path.is_file() else []
    files = [next((path / name for name in names if (path / name).is_file()), None) for names in FILES[library]]
    return [file for file in files if file] if all(files) else []


def locate_autoencoder(library: str, location: str) -> Path:
    """Return the path to import: a directory, or a file of overcomplete. `~` stands for the home directory.

    A file within a library's directory stands for the directory.

    Raises:
      HeadSteerError: the path does not exist, or it holds something else, which the line names.
    """
    culprit = f"config.sae.pretrained = {library}:{location}"
    if "://" in location:
        raise HeadSteerError(f"{culprit}: only local files are read; download it first, and name its directory")
    path = _find_path(library, location)
    if not path.exists():
        raise HeadSteerError(f"{culprit}: {path}: no such file or directory; choose an autoencoder that is there")
    if library in FILES and find_files(library, location):
        return path
    if recognised := recognise_library(path):
        other, place = recognised
        if other != library:
            raise HeadSteerError(f"{culprit}: it is an autoencoder of {other}; pass {other}:{place}")
    elif path.is_dir() and (inside := _find_autoencoders(path)):
        form = f"{inside[0][0]}:{inside[0][1]}"
        if len(inside) == 1:
            raise HeadSteerError(f"{culprit}: the autoencoder is inside; pass {form}")
        names = ", ".join(child.name for _, child in inside[:SHOWN]) + (", ..." if len(inside) > SHOWN else "")
        raise HeadSteerError(f"{culprit}: it holds {len(inside)} autoencoders ({names}); choose one, such as {form}")
    elif description := _describe_foreign(path):
        raise HeadSteerError(f"{culprit}: {description}")
    elif path.is_file() and library in FILES:
        files = " and ".join(" or ".join(names) for names in FILES[library])
        raise HeadSteerError(f"{culprit}: it is a file; name the directory that holds {files}")
    return path  # the importer says what is missing


def recognise_library(path: Path) -> tuple[str, Path] | None:
    """Return the library whose autoencoder a path holds, and the path to pass; None if there is none."""
    if path.is_file() and _has_overcomplete_metadata(path):
        return "overcomplete", path
    return next(((name, _find_path(name, str(path))) for name in FILES if find_files(name, str(path))), None)


def _find_path(library: str, location: str) -> Path:
    path = Path(location).expanduser()
    names = {name for group in FILES.get(library, ()) for name in group}
    return path.parent if path.name in names and path.is_file() else path


def _find_autoencoders(directory: Path) -> list[tuple[str, Path]]:
    """Return the autoencoders directly within a directory, each with its library."""
    return [recognised for child in sorted(directory.iterdir()) if (recognised := recognise_library(child))]


def _describe_foreign(path: Path) -> str:
    """Say what a path holds instead of an autoencoder of these libraries; an empty string if that is not known."""
    if path.name == "autoencoders.npz" or (path / "autoencoders.npz").is_file() or (path / "sae").is_dir():
        return "it is a run of HeadSteer; export its autoencoders first: headsteer export RUN saelens:DIR"
    if path.is_file() and path.suffix in TORCH_SUFFIXES:
        return (
            f"it is a {path.suffix} file of PyTorch; save the autoencoder's state_dict as a .safetensors file with "
            "metadata that name its class, as the how-to page on autoencoders says"
        )
    if path.is_file() and (tensor := find_transformer_tensor(_read_names(path))):
        return (
            f"it holds a transformer (tensor {tensor!r}), not an autoencoder; config.model.pretrained names a backbone"
        )
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir())
        if {"model.safetensors", "pytorch_model.bin"} & set(names):
            return "it holds a model, not an autoencoder; config.model.pretrained names a backbone"
        if "params.npz" in names:
            return "it is an autoencoder of Gemma Scope; load it with SAELens, save it there, and pass saelens:DIR"
        if pickles := [name for name in names if name.endswith(TORCH_SUFFIXES) and name != "ae.pt"]:
            return f"its weights are a file of PyTorch ({pickles[0]}); save them as .safetensors"
    return ""


def _has_overcomplete_metadata(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="np") as file:
            return "overcomplete" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _read_names(path: Path) -> list[str]:
    """Return the names of a .safetensors file's tensors; an empty list for any other file."""
    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []
