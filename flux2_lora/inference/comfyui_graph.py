"""A ComfyUI workflow as a graph of core nodes, in the two forms that ComfyUI reads.

The server takes node classes with named inputs; the editor takes nodes with places, numbered links and the values of
their fields in order. `KINDS` is what both need to know of a node class.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_COLUMN_PX, _GAP_PX, _NOTE_PX = 400, 80, 360
_OWN_FIELDS: Mapping[str, list[str]] = {"RandomNoise": ["fixed"], "LoadImage": ["image"], "LoadImageMask": ["image"]}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A node class: inputs that are linked (name -> type), inputs that are typed in, outputs (name -> type)."""

    title: str
    sockets: Mapping[str, str] = field(default_factory=dict)
    widgets: tuple[str, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)


KINDS: Mapping[str, Kind] = {
    "UNETLoader": Kind(title="Load Diffusion Model", widgets=("unet_name", "weight_dtype"), outputs={"MODEL": "MODEL"}),
    "LoraLoaderModelOnly": Kind(
        title="Load LoRA",
        sockets={"model": "MODEL"},
        widgets=("lora_name", "strength_model"),
        outputs={"MODEL": "MODEL"},
    ),
    "CLIPLoader": Kind(title="Load CLIP", widgets=("clip_name", "type", "device"), outputs={"CLIP": "CLIP"}),
    "DualCLIPLoader": Kind(
        title="DualCLIPLoader", widgets=("clip_name1", "clip_name2", "type", "device"), outputs={"CLIP": "CLIP"}
    ),
    "T5TokenizerOptions": Kind(
        title="T5TokenizerOptions",
        sockets={"clip": "CLIP"},
        widgets=("min_padding", "min_length"),
        outputs={"CLIP": "CLIP"},
    ),
    "VAELoader": Kind(title="Load VAE", widgets=("vae_name",), outputs={"VAE": "VAE"}),
    "CLIPTextEncode": Kind(
        title="CLIP Text Encode",
        sockets={"clip": "CLIP"},
        widgets=("text",),
        outputs={"CONDITIONING": "CONDITIONING"},
    ),
    "FluxGuidance": Kind(
        title="FluxGuidance",
        sockets={"conditioning": "CONDITIONING"},
        widgets=("guidance",),
        outputs={"CONDITIONING": "CONDITIONING"},
    ),
    "BasicGuider": Kind(
        title="BasicGuider",
        sockets={"model": "MODEL", "conditioning": "CONDITIONING"},
        outputs={"GUIDER": "GUIDER"},
    ),
    "CFGGuider": Kind(
        title="CFGGuider",
        sockets={"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"},
        widgets=("cfg",),
        outputs={"GUIDER": "GUIDER"},
    ),
    "RandomNoise": Kind(title="RandomNoise", widgets=("noise_seed",), outputs={"NOISE": "NOISE"}),
    "KSamplerSelect": Kind(title="KSamplerSelect", widgets=("sampler_name",), outputs={"SAMPLER": "SAMPLER"}),
    "Flux2Scheduler": Kind(title="Flux2Scheduler", widgets=("steps", "width", "height"), outputs={"SIGMAS": "SIGMAS"}),
    "ManualSigmas": Kind(title="ManualSigmas", widgets=("sigmas",), outputs={"SIGMAS": "SIGMAS"}),
    "EmptyFlux2LatentImage": Kind(
        title="Empty Flux 2 Latent", widgets=("width", "height", "batch_size"), outputs={"LATENT": "LATENT"}
    ),
    "EmptySD3LatentImage": Kind(
        title="EmptySD3LatentImage", widgets=("width", "height", "batch_size"), outputs={"LATENT": "LATENT"}
    ),
    "LoadImage": Kind(title="Load Image", widgets=("image",), outputs={"IMAGE": "IMAGE", "MASK": "MASK"}),
    "LoadImageMask": Kind(title="Load Image (as Mask)", widgets=("image", "channel"), outputs={"MASK": "MASK"}),
    "VAEEncode": Kind(title="VAE Encode", sockets={"pixels": "IMAGE", "vae": "VAE"}, outputs={"LATENT": "LATENT"}),
    "RepeatLatentBatch": Kind(
        title="Repeat Latent Batch", sockets={"samples": "LATENT"}, widgets=("amount",), outputs={"LATENT": "LATENT"}
    ),
    "LatentFromBatch": Kind(
        title="Latent From Batch",
        sockets={"samples": "LATENT"},
        widgets=("batch_index", "length"),
        outputs={"LATENT": "LATENT"},
    ),
    "SetLatentNoiseMask": Kind(
        title="Set Latent Noise Mask", sockets={"samples": "LATENT", "mask": "MASK"}, outputs={"LATENT": "LATENT"}
    ),
    "ReferenceLatent": Kind(
        title="ReferenceLatent",
        sockets={"conditioning": "CONDITIONING", "latent": "LATENT"},
        outputs={"CONDITIONING": "CONDITIONING"},
    ),
    "ImageCrop": Kind(
        title="Image Crop",
        sockets={"image": "IMAGE"},
        widgets=("width", "height", "x", "y"),
        outputs={"IMAGE": "IMAGE"},
    ),
    "ImageScale": Kind(
        title="Upscale Image",
        sockets={"image": "IMAGE"},
        widgets=("upscale_method", "width", "height", "crop"),
        outputs={"IMAGE": "IMAGE"},
    ),
    "ImageCompositeMasked": Kind(
        title="ImageCompositeMasked",
        sockets={"destination": "IMAGE", "source": "IMAGE", "mask": "MASK"},
        widgets=("x", "y", "resize_source"),
        outputs={"IMAGE": "IMAGE"},
    ),
    "SamplerCustomAdvanced": Kind(
        title="SamplerCustomAdvanced",
        sockets={
            "noise": "NOISE",
            "guider": "GUIDER",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        outputs={"output": "LATENT", "denoised_output": "LATENT"},
    ),
    "VAEDecode": Kind(title="VAE Decode", sockets={"samples": "LATENT", "vae": "VAE"}, outputs={"IMAGE": "IMAGE"}),
    "SaveImage": Kind(title="Save Image", sockets={"images": "IMAGE"}, widgets=("filename_prefix",)),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """inputs: name -> a value, or the node whose first output goes there."""

    number: int
    kind: str
    inputs: Mapping[str, Any]
    title: str


@dataclass(frozen=True, kw_only=True)
class _Link:
    """From the first output of `source` to the socket `slot` of `target`."""

    number: int
    source: Node
    target: Node
    slot: int
    type: str


class Graph:
    """Nodes in the order in which they are added, which is one in which they can run."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, kind: str, *, title: str = "", **inputs: Any) -> Node:
        """A new node; inputs are values, or nodes added before."""
        node = Node(number=len(self.nodes) + 1, kind=kind, inputs=inputs, title=title or KINDS[kind].title)
        self.nodes.append(node)
        return node

    def as_api(self) -> dict[str, Any]:
        """The form that ComfyUI's server takes."""
        return {
            str(node.number): {
                "class_type": node.kind,
                "inputs": {k: [str(v.number), 0] if isinstance(v, Node) else v for k, v in node.inputs.items()},
                "_meta": {"title": node.title},
            }
            for node in self.nodes
        }

    def as_ui(self, note: str) -> dict[str, Any]:
        """The form that ComfyUI's editor opens and saves, laid out from left to right behind a note."""
        links = self._links()
        places = self._places()
        nodes = [_ui_node(node, place, links) for node, place in zip(self.nodes, places, strict=True)]
        nodes.append(_ui_note(note, len(nodes) + 1))
        return {
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": [[k.number, k.source.number, 0, k.target.number, k.slot, k.type] for k in links],
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _links(self) -> list[_Link]:
        ends = [
            (node.inputs[name], node, slot, type_)
            for node in self.nodes
            for slot, (name, type_) in enumerate(KINDS[node.kind].sockets.items())
        ]
        return [
            _Link(number=number, source=source, target=target, slot=slot, type=type_)
            for number, (source, target, slot, type_) in enumerate(ends, start=1)
        ]

    def _places(self) -> list[tuple[int, int]]:
        """Top left corners: a node stands one column right of the last of those it reads, below the others there."""
        columns: dict[int, int] = {}
        bottoms: defaultdict[int, int] = defaultdict(int)
        places = []
        for node in self.nodes:
            read = [columns[value.number] for value in node.inputs.values() if isinstance(value, Node)]
            column = columns[node.number] = max(read, default=-1) + 1
            places.append((column * _COLUMN_PX, bottoms[column]))
            bottoms[column] += _height_px(node.kind) + _GAP_PX
        return places


def _ui_node(node: Node, place: tuple[int, int], links: list[_Link]) -> dict[str, Any]:
    kind = KINDS[node.kind]
    coming = [link.number for link in links if link.target is node]
    leaving = [link.number for link in links if link.source is node]
    return {
        "id": node.number,
        "type": node.kind,
        "title": node.title,
        "pos": list(place),
        "size": [_COLUMN_PX - _GAP_PX, _height_px(node.kind)],
        "flags": {},
        "order": node.number - 1,
        "mode": 0,
        "inputs": [
            {"name": name, "type": type_, "link": link}
            for (name, type_), link in zip(kind.sockets.items(), coming, strict=True)
        ],
        "outputs": [
            {"name": name, "type": type_, "links": leaving if slot == 0 else []}
            for slot, (name, type_) in enumerate(kind.outputs.items())
        ],
        "properties": {"Node name for S&R": node.kind},
        "widgets_values": _fields(node),
    }


def _ui_note(text: str, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [-_NOTE_PX - _GAP_PX, 0],
        "size": [_NOTE_PX, 420],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
    }


def _fields(node: Node) -> list[Any]:
    """Values in the order of the node's fields, behind a seed and a file that of the editor's own: stay, upload."""
    values = [node.inputs[name] for name in KINDS[node.kind].widgets]
    if node.kind == "CLIPTextEncode":
        return [re.sub(r"([{}])", r"\\\1", text) for text in values]  # braces are a choice of words to the editor
    return [*values, *_OWN_FIELDS.get(node.kind, [])]


def _height_px(kind: str) -> int:
    known = KINDS[kind]
    rows = max(len(known.sockets), len(known.outputs)) + len(known.widgets) + len(_OWN_FIELDS.get(kind, []))
    return (
        30 + 26 * rows + {"CLIPTextEncode": 120, "SaveImage": 260, "LoadImage": 260, "LoadImageMask": 260}.get(kind, 0)
    )
