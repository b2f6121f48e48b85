"""`config.json` of Hugging Face's transformers to `ModelConfig`, and back.

Both ways of writing rotary parameters are read: `rope_theta` and `rope_scaling` (transformers 4)
and `rope_parameters` (transformers 5). A key that is not understood is an error unless its value
says "off" (null, false, zero, empty) or it is known not to change what the model computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lm.formats.common import IGNORE_HINT
from lm.formats.families import FAMILIES, family_of, make_config
from lm.formats.family import Family, HuggingFace
from lm.formats.huggingface.keys import ACTIVATIONS, DEFAULTS, KEYS, NOTHING, is_harmless
from lm.formats.huggingface.rope import read_rope, rope_type, write_rope
from lm.model import Latent, ModelConfig, Rope
from lm.model.traits import Kind

# Keys of the fields of `Latent`, in their order.
LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MAX_LAYERS = 10_000  # more are refused before anything is allocated for them
# Models of more than text: the type of the text model where `text_config` does not say it, and
# those whose text model is not a causal one.
TEXT_TYPES = {"gemma3": "gemma3_text", "mistral3": "mistral"} | dict.fromkeys(
    ("llava", "llava_next", "vipllava", "idefics3", "smolvlm"), "llama"
)
NOT_CAUSAL = ("paligemma",)
_TIED = "tie_word_embeddings"
_KINDS: dict[str, Kind] = {"sliding_attention": "local", "full_attention": "global"}


class Reader:
    """The dictionary of a configuration; it knows which of its keys were asked for."""

    def __init__(self, data: Mapping[str, Any], fmt: HuggingFace) -> None:
        self.data, self.fmt = data, fmt
        self.defaults = {**DEFAULTS, **fmt.defaults}
        self.used: set[str] = set()

    def __call__(self, key: str) -> Any:
        """The value of a key, or transformers' default for it."""
        self.used.add(key)
        return self.data.get(key, self.defaults.get(key))

    def size(self, key: str) -> int:
        """The value of a key that has to be a positive integer."""
        value = self(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"config.json key {key!r} is {value!r}; it has to be a positive integer"
            )
        return value

    def check_rest(self, ignore: Collection[str]) -> None:
        """Raises ValueError where keys are left that may change what the model computes."""
        known = self.used | set(self.fmt.other_keys) | set(ignore)
        left = {key: value for key, value in self.data.items() if key not in known}
        rest = {key: value for key, value in left.items() if value and not is_harmless(key, value)}
        if rest:
            found = ", ".join(f"{key!r}={value!r}" for key, value in sorted(rest.items()))
            raise ValueError(
                f"config.json of model_type {self.fmt.model_type!r} has {found}, which is not "
                f"supported; understood are {', '.join(sorted(self.used))}. {IGNORE_HINT}"
            )


def from_huggingface(
    data: Mapping[str, Any], *, vocab_multiple: int = 128, ignore: Collection[str] = ()
) -> ModelConfig:
    """The `ModelConfig` of a `config.json`, of a model of more than text that of its text model.

    Args:
      data: its contents.
      vocab_multiple: see `ModelConfig`.
      ignore: keys to pass over, because they do not change what the model computes.

    Raises:
      ValueError: an unknown model type, activation, rope type or key, or a wrong value; the
        message has key, value, and what is supported.
    """
    families = {family.huggingface.model_type: family for family in FAMILIES.values()}
    outer, data = data.get("model_type"), _text_config(data)
    model_type = data.get("model_type")
    if model_type not in families:
        inside = "" if model_type == outer else f" with a text model of type {model_type!r}"
        raise ValueError(
            f"config.json has model_type {outer!r}{inside}; supported are "
            f"{', '.join(sorted(families))}, alone or as the text model of a larger one"
        )
    family = FAMILIES[families[model_type].name]
    fmt = family.huggingface
    read = Reader(data, fmt)
    num_heads = read.size("num_attention_heads")
    num_layers = read.size("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise ValueError(
            f"config.json key 'num_hidden_layers' is {num_layers}; use at most {MAX_LAYERS:,}"
        )
    max_length = read.size("max_position_embeddings")
    kinds, window = _read_window(read, family, num_layers)
    arguments: dict[str, Any] = {"window": window, "tied": bool(read("tie_word_embeddings"))}
    arguments |= _read_rope(read, family, max_length, ignore)
    arguments["norm"] = dataclasses.replace(family.traits.norm, eps=float(read(fmt.eps_key)))
    arguments["activation"] = _read_activation(read)
    if family.traits.latent is not None:
        arguments["latent"] = _read_latent(read, num_layers)
    for key in fmt.keys:
        arguments |= KEYS[key].read(read(key))
    config = make_config(
        family.name,
        vocab_size=read.size("vocab_size"),
        embed_dim=read.size("hidden_size"),
        hidden_dim=read.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        max_length=max_length,
        vocab_multiple=vocab_multiple,
        kinds=kinds,
        **arguments,
    )
    read.check_rest(ignore)
    return config


def _text_config(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of the text model: all, or the `text_config` of a model of more than text."""
    outer, inner = data.get("model_type"), data.get("text_config")
    if not isinstance(inner, Mapping):
        return data
    if outer in NOT_CAUSAL:
        raise ValueError(
            f"config.json has model_type {outer!r}, whose prompts see what comes after them; its "
            "text model alone computes something else, which is not supported"
        )
    # Which of the two counts depends on the version that wrote them; a stored output is used.
    tied = [each[_TIED] for each in (data, inner) if _TIED in each]
    said = {_TIED: any(tied)} if tied else {}
    return {"model_type": TEXT_TYPES.get(outer or "", outer), **inner, **said}


def _read_latent(read: Reader, num_layers: int) -> Latent:
    if not read("rope_interleave"):
        raise ValueError(
            "config.json key 'rope_interleave' is false; latent attention is read with rotated "
            "dimensions in pairs, true"
        )
    dense, experts = read("first_k_dense_replace") or 0, read("n_routed_experts")
    if experts and dense < num_layers:
        raise ValueError(
            f"config.json has mixtures of n_routed_experts={experts} experts from layer "
            f"first_k_dense_replace={dense} on; of this model type only dense layers are supported "
            f"(first_k_dense_replace of at least num_hidden_layers={num_layers})"
        )
    kv_rank, nope, rope, value = map(read.size, LATENT_SIZES)
    query_rank = None if read("q_lora_rank") is None else read.size("q_lora_rank")
    return Latent(kv_rank, nope, rope, value, query_rank)


def _read_activation(read: Reader) -> str:
    key = read.fmt.activation_key
    name = read(key) or read.defaults.get(key, DEFAULTS["hidden_act"])
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json key {key!r} is {name!r}; supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _read_window(
    read: Reader, family: Family, num_layers: int
) -> tuple[Sequence[Kind], int | None]:
    """Kinds of the layers and the window of the local ones."""
    how = read.fmt.window
    if how is None:
        return ["global" for _ in range(num_layers)], None
    window = read("sliding_window")
    if how == "flag" and not read("use_sliding_window"):
        window = None
    if window is not None and window < 1:
        raise ValueError(f"config.json key 'sliding_window' is {window}; use null or at least 1")
    types = None if how == "all" else read("layer_types")
    first_local = read("max_window_layers") if how == "flag" else 0
    periods = [period for key in read.fmt.period_keys if (period := read(key))]
    if types is not None:
        return _read_types(types, window, num_layers), window
    period = (*periods, len(family.traits.pattern))[0]

    def is_local(i: int) -> bool:
        if how == "pattern":
            return (i + 1) % period != 0
        return window is not None and i >= first_local

    return ["local" if is_local(i) else "global" for i in range(num_layers)], window


def _read_types(types: Sequence[str], window: int | None, num_layers: int) -> list[Kind]:
    if len(types) != num_layers or not set(types) <= _KINDS.keys():
        raise ValueError(
            f"config.json key 'layer_types' is {types}; it has to name 'sliding_attention' or "
            f"'full_attention' for each of num_hidden_layers={num_layers}"
        )
    if window is None and "sliding_attention" in types:
        raise ValueError(
            "config.json key 'layer_types' names 'sliding_attention', but there is no "
            "'sliding_window' in use; give one, or name 'full_attention' only"
        )
    return [_KINDS[kind] for kind in types]


def _read_rope(
    read: Reader, family: Family, max_length: int, ignore: Collection[str]
) -> dict[str, Rope]:
    """The rotary embeddings, of whichever way they are written."""
    theta_key, fraction_key = read.fmt.rope_keys
    traits = family.traits
    old, new = read("rope_scaling") or {}, read("rope_parameters") or {}
    outside = {
        "rope_theta": read(theta_key),
        "partial_rotary_factor": read(fraction_key or "partial_rotary_factor"),
    }
    outside = {key: value for key, value in outside.items() if value is not None}
    is_partial, has_latent = fraction_key is not None, traits.latent is not None

    def parse(parameters: Mapping[str, Any], default_theta: float) -> Rope:
        parameters = {"rope_theta": default_theta, **outside, **parameters}
        if rope_type(parameters) == "longrope":
            # Where both say it, transformers believes this one.
            original = "original_max_position_embeddings"
            parameters[original] = read(original) or parameters.get(original)
        known = {key: x for key, x in parameters.items() if key not in ignore}
        return read_rope(known, max_length, read.fmt.scalings, is_partial, has_latent)

    if traits.local_rope is None:
        return {"rope": parse(old or new, 10_000.0)}
    everywhere = {**(new.get("full_attention") or {}), **old}
    local, theta = dict(new.get("sliding_attention") or {}), read("rope_local_base_freq")
    default = traits.local_rope.theta
    local.setdefault("rope_theta", default if theta is None else theta)
    surplus = new.keys() - {"full_attention", "sliding_attention"}
    if surplus:
        raise ValueError(
            f"config.json key 'rope_parameters' has {sorted(surplus)}; of model_type "
            f"{read.fmt.model_type!r} it holds 'full_attention' and 'sliding_attention'"
        )
    return {"rope": parse(everywhere, traits.rope.theta), "local_rope": parse(local, default)}


def to_huggingface(config: ModelConfig, extra: Mapping[str, Any] = NOTHING) -> dict[str, Any]:
    """The `config.json` of a model; `from_huggingface` reads the same `ModelConfig` from it.

    Rotary parameters are written both ways, so that transformers 4 and 5 read them.

    Args:
      config: the model.
      extra: further keys (`bos_token_id`, `eos_token_id`, ...); these change nothing.

    Raises:
      ValueError: the family is unknown, or its format cannot say what the model is; the message
        names the fields.
    """
    family = family_of(config)
    fmt = family.huggingface
    layer = config.layers[0]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    data: dict[str, Any] = {
        "architectures": [fmt.class_name],
        "model_type": fmt.model_type,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": layer.feed_forward.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": layer.attention.num_heads,
        fmt.activation_key: names[layer.feed_forward.activation],
        "max_position_embeddings": config.max_length,
        fmt.eps_key: config.norm.eps,
        "tie_word_embeddings": config.tied,
    }
    data |= {key: KEYS[key].write(config, layer) for key in fmt.keys}
    if family.traits.latent is not None:
        data |= _write_latent(layer.attention.latent, config.num_layers)
    data |= _write_window(config, fmt) | _write_rope(config, family)
    _check_same(config, data)
    return {**data, **extra}


def _write_latent(latent: Latent | None, num_layers: int) -> dict[str, Any]:
    if latent is None:
        raise ValueError("a layer has no latent; this Hugging Face format needs one")
    sizes = (latent.kv_rank, latent.nope_dim, latent.rope_dim, latent.value_dim)
    return {
        **dict(zip(LATENT_SIZES, sizes, strict=True)),
        "q_lora_rank": latent.query_rank,
        "rope_interleave": True,
        "first_k_dense_replace": num_layers,
        "num_nextn_predict_layers": 0,
    }


def _write_window(config: ModelConfig, fmt: HuggingFace) -> dict[str, Any]:
    windows = [layer.attention.window for layer in config.layers]
    window = next((w for w in windows if w is not None), None)
    if fmt.window is None:
        return {}
    if fmt.window == "all":
        return {"sliding_window": window}
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    data = {"sliding_window": window, "layer_types": types}
    if fmt.window == "flag":
        used = window is not None
        first = types.index("sliding_attention") if used else config.num_layers
        data |= {"use_sliding_window": used, "max_window_layers": first}
    return data


def _write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    attentions = [layer.attention for layer in config.layers]
    local = [a.rope for a in attentions if a.window is not None]
    everywhere = [a.rope for a in attentions if a.window is None]
    traits = family.traits
    rope = (everywhere or local)[0]
    if traits.local_rope is not None and not everywhere:
        rope = traits.rope
    if rope is None:
        raise ValueError("a layer has no rotary embedding; the Hugging Face formats need one")
    theta_key, fraction_key = family.huggingface.rope_keys
    new = write_rope(rope, fraction_key is not None)
    old = {k: v for k, v in new.items() if k not in ("rope_theta", "partial_rotary_factor")}
    data: dict[str, Any] = {theta_key: rope.theta, "rope_parameters": new}
    data["rope_scaling"] = None if rope.scaling is None else old
    if fraction_key is not None:
        data[fraction_key] = rope.fraction
    if rope.scaling is not None and rope.scaling.kind == "longrope":
        data["original_max_position_embeddings"] = rope.scaling.original_length
    if traits.local_rope is not None:
        local_rope = next(filter(None, local), traits.local_rope)
        data["rope_local_base_freq"] = local_rope.theta
        data["rope_parameters"] = {
            "full_attention": new,
            "sliding_attention": write_rope(local_rope, False),
        }
    return data


def _check_same(config: ModelConfig, data: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the fields, unless `data` says all that `config` does."""
    again = from_huggingface(data, vocab_multiple=config.vocab_multiple)
    if again.layers == config.layers:
        again = dataclasses.replace(again, stacks=config.stacks)
    if again == config:
        return
    ours, theirs = _flat(config), _flat(again)
    faults = [
        f"{name}={value!r} (it would be read as {theirs.get(name)!r})"
        for name, value in ours.items()
        if name not in theirs or theirs[name] != value
    ]
    raise ValueError(
        f"the Hugging Face format of family {config.family!r} cannot say {'; '.join(faults)}"
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The fields of a tree of dataclasses by path; a model's stacks as its layers."""
    if not dataclasses.is_dataclass(value):
        return {name: value}
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, ModelConfig):
        del fields["stacks"]
        fields |= {f"layers/{i}": layer for i, layer in enumerate(value.layers)}
    prefix = f"{name}/" if name else ""
    return {
        key: x for field, each in fields.items() for key, x in _flat(each, prefix + field).items()
    }
