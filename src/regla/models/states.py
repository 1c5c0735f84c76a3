"""States of texts in files: saved after a prompt, continued later, elsewhere, or as rows of one batch.

A state file is a safetensors file. Its tensors are, for layer N of the model,

    layers.N.S, layers.N.m, layers.N.conv,
    layers.N.window, layers.N.seen          of a linear layer, see `regla.layers.attention.ReGLAState`
    layers.N.keys, layers.N.values          [B, heads, tokens, head_dim] of a softmax layer (a window: its last tokens)
    layers.N.conv                           of a softmax layer with a convolution
    input_ids, attention_mask               int32 and bool [B, L]: the texts, of which the layers have read some

and its one entry of metadata, `regla_state`, is JSON: the format's version, the number of tokens read, the dtype, the
configuration and a digest of the weights of the model, and a SHA-256 of all this and the tensors.

Shapes: B texts, L tokens of a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
)

from regla.layers.attention import ReGLAState
from regla.models.cache import (
    CACHE,
    DynamicConvCacheLayer,
    ReGLACacheLayer,
    SlidingCacheLayer,
    SoftmaxCacheLayer,
    adopt_cache,
    rows_of,
)
from regla.models.configuration import ReGLAConfig
from regla.runtime.files import check_new_file, write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
_METADATA = "regla_state"
_SAMPLES = 64  # entries of each parameter in the digest of the weights

# What may differ between two configurations of one model: none of it changes what a token does to a state.
_FREE = {
    *("architectures", "auto_map", "backend", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id"),
    *("output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict"),
    *("transformers_version", "use_cache"),
}
_LINEAR, _WINDOW, _FULL = "linear", "window", "full"  # kinds of layers
_KINDS: dict[type, str] = {DynamicLayer: _FULL, DynamicSlidingWindowLayer: _WINDOW}
_KINDS |= {SoftmaxCacheLayer: _FULL, SlidingCacheLayer: _WINDOW}


class SavedState(NamedTuple):
    """Texts and the cache of a model that has read all of them but, as a rule, the last token.

    `model.generate(**state.arguments())` continues them.
    """

    cache: Cache
    """After the first `cache.get_seq_length()` tokens."""
    input_ids: Tensor
    """[B, L] tokens, padding included."""
    attention_mask: Tensor
    """[B, L] int64, 0 for padding."""

    def arguments(self) -> dict[str, Any]:
        """What `generate` takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            CACHE: self.cache,
        }


def save_state(
    path: str | Path,
    model: PreTrainedModel,
    cache: Cache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> None:
    """Write a cache and the texts that it is of to a new file, whole or not at all.

    Continuing what `load_state` reads equals continuing with `cache`, bit for bit on the same device. The states of
    linear layers have one size whatever the length; a token adds 5 bytes, and keys and values where there are softmax
    layers.

    Args:
        path: the file, which must not exist.
        model: the model that filled the cache: one of regla, a converted one or a softmax model of transformers.
        cache: a DynamicCache.
        input_ids: [B, L] all tokens so far. The cache may lack the last ones, as after `generate`, which never reads
            the last token it draws.
        attention_mask: [B, L], 0 for padding. None: there is none.

    Raises:
        ValueError: the file exists or cannot be written; a cache that is empty, static or of another kind of model;
            tokens that are not the cache's.
    """
    check_new_file(path)
    read = _tokens_read(cache)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    kinds = [_kind(layer, index) for index, layer in enumerate(cache.layers)]
    tensors = {
        f"layers.{index}.{name}": tensor
        for index, (layer, kind) in enumerate(zip(cache.layers, kinds, strict=True))
        for name, tensor in _parts(layer, kind).items()
    }
    rows = {len(tensor) for tensor in tensors.values()}
    if input_ids.ndim != 2 or {len(input_ids)} != rows or input_ids.shape[1] < read:
        raise ValueError(
            f"input_ids has the shape {list(input_ids.shape)}, but the cache has read {read} tokens of "
            f"{max(rows)} texts; pass all tokens of these texts, [{max(rows)}, {read} or more]"
        )
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has the shape {list(attention_mask.shape)}, and input_ids {list(input_ids.shape)}; "
            "pass an entry for each token"
        )
    tensors |= {"input_ids": input_ids.to(torch.int32), "attention_mask": attention_mask.bool()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {"format": FORMAT, "tokens": read, "layers": kinds, **_identity(model)}
    content["sha256"] = _checksum(content, tensors)
    write_bytes(path, safetensors.torch.save(tensors, {_METADATA: json.dumps(content)}))


def load_state(path: str | Path, model: PreTrainedModel) -> SavedState:
    """What `save_state` wrote, on the model's device.

    Args:
        path: the file.
        model: the model that the state is of, in the dtype in which it was. Its configuration is compared, but for
            what has no influence on a state, and 64 entries of each of its parameters.

    Raises:
        ValueError: no state file, a damaged one, one of another version, or of another model.
    """
    content, tensors = _read(path)
    _check_identity(path, content["identity"], _identity(model)["identity"])
    cache = empty_cache(model)
    kinds = [_kind(layer, index) for index, layer in enumerate(cache.layers)]
    if kinds != content["layers"]:
        raise ValueError(f"{path} is the state of a model with other layers; load it with the model that it is of.")
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    for index, (layer, kind) in enumerate(zip(cache.layers, kinds, strict=True)):
        prefix = f"layers.{index}."
        parts = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
        _fill(layer, kind, parts, content["tokens"])
    return SavedState(cache, tensors["input_ids"].long(), tensors["attention_mask"].long())


def stack_states(states: Sequence[SavedState], model: PreTrainedModel, pad_token_id: int = 0) -> SavedState:
    """The texts of several states as the rows of one batch; what was given stays as it is.

    Shorter texts are padded on the left: linear layers keep their states as they are, keys and values get zeros that
    the mask hides, and positions count real tokens, so each row continues as it would alone.

    Args:
        states: of this model and on its device, from `load_state` or made of a cache.
        pad_token_id: what stands in `input_ids` for padding.

    Raises:
        ValueError: no state, or states with different numbers of tokens that their caches have not read.
    """
    if not states:
        raise ValueError("states is empty; give at least one state")
    read = [_tokens_read(state.cache) for state in states]
    unread = sorted({state.input_ids.shape[1] - count for state, count in zip(states, read, strict=True)})
    if len(unread) > 1:
        raise ValueError(
            f"the states have {unread[0]} to {unread[-1]} tokens that their caches have not read; a batch needs the "
            "same number in all: give the longer ones to the model first"
        )
    tokens, length = max(read), max(state.input_ids.shape[1] for state in states)
    cache = empty_cache(model)
    for index, layer in enumerate(cache.layers):
        kind = _kind(layer, index)
        found = [_parts(state.cache.layers[index], kind) for state in states]
        joined = {}
        for name in found[0]:
            rows = [parts[name] for parts in found]
            if name in ("keys", "values"):
                longest = max(row.shape[-2] for row in rows)
                rows = [pad(row, (0, 0, longest - row.shape[-2], 0)) for row in rows]
            joined[name] = torch.cat(rows)
        _fill(layer, kind, joined, tokens)
    ids = [pad(state.input_ids, (length - state.input_ids.shape[1], 0), value=pad_token_id) for state in states]
    masks = [pad(state.attention_mask, (length - state.attention_mask.shape[1], 0)) for state in states]
    return SavedState(cache, torch.cat(ids), torch.cat(masks))


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache that can hold this model's state, for any number of tokens."""
    config = model.config
    linear = config if isinstance(config, ReGLAConfig) else getattr(config, "linear_config", None)
    cache = DynamicCache(config=config)
    if linear is not None:
        adopt_cache(cache, linear)
    return cache


def _tokens_read(cache: Cache) -> int:
    if not isinstance(cache, Cache) or isinstance(cache, StaticCache):
        raise ValueError(f"cache is a {type(cache).__name__}, whose state cannot be saved; expected a DynamicCache")
    if not rows_of(cache):
        raise ValueError("cache is empty, so it has no state; give it to the model with some tokens first")
    return int(cache.get_seq_length())


def _kind(layer: CacheLayerMixin, index: int) -> str:
    if type(layer) is ReGLACacheLayer:
        return _LINEAR
    if isinstance(layer, DynamicConvCacheLayer):
        return f"{_WINDOW if isinstance(layer, DynamicSlidingWindowLayer) else _FULL} with convolution"
    if type(layer) in _KINDS:
        return _KINDS[type(layer)]
    raise ValueError(f"layer {index} of the cache is a {type(layer).__name__}, whose state cannot be saved")


def _parts(layer: Any, kind: str) -> dict[str, Tensor]:
    """The tensors of a layer, by name."""
    if kind == _LINEAR:
        parts = layer.read()._asdict()
    else:
        parts = {"keys": layer.keys, "values": layer.values, "conv": getattr(layer, "conv_state", None)}
    return {name: part for name, part in parts.items() if part is not None}


def _fill(layer: Any, kind: str, parts: dict[str, Tensor], tokens: int) -> None:
    """Give an empty layer the tensors of one that has read `tokens` tokens."""
    if kind == _LINEAR:
        layer.write(ReGLAState(**parts), tokens)
        return
    layer.update(parts["keys"], parts["values"])
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = tokens  # more than it keeps
    if "conv" in parts:
        layer.write_conv_state(parts["conv"])


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of a state file that is whole."""
    advice = "give a file that `regla generate --save-state` or save_state wrote"
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}; {advice}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[_METADATA])
            version, digest = content["format"], content.pop("sha256")
            # Copies: what safetensors gives may be the file itself, mapped into memory.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()} if version == FORMAT else {}  # noqa: SIM118
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); {advice}.") from error
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no state file, or a damaged one; {advice}.") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has version {version!r} of the format, and this regla reads {FORMAT}; use the regla that wrote it."
        )
    if digest != _checksum(content, tensors):
        raise ValueError(f"{path} is damaged: its content does not have the recorded SHA-256; save the state again.")
    return content, tensors


def _checksum(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    """What tells the state of this model from that of another: {"identity": ...}, as JSON has it."""
    found = {"dtype": str(model.dtype).removeprefix("torch."), "config": _meaning(model.config.to_dict())}
    found = json.loads(json.dumps(found, default=str))
    return {"identity": found | {"weights": _digest_of_weights(model)}}


def _meaning(config: dict[Any, Any]) -> dict[str, Any]:
    """A configuration without what has no influence on states."""
    return {
        str(key): _meaning(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _FREE and not str(key).startswith("_")
    }


def _digest_of_weights(model: PreTrainedModel) -> str:
    """SHA-256 of names, shapes and `_SAMPLES` evenly spaced entries of each parameter below the head."""
    parameters = sorted(model.base_model.named_parameters())
    digest = hashlib.sha256(repr([(name, list(parameter.shape)) for name, parameter in parameters]).encode())
    for _, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        entries = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]
        digest.update(entries.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_identity(path: str | Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise a ValueError unless both are of one model in one dtype."""
    if theirs["dtype"] != ours["dtype"]:
        raise ValueError(
            f"{path} is the state of a model in {theirs['dtype']}, and this one is in {ours['dtype']}; load the model "
            f"with dtype=torch.{theirs['dtype']}."
        )
    advice = "load it with the model that it is of"
    # A later version of a library may name more of what it takes for granted today.
    for key in sorted(theirs["config"].keys() & ours["config"].keys()):
        there, here = theirs["config"][key], ours["config"][key]
        if there != here:
            raise ValueError(
                f"{path} is the state of another model: {key} is {there!r} there and {here!r} here; {advice}."
            )
    if theirs["weights"] != ours["weights"]:
        raise ValueError(f"{path} is the state of a model with other weights; {advice}.")
