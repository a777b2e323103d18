"""The examples run as they are printed, on the demo's trained network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from serving_fakes import running

from examples import client, infer, own_engine
from gr00t_fast import load_policy

TRAINED = str(Path(__file__).resolve().parents[2] / "checkpoints" / "so100-sim-reach")


def test_infer_gives_a_chunk_of_finite_actions(capsys: pytest.CaptureFixture[str]) -> None:
    actions = infer.main(TRAINED)
    assert {key: rows.shape for key, rows in actions.items()} == {"action.single_arm": (16, 5), "action.gripper": (16, 1)}
    assert all(np.isfinite(rows).all() for rows in actions.values())
    assert "at 2 denoising steps" in capsys.readouterr().out


def test_client_gets_a_chunk_from_a_server() -> None:
    pytest.importorskip("zmq", reason="needs `pip install 'gr00t_fast[serving]'`")
    from gr00t_fast.serving.server import PolicyServer

    with running(PolicyServer(load_policy(TRAINED), port=0)) as server:
        actions = client.main(port=server.port)
    assert all(np.isfinite(rows).all() and len(rows) == 16 for rows in actions.values())


def test_own_engine_computes_vision_once_for_two_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert own_engine.main(TRAINED) == 0
    assert "vision reused 1 time" in capsys.readouterr().out
