"""Learn p(label | x_t) over all noise levels, for guidance.

python -m text_diffusion.control.train_classifier CKPT [--flag value ...]

learns from data/DATASET/DATASET_labeled.tsv, DATASET being what CKPT was trained on, and writes CKPT's name with the
ending .classifier.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from text_diffusion import errors
from text_diffusion.control import classifier as classifiers
from text_diffusion.control import labeled
from text_diffusion.control.classifier import Classifier, NoisyClassifier, Sizes
from text_diffusion.data import fit
from text_diffusion.errors import UserError
from text_diffusion.files import project_root
from text_diffusion.flags import Options, Parser, add_options, build, option
from text_diffusion.generation import TextDiffusion, load_diffusion
from text_diffusion.launcher import check_alone
from text_diffusion.memory import keep_freed_memory
from text_diffusion.randomness import Stream, draw, mix, normal, uniform
from text_diffusion.remote import is_remote, local, output

LEVELS = 10  # of noise, that the accuracy is reported at


@dataclass(frozen=True)
class ClassifierConfig(Options):
    """The classifier and its training."""

    labeled: str = option("", "lines `sentence TAB label`; data/DATASET/DATASET_labeled.tsv if not given")
    out: str = option("", "where to write it; the name of CKPT with .classifier.pt if not given")
    steps: int = option(2000, "training steps", low=1)
    batch_size: int = option(128, "sentences a step", low=1)
    lr: float = option(2e-3, "peak learning rate", low=0.0)
    hidden_size: int = option(64, "width of the network", low=4)
    num_layers: int = option(2, "its layers", low=1)
    seed: int = option(0, "seed of everything random", low=0, high=2**32 - 1)
    tokenizer: str = option("", "vocabulary file, for a weights file of the original that carries none")
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    gpu: str = option("all", "GPUs to use, separated by commas, or all")


def labeled_path(config: ClassifierConfig, writer: TextDiffusion, weights: str) -> Path:
    """The labelled file that was given, or that of the model's dataset.

    Raises:
        UserError: there is none.
    """
    if config.labeled:
        return local(config.labeled)
    name = Path(str(writer.info.get("data", {}).get("dataset", Path(weights).parent.name))).stem
    path = project_root() / "data" / name / f"{name}_labeled.tsv"
    if not path.is_file():
        raise UserError(f"{path}: expected lines `sentence TAB label`, found no file; --labeled FILE names another")
    return path


def encode(rows: Sequence[tuple[str, str]], labels: Sequence[str], writer: TextDiffusion) -> tuple[Tensor, Tensor]:
    """Ids (N, L) and numbers of labels (N,)."""
    ids = fit(
        writer.tokenizer.encode([sentence for sentence, _ in rows]),
        writer.sequence_len,
        writer.tokenizer,
        "truncate",
        "labelled",
    )
    numbers = torch.tensor([labels.index(label) for _, label in rows])
    return ids.to(writer.diffusion.device), numbers.to(writer.diffusion.device)


def noised(writer: TextDiffusion, ids: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t of sentences (B, L), as in training; noise (B, 2, L, D)."""
    x_start = writer.model.get_embeds(ids)
    if writer.model.noisy_start:
        x_start = writer.diffusion.q_start(x_start).sample(noise[:, 0])
    return writer.diffusion.q_sample(x_start, t, noise[:, 1])


def train(classifier: Classifier, writer: TextDiffusion, ids: Tensor, labels: Tensor, config: ClassifierConfig) -> None:
    """Minimise -log p(label | x_t) over uniform t."""
    network, T, B = classifier.network, writer.diffusion.num_timesteps, config.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.01)
    shape, device = (2, ids.shape[1], writer.model.config.in_channel), ids.device
    network.train()
    for step in trange(config.steps, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False):
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / 100) * (1 - step / config.steps)
        key = (config.seed, Stream.TRAIN, step)
        u = draw(uniform, (*key, 1), 0, B, (2,), device)
        rows, t = (u[:, 0] * len(ids)).long(), (u[:, 1] * T).long()
        with torch.no_grad():
            x_t = noised(writer, ids[rows], t, draw(normal, (*key, 0), 0, B, shape, device))
        loss = F.cross_entropy(network(x_t, writer.diffusion.network_time(t)), labels[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval().requires_grad_(False)
    if not classifiers.is_finite(network):
        raise UserError(f"expected finite weights in the end, found none; --lr {config.lr:g} is too high, lower it")


@torch.no_grad()
def accuracy(network: NoisyClassifier, writer: TextDiffusion, ids: Tensor, labels: Tensor, t: int) -> float:
    """Share of sentences, noised to level t, whose label is found."""
    shape = (2, ids.shape[1], writer.model.config.in_channel)
    level = torch.full((len(ids),), t, device=ids.device)
    x_t = noised(writer, ids, level, draw(normal, (0, Stream.VALIDATION, t), 0, len(ids), shape, ids.device))
    found = network(x_t, writer.diffusion.network_time(level)).argmax(dim=-1)
    return float((found == labels).float().mean())


def report(classifier: Classifier, writer: TextDiffusion, ids: Tensor, labels: Tensor) -> list[str]:
    """Held-out accuracy by noise level, a line each."""
    T = writer.diffusion.num_timesteps
    majority = float(torch.bincount(labels).max() / len(labels))
    lines = [f"accuracy on {len(ids)} held-out sentences (always the most frequent label: {majority:.1%})"]
    for t in sorted({round(i * (T - 1) / LEVELS) for i in range(LEVELS + 1)}):
        lines.append(f"t {t:>6}  {accuracy(classifier.network, writer, ids, labels, t):7.1%}")
    return lines


def command(argv: Sequence[str] | None) -> None:
    """Parse, load, train, report, write."""
    parser = Parser(prog="train_classifier", description="Learn p(label | x_t) for guidance.")
    parser.add_argument("weights", metavar="CKPT", help="weights file of the diffusion model")
    add_options(parser, ClassifierConfig)
    given = vars(parser.parse_args(argv))
    weights: str = given.pop("weights")
    config = build(ClassifierConfig, given)
    if is_remote(weights) and not config.out:
        raise UserError(f"{weights}: expected --out FILE beside weights in a store, found none")
    check_alone("train_classifier")
    if config.hidden_size % 4:
        raise UserError(f"--hidden_size must be a multiple of 4, the heads that share it, found {config.hidden_size}")
    keep_freed_memory()
    writer = load_diffusion(weights, device=config.device, gpu=config.gpu, tokenizer=config.tokenizer)
    source = labeled_path(config, writer, weights)
    rows = labeled.read(source)
    out = output(config.out or str(classifiers.beside(Path(weights))), weights, str(source))
    ids, labels = encode(rows.train, rows.labels, writer)
    unknown = writer.tokenizer.unknown_share(writer.tokenizer.encode([sentence for sentence, _ in rows.train]))
    print(
        f"{len(rows.train)} training and {len(rows.held_out)} held-out sentences of {len(rows.labels)} labels; "
        f"unknown words: {unknown:.2%}",
        file=sys.stderr,
    )
    if unknown == 1:
        raise UserError("expected labelled sentences of words that the model knows, found none: take those of its text")
    torch.manual_seed(mix(config.seed, Stream.INIT))
    sizes = Sizes(
        writer.model.config.in_channel, writer.sequence_len, len(rows.labels), config.hidden_size, config.num_layers
    )
    classifier = classifiers.new(writer, rows.labels, sizes, Path(weights).name)
    train(classifier, writer, ids, labels, config)
    if rows.held_out:
        print("\n".join(report(classifier, writer, *encode(rows.held_out, rows.labels, writer))))
    classifier.save(out)
    print(f"written the classifier to {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return errors.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
