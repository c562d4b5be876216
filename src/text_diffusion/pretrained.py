"""Starting from BERT (Devlin et al. 2018): from its layers and positions, or from its word embeddings.

Its folder is read as it is (`bert_folder`), or found on the Hugging Face hub (`hub`). With `init_pretrained`

    h = LN(input_up_proj(x_t) + positions + time),   x_0 = output_down_proj(layers(h))                              (1)

layers, LN and positions are BERT's (with them the embedding of the first segment, which every word of a single text
gets); how x_t gets in and x_0 out is learned from the start, as are `neighbours`, which come between LN and layers
where there are any. With `pretrained_embeddings`

    E(w) = W_w / rms(W),   b_w = -|E(w)|^2 / 2                                                                      (2)

where W are BERT's embeddings. They are small, about 0.04 an entry, and the first noise of x_0, 0.12, would drown them:
one factor for all brings them to the scale of the noise, and leaves their directions and ratios as they are. The bias
makes the head (`diffusion_lm`'s) take an x_0 for the nearest E(w). On the sphere of `cross_entropy`, W_w / |W_w| times
sqrt(D), the directions stay. The ids are those of BERT's tokenizer, which is therefore the run's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from text_diffusion import corpus
from text_diffusion.bert_folder import CONFIG, read_config, read_tensors, read_tokenizer
from text_diffusion.config import DataConfig, ModelConfig
from text_diffusion.errors import UserError
from text_diffusion.flags import build
from text_diffusion.hub import model_folder
from text_diffusion.modeling import ACTIVATIONS, LAYER_NORM_EPS, TransformerNetModel
from text_diffusion.objectives import Network
from text_diffusion.original import bert_layer
from text_diffusion.tokenizer import Tokenizer

FLAGS = ("pretrained_model", "init_pretrained", "pretrained_embeddings", "freeze_embeddings")
OWN_TOKENIZER = "pretrained"  # what --tokenizer says then
LR = 1e-4  # unless another is given, with AdamW, as BERT was trained: from scratch the defaults are others
ADJUSTABLE = ("lr", "optimizer", "dropout")  # what follows from the model unless said otherwise


class Origin(Protocol):
    """What a new run starts from: settings that follow from it, the JSON text of a tokenizer, if it has its own."""

    @property
    def folder(self) -> Path | str:
        """Where it is, for messages."""

    @property
    def settings(self) -> dict[str, Any]:
        """By name."""

    @property
    def tokenizer(self) -> str:
        """ "" if the run has another."""

    def check_text(self, text: corpus.Corpus, length: int) -> None:
        """Refuse a text, of sentences of so many tokens, that does not suit it."""

    def load_into(self, model: Network) -> None:
        """Replace what a fresh network takes from it."""


@dataclass(frozen=True)
class Start:
    """A BERT as what a new run starts from.

    Args:
        folder: of the model.
        config: of the model, what it leaves out filled in.
        wanted: which parts of it are taken.
        settings: that follow from it.
        tokenizer: its JSON text; "" if the run has another.
    """

    folder: Path
    config: dict[str, Any]
    wanted: ModelConfig
    settings: dict[str, Any]
    tokenizer: str

    def check_text(self, text: corpus.Corpus, length: int) -> None:
        """Refuse sentences that are longer than the model has positions for.

        Raises:
            UserError: saying how many it has.
        """
        most = self.config["max_position_embeddings"]
        if self.wanted.init_pretrained and length > most:
            raise UserError(
                f"--sequence_len must be at most {most}, the positions that {self.folder} has, found {length}"
            )

    def load_into(self, model: Network) -> None:
        """Replace the parts of a fresh network that are taken from the model."""
        state = parts(self.folder, self.config, self.wanted)
        if "position_embeddings.weight" in state:
            state["position_embeddings.weight"] = state["position_embeddings.weight"][: model.sequence_len]
        if "word_embedding.weight" in state:
            W = state["word_embedding.weight"][: len(model.word_embedding.weight)]
            state["word_embedding.weight"] = E = W / W.square().mean().sqrt()
            if model.config.objective == "diffusion_lm":
                state["lm_head.bias"] = -E.square().sum(dim=1) / 2
            elif model.config.objective == "cross_entropy":
                point_somewhere(E)
        model.load_state_dict(state, strict=False)


def point_somewhere(E: Tensor) -> None:
    """Give each row of E (V, D) that is 0, as that of [PAD] often is, a random direction: a sphere has no middle."""
    zero = E.norm(dim=1) == 0
    E[zero] = torch.randn(int(zero.sum()), E.shape[1], generator=torch.Generator().manual_seed(0))


def find(given: dict[str, Any]) -> Start | None:
    """What the flags say that a new run starts from, looked into; None: from random weights.

    Raises:
        UserError: there is no such model, it has another shape than the denoiser can have, or a flag contradicts it.
    """
    wanted = build(ModelConfig, {name: given[name] for name in FLAGS if name in given})
    if not wanted.pretrained_model:
        if given.get("tokenizer") == OWN_TOKENIZER:
            raise UserError(f"--tokenizer {OWN_TOKENIZER} is that of --pretrained_model, found none")
        return None
    folder = model_folder(wanted.pretrained_model)
    config = read_config(folder)
    settings = _of_encoder(config, folder) if wanted.init_pretrained else {}
    if wanted.pretrained_embeddings:
        settings |= {"in_channel": config["hidden_size"], "tokenizer": OWN_TOKENIZER}
    for name, value in settings.items():
        if name not in ADJUSTABLE and given.get(name, value) != value:
            raise UserError(
                f"--{name} must be {value} to start from {wanted.pretrained_model}, found {given[name]}; leave it out"
            )
    tokenizer = ""
    if (settings | given).get("tokenizer") == OWN_TOKENIZER:
        tokenizer = read_tokenizer(folder, config["vocab_size"]).to_json()
    parts(folder, config, wanted)  # is it all there?
    return Start(folder, config, wanted, settings, tokenizer)


def tokenizer_of(config: DataConfig, text: corpus.Corpus, start: Origin | None) -> tuple[str, Path | None]:
    """JSON text of the tokenizer of a new run; and, if it was trained for it, where to save it."""
    if start is None or not start.tokenizer:
        tokenizer, new_file = corpus.find_tokenizer(config, text)
        return tokenizer.to_json(), new_file
    tokenizer, some = Tokenizer.from_json(start.tokenizer), text.train[:1000]
    for line, ids in zip(some, tokenizer.encode(some), strict=True):
        if (read := tokenizer.decode(ids)) != line:
            print(f"{start.folder}: its tokenizer makes {read!r} of {line!r}, and so will the model", file=sys.stderr)
            break
    return start.tokenizer, None


def _of_encoder(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of an encoder that is BERT's.

    Raises:
        UserError: the denoiser has none of this shape.
    """
    H, A = config["hidden_size"], config["num_attention_heads"]
    if H % A:
        raise UserError(f"{folder}: expected a hidden_size that {A} attention heads can share, found {H}")
    fitting: dict[str, tuple[object, ...]] = {
        "intermediate_size": (4 * H,),
        "hidden_act": tuple(ACTIVATIONS),
        "layer_norm_eps": (LAYER_NORM_EPS,),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
    }
    for name, values in fitting.items():
        if config[name] not in values:
            fits = " or ".join(map(str, values))
            raise UserError(
                f"{folder}: INIT_PRETRAINED fits models with {name} {fits} (hidden_size is {H}), found {config[name]}; "
                "take another model, or its embeddings alone"
            )
    return {
        "hidden_size": H,
        "num_layers": config["num_hidden_layers"],
        "num_heads": A,
        "denoiser": "bert",
        "activation": config["hidden_act"],
        "norm": "post",
        "dropout": float(config["hidden_dropout_prob"]),
        "lr": LR,
        "optimizer": "adamw",
    }


def parts(folder: Path, config: dict[str, Any], wanted: ModelConfig) -> dict[str, Tensor]:
    """What is taken from the weights in a folder, as a part of a denoiser's state dict.

    Raises:
        UserError: they cannot be read, or are not what the folder's config.json says.
    """
    bert = read_tensors(folder)
    state: dict[str, Tensor] = {}
    layers, H = config["num_hidden_layers"], config["hidden_size"]
    words = bert.get("embeddings.word_embeddings.weight")
    if words is not None and tuple(words.shape) != (rows := (config["vocab_size"], H)):
        raise UserError(
            f"{folder}: expected word embeddings of size {rows}, the vocab_size and hidden_size of {CONFIG}, found "
            f"{tuple(words.shape)}; weights and {CONFIG} are of different models: copy both from one"
        )
    try:
        if wanted.init_pretrained:
            for n in range(layers):
                layer = bert_layer(bert, f"encoder.layer.{n}.")
                state |= {f"layers.{n}.{name}": tensor for name, tensor in layer.items()}
            segment = bert["embeddings.token_type_embeddings.weight"][0]
            state["position_embeddings.weight"] = bert["embeddings.position_embeddings.weight"] + segment
            state |= {f"LayerNorm.{kind}": bert[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias")}
        if wanted.pretrained_embeddings:
            state["word_embedding.weight"] = bert["embeddings.word_embeddings.weight"]
    except KeyError as error:
        raise UserError(
            f"{folder}: expected the weights of BERT with {layers} layers, as {CONFIG} says, found none named {error}; "
            f"copy weights and {CONFIG} from one model"
        ) from None
    except (RuntimeError, IndexError):
        raise UserError(f"{folder}: expected weights whose sizes are those of {CONFIG}, found others") from None
    if wanted.init_pretrained and f"encoder.layer.{layers}.output.dense.weight" in bert:
        raise UserError(f"{folder}: expected {layers} layers, as {CONFIG} says, found more in its weights")
    with torch.device("meta"):
        sizes = ModelConfig(in_channel=H, hidden_size=H, num_layers=layers, num_heads=1)
        expected = TransformerNetModel(sizes, config["vocab_size"], config["max_position_embeddings"]).state_dict()
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            should, found = tuple(expected[name].shape), tuple(tensor.shape)
            raise UserError(
                f"{folder}: expected {name} (a name of ours) of size {should}, as {CONFIG} says, found {found}; copy "
                f"weights and {CONFIG} from one model"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: expected finite weights, found others in {name}")
    return state
