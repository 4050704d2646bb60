"""The nodes of a ComfyUI workflow that draw from pictures: encode them, mask their latents, lay the result over them.

What makes the picture the same: the files are what our sampler saw, at its size; ComfyUI mixes latents and noise at the
first noise level as a flow does; its samplers put back what is not painted at every evaluation. Read off ComfyUI 0.8.
"""

from __future__ import annotations

from flux2_lora.inference.comfyui_graph import Graph, Node
from flux2_lora.inference.settings import LATENT_MASK, MASK, ORIGINAL, PICTURE, SHOWN_MASK, Settings


def input_files(settings: Settings) -> list[str]:
    """What ComfyUI's folder `input` has to hold."""
    if settings.inputs is None:
        return []
    return [settings.inputs.file(role) for role in settings.input_roles]


def differences(settings: Settings) -> list[str]:
    """Where ComfyUI's core nodes come near to our picture and not up to it."""
    inputs = settings.inputs
    if inputs is None:
        return []
    notes = []
    if inputs.height is not None and settings.family == "flux1":
        notes.append("ComfyUI encodes a picture to its latents' mean, where flux2-lora and Diffusers draw them.")
    if inputs.tile is not None:
        notes.append("ComfyUI refines the whole picture at once, where flux2-lora refines overlapping tiles of it.")
    if inputs.box is not None:
        notes.append(
            "flux2-lora also takes the seam off what was painted; where the mask is grey, ComfyUI mixes earlier."
        )
    if inputs.box is not None and settings.sampler == "heun":
        notes.append("ComfyUI puts back what is not painted in both halves of Heun's steps, flux2-lora behind them.")
    return notes


def add_start(graph: Graph, settings: Settings, vae: Node) -> Node | None:
    """The latents of the picture that is redrawn, with the mask of what is painted; None where none is.

    FLUX.1's picture takes the first draw of the seed for its posterior; an element's place in a batch is ComfyUI's way
    to the second.
    """
    inputs = settings.inputs
    if inputs is None or inputs.height is None:
        return None
    latents = graph.add("VAEEncode", pixels=graph.add("LoadImage", image=inputs.file(PICTURE)), vae=vae)
    if settings.family == "flux1":
        twice = graph.add("RepeatLatentBatch", samples=latents, amount=2)
        latents = graph.add("LatentFromBatch", title="Second noise of the seed", samples=twice, batch_index=1, length=1)
    if inputs.box is None:
        return latents
    mask = graph.add("LoadImageMask", image=inputs.file(LATENT_MASK), channel="red")
    return graph.add("SetLatentNoiseMask", samples=latents, mask=mask)


def add_references(graph: Graph, settings: Settings, vae: Node) -> list[Node]:
    """The latents of the pictures to look at."""
    if settings.inputs is None:
        return []
    pictures = [graph.add("LoadImage", image=settings.inputs.file(role)) for role in settings.reference_roles]
    return [graph.add("VAEEncode", pixels=picture, vae=vae) for picture in pictures]


def add_finish(graph: Graph, settings: Settings, picture: Node) -> Node:
    """The decoded picture cut to its size; with a mask laid over what it was drawn from, and that into the original."""
    inputs = settings.inputs
    assert inputs is not None
    picture = _cut(graph, settings, picture)
    if inputs.box is None:
        return picture
    left, top, right, bottom = inputs.box
    width, height = right - left, bottom - top
    before = _cut(graph, settings, graph.add("LoadImage", image=inputs.file(PICTURE)))
    picture = _laid(graph, before, picture, inputs.file(MASK), 0, 0)
    if (inputs.height, inputs.width) != (height, width):
        picture = graph.add(
            "ImageScale", image=picture, upscale_method="lanczos", width=width, height=height, crop="disabled"
        )
    original = graph.add("LoadImage", image=inputs.file(ORIGINAL))
    return _laid(graph, original, picture, inputs.file(SHOWN_MASK), left, top)


def _cut(graph: Graph, settings: Settings, picture: Node) -> Node:
    """Without what fills it up to whole tokens."""
    inputs = settings.inputs
    assert inputs is not None
    if (inputs.height, inputs.width) == (settings.drawn_height, settings.drawn_width):
        return picture
    return graph.add("ImageCrop", image=picture, width=inputs.width, height=inputs.height, x=0, y=0)


def _laid(graph: Graph, below: Node, above: Node, mask: str, x: int, y: int) -> Node:
    return graph.add(
        "ImageCompositeMasked",
        destination=below,
        source=above,
        x=x,
        y=y,
        resize_source=False,
        mask=graph.add("LoadImageMask", image=mask, channel="red"),
    )
