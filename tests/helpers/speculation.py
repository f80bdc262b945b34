"""Shared by tests of self-speculation: prompts, ways to draft, and plain decoding and searches to compare with."""

import copy
import functools
import itertools

import numpy as np
import torch
from helpers.decoding import PROMPT, plain
from helpers.tiny import VOCAB

from layerskip_recipes.checkpoint.answers import Answers
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


@functools.cache
def known_answers(model):
    """Answers of the model itself, in which every seventh token is another one."""
    tokens = [
        token for prompt in PROMPTS for token in (*prompt, *plain(model, prompt, 24), *plain(model, prompt, 24, 1.4))
    ]
    changed = [(token + 1) % VOCAB if i % 7 == 0 else token for i, token in enumerate(tokens)]
    return Answers("answers.npz", np.array(changed, dtype=np.int32), "")


# Settings of a `Speculation`; "decoder" and "answers" are made for the model.
VARIANTS = {
    "chain": {"exit_layer": 2, "num_speculations": 4},
    "one token": {"exit_layer": 1, "num_speculations": 1},
    "confident": {"exit_layer": 2, "num_speculations": 6, "min_confidence": 0.02},
    "vocabulary": {"exit_layer": 2, "num_speculations": 4, "draft_vocabulary": [*range(0, VOCAB, 3), 70, 8, 21]},
    "look-up": {"exit_layer": 2, "num_speculations": 4, "prompt_lookup": 1},
    "answers": {"exit_layer": 2, "num_speculations": 4, "answers": known_answers},
    "perturbed": {"exit_layer": 2, "num_speculations": 4, "decoder": perturbed},
    "all": {
        "exit_layer": 1,
        "num_speculations": 5,
        "draft_vocabulary": torch.arange(0, VOCAB, 2),
        "prompt_lookup": 1,
        "answers": known_answers,
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
    if "answers" in settings:
        settings["answers"] = settings["answers"](model)
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


def longest_matches(tokens, text, least):
    """(the tokens after each place of `tokens` with the longest match of the text's end, the last place first, and the
    length of the match); by comparing every place."""
    tokens, text = list(tokens), list(text)
    for length in range(min(64, len(text)), least - 1, -1):
        ends = range(len(tokens) - 1, length - 1, -1)
        following = [tokens[end] for end in ends if tokens[end - length : end] == text[-length:]]
        if following:
            return following, length
    return [], 0


def search(text, least, count, answers=(), ends=0.1):
    """At most `count` tokens that a look-up drafts, see `Lookup`."""
    text, drafted, sure = list(text), [], 1.0
    while len(drafted) < count:
        guesses = []
        for following, length in (longest_matches(text, text, least or 99), longest_matches(answers, text, 1)):
            if following:
                token = max(dict.fromkeys(following), key=following.count)  # of equally frequent ones, the first
                guesses.append((following.count(token) / (len(following) + 0.2) * length / (length + 1), token))
        probability, token = max(guesses, key=lambda guess: guess[0], default=(0.0, None))
        sure *= probability
        if not guesses or sure < ends:
            break
        text.append(token)
        drafted.append(token)
    return drafted
