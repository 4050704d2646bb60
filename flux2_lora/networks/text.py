"""Text encoders of any size in little memory: one layer at a time, and all texts through it before the next.

Law: the network is transformers' own and so are its numbers; only when its weights are in memory is ours. Each layer is
read once for all texts of a wave, and the hidden states wait in host memory, so the peak is about one layer and the
states: Mistral's 24B encode on an 8 GB card, or on a CPU, unquantised. Of the embedding matrix only the rows of the
tokens that occur are read, and layers above the highest that is asked for not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from flux2_lora.conditioning import Conditioning
from flux2_lora.devices import compute_dtype, return_free_memory
from flux2_lora.errors import UserError
from flux2_lora.weights import Weights, open_folder, read_json

PromptEncoder = Callable[[Sequence[str]], Iterator[Conditioning]]
"""Texts -> one Conditioning of batch 1 for each, in order, on the CPU."""

WAVE_BYTES = 4 << 30
"""Hidden states that may wait in host memory; beyond it the layers are read once more for the next wave."""


class LayerByLayer:
    """A text encoder on the meta device whose layers get their weights when their turn comes.

    model: built without memory; weights: its tensors, names below the prefix that the file puts before the layers;
    layers: path of the ModuleList inside the model. keep: numbers of layers whose outputs are kept (1 is the first);
    with them the layers above the highest are dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        device: torch.device,
        *,
        layers: str,
        keep: Sequence[int] = (),
    ) -> None:
        self.model = model.eval()
        self.kept: dict[int, Tensor] = {}
        self._device, self._dtype, self._keep = device, compute_dtype(device), tuple(keep)
        self._weights = weights
        self._room: dict[str, Tensor] = {}
        stack = cast("nn.ModuleList", model.get_submodule(layers))
        if keep:
            del stack[max(keep) :]
        for index, layer in enumerate(stack):
            layer.forward = self._in_turn(layer, f"{layers}.{index}.", index + 1)
        self._prepare_rest(f"{layers}.")

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The model's own forward over all texts at once; inputs and outputs on the CPU."""
        self.kept = {}
        return self.model(**inputs)

    def _prepare_rest(self, layers: str) -> None:
        """Read what is outside the layers; embeddings of tokens become look-ups in the file."""
        rest = [name for name, _ in self.model.named_parameters() if not name.startswith(layers)]
        for name in rest:
            path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(path)
            if isinstance(owner, nn.Embedding):
                owner.forward = self._look_up(name)  # type: ignore[method-assign, assignment]
            else:
                setattr(owner, leaf, nn.Parameter(self._weights.read(name).dense(self._dtype), requires_grad=False))

    def _look_up(self, name: str) -> Callable[[Tensor], Tensor]:
        def embed(ids: Tensor) -> Tensor:
            distinct, back = ids.unique(return_inverse=True)
            return self._weights.rows(name, distinct).to(self._dtype)[back]

        return embed

    def _in_turn(self, layer: nn.Module, path: str, number: int) -> Callable[..., Any]:
        """The layer's forward [n s d] -> [n s d], from weights that are there for its duration only."""
        inner = layer.forward

        def forward(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._fill(layer, path)
            rest: tuple[Any, ...] | None = None
            for start in range(len(states)):  # one by one: a text's numbers must not depend on its company
                part = slice(start, start + 1)
                moved = [self._cut(value, part, len(states)) for value in args]
                named = {key: self._cut(value, part, len(states)) for key, value in kwargs.items()}
                out = inner(states[part].to(self._device), *moved, **named)
                first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
                states[part] = first.to(states.device)
            layer.to("meta")
            return_free_memory()
            if number in self._keep:
                self.kept[number] = states.clone()
            return states if rest is None else (states, *rest)

        return forward

    def _fill(self, layer: nn.Module, path: str) -> None:
        """Give a layer its weights, in the memory that the layers before it had."""
        for name, parameter in layer.named_parameters():
            room = self._room.get(name)
            if room is None:
                room = self._room[name] = torch.empty(parameter.shape, dtype=self._dtype, device=self._device)
            self._weights.read(path + name).fill(room)
        layer.load_state_dict({name: self._room[name] for name, _ in layer.named_parameters()}, assign=True)

    def _cut(self, value: Any, part: slice, texts: int) -> Any:
        """A layer's argument for some of the texts, on the device: masks have a row a text, positions have one row."""
        if isinstance(value, tuple):
            return tuple(self._cut(inside, part, texts) for inside in value)
        if not isinstance(value, Tensor):
            return value
        return (value[part] if value.ndim > 2 and len(value) == texts else value).to(self._device)


def t5(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """T5 without a mask, as FLUX reads it: ids [n s] -> states [n s d]."""
    encoder = _encoder(T5, folder, device)
    return lambda ids: cast("Tensor", encoder(input_ids=ids).last_hidden_state)


def clip_pooled(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """CLIP's state of the end token: ids [n s] -> [n d]."""
    encoder = _encoder(CLIP, folder, device)
    return lambda ids: cast("Tensor", encoder(input_ids=ids).pooler_output)


def decoder_layers(folder: Path, device: torch.device, keep: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """A language model's hidden states after some layers, side by side: ids, mask [n s] -> [n s len(keep) * d]."""
    encoder = _encoder(LANGUAGE, folder, device, keep)

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        encoder(input_ids=ids, attention_mask=mask, use_cache=False)
        kept, encoder.kept = encoder.kept, {}
        return torch.cat([kept[number] for number in keep], dim=-1)

    return encode


def t5_encoder(config: Any) -> nn.Module:
    """The encoder half of T5."""
    from transformers import T5EncoderModel

    encoder: nn.Module = T5EncoderModel(config).encoder
    return encoder


def clip_text_model(config: Any) -> nn.Module:
    """CLIP's text side."""
    from transformers import CLIPTextModel

    model: nn.Module = CLIPTextModel(config)
    return model


def language_model(config: Any) -> nn.Module:
    """The decoder stack of a language model, without its head and its last norm, which nobody here reads."""
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_config(config, dtype=torch.float32)
    model.norm = nn.Identity()
    return model


def text_config(folder: Path) -> Any:
    """The configuration of a text encoder, of the language part where it has more."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return config.get_text_config()


def tokenizer(folder: Path) -> Any:
    """The tokenizer of a component folder; UserError when it cannot be read.

    A processor's folder may keep the chat template in a JSON file of its own, which tokenizers do not look for.
    """
    from transformers import AutoTokenizer

    try:
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        what = f"{folder} holds no tokenizer ({str(error).splitlines()[0]})"
        raise UserError(what, "fetch the folder again") from error
    if words.chat_template is None and (folder / "chat_template.json").is_file():
        words.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    return words


def _encoder(kind: Kind, folder: Path, device: torch.device, keep: Sequence[int] = ()) -> LayerByLayer:
    model, weights = _empty(folder, kind, keep)
    return LayerByLayer(model, weights, device, layers=kind.layers, keep=keep)


def in_waves(
    texts: Sequence[str], bytes_each: int, encode: Callable[[Sequence[str]], Conditioning]
) -> Iterator[Conditioning]:
    """Encode as many texts together as `WAVE_BYTES` holds, and hand them out one by one."""
    size = max(WAVE_BYTES // bytes_each, 1)
    for start in range(0, len(texts), size):
        wave = encode(texts[start : start + size])
        yield from (wave[index : index + 1] for index in range(len(wave)))
        del wave  # or it would wait in memory while the next is encoded


def states_bytes(length: int, width: int, device: torch.device, kept: int = 0) -> int:
    """What one text of `length` tokens holds while it is encoded.

    Its current states, some float32 temporaries of the last norm, the states that are kept, and these joined.
    """
    return length * width * (compute_dtype(device).itemsize * (1 + 2 * kept) + 12)


@dataclass(frozen=True)
class Kind:
    """A text network of transformers: how it is built from its configuration, and the path of its layers."""

    build: Callable[[Any], nn.Module]
    layers: str


def check_encoder(folder: Path, kind: Kind, keep: Sequence[int] = ()) -> None:
    """UserError unless the folder's headers hold every tensor of the network, and it has the layers to keep."""
    _empty(folder, kind, keep)


def check_tokenizer(folder: Path) -> None:
    """UserError for a folder with no file that a tokenizer is read from."""
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
    ):
        raise UserError(f"{folder} holds no tokenizer", "fetch the folder again")


def _empty(folder: Path, kind: Kind, keep: Sequence[int]) -> tuple[nn.Module, Weights]:
    """The network on the meta device and its tensors, whatever prefix the files give their names.

    T5's token embedding bears the name that its encoder and decoder share.
    """
    with init_empty_weights():
        model = kind.build(text_config(folder))
    layers = kind.layers
    count = len(cast("nn.ModuleList", model.get_submodule(layers)))
    if keep and max(keep) > count:
        raise UserError(
            f"{folder} has {count} layers, and this family reads its states after layer {max(keep)}",
            "transformer and text encoder are of different models",
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = open_folder(folder)
    first = next(name for name in shapes if name.startswith(f"{layers}."))
    prefixes = [name.removesuffix(first) for name in weights.shapes if name.endswith(first)]
    prefixes = [prefix for prefix in prefixes if "decoder" not in prefix]
    if len(prefixes) != 1:
        raise UserError(f"{folder} holds no {first} of a text encoder", "fetch the folder again")
    own = weights.renamed({"shared.weight": f"{prefixes[0]}embed_tokens.weight"}).below(prefixes[0])
    own.expect(shapes, more=True)
    return model, own


T5 = Kind(t5_encoder, "block")
CLIP = Kind(clip_text_model, "encoder.layers")
LANGUAGE = Kind(language_model, "layers")
