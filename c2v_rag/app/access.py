"""Access to the page: reads logins from a file and refuses a public address without logins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from c2v_rag.hosts import is_loopback

Logins = Sequence[tuple[str, str]]  # user and password


def read_logins(path: Path) -> list[tuple[str, str]]:
    """The logins in a file: USER:PASSWORD on each line, empty lines and lines that start with # are skipped.

    Raises ValueError if there is no login, and for a line without a user or a password.
    """
    logins = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        user, _, password = line.strip().partition(":")
        if not user or not password:
            raise ValueError(
                f"{path}:{number}: expected USER:PASSWORD."
            )  # the line is not shown: it may hold a password
        logins.append((user, password))
    if not logins:
        raise ValueError(f"{path} holds no login. Write USER:PASSWORD, one a line.")
    return logins


def is_only_local(host: str, allowed_hosts: Sequence[str] = ()) -> bool:
    """Whether only this machine can reach a page bound to `host`. A name in `allowed_hosts` means a proxy."""
    return is_loopback(host) and not allowed_hosts


def check_access(host: str, allowed_hosts: Sequence[str], logins: Logins) -> None:
    """Raise ValueError if other machines reach the page without a login: visitors can add documents to the store."""
    if not is_only_local(host, allowed_hosts) and not logins:
        raise ValueError(
            f"Others than this computer could open the page at {', '.join([host, *allowed_hosts])} and write to the "
            "store. Give --auth-file with USER:PASSWORD, one a line (from Python: launch(auth=[(user, password)]))."
        )
