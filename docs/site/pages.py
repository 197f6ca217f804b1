"""MkDocs hook: files outside of docs/, such as the model cards and the ComfyUI README, become files of the site.

Links between them and the pages of docs/ are relative to the repository, as GitHub reads them; the hook rewrites them for the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "checkpoints/lumos-tiny/README.md": "model-card.md",
    "checkpoints/lumos-tiny/trained_on.json": "trained-on.json",
    "checkpoints/lumos-mini/README.md": "model-card-mini.md",
    "checkpoints/lumos-mini/compression.json": "compression-mini.json",
    "checkpoints/lumos-mini/training.json": "training-mini.json",
    "checkpoints/lumos-mini/trained_on.json": "trained-on-mini.json",
    "checkpoints/stiv-tiny/README.md": "model-card-stiv.md",
    "checkpoints/stiv-tiny/trained_on.json": "trained-on-stiv.json",
    "checkpoints/tokenizer-pictures/README.md": "model-card-pictures.md",
    "checkpoints/tokenizer-pictures/training.json": "training-pictures.json",
    "integrations/comfyui/README.md": "comfyui.md",
}
LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def rewritten(markdown: str, source: str, page: str) -> str:
    """Return the text with its relative links changed: `source` is its path in the repository, `page` its path on the site."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        place = OUTSIDE.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{match[2] or ''})"

    return LINK.sub(link, markdown)


def on_files(files, config):
    for source, page in OUTSIDE.items():
        text = rewritten((ROOT / source).read_text(encoding="utf-8"), source, page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri in OUTSIDE.values():
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
