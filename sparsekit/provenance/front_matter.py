"""The front matter of a model card: the origin of a checkpoint, in YAML that the hub reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.resolve import DEMO, display_name, hub_id

OWN_TAG = "sparsekit"
LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model that a checkpoint is made from."""

    title: str
    base_model: str | list[str] | None = None
    """Its id on the hub, or that of the model which sparsekit made it from."""
    license: Mapping[str, str | list[str]] = field(default_factory=dict)
    """The license in its own card, by the hub's keys; that of `demo`, which has no card, is in its
    file."""

    @classmethod
    def of(cls, model: str, folder: Path) -> "Origin":
        """The origin of a model by its name and the card in its folder."""
        card = read_front_matter(folder / "README.md")
        known = {key: value for key, value in card.items() if _is_words(value)}
        base = hub_id(model)
        if base is None and OWN_TAG in known.get("tags", ()):
            base = known.get("base_model")
        named = {key: known[key] for key in LICENSE if key in known}
        if model == DEMO:
            from sparsekit.checkpoint.demo_model import SMOLLM2

            named = {"license": SMOLLM2.license}
        return cls(title=display_name(model), base_model=base, license=named)


def front_matter(origin: Origin, tags: Sequence[str], library: str | None) -> str:
    """The YAML block that a card begins with.

    Args:
        origin: The model that the checkpoint is made from.
        tags: The hub's tags.
        library: Which library loads it as it is; None: the tag alone says what does.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        tags=[OWN_TAG, *tags],
        library_name=library,
        base_model=origin.base_model,
        **origin.license,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML block of a card; empty if there is none, or it cannot be read."""
    from huggingface_hub import RepoCard
    from yaml import YAMLError

    try:
        return RepoCard(card.read_text(encoding="utf-8-sig", errors="replace")).data.to_dict()
    except (OSError, ValueError, TypeError, YAMLError):  # of authors who write other things there
        return {}


def _is_words(value: Any) -> bool:
    """Whether a value is a text or a list of texts, as the hub's keys that are read here are."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)
