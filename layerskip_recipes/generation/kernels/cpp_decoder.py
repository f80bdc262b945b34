"""Decoding steps on a CPU in C++ (the .cpp files beside this one): one call for all layers of a step, one for the head,
one for choosing tokens, and one for a whole draft chain if temperature is the only sampling setting.

In a small model torch's overhead per product is as large as the product. The C++ steps read each weight once, for one
token or for seven, and do little else.
"""

import atexit
import hashlib
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from torchao.quantization import PerRow
from torchao.quantization.quant_primitives import MappingType
from torchtune import utils
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.phi3._position_embeddings import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TransformerSelfAttentionLayer,
)

from layerskip_recipes.families.attention import NormFirstAttention, NormOfAllHeads
from layerskip_recipes.families.multipliers import DividedNorm, Scale, ScaledEmbedding
from layerskip_recipes.families.rope import RotaryPositions
from layerskip_recipes.model.changes import weights_key
from layerskip_recipes.model.draft import JoiningLayer
from layerskip_recipes.model.short_convolution import ShortConvolution

SOURCES = [
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("tiles", "four_bits", "few_rows", "attention", "sampling", "layers")
]
VECTOR = 16  # widths must be multiples of the longest SIMD vector, in fp32 numbers
INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
log = utils.get_logger("INFO")

# torchtune's rotary positions, by table layout: cosines and sines interleaved, or each one doubled and concatenated.
NEIGHBOURS = (RotaryPositionalEmbeddings, Llama3ScaledRoPE)
HALVES = (Qwen2RotaryPositionalEmbeddings, Phi3RotaryPositionalEmbeddings)
# What was computed from a module's tensors, beside their key: fp32 cosines and sines, which all layers share, and sums
# of int8 rows. Stored under the first of the tensors.
_COMPUTED = WeakTensorKeyDictionary()


class UnknownPartError(Exception):
    """The C++ does not support a part of the decoder."""


@cache
def load_library() -> None:
    """Compile the C++ or load it from our folder, as `torch.classes.layerskip.Layers` and `Head`."""
    # Importing inductor takes a second.
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    class Library(CppCodeCache):
        cache: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
        cpp_compile_command_flags: ClassVar[dict[str, Any]] = {"include_pytorch": True, "shared": True}  # type: ignore[misc]

        @staticmethod
        def _load_library_inner(path: str, key: str) -> Any:
            if not _is_whole(Path(path)):
                Path(path).unlink()
                raise OSError(f"{path} is cut off")
            return CppCodeCache._load_library_inner(path, key)

    folder = _library_folder()
    # torch knows the processor's vector instructions. Inductor would compile and run a test program for each.
    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    with _inductor_in(folder), config.patch({"cpp.vec_isa_ok": True} if known else {}):
        pick_vec_isa()  # cached for the process
    # Inductor's files are named by the source text. A comment makes it depend on torch, compiler and processor too: the
    # code has all of the processor's instructions, and users share or move the folder.
    compiler = subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    versions = f"// torch {torch.__version__} {torch.version.git_version}, {compiler.splitlines()[0]}, {_processor()}\n"
    source = "".join([versions, *(source.read_text() for source in SOURCES)])
    with _inductor_in(folder):
        try:
            Library.load(source)
        except OSError:  # a cut library is gone now: compile it again
            Library.load(source)
    (folder / _compiled_mark()).touch()


def is_library_compiled() -> bool:
    """Whether an earlier process compiled this C++ for this processor, so that it only needs to be loaded."""
    folder = _cache_folder()
    return _is_private(folder) and (folder / _compiled_mark()).is_file()


def _compiled_mark() -> str:
    """The name of an empty file beside the library; to ask inductor for the library takes seconds."""
    sources = [torch.__version__, _processor(), *(source.read_text() for source in SOURCES)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "layerskip_recipes"


def _is_private(folder: Path) -> bool:
    """Whether only this user can have put code there."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


@cache
def _library_folder() -> Path:
    """The folder of the compiled C++. It is not inductor's, since anyone can make that folder in /tmp."""
    folder = _cache_folder()
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _is_private(folder):
        return folder
    log.warning(
        f"{folder} is no folder that only this user can open, so C++ is compiled anew by each process. To keep it, "
        "remove the folder, or set XDG_CACHE_HOME to a folder of yours"
    )
    folder = Path(tempfile.mkdtemp(prefix="layerskip-"))  # private too
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def keep_inductor_files() -> None:
    """Let inductor keep what it compiles in our folder, unless the user has chosen another: its own is in /tmp."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch sets the variable too, to its default.
    chosen, default = os.environ.get(INDUCTOR_FOLDER), os.path.abspath(default_cache_dir())
    if chosen in (None, default) and (folder := _library_folder()) == _cache_folder():
        os.environ[INDUCTOR_FOLDER] = str(folder / "inductor")


@contextmanager
def _inductor_in(folder: Path) -> Iterator[None]:
    """Let inductor write and look up its files in this folder."""
    before = os.environ.get(INDUCTOR_FOLDER)
    os.environ[INDUCTOR_FOLDER] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[INDUCTOR_FOLDER]
        else:
            os.environ[INDUCTOR_FOLDER] = before


def _processor() -> str:
    """The processor's instructions, which the compiler uses with -march=native."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _is_whole(library: Path) -> bool:
    """Whether a library has its end, where ELF has the table of sections. Loading a cut one can end in a bus error."""
    head, size = library.read_bytes()[:64], library.stat().st_size
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        return sys.platform != "linux" and size > 0
    (start,), (entry, count) = struct.unpack_from("Q", head, 40), struct.unpack_from("HH", head, 58)
    return start + entry * count <= size


class Parts:
    """A module's tensors and numbers (as tensors too) under the names that layers.cpp reads.

    Each method adds one part, or raises an `UnknownPartError`.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.unpacked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # int4 matrices as int8 [n, k], and scales

    def number(self, name: str, number: float) -> None:
        self.tensors[name] = torch.tensor(number, dtype=torch.float32)

    def linear(self, name: str, linear: Any) -> None:
        """The matrix of a linear layer or an embedding: fp32, bf16, torchao's int8 with a scale per row, or int4.

        With the sums of the int8 rows, the C++ rounds the layer's input to int8.
        """
        require(isinstance(linear, nn.Embedding) or type(linear) is nn.Linear, name)
        weight, scale, zero, rounds = linear.weight, None, None, None
        if (int4 := int4_of(weight)) is not None:
            return self.int4_linear(name, linear, int4)
        if type(weight).__name__ == "Int8Tensor":  # torchao's version 2
            rounds = weight.act_quant_kwargs
            if rounds is not None:
                per_token = isinstance(rounds.granularity, PerRow) and rounds.mapping_type is MappingType.SYMMETRIC
                require(per_token, f"{name}: {rounds}")
            weight, scale, zero = weight.qdata, weight.scale, getattr(weight, "zero_point", None)
        elif type(weight).__name__ == "AffineQuantizedTensor":  # its version 1
            weight, scale, zero = weight.tensor_impl.get_plain()
        is_matrix = type(weight) in (nn.Parameter, torch.Tensor) and weight.is_contiguous() and weight.dim() == 2
        dtypes = [torch.float32, torch.bfloat16] if scale is None else [torch.int8]
        require(is_matrix and weight.dtype in dtypes and (scale is None or scale.numel() == len(weight)), name)
        require(zero is None or not zero.any(), f"{name}: zero points")
        require(weight.shape[1] % VECTOR == 0, f"{name}: {weight.shape[1]} is no multiple of {VECTOR}")
        self.tensors[f"{name}.weight"] = weight.detach()
        sums = None if rounds is None else _computed(lambda: _fp32(weight.sum(1)), weight)
        for key, value in (("scale", scale), ("bias", getattr(linear, "bias", None)), ("sums", sums)):
            if value is not None:
                self.tensors[f"{name}.{key}"] = _fp32(value).reshape(-1)

    def int4_linear(self, name: str, linear: nn.Linear, weight: Any) -> None:
        numbers, scale, zero = weight.tensor_impl.get_plain()
        require(zero is None or not zero.any(), f"{name}: zero points")
        group = weight.block_size[-1]
        require(group % VECTOR == 0, f"{name}: groups of {group} columns")
        require(scale.dtype in (torch.float32, torch.bfloat16), f"{name}: scales in {scale.dtype}")
        self.unpacked[name] = numbers, scale
        if linear.bias is not None:
            self.tensors[f"{name}.bias"] = _fp32(linear.bias)

    def int4_groups(self, name: str) -> int | None:
        """The number of groups of columns of an int4 matrix; None for others."""
        numbers, scale = self.unpacked.get(name, (None, None))
        return None if numbers is None else scale.numel() // len(numbers)

    def pack(self) -> None:
        """Pack the int4 matrices, once for each."""
        for name, (numbers, scale) in self.unpacked.items():
            packed = _computed(lambda: torch.ops.layerskip.pack_int4(numbers, scale), numbers, scale)  # noqa: B023
            self.tensors |= dict(zip((f"{name}.weight", f"{name}.scale", f"{name}.sums"), packed, strict=True))

    def norm(self, name: str, norm: Any) -> None:
        """A norm, or a number in its place."""
        if norm is None or type(norm) is nn.Identity:
            return
        if type(norm) is Scale:
            self.number(f"{name}.factor", norm.factor)
            return
        if type(norm) is Gemma2FinalNorm:
            norm = norm.rms_norm  # `head_parts` has its logit cap
        require(type(norm) in (RMSNorm, GemmaRMSNorm, DividedNorm, NormOfAllHeads) and norm.eps > 0, name)
        scale = _fp32(norm.scale) / getattr(norm, "divisor", 1)
        self.tensors[f"{name}.scale"] = scale + 1 if type(norm) is GemmaRMSNorm else scale
        self.number(f"{name}.epsilon", norm.eps)

    def positions(self, rotation: Any) -> None:
        """Rotary tables; channels rotate in pairs of neighbours, or with the channel half a head away."""
        if rotation is None:
            return
        self.number("neighbours", type(rotation) in NEIGHBOURS)
        require(type(rotation) in (RotaryPositions, *NEIGHBOURS, *HALVES), "pos_embeddings")
        tables: Any = (rotation.cos, rotation.sin) if type(rotation) is RotaryPositions else (rotation.cache,)

        def both() -> list[torch.Tensor]:
            if type(rotation) is RotaryPositions:
                parts = tables
            else:
                (table,) = tables
                parts = table.unbind(-1) if type(rotation) in NEIGHBOURS else table.chunk(4, -1)[::2]
            return [_fp32(part) for part in parts]

        self.tensors |= dict(zip(("cos", "sin"), _computed(both, *tables), strict=True))

    def attention(self, attn: Any) -> None:
        if type(attn) is ShortConvolution:
            self.convolution(attn)
            return
        require(type(attn) in (MultiHeadAttention, NormFirstAttention, Gemma2Attention), "attn")
        for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
            self.linear(name, getattr(attn, name))
        self.norm("q_norm", attn.q_norm)
        self.norm("k_norm", attn.k_norm)
        self.positions(attn.pos_embeddings)
        require(attn.head_dim % VECTOR == 0, f"head_dim: {attn.head_dim} is no multiple of {VECTOR}")
        self.number("heads", attn.num_heads)
        # A class that differs from `MultiHeadAttention` in one of these has the attribute.
        self.number("scale", getattr(attn, "scaling", attn.head_dim**-0.5))
        self.number("cap", getattr(attn, "softcapping", None) or 0)
        self.number("norm_first", getattr(attn, "norm_first", False))
        self.number("window", getattr(attn, "window", None) or 0)

    def convolution(self, convolution: ShortConvolution) -> None:
        self.linear("in_proj", convolution.in_proj)
        self.linear("output_proj", convolution.out_proj)
        require(convolution.head_dim % VECTOR == 0, f"half a width of {convolution.head_dim}")
        self.tensors["taps"] = _fp32(convolution.conv.weight.squeeze(1).T)  # [kernel, d]

    def feed_forward(self, mlp: Any) -> None:
        """A gated MLP."""
        numbers = {(nn.SiLU, None): 0, (nn.GELU, "none"): 1, (nn.GELU, "tanh"): 2}
        activation = getattr(mlp, "activation", None)
        number: Any = numbers.get((type(activation), getattr(activation, "approximate", None)))
        require(type(mlp) is FeedForward and number is not None and mlp.w3 is not None, "mlp")
        for name in ("w1", "w2", "w3"):
            self.linear(name, getattr(mlp, name))
        self.number("activation", number)


def int4_of(weight: Any) -> Any:
    """The int4 numbers of a weight whose input torchao rounds to int8 per token; None for other weights.

    These are torchao's `Int8DynamicActivationInt4WeightConfig` and torchtune's `Int8DynActInt4WeightQuantizer`.
    """
    if type(weight).__name__ != "LinearActivationQuantizedTensor":
        return None
    inner = weight.original_weight_tensor
    rounds = getattr(weight.input_quant_func, "__name__", "") == "_int8_asymm_per_token_quant"
    is_int4 = (getattr(inner, "quant_min", None), getattr(inner, "quant_max", None)) == (-8, 7)
    is_plain = type(getattr(inner, "tensor_impl", None)).__name__ == "PlainAQTTensorImpl"
    return inner if rounds and is_int4 and is_plain else None


def layer_parts(layer: Any) -> Parts:
    """The parts of a layer without its cache."""
    parts = Parts()
    if type(layer) is JoiningLayer:
        parts.linear("join", layer.join)
        parts.number("join_norm.epsilon", JoiningLayer.EPSILON)
        layer = layer.layer
    require(type(layer) is TransformerSelfAttentionLayer, type(layer).__name__)
    parts.attention(layer.attn)
    parts.feed_forward(layer.mlp)
    for name in ("sa_norm", "mlp_norm", "sa_scale", "mlp_scale"):
        parts.norm(name, getattr(layer, name))
    for side_by_side in (("q_proj", "k_proj", "v_proj"), ("w1", "w3")):
        alike = len({parts.int4_groups(name) for name in side_by_side}) == 1
        require(alike, f"{', '.join(side_by_side)}: int4 beside others, or in other groups")
    return parts


def head_parts(norm: nn.Module, output: Any, cap: float | None) -> Parts:
    """The parts of a head: its norm, its output projection or tied embedding, and the logit cap."""
    parts = Parts()
    parts.norm("norm", norm)
    parts.linear("output", output)
    parts.number("cap", cap or 0)
    return parts


def embedding_parts(embedding: Any) -> tuple[torch.Tensor, float]:
    """The matrix of an embedding, and the factor of its rows."""
    require(type(embedding) in (nn.Embedding, GemmaNormEmbeddings, ScaledEmbedding), "tok_embeddings")
    factor = getattr(embedding, "factor", 1.0)
    if type(embedding) is GemmaNormEmbeddings:  # the root of the width, rounded to the weights' dtype
        factor = torch.tensor(embedding.embedding_dim**0.5, dtype=embedding.weight.dtype).item()
    return embedding.weight.detach(), float(factor)


def _computed(compute: Callable[[], Any], *tensors: torch.Tensor) -> Any:
    """compute(), again only once one of the tensors has changed."""
    key = weights_key(tensors)
    if _COMPUTED.get(tensors[0], (None,))[0] != key:
        _COMPUTED[tensors[0]] = key, compute()
    return _COMPUTED[tensors[0]][1]


def _fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().contiguous()


def require(supported: bool, part: str) -> None:
    """Raise an `UnknownPartError` for a part that is not supported."""
    if not supported:
        raise UnknownPartError(part)
