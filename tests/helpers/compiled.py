"""Shared by tests of compiled steps: a small model, prompts of different lengths, and ways to decode."""

import functools
import shutil

import pytest
import torch
from helpers import speculation
from helpers.speculation import PROMPTS
from helpers.tiny import widen
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.state import state_of

has_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")


def compiles(test):
    """Marks a test that compiles steps: it needs a C++ compiler, and takes seconds for each graph."""
    return pytest.mark.slow(has_compiler(test))


CPU = torch.device("cpu")
SIZES = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "intermediate_dim": 32}
VOCAB = 31
# Two rows each, so that graphs serve all. The first length that END's steps see is the largest of its cache; 30 tokens
# more reach the last position of a model of MAX_LEN.
MAX_LEN = 230
END = [tuple(range(start, start + 25)) * 8 for start in (2, 5)]
SHORT = [tuple(token % VOCAB for token in prompt) for prompt in PROMPTS[:2]]
LONG = [tuple((3 * token + i) % VOCAB for i, token in enumerate(prompt * 4)) for prompt in PROMPTS[1:3]]


def make_small(max_seq_len=512, width=16):
    """A model whose heads have 8 numbers: on a CPU too its steps become graphs. With width=32 they run in C++."""
    torch.manual_seed(80)
    model = llama3_2(vocab_size=VOCAB, max_seq_len=max_seq_len, **SIZES | {"embed_dim": width})
    return layerskip_decoder(widen(model, 0.5)).eval()


run = functools.partial(speculation.run, compile=True)


WAYS = {"plain": None, "chain": Speculation(1, 2)}
OTHER_WAYS = WAYS | {
    "looked up": Speculation(1, 3, prompt_lookup=2),
    "of some tokens": Speculation(1, 2, draft_vocabulary=range(0, VOCAB, 2)),
}
LONGER = [tuple((3 * i + i // 7) % VOCAB for i in range(240))]  # outgrows the first length of graphs with masks


def compiled_steps(model):
    """The compiled steps that generations of a model share, if they are given no state of their own."""
    state = state_of(model)
    return state.compiled_steps(state.decoder(model))
