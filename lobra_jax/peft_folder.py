"""Adapters as PEFT folders, written and read. Knows neither runs nor devices, imports no JAX.

PEFT keeps Linear layouts: `lora_A.weight` [rank, in] and `lora_B.weight` [out, rank], the transposes of our a and b;
DoRA's `lora_magnitude_vector` [out] is our m.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lobra_jax.lora_spec import LoraSpec
from lobra_jax.models.config import TARGETS, LlamaConfig
from lobra_jax.models.hf import module_name
from planner.errors import UserError

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"

TaskAdapter = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
"""One task's own arrays, cut to its rank: layer -> target -> {"a": [in, rank], "b": [rank, out]}, DoRA's "m": [out]."""

_PEFT_NAMES = {target: module_name(target).rpartition(".")[2] for target in TARGETS}
_SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
_LETTERS = {suffix: letter for letter, suffix in _SUFFIXES.items()}
_TENSOR_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\."
    rf"({'|'.join(map(re.escape, _SUFFIXES.values()))})"
)

_PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "modules_to_save": None,
    "lora_bias": False,
}
"""Settings of PEFT's LoRA that change the arithmetic, with the only value that is ours."""

_READ = frozenset(
    "peft_type r lora_alpha use_rslora use_dora lora_dropout target_modules exclude_modules init_lora_weights".split()
)
_WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_version runtime_config megatron_core "
    "layers_pattern qalora_group_size ensure_weight_tying eva_config loftq_config corda_config lora_ga_config".split()
)
"""Of what made or may run an adapter; they change nothing in its arithmetic. Any other key must be off: a kind of LoRA
that we do not know must not pass for the plain one."""

_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from its
weights, so that their adapters belong to another base than the one on disk."""

_MOST_LAYERS = 1024
"""Of a model whose linears the names and patterns in an adapter's config are matched with."""


def write_peft_adapter(folder: str | Path, spec: LoraSpec, adapter: TaskAdapter, base_model_name: str) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` as `peft` loads them.

    `base_model_name` is what the config names as its base: a folder or the name of a preset. Both files are replaced
    whole, so an interruption leaves the adapter that was there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer, targets in adapter.items():
        assert sorted(targets) == sorted(spec.targets), f"layer {layer} adapts {sorted(targets)}, not {spec.targets}"
        for target, pair in targets.items():
            assert pair["a"].shape[1] == pair["b"].shape[0] == spec.rank, f"layer {layer} {target}: not cut to its rank"
            assert ("m" in pair) == spec.dora, f"layer {layer} {target}: a magnitude goes with DoRA"
            for letter, array in pair.items():
                name = _tensor_name(layer, target, letter)
                tensors[name] = np.ascontiguousarray(np.asarray(array, np.float32).T)
    weights = folder / (ADAPTER_WEIGHTS_FILE + ".partial")
    save_file(tensors, weights, metadata={"format": "pt"})
    config = folder / (ADAPTER_CONFIG_FILE + ".partial")
    config.write_text(json.dumps(_adapter_config(spec, base_model_name), indent=2) + "\n", encoding="utf-8")
    shutil.copymode(config, weights)  # safetensors lets nobody but the owner read
    os.replace(weights, folder / ADAPTER_WEIGHTS_FILE)
    os.replace(config, folder / ADAPTER_CONFIG_FILE)


def read_peft_adapter(folder: str | Path) -> tuple[LoraSpec, TaskAdapter]:
    """Reads a folder of `write_peft_adapter`, or any LoRA or DoRA of PEFT over the linears of a Llama.

    Raises UserError for other kinds of adapters, and for tensors that are missing, surplus or of the wrong rank.
    """
    config_file = Path(folder) / ADAPTER_CONFIG_FILE
    raw = _read_adapter_config(config_file)
    spec = _spec(raw, config_file)
    weights_file = Path(folder) / ADAPTER_WEIGHTS_FILE
    try:
        tensors = load_file(weights_file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read the adapter: {error}", file=weights_file, expected="an adapter written by PEFT or lobra"
        ) from error
    adapter: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    targets = {name: target for target, name in _PEFT_NAMES.items() if target in spec.targets}
    for name, array in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or match[2] not in targets:
            raise UserError(f"unexpected tensor {name!r}", file=weights_file, expected="LoRA pairs of target_modules")
        layer, module, suffix = match.groups()
        letter = _LETTERS[suffix]
        if letter not in _letters(spec):
            raise UserError(f"unexpected tensor {name!r}", file=weights_file, expected="none without use_dora")
        if array.ndim != (1 if letter == "m" else 2):
            problem = f"tensor {name!r} has the wrong shape"
            raise UserError(
                problem, file=weights_file, value=array.shape, expected="factors of two dims, magnitudes of one"
            )
        if letter != "m" and array.shape[0 if letter == "a" else 1] != spec.rank:
            problem = f"tensor {name!r} has the wrong rank"
            raise UserError(problem, file=weights_file, value=array.shape, expected=f"rank {spec.rank}")
        if not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f"tensor {name!r} holds values that are not finite", file=weights_file, expected="numbers")
        pair = adapter.setdefault(layer, {}).setdefault(targets[module], {})
        pair[letter] = np.ascontiguousarray(array.T.astype(np.float32))
    for layer, pairs in adapter.items():
        for target in spec.targets:
            for letter in _letters(spec):
                if letter not in pairs.get(target, {}):
                    missing = _tensor_name(layer, target, letter)
                    raise UserError(f"tensor {missing!r} is missing", file=weights_file, expected="all of each linear")
    return spec, {layer: adapter[layer] for layer in sorted(adapter, key=int)}


def read_peft_spec(folder: str | Path) -> LoraSpec:
    """The spec alone, from the folder's `adapter_config.json`. Raises UserError like `read_peft_adapter`."""
    file = Path(folder) / ADAPTER_CONFIG_FILE
    return _spec(_read_adapter_config(file), file)


def check_fits(folder: str | Path, adapter: TaskAdapter, model: LlamaConfig) -> None:
    """Raises UserError if the adapter, read from `folder`, is not one of this model: its layers and shapes."""
    file = Path(folder) / ADAPTER_WEIGHTS_FILE
    layers = [str(layer) for layer in range(model.num_layers)]
    if list(adapter) != layers:
        problem = "an adapter of other layers than the model's"
        raise UserError(problem, file=file, value=f"{len(adapter)} layers", expected=f"{len(layers)} of {model.name}")
    for layer, targets in adapter.items():
        for target, pair in targets.items():
            found, expected = (pair["a"].shape[0], pair["b"].shape[1]), model.target_shapes[target]
            if found != tuple(expected) or pair.get("m", pair["b"][0]).shape != expected[1:]:
                problem = f"layer {layer}: {_PEFT_NAMES[target]} has the wrong shape"
                raise UserError(problem, file=file, value=found, expected=f"{tuple(expected)} of {model.name}")


def _letters(spec: LoraSpec) -> tuple[str, ...]:
    return ("a", "b", "m") if spec.dora else ("a", "b")


def _tensor_name(layer: str, target: str, letter: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module_name(target)}.{_SUFFIXES[letter]}"


def _adapter_config(spec: LoraSpec, base_model_name: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "lora_dropout": spec.dropout,
        "target_modules": [_PEFT_NAMES[target] for target in TARGETS if target in spec.targets],
        **_PLAIN,
    }


def _read_adapter_config(file: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the adapter's config: {error.strerror}", file=file, expected="an adapter folder"
        ) from error
    except ValueError as error:
        raise UserError(f"not JSON: {error}", file=file, expected="an adapter's config") from error
    if not isinstance(raw, Mapping):
        raise UserError("not a mapping", file=file, expected="an adapter's config")
    return raw


def _spec(raw: Mapping[str, Any], file: Path) -> LoraSpec:
    if raw.get("peft_type") != "LORA":
        raise UserError("unsupported", file=file, key="peft_type", value=raw.get("peft_type"), expected="LORA")
    for key, plain in _PLAIN.items():
        if (raw.get(key) or plain) != plain:
            raise UserError("unsupported", file=file, key=key, value=raw[key], expected=repr(plain))
    for key, value in raw.items():
        if value and key not in _READ | _WITHOUT_EFFECT | _PLAIN.keys():
            raise UserError("unsupported", file=file, key=key, value=value, expected="an adapter without it")
    if raw.get("init_lora_weights") not in _STARTS:
        expected = "an adapter of the unchanged base (PEFT converts with path_initial_model_for_weight_conversion)"
        value = raw["init_lora_weights"]
        raise UserError("unsupported", file=file, key="init_lora_weights", value=value, expected=expected)
    try:
        return LoraSpec(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            rslora=bool(raw.get("use_rslora", False)),
            targets=_targets(raw, file),
            dropout=raw.get("lora_dropout", 0.0),
            dora=bool(raw.get("use_dora", False)),
        )
    except KeyError as error:
        raise UserError(f"missing key {error}", file=file, expected="a LoRA config of PEFT") from error
    except (TypeError, ValueError) as error:
        raise UserError(str(error), file=file, expected="a LoRA config of PEFT") from error


def _targets(raw: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    """The linears that `target_modules` means without `exclude_modules`, by PEFT's rules: names, ends of names, or one
    pattern for whole names. That all layers have them is left to `check_fits`."""
    linears = {
        f"model.layers.{layer}.{module_name(target)}": target for layer in range(_MOST_LAYERS) for target in TARGETS
    }
    modules, excluded = raw.get("target_modules"), raw.get("exclude_modules") or []
    known = ", ".join(_PEFT_NAMES.values())
    if modules == "all-linear":
        modules = list(_PEFT_NAMES.values())
    found: set[str] = set()
    for name in [modules] if isinstance(modules, str) else modules if isinstance(modules, list) else ():
        matched = _matching([name] if isinstance(modules, list) else name, linears, "target_modules", file)
        if not matched:
            raise UserError("bad value", file=file, key="target_modules", value=name, expected=f"some of {known}")
        found |= matched
    targets = {linears[name] for name in found - _matching(excluded, linears, "exclude_modules", file)}
    if not targets:
        raise UserError("bad value", file=file, key="target_modules", value=modules, expected=f"some of {known}")
    return tuple(target for target in TARGETS if target in targets)


def _matching(modules: Any, linears: Collection[str], key: str, file: Path) -> set[str]:
    """Those of `linears` that a pattern matches, or that are or end in one of a list of names."""
    if isinstance(modules, str):
        try:
            pattern = re.compile(modules)
        except re.error as error:
            problem = f"not a regular expression: {error}"
            raise UserError(problem, file=file, key=key, value=modules, expected="names of modules") from error
        return {name for name in linears if pattern.fullmatch(name)}
    ends = tuple(f".{module}" for module in modules)
    return {name for name in linears if name.endswith(ends) or name in modules}
