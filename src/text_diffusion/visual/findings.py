"""What a run's model is asked for its page: samples and their figures, quality against steps, calibration, words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from text_diffusion import evaluate, figures, metrics
from text_diffusion.autoregressive import WordTransformer
from text_diffusion.calibration import Calibration, calibrate
from text_diffusion.config import ReportConfig
from text_diffusion.control.given import needed_by
from text_diffusion.figures import FEWEST, Evaluation, Scorer
from text_diffusion.generation import TextDiffusion, load
from text_diffusion.grammar import Grammar
from text_diffusion.ngrams import Lines
from text_diffusion.objectives import Network
from text_diffusion.tokenizer import Tokenizer
from text_diffusion.visible import visible
from text_diffusion.visual.folder import RunFolder
from text_diffusion.visual.recording import Frame, record

CALLS = (1, 2, 4, 8, 16, 32)  # of quality against steps
NEIGHBOURS, NEIGHBOURED, MAPPED = 5, 16, 240  # words: neighbours of each, with neighbours, on the map
CALIBRATED = 256  # sentences
Say = Callable[[str], None]


@dataclass(frozen=True)
class Quality:
    """A figure of samples against network calls, and what real text or an ideal sampler has."""

    title: str
    unit: str  # "%", "bits" or none
    calls: list[int]
    values: list[float]
    bar: float
    bar_title: str


@dataclass(frozen=True)
class Words:
    """The embeddings: norms, neighbours of the first (the most frequent) words, and a map, the two main axes."""

    norms: list[float]
    neighbours: list[tuple[str, list[tuple[str, float]]]]
    places: list[tuple[str, float, float]]
    explained: float  # share of the variance that the map shows


@dataclass
class Findings:
    """Of one run; what is missing has its reason in `run.missing`."""

    run: RunFolder
    objective: str = ""
    samples: list[str] = field(default_factory=list)
    steps: int = 0
    evaluation: Evaluation | None = None
    quality: list[Quality] = field(default_factory=list)
    calibration: Calibration | None = None
    frames: list[Frame] = field(default_factory=list)
    words: Words | None = None


def find(run: RunFolder, config: ReportConfig, scorer: Scorer | None, say: Say) -> Findings:
    """Ask the model of a run, if it has one, for everything.

    Raises:
        UserError: its weights cannot be read.
    """
    findings = Findings(run)
    if run.weights is None:
        return findings
    say(f"{run.weights}: sampling")
    model = load(run.weights, device=config.device, gpu=config.gpu, tokenizer=config.tokenizer)
    if isinstance(model, TextDiffusion) and not run.settings:
        groups = ("model", "diffusion", "data", "train")
        run.settings = {name: dict(model.info[name]) for name in groups if isinstance(model.info.get(name), dict)}
    findings.objective = model.model.config.objective
    findings.words = words(model.model, model.tokenizer)
    if needed := needed_by(model):
        run.missing["samples and all that is measured of them"] = f"this model cannot write without {needed}"
        return findings
    held_out = run.text("test")
    grammar = evaluate.find_grammar("", held_out) if held_out else None
    reference, train = run.sentences("test"), run.sentences("train")
    if isinstance(model, TextDiffusion):
        findings.steps = min(config.steps, model.diffusion.num_timesteps)
        findings.samples = model.sample(config.samples, steps=findings.steps, seed=config.seed)
        findings.frames = record(model, config.show, min(config.frames, model.diffusion.num_timesteps), config.seed)
        say(f"{run.weights}: calibration")
        findings.calibration = calibrate(model, CALIBRATED, min(50, model.diffusion.num_timesteps), config.seed)
    else:
        findings.samples = model.sample(config.samples, seed=config.seed)
        run.missing["player, quality against steps, calibration"] = "this model knows no noise"
    if reference is None:
        run.missing["evaluation and quality against steps"] = "the held-out text of the run was not found"
        return findings
    say(f"{run.weights}: evaluation")
    findings.evaluation = figures.evaluate(findings.samples, reference, train=train, grammar=grammar, scorer=scorer)
    if isinstance(model, TextDiffusion):
        say(f"{run.weights}: quality against steps")
        findings.quality = quality(model, config, reference, grammar)
        if not findings.quality:
            run.missing["quality against steps"] = f"needs {FEWEST} samples and {2 * FEWEST} held-out lines"
    return findings


def quality(
    model: TextDiffusion, config: ReportConfig, reference: Sequence[str], grammar: Grammar | None
) -> list[Quality]:
    """Figures by network calls: of the language, if it is known, otherwise the distance of word pairs to real text."""
    calls = [c for c in CALLS if c <= model.diffusion.num_timesteps]
    n = config.samples
    half = len(reference) // 2
    if grammar is None and (half < FEWEST or n < FEWEST):
        return []
    texts = {c: model.sample(n, steps=c, seed=config.seed) for c in calls}
    if grammar is not None:
        ideal = figures.ideal_figures(grammar, n, None, np.random.default_rng(0))
        ids = {c: grammar.encode(text) for c, text in texts.items()}
        valid = [float(np.isfinite(grammar.log2_probs(ids[c])).mean()) for c in calls]
        kl = [grammar.slot_kl_bits(ids[c]) for c in calls]
        found = [Quality("valid sentences", "%", calls, valid, 1.0, "ideal sampler")]
        if all(map(math.isfinite, kl)):
            bar = ideal["slot_kl"].value
            found.append(Quality("KL of slots from the language", "bits", calls, kl, bar, "ideal sampler"))
        return found
    size = min(half, n)

    def distance(text: Sequence[str]) -> float:
        lines = Lines(text[:size], reference[half : half + size])
        own, other = (lines.counts(2, rows) for rows in lines.texts)
        return metrics.js_distance(own, other)

    values, bar = [distance(texts[c]) for c in calls], distance(reference[:size])
    if not all(map(math.isfinite, [*values, bar])):
        return []
    return [Quality("word pairs: Jensen-Shannon distance to real text", "", calls, values, bar, "real text")]


@torch.no_grad()
def words(model: Network, tokenizer: Tokenizer) -> Words:
    """Of the embeddings E(w): their norms, nearest neighbours (Euclidean, as noise sees them), main axes."""
    special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.unk_id}
    texts = {i: visible(tokenizer.decode_all([i]).strip()) for i in range(tokenizer.vocab_size) if i not in special}
    shown = [i for i, text in texts.items() if text]  # our tokenizers number words by how frequent they are
    device = next(model.parameters()).device
    E = embeddings(model, torch.tensor(shown, device=device))  # (n, D)
    near = torch.cdist(E[:NEIGHBOURED], E)
    neighbours = []
    for i in range(min(NEIGHBOURED, len(shown))):
        near[i, i] = math.inf
        distance, other = near[i].topk(min(NEIGHBOURS, len(shown) - 1), largest=False)
        pairs = zip(other.tolist(), distance.tolist(), strict=True)
        neighbours.append((texts[shown[i]], [(texts[shown[j]], d) for j, d in pairs]))
    some = E[:MAPPED] - E[:MAPPED].mean(dim=0)
    _, scale, axes = torch.linalg.svd(some, full_matrices=False)
    places = (some @ axes[:2].T).tolist() if len(axes) > 1 else []
    named = [(texts[i], x, y) for i, (x, y) in zip(shown[:MAPPED], places, strict=False)]
    share = scale.square()
    return Words(E.norm(dim=1).tolist(), neighbours, named, float(share[:2].sum() / share.sum().clamp(min=1e-12)))


def embeddings(model: Network, ids: torch.Tensor) -> torch.Tensor:
    """E(w) of some words (n,), (n, D)."""
    rows = model.word_embedding(ids) if isinstance(model, WordTransformer) else model.get_embeds(ids[None])[0]
    found: torch.Tensor = rows.float().cpu()
    return found
