"""What a package index shows: the README without relative links, and the project's addresses.

Hatchling runs this when it builds the package. Its settings are in `pyproject.toml`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://)([^)#]*)(#[^)]*)?\)")
"""A link, or a picture, that leads into the repository."""

INVISIBLE = re.compile(r"<!--.*?-->\n*", re.DOTALL)
"""What only the tests of the README use."""


class Metadata(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        addresses = {
            "repository": str(self.config["repository"]),
            "version": str(metadata["version"]),
        }
        text = Path(self.root, "README.md").read_text(encoding="utf-8")

        def absolute(link: re.Match[str]) -> str:
            is_picture, label, path, anchor = link.groups()
            if not addresses["repository"]:
                return "" if is_picture else f"{label} (`{path}`)"
            address = self.config["picture" if is_picture else "file"].format(path=path, **addresses)
            return f"{is_picture}[{label}]({address}{anchor or ''})"

        readme = LINK.sub(absolute, INVISIBLE.sub("", text))
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
        if addresses["repository"]:
            metadata["urls"] = {
                "Source": addresses["repository"],
                "Changelog": self.config["file"].format(path="CHANGELOG.md", **addresses),
                "Documentation": self.config["file"].format(path="docs/index.md", **addresses),
            }
