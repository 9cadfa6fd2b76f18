"""The flags of the `airrep` command beside those of the configuration."""

from typing import Any

STAGE_FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "plan": {
        "price": {"type": float, "default": None, "help": "price of an hour of this machine"},
        "hours": {"type": float, "default": None, "help": "a budget: how many labels it buys"},
    },
    "labels": {
        "shard": {"default": "1/1", "help": "i/n: make the i-th of n parts only (job arrays)"},
        "ray": {
            "type": str,
            "default": None,
            "help": "train on a Ray cluster: auto (the one this machine is in), local (a new one "
            "of this machine alone) or HOST:PORT",
        },
        "mirror": {
            "type": str,
            "default": None,
            "help": "a copy of the labels behind any fsspec URL (s3://bucket/run), for workers "
            "without a common disk: what is there is not made again, what is made goes there; a "
            "folder of this machine (file:///...) must exist",
        },
        "merge": {"action": "store_true", "help": "put all labels into one file afterwards"},
    },
    "benchmark": {
        "description": {"default": "", "help": "what the benchmark is, in a sentence"},
        "source": {"default": "", "help": "where the examples come from"},
        "licence": {"default": "", "help": "the licence of the examples"},
    },
    "intervene": {
        "kind": {
            "choices": ["removal", "leave_one_out", "selection"],
            "required": True,
            "help": "train without the top k, without one example, or on the top k alone",
        },
        "methods": {
            "default": None,
            "help": "a,b,c: methods with scores in the run's folder, or .npy files of scores "
            "(targets, pool); those evaluated but random when not given",
        },
        "k": {
            "type": str,
            "default": None,
            "help": "numbers or shares of examples: 5,20,5% (removal), 1 (leave_one_out), "
            "10% (selection)",
        },
        "targets": {
            "type": int,
            "default": 5,
            "help": "how many targets, or tasks, get a choice of their own",
        },
        "by": {
            "default": None,
            "help": "target, task or all: a choice for each target, each task (cheaper), or one",
        },
        "seeds": {
            "type": int,
            "default": 3,
            "help": "trainings of each model, each with another order",
        },
        "random": {
            "type": int,
            "default": None,
            "help": "random choices of each size to compare with; random rows for leave_one_out",
        },
        "base": {
            "type": int,
            "default": None,
            "help": "do all this on a random part of the pool of this size",
        },
        "shard": {"default": "1/1", "help": "i/n: train the i-th of n parts only (job arrays)"},
        "plan-only": {
            "action": "store_true",
            "help": "train one model, say how long the rest takes, and stop",
        },
    },
    "verify": {
        "split": {
            "choices": ["test", "train"],
            "default": "test",
            "help": "whose labels; scores are verified with test only",
        },
        "share": {
            "type": float,
            "default": 0.05,
            "help": "share of forged labels to find; decides how many are trained again",
        },
        "confidence": {
            "type": float,
            "default": 0.95,
            "help": "chance of finding it, and of not refusing a true claim",
        },
        "count": {
            "type": int,
            "default": None,
            "help": "labels to train again, in place of what share and confidence need",
        },
        "agreement": {
            "choices": ["auto", "exact", "seeds"],
            "default": "auto",
            "help": "labels must be the same, or as alike as two seeds, or whichever of the two "
            "most of them are",
        },
        "tolerance": {
            "type": float,
            "default": 0.01,
            "help": "root mean square difference, in nats, that is rounding",
        },
        "methods": {
            "type": str,
            "default": None,
            "help": "a,b,c: methods, or .npy or .safetensors files of scores; all in results.json "
            "when not given",
        },
        "fresh": {
            "type": int,
            "default": 32,
            "help": "new subsets to try scores on; 0 leaves scores alone",
        },
        "epsilon": {
            "type": float,
            "default": 0.05,
            "help": "how much too good a claim may be: of LDS and gap; as a share, of slope",
        },
        "lds": {"type": float, "default": None, "help": "LDS claimed for the one method given"},
        "slope": {"type": float, "default": None, "help": "its slope, nats a unit of score"},
        "gap": {
            "type": float,
            "default": None,
            "help": "its squared error beyond the best linear score's, as a share of the labels' "
            "variance",
        },
        "entropy": {
            "type": int,
            "default": None,
            "help": "repeats the draws of an earlier verification.json",
        },
    },
    "learning-curve": {
        "counts": {
            "type": str,
            "default": None,
            "help": "a,b,c: numbers of training labels; when not given, all that are not held "
            "out, a half, a quarter and an eighth of them",
        },
        "seeds": {
            "type": int,
            "default": 3,
            "help": "trainings at each number, each on another part of the labels",
        },
    },
    "warm-up": {
        "checkpoints": {
            "type": int,
            "default": 1,
            "help": "models to keep, at equal distances (tracin, trak and less use them all)",
        },
        "moments": {
            "action": "store_true",
            "help": "keep Adam's moments too, which less then uses",
        },
        "examples": {
            "type": int,
            "default": None,
            "help": "train on so many of the pool, drawn at random; when not given, on as many as "
            "a training subset has, like the models behind the labels",
        },
    },
    "tune": {
        "methods": {"default": None, "help": "a,b,c: in place of the configured methods"},
        "trials": {"type": int, "default": 12, "help": "settings to try, the same for each method"},
    },
    "fit": {
        "methods": {
            "required": True,
            "help": "a,b,c: methods to fit to the run's pool and to save, each in methods/NAME of "
            "its folder",
        },
    },
    "evaluate": {
        "methods": {"default": None, "help": "a,b,c: in place of the configured methods"},
    },
}

# The same word everywhere: flag -> type, default, help.
QUERY_FLAGS: dict[str, tuple[type, Any, str]] = {
    "encoder": (str, None, "trained encoder: folder, hub id or package:NAME"),
    "method": (str, None, "in place of an encoder: folder of a method that `airrep fit` saved"),
    "examples": (str, None, "the pool: jsonl, json, csv or parquet file, data set folder, hub id"),
    "targets": (str, None, "the targets, in the same formats"),
    "subsets": (str, None, "candidates: jsonl of {name, ids}, or files of examples: a.csv,b.csv"),
    "output": (
        str,
        None,
        "what to write (encode: .safetensors; rank, score: .jsonl; others: a folder)",
    ),
    "index": (str, None, "index folder; made from --examples when it is not there"),
    "dtype": (str, None, "float32, or float16: half the disk, slower search"),
    "port": (int, 8000, "port of the page on 127.0.0.1; 0 takes any free one"),
    "benchmark": (str, None, "folder of a benchmark"),
    "scores": (str, None, "scores of outside tools: name=FILE,name2=FILE"),
    "methods": (str, "bm25,tfidf,response_tfidf,same_task,random", "a,b,c"),
    "params": (str, None, "parameters of methods in YAML: '{logra: {lm: DIR, layers: mlp}}'"),
    "untrained": (
        str,
        None,
        "encoder before training, for the rows `embedding` and `response_embedding`",
    ),
    "published": (str, None, "folder with train.jsonl, test.jsonl and lds.jsonl"),
    "lm": (str, "not stated", "the language model behind the losses"),
    "licence": (str, "", "the licence of the examples"),
    "top-k": (int, 10, "how many examples of either end"),
    "batch-size": (int, None, "examples encoded together; as many as suit the device"),
    "columns": (
        str,
        None,
        "names of columns in these files that are not recognised: prompt=text,response=answer; "
        "id and task too",
    ),
    "device": (str, "auto", "auto, cpu, cuda, cuda:1, ..."),
    "seed": (int, 0, "decides the bootstrap and the method `random`"),
}
