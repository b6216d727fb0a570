"""Computing a stage again beside its old results, which are deleted only when the new ones are complete.

The new results of the stage NAME are written to `.NAME.new` in the workdir. They are complete once that directory has
done.json, which lists what the stage writes outside of its directory (`products`); `replace_stage` then replaces the
old results with them. If the process dies in between, the next run finishes the replacement: at every moment the old
results or the new ones are complete on the disk. Entries of the old directory that HeadSteer did not make are never
deleted: they move into the new directory.
"""

import fnmatch
import glob
import os
from collections.abc import Sequence

from etils.epath import Path

from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.runtime.files import Workdir, is_in_bucket, read_json

MARKERS = ("started.json", "done.json")  # the files that make a directory a stage's


def locate_new(workdir: Workdir, name: str) -> Path:
    """Return the directory to which a stage's new results are written, beside the old ones."""
    return workdir.path / f".{name}.new"


def locate_removed(workdir: Workdir, name: str) -> Path:
    """Return where a stage's old results are while they are deleted."""
    return workdir.path / f".{name}.removed"


def locate_complete(workdir: Workdir, name: str) -> Path:
    """Return the directory that holds a stage's newest complete results, which may still be beside the old ones."""
    new = locate_new(workdir, name)
    return new if (new / "done.json").exists() else workdir.path / name


def is_stage_directory(directory: Path) -> bool:
    """Say whether HeadSteer made a directory for a stage: it then has one of the MARKERS."""
    return any((directory / marker).exists() for marker in MARKERS)


def redirect_stage(workdir: Workdir, name: str, products: Sequence[str]) -> Workdir:
    """Return a workdir that redirects a stage's directory, and its products outside of it, to the new results."""
    new = locate_new(workdir, name).name
    return Workdir(workdir.path, {name: new} | {first: f"{new}/{first}" for first in first_parts(products)})


def first_parts(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the first parts of paths such as `figures/front.png`, each once."""
    return tuple(dict.fromkeys(path.partition("/")[0] for path in paths))


def replace_stage(workdir: Workdir, name: str, entries: Sequence[str], products: Sequence[str]) -> None:
    """Replace a stage's old results with complete new ones; do nothing if there are none.

    Args:
      entries: patterns of the names that the stage writes in its directory, in addition to those of the new results;
        other names are the user's.
      products: the files that the stage may write in the workdir itself; the new ones are in the new directory. Old
        ones without a new version are deleted.

    Raises:
      HeadSteerError: the disk is full or not writable; the same command then continues.
    """
    new, old = locate_new(workdir, name), workdir.path / name
    removed = locate_removed(workdir, name)
    with explain_errors(old):
        complete = locate_complete(workdir, name)
        if complete.exists():
            entries = (*entries, *(glob.escape(entry.name) for entry in complete.iterdir()))
        if complete != new:
            if removed.exists():  # the last step of a replacement was interrupted
                remove_stage(removed, entries)
            return
        if is_in_bucket(old):
            _replace_in_bucket(new, old, entries, products)
            return
        new_products = _list_products(new, products)
        for product in products:
            if product not in new_products:
                (workdir.path / product).unlink(missing_ok=True)
            elif (new / product).exists():  # otherwise an interrupted replacement has moved it
                (workdir.path / product).parent.mkdir(exist_ok=True)
                os.replace(new / product, workdir.path / product)
        for directory in {(new / product).parent for product in products} - {new}:
            if directory.exists() and not any(directory.iterdir()):
                directory.rmdir()
        if _is_link(old):
            old.unlink()  # what it leads to is left alone
        elif old.exists():
            if removed.exists():
                remove_stage(removed, entries)
            for entry in _foreign_entries(old, entries):
                entry.rename(new / entry.name)
            old.rename(removed)
        new.rename(old)
        if removed.exists():
            remove_stage(removed, entries)


def _list_products(new: Path, products: Sequence[str]) -> list[str]:
    """List the files outside of its directory that a stage has written again, as its done.json lists them."""
    record = read_json(new / "done.json")
    if not isinstance(record, dict) or not isinstance(record.get("products"), list):
        raise HeadSteerError(f"{new / 'done.json'}: damaged (it lists no products); delete {new}")
    return [product for product in products if product in record["products"]]


def _replace_in_bucket(new: Path, old: Path, entries: Sequence[str], products: Sequence[str]) -> None:
    """Copy a stage's new results over the old ones, done.json last, then delete them: a bucket has no renames."""
    remove_stage(old, entries)
    outside = first_parts(products)
    for product in set(products) - set(_list_products(new, products)):
        (old.parent / product).unlink(missing_ok=True)
    for entry in sorted(new.iterdir(), key=lambda entry: entry.name == "done.json"):
        _copy_objects(entry, (old.parent if entry.name in outside else old) / entry.name)
    remove_stage(new, (*entries, *outside))


def _copy_objects(source: Path, target: Path) -> None:
    """Copy an object of a bucket, or all objects under a prefix."""
    if source.is_dir():
        for entry in source.iterdir():
            _copy_objects(entry, target / entry.name)
    else:
        target.write_bytes(source.read_bytes())


def discard_new(workdir: Workdir, name: str, entries: Sequence[str], products: Sequence[str]) -> None:
    """Delete the unfinished new results of a stage, for instance because they belong to an earlier config."""
    new = locate_new(workdir, name)
    if is_stage_directory(new):
        remove_stage(new, (*entries, *first_parts(products)))


def remove_stage(directory: Path, entries: Sequence[str]) -> None:
    """Delete a stage's directory, except entries that HeadSteer did not make.

    done.json goes first, and started.json, the marker, goes last: half-deleted results are never taken for complete
    ones, and still belong to a stage.

    Args:
      directory: the stage's.
      entries: patterns of the names that the stage writes.

    Raises:
      HeadSteerError: HeadSteer did not make the directory.
    """
    present = [*directory.iterdir()] if directory.exists() else []
    if present and not is_stage_directory(directory):
        raise HeadSteerError(f"{directory}: is in the way, and HeadSteer did not make it; move it elsewhere")
    foreign = {entry.name for entry in _foreign_entries(directory, entries)} if present else set()
    (directory / "done.json").unlink(missing_ok=True)
    for entry in present:
        if entry.name in {*MARKERS, *foreign}:
            continue
        if entry.is_dir() and not _is_link(entry):
            entry.rmtree()
        else:
            entry.unlink(missing_ok=True)
    (directory / "started.json").unlink(missing_ok=True)
    if not foreign and directory.exists() and not is_in_bucket(directory):
        directory.rmdir()


def _foreign_entries(directory: Path, entries: Sequence[str]) -> list[Path]:
    """List the entries of a stage's directory that match no pattern of what the stage writes."""
    patterns = (*MARKERS, *entries, *(f".{entry}.part" for entry in (*MARKERS, *entries)))
    return [
        entry for entry in directory.iterdir()
        if not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns)
    ]  # fmt: skip


def _is_link(path: Path) -> bool:
    return not is_in_bucket(path) and os.path.islink(path)
