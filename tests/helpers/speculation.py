"""Shared by tests of self-speculation: prompts, ways to draft, and plain decoding and searches to compare with."""

import copy
import functools
import itertools

import torch
from helpers.decoding import PROMPT, plain  # noqa: F401
from helpers.tiny import VOCAB

from layerskip_recipes.generation.drafting.drafter import PLAIN
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.model.draft import Draft

PROMPTS = [(5,), (9, 60, 2, 41, 41, 7, 3, 88, 1), PROMPT, (30, 31), (8, 8, 8, 8, 8)]


@functools.cache
def perturbed(model, noise=0.05, layers=None):
    """A decoder whose layers are copies of the model's that say something else now and then."""
    decoder = model.with_modules(layers=copy.deepcopy(model.layers[:layers]))
    torch.manual_seed(60)
    for parameter in decoder.layers.parameters():
        parameter.data += noise * parameter.data.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0
    return decoder


KINDS = {"copy": ("copy", 2), "adapter": ("adapter", 2)}  # of trained drafts


def noisy(draft, noise=0.2):
    """The draft with other weights: it says something else than the model's early layers."""
    torch.manual_seed(60)
    for parameter in draft.parameters():
        parameter.data += noise * parameter.data.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0.1
    return draft.requires_grad_(False).eval()


@functools.cache
def draft_of(model, kind):
    return noisy(Draft(model, *KINDS[kind]), 0.05)


# Settings of a `Speculation`; "decoder" makes what drafts, and "penalty" replaces a test's repetition penalty.
VARIANTS = {
    "chain": {"exit_layer": 2, "num_speculations": 4},
    "one token": {"exit_layer": 1, "num_speculations": 1},
    "confident": {"exit_layer": 2, "num_speculations": 6, "min_confidence": 0.02},
    "vocabulary": {"exit_layer": 2, "num_speculations": 4, "draft_vocabulary": [*range(0, VOCAB, 3), 70, 8, 21]},
    "look-up": {"exit_layer": 2, "num_speculations": 4, "prompt_lookup": 1},
    "perturbed": {"exit_layer": 2, "num_speculations": 4, "decoder": perturbed},
    "all": {
        "exit_layer": 1,
        "num_speculations": 5,
        "draft_vocabulary": torch.arange(0, VOCAB, 2),
        "prompt_lookup": 1,
        "decoder": perturbed,
    },
}


TRAINED = {
    f"{kind}, {name}": {"exit_layer": 2, "decoder": lambda model, kind=kind: draft_of(model, kind).decoder(model)} | way
    for kind in KINDS
    for name, way in {
        "one token": {"num_speculations": 1},
        "chain": {"num_speculations": 4},
        "vocabulary": {"num_speculations": 3, "draft_vocabulary": [*range(0, VOCAB, 3), 70, 8, 21]},
        "look-up": {"num_speculations": 3, "prompt_lookup": 1},
    }.items()
}


def drafting(variant, model):
    """The arguments of a Generation for a new Speculation of that name; None: for plain decoding."""
    if variant is None:
        return {}
    settings = dict((VARIANTS | TRAINED)[variant])
    make = settings.pop("decoder", None)
    settings.pop("penalty", None)
    return {"draft_weights": make and (make(model), None), "speculation": Speculation(**settings)}


def run(model, prompts, count, **arguments):
    """A generation at its end."""
    generation = Generation(model, prompts, count, **arguments)
    for _ in generation:
        pass
    return generation


class AlwaysLookUp(DraftRule):
    """Looks up wherever the text offers a draft, fast or not."""

    def pick(self, offered):
        return offered[-1] if offered else PLAIN


class PlainBetween(DraftRule):
    """Rounds without a draft between others, in a fixed order: one or two, then eleven."""

    def __init__(self, ways=(0, 1, 0, 1, 0, 0, 1, *[1] * 10)):
        super().__init__()
        self.ways = itertools.cycle(ways)

    def pick(self, offered):
        return offered[-1] if offered and not next(self.ways) else PLAIN


def search(tokens, ngram, count):
    """What followed the last earlier place with the same last `ngram` tokens, from the text's end on once more."""
    for start in range(len(tokens) - ngram - 1, -1, -1):
        if tokens[start : start + ngram] == tokens[len(tokens) - ngram :]:
            found = tokens[start + ngram :]
            return [found[i % len(found)] for i in range(count)]
    return []
