"""What a quantize run will do: every check and every choice that needs no weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsekit import methods
from sparsekit.errors import DataError, UsageError
from sparsekit.models.architecture import Target
from sparsekit.models.blocks import BlockStream
from sparsekit.models.calibration import Calibration
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.layout import Layout
from sparsekit.models.quantized import stored_shapes
from sparsekit.progress import SILENT, Progress
from sparsekit.quantizers import Quantizer
from sparsekit.stages.device import compute_dtype, pick_device
from sparsekit.stages.job import select
from sparsekit.stages.opening import open_source, require_room
from sparsekit.stages.quantconfig import QuantizeConfig
from sparsekit.tensors.grids import Grid

# Layers that servers compute as one: they must be on the same grid.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """A checked configuration with everything that the loop needs."""

    config: QuantizeConfig
    quantizer: Quantizer
    grid: Grid
    source: Checkpoint
    stream: BlockStream
    targets: list[Target]
    skipped: list[dict[str, str]]
    layout: Layout
    calibration: Calibration | None

    @property
    def coded(self) -> bool:
        """Whether codes are stored, or the numbers that they stand for."""
        return self.config.format != "dense"


def prepare(
    config: QuantizeConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> QuantizeJob:
    """Check a configuration against a model and an output folder.

    Raises:
        UsageError: The configuration does not fit the model, or `out` is in use.
        DataError: The model cannot be read, is quantized, or keeps factors.
        StorageError: The disk has no room for the output.
    """
    config.check()
    source = open_source(model, out, overwrite=overwrite, progress=progress)
    _refuse_other_forms(source)
    device = pick_device(config.device)
    stream = BlockStream(source, device=device, dtype=compute_dtype(config.dtype, device, source))
    targets, skipped = select(stream, config.skip)
    grid = Grid.parse(config.grid)
    _refuse_misfits(config, grid, targets, skipped)
    layout = Layout.of(source)
    if config.format != "dense":
        layout = Layout.with_codes(
            source,
            {t.name: stored_shapes(grid, t.shape, source.places[t.name].dtype) for t in targets},
        )
    require_room(out, layout)
    calibration = config.rows
    if calibration is not None:
        calibration.require(source)
    return QuantizeJob(
        config=config,
        quantizer=methods.load("quantizers", config.method, config.options),
        grid=grid,
        source=source,
        stream=stream,
        targets=targets,
        skipped=skipped,
        layout=layout,
        calibration=calibration,
    )


def _refuse_other_forms(source: Checkpoint) -> None:
    """Refuse what is quantized already, and weights that are products of factors.

    Raises:
        DataError: It is one of these.
    """
    if source.grid is not None:
        raise DataError(
            f"{source.path} is quantized to {source.grid} already",
            "quantize the model that it comes from",
        )
    if source.factors:
        raise DataError(
            f"{source.path} keeps weights as factors, whose product is not sparse; quantize takes "
            "plain checkpoints only",
            "prune without armor and --compensate",
        )


def _refuse_misfits(
    config: QuantizeConfig,
    grid: Grid,
    targets: Sequence[Target],
    skipped: Sequence[Mapping[str, str]],
) -> None:
    """Refuse a grid that does not fit the weights, or what no server would load.

    Raises:
        UsageError: Names the first such weight, and the ways out.
    """
    odd = next((target for target in targets if grid.misfit(target.shape[1])), None)
    if odd is not None:
        common = math.gcd(*(target.shape[1] for target in targets))
        fitting = next((g for g in (128, 64, 32, 16) if common % g == 0), None)
        hint = f"--grid int{grid.bits}"
        if fitting:
            hint = f"--grid int{grid.bits}-g{fitting} fits, and so does {hint}"
        raise UsageError(f"{odd.name}: {grid.misfit(odd.shape[1])}", hint)
    if config.format == "dense":
        return
    transposed = next((target for target in targets if target.transposed), None)
    if transposed is not None:
        raise UsageError(
            f"{transposed.name} is no nn.Linear, which is all that compressed-tensors knows",
            "--format dense writes the rounded numbers themselves",
        )
    left = {row["name"] for row in skipped}
    for name in (target.name for target in targets):
        path, _, last = name.removesuffix(".weight").rpartition(".")
        for group in FUSED:
            others = [f"{path}.{other}.weight" for other in group if last in group]
            if apart := next((other for other in others if other in left), None):
                raise UsageError(
                    f"{apart} is skipped and {name} is not: servers compute both as one layer",
                    f"skip all of {', '.join(group)}, or write --format dense",
                )
