"""Training on several processes (gloo) has the losses and gradients of one, whatever the split; resume, errors, hangs.

The main case goes through `tune run`. The others are cheap only without its start: this file is also a launcher,
`python test_distributed_finetune.py FOLDER`, which imports everything once, and forks the ranks of each job of
FOLDER/jobs.json with the environment that torchrun gives them.
"""

import json
import math
import multiprocessing
import os
import re
import shutil
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
from configs import HF_CONFIG, MODEL, SIZE, finetune_config, make_checkpoint
from conftest import FAMILIES, make_tiny, run_tune
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_finetune import UNTIED, losses, train
from torch.distributed.tensor import DTensor
from torchtune import training
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import distributed, layerskip_decoder, mesh
from layerskip_recipes.config import load_config
from layerskip_recipes.early_exit import EarlyExitLoss
from layerskip_recipes.layer_dropout import LayerDropout
from layerskip_recipes.recipes import finetune
from layerskip_recipes.run_checkpoints import complete_checkpoints

CPU = torch.device("cpu")
COSINE = {
    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 2,
}
# 20 steps of 4 samples: as one process, as two with 2 samples each, or as four with 1. Both kinds of checkpoints.
STEPS = {
    "layer_dropout": None,
    "epochs": 4,
    "max_steps_per_epoch": 5,
    "clip_grad_norm": 1.0,
    "lr_scheduler": COSINE,
    "save_every_n_steps": 3,
    "enable_async_checkpointing": True,
}
PLAN = {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}
LORA = {
    "_component_": "torchtune.models.llama3_2._component_builders.lora_llama3_2",
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
    **SIZE,
}
# So large that each rank's half of a matrix is whole blocks of NF4.
QLORA = LORA | {"quantize_base": True, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 512}
GEMMA2 = {
    "_component_": "torchtune.models.gemma2._component_builders.gemma2",
    **{k: v for k, v in MODEL.items() if k not in ("_component_", "scale_factor")},
    "head_dim": 16,
    "final_capping_value": 1.0,  # so low that it caps
}
# name: (config, processes, overrides)
CASES = {
    "embedding apart": ("tied", 2, ["custom_sharded_layers=[tok_embeddings]"]),
    "gathered weights kept": ("tied", 2, ["fsdp_reshard_after_forward=false"]),
    "selective checkpointing": ("tied", 2, ["ac_mode=selective", "ac_option=2"]),
    "full checkpointing": ("tied", 2, ["ac_mode=full"]),
    "fused": ("tied", 2, ["optimizer.fused=true"]),
    "accumulation": ("tied", 2, ["batch_size=1", "gradient_accumulation_steps=2"]),
    "optimizer in backward": ("in_backward", 2, []),
    "untied": ("untied", 2, []),
    "embedding and head apart": ("untied", 2, ["custom_sharded_layers=[tok_embeddings,output]"]),
    "capped head": ("gemma2", 2, []),
    "LoRA": ("lora", 2, []),
    "DoRA": ("dora", 2, []),
    "QLoRA": ("qlora", 2, []),
    "TP": ("untied", 2, ["tensor_parallel_dim=2", "batch_size=4"]),
    "TP, tied, dropout": ("dropped", 2, ["tensor_parallel_dim=2", "batch_size=4"]),
    "HSDP": ("tied", 4, ["data_parallel_replicate_dim=2", "batch_size=1"]),
    "FSDP x TP": ("untied", 4, ["tensor_parallel_dim=2"]),
}
# name: (the run whose checkpoint is taken up, its config, which checkpoint, processes): an epoch's is whole, a step's
# is one of shards.
RESUMED = {
    "1 to 2, whole": ("one", "tied", "epoch_1", 2),
    "1 to 2, shards": ("one", "tied", "step_9", 2),
    "1 to 2, optimizer in backward": ("one", "in_backward", "step_9", 2),
    "1 to 2, LoRA": ("one", "lora", "step_9", 2),
    "2 to 1, whole": ("two", "tied", "epoch_1", 1),
    "2 to 1, shards": ("two", "tied", "step_9", 1),
    "2 to 1, optimizer in backward": ("optimizer in backward", "in_backward", "epoch_1", 1),
    "2 to 1, LoRA": ("LoRA", "lora", "step_9", 1),
    "2 to 2, shards": ("two", "tied", "step_9", 2),
}
L, PROB, SEED = SIZE["num_layers"], 0.6, 7
# name: (overrides for 2 processes, the line that begins the message, whether rank 0 alone meets the mistake)
WRONG = {
    "replicate": (["data_parallel_replicate_dim=3"], "data_parallel_replicate_dim: 3 x ", False),
    "shard": (["data_parallel_shard_dim=3"], "data_parallel_replicate_dim: 1 x data_parallel_shard_dim 3 x ", False),
    "tensor": (["tensor_parallel_dim=3"], "tensor_parallel_dim: 3 does not divide processes, 2. Allowed: 1; ", False),
    "offload": (["fsdp_cpu_offload=true"], "fsdp_cpu_offload: True needs several processes with device=cuda", False),
    "samples": (["batch_size=11"], "dataset: 20 samples make no step of batch_size 11 x gradient_accumulation_", True),
}
OTHER_MODEL = (
    "ValueError: checkpointer: the checkpoint is not this model's, it lacks layers.4.attn.q_proj.weight, "
    "layers.4.attn.k_proj.weight, layers.4.attn.v_proj.weight and 6 more"
)
# The model of another family and depth, called directly: rows of rank 0 and of rank 1, how it is split.
ROWS = {
    "1 and 3": ((1, 3), {}),
    "1 and 1 of 3": ((1, 1), {}),
    "3 and 2, checkpointed": ((3, 2), {"ac_mode": "full"}),
    "1 and 3, checkpointed": ((1, 3), {"ac_mode": "full"}),
    "1 and 3, gathered weights kept": ((1, 3), {"fsdp_reshard_after_forward": False}),
    "1 and 3, apart": ((1, 3), {"custom_sharded_layers": ["tok_embeddings", "output"]}),
}
DRAWS = 4
LIMIT = 90  # seconds for a job; most take 3


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
    finetune.main()


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


def split(family, weights, cfg):
    """A decoder of tiny weights, which rank 0 alone has, over the ranks."""
    cfg = OmegaConf.create({"device": "cpu"} | cfg)
    with torch.device("meta"):
        model = layerskip_decoder(FAMILIES[family]())
    grid = mesh.make_mesh(cfg, model, CPU)
    if cfg.get("ac_mode"):
        mesh.checkpoint_layers(model)
    mesh.split(model, cfg, grid)
    mesh.load(model, weights if dist.get_rank() == 0 else {}, CPU, torch.float32, offload=False)
    return model.train()


def rows_rank(folder):
    """Losses and gradients of every case of ROWS and draw, to rows.pt."""
    distributed.init_processes("cpu")
    results = {}
    for name, (rows, cfg) in ROWS.items():
        model = split("llama3", make_tiny("llama3").state_dict(), cfg)
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
    """all_gathers of a forward by the chunks and exits of its loss, and the head's alone, to counts.json."""
    distributed.init_processes("cpu")
    tokens, counts = some_tokens()[0], {}
    for family in ("llama3", "llama3_2"):
        for apart in ([], ["tok_embeddings", "output"]):
            apart = apart[:1] if family == "llama3_2" else apart
            model = split(family, make_tiny(family).state_dict(), {"custom_sharded_layers": apart})
            for curriculum, chunk in (("rotational", 512), (None, 512), (None, 3)):
                loss = EarlyExitLoss(scale=0.5, curriculum=curriculum, interval=9, chunk_tokens=chunk)
                for grad in (True, False):
                    with torch.set_grad_enabled(grad), distributed.CountedCollectives() as counted:
                        total, exits = loss(model, tokens, shifted(tokens), step=4, total_steps=9)
                    key = f"{family}, apart {len(apart)}, exits {len(exits)}, chunk {chunk}, grad {grad}"
                    counts[key] = counted.counts["all_gather"]
                    if grad:
                        total.backward()
    if dist.get_rank() == 0:
        (folder / "counts.json").write_text(json.dumps(counts))


RANKS = {f.__name__.removesuffix("_rank"): f for f in (train_rank, first_gradients_rank, rows_rank, counts_rank)}


# ----------------------------------------------------------------------------------------------------- the launcher


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank(folder, job, number, port):
    """One process of a job; what it prints goes to OUT/rankN.txt."""
    world = str(job["processes"])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": world, "RANK": str(number)}
    os.environ |= {"LOCAL_WORLD_SIZE": world, "LOCAL_RANK": str(number)}
    said = os.open(folder / f"{job['name']}.rank{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    RANKS[job["what"]](folder, *job["arguments"])
    distributed.end_processes()


def launch(folder):
    """Run the jobs one after the other. As under torchrun, a rank that fails ends the others. Writes statuses.json."""
    fork, statuses = multiprocessing.get_context("fork"), {}
    for job in json.loads((folder / "jobs.json").read_text()):
        port, started, hung = free_port(), time.perf_counter(), False
        ranks = [fork.Process(target=rank, args=(folder, job, number, port)) for number in range(job["processes"])]
        for process in ranks:
            process.start()
        while any(process.is_alive() for process in ranks):
            time.sleep(0.05)
            hung = time.perf_counter() - started > LIMIT
            if hung or any(process.exitcode for process in ranks):
                for process in ranks:
                    process.terminate()
                    process.join(5)
                    process.kill()
        statuses[job["name"]] = {
            "codes": [process.exitcode for process in ranks],
            "hung": hung,
            "seconds": time.perf_counter() - started,
        }
    (folder / "statuses.json").write_text(json.dumps(statuses))


# ------------------------------------------------------------------------------------------------------ single runs


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
    """20 texts of 21 to 89 tokens: ranks differ in the length of their batches and in the labels that count."""
    file = folder / "texts.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"def f{n}(x):\n    return x + {n}\n" * (1 + 7 * n % 4) for n in range(20)]
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
        plain = {name: QLORA[name] for name in SIZE}
        torch.save(llama3_2(**plain).state_dict(), folder / "wide" / "model.pt")
        return {"model": QLORA, "checkpointer": checkpointer(folder / "wide", "TorchTune", "model.pt")}
    if kind == "gemma2":
        return {"model": GEMMA2, "checkpointer": scratch("GEMMA2", tokenizer, head_dim=16)}
    if kind == "untied":
        model, section = UNTIED | {"num_kv_heads": 2}, scratch("LLAMA2", tokenizer, num_key_value_heads=2)
        return {"model": model, "checkpointer": section, "tensor_parallel_plan": PLAN}
    if kind == "dropped":
        model, section = MODEL | {"num_kv_heads": 2}, scratch("LLAMA3_2", tokenizer, num_key_value_heads=2)
        dropout = {"layer_dropout": {"prob": 0.5}}
        return {"model": model, "checkpointer": section, "tensor_parallel_plan": PLAN} | dropout
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
def one(folder, tokenizer_folder):
    """The run of a config in this process: its output folder, whose parent has finetune.yaml."""

    def run(kind):
        out = folder / kind / "one"
        if not out.exists():
            changes = {"dataset": texts(folder), "batch_size": 2} | config_changes(kind, folder, tokenizer_folder)
            path = finetune_config(folder / kind, tokenizer_folder, **STEPS | changes)
            train(path, f"output_dir={out}", "batch_size=4")
        return out

    return run


@pytest.fixture(scope="module")
def two(folder, one):
    """The tied model's run on two processes, through `tune run`."""
    out = one("tied").parent / "two"
    done = tune_on_two(out.parent / "finetune.yaml", f"output_dir={out}")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def tune_on_two(path, *overrides):
    command = ["run", "--nnodes", "1", "--nproc_per_node", "2", "layerskip_finetune", "--config", str(path)]
    return run_tune(*command, *overrides, cwd=path.parent, env={"OMP_NUM_THREADS": "1"}, timeout=120)


@pytest.fixture(scope="module")
def jobs(folder, one, two, tokenizer_folder):
    """All that the launcher ran: `ran(name)` raises unless each rank ended well."""

    def job(name, processes, what, *arguments):
        return {"name": name, "processes": processes, "what": what, "arguments": [*map(str, arguments)]}

    todo = []
    for name, (kind, processes, overrides) in CASES.items():
        start = ["--config", one(kind).parent / "finetune.yaml"]
        todo.append(job(name, processes, "train", *start, f"output_dir={one(kind).parent / name}", *overrides))
    for name, (run, kind, checkpoint, processes) in RESUMED.items():
        if processes == 2:
            out = rewound(one(kind).parent / run, checkpoint, one(kind).parent / name)
            start = ["--config", one(kind).parent / "finetune.yaml"]
            todo.append(job(name, 2, "train", *start, f"output_dir={out}", "resume_from_checkpoint=true"))
    start = make_checkpoint(folder / "dropout" / "start", tokenizer_folder)
    path = finetune_config(
        folder / "dropout", tokenizer_folder, dataset=texts(folder), checkpointer=checkpointer(start), shuffle=False,
        layer_dropout={"prob": PROB}, gradient_accumulation_steps=2, max_steps_per_epoch=1, seed=SEED,
    )  # fmt: skip
    todo += [job("dropout", 2, "first_gradients", path), job("rows", 2, "rows"), job("counts", 2, "counts")]
    # No weights: to read these is a mistake with words of its own.
    (start.parent / "broken").mkdir()
    for file in ("config.json", "model.safetensors"):
        (start.parent / "broken" / file).write_bytes(b"{}")
    broken = checkpointer(start.parent / "broken")
    path = finetune_config(folder / "wrong", tokenizer_folder, dataset=texts(folder), checkpointer=broken)
    for name, (overrides, *_) in WRONG.items():
        changes = [f"output_dir={folder / 'wrong' / name}", "tensor_parallel_plan._component_=" + PLAN["_component_"]]
        todo.append(job(name, 2, "train", "--config", path, *changes, *overrides))

    (folder / "jobs.json").write_text(json.dumps(todo))
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    statuses = json.loads((folder / "statuses.json").read_text())

    def said(name):
        return [file.read_text() for file in sorted(folder.glob(f"{name}.rank*.txt"))]

    def ran(name):
        assert not statuses[name]["hung"], said(name)
        assert set(statuses[name]["codes"]) == {0}, "\n".join(said(name))[-4000:]

    return SimpleNamespace(ran=ran, said=said, statuses=statuses)


def same_losses(one, other, steps=range(1, 21)):
    """All that both logged in these steps, but the speed."""
    one, other = losses(one), losses(other)
    assert sorted(one) == list(range(1, 21)) and sorted(other) == list(steps)
    for step in steps:
        assert other[step] == pytest.approx(one[step], abs=1e-5)


def same_weights(one, other):
    """The last checkpoints, as other tools read them."""
    for name in ("model-00001-of-00001.safetensors", "model-00001-of-00001.bin"):
        files = [out / "epoch_3" / name for out in (one, other)]
        if files[0].exists():
            ours, theirs = (load_file(file) if file.suffix == ".safetensors" else torch.load(file) for file in files)
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                torch.testing.assert_close(theirs[key], value, atol=1e-5, rtol=0)
            return
    raise AssertionError(f"no weights under {one}")


# ------------------------------------------------------------------------------------------------------------ tests


def test_two_processes_have_the_losses_of_one(one, two):
    """Through `tune run`, with everything that is logged but the speed; and the weights at the end."""
    same_losses(one("tied"), two)
    same_weights(one("tied"), two)


@pytest.mark.parametrize("name", CASES)
def test_no_split_changes_the_losses(one, jobs, name):
    jobs.ran(name)
    out = one(CASES[name][0])
    same_losses(out, out.parent / name)
    same_weights(out, out.parent / name)


@pytest.mark.parametrize("name", RESUMED)
def test_resume_with_another_number_of_processes(one, two, jobs, name):
    run, kind, checkpoint, processes = RESUMED[name]
    out = one(kind)
    if processes == 2:
        jobs.ran(name)
    else:
        if run in CASES:
            jobs.ran(run)
        copy = rewound(out.parent / run, checkpoint, out.parent / name)
        train(out.parent / "finetune.yaml", f"output_dir={copy}", "batch_size=4", "resume_from_checkpoint=true")
    same_losses(out, out.parent / name, range(11 if checkpoint == "epoch_1" else 10, 21))
    same_weights(out, out.parent / name)


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
        logits = model.output(model.norm(h))[0]
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


def test_each_rank_drops_its_own_samples_by_the_same_draw(folder, jobs):
    """Two ranks, two micro-batches of two samples: the loss and the gradients of the first step, by plain PyTorch."""
    jobs.ran("dropout")
    start = folder / "dropout" / "start"
    model = llama3_2(**SIZE)
    read = training.FullModelHFCheckpointer(str(start), ["model.safetensors"], "LLAMA3_2", str(folder / "nowhere"))
    model.load_state_dict(read.load_checkpoint()["model"])
    cfg = load_config(str(folder / "dropout" / "finetune.yaml"))
    samples = [torch.tensor(sample["tokens"]) for sample in finetune_data(cfg)]

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


def finetune_data(cfg):
    from layerskip_recipes.recipes.data import load_data
    from layerskip_recipes.settings import build

    return load_data(cfg, build(cfg.tokenizer, "tokenizer"), -100)[0]


@pytest.mark.parametrize("name", ROWS)
def test_ranks_of_different_rows_and_idle_layers(folder, jobs, name):
    """No hang, and the gradients of the mean over the ranks; also of layers that one rank skips, or both."""
    jobs.ran("rows")
    results = torch.load(folder / "rows.pt")
    seen = set()
    for seed in range(DRAWS):
        model = make_tiny("llama3")
        keep = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed)) >= PROB
        loss = 0
        for tokens, rows in zip(some_tokens(), ROWS[name][0], strict=True):
            sums = sum(exit_sums(model, tokens[row], keep[:, row]) for row in range(rows))
            loss = loss + (papers_weights(range(1, 7), 6) * sums).sum() / (rows * (tokens.shape[1] - 1)) / 2
        loss.backward()
        for layer in keep.tolist():
            seen.add(tuple(any(layer[:rows]) for rows in ROWS[name][0]) + (any(layer),))
        mean, found = results[name, seed]
        torch.testing.assert_close(mean, loss.detach(), atol=1e-5, rtol=1e-5)
        same_gradients(model, found)
    # A layer that nobody keeps, one that all keep, and one that a rank skips while another runs it.
    assert {(False, False, False), (True, True, True)} < seen


def test_the_head_is_gathered_once_for_all_exits_and_chunks(folder, jobs):
    """A forward gathers each layer, what stays with the root, and what is apart; whatever the loss cuts its work into."""
    jobs.ran("counts")
    counts = json.loads((folder / "counts.json").read_text())
    assert len(counts) == 24
    for key, count in counts.items():
        # The tied head takes the embedding's weights, which the embedding itself gathered and let go.
        again = 1 if key.startswith("llama3_2, apart 1") else 0
        assert count == 6 + 1 + int(re.search(r"apart (\d)", key)[1]) + again, key


# ----------------------------------------------------------------------------------------------------------- errors


def lines_of_errors(text):
    return [line for line in text.splitlines() if "Error" in line.split(":")[0]]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_one_line(folder, jobs, name):
    """Exit status 1, before weights are read or anything is written."""
    _, message, first_alone = WRONG[name]
    first, second = jobs.said(name)
    assert not jobs.statuses[name]["hung"]
    assert jobs.statuses[name]["codes"][0] == 1
    assert first.splitlines()[-1].startswith("ValueError: " + message)
    assert len(lines_of_errors(first)) == 1 and "Traceback" not in first
    if not first_alone:
        assert jobs.statuses[name]["codes"][1] == 1
        assert second == first
    assert not (folder / "wrong" / name).exists()


def test_a_checkpoint_of_another_model(folder, jobs):
    """Through `tune run`: rank 0 sees it, and rank 1 ends with it."""
    path = folder / "dropout" / "finetune.yaml"
    done = tune_on_two(path, "model.num_layers=5", f"output_dir={folder / 'other'}")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "ValueError" in line] == [OTHER_MODEL]


if __name__ == "__main__":
    launch(Path(sys.argv[1]))
