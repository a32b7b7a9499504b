"""Which class a kernel belongs to, by its name and by the name of the HLO instruction that it runs.

A name that a library gave decides before XLA's, and a kernel's before its instruction's: a cuBLAS matmul stays one
where its instruction is called `custom-call.7` or lies in a CUDA graph. XLA names a fusion after what is in it; those
names are read word by word. Names seen on NVIDIA GPUs (cuBLAS, cuBLASLt, CUTLASS, cuDNN, NCCL, Triton) and XLA:CPU's.
"""

from __future__ import annotations

import functools
import re

MATMUL = "matmul"
ATTENTION = "attention"
ELEMENTWISE = "fused elementwise"
REDUCTION = "reduction"
COPY = "copy or transpose"
OTHER = "other"
COLLECTIVE = "collective"
TRANSFER = "transfer"
"""Memory copied outside any program: between devices, to and from the host."""

CONTROL = "control flow"
"""The part of a loop, a call or a CUDA graph in which nothing inside it is seen to run."""

CLASSES = (MATMUL, ATTENTION, ELEMENTWISE, REDUCTION, COPY, OTHER, COLLECTIVE, TRANSFER, CONTROL)
"""Where kernels of a device overlap, the time is the first's in this order, so that collectives and transfers have what
nothing hides."""

# Before matmuls: attention kernels are built of them and some say so.
_LIBRARY = (
    (COLLECTIVE, re.compile(r"nccl|nvshmem|all_?reduce_?kernel|multimem|RaggedAllToAll", re.IGNORECASE)),
    (ATTENTION, re.compile(r"sdpa|fmha|flash|attention|\bmha|_mha_|dot_do_o|convert_dq", re.IGNORECASE)),
    (
        MATMUL,
        re.compile(
            r"nvjet|gemm|gemv|cutlass|cublas|xmma|splitk|tensorop|wgmma|s\d+816|triton_dot|onednn_matmul|\bynn_|xnn_",
            re.IGNORECASE,
        ),
    ),
    (ELEMENTWISE, re.compile("adapted_swiglu")),  # this package's own, bound by the activations that it passes over
)
_MEMCPY = re.compile(r"memcpy", re.IGNORECASE)
_MEMSET = re.compile(r"memset", re.IGNORECASE)
_CONTROL = re.compile(r"CudaGraph.*|(while|call|conditional|async)(-start|-done)?([._]\d+)*")
_COLLECTIVE_WORDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "send",
    "recv",
)
_COLLECTIVE_OP = re.compile(rf"({'|'.join(_COLLECTIVE_WORDS)})(-start|-done)?([._]\d+)*")

_ROUNDING = re.compile("reduce[-_]precision")
_MATMUL_WORDS = {"dot", "convolution", "conv", "matmul"}
_REDUCTION_WORDS = {"reduce", "softmax", "argmax", "argmin", "cumsum", "norm", "window"}
_COPY_WORDS = {
    "copy", "transpose", "slice", "dynamic", "update", "concatenate", "pad", "reshape", "bitcast", "reverse", "gather",
}  # fmt: skip
_FILLER_WORDS = {
    "", "loop", "input", "fusion", "wrapped", "triton", "kernel", "clone", "remat", "parallel", "small", "param",
    "command", "buffer", "custom", "call",
}  # fmt: skip
_ELEMENTWISE_WORDS = {
    "abs", "add", "and", "broadcast", "cbrt", "ceil", "clamp", "compare", "complement", "convert", "cosine", "divide",
    "erf", "exp", "exponential", "floor", "iota", "is", "log", "logistic", "maximum", "minimum", "minus", "multiply",
    "negate", "not", "one", "or", "plus", "power", "remainder", "rng", "round", "rsqrt", "select", "shift", "sign",
    "sine", "sqrt", "subtract", "tan", "tanh", "xor",
}  # fmt: skip


@functools.cache
def kernel_class(kernel: str, hlo_op: str | None, *, in_program: bool) -> str:
    """The class, one of `CLASSES`.

    Args:
      kernel: the name of what ran on the device.
      hlo_op: the HLO instruction it ran for, where the trace has it.
      in_program: whether a compiled program ran it.
    """
    if _MEMCPY.search(kernel):
        return COPY if in_program else TRANSFER
    if _MEMSET.search(kernel):
        return COPY
    names = [name for name in (kernel, hlo_op) if name]
    for name in names:
        for found, pattern in _LIBRARY:
            if pattern.search(name):
                return found
    for name in names:
        if _CONTROL.fullmatch(name):
            return CONTROL
        if _COLLECTIVE_OP.fullmatch(name):
            return COLLECTIVE
    for name in names:
        found = _by_words(name)
        if found is not None:
            return found
    # XLA's fusions of nothing but arithmetic are often called `fusion.12` and nothing more.
    is_plain_fusion = any("fusion" in name for name in names) and not any(map(_words, names))
    return ELEMENTWISE if is_plain_fusion else OTHER


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", _ROUNDING.sub("round", name.lower()))) - _FILLER_WORDS


def _by_words(name: str) -> str | None:
    """The class that XLA's words in an instruction's or fusion's name tell, if they do."""
    words = _words(name)
    if words & _MATMUL_WORDS:
        return MATMUL
    if words & _REDUCTION_WORDS:
        return REDUCTION
    if words and words <= _COPY_WORDS:
        return COPY
    if words & _ELEMENTWISE_WORDS:
        return ELEMENTWISE
    return None
