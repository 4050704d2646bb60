"""Networks that say what a picture shows: Florence-2 and BLIP, from a folder on this computer.

Law: network, processor and numbers are transformers' own. Nothing is fetched, no code that lies beside the weights is
run, pickles are never opened, and a folder that lacks a tensor is refused. The same picture gives the same caption:
beam search, no sampling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from flux2_lora.devices import compute_dtype
from flux2_lora.errors import UserError, did_you_mean, listed
from flux2_lora.networks.components import check_own_weights
from flux2_lora.weights import read_json

Captioner = Callable[[Image.Image], str]
"""A picture, RGB of any size -> its caption on one line; empty where the network has nothing to say."""

BEAMS = 3
TASKS = ("CAPTION", "DETAILED_CAPTION", "MORE_DETAILED_CAPTION")
"""Florence-2's tasks whose answer is prose about the whole picture."""

_FLORENCE, _BLIP = "florence-community/Florence-2-base", "Salesforce/blip-image-captioning-large"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def load_captioner(path: str, device: torch.device, prompt: str | None, max_new_tokens: int) -> Captioner:
    """The captioner of `captioner.path`, a transformers folder.

    prompt: a task of Florence-2 (DETAILED_CAPTION where null), for BLIP the words that its captions begin with.
    max_new_tokens: where a caption is cut off. UserError for anything but a whole folder of either kind, and for a
    prompt that it cannot take.
    """
    folder = Path(path).expanduser()
    with _named(path):
        kind = _checked(folder)
    processor = _processor(kind, folder, path)
    question = kind.question(processor, prompt, max_new_tokens)
    model = _model(kind, folder, path, device)

    def caption(picture: Image.Image) -> str:
        inputs = processor(images=picture, text=question, return_tensors="pt").to(device, model.dtype)
        ids = model.generate(**inputs, num_beams=BEAMS, do_sample=False, max_new_tokens=max_new_tokens)
        said: str = processor.batch_decode(ids, skip_special_tokens=True)[0]
        return " ".join(said.split())

    return caption


class _Kind(Protocol):
    """A kind of captioner. model, processor: its classes in transformers."""

    model: str
    processor: str

    def check(self, config: Mapping[str, Any]) -> None:
        """UserError for a config.json of that class which transformers' class cannot read."""

    def question(self, processor: Any, prompt: str | None, max_new_tokens: int, /) -> str | None:
        """What the network reads beside the picture; UserError for a prompt that it cannot take."""


class _Florence2:
    """Florence-2, arXiv 2311.06242: a task in, prose out; what its processor parses are answers with boxes."""

    model = "Florence2ForConditionalGeneration"
    processor = "Florence2Processor"

    def check(self, config: Mapping[str, Any]) -> None:
        text = config.get("text_config") or {}
        if "auto_map" in config or text.get("model_type") == "florence2_language":
            raise UserError(
                "this is Florence-2 in its first form, whose code lies in the repository and is not run",
                f"{_download(_FLORENCE)}, or another Florence-2 of florence-community: the same weights, read natively",
            )

    def question(self, _processor: Any, prompt: str | None, _max_new_tokens: int) -> str:
        task = (prompt or "DETAILED_CAPTION").strip("<> ").upper()
        if task not in TASKS:
            raise UserError(f"captioner.prompt={prompt} is no captioning task of Florence-2", did_you_mean(task, TASKS))
        return f"<{task}>"


class _Blip:
    """BLIP, arXiv 2201.12086: it goes on from the words that it is given, which stay in the caption."""

    model = "BlipForConditionalGeneration"
    processor = "BlipProcessor"
    longest = 512
    """Positions of its text decoder, as of the BERT that it was made from."""

    def check(self, config: Mapping[str, Any]) -> None:
        """Every BLIP is read."""

    def question(self, processor: Any, prompt: str | None, max_new_tokens: int) -> str | None:
        if not prompt or not prompt.strip():
            return None
        used = len(processor.tokenizer(prompt).input_ids)
        if used + max_new_tokens > self.longest:
            raise UserError(
                f"captioner.prompt has {used} tokens, and with captioner.max_new_tokens={max_new_tokens} that is "
                f"more than the {self.longest} that BLIP writes",
                "shorten the prompt",
            )
        return prompt


_KINDS: tuple[_Kind, ...] = (_Florence2(), _Blip())


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Every UserError inside names the option."""
    try:
        yield
    except UserError as error:
        raise UserError(f"captioner.path={path}: {error.what}", error.remedy) from error


def _checked(folder: Path) -> _Kind:
    """The kind of a folder whose files are all there; reads configurations and headers only."""
    if not folder.is_dir():
        raise UserError("there is no such folder", f"{_download(_repository(folder))}, then captioner.path=FOLDER")
    config = read_json(folder / "config.json")
    kind = _kind_of(config)
    kind.check(config)
    check_own_weights(folder, config, such_as=f"{_FLORENCE} or {_BLIP}")
    for what, names in (("processor", _PROCESSOR_FILES), ("tokenizer", _TOKENIZER_FILES)):
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"its {what} is missing ({' or '.join(names)})", "download the whole repository again")
    return kind


def _kind_of(config: Mapping[str, Any]) -> _Kind:
    classes = config.get("architectures") or []
    found = next((kind for kind in _KINDS if kind.model in classes), None)
    if found is None:
        named = listed([str(name) for name in classes]) or "no class"
        remote = ", whose code lies in the repository and is not run" if "auto_map" in config else ""
        raise UserError(f"config.json names {named}{remote}", f"give Florence-2 ({_FLORENCE}) or BLIP ({_BLIP})")
    return found


def _processor(kind: _Kind, folder: Path, path: str) -> Any:
    import transformers

    try:
        return getattr(transformers, kind.processor).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises Exception itself
        raise _unreadable(path, error) from error


def _model(kind: _Kind, folder: Path, path: str, device: torch.device) -> Any:
    """The network in its evaluation mode; UserError where a tensor is missing or of another shape.

    Attention is said to be eager because config.json could name a kernel to fetch, and BLIP has no other.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()  # what it has to say is said below, on one line
    transformers.utils.logging.disable_progress_bar()
    try:
        model, told = getattr(transformers, kind.model).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=compute_dtype(device),
            attn_implementation="eager",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # as many kinds as a configuration can be wrong
        raise _unreadable(path, error) from error
    parameters = {name for name, _ in model.named_parameters()}
    unfit = sorted((set(told["missing_keys"]) & parameters) | {key for key, *_ in told["mismatched_keys"]})
    if unfit:
        raise UserError(
            f"captioner.path={path}: the weights do not fit config.json, which wants {listed(unfit, 3)}",
            "the files are of different models or incomplete; download the whole repository again",
        )
    return model.to(device)


def _unreadable(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"captioner.path={path} cannot be read ({reason})", "download the whole repository again")


def _repository(folder: Path) -> str:
    """What to download for a path that is a repository's name; Florence-2 in the form that is read natively."""
    name = folder.as_posix()
    name = re.sub("^microsoft/(?=Florence-2)", "florence-community/", name)
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else _FLORENCE


def _download(repository: str) -> str:
    return f"download it once with `hf download {repository} --local-dir FOLDER`"
