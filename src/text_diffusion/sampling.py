"""How sentences are made from noise: the settings, and what is chosen where they leave a choice."""

from __future__ import annotations

from dataclasses import dataclass, replace

from text_diffusion.errors import UserError
from text_diffusion.samplers import SAMPLERS

FEW = 20  # steps
LEVELS = 10  # of noise, to fill gaps at


@dataclass(frozen=True)
class Sampling:
    """How sentences are made from noise.

    Args:
        steps: network calls, 1..T; if not given 50, or all levels of noise there are, if fewer.
        seed: of the noise.
        sequence_len: tokens in a sentence, at most the model's, which is the default.
        sampler: "ancestral", "ddim", "dpm-solver++" or "heun" (see `samplers`); "auto" is chosen
            (see `chosen`).
        spacing: which timesteps are kept: "auto", "loss", "uniform" or "log-snr" (see `spacing.spaced_timesteps`).
        eta: of ddim, 0..1: the share of the noise that is drawn anew at each step; 0 if not given.
        resample: of ancestral: network calls at each level of noise, of which there are fewer then.
        churn: of dpm-solver++ and heun: how much noise is added again on the way, in all; none if not given.
        top_p: truncate the noise added at each step to |z| <= top_p (less variety, more typical sentences).
        clamp: round each prediction of x_0 to the nearest words.
        clamp_start: clamp only at timesteps t < clamp_start, 1..T; everywhere if not given.
        halt: leave a sentence alone once its words have not changed for so many calls; never if not given.
        temperature: of the probabilities of words, for a model that has them (objective cross_entropy); 1 if not given.

    Raises:
        ValueError: arguments that contradict each other or are out of range.
    """

    steps: int = 50
    seed: int = 10708
    sequence_len: int | None = None
    sampler: str = "auto"
    spacing: str = "auto"
    eta: float | None = None
    resample: int | None = None
    churn: float | None = None
    top_p: float | None = None
    clamp: bool = False
    clamp_start: int | None = None
    halt: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"the sampler must be one of {', '.join(SAMPLERS)}, found {self.sampler!r}")
        if self.sampler == "heun" and self.steps < 3:
            raise UserError(
                f"the sampler heun needs at least 3 STEPS (it calls the network twice a step), found {self.steps}"
            )
        if self.eta is not None and (self.sampler != "ddim" or not 0 <= self.eta <= 1):
            raise UserError(
                f"eta belongs to the sampler ddim and must be between 0 and 1, found {self.eta:g} with {self.sampler}"
            )
        if self.resample is not None and (self.sampler not in ("auto", "ancestral") or self.resample < 1):
            raise UserError(
                "resample belongs to the sampler ancestral and must be at least 1 call a level, "
                f"found {self.resample} with {self.sampler}"
            )
        if self.churn is not None and (self.sampler not in ("auto", "dpm-solver++", "heun") or not self.churn > 0):
            raise UserError(
                "churn belongs to the samplers dpm-solver++ and heun and must be above 0, "
                f"found {self.churn:g} with {self.sampler}"
            )
        if self.top_p is not None and not self.top_p > 0:
            raise UserError(f"TOP_P must be above 0 (it bounds the noise), found {self.top_p:g}")
        if self.top_p is not None and self.sampler not in ("auto", "ancestral") and not (self.eta or self.churn):
            raise UserError(
                f"TOP_P bounds the noise of each step, and {self.sampler} adds none without eta or churn; leave out "
                "one of the two"
            )
        if self.clamp_start is not None and not self.clamp:
            raise UserError("clamp_start says from where to clamp, so it expects clamp to be on, found it off")
        if self.halt is not None and self.halt < 1:
            raise UserError(f"halt must be at least 1 call, found {self.halt}")
        if self.temperature is not None and not self.temperature > 0:
            raise UserError(f"the temperature must be above 0, found {self.temperature:g}")

    @property
    def levels(self) -> int:
        """Levels of noise at which the network is called: fewer than the steps if each takes several calls."""
        if self.sampler == "heun":
            return self.steps // 2 + 1 + self.steps % 2
        return self.steps if self.resample is None else -(-(self.steps - 1) // self.resample) + 1

    def chosen(self, fills: bool = False, words: bool = False, student: bool = False) -> Sampling:
        """With a sampler in the place of "auto".

        dpm-solver++ for up to FEW steps, and for more ancestral, whose new noise corrects mistakes on the way; with
        top_p ancestral, as dpm-solver++ has no noise to truncate; with churn dpm-solver++. Unless that contradicts a
        setting, there are exceptions:

        - fills: if gaps between known words are to be filled, ancestral on LEVELS levels, each as often as the steps
          allow: what is in a gap is decided where the known words are hidden by noise too, and has to meet them again.
        - words: a model of words (objective cross_entropy) corrects more by dpm-solver++ with all the churn it takes.
        - student: always dpm-solver++, as it learned where its first noise leads, and no other.
        """
        if self.sampler != "auto":
            return self
        free = self.top_p is None and self.resample is None
        if fills and free and not student and self.churn is None and self.steps >= 2 * LEVELS:
            return replace(self, sampler="ancestral", resample=self.steps // LEVELS)
        if free and (student or self.churn is not None or self.steps <= FEW):
            return replace(self, sampler="dpm-solver++")
        if free and words:
            return replace(self, sampler="dpm-solver++", churn=self.steps / 2)
        return replace(self, sampler="ancestral")
