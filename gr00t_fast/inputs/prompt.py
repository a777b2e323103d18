"""From an instruction to token ids, exactly as the reference's processor renders and tokenises it.

Eagle's chat template (N1.5) and Qwen3-VL's (N1.7) put the pictures first, each as a block of image tokens, then the instruction. The tokenizer is
Qwen2's byte-level BPE in both; the `tokenizers` library runs it without the seconds that importing transformers costs.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gr00t_fast.errors import CheckpointError, ConfigError, ObservationError, closest
from gr00t_fast.files import check_tokenizer_file, read_json

PROMPT_STYLES = ("plain", "nvidia")
IMAGE_TOKEN = "<IMG_CONTEXT>"
MAX_TEXT_TOKENS = 512  # a chosen limit: twice what a picture has; SO-100 instructions take 30 to 50
HUB_PROCESSOR = "lerobot/eagle2hg-processor-groot-n1p5"  # holds the same files; used when none are found locally
IMAGE_TOKEN_N1D7 = "<|image_pad|>"
HUB_PROCESSOR_N1D7 = "Qwen/Qwen3-VL-2B-Instruct"  # the reference takes them from nvidia/Cosmos-Reason2-2B, which is gated; the ids are the same

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_END = "<|im_end|>\n<|im_start|>assistant\n"
# Word splitting of Qwen2's tokenizer (transformers' Qwen2Converter).
_QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def render_prompt(instruction: str, cameras: int, tokens_per_camera: int, style: str = "plain", brackets: int = 1) -> str:
    """The text the network reads. Style `nvidia` reproduces what NVIDIA's robot clients cause: a list, printed with so many brackets, and quotes."""
    if style not in PROMPT_STYLES:
        raise ConfigError(f"unknown prompt_style '{style}'.{closest(style, PROMPT_STYLES)} Expected one of: {', '.join(PROMPT_STYLES)}.")
    if style == "nvidia":
        instruction = str(np.array(instruction).reshape((1,) * brackets))
    images = "".join(f"<image {k}><img>{IMAGE_TOKEN * tokens_per_camera}</img>" for k in range(1, cameras + 1))
    return f"{_SYSTEM}{images}{instruction}{_END}"


class PromptEncoder:
    """Instruction -> ids, remembered per instruction: a robot repeats the same one thirty times a second."""

    _REMEMBERED = 256  # instructions; enough for any session, bounded for a server that hears arbitrary ones
    image_token = IMAGE_TOKEN

    def __init__(self, tokenizer: Tokenizer, cameras: int, tokens_per_camera: int, image_token_id: int, style: str) -> None:
        """tokens_per_camera: unless a call says otherwise. Raises CheckpointError when the tokenizer and the network disagree on the image token."""
        if tokenizer.token_to_id(self.image_token) != image_token_id:
            raise CheckpointError(
                f"the tokenizer's {self.image_token} has id {tokenizer.token_to_id(self.image_token)}, the network expects {image_token_id}. "
                "Pass the processor files that belong to this checkpoint (--processor_path)."
            )
        render_prompt("", cameras, tokens_per_camera, style)  # refuses an unknown style now, not at the first inference
        self.image_token_id, self.style = image_token_id, style
        self._tokenizer, self._cameras, self._tokens_per_camera = tokenizer, cameras, tokens_per_camera
        self._known: dict[tuple[str, int, int], np.ndarray] = {}

    def __call__(self, instruction: str, brackets: int = 1, tokens_per_camera: int | None = None) -> np.ndarray:
        """int64 (S,). Read-only. Raises ObservationError for an instruction that holds the image token.

        `brackets`: for style `nvidia`, see CheckedObservation.
        """
        key = (instruction, brackets if self.style == "nvidia" else 0, tokens_per_camera or self._tokens_per_camera)
        if key not in self._known:
            if len(self._known) >= self._REMEMBERED:
                self._known.clear()
            self._known[key] = self._encode(*key)
        return self._known[key]

    def _encode(self, instruction: str, brackets: int, tokens_per_camera: int) -> np.ndarray:
        text = self.text(instruction, brackets, tokens_per_camera)
        ids = np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        expected = self._cameras * tokens_per_camera
        if (text_tokens := len(ids) - expected) > MAX_TEXT_TOKENS:
            raise ObservationError(
                f"the prompt has {text_tokens} tokens besides its pictures, expected at most {MAX_TEXT_TOKENS}. Shorten the instruction."
            )
        if (found := int((ids == self.image_token_id).sum())) != expected:
            raise ObservationError(f"the instruction contains the image token {self.image_token} ({found - expected} times); remove it.")
        ids.setflags(write=False)
        return ids

    def text(self, instruction: str, brackets: int, tokens_per_camera: int) -> str:
        return render_prompt(instruction, self._cameras, tokens_per_camera, self.style, brackets)


class PromptEncoderN1d7(PromptEncoder):
    """No system message, no generation prompt. `cameras` counts pictures: cameras times the times of each, and each call says how many tokens one
    has. Both styles are the same text: the reference's clients send a list of text that its policy unpacks."""

    image_token = IMAGE_TOKEN_N1D7

    def __init__(self, tokenizer: Tokenizer, pictures: int, image_token_id: int, style: str, formalize: bool) -> None:
        """formalize: lower case, without punctuation (`formalize_language` of the checkpoint)."""
        self._formalize = formalize
        super().__init__(tokenizer, pictures, 0, image_token_id, style)

    def text(self, instruction: str, brackets: int, tokens_per_camera: int) -> str:
        words = re.sub(r"[^\w\s]", "", instruction.lower()) if self._formalize else instruction
        pictures = f"<|vision_start|>{self.image_token * tokens_per_camera}<|vision_end|>" * self._cameras
        return f"<|im_start|>user\n{pictures}{words}<|im_end|>\n"


def find_tokenizer(processor_path: str | Path | None, checkpoint: Path, n1d7: bool = False, offline: bool = False) -> Tokenizer:
    """Look where the files can be: the path given, the checkpoint, an installed gr00t package (it has N1.5's), the hub; `offline`: of the hub only
    what was fetched before. Raises CheckpointError."""
    if processor_path is not None:
        directory = Path(processor_path).expanduser()
        if not _holds_tokenizer(directory):
            raise CheckpointError(f"processor_path {directory} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt.")
        return load_tokenizer(directory)
    for directory in (checkpoint, checkpoint / "processor") if n1d7 else (checkpoint / "eagle2_hg_model", checkpoint, *_installed_gr00t()):
        if _holds_tokenizer(directory):
            return load_tokenizer(directory)
    if n1d7:
        return load_tokenizer(_from_hub(checkpoint, HUB_PROCESSOR_N1D7, "Qwen3-VL", offline))
    return load_tokenizer(_from_hub(checkpoint / "eagle2_hg_model", HUB_PROCESSOR, "Eagle", offline))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Build the tokenizer from `tokenizer.json`, or from the slow format's vocab, merges and added tokens. Raises CheckpointError."""
    try:
        if (directory / "tokenizer.json").exists():
            check_tokenizer_file(directory / "tokenizer.json")
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
    for name in ("vocab.json", "merges.txt"):
        check_tokenizer_file(directory / name)
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


def _installed_gr00t() -> list[Path]:
    from importlib.util import find_spec

    spec = find_spec("gr00t")
    roots = list(spec.submodule_search_locations or []) if spec else []
    return [Path(root) / "model" / "backbone" / "eagle2_hg_model" for root in roots]


def _from_hub(looked_in: Path, repo_id: str, whose: str, offline: bool) -> Path:
    import huggingface_hub  # only when nothing is found locally

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=["*.json", "*.txt"], local_files_only=offline))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no tokenizer files: none in {looked_in}, and fetching '{repo_id}' from the hub failed ({error}). "
            f"Give their directory with --processor_path (vocab.json, merges.txt, tokenizer_config.json of {whose})."
        ) from error
