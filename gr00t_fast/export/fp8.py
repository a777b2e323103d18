"""Calibration of the torch engine `fp8`: what goes into every linear layer over many frames, how each is best rounded, and which layers the actions
cannot spare. The same statistics and choices as for exported graphs, taken from the model itself. Of the diffusion transformer only weights are
rounded, which takes no statistics; the trials that decide what stays in 16 bits are the same.

Axis alphabet: H horizon, A padded action width, R rows (tokens), K input width, N output width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from gr00t_fast.engine.calibration import Calibration
from gr00t_fast.engine.quantized import PARTS, WEIGHTS_ONLY, InputScale, linear_layers, part_of, rounded_layers, with_layers
from gr00t_fast.export.action_error import ActionError, action_error
from gr00t_fast.export.layer_statistics import InputRecorder, plan_inputs
from gr00t_fast.export.linear_layers import LinearLayer
from gr00t_fast.export.progress import Progress
from gr00t_fast.export.qdq import LayerPlan
from gr00t_fast.export.quantise import Outcome, Settings
from gr00t_fast.export.sensitivity import NEGLIGIBLE, Group, Verdict, choose, spread
from gr00t_fast.export.verify import Case
from gr00t_fast.model import Condition, Gr00tN1d5, ModelInputs
from gr00t_fast.transforms import ActionTransform

SCHEME, TARGET = "fp8", "torch"  # TARGET: what reports call the runtime
_STAGES = ("vision", "language", "denoise")  # layers are recorded by the stage they run in; denoise runs once per step


@dataclass
class Recorded:
    """The layers that run in one stage, in order, and the statistics of their inputs by the name of the first layer that reads them."""

    layers: list[LinearLayer] = field(default_factory=list)
    recorder: InputRecorder | None = None


class LayerInputs:
    """A context in which the model's linear layers are watched. `flush` ends one run of a stage."""

    def __init__(self, model: Gr00tN1d5, runs: Mapping[str, int], seed: int) -> None:
        """runs: stage -> how often it will be flushed."""
        self._layers, self._runs, self._seed = linear_layers(model), runs, seed
        self._seen: dict[str, Tensor] = {}
        self.stages: dict[str, Recorded] = {}

    def __enter__(self) -> LayerInputs:
        self._hooks = [layer.register_forward_pre_hook(self._watch(name)) for name, layer in self._layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor]) -> None:
            self._seen[name] = inputs[0]

        return see

    def flush(self, stage: str) -> None:
        if stage not in self.stages:
            self.stages[stage] = self._begin(stage)
        recorder = self.stages[stage].recorder
        recorder.see({name: self._seen[name].float().cpu().numpy() for name in recorder.tensors})
        self._seen = {}

    def _begin(self, stage: str) -> Recorded:
        """Which layers run here, and which of them read the same tensor."""
        readers: dict[int, str] = {}
        for name, tensor in self._seen.items():
            readers.setdefault(id(tensor), name)
        layers = [
            LinearLayer(name, name, readers[id(tensor)], name, tuple(reversed(self._layers[name].weight.shape)))
            for name, tensor in self._seen.items()
        ]
        return Recorded(layers, InputRecorder(layers, self._runs[stage], self._seed))


@torch.inference_mode()
def record(model: Gr00tN1d5, cases: Sequence[Case], seed: int, progress: Progress) -> dict[str, Recorded]:
    """Run all cases, one denoising step each, and keep statistics of what goes into each layer: what has to be calibrated comes before the steps."""
    runs, tables = dict.fromkeys(_STAGES, len(cases)), model.head.step_tables(1)
    with LayerInputs(model, runs, seed) as watched, progress.bar("calibrating", len(cases)) as tick:
        for case in cases:
            inputs, noise = _on(model, case)
            tokens = model.encode_vision(inputs.pixel_values)
            watched.flush("vision")
            condition = _condition(model, inputs, tokens)
            watched.flush("language")
            model.head.denoise_step(noise, condition, tables, 0)
            watched.flush("denoise")
            tick()
    return watched.stages


class TorchTrials:
    """A Trier over the torch model. The plain model runs once; a trial begins at the first part that is rounded, with the plain results before it."""

    def __init__(self, model: Gr00tN1d5, cases: Sequence[Case], steps: int, layers: Mapping[str, nn.Module], transform: ActionTransform) -> None:
        """`model` in fp32 is the truth; layers: name -> its 8-bit form."""
        self._model, self._cases, self._layers, self._transform = model, cases, layers, transform
        self._steps = steps
        self._known = [Handed() for _ in cases]
        self._truth = self._actions(model, "vision", self._known)

    def error(self, groups: Iterable[Group]) -> ActionError:
        """Of the actions with the layers of `groups` in 8 bits, in joint units."""
        groups = list(groups)
        layers = {label: self._layers[label] for group in groups for label in group.labels}
        return self.error_of(with_layers(self._model, layers), {group.stage for group in groups})

    def error_of(self, model: Gr00tN1d5, parts: Iterable[str]) -> ActionError:
        """Of the actions of `model`, which differs from the plain one in `parts` only."""
        parts = set(parts)
        begin = next((part for part in PARTS if part in parts), "dit")
        noise = np.concatenate([case.noise.numpy() for case in self._cases])
        return action_error(self._actions(model, begin, [replace(each) for each in self._known]), self._truth, noise, self._transform)

    @torch.inference_mode()
    def _actions(self, model: Gr00tN1d5, begin: str, handed: Sequence[Handed]) -> np.ndarray:
        """(n, H, A). Fills `handed` from `begin` on."""
        changed, found = tuple(PARTS)[tuple(PARTS).index(begin) :], []
        tables = model.head.step_tables(self._steps)
        for case, known in zip(self._cases, handed, strict=True):
            inputs, noise = _on(model, case)
            if "vision" in changed:
                known.tokens = model.encode_vision(inputs.pixel_values)
            if "language" in changed:
                known.features = model.encode_language(inputs, known.tokens)
            if "refine" in changed:
                known.refined = model.head.refine(known.features, inputs.key_mask)
            condition = model.head.condition(known.refined, inputs.state, inputs.key_mask)  # its projections belong to the DiT
            found.append(model.head.denoise(noise, condition, tables).float().cpu().numpy())
        return np.concatenate(found)


@dataclass
class Handed:
    """What the parts of the network hand on, for one observation."""

    tokens: Tensor | None = None
    features: Tensor | None = None
    refined: Tensor | None = None


def calibrate(
    model: Gr00tN1d5,
    cases: Sequence[Case],
    settings: Settings,
    emulated: bool,
    parts: Sequence[str],
    transform: ActionTransform,
    progress: Progress,
) -> tuple[Outcome, Calibration]:
    """Decide how to round each linear layer of `parts`, and which stay in 16 bits; `model` is the plain one, in fp32 for sound trials. emulated:
    8-bit products are written out in the trials."""
    stages = record(model, cases, settings.seed, progress)
    outcome, groups = plan(model, stages, settings, parts, progress)
    plans = {label: scale for part in parts for label, scale in input_scales(outcome.plans[part]).items()}
    if settings.trial_samples:
        few = spread(cases, settings.trial_samples)
        trials = TorchTrials(model, few, settings.denoising_steps, rounded_layers(model, plans, emulated), transform)
        outcome.trial_samples = len(few)
        with progress.bar("sensitivity", sum(group.work >= NEGLIGIBLE for group in groups)) as tick:
            outcome.groups, outcome.error = choose(groups, trials, settings.limit, tick)
    else:
        outcome.groups = [Verdict(group, None, None if group.work >= NEGLIGIBLE else "negligible work") for group in groups]
    chosen = {label for part in parts for label in outcome.chosen(part)}
    scales = {label: scale for label, scale in plans.items() if label in chosen}
    return outcome, Calibration(scales)


def plan(
    model: Gr00tN1d5, stages: Mapping[str, Recorded], settings: Settings, parts: Sequence[str], progress: Progress
) -> tuple[Outcome, list[Group]]:
    """How each layer of `parts` is rounded, by part and name, and the groups they are judged in, with their shares of all multiplications."""
    outcome, work = Outcome(plans={part: {} for part in parts}), {}
    weights = linear_layers(model)
    for stage, recorded in stages.items():
        times = settings.denoising_steps if stage == "denoise" else 1
        statistics = recorded.recorder.statistics
        work |= {layer: times * statistics[layer.input].rows_per_run * layer.shape[0] * layer.shape[1] for layer in recorded.layers}
        with progress.bar(f"scales of {stage}", len(statistics)) as tick:
            for tensor, entry in statistics.items():
                labels = [layer.label for layer in recorded.layers if layer.input == tensor and part_of(layer.label) in parts]
                if stage == "denoise":
                    outcome.plans.setdefault(WEIGHTS_ONLY, {}).update({label: LayerPlan(0.0) for label in labels})
                elif labels:
                    arrays = {label: weights[label].weight.detach().float().cpu().numpy().T for label in labels}
                    made, report = plan_inputs(entry, arrays, settings.scheme, settings.balance)
                    for label in labels:
                        outcome.plans[part_of(label)][label] = made[label]
                        outcome.reports[label] = report
                tick()
    return outcome, _groups(work, parts)


def _groups(work: Mapping[LinearLayer, float], parts: Sequence[str]) -> list[Group]:
    """work: multiplications of each layer in one inference."""
    alike: dict[tuple[str, str], list[LinearLayer]] = {}
    for layer in work:
        alike.setdefault((part_of(layer.label), _kind(layer)), []).append(layer)
    total = sum(work.values())
    return [
        Group(part, kind.removeprefix(PARTS[part]), tuple(layer.label for layer in layers), sum(work[layer] for layer in layers) / total)
        for (part, kind), layers in alike.items()
        if part in parts
    ]


def _kind(layer: LinearLayer) -> str:
    """Gate and up of the decoder are one product in the fused model: both or neither are rounded."""
    return layer.kind.replace("mlp.gate", "mlp.gate_up").replace("mlp.up", "mlp.gate_up") if part_of(layer.label) == "language" else layer.kind


def input_scales(plans: Mapping[str, object]) -> dict[str, InputScale]:
    """One InputScale per LayerPlan: layers that read one tensor keep sharing it."""
    made: dict[int, InputScale] = {}
    for each in plans.values():
        if id(each) not in made:
            made[id(each)] = InputScale(float(each.range), None if each.smoothing is None else torch.from_numpy(each.smoothing))
    return {label: made[id(each)] for label, each in plans.items()}


def digest_of(cases: Iterable[Case]) -> str:
    """SHA-256 of what the network was given: two calibrations with one digest saw the same observations and noise."""
    digest = hashlib.sha256()
    for case in cases:
        for tensor in (case.inputs.pixel_values, case.inputs.input_ids, case.inputs.state, case.noise):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _condition(model: Gr00tN1d5, inputs: ModelInputs, tokens: Tensor) -> Condition:
    refined = model.head.refine(model.encode_language(inputs, tokens), inputs.key_mask)
    return model.head.condition(refined, inputs.state, inputs.key_mask)


def _on(model: Gr00tN1d5, case: Case) -> tuple[ModelInputs, Tensor]:
    """A case on the model's device and in its number format."""
    inputs, place = case.inputs, {"device": model.device, "dtype": model.dtype}
    moved = ModelInputs(
        inputs.pixel_values.to(**place), inputs.input_ids.to(model.device), inputs.image_positions.to(model.device), inputs.state.to(**place)
    )
    return moved, case.noise.to(**place)
