"""Parse CUDA_VISIBLE_DEVICES as CUDA does."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[+-]?[0-9]+")


def visible_devices(text: str | None, count: int | None = None) -> list[str] | None:
    """Return the devices that a value of CUDA_VISIBLE_DEVICES selects, in order; None if it is not set.

    Unset, the variable selects all devices.

    An entry is a number, ``GPU-<uuid>`` or ``MIG-<uuid>``. Any other entry, or a negative number,
    ends the list; a device named twice makes it empty. ``1gpu`` is read as 1, as by C's ``strtoul``. Source: the CUDA
    C++ Programming Guide, "CUDA Environment Variables", and `torch.cuda._parse_visible_devices`.

    Args:
        count: GPUs of the machine, if known; a number of `count` or more ends the list as well.
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
