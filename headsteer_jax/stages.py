"""The stages of a run: one table of them, what each does, and the loop over them.

Each stage reads what earlier stages saved, and is computed once. On several hosts, all of them run a stage; process 0
decides which stages run, and writes. To add a stage, write its function and add it to STAGES.
"""

import json
import logging
import time
import uuid
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from etils.epath import Path

from headsteer_jax.analysis.front import train_front
from headsteer_jax.analysis.headlines import list_headlines
from headsteer_jax.analysis.layers import profile_layers
from headsteer_jax.analysis.patches import claim_own_patches, summarise_patches
from headsteer_jax.analysis.summary import summarise
from headsteer_jax.analysis.sweep_file import to_dataset, write_sweep
from headsteer_jax.books import (
    PACKAGES,
    Inputs,
    Plan,
    Stage,
    begin_stage,
    explain_staleness,
    finish_stage,
    is_done,
    package_versions,
    plan_stages,
    read_inputs,
    read_record,
    stage_workdir,
    write_config,
)
from headsteer_jax.config.files import flatten
from headsteer_jax.config.paths import expand_path
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset, hash_data
from headsteer_jax.data.digits import find_own_patches
from headsteer_jax.data.sources import check_source, load_dataset
from headsteer_jax.data.views import make_view
from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.model.compute import ImageGates, count_image_macs, measure_compute, pack_gates, unpack_gates
from headsteer_jax.model.passes import make_observer
from headsteer_jax.model.vit import TrainedModel
from headsteer_jax.preflight import check_dataset, check_plans, check_workdir
from headsteer_jax.report.explorer import TestReadings, read_test_images
from headsteer_jax.report.figures import FIGURE_FILES
from headsteer_jax.report.page import PAGES, write_pages
from headsteer_jax.runtime import hosts, preemption
from headsteer_jax.runtime.files import Workdir, make_directory, read_arrays, read_json, write_json, write_text
from headsteer_jax.runtime.lock import hold_lock
from headsteer_jax.runtime.staging import replace_stage
from headsteer_jax.sae.grid import grid_config, grid_ks, grid_members, measure_grid
from headsteer_jax.sae.imported import describe_provenance, import_autoencoder, to_members
from headsteer_jax.sae.latents import INSPECTED_IMAGES, profile_latents
from headsteer_jax.sae.metrics import measure_autoencoders
from headsteer_jax.sae.residuals import (
    JoinedResiduals,
    LabelledResiduals,
    ResidualSelection,
    StoredResiduals,
    Tokens,
    load_all,
    load_or_compute_residuals,
)
from headsteer_jax.sae.store import RunData, read_autoencoders, write_autoencoders
from headsteer_jax.sae.train import seed_members, train_members
from headsteer_jax.steer.catalogue import find_strategy
from headsteer_jax.steer.patches import observe_steered_patches, steers_patches, sweep_patches
from headsteer_jax.steer.replacement import measure_replacement
from headsteer_jax.steer.sweep import gate_jacobian, run_sweep, select_classes
from headsteer_jax.train.dense_from import take_over_dense
from headsteer_jax.train.loop import EVALUATION_GATING, PHASES, list_phases, load_trained, train_model

logger = logging.getLogger(__name__)


def activation_cache(config: Config, workdir: Workdir) -> str:
    """Return where residuals are kept: machine.activation_cache, or `activations` in the workdir."""
    cache = config.machine.activation_cache
    return expand_path(cache, "config.machine.activation_cache") if cache else str(workdir / "activations")


def load_run_data(config: Config, dataset: Dataset, workdir: Workdir) -> RunData:
    """Load what the stages train and sae made.

    Raises:
      HeadSteerError: a file is missing, damaged or of another config.
    """
    trained = load_trained(config, len(dataset.class_names), workdir / "train")
    autoencoders, x_train, _ = read_autoencoders(workdir, trained)
    return RunData(trained, dataset, autoencoders, x_train)


def train_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Train the gated model, then measure it and the dense ones on the test split."""
    if config.train.dense_from:
        take_over_dense(config, dataset, workdir / "train")
    train_model(config, dataset, workdir / "train")
    results: dict[str, Any] = {}
    for phase in list_phases(config):
        trained = load_trained(config, len(dataset.class_names), workdir / "train", phase)
        observe = make_observer(trained.model, config, EVALUATION_GATING[phase], config.sae_layer)
        observed = observe(trained.params, dataset.test, f"{phase}: test")
        results[phase] = observed.accuracy(dataset.test.labels)
        if phase == "gated":
            if "heads" in observed.gates:
                results["usage"] = observed.gates["heads"].mean(axis=(0, 2)).tolist()
            results["compute"] = measure_compute(config, len(dataset.class_names), observed.gates)
            macs = count_image_macs(config, len(dataset.class_names), observed.gates)
            workdir.write_arrays("train/gates.npz", pack_gates(ImageGates(observed.gates, macs, observed.prediction)))
    workdir.write_json("train/test.json", results)


def load_residuals(
    cache: str | None, trained: TrainedModel, dataset: Dataset, name: str, tokens: Tokens, may_write: bool = True
) -> StoredResiduals:
    """Load or compute the residuals of one split at the autoencoders' layer; without a cache they stay in memory."""
    layer = trained.config.sae_layer
    selection = ResidualSelection(getattr(dataset, name), name, (layer,), tokens)
    return load_or_compute_residuals(cache, trained, selection, may_write=may_write)[layer]


def load_training_residuals(
    cache: str, trained: TrainedModel, dataset: Dataset, tokens: Tokens, plain: StoredResiduals
) -> JoinedResiduals:
    """Load or compute what autoencoders are trained on: a part for each view of the training split.

    Args:
      plain: the training split's own residuals, the first view.
    """
    config, parts = trained.config, [plain]
    for number in range(1, config.sae.views):
        view = make_view(dataset.train, config, number)
        selection = ResidualSelection(view, f"train_view_{number}", (config.sae_layer,), tokens)
        parts.append(load_or_compute_residuals(cache, trained, selection)[config.sae_layer])
    return JoinedResiduals(tuple(parts))


def sae_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Cache the residuals, train the autoencoders on the training split's, measure them on the test split's."""
    c, cache = config.sae, activation_cache(config, workdir)
    trained = load_trained(config, len(dataset.class_names), workdir / "train")
    train, test = (load_residuals(cache, trained, dataset, name, c.tokens) for name in ("train", "test"))
    x_train = load_all(train if c.tokens == "cls" else load_residuals(None, trained, dataset, "train", "cls"))
    labelled = LabelledResiduals(train, c.tokens, x_train, dataset.train.labels, len(dataset.class_names))
    imported = import_autoencoder(config) if c.pretrained else None
    if imported:
        result = to_members(imported)
    else:
        source = load_training_residuals(cache, trained, dataset, c.tokens, train)
        result = train_members(config, seed_members(c), source, workdir / "sae", data=hash_data(dataset))
    members = result.autoencoders(c.inference_k)  # the seeds, then the control
    run = RunData(trained, dataset, members.first(c.seeds), x_train)
    replacement = measure_replacement(trained, run.autoencoders, dataset.test)._asdict()
    health = measure_autoencoders(members, c, labelled, test, replacement)
    gate_DH = gate_jacobian(trained, x_train)
    profile = profile_latents(run.autoencoders.member(0), labelled, gate_DH, INSPECTED_IMAGES)
    workdir.write_arrays("sae/inside.npz", profile)
    write_autoencoders(workdir, run, result.curves)
    provenance: dict[str, Any] | None = None
    if imported:
        provenance = describe_provenance(config, imported, workdir.path.name, health["explained_variance"])
        for doubt in provenance["doubts"]:
            logger.warning(f"sae: check {c.pretrained}: {doubt}")
    workdir.write_json("sae/health.json", health | {"provenance": provenance})


def grid_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Train autoencoders of several k and learning rates; choose the rate of each k on validation."""
    c, cache = grid_config(config), activation_cache(config, workdir)
    trained = load_trained(config, len(dataset.class_names), workdir / "train")
    sources = {
        name: load_residuals(cache, trained, dataset, name, c.tokens) for name in ("train", "validation", "test")
    }
    members = grid_members(c, grid_ks(config), config.grid.learning_rates, config.grid.seeds)
    as_trained = config.model_copy(update={"sae": c})
    source = load_training_residuals(cache, trained, dataset, c.tokens, sources["train"])
    result = train_members(as_trained, members, source, workdir / "grid", "grid", hash_data(dataset))
    workdir.write_json("grid/grid.json", measure_grid(config, members, result, sources))


def steer_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Sweep every strategy, class and alpha, and summarise the sweep."""
    trained = load_trained(config, len(dataset.class_names), workdir / "train")
    autoencoders, x_train, curves = read_autoencoders(workdir, trained)
    strategies = {name: find_strategy(name) for name in config.steer.strategies}
    run = RunData(trained, dataset, autoencoders, x_train)
    result = run_sweep(run, strategies)
    numbers, scored = summarise(result, config)
    if steers_patches(config):
        numbers["patches"] = _steer_patches(run, workdir, result.alphas)
        if claim := numbers["patches"].pop("claim"):
            numbers["claims"] = [*numbers.get("claims", []), claim]
    hosts.on_first_process(lambda: write_sweep(workdir / "sweep.nc", to_dataset(result, scored | curves)))
    workdir.write_json("steer/steering.json", numbers)


def _steer_patches(run: RunData, workdir: Workdir, alphas: np.ndarray) -> dict[str, Any]:
    """Steer the gates of the patches: `patches` of summary.json, and its `claim` (None: it cannot be judged)."""
    config, dataset = run.trained.config, run.dataset
    cache = activation_cache(config, workdir)
    residuals = load_residuals(cache, run.trained, dataset, "train", config.sae.tokens)
    splits = {
        name: select_classes(split, config, dataset.class_names)
        for name, split in (("validation", dataset.validation), ("test", dataset.test))
    }
    sweep = sweep_patches(run, residuals, alphas, splits, lambda split: find_own_patches(config, split))
    summary = summarise_patches(sweep, dataset.class_names, config)
    unsteered = unpack_gates(read_arrays(workdir / "train/gates.npz"), config)
    alpha = summary["steering"]["class"]["alpha"]
    steered = observe_steered_patches(run.trained, dataset.test, sweep.example, alpha, unsteered)
    workdir.write_arrays("steer/gates.npz", pack_gates(steered))
    return summary | {"claim": claim_own_patches(sweep, config)}


def layers_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Measure how steerable each gated layer is."""
    trained = load_trained(config, len(dataset.class_names), workdir / "train")
    numbers = profile_layers(trained, dataset, workdir / "layers", activation_cache(config, workdir))
    workdir.write_json("layers/layers.json", numbers)


def front_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Train gated models of several budgets from the dense model."""
    workdir.write_json("front/front.json", train_front(config, dataset, workdir / "train", workdir / "front"))


def report_stage(config: Config, dataset: Dataset, workdir: Workdir) -> None:
    """Write summary.json, the figures and the pages."""
    readings = load_test_readings(config, dataset, workdir)
    hosts.on_first_process(lambda: _write_report(config, dataset, workdir, readings))


def load_test_readings(config: Config, dataset: Dataset, workdir: Workdir) -> TestReadings:
    """Load what the page explorer.html computes with, on all hosts together.

    Residuals that the stage sae has cached are read, others computed; nothing is written.
    """
    run, cache = load_run_data(config, dataset, workdir), activation_cache(config, workdir)
    stored = load_residuals(cache, run.trained, dataset, "test", "cls", may_write=False)
    return read_test_images(run, load_all(stored))


def _write_report(config: Config, dataset: Dataset, workdir: Workdir, readings: TestReadings) -> None:
    summary = collect_summary(config, dataset, workdir)
    write_json(workdir / "summary.json", summary)
    write_pages(config, dataset, workdir, readings, (workdir / "report.html").parent)
    for line in list_headlines(summary):
        logger.info(line)


def collect_summary(config: Config, dataset: Dataset, workdir: Workdir) -> dict[str, Any]:
    """Collect the numbers of every stage that is done and not stale: the content of summary.json.

    Raises:
      HeadSteerError: a stage's file is missing or damaged.
    """
    now = read_inputs(config, dataset)
    finished = [stage for name, stage in STAGES.items() if name != "report" and is_done(workdir, stage)]
    left_out = {stage.name: reason for stage in finished if (reason := explain_staleness(now, workdir, stage))}
    done = [stage.name for stage in finished if stage.name not in left_out]
    records = {name: read_json(workdir / name / "done.json") for name in done}
    test = read_json(workdir / "train/test.json")
    return {
        "dense_accuracy": test.get("dense"),
        "dense_control_accuracy": test.get("dense_control"),
        "layer_usage": test.get("usage"),
        "compute": test.get("compute"),
        **read_json(workdir / "steer/steering.json"),
        "grid": read_json(workdir / "grid/grid.json") if "grid" in done else None,
        "by_layer": read_json(workdir / "layers/layers.json") if "layers" in done else None,
        "front": read_json(workdir / "front/front.json") if "front" in done else None,
        "sae": read_json(workdir / "sae/health.json")
        | {"layer": config.sae_layer, "k": config.sae.inference_k, "latents": config.latents},
        "left_out": left_out,
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
            train_stage, fields=TRAINED, file="model.pretrained",
            entries=(
                "test.json", "gates.npz", "metrics.jsonl", "speed.jsonl", "tensorboard", "wandb", "profile", *PHASES,
            ),
        ),
        Stage(
            "sae", "the sparse autoencoders of one layer's residual",
            sae_stage, fields=(*TRAINED, "sae"), reads=("train",), file="sae.pretrained",
            entries=("autoencoders.npz", "health.json", "inside.npz", "checkpoints"),
        ),
        Stage(
            "grid", "autoencoders of several k and learning rates side by side (only if it is named)",
            grid_stage, fields=(*TRAINED, "sae", "grid"), reads=("train",), optional=True, by_default=False,
            entries=("grid.json", "checkpoints"),
        ),
        Stage(
            "steer", "every strategy, class and alpha on validation and test; the controls",
            steer_stage, fields=(*TRAINED, "sae", "steer"), reads=("train", "sae"),
            entries=("steering.json", "gates.npz"), products=("sweep.nc",),
        ),
        Stage(
            "layers", "class steering of every gated layer by itself, and of all at once",
            layers_stage, fields=(*TRAINED, "sae", *STEERED_LAYER, "layers"), reads=("train",), optional=True,
            entries=("layers.json", "[0-9]", "[0-9][0-9]", "[0-9][0-9][0-9]"),
        ),
        Stage(
            "front", "gated models of several budgets from one dense model (only if it is named)",
            front_stage, fields=(*TRAINED, "front", "steer.bootstrap", "steer.confidence"), reads=("train",),
            optional=True, by_default=False, file="model.pretrained", entries=("front.json", "budgets"),
        ),
        Stage(
            "report", "summary.json, figures/, report.html, latents.html and explorer.html",
            report_stage, fields=(*TRAINED, "sae", "grid", "steer", "layers", "front", "report"),
            reads=("train", "sae", "grid", "steer", "layers", "front"), derived=True,
            entries=(), products=("summary.json", *PAGES, *FIGURE_FILES),
        ),
    )
}  # fmt: skip


def parse_stages(names: str | None) -> tuple[str, ...]:
    """Parse the flag --stages; None stands for the stages that run by default.

    Raises:
      HeadSteerError: there is no such stage.
    """
    if names is None:
        return tuple(name for name, stage in STAGES.items() if stage.by_default)
    for name in names.split(","):
        if name not in STAGES:
            raise HeadSteerError(f"--stages={names}: there is no stage {name!r}; choose from {', '.join(STAGES)}")
    return tuple(names.split(","))


def run_stages(config: Config, workdir: Workdir, names: tuple[str, ...], overwrite: bool) -> None:
    """Run the named stages in order, each unless it is done.

    Everything that can be checked is checked before anything is written.

    Raises:
      HeadSteerError: a stage that a named one needs is missing; a stage is stale and `overwrite` is off; the workdir is
        used for something else; another run is writing there; hosts differ; or a check or a stage raises it.
    """
    settings = {f"config.{path}": json.dumps(value) for path, value in flatten(config).items()}
    versions = package_versions()
    hosts.check_equal(settings | {f"the version of {name}": versions[name] for name in PACKAGES})
    check_source(config.data)
    chosen = [stage for name, stage in STAGES.items() if name in names]
    hosts.on_first_process(lambda: check_workdir(config, workdir, list(STAGES.values())))
    dataset = _load_needed_dataset(config, workdir, chosen, overwrite)
    now = read_inputs(config, dataset)
    plans = _agree_on_plans(now, workdir, chosen, overwrite)
    if dataset is not None:
        check_plans(config, dataset, workdir, plans)
    with ExitStack() as held:
        hosts.on_first_process(lambda: bool(make_directory(workdir.path)))
        hosts.on_first_process(lambda: held.enter_context(hold_lock(workdir.path)))
        if hosts.process_count() > 1:
            _check_shared(workdir.path)
        held.enter_context(explain_errors(workdir.path))  # a full disk is one line wherever it shows
        hosts.on_first_process(lambda: _finish_replacements(workdir))
        plans = _agree_on_plans(now, workdir, chosen, overwrite)  # another run may have ended in between
        for plan in plans:
            _run_stage(now, dataset, workdir, plan)
        hosts.on_first_process(lambda: _update_config(now, workdir))


def _run_stage(now: Inputs, dataset: Dataset | None, workdir: Workdir, plan: Plan) -> None:
    """Run a stage as planned."""
    name = plan.stage.name
    if plan.action == "nothing":
        record = hosts.on_first_process(lambda: read_record(workdir, name))
        logger.info(f"{name}: done before, in {record['seconds'] if record else 0:.0f} s")
        return
    assert dataset is not None
    began = time.monotonic()
    record = hosts.on_first_process(lambda: begin_stage(now, workdir, plan))
    plan.stage.run(now.config, dataset, stage_workdir(workdir, plan))
    seconds = time.monotonic() - began
    hosts.on_first_process(lambda: finish_stage(record, workdir, plan, now.config, seconds))
    logger.info(f"{name}: done in {seconds:.0f} s")
    preemption.raise_if_preempted()


def _agree_on_plans(now: Inputs, workdir: Workdir, chosen: list[Stage], overwrite: bool) -> list[Plan]:
    """Plan the stages on process 0, for all."""

    def decide() -> list[Any]:
        plans = plan_stages(now, workdir, list(STAGES.values()), chosen, overwrite)
        return [(plan.stage.name, plan.action, plan.reason, dict(plan.left_out)) for plan in plans]

    return [
        Plan(STAGES[name], action, reason, left_out)
        for name, action, reason, left_out in hosts.on_first_process(decide)
    ]


def _load_needed_dataset(config: Config, workdir: Workdir, chosen: list[Stage], overwrite: bool) -> Dataset | None:
    """Load and check the dataset; None if the data are gone and every chosen stage is done."""
    try:
        return _load_checked_dataset(config)
    except HeadSteerError as error:
        plans = _agree_on_plans(read_inputs(config, None), workdir, chosen, overwrite)
        if any(plan.action != "nothing" for plan in plans) or not _has_data_path(workdir, config.data.path):
            raise
        logger.info(f"every stage is done, but the data could not be compared with the run's ({error})")
        return None


def _has_data_path(workdir: Workdir, path: str) -> bool:
    """Say whether the last command that ran in a workdir read the data from this path."""

    def compare() -> bool:
        with suppress(HeadSteerError, TypeError, KeyError):  # it is missing or damaged
            return bool(read_json(workdir / "config.json")["data"]["path"] == path)
        return False

    return hosts.on_first_process(compare)


def _load_checked_dataset(config: Config) -> Dataset:
    """Load the dataset on every host, and check that all hosts have the same one and that it suits the config."""
    dataset = hosts.on_every_process(lambda: load_dataset(config.data, config.data_seed, config.machine.image_memory))
    hosts.check_equal({"the data": hosts.on_every_process(lambda: hash_data(dataset))})
    check_dataset(config, dataset)
    return dataset


def _finish_replacements(workdir: Workdir) -> None:
    """Replace old results with the new ones that an interrupted run had completed."""
    for stage in STAGES.values():
        replace_stage(workdir, stage.name, stage.entries, stage.products)


def _update_config(now: Inputs, workdir: Workdir) -> None:
    """Write config.json if it differs and all finished stages belong to this config: paths may have changed."""
    file, config = workdir / "config.json", json.loads(now.config.model_dump_json())
    finished = [stage for stage in STAGES.values() if is_done(workdir, stage)]
    if not finished or any(explain_staleness(now, workdir, stage) for stage in finished):
        return
    with suppress(HeadSteerError):  # it is missing or damaged
        if read_json(file) == config:
            return
    write_config(now.config, workdir)


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
