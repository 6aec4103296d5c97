"""Access to shared storage that outlives a node: a shared folder, or an object store."""

import os
import uuid
from pathlib import Path

import pyarrow.fs

from batchcam.errors import ConfigError, first_line


def open_storage(place: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the file system of a path or URI such as `s3://bucket/study`, and the path within it.

    Reads the keys of an object store from the environment once, here: code that runs later may
    have another environment.

    Raises:
        OSError: the storage cannot be reached.
        ValueError: `place` is no valid address.
    """
    if "://" not in place:
        return pyarrow.fs.LocalFileSystem(), str(Path(place).resolve())
    fs, path = pyarrow.fs.FileSystem.from_uri(place)
    if isinstance(fs, pyarrow.fs.S3FileSystem) and "AWS_ACCESS_KEY_ID" in os.environ:
        scheme, _, server = os.environ.get("AWS_ENDPOINT_URL", "https://").partition("://")
        fs = pyarrow.fs.S3FileSystem(
            scheme=scheme,
            endpoint_override=server.rstrip("/") or None,
            access_key=os.environ["AWS_ACCESS_KEY_ID"],
            secret_key=os.environ.get("AWS_SECRET_ACCESS_KEY", ""),
            session_token=os.environ.get("AWS_SESSION_TOKEN"),
            region=fs.region,
        )
    return fs, path


def check_storage(place: str) -> None:
    """Check that storage can be written to, by writing and deleting a file.

    Raises:
        ConfigError: it cannot be written to; the message names what to check.
    """
    name = f".{uuid.uuid4().hex}"
    try:
        fs, root = open_storage(place)
        fs.create_dir(root)
        with fs.open_output_stream(f"{root}/{name}") as file:
            file.write(b"a test whether this storage can be written to")
        fs.delete_file(f"{root}/{name}")
    except (OSError, ValueError) as error:
        raise cannot_keep(place, error) from error


def is_file(place: str) -> bool:
    """Return whether there is a file at a path or URI.

    Raises:
        ConfigError: the storage cannot be read.
    """
    try:
        fs, path = open_storage(place)
        return bool(fs.get_file_info(path).is_file)
    except (OSError, ValueError) as error:
        raise cannot_keep(place, error) from error


def copy_file(source: str, target: str) -> None:
    """Copy a file between two paths or URIs, creating the folder of the target.

    Raises:
        OSError: the source cannot be read, or the target cannot be written.
    """
    (source_fs, source_path), (target_fs, target_path) = map(open_storage, (source, target))
    target_fs.create_dir(target_path.rpartition("/")[0])
    pyarrow.fs.copy_files(source_path, target_path, source_fs, target_fs, use_threads=False)


def cannot_keep(place: str, error: Exception) -> ConfigError:
    """Return the error for storage that cannot be used."""
    reason = first_line(error)
    return ConfigError(
        f"a study cannot be stored in {place}: {reason}. Check --storage and, for an object store, "
        "AWS_ENDPOINT_URL and the keys in the environment; its bucket must exist."
    )
