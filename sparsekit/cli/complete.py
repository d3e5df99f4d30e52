"""Shell completion of options with known or common values."""

from collections.abc import Callable

from sparsekit import registry as methods
from sparsekit.pipeline.options import DEVICES

Words = Callable[[], list[tuple[str, str]]]


def words(*known: str) -> Words:
    """Completion of given words."""
    return lambda: [(word, "") for word in known]


def names(*kinds: str, before: tuple[str, ...] = ()) -> Words:
    """Completion of methods of some kinds, with summaries; `before` comes first."""

    def found() -> list[tuple[str, str]]:
        known = [methods.describe(kind, name) for kind in kinds for name in methods.names(kind)]
        return [*((word, "") for word in before), *((m.name, m.summary) for m in known)]

    return found


def presets() -> list[tuple[str, str]]:
    """Completion of the presets of refiners."""
    refiners = [methods.describe("refiners", name) for name in methods.names("refiners")]
    presets: dict[str, list[str]] = {}
    for method in refiners:
        for preset in method.presets:
            presets.setdefault(preset, []).append(method.name)
    return [(preset, f"of {', '.join(owners)}") for preset, owners in presets.items()]


def recipes() -> list[tuple[str, str]]:
    """Completion of shipped recipes, with summaries."""
    from sparsekit.study.recipe import shipped, summary

    return [(name, summary(file)) for name, file in shipped().items()]


def grids() -> list[tuple[str, str]]:
    """Completion of grids."""
    from sparsekit.weights.grids import GRIDS

    return words(*GRIDS, "int4-g64", "int4-g32", "int4")()


def sources() -> list[tuple[str, str]]:
    """Completion of sources of calibration."""
    from sparsekit.text.sources import SOURCES

    return words(*SOURCES)()


def windows() -> list[tuple[str, str]]:
    """Completion of texts for perplexity."""
    from sparsekit.text.sources import EVALUATION_FILES

    return words("builtin", *EVALUATION_FILES)()


patterns = words("2:4", "4:8", "1:4", "2:8", "8:16", "50%", "60%", "70%", "50%/tensor")
devices = words(*DEVICES)
