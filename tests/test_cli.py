"""The command: a whole run on tiny models, and one clear sentence for whatever is wrong."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from airrep.attributor import Attributor
from airrep.cli import main
from airrep.encoder import AirRepEncoder
from airrep.examples import Example, write_examples
from airrep.label_store import LabelStore
from airrep.reading import read_examples
from tests.tiny_lm import save_tiny_lm
from tests.tiny_models import tiny_encoder

Fails = Callable[..., str]
WORDS = ("capital", "country", "number", "word", "city", "river", "plural", "colour")


def examples(count: int, prefix: str) -> list[Example]:
    return [
        Example(
            f"{prefix}-{i}",
            f"what is the {WORDS[i % 8]} of {i}",
            f"the {WORDS[i % 3]} {i % 5}",
            task=WORDS[i % 4],
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    tiny_encoder(folder / "encoder")
    return {"lm": str(save_tiny_lm(folder / "lm")), "encoder": str(folder / "encoder")}


def write_config(folder: Path, models: dict[str, str], **changes: object) -> str:
    write_examples(folder / "examples.jsonl", examples(60, "e"))
    config = {
        "output": str(folder / "run"),
        **models,
        "data": {"examples": str(folder / "examples.jsonl"), "target_count": 20},
        "subsets": {"train": 8, "test": 4, "size": 8, "repeats": 2},
        "recipe": {"learning_rate": 0.01, "batch_size": 4, "epochs": 1, "warmup_steps": 1},
        "train": {"max_steps": 4, "evaluate_every": 2, "show_progress": False},
        "evaluate": {"draws": 50},
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder, models)
    for stage in ("subsets", "labels", "train", "evaluate", "report"):
        assert main([stage, "--config", config]) == 0, stage
    return config, folder / "run"


def test_run_goes_through_all_stages(
    run: tuple[str, Path], tmp_path: Path, models: dict[str, str]
) -> None:
    assert main(["run", "--config", write_config(tmp_path, models)]) == 0
    page, again = (folder / "index.html" for folder in (run[1], tmp_path / "run"))
    assert again.stat().st_size > 10_000
    for name in ("airrep", "bm25", "random"):
        scores = (np.load(path.parent / "scores" / f"{name}.npy") for path in (page, again))
        np.testing.assert_array_equal(*scores)


def test_results_are_made_again_only_when_something_differs(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _labelled(write_config(tmp_path, models))
    results = tmp_path / "run" / "results.json"
    command = ["evaluate", "--config", config, "--methods", "bm25,random"]

    def made_again(*flags: str) -> bool:
        before = results.stat().st_mtime_ns
        assert main([*command, *flags]) == 0
        return results.stat().st_mtime_ns != before

    monkeypatch.setattr("airrep.stages.git_revision", lambda: "0123abc")
    assert main(command) == 0
    assert not made_again()
    assert made_again("--evaluate.draws", "40")
    assert made_again()
    assert made_again("--methods", "bm25")
    assert made_again()
    store = LabelStore.open(tmp_path / "run" / "test_labels")
    store.write(0, store.read().losses[:, 0] + 1)
    assert made_again()
    (tmp_path / "run" / "scores" / "bm25.npy").unlink()
    assert made_again()
    monkeypatch.setattr("airrep.stages.git_revision", lambda: "0123abc-dirty")
    assert made_again()
    results.write_text("{")
    assert made_again()


def test_only_methods_that_differ_are_run_again(
    tmp_path: Path,
    models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = _labelled(write_config(tmp_path, models))

    def known(methods: str, *flags: str) -> list[str]:
        capsys.readouterr()
        assert main(["evaluate", "--config", config, "--methods", methods, *flags]) == 0
        found = re.findall(r"(\w+): as it was run before", capsys.readouterr().out)
        assert set(found) <= set(methods.split(","))
        return found

    monkeypatch.setattr("airrep.stages.git_revision", lambda: "0123abc")
    assert known("bm25,random") == []
    assert known("bm25,tfidf") == ["bm25"]
    assert known("tfidf,bm25,random") == ["tfidf", "bm25", "random"]
    assert known("bm25,random", "--evaluate.params", "{bm25: {k1: 2.0}}") == ["random"]
    assert known("bm25,random", "--evaluate.draws", "40") == ["random"]
    monkeypatch.setattr("airrep.stages.git_revision", lambda: "4567def")
    assert known("bm25,random") == []
    store = LabelStore.open(tmp_path / "run" / "test_labels")
    store.write(0, store.read().losses[:, 0] + 1)
    assert known("bm25,random") == []
    monkeypatch.setattr("airrep.stages.git_revision", lambda: "4567def-dirty")
    assert known("random") == []


def test_the_page_shows_what_else_the_folder_has(
    run: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run[1], tmp_path / "run")
    flags = ["--config", run[0], f"--output={copy}", "--train.validation_subsets=0.5"]
    flags += ["--train.validation_targets=0.3"]
    (copy / "test_labels").rename(tmp_path / "unseen")  # a curve does without the test labels
    assert main(["learning-curve", *flags, "--counts", "4", "--seeds", "1"]) == 0
    (tmp_path / "unseen").rename(copy / "test_labels")
    assert "     4 labels: LDS " in capsys.readouterr().out
    intervention = ["--kind", "removal", "--k", "2", "--targets", "1", "--seeds", "1"]
    assert main(["intervene", *flags[:3], *intervention, "--methods", "bm25"]) == 0
    assert main(["verify", *flags[:3], "--count", "1", "--fresh", "0", "--agreement=exact"]) == 0
    assert main(["report", *flags[:3]]) == 0
    page = (copy / "index.html").read_text()
    for heading in ("What more labels would bring", "Removing the most helpful", "again: accepted"):
        assert heading in page
    for split in ("train", "test"):
        store = LabelStore.open(copy / f"{split}_labels")
        store.write(0, store.read().losses[:, 0] + 1)
    capsys.readouterr()
    assert main(["report", *flags[:3]]) == 0
    said = capsys.readouterr().out
    assert "verification.json is of other test labels than are there now: left out" in said
    assert "learning_curve.json is of other train labels than are there now: left out" in said
    assert "again: accepted" not in (copy / "index.html").read_text()


@pytest.mark.parametrize("file", ["interventions.json", "verification.json"])
def test_damaged_findings_are_named(run: tuple[str, Path], file: str, fails: Fails) -> None:
    path = run[1] / file
    try:
        path.write_text("[1")
        assert f"{path} is not a JSON object; delete it" in fails("report", "--config", run[0])
    finally:
        path.unlink()


def test_columns_with_other_names(run: tuple[str, Path], tmp_path: Path, fails: Fails) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"text": "what is the capital?", "says": "the city"}\n' * 2)
    command = ["rank", "--encoder", str(run[1] / "encoder"), f"--examples={pool}"]
    command += [f"--targets={pool}", "--top-k", "1", f"--output={tmp_path / 'found.jsonl'}"]
    line = fails(*command)
    assert "its columns are text, says. Name them: data.columns.prompt" in line
    assert "--columns prompt=NAME,response=NAME for other commands" in line
    assert "--columns has 'prompt'; give FIELD=NAME" in fails(*command, "--columns", "prompt")
    assert "--columns has 'text=prompt'" in fails(*command, "--columns", "text=prompt")
    named = "--columns=prompt=text, response=says"
    assert main([*command, named]) == 0
    assert len((tmp_path / "found.jsonl").read_text().splitlines()) == 2
    index = ["index", *command[1:4], f"--output={tmp_path / 'index'}", named]
    assert main(index) == 0


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must end with status 2 and one line; returns the line."""

    def check(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        said = capsys.readouterr().err.strip()
        line = said.splitlines()[-1]
        assert line.startswith("airrep: ")
        assert "Traceback" not in said
        return line

    return check


def test_a_run_leaves_everything_in_its_folder(run: tuple[str, Path]) -> None:
    results = json.loads((run[1] / "results.json").read_text())
    assert results["targets"] == 10
    assert results["subsets"] == 4
    names = {row["name"] for row in results["methods"]}
    assert names == {
        "airrep",
        "embedding",
        "response_embedding",
        "bm25",
        "tfidf",
        "response_tfidf",
        "same_task",
        "random",
    }
    assert results["noise_ceiling"]["subsets"] == 2
    assert results["config"]["recipe"]["learning_rate"] == 0.01
    learned = next(row for row in results["methods"] if row["name"] == "airrep")
    training = json.loads((run[1] / "train.json").read_text())["seconds"]
    labels = LabelStore.open(run[1] / "train_labels").seconds()
    assert learned["prepare_seconds"] == pytest.approx(training + sum(labels.values()))
    assert learned["prepare_seconds"] > training > 0
    assert learned["break_even_examples"] is not None
    page = (run[1] / "index.html").read_text()
    assert 'id="block-targets-0"' in page
    losses = LabelStore.open(run[1] / "train_labels").read().losses
    assert losses.shape == (10, 8)
    assert np.isfinite(losses).all()


def test_running_again_reuses_what_is_done(run: tuple[str, Path]) -> None:
    config, folder = run
    kept = [*folder.glob("*_labels/losses/*"), folder / "encoder" / "model.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    for stage in ("subsets", "labels", "train"):
        assert main([stage, "--config", config]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_targets_are_in_no_subset_and_not_in_the_pool(run: tuple[str, Path]) -> None:
    folder = run[1]
    ids = {
        name: {json.loads(line)["id"] for line in (folder / f"{name}.jsonl").open()}
        for name in ("pool", "train_targets", "test_targets")
    }
    assert [len(ids[name]) for name in ids] == [40, 10, 10]
    assert len(set.union(*ids.values())) == 60


def test_encode_rank_and_score(run: tuple[str, Path], tmp_path: Path, capsys) -> None:
    from safetensors.numpy import load_file

    from airrep.attributor import unpack_text

    folder = run[1]
    common = ["--encoder", str(folder / "encoder"), "--examples", str(folder / "pool.jsonl")]
    targets = ["--targets", str(folder / "test_targets.jsonl")]
    out = tmp_path / "out" / "pool.safetensors"
    assert main(["encode", *common, "--output", str(out)]) == 0
    written = load_file(out)
    assert len(unpack_text(written["ids"])) == len(written["embeddings"]) == 40
    ranked = tmp_path / "rank.jsonl"
    assert main(["rank", *common, *targets, "--top-k", "3", "--output", str(ranked)]) == 0
    rows = [json.loads(line) for line in ranked.open()]
    assert len(rows) == 10
    for row in rows:
        helpful = [found["score"] for found in row["helpful"]]
        assert len(helpful) == len(row["harmful"]) == 3
        assert helpful == sorted(helpful, reverse=True)
        assert helpful[0] >= row["harmful"][0]["score"]
    encoder = AirRepEncoder.from_pretrained(folder / "encoder")
    assert encoder.projector.out_features == written["embeddings"].shape[1]
    candidates = tmp_path / "candidates.jsonl"
    ids = unpack_text(written["ids"])
    lines = [{"name": "first", "ids": ids[:5]}, {"ids": ids[5:12]}]
    candidates.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored = tmp_path / "score.jsonl"
    query = ["score", *common, *targets, "--subsets", str(candidates)]
    assert main([*query, "--output", str(scored)]) == 0
    found = [json.loads(line) for line in scored.open()]
    assert {row["name"] for row in found} == {"first", "subset-1"}
    assert found[0]["score"] >= found[1]["score"]
    assert len(found[0]["targets"]) == 10
    write_examples(tmp_path / "a.jsonl", examples(60, "e")[:0] or _some(folder, 4))
    files = ["--subsets", f"{tmp_path / 'a.jsonl'},{folder / 'pool.jsonl'}"]
    capsys.readouterr()
    assert main(["score", *common, *targets, *files]) == 0
    assert "pool.jsonl" in capsys.readouterr().out
    # Rows of a file without ids are numbered, and so are those of another file.
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    named = [json.dumps({**json.loads(line), "id": ids[9 - row]}) for row, line in enumerate(lines)]
    (tmp_path / "a.jsonl").write_text("\n".join(named) + "\n")
    assert main(["score", *common, *targets, *files]) == 2
    assert "has another text for" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["kernels", "ensemble"])
def test_a_method_is_fitted_saved_and_asked(
    run: tuple[str, Path], method: str, tmp_path: Path, fails: Fails, capsys
) -> None:
    config, folder = run
    saved = str(folder / "methods" / method)
    members = ["--evaluate.params", "{ensemble: {members: [airrep, kernels]}}"]
    assert main(["fit", "--config", config, "--methods", method, *members]) == 0
    assert saved in capsys.readouterr().out
    targets = ["--targets", str(folder / "test_targets.jsonl")]
    pool = ["--examples", str(folder / "pool.jsonl")]
    ranked = tmp_path / "rank.jsonl"
    rank = ["rank", "--method", saved, *targets, "--output", str(ranked)]
    assert main([*rank, *pool]) == 0
    assert "another pool" not in capsys.readouterr().out
    first = json.loads(ranked.read_text().splitlines()[0])["helpful"][0]
    attributor = Attributor.load(saved)
    target = read_examples(folder / "test_targets.jsonl")[0]
    assert first["score"] == pytest.approx(attributor.score([target]).max(), rel=1e-4)
    # Part of the pool is another pool, to which what was learned is fitted.
    part = tmp_path / "part.jsonl"
    write_examples(part, _some(folder, 15))
    assert main([*rank, "--examples", str(part), "--top-k", "15"]) == 0
    assert "was fitted to another pool" in capsys.readouterr().out
    assert len(json.loads(ranked.read_text().splitlines()[0])["helpful"]) == 15
    score = ["score", "--method", saved, *pool, *targets, "--subsets", f"{part},{pool[1]}"]
    assert main(score) == 0
    assert "part.jsonl" in capsys.readouterr().out
    encoder = ["--encoder", str(folder / "encoder")]
    assert "--encoder and --method; give one" in fails(*score, *encoder)
    assert "neither --encoder nor --method" in fails("rank", *pool, *targets)
    assert "no attributor.json" in fails("rank", "--method", str(folder), *pool, *targets)


def _some(folder: Path, count: int) -> list[Example]:
    return read_examples(folder / "pool.jsonl")[:count]


def test_labels_of_another_recipe_are_refused_and_kept(run: tuple[str, Path], fails: Fails) -> None:
    config, folder = run
    line = fails("labels", "--config", config, "--recipe.epochs", "2")
    assert "was made for something else" in line
    assert "epochs=1" in line
    assert "epochs=2" in line
    assert len(LabelStore.open(folder / "train_labels").done()) == 8
    assert main(["labels", "--config", config]) == 0


def test_labels_of_other_data_or_another_model_are_refused(
    run: tuple[str, Path], tmp_path: Path, fails: Fails
) -> None:
    config, folder = run
    pool = (folder / "pool.jsonl").read_bytes()
    other = write_config(tmp_path, {})
    changed = (tmp_path / "examples.jsonl").read_text().replace("capital", "town")
    (tmp_path / "examples.jsonl").write_text(changed)
    assert other
    source = ["--data.examples", str(tmp_path / "examples.jsonl")]
    assert "examples is" in fails("subsets", "--config", config, *source)
    assert (folder / "pool.jsonl").read_bytes() == pool
    lm = save_tiny_lm(tmp_path / "lm", seed=5)
    assert "lm is" in fails("labels", "--config", config, "--lm", str(lm))


def test_an_unknown_key_names_the_nearest(
    tmp_path: Path, models: dict[str, str], fails: Fails
) -> None:
    config = write_config(tmp_path, models, recipe={"epoch": 3})
    assert "'recipe.epoch'; did you mean 'recipe.epochs'?" in fails("labels", "--config", config)
    config = write_config(tmp_path, models, epochs=3)
    assert "did you mean 'recipe.epochs'?" in fails("labels", "--config", config)
    config = write_config(tmp_path, models)
    line = fails("train", "--config", config, "--train.max_step", "3")
    assert "no flag --train.max_step; did you mean 'train.max_steps'?" in line
    assert "no flag --method; did you mean 'methods'?" in fails("tune", "--method", "tfidf")
    assert "no flag --topk; did you mean 'top-k'?" in fails("rank", "--topk", "3")
    assert "known here: examples, targets, subsets, encoder," in fails("score", "--x", "3")


def test_wrong_config_files(tmp_path: Path, fails: Fails) -> None:
    assert "no config file" in fails("train", "--config", str(tmp_path / "absent.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1, 2")
    assert "is not YAML" in fails("train", "--config", str(bad))
    bad.write_text("- 1\n")
    assert "holds no keys" in fails("train", f"--config={bad}")
    assert "output" in fails("train")
    assert "invalid choice: 'frob'" in fails("frob")


def test_a_wrong_value_is_named(tmp_path: Path, models: dict[str, str], fails: Fails) -> None:
    config = write_config(tmp_path, models)
    assert "recipe.epochs" in fails("labels", "--config", config, "--recipe.epochs", "many")
    assert "recipe.epochs is 0" in fails("labels", "--config", config, "--recipe.epochs", "0")
    assert "device 'cudo'" in fails("train", "--config", _labelled(config), "--device", "cudo")


def _labelled(config: str) -> str:
    assert main(["labels", "--config", config]) == 0
    return config


def test_stages_say_which_one_comes_first(
    tmp_path: Path, models: dict[str, str], fails: Fails
) -> None:
    config = write_config(tmp_path, models)
    assert "run `airrep labels` first" in fails("train", "--config", config)
    assert main(["subsets", "--config", config]) == 0
    assert "has no labels yet; run `airrep labels`" in fails("evaluate", "--config", config)
    assert "run `airrep evaluate` first" in fails("report", "--config", config)


def test_bad_examples_are_named(tmp_path: Path, models: dict[str, str], fails: Fails) -> None:
    config = write_config(tmp_path, models)
    path = tmp_path / "examples.jsonl"
    path.write_text('{"id": "a", "prompt": "p", "response": "r"}\n{"id": \n')
    assert f"{path} line 2 is not JSON" in fails("subsets", "--config", config)
    path.write_text('{"id": "a", "text": "p"}\n')
    assert "its columns are id, text" in fails("subsets", "--config", config)
    path.write_text('{"prompt": "p", "response": " "}\n')
    assert "line 1 has an empty response" in fails("subsets", "--config", config)
    path.write_text('{"id": "a", "prompt": "p", "response": "r"}\n' * 2)
    assert "the id 'a' was used before" in fails("subsets", "--config", config)
    path.unlink()
    assert "no file" in fails("subsets", "--config", config)


def test_a_truncated_shard_is_named(tmp_path: Path, models: dict[str, str], fails: Fails) -> None:
    config = _labelled(write_config(tmp_path, models))
    shard = tmp_path / "run" / "train_labels" / "losses" / "000003-r0.safetensors"
    shard.write_bytes(shard.read_bytes()[:40])
    line = fails("train", "--config", config)
    assert str(shard) in line
    assert "delete it and run the same labels command again" in line
    shard.unlink()
    assert main(["labels", "--config", config]) == 0
    assert main(["train", "--config", config]) == 0


def test_wrong_models_and_outputs(run: tuple[str, Path], tmp_path: Path, fails: Fails) -> None:
    folder = run[1]
    pool = ["--examples", str(folder / "pool.jsonl")]
    line = fails("encode", "--encoder", str(tmp_path), *pool, "--output", "x.safetensors")
    assert "is not a model folder" in line
    encoder = ["--encoder", str(folder / "encoder")]
    assert "must end in .safetensors" in fails("encode", *encoder, *pool, "--output", "x.npy")
    candidates = tmp_path / "c.jsonl"
    candidates.write_text('{"ids": ["nobody"]}\n')
    targets = ["--targets", str(folder / "test_targets.jsonl")]
    query = ["score", *encoder, *pool, *targets, "--subsets", str(candidates)]
    assert "c.jsonl line 1 names 1 ids that are not in the pool" in fails(*query)
    rank = ["rank", *encoder, *pool, *targets]
    assert "ask for at least one row" in fails(*rank, "--top-k", "0")
    assert "device 'meta' cannot be used here" in fails(*rank, "--device", "meta")


def _queries(folder: Path) -> dict[str, list[str]]:
    common = ["--encoder", str(folder / "encoder"), "--examples", str(folder / "pool.jsonl")]
    targets = ["--targets", str(folder / "test_targets.jsonl")]
    return {
        "encode": ["encode", *common],
        "rank": ["rank", *common, *targets],
        "score": ["score", *common, *targets, "--subsets", str(folder / "pool.jsonl")],
    }


@pytest.mark.parametrize("query", ["encode", "rank", "score"])
def test_a_full_disk_leaves_the_old_output(
    run: tuple[str, Path],
    query: str,
    tmp_path: Path,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / ("x.safetensors" if query == "encode" else "x.jsonl")
    output.write_text("precious")
    monkeypatch.setattr(os, "fsync", refuse)
    line = fails(*_queries(run[1])[query], "--output", str(output))
    assert f"The output {output} cannot be written (No space left on device)" in line
    assert output.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [output]


def test_outputs_that_cannot_be_files(run: tuple[str, Path], tmp_path: Path, fails: Fails) -> None:
    folder, file = tmp_path / "x.jsonl", tmp_path / "file"
    folder.mkdir()
    file.write_text("")
    rank = _queries(run[1])["rank"]
    assert "x.jsonl is a folder; give the name of a file" in fails(*rank, "--output", str(folder))
    assert "cannot be written (" in fails(*rank, "--output", str(file / "x.jsonl"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"name": "a", "ids": ["%s"]}'] * 2, "line 2 is a second candidate 'a'"),
        (['{"name": "subset-1", "ids": ["%s"]}', '{"name": null, "ids": ["%s"]}'], "'subset-1'"),
        (['{"ids": ["%s"]}', '{"ids": ["%s", "%s"]}'], "line 2 names the id"),
        (['{"name": "\\ud800", "ids": ["%s"]}'], "UTF-8 cannot write in column 'name'"),
    ],
)
def test_candidates_that_would_be_lost_are_refused(
    run: tuple[str, Path], lines: list[str], message: str, tmp_path: Path, fails: Fails
) -> None:
    known = _some(run[1], 1)[0].id
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(lines).replace("%s", known))
    score = _queries(run[1])["score"][:-1]
    assert message in fails(*score, str(file))


@pytest.mark.parametrize(
    ("subsets", "message"),
    [("{0},{0}", "second candidate"), ("", "subsets is ''"), ("{0},", "with an empty name")],
)
def test_files_of_candidates_are_named_once(
    run: tuple[str, Path], subsets: str, message: str, fails: Fails
) -> None:
    score = _queries(run[1])["score"][:-1]
    assert message in fails(*score, subsets.format(run[1] / "pool.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("labels --output x --recipe.epochs many", "recipe.epochs got many; it takes a whole"),
        ("labels --output x --subsets.size 1.5", "subsets.size got 1.5; it takes a whole number"),
        ("labels --output x --train.average x", "train.average got x; it takes a number or null."),
        ("labels --output x --engine.name foo", "engine.name got foo; it takes one of 'auto', '"),
        ("labels --output x --data.corpus.tasks 3", "data.corpus.tasks got 3; it takes a list or"),
        ("labels --output x --imported 5", "imported got 5; it takes its keys or null."),
        ("labels --output x --imported.train a", "imported needs test; give --imported.test"),
        ("labels", "labels needs output; give --output, or a line in the config file."),
        ("rank --encoder x", "rank needs examples, targets; give --examples, --targets, or a"),
        ("evaluate --benchmark=x --methods none", "There is no method 'none'"),
        ("evaluate --benchmark x --scores a=x.npy,a=y.npy", "--scores names 'a' twice"),
        ("rank --config no-such-file.yaml", "config: File does not exist"),
    ],
)
def test_the_parsers_sentences_are_in_words(arguments: str, sentence: str, fails: Fails) -> None:
    line = fails(*arguments.split())
    assert sentence in line
    assert "<class" not in line


def test_null_in_the_file_of_a_query_is_refused(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "q.yaml").write_text("encoder: e\nexamples: x\ntargets: t\ntop_k: null\n")
    assert "top_k is null; give a value" in fails("rank", "--config", str(tmp_path / "q.yaml"))


def test_null_is_taken_where_it_is_the_default(fails: Fails) -> None:
    files = "--encoder e --examples x --output x.txt --columns null"
    line = fails("encode", *files.split(), "--batch-size", "null")
    assert "The output x.txt must end in .safetensors." in line
    line = fails("encode", *files.split(), "--batch-size", "some")
    assert "batch_size got some; it takes a whole number or null." in line


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free some space: what is finished is kept"), (errno.EISDIR, "check the path")],
)
def test_only_a_full_disk_says_that_the_command_goes_on(
    number: int, advice: str, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: object) -> None:
        raise OSError(number, os.strerror(number), "there")

    monkeypatch.setattr("airrep.label_stages.make_subsets", fail)
    line = fails("subsets", "--output", "x")
    assert f"{os.strerror(number)} (there); {advice}" in line
    assert ("goes on" in line) == (number == errno.ENOSPC)


def test_help_is_fast_and_ctrl_c_quiet_during_imports() -> None:
    code = """
import sys
from airrep.cli import main

class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
try:
    main(["--help"])
except SystemExit:
    sys.exit(main(["train", "--output", "x"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "subcommands" in done.stdout
    assert done.returncode == 130
    assert done.stderr.strip().startswith("airrep: stopped;")
    assert "Traceback" not in done.stderr


def test_no_data_or_two_sources_are_refused(
    tmp_path: Path, models: dict[str, str], fails: Fails
) -> None:
    config = write_config(tmp_path, models, data={})
    assert "must name either data.examples" in fails("subsets", "--config", config)


def test_imported_labels(tmp_path: Path, models: dict[str, str], fails: Fails) -> None:
    config = write_config(tmp_path, models)
    write_examples(tmp_path / "test.jsonl", examples(6, "t"))
    rng = np.random.default_rng(0)
    subsets = np.stack([rng.permutation(50)[:8] for _ in range(10)])
    np.savez(
        tmp_path / "train.npz",
        subsets=subsets,
        losses=rng.random((10, 10), dtype=np.float32),
        target_rows=np.arange(50, 60),
    )
    losses = rng.random((10, 6), dtype=np.float32)
    np.savez(tmp_path / "test.npz", subsets=subsets[::-1], losses=losses)
    flags = [
        f"--imported.train={tmp_path / 'train.npz'}",
        f"--imported.test={tmp_path / 'test.npz'}",
    ]
    assert "need data.examples" in fails("labels", "--config", config, *flags)
    flags.append(f"--data.test_targets={tmp_path / 'test.jsonl'}")
    assert main(["labels", "--config", config, *flags]) == 0
    store = LabelStore.open(tmp_path / "run" / "test_labels")
    np.testing.assert_array_equal(store.read().losses, losses.T)
    assert main(["train", "--config", config, *flags]) == 0
    assert main(["evaluate", "--config", config, *flags, "--methods", "airrep,random"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["name"] for row in results["methods"]] == ["airrep", "random"]
    assert results["noise_ceiling"] is None
    # Whoever made them knows how long it took.
    assert results["methods"][0]["prepare_seconds"] is None


@pytest.mark.parametrize("content", ["{", "", "[]", "null", "{}", '{"methods": "x"}'])
def test_damaged_results_are_named(run: tuple[str, Path], content: str, fails: Fails) -> None:
    results = run[1] / "results.json"
    whole = results.read_bytes()
    try:
        results.write_text(content)
        line = fails("report", "--config", run[0])
    finally:
        results.write_bytes(whole)
    assert f"{results} cannot be read" in line
    assert "run `airrep evaluate` again" in line


def test_damaged_scores_are_named(run: tuple[str, Path], fails: Fails) -> None:
    scores = run[1] / "scores" / "bm25.npy"
    whole = scores.read_bytes()
    try:
        for content in (b"", whole[:90], b"junk"):
            scores.write_bytes(content)
            assert f"{scores} cannot be read" in fails("report", "--config", run[0])
    finally:
        scores.write_bytes(whole)


def test_a_run_becomes_a_benchmark_that_judges_scores_of_outside_tools(
    run: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Fails
) -> None:
    config, folder = run
    assert main(["benchmark", "make", "--config", config, "--licence", "CC0"]) == 0
    about = json.loads((folder / "benchmark.json").read_text())
    assert (about["licence"], about["labels"], about["repeat_labels"]) == ("CC0", 4, 2)
    ours = folder / "scores" / "airrep.npy"
    command = ["evaluate", f"--benchmark={folder}", "--methods=bm25", f"--output={tmp_path}"]
    encoder = ["--encoder", str(folder / "encoder")]
    assert main([*command, *encoder, "--scores", f"outside={ours}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    found = {row["name"]: row["lds"] for row in results["methods"]}
    assert list(found) == ["airrep", "bm25", "outside"]
    assert results["methods"][2]["examples_per_second"] is None
    assert found["airrep"] == found["outside"]
    assert "outside" in capsys.readouterr().out
    line = fails(*command, "--scores", "outside")
    assert "--scores has 'outside'; give name=FILE, several with commas" in line


def test_any_method_runs_on_a_benchmark(
    run: tuple[str, Path], models: dict[str, str], tmp_path: Path, fails: Fails
) -> None:
    config, folder = run
    assert main(["benchmark", "make", "--config", config]) == 0
    command = ["evaluate", f"--benchmark={folder}", f"--output={tmp_path}", "--methods=logra"]
    params = {"logra": {"lm": models["lm"], "projection_rank": 2, "device": "cpu"}}
    assert main([*command, f"--params={json.dumps(params)}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["methods"]] == ["logra"]
    assert "missing a required argument: 'lm'" in fails(*command)
    assert "give parameters by method" in fails(*command, "--params=[logra]")
    assert "params is not YAML" in fails(*command, "--params={")
    assert "no method 'logre'" in fails(*command, "--params={logre: {}}")


def test_a_run_compares_scores_of_outside_tools(run: tuple[str, Path], tmp_path: Path) -> None:
    config, folder = run
    copy = shutil.copytree(folder, tmp_path / "run")
    changes = [f"--output={copy}", f"--evaluate.scores={{outside: {copy}/scores/bm25.npy}}"]
    assert main(["evaluate", "--config", config, "--methods", "bm25", *changes]) == 0
    results = json.loads((copy / "results.json").read_text())
    bm25, outside = results["methods"]
    assert (outside["name"], outside["method"]) == ("outside", "given")
    assert bm25["lds"] == outside["lds"]
    assert list(results["inputs"]["scores"]) == ["outside"]


def test_a_published_test_set_is_imported(tmp_path: Path) -> None:
    files = {
        "train": [{"inputs": f"Ask {i}?", "targets": "yes"} for i in range(3)],
        "test": [{"inputs": "Is it?", "targets": "no"}],
        "lds": [{"train_subset": [i], "test_loss": [i / 2]} for i in range(3)],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    output = tmp_path / "out"
    assert main(["import", "--published", str(tmp_path), "--output", str(output)]) == 0
    assert main(["judge", "--benchmark", str(output)]) == 0
    assert not (output / "results.json").exists()
    assert json.loads((output / "judged" / "results.json").read_text())["subsets"] == 3


def test_labels_are_verified_by_training_again(
    tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = _labelled(write_config(tmp_path, models))
    command = ["verify", "--config", config, "--fresh", "0", "--agreement", "exact"]
    assert main(command) == 0
    store = LabelStore.open(tmp_path / "run" / "test_labels")
    losses = store.read().losses
    for number in store.done():
        store.write(number, losses[::-1, number])
    assert main(command) == 1
    assert main([*command, "--share", "2"]) == 2


def test_every_flag_says_what_it_is() -> None:
    from airrep.cli import _QUERIES, _STAGES, make_parser

    for command in (*_STAGES, *_QUERIES):
        parser = make_parser(command)._subcommands_action._name_parser_map[command]
        silent = [
            action.option_strings[0]
            for action in parser._actions
            if action.option_strings and not action.help
        ]
        assert not silent, command
