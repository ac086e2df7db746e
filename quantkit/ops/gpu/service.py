"""Which kernels are out of service in this process, and why.

The fastest kernels are written in Gluon, an experimental part of Triton whose names move from one version to the next. Where
they cannot be imported, or fail to compile, all of them are taken out of service for the rest of the process, that is said once
in the log, and the portable kernels do their work with the same results.
"""

from __future__ import annotations

import logging

log = logging.getLogger("quantkit")

GLUON = ("order", "rows", "hopper")
"""Names of the kernels in Gluon. They stand or fall together, since one Triton brings the Gluon of all of them."""

OTHER_GLUON = (
    "this Triton's Gluon is another than quantkit knows (%s): the portable kernels run instead, up to 1.3 times slower"
)


class Service:
    """The kernels that were taken out of service, with the reason of each."""

    def __init__(self) -> None:
        self._out: dict[str, str] = {}

    def runs(self, kernel: str) -> bool:
        """Whether the kernel of this name is in service."""
        return kernel not in self._out

    def take_gluon_out(self, reason: str) -> None:
        """Use no kernel in Gluon from now on. The first time, ``reason`` goes into the log."""
        if not self._out:
            log.warning(OTHER_GLUON, reason)
            self._out.update(dict.fromkeys(GLUON, reason))

    def out(self) -> dict[str, str]:
        """Name of each kernel that is out of service -> the reason."""
        return dict(self._out)


service = Service()
"""The one of this process."""


def out_of_service() -> dict[str, str]:
    """Name of each kernel that was taken out of service in this process -> the reason; empty where all of them run."""
    return service.out()
