"""A weight that is stored as several tensors: their places and format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparsekit.checkpoint.folder import FACTORS, part_name
from sparsekit.checkpoint.safetensors_file import TensorPlace, metadata, read_tensor
from sparsekit.errors import DataError, FactorsError, UsageError
from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.form import PARTS, SIDES, Form
from sparsekit.weights.packed_codes import SCALE


@dataclass(frozen=True)
class StoredForm:
    """The places of a weight's tensors, and the format of its core."""

    name: str
    """Name of the weight."""
    format: CoreFormat
    places: Mapping[str, TensorPlace]
    """Places of the tensors, by the last part of their names."""

    @property
    def names(self) -> list[str]:
        """The names of the tensors in their file."""
        return [part_name(self.name, part) for part in self.places]

    @property
    def composed(self) -> bool:
        """Whether there are factors around the core."""
        return not self.places.keys().isdisjoint(SIDES)

    @property
    def n_bytes(self) -> int:
        """Size on disk in bytes."""
        return sum(place.stop - place.start for place in self.places.values())

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The tensors, by the last part of their names.

        Raises:
            FactorsError: A required one is missing.
        """
        self.require(f"{folder / FACTORS} lacks")
        return {part: read_tensor(folder, place) for part, place in self.places.items()}

    def form(self, folder: Path, shape: tuple[int, ...]) -> Form:
        """The weight `[out, in]`.

        Raises:
            FactorsError: A part of a packed one is missing, or the parts do not fit together.
            DataError: So are those of an unpacked one.
        """
        parts = self.read(folder)
        try:
            rows, columns = shape
            form = Form.from_stored(parts, self.format, (rows, columns))
            form.check()
        except DataError as error:
            kind = DataError if self.format.pattern is None else FactorsError
            message = f"{folder}: {self.name}: {error.message}"
            raise kind(message, error.hint, code=error.code) from error
        return form

    def require(self, where: str) -> None:
        """Refuse a packed weight without all of its parts.

        Raises:
            FactorsError: Names the first that is missing, after `where`.
        """
        if self.format.pattern is None:
            return
        needed = ("values", "indices", *((SCALE,) if self.format.grid else ()))
        for part in needed:
            if part not in self.places:
                raise FactorsError(
                    f"{where} {part_name(self.name, part)}", code="incomplete-checkpoint"
                )


def packed_forms(folder: Path, tensors: Mapping[str, TensorPlace]) -> dict[str, StoredForm]:
    """The weights in the file of factors, by name.

    Args:
        folder: The checkpoint's folder.
        tensors: The tensors of the file.

    Raises:
        FactorsError: The file names an unknown format.
    """
    forms = {}
    for name, text in metadata(folder / FACTORS).items():
        try:
            stored_as = CoreFormat.parse(text)
        except UsageError as error:
            raise FactorsError(
                f"{folder / FACTORS}: {name}: {error.message}",
                "copy or make it again",
                code=error.code,
            ) from error
        names = {part: part_name(name, part) for part in PARTS}
        places = {part: tensors[full] for part, full in names.items() if full in tensors}
        forms[name] = StoredForm(name, stored_as, places)
    return forms
