"""A student, which learns which noise a teacher's flow makes each sentence of, and needs one call for it, or a few.

    eps = what the teacher's flow would make x = alpha_0 E(w) + sigma_0 noise of                                    (1)
    x_t = alpha_t E(w) + sigma_t eps                                                                                (2)
    loss = -log p(w | x_t)                                                                                          (3)

In ordinary training eps says nothing of w: of x_T a network can only tell how frequent words are, and has to be asked
again and again on the way. Here eps decides w, and the whole sentence can be told from it at once. This is the reflow
of rectified flow (Liu et al. 2022, arXiv 2209.03003, section 2.2) with probabilities of words in the place of squares;
network, loss, time and samplers are those of `cross_entropy`, and the student begins with the teacher's weights.

The sentences are those of the text, followed back to their noise (as Kim et al. 2025, arXiv 2510.25229, do with
pictures), and not such as the teacher makes of noise: of those some are wrong, and a student learns that as well.

What decides is eps as it is where the teacher begins to choose words, at alpha_t / sigma_t^2 = 0.2 or so (lambda near
-3): at x_T, lambda = -12, that factor is 0.0025, and of a network that sees what x_t says of words (eq. 7 of
`cross_entropy`) eps would be hidden. So x_t counts as if the factor were at least LEAST_EVIDENCE.
"""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_diffusion import checkpoint, pretrained
from text_diffusion.config import TrainConfig
from text_diffusion.corpus import Corpus
from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.distributed import ALONE, Ranks
from text_diffusion.errors import UserError
from text_diffusion.flags import build
from text_diffusion.flow import predict_twice
from text_diffusion.generation import TextDiffusion, writer_of
from text_diffusion.memory import in_batches
from text_diffusion.objectives import Network
from text_diffusion.randomness import draw, normal
from text_diffusion.remote import local
from text_diffusion.samplers import invert
from text_diffusion.sampling import Sampling
from text_diffusion.tracking import clock

LEAST_EVIDENCE = 0.25
LR = 2e-3  # unless another is given: the student has less to learn than the teacher had
OWN = {  # settings that a student has whatever its teacher has: no word is known in sampling
    "known_words": False,
    "least_evidence": LEAST_EVIDENCE,
    "lr": LR,
    "pretrained_model": "",
    **dict.fromkeys(pretrained.FLAGS[1:], False),
}
ADJUSTABLE = ("lr", "dropout", "least_evidence")  # what follows from that unless said otherwise
SAY_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Teacher:
    """What a student begins as and learns from.

    Args:
        path: of its weights, as given.
        writer: the teacher, on the CPU.
        settings: of the student, that follow from it.
        tokenizer: its JSON text.
        fingerprint: of the weights.
    """

    path: str
    writer: TextDiffusion
    settings: dict[str, Any]
    tokenizer: str
    fingerprint: str

    @property
    def folder(self) -> str:
        """Where it is, for messages."""
        return self.path

    def check_text(self, text: Corpus, length: int) -> None:
        """Refuse labels that it does not know.

        Raises:
            UserError: naming both.
        """
        assert length == self.writer.sequence_len, "it follows from the teacher"
        if text.labels != self.writer.labels:
            raise UserError(
                f"{text.source}: expected the labels that the teacher knows, {', '.join(self.writer.labels)}, found "
                f"{', '.join(text.labels)}"
            )

    def load_into(self, model: Network) -> None:
        """Replace a fresh network's weights by the teacher's."""
        model.load_state_dict(self.writer.model.state_dict())

    def follow_back(
        self,
        ids: Tensor,
        conditions: Tensor | None,
        key: tuple[int, ...],
        levels: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """eq. (1) of sentences w (N, L), eps (N, L, D); each rank follows its share of them back.

        Args:
            ids: w.
            conditions: what each is given, (N, ...), if anything.
            key: of the noise at the least level.
            levels: of noise, at which the flow is asked.
            device: where to.
            ranks: who shares the work.

        Raises:
            UserError: no memory for a single sentence.
        """
        writer = writer_of(checkpoint.load_weights(local(self.path), device))
        assert isinstance(writer, TextDiffusion), "it was one when it was found"
        model, n, size = writer.model, len(ids), writer.choose_batch_size(len(ids))
        process = writer.diffusion.respace(writer.kept_by(Sampling(levels), writer.diffusion.num_timesteps))
        batches = -(-n // size)
        first, stop = (min(size * (batches * rank // ranks.size), n) for rank in (ranks.rank, ranks.rank + 1))
        started = said = time.monotonic()

        @torch.no_grad()
        def follow(start: int, end: int) -> list[Tensor]:
            nonlocal said
            if start > first and (now := time.monotonic()) - said > SAY_EVERY:
                said, done = now, (start - first) / (stop - first)
                print(f"{done:.0%} followed, {clock((now - started) * (1 / done - 1))} left", file=sys.stderr)
            predict = predict_twice(model, process, None if conditions is None else conditions[start:end].to(device))
            E = model.get_embeds(ids[start:end].to(device))
            noise = draw(normal, key, start, end, (E.shape[1], E.shape[2]), device)
            least = torch.zeros(end - start, dtype=torch.int64, device=device)
            x_0 = process.q_sample(E, least, noise)
            return list(invert(lambda x_t, t, _: predict(x_t, process.timesteps[int(t[0])]), process, x_0).cpu())

        def mine() -> Tensor:
            parts = in_batches(stop, size, follow, first)
            return torch.stack(parts) if parts else torch.empty(0, ids.shape[1], model.config.in_channel)

        return torch.cat(ranks.gather(ranks.together(mine))).to(device)


def find(given: dict[str, Any], saved: dict[str, Any]) -> Teacher | None:
    """The teacher that the flags, or the settings of the run that goes on, name; None without one.

    Raises:
        UserError: the file is not one of a teacher, or a flag contradicts it.
    """
    path: str = given.get("teacher", saved.get("teacher", ""))
    about: dict[str, Any] = {name: given[name] for name in ("pairs", "teacher_levels") if name in given}
    levels = build(TrainConfig, about).teacher_levels  # in range?
    if not path:
        if about:
            raise UserError(
                f"--{next(iter(about))} is about what a student learns, so it expects --teacher WEIGHTS, found none"
            )
        return None
    file = local(path)
    writer = writer_of(checkpoint.load_weights(file, torch.device("cpu")))
    if not isinstance(writer.model, WordDenoiser) or not isinstance(writer, TextDiffusion):
        raise UserError(
            f"{path}: expected a teacher of --objective cross_entropy, found one of "
            f"{writer.model.config.objective}; train another"
        )
    if levels > writer.diffusion.num_timesteps:
        T = writer.diffusion.num_timesteps
        raise UserError(f"--teacher_levels must be at most {T}, as many as the teacher has, found {levels}")
    settings = _settings(writer)
    for name, value in settings.items():
        if name not in ADJUSTABLE and given.get(name, value) != value:
            why = " for a student" if name in OWN else ", as the teacher's is"
            raise UserError(f"--{name} must be {value!r}{why}, found {given[name]!r}; leave it out")
    fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
    return Teacher(path, writer, settings, writer.tokenizer.to_json(), fingerprint)


def check_same(teacher: Teacher | None, opt: dict[str, Any] | None, folder: Path) -> None:
    """Refuse to go on from a checkpoint with another teacher than the run's.

    Raises:
        UserError: saying which was named.
    """
    if opt and opt.get("teacher", "") != (teacher.fingerprint if teacher else ""):
        raise UserError(
            f"--teacher must be the weights that the run in {folder} was started with, found "
            f"{teacher.path if teacher else 'none'}; give --checkpoint_path another folder to start a new run"
        )


def _settings(writer: TextDiffusion) -> dict[str, Any]:
    """Those of a student: the teacher's, but for its own."""
    own: dict[str, Any] = asdict(writer.model.config) | writer.info["diffusion"]
    own |= {name: writer.info["data"][name] for name in ("tokenizer", "source_len")}
    return own | {"sequence_len": writer.sequence_len} | OWN
