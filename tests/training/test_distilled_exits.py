"""`early_exit_loss.target`: early exits learn the last layer, the last layer the labels."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import VOCAB, make_tiny, unembedded

from layerskip_recipes import EarlyExitLoss, exit_weights, layerskip_decoder


@pytest.mark.parametrize("target", ["last_layer", "overlap", "overlap+last_layer", "overlap+labels"])
@pytest.mark.parametrize("family", ["llama3_2", "llama2", "gemma2"])
def test_loss_and_gradients_are_those_of_plain_pytorch(family, target, float64):
    """In chunks that do not divide the tokens, with labels that do not count; the teacher has no gradient."""
    model = layerskip_decoder(make_tiny(family))
    tokens, labels = torch.randint(VOCAB, (2, 9)), torch.randint(VOCAB, (2, 9))
    labels[0, :3] = -100
    loss_fn = EarlyExitLoss(scale=0.5, curriculum=None, layers="1::2", target=target, chunk_tokens=5)
    total, per_exit = loss_fn(model, tokens, labels, step=0, total_steps=1)
    total.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    counts = labels.flatten() != -100
    h, logits = model.tok_embeddings(tokens), {}
    for number, layer in enumerate(model.layers, start=1):
        h = layer(h)
        logits[number] = unembedded(model, h).flatten(0, 1)[counts]
    p = logits[6].log_softmax(-1).detach()
    learned = labels.flatten()[counts]
    losses = {}
    for e in (2, 4):
        parts = {
            "last_layer": F.kl_div(logits[e].log_softmax(-1), p, reduction="batchmean", log_target=True),
            "labels": F.cross_entropy(logits[e], learned),
            "overlap": 1 - torch.minimum(p.exp(), logits[e].softmax(-1)).sum(-1).mean(),
        }
        losses[e] = sum(parts[name] for name in target.split("+"))
    losses[6] = F.cross_entropy(logits[6], learned)
    weights = exit_weights(6, [False, True] * 3, 0.5)
    expected = sum(weights[e - 1].double() * losses[e] for e in losses)
    expected.backward()
    exact = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(total, expected, **exact)
    for e, loss in losses.items():
        torch.testing.assert_close(per_exit[e], loss.detach(), **exact)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **exact, msg=name)
