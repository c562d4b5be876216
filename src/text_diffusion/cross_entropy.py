"""The objective `cross_entropy`: the denoiser says how probable each word is, and x_0 is the mean of their embeddings.

    E(w) = sqrt(D) W_w / |W_w|                                 embeddings on a sphere: none can grow, all can turn  (1)
    x_t = alpha_t E(w) + sigma_t eps,   lambda_t = log(alpha_t^2 / sigma_t^2)                                       (2)
    log p(v | x_t) = <E(v), s f(x_t, t)> + b_v + log N(x_t; alpha_t E(v), sigma_t^2 I) + const                      (3)
    x_0 = sum_v p(v | x_t) E(v)                                what every sampler asks for                          (4)
    loss = -log p(w | x_t),   t being drawn so that its mean is linear in time (`fitted_time`)                      (5)

(1), (4) and (5) are those of continuous diffusion for categorical data (Dieleman et al. 2022, arXiv 2211.15089), the
last term of (3) is the output prior of Plaid (Gulrajani & Hashimoto 2023, arXiv 2305.18619). All E(v) being equally
long, it is <E(v), e>, e = x_t alpha_t / sigma_t^2: the evidence of a word's own noisy embedding. Left to f is what the
words around it say, and both together are one product with E:

    log p(v | x_t) = <E(v), q> + b_v + const,   q = s f(x_t, t) + e                                                 (6)

with s, the output scale, so large that f need not grow for long before a word is out of the question: what is wrong
with probability 0.002 has next to no gradient, and training does not come back to it. To q is added what the evidence
of other positions says of this one (`shared_evidence`).

What f sees is not x_t, most of which is noise, but what it says by itself, with a word's neighbours left out:

    f(x_t, t) = network(sum_v softmax(<E(v), e> + b_v) E(v), t)                                                     (7)

Time is the log-SNR lambda: the schedule `log-snr` is linear in t, so that a network which is told t knows alpha_t and
sigma_t. In training a share of each sentence's words, another in each, is shown at t = 0, as if they were known: where
all words are hidden equally well, what they say of each other is hard to find out. Fewer and fewer are shown, and in
the end none, as none is in sampling. Shapes: x_t, q, e (B, L, D), E (V, D), w (B, L), t (B,) or, where positions
differ, (B, L).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text_diffusion.chunked import mean_embedding, word_nll
from text_diffusion.config import ModelConfig
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise, first_estimate
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.schedules import LOG_SNR_MAX, log_snr_at
from text_diffusion.shared_evidence import SharedEvidence

MOST_SHARED = 1.0  # alpha_t / sigma_t^2 of evidence that is shared: a clear word must not drown all others
KNOWN_UNTIL = 0.6  # of training: from then on no words are shown
POSITION_STD = 0.1  # of fresh position embeddings: at 1 they drown the words, which the layers then find late


class WordDenoiser(TransformerNetModel):
    """p(v | x_t) at every position, with the network f of `modeling`.

    Args:
        config: sizes and choices.
        vocab_size: V.
        sequence_len: largest L.
        conditions: how many labels, or how many tokens in a source.
    """

    noisy_start = False

    def __init__(self, config: ModelConfig, vocab_size: int, sequence_len: int, conditions: int = 0) -> None:
        super().__init__(config, vocab_size, sequence_len, conditions)
        if config.denoiser == "bert":
            nn.init.normal_(self.position_embeddings.weight, std=POSITION_STD)
        nn.init.zeros_(self.lm_head.bias)
        if config.shared_evidence:
            self.shared_evidence = SharedEvidence(config.hidden_size, config.num_heads)

    @property
    def embeddings(self) -> Tensor:
        """E, (V, D), eq. (1)."""
        W = self.word_embedding.weight.float()
        return F.normalize(W, dim=1) * math.sqrt(W.shape[1])

    def get_embeds(self, input_ids: Tensor) -> Tensor:
        """E(w), ids (B, L) -> (B, L, D)."""
        return F.embedding(input_ids, self.embeddings)

    def get_logits(self, x: Tensor) -> Tensor:
        """log p(v | x) but for a constant, x being a word at the smallest noise: (B, L, D) -> (B, L, V)."""
        return F.linear(x.float() * math.exp(LOG_SNR_MAX), self.embeddings)

    def forward(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        x_self: Tensor | None = None,
        input_ids: Tensor | None = None,
        temperature: float = 1.0,
        *,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Predict x_0, eq. (4), (B, L, D); or, if words are given, how improbable they are, -log p(w | x_t), (B, L).

        Args:
            x_t: (B, L, D), L <= sequence_len.
            timesteps: (B,) or (B, L) float, rescaled to 0..1000.
            x_self: (B, L, D), the previous estimate of x_0; what `without_estimate` gives if there is none.
            input_ids: w, (B, L).
            temperature: of p in eq. (4); below 1, likely words count for more.
            condition: as for `TransformerNetModel`.
        """
        q, E, b = self.query(x_t, timesteps, x_self, condition), self.embeddings, self.lm_head.bias
        with torch.autocast(x_t.device.type, enabled=False):  # at small noise the scores are too large for bf16
            if input_ids is None:
                return mean_embedding(q, E, b, temperature)
            return word_nll(q, E, b, input_ids)

    def log_probs(
        self, x_t: Tensor, timesteps: Tensor, x_self: Tensor | None = None, *, condition: Tensor | None = None
    ) -> Tensor:
        """log p(v | x_t) of every word, (B, L, V), eq. (3); arguments as for `forward`."""
        q = self.query(x_t, timesteps, x_self, condition)
        return F.linear(q, self.embeddings, self.lm_head.bias).log_softmax(dim=-1)

    def query(self, x_t: Tensor, timesteps: Tensor, x_self: Tensor | None, condition: Tensor | None = None) -> Tensor:
        """q of eq. (6), (B, L, D) float32."""
        seen, first = x_t, self.config.self_condition and x_self is None
        if self.config.denoised_input or first:
            own = self.without_estimate(x_t, timesteps)
            seen = own if self.config.denoised_input else x_t
            x_self = own if first else x_self
        noisiest = timesteps if timesteps.ndim == 1 else timesteps.amax(dim=1)
        h = self.hidden(seen, noisiest, x_self, condition)
        q: Tensor = self.config.output_scale * self.output_down_proj(h).float()
        if self.config.shared_evidence:
            q = q + self.shared_evidence(h, self.evidence(x_t, timesteps, most=MOST_SHARED))
        return q + self.evidence(x_t, timesteps) if self.config.output_prior else q

    def without_estimate(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The x_0 that the noisy embeddings show by themselves, eq. (4) with f = 0, (B, L, D).

        In training no gradient comes from it: it is what there is to see, and costs as much as the scores of all words.
        """
        gradient = torch.is_grad_enabled() and not self.training
        with torch.autocast(x_t.device.type, enabled=False), torch.set_grad_enabled(gradient):
            return mean_embedding(self.evidence(x_t, timesteps), self.embeddings, self.lm_head.bias)

    def evidence(self, x_t: Tensor, timesteps: Tensor, most: float = math.inf) -> Tensor:
        """e of eq. (6), (B, L, D) float32, with alpha_t / sigma_t^2 at least `least_evidence` and at most as given."""
        return evidence(x_t, timesteps, self.config.least_evidence, most)


def evidence(x_t: Tensor, timesteps: Tensor, least: float = 0.0, most: float = math.inf) -> Tensor:
    """e of eq. (6), (B, L, D) float32, with alpha_t / sigma_t^2 within bounds."""
    lam = log_snr_at(timesteps.float()).unsqueeze(-1)  # (B, 1) or (B, L, 1)
    lam = lam if lam.ndim == 3 else lam[:, None]
    return x_t.float() * (lam.sigmoid().sqrt() / (-lam).sigmoid()).clamp(least, most)


@dataclass(frozen=True)
class WordTerms:
    """The only term, (B,): -log p(w | x_t) in nats, the mean over the positions (pads included) that are not known."""

    cross_entropy: Tensor

    def total(self, weights: Tensor | float = 1.0) -> Tensor:
        """The loss of each sentence, (B,)."""
        return weights * self.cross_entropy


def cross_entropy_loss(
    model: WordDenoiser,
    diffusion: GaussianDiffusion,
    input_ids: Tensor,
    t: Tensor,
    noise: Noise,
    condition: Tensor | None = None,
) -> WordTerms:
    """The loss of sentences w (B, L) at timesteps t (B,); in evaluation mode no word is known."""
    share = max(0.0, 1 - model.progress / KNOWN_UNTIL) if model.training and model.config.known_words else 0.0
    known = known_words(noise, share)  # (B, L)
    at = t[:, None].where(~known, 0)  # (B, L)
    x_t = diffusion.q_sample(model.get_embeds(input_ids), at, noise.t)
    timesteps = diffusion.network_time(at)
    x_self = first_estimate(model, x_t, timesteps, condition)
    nll = model(x_t, timesteps, x_self, input_ids, condition=condition)
    return WordTerms(nll.masked_fill(known, 0).sum(dim=1) / (~known).sum(dim=1).clamp(min=1))


def known_words(noise: Noise, share: float) -> Tensor:
    """Which words are shown without noise, (B, L) bool, with a probability uniform in 0..share over the sentences.

    The draw that other objectives use for w -> x_0 is free here, and decides.
    """
    u = torch.special.ndtr(noise.start)
    known: Tensor = u[:, :, 0] < share * u[:, :1, -1]
    return known
