"""A causal model with a cache of keys and values: one program for a prompt and for each next token.

    logits = program(input_ids [batch, S], cache_position [S])
    key[:, :, cache_position] = k(input_ids)    token i sees the keys j with i - window < j <= i

The caches are buffers `kv_cache.{layer}.key` and `.value` [batch, heads, length, width]. Nothing is
ever reset: a new text overwrites the positions it needs, and no token looks ahead of its own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from slimfx.errors import CaptureError, need

_NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")
_KINDS = ("full_attention", "sliding_attention")
_TOLERANCE = {torch.float32: 1e-3}
"""Largest difference from the model without a cache, relative to its largest logit."""
_COARSE = 5e-2
"""The same for types of 16 bits."""


class Decoder(nn.Module):
    """A Hugging Face model that keeps the keys and values of earlier tokens in its own buffers."""

    def __init__(self, model: nn.Module, length: int, batch: int) -> None:
        """`length` tokens of `batch` rows.

        Raises:
            CaptureError: a layer keeps something else, or sees tokens by another rule.
        """
        super().__init__()
        kept = _kept(model)
        self.model = model
        self.kv_cache = nn.ModuleList(
            _LayerCache(layer.keys, layer.values, length, batch) for layer in kept
        )
        self.length, self.batch, self.dtype = length, batch, kept[0].keys.dtype
        self.windows = _windows(model, kept)
        self._slot = _slot_class()

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """Logits [batch, S, vocabulary] of the tokens at these positions."""
        masks = {kind: self._mask(cache_position, window) for kind, window in self.windows.items()}
        [mask] = masks.values() if len(masks) == 1 else [masks]
        slots = [self._slot(layer.key, layer.value, cache_position) for layer in self.kv_cache]
        return self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=cache_position[None],
            past_key_values=need("transformers").Cache(layers=slots),
            use_cache=True,
        )[0]

    def _mask(self, cache_position: Tensor, window: int | None) -> Tensor:
        """0 where a token [1, 1, S, length] sees a slot, and the least number elsewhere.

        Added to the scores, which every kind of attention takes; a mask of bools some do not.
        """
        slots, tokens = torch.arange(self.length, device=cache_position.device), cache_position
        visible = slots <= tokens[:, None]
        if window is not None:
            visible = visible & (slots > tokens[:, None] - window)
        mask = torch.where(visible, 0.0, torch.finfo(self.dtype).min).to(self.dtype)
        return mask[None, None]


class _LayerCache(nn.Module):
    """The buffers of one layer, in the widths of a first token's keys and values."""

    def __init__(self, key: Tensor, value: Tensor, length: int, batch: int) -> None:
        super().__init__()
        self.register_buffer("key", key.new_zeros(batch, key.shape[1], length, key.shape[3]))
        self.register_buffer(
            "value", value.new_zeros(batch, value.shape[1], length, value.shape[3])
        )


def decoder_inputs(vocabulary: int, length: int, batch: int) -> dict[str, Tensor]:
    """A prompt of so many tokens, from the first position on."""
    ids = (torch.arange(batch * length) % vocabulary).reshape(batch, length)
    return {"input_ids": ids, "cache_position": torch.arange(length)}


@torch.no_grad()
def check_decoder(decoder: Decoder, vocabulary: int) -> None:
    """Three tokens at once and two one by one must have the logits that all five have together.

    Raises:
        CaptureError: they have others.
    """
    tokens = min(5, decoder.length)
    inputs = decoder_inputs(vocabulary, tokens, decoder.batch)
    steps = [slice(0, tokens - 2), *(slice(i, i + 1) for i in range(tokens - 2, tokens))]
    ids, positions = inputs["input_ids"], inputs["cache_position"]
    found = torch.cat([decoder(ids[:, s], positions[s]) for s in steps if s.stop], dim=1)
    expected = decoder.model(input_ids=ids, use_cache=False)[0]
    limit = _TOLERANCE.get(found.dtype, _COARSE)
    worst = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    if not worst <= limit:
        raise CaptureError(
            f"{type(decoder.model).__name__}: with a cache its logits differ by {worst:.2g} of the "
            f"largest, the limit is {limit:g}; capture it without kv_cache"
        )
    for buffer in decoder.kv_cache.buffers():
        buffer.zero_()


def check_model(model: nn.Module) -> None:
    """Refuse a model that no cache can be handed to.

    Raises:
        CaptureError: it is no causal language model, or does not take what a cache needs.
    """
    missing = [n for n in _NEEDED if n not in inspect.signature(model.forward).parameters]
    generates: Any = getattr(model, "can_generate", None)
    if generates is None or not generates() or missing:
        why = f"takes no {missing[0]}" if missing else "is no causal language model"
        raise CaptureError(
            f"{type(model).__name__} {why}, so it cannot keep a cache; capture it without kv_cache"
        )


@torch.no_grad()
def _kept(model: nn.Module) -> list[Any]:
    """The layers of a cache after one token: their keys and values have every size but the length.

    Raises:
        CaptureError: a layer keeps something else.
    """
    config: Any = model.config
    cache = need("transformers").DynamicCache(config=config)
    device = next(model.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    for i, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (keys, values)):
            raise CaptureError(
                f"{type(model).__name__}: layer {i} keeps a {type(layer).__name__}, not keys and "
                f"values of its own; capture it without kv_cache"
            )
    return cache.layers


def _windows(model: nn.Module, kept: list[Any]) -> dict[str, int | None]:
    """Kind of attention -> how many tokens it looks back, itself among them (None: all)."""
    config: Any = model.config
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
    windows = [getattr(layer, "sliding_window", None) for layer in kept]
    found = dict(zip(kinds or [_KINDS[0]] * len(kept), windows))
    for kind in found:
        if kind not in _KINDS:
            raise CaptureError(
                f"{type(model).__name__}: layers of {kind} have no mask here, only those of "
                f"{' and '.join(_KINDS)}; capture it without kv_cache"
            )
    return found


def _slot_class() -> type:
    """transformers' layer of fixed length, over tensors and positions that it is given."""
    fixed: Any = need("transformers.cache_utils").StaticLayer

    class Slot(fixed):  # the parent would count the tokens in a tensor of its own
        def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
            self.keys, self.values, self.positions = keys, values, positions
            self.max_cache_len, self.is_initialized = keys.shape[2], True

        def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
            self.keys.index_copy_(2, self.positions, key)
            self.values.index_copy_(2, self.positions, value)
            return self.keys, self.values

        def get_seq_length(self) -> Tensor:
            return self.positions[0]

    return Slot
