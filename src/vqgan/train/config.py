"""What a training run is told. Inert data; vqgan/presets has values of these classes."""

from dataclasses import dataclass, field
from typing import Literal

from vqgan.adversarial.augment import Augmentation
from vqgan.adversarial.classifier import ClassifierTerm
from vqgan.adversarial.discriminators import DiscriminatorConfig
from vqgan.adversarial.patchgan import PatchGANConfig
from vqgan.data.pipeline import DataConfig
from vqgan.prior.transformer import PriorConfig
from vqgan.tokenizer.model import TokenizerConfig
from vqgan.train.guard import GuardConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam, or AdamW where `weight_decay` is set. The learning rate given is the one used."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    """The defaults are the paper's for stage 1."""
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled, on matrices and kernels only: not on biases, norms, embeddings or codebooks."""
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; "cosine" falls to `final_lr` at the end of the run."""
    final_lr: float = 0.0
    clip_norm: float = 0.0
    """Largest global norm of the gradients; 0 does not clip."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one update; the schedule counts updates."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Stage 1: `reconstruction + perceptual + weight * adversarial + codebook`."""

    reconstruction: Literal["l1", "l2", "bce"] = "l1"
    """Absolute or squared difference; "bce", the binary cross-entropy of classes, is for labels."""
    reconstruction_weight: float = 1.0
    class_weights: tuple[float, ...] = ()
    """Of the classes in "bce", one each; empty means ones."""
    perceptual: Literal["vgg16", "alexnet"] = "vgg16"
    """The network of LPIPS."""
    perceptual_weight: float = 1.0
    classifier: str = ""
    """Directory, or owner/name on the hub, of a saved classifier, such as an imported ResNet, for a
    second perceptual term."""
    classifier_weight: float = 0.0
    """Of that term. VQGAN+ has 0.1, and LPIPS's weight at 0."""
    classifier_term: ClassifierTerm = "logits"
    """Compare its logits, or its feature maps too."""
    codebook_weight: float = 1.0
    adversarial: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    adversarial_weight: float = 0.8
    adaptive: bool = True
    """Multiply `adversarial_weight` by the paper's ratio of gradient norms at the last layer."""
    disc_start: int = 250_001
    """The step from which the generator sees the discriminator; -1 means never."""
    disc_start_fraction: float = 0.0
    """Where it is not 0: `disc_start` as a fraction of `run.steps`, in its place."""
    disc_ramp: int = 0
    """Steps from `disc_start` on over which the adversarial weight grows linearly to its own."""
    disc_warmup: int = 0
    """Steps before `disc_start` during which the discriminator already learns. The paper's 0 lets
    an untrained discriminator loose on the generator."""
    lecam_weight: float = 0.0
    """Of the LeCam regulariser in the discriminator's loss (IBQ 0.05, VQGAN+ 0.001)."""
    lecam_of: Literal["logits", "mean"] = "logits"
    """Whether every logit is held back by the averages (IBQ), or their mean over the batch
    (VQGAN+)."""
    lecam_decay: float = 0.999
    """Of the averages of real and fake logits that it compares with."""
    r1_weight: float = 0.0
    """Of the R1 gradient penalty at real images: gamma, so of half the squared gradient."""
    r1_every: int = 16
    """Steps between two penalties, each of which counts for so many."""
    augment: tuple[Augmentation, ...] = ()
    """DiffAugment: what is done to all that the discriminator sees."""
    guard: bool = True
    """Hold, then lower the adversarial term, then go back, where it wrecks the reconstruction."""
    guard_rule: GuardConfig = field(default_factory=GuardConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length and cadence of a run, in steps (batches). 0 turns a cadence off."""

    steps: int = 100_000
    seed: int = 0
    log_every: int = 50
    eval_every: int = 5000
    image_every: int = 1000
    save_every: int = 1000
    keep: int = 2
    """How many checkpoints, the newest ones, are kept."""
    eval_images: int = 1000
    """At most so many held-out images an evaluation."""
    fsdp: int = 1
    """Devices over which parameters and optimiser state are sharded."""
    tensor: int = 1
    """Devices over which the transformer's matrices are split."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """Everything that determines a run of stage 1."""

    init_from: str = ""
    """Directory, or owner/name on the hub, of a tokenizer to start from, such as an imported one.
    `model` is then its config; a discriminator that lies beside it comes along."""
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    discriminator: DiscriminatorConfig = field(default_factory=PatchGANConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    disc_optim: OptimConfig = field(default_factory=OptimConfig)
    ema_decay: float = 0.999
    """Of the weights that `model/` holds; 0 takes the last ones."""
    usage_window: int = 100
    """Batches over which the use of the codes is logged."""
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class PriorTraining:
    """Everything that determines a run of stage 2.

    `model.codebook_size`, `grid` and `num_classes` are taken from the tokenizer and the data.
    """

    model: PriorConfig = field(
        default_factory=lambda: PriorConfig(codebook_size=1024, grid=(16, 16))
    )
    class_conditional: bool = True
    """Whether classes, where the data has them, condition the prior."""
    pkeep: float = 1.0
    """Probability that an input token is kept; else it becomes a random one (taming's `pkeep`)."""
    passes: tuple[str, ...] = ("center", "flip")
    """How often, and with which crops and flips, stage 1 encodes the data."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(betas=(0.9, 0.95), weight_decay=0.01)
    )
    ema_decay: float = 0.999
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
