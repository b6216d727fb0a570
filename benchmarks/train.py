"""Measures how near a training step comes to the matrix-product peak, what gating costs, and PyTorch's speed.

    python benchmarks/train.py [--patches=8,4] [--batches=128,64] [--size=S] [--peer=PYTHON]

The model is a ViT on generated 32x32 images of 100 classes; 8x8 patches make 17 tokens, 4x4 make 65. The peak is
measured in the same run: every matrix product of the training step (the forward pass, the input's gradient, the
kernel's) is timed by itself, as a plain jitted product in its fastest layout, and counted as often as the step has it.
Attention's own small products are counted in the step's FLOPs and are not part of the peak. On an accelerator the model
computes in bfloat16, and MFU is the share of the maker's figure.

--peer is the Python of an environment with PyTorch: the same gated model and step run there, eager and compiled, at
several batch sizes, and the best one counts. Times are medians over repeats, all taken in turns, and the machine should
have nothing else to do. The last line printed is one JSON object with the figures.
"""

import argparse
import collections
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

CLASSES, SIDE, CHANNELS = 100, 32, 3
SIZES = {"Ti": (12, 192, 3), "S": (12, 384, 6), "B": (12, 768, 12)}  # depth, width, heads
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADDING, SMOOTHING, CLIP, DECAY = 4, 0.1, 1.0, 0.05
TARGET, NOISE, PRESSURE, GATE_RATE = 0.8, 0.3, 10.0, 5.0  # of the gates
RATE = 8e-5

Products = dict[tuple[int, int, int], int]  # (rows, in, out) -> how many of them


def forward_products(size: str, patch: int, batch: int) -> Products:
    """Count a forward pass's products with kernels; the last layer's queries, projection and MLP see CLS only."""
    depth, D, _ = SIZES[size]
    tokens = 1 + (SIDE // patch) ** 2
    products: collections.Counter[tuple[int, int, int]] = collections.Counter()
    products[batch * (tokens - 1), patch**2 * CHANNELS, D] += 1
    for layer in range(depth):
        queries = batch * (1 if layer == depth - 1 else tokens)
        products[batch * tokens, D, D] += 2
        products[queries, D, D] += 2
        products[queries, D, 4 * D] += 1
        products[queries, 4 * D, D] += 1
    products[batch, D, CLASSES] += 1
    return dict(products)


class Turns:
    """The times of several calls, which are made in turns and waited for."""

    def __init__(self, calls: dict[Any, Callable[[], Any]]) -> None:
        import jax

        self.wait, self.calls = jax.block_until_ready, calls
        self.times: dict[Any, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            self.wait(call())  # compiles

    def take(self, repeats: int) -> None:
        for _ in range(repeats):
            for name, call in self.calls.items():
                begin = time.perf_counter()
                self.wait(call())
                self.times[name].append(time.perf_counter() - begin)

    def median(self) -> dict[Any, float]:
        return {name: float(np.median(times)) for name, times in self.times.items()}

    def least(self) -> dict[Any, float]:
        return {name: min(times) for name, times in self.times.items()}


def product_calls(products: Products, dtype: str) -> dict[Any, Callable[[], Any]]:
    """Make a call for each product, by (rows, in, out, role, layout); a layout says what is transposed in memory."""
    import jax
    import jax.numpy as jnp

    def dot(a: int, b: int) -> Callable[..., Any]:
        return jax.jit(lambda x, y: jax.lax.dot_general(x, y, (((a,), (b,)), ((), ()))))

    calls: dict[Any, Callable[[], Any]] = {}
    for n, i, o in products:
        x, w, y = (jax.random.normal(jax.random.key(0), shape).astype(dtype) for shape in ((n, i), (i, o), (n, o)))
        xt, wt = jnp.array(x.T), jnp.array(w.T)
        for role, layout, a, b, left, right in (
            ("forward", "x w", 1, 0, x, w),
            ("forward", "x wt", 1, 1, x, wt),
            ("input", "y w", 1, 1, y, w),
            ("input", "y wt", 1, 0, y, wt),
            ("kernel", "x y", 0, 0, x, y),
            ("kernel", "y x", 0, 0, y, x),
            ("kernel", "xt y", 1, 0, xt, y),
        ):
            calls[n, i, o, role, layout] = functools.partial(dot(a, b), left, right)
    return calls


def peak(products: Products, seconds: dict[Any, float]) -> tuple[float, float, float]:
    """Compute the FLOP/s of a forward pass's products, of a training step's, and of the best single one."""
    roles: dict[Any, float] = {}
    for name, value in seconds.items():
        if isinstance(name, tuple):
            roles[name[:4]] = min(value, roles.get(name[:4], np.inf))

    def rate(*selected: str) -> float:
        parts = [(2 * n * i * o * products[n, i, o], s * products[n, i, o]) for (n, i, o, role), s in roles.items()
                 if role in selected]  # fmt: skip
        return sum(flops for flops, _ in parts) / sum(s for _, s in parts)

    best = max(2 * n * i * o / s for (n, i, o, _), s in roles.items())
    return rate("forward"), rate("forward", "input", "kernel"), best


def numpy_rate(products: Products, repeats: int) -> float:
    """Measure the FLOP/s of NumPy's best product of these shapes."""
    rng, best = np.random.default_rng(0), 0.0
    for n, i, o in products:
        x, w = rng.standard_normal((n, i), np.float32), rng.standard_normal((i, o), np.float32)
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            x @ w
            best = max(best, 2 * n * i * o / (time.perf_counter() - begin))
    return best


def our_config(size: str, patch: int, batch: int, dtype: Any) -> Any:
    """Make the config that is timed."""
    from headsteer_jax.config import Config, DataConfig, GateConfig, ModelConfig, PhaseConfig, SAEConfig, TrainConfig

    phase = PhaseConfig(steps=10_000, learning_rate=RATE)
    return Config(
        data=DataConfig(
            source="npz", path="generated", image_size=SIDE, channels=CHANNELS, mean=MEAN, std=STD,
            crop_padding=PADDING, flip=True,
        ),
        model=ModelConfig.of_size(size, patch=patch, dtype=dtype),
        gate=GateConfig(target=TARGET, noise=NOISE, loss="squared", weight=PRESSURE, learning_rate_scale=GATE_RATE),
        train=TrainConfig(batch=batch, dense=phase, gated=phase, weight_decay=DECAY, clip=CLIP),
        sae=SAEConfig(expansion=8),
    )  # fmt: skip


def our_calls(config: Any, steps: int) -> tuple[dict[Any, Callable[[], Any]], float]:
    """Make calls of several training steps, dense and gated, and forward passes; also return XLA's count of FLOPs."""
    import jax
    import jax.numpy as jnp

    from headsteer_jax.data.augment import preprocess
    from headsteer_jax.model.vit import build_model
    from headsteer_jax.train.step import State, init_optimizer, make_schedule, make_training_steps

    phase, batch = config.train.dense, config.train.batch
    model = build_model(config, CLASSES)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (steps, batch, SIDE, SIDE, CHANNELS), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, CLASSES, (steps, batch)).astype(np.int32))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, CHANNELS)))

    def training(gated: bool) -> Callable[[], Any]:
        key = jax.random.key_data(jax.random.key(1))
        state = [State(jax.tree.map(jnp.array, params), None, init_optimizer(config, params), key, jnp.int32(0))]
        run, schedule = make_training_steps(model, config, gated), make_schedule(phase).cut(0, steps)

        def call() -> Any:
            state[0], metrics = run(state[0], schedule, images, labels)
            return state[0].step, metrics

        return call

    forward = jax.jit(lambda params, images: model.apply(params, preprocess(images, config.data))[0])
    counted = forward.lower(params, images[0]).cost_analysis()["flops"]
    calls: dict[Any, Callable[[], Any]] = {"dense": training(False), "gated": training(True)}
    return calls | {"forward": lambda: [forward(params, images[step]) for step in range(steps)]}, counted


def measure(size: str, patch: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one number of tokens: a row of the table."""
    import jax

    from headsteer_jax.model.macs import count_open_macs, peak_tflops

    device = jax.devices()[0]
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    products = forward_products(size, patch, batch)
    config = our_config(size, patch, batch, dtype)
    ours, counted = our_calls(config, args.steps)
    calls = product_calls(products, dtype) | ours
    if args.peer:
        peer = Peer(args.peer, size, patch)
        eager = Turns(peer.calls("eager", args.peer_batches))
        eager.take(2)
        seconds = eager.least()
        best = sorted(args.peer_batches, key=lambda batch: seconds[f"training eager {batch}"] / batch)
        peer_calls = peer.calls("eager", best[:2]) | peer.calls("compiled", best[: args.compiled])
        calls |= peer_calls
    turns = Turns(calls)
    turns.take(args.repeats)
    if args.peer:
        peer.close()

    flops, maker = 2 * batch * count_open_macs(config, CLASSES), peak_tflops(config, device)

    def figures(seconds: dict[Any, float]) -> dict[str, float]:
        step = {name: seconds[name] / args.steps for name in ours}
        forward_peak, training_peak, _ = peak(products, seconds)
        return {
            "forward_of_peak": round(flops / step["forward"] / forward_peak, 3),
            "dense_of_peak": round(3 * flops / step["dense"] / training_peak, 3),
            "gated_of_peak": round(3 * flops / step["gated"] / training_peak, 3),
            "gated_over_dense": round(step["gated"] / step["dense"], 3),
        }

    medians = turns.median()
    forward_peak, training_peak, best = peak(products, medians)
    rates = {name: round(batch * args.steps / medians[name], 1) for name in ours}
    row: dict[str, Any] = {
        "tokens": 1 + (SIDE // patch) ** 2,
        "batch": batch,
        **figures(medians),
        "of_least_times": figures(turns.least()),  # the same from each one's least time: less of other programs in it
        "images_per_second": rates,
        "peak_gflops": {
            "training": round(training_peak / 1e9, 1), "forward": round(forward_peak / 1e9, 1),
            "best_product": round(best / 1e9, 1), "numpy": round(numpy_rate(products, args.repeats) / 1e9, 1),
        },
        "forward_gflop_per_image": round(flops / batch / 1e9, 4),
        "flops_over_xla_count": round(flops / counted, 3),
    }  # fmt: skip
    if maker:
        rate = {name: 3 * flops * args.steps / medians[name] for name in ("dense", "gated")}
        row["mfu"] = {name: round(value / maker / 1e12, 3) for name, value in rate.items()}
    if args.peer:
        peer_rates = {name: round(int(name.split()[2]) / medians[name], 1) for name in peer_calls}
        row["torch"] = {"version": peer.version, "images_per_second": peer_rates}
        for kind, name in (("training", "gated"), ("forward", "forward")):
            fastest = max(rate for call, rate in peer_rates.items() if call.startswith(kind))
            row[f"{kind}_over_torch"] = round(rates[name] / fastest, 2)
    return row


class Peer:
    """PyTorch in a process of its own, which does one call at a time: `training|forward eager|compiled BATCH`."""

    def __init__(self, python: str, size: str, patch: int) -> None:
        command = [python, __file__, "--torch-worker", f"--size={size}", f"--patches={patch}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit("the peer ended: its error is above")
        return line.strip()

    def call(self, name: str) -> None:
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        self._answer()

    def calls(self, kind: str, batches: list[int]) -> dict[Any, Callable[[], Any]]:
        names = [f"{role} {kind} {batch}" for role in ("training", "forward") for batch in batches]
        return {name: functools.partial(self.call, name) for name in names}

    def close(self) -> None:
        self.process.communicate()


def torch_worker(args: argparse.Namespace) -> None:
    """Run the gated model and its step in PyTorch, one call for each line of standard input."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

    (patch,) = args.patches
    depth, D, heads = SIZES[args.size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    if device == "cpu":
        autocast: Callable[[], Any] = functools.partial(torch.autocast, "cpu", enabled=False)
    else:
        autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)

    class Block(nn.Module):
        def __init__(self, gated: bool, last: bool) -> None:
            super().__init__()
            self.last = last
            self.norm1, self.norm2 = (nn.LayerNorm(D, eps=1e-6) for _ in range(2))
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
            self.decide = nn.Linear(D, heads) if gated else None

        def forward(self, x_BTD: Tensor, noise: float) -> tuple[Tensor, Tensor | None]:
            B = len(x_BTD)
            g_BH = None
            if self.decide is not None:
                m_BH = self.decide(x_BTD[:, 0])
                if noise:
                    u_BH = torch.rand_like(m_BH).clamp(1e-6, 1 - 1e-6)
                    m_BH = m_BH + noise * torch.logit(u_BH)
                soft_BH = torch.sigmoid(m_BH)
                g_BH = (m_BH > 0).to(soft_BH.dtype) + (soft_BH - soft_BH.detach())
            n_BTD = self.norm1(x_BTD)
            if self.last:  # the classifier sees CLS only
                q_BQD = functional.linear(n_BTD[:, :1], self.qkv.weight[:D], self.qkv.bias[:D])
                k_BTD, v_BTD = functional.linear(n_BTD, self.qkv.weight[D:], self.qkv.bias[D:]).chunk(2, -1)
                x_BTD = x_BTD[:, :1]
            else:
                q_BQD, k_BTD, v_BTD = self.qkv(n_BTD).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q_BQD, k_BTD, v_BTD))
            y_BHQK = functional.scaled_dot_product_attention(q, k, v)
            if g_BH is not None:
                y_BHQK = y_BHQK * g_BH[:, :, None, None].to(y_BHQK.dtype)
            x_BTD = x_BTD + self.out(y_BHQK.transpose(1, 2).reshape(B, -1, D))
            return x_BTD + self.mlp(self.norm2(x_BTD)), g_BH

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(CHANNELS, D, patch, patch)
            self.cls = nn.Parameter(torch.zeros(1, 1, D))
            self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (SIDE // patch) ** 2, D))
            self.layers = nn.ModuleList(Block(layer > 0, layer == depth - 1) for layer in range(depth))
            self.norm, self.head = nn.LayerNorm(D, eps=1e-6), nn.Linear(D, CLASSES)

        def forward(self, images: Tensor, noise: float) -> tuple[Tensor, Tensor]:
            x_BTD = self.patches(images).flatten(2).transpose(1, 2)
            x_BTD = torch.cat([self.cls.expand(len(x_BTD), -1, -1), x_BTD], 1) + self.positions
            gates = []
            for layer in self.layers:
                x_BTD, g_BH = layer(x_BTD, noise)
                gates += [] if g_BH is None else [g_BH]
            return self.head(self.norm(x_BTD[:, 0])), torch.stack(gates, 1)

    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    def preprocess(images: Tensor) -> Tensor:
        return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def augment(images: Tensor) -> Tensor:
        """Crop each padded image at random, and mirror half of them."""
        B, pixels = len(images), torch.arange(SIDE, device=images.device)
        padded = functional.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
        rows, columns = (torch.randint(2 * PADDING + 1, (B, 1), device=images.device) + pixels for _ in range(2))
        columns = torch.where(torch.rand(B, 1, device=images.device) < 0.5, columns, columns.flip(1))
        return padded[torch.arange(B, device=images.device)[:, None, None], rows[:, :, None], columns[:, None]]

    def loss(model: Any, images: Tensor, labels: Tensor) -> Tensor:
        with autocast():
            logits, g_BAH = model(preprocess(augment(images)), NOISE)
        usage = (g_BAH.mean((0, 2)) - TARGET).square().mean()
        return functional.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING) + PRESSURE * usage

    def variant(batch: int, compiled: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
        torch.manual_seed(0)
        model = ViT().to(device)
        parts: dict[tuple[bool, bool], list[Tensor]] = collections.defaultdict(list)
        for name, parameter in model.named_parameters():
            parts[parameter.ndim == 2, "decide" in name].append(parameter)
        groups = [{"params": p, "weight_decay": DECAY * matrix, "lr": RATE * (GATE_RATE if gate else 1.0)}
                  for (matrix, gate), p in parts.items()]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, fused=True)
        run_loss = torch.compile(loss) if compiled else loss
        images = torch.randint(256, (batch, SIDE, SIDE, CHANNELS), dtype=torch.uint8, device=device)
        labels = torch.randint(CLASSES, (batch,), device=device)

        def training() -> None:
            optimizer.zero_grad(set_to_none=True)
            run_loss(model, images, labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()

        yield "training", training
        run_model = torch.compile(model) if compiled else model

        def forward() -> Tensor:
            with autocast():
                return run_model(preprocess(images), 0.0)[0]

        yield "forward", forward

    calls: dict[str, Callable[[], Any]] = {}
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        role, kind, batch = line.split()
        if line not in calls:
            calls |= {f"{part} {kind} {batch}\n": call for part, call in variant(int(batch), kind == "compiled")}
        with torch.inference_mode(role == "forward"):
            calls[line]()
        if device == "cuda":
            torch.cuda.synchronize()
        print("done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument(
        "--patches", type=numbers, default=[8, 4], help="sides of patches: 8 makes 17 tokens, 4 makes 65"
    )
    parser.add_argument("--batches", type=numbers, default=[], help="one for each patch; default: 128 at 8, 64 at 4")
    parser.add_argument("--steps", type=int, default=2, help="training steps in one call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", metavar="PYTHON", help="the Python of an environment with PyTorch")
    parser.add_argument("--peer-batches", type=numbers, default=[16, 32, 64, 128])
    parser.add_argument(
        "--compiled", type=int, default=1, help="how many of the peer's best batch sizes are compiled too"
    )
    parser.add_argument("--torch-worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_worker:
        torch_worker(args)
        return
    import jax

    batches = args.batches or [{8: 128, 4: 64}.get(patch, 64) for patch in args.patches]
    rows = [measure(args.size, patch, batch, args) for patch, batch in zip(args.patches, batches, strict=True)]
    columns = ["tokens", "batch", "forward_of_peak", "dense_of_peak", "gated_of_peak", "gated_over_dense"]
    print("  ".join(columns))
    for row in rows:
        print("  ".join(f"{row[name]:>{len(name)}}" for name in columns))
    print(json.dumps({"benchmark": "train", "device": str(jax.devices()[0]), "cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
