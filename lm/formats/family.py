"""What a model family is: its traits, and how Hugging Face and llama.cpp write such models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from lm.formats.huggingface.transforms import Transform
from lm.model.traits import Traits


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a Hugging Face file and the one to three of our weights in it.

    Attributes:
      name: of the tensor; `{i}` is the layer.
      ours: paths of our weights, fields of `ModelWeights` or, where the name has `{i}`, of
        `LayerWeights`, as `attention/query`.
      transform: between them.
      aliases: names it also goes by; read, never written.
    """

    name: str
    ours: tuple[str, ...]
    transform: Transform = Transform()
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """How transformers writes the models of a family.

    Attributes:
      model_type: value of that key of `config.json`.
      class_name: of the causal language model in transformers, written under `architectures`.
      tensors: of the model and of every layer. An entry whose weights the configuration does not
        have is left out.
      defaults: what transformers assumes where a key is absent.
      keys: the optional keys it has, of `huggingface.config.KEYS`.
      activation_key, eps_key: names of the keys of the activation and of the norms' epsilon.
      window: layers that see `sliding_window`: none, all, those of `layer_types` or from
        `max_window_layers` on if `use_sliding_window` ("flag"), or those of `layer_types` or of the
        family's pattern ("pattern").
      period_keys: keys with the length of that pattern.
      rope_keys: names of the rotary base and fraction outside `rope_parameters`; where the
        fraction's is None, a fraction other than 1 is refused.
      scalings: rope types it may have.
      other_keys: keys of this model type that do not change what is computed.
      ignored: regular expressions of tensors that are not weights (buffers of old files).
    """

    model_type: str
    class_name: str
    tensors: tuple[Entry, ...]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: tuple[str, ...] = ("num_key_value_heads", "head_dim")
    activation_key: str = "hidden_act"
    eps_key: str = "rms_norm_eps"
    window: Literal["all", "flag", "pattern"] | None = None
    period_keys: tuple[str, ...] = ()
    rope_keys: tuple[str, str | None] = ("rope_theta", None)
    scalings: tuple[str, ...] = ("linear", "llama3", "yarn")
    other_keys: tuple[str, ...] = ()
    ignored: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


@dataclasses.dataclass(frozen=True)
class GGUF:
    """How llama.cpp writes the models of a family.

    Attributes:
      architectures: values of `general.architecture`.
      eps_key: of the norms.
      period: without a pattern in the file, the last of every `period` layers is global and the
        others see a window; 0: all layers see the window if there is one.
      keys: optional key of the metadata -> trait, and its value where the key is absent.
      has_biases: which projections have biases is seen from the tensors, not given by the family.
      wide_layers: models of so many layers divide the scores by the square root of
        embed_dim / num_heads (the largest Gemmas).
      interleaved: rows of queries and keys are stored with rotated pairs as neighbours.
      fused: query, key and value are one tensor.
      fused_gate: gate and up are one tensor, `ffn_up`.
    """

    architectures: tuple[str, ...]
    eps_key: str = "attention.layer_norm_rms_epsilon"
    period: int = 0
    keys: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
    has_biases: bool = False
    wide_layers: int | None = None
    interleaved: bool = False
    fused: bool = False
    fused_gate: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
      name: what `ModelConfig.family` becomes. Families that differ in traits alone share a name
        and a format: Llama 2, Llama 3 and SmolLM2 are "llama".
      traits: what its models compute.
      huggingface, gguf: how others write them; None where they do not, or under another family's
        name.
    """

    name: str
    traits: Traits
    huggingface: HuggingFace
    gguf: GGUF | None = None

    def variant(self, **traits: Any) -> Family:
        """The family with other traits."""
        return dataclasses.replace(self, traits=dataclasses.replace(self.traits, **traits))
