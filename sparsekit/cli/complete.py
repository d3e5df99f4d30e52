"""The words that a shell offers for an option, where there are only so many or some are usual."""

from collections.abc import Callable

from sparsekit import registry as methods
from sparsekit.pipeline.options import DEVICES
from sparsekit.study.recipe import shipped, summary
from sparsekit.text.sources import EVALUATION_FILES, SOURCES
from sparsekit.weights.grids import GRIDS

Words = Callable[[], list[tuple[str, str]]]


def words(*known: str) -> Words:
    """Offers these words."""
    return lambda: [(word, "") for word in known]


def names(*kinds: str, before: tuple[str, ...] = ()) -> Words:
    """Offers the methods of some kinds, with what they do; `before` comes first."""

    def found() -> list[tuple[str, str]]:
        told = [methods.describe(kind, name) for kind in kinds for name in methods.names(kind)]
        return [*((word, "") for word in before), *((m.name, m.summary) for m in told)]

    return found


def presets() -> list[tuple[str, str]]:
    """Offers the named sets of options that refiners have."""
    told = [methods.describe("refiners", name) for name in methods.names("refiners")]
    found: dict[str, list[str]] = {}
    for method in told:
        for preset in method.presets:
            found.setdefault(preset, []).append(method.name)
    return [(preset, f"of {', '.join(having)}") for preset, having in found.items()]


def recipes() -> list[tuple[str, str]]:
    """Offers the recipes that come with sparsekit, with what they do."""
    return [(name, summary(file)) for name, file in shipped().items()]


patterns = words("2:4", "4:8", "1:4", "2:8", "8:16", "50%", "60%", "70%", "50%/tensor")
grids = words(*GRIDS, "int4-g64", "int4-g32", "int4")
sources = words(*SOURCES)
windows = words("builtin", *EVALUATION_FILES)
devices = words(*DEVICES)
