"""Starting from BERT-shaped models: what does not fit, and the hub."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import torch
from berts import VOCAB, WHOLE, WORDS_TOO, argv, go
from safetensors.torch import load_file, save_file
from toy import contents, files, one_sentence, write_text

from text_diffusion import train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 32}, "--hidden_size must be 16 to start from {bert}, found 32; leave it out"),
        ({"num_layers": 1}, "--num_layers must be 2 to start from {bert}, found 1; leave it out"),
        ({"num_heads": 4}, "--num_heads must be 2 to start from {bert}, found 4; leave it out"),
        ({"denoiser": "modern"}, "--denoiser must be bert to start from {bert}, found modern; leave it out"),
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
            "expected word embeddings of size (26, 32), the vocab_size and hidden_size of config.json, found (26, 16)",
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
