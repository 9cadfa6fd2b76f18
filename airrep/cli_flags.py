"""The flags of the `airrep` command beside those of the configuration."""

from typing import Any

STAGE_FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "plan": {
        "price": {"type": float, "default": None, "help": "price of an hour of this machine"},
        "hours": {"type": float, "default": None, "help": "a budget: how many labels it buys"},
    },
    "labels": {
        "shard": {"default": "1/1", "help": "i/n: make the i-th of n parts only (job arrays)"},
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
            "help": "numbers or shares of examples: 5,20,5%% (removal), 1 (leave_one_out), "
            "10%% (selection)",
        },
        "targets": {
            "type": int,
            "default": 5,
            "help": "how many targets, or tasks, get a choice of their own",
        },
        "by": {
            "default": None,
            "help": "a choice for each target, for each task (cheaper), or for all",
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
    "evaluate": {
        "methods": {"default": None, "help": "a,b,c: in place of the configured methods"},
    },
}

# The same word everywhere: flag -> type, default, help.
QUERY_FLAGS: dict[str, tuple[type, Any, str]] = {
    "encoder": (str, None, "trained encoder: folder, hub id or package:NAME"),
    "examples": (str, None, "the pool: jsonl, json, csv or parquet file, data set folder, hub id"),
    "targets": (str, None, "the targets, in the same formats"),
    "subsets": (str, None, "candidates: jsonl of {name, ids}, or files of examples: a.csv,b.csv"),
    "output": (
        str,
        None,
        "what to write (encode: .safetensors; rank, score: .jsonl; index: folder)",
    ),
    "index": (str, None, "index folder; made from --examples when it is not there"),
    "dtype": (str, None, "float32, or float16: half the disk, slower search"),
    "port": (int, 8000, "port of the page on 127.0.0.1; 0 takes any free one"),
    "benchmark": (str, None, "folder of a benchmark"),
    "scores": (str, None, "scores of outside tools: name=FILE,name2=FILE"),
    "methods": (str, "bm25,tfidf,same_task,random", "a,b,c"),
    "untrained": (str, None, "encoder before training, for a row `embedding`"),
    "published": (str, None, "folder with train.jsonl, test.jsonl and lds.jsonl"),
    "lm": (str, "not stated", "the language model behind the losses"),
    "licence": (str, "", "the licence of the examples"),
    "top-k": (int, 10, "how many examples of either end"),
    "batch-size": (int, 64, "examples encoded together"),
    "device": (str, "auto", "auto, cpu, cuda, cuda:1, ..."),
    "seed": (int, 0, "decides the bootstrap and the method `random`"),
}
