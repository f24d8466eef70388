"""MkDocs hooks for the documentation site: `make docs` names this file in mkdocs.yml.

The pages under docs/ are read on a code host as well, so their links name files of the repository.
These hooks give such links a target on the site:

- a package directory (`megatron_muloco/outer/`) leads to its API page, `reference/api/outer.md`;
- any other file outside docs/ leads to a copy of it under `source/`.

API pages and copies are generated, never written to docs/. The last hook fails the build when a
page would load a script, style sheet, font or image from the network.
"""

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = "megatron_muloco"
# A link up to its target, inline or as the definition of a reference: [a](b.md), or [a]: b.md
_LINK = re.compile(r"(!?\[[^\]]*\]\(|^\[[^\]]+\]: )([^)\s]+)", re.MULTILINE)
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "bash"}
# What a browser fetches by itself; a plain link to another site is followed only by the reader.
_FETCHED = re.compile(r"<(?:(?:script|img|iframe)[^>]+src|link[^>]+href)=\"?https?:[^>]*>")
_STYLE_FETCHED = re.compile(r"(?:@import|url\()\s*['\"]?https?:")

_log = logging.getLogger("mkdocs.hooks.docs_site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the API pages, and a copy of every file outside docs/ that a page links to."""
    for package in sorted(path.parent.name for path in (_ROOT / _PACKAGE).glob("*/__init__.py")):
        files.append(File.generated(config, _api_page(package), content=_api_content(package)))
    queue = [
        target
        for file in files.documentation_pages()
        if file.abs_src_path is not None
        for target in _targets(file.content_string, f"docs/{file.src_uri}")
    ]
    copied: set[str] = set()
    while queue:
        path = queue.pop()
        if path in copied or _is_docs(path) or not (_ROOT / path).is_file():
            continue
        copied.add(path)
        text = (_ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".md"):
            queue.extend(_targets(text, path))
        files.append(
            File.generated(
                config,
                _site_path(path),
                content=_copy_content(path, text),
                inclusion=InclusionLevel.NOT_IN_NAV,
            )
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page under docs/ at pages of the site."""
    if page.file.src_uri.startswith(("source/", "reference/api/")):
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the double colons of docstrings, which announce a drawing, as single ones."""
    return html.replace("::</p>", ":</p>").replace("::</li>", ":</li>")


def on_post_build(config: MkDocsConfig) -> None:
    """Fail when a built page fetches anything from the network."""
    site = Path(config.site_dir)
    found = [
        f"{path.relative_to(site)}: {match.group()[:120]}"
        for suffix, pattern in ((".html", _FETCHED), (".css", _STYLE_FETCHED))
        for path in sorted(site.rglob(f"*{suffix}"))
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    if found:
        raise PluginError("pages load from the network:\n  " + "\n  ".join(found))


def _api_page(package: str) -> str:
    return f"reference/api/{package}.md"


def _api_content(package: str) -> str:
    return f"# {package}\n\n::: {_PACKAGE}.{package}\n    options:\n      show_submodules: true\n"


def _copy_content(path: str, text: str) -> str:
    if path.endswith(".md"):
        return _relinked(text, path)
    language = _LANGUAGES.get(Path(path).suffix, "text")
    header = f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n"
    return f"{header}````{language}\n{text}````\n"


def _site_path(path: str) -> str:
    """Return the site's source path for a path of the repository."""
    if _is_docs(path):
        return path.removeprefix("docs/")
    match = re.fullmatch(rf"{_PACKAGE}/([a-z_]+)", path)
    if match and (_ROOT / path).is_dir():
        return _api_page(match[1])
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def _is_docs(path: str) -> bool:
    return path.startswith("docs/")


def _relinked(markdown: str, path: str) -> str:
    """Return the markdown of the repository's file `path` with links between pages of the site."""
    place = posixpath.dirname(_site_path(path))

    def relink(match: re.Match[str]) -> str:
        opening, link = match.groups()
        target, hash_mark, anchor = link.partition("#")
        if not target or ":" in target:
            return match.group()
        repository_path = _resolved(target, path)
        if not (_ROOT / repository_path).exists():
            _log.warning("%s links to %s, which does not exist", path, target)
            return match.group()
        site_path = posixpath.relpath(_site_path(repository_path), place or ".")
        return f"{opening}{site_path}{hash_mark}{anchor}"

    return "".join(
        part if part.startswith("```") else _LINK.sub(relink, part)
        for part in _FENCE.split(markdown)
    )


def _targets(markdown: str, path: str) -> Iterator[str]:
    """Yield the repository's paths that the links of its file `path` name."""
    for _, link in _LINK.findall(_FENCE.sub("", markdown)):
        target = link.partition("#")[0]
        if target and ":" not in target:
            yield _resolved(target, path)


def _resolved(target: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
