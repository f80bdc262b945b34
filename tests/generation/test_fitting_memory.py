"""What a generation takes of the memory, and the messages where there is too little."""

from types import SimpleNamespace

import pytest
import torch
from helpers.configs import LAYER, MODEL, REST, SLOT, benchmark_config
from helpers.decoding import model_of
from omegaconf import OmegaConf
from torchao.quantization import Int8WeightOnlyConfig
from torchtune import config as tune_config

from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.fitting_memory import check_memory
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.model.memory import free_memory, machine_memory, row_bytes, weight_bytes


@pytest.fixture
def with_memory(monkeypatch):
    """Gives the machine so many bytes."""
    return lambda size: monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": size, "SC_PAGE_SIZE": 1}.get)


@pytest.mark.parametrize("draft_layers", [1, 2, 6, 8])
def test_a_drafts_layers_have_slots_and_so_does_another_cache_for_plain_decoding(draft_layers):
    """Keys and values of one head of 8 channels in fp32 for each of the six layers."""
    model = model_of("llama3_2")
    slot = 2 * 8 * 4 * model.layers[0].attn.num_kv_heads
    row, longer = (row_bytes(model, length, torch.float32, 3, draft_layers) for length in (10, 20))
    assert longer - row == 10 * (6 + draft_layers) * slot


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("draft", ["", "self_speculation.num_speculations=5", "self_speculation=null"])
def test_weights_caches_and_drafts_must_fit_the_memory(path, with_memory, compiled, draft):
    """To the byte: two rows of the prompt, 24 new tokens, and the draft; compiled, of the size that steps know. A layer
    reads the prompt of one token with three states of the feed-forward network's width, 48, and six of the model's; a
    step has three results in fp32 for each token of a verification."""
    overrides = ["batch_size=2", "prompt=[a, b]", f"compile={str(compiled).lower()}", *filter(None, [draft])]
    nodes = {"": 4, "self_speculation=null": 1}.get(draft, 6)
    slots = 256 + 128 if compiled else 1 + 24 + nodes
    weights, row = 4 * (4 * LAYER + REST), slots * SLOT + 4 * (3 * 48 + 6 * 32) + nodes * 3 * 4 * MODEL["vocab_size"]

    def load(memory):
        with_memory(memory)
        LayerSkipGenerate(load_config(str(path), overrides))

    load(weights + 2 * row)
    message = r"^batch_size: caches, prompts and steps of 2 rows .* weights take .* up to 1; for example batch_size=1$"
    with pytest.raises(ValueError, match=message):
        load(weights + 2 * row - 1)
    message = rf"^max_new_tokens: .* Allowed here: up to {slots - 1} positions"
    with pytest.raises(ValueError, match=message):
        load(weights + row - 1)
    with pytest.raises(ValueError, match=r"^model: .*dtype=bf16"):
        load(weights)


@pytest.mark.slow
def test_quantised_weights_must_fit_the_memory(path, with_memory):
    """Matrices have a byte for each weight, and for each row a scale in fp32 and, before torchao 0.15, a zero point in
    int64; the embedding, whose copy is the head, and the norms stay in fp32."""
    matrices, rows = 4 * (LAYER - 64) + REST - 32, 4 * (32 + 16 + 16 + 32 + 48 + 48 + 32) + MODEL["vocab_size"]
    zero_point = 0 if hasattr(Int8WeightOnlyConfig, "version") else 8
    weights = matrices + (4 + zero_point) * rows + 4 * (REST + 4 * 64)
    row = (1 + 100 + 4) * SLOT + 4 * (3 * 48 + 6 * 32) + 4 * 3 * 4 * MODEL["vocab_size"]
    quantizer = "quantizer._component_=torchao.quantization.Int8WeightOnlyConfig"

    def load(memory):
        with_memory(memory)
        LayerSkipGenerate(load_config(str(path), ["prompt=[a, b]", "batch_size=2", "max_new_tokens=100", quantizer]))

    load(weights + 2 * row)
    with pytest.raises(ValueError, match=r"^batch_size: .*batch_size=1$"):
        load(weights + 2 * row - 1)
    with pytest.raises(ValueError, match=r"^model: .*quantised.*dtype=bf16"):
        load(4 * (4 * LAYER + REST) - 1)


def test_a_benchmark_must_fit_the_memory(tmp_path, checkpoint, with_memory):
    """The longest draft of its variants counts, and the token before it."""
    variants = {"long": {"exit_layer": 2, "num_speculations": 6}, "short": {"exit_layer": 2, "num_speculations": 2}}
    path = benchmark_config(tmp_path, checkpoint, prompt=["a", "b"], batch_size=2, variants=variants)
    need = 4 * (4 * LAYER + REST) + 2 * ((1 + 16 + 7) * SLOT + 4 * (3 * 48 + 6 * 32) + 7 * 3 * 4 * MODEL["vocab_size"])
    with_memory(need)
    LayerSkipBenchmark(load_config(str(path)))
    with_memory(need - 1)
    with pytest.raises(ValueError, match=r"^batch_size: .*batch_size=1$"):
        LayerSkipBenchmark(load_config(str(path)))


@pytest.mark.parametrize(("kept", "shards", "parallel", "bytes_"), [
    (0, 1, 1, 2 * (4 * LAYER + REST)),
    (2, 1, 1, 2 * (4 * LAYER + REST)),
    (2, 2, 1, 2 * (2 * LAYER + REST + LAYER)),
    (0, 4, 1, 2 * (REST + LAYER)),
    (2, 2, 2, 2 * (2 * LAYER + REST + LAYER) // 2),
])  # fmt: skip
def test_a_process_holds_its_shards_and_the_whole_draft(kept, shards, parallel, bytes_):
    """In bf16: layers below the exit whole, the others sharded; matrices split by tensor parallelism."""
    with torch.device("meta"):
        model = tune_config.instantiate(OmegaConf.create(MODEL))
    assert weight_bytes(model, torch.bfloat16, kept, shards, parallel) == bytes_


def test_ranks_that_share_heads_share_their_caches(with_memory, monkeypatch):
    """6 layers x 2 (keys, values) x 2 heads x 8 x 100 positions x 4 bytes = 76,800 bytes a row. A step's logits, scores
    and noise are whole on each rank."""
    model = model_of("llama3_2")
    cfg = SimpleNamespace(meta_model=model, torch_dtype=torch.float32, quantizer=None, compile=False)
    rows = 2 * (76_800 // 2 + 3 * 4 * model.tok_embeddings.num_embeddings)
    memory = weight_bytes(model, torch.float32, parallel=2) + rows
    monkeypatch.setattr("layerskip_recipes.generation.fitting_memory.num_processes", lambda: 2)

    def check(memory):
        with_memory(memory)
        check_memory(cfg, torch.device("cpu"), [], rows=2, prompt=0, new_tokens=99, parallel=2)

    check(memory)
    with pytest.raises(ValueError, match=r"^batch_size: .* 2 rows .*up to 1"):
        check(memory - 1)


GIB = 2**30
AVAILABLE = "MemTotal: 99 kB\nMemAvailable: 16777216 kB\nHugePages_Total: 0\n"
CACHED = f"anon 5\ninactive_file {GIB // 2}\nactive_file {GIB // 2}\n"


@pytest.mark.parametrize(
    ("files", "limit", "free"),
    [
        ({}, 64, 64),
        ({"proc/meminfo": AVAILABLE}, 64, 16),
        # Version 2: a container sees its own group at the mount. Each group above may have the least limit.
        ({"proc/self/cgroup": "0::/", "memory.max": 4 * GIB, "memory.current": GIB}, 4, 3),
        ({"proc/self/cgroup": "0::/", "memory.max": "max", "memory.current": GIB, "proc/meminfo": AVAILABLE}, 64, 16),
        ({"proc/self/cgroup": "0::/", "memory.max": 8 * GIB, "memory.high": 6 * GIB, "memory.current": 0}, 6, 6),
        ({"proc/self/cgroup": "0::/a/b", "a/b/memory.max": "max", "a/memory.max": 8 * GIB, "memory.max": 2**40}, 8, 8),
        (
            {"proc/self/cgroup": "0::/a/b", "a/b/memory.max": 8 * GIB, "a/b/memory.current": 2 * GIB}
            | {"a/memory.max": 9 * GIB, "a/memory.current": 6 * GIB, "a/memory.stat": CACHED},
            8,
            4,
        ),
        ({"proc/self/cgroup": "0::/", "memory.max": GIB, "memory.current": 2 * GIB}, 1, 0),
        # Version 1, alone or beside version 2; Docker's path is that of the host. No limit is a huge number.
        ({"proc/self/cgroup": "3:memory:/docker/1", "memory/memory.limit_in_bytes": 4 * GIB}, 4, 4),
        ({"proc/self/cgroup": "3:cpu:/\n0::/", "memory/memory.limit_in_bytes": 4 * GIB}, 64, 64),
        (
            {"proc/self/cgroup": "5:cpu,memory:/slurm/1\n0::/", "memory/slurm/1/memory.limit_in_bytes": 2**63 - 4096}
            | {"memory/slurm/memory.limit_in_bytes": 8 * GIB, "memory/slurm/memory.usage_in_bytes": 3 * GIB}
            | {"memory/slurm/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file 0\n"},
            8,
            6,
        ),
        ({"proc/self/cgroup": "1:memory:/\n0::/s", "unified/s/memory.max": 2 * GIB}, 2, 2),
    ],
)  # fmt: skip
def test_limits_of_containers_and_jobs_count_as_the_machines_memory(files, limit, free, tmp_path, with_memory):
    """In GiB, on a machine of 64; files without a folder are those of the control group at the mount."""
    with_memory(64 * GIB)
    for name, content in files.items():
        file = tmp_path / name if name.startswith("proc/") else tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    assert machine_memory(tmp_path) == limit * GIB
    assert free_memory(torch.device("cpu"), tmp_path) == free * GIB


def test_this_machine_has_free_memory():
    assert 0 < free_memory(torch.device("cpu")) <= machine_memory()
