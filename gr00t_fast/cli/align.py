"""`gr00t-fast align`: put the cameras back where they were when the data set was recorded, on a page in a browser. No arm is needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.cli.main import EXIT_OK, Command
from gr00t_fast.cli.run import RunConfig
from gr00t_fast.cli.shared_flags import OutputFlags
from gr00t_fast.evaluation.align import align
from gr00t_fast.evaluation.scene import card_of
from gr00t_fast.record.page import BARE, PageAddress, listen, page_address
from gr00t_fast.robots import ArmOptions
from gr00t_fast.robots.lerobot_glue import device_faults


@dataclass(kw_only=True)
class AlignFlags(OutputFlags, ArmOptions):
    """Put the cameras back where they were: the recorded picture as a ghost over the live one, and a number that becomes green.

        gr00t-fast align --recordings=./my-lerobot-dataset --config_path=run.yaml

    No servo is spoken to. --config_path may be the file of your runs.
    """

    recordings: Path  # LeRobotDataset behind the checkpoint, or its scene card
    camera_map: dict[str, str] = field(default_factory=dict)  # "{robot camera: the data set's camera}", when the names differ
    page: str = BARE  # where the page is: HOST:PORT

    def missing(self) -> Iterator[tuple[str, str]]:
        """A port is not needed."""
        if not getattr(self.robot, "cameras", {}):
            yield (
                "robot.cameras",
                'the cameras to align, as in --robot.type=so100_follower --robot.cameras="{front: {type: opencv, index_or_path: 0}}"',
            )

    def check(self) -> None:
        super().check()
        page_address(self.page)

    def notes(self) -> list[str]:
        return []


def run(config: AlignFlags) -> int:
    """Until a person presses `done`. Raises Gr00tFastError."""
    for fault in device_faults(config.robot).values():
        raise fault
    card = card_of(config.recordings, SO100_JOINTS, config.tell)
    if not card.cameras:
        raise ConfigError(f"--recordings={config.recordings} has no pictures to align with.")
    cameras = config.robot.cameras  # type: ignore[union-attr]  # an arm without cameras was refused
    camera_map = {name: config.camera_map.get(name, name) for name in cameras}
    found = align(cameras, card, camera_map, listen(page_address(config.page) or PageAddress()), lambda line: print(line, flush=True))
    for kind, text in found.findings if found is not None else ():
        print(f"{kind}: {text}")
    return EXIT_OK


main = Command(AlignFlags, run, "usage: gr00t-fast align --recordings=DIR --robot.type=... --robot.cameras=...", file_of=RunConfig)
