"""Marks: what two texts have the same, as codes whose products say so.

A mark is a hash of some of a text's tokens, and its code is drawn by that hash: the same tokens
have the same code, others have codes that are as good as orthogonal (hashed features, Weinberger
et al., arXiv 0902.2206). A text encoder's mean over tokens hardly tells whether two texts have the
very same answer, or open with the same instruction.
"""

import torch

OPENINGS = (2, 8)  # tokens of the prompt
CODE = 96  # numbers of a code, each 1 or -1
WIDTH = (2 + len(OPENINGS)) * CODE  # the response's first token, the response, the openings
BITS = 32  # taken of one hash

# Of splitmix64 (Steele, Lea and Flood, 2014), as signed numbers, which wrap around.
GOLDEN, FIRST, SECOND = (
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def marks(input_ids: torch.Tensor, response_mask: torch.Tensor, start: int) -> torch.Tensor:
    """Codes (B, WIDTH) float32 of token ids (B, L), whose prompts begin at token `start` and whose
    responses are where the mask (B, L) says; padding behind the response does not matter."""
    response = response_mask.bool()
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    in_response = response.cumsum(dim=1) - 1
    prompt = (in_response < 0) & response.any(dim=1, keepdim=True) & (place >= start)
    parts = [(response & (in_response < 1), in_response), (response, in_response)]
    parts += [(prompt & (place < start + size), place - start) for size in OPENINGS]
    hashes = torch.stack([_hash(input_ids, *part) for part in parts], dim=1)
    return _codes(hashes).flatten(1)


def _hash(ids: torch.Tensor, inside: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """A number (B,) for the ids that are inside (B, L), each at its place."""
    return _mix((_mix(_mix(place) + ids) * inside).sum(dim=1))


def _codes(hashes: torch.Tensor) -> torch.Tensor:
    """Codes (B, parts, CODE) of hashes (B, parts); each part has codes of its own."""
    part = torch.arange(hashes.shape[1], device=hashes.device)[:, None]
    draw = torch.arange(CODE // BITS, device=hashes.device)
    drawn = _mix(hashes[:, :, None] + (part * len(draw) + draw) * GOLDEN)
    bits = drawn[..., None] >> torch.arange(BITS, device=hashes.device) & 1
    return (2 * bits - 1).flatten(2).float()


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers int64 that look random, each of its own."""
    mixed = numbers.long() + GOLDEN
    for shift, factor in ((30, FIRST), (27, SECOND)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return mixed ^ _shifted(mixed, 31)


def _shifted(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted to the right as if they had no sign."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)
