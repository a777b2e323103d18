"""Training logs become tables: lines as lerobot 0.4.4's own MetricsTracker formats them, and a loss.csv that training/train.py wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gr00t_fast.errors import ConfigError
from training import results
from training.training_log import read_log, shown

SHIPPED = Path(__file__).parent.parent / "training" / "results" / "loss.csv"
LINE = "step:{} smpl:{} ep:0 epch:0.10 loss:{} grdn:2.5 lr:1.0e-05 updt_s:0.400 data_s:0.100"


def lerobot_log(steps: int, every: int, batch: int = 8, first: int = 0, losses: dict[int, float] | None = None) -> str:
    """What lerobot-train would print, by its own tracker, with the bar of tqdm in front as on a terminal."""
    logging_utils = pytest.importorskip("lerobot.utils.logging_utils")
    formats = {
        "loss": ("loss", ":.3f"),
        "grad_norm": ("grdn", ":.3f"),
        "lr": ("lr", ":0.1e"),
        "update_s": ("updt_s", ":.3f"),
        "dataloading_s": ("data_s", ":.3f"),
    }
    tracker = logging_utils.MetricsTracker(
        batch, 5000, 10, {key: logging_utils.AverageMeter(*form) for key, form in formats.items()}, initial_step=first
    )
    lines = []
    for step in range(first + 1, steps + 1):
        tracker.loss = (losses or {}).get(step, 10 / step)
        tracker.grad_norm, tracker.lr, tracker.update_s, tracker.dataloading_s = 3.0, 1e-5, 0.4, 0.1
        tracker.step()
        if step % every == 0:
            lines.append(f"Training:   5%|5         | {step}/{steps} [00:02<00:05]\rINFO 2026-01-01 10:00:00 ot_train.py:435 {tracker}")
            tracker.reset_averages()
        if step % 1000 == 0:
            lines.append(f"INFO 2026-01-01 10:00:00 ot_train.py:455 Checkpoint policy after step {step}")
    return "\n".join(lines) + "\n"


def test_rounded_numbers_are_counted_exactly() -> None:
    text = lerobot_log(2400, 200)
    assert "step:2K smpl:19K" in text
    log = read_log(text, "train.log")
    assert [row.step for row in log.rows] == list(range(200, 2401, 200))
    assert all(row.exact and row.samples_exact for row in log.rows)
    assert [row.samples for row in log.rows] == [8 * row.step for row in log.rows]
    assert log.batch == 8
    assert log.checkpoints == (1000, 2000)
    last = log.rows[-1]
    assert last.step_s == pytest.approx(0.5)
    assert (last.update_s, last.data_s, last.gradient_norm, last.rate) == (0.4, 0.1, 3.0, 1e-5)
    assert last.loss == pytest.approx(sum(10 / step for step in range(2201, 2401)) / 200, abs=0.001)
    assert last.epochs == pytest.approx(2400 * 8 / 5000, abs=0.01)


def test_a_batch_size_that_the_log_leaves_open_is_not_guessed() -> None:
    log = read_log(LINE.format(100, "2K", 1.0), "train.log")  # 15 to 25 fit
    assert (log.batch, log.rows[0].samples, log.rows[0].exact, log.rows[0].samples_exact) == (None, 2000, True, False)
    assert read_log(LINE.format(100, "2K", 1.0), "train.log", batch=16).rows[0].samples == 1600
    with pytest.raises(ConfigError, match="cannot be of batch size 32: .* 15 to 25"):
        read_log(LINE.format(100, "2K", 1.0), "train.log", batch=32)


def test_what_lerobot_says_of_itself_is_used() -> None:
    said = " 'log_freq': 200,\nINFO dataset.num_frames=5000 (5K)\nINFO Effective batch size: 4 x 2 = 8\n"
    log = read_log(said + lerobot_log(1400, 200), "train.log")
    assert (log.batch, log.frames) == (8, 5000)
    assert log.rows[-1].epochs == 1400 * 8 / 5000
    with pytest.raises(ConfigError, match="batch size was 8, the flag says 4"):
        read_log(said + lerobot_log(400, 200), "train.log", batch=4)


def test_what_cannot_be_counted_is_marked(tmp_path: Path) -> None:
    file = tmp_path / "resumed.log"
    file.write_text(lerobot_log(3000, 200, first=2400))  # 2600, 2800, 3000: each printed as 3K
    log = read_log(file.read_text(), file.name, batch=8)
    assert [(row.step, row.exact) for row in log.rows] == [(3000, False)] * 3
    assert results.main([str(file), f"--out={tmp_path / 'results.md'}"]) == 0
    assert "| ~3000 | ~" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("lost", [1200, 1800, 2200])
def test_a_lost_line_makes_no_wrong_step_exact(lost: int) -> None:
    lines = [LINE.format(shown(step), shown(8 * step), 1.0) for step in range(200, 3001, 200) if step != lost]
    steps = [step for step in range(200, 3001, 200) if step != lost]
    log = read_log("\n".join(lines), "train.log")
    assert log.batch == 8
    assert all(row.step == step and row.samples == 8 * step for row, step in zip(log.rows, steps, strict=True) if row.exact)
    assert [row.exact for row in log.rows] == [step < lost for step in steps]


def test_a_lost_line_that_shows_late_takes_back_the_steps_that_hid_it() -> None:
    """With one sample a step, samples round as steps do: a line lost at 3000 shows only where 3600 is printed as 4K."""
    steps = [step for step in range(200, 4001, 200) if step != 3000]
    log = read_log("\n".join(LINE.format(shown(step), shown(step), 1.0) for step in steps), "train.log", batch=1)
    assert all(row.step == step for row, step in zip(log.rows, steps, strict=True) if row.exact)
    assert [step for row, step in zip(log.rows, steps, strict=True) if row.exact][-1] < 3000


def test_a_summary_of_throughput_and_sample_efficiency() -> None:
    lines = [LINE.format(10 * number, 20 * number, loss) for number, loss in enumerate((8.0, 5.0, 3.0, 0.7, 0.9), 1)]
    told = results.summary(read_log("\n".join(lines), "train.log"))
    assert (told["steps"], told["batch_size"], told["samples"]) == (50, 2, 100)
    assert told["samples_per_s"] == pytest.approx(2 / 0.5)
    assert told["samples_until"] == {"0.5": 60, "0.1": 80, "0.01": None}
    assert (told["first_loss"], told["last_loss"], told["lowest_loss"]) == (8.0, 0.9, 0.7)


def test_a_resumed_run_is_not_billed_for_the_steps_before() -> None:
    lines = [LINE.format(step, 2 * step, 1.0) for step in (310, 320, 330)]
    assert results.summary(read_log("\n".join(lines), "train.log"))["samples_per_s"] == pytest.approx(2 / 0.5)


def test_a_loss_that_is_not_finite_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, out = tmp_path / "train.log", tmp_path / "results.md"
    file.write_text(lerobot_log(6, 1, losses={4: math.nan, 5: math.nan, 6: math.nan}))
    assert results.main([str(file), f"--out={out}"]) == 0
    assert "WARNING | the loss is not finite at step 4" in out.read_text()
    told = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert told["last_loss"] == "nan"


def test_our_own_log(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "results.md"
    assert results.main([str(SHIPPED), f"--out={out}", "--batch_size=64", "--dataset_frames=15000"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = SHIPPED.read_text().splitlines()[-1].split(",")
    assert (told["steps"], told["samples"], told["last_loss"]) == (int(last[0]), 64 * int(last[0]), float(last[1]))
    assert told["samples_per_s"] == pytest.approx(64 * int(last[0]) / (60 * float(last[-1])), rel=1e-3)
    assert told["epochs"] == pytest.approx(64 * int(last[0]) / 15000, abs=0.001)
    assert f"| {last[0]} | {64 * int(last[0])} |" in out.read_text()


def test_a_long_log_is_thinned(tmp_path: Path) -> None:
    file, out = tmp_path / "train.log", tmp_path / "results.md"
    file.write_text("\n".join(LINE.format(step, 2 * step, 1.0) for step in range(1, 101)))
    assert results.main([str(file), f"--out={out}", "--rows=5"]) == 0
    rows = [line for line in out.read_text().splitlines() if line.startswith("| ") and line.split()[1].isdigit()]
    assert [int(row.split()[1]) for row in rows] == [1, 26, 51, 75, 100]
    assert "5 of 100 rows" in out.read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no line of lerobot-train"),
        ("epoch 1 loss 0.4\n", "loss.csv of training/train.py"),
        ("step:1 smpl:2 ep:0 epch:0.03 loss:5.0 grdn:1.0 lr:1.0e-05\n", "lacks updt_s, data_s"),
        (LINE.format("x7", 2, 1.0), "'x7'"),
        (LINE.format(1, 2, "high"), "no number"),
        ("step,flow,minutes\n1,0.2,3\n", "lacks the columns gradient_norm, rate"),
        ("step,flow,gradient_norm,rate,minutes\n", "no row yet"),
        ("step,flow,gradient_norm,rate,minutes\n100,0.2,,1e-3,2\n", "no number"),
    ],
)
def test_other_files_are_refused(text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, out = tmp_path / "some.log", tmp_path / "results.md"
    file.write_text(text)
    assert results.main([str(file), f"--out={out}"]) == 1
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_flags_and_files_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert results.main([str(tmp_path / "none.log")]) == 1
    assert "cannot read" in capsys.readouterr().err
    assert results.main([str(SHIPPED), "--batch_size=0"]) == 1
    assert "--batch_size must be at least 1" in capsys.readouterr().err


def test_numbers_are_shown_as_lerobot_shows_them() -> None:
    format_big_number = pytest.importorskip("lerobot.utils.utils").format_big_number
    for number in (0, 7, 999, 1000, 1499, 1500, 2500, 999_499, 999_500, 1_000_000, 12_345_678, 3 * 10**9):
        assert shown(number) == format_big_number(number)
