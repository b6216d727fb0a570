"""Measures how well and how fast autoencoders train, next to the libraries that researchers use, and what generalises.

    python benchmarks/sae.py vectors VECTORS.npz --config=configs/NAME.py [--config.FIELD=VALUE ...]
    python benchmarks/sae.py speed VECTORS.npz [--peer=NAME=PYTHON ...]
    python benchmarks/sae.py quality VECTORS.npz RESULTS.jsonl [--peer=NAME=PYTHON ...]
    python benchmarks/sae.py ablation VECTORS.npz RESULTS.jsonl
    python benchmarks/sae.py generalise RUN RESULTS.jsonl [--axes=views,k] [--epochs=100] [--config.sae.FIELD=VALUE ...]

`vectors` stores the CLS residuals that enter the last layer of a config's model before training: with
--config.model.pretrained, those of a pretrained backbone. `peers.py` trains a peer in the peer's own environment, with
the given Python: --peer=overcomplete=/path/to/venv/bin/python, likewise dictionary_learning, sae_lens and torch. All
see the same vectors, centred and scaled, and our code scores all. Each gets the learning rate that is best on
validation at k = 32; ours must leave at most 1% of latents dead, while the peers' may leave more.

`generalise` asks what raises the explained variance of images that the autoencoder has not seen. RUN is the directory
of a run whose stage train is done; its autoencoders need not be. It trains autoencoders on that model's residuals with
the run's own section sae, and then with one of its fields changed at a time (--axes, by default all: list_settings).
All settings have the same number of training steps, but for the residuals that do not fill a batch: --epochs, by
default sae.epochs, counts passes over the training images themselves, and with V views there are epochs / V passes over
all views. --config.sae.FIELD=VALUE changes the section sae from which the settings start; with --axes= it is measured
alone. The residuals of each view are computed once and stay in the run's activation cache, where the stage sae finds
them. The figures are explained variance on the training images themselves, on validation and on test; the share of
latents that fire on no training image; the share of gate decisions on test that stay when the gate reads the
reconstruction; and the seconds of one training, with compiling.

Results go to a file with a line for each training; a training that has its line is not repeated. Times are medians over
repeats in one run, and the machine should have nothing else to do. The last line printed is one JSON object.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headsteer_jax.config import Config, MachineConfig, ModelConfig, SAEConfig
from headsteer_jax.config.files import load_config, override, parse_names
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import SPLITS, Split, hash_data, sha256_of
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.model.passes import per_image_program, run_over_split
from headsteer_jax.model.vit import TrainedModel, build_model, fingerprint_params
from headsteer_jax.preflight import check_steerable
from headsteer_jax.runs import check_done, load_run_dataset, locate_run, read_config
from headsteer_jax.runtime.mesh import members_mesh
from headsteer_jax.sae import train as sae_train
from headsteer_jax.sae.autoencoder import Autoencoder, SAEWeights, fit_scaling, scale_input
from headsteer_jax.sae.metrics import measure_health
from headsteer_jax.sae.residuals import JoinedResiduals, Residuals, ResidualsInMemory
from headsteer_jax.stages import activation_cache, load_residuals, load_training_residuals
from headsteer_jax.steer.replacement import measure_replacement
from headsteer_jax.train.loop import init_params, load_trained

PEERS = Path(__file__).with_name("peers.py")
RATES = (4e-4, 1e-3, 2e-3)  # learning rates that are tried for all
TUNED_AT = 32  # k
MOST_DEAD = 0.01  # the largest share of our latents that may never fire on the training vectors
OURS: dict[str, dict[str, Any]] = {  # name -> fields of config.sae, beside those that the arguments set
    "headsteer topk": {},
    "headsteer batch_topk": {"activation": "batch_topk"},
}
SHORT = 20  # epochs; in shorter trainings, latents count as dead after a quarter of an epoch
ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "gradients not made unit": {"ablation": {"unit_gradient": False}},
    "without centring": {"ablation": {"centre": False}},
    "without AuxK": {"aux_weight": 0.0},
    "encoder drawn apart": {"ablation": {"init": "untied"}},
    "decoder rows left free": {"ablation": {"decoder_norm": "free"}},
}

AXES = ("views", "weight_decay", "k", "expansion", "prefixes")


def make_vectors(file: Path, config: Config) -> None:
    """Write the residuals of all splits: float32 arrays `train`, `validation`, `test`, and `<split>_labels`."""
    dataset = load_dataset(config.data, config.seed)
    model = build_model(config, len(dataset.class_names))
    params, layer = init_params(model, config, config.seed), config.sae_layer

    def run(params: Any, images: jax.Array) -> tuple[jax.Array]:
        return (model.apply(params, preprocess(images, config.data), layer, method="before")[:, 0],)

    arrays = {}
    for name in SPLITS:
        split = getattr(dataset, name)
        (arrays[name],) = run_over_split(per_image_program(run, config.train.eval_batch), params, split, name)
        arrays[f"{name}_labels"] = split.labels
    np.savez(file, **arrays)


def score(sae: Autoencoder, sources: Mapping[str, Residuals]) -> dict[str, float]:
    """Score an autoencoder, ours or a peer's, on the residuals of every split."""
    health = {name: measure_health(sae, source.chunks()) for name, source in sources.items()}
    return {
        "validation": health["validation"].explained_variance,
        "test": health["test"].explained_variance,
        "train": health["train"].explained_variance,
        "mse_residual": health["test"].mse_residual,
        "l0": health["test"].l0,
        "dead": float(np.mean(health["train"].frequency == 0)),
    }


class Bench:
    """The vectors of every split, and their scaling."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as arrays:
            self.x = {name: arrays[name] for name in SPLITS}
        self.scaling = fit_scaling(ResidualsInMemory(self.x["train"]).chunks, SAEConfig())
        self.width = self.x["train"].shape[1]

    def config(self, **fields: Any) -> Config:
        """Make the config of a training; of the model, only the width matters."""
        return Config(model=ModelConfig(width=self.width, heads=6), sae=SAEConfig(**fields))

    def score(self, sae: Autoencoder) -> dict[str, float]:
        """Score an autoencoder, ours or a peer's."""
        return score(sae, {name: ResidualsInMemory(x) for name, x in self.x.items()})


def train_ours(bench: Bench, seeds: int, fields: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Train several seeds in one program, and yield the score of each."""
    window = {"dead_window": 0.25} if fields["epochs"] < SHORT else {}
    config = bench.config(seeds=seeds, control=False, **(window | fields))
    members = sae_train.seed_members(config.sae)
    with tempfile.TemporaryDirectory() as directory:
        source = ResidualsInMemory(bench.x["train"])
        trained = sae_train.train_members(config, members, source, Path(directory), str(fields))
    autoencoders = trained.autoencoders(config.sae.inference_k)
    for seed in range(seeds):
        yield bench.score(autoencoders.member(seed))


def run_peer(bench: Bench, name: str, python: str, *options: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train a peer in its environment, and return the figures that it printed and its arrays."""
    with tempfile.TemporaryDirectory() as directory:
        vectors, weights = Path(directory) / "vectors.npz", Path(directory) / "weights.npz"
        np.savez(vectors, train=np.asarray(scale_input(bench.scaling, bench.x["train"])))
        library = name.split()[0]
        done = subprocess.run(
            [python, str(PEERS), library, str(vectors), str(weights), *options],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        arrays = {}
        if weights.exists():
            with np.load(weights) as stored:
                arrays = dict(stored)
    return json.loads(done.stdout.strip().splitlines()[-1]), arrays


def train_peer(bench: Bench, name: str, python: str, fields: dict[str, Any], seed: int) -> dict[str, float]:
    """Train one autoencoder of a peer, and score it."""
    options = [f"--k={fields['k']}", f"--latents={8 * bench.width}", f"--epochs={fields['epochs']}",
               f"--batch={fields['batch']}", f"--lr={fields['learning_rate']}", f"--seed={seed}"]  # fmt: skip
    if "batch_topk" in name:
        options.append("--variant=batch_topk")
    _, a = run_peer(bench, name, python, *options)
    b_e = a["b_e"] if a["apply_b_d"] else a["b_e"] + a["W_e"] @ a["b_d"]  # ours subtracts b_d
    threshold = np.broadcast_to(a["threshold"], b_e.shape)
    weights = SAEWeights(*(jnp.asarray(part, jnp.float32) for part in (a["W_e"], b_e, a["W_d"], a["b_d"], threshold)))
    return bench.score(Autoencoder(weights, bench.scaling, int(a["k"]) if a["kind"] == "topk" else None))


class Results:
    """A file with a row for each training."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def find(self, **fields: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if all(row.get(name) == value for name, value in fields.items())]

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)


def quality(bench: Bench, results: Results, args: argparse.Namespace) -> dict[str, Any]:
    """Measure explained variance on test at every k, for ours and every peer, each at its best learning rate."""
    trainers: dict[str, str | None] = dict.fromkeys(OURS) | args.peers  # name -> Python; None: ours
    plan = {"epochs": args.epochs, "batch": args.batch}

    def train(name: str, python: str | None, k: int, rate: float, seeds: int) -> None:
        identity = {"name": name, "k": k, "learning_rate": rate, **plan}
        missing = [seed for seed in range(seeds) if not results.find(**identity, seed=seed)]
        fields = {"k": k, "learning_rate": rate, **plan}
        if python is not None:
            for seed in missing:
                results.add(**identity, seed=seed, **train_peer(bench, name, python, fields, seed))
        elif missing:
            for seed, score in enumerate(train_ours(bench, seeds, fields | OURS[name])):
                if seed in missing:
                    results.add(**identity, seed=seed, **score)

    best = {}
    for name, python in trainers.items():
        for rate in args.rates:
            train(name, python, TUNED_AT, rate, 1)

        def on_validation(rate: float, name: str = name, ours: bool = python is None) -> tuple[bool, float]:
            (row,) = results.find(name=name, k=TUNED_AT, learning_rate=rate, seed=0, **plan)
            return not ours or row["dead"] <= MOST_DEAD, row["validation"]

        best[name] = max(args.rates, key=on_validation)
    table: dict[str, Any] = {"rates": best, "explained_variance": {}, "dead": {}, "l0": {}, "spread": {}}
    for k in args.ks:
        for name, python in trainers.items():
            train(name, python, k, best[name], args.seeds if python is None else args.peer_seeds)
            rows = results.find(name=name, k=k, learning_rate=best[name], **plan)
            for column, key in (("explained_variance", "test"), ("dead", "dead"), ("l0", "l0")):
                table[column].setdefault(name, {})[k] = round(float(np.mean([row[key] for row in rows])), 4)
            table["spread"].setdefault(name, {})[k] = round(float(np.ptp([row["test"] for row in rows])), 4)
    return table | {**plan, "seeds": args.seeds, "peer_seeds": args.peer_seeds}


def ablation(bench: Bench, results: Results, args: argparse.Namespace) -> dict[str, Any]:
    """Train ours with one part switched off at a time, at k = 32."""
    table = {}
    for name, fields in ABLATIONS.items():
        plan = {"epochs": args.epochs, "batch": args.batch, "learning_rate": args.rates[0], "k": TUNED_AT}
        identity = {"name": f"ablation: {name}", **plan}
        if len(results.find(**identity)) < args.seeds:
            for seed, score in enumerate(train_ours(bench, args.seeds, plan | fields)):
                if not results.find(**identity, seed=seed):
                    results.add(**identity, seed=seed, **score)
        rows = results.find(**identity)
        table[name] = {key: round(float(np.mean([row[key] for row in rows])), 4) for key in ("test", "dead", "l0")}
    return {"ablation": table, "epochs": args.epochs, "learning_rate": args.rates[0], "seeds": args.seeds}


def list_settings(config: Config, axis: str) -> list[dict[str, Any]]:
    """List the settings of an axis: changes of the section sae that are possible and that change something."""
    c, F = config.sae, config.latents
    settings: dict[str, list[dict[str, Any]]] = {
        "views": [{"views": views} for views in (1, 2, 4)],
        "weight_decay": [{"weight_decay": decay} for decay in (0.1, 0.3, 1.0)],
        "k": [{"k": k} for k in (c.k // 2, 2 * c.k) if 0 < k <= F],
        "expansion": [{"latents": latents} for latents in (F // 4, F // 2, 2 * F) if latents >= c.k],
        "prefixes": [{"prefixes": prefixes} for prefixes in ((), (0.25,), (0.0625, 0.25))],
    }
    return [setting for setting in settings[axis] if c.model_copy(update=setting) != c]


class Plan(NamedTuple):
    """A training of `generalise`: the fields that it changes, what identifies its rows, and its config."""

    setting: dict[str, Any]
    recipe: str
    config: Config


def plan_settings(trained: TrainedModel, data: str, axes: Sequence[str], passes: int) -> list[Plan]:
    """Plan the training of the config's own section sae, and one for each setting of the axes.

    Args:
      trained: the model, with the config.
      data: a hash of the dataset.
      axes: some of AXES.
      passes: epochs over the images themselves; with several views there are fewer epochs over all views.
    """
    config, plans = trained.config, []
    made_from = (fingerprint_params(trained.params), data, config.seed)
    for setting in [{}, *(setting for axis in axes for setting in list_settings(config, axis))]:
        sae = config.sae.model_copy(update=setting)
        sae = sae.model_copy(update={"epochs": max(1, round(passes / sae.views))})
        recipe = sha256_of(*made_from, sae.model_dump(mode="json", exclude={"seeds", "memory"}))[:12]
        planned = Config.model_validate(config.model_copy(update={"sae": sae}).model_dump())
        plans.append(Plan(setting, recipe, planned))
    return plans


def train_plan(
    plan: Plan, source: JoinedResiduals, plain: Mapping[str, Residuals], trained: TrainedModel, test: Split
) -> Iterator[dict[str, float]]:
    """Train the autoencoders of a plan, and yield the figures of each seed.

    Args:
      source: the residuals of at least as many views as it takes.
      plain: the residuals of the images themselves, by split.
      trained: the model.
      test: the images of the test split.
    """
    c, views = plan.config.sae, JoinedResiduals(source.parts[: plan.config.sae.views])
    with tempfile.TemporaryDirectory() as directory:
        begin = time.perf_counter()
        members = sae_train.train_members(
            plan.config, sae_train.seed_members(c), views, Path(directory), str(plan.setting)
        )
        seconds = (time.perf_counter() - begin) / c.seeds
    autoencoders = members.autoencoders(c.inference_k)
    agreement = measure_replacement(trained, autoencoders, test).gate_agreement
    steps = c.epochs * (views.shape[0] // c.batch)
    for seed in range(c.seeds):
        figures = {"gate_agreement": float(agreement[seed]), "steps": steps, "seconds": round(seconds, 1)}
        yield score(autoencoders.member(seed), plain) | figures


def generalise(source: str, results: Results, args: argparse.Namespace, overrides: Mapping[str, str]) -> dict[str, Any]:
    """Train autoencoders of a run's model with one field changed at a time, each with the same number of steps."""
    workdir = locate_run(source, "RUN")
    config = read_config(workdir)
    check_done(config, workdir, "train", "benchmarks/sae.py")
    config, dataset = load_run_dataset(config, workdir, None, "--config.data.path of headsteer run")
    for path, text in overrides.items():
        config = override(config, path, text)
    seeds, passes = args.seeds or 1, args.epochs or config.sae.epochs
    sae = config.sae.model_copy(update={"seeds": seeds, "control": False, "pretrained": ""})
    config = config.model_copy(update={"sae": sae})
    check_steerable(config)
    trained = load_trained(config, len(dataset.class_names), workdir / "train")
    plans = plan_settings(trained, hash_data(dataset), args.axes, passes)

    def find_rows(plan: Plan) -> list[dict[str, Any]]:
        return [row for row in results.find(recipe=plan.recipe) if row["seed"] < seeds]

    if missing := [plan for plan in plans if len(find_rows(plan)) < seeds]:
        cache, most = activation_cache(config, workdir), max(plan.config.sae.views for plan in missing)
        plain = {name: load_residuals(cache, trained, dataset, name, sae.tokens) for name in SPLITS}
        viewed = override(config, "sae.views", str(most))
        views = load_training_residuals(cache, trained._replace(config=viewed), dataset, sae.tokens, plain["train"])
    for plan in missing:
        for seed, figures in enumerate(train_plan(plan, views, plain, trained, dataset.test)):
            if not results.find(recipe=plan.recipe, seed=seed):
                results.add(name="generalise", setting=plan.setting, recipe=plan.recipe, seed=seed, **figures)

    columns = ("steps", "train", "validation", "test", "dead", "l0", "gate_agreement", "seconds")
    table = []
    for plan in plans:
        rows = find_rows(plan)
        means = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in columns}
        table.append({"setting": plan.setting, **means, "spread": round(float(np.ptp([r["test"] for r in rows])), 4)})
    print(f"| setting | {' | '.join(columns)} | spread on test |\n|{'---|' * (len(columns) + 2)}")
    for means in table:
        name = ", ".join(f"{field} {value}" for field, value in means["setting"].items()) or "the section itself"
        print(f"| {name} | {' | '.join(f'{means[column]:g}' for column in (*columns, 'spread'))} |")
    return {"table": table, "epochs": passes, "seeds": seeds, "sae": sae.model_dump(mode="json")}


def time_call(call: Callable[[], Any]) -> float:
    """Measure the seconds of one call."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def speed(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Time a training step, the encoder's one matrix product and the peers' steps, in turns."""
    steps, F, D = args.steps, 8 * bench.width, bench.width
    u_GD = jnp.asarray(scale_input(bench.scaling, bench.x["train"][: steps * args.batch]))
    W_FD = jax.random.normal(jax.random.key(0), (F, D))
    product = jax.jit(lambda u, W: u @ W.T)

    def trainer(seeds: int, **fields: Any) -> Callable[[], Any]:
        c = bench.config(seeds=seeds, control=False, batch=args.batch, k=TUNED_AT, **fields).sae
        members = sae_train.seed_members(c)
        members = sae_train.pad_members(members, members_mesh(len(members.k), MachineConfig()).shape["member"])
        state = [sae_train.init_state(c, members, u_GD, F, 0)]
        run = sae_train.make_epoch_program(c, members, D, steps, 0)

        def epoch() -> Any:
            state[0], _ = run(state[0], u_GD)
            return state[0].sae

        return epoch

    ours = {
        "step": trainer(1),
        "step_of_5_seeds": trainer(5),
        "step_batch_topk": trainer(1, activation="batch_topk"),
    }
    calls: dict[str, Callable[[], Any]] = {"product": lambda: [product(u_GD[: args.batch], W_FD) for _ in range(steps)]}
    calls |= ours
    times: dict[str, list[float]] = {name: [] for name in [*calls, *args.peers]}
    for call in calls.values():
        time_call(call)  # compiles
    for repeat in range(args.repeats):
        print(f"repeat {repeat + 1} of {args.repeats}", file=sys.stderr, flush=True)
        for name, call in calls.items():
            times[name].append(time_call(call) / steps)
        for name, python in args.peers.items():
            options = [f"--time-steps={steps}", f"--k={TUNED_AT}", f"--latents={F}", f"--batch={args.batch}"]
            options += ["--variant=batch_topk"] if "batch_topk" in name else []
            times[name].append(run_peer(bench, name, python, *options)[0]["seconds_per_step"])
    median = {name: float(np.median(values)) for name, values in times.items()}
    per_second = {name: args.batch / median[name] for name in ("step", *args.peers)}
    figures = {
        "device": str(jax.devices()[0]),
        "seconds": {name: round(value, 5) for name, value in median.items()},
        "vectors_per_second": {name: round(value) for name, value in per_second.items()},
        "step_over_product": round(median["step"] / median["product"], 2),
        "seeds_5_over_1": round(median["step_of_5_seeds"] / median["step"], 2),
    }
    if args.peers:
        figures["over_fastest_peer"] = round(per_second["step"] / max(per_second[name] for name in args.peers), 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("vectors", "speed", "quality", "ablation", "generalise"))
    parser.add_argument("source", metavar="VECTORS.npz or RUN")
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--config", default="configs/tiny_imagenet100_vit_s.py")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--ks", type=lambda text: [int(k) for k in text.split(",")], default=[8, 16, 32, 64])
    parser.add_argument("--rates", type=lambda text: [float(rate) for rate in text.split(",")], default=list(RATES))
    parser.add_argument("--axes", type=parse_names, default=AXES, help=f"of {', '.join(AXES)}")
    parser.add_argument("--epochs", type=int, help="of a training; by default 100, or sae.epochs of the run")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seeds", type=int, help="by default 5, or 1 for generalise")
    parser.add_argument("--peer-seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    args, unparsed = parser.parse_known_args()
    args.peers = dict(peer.split("=", 1) for peer in args.peer)
    known = {"vectors": r"--config\..+=", "generalise": r"--config\.sae\..+="}.get(args.benchmark)
    if unknown := [item for item in unparsed if known is None or not re.match(known, item)]:
        parser.error(f"unknown: {' '.join(unknown)}")
    overrides = dict(item.removeprefix("--config.").split("=", 1) for item in unparsed)
    if args.benchmark == "vectors":
        make_vectors(Path(args.source), load_config(args.config, overrides))
        return
    if args.benchmark != "speed" and args.results is None:
        parser.error(f"{args.benchmark} needs RESULTS.jsonl")
    if args.benchmark == "generalise":
        if not set(args.axes) <= set(AXES):
            parser.error(f"--axes={','.join(args.axes)}: choose from {', '.join(AXES)}")
        figures = generalise(args.source, Results(args.results), args, overrides)
    else:
        args.epochs, args.seeds = args.epochs or 100, args.seeds or 5
        bench = Bench(Path(args.source))
        if args.benchmark == "speed":
            figures = speed(bench, args)
        else:
            figures = {"quality": quality, "ablation": ablation}[args.benchmark](bench, Results(args.results), args)
    print(json.dumps({"benchmark": args.benchmark, "cores": os.cpu_count(), **figures}))


if __name__ == "__main__":
    main()
