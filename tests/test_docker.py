"""docker/Dockerfile cannot be built here; what it names must at least exist."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def test_what_it_copies_is_there_and_goes_to_the_builder() -> None:
    sources = [word for words in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, flags=re.MULTILINE) for word in words.split()]
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {"setup.cfg", "gr00t_fast", "constraints.txt"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
    assert all(f"!{source}" in allowed for source in sources)


def test_what_setup_cfg_reads_is_copied() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    named = [setup["metadata"]["long_description"].removeprefix("file: "), setup["metadata"]["license_files"]]
    assert all(re.search(rf"^COPY .*\b{re.escape(name)}\b", DOCKERFILE, flags=re.MULTILINE) for name in named)


def test_its_extras_and_its_command_exist() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    (extras,) = re.findall(r'pip install .*"\.\[(.+)\]"', DOCKERFILE)
    assert set(extras.split(",")) <= set(setup["options.extras_require"])
    command = re.search(r"^ENTRYPOINT \[(.+)\]$", DOCKERFILE, flags=re.MULTILINE)[1]
    assert '"tini", "--", "gr00t-fast"' in command, "the program must not be the first process"
    assert "gr00t-fast = " in setup["options.entry_points"]["console_scripts"]
