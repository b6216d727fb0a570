"""The stages and their bookkeeping: each reads what the one before saved, and is done once.

A stage keeps `<workdir>/<stage>/started.json` (the config it was started with) and, at the end, `done.json`. What of
the config a stage depends on is in NEEDS; a finished or interrupted stage whose part of the config changed is not
touched unless --overwrite says so. A stage that was made again makes those after it stale.

Of several hosts all run a stage; process 0 decides what is to be done, and writes.
"""

import datetime
import functools
import json
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from headsteer_jax.analysis.layers import profile_layers
from headsteer_jax.analysis.summary import summarise
from headsteer_jax.analysis.sweep_file import read_sweep, to_arrays, to_dataset, write_sweep
from headsteer_jax.books import (
    OPTIONAL,
    PACKAGES,
    STAGES,
    _inputs,
    _reads,
    explain_staleness,
    package_versions,
    peak_memory_bytes,
    stage_fields,
)
from headsteer_jax.config.files import flatten
from headsteer_jax.config.schema import Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Dataset, Split, fingerprint_dataset
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.passes import make_observer, per_image_program, run_over_split
from headsteer_jax.model.vit import ViT, fingerprint_params, predict_class
from headsteer_jax.report.latents import write_latents_page
from headsteer_jax.report.page import write_report
from headsteer_jax.runtime import hosts, preemption
from headsteer_jax.runtime.files import (
    REMAKE,
    make_directory,
    read_arrays,
    read_json,
    remove_directory,
    write_arrays,
    write_json,
    write_text,
)
from headsteer_jax.runtime.lock import hold_lock
from headsteer_jax.runtime.progress import say
from headsteer_jax.sae.autoencoder import (
    SAEWeights,
    Scaling,
    decode_scaled,
    encode_scaled,
    scale_input,
    select_member,
    unscale_output,
)
from headsteer_jax.sae.grid import grid_members
from headsteer_jax.sae.interchange import import_overcomplete, import_saelens
from headsteer_jax.sae.latents import profile_latents
from headsteer_jax.sae.metrics import compare_seeds, mean_activation_by_class, measure_health, summarise_latents
from headsteer_jax.sae.residuals import Residuals, load_or_compute_residuals
from headsteer_jax.sae.train import CURVES, TrainedMembers, seed_members, train_members
from headsteer_jax.steer.steering import run_from_layer
from headsteer_jax.steer.strategies import find_strategy
from headsteer_jax.steer.sweep import Arrays, check_strategies_and_classes, check_validation, gate_jacobian, run_sweep
from headsteer_jax.train.log import read_log
from headsteer_jax.train.loop import EVALUATION_GATING, PHASES, load_trained, train_model

INSIDE = 16  # images of each latent that are looked for; the report shows config.report.top_images of them


def train_stage(config: Config, dataset: Dataset, workdir: Path) -> None:
    """Train the gated model, then measure it and the dense ones on the test split."""
    train_model(config, dataset, workdir / "train")
    results: dict[str, Any] = {}
    wanted = {"dense": config.train.dense.steps > 0, "gated": True, "dense_control": config.train.dense_control}
    for phase in PHASES:
        if wanted[phase]:
            model, params = load_trained(config, dataset, workdir / "train", phase)
            seen = make_observer(model, config, EVALUATION_GATING[phase], config.sae_layer)(
                params, dataset.test, f"{phase}: test"
            )
            results[phase] = seen.accuracy(dataset.test.labels)
            if phase == "gated":
                results["usage"] = seen.gates.mean(axis=(0, 2)).tolist()
    hosts.on_first_process(lambda: write_json(workdir / "train" / "test.json", results))


class Replaced(NamedTuple):
    """What happens when every autoencoder's reconstruction replaces the CLS residual, [S] each."""

    gate_agreement: np.ndarray  # in the gate alone: share of gate decisions that stay
    accuracy: np.ndarray  # likewise
    accuracy_residual: np.ndarray  # in the whole block
    kl: np.ndarray  # likewise: mean KL divergence of the answers from the model's own, in nats


def _replaced(model: ViT, params: Any, split: Split, saes: SAEWeights, scaling: Scaling, config: Config) -> Replaced:
    """Run the model from the autoencoder's layer on with reconstructed residuals."""
    layer, k = config.sae_layer, config.sae.inference_k

    def run(given: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        params, saes = given
        x_BTD = model.apply(params, preprocess(images, config.data), layer, method="before")
        x_BD = x_BTD[:, 0]
        own_BC, own_BH = run_from_layer(model, params, x_BTD, x_BD, layer, "policy")
        own_BC = jax.nn.log_softmax(own_BC)

        def one(sae: SAEWeights) -> tuple[jax.Array, ...]:
            x_hat_BD = unscale_output(scaling, decode_scaled(sae, encode_scaled(sae, scale_input(scaling, x_BD), k)))
            by_gate_BC, gates_BH = run_from_layer(model, params, x_BTD, x_hat_BD, layer, "policy")
            whole_BC = jax.nn.log_softmax(run_from_layer(model, params, x_BTD, x_hat_BD, layer, "residual")[0])
            kl_B = jnp.sum(jnp.exp(own_BC) * (own_BC - whole_BC), axis=1)
            same_B = jnp.mean((gates_BH > 0) == (own_BH > 0), axis=1)
            return same_B, predict_class(by_gate_BC), predict_class(whole_BC), kl_B

        return tuple(values_SB.T for values_SB in jax.lax.map(one, saes))

    program = per_image_program(run, config.train.eval_batch)
    same_NS, by_gate_NS, whole_NS, kl_NS = run_over_split(
        program, (params, saes), split, "test: reconstructed residuals"
    )
    right = (answers_NS == split.labels[:, None] for answers_NS in (by_gate_NS, whole_NS))
    return Replaced(*(np.asarray(np.mean(v, axis=0, dtype=np.float64)) for v in (same_NS, *right, kl_NS)))


def _sae_source(config: Config, workdir: Path, model: ViT, params: Any, split: Split, name: str) -> Residuals:
    """The residuals of config.sae's layer and tokens, from the activation cache."""
    layer, where = config.sae_layer, _cache(config, workdir)
    return load_or_compute_residuals(where, model, params, config, split, name, (layer,), config.sae.tokens)[layer]


def _cache(config: Config, workdir: Path) -> str:
    """Where residuals are kept."""
    return config.sae.cache or str(workdir / "activations")


def _imported(config: Config) -> TrainedMembers:
    """The autoencoder that config.sae.pretrained names, as if it had been trained here, without curves.

    Raises:
      HeadSteerError: it cannot be read, or is not of this config's activation, k or number of latents.
    """
    c = config.sae
    library, _, path = c.pretrained.partition(":")
    read = import_saelens if library == "saelens" else import_overcomplete
    found = read(Path(path), width=config.model.width)
    for field, own, wanted in (
        ("activation", found.activation, c.activation),
        ("k", found.k, c.k),
        ("expansion", len(found.sae.b_e) / config.model.width, c.expansion),
    ):
        if own is not None and own != wanted:
            raise HeadSteerError(
                f"config.sae.{field} = {wanted!r}: {path} has {own!r}; set it to that, or choose another autoencoder"
            )
    curves = {name: np.zeros((0, 1), np.float32) for name in CURVES}
    return TrainedMembers(jax.tree.map(lambda leaf: leaf[None], found.sae), found.scaling, curves)


def sae_stage(config: Config, dataset: Dataset, workdir: Path) -> None:
    """Cache the residuals, train the autoencoders on the training split's, measure them on the test split's."""
    c, directory = config.sae, workdir / "sae"
    model, params = load_trained(config, dataset, workdir / "train")
    source = {
        name: _sae_source(config, workdir, model, params, split, name)
        for name, split in (("train", dataset.train), ("test", dataset.test))
    }
    if c.tokens == "cls":
        x_train = np.concatenate(list(source["train"].chunks()))
    else:
        x_train = make_observer(model, config, "thresholded", config.sae_layer)(params, dataset.train, "train: CLS").x
    made = _imported(config) if c.pretrained else train_members(config, seed_members(c), source["train"], directory)
    saes, scaling = jax.tree.map(lambda leaf: leaf[: c.seeds], made.saes), made.scaling
    replaced = _replaced(model, params, dataset.test, saes, scaling, config)
    rows, living = [], []
    for seed in range(len(made.saes.b_d)):
        sae = select_member(made.saes, seed)
        frequency = measure_health(sae, scaling, source["train"].chunks(), c.inference_k).frequency
        living.append(np.asarray(sae.W_d)[frequency > 0])
        if seed == c.seeds:
            break  # the control is there to be compared with
        on_test = measure_health(sae, scaling, source["test"].chunks(), c.inference_k)
        mean_CF = mean_activation_by_class(
            sae, scaling, x_train, dataset.train.labels, len(dataset.class_names), c.inference_k
        )
        rows.append(
            {name: value for name, value in on_test._asdict().items() if name != "frequency"}
            | summarise_latents(np.asarray(sae.W_d), frequency, mean_CF, c.dense_frequency)
            | {name: float(values[seed]) for name, values in replaced._asdict().items()}
        )
    gate_DH = gate_jacobian(model, params, config.sae_layer, x_train)
    inside = profile_latents(
        select_member(saes, 0), scaling, c.inference_k, source["train"], x_train, dataset.train.labels,
        len(dataset.class_names), gate_DH, c.tokens, INSIDE,
    )  # fmt: skip
    arrays = {f"sae_{name}": values for name, values in saes._asdict().items()}
    arrays |= {"mean": scaling.mean, "scale": scaling.scale, "x_train": x_train}
    arrays |= {"layer": np.array(config.sae_layer), "model": np.array(fingerprint_params(params))}
    curves = {f"curve_{name}": values[:, : c.seeds] for name, values in made.curves.items()}
    numbers: dict[str, Any] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    numbers |= {"seeds": rows, "stability": compare_seeds(living[: c.seeds], living[c.seeds :])}

    def write() -> None:
        write_arrays(directory / "inside.npz", inside)
        write_arrays(directory / "autoencoders.npz", arrays | curves)
        write_json(directory / "health.json", numbers)

    hosts.on_first_process(write)


def autoencoders(config: Config, params: Any, workdir: Path) -> tuple[SAEWeights, Scaling, np.ndarray, Arrays]:
    """What the stage sae made: autoencoders with leading axis S, scaling, training residuals, and training curves.

    Raises:
      HeadSteerError: the file is missing or damaged, or of another layer or model.
    """
    path = workdir / "sae" / "autoencoders.npz"
    stored = read_arrays(path)
    names = {"layer", "model", "mean", "scale", "x_train", *(f"sae_{name}" for name in SAEWeights._fields)}
    if missing := sorted(names - set(stored)):
        raise HeadSteerError(f"{path}: it has no {missing[0]!r}, as if an older version made it; {REMAKE}")
    if int(stored["layer"]) != config.sae_layer:
        raise HeadSteerError(f"{path}: made for layer {stored['layer']}, not for {config.sae_layer}; {REMAKE}")
    if str(stored["model"]) != fingerprint_params(params):
        raise HeadSteerError(f"{path}: made from another model's residuals than {workdir / 'train'} holds; {REMAKE}")
    saes = SAEWeights(*(jnp.asarray(stored[f"sae_{name}"]) for name in SAEWeights._fields))
    curves = {f"sae_{name}": stored[f"curve_{name}"] for name in CURVES}
    return saes, Scaling(stored["mean"], stored["scale"]), stored["x_train"], curves


def grid_stage(config: Config, dataset: Dataset, workdir: Path) -> None:
    """Autoencoders of several k and learning rates; the rate of each k is chosen on validation."""
    directory, g = workdir / "grid", config.grid
    model, params = load_trained(config, dataset, workdir / "train")
    c = config.sae.model_copy(update={"epochs": g.epochs or config.sae.epochs})
    ks = g.k or tuple(dict.fromkeys(min(max(1, round(times * c.k)), config.latents) for times in (0.5, 1, 2)))
    members = grid_members(c, ks, g.learning_rates, g.seeds)
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    source = {name: _sae_source(config, workdir, model, params, split, name) for name, split in splits.items()}
    made = train_members(config.model_copy(update={"sae": c}), members, source["train"], directory, "grid")
    rates, rows = g.learning_rates or (c.learning_rate,), []
    for number in range(len(members.k)):
        rate = min(rates, key=lambda one: abs(one - members.learning_rate[number]))
        if not np.isfinite(made.curves["mse"][-1, number]):
            say(f"grid: k {members.k[number]}, learning rate {rate:g} turned NaN: left out")
            continue
        sae, k = select_member(made.saes, number), int(members.k[number])
        on = {
            name: measure_health(sae, made.scaling, split.chunks(), k if c.inference_k else None)
            for name, split in source.items()
        }
        rows.append(
            {
                "k": k,
                "learning_rate": rate,
                "seed": int(members.order[number]),
                "validation_explained_variance": on["validation"].explained_variance,
                "explained_variance": on["test"].explained_variance,
                "mse": on["test"].mse,
                "mse_residual": on["test"].mse_residual,
                "l0": on["test"].l0,
                "dead_fraction": float(np.mean(on["train"].frequency == 0)),
            }
        )
    best = {}
    for one_k in sorted({row["k"] for row in rows}):
        of_k = [row for row in rows if row["k"] == one_k]
        by_rate = {
            rate: [row for row in of_k if row["learning_rate"] == rate] for rate in {r["learning_rate"] for r in of_k}
        }
        chosen = max(by_rate, key=lambda r: np.mean([row["validation_explained_variance"] for row in by_rate[r]]))
        best[str(one_k)] = {"learning_rate": chosen} | {
            name: float(np.mean([row[name] for row in by_rate[chosen]]))
            for name in ("explained_variance", "mse_residual", "l0", "dead_fraction")
        }
    numbers = {"best": best, "rows": rows, "epochs": c.epochs, "latents": config.latents}
    hosts.on_first_process(lambda: write_json(directory / "grid.json", numbers))


def steer_stage(config: Config, dataset: Dataset, workdir: Path) -> None:
    """The sweep and its headline numbers."""
    model, params = load_trained(config, dataset, workdir / "train")
    saes, scaling, x_train, curves = autoencoders(config, params, workdir)
    strategies = {name: find_strategy(name) for name in config.steer.strategies}
    arrays, steps = run_sweep(config, dataset, model, params, saes, scaling, x_train, strategies)

    def write() -> None:
        numbers, extra = summarise(arrays, config, steps)
        write_sweep(workdir / "sweep.nc", to_dataset(arrays | extra | curves))
        write_json(workdir / "steer" / "steering.json", numbers)

    hosts.on_first_process(write)


def layers_stage(config: Config, dataset: Dataset, workdir: Path) -> None:
    """How steerable each gated layer is."""
    model, params = load_trained(config, dataset, workdir / "train")
    directory = workdir / "layers"
    numbers = profile_layers(config, dataset, model, params, directory, _cache(config, workdir))
    hosts.on_first_process(lambda: write_json(directory / "layers.json", numbers))


def report_stage(config: Config, dataset: Dataset, workdir: Path) -> None:
    """summary.json, the figures and report.html."""
    hosts.on_first_process(lambda: _report(config, dataset, workdir))


def _report(config: Config, dataset: Dataset, workdir: Path) -> None:
    test = read_json(workdir / "train" / "test.json")
    records = {
        stage: read_json(workdir / stage / "done.json")
        for stage in STAGES[:-1]
        if stage not in OPTIONAL or (workdir / stage / "done.json").exists()
    }
    sae = read_json(workdir / "sae" / "health.json")
    summary = {
        "dense_accuracy": test.get("dense"),
        "dense_control_accuracy": test.get("dense_control"),
        "layer_usage": test["usage"],
        **read_json(workdir / "steer" / "steering.json"),
        "grid": read_json(workdir / "grid" / "grid.json") if "grid" in records else None,
        "by_layer": read_json(workdir / "layers" / "layers.json") if "layers" in records else None,
        "sae": sae | {"layer": config.sae_layer, "k": config.sae.inference_k, "latents": config.latents},
        "seconds": {stage: record["seconds"] for stage, record in records.items()},
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records.values()),
        "versions": package_versions(),
        "config": json.loads(config.model_dump_json()),
    }
    write_json(workdir / "summary.json", summary)
    inside = read_arrays(workdir / "sae" / "inside.npz")
    inside |= {name: inside[name][:, : config.report.top_images] for name in inside if name.startswith("top_")}
    write_latents_page(workdir / "latents.html", workdir.name, inside, dataset, config)
    rows = read_log(workdir / "train" / "metrics.jsonl")
    write_report(config, workdir.name, dataset, summary, to_arrays(read_sweep(workdir / "sweep.nc")), rows, workdir)


RUN: dict[str, Callable[[Config, Dataset, Path], None]] = {
    "train": train_stage,
    "sae": sae_stage,
    "grid": grid_stage,
    "steer": steer_stage,
    "layers": layers_stage,
    "report": report_stage,
}


def _prepared(config: Config, workdir: Path, stage: str, stages: tuple[str, ...], overwrite: bool) -> Any:
    """The record of a stage that is to be run now, once what is there of it allows; None: nothing is to be done."""
    directory = workdir / stage
    finished = (directory / "done.json").exists()
    if stage not in stages:
        later = [name for name in stages if stage in _reads(name)]
        if stage in OPTIONAL and not finished:
            return None
        if later and not finished:
            raise HeadSteerError(f"{later[0]} needs {stage}, which is not done in {workdir}: add it to --stages")
        if later and (why := explain_staleness(config, workdir, stage)):
            raise HeadSteerError(
                f"{later[0]} needs {stage}, but {directory} is of another config ({why}); "
                f"add {stage} to --stages and pass --overwrite, or choose another --workdir"
            )
        return None
    why = explain_staleness(config, workdir, stage)
    if why and not overwrite:
        raise HeadSteerError(f"{directory} is of another config ({why}); pass --overwrite or another --workdir")
    if why:
        say(f"{stage}: made again ({why})")
        remove_directory(directory)
        finished = False
    if finished:
        say(f"{stage}: done before, in {read_json(directory / 'done.json')['seconds']:.0f} s")
        return None
    make_directory(directory)
    record: dict[str, Any] = {"config": stage_fields(config, stage), "inputs": _inputs(workdir, stage)}
    write_json(directory / "started.json", record)
    write_json(workdir / "config.json", json.loads(config.model_dump_json()))
    return record


def _check_shared(workdir: Path) -> None:
    """Raises HeadSteerError where a host does not see what process 0 writes."""
    token, path = hosts.on_first_process(lambda: uuid.uuid4().hex), workdir / ".shared"
    hosts.on_first_process(lambda: write_text(path, token))

    def seen() -> None:
        if not path.exists() or path.read_text() != token:
            raise HeadSteerError(
                f"{workdir}: not the same on every host; --workdir must be on a file system that all share, or gs://"
            )

    hosts.on_every_process(seen)
    hosts.on_first_process(path.unlink)


def run(config: Config, workdir: Path, stages: tuple[str, ...], overwrite: bool) -> None:
    """Run the named stages in order, each unless it is done.

    Raises:
      HeadSteerError: a stage before the first named one is not done; what is there was made from another config and
        `overwrite` is off; another run is writing there; hosts differ; anything that a stage raises.
    """
    workdir = Path(workdir)
    settings = {f"config.{path}": json.dumps(value) for path, value in flatten(config).items()}
    hosts.check_equal(settings | {f"the version of {name}": package_versions()[name] for name in PACKAGES})
    dataset: Dataset | None = None
    with ExitStack() as held:
        hosts.on_first_process(lambda: bool(make_directory(workdir)))
        hosts.on_first_process(lambda: held.enter_context(hold_lock(workdir)))
        if hosts.process_count() > 1:
            _check_shared(workdir)
        for stage in STAGES:
            record = hosts.on_first_process(lambda stage=stage: _prepared(config, workdir, stage, stages, overwrite))  # type: ignore[misc]
            if record is None:
                continue
            began = time.monotonic()
            if dataset is None:
                dataset = hosts.on_every_process(lambda: load_dataset(config.data, config.seed))
                marks = hosts.on_every_process(functools.partial(fingerprint_dataset, dataset))
                hosts.check_equal({"the data": marks})
                check_strategies_and_classes(config, dataset.class_names)
                check_validation(dataset.validation, config, dataset.class_names)
            RUN[stage](config, dataset, workdir)
            seconds = time.monotonic() - began
            record |= {
                "finished": datetime.datetime.now(datetime.UTC).isoformat(),
                "seconds": seconds,
                "peak_memory_bytes": peak_memory_bytes(),
            }
            hosts.on_first_process(lambda record=record, stage=stage: write_json(workdir / stage / "done.json", record))  # type: ignore[misc]
            say(f"{stage}: done in {seconds:.0f} s")
            preemption.raise_if_preempted()
