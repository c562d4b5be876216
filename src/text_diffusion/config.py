"""Every setting: name, type, default and half a sentence. The command line and the saved settings derive from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from text_diffusion.errors import UserError
from text_diffusion.flags import Options, option, shown
from text_diffusion.samplers import SAMPLERS
from text_diffusion.schedules import SCHEDULES
from text_diffusion.spacing import SPACINGS


@dataclass(frozen=True)
class ModelConfig(Options):
    """The network (`modeling`), and what it learns (`objectives`)."""

    objective: str = option(
        "cross_entropy",
        "what is learned: to denoise, as probabilities of words or as Diffusion-LM does; hidden words; the next word",
        choices=("cross_entropy", "diffusion_lm", "masked", "autoregressive"),
    )
    denoiser: str = option(
        "bert",
        "layers of the network: BERT's, or those of today (RMSNorm, RoPE, AdaLN-Zero, gated)",
        choices=("bert", "modern"),
    )
    in_channel: int = option(64, "D, size of the word embeddings that are diffused; 32 for other objectives", low=1)
    hidden_size: int = option(128, "H, width of the transformer", low=1)
    num_layers: int = option(3, "transformer layers", low=1)
    num_heads: int = option(4, "attention heads; they share H", low=1)
    num_channels: int = option(128, "size of the sinusoidal time embedding", low=2)
    neighbours: int = option(
        2, "words on each side that a position sees before the first layer; 0 for diffusion_lm", low=0, high=32
    )
    activation: str = option("relu", "bert: activation of the feed-forward layers", choices=("relu", "gelu"))
    norm: str = option("pre", "bert: layer norm before each sub-layer, or after it", choices=("pre", "post"))
    dropout: float = option(0.0, "dropout probability", low=0.0, high=0.95)
    self_condition: bool = option(True, "the denoiser also sees its previous estimate of x_0")
    output_prior: bool = option(True, "cross_entropy: a word's score knows how near its embedding is to x_t")
    denoised_input: bool = option(
        True, "cross_entropy: the network sees what the noisy embedding of each word says by itself, not the noise"
    )
    output_scale: float = option(4.0, "cross_entropy: factor of what the network adds to words' scores", above=0.0)
    shared_evidence: bool = option(
        True, "cross_entropy: what a noisy embedding shows counts for positions that have the same word, too"
    )
    least_evidence: float = option(
        0.0, "cross_entropy: what a noisy embedding shows counts as if alpha/sigma^2 were at least this", low=0.0
    )
    known_words: bool = option(True, "cross_entropy: show a share of the words without noise, at first")
    condition: str = option(
        "none",
        "what sentences are given: the text is lines `sentence TAB label`, or `source TAB sentence`",
        choices=("none", "labels", "source"),
    )
    drop_condition: float = option(
        0.1, "share of training sentences that are given nothing, for classifier-free guidance", low=0.0, high=0.9
    )
    pretrained_model: str = option("", "BERT-shaped model to start from: a folder, or a name on the Hugging Face hub")
    init_pretrained: bool = option(
        False, "start from its layers and positions (if not given, --lr is then 1e-4, --optimizer adamw)"
    )
    pretrained_embeddings: bool = option(False, "start from its word embeddings, and take its tokenizer")
    freeze_embeddings: bool = option(False, "leave the pretrained word embeddings as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition == "none" and self.drop_condition != 0.1:
            raise UserError("--drop_condition is about what sentences are given, so it expects --condition, found none")
        for name in ("init_pretrained", "pretrained_embeddings"):
            if getattr(self, name) and not self.pretrained_model:
                raise UserError(f"--{name} expects --pretrained_model FOLDER, or a name on the hub, found none")
        if self.pretrained_model and not (self.init_pretrained or self.pretrained_embeddings):
            raise UserError("--pretrained_model expects --init_pretrained or --pretrained_embeddings, found neither")
        if self.freeze_embeddings and not self.pretrained_embeddings:
            raise UserError("--freeze_embeddings is about pretrained ones: it expects --pretrained_embeddings True")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"--hidden_size must be a multiple of --num_heads ({self.num_heads}), found {self.hidden_size}"
            )
        if self.denoiser == "modern" and self.hidden_size // self.num_heads % 2:
            raise UserError(
                "--denoiser modern expects an even number of entries in a head, --hidden_size over --num_heads, found "
                f"{self.hidden_size // self.num_heads}"
            )


@dataclass(frozen=True)
class DiffusionConfig(Options):
    """The forward process (`gaussian_diffusion`) and which t to train on (`timesteps`)."""

    diffusion_steps: int = option(
        10_000, "T, steps of the forward process; to be chosen with diffusion_lm, 2000 there", low=1, high=1_000_000
    )
    noise_schedule: str = option(
        "log-snr", "named beta schedule; to be chosen with diffusion_lm, sqrt there", choices=tuple(SCHEDULES)
    )
    schedule_sampler: str = option(
        "fitted",
        "which t to train on; uniform for other objectives than cross_entropy",
        choices=("fitted", "uniform", "loss-second-moment"),
    )
    stratified: bool = option(True, "draw the t of a batch one from each of B equal parts; False for diffusion_lm")


@dataclass(frozen=True)
class DataConfig(Options):
    """Text to batches (`corpus`, `data`)."""

    dataset: str = option("simple", "a name under data/, or the path of a text file, one sentence a line")
    train_txt_path: str = option("", "training text, instead of the dataset's")
    val_txt_path: str = option("", "held-out text, instead of the dataset's")
    tokenizer: str = option(
        "word-level",
        "word-level, byte-level, pretrained (--pretrained_model's), or the path of a tokenizer's JSON",
    )
    sequence_len: int = option(0, "L, tokens in a sentence; 0: what 99.9 % of them fit in, at most 128", low=0)
    source_len: int = option(0, "with --condition source: tokens in a source; 0: the longest's, at most 128", low=0)
    long_lines: str = option(
        "truncate", "what to do with a sentence longer than L", choices=("truncate", "drop", "error")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_len in (1, 2):
            raise UserError(f"--sequence_len must be at least 3 ([CLS], a word, [SEP]), found {self.sequence_len}")


@dataclass(frozen=True)
class TrainConfig(Options):
    """The training loop (`train`)."""

    steps: int = option(2000, "where the run ends", low=1)
    batch_size: int = option(128, "sentences a step, over all micro-batches", low=1)
    microbatch: int = option(0, "sentences in memory at once; 0: the whole batch", low=0)
    lr: float = option(4e-3, "peak learning rate (2e-3 with --teacher, 1e-4 with --init_pretrained)", low=0.0)
    warmup_steps: int = option(100, "steps of linear warm-up, before the linear anneal to 0", low=0)
    optimizer: str = option(
        "muon",
        "muon for the matrices of the layers and adamw for the rest, or adamw for all",
        choices=("muon", "adamw"),
    )
    weight_decay: float = option(0.0, "weight decay, apart from the gradient", low=0.0)
    gradient_clipping: float = option(1.0, "largest gradient norm; 0: no clipping", low=0.0)
    ema_rate: tuple[float, ...] = option((0.9999,), "EMA rates, separated by commas", low=0.0, high=1.0)
    seed: int = option(102, "seed of everything random", low=0, high=2**32 - 1)
    teacher: str = option(
        "",
        "weights of a cross_entropy model, whose student this run is: it needs a call, or a few (`distillation`)",
    )
    pairs: int = option(40_000, "sentences of the text, in turn and round again, whose noise a student learns", low=2)
    teacher_levels: int = option(
        10, "levels of noise on which a teacher follows each back, two network calls at all but the last", low=3
    )
    log_interval: int = option(50, "steps between rows of metrics.jsonl", low=1)
    eval_interval: int = option(500, "steps between validations, each with a few samples; 0: never", low=0)
    save_interval: int = option(1000, "steps between checkpoints", low=1)
    keep_last: int = option(0, "checkpoints to keep, the newest ones; 0: all", low=0)
    save_async: bool = option(True, "go on training while a checkpoint is written")
    checkpoint_path: str = option(
        "", "folder of the run; if not given ckpts/DATASET, of a student ckpts/DATASET-student"
    )
    track: str = option("none", "also log to this service", choices=("none", "tensorboard", "wandb"))
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    gpu: str = option("all", "GPUs to use, separated by commas, or all")
    parallel: str = option(
        "ddp", "with several processes, each has a copy of the network (ddp) or a shard of it", choices=("ddp", "fsdp")
    )
    precision: str = option("float32", "arithmetic of the network", choices=("float32", "bf16"))
    deterministic: bool = option(False, "the same numbers in every run on a GPU too, from slower kernels")
    gradient_checkpointing: bool = option(False, "compute the layers twice instead of keeping what is in them")
    compile: bool = option(False, "compile the network with torch.compile (a minute at the start)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.microbatch % 2:
            raise UserError(
                f"--microbatch must be even (every second sentence is self-conditioned), found {self.microbatch}"
            )
        if len(set(self.ema_rate)) < len(self.ema_rate):
            raise UserError(f"--ema_rate must name different rates, found {shown(self.ema_rate)}")


@dataclass(frozen=True)
class SampleConfig(Options):
    """Sampling (`sample`)."""

    model_name_or_path: str = option("", "weights file (model*.pt or ema_*.pt)")
    steps: int = option(50, "network calls, 1..T (default at most T)")
    sampler: str = option(
        "auto",
        "how to walk back from noise; auto: dpm-solver++ up to 20 STEPS and for students; with more ancestral, or for "
        "cross_entropy dpm-solver++ with all the --churn it takes; ancestral, too, with TOP_P, and to fill a template "
        "in 20 STEPS or more",
        choices=SAMPLERS,
    )
    spacing: str = option(
        "auto",
        "timesteps kept: evenly in measured loss (auto, if known; cross_entropy: closer together at little noise), t "
        "or log-SNR",
        choices=SPACINGS,
    )
    eta: float = option(0.0, "with --sampler ddim: share of the noise that each step draws anew", low=0.0, high=1.0)
    resample: int = option(
        0, "with ancestral: network calls at each level of noise; 0: 1, to fill a template STEPS / 10", low=0
    )
    churn: float = option(0.0, "with dpm-solver++ and heun: noise added again on the way, in all", low=0.0)
    halt: int = option(0, "leave a sentence alone once its words have not changed for so many calls; 0: never", low=0)
    temperature: float = option(1.0, "with cross_entropy weights: of the probabilities of words", above=0.0)
    precision: str = option("float32", "arithmetic of the network", choices=("float32", "bf16"))
    compile: bool = option(False, "compile the network with torch.compile (a minute at the start)")
    num_samples: int = option(10, "sentences to write", low=1)
    out_dir: str = option("", "folder for the samples; the weights file's if not given")
    batch_size: int = option(0, "sentences at once; 0: chosen", low=0)
    top_p: float = option(0.0, "truncate the noise of each step to |z| <= TOP_P; 0: off", low=0.0)
    clamp: str = option("no_clamp", "clamp: round x_0 to the nearest words at each step", choices=("no_clamp", "clamp"))
    clamp_start: int = option(
        0, "with --clamp clamp: only at t below this one of the weights' 1..T; 0: at every step", low=0
    )
    sequence_len: int = option(0, "tokens in a sentence; 0: the weights file's", low=0)
    seed: int = option(10708, "seed of the noise", low=0, high=2**32 - 1)
    format: str = option("txt", "txt: a sentence a line; jsonl: with seed, steps and weights", choices=("txt", "jsonl"))
    show: int = option(4, "sentences shown in the making", low=0)
    tokenizer: str = option("", "vocabulary file, for a weights file of the original that carries none")
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    gpu: str = option("all", "GPUs to use, separated by commas, or all")


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """Evaluation (`evaluate`)."""

    reference: str = option("", "held-out real text, one sentence a line")
    train: str = option("", "the training text, to tell new sentences from copies")
    grammar: str = option("", "JSON file of the language, if it is known; of X-test.txt, X/grammar.json beside it")
    checkpoint: str = option("", "weights of a teacher, trained with --objective autoregressive, for `perplexity`")
    json: str = option("", "write every figure to this file too, as JSON")
    markdown: str = option("", "write the table to this file too")
    seed: int = option(0, "seed of the random halves behind the intervals", low=0, high=2**32 - 1)


@dataclass(frozen=True)
class LikelihoodConfig(Options):
    """Likelihood (`likelihood`)."""

    steps: int = option(0, "steps of the walk, 1..T; 0: 1000 for cross_entropy, all T else", low=0)
    paths: int = option(1, "paths for each sentence; several tighten the bound", low=1)
    estimate: str = option(
        "auto",
        "what a step of the walk is self-conditioned on: the step before, as in sampling (carried), or what a call of "
        "its own says first (fresh); auto: fresh for cross_entropy, carried else",
        choices=("auto", "carried", "fresh"),
    )
    flow: str = option(
        "none",
        "also a bound of the flow, its trace being exact or Hutchinson's",
        choices=("none", "exact", "hutchinson"),
    )
    flow_steps: int = option(32, "Runge-Kutta steps of the flow", low=1)
    probes: int = option(1, "with --flow hutchinson: random probes of the trace for each sentence", low=1)
    lines: int = option(0, "how many lines of the text, from the first; 0: all", low=0)
    grammar: str = option("", "grammar file that the text comes from: also the true bits")
    json: str = option("", "file to write all figures to, line by line too")
    batch_size: int = option(0, "sentences at once; 0: chosen", low=0)
    seed: int = option(0, "seed of the paths", low=0, high=2**32 - 1)
    tokenizer: str = option("", "vocabulary file, for a weights file of the original that carries none")
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    gpu: str = option("all", "GPUs to use, separated by commas, or all")


@dataclass(frozen=True)
class ReportConfig(Options):
    """Reports (`report`)."""

    samples: int = option(1000, "sentences behind the evaluation and each point of quality against steps", low=1)
    steps: int = option(20, "network calls of these sentences (at most T)", low=1)
    show: int = option(8, "sentences in the player", low=1, high=40)
    frames: int = option(40, "network calls of the player, a picture each (at most T)", low=2, high=400)
    seed: int = option(10708, "seed of the noise", low=0, high=2**32 - 1)
    out: str = option("", "page to write; report.html in the run's folder, of several compare.html in the first's")
    checkpoint: str = option("", "weights of a teacher, trained with --objective autoregressive, for `perplexity`")
    play: bool = option(False, "also play the sentences in the terminal")
    tokenizer: str = option("", "vocabulary file, for a weights file of the original that carries none")
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    gpu: str = option("all", "GPUs to use, separated by commas, or all")


# The original's shape: BERT-base with exact GELU, and the learning rate that goes with it.
BASE: dict[str, Any] = {
    "in_channel": 128,
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "activation": "gelu",
    "dropout": 0.1,
    "lr": 1e-4,
}
DEFAULTS = {f.name: f.default for group in (ModelConfig, TrainConfig) for f in fields(group)}
SIZES = {"small": {name: DEFAULTS[name] for name in BASE if name != "in_channel"}, "base": BASE}  # D: the objective's
# What was so before it could be said: older weights and runs do not say it.
ONCE: dict[str, Any] = {
    "objective": "diffusion_lm",
    "denoiser": "bert",
    "neighbours": 0,
    "denoised_input": False,
    "output_scale": 1.0,
    "shared_evidence": False,
    "least_evidence": 0.0,
    "condition": "none",
    "drop_condition": 0.1,
    "source_len": 0,
    "pretrained_model": "",
    "init_pretrained": False,
    "pretrained_embeddings": False,
    "freeze_embeddings": False,
    "schedule_sampler": "uniform",
    "stratified": False,
    "optimizer": "adamw",
    "pairs": DEFAULTS["pairs"],
    "teacher_levels": DEFAULTS["teacher_levels"],
}
