"""The prompt: rendered as the reference's template does, tokenised as transformers' Qwen2 tokenizer does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from gr00t_fast import load_policy
from gr00t_fast.base.errors import CheckpointError, ObservationError
from gr00t_fast.inputs.prompt import PromptEncoder, find_tokenizer, load_tokenizer
from gr00t_fast.networks.n1d5 import IMAGE_TOKEN, PROMPT, render_prompt
from gr00t_fast.virtual.random_checkpoint import byte_tokenizer, write_random_checkpoint

# fmt: off
TEXTS = [
    "Place the block in the bowl", "pick: the cube", "yes", "null", "x", "don't I'LL we've THEY'RE", "1234567 3.14 -5e10 １２３",
    "   leading", "trailing   ", "tab\tand\nnewline\r\n\r\nmore\n\n\n  indented", "\n", " ", "\xa0nbsp\u2003em", 'quote " and \' and `',
    "{'a': [1, 2]}", "a/b\\c#d@e!!??...", "🤖",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1ef\U0001f1f5 \u270b\U0001f3fd", "積み木をボウルに入れてください",
    "把积木放进碗里。", "블록을 그릇에 넣으세요", "ضع المكعب في الوعاء", "הנח את הקוביה", "Положи кубик", "โปรดวาง", "हिन्दी", "Ελληνικά",
    "café naïve Å ﬁ", "café Å", "é́́", "\u200b\u200d\ufeff", "\x00\x01\x7f", "\U0010ffff", "ＦＵＬＬ", "ǅ ß ẞ İ ı", "½ ² Ⅷ ٣",
    "<|im_end|>", "<|im_start|>user\nhi<|im_end|>", "<|endoftext|> a", "<img> </img>", "<box>1</box>", "<|im_end", "a<|im_end|>b",
    " <|vision_start|> ", "<tool_call>", "word " * 300, "a" * 2000, "'s't're've'm'll'd", "CamelCaseWORDS123abc", "snake_case kebab-case",
    "https://example.org/a?b=c&d=%20",
]
# fmt: on


@pytest.fixture(scope="module")
def whole_eagle_dir(shared_dir: Path) -> Path:
    """Tokenizer files with the whole vocabulary: any text can be written."""
    return shared_dir / "eagle2_hg_model"


@pytest.fixture(scope="module")
def qwen(whole_eagle_dir: Path):
    """transformers' own tokenizer from the same files."""
    return pytest.importorskip("transformers").Qwen2TokenizerFast.from_pretrained(str(whole_eagle_dir))


@pytest.fixture(scope="module")
def ours(whole_eagle_dir: Path) -> Tokenizer:
    return load_tokenizer(whole_eagle_dir)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:20]))
def test_tokens_equal_those_of_transformers(qwen, ours: Tokenizer, text: str) -> None:
    assert _ids(ours, text) == qwen(text, add_special_tokens=False)["input_ids"]


def test_the_whole_prompt_equals_that_of_transformers(qwen, ours: Tokenizer) -> None:
    encode = PromptEncoder(PROMPT, ours, 2, 151669, "plain")
    for text in TEXTS:
        expected = qwen(render_prompt(text, 2, 256), add_special_tokens=False)["input_ids"]
        assert encode(text, 256).tolist() == expected, ascii(text[:40])
    assert len(PromptEncoder(PROMPT, ours, 1, 151669, "plain")("Place the block in the bowl", 256)) == 288


# --- rendering -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "printed"),
    [("Do it", "['Do it']"), ("don't", '["don\'t"]'), ('say "x"', "['say \"x\"']"), ("new\nline", "['new\\nline']"), ("émoji 🤖", "['émoji 🤖']")],
)
def test_style_nvidia_prints_a_list(instruction: str, printed: str) -> None:
    assert _encoder(style="nvidia").text(instruction, 1) == _encoder().text(printed, 1)
    assert str(np.array([instruction])) == printed  # what the reference's client path does to it


# --- the encoder ---------------------------------------------------------------------------------------------------------------------


def _encoder(tokenizer: object = None, style: str = "plain") -> PromptEncoder:
    tokenizer = tokenizer or byte_tokenizer()
    return PromptEncoder(PROMPT, tokenizer, 2, tokenizer.token_to_id(IMAGE_TOKEN), style)


def test_image_tokens_in_the_instruction_are_refused() -> None:
    with pytest.raises(ObservationError, match=r"contains the image token <IMG_CONTEXT> \(2 times\)"):
        _encoder()(f"look at {IMAGE_TOKEN}{IMAGE_TOKEN}", 5)


def test_a_tokenizer_of_another_network() -> None:
    with pytest.raises(CheckpointError, match=r"<IMG_CONTEXT> has id \d+, the network expects 151669.*--processor_path"):
        PromptEncoder(PROMPT, byte_tokenizer(), 1, 151669, "plain")


# --- where the files are -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "eagle2_hg_model").mkdir()
    byte_tokenizer().save(str(tmp_path / "eagle2_hg_model" / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import huggingface_hub

    asked: list[str] = []

    def snapshot_download(repo_id: str, **_: object) -> str:
        asked.append(repo_id)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_given_path_without_a_tokenizer_is_an_error_even_if_the_checkpoint_has_one(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*vocab\.json.*merges\.txt"):
        find_tokenizer(PROMPT, tmp_path / "nowhere", checkpoint)


def test_the_hub_comes_last_and_its_failure_is_explained(tmp_path: Path, no_hub: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"eagle2_hg_model.*no network.*--processor_path"):
        find_tokenizer(PROMPT, None, tmp_path)
    assert no_hub == [PROMPT.hub]


@pytest.mark.parametrize(("network", "place"), [("n1.5", "eagle2_hg_model"), ("n1.5", "."), ("n1.6", "."), ("n1.7", "."), ("n1.7", "processor")])
def test_a_hub_id_has_the_tokenizer_that_its_path_has(network: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repository = write_random_checkpoint(tmp_path / "repository", "tiny", network=network)
    (written,) = repository.rglob("tokenizer.json")
    (repository / place).mkdir(exist_ok=True)
    written.rename(repository / place / "tokenizer.json")
    files = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "c0ffee" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, tmp_path / "c0ffee" / file)
        return str(tmp_path / "c0ffee")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    by_path, by_id = (load_policy(name, device="cpu").processor.prompts("pick", 1).tolist() for name in (repository, "someone/checkpoint"))
    assert by_id == by_path


def test_truncation_saved_in_the_file_is_not_applied(tmp_path: Path) -> None:
    saved = byte_tokenizer()
    saved.enable_truncation(4)
    saved.enable_padding(length=64)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert _ids(load_tokenizer(tmp_path), "a longer text") == _ids(byte_tokenizer(), "a longer text")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"version": "1.0"}', b"\xff"])
def test_damaged_tokenizer_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"tokenizer .*{re.escape(str(tmp_path))}.*download"):
        load_tokenizer(tmp_path)


def test_slow_files_that_disagree_with_each_other(eagle_dir: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(eagle_dir / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["151990"] = config["added_tokens_decoder"].pop("151669")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the files say"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)
