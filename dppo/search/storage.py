"""Where a study is kept: a file or a database by one URL, whose password is never shown."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dppo.errors import UserError

if TYPE_CHECKING:
    import optuna


def file_in(directory: str) -> str:
    """The URL of the file that serves where none is given."""
    return f"sqlite:///{directory}/study.db"


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """The storage of a URL. Raises UserError for one that can't be meant, and what the storage itself raises."""
    import optuna
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    scheme, separator, rest = url.partition("://")
    if not separator:
        raise UserError(f"hydra.sweeper.storage={url}: must be sqlite:///path, journal:///path or a database URL")
    if scheme == "journal":
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(rest.removeprefix("/")))
    if scheme == "grpc":
        host, _, port = rest.rstrip("/").rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"hydra.sweeper.storage={url}: must be grpc://host:port")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental, and chosen knowingly
            return optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    known = ("sqlite", "postgresql", "mysql")
    if scheme.partition("+")[0] not in known:
        near = difflib.get_close_matches(scheme, [*known, "journal", "grpc"], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"hydra.sweeper.storage={shown(url)}: must begin with sqlite:/// or journal:///.{hint}")
    if scheme.startswith("sqlite"):
        # Several workers write: each waits for its turn.
        return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    try:
        if rest.partition("?")[0].count("@") > 1:
            raise ValueError  # a part of the password would be taken for the host, and shown
        read = make_url(f"postgresql+psycopg://{rest}" if scheme == "postgresql" else url)
    except (ArgumentError, ValueError):  # whose message may hold a part of the password
        raise UserError(
            f"hydra.sweeper.storage={shown(url)}: must be {scheme}://user:password@host:port/database, with special "
            "characters of the password as %XX"
        ) from None
    # A connection that a server dropped during a long trial is opened again.
    return optuna.storages.RDBStorage(read.render_as_string(hide_password=False), engine_kwargs={"pool_pre_ping": True})


def shown(url: str) -> str:
    """A storage's URL without a password."""
    scheme, separator, rest = url.partition("://")
    if scheme.startswith(("sqlite", "journal")):
        return url
    account, at, place = rest.rpartition("@")  # the last one: a password may hold others
    user, _, password = account.partition(":")
    place = re.sub(r"(?i)(\bpass\w*=)[^&]+", r"\1...", place)
    return f"{scheme}{separator}{user if password else account}{at}{place}"


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Tell in one line what a storage has against being used."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        cause: BaseException = error
        while (deeper := getattr(cause, "orig", None) or cause.__cause__) is not None:
            cause = deeper
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        advice = (
            "another process is writing to it; end it, or try again"
            if "locked" in reason
            else "give another hydra.sweeper.storage, or mend or remove that one"
        )
        raise UserError(f"hydra.sweeper.storage={shown(url)}: {reason}; {advice}") from None
    except ImportError as error:
        raise UserError(
            f"hydra.sweeper.storage={shown(url)}: {str(error).splitlines()[0]} Type pip install 'dppo[storage]'"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"hydra.sweeper.storage={shown(url)}: {str(error).splitlines()[0]}") from None
    except Exception as error:
        if not (url.startswith("grpc://") and hasattr(error, "details")):
            raise
        raise UserError(f"hydra.sweeper.storage={shown(url)}: {error.details()}; is the server running?") from None
