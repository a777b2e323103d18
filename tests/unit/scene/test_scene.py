"""The scene card and the look at live pictures: of the simulated scene, and of data sets that lack something. Whole commands on the virtual bus."""

from __future__ import annotations

import io
import json
import pickle
import re
import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scene import AS_NAMED, LIGHTS, Displaced, Study, displacements, filmed
from benchmarks.scene import Config as StudyConfig
from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.cli.main import main
from gr00t_fast.cli.run import parse
from gr00t_fast.evaluation.scene import build_card, card_of, card_path
from gr00t_fast.robots.calibration import save_calibration
from gr00t_fast.scene.card import MAX_BYTES, Card, learn, load_card, with_chance
from gr00t_fast.scene.look import Look, look
from gr00t_fast.scene.registration import SIZE, shrunk
from gr00t_fast.virtual.bus import VirtualBus
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint
from gr00t_fast.virtual.sim.simulation import HOME_DEG

pytest.importorskip("mujoco", reason="needs `pip install 'gr00t_fast[sim]'`")
cv2 = pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def study() -> Study:
    """A card of ten episodes, and live scenes."""
    return Study(StudyConfig(recorded=10))


def seen(study: Study, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict, **filming: object) -> Look:
    frames, joints = next(study.scenes(1, **filming))
    return look(study.card, change(frames), AS_NAMED, joints)


def told(found: Look, *kinds: str) -> str:
    return "\n".join(text for kind, text in found.findings if kind in kinds)


def test_a_card_is_a_small_file_that_comes_back(study: Study, tmp_path: Path) -> None:
    study.card.save(tmp_path / "card.npz")
    assert (tmp_path / "card.npz").stat().st_size < MAX_BYTES
    back = load_card(tmp_path / "card.npz")
    assert (back.name, back.episodes, back.joints) == (study.card.name, 10, study.card.joints)
    for name, camera in study.card.cameras.items():
        np.testing.assert_array_equal(back.cameras[name].median, camera.median)
        np.testing.assert_array_equal(back.cameras[name].steady, camera.steady)
        assert back.cameras[name].varies == camera.varies
    assert [camera.moves for camera in back.cameras.values()] == [False, True], "the wrist's moves with the arm"


@pytest.mark.parametrize("light", ["", *LIGHTS])
def test_what_was_not_moved_is_not_told_as_moved(study: Study, light: str) -> None:
    found = seen(study, **LIGHTS.get(light, {}))
    assert not told(found, "problem", "warning"), found.findings
    assert set(found.measures) == {"front", "wrist"}


MISTAKES: dict[str, tuple[Callable, list[str]]] = {
    "exchanged": (lambda f: {"front": f["wrist"], "wrist": f["front"]}, ['--camera_map="{front: wrist, wrist: front}"']),
    "mirrored": (lambda f: f | {"front": f["front"][:, ::-1]}, ["'front' is mirrored"]),
    "upside down": (lambda f: f | {"wrist": f["wrist"][::-1, ::-1]}, ["'wrist' is upside down", "rotation: 180"]),
    "both": (lambda f: f | {"front": f["front"][::-1]}, ["'front' is mirrored and upside down"]),
    "colours": (lambda f: {name: frame[..., ::-1] for name, frame in f.items()}, ["'front' has red and blue", "'wrist' has red", "color_mode"]),
    "another scene": (
        lambda f: f | {"front": np.random.default_rng(0).integers(0, 255, f["front"].shape, np.uint8)},
        ["'front' shows another scene"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_problem_that_names_its_remedy(study: Study, mistake: str) -> None:
    change, words = MISTAKES[mistake]
    found = seen(study, change)
    assert all(word in told(found, "problem") for word in words), found.findings
    assert len([kind for kind, _ in found.findings if kind == "problem"]) == (2 if mistake == "colours" else 1)
    assert all(picture.shape == (240, 960, 3) for picture in found.pictures.values())


def blocky(seed: int, size: tuple[int, int] = (640, 480)) -> np.ndarray:
    """Another scene for each seed."""
    return cv2.resize(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8), size, interpolation=cv2.INTER_NEAREST)


def test_what_proves_nothing_is_not_refused(study: Study) -> None:
    """A card that lacks a camera; episodes that do not agree among themselves; another light on each side of a scene that is nearly grey."""
    frames, joints = next(study.scenes(1))
    alone = Card(**vars(study.card) | {"cameras": {"front": study.card.cameras["front"]}})
    found = look(alone, frames, AS_NAMED, joints)
    assert "'wrist' cannot be compared" in told(found, "note")
    assert not told(found, "problem", "warning")
    assert look(alone, {"cam": frames["front"]}, {"cam": "webcam"}, joints).measures, "a single camera on both sides needs no name"
    for episodes in (2, 5):
        varied = with_chance({"front": learn("front", (640, 480), [blocky(n, SIZE) for n in range(episodes)], [])})
        for live in (0, 100, 101, 102, 103):
            found = look(Card(**vars(study.card) | {"cameras": varied}), {"front": blocky(live)}, {"front": "front"}, joints)
            assert "agree among themselves" in told(found, "note")
            assert not told(found, "problem", "warning")

    def lit(picture: np.ndarray, left: float) -> np.ndarray:
        across = np.linspace(-left, left, picture.shape[1])[:, None] * np.array([1.0, 0, -1])
        return np.clip((0.15 * picture + 0.85 * picture.mean(-1, keepdims=True)) * np.exp(across), 0, 255).astype(np.uint8)

    lamp = learn("front", (640, 480), [shrunk(lit(study.film("front", 200 + n), 0.2)) for n in range(4)], [])
    found = look(Card(**vars(study.card) | {"cameras": {"front": lamp}}), {"front": lit(frames["front"], -0.2)}, {"front": "front"}, joints)
    assert not told(found, "problem")


def test_the_map_of_cameras_can_be_pasted_whatever_their_names(study: Study) -> None:
    frames, joints = next(study.scenes(1))
    for front, wrist in (("cam 1", "on"), ("1", "2"), ("a: b", "$(x)"), ("it's", '"q"')):
        found = look(study.card, {front: frames["wrist"], wrist: frames["front"]}, {front: "front", wrist: "wrist"}, joints)
        flag = told(found, "problem").partition(" Use ")[2].removesuffix(".")
        config = parse(["--robot.type=so100_sim", "--model_path=x", "--lang_instruction=Go", *shlex.split(flag)])
        assert config.camera_map == {front: "wrist", wrist: "front"}, flag


def test_a_camera_beside_the_policys_that_shows_what_it_wants(study: Study) -> None:
    frames, joints = next(study.scenes(1))
    card = Card(**vars(study.card) | {"cameras": {"front": study.card.cameras["front"]}})
    found = look(card, {"front": frames["wrist"], "side": frames["front"]}, {"front": "front"}, joints)
    assert '--camera_map="{side: front}"' in told(found, "problem")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("10 mm right", "to the left"),
        ("10 mm down", "up"),
        ("10 mm back", "nearer"),
        ("1 deg left", "to the right"),
        ("1 deg up", "down"),
        ("1 deg clockwise", "counterclockwise"),
        ("100 mm left", "to the right"),
        ("15 deg right", "to the left"),
        ("zoom 1.1", "away"),
    ],
)
def test_a_camera_that_was_moved_is_told_the_way_back(study: Study, name: str, words: str) -> None:
    found = seen(study, displaced={"front": displacements()[name]})
    assert not told(found, "problem")
    (warning,) = [text for kind, text in found.findings if kind == "warning"]
    assert "'front'" in warning
    assert words in warning.rpartition("Back")[2]
    assert found.pictures["front"].std() > 0


def test_how_far_it_turned(study: Study) -> None:
    found = seen(study, displaced={"front": Displaced(turn_deg=(0, 5, 0))})
    assert found.measures["front"]["right"] == pytest.approx(539 * np.tan(np.deg2rad(5)), rel=0.1)  # a focal length of 539 pixels
    found = seen(study, displaced={"front": Displaced(turn_deg=(0, 0, -5))})
    assert found.measures["front"]["roll"] == pytest.approx(-5, abs=0.3)


def test_what_is_dark_covered_or_blurred(study: Study) -> None:
    dark = seen(study, lambda f: f | {"front": f["front"] * 0})
    assert "'front' is black or white" in told(dark, "warning")
    assert not told(dark, "problem"), "never refused for want of evidence"
    assert "0.2" in told(seen(study, light=0.2), "warning")
    assert "out of focus" in told(seen(study, blur=6.0), "warning")
    frames, joints = next(study.scenes(1))
    frames["front"][:, 350:] = (200, 150, 120)
    covered = look(study.card, frames, AS_NAMED, joints)
    assert re.search(r"'front': about [34]\d%", told(covered, "warning")), covered.findings
    assert "red" in told(seen(study, tint=0.2), "note")
    frames["front"][:, 240:] = (200, 150, 120)
    assert not told(look(study.card, frames, AS_NAMED, joints), "problem"), "what is left shows the same scene"


def test_the_pose_and_a_camera_that_moves_with_the_arm(study: Study) -> None:
    off = np.array([12.0, 0, 0, 0, 0, 0])
    frames = {name: study.film(name, 7, arm_deg=off) for name in AS_NAMED}
    found = look(study.card, frames, AS_NAMED, HOME_DEG + off)
    assert "--home=recordings" in told(found, "warning")
    assert "'wrist' cannot be compared" in told(found, "note")
    assert set(found.measures) == {"front"}
    assert not told(look(study.card, frames, AS_NAMED, HOME_DEG + off, led=True), "warning", "problem")
    exchanged = {"front": frames["wrist"], "wrist": frames["front"]}
    for joints in (HOME_DEG + off, None):
        found = look(study.card, exchanged, AS_NAMED, joints)
        assert '--camera_map="{front: wrist, wrist: front}"' in told(found, "problem"), "one of the pair is enough to tell"


def test_what_cannot_be_compared_is_said(study: Study) -> None:
    frames, joints = next(study.scenes(1))
    wide = look(study.card, frames | {"front": frames["front"][60:420]}, AS_NAMED, joints)
    assert "'front' cannot be compared" in told(wide, "note")
    assert "aspect" in told(wide, "note")
    strange = look(study.card, {"a": frames["front"], "b": frames["wrist"]}, {"a": "up", "b": "down"}, joints)
    assert told(strange, "note").count("not known") == 2
    varied = {name: Card(**vars(study.card)).cameras[name] for name in AS_NAMED}
    object.__setattr__(camera := type(varied["front"])(**vars_of(varied["front"])), "steady", np.zeros((240, 320), bool))
    card = Card(**vars(study.card) | {"cameras": varied | {"front": camera}})
    assert "varies from episode to episode" in told(look(card, frames, AS_NAMED, joints), "note")
    for found in (wide, strange):
        assert not told(found, "problem", "warning")


def vars_of(camera: object) -> dict:
    return {name: getattr(camera, name) for name in type(camera).__dataclass_fields__}


# Data sets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the simulated expert: LeRobotDataset v3, one camera."""
    pytest.importorskip("lerobot")
    from training.record import RecordConfig, record

    out = tmp_path_factory.mktemp("data") / "reach"
    assert record(RecordConfig(out, episodes=4, resolution="320x240"))
    return out


def test_the_command_writes_a_card_where_recordings_finds_it(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    assert main(["scene", f"--dataset={copy}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["cameras"], result["card"]) == (["front"], str(card_path(copy)))
    assert card_path(copy).with_suffix(".png").stat().st_size > 0
    said: list[str] = []
    card = card_of(copy, SO100_JOINTS, said.append)
    assert not said, "it was found, not made again"
    assert card.cameras["front"].policy == "webcam", "as meta/modality.json says"
    np.testing.assert_allclose(card.begin, HOME_DEG, atol=1.0)
    np.testing.assert_allclose(card_of(card_path(copy), SO100_JOINTS, said.append).begin, card.begin)
    with pytest.raises(ConfigError, match="this kind of arm"):
        card_of(card_path(copy), tuple("abcdef"), said.append)


def as_v21(dataset: Path, out: Path) -> Path:
    """The same as lerobot wrote before: a video and a table for each episode."""
    av, parquet = pytest.importorskip("av"), pytest.importorskip("pyarrow.parquet")
    from gr00t_fast.inputs.dataset import RecordedPictures, read_recordings

    info, pictures = json.loads((dataset / "meta" / "info.json").read_text()), RecordedPictures(dataset)
    info |= {"codebase_version": "v2.1", "chunks_size": 1000}
    info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (out / "meta").mkdir(parents=True)
    (out / "meta" / "info.json").write_text(json.dumps(info))
    (out / "data").mkdir()
    for file in (dataset / "data").rglob("*.parquet"):
        parquet.write_table(parquet.read_table(file), out / "data" / file.name)
    for episode, length in enumerate(read_recordings(dataset, SO100_JOINTS).lengths):
        file = out / info["video_path"].format(episode_chunk=0, video_key="observation.images.front", episode_index=episode)
        file.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(file), "w") as container:
            stream = container.add_stream("h264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for frame in range(length):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures.picture("front", episode, frame), "rgb24")))
            container.mux(stream.encode())
    return out


def test_data_sets_of_both_versions_say_the_same(dataset: Path, tmp_path: Path) -> None:
    new, old = build_card(dataset), build_card(as_v21(dataset, tmp_path / "old"))
    assert old.episodes == new.episodes
    away = np.abs(old.cameras["front"].median.astype(int) - new.cameras["front"].median)
    assert away.mean() < 4, "but for a second compression"
    assert "could not be decoded" in old.notes[0] if old.notes else True


def without_videos(path: Path) -> None:
    info = json.loads((path / "meta" / "info.json").read_text())
    info["features"] = {name: feature for name, feature in info["features"].items() if feature["dtype"] != "video"}
    (path / "meta" / "info.json").write_text(json.dumps(info))


def one_damaged(path: Path) -> None:
    as_old = path.parent / "old"
    as_v21(path, as_old)
    shutil.rmtree(path)
    as_old.rename(path)
    sorted(path.rglob("*.mp4"))[1].write_bytes(b"nothing")


def test_what_a_data_set_lacks_is_said(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: dict[str, tuple[Callable[[Path], object], int, str]] = {
        "pictures": (without_videos, 0, "no pictures"),
        "a video": (one_damaged, 0, "1 of 4 episodes could not be decoded"),
        "all videos": (lambda path: [file.write_bytes(b"x") for file in path.rglob("*.mp4")], 0, "4 of 4 episodes could not"),
        "its tables": (lambda path: shutil.rmtree(path / "data"), 2, "cannot be read"),
        "everything": (shutil.rmtree, 2, "no LeRobotDataset"),
    }
    for name, (damage, code, words) in cases.items():
        copy = tmp_path / name.replace(" ", "_") / "data"
        shutil.copytree(dataset, copy)
        damage(copy)
        assert main(["scene", f"--dataset={copy}"]) == code, name
        said = capsys.readouterr()
        assert words in said.out + said.err, (name, said)
        assert "Traceback" not in said.err


def test_a_file_that_is_no_card_is_refused(study: Study, tmp_path: Path) -> None:
    study.card.save(tmp_path / "good.npz")
    good, whole = dict(np.load(tmp_path / "good.npz")), (tmp_path / "good.npz").read_bytes()

    def with_facts(**changed: object) -> dict:
        facts = json.loads(str(good["facts"]))
        facts["cameras"][0] |= changed
        return good | {"facts": np.array(json.dumps(facts))}

    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("facts.npy", huge.getvalue())
    damaged = {"text": b"no card", "empty": b"", "half": whole[:1000], "holes": whole[:3000] + bytes(600) + whole[3600:]}
    damaged |= {"large": bytes(MAX_BYTES + 1), "pickle": pickle.dumps(good)}
    wrong = {"other": {"a": np.zeros(3)}, "size": with_facts(size=[0, 0]), "names": with_facts(size="ab"), "chance": with_facts(chance=None)}
    wrong |= {"varies": with_facts(varies=[1]), "less": with_facts(varies={"light": 1.0}), "nan": with_facts(varies={"shift": np.nan, "score": 1})}
    wrong |= {"objects": good | {"begin": np.array([{}] * 6)}, "deep": good | {"facts": np.array("[" * 20000)}}
    for name, content in damaged.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    for name, arrays in wrong.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    for name in ("huge", *damaged, *wrong):
        with pytest.raises(ConfigError, match="gr00t-fast scene"):
            card_of(tmp_path / f"{name}.npz", SO100_JOINTS, print)
    with pytest.raises(ConfigError, match="nothing is there"):
        card_of(tmp_path / "missing.npz", SO100_JOINTS, print)


# Whole commands


@pytest.fixture
def stand(bus: VirtualBus, study: Study, tmp_path: Path) -> list[str]:
    """Flags of an arm that stands where the recordings begin, its card, and a checkpoint with random weights for two cameras."""
    pytest.importorskip("serial", reason="needs `pip install 'gr00t_fast[robot]'`")
    from gr00t_fast.robots.lerobot_glue import readings
    from gr00t_fast.robots.motor_state import examine

    save_calibration(bus.calibration, tmp_path / "black.json")
    for joint, angle in zip(SO100_JOINTS, HOME_DEG, strict=True):
        bus.push(joint, float(angle) - (50 if joint == "gripper" else 0))  # counted from the middle of its range
    positions = examine(bus.port, bus.calibration, "")[1]
    begin = readings(positions, bus.calibration, True)
    np.testing.assert_allclose(begin, HOME_DEG, atol=1.0)
    Card(**vars(study.card) | {"begin": begin, "joints": SO100_JOINTS}).save(tmp_path / "card.npz")
    write_random_checkpoint(tmp_path / "checkpoint", "tiny", "so100_dualcam", resolution=(640, 480))
    policy = [f"--model_path={tmp_path / 'checkpoint'}", "--data_config=so100_dualcam", f"--recordings={tmp_path / 'card.npz'}", "--device=cpu"]
    return ["--robot.type=so100_follower", f"--robot.port={bus.port}", "--robot.id=black", f"--robot.calibration_dir={tmp_path}", *policy]


def cameras(front: str, wrist: str) -> str:
    return f"--robot.cameras={{front: {{type: sim, view: {front}}}, wrist: {{type: sim, view: {wrist}}}}}"


def test_exchanged_cameras_are_refused_with_the_flag_that_mends_it(
    bus: VirtualBus, stand: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", *stand, "--lang_instruction=Place the block in the bowl", "--timeout=1", cameras("wrist", "front")]
    assert main([*words, f"--out={tmp_path / 'refused'}"]) == 1
    said = capsys.readouterr().err
    assert set(bus.torque().values()) == {0}
    (flag,) = re.findall(r'--camera_map="(\{.*?\})"', said)
    assert (tmp_path / "refused" / "scene.png").stat().st_size > 0
    assert main([*words, f"--camera_map={flag}", f"--out={tmp_path / 'out'}"]) == 0, capsys.readouterr()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["ticks"] > 0
    assert report["scene"]["measures"]["front"]["score"] > 0.9
    assert "recorded (median" in (tmp_path / "out" / "report.html").read_text()
    assert "scene" not in report["settings"]
    assert main([*words, "--preflight=warn", "--dry_run"]) == 0
    assert "ignored at your wish: cameras are exchanged" in capsys.readouterr().out


def test_doctor_compares_too(stand: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for views, state in ((("front", "wrist"), "ok"), (("wrist", "front"), "fail")):
        code = main(["doctor", *stand, cameras(*views), "--json", f"--out={tmp_path / 'doctor'}"])
        rows = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["section"] == "scene"]
        assert {row["state"] for row in rows} == {state}, rows
        assert code == (state == "fail")
    assert (tmp_path / "doctor" / "camera_front_compared.png").is_file()


def test_eval_tells_pictures_of_another_place(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from gr00t_fast.inputs.dataset import LeRobotFrames

    build_card(dataset).save(tmp_path / "card.npz")
    whole, checkpoint = LeRobotFrames.__getitem__, Path(__file__).resolve().parents[3] / "checkpoints" / "so100-sim-reach"
    mirrored = lambda self, index: (row := whole(self, index)) | {"video.webcam": row["video.webcam"][:, :, ::-1].copy()}  # noqa: E731
    monkeypatch.setattr(LeRobotFrames, "__getitem__", mirrored)
    words = [f"--model_path={checkpoint}", f"--dataset={dataset}", f"--recordings={tmp_path / 'card.npz'}", f"--out={tmp_path}", "--json"]
    assert main(["eval", *words, "--lang_instruction=Reach the block"]) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["kind"] == "cameras"
    assert any("'webcam' is mirrored" in each["text"] and each["decides"] for each in verdict["evidence"])


def test_filming_is_what_it_says() -> None:
    """The benchmark's own degradations."""
    picture = np.full((480, 640, 3), 100, np.uint8)
    hand = filmed(picture, np.random.default_rng(0), hand=0.1, noise=0)
    assert 0.02 < (hand != 100).any(-1).mean() <= 0.11
    assert filmed(picture, np.random.default_rng(0), light=0.4, noise=0).mean() == pytest.approx(40, abs=1)
