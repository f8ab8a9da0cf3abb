"""What a browser would see of a page."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is not closed where it should be."""

    VOID = frozenset({"meta", "img", "br", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.images: list[dict[str, str | None]] = []
        """Attributes of every `img`."""
        self.tables: list[list[int]] = []
        """Cells of every row of every table; a spanning cell counts as many as it spans."""
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    @property
    def ids(self) -> list[str | None]:
        return [value for name, value in self.attributes if name == "id"]

    @property
    def addresses(self) -> list[str]:
        """Everything that is loaded or linked to."""
        return [value or "" for name, value in self.attributes if name in ("src", "href", "srcset", "action")]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append(0)
        elif tag in ("td", "th"):
            self.tables[-1][-1] += int(dict(attrs).get("colspan") or 1)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag, at {self.getpos()}"

    def handle_data(self, data):
        self.text += data
