"""Starting from BERT-shaped models, all made here: small, random, saved as Hugging Face's library saves them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import torch
from berts import HEADS, LAYERS, VOCAB, H, save_bert
from safetensors.torch import load_file, save_file
from toy import LINES, contents, everything, files, one_sentence, same, stop_at, train_flags, weights_of, write_text
from transformers import BertForMaskedLM, BertModel, BertTokenizerFast

from text_diffusion import pretrained, train
from text_diffusion.config import ModelConfig, build
from text_diffusion.control import Length, Want
from text_diffusion.generation import load_diffusion
from text_diffusion.modeling import through
from text_diffusion.objectives import OBJECTIVES, Network

WHOLE = {"init_pretrained": True, "hidden_size": None, "num_layers": None, "num_heads": None}
WORDS_TOO = {"pretrained_embeddings": True, "in_channel": None}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert") / "tiny")


@pytest.fixture
def own(bert: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(bert, tmp_path / "own"))


def argv(corpus: Path, folder: Path, **options: Any) -> list[str]:
    """Flags of a toy run; None leaves one of the toy sizes out."""
    usual = train_flags(corpus, folder, **{"steps": 2} | options)
    return [part for pair in zip(usual[::2], usual[1::2], strict=True) if pair[1] != "None" for part in pair]


def go(corpus: Path, folder: Path, **options: Any) -> Path:
    assert train.main(argv(corpus, folder, **options)) == 0
    return folder


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
        ours = pretrained._own_tokenizer(own, len(VOCAB))
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


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 32}, "--hidden_size must be 16 to start from {bert}, found 32; leave it out"),
        ({"num_layers": 1}, "--num_layers must be 2 to start from {bert}, found 1; leave it out"),
        ({"num_heads": 4}, "--num_heads must be 2 to start from {bert}, found 4; leave it out"),
        ({"norm": "pre"}, "--norm must be post to start from {bert}, found pre; leave it out"),
        ({"activation": "relu"}, "--activation must be gelu to start from {bert}, found relu; leave it out"),
        ({"size": "base"}, "must be"),
        ({**WORDS_TOO, "in_channel": 32}, "--in_channel must be 16 to start from {bert}, found 32; leave it out"),
        ({**WORDS_TOO, "tokenizer": "byte-level"}, "--tokenizer must be pretrained to start from"),
        ({"sequence_len": 25}, "--sequence_len must be at most 24, the positions that {bert} has, found 25"),
        ({"init_pretrained": False}, "--pretrained_model expects --init_pretrained or --pretrained_embeddings"),
        ({"pretrained_model": None}, "--init_pretrained expects --pretrained_model FOLDER"),
        (
            {"pretrained_model": None, "init_pretrained": False, **WORDS_TOO},
            "--pretrained_embeddings expects --pretrained_model FOLDER",
        ),
        (
            {"pretrained_model": None, "init_pretrained": False, "tokenizer": "pretrained"},
            "--tokenizer pretrained is that of --pretrained_model, found none",
        ),
        ({"freeze_embeddings": True}, "--freeze_embeddings is about pretrained ones: it expects --pretrained_emb"),
        ({"pretrained_model": "./nowhere"}, "--pretrained_model must be a folder, or a name on the Hugging Face hub"),
        ({"pretrained_model": __file__}, "which is neither"),
    ],
    ids=str,
)
def test_contradictions_are_refused(
    options: dict[str, Any], message: str, bert: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"pretrained_model": bert, **WHOLE, **options}
    assert train.main(argv(corpus, tmp_path / "run", **given)) == 1
    assert message.format(bert=bert) in one_sentence(capsys.readouterr().err)
    assert files(tmp_path) == {}


def edited(name: str, **changes: Any) -> Any:
    def edit(folder: Path) -> None:
        about = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(about))

    return edit


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def other_tensors(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name, value in changes.items():
            found = next(key for key in tensors if key.endswith(name.replace("__", ".")))
            tensors |= {found: value(tensors.pop(found))} if value else {}
            if value is None:
                tensors.pop(found, None)
        save_file(tensors, path)

    return edit


def other_tokenizer(folder: Path) -> None:
    write_text(folder / "vocab.txt", [*VOCAB, "more"])
    (folder / "tokenizer.json").unlink()


def small_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    write_text(folder / "vocab.txt", VOCAB[:10])
    edited("config.json", vocab_size=1000)(folder)


def unknown_kind_of_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    write_text(folder / "vocab.txt", ["<pad>", *VOCAB[1:]])


def cut(name: str) -> Any:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-20])

    return edit


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (without("config.json"), "expected the folder of a BERT-shaped model, found no config.json in it"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected a JSON object"),
        (edited("config.json", model_type="gpt2"), "expected model_type 'bert', found 'gpt2'; take a BERT-shaped"),
        (edited("config.json", hidden_size="big"), "config.json: expected hidden_size such as 768, found 'big'"),
        (edited("config.json", num_hidden_layers=0), "expected num_hidden_layers of at least 1, found 0"),
        (edited("config.json", num_attention_heads=5), "expected a hidden_size that 5 attention heads can share"),
        (edited("config.json", intermediate_size=32), "intermediate_size 64 (hidden_size is 16), found 32"),
        (edited("config.json", hidden_act="silu"), "hidden_act relu or gelu (hidden_size is 16), found silu"),
        (edited("config.json", layer_norm_eps=1e-5), "layer_norm_eps 1e-12 (hidden_size is 16), found 1e-05"),
        (edited("config.json", is_decoder=True), "is_decoder False (hidden_size is 16), found True"),
        (
            edited("config.json", hidden_size=32, intermediate_size=128),
            "expected layers.0.qkv.weight of size (96, 32), as config.json says, found (48, 16)",
        ),
        (edited("config.json", num_hidden_layers=3), "found none named 'encoder.layer.2.attention.self.query"),
        (edited("config.json", num_hidden_layers=1), "expected 1 layers, as config.json says, found more"),
        (edited("config.json", vocab_size=20), "tokenizer.json: expected 20 tokens, one for each embedding, found 26"),
        (without("model.safetensors"), "found neither model.safetensors nor pytorch_model.bin"),
        (cut("model.safetensors"), "expected a whole safetensors file"),
        (other_tensors(word_embeddings__weight=None), "none named 'embeddings.word_embeddings.weight'"),
        (other_tensors(word_embeddings__weight=lambda W: W * math.nan), "expected finite weights, found others in wo"),
        (without("tokenizer.json"), None),  # vocab.txt is there
        (other_tokenizer, "vocab.txt: expected 26 tokens, one for each embedding, found 27"),
        (small_tokenizer, "vocab.txt: expected 1000 tokens, one for each embedding, found 10"),
        (unknown_kind_of_tokenizer, "vocab.txt: a tokenizer must know [PAD], [UNK], [CLS] and [SEP], found one"),
        (cut("tokenizer.json"), "tokenizer.json: expected the JSON of a `tokenizers` tokenizer"),
    ],
)
def test_bad_folders_are_refused(
    break_it: Any, message: str | None, own: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it(own)
    before = files(tmp_path)
    status = train.main(argv(corpus, tmp_path / "run", pretrained_model=own, steps=1, **WHOLE, **WORDS_TOO))
    if message is None:
        assert status == 0
        return
    assert status == 1
    error = one_sentence(capsys.readouterr().err)
    assert message in error
    assert str(own) in error
    assert files(tmp_path) == before


class Touch:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_nothing_in_a_file_is_executed(
    own: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of a pickle, nor Python that the folder brings along."""
    (own / "model.safetensors").unlink()
    torch.save({"bert.x": Touch(str(tmp_path / "executed"))}, own / "pytorch_model.bin")
    edited("config.json", auto_map={"AutoModel": "mine.Model"})(own)
    (own / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    assert train.main(argv(corpus, tmp_path / "run", pretrained_model=own, **WHOLE)) == 1
    assert "pytorch_model.bin: expected a whole checkpoint" in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "executed").exists()


# The hub


@pytest.fixture
def hub(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server here that has the model as somebody/tiny; what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            asked.append(self.path)
            owner, _, name = self.path.partition("/resolve/main/")
            path = bert / name
            known = owner == "/somebody/tiny"
            self.send_response(200 if known and path.is_file() else 404)
            self.send_header("X-Repo-Commit", 40 * "a")
            data = path.read_bytes() if known and path.is_file() else b""
            if not data:
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("ETag", f'"{len(data)}-{name}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield asked
    server.shutdown()
    server.server_close()


def test_name_on_the_hub(
    hub: list[str], bert: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Downloaded once, with a line that says so; what cannot be had is said in a sentence."""
    given = {"pretrained_model": "somebody/tiny", **WHOLE, **WORDS_TOO}
    go(corpus, tmp_path / "run", lr=0, **given)
    assert "somebody/tiny: no folder here, so downloaded from the Hugging Face hub, once\n" in capsys.readouterr().err
    theirs = load_file(bert / "model.safetensors")["encoder.layer.0.output.dense.weight"]
    assert torch.equal(contents(tmp_path / "run" / "model000002.pt")["state"]["layers.0.output.weight"], theirs)
    hub.clear()
    go(corpus, tmp_path / "again", lr=0, **given)
    assert "downloaded" not in capsys.readouterr().err
    assert hub == []
    for name, offline, message in (
        ("somebody/else", False, "found no folder of this name, and the Hugging Face hub has no such model"),
        ("somebody/else", True, "the Hugging Face hub cannot be reached, and it was not downloaded before"),
    ):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        assert train.main(argv(corpus, tmp_path / "bad", **given | {"pretrained_model": name})) == 1
        assert message in one_sentence(capsys.readouterr().err)
        assert not (tmp_path / "bad").exists()
    go(corpus, tmp_path / "offline", **given)


def test_hub_is_asked_for_names_only(hub: list[str], own: Path, corpus: Path, tmp_path: Path) -> None:
    go(corpus, tmp_path / "run", pretrained_model=own, **WHOLE)
    go(corpus, tmp_path / "other")
    assert hub == []
