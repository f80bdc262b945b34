"""Scores of a decoder by plain PyTorch, one text at a time, and a tokenizer of single letters."""

import torch
from helpers.tiny import walk


class Letters:
    """A token for each character below 97; 0 is bos and eos."""

    bos_id = eos_id = 0
    stop_tokens = (0,)

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        return [0] * add_bos + [ord(letter) % 97 for letter in text] + [0] * add_eos

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def plain_logits(model, tokens: list[int], exit_layer: int | None = None) -> torch.Tensor:
    """[s, v] of one text, by the layers one after the other."""
    with torch.no_grad():
        return walk(model, torch.tensor([tokens]), range(exit_layer or len(model.layers)))[0]


def plain_score(model, context: list[int], answer: list[int], exit_layer: int | None = None) -> tuple[float, bool]:
    """log p(answer | context), and whether each of its tokens is the likeliest, token by token."""
    total, greedy = 0.0, True
    for i, token in enumerate(answer):
        logits = plain_logits(model, context + answer[:i], exit_layer)[-1]
        total += logits.log_softmax(-1)[token].item()
        greedy &= int(logits.argmax()) == token
    return total, greedy
