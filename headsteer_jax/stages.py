"""The stages of a run: one table of them, what each does, and the loop over them.

Each stage reads what earlier stages saved, and is computed once. On several hosts, all of them run a stage; process 0
decides which stages run, and writes. To add a stage, write its function and add it to STAGES.
"""

import functools
import json
import logging
import time
import uuid
from contextlib import ExitStack
from typing import Any

from etils.epath import Path

from headsteer_jax.analysis.layers import profile_layers
from headsteer_jax.analysis.summary import summarise
from headsteer_jax.analysis.sweep_file import to_dataset, write_sweep
from headsteer_jax.books import (
    PACKAGES,
    Stage,
    finish_record,
    is_done,
    package_versions,
    prepare_stage,
)
from headsteer_jax.config.files import flatten
from headsteer_jax.config.paths import expand_path
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset, fingerprint_dataset
from headsteer_jax.data.sources import check_source, load_dataset
from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.model.passes import make_observer
from headsteer_jax.model.vit import TrainedModel
from headsteer_jax.report.page import write_pages
from headsteer_jax.runtime import hosts, preemption
from headsteer_jax.runtime.files import Workdir, make_directory, read_json, write_json, write_text
from headsteer_jax.runtime.lock import hold_lock
from headsteer_jax.sae.grid import grid_config, grid_ks, grid_members, measure_grid
from headsteer_jax.sae.latents import profile_latents
from headsteer_jax.sae.metrics import measure_autoencoders
from headsteer_jax.sae.residuals import (
    LabelledResiduals,
    ResidualSelection,
    StoredResiduals,
    Tokens,
    load_all,
    load_or_compute_residuals,
)
from headsteer_jax.sae.store import RunData, import_autoencoder, read_autoencoders, write_autoencoders
from headsteer_jax.sae.train import seed_members, train_members
from headsteer_jax.steer.replacement import measure_replacement
from headsteer_jax.steer.strategies import find_strategy
from headsteer_jax.steer.sweep import check_strategies_and_classes, check_validation, gate_jacobian, run_sweep
from headsteer_jax.train.loop import EVALUATION_GATING, PHASES, load_trained, train_model

logger = logging.getLogger(__name__)

INSPECTED_IMAGES = 16  # top images stored for each latent; the page shows config.report.top_images of them


def activation_cache(config: Config, workdir: Workdir) -> str:
    """Return where residuals are kept: machine.activation_cache, or `activations` in the workdir."""
    cache = config.machine.activation_cache
    return expand_path(cache, "config.machine.activation_cache") if cache else str(workdir / "activations")


def load_run_data(config: Config, dataset: Dataset, workdir: Workdir) -> RunData:
    """Load what the stages train and sae made.

    Raises:
      HeadSteerError: a file is missing, damaged or of another config.
    """
    trained = load_trained(config, dataset, workdir / "train")
    autoencoders, x_train, _ = read_autoencoders(workdir, trained)
    return RunData(trained, dataset, autoencoders, x_train)


def train_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Train the gated model, then measure it and the dense ones on the test split."""
    train_model(config, dataset, workdir / "train")
    results: dict[str, Any] = {}
    phases = {"dense": config.train.dense.steps > 0, "gated": True, "dense_control": config.train.dense_control}
    for phase in PHASES:
        if phases[phase]:
            trained = load_trained(config, dataset, workdir / "train", phase)
            observe = make_observer(trained.model, config, EVALUATION_GATING[phase], config.sae_layer)
            observed = observe(trained.params, dataset.test, f"{phase}: test")
            results[phase] = observed.accuracy(dataset.test.labels)
            if phase == "gated":
                results["usage"] = observed.gates.mean(axis=(0, 2)).tolist()
    workdir.write_json("train/test.json", results)


def _load_residuals(
    cache: str | None, trained: TrainedModel, dataset: Dataset, name: str, tokens: Tokens
) -> StoredResiduals:
    """Load or compute the residuals of one split at the autoencoders' layer; without a cache they stay in memory."""
    layer = trained.config.sae_layer
    selection = ResidualSelection(getattr(dataset, name), name, (layer,), tokens)
    return load_or_compute_residuals(cache, trained, selection)[layer]


def sae_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Cache the residuals, train the autoencoders on the training split's, measure them on the test split's."""
    c, cache = config.sae, activation_cache(config, workdir)
    trained = load_trained(config, dataset, workdir / "train")
    train, test = (_load_residuals(cache, trained, dataset, name, c.tokens) for name in ("train", "test"))
    x_train = load_all(train if c.tokens == "cls" else _load_residuals(None, trained, dataset, "train", "cls"))
    labelled = LabelledResiduals(train, c.tokens, x_train, dataset.train.labels, len(dataset.class_names))
    if c.pretrained:
        result = import_autoencoder(config)
    else:
        result = train_members(config, seed_members(c), train, workdir / "sae")
    members = result.autoencoders(c.inference_k)  # the seeds, then the control
    run = RunData(trained, dataset, members.first(c.seeds), x_train)
    replacement = measure_replacement(trained, run.autoencoders, dataset.test)._asdict()
    health = measure_autoencoders(members, c, labelled, test, replacement)
    gate_DH = gate_jacobian(trained, x_train)
    profile = profile_latents(run.autoencoders.member(0), labelled, gate_DH, INSPECTED_IMAGES)
    workdir.write_arrays("sae/inside.npz", profile)
    write_autoencoders(workdir, run, result.curves)
    workdir.write_json("sae/health.json", health)


def grid_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Train autoencoders of several k and learning rates; choose the rate of each k on validation."""
    c, cache = grid_config(config), activation_cache(config, workdir)
    trained = load_trained(config, dataset, workdir / "train")
    sources = {
        name: _load_residuals(cache, trained, dataset, name, c.tokens) for name in ("train", "validation", "test")
    }
    members = grid_members(c, grid_ks(config), config.grid.learning_rates, config.grid.seeds)
    as_trained = config.model_copy(update={"sae": c})
    result = train_members(as_trained, members, sources["train"], workdir / "grid", "grid")
    workdir.write_json("grid/grid.json", measure_grid(config, members, result, sources))


def steer_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Sweep every strategy, class and alpha, and summarise the sweep."""
    trained = load_trained(config, dataset, workdir / "train")
    autoencoders, x_train, curves = read_autoencoders(workdir, trained)
    strategies = {name: find_strategy(name) for name in config.steer.strategies}
    result = run_sweep(RunData(trained, dataset, autoencoders, x_train), strategies)
    numbers, scored = summarise(result, config)
    hosts.on_first_process(lambda: write_sweep(workdir / "sweep.nc", to_dataset(result, scored | curves)))
    workdir.write_json("steer/steering.json", numbers)


def layers_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Measure how steerable each gated layer is."""
    trained = load_trained(config, dataset, workdir / "train")
    numbers = profile_layers(trained, dataset, workdir / "layers", activation_cache(config, workdir))
    workdir.write_json("layers/layers.json", numbers)


def report_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Write summary.json, the figures and the pages."""
    hosts.on_first_process(lambda: _write_report(config, dataset, workdir))


def _write_report(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    write_json(workdir / "summary.json", collect_summary(config, workdir))
    write_pages(config, dataset, workdir)


def collect_summary(config: Config, workdir: Workdir) -> dict[str, Any]:
    """Collect the numbers of every stage that is done: the content of summary.json.

    Raises:
      HeadSteerError: a stage's file is missing or damaged.
    """
    done = [name for name, stage in STAGES.items() if name != "report" and is_done(workdir, stage)]
    records = {name: read_json(workdir / name / "done.json") for name in done}
    test = read_json(workdir / "train/test.json")
    return {
        "dense_accuracy": test.get("dense"),
        "dense_control_accuracy": test.get("dense_control"),
        "layer_usage": test["usage"],
        **read_json(workdir / "steer/steering.json"),
        "grid": read_json(workdir / "grid/grid.json") if "grid" in done else None,
        "by_layer": read_json(workdir / "layers/layers.json") if "layers" in done else None,
        "sae": read_json(workdir / "sae/health.json")
        | {"layer": config.sae_layer, "k": config.sae.inference_k, "latents": config.latents},
        "seconds": {name: record["seconds"] for name, record in records.items()},
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records.values()),
        "versions": package_versions(),
        "config": json.loads(config.model_dump_json()),
    }


TRAINED = ("seed", "data", "model", "gate", "train")  # the sections that the trained model depends on
STEERED_LAYER = tuple(
    f"steer.{field}"
    for field in ("latents", "max_frequency", "mode", "form", "target", "tolerance", "bootstrap", "confidence")
)

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "train", "the vision transformer: dense, then with head gates, then a dense control of the same length",
            train_stage, fields=TRAINED,
        ),
        Stage(
            "sae", "the sparse autoencoders of one layer's residual",
            sae_stage, fields=(*TRAINED, "sae"), reads=("train",),
        ),
        Stage(
            "grid", "autoencoders of several k and learning rates side by side (only if it is named)",
            grid_stage, fields=(*TRAINED, "sae", "grid"), reads=("train",), optional=True, by_default=False,
        ),
        Stage(
            "steer", "every strategy, class and alpha on validation and test; the controls",
            steer_stage, fields=(*TRAINED, "sae", "steer", "report.top_images"), reads=("train", "sae"),
        ),
        Stage(
            "layers", "class steering of every gated layer by itself, and of all at once",
            layers_stage, fields=(*TRAINED, "sae", *STEERED_LAYER, "layers"), reads=("train",), optional=True,
        ),
        Stage(
            "report", "summary.json, figures/, report.html and latents.html",
            report_stage, fields=(*TRAINED, "sae", "grid", "steer", "layers", "report"),
            reads=("train", "sae", "grid", "steer", "layers"),
        ),
    )
}  # fmt: skip


def run_stages(config: Config, workdir: Workdir, names: tuple[str, ...], overwrite: bool) -> None:
    """Run the named stages in order, each unless it is done.

    Raises:
      HeadSteerError: a stage before the first named one is not done; what is there was made from another config and
        `overwrite` is off; another run is writing there; hosts differ; anything that a stage raises.
    """
    settings = {f"config.{path}": json.dumps(value) for path, value in flatten(config).items()}
    versions = package_versions()
    hosts.check_equal(settings | {f"the version of {name}": versions[name] for name in PACKAGES})
    check_source(config.data)
    dataset: Dataset | None = None
    chosen = [stage for name, stage in STAGES.items() if name in names]
    with ExitStack() as held:
        hosts.on_first_process(lambda: bool(make_directory(workdir.path)))
        hosts.on_first_process(lambda: held.enter_context(hold_lock(workdir.path)))
        if hosts.process_count() > 1:
            _check_shared(workdir.path)
        held.enter_context(explain_errors(workdir.path))  # a full disk is one line wherever it shows
        for stage in STAGES.values():
            record = hosts.on_first_process(functools.partial(prepare_stage, config, workdir, stage, chosen, overwrite))
            if record is None:
                continue
            began = time.monotonic()
            if dataset is None:
                dataset = _load_checked_dataset(config)
            stage.run(config, dataset, workdir)
            seconds = time.monotonic() - began
            workdir.write_json(f"{stage.name}/done.json", finish_record(record, seconds))
            logger.info(f"{stage.name}: done in {seconds:.0f} s")
            preemption.raise_if_preempted()


def _load_checked_dataset(config: Config) -> Dataset:
    """Load the dataset on every host, and check that all hosts have the same one and that it suits the config."""
    dataset = hosts.on_every_process(lambda: load_dataset(config.data, config.seed, config.machine.image_memory))
    hosts.check_equal({"the data": hosts.on_every_process(functools.partial(fingerprint_dataset, dataset))})
    check_strategies_and_classes(config, dataset.class_names)
    check_validation(dataset.validation, config, dataset.class_names)
    return dataset


def _check_shared(workdir: Path) -> None:
    """Check that every host sees what process 0 writes; raises HeadSteerError if one does not."""
    token, path = hosts.on_first_process(lambda: uuid.uuid4().hex), workdir / ".shared"
    hosts.on_first_process(lambda: write_text(path, token))

    def check_token() -> None:
        if not path.exists() or path.read_text(encoding="utf-8") != token:
            raise HeadSteerError(
                f"{workdir}: not the same on every host; --workdir must be on a file system that all hosts share, or gs://"
            )

    hosts.on_every_process(check_token)
    hosts.on_first_process(path.unlink)
