"""Steps in C++ (few_rows.cpp, attention.cpp, layers.cpp): the numbers of torch's own modules for each family and
precision, the same bits for any number of rows, and the same tokens in every way of decoding."""

import copy
import itertools
import os
import platform
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from helpers.compiled import compiled_steps, has_compiler, run
from helpers.speculation import PROMPTS, VARIANTS, AlwaysLookUp, drafting
from helpers.tiny import EXAONE4, GEMMA3, GRANITE, LFM2, OLMO3, QWEN3, SIZE
from torch.utils.cpp_extension import include_paths
from torchao.quantization import (
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    quantize_,
)
from torchtune.models.gemma._component_builders import gemma
from torchtune.models.gemma2._component_builders import gemma2
from torchtune.models.llama3._component_builders import llama3
from torchtune.models.llama3_2._component_builders import llama3_2, lora_llama3_2
from torchtune.models.phi3._component_builders import phi3
from torchtune.models.qwen2._component_builders import qwen2

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.families.hf_decoder import build_decoder
from layerskip_recipes.families.reading import parse_hf_config
from layerskip_recipes.generation import backends
from layerskip_recipes.generation.backends import CppBackend, GraphBackend
from layerskip_recipes.generation.drafting import chain
from layerskip_recipes.generation.drafting.draft_weights import DraftHead
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels import cpp_decoder, huge_pages
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.kernels.cpp_decoder import SOURCES, load_library
from layerskip_recipes.generation.kernels.huge_pages import PAGE, use_huge_pages
from layerskip_recipes.generation.prefill import read_texts
from layerskip_recipes.generation.sampling import Sampler, choose_tokens, noise_keys
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.kv_cache import DecodingCache

pytestmark = [pytest.mark.slow, has_compiler]  # slow: the C++ is compiled first

L = 3
WIDE = SIZE | {"num_layers": L, "num_heads": 2, "num_kv_heads": 1}  # heads of 16 numbers, the width of a vector
FEW = {"num_hidden_layers": L, "num_attention_heads": 2, "num_key_value_heads": 1}
HF = QWEN3 | FEW
PHI3 = {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5}


def of_folder(config, name):
    """Builds the model of a config.json."""
    return lambda: build_decoder(parse_hf_config(config, name), 128)


FAMILIES = {
    "llama3": partial(llama3, **WIDE),
    "llama3_2": partial(llama3_2, **WIDE | {"num_heads": 4, "num_kv_heads": 4, "embed_dim": 64}),
    "qwen2": partial(qwen2, **WIDE),
    "gemma": partial(gemma, **WIDE, head_dim=16),
    "gemma2": partial(gemma2, **WIDE | {"num_heads": 4, "num_kv_heads": 2}, head_dim=16, sliding_window_size=128),
    "phi3": partial(phi3, **WIDE),
    "qwen3": of_folder(HF, "qwen3"),
    "gemma3": of_folder(GEMMA3 | FEW | {"query_pre_attn_scalar": 256}, "gemma3"),
    "granite": of_folder(GRANITE | FEW, "granite"),
    "lfm2": of_folder(LFM2 | FEW | {"layer_types": ["conv", "full_attention", "conv"]}, "lfm2"),
    "olmo3": of_folder(OLMO3 | FEW, "olmo3"),
    "exaone4": of_folder(EXAONE4 | FEW | {"sliding_window_pattern": 2}, "exaone4"),
    "a part of each head turns": of_folder(HF | PHI3, "phi3"),
}


CPU = torch.device("cpu")


def make_model(family, precision="fp32"):
    torch.manual_seed(3)
    model = FAMILIES[family]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    model = layerskip_decoder(model).eval()
    if precision.startswith("int8"):
        quantize_(model, Int8WeightOnlyConfig(version=int(precision[-1])))
    if precision == "int4":
        quantize_(model, Int8DynamicActivationInt4WeightConfig(group_size=16))
    return model.to(torch.bfloat16) if precision == "bf16" else model


make = cache(make_model)  # for tests that leave the model as it is


def exact(model):
    """The model with the same weights in fp64."""
    model = copy.deepcopy(model)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            weight = weight if type(weight) is torch.nn.Parameter else weight.dequantize()
            module.weight = torch.nn.Parameter(weight.detach().double())
    return model.double()


@torch.no_grad()
def in_cpp(model, texts, s):
    """Logits [b, s, v] of the last s tokens of texts of one length, the ones before them read by torch."""
    context = StepContext(model, DecodingCache(model, len(texts), 160), Sampler())
    with context.cache.used_by(model):
        tokens, length = torch.tensor(texts), len(texts[0]) - s
        read = max(length, 1)  # caches are allocated by torch
        layers, slots = range(model.num_layers), context.cache.slots
        context.backend.run(model, tokens[:, :read], torch.arange(read)[None], slots[:read], layers)
        backend = StepContext(model, context.cache, Sampler(), CompiledSteps(CPU)).backend
        assert isinstance(backend, CppBackend)
        at = (length + torch.arange(s)).expand(len(texts), -1)
        return backend.run(model, tokens[:, length:], at, slots[: length + s], layers, unembed=True)


def texts_of(rows, length):
    return torch.randint(0, SIZE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        *((family, "fp32") for family in FAMILIES),
        *((family, "bf16") for family in ("llama3", "gemma", "gemma2", "granite", "lfm2", "olmo3")),
        *((family, "int8 of version 2") for family in ("llama3", "llama3_2", "gemma2", "lfm2")),
        ("llama3", "int8 of version 1"),
    ],
)
def test_logits_are_those_of_the_model_in_fp64(family, precision):
    """Two rows, behind a text and from its first token on, against the whole text in fp64 without a cache."""
    model = make(family, precision)
    near = 3e-2 if precision == "bf16" else 1e-4  # of the largest logit; the cache is in bf16 too
    for s, length in ((3, 40), (1, 100), (9, 9)):
        texts = texts_of(2, length)
        with torch.no_grad():
            expected = exact(model)(torch.tensor(texts))[:, -s:]
        torch.testing.assert_close(
            in_cpp(model, texts, s).double(), expected.double(), rtol=0, atol=near * expected.abs().max().item()
        )


@pytest.mark.parametrize(
    ("family", "draft"), [*((family, None) for family in FAMILIES), ("llama3_2", "copy"), ("gemma2", "adapter")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_texts_are_read_as_torch_reads_them(precision, family, draft, monkeypatch):
    """What the caches hold and the last token's state, of two texts; at once, and in bf16 in parts behind three tokens
    that are there already."""
    model, texts = make(family, precision), [texts_of(1, length)[0] for length in (30, 19)]
    draft_decoder = None if draft is None else Draft(model, draft, 1).requires_grad_(False).eval().decoder(model)
    parts, near = ({}, 1e-5) if precision == "fp32" else ({"reused": 3}, 3e-2)
    monkeypatch.setattr(backends, "CPP_CHUNK", 30 if precision == "fp32" else 7)
    read = []
    for compiled in (None, CompiledSteps(CPU)):
        cache = DecodingCache(model, 2, 64, 0 if draft_decoder is None else len(draft_decoder.trained_layers))
        context = StepContext(model, cache, Sampler(), compiled, draft_decoder)
        with torch.inference_mode(), cache.used_by(*{model, context.draft_decoder}), monkeypatch.context() as patched:
            if parts:
                read_texts(
                    StepContext(model, cache, Sampler(), draft_decoder=draft_decoder),
                    [text[:3] for text in texts],
                )
            if compiled is not None:
                patched.setattr(LayerSkipDecoder, "forward", None)  # torch reads nothing
            read.append([read_texts(context, texts, **parts)])
        for buffer in [buffer for layer in cache.layers for buffer in (layer.k, layer.v)]:
            read[-1] += [buffer[row, :, : len(text)] for row, text in enumerate(texts)]
    for by_torch, by_cpp in zip(*read, strict=True):
        atol = near * by_torch.abs().max().item()
        torch.testing.assert_close(by_cpp.float(), by_torch.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("variant", [None, "chain"])
def test_rows_are_read_in_bf16_as_they_are_alone(variant, monkeypatch):
    """Texts of one chunk and of several, all at a time and in two rows one after the other."""
    monkeypatch.setattr(backends, "CPP_CHUNK", 8)
    model, texts = talking("bf16"), texts_of(6, 40)
    drafts = drafting(variant, model)
    prompts = [text[:length] for text, length in zip(texts, (5, 30, 8, 9, 40, 3), strict=True)]

    def decode(prompts, **more):
        generation = run(model, prompts, 20, **drafts, **more)
        in_row = zip(generation.in_row, generation.cache.layers[-1].k, strict=True)
        return generation.generated, {len(prompts[i]): k[:, : len(prompts[i])].clone() for i, k in in_row}

    alone, caches = zip(*(decode([prompt]) for prompt in prompts), strict=True)
    expected = {length: keys for cache in caches for length, keys in cache.items()}
    for rows in (None, 2):
        generated, found = decode(prompts, rows=rows)
        assert generated == [tokens for (tokens,) in alone]
        assert found and all(torch.equal(keys, expected[length]) for length, keys in found.items())


def test_a_long_prompt_can_be_left_between_two_chunks(monkeypatch):
    """The server stops there if its client has left; the next generation is as ever."""
    monkeypatch.setattr(backends, "CPP_CHUNK", 8)
    model, prompts = talking("fp32"), texts_of(1, 40)
    expected = run(model, prompts, 5).generated
    left = Generation(model, prompts, 5, compile=True)
    chunks = iter([None, None, ConnectionAbortedError()])

    def leave():
        if (error := next(chunks)) is not None:
            raise error

    left.context.before_chunk = leave
    with pytest.raises(ConnectionAbortedError):
        next(iter(left))
    assert run(model, prompts, 5).generated == expected


@pytest.fixture
def load_again():
    """Loads the library as a new process does."""

    folder = cpp_decoder._library_folder

    def forget():
        load_library.cache_clear()
        folder.cache_clear()

    def load():
        forget()
        load_library()

    yield load
    forget()


def test_compiled_code_is_of_one_torch_compiler_and_processor(load_again, monkeypatch):
    """An upgrade must not load the library of the version before, nor another machine that shares the cache."""
    from torch._inductor.codecache import CppCodeCache

    sources = []
    monkeypatch.setattr(CppCodeCache, "load", classmethod(lambda cls, source: sources.append(source)))
    load_again()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", lambda self: False)
        patched.setattr(platform, "processor", lambda: "another")
        load_again()
    for owner, name in ((torch, "__version__"), (torch.version, "git_version")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, "another")
            load_again()
    version = subprocess.CompletedProcess([], 0, "another compiler 1.0\nand more")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: version)
    load_again()
    assert len(set(sources)) == 5 and len({source.partition("\n")[2] for source in sources}) == 1


@pytest.mark.skipif(platform.system() != "Linux", reason="knows the end of Linux's libraries only")
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_library_that_a_killed_compiler_left_behind_is_compiled_again(kept, load_again, tmp_path, monkeypatch):
    (tmp_path / "small.cpp").write_text("int small() { return 1; }\n")
    monkeypatch.setattr(cpp_decoder, "SOURCES", [tmp_path / "small.cpp"])
    monkeypatch.setattr(cpp_decoder, "_library_folder", lambda: tmp_path / "cache")
    load_again()
    (library,) = tmp_path.glob("cache/**/*.so")
    whole = library.read_bytes()
    library.unlink()  # this process has it in use
    library.write_bytes(whole[: int(len(whole) * kept)])
    load_again()
    assert library.stat().st_size == len(whole)


@pytest.mark.parametrize("case", ["of another user", "open to others", "not to be made"])
def test_code_is_loaded_from_a_folder_of_this_user_alone(case, load_again, tmp_path, monkeypatch, caplog):
    """Nothing in another folder is loaded or believed, and C++ still runs. The folder of inductor does not matter."""
    from torch._inductor.codecache import CppCodeCache

    folders = []
    monkeypatch.setattr(
        CppCodeCache, "load", classmethod(lambda cls, source: folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    mine = tmp_path / "cache" / "layerskip_recipes"
    assert not cpp_decoder.is_library_compiled() and not mine.exists()
    load_again()
    assert cpp_decoder.is_library_compiled() and folders == [str(mine)]
    assert mine.stat().st_mode & 0o777 == 0o700 and not caplog.records
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    if case == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: mine.stat().st_uid + 1)
    elif case == "open to others":
        mine.chmod(0o770)
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not cpp_decoder.is_library_compiled()
    load_again()
    assert folders[1] != str(mine) and Path(folders[1]).stat().st_mode & 0o777 == 0o700
    assert "XDG_CACHE_HOME" in caplog.text


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8 of version 2", "int4"])
def test_the_same_bits_for_any_number_of_rows_and_threads(precision):
    model, (text, *others) = make("llama3", precision), texts_of(5, 150)
    torch.set_num_threads(1)
    alone = in_cpp(model, [text], 1)[0, -1]
    torch.set_num_threads(2)
    assert torch.equal(in_cpp(model, [text], 1)[0, -1], alone)
    for s in (1, 2, 5, 9, 20):
        assert torch.equal(in_cpp(model, [text, *others], s)[0], in_cpp(model, [text], s)[0])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs a compiler for x86")
@pytest.mark.parametrize(
    ("capability", "flags"),
    [
        ("DEFAULT", []),
        ("AVX2", ["-mavx2", "-mfma", "-mf16c"]),
        ("AVX512", ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"]),
    ],
)
def test_the_code_compiles_for_other_processors(capability, flags, tmp_path):
    """Without the instructions that this one may have, such as those for bf16."""
    (tmp_path / "all.cpp").write_text("".join(source.read_text() for source in SOURCES))
    known = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    folders = [f"-I{folder}" for folder in include_paths()]
    command = ["g++", "-std=c++20", "-fsyntax-only", *flags, *known, *folders, str(tmp_path / "all.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("k", [16, 576, 2064, 9232])  # the last two by fewer rows at a time
@pytest.mark.parametrize("n", [1, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, "both int8"], ids=str)
def test_a_product_of_few_rows_has_the_bits_of_each_row_alone(n, k, dtype, two_threads):
    """scale (x W^T) + bias, and each row of it to the last bit what it is alone. bf16 instructions take x in bf16.

    With the sums of W's rows, x is taken as torchao's symmetric int8 per row: whole numbers times max |x| / 127.5.
    """
    load_library()
    generator = torch.Generator().manual_seed(n * k)
    x, w = torch.randn(1, 21, k, generator=generator), torch.randn(n, k, generator=generator)
    int8, rounds_x = dtype in (torch.int8, "both int8"), dtype == "both int8"
    w = (60 * w).clamp(-128, 127).to(torch.int8) if int8 else w.to(dtype)
    scale, bias = torch.rand(2, n, generator=generator) + 0.5
    tensors = {"output.weight": w, "output.scale": scale, "output.bias": bias}
    if rounds_x:
        tensors["output.sums"] = w.sum(1).float()
    head = torch.classes.layerskip.Head(tensors)
    alone = torch.cat([head.logits(x[:, row : row + 1]) for row in range(21)], 1)
    atol = (6e-3 if int8 else 1e-4) * max(1, k / 576)
    instructions = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    exact = (x.bfloat16() if dtype == torch.bfloat16 and instructions else x).double()
    if rounds_x:
        unit = x.abs().amax(-1, keepdim=True) / 127.5
        exact = (x * (1 / unit)).round().clamp(-128, 127).double() * unit
    torch.testing.assert_close(alone.double(), exact @ w.double().T * scale + bias, atol=atol, rtol=1e-4)
    for rows in (2, 3, 4, 7, 8, 9, 16, 21):
        assert torch.equal(head.logits(x[:, :rows]), alone[:, :rows])
    assert torch.equal(head.logits(x.mT.contiguous().mT), alone)
    with pytest.raises(RuntimeError):
        head.logits(x[:, :, 1:])


@pytest.mark.parametrize(("n", "k", "group"), [(1, 32, 32), (130, 576, 64), (48, 2048, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_four_bits_are_torchaos(n, k, group, dtype, two_threads):
    """torchao's product of int4 weights and rounded inputs, and each row of it to the last bit what it is alone."""
    load_library()
    torch.manual_seed(n * k)
    linear = torch.nn.Sequential(torch.nn.Linear(k, n, dtype=dtype))
    quantize_(linear, Int8DynamicActivationInt4WeightConfig(group_size=group))
    parts = cpp_decoder.Parts()
    parts.linear("output", linear[0])
    parts.pack()
    head = torch.classes.layerskip.Head(parts.tensors)
    x = torch.randn(1, 23, k).to(dtype).float()
    alone = torch.cat([head.logits(x[:, row : row + 1]) for row in range(23)], 1)
    unit = (x.amax(-1, True).clamp(min=0) - x.amin(-1, True).clamp(max=0)) / 255
    zero = -128 - (x.amin(-1, True).clamp(max=0) / unit).round()
    rounded = ((x * (1 / unit)).round() + zero).clamp(-128, 127).double() - zero
    weight = linear[0].weight.original_weight_tensor
    numbers, scale, _ = weight.tensor_impl.get_plain()
    exact = numbers.double() * scale.double().view(n, -1).repeat_interleave(group, 1)
    expected = unit.double() * (rounded @ exact.T) + linear[0].bias.double()
    torch.testing.assert_close(alone.double(), expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        of_torch = linear(x.to(dtype)).float()
    torch.testing.assert_close(alone, of_torch, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-4)
    for rows in (2, 5, 9, 10, 11, 23):
        assert torch.equal(head.logits(x[:, :rows]), alone[:, :rows])


@cache
def talking(precision="fp32"):
    """A model whose greedy outputs vary, and whose exits now and then say what all of it says."""
    torch.manual_seed(5)
    model = llama3_2(**WIDE | {"num_layers": 4})
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.6 if name.startswith("layers.0.") else 0.15)
    model = layerskip_decoder(model).eval()
    if "int8" in precision:
        of_x_too = precision == "both int8"
        quantize_(model, (Int8DynamicActivationInt8WeightConfig if of_x_too else Int8WeightOnlyConfig)(version=2))
    if precision == "int4":
        quantize_(model, Int8DynamicActivationInt4WeightConfig(group_size=16))
    return model.to(torch.bfloat16) if precision == "bf16" else model


# No head of fewer rows is cut from a quantised one.
LOW = [("bf16", "vocabulary"), *itertools.product(("bf16", "int8", "both int8", "int4"), ("chain", "look-up"))]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("precision", "variant"), [*(("fp32", variant) for variant in VARIANTS), *LOW])
def test_every_way_of_drafting_gives_the_models_tokens(precision, variant, temperature):
    """All prompts at a time, and in rows that take one after the other and look up where they can; no graph is made. A
    verification of many tokens has the bits of steps of one, so not even ties are decided otherwise."""
    model, sampler = talking(precision), Sampler(temperature, seed=2)
    expected = run(model, PROMPTS, 24, sampler=sampler, compile=precision != "fp32").generated
    assert [run(model, [prompt], 24, sampler=sampler).generated[0] for prompt in PROMPTS] == expected
    stats = GenerationStats()
    for rows, rule in ((None, None), (2, AlwaysLookUp()), (1, AlwaysLookUp())):
        generation = run(model, PROMPTS, 24, rows=rows, sampler=sampler, rule=rule, **drafting(variant, model))
        assert generation.generated == expected and isinstance(generation.context.backend, CppBackend)
        stats += generation.stats
    assert bool(stats.rounds_by_kind["lookup"]) == bool({"prompt_lookup", "answers"} & VARIANTS[variant].keys())
    assert stats.accepted > 0 and compiled_steps(model).graphs == {}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("variant", ["chain", "confident", "vocabulary", "perturbed"])
@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_a_chain_of_drafts_is_one_call(family, variant, temperature, monkeypatch):
    """Its drafts and outputs are those of torch's operations, token by token."""
    model, found = make(family), []
    for compile in (False, True):
        if compile:
            monkeypatch.setattr(chain, "draft_token", None)
        drafts, sampler = [], Sampler(temperature, seed=1)
        arguments = {"sampler": sampler, "on_draft": drafts.append} | drafting(variant, model)
        found.append((drafts, run(model, PROMPTS, 16, compile=compile, **arguments).generated))
    assert found[0] == found[1] and len(found[0][0]) > 0


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_a_chain_in_bf16_has_the_bits_of_single_steps(family):
    """Gemma multiplies embeddings by the root of their width, as bf16 has it."""
    model, text = make(family, "bf16"), torch.tensor(texts_of(2, 9))
    cache = DecodingCache(model, 2, 160)
    with torch.no_grad(), cache.used_by(model):
        before = StepContext(model, cache, Sampler())
        before.backend.run(model, text[:, :-1], torch.arange(8)[None], cache.slots[:8], range(model.num_layers))
        context = StepContext(model, cache, Sampler(), CompiledSteps(CPU))
        at = torch.full((2, 1), 8)
        alone = context.backend.run(model, text[:, -1:], at, cache.slots[:9], range(2))
        _, hidden = context.backend.draft_chain(text[:, -1], at[:, 0], 1, 9, 2, None, 0.0, torch.ones(2), 0.0)
    assert torch.equal(hidden, alone)


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_huge_pages_hold_the_same_numbers(monkeypatch):
    """The kernel has moved the pages, or has refused to: then nothing happens."""
    tensor = torch.randn(3 * PAGE)  # 24 MB
    before = tensor.clone()
    monkeypatch.setattr(huge_pages, "_tried", {})
    assert use_huge_pages([tensor, torch.empty(0)])
    assert torch.equal(tensor, before)
    assert not use_huge_pages([tensor], most_seconds=0)
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    kernel = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    if allowed.exists() and "[never]" not in allowed.read_text() and kernel >= (6, 1):
        assert int(re.search(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) >= 2048


class Doubled(torch.nn.Embedding):
    def forward(self, tokens):
        return 2 * super().forward(tokens)


def test_an_embedding_of_another_kind_drafts_token_by_token():
    model = make_model("llama3")
    model = model.with_modules(tok_embeddings=Doubled(SIZE["vocab_size"], SIZE["embed_dim"]))
    expected = run(model, PROMPTS, 9, compile=False).generated
    generation = run(model, PROMPTS, 9, **drafting("chain", model))
    assert generation.generated == expected
    assert generation.context.backend.draft_in_cpp is None


def of_another_class(module):
    module.__class__ = type("Other", (type(module),), {})


UNKNOWN = {
    "another class": lambda model: of_another_class(model.layers[1].mlp.w1),
    "another norm": lambda model: of_another_class(model.norm),
    "fp64": lambda model: model.double(),
    "int8 activations": lambda model: quantize_(model, Int8DynamicActivationInt8WeightConfig()),
    "zero points": lambda model: quantize_(model, IntxWeightOnlyConfig(mapping_type=MappingType.ASYMMETRIC)),
    "int4 beside others": lambda model: quantize_(
        model,
        Int8DynamicActivationInt4WeightConfig(group_size=16),
        filter_fn=lambda module, name: name.endswith(("q_proj", "k_proj")),
    ),
}
OTHER_MODELS = {
    "LoRA": lambda: lora_llama3_2(["q_proj"], **WIDE, lora_rank=4, lora_alpha=8),
    "heads of 8 numbers": lambda: llama3_2(**WIDE | {"num_heads": 4}),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["perturbed", "quantised", "copy, chain", "copy, head", "adapter, chain", "head"])
def test_an_unknown_part_of_a_draft_leaves_the_model_in_cpp(part, precision, monkeypatch):
    """Its steps have the same bits as without drafts; the draft runs in torch, also over texts that C++ reads."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = talking(precision)
    variants = {"quantised": "perturbed", "head": "vocabulary", "copy, head": "copy, vocabulary"}
    arguments = drafting(variants.get(part, part), model)
    decoder = arguments["draft_weights"] and arguments["draft_weights"][0]
    if "head" in part:
        head = DraftHead(decoder or model, arguments["speculation"].draft_vocabulary)
        of_another_class(head.output)
        arguments["draft_weights"] = (decoder or model, head)
    else:
        first = decoder.trained_layers.start
        layers = torch.nn.ModuleList([*model.layers[:first], *copy.deepcopy(decoder.layers[first:])])
        if part == "quantised":
            quantize_(layers, Int8DynamicActivationInt8WeightConfig())
        else:
            of_another_class(layers[-1])
        draft_decoder = decoder.with_modules(layers=layers)
        draft_decoder.trained_layers = decoder.trained_layers
        arguments["draft_weights"] = (draft_decoder, None)
    plainly = run(model, PROMPTS, 16, rows=2)
    drafts = [], []
    torchs, ours = (
        run(model, PROMPTS, 16, rows=2, compile=compile, on_draft=of.append, **arguments)
        for compile, of in zip((False, True), drafts, strict=True)
    )
    assert ours.context.backend.unknown is not None and ours.context.backend.draft_in_cpp is None
    assert ours.generated == plainly.generated and compiled_steps(model).graphs == {}
    if precision == "fp32" and part != "quantised":
        assert drafts[0] == drafts[1] and torchs.generated == ours.generated
    if precision == "fp32":
        sampler = Sampler(0.8, seed=3)
        assert run(model, PROMPTS, 9, rows=2, sampler=sampler, **arguments).stats.drafted > 0


@pytest.mark.parametrize("part", [*UNKNOWN, *OTHER_MODELS])
def test_other_parts_are_not_run_in_cpp(part):
    model = layerskip_decoder(OTHER_MODELS[part]()) if part in OTHER_MODELS else make_model("llama3")
    if part in UNKNOWN:
        UNKNOWN[part](model)
    context = StepContext(model, DecodingCache(model, 1, 160), Sampler(), CompiledSteps(CPU))
    assert isinstance(context.backend, GraphBackend)


@pytest.mark.parametrize("ids", [None, torch.tensor([3, 7, 900, 20_000, 49_151])])
def test_chosen_tokens_are_those_that_torch_chooses(ids):
    """Flat and peaked scores, of which C++ looks at few; 17 is a width that fills no vector."""
    load_library()
    torch.manual_seed(0)
    keys, at = torch.tensor(noise_keys(3, [[1], [2]])), torch.tensor([[4, 5, 6]])
    for width, factor in itertools.product((len(ids),) if ids is not None else (1, 17, 3000), (0.1, 3, 100)):
        scores = factor * torch.randn(2, 3, width)
        assert torch.equal(
            torch.ops.layerskip.choose_tokens(scores, keys, at, ids), choose_tokens(scores, keys, at, ids)
        )
    filtered = torch.randn(2, 3, 40).masked_fill(torch.arange(40) % 7 > 0, -torch.inf)
    assert torch.equal(torch.ops.layerskip.choose_tokens(filtered, keys, at, None), choose_tokens(filtered, keys, at))
