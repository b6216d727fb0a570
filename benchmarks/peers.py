"""Trains a top-k sparse autoencoder with another library's own classes, for comparison with ours.

    PEER_ENVIRONMENT/bin/python benchmarks/peers.py PEER VECTORS.npz OUT.npz [--k=32] [--latents=3072] [--epochs=10]

PEER is overcomplete, dictionary_learning or sae_lens, or torch for a plain PyTorch loop. This script runs in the peer's
environment and does not need this package. VECTORS.npz holds `train` [N, D], already centred and scaled, and the same
for every peer. The model, the loss, the optimiser's step and the loop are the peer's; only the shuffled batches, which
are in memory, come from here.

OUT.npz holds the result as plain arrays, with a = ReLU((u - apply_b_d * b_d) @ W_e.T + b_e):

    kind topk: z is a's k largest;  kind threshold: z is a where a > threshold;  u_hat = z @ W_d + b_d

Before it is written, this is compared with the peer's own encode and decode. The last line printed is one JSON object.
"""

import argparse
import functools
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TQDM_DISABLE", "1")  # before the peers are imported: progress is the plain line below
try:
    import torch
except ModuleNotFoundError:
    sys.exit("torch is not installed in this environment: pip install torch")
from torch import Tensor
from torch.nn import functional

AUX_WEIGHT = {"overcomplete": 0.1, "dictionary_learning": 1 / 32, "sae_lens": 1.0, "torch": 1 / 32}  # their defaults
UNTIMED = 3  # first steps, which include what is set up on the way
CHECKED = 512  # vectors on which the arrays are compared with the peer's own forward
CLOSE = 1e-5  # distance to the k-th or the threshold, as a share of the largest, within which rounding decides
FAR = 1e-3  # the largest difference that is allowed

Arrays = dict[str, Any]  # an autoencoder's: W_e, b_e, W_d, b_d, threshold, apply_b_d
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]  # z and u_hat, by the peer's own code
Trainer = Callable[[Tensor, Iterator[Tensor], int, argparse.Namespace], tuple[Arrays, Forward]]


def batches(u_ND: Tensor, batch: int, steps: int, seed: int, stamps: list[float]) -> Iterator[Tensor]:
    """Yield shuffled batches, epoch by epoch without the last partial one; `stamps` records when each is asked for."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch, printed = len(u_ND) // batch, time.perf_counter()
    for step in range(steps):
        if step % per_epoch == 0:
            parts = torch.randperm(len(u_ND), generator=generator)[: per_epoch * batch].split(batch)
        stamps.append(time.perf_counter())
        if stamps[-1] - printed > 10:
            printed = stamps[-1]
            print(f"step {step} of {steps}, {(printed - stamps[0]) / step:.2f} s each", file=sys.stderr, flush=True)
        yield u_ND.index_select(0, parts[step % per_epoch])


def ramps(steps: int, args: argparse.Namespace) -> tuple[int, int]:
    """Count the steps of the learning rate's warm-up and of its decay."""
    return round(args.warmup_share * steps), round(args.decay_share * steps)


def scheduler(optimizer: torch.optim.Optimizer, steps: int, args: argparse.Namespace) -> Any:
    """Make a linear warm-up and, at the end, a linear decay, for trainers that take any scheduler."""
    warmup, decay = ramps(steps, args)
    factor = lambda step: min(1.0, (step + 1) / max(warmup, 1), (steps - step) / max(decay, 1))  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def threshold_rate(steps: int) -> float:
    """Compute the rate of BatchTopK's running threshold: a mean over a twentieth of the steps, as defaults are slow."""
    return min(1.0, 20 / steps)


def train_overcomplete(u_ND: Tensor, stream: Iterator[Tensor], steps: int, args: argparse.Namespace) -> Any:
    """Train overcomplete's TopKSAE or BatchTopKSAE with its train_sae and its AuxK loss."""
    from overcomplete.sae import BatchTopKSAE, TopKSAE, train_sae
    from overcomplete.sae.losses import top_k_auxiliary_loss
    from overcomplete.sae.optimizer import CosineScheduler

    across = args.variant == "batch_topk"
    # its BatchTopK counts the active latents of the whole batch
    model = (BatchTopKSAE if across else TopKSAE)(u_ND.shape[1], args.latents, args.k * (args.batch if across else 1))
    if args.encoder == "tied":
        model = model.untied(bias=True)  # its name for an encoder of its own that starts as the dictionary
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)  # the caller's to choose: the fastest
    if args.schedule == "cosine":
        warmup = ramps(steps, args)[0]
        schedule = CosineScheduler(optimizer, args.lr, 0.0, steps, warmup)
        if warmup:
            optimizer.param_groups[0]["lr"] = args.lr / warmup  # it leaves the first step as it is: at the full rate
    else:
        schedule = scheduler(optimizer, steps, args)
    loss = functools.partial(top_k_auxiliary_loss, penalty=args.aux_weight)
    # all epochs as one: between epochs it does nothing but print; monitoring=0 spares it its statistics
    train_sae(model, stream, loss, optimizer, schedule, nb_epochs=1, monitoring=0)
    model.eval()
    W_e, b_e = model.encoder.parameters()
    arrays = {"W_e": W_e, "b_e": b_e, "W_d": model.get_dictionary(), "b_d": torch.zeros(u_ND.shape[1])}
    if across:  # it keeps what equals the threshold
        arrays["threshold"] = np.nextafter(np.float32(model.running_threshold), np.float32(0))
    return {**arrays, "apply_b_d": False}, lambda u_BD: model(u_BD)[1:]


def train_dictionary_learning(u_ND: Tensor, stream: Iterator[Tensor], steps: int, args: argparse.Namespace) -> Any:
    """Train with dictionary_learning's trainSAE and its TopKTrainer or BatchTopKTrainer."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    if args.schedule == "cosine":
        sys.exit("dictionary_learning has no cosine schedule: leave --schedule=linear")
    across, (warmup, decay), built = args.variant == "batch_topk", ramps(steps, args), []

    def build(**config: Any) -> Any:
        """Make the trainer that trainSAE asks for, and keep it, as trainSAE returns none."""
        trainer = (BatchTopKTrainer if across else TopKTrainer)(**config)
        trainer.dead_feature_threshold = args.dead_epochs * len(u_ND)  # else 10 million, which no argument changes
        built.append(trainer)
        return trainer

    config = {
        "trainer": build,
        "steps": steps,
        "activation_dim": u_ND.shape[1],
        "dict_size": args.latents,
        "k": args.k,
        "layer": 0,
        "lm_name": "none",
        "lr": args.lr,
        "auxk_alpha": args.aux_weight,
        "warmup_steps": warmup,
        "decay_start": steps - decay if decay else None,
        "threshold_start_step": min(1000, steps // 2),
        "threshold_beta": 1 - max(0.001, threshold_rate(steps)),
        "seed": args.seed,
        "device": "cpu",
    }
    trainSAE(stream, [config], steps, device="cpu")
    ae = built[0].ae
    arrays = {"W_e": ae.encoder.weight, "b_e": ae.encoder.bias, "W_d": ae.decoder.weight.T, "b_d": ae.b_dec}
    if across:
        arrays["threshold"] = ae.threshold
    return {**arrays, "apply_b_d": True}, lambda u_BD: ae(u_BD, output_features=True)[::-1]


def train_sae_lens(u_ND: Tensor, stream: Iterator[Tensor], steps: int, args: argparse.Namespace) -> Any:
    """Train sae_lens's TopK or BatchTopK autoencoder with its SAETrainer, as it saves it for inference."""
    from sae_lens import (
        SAE,
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        SAETrainer,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig

    model = {
        "d_in": u_ND.shape[1],
        "d_sae": args.latents,
        "k": args.k,
        "aux_loss_coefficient": args.aux_weight,
        "decoder_init_norm": args.decoder_init_norm,
    }
    if args.variant == "batch_topk":
        model["topk_threshold_lr"] = max(0.01, threshold_rate(steps))
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**model))
    else:
        if args.sparse:  # on a CPU its backward pass has no rule for the rescaling of sparse activations
            model |= {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**model))
    (warmup, decay), cosine = ramps(steps, args), args.schedule == "cosine"
    config = SAETrainerConfig(
        total_training_samples=steps * args.batch,
        train_batch_size_samples=args.batch,
        lr=args.lr,
        lr_end=0.0 if cosine else args.lr,
        lr_scheduler_name="cosineannealing" if cosine else "constant",
        lr_warm_up_steps=warmup,
        lr_decay_steps=0 if cosine else decay,
        dead_feature_window=round(args.dead_epochs * (len(u_ND) // args.batch)),  # in steps
    )
    SAETrainer(config, sae, stream).fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)  # it folds the decoder's norms in, and makes BatchTopK a JumpReLU
        sae = SAE.load_from_disk(folder)
    arrays = {"W_e": sae.W_enc.T, "b_e": sae.b_enc, "W_d": sae.W_dec, "b_d": sae.b_dec}
    if args.variant == "batch_topk":
        arrays["threshold"] = sae.threshold
    return {**arrays, "apply_b_d": sae.cfg.apply_b_dec_to_input}, lambda u_BD: (z := sae.encode(u_BD), sae.decode(z))


def train_torch(u_ND: Tensor, stream: Iterator[Tensor], steps: int, args: argparse.Namespace) -> Any:
    """Train by a plain loop: tied start, unit decoder rows, and AuxK of Gao et al. (2024)."""
    if args.variant != "topk" or args.schedule != "linear":
        sys.exit("the plain loop knows only --variant=topk and --schedule=linear")
    W_d = functional.normalize(torch.randn(args.latents, u_ND.shape[1]))
    W_e, b_e, b_d = W_d.clone(), torch.zeros(len(W_d)), torch.zeros(W_d.shape[1])
    parameters = [p.requires_grad_() for p in (W_e, b_e, W_d, b_d)]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)
    schedule, idle_F = scheduler(optimizer, steps, args), torch.zeros(len(W_d))
    window = args.dead_epochs * (len(u_ND) // args.batch)

    def encode(u_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a_BF = functional.relu(functional.linear(u_BD - b_d, W_e, b_e))
        values, places = a_BF.topk(args.k, sorted=False)
        return a_BF, torch.zeros_like(a_BF).scatter(1, places, values), places[values > 0]

    for u_BD in stream:
        a_BF, z_BF, fired = encode(u_BD)
        error_BD = u_BD - z_BF @ W_d - b_d
        loss = error_BD.square().sum(1).mean()
        idle_F += 1
        idle_F[fired] = 0
        dead = (idle_F > window).nonzero()[:, 0]
        if len(dead):
            a_BM = a_BF[:, dead]
            values, places = a_BM.topk(min(len(dead), W_d.shape[1] // 2), sorted=False)
            revived_BD = torch.zeros_like(a_BM).scatter(1, places, values) @ W_d[dead]
            loss = loss + args.aux_weight * (error_BD.detach() - revived_BD).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            W_d /= W_d.norm(dim=1, keepdim=True)
    arrays = {"W_e": W_e, "b_e": b_e, "W_d": W_d, "b_d": b_d, "apply_b_d": True}
    return arrays, lambda u_BD: (z := encode(u_BD)[1], z @ W_d + b_d)


TRAINERS: dict[str, Trainer] = {
    "overcomplete": train_overcomplete,
    "dictionary_learning": train_dictionary_learning,
    "sae_lens": train_sae_lens,
    "torch": train_torch,
}


def fix_imports() -> None:
    """Let peers be imported beside newer packages than they know. Nothing that is fixed takes part in training."""
    if find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # built for CUDA, beside a torch that is not: two operators are missing, which none calls
            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    if find_spec("matplotlib"):
        colours = importlib.import_module("matplotlib.cm")
        if not hasattr(colours, "get_cmap"):  # gone since 3.9; overcomplete 0.3 calls it when imported
            colours.get_cmap = importlib.import_module("matplotlib.pyplot").get_cmap


def exported(arrays: Arrays, scale: float, args: argparse.Namespace) -> Arrays:
    """Convert a peer's arrays to float32; the peer saw the vectors divided by `scale`."""
    kind = "threshold" if "threshold" in arrays else "topk"
    plain = {"threshold": 0.0, **{key: x.detach() if isinstance(x, Tensor) else x for key, x in arrays.items()}}
    result = {key: np.ascontiguousarray(plain[key], np.float32) for key in ("W_e", "b_e", "W_d", "b_d")}
    result["threshold"] = np.asarray(plain["threshold"], np.float32)
    for key in ("b_e", "b_d", "threshold"):  # z and u_hat grow with u, so the weights stay and these follow
        result[key] = result[key] * np.float32(scale)
    return {**result, "k": args.k, "kind": kind, "apply_b_d": plain["apply_b_d"]}


def difference(s: Arrays, u_BD: np.ndarray, z_BF: np.ndarray, u_hat_BD: np.ndarray) -> tuple[float, float]:
    """Return the largest difference between formula and peer, and the share of vectors that rounding decides."""
    a_BF = np.maximum((u_BD - s["apply_b_d"] * s["b_d"]) @ s["W_e"].T + s["b_e"], 0)
    close = CLOSE * a_BF.max()
    if s["kind"] == "topk":
        ordered = np.sort(a_BF, axis=1)
        least_B, next_B = ordered[:, -s["k"]], ordered[:, -s["k"] - 1]
        tied_B = (least_B - next_B < close) & (least_B > close)
        ours_BF = np.where(a_BF >= least_B[:, None], a_BF, 0)
    else:
        tied_B = (np.abs(a_BF - s["threshold"]) < close).any(axis=1)
        ours_BF = np.where(a_BF > s["threshold"], a_BF, 0)
    pairs = (ours_BF, z_BF), (ours_BF @ s["W_d"] + s["b_d"], u_hat_BD)
    return np.max([np.abs(x - y)[~tied_B].max(initial=0) for x, y in pairs]), tied_B.mean()  # NaN where one has it


def check(s: Arrays, forward: Forward, u_ND: Tensor, scale: float, peer: str) -> None:
    """Stop unless the formula reproduces the peer's own forward. `u_ND` is as the peer saw it."""
    u_BD = u_ND[:CHECKED]
    with torch.no_grad():
        z_BF, u_hat_BD = (x.numpy() * np.float32(scale) for x in forward(u_BD))
    largest, tied = difference(s, u_BD.numpy() * np.float32(scale), z_BF, u_hat_BD)
    extent = f"{len(u_BD)} vectors, {tied:.1%} of them too close to call, {(z_BF != 0).sum(axis=1).mean():.1f} active"
    print(f"largest difference {largest:.1e} from {peer} over {extent}", file=sys.stderr)
    if not largest <= FAR or tied > 0.1:  # not <=, as it may be NaN
        sys.exit(f"the arrays do not reproduce {peer}'s own forward: nothing was written")


def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("peer", choices=TRAINERS)
    add("vectors", type=Path)
    add("out", type=Path)
    add("--k", type=int, default=32)
    add("--latents", type=int, default=3072)
    add("--epochs", type=int, default=10)
    add("--batch", type=int, default=1024)
    add("--lr", type=float, default=4e-4)
    add("--seed", type=int, default=0)
    add("--variant", choices=("topk", "batch_topk"), default="topk")
    add("--schedule", choices=("linear", "cosine"), default="linear", help="schedule of the learning rate")
    add("--warmup-share", type=float, default=0.05, help="share of the steps")
    add("--decay-share", type=float, default=0.2, help="share of the steps; not with --schedule=cosine")
    add("--aux-weight", type=float, help="weight of the AuxK loss (default: the peer's)")
    add(
        "--dead-epochs",
        type=float,
        default=3.0,
        help="epochs without firing after which a latent is dead; not overcomplete",
    )
    add("--unit-norm", action="store_true", help="train on vectors of unit mean squared norm, and fold it back")
    add("--encoder", choices=("tied", "linear"), default="tied", help="overcomplete's: starts as the decoder, or apart")
    add("--decoder-init-norm", type=float, default=0.1, help="sae_lens's")
    add("--sparse", action="store_true", help="sae_lens's sparse activations: faster, without decoder norms")
    add("--time-steps", type=int, help="stop after so many steps and only measure: nothing is written")
    args = parser.parse_args()
    args.aux_weight = AUX_WEIGHT[args.peer] if args.aux_weight is None else args.aux_weight
    if not find_spec(args.peer):
        name = args.peer.replace("_", "-")
        sys.exit(f"{args.peer} is not installed in this environment: pip install {name}")
    if not 0 < args.k < args.latents:
        sys.exit(f"--k={args.k} must be from 1 to below --latents={args.latents}")
    return args


def load(args: argparse.Namespace) -> Tensor:
    """Load the vectors to train on, [N, D]."""
    if not args.vectors.is_file():
        sys.exit(f"{args.vectors} is not a file")
    with np.load(args.vectors) as file:
        if "train" not in file:
            sys.exit(f"{args.vectors} holds no `train`")
        u_ND = np.ascontiguousarray(file["train"], np.float32)
    if args.batch > len(u_ND):
        sys.exit(f"--batch={args.batch} is more than the {len(u_ND)} vectors in {args.vectors}")
    return torch.from_numpy(u_ND)


def main() -> None:
    """Train, check, write, and print the figures."""
    args = parse()
    u_ND = load(args)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(args.seed)
    scale = u_ND.square().sum(1).mean().sqrt().item() if args.unit_norm else 1.0
    u_ND = u_ND / scale
    steps = args.time_steps or args.epochs * (len(u_ND) // args.batch)
    if steps <= UNTIMED:
        sys.exit(f"{steps} steps are too few: the first {UNTIMED} are not timed")
    fix_imports()
    stamps: list[float] = []
    arrays, forward = TRAINERS[args.peer](u_ND, batches(u_ND, args.batch, steps, args.seed, stamps), steps, args)
    seconds = np.diff([*stamps, time.perf_counter()])[UNTIMED:]
    rate = len(seconds) * args.batch / seconds.sum()
    if not args.time_steps:
        result = exported(arrays, scale, args)
        check(result, forward, u_ND, scale, args.peer)
        figures = {"seconds": seconds.sum(), "steps_timed": len(seconds), "vectors_per_second": rate}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(args.out, **result, **figures, settings=json.dumps(vars(args), default=str))
    shown = {key: getattr(args, key) for key in ("variant", "k", "epochs", "lr", "seed")}
    shown |= {"vectors_per_second": round(rate, 1), "seconds_per_step": round(float(np.median(seconds)), 4)}
    print(json.dumps({"peer": args.peer, "version": version(args.peer.replace("_", "-")), **shown}))


if __name__ == "__main__":
    main()
