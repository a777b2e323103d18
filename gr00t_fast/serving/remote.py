"""A policy server in another process as the policy of a control loop: what is known about it before the arm moves, and outages during the run.

The arm outlives its server: while that is away every call ends soon with ServerUnreachableError (the controller holds the pose), the first
answer ends the outage, and an outage longer than `reconnect_s` ends the run. At an episode's start the arm is at rest and the call itself waits.
What answers after an outage must be the same policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from gr00t_fast.base.contracts import SO100_JOINTS, ActionPrefix, ModalityConfig, Policy, PolicyMetadata
from gr00t_fast.base.errors import ConfigError, PreflightError, ServerError, ServerUnreachableError
from gr00t_fast.checkpoint import read_policy_metadata
from gr00t_fast.inputs.images import to_trained_size
from gr00t_fast.serving.client import PolicyClient
from gr00t_fast.serving.wire import metadata_to_message

# NVIDIA's server is not warmed up: its first inference sets up the GPU and compiles kernels.
_FIRST_ANSWER_S = 60.0
_WARM_UP_CALLS, _WARM_UP_INSTRUCTION = 2, "Place the block in the bowl"
_PING_S = 1.0  # how long each call waits while the server is away; the end of the program may have to wait for one
_RETRY_S = 0.2  # between two attempts at an episode's start: a server that is there but refuses must not be hammered
_GREY = 127
_Answer = TypeVar("_Answer")


class RemotePolicy(Policy):
    """One thread at a time; `metadata`, `get_modality_config` and `summary` answer from memory."""

    continues = PolicyClient.continues

    def __init__(
        self,
        address: str,
        api_token: str | None,
        timeout_s: float,
        reconnect_s: float,
        model_path: str = "",
        embodiment_tag: str = "new_embodiment",
        data_config: str | None = None,
        action_horizon: int | None = None,
        prompt_style: str = "plain",
        echo: Callable[[str], None] = print,
        revision: str | None = None,
    ) -> None:
        """Reach the server and learn what it serves. `model_path`, `revision`: where to read the metadata that a server like NVIDIA's does not tell.
        `action_horizon`: how many actions an answer must have at least; None: any number. `prompt_style`: what NVIDIA's server is to make of the
        instruction, as `load_policy` has it; ours was told when it was started.

        Raises ServerUnreachableError when no server answers, ServerError for a wrong token, ConfigError when address, metadata or style do not fit.
        """
        self.address, self.last_timing = address, {}
        self._timeout_s, self._reconnect_s, self._horizon, self._echo = timeout_s, reconnect_s, action_horizon, echo
        self._ever_answered = False
        self._moving = False  # an answer has come since the episode began: the loop must not wait, and asks again with a newer observation
        self._away_since_s: float | None = None
        self._answers_again = False  # it was away, and answers again
        self._outages, self._away_s = 0, 0.0
        self._client = PolicyClient(address=address, timeout_s=timeout_s, api_token=api_token, resend=False)
        try:
            self._greet()
            self._served, told = self._client.get_modality_config(), self._client.get_metadata()
            if told is not None and prompt_style != "plain":
                raise ConfigError(f"--prompt_style={prompt_style} belongs on the command line of the policy server at {address}, which is ours.")
            if told is not None and model_path:
                echo("note: --model_path is not used: the server itself says what its checkpoint was trained on.")
            beside = read_policy_metadata(model_path, embodiment_tag, data_config, revision) if told is None and model_path else None
            self.metadata = told or beside or _metadata_of_names(self._served)
            _check_names(self.metadata, self._served)
        except BaseException:
            self.close()
            raise
        self._tells_metadata, self._client.expected_fingerprint = told is not None, self.metadata.fingerprint
        self._in_a_batch = told is None and prompt_style == "plain"  # NVIDIA's server prints the instruction of a single one with brackets
        self._known_connection: int | None = self._client.connection  # the one on which the server proved to be the one of `metadata`

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        return dict(self._served)

    @property
    def takes_deadline(self) -> bool:
        return self._tells_metadata

    def get_action(
        self, observation: dict[str, Any], noise: Any = None, prefix: ActionPrefix | None = None, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """As `Policy.get_action`. Frames travel at the size of the training videos.

        Raises ServerUnreachableError while the server is away (not for the first answer of an episode: that is waited for), ServerError when
        it has been away for too long or came back with another policy, and what `PolicyClient.get_action` raises.
        """
        observation = self._at_trained_size(observation)

        def ask() -> dict[str, np.ndarray]:
            self._ping_while_away()
            self._check_same_policy()
            return self._infer(observation, noise=noise, prefix=prefix, **({} if deadline_s is None else {"deadline_s": deadline_s}))

        actions = self._answer_of(ask)
        self._moving, self.last_timing = True, self._client.last_timing
        return actions

    def reset(self) -> None:
        """As `Policy.reset`; waits for a server that is away, at most `reconnect_s`. Raises like `get_action`."""
        self._moving = False
        self._answer_of(self._client.reset)

    def warm_up(self, instruction: str, continuing: bool = False) -> Mapping[str, float]:
        """Infer on a made-up observation before the arm is touched: shows a wrong instruction, option or answer, and sets up a cold server.

        Raises what `PolicyClient.get_action` raises, ServerError for NaN, and ConfigError when the server answers fewer actions than are to be
        executed, or cannot continue a chunk. Does nothing when the size of the server's pictures is unknown.
        """
        if None in self.metadata.resolutions.values():
            return {}
        observation = self._example_observation(instruction or _WARM_UP_INSTRUCTION)
        for _ in range(_WARM_UP_CALLS):
            actions = self._checked(self._infer(observation))
        if continuing:
            self._continue(observation, ActionPrefix(actions, 1))
        return {}  # a cold server is no measure of the calls to come

    def summary(self) -> dict[str, Any]:
        """For the report: where the server is, how often and how long it was away."""
        away_s = self._away_s + (0.0 if self._away_since_s is None else time.monotonic() - self._away_since_s)
        figures = {"outages": self._outages, "away_s": round(away_s, 3), "reconnects": self._client.connection}
        return {"server": {"address": self.address, **figures}}

    def close(self) -> None:
        """Close the connection; never waits."""
        self._client.close()

    def _greet(self) -> None:
        try:
            answers = self._client.ping(self._timeout_s)
        except ServerError as error:
            if error.code != ServerError.UNAUTHORISED:
                raise
            raise ServerError(f"{error}. Give the token that the server was started with: --api_token=...") from error
        if not answers:
            raise ServerUnreachableError(
                f"no policy server answers at {self.address} within {self._timeout_s:g} s. Start it first (gr00t-fast serve "
                "--model_path=... --port=..., without --http), look at address, --host and firewall, or wait longer with --server_timeout_s."
            )

    def _infer(self, observation: dict[str, Any], **options: Any) -> dict[str, np.ndarray]:
        """One call; the first answer of all may take longer."""
        batched = any(np.ndim(value) == 3 for key, value in observation.items() if key.startswith("state."))
        alone = self._in_a_batch and not batched
        self._client.timeout_s = self._timeout_s if self._ever_answered else max(self._timeout_s, _FIRST_ANSWER_S)
        try:
            actions = self._client.get_action(_batch_of_one(observation) if alone else observation, **options)
        finally:
            self._client.timeout_s = self._timeout_s
        self._ever_answered = True
        return {key: rows[0] for key, rows in actions.items()} if alone else _unsqueezed(actions, self.metadata.action_widths)

    def _answer_of(self, call: Callable[[], _Answer]) -> _Answer:
        """Raises ServerUnreachableError, which the controller survives, where the arm moves; at rest the call is made again until it answers."""
        while True:
            began_s = time.monotonic()
            try:
                answer = call()
            except ServerError as error:
                if not _may_pass(error):
                    raise
                self._note_loss(began_s, error)
                if self._moving:
                    raise ServerUnreachableError(str(error)) from error
                time.sleep(_RETRY_S)
                continue
            if self._away_since_s is not None:
                away_s = time.monotonic() - self._away_since_s
                self._away_s, self._away_since_s = self._away_s + away_s, None
                self._echo(f"The policy server at {self.address} is back after {away_s:.1f} s.")
            return answer

    def _at_trained_size(self, observation: dict[str, Any]) -> dict[str, Any]:
        """NVIDIA's server refuses other sizes, ours would do the same to them; and small frames travel faster."""
        resized = dict(observation)
        for name, size in self.metadata.resolutions.items():
            if size is not None and (key := f"video.{name}") in observation:
                frames = np.asarray(observation[key])  # (T, H, W, 3) or (B, T, H, W, 3)
                flat = to_trained_size(frames.reshape(-1, *frames.shape[-3:]), *size)
                resized[key] = flat.reshape(*frames.shape[:-3], *flat.shape[1:])
        return resized

    def _ping_while_away(self) -> None:
        """While the server is away, ask it first. Raises ServerUnreachableError even when it answers: the observation from before the wait is old
        by then, and the next call brings a newer one."""
        if self._away_since_s is None or self._answers_again:
            self._answers_again = False  # should this call fail, the next one pings again
            return
        self._answers_again = self._client.ping(min(_PING_S, self._timeout_s))
        raise ServerUnreachableError(f"the policy server at {self.address} {'answers again' if self._answers_again else 'is still away'}.")

    def _check_same_policy(self) -> None:
        """After an outage, or on a new connection, a server may answer that was started with another checkpoint, which the pre-flight check has not
        seen."""
        if self._client.connection == self._known_connection:
            return
        connection = self._client.connection
        same = self._client.get_modality_config() == self._served
        if same and self._tells_metadata:
            metadata = self._client.get_metadata()
            same = metadata is not None and metadata_to_message(metadata) == metadata_to_message(self.metadata)
        if not same:
            raise ServerError(f"the policy server at {self.address} came back with another policy. Start the program again to check it.")
        self._known_connection = connection

    def _note_loss(self, began_s: float, error: ServerError) -> None:
        """Raises ServerError when the outage has lasted too long."""
        self._known_connection = None  # behind a proxy the connection stays, and another server answers
        if self._away_since_s is None:
            self._away_since_s, self._outages = began_s, self._outages + 1
            self._echo(f"WARNING: {error} The arm holds its pose and waits for the server, at most {self._reconnect_s:g} s (--server_reconnect_s).")
        if time.monotonic() - self._away_since_s >= self._reconnect_s:
            raise ServerError(
                f"the policy server at {self.address} has been away for {time.monotonic() - self._away_since_s:.1f} s; "
                f"--server_reconnect_s={self._reconnect_s:g} allows no more. Last: {error}"
            ) from error

    def _example_observation(self, instruction: str) -> dict[str, Any]:
        """Grey pictures, joints in the middle of their range."""
        times, sizes = {name: len(self._served[name].delta_indices) for name in ("video", "state")}, self.metadata.resolutions.items()
        frames = {f"video.{name}": np.full((times["video"], height, width, 3), _GREY, np.uint8) for name, (width, height) in sizes}
        middles = {part: (known.min + known.max) / 2 for part, known in self.metadata.state_statistics.items()}
        states = {f"state.{part}": np.stack([middle] * times["state"]) for part, middle in middles.items()}
        return {**frames, **states, self._served["language"].modality_keys[0]: [instruction]}

    def _continue(self, observation: dict[str, Any], prefix: ActionPrefix) -> None:
        try:
            self._checked(self._infer(observation, prefix=prefix))
        except ServerError as error:
            if error.code != ServerError.UNKNOWN_ENDPOINT:
                raise
            raise ConfigError(
                f"the policy server at {self.address} cannot continue a chunk, as --smoothing=prefix asks (NVIDIA's cannot). "
                "Use --smoothing=none, or serve the checkpoint with gr00t-fast serve."
            ) from error

    def _checked(self, actions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        unusable = [key for key, values in actions.items() if not np.isfinite(values).all()]
        if unusable:
            raise ServerError(
                f"the policy server at {self.address} answers NaN or infinity ({', '.join(unusable)}) to an ordinary observation; expected finite "
                "actions. Look at its checkpoint and --precision."
            )
        fewest = min(len(values) for values in actions.values())
        if self._horizon is not None and fewest < self._horizon:
            raise ConfigError(
                f"--action_horizon={self._horizon} is more than the {fewest} actions that the policy server at {self.address} answers. "
                "Start it with the same --action_horizon, or use fewer here."
            )
        return actions


def _check_names(metadata: PolicyMetadata, served: Mapping[str, ModalityConfig]) -> None:
    """Raises ConfigError unless the metadata are about what the server reads and answers, as far as names can tell."""
    known = {"video": metadata.resolutions, "state": metadata.state_widths, "action": metadata.action_widths, "language": None}
    for modality, names in known.items():
        theirs = _names(served, modality)
        if names is not None and theirs != [*names]:
            raise ConfigError(
                f"the policy server's {modality} is {', '.join(theirs)}; by its metadata (--model_path, --data_config) it would be "
                f"{', '.join(names)}. Give the checkpoint and the data config that the server was started with."
            )


def _metadata_of_names(served: Mapping[str, ModalityConfig]) -> PolicyMetadata:
    """All that a modality configuration says; the pre-flight check refuses the rest. Raises PreflightError when not even widths follow."""
    widths = {modality: _widths(_names(served, modality), modality) for modality in ("state", "action")}
    return PolicyMetadata(
        embodiment_tag=None,
        resolutions=dict.fromkeys(_names(served, "video")),
        fps=None,
        state_widths=widths["state"],
        action_widths=widths["action"],
        state_statistics={},
        action_statistics={},
        trained_horizon=len(served["action"].delta_indices),
    )


def _names(served: Mapping[str, ModalityConfig], modality: str) -> list[str]:
    if modality not in served or not all("." in key for key in served[modality].modality_keys):
        raise ServerError(f"the policy server's modality configuration has no usable '{modality}' keys. It is no GR00T N1.5 inference service.")
    return [key.split(".", 1)[1] for key in served[modality].modality_keys]


def _widths(parts: list[str], modality: str) -> dict[str, int]:
    """Parts called like a joint have one value; a single other part has the rest. The server refuses a state that is not so."""
    others = [part for part in parts if part not in SO100_JOINTS]
    rest = len(SO100_JOINTS) - (len(parts) - len(others))
    if len(others) > 1 or (others and rest < 1):
        raise PreflightError(
            f"the policy server's {modality} parts are {', '.join(parts)}, and it does not say how many joints each has. "
            "Give the checkpoint's directory or hub name too: --model_path=... (only its small files are read)."
        )
    if not others and rest:
        raise PreflightError(f"the policy server's {modality} has {len(parts)} numbers; the arm has the joints {', '.join(SO100_JOINTS)}.")
    return {part: 1 if part in SO100_JOINTS else rest for part in parts}


def _batch_of_one(observation: Mapping[str, Any]) -> dict[str, Any]:
    """Texts as an array: older servers of NVIDIA take a list in a batch apart letter by letter."""
    return {
        key: np.array([value] if isinstance(value, str) else value) if "annotation" in key else np.asarray(value)[None]
        for key, value in observation.items()
    }


def _unsqueezed(actions: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Older servers of NVIDIA leave the joint axis out of a single answer where a part has one joint: (H,) becomes (H, 1)."""
    is_short = {key: values.ndim == 1 and widths.get(key.removeprefix("action.")) == 1 for key, values in actions.items()}
    return {key: values[..., None] if is_short[key] else values for key, values in actions.items()}


def _may_pass(error: ServerError) -> bool:
    """Unreachable, stopping (somebody starts it again) or overloaded."""
    return isinstance(error, ServerUnreachableError) or error.code in (ServerError.BUSY, ServerError.STOPPING)
