"""Parse CUDA_VISIBLE_DEVICES as CUDA does. The one parser of this project, for both packages."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[+-]?[0-9]+")


def visible_devices(text: str | None, count: int | None = None) -> list[str] | None:
    """The devices that a value of CUDA_VISIBLE_DEVICES shows, in order; None if it is not set, and shows all.

    An entry is a number, ``GPU-<uuid>`` or ``MIG-<uuid>``. The first one that is none of these, or a number below 0, ends
    the list; a device named twice makes it empty. Of ``1gpu`` the number counts, as in C's ``strtoul``. Source: the CUDA
    C++ Programming Guide, "CUDA Environment Variables", and `torch.cuda._parse_visible_devices`.

    Args:
        count: GPUs of the machine, where that is known: a number that is not below it ends the list, too.
    """
    if text is None:
        return None
    devices: list[str] = []
    for entry in (part.strip() for part in text.split(",")):
        number = _NUMBER.match(entry)
        if number is not None:
            if int(number[0]) < 0 or (count is not None and int(number[0]) >= count):
                break
            entry = str(int(number[0]))
        elif not entry.startswith(("GPU-", "MIG-")):
            break
        if entry in devices:
            return []
        devices.append(entry)
    return devices
