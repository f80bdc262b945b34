"""Generation on two processes (gloo) gives the tokens of one; sharded, tensor-parallel, both.

This file is also the worker: `torchrun test_distributed_generate.py WHAT FOLDER` runs one of WORKERS on each rank. All
but one of them are forks with the environment that torchrun gives, since it imports everything once more for each rank;
test_generate_recipe.py has a real `tune run`.
"""

import faulthandler
import json
import os
import random
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.commands import last_line
from helpers.configs import MODEL, generate_config, make_checkpoint
from helpers.configs import SIZE as MODEL_SIZE
from helpers.ranks import check_success, run_on_ranks
from helpers.tiny import FAMILIES, SIZE, CountedCollectives, make_tiny
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import config
from torchtune.models.llama3 import base_llama_tp_plan
from torchtune.modules.peft import get_adapter_params

from layerskip_recipes import layerskip_decoder, processes
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.cli.run import run_cli
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.schema import check
from layerskip_recipes.generation import parallel
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.config import GenerateConfig, Temperature
from layerskip_recipes.generation.kernels.compiling import compiled_steps

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9]]
L, E, NEW = 6, 2, 8
MODES = {"speculative": {"exit_layer": E, "num_speculations": 3}, "autoregressive": {}, "early": {"exit_layer": E}}
# What ranks could choose differently, or see differently, without rank 0's word.
OTHER_MODES = {
    name: {"exit_layer": E, "num_speculations": 3} | arguments
    for name, arguments in {
        "tree": {"tree_width": 2, "tree_children": 2},
        "threshold": {"threshold": 0.15},
        "look-up": {"prompt_lookup": 1},
        "vocabulary": {"draft_vocabulary": list(range(0, 90, 2))},
        "penalty": {"repetition_penalty": 1.3},
        "tree, sampled": {"tree_width": 2, "tree_children": 2, "temperature": 1.0},
        "look-up, sampled": {"prompt_lookup": 1, "temperature": 1.0},
    }.items()
}
ADAPTED = {
    "lora": {},
    "dora": {"use_dora": True},
    "qlora": {"quantize_base": True, "num_layers": 2, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 256},
}
# Where both ranks share each matrix: a vocabulary of which each has half.
EVEN = {"vocab_size": 98, "num_layers": 3}
LOCAL_MODES = MODES | {name: OTHER_MODES[name] for name in ("tree", "look-up")}
# With biases and a tied head eager, with a head of its own compiled.
LOCAL = {"qwen2_tied": (MODES, False), "llama3": (LOCAL_MODES, True)}
# kept_layers, T
SPLITS = {"draft_whole": (E, 1), "all_sharded": (0, 1), "nothing_sharded": (L, 1), "tensor_parallel": (E, 2)}
SHARED_MODEL = sorted(SPLITS.keys() - {"nothing_sharded"})  # there each rank has a model of its own
# The models that are split so; qwen2 has biases and a tied head, which are sharded and split by tensor parallelism.
CASES = [("llama3", how) for how in SPLITS] + [("qwen2_tied", "draft_whole"), ("qwen2_tied", "tensor_parallel")]


def run(model, prompts=PROMPTS, new=NEW, **mode):
    return generate(model, prompts, new, **mode)


def sampled(model):
    return run(model, **MODES["speculative"], temperature=1.0, rng=torch.Generator().manual_seed(1)).tokens.tolist()


def other(model, mode):
    arguments = OTHER_MODES[mode]
    rng = {"rng": torch.Generator().manual_seed(1)} if arguments.get("temperature") else {}
    return run(model, new=10, **arguments, **rng).tokens.tolist()


@contextmanager
def confused_clock(clock=time.perf_counter):
    """Each rank measures times of its own."""
    draw = random.Random(dist.get_rank())
    time.perf_counter = lambda: clock() + draw.random()
    yield
    time.perf_counter = clock


# ---------------------------------------------------------------------------------------------------------- workers


def split(family, kept, dim, weights=None):
    """A tiny model over all ranks, whose weights rank 0 alone has."""
    state = (weights or make_tiny(family).state_dict()) if processes.is_rank_zero() else {}
    with torch.device("meta"):
        model = layerskip_decoder(FAMILIES[family]())
    return parallel.shard_decoder(model, state, CPU, torch.float32, kept, dim, base_llama_tp_plan())


def full_weights(model):
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}


def walks(model):
    """Logits of the whole walk, of two partial ones, and of layers called directly; outside of inference mode too."""
    tokens = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        half = model(tokens, exit_layer=4, unembed=False)
        direct = model.tok_embeddings(tokens)
        for layer in model.layers:
            direct = layer(direct)
        results = [model(tokens), model(hidden=half, start_layer=4), model.unembed(direct)]
    return [result.tolist() for result in results]


def decode_worker(folder):
    """Tokens, counts and walks of every split."""
    result = {}
    for family, how in CASES:
        model = split(family, *SPLITS[how])
        for mode, arguments in MODES.items():
            result[f"{family}/{how}/{mode}"] = run(model, **arguments).tokens.tolist()
        result[f"{family}/{how}/walks"] = walks(model)
        result[f"{family}/{how}/sampled"] = sampled(model)
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
        with CountedCollectives() as counted:
            out = run(model, PROMPTS[0], **MODES[mode])
        result[f"count/{mode}"] = [dict(counted.counts), out.stats.rounds, out.stats.tokens]
    # As torchtune's set_seed without a seed leaves them: each rank draws numbers of its own.
    torch.manual_seed(dist.get_rank())
    for how in SHARED_MODEL:
        model, rngs = split("llama3", *SPLITS[how]), (None, torch.Generator().manual_seed(dist.get_rank()))
        draws = [run(model, **MODES["speculative"], temperature=1.0, rng=rng) for rng in rngs]
        result[f"own seeds/{how}"] = [out.tokens.tolist() for out in draws]
    try:
        run(split("llama3", *SPLITS["draft_whole"]), [[5 + dist.get_rank()]], **MODES["speculative"])
    except ValueError as e:
        result["other prompts"] = str(e)
    result["received"] = processes.broadcast_from_rank0(torch.tensor([5, dist.get_rank()])).tolist()
    return result


def local_worker(folder):
    """Tokens of matrices that both ranks share, as plain tensors; also by graphs, of torch's own operations."""
    SIZE.update(EVEN)
    compile, result = torch.compile, {}
    torch.compile = lambda function, **_: compile(function, backend="eager", fullgraph=True)
    for family, (modes, compiled) in LOCAL.items():
        model = split(family, E, 2)
        result[f"{family}/torch's"] = [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
        result[f"{family}/halves"] = [*model.tok_embeddings.weight.shape, *model.layers[1].mlp.w2.weight.shape]
        for mode in modes:
            out = [run(model, prompts, **LOCAL_MODES[mode], compile=compiled) for prompts in (PROMPTS, PROMPTS[0])]
            result[f"{family}/{mode}"] = [generation.tokens.tolist() for generation in out]
        steps = compiled_steps(model)
        result[f"{family}/graphs"] = [len(steps.graphs), steps.failed, len(steps.refused)]
    return result


def load_worker(folder):
    """load_sharded_decoder, in bf16 from fp32 files, against load_decoder."""
    cfg = GenerateConfig.load(load_config(str(folder / "generate.yaml"), ["dtype=bf16"]))
    whole = load_decoder(cfg, CPU)
    if dist.get_rank() == 1:
        parallel.read_weights = None  # not to be called
    model = parallel.load_sharded_decoder(cfg, CPU, kept_layers=2)
    full = full_weights(model)
    buffers = dict(model.named_buffers())
    arguments = {"exit_layer": 2, "num_speculations": 3}
    return {
        "weights": full.keys() == whole.state_dict().keys()
        and all(torch.equal(full[n], p) and full[n].dtype == torch.bfloat16 for n, p in whole.state_dict().items()),
        "buffers": len(buffers) > 0 and all(torch.equal(buffers[n], b) for n, b in whole.named_buffers()),
        "training": model.training,
        "tokens": run(model, **arguments).tokens.tolist() == run(whole, **arguments).tokens.tolist(),
    }


def adapted_worker(folder):
    """Adapters of each kind, merged by load_sharded_decoder as load_decoder merges them, in bf16 from fp32 files."""
    result = {}
    for kind in ADAPTED:
        cfg = GenerateConfig.load(load_config(str(folder / f"{kind}.yaml"), ["dtype=bf16"]))
        whole = load_decoder(cfg, CPU)
        model = parallel.load_sharded_decoder(cfg, CPU, kept_layers=1)
        full = full_weights(model)
        arguments = {"exit_layer": 1, "num_speculations": 3}
        result[kind] = [
            full.keys() == whole.state_dict().keys(),
            all(torch.equal(full[n], p) for n, p in whole.state_dict().items()),
            run(model, **arguments).tokens.tolist() == run(whole, **arguments).tokens.tolist(),
        ]
    return result


def fail_worker(folder):
    """A user's mistake that only rank 1 meets, while rank 0 waits for it."""
    if dist.get_rank() == 1:
        check("temperature", -1, Temperature)
    processes.broadcast_from_rank0(torch.zeros(1))


def fail_load_worker(folder):
    """A checkpoint of another model, which rank 0 alone sees."""
    cfg = GenerateConfig.load(load_config(str(folder / "generate.yaml"), ["model.num_layers=3"]))
    parallel.load_sharded_decoder(cfg, CPU)


WORKERS = {
    f.__name__.removesuffix("_worker"): f
    for f in (decode_worker, local_worker, load_worker, adapted_worker, fail_worker, fail_load_worker)
}


def grid(folder):
    """2 x 2 ranks: sharded tensor-parallel layers. The ranks are threads of this process, with gloo between them."""
    from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg

    SIZE["intermediate_dim"] = 66  # 33 on each of the two tensor-parallel ranks, which cannot be halved again
    weights = make_tiny("qwen2_tied").state_dict()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    store = dist.HashStore()

    def rank(number):
        try:
            dist.init_process_group("gloo", rank=number, world_size=4, store=store)
            model = split("qwen2_tied", E, 2, weights)
            full = full_weights(model)
            # Few shapes of tensors, for each of which torch takes a while to find how it is split.
            result = {"tokens": run(model, new=4, exit_layer=E, num_speculations=1).tokens.tolist()}
            result["weights"] = all(torch.equal(full[name], value) for name, value in weights.items())
            result["halved"] = [
                model.layers[E].mlp.w1.weight.to_local().shape[0],
                full["layers.2.mlp.w1.weight"].shape[0],
            ]
            (folder / f"rank{number}.json").write_text(json.dumps(result))
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the other ranks would wait

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ------------------------------------------------------------------------------------------------------------ tests


def written(folder):
    """What each rank wrote."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]


def fork(what, folder, processes=2):
    """Run a worker on so many forks; returns them, finished."""
    return run_on_ranks(__file__, what, folder, cwd=folder, processes=processes)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """What both ranks of decode_worker have."""
    folder = tmp_path_factory.mktemp("decode")
    check_success(fork("decode", folder))
    ranks = written(folder)
    assert len(ranks) == 2
    return ranks


@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_tokens_of_one_process(decoded, family, how):
    alone = layerskip_decoder(make_tiny(family))
    for rank in decoded:
        for mode, arguments in MODES.items():
            assert rank[f"{family}/{how}/{mode}"] == run(alone, **arguments).tokens.tolist()
        assert rank[f"{family}/{how}/speculative"] == rank[f"{family}/{how}/autoregressive"]


def test_parts_of_matrices_as_plain_tensors(tmp_path, monkeypatch):
    """Two rows and one, by chains, trees and look-ups; nothing of torch's own tensor parallelism is left."""
    check_success(fork("local", tmp_path))
    for name, value in EVEN.items():
        monkeypatch.setitem(SIZE, name, value)
    for rank in written(tmp_path):
        for family, (modes, compiled) in LOCAL.items():
            alone = layerskip_decoder(make_tiny(family))
            assert rank[f"{family}/torch's"] == []
            assert rank[f"{family}/halves"] == [49, SIZE["embed_dim"], SIZE["embed_dim"], SIZE["intermediate_dim"] / 2]
            for mode in modes:
                expected = [
                    run(alone, prompts, **LOCAL_MODES[mode]).tokens.tolist() for prompts in (PROMPTS, PROMPTS[0])
                ]
                assert rank[f"{family}/{mode}"] == expected
            graphs, failed, refused = rank[f"{family}/graphs"]
            assert (graphs > len(modes)) == compiled and not failed and refused == 0


@pytest.mark.parametrize("mode", OTHER_MODES)
def test_ranks_choose_alike_whatever_their_clocks_say(decoded, mode):
    """Greedy tokens are one process's; which are sampled follows from what is drafted when, but is alike on all."""
    assert decoded[0][f"other/{mode}"] == decoded[1][f"other/{mode}"]
    if not mode.endswith(", sampled") or mode == "tree, sampled":
        assert decoded[0][f"other/{mode}"] == other(layerskip_decoder(make_tiny("llama3")), mode)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_sampled_tokens_of_one_process(decoded, family, how):
    alone = sampled(layerskip_decoder(make_tiny(family)))
    assert all(rank[f"{family}/{how}/sampled"] == alone for rank in decoded)


@pytest.mark.parametrize("how", SHARED_MODEL)
def test_ranks_with_seeds_of_their_own_draw_alike(decoded, how):
    """By rank 0's generator: with tensor parallelism drafts that differ would be the sums of different tokens."""
    rng = torch.Generator().manual_seed(0)
    expected = run(layerskip_decoder(make_tiny("llama3")), **MODES["speculative"], temperature=1.0, rng=rng)
    ours, theirs = (rank[f"own seeds/{how}"] for rank in decoded)
    assert ours == theirs and ours[1] == expected.tokens.tolist()


@pytest.mark.parametrize(("family", "how"), CASES)
def test_walks_in_parts_and_layers_called_directly(decoded, family, how):
    whole = walks(layerskip_decoder(make_tiny(family)))[0]
    for rank in decoded:
        for logits in rank[f"{family}/{how}/walks"]:
            # Tensor parallelism adds up the parts of a sum in another order.
            tolerance = 1e-3 if how == "tensor_parallel" else 0
            torch.testing.assert_close(torch.tensor(logits), torch.tensor(whole), atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", ["llama3", "qwen2_tied"])
def test_each_rank_has_half_of_the_late_layers(decoded, family):
    names = [name for name, _ in make_tiny(family).named_parameters()]
    late = [name for name in names if name.startswith("layers.") and int(name.split(".")[1]) >= E]
    assert len(late) == len([n for n in names if n.startswith("layers.")]) * (L - E) / L
    assert all(rank[f"{family}/halved"] == late for rank in decoded)


def test_collectives_per_token(decoded):
    """A verification gathers each late layer once, and so does the prompt; a draft gathers nothing. Rank 0 tells the
    others what came out. Once they compare their prompts: how long what they say is, and it."""
    compared = 2
    for rank in decoded:
        counts, rounds, tokens = rank["count/speculative"]
        plain, _, plain_tokens = rank["count/autoregressive"]
        assert counts == {"all_gather": (1 + rounds) * (L - E) + compared, "broadcast": 1 + rounds}
        assert plain == {"all_gather": plain_tokens * L + compared, "broadcast": plain_tokens}
        assert tokens == plain_tokens == NEW
        assert counts["all_gather"] / tokens < plain["all_gather"] / plain_tokens


def test_ranks_with_other_prompts_are_refused(decoded):
    assert all(rank["other prompts"].startswith("prompt: differs between ranks") for rank in decoded)


def test_broadcast_from_rank0(decoded):
    assert [rank["received"] for rank in decoded] == [[5, 0], [5, 0]]
    alone = torch.tensor([5, 1])
    assert processes.broadcast_from_rank0(alone) is alone


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory, tokenizer_folder):
    """A folder with a checkpoint and generate.yaml."""
    folder = tmp_path_factory.mktemp("load")
    generate_config(folder, make_checkpoint(folder / "checkpoint", tokenizer_folder))
    return folder


def test_adapters_are_merged_as_one_process_merges_them(tmp_path, tokenizer_folder):
    """QLoRA's onto what NF4 left of the weights."""
    for kind, changes in ADAPTED.items():
        plain = {"_component_": MODEL["_component_"]} | {name: changes.get(name, MODEL[name]) for name in MODEL_SIZE}
        section = plain | changes | {
            "_component_": f"{MODEL['_component_'].rpartition('.')[0]}.lora_llama3_2",
            "lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8,
        }  # fmt: skip
        torch.manual_seed(0)
        model = config.instantiate(OmegaConf.create(section))
        for name, parameter in model.named_parameters():
            if name.endswith("magnitude"):
                torch.nn.init.uniform_(parameter, 1, 2)
            elif parameter.dim() > 1 and not isinstance(parameter, NF4Tensor):
                torch.nn.init.normal_(parameter, std=0.3)
        (folder := tmp_path / kind).mkdir()
        torch.save(get_adapter_params(model), folder / "adapter_model.pt")
        base = config.instantiate(OmegaConf.create(plain))
        for parameter in base.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        torch.save(base.state_dict(), folder / "model.pt")
        reader = {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer", "checkpoint_dir": str(folder),
            "checkpoint_files": ["model.pt"], "adapter_checkpoint": str(folder / "adapter_model.pt"),
            "output_dir": str(folder), "model_type": "LLAMA3_2",
        }  # fmt: skip
        changed = {"model": section, "checkpointer": reader}
        generate_config(folder, tokenizer_folder, **changed).rename(tmp_path / f"{kind}.yaml")
    check_success(fork("adapted", tmp_path))
    assert written(tmp_path) == [{kind: [True, True, True] for kind in ADAPTED}] * 2


def test_only_rank_zero_reads_the_checkpoint(config_folder):
    check_success(fork("load", config_folder))
    assert written(config_folder) == [{"weights": True, "buffers": True, "training": False, "tokens": True}] * 2


def test_an_error_of_rank_1_ends_rank_0(config_folder):
    """Which waits for it, and has nothing to say."""
    zero, one = fork("fail", config_folder)
    assert (zero.returncode, one.returncode) == (1, 1)
    assert last_line(one.stderr).startswith("ValueError: temperature: -1 ")
    assert "ValueError" not in zero.stderr


def test_an_error_of_rank_0_ends_rank_1(config_folder):
    """Under torchrun, which shows it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, __file__, "fail_load", str(config_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "ValueError: checkpointer: the checkpoint is not this" in done.stderr


def test_a_grid_of_shards_and_tensor_parallel_ranks(tmp_path, monkeypatch):
    check_success(fork("grid", tmp_path, processes=1))
    ranks = written(tmp_path)
    assert len(ranks) == 4 and all(rank["weights"] for rank in ranks)
    assert [rank["halved"] for rank in ranks] == [[17, 66], [17, 66], [16, 66], [16, 66]]
    monkeypatch.setitem(SIZE, "intermediate_dim", 66)
    alone = layerskip_decoder(make_tiny("qwen2_tied"))
    expected = run(alone, new=4).tokens.tolist()
    assert all(rank["tokens"] == expected for rank in ranks)


PLAN = {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}


def work(what, folder):
    faulthandler.dump_traceback_later(300, exit=True)  # a torchrun that is killed leaves those that wait for others
    number = processes.init_processes("cpu")
    result = WORKERS[what](folder)
    (folder / f"rank{number}.json").write_text(json.dumps(result))
    processes.end_processes()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    arguments = sys.argv[1], Path(sys.argv[2])
    if arguments[0] == "grid":
        grid(arguments[1])
    else:
        run_cli(lambda: work(*arguments))
