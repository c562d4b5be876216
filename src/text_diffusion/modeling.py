"""The denoiser f(x_t, t) -> x_0: token, position and time embeddings, a transformer encoder, a tied head.

Shapes: x (B, L, D), h (B, L, H), ids (B, L), t (B,), heads are written A and have H / A entries each.

Two shapes of encoder here. `norm="post"` is BERT's (Devlin et al. 2018; the original's denoiser): LN(h + sublayer(h)).
`norm="pre"` is h + sublayer(LN(h)) with one more LN at the end (Xiong et al. 2020, arXiv 2002.04745). Layers of
another kind are in `modern`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from text_diffusion.condition import condition_table, of_labels, of_source
from text_diffusion.config import ModelConfig
from text_diffusion.modern import EPS, ModernLayer, TimeModulation, feed_forward_width, rotation
from text_diffusion.neighbours import Neighbours

LAYER_NORM_EPS = 1e-12  # BERT's
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Transformer(nn.Module):
    """What all networks here consist of: embeddings, a tied head, and an encoder between two projections.

    Args:
        config: sizes and choices.
        vocab_size: V.
        sequence_len: largest L.
        conditions: how many labels, or how many tokens in a source (see `condition`).
    """

    timed: bool  # whether it is told the time
    causal: bool  # whether each position sees itself and those before it only
    progress = 0.0  # how much of training is done, 0..1, which a loss may go by

    def __init__(self, config: ModelConfig, vocab_size: int, sequence_len: int, conditions: int = 0) -> None:
        super().__init__()
        D, H, C = config.in_channel, config.hidden_size, config.num_channels
        self.config = config
        self.sequence_len = sequence_len
        self.gradient_checkpointing = False

        self.word_embedding = nn.Embedding(vocab_size, D)
        self.lm_head = nn.Linear(D, vocab_size)
        self.lm_head.weight = self.word_embedding.weight  # tied: what a word is, is how it is recognised

        inputs = 2 * D if self.timed and config.self_condition else D
        if self.timed:
            self.time_embed = nn.Sequential(nn.Linear(C, 4 * C), nn.SiLU(), nn.Linear(4 * C, H))
        self.input_up_proj = nn.Sequential(nn.Linear(inputs, H), nn.Tanh(), nn.Linear(H, H))
        self.dropout = nn.Dropout(config.dropout)
        if config.denoiser == "modern":
            width = feed_forward_width(config, self.timed)
            self.layers = nn.ModuleList(ModernLayer(config, width, self.causal) for _ in range(config.num_layers))
            self.time_modulation = TimeModulation(H) if self.timed else None
            self.final_norm: nn.Module = nn.RMSNorm(H, eps=EPS)
        else:
            self.position_embeddings = nn.Embedding(sequence_len, H)
            self.LayerNorm = nn.LayerNorm(H, eps=LAYER_NORM_EPS)
            self.layers = nn.ModuleList(EncoderLayer(config, self.causal) for _ in range(config.num_layers))
            self.final_norm = nn.LayerNorm(H, eps=LAYER_NORM_EPS) if config.norm == "pre" else nn.Identity()
        if config.neighbours:
            self.neighbours = Neighbours(H, config.neighbours, self.causal)
        self.output_down_proj = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, D))
        if config.condition != "none":
            self.condition = condition_table(conditions, H)

    @property
    def embeddings(self) -> Tensor:
        """E, (V, D)."""
        return self.word_embedding.weight

    def placed(self, x: Tensor) -> Tensor:
        """The sentence as it enters the layers, (B, L, D or 2D) -> (B, L, H), with positions if these are learned."""
        h: Tensor = self.input_up_proj(x)
        return h if self.config.denoiser == "modern" else h + self.position_embeddings.weight[: x.shape[1]]

    def encode(self, h: Tensor, time: Tensor | None = None) -> Tensor:
        """Through all layers, (B, n, H) -> (B, n, H); time (B, 1, H), of a network that is told it."""
        given: tuple[Tensor | None, ...] = ()
        if self.config.denoiser == "modern":
            turns = rotation(h.shape[1], h.shape[2] // self.config.num_heads, h.device)
            given = turns, None if self.time_modulation is None else self.time_modulation(time)
        else:
            h = self.LayerNorm(h if time is None else h + time)
        h = self.neighbours(h) if self.config.neighbours else h
        encoded: Tensor = self.final_norm(through(self.layers, self.dropout(h), self.gradient_checkpointing, *given))
        return encoded


class TransformerNetModel(Transformer):
    """f: predicts the clean embeddings x_0 of every position from x_t, all of them attending to all.

    Pads are tokens like others: they are attended to and predicted, in training as in sampling.
    """

    timed, causal = True, False
    noisy_start = True  # x_0 is E(w) and the first, smallest noise (Diffusion-LM section 4.1)

    def get_embeds(self, input_ids: Tensor) -> Tensor:
        """E(w), ids (B, L) -> (B, L, D)."""
        embeds: Tensor = self.word_embedding(input_ids)
        return embeds

    def get_logits(self, x: Tensor) -> Tensor:
        """Scores of every word at every position, (B, L, D) -> (B, L, V)."""
        logits: Tensor = self.lm_head(x)
        return logits

    def forward(
        self, x_t: Tensor, timesteps: Tensor, x_self: Tensor | None = None, *, condition: Tensor | None = None
    ) -> Tensor:
        """Predict x_0.

        Args:
            x_t: (B, L, D), L <= sequence_len.
            timesteps: (B,) float, rescaled to 0..1000 whatever T is.
            x_self: (B, L, D), the previous estimate of x_0 (Analog Bits, arXiv 2208.04202); zeros if there is none.
            condition: of a conditional model, labels (B,) or sources (B, S); nothing is given if it is left out.
        """
        x_start: Tensor = self.output_down_proj(self.hidden(x_t, timesteps, x_self, condition))  # (B, L, D)
        return x_start

    def hidden(self, x_t: Tensor, timesteps: Tensor, x_self: Tensor | None, condition: Tensor | None) -> Tensor:
        """What the layers make of x_t, (B, L, H); arguments as for `forward`."""
        L = x_t.shape[1]
        if self.config.self_condition:
            x_self = self.without_estimate(x_t, timesteps) if x_self is None else x_self
            x_t = torch.cat([x_t, x_self], dim=-1)  # (B, L, 2D)
        time = self.time_embed(timestep_embedding(timesteps, self.config.num_channels))[:, None]  # (B, 1, H)
        if self.config.condition == "labels":
            time = time + of_labels(self.condition.weight, condition)
        h = self.placed(x_t)  # (B, L, H)
        if self.config.condition == "source":
            known = of_source(self.get_embeds, self.condition.weight, condition, len(h))
            known = known.repeat(1, 1, 2) if self.config.self_condition else known  # it is its own estimate
            h = torch.cat([self.input_up_proj(known) + self.condition.weight, h], dim=1)  # (B, S + L, H)
        return self.encode(h, time)[:, -L:]

    def without_estimate(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """What self-conditioning sees where there is no estimate of x_0 yet, (B, L, D)."""
        return torch.zeros_like(x_t)

    def log_probs(
        self, x_t: Tensor, timesteps: Tensor, x_self: Tensor | None = None, *, condition: Tensor | None = None
    ) -> Tensor:
        """log p(v | x_t) of every word, (B, L, V), as the tied head reads the prediction of x_0."""
        return self.get_logits(self(x_t, timesteps, x_self, condition=condition)).float().log_softmax(dim=-1)


def through(layers: nn.ModuleList, h: Tensor, gradient_checkpointing: bool, *given: Tensor | None) -> Tensor:
    """One layer after the other, (B, L, H) -> (B, L, H); each again for its gradient, if memory is short."""
    for layer in layers:
        again = gradient_checkpointing and torch.is_grad_enabled()
        h = checkpoint(layer, h, *given, use_reentrant=False) if again else layer(h, *given)
    return h


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection and a layer norm.

    Args:
        config: sizes and choices.
        causal: each position attends to itself and to those before it only.
    """

    def __init__(self, config: ModelConfig, causal: bool = False) -> None:
        super().__init__()
        H = config.hidden_size
        self.config, self.causal = config, causal
        self.qkv = nn.Linear(H, 3 * H)
        self.attention_output = nn.Linear(H, H)
        self.attention_norm = nn.LayerNorm(H, eps=LAYER_NORM_EPS)
        self.intermediate = nn.Linear(H, 4 * H)
        self.output = nn.Linear(4 * H, H)
        self.output_norm = nn.LayerNorm(H, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, H) -> (B, L, H)."""
        if self.config.norm == "pre":
            h = h + self.attention(self.attention_norm(h))
            return h + self.feed_forward(self.output_norm(h))
        h = self.attention_norm(h + self.attention(h))
        normed: Tensor = self.output_norm(h + self.feed_forward(h))
        return normed

    def attention(self, h: Tensor) -> Tensor:
        """Multi-head attention (Vaswani et al. 2017, section 3.2)."""
        B, L, H = h.shape
        A = self.config.num_heads
        q, k, v = self.qkv(h).view(B, L, 3, A, H // A).permute(2, 0, 3, 1, 4)  # each (B, A, L, H / A)
        dropout_p = self.config.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=self.causal)
        out: Tensor = self.dropout(self.attention_output(mixed.transpose(1, 2).reshape(B, L, H)))
        return out

    def feed_forward(self, h: Tensor) -> Tensor:
        """Two linear maps with the activation between them."""
        out: Tensor = self.dropout(self.output(ACTIVATIONS[self.config.activation](self.intermediate(h))))
        return out


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines and sines of t at geometrically spaced frequencies, (B,) -> (B, dim) (Vaswani et al., section 3.5)."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) / half * torch.arange(half, device=timesteps.device, dtype=torch.float32))
    angles = timesteps[:, None].float() * freqs
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))
