"""``cbpq models``: the networks known by name."""

from typing import Annotated

import typer

from cbpq.cli import common
from cbpq.errors import UsageError, did_you_mean


def command(
    glob: Annotated[str, typer.Argument(metavar="GLOB", help="Only names that match, such as 'resnet*'.")] = "*",
    json: common.Json = False,
) -> None:
    """List the networks of torchvision and timm, each as the name that other commands take.

    Any other network works too: a weight file, hf-hub:owner/name, or your own function as package.module:function.

    Examples:

      cbpq models
      cbpq models 'resnet*'
      cbpq models 'timm:vit_*' --json
    """
    from cbpq.models import available_models

    library, colon, pattern = glob.rpartition(":")
    found = [pair for pair in available_models(pattern) if not colon or pair[0] == library]
    if not found:
        known = {name for _, name in available_models()}
        raise UsageError(f"no network is called {glob!r}{did_you_mean(pattern.strip('*?'), known)}; see: cbpq models")
    names = [{"name": source_name(library, name), "library": library} for library, name in found]
    if json:
        common.print_json(names)
        return
    width = max(len(entry["name"]) for entry in names)
    typer.echo("\n".join(f"{entry['name']:{width}}  {entry['library']}" for entry in names))


def source_name(library: str, name: str) -> str:
    """A network's name as other commands take it; torchvision's need no prefix."""
    return name if library == "torchvision" else f"{library}:{name}"
