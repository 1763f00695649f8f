"""``invar-ray index-versions``: which index is served, what was before, going back, and what may be
removed.
"""

from __future__ import annotations

from typing import Annotated

import typer

from invar_ray.cli.errors import explain_errors
from invar_ray.errors import MissingArtifactError

versions_app = typer.Typer(
    help="Published versions of an index: publish, list, rollback, mend, gc.", no_args_is_help=True
)

Root = Annotated[
    str, typer.Option("--root", help="Storage root, e.g. runs/demo or s3://bucket/invar.")
]
Name = Annotated[str, typer.Option("--name", help="Which index, where a store serves several.")]
Expected = Annotated[
    int | None,
    typer.Option(
        help="Refuse unless this is the current version (0: none yet): what a job saw when it "
        "began."
    ),
]
Note = Annotated[str, typer.Option(help="For people.")]


@versions_app.command()
@explain_errors
def publish(
    indexes: Annotated[
        list[str], typer.Argument(help="URI of the index artifact, or of each shard.")
    ],
    name: Name = "main",
    expected: Expected = None,
    note: Note = "",
    keep: Annotated[
        int | None, typer.Option(min=1, help="Then give up all but so many versions.")
    ] = None,
) -> None:
    """Make an index current, at once for all its shards; of two publishers at once, one is
    refused.
    """
    from invar_ray.store.artifacts import open_artifact
    from invar_ray.store.garbage import collect
    from invar_ray.store.published import Published

    artifacts = [open_artifact(uri, "index") for uri in indexes]
    published = Published(artifacts[0].store, name)
    version = published.publish(artifacts, expected=expected, note=note)
    print(f"version {version.number}: {', '.join(version.index)}")
    print(f"serve it with index_uri: {published.uri}")
    if keep is not None:
        gone = collect(published, keep)
        print(f"gave up {len(gone.versions)} versions, removed {len(gone.removed)} artifacts")


@versions_app.command("list")
@explain_errors
def show(root: Root, name: Name = "main") -> None:
    """All versions, the newest last; * is current, - cannot be gone back to any more."""
    from invar_ray.store.artifacts import Store
    from invar_ray.store.published import Published

    store = Store(root)
    published = Published(store, name)
    newest = published.current()
    if newest is None and not store.exists():
        raise MissingArtifactError(
            f"there is no store at {root}", action="check the path, or run invar-ray index first"
        )
    if newest is None:
        print(f"nothing has been published at {published.uri}")
        return
    for version in published.history():
        mark = (
            "*"
            if version.number == newest.number
            else "-"
            if version.source in newest.collected
            else " "
        )
        did = (
            version.action
            if version.source == version.number
            else f"{version.action} -> {version.source}"
        )
        rows = version.info.get("rows")
        shown = f"{rows:,} rows" if isinstance(rows, int) else ""
        print(
            f"{mark} {version.number:>4}  {version.created}  {did:<16} {shown:>16}  "
            f"{', '.join(version.index)}"
            f"{'  ' + version.note if version.note else ''}"
        )


@versions_app.command()
@explain_errors
def mend(root: Root, name: Name = "main") -> None:
    """Pass over a damaged record of the newest version: the newest that can be read is current
    again.
    """
    from invar_ray.store.artifacts import Store
    from invar_ray.store.published import Published

    version = Published(Store(root), name).mend()
    if version is None:
        print("nothing is damaged")
    else:
        print(f"{version.note}; {version.number} is version {version.source} again")


@versions_app.command()
@explain_errors
def rollback(
    root: Root,
    name: Name = "main",
    to: Annotated[
        int | None, typer.Option(help="Version to serve again; without it the one before.")
    ] = None,
    expected: Expected = None,
    note: Note = "",
) -> None:
    """Serve an earlier version again, as a new version."""
    from invar_ray.store.artifacts import Store
    from invar_ray.store.published import Published

    version = Published(Store(root), name).rollback(to, expected=expected, note=note)
    print(f"version {version.number} is version {version.source} again: {', '.join(version.index)}")


@versions_app.command()
@explain_errors
def gc(
    root: Root,
    name: Name = "main",
    keep: Annotated[
        int, typer.Option(min=1, help="Versions that stay, the current one counted.")
    ] = 3,
    parents: Annotated[
        bool, typer.Option("--parents", help="Vectors and passages too, where nothing needs them.")
    ] = False,
    min_age_hours: Annotated[
        float, typer.Option(min=0, help="What was current within so many hours stays.")
    ] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Give up old versions and remove artifacts that only those name."""
    from invar_ray.store.artifacts import Store
    from invar_ray.store.garbage import collect
    from invar_ray.store.published import Published

    published = Published(Store(root), name)
    gone = collect(
        published, keep, parents=parents, min_age_s=3600 * min_age_hours, dry_run=dry_run
    )
    verb = "would be removed" if dry_run else "removed"
    print(f"versions given up: {', '.join(map(str, gone.versions)) or 'none'}")
    for ref in gone.removed:
        print(f"{verb}: {ref}")
