"""How many bits a trained model needs for a text: the bound of its sampler term by term, and that of its flow.

python -m text_diffusion.likelihood ckpts/simple/ema_0.9999_025000.pt data/simple-test.txt

What is measured is said in `bound` and `flow`, equation by equation; here it is done for each line of a file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from text_diffusion import errors
from text_diffusion.autoregressive import AT_ONCE, Autoregressive, nlls
from text_diffusion.bound import PathTerms, Posterior, handover_for, log_decoder, log_mean, path_terms, walk
from text_diffusion.config import LikelihoodConfig
from text_diffusion.control.given import needed_by
from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.data import fit
from text_diffusion.errors import UserError
from text_diffusion.files import read_lines, write_atomically
from text_diffusion.flags import Parser, add_options, build
from text_diffusion.flow import exact_trace, hutchinson_trace, ode_log_weight, predict_twice
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.generation import TextDiffusion, Writer, load
from text_diffusion.grammar import Grammar
from text_diffusion.launcher import check_alone
from text_diffusion.masked import Masked, mean_bound
from text_diffusion.memory import keep_freed_memory
from text_diffusion.randomness import Stream, draw, normal, uniform
from text_diffusion.remote import local, output
from text_diffusion.spacing import spaced_timesteps
from text_diffusion.tokenizer import Tokenizer

BIT = math.log(2)  # nats
RANGES = 8  # of t, in the table
WORD_STEPS = 1000  # of a walk of cross_entropy, which is trained for 10,000, if not said otherwise
Tick = Callable[[], object]  # called after each call of the network


@dataclass(frozen=True)
class Text:
    """Lines of a file as a model reads them."""

    lines: list[str]
    ids: Tensor  # (N, L)
    tokens: int  # words and [SEP] of all lines, without [CLS] and pads, which cost next to nothing


def read_text(path: Path, tokenizer: Tokenizer, length: int, count: int) -> Text:
    """The first `count` lines (0: all) that fit the model.

    Raises:
        UserError: the file cannot be read, or no line fits.
    """
    lines = read_lines(path)[: count or None]
    encoded = tokenizer.encode(lines)
    kept = [i for i, ids in enumerate(encoded) if len(ids) <= length]
    if not kept:
        raise UserError(f"{path}: expected lines of at most {length} tokens, the model's, found only longer ones")
    if len(kept) < len(lines):
        print(f"warning: {path}: {len(lines) - len(kept)} lines longer than {length} tokens left out", file=sys.stderr)
    encoded = [encoded[i] for i in kept]
    unknown = tokenizer.unknown_share(encoded)
    if unknown:
        print(f"warning: {path}: {unknown:.2%} of the words are unknown; the bits are those of [UNK]", file=sys.stderr)
    ids = fit(encoded, length, tokenizer, "error", str(path))
    return Text([lines[i] for i in kept], ids, sum(map(len, encoded)) - len(encoded))


def walk_terms(
    model: TextDiffusion,
    process: GaussianDiffusion,
    ids: Tensor,
    handover: int,
    start: int,
    path: int,
    seed: int,
    tick: Tick,
    fresh: bool = False,
) -> PathTerms:
    """The terms of the walk along one path for the sentences ids (B, L), numbers start, start + 1, ... of the text.

    With fresh estimates, each step is self-conditioned on what a call of its own says of x_0 first: the walk is Markov.
    """
    x_start_mean = model.model.get_embeds(ids).detach()

    def noise(s: int) -> Tensor:
        key, stop = (seed, Stream.LIKELIHOOD, path, s), start + len(ids)
        return draw(normal, key, start, stop, tuple(x_start_mean.shape[1:]), ids.device)

    def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        time = process.network_time(t)
        if fresh:
            tick()
            previous = model.model(x_t, time)
        tick()
        pred_xstart: Tensor = model.model(x_t, time, previous)
        return pred_xstart

    drawn = walk(denoise, process, posterior_of(model, process), x_start_mean, noise, handover)
    return path_terms(drawn, partial(log_decoder, model.model, ids))


def flow_log_weight(
    model: TextDiffusion, ids: Tensor, handover: int, start: int, path: int, config: LikelihoodConfig, tick: Tick
) -> Tensor:
    """log p(w | x_0) p_ODE / q of the flow, of one draw for each of the sentences ids (B, L), in nats, (B,)."""
    process, stop = model.diffusion, start + len(ids)
    x_start_mean = model.model.get_embeds(ids).detach()
    shape, T = tuple(x_start_mean.shape[1:]), process.num_timesteps

    def key(number: int) -> tuple[int, ...]:  # those below T are the walk's
        return config.seed, Stream.LIKELIHOOD, path, T + number

    trace = exact_trace
    if config.flow == "hutchinson":
        coins = draw(uniform, key(1), start, stop, (config.probes, *shape), ids.device)
        trace = partial(hutchinson_trace, (coins < 0.5).float().mul(2).sub(1).transpose(0, 1))
    xhat = predict_twice(model.model, process)

    def predict(x: Tensor, t: float) -> Tensor:
        tick()
        return xhat(x, t)

    noise = draw(normal, key(0), start, stop, shape, ids.device)
    decoder, posterior = partial(log_decoder, model.model, ids), posterior_of(model, process)
    return ode_log_weight(predict, decoder, process, posterior, x_start_mean, noise, config.flow_steps, trace, handover)


def posterior_of(model: TextDiffusion, process: GaussianDiffusion) -> Posterior:
    """q of the kept steps, with the noise that training adds to E(w)."""
    return Posterior(process, 1 - model.diffusion.alphas_cumprod[0] if model.model.noisy_start else 0.0)


@dataclass(frozen=True)
class Figures:
    """Bits of each line, (N,) by name, and the means over the lines of the KLs, step by step."""

    lines: dict[str, Tensor]
    timesteps: list[int]
    kl: Tensor  # (S,): that of the last is the prior's
    handover: int  # a timestep


def measure(model: TextDiffusion, text: Text, config: LikelihoodConfig) -> Figures:
    """Walk each line `paths` times, and let it flow if that is asked for."""
    T, N, K = model.diffusion.num_timesteps, len(text.ids), config.paths
    steps = config.steps or (min(T, WORD_STEPS) if isinstance(model.model, WordDenoiser) else T)
    process = model.diffusion.respace(spaced_timesteps(model.diffusion.alphas_cumprod, steps))
    S, embeddings = process.num_timesteps, model.model.embeddings
    ids = text.ids.to(model.diffusion.device)
    handover = handover_for(posterior_of(model, process), embeddings, ids)
    size = config.batch_size or model.choose_batch_size(N)
    batches = [(path, start) for path in range(K) for start in range(0, N, size)]
    flows, fresh = config.flow != "none", is_fresh(model, config)
    early = handover_for(posterior_of(model, model.diffusion), embeddings, ids)
    flow_calls = (4 * config.flow_steps * (2 if early else 1) + 1) * flows
    kl = torch.zeros(S, device=ids.device)
    bits: dict[str, list[Tensor]] = {name: [] for name in ("reconstruction", "kl", "prior", "walk", "flow")}
    with tqdm(
        total=len(batches) * (S * (1 + fresh) + flow_calls), unit="call", file=sys.stderr, leave=False, disable=None
    ) as bar:
        for path, start in batches:
            part = ids[start : start + size]
            terms = walk_terms(model, process, part, handover, start, path, config.seed, bar.update, fresh)
            kl += terms.kl.sum(dim=0) / BIT / (K * N)
            bits["reconstruction"].append(terms.reconstruction / BIT)
            bits["kl"].append(terms.kl[:, :-1].sum(dim=1) / BIT)
            bits["prior"].append(terms.kl[:, -1] / BIT)
            bits["walk"].append(terms.log_weight)
            if flows:
                weights = flow_log_weight(model, part, early, start, path, config, bar.update)
                bits["flow"].append(weights)

    by_path = {name: torch.cat(parts).view(K, N).cpu() for name, parts in bits.items() if parts}
    lines = {name: by_path[name].mean(dim=0) for name in ("reconstruction", "kl", "prior")}
    lines["bound"] = -by_path["walk"].mean(dim=0) / BIT
    if K > 1:
        lines["importance_sampled"] = -log_mean(by_path["walk"]) / BIT
    if flows:
        lines["flow_bound"] = -by_path["flow"].mean(dim=0) / BIT
    if flows and K > 1 and config.flow == "exact":
        lines["flow_importance_sampled"] = -log_mean(by_path["flow"]) / BIT
    return Figures(lines, process.timesteps, kl.cpu(), process.timesteps[handover])


def is_fresh(model: TextDiffusion, config: LikelihoodConfig) -> bool:
    """Whether each step of the walk makes an estimate of its own first.

    Carried along many steps, estimates that each rest on the one before mislead a model of words (docs/recipe.md).
    """
    choice = config.estimate == "fresh" or (config.estimate == "auto" and isinstance(model.model, WordDenoiser))
    return choice and model.model.config.self_condition


def figures_of(model: Writer, text: Text, config: LikelihoodConfig) -> Figures:
    """What there is to be known of each line, of a model of any kind."""
    if isinstance(model, Autoregressive):
        return measure_exactly(model, text, config)
    if isinstance(model, Masked):
        ids = text.ids.to(model.device)
        nats = mean_bound(model.model, ids, config.paths, config.seed, config.batch_size or AT_ONCE)
        return Figures({"bound": nats.cpu() / BIT}, [], torch.zeros(0), 0)
    return measure(model, text, config)


@torch.no_grad()
def measure_exactly(model: Autoregressive, text: Text, config: LikelihoodConfig) -> Figures:
    """-log P(w) itself, of a model that writes from left to right."""
    parts = torch.split(text.ids.to(model.device), config.batch_size or AT_ONCE)
    bits = torch.cat([nlls(model.model, part).sum(dim=1) for part in parts]).cpu() / BIT
    return Figures({"exact": bits}, [], torch.zeros(0), 0)


def true_bits(path: Path, lines: Sequence[str]) -> Tensor:
    """-log2 p of each line in the language of a grammar file.

    Raises:
        UserError: the file is not a grammar, or a line is not of its language.
    """
    try:
        grammar = Grammar.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a grammar file, found: {error}") from None
    bits = [-grammar.log2_prob(line) for line in lines]
    for line, value in zip(lines, bits, strict=True):
        if math.isinf(value):
            raise UserError(f"{path}: expected lines of this grammar, found {line!r}")
    return torch.tensor(bits)


NAMES = {
    "reconstruction": "reconstruction",
    "kl": "KL, all steps",
    "prior": "prior",
    "bound": "bound",
    "importance_sampled": "the same, {paths} paths together",
    "flow_bound": "bound of the flow, but for its {flow_steps} steps",
    "flow_importance_sampled": "the same, {paths} draws together",
    "exact": "-log2 P, exact",
    "true": "true -log2 p",
    "gap": "what it is above the truth",
}


def table(figures: Figures, text: Text, config: LikelihoodConfig) -> str:
    """Means over the lines with their standard errors, in bits, as text."""
    rows = [f"{'':34}{'bits a sentence':>20}{'a token':>12}"]
    for name, title in NAMES.items():
        if name not in figures.lines:
            continue
        values = figures.lines[name]
        mean = float(values.mean())
        shown = f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {standard_error(values):.3f}"
        title += " of the walk" if name == "bound" and figures.timesteps else ""
        title = title.format(paths=config.paths, flow_steps=config.flow_steps)
        rows.append(f"{title:34}{shown:>20}{mean * len(values) / text.tokens:>12.4f}")
        if name == "kl":
            rows += [f"  t = {label:28}{value:>12.3f}" for label, value in ranges(figures)]
    if "kl" in figures.lines:
        rows.append(
            "Its terms and the bound of the walk are two estimates of one quantity: they agree on average only."
        )
    return "\n".join(rows)


def ranges(figures: Figures) -> list[tuple[str, float]]:
    """The KLs of the steps, the prior's left out, in RANGES groups of neighbours."""
    S = len(figures.timesteps) - 1
    edges = sorted({round(i * S / RANGES) for i in range(RANGES + 1)})
    t = figures.timesteps
    return [(f"{t[a]} .. {t[b - 1]}", float(figures.kl[a:b].sum())) for a, b in pairwise(edges)]


def standard_error(values: Tensor) -> float:
    """Of the mean."""
    return float(values.std()) / math.sqrt(len(values))


def contents(figures: Figures, text: Text, config: LikelihoodConfig, about: dict[str, Any]) -> bytes:
    """All figures as JSON."""
    means = {
        name: {
            "bits_per_sentence": float(values.mean()),
            "standard_error": standard_error(values) if len(values) > 1 else None,
            "bits_per_token": float(values.sum()) / text.tokens,
        }
        for name, values in figures.lines.items()
    }
    steps = {"timesteps": figures.timesteps, "kl": figures.kl.tolist(), "handover": figures.handover}
    each = [
        {"text": line, **{name: float(values[i]) for name, values in figures.lines.items()}}
        for i, line in enumerate(text.lines)
    ]
    figures_of = {"tokens": text.tokens, "means": means, "steps": steps, "lines": each}
    return (json.dumps(about | figures_of, ensure_ascii=False, indent=1) + "\n").encode()


def command(argv: Sequence[str] | None) -> None:
    """Parse, load, measure, report."""
    parser = Parser(prog="text-diffusion likelihood", description="How many bits a model needs for a text.")
    parser.add_argument("weights", metavar="CKPT", help="weights file (model*.pt or ema_*.pt)")
    parser.add_argument("text", metavar="FILE", help="text, one sentence a line")
    add_options(parser, LikelihoodConfig)
    given = vars(parser.parse_args(argv))
    config = build(LikelihoodConfig, given)
    check_alone("likelihood")
    keep_freed_memory()
    model = load(given["weights"], device=config.device, gpu=config.gpu, tokenizer=config.tokenizer)
    check_flags(model, config, given)
    if isinstance(model, TextDiffusion) and model.is_student:
        print(
            f"warning: {given['weights']} is a student, which knows where its first noise leads: of walks that draw "
            "more of it, and of their bounds, its teacher knows more",
            file=sys.stderr,
        )
    text = read_text(local(given["text"]), model.tokenizer, model.sequence_len, config.lines)
    true = true_bits(local(config.grammar), text.lines) if config.grammar else None
    if config.json:
        output(config.json, given["weights"], given["text"], *filter(None, [config.grammar]))
    figures = figures_of(model, text, config)
    if true is not None:
        first = figures.lines["exact" if "exact" in figures.lines else "bound"]
        figures.lines.update(true=true, gap=first - true)
    steps = f", {len(figures.timesteps)} steps" if figures.timesteps else ""
    if isinstance(model, TextDiffusion) and model.model.config.self_condition:
        fresh = is_fresh(model, config)
        steps += " of two calls (fresh estimates of x_0)" if fresh else " (estimates of x_0 carried along)"
    print(f"{given['text']}: {len(text.lines)} lines, {text.tokens} tokens; {given['weights']}{steps}")
    print(table(figures, text, config))
    if config.json:
        about = {"weights": given["weights"], "file": given["text"], "seed": config.seed, "paths": config.paths}
        if isinstance(model, TextDiffusion):
            about["estimate"] = "fresh" if is_fresh(model, config) else "carried"
        data = contents(figures, text, config, about)
        write_atomically(Path(config.json), lambda file: file.write(data))
        print(f"written all figures to {config.json}")


OF_DIFFUSION = ("steps", "paths", "estimate", "flow", "flow_steps", "probes", "seed")


def check_flags(model: Writer, config: LikelihoodConfig, given: dict[str, Any]) -> None:
    """Refuse flags that would change nothing, and steps that the model does not have.

    Raises:
        UserError: naming the first of them.
    """
    if needed := needed_by(model):
        raise UserError(
            f"{given['weights']}: expected a model of text alone, found one that cannot do without {needed}; one "
            "trained with --drop_condition above 0 can"
        )
    if not isinstance(model, TextDiffusion):
        own = ("paths", "seed") if isinstance(model, Masked) else ()
        if named := [name for name in OF_DIFFUSION if name in given and name not in own]:
            raise UserError(
                f"--{named[0]} belongs to Gaussian diffusion models: leave it out, as {given['weights']} is none"
            )
        return
    T = model.diffusion.num_timesteps
    if config.steps > T:
        raise UserError(f"--steps must be at most {T}, the steps that the model was trained with, found {config.steps}")
    if "estimate" in given and not model.model.config.self_condition:
        raise UserError(f"--estimate is about self-conditioning, which {given['weights']} does without: leave it out")
    for name, needs in (("flow_steps", ("exact", "hutchinson")), ("probes", ("hutchinson",))):
        if name in given and config.flow not in needs:
            raise UserError(f"--{name} belongs to --flow {' or '.join(needs)}, found --flow {config.flow}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return errors.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
