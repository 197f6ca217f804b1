"""What the speed of the machine is does not matter here: it is looked at only in passing."""

from __future__ import annotations

import pytest

from lumos import device_peak


@pytest.fixture(autouse=True)
def quick_look_at_the_machine(monkeypatch):
    monkeypatch.setattr(device_peak, "PROBE", {"seconds": 0.0, "products": 1})
