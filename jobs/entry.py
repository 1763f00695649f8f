"""What the jobs share: arguments, one clear error, exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from invar_ray.cli.errors import explained
from invar_ray.config import load_config
from invar_ray.console import quieten_libraries
from invar_ray.pipeline import Pipeline


def run_job(doc: str, body: Callable[..., None], options: Mapping[str, str] | None = None) -> None:
    """Parse ``--config RECIPE key=value ..``, run ``body``; a user's mistake prints one error and
    exits 1.

    Args:
        doc: the job's docstring, shown by ``--help``.
        body: gets the pipeline of the config, and the options where there are any.
        options: ``key=value`` arguments that are the job's own and no fields of the config, with
            their defaults.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="name of a recipe, or path of a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="fields to change, e.g. scale.num_workers=4",
    )
    arguments = parser.parse_args()
    quieten_libraries()
    with explained():
        own = dict(options or {})
        given = [text.partition("=") for text in arguments.overrides]
        own |= {key: value for key, separator, value in given if separator and key in own}
        overrides = [text for text in arguments.overrides if text.partition("=")[0] not in own]
        config = load_config(arguments.config, overrides)
        warn_of_a_store_in_the_upload(config.storage.root_uri, Path.cwd())
        with Pipeline(config) as pipeline:
            body(pipeline, own) if options else body(pipeline)


def warn_of_a_store_in_the_upload(root_uri: str, folder: Path) -> None:
    """Ray unpacks ``ray job submit --working-dir`` into a folder of its own, on each node, that it
    clears at will.
    """
    unpacked = any(part.startswith("_ray_pkg_") for part in folder.parts)
    if unpacked and "://" not in root_uri and not Path(root_uri).is_absolute():
        print(
            f"note: storage.root_uri={root_uri} is relative: it lies in the job's copy of the "
            "working directory"
            f" ({folder}), on this node only, and goes when Ray clears it. To keep it, name an "
            "absolute path or a URI"
            " that every node can reach",
            file=sys.stderr,
        )
