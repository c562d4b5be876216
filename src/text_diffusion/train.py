"""Training: parse, build, loop.

python -m text_diffusion.train --dataset simple          (`bash scripts/run_train.sh simple` calls this)
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from text_diffusion import errors
from text_diffusion.checkpoint import Weights
from text_diffusion.condition import Given
from text_diffusion.config import SIZES
from text_diffusion.control.controls import Plan
from text_diffusion.deterministic import deterministic
from text_diffusion.distributed import joined
from text_diffusion.errors import Interrupted, UserError
from text_diffusion.files import write_atomically
from text_diffusion.flags import Parser, add_options
from text_diffusion.generation import TextDiffusion, writer_of
from text_diffusion.memory import is_out_of_memory, keep_freed_memory
from text_diffusion.meter import Meter
from text_diffusion.objectives import Network
from text_diffusion.parallel import parallelised, whole_copy
from text_diffusion.run import GROUPS, Run, prepare
from text_diffusion.saver import Saver
from text_diffusion.state import TrainState
from text_diffusion.step import goes_on, train_step, warm_up
from text_diffusion.tracking import Tracker, clock
from text_diffusion.validation import validate
from text_diffusion.visible import visible

T = TypeVar("T")


def train(run: Run, state: TrainState) -> None:
    """Train from `state.step` to `run.config.steps`, logging, validating and saving on the way.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the step under way was finished and saved.
        UserError: the loss is not finite, or a checkpoint cannot be written.
    """
    config, ranks = run.config, run.ranks
    if config.compile:
        state.loss.network = torch.compile(state.model, dynamic=False)
    loss = parallelised(state.loss, config.parallel, ranks)
    tracker = Tracker(run.folder, config.track, run.settings, run.id, state.step, config.steps) if ranks.first else None
    meter = Meter(run)
    if run.resumed_meter:
        meter.load_state_dict(run.resumed_meter)
    saver = Saver(run.folder, ranks, config.keep_last, config.save_async, run.mirror)
    try:
        with signals() as received:
            if state.step and ranks.size > 2 and config.parallel == "ddp":
                in_memory(run, state, partial(warm_up, run, state, loss))
            while state.step < config.steps:
                meter.add(*in_memory(run, state, partial(train_step, run, state, loss)))
                ending = state.step == config.steps
                logging = ending or state.step % config.log_interval == 0
                validating = config.eval_interval and (ending or state.step % config.eval_interval == 0)
                if tracker and tracker.unheard and not received:
                    received.append(signal.SIGPIPE)
                stopping = ranks.any(bool(received)) and not ending
                saving = ending or stopping or state.step % config.save_interval == 0
                if saving and ranks.any(not goes_on(run, state, loss)):
                    meter.spoil()
                if logging or validating or saving:
                    ranks.together(partial(meter.check, state))
                if tracker:
                    tracker.advance()
                if logging:
                    row = meter.row(state)
                    if tracker:
                        tracker.log(row)
                        tracker.status(row, config.steps)
                if validating:
                    evaluate(run, state, tracker)
                saver.check()
                if saving:
                    saver.save(run.snapshot(state, meter.state_dict()))
                if stopping:
                    raise stopped(run, state, saver, max(ranks.gather(received[0] if received else 0)))
                meter.restart_clock()
            written = saver.finish()
            ranks.together(saver.finish_uploads)
    finally:
        saver.close()
        if tracker:
            tracker.close()
    print(f"{config.steps} steps, {clock(state.seconds)} of training", file=sys.stderr)
    if ranks.first:
        print(f"written the weights to {run.shown(written[1])}")


def stopped(run: Run, state: TrainState, saver: Saver, number: int) -> Interrupted:
    """What a run that a signal has stopped ends with, once its checkpoint is saved."""
    saver.finish()
    where = str(run.folder)
    with contextlib.suppress(UserError):  # said already
        saver.finish_uploads()
        where = run.mirror.url if run.mirror else where
    return Interrupted(
        f"stopped at step {state.step} of {run.config.steps} and saved in {where}; run the same command again to go on",
        number,
    )


def in_memory(run: Run, state: TrainState, work: Callable[[], T]) -> T:
    """What the work results in; raises UserError, with what to do, when memory runs out."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = run.config.microbatch or run.config.batch_size // run.ranks.size
        raise UserError(
            f"expected memory for {size} sentences at once, found too little at step {state.step}; --microbatch "
            f"{max(size // 4 * 2, 2)} needs less and gives the same gradient; the same command goes on with it"
        ) from None


def evaluate(run: Run, state: TrainState, tracker: Tracker | None) -> None:
    """Validate the first EMA on held-out text, all ranks together, and let it write a few sentences."""
    model = whole_copy(state.emas[0].model, run.network)
    if run.held_out is not None:
        row = validate(model, run.diffusion, run.held_out, run.ranks, run.held_out_given, run.held_out_noise)
        if tracker:
            tracker.log({"step": state.step, **row, "world_size": run.ranks.size})
            tracker.say(f"step {state.step}  " + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if tracker is None:
        return
    for number, sentence in enumerate(a_few(run, model)):
        tracker.say(f"    {visible(run.said_given(number))}{visible(sentence)}")


def a_few(run: Run, model: Network) -> list[str]:
    """Four sentences, given what the first four held-out ones are given; in at most 20 network calls."""
    writer = writer_of(Weights(model, run.diffusion, run.tokenizer, run.data_config.sequence_len, {}))
    given = None if run.held_out_given is None else Given(run.held_out_given[:4])
    if isinstance(writer, TextDiffusion):
        return writer.sample(4, steps=min(20, run.diffusion.num_timesteps), controls=Plan(given=given))
    return writer.sample(4, given=given)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Catch SIGINT, SIGTERM and, unless nohup has it ignored, SIGHUP: the list fills when one comes.

    A second Ctrl-C interrupts at once.
    """
    received: list[int] = []

    def handler(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    caught = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # not on every system
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        caught.append(hangup)
    before = {number: signal.signal(number, handler) for number in caught}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that were given, by name, those that --size stands for included."""
    parser = Parser(prog="text-diffusion train", description="Train a diffusion model on a text.")
    parser.add_argument("--size", choices=tuple(SIZES), help="a named set of sizes; single flags beat it")
    add_options(parser, *GROUPS)
    given = vars(parser.parse_args(argv))
    size = given.pop("size")
    sizes = dict(SIZES[size]) if size else {}
    if given.get("denoiser") == "modern":
        sizes.pop("activation", None)  # which it has only one of
    return sizes | given


def command(argv: Sequence[str] | None) -> None:
    """Parse, build, save the settings, train."""
    with joined() as ranks:
        given = ranks.together(partial(parse, argv))
        keep_freed_memory()
        run, state = ranks.together(partial(prepare, given, ranks))
        try:
            with deterministic(run.config.deterministic):
                begin(run, state)
        finally:
            if run.lock:
                run.lock.release()


def begin(run: Run, state: TrainState) -> None:
    """Save the settings, and train if there is something left to do."""
    if run.ranks.first:
        text = json.dumps(run.settings, indent=2) + "\n"
        write_atomically(run.folder / "training_args.json", lambda file: file.write(text.encode()))
    parameters = sum(p.numel() for p in state.model.parameters())
    where = f"{run.ranks.size} x {run.device.type} ({run.config.parallel})" if run.ranks.size > 1 else run.device
    print(
        f"{parameters:,} parameters on {where}, --objective {run.model_config.objective}; "
        f"settings in {run.shown(run.folder / 'training_args.json')}",
        file=sys.stderr,
    )
    if state.step == run.config.steps:
        print(f"the run in {run.folder} is complete at step {state.step}; a larger STEPS extends it", file=sys.stderr)
        return
    train(run, state)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return errors.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
