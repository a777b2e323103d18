"""Training logs become tables: lines as lerobot 0.4.4's own MetricsTracker formats them, and the loss.csv that ships."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from training import results
from training.results import read_log, shown

SHIPPED = Path(__file__).parent.parent / "training" / "results" / "loss.csv"
LINE = "step:{} smpl:{} ep:0 epch:0.10 loss:{} grdn:2.5 lr:1.0e-05 updt_s:0.400 data_s:0.100"


def report(text: str, tmp_path: Path, capsys: pytest.CaptureFixture, *flags: str) -> tuple[dict, str]:
    """The JSON line and the table."""
    (tmp_path / "train.log").write_text(text)
    assert results.main([f"--log={tmp_path / 'train.log'}", f"--out={tmp_path / 'results.md'}", *flags]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return told, (tmp_path / "results.md").read_text()


def test_what_lerobot_prints_is_counted_exactly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    logging_utils = pytest.importorskip("lerobot.utils.logging_utils")
    forms = {"loss": "loss", "grad_norm": "grdn", "lr": "lr", "update_s": "updt_s", "dataloading_s": "data_s"}
    meters = {key: logging_utils.AverageMeter(name, ":0.1e" if key == "lr" else ":.3f") for key, name in forms.items()}
    tracker, lines = logging_utils.MetricsTracker(8, 5000, 10, meters), []
    for step in range(1, 2401):
        tracker.loss, tracker.grad_norm, tracker.lr, tracker.update_s, tracker.dataloading_s = 10 / step, 3.0, 1e-5, 0.4, 0.1
        tracker.step()
        if step % 200 == 0:
            lines.append(f"Training:   5%|5         | {step}/2400 [00:02<00:05]\rINFO 2026-01-01 10:00:00 ot_train.py:435 {tracker}")
            tracker.reset_averages()
        if step % 1000 == 0:
            lines.append(f"INFO 2026-01-01 10:00:00 ot_train.py:455 Checkpoint policy after step {step}")
    text = "\n".join(lines)
    assert "step:2K smpl:19K" in text
    told, table = report("INFO dataset.num_frames=5000 (5K)\nINFO Effective batch size: 4 x 2 = 8\n" + text, tmp_path, capsys)
    assert (told["steps"], told["samples"], told["batch_size"], told["steps_exact"], told["samples_exact"]) == (2400, 19200, 8, True, True)
    assert (told["checkpoints"], told["epochs"], told["samples_per_s"]) == ([1000, 2000], 2400 * 8 / 5000, pytest.approx(8 / 0.5))
    assert "| 2400 | 19200 |" in table
    assert read_log(text, "train.log").batch == 8, "the only one that fits the lines"
    for number in (0, 999, 1000, 1500, 2500, 999_500, 12_345_678, 3 * 10**9):
        assert shown(number) == logging_utils.format_big_number(number)


@pytest.mark.parametrize(("lost", "batch"), [(1200, 8), (1800, 8), (2200, 8), (3000, 1)])
def test_a_lost_line_makes_no_wrong_step_exact(lost: int, batch: int) -> None:
    steps = [step for step in range(200, 4001, 200) if step != lost]
    log = read_log("\n".join(LINE.format(shown(step), shown(batch * step), 1.0) for step in steps), "train.log", batch=batch)
    assert [row.exact for row in log.rows] == [step < 1000 for step in steps]
    assert all(row.step == step and row.samples == batch * step for row, step in zip(log.rows, steps, strict=True) if row.exact)


def test_what_the_log_leaves_open_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    resumed = "\n".join(LINE.format("3K", "24K", 1.0) for _ in range(3))
    told, table = report(resumed, tmp_path, capsys, "--batch_size=8")
    assert (told["steps"], told["steps_exact"]) == (3000, False)
    assert "| ~3000 | ~" in table
    open_batch = LINE.format(100, "2K", 1.0)  # 15 to 25 fit
    assert (read_log(open_batch, "train.log").batch, read_log(open_batch, "train.log", batch=16).rows[0].samples) == (None, 1600)
    rows = "\n".join(LINE.format(step, 2 * step, loss) for step, loss in ((310, 8.0), (320, 3.0), (330, math.nan), (340, 0.7)))
    told, table = report(rows, tmp_path, capsys, "--rows=2")
    assert told["samples_per_s"] == pytest.approx(2 / 0.5), "not billed for the steps before"
    assert (told["samples_until"], told["lowest_loss"]) == ({"0.5": 640, "0.1": 680, "0.01": None}, 0.7)
    assert "not finite at step 330" in table
    assert "2 of 4 rows" in table


def test_the_log_that_ships(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    told, table = report(SHIPPED.read_text(), tmp_path, capsys, "--batch_size=64", "--dataset_frames=15000")
    last = SHIPPED.read_text().splitlines()[-1].split(",")
    assert (told["steps"], told["samples"], told["last_loss"]) == (int(last[0]), 64 * int(last[0]), float(last[1]))
    assert told["samples_per_s"] == pytest.approx(64 * int(last[0]) / (60 * float(last[-1])), rel=1e-3)
    assert f"| {last[0]} | {64 * int(last[0])} |" in table


@pytest.mark.parametrize(
    ("text", "flags", "code", "told"),
    [
        ("epoch 1 loss 0.4\n", [], 1, "loss.csv"),
        ("step:1 smpl:2 ep:0 epch:0.03 loss:5.0 grdn:1.0 lr:1.0e-05\n", [], 1, "updt_s, data_s"),
        (LINE.format("x7", 2, 1.0), [], 1, "'x7'"),
        (LINE.format(1, 2, "high"), [], 1, "no number"),
        (LINE.format(100, "2K", 1.0), ["--batch_size=32"], 1, "15 to 25"),
        ("INFO Effective batch size: 8 x 1 = 8\n" + LINE.format(100, 800, 1.0), ["--batch_size=4"], 1, "8, the flag says 4"),
        ("step,flow,minutes\n1,0.2,3\n", [], 1, "gradient_norm, rate"),
        ("step,flow,gradient_norm,rate,minutes\n", [], 1, "no row"),
        ("step,flow,gradient_norm,rate,minutes\n100,0.2,,1e-3,2\n", [], 1, "no number"),
        (LINE.format(1, 2, 1.0), ["--batch_size=0"], 2, "--batch_size"),
    ],
)
def test_other_files_and_flags_are_refused(text: str, flags: list[str], code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, out = tmp_path / "some.log", tmp_path / "results.md"
    file.write_text(text)
    assert results.main([str(file), f"--out={out}", *flags]) == code
    assert told in capsys.readouterr().err
    assert not out.exists()
    assert results.main([str(tmp_path / "none.log")]) == 1
