"""Starting from BERT-shaped models, all made here: small, random, saved as Hugging Face's library saves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from berts import HEADS, LAYERS, VOCAB, WHOLE, WORDS_TOO, H, argv, go, save_bert
from safetensors.torch import load_file, save_file
from toy import LINES, contents, everything, same, stop_at, weights_of
from transformers import BertForMaskedLM, BertModel, BertTokenizerFast
from zygote import Zygote, ended, start_ranks

from text_diffusion import bert_folder, pretrained, train
from text_diffusion.config import ModelConfig
from text_diffusion.control import Length, Want
from text_diffusion.flags import build
from text_diffusion.generation import load_diffusion
from text_diffusion.modeling import through
from text_diffusion.objectives import OBJECTIVES, Network


def network(folder: Path, objective: str = "diffusion_lm", **given: Any) -> Network:
    """A network that starts from the folder, without a run around it."""
    start = pretrained.find({"pretrained_model": str(folder), **given})
    assert start is not None
    config = build(ModelConfig, {"objective": objective}, start.settings, given, {"pretrained_model": str(folder)})
    model = OBJECTIVES[objective].network(config, len(VOCAB), 9, 0)
    start.load_into(model)
    return model.eval()


# The encoder


@pytest.mark.parametrize("objective", ["diffusion_lm", "cross_entropy", "masked"])
def test_encoder_is_bert(objective: str, bert: Path) -> None:
    """All of it: positions, the segment, the norm and the layers, on the same input."""
    model, theirs = network(bert, objective, init_pretrained=True), BertModel.from_pretrained(bert).eval()
    x = torch.randn(3, 9, H)
    with torch.no_grad():
        ours = through(model.layers, model.LayerNorm(x + model.position_embeddings.weight), False)
        torch.testing.assert_close(ours, theirs(inputs_embeds=x).last_hidden_state, rtol=0, atol=1e-5)
    assert (model.config.hidden_size, model.config.num_layers, model.config.num_heads) == (H, LAYERS, HEADS)
    assert (model.config.norm, model.config.activation, model.config.dropout) == ("post", "gelu", 0.1)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_row_of_zeros_gets_a_place_on_the_sphere(freeze: bool, tmp_path: Path) -> None:
    """As the [PAD] of a BERT that `transformers` has made is; to Diffusion-LM it may stay."""
    folder = save_bert(tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = network(folder, "cross_entropy", pretrained_embeddings=True, freeze_embeddings=freeze)
    torch.testing.assert_close(model.embeddings.norm(dim=1), torch.full((len(VOCAB),), H**0.5))
    again = network(folder, "cross_entropy", pretrained_embeddings=True, freeze_embeddings=freeze)
    assert torch.equal(model.embeddings, again.embeddings)
    assert not network(folder, pretrained_embeddings=True).word_embedding.weight[0].any()


def as_masked_lm(bert: Path, folder: Path) -> None:
    BertForMaskedLM.from_pretrained(bert).save_pretrained(folder)


def as_of_2018(bert: Path, folder: Path) -> None:
    """A .bin file, and other names for the parts of a norm."""
    state = {f"bert.{name}": tensor for name, tensor in load_file(bert / "model.safetensors").items()}
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): state[name] for name in state}
    assert sum("gamma" in name for name in old) == 2 * LAYERS + 1
    torch.save(old, folder / "pytorch_model.bin")


def as_shards(bert: Path, folder: Path) -> None:
    BertModel.from_pretrained(bert).save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert not (folder / "model.safetensors").exists()


def as_halves(bert: Path, folder: Path) -> None:
    BertModel.from_pretrained(bert).half().save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")  # transformers', about the head that is new
@pytest.mark.parametrize("saved", [as_masked_lm, as_of_2018, as_shards, as_halves])
def test_files_of_every_kind(saved: Any, bert: Path, own: Path) -> None:
    (own / "model.safetensors").unlink()
    saved(bert, own)
    expected, found = (
        network(folder, init_pretrained=True, pretrained_embeddings=True).state_dict() for folder in (bert, own)
    )
    for name in ("layers.1.qkv.weight", "position_embeddings.weight", "LayerNorm.bias", "word_embedding.weight"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-3 if saved is as_halves else 0)


def test_run_starts_from_it(bert: Path, corpus: Path, tmp_path: Path) -> None:
    """Nothing is learned at a rate of 0; the sizes and the rate are the model's if nothing else is said."""
    folder = go(corpus, tmp_path / "run", pretrained_model=bert, lr=0, **WHOLE)
    saved = contents(folder / "model000002.pt")
    theirs = load_file(bert / "model.safetensors")
    assert torch.equal(saved["state"]["layers.1.output.weight"], theirs["encoder.layer.1.output.dense.weight"])
    assert torch.equal(saved["state"]["LayerNorm.weight"], theirs["embeddings.LayerNorm.weight"])
    assert same(weights_of(folder, "ema*")["ema_0.9_000002.pt"], saved["state"])
    assert (saved["model"]["hidden_size"], saved["model"]["in_channel"], saved["model"]["norm"]) == (H, 8, "post")
    assert saved["data"]["tokenizer"] == "word-level"
    other = go(corpus, tmp_path / "other", pretrained_model=bert, dropout=0.2, **WHOLE)
    saved = contents(other / "model000002.pt")
    assert (saved["train"]["lr"], saved["model"]["dropout"]) == (1e-4, 0.2)
    assert not torch.equal(saved["state"]["layers.1.output.weight"], theirs["encoder.layer.1.output.dense.weight"])


# The embeddings


def test_embeddings_are_bert_s(bert: Path) -> None:
    """But for one factor, which brings them to the scale of the noise; each is the head's first answer to itself."""
    model, theirs = network(bert, pretrained_embeddings=True), load_file(bert / "model.safetensors")
    E, W = model.embeddings, theirs["embeddings.word_embeddings.weight"]
    torch.testing.assert_close(E / E.norm(), W / W.norm())
    assert E.square().mean().item() == pytest.approx(1)
    x = E + 0.12 * torch.randn(200, *E.shape)
    nearest = torch.cdist(x, E.expand(200, -1, -1)).argmin(dim=-1)
    assert torch.equal(model.lm_head(x).argmax(dim=-1), nearest)
    assert (nearest == torch.arange(len(E))).float().mean() > 0.9
    assert model.lm_head.weight is model.word_embedding.weight


def test_tokenizer_goes_with_them(bert: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is in the weights file; the folder is not needed again, and words may be asked for."""
    own = tmp_path / "own"
    shutil.copytree(bert, own)
    given = {"pretrained_model": own, "lr": 1e-2, "warmup_steps": 0, "steps": 40, **WORDS_TOO}
    folder = go(corpus, tmp_path / "run", **given)
    err = capsys.readouterr().err
    assert f"{own}: its tokenizer makes 'the red apple is ripe.' of 'The red apple is ripe.', and so will" in err
    assert "unknown words: 0.00% in training" in err
    assert not list(folder.glob("*-vocab.json"))
    shutil.rmtree(own)
    go(corpus, folder, **given | {"steps": 42})
    model = load_diffusion(folder / "ema_0.9_000042.pt")
    assert model.tokenizer.vocab_size == len(VOCAB)
    pieces = ("[CLS]", "e", "##g", "##gs", "co", "##ld", "[SEP]")
    assert model.tokenizer.encode(["eggs COLD"]) == [[VOCAB.index(piece) for piece in pieces]]
    for line in model.sample(5, steps=10):
        assert not {"#", "[", "T"} & set(line)
    for line in model.sample(5, steps=10, controls=[Want("cold"), Length(5, 5)]):
        assert "cold" in line
        assert len(line.split()) == 5


def test_list_of_tokens_alone(own: Path, corpus: Path, tmp_path: Path) -> None:
    """Folders of 2018 have no tokenizer.json; the pieces are those of Hugging Face's tokenizer."""
    (own / "tokenizer.json").unlink()
    for options in ({}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False}):
        (own / "tokenizer_config.json").write_text(json.dumps(options))
        theirs = BertTokenizerFast(vocab=str(own / "vocab.txt"), **options)
        ours = bert_folder.read_tokenizer(own, len(VOCAB))
        texts = [*LINES[:5], "EGGS, co-ld .", "thé is 蛋 eggy", "co" * 80]
        assert ours.encode(texts) == [theirs(text)["input_ids"] for text in texts]
    go(corpus, tmp_path / "run", pretrained_model=own, **WORDS_TOO)


def test_tokenizer_with_another_start(bert: Path, corpus: Path, tmp_path: Path) -> None:
    """Layers alone, and the tokenizer by name; a table may be rounded up to more rows than there are tokens."""
    folder = go(corpus, tmp_path / "run", pretrained_model=bert, tokenizer="pretrained", **WHOLE)
    assert len(contents(folder / "model000002.pt")["state"]["word_embedding.weight"]) == len(VOCAB)
    rounded = save_bert(tmp_path / "rounded", vocab_size=64)
    folder = go(corpus, tmp_path / "other", pretrained_model=rounded, **WORDS_TOO)
    assert contents(folder / "model000002.pt")["state"]["word_embedding.weight"].shape == (len(VOCAB), H)


@pytest.mark.parametrize("objective", ["diffusion_lm", "cross_entropy", "masked", "autoregressive"])
def test_frozen_stays_as_it_is(objective: str, bert: Path, corpus: Path, tmp_path: Path) -> None:
    """To the last bit, in the average too, whatever the weight decay; the rest is trained. Unfrozen, it changes."""
    usual = {"pretrained_model": bert, "objective": objective, "weight_decay": 0.5, "lr": 0.1, **WORDS_TOO}
    usual |= {} if objective == "diffusion_lm" else {"diffusion_steps": None}
    usual |= {} if objective in ("diffusion_lm", "cross_entropy") else {"num_channels": None}
    first = network(bert, objective, pretrained_embeddings=True).state_dict()
    for freeze in (True, False):
        folder = go(corpus, tmp_path / str(freeze), freeze_embeddings=freeze, **usual)
        for state in weights_of(folder).values():
            assert torch.equal(state["word_embedding.weight"], first["word_embedding.weight"]) is freeze
            assert not torch.equal(state["lm_head.bias"], first["lm_head.bias"])
    opt = contents(tmp_path / "True" / "opt000002.pt")["optimizer"]
    assert len(opt["state"]) == len(contents(tmp_path / "False" / "opt000002.pt")["optimizer"]["state"]) - 1


def test_stopped_run_is_the_same(bert: Path, corpus: Path, tmp_path: Path) -> None:
    """To the last bit; what the folder holds by then does not matter."""
    own = tmp_path / "own"
    shutil.copytree(bert, own)
    usual = {"pretrained_model": own, "freeze_embeddings": True, "weight_decay": 0.1, "steps": 4, **WHOLE, **WORDS_TOO}
    go(corpus, tmp_path / "whole", **usual)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(2, patch)
        assert train.main(argv(corpus, tmp_path / "stopped", **usual)) == 130
    shutil.rmtree(own)
    go(corpus, tmp_path / "stopped", **usual)
    assert same(everything(tmp_path / "whole", 4), everything(tmp_path / "stopped", 4))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_frozen_on_two_ranks(parallel: str, bert: Path, corpus: Path, tmp_path: Path, zygote: Zygote) -> None:
    """Rank 0 reads the folder; whole or in shards, what is frozen stays, in a run that was stopped too."""
    usual = {"pretrained_model": bert, "freeze_embeddings": True, "weight_decay": 0.5, "lr": 0.1, "parallel": parallel}
    for steps in (2, 4):
        command = ["train", *argv(corpus, tmp_path / "run", **usual, **WHOLE, **WORDS_TOO, steps=steps)]
        processes = start_ranks(zygote, command, command)
        assert ended(processes) == [0, 0], [process.err for process in processes]
    frozen = network(bert, pretrained_embeddings=True).state_dict()["word_embedding.weight"]
    trained = load_file(bert / "model.safetensors")["encoder.layer.0.output.dense.weight"]
    for state in weights_of(tmp_path / "run").values():
        assert torch.equal(state["word_embedding.weight"], frozen)
        assert not torch.equal(state["layers.0.output.weight"], trained)
