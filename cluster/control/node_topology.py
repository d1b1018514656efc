"""Where a host stands (region, zone, block, rack), as the labels of its Ray node say it. Pure."""

import re
from collections.abc import Mapping

from engine.errors import InvalidOption

_LEVEL_LABEL = re.compile(r"remuda\.io/topology-(\d)")
_CLOUD_LABELS = ("ray.io/availability-region", "ray.io/availability-zone")
_LEVEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_MAX_LEVELS = 9


def parse_topology(text: str) -> tuple[str, ...]:
    """``zone-a/rack-3``, from the widest to the narrowest; what is empty is left out. Raises InvalidOption."""
    levels = tuple(filter(None, text.split("/")))
    if len(levels) > _MAX_LEVELS or not all(map(_LEVEL.fullmatch, levels)):
        raise InvalidOption(
            f"--topology {text}: write at most {_MAX_LEVELS} names as zone-a/rack-3, of letters, digits, -, _ and ."
        )
    return levels


def topology_labels(levels: tuple[str, ...]) -> dict[str, str]:
    """Labels of a Ray node; one for each level, as a label's value has no slashes."""
    return {f"remuda.io/topology-{number}": level for number, level in enumerate(levels, 1)}


def topology(labels: Mapping[str, str]) -> tuple[str, ...]:
    """The levels from the widest on: Remuda's own labels, or else the region and zone that Ray knows of clouds."""
    own = sorted((int(match[1]), value) for name, value in labels.items() if (match := _LEVEL_LABEL.fullmatch(name)))
    if own:
        return tuple(value for _, value in own)
    return tuple(labels[name] for name in _CLOUD_LABELS if labels.get(name))
