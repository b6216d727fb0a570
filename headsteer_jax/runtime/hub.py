"""Runs on the Hugging Face hub: reading one into the cache, and writing one in a single commit.

A repository that holds a run has the file MANIFEST, which lists the run's other files. Only these are downloaded, and
only these are ever deleted. The package huggingface_hub is imported when it is first needed.
"""

import glob
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, NamedTuple

from headsteer_jax.errors import HeadSteerError, explain_errors

SCHEME = "hf:"
ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^\s@]+))?", re.ASCII)
MANIFEST = "headsteer.json"
FORMAT = 1  # of the manifest and of what it lists: raise it when older programs cannot read them
EMPTY_FILES = (".gitattributes",)  # what the hub itself puts into a new repository
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # of huggingface_hub's versions
LOG_IN = "log in with hf auth login, or set HF_TOKEN"


class Address(NamedTuple):
    """The address of a run on the hub."""

    repository: str  # owner/name
    revision: str | None = None  # a branch, tag or commit; None: the newest commit

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")

    @property
    def name(self) -> str:
        """Return the repository's name, without its owner."""
        return self.repository.partition("/")[2]


class Repository(NamedTuple):
    """A repository as it is on the hub, before a run is written there."""

    commit: str
    private: bool
    files: frozenset[str]
    listed: frozenset[str] | None  # the files that its manifest lists; None: it has none, or a damaged one

    @property
    def is_replaceable(self) -> bool:
        """Say whether it holds a run or nothing at all."""
        return self.listed is not None or self.files <= set(EMPTY_FILES)

    @property
    def foreign(self) -> frozenset[str]:
        """The files that no push has written."""
        return self.files - (self.listed or frozenset()) - {*EMPTY_FILES, MANIFEST}


def is_on_hub(location: str) -> bool:
    """Say whether a location is meant as a hub's."""
    return location.startswith(SCHEME)


def parse_address(location: str, name: str) -> Address:
    """Parse `hf://owner/name` or `hf://owner/name@revision`.

    Args:
      location: the text.
      name: what it was given as, such as RUN, for the error.

    Raises:
      HeadSteerError: it has another form.
    """
    match = ADDRESS.fullmatch(location)
    if not match:
        raise HeadSteerError(f"{name}={location}: must be hf://owner/name, or hf://owner/name@revision to read a run")
    return Address(match["repository"], match["revision"])


def import_hub(address: Address) -> ModuleType:
    """Import huggingface_hub.

    Raises:
      HeadSteerError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise HeadSteerError(f"{address}: needs the extra hub: pip install 'headsteer-jax[hub]'") from None
    return huggingface_hub


def download_run(address: Address) -> Path:
    """Download a run into the hub's cache, as far as it is not there, and return its directory.

    Without a network, what is in the cache is used.

    Raises:
      HeadSteerError: huggingface_hub is not installed; the repository does not exist, may not be read or holds no run;
        or the hub cannot be reached and the run is not in the cache.
    """
    hub = import_hub(address)
    with explain_errors(address), _explain_hub_errors(address, hub):
        manifest = Path(hub.hf_hub_download(address.repository, MANIFEST, revision=address.revision))
        files, commit = _read_manifest(manifest, address), manifest.parent.name
        if files is None:
            raise HeadSteerError(f"{address}: its {MANIFEST} is damaged; push the run again with --overwrite")
        patterns = [glob.escape(file) for file in (MANIFEST, *files)]
        directory = Path(hub.snapshot_download(address.repository, revision=commit, allow_patterns=patterns))
    if missing := [file for file in files if not (directory / file).exists()]:
        raise HeadSteerError(
            f"{address}: the file {missing[0]} is not in the cache or not on the hub; check the network, or push the "
            "run again"
        )
    return directory


def _read_manifest(path: Path, address: Address) -> list[str] | None:
    """Read which files a repository's run has; None if the manifest is damaged.

    Raises:
      HeadSteerError: a newer program wrote it.
    """
    try:
        manifest = json.loads(path.read_bytes())
        version, files = int(manifest["format"]), [str(PurePosixPath(file)) for file in manifest["files"]]
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    if version > FORMAT:
        raise HeadSteerError(
            f"{address}: it has format {version}, but this program reads format {FORMAT}; upgrade headsteer-jax"
        )
    return files


def check_token(address: Address) -> None:
    """Check that there is a token, and that the hub accepts it.

    Raises:
      HeadSteerError: huggingface_hub is not installed, there is no token, or the hub refuses it or cannot be reached.
    """
    hub = import_hub(address)
    if hub.get_token() is None:
        raise HeadSteerError(f"{address}: there is no token of the hub on this machine; {LOG_IN}")
    with explain_errors(address), _explain_hub_errors(address, hub):
        hub.HfApi().whoami()


def find_repository(address: Address) -> Repository | None:
    """Look at a repository, and return None if there is none.

    Raises:
      HeadSteerError: it may not be read, or the hub cannot be reached.
    """
    hub = import_hub(address)
    with explain_errors(address), _explain_hub_errors(address, hub):
        try:
            info = hub.HfApi().repo_info(address.repository)
        except hub.errors.GatedRepoError:
            raise
        except hub.errors.RepositoryNotFoundError:
            return None
        files = frozenset(sibling.rfilename for sibling in info.siblings or ())
        listed = None
        if MANIFEST in files:
            listed = _read_manifest(Path(hub.hf_hub_download(address.repository, MANIFEST, revision=info.sha)), address)
        return Repository(info.sha, bool(info.private), files, None if listed is None else frozenset(listed))


def upload_run(
    address: Address, repository: Repository | None, files: Mapping[str, str | bytes], message: str, private: bool
) -> str:
    """Write a run into a repository in one commit, which also deletes files that only an earlier run there had.

    Args:
      repository: the repository as it is; None: it is created.
      files: for each path in the repository a local file or the content, without the manifest.
      message: of the commit.
      private: create the repository as a private one.

    Returns:
      The address of the repository for a browser.

    Raises:
      HeadSteerError: the hub refuses it or cannot be reached; the repository is then as it was, or new and empty.
    """
    hub = import_hub(address)
    manifest = json.dumps({"format": FORMAT, "files": sorted(files)}, indent=2) + "\n"
    contents = {**files, MANIFEST: manifest.encode()}
    with explain_errors(address), _explain_hub_errors(address, hub):
        api = hub.HfApi()
        if repository is None:
            _create(address, api, hub, private)
        operations: list[Any] = [hub.CommitOperationAdd(path, content) for path, content in contents.items()]
        if repository is not None and repository.listed:
            outdated = (repository.listed & repository.files) - set(contents)
            operations += [hub.CommitOperationDelete(path, is_folder=False) for path in sorted(outdated)]
        parent = repository.commit if repository else None
        api.create_commit(address.repository, operations, commit_message=message, parent_commit=parent)
        return f"{api.endpoint}/{address.repository}"


def _create(address: Address, api: Any, hub: ModuleType, private: bool) -> None:
    """Create a repository; without `private` it is what the owner's settings say, which is public for most."""
    try:
        api.create_repo(address.repository, private=private or None)
    except hub.errors.HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) != 409:
            raise
        raise HeadSteerError(
            f"{address}: exists, but your token may not read it; choose another name, or use a token that may"
        ) from None


@contextmanager
def _explain_hub_errors(address: Address, hub: ModuleType) -> Iterator[None]:
    """Turn the hub's errors and the network's into one line; every other error is raised as it is."""
    try:
        yield
    except HeadSteerError:
        raise
    except Exception as raised:
        # an upload in a thread of huggingface_hub's wraps its error
        error = raised.__cause__ if type(raised) is RuntimeError and raised.__cause__ else raised
        if line := _explain(error, hub):
            raise HeadSteerError(f"{address}: {line}") from None
        raise


def _explain(error: BaseException, hub: ModuleType) -> str:
    """Say what an error of the hub or of the network means, and what to do; an empty string for other errors."""
    errors, reason = hub.errors, " ".join(str(error).split())[:160]
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = [
        (errors.OfflineModeIsEnabled, "the hub is switched off (HF_HUB_OFFLINE); unset this variable"),
        (
            errors.LocalEntryNotFoundError,
            "is not in the hub's cache, and the hub cannot be reached; check the network, or unset HF_HUB_OFFLINE if "
            "it is set",
        ),
        (errors.GatedRepoError, f"access must be granted; ask for it on the repository's page, then {LOG_IN}"),
        (
            errors.RepositoryNotFoundError,
            f"there is no such repository, or it is private; check its name, or {LOG_IN}",
        ),
        (errors.RevisionNotFoundError, "the repository has no such revision; name a branch, a tag or a commit"),
        (errors.EntryNotFoundError, f"the repository has no {MANIFEST}, so headsteer push did not write it"),
        (errors.HFValidationError, f"is not a name that the hub accepts ({reason}); choose another"),
    ]
    if known := next((line for kind, line in lines if isinstance(error, kind)), ""):
        return known
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        if status == 401:
            return f"the hub refuses your token; {LOG_IN}"
        if status == 403:
            return "your token may not do this there; use one with the right to, or another owner"
        if status in (409, 412):
            return "the repository changed meanwhile; run the same command again"
        return f"the hub answers with an error ({status}: {reason}); try again later"
    library = type(error).__module__.partition(".")[0]
    if library in HTTP_LIBRARIES or isinstance(error, ConnectionError | TimeoutError):
        return f"the hub cannot be reached ({reason or type(error).__name__}); check the network and HF_ENDPOINT"
    return ""
