"""What an experiment is: every number that it depends on, documented, typed and checked at the start.

A config file defines `get_config() -> Config`. The sections are in the order of the data flow. They are frozen, hence
hashable: a section can be a static argument of a jitted function. A field's docstring is its help text.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]  # a fraction that cannot be 0
Finite = Annotated[float, Field(allow_inf_nan=False)]

MOST_HEADS = 12  # of a layer whose 2^H head subsets are all tried

SIZES = {"Ti": (12, 192, 3), "S": (12, 384, 6), "B": (12, 768, 12)}  # depth, width, heads [ViT, DeiT]


class Section(BaseModel):
    """One group of fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class DataConfig(Section):
    """Which images, and how they reach the model."""

    source: str = "double_digits"
    """A name in headsteer_jax.data.sources.SOURCES. double_digits: two handwritten digits on a canvas (from
    scikit-learn); tfds: a TensorFlow Datasets name, or a prepared directory; folder: <path>/train/<class>/*.jpg and
    <path>/test/<class>/*.jpg; npz: one file with train_images, train_labels, test_images, test_labels and, optionally,
    class_names."""
    name: str = ""
    """tfds only: the dataset's name, such as cifar100."""
    path: str = ""
    """tfds: the directory that holds the prepared dataset (empty: TFDS's default); folder, npz: where the data are."""
    image_size: PositiveInt = 20
    """Side in pixels of the square image that the model sees. Other sizes are resized to it."""
    channels: Literal[1, 3] = 1
    """1 for grey images, 3 for colour."""
    mean: tuple[Finite, ...] = (0.0,)
    """Per channel, in units of the full scale (0 to 1): subtracted from every pixel."""
    std: tuple[PositiveFloat, ...] = (1.0,)
    """Per channel, likewise: every pixel is divided by it."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of each class's training images that is cut off for validation, before anything is fitted. double_digits:
    the share of the training part's source digits."""
    train_per_class: NonNegativeInt = 0
    """At most so many training images of each class, the first ones by a seeded permutation; 0: all. double_digits: the
    number of canvases composed for each class (0: 400)."""
    eval_per_class: NonNegativeInt = 0
    """The same for validation and test; 0: all (double_digits: 100)."""
    crop_padding: NonNegativeInt = 2
    """Training: the image is shifted by up to so many pixels each way (a random crop of the zero-padded image)."""
    crop_scale: Share = 1.0
    """Training: a random square of at least this share of the image's area is resized to image_size; 1: off."""
    flip: bool = False
    """Training: mirror left and right with probability 1/2."""
    related: tuple[str, ...] = ()
    """Groups of classes known to be alike, each `group=class|class|...`: the report compares pairs within a group with
    all others. Empty: what the dataset itself knows (double_digits: a common digit; TFDS: coarse_label)."""
    rand_augment_ops: NonNegativeInt = 0
    """Training: RandAugment operations (arXiv:1909.13719) applied to each image; 0: off, 2 is usual at 224 pixels."""
    rand_augment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """RandAugment's strength, 0 to 10."""


class ModelConfig(Section):
    """The vision transformer [ViT]: pre-norm blocks and a CLS token. SIZES in this file lists the usual shapes."""

    patch: PositiveInt = 4
    """Side of a patch in pixels; it divides data.image_size. T = 1 + (image_size / patch)^2 tokens."""
    depth: PositiveInt = 4
    """Blocks, L."""
    width: PositiveInt = 96
    """Residual stream's width, D."""
    heads: PositiveInt = 6
    """Attention heads in each block, H; it divides width."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of the MLP over D."""
    layer_norm_epsilon: PositiveFloat = 1e-6
    """1e-6 in published vision transformers; PyTorch's default is 1e-5."""
    gelu: Literal["exact", "tanh"] = "exact"
    """exact (erf): timm's and Hugging Face's checkpoints; tanh: the original JAX checkpoints."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrix products are computed in. Parameters, LayerNorm, softmax, gates and logits stay float32."""
    registers: NonNegativeInt = 0
    """Register tokens between CLS and the patches, without positions (arXiv:2309.16588); DINOv2's `reg4` files: 4."""
    pretrained: str = ""
    """The backbone's file: .safetensors or .pth (the extra `torch`) under the names of timm or of Hugging Face's
    ViTModel and Dinov2Model, or .npz of google-research/vision_transformer; or hf://owner/model (the extra `hub`),
    whose model.safetensors it is, or hf://owner/model/FILE. Empty: from scratch."""
    pretrained_head: bool = False
    """Keep the file's classifier, which must then have the dataset's classes; otherwise it starts anew."""

    @classmethod
    def of_size(cls, size: Literal["Ti", "S", "B"], **fields: Any) -> Self:
        """A usual size by its letter, other fields as given."""
        depth, width, heads = SIZES[size]
        return cls(depth=depth, width=width, heads=heads, **fields)


class GateConfig(Section):
    """The decision network in each gated layer, and the pressure on it [AdaViT]."""

    first_layer: PositiveInt = 1
    """Layers before this one keep all their heads ([AdaViT]: only layer 0 does)."""
    layer_norm: bool = False
    """Normalise the CLS residual before the gate. Without it the gate logit is affine in the steering strength."""
    dropped: Literal["zero", "identity"] = "zero"
    """What a dropped head does. zero: its output is 0; identity: each token attends to itself, so its value passes."""
    bias: Finite = 2.0
    """The gates' bias at the start: open enough that the pretrained features survive the switch-on."""
    temperature: PositiveFloat = 1.0
    """tau in sigmoid((m + noise) / tau), whose gradient the straight-through estimator uses; [AdaViT]'s code: 5."""
    noise: NonNegativeFloat = 1.0
    """Scale of the logistic noise while training, before annealing; 0: thresholded gates from the start."""
    target: Share = 0.75
    """Share of heads to keep."""
    scope: Literal["layer", "mean"] = "layer"
    """Each gated layer has the target, or only the mean over all gated layers has."""
    loss: Literal["absolute", "squared"] = "absolute"
    """|usage - target| ([AdaViT]'s code) or its square ([AdaViT]'s paper)."""
    weight: NonNegativeFloat = 2.0
    """Weight of the usage loss."""
    learning_rate_scale: PositiveFloat = 1.0
    """Learning rate of the gates over that of all else. Above 1 where the rest is pretrained and learns slowly: a gate
    moves in proportion to its input, and early residuals are small."""
    anneal: Fraction = 0.62
    """Over this first share of the gated phase the noise falls linearly to 0 and the target from 1 to its value. What
    is left trains thresholded gates: sampled and thresholded gates are two different models."""


class PhaseConfig(Section):
    """One training phase: linear warm-up, then a cosine to `final` times the peak."""

    steps: NonNegativeInt
    """Optimizer steps; 0: no such phase."""
    learning_rate: PositiveFloat = 1e-3
    """The peak."""
    warmup: Fraction = 0.05
    """Share of the phase's steps that the learning rate takes to rise from 0."""
    final: Fraction = 0.0
    """Last learning rate over the peak."""


class TrainConfig(Section):
    """AdamW on cross-entropy plus the usage loss: first dense, then with gates."""

    batch: PositiveInt = 128
    """Images in a step, B."""
    dense: PhaseConfig = PhaseConfig(steps=1500)
    """All heads on."""
    gated: PhaseConfig = PhaseConfig(steps=800)
    """Gates on, from where the dense phase ended."""
    dense_control: bool = True
    """Also continue the dense model by the gated phase's plan: the dense model of the same length."""
    use: Literal["last", "best"] = "last"
    """Which checkpoint of the gated phase later stages read: the last, or the best on validation after annealing."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's, on matrices only."""
    clip: PositiveFloat = 1.0
    """Largest global norm of the gradient."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the label spread over all classes."""
    mixup: NonNegativeFloat = 0.0
    """alpha of mixup's Beta distribution (arXiv:1710.09412); 0: off."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the parameters' exponential moving average, which is then what is evaluated and kept; 0: off."""
    accumulate: PositiveInt = 1
    """Parts in which a step's batch is computed one after the other, for less memory: their gradients' mean is the
    batch's, but for the usage loss, which each part takes of its own images."""
    eval_batch: PositiveInt = 1000
    """Images in a forward pass of evaluation, in every stage."""
    steps_per_call: PositiveInt = 25
    """Steps in one jitted call, whose batches are sent together; one row of metrics.jsonl holds their means."""
    eval_every: PositiveInt = 250
    """Steps between evaluations on the validation split, and between checkpoints; a multiple of steps_per_call."""


class SAEAblationConfig(Section):
    """Parts of the autoencoder's training recipe that only an ablation switches off."""

    unit_gradient: bool = True
    """Scale each step's gradient to norm 1 before Adam, whose memory of the first, much larger gradients would slow the
    next thousand steps."""
    init: Literal["tied", "data", "untied"] = "tied"
    """How training starts. tied: random decoder rows, and the encoder equals the decoder; data: the decoder rows are
    training residuals, and the encoder equals them; untied: the encoder is drawn independently."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """unit: decoder rows get norm 1 after each step, and their gradient loses its radial part; free: neither."""
    centre: bool = True
    """Subtract the training mean first. Without it most latents die."""
    scale: bool = True
    """Divide by one number, so that the mean norm is sqrt(D)."""


class SAEConfig(Section):
    """The sparse autoencoder of the residual that enters one layer."""

    layer: int = -1
    """The layer whose input it reads; negative counts from the end (-1: the last, [LH26]'s)."""
    tokens: Literal["cls", "patches", "all"] = "cls"
    """Whose residuals it is trained on: the CLS token's, which the gate reads, every patch's, or both. Steering
    changes the CLS residual whichever it is."""
    expansion: PositiveInt = 8
    """Latents over width: F = expansion * D ([LH26]: 384 -> 3072)."""
    activation: Literal["topk", "batch_topk", "jumprelu", "relu"] = "topk"
    """topk: the k largest of each image (arXiv:2406.04093); batch_topk: the B k largest of a batch, and a threshold
    afterwards (arXiv:2412.06410); jumprelu: above a threshold that each latent learns (arXiv:2407.14435); relu: the
    baseline, with an L1 penalty. Latents are never negative."""
    k: PositiveInt = 32
    """Active latents for each image (not known in [LH26]): exactly (topk), on average (batch_topk), as a target
    (jumprelu); relu has none."""
    prefixes: tuple[Share, ...] = ()
    """Matryoshka (arXiv:2503.17547): the first of so large shares of the latents must reconstruct by themselves as
    well, for instance 0.0625,0.25. Empty: off."""
    seeds: PositiveInt = 3
    """Autoencoders trained side by side from different initialisations; every steering figure is made with each."""
    epochs: PositiveInt = 100
    """Passes over the training split's residuals."""
    batch: PositiveInt = 1024
    """Residuals in a step; at most one for each training residual."""
    learning_rate: PositiveFloat = 4e-4
    """Adam's peak."""
    warmup: Fraction = 0.05
    """Share of all steps for the rise."""
    decay: Fraction = 0.2
    """Share of all steps, the last ones, over which the learning rate falls linearly to 0."""
    k_start: NonNegativeInt = 0
    """topk, batch_topk: active latents at the start, annealed linearly to k; 0: k throughout."""
    k_anneal: Fraction = 0.2
    """Share of all steps for that."""
    aux_k: NonNegativeInt = 0
    """Dead latents that reconstruct the residual in AuxK; 0: D / 2."""
    aux_weight: NonNegativeFloat = 1 / 32
    """Weight of AuxK's loss; 0: off."""
    dead_window: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    """Epochs, or a share of one, without firing after which a latent counts as dead."""
    dense_frequency: Share = 0.1
    """A latent that fires on more than this share of the images counts as dense."""
    l1_weight: NonNegativeFloat = 0.05
    """relu: weight of the latents' sum, each times its decoder row's norm, over sqrt(D)."""
    l0_weight: NonNegativeFloat = 1.0
    """jumprelu: weight of (L0 / k - 1)^2."""
    bandwidth: PositiveFloat = 0.5
    """jumprelu: width of the kernel by which the thresholds' gradient is estimated, in the scaled input's units."""
    pretrained: str = ""
    """Take an autoencoder from elsewhere instead of training: saelens:DIR or overcomplete:FILE.safetensors. Its
    activation, k and number of latents must be this config's, and seeds 1."""
    control: bool = True
    """Train one more, from the first seed's initialisation on another order of the data: how alike two autoencoders
    are that began as one, beside which the likeness of different seeds is read."""
    memory: PositiveInt = 4096
    """MiB of residuals that training holds at once; of more, blocks in a new random order each epoch, a third of that
    at a time."""
    ablation: SAEAblationConfig = SAEAblationConfig()
    """Parts of the training recipe that can be switched off."""

    @property
    def inference_k(self) -> int | None:
        """The k of TopK; None where thresholds decide."""
        return self.k if self.activation == "topk" else None


class GridConfig(Section):
    """The stage `grid`: autoencoders of several k and learning rates, trained together as one program."""

    k: tuple[PositiveInt, ...] = ()
    """Each with every learning rate. Empty: half of sae.k, sae.k and twice sae.k, where there are as many latents."""
    learning_rates: tuple[PositiveFloat, ...] = ()
    """Peaks; empty: sae.learning_rate."""
    seeds: PositiveInt = 2
    """Of each."""
    epochs: NonNegativeInt = 0
    """Passes; 0: sae.epochs."""


class SteerConfig(Section):
    """Which latents are changed, how, and by how much."""

    strategies: tuple[str, ...] = ("class", "global", "random", "matched_random", "gate_aligned")
    """Ways to choose latents: names in headsteer_jax.latents.STRATEGIES, or `module:function` of your own, which is
    called as function(latent statistics, class) and returns the latents and their weights."""
    latents: PositiveInt = 16
    """Latents that a strategy chooses for each class, |S| (not known in [LH26])."""
    max_frequency: Share = 1.0
    """Latents that fire on more than this share of the training images are never chosen: dense ones are no concepts."""
    pool: PositiveInt = 128
    """gate_aligned: the class's most frequent latents, of which it chooses."""
    price: PositiveFloat = 0.02
    """gate_aligned: accuracy that a class may give up for the whole layer's usage at alpha 1; it grows with alpha."""
    evidence: PositiveInt = 200
    """gate_aligned: training images of each class, beside those of validation, whose answers under every gate pattern
    say which heads the class can spare."""
    mode: Literal["add", "scale", "clamp", "ablate"] = "add"
    """add: z + alpha s, s the latent's mean activation where it fires; scale: (1 + alpha) z; clamp: alpha s; ablate:
    (1 - alpha) z with alpha cut to [0, 1]. Latents stay >= 0."""
    form: Literal["delta", "replace"] = "delta"
    """delta: x + decode(z') - decode(z), which keeps the autoencoder's error; replace: decode(z')."""
    target: Literal["policy", "residual"] = "policy"
    """policy: only the gate reads the steered x' ([LH26]'s); residual: the block computes on it too."""
    alphas: tuple[Finite, ...] = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    """Strengths; 0, the unsteered model, is added where it is missing."""
    wanted_usage: tuple[Fraction, ...] = (0.75, 0.5, 0.25)
    """Usages for which the smallest alpha that reaches them is found, where alpha is exact."""
    classes: tuple[str, ...] = ()
    """Steer and score only images of these classes; empty: all."""
    least_validation: PositiveInt = 5
    """Validation images that every steered class must have: alpha is chosen on them."""
    tolerance: Fraction = 0.01
    """Accuracy that the choice of alpha on validation may give up."""
    saving: Fraction = 0.2
    """A class is `saved` when its usage falls by at least this much at no loss of accuracy."""
    bootstrap: PositiveInt = 1000
    """Resamplings behind each confidence interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the intervals."""
    subsets: Annotated[int, Field(ge=64, le=4096)] = 512
    """Above 12 heads not all 2^H head subsets can be tried: the controls try so many of them, of every size."""


class LayersConfig(Section):
    """How steerable each gated layer is: `class` steering of every layer by itself, and of all at once."""

    layers: tuple[int, ...] = ()
    """Gated layers, each with its own autoencoder; negative counts from the end. Empty: all of them."""
    epochs: PositiveInt = 20
    """Passes of each layer's autoencoder, of one seed; the rest is as in `sae`."""
    alphas: tuple[Finite, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Strengths; every one is a forward pass of the layers from the steered one on."""
    per_class: NonNegativeInt = 20
    """Validation and test images of each class; 0: all."""


class ReportConfig(Section):
    """What the page shows."""

    top_classes: PositiveInt = 12
    """Rows of the ranking of classes by saving at no loss, and classes whose latents are shown."""
    top_latents: PositiveInt = 4
    """Latents shown for each of those classes."""
    top_images: PositiveInt = 8
    """Images shown for each latent; on latents.html at most 16."""
    inside: PositiveInt = 500
    """Latents that latents.html shows with their images, the most class-selective; the others with numbers only."""
    dpi: Annotated[int, Field(ge=50, le=600)] = 110
    """Resolution of the PNG figures."""


class MachineConfig(Section):
    """On what it runs and how: no figure depends on it beyond float32's rounding, so any of it may change on resume."""

    data: NonNegativeInt = 0
    """Devices along the mesh's data axis, over which training deals out each batch; 0: all there are, over fsdp."""
    fsdp: PositiveInt = 1
    """Devices along its fsdp axis, over which the batch is dealt out too and large parameters, their averages and the
    optimizer's state are cut into parts: for models that do not fit one device. 1: every device has all of them."""
    scan_layers: bool = False
    """Compile one block and loop over the layers: compiling takes a fraction of the time, a step slightly longer."""
    remat: bool = False
    """Compute each block's intermediates again in the backward pass instead of keeping them: less memory, a third more
    work."""
    keep: PositiveInt = 2
    """Checkpoints of each phase that are kept, the newest; the best on validation is kept beside them."""
    prefetch: PositiveInt = 2
    """Training calls whose batches are decoded and sent to the devices ahead, each in a thread of its own."""
    profile: bool = False
    """Write a jax.profiler trace of one training call of each phase to <workdir>/train/profile."""
    image_memory: PositiveInt = 4096
    """MiB. A split that takes less when decoded is held in memory; of a larger one each batch is decoded in threads."""
    activation_cache: str = ""
    """Where residuals are kept: a directory, or gs://bucket/path. Other runs of the same model and data read them
    too. Empty: activations in the workdir."""
    sweep_memory: PositiveInt = 1024
    """MiB of a device that one call of a sweep may use beside the parameters; it takes fewer images or alphas at once
    if they do not fit."""
    sweep_chunk: PositiveInt = 250
    """The most images of a device in one call of a sweep; a few hundred stay in a CPU's cache, a GPU takes more."""
    peak_tflops: NonNegativeFloat = 0.0
    """A device's peak in model.dtype, of which the log gives the share in use (model FLOPs utilisation, MFU). 0: by the
    device's name, where it is known (TPU v4 to v6e; A100, L4, H100, H200)."""


class Config(Section):
    """A whole experiment."""

    seed: NonNegativeInt = 0
    """Everything random follows from it: same seed, same machine, same bits."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    gate: GateConfig = GateConfig()
    train: TrainConfig = TrainConfig()
    sae: SAEConfig = SAEConfig()
    grid: GridConfig = GridConfig()
    steer: SteerConfig = SteerConfig()
    layers: LayersConfig = LayersConfig()
    report: ReportConfig = ReportConfig()
    machine: MachineConfig = MachineConfig()

    @property
    def sae_layer(self) -> int:
        """The layer that the autoencoder reads, counted from 0."""
        return self.sae.layer % self.model.depth

    @property
    def latents(self) -> int:
        """F, the autoencoder's latents."""
        return self.sae.expansion * self.model.width

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        d, m, s, t, gated_steps = self.data, self.model, self.sae, self.steer, self.train.gated.steps
        gated = range(self.gate.first_layer, m.depth)
        for field, value, ok, allowed in (
            ("model.patch", m.patch, d.image_size % m.patch == 0, f"a divisor of data.image_size = {d.image_size}"),
            ("model.heads", m.heads, m.width % m.heads == 0, f"a divisor of model.width = {m.width}"),
            ("data.mean", d.mean, len(d.mean) == d.channels, f"one number for each of data.channels = {d.channels}"),
            ("data.std", d.std, len(d.std) == d.channels, f"one number for each of data.channels = {d.channels}"),
            ("gate.first_layer", self.gate.first_layer, len(gated) > 0, f"below model.depth = {m.depth}"),
            ("model.heads", m.heads, m.heads <= 30, "at most 30"),
            ("steer.strategies", t.strategies, "gate_aligned" not in t.strategies or m.heads <= MOST_HEADS,
             f"without 'gate_aligned', which tries all 2^heads subsets: model.heads = {m.heads}, above {MOST_HEADS}"),
            ("train.eval_every", self.train.eval_every, self.train.eval_every % self.train.steps_per_call == 0,
             f"a multiple of train.steps_per_call = {self.train.steps_per_call}"),
            ("sae.layer", s.layer, -m.depth <= s.layer < m.depth and self.sae_layer in gated,
             f"a gated layer: {gated.start} to {gated.stop - 1}, or from the end -{len(gated)} to -1"),
            ("sae.k", s.k, s.k <= self.latents, f"at most the {self.latents} latents (sae.expansion * model.width)"),
            ("sae.k_start", s.k_start, s.k_start <= self.latents, f"at most the {self.latents} latents"),
            ("sae.aux_k", s.aux_k, s.aux_k <= self.latents, f"at most the {self.latents} latents"),
            ("sae.seeds", s.seeds, not s.pretrained or s.seeds == 1, "1, as sae.pretrained names one autoencoder"),
            ("sae.pretrained", s.pretrained,
             not s.pretrained or s.pretrained.partition(":")[0] in ("saelens", "overcomplete"),
             "saelens:DIR or overcomplete:FILE.safetensors"),
            ("sae.prefixes", s.prefixes, list(s.prefixes) == sorted(set(s.prefixes)), "rising shares, none twice"),
            ("sae.warmup", s.warmup, s.warmup + s.decay <= 1, f"at most 1 - sae.decay = {1 - s.decay:g}"),
            ("grid.k", self.grid.k,
             len(set(self.grid.k)) == len(self.grid.k) and all(k <= self.latents for k in self.grid.k),
             f"no number twice, each at most the {self.latents} latents"),
            ("grid.learning_rates", self.grid.learning_rates,
             len(set(self.grid.learning_rates)) == len(self.grid.learning_rates), "no number twice"),
            ("steer.latents", t.latents, t.latents <= self.latents, f"at most the {self.latents} latents"),
            ("steer.alphas", t.alphas, len(set(t.alphas)) == len(t.alphas) > 0, "at least one number, none twice"),
            ("layers.layers", self.layers.layers,
             all(-m.depth <= layer < m.depth and layer % m.depth in gated for layer in self.layers.layers)
             and len({layer % m.depth for layer in self.layers.layers}) == len(self.layers.layers),
             f"gated layers, none twice: {gated.start} to {gated.stop - 1}, or from the end -{len(gated)} to -1"),
            ("layers.alphas", self.layers.alphas,
             len(set(self.layers.alphas)) == len(self.layers.alphas) > 0 and 0 not in self.layers.alphas,
             "at least one number, none twice, and not 0, which is always there"),
            ("steer.classes", t.classes, len(set(t.classes)) == len(t.classes), "no name twice"),
            ("steer.strategies", t.strategies, len(set(t.strategies)) == len(t.strategies) > 0,
             "at least one name, none twice"),
            ("train.gated.steps", gated_steps, gated_steps > 0, "at least 1: the gates must learn"),
        ):  # fmt: skip
            if not ok:
                raise ValueError(f"{field} = {value!r}: allowed is {allowed}")
        return self
