"""What each rank of a training test runs: `training_ranks.py WHAT FOLDER ARGUMENTS`, see RANKS at the end.

Shared by tests: COUNTED, DRAWS, DROPPED, PROB, some_tokens, tiny_model.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.tiny import FAMILIES, SIZE, CountedCollectives, make_tiny
from torch.distributed.tensor import DTensor
from torchtune.models.llama3._component_builders import lora_llama3

from layerskip_recipes import layerskip_decoder, processes
from layerskip_recipes.cli.recipes import finetune
from layerskip_recipes.distributed.loading import load_from_rank0
from layerskip_recipes.model.adapters import freeze_base
from layerskip_recipes.model.layer_dropout import LayerDropout
from layerskip_recipes.training import parallel
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.model_setup import checkpoint_contents

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


def shifted(tokens):
    return F.pad(tokens[:, 1:], (0, 1), value=-100)


def some_tokens():
    """[3, 11] for each of two ranks."""
    return torch.randint(0, 97, (2, 3, 11), generator=torch.Generator().manual_seed(3))


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


def gather(tensor):
    """A parameter's or gradient's value over all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    """By the names of the plain decoder; None where there is none."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): None if p.grad is None else gather(p.grad).clone()
        for name, p in model.named_parameters()
    }


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


# ---- the jobs ----


def train_rank(folder, *arguments):
    """`tune run layerskip_finetune ARGUMENTS`."""
    sys.argv = ["layerskip_finetune", *arguments]
    finetune()


def dropped_rank(folder):
    """Losses and gradients of every case of DROPPED and draw, to dropped.pt. In float64, to compare with a formula."""
    processes.init_processes("cpu")
    results = {}
    for name, (lora, keys) in DROPPED.items():
        model = sharded("llama3", keys, lora, torch.float64)
        tokens = some_tokens()[dist.get_rank()]
        loss = EarlyExitLoss(scale=0.5, curriculum=None, chunk_tokens=5)
        for seed in range(DRAWS):
            settings = {"prob": PROB, "layers_scale": "uniform", "inverted": seed % 2 == 1}
            model.layer_dropout = LayerDropout(model.num_layers, seed=seed, **settings)
            model.zero_grad()
            total, _ = loss(model, tokens, shifted(tokens), step=0, total_steps=1)
            total.backward()
            mean = total.detach().clone()
            dist.all_reduce(mean)
            results[name, seed] = (mean / 2, gradients(model))
    if dist.get_rank() == 0:
        torch.save(results, folder / "dropped.pt")


def counts_rank(folder):
    """all_gathers of a forward, and of its backward, by the exits and chunks of the loss, to counts.json; and those of
    a checkpoint of adapters alone, with what rank 0 writes, to adapters.pt."""
    processes.init_processes("cpu")
    tokens, counts = some_tokens()[0], {}
    for name, (family, keys, _) in COUNTED.items():
        model = sharded(family, keys)
        for curriculum, chunk in (("rotational", 512), (None, 512), (None, 3)):
            loss = EarlyExitLoss(scale=0.5, curriculum=curriculum, interval=9, chunk_tokens=chunk)
            with CountedCollectives() as forward:
                total, exits = loss(model, tokens, shifted(tokens), step=4, total_steps=9)
            with CountedCollectives() as backward:
                total.backward()
            counted = [forward.counts["all_gather"], backward.counts["all_gather"]]
            counts[f"{name}: {len(exits)} exits, chunks of {chunk}"] = counted
    with torch.device("meta"):
        meta = lora_model()
    model = sharded("llama3", {"ac_mode": "full", "fsdp_reshard_after_forward": False}, lora=True)
    model(tokens)
    assert not any(isinstance(p, DTensor) for p in model.parameters())  # gathered, and no backward lets go of them
    parallel.reshard(model)
    with CountedCollectives() as saved:
        written = checkpoint_contents(model, meta, CPU, adapters_only=True)
    if dist.get_rank() == 0:
        (folder / "counts.json").write_text(json.dumps(counts))
        torch.save((saved.counts["all_gather"], written), folder / "adapters.pt")
    else:
        assert written == {}


RANKS = {f.__name__.removesuffix("_rank"): f for f in (train_rank, dropped_rank, counts_rank)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *arguments = sys.argv[1:]
    RANKS[what](Path(folder), *arguments)
    processes.end_processes()
