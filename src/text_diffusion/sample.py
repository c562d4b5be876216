"""Sampling from the command line: sentences shown as the noise leaves them, then written to a file.

python -m text_diffusion.sample --model_name_or_path CKPT          (`bash scripts/text_sample.sh CKPT` calls this)
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from text_diffusion import errors
from text_diffusion.checkpoint import load_weights
from text_diffusion.config import SampleConfig
from text_diffusion.control.controls import Plan
from text_diffusion.control.given import given_of
from text_diffusion.control.mbr import best_of, check_bleu
from text_diffusion.control.options import ControlConfig
from text_diffusion.device import pick_device
from text_diffusion.display import Display
from text_diffusion.distributed import ALONE, Ranks, joined
from text_diffusion.errors import UserError
from text_diffusion.files import check_writable, write_atomically
from text_diffusion.flags import Parser, add_options, build
from text_diffusion.generation import TextDiffusion, Writer, writer_of
from text_diffusion.masked import Masked
from text_diffusion.memory import in_batches, keep_freed_memory
from text_diffusion.mirror import Mirror
from text_diffusion.quick import quicken
from text_diffusion.remote import StoreError, cache_of, is_remote, local
from text_diffusion.sampling import Sampling
from text_diffusion.visible import visible

PRINTED = 10  # sentences on standard output; the file has them all
OF_ALL = ("label", "source_file", "mbr")  # controls of models that write left to right too
OF_DIFFUSION = (
    *("steps", "sampler", "spacing", "eta", "resample", "churn", "top_p", "clamp", "clamp_start", "halt"),
    *("temperature", "precision", "compile"),
)


def output_path(config: SampleConfig, named: Sequence[str] = ("steps", "clamp")) -> Path:
    """OUT_DIR/CKPTNAME.samples_N.steps-S.clamp-C.seed-R.txt; without steps or clamp where a model has none."""
    weights = Path(config.model_name_or_path)
    folder = Path(config.out_dir) if config.out_dir else weights.parent
    how = "".join(f"{name}-{getattr(config, name)}." for name in named)
    return folder / f"{weights.stem}.samples_{config.num_samples}.{how}seed-{config.seed}.{config.format}"


def own_settings(model: Writer) -> tuple[str, ...]:
    """What there is to choose in a model that is not Gaussian diffusion."""
    return ("steps", "seed") if isinstance(model, Masked) else ("seed",)


def sampling(config: SampleConfig) -> Sampling:
    """The part of the settings that says how a diffusion model samples; what is 0 on the command line is off."""
    return Sampling(
        steps=config.steps,
        seed=config.seed,
        sequence_len=config.sequence_len or None,
        sampler=config.sampler,
        spacing=config.spacing,
        eta=config.eta or None,
        resample=config.resample or None,
        churn=config.churn or None,
        top_p=config.top_p or None,
        clamp=config.clamp == "clamp",
        clamp_start=config.clamp_start or None,
        halt=config.halt or None,
        temperature=None if config.temperature == 1 else config.temperature,
    )


def generate(model: Writer, config: SampleConfig, plan: Plan, ranks: Ranks = ALONE, first: int = 0) -> list[str]:
    """Sample in batches, from sentence `first` of the seed, each rank its share; the first are shown in the making."""
    mine = ranks.share(config.num_samples)
    sentences = ranks.together(lambda: _generate(model, config, plan, first + mine.start, first + mine.stop))
    return [sentence for part in ranks.gather(sentences) for sentence in part]


def _generate(model: Writer, config: SampleConfig, plan: Plan, first: int, last: int) -> list[str]:
    """The sentences first..last-1 of the seed."""
    if not isinstance(model, TextDiffusion):
        size = config.batch_size or None
        how = {name: getattr(config, name) for name in own_settings(model)}
        return model.sample(last, batch_size=size, first=first, given=plan.given, **how)
    size = config.batch_size or model.choose_batch_size(last - first, plan)
    calls = -(-(last - first) // size) * config.steps
    with tqdm(total=calls, unit="call", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:

        def make(start: int, stop: int) -> list[str]:
            display = Display(model, min(config.show, stop - start) if start == 0 else 0, config.steps, bar)
            for step in model.denoising(start, stop, controls=plan, **asdict(sampling(config))):
                display.show(step)
                bar.update()
            return model.decode(step.pred_xstart, unknown=plan.unknown)

        return in_batches(last, size, make, first)


def contents(sentences: Sequence[str], model: Writer, config: SampleConfig, control: ControlConfig) -> bytes:
    """The text of the output file, plain or as JSON lines."""
    lines = list(sentences)
    if config.format == "jsonl":
        how = {name: getattr(config, name) for name in own_settings(model)}
        how = asdict(sampling(config)) if isinstance(model, TextDiffusion) else how
        usual = asdict(ControlConfig())
        asked = {name: value for name, value in asdict(control).items() if value != usual[name]}
        about = {"weights": Path(config.model_name_or_path).name, **how, **asked}
        lines = [json.dumps({"text": text, "index": i, **about}, ensure_ascii=False) for i, text in enumerate(lines)]
    return "".join(line + "\n" for line in lines).encode()


def free_name(path: Path, text: bytes) -> Path:
    """`path`, or, when it holds something else already, the first of path.2, path.3, ... that does not."""
    number, candidate = 1, path
    while candidate.is_file() and candidate.read_bytes() != text:
        number += 1
        candidate = path.with_name(f"{path.stem}.{number}{path.suffix}")
    if candidate != path:
        print(f"{path.name} is there already, from other settings, and stays as it is", file=sys.stderr)
    return candidate


def command(argv: Sequence[str] | None) -> None:
    """Parse, load, sample, write."""
    with joined() as ranks:
        keep_freed_memory()
        given = ranks.together(lambda: parse(argv))
        ranks.agree("flags", {f"--{name}": value for name, value in given.items()})
        model, config, control, plans = ranks.together(lambda: prepare(given, ranks))
        written = config.num_samples // (control.mbr or 1)
        in_name = ("steps", "clamp") if isinstance(model, TextDiffusion) else own_settings(model)[:-1]
        path = output_path(replace(config, num_samples=written), in_name)
        mirror = None
        if is_remote(config.out_dir):
            mirror = ranks.together(lambda: Mirror(config.out_dir, f"{path.stem}*") if ranks.first else None)
            path = cache_of(config.out_dir, f"{path.stem}*") / path.name
        made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        ranks.on_first(lambda: check_writable(path.parent))
        with gone_if_failed(made if ranks.first else []):
            sentences = list[str]()
            for plan in plans:  # of a template each; no two meet the same noise
                sentences += generate(model, config, plan, ranks, len(sentences))
            if control.mbr:
                sentences = best_of(sentences, control.mbr)
            text = contents(sentences, model, config, control)
            ranks.on_first(lambda: write(sentences, text, path, mirror))


@contextlib.contextmanager
def gone_if_failed(folders: Sequence[Path]) -> Iterator[None]:
    """Remove new folders, the innermost first, if what they were made for does not come about."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else has put something there
            for folder in folders:
                folder.rmdir()
        raise


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that were given, by name."""
    parser = Parser(prog="text-diffusion sample", description="Write sentences with a trained model.")
    add_options(parser, SampleConfig, ControlConfig)
    return vars(parser.parse_args(argv))


def prepare(given: dict[str, Any], ranks: Ranks) -> tuple[Writer, SampleConfig, ControlConfig, list[Plan]]:
    """The model, the settings and what steers it; every mistake is found before a folder is made."""
    config, control = build(SampleConfig, given), build(ControlConfig, given)
    if empty := [name for name in asdict(control) if given.get(name) == ""]:
        raise UserError(f"--{empty[0]} expects something to ask for, found nothing; leave it out")
    if not config.model_name_or_path:
        raise UserError("CKPT must name a weights file (--model_name_or_path), found nothing")
    if is_remote(config.model_name_or_path):
        url = config.model_name_or_path
        weights = str(local(url))
        config = replace(config, model_name_or_path=weights, out_dir=config.out_dir or url.rpartition("/")[0])
    device = pick_device(config.device, config.gpu, ranks)
    model = writer_of(load_weights(Path(config.model_name_or_path), device, config.tokenizer))
    sources = control.sources(1)
    if sources:
        config = for_sources(given, config, control, len(sources[0].texts))
    elif model.model.config.condition == "source":
        raise UserError("a model that was trained with --condition source writes for sources: give --source_file")
    each = config.num_samples // len(sources[0].texts) if sources else 1
    if isinstance(model, TextDiffusion):
        plans = control.plans(model, Path(config.model_name_or_path), config.sequence_len, each)
        if "steps" not in given:
            config = replace(config, steps=min(config.steps, plans[0].levels(model.diffusion.num_timesteps)))
        for plan in plans:
            model.denoising(0, 1, controls=plan, **asdict(sampling(config)))
        how = model.chosen(sampling(config), plans[0])
        config = replace(config, sampler=how.sampler, resample=how.resample or 0, churn=how.churn or 0.0)
        if config.compile and config.halt:
            raise UserError("--compile expects as many sentences in every call, found --halt: leave out one of the two")
        quicken(model.model, device, config.precision, config.compile)
        return model, config, control, plans
    own = (*own_settings(model), *OF_ALL)
    foreign = [name for name in (*OF_DIFFUSION, *asdict(control), "sequence_len", "show") if name not in own]
    if named := [name for name in foreign if name in given]:
        raise UserError(
            f"--{named[0]} belongs to Gaussian diffusion models: leave it out, as {config.model_name_or_path} is none"
        )
    return model, config, control, [Plan(given=given_of(control.own(each), model))]


def for_sources(given: dict[str, Any], config: SampleConfig, control: ControlConfig, sources: int) -> SampleConfig:
    """As many sentences as the sources need: one for each unless said otherwise, or the candidates of --mbr.

    Raises:
        UserError: --mbr is given another number, or lacks its library.
    """
    each = config.num_samples if "num_samples" in given else 1
    if control.mbr:
        if each != 1:
            raise UserError(f"--mbr writes one sentence for each source: leave NUM_SAMPLES out, found {each}")
        check_bleu()
    return replace(config, num_samples=sources * (control.mbr or each))


def write(sentences: Sequence[str], text: bytes, path: Path, mirror: Mirror | None = None) -> None:
    """Write them to a file under a name that is free, and the first of them to standard output."""
    path = free_name(path, text)
    write_atomically(path, lambda file: file.write(text))
    if mirror:
        try:
            mirror.push()
        except StoreError as error:
            raise UserError(f"{error} (the sentences are in {path}, and the same command uploads them)") from None
        finally:
            mirror.lock.release()
    for sentence in sentences[:PRINTED]:
        print(visible(sentence))
    if len(sentences) > PRINTED:
        print(f"... and {len(sentences) - PRINTED} more")
    print(f"written the decoded output to {f'{mirror.url}/{path.name}' if mirror else path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return errors.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
