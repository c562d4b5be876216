"""Sentences that are given a label or a source: training, classifier-free guidance, sequence to sequence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import LINES, contents, everything, files, flags, metrics, one_sentence, same, stop_at, train_flags, write_text

from text_diffusion import likelihood, report, sample, train
from text_diffusion.autoregressive import Autoregressive
from text_diffusion.condition import NONE, Given, Guided, dropped
from text_diffusion.config import DataConfig, ModelConfig
from text_diffusion.control import Control, Labelled, Length, Sources, Want
from text_diffusion.control.mbr import best_of
from text_diffusion.corpus import Corpus
from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.encoding import encode
from text_diffusion.errors import UserError
from text_diffusion.generation import TextDiffusion, load, load_diffusion
from text_diffusion.losses import Noise, diffusion_lm_loss
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.tokenizer import train_word_level

SAMPLERS = ["ancestral", "ddim", "dpm-solver++", "heun"]
SHORT = {"steps": 250, "lr": 1e-2, "warmup_steps": 0, "hidden_size": 32, "batch_size": 32}


def words(line: str) -> list[str]:
    return line.rstrip(".").split()


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences, each with its colour."""
    return write_text(tmp_path_factory.mktemp("labels") / "toy.tsv", [f"{line}\t{words(line)[1]}" for line in LINES])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Food and colour, in this order, and a sentence that says them."""
    lines = [f"{words(line)[2]} {words(line)[1]}\t{line}" for line in LINES]
    return write_text(tmp_path_factory.mktemp("pairs") / "toy.tsv", lines)


def trained_on(text: Path, folder: Path, **options: Any) -> Path:
    assert train.main(train_flags(text, folder, **SHORT | options)) == 0
    return folder / f"ema_0.9_{int({**SHORT, **options}['steps']):06d}.pt"


@pytest.fixture(scope="module")
def of_labels(labeled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_on(labeled, tmp_path_factory.mktemp("runs") / "labels", condition="labels")


@pytest.fixture(scope="module")
def of_source(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every source is in both parts of so small a corpus."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    return trained_on(pairs, folder, condition="source", steps=400, val_txt_path=pairs)


# The network


def conditional(kind: str, network: type[TransformerNetModel] = TransformerNetModel) -> TransformerNetModel:
    torch.manual_seed(0)
    config = ModelConfig(in_channel=4, hidden_size=8, num_layers=1, num_heads=2, num_channels=8, condition=kind)
    return network(config, 9, 6, 3).eval()


@pytest.mark.parametrize("network", [TransformerNetModel, WordDenoiser])
@pytest.mark.parametrize(("kind", "shape"), [("labels", (2,)), ("source", (2, 3))])
def test_given_nothing_is_no_condition(kind: str, shape: tuple[int, ...], network: type[TransformerNetModel]) -> None:
    """Leaving the condition out and NONE are the same; a condition is something else, of each sentence its own."""
    model, x_t, t = conditional(kind, network), torch.randn(2, 6, 4), torch.tensor([100.0, 300.0])
    given = torch.zeros(shape, dtype=torch.int64)
    free, none, told = (model(x_t, t, condition=c) for c in (None, torch.full_like(given, NONE), given))
    torch.testing.assert_close(free, none)
    assert free.shape == x_t.shape
    one = model(x_t, t, condition=dropped(given, torch.tensor([True, False])))
    torch.testing.assert_close(one, torch.stack([free[0], told[1]]))
    assert not torch.allclose(free[1], told[1], atol=1e-4)


@pytest.mark.parametrize(("kind", "shape"), [("labels", (2,)), ("source", (2, 3))])
def test_guidance_goes_along_the_difference(kind: str, shape: tuple[int, ...]) -> None:
    """Eq. (1), by two calls of the network of its own."""
    model, x_t, t = conditional(kind), torch.randn(2, 6, 4), torch.tensor([100.0, 300.0])
    given, x_self = torch.ones(shape, dtype=torch.int64), torch.randn(2, 6, 4)
    free, told = model(x_t, t, x_self), model(x_t, t, x_self, condition=given)
    for scale in (0.0, 1.0, 2.5):
        torch.testing.assert_close(Guided(model, given, scale)(x_t, t, x_self), free + scale * (told - free))
    row = torch.tensor([1])
    part = Guided(model, given, 2.5)(x_t[row], t[row], x_self[row], row)
    torch.testing.assert_close(part, (free + 2.5 * (told - free))[row])


def test_source_has_no_noise_and_no_share_in_the_loss(of_source: Path) -> None:
    """The terms are means over the sentence's positions alone, and the gradient still reaches the source's words."""
    model = load_diffusion(of_source)
    ids = torch.tensor([model.tokenizer.encode([LINES[0]])[0]])
    source = torch.tensor([[model.tokenizer.unk_id] * len(model.model.condition.weight)])
    noise = Noise(*torch.randn(2, 1, ids.shape[1], 8))
    network = model.model.requires_grad_(True)
    asked: list[torch.Tensor] = []
    handle = network.register_forward_hook(lambda *given: asked.append(given[-1]))
    diffusion_lm_loss(network, model.diffusion, ids, torch.tensor([7]), noise, source).mse.sum().backward()  # type: ignore[no-untyped-call]
    handle.remove()
    assert [out.shape[1] for out in asked if out.shape[0]] == [ids.shape[1]] * len(asked)
    grad = network.word_embedding.weight.grad
    assert grad is not None
    assert bool(grad[model.tokenizer.unk_id].abs().sum() > 0)


def test_each_sentence_has_its_own() -> None:
    given = Given(torch.tensor([5, 6, 7]), each=2)
    assert given.of(1, 8).tolist() == [5, 6, 6, 7, 7, 5, 5]


# Labels


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_label_is_obeyed(of_labels: Path, sampler: str) -> None:
    model = load_diffusion(of_labels)
    assert model.labels == ("blue", "new", "old", "raw", "red")
    for label in ("red", "old"):
        lines = model.sample(20, steps=10, sampler=sampler, controls=[Labelled(label, 2.0)])
        assert sum(label in line.split() for line in lines) >= 19
    free = model.sample(40, steps=10, sampler=sampler)
    assert len({words(line)[1] for line in free if len(words(line)) > 1}) > 2


def test_label_composes(of_labels: Path) -> None:
    controls: list[Control] = [Labelled("red", 2.0), Want("hot"), Length(5, 5)]
    lines = load_diffusion(of_labels).sample(10, steps=10, controls=controls)
    assert all("hot" in line and len(line.split()) == 5 for line in lines)
    assert sum(" red " in line for line in lines) >= 9


def test_halting_and_sharing_change_nothing_else(of_labels: Path) -> None:
    """Sentence i depends on i alone, also where sentences are left alone once they have settled."""
    model, controls = load_diffusion(of_labels), [Labelled("blue", 1.5)]
    whole = model.sample(9, steps=10, halt=2, controls=controls)
    assert model.sample(9, steps=10, halt=2, controls=controls, batch_size=2) == whole


@pytest.mark.parametrize("objective", ["cross_entropy", "autoregressive"])
def test_other_objectives(objective: str, labeled: Path, tmp_path: Path) -> None:
    options = {"condition": "labels", "objective": objective, "diffusion_steps": None, "num_channels": None}
    usual = train_flags(labeled, tmp_path / "run", **{**SHORT, **options, "steps": 400})
    kept = [part for pair in zip(usual[::2], usual[1::2], strict=True) if pair[1] != "None" for part in pair]
    assert train.main(kept) == 0
    weights = tmp_path / "run" / "ema_0.9_000400.pt"
    assert sample.main(flags(model_name_or_path=weights, label="red", num_samples=20, out_dir=tmp_path / "out")) == 0
    (out,) = files(tmp_path / "out").values()
    assert sum("red" in line.split() for line in out.decode().splitlines()) >= 16


def test_stopped_run_is_the_same(labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, in micro-batches too but for rounding."""
    usual = {"condition": "labels", "drop_condition": 0.3, "steps": 4}
    assert train.main(train_flags(labeled, tmp_path / "whole", **usual)) == 0
    again = train_flags(labeled, tmp_path / "stopped", **usual)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(2, patch)
        assert train.main(again) == 130
    assert train.main(again) == 0
    assert same(everything(tmp_path / "whole", 4), everything(tmp_path / "stopped", 4))
    assert train.main(train_flags(labeled, tmp_path / "micro", microbatch=2, **usual)) == 0
    name = "model000004.pt"
    for key, value in contents(tmp_path / "whole" / name)["state"].items():
        torch.testing.assert_close(contents(tmp_path / "micro" / name)["state"][key], value, rtol=1e-3, atol=1e-4)


def test_named_dataset(toy_clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels are those of DATASET_labeled.tsv; the training text's other lines have none."""
    usual = {"dataset": "toy", "condition": "labels", "steps": 1, "checkpoint_path": toy_clone / "run"}
    sizes = flags(hidden_size=8, num_layers=1, num_heads=1, in_channel=4, batch_size=4, eval_interval=0)
    assert train.main(flags(**usual) + sizes) == 1
    assert "toy_labeled.tsv: --condition labels expects lines" in one_sentence(capsys.readouterr().err)
    (toy_clone / "data" / "toy").mkdir(exist_ok=True)
    write_text(toy_clone / "data" / "toy" / "toy_labeled.tsv", [f"{line}\t{words(line)[1]}" for line in LINES[:40]])
    assert train.main(flags(**usual) + sizes) == 0
    err = capsys.readouterr().err
    assert "38 lines to train on, 2 held out" in err
    assert "30 more lines to train on, which have no label" in err
    assert contents(toy_clone / "run" / "model000001.pt")["labels"] == ["blue", "old", "red"]


# Sources


def test_sources_are_followed(of_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = write_text(tmp_path / "sources.txt", ["fig red", "egg raw", "pear old"])
    usual = {"model_name_or_path": of_source, "source_file": sources, "steps": 10}
    assert sample.main(flags(**usual, num_samples=4, guidance_scale=1.5, out_dir=tmp_path / "four")) == 0
    ((name, text),) = files(tmp_path / "four").items()
    lines = text.decode().splitlines()
    assert "samples_12." in name
    right = [{"fig", "red"}] * 4 + [{"egg", "raw"}] * 4 + [{"pear", "old"}] * 4
    assert sum(wanted <= set(line.split()) for wanted, line in zip(right, lines, strict=True)) >= 10
    assert sample.main(flags(**usual, mbr=4, guidance_scale=1.5, out_dir=tmp_path / "best")) == 0
    (text,) = files(tmp_path / "best").values()
    assert text.decode().splitlines() == best_of(lines, 4)
    assert sample.main(flags(**usual, out_dir=tmp_path / "one")) == 0
    (text,) = files(tmp_path / "one").values()
    assert len(text.decode().splitlines()) == 3


def test_left_to_right_reads_sources_too(pairs: Path, tmp_path: Path) -> None:
    options = {"condition": "source", "objective": "autoregressive", "val_txt_path": pairs, "steps": 300}
    usual = {key: value for key, value in SHORT.items() if key != "steps"} | options
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "in_channel": 8, "eval_interval": 0, "ema_rate": 0.9}
    assert train.main(flags(dataset=pairs, checkpoint_path=tmp_path / "run", **sizes | usual)) == 0
    writer = load(tmp_path / "run" / "ema_0.9_000300.pt")
    assert isinstance(writer, Autoregressive)
    from text_diffusion.control.given import given_of

    given = given_of([Sources(("fig red", "pear old"), each=5)], writer)
    lines = writer.sample(10, given=given, greedy=True)
    assert len(set(lines)) == 2
    assert {"fig", "red"} <= set(lines[0].split())
    assert {"pear", "old"} <= set(lines[5].split())


def test_most_agreed() -> None:
    assert best_of(["a b c d", "x y z w", "a b c e", "q", "q", "r"], 3) == ["a b c d", "q"]


def test_no_source_is_on_both_sides(pairs: Path, tmp_path: Path) -> None:
    assert train.main(train_flags(pairs, tmp_path / "run", condition="source", steps=1)) == 0
    parts = [(tmp_path / "run" / f"toy-{part}.tsv").read_text().splitlines() for part in ("train", "test")]
    train_sources, held_out = ({line.split("\t")[0] for line in part} for part in parts)
    assert not train_sources & held_out
    assert len(parts[0]) + len(parts[1]) == len(LINES)


# What will not do


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["a\tb"] * 30 + ["no tab"], {}, "expected a source, a tab and a sentence in line 31, found no sentence"),
        (["a\tb", "\tb"], {}, "in line 2, found an empty field"),
        (["a\tb", "a\t"], {}, "in line 2, found no sentence"),
        (["a\tb\tc"], {}, "in line 1, found 2 tabs"),
        (["a\tb", "a b c d\te"], {"source_len": 5}, "found 6 in line 2; shorten it, or take --source_len 6"),
        (
            ["a\tb", "c\tb"],
            {"condition": "labels"},
            "expected lines of at least two labels to learn from, found only 'b'",
        ),
        (["a\tb"], {"condition": "none", "drop_condition": 0.2}, "--drop_condition is about what sentences are given"),
        (["a\tb"], {"condition": "none", "source_len": 5}, "--source_len is about sources"),
    ],
)
def test_bad_training_input(
    lines: list[str], options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.tsv", lines)
    assert train.main(train_flags(text, tmp_path / "run", **{"condition": "source", "steps": 1} | options)) == 1
    assert message in one_sentence(capsys.readouterr().err)
    assert list(files(tmp_path)) == ["text.tsv"]


def test_bad_sampling_input(
    of_labels: Path, of_source: Path, writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def file(name: str, *lines: str) -> Path:
        return write_text(tmp_path / name, list(lines))

    good, tab = file("good.txt", "fig red"), file("tab.txt", "fig red", "a\tb")
    long, blank = file("long.txt", "fig red", "fig " * 9), file("blank.txt", "fig", "", "egg")
    before = files(tmp_path)
    for weights, given, message in (
        (
            of_labels,
            {"label": "mauve"},
            "--label must be one that the model was trained with: blue, new, old, raw, red",
        ),
        (of_labels, {"label": "red", "guidance_strength": 3.0}, "--guidance_strength is about a classifier"),
        (of_labels, {"source_file": good}, "--source_file expects a model that was trained with --condition source"),
        (of_source, {}, "give --source_file"),
        (of_source, {"source_file": tab}, "without a tab in line 2, found a tab"),
        (of_source, {"source_file": blank}, "in line 2, found an empty line"),
        (of_source, {"source_file": long}, "found 11 in line 2"),
        (of_source, {"source_file": good, "mbr": 1}, "--mbr must be at least 2"),
        (of_source, {"source_file": good, "mbr": 3, "num_samples": 2}, "leave NUM_SAMPLES out"),
        (of_source, {"mbr": 3}, "--mbr is about candidates for a source"),
        (of_labels, {"guidance_scale": 2.0}, "it expects --label or --source_file"),
        (writer, {"source_file": good}, "found one with none"),
        (writer, {"label": "red", "guidance_scale": 2.0}, "--guidance_scale is about a label of the model's own"),
    ):
        options = {"model_name_or_path": weights, "out_dir": tmp_path / "out"} | given
        assert sample.main(flags(**options)) == 1, given
        assert message in one_sentence(capsys.readouterr().err)
        assert files(tmp_path) == before


def test_model_that_is_always_given_something(
    labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = trained_on(labeled, tmp_path / "run", condition="labels", drop_condition=0.0, steps=2)
    model: TextDiffusion = load_diffusion(weights)
    with pytest.raises(UserError, match="--drop_condition 0 expects --label, found none"):
        model.sample(1)
    with pytest.raises(UserError, match="--guidance_scale expects a model"):
        model.sample(1, controls=[Labelled("red", 2.0)])
    assert len(model.sample(1, steps=2, controls=[Labelled("red")])) == 1
    text = write_text(tmp_path / "lines.txt", LINES[:3])
    assert likelihood.main([str(weights), str(text)]) == 1
    assert "found one that cannot do without --label" in one_sentence(capsys.readouterr().err)
    assert report.main([str(tmp_path / "run")]) == 0
    assert "left out: samples and all that is measured of them: this model cannot write without --label" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("condition", ["labels", "source"])
def test_nothing_to_hold_out(condition: str, tmp_path: Path) -> None:
    """A text of one first field leaves nothing to validate on."""
    rows = ["a b c\tx", "a b c\ty", "a b c\tx", "a b c\ty"] if condition == "labels" else ["a\tb c", "a\tc b"]
    text = write_text(tmp_path / "one.tsv", rows)
    weights = trained_on(text, tmp_path / "run", condition=condition, steps=2, eval_interval=1)
    assert len(load_diffusion(weights).sample(1, steps=2)) == 1
    assert metrics(tmp_path / "run", validation=True) == []


def test_only_long_lines_to_hold_out(labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = write_text(tmp_path / "long.tsv", [f"{'red ' * 9}apple\tred"] * 2)
    options = {"condition": "labels", "steps": 2, "eval_interval": 1, "sequence_len": 8, "long_lines": "drop"}
    trained_on(labeled, tmp_path / "run", **options, val_txt_path=long)
    assert "no validation" in capsys.readouterr().err
    assert metrics(tmp_path / "run", validation=True) == []


def test_long_line_without_a_label(tmp_path: Path) -> None:
    """Of a dataset of two files: it is in the other, so that it is quoted instead of numbered."""
    rows = write_text(tmp_path / "mine_labeled.tsv", [f"{line}\tx" for line in LINES])
    long = "red " * 20 + "apple"
    corpus = Corpus("mine", [*LINES, long], [], rows, rows, tmp_path, True, False, "labels", ["x"] * len(LINES) + [""])
    with pytest.raises(UserError, match=r"the first 'red red red red red red red red red red \.\.\.' with 23 tokens"):
        encode(DataConfig(sequence_len=8, long_lines="error"), corpus, train_word_level(corpus.train))


def test_run_without_the_setting_goes_on(trained: Path, corpus: Path, tmp_path: Path) -> None:
    """Runs of before there was a condition have no such setting."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    opt = contents(folder / "opt000006.pt")
    for group in opt["settings"].values():
        for name in ("condition", "drop_condition", "source_len"):
            group.pop(name, None)
    torch.save(opt, folder / "opt000006.pt")
    assert train.main(train_flags(corpus, folder, steps=7, condition="none")) == 0
