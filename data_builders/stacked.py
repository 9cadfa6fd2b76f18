"""Several models of one architecture in lock-step: one module tree, K sets of trained weights.

Every trained parameter gets a leading dimension K. The model is then run on a batch of K equal
parts, one behind the other; a module that owns trained parameters treats each part with its own
set, and all the rest of the architecture (attention, positions, frozen layers) does not notice.
Each kernel does K times the work, which is what fills a GPU.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from airrep.examples import InputError
from airrep.lm import find_blocks

MOST_GRAPHS = 64  # a number of models takes 2 to 4: with and without mask, gradients, several rows


class Stack:
    """Stacks the trained parameters of a model in place; `close` gives it back as it was."""

    def __init__(self, model: nn.Module) -> None:
        """Starts with one set. Raises InputError when a module that trains has parts of its own
        (its own weights cannot then be told apart from theirs)."""
        self._mapped: set[nn.Module] = set()  # computed by `vmap`, for want of a formula here
        self._owners: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []
        stacked: dict[int, nn.Parameter] = {}
        for module in model.modules():
            own = {
                name: parameter
                for name, parameter in module.named_parameters(recurse=False)
                if parameter.requires_grad
            }
            if not own:
                continue
            if any(module.children()):
                raise InputError(
                    f"{type(module).__name__} has weights beside those of its parts; "
                    'such a model can only be trained alone (engine "eager").'
                )
            self._owners.append((module, own))
            for parameter in own.values():
                # A tied weight is one parameter in two modules, before and after.
                if id(parameter) not in stacked:
                    stacked[id(parameter)] = nn.Parameter(parameter.detach()[None].clone())
        for module, own in self._owners:
            plain = copy.copy(module)
            plain._parameters = dict(module._parameters)
            for name, parameter in own.items():
                module._parameters[name] = stacked[id(parameter)]
            module.forward = self._forward(module, plain, tuple(own))
        self._compiled: list[nn.Module] = []
        self._rows = 0
        self._hook = model.register_forward_pre_hook(self._count_rows, with_kwargs=True)
        self.parameters = list(stacked.values())
        self.start = [parameter.detach()[0].clone() for parameter in self.parameters]

    def reset(self, models: int) -> None:
        """Gives `models` sets, each at the weights the model was loaded with."""
        for parameter, start in zip(self.parameters, self.start, strict=True):
            parameter.grad = None
            parameter.data = start.expand(models, *start.shape).clone()

    @property
    def is_compiled(self) -> bool:
        return bool(self._compiled)

    def compile(self, model: nn.Module) -> None:
        """Compiles the blocks of the model that train, when they first run; all but the last.

        One graph serves all blocks and any number and length of rows; each number of models has
        its own. The last block has hooks (see `ResponseModel`) that differ from batch to batch. A
        block that does not make one graph raises where it runs; InputError for what would make a
        graph for every length of rows, and where there is no block to compile.
        """
        blocks = list(find_blocks(model) or [])[:-1]
        for module in (module for block in blocks for module in block.modules()):
            if module in self._mapped:
                kind = type(module).__name__
                raise InputError(f"{kind} would be compiled again for every length of rows.")
        # Its overloads do not know the limit.
        compile_function: Any = torch.compile
        compiled = compile_function(
            _run_block, dynamic=True, fullgraph=True, recompile_limit=MOST_GRAPHS
        )
        stacked = {id(parameter) for parameter in self.parameters}
        for block in blocks:
            trains = any(id(parameter) in stacked for parameter in block.parameters())
            if trains and "forward" not in vars(block):
                block.forward = partial(compiled, block)
                self._compiled.append(block)
        if not self._compiled:
            raise InputError("No block before the last trains.")

    def uncompile(self) -> None:
        """Puts the blocks' own computations back."""
        while self._compiled:
            del self._compiled.pop().forward

    def close(self) -> None:
        """Puts the model's own parameters and computations back."""
        self.uncompile()
        for module, own in self._owners:
            del module.forward
            module._parameters.update(own)
        self._hook.remove()

    def _count_rows(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._rows = len(kwargs["input_ids"])

    def _forward(
        self, module: nn.Module, plain: nn.Module, names: tuple[str, ...]
    ) -> Callable[..., torch.Tensor]:
        """The stacked computation of a module; `plain` is the module with its parameters apart."""
        from transformers.pytorch_utils import Conv1D

        owner: Any = module
        if type(plain) is nn.Linear and names[0] == "weight":
            return lambda hidden: _product(hidden, owner.weight.mT, owner.bias)
        if type(plain) is Conv1D and names[0] == "weight":
            return lambda hidden: _product(hidden, owner.weight, owner.bias)
        if type(plain) is nn.Embedding:
            # One row of positions is for all rows of the batch.
            return lambda ids: _look_up(
                ids if len(ids) > 1 else ids.expand(self._rows, *ids.shape[1:]),
                owner.weight,
                plain.padding_idx,
            )

        is_norm = type(plain).__name__.endswith("RMSNorm") and names == ("weight",)
        if is_norm and hasattr(plain, "variance_epsilon"):
            # Of Llama and its kin, in one kernel; `Probes` tell where it is another norm.
            return lambda hidden: _norm(hidden, owner.weight, owner.variance_epsilon)

        self._mapped.add(module)

        def each(hidden: torch.Tensor) -> torch.Tensor:
            own = {name: getattr(module, name) for name in names}
            parts = _parts(hidden, len(own[names[0]]))

            def one(parameters: Mapping[str, torch.Tensor], part: torch.Tensor) -> torch.Tensor:
                return functional_call(plain, dict(parameters), (part,))

            return torch.vmap(one)(own, parts).flatten(0, 1)

        return each


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> None:
    """Scales each model's gradient (K, ...) down to the largest norm, its own for every model."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    factor = (largest / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))


def _run_block(block: Any, *args: Any, **kwargs: Any) -> Any:
    """What is compiled: a block is an argument, so that its weights are inputs of the graph."""
    return type(block).forward(block, *args, **kwargs)


def _parts(tensor: torch.Tensor, models: int) -> torch.Tensor:
    return tensor.reshape(models, -1, *tensor.shape[1:])


def _product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """hidden (K b, ..., d) times the weight (K, d, e) of its model, plus the bias."""
    models, _, width = weight.shape
    flat = hidden.reshape(models, -1, hidden.shape[-1])
    if bias is None:
        product = torch.bmm(flat, weight)
    else:
        # A bias that stays frozen is one for all.
        product = torch.baddbmm(bias.expand(models, width)[:, None], flat, weight)
    return product.view(*hidden.shape[:-1], width)


def _norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """hidden (K b, ..., d) over the root of its mean square, times the weight (K, d) of its model.

    Under autocast hidden in full precision comes out in half: linear layers read it (one cast
    serves q, k and v). What is in half precision already, a query or a key, goes on to products
    number by number, in full.
    """
    normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=epsilon).to(hidden.dtype)
    parts = _parts(normed, len(weight))
    scaled = (parts * weight.view(len(weight), *[1] * (parts.ndim - 2), -1)).flatten(0, 1)
    device = hidden.device.type
    if hidden.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return scaled.to(torch.get_autocast_dtype(device))
    return scaled


def _look_up(ids: torch.Tensor, weight: torch.Tensor, padding: int | None) -> torch.Tensor:
    """Rows (K b, L, d) of the table (K, V, d) of each model."""
    models, size, _ = weight.shape
    first = torch.arange(models, device=ids.device).view(-1, *[1] * ids.dim()) * size
    hidden = F.embedding((_parts(ids, models) + first).flatten(0, 1), weight.flatten(0, 1))
    if padding is None:
        return hidden
    # As nn.Embedding does: this token's row learns nothing where the table is read.
    return torch.where((ids == padding)[..., None], hidden.detach(), hidden)
