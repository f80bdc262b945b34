"""What each rank of a generation test runs: `generating_ranks.py WHAT FOLDER`, see RANKS at the end."""

import faulthandler
import json
import random
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from helpers import speculation
from helpers.compiled import compiled_steps
from helpers.tiny import FAMILIES, SIZE, CountedCollectives, make_tiny
from torch.distributed.tensor import DTensor
from torchtune.models.llama3 import base_llama_tp_plan

from layerskip_recipes import layerskip_decoder, processes
from layerskip_recipes.checkpoint.drafts import read_description
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.cli.run import run_cli
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.schema import check
from layerskip_recipes.generation import parallel
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.config import GenerateConfig, Temperature
from layerskip_recipes.generation.drafting.chain import ChainDrafter
from layerskip_recipes.generation.drafting.draft_weights import draft_weights
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.state import ModelState

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9]]
L, E, NEW = 6, 2, 8
MODES = {"speculative": {"exit_layer": E, "num_speculations": 3}, "autoregressive": {}, "early": {"exit_layer": E}}
# What ranks could choose differently, or see differently, without rank 0's word.
OTHER_MODES = {
    "chain": {},
    "look-up": {"prompt_lookup": 1},
    "vocabulary": {"draft_vocabulary": list(range(0, 90, 2))},
    "penalty": {"repetition_penalty": 1.3},
    "chain, sampled": {"temperature": 1.0},
    "look-up, sampled": {"prompt_lookup": 1, "temperature": 1.0},
}
ADAPTED = {
    "lora": {},
    "dora": {"use_dora": True},
    "qlora": {"quantize_base": True, "num_layers": 2, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 256},
}
# Where both ranks share each matrix: a vocabulary of which each has half.
EVEN = {"vocab_size": 98, "num_layers": 3}
LOCAL_MODES = {"speculative": MODES["speculative"], "look-up": MODES["speculative"] | {"prompt_lookup": 1}}
# 33 on each of two tensor-parallel ranks, which cannot be halved again.
UNEVEN = {"intermediate_dim": 66, "num_layers": 3}
# With biases and a tied head two rows, eager; with a head of its own one, compiled.
LOCAL = {"qwen2_tied": (PROMPTS, LOCAL_MODES, False), "llama3": (PROMPTS[0], ["speculative"], True)}
# kept_layers, T
SPLITS = {"draft_whole": (E, 1), "all_sharded": (0, 1), "nothing_sharded": (L, 1), "tensor_parallel": (E, 2)}
SHARED_MODEL = sorted(SPLITS.keys() - {"nothing_sharded"})  # there each rank has a model of its own
# The models that are split so; qwen2 has biases and a tied head, which are sharded and split by tensor parallelism.
CASES = [("llama3", how) for how in SPLITS] + [("qwen2_tied", "draft_whole"), ("qwen2_tied", "tensor_parallel")]


def run(model, prompts=PROMPTS, new=NEW, **mode):
    return generate(model, prompts, new, **mode)


def other(model, mode):
    return run(model, new=10, **MODES["speculative"], **OTHER_MODES[mode], seed=1).tokens.tolist()


def everything(model):
    """Greedy and sampled tokens; logits of the whole walk, of two partial ones, and of layers called directly."""
    result = {mode: run(model, **arguments).tokens.tolist() for mode, arguments in MODES.items()}
    result["sampled"] = run(model, **MODES["speculative"], temperature=1.0, seed=1).tokens.tolist()
    tokens = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        half = model(tokens, exit_layer=4, unembed=False)
        direct = model.tok_embeddings(tokens)
        for layer in model.layers:
            direct = layer(direct)
        walks = [model(tokens), model(hidden=half, start_layer=4), model.unembed(direct)]
    return result, [logits.tolist() for logits in walks]


@contextmanager
def confused_clock(clock=time.perf_counter):
    """Each rank measures times of its own, by which drafts may give way to plain decoding."""
    draw = random.Random(dist.get_rank())
    time.perf_counter = lambda: clock() + draw.random()
    yield
    time.perf_counter = clock


def split(family, kept, dim):
    """A tiny model over all ranks, whose weights rank 0 alone has."""
    state = make_tiny(family).state_dict() if processes.is_rank_zero() else {}
    with torch.device("meta"):
        model = layerskip_decoder(FAMILIES[family]())
    return parallel.shard_decoder(model, state, CPU, torch.float32, kept, dim, base_llama_tp_plan())


def full_weights(model):
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}


@contextmanager
def gathers_before_drafts(counted):
    """A list of how many gathers had begun before each chain was drafted."""
    propose, counts = ChainDrafter.propose, []

    def watched(*args):
        counts.append(counted.counts["all_gather"])
        return propose(*args)

    with mock.patch.object(ChainDrafter, "propose", watched):
        yield counts


def decode_rank(folder):
    """Tokens, counts and walks of every split."""
    result = {}
    for family, how in CASES:
        model = split(family, *SPLITS[how])
        result[f"{family}/{how}"] = everything(model)
        if family == "llama3" and how == "draft_whole":
            with confused_clock():
                for mode in OTHER_MODES:
                    result[f"other/{mode}"] = other(model, mode)
        if how == "draft_whole":
            full = full_weights(model)
            local = {n: p.to_local() for n, p in model.named_parameters() if isinstance(p, DTensor)}
            result[f"{family}/halved"] = [n for n, p in local.items() if p.numel() == full[n].numel() / 2]
    for how, mode in (("draft_whole", "speculative"), ("all_sharded", "autoregressive")):
        model = split("llama3", *SPLITS[how])
        always = mock.patch.object(ModelState, "rule", lambda *_: DraftRule(measure=False))
        with always, CountedCollectives() as counted, gathers_before_drafts(counted) as before_drafts:
            out = run(model, PROMPTS[0], **MODES[mode])
        result[f"count/{mode}"] = [dict(counted.counts), out.stats.rounds, out.stats.tokens, before_drafts]
    # As torchtune's set_seed without a seed leaves them: each rank draws numbers of its own.
    torch.manual_seed(dist.get_rank())
    for how in SHARED_MODEL:
        model = split("llama3", *SPLITS[how])
        draws = [run(model, **MODES["speculative"], temperature=1.0, seed=seed) for seed in (None, dist.get_rank())]
        result[f"own seeds/{how}"] = [out.tokens.tolist() for out in draws]
    try:
        run(split("llama3", *SPLITS["draft_whole"]), [[5 + dist.get_rank()]], **MODES["speculative"])
    except ValueError as e:
        result["other prompts"] = str(e)
    return result


def local_rank(folder):
    """Tokens of matrices that both ranks share, as plain tensors; also by graphs, of torch's own operations."""
    SIZE.update(EVEN)
    compile, result = torch.compile, {}
    torch.compile = lambda function, **_: compile(function, backend="eager", fullgraph=True)
    for family, (prompts, modes, compiled) in LOCAL.items():
        model = split(family, E, 2)
        result[f"{family}/torch's"] = [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
        result[f"{family}/halves"] = [*model.tok_embeddings.weight.shape, *model.layers[1].mlp.w2.weight.shape]
        for mode in modes:
            out = run(model, prompts, **LOCAL_MODES[mode], compile=compiled)
            result[f"{family}/{mode}"] = out.tokens.tolist()
        steps = compiled_steps(model)
        result[f"{family}/graphs"] = [len(steps.graphs), steps.failed, len(steps.refused)]
    return result


def load_rank(folder):
    """load_sharded_decoder, in bf16 from fp32 files, against load_decoder: each config of the folder."""
    if dist.get_rank() == 1:
        parallel.read_weights = None  # not to be called
    result, arguments = {}, {"exit_layer": 1, "num_speculations": 3}
    for file in folder.glob("*.yaml"):
        cfg = GenerateConfig.load(load_config(str(file), ["dtype=bf16"]))
        whole = load_decoder(cfg, CPU)
        model, _ = parallel.load_sharded_decoder(cfg, CPU, kept_layers=1)
        full, expected, buffers = full_weights(model), whole.state_dict(), dict(model.named_buffers())
        result[file.stem] = {
            "weights": full.keys() == expected.keys()
            and all(torch.equal(full[n], p) and full[n].dtype == torch.bfloat16 for n, p in expected.items()),
            "buffers": len(buffers) > 0 and all(torch.equal(buffers[n], b) for n, b in whole.named_buffers()),
            "training": model.training,
            "tokens": run(model, **arguments).tokens.tolist() == run(whole, **arguments).tokens.tolist(),
        }
    return result


def trained_speculation(folder):
    draft = read_description(folder, "draft")
    return Speculation(draft.exit_layer, 3, draft.vocabulary, draft=draft)


def trained_rank(folder):
    """A sharded model with the trained draft of each config: greedy tokens, how many were drafted, and accepted."""
    result = {}
    for file in folder.glob("*.yaml"):
        cfg = GenerateConfig.load(load_config(str(file)))
        ours = trained_speculation(cfg.self_speculation.draft)
        model, draft = parallel.load_sharded_decoder(cfg, CPU, ours.model_layers, draft=ours.draft)
        generation = speculation.run(
            model, PROMPTS, NEW, speculation=ours, draft_weights=draft_weights(ours, model, draft)
        )
        stats = generation.stats
        result[file.stem] = [generation.generated, stats.drafted, stats.accepted]
    return result


def fail_rank(folder):
    """A user's mistake that only rank 1 meets, while rank 0 waits for it."""
    if dist.get_rank() == 1:
        check("temperature", -1, Temperature)
    processes.broadcast_from_rank0(torch.zeros(1))


def fail_load_rank(folder):
    """A checkpoint of another model, which rank 0 alone sees."""
    cfg = GenerateConfig.load(load_config(str(folder / "generate.yaml"), ["model.num_layers=3"]))
    parallel.load_sharded_decoder(cfg, CPU)


def grid_rank(folder):
    """Sharded tensor-parallel layers on 2 x 2 ranks."""
    SIZE.update(UNEVEN)
    model, weights = split("qwen2_tied", E, 2), make_tiny("qwen2_tied").state_dict()
    full = full_weights(model)
    # Few shapes of tensors, for each of which torch takes a while to find how it is split.
    tokens = run(model, new=4, exit_layer=E, num_speculations=1).tokens.tolist()
    halved = [model.layers[E].mlp.w1.weight.to_local().shape[0], full["layers.2.mlp.w1.weight"].shape[0]]
    same = all(torch.equal(full[name], value) for name, value in weights.items())
    return {"tokens": tokens, "weights": same, "halved": halved}


ALL = (decode_rank, local_rank, load_rank, trained_rank, fail_rank, fail_load_rank, grid_rank)
RANKS = {f.__name__.removesuffix("_rank"): f for f in ALL}


def work(what, folder):
    faulthandler.dump_traceback_later(300, exit=True)  # a torchrun that is killed leaves those that wait for others
    number = processes.init_processes("cpu")
    result = RANKS[what](folder)
    (folder / f"rank{number}.json").write_text(json.dumps(result))
    processes.end_processes()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    run_cli(lambda: work(sys.argv[1], Path(sys.argv[2])))
