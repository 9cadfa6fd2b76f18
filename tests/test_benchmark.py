"""Benchmarks as folders: what is evaluated is what was described, and nothing else."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted import Planted, planted_benchmark
from tiny_models import tiny_encoder

from airrep.attributors import make_attributor
from airrep.benchmark import describe_benchmark, evaluate_benchmark, open_benchmark
from airrep.config import DataConfig, RunConfig, SubsetConfig
from airrep.encoder import AirRepEncoder
from airrep.evaluation import evaluate
from airrep.examples import Example, InputError, fingerprint_examples, write_examples
from airrep.label_stages import make_labels
from airrep.label_store import LabelStore
from airrep.published import import_published
from airrep.run_folder import RunFolder
from airrep.score_files import read_scores, write_scores
from data_builders.recipes import Recipe

PLANTED = planted_benchmark()
DRAWS = 50


def write_run(folder: Path, planted=PLANTED, split: str = "test") -> RunFolder:
    """What a run leaves of one split."""
    run = RunFolder(folder)
    write_examples(run.pool_file, planted.pool)
    write_examples(run.targets_file(split), planted.targets)
    fingerprint = {
        "examples": fingerprint_examples(planted.pool),
        "targets": fingerprint_examples(planted.targets),
    }
    about = {"lm": "planted", "recipe": {"epochs": 1}, "seed": 0}
    store = LabelStore.create(
        run.labels(split), fingerprint, planted.labels.subsets, len(planted.targets), about
    )
    for repeat, labels in enumerate((planted.labels, planted.repeats)):
        store.add_merged(dict(zip(labels.numbers.tolist(), labels.losses.T, strict=True)), repeat)
    return run


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("described") / "planted"
    write_run(folder)
    write_run(folder, planted_benchmark(seed=0), split="train")
    describe_benchmark(folder, description="planted", source="made here", licence="CC0")
    return folder


@pytest.fixture
def benchmark(described: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(described, tmp_path / "planted"))


def lds(results: dict, name: str) -> tuple:
    row = next(row for row in results["methods"] if row["name"] == name)
    return row["lds"], row["ci95"], row["lds_attention"], row["retrieval"]


# A benchmark made with real (tiny) models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path) -> tuple[Path, Path]:
    """The folder of a run with labels of a tiny language model, described; and an encoder."""
    folder = tmp_path_factory.mktemp("made")
    rows = [
        Example(f"row-{i}", f"what is the number of {i}", f"the river {i % 5}") for i in range(40)
    ]
    write_examples(folder / "examples.jsonl", rows)
    config = RunConfig(
        output=str(folder / "run"),
        lm=str(tiny_lm),
        data=DataConfig(examples=str(folder / "examples.jsonl"), target_count=16),
        subsets=SubsetConfig(train=2, test=6, size=6, repeats=3),
        recipe=Recipe(learning_rate=0.01, batch_size=4, epochs=1, warmup_steps=1),
    )
    make_labels(config)
    describe_benchmark(folder / "run")
    base = tiny_encoder(folder / "base")
    AirRepEncoder.from_base(str(base)).save_pretrained(str(folder / "encoder"))
    return folder / "run", folder / "encoder"


def test_our_scores_exported_and_given_back_are_worth_the_same(made, tmp_path):
    folder, encoder = made
    ours = make_attributor("airrep", encoder=encoder)
    methods = {"airrep": ours, "bm25": make_attributor("bm25")}
    results = evaluate_benchmark(folder, methods, output=tmp_path, draws=DRAWS)
    exported = tmp_path / "scores" / "airrep.npy"
    benchmark = open_benchmark(folder)
    rows, columns = (
        np.random.default_rng(0).permutation(len(part))
        for part in (benchmark.targets, benchmark.pool)
    )
    write_scores(
        tmp_path / "shuffled.safetensors",
        np.load(exported)[np.ix_(rows, columns)],
        [benchmark.targets[row] for row in rows],
        [benchmark.pool[column] for column in columns],
        pooling="attention",
    )
    files = {"back": exported, "shuffled": tmp_path / "shuffled.safetensors"}
    again = evaluate_benchmark(
        folder, {"bm25": make_attributor("bm25")}, scores=files, output=tmp_path, draws=DRAWS
    )
    assert lds(again, "back") == lds(again, "shuffled") == lds(results, "airrep")
    assert lds(again, "bm25") == lds(results, "bm25")
    assert results["noise_ceiling"]["subsets"] == 3
    assert again["inputs"]["scores"].keys() == files.keys()
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(again))
    assert not (folder / "results.json").exists()


def test_a_made_benchmark_says_what_it_is_of(made, tiny_lm):
    about = open_benchmark(made[0]).about
    assert (about["name"], about["lm"]) == ("run", str(tiny_lm))
    assert about["recipe"]["learning_rate"] == 0.01
    wanted = {"pool": 24, "targets": 8, "subsets": 6, "labels": 6, "repeat_labels": 3}
    assert {key: about[key] for key in wanted} == wanted
    assert list(about["parts"]) == [
        *("pool.jsonl", "test_targets.jsonl", "train_targets.jsonl"),
        *("test_labels", "train_labels"),
    ]


# Opening and evaluating


def test_opening_gives_what_was_described(benchmark):
    found = open_benchmark(benchmark)
    assert found.pool == PLANTED.pool
    assert found.targets == PLANTED.targets
    np.testing.assert_array_equal(found.labels.losses, PLANTED.labels.losses)
    np.testing.assert_array_equal(found.repeat_labels.losses, PLANTED.repeats.losses)
    assert {key: found.about[key] for key in ("name", "description", "source", "licence")} == {
        "name": "planted",
        "description": "planted",
        "source": "made here",
        "licence": "CC0",
    }
    assert (found.about["targets_with_proponents"], found.about["flipped_examples"]) == (12, 0)


def test_results_are_those_of_the_same_evaluation_without_a_folder(benchmark):
    methods = {"airrep": Planted(PLANTED.truth), "random": make_attributor("random")}
    found = evaluate_benchmark(benchmark, methods, draws=DRAWS, seed=3)
    expected, scores = evaluate(
        methods,
        *(PLANTED.pool, PLANTED.targets, PLANTED.labels),
        benchmark="planted",
        repeat_labels=PLANTED.repeats,
        draws=DRAWS,
        seed=3,
    )
    for name in methods:
        assert lds(found, name) == lds(expected, name)
        saved = read_scores(benchmark / "scores" / f"{name}.npy")
        np.testing.assert_array_equal(saved.scores, scores[name])
        assert saved.method == name
    assert found["noise_ceiling"] == expected["noise_ceiling"]
    assert json.loads((benchmark / "results.json").read_text())["benchmark"] == "planted"
    open_benchmark(benchmark)  # results beside the parts change none of them


def test_a_tool_that_predicts_subsets_is_judged_by_its_predictions(benchmark, tmp_path):
    sums = np.stack([PLANTED.truth[:, rows].sum(axis=1) for rows in PLANTED.labels.subsets], axis=1)
    examples = PLANTED.targets, PLANTED.pool
    write_scores(tmp_path / "s.safetensors", None, *examples, subset_scores=sums)
    methods = {"truth": Planted(PLANTED.truth)}
    found = evaluate_benchmark(
        benchmark, methods, scores={"tool": tmp_path / "s.safetensors"}, draws=DRAWS
    )
    for of_tool, of_truth in zip(lds(found, "tool")[:2], lds(found, "truth")[:2], strict=True):
        assert of_tool == pytest.approx(of_truth, abs=1e-6)


def test_scores_without_ids_are_taken_in_order_and_that_is_said(benchmark, tmp_path, capsys):
    np.save(tmp_path / "s.npy", PLANTED.truth)
    methods = {"truth": Planted(PLANTED.truth)}
    found = evaluate_benchmark(benchmark, methods, scores={"tool": tmp_path / "s.npy"}, draws=DRAWS)
    assert lds(found, "tool") == lds(found, "truth")
    said = capsys.readouterr().out
    assert "s.npy has no ids: its rows and columns are taken in the benchmark's order" in said
    np.save(tmp_path / "s.npy", PLANTED.truth.T)
    with pytest.raises(InputError, match="no target ids, and 60 places for 24 target examples"):
        evaluate_benchmark(benchmark, {}, scores={"tool": tmp_path / "s.npy"})


def test_scores_of_another_benchmark_and_unfit_names_are_refused(benchmark, tmp_path):
    path = tmp_path / "s.npy"
    write_scores(path, np.ones((24, 61)), PLANTED.targets, [*PLANTED.pool, Example("x", "a", "b")])
    with pytest.raises(InputError, match="has 1 pool ids that the benchmark has not .first: 'x'"):
        evaluate_benchmark(benchmark, {}, scores={"tool": path})
    write_scores(path, PLANTED.truth, PLANTED.targets, PLANTED.pool)
    with pytest.raises(InputError, match="Two methods are called 'random'; give the scores anoth"):
        evaluate_benchmark(
            benchmark, {"random": make_attributor("random")}, scores={"random": path}
        )
    with pytest.raises(InputError, match=r"'\.\./tool' cannot name a file of scores; use letters"):
        evaluate_benchmark(benchmark, {}, scores={"../tool": path})


# Changed, swapped and missing parts


def test_labels_of_other_examples_are_refused(benchmark, tmp_path):
    other = planted_benchmark(seed=1)
    targets = [replace(target, prompt="Another question?") for target in other.targets]
    write_run(tmp_path / "other", replace(other, targets=targets))
    shutil.rmtree(benchmark / "test_labels")
    shutil.copytree(tmp_path / "other" / "test_labels", benchmark / "test_labels")
    with pytest.raises(InputError, match=r"test_labels is not what benchmark\.json describes"):
        open_benchmark(benchmark)
    with pytest.raises(InputError, match=r"labels of other examples than those in .*test_targets"):
        describe_benchmark(benchmark)


def test_swapped_labels_of_the_same_examples_are_refused(tmp_path):
    # Pool, targets and plan are the same: only the losses tell the two seeds apart.
    other = replace(PLANTED, labels=replace(PLANTED.labels, losses=PLANTED.labels.losses[:, ::-1]))
    for name, planted in (("one", PLANTED), ("two", other)):
        write_run(tmp_path / name, planted)
        describe_benchmark(tmp_path / name)
    shutil.rmtree(tmp_path / "one" / "test_labels")
    shutil.copytree(tmp_path / "two" / "test_labels", tmp_path / "one" / "test_labels")
    with pytest.raises(InputError, match=r"test_labels is not what .*sha256 \w{12} there, \w{12}"):
        open_benchmark(tmp_path / "one")


@pytest.mark.parametrize("part", ["pool.jsonl", "test_targets.jsonl", "train_targets.jsonl"])
def test_changed_examples_are_refused_down_to_their_meta(benchmark, part):
    first, rest = (benchmark / part).read_text().split("\n", 1)
    changed = json.loads(first) | {"meta": {"proponents": ["pool-0"]}}
    (benchmark / part).write_text(f"{json.dumps(changed)}\n{rest}")
    with pytest.raises(InputError, match=f"{part} is not what benchmark.json describes.*if the"):
        open_benchmark(benchmark)


@pytest.mark.parametrize("part", ["pool.jsonl", "test_labels", "train_labels"])
def test_missing_parts_are_named(benchmark, part):
    (benchmark / part).rename(benchmark / "away")
    with pytest.raises(InputError, match=f"{part} is missing; get the whole benchmark again"):
        open_benchmark(benchmark)


def test_labels_may_be_merged_but_not_added_to(benchmark):
    store = LabelStore.open(benchmark / "test_labels")
    store.write(0, PLANTED.labels.losses[:, 0])
    open_benchmark(benchmark)
    store.merge()
    open_benchmark(benchmark)
    store.write(1, PLANTED.labels.losses[:, 1], repeat=1)
    with pytest.raises(InputError, match="describe the folder again with `airrep benchmark make`"):
        open_benchmark(benchmark)
    assert describe_benchmark(benchmark)["repeat_labels"] == 11
    assert len(open_benchmark(benchmark).repeat_labels.subsets) == 11


def test_a_benchmark_may_be_for_testing_alone_and_needs_two_labels(tmp_path):
    labels = replace(PLANTED.labels, numbers=np.array([4]), losses=PLANTED.labels.losses[:, [4]])
    few = replace(PLANTED, labels=labels, repeats=labels)
    run = write_run(tmp_path, few)
    with pytest.raises(InputError, match="test_labels has 1 labels; a benchmark needs at least tw"):
        describe_benchmark(tmp_path)
    LabelStore.open(run.labels("test")).write(0, PLANTED.labels.losses[:, 0])
    assert describe_benchmark(tmp_path)["labels"] == 2
    found = open_benchmark(tmp_path)
    assert found.repeat_labels is None
    assert len(found.plan) == 30
    assert found.labels.numbers.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is not a benchmark .it has no benchmark\.json.; make a run's folder on"),
        ("{", r"benchmark\.json is not JSON"),
        ("[]", "has format None, but this version reads 1"),
        ('{"format": 2}', "has format 2, but this version reads 1"),
        ('{"format": 1, "name": "x"}', "names no parts, or has no name"),
    ],
)
def test_a_folder_that_is_no_benchmark_is_refused(benchmark, content, message):
    (benchmark / "benchmark.json").unlink()
    if content is not None:
        (benchmark / "benchmark.json").write_text(content)
    with pytest.raises(InputError, match=message):
        open_benchmark(benchmark)


# The published format


def write_published(folder: Path, **changes: list) -> Path:
    """Four pool rows in the column names that occur, two targets, three labels."""
    files = {
        "train": [
            {"inputs": "Is it red?", "targets": "yes", "task": "colour"},
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            {"data": ["Hello", "Hi", "more"]},
            {"prompt": "Say.", "response": "said"},
        ],
        "test": [{"inputs": "Is it blue?", "targets": "no"}, {"prompt": "Go.", "response": "gone"}],
        "lds": [
            {"train_subset": [0, 1], "test_loss": [1.5, 2.5]},
            {"train_subset": [3, 1], "test_loss": [None, 2]},
            {"train_subset": [2, 3], "test_score": [0.5, float("nan")]},
        ],
    }
    folder.mkdir(exist_ok=True)
    for part, rows in (files | changes).items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_published_sets_become_benchmarks(tmp_path):
    about = import_published(
        write_published(tmp_path / "flan"), tmp_path / "out", lm="Qwen2.5-0.5B", licence="stated"
    )
    assert (about["name"], about["lm"], about["licence"]) == ("flan", "Qwen2.5-0.5B", "stated")
    found = open_benchmark(tmp_path / "out")
    assert [(one.id, one.prompt, one.response, one.task) for one in found.pool] == [
        ("train-0", "Is it red?", "yes", "colour"),
        ("train-1", "Add.\n1 and 2", "3", None),
        ("train-2", "Hello", "Hi", None),
        ("train-3", "Say.", "said", None),
    ]
    assert [one.id for one in found.targets] == ["test-0", "test-1"]
    assert [rows.tolist() for rows in found.labels.subsets] == [[0, 1], [3, 1], [2, 3]]
    np.testing.assert_array_equal(found.labels.losses, [[1.5, np.nan, 0.5], [2.5, 2, np.nan]])
    # The same again is nothing new; other labels in the same folder are refused.
    assert import_published(tmp_path / "flan", tmp_path / "out")["labels"] == 3
    write_published(tmp_path / "flan", lds=[{"train_subset": [0], "test_loss": [1, 1]}] * 2)
    with pytest.raises(InputError, match="was made for something else"):
        import_published(tmp_path / "flan", tmp_path / "out")


def test_published_losses_give_the_lds_they_give_directly(tmp_path):
    labels = PLANTED.labels
    write_published(
        tmp_path / "set",
        train=[{"inputs": one.prompt, "targets": one.response} for one in PLANTED.pool],
        test=[{"inputs": one.prompt, "targets": one.response} for one in PLANTED.targets],
        lds=[
            {"train_subset": rows.tolist(), "test_loss": losses.tolist()}
            for rows, losses in zip(labels.subsets, labels.losses.T, strict=True)
        ],
    )
    import_published(tmp_path / "set", tmp_path / "out")
    found = evaluate_benchmark(tmp_path / "out", {"truth": Planted(PLANTED.truth)}, draws=DRAWS)
    expected, _ = evaluate(
        {"truth": Planted(PLANTED.truth)},
        *(PLANTED.pool, PLANTED.targets, labels),
        benchmark="planted",
        draws=DRAWS,
    )
    assert lds(found, "truth")[:3] == lds(expected, "truth")[:3]
    assert found["noise_ceiling"] is None


def test_rows_without_a_response_are_left_out_everywhere(tmp_path, capsys):
    train = [{"prompt": "p", "response": text} for text in ("a", " ", "b", "c")]
    test = [{"prompt": "p", "response": text} for text in ("", "d")]
    import_published(write_published(tmp_path / "set", train=train, test=test), tmp_path / "out")
    assert "an empty response: 1 of the pool, 1 targets" in capsys.readouterr().out
    found = open_benchmark(tmp_path / "out")
    assert [one.id for one in found.pool] == ["train-0", "train-2", "train-3"]
    assert [one.id for one in found.targets] == ["test-1"]
    # The third label had only a loss that is not a number: it is missing as a whole.
    assert [rows.tolist() for rows in found.labels.subsets] == [[0], [2]]
    np.testing.assert_array_equal(found.labels.losses, [[2.5, 2]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": [{"text": "x"}]}, r"train\.jsonl line 1 has no text for a prompt; its columns"),
        ({"test": [{"prompt": "x"}]}, r"test\.jsonl line 1 has no text for a response"),
        ({"lds": []}, r"lds\.jsonl holds no labels"),
        ({"lds": [{"test_loss": [1, 2]}]}, "line 1 has no train_subset that is a list of rows"),
        ({"lds": [{"train_subset": ["a"], "test_loss": [1, 2]}]}, "has no train_subset that is"),
        ({"lds": [{"train_subset": [1, 4], "test_loss": [1, 2]}]}, "rows 1 to 4, and train.jsonl"),
        ({"lds": [{"train_subset": [-1], "test_loss": [1, 2]}]}, "names the rows -1 to -1"),
        ({"lds": [{"train_subset": [1], "test_loss": [1]}]}, "has 1 losses in test_loss or test_"),
        ({"lds": [{"train_subset": [1], "test_loss": {"a": 1}}]}, "has no list of losses in"),
        ({"lds": [{"train_subset": [1], "test_loss": [1, "2"]}]}, "has the loss '2'; give a num"),
        ({"lds": [{"train_subset": [1], "test_loss": [1, None]}]}, "has 1 labels; a benchmark ne"),
        ({"lds": [{"train_subset": [1], "test_loss": [None, None]}]}, "has 0 labels; a benchmark"),
    ],
)
def test_published_rows_of_another_shape_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        import_published(write_published(tmp_path / "set", **changes), tmp_path / "out")


def test_a_published_set_lacks_no_file(tmp_path):
    (write_published(tmp_path / "set") / "lds.jsonl").unlink()
    with pytest.raises(InputError, match=r"There is no file .*lds\.jsonl; train, test and lds"):
        import_published(tmp_path / "set", tmp_path / "out")


def test_the_method_of_the_documentation_runs(described, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "compare_your_method.md").read_text()
    code = next(block for block in text.split("```python\n") if "class " in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copytree(described, tmp_path / "out" / "theirs")
    exec(code.split("```")[0], {"__name__": "documentation"})
    assert (tmp_path / "out" / "judged" / "results.json").is_file()
    assert capsys.readouterr().out.count(",") == 1
