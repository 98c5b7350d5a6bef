"""A reward server's credentials, from netrc file or environment: sent, and never written anywhere."""

from __future__ import annotations

import base64
import netrc
import os
from pathlib import Path


def authorization(host: str) -> str | None:
    """The Authorization header for `host` by the file of $NETRC, or ~/.netrc; None where it does not name it.

    `machine HOST login NAME password SECRET` is sent as Basic; a login of "bearer" sends the password as a
    bearer token. The file's default entry is for nobody in particular, and so is not sent.

    Raises:
        ValueError: for a file that is no netrc file; what it holds is not shown.
    """
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    if not path.is_file():
        if "NETRC" in os.environ:
            raise ValueError(f"NETRC={path} is no file; write the credentials there, or unset it")
        return None
    try:
        found = netrc.netrc(path).hosts.get(host)
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if isinstance(error, netrc.NetrcParseError) else ""
        raise ValueError(
            f"{path}{line} cannot be read; write 'machine HOST login NAME password SECRET'"
        ) from None
    if found is None:
        return None
    login, _, password = found
    if login.lower() == "bearer":
        return f"Bearer {password}"
    return "Basic " + base64.b64encode(f"{login}:{password}".encode()).decode("ascii")


def api_key(variable: str) -> str:
    """The key in an environment variable.

    Raises:
        ValueError: when it is not set.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"the environment has no {variable}; export {variable}=... with the server's key")
    return key
