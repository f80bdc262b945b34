"""Shared by tests of decoding: tiny models, and greedy decoding from scratch for every token."""

import functools
from collections import Counter

import torch
from helpers.sampling import penalised
from helpers.tiny import make_tiny, walk, widen
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import layerskip_decoder

L = 6
PROMPT = (5, 17, 33, 8)


def make_model(family="llama3_2"):
    """A tiny model whose first layer outweighs the others: now and then its exits say what all of it says."""
    model = make_tiny(family)
    for number, layer in enumerate(model.layers):
        factor = 20 if number == 0 else 3
        for name, parameter in layer.named_parameters():
            if name in ("sa_scale.scale", "mlp_scale.scale"):
                torch.nn.init.constant_(parameter, factor)
            elif family != "gemma2" and name in ("attn.output_proj.weight", "mlp.w2.weight"):
                parameter.data *= factor
    return layerskip_decoder(model).eval()


model_of = functools.cache(make_model)


@functools.cache
@torch.no_grad()
def plain(model, prompt, count, penalty=1.0, exit_layer=None, vocabulary=None):
    """`count` tokens by argmax of g(x_E) from scratch for each, those of prompt and output penalised."""
    tokens = list(prompt)
    for _ in range(count):
        logits = walk(model, torch.tensor([tokens]), range(exit_layer or model.num_layers))[0, -1].tolist()
        logits = penalised(logits, tokens, penalty)
        tokens.append(max(vocabulary or range(len(logits)), key=logits.__getitem__))
    return tokens[len(prompt) :]


def greedy(family, prompt, count, exit_layer=None):
    """The same of a tiny model."""
    return plain(model_of(family), tuple(prompt), count, 1.0, exit_layer)


def until(tokens, stop_tokens):
    """The tokens up to the first stop token, with it."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stop_tokens), tokens)


def count_calls(model):
    """A Counter of (layer number or "head", positions) for every call from now on."""
    calls = Counter()
    for name, module in [*enumerate(model.layers), ("head", model.norm)]:
        base = type(module)

        def forward(self, x, *args, name=name, base=base, **kwargs):
            calls.update([(name, x.shape[1])])
            return base.forward(self, x, *args, **kwargs)

        # Another class, because hooks would keep the engine from reusing a cache.
        module.__class__ = type("Counted", (base,), {"forward": forward})
    return calls


SMALL = 5


@functools.cache
def small_model():
    """Three layers, five tokens: every continuation of three tokens can be counted."""
    sizes = {"num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "intermediate_dim": 32}
    torch.manual_seed(4)
    return layerskip_decoder(widen(llama3_2(vocab_size=SMALL, max_seq_len=32, **sizes), 0.4)).eval()
