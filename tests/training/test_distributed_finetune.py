"""Training on several processes (gloo) has the losses and gradients of one, whatever the split; resume, errors, hangs.

The main case goes through `tune run`. The others would spend their time on its start, so this file is also a launcher:
`python test_distributed_finetune.py FOLDER` imports everything once, reads jobs, one a line, and forks the ranks of
each with the environment that torchrun gives them. Everything is run when a test first asks for it, once.
"""

import faulthandler
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.commands import run_tune
from helpers.configs import HF_CONFIG, MODEL, SIZE, finetune_config, make_checkpoint
from helpers.tiny import FAMILIES, CountedCollectives, make_tiny, unembedded
from helpers.tiny import SIZE as TINY
from helpers.training import UNTIED, losses, train
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torchtune import config
from torchtune.models.llama3._component_builders import lora_llama3
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import layerskip_decoder, processes
from layerskip_recipes.cli.recipes import finetune as run_finetune
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.settings import build_on_meta
from layerskip_recipes.model.adapters import freeze_base
from layerskip_recipes.model.layer_dropout import LayerDropout
from layerskip_recipes.training import parallel as mesh
from layerskip_recipes.training import recipe as finetune
from layerskip_recipes.training.checkpoints import complete_checkpoints
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.optimizers import checkpoint_contents, layers_to_checkpoint

CPU = torch.device("cpu")
COSINE = {
    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 2,
}
# 20 steps of 4 samples: as one process, as two with 2 samples each, or as four with 1; where nothing is resumed fewer.
STEPS = {"layer_dropout": None, "epochs": 2, "max_steps_per_epoch": 10, "clip_grad_norm": 1.0, "lr_scheduler": COSINE}
FEW = ["max_steps_per_epoch=4"]
SAVES = ["save_every_n_steps=4", "enable_async_checkpointing=true"]  # shards there, and the whole after each epoch
PLAN = {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}
UNSPLIT = {"tensor_parallel_plan": PLAN, "tensor_parallel_dim": 1}  # a plan for the cases that set another number
LORA = {
    "_component_": "torchtune.models.llama3_2._component_builders.lora_llama3_2",
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
    **SIZE,
}
# So large that each rank's half of a matrix is whole blocks of NF4.
QLORA = LORA | {"quantize_base": True, "num_layers": 2, "embed_dim": 256, "intermediate_dim": 256}
GEMMA2 = {
    "_component_": "torchtune.models.gemma2._component_builders.gemma2",
    **{k: v for k, v in MODEL.items() if k not in ("_component_", "scale_factor")},
    "head_dim": 16,
    "final_capping_value": 1.0,  # so low that it caps
}
# name: (config, processes, overrides)
CASES = {
    "tune run": ("tied", 2, []),
    "embedding apart, fused": ("tied", 2, ["custom_sharded_layers=[tok_embeddings]", "optimizer.fused=true", *FEW]),
    "gathered weights kept, accumulation": (
        "tied", 2, ["fsdp_reshard_after_forward=false", "batch_size=1", "gradient_accumulation_steps=2", *FEW],
    ),
    "every second layer checkpointed, part of one apart": (
        "tied", 2, ["ac_mode=selective", "ac_option=2", "custom_sharded_layers=[layers.1.mlp]", *FEW],
    ),
    "full checkpointing": ("tied", 2, ["ac_mode=full", *FEW]),
    "optimizer in backward": ("in_backward", 2, []),
    "untied, both apart": ("untied", 2, ["custom_sharded_layers=[tok_embeddings,output]"]),
    "capped head": ("gemma2", 2, FEW),
    "LoRA": ("lora", 2, []),
    "DoRA": ("dora", 2, FEW),
    "QLoRA": ("qlora", 2, FEW),
    "TP, fused, checkpointed": (
        "untied", 2, ["tensor_parallel_dim=2", "batch_size=4", "optimizer.fused=true", "ac_mode=full", *FEW],
    ),
    "TP, tied, dropout": ("dropped", 2, ["tensor_parallel_dim=2", "batch_size=4", *FEW]),
    "HSDP": ("tied", 4, ["data_parallel_replicate_dim=2", "batch_size=1", *FEW]),
    "FSDP x TP": ("untied", 4, ["tensor_parallel_dim=2", *FEW]),
    "compiled": ("tied", 2, ["compile=true", *FEW]),
    "validated": ("validated", 2, FEW),
    "validated, gathered weights kept": ("validated", 2, ["fsdp_reshard_after_forward=false", *FEW]),
    "validated, TP": ("validated", 2, ["tensor_parallel_dim=2", "batch_size=4", *FEW]),
}  # fmt: skip
# name: (the case whose checkpoint is taken up, None for that of one process; the config; which checkpoint; processes,
# overrides)
RESUMED = {
    "1 to 2, whole": (None, "tied", "epoch_0", 2),
    "1 to 2, shards": (None, "tied", "step_8", 2),
    "1 to 2, optimizer in backward": (None, "in_backward", "step_8", 2),
    "1 to 2, LoRA": (None, "lora", "step_8", 2),
    "2 to 1, whole": ("tune run", "tied", "epoch_0", 1),
    "2 to 1, shards": ("tune run", "tied", "step_8", 1),
    "2 to 1, optimizer in backward": ("optimizer in backward", "in_backward", "epoch_0", 1),
    "2 to 1, LoRA": ("LoRA", "lora", "step_8", 1),
    "2 to 2, shards": ("tune run", "tied", "step_8", 2),
    "2 to 2, FSDP to TP": ("untied, both apart", "untied", "step_8", 2, "tensor_parallel_dim=2", "batch_size=4"),
}
L, PROB, SEED = SIZE["num_layers"], 0.6, 7
# name: (overrides, how rank 0's last line begins, and what it says after that); rank 1 meets the last two not itself
WRONG = {
    "replicate": (["data_parallel_replicate_dim=3"], "data_parallel_replicate_dim: 3 ", "processes, 2. Allowed: a "),
    "shard": (["data_parallel_shard_dim=3"], "data_parallel_shard_dim: 3 ", "processes, 2. Allowed: a product of 2"),
    "tensor": (["tensor_parallel_dim=3"], "tensor_parallel_dim: 3 does not divide processes, 2. Allowed: 1; ", ""),
    "offload": (["fsdp_cpu_offload=true"], "fsdp_cpu_offload: True needs several processes with device=cuda", ""),
    "samples": (["batch_size=21"], "dataset: 40 samples make no step of batch_size 21 x ", "2 data-parallel ranks"),
    "other model": (
        ["model.num_layers=5"],
        "checkpointer: the checkpoint is not this model's, it lacks layers.4.attn.q_proj.weight, "
        "layers.4.attn.k_proj.weight, layers.4.attn.v_proj.weight and 6 more",
        "",
    ),
}
RANK_ZERO_ALONE = ("samples", "other model")
# Models called directly: the rows of rank 0 and of rank 1, how it is split.
ROWS = {
    "1 and 3": ((1, 3), {}),
    "1 and 1 of 3": ((1, 1), {}),
    "3 and 2, checkpointed": ((3, 2), {"ac_mode": "full"}),
    "1 and 3, checkpointed": ((1, 3), {"ac_mode": "full"}),
    "1 and 3, gathered weights kept": ((1, 3), {"fsdp_reshard_after_forward": False}),
    "1 and 3, apart": ((1, 3), {"custom_sharded_layers": ["tok_embeddings", "output"]}),
    "1 and 3, LoRA": ((1, 3), {"lora": True}),
}
DRAWS = 4
# name: (model, how it is split, what a forward gathers: 6 layers, the rest together, and what is apart from it). A tied
# head that is apart is gathered twice: the embedding lets go of its weights until then.
COUNTED = {
    "untied": ("llama3", {}, 7),
    "untied, apart": ("llama3", {"custom_sharded_layers": ["tok_embeddings", "output"]}, 9),
    "tied": ("llama3_2", {}, 7),
    "tied, apart": ("llama3_2", {"custom_sharded_layers": ["tok_embeddings"]}, 9),
    "untied, kept": ("llama3", {"fsdp_reshard_after_forward": False}, 7),
}
LIMIT = 120  # seconds for a run; most take 3


# ------------------------------------------------------------------------------------------- what runs on each rank


def whole(tensor):
    """A parameter's or gradient's value over all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    """By the names of the plain decoder; None where there is none."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): None if p.grad is None else whole(p.grad).clone()
        for name, p in model.named_parameters()
    }


def train_rank(folder, *arguments):
    """`tune run layerskip_finetune ARGUMENTS`."""
    sys.argv = ["layerskip_finetune", *arguments]
    run_finetune()


def first_gradients_rank(folder, path, *overrides):
    """The gradients that the optimizer of the recipe gets in its first step, to gradients.pt."""
    recipe = finetune.LayerSkipFinetune(load_config(path, overrides))
    recipe.setup()
    step, seen = recipe.optimizers.step, []
    recipe.optimizers.step = lambda: (seen.append(gradients(recipe.model)), step())
    recipe.train()
    recipe.cleanup()
    if dist.get_rank() == 0:
        torch.save(seen[0], Path(recipe.cfg.output_dir) / "gradients.pt")


def tiny(family, lora=False):
    """A small model with wide weights; with adapters only those are trained."""
    if not lora:
        return make_tiny(family)
    model = with_lora()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    freeze_base(model)
    return model


def with_lora():
    return lora_llama3(["q_proj", "v_proj"], apply_lora_to_mlp=True, lora_rank=4, lora_alpha=8, **TINY)


def split(family, cfg):
    """A tiny decoder over the ranks, whose weights rank 0 alone has."""
    weights = tiny(family, "lora" in cfg).state_dict() if dist.get_rank() == 0 else {}
    cfg = OmegaConf.create({"device": "cpu"} | cfg)
    with torch.device("meta"):
        model = layerskip_decoder(with_lora() if cfg.get("lora") else FAMILIES[family]())
    freeze_base(model)
    grid = mesh.make_mesh(cfg, model, CPU)
    mesh.split(model, cfg, grid, layers_to_checkpoint(cfg))
    mesh.load(model, weights, CPU, torch.float32, offload=False)
    return model.train()


def rows_rank(folder):
    """Losses and gradients of every case of ROWS and draw, to rows.pt."""
    processes.init_processes("cpu")
    results = {}
    for name, (rows, cfg) in ROWS.items():
        model = split("llama3", cfg)
        tokens = some_tokens()[dist.get_rank()][: rows[dist.get_rank()]]
        loss = EarlyExitLoss(scale=0.5, curriculum=None, chunk_tokens=5)
        for seed in range(DRAWS):
            model.layer_dropout = LayerDropout(model.num_layers, PROB, "uniform", seed=seed, batch_size=3)
            model.zero_grad()
            total, _ = loss(model, tokens, shifted(tokens), step=0, total_steps=1)
            total.backward()
            mean = total.detach().clone()
            dist.all_reduce(mean)
            results[name, seed] = (mean / 2, gradients(model))
    if dist.get_rank() == 0:
        torch.save(results, folder / "rows.pt")


def counts_rank(folder):
    """all_gathers of a forward, and of its backward, by the exits and chunks of the loss, to counts.json; and those of
    a checkpoint of adapters alone, with what rank 0 writes, to adapters.pt."""
    processes.init_processes("cpu")
    tokens, counts = some_tokens()[0], {}
    for name, (family, cfg, _) in COUNTED.items():
        model = split(family, cfg)
        for curriculum, chunk in (("rotational", 512), (None, 512), (None, 3)):
            loss = EarlyExitLoss(scale=0.5, curriculum=curriculum, interval=9, chunk_tokens=chunk)
            with CountedCollectives() as forward:
                total, exits = loss(model, tokens, shifted(tokens), step=4, total_steps=9)
            with CountedCollectives() as backward:
                total.backward()
            counted = [forward.counts["all_gather"], backward.counts["all_gather"]]
            counts[f"{name}: {len(exits)} exits, chunks of {chunk}"] = counted
    with torch.device("meta"):
        meta = with_lora()
    model = split("llama3", {"lora": True, "ac_mode": "full", "fsdp_reshard_after_forward": False})
    model(tokens)
    assert not any(isinstance(p, DTensor) for p in model.parameters())  # gathered, and no backward lets go of them
    mesh.reshard(model)
    with CountedCollectives() as saved:
        cfg = OmegaConf.create({"save_adapter_weights_only": True})
        written = checkpoint_contents(cfg, model, meta, CPU)
    if dist.get_rank() == 0:
        (folder / "counts.json").write_text(json.dumps(counts))
        torch.save((saved.counts["all_gather"], written), folder / "adapters.pt")
    else:
        assert written == {}


RANKS = {f.__name__.removesuffix("_rank"): f for f in (train_rank, first_gradients_rank, rows_rank, counts_rank)}


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        (QLORA, {"data_parallel_replicate_dim": 2}, "data_parallel_replicate_dim: 2 does not go with QLoRA"),
        (
            MODEL,
            {"optimizer_in_bwd": True, "custom_sharded_layers": ["tok_embeddings"]},
            "optimizer_in_bwd: True does not go with custom_sharded_layers: [tok_embeddings]",
        ),
        (
            MODEL,
            {"optimizer_in_bwd": True, "fsdp_cpu_offload": True},
            "optimizer_in_bwd: True does not go with fsdp_cpu_offload",
        ),
        (
            MODEL,
            {"optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}},
            "optimizer: torchao.optim.AdamW8bit works with one process",
        ),
        (QLORA, {"low_cpu_ram": True}, "low_cpu_ram: True works with one process"),
        (
            MODEL | {"num_kv_heads": 2},
            {"tensor_parallel_dim": 2, "tensor_parallel_plan": PLAN, "custom_sharded_layers": ["output"]},
            "custom_sharded_layers: [output] does nothing where tensor_parallel_dim 2 takes all of 2 processes",
        ),
        (
            MODEL | {"num_kv_heads": 2},
            {"tensor_parallel_dim": 2, "tensor_parallel_plan": PLAN, "fsdp_reshard_after_forward": False},
            "fsdp_reshard_after_forward: False does nothing where tensor_parallel_dim 2 takes all of 2 processes",
        ),
        (
            MODEL,
            {"tensor_parallel_plan": PLAN},
            "tensor_parallel_plan: torchtune.models.llama3.base_llama_tp_plan does nothing without tensor_parallel_dim",
        ),
    ],
)
def test_splits_that_would_go_wrong_or_do_nothing_are_refused(model, keys, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg = OmegaConf.create({"model": model, **keys})
    with pytest.raises(ValueError) as error:
        mesh.mesh_sizes(cfg, build_on_meta(cfg))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("processes", "keys", "sizes"),
    [
        ("2", UNSPLIT, (1, 2, 1)),
        ("2", {"tensor_parallel_plan": PLAN, "tensor_parallel_dim": 2}, (1, 1, 2)),
        ("1", {"tensor_parallel_plan": PLAN}, (1, 1, 1)),  # on one device it waits for more
    ],
)
def test_a_plan_and_how_many_ranks_share_a_matrix(processes, keys, sizes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    cfg = OmegaConf.create({"model": MODEL | {"num_kv_heads": 2}, **keys})
    assert mesh.mesh_sizes(cfg, build_on_meta(cfg)) == sizes


# ----------------------------------------------------------------------------------------------------- the launcher


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank(folder, job, number, port):
    """One process of a job; what it prints goes to NAME.rankN.txt. One that hangs says where, and ends."""
    world = str(job["processes"])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": world, "RANK": str(number)}
    os.environ |= {"LOCAL_WORLD_SIZE": world, "LOCAL_RANK": str(number)}
    said = os.open(folder / f"{job['name']}.rank{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout.reconfigure(line_buffering=True)  # as it was said, not at the end
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    RANKS[job["what"]](folder, *job["arguments"])
    processes.end_processes()


def launch(folder):
    """Run the jobs of stdin. As under torchrun, a rank that fails ends the others. Writes each job's exit codes."""
    fork = multiprocessing.get_context("fork")
    for job in map(json.loads, sys.stdin):
        port = free_port()
        ranks = [fork.Process(target=rank, args=(folder, job, number, port)) for number in range(job["processes"])]
        for process in ranks:
            process.start()
        while any(process.is_alive() for process in ranks):
            time.sleep(0.02)
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.join(3)  # many fail alike, and are not to be cut short
                    process.terminate()
        print(json.dumps([process.exitcode for process in ranks]), flush=True)


# ------------------------------------------------------------------------------------------------------ the runs


def scratch(model_type, tokenizer, **changes):
    """The checkpointer of a start without weights."""
    return {
        "_component_": "layerskip_recipes.checkpoint.scratch_checkpointer",
        "model_type": model_type,
        "output_dir": "${output_dir}",
        "tokenizer_dir": str(tokenizer),
        "hf_config": HF_CONFIG | changes,
    }


def checkpointer(folder, form="HF", file="model.safetensors"):
    """That of a start from a checkpoint."""
    return {
        "_component_": f"torchtune.training.FullModel{form}Checkpointer",
        "checkpoint_dir": str(folder),
        "checkpoint_files": [file],
        "output_dir": "${output_dir}",
        "model_type": "LLAMA3_2",
    }


def texts(folder):
    """40 texts of 21 to 89 tokens: ranks differ in the length of their batches and in the labels that count."""
    file = folder / "texts.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"def f{n}(x):\n    return x + {n}\n" * (1 + 7 * n % 4) for n in range(40)]
        file.write_text(json.dumps([{"text": text} for text in lines]))
    return {
        "_component_": "torchtune.datasets.text_completion_dataset",
        "source": "json",
        "data_files": str(file),
        "column": "text",
        "split": "train",
    }


def config_changes(kind, folder, tokenizer):
    """The keys by which the config `kind` differs from that of all."""
    if kind in ("lora", "dora"):
        start = folder / "start"
        weights = checkpointer(start if start.exists() else make_checkpoint(start, tokenizer))
        return {"model": LORA | ({"use_dora": True} if kind == "dora" else {}), "checkpointer": weights}
    if kind == "qlora":
        (folder / "wide").mkdir()
        torch.manual_seed(0)
        plain = llama3_2(**{name: QLORA[name] for name in SIZE})
        for parameter in plain.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        torch.save(plain.state_dict(), folder / "wide" / "model.pt")
        return {"model": QLORA, "checkpointer": checkpointer(folder / "wide", "TorchTune", "model.pt")}
    if kind == "gemma2":
        return {"model": GEMMA2, "checkpointer": scratch("GEMMA2", tokenizer, head_dim=16)}
    if kind == "untied":
        model, section = UNTIED | {"num_kv_heads": 2}, scratch("LLAMA2", tokenizer, num_key_value_heads=2)
        return {"model": model, "checkpointer": section} | UNSPLIT
    if kind == "dropped":
        model, section = MODEL | {"num_kv_heads": 2}, scratch("LLAMA3_2", tokenizer, num_key_value_heads=2)
        dropout = {"layer_dropout": {"prob": 0.5}}
        return {"model": model, "checkpointer": section} | UNSPLIT | dropout
    if kind == "validated":  # five samples, which no two ranks share evenly, as often as it trains
        model, section = MODEL | {"num_kv_heads": 2}, scratch("LLAMA3_2", tokenizer, num_key_value_heads=2)
        held_out = {"dataset_val": texts(folder.parent) | {"split": "train[:5]"}, "run_val_every_n_steps": 1}
        return {"model": model, "checkpointer": section} | UNSPLIT | held_out
    if kind == "in_backward":
        return {"optimizer_in_bwd": True, "clip_grad_norm": None}
    return {}


def rewound(out, name, to):
    """A copy of a run's folder as it was when checkpoint `name` was the last one, and its log anew."""
    shutil.copytree(out, to)
    later = [path.name for path in complete_checkpoints(out)]
    for gone in later[later.index(name) + 1 :]:
        shutil.rmtree(to / gone)
    (to / "logs" / "log.txt").unlink()
    return to


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def on_ranks(folder):
    """Run a job on processes of its own: what became of them, and what each printed."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    done = {}

    def run(name, processes, what, *arguments):
        if name not in done:
            job = {"name": name, "processes": processes, "what": what, "arguments": [*map(str, arguments)]}
            print(json.dumps(job), file=process.stdin, flush=True)
            codes = next(json.loads(line) for line in process.stdout if line.startswith("["))
            said = [(folder / f"{name}.rank{number}.txt").read_text() for number in range(processes)]
            done[name] = SimpleNamespace(codes=codes, said=said)
        return done[name]

    yield run
    process.stdin.close()
    process.wait(10)


def went_well(job):
    assert set(job.codes) == {0}, "\n".join(job.said)[-4000:]


def tune_on_two(path, *overrides):
    command = ["run", "--nnodes", "1", "--nproc_per_node", "2", "layerskip_finetune", "--config", str(path)]
    return run_tune(*command, *overrides, cwd=path.parent, timeout=LIMIT)


def saves(case, kind):
    """The overrides of a run whose shards are taken up later."""
    return SAVES if any(s[:2] == (case, kind) and s[2].startswith("step") for s in RESUMED.values()) else []


@pytest.fixture(scope="module")
def one(folder, tokenizer_folder):
    """The run of a config in this process: its output folder, whose parent has finetune.yaml."""

    def run(kind, *overrides):
        out = folder / kind / " ".join(["one", *overrides])
        if not out.exists():
            changes = {"dataset": texts(folder), "batch_size": 2} | config_changes(kind, folder, tokenizer_folder)
            path = finetune_config(folder / kind, tokenizer_folder, **STEPS | changes)
            train(path, f"output_dir={out}", "batch_size=4", *saves(None, kind), *overrides)
        return out

    return run


@pytest.fixture(scope="module")
def several(one, on_ranks):
    """The run of a case on its processes: that of the same on one, and its own output folder."""

    def run(name):
        kind, processes, overrides = CASES[name]
        alone = one(kind, *(override for override in overrides if override in FEW))
        out, path = alone.parent / name, alone.parent / "finetune.yaml"
        overrides = [f"output_dir={out}", *overrides, *saves(name, kind)]
        if name != "tune run":
            went_well(on_ranks(name, processes, "train", "--config", path, *overrides))
        elif not out.exists():
            done = tune_on_two(path, *overrides)
            assert done.returncode == 0, done.stderr[-4000:]
        return alone, out

    return run


@pytest.fixture(scope="module")
def dropout_config(folder, tokenizer_folder):
    """One step of two micro-batches of two samples in order, from wide weights."""
    start = make_checkpoint(folder / "dropout" / "start", tokenizer_folder)
    return finetune_config(
        folder / "dropout", tokenizer_folder, dataset=texts(folder), checkpointer=checkpointer(start), shuffle=False,
        layer_dropout={"prob": PROB}, gradient_accumulation_steps=2, max_steps_per_epoch=1, seed=SEED,
    )  # fmt: skip


def same_losses(one, other, steps):
    """All that both logged, but the speed."""
    one, other = losses(one), losses(other)
    assert sorted(other) == list(steps)
    for step in steps:
        assert other[step] == pytest.approx(one[step], abs=1e-5, rel=2e-6)  # a perplexity is large


def same_weights(one, other):
    """The last checkpoints, as other tools read them."""
    read = {".safetensors": load_file, ".bin": torch.load}
    ours, theirs = (
        {k: v for file in sorted(out.glob("epoch_*"))[-1].glob("model-*") for k, v in read[file.suffix](file).items()}
        for out in (one, other)
    )
    assert ours and ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("name", CASES)
def test_no_split_changes_the_losses(several, name):
    """Nor anything else that is logged, in 20 steps or 8; validation begins before the first."""
    same_losses(*several(name), range(name.startswith("valid") ^ 1, 9 if FEW[0] in CASES[name][2] else 21))


@pytest.mark.parametrize("name", CASES)
def test_no_split_changes_the_weights_at_the_end(several, name):
    same_weights(*several(name))


@pytest.mark.parametrize("name", RESUMED)
def test_resume_with_other_processes(one, several, on_ranks, name):
    case, kind, checkpoint, processes, *overrides = RESUMED[name]
    alone = one(kind)
    out = rewound(several(case)[1] if case else alone, checkpoint, alone.parent / name)
    path = alone.parent / "finetune.yaml"
    overrides += [f"output_dir={out}", "resume_from_checkpoint=true"]
    if processes == 1:
        train(path, "batch_size=4", *overrides)
    else:
        went_well(on_ranks(name, 2, "train", "--config", path, *overrides))
    same_losses(alone, out, range(11 if checkpoint == "epoch_0" else 9, 21))
    same_weights(alone, out)


@pytest.mark.parametrize("how", [[], ["enable_async_checkpointing=true"]], ids=["whole", "shards"])
def test_resume_on_as_many_ranks_draws_what_the_run_would_have_drawn(folder, tokenizer_folder, on_ranks, how):
    """Layer dropout, which all ranks draw alike, and the attention's, which each draws for itself."""
    name = f"drawn {len(how)}"
    model = MODEL | {"attn_dropout": 0.3}
    path = finetune_config(
        folder / name, tokenizer_folder, model=model, dataset=texts(folder), batch_size=2, save_every_n_steps=2,
        layer_dropout={"prob": 0.5}, max_steps_per_epoch=5,
    )  # fmt: skip
    went_well(on_ranks(name, 2, "train", "--config", path, *how))
    out = folder / name / "out"
    again = rewound(out, "step_2", folder / name / "again")
    resumed = [f"output_dir={again}", "resume_from_checkpoint=true", *how]
    went_well(on_ranks(f"{name} again", 2, "train", "--config", path, *resumed))
    never_stopped, later = losses(out), losses(again)
    assert sorted(later) == [3, 4, 5]
    assert all(later[step] == pytest.approx(never_stopped[step], abs=1e-6) for step in later)
    same_weights(out, again)


# --------------------------------------------------------------------------------------- layer dropout, by hand


def shifted(tokens):
    return F.pad(tokens[:, 1:], (0, 1), value=-100)


def some_tokens():
    """[3, 11] for each of two ranks."""
    return torch.randint(0, 97, (2, 3, 11), generator=torch.Generator().manual_seed(3))


def exit_sums(model, tokens, keep):
    """Of one sample: the summed cross-entropy of each exit, x_{l+1} = x_l + M_l f_l(x_l) with keep[l] = M_l."""
    h, sums = model.tok_embeddings(tokens[None]), []
    for layer, stays in zip(model.layers, keep, strict=True):
        h = h + float(stays) * (layer(h) - h)
        logits = unembedded(model, h)[0]
        sums.append(F.cross_entropy(logits[:-1], tokens[1:], reduction="sum"))
    return torch.stack(sums)


def papers_weights(exits, num_layers, scale=0.5):
    """e~ of eq. 6 for these exits, 0 for the others."""
    e = [scale * layer * (layer + 1) / 2 for layer in range(num_layers)]
    e[-1] = num_layers - 1 + scale * (num_layers - 2) * (num_layers - 1) / 2
    on = torch.tensor([value * (layer + 1 in exits) for layer, value in enumerate(e)])
    return on / on.sum()


def same_gradients(model, found):
    """model has gradients where a layer ran on any rank."""
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        actual = torch.zeros_like(p) if found[name] is None else found[name]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_the_same_draw_drops_each_ranks_own_samples(folder, on_ranks, dropout_config):
    """Two ranks, two micro-batches of two samples: the loss and the gradients of the first step, by plain PyTorch."""
    went_well(on_ranks("dropout", 2, "first_gradients", dropout_config))
    cfg, model = load_config(str(dropout_config)), llama3_2(**SIZE)
    read = config.instantiate(cfg.checkpointer, output_dir=str(folder / "nowhere"))
    model.load_state_dict(read.load_checkpoint()["model"])
    data = config.instantiate(cfg.dataset, config.instantiate(cfg.tokenizer))
    samples = [torch.tensor(data[i]["tokens"]) for i in range(8)]

    generator = torch.Generator().manual_seed(SEED)
    rates = torch.tensor([PROB * (math.exp(layer * math.log(2) / (L - 1)) - 1) for layer in range(L)])
    sums, count = 0, 0
    for micro in range(2):
        keep = torch.rand(L, 2, generator=generator) >= rates[:, None]
        assert not keep.all()
        for number in range(2):
            for row in range(2):
                tokens = samples[2 * (2 * micro + row) + number]  # every second sample is a rank's own
                sums = sums + exit_sums(model, tokens, keep[:, row])
                count += len(tokens) - 1
    means = sums / count
    loss = (papers_weights({1, 3, 4}, L) * means).sum()
    loss.backward()

    out = folder / "dropout" / "out"
    first = losses(out)[1]
    assert first["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for exit_layer in (1, 3, 4):
        assert first[f"loss_exit_{exit_layer}"] == pytest.approx(means[exit_layer - 1].item(), abs=1e-5)
    same_gradients(model, torch.load(out / "gradients.pt"))


@pytest.mark.parametrize("name", ROWS)
def test_ranks_of_different_rows_and_idle_layers(folder, on_ranks, name):
    """No hang, and the gradients of the mean over the ranks; also of layers that one rank skips, or both."""
    went_well(on_ranks("rows", 2, "rows"))
    results, seen = torch.load(folder / "rows.pt"), set()
    for seed in range(DRAWS):
        model = tiny("llama3", "lora" in ROWS[name][1])
        keep = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed)) >= PROB
        loss = 0
        for tokens, rows in zip(some_tokens(), ROWS[name][0], strict=True):
            sums = sum(exit_sums(model, tokens[row], keep[:, row]) for row in range(rows))
            loss = loss + (papers_weights(range(1, 7), 6) * sums).sum() / (rows * (tokens.shape[1] - 1)) / 2
        loss.backward()
        for layer in keep.tolist():
            seen.add((*(any(layer[:rows]) for rows in ROWS[name][0]), any(layer)))
        mean, found = results[name, seed]
        torch.testing.assert_close(mean, loss.detach(), atol=1e-5, rtol=1e-5)
        same_gradients(model, found)
    # A layer that nobody keeps, one that all keep, and one that a rank skips while another runs it.
    assert {(False, False, False), (True, True, True)} < seen


def test_the_head_is_gathered_once_for_all_exits_and_chunks(folder, on_ranks):
    went_well(on_ranks("counts", 2, "counts"))
    counts = json.loads((folder / "counts.json").read_text())
    assert set(counts) == {
        f"{name}: {how}"
        for name in COUNTED
        for how in ("2 exits, chunks of 512", "6 exits, chunks of 512", "6 exits, chunks of 3")
    }
    for key, (forward, _) in counts.items():
        assert forward == COUNTED[key.split(":")[0]][2]
    for name in COUNTED:
        backward = {counted[1] for key, counted in counts.items() if key.startswith(f"{name}:")}
        assert len(backward) == 1 and (backward == {0}) == (name == "untied, kept")


def test_a_checkpoint_of_adapters_alone_gathers_nothing_else(folder, on_ranks):
    """A and B of q, v and three matrices of the MLP in each of 6 layers, as rank 0 alone had them."""
    went_well(on_ranks("counts", 2, "counts"))
    gathered, written = torch.load(folder / "adapters.pt")
    start = tiny("llama3", lora=True).state_dict()
    expected = {name: value for name, value in start.items() if "lora" in name}
    assert gathered == len(expected) == 2 * 5 * 6
    assert set(written) == {"adapter", "adapter_config", "scaled biases"} and set(written["adapter"]) == set(expected)
    assert all(torch.equal(written["adapter"][name], value) for name, value in expected.items())


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def wrong(folder, tokenizer_folder, on_ranks, dropout_config):
    """The job of a case of WRONG. It has no weights but for one: to read these is a mistake with words of its own."""
    (folder / "broken").mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / "broken" / file).write_bytes(b"{}")
    sections = {"dataset": texts(folder), "checkpointer": checkpointer(folder / "broken")} | UNSPLIT
    broken = finetune_config(folder / "wrong", tokenizer_folder, **sections)

    def run(name):
        path, out = dropout_config if name == "other model" else broken, folder / "wrong" / name
        return on_ranks(f"wrong {name}", 2, "train", "--config", path, f"output_dir={out}", *WRONG[name][0])

    return run


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_one_line(folder, wrong, name):
    """Exit status 1, before weights are read or anything is written."""
    job, (_, begins, then) = wrong(name), WRONG[name]
    *before, last = job.said[0].splitlines()
    assert last.startswith("ValueError: " + begins) and then in last
    assert not any("Error" in line or "Traceback" in line for line in before)
    assert job.codes[0] == 1
    if name not in RANK_ZERO_ALONE:
        # Ended while it left rank 0 the word; or, on a slow machine, with the same words.
        assert job.codes[1] in (1, -signal.SIGTERM)
        assert [line for line in job.said[1].splitlines() if "Error" in line or "Traceback" in line] in ([], [last])
    assert name == "other model" or not (folder / "wrong" / name).exists()


@pytest.mark.parametrize("name", RANK_ZERO_ALONE)
def test_who_waits_for_rank_zero_adds_nothing(wrong, name):
    assert "Traceback" not in wrong(name).said[1]


if __name__ == "__main__":
    launch(Path(sys.argv[1]))
