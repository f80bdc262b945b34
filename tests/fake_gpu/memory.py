"""Trains, measures exits and decodes on a fake GPU, and prints the most bytes that were alive beside the plan's:
`python start.py memory.py FOLDER CASES`. The model is Qwen3 8B, in most cases with fewer layers."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from stand_in_gpu import CUDA, FakeGPU, fake_gpu, to_fake_gpu
from torch import nn

from layerskip_recipes import Generation, Speculation, layerskip_decoder
from layerskip_recipes.acceptance import exit_quality
from layerskip_recipes.acceptance.measuring import measured_acceptance
from layerskip_recipes.acceptance.trained_exits import MOST_TOKENS
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.fitting_memory import decoding_memory
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.training import model_setup, stochastic_adamw
from layerskip_recipes.training.auto_settings import TrainingMemory
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.draft_loss import DraftLoss
from layerskip_recipes.training.label_counts import LabelCounts
from layerskip_recipes.training.optimizers import Optimizers
from layerskip_recipes.training.parallel import Mesh
from layerskip_recipes.training.recipe import LayerSkipFinetune
from layerskip_recipes.training.run_log import LossMeans
from layerskip_recipes.training.validation import Validation

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
}
FEW_LAYERS = 4
H100, RTX_4090 = 85_520_809_984, 25_757_220_864  # bytes that they report
# By name: the config hf/*, the GPU's memory, the number of layers, and overrides. All 36 layers take 10 to 20 s.
TRAININGS: dict[str, tuple[str, int, int, list[str]]] = {
    "full": ("full", RTX_4090, FEW_LAYERS, ["gradient_accumulation_steps=2"]),
    "full without checkpointing": (
        "full",
        RTX_4090,
        FEW_LAYERS,
        ["enable_activation_checkpointing=false", "batch_size=1", "gradient_accumulation_steps=2"],
    ),
    "lora": ("lora", H100, FEW_LAYERS, []),
    "lora with checkpointing": ("lora", RTX_4090, FEW_LAYERS, ["enable_activation_checkpointing=true", "batch_size=8"]),
    "draft": ("draft", H100, 36, []),
    "draft for one sample": ("draft", RTX_4090, FEW_LAYERS, ["batch_size=1"]),
}
NEW_TOKENS = 64
DECODINGS: dict[str, dict[str, Any]] = {
    "one row": {"prompts": [[5] * 2048], "speculation": Speculation(2, 6)},
    "rows": {"prompts": [[5] * 1024] * 32, "speculation": Speculation(2, 3)},
    "sampled rows": {"prompts": [[5] * 256] * 32, "speculation": Speculation(2, 6), "sampler": Sampler(0.8, top_p=0.9)},
    "plain rows": {"prompts": [[5] * 2048] * 16, "speculation": None},
}


def read(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """What the host reads: tokens [b], the outcome of a round [b, 2 + n], of which one token is right, or ones."""
    if len(shape) == 2 and dtype is torch.long:
        return [[1, *[5] * (shape[1] - 1)]] * shape[0]
    return [5] * shape[0] if len(shape) == 1 else 1


def attention(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, **_: Any) -> torch.Tensor:
    """The kernels that a GPU takes; torch for a CPU would take one that holds all scores."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    bias = attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False)[0]


def expected_rounds(accept_rate: Any, text: Any, longest: int, confidence: Any = None) -> Any:
    """Made-up results; the host would compute for seconds."""
    rounds = torch.ones(*accept_rate.first.shape[:-1], longest)
    return rounds, rounds


@contextmanager
def card(total: int) -> Iterator[None]:
    properties = SimpleNamespace(total_memory=total)
    names = {"is_available": lambda: True, "is_bf16_supported": lambda **_: True}
    with mock.patch.multiple(torch.cuda, get_device_properties=lambda *_: properties, **names):
        yield


@contextmanager
def gpu_with(*modules: nn.Module) -> Iterator[FakeGPU]:
    """The fake GPU with these modules' weights. The optimizer's compiled step needs no memory."""
    with fake_gpu(read) as gpu, ExitStack() as patches:
        patches.enter_context(mock.patch.object(stochastic_adamw, "update_on_gpu", lambda *_: None))
        patches.enter_context(mock.patch.object(exit_quality, "expected_rounds", expected_rounds))
        patches.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        to_fake_gpu(*modules)
        for module in modules:
            gpu.memory.see([*module.parameters(), *module.buffers()])
        yield gpu


def recipe_of(cfg: FinetuneConfig) -> LayerSkipFinetune:
    """What the recipe's constructor and `setup` make, with weights on the meta device and without data."""
    nothing = mock.Mock(return_value={})
    names = dict.fromkeys(("check_state_dict", "fresh_adapters", "fresh_draft"), nothing)
    recipe = LayerSkipFinetune.__new__(LayerSkipFinetune)
    recipe.cfg, recipe.mesh, recipe.device = cfg, Mesh(), CUDA
    recipe.step, recipe.total_steps, recipe._has_learned = 0, 10, False
    with mock.patch.multiple(model_setup, **names), mock.patch.object(nn.Module, "load_state_dict", nothing):
        recipe.model, recipe.draft = model_setup.build_model(cfg, torch.device("meta"), Mesh(), {}, None, {}, 0)
    recipe.learner, recipe.loss = recipe.model, cfg.exit_loss
    if recipe.draft is not None:
        recipe.learner = recipe.draft
        recipe.draft.vocabulary = [*range(cfg.draft.vocabulary)]
        recipe.loss = DraftLoss(cfg.draft, recipe.draft)
    recipe.data, recipe.log, recipe.progress = mock.MagicMock(), mock.MagicMock(), mock.MagicMock()
    recipe.losses, recipe.offloading = LossMeans(), nullcontext()
    return recipe


def train(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The peak of the second step, and that of a measurement after it."""
    config, total, layers, overrides = TRAININGS[name]
    (folder / "config.json").write_text(json.dumps(QWEN3_8B | {"num_hidden_layers": layers}))
    with card(total), mock.patch.object(RecipeConfig, "check_together", lambda self: None):
        cfg = FinetuneConfig.load(load_config(f"hf/{config}", [f"model_dir={folder}", "device=cuda", *overrides]))
        memory = TrainingMemory(cfg, "cuda")
        shape = (cfg.batch_size, cfg.tokenizer.get("max_seq_len"))
        recompute = cfg.enable_activation_checkpointing
        planned = memory.needed(cfg.dtype, *shape, recompute)
    recipe = recipe_of(cfg)
    with gpu_with(recipe.model, *([] if recipe.draft is None else [recipe.draft])) as gpu:
        recipe.labels = LabelCounts(recipe.mesh, CUDA, QWEN3_8B["vocab_size"])
        recipe.optimizers = Optimizers(cfg, recipe.learner, None, recipe.total_steps, 0)
        batches = iter(lambda: {name: torch.ones(shape, dtype=torch.long) for name in ("tokens", "labels")}, None)
        for _ in range(2):
            gpu.memory.restart()
            recipe._train_step(batches)
        chosen = {"dtype": cfg.dtype, "shape": shape, "recompute": recompute}
        yield {"case": name, **chosen, "peak": gpu.memory.restart(), "planned": planned}
        # As before a save.
        validation = Validation(cfg, SimpleNamespace(), CUDA, recipe.mesh)
        vocabulary = [*range(MOST_TOKENS)]
        measured_acceptance(
            validation.quality, "training", [next(batches)], recipe.model, [1], vocabulary, draft=recipe.draft
        )
        yield {
            "case": f"{name}, measuring",
            "peak": gpu.memory.peak,
            "planned": memory.needed_at_save(cfg.dtype, math.prod(shape)),
        }


def decode(name: str, folder: Path) -> dict[str, Any]:
    """The peak of the prefill and of the first rounds."""
    arguments = DECODINGS[name]
    (folder / "config.json").write_text(json.dumps(QWEN3_8B | {"num_hidden_layers": FEW_LAYERS}))
    with card(H100), mock.patch.object(RecipeConfig, "check_together", lambda self: None):
        cfg = GenerateConfig.load(load_config("hf/generate", [f"model_dir={folder}", "device=cuda", "compile=false"]))
    prompts, speculation = arguments["prompts"], arguments["speculation"]
    plans = [] if speculation is None else [speculation]
    plan = decoding_memory(cfg, plans, len(prompts[0]), NEW_TOKENS)
    model = layerskip_decoder(cfg.build_on_meta()).requires_grad_(False).eval()
    with gpu_with(model) as gpu:
        generation = Generation(model, max_generated_tokens=NEW_TOKENS, **arguments)
        for round_number, _ in enumerate(generation):
            if round_number == 2:
                break
        return {"case": name, "peak": gpu.memory.peak, "planned": plan.needed(len(prompts))}


def main(folder: Path, *cases: str) -> None:
    for case in cases or [*TRAININGS, *DECODINGS]:
        for line in train(case, folder) if case in TRAININGS else [decode(case, folder)]:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
