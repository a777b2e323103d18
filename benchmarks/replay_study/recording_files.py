"""Readers of other people's formats: LeRobotDataset v3 (parquet, no video is decoded) and ROS 1 bags (pure Python, no ROS).

Axis alphabet of this file: T samples, J joints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.errors import ConfigError, closest
from gr00t_fast.optional import require

_JOINT_STATE = "sensor_msgs/msg/JointState"  # rosbags' spelling of sensor_msgs/JointState
Columns = tuple[tuple[str, ...], np.ndarray, np.ndarray]


def read_lerobot(root: Path, episode: int, column: str) -> Columns:
    """Names (without lerobot's `.pos`), seconds (T,) and values (T, J) of one episode, in the units it was recorded in.

    Those are degrees (and per cent for the gripper) where the driver ran with `use_degrees`, which the file does not say. Raises ConfigError.
    """
    names = _lerobot_names(root, column)
    parquet = require("pyarrow.parquet", "bench")
    files = sorted((root / "data").rglob("*.parquet"))
    if not files:
        raise ConfigError(f"{root.name}: there is no data/*/*.parquet. Was the dataset finalized, or copied without its data?")
    times, values = [], []
    for file in files:  # an episode may cross files
        try:
            table = parquet.read_table(file, columns=["timestamp", column], filters=[("episode_index", "==", episode)])
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors derive from these
            raise ConfigError(f"{root.name}/{file.relative_to(root)} cannot be read: {error}") from error
        times += table["timestamp"].to_pylist()
        values += table[column].to_pylist()
    if not times:
        raise ConfigError(f"{root.name} has no episode {episode}. Choose another one with --episode (they count from 0).")
    return names, np.array(times, np.float64), np.array(values, np.float64)


def _lerobot_names(root: Path, column: str) -> tuple[str, ...]:
    info_file = root / "meta" / "info.json"
    if not info_file.is_file():
        raise ConfigError(f"'{root.name}' is no LeRobotDataset: meta/info.json is missing.")
    try:
        info = json.loads(info_file.read_text(encoding="utf-8"))
        version, features = str(info["codebase_version"]), dict(info["features"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{root.name}/meta/info.json is damaged: {error!r}.") from error
    if not version.startswith("v3"):
        raise ConfigError(f"{root.name} has format {version}, expected v3. lerobot converts older ones (datasets/v30/convert_dataset_v21_to_v30.py).")
    vectors = {name: feature for name, feature in features.items() if feature.get("names") and feature.get("dtype", "").startswith("float")}
    if column not in vectors:
        raise ConfigError(f"--column={column}: {root.name} has {', '.join(vectors) or 'no joint columns'}.{closest(column, vectors)}")
    names = vectors[column]["names"]
    if not isinstance(names, list):
        raise ConfigError(f"{root.name}: the names of {column} must be a list of joints, got {names!r}.")
    return tuple(str(name).removesuffix(".pos") for name in names)


def read_bag(path: Path, topic: str | None) -> Columns:
    """Names, seconds (T,) and degrees (T, J) from the JointState messages of `topic` (None: the only such topic). Radians are converted.

    Time is the messages' stamp, or when they were recorded where they carry none. Raises ConfigError.
    """
    rosbag1, typesys = require("rosbags.rosbag1", "bags"), require("rosbags.typesys", "bags")
    types = typesys.get_typestore(typesys.Stores.ROS1_NOETIC)
    stamps_ns, positions, names = [], [], None
    try:
        with rosbag1.Reader(path) as reader:
            connections = _joint_connections(path, reader.connections, topic)
            for connection, recorded_ns, raw in reader.messages(connections):
                message = types.deserialize_ros1(raw, connection.msgtype)
                names = names or tuple(message.name)
                positions.append(_in_order(path, message, names))
                stamp = message.header.stamp
                stamps_ns.append(stamp.sec * 10**9 + stamp.nanosec or recorded_ns)
    except rosbag1.ReaderError as error:
        raise ConfigError(f"{path.name} is no readable ROS 1 bag: {error}. Bags of ROS 2 are not read.") from error
    if not names:
        raise ConfigError(f"{path.name}: the topic {connections[0].topic} has no message with joint names.")
    stamps = np.array(stamps_ns, np.int64)
    return names, (stamps - stamps[0]) / 1e9, np.degrees(np.array(positions, np.float64))


def _joint_connections(path: Path, connections: list[Any], topic: str | None) -> list[Any]:
    topics = {connection.topic for connection in connections if connection.msgtype == _JOINT_STATE}
    if topic is None and len(topics) == 1:
        topic = next(iter(topics))
    if topic not in topics:
        said = "--topic is needed" if topic is None and topics else f"--topic={topic}" if topic else "nothing to replay"
        listed = ", ".join(sorted(topics)) or "none at all"
        raise ConfigError(f"{path.name}: {said}: its topics of sensor_msgs/JointState are: {listed}.{closest(topic or '', topics)}")
    return [connection for connection in connections if connection.topic == topic and connection.msgtype == _JOINT_STATE]


def _in_order(path: Path, message: Any, names: tuple[str, ...]) -> list[float]:
    by_name: Mapping[str, float] = dict(zip(message.name, message.position, strict=False))
    if by_name.keys() != set(names):
        raise ConfigError(
            f"{path.name}: every message must hold the positions of {', '.join(names)}; one holds those of {', '.join(by_name) or 'none'}."
        )
    return [by_name[name] for name in names]
