"""`adapter_config.json` of PEFT: which modules a LoRA adapter is for, with what rank and scale."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from lm.files import FormatError
from lm.formats.common import IGNORE_HINT, read_json

CONFIG = "adapter_config.json"
Values = Mapping[str, Any]

# Keys whose value does not change what a finished adapter computes; biases are in its file.
_METADATA_KEYS = """
auto_mapping base_model_name_or_path bias corda_config eva_config fan_in_fan_out inference_mode
init_lora_weights loftq_config lora_dropout lora_ga_config megatron_core peft_type peft_version
qalora_group_size revision runtime_config task_type
"""
_READ_KEYS = """
alpha_pattern ensure_weight_tying exclude_modules layers_pattern layers_to_transform lora_alpha
modules_to_save r rank_pattern target_modules trainable_token_indices use_dora use_rslora
"""
_METADATA, _READ = frozenset(_METADATA_KEYS.split()), frozenset(_READ_KEYS.split())
# Initializations that leave the base as it was; others (PiSSA, OLoRA, ...) subtract from it.
_INITS = (True, False, None, "true", "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The keys that say what an adapter computes.

    Attributes:
      rank, alpha: of modules that no pattern names.
      target_modules: a regular expression, or names and ends of names; None where it is not given.
      exclude_modules: the same, of modules without an adapter.
      rank_pattern, alpha_pattern: regular expression of a name's end -> rank, alpha.
      layers, layers_pattern: only these layers, whose numbers follow one of these names.
      rslora, dora: see `LoRA`.
      modules_to_save: ends of names of modules that the adapter replaces.
      token_rows: end of a module's name, or "" for the embedding -> its rows that the adapter
        replaces.
      tying: the output has an adapter where the embedding has.
    """

    rank: int = 8
    alpha: float = 8
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    token_rows: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    tying: bool = False

    def targets(self, name: str, is_output: bool, is_embedding: bool) -> bool | None:
        """Whether module `name` has an adapter; None where the configuration does not say."""
        if self.exclude_modules and _names(self.exclude_modules, name):
            return False
        if self.replaces(name):
            return False
        if self.target_modules is None or (is_output and self.tying):
            return None
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return not is_output and not is_embedding
            return _names(self.target_modules, name)
        if not _names(self.target_modules, name):
            return False
        return name in self.target_modules or self.layers is None or self._layer(name)

    def replaces(self, name: str) -> bool:
        """Whether the adapter holds a whole module `name`."""
        return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in self.modules_to_save)

    def rows_of(self, name: str, is_embedding: bool) -> tuple[int, ...] | None:
        """The rows of an embedding or output that the adapter replaces; None for none."""
        ends = (end for end in self.token_rows if (_names((end,), name) if end else is_embedding))
        return next((self.token_rows[end] for end in ends), None)

    def _layer(self, name: str) -> bool:
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if match := re.match(pattern, name):
                return int(match[1]) in (self.layers or ())
        return False

    def rank_of(self, name: str) -> int:
        return int(_by_pattern(self.rank_pattern, name, self.rank))

    def scale_of(self, name: str) -> float:
        rank, alpha = self.rank_of(name), _by_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _names(pattern: str | tuple[str, ...], name: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return name in pattern or any(name.endswith(f".{end}") for end in pattern)


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def read_adapter_config(directory: pathlib.Path, ignore: Collection[str] = ()) -> AdapterConfig:
    """The `adapter_config.json` in a directory; of it, the keys of `ignore` are passed over.

    Raises:
      FormatError: there is none, it is not JSON, or of another kind of adapter than LoRA.
      ValueError: it asks for what is not supported; the message names the key.
    """
    file = directory / CONFIG
    if directory.is_file():
        raise FormatError(f"{directory} is a file; give a PEFT adapter's directory")
    inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    remedy = "; give a PEFT adapter's directory"
    if (directory / "config.json").exists():
        remedy = f"; {directory} is a model: give it as --model, and as --adapter a PEFT adapter"
    elif inside:
        remedy = f"; give one of the directories in it that has one: {', '.join(inside)}"
    values = read_json(file, remedy)
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else values
        raise FormatError(f"{file} has peft_type {kind!r}; only 'LORA' is read here")
    return parse_adapter_config({k: v for k, v in values.items() if k not in ignore})


def parse_adapter_config(values: Values) -> AdapterConfig:
    """The configuration in the keys of `adapter_config.json`. Errors as `read_adapter_config`."""
    init = values.get("init_lora_weights", True)
    if init not in _INITS:
        raise ValueError(
            f"{CONFIG} key 'init_lora_weights' is {init!r}, which changes the base model as well; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in values.items():
        if key not in _METADATA | _READ and value:
            raise ValueError(f"{CONFIG} key {key!r}={value!r} is not supported. {IGNORE_HINT}")
    rows = values.get("trainable_token_indices") or {}
    rows = rows if isinstance(rows, Mapping) else {"": rows}
    config = AdapterConfig(
        rank=values.get("r", 8),
        alpha=values.get("lora_alpha", 8),
        target_modules=_strings(values.get("target_modules")),
        exclude_modules=_strings(values.get("exclude_modules")),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
        layers=_tuple(values.get("layers_to_transform")) or None,
        layers_pattern=_tuple(values.get("layers_pattern")),
        rslora=bool(values.get("use_rslora")),
        dora=bool(values.get("use_dora")),
        modules_to_save=_tuple(values.get("modules_to_save")),
        token_rows={end: tuple(indices) for end, indices in rows.items()},
        tying=bool(values.get("ensure_weight_tying")),
    )
    for rank in (config.rank, *config.rank_pattern.values()):
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{CONFIG} has rank {rank!r}; a rank is 1 or more")
    return config


def _strings(value: Any) -> str | tuple[str, ...] | None:
    if not isinstance(value, list):
        return value
    # PEFT itself writes the shorthand as the only entry of a list, too.
    return "all-linear" if value == ["all-linear"] else tuple(value)


def _tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str | int) else tuple(value or ())


def write_adapter_config(
    modules: Mapping[str, tuple[int, float]], others: set[str], dora: bool, base_model: str | None
) -> dict[str, Any]:
    """`adapter_config.json`, as a dictionary.

    Args:
      modules: name -> rank and scale, of those with an adapter.
      others: names of the modules without.
      dora: whether they have magnitudes.
      base_model: its name, for the reader.
    """
    alphas = {name: _number(rank * scale) for name, (rank, scale) in modules.items()}
    rank = Counter(rank for rank, _ in modules.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    ends = {name.rsplit(".", 1)[-1] for name in modules}
    if ends & {name.rsplit(".", 1)[-1] for name in others}:
        ends = set(modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ends),
        "rank_pattern": {name: r for name, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
    }


def _number(x: float) -> float:
    """An integer where `x` is one but for the rounding of float32."""
    near = round(x)
    return near if abs(x - near) < 1e-6 * max(1.0, abs(x)) else x
