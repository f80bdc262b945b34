"""Shared by tests: PROMPTS, plain."""

import functools

import torch
from helpers.decoding import PROMPT
from helpers.sampling import penalised
from helpers.walks import walk

PROMPTS = [(5,), (9, 60, 2, 41, 41, 7, 3, 88, 1), PROMPT, (30, 31), (8, 8, 8, 8, 8)]


@functools.cache
@torch.no_grad()
def plain(model, prompt, count, penalty=1.0, exit_layer=None):
    """`count` tokens by argmax from scratch for each, those of prompt and output penalised."""
    tokens = list(prompt)
    for _ in range(count):
        logits = walk(model, torch.tensor([tokens]), range(exit_layer or model.num_layers))[0, -1].tolist()
        logits = penalised(logits, tokens, penalty)
        tokens.append(max(range(len(logits)), key=logits.__getitem__))
    return tokens[len(prompt) :]
