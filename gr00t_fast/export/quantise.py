"""An 8-bit version of an ONNX export: what is small is checked, layers are calibrated in torch on the CPU, then the files are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gr00t_fast.base.errors import ConfigError, require
from gr00t_fast.base.files import check_free, whole_directory
from gr00t_fast.base.measurement import command_line
from gr00t_fast.engine.exported import ExportTables
from gr00t_fast.engine.manifest import Target, check_manifest, check_picture, remedy_for
from gr00t_fast.export import QuantiseOptions
from gr00t_fast.export.calibrate import GraphNetwork, calibrate
from gr00t_fast.export.qdq import InputScale, write_quantised_export
from gr00t_fast.export.report import quantisation_table, written
from gr00t_fast.export.verify import collect_cases


def quantise(options: QuantiseOptions) -> dict[str, Any]:
    """Check everything small, calibrate, write. Returns what quantisation.json says. Raises Gr00tFastError."""
    require("onnx", "export")
    if options.target != "tensorrt":  # its files are ONNX
        require(options.target, "openvino" if options.target == "openvino" else "export")
    check_free(options.out, options.overwrite)
    checkpoint, target = options.opened()
    remedy = remedy_for(options.onnx, target, "to_onnx.py")
    manifest = check_manifest(options.onnx, "onnx", target, remedy)
    if manifest.quantisation is not None:
        raise ConfigError(f"--onnx={options.onnx} is in {manifest.quantisation.get('format')} already. Give the export it was made from.")
    if options.target != "tensorrt" and manifest.precision != "fp32":
        raise ConfigError(f"--onnx={options.onnx} is {manifest.precision}; {options.target} takes fp32 (gr00t-fast export onnx --precision=fp32).")
    steps = options.denoising_steps or checkpoint.config.head.denoising_steps
    scales, found, data = (None, {}, {}) if options.observations is None else _calibrated_graphs(options, target, steps, manifest.shapes, remedy)
    quantisation = {"format": options.format, "runtime": options.target, "calibration": data}
    report = quantisation | found
    with whole_directory(options.out, options.overwrite) as directory:
        written(directory, "quantisation", report, quantisation_table(report))
        write_quantised_export(options.onnx, manifest, directory, scales, quantisation, command_line(), options.made_with())
    return report


def _calibrated_graphs(
    options: QuantiseOptions, target: Target, steps: int, shapes: Mapping[str, Any], remedy: str
) -> tuple[dict[str, InputScale], dict[str, Any], dict[str, Any]]:
    """Scales, how they were found, and what of."""
    tables = ExportTables(options.onnx, remedy)
    tables.steps(steps)  # a count that was not exported is refused before minutes pass
    cases, data = collect_cases(target, options, options.seed, camera_size=shapes.get("camera_size"))
    for case in cases:
        check_picture(shapes, case.inputs.pixel_values.shape[-2:], None, remedy)
    return *calibrate(GraphNetwork(target, shapes, tables, steps, options.format), cases, options), data
