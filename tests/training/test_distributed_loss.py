"""The early-exit loss on two ranks: gradients by plain PyTorch, where ranks drop other samples; what is gathered."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.ranks import on_ranks
from helpers.tiny import FAMILIES, SIZE, CountedCollectives, make_tiny, unembedded
from helpers.training import paper_weights
from torch.distributed.tensor import DTensor
from torchtune.models.llama3._component_builders import lora_llama3

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.distributed.loading import load_from_rank0
from layerskip_recipes.model.adapters import freeze_base
from layerskip_recipes.model.layer_dropout import LayerDropout
from layerskip_recipes.training import parallel
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.model_setup import checkpoint_contents

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
PROB, DRAWS = 0.6, 4
# name: whether the model has adapters, how it is sharded.
DROPPED = {
    "checkpointed": (False, {"ac_mode": "full"}),
    "gathered weights kept": (False, {"fsdp_reshard_after_forward": False}),
    "head apart": (False, {"custom_sharded_layers": ["tok_embeddings", "output"]}),
    "LoRA": (True, {}),
}
# name: (model, how it is sharded, what a forward gathers: 6 layers, the rest together, and the modules apart from it).
# A tied head that is apart is gathered twice: the embedding lets go of its weights until then.
COUNTED = {
    "untied": ("llama3", {}, 7),
    "untied, apart": ("llama3", {"custom_sharded_layers": ["tok_embeddings", "output"]}, 9),
    "tied": ("llama3_2", {}, 7),
    "tied, apart": ("llama3_2", {"custom_sharded_layers": ["tok_embeddings"]}, 9),
    "untied, kept": ("llama3", {"fsdp_reshard_after_forward": False}, 7),
}


def some_tokens():
    """[3, 11] for each of two ranks."""
    return torch.randint(0, 97, (2, 3, 11), generator=torch.Generator().manual_seed(3))


def shifted(tokens):
    return F.pad(tokens[:, 1:], (0, 1), value=-100)


def lora_model():
    return lora_llama3(["q_proj", "v_proj"], apply_lora_to_mlp=True, lora_rank=4, lora_alpha=8, **SIZE)


def tiny_model(family, lora=False):
    """A small model with wide weights; with adapters only those are trained."""
    if not lora:
        return make_tiny(family)
    model = lora_model()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    freeze_base(model)
    return model


def sharded(family, keys, lora=False, dtype=torch.float32):
    """A tiny decoder over the ranks, whose weights rank 0 alone has."""
    weights = tiny_model(family, lora).state_dict() if dist.get_rank() == 0 else {}
    with torch.device("meta"):
        model = layerskip_decoder(lora_model() if lora else FAMILIES[family]()).to(dtype)
    freeze_base(model)
    cfg = FinetuneConfig.model_construct(device="cpu", dtype="fp32", **keys)
    mesh = parallel.Mesh(parallel.init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("replicate", "shard", "t")), 1, 2)
    parallel.shard_model(model, cfg, mesh, cfg.checkpoint_every_layers)
    load_from_rank0(model, weights, CPU, dtype, offload=False)
    return model.train()


def exit_sums(model, tokens, keep):
    """Of one sample: the summed cross-entropy of each exit, x_{l+1} = x_l + r M_l f_l(x_l) with keep[l] = r M_l."""
    h, sums = model.tok_embeddings(tokens[None]), []
    for layer, stays in zip(model.layers, keep, strict=True):
        h = h + float(stays) * (layer(h) - h)
        sums.append(F.cross_entropy(unembedded(model, h)[0][:-1], tokens[1:], reduction="sum"))
    return torch.stack(sums)


@pytest.fixture
def plain_pytorch(name):
    """The mean loss of both ranks' tokens and its gradients, for each draw of the dropped layers."""
    lora, _ = DROPPED[name]
    # e~ of eq. 6 for all exits, rounded to fp32 as in the loss.
    weights, draws, seen = torch.tensor(paper_weights([True] * 6, scale=0.5)).double(), [], set()
    for seed in range(DRAWS):
        model = tiny_model("llama3", lora).double()
        keep = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed)) >= PROB
        factor = 1 / (1 - PROB) if seed % 2 == 1 else 1.0  # every second draw is inverted
        loss = 0
        for tokens in some_tokens():
            sums = sum(exit_sums(model, tokens[row], factor * keep[:, row]) for row in range(3))
            loss = loss + (weights * sums).sum() / (3 * (tokens.shape[1] - 1)) / 2
        loss.backward()
        seen |= set(keep.sum(1).tolist())
        draws.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert seen >= {0, 1, 2}  # samples that stay in a layer
    return draws


@pytest.mark.parametrize("name", DROPPED)
@on_ranks()
def test_loss_and_gradients_with_layers_that_some_samples_skip_or_all(name, plain_pytorch):
    """In float64; a gradient is there where a layer ran on any rank."""
    lora, keys = DROPPED[name]
    model, tokens = sharded("llama3", keys, lora, torch.float64), some_tokens()[dist.get_rank()]
    loss = EarlyExitLoss(scale=0.5, curriculum=None, chunk_tokens=5)
    for seed, (expected, gradients) in enumerate(plain_pytorch):
        settings = {"prob": PROB, "layers_scale": "uniform", "inverted": seed % 2 == 1}
        model.layer_dropout = LayerDropout(model.num_layers, seed=seed, **settings)
        model.zero_grad()
        total, _ = loss(model, tokens, shifted(tokens), step=0, total_steps=1)
        total.backward()
        mean = total.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, expected, atol=1e-5, rtol=1e-5)
        for wrapped_name, p in model.named_parameters():
            gradient = gradients[wrapped_name.replace("_checkpoint_wrapped_module.", "")]
            whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            if whole is None or gradient is None:
                assert whole is None or not whole.any()
                assert gradient is None or not gradient.any()
            else:
                torch.testing.assert_close(whole, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", COUNTED)
@on_ranks()
def test_the_head_is_gathered_once_for_all_exits_and_chunks(name):
    family, keys, gathered = COUNTED[name]
    model, tokens, backwards = sharded(family, keys), some_tokens()[0], set()
    for curriculum, chunk, num_exits in (("rotational", 512, 2), (None, 512, 6), (None, 3, 6)):
        loss = EarlyExitLoss(scale=0.5, curriculum=curriculum, interval=9, chunk_tokens=chunk)
        with CountedCollectives() as forward:
            total, exits = loss(model, tokens, shifted(tokens), step=4, total_steps=9)
        with CountedCollectives() as backward:
            total.backward()
        assert len(exits) == num_exits and forward.counts["all_gather"] == gathered
        backwards.add(backward.counts["all_gather"])
    assert len(backwards) == 1 and (backwards == {0}) == (name == "untied, kept")


@on_ranks()
def test_a_checkpoint_of_adapters_alone_gathers_nothing_else():
    """A and B of q, v and three matrices of the MLP in each of 6 layers, as rank 0 alone had them."""
    with torch.device("meta"):
        meta = lora_model()
    model = sharded("llama3", {"ac_mode": "full", "fsdp_reshard_after_forward": False}, lora=True)
    model(some_tokens()[0])
    assert not any(isinstance(p, DTensor) for p in model.parameters())  # gathered, and no backward lets go of them
    parallel.reshard(model)
    with CountedCollectives() as saved:
        written = checkpoint_contents(model, meta, CPU, adapters_only=True)
    start = tiny_model("llama3", lora=True).state_dict()
    expected = {name: value for name, value in start.items() if "lora" in name}
    assert saved.counts["all_gather"] == len(expected) == 2 * 5 * 6
    if dist.get_rank() > 0:
        assert written == {}
        return
    assert set(written) == {"adapter", "adapter_config", "scaled biases"} and set(written["adapter"]) == set(expected)
    assert all(torch.equal(written["adapter"][name], value) for name, value in expected.items())
