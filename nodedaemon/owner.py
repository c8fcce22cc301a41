"""Whose a slice or a container is."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self

import grpc

from puhui.rpc.errors import Refusal
from puhui.v1.card_pb2 import AttemptRef

__all__ = ["Owner"]

# Names become directory names and labels.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, order=True)
class Owner:
    """One attempt of one job of one centre, without the right to command it."""

    centre: str
    job_id: str
    attempt: int

    @classmethod
    def of(cls, ref: AttemptRef, name: str = "owner") -> Self:
        """Reads an owner from the wire.

        Args:
            ref: the owner.
            name: of the field that it came in.

        Raises:
            Refusal: INVALID_ARGUMENT with OWNER_INVALID.
        """
        for part, value in (("centre", ref.centre), ("job_id", ref.job_id)):
            if not _NAME.fullmatch(value):
                raise Refusal(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "OWNER_INVALID",
                    f"{name}.{part} {value!r} must be 1 to 63 letters, digits, '.', '_' or '-', not a sign first",
                    field=f"{name}.{part}",
                )
        if ref.attempt < 1:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "OWNER_INVALID",
                f"{name}.attempt counts from 1",
                field=f"{name}.attempt",
            )
        if ref.fencing_token >= 2**63:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "OWNER_INVALID",
                f"{name}.fencing_token must be less than 2^63",
                field=f"{name}.fencing_token",
            )
        return cls(ref.centre, ref.job_id, ref.attempt)

    def of_attempt(self, attempt: int) -> Self:
        """Returns another attempt of the same job."""
        return replace(self, attempt=attempt)

    def ref(self, fencing_token: int = 0) -> AttemptRef:
        """Returns the owner for the wire."""
        return AttemptRef(centre=self.centre, job_id=self.job_id, attempt=self.attempt, fencing_token=fencing_token)

    def __str__(self) -> str:
        return f"{self.centre}/{self.job_id}/{self.attempt}"
