"""Whether a model fits where `device_map` puts it: each device's share, or the sum over all that there are."""

from collections.abc import Iterable, Mapping
from typing import Any

from caa_lens.models.loading.device_memory import devices, free_memory, make_room

DISK = "disk"


def named_devices(device_map: str | Mapping[str, Any]) -> list[str]:
    """The devices that a map of modules names, each once and in order, the disk left out; none of "auto"."""
    values = device_map.values() if isinstance(device_map, Mapping) else ()
    return [name for name in dict.fromkeys(map(device_name, values)) if name != DISK]


def device_name(device: Any) -> str:
    """A device of a map as torch writes it; accelerate takes a number for that of a card."""
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def reachable(device_map: str | Mapping[str, Any], *, packed: bool) -> list[str]:
    """Devices that weights can go to; packed weights have to lie where they are computed with."""
    if isinstance(device_map, Mapping):
        return named_devices(device_map)
    found = devices()
    cards = [f"cuda:{index}" for index in range(found["cuda"])] or ["mps"] * found["mps"]
    return cards if cards and packed else [*cards, "cpu"]


def shares(sizes: Mapping[str, int], device_map: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on each device of a map, by the longest name in it that a parameter's begins with; the disk left out."""
    found: dict[str, int] = {}
    for parameter, n_bytes in sizes.items():
        names = [name for name in device_map if name == "" or f"{parameter}.".startswith(f"{name}.")]
        if names and (device := device_name(device_map[max(names, key=len)])) != DISK:
            found[device] = found.get(device, 0) + n_bytes
    return found


def too_large(
    sizes: Mapping[str, int], device_map: str | Mapping[str, Any], *, packed: bool, headroom: float
) -> str | None:
    """Why the weights do not fit, in words; None where they do, or only transformers can tell.

    Args:
        sizes: bytes of every parameter by its name; of one whole model by the name "" where no more is known.
        headroom: what has to be free for each byte of weights.
    """
    if isinstance(device_map, Mapping) and "" not in sizes:
        for device, n_bytes in shares(sizes, device_map).items():
            needed = headroom * n_bytes
            if needed > (free := _free([device], needed)):
                return (
                    f"the device_map puts {_gb(needed)} of it on {device}, which has {_gb(free)} free: move some of "
                    "its modules to another device"
                )
        return None
    if isinstance(device_map, Mapping) and DISK in map(device_name, device_map.values()):
        return None
    places, needed = reachable(device_map, packed=packed), headroom * sum(sizes.values())
    if needed <= (free := _free(places, needed)):
        return None
    elsewhere = "" if packed else ", or leave modules on the disk with a device_map of your own ({'...': 'disk'})"
    return f"{' and '.join(places)} have {_gb(free)} free: choose a smaller model{elsewhere}"


def _free(places: Iterable[str], needed: float) -> float:
    places = list(places)
    for device in places:
        make_room(device, needed / len(places))
    return float(sum(map(free_memory, places)))


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
