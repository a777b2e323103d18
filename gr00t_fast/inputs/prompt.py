"""From an instruction to token ids, exactly as the reference's processor renders and tokenises it.

A chat template puts the instruction, and each image as a block of image tokens, into a conversation; each network has its own (`PromptForm`). The
tokenizer is Qwen2's byte-level BPE in all; the `tokenizers` library runs it without the seconds that importing transformers costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gr00t_fast.base.errors import CheckpointError, ConfigError, ObservationError, closest
from gr00t_fast.base.files import check_no_pointer, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROMPT_STYLES = ("plain", "nvidia")
MAX_TEXT_TOKENS = 512  # a chosen limit: twice what an image has; SO-100 instructions take 30 to 50

# Word splitting of Qwen2's tokenizer (transformers' Qwen2Converter).
_QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PromptForm:
    """How a network's prompts are written, and where its tokenizer comes from.

    render: instruction, number of images, tokens of each -> text. lists_texts: whether NVIDIA's robot clients make it read the printed list of the
    instruction (style `nvidia`). folders: where the tokenizer's files lie below a checkpoint, "" for the checkpoint itself; installed: the folder
    below NVIDIA's gr00t package that has them too; hub: the repository that has them; whose: the model they are of. place_holder: regular expression
    of what the reference would replace by a picture wherever it stands, and an instruction must not hold. images_last: images come behind the
    instruction, so that their places count from the prompt's end; else before it.
    """

    image_token: str
    render: Callable[[str, int, int], str]
    lists_texts: bool
    folders: tuple[str, ...]
    hub: str
    whose: str
    installed: str = ""
    place_holder: str = ""
    images_last: bool = False


class PromptEncoder:
    """Instruction -> ids, remembered per instruction: a robot repeats the same one thirty times a second."""

    _REMEMBERED = 256  # instructions; enough for any run, bounded for a server that hears arbitrary ones

    def __init__(self, form: PromptForm, tokenizer: Tokenizer, images: int, image_token_id: int, style: str, formalize: bool = False) -> None:
        """images: in each prompt. formalize: lower case, without punctuation. Raises CheckpointError when the tokenizer and the network disagree on
        the image token, and ConfigError for an unknown style."""
        if tokenizer.token_to_id(form.image_token) != image_token_id:
            raise CheckpointError(
                f"the tokenizer's {form.image_token} has id {tokenizer.token_to_id(form.image_token)}, the network expects {image_token_id}. "
                "Pass the processor files that belong to this checkpoint (--processor_path)."
            )
        if style not in PROMPT_STYLES:
            raise ConfigError(f"unknown prompt_style '{style}'.{closest(style, PROMPT_STYLES)} Expected one of: {', '.join(PROMPT_STYLES)}.")
        self.image_token_id, self.style = image_token_id, style
        self._form, self._tokenizer, self._images, self._formalize = form, tokenizer, images, formalize
        self._known: dict[tuple[str, int, int], np.ndarray] = {}

    def __call__(self, instruction: str, image_tokens: int, brackets: int = 1) -> np.ndarray:
        """int64 (S,), with image_tokens for each image. Read-only. Raises ObservationError for an instruction that holds the image token.

        `brackets`: for style `nvidia`, see CheckedObservation.
        """
        key = (instruction, image_tokens, brackets if self.style == "nvidia" else 0)
        if key not in self._known:
            if len(self._known) >= self._REMEMBERED:
                self._known.clear()
            self._known[key] = self._encode(*key)
        return self._known[key]

    def _encode(self, instruction: str, image_tokens: int, brackets: int) -> np.ndarray:
        ids = np.asarray(self._tokenizer.encode(self.text(instruction, image_tokens, brackets), add_special_tokens=False).ids, dtype=np.int64)
        expected = self._images * image_tokens
        if (text_tokens := len(ids) - expected) > MAX_TEXT_TOKENS:
            raise ObservationError(
                f"the prompt has {text_tokens} tokens besides its images, expected at most {MAX_TEXT_TOKENS}. Shorten the instruction."
            )
        if (found := int((ids == self.image_token_id).sum())) != expected:
            raise ObservationError(f"the instruction contains the image token {self._form.image_token} ({found - expected} times); remove it.")
        ids.setflags(write=False)
        return ids

    def text(self, instruction: str, image_tokens: int, brackets: int = 1) -> str:
        """What the network reads. Raises ObservationError for an instruction that holds what stands for a picture."""
        if self.style == "nvidia" and self._form.lists_texts:
            instruction = str(np.array(instruction).reshape((1,) * brackets))
        words = re.sub(r"[^\w\s]", "", instruction.lower()) if self._formalize else instruction
        if self._form.place_holder and (found := re.search(self._form.place_holder, words)):
            raise ObservationError(f"the instruction contains '{found[0]}', which stands for a picture; remove it.")
        return self._form.render(words, self._images, image_tokens)


def find_tokenizer(form: PromptForm, processor_path: str | Path | None, checkpoint: Path, offline: bool = False) -> Tokenizer:
    """Look where the files can be: the path given, the checkpoint, an installed gr00t package, the hub; `offline`: of the hub only what was fetched
    before. Raises CheckpointError."""
    if processor_path is not None:
        directory = Path(processor_path).expanduser()
        if not _holds_tokenizer(directory):
            raise CheckpointError(f"processor_path {directory} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt.")
        return load_tokenizer(directory)
    for directory in (*(checkpoint / folder for folder in form.folders), *_installed_gr00t(form.installed)):
        if _holds_tokenizer(directory):
            return load_tokenizer(directory)
    return load_tokenizer(_from_hub(form, checkpoint / form.folders[0], offline))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Build the tokenizer from `tokenizer.json`, or from the slow format's vocab, merges and added tokens. Raises CheckpointError."""
    from tokenizers import Tokenizer  # here: opening a checkpoint, and exports, need no tokenizer

    try:
        if (directory / "tokenizer.json").exists():
            check_no_pointer(directory / "tokenizer.json")
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            tokenizer.no_truncation()  # saved files may carry a training run's truncation and padding; the reference's prompt has neither
            tokenizer.no_padding()
            return tokenizer
        return _from_slow_files(directory)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        # the library raises bare Exception for files that it does not understand, and a panic of its Rust code is no Exception
        raise CheckpointError(f"the tokenizer files in {directory} cannot be read: {error}. Copy or download them again.") from error


def _from_slow_files(directory: Path) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    for name in ("vocab.json", "merges.txt"):
        check_no_pointer(directory / name)
    tokenizer = Tokenizer(models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    for index, (token, special) in sorted(_added_tokens(directory).items()):
        added = AddedToken(token, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
        if tokenizer.token_to_id(token) != index:
            raise ValueError(f"added token {token} got id {tokenizer.token_to_id(token)}, the files say {index}")
    return tokenizer


def _added_tokens(directory: Path) -> dict[int, tuple[str, bool]]:
    """Id -> (token, special)."""
    config = read_json(directory / "tokenizer_config.json")
    return {int(index): (entry["content"], bool(entry["special"])) for index, entry in config["added_tokens_decoder"].items()}


def _holds_tokenizer(directory: Path) -> bool:
    return (directory / "tokenizer.json").exists() or all((directory / name).exists() for name in ("vocab.json", "merges.txt"))


def _installed_gr00t(folder: str) -> list[Path]:
    from importlib.util import find_spec

    spec = find_spec("gr00t") if folder else None
    return [Path(root) / folder for root in spec.submodule_search_locations or []] if spec else []


def _from_hub(form: PromptForm, looked_in: Path, offline: bool) -> Path:
    import huggingface_hub  # only when nothing is found locally

    try:
        return Path(huggingface_hub.snapshot_download(form.hub, allow_patterns=["*.json", "*.txt"], local_files_only=offline))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no tokenizer files: none in {looked_in}, and fetching '{form.hub}' from the hub failed ({error}). "
            f"Give their directory with --processor_path (vocab.json, merges.txt, tokenizer_config.json of {form.whose})."
        ) from error
