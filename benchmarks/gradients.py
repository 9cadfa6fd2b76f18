"""How many examples' gradient features are made in a second, and how many could be?

    OMP_NUM_THREADS=1 python benchmarks/gradients.py
    python benchmarks/gradients.py --lm package:NAME --examples pool.jsonl --count 256 --device cuda

Without --lm a random model is made, without --examples random texts. The floor is a forward and a
backward pass of the summed loss through the activations alone, in the same batches and of the
same run. The plain way takes one example at a time, the gradient of every chosen weight by
autograd, and projects that; it runs on a few of the examples. All ways take turns, and of each the
fastest of its runs counts, after one that does not.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from airrep.device import pick_device, tokens_at_once
from airrep.examples import (
    TokenizedExample,
    lengths_of,
    lm_template,
    token_chunks,
    tokenize_examples,
)
from airrep.gradients.layers import linear_layers
from airrep.gradients.per_example import GradientModel, autocast
from airrep.gradients.projections import flat_features, projected_shapes, random_projections
from airrep.lm import ResponseModel, load_lm
from airrep.reading import read_examples
from airrep.response_batch import response_batch
from airrep.weights import plain_weights, resolve_model

SETTINGS = (("mlp", 8), (None, 16))  # layers and rank


def main() -> None:
    """Runs every way and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", help="hub id, folder, GGUF file or package:NAME")
    parser.add_argument("--examples", help="file of examples; random texts without it")
    parser.add_argument("--count", type=int, default=128, help="how many examples")
    parser.add_argument("--plain-count", type=int, default=16, help="how many the plain way takes")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--template", default="auto", help="text around {prompt} and {response}")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-tokens", type=int, help="2048 on a CPU, 16384 elsewhere")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.device = pick_device(options.device)
    options.batch_tokens = options.batch_tokens or tokens_at_once(options.device)
    model, examples = open_inputs(options)
    ways = {"floor: forward and backward": (floor(model, examples, options), len(examples), 0)}
    few = examples[: options.plain_count]
    for pattern, rank in SETTINGS:
        shapes = shapes_of(model, pattern)
        width = sum(a * b for a, b in projected_shapes(shapes, rank).values())
        what = f"r={rank}, {'all linear' if pattern is None else pattern} layers"
        ways[f"features, {what}"] = (
            features(model, examples, pattern, rank, options),
            len(examples),
            width,
        )
        ways[f"plain way, {what}"] = (plain(model, few, pattern, rank), len(few), width)
    seconds = fastest({what: work for what, (work, _, _) in ways.items()}, options)
    lengths = lengths_of(examples)
    print(
        f"{options.lm or 'random Llama'}, {sum(map(torch.numel, model.parameters())) / 1e6:.1f}M "
        f"parameters, {len(examples)} examples of {lengths.mean():.0f} tokens "
        f"({lengths.min()} to {lengths.max()}), {options.precision} on {device_of(model)}, seed "
        f"{options.seed}\n"
    )
    print("| way | examples/s | share of the floor's speed | numbers an example |")
    print("|---|---|---|---|")
    rates = {what: count / seconds[what] for what, (_, count, _) in ways.items()}
    top = next(iter(rates.values()))
    for what, (_, _, width) in ways.items():
        print(f"| {what} | {rates[what]:,.1f} | {rates[what] / top:.2f} | {width:,} |")


def open_inputs(options: argparse.Namespace) -> tuple[nn.Module, list[TokenizedExample]]:
    """The model on its device, and the examples as its tokens."""
    if options.lm is None:
        model, tokenizer = random_model(options.seed).to(options.device), None
    else:
        model, tokenizer = load_lm(plain_weights(resolve_model(options.lm)), options.device)
    if options.examples is None:
        vocabulary = model.get_input_embeddings().num_embeddings
        return model, random_texts(vocabulary, options)
    if tokenizer is None:
        raise SystemExit("--examples needs the tokenizer of a model; give --lm too.")
    examples = read_examples(options.examples)[: options.count]
    template = lm_template(tokenizer, options.template)
    return model, tokenize_examples(examples, tokenizer, template, options.max_length)


def random_model(seed: int) -> nn.Module:
    """A Llama of 6 blocks with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def random_texts(vocabulary: int, options: argparse.Namespace) -> list[TokenizedExample]:
    """Texts of 32 to 96 tokens, the second half of each the response."""
    rng = np.random.default_rng(options.seed)
    lengths = rng.integers(32, min(96, options.max_length) + 1, size=options.count)
    return [
        TokenizedExample(rng.integers(vocabulary, size=size).astype(np.int32), int(size) // 2)
        for size in lengths
    ]


def floor(
    model: nn.Module, examples: Sequence[TokenizedExample], options: argparse.Namespace
) -> Callable[[], None]:
    """The passes that no way can do without, with a graph of activations alone."""

    def begin_graph(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    def work() -> None:
        model.requires_grad_(False)
        respond = ResponseModel(model)
        hook = model.get_input_embeddings().register_forward_hook(begin_graph)
        for rows in token_chunks(lengths_of(examples), options.batch_tokens):
            batch = response_batch([[examples[row] for row in rows]]).to(device_of(model))
            with autocast(device_of(model), options.precision):
                losses = respond.token_losses(batch)
            losses.sum().backward()
        hook.remove()
        respond.close()
        model.requires_grad_(True)

    return work


def features(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    pattern: str | None,
    rank: int,
    options: argparse.Namespace,
) -> Callable[[], None]:
    """Projected gradients of all examples, in batches."""

    def work() -> None:
        layers = linear_layers(model, pattern)
        with GradientModel(model, layers, precision=options.precision) as gradients:
            gradients.projections = random_projections(
                gradients.shapes, rank, "0", gradients.device
            )
            for rows in token_chunks(lengths_of(examples), options.batch_tokens):
                found = gradients.backward([examples[row] for row in rows])
                flat_features(found.layers).cpu()

    return work


def plain(
    model: nn.Module, examples: Sequence[TokenizedExample], pattern: str | None, rank: int
) -> Callable[[], None]:
    """The same numbers, one example at a time and by the weights' own gradients."""

    def work() -> None:
        layers = linear_layers(model, pattern)
        projections = random_projections(shapes_of(model, pattern), rank, "0", device_of(model))
        weights = [layer.weight for layer in layers.values()]
        for example in examples:
            ids = torch.from_numpy(example.ids.astype(np.int64)).to(device_of(model))
            first = max(example.response_start, 1)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1]
            loss = nn.functional.cross_entropy(logits, ids[first:], reduction="sum")
            whole = torch.autograd.grad(loss, weights)
            parts = zip(layers.values(), whole, projections.values(), strict=True)
            torch.cat(
                [
                    (p_out.T @ (one.T if isinstance(layer, Conv1D) else one) @ p_in).flatten()
                    for layer, one, (p_out, p_in) in parts
                ]
            ).cpu()

    return work


def fastest(ways: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, float]:
    """The least seconds of each way over several rounds, after a round that does not count."""
    seconds = dict.fromkeys(ways, np.inf)
    for number in range(options.repeats + 1):
        for what, work in ways.items():
            start = time.perf_counter()
            work()
            if number:
                seconds[what] = min(seconds[what], time.perf_counter() - start)
    return seconds


def shapes_of(model: nn.Module, pattern: str | None) -> dict[str, tuple[int, int]]:
    """The shapes of the chosen layers' weights."""
    with GradientModel(model, linear_layers(model, pattern)) as gradients:
        return gradients.shapes


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


if __name__ == "__main__":
    main()
